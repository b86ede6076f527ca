"""The record of a sweep: `trials.jsonl`, one event a line, written before anything depends on it.

It is what a killed sweep goes on from, and what the report is made of. Events: `sweep`, its settings; `trial`, a
setting is tried; `score`, what a trial's student scored after so many images; `end`, a trial finished, was stopped
early, or failed; `run`, its run in MLflow, where its end did not say; `again`, a failed one is tried anew.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..config import ConfigError, read_json_lines
from ..folders import append_private
from ..texts import masked, quoted

FINISHED, STOPPED, FAILED = "finished", "stopped early", "failed"
SEARCH, SEEDS = "search", "seeds"


@dataclass
class Trial:
    """One trial. values: {dotted key: value}, all that it changes of the recipe but the seed.

    phase: `search`, or `seeds` for a setting repeated with another seed. run: name of its run, below the sweep's
    folder, its newest in a population. scores: as they came, {images, step, scores, seen_by_loss}; the last names the
    scores whose network a loss used. images: that it was trained on so far. hours: what that took, times the devices
    held. state: None while it has not ended.
    """

    number: int
    values: dict[str, Any]
    seed: int
    phase: str
    run: str
    start: float
    scores: list[dict[str, Any]] = field(default_factory=list)
    state: str | None = None
    reason: str | None = None
    run_id: str | None = None
    images: int = 0
    hours: float = 0.0

    @property
    def last(self) -> dict[str, float]:
        """Its newest scores by name, `hours` among them; none before the first."""
        return self.scores[-1]["scores"] | {"hours": self.hours} if self.scores else {}

    def seen_by_loss(self, metric: str) -> bool:
        """True if a loss used the metric's network."""
        return any(metric in score.get("seen_by_loss", ()) for score in self.scores[-1:])

    def score(self, metric: str) -> float:
        """The newest value of a metric, nan where there is none."""
        return self.last.get(metric, math.nan)


class Record:
    """The open record of one sweep's folder; one process writes it.

    settings: what the sweep is; going on with other settings than the record's raises ConfigError naming them, but for
    those in `may_differ`. A damaged record raises ConfigError naming the file and the line.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any], may_differ: set[str] = frozenset()):
        self.path = folder / "trials.jsonl"
        self.trials: dict[int, Trial] = {}
        self.order: list[int] = []  # in which they ended
        folder.mkdir(parents=True, exist_ok=True)
        known = self._read()
        plain = json.loads(json.dumps(settings))
        for key in sorted(plain.keys() | known.keys()) if known else ():
            if plain.get(key) != known.get(key) and key not in may_differ:
                raise ConfigError(
                    f"{key}: {quoted(plain.get(key))}, but sweep {folder.name!r} was begun with "
                    f"{quoted(known.get(key))}; give the same words to go on with it, or another name=..."
                )
        if plain != known:
            self._write({"event": "sweep", "settings": plain})

    def _read(self) -> dict[str, Any]:
        if not self.path.exists():
            return {}
        text = self.path.read_bytes()
        whole = text[: text.rfind(b"\n") + 1]
        if whole != text:  # the process died while it wrote
            os.truncate(self.path, len(whole))
        known: dict[str, Any] = {}
        for number, event in enumerate(read_json_lines(self.path), start=1):
            try:
                if event["event"] == "sweep":
                    known = dict(event["settings"])
                else:
                    self._apply(event)
            except (KeyError, TypeError, ValueError, AttributeError):
                raise ConfigError(
                    f"{self.path}: line {number} is no event of this sweep; mend it, or give the sweep another name=..."
                ) from None
        return known

    def _apply(self, event: dict[str, Any]) -> Trial:
        kind, number = event["event"], event["trial"]
        if kind == "trial":
            fields = {key: event[key] for key in ("values", "seed", "phase", "run")}
            self.trials[number] = Trial(number=number, start=event["time"], **fields)
        trial = self.trials[number]
        if kind == "score":
            trial.scores.append({k: event[k] for k in ("images", "step", "scores", "seen_by_loss") if k in event})
            trial.images, trial.hours = event["spent"], event["hours"]
            trial.run, trial.values = event.get("run", trial.run), event.get("values", trial.values)
        elif kind == "end":
            trial.state, trial.reason = event["state"], event.get("reason")
            trial.run_id = event.get("run_id") or trial.run_id
            trial.images, trial.hours = event.get("spent", trial.images), event.get("hours", trial.hours)
            self.order.append(number)
        elif kind == "run":
            trial.run_id = event["run_id"]
        elif kind == "again":
            trial.state = trial.reason = None
            self.order.remove(number)
        return trial

    def _write(self, event: Mapping[str, Any]) -> None:
        append_private(self.path, json.dumps(masked(event)) + "\n", sync=True)

    def add(self, event: str, trial: int, **fields: Any) -> Trial:
        """Writes an event of a trial and returns the trial as it is after it."""
        line = {"event": event, "trial": trial, "time": round(time.time(), 3), **fields}
        self._write(line)
        return self._apply(json.loads(json.dumps(line)))

    def ended(self, phase: str | None = None) -> list[Trial]:
        """Trials with an end, in the order of their numbers."""
        return [t for _, t in sorted(self.trials.items()) if t.state and phase in (None, t.phase)]

    def open(self, phase: str | None = None) -> list[Trial]:
        """Trials without an end."""
        return [t for _, t in sorted(self.trials.items()) if not t.state and phase in (None, t.phase)]
