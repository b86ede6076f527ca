"""Names and folders: the platform deletes and overwrites nothing that it did not write.

A folder that appears as a whole (a shard set, an export, a teacher's network) is replaced only where every file in it
is one that such a folder has. A folder that grows (a run, a sweep) carries a mark from its first moment on; one without
a mark is used only while it is empty. A single file (a picture, a page) is overwritten only where its bytes say that it
was made here.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .files import put_in_place, write_file
from .storage.place import Place, writable
from .texts import quoted

NAME_BYTES = 128
MARK = ".fewstep"
MADE_HERE = "made by fewstep"
"""The text that a picture or a page carries, by which it may be overwritten."""
LOOKED_AT = 1 << 16  # bytes at each end of a file in which its mark is looked for


class FolderError(ValueError):
    """A name or a folder that is not used; the text names the field, the value and the way out."""


# Names


def plain_name(name: str, field: str = "name", room: int = 0) -> str:
    """The name itself, of one file or folder in another. Raises FolderError where it is a path, hidden or too long.

    Plain are letters, digits, space and ``_ . + -``, at most 128 bytes of them, without a dot in front. room: bytes
    left free at its end, for what is appended.
    """
    if not re.fullmatch(r"[\w +-][\w .+-]*", name) or len(name.encode(errors="replace")) > NAME_BYTES - room:
        raise FolderError(
            f"{field}: {quoted(name)} is no plain name; use letters, digits, space and _ . + -, at most "
            f"{NAME_BYTES - room} bytes of them, without a dot in front"
        )
    return name


def cleaned_name(text: str, room: int = 0) -> str:
    """A plain name made of any text, such as a file's stem: other characters become _. room: as of `plain_name`."""
    name = re.sub(r"[^\w .+-]", "_", text).lstrip(".") or "_"
    return name.encode()[: NAME_BYTES - room].decode(errors="ignore")


# Folders that appear as a whole


@dataclass(frozen=True)
class Kind:
    """A kind of folder that is written as a whole.

    what: its name in error texts, with its article. proof: whether a folder holds one, read from its own description.
    files: every relative path that it may hold, as a pattern.
    """

    what: str
    proof: Callable[[Path | Place], bool]
    files: re.Pattern[str]


def _json(path: Path | Place) -> Any:
    """Returns the content of a JSON file, or None if it is missing or damaged."""
    try:
        return json.loads(path.read() if isinstance(path, Place) else path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return None


def _is_shards(folder: Path | Place) -> bool:
    manifest = _json(folder / "manifest.json")
    return isinstance(manifest, dict) and {"format", "kind", "rows", "shards"} <= manifest.keys()


def _is_network(folder: Path | Place) -> bool:
    described = _json(folder / "fewstep.json")
    return isinstance(described, dict) and {"model", "schedule", "prediction"} <= described.keys()


def _is_export(folder: Path | Place) -> bool:
    index = _json(folder / "model_index.json")
    return isinstance(index, dict) and "sampling" in index and _is_network(folder)


_WEIGHTS = r"(unet(_[2-4])?|transformer)/(config\.json|diffusion_pytorch_model[\w.-]*\.(safetensors|json))"

SHARDS = Kind("a shard set", _is_shards, re.compile(r"manifest\.json|shard-\d{5,}(-[0-9a-f]{8})?\.parquet"))
_PARTS = r"(scheduler|vae|(text_encoder|tokenizer)(_[23])?|feature_extractor|image_encoder|scorer)/[\w.-]+"
NETWORK = Kind("a network written here", _is_network, re.compile(rf"(fewstep|model_index)\.json|{_WEIGHTS}|{_PARTS}"))


def _is_pipeline(folder: Path | Place) -> bool:
    inference = _json(folder / "inference.json")
    return isinstance(inference, dict) and "calls" in inference and _is_network(folder)


_CODE = r"pipeline\.py|unet(_[2-4])?/edm\.py"
EXPORT = Kind("an export", _is_export, re.compile(rf"(model_index|fewstep)\.json|README\.md|{_CODE}|{_WEIGHTS}"))
PIPELINE = Kind(
    "an export",
    _is_pipeline,
    re.compile(rf"(model_index|fewstep|inference)\.json|README\.md|nasa\.py|lora/\w+\.safetensors|{_PARTS}|{_WEIGHTS}"),
)


def _files(folder: Path | Place) -> Iterator[str]:
    """The relative paths of a folder's files. A link counts as a file."""
    if isinstance(folder, Place):
        yield from folder.files()
        return
    for top, folders, files in os.walk(folder):
        links = [name for name in folders if os.path.islink(os.path.join(top, name))]
        for name in sorted([*files, *links]):
            yield os.path.relpath(os.path.join(top, name), folder)


def _contains(folder: Path | Place, other: Path | Place) -> bool:
    """True if `other` is the folder itself or lies in it."""
    if isinstance(folder, Place) or isinstance(other, Place):
        both = type(folder) is type(other) and folder.fs == other.fs
        return both and f"{other.path}/".startswith(f"{folder.path}/")
    return Path(os.path.realpath(other)).is_relative_to(os.path.realpath(folder))


def replaceable(
    folder: Path | Place,
    kind: Kind,
    *,
    overwrite: bool,
    field: str = "out",
    apart: Iterable[Path | Place | None] = (),
    own: Container[str] = (),
) -> None:
    """Raises FolderError where `folder` may not be made, or replaced by a new one of its kind.

    It may where nothing has its name; with `overwrite` also where it is empty, or where it holds a whole of its kind
    and no other file. apart: files and folders of the job's own input, which it may neither be nor contain. own: files
    of a store that the job itself has written there. Raises StoreError where a store does not answer.
    """
    choose = f"choose another folder with {field}=..."
    for other in filter(None, apart):
        if _contains(folder, other):
            raise FolderError(f"{field}: {str(folder)!r} is or contains {str(other)!r}, which is read; {choose}")
    if isinstance(folder, Place):
        is_file, is_link = folder.is_file(), False
        there = is_file or any(name not in own for name in folder.files())
    else:
        is_file, is_link, there = not folder.is_dir(), folder.is_symlink(), os.path.lexists(folder)
    if not there:
        return
    if is_link or is_file:
        what = "a link; give the folder that it leads to" if is_link else f"a file; {choose}"
        raise FolderError(f"{field}: {str(folder)!r} is {what}")
    if not overwrite:
        raise FolderError(f"{field}: {str(folder)!r} exists; choose another folder, or replace it with overwrite=true")
    if isinstance(folder, Path) and not any(folder.iterdir()):
        return
    if not kind.proof(folder):
        raise FolderError(f"{field}: {str(folder)!r} is not {kind.what}, so it is not replaced; {choose}")
    for name in _files(folder):
        if not kind.files.fullmatch(name):
            raise FolderError(
                f"{field}: {str(folder)!r} also holds {quoted(name)}, which is no part of {kind.what}, so it is not "
                f"replaced; move that away, or {choose}"
            )


def replace(new: Path, folder: Path, kind: Kind, *, overwrite: bool, field: str = "out") -> None:
    """Gives a finished folder its name, and removes what had that name. Raises FolderError as `replaceable` does.

    new: beside `folder`, on the same disk. What lies at the name is looked at again: the work may have taken hours.
    """
    replaceable(folder, kind, overwrite=overwrite, field=field)
    put_in_place(new, folder)


@contextlib.contextmanager
def appearing(folder: Path | Place, kind: Kind, *, overwrite: bool, field: str = "out") -> Iterator[Path]:
    """Yields a new folder of this machine to fill, which then appears whole as `folder`. What was there is replaced.

    A store gets the JSON files at the top, by which a folder is known, after all others; before that it has none of
    them, so that a reader finds a whole folder or none.
    Raises FolderError as `replaceable` does, before the work and after it, and StoreError.
    """
    replaceable(folder, kind, overwrite=overwrite, field=field)
    beside = folder.parent if isinstance(folder, Path) else None
    if beside is not None:
        beside.mkdir(parents=True, exist_ok=True)
    new = Path(tempfile.mkdtemp(prefix=f".{folder.name[:NAME_BYTES]}.", dir=beside))
    try:
        yield new
        if isinstance(folder, Path):
            new.chmod(0o755)
            replace(new, folder, kind, overwrite=overwrite, field=field)
        else:
            replaceable(folder, kind, overwrite=overwrite, field=field)
            _send(new, folder)
    finally:
        shutil.rmtree(new, ignore_errors=True)


def _send(new: Path, folder: Place) -> None:
    last = lambda name: "/" not in name and name.endswith(".json")
    former, files = list(_files(folder)), sorted(_files(new), key=last)
    for name in filter(last, former):
        (folder / name).unlink()
    for name in files:
        (folder / name).put(new / name)
    for name in former:
        if name not in files and not last(name):
            (folder / name).unlink()


# Folders that grow


def _legacy(folder: Path) -> str | None:
    """Returns the kind of a folder without a mark, from a version that wrote none, or None for a foreign folder."""
    for what, name, key, value in (
        ("sweep", "trials.jsonl", "event", "sweep"),
        ("run", "tracking/journal.jsonl", "op", "open"),
    ):
        with contextlib.suppress(OSError, ValueError, AttributeError, RecursionError):
            with open(folder / name, "rb") as file:
                if json.loads(file.readline()).get(key) == value:
                    return what
    return None


def kind_of(folder: Path) -> str | None:
    """Returns the kind of a growing folder by its mark: "run" or "sweep", or None for a foreign folder."""
    mark = _json(folder / MARK)
    return mark.get("kind") if isinstance(mark, dict) else _legacy(folder)


def usable(folder: Path, what: str, field: str = "name") -> None:
    """Raises FolderError unless `folder` is missing, empty, or already a `what` ("run" or "sweep") made here."""
    if not os.path.lexists(folder):
        return
    choose = f"choose another with {field}=..."
    if not folder.is_dir():
        raise FolderError(f"{field}: {str(folder)!r} is a file; {choose}")
    kind = kind_of(folder)
    # a process that is killed while it writes the mark leaves a part of it
    if kind == what or (kind is None and all(path.name.startswith(f".{MARK}.") for path in folder.iterdir())):
        return
    holds = f"holds a {kind}, and no {what}" if kind else f"holds files, but no {what} of ours"
    raise FolderError(f"{field}: {str(folder)!r} {holds}, so nothing is written there; {choose}")


def claim(folder: Path, what: str, field: str = "name") -> None:
    """Makes a folder, and marks it as a `what` ("run" or "sweep"), so that it is gone on with later.

    Raises FolderError as `usable` does. Two processes may claim one folder at once; the mark is the same.
    """
    usable(folder, what, field)
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / MARK).exists():
        write_private(folder / MARK, json.dumps({"format": 1, "kind": what}) + "\n")


# Files


def overwritable(path: Path | Place, field: str = "out", mark: str = MADE_HERE) -> None:
    """Raises FolderError where a file is in the way that was not made here, and StoreError.

    mark: a text that such a file of ours has near its beginning or its end.
    """
    if isinstance(path, Place):
        if not path.is_file():
            return
        seen = path.read()
    elif not os.path.lexists(path):
        return
    elif not path.is_file():
        raise FolderError(f"{field}: {str(path)!r} is no file; choose another with {field}=...")
    else:
        with open(path, "rb") as file:
            seen = file.read(LOOKED_AT)
            file.seek(max(os.fstat(file.fileno()).st_size - LOOKED_AT, 0))
            seen += file.read()
    if mark.encode() not in seen:
        raise FolderError(
            f"{field}: {str(path)!r} was not written by this job, so it is not overwritten; choose another with "
            f"{field}=..., or remove it"
        )


@contextlib.contextmanager
def files_in(folder: Path | Place, marks: Mapping[str, str], field: str = "out") -> Iterator[Path]:
    """Yields the folder of this machine in which to write files that belong in `folder`; a store then gets them.

    marks: the files' names, and the text by which each is known as one of ours, see `overwritable`.
    Raises FolderError where another file has such a name, ValueError where nothing can be written, and StoreError.
    """
    for name, mark in marks.items():
        overwritable(folder / name, field, mark)
    if isinstance(folder, Path):
        yield folder
        return
    writable(folder, field)
    with tempfile.TemporaryDirectory(prefix="fewstep-") as new:
        yield Path(new)
        for name in marks:
            (folder / name).put(Path(new) / name)


def write_private(path: Path, text: str) -> None:
    """A small text file, whole or not at all, that its owner alone may read (mode 0600)."""
    write_file(path, text, mode=0o600)


def append_private(path: Path, text: str, sync: bool = False) -> None:
    """Adds to a text file that its owner alone may read, and makes it where there is none. sync: wait for the disk."""
    with open(path, "a", encoding="utf-8", opener=lambda name, flags: os.open(name, flags, 0o600)) as file:
        file.write(text)
        if sync:
            file.flush()
            os.fsync(file.fileno())
