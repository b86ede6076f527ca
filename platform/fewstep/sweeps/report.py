"""A sweep in words: a Markdown table fit for a paper, and one HTML page that opens without a network."""

from __future__ import annotations

import re
import statistics
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

from ..metrics.base import SEEN
from ..texts import shown
from .judge import Setting, Verdict, settings
from .record import FAILED, FINISHED, Trial
from .space import HOURS, Space

CAPTIONS = {
    "map": (
        "Mean {metric} at each point of the grid ({better}); ± is the standard deviation over seeds where a point was "
        "repeated. The best mean is framed."
    ),
    "parallel": (
        "A line a trial, through its settings to its {metric} on the right, the better the higher. Dashed: stopped "
        "early. Thick: the best trial."
    ),
    "importance": (
        "How much of the variance of {metric} over this space (of its logarithm, where scores span more than a factor "
        "of four) each setting explains alone, by a random forest (fANOVA; Hutter et al. 2014). What is missing from "
        "100 % is noise and interplay."
    ),
    "slices": (
        "{metric} against each setting alone. Hollow: stopped early, so at fewer images. Diamond: the best trial."
    ),
    "pareto": "What a better {metric} is paid with. The line joins the trials that no other one beats in both.",
}


def _mean(setting: Setting, metric: str) -> str:
    """Mean over seeds, with the standard deviation where there are several."""
    values = [t.score(metric) for t in setting.trials]
    if metric == HOURS:
        return f"{statistics.fmean(values):.3g}"
    spread = f" ± {statistics.stdev(values):.2g}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.4g}{spread}"


def _heads(metrics: Sequence[str], trials: Sequence[Trial]) -> list[str]:
    """The columns' titles; one says where a loss used the metric's network."""
    seen = {metric for metric in metrics if any(trial.seen_by_loss(metric) for trial in trials)}
    names = {HOURS: "device hours"} | {metric: f"{metric} ({SEEN})" for metric in seen}
    return [names.get(metric, metric) for metric in metrics]


def markdown(space: Space, trials: Sequence[Trial], names: Mapping[str, str], metrics: Sequence[str]) -> str:
    """The finished settings as a table, the best first: values, each metric's mean ± standard deviation over seeds."""
    found = settings(trials, space.metric, space.mode)
    head = [*(f"`{names[key]}`" for key in space.domains), *_heads(metrics, trials), "seeds"]
    lines = [f"| {' | '.join(head)} |", f"|{'|'.join(['---'] * len(space.domains) + ['---:'] * (len(metrics) + 1))}|"]
    for i, setting in enumerate(found):
        values = [shown(setting.values[key]) if key in setting.values else "" for key in space.domains]
        scores = [_mean(setting, metric) for metric in metrics]
        if i == 0:
            scores[0] = f"**{scores[0]}**"
        lines.append(f"| {' | '.join([*values, *scores, str(len(setting.trials))])} |")
    left = [t for t in trials if t.state != FINISHED]
    if left:
        failed = sum(t.state == FAILED for t in left)
        lines += ["", f"Not in the table: {len(left) - failed} trials stopped early, {failed} failed."]
    return "\n".join(lines) + "\n"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], numbers: int, marked: Sequence[bool] = ()) -> str:
    """An HTML table of texts that are escaped here; the last `numbers` columns are right-aligned."""
    side = lambda i: ' class="num"' if i >= len(head) - numbers else ""
    top = "".join(f"<th scope=col{side(i)}>{escape(text).replace('_', '_<wbr>')}" for i, text in enumerate(head))
    body = []
    for r, row in enumerate(rows):
        cells = "".join(f"<td{side(i)}>{escape(text).replace('_', '_<wbr>')}" for i, text in enumerate(row))
        body.append(f"<tr{' class=best' if r < len(marked) and marked[r] else ''}>{cells}")
    return f"<div class=scroll tabindex=0><table><thead><tr>{top}<tbody>{''.join(body)}</table></div>"


def _settings_table(
    space: Space, trials: Sequence[Trial], names: Mapping[str, str], metrics: Sequence[str], verdict: Verdict
) -> str:
    rows, marked = [], []
    for setting in settings(trials, space.metric, space.mode):
        first, *others = (_mean(setting, metric) for metric in metrics)
        values = [shown(setting.values.get(key, "–")) for key in space.domains]
        rows.append([first, str(len(setting.trials)), *values, *others])
        marked.append(setting.values == verdict.best.values)
    first, *others = _heads(metrics, trials)
    head = [first, "seeds", *(names[key] for key in space.domains), *others]
    return _table(head, rows, len(head), marked)


def _trials_table(space: Space, trials: Sequence[Trial], names: Mapping[str, str], metrics: Sequence[str]) -> str:
    head = ["trial", "state", *(names[key] for key in space.domains), "seed", "images", *_heads(metrics, trials)]
    rows = []
    for t in sorted(trials, key=lambda t: t.number):
        values = [shown(t.values.get(key, "–")) for key in space.domains]
        scores = [f"{t.score(metric):.4g}" if t.score(metric) == t.score(metric) else "–" for metric in metrics]
        rows.append([f"{t.number:03d}", t.state or "open", *values, str(t.seed), f"{t.images:,}", *scores])
    return _table(head, rows, len(head) - 2)


def page(
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
    """The report. template: its HTML, with {{title}}, {{facts}}, {{answer}}, {{figures}}, {{trials}} and {{why}}.

    figures: SVG elements by name. Whatever is text is escaped; nothing is asked of a network.
    """
    words = {"metric": space.metric, "better": "lower is better" if space.mode == "min" else "higher is better"}
    answer = "<p class=verdict>No trial finished, so there is no answer.</p>"
    if verdict is not None:
        kind = "won" if verdict.won else "open"
        answer = f"<p class='verdict {kind}'>{escape(verdict.text)}</p><p><code>{escape(command)}</code></p>"
        answer += _settings_table(space, trials, names, metrics, verdict)
    drawn = "".join(
        f"<figure id={key}>{svg}<figcaption>{escape(CAPTIONS[key].format(**words))}</figcaption></figure>"
        for key, svg in figures.items()
    )
    failed = [t for t in trials if t.state == FAILED]
    listed = _trials_table(space, trials, names, metrics)
    if failed:
        listed += "<h3>Why trials failed</h3>" + _table(
            ["trial", "reason"], [[f"{t.number:03d}", t.reason or ""] for t in failed], 0
        )
    why = _table(["key", "values", "why"], [[k, d.span(), space.why.get(k, "")] for k, d in space.domains.items()], 0)
    parts = {
        "title": escape(name),
        "question": escape(space.question),
        "facts": "".join(f"<div><dt>{escape(k)}<dd>{escape(v)}</div>" for k, v in facts.items()),
        "answer": answer,
        "figures": drawn,
        "trials": listed,
        "why": why,
    }
    return re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], template.read_text(encoding="utf-8"))
