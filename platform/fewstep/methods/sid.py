"""Score identity distillation: exponentially fast distillation of pretrained diffusion models for one-step generation
(SiD). Zhou et al. 2024, arXiv:2404.04057.

With `gan_weight` it is the adversarial form, SiDA (arXiv:2410.14919).
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from ..diffusion.draws import INDICES, index_level
from ..diffusion.health import statistics, verdicts
from ..diffusion.losses import gan_discriminator, gan_generator
from ..diffusion.samplers import Call, calls_at, run_calls
from .base import Batch, Index, Make, Method, Nets, Phase, Range, Terms


class SiD(Method):
    """One-step generator from the difference of two scores, with the gradient through both.

    Departs from the papers: SiD's loss is a mean over values, not a sum, and SiDA's weights are its ratio of the two
    terms at 3,072 values.
    """

    name: Literal["sid"] = "sid"
    alpha: float = 1.2
    """Weight of the Fisher divergence's naive estimate, which is subtracted from the score identity's; 1.0 and 1.2 are
    the published ones."""
    match_range: Range[Index] = (0, 800)
    """Levels of the score terms in thousandths of the schedule, both ends included."""
    conditioning: Index = 499
    """Level at which the student is called, in the same thousandths; 499 of EDM's is sigma 2.5."""
    gan_weight: Annotated[float, Field(ge=0)] = 0.0
    """Weight of the student's adversarial term, read off the critic's own bottleneck; 0 is SiD."""
    critic_gan_weight: Annotated[float, Field(gt=0)] = 1e-2
    """Weight of the critic's adversarial term, where there is one."""
    headline: ClassVar[tuple[str, ...]] = ("student/score", "critic/denoise")

    @property
    def needs(self) -> tuple[str, ...]:
        return ("real",) if self.gan_weight else ()

    def nets(self, make: Make) -> dict[str, Any]:
        return {"teacher": make.teacher, "student": make.copy("student"), "fake": make.copy("fake")}

    def phases(self) -> tuple[Phase, ...]:
        return (Phase("student", ("student",), self.student_loss), Phase("critic", ("fake",), self.critic_loss))

    def calls(self, net: Any) -> tuple[Call, ...]:
        return calls_at(net.schedule, (self.conditioning / (INDICES - 1),), on_ramp=True)

    def prepare(self, nets: Nets, batch: Batch, trains: tuple[str, ...]) -> Batch:
        with torch.set_grad_enabled("student" in trains):
            return batch.make(x=run_calls(nets, self.calls(nets["student"]), batch.z, batch.cond, batch.draws))

    def noised(self, nets: Nets, batch: Batch, name: str, x: Tensor, *levels: int) -> tuple[Tensor, Any, Tensor]:
        """Samples x noised to levels drawn uniformly between two: x_t, its level and the noise."""
        level = index_level(batch.draws, f"{name}/t", nets["fake"].schedule, *levels, x)
        eps = batch.draws.normal(f"{name}/eps", x.shape)
        return level.noise(x, eps), level, eps

    def student_loss(self, nets: Nets, batch: Batch) -> tuple[Terms, Terms]:
        x, cond = batch.x, batch.cond
        x_t, level, _ = self.noised(nets, batch, "match", x, *self.match_range)
        real = nets["teacher"](x_t, level, cond)
        fake, features = nets["fake"](x_t, level, cond, "both")
        scale = (x - real).detach().flatten(1).abs().mean(1).clamp_min(1e-5)
        product = (real - fake) * ((real - x) - self.alpha * (real - fake))  # eq. 23
        terms = {"score": (product.flatten(1).mean(1) / scale).mean()}
        if self.gan_weight:
            terms["gan"] = self.gan_weight * gan_generator(logits(features))
        return terms, statistics(x, batch.real)

    def critic_loss(self, nets: Nets, batch: Batch) -> tuple[Terms, Terms]:
        x, fake, top = batch.x.detach(), nets["fake"], INDICES - 1
        x_t, level, eps = self.noised(nets, batch, "critic", x, 0, top)
        raw, features = fake(x_t, level, batch.cond, "raw+features")
        terms, health = {"denoise": F.mse_loss(raw, fake.target(level, x, eps))}, {}
        if self.gan_weight:
            x_t, level, _ = self.noised(nets, batch, "critic/real", batch.real, 0, top)
            d_real = logits(fake(x_t, level, batch.real_cond, "features"))
            terms["gan"] = self.critic_gan_weight * gan_discriminator(d_real, logits(features))
            health = verdicts(d_real, logits(features))
        return terms, health


def logits(features: tuple[Tensor, ...]) -> Tensor:
    """The critic's bottleneck as a discriminator (SiDA, section 3.1): one logit a place, its mean over channels."""
    return features[0].mean(1).flatten(1)
