"""Storage: files on a disk, or in any store that fsspec reaches by a URL, such as s3://bucket/run."""

from __future__ import annotations

import errno
import os
import secrets
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import fsspec
from fsspec.implementations.local import LocalFileSystem
from fsspec.registry import known_implementations

from ..checks import Check, tried
from ..config import UserError, resolve_out_ref, resolve_ref
from ..files import put_in_place, write_file
from ..texts import masked, one_line, reason

Ref = str | Path
"""A path of this machine, or a URL."""
T = TypeVar("T")
SLOW_S = 60.0  # for which a store may not answer
SLOW_BYTES_PER_S = 1 << 20  # of a file that is fetched; one that comes slower counts as not coming
DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
KEYS = {
    "s3": "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE",
    "gs": "GOOGLE_APPLICATION_CREDENTIALS",
    "abfs": "AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY",
}
"""Environment variables by protocol in which a store's library looks for credentials."""


class StoreError(UserError, OSError):
    """A store that cannot be read or written; the text names the URL, the reason and the way out."""


@dataclass(frozen=True)
class Place:
    """A file or folder. A disk can rename it, so it appears at once. An object store holds whole files only."""

    fs: fsspec.AbstractFileSystem
    path: str

    @classmethod
    def of(cls, ref: Ref | Place) -> Place:
        """Returns the place of a path or URL, or a place itself. Raises ValueError where its library is missing."""
        if isinstance(ref, Place):
            return ref
        text, shown = str(ref), masked(str(ref))
        if "://" not in text:
            return cls(LocalFileSystem(), text.rstrip("/") or "/")
        try:
            # other processes write there, too, so listings are not cached
            return cls(*fsspec.url_to_fs(text.rstrip("/"), use_listings_cache=False))
        except ImportError as error:
            protocol = text.partition("://")[0]
            package = known_implementations[protocol]["class"].split(".")[0]
            raise ValueError(f"{shown}: {protocol}:// needs another package: pip install {package} ({error})") from None
        except ValueError as error:
            raise ValueError(f"{shown}: {error}; give a path, or a URL such as s3://bucket/folder") from None

    @property
    def local(self) -> bool:
        """True for a place on a disk of this machine, mounted disks included."""
        return isinstance(self.fs, LocalFileSystem)

    @property
    def ref(self) -> Ref:
        """The path or URL of the place."""
        return Path(self.path) if self.local else self.fs.unstrip_protocol(self.path)

    @property
    def name(self) -> str:
        """The last part of the path."""
        return self.path.rsplit("/", 1)[-1]

    def __str__(self) -> str:
        return masked(str(self.ref))

    def __truediv__(self, name: str) -> Place:
        return Place(self.fs, f"{self.path}/{name}")

    def ask(self, call: Callable[[], T], seconds: float | None = None, passed: tuple[type[Exception], ...] = ()) -> T:
        """Returns what `call` gets from the store. A disk is asked directly.

        seconds: to wait for it; None is SLOW_S. passed: exceptions of the call that are no fault of the store.
        Raises FileNotFoundError that names the place, and StoreError for all else that the store's library raises.
        """
        if self.local:
            return call()
        seconds = SLOW_S if seconds is None else seconds
        try:
            return _with_timeout(call, seconds)
        except passed:
            raise
        except FileNotFoundError:
            raise FileNotFoundError(2, "No such file", str(self)) from None
        except TimeoutError:
            why = f"no answer within {seconds:g} s; look at the network and the store, and start again"
        except Exception as error:  # each store's library has its own
            why = one_line(error)
            if isinstance(error, OSError) and (error.errno in DISK_FULL or error.filename is not None):
                why += "; look at the disk of this machine's copies, or name another folder by FEWSTEP_CACHE=..."
            elif isinstance(error, PermissionError) or "credential" in type(error).__name__.lower():
                protocol = str(self).partition("://")[0]
                names = f" ({KEYS[protocol]})" if protocol in KEYS else ""
                why = f"access refused: {why}; look at the credentials of this machine{names} and at their rights"
            else:
                why += "; look at the URL, the network and the store"
        raise StoreError(f"{self}: {why}") from None

    @property
    def parent(self) -> Place:
        """The folder that contains it."""
        return Place(self.fs, self.path.rpartition("/")[0] or ("." if self.local else ""))

    def beside(self, name: str) -> Place:
        """Returns the place of another name in the same folder."""
        return self.parent / name

    def is_file(self) -> bool:
        """True if the place is an existing file. Raises StoreError."""
        if self.local:
            return os.path.isfile(self.path)
        try:
            return self.ask(lambda: self.fs.info(self.path))["type"] == "file"
        except FileNotFoundError:
            return False

    def files(self) -> dict[str, dict[str, Any]]:
        """Returns the store's facts of every file below this folder by its path there, `size` among them.

        Raises StoreError, also for a bucket that does not exist and for a path that leads out of the folder.
        """
        entries = {}
        listed = self.ask(lambda: _placed(lambda: self.fs.find(self.path, detail=True)))
        for path, info in sorted(listed.items()):
            if path == self.path or info["type"] != "file":  # the file of this name, and marks of empty folders
                continue
            name = path.removeprefix(f"{self.path}/")
            if name == path or "\\" in name or {"", ".", ".."} & set(name.split("/")):
                raise StoreError(f"{self}: holds {path!r}, which is no plain path below it; remove that")
            entries[name] = info
        return entries

    def names(self) -> list[str]:
        """Returns the sorted names in this folder, or [] if the folder does not exist."""
        try:
            paths = self.ask(lambda: self.fs.ls(self.path, detail=False))
        except (FileNotFoundError, NotADirectoryError):
            return []
        return sorted({str(path).rstrip("/").rsplit("/", 1)[-1] for path in paths} - {"", self.name})

    def make(self) -> None:
        """Creates the folder. An object store needs none."""
        if self.local:
            os.makedirs(self.path, exist_ok=True)

    @contextmanager
    def writing(self) -> Iterator[BinaryIO]:
        """Opens a new file for writing. At the end its content is synced to the disk."""
        with open(self.path, "wb") if self.local else self.fs.open(self.path, "wb") as file:
            yield file
            if self.local:
                file.flush()
                os.fsync(file.fileno())

    def write(self, data: bytes) -> None:
        """Writes a small file atomically."""
        if self.local:
            write_file(self.path, data)
            return
        self.ask(lambda: _placed(lambda: self.fs.pipe_file(self.path, data)), _seconds(len(data)))

    def size(self) -> int:
        """Returns the file's size in bytes. Raises FileNotFoundError that names it, also if it is a folder."""
        if self.is_file():
            return self.ask(lambda: self.fs.size(self.path))
        raise FileNotFoundError(2, "No such file", str(self))

    def read(self, limit: int | None = None) -> bytes:
        """Returns the file's content, at most its first `limit` bytes. Raises FileNotFoundError that names it."""
        size = self.size()
        part = {"start": 0, "end": limit} if limit is not None and limit < size else {}
        return self.ask(lambda: self.fs.cat_file(self.path, **part), _seconds(size))

    def fetch(self, path: Ref, size: int) -> None:
        """Copies this file of `size` bytes to a new file of this machine. Raises FileNotFoundError and StoreError."""
        self.ask(lambda: self.fs.get_file(self.path, str(path)), _seconds(size))

    def put(self, path: Ref) -> None:
        """Copies a file of this machine to this place of a store. Raises StoreError."""
        send = lambda: self.fs.put_file(str(path), self.path)
        self.ask(lambda: _placed(send), _seconds(os.path.getsize(path)))

    def copy(self, other: Place, size: int) -> None:
        """Copies this file of `size` bytes to another place of the same store. Raises StoreError."""
        self.ask(lambda: self.fs.cp_file(self.path, other.path), _seconds(size))

    @contextmanager
    def fetched(self) -> Iterator[str]:
        """Yields a local path of this file: its own path, or that of a copy that is removed at the end."""
        if self.local:
            yield self.path
            return
        with tempfile.TemporaryDirectory(prefix="fewstep-") as folder:
            self.fetch(f"{folder}/{self.name}", self.size())
            yield f"{folder}/{self.name}"

    def rename(self, other: Place, discard: Callable[[Place], None] | None = None) -> None:
        """Renames a local file or folder to `other` and removes the old `other`. The rename is synced to the disk.

        discard: removes an old folder of that name. None removes it with all its content.
        """
        remove = Place.remove if discard is None else discard
        put_in_place(self.path, other.path, discard=lambda old: remove(Place(self.fs, str(old))))

    def unlink(self) -> None:
        """Removes a file of a store. Raises StoreError."""
        self.ask(lambda: self.fs.rm_file(self.path))

    def remove(self) -> None:
        """Removes a file or a folder and all below."""
        if self.local and os.path.isdir(self.path) and not os.path.islink(self.path):
            shutil.rmtree(self.path)
        else:
            self.ask(lambda: self.fs.rm(self.path, recursive=not self.local))


def located(ref: Ref | Place) -> Path | Place:
    """Returns the path of what is read on this machine, as `resolve` has it, or the place of a URL in a store."""
    return _sorted_out(ref if isinstance(ref, Place) else resolve_ref(ref))


def located_out(ref: Ref | Place) -> Path | Place:
    """Returns the path of what is written on this machine, as `resolve_out` has it, or the place of a URL."""
    return _sorted_out(ref if isinstance(ref, Place) else resolve_out_ref(ref))


def _sorted_out(ref: Ref | Place) -> Path | Place:
    place = Place.of(ref) if isinstance(ref, str) else ref
    return place.ref if isinstance(place, Place) and place.local else place


def _seconds(size: int) -> float:
    """Time that a file of `size` bytes may take."""
    return SLOW_S + size / SLOW_BYTES_PER_S


def _placed(call: Callable[[], T]) -> T:
    """Returns `call()`, of which a file that is not found means a bucket: in a bucket any name can be written."""
    try:
        return call()
    except FileNotFoundError as error:
        raise OSError(f"no such place ({one_line(error)})") from None


def _with_timeout(call: Callable[[], T], seconds: float) -> T:
    """Returns `call()`, or raises its exception, or TimeoutError. A call that takes longer is left to a thread."""
    done: list[tuple[Any, BaseException | None]] = []

    def work() -> None:
        try:
            done.append((call(), None))
        except BaseException as error:  # noqa: BLE001 - the caller gets it
            done.append((None, error))

    thread = threading.Thread(target=work, name="fewstep-store", daemon=True)
    thread.start()
    thread.join(seconds)
    if not done:
        raise TimeoutError
    value, error = done[0]
    if error is not None:
        raise error
    return value


def probe(ref: Ref | Place) -> None:
    """Makes a folder, and writes, reads and removes a file in it. Raises OSError, or an error of the store's own."""
    place = Place.of(ref)
    file = place / f".probe.{secrets.token_hex(8)}"
    place.make()
    file.write(b"0")
    same = file.read() == b"0"
    file.remove()
    if not same:
        raise OSError("a file that was written reads back otherwise")


def writable(ref: Ref | Place, field: str = "out") -> None:
    """Raises ValueError if a folder is not writable, so that a run fails before its training and not after.

    field: the setting that names the folder.
    """
    try:
        probe(ref)
    except Exception as error:  # an object store's library has its own
        why = f"cannot write in {Place.of(ref)} ({reason(error)})"
        raise ValueError(f"{field}: {why}; choose another with {field}=...") from None


def check(recipe: Any) -> list[Check]:
    """The folders of runs (`out`) and of checkpoints (`storage`) can be written from here."""

    def look(ref: Ref) -> str:
        try:
            probe(ref)
        except Exception as error:
            raise ValueError(f"{masked(str(ref))}: cannot write: {reason(error)}") from None
        return f"{masked(str(ref))}: writable"

    folders = {key: ref for key, ref in (("out", recipe.out), ("storage", recipe.storage)) if ref is not None}
    remedy = "choose another with {}=..., or make it writable for who runs Ray there"
    return [tried(f"storage {key}", partial(look, ref), remedy.format(key)) for key, ref in folders.items()]
