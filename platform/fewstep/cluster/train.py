"""A recipe on Ray Train: it places, feeds and watches the workers, each of which calls run.run."""

from __future__ import annotations

import json
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from itertools import count, takewhile
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from .. import build, run, watchdog
from ..config import UserError, resolve_out, resolve_out_ref, resolve_ref
from ..engine.train import Collapsed, NoData
from ..engine.world import World
from ..folders import claim
from ..locks import LOCK, hold, locked
from ..metrics.base import Score, evaluate
from ..networks.hub import PREFIX
from ..networks.pretrained import locate
from ..recipe import Recipe
from ..students import open_student
from ..texts import first_line
from ..tracking.provenance import Provenance, provenance
from ..tracking.store import TrackingError, prepare_store, store_errors, tracking_uri
from .gauges import DriverGauges, WorkerGauges
from .session import SOURCE, Sealed, connect
from .stream import DATA_CPUS, Published, check_cpus, publish

POLL_S = 0.2
# errors that a restart would meet again: in the recipe, the data, checkpoints or numbers
FINAL = (ValueError, FloatingPointError, Collapsed)
PEER_LOST = r"(?i)gloo|nccl|connection (closed|reset|refused)|broken pipe"  # errors of a rank whose peer is gone


class Unplaceable(UserError, RuntimeError):
    """The cluster cannot place the workers; the text says which resource is missing and what to do."""


class Lost(UserError, RuntimeError):
    """Workers, a node or the controller were lost; the run can resume from its last checkpoint."""


def localized(recipe: Recipe, download: bool = True) -> Recipe:
    """Returns the recipe with absolute paths, for workers on other nodes, and with the URI of its tracking store.

    URLs stay what they are: each node has copies of its own.

    download: fetch a teacher of the hub and give its local path; else the recipe keeps the hub's name.
    """
    data = recipe.model_dump(mode="json")
    data["out"] = str(resolve_out(recipe.out))
    data["tracking"]["uri"] = tracking_uri(recipe.tracking.uri)
    if recipe.data is not None:
        data["data"]["path"] = str(resolve_ref(recipe.data.path))
    if recipe.teacher and "://" not in recipe.teacher and (download or not recipe.teacher.startswith(PREFIX)):
        data["teacher"] = str(locate(recipe.teacher))
    if recipe.storage:
        data["storage"] = str(resolve_out_ref(recipe.storage))
    if recipe.resume not in ("auto", "never"):
        data["resume"] = str(resolve_ref(recipe.resume))
    data["start"] = {role: str(resolve_ref(path)) for role, path in recipe.start.items()}
    data["evaluate"] = recipe.evaluate.resolved().model_dump(mode="json")
    return Recipe.model_validate(data)


def fit(
    recipe: Recipe,
    follow: Callable[[dict[str, Any]], None] = lambda report: None,
    *,
    tags: Mapping[str, str] = MappingProxyType({}),
    shared: bool = False,
    keep_lock: bool = False,
    notes: Sequence[str] = (),
) -> dict[str, Any]:
    """Trains a recipe on the cluster and returns the result of run.run on rank 0.

    follow: called in this process with each line of the run's reports: {step, images}, with metrics or scores.
    tags: further tags of its MLflow run. shared: other runs use the cluster, too, so the workers score samples
    themselves instead of using free resources. keep_lock: lock the run's folder until this process ends, and not only
    until the run ends. notes: lines for standard error, printed after the folder is locked.
    If workers, nodes or the controller are lost, the run restarts from its last checkpoint, at most
    `failure.max_failures` times. After SIGTERM the run finishes its step, saves and ends: `finished` is false.
    Raises Busy if another process runs the same run, Unplaceable if the cluster cannot place the workers within
    `cluster.wait_s`, ValueError for a name in the recipe that cannot be used, Stalled, Lost, and errors of a worker.
    """
    recipe = localized(recipe)
    run.check(recipe)
    claim(recipe.folder, "run")
    way_out = f"ask it to save and end with: touch {recipe.folder / watchdog.STOP}, or choose another name=..."
    if keep_lock:
        hold(recipe.folder / LOCK, way_out=way_out)
    with locked(recipe.folder / LOCK, way_out=way_out):
        for note in notes:
            print(f"note: {note}", file=sys.stderr)
        return _fit_locked(recipe, follow, tags, shared)


def _fit_locked(
    recipe: Recipe, follow: Callable[[dict[str, Any]], None], tags: Mapping[str, str], shared: bool
) -> dict[str, Any]:
    """Does the work of `fit`, with the run's folder locked."""
    c = recipe.cluster
    connect(cpus=c.workers * c.cpus_per_worker + 1)
    import ray

    device = c.device or ("cuda" if ray.cluster_resources().get("GPU", 0) else "cpu")
    d = recipe.data
    published = None if d is None else publish(d.path, d.memory_mib << 20, cache_bytes=d.cache_mib << 20)
    streaming = published is not None and published.streaming
    check_cpus(c.workers_min or c.workers, c.cpus_per_worker, streaming)
    try:  # here and once, because several workers that create one database would collide
        with store_errors(recipe.tracking.uri):
            prepare_store(recipe.tracking.uri)
    except TrackingError as error:
        if "locked" not in str(error):
            raise
        missed = f"training continues, and python jobs/track.py folder={recipe.folder} sends the missing reports"
        print(f"note: {error}; {missed}", file=sys.stderr)
    origin = provenance(SOURCE.parent, **build.fingerprints(recipe, published and published.shards))
    config = {
        "recipe": recipe.model_dump(mode="json"),
        "device": device,
        "published": published,
        "origin": (origin.tags | submission() | dict(tags), origin.files),
        "score": not shared and room_to_score(recipe, device, streaming),
    }
    gauges = DriverGauges(recipe.name, run.EVENTS | {Lost: "lost", watchdog.Stalled: "stall"})

    def tell(line: dict[str, Any]) -> None:
        gauges.follow(line)
        follow(line)

    watchdog.clear(recipe.folder)
    with gauges, Follower(recipe, tell), Terminated(recipe.folder):
        for failures in count():
            await_resources(recipe, device)
            try:
                done = _attempt(recipe, device, config)
                if not done["finished"]:
                    gauges.count("stopped")
                return done
            except Lost as lost:
                where = watchdog.stall(recipe.folder)
                if where is not None:
                    minutes = f"{recipe.failure.stall_minutes:g} minutes"
                    error = watchdog.Stalled(f"failure.stall_minutes: no step for {minutes}\n{where}")
                    record(recipe, origin, "stall", str(error))
                    raise error from None
                if failures == recipe.failure.max_failures:
                    record(recipe, origin, "lost", str(lost))
                    raise
                record(recipe, origin, "restart", str(lost))
                gauges.count("restart")


def submission() -> dict[str, str]:
    """The tag of a submitted job with its id at Ray's job server; {} for a job that was started by hand."""
    config = json.loads(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}"))
    job = config.get("metadata", {}).get("job_submission_id")
    return {"ray.submission_id": job} if job else {}


def _attempt(recipe: Recipe, device: str, config: dict[str, Any]) -> dict[str, Any]:
    """Runs one worker group. Raises Lost if a restart may help, else the worker's own exception."""
    import ray
    from ray.train import ControllerError, FailureConfig, RunConfig, ScalingConfig, WorkerGroupError

    from .trainer import OnWorkers, Trainer, torch_config

    c = recipe.cluster
    trainer = Trainer(
        _worker,
        train_loop_config={"sealed": Sealed(config)},
        torch_config=torch_config(backend="nccl" if device == "cuda" else "gloo", timeout_s=600),
        scaling_config=ScalingConfig(
            num_workers=c.workers if c.workers_min is None else (c.workers_min, c.workers),
            use_gpu=device == "cuda",
            resources_per_worker={"CPU": c.cpus_per_worker, **({"GPU": 1} if device == "cuda" else {})},
        ),
        run_config=RunConfig(
            # a new name each time: the engine resumes from its own checkpoints, and Ray must not do so
            name=f"{recipe.name}-{time.time_ns():x}",
            storage_path=str(recipe.folder / "ray"),
            # `_fit_locked` decides about restarts, as it can tell a lost worker from an error that would come again
            failure_config=FailureConfig(max_failures=0, max_preemption_failures=0, controller_failure_limit=3),
            callbacks=[OnWorkers(watchdog.on_sigterm)],
        ),
    )
    try:
        return trainer.fit().return_value
    except WorkerGroupError as error:
        raise _cause(error.worker_failures) from error
    except ControllerError as error:
        raise Lost(f"cluster: Ray Train's controller failed: {first_line(error.controller_failure)}") from error
    except ray.exceptions.RayActorError as error:
        raise Lost(f"cluster: Ray Train's controller died: {first_line(error)}") from error


def _cause(failures: Mapping[int, Exception]) -> Exception:
    """Returns the exception for the failures by rank: Lost if a restart may help, else the error itself.

    When one rank fails, the others fail, too, in the collective that it left. Their errors do not explain the failure.
    """
    from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError

    causes = {rank: getattr(error, "cause", None) or error for rank, error in sorted(failures.items())}
    own = {rank: error for rank, error in causes.items() if not re.search(PEER_LOST, str(error))}
    for error in own.values():
        if isinstance(error, FINAL):
            return error
    died = {rank: error for rank, error in failures.items() if isinstance(error, WorkerHealthCheckFailedError)}
    for rank, error in (died or ({} if own else causes)).items():
        return Lost(f"cluster: rank {rank} of the workers was lost: {first_line(error)}")
    return next(iter(own.values()))


def record(recipe: Recipe, origin: Provenance, kind: str, reason: str) -> None:
    """Records an event at the last report of a run whose workers are gone."""
    done = run.read_reports(recipe.folder)
    step, images = (done[-1]["step"], done[-1]["images"]) if done else (0, 0)
    with run.open_tracker(recipe, origin) as tracker:
        tracker.event(kind, step, images, reason)
        tracker.finish("FAILED", timeout_s=10)


class Terminated:
    """Context in which SIGTERM asks the run in `folder` to finish its step, save and end."""

    def __init__(self, folder: Path):
        self.folder = folder

    def __enter__(self) -> None:
        self.main = threading.current_thread() is threading.main_thread()
        if self.main:
            self.before = signal.signal(signal.SIGTERM, self._request_stop)

    def _request_stop(self, *_: object) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / watchdog.STOP).touch()

    def __exit__(self, *_: object) -> None:
        if self.main:
            signal.signal(signal.SIGTERM, self.before)


def await_resources(recipe: Recipe, device: str) -> None:
    """Waits until the resources of the workers are free. Raises Unplaceable after `cluster.wait_s`."""
    import ray

    c, workers = recipe.cluster, recipe.cluster.workers_min or recipe.cluster.workers
    wanted = {"CPU": workers * c.cpus_per_worker} | ({"GPU": workers} if device == "cuda" else {})
    deadline = time.monotonic() + c.wait_s
    while True:
        free = ray.available_resources()
        short = [f"{n:g} {k} and {free.get(k, 0):g} are free" for k, n in wanted.items() if free.get(k, 0) < n - 1e-9]
        if not short:
            return
        if time.monotonic() > deadline:
            raise Unplaceable(
                f"cluster.workers: {workers} workers need {'; '.join(short)} after {c.wait_s:g} s. Use fewer "
                "workers or a smaller cluster.cpus_per_worker, free the cluster, or add nodes (ray start --address=...)"
            )
        time.sleep(POLL_S)


def _worker(sealed: dict[str, Sealed]) -> dict[str, Any]:
    """The function that every Ray Train worker runs."""
    from ray.train import get_preemption_info

    config = sealed["sealed"].value
    recipe = Recipe.model_validate(config["recipe"])
    if config["device"] == "cuda":
        from ray.train.torch import get_device

        device = get_device()
    else:
        device = torch.device("cpu")
    published: Published | None = config["published"]
    d = recipe.data
    if d is None:
        feed = NoData()
    else:
        captions = "caption" in recipe.method.needs
        feed = published.open(seed=recipe.seed, flip=d.flip, captions=captions, max_corrupt=d.max_corrupt)
    gauges = WorkerGauges(recipe.name)
    services = run.Services(
        preempted=lambda: get_preemption_info() is not None,
        score=ScoringTask(recipe, config["device"]) if config["score"] else None,
        report=gauges,
    )
    with gauges, feed:
        world = World.current(device, recipe.cluster)
        return run.run(recipe, feed, world, Provenance(*config["origin"]), services)


def room_to_score(recipe: Recipe, device: str, streaming: bool) -> bool:
    """True if the cluster has resources for one more worker, so that training need not stop for scores."""
    import ray

    c, total = recipe.cluster, ray.cluster_resources()
    cpus = (c.workers + 1) * c.cpus_per_worker + (DATA_CPUS if streaming else 0)
    return total.get("CPU", 0) >= cpus and (device != "cuda" or total.get("GPU", 0) > c.workers)


class ScoringTask:
    """Scores checkpoints in a Ray task, which takes the resources of one more worker."""

    def __init__(self, recipe: Recipe, device: str):
        self.recipe, self.device = recipe, device

    def __call__(self, checkpoint: str) -> list[Score]:
        import ray

        task = ray.remote(num_cpus=self.recipe.cluster.cpus_per_worker, num_gpus=int(self.device == "cuda"))(_score)
        return ray.get(task.remote(checkpoint, self.recipe.model_dump(mode="json"), self.device))


def _score(checkpoint: str, recipe: dict[str, Any], device: str) -> list[Score]:
    """Returns the scores of a checkpoint's student, from the same samples that its run would draw."""
    recipe = Recipe.model_validate(recipe)
    torch.set_num_threads(recipe.cluster.threads)
    e, world = recipe.evaluate, World(device=torch.device(device))
    student = open_student(recipe.folder, checkpoint=checkpoint)
    student.net.to(world.device)
    samples = build.make_samples(student.sampler, e.images, recipe.seed, e.batch, world)
    return evaluate(build.make_metrics(recipe, world.device), samples)


class Follower:
    """A thread of the driver that passes new reports from the run's folder to `follow`."""

    def __init__(self, recipe: Recipe, follow: Callable[[dict[str, Any]], None]):
        self.folder, self.follow = recipe.folder, follow
        self.passed: list[dict[str, Any]] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._poll, name="fewstep-follow", daemon=True)

    def _forward_reports(self) -> None:
        lines = run.report_lines(self.folder)
        known = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(self.passed, lines, strict=False)))
        for report in lines[known:]:
            self.follow(report)
        self.passed = lines

    def _poll(self) -> None:
        while not self._stop.wait(POLL_S):
            self._forward_reports()

    def __enter__(self) -> Follower:
        self.passed = run.report_lines(self.folder)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self._forward_reports()
        sys.stdout.flush()
