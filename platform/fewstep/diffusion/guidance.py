"""Classifier-free guidance (Ho & Salimans 2022, arXiv:2207.12598) as a function of any denoiser."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .level import Level


def guided(
    denoise: Callable[..., Tensor], x_t: Tensor, level: Level, cond: Any, scale: float | Tensor = 1.0, null: Any = None
) -> Tensor:
    """x0 = uncond + scale (cond - uncond) (B, ...), both from one call on 2B samples.

    Linear in x0, hence equal to guidance on eps, v or F.
    denoise: (x_t, level, cond) -> x0. scale: a number, or (B,) with one scale a sample; the number 1 is one plain call
    on B samples. null: the condition that stands for none, as `Conditions.null` gives it.
    Raises ValueError for a scale without a null condition.
    """
    if not isinstance(scale, Tensor) and scale == 1:
        return denoise(x_t, level, cond)
    if null is None:
        shown = "a scale a sample" if isinstance(scale, Tensor) else f"{scale:g}"
        raise ValueError(f"guidance: {shown}, but this network has no null class or null text; use guidance=1")
    x0, x0_null = both(denoise, x_t, level, cond, null)
    if isinstance(scale, Tensor):
        scale = scale.view(-1, *[1] * (x0.ndim - 1)).to(x0.dtype)
    return x0_null + scale * (x0 - x0_null)


def both(denoise: Callable[..., Tensor], x_t: Tensor, level: Level, cond: Any, null: Any) -> tuple[Tensor, Tensor]:
    """x0 (B, ...) with the condition and without, from one call on 2B samples."""
    twice = level.map(lambda v: torch.cat([v.expand(len(x_t), *v.shape[1:])] * 2))
    return denoise(torch.cat([x_t, x_t]), twice, join(cond, null)).chunk(2)


def join(a: Any, b: Any) -> Any:
    """Two conditions as one, the samples of `a` before those of `b`; a `b` of one sample is repeated."""
    if isinstance(a, dict):
        return {key: join(a[key], b[key]) for key in a}
    return torch.cat([a, b.expand(a.shape) if b.shape[0] == 1 else b])


def choose(which: Tensor, a: Any, b: Any) -> Any:
    """For each sample the condition of `a` where `which` (B,) is true, else that of `b`."""
    if isinstance(b, dict):
        return {key: choose(which, a[key], b[key]) for key in b}
    return torch.where(which.view(-1, *[1] * (b.ndim - 1)), a, b)
