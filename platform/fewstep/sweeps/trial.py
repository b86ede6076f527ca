"""A trial of a sweep: an ordinary run in a thread, whose caller waits for its scores."""

from __future__ import annotations

import json
import math
import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .. import run
from ..engine.folder import checkpoints, complete, newest, step_of
from ..recipe import Recipe, read_run
from ..texts import first_line
from ..watchdog import STOP
from .record import FAILED, FINISHED
from .settings import devices
from .space import apply, values_of

STOP_S = 120.0  # time for a run that must stop to save its state and end
POINTER = "pointer.json"
POLL_S = 0.1


@dataclass(frozen=True)
class Plan:
    """The part that all trials share.

    recipe: the base recipe, as JSON types. tags: of their MLflow runs. short: short names of the space's keys.
    metric: the score that schedulers use. population: the space's keys if a population trains, else None.
    """

    recipe: dict[str, Any] = field(repr=False)  # it may name a server with its password
    tags: dict[str, str]
    short: dict[str, str]
    metric: str
    population: list[str] | None


class TrialRun:
    """One trial: a run in its own thread, whose scores are the trial's results.

    values, seed: the trial's settings. scored_images: image count of the newest score in the record; -1 for none.
    fit(recipe, follow, tags=..., shared=True): trains, as cluster.train.fit does. donor: {trial, run, checkpoint} of
    the population member whose weights this trial copies.
    """

    def __init__(
        self,
        name: str,
        plan: Plan,
        fit: Callable[..., dict[str, Any]],
        values: dict[str, Any],
        seed: int,
        scored_images: int = -1,
        donor: dict[str, Any] | None = None,
    ):
        self.name, self.plan, self.fit, self.seed = name, plan, fit, seed
        self.donor, self.scored_images = donor, scored_images
        self.checkpoint: str | None = None
        self.recipe = self._own_recipe(values)
        self.values = values if plan.population is None else values_of(self.recipe, values)
        self._last: dict[str, Any] | None = None
        self._events: queue.Queue = queue.Queue()
        self._thread = threading.Thread(target=self._train, name="fewstep-trial", daemon=True)
        self._thread.start()

    def _own_recipe(self, values: dict[str, Any]) -> Recipe:
        """Returns the trial's recipe. In a population it is the recipe of the newest generation, or of a new generation
        that starts from a donor's checkpoint: a run with a changed rate is a new run."""
        base = Recipe.model_validate(self.plan.recipe)
        own: dict[str, Any] = dict(seed=self.seed, name=self.name)
        if self.plan.population is None:
            return apply(base, values, **own)
        folders = generations(Path(base.out), self.name)
        if self.donor and self.donor["trial"] != self.name:
            self.scored_images = -1
            own |= dict(name=f"{self.name}-g{len(folders) + 1}", resume_allow=self.plan.population)
            return apply(base, values, **own, resume=self._donors_checkpoint(base))
        if folders:
            scored = [line["images"] for line in run.report_lines(folders[-1]) if "scores" in line]
            self.scored_images = max(scored, default=-1)
            return read_run(folders[-1], base.tracking.uri, base.storage)
        return apply(base, values, **own)

    def _donors_checkpoint(self, base: Recipe) -> str:
        """Returns the donor's checkpoint, or its newest one if that checkpoint has been removed."""
        given = self.donor["checkpoint"]
        if complete(given):
            return given
        donor = read_run(Path(base.out) / self.donor["run"], base.tracking.uri, base.storage)
        return str(newest(donor.checkpoints))

    def _train(self) -> None:
        tags = self.plan.tags | {"sweep.trial": self.name, "sweep.run": self.recipe.name}
        tags |= {f"sweep.{self.plan.short[key]}": str(value) for key, value in self.values.items()}
        if self.donor:
            tags["sweep.from"] = self.recipe.resume
        try:
            self._events.put(("end", self.fit(self.recipe, self._queue_scores, tags=tags, shared=True)))
        except BaseException as error:  # any error is the result of this trial, and the sweep continues
            self._events.put(("error", error))

    def _queue_scores(self, line: dict[str, Any]) -> None:
        if "scores" in line:
            self._events.put(("score", line))

    def next_result(self) -> dict[str, Any]:
        """Waits for the run's next score or its end.

        Returns {run, values, images, spent, hours}. A score adds at, scores, score and seen_by_loss. The end adds
        state, done, and run_id or reason. The score of the last step comes with the end.
        """
        while True:
            kind, news = self._events.get()
            if kind == "score" and news["images"] > self.scored_images:
                if news["step"] == self.recipe.train.steps:
                    self._last = news
                    continue
                if self.plan.population is not None:
                    self._await_checkpoint(news["step"])
                return self._result(news)
            if kind == "end":
                done = {"state": FINISHED, "run_id": news["run_id"], "done": True}
                if not news["finished"]:
                    reason = f"stopped on request at step {news['step']}; retry=true resumes it"
                    done |= {"state": FAILED, "reason": reason}
                return self._result(self._last) | done
            if kind == "error":
                return self._result(None) | {"state": FAILED, "reason": first_line(news), "done": True}

    def _result(self, line: dict[str, Any] | None) -> dict[str, Any]:
        images, hours = spent(Path(self.recipe.out), self.name)
        result = {"run": self.recipe.name, "spent": images, "hours": hours, "values": self.values}
        if line is None:
            return result | {"images": images}
        self.scored_images = line["images"]
        score = (line["scores"] | {"hours": hours}).get(self.plan.metric, math.nan)
        result |= {"images": line["images"], "at": line["step"], "scores": line["scores"], "score": score}
        return result | {"seen_by_loss": line.get("seen_by_loss", [])}

    def _await_checkpoint(self, step: int) -> None:
        """Waits for the checkpoint of a scored step, so that another member of the population can copy it."""
        while self._thread.is_alive():
            paths = [c for c in checkpoints(self.recipe.checkpoints) if step_of(c) == step]
            if paths:
                self.checkpoint = str(paths[0])
                return
            time.sleep(POLL_S)

    def write_pointer(self, folder: Path) -> None:
        """Writes the name of the checkpoint that another member of the population may copy."""
        pointer = {"trial": self.name, "run": self.recipe.name, "checkpoint": self.checkpoint}
        (folder / POINTER).write_text(json.dumps(pointer))

    def stop(self) -> None:
        """Asks the run to stop and waits for it: the run saves its state and ends in MLflow as stopped."""
        if self._thread.is_alive():
            self.recipe.folder.mkdir(parents=True, exist_ok=True)
            (self.recipe.folder / STOP).touch()
            self._thread.join(STOP_S)


def read_pointer(folder: Path) -> dict[str, Any]:
    """Reads the donor that `TrialRun.write_pointer` wrote."""
    return json.loads((folder / POINTER).read_text())


def generations(folder: Path, name: str) -> list[Path]:
    """Folders of a trial's runs, oldest first: `<name>`, then `<name>-g2`, ... for each change by a population."""
    paths = [folder / name, *sorted(folder.glob(f"{name}-g*"), key=lambda p: int(p.name.rpartition("-g")[2]))]
    return [path for path in paths if (path / "recipe.yaml").is_file()]


def spent(folder: Path, name: str) -> tuple[int, float]:
    """Returns the number of images that a trial's runs trained on, and the device hours of that training."""
    images = hours = 0.0
    for path in generations(folder, name):
        recipe = read_run(path)
        before = None
        for report in run.read_reports(path):
            first = max(report["images"] - recipe.train.report_every * recipe.train.batch, 0)
            seen = report["images"] - (first if before is None else before)
            before = report["images"]
            images += seen
            hours += devices(recipe) * seen / report["metrics"]["images_per_s"] / 3600
    return int(images), hours
