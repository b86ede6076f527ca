"""Simplifying, stabilizing and scaling continuous-time consistency models (sCM). Lu & Song 2024, arXiv:2410.11081."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from ..diffusion.draws import lognormal_level
from ..diffusion.level import Level
from ..diffusion.losses import unit
from ..diffusion.samplers import Call, calls_at
from ..diffusion.tangent import TRIG, tangent, velocity
from .base import Batch, Make, Nets, Phase, Terms, Trajectory

FREQUENCIES = (0.25, 0.5, 1.0, 2.0)  # of ln tan t, which is about N(-1, 1.4^2)


class Weighting(nn.Module):
    """The learned weight: angles t (B,) -> w(t) (B,), a linear layer over waves of ln tan t, zero at first."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(2 * len(FREQUENCIES), 1)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, t: Tensor) -> Tensor:
        u = t.tan().log().float()
        waves = [g(k * u) for k in FREQUENCIES for g in (torch.sin, torch.cos)]
        return self.linear(torch.stack(waves, 1)).flatten()


class SCM(Trajectory):
    """Consistency without time steps, distilled from a teacher or trained on data alone (sCD and sCT).

    The loss is no measure of progress; `tangent_norm` is. Departs from the paper: sigma_d = 1, and no learned weight
    unless asked for, which rCM (arXiv:2510.08431) found of no use.
    """

    name: Literal["scm"] = "scm"
    mean: float = -1.0
    """Mean of ln tan t."""
    std: Annotated[float, Field(gt=0)] = 1.4
    """Standard deviation of ln tan t."""
    training: bool = False
    """Consistency training: the velocity of the noised data stands in for the teacher's, and no teacher is called."""
    warmup_steps: Annotated[int, Field(ge=0)] = 1000
    """Steps in which the tangent's second term grows from none to whole."""
    tangents: Literal["forward", "difference"] = "forward"
    """Forward-mode differentiation, or central differences."""
    weighting: Literal["none", "learned"] = "none"
    """Weight of the noise levels: none, or e^w(t) / D with a w(t) that trains along (section 4.2), the role
    `weighting`."""
    times: tuple[Annotated[float, Field(gt=0, le=1.5583)], ...] = (1.5583,)
    """Angles of the student's calls, from noise to clean; [1.5583, 1.1] are the paper's two."""
    needs_float32: ClassVar[bool] = True
    headline: ClassVar[tuple[str, ...]] = ("health/tangent_norm",)

    @model_validator(mode="after")
    def _guided_by_a_teacher(self) -> SCM:
        if self.training and (self.guidance != 1 or self.guidance_range is not None):
            raise ValueError("guidance: consistency training has no teacher to guide; leave guidance at 1")
        return self

    @property
    def needs_teacher(self) -> bool:
        return not self.training

    def nets(self, make: Make) -> dict[str, Any]:
        nets = super().nets(make)
        if self.training:
            del nets["teacher"]
        return nets | ({"weighting": Weighting()} if self.weighting == "learned" else {})

    def phases(self) -> tuple[Phase, ...]:
        trains = ("student", "weighting") if self.weighting == "learned" else ("student",)
        return (Phase("student", trains, self.loss),)

    @property
    def known_roles(self) -> tuple[str, ...]:
        return ("student", "weighting")

    def calls(self, net: Any) -> tuple[Call, ...]:
        return self.at_guidance(calls_at(TRIG, self.times))

    def points(self, nets: Nets, batch: Batch) -> tuple[Tensor, Level, Tensor, Any, float | Tensor]:
        """Points of trajectories: x (B, ...), TrigFlow levels, the velocity dx/dt, conditions and guidance scales."""
        x0, cond, draws = batch.real, batch.real_cond, batch.draws
        level = lognormal_level(draws, "t", self.mean, self.std, TRIG, x0)
        eps = draws.normal("eps", x0.shape)
        x, scale = level.noise(x0, eps), self.scale(draws, len(x0))
        if self.training:
            return x, level, level.alpha * eps - level.sigma * x0, cond, scale
        teacher = self.teacher(nets, scale, batch.conditions.null(cond))
        return x, level, velocity(teacher, x, level.t, cond).detach(), cond, scale

    def warm(self, step: int) -> float:
        """Factor on the tangent's second term, in [0, 1]; without that term this is distillation of the velocity."""
        return min(1.0, step / self.warmup_steps) if self.warmup_steps else 1.0

    def loss(self, nets: Nets, batch: Batch) -> tuple[Terms, Terms]:
        x, level, dx, cond, scale = self.points(nets, batch)
        t, cos, sin = level.t, level.alpha, level.sigma
        net = self.with_scalars(nets["student"], scale)
        student = lambda x, t: velocity(net, x, t, cond)
        along = (cos * sin * dx, (cos * sin).double().flatten())  # scaled before the pass: nothing overflows
        f, df = tangent(student, (x, t), along, self.tangents)
        g = -(cos**2) * (f - dx) - self.warm(batch.draws.step) * (cos * sin * x + df)
        residual, norm = unit(g), lambda v: v.flatten(1).norm(dim=1).mean()
        square = (student(x, t) - f - residual).square().flatten(1)
        health = {"tangent_norm": norm(g), "residual_norm": norm(residual)}
        if self.weighting == "none":
            return {"tangent": square.sum(1).mean()}, health
        w = nets["weighting"](t)
        return {"tangent": (w.exp() * square.mean(1) - w).mean()}, health
