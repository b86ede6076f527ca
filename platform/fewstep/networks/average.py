"""Running averages of weights: the network people sample from."""

from __future__ import annotations

from collections.abc import Iterable
from copy import deepcopy
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Constant:
    """decay at every update; in [0, 1)."""

    decay: float

    def decay_at(self, update: int) -> float:
        return self.decay


@dataclass(frozen=True)
class Exponential:
    """decay^updates, ramped up by min(decay, (1 + n) / (10 + n)) so that early weights are forgotten.

    decay: in [0, 1). n counts updates from 0.
    """

    decay: float

    def decay_at(self, update: int) -> float:
        return min(self.decay, (1 + update) / (10 + update))


@dataclass(frozen=True)
class Power:
    """The power-function profile of EDM2 (Karras et al. 2024, section 3.1): weights at time t count as t^gamma.

    Its length grows with training: after T updates, update t has the weight (t^(gamma + 1) - (t - 1)^(gamma + 1)) /
    T^(gamma + 1) exactly, and the first replaces the initial weights.
    std: standard deviation of the profile over training time, in (0, 12^-0.5); 0.05 and 0.1 are usual.
    """

    std: float

    @cached_property
    def gamma(self) -> float:
        """The root of (g + 1) / ((g + 2)^2 (g + 3)) = std^2 in g > 0, where the left side decreases; by bisection."""
        low, high = 0.0, 1e6
        for _ in range(200):
            g = (low + high) / 2
            low, high = (g, high) if (g + 1) / ((g + 2) ** 2 * (g + 3)) > self.std**2 else (low, g)
        return low

    def decay_at(self, update: int) -> float:
        return (1 - 1 / (update + 1)) ** (self.gamma + 1)


Profile = Constant | Exponential | Power


@torch.no_grad()
def average(into: nn.Module, net: nn.Module, decay: float) -> None:
    """into <- decay into + (1 - decay) net, parameters and floating buffers; in one fused call a device.

    Sharded or not, as long as both are laid out alike: each rank averages its own part. `into` may live on the CPU and
    `net` on a device; the copy is then what the step waits for.
    """
    pairs: dict[torch.device, list[tuple[Tensor, Tensor]]] = {}
    for p, q in zip(_state(into), _state(net), strict=True):
        pairs.setdefault(p.device, []).append((p, q.to(p.device)))
    for together in pairs.values():
        torch._foreach_lerp_([p for p, _ in together], [q for _, q in together], 1 - decay)


def _state(net: nn.Module) -> Iterable[Tensor]:
    """This rank's part of what is averaged, as plain tensors."""
    for p in net.parameters():
        yield p.to_local() if hasattr(p, "to_local") else p.data
    yield from (b for b in net.buffers() if b.is_floating_point())


@torch.no_grad()
def between(one: nn.Module, other: nn.Module, share: float) -> nn.Module:
    """A network whose weights are share * one + (1 - share) * other. Raises ValueError for networks that differ."""
    shapes = [{name: value.shape for name, value in net.state_dict().items()} for net in (one, other)]
    if shapes[0] != shapes[1]:
        raise ValueError("second: its network has other weights than the first one's; give runs of one teacher")
    net = deepcopy(one)
    for p, q in zip(net.parameters(), other.parameters(), strict=True):
        p.lerp_(q, 1 - share)
    return net
