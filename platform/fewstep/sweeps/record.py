"""The record of a sweep: `trials.jsonl`, one event a line, written before the sweep acts on it.

A killed sweep resumes from its record, and the report is made from it. Events: `sweep`, the settings of the sweep;
`trial`, a new trial; `score`, the scores of a trial after so many images; `end`, a trial finished, was stopped early or
failed; `run`, a trial's run in MLflow, if its `end` did not name it; `again`, a failed trial is repeated.
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
    """One trial. values: {dotted key: value} of the recipe keys that it changes, without the seed.

    phase: `search`, or `seeds` for a setting that is repeated with another seed. run: name of its run, in the sweep's
    folder; in a population, of the newest one. scores: {images, step, scores, seen_by_loss}, oldest first; seen_by_loss
    names the scores whose network a loss used. images: number of images trained on so far. hours: device hours of that
    training. state: None until the trial ends.
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
        """The newest scores by name, with `hours`; empty before the first score."""
        return self.scores[-1]["scores"] | {"hours": self.hours} if self.scores else {}

    def seen_by_loss(self, metric: str) -> bool:
        """True if a loss used the metric's network."""
        return any(metric in score.get("seen_by_loss", ()) for score in self.scores[-1:])

    def score(self, metric: str) -> float:
        """The newest value of a metric; nan if there is none."""
        return self.last.get(metric, math.nan)


class Record:
    """The open record of one sweep's folder; one process writes it.

    settings: of the sweep. If they differ from those of the record, in other keys than `may_differ`, ConfigError names
    the keys. A damaged record raises ConfigError that names the file and the line.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any], may_differ: set[str] = frozenset()):
        self.path = folder / "trials.jsonl"
        self.trials: dict[int, Trial] = {}
        self.order: list[int] = []  # numbers of the trials in the order in which they ended
        folder.mkdir(parents=True, exist_ok=True)
        known = self._read()
        plain = json.loads(json.dumps(settings))
        for key in sorted(plain.keys() | known.keys()) if known else ():
            if plain.get(key) != known.get(key) and key not in may_differ:
                raise ConfigError(
                    f"{key}: {quoted(plain.get(key))}, but sweep {folder.name!r} began with "
                    f"{quoted(known.get(key))}; give the same arguments to resume it, or another name=..."
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
                    f"{self.path}: line {number} is not an event of this sweep; mend it, or give another name=..."
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
        """Writes an event of a trial and returns the updated trial."""
        line = {"event": event, "trial": trial, "time": round(time.time(), 3), **fields}
        self._write(line)
        return self._apply(json.loads(json.dumps(line)))

    def ended(self, phase: str | None = None) -> list[Trial]:
        """Trials that have ended, sorted by number."""
        return [t for _, t in sorted(self.trials.items()) if t.state and phase in (None, t.phase)]

    def open(self, phase: str | None = None) -> list[Trial]:
        """Trials that have not ended, sorted by number."""
        return [t for _, t in sorted(self.trials.items()) if not t.state and phase in (None, t.phase)]
