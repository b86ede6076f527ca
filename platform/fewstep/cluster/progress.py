"""Progress of a run for people: a bar in a terminal, a line per report in a log, and a table at the end."""

from __future__ import annotations

import sys
import time
from typing import Any

from ..metrics.base import SEEN
from ..recipe import Recipe
from ..run import NOT_SCORES
from ..texts import shown


class Progress:
    """Shows reports: steps, images, time left and headline metrics. Use as a context manager."""

    def __init__(self, recipe: Recipe):
        self.recipe, self.start, self.first, self.bar = recipe, time.monotonic(), None, None

    def __enter__(self) -> Progress:
        if sys.stdout.isatty():
            from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

            self.bar = Progress(
                TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[text]}"), TimeRemainingColumn()
            )
            self.bar.start()
            self.task = self.bar.add_task(self.recipe.name, total=self.recipe.train.steps, text="starting")
        return self

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:
            self.bar.stop()

    def __call__(self, report: dict[str, Any]) -> None:
        say = self.bar.console.print if self.bar is not None else print
        if "scores" in report:
            scores = "  ".join(f"{name} {shown(value, 4)}" for name, value in report["scores"].items())
            return say(f"scores at step {report['step']}: {scores}")
        text = self.line(report)
        for event in report.get("events", []):
            say(f"{event['kind']} at step {event['step']}: {event['reason']}")
        if self.bar is not None:
            self.bar.update(self.task, completed=report["step"], text=text)
        else:
            print(text, flush=True)

    def line(self, report: dict[str, Any]) -> str:
        step, steps, metrics = report["step"], self.recipe.train.steps, report["metrics"]
        speed = metrics["images_per_s"]
        left_s = (steps - step) * self.recipe.train.batch / speed
        numbers = "  ".join(
            f"{k.split('/')[-1]} {shown(metrics[k], 3)}" for k in self.recipe.method.headline if k in metrics
        )
        return (
            f"step {step}/{steps}  {report['images']:,} images  {speed:.0f} images/s  {clock(left_s)} left  {numbers}"
        )


def clock(seconds: float) -> str:
    """Seconds as 1:02:03 or 2:03."""
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours}:{m:02d}:{s:02d}" if hours else f"{m}:{s:02d}"


def table(rows: list[dict[str, Any]]) -> str:
    """The closing table: who, sampler, calls, speed and all scores with their sample count."""
    if not rows:
        return ""
    names = [k for k in rows[0] if k not in NOT_SCORES]
    seen = {name for row in rows for name in row["seen_by_loss"]}
    notes = [f"n={rows[0]['images']}" + (f", {SEEN}" if name in seen else "") for name in names]
    head = ["", "sampler", "calls", "images/s", *(f"{name} ({note})" for name, note in zip(names, notes, strict=True))]
    body = [
        [r["who"], r["sampler"], str(r["nfe"]), f"{r['images_per_s']:.1f}", *(f"{r[n]:.3f}" for n in names)]
        for r in rows
    ]
    widths = [max(len(line[i]) for line in [head, *body]) for i in range(len(head))]
    return "\n".join(
        "  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in [head, *body]
    )
