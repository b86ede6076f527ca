"""GAN heads: features in, one logit a sample out."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def _groups(channels: int) -> int:
    """32 groups as published, where that leaves 16 channels to each; else fewer.

    On the closing 1 x 1 map a group is all there is to normalise: one channel comes out as a constant and two as signs,
    so that a narrow discriminator would have no gradient, or one of rare spikes.
    """
    return next((g for g in (32, 16, 8, 4, 2) if channels % g == 0 and channels // g >= 16), 1)


class Head(nn.Module):
    """DMD2's head: [conv 4x4 stride 2, GroupNorm, SiLU] to a map 4 wide or less, a conv that closes it, 1x1 to a logit.

    shapes: (channels, size, size) of each tap's map. at: the taps' names. Each tap has such a stack, and the logits of
    several are averaged. The width stays a tap's `channels` throughout. Features and head are float32. At 768 x 8 x 8,
    the bottleneck of EDM's ImageNet-64 network, it has 18.9 M parameters.
    """

    def __init__(self, *shapes: tuple[int, int, int], at: tuple[str, ...] = ("middle",)):
        super().__init__()
        self.at = at
        self.layers = _stack(*shapes[0])  # the first tap's weights keep the name that one-tap checkpoints have
        self.more = nn.ModuleList(_stack(*shape) for shape in shapes[1:])

    def forward(self, features: tuple[Tensor, ...]) -> Tensor:
        """One map (B, channels, size, size) float32 for each tap -> logits (B,)."""
        first, *others = features
        logits = self.layers(first).flatten()
        if not others:
            return logits
        each = [logits, *(stack(f).flatten() for stack, f in zip(self.more, others, strict=True))]
        return torch.stack(each).mean(0)


def _stack(channels: int, height: int, width: int) -> nn.Sequential:
    if height != width:
        raise ValueError(
            f"teacher: a tap's map is {height} x {width}, and a GAN head needs a square one; set gan_weight=0"
        )
    layers: list[nn.Module] = []
    size = height
    while size > 4:
        layers += [nn.Conv2d(channels, channels, 4, 2, 1), nn.GroupNorm(_groups(channels), channels), nn.SiLU()]
        size //= 2
    layers += [nn.Conv2d(channels, channels, size, size), nn.GroupNorm(_groups(channels), channels), nn.SiLU()]
    return nn.Sequential(*layers, nn.Conv2d(channels, 1, 1))
