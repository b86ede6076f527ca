"""Proposals of a sweep: the points of a grid, random settings, or Optuna's suggestions from the scores so far."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np

from .space import Dice, Space

SEARCHES = ("grid", "random", "tpe", "gp", "pareto")
STARTUP_TRIALS = (3, 8)  # fewest and most random settings before Optuna's model proposes
REDRAWS = 50


class Proposals(Protocol):
    """A sequence of settings, which may depend on the scores so far.

    A killed sweep resumes from its record: it calls `adopt` for each trial, in order, then `report` and `tell` again.
    """

    def propose(self, number: int) -> dict[str, Any] | None:
        """Returns the setting of trial `number`; None if there is nothing left to try."""

    def adopt(self, number: int, values: Mapping[str, Any]) -> None:
        """Records that trial `number` runs with these values."""

    def report(self, number: int, images: int, score: float) -> None:
        """Records a score of a trial that is still running."""

    def tell(self, number: int, values: list[float] | None, stopped: bool = False) -> None:
        """Records a trial's result, one value per objective, or None for a failed trial."""


class Grid:
    """The points of a grid, one after the other."""

    def __init__(self, points: list[dict[str, Any]]):
        self.points = points

    def propose(self, number: int) -> dict[str, Any] | None:
        return self.points[number] if number < len(self.points) else None

    def adopt(self, number: int, values: Mapping[str, Any]) -> None: ...

    def report(self, number: int, images: int, score: float) -> None: ...

    def tell(self, number: int, values: list[float] | None, stopped: bool = False) -> None: ...


class Random(Grid):
    """Independent random settings, a function of (seed, number), without repetition."""

    def __init__(self, space: Space, seed: int):
        super().__init__([])
        self.space, self.seed = space, seed

    def propose(self, number: int) -> dict[str, Any] | None:
        while len(self.points) <= number:
            new = _fresh(self.space, self.points, self.seed, len(self.points))
            if new is None:
                return None
            self.points.append(new)
        return self.points[number]


def _fresh(space: Space, tried: list[dict[str, Any]], *seeds: int) -> dict[str, Any] | None:
    """Returns a random setting that is new; None if fifty draws gave only known ones, so the space is exhausted."""
    for redraw in range(REDRAWS):
        values = space.draw(Dice(*seeds, redraw))
        if values not in tried:
            return values
    return None


class Learned:
    """Optuna's TPE or Gaussian process, for one objective or several.

    Each proposal has its own sampler, seeded by (seed, number). So it depends on the record alone, and a resumed sweep
    proposes the same.
    """

    def __init__(self, space: Space, search: str, seed: int, startup: int, directions: list[str]):
        import optuna

        optuna.logging.set_verbosity(optuna.logging.ERROR)
        names = {"min": "minimize", "max": "maximize"}
        self.space, self.search, self.seed, self.startup = space, search, seed, startup
        self.study = optuna.create_study(directions=[names[d] for d in directions])
        self.open: dict[int, Any] = {}
        self.tried: list[dict[str, Any]] = []

    def _sampler(self, number: int) -> Any:
        import optuna

        seed = int(np.random.SeedSequence((self.seed, number)).generate_state(1)[0])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)  # of `group`
            if self.search == "gp":
                return optuna.samplers.GPSampler(seed=seed, n_startup_trials=self.startup)
            # group: keys that apply together, such as those of the GAN, are modelled together
            return optuna.samplers.TPESampler(seed=seed, n_startup_trials=self.startup, multivariate=True, group=True)

    def propose(self, number: int) -> dict[str, Any] | None:
        self.study.sampler = self._sampler(number)
        trial = self.study.ask()
        values = self.space.draw(trial)
        if values in self.tried:  # a confident model repeats a setting, which would teach nothing
            self._fail(trial)
            values = _fresh(self.space, self.tried, self.seed, number)
            if values is None:
                return None
            self.adopt(number, values)
            return values
        self.open[number] = trial
        self.tried.append(values)
        return values

    def adopt(self, number: int, values: Mapping[str, Any]) -> None:
        self.study.enqueue_trial(self.space.params(values))
        trial = self.study.ask()
        self.space.draw(trial)
        self.open[number] = trial
        self.tried.append(dict(values))

    def report(self, number: int, images: int, score: float) -> None:
        if len(self.study.directions) == 1 and math.isfinite(score):
            self.open[number].report(score, images)

    def tell(self, number: int, values: list[float] | None, stopped: bool = False) -> None:
        import optuna

        trial = self.open.pop(number)
        if values is None or not all(map(math.isfinite, values)):
            self._fail(trial)
        elif stopped and len(values) == 1:
            self.study.tell(trial, state=optuna.trial.TrialState.PRUNED)  # Optuna takes its last report
        else:
            self.study.tell(trial, values)

    def _fail(self, trial: Any) -> None:
        import optuna

        self.study.tell(trial, state=optuna.trial.TrialState.FAIL)


def proposals(space: Space, search: str, seed: int, trials: int | None = None) -> Proposals:
    """The proposals of a search: grid, random, tpe, gp or pareto.

    trials: expected number of trials; None if unknown. tpe, gp and pareto draw the first quarter of them at random,
    at least three and at most eight.
    """
    if search == "grid":
        return Grid(space.grid())
    if search == "random":
        return Random(space, seed)
    directions = list(space.objectives.values()) if search == "pareto" else [space.mode]
    least, most = STARTUP_TRIALS
    startup = most if trials is None else min(max(trials // 4, least), most)
    return Learned(space, search, seed, startup, directions)
