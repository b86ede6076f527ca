#!/usr/bin/env python
"""Trains several recipes with equal compute, one after the other in this process, and writes one table of their scores.

    python jobs/league.py budget=8000 out=league

Compute is counted in forward passes of the teacher, one sample each (networks/passes.py), and a recipe gets as many
steps as the budget pays for; the passes that make a method's pairs count, too. The same command line goes on after the
last run that ended. The last line is a JSON object.
"""

import json
import sys
import time
from math import ceil, lcm
from pathlib import Path
from typing import Annotated, Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "platform"))

from pydantic import Field

from fewstep.config import ConfigError, OutPath, Strict, command, read_json, resolve_out, to_yaml
from fewstep.folders import claim, cleaned_name, write_private
from fewstep.recipe import Recipe, Stage, open_chain, open_recipe
from fewstep.texts import shown

METHODS = (
    *("dmd", "dmd2", "f_distill", "decoupled_dmd", "dp_dmd", "swiftbrush", "snoopi", "flash_dmd", "hipa", "regression"),
    *("scm", "sana_sprint", "rcm", "tbcm", "lcm", "pcm", "ladd", "sid", "boot", "twinflow", "mdt"),
)
RECIPES = ["fashion_mnist" + (f"_{name}" if name != "dmd2" else "") for name in METHODS]
CHAINS = [f"fashion_mnist_{name}" for name in ("phased_dmd", "hyper_sd", "instaflow", "msd")]
SECOND = "shipped:fashion_mnist/residual"
SCORES = {
    "metrics": ["fd_fashion", "fd_fashion_residual", "class_consistency", "diversity", "recall", "map_error"],
    "settings.fd_fashion_residual.features": f"{SECOND}/features.safetensors",
    "settings.fd_fashion_residual.reference": f"{SECOND}/statistics.npz",
}
PAIR_STEPS = 5  # Heun steps of the teacher that make a pair
PERIOD = 8  # steps, at least, whose passes are counted: some methods draw the number of their calls


class League(Strict):
    """Trains several recipes with equal compute and writes one table of their scores."""

    recipes: list[str] = RECIPES
    """Names of files of jobs/recipes, or paths of .yaml files."""
    chains: list[str] = CHAINS
    """Names of files of jobs/chains, or paths of .yaml files; their stages share the budget equally."""
    budget: Annotated[float, Field(gt=0)] = 8_000
    """Forward passes of the teacher, one sample each, that a run may cost."""
    seeds: list[int] = [0]
    """Seeds; each is a run."""
    evaluate: dict[str, Any] = SCORES
    """Keys of the recipes' `evaluate` and their values, so that all are scored alike."""
    images: Annotated[int, Field(ge=2)] = 2000
    """Samples to score, of the last step."""
    out: OutPath = "league"
    """Folder of table.md and rows.json, of the pairs, and of the runs of chains."""


def cost(recipe: Recipe) -> float:
    """Passes of one step of a recipe, its mean over whole periods after which the phases repeat."""
    from fewstep.build import make_engine, make_feed
    from fewstep.networks.passes import Passes

    period = lcm(*(phase.every for phase in recipe.method.phases()))
    period *= ceil(PERIOD / period)
    small = recipe.train.model_copy(update={"steps": period, "batch": 2, "accumulate": 1})
    with make_feed(recipe.data, recipe.seed) as feed:
        engine = make_engine(recipe.model_copy(update={"train": small}), feed)
        with Passes(engine.nets) as passes:
            for _ in engine.run():
                pass
    return passes.count / period / small.batch * recipe.train.batch


def pairs_of(recipe: Recipe, budget: float, out: Path) -> tuple[Path, int]:
    """The pairs that half of a budget pays for, made once a seed and a number, and the passes that they cost."""
    from fewstep.pairs import write_pairs
    from fewstep.students import open_sampler

    passes = 2 * PAIR_STEPS - 1
    count = max(2, int(budget / 2 / passes))
    folder = out / f"pairs-{recipe.seed}-{count}"
    if not folder.exists():
        write_pairs(open_sampler(recipe.teacher, PAIR_STEPS), folder, count, recipe.seed, teacher=recipe.teacher)
    return folder, count * passes


def train(
    stage: Stage, given: dict[str, Any], budget: float, out: Path, keep: bool = False
) -> tuple[Recipe, Any, float]:
    """One recipe, trained: the recipe with its steps, its engine, and the passes that it took.

    keep: write its run's folder, from which a later stage starts.
    """
    from fewstep.build import describe_net, make_engine, make_feed
    from fewstep.engine.folder import checkpoints, remove
    from fewstep.storage.place import Place

    recipe, spent = open_recipe(stage.recipe, ROOT / "jobs" / "recipes", given), 0
    if "noise" in recipe.method.needs:
        pairs, spent = pairs_of(recipe, budget, out)
        given = given | {"data.path": str(pairs)}
        recipe = open_recipe(stage.recipe, ROOT / "jobs" / "recipes", given)
    step = cost(recipe)
    steps = max(1, round((budget - spent) / step))
    once = {f"train.{key}": steps for key in ("steps", "report_every", "save_every")}
    recipe = open_recipe(stage.recipe, ROOT / "jobs" / "recipes", given | once)
    if keep:
        claim(recipe.folder, "run")
        for stopped in checkpoints(recipe.checkpoints):  # by a start that did not end
            remove(Place.of(stopped))
        write_private(recipe.folder / "recipe.yaml", to_yaml(recipe.written))
    with make_feed(recipe.data, recipe.seed) as feed:
        engine = make_engine(recipe, feed, folder=recipe.checkpoints if keep else None)
        for _ in engine.run():
            pass
    if keep:
        describe_net(recipe.folder, engine.nets["student"])
    return recipe, engine, spent + steps * step


def run(name: str, stages: list[Stage], seed: int, job: League, out: Path) -> dict[str, Any]:
    """A row of the table: one recipe, or the stages of one chain, with one seed."""
    from fewstep.build import make_metrics, make_samples, student_sampler
    from fewstep.metrics.base import evaluate

    scored = {f"evaluate.{key}": value for key, value in job.evaluate.items()}
    folders, passes, steps, start = [], 0.0, 0, time.process_time()
    for i, stage in enumerate(stages, 1):
        own = {"seed": seed, "name": f"{cleaned_name(name)}-{seed}-{i}", "out": str(out / "runs")} | scored
        share = job.budget / len(stages)
        recipe, engine, spent = train(stage, stage.given(folders) | own, share, out, keep=i < len(stages))
        folders.append(str(recipe.folder))
        passes, steps = passes + spent, steps + recipe.train.steps
    cpu_s = time.process_time() - start
    sampler = student_sampler(recipe.method, engine.sampling)
    samples = make_samples(sampler, job.images, recipe.seed, recipe.evaluate.batch)
    if "map_error" in recipe.evaluate.metrics:  # the end of the trajectory that the student was asked to meet
        own = {"guidance": getattr(recipe.method, "guidance", 1.0)} | recipe.evaluate.settings.get("map_error", {})
        settings = {"settings": recipe.evaluate.settings | {"map_error": own}}
        recipe = recipe.model_copy(update={"evaluate": recipe.evaluate.model_copy(update=settings)})
    scores = evaluate(make_metrics(recipe), samples)
    row = {"recipe": name, "method": recipe.method.tag, "seed": seed, "calls": sampler.calls, "steps": steps}
    row |= {"passes": passes, "cpu_s": cpu_s, "images_per_s": job.images / samples.seconds}
    row |= {score.name: score.value for score in scores}
    seen = [score.name for score in scores if score.seen_by_loss and score.name != "map_error"]
    return row | {"seen_by_loss": seen, "budget": job.budget, "images": job.images}


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as Markdown; * marks a score whose network a loss used."""
    columns = [column for column in rows[0] if column not in ("seen_by_loss", "budget", "images")]

    def cell(row: dict[str, Any], column: str) -> str:
        text = shown(row.get(column, ""), 4)
        return f"{text} *" if column in row["seen_by_loss"] else text

    lines = [columns, ["---"] * len(columns), *([cell(row, c) for c in columns] for row in rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def rows_of(out: Path, job: League) -> list[dict[str, Any]]:
    """The rows that an earlier start of the job wrote. Raises ConfigError where those are of other settings."""
    path = out / "rows.json"
    rows = read_json(path, list) if path.is_file() else []
    for row in rows:
        if (row["budget"], row["images"]) != (job.budget, job.images):
            raise ConfigError(
                f"out: {path} holds runs of budget={row['budget']:g} and images={row['images']}, which do not compare "
                f"with budget={job.budget:g} and images={job.images}; choose another folder with out=..."
            )
    return rows


@command(League)
def main(job: League) -> None:
    import torch

    torch.set_num_threads(1)
    out = resolve_out(job.out)
    claim(out, "league", field="out")
    rows = rows_of(out, job)
    done = {(row["recipe"], row["seed"]) for row in rows}
    entries = {name: [Stage(recipe=name)] for name in job.recipes}
    entries |= {f"chain {name}": open_chain(name, ROOT / "jobs" / "chains") for name in job.chains}
    for seed in job.seeds:
        for name, stages in entries.items():
            if (name, seed) in done:
                continue
            rows.append(run(name, stages, seed, job, out))
            print(json.dumps(rows[-1]), flush=True)
            write_private(out / "rows.json", json.dumps(rows, indent=1) + "\n")
            write_private(out / "table.md", table(rows))
    print(json.dumps({"out": str(out), "runs": len(rows)}))


if __name__ == "__main__":
    main()
