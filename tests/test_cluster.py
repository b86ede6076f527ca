"""A recipe on Ray: the same numbers as without it, on one worker or two, from a job or from Python; and clear refusals."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from fewstep.build import make_engine, make_feed
from fewstep.cluster.train import Unplaceable, fit
from fewstep.recipe import Recipe, load_recipe
from fewstep.run import read_reports

ROOT = Path(__file__).resolve().parents[1]
STEPS = 6


def words(tmp: Path, *more: str) -> list[str]:
    """A demo recipe of six small steps that reports each one."""
    return [
        f"out={tmp / 'runs'}",
        f"tracking.uri=sqlite:///{tmp / 'mlflow.db'}",
        f"train.steps={STEPS}",
        "train.batch=8",
        "train.report_every=1",
        "train.save_every=3",
        "cluster.threads=1",
        "cluster.wait_s=5",
        "evaluate.metrics=[]",
        "evaluate.teacher_steps=[]",
        *more,
    ]


def recipe(tmp: Path, *more: str) -> Recipe:
    return load_recipe(words(tmp, *more), ROOT / "jobs" / "recipes", "fashion_mnist")


def losses(folder: Path) -> list[dict[str, float]]:
    """Losses, gradients and health of each report; not the clocks."""
    timing = ("_s", "images_per_s", "data_wait")
    return [{k: v for k, v in r["metrics"].items() if not k.endswith(timing)} for r in read_reports(folder)]


@pytest.fixture(scope="module")
def bare(tmp_path_factory) -> list[dict[str, float]]:
    """The engine in a plain loop: what every other way of running it has to repeat."""
    r = recipe(tmp_path_factory.mktemp("bare"), "name=bare")
    with make_feed(r.data, r.seed) as feed:
        reports = list(make_engine(r, feed).run())
    timing = ("_s", "images_per_s", "data_wait")
    return [{k: v for k, v in report.metrics.items() if not k.endswith(timing)} for report in reports]


def test_ray_gives_the_losses_of_the_bare_loop_and_resumes_into_the_same_run(ray_cluster, bare, tmp_path):
    seen = []
    half = recipe(tmp_path, "name=whole")
    result = fit(half, seen.append)
    assert losses(tmp_path / "runs" / "whole") == bare
    assert [report["step"] for report in seen] == list(range(1, STEPS + 1))
    history = mlflow_history(tmp_path, result["run_id"], "student/match")
    assert history == [(i + 1, loss["student/match"]) for i, loss in enumerate(bare)]


def mlflow_history(tmp: Path, run_id: str, key: str) -> list[tuple[int, float]]:
    from mlflow import MlflowClient

    history = MlflowClient(f"sqlite:///{tmp / 'mlflow.db'}").get_metric_history(run_id, key)
    return sorted((m.step, m.value) for m in history)


@pytest.mark.parametrize("placement", ["replicate", "shard"])
def test_two_workers_train_on_the_global_batch_of_one(ray_cluster, bare, tmp_path, placement):
    r = recipe(tmp_path, "name=two", "cluster.workers=2", f"cluster.placement={placement}")
    fit(r)
    two = losses(tmp_path / "runs" / "two")
    assert [set(a) for a in two] == [set(b) for b in bare]
    for key, value in bare[0].items():  # before any update: the same sums in another order
        if not key.endswith("std"):  # a standard deviation of halves is not that of the whole
            assert two[0][key] == pytest.approx(value, rel=1e-5), key
    # AdamW turns the rounding of gradients near zero into sign noise, so later steps agree less closely
    for a, b in zip(two, bare, strict=True):
        assert a["critic/denoise"] == pytest.approx(b["critic/denoise"], rel=2e-2)


def test_more_workers_than_the_cluster_has_is_said_and_not_waited_for(ray_cluster, tmp_path):
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
        with pytest.raises(Unplaceable, match=r"cluster.workers: 2 workers need 4 CPU and 1 are free, waited 1 s"):
            fit(recipe(tmp_path, "cluster.workers=2", "cluster.cpus_per_worker=2", "cluster.wait_s=1"))
    finally:
        ray.kill(busy)


def test_a_worker_s_mistake_reaches_the_person_in_its_own_words(ray_cluster, tmp_path):
    r = recipe(tmp_path, "name=bad")
    fit(r)
    with pytest.raises(ValueError, match="written by another recipe"):
        fit(recipe(tmp_path, "name=bad", "seed=1"))


def test_the_literal_ray_job_submit_gives_the_losses_of_the_bare_loop(ray_cluster, bare, tmp_path):
    """As in the README: a script of the repository, its arguments as key=value, on a cluster started from the root."""
    address = ray_cluster._private.worker._global_node.address_info["webui_url"]
    script = ROOT / "jobs" / "distill.py"
    command = [str(Path(sys.executable).with_name("ray")), "job", "submit", "--address", f"http://{address}"]
    done = subprocess.run(
        [*command, str(script), *words(tmp_path, "name=job")],
        env=os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert losses(tmp_path / "runs" / "job") == bare
    lines = done.stdout.splitlines()
    assert sum(line.startswith("step ") for line in lines) == STEPS
    closing = json.loads(next(line for line in reversed(lines) if line.startswith("{")))
    assert closing["export_max_difference"] == 0.0
    assert Path(closing["grid"]).is_file()


@pytest.mark.parametrize(
    ("word", "text"),
    [
        ("data.path=/nowhere", "/nowhere"),
        ("teacher=/nowhere", "teacher: no folder '/nowhere'"),
        ("evaluate.metrics=[fd_fasion]", "fd_fashion"),
        ("out=/proc/runs", "out: cannot write in /proc/runs"),
        ("optim.fak.lr=1e-4", "optim.fak: no such role"),
        ("method.name=dmd", "dmd2"),
    ],
)
def test_dry_run_refuses_what_a_run_would(tmp_path, word, text):
    out = [w for w in words(tmp_path) if not w.startswith(word.split("=")[0] + "=")]
    done = subprocess.run(
        [sys.executable, str(ROOT / "jobs" / "distill.py"), "--dry-run", *out, word], capture_output=True, text=True
    )
    assert done.returncode == 2
    assert text in done.stderr
    assert "Traceback" not in done.stderr


def test_dry_run_counts_parameters_and_memory(tmp_path):
    done = subprocess.run(
        [sys.executable, str(ROOT / "jobs" / "distill.py"), "--dry-run", *words(tmp_path)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    rows = {line.split()[0]: line.split()[1:] for line in done.stdout.splitlines() if line[:1].isalpha()}
    count = int(rows["student"][0].replace(",", ""))
    mib = count * 4 / 2**20
    assert float(rows["student"][1]) == pytest.approx(2 * mib, abs=0.1)  # with its running average
    assert float(rows["fake"][1]) == float(rows["fake"][2]) == pytest.approx(mib, abs=0.1)
    assert float(rows["fake"][3]) == pytest.approx(2 * mib, abs=0.1)
    assert [float(v) for v in rows["teacher"][2:5]] == [0, 0, 0]
    assert float(rows["student"][4]) > 1  # activations, measured
    assert not (tmp_path / "runs").exists() or not any((tmp_path / "runs").iterdir())
