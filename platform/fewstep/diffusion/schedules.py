"""Schedules: a network's own time t and the level it stands for, in float64; the Level that leaves is float32.

Each schedule has `level(t, ndim)`, its inverse `time(angle)`, the bounds `t_min` and `t_max`, and `ramp(u)`: the times
at which it is trained and sampled when u is uniform in [0, 1], from clean to noise.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from .level import Level


def _level(alpha: Tensor, sigma: Tensor, ndim: int) -> Level:
    shape = (-1,) + (1,) * (ndim - 1)
    return Level(alpha.reshape(shape).float(), sigma.reshape(shape).float())


@dataclass(frozen=True)
class EDM:
    """alpha = 1, sigma = t; the ramp is Karras et al. 2022, eq. 5 (spelt from clean to noise)."""

    t_min: float = 0.002
    t_max: float = 80.0
    rho: float = 7.0
    name: str = field(default="edm", init=False)

    def level(self, t: Tensor, ndim: int) -> Level:
        t = t.double()
        return _level(torch.ones_like(t), t, ndim)

    def time(self, angle: Tensor) -> Tensor:
        return angle.tan()

    def ramp(self, u: Tensor) -> Tensor:
        lo, hi = self.t_min ** (1 / self.rho), self.t_max ** (1 / self.rho)
        return (lo + u.double() * (hi - lo)) ** self.rho


@dataclass(frozen=True)
class Flow:
    """alpha = 1 - t, sigma = t: rectified flow (Liu et al. 2022; Lipman et al. 2022)."""

    t_min: float = 0.0
    t_max: float = 1.0
    name: str = field(default="flow", init=False)

    def level(self, t: Tensor, ndim: int) -> Level:
        t = t.double()
        return _level(1 - t, t, ndim)

    def time(self, angle: Tensor) -> Tensor:
        return angle.sin() / (angle.sin() + angle.cos())

    def ramp(self, u: Tensor) -> Tensor:
        return self.t_min + u.double() * (self.t_max - self.t_min)


@dataclass(frozen=True)
class Trig:
    """alpha = cos t, sigma = sin t (Lu & Song 2024, TrigFlow): t is the angle itself."""

    t_min: float = 0.0
    t_max: float = math.pi / 2
    name: str = field(default="trig", init=False)

    def level(self, t: Tensor, ndim: int) -> Level:
        t = t.double()
        return _level(t.cos(), t.sin(), ndim)

    def time(self, angle: Tensor) -> Tensor:
        return angle

    def ramp(self, u: Tensor) -> Tensor:
        return self.t_min + u.double() * (self.t_max - self.t_min)


def _betas(schedule: str, start: float, end: float, steps: int) -> Tensor:
    """diffusers' beta schedules by their names there, in float64."""
    if schedule == "linear":
        return torch.linspace(start, end, steps, dtype=torch.float64)
    if schedule == "scaled_linear":
        return torch.linspace(start**0.5, end**0.5, steps, dtype=torch.float64) ** 2
    if schedule == "squaredcos_cap_v2":  # Nichol & Dhariwal 2021, eq. 17
        u = torch.arange(steps + 1, dtype=torch.float64) / steps
        bar = ((u + 0.008) / 1.008 * math.pi / 2).cos() ** 2
        return (1 - bar[1:] / bar[:-1]).clamp(max=0.999)
    raise ValueError(f"beta_schedule: {schedule!r} is not one of linear, scaled_linear, squaredcos_cap_v2")


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
    t_min: float = field(default=0.0, init=False)

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
        return _level(angle.cos(), angle.sin(), ndim)

    def time(self, angle: Tensor) -> Tensor:
        table = self.angles(angle.device)
        high = torch.searchsorted(table, angle.contiguous()).clamp(1, self.steps - 1)
        low, up = table[high - 1], table[high]
        return (high - 1) + ((angle - low) / (up - low)).clamp(0, 1)

    def ramp(self, u: Tensor) -> Tensor:
        return u.double() * self.t_max


Schedule = EDM | DDPM | Flow | Trig
SCHEDULES: dict[str, type] = {"edm": EDM, "ddpm": DDPM, "flow": Flow, "trig": Trig}


def to_config(schedule: Schedule) -> dict[str, Any]:
    """The schedule as JSON types: its name and its fields."""
    config = asdict(schedule)
    return {k: v for k, v in config.items() if k == "name" or type(schedule).__dataclass_fields__[k].init}


def from_config(config: dict[str, Any]) -> Schedule:
    """The inverse of `to_config`. Raises ValueError for a name or a field that no schedule has."""
    config = dict(config)
    name = config.pop("name", None)
    if name not in SCHEDULES:
        raise ValueError(f"schedule.name: {name!r} is not one of {', '.join(SCHEDULES)}")
    try:
        return SCHEDULES[name](**config)
    except TypeError:
        valid = [k for k, f in SCHEDULES[name].__dataclass_fields__.items() if f.init]
        raise ValueError(f"schedule: {name} has the fields {', '.join(valid)}; got {', '.join(config)}") from None
