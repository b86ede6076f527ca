"""A folder of checkpoints `step-00001234`: which are complete, which is the newest, and how one is removed.

What is visible is complete: on a disk a checkpoint is written under a hidden name and renamed when whole; in an object
store, which cannot rename, its manifest comes last, and a folder without one is none.
"""

from __future__ import annotations

import os
import re

from ..files import REPLACED
from ..storage.place import Place, Ref

MANIFEST = "manifest.json"
NAME = re.compile(r"step-(\d{8,})")
RANK_FILE = re.compile(r"rank-\d{5,}\.safetensors")
HIDDEN = r"(\.[0-9a-f]{8})?"  # of a file while it is written
OWN = re.compile(rf"\.?step-\d{{8,}}(\.removed|{re.escape(REPLACED)})?|\.?scores\.json{HIDDEN}|\.probe\.\w+")
INSIDE = re.compile(rf"\.?{RANK_FILE.pattern}{HIDDEN}|\.?manifest\.json{HIDDEN}")
UNFINISHED = re.compile(rf"\.{NAME.pattern}(\..*)?")  # a checkpoint that is being written, replaced or removed


def step_of(path: Ref) -> int:
    """The step that a checkpoint's name says."""
    return int(NAME.fullmatch(Place.of(path).name)[1])


def complete(path: Ref) -> bool:
    """True if a folder is a complete checkpoint."""
    place = Place.of(path)
    return NAME.fullmatch(place.name) is not None and (place / MANIFEST).is_file()


def checkpoints(folder: Ref) -> list[Ref]:
    """The complete checkpoints in a folder, oldest first: paths on a disk, URLs elsewhere."""
    place = Place.of(folder)
    steps = sorted((int(match[1]), name) for name in place.names() if (match := NAME.fullmatch(name)))
    return [(place / name).ref for _, name in steps if (place / name / MANIFEST).is_file()]


def newest(folder: Ref) -> Ref | None:
    """The newest complete checkpoint in a folder, or None."""
    paths = checkpoints(folder)
    return paths[-1] if paths else None


def foreign(folder: Ref) -> str | None:
    """The name of something in a run's folder of checkpoints that no version here wrote; None where there is none."""
    place = Place.of(folder)
    for name in place.names():
        if not OWN.fullmatch(name):
            return name
        for inner in (place / name).names() if "step-" in name and place.local else ():
            if not INSIDE.fullmatch(inner):
                return f"{name}/{inner}"
    return None


def remove(checkpoint: Place) -> None:
    """Removes a checkpoint; one of which a part is left never looks complete. Files of others stay where they are."""
    if checkpoint.local and set(checkpoint.names()) == set(_own_entries(checkpoint)):
        hidden = checkpoint.beside(f".{checkpoint.name}.removed")
        checkpoint.rename(hidden)
        discard(hidden)
    else:
        discard(checkpoint)


def discard(folder: Place) -> None:
    """Removes the files that a checkpoint consists of, the manifest first, and the folder where nothing else is in it.

    A folder with files of others stays, as the platform deletes nothing that it did not write.
    """
    for name in sorted(_own_entries(folder), key=lambda name: name != MANIFEST):
        (folder / name).remove()
    if folder.local and not folder.names():
        os.rmdir(folder.path)


def _own_entries(folder: Place) -> list[str]:
    return [name for name in folder.names() if INSIDE.fullmatch(name) and (folder / name).is_file()]


def clear(folder: Place) -> None:
    """Removes what a write that was killed or failed has left in a folder."""
    names = folder.names()
    for name in names:
        if name.endswith(REPLACED) and NAME.fullmatch(former := name[1 : -len(REPLACED)]) and former not in names:
            (folder / name).rename(folder / former)  # its successor did not arrive
        elif UNFINISHED.fullmatch(name) or (NAME.fullmatch(name) and not (folder / name / MANIFEST).is_file()):
            discard(folder / name)
