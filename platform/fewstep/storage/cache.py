"""Local copies of what lies in an object store: the shards of data, and whole folders, such as a teacher's.

They are in FEWSTEP_CACHE, by default ~/.cache/fewstep (or in XDG_CACHE_HOME), which all processes of a node share. A
copy has its name only when it is whole and checked, so a process that dies leaves none that another one would read.
Shards and folders have a limit each. Before a new copy is fetched, those that were not used for the longest time make
room for it; a folder's copy that a process uses stays, so these may take more than their limit.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import math
import os
import re
import secrets
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..config import ConfigError
from ..files import put_in_place
from ..locks import locked, share, unused
from ..texts import masked, reason
from .place import Place, Ref, StoreError, located

CACHE_BYTES = 20 << 30  # limit of shards, and that of folders, where no setting says otherwise
COPY = re.compile(r"\.?[0-9a-f]{64}(\.\w+)?")  # name of a copy, and of one that is not whole
IN_USE = ".in-use"  # file beside a folder in its copy, which processes that read the folder share
VERSIONS = ("size", "ETag", "etag", "md5Hash", "LastModified", "last_modified", "updated", "mtime")


def cache_folder() -> Path:
    """The folder of this node's copies."""
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(os.environ.get("FEWSTEP_CACHE") or f"{base}/fewstep").expanduser().absolute()


def folder_bytes() -> int:
    """Bytes that all copies of folders may take: FEWSTEP_CACHE_MIB. Raises ConfigError for what is no number."""
    text = os.environ.get("FEWSTEP_CACHE_MIB") or str(CACHE_BYTES >> 20)
    if not re.fullmatch("[0-9]+", text):
        raise ConfigError(f"FEWSTEP_CACHE_MIB: {text!r} is no number of MiB; give one, such as {CACHE_BYTES >> 20}")
    return int(text) << 20


def copy_of(place: Place, key: str, size: int, limit: int, check: Callable[[Path], None]) -> Path:
    """Returns the path of a copy of a store's file. It is fetched where the cache has none, by one process at a time.

    key: hash of the content, under which the copy is kept. size: of the file, in bytes. limit: bytes that all copies
    may take; those that were not used for the longest time are removed. check: called with the path of a new copy
    before others can see it; what it raises is raised here, and the copy is gone.
    Raises FileNotFoundError and StoreError.
    """
    folder = _make_folder("shards", place)
    path = folder / key
    if _touch(path, size):
        return path
    with locked(folder / f".{key[:2]}.lock", wait_s=math.inf):
        if _touch(path, size):  # another process has fetched it
            return path
        _make_room(folder, limit - size)
        new = folder / f".{key}.{secrets.token_hex(4)}"
        try:
            _fetch(place, new, size)
            check(new)
            put_in_place(new, path)
        finally:
            new.unlink(missing_ok=True)
    return path


def local(ref: Ref) -> Path:
    """Returns the path of a file or folder to read: its own, as `resolve` has it, or that of its copy from a store.

    A URL is listed each time, and fetched when the listing is another one than that of the copies at hand. The copy
    stays until this process ends.
    Raises ConfigError as `resolve`, and StoreError, also where nothing lies at the URL.
    """
    place = located(ref)
    if isinstance(place, Path):
        return place
    limit, files = folder_bytes(), listing(place)
    key = _key(place, files)
    folder = _make_folder("folders", place)
    path = folder / key / (masked(place.name).partition("?")[0].lstrip(".") or "file")
    if _use_copy(path):
        return path
    with locked(folder / f".{key[:2]}.lock", wait_s=math.inf):
        if _use_copy(path):
            return path
        _make_room(folder, limit - sum(info["size"] for info in files.values()))
        new = folder / f".{key}.{secrets.token_hex(4)}"
        try:
            while not share(new / IN_USE):
                new.mkdir(exist_ok=True)
            for name, info in files.items():
                target = new / path.name / name
                target.parent.mkdir(parents=True, exist_ok=True)
                _fetch(place / name if name else place, target, info["size"])
            if _key(place, listing(place)) != key:
                raise StoreError(f"{place}: changed while it was copied; start again when it is complete")
            put_in_place(new, folder / key)
        finally:
            shutil.rmtree(new, ignore_errors=True)
    return path


def listing(place: Place) -> dict[str, dict[str, Any]]:
    """Returns the store's facts of a folder's files by their path there, or of a single file by the path "".

    Raises StoreError where there is neither.
    """
    if place.is_file():
        return {"": place.ask(lambda: place.fs.info(place.path))}
    if not (files := place.files()):
        raise StoreError(f"{place}: nothing is there; give the URL of a file or of a folder")
    return files


def _key(place: Place, files: dict[str, dict[str, Any]]) -> str:
    """A hash of the files' names and sizes, and of the store's own marks of their versions."""
    marks = {name: [f"{key}={info[key]}" for key in VERSIONS if key in info] for name, info in files.items()}
    return hashlib.sha256(json.dumps([str(place), marks]).encode()).hexdigest()


def _make_folder(name: str, place: Place) -> Path:
    folder = cache_folder() / name
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        why = f"no copy can be kept in {folder} ({reason(error)})"
        raise StoreError(f"{place}: {why}; name another folder by FEWSTEP_CACHE=...") from None
    return folder


def _fetch(place: Place, path: Path, size: int) -> None:
    """Copies a file of the store and compares its size."""
    place.fetch(path, size)
    if (copied := path.stat().st_size) != size:
        raise StoreError(f"{place}: {copied} bytes came, and the store's listing says {size}; start again")


def _touch(path: Path, size: int) -> bool:
    """True if a copy is there; it counts as used now."""
    try:
        if path.stat().st_size != size:
            return False
        os.utime(path)
    except FileNotFoundError:
        return False
    return True


def _use_copy(path: Path) -> bool:
    """True if the copy of a folder is there; it counts as used now, and as in use until this process ends."""
    try:
        there = share(path.parent / IN_USE) and path.exists()
        if there:
            os.utime(path.parent)
    except OSError as error:
        if error.errno != errno.EROFS:
            raise
        there = path.exists()  # where nothing can be written nobody removes it
    return there


def _make_room(folder: Path, limit: int) -> None:
    """Removes copies, those first that were not used for the longest time, until the others take at most `limit`.

    What has another name than a copy was not written here, and stays.
    """
    copies = []
    for path in folder.iterdir():
        if COPY.fullmatch(path.name):
            with contextlib.suppress(FileNotFoundError):  # removed by another process
                size = sum(file.stat().st_size for file in (path, *path.rglob("*")) if file.is_file())
                copies.append((path.stat().st_mtime, size, path))
    total = sum(size for _, size, _ in copies)
    for _, size, path in sorted(copies):
        if total <= limit:
            return
        if _remove(path):
            total -= size


def _remove(copy: Path) -> bool:
    """Removes a copy: a file, which who has opened it can read to its end, or a folder that no process uses.

    Returns True if it is gone.
    """
    if not copy.is_dir():
        copy.unlink(missing_ok=True)
        return True
    gone = copy.with_name(f".{copy.name.lstrip('.')[:64]}.{secrets.token_hex(4)}")
    with unused(copy / IN_USE) as free:
        if free:
            copy.rename(gone)  # nobody finds a part of it
    if free:
        shutil.rmtree(gone, ignore_errors=True)
    return free
