"""Distribution matching, the part that DMD and its relatives share. Yin et al. 2024, arXiv:2311.18828."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from ..diffusion.draws import INDICES, noised
from ..diffusion.guidance import guided
from ..diffusion.health import statistics
from ..diffusion.level import Level
from ..diffusion.losses import matching_gradient, surrogate
from ..diffusion.samplers import Call, calls_at, simulated_call
from .base import Batch, Index, Make, Method, Nets, Phase, Range, Terms


class DistributionMatching(Method):
    """Base of the methods that move a student along the difference of two scores, the teacher's and a critic's.

    Hooks for variations: `student_input`, `matched` (what the gradient acts on), `match_noise` (levels), `scores`
    (guidance), `direction` (sample weights), `critic_condition`, and `extra` (further terms of the student).
    Noise levels are counted in thousandths of the teacher's schedule, as published: DDPM's timesteps, EDM's ramp.
    """

    critic_updates_per_student_update: Annotated[int, Field(ge=1)] = 5
    """Two time-scale update rule (DMD2, section 4.2): the critic learns every step, the student every so many."""
    matching_weight: Annotated[float, Field(gt=0)] = 1.0
    """Weight of the matching term."""
    guidance: Annotated[float, Field(ge=1)] = 1.0
    """Guidance scale of the teacher in the matching term; the critic is never guided."""
    match_range: Range[Index] = (20, 980)
    """Levels of the matching term, both ends included; the critic learns on all."""
    match_power: Annotated[float, Field(ge=1)] = 1.0
    """Skews the matching term's levels towards low noise, where texture is decided; 1 is uniform, as published."""
    conditioning: Index = INDICES - 1
    """Level at which the student is first called: 999, or 399 against block artefacts (DMD2, appendix F.4)."""

    headline: ClassVar[tuple[str, ...]] = ("health/match_gradient", "critic/denoise")
    cure: ClassVar[str] = "Raise method.critic_updates_per_student_update, or lower optim.student.lr"

    def nets(self, make: Make) -> dict[str, Any]:
        return {"teacher": make.teacher, "student": make.copy("student"), "fake": make.copy("fake")}

    def phases(self) -> tuple[Phase, ...]:
        every = self.critic_updates_per_student_update
        return (
            Phase("student", ("student",), self.student_loss, every=every),
            Phase("critic", ("fake",), self.critic_loss),
        )

    # The student

    def indices(self) -> list[int]:
        """Levels of the student's calls, from noise."""
        return [self.conditioning]

    def calls(self, net: Any) -> tuple[Call, ...]:
        return calls_at(net.schedule, tuple(index / (INDICES - 1) for index in self.indices()), on_ramp=True)

    def student_input(self, nets: Nets, batch: Batch) -> tuple[Tensor, Level, Any]:
        """Input (B, ...), level and conditions of the call that is trained, from simulated earlier calls."""
        return *simulated_call(nets, self.calls(nets["student"]), batch.z, batch.cond, batch.draws), batch.cond

    def prepare(self, nets: Nets, batch: Batch, trains: tuple[str, ...]) -> Batch:
        """Generates the images of both updates. Gradient flows through the last call only, and only for the student."""
        x_t, level, cond = self.student_input(nets, batch)
        with torch.set_grad_enabled("student" in trains):
            return replace(batch, cond=cond).make(x=nets["student"](x_t, level, cond))

    def match_samples(self, batch: Batch) -> Tensor:
        """The samples (B, ...) whose density is matched."""
        return batch.x

    def match_noise(self, nets: Nets, batch: Batch, x: Tensor) -> tuple[Tensor, Level]:
        """The samples x (B, ...) noised for the matching term, and their levels."""
        return noised(batch.draws, "match", nets["teacher"].schedule, x, *self.match_range, self.match_power)[:2]

    def scores(self, nets: Nets, batch: Batch, x_t: Tensor, level: Level) -> tuple[Tensor, Tensor]:
        """x0 of the teacher and of the critic at the same x_t (B, ...)."""
        real = guided(nets["teacher"], x_t, level, batch.cond, self.guidance, batch.null)
        return real, nets["fake"](x_t, level, batch.cond)

    def direction(self, x: Tensor, real: Tensor, fake: Tensor, level: Level) -> tuple[Tensor, Tensor]:
        """Gradient (B, ...) of the matching term on x, and its normaliser (B,)."""
        return matching_gradient(x, real, fake)

    def matching(self, nets: Nets, batch: Batch) -> Terms:
        """The matching term's `gradient` (B, ...) and `normaliser` (B,)."""
        x = self.match_samples(batch).detach()
        with torch.no_grad():
            x_t, level = self.match_noise(nets, batch, x)
            gradient, normaliser = self.direction(x, *self.scores(nets, batch, x_t, level), level)
        return {"gradient": gradient, "normaliser": normaliser}

    def extra(self, nets: Nets, batch: Batch, match: Terms) -> Terms:
        """Further terms of the student's loss, weighted. found: of `matching`."""
        return {}

    def student_loss(self, nets: Nets, batch: Batch) -> tuple[Terms, Terms]:
        terms, match, health = {}, {}, statistics(batch.x, batch.real)
        if self.matching_weight:
            match = self.matching(nets, batch)
            terms["match"] = self.matching_weight * surrogate(self.match_samples(batch), match["gradient"])
            norm = match["gradient"].flatten(1).norm(dim=1).mean()
            health |= {"match_gradient": norm, "match_normaliser": match["normaliser"].mean()}
        return terms | self.extra(nets, batch, match), health

    # The critic

    def critic_condition(self, batch: Batch) -> Any:
        """Conditions with which the critic learns."""
        return batch.cond

    def critic_loss(self, nets: Nets, batch: Batch) -> tuple[Terms, Terms]:
        x, fake = batch.x.detach(), nets["fake"]
        x_t, level, eps = noised(batch.draws, "critic", fake.schedule, x)
        raw = fake(x_t, level, self.critic_condition(batch), "raw")
        return {"denoise": F.mse_loss(raw, fake.target(level, x, eps))}, {}
