"""One run from start to end, on one rank of a world: train, report, score, draw; Ray or not."""

from __future__ import annotations

import json
import queue
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml

from . import build
from .config import read, resolve, validate
from .data.feed import Feed
from .diffusion.draws import INDICES, Draws, fold
from .diffusion.samplers import to_uint8
from .engine.state import writable
from .engine.train import Engine, Report
from .engine.world import World
from .metrics.base import Samples, Score, evaluate
from .recipe import Recipe
from .tracking.provenance import Provenance
from .tracking.tracker import Tracker

GRID_IMAGES, GRID_COLUMNS = 100, 10
GRID_LEVEL = (
    INDICES // 2
)  # where the fake score's denoising is drawn: half-way up the ramp, shape known and texture not


@dataclass(frozen=True)
class Row:
    """One line of the closing table: a sampler, its calls an image, its speed and its scores."""

    who: str
    sampler: str
    nfe: int
    images: int
    images_per_s: float
    scores: dict[str, float] = field(default_factory=dict)

    @classmethod
    def of(cls, who: str, samples: Samples, scores: list[Score]) -> Row:
        """The line of a set of samples and its scores."""
        speed = len(samples) / samples.seconds
        return cls(who, samples.sampler, samples.calls, len(samples), speed, {s.name: s.value for s in scores})

    def to_dict(self) -> dict[str, Any]:
        """Flat JSON types: `nfe`, `images`, `images_per_s`, and each score under its name."""
        head = {"sampler": self.sampler, "nfe": self.nfe, "images": self.images, "images_per_s": self.images_per_s}
        return head | self.scores


class Reports:
    """The run's own record, `reports.jsonl`: one line a report, which a driver follows and a person can read."""

    def __init__(self, folder: Path, resumed_step: int):
        self.path = folder / "reports.jsonl"
        kept = [line for line in read_reports(folder) if line["step"] <= resumed_step] if self.path.is_file() else []
        self.path.write_text("".join(json.dumps(line) + "\n" for line in kept))

    def add(self, report: Report) -> None:
        with open(self.path, "a") as file:
            file.write(json.dumps({"step": report.step, "images": report.images, "metrics": report.metrics}) + "\n")


def read_reports(folder: Path) -> Iterator[dict[str, Any]]:
    """The reports of a run's folder, in order; a line still being written is left for the next time."""
    path = folder / "reports.jsonl"
    if not path.is_file():
        return
    for line in path.read_text().splitlines(keepends=True):
        if line.endswith("\n"):
            yield json.loads(line)


class Scorer:
    """Scores samples on a thread of rank 0, so that training goes on: the ranks stop for the sampling only."""

    def __init__(self, recipe: Recipe, tracker: Tracker, device: torch.device):
        self.metrics, self.tracker = build.make_metrics(recipe, device), tracker
        self.rows: list[Row] = []
        self.last = recipe.train.steps
        self.error: BaseException | None = None
        self._queue: queue.Queue = queue.Queue()
        self._thread = threading.Thread(target=self._work, name="fewstep-scores", daemon=True)
        self._thread.start()

    def add(self, who: str, samples: Samples, step: int) -> None:
        self._queue.put((who, samples, step))

    def _work(self) -> None:
        while (item := self._queue.get()) is not None:
            try:
                self._score(*item)
            except BaseException as error:  # handed to `close`, which raises it in the run's own thread
                self.error = error
                return

    def _score(self, who: str, samples: Samples, step: int) -> None:
        scores = evaluate(self.metrics, samples)
        for score in scores:
            self.tracker.score(_named(score, who), step=step)
        if step == self.last:  # the closing table is of the last checkpoint only
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


def run(recipe: Recipe, feed: Feed, world: World, origin: Provenance) -> dict[str, Any]:
    """Trains a recipe to its end, going on from the run folder's last checkpoint if there is one.

    Every rank calls it; rank 0 keeps the records. origin: what the tracker says of code, machine and data.
    Returns, on rank 0, what a job prints: run_id, folder, rows of the closing table, grid.
    """
    torch.set_num_threads(recipe.cluster.threads)
    folder, main = recipe.folder, world.rank == 0
    engine = build.make_engine(recipe, feed, world, folder / "checkpoints")
    checkpoint = build.latest(folder)
    if checkpoint is not None:
        engine.resume(checkpoint)
    if not main:
        _train(recipe, engine, None)
        return {}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False))
    reports = Reports(folder, engine.step)
    with open_tracker(recipe, origin) as tracker:
        tracker.rewind(engine.step)
        book = Book(recipe, tracker, Scorer(recipe, tracker, world.device), reports)
        rows = _train(recipe, engine, book)
        (folder / "scores.json").write_text(json.dumps(rows, indent=1))
        tracker.flush(timeout_s=30)
        run_id = tracker.run_id
    return {"run_id": run_id, "folder": str(folder), "rows": rows, "grid": str(folder / "student.png")}


def _train(recipe: Recipe, engine: Engine, book: Book | None) -> list[dict[str, Any]]:
    """The training itself, on any rank; `book` is rank 0's. Returns the closing table's rows."""
    if engine.step == 0:
        draw(recipe, engine, book)
        draw_teacher(recipe, engine, book)
    before = engine.images
    for report in engine.run():
        if book is not None:
            book.report(report)
        _sample_due(recipe, engine, report, before, book)
        before = report.images
    return _finish(recipe, engine, book)


def open_tracker(recipe: Recipe, origin: Provenance) -> Tracker:
    """The run's MLflow tracker, with everything that says where its numbers come from."""
    tracker = Tracker.open(
        recipe.folder,
        uri=recipe.tracking.uri,
        experiment=recipe.tracking.experiment,
        name=recipe.name,
        recipe=recipe.model_dump(mode="json"),
        tags=origin.tags,
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

    def picture(self, name: str, images: torch.Tensor, step: int) -> None:
        """A grid of uint8 (N, C, H, W), in the tracker and as the run folder's `<name>.png`, the newest one."""
        from PIL import Image

        picture = build.grid(images, GRID_COLUMNS).numpy()
        self.tracker.image(name, picture, step)
        shown = picture[..., 0] if picture.shape[-1] == 1 else picture
        Image.fromarray(shown).resize((shown.shape[1] * 2, shown.shape[0] * 2), Image.Resampling.NEAREST).save(
            self.recipe.folder / f"{name}.png"
        )


def _sample_due(recipe: Recipe, engine: Engine, report: Report, before: int, book: Book | None) -> None:
    """Scores and grids that fell due since `before` images; all ranks sample, rank 0 keeps. The last are _finish's."""
    e = recipe.evaluate
    if report.step == recipe.train.steps:
        return
    if e.metrics and _due(e.every_images, before, report.images):
        sampler = build.student_sampler(recipe.method, engine.student)
        samples = build.make_samples(sampler, e.images, recipe.seed, e.batch, engine.world)
        if book is not None:
            book.scorer.add("student", samples, report.step)
    if _due(e.grid_every_images, before, report.images):
        draw(recipe, engine, book)


def _due(every: int | None, before: int, now: int) -> bool:
    """Whether a multiple of `every` was reached after `before`."""
    return every is not None and now // every > before // every


def draw(recipe: Recipe, engine: Engine, book: Book | None) -> None:
    """Fixed-seed grids of the student and of the fake score's denoising: same noise and labels every time."""
    world, student = engine.world, build.student_sampler(recipe.method, engine.student)
    samples = build.make_samples(student, GRID_IMAGES, recipe.seed, GRID_IMAGES, world)
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
        samples = build.make_samples(sampler, GRID_IMAGES, recipe.seed, GRID_IMAGES, engine.world)
        if book is not None:
            book.picture("teacher", samples.images, 0)


@torch.no_grad()
def fake_denoising(recipe: Recipe, engine: Engine, sampler: build.Sampler) -> torch.Tensor:
    """What the fake score makes of the student's grid noised half-way up the ramp; every rank computes all of it."""
    fake, device = engine.nets["fake"], engine.world.device
    draws = Draws(fold(recipe.seed, "grid"), 0, device=device)
    z = draws.normal("z", (GRID_IMAGES, *sampler.shape))
    cond = torch.arange(GRID_IMAGES, device=device) % sampler.classes if sampler.classes else None
    x = sampler.sample(z, cond, draws)
    u = torch.full((GRID_IMAGES,), GRID_LEVEL / (INDICES - 1), dtype=torch.float64, device=device)
    level = fake.schedule.level(fake.schedule.ramp(u), x.ndim)
    return fake(level.noise(x, draws.normal("eps", x.shape)), level, cond)


def _finish(recipe: Recipe, engine: Engine, book: Book | None) -> list[dict[str, Any]]:
    """The last checkpoint's grids and scores, the teacher's beside them."""
    e, world, teacher = recipe.evaluate, engine.world, engine.nets.get("teacher")
    draw(recipe, engine, book)
    samplers = [("student", build.student_sampler(recipe.method, engine.student))]
    if teacher is not None:
        samplers = [("teacher", build.heun_sampler(teacher, steps)) for steps in e.teacher_steps] + samplers
    for who, sampler in samplers if e.metrics else []:
        samples = build.make_samples(sampler, e.images, recipe.seed, e.batch, world)
        if book is not None:
            book.scorer.add(who, samples, engine.step)
    return [] if book is None else [row.to_dict() | {"who": row.who} for row in book.scorer.close()]


def register(folder: Path, export: Path) -> None:
    """Adds a finished run's export to its MLflow run and registers it as a new version of the model, alias `newest`."""
    recipe = validate(Recipe, read(folder / "recipe.yaml"))
    with open_tracker(recipe, Provenance({}, {})) as tracker:
        tracker.model(export, recipe.tracking.model or recipe.recipe, "newest")


def check(recipe: Recipe) -> None:
    """What can be checked before anything starts: folder and metrics. Raises ValueError naming the field."""
    writable(resolve(recipe.out))
    build.make_metrics(recipe)
