"""Hyper-SD: trajectory segmented consistency model for efficient image synthesis. Ren et al. 2024, arXiv:2404.13686."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from ..diffusion.draws import INDICES, Draws, grid_level
from ..diffusion.health import statistics, verdicts
from ..diffusion.level import Level
from ..diffusion.losses import clamped, gan_discriminator, gan_generator
from ..diffusion.samplers import Call, calls_at, simulated_call
from .base import Batch, Make, Nets, Phase, Terms
from .ladd import make_heads
from .pcm import PCM


class HyperSD(PCM):
    """One stage of Hyper-SD: consistency inside `segments` of the path, towards any level of a segment (TSCD), with a
    GAN between the two states that meet, and feedback by a reward.

    The stages are runs with 8, 4, 2 and 1 segments, each from the one before (jobs/chains), and one adapter serves all
    numbers of calls. Departs from the paper: half of the ends are a segment's edge, as a network without the end as an
    input cannot meet all of them; the discriminator sees a state alone; feedback is one reward, in the same run; and
    the last stage, DMD, is `dmd2`.
    """

    name: Literal["hyper_sd"] = "hyper_sd"
    segments: Annotated[int, Field(ge=1, le=64)] = 8
    """Segments of the path in this stage; solver_steps is a multiple of it."""
    student_steps: Annotated[int, Field(ge=1, le=64)] = 8
    """Network calls of the sampler, which may differ from `segments`; solver_steps is a multiple of it, too."""
    ends: Literal["uniform", "mixed", "conditioned"] = "mixed"
    """Level at which two states meet: any from the segment's edge up to the cleaner state, half of the time the edge,
    or any, which the student gets as an input."""
    eta: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Sampling goes down to 1 - eta of the next index, and noises from there to it (TCD); 0 adds no noise, 1 is all
    noise."""
    consistency_weight: Annotated[float, Field(ge=0)] = 1.0
    """Weight of the distance."""
    gan_weight: Annotated[float, Field(ge=0)] = 0.0
    """Weight of the student's adversarial term; the paper's is small for 8 and 4 segments, and large for 2 and 1."""
    taps: Annotated[tuple[str, ...], Field(min_length=1)] = ("middle",)
    """Names of the teacher's taps that the discriminator reads, with a head each."""
    feedback_weight: Annotated[float, Field(ge=0)] = 0.0
    """Weight of the feedback, relu(reward_goal - reward) of the sampler's own x0; needs `helpers.reward`."""
    reward_goal: float = 0.0
    """Reward beyond which there is nothing to gain."""
    headline: ClassVar[tuple[str, ...]] = ("health/consistency",)

    @model_validator(mode="after")
    def _segments_on_the_grid(self) -> HyperSD:
        if self.solver_steps % self.segments:
            raise ValueError(f"solver_steps: {self.solver_steps} is no multiple of segments {self.segments}")
        if not (self.consistency_weight or self.gan_weight or self.feedback_weight):
            raise ValueError("consistency_weight: 0, and so are gan_weight and feedback_weight; give one a weight")
        return self

    @property
    def inputs(self) -> tuple[str, ...]:
        return (*super().inputs, *(("end",) if self.ends == "conditioned" else ()))

    def nets(self, make: Make) -> dict[str, Any]:
        nets = super().nets(make) | ({"disc": make_heads(make, self.taps)} if self.gan_weight else {})
        return nets | ({"reward": make.helper("reward")} if self.feedback_weight else {})

    def phases(self) -> tuple[Phase, ...]:
        disc = (Phase("disc", ("disc",), self.disc_loss),) if self.gan_weight else ()
        return (*super().phases(), *disc)

    @property
    def known_roles(self) -> tuple[str, ...]:
        return ("disc", "student")

    def calls(self, net: Any) -> tuple[Call, ...]:
        calls, stride = super().calls(net), INDICES // self.solver_steps
        shares = tuple((1 - self.eta) * (number * stride - 1) / (INDICES - 1) for number in self.numbers()[1:])
        ratios = [to.sigma / to.alpha for to in calls_at(net.schedule, shares, on_ramp=True)] if shares else []
        if self.eta:
            kept = [ratio * to.alpha / to.sigma for ratio, to in zip(ratios, calls[1:], strict=True)]
            calls = tuple(replace(c, then="renoise", kept=k) for c, k in zip(calls, [*kept, 0.0], strict=True))
        if self.ends == "conditioned":
            calls = tuple(
                replace(c, extra={**c.extra, "end": math.atan(ratio)})
                for c, ratio in zip(calls, [*ratios, 0.0], strict=True)
            )
        return calls

    def end_number(self, number: Tensor, draws: Draws) -> Tensor:
        """A grid number (B,) in the segment of `number`, from its edge up to number - 1."""
        size = self.solver_steps // self.segments
        edge = (number - 1).div(size, rounding_mode="floor") * size
        u = draws.uniform("end", len(number))
        if self.ends == "mixed":
            u = torch.where(draws.uniform("end/edge", len(number)) < 0.5, 0.0, u)
        return edge + (u * (number - edge)).floor().long()

    def end_scalars(self, end: Level) -> dict[str, Tensor]:
        return {"end": end.angle.flatten()} if self.ends == "conditioned" else {}

    def prepare(self, nets: Nets, batch: Batch, trains: tuple[str, ...]) -> Batch:
        with torch.set_grad_enabled("student" in trains):
            return batch.make(**self.pair(nets, batch))

    def verdict(self, nets: Nets, batch: Batch, state: Tensor) -> Tensor:
        """Logits (B, taps) of states at the level where they meet."""
        number = batch.draws.integers("t", 1, self.solver_steps, len(state))
        end = self.end_number(number, batch.draws)
        level = grid_level(nets["teacher"].schedule, end, self.solver_steps, state)
        return nets["disc"](nets["teacher"](state, level, batch.real_cond, "features", at=nets["disc"].at))

    def loss(self, nets: Nets, batch: Batch) -> tuple[Terms, Terms]:
        ours, terms = batch.made["ours"], {}
        distance = self.difference(ours, batch.made["goal"])
        if self.consistency_weight:
            terms["consistency"] = self.consistency_weight * distance
        if self.gan_weight:
            terms["gan"] = self.gan_weight * gan_generator(self.verdict(nets, batch, ours))
        health = {"consistency": distance.detach(), **statistics(batch.made["made"], batch.real)}
        if self.feedback_weight:
            calls = self.calls(nets["student"])
            x_t, level = simulated_call(nets, calls, batch.z, batch.cond, batch.draws)
            last = calls[batch.draws.choice("last", len(calls))]
            reward = nets["reward"](last.denoise(nets, x_t, level, batch.cond), batch.cond)
            terms["feedback"] = self.feedback_weight * clamped(reward, self.reward_goal)
            health["reward"] = reward.detach().mean()
        return terms, health

    def disc_loss(self, nets: Nets, batch: Batch) -> tuple[Terms, Terms]:
        real, fake = (self.verdict(nets, batch, batch.made[name].detach()) for name in ("goal", "ours"))
        return {"gan": gan_discriminator(real, fake)}, verdicts(real, fake)
