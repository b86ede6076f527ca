"""Samplers: solvers over one signature, denoise(x_t, level, cond) -> x0, and few-step generators as lists of calls.

`z` is unit noise (B, ...); every sampler scales it by its first level's `start`. None clamps: what leaves is the
model's own x0.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Literal

import torch
from torch import Tensor

from .draws import Draws
from .level import Level
from .schedules import EDM, Schedule

Denoise = Callable[[Tensor, Level, Tensor | None], Tensor]


def _levels(schedule: Schedule, steps: int, like: Tensor) -> list[Level]:
    u = torch.linspace(1, 0, steps, dtype=torch.float64, device=like.device)
    return [schedule.level(schedule.ramp(v.expand(like.shape[0])), like.ndim) for v in u]


def heun(denoise: Denoise, z: Tensor, cond: Tensor | None = None, steps: int = 18, schedule: Schedule | None = None):
    """Heun's second-order solver of the probability-flow ODE (Karras et al. 2022, algorithm 1 without churn).

    schedule: gives the ramp of levels, EDM's by default; alpha > 0 on all of it. The network's own may be another.
    Takes 2 steps - 1 network calls; returns x0 (B, ...).
    """
    levels = _levels(schedule or EDM(), steps, z)
    x = z * levels[0].start
    for level, to in zip(levels, levels[1:], strict=False):
        x0 = denoise(x, level, cond)
        guess = level.step(x, x0, to)
        # the ODE is d(x / alpha) = eps d(sigma / alpha): Heun averages eps over both ends of the step
        eps = 0.5 * (level.eps(x, x0) + to.eps(guess, denoise(guess, to, cond)))
        x = to.alpha * (x / level.alpha + (to.sigma / to.alpha - level.sigma / level.alpha) * eps)
    return denoise(x, levels[-1], cond)  # the step to sigma = 0 lands on x0 and has no correction


def ddim(denoise: Denoise, z: Tensor, cond: Tensor | None = None, steps: int = 50, schedule: Schedule | None = None):
    """First-order deterministic sampler (Song et al. 2021); `steps` network calls; returns x0 (B, ...)."""
    levels = _levels(schedule or EDM(), steps, z)
    x = follow(denoise, z * levels[0].start, levels, cond)
    return denoise(x, levels[-1], cond)


def follow(denoise: Denoise, x: Tensor, levels: Sequence[Level], cond: Any = None) -> Tensor:
    """x (B, ...) carried from the first level to the last along the ODE, by one first-order step a level."""
    for level, to in zip(levels, levels[1:], strict=False):
        x = level.step(x, denoise(x, level, cond), to)
    return x


@dataclass(frozen=True)
class Call:
    """One network call of a few-step generator.

    alpha, sigma: its noise level, x_t = alpha x0 + sigma eps. role: the network that is called.
    then: how x0 leads to the next call: "renoise" noises it to that call's level with fresh noise (DMD2, section 4.4;
    consistency models), "step" goes there without new noise (DDIM). The x0 of the last call is the sample.
    kept: share of the noise in x_t that "renoise" takes along, in [0, 1]; with fresh noise for the rest the level stays
    what it is (TCD's stochastic sampling, Zheng et al. 2024).
    takes: "x", what the earlier calls led to, or "noise", the first noise at this call's own level.
    routes: roles by class label, where each class has a network of its own (MSD, Song et al. 2024) in place of `role`.
    extra: further scalars that the network is given, by name. schedule, t: where the level comes from, if from a
    schedule; its networks are then asked at t itself.
    """

    alpha: float
    sigma: float
    role: str = "student"
    then: Literal["renoise", "step"] = "renoise"
    kept: float = 0.0
    takes: Literal["x", "noise"] = "x"
    routes: tuple[str, ...] = ()
    extra: Mapping[str, float] = field(default_factory=dict)
    schedule: Schedule | None = None
    t: float | None = None

    def level(self, like: Tensor) -> Level:
        """Its noise level for every sample of `like` (B, ...)."""
        if self.schedule is not None:
            t = torch.full((len(like),), self.t, dtype=torch.float64, device=like.device)
            return self.schedule.level(t, like.ndim)
        shape = (len(like), *[1] * (like.ndim - 1))
        return Level(*(torch.full(shape, v, device=like.device) for v in (self.alpha, self.sigma)))

    @property
    def roles(self) -> tuple[str, ...]:
        """The roles of its networks."""
        return tuple(dict.fromkeys(self.routes)) or (self.role,)

    def denoise(self, nets: Mapping[str, Any], x_t: Tensor, level: Level, cond: Any) -> Tensor:
        """x0 (B, ...) by the network of this call, or of each sample's class."""
        if not self.routes:
            return self._call_net(nets[self.role], x_t, level, cond)
        x0 = torch.empty_like(x_t)
        for role in self.roles:
            own = torch.tensor([theirs == role for theirs in self.routes], device=cond.device)[cond]
            if own.any():
                x0[own] = self._call_net(nets[role], x_t[own], level.map(lambda v, own=own: v[own]), cond[own])
        return x0

    def _call_net(self, net: Any, x_t: Tensor, level: Level, cond: Any) -> Tensor:
        if not self.extra:
            return net(x_t, level, cond)
        extra = {k: torch.full((len(x_t),), float(v), device=x_t.device) for k, v in self.extra.items()}
        return net(x_t, level, cond, extra=extra)


@lru_cache(maxsize=256)
def calls_at(schedule: Schedule, times: tuple[float, ...], on_ramp: bool = False) -> tuple[Call, ...]:
    """Calls at a schedule's own times, or at shares of its ramp in [0, 1], from noise to clean.

    Made once for the same arguments: a training step asks each time.
    """
    t = torch.tensor(times, dtype=torch.float64)
    t = schedule.ramp(t) if on_ramp else t
    level = schedule.level(t, 1)
    numbers = zip(level.alpha.tolist(), level.sigma.tolist(), t.tolist(), strict=True)
    return tuple(Call(alpha, sigma, schedule=schedule, t=t) for alpha, sigma, t in numbers)


def enter_call(
    nets: Mapping[str, Any], calls: Sequence[Call], z: Tensor, cond: Any, draws: Draws, number: int
) -> tuple[Tensor, Level]:
    """Input x_t (B, ...) and level of call `number`, after the calls before it: what a training step rolls out.

    z: unit noise (B, ...); see `Level.start`. draws: of the noise between calls, `renoise/<call>`.
    """
    levels = [call.level(z) for call in calls[: number + 1]]
    x = z * levels[0].start
    for i in range(number):
        x0 = calls[i].denoise(nets, x, levels[i], cond)
        to = levels[i + 1]
        if calls[i + 1].takes == "noise":
            x = z * to.start
        elif calls[i].then == "step":
            x = levels[i].step(x, x0, to)
        else:
            eps, kept = draws.normal(f"renoise/{i}", x0.shape), calls[i].kept
            if kept:
                eps = kept * levels[i].eps(x, x0) + (1 - kept**2) ** 0.5 * eps
            x = to.noise(x0, eps)
    return x, levels[number]


@torch.no_grad()
def simulated_call(
    nets: Mapping[str, Any], calls: Sequence[Call], z: Tensor, cond: Any, draws: Draws, first: int = 0
) -> tuple[Tensor, Level]:
    """Input and level of a call drawn for the step, after the generator's own calls before it: DMD2's backward
    simulation (section 4.5). All ranks draw the same, as their collectives must line up. first: number of the earliest
    call that is drawn."""
    return enter_call(nets, calls, z, cond, draws, first + draws.choice("last", len(calls) - first))


@torch.no_grad()
def last_call(
    nets: Mapping[str, Any], calls: Sequence[Call], x0: Tensor, number: int, cond: Any, draws: Draws
) -> tuple[Tensor, Level]:
    """Input and level of a renoising generator's last call, from x0 (B, ...) of call `number` through those between."""
    for i in range(number, len(calls) - 1):
        level = calls[i + 1].level(x0)
        x_t = level.noise(x0, draws.normal(f"renoise/{i}", x0.shape))
        if i + 2 < len(calls):
            x0 = calls[i + 1].denoise(nets, x_t, level, cond)
    return x_t, level


def noised_call(calls: Sequence[Call], z: Tensor, real: Tensor, draws: Draws) -> tuple[Tensor, Level]:
    """Input and level of a call drawn for each sample: noise for the first, noised data (B, ...) for the others.

    calls: of one schedule.
    """
    pick = draws.integers("pick", 0, len(calls) - 1, len(z))
    times = torch.tensor([call.t for call in calls], dtype=torch.float64, device=pick.device)
    level = calls[0].schedule.level(times[pick], z.ndim)
    first = (pick == 0).view_as(level.alpha)
    return torch.where(first, z * level.start, level.noise(real, z)), level


def run_calls(nets: Mapping[str, Any], calls: Sequence[Call], z: Tensor, cond: Any, draws: Draws) -> Tensor:
    """x0 (B, ...) of a few-step generator from unit noise z: all of its calls, one after the other."""
    x_t, level = enter_call(nets, calls, z, cond, draws, len(calls) - 1)
    return calls[-1].denoise(nets, x_t, level, cond)


def to_uint8(x: Tensor) -> Tensor:
    """Images in [-1, 1] as uint8 (N, C, H, W), clamped and rounded to nearest."""
    return ((x.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
