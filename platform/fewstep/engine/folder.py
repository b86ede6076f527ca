"""A folder of checkpoints `step-00001234`: which are complete, which is the newest, and how one is removed.

What is visible is complete: on a disk a checkpoint is written under a hidden name and renamed when whole; in an object
store, which cannot rename, its manifest comes last, and a folder without one is none.
"""

from __future__ import annotations

import re

from ..files import REPLACED
from .storage import Place, Ref

MANIFEST = "manifest.json"
NAME = re.compile(r"step-(\d{8,})")
HIDDEN = r"(\.[0-9a-f]{8})?"  # of a file while it is written
OWN = re.compile(rf"\.?step-\d{{8,}}(\.removed|{re.escape(REPLACED)})?|\.?scores\.json{HIDDEN}|\.probe\.\w+")
INSIDE = re.compile(rf"\.?rank-\d{{5,}}\.safetensors{HIDDEN}|\.?manifest\.json{HIDDEN}")


def step_of(path: Ref) -> int:
    """The step that a checkpoint's name says."""
    return int(NAME.fullmatch(Place.of(path).name)[1])


def complete(path: Ref) -> bool:
    """Whether a folder is a complete checkpoint."""
    place = Place.of(path)
    return NAME.fullmatch(place.name) is not None and (place / MANIFEST).is_file()


def checkpoints(folder: Ref) -> list[Ref]:
    """The complete checkpoints in a folder, oldest first: paths on a disk, URLs elsewhere."""
    place = Place.of(folder)
    steps = sorted((int(found[1]), name) for name in place.names() if (found := NAME.fullmatch(name)))
    return [(place / name).ref for _, name in steps if (place / name / MANIFEST).is_file()]


def newest(folder: Ref) -> Ref | None:
    """The newest complete checkpoint in a folder, or None."""
    found = checkpoints(folder)
    return found[-1] if found else None


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
    """Removes a checkpoint; one of which a part is left never looks complete."""
    if checkpoint.local:
        hidden = checkpoint.beside(f".{checkpoint.name}.removed")
        checkpoint.rename(hidden)
        hidden.remove()
    else:
        if (checkpoint / MANIFEST).is_file():
            (checkpoint / MANIFEST).remove()
        checkpoint.remove()


def clear(folder: Place) -> None:
    """Removes what a write that was killed or failed has left in a folder."""
    names = folder.names()
    for name in names:
        if name.endswith(REPLACED) and name[1 : -len(REPLACED)] not in names:
            (folder / name).rename(folder / name[1 : -len(REPLACED)])  # its successor did not arrive
        elif name.startswith(".step-"):
            (folder / name).remove()
        elif NAME.fullmatch(name) and not (folder / name / MANIFEST).is_file():
            (folder / name).remove()
