"""Elucidating the design space of diffusion-based generative models (EDM). Karras et al. 2022, arXiv:2206.00364.

Trains the denoiser that the other methods take as their teacher; it starts from random weights, not from a teacher's.
"""

from __future__ import annotations

from copy import deepcopy
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from ..diffusion.draws import Draws, lognormal_level
from ..diffusion.samplers import heun
from .base import Batch, Method, Nets, Phase, Terms


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

    def nets(self, teacher: Any, head: Any) -> dict[str, Any]:
        return {"student": deepcopy(teacher)}

    def phases(self) -> tuple[Phase, ...]:
        return (Phase("denoise", ("student",), self.loss),)

    def loss(self, nets: Nets, batch: Batch) -> tuple[Terms, Terms]:
        net, draws, x0 = nets["student"], batch.draws, batch.real
        level = lognormal_level(draws, "t", self.mean, self.std, self.ramp_share, net.schedule, x0)
        cond = batch.real_cond
        if cond is not None and self.drop_labels:
            drop = draws.uniform("drop", x0.shape[0]) < self.drop_labels
            cond = torch.where(drop, net.null, cond)
        eps = draws.normal("eps", x0.shape)
        raw = net(level.noise(x0, eps), level, cond, "raw")
        return {"mse": F.mse_loss(raw, net.target(level, x0, eps))}, {}

    def describe_sampler(self) -> tuple[str, int]:
        return f"heun-{self.steps}", 2 * self.steps - 1

    def sample(self, student: Any, z: Tensor, cond: Any, draws: Draws) -> Tensor:
        return heun(student, z, cond, self.steps)
