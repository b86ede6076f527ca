#!/usr/bin/env python
"""Send what a run's journal still holds to its MLflow store:  python jobs/track.py folder=runs/my-run"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "platform"))

from fewstep.config import Strict, parse, resolve
from fewstep.tracking import send


class Track(Strict):
    """Send what a run's journal still holds to its MLflow store. Safe to repeat: nothing is recorded twice."""

    folder: str
    """the run's folder, the one that holds tracking/journal.jsonl"""
    uri: str | None = None
    """the store to send to, default the one the run was opened with"""
    timeout_s: float = 120.0
    """seconds after which to give up"""


def main() -> int:
    settings = parse(Track)
    folder = resolve(settings.folder)
    try:
        done = send(folder, uri=settings.uri, timeout_s=settings.timeout_s)
    except (FileNotFoundError, RuntimeError, ValueError) as error:
        print(error, file=sys.stderr)
        return 2
    print(f"{folder}: {done.sent} operations sent, {done.unsent} unsent, {done.refused} refused")
    return 1 if done.unsent or done.refused else 0


if __name__ == "__main__":
    raise SystemExit(main())
