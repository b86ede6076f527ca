"""Files below a folder: which of them are the user's, and which links are followed."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from fewstep.data.source import Reading, SourceError, printable

# What systems and programs leave in folders of pictures, beside names that begin with a dot.
HIDDEN = frozenset({"__MACOSX", "@eaDir", "$RECYCLE.BIN", "System Volume Information", "lost+found"})


def is_hidden(path: str) -> bool:
    """True where a part of a relative path (with /) is hidden, or is a folder that a system made for itself."""
    return any(part.startswith(".") or part in HIDDEN for part in path.split("/"))


@dataclass(frozen=True)
class Tree:
    """The files below a folder, by their paths relative to it, in order; what was left out, as text.

    outside: links to files outside the folder, which are not followed, and what they lead to.
    """

    root: Path
    files: tuple[str, ...]
    outside: dict[str, str]
    notes: tuple[str, ...]

    def check(self, names: Iterable[str]) -> None:
        """Raises SourceError where one of the names is a link out of the folder."""
        for name in names:
            if name in self.outside:
                raise leaves(self.root, name, self.outside[name])


def leaves(root: Path, name: str, target: str) -> SourceError:
    """The error of a link that leads out of the folder."""
    return SourceError(
        f"path: {printable(name)!r} in {printable(str(root))!r} is a link to {printable(target)!r}, outside that "
        "folder; add follow_links=true to take what such links lead to, or remove it"
    )


def walk(root: Path, reading: Reading) -> Tree:
    """All files below a folder but hidden ones.

    Links are followed: inside the folder always, out of it where reading.follow_links is true. A folder that a link
    leads to is entered once, and never from inside itself.
    Raises SourceError for a link to a folder outside, and for a folder that cannot be listed.
    """
    real_root = os.path.realpath(root)
    files: list[str] = []
    outside: dict[str, str] = {}
    hidden: list[str] = []
    again: list[str] = []
    entered = {real_root}
    todo = [("", real_root)]  # folders, by relative path and by real path
    while todo:
        folder, real = todo.pop()
        for entry in _entries(os.path.join(root, folder)):
            name = f"{folder}/{entry.name}" if folder else entry.name
            if is_hidden(entry.name):
                hidden.append(name)
                continue
            target = os.path.realpath(entry.path) if entry.is_symlink() else os.path.join(real, entry.name)
            if entry.is_symlink() and not reading.follow_links and not _is_below(target, real_root):
                if os.path.isdir(target):
                    raise leaves(root, name, target)
                outside[name] = target
            elif entry.is_dir():
                if entry.is_symlink() and (target in entered or _is_below(real, target)):
                    again.append(name)
                    continue
                if entry.is_symlink():
                    entered.add(target)
                todo.append((name, target))
            elif entry.is_file() or not os.path.exists(target):  # a link to nothing is a file that cannot be read
                files.append(name)
    in_order = sorted(files, key=lambda name: name.split("/"))
    notes = (
        *_counted(hidden, "hidden file or folder", "hidden files and folders"),
        *_counted(again, "link to a folder that is read already", "links to folders that are read already"),
    )
    return Tree(root, tuple(in_order), outside, notes)


def _entries(folder: str) -> Iterator[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            yield from sorted(entries, key=lambda entry: entry.name)
    except OSError as error:
        raise SourceError(f"path: {printable(folder)!r} cannot be listed: {error.strerror}") from None


def _is_below(path: str, folder: str) -> bool:
    return path == folder or path.startswith(folder.rstrip("/") + "/")


def _counted(names: list[str], one: str, many: str) -> list[str]:
    """A note on what was left out."""
    if not names:
        return []
    some = ", ".join(map(printable, sorted(names)[:3])) + ", ..." * (len(names) > 3)
    return [f"left out: {len(names)} {many if len(names) > 1 else one}: {some}"]
