"""Comparing runs: what differs, scores with spread, curves and grids equal what the tracker was told."""

from __future__ import annotations

import base64
import functools
import io
import json
import math
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from job import job
from PIL import Image

from fewstep.compare import Record, collect, compare, scores, short
from fewstep.page import render
from fewstep.tracking import Store, Tracker
from fewstep.tracking.store import database

ROOT = Path(__file__).resolve().parents[1]
TEMPLATE = ROOT / "dashboards" / "compare.html"
EVIL = "</script><script>document.title='taken'</script>"
STEPS, BATCH, SPEED = (10, 20, 30, 40), 8, 16.0  # reports; images a step; images a second
FD = {("0.003", 0): 1.25, ("0.003", 1): 1.75, ("0.01", 0): 1.0}  # by GAN weight and seed
WHO = [("plain", 0.003, 0), (EVIL, 0.003, 1), ("more-gan", 0.01, 0)]
TEACHER_FD = 0.5
HOW = {"sampler": "few-step-1", "calls": 1, "extractor": "e" * 64, "reference": "f" * 64, "reference_images": 60000}


@dataclass(frozen=True)
class Built:
    """Three tracked runs, children of a fourth: two seeds of one setting and another setting."""

    uri: str
    parent: str
    ids: tuple[str, str, str]


def loss(gan: float, seed: int, step: int) -> float:
    return gan + math.cos(step + seed) / 3


def grid(seed: int, step: int) -> np.ndarray:
    """(20, 20) uint8, another one for each seed and step."""
    return np.random.default_rng([seed, step]).integers(0, 256, (20, 20), dtype=np.uint8)


@functools.cache
def build(uri: str) -> Built:
    """Tracks the runs with the real tracker; once for all tests of a session."""
    root = database(uri).parent / "comparing"
    root.mkdir()

    def track(name: str, recipe: dict, tags: dict) -> Tracker:
        folder = root / f"run-{len(list(root.iterdir()))}"
        return Tracker.open(folder, uri=uri, experiment="comparing", name=name, recipe=recipe, tags=tags)

    with track("gan-sweep", {"space": "gan_weight"}, {}) as parent:
        parent.flush(60)
        parent_id = parent.run_id
    ids = []
    for name, gan, seed in WHO:
        method = {"name": "dmd2", "gan_weight": gan, "guidance": 1.0}
        recipe = {"recipe": "small", "name": name, "seed": seed, "out": f"runs/{seed}", "method": method}
        with track(name, recipe, {"mlflow.parentRunId": parent_id}) as tracker:
            tracker.image("teacher", grid(seed, 10_000), 0)
            for step in (0, 20, 40) if gan == 0.003 else (0, 40):
                tracker.image("student", grid(seed + round(1000 * gan) * 10, step), step)
            for step in STEPS:
                metrics = {"critic/denoise": loss(gan, seed, step), "images_per_s": SPEED}
                metrics |= {"health/match_gradient": math.nan if step == 20 else -math.inf if step == 30 else step}
                tracker.log(metrics, step, BATCH * step)
            for step, value in ((20, 9.0), (40, FD[str(gan), seed])):
                tracker.score(HOW | {"name": "fd_small", "value": value, "images": 500, "checkpoint": "last"}, step)
            other = {"sampler": "heun-18", "calls": 35, "images": 500, "checkpoint": "last"}
            tracker.score(HOW | other | {"name": "teacher/heun-18/fd_small", "value": TEACHER_FD + seed}, 40)
            tracker.flush(60)
            ids.append(tracker.run_id)
    return Built(uri, parent_id, tuple(ids))


@pytest.fixture(scope="session")
def built(store) -> Built:
    return build(store)


@pytest.fixture(scope="module")
def reader(built) -> Store:
    return Store(built.uri, "comparing")


@pytest.fixture(scope="module")
def records(built, reader) -> list[Record]:
    return [collect(reader, reader.find(run_id)) for run_id in built.ids]


@pytest.fixture(scope="module")
def data(records) -> dict:
    return compare(records, what="3 runs", store="here")


# What differs


def test_runs_that_differ_in_nothing_but_the_seed_and_their_place_are_one(data):
    assert [run["group"] for run in data["runs"]] == [0, 0, 1]
    assert data["settings"] == [{"key": "method.gan_weight", "short": "gan_weight"}]
    assert [group["label"] for group in data["groups"]] == [[["gan_weight", "0.003"]], [["gan_weight", "0.01"]]]
    assert data["same"] == [["method.guidance", "1.0"], ["method.name", "dmd2"], ["recipe", "small"]]


def test_a_setting_is_called_by_the_end_that_names_it_alone():
    known = {"optim.fake.lr", "optim.student.lr", "method.ttur", "method.name", "name"}
    assert short(known, known) == {
        "optim.fake.lr": "fake.lr",
        "optim.student.lr": "student.lr",
        "method.ttur": "ttur",
        "method.name": "method.name",
        "name": "name",
    }


# Scores


def test_scores_have_mean_and_deviation_over_the_seeds(data):
    (column,), (teacher, first, second) = data["scores"]["columns"], data["scores"]["rows"]
    assert (column["name"], column["better"], column["images"]) == ("fd_small", "lower", 500)
    cell = first["cells"][0]
    assert (cell["mean"], cell["std"], cell["seeds"]) == (1.5, math.sqrt(0.125), 2)
    assert [v["value"] for v in cell["values"]] == [1.25, 1.75]
    assert (second["cells"][0]["mean"], second["cells"][0]["std"], second["cells"][0]["mark"]) == (1.0, None, "best")
    assert "mark" not in cell  # 0.5 off, and the deviation is 0.35
    assert (first["calls"], first["images"], teacher["calls"]) == (1, [40 * BATCH], 35)
    # of seed 0 there are two runs and of seed 1 one: two seeds
    assert (teacher["cells"][0]["mean"], teacher["cells"][0]["seeds"]) == (1.0, 2)
    assert "mark" not in teacher["cells"][0]


def test_a_group_within_the_spread_of_the_best_is_not_distinguished():
    def scored(seed: int, gan: str, value: float, **changes) -> Record:
        score = HOW | {"name": "diversity", "value": value, "images": 500, "step": 4, "checkpoint": "last"} | changes
        return Record(None, str(seed), {"gan": gan}, [], {}, [score], {}, None)

    runs = [scored(0, "a", 0.8), scored(1, "a", 1.0), scored(0, "b", 0.8), scored(0, "c", 0.7)]
    rows = scores(runs, [[0, 1], [2], [3]])["rows"]
    assert [row["cells"][0].get("mark") for row in rows] == ["best", "close", None]  # means 0.9, 0.8, 0.7; spread 0.14

    unlike = [scored(0, "a", 0.8), scored(0, "b", 0.9, images=1000), scored(0, "c", 0.7, reference="a" * 64)]
    table = scores(unlike, [[0], [1], [2]])
    assert len(table["columns"]) == 3  # nothing is set against a score that does not compare
    assert [[bool(cell) for cell in row["cells"]] for row in table["rows"]] == np.eye(3, dtype=bool).tolist()


def test_the_same_seed_twice_is_no_spread():
    score = HOW | {"name": "fd_small", "value": 1.0, "images": 500, "step": 4, "checkpoint": "last"}
    runs = [Record(None, "7", {}, [], {}, [score | {"value": value}], {}, None) for value in (1.0, 2.0)]
    cell = scores(runs, [[0, 1]])["rows"][0]["cells"][0]
    assert (cell["mean"], cell["std"], cell["seeds"]) == (1.5, None, 1)


def test_a_score_that_is_not_finite_is_named_so_and_never_best():
    score = HOW | {"name": "fd_small", "images": 500, "step": 4, "checkpoint": "last"}
    runs = [Record(None, "0", {}, [], {}, [score | {"value": v}], {}, None) for v in (-math.inf, 2.0, 3.0)]
    cells = [row["cells"][0] for row in scores(runs, [[0], [1], [2]])["rows"]]
    assert [(cell["mean"], cell.get("mark")) for cell in cells] == [(None, None), (2.0, "best"), (3.0, None)]
    assert cells[0]["values"] == [{"run": 0, "value": None}]


# Curves and grids


def test_curves_stand_against_steps_images_and_hours_of_training(data):
    run = data["runs"][1]
    axis, values = run["curves"]["critic/denoise"]
    axis = run["axes"][axis]
    assert values == [loss(0.003, 1, step) for step in STEPS]
    assert axis["steps"] == list(STEPS) and axis["images"] == [BATCH * step for step in STEPS]
    assert axis["hours"] == pytest.approx([BATCH * step / SPEED / 3600 for step in STEPS])
    scored = run["axes"][run["curves"]["score/fd_small"][0]]
    assert (scored["steps"], scored["images"]) == ([20, 40], [160, 320])
    assert run["curves"]["health/match_gradient"][1] == [10.0, None, None, 40.0]  # neither nan nor infinity
    assert data["metrics"][:3] == ["score/fd_small", "health/match_gradient", "critic/denoise"]
    assert not any(name.startswith("by_images/") for name in data["metrics"])


def test_a_run_without_image_counts_is_drawn_against_nothing(reader, built, tmp_path):
    settings = {"uri": built.uri, "experiment": "comparing", "name": "foreign", "recipe": {}, "tags": {}}
    with Tracker.open(tmp_path / "foreign", **settings) as tracker:
        tracker.log({"loss": 1.0}, 5, 40)
    result = collect(reader, reader.find(tracker.run_id))
    assert np.isnan(result.axes[0]["images"]).all() and np.isnan(result.axes[0]["hours"]).all()


def test_long_curves_and_many_grids_are_thinned_evenly_to_their_ends(reader, built, monkeypatch):
    monkeypatch.setattr("fewstep.compare.CURVE_POINTS", 3)
    result = collect(reader, reader.find("plain"), grids=2)
    assert result.axes[0]["steps"].tolist() == [10, 30, 40]
    assert list(result.grids) == [0, 40]


def test_grids_are_the_runs_own_and_each_picture_is_stored_once(data, records):
    def pixels(index: int) -> np.ndarray:
        return np.array(Image.open(io.BytesIO(base64.b64decode(data["pictures"][index]))))

    assert [[step for step, _ in run["grids"]] for run in data["runs"]] == [[0, 20, 40], [0, 20, 40], [0, 40]]
    np.testing.assert_array_equal(pixels(data["runs"][1]["grids"][1][1]), grid(31, 20))
    assert data["runs"][0]["teacher"] == data["runs"][2]["teacher"] != data["runs"][1]["teacher"]
    assert len(data["pictures"]) == 8 + 2


# Reading runs


def test_of_reports_at_one_step_the_newest_counts(reader, built):
    run = reader.find("more-gan")
    reader._client.log_metric(run.run_id, "twice", 1.0, timestamp=1_000, step=3)
    reader._client.log_metric(run.run_id, "twice", 2.0, timestamp=2_000, step=3)
    reader._client.log_metric(run.run_id, "twice", 3.0, timestamp=500, step=1)
    assert [(p.step, p.value) for p in reader.history(run, "twice")] == [(1, 3.0), (3, 2.0)]
    assert reader.history(run, "never") == [] and reader.files(run, "nowhere") == []


def test_a_sweeps_trials_are_found_by_their_parent_in_the_order_of_their_names(reader, built):
    result = reader.children(reader.find("gan-sweep"))
    assert {run.run_id for run in result} == set(built.ids)
    assert [run.name for run in result] == sorted(name for name, *_ in WHO)


# The page and the job


def test_nothing_of_a_run_can_end_the_element_that_holds_it(data):
    text = render(TEMPLATE, data=data)
    assert EVIL in [run["name"] for run in data["runs"]] and EVIL not in text
    head, _, rest = text.partition('<script id="data" type="application/json">')
    assert json.loads(rest.partition("</script>")[0]) == data
    assert "{{" not in head and text.count("</script>") == 2
    assert "http://" not in text.replace("http://www.w3.org/2000/svg", "") and "https://" not in text


def test_the_job_compares_a_sweep(built, tmp_path, capsys):
    out = tmp_path / "page.html"
    job("compare")(["sweep=gan-sweep", f"uri={built.uri}", f"out={out}", "experiment=comparing"])
    output = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert output == {"page": str(out), "runs": 3, "groups": 2, "bytes": out.stat().st_size}


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["runs=[plane]"], "no run has the id or name 'plane'.*did you mean 'plain'?"),
        (["runs=[plain,plain]"], "plain: given twice"),
        (["sweep=plain"], "run 'plain' has no trials"),
        ([], "give either runs=.* or sweep="),
        (["runs=[plain]", "sweep=gan-sweep"], "give either runs=.* or sweep="),
        (["runs=[plain]", "out=/proc/at/all.html"], "out: cannot write in /proc/at"),
        (["""runs=['a''b"c']"""], "no run has the id or name"),
        (["runs=[plain]", "uri=sqlite:////nowhere.db"], "'/nowhere.db' does not exist"),
        (["runs=[plain]", "uri=sqlite:///bad.db"], "tracking.uri: sqlite:///.* cannot be used: .*not a database"),
        (["runs=[plain]", "uri=sqlite://"], "tracking.uri: sqlite: cannot be used: "),
        (["runs=[plain]", "uri=http://"], "tracking.uri: http: cannot be used: Invalid url"),
        (["runs=[plain]", "uri=postgresql://x/y"], "tracking.uri: postgresql://x/y cannot be used: No module"),
    ],
    ids=lambda value: " ".join(value)[:40] if isinstance(value, list) else "",
)
def test_a_mistake_is_named_with_its_way_out(built, capsys, tmp_path, monkeypatch, arguments, text):
    monkeypatch.chdir(tmp_path)
    Path("bad.db").write_text("not a database")
    place = (
        []
        if any(argument.startswith("uri=") for argument in arguments)
        else [f"uri={built.uri}", "experiment=comparing"]
    )
    with pytest.raises(SystemExit) as stop:
        job("compare")([*arguments, *place])
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert re.search(text, error) and len(error.splitlines()) == 1
