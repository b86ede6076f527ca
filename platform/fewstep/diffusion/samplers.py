"""Samplers: free functions over one signature, denoise(x_t, level, cond) -> x0.

`z` is unit noise (B, ...); every sampler scales it to its first level. None clamps: what leaves is the model's own x0.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .level import Level
from .schedules import EDM, Schedule

Denoise = Callable[[Tensor, Level, Tensor | None], Tensor]


def _levels(schedule: Schedule, steps: int, like: Tensor) -> list[Level]:
    u = torch.linspace(1, 0, steps, dtype=torch.float64, device=like.device)
    return [schedule.level(schedule.ramp(v.expand(like.shape[0])), like.ndim) for v in u]


def heun(denoise: Denoise, z: Tensor, cond: Tensor | None = None, steps: int = 18, schedule: Schedule | None = None):
    """Heun's second-order solver of the probability-flow ODE (Karras et al. 2022, algorithm 1 without churn).

    schedule: gives the ramp of levels, EDM's unless said; alpha > 0 on all of it. The network's own may be another.
    Takes 2 steps - 1 network calls; returns x0 (B, ...).
    """
    levels = _levels(schedule or EDM(), steps, z)
    x = z * levels[0].norm
    for level, to in zip(levels, levels[1:], strict=False):
        x0 = denoise(x, level, cond)
        guess = level.step(x, x0, to)
        # the ODE is d(x / alpha) = eps d(sigma / alpha): Heun averages eps over both ends of the step
        eps = 0.5 * (level.eps(x, x0) + to.eps(guess, denoise(guess, to, cond)))
        x = to.alpha * (x / level.alpha + (to.sigma / to.alpha - level.sigma / level.alpha) * eps)
    return denoise(x, levels[-1], cond)  # the step to sigma = 0 lands on x0 and has no correction


def ddim(denoise: Denoise, z: Tensor, cond: Tensor | None = None, steps: int = 50, schedule: Schedule | None = None):
    """First-order deterministic sampler (Song et al. 2021); `steps` network calls; returns x0 (B, ...)."""
    levels = _levels(schedule or EDM(), steps, z)
    x = z * levels[0].norm
    for level, to in zip(levels, levels[1:], strict=False):
        x = level.step(x, denoise(x, level, cond), to)
    return denoise(x, levels[-1], cond)


def few_step(denoise: Denoise, z: Tensor, cond: Tensor | None, levels: Sequence[Level], noise: Sequence[Tensor] = ()):
    """Denoise, noise again to the next level with fresh noise, and so on (DMD2, section 4.4; consistency models).

    levels: N levels from noise to clean; the first is entered with z times its norm, so with z itself on a
    variance-preserving schedule (EDM's 80 becomes 80.006). noise: N - 1 tensors like z. N network calls; returns x0.
    """
    x = z * levels[0].norm
    for level, to, eps in zip(levels, levels[1:], noise, strict=False):
        x = to.noise(denoise(x, level, cond), eps)
    return denoise(x, levels[-1], cond)


def to_uint8(x: Tensor) -> Tensor:
    """Images in [-1, 1] as uint8 (N, C, H, W), clamped and rounded to nearest."""
    return ((x.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
