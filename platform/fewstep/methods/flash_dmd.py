"""Flash-DMD: towards high-fidelity few-step image generation with efficient distillation and joint reinforcement
learning. Chen et al. 2025, arXiv:2511.20549.

Matching trains the calls at high noise, and a GAN on pixels the last call; in DMD2 the two conflict in every call. The
critic is coupled to the student, so that it needs no five updates. A reward may join, with distillation as its anchor.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from ..diffusion.health import statistics, verdicts
from ..diffusion.losses import hinge_discriminator, hinge_generator, preference
from ..diffusion.perceptual import clean_maps
from ..diffusion.samplers import enter_call, last_call
from .base import Batch, Make, Nets, Phase, Terms
from .dmd2 import DMD2
from .matching import DistributionMatching

CANDIDATES = 4


class FlashDMD(DMD2):
    """DMD2 of several calls with a loss for each part of them.

    Read in notes on the paper: which call gets which loss, the hinge loss, the coupling, and rewards in 5 of 6 updates.
    Derived: the likelihoods of the preference. Proposed: all weights; the teacher at faint noise as the discriminator's
    frozen encoder; and a candidate's reward, which a helper gives to the student's next x0 and not to noisy images.
    """

    name: Literal["flash_dmd"] = "flash_dmd"
    critic_updates_per_student_update: Annotated[int, Field(ge=1)] = 1
    """Critic updates a student update, 1 or 2 as published."""
    gan_weight: Annotated[float, Field(ge=0)] = 5e-3
    """Weight of the last call's adversarial term."""
    student_steps: Annotated[int, Field(ge=1, le=8)] = 4
    """Network calls of the student."""
    split: bool = True
    """Matching for all calls but the last, and the GAN on pixels for the last; false is DMD2's losses in every call."""
    coupling: Annotated[float, Field(gt=0, lt=1)] | None = 0.99
    """Share of itself that the critic keeps after a student update; the rest is the student's. null couples nothing."""
    reward_updates: Annotated[int, Field(ge=0)] = 0
    """Updates of the student by `helpers.reward` after each by distillation; 5 as published."""
    reference: str | None = None
    """Run whose student the rewarded one is compared with: the run that it starts from."""
    reward_beta: Annotated[float, Field(gt=0)] = 500.0
    """Sharpness of the preference between candidates, on likelihoods a value."""

    @model_validator(mode="after")
    def _several(self) -> FlashDMD:
        if (self.split or self.reward_updates) and (self.student_steps < 2 or not self.backward_simulation):
            raise ValueError("split: needs student_steps of 2 or more, and backward_simulation; else give split=false")
        if self.reward_updates and self.reference is None:
            raise ValueError("reference: missing; rewards compare the student with that of a run")
        if self.split and self.gan_draw == "match":
            raise ValueError("gan_draw: match shares the matching term's draw, and a split GAN has none; use own")
        return self

    def nets(self, make: Make) -> dict[str, Any]:
        nets = super().nets(make)
        if self.reward_updates:
            nets |= {"reward": make.helper("reward"), "reference": make.run(self.reference)}
        return nets

    def phases(self) -> tuple[Phase, ...]:
        student, critic = super().phases()
        if not self.reward_updates:
            return student, critic
        rest = Phase("reward", ("student",), self.reward_loss, every=student.every, unless="student")
        return replace(student, every=student.every * (1 + self.reward_updates)), rest, critic

    def prepare(self, nets: Nets, batch: Batch, trains: tuple[str, ...]) -> Batch:
        """Generates x by a call at high noise, from it without gradient the last call's input, and "low" by that."""
        if not self.split:
            return super().prepare(nets, batch, trains)
        student, draws, calls = nets["student"], batch.draws, self.calls(nets["student"])
        number = draws.choice("last", self.student_steps - 1)
        with torch.no_grad():
            x_t, level = enter_call(nets, calls, batch.z, batch.cond, draws, number)
        with torch.set_grad_enabled("student" in trains):
            x = student(x_t, level, batch.cond)
            if not self.gan_weight:
                return batch.make(x=x)
            low_t, low_level = last_call(nets, calls, x.detach(), number, batch.cond, draws)
            return batch.make(x=x, low=student(low_t, low_level, batch.cond))

    def verdict(self, nets: Nets, x: Tensor, cond: Any) -> Tensor:
        """The pixel discriminator's logits (B,) of images x (B, ...)."""
        return nets["disc"](clean_maps(nets["teacher"], x, cond, self.taps))

    def extra(self, nets: Nets, batch: Batch, match: Terms) -> Terms:
        if not self.split or not self.gan_weight:
            return super().extra(nets, batch, match)
        return {"gan": self.gan_weight * hinge_generator(self.verdict(nets, batch.made["low"], batch.cond))}

    def critic_loss(self, nets: Nets, batch: Batch) -> tuple[Terms, Terms]:
        if not self.split or not self.gan_weight:
            return super().critic_loss(nets, batch)
        terms, _ = DistributionMatching.critic_loss(self, nets, batch)
        d_real = self.verdict(nets, batch.real, batch.real_cond)
        d_fake = self.verdict(nets, batch.made["low"].detach(), batch.cond)
        gan = self.critic_gan_weight * hinge_discriminator(d_real, d_fake)
        return terms | {"gan": gan}, verdicts(d_real, d_fake)

    def after(self, nets: Nets, phase: Phase, step: int) -> None:
        if phase.name == "student" and self.coupling is not None:
            for own, theirs in zip(nets["fake"].parameters(), nets["student"].parameters(), strict=True):
                own.lerp_(theirs, 1 - self.coupling)

    def reward_loss(self, nets: Nets, batch: Batch) -> tuple[Terms, Terms]:
        """Makes the best of several candidates for the next call's input likelier than the worst."""
        calls, draws, cond = self.calls(nets["student"]), batch.draws, batch.cond
        number = draws.choice("reward", self.student_steps - 1)
        with torch.no_grad():
            x_t, level = enter_call(nets, calls, batch.z, cond, draws, number)
            anchor = nets["reference"](x_t, level, cond)
        x0, to = nets["student"](x_t, level, cond), calls[number + 1].level(x_t)
        with torch.no_grad():
            noises = [draws.normal(f"candidate/{i}", x0.shape) for i in range(CANDIDATES)]
            candidates = torch.stack([to.noise(x0, eps) for eps in noises])
            rewards = torch.stack([nets["reward"](nets["student"](x, to, cond), cond) for x in candidates])
        rows = torch.arange(len(x0), device=x0.device)
        best, worst = (candidates[pick, rows] for pick in (rewards.argmax(0), rewards.argmin(0)))
        square = lambda x, mean: ((x - to.alpha * mean) / to.sigma).square().flatten(1).mean(1)
        gain = lambda x: (square(x, anchor) - square(x, x0)) / 2
        loss = preference(gain(best), gain(worst), self.reward_beta)
        return {"preference": loss}, statistics(x0, batch.real) | {"reward": rewards.mean()}
