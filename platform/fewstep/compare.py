"""Compares runs: the settings that differ, scores, curves and sample grids, as plain values for the page."""

from __future__ import annotations

import base64
import hashlib
import re
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .config import parse_json
from .methods import METHODS
from .metrics import better
from .seeds import Spread, grouped
from .tracking.nodes import PREFIX
from .tracking.runs import Run, Store

SEED = "seed"
PLACE = re.compile(r"(name|out|tracking\..*)")  # names and places, which change no number
CURVE_POINTS = 1000  # most points of a curve on the page
LABEL_SETTINGS = 3  # a label lists at most so many settings
LAST = re.compile(r"score/teacher/.*|updates/.*|\w+_s|data_wait|images_per_s")
SHOWN_CURVES = 6  # curves that the page shows at first
COMPARABLE = ("images", "extractor", "reference", "reference_images")  # scores must agree in these to compare


@dataclass(frozen=True)
class Record:
    """The data of one run that is compared.

    settings: settings that change the run's numbers, as text by dotted key, without the seed. seed: "" if it has none.
    axes: the (N,) steps, images and hours of its reports. curves: by metric the index of its axis and the (N,) values,
    nan for a value that is not finite. scores: the newest of each name, as in `scores.json`.
    grids: PNG files by step. teacher: the teacher's PNG, from the same noise.
    """

    run: Run
    seed: str
    settings: dict[str, str]
    axes: list[Mapping[str, np.ndarray]]
    curves: dict[str, tuple[int, np.ndarray]]
    scores: list[dict[str, Any]]
    grids: dict[int, bytes]
    teacher: bytes | None


def collect(store: Store, run: Run, *, grid: str = "student", grids: int = 24) -> Record:
    """Reads one run. grid: name of its images. grids: most images to read, evenly spaced, with both ends."""
    clock = _clock(store, run)
    axes, curves = [], {}
    for name in sorted(name for name in run.metrics if not name.startswith(("by_images/", PREFIX))):
        points = _thinned(store.history(run, name), CURVE_POINTS)
        steps = np.array([p.step for p in points])
        values = np.array([p.value for p in points])
        values[np.abs(values) > 1e300] = np.nan  # an SQL store keeps an infinity as the largest float64
        index = next((i for i, axis in enumerate(axes) if np.array_equal(axis["steps"], steps)), len(axes))
        if index == len(axes):
            at = {unit: np.interp(steps, clock["steps"], clock[unit], right=np.nan) for unit in ("images", "hours")}
            axes.append({"steps": steps} | at)
        curves[name] = (index, values)
    where = f"scores.json of run {run.name}"
    scores = parse_json(store.read(run, "scores.json"), where, list) if "scores.json" in store.files(run) else []
    pictures = _thinned(list(store.grids(run, grid).items()), grids)
    teacher = list(store.grids(run, "teacher").values())
    return Record(
        run=run,
        seed=run.params.get(SEED, ""),
        settings={k: v for k, v in run.params.items() if k != SEED and not PLACE.fullmatch(k)},
        axes=axes,
        curves=curves,
        scores=list({s["name"]: s for s in sorted(scores, key=lambda s: s["step"])}.values()),
        grids={step: store.read(run, path) for step, path in pictures},
        teacher=store.read(run, teacher[-1]) if teacher else None,
    )


def _clock(store: Store, run: Run) -> dict[str, np.ndarray]:
    """Returns steps, images and hours of training, from the reports that have `images_per_s`.

    Hours are the sum of the reports' durations, so scoring and interruptions do not count. A run without such reports
    has steps only, and its curves are not drawn against images or hours.
    """
    # the two names of one report share its time; of several within a millisecond the order tells which is which
    speeds = sorted(store.history(run, "images_per_s"), key=lambda p: (p.time_ms, p.step))
    counts = sorted(store.history(run, "by_images/images_per_s"), key=lambda p: (p.time_ms, p.step))
    if not speeds or [p.time_ms for p in speeds] != [p.time_ms for p in counts]:
        return {unit: np.zeros(1) for unit in ("steps", "images", "hours")}
    images = np.array([0] + [p.step for p in counts], dtype=float)
    hours = np.cumsum([0, *(np.diff(images) / [p.value for p in speeds] / 3600)])
    return {"steps": np.array([0] + [p.step for p in speeds]), "images": images, "hours": hours}


def _thinned(items: Sequence, most: int) -> list:
    """Returns at most `most` items, evenly spaced, with the first and the last."""
    if len(items) <= most:
        return list(items)
    return [items[i] for i in np.linspace(0, len(items) - 1, most).round().astype(int)]


# ---------------------------------------------------------------------------------------------------- settings


def changed(records: Sequence[Record]) -> list[str]:
    """Returns the settings that differ between runs, in the order of the runs' settings."""
    keys = list(dict.fromkeys(key for record in records for key in record.settings))
    return [key for key in keys if len({record.settings.get(key) for record in records}) > 1]


def short(keys: Iterable[str], known: Iterable[str]) -> dict[str, str]:
    """Each key's shortest end that is the end of no other known key: `fake.lr` of `optim.fake.lr`."""
    known = set(known)

    def ends(key: str) -> list[str]:
        parts = key.split(".")
        return [".".join(parts[i:]) for i in reversed(range(len(parts)))]

    taken = [end for key in known for end in ends(key)]
    return {key: next((end for end in ends(key) if taken.count(end) == 1), key) for key in keys}


def _labels(records: Sequence[Record], groups: list[list[int]], keys: list[str]) -> list[dict[str, str]]:
    """{setting: value} of what varies, when that is short; else the recipe's name where it tells the groups apart, or
    the first run's."""
    firsts = [records[group[0]] for group in groups]
    if 0 < len(keys) <= LABEL_SETTINGS:
        return [{key: record.settings[key] for key in keys if key in record.settings} for record in firsts]
    recipes = {record.settings.get("recipe", "") for record in firsts}
    return [{"recipe": r.settings["recipe"]} if len(recipes) == len(firsts) > 1 else {"": r.run.name} for r in firsts]


# ---------------------------------------------------------------------------------------------------- scores


def scores(records: Sequence[Record], groups: list[list[int]], rank_seen_by_loss: bool = False) -> dict[str, Any]:
    """The table of scores: one column a metric, sample count and reference, for only such scores compare. Scores whose
    network a loss of their run used have a column of their own, which is marked only if rank_seen_by_loss is true.

    Rows are the teachers' samplers, over all runs, then the groups. A cell has mean, sample standard deviation over the
    seeds (n - 1; None for one seed), the number of seeds, the single values, and `mark`: "best", or "close" where its
    mean is off the best one by no more than the larger of their two standard deviations. Teachers get no mark.
    """
    group_of = {i: g for g, members in enumerate(groups) for i in members}
    columns: list[dict[str, Any]] = []
    rows: dict[tuple, dict[str, Any]] = {}
    for i, record in enumerate(records):
        for score in record.scores:
            who, name = re.fullmatch(r"(?:(teacher)/.*/)?(.*)", score["name"]).groups()
            column = {"name": name, "better": better(name), "seen_by_loss": bool(score.get("seen_by_loss"))}
            column |= {key: score.get(key) for key in COMPARABLE}
            if column not in columns:
                columns.append(column)
            about = {key: score.get(key) for key in ("sampler", "calls", "checkpoint")}
            row = rows.setdefault(
                (who and record.settings.get("teacher"), None if who else group_of[i], *about.values()),
                {"teacher": bool(who), "group": None if who else group_of[i], **about, "images": set(), "values": {}},
            )
            row["values"].setdefault(columns.index(column), {})[i] = score["value"]
            row["images"] |= {_images_at(record, score["step"])} - {None}
    order = sorted(range(len(columns)), key=lambda c: _sort_key(f"score/{columns[c]['name']}", ()))
    table = sorted(rows.values(), key=lambda r: (not r["teacher"], r["group"] or 0, r["calls"] or 0))
    for row in table:
        values = row.pop("values")
        row["images"] = sorted(row["images"])
        row["cells"] = [_cell(values[c], records) if c in values else None for c in order]
    for place, c in enumerate(order):
        if rank_seen_by_loss or not columns[c]["seen_by_loss"]:
            _mark_best([row["cells"][place] for row in table if not row["teacher"] and row["cells"][place]], columns[c])
    return {"columns": [columns[c] for c in order], "rows": table}


def _cell(values: Mapping[int, float], records: Sequence[Record]) -> dict[str, Any]:
    """Returns a cell of the table. values: by index of the run. JSON has no nan, so None stands for what is not finite.

    A run without a seed counts as a seed of its own.
    """
    finite = lambda value: value if np.isfinite(value) else None
    spread = Spread.over((records[run].seed or run, value) for run, value in values.items())
    single = [{"run": run, "value": finite(value)} for run, value in values.items()]
    return {"mean": finite(spread.mean), "std": spread.std, "seeds": spread.seeds, "values": single}


def _mark_best(cells: Sequence[dict[str, Any]], column: Mapping[str, Any]) -> None:
    """Marks the best of a column, and the cells that the spread of seeds does not tell from it."""
    spreads = [(Spread(c["mean"], c["std"], c["seeds"]), c) for c in cells if c["mean"] is not None]
    if column["better"] is None or len(spreads) < 2:
        return
    best, _ = (min if column["better"] == "lower" else max)(spreads, key=lambda pair: pair[0].mean)
    for spread, cell in spreads:
        if spread is best:
            cell["mark"] = "best"
        elif spread.near(best):
            cell["mark"] = "close"


def _images_at(record: Record, step: int) -> int | None:
    for axis in record.axes:
        if step in axis["steps"]:
            images = float(axis["images"][list(axis["steps"]).index(step)])
            return round(images) if np.isfinite(images) else None
    return None


# --------------------------------------------------------------------------------- the values of the page


def _headlines(records: Iterable[Record]) -> tuple[str, ...]:
    """Returns the prefixes of the metrics that come first: scores, then the headline metrics of the methods."""
    methods = dict.fromkeys(record.run.params.get("method.name", "") for record in records)
    return ("score/", *dict.fromkeys(name for m in methods if m in METHODS for name in METHODS[m].headline))


def _sort_key(name: str, headlines: Sequence[str]) -> tuple:
    """Returns the sort key of a metric: headline metrics, then others, then bookkeeping."""
    last = bool(LAST.fullmatch(name))
    first = next((i for i, start in enumerate(headlines) if name.startswith(start)), len(headlines))
    return (last, first, 0 if better(name.rpartition("/")[2]) == "lower" else 1, name)


def compare(records: Sequence[Record], *, what: str, store: str, rank_seen_by_loss: bool = False) -> dict[str, Any]:
    """Everything the page shows, as plain values. what: how the runs were chosen; store: where they are kept;
    rank_seen_by_loss: as `scores` has it.

    Raises ValueError where there is no run, or one is given twice.
    """
    ids = [record.run.run_id for record in records]
    if not ids:
        raise ValueError("runs: none to compare")
    if twice := sorted({record.run.name for record in records if ids.count(record.run.run_id) > 1}):
        raise ValueError(f"runs: {', '.join(twice)}: given twice")
    keys, known = changed(records), {key for record in records for key in record.settings}
    names = short(keys, known.union(*(record.run.params for record in records)))
    groups = grouped(range(len(records)), lambda i: records[i].settings)
    group_of = {i: g for g, members in enumerate(groups) for i in members}
    pictures: dict[str, str] = {}
    headlines = _headlines(records)
    names_of_curves = {name for record in records for name in record.curves}
    metrics = sorted(names_of_curves, key=lambda name: _sort_key(name, headlines))
    return {
        "what": what,
        "store": store,
        "made": time.strftime("%Y-%m-%d %H:%M %Z"),
        "settings": [{"key": key, "short": names[key]} for key in keys],
        "same": [[key, records[0].settings[key]] for key in sorted(known - set(keys))],
        "groups": [
            {"label": [[names.get(key, ""), value] for key, value in label.items()]}
            for label in _labels(records, groups, keys)
        ],
        "runs": [_run_values(record, group_of[i], pictures) for i, record in enumerate(records)],
        "scores": scores(records, groups, rank_seen_by_loss),
        "metrics": metrics,
        "shown": metrics[:SHOWN_CURVES],
        "curve_points": CURVE_POINTS,
        "pictures": list(pictures.values()),
    }


def _run_values(record: Record, group: int, pictures: dict[str, str]) -> dict[str, Any]:
    """A record as JSON types; its pictures as indices of `pictures`, which holds each different one once, as base64."""

    def picture(png: bytes) -> int:
        digest = hashlib.sha256(png).hexdigest()
        pictures.setdefault(digest, base64.b64encode(png).decode())
        return list(pictures).index(digest)

    run = record.run
    return {
        "id": run.run_id,
        "name": run.name,
        "status": run.status,
        "started": time.strftime("%Y-%m-%d %H:%M", time.localtime(run.start_ms / 1000)),
        "group": group,
        "seed": record.seed,
        "settings": record.settings,
        "axes": [{name: _none_for_nan(x) for name, x in axis.items()} for axis in record.axes],
        "curves": {name: [axis, _none_for_nan(values)] for name, (axis, values) in record.curves.items()},
        "grids": [[step, picture(png)] for step, png in record.grids.items()],
        "teacher": None if record.teacher is None else picture(record.teacher),
    }


def _none_for_nan(values: np.ndarray) -> list[float | None]:
    """Returns the values with None for those that are not finite, because JSON has no nan."""
    return [value if np.isfinite(value) else None for value in values.tolist()]
