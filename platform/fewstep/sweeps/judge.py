"""What a sweep may conclude: settings ranked over their seeds, whether one of them won, what mattered, what it cost."""

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

IMPORTANCE_TRIALS = 8  # fewer tell nothing of importance
FOREST_TREES = 64
WIDE = 4.0  # largest over smallest score


@dataclass(frozen=True)
class Setting:
    """Trials that differ in nothing but the seed. std: sample standard deviation (n - 1), None for one seed."""

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
    """best: the setting with the best mean among the finalists, which are those repeated with other seeds that no
    unrepeated one beats on the first seed; without finalists, the best on the first seed. rivals: the others whose
    mean is ahead of it, or behind by no more than the larger of the two standard deviations. text: one sentence.
    """

    best: Setting
    rivals: tuple[Setting, ...]
    text: str

    @property
    def won(self) -> bool:
        """Whether there is a winner: repeated, and ahead of all others by more than the spread."""
        return self.best.std is not None and not self.rivals


def settings(trials: Sequence[Trial], metric: str, mode: str) -> list[Setting]:
    """Finished trials by setting, best mean first."""
    groups: dict[str, list[Trial]] = {}
    for trial in sorted(trials, key=lambda t: t.number):
        if trial.state == FINISHED and math.isfinite(trial.score(metric)):
            groups.setdefault(json.dumps(trial.values, sort_keys=True), []).append(trial)
    found = []
    for members in groups.values():
        scores = [t.score(metric) for t in members]
        std = statistics.stdev(scores) if len(scores) > 1 else None
        found.append(Setting(members[0].values, tuple(members), statistics.fmean(scores), std))
    return sorted(found, key=lambda s: s.mean if mode == "min" else -s.mean)


def judge(trials: Sequence[Trial], metric: str, mode: str, name: Callable[[dict[str, Any]], str]) -> Verdict | None:
    """The verdict over finished trials; None without one. name(values) -> text of a setting."""
    found = settings(trials, metric, mode)
    if not found:
        return None
    sign = 1 if mode == "min" else -1
    by_first = sorted(found, key=lambda s: sign * s.first.score(metric))
    finalists = list(takewhile(lambda s: s.std is not None, by_first))
    best = next((s for s in found if s in finalists), by_first[0])
    score = f"{metric} {best.mean:.4g}"
    if best.std is None:
        text = f"{name(best.values)} came out best with {score}, on one seed: nothing says that it would again."
        return Verdict(best, (), text)
    others = [s for s in found if s is not best]
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
    """Mean and standard deviation over seeds as a text: `1.44 ± 0.05 (3 seeds)`."""
    seeds = "1 seed" if setting.std is None else f"{len(setting.trials)} seeds"
    return f"{setting.mean:.4g}{'' if setting.std is None else f' ± {setting.std:.2g}'} ({seeds})"


def wide(scores: Sequence[float]) -> bool:
    """Whether a few bad scores would hide how the others differ: then their logarithms are looked at."""
    return min(scores) > 0 and max(scores) / min(scores) > WIDE


def front(trials: Sequence[Trial], objectives: dict[str, str]) -> list[Trial]:
    """Finished trials that no other one beats in one objective without being worse in another."""

    def signed(trial: Trial) -> list[float]:
        return [trial.score(name) * (1 if mode == "min" else -1) for name, mode in objectives.items()]

    found = [(t, signed(t)) for t in trials if t.state == FINISHED]
    found = [(t, v) for t, v in found if all(map(math.isfinite, v))]
    beaten = lambda v: any(all(a <= b for a, b in zip(w, v, strict=True)) and w != v for _, w in found)
    return [t for t, v in found if not beaten(v)]


def importance(space: Space, trials: Sequence[Trial], metric: str) -> dict[str, float] | None:
    """Share of the score's variance that each key explains alone, by fANOVA (Hutter et al. 2014) with a random forest;
    of its logarithm's, where scores are wide apart.

    Over the finished trials of the search; keys that do not apply to all of them are left out. None where there are
    fewer than eight trials, or one key, or no variance.
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
        params = {key: space.domains[key].at(trial.values[key]) for key in keys}
        study.add_trial(
            optuna.trial.create_trial(
                params=params, distributions=dict.fromkeys(keys, axis), value=value(trial.score(metric))
            )
        )
    evaluator = optuna.importance.FanovaImportanceEvaluator(n_trees=FOREST_TREES, seed=0)
    return dict(evaluator.evaluate(study))
