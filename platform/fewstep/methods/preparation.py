"""SANA-Sprint: its preparation of the teacher. Chen et al. 2025, arXiv:2503.09641."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch.nn import functional as F

from ..diffusion.draws import lognormal_level
from ..diffusion.guidance import choose
from .base import Batch, Make, Method, Nets, Phase, Terms


class Preparation(Method):
    """A copy of the teacher with a dense time embedding and normalised attention, trained to answer as the teacher.

    The run's student is then the teacher of `sana_sprint`, and where that student starts. A network whose input is
    1000 t has a derivative in t that is too steep for a tangent; so its input becomes t (section 3.2). Queries and keys
    get an RMS norm, which large models need. `mse` over `teacher_square` is the share of the answers that is lost.
    Departs from the paper: the target is the teacher's own output, of which flow matching's target is a noisy sample.
    """

    name: Literal["preparation"] = "preparation"
    time_scale: Annotated[float, Field(gt=0)] = 1.0
    """Factor on the network's own time: 1 for a flow and for EDM, 1e-3 for the thousand steps of a DDPM."""
    qk_norm: bool = False
    """Give the attention an RMS norm of queries and keys. Sana and SD3 have one."""
    mean: float = 0.0
    """Mean of ln tan t, t the angle of the noise level."""
    std: Annotated[float, Field(gt=0)] = 1.6
    """Standard deviation of ln tan t."""
    ramp_share: Annotated[float, Field(ge=0, le=1)] = 0.25
    """Share of the levels drawn from the sampler's ramp instead, so that none is left out."""
    drop_labels: Annotated[float, Field(ge=0, le=1)] = 0.1
    """Probability of the condition that stands for none, which guidance asks for later."""

    headline: ClassVar[tuple[str, ...]] = ("student/mse",)

    def nets(self, make: Make) -> dict[str, Any]:
        return {"teacher": make.teacher, "student": make.variant("student", self.time_scale, self.qk_norm)}

    def phases(self) -> tuple[Phase, ...]:
        return (Phase("student", ("student",), self.loss),)

    def loss(self, nets: Nets, batch: Batch) -> tuple[Terms, Terms]:
        draws, x0, cond = batch.draws, batch.real, batch.real_cond
        level = lognormal_level(draws, "t", self.mean, self.std, nets["teacher"].schedule, x0, self.ramp_share)
        null = None if batch.conditions is None else batch.conditions.null(cond)
        if null is not None and self.drop_labels:
            cond = choose(draws.uniform("drop", len(x0)) < self.drop_labels, null, cond)
        x_t = level.noise(x0, draws.normal("eps", x0.shape))
        with torch.no_grad():
            target = nets["teacher"](x_t, level, cond, "raw")
        mse = F.mse_loss(nets["student"](x_t, level, cond, "raw"), target)
        return {"mse": mse}, {"teacher_square": target.square().mean()}
