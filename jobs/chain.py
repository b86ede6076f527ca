#!/usr/bin/env python
"""Runs recipes one after the other, each a run of its own; the same command goes on where it stopped.

    python jobs/chain.py chain=fashion_mnist_two_stages name=two

A chain is a YAML file with `stages`: each names a `recipe` and the keys to `set`, in whose values "{1}" stands for the
folder of the first stage's run. Stage n is the run NAME-n. The last line is a JSON object with the runs' folders.
"""

import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "platform"))

from fewstep.config import Strict, command
from fewstep.recipe import Recipe, RunName, open_chain, open_recipe


class Chain(Strict):
    """Runs recipes one after the other, each from where those before it ended."""

    chain: str
    """Name of a file of jobs/chains, or the path of a .yaml file."""
    name: RunName
    """The chain's name; its runs are NAME-1, NAME-2, ..."""


def recipes(job: Chain) -> list[Recipe]:
    """The stages' recipes. Raises ConfigError with every mistake of the first stage that has one."""
    recipes: list[Recipe] = []
    for i, stage in enumerate(open_chain(job.chain, ROOT / "jobs" / "chains"), 1):
        given = stage.given([str(recipe.folder) for recipe in recipes]) | {"name": f"{job.name}-{i}"}
        recipes.append(open_recipe(stage.recipe, ROOT / "jobs" / "recipes", given))
    return recipes


@command(Chain)
def main(job: Chain) -> None:
    from fewstep.build import steps_done
    from fewstep.cluster import jobs

    done = []
    for recipe in recipes(job):
        done.append(str(recipe.folder))
        if steps_done(recipe) >= recipe.train.steps:
            print(f"{recipe.name}: finished, {recipe.train.steps} steps")
        elif jobs.train(recipe) is None:
            return
    print(json.dumps({"runs": done}))


if __name__ == "__main__":
    main()
