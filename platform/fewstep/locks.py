"""Locks: one process at a time uses a run's or a sweep's folder.

A lock is the operating system's, on a file that stays: it ends with its process, however that ends, and is never left
over. The processes of several machines keep each other out where they share the folder by a file system with locks
(NFS 4 has them). Where there are none a warning says so, and who starts a run twice must see to it himself.
"""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

LOCK = ".lock"
"""Name of the file in a run's or a sweep's folder that the process holds which started it."""
LOOK_S = 0.2
WITHOUT = {errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP}  # what a file system without locks answers

_mutex = threading.Lock()
_held: dict[str, tuple[int, int]] = {}  # file: its descriptor, and how often this process has taken it


class Busy(ValueError):
    """Another process uses the folder; the text names both and the way out."""


@contextmanager
def locked(file: Path, wait_s: float = 0.0, way_out: str = "choose another with name=...") -> Iterator[None]:
    """Keeps other processes out of the folder of `file` while the body runs; the folder must be there.

    A process may take a lock again that it has. wait_s: how long to wait for one that has it, such as one that was
    killed a moment ago. Raises Busy, and ValueError where the file cannot be made.
    """
    hold(file, wait_s, way_out)
    try:
        yield
    finally:
        _release(os.path.realpath(file))


def hold(file: Path, wait_s: float = 0.0, way_out: str = "choose another with name=...") -> None:
    """Takes a lock as `locked` does, until this process ends."""
    deadline, path = time.monotonic() + wait_s, os.path.realpath(file)
    while not _try_lock(path):
        if time.monotonic() > deadline:
            raise Busy(f"{file.parent}: in use by {_holder(path)}; wait for it or end it, or {way_out}")
        time.sleep(LOOK_S)


def _try_lock(path: str) -> bool:
    """True if this process has the lock now."""
    with _mutex:
        if path in _held:
            descriptor, count = _held[path]
            _held[path] = descriptor, count + 1
            return True
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        except OSError as error:
            raise ValueError(f"{path}: cannot be made ({error.strerror}), and nothing be written beside it") from None
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            return False
        except OSError as error:
            if error.errno not in WITHOUT:
                os.close(descriptor)
                raise
            print(f"{path}: this file system has no locks; do not start the same name twice", file=sys.stderr)
        os.ftruncate(descriptor, 0)
        since = time.strftime("%Y-%m-%d %H:%M:%S")
        os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()} since {since}".encode())
        _held[path] = descriptor, 1
        return True


def _release(path: str) -> None:
    with _mutex:
        descriptor, count = _held.pop(path)
        if count > 1:
            _held[path] = descriptor, count - 1
        else:
            os.close(descriptor)


def _holder(path: str) -> str:
    with open(path, "rb") as file:
        return file.read(200).decode(errors="replace") or "another process"
