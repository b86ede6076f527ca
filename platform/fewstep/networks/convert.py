"""Pickles -> tensors, and folders that open as teachers. Nothing that a pickle names is imported or run.

Known of it are tensors, arrays, numbers, texts and containers of them, and the modules in EDM's and EDM2's files
(Karras et al. 2022 and 2024): a class name and a state, of which a record is made. The code that such a file carries is
left unread. diffusers has no class with the layout of EDM's own networks, so their tensors come out under their own
names, and become a teacher only where they are named and shaped as a class of diffusers is.
"""

from __future__ import annotations

import io
import math
import pickle
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy._core import multiarray
from torch import Tensor

from ..texts import one_line, quoted
from .denoiser import Denoiser
from .pretrained import Network, empty_denoiser

ZIP, LEGACY = b"PK\x03\x04", pickle.dumps(0x1950A86A20F9469CFC6C, 2)[:13]  # of torch.save's own two forms
DTYPES = ("float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool")


class Record(dict):
    """A module's state by name; `kind` is the name of its class."""

    kind = ""

    def __setstate__(self, state: Any) -> None:
        self.update(state if isinstance(state, dict) else {})


def _record(meta: Any) -> Record:
    record = Record(meta.get("state") or {}) if isinstance(meta, dict) else Record()
    record.kind = str(meta.get("class_name", "")) if isinstance(meta, dict) else ""
    return record


def _storage(data: bytes) -> Any:
    return torch.load(io.BytesIO(data), "cpu", weights_only=True)


def _tensor(storage: Any, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: Any) -> Tensor:
    """A tensor in a storage, which it may not exceed."""
    flat = torch.empty(0, dtype=storage.dtype).set_(storage)
    if math.prod(size) > flat.numel():
        raise ValueError(f"a tensor of shape {tuple(size)} in {flat.numel()} numbers")
    return torch.as_strided(flat, size, stride, offset)


MODULES = ("torch.nn.modules.", "training.")  # whose classes become records
KNOWN: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): OrderedDict,
    **{(module, "set"): set for module in ("builtins", "__builtin__")},
    ("_codecs", "encode"): lambda text, code: text.encode("latin1"),  # bytes in a pickle of protocol 2
    ("dnnlib.util", "EasyDict"): Record,
    ("torch_utils.persistence", "_reconstruct_persistent_obj"): _record,
    ("torch.storage", "_load_from_bytes"): _storage,
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch._utils", "_rebuild_parameter"): lambda data, *_: data,
    **{("torch", name): getattr(torch, name) for name in DTYPES},
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
    **{(f"numpy.{core}.multiarray", "_reconstruct"): multiarray._reconstruct for core in ("core", "_core")},
}


class _Reader(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if module.startswith(MODULES):
            return type(name, (Record,), {"kind": name})
        if (module, name) not in KNOWN:
            raise ValueError(f"it names {quoted(f'{module}.{name}')}, which is no tensor, number or known record")
        return KNOWN[module, name]

    def persistent_load(self, pid: Any) -> Any:
        raise ValueError(f"it refers to {quoted(pid)} outside of itself")


@dataclass(frozen=True)
class Pickle:
    """Content of a pickle: tensors by their dotted names; name, class and settings of its modules."""

    tensors: dict[str, Tensor]
    modules: list[tuple[str, str, dict[str, Any]]]


def read_pickle(path: Path) -> Pickle:
    """The content of a pickle, or of a file of torch.save. Raises ValueError naming the file and what is refused."""
    if not path.is_file():
        raise ValueError(f"pickle: no file {str(path)!r}")
    try:
        with path.open("rb") as file:
            start = file.read(len(LEGACY))
            file.seek(0)
            of_torch = start.startswith(ZIP) or start == LEGACY
            content = torch.load(file, "cpu", weights_only=True) if of_torch else _Reader(file).load()
        pickle = Pickle({name: value.contiguous().clone() for name, value in _tensors(content)}, list(_kinds(content)))
    except Exception as error:  # whatever a file of others makes of the reader
        raise ValueError(f"pickle: {str(path)!r} is refused: {one_line(error, 300)}") from None
    if not pickle.tensors:
        raise ValueError(f"pickle: {str(path)!r} holds no tensor")
    return pickle


def _tensors(content: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """Every tensor in it by its dotted name; parameters, buffers and modules of a module are named as PyTorch does."""
    if isinstance(content, Tensor):
        yield name, content
    elif isinstance(content, Mapping):
        for key, value in content.items():
            own = isinstance(content, Record) and key in ("_parameters", "_buffers", "_modules")
            yield from _tensors(value, name if own else f"{name}.{key}".lstrip("."))
    elif isinstance(content, (list, tuple)):
        for i, value in enumerate(content):
            yield from _tensors(value, f"{name}.{i}".lstrip("."))


def _kinds(content: Any, name: str = "") -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Name, class and settings (numbers, texts, lists of them) of the content's modules that have settings."""
    if isinstance(content, Mapping):
        if isinstance(content, Record) and content.kind:
            plain = {k: v for k, v in content.items() if not k.startswith("_") and _is_plain(v)}
            yield name, content.kind, plain
        for key, value in content.items():
            own = isinstance(content, Record) and key == "_modules"
            yield from _kinds(value, name if own else f"{name}.{key}".lstrip("."))


def _is_plain(value: Any) -> bool:
    return isinstance(value, (int, float, str, type(None))) or (
        isinstance(value, (list, tuple)) and all(map(_is_plain, value))
    )


def to_denoiser(tensors: Mapping[str, Tensor], network: Network, part: str) -> Denoiser:
    """A network with those of the tensors whose names begin with `part`. Raises ValueError where they are not its."""
    prefix = f"{part}." if part else ""
    weights = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
    net = empty_denoiser(network)
    own = net.backbone.model.state_dict()
    differ = sorted(own.keys() ^ weights.keys())
    differ += sorted(key for key in own.keys() & weights.keys() if own[key].shape != weights[key].shape)
    if differ:
        raise ValueError(
            f"part: {part!r}: its tensors and those of {network.model} differ in {len(differ)} of {len(own)}, such as "
            f"{quoted(differ[0])}; leave network out to write them under their own names"
        )
    if bad := next((key for key, value in weights.items() if not value.float().isfinite().all()), None):
        raise ValueError(f"part: {prefix}{bad} holds numbers that are not finite")
    net.backbone.model.load_state_dict({key: value.float() for key, value in weights.items()})
    return net
