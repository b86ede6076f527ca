"""Phased consistency models. Wang et al. 2024, arXiv:2405.18407."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator
from torch import Tensor

from ..diffusion.draws import INDICES
from ..diffusion.level import Level
from ..diffusion.samplers import Call
from .lcm import LCM


class PCM(LCM):
    """Consistency inside each of several phases of the path; sampling goes from edge to edge and adds no noise.

    One network call a phase: `student_steps` is their number. Departs from the paper: no adversarial term.
    """

    name: Literal["pcm"] = "pcm"
    solver_steps: Annotated[int, Field(ge=2, le=INDICES)] = 40
    """Levels of the solver's grid, a multiple of the number of phases."""

    @model_validator(mode="after")
    def _edges_on_the_grid(self) -> PCM:
        if self.solver_steps % self.student_steps:
            raise ValueError(f"solver_steps: {self.solver_steps} is no multiple of student_steps {self.student_steps}")
        return self

    def calls(self, net: Any) -> tuple[Call, ...]:
        return tuple(replace(call, then="step") for call in super().calls(net))

    def end_number(self, number: Tensor, draws: Any) -> Tensor:
        """The edge below `number`: of a level that is an edge itself, the next one."""
        size = self.solver_steps // self.student_steps
        return (number - 1).div(size, rounding_mode="floor") * size

    def end_state(self, x: Tensor, x0: Tensor, level: Level, number: Tensor, end: Level) -> Tensor:
        return level.step(x, x0, end)
