"""The watchdog: a thread beside a rank's training that ends a run where nothing moves, and says where each rank was."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import Any

from .config import UserError
from .engine.train import Engine
from .files import write_file

LOOK_S = 0.5
GRACE_S = 3.0  # for the other ranks to say where they are, before one that ends takes them all down
EXIT_STALLED = 75
STOP = "stop"
ASKED = threading.Event()  # this process was asked to stop


class Stalled(UserError, RuntimeError):
    """No step for longer than `failure.stall_minutes`; the text says where each rank was."""


class Watchdog:
    """Watches one rank. Use as a context manager around what the ranks do together, from the thread that does it.

    folder: the run's. limit_s: how long the rank may stay at one place. A rank that exceeds it writes
    `<folder>/stall/rank-N.json`, with its place and its stack, and ends its process: nothing else ends a collective
    that waits for ever. A file `<folder>/stop`, or `on_sigterm`, asks the run to finish its step, save and end.
    """

    def __init__(self, engine: Engine, folder: Path, limit_s: float):
        self.engine, self.folder, self.limit_s = engine, folder, limit_s
        self.trained_by = threading.get_ident()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._work, name="fewstep-watchdog", daemon=True)

    def __enter__(self) -> Watchdog:
        self.engine.at(self.engine.place)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _work(self) -> None:
        while not self._done.wait(LOOK_S):
            if ASKED.is_set() or (self.folder / STOP).exists():
                self.engine.stop()
            still_s = time.monotonic() - self.engine.place_since
            if still_s > self.limit_s:
                self._end(still_s)

    def _end(self, still_s: float) -> None:
        world = self.engine.world
        frame = sys._current_frames().get(self.trained_by)
        where = {
            "rank": world.rank,
            "ranks": world.size,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "place": self.engine.place,
            "still_s": round(still_s, 1),
            "stack": traceback.format_stack(frame),
        }
        path = self.folder / "stall" / f"rank-{world.rank:05d}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_file(path, json.dumps(where, indent=1))
        time.sleep(GRACE_S)
        os._exit(EXIT_STALLED)


def on_sigterm() -> None:
    """SIGTERM asks this process to finish its step, save and end. The main thread calls it."""
    signal.signal(signal.SIGTERM, lambda *_: ASKED.set())


def clear(folder: Path) -> None:
    """Forgets the requests and the stalls of an earlier attempt at a run."""
    (folder / STOP).unlink(missing_ok=True)
    shutil.rmtree(folder / "stall", ignore_errors=True)


def stall(folder: Path) -> str | None:
    """Where each rank was when the run stalled, as a text, or None when it did not."""
    found: list[dict[str, Any]] = [json.loads(p.read_text()) for p in sorted((folder / "stall").glob("rank-*.json"))]
    if not found:
        return None
    lines = [f"rank {w['rank']} ({w['host']}, process {w['pid']}): {w['place']}, for {w['still_s']:g} s" for w in found]
    silent = sorted(set(range(found[0]["ranks"])) - {w["rank"] for w in found})
    lines += [f"rank {rank}: no word from it" for rank in silent]
    return "\n".join([*lines, f"their stacks: {folder / 'stall'}"])
