#!/usr/bin/env python
"""Trains a diffusion teacher from shards, on the same cluster and engine that distils it.

    python jobs/teach.py recipe=fashion_mnist_teacher data.path=data/fashion_mnist

Arguments and --dry-run are those of jobs/distill.py. The teacher is written to <run folder>/teacher, which recipes take
as teacher=<that folder>. The last line is a JSON object.
"""

import json
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "platform"))


def main(argv: list[str]) -> None:
    from fewstep.cluster import jobs
    from fewstep.folders import NETWORK, replace
    from fewstep.networks.pretrained import save_denoiser
    from fewstep.students import open_student

    result = jobs.train(argv, __doc__, ROOT / "jobs" / "recipes", "fashion_mnist_teacher")
    if result is None:
        return
    folder = Path(result["folder"]) / "teacher"
    with tempfile.TemporaryDirectory(prefix=".teacher.", dir=folder.parent) as new:
        save_denoiser(open_student(result["folder"]).net, Path(new) / "teacher")
        replace(Path(new) / "teacher", folder, NETWORK, overwrite=True, field="name")
    print(json.dumps({"run_id": result["run_id"], "scores": result["rows"], "teacher": str(folder)}))


if __name__ == "__main__":
    main(sys.argv[1:])
