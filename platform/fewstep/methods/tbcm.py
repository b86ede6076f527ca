"""Image-free timestep distillation via continuous-time consistency with trajectory-sampled pairs (TBCM).
Tang et al. 2025, arXiv:2511.20410."""

from __future__ import annotations

from dataclasses import replace
from functools import reduce
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from ..diffusion.guidance import join
from ..diffusion.level import Level
from ..diffusion.tangent import FLOW, TRIG, velocity
from .base import Batch, Nets
from .scm import SCM


class TBCM(SCM):
    """sCM whose points are the states of the teacher's own trajectories, so that no image is needed.

    A trajectory of `states` calls of the teacher gives states - 1 points, with their velocities: at pure noise there is
    nothing to learn. Departs from the paper: each sample has its own times, and no trajectory is rejected.
    """

    name: Literal["tbcm"] = "tbcm"
    training: Literal[False] = False
    """Without a teacher there are no trajectories."""
    states: Annotated[int, Field(ge=2, le=64)] = 16
    """Calls of the teacher in a trajectory; the student's batch is states - 1 times train.batch."""
    shift: Annotated[float, Field(gt=0)] = 6.25
    """Shift of the flow times that the states are spread over; the paper's 2.5 is applied twice."""
    calm: Annotated[float, Field(ge=0, le=1)] = 0.75
    """Factor on the tangent's second term at the end."""
    calm_from: Annotated[int, Field(ge=0)] = 15_000
    """Step from which that factor falls from 1."""
    calm_steps: Annotated[int, Field(ge=1)] = 2_000
    """Steps of its fall."""

    needs: ClassVar[tuple[str, ...]] = ()

    def levels(self, batch: Batch) -> list[Level]:
        """The trajectory's levels: the noisiest, then one drawn from each of states - 1 equal cells of the ramp."""
        ramp, z, cells = replace(FLOW, shift=self.shift), batch.z, self.states - 1
        top = torch.full((len(z),), TRIG.t_max, dtype=torch.float64, device=z.device)
        u = [1 - (i + batch.draws.uniform(f"t/{i}", len(z))) / cells for i in range(cells)]
        angles = (ramp.level(ramp.ramp(v), 1).angle for v in u)
        return [TRIG.level(t, z.ndim) for t in (top, *angles)]

    @torch.no_grad()
    def points(self, nets: Nets, batch: Batch) -> tuple[Tensor, Level, Tensor, Any, float | Tensor]:
        x, cond, levels, scale = batch.z, batch.cond, self.levels(batch), self.scale(batch.draws, len(batch.z))
        teacher, trajectory = self.teacher(nets, scale, batch.null), []
        for level, to in zip(levels, [*levels[1:], None], strict=True):
            dx = velocity(teacher, x, level.t, cond)
            trajectory.append((x, level.t, dx))
            if to is not None:
                dt = (level.t - to.t).view_as(level.alpha)
                x = dt.cos().float() * x - dt.sin().float() * dx  # DDIM, exact in angles
        x, t, dx = (torch.cat(each) for each in zip(*trajectory[1:], strict=True))
        count = len(trajectory) - 1
        scale = scale.repeat(count) if isinstance(scale, Tensor) else scale
        conds = None if cond is None else reduce(join, [cond] * count)
        return x, TRIG.level(t, x.ndim), dx, conds, scale

    def warm(self, step: int) -> float:
        fall = min(max((step - self.calm_from) / self.calm_steps, 0.0), 1.0)
        return super().warm(step) * (1 - (1 - self.calm) * fall)
