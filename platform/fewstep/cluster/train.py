"""A recipe on Ray Train: the workers are placed, fed and watched here; what they do is run.run."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import torch

from .. import build, run
from ..config import resolve
from ..engine.world import World
from ..networks.pretrained import locate
from ..recipe import Recipe
from ..tracking.provenance import Provenance, provenance
from ..tracking.store import prepare_store, tracking_uri
from .session import SOURCE, connect, home
from .stream import Published, check_cpus, publish

POLL_S = 0.2


class Unplaceable(RuntimeError):
    """The cluster cannot place the workers; the text says what is short and how to give it."""


def localized(recipe: Recipe) -> Recipe:
    """The recipe with every path absolute, for workers that run elsewhere, and with its tracking store named."""
    base = home()
    data = recipe.model_dump(mode="json")
    data["out"] = str(base / recipe.out)
    data["tracking"]["uri"] = tracking_uri(recipe.tracking.uri, base)
    data["data"]["path"] = str(resolve(recipe.data.path))
    if recipe.teacher:
        data["teacher"] = str(locate(recipe.teacher))
    data["start"] = {role: str(resolve(path)) for role, path in recipe.start.items()}
    for key in ("features", "reference", "inception", "inception_reference"):
        if data["evaluate"][key]:
            data["evaluate"][key] = str(resolve(data["evaluate"][key]))
    return Recipe.model_validate(data)


def fit(recipe: Recipe, follow: Callable[[dict[str, Any]], None] = lambda report: None) -> dict[str, Any]:
    """Trains a recipe on the cluster and returns what run.run returned on rank 0.

    follow: called in this process with each report {step, images, metrics}, soon after it was made.
    Raises Unplaceable when the cluster lacks the workers after `cluster.wait_s`, ValueError for what the recipe names
    and cannot be used, and whatever a worker raised.
    """
    recipe = localized(recipe)
    run.check(recipe)
    c = recipe.cluster
    connect(cpus=c.workers * c.cpus_per_worker + 1)
    import ray
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    device = c.device or ("cuda" if ray.cluster_resources().get("GPU", 0) else "cpu")
    published = publish(recipe.data.path, recipe.data.memory_mib << 20)
    check_cpus(c.workers, c.cpus_per_worker, published.streaming)
    await_resources(recipe, device)
    prepare_store(recipe.tracking.uri)  # once, here: several workers creating one database would collide
    origin = provenance(SOURCE.parent, **build.fingerprints(recipe, published.shards))
    os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", str(int(c.wait_s)))
    trainer = TorchTrainer(
        _worker,
        train_loop_config={
            "recipe": recipe.model_dump(mode="json"),
            "device": device,
            "published": published,
            "origin": (origin.tags, origin.files),
        },
        torch_config=TorchConfig(backend="nccl" if device == "cuda" else "gloo", timeout_s=600),
        scaling_config=ScalingConfig(
            num_workers=c.workers,
            use_gpu=device == "cuda",
            resources_per_worker={"CPU": c.cpus_per_worker, **({"GPU": 1} if device == "cuda" else {})},
        ),
        run_config=RunConfig(
            # a new name each time: checkpoints are the engine's, and Ray's own resume must not interfere
            name=f"{recipe.name}-{time.time_ns():x}",
            storage_path=str(recipe.folder / "ray"),
            failure_config=FailureConfig(max_failures=c.max_failures, controller_failure_limit=3),
        ),
    )
    with Follower(recipe, follow):
        return _unwrapped(trainer.fit)


def _unwrapped(fit: Callable[[], Any]) -> dict[str, Any]:
    """The worker's own exception instead of Ray Train's report of it: the text that names the field is in there."""
    from ray.train import WorkerGroupError

    try:
        return fit().return_value
    except WorkerGroupError as error:
        rank, cause = min(error.worker_failures.items())
        raise getattr(cause, "cause", None) or cause from error


def await_resources(recipe: Recipe, device: str) -> None:
    """Waits until what the workers ask for is free. Raises Unplaceable after `cluster.wait_s`, saying what is short."""
    import ray

    c = recipe.cluster
    wanted = {"CPU": c.workers * c.cpus_per_worker} | ({"GPU": c.workers} if device == "cuda" else {})
    deadline = time.monotonic() + c.wait_s
    while True:
        free = ray.available_resources()
        short = [f"{n:g} {k} and {free.get(k, 0):g} are free" for k, n in wanted.items() if free.get(k, 0) < n - 1e-9]
        if not short:
            return
        if time.monotonic() > deadline:
            raise Unplaceable(
                f"cluster.workers: {c.workers} workers need {'; '.join(short)}, waited {c.wait_s:g} s. Use fewer "
                "workers or a smaller cluster.cpus_per_worker, free the cluster, or add nodes (ray start --address=...)"
            )
        time.sleep(POLL_S)


def _worker(config: dict[str, Any]) -> dict[str, Any]:
    """What every Ray Train worker runs."""
    recipe = Recipe.model_validate(config["recipe"])
    if config["device"] == "cuda":
        from ray.train.torch import get_device

        device = get_device()
    else:
        device = torch.device("cpu")
    published: Published = config["published"]
    d = recipe.data
    with published.open(seed=recipe.seed, flip=d.flip, max_corrupt=d.max_corrupt) as feed:
        world = World.current(device, recipe.cluster.placement)
        return run.run(recipe, feed, world, Provenance(*config["origin"]))


class Follower:
    """Passes a run's reports on as they appear in its folder, from a thread of the driver."""

    def __init__(self, recipe: Recipe, follow: Callable[[dict[str, Any]], None]):
        self.folder, self.follow, self.seen = recipe.folder, follow, -1
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._work, name="fewstep-follow", daemon=True)

    def _pass_on(self) -> None:
        for report in run.read_reports(self.folder):
            if report["step"] > self.seen:
                self.seen = report["step"]
                self.follow(report)

    def _work(self) -> None:
        while not self._stop.wait(POLL_S):
            self._pass_on()

    def __enter__(self) -> Follower:
        for report in run.read_reports(self.folder):
            self.seen = report["step"]
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self._pass_on()
        sys.stdout.flush()
