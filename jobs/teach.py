#!/usr/bin/env python
"""Trains a diffusion teacher from shards, on the same cluster and engine that distils it; and what a latent one stands
on, a codec and text encoders.

    python jobs/teach.py recipe=fashion_mnist_teacher data.path=data/fashion_mnist

Arguments are keys of the recipe, and replace the values of its file. The teacher is written to <run folder>/teacher,
which recipes take as teacher=<that folder>. The last line is a JSON object.
"""

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "platform"))

from fewstep.config import Strict, command
from fewstep.recipe import Recipe, open_recipe


class Teach(Strict):
    """Trains a diffusion teacher from shards."""

    recipe: str = "fashion_mnist_teacher"
    """Name of a file of jobs/recipes, or the path of a .yaml file."""
    half: bool = False
    """Write the teacher's weights as float16, in half the space."""
    dry_run: bool = False
    """Check everything, print the resolved recipe and the memory that each role needs on a worker, and train nothing.
    --dry-run says the same."""


@command(Teach, Recipe)
def main(job: Teach, given: dict[str, Any]) -> None:
    from fewstep.cluster import jobs
    from fewstep.folders import NETWORK, replace
    from fewstep.students import open_student, save_teacher

    result = jobs.train(open_recipe(job.recipe, ROOT / "jobs" / "recipes", given), job.dry_run)
    if result is None:
        return
    folder = Path(result["folder"]) / "teacher"
    with tempfile.TemporaryDirectory(prefix=".teacher.", dir=folder.parent) as new:
        save_teacher(open_student(result["folder"], known=result["recipe"].urls), Path(new) / "teacher", job.half)
        replace(Path(new) / "teacher", folder, NETWORK, overwrite=True, field="name")
    print(json.dumps({"run_id": result["run_id"], "scores": result["rows"], "teacher": str(folder)}))


if __name__ == "__main__":
    main()
