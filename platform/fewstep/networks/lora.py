"""LoRA: low-rank adaptation of large language models. Hu et al. 2021, arXiv:2106.09685. Here of any frozen network.

An adapter is a module whose parameters are its own and none of its base, so that optimisers, averages, checkpoints and
sharding treat it as any network. Several adapters share one base: each adapted layer has one forward hook, which adds
the change of the adapter that runs, and nothing while none runs.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import math
from collections.abc import Sequence
from contextvars import ContextVar
from copy import deepcopy
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn import functional as F

from ..diffusion.draws import fold
from .extras import ScalarEmbedding
from .weights import first_values, unread_of

LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
TOLERANCE = 1e-4  # of a merged network's output, float32, in units of the largest output or of 1

# A context variable belongs to a thread: a teacher's pass in another thread never sees the student's adapter
_ACTIVE: ContextVar[Lora | None] = ContextVar("adapter", default=None)


def active() -> Lora | None:
    """The adapter whose pass runs in this thread; None in a pass of the base alone."""
    return _ACTIVE.get()


class using:
    """Context in which adapted layers add this adapter's change; None switches all adapters off."""

    def __init__(self, adapter: Lora | None):
        self.adapter = adapter

    def __enter__(self) -> None:
        self.token = _ACTIVE.set(self.adapter)

    def __exit__(self, *error: Any) -> None:
        _ACTIVE.reset(self.token)


class Lora(nn.Module):
    """A frozen network with a low-rank change of some layers: W x + (alpha / rank) up down x.

    It is called as its base is, and has its base's attributes. The base is no child of it: `parameters` and
    `state_dict` are the factors and the embeddings of `add_extra`, float32, and a deep copy copies those alone. `up`
    starts at zero, so that a new adapter equals its base. Factors compute in the precision of the layer they change.

    base: any module, which becomes frozen. rank: of a change, at most; a layer takes less where its weight, as a matrix
    (outputs, inputs x kernel) of each group, has fewer rows or columns. alpha: None stands for `rank`, a factor of 1.
    targets: "attention" (the projections that the backbone names in `attention_layers`), "all" (every linear and
    convolution layer), or ends of layer paths such as "to_q" or "mid_block.*.conv1", where * stands for any letters.
    seed: of `down`, which is N(0, 1 / inputs).

    down, up: by the layer's path with / for its dots. Linear (r, inputs) and (outputs, r); convolution (groups r,
    inputs / groups, *kernel) and (outputs, r, 1, ...), each group of channels with a change of its own.
    identity: a number of base and scale, by which a checkpoint of another adapter is refused.
    Raises ValueError for a target that matches no such layer.
    """

    def __init__(
        self,
        base: nn.Module,
        rank: int = 16,
        alpha: float | None = None,
        targets: str | Sequence[str] = "attention",
        seed: int = 0,
    ):
        super().__init__()
        object.__setattr__(self, "base", base.requires_grad_(False))  # set as an attribute it would be a child
        self.rank, self.alpha = rank, float(rank if alpha is None else alpha)
        self.targets = (targets,) if isinstance(targets, str) else tuple(targets)
        self.down, self.up, self.extras = nn.ParameterDict(), nn.ParameterDict(), nn.ModuleDict()
        for path, layer in find_layers(base, self.targets).items():
            key = path.replace(".", "/")
            down, up = _new_factors(layer, rank, fold(seed, path))
            self.down[key], self.up[key] = nn.Parameter(down), nn.Parameter(up)
            if all(hook.args != (key,) for hook in _hooks(layer).values()):
                layer.register_forward_hook(partial(_add, key))
        self.register_buffer("identity", torch.tensor(fold(fingerprint(base), str(self.scale))))

    def add_extra(self, *names: str) -> Lora:
        """Gives the adapter further scalars, by name, which its base does not take; see `Denoiser.add_extra`."""
        width = self.base.backbone.time_width if names else 0
        self.extras.update({name: ScalarEmbedding(width) for name in names})
        return self

    @property
    def scale(self) -> float:
        """Factor on up down x."""
        return self.alpha / self.rank

    @property
    def layers(self) -> dict[str, nn.Module]:
        """The base's adapted layers by the names of their factors."""
        return {key: self.base.get_submodule(key.replace("/", ".")) for key in self.down}

    def change(self, key: str, layer: nn.Module, x: Tensor) -> Tensor:
        """Change of a layer's output for the input x, in the precision of x."""
        down, up = self.down[key].to(x.dtype), self.up[key].to(x.dtype)
        if isinstance(layer, nn.Linear):
            return F.linear(self.scale * F.linear(x, down), up)
        conv = (F.conv1d, F.conv2d, F.conv3d)[up.ndim - 3]
        return conv(self.scale * layer._conv_forward(x, down, None), up, groups=layer.groups)

    @torch.no_grad()
    def weight_change(self, key: str, layer: nn.Module) -> Tensor:
        """Change of a layer's weight, float64, in the weight's shape."""
        groups = getattr(layer, "groups", 1)
        down = self.down[key].double().flatten(1).unflatten(0, (groups, -1))
        up = self.up[key].double().flatten(1).unflatten(0, (groups, -1))
        return self.scale * (up @ down).reshape(layer.weight.shape)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        with using(self):
            return self.base(*args, **kwargs)

    def on(self, base: nn.Module) -> Lora:
        """A copy with the same factors on a copy of the base."""
        return deepcopy(self, {id(self.base): base})

    def __deepcopy__(self, memo: dict[int, Any]) -> Lora:
        memo.setdefault(id(self.base), self.base)
        new = self.__class__.__new__(self.__class__)
        memo[id(self)] = new
        new.__dict__.update(deepcopy(self.__dict__, memo))
        return new

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("_") or "base" not in self.__dict__:
                raise
            return getattr(self.__dict__["base"], name)


def _add(key: str, layer: nn.Module, args: tuple[Any, ...], out: Tensor) -> Tensor | None:
    """Forward hook of an adapted layer."""
    adapter = _ACTIVE.get()
    if adapter is None or key not in adapter.down:
        return None
    return out + adapter.change(key, layer, args[0]).to(out.dtype)


def _hooks(layer: nn.Module) -> dict[int, partial]:
    return {number: hook for number, hook in layer._forward_hooks.items() if getattr(hook, "func", None) is _add}


def _remove_hooks(net: nn.Module) -> None:
    for module in net.modules():
        for number in _hooks(module):
            del module._forward_hooks[number]


def _new_factors(layer: nn.Module, rank: int, seed: int) -> tuple[Tensor, Tensor]:
    weight, groups = layer.weight, getattr(layer, "groups", 1)
    inputs = math.prod(weight.shape[1:])
    rank = min(rank, inputs, weight.shape[0] // groups)
    down = torch.randn(groups * rank, *weight.shape[1:], generator=torch.Generator().manual_seed(seed))
    up = torch.zeros(weight.shape[0], rank, *[1] * (weight.ndim - 2))
    device = "cpu" if weight.is_meta else weight.device  # of a base that is still to be filled
    return (down / math.sqrt(inputs)).to(device), up.to(device)


# Which layers


def find_layers(base: nn.Module, targets: Sequence[str]) -> dict[str, nn.Module]:
    """The layers that `targets` name, by path, in the order of the base; see `Lora`. Raises ValueError."""
    layers = {path: layer for path, layer in base.named_modules() if path and isinstance(layer, LAYERS)}
    paths: set[str] = set()
    for target in targets:
        patterns: Sequence[str] = (target,)
        if target == "all":
            patterns = ("*",)
        elif target == "attention":
            patterns = getattr(getattr(base, "backbone", base), "attention_layers", ())
        matched = {path for path in layers if any(_has_suffix(path, pattern) for pattern in patterns)}
        if not matched:
            raise ValueError(_no_match(base, target, layers))
        paths |= matched
    if not paths:
        raise ValueError("targets: none given; name layers, or give attention or all")
    return {path: layer for path, layer in layers.items() if path in paths}


def _has_suffix(path: str, pattern: str) -> bool:
    return fnmatchcase(f".{path}", f"*.{pattern}")


def _no_match(base: nn.Module, target: str, layers: dict[str, nn.Module]) -> str:
    if target == "attention":
        return "targets: attention, but this network names no attention projections; name layers, or give all"
    others = {path: module for path, module in base.named_modules() if path and _has_suffix(path, target)}
    if others:
        path, module = next(iter(others.items()))
        below = f"; {target}.* names those in it" if any(_has_suffix(path, f"{target}.*") for path in layers) else ""
        return (
            f"targets: {target!r} matches {path}, a {type(module).__name__}; only linear and convolution layers are "
            f"adapted{below}"
        )
    ends = {".".join(path.split(".")[-1 - target.count(".") :]) for path in layers}
    short = {_short(path) for path in layers}
    near = difflib.get_close_matches(target, sorted(ends | short), n=3)
    names = f"nearest: {', '.join(near)}" if near else f"layer paths here end in {', '.join(sorted(short))}"
    return f"targets: {target!r} matches no linear or convolution layer; {names}"


def _short(path: str) -> str:
    """The path's last name with what follows it: "to_out.0" of "mid.attentions.0.to_out.0"."""
    parts = path.split(".")
    last = max((i for i, part in enumerate(parts) if not part.isdigit()), default=0)
    return ".".join(parts[last:])


@torch.no_grad()
def fingerprint(base: nn.Module) -> int:
    """A 63-bit number that tells networks apart: of the names, shapes and first 256 values of all parameters.

    Values count as bfloat16, so that a network that is stored so has the number of its float32 original. A network
    that is still to be filled has the number of its files; one without values has the number 0.
    """
    unread, digest = unread_of(base), hashlib.blake2b(digest_size=8)
    for name, value in base.named_parameters():
        if isinstance(value, FakeTensor) or (value.is_meta and name not in unread):
            return 0
        first = first_values(unread[name], 256) if value.is_meta else value.detach().flatten()[:256]
        first = first.to("cpu", torch.bfloat16)
        digest.update(f"{name} {tuple(value.shape)}".encode() + first.view(torch.int16).numpy().tobytes())
    return int.from_bytes(digest.digest(), "little") >> 1


# Merging


@torch.no_grad()
def merge(adapter: Lora, *inputs: Any, tolerance: float = TOLERANCE) -> nn.Module:
    """A copy of the base with the adapter's change in its weights and its further scalars, and no hooks of adapters.

    inputs: of one pass, on which the copy must give the adapter's output, a tensor, when both compute in float32.
    tolerance: of the largest difference, in units of the largest output or of 1. The adapter is whole, not sharded.
    Raises ValueError for a network that a changed weight does not reach as the adapter does, such as one whose layers
    share a weight.
    """
    exact = deepcopy(adapter.base).float()
    expected = adapter.on(exact)(*inputs)
    _remove_hooks(exact)
    for key in adapter.down:
        layer = exact.get_submodule(key.replace("/", "."))
        layer.weight.copy_(layer.weight.double() + adapter.weight_change(key, layer))
    difference = (exact(*inputs) - expected).abs().max().item()
    if not difference <= tolerance * max(1.0, expected.abs().max().item()):
        raise ValueError(
            f"adapter: merged into its base it gives outputs that differ by {difference:.3g}, above {tolerance:g}; "
            "layers that share a weight, or a weight that is used without its layer, cannot be merged"
        )
    net = deepcopy(adapter.base)  # in the base's own precision
    net.load_state_dict(exact.state_dict())
    _remove_hooks(net)
    if adapter.extras:
        net.extras.update(deepcopy(adapter.extras))
    return net


# Files


def save_adapter(adapter: Lora, path: str | Path) -> None:
    """Writes the factors as safetensors; the file's metadata have rank, alpha, targets and names of further scalars."""
    from safetensors.torch import save_file

    tensors = {key: value.detach().cpu().contiguous() for key, value in adapter.state_dict().items()}
    settings = {"rank": adapter.rank, "alpha": adapter.alpha, "targets": adapter.targets}
    settings |= {"extra": list(adapter.extras)}
    save_file(tensors, path, {"lora": json.dumps(settings)})


def open_adapter(base: nn.Module, path: str | Path) -> Lora:
    """The adapter of `base` in a file of `save_adapter`. Raises ValueError for another base and for a damaged file."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            settings = json.loads((file.metadata() or {})["lora"])
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - it is no mapping
        extra = settings.pop("extra", ())
        adapter = Lora(base, **settings).add_extra(*extra)
        if not torch.equal(tensors["identity"], adapter.identity.cpu()):
            raise ValueError("its factors were trained on another network; open them with that one")
        adapter.load_state_dict(tensors)
    except KeyError:
        raise ValueError(f"{path}: no adapter; its metadata has no 'lora'") from None
    except (OSError, SafetensorError, RuntimeError, ValueError) as error:
        raise ValueError(f"{path}: {' '.join(str(error).split())[:300]}") from None
    return adapter
