"""Phased DMD: few-step distribution matching distillation via score matching within subintervals. Fan et al. 2025,
arXiv:2510.27684.

Each phase trains one expert, which carries the density from one noise level to the next. The density is matched at that
level, so no expert but the last is asked for clean images.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field, field_validator, model_validator
from torch import Tensor
from torch.nn import functional as F

from ..diffusion.draws import INDICES, noised
from ..diffusion.level import Level
from ..diffusion.losses import matching_gradient
from ..diffusion.samplers import Call, calls_at, simulated_call
from ..diffusion.subinterval import Kernel
from .base import Batch, Make, Nets, Terms
from .matching import DistributionMatching

MARGIN = 20  # thousandths between a phase's end and its least noise level


class PhasedDMD(DistributionMatching):
    """One run a phase, in order: its expert is the student, those of earlier phases come frozen from their runs.

    With a single phase of one call it is DMD2 without the GAN, bit for bit. Read in notes on the paper: kernel, target,
    steps without new noise, 5 critic updates. Derived: the target by x0 and eps for any prediction. Proposed: the
    gradient's normaliser, DMD2's, on x_s / alpha_s; and the weight's rho for schedules other than a flow.
    Departs from the paper: phases are trained one after the other only, and end at thousandths of the ramp.
    """

    name: Literal["phased_dmd"] = "phased_dmd"
    boundaries: tuple[Annotated[int, Field(gt=MARGIN, lt=INDICES - MARGIN)], ...] = (499,)
    """Noise levels between phases, from noise to clean: n of them for n + 1 phases."""
    phase_steps: Annotated[int, Field(ge=1, le=4)] = 1
    """Calls of each expert."""
    earlier: tuple[str, ...] = ()
    """Folders of the runs of the earlier phases, in order; () trains the first phase."""

    needs: ClassVar[tuple[str, ...]] = ()

    @field_validator("boundaries")
    @classmethod
    def _descending(cls, levels: tuple[int, ...]) -> tuple[int, ...]:
        if list(levels) != sorted(set(levels), reverse=True):
            raise ValueError("give the levels from noise to clean, each lower than the one before")
        return levels

    @model_validator(mode="after")
    def _phase_exists(self) -> PhasedDMD:
        if len(self.earlier) > len(self.boundaries):
            raise ValueError(f"earlier: {len(self.earlier)} runs, but the last of {len(self.boundaries) + 1} phases "
                             f"has {len(self.boundaries)} before it")  # fmt: skip
        return self

    def nets(self, make: Make) -> dict[str, Any]:
        return super().nets(make) | {f"expert{i}": make.run(folder) for i, folder in enumerate(self.earlier, 1)}

    @property
    def end(self) -> int:
        """Level at which this phase ends; 0 is clean."""
        return (*self.boundaries, 0)[len(self.earlier)]

    def indices(self) -> list[int]:
        """Levels of the calls of all experts up to this phase's."""
        tops, ends = (self.conditioning, *self.boundaries), (*self.boundaries, 0)
        spans = list(zip(tops, ends, strict=True))[: len(self.earlier) + 1]
        return [round(top - i * (top - end) / self.phase_steps) for top, end in spans for i in range(self.phase_steps)]

    def calls(self, net: Any) -> tuple[Call, ...]:
        phase = [i // self.phase_steps for i in range(len(self.indices()))]
        roles = ["student" if p == len(self.earlier) else f"expert{p + 1}" for p in phase]
        calls = calls_at(net.schedule, tuple(index / (INDICES - 1) for index in self.indices()), on_ramp=True)
        return tuple(replace(call, role=role, then="step") for call, role in zip(calls, roles, strict=True))

    def end_level(self, schedule: Any, like: Tensor) -> Level:
        """Noise level at which this phase ends, for each sample of `like` (B, ...)."""
        if not self.end:
            one = torch.ones(len(like), *[1] * (like.ndim - 1), device=like.device)
            return Level(one, torch.zeros_like(one))
        (call,) = calls_at(schedule, (self.end / (INDICES - 1),), on_ramp=True)
        return call.level(like)

    def prepare(self, nets: Nets, batch: Batch, trains: tuple[str, ...]) -> Batch:
        """Takes a call of this phase at random to x0, "x", and without new noise to the phase's end, "x_s"."""
        calls, first = self.calls(nets["student"]), len(self.earlier) * self.phase_steps
        x_t, level = simulated_call(nets, calls, batch.z, batch.cond, batch.draws, first)
        with torch.set_grad_enabled("student" in trains):
            x0 = nets["student"](x_t, level, batch.cond)
            x_s = level.step(x_t, x0, self.end_level(nets["student"].schedule, x0)) if self.end else x0
        return batch.make(x=x0, x_s=x_s)

    def match_samples(self, batch: Batch) -> Tensor:
        return batch.made["x_s"]

    def kernel(self, nets: Nets, batch: Batch, name: str, low: int, high: int) -> tuple[Kernel, Tensor]:
        """The kernel from the phase's end to a level drawn for each sample, in thousandths, and its noise (B, ...)."""
        x_s, net = self.match_samples(batch), nets["teacher"]
        low = max(low, self.end + MARGIN) if self.end else low
        _, level, eps = noised(batch.draws, name, net.schedule, x_s.detach(), low, high)
        return Kernel(self.end_level(net.schedule, x_s), level), eps

    def match_noise(self, nets: Nets, batch: Batch, x: Tensor) -> tuple[Tensor, Level]:
        kernel, eps = self.kernel(nets, batch, "match", *self.match_range)
        return kernel.noise(x, eps), kernel.t

    def direction(self, x: Tensor, real: Tensor, fake: Tensor, level: Level) -> tuple[Tensor, Tensor]:
        return matching_gradient(x / self.end_level(level.schedule, x).alpha, real, fake)

    def critic_loss(self, nets: Nets, batch: Batch) -> tuple[Terms, Terms]:
        """Score matching within the subinterval, whose targets need no clean sample."""
        x_s, fake = self.match_samples(batch).detach(), nets["fake"]
        kernel, eps = self.kernel(nets, batch, "critic", 0, INDICES - 1)
        raw = fake(kernel.noise(x_s, eps), kernel.t, self.critic_condition(batch), "raw")
        weight = kernel.weight().sqrt()
        return {"denoise": F.mse_loss(weight * raw, weight * fake.target(kernel.t, *kernel.targets(x_s, eps)))}, {}
