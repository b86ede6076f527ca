"""Phased DMD: few-step distribution matching distillation via score matching within subintervals. Fan et al. 2025,
arXiv:2510.27684.

Each phase trains one expert, which carries the density from one noise level to the next. The density is matched at that
level, so no expert but the last generates clean images.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from itertools import pairwise
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field, field_validator, model_validator
from torch import Tensor
from torch.nn import functional as F

from ..diffusion.draws import INDICES, noised
from ..diffusion.level import Level
from ..diffusion.losses import matching_gradient
from ..diffusion.samplers import Call, calls_at, simulated_call
from ..diffusion.subinterval import Kernel, level_at
from .base import Batch, Make, Nets, Phase, Terms
from .matching import DistributionMatching

MARGIN = 20  # thousandths between a phase's end and its least noise level


class PhasedDMD(DistributionMatching):
    """One run a phase, in order: its expert is the student, those of earlier phases come frozen from their runs.

    With a single phase of one call it is DMD2 without the GAN, bit for bit. Read in notes on the paper and on public
    code: kernel, target, steps without new noise, 5 critic updates, the interleaved form. Derived: the target by x0 and
    eps for any prediction. Proposed: the gradient's normaliser, DMD2's, on x_s / alpha_s.
    Departs from the paper: phases end at thousandths of the ramp; the critic's weight is one over its target's variance
    and not min(1, 10 sigma^2), which is for flows; an interleaved run averages the last expert alone.
    """

    name: Literal["phased_dmd"] = "phased_dmd"
    boundaries: tuple[Annotated[int, Field(gt=MARGIN, lt=INDICES - MARGIN)], ...] = (499,)
    """Noise levels between phases, from noise to clean: n of them for n + 1 phases."""
    phase_steps: Annotated[int, Field(ge=1, le=4)] = 1
    """Calls of each expert."""
    earlier: tuple[str, ...] = ()
    """Folders of the runs of the earlier phases, in order; () trains the first phase."""
    interleaved: bool = False
    """Train all phases in one run, whose steps they take in turn. Each has a critic; the student is the last expert."""

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
            last = f"the last of {len(self.boundaries) + 1} phases has {len(self.boundaries)} before it"
            raise ValueError(f"earlier: {len(self.earlier)} runs, but {last}")
        if self.earlier and self.interleaved:
            raise ValueError("earlier: an interleaved run trains the experts of all phases; leave it out")
        return self

    @property
    def number(self) -> int:
        """The last phase that this run samples with, counted from 0."""
        return len(self.boundaries) if self.interleaved else len(self.earlier)

    def nets(self, make: Make) -> dict[str, Any]:
        nets = super().nets(make) | {f"expert{i}": make.run(folder) for i, folder in enumerate(self.earlier, 1)}
        others = [role for i in range(self.number) for role in self.team(i)] if self.interleaved else []
        return nets | {role: make.copy(role) for role in others}

    def team(self, phase: int) -> tuple[str, str]:
        """Roles of a phase's expert and of its critic."""
        return ("student", "fake") if phase == self.number else (f"expert{phase + 1}", f"fake{phase + 1}")

    def phases(self) -> tuple[Phase, ...]:
        updates, count = super().phases(), self.number + 1
        if not self.interleaved:
            return updates
        phases = []
        for i, update in ((i, update) for i in range(count) for update in updates):
            role, name = self.team(i)[updates.index(update)], update.name + ("" if i == self.number else f"{i + 1}")
            loss = partial(self._in_turn, i, update.loss.__name__)
            phases.append(Phase(name, (role,), loss, every=count * update.every, first=i))
        return tuple(phases)

    def _in_turn(self, phase: int, what: str, nets: Nets, batch: Batch, *more: Any) -> Any:
        """A function of a phase's own run, by name, with the networks that it would have."""
        alone = self.model_copy(update={"interleaved": False, "earlier": ("",) * phase})
        own = dict(nets) | {role: nets[its] for role, its in zip(("student", "fake"), self.team(phase), strict=True)}
        return getattr(alone, what)(own, batch, *more)

    @property
    def end(self) -> int:
        """Level at which this run ends; 0 is clean."""
        return (*self.boundaries, 0)[self.number]

    def indices(self) -> list[int]:
        """Levels of the calls of all experts up to this run's last."""
        marks, steps = (self.conditioning, *self.boundaries, 0)[: self.number + 2], self.phase_steps
        return [round(top - i * (top - end) / steps) for top, end in pairwise(marks) for i in range(steps)]

    def calls(self, net: Any) -> tuple[Call, ...]:
        roles = [self.team(i // self.phase_steps)[0] for i in range(len(self.indices()))]
        calls = calls_at(net.schedule, tuple(index / (INDICES - 1) for index in self.indices()), on_ramp=True)
        return tuple(replace(call, role=role, then="step") for call, role in zip(calls, roles, strict=True))

    def prepare(self, nets: Nets, batch: Batch, trains: tuple[str, ...]) -> Batch:
        """Takes a call of this phase at random to x0, "x", and without new noise to the phase's end, "x_s"."""
        if self.interleaved:
            phase = batch.draws.step % (self.number + 1)
            return self._in_turn(phase, "prepare", nets, batch, ("student",) if self.team(phase)[0] in trains else ())
        calls, first = self.calls(nets["student"]), self.number * self.phase_steps
        x_t, level = simulated_call(nets, calls, batch.z, batch.cond, batch.draws, first)
        with torch.set_grad_enabled("student" in trains):
            x0 = nets["student"](x_t, level, batch.cond)
            x_s = level.step(x_t, x0, level_at(nets["student"].schedule, self.end, x0)) if self.end else x0
        return batch.make(x=x0, x_s=x_s)

    def match_samples(self, batch: Batch) -> Tensor:
        return batch.made["x_s"]

    def kernel(self, nets: Nets, batch: Batch, name: str, low: int, high: int) -> tuple[Kernel, Tensor]:
        """The kernel from the phase's end to a level drawn for each sample, in thousandths, and its noise (B, ...)."""
        x_s, net = self.match_samples(batch), nets["teacher"]
        low = max(low, self.end + MARGIN) if self.end else low
        _, level, eps = noised(batch.draws, name, net.schedule, x_s.detach(), low, high)
        return Kernel(level_at(net.schedule, self.end, x_s), level), eps

    def match_noise(self, nets: Nets, batch: Batch, x: Tensor) -> tuple[Tensor, Level]:
        kernel, eps = self.kernel(nets, batch, "match", *self.match_range)
        return kernel.noise(x, eps), kernel.t

    def direction(self, x: Tensor, real: Tensor, fake: Tensor, level: Level) -> tuple[Tensor, Tensor]:
        return matching_gradient(x / level_at(level.schedule, self.end, x).alpha, real, fake)

    def critic_loss(self, nets: Nets, batch: Batch) -> tuple[Terms, Terms]:
        """Score matching within the subinterval, whose targets need no clean sample."""
        x_s, fake = self.match_samples(batch).detach(), nets["fake"]
        kernel, eps = self.kernel(nets, batch, "critic", 0, INDICES - 1)
        raw = fake(kernel.noise(x_s, eps), kernel.t, self.critic_condition(batch), "raw")
        weight = kernel.weight(fake.target).sqrt()
        return {"denoise": F.mse_loss(weight * raw, weight * fake.target(kernel.t, *kernel.targets(x_s, eps)))}, {}
