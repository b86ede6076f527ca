"""Locks: one process at a time uses a run's or a sweep's folder; any number use a copy, which stays as long.

A lock is the operating system's, on a file that stays: it ends with its process, however that ends, and is never left
over. The processes of several machines keep each other out where they share the folder by a file system with locks
(NFS 4 has them). Where there are none a warning says so, and who starts a run twice must see to it himself.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

LOCK = ".lock"
"""Name of the file in a run's or a sweep's folder that the process holds which started it."""
LOOK_S = 0.2
WITHOUT = {errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP}  # what a file system without locks answers

_mutex = threading.Lock()
_held: dict[str, tuple[int, int]] = {}  # file: its descriptor, and how often this process has taken it
_shared: dict[tuple[int, int], int] = {}  # device and number of a file: its descriptor


class Busy(ValueError):
    """Another process uses the folder; the text names both and the way out."""


@contextlib.contextmanager
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


def share(file: Path) -> bool:
    """Says until this process ends that it uses the folder of `file`. False if the folder is not there.

    Any number of processes may say so of one folder at a time.
    """
    with _descriptor(file) as descriptor:
        if descriptor is None:
            return False
        stat = os.fstat(descriptor)
        if (stat.st_dev, stat.st_ino) not in _shared:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_SH)  # waits for one that finds it unused
            except OSError as error:
                if error.errno not in WITHOUT:
                    raise
            if not _is(descriptor, file):
                return False
            _shared[stat.st_dev, stat.st_ino] = os.dup(descriptor)
    return True


@contextlib.contextmanager
def unused(file: Path) -> Iterator[bool]:
    """Yields whether the folder of `file` is there and no process shares it; while the body runs, none begins to.

    False also where nobody can know: the file system has no locks.
    """
    with _descriptor(file) as descriptor:
        free = descriptor is not None
        if free:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                free = False
        yield free and _is(descriptor, file)


@contextlib.contextmanager
def _descriptor(file: Path) -> Iterator[int | None]:
    """Opens a file, which is made if its folder is there; None if it is not."""
    try:
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o600)
    except FileNotFoundError:
        yield None
        return
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _is(descriptor: int, file: Path) -> bool:
    """True if the open file still has its name: nobody removed its folder since."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(file))
    except FileNotFoundError:
        return False


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
