#!/usr/bin/env python
"""Trains several recipes with equal compute, one after the other in this process, and writes one table of their scores.

    python jobs/league.py budget=20000 out=league

Compute is counted in forward passes of the teacher, one sample each (networks/passes.py), and a recipe gets as many
steps as the budget pays for. The last line is a JSON object.
"""

import json
import sys
import time
from math import lcm
from pathlib import Path
from typing import Annotated, Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "platform"))

from pydantic import Field

from fewstep.config import Strict, command, resolve_out
from fewstep.folders import claim
from fewstep.recipe import Recipe, open_recipe

RECIPES = ["", "f_distill", "decoupled_dmd", "dp_dmd", "swiftbrush", "snoopi", "flash_dmd", "scm", "lcm", "pcm"]
DEFAULT = ["fashion_mnist" + (f"_{name}" if name else "") for name in RECIPES]


class League(Strict):
    """Trains several recipes with equal compute and writes one table of their scores."""

    recipes: list[str] = DEFAULT
    """Names of files of jobs/recipes, or paths of .yaml files; all with the same metrics."""
    budget: Annotated[float, Field(gt=0)] = 20_000
    """Forward passes of the teacher, one sample each, that a run may cost."""
    seeds: list[int] = [0]
    """Seeds; each is a run."""
    images: Annotated[int, Field(ge=2)] = 2000
    """Samples to score, of the last step."""
    out: str = "league"
    """Folder of table.md and rows.json."""


def cost(recipe: Recipe) -> float:
    """Passes of one step of a recipe, its mean over the steps after which the phases repeat."""
    from fewstep.build import make_engine, make_feed
    from fewstep.networks.passes import Passes

    period = lcm(*(phase.every for phase in recipe.method.phases()))
    small = recipe.train.model_copy(update={"steps": period, "batch": 2, "accumulate": 1})
    with make_feed(recipe.data, recipe.seed) as feed:
        engine = make_engine(recipe.model_copy(update={"train": small}), feed)
        with Passes(engine.nets) as passes:
            for _ in engine.run():
                pass
    return passes.count / period / small.batch * recipe.train.batch


def run(name: str, seed: int, job: League) -> dict[str, Any]:
    """A row of the table: one recipe with one seed."""
    from fewstep.build import make_engine, make_feed, make_metrics, make_samples, student_sampler
    from fewstep.metrics.base import evaluate

    recipe = open_recipe(name, ROOT / "jobs" / "recipes", {"seed": seed})
    step = cost(recipe)
    steps = max(1, round(job.budget / step))
    recipe = open_recipe(name, ROOT / "jobs" / "recipes", {"seed": seed, "train.steps": steps})
    start = time.process_time()
    with make_feed(recipe.data, recipe.seed) as feed:
        engine = make_engine(recipe, feed)
        for _ in engine.run():
            pass
    cpu_s = time.process_time() - start
    sampler = student_sampler(recipe.method, engine.sampling)
    samples = make_samples(sampler, job.images, recipe.seed, recipe.evaluate.batch)
    scores = {score.name: score.value for score in evaluate(make_metrics(recipe), samples)}
    row = {"recipe": name, "method": recipe.method.tag, "seed": seed, "calls": sampler.calls, "steps": steps}
    return row | {"passes": steps * step, "cpu_s": cpu_s, "images_per_s": job.images / samples.seconds} | scores


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as Markdown."""
    columns = list(rows[0])
    shown = lambda value: f"{value:.4g}" if isinstance(value, float) else str(value)
    lines = [columns, ["---"] * len(columns), *([shown(row.get(c, "")) for c in columns] for row in rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


@command(League)
def main(job: League) -> None:
    import torch

    torch.set_num_threads(1)
    out, rows = resolve_out(job.out), []
    claim(out, "league", field="out")
    for name in job.recipes:
        for seed in job.seeds:
            rows.append(run(name, seed, job))
            print(json.dumps(rows[-1]), flush=True)
            (out / "rows.json").write_text(json.dumps(rows, indent=1) + "\n")
            (out / "table.md").write_text(table(rows))
    print(json.dumps({"out": str(out), "runs": len(rows)}))


if __name__ == "__main__":
    main()
