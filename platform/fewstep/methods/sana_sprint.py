"""SANA-Sprint: one-step diffusion with continuous-time consistency distillation. Chen et al. 2025, arXiv:2503.09641."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from ..diffusion.draws import lognormal_level
from ..diffusion.health import statistics, verdicts
from ..diffusion.losses import hinge_discriminator, hinge_generator
from ..diffusion.tangent import TRIG
from .base import Batch, Make, Nets, Phase, Terms
from .ladd import judge, make_heads
from .scm import SCM


class SanaSprint(SCM):
    """sCM for the teacher's trajectories, and LADD's heads on the frozen teacher's taps for sharpness.

    A teacher of any schedule is a TrigFlow network as it stands, without training. One student samples in any number of
    calls: `times` are [1.5583], [1.5583, 1.3] or [1.5583, 1.3, 1.1, 0.6]. Departs from the paper: sigma_d = 1; a head
    gives one logit a sample; the prompt of a misaligned pair is drawn anew, so that it may be the right one by chance.
    """

    name: Literal["sana_sprint"] = "sana_sprint"
    mean: float = 0.2
    """Mean of ln tan t."""
    std: Annotated[float, Field(gt=0)] = 1.6
    """Standard deviation of ln tan t."""
    guidance: Annotated[float, Field(ge=1)] = 4.5
    """Guidance scale of the samples."""
    guidance_range: tuple[Annotated[float, Field(ge=1)], Annotated[float, Field(ge=1)]] | None = (4.0, 5.0)
    """Guidance scales of the teacher, drawn uniformly; the student gets them as an input and samples at `guidance`.
    null trains at `guidance` alone, without the input."""
    training: Literal[False] = False
    """The teacher's features judge the samples, so there is always one."""
    warmup_steps: Annotated[int, Field(ge=0)] = 4000
    """Steps in which the tangent's second term grows from none to whole."""
    weighting: Literal["none", "learned"] = "learned"
    """Weight of the noise levels, as sCM's; with none the tangent's term is a sum over a sample's values."""
    adversarial_weight: Annotated[float, Field(gt=0)] = 0.5
    """Weight of the student's adversarial term."""
    noise_share: Annotated[float, Field(ge=0, le=1)] = 0.5
    """Share of the adversarial term's samples that the student makes from pure noise (max-time weighting)."""
    taps: Annotated[tuple[str, ...], Field(min_length=1)] = ("middle",)
    """Names of the teacher's taps, with a head each."""
    judge_mean: float = -0.6
    """Mean of ln tan t, t the discriminator's noise level."""
    judge_std: Annotated[float, Field(gt=0)] = 1.0
    """Standard deviation of the same."""
    headline: ClassVar[tuple[str, ...]] = ("health/tangent_norm", "health/d_accuracy")

    def nets(self, make: Make) -> dict[str, Any]:
        return super().nets(make) | {"disc": make_heads(make, self.taps)}

    def phases(self) -> tuple[Phase, ...]:
        return (*super().phases(), Phase("disc", ("disc",), self.disc_loss))

    @property
    def known_roles(self) -> tuple[str, ...]:
        return ("disc", *super().known_roles)

    def prepare(self, nets: Nets, batch: Batch, trains: tuple[str, ...]) -> Batch:
        """Makes the samples that are judged, from data with fresh noise: a share of them from pure noise."""
        x0, draws = batch.real, batch.draws
        t = lognormal_level(draws, "made/t", self.mean, self.std, TRIG, x0).t
        top = draws.uniform("made/top", len(x0)) < self.noise_share
        level = TRIG.level(torch.where(top, TRIG.t_max, t), x0.ndim)
        student = self.with_scalars(nets["student"], self.scale(draws, len(x0)))
        with torch.set_grad_enabled("student" in trains):
            return batch.make(x=student(level.noise(x0, batch.z), level, batch.real_cond))

    def judged(self, nets: Nets, batch: Batch, name: str, x: Tensor, cond: Any) -> Tensor:
        """Logits (B, taps) of samples x under their conditions."""
        return judge(nets, x, cond, batch.draws, name, self.judge_mean, self.judge_std)

    def loss(self, nets: Nets, batch: Batch) -> tuple[Terms, Terms]:
        terms, health = super().loss(nets, batch)
        logits = self.judged(nets, batch, "gan", batch.x, batch.real_cond)
        terms["gan"] = self.adversarial_weight * hinge_generator(logits)
        return terms, health | statistics(batch.x, batch.real)

    def disc_loss(self, nets: Nets, batch: Batch) -> tuple[Terms, Terms]:
        real = self.judged(nets, batch, "disc/real", batch.real, batch.real_cond)
        fake = self.judged(nets, batch, "disc/fake", batch.x.detach(), batch.real_cond)
        misaligned = self.judged(nets, batch, "disc/misaligned", batch.real, batch.cond)
        return {"gan": hinge_discriminator(real, torch.cat([fake, misaligned]))}, verdicts(real, fake)
