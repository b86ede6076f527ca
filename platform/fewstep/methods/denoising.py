"""Elucidating the design space of diffusion-based generative models (EDM). Karras et al. 2022, arXiv:2206.00364.

Trains the denoiser that the other methods take as their teacher; it starts from random weights, not from a teacher's.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from ..diffusion.draws import lognormal_level
from ..diffusion.guidance import choose
from ..diffusion.level import Level
from .base import Batch, Make, Method, Nets, Phase, Terms


class Denoising(Method):
    """Denoising score matching with EDM's noise distribution and the network's own weight."""

    name: Literal["denoising"] = "denoising"
    mean: float = -1.2
    """Mean of ln sigma (table 1)."""
    std: Annotated[float, Field(gt=0)] = 1.2
    """Standard deviation of ln sigma (table 1)."""
    ramp_share: Annotated[float, Field(ge=0, le=1)] = 0.15
    """Share of the levels drawn from the sampler's ramp instead: the log-normal never visits sigma near 80, where a
    one-step student starts."""
    drop_labels: Annotated[float, Field(ge=0, le=1)] = 0.1
    """Probability of training without the label, for guidance (Ho & Salimans 2022)."""
    steps: Annotated[int, Field(ge=1)] = 18
    """Heun steps of the sampler (2 steps - 1 network calls)."""

    needs_teacher: ClassVar[bool] = False
    frozen: ClassVar[tuple[str, ...]] = ()
    headline: ClassVar[tuple[str, ...]] = ("denoise/mse",)

    def nets(self, make: Make) -> dict[str, Any]:
        return {"student": make.copy("student")}

    def phases(self) -> tuple[Phase, ...]:
        return (Phase("denoise", ("student",), self.loss),)

    def loss(self, nets: Nets, batch: Batch) -> tuple[Terms, Terms]:
        net, draws, x0, cond = nets["student"], batch.draws, batch.real, batch.real_cond
        level = lognormal_level(draws, "t", self.mean, self.std, net.schedule, x0, self.ramp_share)
        null = None if batch.conditions is None else batch.conditions.null(cond)
        if null is not None and self.drop_labels:
            drop = draws.uniform("drop", x0.shape[0]) < self.drop_labels
            cond = choose(drop, null, cond)
        eps = draws.normal("eps", x0.shape)
        x_t = level.noise(x0, eps)
        raw = net(x_t, level, cond, "raw")
        return {"mse": F.mse_loss(raw, net.target(level, *self.targets(nets, x_t, level, cond, x0, eps)))}, {}

    def targets(
        self, nets: Nets, x_t: Tensor, level: Level, cond: Any, x0: Tensor, eps: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The clean images and the noise in x_t that the network learns: here the true ones."""
        return x0, eps

    @property
    def heun_steps(self) -> int:
        return self.steps
