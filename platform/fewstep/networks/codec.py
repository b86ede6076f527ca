"""A codec to train: pictures -> latents -> pictures. networks/latents.py opens trained ones."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..config import ConfigError
from ..texts import one_line
from .backbones import size_of
from .conditions import Nothing
from .weights import outline

LOG_VARIANCE = -6.0  # of new latents: with a variance of one their noise would drown what the encoder begins to say


class Codec(nn.Module):
    """diffusers AutoencoderKL (Rombach et al. 2022, arXiv:2112.10752) on pictures (B, C, H, W) in [-1, 1]."""

    classes = codec = None
    conditions = Nothing()

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model
        config = model.config
        self.shape = self.picture_shape = (config.in_channels, *size_of(config.sample_size))
        self.down = 2 ** (len(config.block_out_channels) - 1)

    def latents_of(self, x: Tensor) -> tuple[int, int, int]:
        """(c, h, w) of one picture's latents."""
        return (self.model.config.latent_channels, x.shape[2] // self.down, x.shape[3] // self.down)

    def forward(self, x: Tensor, eps: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The reconstruction of x, and mean and standard deviation of its unscaled latents.

        eps: (B, c, h, w), N(0, I), which samples the latents that are decoded.
        """
        latents = self.model.encode(x).latent_dist
        return self.model.decode(latents.mean + latents.std * eps).sample, latents.mean, latents.std

    @torch.no_grad()
    def fit_scale(self, x: Tensor, batch: int = 64) -> float:
        """Sets the scaling factor of the model's config so that scaled latents of pictures x have standard deviation
        one, and returns it. Raises ValueError for latents without a deviation."""
        std = torch.cat([self.model.encode(part).latent_dist.mean for part in x.split(batch)]).std().item()
        if not (math.isfinite(std) and std > 0):
            raise ValueError(f"codec: its latents have a standard deviation of {std}, so no factor makes it one")
        self.model.register_to_config(scaling_factor=1 / std)
        return 1 / std

    def zeros(self, count: int) -> tuple[Tensor, Tensor]:
        """Inputs of `forward` of any content, to measure shapes with."""
        x = torch.zeros(count, *self.shape)
        return x, torch.zeros(count, *self.latents_of(x))


def new_codec(config: Mapping[str, Any], weights: bool = True) -> Codec:
    """A codec with random weights, from torch's global generator; without `weights` it is on the meta device.

    config: arguments of AutoencoderKL. Raises ConfigError where it cannot be built, or pictures do not pass.
    """
    try:
        outlined = Codec(outline("AutoencoderKL", config))
        with torch.no_grad():
            x, eps = (part.to("meta") for part in outlined.zeros(1))
            passed = outlined(x, eps)[0].shape
        if passed != x.shape:
            raise ValueError(f"makes {tuple(passed[1:])} of a picture of shape {outlined.shape}")
    except (ValueError, RuntimeError) as error:
        raise ConfigError(f"network.config: AutoencoderKL: {one_line(error)}") from None
    if not weights:
        return outlined
    import diffusers

    model = diffusers.AutoencoderKL(**config)
    nn.init.constant_(model.quant_conv.bias[config.get("latent_channels", 4) :], LOG_VARIANCE)
    return Codec(model)
