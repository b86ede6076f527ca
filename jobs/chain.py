#!/usr/bin/env python
"""Runs recipes one after the other, each a run of its own; the same command goes on where it stopped.

    python jobs/chain.py chain=fashion_mnist_two_stages name=two

A chain is a YAML file with `stages`: each names a `recipe` and the keys to `set`, in whose values "{1}" stands for the
folder of the first stage's run. Stage n is the run NAME-n. The last line is a JSON object with the runs' folders.
"""

import json
import sys
from pathlib import Path
from typing import Annotated, Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "platform"))

from pydantic import Field

from fewstep.config import Strict, command, read, validate
from fewstep.recipe import Recipe, RunName, find_recipe, open_recipe


class Stage(Strict):
    """One run of a chain."""

    recipe: str
    """Name of a file of jobs/recipes, or the path of a .yaml file."""
    set: dict[str, Any] = {}
    """Dotted keys of the recipe, and their values."""


class Stages(Strict):
    """A chain's file."""

    stages: Annotated[list[Stage], Field(min_length=1)]
    """The runs, in order."""


class Chain(Strict):
    """Runs recipes one after the other, each from where those before it ended."""

    chain: str
    """Name of a file of jobs/chains, or the path of a .yaml file."""
    name: RunName
    """The chain's name; its runs are NAME-1, NAME-2, ..."""


def filled(value: Any, folders: list[str]) -> Any:
    """A value with "{1}", "{2}", ... replaced by the folders of those stages."""
    if isinstance(value, dict):
        return {key: filled(inner, folders) for key, inner in value.items()}
    if isinstance(value, list):
        return [filled(inner, folders) for inner in value]
    for i, folder in enumerate(folders, 1):
        value = value.replace(f"{{{i}}}", folder) if isinstance(value, str) else value
    return value


def recipes(job: Chain) -> list[Recipe]:
    """The stages' recipes. Raises ConfigError with every mistake of the first stage that has one."""
    stages, found = validate(Stages, read(find_recipe(job.chain, ROOT / "jobs" / "chains"))).stages, []
    for i, stage in enumerate(stages, 1):
        folders = [str(recipe.folder) for recipe in found]
        given = filled(stage.set, folders) | {"name": f"{job.name}-{i}"}
        found.append(open_recipe(stage.recipe, ROOT / "jobs" / "recipes", given))
    return found


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
