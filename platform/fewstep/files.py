"""Files of this machine: written whole or not at all, given their name when finished, known by their hash."""

from __future__ import annotations

import contextlib
import hashlib
import os
import secrets
import shutil
from collections.abc import Callable
from pathlib import Path

REPLACED = ".replaced"  # ending of what had a name, while a new folder takes it


def sha256_of(path: str | Path) -> str:
    """SHA-256 of a file's bytes, hexadecimal. Raises FileNotFoundError."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_file(path: str | Path, content: str | bytes, sync: bool = True, mode: int = 0o666) -> None:
    """Writes a file whole or not at all; text is UTF-8. Several processes may write one path; the last one stays.

    sync: wait until the file is on the disk, so that it survives a power cut. mode: permissions, less the umask.
    """
    path = Path(path)
    new = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        with open(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            if sync:
                file.flush()
                os.fsync(file.fileno())
        put_in_place(new, path, sync)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(new)
        raise


def put_in_place(
    new: str | Path, target: str | Path, sync: bool = True, discard: Callable[[Path], None] = shutil.rmtree
) -> None:
    """Gives a finished file or folder its name, and removes what had that name.

    A folder that is replaced has the hidden name `.<name>.replaced` until the new one is in its place; `discard` then
    removes it. sync: wait until the name is on the disk, so that it survives a power cut.
    """
    new, target = Path(new), Path(target)
    old = target.with_name(f".{target.name}{REPLACED}")
    replaces = target.is_dir() and not target.is_symlink()
    if replaces:
        if old.exists():  # of a process that was killed below
            discard(old)
        os.replace(target, old)
    try:
        os.replace(new, target)
    except OSError:
        if replaces:
            os.replace(old, target)
        raise
    if sync:
        folder = os.open(target.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    if replaces:
        discard(old)
