"""A safetensors file, written and hashed piece by piece to wherever a Place lies."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from ..storage.place import Place

# safetensors' names
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def write_tensors(file: Place, tensors: Mapping[str, Tensor]) -> tuple[int, str]:
    """Writes CPU tensors in safetensors' format, piece by piece. Returns the file's (bytes, sha256)."""
    order = sorted(tensors, key=lambda name: -tensors[name].element_size())  # keeps every tensor aligned
    header, at = {}, 0
    for name in order:
        tensor = tensors[name]
        end = at + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": DTYPE_NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    digest, size = hashlib.sha256(), 0
    with file.writing() as out:
        for block in (len(text).to_bytes(8, "little"), text, *(tensors[name] for name in order)):
            for piece in _pieces(block):
                digest.update(piece)
                out.write(piece)
                size += len(piece)
    return size, digest.hexdigest()


def _pieces(block: bytes | Tensor, size: int = 16 << 20) -> Iterator[memoryview]:
    """The bytes of a block, in pieces that a store can take one by one."""
    data = block.contiguous().reshape(-1).view(torch.uint8).numpy() if isinstance(block, Tensor) else block
    view = memoryview(data)
    return (view[i : i + size] for i in range(0, len(view), size))
