"""The guard: detects a collapse of the student from the health signals that its method reports.

If the critic cannot follow the student, images swing between too dark and too bright, and then all images look the same
(DMD2, section 4.2). Losses do not show this: a matching loss does not measure convergence.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal

from pydantic import ConfigDict, Field, TypeAdapter

from ..config import Strict

SUSPECT = 0.7  # a signal above this share of its limit marks the begin of the trouble


class Guard(Strict):
    """Limits of the student's health signals, and the reaction to a collapse.

    A check judges the means of the signals since the last check. Each limit's text has two measures. "Healthy" is the
    worst value of the shipped Fashion-MNIST recipes, three seeds each, over 100 to 600 steps. "Collapse" are the values
    that three seeds of a collapsing run (one critic update a student update at equal rates) reached within 40 student
    updates.
    """

    policy: Literal["off", "warn", "stop", "roll_back"] = "warn"
    """Reaction to an alarm: warn reports it, stop ends the run, roll_back resumes from an earlier checkpoint with
    a lower learning rate of the student."""
    every: Annotated[int, Field(ge=1)] = 5
    """Student updates between checks. A check waits for the device once."""
    images: Annotated[int, Field(ge=1)] = 160
    """Fewest images that a check averages, at any batch size. The brightness of a few images is noise."""
    window: Annotated[int, Field(ge=2)] = 8
    """Number of checks over which `swing` and `accuracy` are judged."""
    swing: Annotated[float, Field(gt=0)] = 0.4
    """Limit of the change of the brightness offset within the window, in the data's standard deviations. The offset is
    the student's mean minus the data's. Healthy 0.22, the noise of a check; collapse 1.01, 1.15, 0.54."""
    brightness: Annotated[float, Field(gt=0)] = 0.6
    """Limit of the brightness offset itself, for an offset that grows slowly. Healthy 0.13; collapse 0.64, 0.91,
    0.37, later 1.6."""
    saturation: Annotated[float, Field(gt=0, lt=1)] = 0.5
    """Limit of the share of values beyond [-1, 1], minus the data's share. Healthy 0.27, from a black background;
    collapse 0.61, 0.76, 0.39, later 0.9."""
    diversity: Annotated[float, Field(gt=0, lt=1)] = 0.5
    """Least diversity, as a share of the run's best. A one-step student starts low, so only a decrease counts.
    Healthy 0.88; collapse 0.68, 0.57, 0.95, later 0.06."""
    accuracy: Annotated[float, Field(gt=0.5, lt=1)] = 0.95
    """Limit of the discriminator's accuracy in all checks of the window. High noise levels hide most differences, so
    only images unlike the data reach it. Healthy 0.71 in any check."""
    rate: Annotated[float, Field(gt=0, le=1)] = 0.2
    """Factor on the student's learning rate at each roll-back. With 0.2 a collapsing run was stable from step 10 on:
    fd_fashion 3.0 after 300 steps (n = 1,000), against 39 after 80 without the guard."""
    max_roll_backs: Annotated[int, Field(ge=0)] = 3
    """Most roll-backs of a run. The next alarm stops it."""

    def steps(self, batch: int, slowest: int) -> int:
        """Returns the steps between checks. batch: global batch. slowest: steps per update of the slowest phase."""
        return slowest * max(self.every, math.ceil(self.images / batch))


@dataclass(frozen=True)
class Alarm:
    """A collapse, detected at `step`. It began at step `since` or later, so checkpoints before `since` are sound."""

    step: int
    since: int
    reason: str


@dataclass(frozen=True)
class Finding:
    """One signal at one check. severity: signal over limit, 1 at the limit. since: the first step it covers."""

    severity: float
    since: int
    reason: str


@dataclass
class Watch:
    """Checks a run's signals. Its alarms depend on the signals alone, so all ranks agree.

    step: step of the last check. best: highest diversity so far. muted: checks below all limits before the next alarm
    is possible. seen: first step and signals of each check in the window. suspected: first step of each signal beyond
    SUSPECT.
    """

    __pydantic_config__: ClassVar = ConfigDict(extra="forbid")  # `load` refuses unknown keys

    guard: Guard
    step: int = 0
    best: float = 0.0
    muted: int = 0
    seen: list[tuple[int, dict[str, float]]] = field(default_factory=list)
    suspected: dict[str, int] = field(default_factory=dict)

    def reset(self, step: int) -> None:
        """Clears the state. The next check covers the steps after `step`."""
        self.load({"step": step})

    @property
    def state(self) -> dict[str, Any]:
        """The state in JSON types, for a checkpoint's manifest."""
        return {name: value for name, value in vars(self).items() if name != "guard"}

    def load(self, state: Mapping[str, Any]) -> None:
        """Replaces the state. Raises ValueError if `state` is not the state of a Watch."""
        vars(self).update(vars(TypeAdapter(Watch).validate_python({"guard": self.guard, **state})))

    def check(self, step: int, metrics: Mapping[str, float]) -> Alarm | None:
        """Judges the means of the signals since the last check, named "health/<signal>". A missing signal is skipped.

        A collapse raises one alarm. The next is possible after a whole window without a signal beyond its limit.
        """
        signals = signals_of(metrics)
        self.best = max(self.best, min(signals.get("diversity", 0.0), 1.0))
        self.seen = [*self.seen[1 - self.guard.window :], (self.step + 1, signals)]
        self.step = step
        beyond = [f for f in (*self._current_findings(), *self._window_findings()) if f.severity >= 1]
        armed, self.muted = self.muted == 0, self.guard.window if beyond else max(self.muted - 1, 0)
        if not beyond or not armed:
            return None
        return Alarm(step, min(f.since for f in beyond), "; ".join(f.reason for f in beyond))

    def _current_findings(self) -> list[Finding]:
        """Findings of the last check. `since` is the step at which the signal first passed SUSPECT."""
        guard, (first, signals), findings = self.guard, self.seen[-1], {}
        if "brightness" in signals:
            v, limit = signals["brightness"], guard.brightness
            text = f"brightness is {v:+.2f} of the data's standard deviations off (limit {limit:g})"
            findings["brightness"] = abs(v) / limit, text
        if "saturation" in signals:
            v, limit = signals["saturation"], guard.saturation
            text = f"saturation is {v:.2f} above the data's share of values beyond the range (limit {limit:g})"
            findings["saturation"] = v / limit, text
        if "diversity" in signals and self.best > 0:
            v, limit = signals["diversity"], guard.diversity
            text = f"diversity fell to {v:.2f} of the data's from {self.best:.2f} (limit {limit * self.best:.2f})"
            findings["diversity"] = (1 - v / self.best) / (1 - limit), text
        suspect = [name for name, (severity, _) in findings.items() if severity >= SUSPECT]
        self.suspected = {name: self.suspected.get(name, first) for name in suspect}
        return [Finding(severity, self.suspected.get(name, first), text) for name, (severity, text) in findings.items()]

    def _window_findings(self) -> list[Finding]:
        """Findings over all checks of the window: swing of the brightness, accuracy of the discriminator."""
        guard, findings = self.guard, []
        if offsets := [(signals["brightness"], first) for first, signals in self.seen if "brightness" in signals]:
            (low, a), (high, b), limit = min(offsets), max(offsets), guard.swing
            text = f"brightness swings from {low:+.2f} to {high:+.2f} of the data's standard deviations off"
            findings.append(Finding((high - low) / limit, min(a, b), f"{text} (limit {limit:g} apart)"))
        right = [signals["accuracy"] for _, signals in self.seen if "accuracy" in signals]
        if len(right) == guard.window:
            v, limit = min(right), guard.accuracy
            text = f"the discriminator's accuracy stays at {v:.2f} or above for {guard.window} checks (limit {limit:g})"
            findings.append(Finding(v / limit, self.seen[0][0], text))
        return findings


def signals_of(metrics: Mapping[str, float]) -> dict[str, float]:
    """Returns the dimensionless signals of the finite metrics `health/...` (see diffusion/health.py)."""
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
