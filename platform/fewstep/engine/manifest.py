"""The manifest of a checkpoint: what was saved, in which files, and which chunks make up each tensor."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from .folder import MANIFEST
from .storage import Place, Ref
from .tensor_file import DTYPES

FORMAT = 2
FIELDS = ("step", "images", "updates", "recipe", "fingerprint", "world", "files", "tensors")
AGAIN = "remove that folder to resume from the one before it, or start anew under another name=..."


class CheckpointError(ValueError):
    """A checkpoint that cannot be written or used; the text names the file and the way out."""


def read_manifest(path: Ref) -> dict[str, Any]:
    """A checkpoint's manifest. Raises CheckpointError naming the file and what is wrong with it."""
    path = Place.of(path)
    file = path / MANIFEST
    try:
        manifest = json.loads(file.read())
    except FileNotFoundError:
        raise not_there(file, path) from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{file}: damaged ({error}); {AGAIN}") from None
    if not isinstance(manifest, dict):
        raise CheckpointError(f"{file}: damaged (not a JSON object); {AGAIN}")
    if manifest.get("format", FORMAT) != FORMAT:
        raise CheckpointError(f"{path}: checkpoint format {manifest['format']}, this version reads {FORMAT}")
    if missing := [key for key in ("format", *FIELDS) if key not in manifest]:
        raise CheckpointError(f"{file}: damaged ({missing[0]!r} is missing); {AGAIN}")
    return manifest


def not_there(file: Place, checkpoint: Place) -> CheckpointError:
    """The error of a checkpoint that lacks a file."""
    return CheckpointError(f"{file}: no such file, so {checkpoint} is no complete checkpoint; {AGAIN}")


def metadata_of(entries: Mapping[str, Any]) -> Metadata:
    """What a manifest says of its tensors, as the planner wants it; of each chunk (file, key)."""
    tensors, chunks = {}, {}
    for name, entry in entries.items():
        where = []
        for chunk in entry["chunks"]:
            offsets = torch.Size(chunk["offsets"])
            where.append(ChunkStorageMetadata(offsets, torch.Size(chunk["sizes"])))
            chunks[MetadataIndex(name, offsets)] = (chunk["file"], chunk["key"])
        properties = TensorProperties(dtype=DTYPES[entry["dtype"]])
        tensors[name] = TensorStorageMetadata(properties, torch.Size(entry["shape"]), where)
    return Metadata(tensors, storage_data=chunks)


def manifest_text(manifest: Mapping[str, Any]) -> bytes:
    """One line a field, and one a tensor, for those who look into it."""
    lines = [f" {json.dumps(key)}: {json.dumps(value)}" for key, value in manifest.items() if key != "tensors"]
    tensors = [f"  {json.dumps(key)}: {json.dumps(value)}" for key, value in manifest["tensors"].items()]
    lines.append(' "tensors": {\n' + ",\n".join(tensors) + "\n }")
    return ("{\n" + ",\n".join(lines) + "\n}\n").encode()
