"""Map error: how far a student's samples are from where the teacher's own trajectories end. A figure of methods that
learn these trajectories; one that matches distributions alone has no reason to lower it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property, partial
from hashlib import sha256
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from fewstep.diffusion.draws import Draws
from fewstep.diffusion.guidance import guided
from fewstep.diffusion.samplers import Call, calls_at, heun, run_calls, to_uint8
from fewstep.metrics.base import Files, Metric, Samples, Score, score

ROUNDING = (2 / 12) ** 0.5  # RMS difference of two pictures that were rounded to whole numbers independently
BATCH = 100  # samples that the teacher makes at once


class TrajectoryMetric(Metric):
    """RMS distance of samples from the teacher's endpoints, over that of the teacher's own sampler with as many calls.

    Both start from the samples' noises, with their conditions. Below 1 the student is closer to the end of the
    trajectory than the teacher with as many network calls; the exact map has 0.
    """

    names = ("map_error",)
    better = "lower"
    of_teacher: ClassVar[bool] = True

    images: Annotated[int, Field(ge=1)] = 100
    """Number of samples to compare, the first ones."""
    steps: Annotated[int, Field(ge=2)] = 50
    """Heun steps (2 steps - 1 network calls) that find an endpoint."""
    guidance: Annotated[float, Field(ge=1)] = 1.0
    """Guidance scale of the teacher's trajectories: the one that the student was trained for."""

    def build(self, files: Files) -> MapError:
        """Raises ValueError where no teacher is known."""
        return MapError(self, files)


class MapError:
    """Function of samples; see `TrajectoryMetric`. Differences are those of pictures in 8 bits. The endpoints are kept
    for the next samples from the same noises."""

    def __init__(self, settings: TrajectoryMetric, files: Files):
        if files.open_teacher is None:
            raise ValueError(
                "map_error needs the teacher, and only a run's recipe says which it is; score the folder of a run that "
                "has a teacher"
            )
        self.settings, self.files = settings, files
        self.z, self.ends = torch.empty(0), torch.empty(0)

    @cached_property
    def teacher(self) -> Any:
        """The teacher, a denoiser, opened when it is first needed."""
        return self.files.open_teacher().eval().requires_grad_(False).to(self.files.device)

    @torch.no_grad()
    def pictures(self, z: Tensor, cond: Any, calls: Sequence[Call] | None) -> Tensor:
        """uint8 (N, C, H, W) that the teacher makes of unit noise by these calls; for None, its endpoints."""
        made = []
        for rows in torch.arange(len(z), device=z.device).split(BATCH):
            own = _rows(cond, rows)
            null = self.teacher.conditions.null(own)
            denoise = partial(guided, self.teacher, scale=self.settings.guidance, null=null)
            if calls is None:
                x0 = heun(denoise, z[rows], own, self.settings.steps)
            else:
                x0 = run_calls({"student": denoise}, calls, z[rows], own, Draws(0, 0))
            made.append(to_uint8(self.teacher.pictures(x0)).cpu())
        return torch.cat(made)

    def __call__(self, samples: Samples) -> Score:
        if samples.starts is None:
            raise ValueError("samples.starts: missing; map_error compares samples whose noises are known")
        count = min(self.settings.images, len(samples))
        z, cond = samples.starts(count)
        if not torch.equal(self.z, z):
            self.z, self.ends = z, self.pictures(z, cond, None)
        shares = tuple(1 - i / samples.calls for i in range(samples.calls))
        calls = [replace(call, then="step") for call in calls_at(self.teacher.schedule, shares, on_ramp=True)]
        few = _rms(self.pictures(z, cond, calls), self.ends)
        value = _rms(samples.images[:count], self.ends) / max(few, ROUNDING)
        digest = sha256(self.ends.numpy().tobytes()).hexdigest()
        return score("map_error", value, samples, images=count, reference=digest, reference_images=count)


def _rms(a: Tensor, b: Tensor) -> float:
    """Root of the mean square difference of two sets of pictures, in steps of 8 bits."""
    return (a.double() - b.double()).square().mean().sqrt().item()


def _rows(cond: Any, rows: Tensor) -> Any:
    """Conditions of some of the samples."""
    if isinstance(cond, dict):
        return {name: column[rows] for name, column in cond.items()}
    return None if cond is None else cond[rows]
