"""Runs a recipe from start to end on one rank: train, report, score, draw grids. It works with and without Ray."""

from __future__ import annotations

import json
import math
import os
import queue
import shlex
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch

from . import build
from .config import ConfigError, read_json_lines, resolve_out, resolve_ref, to_yaml
from .data.feed import Feed
from .diffusion.draws import INDICES, Draws, fold
from .diffusion.samplers import to_uint8
from .engine.checkpoint import check_recipe
from .engine.folder import checkpoints, complete, foreign
from .engine.manifest import CheckpointError, read_manifest
from .engine.train import Collapsed, Engine, NoData, NonFinite, Report
from .engine.world import World
from .folders import EXPORT, NETWORK, PIPELINE, FolderError, append_private, claim, replaceable, usable, write_private
from .locks import hold
from .metrics.base import Measure, Samples, Score, check_samples, evaluate, refusal
from .networks.conditions import Texts
from .networks.denoiser import Denoiser
from .networks.export import INFERENCE
from .recipe import Recipe, check_secrets
from .storage.place import writable
from .students import check_export, export_run
from .texts import masked, one_line
from .tracking.nodes import SystemMetrics
from .tracking.provenance import Provenance
from .tracking.store import tracking_uri
from .tracking.tracker import Tracker
from .watchdog import LOOK_S, Watchdog

T = TypeVar("T")
ROLL_BACK = "roll_back"
RANK_0_LOCK, WRITER_S = ".lock-rank-0", 60.0
EVENTS = {Collapsed: "collapse", NonFinite: "non_finite", CheckpointError: "not_saved"}
GRID_IMAGES, GRID_COLUMNS = 100, 10
GRID_LEVEL = INDICES // 2  # noise level of the fake score's grid: half-way up the ramp, where texture is lost


NOT_SCORES = ("who", "sampler", "nfe", "images", "images_per_s", "seen_by_loss")  # keys of a row beside its scores


@dataclass(frozen=True)
class Row:
    """One row of the closing table: a sampler, its NFE (network calls an image), its speed and its scores."""

    who: str
    sampler: str
    nfe: int
    images: int
    images_per_s: float
    scores: dict[str, float] = field(default_factory=dict)
    seen_by_loss: tuple[str, ...] = ()

    @classmethod
    def of(cls, who: str, samples: Samples, scores: list[Score]) -> Row:
        """Returns the row of a set of samples and its scores."""
        speed = len(samples) / samples.seconds
        values = {s.name: s.value for s in scores}
        return cls(who, samples.sampler, samples.calls, len(samples), speed, values, _seen(scores))

    def to_dict(self) -> dict[str, Any]:
        """Returns a flat dict of JSON types: `nfe`, `images`, `images_per_s`, and each score under its name.

        `seen_by_loss` lists the scores whose network a loss of the run used.
        """
        head = {"sampler": self.sampler, "nfe": self.nfe, "images": self.images, "images_per_s": self.images_per_s}
        return head | self.scores | {"seen_by_loss": list(self.seen_by_loss)}


def _seen(scores: list[Score]) -> tuple[str, ...]:
    return tuple(score.name for score in scores if score.seen_by_loss)


class Reports:
    """The file `reports.jsonl` of a run: one JSON line per report. A driver follows it and a person can read it."""

    def __init__(self, folder: Path, resumed_step: int):
        self.path, self.lock = folder / "reports.jsonl", threading.Lock()
        kept = [line for line in read_reports(folder, scores=True) if line["step"] <= resumed_step]
        write_private(self.path, "".join(json.dumps(line) + "\n" for line in kept))

    def add(self, report: Report) -> None:
        line = {"step": report.step, "images": report.images, "metrics": report.metrics}
        if report.events:
            line["events"] = [vars(event) for event in report.events]
        self._write(line)

    def score(self, step: int, images: int, scores: list[Score]) -> None:
        """Writes the student's scores at a step. Later reports may already be in the file."""
        line = {"step": step, "images": images, "scores": {score.name: score.value for score in scores}}
        self._write(line | {"seen_by_loss": list(_seen(scores))})

    def _write(self, line: dict[str, Any]) -> None:
        with self.lock:
            append_private(self.path, json.dumps(masked(line)) + "\n")


def report_lines(folder: Path) -> list[dict[str, Any]]:
    """Returns all reports of a run's folder in the order of writing. An unfinished last line is skipped.

    Raises ConfigError that names the file and the line of a damaged report.
    """
    path = folder / "reports.jsonl"
    if not path.is_file():
        return []
    try:  # a driver reads all of it several times a second
        with open(path, "rb") as file:
            lines = [json.loads(line) for line in file if line.endswith(b"\n")]
    except (ValueError, RecursionError):
        lines = list(read_json_lines(path))
    for number, line in enumerate(lines, start=1):
        keys = line.keys() if isinstance(line, dict) else set()
        if not {"step", "images"} <= keys or not {"metrics", "scores"} & keys:
            raise ConfigError(f"{path}: line {number} is no report; remove that line, or give the run another name=...")
    return lines


def read_reports(folder: Path, scores: bool = False) -> list[dict[str, Any]]:
    """Returns the reports of the run's current course in order. Reports that a roll-back undid are left out.

    scores: also return the lines that hold scores and no metrics.
    """
    kept: list[dict[str, Any]] = []
    for line in report_lines(folder):
        kept.append(line)
        back = [event["step"] for event in line.get("events", []) if event["kind"] == ROLL_BACK]
        if back:
            kept = [earlier for earlier in kept if earlier["step"] <= back[0]]
    return [line for line in kept if scores or "metrics" in line]


@dataclass(frozen=True)
class Services:
    """Callbacks that the caller of `run` offers to the ranks. The defaults are those of a bare process.

    preempted: every rank calls it at each report and gets the same answer. True saves and ends the run, to be resumed.
    score: returns the scores of a checkpoint, computed in another process. A thread of rank 0 calls it; training goes
        on meanwhile.
    report: every rank calls it with its engine and each report.
    """

    preempted: Callable[[], bool] = lambda: False
    score: Callable[[str], list[Score]] | None = None
    report: Callable[[Engine, Report], None] = lambda engine, report: None


class Scorer:
    """Scores samples on a thread of rank 0, so that training goes on.

    Training pauses only while the ranks sample. With `Services.score` it does not pause.
    """

    def __init__(self, recipe: Recipe, tracker: Tracker, reports: Reports, engine: Engine, services: Services):
        self.metrics, self.tracker = build.make_metrics(recipe, engine.world.device), tracker
        self.reports = reports
        self.engine, self.services, self.best_by = engine, services, recipe.train.keep_best_by
        self.rows: list[Row] = []
        self.error: BaseException | None = None
        self._queue: queue.Queue = queue.Queue()
        self._thread = threading.Thread(target=self._work, name="fewstep-scores", daemon=True)
        self._thread.start()

    def add(self, who: str, samples: Samples, step: int) -> None:
        """Queues samples of the student or the teacher. Those of the last step add a row to the closing table."""
        self._queue.put(lambda: self._record(who, evaluate(self.metrics, samples), step, samples))

    def add_checkpoint(self, path: Path | str, step: int) -> None:
        """Queues a checkpoint. `Services.score` samples and scores its student once it is complete."""
        self._queue.put(lambda: self._score_checkpoint(path, step))

    def _work(self) -> None:
        while (score := self._queue.get()) is not None:
            try:
                score()
            except BaseException as error:  # `close` raises it in the main thread
                self.error = error
                return

    def _score_checkpoint(self, path: Path | str, step: int) -> None:
        while not complete(path):
            if self.engine.saver.failed:
                return  # the main thread raises this failure
            time.sleep(LOOK_S)
        self._record("student", self.services.score(str(path)), step)

    def _record(self, who: str, scores: list[Score], step: int, samples: Samples | None = None) -> None:
        for score in scores:
            self.tracker.score(_tracker_entry(score, who), step=step)
            if who == "student" and score.name == self.best_by and self.engine.saver is not None:
                self.engine.saver.scored(step, score.value)
        if who == "student":
            images = step * self.engine.train.batch
            self.reports.score(step, images, scores)
        if step == self.engine.train.steps:  # the closing table holds the last checkpoint only
            self.rows.append(Row.of(who, samples, scores))

    def close(self) -> list[Row]:
        """Waits for the queued scores and returns the rows. Raises the error of the scoring thread, if any."""
        self._queue.put(None)
        self._thread.join()
        if self.error is not None:
            raise self.error
        return self.rows


def _tracker_entry(score: Score, who: str) -> dict[str, Any]:
    entry = score.to_dict()
    return entry | {"name": entry["name"] if who == "student" else f"{who}/{score.sampler}/{entry['name']}"}


def run(
    recipe: Recipe, feed: Feed | NoData, world: World, origin: Provenance, services: Services | None = None
) -> dict[str, Any]:
    """Trains a recipe to its end. It resumes from the last checkpoint if there is one.

    Every rank calls it; rank 0 writes the records. origin: provenance of code, machine and data, for the tracker.
    Returns the job's result on rank 0: run_id, page, folder, finished, step, rows of the closing table, grid.
    Returns {} on the other ranks.
    """
    torch.set_num_threads(recipe.cluster.threads)
    folder, services = recipe.folder, services or Services()
    if world.rank == 0:
        claim(folder, "run")
        # the rank 0 of a driver that was killed may live on for a moment, and write
        hold(folder / RANK_0_LOCK, wait_s=WRITER_S)
    engine = build.make_engine(recipe, feed, world, recipe.checkpoints)
    checkpoint = start_from(recipe)
    if checkpoint is not None:
        engine.resume(checkpoint)
    if world.rank:
        with Watchdog(engine, folder, 60 * recipe.failure.stall_minutes):
            _train(recipe, engine, None, services)
        return {}
    write_private(folder / "recipe.yaml", to_yaml(recipe.written))
    build.describe_net(folder, engine.nets["student"])
    reports = Reports(folder, engine.step)
    with open_tracker(recipe, origin) as tracker:
        tracker.rewind(engine.step)
        if recipe.data is not None and checkpoint is None:
            digest = origin.tags.get("fingerprint.data", "unknown")
            name = Path(masked(recipe.data.path)).name
            tracker.data(name, digest, recipe.data.path, rows=feed.rows)
        book = Book(recipe, tracker, Scorer(recipe, tracker, reports, engine, services), reports)
        try:
            with Watchdog(engine, folder, 60 * recipe.failure.stall_minutes):
                _train(recipe, engine, book, services)
        except (Collapsed, NonFinite, CheckpointError) as error:
            tracker.event(EVENTS[type(error)], engine.step, engine.images, str(error))
            raise
        rows = [row.to_dict() | {"who": row.who} for row in book.scorer.close()]
        if engine.finished:
            write_private(folder / "scores.json", json.dumps(rows, indent=1))
        else:
            tracker.event("stopped", engine.step, engine.images, "asked to stop; the same command line resumes it")
        tracker.flush(timeout_s=30)
        run_id, page = tracker.run_id, tracker.page
        if not engine.finished:
            tracker.finish("KILLED")
    done = {"finished": engine.finished, "step": engine.step, "rows": rows}
    return {"run_id": run_id, "page": page, "folder": str(folder), "grid": str(folder / "student.png")} | done


def start_from(recipe: Recipe) -> Path | str | None:
    """Returns the checkpoint that a run starts from, or None for a new run.

    That is the run's own newest checkpoint, else the one that `resume` names. Raises ValueError if `resume` names none.
    """
    own = checkpoints(recipe.checkpoints)
    if own:
        return own[-1]
    if recipe.resume in ("auto", "never"):
        return None
    ref = resolve_ref(recipe.resume)
    checkpoint = ref if complete(ref) else build.latest(ref)
    if checkpoint is None:
        raise ValueError(
            f"resume: no checkpoint {recipe.resume!r}; give auto, never, a checkpoint step-* or a run's folder"
        )
    return checkpoint


def _train(recipe: Recipe, engine: Engine, book: Book | None, services: Services) -> None:
    """Trains on any rank. `book` is None on all ranks but rank 0."""
    if engine.step == 0:
        draw(recipe, engine, book)
        draw_teacher(recipe, engine, book)
    before = engine.images
    system = SystemMetrics()
    for report in engine.run():
        services.report(engine, report)
        nodes = engine.world.gather(system.read())
        if book is not None:
            book.report(report, nodes)
        _score_due(recipe, engine, report, before, book, services)
        before = engine.images
        if services.preempted():
            engine.stop()
    if engine.finished:
        _finish_run(recipe, engine, book)


def open_tracker(recipe: Recipe, origin: Provenance) -> Tracker:
    """Opens the run's MLflow tracker and records the provenance: tags and files."""
    tracker = Tracker.open(
        recipe.folder,
        uri=recipe.tracking.uri,
        experiment=recipe.tracking.experiment,
        name=recipe.name,
        recipe=recipe.written,
        tags=origin.tags,
        aside=("name", "out", "tracking", "storage", "resume", "resume_allow"),
    )
    for name, content in origin.files.items():
        tracker.text(name, content)
    return tracker


@dataclass
class Book:
    """Outputs of rank 0: reports, pictures and scores, in the run's folder and in the tracker."""

    recipe: Recipe
    tracker: Tracker
    scorer: Scorer
    reports: Reports

    def report(self, report: Report, nodes: dict[str, float]) -> None:
        """Writes a report to the run's own record and to the tracker. nodes: system metrics of all nodes, for the
        tracker alone."""
        self.reports.add(report)
        self.tracker.log(report.metrics | nodes, report.step, report.images)
        for event in report.events:
            self.tracker.event(event.kind, event.step, report.images, event.reason)
            if event.kind == ROLL_BACK:
                self.tracker.diverge()

    def picture(self, name: str, images: torch.Tensor, step: int) -> None:
        """Writes a grid of images, uint8 (N, C, H, W), to the tracker and to `<name>.png` in the run's folder."""
        from PIL import Image

        picture = build.grid(images, GRID_COLUMNS).numpy()
        self.tracker.image(name, picture, step)
        shown = picture[..., 0] if picture.shape[-1] == 1 else picture
        Image.fromarray(shown).resize((shown.shape[1] * 2, shown.shape[0] * 2), Image.Resampling.NEAREST).save(
            self.recipe.folder / f"{name}.png"
        )


def _score_due(
    recipe: Recipe, engine: Engine, report: Report, before: int, book: Book | None, services: Services
) -> None:
    """Makes the scores and grids that fell due after `before` images.

    With `services.score` another process samples and scores, and no rank waits. Without it all ranks sample and rank 0
    scores. `_finish_run` makes those of the last step.
    """
    e = recipe.evaluate
    if engine.finished or engine.step < report.step:  # after a roll-back the run reaches this step again
        return
    if e.metrics and _is_due(e.every_images, before, report.images):
        if engine.saver is not None:
            engine.saver.pending(report.step)
        if services.score is not None:
            path = report.checkpoint or engine.save()
            if book is not None:
                book.scorer.add_checkpoint(path, report.step)
        else:
            sampler = build.student_sampler(recipe.method, engine.sampling)
            samples = _samples(engine, sampler, e.images, recipe.seed, e.batch)
            if book is not None:
                book.scorer.add("student", samples, report.step)
    if _is_due(e.grid_every_images, before, report.images):
        draw(recipe, engine, book)


def _samples(engine: Engine, sampler: build.Sampler, images: int, seed: int, batch: int) -> Samples | None:
    """Calls build.make_samples on all ranks. Each batch is a heartbeat for the watchdog."""
    heartbeat = lambda: engine.heartbeat(f"step {engine.step}, sampling {sampler.name}")
    return build.make_samples(sampler, images, seed, batch, engine.world, alive=heartbeat)


def _is_due(every: int | None, before: int, now: int) -> bool:
    """True if a multiple of `every` lies in (before, now]."""
    return every is not None and now // every > before // every


def draw(recipe: Recipe, engine: Engine, book: Book | None) -> None:
    """Draws grids of the student and of the fake score's denoising. Noise and labels are the same every time. A method
    whose student generates nothing has none."""
    if not recipe.method.generates:
        return
    student = build.student_sampler(recipe.method, engine.sampling)
    samples = _samples(engine, student, GRID_IMAGES, recipe.seed, GRID_IMAGES)
    if book is not None:
        book.picture("student", samples.images, engine.step)
    if "fake" in engine.nets:
        denoised = fake_denoising(recipe, engine, student)
        if book is not None:
            book.picture("fake", to_uint8(student.pictures(denoised)).cpu(), engine.step)


def draw_teacher(recipe: Recipe, engine: Engine, book: Book | None) -> None:
    """Draws the teacher's grid by 18 Heun steps, from the same noise and labels as the student's grid."""
    if "teacher" in engine.nets:
        sampler = build.teacher_sampler(engine.nets["teacher"], 18, recipe.evaluate.teacher_guidance)
        samples = _samples(engine, sampler, GRID_IMAGES, recipe.seed, GRID_IMAGES)
        if book is not None:
            book.picture("teacher", samples.images, 0)


@torch.no_grad()
def fake_denoising(recipe: Recipe, engine: Engine, sampler: build.Sampler) -> torch.Tensor:
    """Denoises the student's grid by the fake score, from noise half-way up the ramp. Returns x0 (N, C, H, W).

    Every rank computes the whole grid.
    """
    fake, device = engine.nets["fake"], engine.world.device
    draws = Draws(fold(recipe.seed, "grid"), 0, device=device)
    z = draws.normal("z", (GRID_IMAGES, *sampler.shape))
    cond = sampler.conditions.listed(torch.arange(GRID_IMAGES, device=device))
    x = sampler.sample(z, cond, draws)
    u = torch.full((GRID_IMAGES,), GRID_LEVEL / (INDICES - 1), dtype=torch.float64, device=device)
    level = fake.schedule.level(fake.schedule.ramp(u), x.ndim)
    return fake(level.noise(x, draws.normal("eps", x.shape)), level, cond)


def _finish_run(recipe: Recipe, engine: Engine, book: Book | None) -> None:
    """Draws the grids of the last step, and queues samples of student and teacher for scoring."""
    e, teacher = recipe.evaluate, engine.nets.get("teacher")
    draw(recipe, engine, book)
    if not recipe.method.generates:
        return
    samplers = [("student", build.student_sampler(recipe.method, engine.sampling))]
    if teacher is not None:
        samplers = [
            ("teacher", build.teacher_sampler(teacher, steps, e.teacher_guidance)) for steps in e.teacher_steps
        ] + samplers
    for who, sampler in samplers if e.metrics else []:
        samples = _samples(engine, sampler, e.images, recipe.seed, e.batch)
        if book is not None:
            book.scorer.add(who, samples, engine.step)


def publish(recipe: Recipe, rows: list[dict[str, Any]]) -> dict[str, Any] | None:
    """Exports a finished run's student and registers it in MLflow. Returns what `export_run` returns.

    A failure prints one line on standard error, because the run is finished anyway. A failed export returns None.
    """
    try:
        export = export_run(recipe.folder, rows, known=recipe.urls)
    except Exception as error:  # the training is done, and the export can be repeated
        again = f"python jobs/export.py run={shlex.quote(str(recipe.folder))}"
        print(f"not exported: {one_line(error)}; the run is finished, try again with: {again}", file=sys.stderr)
        return None
    try:
        register(recipe, Path(export["folder"]))
    except Exception as error:
        print(f"not registered in MLflow: {one_line(error)}; the run is finished and exported", file=sys.stderr)
    return export


def register(recipe: Recipe, export: Path) -> None:
    """Adds a finished run's export to its MLflow run and registers it as a new version of the model, alias `newest`."""
    with open_tracker(recipe, Provenance({}, {})) as tracker:
        tracker.model(export, recipe.model_name, "newest")


def check(recipe: Recipe) -> None:
    """Checks, before anything starts, all that the run would find later: folders, the checkpoint that it goes on from,
    the network, the data, the scores, and whether the machine has the memory for them.

    Nothing is trained or kept, and no weights are read. Raises ValueError or OSError naming the field; of several
    mistakes a ConfigError with a line each.
    """
    errors: list[Exception] = []

    def tried(look: Callable[[], T]) -> T | None:
        try:
            return look()
        except (ValueError, OSError) as error:
            errors.append(error)
            return None

    check_secrets(recipe)
    tried(lambda: tracking_uri(recipe.tracking.uri))
    tried(lambda: _check_folders(recipe))
    if not errors:
        tried(lambda: _check_resume(recipe))
    net = tried(lambda: build.check_network(recipe, build.make_teacher(recipe, weights=False)))
    if recipe.data is not None:
        shards = tried(lambda: build.open_data(recipe.data))
        if net is not None and shards is not None:
            tried(lambda: build.check_data(shards, net, recipe.method.needs))
    tried(lambda: build.check_start(recipe))
    metrics = tried(lambda: build.make_metrics(recipe))
    if net is not None and metrics:
        tried(lambda: _check_scores(recipe, metrics, net))
    if len(errors) == 1:
        raise errors[0]
    if errors:
        raise ConfigError("\n".join(map(str, errors)))


def _check_scores(recipe: Recipe, metrics: list[Measure], net: Denoiser) -> None:
    e, best_by = recipe.evaluate, recipe.train.keep_best_by
    _check_memory("evaluate.batch", e.batch, net, "sampled at once")
    _check_memory("evaluate.images", e.images, net, "scored together", item_bytes=1)
    try:
        prompts = build.listed_prompts(recipe) if isinstance(net.conditions, Texts) else ()
        check_samples(metrics, net.picture_shape, net.classes, e.images, prompts)
    except ValueError as error:
        raise ValueError(f"evaluate.metrics: {error}") from None
    if recipe.train.keep_best and best_by in recipe.seen_by_loss and not e.rank_seen_by_loss:
        raise ValueError(f"train.keep_best_by: {refusal(best_by)}")


def export_notes(recipe: Recipe) -> list[str]:
    """A line that says why the run's student cannot be exported, where that is known beforehand. Raises ValueError."""
    net = build.make_teacher(recipe, weights=False)
    try:
        check_export(recipe.method, net, build.pipeline_folder(recipe))
    except ValueError as error:
        return [f"nothing will be exported: {one_line(error)}"]
    return []


def _check_folders(recipe: Recipe) -> None:
    usable(recipe.folder, "run")
    if str(recipe.checkpoints).startswith("memory://"):
        raise ValueError("storage: memory:// ends with the process, and checkpoints have to outlive it; give a folder")
    if (name := foreign(recipe.checkpoints)) is not None:
        raise FolderError(
            f"name: {masked(str(recipe.checkpoints))} holds {name!r}, which is no part of a checkpoint, so none is "
            "kept there; choose another with name=... or storage=..., or move that away"
        )
    export = PIPELINE if (recipe.folder / "export" / INFERENCE).is_file() else EXPORT
    for name, kind in (("export", export), ("teacher", NETWORK)):
        replaceable(recipe.folder / name, kind, overwrite=True, field="name")
    writable(resolve_out(recipe.out), "out")
    if recipe.storage is not None:
        writable(recipe.storage, "storage")


def _check_resume(recipe: Recipe) -> None:
    """Raises ValueError where the run may not go on from the checkpoint that it would go on from."""
    if recipe.resume == "never" and (own := checkpoints(recipe.checkpoints)):
        raise ValueError(f"resume: never, but {masked(str(own[-1]))} exists; remove it, or choose another name=...")
    checkpoint = start_from(recipe)
    if checkpoint is not None:
        check_recipe(read_manifest(checkpoint), recipe.numbers, recipe.resume_allow, masked(str(checkpoint)))


def _check_memory(field: str, images: int, net: Denoiser, what: str, item_bytes: int = 16) -> None:
    """Raises ValueError where so many images alone, without the network's work on them, exceed the machine's memory.

    item_bytes: of one value; 16 are float32 noise, sample, network input and output.
    """
    need, total = (
        images * math.prod(net.picture_shape) * item_bytes,
        os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
    )
    if need > total:
        raise ValueError(
            f"{field}: {images:,} images {what} take {need / 2**30:,.0f} GiB or more, and this machine has "
            f"{total / 2**30:,.0f}; give fewer"
        )
