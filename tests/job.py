"""The jobs as functions of their arguments, each file run once a process."""

from __future__ import annotations

import runpy
from functools import cache
from pathlib import Path
from typing import Any

from fewstep.config import Command

JOBS = Path(__file__).resolve().parents[1] / "jobs"


@cache
def names(name: str) -> dict[str, Any]:
    """The definitions of jobs/<name>.py, by name."""
    return runpy.run_path(str(JOBS / f"{name}.py"))


def job(name: str) -> Command:
    """The command of jobs/<name>.py, which takes its arguments as a list; SystemExit with status 2 for a mistake."""
    return names(name)["main"]
