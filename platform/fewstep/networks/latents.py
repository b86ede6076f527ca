"""Latents: a pipeline's codec, which turns them into pictures, opened when it is first asked for one."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..config import read_json
from ..texts import quoted
from .weights import arguments_of, check_headers, fill, headers, outline, unfilled, weight_files

CODECS = {"AutoencoderKL": "block_out_channels", "AutoencoderDC": "encoder_block_out_channels"}
FOLDER = "vae"


class Latents:
    """The codec in a pipeline's folder. It is no part of a network: networks and their copies share it.

    factor, shift: a network's latents are (z - shift) factor of the codec's own z, so that their deviation is about 1.
    down: pixels of a picture's side to one of its latent's. Raises ValueError for another class of codec.
    """

    def __init__(self, folder: Path):
        self.folder = folder / FOLDER
        path = self.folder / "config.json"
        self.config = read_json(path)
        name = self.config.get("_class_name")
        if name not in CODECS:
            raise ValueError(f"{path}: a codec of class {quoted(name)}; known: {', '.join(CODECS)}")
        self.arguments = arguments_of(name, self.config)
        default = 0.18215 if name == "AutoencoderKL" else 1.0  # diffusers' own, of a config without the key
        self.factor = float(self.config.get("scaling_factor") or default)
        self.shift = float(self.config.get("shift_factor") or 0.0)
        self.down = 2 ** (len(self.config[CODECS[name]]) - 1)
        self._model: nn.Module | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> Latents:
        return self

    def shape_of(self, latent: tuple[int, int, int]) -> tuple[int, int, int]:
        """(C, H, W) of a latent's picture."""
        channels = self.config.get("out_channels", self.config.get("in_channels", 3))
        return (channels, latent[1] * self.down, latent[2] * self.down)

    def model(self, device: torch.device | str = "cpu") -> nn.Module:
        """The codec, float32, on a device. Raises ValueError naming a file that is missing or damaged."""
        if self._model is None:
            name = self.config["_class_name"]
            stored = headers(weight_files(self.folder, name))
            weights = check_headers(outline(name, self.arguments), stored, self.folder)
            self._model = fill(unfilled(name, self.arguments, weights))
            self._model.eval().requires_grad_(False)
        return self._model.to(device)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Pictures (B, C, H, W), about [-1, 1], of a network's latents."""
        return self.model(latents.device).decode(latents / self.factor + self.shift, return_dict=False)[0]

    @torch.no_grad()
    def encode(self, pictures: Tensor, eps: Tensor | float = 0.0) -> Tensor:
        """Latents as networks take them, of pictures in [-1, 1]: means, or samples where eps is N(0, I)."""
        encoded = self.model(pictures.device).encode(pictures, return_dict=False)[0]
        z = encoded.mean + encoded.std * eps if hasattr(encoded, "mean") and hasattr(encoded, "std") else encoded
        return (z - self.shift) * self.factor

    def check_scale(self, latents: Tensor, where: str) -> None:
        """Raises ValueError for stored latents whose deviation says that the scaling factor was left out, or was
        applied twice: a multiplication or a division by it would bring them nearer to 1."""
        std = latents.double().std().item()
        off = lambda value: abs(math.log(max(value, 1e-12)))
        best = min((std, std * self.factor, std / self.factor), key=off)
        if best != std or not 0.2 <= std <= 5:
            raise ValueError(
                f"{where}: its latents have the standard deviation {std:.3g}, and those of this network have about 1, "
                f"so the scaling factor is wrong: store (z - {self.shift:g}) x {self.factor:g} of the codec's z, as "
                "jobs/encode.py does"
            )


def find_latents(folder: Path) -> Latents | None:
    """The codec of a pipeline's folder; None for one of pixels. Raises ValueError for a codec that is not known."""
    return Latents(folder) if (folder / FOLDER / "config.json").is_file() else None
