"""Simplifying, stabilizing and scaling continuous-time consistency models (sCM). Lu & Song 2024, arXiv:2410.11081."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from ..diffusion.draws import lognormal_level
from ..diffusion.guidance import guided
from ..diffusion.losses import unit
from ..diffusion.samplers import Call, calls_at
from ..diffusion.tangent import TRIG, tangent, velocity
from .base import Batch, Make, Method, Nets, Phase, Terms


class SCM(Method):
    """Consistency distillation without time steps. The loss is no measure of progress; `tangent_norm` is.

    Departs from the paper: sigma_d = 1, and no learned weight, which rCM (arXiv:2510.08431) found of no use.
    """

    name: Literal["scm"] = "scm"
    mean: float = -1.0
    """Mean of ln tan t."""
    std: Annotated[float, Field(gt=0)] = 1.4
    """Standard deviation of ln tan t."""
    guidance: Annotated[float, Field(ge=1)] = 1.0
    """Guidance scale of the teacher."""
    warmup_steps: Annotated[int, Field(ge=0)] = 1000
    """Steps in which the tangent's second term grows from none to whole."""
    tangents: Literal["forward", "difference"] = "forward"
    """Forward-mode differentiation, which needs float32 blocks, or central differences."""
    times: tuple[Annotated[float, Field(gt=0, le=1.5583)], ...] = (1.5583,)
    """Angles of the student's calls, from noise to clean; [1.5583, 1.1] are the paper's two."""
    headline: ClassVar[tuple[str, ...]] = ("health/tangent_norm",)

    def nets(self, make: Make) -> dict[str, Any]:
        return {"teacher": make.teacher, "student": make.copy("student")}

    def phases(self) -> tuple[Phase, ...]:
        return (Phase("student", ("student",), self.loss),)

    def calls(self, net: Any) -> tuple[Call, ...]:
        return calls_at(TRIG, self.times)

    def loss(self, nets: Nets, batch: Batch) -> tuple[Terms, Terms]:
        x0, cond, draws, null = batch.real, batch.real_cond, batch.draws, batch.conditions.null(batch.real_cond)
        level = lognormal_level(draws, "t", self.mean, self.std, TRIG, x0)
        t = level.t
        x, cos, sin = level.noise(x0, draws.normal("eps", x0.shape)), level.alpha, level.sigma
        student = lambda x, t: velocity(nets["student"], x, t, cond)
        dx = velocity(lambda *args: guided(nets["teacher"], *args, self.guidance, null), x, t, cond).detach()
        along = (cos * sin * dx, (cos * sin).double().flatten())  # scaled before the pass: nothing overflows
        f, df = tangent(student, (x, t), along, self.tangents)
        warm = min(1.0, draws.step / self.warmup_steps) if self.warmup_steps else 1.0
        g = -(cos**2) * (f - dx) - warm * (cos * sin * x + df)
        loss = (student(x, t) - f - unit(g)).square().flatten(1).sum(1).mean()
        return {"tangent": loss}, {"tangent_norm": g.flatten(1).norm(dim=1).mean()}
