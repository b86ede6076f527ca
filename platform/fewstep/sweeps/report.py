"""The report of a sweep: a Markdown table for a paper, and one HTML page that opens without a network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from ..metrics.base import SEEN
from ..page import render
from ..texts import shown
from .judge import Setting, Verdict, settings
from .record import FAILED, FINISHED, Trial
from .space import HOURS, Space


def _score(setting: Setting, metric: str) -> str:
    """Mean over seeds, with the standard deviation where there are several; of the hours the mean alone."""
    spread = setting.over_seeds(metric)
    return shown(spread.mean, 3) if metric == HOURS else str(spread)


def _heads(metrics: Sequence[str], trials: Sequence[Trial]) -> list[str]:
    """Titles of the metrics' columns; a title says if a loss used the metric's network."""
    seen = {metric for metric in metrics if any(trial.seen_by_loss(metric) for trial in trials)}
    names = {HOURS: "device hours"} | {metric: f"{metric} ({SEEN})" for metric in seen}
    return [names.get(metric, metric) for metric in metrics]


def markdown(space: Space, trials: Sequence[Trial], names: Mapping[str, str], metrics: Sequence[str]) -> str:
    """The finished settings as a table, the best first: values, each metric's mean ± standard deviation over seeds."""
    ranking = settings(trials, space.metric, space.mode)
    head = [*(f"`{names[key]}`" for key in space.domains), *_heads(metrics, trials), "seeds"]
    lines = [f"| {' | '.join(head)} |", f"|{'|'.join(['---'] * len(space.domains) + ['---:'] * (len(metrics) + 1))}|"]
    for i, setting in enumerate(ranking):
        values = [shown(setting.values.get(key, "")) for key in space.domains]
        scores = [_score(setting, metric) for metric in metrics]
        if i == 0:
            scores[0] = f"**{scores[0]}**"
        lines.append(f"| {' | '.join([*values, *scores, str(setting.score.seeds)])} |")
    left = [t for t in trials if t.state != FINISHED]
    if left:
        failed = sum(t.state == FAILED for t in left)
        lines += ["", f"Not in the table: {len(left) - failed} trials stopped early, {failed} failed."]
    return "\n".join(lines) + "\n"


def report(
    template: Path,
    name: str,
    space: Space,
    trials: Sequence[Trial],
    names: Mapping[str, str],
    metrics: Sequence[str],
    verdict: Verdict | None,
    facts: Mapping[str, str],
    command: str,
    figures: Mapping[str, str],
) -> str:
    """The page of a sweep. template: dashboards/sweep.html. figures: SVG elements by name, shown as they are."""
    ranked = settings(trials, space.metric, space.mode)
    by_number = sorted(trials, key=lambda t: t.number)
    first, *others = heads = _heads(metrics, trials)
    keys = [names[key] for key in space.domains]
    values = lambda chosen: [shown(chosen.get(key, "–")) for key in space.domains]
    number = lambda trial: f"{trial.number:03d}"

    rows = []
    for setting in ranked:
        score, *more = (_score(setting, metric) for metric in metrics)
        rows.append([score, str(setting.score.seeds), *values(setting.values), *more])
    head = [first, "seeds", *keys, *others]
    best = next((i for i, setting in enumerate(ranked) if verdict and setting.values == verdict.best.values), -1)

    listed = []
    for t in by_number:
        scores = [shown(t.last.get(metric, "–"), 4) for metric in metrics]
        listed.append([number(t), t.state or "open", *values(t.values), str(t.seed), f"{t.images:,}", *scores])
    columns = ["trial", "state", *keys, "seed", "images", *heads]

    return render(
        template,
        name=name,
        space=space,
        facts=facts,
        verdict=verdict,
        command=command,
        figures=figures,
        settings=(head, rows, len(head), best),
        bounds=(["key", "values", "why"], [[k, d.span(), space.why.get(k, "")] for k, d in space.domains.items()], 0),
        trials=(columns, listed, len(columns) - 2),
        failed=[[number(t), t.reason or ""] for t in by_number if t.state == FAILED],
    )
