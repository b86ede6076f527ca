"""The journal of a run: all reports, on disk before they are sent, and a marker of the last one that the server has.

A run's folder holds `tracking/`:

    journal.jsonl   append-only, one operation a line: {"serial": 1, 2, ..., "time": ms, "op": ..., ...}
    sent.json       {"serial": last acknowledged, "run_id": ..., "experiment_id": ...}, replaced atomically
    refused.jsonl   serials of operations that the server refuses for good, and why
    files/<id>/     copies of the files of unsent operations

Each line is one write(2), so a process that is killed (kill -9) loses no complete line. Lines are not fsynced, so a
power failure may lose the last ones. Opening a journal drops an incomplete last line, and counts it.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..config import UserError
from ..files import write_file
from ..folders import append_private
from ..texts import masked

OPEN = {"uri", "experiment", "name", "run_id", "tags", "time", "journal"}  # keys of the first operation
log = logging.getLogger("fewstep.tracking")


class TrackingError(UserError, RuntimeError):
    """The journal or the store cannot be used now; the text says why and what to do."""


@dataclass(frozen=True)
class Entry:
    """One journalled operation and the byte at which the next line starts."""

    serial: int
    op: dict[str, Any]
    end: int


class Journal:
    """The open journal of one run folder. It belongs to one process at a time; all threads of it may call the methods.

    folder: the run's folder. create: make the journal when there is none.
    lock_s: seconds to wait for another process that has the journal. A killed process releases it at once, and a
    process with a hanging request when that request times out.
    Raises FileNotFoundError when there is no journal and `create` is false, TrackingError when another process holds
    it, ValueError when a line other than the last is damaged.
    """

    def __init__(self, folder: Path, *, create: bool = True, lock_s: float = 30.0):
        self.run_folder = folder.absolute()
        self.folder = self.run_folder / "tracking"
        self.path = self.folder / "journal.jsonl"
        if not create and not self.path.is_file():
            raise FileNotFoundError(
                f"folder: no tracking/journal.jsonl in {str(self.run_folder)!r}; give a run's folder"
            )
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock_file = self._lock(lock_s)
        self._mutex = threading.Lock()
        self.dropped = 0  # incomplete lines, of a process that died while it wrote
        self.lost = 0  # operations that could not be written, for example on a full disk
        self.refused = 0
        try:
            self._open()
        except BaseException:
            self._lock_file.close()
            raise

    def _lock(self, lock_s: float):
        file = open(self.folder / "lock", "a+")
        deadline = time.monotonic() + lock_s
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() > deadline:
                    file.seek(0)
                    holder = file.read().strip()
                    file.close()
                    raise TrackingError(
                        f"{self.run_folder}: process {holder} is already tracking this run; wait for it or end it"
                    ) from None
                time.sleep(0.1)
            else:
                file.truncate(0)
                file.write(str(os.getpid()))
                file.flush()
                return file

    def _open(self) -> None:
        self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
        os.fchmod(self._file, 0o600)
        marker = self._read_marker()
        self.run_id: str | None = marker.get("run_id")
        self.experiment_id: str | None = marker.get("experiment_id")
        self.sent = int(marker.get("serial", 0))
        self.last = self._offset = self._size = 0
        staged = set()
        for entry in self.entries():
            self.last, self._size = entry.serial, entry.end
            if entry.serial <= self.sent:
                self._offset = entry.end
            elif "file" in entry.op:
                staged.add(Path(entry.op["file"]).parts[0])
        if os.fstat(self._file).st_size > self._size:
            self.dropped = 1
            os.ftruncate(self._file, self._size)
            log.warning("%s: the last line is incomplete and is dropped", self.path)
        self.sent = min(self.sent, self.last)
        for left in (self.folder / "files").glob("*"):
            if left.name not in staged:
                shutil.rmtree(left)

    def _read_marker(self) -> dict[str, Any]:
        path = self.folder / "sent.json"
        if not path.exists():
            return {}
        try:
            return dict(json.loads(path.read_bytes()))
        except (ValueError, TypeError, RecursionError):
            log.warning("%s: unreadable, so all operations are sent again; the server keeps each once", path)
            return {}

    def entries(self, start: int = 0) -> Iterator[Entry]:
        """Yields the complete lines from byte `start` on, oldest first. Raises ValueError that names a damaged line."""
        with open(self.path, "rb") as file:
            end = file.seek(start)
            for line in file:
                if not line.endswith(b"\n"):
                    return
                end += len(line)
                try:
                    op = json.loads(line)
                    damaged = not (isinstance(op["serial"], int) and isinstance(op["op"], str))
                    if end == len(line):  # the first line opens the run
                        damaged |= op["op"] != "open" or not OPEN <= op.keys()
                except (ValueError, KeyError, TypeError, RecursionError):
                    damaged = True
                if damaged:
                    raise ValueError(
                        f"{self.path}: damaged line at byte {end - len(line)}; move the folder {str(self.folder)!r} "
                        "away, and a new journal is started"
                    )
                yield Entry(op["serial"], op, end)

    def append(self, op: dict[str, Any]) -> int:
        """Writes one operation and returns its serial. On a full disk the operation is lost; `lost` counts it."""
        with self._mutex:
            serial = self.last + 1
            line = {"serial": serial, "time": time.time_ns() // 1_000_000} | masked(op)
            line = json.dumps(line).encode() + b"\n"
            try:
                if os.write(self._file, line) != len(line):
                    raise OSError("short write")
            except OSError as error:
                self.lose(error)
                os.ftruncate(self._file, self._size)
                return self.last
            self.last, self._size = serial, self._size + len(line)
            return serial

    def lose(self, error: OSError) -> None:
        """Counts an operation that could not be written to disk, and logs the first one."""
        self.lost += 1
        if self.lost == 1:
            log.error("%s: cannot write (%s); reports are lost until it can be written again", self.folder, error)

    def stage(self) -> Path:
        """Makes a folder for the files of the next operation. It names them as `file`, relative to `files/`."""
        (self.folder / "files").mkdir(exist_ok=True)
        return Path(tempfile.mkdtemp(dir=self.folder / "files"))

    def file(self, entry: Entry) -> Path:
        """Returns the path of an operation's copied file."""
        return self.folder / "files" / entry.op["file"]

    @property
    def unsent(self) -> int:
        """Number of operations that the server has not acknowledged."""
        return max(0, self.last - self.sent)

    def pending(self, limit: int = 1000) -> list[Entry]:
        """Returns at most `limit` unacknowledged operations, oldest first."""
        entries: list[Entry] = []
        for entry in self.entries(self._offset):
            entries.append(entry)
            if len(entries) == limit:
                break
        return entries

    def acknowledge(self, entries: list[Entry]) -> None:
        """Marks the operations up to the last of `entries` as sent and deletes the copies of their files."""
        self.sent, self._offset = entries[-1].serial, entries[-1].end
        self.mark()
        for entry in entries:
            if "file" in entry.op:
                shutil.rmtree(self.folder / "files" / Path(entry.op["file"]).parts[0], ignore_errors=True)

    def mark(self) -> None:
        """Writes the marker atomically."""
        marker = {"serial": self.sent, "run_id": self.run_id, "experiment_id": self.experiment_id}
        write_file(self.folder / "sent.json", json.dumps(marker), sync=False, mode=0o600)

    def refuse(self, entry: Entry, what: str, reason: str) -> None:
        """Records that the server refuses an operation, or a part of it, for good. The journal keeps it."""
        self.refused += 1
        what, reason = masked(what), masked(reason)
        line = json.dumps({"serial": entry.serial, "what": what, "reason": reason})
        append_private(self.folder / "refused.jsonl", line + "\n")
        log.warning("%s: the server refused %s: %s", self.run_folder, what, reason)

    def close(self) -> None:
        """Closes the journal and releases its lock. A second call does nothing."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1
            self._lock_file.close()
