"""The answer of a sweep: best.yaml, table, plots and report, in its folder and as artifacts of its MLflow run."""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..compare import short
from ..config import flatten, to_yaml
from ..recipe import Recipe
from ..texts import shown
from ..tracking.tracker import Tracker
from .judge import front, importance, judge
from .record import FAILED, FINISHED, STOPPED, Record, Trial
from .report import markdown, report
from .settings import Sweep
from .space import HOURS, Space, apply


def short_names(space: Space, recipe: Recipe) -> dict[str, str]:
    """Short names of the space's keys that no other key of the recipe has: `gan_weight`, `student.lr`."""
    return short(space.domains, {*flatten(recipe.model_dump(mode="json")), *space.domains})


def label(values: Mapping[str, Any], names: Mapping[str, str]) -> str:
    """A setting as a text: `gan_weight=0.003 student.lr=0.0001`."""
    return " ".join(f"{names[key]}={shown(value)}" for key, value in values.items())


def at_the_edge(values: Mapping[str, Any], space: Space, names: Mapping[str, str]) -> str:
    """A sentence that names the settings at an end of their range, because a better value may lie beyond it."""
    edges = []
    for key, value in values.items():
        domain = space.domains[key]
        if getattr(domain, "ordered", True) and len(domain.edges()) > 1:
            at = domain.axis_position(value)
            # nothing lies below zero, which switches a part off, or below a count of one
            side = "largest" if at > 0.99 else "smallest" if at < 0.01 and value not in (0, 1) else None
            edges += [f"{label({key: value}, names)} is the {side}"] if side else []
    return f" {' and '.join(edges)} in this space: better may lie beyond." if edges else ""


def best_score(trials: Sequence[Trial], space: Space) -> float | None:
    """The best newest score of the finished trials."""
    scores = [t.score(space.metric) for t in trials if t.state == FINISHED and math.isfinite(t.score(space.metric))]
    return (min if space.mode == "min" else max)(scores) if scores else None


def write(sweep: Sweep, space: Space, base: Recipe, record: Record, tracker: Tracker, template: Path) -> dict[str, Any]:
    """Writes the answer, from the record alone. Returns the values of the job's last line."""
    from . import plots  # matplotlib takes a second

    folder, names, ended = record.path.parent, short_names(space, base), record.ended()
    verdict = judge(ended, space.metric, space.mode, lambda values: label(values, names))
    best = folder / "best.yaml" if verdict else None
    if verdict is not None:
        verdict = replace(verdict, text=verdict.text + at_the_edge(verdict.best.values, space, names))
        best.write_text(recipe_text(base, verdict.best.first, sweep, space, verdict.text))
        tracker.artifact(best)
        print(f"\n{verdict.text}\nagain: {again(best)}")
    for trial in front(ended, space.objectives) if sweep.search == "pareto" else ():
        scores = ", ".join(f"{name} {shown(trial.score(name), 4)}" for name in space.objectives)
        why = f"On the Pareto front with {scores}: no other trial is better in one and as good in the others."
        text = recipe_text(base, trial, sweep, space, why)
        tracker.text(f"front/{trial.number:03d}.yaml", text)
        (folder / "front").mkdir(exist_ok=True)
        (folder / "front" / f"{trial.number:03d}.yaml").write_text(text)
    shares = importance(space, ended, space.metric)
    figures = plots.save(plots.draw(space, ended, names, shares), folder / "plots")
    if figures:
        tracker.artifact(folder / "plots")
    metrics = list(dict.fromkeys([space.metric, *base.evaluate.metrics, HOURS]))
    table = markdown(space, ended, names, metrics)
    (folder / "table.md").write_text(table)
    page = folder / "report.html"
    facts = {
        "space": space.name,
        "recipe": base.recipe,
        "search": sweep.search + ("" if sweep.scheduler == "none" else f", {sweep.scheduler} on images seen"),
        "trials": count_text(ended),
        "images": f"{sum(t.images for t in ended):,}",
        "training": f"{sum(t.hours for t in ended):.2f} device hours",
        "seed": str(base.seed),
        "MLflow run": tracker.run_id or "",
    }
    command = again(best) if best else ""
    page.write_text(report(template, sweep.name, space, ended, names, metrics, verdict, facts, command, figures))
    for path in (folder / "table.md", page):
        tracker.artifact(path)
    count = {state.replace(" ", "_"): sum(t.state == state for t in ended) for state in (FINISHED, STOPPED, FAILED)}
    return {
        "best": str(best) if best else None,
        "winner": verdict.won if verdict else False,
        space.metric: verdict.best.score.mean if verdict else None,
        "trials": len(ended),
        **count,
        "images": sum(t.images for t in ended),
        "hours": round(sum(t.hours for t in ended), 4),
        "run_id": tracker.run_id,
        "report": str(page),
    }


def count_text(trials: Sequence[Trial]) -> str:
    """`20: 15 finished, 4 stopped early, 1 failed`."""
    parts = [(state, sum(t.state == state for t in trials)) for state in (FINISHED, STOPPED, FAILED)]
    return f"{len(trials)}: " + ", ".join(f"{n} {state}" for state, n in parts if n)


def again(recipe: Path) -> str:
    """The command line that trains a recipe file."""
    return shlex.join(["python", "jobs/distill.py", f"recipe={recipe}"])


def recipe_text(base: Recipe, trial: Trial, sweep: Sweep, space: Space, why: str) -> str:
    """A complete recipe that repeats a trial, with a comment at its head. why: a sentence of that comment."""
    recipe = apply(base, trial.values, seed=trial.seed, name="")
    lines = [f"Trial {trial.number:03d} of sweep {sweep.name}: {space.metric} {trial.score(space.metric)!r}.", why]
    if sweep.scheduler == "pbt":
        lines.append(
            "A population changed these settings during training; this recipe has the last ones from the start."
        )
    head = "".join(f"# {line}\n" for line in lines)
    return head + to_yaml(recipe.written)
