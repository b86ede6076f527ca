"""Decoupled DMD: CFG augmentation as the spear, distribution matching as the shield. Liu et al. 2025, arXiv:2511.22677.

Guidance in the teacher's score is a term of its own: real - fake = (cond - fake) + (scale - 1) (cond - uncond). The
first part matches distributions and keeps the student stable; the second drives it. Each gets its own noise levels.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field
from torch import Tensor

from ..diffusion.draws import noised
from ..diffusion.guidance import both
from ..diffusion.level import Level
from .base import Batch, Index, Nets, Range
from .dmd2 import DMD2


class DecoupledDMD(DMD2):
    """DMD2 whose guidance term has a noise draw of its own.

    Read in the paper: the two terms and their separate draws. Proposed here: one range of levels for the guidance term
    in all calls of the student (the paper bounds it by the call's own level), and one normaliser for the sum, DMD2's.
    """

    name: Literal["decoupled_dmd"] = "decoupled_dmd"
    guidance: Annotated[float, Field(ge=1)] = 2.0
    """Guidance scale of the teacher; with 1 there is no guidance term."""
    guidance_range: Range[Index] | None = (300, 980)
    """Levels of the guidance term, both ends included; null takes the matching term's draw, as DMD2 does."""

    def scores(self, nets: Nets, batch: Batch, x_t: Tensor, level: Level) -> tuple[Tensor, Tensor]:
        if self.guidance_range is None or self.guidance == 1:
            return super().scores(nets, batch, x_t, level)
        teacher, x = nets["teacher"], batch.x.detach()
        at_t, at_level, _ = noised(batch.draws, "guide", teacher.schedule, x, *self.guidance_range)
        cond, uncond = both(teacher, at_t, at_level, batch.cond, batch.null)
        real = teacher(x_t, level, batch.cond) + (self.guidance - 1) * (cond - uncond)
        return real, nets["fake"](x_t, level, batch.cond)
