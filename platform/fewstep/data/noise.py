"""Noise by number: a row keeps the number, and the noise is made again wherever it is read, on any machine."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from fewstep.data.plan import mix


def noise(numbers: np.ndarray, shape: tuple[int, ...]) -> Tensor:
    """N(0, I) of each number: (n,) int64 -> (n, *shape) float32, by Box and Muller's transform of `mix`."""
    values = math.prod(shape)
    hashes = [mix(numbers[:, None], half, np.arange(-(-values // 2))) for half in (0, 1)]
    u, v = ((h >> np.uint64(11)) * 2.0**-53 for h in hashes)
    radius, angle = np.sqrt(-2 * np.log1p(-u)), 2 * math.pi * v
    z = np.concatenate([radius * np.cos(angle), radius * np.sin(angle)], 1)[:, :values]
    return torch.from_numpy(z.astype(np.float32)).view(len(numbers), *shape)
