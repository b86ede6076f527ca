"""One-step diffusion with distribution matching distillation (DMD): its regression loss. Yin et al. 2024,
arXiv:2311.18828.

The student learns the teacher's own noise-to-image map from pairs. Alone it is the baseline that DMD2 does away with.
"""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from ..diffusion.draws import Draws
from ..diffusion.samplers import few_step, heun
from .base import Batch, Method, Nets, Phase, Terms


class Regression(Method):
    """One-step student fitted to teacher pairs, which are made as they are needed: 2 steps - 1 teacher calls a sample.

    Departs from the paper: pixel distance, not LPIPS, and fresh pairs, not a fixed set.
    """

    name: Literal["regression"] = "regression"
    steps: Annotated[int, Field(ge=1)] = 10
    """Heun steps of the teacher that make a pair."""
    distance: Literal["mse", "huber"] = "huber"
    """Huber's knee is at 0.1 of the data range."""
    guidance: Annotated[float, Field(ge=1)] = 1.0
    """Guidance scale of the teacher."""

    def nets(self, teacher: Any, head: Any) -> dict[str, Any]:
        return {"student": deepcopy(teacher)}

    def phases(self) -> tuple[Phase, ...]:
        return (Phase("student", ("student",), self.loss),)

    def prepare(self, nets: Nets, batch: Batch, trains: tuple[str, ...]) -> Batch:
        return replace(batch, x=self.sample(nets["student"], batch.z, batch.cond, batch.draws))

    def loss(self, nets: Nets, batch: Batch) -> tuple[Terms, Terms]:
        with torch.no_grad():
            target = heun(nets["teacher"], batch.z, batch.cond, self.steps)
        if self.distance == "mse":
            return {"pair": F.mse_loss(batch.x, target)}, {}
        return {"pair": F.huber_loss(batch.x, target, delta=0.1)}, {}

    def describe_sampler(self) -> tuple[str, int]:
        return "few-step-1", 1

    def sample(self, student: Any, z: Tensor, cond: Any, draws: Draws) -> Tensor:
        top = student.schedule.ramp(torch.ones(len(z), dtype=torch.float64, device=z.device))
        return few_step(student, z, cond, [student.schedule.level(top, z.ndim)])
