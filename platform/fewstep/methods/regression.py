"""One-step diffusion with distribution matching distillation (DMD): its regression loss. Yin et al. 2024,
arXiv:2311.18828.

The student learns the teacher's own noise-to-image map from pairs. Alone it is the baseline that DMD2 does away with.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch.nn import functional as F

from ..diffusion.guidance import guided
from ..diffusion.health import statistics
from ..diffusion.samplers import Call, calls_at, heun, run_calls
from .base import Batch, Make, Method, Nets, Phase, Terms


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

    needs: ClassVar[tuple[str, ...]] = ()
    headline: ClassVar[tuple[str, ...]] = ("student/pair",)

    def nets(self, make: Make) -> dict[str, Any]:
        return {"teacher": make.teacher, "student": make.copy("student")}

    def phases(self) -> tuple[Phase, ...]:
        return (Phase("student", ("student",), self.loss),)

    def calls(self, net: Any) -> tuple[Call, ...]:
        return calls_at(net.schedule, (1.0,), on_ramp=True)

    def loss(self, nets: Nets, batch: Batch) -> tuple[Terms, Terms]:
        z, cond, teacher = batch.z, batch.cond, nets["teacher"]
        denoise = lambda x_t, level, cond: guided(teacher, x_t, level, cond, self.guidance, batch.null)
        with torch.no_grad():
            target = heun(denoise, z, cond, self.steps)
        x = run_calls(nets, self.calls(nets["student"]), z, cond, batch.draws)
        distance = F.mse_loss(x, target) if self.distance == "mse" else F.huber_loss(x, target, delta=0.1)
        return {"pair": distance}, statistics(x, batch.real)
