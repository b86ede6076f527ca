#!/usr/bin/env python
"""Distils a teacher into a few-step student on a Ray cluster, scores it beside its teacher, exports it for diffusers.

    python jobs/distill.py recipe=fashion_mnist method.critic_updates_per_student_update=5
    ray job submit --working-dir . -- python jobs/distill.py recipe=fashion_mnist

Arguments are keys of the recipe, and replace the values of its file. The last line is a JSON object.
"""

import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "platform"))

from fewstep.config import Strict, command
from fewstep.recipe import Recipe, open_recipe


class Distill(Strict):
    """Distils a teacher into a few-step student, scores it beside its teacher, and exports it for diffusers."""

    recipe: str = "fashion_mnist"
    """Name of a file of jobs/recipes, or the path of a .yaml file."""
    dry_run: bool = False
    """Check everything, print the resolved recipe and the memory that each role needs on a worker, and train nothing.
    --dry-run says the same."""


@command(Distill, Recipe)
def main(job: Distill, given: dict[str, Any]) -> None:
    from fewstep.cluster import jobs
    from fewstep.run import publish

    result = jobs.train(open_recipe(job.recipe, ROOT / "jobs" / "recipes", given), job.dry_run, exports=True)
    if result is None:
        return
    export = publish(result["recipe"], result["rows"])
    last = {row["who"]: row for row in result["rows"]}
    print(
        json.dumps(
            {
                "run_id": result["run_id"],
                "teacher": last.get("teacher"),
                "student": last.get("student"),
                "grid": result["grid"],
                "export": export and export["folder"],
                "export_max_difference": export and export["max_difference"],
            }
        )
    )


if __name__ == "__main__":
    main()
