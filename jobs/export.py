#!/usr/bin/env python
"""Exports a run's student as a folder that diffusers' DiffusionPipeline.from_pretrained loads."""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "platform"))

from fewstep.config import Strict, parse
from fewstep.networks.card import snippet
from fewstep.students import export_run


class Export(Strict):
    """Exports a run's student as a folder that diffusers' DiffusionPipeline.from_pretrained loads."""

    run: str
    """folder of a run, or one of its checkpoints/step-*"""
    out: str | None = None
    """folder to write; <run>/export unless given"""
    average: bool | None = None
    """the running average's weights, or the raw ones; null takes the average where the run kept one"""
    licence: str | None = None
    """of the weights, for the model card: an SPDX name such as cc-by-4.0"""
    overwrite: bool | None = None
    """replace an earlier export; null replaces <run>/export and nothing else"""


def main() -> None:
    job = parse(Export)
    try:
        report = export_run(job.run, out=job.out, average=job.average, licence=job.licence, overwrite=job.overwrite)
    except ValueError as error:
        sys.exit(str(error))
    print(f"loaded again in a fresh process: its images differ by at most {report['max_difference']:.2g}\n")
    print(snippet(report["folder"]) + "\n")
    print(json.dumps(report))


if __name__ == "__main__":
    main()
