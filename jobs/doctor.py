#!/usr/bin/env python
"""Says whether a cluster can train: what it has, and what of it is broken.

    python jobs/doctor.py                          # joins the cluster that RAY_ADDRESS names, else starts one here
    python jobs/doctor.py recipe=fashion_mnist storage=s3://bucket/runs
    ray job submit --working-dir . -- python jobs/doctor.py json=true

Exit status 0 when nothing is broken, 1 otherwise, warnings aside; never later than limit_s.
"""

import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "platform"))

from pydantic import Field

from fewstep.config import OutPath, OutPathOrURL, Strict, command


class Doctor(Strict):
    """Checks nodes, versions, all-reduce, storage, MLflow, weights and data."""

    recipe: str | None = None
    """Check what this recipe uses: a name of jobs/recipes or a path. Without one, what is shipped, and Inception."""
    out: OutPath | None = None
    """Folder of the runs; without it the recipe's, else runs."""
    storage: OutPathOrURL | None = None
    """Folder or URL of the checkpoints; without it the recipe's."""
    uri: str | None = None
    """Tracking store; without it the recipe's, MLFLOW_TRACKING_URI, or mlflow.db here."""
    limit_s: float = Field(300.0, ge=10)
    """Seconds after which what has not answered counts as broken."""
    as_json: bool = Field(False, alias="json")
    """Print a JSON object instead of a table. --json says the same."""


@command(Doctor)
def main(job: Doctor) -> int:
    from fewstep.cluster.doctor import examine, within
    from fewstep.diagnosis import healthy, judge, table

    with within(job.limit_s):
        from fewstep.recipe import open_recipe

        given = {"out": job.out, "storage": job.storage, "tracking.uri": job.uri}
        given = {key: value for key, value in given.items() if value is not None}
        recipe = open_recipe(job.recipe or "fashion_mnist", ROOT / "jobs" / "recipes", given)
        facts = examine(recipe, job.limit_s, asked=job.recipe is not None)
    checks = judge(facts)
    if job.as_json:
        print(json.dumps({"healthy": healthy(checks), "checks": [vars(check) for check in checks], "facts": facts}))
    else:
        print(table(checks))
    return 0 if healthy(checks) else 1


if __name__ == "__main__":
    main()
