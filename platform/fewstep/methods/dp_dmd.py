"""Diversity-preserved distribution matching distillation for fast visual synthesis (DP-DMD). Wu et al. 2026,
arXiv:2602.03139.

The first call decides what is generated, and learns the teacher's own path; the later calls refine it by DMD.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor
from torch.nn import functional as F

from ..diffusion.draws import INDICES
from ..diffusion.guidance import guided
from ..diffusion.level import Level
from ..diffusion.samplers import Call, follow, simulated_call
from .base import Batch, Nets, Terms
from .dmd2 import DMD2


class DPDMD(DMD2):
    """DMD2 of several calls, the first of which is trained by the teacher's target alone.

    Read in the abstract: a target-prediction loss for the first call, DMD for the others, no GAN. Proposed here: the
    target is the mean velocity of `anchor_steps` first-order steps of the teacher from the first call's level to the
    second's, and the student goes from the first call to the second without new noise.
    """

    name: Literal["dp_dmd"] = "dp_dmd"
    gan_weight: Annotated[float, Field(ge=0)] = 0.0
    """Weight of the student's adversarial term; the paper has none."""
    student_steps: Annotated[int, Field(ge=1, le=8)] = 4
    """Network calls of the student."""
    anchor_steps: Annotated[int, Field(ge=0)] = 5
    """Teacher's steps between the levels of the first two calls; 0 trains the first call as the others, by DMD2."""
    anchor_weight: Annotated[float, Field(gt=0)] = 1.0
    """Weight of the first call's loss, the mean squared error of what the network predicts."""

    @model_validator(mode="after")
    def _several(self) -> DPDMD:
        if self.anchor_steps and (self.student_steps < 2 or not self.backward_simulation):
            raise ValueError("anchor_steps: needs student_steps of 2 or more, and backward_simulation; else give 0")
        return self

    def calls(self, net: Any) -> tuple[Call, ...]:
        first, *others = super().calls(net)
        return (replace(first, then="step") if self.anchor_steps else first, *others)

    def student_input(self, nets: Nets, batch: Batch) -> tuple[Tensor, Level, Any]:
        if not self.anchor_steps:
            return super().student_input(nets, batch)
        calls = self.calls(nets["student"])
        return *simulated_call(nets, calls, batch.z, batch.cond, batch.draws, first=1), batch.cond

    @torch.no_grad()
    def anchor(self, nets: Nets, batch: Batch) -> tuple[Tensor, Level, Tensor]:
        """The first call's input (B, ...) and level, and the x0 whose step leads to where the teacher arrives."""
        schedule, (top, second, *_) = nets["student"].schedule, self.indices()
        ramp = torch.linspace(top, second, self.anchor_steps + 1, dtype=torch.float64, device=batch.z.device)
        ts = schedule.ramp(ramp / (INDICES - 1))
        levels = [schedule.level(t.expand(len(batch.z)), batch.z.ndim) for t in ts]
        start, end = levels[0], levels[-1]
        x = batch.z * start.start
        denoise = lambda *at: guided(nets["teacher"], *at, self.guidance, batch.null)
        x_end = follow(denoise, x, levels, batch.cond)
        shrink = end.sigma / start.sigma
        return x, start, (x_end - shrink * x) / (end.alpha - shrink * start.alpha)

    def extra(self, nets: Nets, batch: Batch, match: Terms) -> Terms:
        terms = super().extra(nets, batch, match)
        if not self.anchor_steps:
            return terms
        x, level, x0 = self.anchor(nets, batch)
        student = nets["student"]
        target = student.target(level, x0, level.eps(x, x0))
        raw = student(x, level, batch.cond, "raw")
        return terms | {"anchor": self.anchor_weight * F.mse_loss(raw, target)}
