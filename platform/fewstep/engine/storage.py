"""Storage: files on a disk, or in whatever fsspec reaches by URL, such as s3://bucket/run."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import fsspec
from fsspec.implementations.local import LocalFileSystem
from fsspec.registry import known_implementations

from ..files import put_in_place, write_file
from ..texts import masked, reason

Ref = str | Path
"""Where something lies: a path of this machine, or a URL."""


@dataclass(frozen=True)
class Place:
    """A file or folder. On a disk it can be renamed and so appear at once; an object store only has whole files."""

    fs: fsspec.AbstractFileSystem
    path: str

    @classmethod
    def of(cls, ref: Ref) -> Place:
        """The place that a path or URL names. Raises ValueError where no library for its protocol is installed."""
        text, shown = str(ref), masked(str(ref))
        if "://" not in text:
            return cls(LocalFileSystem(), text.rstrip("/") or "/")
        try:
            # other processes write there too, so a listing is asked for each time
            return cls(*fsspec.url_to_fs(text.rstrip("/"), use_listings_cache=False))
        except ImportError as error:
            protocol = text.partition("://")[0]
            package = known_implementations[protocol]["class"].split(".")[0]
            raise ValueError(f"{shown}: {protocol}:// needs another package: pip install {package} ({error})") from None
        except ValueError as error:
            raise ValueError(f"{shown}: {error}; give a path, or a URL such as s3://bucket/folder") from None

    @property
    def local(self) -> bool:
        """Whether it lies on a disk of this machine, mounted ones included."""
        return isinstance(self.fs, LocalFileSystem)

    @property
    def ref(self) -> Ref:
        """The path, or the URL, that names it."""
        return Path(self.path) if self.local else self.fs.unstrip_protocol(self.path)

    @property
    def name(self) -> str:
        """The last part of its path."""
        return self.path.rsplit("/", 1)[-1]

    def __str__(self) -> str:
        return masked(str(self.ref))

    def __truediv__(self, name: str) -> Place:
        return Place(self.fs, f"{self.path}/{name}")

    @property
    def parent(self) -> Place:
        """The folder it lies in."""
        return Place(self.fs, self.path.rpartition("/")[0] or ("." if self.local else ""))

    def beside(self, name: str) -> Place:
        """Another name in the same folder."""
        return self.parent / name

    def is_file(self) -> bool:
        """Whether it is a file that is there."""
        return self.fs.isfile(self.path)

    def names(self) -> list[str]:
        """What lies in this folder, sorted; nothing where it does not exist."""
        try:
            found = self.fs.ls(self.path, detail=False)
        except (FileNotFoundError, NotADirectoryError):
            return []
        return sorted({str(path).rstrip("/").rsplit("/", 1)[-1] for path in found} - {"", self.name})

    def make(self) -> None:
        """Creates the folder; in an object store there is nothing to create."""
        if self.local:
            os.makedirs(self.path, exist_ok=True)

    @contextmanager
    def writing(self) -> Iterator[BinaryIO]:
        """A new file to write into; at the end it is on the disk and not only in memory."""
        with open(self.path, "wb") if self.local else self.fs.open(self.path, "wb") as file:
            yield file
            if self.local:
                file.flush()
                os.fsync(file.fileno())

    def write(self, data: bytes) -> None:
        """A small file, whole or not at all."""
        if self.local:
            write_file(self.path, data)
            return
        with self.writing() as file:
            file.write(data)

    def size(self) -> int:
        """A file's size in bytes. Raises FileNotFoundError naming it, also for what is no file."""
        try:
            if self.is_file():
                return self.fs.size(self.path)
        except FileNotFoundError:  # removed in between
            pass
        raise FileNotFoundError(2, "No such file", str(self))

    def read(self, limit: int | None = None) -> bytes:
        """A file's content, at most its first `limit` bytes. Raises FileNotFoundError naming it."""
        size = self.size()
        try:
            cut = limit is not None and limit < size
            return self.fs.cat_file(self.path, 0, limit) if cut else self.fs.cat_file(self.path)
        except FileNotFoundError:
            raise FileNotFoundError(2, "No such file", str(self)) from None

    @contextmanager
    def fetched(self) -> Iterator[str]:
        """A path of this machine with this file's content: itself, or a copy that is removed afterwards."""
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
        """Gives a local file or folder the name `other`, and removes what had it; the name survives a power cut.

        discard: how a folder that had the name is removed; None removes all of it.
        """
        remove = Place.remove if discard is None else discard
        put_in_place(self.path, other.path, discard=lambda old: remove(Place(self.fs, str(old))))

    def remove(self) -> None:
        """Removes a file or a folder and all below."""
        if self.local and os.path.isdir(self.path) and not os.path.islink(self.path):
            shutil.rmtree(self.path)
        else:
            self.fs.rm(self.path, recursive=not self.local)


def writable(ref: Ref, field: str = "out") -> None:
    """Raises ValueError when nothing can be written below a folder: better before hours of training than after.

    field: the setting that names the folder.
    """
    place = Place.of(ref)
    probe = place / f".probe.{os.getpid()}"
    try:
        place.make()
        with probe.writing() as file:
            file.write(b"0")
        probe.remove()
    except Exception as error:  # an object store's library has its own
        why = f"cannot write in {place} ({reason(error)})"
        raise ValueError(f"{field}: {why}; choose another with {field}=...") from None
