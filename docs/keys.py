#!/usr/bin/env python
"""Writes docs/keys.md, the page of all keys of the recipes and of the jobs:  python docs/keys.py"""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "platform"))

from fewstep.config import page
from fewstep.recipe import Recipe


def text() -> str:
    """The page, as Markdown, from the settings models as they are now."""
    jobs = {f"jobs/{path.name}": runpy.run_path(str(path))["main"].models for path in sorted(ROOT.glob("jobs/*.py"))}
    return page(jobs, Recipe)


if __name__ == "__main__":
    (ROOT / "docs" / "keys.md").write_text(text(), encoding="utf-8")
