"""The watchdog: a thread on each rank that ends a stalled run and records the place of each rank."""

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
GRACE_S = 3.0  # time for the other ranks to write their places; the first process that ends takes all down
EXIT_STALLED = 75
STOP = "stop"
STOP_REQUEST = threading.Event()  # set by SIGTERM


class Stalled(UserError, RuntimeError):
    """No step for longer than `failure.stall_minutes`. The message lists the place of each rank."""


class Watchdog:
    """Watches one rank. Use it as a context manager around the training, in the thread that trains.

    folder: the run's folder. limit_s: longest time in seconds without a heartbeat. A rank that exceeds it writes
    `<folder>/stall/rank-N.json` with its place and its stack, and ends its process. Nothing else can end a collective
    that waits for ever. A file `<folder>/stop`, or SIGTERM after `on_sigterm`, makes the run finish its step, save and
    end.
    """

    def __init__(self, engine: Engine, folder: Path, limit_s: float):
        self.engine, self.folder, self.limit_s = engine, folder, limit_s
        self.training_thread = threading.get_ident()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="fewstep-watchdog", daemon=True)

    def __enter__(self) -> Watchdog:
        self.engine.heartbeat(self.engine.place)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._done.wait(LOOK_S):
            if STOP_REQUEST.is_set() or (self.folder / STOP).exists():
                self.engine.stop()
            silence_s = time.monotonic() - self.engine.place_since
            if silence_s > self.limit_s:
                self._end(silence_s)

    def _end(self, silence_s: float) -> None:
        world = self.engine.world
        frame = sys._current_frames().get(self.training_thread)
        record = {
            "rank": world.rank,
            "ranks": world.size,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "place": self.engine.place,
            "still_s": round(silence_s, 1),
            "stack": traceback.format_stack(frame),
        }
        path = self.folder / "stall" / f"rank-{world.rank:05d}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_file(path, json.dumps(record, indent=1))
        time.sleep(GRACE_S)
        os._exit(EXIT_STALLED)


def on_sigterm() -> None:
    """Makes SIGTERM end the run after its step, with a checkpoint. Call it in the main thread."""
    signal.signal(signal.SIGTERM, lambda *_: STOP_REQUEST.set())


def clear(folder: Path) -> None:
    """Removes the stop file and the stall records of an earlier attempt at a run."""
    (folder / STOP).unlink(missing_ok=True)
    shutil.rmtree(folder / "stall", ignore_errors=True)


def stall(folder: Path) -> str | None:
    """Returns the place of each rank in a stalled run as a text, or None if the run did not stall."""
    records: list[dict[str, Any]] = [json.loads(p.read_text()) for p in sorted((folder / "stall").glob("rank-*.json"))]
    if not records:
        return None
    lines = [
        f"rank {r['rank']} ({r['host']}, process {r['pid']}): {r['place']}, for {r['still_s']:g} s" for r in records
    ]
    silent = sorted(set(range(records[0]["ranks"])) - {r["rank"] for r in records})
    lines += [f"rank {rank}: no record" for rank in silent]
    return "\n".join([*lines, f"their stacks: {folder / 'stall'}"])
