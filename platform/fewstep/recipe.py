"""Recipe: everything that decides a run, checked as a whole before anything starts."""

from __future__ import annotations

import hashlib
import json
import time
from functools import reduce
from operator import or_
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from .config import ConfigError, Strict, nearest, override, read, resolve, validate, words
from .engine.optim import Optim
from .engine.train import Train
from .methods import METHODS
from .networks.pretrained import Network

AnyMethod = Annotated[reduce(or_, METHODS.values()), Field(discriminator="name")]


class Data(Strict):
    """Real images."""

    path: str
    """Folder of shards written by jobs/prepare.py; shipped:fashion_mnist/shards is embedded."""
    flip: bool = False
    """Mirror half of the images."""
    max_corrupt: Annotated[float, Field(ge=0, le=1)] = 0.001
    """Share of rows that may be undecodable before the run stops."""
    memory_mib: Annotated[int, Field(ge=0)] = 512
    """A set whose decoded images fit is held in memory by each worker; a larger one streams."""


class Cluster(Strict):
    """Workers of Ray Train and what each gets."""

    workers: Annotated[int, Field(ge=1)] = 1
    """Training processes."""
    device: Literal["cpu", "cuda"] | None = None
    """Null takes cuda where the cluster has GPUs."""
    cpus_per_worker: Annotated[float, Field(gt=0)] = 1
    """Logical CPUs a worker holds."""
    threads: Annotated[int, Field(ge=1)] = 1
    """Threads of a worker's CPU arithmetic; part of what makes two runs equal bit for bit."""
    placement: Literal["replicate", "shard"] = "replicate"
    """Networks whole on each worker, or their parameters sharded over all."""
    wait_s: Annotated[float, Field(gt=0)] = 60
    """How long to wait for the cluster to have the workers, before saying what is short."""
    max_failures: Annotated[int, Field(ge=0)] = 0
    """Restarts from the last checkpoint after a lost worker."""


class Evaluate(Strict):
    """Scores of the student; at the end of the run, and every so many images if asked."""

    metrics: list[str] = []
    """Names, such as fd_fashion, class_consistency, diversity, precision, recall, fid; none scores nothing."""
    images: Annotated[int, Field(ge=2)] = 2000
    """Sample count."""
    every_images: Annotated[int, Field(ge=1)] | None = None
    """Images between scores during training, taken at the next report; null scores only the last checkpoint."""
    batch: Annotated[int, Field(ge=1)] = 250
    """Images sampled at once, over all workers."""
    features: str | None = None
    """Weights of the small feature network, for every metric but fid and kid."""
    reference: str | None = None
    """Statistics of the real images under that network."""
    inception: str | None = None
    """clean-fid's Inception weights, for fid and kid; null looks where clean-fid keeps them."""
    inception_reference: str | None = None
    """Statistics of the real images under Inception."""
    teacher_steps: list[Annotated[int, Field(ge=1)]] = []
    """Heun steps at which the teacher is scored beside the student at the end (2 steps - 1 calls an image)."""
    grid_every_images: Annotated[int, Field(ge=1)] | None = None
    """Images between sample grids in the tracker; null draws them at the start and at the end only."""


class Tracking(Strict):
    """MLflow."""

    experiment: str = "fewstep"
    """Experiment name."""
    uri: str | None = None
    """Tracking server; null takes MLFLOW_TRACKING_URI, else mlflow.db in the folder the job was started in."""
    model: str | None = None
    """Registered model that the export becomes a version of; null takes the run's recipe name."""


class Recipe(Strict):
    """One run: teacher, data, method, optimisers, training, evaluation."""

    recipe: str
    """The recipe's name (its file's)."""
    name: str = ""
    """The run's name and folder below `out`; an existing one is resumed. Empty makes a new one from recipe and time."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Of all randomness: weights, draws, data order, samples."""
    teacher: str | None = None
    """Folder of a diffusers pipeline or of a network written here; shipped:fashion_mnist/teacher is embedded."""
    network: Network | None = None
    """Instead of a teacher: a new network, which jobs/teach.py trains."""
    start: dict[str, str] = {}
    """Role: run folder whose last checkpoint it starts from (a second stage); optimisers start anew."""
    data: Data
    """Real images."""
    method: AnyMethod
    """The paper, by name, and its hyperparameters."""
    optim: dict[str, Optim]
    """An optimiser for each role that trains."""
    train: Train
    """Length and batch."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Arithmetic of the networks; weights, optimisers and losses are float32."""
    cluster: Cluster = Cluster()
    """Workers."""
    evaluate: Evaluate = Evaluate()
    """Scores."""
    tracking: Tracking = Tracking()
    """MLflow."""
    out: str = "runs"
    """Folder of the runs."""

    @model_validator(mode="after")
    def _fits(self) -> Recipe:
        wrong = []
        if (self.teacher is None) == (self.network is None):
            wrong.append("teacher: give either a teacher to distil or a network to train, and not both")
        roles = self.method.roles
        known = self.method.known_roles
        for role in self.optim:
            if role not in known:
                wrong.append(
                    f"optim.{role}: no such role; {self.method.tag} trains {', '.join(known)}; {nearest(role, known)}"
                )
        wrong += [f"optim.{role}: missing; {self.method.tag} trains it" for role in roles if role not in self.optim]
        for role in self.start:
            if role not in roles:
                wrong.append(f"start.{role}: no such role; {self.method.tag} trains {', '.join(roles)}")
        share = self.cluster.workers * self.train.accumulate
        if self.train.batch % share:
            wrong.append(f"train.batch: {self.train.batch} is not a multiple of workers x accumulate = {share}")
        if self.train.save_every % self.train.report_every:
            wrong.append(
                f"train.save_every: {self.train.save_every} is not a multiple of report_every {self.train.report_every}"
            )
        if wrong:
            raise ConfigError("\n".join(wrong))
        return self

    @property
    def folder(self) -> Path:
        """Where the run keeps its checkpoints, journal, samples and export."""
        return resolve(self.out) / self.name

    @property
    def fingerprint(self) -> str:
        """Of what decides the numbers: two recipes that differ only in name, place or reporting share it."""
        data = self.model_dump(exclude={"recipe", "name", "out", "tracking", "evaluate", "cluster"})
        for key in ("report_every", "save_every", "keep"):
            data["train"].pop(key)
        return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()[:16]


def find_recipe(ref: str, folder: Path) -> Path:
    """The file of a recipe named by its stem in `folder` or by a path. Raises ConfigError with the names there are."""
    path = Path(ref)
    if path.suffix in (".yaml", ".yml"):
        if path.is_file():
            return path
        raise ConfigError(f"recipe: no file {ref!r}")
    if (folder / f"{ref}.yaml").is_file():
        return folder / f"{ref}.yaml"
    names = sorted(p.stem for p in folder.glob("*.yaml"))
    known = f"there are {', '.join(names)}, or give a .yaml file"
    raise ConfigError(f"recipe: no recipe {ref!r}; {nearest(ref, names)} ({known})")


def load_recipe(argv: list[str], folder: Path, default: str) -> Recipe:
    """The recipe that `recipe=name key.sub=value ...` asks for. Raises ConfigError with every mistake."""
    given = words(argv)
    path = find_recipe(str(given.pop("recipe", default)), folder)
    data: dict[str, Any] = {"recipe": path.stem} | read(path)
    for key, value in given.items():
        data = override(data, key, value)
    recipe = validate(Recipe, data)
    if not recipe.name:
        recipe = recipe.model_copy(update={"name": f"{recipe.recipe}-{time.strftime('%Y%m%d-%H%M%S')}"})
    return recipe
