#!/usr/bin/env python
"""Searches a recipe's settings on a Ray cluster; the answer is a recipe, best.yaml, and a report.

    python jobs/sweep.py space=ttur recipe=fashion_mnist search=grid
    python jobs/sweep.py space=dmd2 recipe=fashion_mnist trials=40 scheduler=asha evaluate.every_images=1600 seeds=3
    ray job submit --working-dir . -- python jobs/sweep.py space=my_space.py recipe=my.yaml budget=8hours name=big

A sweep that was killed goes on when the same words are given again with its name. --dry-run checks everything and
says what would run. It ends in a JSON object: best, trials, images, report.
"""

import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "platform"))


def main(argv: list[str]) -> None:
    from fewstep.cluster.sweep import sweep

    folders = (ROOT / "tune_spaces", ROOT / "jobs" / "recipes")
    result = sweep(argv, __doc__, *folders, "fashion_mnist", ROOT / "dashboards" / "sweep.html")
    if result is not None:
        print(json.dumps(result))


if __name__ == "__main__":
    main(sys.argv[1:])
