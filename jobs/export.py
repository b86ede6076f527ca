#!/usr/bin/env python
"""Exports a run's student as a folder that diffusers' DiffusionPipeline.from_pretrained loads."""

import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "platform"))

from fewstep.config import OutPathOrURL, Strict, command
from fewstep.networks.card import snippet
from fewstep.students import export_run


class Export(Strict):
    """Exports a run's student as a folder that diffusers' DiffusionPipeline.from_pretrained loads."""

    run: str
    """Folder of a run, or one of its checkpoints/step-*."""
    out: OutPathOrURL | None = None
    """Folder to write, or its URL (s3://bucket/x); null is <run>/export."""
    method: dict[str, Any] = {}
    """Fields of the run's method to change for sampling, such as method.times=[1.5583] or method.student_steps=2, for
    another number of calls by the same network."""
    average: bool | None = None
    """Export the averaged weights (true) or the raw ones (false); null takes the average where the run kept one."""
    licence: str | None = None
    """Licence of the weights, for the model card: an SPDX name such as cc-by-4.0."""
    overwrite: bool | None = None
    """Replace an earlier export; null replaces <run>/export and nothing else."""


@command(Export)
def main(job: Export) -> None:
    options = {"average": job.average, "licence": job.licence, "overwrite": job.overwrite, "method": job.method}
    report = export_run(job.run, out=job.out, **options)
    print(f"loaded again in a fresh process: its images differ by at most {report['max_difference']:.2g}\n")
    folder = report["folder"]
    if "://" in folder:  # diffusers reads folders
        folder = folder.rpartition("/")[2]
        print(f"copy {report['folder']} to a folder {folder}; then:")
    print(snippet(folder, stock=report["call"]) + "\n")
    print(json.dumps(report))


if __name__ == "__main__":
    main()
