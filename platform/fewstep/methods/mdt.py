"""Few-step flow for 3D generation via marginal-data transport distillation (MDT-dist). Zhou et al. 2025,
arXiv:2509.04406."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from ..diffusion.draws import lognormal_level
from ..diffusion.health import statistics
from ..diffusion.losses import surrogate, unit
from ..diffusion.samplers import Call, calls_at
from ..diffusion.tangent import FLOW, flow_velocity, tangent
from .base import Batch, Nets, Terms, Trajectory


class MDT(Trajectory):
    """The student's mean velocity phi from 0 to s, and so the map x - s phi to the data, by its derivative: d(s phi)/ds
    is the teacher's velocity (velocity matching), on data and on its own samples (velocity distillation).

    Departs from the paper: the released code divides the derivative alone by its norm; that has another fixed point,
    and is off here. Differences are central.
    """

    name: Literal["mdt"] = "mdt"
    mean: float = 1.0
    """Mean of ln(s / (1 - s)) of the flow time s."""
    std: Annotated[float, Field(gt=0)] = 1.0
    """Standard deviation of the same."""
    distillation_weight: Annotated[float, Field(ge=0)] = 1.0
    """Weight of velocity distillation; 0 is velocity matching alone."""
    tangents: Literal["forward", "difference"] = "difference"
    """Forward-mode differentiation, or central differences."""
    difference: Annotated[float, Field(gt=0, lt=0.1)] = 0.01
    """Half-width of the differences, as a share of the flow time."""
    normalise: Literal["none", "residual", "derivative"] = "none"
    """Division of a sample's whole residual by its norm, or of the derivative alone, as released."""
    times: tuple[Annotated[float, Field(gt=0, le=1)], ...] = (1.0,)
    """Flow times of the student's calls, from noise to clean."""
    needs_float32: ClassVar[bool] = True
    headline: ClassVar[tuple[str, ...]] = ("health/residual_norm",)

    def calls(self, net: Any) -> tuple[Call, ...]:
        return self.at_guidance(calls_at(FLOW, tuple(min(t, FLOW.t_max) for t in self.times)))

    def residual(self, nets: Nets, x: Tensor, s: Tensor, cond: Any, scale: float | Tensor, null: Any) -> Tensor:
        """phi + s dphi/ds - v (B, ...) along the teacher's path through x at flow times s (B,)."""
        net, teacher = self.with_scalars(nets["student"], scale), self.teacher(nets, scale, null)
        v = flow_velocity(teacher, x, s, cond).detach()
        along = (s.float().view(-1, *[1] * (x.ndim - 1)) * v, s)
        phi, slope = tangent(lambda x, s: flow_velocity(net, x, s, cond), (x, s), along, self.tangents, self.difference)
        slope = unit(slope) if self.normalise == "derivative" else slope
        residual = phi + slope - v
        return unit(residual) if self.normalise == "residual" else residual

    def loss(self, nets: Nets, batch: Batch) -> tuple[Terms, Terms]:
        x0, cond, draws = batch.real, batch.real_cond, batch.draws
        scale, null = self.scale(draws, len(x0)), batch.conditions.null(cond)
        level = lognormal_level(draws, "t", self.mean, self.std, FLOW, x0)
        x = level.noise(x0, draws.normal("eps", x0.shape))
        residual = self.residual(nets, x, level.t, cond, scale, null)
        phi = flow_velocity(self.with_scalars(nets["student"], scale), x, level.t, cond)
        terms = {"matching": surrogate(phi, residual)}
        health = {"residual_norm": residual.flatten(1).norm(dim=1).mean()}
        if not self.distillation_weight:
            return terms, health
        top = FLOW.level(torch.full_like(level.t, FLOW.t_max), x0.ndim)
        z = batch.z * top.start
        phi = flow_velocity(self.with_scalars(nets["student"], scale), z, top.t, batch.cond)
        made = z - top.sigma * phi
        with torch.no_grad():
            level = lognormal_level(draws, "distil/t", self.mean, self.std, FLOW, x0)
            x = level.noise(made, draws.normal("distil/eps", x0.shape))
            residual = self.residual(nets, x, level.t, batch.cond, scale, batch.null)
        terms["distillation"] = self.distillation_weight * surrogate(phi, residual)
        return terms, health | statistics(made, x0)
