"""Noise levels, and their mathematics without a network.

Every process here is Gaussian and affine: x_t = alpha x0 + sigma eps with eps ~ N(0, I). Two levels with one angle
atan2(sigma, alpha) hold the same information (equal signal-to-noise ratio) and differ by a scale only, so a network
trained on one schedule answers on every other.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .schedules import Schedule


@dataclass(frozen=True)
class Level:
    """A batch of noise levels. alpha, sigma: (B, 1, ..., 1) float32, broadcastable to the data.

    schedule, t: the schedule that made it, and its time there, (B,) float64; None for a level of unknown origin. A
    network of that schedule is asked at t itself, which no rounding to alpha and sigma has touched.
    """

    alpha: Tensor
    sigma: Tensor
    schedule: Schedule | None = None
    t: Tensor | None = None

    def map(self, f: Callable[[Tensor], Tensor]) -> Level:
        """The level of other rows: f takes them from alpha, sigma and t alike."""
        return Level(f(self.alpha), f(self.sigma), self.schedule, None if self.t is None else f(self.t))

    @property
    def angle(self) -> Tensor:
        """Signal-to-noise ratio as an angle in [0, pi/2], 0 is clean and pi/2 pure noise. (B, 1, ..., 1) float64.

        In float64 because near pure noise tan(angle) magnifies rounding by 1 / cos^2: 6400 times at EDM's sigma 80.
        """
        return torch.atan2(self.sigma.double(), self.alpha.double())

    @property
    def norm(self) -> Tensor:
        """sqrt(alpha^2 + sigma^2): the scale by which levels of one angle differ. (B, 1, ..., 1)"""
        return torch.hypot(self.alpha, self.sigma)

    @property
    def start(self) -> Tensor:
        """Factor on unit noise with which a sampler begins at this level, as published. (B, 1, ..., 1)

        Where alpha is 1 it is sigma, as EDM begins at 80 z. Elsewhere it is the norm, as a variance-preserving
        schedule begins at z itself.
        """
        return torch.where(self.alpha == 1, self.sigma, self.norm)

    def noise(self, x0: Tensor, eps: Tensor) -> Tensor:
        """x_t = alpha x0 + sigma eps, all (B, ...)."""
        return self.alpha * x0 + self.sigma * eps

    def eps(self, x_t: Tensor, x0: Tensor) -> Tensor:
        """The noise in x_t when its clean image is x0; needs sigma > 0."""
        return (x_t - self.alpha * x0) / self.sigma

    def score(self, x_t: Tensor, x0: Tensor) -> Tensor:
        """Score of the noised density at x_t when x0 = E[x0 | x_t] (Tweedie's formula); needs sigma > 0."""
        return (self.alpha * x0 - x_t) / self.sigma**2

    def step(self, x_t: Tensor, x0: Tensor, to: Level) -> Tensor:
        """One deterministic step to another level (DDIM, Song et al. 2021, eq. 12 with eta = 0)."""
        return to.noise(x0, self.eps(x_t, x0))


def boundary(t: Tensor, data_std: float = 0.5, scale: float = 10.0) -> tuple[Tensor, Tensor]:
    """(c_skip, c_out) of a consistency function c_skip x_t + c_out x0 that is x_t itself at t = 0 (Song et al. 2023).

    t: a DDPM time, (B,) or (B, 1, ..., 1). scale: LCM's factor on it (Luo et al. 2023), with which the function is the
    network's x0 at all but the first steps.
    """
    var = (scale * t) ** 2 + data_std**2
    return data_std**2 / var, scale * t / var.sqrt()


def _edm(alpha: Tensor, sigma: Tensor, data_std: float) -> tuple[Tensor, Tensor]:
    var = (alpha * data_std) ** 2 + sigma**2
    return alpha * data_std**2 / var, sigma * data_std / var.sqrt()


def _edm_target(alpha: Tensor, sigma: Tensor, data_std: float) -> tuple[Tensor, Tensor]:
    root = ((alpha * data_std) ** 2 + sigma**2).sqrt()
    return sigma / (data_std * root), -alpha * data_std / root


# What a network may predict, as (c_skip, c_out) with x0 = c_skip x_t + c_out F(x_t). `data_std` matters to EDM only.
PREDICTIONS: dict[str, Callable[[Tensor, Tensor, float], tuple[Tensor, Tensor]]] = {
    "x0": lambda a, s, d: (torch.zeros_like(a), torch.ones_like(a)),
    "eps": lambda a, s, d: (1 / a, -s / a),
    "v": lambda a, s, d: (a / (a**2 + s**2), -s / (a**2 + s**2)),  # v = alpha eps - sigma x0
    "flow": lambda a, s, d: (1 / (a + s), -s / (a + s)),  # u = eps - x0
    "edm": _edm,  # Karras et al. 2022, table 1
}

# The same network's training target, as its parts: F* = of_x0 x0 + of_eps eps. It is (x0 - c_skip x_t) / c_out without
# the division, which near t = 0 is a quotient of two small differences. As |F - F*|^2 = |D - x0|^2 / c_out^2, to choose
# a prediction is to choose a weight on x0.
TARGETS: dict[str, Callable[[Tensor, Tensor, float], tuple[Tensor | float, Tensor | float]]] = {
    "x0": lambda a, s, d: (1.0, 0.0),
    "eps": lambda a, s, d: (0.0, 1.0),
    "v": lambda a, s, d: (-s, a),
    "flow": lambda a, s, d: (-1.0, 1.0),
    "edm": _edm_target,
}
