"""The common part of the training jobs: it runs a recipe and prints the closing table."""

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
    """Runs a recipe on the cluster and prints its closing table.

    dry_run: only check and describe the recipe. exports: the job exports the student of a finished run.
    Returns the result of run.run (run_id, folder, finished, step, rows, grid) and the recipe with absolute paths; None
    after a dry run, and after a run that was asked to stop. Then it prints JSON with the command that resumes the run.
    """
    if dry_run:
        print(describe(localized(recipe), exports))
        return None
    notes = [*recipe.notes, *(export_notes(recipe) if exports else ())]
    with Progress(recipe) as progress:
        result = fit(recipe, progress, keep_lock=True, notes=notes)  # the job adds to the folder after the run
    if not result["finished"]:
        own = [argument for argument in sys.argv[1:] if not argument.startswith("name=")]
        again = masked(shlex.join(["python", sys.argv[0], *own, f"name={recipe.name}"]))
        print(json.dumps({"run_id": result["run_id"], "finished": False, "step": result["step"], "again": again}))
        return None
    print(table(result["rows"]))
    if result["page"]:
        print(f"MLflow: {result['page']}")
    return result | {"recipe": localized(recipe)}
