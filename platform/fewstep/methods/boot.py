"""BOOT: data-free distillation of denoising diffusion models with bootstrapping. Gu et al. 2023, arXiv:2306.05544."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from ..diffusion.health import statistics
from ..diffusion.samplers import Call, calls_at
from ..diffusion.schedules import Flow
from .base import Batch, Nets, Terms, Trajectory

FLOW = Flow()


class Boot(Trajectory):
    """The student maps noise z and a time t to the signal y = (x_t - sigma z) / alpha of the teacher's path from z.

    It learns its own signal a step later, and needs no data. Departs from the paper: the time is a further scalar
    of a network that is always called at pure noise, so that the boundary condition holds from the start; and times are
    a flow's.
    """

    name: Literal["boot"] = "boot"
    step: Annotated[float, Field(gt=0, lt=1)] = 0.04
    """Step of the bootstrap in flow time."""
    t_min: Annotated[float, Field(gt=0, lt=1)] = 0.015
    """Flow time below which a step goes to 0, where the signal is the sample."""
    coefficient: Literal["exponential", "euler"] = "exponential"
    """Form of the step: exact for a teacher that is constant in it, which is DDIM, or the published first order."""
    weight: Literal["uniform", "published"] = "uniform"
    """Weight of a step: 1, or the published 1 / k^2 of its coefficient k."""
    boundary_weight: Annotated[float, Field(ge=0)] = 1.0
    """Weight of the boundary term: at pure noise the signal is the teacher's x0."""

    needs: ClassVar[tuple[str, ...]] = ()
    headline: ClassVar[tuple[str, ...]] = ("student/bootstrap",)

    @property
    def inputs(self) -> tuple[str, ...]:
        return ("time", *super().inputs)

    def calls(self, net: Any) -> tuple[Call, ...]:
        return self.at_guidance(calls_at(net.schedule, (1.0,), on_ramp=True), time=0.0)

    def k(self, t: Tensor, s: Tensor) -> Tensor:
        """Share (B,), in [0, 1], by which a step from time t to s takes the signal to the teacher's x0."""
        if self.coefficient == "exponential":
            return 1 - s * (1 - t) / (t * (1 - s))  # 1 - e^(lambda_t - lambda_s) of lambda = ln(alpha / sigma)
        return ((t - s) / (t * (1 - t))).clamp(max=1)  # -(t - s) dlambda/dt

    def loss(self, nets: Nets, batch: Batch) -> tuple[Terms, Terms]:
        z, cond, draws = batch.z, batch.cond, batch.draws
        t = self.t_min + (1 - self.t_min) * draws.uniform("t", len(z), stratified=True)
        s = t - self.step
        s = torch.where(s < self.t_min, 0, s)
        scale = self.scale(draws, len(z))
        (start,) = self.calls(nets["student"])
        top = start.level(z)
        signal = lambda time: self.with_scalars(nets["student"], scale, time=time)(z * top.start, top, cond)
        teacher = self.teacher(nets, scale, batch.null)
        with torch.no_grad():
            y, level = signal(t), FLOW.level(t, z.ndim)
            k = self.k(t, s).float().view_as(level.alpha)
            goal = y + k * (teacher(level.noise(y, z), level, cond) - y)
        square = (signal(s) - goal).square()
        if self.weight == "published":
            square = square / k**2
        terms = {"bootstrap": square.mean()}
        if self.boundary_weight:
            first = signal(torch.ones_like(t))
            with torch.no_grad():
                x0 = teacher(z * top.start, top, cond)
            terms["boundary"] = self.boundary_weight * F.mse_loss(first, x0)
        return terms, statistics(y, batch.real)
