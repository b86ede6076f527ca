"""Latent consistency models: synthesizing high-resolution images with few-step inference. Luo et al. 2023,
arXiv:2310.04378."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor
from torch.nn import functional as F

from ..diffusion.draws import INDICES, grid_level
from ..diffusion.health import statistics
from ..diffusion.level import Level, boundary
from ..diffusion.losses import pseudo_huber
from ..diffusion.samplers import Call, calls_at
from .base import Batch, Nets, Terms, Trajectory


class LCM(Trajectory):
    """Two neighbouring levels of the teacher's solver lead to one sample, which an average of the student predicts.

    Departs from the paper: any schedule, whose thousand indices stand for the timesteps; guidance scales are counted
    from 1 (none), so the paper's [2, 14] is guidance_range [3, 15].
    """

    name: Literal["lcm"] = "lcm"
    solver_steps: Annotated[int, Field(ge=2, le=INDICES)] = 50
    """Levels of the solver's grid, every 1000 / solver_steps indices up to 999."""
    target_decay: Annotated[float, Field(ge=0, lt=1)] = 0.95
    """Decay a student update of the average that makes the target."""
    distance: Literal["mse", "huber"] = "huber"
    """Distance of the two ends; the pseudo-Huber knee is at 1e-3."""
    student_steps: Annotated[int, Field(ge=1, le=50)] = 4
    """Network calls of the student."""
    headline: ClassVar[tuple[str, ...]] = ("student/consistency",)

    @model_validator(mode="after")
    def _grid_fits(self) -> LCM:
        if self.student_steps > self.solver_steps:
            raise ValueError(f"student_steps: {self.student_steps} is above solver_steps {self.solver_steps}")
        return self

    def averages(self) -> dict[str, tuple[str, float]]:
        return {"target": ("student", self.target_decay)}

    def numbers(self) -> list[int]:
        """Grid levels of the student's calls, from noise: 50, 38, 25 and 13 of 50 for four."""
        return [self.solver_steps - i * self.solver_steps // self.student_steps for i in range(self.student_steps)]

    def calls(self, net: Any) -> tuple[Call, ...]:
        stride = INDICES // self.solver_steps
        shares = tuple((number * stride - 1) / (INDICES - 1) for number in self.numbers())
        return self.at_guidance(calls_at(net.schedule, shares, on_ramp=True))

    def end_number(self, number: Tensor, draws: Any) -> Tensor:
        """Grid number (B,) of the level at which two neighbours meet that start at `number`: clean, 0."""
        return torch.zeros_like(number)

    def end_state(self, x: Tensor, x0: Tensor, level: Level, number: Tensor, end: Level) -> Tensor:
        """The state (B, ...) at `end` of a student that predicts x0 at x: the paper's c_skip x + c_out x0."""
        index = (number * (INDICES // self.solver_steps) - 1).clamp(min=0)
        c_skip, c_out = (c.float().view_as(level.alpha) for c in boundary(index.double()))
        return c_skip * x + c_out * x0

    def end_scalars(self, end: Level) -> dict[str, Tensor]:
        """Further scalars (B,) of the student and its average, by name. end: the level at which they meet."""
        return {}

    def pair(self, nets: Nets, batch: Batch) -> dict[str, Tensor]:
        """The two states (B, ...) that shall be one, `ours` with a graph and `goal`, and the student's x0, `made`."""
        x0, cond, draws, schedule = batch.real, batch.real_cond, batch.draws, nets["teacher"].schedule
        at = lambda number: grid_level(schedule, number, self.solver_steps, x0)
        number, scale = draws.integers("t", 1, self.solver_steps, len(x0)), self.scale(draws, len(x0))
        level, to, end = at(number), at(number - 1), at(self.end_number(number, draws))
        x = level.noise(x0, draws.normal("eps", x0.shape))
        student, target = (
            self.with_scalars(nets[role], scale, **self.end_scalars(end)) for role in ("student", "target")
        )
        with torch.no_grad():
            teacher = self.teacher(nets, scale, batch.conditions.null(cond))
            before = level.step(x, teacher(x, level, cond), to)  # one step of the solver
            goal = self.end_state(before, target(before, to, cond), to, number - 1, end)
        made = student(x, level, cond)
        return {"made": made, "ours": self.end_state(x, made, level, number, end), "goal": goal}

    def difference(self, ours: Tensor, goal: Tensor) -> Tensor:
        """Distance of two states."""
        return F.mse_loss(ours, goal) if self.distance == "mse" else pseudo_huber(ours, goal)

    def loss(self, nets: Nets, batch: Batch) -> tuple[Terms, Terms]:
        pair = self.pair(nets, batch)
        return {"consistency": self.difference(pair["ours"], pair["goal"])}, statistics(pair["made"], batch.real)
