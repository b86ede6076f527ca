"""The forward process from an intermediate level s to a noisier one t (Phased DMD, Fan et al. 2025, arXiv:2510.27684).

x_t = alpha x_s + sigma eps. If x_s has the marginal density of its level, so has x_t.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .draws import INDICES
from .level import Level
from .samplers import calls_at
from .schedules import Schedule


def level_at(schedule: Schedule, index: int, like: Tensor) -> Level:
    """Level at a thousandth of the schedule's ramp for each sample of `like` (B, ...); at 0 it is clean."""
    if index:
        (call,) = calls_at(schedule, (index / (INDICES - 1),), on_ramp=True)
        return call.level(like)
    one = torch.ones(len(like), *[1] * (like.ndim - 1), device=like.device)
    return Level(one, torch.zeros_like(one))


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

    @property
    def spread(self) -> Tensor:
        """Standard deviation (sigma_s / alpha_s) (sigma_t / sigma) of the x0 target about clean data.

        The target is x0 + n with n ~ N(0, spread^2) independent of both, x0 and x_t: where alpha is 1, n = sigma_s e -
        sigma_s^2 / sigma eps, and its covariance with the noise sigma_s e + sigma eps in x_t is sigma_s^2 - sigma_s^2.
        No network can learn n, so the loss keeps its variance, which is 0 with s clean and grows without bound as t
        nears s.
        """
        return self.s.sigma / self.s.alpha * self.t.sigma / self.sigma

    def weight(self, target: Callable[[Level, Tensor, Tensor], Tensor]) -> Tensor:
        """Weight of a network's mean squared error at t that gives its target the variance of clean data's, at most.

        target: of the network (`Denoiser.target`). The variance of n in the network's own output is added to 1, which
        is what EDM's preconditioning makes of clean data's (Karras et al. 2022, appendix B.6), and divided out.
        With s clean it is 1; as t nears s it falls as sigma^2, as the published min(1, 10 sigma^2) of a flow does.
        """
        n = target(self.t, self.spread, -self.t.alpha / self.t.sigma * self.spread)  # moves x0 and eps, and not x_t
        return 1 / (1 + n**2)
