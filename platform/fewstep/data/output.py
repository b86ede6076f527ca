"""The place where a shard set is written: a folder of this machine, or an object store. It appears there whole."""

from __future__ import annotations

import contextlib
import secrets
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

from fewstep.data.manifest import MANIFEST, Manifest, Shard, ShardError, read_manifest
from fewstep.folders import NAME_BYTES, SHARDS, replace, replaceable
from fewstep.storage.place import Place

MARK_CHARS = 8  # of a shard's hash in its name in a store


class Disk:
    """A set in a folder, which is written beside `out` in `temp` and gets its name when it is whole.

    overwrite, apart: see folders.replaceable. Raises FolderError.
    """

    def __init__(self, out: Path, overwrite: bool, apart: Sequence[Path | Place | None] = ()):
        replaceable(out, SHARDS, overwrite=overwrite, apart=apart)
        self.out, self.overwrite = out, overwrite
        self.temp = out.with_name(f".{out.name[:NAME_BYTES]}.{secrets.token_hex(4)}.part")
        self.temp.mkdir(parents=True)

    def add(self, shard: Shard) -> Shard:
        """Takes the finished file of a shard in `temp`. Returns the shard with the name that it has in the set."""
        return shard

    def copy(self, source: Path, shard: Shard) -> Shard:
        """Takes a file of another set as this shard, whose name is the one here. Returns it as `add` does."""
        shutil.copyfile(source, self.temp / shard.file)
        return shard

    def finish(self, manifest: Manifest) -> None:
        """Gives the folder its name. Raises FolderError where something else has it by now."""
        (self.temp / MANIFEST).write_text(_text(manifest))
        replace(self.temp, self.out, SHARDS, overwrite=self.overwrite)

    def discard(self) -> None:
        """Removes what is left of an unfinished set."""
        shutil.rmtree(self.temp, ignore_errors=True)


class Store:
    """A set in an object store, which cannot rename: the manifest comes last, and a set without one is none.

    A shard is sent when it is finished, and its name has a part of its hash: so the set that is replaced stays whole
    until the manifest changes, and of two writers at one place neither changes a file of the other.
    overwrite, apart: see folders.replaceable. Raises FolderError and StoreError.
    """

    def __init__(self, out: Place, overwrite: bool, apart: Sequence[Path | Place | None] = ()):
        replaceable(out, SHARDS, overwrite=overwrite, apart=apart)
        self.out, self.overwrite = out, overwrite
        self.temp = Path(tempfile.mkdtemp(prefix="fewstep-"))
        self.sent: dict[str, int] = {}

    def add(self, shard: Shard) -> Shard:
        """Sends the finished file of a shard in `temp`. Returns the shard with the name that it has in the set."""
        named = self._register(shard)
        (self.out / named.file).put(self.temp / shard.file)
        (self.temp / shard.file).unlink()
        return named

    def copy(self, source: Place, shard: Shard) -> Shard:
        """Copies a file of another set in the same store. Returns the shard as `add` does."""
        named = self._register(shard)
        source.copy(self.out / named.file, shard.bytes)
        return named

    def _register(self, shard: Shard) -> Shard:
        name = f"{Path(shard.file).stem}-{shard.sha256[:MARK_CHARS]}.parquet"
        self.sent[name] = shard.bytes
        return shard.model_copy(update={"file": name})

    def finish(self, manifest: Manifest) -> None:
        """Writes the manifest, and removes the set that it replaces. Raises ShardError, FolderError and StoreError."""
        replaceable(self.out, SHARDS, overwrite=self.overwrite, own=self.sent)  # the work may have taken hours
        sizes = {name: info["size"] for name, info in self.out.files().items()}
        for name, size in self.sent.items():
            if sizes.get(name) != size:
                raise ShardError(f"{self.out / name}: lost while the set was written; start again")
        (self.out / MANIFEST).write(_text(manifest).encode())
        former, self.sent = sizes.keys() - self.sent.keys() - {MANIFEST}, {}
        for name in sorted(former):
            (self.out / name).unlink()

    def discard(self) -> None:
        """Removes the shards of an unfinished set."""
        shutil.rmtree(self.temp, ignore_errors=True)
        with contextlib.suppress(OSError):  # what stays is no set, and overwrite=true does not replace it
            names = self.out.names() if self.sent else []
            kept = {shard.file for shard in read_manifest(self.out).shards} if MANIFEST in names else set()
            for name in self.sent.keys() & set(names) - kept:  # a set with the same shards may be there
                (self.out / name).unlink()


def _text(manifest: Manifest) -> str:
    return manifest.model_dump_json(indent=1) + "\n"


def output(out: Path | Place, overwrite: bool, apart: Sequence[Path | Place | None] = ()) -> Disk | Store:
    """The place of a new set. overwrite, apart: see folders.replaceable. Raises FolderError and StoreError."""
    return (Store if isinstance(out, Place) else Disk)(out, overwrite, apart)
