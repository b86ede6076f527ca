"""Distances between images by a network's features."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


def clean_maps(denoiser: Any, x: Tensor, cond: Any, at: tuple[str, ...]) -> tuple[Tensor, ...]:
    """A denoiser's maps at the taps `at` of clean images x (B, ...), at a tenth of its ramp, where noise is faint."""
    t = denoiser.schedule.ramp(torch.full((len(x),), 0.1, dtype=torch.float64, device=x.device))
    return denoiser(x, denoiser.schedule.level(t, x.ndim), cond, "features", at=at)


def feature_distance(a: tuple[Tensor, ...], b: tuple[Tensor, ...]) -> Tensor:
    """LPIPS without its learned weights (Zhang et al. 2018), of maps (B, F, h, w) pair by pair.

    Features are scaled to norm 1 at each place; squared differences are summed over them and averaged over the rest.
    """
    each = [(F.normalize(f) - F.normalize(g)).square().sum(1).mean() for f, g in zip(a, b, strict=True)]
    return torch.stack(each).mean()
