"""A recipe on Ray: the same numbers as without it, on one worker or two, from a job or Python; and clear refusals."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from demo import ROOT, STEPS, arguments, listening, losses, mlflow_history, recipe, untimed
from job import job
from mlflow import MlflowClient

from fewstep.build import make_engine, make_feed, make_metrics, make_samples
from fewstep.cluster.train import Unplaceable, fit, localized
from fewstep.data.shards import ShardWriter
from fewstep.dryrun import describe
from fewstep.students import open_student
from fewstep.tracking.nodes import SystemMetrics

DISTILL = job("distill")


@pytest.fixture(scope="module")
def bare(tmp_path_factory) -> list[dict[str, float]]:
    """The engine in a plain loop: what every other way of running it has to repeat."""
    r = recipe(tmp_path_factory.mktemp("bare"), "name=bare")
    with make_feed(r.data, r.seed) as feed:
        reports = list(make_engine(r, feed).run())
    return [untimed(report.metrics) for report in reports]


def test_ray_gives_the_losses_of_the_bare_loop_and_a_folder_keeps_its_recipe(ray_cluster, store, bare, tmp_path):
    seen = []
    scored = ["evaluate.metrics=[fd_fashion]", "evaluate.images=64", "evaluate.every_images=24"]
    result = fit(recipe(tmp_path, "name=whole", f"tracking.uri={store}", *scored), seen.append)
    assert losses(tmp_path / "runs" / "whole") == bare
    assert [line["step"] for line in seen if "metrics" in line] == list(range(1, STEPS + 1))
    history = mlflow_history(store, result["run_id"], "student/match")
    assert history == [(i + 1, loss["student/match"]) for i, loss in enumerate(bare)]
    images = mlflow_history(store, result["run_id"], "by_images/student/match")
    assert images == [(8 * (i + 1), loss["student/match"]) for i, loss in enumerate(bare)]
    used = f"system/{SystemMetrics().node}/system_memory_usage_percentage"
    assert [(i, 0 < v < 100) for i, v in mlflow_history(store, result["run_id"], used)] == [
        (i, True) for i in range(1, 7)
    ]
    for grid in ("student", "teacher", "fake"):
        assert (tmp_path / "runs" / "whole" / f"{grid}.png").is_file()
    # the checkpoint of step 3 was scored in a task of its own, from the samples that its run would have drawn
    actual = {line["step"]: line["scores"]["fd_fashion"] for line in seen if "scores" in line}
    assert actual.keys() == {3, 6}
    student = open_student(tmp_path / "runs" / "whole" / "checkpoints" / "step-00000003")
    [fd_fashion] = make_metrics(student.recipe)
    assert actual[3] == fd_fashion(make_samples(student.sampler, 64)).value
    with pytest.raises(ValueError, match="seed: 0 -> 1"):  # the worker's own text, not Ray's about it
        fit(recipe(tmp_path, "name=whole", "seed=1", f"tracking.uri={store}"))


def test_two_workers_train_on_the_global_batch_of_one(ray_cluster, store, bare, tmp_path):
    sockets = []
    two_workers = ["cluster.workers=2", "cluster.placement=shard"]
    fit(recipe(tmp_path, "name=two", *two_workers, f"tracking.uri={store}"), lambda line: sockets.append(listening()))
    two = losses(tmp_path / "runs" / "two")
    assert [set(a) for a in two] == [set(b) for b in bare]
    for key, value in bare[0].items():  # before any update: the same sums in another order
        if not key.endswith(("std", "spread")):  # a deviation within halves is not that of the whole
            assert two[0][key] == pytest.approx(value, rel=1e-5), key
    # AdamW turns the rounding of gradients near zero into sign noise, so later steps agree less closely
    for a, b in zip(two, bare, strict=True):
        assert a["critic/denoise"] == pytest.approx(b["critic/denoise"], rel=2e-2)
    # nobody outside this machine reaches any process of a private cluster, and none of the ranks
    listeners = [socket for moment in sockets for socket in moment]
    assert {address for _, address, _ in listeners} == {"127.0.0.1"}
    assert {"gcs_server", "raylet", "ray::RayTrainWorker"} <= {title[:19] for title, _, _ in listeners}


def test_workers_elsewhere_get_urls_as_they_are_and_other_places_absolute(tmp_path, monkeypatch):
    monkeypatch.setenv("FEWSTEP_HOME", str(tmp_path))
    places = ["start.student=s3://bucket/a", "start.fake=b", "resume=s3://bucket/c", "storage=s3://bucket/d"]
    result = localized(recipe(tmp_path, "name=x", *places))
    assert result.start == {"student": "s3://bucket/a", "fake": str(tmp_path / "b")}
    assert (result.resume, result.checkpoints) == ("s3://bucket/c", "s3://bucket/d/x")
    assert localized(recipe(tmp_path, "name=x", "storage=d")).checkpoints == tmp_path / "d" / "x"


def test_more_workers_than_the_cluster_has_is_reported_and_not_waited_for(ray_cluster, tmp_path):
    with pytest.raises(RuntimeError, match=r"64 workers .* need 64 logical CPUs and it has 4.*fewer workers"):
        fit(recipe(tmp_path, "cluster.workers=64", "train.batch=64"))


def test_a_busy_cluster_is_waited_for_and_then_named(ray_cluster, tmp_path):
    import ray

    @ray.remote(num_cpus=3)
    class Busy:
        def ready(self) -> None: ...

    busy = Busy.remote()
    ray.get(busy.ready.remote())
    try:
        with pytest.raises(Unplaceable, match=r"cluster.workers: 2 workers need 4 CPU and 1 are free after 1 s"):
            fit(recipe(tmp_path, "cluster.workers=2", "cluster.cpus_per_worker=2", "cluster.wait_s=1"))
    finally:
        ray.kill(busy)


def test_the_literal_ray_job_submit_gives_the_losses_of_the_bare_loop(ray_cluster, store, bare, tmp_path):
    """The README's form: a script of the repository, its arguments as key=value, on a cluster started from the root."""
    address = ray_cluster._private.worker._global_node.address_info["webui_url"]
    script = ROOT / "jobs" / "distill.py"
    command = [str(Path(sys.executable).with_name("ray")), "job", "submit", "--address", f"http://{address}"]
    argv = arguments(tmp_path, "name=job", f"tracking.uri={store}")
    deadline = time.monotonic() + 90
    while True:
        done = subprocess.run([*command, str(script), *argv], capture_output=True, text=True)
        if "No available agent" not in done.stderr or time.monotonic() > deadline:  # a young cluster has none yet
            break
        time.sleep(2)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert losses(tmp_path / "runs" / "job") == bare
    lines = done.stdout.splitlines()
    assert sum(line.startswith("step ") for line in lines) == STEPS
    closing = json.loads(next(line for line in reversed(lines) if line.startswith("{")))
    assert closing["export_max_difference"] == 0.0
    assert Path(closing["grid"]).is_file()
    submitted = MlflowClient(store).get_run(closing["run_id"]).data.tags["ray.submission_id"]
    assert f"'{submitted}'" in done.stdout
    assert any(line.startswith("MLflow: ") and closing["run_id"] in line for line in lines)


@pytest.mark.parametrize(
    ("argument", "text"),
    [
        ("data.path=/nowhere", "/nowhere"),
        ("teacher=/nowhere", "teacher: no folder '/nowhere'"),
        ("evaluate.metrics=[fd_fasion]", "fd_fashion"),
        ("out=/proc/runs", "out: cannot write in /proc/runs"),
        ("optim.fak.lr=1e-4", "optim.fak: no such role"),
        ("method.name=dmd22", "dmd2"),
    ],
)
def test_dry_run_refuses_what_a_run_would(tmp_path, capsys, argument, text):
    with pytest.raises(SystemExit) as stop:
        DISTILL(["--dry-run", *arguments(tmp_path, argument)])
    assert stop.value.code == 2
    assert text in capsys.readouterr().err


def test_images_of_another_size_than_the_network_are_refused(tmp_path):
    with ShardWriter(tmp_path / "small", (1, 8, 8), classes=10) as writer:
        for label in range(10):
            writer.add(np.full((1, 8, 8), 20 * label, np.uint8), label)
    with pytest.raises(ValueError, match=r"data.path: images of shape \(1, 8, 8\) .* the network takes \(1, 28, 28\)"):
        describe(recipe(tmp_path, f"data.path={tmp_path / 'small'}"))


def test_dry_run_counts_parameters_and_memory(tmp_path, capsys):
    DISTILL(["--dry-run", *arguments(tmp_path)])
    rows = {line.split()[0]: line.split()[1:] for line in capsys.readouterr().out.splitlines() if line[:1].isalpha()}
    count = int(rows["student"][0].replace(",", ""))
    mib = count * 4 / 2**20
    assert float(rows["student"][1]) == pytest.approx(2 * mib, abs=0.1)  # with its running average
    assert float(rows["fake"][1]) == float(rows["fake"][2]) == pytest.approx(mib, abs=0.1)
    assert float(rows["fake"][3]) == pytest.approx(2 * mib, abs=0.1)
    assert [float(v) for v in rows["teacher"][2:5]] == [0, 0, 0]
    assert float(rows["student"][4]) > 1  # activations, measured
    assert not (tmp_path / "runs").exists() or not any((tmp_path / "runs").iterdir())
