#!/usr/bin/env python
"""Exports the mean of two runs' students (SwiftBrush v2, Dao et al. 2024, arXiv:2408.14176).

    python jobs/merge.py first=runs/a second=runs/b out=merged

Both must have started from the same weights: between others there is no good network.
"""

import json
import sys
from pathlib import Path
from typing import Annotated

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "platform"))

from pydantic import Field

from fewstep.config import OutPathOrURL, Strict, command
from fewstep.folders import EXPORT, replaceable
from fewstep.storage.place import located_out


class Merge(Strict):
    """Exports the mean of two runs' students."""

    first: str
    """Folder of a run or a checkpoint; its method says how the merged network is called, and with which others."""
    second: str
    """Folder of another with the same network."""
    weight: Annotated[float, Field(ge=0, le=1)] = 0.5
    """Share of the first."""
    out: OutPathOrURL
    """Folder to write, or its URL (s3://bucket/x)."""
    overwrite: bool = False
    """Replace an export at `out`."""


@command(Merge)
def main(job: Merge) -> None:
    from fewstep.networks.average import between
    from fewstep.networks.card import Card
    from fewstep.networks.export import export
    from fewstep.students import few_step_calls, open_student

    out = located_out(job.out)
    replaceable(out, EXPORT, overwrite=job.overwrite)
    one, other = open_student(job.first), open_student(job.second)
    net = between(one.net, other.net, job.weight)
    method = one.recipe.method
    training = f"{job.weight:g} of {one.recipe.name} and {1 - job.weight:g} of {other.recipe.name}"
    card = Card(name=out.name, method=method.tag, training=training)
    options = {"calls": few_step_calls(method, net), "others": one.others, "overwrite": job.overwrite}
    worst = export(net, out, card=card, **options)
    print(json.dumps({"folder": str(out), "weight": job.weight, "max_difference": worst}))


if __name__ == "__main__":
    main()
