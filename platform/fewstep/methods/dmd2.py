"""Improved distribution matching distillation for fast image synthesis (DMD2). Yin et al. 2024, arXiv:2405.14867."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field, field_validator, model_validator
from torch import Tensor
from torch.nn import functional as F

from ..diffusion.draws import INDICES, index_level
from ..diffusion.guidance import guided
from ..diffusion.health import statistics, verdicts
from ..diffusion.losses import gan_discriminator, gan_generator, matching_gradient, surrogate
from ..diffusion.samplers import Call, calls_at, enter_call
from .base import Batch, Make, Method, Nets, Phase, Terms

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
    gan_features: Literal["critic", "teacher"] = "critic"
    """Features that the discriminator reads: the critic's, which learns them (section 4.3), or the frozen teacher's, as
    latent adversarial distillation has it (arXiv:2403.12015), for which no gradient passes through the critic."""
    taps: tuple[str, ...] = ("middle",)
    """Names of the network's taps that the discriminator reads, with one head over all of them."""
    gan_draw: Literal["own", "match"] = "own"
    """Noise draw of the student's adversarial term: its own over all levels, as published, or the matching term's,
    whose pass it then shares."""
    share_draws: bool = True
    """The critic's denoising and classification of a generated image at one noise draw, hence one pass, not two. The
    estimator's mean is the same; false is the published form."""

    headline: ClassVar[tuple[str, ...]] = ("health/match_gradient", "critic/denoise")
    cure: ClassVar[str] = "Raise method.critic_updates_per_student_update, or lower optim.student.lr"

    @field_validator("match_range")
    @classmethod
    def _match_range(cls, levels: tuple[int, int]) -> tuple[int, int]:
        if levels[0] > levels[1]:
            raise ValueError("give the lower level first")
        return levels

    @model_validator(mode="after")
    def _draws_fit(self) -> DMD2:
        if self.gan_draw == "match" and (self.weighs or not self.matching_weight):
            raise ValueError("gan_draw: match shares the pass of a matching term without a weight; use own")
        return self

    @property
    def judge(self) -> str:
        """The role whose features the discriminator reads."""
        return "fake" if self.gan_features == "critic" else "teacher"

    @property
    def adversarial(self) -> bool:
        """True where there is a discriminator."""
        return self.gan_weight > 0 or self.weighs

    def nets(self, make: Make) -> dict[str, Any]:
        nets = {"teacher": make.teacher, "student": make.copy("student"), "fake": make.copy("fake")}
        return nets | {"disc": make.head("disc", self.taps)} if self.adversarial else nets

    def phases(self) -> tuple[Phase, ...]:
        critic = ("fake", "disc") if self.adversarial else ("fake",)
        return (
            Phase(
                "student",
                ("student",),
                self.student_loss,
                every=self.critic_updates_per_student_update,
                measure=self.measure if self.weighs and self.matching_weight else None,
            ),
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

    def calls(self, net: Any) -> tuple[Call, ...]:
        return calls_at(net.schedule, tuple(index / (INDICES - 1) for index in self.indices()), on_ramp=True)

    def prepare(self, nets: Nets, batch: Batch, trains: tuple[str, ...]) -> Batch:
        """Generates the images of both updates. Gradient flows through the last call only, and only for the student."""
        student, draws, calls = nets["student"], batch.draws, self.calls(nets["student"])
        if self.backward_simulation or self.student_steps == 1:
            last = draws.choice("last", self.student_steps)  # one for all ranks: their collectives must line up
            with torch.no_grad():
                x_t, level = enter_call(nets, calls, batch.z, batch.cond, draws, last)
            cond = batch.cond
        else:
            pick = draws.integers("pick", 0, self.student_steps - 1, len(batch.z))
            times = torch.tensor([call.t for call in calls], dtype=torch.float64, device=pick.device)
            level = student.schedule.level(times[pick], batch.z.ndim)
            first = (pick == 0).view_as(level.alpha)
            x_t = torch.where(first, batch.z * level.start, level.noise(batch.real, batch.z))
            cond = batch.real_cond
        with torch.set_grad_enabled("student" in trains):
            return replace(batch, cond=cond).make(x=student(x_t, level, cond))

    # The two losses

    def weight(self, nets: Nets, features: Any) -> Tensor:
        """Factor (B,) on the matching gradient, which is divided by its mean over the global batch. A variation that
        has one sets `weighs`, too."""
        return torch.ones(len(features[0]), device=features[0].device)

    @property
    def weighs(self) -> bool:
        """True for a variation whose matching gradient has a `weight`."""
        return False

    def matching(self, nets: Nets, batch: Batch) -> Terms:
        """The matching term's `gradient` (B, ...) and `normaliser` (B,); its `weight` (B,) where there is one; and the
        discriminator's `features` where its term shares the noise draw."""
        shared, cond = self.gan_weight > 0 and self.gan_draw == "match", batch.cond
        x = batch.x if shared else batch.x.detach()
        level = index_level(batch.draws, "match/t", nets["teacher"].schedule, *self.match_range, x, self.match_power)
        x_t, features = level.noise(x, batch.draws.normal("match/eps", x.shape)), None
        judged, plain = shared or self.weighs, self.guidance == 1 or self.judge == "fake"
        with torch.set_grad_enabled(shared):
            if judged and plain:
                judged_x0, features = nets[self.judge](x_t, level, cond, "both", at=self.taps)
            elif judged:
                features = nets["teacher"](x_t, level, cond, "features", at=self.taps)
        with torch.no_grad():
            if judged and plain and self.judge == "teacher":
                real = judged_x0
            else:
                real = guided(nets["teacher"], x_t, level, cond, self.guidance, batch.null)
            fake = judged_x0 if judged and self.judge == "fake" else nets["fake"](x_t, level, cond)
            gradient, normaliser = matching_gradient(x.detach(), real.detach(), fake.detach())
            found = {"gradient": gradient, "normaliser": normaliser}
            return found | {"weight": self.weight(nets, features)} if self.weighs else found | {"features": features}

    def measure(self, nets: Nets, batch: Batch) -> tuple[Terms, Terms]:
        """The matching term's weight, to be averaged over the global batch."""
        found = self.matching(nets, batch)
        return {"weight": found["weight"].mean()}, found

    def student_loss(self, nets: Nets, batch: Batch) -> tuple[Terms, Terms]:
        x, draws, schedule = batch.x, batch.draws, nets["teacher"].schedule
        terms, health = {}, statistics(x, batch.real)
        if self.matching_weight:
            found = batch.made if self.weighs else self.matching(nets, batch)
            gradient, normaliser = found["gradient"], found["normaliser"]
            if self.weighs:
                weight = found["weight"] / batch.made["mean/weight"]
                gradient = gradient * weight.view(-1, *[1] * (x.ndim - 1))
            terms["match"] = self.matching_weight * surrogate(x, gradient)
            norm = gradient.flatten(1).norm(dim=1).mean()
            health |= {"match_gradient": norm, "match_normaliser": normaliser.mean()}
        if self.gan_weight and self.gan_draw == "match":
            terms["gan"] = self.gan_weight * gan_generator(nets["disc"](found["features"]))
        elif self.gan_weight:
            level = index_level(draws, "gan/t", schedule, 0, INDICES - 1, x)
            x_t = level.noise(x, draws.normal("gan/eps", x.shape))
            logits = nets["disc"](nets[self.judge](x_t, level, batch.cond, "features", at=self.taps))
            terms["gan"] = self.gan_weight * gan_generator(logits)
        return terms, health

    def critic_loss(self, nets: Nets, batch: Batch) -> tuple[Terms, Terms]:
        x, draws, fake, judge = batch.x.detach(), batch.draws, nets["fake"], nets[self.judge]
        share = self.share_draws and self.adversarial and self.judge == "fake"
        level = index_level(draws, "critic/t", fake.schedule, 0, INDICES - 1, x)
        eps = draws.normal("critic/eps", x.shape)
        if share:
            raw, features = fake(level.noise(x, eps), level, batch.cond, "raw+features", at=self.taps)
        else:
            raw, features = fake(level.noise(x, eps), level, batch.cond, "raw"), None
        terms, health = {"denoise": F.mse_loss(raw, fake.target(level, x, eps))}, {}
        if self.adversarial:
            if not share:
                level = index_level(draws, "critic/fake/t", fake.schedule, 0, INDICES - 1, x)
                x_t = level.noise(x, draws.normal("critic/fake/eps", x.shape))
                features = judge(x_t, level, batch.cond, "features", at=self.taps)
            level = index_level(draws, "critic/real/t", fake.schedule, 0, INDICES - 1, x)
            real_t = level.noise(batch.real, draws.normal("critic/real/eps", x.shape))
            real_features = judge(real_t, level, batch.real_cond, "features", at=self.taps)
            both = tuple(torch.cat(maps) for maps in zip(real_features, features, strict=True))
            d_real, d_fake = nets["disc"](both).chunk(2)
            terms["gan"] = self.critic_gan_weight * gan_discriminator(d_real, d_fake)
            health = verdicts(d_real, d_fake)
        return terms, health
