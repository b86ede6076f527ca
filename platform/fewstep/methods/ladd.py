"""Fast high-resolution image synthesis with latent adversarial diffusion distillation (LADD). Sauer et al. 2024,
arXiv:2403.12015."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from ..diffusion.draws import Draws, lognormal_level
from ..diffusion.guidance import guided
from ..diffusion.health import statistics, verdicts
from ..diffusion.losses import hinge_discriminator, hinge_generator
from ..diffusion.samplers import Call, calls_at, heun
from ..diffusion.schedules import Flow
from ..diffusion.tangent import TRIG
from .base import Batch, Make, Method, Nets, Phase, Terms

FLOW = Flow()


class Heads(nn.Module):
    """One head for each of several taps: a tuple of their maps -> logits (B, taps)."""

    def __init__(self, heads: Sequence[nn.Module], at: tuple[str, ...]):
        super().__init__()
        self.heads, self.at = nn.ModuleList(heads), at

    def forward(self, features: tuple[Tensor, ...]) -> Tensor:
        return torch.stack([head((f,)) for head, f in zip(self.heads, features, strict=True)], 1)


def make_heads(make: Make, taps: tuple[str, ...]) -> Heads:
    """The role `disc`: a head for each tap."""
    return Heads([make.head("disc", (tap,)) for tap in taps], taps)


def judge(nets: Nets, x: Tensor, cond: Any, draws: Draws, name: str, mean: float, std: float) -> Tensor:
    """Logits (B, taps) of samples x, noised anew with ln tan t ~ N(mean, std^2), by heads on the teacher's features."""
    level = lognormal_level(draws, f"{name}/t", mean, std, TRIG, x)
    x_t = level.noise(x, draws.normal(f"{name}/eps", x.shape))
    return nets["disc"](nets["teacher"](x_t, level, cond, "features", at=nets["disc"].at))


class LADD(Method):
    """A GAN alone: heads on several taps of the frozen teacher tell real from generated, both noised.

    Departs from the paper: a head gives one logit a sample without the noise level as an input, and the student's times
    are drawn with the same probabilities from the start.
    """

    name: Literal["ladd"] = "ladd"
    taps: Annotated[tuple[str, ...], Field(min_length=1)] = ("middle",)
    """Names of the teacher's taps, with a head each."""
    synthetic: bool = False
    """The teacher's own samples stand in for the data, as published; then no data is needed."""
    teacher_steps: Annotated[int, Field(ge=1)] = 18
    """Heun steps of such a sample: 2 teacher_steps - 1 calls."""
    guidance: Annotated[float, Field(ge=1)] = 1.0
    """Guidance scale of such samples."""
    times: tuple[Annotated[float, Field(gt=0, le=1)], ...] = (1.0, 0.75, 0.5, 0.25)
    """Flow times at which the student trains, from noise to clean."""
    noise_share: Annotated[float, Field(gt=0, le=1)] = 0.7
    """Probability of the first of them; the others share the rest evenly."""
    student_steps: Annotated[int, Field(ge=1)] = 1
    """Network calls of the sampler, at evenly chosen `times`; it divides their number."""
    mean: float = 1.0
    """Mean of ln tan t, t the discriminator's noise level: the m of the paper's logit-normal."""
    std: Annotated[float, Field(gt=0)] = 1.0
    """Standard deviation of the same."""
    headline: ClassVar[tuple[str, ...]] = ("student/gan", "health/d_accuracy")

    @model_validator(mode="after")
    def _calls_among_times(self) -> LADD:
        if len(self.times) % self.student_steps:
            raise ValueError(f"student_steps: {self.student_steps} does not divide the number of times {self.times}")
        return self

    @property
    def needs(self) -> tuple[str, ...]:
        return () if self.synthetic else ("real",)

    def nets(self, make: Make) -> dict[str, Any]:
        return {"teacher": make.teacher, "student": make.copy("student"), "disc": make_heads(make, self.taps)}

    def phases(self) -> tuple[Phase, ...]:
        return (Phase("student", ("student",), self.student_loss), Phase("disc", ("disc",), self.disc_loss))

    def calls(self, net: Any) -> tuple[Call, ...]:
        return calls_at(FLOW, self.times[:: len(self.times) // self.student_steps])

    def cond(self, batch: Batch) -> Any:
        """The conditions of real and generated samples alike."""
        return batch.cond if self.synthetic else batch.real_cond

    def prepare(self, nets: Nets, batch: Batch, trains: tuple[str, ...]) -> Batch:
        """Makes the real samples, if they are the teacher's, and the student's from those, noised."""
        draws, cond, real = batch.draws, self.cond(batch), batch.real
        if self.synthetic:
            noise = draws.normal("teacher", batch.z.shape)
            teacher = lambda x_t, level, cond: guided(nets["teacher"], x_t, level, cond, self.guidance, batch.null)
            with torch.no_grad():
                real = heun(teacher, noise, cond, self.teacher_steps)
        times = torch.tensor(self.times, dtype=torch.float64, device=real.device)
        u, others = draws.uniform("t", len(real)), len(times) - 1
        later = 1 + ((u - self.noise_share) / (1 - self.noise_share + 1e-12) * others).floor().clamp(0, others - 1)
        level = FLOW.level(times[torch.where(u < self.noise_share, 0, later).long()], real.ndim)
        with torch.set_grad_enabled("student" in trains):
            return batch.make(real=real, x=nets["student"](level.noise(real, batch.z), level, cond))

    def student_loss(self, nets: Nets, batch: Batch) -> tuple[Terms, Terms]:
        logits = judge(nets, batch.x, self.cond(batch), batch.draws, "gan", self.mean, self.std)
        return {"gan": hinge_generator(logits)}, statistics(batch.x, batch.made["real"])

    def disc_loss(self, nets: Nets, batch: Batch) -> tuple[Terms, Terms]:
        made = {"real": batch.made["real"], "fake": batch.x.detach()}
        verdict = {
            name: judge(nets, x, self.cond(batch), batch.draws, f"disc/{name}", self.mean, self.std)
            for name, x in made.items()
        }
        return {"gan": hinge_discriminator(**verdict)}, verdicts(**verdict)
