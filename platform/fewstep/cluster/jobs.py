"""What the training jobs share: from command line words to a finished run, with errors a person can act on."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..dryrun import describe
from ..recipe import load_recipe
from .progress import Progress, table
from .train import Unplaceable, fit


@contextlib.contextmanager
def plain_errors() -> Iterator[None]:
    """Mistakes that a person can mend, printed as they are, and exit status 2; anything else keeps its traceback."""
    try:
        yield
    except (ValueError, Unplaceable, FloatingPointError) as error:
        print(error, file=sys.stderr)
        raise SystemExit(2) from None


def train(argv: list[str], doc: str, recipes: Path, default: str) -> dict[str, Any] | None:
    """Runs a recipe on the cluster and prints its closing table; None after --help and --dry-run.

    Returns what run.run returned: run_id, folder, rows, grid.
    """
    if {"--help", "-h"} & set(argv):
        print(doc)
        return None
    with plain_errors():
        recipe = load_recipe([word for word in argv if word != "--dry-run"], recipes, default)
        if "--dry-run" in argv:
            print(describe(recipe))
            return None
        with Progress(recipe) as progress:
            result = fit(recipe, progress)
    print(table(result["rows"]))
    return result
