"""Randomness as a function: of a seed, a step and the name of the draw; never a state to save.

A draw is made for the whole global batch and each rank takes its rows, so two workers see exactly the noise that one
would have seen, and accumulating gradients over micro-batches (ranks in time) changes nothing either.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor

from .level import Level
from .schedules import Schedule


def fold(*parts: int | str) -> int:
    """A 63-bit seed from integers and names, the same on every machine."""
    digest = hashlib.blake2b("\0".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


@dataclass(frozen=True)
class Draws:
    """The random numbers of one step.

    part, parts: of the global batch our slice has the samples part, part + parts, and so on, as the data does; parts is
    ranks times micro-batches. Shapes below are those of the slice.
    """

    seed: int
    step: int
    part: int = 0
    parts: int = 1
    device: torch.device = torch.device("cpu")

    def _generator(self, name: str) -> torch.Generator:
        return torch.Generator(self.device).manual_seed(fold(self.seed, self.step, name))

    def _own_rows(self, x: Tensor) -> Tensor:
        return x[self.part :: self.parts]

    def normal(self, name: str, shape: tuple[int, ...] | torch.Size) -> Tensor:
        """N(0, I) of `shape` (B, ...), float32."""
        whole = (shape[0] * self.parts, *shape[1:])
        return self._own_rows(torch.randn(whole, generator=self._generator(name), device=self.device))

    def uniform(self, name: str, count: int, stratified: bool = False) -> Tensor:
        """(count,) float64 in [0, 1). Stratified: one draw from each of the global batch's equal intervals.

        Stratifying leaves each draw's marginal alone over a shuffled batch and lowers the variance of the batch's mean.
        """
        n = count * self.parts
        u = torch.rand(n, generator=self._generator(name), device=self.device, dtype=torch.float64)
        if stratified:
            order = torch.randperm(n, generator=self._generator(name + "/order"), device=self.device)
            u = (order + u) / n
        return self._own_rows(u)

    def integers(self, name: str, low: int, high: int, count: int) -> Tensor:
        """(count,) int64, uniform in [low, high], both ends included."""
        whole = torch.randint(low, high + 1, (count * self.parts,), generator=self._generator(name), device=self.device)
        return self._own_rows(whole)

    def choice(self, name: str, options: int) -> int:
        """One integer in [0, options), the same on every rank and without asking the device."""
        return fold(self.seed, self.step, name) % options


@dataclass(frozen=True)
class Joined:
    """The draws of several small batches that are sampled as one: each gets the numbers that it would get alone.

    parts: draws and number of samples of each batch, in order.
    """

    parts: tuple[tuple[Draws, int], ...]

    def normal(self, name: str, shape: tuple[int, ...] | torch.Size) -> Tensor:
        """N(0, I) of `shape` (B, ...), float32; B is the number of samples of all batches."""
        return torch.cat([draws.normal(name, (count, *shape[1:])) for draws, count in self.parts])


INDICES = 1000  # the published methods count noise levels in thousandths of the schedule's ramp


def _at_index(schedule: Schedule, index: Tensor, like: Tensor) -> Level:
    return schedule.level(schedule.ramp(index.double() / (INDICES - 1)), like.ndim)


def index_level(
    draws: Draws, name: str, schedule: Schedule, low: int, high: int, like: Tensor, power: float = 1.0
) -> Level:
    """Levels at an integer index of the schedule's thousand, in [low, high] both included; power 1 is DMD2's draw.

    For DDPM the index is the timestep; for EDM it is the ascending Karras ramp from sigma 0.002 to 80. power > 1 draws
    low + (high - low) u^power: the lower half of the range then gets the share 2^(-1/power), 0.71 for a power of 2.
    """
    u = draws.uniform(name, like.shape[0])
    return _at_index(schedule, (low + (high + 1 - low) * u**power).floor(), like)


def noised(
    draws: Draws, name: str, schedule: Schedule, x: Tensor, low: int = 0, high: int = INDICES - 1, power: float = 1.0
) -> tuple[Tensor, Level, Tensor]:
    """Samples x (B, ...) noised at levels of `index_level`, as (x_t, level, eps); the draws are name/t and name/eps."""
    level = index_level(draws, f"{name}/t", schedule, low, high, x, power)
    eps = draws.normal(f"{name}/eps", x.shape)
    return level.noise(x, eps), level, eps


def ramp_level(draws: Draws, name: str, schedule: Schedule, like: Tensor) -> Level:
    """Levels uniform over the schedule's ramp, stratified over the batch: t in [0, 1], shifted, for a flow."""
    return schedule.level(schedule.ramp(draws.uniform(name, like.shape[0], stratified=True)), like.ndim)


def lognormal_level(
    draws: Draws, name: str, mean: float, std: float, schedule: Schedule, like: Tensor, ramp_share: float = 0.0
) -> Level:
    """ln(sigma / alpha) ~ N(mean, std^2) (Karras et al. 2022, table 1), a share of the draws from the schedule's ramp.

    The same draw by other names: sCM's t = arctan(e^tau / sigma_d), and a flow's logit-normal t (Esser et al. 2024), of
    which a shift adds ln(shift) to the mean.
    ramp_share: in [0, 1]. The log-normal alone never visits the highest levels, where a one-step generator starts.
    """
    lognormal = torch.exp(mean + std * draws.normal(name + "/normal", (like.shape[0],)).double())
    t = schedule.time(torch.atan(lognormal)).clamp(schedule.t_min, schedule.t_max)
    if ramp_share:
        u = draws.uniform(name, like.shape[0], stratified=True)
        t = torch.where(u < ramp_share, ramp_level(draws, name + "/ramp", schedule, like).t, t)
    return schedule.level(t, like.ndim)


def descending_levels(
    draws: Draws, name: str, steps: int, mean: float, std: float, schedule: Schedule, like: Tensor
) -> list[Level]:
    """Levels of a rollout of `steps` calls: the schedule's noisiest, then log-normal draws, none above the one before
    (rCM, Zheng et al. 2025: t_n = min(t^_n, t_{n-1}))."""
    t = torch.full((like.shape[0],), schedule.t_max, dtype=torch.float64, device=like.device)
    levels = [schedule.level(t, like.ndim)]
    for i in range(1, steps):
        t = torch.minimum(t, lognormal_level(draws, f"{name}/{i}", mean, std, schedule, like).t)
        levels.append(schedule.level(t, like.ndim))
    return levels


def grid_level(schedule: Schedule, number: Tensor, steps: int, like: Tensor) -> Level:
    """Levels of a solver's grid of `steps` levels by their number (B,), from the cleanest, 1, to the noisiest, `steps`.

    The grid is every 1000 / steps of the schedule's indices up to 999, and number 0 is index 0 (LCM, Luo et al. 2023).
    """
    return _at_index(schedule, (number * (INDICES // steps) - 1).clamp(min=0), like)
