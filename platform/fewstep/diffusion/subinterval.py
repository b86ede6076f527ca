"""The forward process from an intermediate level s to a noisier one t (Phased DMD, Fan et al. 2025, arXiv:2510.27684).

x_t = alpha x_s + sigma eps. If x_s has the marginal density of its level, so has x_t.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from .level import Level


@dataclass(frozen=True)
class Kernel:
    """The kernel from level s to level t, t noisier than s; both (B, 1, ..., 1)."""

    s: Level
    t: Level

    @property
    def alpha(self) -> Tensor:
        """Factor on x_s."""
        return self.t.alpha / self.s.alpha

    @property
    def sigma(self) -> Tensor:
        """Factor on the noise."""
        return (self.t.sigma**2 - (self.alpha * self.s.sigma) ** 2).sqrt()

    def noise(self, x_s: Tensor, eps: Tensor) -> Tensor:
        """x_t (B, ...) of x_s and unit noise eps."""
        return self.alpha * x_s + self.sigma * eps

    def targets(self, x_s: Tensor, eps: Tensor) -> tuple[Tensor, Tensor]:
        """(x0, eps) (B, ...) to train a denoiser with at x_t: their means given x_t are those of clean data.

        They follow from the score of x_t given x_s, -eps / sigma, and make x_t = alpha_t x0 + sigma_t eps, so that each
        prediction's own target is made of them. With s clean they are x_s and eps.
        """
        x0 = x_s / self.s.alpha - self.t.alpha * self.s.sigma**2 / (self.s.alpha**2 * self.sigma) * eps
        return x0, self.t.sigma / self.sigma * eps

    def weight(self, most: float = 10.0) -> Tensor:
        """min(1, most rho^2), rho = sigma / sigma_t: the targets' variance grows without bound as t nears s."""
        return (most * (self.sigma / self.t.sigma) ** 2).clamp(max=1.0)
