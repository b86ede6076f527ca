"""Directional derivatives of networks: the tangents of consistency models (Song et al. 2023; Lu & Song 2024)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from .schedules import Flow, Trig

TRIG = Trig(t_min=1e-3, t_max=1.5583)  # up to EDM's sigma 80
FLOW = Flow(t_min=1e-3, t_max=80 / 81)


@torch.no_grad()
def tangent(
    f: Callable[..., Tensor],
    at: Sequence[Tensor],
    along: Sequence[Tensor],
    how: Literal["forward", "difference"] = "forward",
    h: float = 1e-3,
) -> tuple[Tensor, Tensor]:
    """(f(at), its derivative along `along`), without a graph: d/ds f(at + s along) at s = 0.

    f: of len(at) tensors, to one tensor. along: like `at`, tensor by tensor. how:
    - "forward": forward-mode differentiation, exact. The arithmetic of two passes; small layers add to it (6 times the
      time of a pass for the shipped network on a CPU). It needs float32 blocks, or blocks stored in bfloat16, as those
      of a frozen network are; of a network in training bfloat16 is a cast, which it does not pass.
    - "difference": (f(at + h along) - f(at - h along)) / 2h. Three passes; the error is of order h^2, and of rounding /
      h, which in bfloat16 is as large as the derivative.
    Raises ValueError for another `how`.
    """
    at, along = tuple(at), tuple(along)
    if how == "forward":
        with sdpa_kernel(SDPBackend.MATH):  # the fused attention kernels have no forward mode
            return torch.func.jvp(f, at, along)
    if how != "difference":
        raise ValueError(f"how: {how!r} is not one of forward, difference")
    before, after = (f(*(a + s * b for a, b in zip(at, along, strict=True))) for s in (-h, h))
    return f(*at), (after - before) / (2 * h)


def velocity(denoise: Callable[..., Tensor], x: Tensor, t: Tensor, cond: Any) -> Tensor:
    """TrigFlow's F = dx/dt = cos t eps - sin t x0 (B, ...) of any denoiser, at x (B, ...) and angles t (B,) float64."""
    level = TRIG.level(t, x.ndim)
    return (level.alpha * x - denoise(x, level, cond)) / level.sigma


def flow_velocity(denoise: Callable[..., Tensor], x: Tensor, t: Tensor, cond: Any) -> Tensor:
    """The linear path's v = dx/dt = eps - x0 (B, ...) of any denoiser, at x (B, ...) and flow times t (B,) float64.

    Of a network that maps x to the path's end at t = 0, it is the mean velocity from there to t.
    """
    level = FLOW.level(t, x.ndim)
    return (x - denoise(x, level, cond)) / level.sigma
