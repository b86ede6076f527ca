"""The manifest of a checkpoint: what was saved, in which files, and which chunks make up each tensor.

`manifest.json` is checked whole when it is read: its own hash, the type and range of each field, plain file names, and
that the chunks of each tensor cover each of its elements once. Fields that are not named here are the run's own.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import re
from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from ..config import ConfigError, fingerprint, parse_json
from ..storage.place import Place, Ref
from ..texts import quoted
from .folder import MANIFEST, NAME, RANK_FILE
from .tensor_file import DTYPES

FORMAT = 2
FIELDS = ("step", "images", "updates", "recipe", "fingerprint", "world", "files", "tensors")
AGAIN = "remove that folder to resume from the one before it, or start anew under another name=..."
LIMIT = 256 << 20  # bytes of a manifest; one of ten thousand tensors on a hundred ranks has 150 MB
LARGEST = 2**63 - 1

log = logging.getLogger(__name__)
_unsigned: set[str] = set()  # manifests without a hash of their own that were mentioned already


class CheckpointError(ValueError):
    """A checkpoint that cannot be written or used; the text names the file and the way out."""


def read_manifest(path: Ref) -> dict[str, Any]:
    """A checkpoint's manifest. Raises CheckpointError naming the file and what is wrong with it.

    A manifest of an older version has no hash of its own; that is logged once a file, and everything else is checked.
    """
    path = Place.of(path)
    file = path / MANIFEST
    try:
        manifest = parse_json(file.read(LIMIT + 1), str(file), limit=LIMIT)
    except FileNotFoundError:
        raise not_there(file, path) from None
    except ConfigError as error:
        raise CheckpointError(f"{file}: damaged ({str(error).removeprefix(f'{file}: ')}); {AGAIN}") from None
    if manifest.get("format", FORMAT) != FORMAT:
        raise CheckpointError(
            f"{path}: checkpoint format {quoted(manifest['format'])}, this version reads {FORMAT}; {AGAIN}"
        )
    try:
        _check(manifest, path)
    except ValueError as error:
        raise CheckpointError(f"{file}: damaged ({error}); {AGAIN}") from None
    if "sha256" not in manifest and str(file) not in _unsigned:
        _unsigned.add(str(file))
        log.warning("%s: written by an older version, without a hash of itself; only its fields were checked", file)
    return manifest


def not_there(file: Place, checkpoint: Place) -> CheckpointError:
    """The error of a checkpoint that lacks a file."""
    return CheckpointError(f"{file}: no such file, so {checkpoint} is no complete checkpoint; {AGAIN}")


def signature(manifest: Mapping[str, Any]) -> str:
    """SHA-256 of a manifest's content without its field `sha256`, hexadecimal; spaces and order do not matter."""
    content = {key: value for key, value in manifest.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def manifest_text(manifest: Mapping[str, Any]) -> bytes:
    """The manifest with its hash as JSON: one line a field, and one a tensor, for those who look into it."""
    fields = {key: value for key, value in manifest.items() if key != "tensors"} | {"sha256": signature(manifest)}
    lines = [f" {json.dumps(key)}: {json.dumps(value)}" for key, value in fields.items()]
    tensors = [f"  {json.dumps(key)}: {json.dumps(value)}" for key, value in manifest["tensors"].items()]
    lines.append(' "tensors": {\n' + ",\n".join(tensors) + "\n }")
    return ("{\n" + ",\n".join(lines) + "\n}\n").encode()


# Checks. Each raises ValueError that names the field and its value.


def _check(manifest: Mapping[str, Any], path: Place) -> None:
    if missing := [key for key in ("format", *FIELDS) if key not in manifest]:
        raise ValueError(f"{missing[0]!r} is missing")
    if "sha256" in manifest and manifest["sha256"] != signature(manifest):
        raise ValueError("changed since it was written")
    for key in ("step", "images"):
        _whole_number(manifest[key], key)
    _whole_number(manifest["world"], "world", least=1)
    named = NAME.fullmatch(path.name)
    if named and int(named[1]) != manifest["step"]:
        raise ValueError(f"step: {manifest['step']}, but its folder is {path.name}")
    for name, count in _object(manifest["updates"], "updates").items():
        _whole_number(count, f"updates.{name}")
    if manifest["fingerprint"] != fingerprint(_object(manifest["recipe"], "recipe")):
        raise ValueError(f"fingerprint: {quoted(manifest['fingerprint'])} is not that of its recipe")
    files = _object(manifest["files"], "files")
    for name, file in files.items():
        if not RANK_FILE.fullmatch(name):
            raise ValueError(f"files: {quoted(name)} is no file of a checkpoint, such as rank-00000.safetensors")
        where = f"files.{name}"
        _whole_number(_object(file, where).get("bytes"), f"{where}.bytes")
        if not re.fullmatch("[0-9a-f]{64}", _text(file.get("sha256"), f"{where}.sha256")):
            raise ValueError(f"{where}.sha256: {quoted(file['sha256'])} is no SHA-256")
    stored = dict.fromkeys(files, 0)
    for name, entry in _object(manifest["tensors"], "tensors").items():
        _check_tensor(_object(entry, f"tensors.{name}"), f"tensors.{name}", stored)
    for name, size in stored.items():
        if size > files[name]["bytes"]:
            raise ValueError(f"files.{name}: {files[name]['bytes']} bytes, but its tensors have {size}")


def _check_tensor(entry: Mapping[str, Any], where: str, stored: dict[str, int]) -> None:
    """A tensor's dtype, shape and chunks; adds the bytes of each chunk to those that its file stores."""
    if _text(entry.get("dtype"), f"{where}.dtype") not in DTYPES:
        raise ValueError(f"{where}.dtype: {quoted(entry['dtype'])} is not one of {', '.join(DTYPES)}")
    shape = _sizes(entry.get("shape"), f"{where}.shape")
    if not isinstance(entry.get("chunks"), list):
        raise ValueError(f"{where}.chunks: expected a list [...], got {quoted(entry.get('chunks'))}")
    boxes, seen = [], set()
    for chunk in entry["chunks"]:
        offsets = _sizes(_object(chunk, f"{where}.chunks").get("offsets"), f"{where}.chunks.offsets", len(shape))
        sizes = _sizes(chunk.get("sizes"), f"{where}.chunks.sizes", len(shape))
        file = _text(chunk.get("file"), f"{where}.chunks.file")
        if file not in stored:
            raise ValueError(f"{where}.chunks.file: {quoted(file)} is not one of its files")
        if file in seen:
            raise ValueError(f"{where}.chunks: {file} is named twice")
        _text(chunk.get("key"), f"{where}.chunks.key")
        seen.add(file)
        stored[file] += math.prod(sizes) * DTYPES[entry["dtype"]].itemsize
        boxes.append((offsets, sizes))
    if not covers(shape, boxes):
        raise ValueError(f"{where}.chunks: do not cover each element of the shape {shape} once")


def covers(shape: list[int], boxes: list[tuple[list[int], list[int]]]) -> bool:
    """True if boxes, listed as (offsets, sizes), cover each element of a tensor of this shape exactly once.

    They do where all lie inside, no two overlap, and together they have as many elements as the tensor.
    """
    inside = all(o + s <= n for offsets, sizes in boxes for o, s, n in zip(offsets, sizes, shape, strict=True))
    if not boxes or not inside or sum(math.prod(sizes) for _, sizes in boxes) != math.prod(shape):
        return False
    filled = [box for box in boxes if math.prod(box[1])]
    cut = max(range(len(shape)), key=lambda dim: len({offsets[dim] for offsets, _ in filled}), default=None)
    if cut is None:  # a scalar: one box of one element
        return len(filled) == 1
    filled.sort(key=lambda box: box[0][cut])
    if all(a[0][cut] + a[1][cut] <= b[0][cut] for a, b in pairwise(filled)):
        return True
    return not any(_overlap(a, b) for i, a in enumerate(filled) for b in _overlapping(a, filled[i + 1 :], cut))


def _overlapping(box: Any, later: list[Any], cut: int) -> list[Any]:
    """Those of the later boxes that begin, along dimension `cut`, before this one ends."""
    end = box[0][cut] + box[1][cut]
    count = next((i for i, (offsets, _) in enumerate(later) if offsets[cut] >= end), len(later))
    return later[:count]


def _overlap(a: Any, b: Any) -> bool:
    return all(p < q + t and q < p + s for p, s, q, t in zip(*a, *b, strict=True))


def _whole_number(value: Any, where: str, least: int = 0) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= LARGEST:
        raise ValueError(f"{where}: expected a whole number from {least}, got {quoted(value)}")
    return value


def _text(value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{where}: expected text, got {quoted(value)}")
    return value


def _object(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{where}: expected an object {{...}}, got {quoted(value)}")
    return value


def _sizes(value: Any, where: str, count: int | None = None) -> list[int]:
    if not isinstance(value, list) or count not in (None, len(value)):
        expected = "a list of sizes" if count is None else f"{count} numbers"
        raise ValueError(f"{where}: expected {expected}, got {quoted(value)}")
    for size in value:
        _whole_number(size, where)
    if math.prod(value) > LARGEST:
        raise ValueError(f"{where}: {quoted(value)} has more elements than any tensor")
    return value


def check_alike(theirs: Any, ours: Any, where: str) -> None:
    """Raises ValueError where a value read from a manifest is not of the kind of the run's own at the same place.

    Objects have the run's keys, counts are whole and not negative, numbers are finite. A text or a list is of the same
    type; where the run has null, anything goes.
    """
    if isinstance(ours, Mapping):
        if _object(theirs, where).keys() != ours.keys():
            names = sorted(theirs.keys() ^ ours.keys())
            raise ValueError(f"{where}: {', '.join(names)} stands in the checkpoint or in this run, and not in both")
        for key, value in ours.items():
            check_alike(theirs[key], value, f"{where}.{key}" if where else key)
    elif isinstance(ours, bool) or isinstance(ours, (str, list, tuple)):
        kind = list if isinstance(ours, tuple) else type(ours)
        if not isinstance(theirs, kind):
            raise ValueError(f"{where}: expected {kind.__name__}, got {quoted(theirs)}")
    elif isinstance(ours, int):
        _whole_number(theirs, where)
    elif isinstance(ours, float):
        number = isinstance(theirs, (int, float)) and not isinstance(theirs, bool)
        if not number or not math.isfinite(theirs):
            raise ValueError(f"{where}: expected a finite number, got {quoted(theirs)}")


def metadata_of(entries: Mapping[str, Any]) -> Metadata:
    """A manifest's tensors as the planner of torch.distributed.checkpoint takes them, each chunk with its dtype."""
    tensors, chunks = {}, {}
    for name, entry in entries.items():
        where = []
        for chunk in entry["chunks"]:
            offsets = torch.Size(chunk["offsets"])
            where.append(ChunkStorageMetadata(offsets, torch.Size(chunk["sizes"])))
            chunks[MetadataIndex(name, offsets)] = chunk | {"dtype": entry["dtype"]}
        properties = TensorProperties(dtype=DTYPES[entry["dtype"]])
        tensors[name] = TensorStorageMetadata(properties, torch.Size(entry["shape"]), where)
    return Metadata(tensors, storage_data=chunks)
