"""What the training jobs share: from command line words to a finished run, with errors a person can act on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..config import plain_errors
from ..dryrun import describe
from ..recipe import load_recipe
from .progress import Progress, table
from .stream import NotEnoughCPUs
from .train import Unplaceable, fit


def train(argv: list[str], doc: str, recipes: Path, default: str) -> dict[str, Any] | None:
    """Runs a recipe on the cluster and prints its closing table; None after --help and --dry-run.

    Returns what run.run returned: run_id, folder, rows, grid.
    """
    if {"--help", "-h"} & set(argv):
        print(doc)
        return None
    with plain_errors(Unplaceable, NotEnoughCPUs):
        recipe = load_recipe([word for word in argv if word != "--dry-run"], recipes, default)
        if "--dry-run" in argv:
            print(describe(recipe))
            return None
        with Progress(recipe) as progress:
            result = fit(recipe, progress)
    print(table(result["rows"]))
    return result
