"""Recipe: everything that decides a run, checked as a whole before anything starts."""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Callable, Mapping
from functools import reduce
from operator import or_
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, model_validator

from .config import (
    ConfigError,
    Strict,
    fingerprint,
    flatten,
    nearest,
    override_all,
    read,
    renamed,
    resolve,
    resolve_out,
    resolve_out_ref,
    resolve_ref,
    validate,
    with_new_names,
    words,
)
from .engine.guard import Guard
from .engine.optim import Optim
from .engine.train import Train
from .engine.world import Layout
from .folders import cleaned_name, plain_name
from .methods import METHODS
from .metrics.base import MODES, better
from .metrics.build import Metrics
from .networks.pretrained import Network, locate
from .texts import has_masked, masked, revealed

# what does not decide a run's numbers: of a recipe, and of its `train`
ASIDE = "recipe name out tracking evaluate cluster storage resume resume_allow failure".split()
SECRETS = ("MLFLOW_TRACKING_URI", "FEWSTEP_STORAGE")  # environment variables that hold URLs with their secrets
SUFFIX_BYTES = 12  # what a sweep appends to its name for those of its trials
REPORTING = "report_every save_every keep keep_best keep_best_by keep_best_mode keep_every_images".split()


def _checked(check: Callable[[str], Any]) -> AfterValidator:
    """A validator that keeps a text as it is where `check` does not raise."""
    return AfterValidator(lambda text: (check(text), text)[1])


LocalPath = Annotated[str, _checked(resolve)]
PathOrURL = Annotated[str, _checked(resolve_ref)]
OutPath = Annotated[str, _checked(resolve_out)]
OutPathOrURL = Annotated[str, _checked(resolve_out_ref)]
RunName = Annotated[str, _checked(lambda name: name == "" or plain_name(name))]
SweepName = Annotated[str, _checked(lambda name: name == "" or plain_name(name, room=SUFFIX_BYTES))]
AnyMethod = Annotated[reduce(or_, METHODS.values()), Field(discriminator="name")]


class Data(Strict):
    """Real images."""

    path: LocalPath
    """Folder of shards written by jobs/prepare.py; shipped:fashion_mnist/shards is embedded."""
    flip: bool = False
    """Mirror half of the images."""
    max_corrupt: Annotated[float, Field(ge=0, le=1)] = 0.001
    """Share of rows that may be corrupt, alone or with their shard, before the run stops; they are replaced."""
    memory_mib: Annotated[int, Field(ge=0)] = 512
    """A set whose decoded images fit is held in memory by each worker; a larger one streams."""


class Adapter(Strict):
    """A low-rank adapter (LoRA, Hu et al. 2021, arXiv:2106.09685)."""

    rank: Annotated[int, Field(ge=1)] = 16
    """Rank of each layer's change, at most."""
    alpha: Annotated[float, Field(gt=0)] | None = None
    """The change is scaled by alpha / rank; null takes the rank, a factor of 1."""
    targets: list[str] = ["attention"]
    """Layers that are adapted: attention, all, or ends of layer paths such as to_q, with * for any letters."""


class Role(Strict):
    """How a role's network is made."""

    lora: Adapter | None = None
    """An adapter of the frozen teacher that trains instead of a whole copy; null trains a copy."""


class Cluster(Layout):
    """Workers of Ray Train and what each gets."""

    workers: Annotated[int, Field(ge=1)] = 1
    """Training processes."""
    workers_min: Annotated[int, Field(ge=1)] | None = None
    """Elastic: as few as these while the cluster has no more, and more when it has; null waits for all."""
    device: Literal["cpu", "cuda"] | None = None
    """Null takes cuda where the cluster has GPUs."""
    cpus_per_worker: Annotated[float, Field(gt=0)] = 1
    """Logical CPUs a worker holds."""
    threads: Annotated[int, Field(ge=1)] = 1
    """Threads of a worker's CPU arithmetic; part of what makes two runs equal bit for bit."""
    wait_s: Annotated[float, Field(gt=0)] = 60
    """How long to wait for the cluster to have the workers, before saying what is short."""


class Failure(Strict):
    """What a run does when something goes wrong. Mistakes in a recipe, in data or in numbers are not tried again."""

    max_failures: Annotated[int, Field(ge=0)] = 3
    """Restarts from the last checkpoint after lost workers, a lost node or a lost controller."""
    stall_minutes: Annotated[float, Field(gt=0)] = 15
    """No step for so long ends the run, saying where each rank is."""
    collapse: Guard = Guard()
    """What to do when the health of the student says that it collapsed."""


class Evaluate(Metrics):
    """Scores of the student; at the end of the run, and every so many images if asked."""

    images: Annotated[int, Field(ge=2)] = 2000
    """Sample count."""
    every_images: Annotated[int, Field(ge=1)] | None = None
    """Images between scores during training, taken at the next report; null scores only the last checkpoint."""
    batch: Annotated[int, Field(ge=1)] = 250
    """Images sampled at once, over all workers."""
    teacher_steps: list[Annotated[int, Field(ge=1)]] = []
    """Heun steps at which the teacher is scored beside the student at the end (2 steps - 1 calls an image)."""
    rank_seen_by_loss: bool = False
    """Let scores choose checkpoints and trials though a loss of the run used their network."""
    grid_every_images: Annotated[int, Field(ge=1)] | None = None
    """Images between sample grids in the tracker; null draws them at the start and at the end only."""


class Tracking(Strict):
    """MLflow."""

    experiment: str = "fewstep"
    """Experiment name."""
    uri: str | None = None
    """Tracking server; null takes MLFLOW_TRACKING_URI, else mlflow.db in the folder where the job writes."""
    model: str | None = None
    """Registered model that the export becomes a version of; null takes the run's recipe name."""


class Recipe(Strict):
    """One run: teacher, data, method, optimisers, training, evaluation."""

    recipe: str
    """The recipe's name (its file's)."""
    name: RunName = ""
    """The run's name and folder below `out`; an existing one is resumed. Empty makes a new one from recipe and time."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Of all randomness: weights, draws, data order, samples."""
    teacher: str | None = None
    """Folder of a diffusers pipeline or of a network written here; shipped:fashion_mnist/teacher is embedded."""
    network: Network | None = None
    """Instead of a teacher: a new network, which jobs/teach.py trains."""
    start: dict[str, PathOrURL] = {}
    """Role: run folder whose last checkpoint it starts from (a second stage), or one of that run's networks, such as
    runs/a/net.student; optimisers start anew."""
    roles: dict[str, Role] = {}
    """Role: how its network is made, such as {student: {lora: {rank: 16}}}; by default a whole copy of the teacher."""
    helpers: dict[str, str] = {}
    """Name: folder or file of a frozen network that the method asks for by that name."""
    data: Data | None = None
    """Real images; null for a method that trains on conditions alone."""
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
    out: OutPath = "runs"
    """Folder of the runs."""
    storage: OutPathOrURL | None = None
    """Folder or URL (s3://bucket/x) for the checkpoints, which all nodes reach; null is the run's own folder."""
    resume: PathOrURL = "auto"
    """auto goes on from the run's last checkpoint; never refuses a run that has any; a path is the checkpoint to start
    from when the run has none."""
    resume_allow: list[str] = []
    """Dotted keys that may differ from the checkpoint's recipe, such as train.steps."""
    failure: Failure = Failure()
    """What happens when something goes wrong."""

    @model_validator(mode="before")
    @classmethod
    def _new_names(cls, data: Any) -> Any:
        return with_new_names(data) if isinstance(data, dict) else data

    @model_validator(mode="before")
    @classmethod
    def _clip_of_roles(cls, data: Any) -> Any:
        """train.clip of the last release, which every role without a clip of its own takes."""
        train, optim = (data.get(key) for key in ("train", "optim")) if isinstance(data, dict) else (None, None)
        if not isinstance(train, dict) or "clip" not in train or not isinstance(optim, dict):
            return data
        warnings.warn("train.clip: this key is now optim.<role>.clip, one a role", FutureWarning, stacklevel=2)
        clip = train["clip"]
        roles = {role: {"clip": clip} | own if isinstance(own, dict) else own for role, own in optim.items()}
        return data | {"train": {k: v for k, v in train.items() if k != "clip"}, "optim": roles}

    @model_validator(mode="after")
    def _fits(self) -> Recipe:
        wrong = [f"evaluate.{line}" for line in self.evaluate.mistakes()]
        if (self.teacher is None) == (self.network is None):
            wrong.append("teacher: give either a teacher to distil or a network to train, and not both")
        elif self.teacher is None and self.method.needs_teacher:
            wrong.append(f"teacher: missing; {self.method.tag} distils one, and network is for methods without one")
        if self.data is None and self.method.needs:
            wrong.append(f"data: missing; {self.method.tag} trains on {', '.join(self.method.needs)}")
        roles = self.method.roles
        known = self.method.known_roles
        for role in self.optim:
            if role not in known:
                wrong.append(
                    f"optim.{role}: no such role; {self.method.tag} trains {', '.join(known)}; {nearest(role, known)}"
                )
        wrong += [f"optim.{role}: missing; {self.method.tag} trains it" for role in roles if role not in self.optim]
        for role in self.start:
            if role not in (*known, *self.method.frozen):
                wrong.append(f"start.{role}: no such role; {self.method.tag} trains {', '.join(known)}")
        for role, how in self.roles.items():
            if role not in known:
                trains = f"{self.method.tag} trains {', '.join(known)}"
                wrong.append(f"roles.{role}: no such role; {trains}; {nearest(role, known)}")
            elif how.lora is not None and self.network is not None:
                wrong.append(f"roles.{role}.lora: an adapter changes a teacher, not a new network; leave it out")
        c, train = self.cluster, self.train
        for workers in range(min(c.workers_min or c.workers, c.workers), c.workers + 1):
            share = workers * train.accumulate
            if train.batch % share:
                wrong.append(f"train.batch: {train.batch} is not a multiple of workers x accumulate = {share}")
        if c.workers_min is not None and c.workers_min > c.workers:
            wrong.append(f"cluster.workers_min: {c.workers_min} is above cluster.workers {c.workers}")
        if train.keep_best:
            every, scored = train.save_every * train.batch, self.evaluate.every_images
            if not scored or scored % every:
                wrong.append(
                    f"train.keep_best: only scored checkpoints can be best; let evaluate.every_images be a multiple "
                    f"of save_every x batch = {every}, got {scored}"
                )
            if train.keep_best_by not in self.evaluate.metrics:
                hint = nearest(str(train.keep_best_by), self.evaluate.metrics)
                wrong.append(f"train.keep_best_by: {train.keep_best_by!r} is not scored; {hint}")
            direction = better(str(train.keep_best_by))
            if direction and MODES[direction] != train.keep_best_mode:
                wrong.append(
                    f"train.keep_best_mode: {train.keep_best_mode!r}, but the {direction} {train.keep_best_by} is the "
                    f"better; give {MODES[direction]}"
                )
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
        return resolve_out(self.out) / self.name

    def lora(self, role: str) -> Adapter | None:
        """The adapter that a role trains; None for a role that trains a whole network."""
        return self.roles[role].lora if role in self.roles else None

    @property
    def checkpoints(self) -> Path | str:
        """Where the run's checkpoints go: a folder, or a URL when `storage` is one."""
        if self.storage is None:
            return self.folder / "checkpoints"
        storage = resolve_out_ref(self.storage)
        return storage / self.name if isinstance(storage, Path) else f"{storage.rstrip('/')}/{self.name}"

    @property
    def loss_networks(self) -> list[Path]:
        """The frozen networks that losses use: the teacher's, and those that `helpers` or a field of the method names
        by a path. Files, or folders of files."""
        fields = [value for value in flatten(self.method.model_dump(mode="json")).values() if isinstance(value, str)]
        paths = [value for value in fields if "/" in value or Path(value).suffix]
        paths += [self.teacher] if self.teacher else []
        return [locate(path) for path in [*paths, *self.helpers.values()]]

    @property
    def seen_by_loss(self) -> list[str]:
        """The metrics whose network is a file of `loss_networks`. A copy in another format is not recognised."""
        return self.evaluate.seen_by(self.loss_networks) if self.evaluate.metrics else []

    @property
    def numbers(self) -> dict[str, Any]:
        """What decides a run's numbers: two recipes that differ only in name, place or reporting share it."""
        data = masked(self.model_dump(mode="json", exclude=set(ASIDE)))
        data["train"] = {key: value for key, value in data["train"].items() if key not in REPORTING}
        return data

    @property
    def model_name(self) -> str:
        """The registered model that the export becomes a version of: `tracking.model`, else the recipe's own name."""
        return self.tracking.model or cleaned_name(self.recipe)

    @property
    def urls(self) -> tuple[str | None, ...]:
        """What `with_secrets` takes, to give another recipe of the same places its secrets."""
        return self.tracking.uri, self.storage, self.resume, *self.start.values()

    @property
    def written(self) -> dict[str, Any]:
        """All of it in JSON types, as it is written to files and shown: without the secrets of its URLs."""
        return masked(self.model_dump(mode="json"))

    @property
    def fingerprint(self) -> str:
        """Sixteen letters that stand for `numbers`; a checkpoint's manifest has the same."""
        return fingerprint(self.numbers)


def dated_name(stem: str) -> str:
    """The name of a new run or sweep: its file's stem, cleaned where it is no plain name, and the time."""
    now = time.strftime("%Y%m%d-%H%M%S")
    return f"{cleaned_name(stem, room=SUFFIX_BYTES + len(now) + 1)}-{now}"


def with_secrets(recipe: Recipe, *known: str | None) -> Recipe:
    """The recipe with the secrets that `Recipe.written` left out of its URLs, as far as they are known.

    known: URLs with their secrets. Others are those of the environment's MLFLOW_TRACKING_URI and FEWSTEP_STORAGE. A URL
    for which none is known stays as it is, and `check_secrets` refuses it.
    """
    known = (*known, *map(os.environ.get, SECRETS))
    tracking = recipe.tracking.model_copy(update={"uri": revealed(recipe.tracking.uri, *known)})
    return recipe.model_copy(
        update={
            "tracking": tracking,
            "storage": revealed(recipe.storage, *known),
            "resume": revealed(recipe.resume, *known),
            "start": {role: revealed(path, *known) for role, path in recipe.start.items()},
        }
    )


def check_secrets(recipe: Recipe) -> None:
    """Raises ConfigError where a URL lacks a secret that was not written with the recipe, saying how it is given."""
    urls = {"tracking.uri": recipe.tracking.uri, "storage": recipe.storage, "resume": recipe.resume}
    urls |= {f"start.{role}": path for role, path in recipe.start.items()}
    wrong = [
        f"{key}: {url} lacks its secret, which is never written to disk; give the whole URL as {key}=... or in the "
        f"environment variable {SECRETS[key != 'tracking.uri']}"
        for key, url in urls.items()
        if has_masked(url)
    ]
    if wrong:
        raise ConfigError("\n".join(wrong))


def read_run(folder: Path, *known: str | None) -> Recipe:
    """The recipe that a run's folder holds, with its secrets as of `with_secrets`.

    Raises ConfigError naming the file for one that is missing or damaged.
    """
    path = folder / "recipe.yaml"
    data = read(path)
    try:
        return with_secrets(validate(Recipe, data), *known)
    except ConfigError as error:
        raise ConfigError("\n".join(f"{path}: {line}" for line in str(error).splitlines())) from None


def find_recipe(ref: str, folder: Path) -> Path:
    """The file of a recipe named by its stem in `folder` or by a path. Raises ConfigError with the names there are."""
    if ref.endswith((".yaml", ".yml")):
        path = resolve(ref)
        if path.is_file():
            return path
        raise ConfigError(f"recipe: no file {ref!r}")
    if (folder / f"{ref}.yaml").is_file():
        return folder / f"{ref}.yaml"
    names = sorted(p.stem for p in folder.glob("*.yaml"))
    known = f"there are {', '.join(names)}, or give a .yaml file"
    raise ConfigError(f"recipe: no recipe {ref!r}; {nearest(ref, names)} ({known})")


def load_recipe(argv: list[str], folder: Path, default: str) -> Recipe:
    """The recipe that the words `recipe=name key.sub=value ...` ask for. Raises ConfigError with every mistake."""
    given = words(argv)
    return open_recipe(str(given.pop("recipe", default)), folder, given)


def open_recipe(ref: str, folder: Path, given: Mapping[str, Any]) -> Recipe:
    """The recipe that is found as `find_recipe` does, changed by {dotted key: value}. Without a name it gets one of its
    file's name and the time. Raises ConfigError with every mistake."""
    path = find_recipe(ref, folder)
    data = {"recipe": path.stem} | with_new_names(read(path))
    recipe = validate(Recipe, override_all(data, renamed(given)))
    if not recipe.name:
        recipe = recipe.model_copy(update={"name": dated_name(recipe.recipe)})
    recipe = with_secrets(recipe)
    check_secrets(recipe)
    return recipe
