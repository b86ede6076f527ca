"""One-step diffusion models with f-divergence distribution matching. Xu et al. 2025, arXiv:2502.15681."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, field_validator
from torch import Tensor
from torch.nn import functional as F

from .base import Batch, Make, Nets, Phase, Terms
from .dmd2 import DMD2

# h(r) = r^2 f''(r) of r = p_data / p_student (table 1), constants left out: the batch normalisation cancels them.
H = {
    "softened_reverse_kl": lambda r: 1 / (r + 1),
    "js": lambda r: r / (r + 1),
    "hellinger": lambda r: r.sqrt(),
    "kl": lambda r: r,
    "jeffreys": lambda r: r + 1,
    "neyman": lambda r: 1 / r,
}


class FDistill(DMD2):
    """DMD2 whose matching gradient is weighted by h(r), r read off the discriminator (eq. 9).

    Weights, clamp and normalisation are read in the published code. Departs from it: with `bins`, r is divided by the
    bins' means of the updates before, not of this one too, and bins are equal in the level's angle; no R1.
    """

    name: Literal["f_distill"] = "f_distill"
    divergence: Literal["reverse_kl", "softened_reverse_kl", "js", "hellinger", "kl", "jeffreys", "neyman"] = "js"
    """reverse_kl is DMD2, bit for bit."""
    ratio: tuple[float, float] = (0.1, 20.0)
    """r is clamped here: a discriminator's tails are no estimate."""
    bins: Annotated[int, Field(ge=0, le=100)] = 0
    """Bins of the noise level in which r is divided by its running mean; the published code has 10, 0 divides by none.
    """
    bin_decay: Annotated[float, Field(ge=0, lt=1)] = 0.5
    """Decay of the bins' means a student update."""

    @field_validator("ratio")
    @classmethod
    def _ratio(cls, ratio: tuple[float, float]) -> tuple[float, float]:
        if not 0 < ratio[0] < ratio[1]:
            raise ValueError("give two positive numbers, the lower one first")
        return ratio

    @property
    def is_weighted(self) -> bool:
        return self.divergence != "reverse_kl"

    def nets(self, make: Make) -> dict[str, Any]:
        nets = super().nets(make)
        if self.is_weighted and self.bins:  # buffers of a trained role, so that checkpoints hold them
            for name in ("bin_means", "next_bin_means"):
                nets["disc"].register_buffer(name, torch.ones(self.bins))
        return nets

    def phases(self) -> tuple[Phase, ...]:
        student, critic = super().phases()
        return replace(student, measure=self.measure if self.is_weighted and self.matching_weight else None), critic

    def bin(self, angle: Tensor) -> Tensor:
        """One-hot bins (B, bins) of noise levels with these angles (B,)."""
        number = (angle / (math.pi / 2) * self.bins).long().clamp(max=self.bins - 1)
        return F.one_hot(number, self.bins).float()

    def measure(self, nets: Nets, batch: Batch) -> tuple[Terms, Terms]:
        """The matching term and its weight h (B,), whose mean is taken over the global batch."""
        match, means = super().matching(nets, batch), {}
        r = nets["disc"](match.pop("features")).exp().clamp(*self.ratio)
        if self.bins:
            here = self.bin(match["angle"])
            for k in range(self.bins):
                means |= {f"in/{k}": here[:, k].mean(), f"r/{k}": (here[:, k] * r).mean()}
            r = r / (here @ nets["disc"].bin_means)
        h = H[self.divergence](r)
        return {"weight": h.mean()} | means, match | {"weight": h}

    def matching(self, nets: Nets, batch: Batch) -> Terms:
        if not self.is_weighted:
            return super().matching(nets, batch)
        shared, h = batch.made, batch.made["weight"] / batch.made["mean/weight"]
        if self.bins:
            share, r = (torch.stack([shared[f"mean/{what}/{k}"] for k in range(self.bins)]) for what in ("in", "r"))
            old, disc = nets["disc"].bin_means, nets["disc"]
            new = self.bin_decay * old + (1 - self.bin_decay) * r / share
            disc.next_bin_means.copy_(torch.where(share > 0, new, old))
        gradient = shared["gradient"] * h.view(-1, *[1] * (batch.x.ndim - 1))
        return {"gradient": gradient, "normaliser": shared["normaliser"]}

    def after(self, nets: Nets, phase: Phase, step: int) -> None:
        if phase.name == "student" and self.is_weighted and self.bins:
            nets["disc"].bin_means.copy_(nets["disc"].next_bin_means)
