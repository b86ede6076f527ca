"""One-step diffusion models with f-divergence distribution matching. Xu et al. 2025, arXiv:2502.15681."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from pydantic import field_validator

from .base import Batch, Nets, Phase, Terms
from .dmd2 import DMD2

# h(r) = r^2 f''(r) of r = p_data / p_student (table 1), constants left out: the batch normalisation cancels them.
H = {
    "softened_reverse_kl": lambda r: 1 / (r + 1),
    "js": lambda r: r / (r + 1),
    "hellinger": lambda r: r.sqrt(),
    "kl": lambda r: r,
    "jeffreys": lambda r: r + 1,
}


class FDistill(DMD2):
    """DMD2 whose matching gradient is weighted by h(r), r read off the discriminator (eq. 9).

    Departs from the published code: r is not smoothed over bins of time.
    """

    name: Literal["f_distill"] = "f_distill"
    divergence: Literal["reverse_kl", "softened_reverse_kl", "js", "hellinger", "kl", "jeffreys"] = "js"
    """reverse_kl is DMD2, bit for bit."""
    ratio: tuple[float, float] = (0.1, 20.0)
    """r is clamped here: a discriminator's tails are no estimate."""

    @field_validator("ratio")
    @classmethod
    def _ratio(cls, ratio: tuple[float, float]) -> tuple[float, float]:
        if not 0 < ratio[0] < ratio[1]:
            raise ValueError("give two positive numbers, the lower one first")
        return ratio

    @property
    def weighs(self) -> bool:
        return self.divergence != "reverse_kl"

    def phases(self) -> tuple[Phase, ...]:
        student, critic = super().phases()
        return replace(student, measure=self.measure if self.weighs and self.matching_weight else None), critic

    def measure(self, nets: Nets, batch: Batch) -> tuple[Terms, Terms]:
        """The matching term and its weight h (B,), whose mean is taken over the global batch."""
        found = super().matching(nets, batch)
        h = H[self.divergence](nets["disc"](found.pop("features")).exp().clamp(*self.ratio))
        return {"weight": h.mean()}, found | {"weight": h}

    def matching(self, nets: Nets, batch: Batch) -> Terms:
        if not self.weighs:
            return super().matching(nets, batch)
        found, h = batch.made, batch.made["weight"] / batch.made["mean/weight"]
        gradient = found["gradient"] * h.view(-1, *[1] * (batch.x.ndim - 1))
        return {"gradient": gradient, "normaliser": found["normaliser"]}
