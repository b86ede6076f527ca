"""Storage: files on a disk, or in any store that fsspec reaches by a URL, such as s3://bucket/run."""

from __future__ import annotations

import os
import secrets
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import fsspec
from fsspec.implementations.local import LocalFileSystem
from fsspec.registry import known_implementations

from ..checks import Check, tried
from ..files import put_in_place, write_file
from ..texts import masked, reason

Ref = str | Path
"""A path of this machine, or a URL."""


@dataclass(frozen=True)
class Place:
    """A file or folder. A disk can rename it, so it appears at once. An object store holds whole files only."""

    fs: fsspec.AbstractFileSystem
    path: str

    @classmethod
    def of(cls, ref: Ref) -> Place:
        """Returns the place of a path or URL. Raises ValueError if no library for its protocol is installed."""
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

    @property
    def parent(self) -> Place:
        """The folder that contains it."""
        return Place(self.fs, self.path.rpartition("/")[0] or ("." if self.local else ""))

    def beside(self, name: str) -> Place:
        """Returns the place of another name in the same folder."""
        return self.parent / name

    def is_file(self) -> bool:
        """True if the place is an existing file."""
        return self.fs.isfile(self.path)

    def names(self) -> list[str]:
        """Returns the sorted names in this folder, or [] if the folder does not exist."""
        try:
            paths = self.fs.ls(self.path, detail=False)
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
        with self.writing() as file:
            file.write(data)

    def size(self) -> int:
        """Returns the file's size in bytes. Raises FileNotFoundError that names it, also if it is a folder."""
        try:
            if self.is_file():
                return self.fs.size(self.path)
        except FileNotFoundError:  # removed in between
            pass
        raise FileNotFoundError(2, "No such file", str(self))

    def read(self, limit: int | None = None) -> bytes:
        """Returns the file's content, at most its first `limit` bytes. Raises FileNotFoundError that names it."""
        size = self.size()
        try:
            cut = limit is not None and limit < size
            return self.fs.cat_file(self.path, 0, limit) if cut else self.fs.cat_file(self.path)
        except FileNotFoundError:
            raise FileNotFoundError(2, "No such file", str(self)) from None

    @contextmanager
    def fetched(self) -> Iterator[str]:
        """Yields a local path of this file: its own path, or that of a copy that is removed at the end."""
        if self.local:
            yield self.path
            return
        with tempfile.TemporaryDirectory(prefix="fewstep-") as folder:
            try:
                self.fs.get_file(self.path, f"{folder}/{self.name}")
            except FileNotFoundError:
                raise FileNotFoundError(2, "No such file", str(self)) from None
            yield f"{folder}/{self.name}"

    def rename(self, other: Place, discard: Callable[[Place], None] | None = None) -> None:
        """Renames a local file or folder to `other` and removes the old `other`. The rename is synced to the disk.

        discard: removes an old folder of that name. None removes it with all its content.
        """
        remove = Place.remove if discard is None else discard
        put_in_place(self.path, other.path, discard=lambda old: remove(Place(self.fs, str(old))))

    def remove(self) -> None:
        """Removes a file or a folder and all below."""
        if self.local and os.path.isdir(self.path) and not os.path.islink(self.path):
            shutil.rmtree(self.path)
        else:
            self.fs.rm(self.path, recursive=not self.local)


def probe(ref: Ref) -> None:
    """Makes a folder, and writes, reads and removes a file in it. Raises OSError, or an error of the store's own."""
    place = Place.of(ref)
    file = place / f".probe.{secrets.token_hex(8)}"
    place.make()
    file.write(b"0")
    same = file.read() == b"0"
    file.remove()
    if not same:
        raise OSError("a file that was written reads back otherwise")


def writable(ref: Ref, field: str = "out") -> None:
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
