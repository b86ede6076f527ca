"""Blocks: the parts of a network that are laid out, recomputed, compiled and run in bfloat16 one at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextvars import copy_context
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .lora import active

Pass = Literal["full", "encoder", "no_grad"]
# what diffusers calls them
CONTAINERS = ("down_blocks", "mid_block", "up_blocks", "transformer_blocks", "single_transformer_blocks")


def blocks(net: nn.Module) -> list[nn.Module]:
    """A network's blocks, none inside another.

    UNets: down_blocks, mid_block and up_blocks; transformers: transformer_blocks. In any other network an only part is
    opened until there are several; a part is a child with children of its own, or a member of a ModuleList. What lies
    outside the blocks is the root: input and output layers, embeddings. A network without parts has no blocks.
    """
    if named := list(_named_layers(net)):
        return named
    at, parts = net, list(_parts(net))
    while len(parts) == 1:
        at, parts = parts[0], list(_parts(parts[0]))
    return parts or ([] if at is net else [at])


def _named_layers(module: nn.Module) -> Iterator[nn.Module]:
    for name, child in module.named_children():
        if name in CONTAINERS:
            yield from child if isinstance(child, nn.ModuleList) else [child]
        else:
            yield from _named_layers(child)


def _parts(module: nn.Module) -> Iterator[nn.Module]:
    for child in module.children():
        if isinstance(child, nn.ModuleList):
            yield from child
        elif any(child.children()) and not isinstance(child, nn.ModuleDict):  # extra scalars' embeddings are root
            yield child


def units(net: nn.Module) -> list[nn.Module]:
    """Every module that is laid out by itself, inner before outer: the blocks, and what the model calls inside one of
    them past the block itself (`Backbone.apart`)."""
    apart = [module for part in net.modules() for module in getattr(part, "apart", ())]
    return [*apart, *blocks(net)]


# What a block does besides its own arithmetic: partial objects in the place of `forward`, which keep the names of the
# state, let hooks (FSDP2's, the bottleneck's) run outside, and are copied along with the module


def checkpoint_activations(net: nn.Module) -> None:
    """Each block keeps only its inputs for the backward pass, and runs again then. Networks run without dropout, so no
    random state is kept. Reentrant checkpointing would leave a sharded root's gradients unreduced."""
    for block in blocks(net):
        block.forward = partial(_recompute, block.forward)


def _recompute(run: Callable, *args: Any, **kwargs: Any) -> Any:
    """The second run, in the backward pass, has the context variables of the first: the adapter and the extra scalars,
    whichever ran in between. A compiled graph holds both runs and needs no reminder."""
    if not torch.compiler.is_compiling():
        run = partial(copy_context().run, run)
    return checkpoint(run, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)


def compile_passes(net: nn.Module, passes: Iterable[Pass], **options: Any) -> None:
    """Blocks run compiled in the chosen passes of the denoiser that `net` is or holds, as written in the others.

    passes: full, encoder (it leaves at the bottleneck), no_grad (any without gradients). options: torch.compile's.
    Shapes are static: each new one is compiled anew. A whole network could not be traced through an early exit or a
    shard's hooks, which both lie between blocks. A network that holds no denoiser, a GAN head, stays as it is.
    """
    denoiser = next((module for module in net.modules() if hasattr(module, "running")), None)
    if denoiser is not None:
        for block in blocks(net):
            block.forward = _run_by_pass(denoiser, frozenset(passes), block.forward, options)


def _run_by_pass(denoiser: nn.Module, passes: frozenset[Pass], run: Callable, options: dict[str, Any]) -> Callable:
    def whole(*args: Any, **kwargs: Any) -> Any:
        return run(*args, **kwargs)

    # blocks of one class share their code, and would share its few compiled versions; so would adapters of one base
    fast: dict[nn.Module | None, Callable] = {}

    def forward(*args: Any, **kwargs: Any) -> Any:
        if denoiser.running not in passes:
            return run(*args, **kwargs)
        adapter = active()
        if adapter not in fast:
            fast[adapter] = torch.compile(whole, dynamic=False, isolate_recompiles=True, **options)
        return fast[adapter](*args, **kwargs)

    return forward


def in_bf16(net: nn.Module) -> None:
    """Units compute in bfloat16 from bfloat16 inputs, and the root in float32: the output convolution above all, whose
    rounding a prediction of eps near pure noise would show 15-fold in x0. A network without units does so whole."""
    inner = units(net) or [net]
    inside = {module for unit in inner for module in unit.modules()}
    for unit in inner:
        unit.forward = partial(_autocast, unit.forward)
    for module in net.modules():
        if module not in inside and not any(module.children()):
            module.register_forward_pre_hook(_in_float32, with_kwargs=True)


def store_in(module: nn.Module, dtype: torch.dtype) -> None:
    """Stores a frozen module's floating parameters and buffers in `dtype`: new tensors take the place of the old."""
    for part in module.modules():
        for tensors in (part._parameters, part._buffers):
            for name, value in tensors.items():
                if value is not None and value.is_floating_point():
                    new = value.detach().to(dtype)
                    tensors[name] = nn.Parameter(new, requires_grad=False) if tensors is part._parameters else new


def in_float32(net: nn.Module) -> None:
    """Undoes `in_bf16`."""
    for module in net.modules():
        run = vars(module).get("forward")
        if isinstance(run, partial) and run.func is _autocast:
            del module.forward
        for key, hook in list(module._forward_pre_hooks.items()):
            if hook is _in_float32:
                del module._forward_pre_hooks[key]
                module._forward_pre_hooks_with_kwargs.pop(key, None)


def _autocast(run: Callable, *args: Any, **kwargs: Any) -> Any:
    positions = {key: value for key, value in kwargs.items() if key == "image_rotary_emb"}
    args, kwargs = _cast((args, kwargs), torch.bfloat16, ndim=2)  # a time (B,) keeps its digits, and so do positions
    kwargs |= positions
    device = next(value.device for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
    # no cache of cast weights: one of a pass without gradients would cut the graph of the next
    with torch.autocast(device.type, torch.bfloat16, cache_enabled=False):
        return run(*args, **kwargs)


def _in_float32(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    return _cast((args, kwargs), torch.float32)


def _cast(value: Any, dtype: torch.dtype, ndim: int = 0) -> Any:
    """Floating tensors of at least `ndim` dimensions in `dtype`, in nested tuples, lists and dicts too."""
    if isinstance(value, Tensor):
        return value.to(dtype) if value.is_floating_point() and value.ndim >= ndim else value
    if isinstance(value, (tuple, list)):
        return type(value)(_cast(v, dtype, ndim) for v in value)
    if isinstance(value, dict):
        return {k: _cast(v, dtype, ndim) for k, v in value.items()}
    return value
