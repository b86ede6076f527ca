"""Multi-student diffusion distillation for better one-step generators (MSD). Song et al. 2024, arXiv:2410.23274.

Conditions are split among students, one of which answers each request: more capacity at the same latency.
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field, field_validator, model_validator
from torch import Tensor

from ..diffusion.level import Level
from ..diffusion.samplers import Call
from .base import Batch, Make, Nets
from .denoising import Denoising
from .dmd2 import DMD2


class MSDScore(Denoising):
    """Teacher score matching: a smaller student learns the teacher's denoiser before it is distilled.

    Read in notes on the paper: real images, all noise levels, EDM's weight. Proposed: one such network starts all
    students. `roles: {student: {network: {...}}}` is the smaller network; it stays a diffusion model.
    """

    name: Literal["msd_score"] = "msd_score"

    needs_teacher: ClassVar[bool] = True
    frozen: ClassVar[tuple[str, ...]] = ("teacher",)

    def nets(self, make: Make) -> dict[str, Any]:
        return super().nets(make) | {"teacher": make.teacher}

    @torch.no_grad()
    def targets(
        self, nets: Nets, x_t: Tensor, level: Level, cond: Any, x0: Tensor, eps: Tensor
    ) -> tuple[Tensor, Tensor]:
        x0 = nets["teacher"](x_t, level, cond)
        return x0, level.eps(x_t, x0)


class MSD(DMD2):
    """DMD2 of one student, for its part of the classes. Each student is a run of its own, and generates its part.

    Read in notes on the paper: parts without overlap, generated conditions of the own part alone, stages (score
    matching, matching, GAN), and one call to one student a request; two time scales may stand for the regression.
    Proposed: real images of other classes stay in the discriminator's batch, which sees their labels; a smaller
    student's critic has the teacher's size. Departs from the paper: parts are of classes, and not of texts.
    """

    name: Literal["msd"] = "msd"
    parts: tuple[Annotated[tuple[int, ...], Field(min_length=1)], ...] = ()
    """Classes of each student, which together are all classes, without overlap; () is one student, DMD2, bit for bit.
    """
    number: Annotated[int, Field(ge=0)] = 0
    """This run's part, counted from 0."""
    others: tuple[str, ...] = ()
    """Runs of the other parts, in order, with which this run samples: each class by its own student. () samples with
    this run's student alone, which knows its own classes only."""

    @field_validator("parts")
    @classmethod
    def _disjoint(cls, parts: tuple[tuple[int, ...], ...]) -> tuple[tuple[int, ...], ...]:
        labels = [label for part in parts for label in part]
        if twice := [label for label in labels if labels.count(label) > 1]:
            raise ValueError(f"class {twice[0]} is given twice; one student answers for a class")
        return parts

    @model_validator(mode="after")
    def _run_of_each(self) -> MSD:
        if self.number >= max(len(self.parts), 1):
            raise ValueError(f"number: {self.number}, but parts are counted from 0 to {max(len(self.parts), 1) - 1}")
        if self.others and len(self.others) != len(self.parts) - 1:
            raise ValueError(f"others: {len(self.others)} runs, but {max(len(self.parts) - 1, 0)} other parts")
        return self

    def nets(self, make: Make) -> dict[str, Any]:
        covered, classes = {label for part in self.parts for label in part}, set(range(make.teacher.classes or 0))
        if self.parts and (wrong := sorted(covered ^ classes)):
            what = "in no part" if wrong[0] in classes else f"no class; the teacher has {len(classes)}, counted from 0"
            raise ValueError(f"method.parts: {wrong[0]} is {what}")
        nets = super().nets(make)
        for (number, role), folder in zip(self._others(), self.others, strict=False):
            theirs = make.method(folder)
            if (theirs.tag, getattr(theirs, "parts", ()), getattr(theirs, "number", 0)) != (
                self.tag,
                self.parts,
                number,
            ):
                raise ValueError(f"method.others: {folder!r} is no run of part {number} of these parts")
            nets[role] = make.run(folder)
        return nets

    def _others(self) -> list[tuple[int, str]]:
        """The other parts' numbers and roles."""
        return [(i, f"student{i + 1}") for i in range(len(self.parts)) if i != self.number]

    def calls(self, net: Any) -> tuple[Call, ...]:
        calls = super().calls(net)
        if not self.others:
            return calls
        roles = dict(self._others()) | {self.number: "student"}
        owners = {label: roles[i] for i, part in enumerate(self.parts) for label in part}
        return tuple(replace(call, routes=tuple(owners[label] for label in sorted(owners))) for call in calls)

    def prepare(self, nets: Nets, batch: Batch, trains: tuple[str, ...]) -> Batch:
        if self.parts:
            own = self.parts[self.number]
            pick = batch.draws.integers("part", 0, len(own) - 1, len(batch.z))
            batch = replace(batch, cond=_table(own, pick.device)[pick])
        alone = self.model_copy(update={"others": ()})  # trains on its own calls, without a router
        return super(MSD, alone).prepare(nets, batch, trains)


@lru_cache(maxsize=8)
def _table(part: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.tensor(part, device=device)
