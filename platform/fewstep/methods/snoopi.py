"""SNOOPI: supercharged one-step diffusion distillation with proper guidance. Nguyen et al. 2024, arXiv:2412.02687.

PG-SB: one fixed guidance scale makes variational score distillation unstable; a random one widens both scores. NASA-T:
the student trains with negative prompts, which its cross-attention subtracts (networks/nasa.py).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Literal

from pydantic import Field, model_validator
from torch import Tensor

from ..diffusion.guidance import guided
from ..diffusion.level import Level
from .base import Batch, Nets
from .swiftbrush import SwiftBrush


class SNOOPI(SwiftBrush):
    """SwiftBrush with guidance scales U(guidance - spread, guidance + spread), the same for teacher and critic.

    Read in the paper: U(0.5, 4) for SD, and one draw for both; of NASA-T, the scale U(0, 1), and the negative prompt in
    the place of none for the teacher's guidance, but not for the critic's. Proposed: a draw a sample, not a batch.
    """

    name: Literal["snoopi"] = "snoopi"
    guidance: Annotated[float, Field(ge=1)] = 2.25
    """Mean guidance scale of both, the teacher and the critic."""
    guidance_spread: Annotated[float, Field(ge=0)] = 1.75
    """Half the width of the scales' range; 0 is SwiftBrush, bit for bit."""
    negative_scale: Annotated[float, Field(ge=0)] = 0.0
    """Largest scale by which negative prompts are subtracted in training, 1 as published; 0 is PG-SB alone, bit for
    bit. Needs `negatives`, and a network of texts."""

    @model_validator(mode="after")
    def _range(self) -> SNOOPI:
        if self.guidance_spread > self.guidance:
            raise ValueError(f"guidance_spread: {self.guidance_spread:g} is above guidance {self.guidance:g}")
        return self

    def scale(self, batch: Batch) -> float | Tensor:
        u = batch.draws.uniform("guidance", len(batch.z), stratified=True)
        return (self.guidance + self.guidance_spread * (2 * u - 1)).float()

    @property
    def needs_negatives(self) -> bool:
        return self.negative_scale > 0

    def prepare(self, nets: Nets, batch: Batch, trains: tuple[str, ...]) -> Batch:
        if not self.negative_scale:
            return super().prepare(nets, batch, trains)
        scale = self.negative_scale * batch.draws.uniform("negative/scale", len(batch.z))
        negative = batch.conditions.draw_negatives(batch.draws, len(batch.z))
        less = batch.conditions.without(batch.cond, negative, scale)
        return replace(super().prepare(nets, replace(batch, cond=less), trains), cond=batch.cond)

    def scores(self, nets: Nets, batch: Batch, x_t: Tensor, level: Level) -> tuple[Tensor, Tensor]:
        if not self.negative_scale:
            return super().scores(nets, batch, x_t, level)
        given, negative = (x_t, level, batch.cond), batch.conditions.draw_negatives(batch.draws, len(batch.z))
        scale = self.scale(batch)
        return guided(nets["teacher"], *given, scale, negative), guided(nets["fake"], *given, scale, batch.null)
