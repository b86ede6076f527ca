"""TwinFlow: realizing one-step generation on large models with self-adversarial flows. Cheng et al. 2025,
arXiv:2512.05150."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor
from torch.nn import functional as F

from ..diffusion.guidance import guided
from ..diffusion.health import statistics
from ..diffusion.losses import surrogate
from ..diffusion.samplers import Call, calls_at
from ..diffusion.tangent import FLOW, flow_velocity
from .base import Batch, Make, Method, Nets, Phase, Terms

Flow = Callable[[Tensor, Tensor, Tensor], Tensor]


class TwinFlow(Method):
    """One network is the data's flow (t > 0), the flow of its own one-step samples (t < 0), and the map between levels.

    The difference of the two flows corrects the one-step map: no critic, no discriminator, no teacher. A network has no
    negative time and gets two scalars instead, both without effect at first: `span`, t - r of a jump from t to r, and
    `side`, 1 for data and -1 for its own samples. Departs from the code: each term is on the whole batch, as in its
    tutorial, and its error is a plain mean square.
    """

    name: Literal["twinflow"] = "twinflow"
    source: Literal["data", "teacher"] = "data"
    """Points and velocities are the data's, or, without images, the network's own samples and the frozen teacher's."""
    guidance: Annotated[float, Field(ge=1)] = 1.0
    """Guidance scale of the velocity that is learned: of the averaged network on data, else of the teacher."""
    target_decay: Annotated[float, Field(ge=0, lt=1)] = 0.99
    """Decay a student update of the average that makes the targets."""
    step: Annotated[float, Field(gt=0, lt=0.1)] = 0.01
    """Step h of the map's derivative (RCGM)."""
    jumps: Annotated[int, Field(ge=1, le=8)] = 2
    """Order N: jumps of the average that stand for the rest of the way."""
    twin_weight: Annotated[float, Field(ge=0)] = 1.0
    """Weight of the flow of its own samples."""
    rectify_weight: Annotated[float, Field(ge=0)] = 0.5
    """Weight lambda of the correction of the one-step map."""
    anchor_weight: Annotated[float, Field(ge=0)] = 1.0
    """Weight of ordinary flow matching at r = t."""
    times: tuple[Annotated[float, Field(gt=0, le=1)], ...] = (1.0,)
    """Flow times of the student's calls, from noise to clean; [0.999, 0.833, 0.666, 0.5] are the paper's four."""
    headline: ClassVar[tuple[str, ...]] = ("student/map", "student/twin")

    @model_validator(mode="after")
    def _anchored(self) -> TwinFlow:
        if self.source == "teacher" and not self.anchor_weight:
            raise ValueError(
                "anchor_weight: 0, and without images nothing else keeps the flow at r = t on the teacher's velocity; "
                "the correction then follows a flow of nothing, and training fails; give it a weight"
            )
        return self

    @property
    def needs(self) -> tuple[str, ...]:
        return ("real",) if self.source == "data" else ()

    def nets(self, make: Make) -> dict[str, Any]:
        nets = {"student": make.copy("student", ("span", "side"))}
        return nets | ({"teacher": make.teacher} if self.source == "teacher" else {})

    def averages(self) -> dict[str, tuple[str, float]]:
        return {"target": ("student", self.target_decay)}

    def phases(self) -> tuple[Phase, ...]:
        return (Phase("student", ("student",), self.loss),)

    def calls(self, net: Any) -> tuple[Call, ...]:
        times = tuple(min(t, FLOW.t_max) for t in self.times)
        calls = calls_at(FLOW, times)
        return tuple(Call(c.alpha, c.sigma, extra={"span": c.t, "side": 1.0}, schedule=FLOW, t=c.t) for c in calls)

    def flow(self, net: Any, cond: Any, side: float = 1.0, null: Any = None) -> Flow:
        """(x, t, r) -> F (B, ...), the mean velocity of a network between times r <= t. null: guides it."""

        def velocity(x: Tensor, t: Tensor, r: Tensor) -> Tensor:
            extra = {"span": t - r, "side": torch.full_like(t, side)}
            if null is None:
                return flow_velocity(partial(net, extra=extra), x, t, cond)
            both = {name: torch.cat([value, value]) for name, value in extra.items()}
            denoise = lambda x, level, cond: guided(partial(net, extra=both), x, level, cond, self.guidance, null)
            return flow_velocity(denoise, x, t, cond)

        return velocity

    def target(self, nets: Nets, batch: Batch, x: Tensor, t: Tensor, v: Tensor, cond: Any) -> Tensor:
        """The velocity that is learned at x (B, ...): the data's own v, guided, or the teacher's."""
        if self.source == "data" and self.guidance == 1:
            return v
        null = batch.conditions.null(cond)
        if self.source == "teacher":
            teacher = lambda x, level, cond: guided(nets["teacher"], x, level, cond, self.guidance, null)
            return flow_velocity(teacher, x, t, cond)
        average = self.flow(nets["target"], cond)
        return v + self.flow(nets["target"], cond, null=null)(x, t, t) - average(x, t, t)

    def residual(self, now: Tensor, average: Flow, x: Tensor, t: Tensor, r: Tensor, v: Tensor) -> Tensor:
        """d((t - r) F)/dt - v (B, ...), clamped to [-1, 1], by a step back along v and the average's jumps to r."""
        h, wide = self.step, lambda value: value.float().view(-1, *[1] * (x.ndim - 1))
        x_j, rest = x - h * v, 0.0
        size = (t - h - r).clamp(min=0) / self.jumps
        for j in range(self.jumps):
            t_j = (t - h - j * size).clamp(min=FLOW.t_min)
            f = average(x_j, t_j, (t_j - size).clamp(min=0))
            x_j, rest = x_j - wide(size) * f, rest + wide(size) * f
        slope = (wide(t - r) * now - rest) / h
        return torch.where(wide(t - r) >= h, slope - v, now - v).clamp(-1, 1)

    def loss(self, nets: Nets, batch: Batch) -> tuple[Terms, Terms]:
        z, draws, student = batch.z, batch.draws, nets["student"]
        count, wide = len(z), lambda value: value.float().view(-1, *[1] * (z.ndim - 1))
        uniform = lambda name: FLOW.t_min + (FLOW.t_max - FLOW.t_min) * draws.uniform(name, count)
        top = torch.full((count,), FLOW.t_max, dtype=torch.float64, device=z.device)
        noised = lambda x0, t, name: FLOW.level(t, z.ndim).noise(x0, draws.normal(name, z.shape))

        start = z * FLOW.level(top, z.ndim).start
        one = self.flow(student, batch.cond)(start, top, torch.zeros_like(top))  # the one-step map's F
        made = start - FLOW.t_max * one
        x0, cond = (batch.real, batch.real_cond) if self.source == "data" else (made.detach(), batch.cond)

        u, r = draws.uniform("kind", count), draws.uniform("r", count)  # a quarter from noise, a quarter short jumps
        t = torch.where(u < 0.25, top, uniform("t"))
        r = torch.where(u < 0.25, 0.0, torch.where(u < 0.5, t * (0.95 + 0.05 * r), t * r))
        eps = draws.normal("eps", z.shape)
        x = (1 - wide(t)) * x0 + wide(t) * eps
        ours = self.flow(student, cond)
        terms: Terms = {}
        with torch.no_grad():
            v = self.target(nets, batch, x, t, eps - x0, cond)
        jump = ours(x, t, r)
        with torch.no_grad():
            residual = self.residual(jump, self.flow(nets["target"], cond), x, t, r, v)
        terms["map"] = 2 * surrogate(jump, residual)
        if self.anchor_weight:
            terms["anchor"] = self.anchor_weight * F.mse_loss(ours(x, t, t), v)

        own = self.flow(student, batch.cond, side=-1.0)
        if self.twin_weight:
            t, eps = uniform("twin/t"), draws.normal("twin/eps", z.shape)
            fake = (1 - wide(t)) * made.detach() + wide(t) * eps
            terms["twin"] = self.twin_weight * F.mse_loss(own(fake, t, t), eps - made.detach())
        if self.rectify_weight:
            t = uniform("rectify/t")
            with torch.no_grad():
                x = noised(made, t, "rectify/eps")
                gap = (own(x, t, t) - self.flow(student, batch.cond)(x, t, t)).clamp(-1, 1)
            terms["rectify"] = self.rectify_weight * 2 * surrogate(one, gap)
        return terms, statistics(made, batch.real)
