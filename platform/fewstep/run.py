"""One run from start to end, on one rank of a world: train, report, score, draw; Ray or not."""

from __future__ import annotations

import json
import queue
import shlex
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml

from . import build
from .config import ConfigError, read_json_lines, resolve_out, resolve_ref
from .data.feed import Feed
from .diffusion.draws import INDICES, Draws, fold
from .diffusion.samplers import to_uint8
from .engine.folder import checkpoints, complete, foreign
from .engine.manifest import CheckpointError
from .engine.storage import writable
from .engine.train import Collapsed, Engine, NoData, NonFinite, Report
from .engine.world import World
from .folders import EXPORT, NETWORK, FolderError, append_private, claim, replaceable, usable, write_private
from .locks import hold
from .metrics.base import Samples, Score, evaluate, refusal
from .recipe import Recipe
from .students import export_run
from .texts import masked, one_line
from .tracking.provenance import Provenance
from .tracking.tracker import Tracker
from .watchdog import LOOK_S, Watchdog

ROLL_BACK = "roll_back"
RANK_0_LOCK, WRITER_S = ".lock-rank-0", 60.0
EVENTS = {Collapsed: "collapse", NonFinite: "non_finite", CheckpointError: "not_saved"}
GRID_IMAGES, GRID_COLUMNS = 100, 10
GRID_LEVEL = (
    INDICES // 2
)  # where the fake score's denoising is drawn: half-way up the ramp, shape known and texture not


NOT_SCORES = ("who", "sampler", "nfe", "images", "images_per_s", "seen_by_loss")  # keys of a row beside its scores


@dataclass(frozen=True)
class Row:
    """One line of the closing table: a sampler, its calls an image, its speed and its scores."""

    who: str
    sampler: str
    nfe: int
    images: int
    images_per_s: float
    scores: dict[str, float] = field(default_factory=dict)
    seen_by_loss: tuple[str, ...] = ()

    @classmethod
    def of(cls, who: str, samples: Samples, scores: list[Score]) -> Row:
        """The line of a set of samples and its scores."""
        speed = len(samples) / samples.seconds
        values = {s.name: s.value for s in scores}
        return cls(who, samples.sampler, samples.calls, len(samples), speed, values, _seen(scores))

    def to_dict(self) -> dict[str, Any]:
        """Flat JSON types: `nfe`, `images`, `images_per_s`, and each score under its name; `seen_by_loss` lists the
        scores whose network a loss of the run used."""
        head = {"sampler": self.sampler, "nfe": self.nfe, "images": self.images, "images_per_s": self.images_per_s}
        return head | self.scores | {"seen_by_loss": list(self.seen_by_loss)}


def _seen(scores: list[Score]) -> tuple[str, ...]:
    return tuple(score.name for score in scores if score.seen_by_loss)


class Reports:
    """The run's own record, `reports.jsonl`: one line a report, which a driver follows and a person can read."""

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
        """The student's scores at a step, which may come after later reports."""
        line = {"step": step, "images": images, "scores": {score.name: score.value for score in scores}}
        self._write(line | {"seen_by_loss": list(_seen(scores))})

    def _write(self, line: dict[str, Any]) -> None:
        with self.lock:
            append_private(self.path, json.dumps(masked(line)) + "\n")


def report_lines(folder: Path) -> list[dict[str, Any]]:
    """All reports of a run's folder as they were made; a line still being written is left for the next time.

    Raises ConfigError naming the file and the line of one that is damaged.
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
    """The reports that led to where the run is, in the order they were made: what a roll-back undid is left out.

    scores: with the lines that hold scores, and no metrics.
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
    """What whoever runs a recipe offers beside its ranks; a bare process offers nothing.

    preempted: asked by all ranks at each report, and the same on all; true ends the run, saved, to go on later.
    score: a checkpoint's scores, made elsewhere while training goes on; called from a thread of rank 0.
    report: shown each report by every rank, with its engine.
    """

    preempted: Callable[[], bool] = lambda: False
    score: Callable[[str], list[Score]] | None = None
    report: Callable[[Engine, Report], None] = lambda engine, report: None


class Scorer:
    """Scores on a thread of rank 0, so that training goes on: the ranks stop for the sampling, or not even for that."""

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
        """Scores samples of the student or of the teacher; at the last step they make a line of the closing table."""
        self._queue.put(lambda: self._note(who, evaluate(self.metrics, samples), step, samples))

    def add_checkpoint(self, path: Path | str, step: int) -> None:
        """Has the student of a checkpoint, once that is complete, sampled and scored elsewhere."""
        self._queue.put(lambda: self._elsewhere(path, step))

    def _work(self) -> None:
        while (score := self._queue.get()) is not None:
            try:
                score()
            except BaseException as error:  # handed to `close`, which raises it in the run's own thread
                self.error = error
                return

    def _elsewhere(self, path: Path | str, step: int) -> None:
        while not complete(path):
            if self.engine.saver.failed:
                return  # the run ends with the reason
            time.sleep(LOOK_S)
        self._note("student", self.services.score(str(path)), step)

    def _note(self, who: str, scores: list[Score], step: int, samples: Samples | None = None) -> None:
        for score in scores:
            self.tracker.score(_named(score, who), step=step)
            if who == "student" and score.name == self.best_by and self.engine.saver is not None:
                self.engine.saver.scored(step, score.value)
        if who == "student":
            images = step * self.engine.train.batch
            self.reports.score(step, images, scores)
        if step == self.engine.train.steps:  # the closing table is of the last checkpoint only
            self.rows.append(Row.of(who, samples, scores))

    def close(self) -> list[Row]:
        """Waits for what is still being scored. Raises what went wrong there."""
        self._queue.put(None)
        self._thread.join()
        if self.error is not None:
            raise self.error
        return self.rows


def _named(score: Score, who: str) -> dict[str, Any]:
    entry = score.to_dict()
    return entry | {"name": entry["name"] if who == "student" else f"{who}/{score.sampler}/{entry['name']}"}


def run(
    recipe: Recipe, feed: Feed | NoData, world: World, origin: Provenance, services: Services | None = None
) -> dict[str, Any]:
    """Trains a recipe to its end, going on from its last checkpoint if there is one.

    Every rank calls it; rank 0 keeps the records. origin: what the tracker says of code, machine and data.
    Returns, on rank 0, what a job prints: run_id, folder, finished, step, rows of the closing table, grid.
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
    write_private(folder / "recipe.yaml", yaml.safe_dump(recipe.written, sort_keys=False))
    build.describe_net(folder, engine.nets["student"])
    reports = Reports(folder, engine.step)
    with open_tracker(recipe, origin) as tracker:
        tracker.rewind(engine.step)
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
            tracker.event("stopped", engine.step, engine.images, "asked to stop; the same words go on from here")
        tracker.flush(timeout_s=30)
        run_id = tracker.run_id
        if not engine.finished:
            tracker.finish("KILLED")
    done = {"finished": engine.finished, "step": engine.step, "rows": rows}
    return {"run_id": run_id, "folder": str(folder), "grid": str(folder / "student.png")} | done


def start_from(recipe: Recipe) -> Path | str | None:
    """The checkpoint that a run goes on from: its own newest, else the one that `resume` names. Raises ValueError."""
    own = checkpoints(recipe.checkpoints)
    if own:
        return own[-1]
    if recipe.resume in ("auto", "never"):
        return None
    given = resolve_ref(recipe.resume)
    inside = [given] if complete(given) else [c for c in (build.latest(given),) if c is not None]
    if not inside:
        raise ValueError(
            f"resume: no checkpoint {recipe.resume!r}; give auto, never, a checkpoint step-* or a run's folder"
        )
    return inside[0]


def _train(recipe: Recipe, engine: Engine, book: Book | None, services: Services) -> None:
    """The training itself, on any rank; `book` is rank 0's."""
    if engine.step == 0:
        draw(recipe, engine, book)
        draw_teacher(recipe, engine, book)
    before = engine.images
    for report in engine.run():
        services.report(engine, report)
        if book is not None:
            book.report(report)
        _score_due(recipe, engine, report, before, book, services)
        before = engine.images
        if services.preempted():
            engine.stop()
    if engine.finished:
        _finish(recipe, engine, book)


def open_tracker(recipe: Recipe, origin: Provenance) -> Tracker:
    """The run's MLflow tracker, with everything that says where its numbers come from."""
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
    """Where rank 0 puts reports, pictures and scores."""

    recipe: Recipe
    tracker: Tracker
    scorer: Scorer
    reports: Reports

    def report(self, report: Report) -> None:
        """To the run's own record and to the tracker."""
        self.reports.add(report)
        self.tracker.log(report.metrics, report.step, report.images)
        for event in report.events:
            self.tracker.event(event.kind, event.step, report.images, event.reason)
            if event.kind == ROLL_BACK:
                self.tracker.diverge()

    def picture(self, name: str, images: torch.Tensor, step: int) -> None:
        """A grid of uint8 (N, C, H, W), in the tracker and as the run folder's `<name>.png`, the newest one."""
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
    """Scores and grids that fell due since `before` images. Elsewhere where there is room: then no rank waits; else all
    ranks sample and rank 0 scores. The last are _finish's."""
    e = recipe.evaluate
    if engine.finished or engine.step < report.step:  # a roll-back will come by here again
        return
    if e.metrics and _due(e.every_images, before, report.images):
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
    if _due(e.grid_every_images, before, report.images):
        draw(recipe, engine, book)


def _samples(engine: Engine, sampler: build.Sampler, images: int, seed: int, batch: int) -> Samples | None:
    """What build.make_samples makes, on all ranks; each batch is a sign of life."""
    alive = lambda: engine.at(f"step {engine.step}, sampling {sampler.name}")
    return build.make_samples(sampler, images, seed, batch, engine.world, alive=alive)


def _due(every: int | None, before: int, now: int) -> bool:
    """Whether a multiple of `every` was reached after `before`."""
    return every is not None and now // every > before // every


def draw(recipe: Recipe, engine: Engine, book: Book | None) -> None:
    """Fixed-seed grids of the student and of the fake score's denoising: same noise and labels every time."""
    student = build.student_sampler(recipe.method, engine.sampling)
    samples = _samples(engine, student, GRID_IMAGES, recipe.seed, GRID_IMAGES)
    if book is not None:
        book.picture("student", samples.images, engine.step)
    if "fake" in engine.nets:
        denoised = fake_denoising(recipe, engine, student)
        if book is not None:
            book.picture("fake", to_uint8(denoised).cpu(), engine.step)


def draw_teacher(recipe: Recipe, engine: Engine, book: Book | None) -> None:
    """The teacher's grid by 18 Heun steps from the student's noise and labels: what it is to be compared with."""
    if "teacher" in engine.nets:
        sampler = build.heun_sampler(engine.nets["teacher"], 18)
        samples = _samples(engine, sampler, GRID_IMAGES, recipe.seed, GRID_IMAGES)
        if book is not None:
            book.picture("teacher", samples.images, 0)


@torch.no_grad()
def fake_denoising(recipe: Recipe, engine: Engine, sampler: build.Sampler) -> torch.Tensor:
    """What the fake score makes of the student's grid noised half-way up the ramp; every rank computes all of it."""
    fake, device = engine.nets["fake"], engine.world.device
    draws = Draws(fold(recipe.seed, "grid"), 0, device=device)
    z = draws.normal("z", (GRID_IMAGES, *sampler.shape))
    cond = sampler.conditions.listed(torch.arange(GRID_IMAGES, device=device))
    x = sampler.sample(z, cond, draws)
    u = torch.full((GRID_IMAGES,), GRID_LEVEL / (INDICES - 1), dtype=torch.float64, device=device)
    level = fake.schedule.level(fake.schedule.ramp(u), x.ndim)
    return fake(level.noise(x, draws.normal("eps", x.shape)), level, cond)


def _finish(recipe: Recipe, engine: Engine, book: Book | None) -> None:
    """The last checkpoint's grids and samples to score, the teacher's beside them."""
    e, teacher = recipe.evaluate, engine.nets.get("teacher")
    draw(recipe, engine, book)
    samplers = [("student", build.student_sampler(recipe.method, engine.sampling))]
    if teacher is not None:
        samplers = [("teacher", build.heun_sampler(teacher, steps)) for steps in e.teacher_steps] + samplers
    for who, sampler in samplers if e.metrics else []:
        samples = _samples(engine, sampler, e.images, recipe.seed, e.batch)
        if book is not None:
            book.scorer.add(who, samples, engine.step)


def publish(recipe: Recipe, rows: list[dict[str, Any]]) -> dict[str, Any] | None:
    """Exports a finished run's student and registers it in MLflow; what `export_run` returns, or None if that failed.

    A failure is one line on standard error: the run is finished all the same.
    """
    try:
        export = export_run(recipe.folder, rows, known=recipe.urls)
    except Exception as error:  # hours of training are done, and whatever went wrong can be done again
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
    """What can be checked before anything starts: folders, metrics, resume. Raises ValueError naming the field."""
    usable(recipe.folder, "run")
    if (name := foreign(recipe.checkpoints)) is not None:
        raise FolderError(
            f"name: {recipe.checkpoints} holds {name!r}, which is no part of a checkpoint, so none is kept there; "
            "choose another with name=... or storage=..., or move that away"
        )
    for name, kind in (("export", EXPORT), ("teacher", NETWORK)):
        replaceable(recipe.folder / name, kind, overwrite=True, field="name")
    writable(resolve_out(recipe.out), "out")
    if recipe.storage is not None:
        writable(recipe.storage, "storage")
    build.make_metrics(recipe)
    best_by = recipe.train.keep_best_by
    if recipe.train.keep_best and best_by in recipe.seen_by_loss and not recipe.evaluate.rank_seen_by_loss:
        raise ValueError(f"train.keep_best_by: {refusal(best_by)}")
    if recipe.resume == "never" and (own := checkpoints(recipe.checkpoints)):
        raise ValueError(f"resume: never, but {own[-1]} exists; remove it, or choose another name=...")
    start_from(recipe)
