"""Schedules: a network's own time t and the level it stands for, in float64; the Level that leaves is float32.

Each schedule has `level(t, ndim)`, its inverse `time(angle)`, the bounds `t_min` and `t_max`, and `ramp(u)`: the times
at which it is trained and sampled when u is uniform in [0, 1], from clean (t_min) to noise (t_max).

t_min is the least noise that a network is trained at. It lies above t = 0, where there is nothing to denoise.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from .level import Level


def _level(alpha: Tensor, sigma: Tensor, ndim: int, schedule: Schedule, t: Tensor) -> Level:
    shape = (-1,) + (1,) * (ndim - 1)
    return Level(alpha.reshape(shape).float(), sigma.reshape(shape).float(), schedule, t)


def _check(name: str, t_min: float, t_max: float, top: float) -> None:
    if not (0 < t_min < t_max <= top and math.isfinite(t_max)):
        raise ValueError(
            f"schedule: {name} has t_min {t_min} and t_max {t_max}; they need 0 < t_min < t_max"
            + ("" if top == math.inf else f" <= {top:g}")
        )


@dataclass(frozen=True)
class EDM:
    """alpha = 1, sigma = t; the ramp is Karras et al. 2022, eq. 5 (spelt from clean to noise)."""

    t_min: float = 0.002
    t_max: float = 80.0
    rho: float = 7.0
    name: str = field(default="edm", init=False)

    def __post_init__(self) -> None:
        _check(self.name, self.t_min, self.t_max, math.inf)
        if not 0.1 <= self.rho <= 100:
            raise ValueError(f"schedule: edm has rho {self.rho}; it needs a number from 0.1 to 100, such as 7")

    def level(self, t: Tensor, ndim: int) -> Level:
        t = t.double()
        return _level(torch.ones_like(t), t, ndim, self, t)

    def time(self, angle: Tensor) -> Tensor:
        return angle.tan()

    def ramp(self, u: Tensor) -> Tensor:
        lo, hi = self.t_min ** (1 / self.rho), self.t_max ** (1 / self.rho)
        return (lo + u.double() * (hi - lo)) ** self.rho


@dataclass(frozen=True)
class Flow:
    """alpha = 1 - t, sigma = t: rectified flow (Liu et al. 2022; Lipman et al. 2022).

    shift: > 0; above 1 the ramp stays longer at high noise, t = shift u / (1 + (shift - 1) u) (Esser et al. 2024,
    eq. 23), which multiplies sigma / alpha by shift. t_min, t_max: bounds of t, behind the shift.
    """

    t_min: float = 1e-3
    t_max: float = 1.0
    shift: float = 1.0
    name: str = field(default="flow", init=False)

    def __post_init__(self) -> None:
        _check(self.name, self.t_min, self.t_max, 1.0)
        if not 0 < self.shift < math.inf:
            raise ValueError(f"schedule: flow has the shift {self.shift}; it needs a positive number, and 1 for none")

    def level(self, t: Tensor, ndim: int) -> Level:
        t = t.double()
        return _level(1 - t, t, ndim, self, t)

    def time(self, angle: Tensor) -> Tensor:
        return angle.sin() / (angle.sin() + angle.cos())

    def ramp(self, u: Tensor) -> Tensor:
        low, high = (t / (self.shift - (self.shift - 1) * t) for t in (self.t_min, self.t_max))
        u = low + u.double() * (high - low)
        return self.shift * u / (1 + (self.shift - 1) * u)


@dataclass(frozen=True)
class Trig:
    """alpha = cos t, sigma = sin t (Lu & Song 2024, TrigFlow): t is the angle itself. t_min is EDM's least noise."""

    t_min: float = 2e-3
    t_max: float = math.pi / 2
    name: str = field(default="trig", init=False)

    def __post_init__(self) -> None:
        _check(self.name, self.t_min, self.t_max, math.pi / 2)

    def level(self, t: Tensor, ndim: int) -> Level:
        t = t.double()
        return _level(t.cos(), t.sin(), ndim, self, t)

    def time(self, angle: Tensor) -> Tensor:
        return angle

    def ramp(self, u: Tensor) -> Tensor:
        return self.t_min + u.double() * (self.t_max - self.t_min)


STEPS = 100_000  # most of a DDPM; all published ones have 1,000 or 4,000
BETA_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2")


def _betas(schedule: str, start: float, end: float, steps: int) -> Tensor:
    """diffusers' beta schedules by their names there, in float64."""
    if schedule == "linear":
        return torch.linspace(start, end, steps, dtype=torch.float64)
    if schedule == "scaled_linear":
        return torch.linspace(start**0.5, end**0.5, steps, dtype=torch.float64) ** 2
    u = torch.arange(steps + 1, dtype=torch.float64) / steps  # Nichol & Dhariwal 2021, eq. 17
    bar = ((u + 0.008) / 1.008 * math.pi / 2).cos() ** 2
    return (1 - bar[1:] / bar[:-1]).clamp(max=0.999)


@lru_cache(maxsize=32)
def _angles(schedule: str, start: float, end: float, steps: int, zero_snr: bool, device: torch.device) -> Tensor:
    """The angles of the trained steps, made once a device: they are asked for in every forward pass."""
    alpha = (1 - _betas(schedule, start, end, steps)).cumprod(0).sqrt()
    if zero_snr:  # Lin et al. 2024, algorithm 1: shift and scale so that the last step is pure noise
        alpha = (alpha - alpha[-1]) * alpha[0] / (alpha[0] - alpha[-1])
    return torch.acos(alpha).to(device)


@dataclass(frozen=True)
class DDPM:
    """alpha_t^2 = prod_{s <= t} (1 - beta_s), t = 0..steps-1; linear in the angle between the trained steps."""

    beta_schedule: str = "linear"
    beta_start: float = 1e-4
    beta_end: float = 2e-2
    steps: int = 1000
    zero_snr: bool = False
    name: str = field(default="ddpm", init=False)
    t_min: float = field(default=0.0, init=False)  # the first trained step, whose sigma is above 0

    def __post_init__(self) -> None:
        if self.beta_schedule not in BETA_SCHEDULES:
            raise ValueError(
                f"schedule.beta_schedule: {self.beta_schedule!r} is not one of {', '.join(BETA_SCHEDULES)}"
            )
        if not 0 < self.beta_start <= self.beta_end < 1 or not 2 <= self.steps <= STEPS:
            raise ValueError(
                f"schedule: ddpm has beta_start {self.beta_start}, beta_end {self.beta_end} and steps {self.steps}; "
                f"they need 0 < beta_start <= beta_end < 1 and 2 to {STEPS:,} steps"
            )
        if not (self.angles().diff() > 0).all():
            raise ValueError(
                f"schedule: ddpm with beta_start {self.beta_start}, beta_end {self.beta_end} and steps {self.steps} is "
                "pure noise before its last step; it needs fewer steps or smaller betas"
            )

    @property
    def t_max(self) -> float:
        return self.steps - 1.0

    def angles(self, device: torch.device | str = "cpu") -> Tensor:
        """(steps,) float64, ascending."""
        return _angles(
            self.beta_schedule, self.beta_start, self.beta_end, self.steps, self.zero_snr, torch.device(device)
        )

    def level(self, t: Tensor, ndim: int) -> Level:
        table = self.angles(t.device)
        t = t.double()
        low = t.floor().long().clamp(0, self.steps - 2)
        angle = torch.lerp(table[low], table[low + 1], t - low)
        return _level(angle.cos(), angle.sin(), ndim, self, t)

    def time(self, angle: Tensor) -> Tensor:
        table = self.angles(angle.device)
        high = torch.searchsorted(table, angle.contiguous()).clamp(1, self.steps - 1)
        low, up = table[high - 1], table[high]
        return (high - 1) + ((angle - low) / (up - low)).clamp(0, 1)

    def ramp(self, u: Tensor) -> Tensor:
        return u.double() * self.t_max


Schedule = EDM | DDPM | Flow | Trig


def ends_in_noise(schedule: Schedule) -> bool:
    """True where nothing of the image is left at t_max: alpha is below a millionth of sigma."""
    top = schedule.level(torch.tensor([schedule.t_max]), 1)
    return bool(top.alpha < 1e-6 * top.sigma)


SCHEDULES: dict[str, type] = {"edm": EDM, "ddpm": DDPM, "flow": Flow, "trig": Trig}


def to_config(schedule: Schedule) -> dict[str, Any]:
    """The schedule as JSON types: its name and its fields."""
    config = asdict(schedule)
    return {k: v for k, v in config.items() if k == "name" or type(schedule).__dataclass_fields__[k].init}


def from_config(config: dict[str, Any]) -> Schedule:
    """The inverse of `to_config`. Raises ValueError naming the field that no schedule has, or whose value is wrong."""
    config = dict(config)
    name = config.pop("name", None)
    if not isinstance(name, str) or name not in SCHEDULES:
        raise ValueError(f"schedule.name: {name!r} is not one of {', '.join(SCHEDULES)}")
    defaults = {k: f.default for k, f in SCHEDULES[name].__dataclass_fields__.items() if f.init}
    if config.keys() - defaults:
        raise ValueError(f"schedule: {name} has the fields {', '.join(defaults)}; got {', '.join(config)}")
    for key, value in config.items():
        kinds = (float, int) if isinstance(defaults[key], float) else (type(defaults[key]),)
        if type(value) not in kinds or value != value:
            raise ValueError(f"schedule.{key}: {value!r} of {name} is no {kinds[0].__name__}")
    return SCHEDULES[name](**config)
