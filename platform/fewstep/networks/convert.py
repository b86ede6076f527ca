"""Pickles -> tensors, and folders that open as teachers. Nothing that a pickle names is imported or run.

Known of it are tensors, arrays, numbers, texts and containers of them, and the modules in EDM's and EDM2's files
(Karras et al. 2022 and 2024): a class name and a state, of which a record is made. The code that such a file carries is
left unread. EDM's networks become those of networks/edm.py; tensors of others come out under their own names, and
become a teacher where they are named and shaped as a class of diffusers is.
"""

from __future__ import annotations

import io
import math
import pickle
import re
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


def _number(kind: Any, data: bytes) -> Any:
    """A number of numpy, as Python's own."""
    return np.frombuffer(data, kind, 1)[0].item()


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
    **{(f"numpy.{core}.multiarray", "scalar"): _number for core in ("core", "_core")},
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
    try:
        return _filled(network, weights)
    except ValueError as error:
        raise ValueError(
            f"part: {part!r}: {error}; leave network out to write all tensors under their own names"
        ) from None


def _filled(network: Network, weights: Mapping[str, Tensor]) -> Denoiser:
    net = empty_denoiser(network)
    own = net.backbone.model.state_dict()
    differ = sorted(own.keys() ^ weights.keys())
    differ += sorted(key for key in own.keys() & weights.keys() if own[key].shape != weights[key].shape)
    if differ:
        raise ValueError(
            f"its tensors and those of {network.model} differ in {len(differ)} of {len(own)}, such as "
            f"{quoted(differ[0])}"
        )
    if bad := next((key for key, value in weights.items() if not value.float().isfinite().all()), None):
        raise ValueError(f"{bad} holds numbers that are not finite")
    net.backbone.model.load_state_dict({key: value.float() for key, value in weights.items()})
    return net


# EDM's networks

PLACES = {  # of a layer in EDM's files -> in networks/edm.py
    "map_layer": "time_embedding.layer{n}",
    "map_label": "time_embedding.label",
    "map_noise": "time_embedding",
    "enc.conv": "conv_in",
    "enc.down": "down_blocks.{level}.first",
    "enc.block": "down_blocks.{level}.blocks.{n}",
    "enc.aux_residual": "down_blocks.{level}.image.conv",
    "dec.in": "mid_block.blocks.{n}",
    "dec.up": "up_blocks.{up}.first",
    "dec.block": "up_blocks.{up}.blocks.{n}",
    "dec.aux_norm": "conv_norm_out",
    "dec.aux_conv": "conv_out",
    "out_norm": "conv_norm_out",
    "out_conv": "conv_out",
}


def edm_denoiser(pickled: Pickle, part: str = "") -> Denoiser | None:
    """The network of a pickle of EDM's; None for a pickle of anything else.

    part: name of the network, such as ema, where the pickle holds several. The layer that reads an image's augmentation
    in training is left out, as samples are not augmented. Raises ValueError for networks of
    EDM's baselines, of EDM2, and of settings other than the paper's.
    """
    kinds = {name: kind for name, kind, _ in pickled.modules if kind.endswith("Precond") and part in ("", name)}
    if not kinds:
        return None
    if len(kinds) > 1:
        raise ValueError(f"part: the pickle holds the networks {', '.join(kinds)}; name one of them")
    ((name, kind),) = kinds.items()
    if kind != "EDMPrecond":
        raise ValueError(f"pickle: {name} is a {quoted(kind)}; EDM's EDMPrecond opens, its baselines and EDM2 do not")
    settings = {path: values for path, _, values in pickled.modules}
    model = f"{name}.model."
    tensors = {key.removeprefix(model): value for key, value in pickled.tensors.items() if key.startswith(model)}
    try:
        network, sides = _edm_network(tensors, settings[name], settings[f"{name}.model"])
        filters = {key: tensors.pop(key) for key in [*tensors] if key.endswith(".resample_filter")}
        _check_filters(network.config["layout"], filters)
        tensors.pop("map_augment.weight", None)
        net = _filled(network, {_edm_place(key, sides): value for key, value in tensors.items()})
        for path, values in settings.items():
            if path.startswith(model) and "skip_scale" in values:
                _check_block(
                    net.backbone.model.get_submodule(_edm_place(path.removeprefix(model), sides)), path, values
                )
    except Exception as error:  # whatever a file of others makes of the names above
        raise ValueError(f"pickle: {name} is no network as EDM's paper has them: {one_line(error)}") from None
    return net


def _edm_network(
    tensors: Mapping[str, Tensor], precond: Mapping[str, Any], model: Mapping[str, Any]
) -> tuple[Network, list[int]]:
    """The description of a network by its tensors' names and shapes, and the sides of its levels."""
    channels = len(tensors["map_layer1.weight"]) // 4
    blocks = [match for key in tensors if (match := re.fullmatch(r"enc\.(\d+)x\d+_block\d+\.conv0\.weight", key))]
    sides = list(dict.fromkeys(int(match[1]) for match in blocks))
    first = lambda side, layer: tensors.get(f"enc.{side}x{side}_block0.{layer}.weight")
    config = {
        "layout": "adm" if "out_conv.weight" in tensors else "ncsn++" if "map_noise.freqs" in tensors else "ddpm++",
        "sample_size": precond["img_resolution"],
        "in_channels": precond["img_channels"],
        "channels": channels,
        "channel_mult": [len(first(side, "conv0")) // channels for side in sides],
        "layers_per_block": len(blocks) // len(sides),
        "attention_sizes": [side for side in sides if first(side, "qkv") is not None],
        "num_class_embeds": precond["label_dim"] or None,
        "null_class": model.get("label_dropout", 0) > 0,
    }
    return Network(model="EDMUNetModel", config=config, data_std=precond["sigma_data"]), sides


def _edm_place(name: str, sides: list[int]) -> str:
    """The name in networks/edm.py of a module or tensor of EDM's. Raises KeyError for one that has no place there."""
    pattern = r"(enc\.|dec\.)?((\d+)x\d+_)?([a-z_]+)(\d*)((\.\w+)*)"
    coder, _, side, layer, n, rest, _ = re.fullmatch(pattern, name).groups("")
    level = sides.index(int(side)) if side else 0
    return PLACES[coder + layer].format(n=n, level=level, up=len(sides) - 1 - level) + rest


def _check_block(block: Any, path: str, values: Mapping[str, Any]) -> None:
    """Raises ValueError where a residual block's settings, which no shape shows, are not the architecture's."""
    own = {"num_heads": block.heads, "skip_scale": block.layout.sum_scale}
    if differ := [key for key, value in own.items() if values[key] != value]:
        raise ValueError(f"{path}: {differ[0]} is {quoted(values[differ[0]])}, expected {own[differ[0]]}")


def _check_filters(layout: str, filters: Mapping[str, Tensor]) -> None:
    """Raises ValueError where a filter of the resolution is not the architecture's."""
    from .edm import LAYOUTS, Resample

    kernel = Resample(LAYOUTS[layout].filter, up=False).kernel
    for key, value in filters.items():
        if value.shape != kernel.shape or not torch.allclose(value.float(), kernel):
            raise ValueError(f"{key}: not the filter {LAYOUTS[layout].filter} of {layout}")
