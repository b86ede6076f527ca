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
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .files import put_in_place, write_file
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
    proof: Callable[[Path], bool]
    files: re.Pattern[str]


def _json(path: Path) -> Any:
    """Returns the content of a JSON file, or None if it is missing or damaged."""
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return None


def _is_shards(folder: Path) -> bool:
    manifest = _json(folder / "manifest.json")
    return isinstance(manifest, dict) and {"format", "kind", "rows", "shards"} <= manifest.keys()


def _is_network(folder: Path) -> bool:
    described = _json(folder / "fewstep.json")
    return isinstance(described, dict) and {"model", "schedule", "prediction"} <= described.keys()


def _is_export(folder: Path) -> bool:
    index = _json(folder / "model_index.json")
    return isinstance(index, dict) and "sampling" in index and _is_network(folder)


_WEIGHTS = r"(unet(_[2-4])?|transformer)/(config\.json|diffusion_pytorch_model[\w.-]*\.(safetensors|json))"

SHARDS = Kind("a shard set", _is_shards, re.compile(r"manifest\.json|shard-\d{5,}\.parquet"))
_PARTS = r"(scheduler|vae|(text_encoder|tokenizer)(_[23])?|feature_extractor|image_encoder|scorer)/[\w.-]+"
NETWORK = Kind("a network written here", _is_network, re.compile(rf"(fewstep|model_index)\.json|{_WEIGHTS}|{_PARTS}"))


def _is_pipeline(folder: Path) -> bool:
    inference = _json(folder / "inference.json")
    return isinstance(inference, dict) and "calls" in inference and _is_network(folder)


EXPORT = Kind("an export", _is_export, re.compile(rf"(model_index|fewstep)\.json|README\.md|pipeline\.py|{_WEIGHTS}"))
PIPELINE = Kind(
    "an export",
    _is_pipeline,
    re.compile(rf"(model_index|fewstep|inference)\.json|README\.md|nasa\.py|lora/\w+\.safetensors|{_PARTS}|{_WEIGHTS}"),
)


def _foreign(folder: Path, kind: Kind) -> str | None:
    """A file in a folder that no folder of this kind has; None where there is none. A link counts as a file."""
    for top, folders, files in os.walk(folder):
        links = [name for name in folders if os.path.islink(os.path.join(top, name))]
        for name in sorted([*files, *links]):
            path = os.path.relpath(os.path.join(top, name), folder)
            if not kind.files.fullmatch(path):
                return path
    return None


def replaceable(
    folder: Path, kind: Kind, *, overwrite: bool, field: str = "out", apart: Iterable[Path | None] = ()
) -> None:
    """Raises FolderError where `folder` may not be made, or replaced by a new one of its kind.

    It may where nothing has its name; with `overwrite` also where it is empty, or where it holds a whole of its kind
    and no other file. apart: files and folders of the job's own input, which it may neither be nor contain.
    """
    choose = f"choose another folder with {field}=..."
    for other in filter(None, apart):
        if Path(os.path.realpath(other)).is_relative_to(os.path.realpath(folder)):
            raise FolderError(f"{field}: {str(folder)!r} is or contains {str(other)!r}, which is read; {choose}")
    if not os.path.lexists(folder):
        return
    if folder.is_symlink() or not folder.is_dir():
        what = "a link; give the folder that it leads to" if folder.is_symlink() else f"a file; {choose}"
        raise FolderError(f"{field}: {str(folder)!r} is {what}")
    if not overwrite:
        raise FolderError(f"{field}: {str(folder)!r} exists; choose another folder, or replace it with overwrite=true")
    if not any(folder.iterdir()):
        return
    if not kind.proof(folder):
        raise FolderError(f"{field}: {str(folder)!r} is not {kind.what}, so it is not replaced; {choose}")
    if (name := _foreign(folder, kind)) is not None:
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
    found = kind_of(folder)
    # a process that is killed while it writes the mark leaves a part of it
    if found == what or (found is None and all(path.name.startswith(f".{MARK}.") for path in folder.iterdir())):
        return
    holds = f"holds a {found}, and no {what}" if found else f"holds files, but no {what} of ours"
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


def overwritable(path: Path, field: str = "out", mark: str = MADE_HERE) -> None:
    """Raises FolderError where a file is in the way that was not made here.

    mark: a text that such a file of ours has near its beginning or its end.
    """
    if not os.path.lexists(path):
        return
    if not path.is_file():
        raise FolderError(f"{field}: {str(path)!r} is no file; choose another with {field}=...")
    with open(path, "rb") as file:
        seen = file.read(LOOKED_AT)
        file.seek(max(os.fstat(file.fileno()).st_size - LOOKED_AT, 0))
        seen += file.read()
    if mark.encode() not in seen:
        raise FolderError(
            f"{field}: {str(path)!r} was not written by this job, so it is not overwritten; choose another with "
            f"{field}=..., or remove it"
        )


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
