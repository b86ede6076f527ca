"""Large scale diffusion distillation via score-regularized continuous-time consistency (rCM). Zheng et al. 2025,
arXiv:2510.08431."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from ..diffusion.draws import descending_levels, lognormal_level
from ..diffusion.health import statistics
from ..diffusion.losses import matching_gradient, surrogate
from ..diffusion.tangent import TRIG, velocity
from .base import Batch, Make, Nets, Phase, Terms
from .scm import SCM


class RCM(SCM):
    """sCM on data, with distribution matching (DMD) on the student's own rollouts; no GAN.

    Departs from the paper: the tangent's warm-up is sCM's own, and the critic learns from the first step on. Its weight
    of 0.01 is for a million values a sample; for fewer choose it so that `match_ratio` lies in 3 to 15.
    """

    name: Literal["rcm"] = "rcm"
    mean: float = -0.8
    """Mean of ln tan t, for images."""
    std: Annotated[float, Field(gt=0)] = 1.6
    """Standard deviation of ln tan t."""
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    """Steps in which the tangent's second term grows from none to whole."""
    tangent_weight: Annotated[float, Field(ge=0)] = 1.0
    """Weight of sCM's term; 0 leaves distribution matching alone."""
    matching_weight: Annotated[float, Field(ge=0)] = 0.01
    """Weight lambda of the matching term; 0 is sCM, without a critic. Both terms are sums over a sample's values."""
    student_every: Annotated[int, Field(ge=2)] = 5
    """One step of so many trains the student, the others the critic."""
    rollout_calls: Annotated[int, Field(ge=1, le=8)] = 4
    """Most calls of a rollout; their number is drawn uniformly."""
    match_mean: float = 0.0
    """Mean of ln tan t of the matching term, the critic and the rollout."""
    match_std: Annotated[float, Field(gt=0)] = 1.6
    """Standard deviation of the same."""
    headline: ClassVar[tuple[str, ...]] = ("health/tangent_norm", "health/match_ratio")

    def nets(self, make: Make) -> dict[str, Any]:
        return super().nets(make) | ({"fake": make.copy("fake")} if self.matching_weight else {})

    def phases(self) -> tuple[Phase, ...]:
        (student,) = super().phases()
        if not self.matching_weight:
            return (student,)
        critic = Phase("critic", ("fake",), self.critic_loss, unless="student")
        return (replace(student, every=self.student_every), critic)

    @property
    def known_roles(self) -> tuple[str, ...]:
        return ("fake", *super().known_roles)

    def prepare(self, nets: Nets, batch: Batch, trains: tuple[str, ...]) -> Batch:
        """Rolls the student out from noise. Gradient flows through the last call only, and only for the student."""
        if not self.matching_weight:
            return batch
        draws, x, cond = batch.draws, batch.z, batch.cond
        student = self.with_scalars(nets["student"], self.scale(draws, len(x)))
        count = 1 + draws.choice("calls", self.rollout_calls)  # one for all ranks: their collectives must line up
        levels = descending_levels(draws, "rollout", count, self.match_mean, self.match_std, TRIG, x)
        with torch.no_grad():
            for i, (level, to) in enumerate(pairwise(levels)):
                x = to.noise(student(x, level, cond), draws.normal(f"renoise/{i}", x.shape))
        with torch.set_grad_enabled("student" in trains):
            return batch.make(x=student(x, levels[-1], cond))

    def noised(self, batch: Batch, name: str) -> tuple[Tensor, Any, Tensor]:
        """The rollout's samples, noised: x_t, its level and the noise."""
        x = batch.x.detach()
        level = lognormal_level(batch.draws, f"{name}/t", self.match_mean, self.match_std, TRIG, x)
        eps = batch.draws.normal(f"{name}/eps", x.shape)
        return level.noise(x, eps), level, eps

    def loss(self, nets: Nets, batch: Batch) -> tuple[Terms, Terms]:
        terms, health = super().loss(nets, batch) if self.tangent_weight else ({}, {})
        terms = {name: self.tangent_weight * term for name, term in terms.items()}
        if not self.matching_weight:
            return terms, health
        x, (x_t, level, _) = batch.x, self.noised(batch, "match")
        teacher = self.teacher(nets, self.scale(batch.draws, len(x)), batch.null)
        with torch.no_grad():
            real, fake = teacher(x_t, level, batch.cond), nets["fake"](x_t, level, batch.cond)
            gradient, _ = matching_gradient(x.detach(), real, fake)
        values = x[0].numel()
        terms["match"] = self.matching_weight * 2 * values * surrogate(x, gradient)  # |x - sg(x - gradient)|^2
        norm = gradient.flatten(1).norm(dim=1).mean()
        health |= {"match_gradient": norm, **statistics(x, batch.real)}
        if self.tangent_weight:  # of the gradients on the student's outputs; the tangent's has the norm 1, nearly
            health["match_ratio"] = self.matching_weight / self.tangent_weight * norm
        return terms, health

    def critic_loss(self, nets: Nets, batch: Batch) -> tuple[Terms, Terms]:
        x_t, level, eps = self.noised(batch, "critic")
        target = level.alpha * eps - level.sigma * batch.x.detach()
        return {"denoise": F.mse_loss(velocity(nets["fake"], x_t, level.t, batch.cond), target)}, {}
