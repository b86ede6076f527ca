"""The guard: health signals judged while a student trains."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field

from ..config import Strict


class Guard(Strict):
    """What to do about a collapse."""

    policy: Literal["off", "warn", "stop", "roll_back"] = "warn"
    """What an alarm leads to."""
    every: Annotated[int, Field(ge=1)] = 5
    """Steps between looks."""
    rate: Annotated[float, Field(gt=0, le=1)] = 0.2
    """Factor on the student's learning rate at each roll-back."""
    max_roll_backs: Annotated[int, Field(ge=0)] = 3
    """Roll-backs before the run stops."""


@dataclass(frozen=True)
class Alarm:
    step: int
    since: int
    reason: str


class Watch:
    def __init__(self, guard: Guard):
        self.guard = guard

    def look(self, step: int, metrics: Mapping[str, float]) -> Alarm | None:
        return None

    def reset(self, step: int) -> None: ...
