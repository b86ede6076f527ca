#!/usr/bin/env python
"""Searches a recipe's settings on a Ray cluster; the answer is a recipe, best.yaml, and a report.

    python jobs/sweep.py space=ttur recipe=fashion_mnist search=grid
    python jobs/sweep.py space=dmd2 recipe=fashion_mnist trials=40 scheduler=asha evaluate.every_images=1600 seeds=3
    ray job submit --working-dir . -- python jobs/sweep.py space=my_space.py recipe=my.yaml budget=8hours name=big

A sweep that was killed goes on when the same arguments are given again with its name. The last line is a JSON object:
best, trials, images, report.
"""

import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "platform"))

from fewstep.config import command
from fewstep.recipe import Recipe, open_recipe
from fewstep.sweeps.settings import Sweep
from fewstep.sweeps.space import load_space


class SweepJob(Sweep):
    """Searches a recipe's settings on a Ray cluster; the answer is a recipe, best.yaml, and a report."""

    recipe: str = "fashion_mnist"
    """Name of a file of jobs/recipes, or the path of a .yaml file."""
    dry_run: bool = False
    """Check everything and print the plan, but run nothing. --dry-run says the same."""


@command(SweepJob, Recipe)
def main(job: SweepJob, given: dict[str, Any]) -> None:
    from fewstep.cluster.sweep import TuneCluster
    from fewstep.sweeps.driver import sweep

    recipe = open_recipe(job.recipe, ROOT / "jobs" / "recipes", given)
    space = load_space(job.space, ROOT / "tune_spaces")
    own = Sweep.model_validate(job.model_dump(include=set(Sweep.model_fields)))
    result = sweep(own, space, recipe, ROOT / "dashboards" / "sweep.html", TuneCluster(), job.dry_run)
    if result is not None:
        print(json.dumps(result))


if __name__ == "__main__":
    main()
