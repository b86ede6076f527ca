"""Improved distribution matching distillation for fast image synthesis (DMD2). Yin et al. 2024, arXiv:2405.14867."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from ..diffusion.draws import INDICES, Draws, index_level
from ..diffusion.level import Level
from ..diffusion.losses import gan_discriminator, gan_generator, matching_gradient, surrogate
from ..diffusion.samplers import few_step
from .base import Batch, Method, Nets, Phase, Terms

Index = Annotated[int, Field(ge=0, lt=INDICES)]


class DMD2(Method):
    """Hook for variations: `weight`, the factor on the matching gradient; 1 here (reverse KL).

    Noise levels are counted in thousandths of the teacher's schedule, as published: DDPM's timesteps, EDM's ramp.
    """

    name: Literal["dmd2"] = "dmd2"
    critic_updates_per_student_update: Annotated[int, Field(ge=1)] = 5
    """Two time-scale update rule (section 4.2): the critic learns every step, the student every so many."""
    gan_weight: Annotated[float, Field(ge=0)] = 3e-3
    """Weight of the student's adversarial term (section 4.3); with 0 there is no head and no classification."""
    critic_gan_weight: Annotated[float, Field(gt=0)] = 1e-2
    """Weight of the critic's classification term."""
    matching_weight: Annotated[float, Field(ge=0)] = 1.0
    """Weight of the matching term; 0 is the paper's GAN-only ablation, whose critic still denoises."""
    guidance: Annotated[float, Field(ge=1)] = 1.0
    """Guidance scale of the teacher in the matching term; the critic is never guided."""
    match_range: tuple[Index, Index] = (20, 980)
    """Levels of the matching term, both ends included; the critic learns on all."""
    match_power: Annotated[float, Field(ge=1)] = 1.0
    """Skews the matching term's levels towards low noise, where texture is decided; 1 is uniform, as published."""
    conditioning: Index = INDICES - 1
    """Level at which the student is first called: 999, or 399 against block artefacts (appendix F.4)."""
    student_steps: Annotated[int, Field(ge=1, le=8)] = 1
    """Network calls of the student (section 4.4)."""
    backward_simulation: bool = True
    """Train a later step on the student's own earlier steps (section 4.5), not on noised real images."""
    share_draws: bool = True
    """The critic's denoising and classification of a generated image at one noise draw, hence one pass, not two. The
    estimator's mean is the same; false is the published form."""

    @property
    def adversarial(self) -> bool:
        return self.gan_weight > 0 or self.weighs

    def nets(self, teacher: Any, head: Any) -> dict[str, Any]:
        nets = {"student": deepcopy(teacher), "fake": deepcopy(teacher)}
        return nets | {"disc": head()} if self.adversarial else nets

    def phases(self) -> tuple[Phase, ...]:
        critic = ("fake", "disc") if self.adversarial else ("fake",)
        return (
            Phase("student", ("student",), self.student_loss, every=self.critic_updates_per_student_update),
            Phase("critic", critic, self.critic_loss),
        )

    @property
    def known_roles(self) -> tuple[str, ...]:
        return ("disc", "fake", "student")

    # The student's own calls

    def indices(self) -> list[int]:
        """Levels of the student's calls, from noise: [999, 749, 499, 249] for four."""
        stride = (self.conditioning + 1) // self.student_steps
        return [self.conditioning - i * stride for i in range(self.student_steps)]

    def levels(self, student: Any, like: Tensor) -> list[Level]:
        u = torch.tensor(self.indices(), dtype=torch.float64, device=like.device) / (INDICES - 1)
        times = student.schedule.ramp(u)
        return [student.schedule.level(t.expand(like.shape[0]), like.ndim) for t in times]

    def prepare(self, nets: Nets, batch: Batch, trains: tuple[str, ...]) -> Batch:
        """Generates the images of both updates. Gradient flows through the last call only, and only for the student."""
        student, draws = nets["student"], batch.draws
        levels = self.levels(student, batch.z)
        if self.backward_simulation or self.student_steps == 1:
            last = draws.choice("last", self.student_steps)  # one for all ranks: their collectives must line up
            x_t = batch.z * levels[0].norm
            with torch.no_grad():
                for i in range(last):
                    x0 = student(x_t, levels[i], batch.cond)
                    x_t = levels[i + 1].noise(x0, draws.normal(f"renoise/{i}", x0.shape))
            level, cond = levels[last], batch.cond
        else:
            pick = draws.integers("pick", 0, self.student_steps - 1, len(batch.z)).view_as(levels[0].alpha)
            level = Level(*(torch.stack(v).gather(0, pick[None])[0] for v in zip(*map(_pair, levels), strict=True)))
            x_t = torch.where(pick == 0, batch.z * levels[0].norm, level.noise(batch.real, batch.z))
            cond = batch.real_cond
        with torch.set_grad_enabled("student" in trains):
            return replace(batch, x=student(x_t, level, cond), cond=cond)

    def describe_sampler(self) -> tuple[str, int]:
        return f"few-step-{self.student_steps}", self.student_steps

    def sample(self, student: Any, z: Tensor, cond: Any, draws: Draws) -> Tensor:
        noise = [draws.normal(f"renoise/{i}", z.shape) for i in range(self.student_steps - 1)]
        return few_step(student, z, cond, self.levels(student, z), noise)

    # The two losses

    def weight(self, nets: Nets, features: Tensor | None) -> Tensor | float:
        """Factor (B,) on the matching gradient; a variation that needs the discriminator sets `weighs` too."""
        return 1.0

    @property
    def weighs(self) -> bool:
        """Whether `weight` wants the critic's bottleneck features at the matched samples."""
        return False

    def student_loss(self, nets: Nets, batch: Batch) -> tuple[Terms, Terms]:
        x, draws, schedule = batch.x, batch.draws, nets["teacher"].schedule
        terms, health = {}, _statistics(x, batch.real)
        if self.matching_weight:
            level = index_level(draws, "match/t", schedule, *self.match_range, x, self.match_power)
            with torch.no_grad():
                x_t = level.noise(x, draws.normal("match/eps", x.shape))
                real = nets["teacher"](x_t, level, batch.cond)
                out = nets["fake"](x_t, level, batch.cond, "both" if self.weighs else "x0")
                fake, features = out if self.weighs else (out, None)
                gradient, scale = matching_gradient(x, real, fake, self.weight(nets, features))
            terms["match"] = self.matching_weight * surrogate(x, gradient)
            health |= {"match_gradient": gradient.flatten(1).norm(dim=1).mean(), "match_normaliser": scale.mean()}
        if self.gan_weight:
            level = index_level(draws, "gan/t", schedule, 0, INDICES - 1, x)
            x_t = level.noise(x, draws.normal("gan/eps", x.shape))
            logits = nets["disc"](nets["fake"](x_t, level, batch.cond, "features"))
            terms["gan"] = self.gan_weight * gan_generator(logits)
        return terms, health

    def critic_loss(self, nets: Nets, batch: Batch) -> tuple[Terms, Terms]:
        x, draws, fake = batch.x.detach(), batch.draws, nets["fake"]
        share = self.share_draws and self.adversarial
        level = index_level(draws, "critic/t", fake.schedule, 0, INDICES - 1, x)
        eps = draws.normal("critic/eps", x.shape)
        out = fake(level.noise(x, eps), level, batch.cond, "raw+features" if share else "raw")
        raw, features = out if share else (out, None)
        terms, health = {"denoise": F.mse_loss(raw, fake.target(level, x, eps))}, {}
        if self.adversarial:
            if not share:
                level = index_level(draws, "critic/fake/t", fake.schedule, 0, INDICES - 1, x)
                x_t = level.noise(x, draws.normal("critic/fake/eps", x.shape))
                features = fake(x_t, level, batch.cond, "features")
            level = index_level(draws, "critic/real/t", fake.schedule, 0, INDICES - 1, x)
            real_t = level.noise(batch.real, draws.normal("critic/real/eps", x.shape))
            real_features = fake(real_t, level, batch.real_cond, "features")
            d_real, d_fake = nets["disc"](torch.cat([real_features, features])).chunk(2)
            terms["gan"] = self.critic_gan_weight * gan_discriminator(d_real, d_fake)
            health = _verdicts(d_real.detach(), d_fake.detach())
        return terms, health


def _pair(level: Level) -> tuple[Tensor, Tensor]:
    return level.alpha, level.sigma


def _statistics(x: Tensor, real: Tensor) -> Terms:
    """Brightness, contrast and diversity of the student against the data; the shares of values beyond [-1, 1] by a grey
    level, which for data in pixels is none. Diversity, `spread`, is the standard deviation of a pixel over the batch,
    averaged over pixels; a batch of one image has none to report."""
    x = x.detach()
    health = {
        "student_mean": x.mean(),
        "student_std": x.std(),
        "real_mean": real.mean(),
        "real_std": real.std(),
        "saturated": (x.abs() > 1 + 2 / 255).float().mean(),
        "real_saturated": (real.abs() > 1 + 2 / 255).float().mean(),
    }
    if len(x) > 1:
        health |= {"student_spread": x.std(dim=0).mean(), "real_spread": real.std(dim=0).mean()}
    return health


def _verdicts(real: Tensor, fake: Tensor) -> Terms:
    """Of the discriminator's logits: mean probability that an image is real, and the share of logits on the right side
    (one half when it cannot tell; a logit of exactly 0 is on neither)."""
    right = ((real > 0).float().mean() + (fake < 0).float().mean()) / 2
    return {"d_real": real.sigmoid().mean(), "d_fake": fake.sigmoid().mean(), "d_accuracy": right}
