"""The recipe: all settings of a run, validated as a whole before anything starts."""

from __future__ import annotations

import os
import re
import time
import warnings
from collections.abc import Mapping, Sequence
from functools import reduce
from operator import or_
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from .config import (
    ConfigError,
    LocalPath,
    OutPath,
    OutPathOrURL,
    PathOrURL,
    Strict,
    checked,
    fingerprint,
    flatten,
    nearest,
    new_name,
    not_found,
    override_all,
    parse_arguments,
    read,
    renamed,
    resolve,
    resolve_out,
    resolve_out_ref,
    validate,
    with_new_names,
)
from .config.keys import keys
from .engine.guard import Guard
from .engine.optim import Optim
from .engine.train import Train
from .engine.world import Layout
from .folders import cleaned_name, plain_name
from .methods import METHODS
from .metrics.base import MODES, better
from .metrics.build import Metrics
from .networks.pretrained import Network, locate
from .storage.cache import CACHE_BYTES
from .texts import has_masked, masked, revealed

# keys that do not change a run's numbers: ASIDE at the top of a recipe, REPORTING below `train`
ASIDE = "recipe name licence out tracking evaluate cluster storage resume resume_allow failure".split()
SECRETS = ("MLFLOW_TRACKING_URI", "FEWSTEP_STORAGE")  # environment variables that hold URLs with their secrets
SUFFIX_BYTES = 12  # what a sweep appends to its name for those of its trials
REPORTING = "report_every save_every keep keep_best keep_best_by keep_best_mode keep_every_images".split()


def _model_name(name: str) -> None:
    """Raises ValueError for a name that MLflow's registry does not take."""
    if not re.fullmatch(r"[^/:%'\"\x00-\x1f]{1,256}", name) or not name.strip():
        raise ValueError("a registered model's name has 1 to 256 characters, none of them / : % or a quote")


RunName = Annotated[str, checked(lambda name: name == "" or plain_name(name))]
SweepName = Annotated[str, checked(lambda name: name == "" or plain_name(name, room=SUFFIX_BYTES))]
AnyMethod = Annotated[reduce(or_, METHODS.values()), Field(discriminator="name")]


class Data(Strict):
    """Real images."""

    path: PathOrURL
    """Folder of shards written by jobs/prepare.py, or its URL (s3://bucket/x); shipped:fashion_mnist/shards is
    embedded."""
    flip: bool = False
    """Mirror half of the images."""
    max_corrupt: Annotated[float, Field(ge=0, le=1)] = 0.001
    """Share of rows that may be corrupt, alone or with their shard, before the run stops; they are replaced."""
    memory_mib: Annotated[int, Field(ge=0)] = 512
    """Memory in MiB for decoded images. Each worker keeps a set that fits in memory; a larger set streams."""
    cache_mib: Annotated[int, Field(ge=0)] = CACHE_BYTES >> 20
    """Disk space in MiB of each node for copies of shards from an object store, in FEWSTEP_CACHE (~/.cache/fewstep).
    The rows of a larger set are read from the store in every epoch."""


class Adapter(Strict):
    """A low-rank adapter (LoRA, Hu et al. 2021, arXiv:2106.09685)."""

    rank: Annotated[int, Field(ge=1)] = 16
    """Largest rank of a layer's change."""
    alpha: Annotated[float, Field(gt=0)] | None = None
    """The change is scaled by alpha / rank. null takes alpha = rank, a factor of 1."""
    targets: list[str] = ["attention"]
    """Layers with an adapter: attention, all, or ends of layer paths such as to_q, with * for any letters."""


class Role(Strict):
    """The network of a role: a whole copy of the teacher, an adapter, or a new network."""

    lora: Adapter | None = None
    """Train an adapter of the frozen teacher. null trains a whole copy."""
    network: Network | None = None
    """Train a new network for the teacher's samples and classes, such as a smaller student, from random weights or from
    `start`. null trains a copy of the teacher."""

    @property
    def given(self) -> str | None:
        """The key that is given: "lora" or "network"."""
        return "lora" if self.lora is not None else "network" if self.network is not None else None


class Cluster(Layout):
    """Workers of Ray Train and their resources."""

    workers: Annotated[int, Field(ge=1)] = 1
    """Training processes."""
    workers_min: Annotated[int, Field(ge=1)] | None = None
    """Elastic training: fewest workers to train with while the cluster has no more. null waits for all."""
    device: Literal["cpu", "cuda"] | None = None
    """Device of the workers. null takes cuda where the cluster has GPUs."""
    cpus_per_worker: Annotated[float, Field(gt=0)] = 1
    """Logical CPUs per worker."""
    threads: Annotated[int, Field(ge=1)] = 1
    """CPU threads per worker. Two runs are equal bit for bit only with equal threads."""
    wait_s: Annotated[float, Field(gt=0)] = 60
    """Longest wait in seconds for the cluster to have the workers. After it an error names what is short."""


class Failure(Strict):
    """Reaction to failures. Errors in a recipe, in data or in numbers are not retried."""

    max_failures: Annotated[int, Field(ge=0)] = 3
    """Restarts from the last checkpoint after lost workers, a lost node or a lost controller."""
    stall_minutes: Annotated[float, Field(gt=0)] = 15
    """Minutes without a step after which the run ends. The error lists the place of each rank."""
    collapse: Guard = Guard()
    """The guard: limits of the student's health signals, and the reaction to a collapse."""


class Evaluate(Metrics):
    """Scores of the student at the end of the run and, with `every_images`, during training."""

    images: Annotated[int, Field(ge=2)] = 2000
    """Number of samples to score."""
    every_images: Annotated[int, Field(ge=1)] | None = None
    """Images between scores during training, made at the next report. null scores only the last checkpoint."""
    batch: Annotated[int, Field(ge=1)] = 250
    """Batch size of sampling, over all workers."""
    teacher_steps: list[Annotated[int, Field(ge=1)]] = []
    """Numbers of solver steps at which the teacher is scored at the end: Heun's (NFE is 2 steps - 1), or DDIM's (NFE
    is steps) for a teacher that takes texts."""
    teacher_guidance: Annotated[float, Field(ge=1)] = 1.0
    """Guidance scale of the teacher's scores and grid, which doubles its NFE."""
    prompts: LocalPath | None = None
    """Text file of prompts, one a line, that scores and grids ask for. null takes the recipe's prompts, else the first
    captions of the data."""
    rank_seen_by_loss: bool = False
    """Allow scores to rank checkpoints and trials even if a loss of the run used the metric's network."""
    grid_every_images: Annotated[int, Field(ge=1)] | None = None
    """Images between sample grids in the tracker. null draws them at the start and at the end only."""


class Tracking(Strict):
    """MLflow."""

    experiment: Annotated[str, Field(min_length=1, max_length=256)] = "fewstep"
    """Experiment name."""
    uri: str | None = None
    """Tracking server. null takes MLFLOW_TRACKING_URI, else mlflow.db in the folder where the job writes."""
    model: Annotated[str, checked(_model_name)] | None = None
    """Registered model that gets the export as a new version. null takes the recipe's name."""


class Recipe(Strict):
    """One run: teacher, data, method, optimisers, training, evaluation."""

    recipe: str
    """The recipe's name, which is the stem of its file."""
    name: RunName = ""
    """The run's name and folder below `out`. An existing run is resumed. Empty makes a name of recipe and time."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Seed of all randomness: weights, draws, data order, samples."""
    teacher: str | None = None
    """Folder of a diffusers pipeline or of a network of this project, its URL (s3://bucket/x), or hub:owner/name.
    shipped:fashion_mnist/teacher is embedded."""
    licence: str | None = None
    """Licence of the teacher's weights, an SPDX name or a name of your own, for the card of the student. A teacher that
    takes texts needs one."""
    prompts: LocalPath | None = None
    """Text file of prompts, one a line, that a student of texts generates for in training. null takes the captions of
    the data at hand."""
    negatives: LocalPath | None = None
    """Text file of negative prompts, one a line, for a method that trains with them."""
    network: Network | None = None
    """A new network to train instead of distilling a teacher; jobs/teach.py uses it."""
    start: dict[str, PathOrURL] = {}
    """Initial weights by role, for a second stage: a run folder, whose last checkpoint is taken, or one network of that
    run, such as runs/a/net.student. Optimisers start anew."""
    roles: dict[str, Role] = {}
    """Networks by role, such as {student: {lora: {rank: 16}}}. The default is a whole copy of the teacher."""
    helpers: dict[str, str] = {}
    """Frozen networks of the method, by name: a folder or file each."""
    data: Data | None = None
    """Real images. null for a method that trains on conditions alone."""
    method: AnyMethod
    """The method by its name, and its hyperparameters."""
    optim: dict[str, Optim]
    """Optimisers by role: one for each role that trains."""
    train: Train
    """Length, batch, gradient accumulation, EMA and checkpoints."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Precision of the networks' arithmetic. Weights, optimisers and losses are float32."""
    cluster: Cluster = Cluster()
    """Workers."""
    evaluate: Evaluate = Evaluate()
    """Scores."""
    tracking: Tracking = Tracking()
    """MLflow."""
    out: OutPath = "runs"
    """Folder of the runs."""
    storage: OutPathOrURL | None = None
    """Folder or URL (s3://bucket/x) of the checkpoints. All nodes must reach it. null is the run's own folder."""
    resume: PathOrURL = "auto"
    """auto resumes from the run's last checkpoint. never refuses a run that has checkpoints. A path names the
    checkpoint to start from if the run has none."""
    resume_allow: list[str] = []
    """Dotted keys that may differ from the checkpoint's recipe, such as train.steps."""
    failure: Failure = Failure()
    """Restarts, stalls and the guard."""

    @model_validator(mode="before")
    @classmethod
    def _new_names(cls, data: Any) -> Any:
        return with_new_names(data) if isinstance(data, dict) else data

    @model_validator(mode="before")
    @classmethod
    def _clip_of_roles(cls, data: Any) -> Any:
        """Moves train.clip, a key of the last release, to every role without an own clip."""
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
        if self.precision == "bf16" and self.method.needs_float32:
            wrong.append(f"precision: bf16, but {self.method.tag} takes derivatives of its networks; give fp32")
        if self.data is None and self.method.needs:
            wrong.append(f"data: missing; {self.method.tag} trains on {', '.join(self.method.needs)}")
        if self.negatives is None and self.method.needs_negatives:
            wrong.append(
                f"negatives: missing; {self.method.tag} trains with negative prompts; give a text file of them"
            )
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
            elif how.lora is not None and how.network is not None:
                wrong.append(f"roles.{role}.network: an adapter changes the teacher, not a new network; leave one out")
            elif how.given and self.network is not None:
                what = "an adapter changes a teacher" if how.lora else "it takes the place of a teacher's copy"
                wrong.append(f"roles.{role}.{how.given}: {what}, not a new network; leave it out")
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
        if self.resume_allow:
            known = {key.name: key.group for key in keys(Recipe) if "=" not in key.name}
            for key in map(new_name, self.resume_allow):
                if not any(_is_key(key, name, known) for name in known):
                    wrong.append(f"resume_allow: no such key {key!r}; {nearest(key, sorted(known))}")
        if wrong:
            raise ConfigError("\n".join(wrong))
        return self

    @property
    def notes(self) -> list[str]:
        """A line on each setting that is allowed and seldom meant."""
        train, notes = self.train, []
        for role, optim in self.optim.items():
            if optim.warmup_steps > train.steps:
                notes.append(
                    f"optim.{role}.warmup_steps: {optim.warmup_steps} is beyond train.steps {train.steps}, so the rate "
                    "never reaches lr"
                )
        if train.save_every > train.steps:
            notes.append(
                f"train.save_every: {train.save_every} is beyond train.steps {train.steps}: only the last step is saved"
            )
        return notes

    @property
    def folder(self) -> Path:
        """The run's folder, with its checkpoints, journal, samples and export."""
        return resolve_out(self.out) / self.name

    def lora(self, role: str) -> Adapter | None:
        """Returns the adapter of a role, or None for a role that trains a whole network."""
        return self.roles[role].lora if role in self.roles else None

    @property
    def checkpoints(self) -> Path | str:
        """The folder of the run's checkpoints, or a URL if `storage` is one."""
        if self.storage is None:
            return self.folder / "checkpoints"
        storage = resolve_out_ref(self.storage)
        return storage / self.name if isinstance(storage, Path) else f"{storage.rstrip('/')}/{self.name}"

    @property
    def loss_networks(self) -> list[Path]:
        """Files and folders of the frozen networks that losses use.

        They are the teacher, the `helpers`, and each path in a field of the method.
        """
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
        """The settings that change a run's numbers: all but names, places and reporting."""
        data = masked(self.model_dump(mode="json", exclude=set(ASIDE)))
        data["train"] = {key: value for key, value in data["train"].items() if key not in REPORTING}
        (data["data"] or {}).pop("cache_mib", None)
        return data

    @property
    def model_name(self) -> str:
        """Name of the registered model: `tracking.model`, else the recipe's name."""
        return self.tracking.model or cleaned_name(self.recipe)

    @property
    def urls(self) -> tuple[str, ...]:
        """URLs with their secrets, as arguments of `with_secrets` for another recipe with the same places."""
        return tuple(_urls(self).values())

    @property
    def written(self) -> dict[str, Any]:
        """The whole recipe in JSON types without the secrets of its URLs, as files and the tracker get it."""
        return masked(self.model_dump(mode="json"))

    @property
    def fingerprint(self) -> str:
        """Hash of `numbers`, sixteen letters. A checkpoint's manifest holds it, too."""
        return fingerprint(self.numbers)


def _is_key(key: str, name: str, known: Mapping[str, bool]) -> bool:
    """True for a dotted key that is the documented key `name`, where `*` stands for any name, or lies below it where
    no key below it is documented. known: the documented keys, each with whether it has keys below."""
    parts, pattern = key.split("."), name.split(".")
    free = known[name] and not any(other.startswith(f"{name}.") for other in known)
    fits = all(p in ("*", part) for part, p in zip(parts, pattern, strict=False))
    return fits and (len(parts) == len(pattern) or (free and len(parts) > len(pattern)))


def dated_name(stem: str) -> str:
    """Returns the name of a new run or sweep: the file's stem as a plain name, and the time."""
    now = time.strftime("%Y%m%d-%H%M%S")
    return f"{cleaned_name(stem, room=SUFFIX_BYTES + len(now) + 1)}-{now}"


def with_secrets(recipe: Recipe, *known: str | None) -> Recipe:
    """Returns the recipe with the secrets that `Recipe.written` left out of its URLs.

    known: URLs with their secrets. MLFLOW_TRACKING_URI and FEWSTEP_STORAGE of the environment are known, too. A URL
    without a known secret is not changed, and `check_secrets` refuses it.
    """
    known = (*known, *map(os.environ.get, SECRETS))
    hidden = {key: revealed(url, *known) for key, url in _urls(recipe).items() if has_masked(url)}
    return Recipe.model_validate(override_all(recipe.model_dump(mode="json"), hidden)) if hidden else recipe


def _urls(recipe: Recipe) -> dict[str, str]:
    """The settings of a recipe that are URLs, by their dotted keys."""
    settings = flatten(recipe.model_dump(mode="json"))
    return {key: value for key, value in settings.items() if isinstance(value, str) and "://" in value}


def check_secrets(recipe: Recipe) -> None:
    """Raises ConfigError for a URL without its secret. The message says how to give the secret."""
    wrong = [
        f"{key}: {url} lacks its secret, which is never written to disk; give the whole URL as {key}=... or in the "
        f"environment variable {SECRETS[key != 'tracking.uri']}"
        for key, url in _urls(recipe).items()
        if has_masked(url)
    ]
    if wrong:
        raise ConfigError("\n".join(wrong))


def read_run(folder: Path, *known: str | None) -> Recipe:
    """Reads the recipe of a run's folder and restores its secrets by `with_secrets(recipe, *known)`.

    Raises ConfigError that names the file if it is missing or damaged.
    """
    path = folder / "recipe.yaml"
    data = read(path)
    try:
        return with_secrets(validate(Recipe, data), *known)
    except ConfigError as error:
        raise ConfigError("\n".join(f"{path}: {line}" for line in str(error).splitlines())) from None


def find_recipe(ref: str, folder: Path) -> Path:
    """Finds a recipe's file by its stem in `folder` or by a path. Raises ConfigError that lists the known names."""
    if ref.endswith((".yaml", ".yml")):
        path = resolve(ref)
        if path.is_file():
            return path
        raise ConfigError(f"recipe: no file {ref!r}")
    if (folder / f"{ref}.yaml").is_file():
        return folder / f"{ref}.yaml"
    raise not_found("recipe", ref, sorted(p.stem for p in folder.glob("*.yaml")), ".yaml")


def load_recipe(argv: list[str], folder: Path, default: str) -> Recipe:
    """Reads the recipe of a command line `recipe=name key.sub=value ...`. Raises ConfigError with every mistake."""
    overrides = parse_arguments(argv)
    return open_recipe(str(overrides.pop("recipe", default)), folder, overrides)


def open_recipe(ref: str, folder: Path, overrides: Mapping[str, Any]) -> Recipe:
    """Reads the recipe that `find_recipe` finds and applies the overrides, {dotted key: value}.

    A recipe without a name gets one of its file's stem and the time. Raises ConfigError with every mistake.
    """
    path = find_recipe(ref, folder)
    data = {"recipe": path.stem} | with_new_names(read(path))
    recipe = validate(Recipe, override_all(data, renamed(overrides)))
    if not recipe.name:
        recipe = recipe.model_copy(update={"name": dated_name(recipe.recipe)})
    recipe = with_secrets(recipe)
    check_secrets(recipe)
    return recipe


class Stage(Strict):
    """One run of a chain."""

    recipe: str
    """Name of a file of jobs/recipes, or the path of a .yaml file."""
    set: dict[str, Any] = {}
    """Dotted keys of the recipe, and their values, in which "{1}" stands for the folder of the first stage's run."""

    def given(self, folders: Sequence[str]) -> dict[str, Any]:
        """Returns `set` with "{1}", "{2}", ... replaced by the folders of those stages."""
        return _filled(self.set, folders)


class Stages(Strict):
    """A chain's file."""

    stages: Annotated[list[Stage], Field(min_length=1)]
    """The runs, in order."""


def open_chain(ref: str, folder: Path) -> list[Stage]:
    """Reads the stages of a chain, which is found as `find_recipe` finds a recipe. Raises ConfigError."""
    return validate(Stages, read(find_recipe(ref, folder))).stages


def _filled(value: Any, folders: Sequence[str]) -> Any:
    if isinstance(value, dict):
        return {key: _filled(inner, folders) for key, inner in value.items()}
    if isinstance(value, list):
        return [_filled(inner, folders) for inner in value]
    for i, folder in enumerate(folders, 1):
        value = value.replace(f"{{{i}}}", folder) if isinstance(value, str) else value
    return value
