"""Retention: which of a run's checkpoints stay when newer ones come."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Annotated

from pydantic import Field

from ..config import Strict


class Keep(Strict):
    """Rule for the checkpoints that are kept: the newest, the best, milestones, and those that a roll-back may need."""

    last: Annotated[int, Field(ge=1)] = 2
    """The newest."""
    best: Annotated[int, Field(ge=0)] = 0
    """The best of those that were scored."""
    every_images: Annotated[int, Field(ge=1)] | None = None
    """The first after each multiple of so many images; null keeps none for that."""
    higher: bool = False
    """True if a higher score is better."""
    back_steps: Annotated[int, Field(ge=0)] = 0
    """All of the last so many steps, and the one before those, to roll back to; 0 keeps none for that."""

    def choose(self, images: Mapping[int, int], scores: Mapping[int, float], pending: Iterable[int] = ()) -> set[int]:
        """The steps that stay, of checkpoints given as step -> images. A score that is not finite is none."""
        steps = sorted(images)
        stays = set(steps[-self.last :]) | (set(pending) & set(steps))
        scored = [step for step in steps if math.isfinite(scores.get(step, math.nan))]
        stays |= set(sorted(scored, key=lambda step: scores[step], reverse=self.higher)[: self.best])
        if self.back_steps:
            before = [step for step in steps if step <= steps[-1] - self.back_steps]
            stays |= {step for step in steps if step >= max(before, default=0)}
        first: dict[int, int] = {}
        for step in steps if self.every_images else []:
            first.setdefault(images[step] // self.every_images, step)
        return stays | {step for multiple, step in first.items() if multiple}
