"""Frequencies and edges of images."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def _radius(x: Tensor) -> Tensor:
    """Frequency in cycles a pixel of each bin of `rfft2`, 0 to 0.71, (H, W // 2 + 1)."""
    rows = torch.fft.fftfreq(x.shape[-2], device=x.device)
    columns = torch.fft.rfftfreq(x.shape[-1], device=x.device)
    return torch.hypot(rows[:, None], columns)


def high_pass(x: Tensor, cut: float = 0.125, pad: int = 8) -> Tensor:
    """Images (B, C, H, W) without what is slower than `cut` cycles a pixel, by the soft mask 1 - exp(-(f / cut)^2 / 2).

    A sharp mask would ring. pad: mirrored pixels around the image, so that its ends do not meet.
    """
    pad = min(pad, x.shape[-1] - 1, x.shape[-2] - 1)
    wide = F.pad(x, (pad,) * 4, mode="reflect")
    mask = 1 - torch.exp(-0.5 * (_radius(wide) / cut) ** 2)
    wide = torch.fft.irfft2(mask * torch.fft.rfft2(wide), s=wide.shape[-2:])
    return wide[..., pad : wide.shape[-2] - pad, pad : wide.shape[-1] - pad]


def edges(x: Tensor) -> Tensor:
    """Length of the gradient of brightness (mean of channels) by Sobel's filters: (B, C, H, W) -> (B, 1, H, W)."""
    grey = F.pad(x.mean(1, keepdim=True), (1,) * 4, mode="replicate")
    sobel = torch.tensor([[-1.0, 0.0, 1.0], [-2.0, 0.0, 2.0], [-1.0, 0.0, 1.0]], device=x.device) / 8
    both = F.conv2d(grey, torch.stack([sobel, sobel.T])[:, None])
    return (both.square().sum(1, keepdim=True) + 1e-6).sqrt()


def high_energy(x: Tensor, cut: float = 0.125) -> Tensor:
    """Mean square of `high_pass`, 0-d: two sets of images are compared by the ratio of theirs."""
    return high_pass(x, cut).square().mean()
