"""What a sweep leaves: best.yaml, a table, plots and a report, in its folder and as artefacts of its run in MLflow."""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from ..compare import short
from ..recipe import Recipe
from ..tracking.tracker import Tracker, flatten
from .judge import Verdict, judge
from .record import FAILED, FINISHED, STOPPED, Record, Trial
from .settings import Sweep
from .space import Space, apply


def short_names(space: Space, recipe: Recipe) -> dict[str, str]:
    """The space's keys as short as the recipe's other keys allow: `gan_weight`, `student.lr`."""
    return short(space.domains, {*flatten(recipe.model_dump(mode="json")), *space.domains})


def label(values: Mapping[str, Any], names: Mapping[str, str]) -> str:
    """A setting as a text: `gan_weight=0.003 student.lr=0.0001`."""
    return " ".join(
        f"{names[key]}={value:g}" if isinstance(value, float) else f"{names[key]}={value}"
        for key, value in values.items()
    )


def best_score(trials: Sequence[Trial], space: Space) -> float | None:
    """The best newest score of the finished trials."""
    scores = [t.score(space.metric) for t in trials if t.state == FINISHED and math.isfinite(t.score(space.metric))]
    return (min if space.mode == "min" else max)(scores) if scores else None


def write(sweep: Sweep, space: Space, base: Recipe, record: Record, tracker: Tracker, template: Path) -> dict[str, Any]:
    """Writes everything that follows from the record, and returns what the job prints last."""
    folder = record.path.parent
    names = short_names(space, base)
    ended = record.ended()
    verdict = judge(ended, space.metric, space.mode, lambda values: label(values, names))
    best = None
    if verdict is not None:
        best = folder / "best.yaml"
        best.write_text(recipe_text(base, verdict.best.first, sweep, space, verdict))
        print(f"\n{verdict.text}")
        print(f"again: {again(best)}")
    images, hours = sum(t.images for t in ended), sum(t.hours for t in ended)
    count = {state: sum(t.state == state for t in ended) for state in (FINISHED, STOPPED, FAILED)}
    return {
        "best": str(best) if best else None,
        "winner": verdict.won if verdict else False,
        space.metric: verdict.best.mean if verdict else None,
        "trials": len(ended),
        **{state.replace(" ", "_"): n for state, n in count.items()},
        "images": images,
        "hours": round(hours, 4),
        "run_id": tracker.run_id,
        "report": str(folder / "report.html"),
    }


def again(recipe: Path) -> str:
    """The command that trains a recipe file alone."""
    return shlex.join(["python", "jobs/distill.py", f"recipe={recipe}"])


def recipe_text(base: Recipe, trial: Trial, sweep: Sweep, space: Space, verdict: Verdict) -> str:
    """A complete recipe that repeats a trial: its settings and seed, the base's everything else."""
    recipe = apply(base, trial.values, seed=trial.seed, name="")
    lines = [
        f"Trial {trial.number:03d} of sweep {sweep.name}, seed {trial.seed}: {space.metric} {trial.score(space.metric)!r}.",
        verdict.text,
    ]
    if sweep.scheduler == "pbt":
        lines.append(
            "A population changed these settings while it trained; a run of this file has the last of them throughout."
        )
    head = "".join(f"# {line}\n" for line in lines)
    return head + yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
