"""High-resolution image synthesis with latent diffusion models. Rombach et al. 2022, arXiv:2112.10752.

Trains their first stage, the codec of pictures, from random weights; instead of their perceptual and adversarial losses
it compares edges, which is what small flat pictures show.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from .base import Batch, Make, Method, Nets, Phase, Terms


class Codec(Method):
    """Reconstruction of pixels and edges, and a slight pull of the latents to a normal distribution."""

    name: Literal["codec"] = "codec"
    edges: Annotated[float, Field(ge=0)] = 1.0
    """Weight of the differences between neighbouring pixels, at full and at half size."""
    kl: Annotated[float, Field(ge=0)] = 1e-3
    """Weight of the Kullback-Leibler divergence of a latent's distribution from N(0, 1), the mean over latents."""
    crop: Annotated[int, Field(ge=1)] | None = None
    """Side of the square of each picture that a step trains on, at a place of the step's own; null takes all of it. A
    codec without attention learns as much from a pixel of a part, and a step costs less."""

    needs_teacher: ClassVar[bool] = False
    generates: ClassVar[bool] = False
    frozen: ClassVar[tuple[str, ...]] = ()
    headline: ClassVar[tuple[str, ...]] = ("codec/pixels", "codec/edges")

    def nets(self, make: Make) -> dict[str, Any]:
        return {"student": make.teacher}

    def phases(self) -> tuple[Phase, ...]:
        return (Phase("codec", ("student",), self.loss),)

    def loss(self, nets: Nets, batch: Batch) -> tuple[Terms, Terms]:
        codec, draws, x = nets["student"], batch.draws, batch.real
        if self.crop is not None:
            top = draws.choice("top", x.shape[2] - self.crop + 1)
            left = draws.choice("left", x.shape[3] - self.crop + 1)
            x = x[:, :, top : top + self.crop, left : left + self.crop]
        y, mean, std = codec(x, draws.normal("eps", (len(x), *codec.latents_of(x))))
        half = edge_loss(F.avg_pool2d(y, 2), F.avg_pool2d(x, 2))
        terms = {
            "pixels": F.l1_loss(y, x),
            "edges": self.edges * (edge_loss(y, x) + half),
            "kl": self.kl * kl_divergence(mean, std),
        }
        return terms, {"latent_std": mean.detach().std()}


def kl_divergence(mean: Tensor, std: Tensor) -> Tensor:
    """KL(N(mean, std^2) || N(0, 1)), the mean over all values (Kingma & Welling 2013, appendix B)."""
    return (mean**2 + std**2 - 1 - 2 * std.log()).mean() / 2


def edge_loss(y: Tensor, x: Tensor) -> Tensor:
    """Mean absolute error of the differences between neighbours, down and across. y, x: (B, C, H, W)."""
    return F.l1_loss(y.diff(dim=2), x.diff(dim=2)) + F.l1_loss(y.diff(dim=3), x.diff(dim=3))
