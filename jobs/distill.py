#!/usr/bin/env python
"""Distils a teacher into a few-step student on a Ray cluster, scores it beside its teacher, exports it for diffusers.

    python jobs/distill.py recipe=fashion_mnist method.critic_updates_per_student_update=5
    ray job submit --working-dir . -- python jobs/distill.py recipe=fashion_mnist

Arguments are the recipe's dotted keys; recipe= names a file of jobs/recipes or a path. --dry-run checks everything,
prints the resolved recipe and the memory each role needs on a worker, and trains nothing. It ends in a JSON object.
"""

import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "platform"))


def main(argv: list[str]) -> None:
    from fewstep.cluster import jobs
    from fewstep.config import plain_errors
    from fewstep.run import register
    from fewstep.students import export_run

    result = jobs.train(argv, __doc__, ROOT / "jobs" / "recipes", "fashion_mnist")
    if result is None:
        return
    with plain_errors():
        export = export_run(result["folder"], result["rows"])
    register(Path(result["folder"]), Path(export["folder"]))
    last = {row["who"]: row for row in result["rows"]}
    print(
        json.dumps(
            {
                "run_id": result["run_id"],
                "teacher": last.get("teacher"),
                "student": last.get("student"),
                "grid": result["grid"],
                "export": export["folder"],
                "export_max_difference": export["max_difference"],
            }
        )
    )


if __name__ == "__main__":
    main(sys.argv[1:])
