"""The conductor of a sweep: it chooses the next trial and records the results. It needs no cluster."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from ..metrics.base import refusal
from ..recipe import Recipe
from ..texts import shown
from ..tracking.tracker import Tracker
from . import answer
from .proposals import Grid, Proposals, proposals
from .record import FAILED, FINISHED, SEARCH, SEEDS, STOPPED, Record, Trial
from .settings import Budget, Sweep, images_of
from .space import Space, apply

SAME_ERRORS = 3  # if so many first trials fail with the same error, the sweep is at fault, and not a setting


class Conductor:
    """Chooses trials, and writes their results to the record, MLflow and the console.

    A cluster calls `next` for a trial, runs it with `config`, and passes each result of TrialRun to `result`.
    """

    def __init__(self, sweep: Sweep, space: Space, recipe: Recipe, record: Record, tracker: Tracker):
        self.sweep, self.space, self.recipe, self.record, self.tracker = sweep, space, recipe, record, tracker
        self.budget = Budget.parse(sweep.budget) if sweep.budget else None
        self.short = answer.short_names(space, recipe)
        self.proposals: Proposals = Grid([])
        self.phase, self.waiting = SEARCH, []

    def __getstate__(self) -> dict[str, Any]:
        return {}  # Ray Tune pickles its arguments, but a sweep resumes from its record

    def label(self, trial: Trial) -> str:
        """Text of a trial for people: number, setting, seed."""
        settings = answer.label(trial.values, self.short)
        return f"{trial.number:03d}  {settings}" + (f"  seed={trial.seed}" if trial.phase == SEEDS else "")

    def name(self, number: int) -> str:
        """Name of a trial and of its run."""
        return f"{Path(self.recipe.out).name}-{number:03d}"

    def config(self, trial: Trial) -> dict[str, Any]:
        """Arguments of TrialRun for a trial."""
        images = trial.scores[-1]["images"] if trial.scores else -1
        return {"name": self.name(trial.number), "values": trial.values, "seed": trial.seed, "scored_images": images}

    # the search

    def begin_search(self, known: list[tuple[dict[str, Any], list[float]]]) -> None:
        """Begins or resumes the search phase. known: settings and scores of an earlier sweep, to learn from."""
        self.phase = SEARCH
        self.proposals = proposals(self.space, self.sweep.search, self.recipe.seed, self.sweep.room(self.recipe))
        for i, (values, scores) in enumerate(known):
            self.proposals.adopt(-1 - i, values)
            self.proposals.tell(-1 - i, scores)
        for trial in (t for t in self.record.trials.values() if t.phase == SEARCH):
            self.proposals.adopt(trial.number, trial.values)
            for score in trial.scores:
                self.proposals.report(trial.number, score["images"], score["scores"].get(self.space.metric, math.nan))
            if trial.state:
                self._tell_search(trial)
        self.waiting = self.record.open(SEARCH)

    def begin_seeds(self, wanted: list[tuple[dict[str, Any], int]]) -> None:
        """Begins or resumes the phase that repeats settings with other seeds. wanted: (values, seed) pairs."""
        self.phase, self.proposals = SEEDS, Grid([])
        tried = [(t.values, t.seed) for t in self.record.trials.values()]
        self.waiting = self.record.open(SEEDS)
        for values, seed in wanted:
            if (values, seed) not in tried:
                self.waiting.append(self._new(values, seed))

    def next(self) -> Trial | None:
        """Returns the next trial to run; None if none is left or the budget is spent."""
        if self.waiting:
            return self.waiting.pop(0)
        if self.phase == SEEDS or self.alike() or self._budget_is_spent():
            return None
        count = sum(t.phase == SEARCH for t in self.record.trials.values())
        if self.sweep.limit is not None and count >= self.sweep.limit:
            return None
        values = self.proposals.propose(count)
        return None if values is None else self._new(values, self.recipe.seed)

    def _new(self, values: dict[str, Any], seed: int) -> Trial:
        number = len(self.record.trials)
        return self.record.add("trial", number, values=values, seed=seed, phase=self.phase, run=self.name(number))

    def _budget_is_spent(self) -> bool:
        """True if the budget has no room for another trial. Running trials count as if they ran to their end."""
        if self.budget is None:
            return False
        trials = [t for t in self.record.trials.values() if t.phase == SEARCH]
        if self.budget.unit == "hours":
            return sum(t.hours for t in trials) >= self.budget.amount
        whole = lambda t: t.images if t.state else images_of(apply(self.recipe, t.values))
        return sum(map(whole, trials)) + images_of(self.recipe) > self.budget.amount

    def alike(self) -> str | None:
        """The reason of the failures, if the first trials all failed with the same one; else None."""
        ended = [self.record.trials[number] for number in self.record.order]
        first = [t for t in ended if t.phase == SEARCH][:SAME_ERRORS]
        reasons = {t.reason if t.state == FAILED else None for t in first}
        return reasons.pop() if len(first) == SAME_ERRORS and len(reasons) == 1 else None

    # the results

    def result(self, number: int, result: dict[str, Any]) -> None:
        """Records a result of a trial: a score, an end, or both."""
        spent = {"spent": result["spent"], "hours": result["hours"]}
        trial = self.record.trials[number]
        if "scores" in result:
            scores = {key: result[key] for key in ("images", "scores", "seen_by_loss")} | {"step": result["at"]}
            trial = self.record.add("score", number, **spent, **scores, run=result["run"], values=result["values"])
            if trial.phase == SEARCH:
                self.proposals.report(number, result["images"], result["score"])
            text = "  ".join(f"{name} {shown(value, 4)}" for name, value in result["scores"].items())
            print(f"{number:03d}  {text}  at {result['images']:,} images", flush=True)
        if "state" in result:
            state, reason = result["state"], result.get("reason")
            metric, ranks = self.space.metric, self.recipe.evaluate.rank_seen_by_loss
            if state == FINISHED and not math.isfinite(trial.score(metric)):
                state, reason = FAILED, f"{metric} is {trial.score(metric)}"
            elif state == FINISHED and trial.seen_by_loss(metric) and not ranks:
                state, reason = FAILED, refusal(metric)
            self.end(number, state, reason, run_id=result.get("run_id"), **spent)

    def end(self, number: int, state: str, reason: str | None, **fields: Any) -> None:
        """Records the end of a trial."""
        trial = self.record.add("end", number, state=state, reason=reason, **fields)
        if trial.phase == SEARCH:
            self._tell_search(trial)
        print(f"{number:03d}  {state}{f': {reason}' if reason else ''}", flush=True)
        ended = self.record.ended()
        best = answer.best_score(ended, self.space)
        numbers = {"sweep/trials": len(ended), "sweep/hours": sum(t.hours for t in ended)}
        numbers |= {} if best is None else {f"sweep/best_{self.space.metric}": best}
        self.tracker.log(numbers, len(ended), sum(t.images for t in ended))

    def _tell_search(self, trial: Trial) -> None:
        names = self.space.objectives if self.sweep.search == "pareto" else [self.space.metric]
        values = None if trial.state == FAILED else [trial.score(name) for name in names]
        self.proposals.tell(trial.number, values, stopped=trial.state == STOPPED)
