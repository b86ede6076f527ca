"""Models of diffusers built with bounds: from a config that may say anything, filled from safetensors files.

A model is built on the meta device first, where it takes no memory. Its tensors are compared with the headers of the
files, it is called once without computing anything, and only then are weights read. No pickle is opened.
"""

from __future__ import annotations

import inspect
import math
import os
import re
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from ..config import read_json
from ..texts import one_line, quoted

WEIGHTS = "diffusion_pytorch_model.safetensors"
INDEX = WEIGHTS + ".index.json"
FLOATS = ("F64", "F32", "F16", "BF16")
SIZE = 1 << 20  # largest whole number in a config: channels, tokens, pixels of a side
LENGTH = 64  # longest list in a config: blocks of a U-Net
TENSORS = 5_000  # most parameters of a new model; FLUX.1 has 780 and SDXL's U-Net 1,680
MAPPED_BYTES = 1 << 25  # of a file that are mapped, and so count as this process's, at once
COMPUTED_BYTES = 1 << 30  # most that a model computes when it is built, such as position embeddings


# Building


def check_config(config: Mapping[str, Any]) -> None:
    """Raises ValueError naming a value that no model has: a number out of range, a text or list out of proportion."""
    for key, value in config.items():
        _check_value(value, key)


def _check_value(value: Any, key: str, depth: int = 0) -> None:
    if value is None or isinstance(value, bool):
        return
    if isinstance(value, int):
        if not 0 <= value <= SIZE:
            raise ValueError(f"{key}: {value} is not between 0 and {SIZE:,}")
    elif isinstance(value, float):
        if not math.isfinite(value):
            raise ValueError(f"{key}: {value} is not finite")
    elif isinstance(value, str):
        if len(value) > 200:
            raise ValueError(f"{key}: {quoted(value)} has {len(value):,} letters")
    elif isinstance(value, (list, tuple)):
        if len(value) > LENGTH or depth == 2:
            raise ValueError(f"{key}: a list of {len(value)} values at depth {depth}; known: {LENGTH}, at depth 2")
        for part in value:
            _check_value(part, key, depth + 1)
    else:
        raise ValueError(f"{key}: {quoted(value)} is no number, text or list")


def model_class(name: str) -> type[nn.Module]:
    """The class of a model: diffusers', or EDM's U-Net, which diffusers has not."""
    if name == "EDMUNetModel":
        from .edm import EDMUNetModel

        return EDMUNetModel
    import diffusers

    return getattr(diffusers, name)


def arguments_of(name: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """The constructor's arguments in the config.json of a model of diffusers; other keys are left out, as there."""
    return {key: config[key] for key in inspect.signature(model_class(name)).parameters if key in config}


def outline(name: str, arguments: Mapping[str, Any], tensors: int | None = None) -> nn.Module:
    """A model of diffusers on the meta device. tensors: how many parameters it may have; None allows 5,000.

    Raises ValueError naming what the model makes of its arguments.
    """
    check_config(arguments)
    with torch.device("meta"), _on_registration(_at_most(tensors or TENSORS)):
        model = _construct(name, arguments)
    own = {**dict(model.named_parameters()), **model.state_dict()}
    computed = sum(buffer.nbytes for key, buffer in model.named_buffers() if key not in own)
    if computed > COMPUTED_BYTES:
        raise ValueError(f"computes {computed >> 20:,} MiB when it is built, more than {COMPUTED_BYTES >> 20:,}")
    return model


def unfilled(name: str, arguments: Mapping[str, Any], unread: Mapping[str, Stored] = MappingProxyType({})) -> nn.Module:
    """A model whose parameters are on the meta device, to be filled, and whose computed buffers are real.

    unread: where its weights lie, by their names in the model; the model keeps it until `fill`.
    """
    with _on_registration(lambda param: nn.Parameter(param.to("meta"), param.requires_grad)):
        model = _construct(name, arguments)
    model.unread = dict(unread)
    return model


def check_memory(model: nn.Module) -> None:
    """Raises ValueError where the float32 parameters of a model are more than this machine's memory."""
    wanted = 4 * sum(param.numel() for param in model.parameters())
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if wanted > memory:
        raise ValueError(f"{wanted / 2**30:,.0f} GiB of parameters, and this machine has {memory / 2**30:,.0f} GiB")


def _construct(name: str, arguments: Mapping[str, Any]) -> nn.Module:
    kind = model_class(name)
    try:
        return kind(**arguments)
    except Exception as error:  # of a constructor that was written for arguments that fit each other
        raise ValueError(f"{type(error).__name__}: {one_line(error)}") from None


@contextmanager
def _on_registration(change: Callable[[nn.Parameter], nn.Parameter | None]) -> Iterator[None]:
    """Calls `change` with each parameter that this thread gives to a module; what it returns takes its place."""
    thread = threading.get_ident()

    def hook(module: nn.Module, name: str, param: nn.Parameter | None) -> nn.Parameter | None:
        return change(param) if param is not None and threading.get_ident() == thread else None

    handle = register_module_parameter_registration_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def _at_most(tensors: int) -> Callable[[nn.Parameter], None]:
    count = 0

    def change(param: nn.Parameter) -> None:
        nonlocal count
        count += 1
        if count > tensors:
            raise ValueError(f"more than {tensors:,} parameters")

    return change


# Files


@dataclass(frozen=True)
class Stored:
    """A tensor in a safetensors file, by the file's header."""

    file: Path
    name: str
    dtype: str
    shape: tuple[int, ...]


def weight_files(folder: Path, name: str) -> list[Path]:
    """The safetensors files with a model's weights in its folder: a plain file, else shards, else a variant's.

    name: of the model's class, for the advice. Raises ValueError where there is none, or where an index names a file
    that is no plain safetensors file of the folder.
    """
    names = sorted(path.name for path in folder.iterdir())
    if WEIGHTS in names:
        return [folder / WEIGHTS]
    if INDEX in names:
        return _shards(folder / INDEX)
    pattern = r"diffusion_pytorch_model\.(\w+?)(-\d+-of-\d+)?\.safetensors"
    variants = {match[1]: match[2] is not None for path in names if (match := re.fullmatch(pattern, path))}
    if len(variants) > 1:
        raise ValueError(f"teacher: {folder} has the variants {', '.join(sorted(variants))}; keep one")
    for variant, sharded in variants.items():
        if not sharded:
            return [folder / f"diffusion_pytorch_model.{variant}.safetensors"]
        indices = (f"{WEIGHTS}.index.{variant}.json", f"{WEIGHTS}.{variant}.index.json")
        if index := next((index for index in indices if index in names), None):
            return _shards(folder / index)
        raise ValueError(f"teacher: no {indices[0]} in {str(folder)!r}, which names the shards of its weights")
    if not any(path.endswith(".bin") for path in names):
        raise ValueError(f"teacher: no {WEIGHTS} in {str(folder)!r}")
    raise ValueError(
        f"teacher: {str(folder)!r} has pickled weights (.bin) only, which can run code when they are opened; convert "
        f"them once, where you trust them: python -c \"import diffusers; diffusers.{name}.from_pretrained('{folder}', "
        f"use_safetensors=False).save_pretrained('{folder}')\""
    )


def _shards(index: Path) -> list[Path]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{index}: weight_map: expected an object {{...}}, got {quoted(weight_map)}")
    for file in weight_map.values():
        if not isinstance(file, str) or not re.fullmatch(r"\w[\w.+-]*\.safetensors", file):
            raise ValueError(f"{index}: {quoted(file)} is no safetensors file of this folder")
    stored = headers([index.parent / file for file in sorted(set(weight_map.values()))])
    differ = sorted(weight_map.keys() ^ stored.keys())
    differ += sorted(key for key in weight_map.keys() & stored.keys() if stored[key].file.name != weight_map[key])
    if differ:
        raise ValueError(f"{index}: does not fit its files; {len(differ)} tensors differ, such as {quoted(differ[0])}")
    return sorted({tensor.file for tensor in stored.values()})


def headers(files: list[Path]) -> dict[str, Stored]:
    """The tensors in safetensors files by their names, read from the files' headers alone.

    Raises ValueError naming a file that is missing or damaged, and a tensor that is twice there or no number.
    """
    stored: dict[str, Stored] = {}
    for file in files:
        with _open_file(file) as tensors:
            for key in tensors.keys():
                part = tensors.get_slice(key)
                if key in stored:
                    raise ValueError(f"{file}: {key} is also in {stored[key].file.name}")
                if part.get_dtype() not in FLOATS:
                    raise ValueError(f"{file}: {key} is of dtype {part.get_dtype()}; known: {', '.join(FLOATS)}")
                stored[key] = Stored(file, key, part.get_dtype(), tuple(part.get_shape()))
    return stored


@contextmanager
def _open_file(file: Path) -> Iterator[Any]:
    if not file.is_file():
        raise ValueError(f"{file}: no such file")
    try:
        with safe_open(file, "pt") as tensors:
            yield tensors
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file}: {one_line(error)}") from None


def check_headers(model: nn.Module, stored: Mapping[str, Stored], where: Path) -> dict[str, Stored]:
    """Raises ValueError where names or shapes of a model and of the files differ. Returns the tensors by the model's
    names.

    Attention of old repositories is renamed as diffusers does.
    """
    names = model._fix_state_dict_keys_on_load({key: key for key in stored})
    own = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    differ = sorted(own.keys() ^ names.keys())
    differ += [key for key in own.keys() & names.keys() if own[key] != stored[names[key]].shape]
    if differ:
        key = differ[0]
        theirs = stored[names[key]].shape if key in names else "missing"
        raise ValueError(
            f"teacher: {where}: weights and config.json differ in {len(differ)} of {len(own)} tensors, such as "
            f"{quoted(key)}: {theirs} in the weights, {own.get(key, 'missing')} by config.json"
        )
    return {key: stored[name] for key, name in names.items()}


def unread_of(net: nn.Module) -> dict[str, Stored]:
    """Places of the weights that are still to be read, by their names in a network; {} for one that has all."""
    modules = ((path, vars(module).get("unread", {})) for path, module in net.named_modules())
    return {f"{path}.{key}".lstrip("."): stored for path, unread in modules for key, stored in unread.items()}


def fill(net: nn.Module, device: torch.device | str = "cpu") -> nn.Module:
    """The network itself, whose models on the meta device get room on a device, and the weights of their `unread`.

    Of a sharded network each rank reads its own shards; see World.place. Raises ValueError for numbers that are not
    finite, and for a parameter that is in no file.
    """
    if missing := [name for name, value in net.named_parameters() if value.is_meta]:
        if lost := sorted(set(missing) - unread_of(net).keys()):
            raise ValueError(f"{lost[0]}: a parameter without a value, which lies in no file")
        net._apply(lambda value: torch.empty_like(value, device=device) if value.is_meta else value)
    for module in net.modules():
        unread: Mapping[str, Stored] = vars(module).pop("unread", {})
        own = module.state_dict() if unread else {}
        for file, keys in _by_file(unread):
            with _open_file(file) as tensors:
                for key in keys:
                    _read(tensors, unread[key], own[key])
    return net


def _by_file(stored: Mapping[str, Stored]) -> Iterator[tuple[Path, list[str]]]:
    """Names by file, at most about MAPPED_BYTES at once."""
    for file in sorted({tensor.file for tensor in stored.values()}):
        keys, size = [], 0
        for key in (key for key, tensor in stored.items() if tensor.file == file):
            keys.append(key)
            size += 4 * math.prod(stored[key].shape)
            if size > MAPPED_BYTES:
                yield file, keys
                keys, size = [], 0
        if keys:
            yield file, keys


def _read(tensors: Any, stored: Stored, into: Tensor) -> None:
    """Fills a tensor, or this rank's shard of it, in its own precision, from one that is taken in float32."""
    if hasattr(into, "to_local"):
        (chunk,), into = into.__create_chunk_list__(), into.to_local()
        spans = zip(chunk.offsets, chunk.sizes, strict=True)
        value = tensors.get_slice(stored.name)[tuple(slice(first, first + length) for first, length in spans)]
    else:
        value = tensors.get_tensor(stored.name)
    value = value.to(torch.float32)
    if not value.isfinite().all():
        raise ValueError(f"{stored.file}: {stored.name} holds numbers that are not finite")
    into.detach().copy_(value)


def first_values(stored: Stored, count: int) -> Tensor:
    """The first numbers of a tensor in a file, float32: `count`, or all where it has fewer."""
    with _open_file(stored.file) as tensors:
        if not stored.shape:
            return tensors.get_tensor(stored.name).float().flatten()
        rows = -(-count // max(math.prod(stored.shape[1:]), 1))
        return tensors.get_slice(stored.name)[:rows].float().flatten()[:count]
