"""Multi-student diffusion distillation for better one-step generators (MSD). Song et al. 2024, arXiv:2410.23274.

Conditions are split among students, one of which answers each request: more capacity at the same latency.
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from typing import Any, Literal

import torch
from torch import Tensor

from .base import Batch, Make, Nets
from .dmd2 import DMD2


class MSD(DMD2):
    """DMD2 of one student, for its part of the classes. Each student is a run of its own, and is asked for its part.

    Read in notes on the paper: parts without overlap, and generated conditions of the own part alone; two time scales
    may stand for the regression. Proposed: real images of other classes stay in the discriminator's batch, which sees
    their labels. Departs from the paper: students have the teacher's size (no teacher score matching before), and no
    router joins their runs to one model yet.
    """

    name: Literal["msd"] = "msd"
    part: tuple[int, ...] = ()
    """Classes of this student; () is all of them, which is DMD2, bit for bit."""

    def nets(self, make: Make) -> dict[str, Any]:
        classes = make.teacher.classes or 0
        if wrong := [label for label in self.part if not 0 <= label < classes]:
            raise ValueError(f"method.part: {wrong[0]} is no class; the teacher has {classes}, counted from 0")
        return super().nets(make)

    def prepare(self, nets: Nets, batch: Batch, trains: tuple[str, ...]) -> Batch:
        if self.part:
            pick = batch.draws.integers("part", 0, len(self.part) - 1, len(batch.z))
            batch = replace(batch, cond=_table(self.part, pick.device)[pick])
        return super().prepare(nets, batch, trains)


@lru_cache(maxsize=8)
def _table(part: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.tensor(part, device=device)
