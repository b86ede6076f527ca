"""Tracking against a real MLflow: what was reported is there once, whatever died in between."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import signal
import stat
import statistics
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import mlflow
import numpy as np
import psutil
import pytest
import torch
import yaml
from demo import free_port
from job import job
from mlflow import MlflowClient
from mlflow.artifacts import download_artifacts
from PIL import Image

from fewstep.tracking import Tracker, find_run, provenance, send, tracking_uri
from fewstep.tracking.journal import Journal
from fewstep.tracking.nodes import SystemMetrics
from fewstep.tracking.store import without_password
from fewstep.tracking.tracker import params_of

ROOT = Path(__file__).resolve().parents[1]
RECIPE = {"method": {"name": "dmd2", "ttur": 5, "t_range": [0.02, 0.98]}, "optim": {"lr": 1e-4}, "teacher": None}
ENV = os.environ | {"PYTHONPATH": str(ROOT / "platform")}


def python(code: str, *args: object) -> subprocess.Popen[str]:
    """A Python process that can import fewstep."""
    command = [sys.executable, "-c", code, *map(str, args)]
    return subprocess.Popen(command, env=ENV, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def loss(step: int) -> float:
    return math.sin(step) / 3


def history(client: MlflowClient, run_id: str, name: str) -> list[tuple[int, float]]:
    return sorted((m.step, m.value) for m in client.get_metric_history(run_id, name))


RACE = """
import os, sys
from pathlib import Path
from fewstep.tracking import Tracker
uri, root = sys.argv[1], Path(sys.argv[2])

def racer(n):
    name = f"racer-{n}"
    with Tracker.open(root / name, uri=uri, experiment="race", name=name, recipe={"n": n}, tags={}) as tracker:
        tracker.log({"loss": n / 7}, step=n, images=64 * n)
    (root / f"id-{n}").write_text(f"{tracker.run_id} {tracker.unsent}")

racers = []
for n in range(4):
    racers.append(os.fork())
    if racers[-1] == 0:
        racer(n)
        os._exit(0)
for pid in racers:
    assert os.waitpid(pid, 0)[1] == 0
"""


@pytest.fixture(scope="session")
def race(tmp_path_factory):
    """Four processes open one database that does not exist. -> (uri, run ids)"""
    root = tmp_path_factory.mktemp("store")
    uri = f"sqlite:///{root}/mlflow.db"
    race = python(RACE, uri, root)
    _, errors = race.communicate(timeout=120)
    assert race.returncode == 0 and "tracking waits" not in errors, errors
    ids, unsent = zip(*((root / f"id-{n}").read_text().split() for n in range(4)), strict=True)
    assert unsent == ("0",) * 4, errors
    return uri, ids


@pytest.fixture
def uri(race):
    return race[0]


@pytest.fixture
def client(uri):
    return MlflowClient(uri)


@pytest.fixture
def start(uri, tmp_path):
    """Opens a tracker in this test's run folder."""

    def start(folder="run", **changes):
        settings = {"uri": uri, "experiment": "tests", "name": "one", "recipe": RECIPE, "tags": {"who": "me"}}
        return Tracker.open(tmp_path / folder, **settings | changes)

    return start


def test_a_database_that_four_processes_want_at_once_is_made_once(race, client):
    runs = [client.get_run(run_id) for run_id in race[1]]
    assert len({run.info.experiment_id for run in runs}) == 1
    for n, run in enumerate(runs):
        assert (run.info.run_name, run.data.params) == (f"racer-{n}", {"n": str(n)})
        assert history(client, run.info.run_id, "loss") == [(n, n / 7)]
        assert history(client, run.info.run_id, "by_images/loss") == [(64 * n, n / 7)]


def test_what_is_reported_can_be_read_back(start, client, tmp_path):
    grid = np.arange(60 * 90 * 3).reshape(60, 90, 3).astype(np.uint8)
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.txt").write_text("first")
    with start() as tracker:
        for step in range(1, 201):
            tracker.log({"fake/loss": loss(step), "lr": np.float32(0.5)}, step=step, images=32 * step)
        tracker.log({"odd": float("nan")}, 1, 1)
        tracker.log({"odd": -float("inf")}, 2, 2)
        tracker.image("student", grid, step=1200)
        tracker.image("teacher/grey", grid[:, :, :1], step=1200)
        tracker.artifact(tmp_path / "notes", to="docs")
        (tmp_path / "notes" / "a.txt").write_text("changed after it was reported")
        tracker.text("deep/er/hello.txt", "grüße\n")
        tracker.score({"name": "fd_small", "value": np.float64(12.5), "images": 5000, "sampler": "1 call"}, step=100)
        tracker.score({"name": "fd_small", "value": 11.25, "images": 5000, "sampler": "1 call"}, step=200)
        tracker.tags({"who": "you"})
    assert (tracker.unsent, tracker.refused, tracker.lost, tracker.dropped) == (0, 0, 0, 0)

    run = client.get_run(tracker.run_id)
    assert run.info.status == "FINISHED"
    assert run.data.params == {
        "method.name": "dmd2",
        "method.ttur": "5",
        "method.t_range": "[0.02, 0.98]",
        "optim.lr": "0.0001",
        "teacher": "null",
    }
    assert run.data.tags["who"] == "you"
    assert run.data.tags["fewstep.folder"] == str(tmp_path / "run")
    assert history(client, tracker.run_id, "fake/loss") == [(s, loss(s)) for s in range(1, 201)]
    assert history(client, tracker.run_id, "by_images/fake/loss") == [(32 * s, loss(s)) for s in range(1, 201)]
    assert history(client, tracker.run_id, "lr") == [(s, 0.5) for s in range(1, 201)]
    odd = dict(history(client, tracker.run_id, "odd"))
    assert math.isnan(odd[1]) and odd[2] == -sys.float_info.max
    assert history(client, tracker.run_id, "score/fd_small") == [(100, 12.5), (200, 11.25)]

    read = lambda path: Path(client.download_artifacts(tracker.run_id, path))
    np.testing.assert_array_equal(np.asarray(Image.open(read("grids/student/step-00001200.png"))), grid)
    np.testing.assert_array_equal(np.asarray(Image.open(read("grids/teacher/grey/step-00001200.png"))), grid[:, :, 0])
    assert read("docs/notes/a.txt").read_text() == "first"
    assert read("deep/er/hello.txt").read_text() == "grüße\n"
    assert yaml.safe_load(read("recipe.yaml").read_text()) == RECIPE
    scores = json.loads(read("scores.json").read_text())
    assert [(s["step"], s["value"], s["sampler"]) for s in scores] == [(100, 12.5, "1 call"), (200, 11.25, "1 call")]
    assert not list((tmp_path / "run" / "tracking" / "files").iterdir())


def test_images_lie_where_the_page_of_mlflow_looks_for_them(start, client):
    """The names are those of MLflow's own log_image, up to time and identity."""
    grid = np.zeros((16, 16, 3), np.uint8)
    with start() as tracker:
        tracker.image("a/b c", grid, step=7)
    shape = lambda path: re.sub(r"timestamp\+\d+\+[0-9a-f-]{36}", "timestamp+T+ID", path)
    ours = sorted(shape(f.path) for f in client.list_artifacts(tracker.run_id, "images"))
    client.log_image(tracker.run_id, grid, key="a/b c", step=7)
    theirs = sorted(shape(f.path) for f in client.list_artifacts(tracker.run_id, "images"))
    assert len(ours) == 2 and theirs == sorted(ours * 2)
    assert client.get_run(tracker.run_id).data.tags["mlflow.loggedImages"].lower() == "true"


def test_a_model_is_registered_and_its_alias_downloads_it(start, client, uri, tmp_path, monkeypatch):
    export = tmp_path / "export"
    (export / "unet").mkdir(parents=True)
    (export / "unet" / "weights.bin").write_bytes(bytes(range(256)))
    with start() as tracker:
        tracker.data("photos", "abc", "data/photos", rows=3)
        tracker.score({"name": "fd", "value": 1.5}, step=7)
        tracker.model(export, "fashion", "champion")
        tracker.model(export, "fashion", "champion")
    versions = client.search_model_versions("name = 'fashion'")
    assert sorted(int(v.version) for v in versions) == [1, 2]
    assert {v.run_id for v in versions} == {tracker.run_id}
    assert int(client.get_model_version_by_alias("fashion", "champion").version) == 2
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)  # MLflow looks models:/ up nowhere else
    folder = Path(download_artifacts("models:/fashion@champion", dst_path=str(tmp_path / "got")))
    assert (folder / "data/export/unet/weights.bin").read_bytes() == bytes(range(256))

    again = send(resend(tmp_path / "run"))
    assert again.unsent == 0 and len(client.search_model_versions("name = 'fashion'")) == 2
    run = client.get_run(tracker.run_id)
    models = client.search_logged_models([run.info.experiment_id])
    assert {m.model_id for m in models} == {m.model_id for m in run.outputs.model_outputs} and len(models) == 2
    assert [(m.key, m.value, m.step) for m in models[0].metrics] == [("score/fd", 1.5, 7)]
    data = [used.dataset for used in run.inputs.dataset_inputs]
    assert [(d.name, d.digest, json.loads(d.profile)) for d in data] == [("photos", "abc", {"rows": 3})]


def test_reports_of_a_deleted_run_wait_until_it_is_restored(start, client, tmp_path, caplog):
    with start() as tracker:
        tracker.log({"loss": 1.0}, 1, 8)
    client.delete_run(tracker.run_id)
    again = start()
    again.log({"loss": 2.0}, 2, 16)
    way_out = f"mlflow runs restore --run-id {tracker.run_id}"
    end = time.monotonic() + 30
    while way_out not in caplog.text and time.monotonic() < end:
        time.sleep(0.02)
    assert way_out in caplog.text
    assert again.finish(timeout_s=1) > 0 and again.refused == 0
    client.restore_run(tracker.run_id)
    assert send(tmp_path / "run").unsent == 0
    assert history(client, tracker.run_id, "loss") == [(1, 1.0), (2, 2.0)]


def resend(folder: Path) -> Path:
    """Forgets what was acknowledged, as if the process had died after sending and before it could write so."""
    (folder / "tracking" / "sent.json").unlink()
    return folder


def test_what_was_sent_but_not_marked_is_not_recorded_twice(start, client, tmp_path):
    with start() as tracker:
        for step in range(20):
            tracker.log({"loss": loss(step)}, step, 8 * step)
        tracker.log({"loss": float("nan")}, 20, 160)
        tracker.score({"name": "s", "value": 1}, step=20)
        tracker.text("t.txt", "t")
    before = {name: len(history(client, tracker.run_id, name)) for name in ("loss", "by_images/loss", "score/s")}
    assert before == {"loss": 21, "by_images/loss": 21, "score/s": 1}
    done = send(resend(tmp_path / "run"))
    assert done.unsent == 0 and done.sent == len((tmp_path / "run/tracking/journal.jsonl").read_text().splitlines())
    assert {name: len(history(client, tracker.run_id, name)) for name in before} == before
    marker = json.loads((tmp_path / "run/tracking/sent.json").read_text())
    assert marker["run_id"] == tracker.run_id


def test_a_resumed_run_goes_on_and_repeats_nothing(start, client):
    def train(tracker, steps):
        for step in steps:
            tracker.log({"loss": loss(step)}, step, 4 * step)
            if step % 50 == 0:
                tracker.image("grid", np.full((4, 4), step, np.uint8), step)
                tracker.score({"name": "s", "value": loss(step)}, step)

    first = start()
    train(first, range(10, 101, 10))
    assert first.finish("FAILED") == 0
    assert client.get_run(first.run_id).info.status == "FAILED"

    recipe = RECIPE | {"optim": {"lr": 2e-4}, "new": True}
    second = start(recipe=recipe)
    second.rewind(60)
    train(second, range(70, 151, 10))
    second.log({"other": 1.0}, 70, 280)
    assert second.finish() == 0
    assert second.run_id == first.run_id

    steps = range(10, 151, 10)
    assert history(client, first.run_id, "loss") == [(s, loss(s)) for s in steps]
    assert history(client, first.run_id, "by_images/loss") == [(4 * s, loss(s)) for s in steps]
    assert history(client, first.run_id, "score/s") == [(s, loss(s)) for s in (50, 100, 150)]
    assert history(client, first.run_id, "other") == [(70, 1.0)]
    assert len(client.list_artifacts(first.run_id, "images")) == 6
    scores = json.loads(Path(client.download_artifacts(first.run_id, "scores.json")).read_text())
    assert [s["step"] for s in scores] == [50, 100, 150]
    run = client.get_run(first.run_id)
    assert run.info.status == "FINISHED" and run.data.tags["fewstep.opened"] == "2"
    assert run.data.params["optim.lr"] == "0.0001" and run.data.tags["changed.optim.lr"] == "0.0002"
    assert run.data.params["new"] == "true"
    assert yaml.safe_load(Path(client.download_artifacts(first.run_id, "recipe.yaml")).read_text()) == recipe


TRAINING = """
import math, sys, time
from pathlib import Path
from fewstep.tracking import Tracker
tracker = Tracker.open(Path(sys.argv[2]), uri=sys.argv[1], experiment="tests", name="killed", recipe={}, tags={})
for step in range(100_000):
    tracker.log({"loss": math.sin(step) / 3}, step, 4 * step)
    if step == 200:
        tracker.flush(60)
    if step % 100 == 0:
        print(step, flush=True)
    time.sleep(0.0005)
"""


def test_a_killed_training_loses_nothing(uri, client, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "run"
    training = python(TRAINING, uri, folder)
    for line in training.stdout:
        if int(line) == 600:
            break
    os.kill(training.pid, signal.SIGKILL)
    training.communicate()
    with open(folder / "tracking/journal.jsonl", "ab") as file:
        file.write(b'{"serial": 100000, "time": 1, "op": "metr')  # killed in the middle of a line

    sent = subprocess.run(
        [sys.executable, ROOT / "jobs/track.py", f"folder={folder}"],
        capture_output=True,
        text=True,
        env=ENV,
        timeout=60,
    )
    assert sent.returncode == 0, sent.stderr
    assert "the last line is incomplete and is dropped" in sent.stderr
    sent = int(re.search(r"(\d+) operations sent, 0 unsent, 0 refused", sent.stdout)[1])
    ops = [json.loads(line) for line in (folder / "tracking/journal.jsonl").read_text().splitlines()]
    count = sum(op["op"] == "metrics" for op in ops)
    assert count > 600 and 0 < sent <= len(ops) - 200
    run = find_run(uri, "killed")
    assert history(client, run.run_id, "loss") == [(s, loss(s)) for s in range(count)]
    assert history(client, run.run_id, "by_images/loss") == [(4 * s, loss(s)) for s in range(count)]

    with pytest.raises(SystemExit) as stop:
        job("track")([f"folder={tmp_path}"])
    assert stop.value.code == 2
    assert capsys.readouterr().err.startswith(f"folder: no tracking/journal.jsonl in '{tmp_path}'")


def test_a_line_cut_short_is_dropped_and_counted(start, client, tmp_path):
    with start() as tracker:
        tracker.log({"loss": 1.0}, 1, 1)
    with open(tmp_path / "run/tracking/journal.jsonl", "ab") as file:
        file.write(b'{"serial": 7, "op"')
    with start() as tracker:
        assert tracker.dropped == 1
        tracker.log({"loss": 2.0}, 2, 2)
    assert history(client, tracker.run_id, "loss") == [(1, 1.0), (2, 2.0)]


def test_a_damaged_line_is_named(start, tmp_path):
    start().finish()
    path = tmp_path / "run/tracking/journal.jsonl"
    first, rest = path.read_bytes().split(b"\n", 1)
    path.write_bytes(first + b"\n#" + rest)
    with pytest.raises(ValueError, match=rf"journal.jsonl: damaged line at byte {len(first) + 1}"):
        start()


def test_without_a_server_training_goes_on_and_the_job_sends_later(start, client, uri, tmp_path, monkeypatch, caplog):
    dead = f"http://127.0.0.1:{free_port()}"
    tracker = start(uri=dead, name="alone")
    tracker.log({"loss": 0.25}, 1, 64)
    begun = time.monotonic()
    unsent = tracker.finish(timeout_s=1.0)
    assert time.monotonic() - begun < 5
    assert unsent == 5 and tracker.run_id is None and tracker.page is None
    assert caplog.messages[-1] == (
        f"5 tracked operations are not sent yet; send them with: python jobs/track.py folder={tmp_path / 'run'}"
    )
    assert sum("tracking waits and training continues" in m for m in caplog.messages) == 1
    with pytest.raises(RuntimeError, match="after finish"):
        tracker.log({"loss": 0.5}, 2, 128)
    tracker._thread.join(20)
    assert send(tmp_path / "run", uri=dead, timeout_s=0.5) == (0, 5, 0)
    assert send(tmp_path / "run", uri=uri) == (5, 0, 0)
    assert send(tmp_path / "run", uri=uri) == (0, 0, 0)
    run = find_run(uri, "alone", experiment="tests")
    assert (run.status, run.folder, run.params["optim.lr"]) == ("FINISHED", tmp_path / "run", "0.0001")
    assert history(client, run.run_id, "loss") == [(1, 0.25)]


@pytest.fixture
def server(uri, tmp_path):
    """-> start(), which starts a server on a copy of the database, waits for it, and returns it; killed at the end."""
    shutil.copy(uri.removeprefix("sqlite:///"), tmp_path / "server.db")
    port, started = free_port(), []
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    command += [
        "--backend-store-uri",
        f"sqlite:///{tmp_path}/server.db",
        "--artifacts-destination",
        f"{tmp_path}/served",
    ]
    env = ENV | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}

    def start():
        with open(tmp_path / "server.log", "a") as log:
            process = subprocess.Popen(command, env=env, stdout=log, stderr=log, start_new_session=True)
        started.append(process)
        deadline = time.monotonic() + 90
        while True:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1).close()
                return process, f"http://127.0.0.1:{port}"
            except OSError:
                assert process.poll() is None and time.monotonic() < deadline, (tmp_path / "server.log").read_text()
                time.sleep(0.1)

    yield start
    for process in started:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def test_a_server_that_hangs_and_dies_delays_and_loses_nothing(start, server, tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "2")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    process, address = server()
    tracker = start(uri=address, name="tough")
    took = []

    def train(steps):
        for step in steps:
            begun = time.perf_counter()
            tracker.log({"loss": loss(step), "gan": -step}, step, 16 * step)
            took.append(time.perf_counter() - begun)
            time.sleep(0.002)

    train(range(100))
    assert tracker.flush(60) == 0
    assert tracker.page.startswith(f"{address}/#/experiments/") and tracker.page.endswith(tracker.run_id)

    os.killpg(process.pid, signal.SIGSTOP)
    train(range(100, 200))
    tracker.image("student", np.full((8, 8), 200, np.uint8), 200)
    deadline = time.monotonic() + 30
    while not any("tracking waits" in m for m in caplog.messages) and time.monotonic() < deadline:
        train([len(took)])
    hung = len(took)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    train(range(hung, hung + 100))
    assert tracker.unsent > 200

    server()
    train(range(hung + 100, hung + 200))
    (tmp_path / "export").mkdir()
    (tmp_path / "export" / "weights.bin").write_bytes(b"weights")
    tracker.model(tmp_path / "export", "tough", "champion")
    assert tracker.finish(timeout_s=60) == 0

    # A blocked call would have taken the two seconds of a request; the bounds leave room for a busy machine.
    assert statistics.quantiles(took, n=100)[98] < 0.05 and max(took) < 1.0
    client, count = MlflowClient(address), hung + 200
    assert history(client, tracker.run_id, "loss") == [(s, loss(s)) for s in range(count)]
    assert history(client, tracker.run_id, "by_images/loss") == [(16 * s, loss(s)) for s in range(count)]
    assert history(client, tracker.run_id, "gan") == [(s, float(-s)) for s in range(count)]
    assert client.get_run(tracker.run_id).info.status == "FINISHED"
    grid = client.download_artifacts(tracker.run_id, "grids/student/step-00000200.png", str(tmp_path))
    assert np.asarray(Image.open(grid)).tolist() == [[200] * 8] * 8
    assert len(client.list_artifacts(tracker.run_id, "images")) == 2
    monkeypatch.setenv("MLFLOW_TRACKING_URI", address)  # MLflow looks models:/ up nowhere else
    got = download_artifacts("models:/tough@champion", dst_path=str(tmp_path / "got"))
    assert (Path(got) / "data/export/weights.bin").read_bytes() == b"weights"
    assert sum("tracking continues after" in m for m in caplog.messages) == 1


def test_what_the_server_refuses_is_recorded_and_the_rest_arrives(start, client, tmp_path):
    with start("first") as first:
        pass
    with start("second", recipe=RECIPE | {"optim": {"lr": 9.0}, "extra": 1}, run_id=first.run_id) as second:
        second.log({"loss": 0.5}, 1, 1)
    assert second.run_id == first.run_id and second.unsent == 0 and second.refused == 1
    line = json.loads((tmp_path / "second/tracking/refused.jsonl").read_text())
    assert line["what"] == "params optim.lr"
    run = client.get_run(first.run_id)
    assert run.data.params["optim.lr"] == "0.0001" and run.data.params["extra"] == "1"
    assert run.data.tags["fewstep.folder"] == str(tmp_path / "second")
    assert history(client, first.run_id, "loss") == [(1, 0.5)]


def test_a_mistake_of_the_caller_is_an_error_and_reports_nothing(start, tmp_path):
    tracker = start()
    lines = (tmp_path / "run/tracking/journal.jsonl").read_text()
    mistakes = {
        (TypeError, r"metrics.loss: expected a number, got torch.Tensor.*\.item\(\)"): lambda: tracker.log(
            {"loss": torch.ones(())}, 1, 1
        ),
        (ValueError, r"metrics: 'a\?b'"): lambda: tracker.log({"a?b": 1.0}, 1, 1),
        (ValueError, "step: -1 is not a count"): lambda: tracker.log({"a": 1.0}, -1, 1),
        (ValueError, "images: 1.5 is not a count"): lambda: tracker.log({"a": 1.0}, 1, 1.5),
        (TypeError, "uint8 array, got numpy.ndarray of float32"): lambda: tracker.image(
            "x", np.zeros((4, 4), np.float32), 1
        ),
        (ValueError, r"shape \(4, 4, 2\)"): lambda: tracker.image("x", np.zeros((4, 4, 2), np.uint8), 1),
        (ValueError, "'../x' is not a name"): lambda: tracker.image("../x", np.zeros((4, 4), np.uint8), 1),
        (ValueError, r"score: \['value'\] missing"): lambda: tracker.score({"name": "fid"}),
        (ValueError, "'latest' is not an alias"): lambda: tracker.model(tmp_path, "m", "latest"),
        (FileNotFoundError, "'nowhere' does not exist"): lambda: tracker.artifact("nowhere"),
        (ValueError, "'DONE' is not one of FINISHED, FAILED, KILLED"): lambda: tracker.finish("DONE"),
    }
    for (kind, text), mistake in mistakes.items():
        with pytest.raises(kind, match=text):
            mistake()
    assert (tmp_path / "run/tracking/journal.jsonl").read_text() == lines
    tracker.finish()


def test_a_full_disk_loses_reports_but_not_the_training(start, client, monkeypatch, tmp_path):
    tracker = start()
    tracker.log({"loss": 1.0}, 1, 1)
    write = os.write
    with monkeypatch.context() as full:
        # The disk takes half a line, then none.
        full.setattr(os, "write", lambda file, data: write(file, data[: len(data) // 2]))
        tracker.log({"loss": 2.0}, 2, 2)
    tracker.log({"loss": 3.0}, 3, 3)
    assert tracker.finish() == 0 and tracker.lost == 1
    assert history(client, tracker.run_id, "loss") == [(1, 1.0), (3, 3.0)]


def test_a_run_folder_has_one_tracker_at_a_time(start, tmp_path):
    tracker = start()
    with pytest.raises(RuntimeError, match=f"process {os.getpid()} is already tracking this run"):
        Journal(tmp_path / "run", lock_s=0.1)
    tracker.finish()
    Journal(tmp_path / "run", lock_s=0.1).close()
    with pytest.raises(ValueError, match="belongs to run"):
        start(run_id="0" * 32)
    start().finish()


def test_runs_are_found_by_id_by_name_and_as_the_last(start, uri, tmp_path):
    ids = []
    for folder, name in (("a", "twin"), ("b", "twin"), ("c", "it's last")):
        with start(folder, name=name, experiment="finding") as tracker:
            tracker.log({"loss": 1.5}, 1, 1)
        ids.append(tracker.run_id)
    for ref in ("last", "it's last", ids[2]):
        result = find_run(uri, ref, experiment="finding")
        assert (result.run_id, result.folder, result.metrics["loss"]) == (ids[2], tmp_path / "c", 1.5)
    assert find_run(uri, "last").run_id == ids[2]
    with pytest.raises(ValueError, match="several runs; give an id: " + ", ".join([ids[1], ids[0]])):
        find_run(uri, "twin", experiment="finding")
    with pytest.raises(ValueError, match="'nobody'.*the latest are: it's last, twin, twin"):
        find_run(uri, "nobody", experiment="finding")
    with pytest.raises(ValueError, match="experiment: no 'nothing'"):
        find_run(uri, "last", experiment="nothing")
    with pytest.raises(ValueError, match="does not exist; set MLFLOW_TRACKING_URI"):
        find_run(f"sqlite:///{tmp_path}/none.db", "last")
    assert not (tmp_path / "none.db").exists()


def test_the_default_store_is_the_one_mlflow_shows_without_options(monkeypatch, tmp_path):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(tmp_path)
    shown = mlflow.get_tracking_uri().removeprefix("sqlite:///")
    assert tracking_uri() == f"sqlite:///{tmp_path}/mlflow.db" == f"sqlite:///{Path(shown).absolute()}"
    assert tracking_uri("sqlite:///x/y.db", root=Path("/data")) == "sqlite:////data/x/y.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://host:5000/")
    assert tracking_uri() == "http://host:5000"
    with pytest.raises(ValueError, match="tracking.uri: 'mlruns'"):
        tracking_uri("mlruns")


def test_no_secret_is_written_to_disk_and_what_is_written_is_the_owners_alone(start, tmp_path):
    secret = f"http://ann:s3cret@127.0.0.1:{free_port()}"
    assert without_password(secret) == secret.replace("s3cret", "***")
    recipe = {"tracking": {"uri": secret}, "storage": "sftp://me:s3cret@host/runs", "start": {"fake": f"{secret}/a"}}
    tracker = start(uri=secret, recipe=recipe, tags={"sweep.from": "s3://k:s3cret@bucket/x"})
    tracker.text("git.diff", f"+uri: {secret}")
    tracker.event("lost", 1, 8, f"cannot reach {secret}/api?token=s3cret")
    tracker.finish(timeout_s=0.0)
    files = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    texts = {path.name: path.read_text() for path in files}
    assert {"journal.jsonl", "recipe.yaml", "git.diff"} <= texts.keys()
    assert not [name for name, text in texts.items() if "s3cret" in text]
    assert texts["git.diff"] == f"+uri: {without_password(secret)}"
    private = {path.name for path in files if stat.S_IMODE(path.stat().st_mode) == 0o600}
    assert private >= {"journal.jsonl", "recipe.yaml", "git.diff"}


def test_a_masked_store_is_found_again_in_the_environment_and_else_asked_for(start, tmp_path, monkeypatch):
    secret = f"http://ann:s3cret@127.0.0.1:{free_port()}"
    start(uri=secret).finish(timeout_s=0.0)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with pytest.raises(
        ValueError, match=r"^tracking.uri: http://ann:\*\*\*@.* lacks its password.*MLFLOW_TRACKING_URI"
    ):
        send(tmp_path / "run", timeout_s=0.0)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://bob:other@127.0.0.1")
    with pytest.raises(ValueError, match="lacks its password"):
        send(tmp_path / "run", timeout_s=0.0)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", secret)
    assert tracking_uri(without_password(secret)) == secret
    assert send(tmp_path / "run", timeout_s=0.0).unsent > 0


@pytest.mark.parametrize(
    "line",
    ["", "[]", "{", '{"serial": 1}', '{"serial": "1", "op": "open"}', '{"serial": 1, "op": "open"}', "[" * 99999],
)
def test_a_damaged_journal_is_named(tmp_path, line):
    (tmp_path / "tracking").mkdir()
    (tmp_path / "tracking" / "journal.jsonl").write_text(line + "\n")
    with pytest.raises(ValueError, match="journal.jsonl: damaged line at byte 0; move the folder .* away"):
        send(tmp_path, timeout_s=0.0)


def test_a_recipe_becomes_dotted_parameters():
    recipe = {
        "a": {"b": {"c": 1e-4}, "d": [1, "x"]},
        "e": True,
        "f": "text",
        "g": np.int64(3),
        "h": Path("/x"),
        "i": {},
    }
    known = {"a.b.c": "0.0001", "a.d": '[1, "x"]', "e": "true", "f": "text", "g": "3", "h": "/x", "i": "{}"}
    assert params_of(recipe) == known
    long = params_of({"long": "x" * 7000})["long"]
    assert len(long) == 6000 and long.endswith("x ... (cut; whole in recipe.yaml)")
    with pytest.raises(ValueError, match=r"recipe: 'a\?' is not a name"):
        Tracker.open(Path("unused"), uri=None, experiment="e", name="n", recipe={"a?": 1}, tags={})
    with pytest.raises(TypeError, match="torch.Tensor of torch.float32 cannot be tracked"):
        params_of({"a": torch.zeros(1)})


def test_provenance_names_commit_and_differences(tmp_path):
    assert provenance(tmp_path).tags["git.commit"] == "not a git checkout"
    assert "git.diff" not in provenance(tmp_path).files
    git = lambda *arguments: (
        subprocess.run(
            ["git", "-C", tmp_path, "-c", "user.name=a", "-c", "user.email=a@b", *arguments],
            check=True,
            capture_output=True,
            text=True,
        ).stdout
    )
    git("init", "-q")
    (tmp_path / "code.py").write_text("x = 1\n")
    git("add", "code.py")
    git("commit", "-q", "-m", "first")
    clean = provenance(tmp_path, data="sha256:1234")
    assert clean.tags["git.commit"] == clean.tags["mlflow.source.git.commit"] == git("rev-parse", "HEAD").strip()
    assert clean.tags["git.dirty"] == "false" and "git.diff" not in clean.files
    assert clean.tags["fingerprint.data"] == "sha256:1234"
    assert clean.tags["version.torch"] == torch.__version__
    assert f"numpy=={np.__version__}" in clean.files["environment.txt"].splitlines()
    (tmp_path / "code.py").write_text("x = 2\n")
    (tmp_path / "new.py").write_text("")
    dirty = provenance(tmp_path)
    assert dirty.tags["git.dirty"] == "true" and dirty.tags["git.commit"] == clean.tags["git.commit"]
    lines = dirty.files["git.diff"].splitlines()
    assert "-x = 1" in lines and "+x = 2" in lines and lines[-1] == "# untracked: new.py"


def test_fewstep_itself_does_not_load_mlflow():
    process = python("import fewstep, sys; print('mlflow' in sys.modules)")
    assert process.communicate(timeout=60)[0] == "False\n"


def test_system_metrics_are_those_of_the_node_and_are_recorded_against_steps_alone(start, client):
    metrics = SystemMetrics()
    before = psutil.virtual_memory().used / 1e6
    values = metrics.read()
    prefix = f"system/{metrics.node}/"
    assert values[prefix + "system_memory_usage_megabytes"] == pytest.approx(before, rel=0.2)
    assert values[prefix + "disk_usage_megabytes"] == pytest.approx(psutil.disk_usage("/").used / 1e6, rel=0.2)
    assert all(0 <= value <= 100 for name, value in values.items() if name.endswith("percentage"))
    again = metrics.read()  # and does not average with the first reading
    assert values.keys() == again.keys()
    with start() as tracker:
        tracker.log({"loss": 1.0, **values}, 3, 12)
    for name, value in values.items():
        assert history(client, tracker.run_id, name) == [(3, value)]
        assert history(client, tracker.run_id, f"by_images/{name}") == []
