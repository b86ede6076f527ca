"""Every fault met on purpose: what it does to a run on Ray, and that the run ends as if nothing had happened.

`make faults` runs all of these, and the quicker faults of other files, and prints a line for each.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from demo import ROOT, arguments, free_port, listening, losses, mlflow_history, recipe
from ray import cloudpickle

from fewstep.cluster import train
from fewstep.cluster.train import Lost, fit
from fewstep.engine.checkpoint import read_weights
from fewstep.engine.folder import checkpoints, newest, step_of
from fewstep.engine.train import NonFinite
from fewstep.run import read_reports
from fewstep.watchdog import Stalled

pytestmark = [pytest.mark.fault, pytest.mark.slow]  # a run on Ray takes half a minute
STEPS, SAVE = 24, 4
TWO = ("cluster.workers=2", "cluster.placement=shard")
SHORT = (f"train.steps={STEPS}", f"train.save_every={SAVE}", "train.report_every=2", "cluster.wait_s=30", *TWO)
cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers cannot import a test's module


@pytest.fixture(scope="module")
def whole(ray_cluster, store, tmp_path_factory) -> Path:
    """The folder of a run that nothing disturbs, on two sharded workers: what every disturbed one has to equal."""
    tmp = tmp_path_factory.mktemp("whole")
    fit(recipe(tmp, "name=whole", f"tracking.uri={store}", *SHORT))
    return tmp / "runs" / "whole"


def final(folder: Path) -> dict[str, torch.Tensor]:
    """All of a run's last checkpoint: weights, averages and the optimisers' moments."""
    path = newest(folder / "checkpoints")
    assert step_of(path) == STEPS
    return read_weights(path)


def assert_as_if_nothing_happened(folder: Path, whole: Path, store: str, run_id: str) -> None:
    """Bit for bit the same state and losses; one curve in MLflow; nothing half-written is left."""
    ours, theirs = final(folder), final(whole)
    assert ours.keys() == theirs.keys()
    assert not [name for name in ours if not torch.equal(ours[name], theirs[name])]
    assert losses(folder) == losses(whole)
    expected = [(line["step"], line["metrics"]["student/match"]) for line in read_reports(whole)]
    assert mlflow_history(store, run_id, "student/match") == expected
    assert [path.name for path in (folder / "checkpoints").iterdir() if path.name.startswith(".")] == []


def processes(name: str) -> list[psutil.Process]:
    """The processes of this session's cluster, and of no other, whose title has the name."""
    result = []
    for process in psutil.Process().children(recursive=True):
        title = " ".join(process.cmdline())
        if title.startswith("ray::") and name in title:
            result.append(process)
    return result


class Killer:
    """Follows a run; at the first report from `step` on it kills what `victims` finds, with -9, once."""

    def __init__(self, step: int, victims: Callable[[], list[psutil.Process]]):
        self.step, self.victims = step, victims
        self.killed: list[str] = []
        self.killed_at = self.back_s = self.steps_lost = None

    def __call__(self, line: dict[str, Any]) -> None:
        if "metrics" not in line:
            return
        if self.killed and self.back_s is None:
            self.back_s = time.monotonic() - self.killed_at
        if not self.killed and line["step"] >= self.step:
            for process in self.victims():
                self.killed.append(" ".join(process.cmdline()))
                process.kill()
            self.killed_at = time.monotonic()


def workers(count: int) -> Callable[[], list[psutil.Process]]:
    return lambda: processes("RayTrainWorker")[:count]


@pytest.mark.parametrize(
    ("name", "victims"),
    [
        ("one_worker", workers(1)),
        pytest.param("every_worker", workers(2)),
        pytest.param("the_controller", lambda: processes("TrainController")),
    ],
)
def test_kill_9_of(ray_cluster, store, whole, tmp_path, record_property, name, victims):
    killer = Killer(10, victims)
    result = fit(recipe(tmp_path, f"name={name}", f"tracking.uri={store}", *SHORT), killer)
    assert len(killer.killed) == (2 if name == "every_worker" else 1), killer.killed
    assert_as_if_nothing_happened(tmp_path / "runs" / name, whole, store, result["run_id"])
    assert len(mlflow_history(store, result["run_id"], "event/restart")) == 1
    record_property("from kill to first new report", f"{killer.back_s:.1f} s")


def test_failures_beyond_the_limit_end_the_run_with_the_reason_and_the_same_words_go_on(
    ray_cluster, store, whole, tmp_path
):
    small = [f"tracking.uri={store}", *SHORT]
    with pytest.raises(Lost, match=r"cluster: rank \d of the workers was lost: .+"):
        fit(recipe(tmp_path, "name=again", *small, "failure.max_failures=0"), Killer(10, workers(1)))
    result = fit(recipe(tmp_path, "name=again", *small))
    assert_as_if_nothing_happened(tmp_path / "runs" / "again", whole, store, result["run_id"])
    assert len(mlflow_history(store, result["run_id"], "event/lost")) == 1


def test_sigterm_to_one_worker_saves_on_all_and_the_same_words_go_on(ray_cluster, store, whole, tmp_path):
    small = ["name=notice", f"tracking.uri={store}", *SHORT]
    asked = []

    def follow(line: dict[str, Any]) -> None:
        if line["step"] >= 6 and not asked:
            asked.append(processes("RayTrainWorker")[0])
            asked[0].terminate()

    result = fit(recipe(tmp_path, *small), follow)
    assert result["finished"] is False and 6 < result["step"] < STEPS
    saved = newest(tmp_path / "runs" / "notice" / "checkpoints")
    assert step_of(saved) == result["step"]
    result = fit(recipe(tmp_path, *small))
    assert_same_end(tmp_path / "runs" / "notice", whole)
    assert len(mlflow_history(store, result["run_id"], "event/stopped")) == 1


# What is changed in the workers' own code, before they run. Each fault happens once: a file says that it did.


def workers_that(monkeypatch, change: Callable[[], None]) -> None:
    """Every worker calls `change` before it starts."""
    real = train._worker

    def changed(config: dict[str, Any]) -> dict[str, Any]:
        change()
        return real(config)

    monkeypatch.setattr(train, "_worker", changed)


def once(marker: Path) -> bool:
    """True for the first who asks."""
    try:
        marker.touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


@pytest.mark.parametrize("point", ["before_its_file", "before_the_manifest", "before_the_rename"])
def test_kill_9_of_the_worker_that_writes_a_checkpoint(ray_cluster, store, whole, tmp_path, monkeypatch, point):
    marker = tmp_path / "killed"

    def change() -> None:
        from fewstep.engine.checkpoint import Writer
        from fewstep.storage.place import Place

        owner, name = {
            "before_its_file": (Writer, "write_data"),
            "before_the_manifest": (Writer, "finish"),
            "before_the_rename": (Place, "rename"),
        }[point]
        real = getattr(owner, name)

        def dies(self, *args, **kwargs):
            target = args[0] if owner is Place else self.target
            if f"step-{3 * SAVE:08d}" in str(target) and once(marker):
                os.kill(os.getpid(), signal.SIGKILL)
            return real(self, *args, **kwargs)

        setattr(owner, name, dies)

    workers_that(monkeypatch, change)
    result = fit(recipe(tmp_path, "name=writer", f"tracking.uri={store}", *SHORT))
    assert marker.exists()
    assert_as_if_nothing_happened(tmp_path / "runs" / "writer", whole, store, result["run_id"])


def phase_with(monkeypatch, rank: int, act: Callable[[Any, int], Any]) -> None:
    """On one rank, what the student's loss returns goes through act(loss terms, step)."""

    def change() -> None:
        from fewstep.methods.dmd2 import DMD2

        real = DMD2.student_loss

        def changed(self, nets, batch):
            terms, health = real(self, nets, batch)
            if torch.distributed.get_rank() == rank:
                terms = act(terms, batch.draws.step)
            return terms, health

        DMD2.student_loss = changed

    workers_that(monkeypatch, change)


@pytest.mark.parametrize(
    "bad",
    [pytest.param(float("nan"), id="a_nan"), pytest.param(1e30, id="a_gradient_of_1e30")],
)
def test_in_one_ranks_loss_stops_all_ranks_before_any_weight_moves(ray_cluster, store, tmp_path, monkeypatch, bad):
    def act(terms, step):
        return {"match": terms["match"] * (bad if step == 9 else 1.0)} | {
            k: v for k, v in terms.items() if k != "match"
        }

    phase_with(monkeypatch, 1, act)
    start = time.monotonic()
    with pytest.raises(NonFinite, match=r"step 9, phase student: .* not finite.*Lower optim.student.lr"):
        fit(recipe(tmp_path, "name=bad", f"tracking.uri={store}", *SHORT))
    assert time.monotonic() - start < 300
    folder = tmp_path / "runs" / "bad"
    path = newest(folder / "checkpoints")
    assert step_of(path) == 8  # the last one before it
    assert all(value.isfinite().all() for value in read_weights(path).values())


def test_a_rank_ten_times_slower_is_waited_for(ray_cluster, store, whole, tmp_path, monkeypatch):
    def act(terms, step):
        time.sleep(1.0)
        return terms

    phase_with(monkeypatch, 1, act)
    result = fit(recipe(tmp_path, "name=slow", f"tracking.uri={store}", *SHORT))
    assert_as_if_nothing_happened(tmp_path / "runs" / "slow", whole, store, result["run_id"])


def test_a_rank_that_never_comes_back_ends_the_run_and_is_named(ray_cluster, store, tmp_path, monkeypatch):
    def act(terms, step):
        if step == 9:
            time.sleep(3600)
        return terms

    phase_with(monkeypatch, 1, act)
    start = time.monotonic()
    with pytest.raises(Stalled) as stalled:
        fit(recipe(tmp_path, "name=stall", f"tracking.uri={store}", *SHORT, "failure.stall_minutes=0.25"))
    text = str(stalled.value)
    assert "failure.stall_minutes: no step for 0.25 minutes" in text
    assert "rank 0" in text and "rank 1" in text and "step 9, phase student" in text
    stack = json.loads((tmp_path / "runs" / "stall" / "stall" / "rank-00001.json").read_text())["stack"]
    assert any("time.sleep(3600)" in line for line in stack)
    assert time.monotonic() - start < 300


# Disks


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Path]:
    """A file system of its own, of 96 MiB: three checkpoints. Needs the right to mount, as root in a container has."""
    folder = tmp_path / "small"
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=96m", "tmpfs", str(folder)], check=True)
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_disk_that_fills_up_ends_the_run_on_all_ranks_and_leaves_the_checkpoint_before(
    ray_cluster, store, whole, tmp_path, small_disk
):
    small = ["name=full", f"tracking.uri={store}", f"storage={small_disk}", *SHORT]

    def fill(line: dict[str, Any]) -> None:
        if line["step"] == 10:
            (small_disk / "ballast").write_bytes(b"0" * (os.statvfs(small_disk).f_bavail * 4096 - (1 << 20)))

    with pytest.raises(ValueError, match=r"step-000000\d\d.*No space left"):
        fit(recipe(tmp_path, *small), fill)
    kept = checkpoints(small_disk / "full")
    assert kept and step_of(kept[-1]) in (8, 12)
    (small_disk / "ballast").unlink()
    result = fit(recipe(tmp_path, *small))
    path = newest(small_disk / "full")
    theirs = final(whole)
    assert all(torch.equal(value, theirs[name]) for name, value in read_weights(path).items())
    assert len(mlflow_history(store, result["run_id"], "event/not_saved")) == 1


# The rest of what a run stands on


def test_kill_9_of_the_mlflow_server(ray_cluster, whole, tmp_path):
    """Training goes on without it, and what it missed is sent when it is back."""
    uri, port = f"sqlite:///{tmp_path / 'server.db'}", free_port()
    server = serve(uri, port, tmp_path)
    killed: list[float] = []

    def follow(line: dict[str, Any]) -> None:
        nonlocal server
        if not killed and line["step"] >= 6:
            server.kill()
            server.wait()
            killed.append(time.monotonic())
        if killed and line["step"] >= 16 and server.poll() is not None:
            server = serve(uri, port, tmp_path)

    try:
        result = fit(recipe(tmp_path, "name=server", f"tracking.uri=http://127.0.0.1:{port}", *SHORT), follow)
        assert killed
        assert_as_if_nothing_happened(tmp_path / "runs" / "server", whole, uri, result["run_id"])
    finally:
        end(server)


def serve(uri: str, port: int, tmp_path: Path) -> subprocess.Popen:
    """An MLflow server that answers; end it with `end`."""
    import urllib.request

    command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", uri, "--workers", "1"]
    command += ["--artifacts-destination", str(tmp_path / "artifacts"), "--host", "127.0.0.1", "--port", str(port)]
    environment = os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    server = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    for _ in range(240):
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1)
            return server
        except OSError:
            time.sleep(0.5)
    raise TimeoutError(f"no MLflow server on port {port} after two minutes")


def end(server: subprocess.Popen) -> None:
    for child in psutil.Process(server.pid).children(recursive=True) if server.poll() is None else []:
        child.kill()
    server.kill()
    server.wait()


def submit(tmp_path: Path, *more: str) -> subprocess.Popen:
    """jobs/distill.py as a process of its own, with a cluster of its own."""
    command = [sys.executable, str(ROOT / "jobs" / "distill.py"), *arguments(tmp_path, *more)]
    environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True, cwd=tmp_path)


def until_step(folder: Path, step: int, driver: subprocess.Popen) -> None:
    deadline = time.monotonic() + 600
    while not any(line["step"] >= step for line in read_reports(folder)):
        assert driver.poll() is None, driver.stdout.read()
        assert time.monotonic() < deadline, f"no step {step} within ten minutes"
        time.sleep(0.05)


def test_kill_9_of_the_driver_and_the_same_words_again(store, whole, tmp_path):
    small = ["name=driver", f"tracking.uri={store}", *SHORT]
    driver = submit(tmp_path, *small)
    until_step(tmp_path / "runs" / "driver", 10, driver)
    driver.kill()
    driver.wait()
    driver = submit(tmp_path, *small)
    out, _ = driver.communicate(timeout=300)
    closing = json.loads(out.splitlines()[-1])
    assert_as_if_nothing_happened(tmp_path / "runs" / "driver", whole, store, closing["run_id"])


def test_sigterm_saves_after_the_step_at_hand_and_exits_0_and_the_same_words_go_on(store, whole, tmp_path):
    small = ["name=term", f"tracking.uri={store}", *SHORT]
    driver = submit(tmp_path, *small)
    until_step(tmp_path / "runs" / "term", 6, driver)
    driver.terminate()
    out, _ = driver.communicate(timeout=120)
    assert driver.returncode == 0, out
    closing = json.loads(out.splitlines()[-1])
    assert closing["finished"] is False and 6 < closing["step"] < STEPS
    saved = newest(tmp_path / "runs" / "term" / "checkpoints")
    assert step_of(saved) == closing["step"]
    assert "name=term" in closing["again"]
    driver = submit(tmp_path, *small)
    out, _ = driver.communicate(timeout=300)
    assert_same_end(tmp_path / "runs" / "term", whole)


def assert_same_end(folder: Path, whole: Path) -> None:
    """Bit for bit the same state at the end."""
    ours, theirs = final(folder), final(whole)
    assert ours.keys() == theirs.keys()
    assert not [name for name in ours if not torch.equal(ours[name], theirs[name])]


# Other users of the machine, and other machines

ATTEMPTS = """
import json, os, socket, sys, urllib.error, urllib.request
from concurrent.futures import ThreadPoolExecutor
import grpc, ray
from fewstep.cluster.session import asks_for_token

host, ports, folder, marker, user = json.loads(sys.argv[1])

def called(address, method):
    with grpc.insecure_channel(address) as channel:
        try:
            channel.unary_unary(f"/ray.rpc.{method}")(b"", timeout=5)
        except grpc.RpcError as error:
            return error.code().name
    return "answered"

def posted(address, path):
    body = json.dumps({"entrypoint": f"touch {marker}"}).encode()
    request = urllib.request.Request(f"http://{address}{path}", body, {"Content-Type": "application/json"})
    try:
        return urllib.request.urlopen(request, timeout=5).status
    except urllib.error.HTTPError as error:
        return error.code
    except Exception:
        return 0

def reached(port):
    try:
        socket.create_connection((host, port), 5).close()
    except OSError as error:
        return error.strerror

def entered(path):
    try:
        return os.listdir(path)
    except OSError as error:
        return error.strerror

METHODS = "NodeInfoGcsService/CheckAlive", "NodeManagerService/RequestWorkerLease", "CoreWorkerService/PushTask"
PATHS = "/api/jobs/", "/api/job_agent/jobs/", "/get_or_create_runtime_env"
result = {"calls": {}, "posts": {}, "joined": {}}
gcs = next(port for process, port in ports if process == "gcs_server")
# else Ray asks this machine's other address in its place, where nothing listens
ray._private.services.resolve_ip_for_localhost = lambda host: host
for token in ("", "0" * 64) if reached(gcs) is None else ():
    os.environ |= {"RAY_AUTH_MODE": "token" if token else "disabled", "RAY_AUTH_TOKEN": token}
    ray._raylet.Config.initialize("")
    try:
        ray.init(address=f"{host}:{gcs}", log_to_driver=False)
        ray.get(ray.remote(lambda: os.system(f"touch {marker}")).remote())
        result["joined"][token] = "a task ran"
    except BaseException as error:
        result["joined"][token] = f"{type(error).__name__}: {error}; {error.__cause__}"
if user is not None:  # who may not be allowed to read Python's own files, from here on
    os.setgroups([])
    os.setgid(user)
    os.setuid(user)
result["folder"] = entered(folder)
def tried(port):
    if error := reached(port):
        return [error], None
    where = f"{host}:{port}"
    return [called(where, method) for method in METHODS], [posted(where, path) for path in PATHS]

numbers = [port for process, port in ports]
with ThreadPoolExecutor(8) as pool:  # a port that does not answer takes 15 s
    for port, (calls, posts) in zip(numbers, pool.map(tried, numbers)):
        result["calls"][port] = calls
        if posts is not None:
            result["posts"][port] = posts
print(json.dumps(result))
"""


@pytest.fixture(scope="module")
def plain_run(store, tmp_path_factory) -> Iterator[list[tuple[str, str, int]]]:
    """The sockets on which the processes of a plain run with two workers listen, while it trains."""
    tmp = tmp_path_factory.mktemp("plain")
    driver = submit(tmp, "name=plain", f"tracking.uri={store}", *SHORT, "train.steps=100000", "train.save_every=100000")
    try:
        until_step(tmp / "runs" / "plain", 4, driver)
        yield listening(psutil.Process(driver.pid))
    finally:
        children = psutil.Process(driver.pid).children(recursive=True) if driver.poll() is None else []
        driver.kill()
        driver.wait()
        psutil.wait_procs(children, timeout=30)


def attempts(
    sockets: list[tuple[str, str, int]], host: str, marker: Path, user: int | None, before: tuple = ()
) -> dict:
    """The outcome of everything that somebody without the token can try."""
    folder = f"/tmp/fewstep-{os.getuid()}"
    arguments = json.dumps([host, [(process, port) for process, _, port in sockets], folder, str(marker), user])
    environment = {key: value for key, value in os.environ.items() if not key.startswith("RAY_AUTH")}
    environment["RAY_NUM_REDIS_GET_RETRIES"] = "2"  # Ray repeats a refused connection 20 times, for minutes
    done = subprocess.run(
        [*before, sys.executable, "-c", ATTEMPTS, arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=580,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_another_user_of_the_machine_runs_nothing(plain_run, tmp_path_factory):
    """Needs the right to become another user, as root has."""
    marker = Path(tempfile.mkdtemp(dir="/tmp", prefix="marker")) / "ran"
    marker.parent.chmod(0o777)
    try:
        result = attempts(plain_run, "127.0.0.1", marker, user=65534)
        assert not marker.exists()
    finally:
        shutil.rmtree(marker.parent)
    assert result["folder"] == "Permission denied"
    asked = {process for process, _, port in plain_run if "UNAUTHENTICATED" in result["calls"][str(port)]}
    assert {"gcs_server", "raylet", "ray::RayTrainWorker", plain_run[0][0]} <= {name[:19] for name in asked}
    answered = [process for process, _, port in plain_run if "answered" in result["calls"][str(port)]]
    assert answered == []
    statuses = {status for of_port in result["posts"].values() for status in of_port}
    assert 401 in statuses and 200 not in statuses
    assert ["InvalidAuthToken" in error for error in result["joined"].values()] == [True, True], result["joined"]


def test_another_machine_of_the_network_reaches_nothing(plain_run, tmp_path):
    """In place of that machine, a network namespace of its own. Needs the right to make one, as root has."""
    assert {address for _, address, _ in plain_run} == {"127.0.0.1"}
    name, ours, theirs = f"fw{os.getpid()}", "10.199.77.1", "10.199.77.2"
    inside = ("ip", "netns", "exec", name)
    made = [
        f"ip netns add {name}",
        f"ip link add {name}a type veth peer name {name}b netns {name}",
        f"ip addr add {ours}/30 dev {name}a",
        f"ip link set {name}a up",
        f"ip -n {name} addr add {theirs}/30 dev {name}b",
        f"ip -n {name} link set {name}b up",
        f"ip -n {name} link set lo up",
    ]
    try:
        for command in made:
            subprocess.run(command.split(), check=True)
        with socket.create_server((ours, 0)) as door:  # it does reach us
            knock = f"import socket; socket.create_connection(('{ours}', {door.getsockname()[1]}), 5)"
            subprocess.run([*inside, sys.executable, "-c", knock], check=True)
        result = attempts(plain_run, ours, tmp_path / "ran", None, inside)
    finally:
        subprocess.run(["ip", "netns", "delete", name], check=False)
    assert set(map(tuple, result["calls"].values())) == {("Connection refused",)}
    assert result["joined"] == {} and not (tmp_path / "ran").exists()


def test_an_elastic_run_goes_on_with_one_worker_when_a_node_dies(store, whole, tmp_path):
    """The same batches in the same order; sums in another order, hence losses that agree and are not equal."""
    script = Path(__file__).with_name("elastic.py")
    environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    command = [sys.executable, str(script), str(tmp_path), store]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    closing = json.loads(done.stdout.splitlines()[-1])
    assert closing["finished"] and closing["step"] == STEPS and closing["gone"]
    ours, theirs = losses(tmp_path / "runs" / "elastic"), losses(whole)
    assert ours[:4] == theirs[:4]  # up to the checkpoint before the loss: the same run
    for a, b in zip(ours, theirs, strict=True):
        assert a["critic/denoise"] == pytest.approx(b["critic/denoise"], rel=2e-2)
    assert mlflow_history(store, closing["run_id"], "event/restart")
