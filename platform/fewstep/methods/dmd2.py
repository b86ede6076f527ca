"""Improved distribution matching distillation for fast image synthesis (DMD2). Yin et al. 2024, arXiv:2405.14867."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor
from torch.nn import functional as F

from ..diffusion.draws import noised
from ..diffusion.health import verdicts
from ..diffusion.level import Level
from ..diffusion.losses import gan_discriminator, gan_generator
from ..diffusion.samplers import noised_call
from .base import Batch, Make, Nets, Phase, Terms
from .matching import DistributionMatching


class DMD2(DistributionMatching):
    """Distribution matching without pairs: two time scales, a GAN on the critic's features, several steps.

    Departs from the paper: the averaged student is what is scored, and `share_draws` saves a pass.
    """

    name: Literal["dmd2"] = "dmd2"
    matching_weight: Annotated[float, Field(ge=0)] = 1.0
    """Weight of the matching term; 0 is the paper's GAN-only ablation, whose critic still denoises."""
    gan_weight: Annotated[float, Field(ge=0)] = 3e-3
    """Weight of the student's adversarial term (section 4.3); with 0 there is no head and no classification."""
    critic_gan_weight: Annotated[float, Field(gt=0)] = 1e-2
    """Weight of the critic's classification term."""
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

    @model_validator(mode="after")
    def _draws_fit(self) -> DMD2:
        if self.gan_draw == "match" and (self.is_weighted or not self.matching_weight):
            raise ValueError("gan_draw: match shares the pass of a matching term without a weight; use own")
        return self

    @property
    def is_weighted(self) -> bool:
        """True for a variation whose matching gradient is weighted by what the discriminator says."""
        return False

    @property
    def judge(self) -> str:
        """The role whose features the discriminator reads."""
        return "fake" if self.gan_features == "critic" else "teacher"

    @property
    def adversarial(self) -> bool:
        """True where there is a discriminator."""
        return self.gan_weight > 0 or self.is_weighted

    @property
    def known_roles(self) -> tuple[str, ...]:
        return ("disc", "fake", "student")

    def nets(self, make: Make) -> dict[str, Any]:
        nets = super().nets(make)
        return nets | {"disc": make.head("disc", self.taps)} if self.adversarial else nets

    def phases(self) -> tuple[Phase, ...]:
        student, critic = super().phases()
        return student, replace(critic, trains=("fake", "disc")) if self.adversarial else critic

    def indices(self) -> list[int]:
        """Levels of the student's calls, from noise: [999, 749, 499, 249] for four."""
        stride = (self.conditioning + 1) // self.student_steps
        return [self.conditioning - i * stride for i in range(self.student_steps)]

    def student_input(self, nets: Nets, batch: Batch) -> tuple[Tensor, Level, Any]:
        if self.backward_simulation or self.student_steps == 1:
            return super().student_input(nets, batch)
        return *noised_call(self.calls(nets["student"]), batch.z, batch.real, batch.draws), batch.real_cond

    def features(self, nets: Nets, batch: Batch, name: str, x: Tensor, cond: Any) -> tuple[Tensor, ...]:
        """Maps that the discriminator reads of images x (B, ...), noised over all levels by the draw `name`."""
        x_t, level, _ = noised(batch.draws, name, nets[self.judge].schedule, x)
        return nets[self.judge](x_t, level, cond, "features", at=self.taps)

    def matching(self, nets: Nets, batch: Batch) -> Terms:
        """The base's, and where they are wanted the discriminator's `features` at that draw, and its `angle` (B,)."""
        shared = self.gan_weight > 0 and self.gan_draw == "match"
        if not (shared or self.is_weighted):
            return super().matching(nets, batch)
        plain = self.guidance == 1 or self.judge == "fake"  # the pass that gives features gives the judge's x0, too
        with torch.set_grad_enabled(shared):
            x_t, level = self.match_noise(nets, batch, batch.x)
            out = nets[self.judge](x_t, level, batch.cond, "both" if plain else "features", at=self.taps)
        with torch.no_grad():
            known = {self.judge: lambda *given: out[0]} if plain else {}
            scores = self.scores({**nets, **known}, batch, x_t.detach(), level)
            gradient, normaliser = self.direction(batch.x.detach(), *(x0.detach() for x0 in scores), level)
        features, angle = out[1] if plain else out, level.angle.flatten()
        return {"gradient": gradient, "normaliser": normaliser, "features": features, "angle": angle}

    def extra(self, nets: Nets, batch: Batch, match: Terms) -> Terms:
        if not self.gan_weight:
            return {}
        shared = self.gan_draw == "match"
        maps = match["features"] if shared else self.features(nets, batch, "gan", batch.x, batch.cond)
        return {"gan": self.gan_weight * gan_generator(nets["disc"](maps))}

    def critic_loss(self, nets: Nets, batch: Batch) -> tuple[Terms, Terms]:
        if not self.adversarial:
            return super().critic_loss(nets, batch)
        x, fake, features = batch.x.detach(), nets["fake"], None
        x_t, level, eps = noised(batch.draws, "critic", fake.schedule, x)
        if self.share_draws and self.judge == "fake":
            raw, features = fake(x_t, level, batch.cond, "raw+features", at=self.taps)
        else:
            raw = fake(x_t, level, batch.cond, "raw")
            features = self.features(nets, batch, "critic/fake", x, batch.cond)
        real_features = self.features(nets, batch, "critic/real", batch.real, batch.real_cond)
        both = tuple(torch.cat(maps) for maps in zip(real_features, features, strict=True))
        d_real, d_fake = nets["disc"](both).chunk(2)
        gan = self.critic_gan_weight * gan_discriminator(d_real, d_fake)
        return {"denoise": F.mse_loss(raw, fake.target(level, x, eps)), "gan": gan}, verdicts(d_real, d_fake)
