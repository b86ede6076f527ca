"""The verdict of a sweep: settings ranked over their seeds, the winner if any, and the importance of each key."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

from ..seeds import Spread, grouped
from ..texts import shown
from .record import FINISHED, SEARCH, Trial
from .space import Space

IMPORTANCE_TRIALS = 8  # fewest trials for an importance
FOREST_TREES = 64
WIDE = 4.0  # ratio of largest to smallest score above which logarithms are used


@dataclass(frozen=True)
class Setting:
    """Trials that differ by the seed only. score: the sweep's metric over their seeds."""

    values: dict[str, Any]
    trials: tuple[Trial, ...]
    score: Spread

    @property
    def first(self) -> Trial:
        """The trial of the recipe's own seed."""
        return self.trials[0]

    def over_seeds(self, metric: str) -> Spread:
        """Returns mean and spread of any metric of the trials."""
        return Spread.over((t.seed, t.score(metric)) for t in self.trials)


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
        return self.best.score.std is not None and not self.rivals


def settings(trials: Sequence[Trial], metric: str, mode: str) -> list[Setting]:
    """Groups finished trials by setting, best mean first."""
    scored = [t for t in trials if t.state == FINISHED and math.isfinite(t.score(metric))]
    groups = grouped(sorted(scored, key=lambda t: t.number), lambda t: t.values)
    score = lambda group: Spread.over((t.seed, t.score(metric)) for t in group)
    ranked = [Setting(group[0].values, tuple(group), score(group)) for group in groups]
    return sorted(ranked, key=lambda s: s.score.mean if mode == "min" else -s.score.mean)


def judge(trials: Sequence[Trial], metric: str, mode: str, name: Callable[[dict[str, Any]], str]) -> Verdict | None:
    """Returns the verdict over finished trials, or None if there are none. name(values) -> text of a setting."""
    ranked = settings(trials, metric, mode)
    if not ranked:
        return None
    sign = 1 if mode == "min" else -1
    by_first = sorted(ranked, key=lambda s: sign * s.first.score(metric))
    finalists = list(takewhile(lambda s: s.score.std is not None, by_first))
    best = next((s for s in ranked if s in finalists), by_first[0])
    if best.score.std is None:
        text = f"No winner: {name(best.values)} has the best {metric}, {best.score}, on one seed; another may differ."
        return Verdict(best, (), text)
    others = [s for s in ranked if s is not best]
    ahead = [sign * (s.score.mean - best.score.mean) for s in others]
    rivals = tuple(s for s, lead in zip(others, ahead, strict=True) if lead < 0 or s.score.near(best.score))
    if not rivals:
        lead = f", {shown(ahead[0], 2)} ahead of the next" if others else ""
        return Verdict(best, (), f"{name(best.values)} wins: {metric} {_over_seeds(best.score)}{lead}.")
    named = "; ".join(f"{name(s.values)} with {_over_seeds(s.score)}" for s in rivals[:3])
    named += f"; and {len(rivals) - 3} more" if len(rivals) > 3 else ""
    text = f"{name(best.values)} has {metric} {_over_seeds(best.score)}"
    return Verdict(best, rivals, f"No winner: {text}; within the spread of seeds lie {named}.")


def _over_seeds(score: Spread) -> str:
    """Returns a score with the number of its seeds: `1.44 ± 0.05 (3 seeds)`."""
    return f"{score} ({score.seeds} seed{'s' if score.seeds > 1 else ''})"


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
