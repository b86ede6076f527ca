"""GAN heads: a bottleneck's features in, one logit a sample out."""

from __future__ import annotations

from torch import Tensor, nn


def _groups(channels: int) -> int:
    """32 groups as published, where that leaves 16 channels to each; else fewer.

    On the closing 1 x 1 map a group is all there is to normalise: one channel comes out as a constant and two as signs,
    so that a narrow discriminator would have no gradient, or one of rare spikes.
    """
    return next((g for g in (32, 16, 8, 4, 2) if channels % g == 0 and channels // g >= 16), 1)


class Head(nn.Module):
    """DMD2's head: [conv 4x4 stride 2, GroupNorm, SiLU] to a map 4 wide or less, a conv that closes it, 1x1 to a logit.

    channels, size: of the square feature map, size x size; the width stays `channels` throughout. Features and head are
    float32. At 768 x 8 x 8, the bottleneck of EDM's ImageNet-64 network, it has 18.9 M parameters.
    """

    def __init__(self, channels: int, size: int):
        super().__init__()
        layers: list[nn.Module] = []
        while size > 4:
            layers += [nn.Conv2d(channels, channels, 4, 2, 1), nn.GroupNorm(_groups(channels), channels), nn.SiLU()]
            size //= 2
        layers += [nn.Conv2d(channels, channels, size, size), nn.GroupNorm(_groups(channels), channels), nn.SiLU()]
        self.layers = nn.Sequential(*layers, nn.Conv2d(channels, 1, 1))

    def forward(self, features: Tensor) -> Tensor:
        """features (B, channels, size, size) float32 -> logits (B,)."""
        return self.layers(features).flatten()
