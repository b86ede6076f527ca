"""Running averages of weights: the network people sample from."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Exponential:
    """decay^updates, ramped up by min(decay, (1 + n) / (10 + n)) so that early weights are forgotten."""

    decay: float

    def at(self, update: int) -> float:
        return min(self.decay, (1 + update) / (10 + update))


@dataclass(frozen=True)
class Power:
    """The power-function profile of EDM2 (Karras et al. 2024, eq. 121): its length grows with training.

    std: relative width of the profile, in (0, 0.28); 0.05 and 0.1 are usual.
    """

    std: float

    @property
    def gamma(self) -> float:
        """The positive root of (g + 1) / ((g + 2)^2 (g + 3)) = std^2, by bisection: decreasing in g."""
        low, high = 0.0, 1e6
        for _ in range(200):
            g = (low + high) / 2
            low, high = (g, high) if (g + 1) / ((g + 2) ** 2 * (g + 3)) > self.std**2 else (low, g)
        return low

    def at(self, update: int) -> float:
        return (1 - 1 / (update + 1)) ** (self.gamma + 1)


Profile = Exponential | Power


@torch.no_grad()
def average(into: nn.Module, net: nn.Module, decay: float | Tensor) -> None:
    """into <- decay into + (1 - decay) net, parameters and floating buffers; in one fused call, sharded or not."""
    pairs = list(zip(_state(into), _state(net), strict=True))
    torch._foreach_lerp_([p for p, _ in pairs], [q for _, q in pairs], 1 - decay)


def _state(net: nn.Module) -> Iterable[Tensor]:
    yield from (p.data for p in net.parameters())
    yield from (b for b in net.buffers() if b.is_floating_point())
