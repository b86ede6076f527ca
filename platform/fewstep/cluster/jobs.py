"""The training jobs' common part: from a recipe to a finished run and its closing table."""

from __future__ import annotations

import json
import shlex
import sys
from typing import Any

from ..dryrun import describe
from ..recipe import Recipe
from ..run import export_notes
from ..texts import masked
from .progress import Progress, table
from .train import fit, localized


def train(recipe: Recipe, dry_run: bool = False, exports: bool = False) -> dict[str, Any] | None:
    """Runs a recipe on the cluster and prints its closing table; with `dry_run` checks and describes it only.

    exports: the job exports the student of a finished run.
    Returns what run.run returned (run_id, folder, finished, step, rows, grid) and the recipe with absolute paths. None
    after a dry run, and for a run that was asked to stop: then it prints a JSON object with the command that goes on.
    """
    if dry_run:
        print(describe(localized(recipe), exports))
        return None
    notes = [*recipe.notes, *(export_notes(recipe) if exports else ())]
    with Progress(recipe) as progress:
        result = fit(recipe, progress, keep_lock=True, notes=notes)  # the job adds to the folder after the run
    if not result["finished"]:
        own = [word for word in sys.argv[1:] if not word.startswith("name=")]
        again = masked(shlex.join(["python", sys.argv[0], *own, f"name={recipe.name}"]))
        print(json.dumps({"run_id": result["run_id"], "finished": False, "step": result["step"], "again": again}))
        return None
    print(table(result["rows"]))
    return result | {"recipe": localized(recipe)}
