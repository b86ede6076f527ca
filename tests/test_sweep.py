"""Sweeps on Ray: trials in MLflow, failures, kills, populations; and what is refused before anything runs."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from job import job

from fewstep.build import make_engine, make_feed
from fewstep.cluster import sweep as tuned
from fewstep.cluster.train import localized
from fewstep.config import ConfigError, plain_errors, read, resolve, validate
from fewstep.engine.checkpoint import read_weights
from fewstep.engine.folder import step_of
from fewstep.recipe import Recipe, load_recipe, open_recipe
from fewstep.run import read_reports
from fewstep.sweeps.driver import sweep as run_sweep
from fewstep.sweeps.population import bounded, mutation
from fewstep.sweeps.record import FINISHED, SEARCH, Record, Trial
from fewstep.sweeps.settings import Sweep, slots
from fewstep.sweeps.space import Space, apply, choice, load_space, loguniform
from fewstep.sweeps.warm import earlier_trials
from fewstep.tracking import Store

ROOT = Path(__file__).resolve().parents[1]
RECIPES = ROOT / "jobs" / "recipes"
JOB = job("sweep")
TTUR = "method.critic_updates_per_student_update"
HEAD = "from fewstep.sweeps.space import *\nMETRIC, MODE = 'fd_fashion', 'min'\n"


def arguments(tmp: Path, *more: str) -> list[str]:
    """A sweep of the demo recipe cut to six steps of eight images, in `tmp`."""
    small = [
        f"out={tmp / 'runs'}",
        "name=s",
        "train.steps=6",
        "train.batch=8",
        "train.report_every=1",
        "train.save_every=2",
        "evaluate.images=100",
        "evaluate.metrics=[fd_fashion,diversity]",
        "cluster.threads=1",
    ]
    return list({argument.split("=")[0]: argument for argument in (*small, *more)}.values())


def space_file(tmp: Path, text: str) -> str:
    (tmp / "mine.py").write_text(HEAD + text)
    return f"space={tmp / 'mine.py'}"


def sweep(argv: list[str]) -> dict | None:
    """The closing object of jobs/sweep.py in this process; None after a dry run."""
    with plain_errors():
        job, given = JOB.read(argv)
        own = Sweep.model_validate(job.model_dump(include=set(Sweep.model_fields)))
        recipe, space = open_recipe(job.recipe, RECIPES, given), load_space(job.space, ROOT / "tune_spaces")
        return run_sweep(own, space, recipe, ROOT / "dashboards" / "sweep.html", tuned.TuneCluster(), job.dry_run)


def events(folder: Path, kind: str) -> list[dict]:
    return [e for e in map(json.loads, (folder / "trials.jsonl").read_text().splitlines()) if e["event"] == kind]


def trials_of(folder: Path) -> dict[int, Trial]:
    return Record(folder, events(folder, "sweep")[-1]["settings"]).trials


# Before anything runs


@pytest.mark.parametrize(
    ("text", "more", "message"),
    [
        ("SPACE = {'method.gan_wieght': choice(0, 1)}", [], "SPACE['method.gan_wieght']"),
        ("SPACE = {'method.gan_weight': choice(0, -1)}", [], "must be at least 0, got -1"),
        ("SPACE = {'method.gan_weight': choice(0, 1)}\nMETRIC = 'fid'", [], "METRIC: 'fid' is not scored"),
        ("SPACE = {}", [], "SPACE: empty"),
        ("SPACE = {'method.gan_weight': choice(0, 1)}", ["trian.steps=3"], "trian: no such key; did you mean 'train'?"),
        ("SPACE = {'method.gan_weight': choice(0, 1)}", ["scheduler=asha"], "evaluate.every_images: None"),
        ("SPACE = {'method.gan_weight': choice(0, 1)}", ["budget=47images"], "no room for one trial of 48 images"),
    ],
)
def test_a_mistake_ends_a_sweep_before_it_begins(text, more, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        sweep([space_file(tmp_path, text), *arguments(tmp_path, *more)])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_a_trial_that_needs_more_than_the_cluster_is_refused(ray_cluster, tmp_path, capsys):
    with pytest.raises(SystemExit):
        sweep(["space=ttur", *arguments(tmp_path, "cluster.workers=64", "train.batch=64")])
    assert "cluster.workers: a trial needs 64.01 CPUs, the cluster has 4 CPUs" in capsys.readouterr().err
    assert not (tmp_path / "runs" / "s" / "trials.jsonl").exists()


def test_a_dry_run_says_what_would_run(tmp_path, capsys):
    assert sweep(["--dry-run", "space=ttur_gan_weight", "search=grid", "corner_seeds=3", *arguments(tmp_path)]) is None
    assert "grid, none scheduler, 20 trials of 48 images" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("asked", "need", "device", "cpus", "gpus", "n"),
    [(2, 1.01, "cpu", 4, 0, 2), (4, 1.01, "cpu", 4, 0, 3), (9, 1.01, "cuda", 64, 4, 4), (1, 4, "cpu", 4, 0, 1)],
)
def test_as_many_trials_run_at_a_time_as_the_cluster_has_room_for(asked, need, device, cpus, gpus, n, capsys):
    recipe = SimpleNamespace(cluster=SimpleNamespace(workers=1))
    assert slots(recipe, asked, need, device, cpus, gpus) == n
    assert (f"parallel: {n} trials at a time instead of {asked}" in capsys.readouterr().out) == (n < asked)


# Schedulers go by images, and are told again what a killed sweep knew


def record_of(tmp: Path, *scores: list[float]) -> Record:
    record = Record(tmp, {})
    for n, values in enumerate(scores):
        record.add("trial", n, values={TTUR: n}, seed=0, phase=SEARCH, run=f"s-{n:03d}")
        for i, value in enumerate(values):
            images = 16 * (i + 1)
            record.add("score", n, images=images, step=i, scores={"fd": value}, spent=images, hours=0.0)
        record.add("end", n, state=FINISHED, reason=None, spent=16 * len(values), hours=0.0)
    return record


@pytest.mark.parametrize("name", ["asha", "median"])
def test_a_scheduler_stops_what_lags_behind_the_record(name, tmp_path):
    recipe = load_recipe(arguments(tmp_path, "evaluate.every_images=16"), RECIPES, "fashion_mnist")
    space = Space("s", "?", {TTUR: choice(1, 2)}, "fd", "min", {"fd": "min"})
    record = record_of(tmp_path, [3.0, 2.0, 1.0], [3.1, 2.1, 1.1], [3.2, 2.2, 1.2])
    scheduler = tuned.scheduler_of(Sweep(space="s", scheduler=name, reduction=2), space, recipe, record)
    decisions = {}
    for who, score in (("good", 0.5), ("bad", 9.0)):
        trial = tuned.EndedTrial(who, "RUNNING")
        scheduler.on_trial_add(None, trial)
        result = {"images": 16, "score": score, "training_iteration": 1, "time_total_s": 1}
        decisions[who] = scheduler.on_trial_result(None, trial, result)
    assert decisions == {"good": "CONTINUE", "bad": "STOP"}


def test_a_population_stays_within_its_bounds():
    space = Space("s", "?", {"optim.fake.lr": loguniform(1e-4, 1e-3), TTUR: choice(1, 2)}, "fd", "min", {"fd": "min"})
    assert bounded(space, {"optim.fake.lr": 2e-3, TTUR: 2}) == {"optim.fake.lr": 1e-3, TTUR: 2}
    assert mutation(space, TTUR, 0) == [1, 2]
    draws = {mutation(space, "optim.fake.lr", seed)() for seed in range(5)}
    assert len(draws) == 5 and all(1e-4 <= value <= 1e-3 for value in draws)


# Trials


def test_trials_are_runs_below_one_and_a_failed_one_says_why(ray_cluster, store, tmp_path, capsys):
    """Two trials, one of which cannot find its data."""
    space = space_file(tmp_path, "SPACE = {'data.path': choice('shipped:fashion_mnist/shards', '/nowhere')}")
    argv = [space, "search=grid", *arguments(tmp_path, f"tracking.uri={store}", "tracking.experiment=sweep")]
    closing = sweep(argv)
    folder = tmp_path / "runs" / "s"
    assert {k: closing[k] for k in ("trials", "finished", "failed", "images")} == dict(
        trials=2, finished=1, failed=1, images=48
    )
    runs = Store(store, "sweep")
    parent = runs.find("s")
    children = {run.name: run for run in runs.children(parent)}
    assert {name: run.status for name, run in children.items()} == {"s-000": "FINISHED", "s-001": "FAILED"}
    assert "/nowhere" in children["s-001"].tags["sweep.reason"]
    assert children["s-000"].tags["sweep.path"] == "shipped:fashion_mnist/shards"
    assert {Path(path).name for path in runs.files(parent)} >= {"best.yaml", "table.md", "report.html"}
    assert parent.metrics["sweep/trials"] == 2

    score = closing["fd_fashion"]  # an earlier sweep teaches another one, where nothing but its space differs
    recipe = localized(load_recipe(arguments(tmp_path, f"tracking.uri={store}"), RECIPES, "fashion_mnist"))
    other = Space("gan", "?", {"method.gan_weight": choice(3e-3, 1e-2)}, "fd_fashion", "min", {"fd_fashion": "min"})
    learner = Sweep(space="gan", warm_start=parent.run_id)
    assert earlier_trials(learner, other, recipe) == [({"method.gan_weight": 0.003}, [score])]
    with pytest.raises(ConfigError, match="warm_start: sweep 's' has train.steps 6 and this one 7"):
        earlier_trials(learner, other, apply(recipe, {"train.steps": 7}))

    before = (folder / "trials.jsonl").read_bytes()
    assert sweep(argv)["run_id"] == closing["run_id"]  # the same arguments again find everything done
    assert (folder / "trials.jsonl").read_bytes() == before


def environment() -> dict[str, str]:
    """This process's without a cluster to join: the driver starts its own."""
    return {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}


def driver(tmp: Path, store: str, *more: str) -> subprocess.Popen:
    """jobs/sweep.py in a process and a Ray of its own."""
    command = [sys.executable, str(ROOT / "jobs" / "sweep.py"), *arguments(tmp, f"tracking.uri={store}", *more)]
    with open(tmp / f"{time.time_ns()}.log", "w") as log:
        return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment(), cwd=tmp)


def closing(tmp: Path, process: subprocess.Popen) -> dict:
    code = process.wait(timeout=1500)
    text = max(tmp.glob("*.log")).read_text()
    assert code == 0, text[-4000:]
    return json.loads(text.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.parametrize("search", ["grid", "random"])
def test_a_killed_driver_goes_on_and_ends_where_an_undisturbed_one_does(search, store, tmp_path):
    more = [f"space={ROOT / 'tune_spaces' / 'ttur.py'}", f"search={search}", f"tracking.experiment=kill-{search}"]
    more += ["trials=3"] if search == "random" else []
    whole = closing(tmp_path, driver(tmp_path, store, *more, "name=whole"))
    folder = tmp_path / "runs" / "cut"
    process = driver(tmp_path, store, *more, "name=cut")
    deadline = time.monotonic() + 600
    while not (folder / "trials.jsonl").exists() or not events(folder, "end"):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.2)
    process.send_signal(signal.SIGKILL)
    process.wait()
    runs = Store(store, f"kill-{search}")
    done = {e["trial"]: e["run_id"] for e in events(folder, "end")}
    started = {run.run_id: run.start_ms for run in runs.children(runs.find("cut"))}

    again = closing(tmp_path, driver(tmp_path, store, *more, "name=cut"))
    assert {k: again[k] for k in ("trials", "fd_fashion", "images")} == {
        k: whole[k] for k in ("trials", "fd_fashion", "images")
    }
    ends = events(folder, "end")
    assert len(ends) == len({e["trial"] for e in ends}) == whole["trials"]
    assert done.items() <= {e["trial"]: e["run_id"] for e in ends}.items()
    children = runs.children(runs.find("cut"))
    assert len(children) == whole["trials"]  # an interrupted trial goes on as the same run
    assert started.items() <= {run.run_id: run.start_ms for run in children}.items()
    for run_id in done.values():
        run = runs.find(run_id)
        assert run.tags["fewstep.opened"] == "1"  # nobody came back to a finished run

    if search == "grid":  # the best recipe alone gives the trial's score, to the last bit
        command = [sys.executable, str(ROOT / "jobs" / "distill.py"), f"recipe={again['best']}", "name=alone"]
        done = subprocess.run(command, capture_output=True, text=True, env=environment(), cwd=tmp_path, timeout=900)
        assert json.loads(done.stdout.splitlines()[-1])["student"]["fd_fashion"] == again["fd_fashion"], done.stderr


@pytest.mark.slow
def test_four_trials_at_a_time_lose_no_row_in_sqlite(tmp_path):
    """On a database that nobody made before; a quarter of a core a trial lets four fit on two."""
    store = f"sqlite:///{tmp_path / 'mlflow.db'}"
    text = "SPACE = {'optim.student.lr': loguniform(1e-5, 1e-4, points=4)}"
    more = [space_file(tmp_path, text), "search=grid", "parallel=4", "cluster.cpus_per_worker=0.25", "train.steps=20"]
    result = closing(tmp_path, driver(tmp_path, store, *more))
    assert result["finished"] == 4
    log = max(tmp_path.glob("*.log")).read_text()
    assert "database is locked" not in log and "not sent" not in log
    runs = Store(store)
    for run in runs.children(runs.find("s")):
        reports = read_reports(tmp_path / "runs" / "s" / run.name)
        assert len(reports) == 20
        for key in reports[0]["metrics"]:
            actual = [(p.step, p.value) for p in runs.history(run, key)]
            assert actual == [(r["step"], r["metrics"][key]) for r in reports if key in r["metrics"]], key


@pytest.mark.slow
def test_the_same_error_in_the_first_trials_stops_the_sweep(ray_cluster, store, tmp_path, capsys):
    """Once the reason is mended, they run again and the sweep ends."""
    lost = tmp_path / "lost"
    space = space_file(
        tmp_path, f"SPACE = {{'data.path': choice('{lost}'), 'method.gan_weight': choice(0, 1e-3, 2e-3, 3e-3)}}"
    )
    argv = [
        space,
        "search=grid",
        "parallel=1",
        *arguments(tmp_path, f"tracking.uri={store}", "tracking.experiment=alike"),
    ]
    with pytest.raises(SystemExit):
        sweep(argv)
    assert "the first 3 trials failed with the same error" in capsys.readouterr().err
    assert [e["trial"] for e in events(tmp_path / "runs" / "s", "end")] == [0, 1, 2]

    lost.symlink_to(resolve("shipped:fashion_mnist/shards"))
    closing = sweep([*argv, "retry=true"])
    assert {k: closing[k] for k in ("trials", "finished", "failed")} == dict(trials=4, finished=4, failed=0)
    assert [e["trial"] for e in events(tmp_path / "runs" / "s", "end")] == [0, 1, 2, 0, 1, 2, 3]


@pytest.mark.slow
def test_searches_learn_from_each_other_and_keep_to_their_budgets(ray_cluster, store, tmp_path, capsys):
    """Random with finalists; a Gaussian process with median stopping that starts from it; a Pareto front."""
    space = space_file(
        tmp_path,
        "OBJECTIVES = {'fd_fashion': 'min', 'diversity': 'max'}\n"
        "SPACE = {'optim.student.lr': loguniform(1e-5, 1e-3), 'method.gan_weight': choice(0, 3e-3)}",
    )
    common = [space, f"tracking.uri={store}", "tracking.experiment=searches", "evaluate.every_images=16"]
    first = sweep([*arguments(tmp_path, *common, "name=first", "search=random", "trials=3", "seeds=2", "finalists=1")])
    trials = trials_of(tmp_path / "runs" / "first").values()
    result = sorted((t for t in trials if t.seed == 0), key=lambda t: t.score("fd_fashion"))
    again = [t for t in trials if t.seed == 1]
    assert first["trials"] == 4 and [t.values for t in again] == [result[0].values]
    assert first["fd_fashion"] == pytest.approx((result[0].score("fd_fashion") + again[0].score("fd_fashion")) / 2)

    learned = ["name=second", "search=gp", "scheduler=median", "warm_start=first", "budget=200images", "parallel=1"]
    second = sweep([*arguments(tmp_path, *common, *learned)])
    assert "warm_start: 4 of the 4 trials of first lie in this space" in capsys.readouterr().out
    assert 200 - 48 < second["images"] <= 200
    assert second["finished"] + second["stopped_early"] == second["trials"]

    third = sweep([*arguments(tmp_path, *common, "name=third", "search=pareto", "trials=3")])
    trials = trials_of(tmp_path / "runs" / "third")
    scores = {n: (t.score("fd_fashion"), -t.score("diversity")) for n, t in trials.items()}
    front = {n for n, a in scores.items() if not any(b != a and b[0] <= a[0] and b[1] <= a[1] for b in scores.values())}
    written = {path.stem: read(path) for path in (tmp_path / "runs" / "third" / "front").iterdir()}
    assert third["trials"] == 3 and set(written) == {f"{n:03d}" for n in front}
    for name, recipe in written.items():
        assert validate(Recipe, recipe).optim["student"].lr == trials[int(name)].values["optim.student.lr"]


@pytest.mark.slow
def test_a_population_takes_over_weights_and_changes_rates(store, tmp_path):
    """After an exploit the optimiser's rate is the new one, and training goes on from the donor's weights."""
    text = "SPACE = {'optim.student.lr': loguniform(1e-6, 1e-3), 'optim.fake.lr': loguniform(1e-6, 1e-3)}"
    more = [space_file(tmp_path, text), "search=random", "scheduler=pbt", "trials=2", "train.steps=160"]
    more += ["train.report_every=5", "train.save_every=5", "train.keep=40", "evaluate.every_images=160"]
    more += ["optim.student.warmup_steps=0", "optim.student.decay_from=1.0", "tracking.experiment=pbt"]
    closing(tmp_path, driver(tmp_path, store, *more))
    check_population(tmp_path / "runs" / "s")


def check_population(folder: Path) -> None:
    """Every generation after the first starts at its donor's weights and trains at its own rate."""
    taken = sorted(folder.glob("s-*-g*/recipe.yaml"))
    assert taken, "no trial took over another's weights"
    for path in taken:
        recipe = validate(Recipe, read(path))
        donor = Path(recipe.resume)
        old = validate(Recipe, read(donor.parents[1] / "recipe.yaml"))
        assert recipe.optim["student"].lr != old.optim["student"].lr or recipe.optim["fake"].lr != old.optim["fake"].lr
        assert donor.parents[1].name.split("-g")[0] != recipe.name.split("-g")[0]
        reports = read_reports(path.parent)
        assert reports[0]["step"] == step_of(donor) + 5
        # five steps from the donor's weights, done here again, give the trial's weights, bit for bit
        with make_feed(recipe.data, recipe.seed) as feed:
            engine = make_engine(recipe, feed)
            engine.resume(donor)
            next(iter(engine.run()))
        assert engine.optims["student"].param_groups[0]["lr"] == recipe.optim["student"].rate_at(
            step_of(donor), recipe.train.steps
        )
        theirs = read_weights(folder / path.parent.name / "checkpoints" / f"step-{engine.step:08d}", "net.student")
        mine = dict(engine.nets["student"].named_parameters())
        assert all(torch.equal(mine[name], theirs[name]) for name in mine)
