"""The figures of a sweep: parallel coordinates, importance, slices, the map of a grid, and the Pareto front."""

from __future__ import annotations

import io
import json
import math
import re
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib import colormaps
from matplotlib.collections import LineCollection
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure

from ..texts import shown
from .judge import Setting, front, settings, wide
from .record import FINISHED, STOPPED, Trial
from .space import Space

INK, QUIET, LINE, BEST = "#1b1f24", "#5c6670", "#dfe2e5", "#cf4a14"
STYLE = {
    "font.family": "DejaVu Sans",
    "font.size": 8.5,
    "text.color": INK,
    "axes.edgecolor": QUIET,
    "axes.labelcolor": INK,
    "axes.titlesize": 8.5,
    "axes.linewidth": 0.7,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": QUIET,
    "ytick.color": QUIET,
    "xtick.major.width": 0.7,
    "ytick.major.width": 0.7,
    "figure.facecolor": "white",
    "svg.fonttype": "path",
    "svg.hashsalt": "fewstep",
}
COLOURS = colormaps["viridis"]
WIDTH = 10.7  # width of the page in inches
MAP_SIDE = 16


def draw(
    space: Space, trials: Sequence[Trial], names: Mapping[str, str], shares: Mapping[str, float] | None
) -> dict[str, Figure]:
    """Draws the figures that fit this sweep. Returns them by name. names: short names of the keys."""
    scored = [t for t in trials if t.state in (FINISHED, STOPPED) and math.isfinite(t.score(space.metric))]
    ranking = settings(trials, space.metric, space.mode)
    if not scored:
        return {}
    figures: dict[str, Figure] = {}
    with matplotlib.rc_context(STYLE):
        if _is_grid(ranking):
            figures["map"] = score_map(space, ranking, names)
        if len(space.domains) > 1:
            figures["parallel"] = parallel(space, scored, names)
        if shares:
            figures["importance"] = importance_bars(shares, names)
        figures["slices"] = slices(space, scored, names)
        others = [name for name in space.objectives if name not in (space.metric, "hours")]
        figures["pareto"] = pareto(space, scored, [*others, "hours"])
    return figures


def save(figures: Mapping[str, Figure], folder: Path) -> dict[str, str]:
    """Saves each figure as `<name>.png` and `<name>.svg`. Returns the SVG elements by name."""
    folder.mkdir(parents=True, exist_ok=True)
    out = {}
    with matplotlib.rc_context(STYLE):
        for name, figure in figures.items():
            figure.savefig(folder / f"{name}.png", dpi=160)
            text = io.StringIO()
            figure.savefig(text, format="svg", metadata={"Date": None})
            svg = text.getvalue()
            (folder / f"{name}.svg").write_text(svg)
            out[name] = _own_ids(svg[svg.index("<svg") :], name)
    return out


def _own_ids(svg: str, name: str) -> str:
    """Returns the SVG element with renamed ids, so that the ids of two figures on one page differ."""
    return re.sub(r'(id="|href="#|url\(#)', rf"\g<1>{name}-", svg)


def _norm(scores: Sequence[float]) -> Normalize:
    low, high = min(scores), max(scores)
    if wide(scores):
        return LogNorm(low, high)
    return Normalize(low, high if high > low else low + 1e-9)


def _scale(axis: Any, scores: Sequence[float]) -> None:
    """Makes the axis logarithmic if a few bad trials would flatten all others."""
    if wide(scores):
        axis.set_yscale("log")
        axis.yaxis.set_major_locator(matplotlib.ticker.LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_major_formatter(matplotlib.ticker.FuncFormatter(lambda x, _: f"{x:g}"))
        axis.yaxis.set_minor_formatter(matplotlib.ticker.NullFormatter())


def _best_first(space: Space, trials: Sequence[Trial]) -> list[Trial]:
    return sorted(trials, key=lambda t: t.score(space.metric) * (1 if space.mode == "min" else -1))


def _better(space: Space) -> str:
    return "lower is better" if space.mode == "min" else "higher is better"


def parallel(space: Space, trials: Sequence[Trial], names: Mapping[str, str]) -> Figure:
    """Parallel coordinates: one line per trial through its settings to its score, dashed for a stopped trial."""
    keys = list(space.domains)
    scores = [t.score(space.metric) for t in trials]
    norm = _norm(scores)
    figure = Figure(figsize=(WIDTH, 4.0), layout="constrained")
    axes = figure.subplots()
    axes.set_axis_off()
    axes.set_xlim(-0.35, len(keys) + 0.3)
    axes.set_ylim(-0.16 if any(len(t.values) < len(keys) for t in trials) else -0.05, 1.2)
    height = lambda score: float(norm(score)) if space.mode == "max" else 1 - float(norm(score))
    order = _best_first(space, trials)
    for trial in reversed(order):
        points = [
            (i, space.domains[key].axis_position(trial.values[key]) if key in trial.values else -0.09)
            for i, key in enumerate(keys)
        ]
        points.append((len(keys), height(trial.score(space.metric))))
        best = trial is order[0]
        axes.add_collection(
            LineCollection(
                [[_curve_point(a, b, s / 24) for s in range(25)] for a, b in pairwise(points)],
                colors=[BEST if best else _colour(space, norm, trial)],
                linewidths=2.2 if best else 1.0,
                linestyles="dashed" if trial.state == STOPPED else "solid",
                alpha=1.0 if best else 0.75,
                zorder=3 if best else 2,
            )
        )
    for i, key in enumerate(keys):
        domain = space.domains[key]
        axes.plot([i, i], [0, 1], color=QUIET, linewidth=0.8, zorder=4)
        for mark in domain.marks():
            axes.text(
                i - 0.04,
                domain.axis_position(mark),
                shown(mark),
                ha="right",
                va="center",
                fontsize=7.5,
                zorder=5,
                bbox=_PAPER,
            )
        if any(key not in t.values for t in trials):
            axes.text(
                i - 0.04, -0.09, "none", ha="right", va="center", fontsize=7.5, color=QUIET, zorder=5, bbox=_PAPER
            )
        axes.text(i, 1.08, _wrapped(names[key]), ha="center", va="bottom", fontsize=8)
    last = len(keys)
    axes.plot([last, last], [0, 1], color=INK, linewidth=1.2, zorder=4)
    for score in _marks(norm):
        axes.text(last + 0.05, height(score), shown(score, 3), ha="left", va="center", fontsize=7.5)
    axes.text(last, 1.08, space.metric, ha="center", va="bottom", fontsize=8, fontweight="bold")
    return figure


_PAPER = dict(facecolor="white", edgecolor="none", pad=0.8, alpha=0.85)


def _curve_point(a: tuple[float, float], b: tuple[float, float], s: float) -> tuple[float, float]:
    """Returns a point (s in [0, 1]) of a curve from a to b with horizontal ends, so that lines are easy to follow."""
    return a[0] + (b[0] - a[0]) * s, a[1] + (b[1] - a[1]) * s * s * (3 - 2 * s)


def _colour(space: Space, norm: Normalize, trial: Trial) -> Any:
    at = float(norm(trial.score(space.metric)))
    return COLOURS(0.92 * (at if space.mode == "min" else 1 - at))


def _marks(norm: Normalize) -> list[float]:
    return [float(norm.inverse(x)) for x in (0, 0.25, 0.5, 0.75, 1)]


def _wrapped(name: str, width: int = 16) -> str:
    """A key over several lines, broken after dots and underscores."""
    lines = [""]
    for part in name.replace("_", "_\0").replace(".", ".\0").split("\0"):
        if len(lines[-1]) + len(part) > width and lines[-1]:
            lines.append("")
        lines[-1] += part
    return "\n".join(lines)


def importance_bars(shares: Mapping[str, float], names: Mapping[str, str]) -> Figure:
    """Bars of the share of the score's variance that each key explains."""
    rows = sorted(shares.items(), key=lambda item: item[1])
    figure = Figure(figsize=(WIDTH, 0.7 + 0.3 * len(rows)), layout="constrained")
    axes = figure.subplots()
    bars = axes.barh([names[key] for key, _ in rows], [100 * share for _, share in rows], color="#0b69b7", height=0.62)
    axes.bar_label(bars, [f"{100 * share:.0f} %" for _, share in rows], padding=4, fontsize=8, color=INK)
    axes.set_xlim(0, 108)
    axes.set_xticks([0, 25, 50, 75, 100])
    axes.set_xlabel("share of the variance of the score that the setting explains, % (fANOVA)")
    axes.tick_params(axis="y", length=0, labelcolor=INK)
    axes.spines["left"].set_visible(False)
    return figure


def slices(space: Space, trials: Sequence[Trial], names: Mapping[str, str]) -> Figure:
    """The score against each setting alone: one dot per trial, hollow for a stopped trial."""
    keys = list(space.domains)
    columns = min(len(keys), 4)
    rows = -(-len(keys) // columns)
    wide = WIDTH * (0.5, 0.8, 1.0, 1.0)[columns - 1]
    figure = Figure(figsize=(wide, 2.7 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, sharey=True, squeeze=False)
    best = _best_first(space, trials)[0]
    for i, key in enumerate(keys):
        axes, domain = panels[i // columns][i % columns], space.domains[key]
        asked = [t for t in trials if key in t.values]
        for state, face in ((FINISHED, "#0b69b7"), (STOPPED, "white")):
            dots = [
                (domain.axis_position(t.values[key]), t.score(space.metric))
                for t in asked
                if t.state == state and t is not best
            ]
            axes.plot(*zip(*dots, strict=True), "o", **_dot(face)) if dots else None
        if key in best.values:
            axes.plot(
                domain.axis_position(best.values[key]),
                best.score(space.metric),
                "D",
                color=BEST,
                markersize=6.5,
                zorder=4,
            )
        marks = domain.marks()
        axes.set_xticks([domain.axis_position(mark) for mark in marks], [shown(mark) for mark in marks])
        axes.set_xlim(-0.08, 1.08)
        axes.set_xlabel(names[key])
        axes.grid(axis="y", color=LINE, linewidth=0.6)
        axes.set_axisbelow(True)
        _scale(axes, [t.score(space.metric) for t in trials])
        if i % columns == 0:
            axes.set_ylabel(f"{space.metric} ({_better(space)})")
    for axes in panels.flat[len(keys) :]:
        axes.set_axis_off()
    return figure


def _dot(face: str) -> dict[str, Any]:
    edge = "#0b69b7"
    return dict(markerfacecolor=face, markeredgecolor=edge, markersize=5, alpha=0.8, markeredgewidth=0.9, zorder=3)


def pareto(space: Space, trials: Sequence[Trial], others: Sequence[str]) -> Figure:
    """The score against the other objectives: scores, and hours of training. The line is the Pareto front."""
    wide = WIDTH * (0.5 if len(others) == 1 else 0.8 if len(others) == 2 else 1.0)
    figure = Figure(figsize=(wide, 3.0), layout="constrained")
    for axes, name in zip(figure.subplots(1, len(others), squeeze=False)[0], others, strict=True):
        mode = space.objectives.get(name, "min")
        seen = [t for t in trials if math.isfinite(t.score(name))]
        for state, face in ((FINISHED, "#0b69b7"), (STOPPED, "white")):
            dots = [(t.score(name), t.score(space.metric)) for t in seen if t.state == state]
            axes.plot(*zip(*dots, strict=True), "o", **_dot(face)) if dots else None
        best = sorted(
            (t.score(name), t.score(space.metric)) for t in front(seen, {space.metric: space.mode, name: mode})
        )
        if best:
            axes.plot(*zip(*best, strict=True), "-D", color=BEST, linewidth=1.1, markersize=4.5, zorder=4)
        _scale(axes, [t.score(space.metric) for t in trials])
        axes.set_xlabel(
            "training, device hours"
            if name == "hours"
            else f"{name} ({'lower' if mode == 'min' else 'higher'} is better)"
        )
        axes.set_ylabel(f"{space.metric} ({_better(space)})")
        axes.grid(color=LINE, linewidth=0.6)
        axes.set_axisbelow(True)
    return figure


def _is_grid(ranking: Sequence[Setting]) -> bool:
    """True if exactly two keys vary and all their combinations have a score."""
    keys = list(ranking[0].values) if ranking else []
    if len(keys) != 2 or any(list(s.values) != keys for s in ranking):
        return False
    columns = [{json.dumps(s.values[key]) for s in ranking} for key in keys]
    size = [len(column) for column in columns]
    return max(size) <= MAP_SIDE and min(size) > 1 and len(ranking) > 0.6 * size[0] * size[1]


def score_map(space: Space, ranking: Sequence[Setting], names: Mapping[str, str]) -> Figure:
    """A map of a grid of two keys: mean scores, with the standard deviation of settings with several seeds."""
    down, across = ranking[0].values
    rows, columns = (
        sorted({s.values[key] for s in ranking}, key=space.domains[key].axis_position) for key in (down, across)
    )
    norm = _norm([s.score.mean for s in ranking])
    figure = Figure(figsize=(min(WIDTH, 1.6 + 1.05 * len(columns)), 0.9 + 0.55 * len(rows)), layout="constrained")
    axes = figure.subplots()
    for setting in ranking:
        x, y = columns.index(setting.values[across]), rows.index(setting.values[down])
        at = float(norm(setting.score.mean)) if space.mode == "min" else 1 - float(norm(setting.score.mean))
        best = setting is ranking[0]
        axes.add_patch(
            matplotlib.patches.Rectangle(
                (x - 0.48, y - 0.46),
                0.96,
                0.92,
                facecolor=COLOURS(0.12 + 0.8 * at),
                edgecolor=BEST if best else "none",
                linewidth=2.4,
            )
        )
        ink = "white" if at < 0.55 else INK
        axes.text(
            x,
            y - (0.12 if setting.score.std is not None else 0),
            shown(setting.score.mean, 3),
            ha="center",
            va="center",
            color=ink,
            fontsize=9.5,
        )
        if setting.score.std is not None:
            axes.text(x, y + 0.22, f"± {shown(setting.score.std, 2)}", ha="center", va="center", color=ink, fontsize=7)
    axes.set_xlim(-0.55, len(columns) - 0.45)
    axes.set_ylim(len(rows) - 0.45, -0.55)
    axes.set_xticks(range(len(columns)), map(shown, columns))
    axes.set_yticks(range(len(rows)), map(shown, rows))
    axes.tick_params(length=0, labelcolor=INK)
    axes.set_xlabel(names[across])
    axes.set_ylabel(names[down])
    axes.set_title(f"{space.metric} ({_better(space)})", loc="left")
    for spine in axes.spines.values():
        spine.set_visible(False)
    return figure
