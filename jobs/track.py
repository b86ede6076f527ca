#!/usr/bin/env python
"""Send what a run's journal still holds to its MLflow store:  python jobs/track.py folder=runs/my-run"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "platform"))

from fewstep.config import LocalPath, Strict, command, resolve


class Track(Strict):
    """Send what a run's journal still holds to its MLflow store. Safe to repeat: nothing is recorded twice."""

    folder: LocalPath
    """The run's folder, which holds tracking/journal.jsonl."""
    uri: str | None = None
    """Store to send to; null is the store that the run was opened with."""
    timeout_s: float = 120.0
    """Seconds after which the job gives up."""


@command(Track)
def main(job: Track) -> int:
    from fewstep.tracking import send

    folder = resolve(job.folder)
    done = send(folder, uri=job.uri, timeout_s=job.timeout_s)
    print(f"{folder}: {done.sent} operations sent, {done.unsent} unsent, {done.refused} refused")
    return 1 if done.unsent or done.refused else 0


if __name__ == "__main__":
    main()
