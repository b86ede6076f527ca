"""InstaFlow: one step is enough for high-quality diffusion-based text-to-image generation. Liu et al. 2023,
arXiv:2309.06380."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from ..diffusion.health import statistics
from ..diffusion.samplers import Call, calls_at
from ..diffusion.tangent import FLOW, flow_velocity
from .base import Batch, Nets, Terms, Trajectory


def times(steps: int) -> list[float]:
    """Flow times of `steps` Euler steps, from noise to clean, each with as long a step."""
    return [FLOW.t_max * (1 - i / steps) for i in range(steps)]


@torch.no_grad()
def path(denoise: Callable[..., Tensor], z: Tensor, cond: Any, steps: int) -> tuple[Tensor, Tensor]:
    """The endpoint (B, ...) of Euler's path from unit noise z, and its straightness S, 0-d.

    S is the mean of |(z - endpoint) - v|^2 over the path, a mean over values: 0 if one step is exact (section 2.2).
    """
    at = lambda t: torch.full((len(z),), t, dtype=torch.float64, device=z.device)
    x, velocities = z * FLOW.level(at(FLOW.t_max), z.ndim).start, []
    for t, to in pairwise([*times(steps), 0.0]):
        v = flow_velocity(denoise, x, at(t), cond)
        velocities.append(v)
        x = x + (to - t) * v
    chord = sum(velocities) / steps
    return x, torch.stack([(chord - v).square().mean() for v in velocities]).mean()


class InstaFlow(Trajectory):
    """Reflow, then distillation, both on pairs (noise, endpoint) of the teacher's own path.

    A round is a run with `stage: reflow`, whose teacher is the run before; a last one has `stage: distil`. Pairs are
    made as they are needed, a function of seed and step, and `straightness` is then that of the teacher, hence of the
    round before; or they are data, from jobs/pairs.py. Departs from the paper: pixel distance, not LPIPS.
    """

    name: Literal["instaflow"] = "instaflow"
    stage: Literal["reflow", "distil"] = "reflow"
    """Train a straight flow, or one step of the teacher's whole path."""
    stored: bool = False
    """Pairs are the data; else the teacher makes them."""
    teacher_steps: Annotated[int, Field(ge=1)] = 25
    """Euler steps of the teacher that make a pair."""
    student_steps: Annotated[int, Field(ge=1, le=100)] = 1
    """Euler steps of the sampler of a straight flow; a distilled one has one."""

    headline: ClassVar[tuple[str, ...]] = ("student/pair",)

    @property
    def needs(self) -> tuple[str, ...]:
        return ("real", "noise") if self.stored else ()

    def calls(self, net: Any) -> tuple[Call, ...]:
        steps = 1 if self.stage == "distil" else self.student_steps
        calls = calls_at(FLOW, tuple(times(steps)))
        return self.at_guidance(tuple(replace(call, then="step") for call in calls))

    def loss(self, nets: Nets, batch: Batch) -> tuple[Terms, Terms]:
        z, cond, draws, health = batch.z, batch.cond, batch.draws, {}
        scale = self.scale(draws, len(z))
        if self.stored:
            z, cond, end = batch.rows["noise"], batch.real_cond, batch.real
        else:
            teacher = self.teacher(nets, scale, batch.null)
            end, health["straightness"] = path(teacher, z, cond, self.teacher_steps)
        t = FLOW.t_max * draws.uniform("t", len(z), stratified=True).clamp(min=FLOW.t_min)
        t = torch.full_like(t, FLOW.t_max) if self.stage == "distil" else t
        level = FLOW.level(t, z.ndim)
        v = flow_velocity(self.with_scalars(nets["student"], scale), level.noise(end, z), t, cond)
        return {"pair": F.mse_loss(v, z - end)}, health | statistics(end)
