"""The verdict of a sweep: settings ranked over their seeds, the winner if any, and the importance of each key."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

from .record import FINISHED, SEARCH, Trial
from .space import Space

IMPORTANCE_TRIALS = 8  # fewest trials for an importance
FOREST_TREES = 64
WIDE = 4.0  # ratio of largest to smallest score above which logarithms are used


@dataclass(frozen=True)
class Setting:
    """Trials that differ in the seed only. std: sample standard deviation (n - 1), None for one seed."""

    values: dict[str, Any]
    trials: tuple[Trial, ...]
    mean: float
    std: float | None

    @property
    def first(self) -> Trial:
        """The trial of the recipe's own seed."""
        return self.trials[0]


@dataclass(frozen=True)
class Verdict:
    """The best setting of a sweep and its rivals.

    A finalist is a setting with several seeds that no setting with one seed beats on the first seed. best: the finalist
    with the best mean; without finalists, the best setting on the first seed. rivals: the other settings whose mean is
    better, or worse by no more than the larger of the two standard deviations. text: one sentence.
    """

    best: Setting
    rivals: tuple[Setting, ...]
    text: str

    @property
    def won(self) -> bool:
        """True if `best` has several seeds and no rival."""
        return self.best.std is not None and not self.rivals


def settings(trials: Sequence[Trial], metric: str, mode: str) -> list[Setting]:
    """Groups finished trials by setting, best mean first."""
    groups: dict[str, list[Trial]] = {}
    for trial in sorted(trials, key=lambda t: t.number):
        if trial.state == FINISHED and math.isfinite(trial.score(metric)):
            groups.setdefault(json.dumps(trial.values, sort_keys=True), []).append(trial)
    ranked = []
    for members in groups.values():
        scores = [t.score(metric) for t in members]
        std = statistics.stdev(scores) if len(scores) > 1 else None
        ranked.append(Setting(members[0].values, tuple(members), statistics.fmean(scores), std))
    return sorted(ranked, key=lambda s: s.mean if mode == "min" else -s.mean)


def judge(trials: Sequence[Trial], metric: str, mode: str, name: Callable[[dict[str, Any]], str]) -> Verdict | None:
    """Returns the verdict over finished trials, or None if there are none. name(values) -> text of a setting."""
    ranked = settings(trials, metric, mode)
    if not ranked:
        return None
    sign = 1 if mode == "min" else -1
    by_first = sorted(ranked, key=lambda s: sign * s.first.score(metric))
    finalists = list(takewhile(lambda s: s.std is not None, by_first))
    best = next((s for s in ranked if s in finalists), by_first[0])
    score = f"{metric} {best.mean:.4g}"
    if best.std is None:
        text = f"{name(best.values)} came out best with {score}, on one seed: nothing says that it would again."
        return Verdict(best, (), text)
    others = [s for s in ranked if s is not best]
    rivals = tuple(s for s in others if sign * (s.mean - best.mean) <= max(best.std, s.std or 0.0))
    if rivals:
        named = "; ".join(f"{name(s.values)} with {spread(s)}" for s in rivals[:3])
        more = f"; and {len(rivals) - 3} more" if len(rivals) > 3 else ""
        text = (
            f"No winner: {name(best.values)} has {metric} {spread(best)}; within the spread of seeds lie {named}{more}."
        )
    else:
        ahead = f", {abs(others[0].mean - best.mean):.2g} ahead of the next" if others else ""
        text = f"{name(best.values)} wins: {metric} {spread(best)}{ahead}."
    return Verdict(best, rivals, text)


def spread(setting: Setting) -> str:
    """Returns mean and standard deviation over seeds as a text: `1.44 ± 0.05 (3 seeds)`."""
    seeds = "1 seed" if setting.std is None else f"{len(setting.trials)} seeds"
    return f"{setting.mean:.4g}{'' if setting.std is None else f' ± {setting.std:.2g}'} ({seeds})"


def wide(scores: Sequence[float]) -> bool:
    """True if the scores differ so much that a few bad ones hide the rest. Callers then use logarithms."""
    return min(scores) > 0 and max(scores) / min(scores) > WIDE


def front(trials: Sequence[Trial], objectives: dict[str, str]) -> list[Trial]:
    """Returns the Pareto front: the finished trials that no other trial dominates."""

    def signed(trial: Trial) -> list[float]:
        return [trial.score(name) * (1 if mode == "min" else -1) for name, mode in objectives.items()]

    scored = [(t, signed(t)) for t in trials if t.state == FINISHED]
    scored = [(t, v) for t, v in scored if all(map(math.isfinite, v))]
    dominated = lambda v: any(all(a <= b for a, b in zip(w, v, strict=True)) and w != v for _, w in scored)
    return [t for t, v in scored if not dominated(v)]


def importance(space: Space, trials: Sequence[Trial], metric: str) -> dict[str, float] | None:
    """Returns the share of the score's variance that each key explains alone, by fANOVA (Hutter et al. 2014).

    It fits a random forest to the finished trials of the search, and to the logarithm of the score if the scores are
    `wide`. Keys that do not apply to all trials are left out. None for fewer than eight trials, for one key, or for no
    variance.
    """
    used = [t for t in trials if t.state == FINISHED and t.phase == SEARCH and math.isfinite(t.score(metric))]
    keys = [key for key in space.domains if all(key in t.values for t in used)]
    keys = [key for key in keys if len({json.dumps(t.values[key]) for t in used}) > 1]
    scores = [t.score(metric) for t in used]
    if len(used) < IMPORTANCE_TRIALS or len(keys) < 2 or max(scores) == min(scores):
        return None
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = optuna.create_study()
    value = math.log if wide(scores) else float
    axis = optuna.distributions.FloatDistribution(0, 1)
    for trial in used:
        params = {key: space.domains[key].axis_position(trial.values[key]) for key in keys}
        study.add_trial(
            optuna.trial.create_trial(
                params=params, distributions=dict.fromkeys(keys, axis), value=value(trial.score(metric))
            )
        )
    evaluator = optuna.importance.FanovaImportanceEvaluator(n_trees=FOREST_TREES, seed=0)
    return dict(evaluator.evaluate(study))
