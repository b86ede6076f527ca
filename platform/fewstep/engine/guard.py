"""The guard: tells a collapsing student by the health signals that its method reports.

Where the critic cannot keep up with the student, images swing between too dark and too bright, then all become one blob
(DMD2, section 4.2). Losses do not show it: a matching loss is no measure of convergence.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal

from pydantic import ConfigDict, Field, TypeAdapter

from ..config import Strict

SUSPECT = 0.7  # share of a limit from which on trouble is said to have begun


class Guard(Strict):
    """When a student counts as collapsed, and what is done then.

    A look judges the means of the signals since the last one. Each limit is given with the worst of healthy runs, the
    shipped Fashion-MNIST recipes with three seeds each over 100 to 600 steps, and with what three seeds of a run that
    collapses, one critic update a student update at equal rates, reached within 40 student updates.
    """

    policy: Literal["off", "warn", "stop", "roll_back"] = "warn"
    """On an alarm: report it; end the run; or return to a checkpoint from before it, with a lower rate."""
    every: Annotated[int, Field(ge=1)] = 5
    """Student updates between looks; a look waits for the device once."""
    images: Annotated[int, Field(ge=1)] = 160
    """Images that a look averages at least, however small the batch: of a few images, brightness is noise."""
    window: Annotated[int, Field(ge=2)] = 8
    """Looks within which brightness swings, or throughout which the discriminator is right."""
    swing: Annotated[float, Field(gt=0)] = 0.4
    """Limit of how far the mean's offset from the data's moves within the window, in the data's standard deviations.
    Healthy 0.22, the noise of a look; collapse 1.01, 1.15, 0.54."""
    brightness: Annotated[float, Field(gt=0)] = 0.6
    """Limit of that offset itself, for one that grows slowly. Healthy 0.13; collapse 0.64, 0.91, 0.37, later 1.6."""
    saturation: Annotated[float, Field(gt=0, lt=1)] = 0.5
    """Limit of the share of values beyond [-1, 1], above the data's own share. Healthy 0.27, of a black ground;
    collapse 0.61, 0.76, 0.39, later 0.9."""
    diversity: Annotated[float, Field(gt=0, lt=1)] = 0.5
    """Least diversity as a share of the best that the run had: one call of a teacher starts low, and only a loss is
    told. Healthy 0.88; collapse 0.68, 0.57, 0.95, later 0.06."""
    accuracy: Annotated[float, Field(gt=0.5, lt=1)] = 0.95
    """Limit of the discriminator's accuracy throughout the window: it judges at all noise levels, the highest of which
    leave little to tell, unless the images have nothing in common with the data. Healthy 0.71 in any look."""
    rate: Annotated[float, Field(gt=0, le=1)] = 0.2
    """Factor on the student's learning rate at each roll-back. With 0.2 such a run went on quietly from step 10:
    fd_fashion 3.0 after 300 steps (n = 1,000), against 39 after 80 without the guard."""
    max_roll_backs: Annotated[int, Field(ge=0)] = 3
    """Roll-backs before the run stops."""

    def steps(self, batch: int, slowest: int) -> int:
        """Steps between looks, of runs of this global batch whose slowest phase has an update every `slowest` steps."""
        return slowest * max(self.every, math.ceil(self.images / batch))


@dataclass(frozen=True)
class Alarm:
    """A collapse, seen at `step`; trouble began at step `since` or after, so what was saved before that is sound."""

    step: int
    since: int
    reason: str


@dataclass(frozen=True)
class Finding:
    """One signal at one look. severity: 1 at the limit. since: the first step that it speaks of."""

    severity: float
    since: int
    reason: str


@dataclass
class Watch:
    """Looks at a run's signals. Its answers depend on nothing but what it was shown, so all ranks agree.

    step: of the last look. best: the highest diversity seen. muted: looks without a finding until the next alarm.
    seen: the window's looks, each its first step and its signals. suspected: signals beyond SUSPECT, and since when.
    """

    __pydantic_config__: ClassVar = ConfigDict(extra="forbid")  # of what `load` takes

    guard: Guard
    step: int = 0
    best: float = 0.0
    muted: int = 0
    seen: list[tuple[int, dict[str, float]]] = field(default_factory=list)
    suspected: dict[str, int] = field(default_factory=dict)

    def reset(self, step: int) -> None:
        """Forgets all; the next look speaks of the steps after `step`."""
        self.load({"step": step})

    @property
    def state(self) -> dict[str, Any]:
        """What it remembers, for a checkpoint's manifest."""
        return {name: value for name, value in vars(self).items() if name != "guard"}

    def load(self, state: Mapping[str, Any]) -> None:
        """Remembers what `state` says, and nothing else. Raises ValueError where that is no state of a Watch."""
        vars(self).update(vars(TypeAdapter(Watch).validate_python({"guard": self.guard, **state})))

    def look(self, step: int, metrics: Mapping[str, float]) -> Alarm | None:
        """Judges the means of the signals since the last look, named "health/<signal>"; what is absent is not judged.

        One alarm a collapse: the next can come after a whole window without a signal beyond its limit.
        """
        signals = signals_of(metrics)
        self.best = max(self.best, min(signals.get("diversity", 0.0), 1.0))
        self.seen = [*self.seen[1 - self.guard.window :], (self.step + 1, signals)]
        self.step = step
        beyond = [f for f in (*self._present(), *self._windowed()) if f.severity >= 1]
        armed, self.muted = self.muted == 0, self.guard.window if beyond else max(self.muted - 1, 0)
        if not beyond or not armed:
            return None
        return Alarm(step, min(f.since for f in beyond), "; ".join(f.reason for f in beyond))

    def _present(self) -> list[Finding]:
        """What one look shows, dated back to where it left what is normal."""
        guard, (first, signals), found = self.guard, self.seen[-1], {}
        if "brightness" in signals:
            v, limit = signals["brightness"], guard.brightness
            text = f"brightness is {v:+.2f} of the data's standard deviations off (limit {limit:g})"
            found["brightness"] = abs(v) / limit, text
        if "saturation" in signals:
            v, limit = signals["saturation"], guard.saturation
            text = f"saturation is {v:.2f} above the data's share of values beyond the range (limit {limit:g})"
            found["saturation"] = v / limit, text
        if "diversity" in signals and self.best > 0:
            v, limit = signals["diversity"], guard.diversity
            text = f"diversity fell to {v:.2f} of the data's from {self.best:.2f} (limit {limit * self.best:.2f})"
            found["diversity"] = (1 - v / self.best) / (1 - limit), text
        suspect = [name for name, (severity, _) in found.items() if severity >= SUSPECT]
        self.suspected = {name: self.suspected.get(name, first) for name in suspect}
        return [Finding(severity, self.suspected.get(name, first), text) for name, (severity, text) in found.items()]

    def _windowed(self) -> list[Finding]:
        """What it takes several looks to see."""
        guard, found = self.guard, []
        if offsets := [(signals["brightness"], first) for first, signals in self.seen if "brightness" in signals]:
            (low, a), (high, b), limit = min(offsets), max(offsets), guard.swing
            text = f"brightness swings from {low:+.2f} to {high:+.2f} of the data's standard deviations off"
            found.append(Finding((high - low) / limit, min(a, b), f"{text} (limit {limit:g} apart)"))
        right = [signals["accuracy"] for _, signals in self.seen if "accuracy" in signals]
        if len(right) == guard.window:
            v, limit = min(right), guard.accuracy
            text = f"the discriminator's accuracy stays at {v:.2f} or above for {guard.window} looks (limit {limit:g})"
            found.append(Finding(v / limit, self.seen[0][0], text))
        return found


def signals_of(metrics: Mapping[str, float]) -> dict[str, float]:
    """Dimensionless signals of the metrics `health/...` (diffusion/health.py), where they are reported and finite."""
    m = {k.removeprefix("health/"): v for k, v in metrics.items() if k.startswith("health/") and math.isfinite(v)}
    out = {}
    if {"student_mean", "real_mean"} <= m.keys() and m.get("real_std", 0) > 0:
        out["brightness"] = (m["student_mean"] - m["real_mean"]) / m["real_std"]
    if {"student_saturated", "real_saturated"} <= m.keys():
        out["saturation"] = m["student_saturated"] - m["real_saturated"]
    if "student_spread" in m and m.get("real_spread", 0) > 0:
        out["diversity"] = m["student_spread"] / m["real_spread"]
    if "d_accuracy" in m:
        out["accuracy"] = m["d_accuracy"]
    return out
