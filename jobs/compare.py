#!/usr/bin/env python
"""Writes one HTML page that sets runs beside each other: settings, scores with spread, curves, sample grids.

    python jobs/compare.py runs=[baseline,more-gan,3f2a...] out=compare.html
    python jobs/compare.py sweep=<parent run>

The page asks for nothing from the network. Runs that differ only in their seed are shown as one, with their spread.
The last line is a JSON object with the page's path and what it holds.
"""

import json
import sys
from pathlib import Path
from typing import Annotated

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "platform"))

from pydantic import Field

from fewstep.config import OutPath, Strict, command, resolve_out


class Compare(Strict):
    """Writes one HTML page that sets runs beside each other."""

    runs: list[str] = []
    """Names or ids of the runs; `last` is the one started last."""
    sweep: str | None = None
    """Instead of runs: name or id of a sweep's parent run, whose trials are compared."""
    out: OutPath = "compare.html"
    """The page."""
    grid: str = "student"
    """Sample grids to show: student, or fake, which is the fake score's denoising."""
    grids: Annotated[int, Field(ge=2)] | None = None
    """Sample grids a run, at most; null shares 240 among the runs."""
    rank_seen_by_loss: bool = False
    """Mark the best of scores, too, whose network a loss of their run used."""
    uri: str | None = None
    """Tracking server; null takes MLFLOW_TRACKING_URI, else mlflow.db beside the runs."""
    experiment: str | None = None
    """Look for runs in this experiment only."""


@command(Compare)
def main(job: Compare) -> None:
    from fewstep.compare import collect, compare
    from fewstep.folders import overwritable
    from fewstep.page import render
    from fewstep.storage.place import writable
    from fewstep.tracking import Store

    if bool(job.runs) == bool(job.sweep):
        raise ValueError("runs: give either runs=[name-or-id, ...] or sweep=<parent run>")
    out = resolve_out(job.out)
    overwritable(out)
    writable(out.parent)
    store = Store(job.uri, job.experiment)
    if job.sweep:
        parent = store.find(job.sweep)
        runs, what = store.children(parent), f"sweep {parent.name}"
        if not runs:
            raise ValueError(f"sweep: run {parent.name!r} has no trials; give a sweep's parent run, or runs=[...]")
    else:
        runs = [store.find(ref) for ref in job.runs]
        what = f"{len(runs)} run{'s' if len(runs) > 1 else ''}"
    grids = job.grids or max(2, 240 // len(runs))
    records = [collect(store, run, grid=job.grid, grids=grids) for run in runs]
    data = compare(records, what=what, store=store.uri, rank_seen_by_loss=job.rank_seen_by_loss)
    out.write_text(render(ROOT / "dashboards" / "compare.html", data=data), encoding="utf-8")
    print(f"{what}, {len(data['groups'])} different settings; open {out} in a browser")
    print(json.dumps({"page": str(out), "runs": len(runs), "groups": len(data["groups"]), "bytes": out.stat().st_size}))


if __name__ == "__main__":
    main()
