"""SNOOPI: supercharged one-step diffusion distillation with proper guidance. Nguyen et al. 2024, arXiv:2412.02687.

Its PG-SB: one fixed guidance scale makes variational score distillation unstable; a random one widens both scores.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator
from torch import Tensor

from .base import Batch
from .swiftbrush import SwiftBrush


class SNOOPI(SwiftBrush):
    """SwiftBrush with guidance scales U(guidance - spread, guidance + spread), the same for teacher and critic.

    Read in the paper: U(0.5, 4) for SD, and one draw for both. Proposed: a draw a sample, not a batch. Its negative
    prompts (NASA) need cross-attention to texts, and are no part of this file.
    """

    name: Literal["snoopi"] = "snoopi"
    guidance: Annotated[float, Field(ge=1)] = 2.25
    """Mean guidance scale of both, the teacher and the critic."""
    guidance_spread: Annotated[float, Field(ge=0)] = 1.75
    """Half the width of the scales' range; 0 is SwiftBrush, bit for bit."""

    @model_validator(mode="after")
    def _range(self) -> SNOOPI:
        if self.guidance_spread > self.guidance:
            raise ValueError(f"guidance_spread: {self.guidance_spread:g} is above guidance {self.guidance:g}")
        return self

    def scale(self, batch: Batch) -> float | Tensor:
        u = batch.draws.uniform("guidance", len(batch.z), stratified=True)
        return (self.guidance + self.guidance_spread * (2 * u - 1)).float()
