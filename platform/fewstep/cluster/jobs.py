"""What the training jobs share: from command line words to a finished run, with errors a person can act on."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import Any

from ..config import plain_errors
from ..dryrun import describe
from ..engine.train import Collapsed
from ..recipe import load_recipe
from ..watchdog import Stalled
from .progress import Progress, table
from .stream import NotEnoughCPUs
from .train import Lost, Unplaceable, fit


def train(argv: list[str], doc: str, recipes: Path, default: str) -> dict[str, Any] | None:
    """Runs a recipe on the cluster and prints its closing table.

    Returns what run.run returned: run_id, folder, finished, step, rows, grid. None after --help, --dry-run, and a run
    that was asked to stop: then the closing JSON object says how it goes on, and the exit status is 0.
    """
    if {"--help", "-h"} & set(argv):
        print(doc)
        return None
    with plain_errors(Unplaceable, NotEnoughCPUs, Lost, Stalled, Collapsed):
        recipe = load_recipe([word for word in argv if word != "--dry-run"], recipes, default)
        if "--dry-run" in argv:
            print(describe(recipe))
            return None
        with Progress(recipe) as progress:
            result = fit(recipe, progress)
    if not result["finished"]:
        own = [word for word in argv if not word.startswith("name=")]
        again = shlex.join(["python", sys.argv[0], *own, f"name={recipe.name}"])
        print(json.dumps({"run_id": result["run_id"], "finished": False, "step": result["step"], "again": again}))
        return None
    print(table(result["rows"]))
    return result
