"""Recipe -> engine, samplers and metrics. Nothing here starts anything."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .config import ConfigError, Strict, read_json, resolve, resolve_ref, validate
from .data.feed import Feed, open_feed
from .data.shards import Shards
from .diffusion.draws import Draws, fold
from .diffusion.guidance import guided
from .diffusion.level import Level
from .diffusion.samplers import Call, heun, run_calls, to_uint8
from .engine.checkpoint import load_net, read_weights
from .engine.folder import newest
from .engine.manifest import read_manifest
from .engine.train import Engine, NoData
from .engine.world import World
from .files import sha256_of
from .folders import write_private
from .metrics.base import Measure, Samples
from .metrics.features import ClassReward, FeatureMaps, open_features
from .networks.conditions import Conditions, Texts
from .networks.denoiser import Denoiser
from .networks.lora import Lora, merge
from .networks.pretrained import Network, empty_denoiser, locate, network_of, new_denoiser, new_head, open_teacher
from .recipe import Data, Recipe, check_secrets, read_run
from .texts import quoted

DESCRIBED = "network.json"
SMALL = {"reward": ClassReward, "features": FeatureMaps}  # helpers that are files of jobs/features.py


def make_teacher(recipe: Recipe, weights: bool = True) -> Denoiser:
    """The recipe's teacher, or its new network with weights drawn from the recipe's seed.

    weights: without them the network is on the meta device. Raises ValueError naming the file or field.
    """
    if recipe.network is not None:
        torch.manual_seed(fold(recipe.seed, "weights"))
        return new_denoiser(recipe.network, recipe.precision, weights)
    if (resolve_ref(recipe.teacher) / "recipe.yaml").is_file():  # a run's student is a teacher, too
        return open_net(recipe.teacher) if weights else make_teacher(read_run(resolve(recipe.teacher)), weights=False)
    return open_teacher(recipe.teacher, recipe.precision, weights)


@dataclass
class Maker:
    """Makes a method's networks as its recipe says (methods/base.py, Make)."""

    recipe: Recipe
    teacher: Denoiser

    def copy(self, role: str, extra: tuple[str, ...] = ()) -> nn.Module:
        """A denoiser that starts as the teacher: whole, or an adapter of it."""
        adapter = self.recipe.lora(role)
        if adapter is None:
            return deepcopy(self.teacher).add_extra(*extra)
        try:
            net = Lora(self.teacher, adapter.rank, adapter.alpha, adapter.targets, seed=fold(self.recipe.seed, role))
        except ValueError as error:
            raise ValueError(f"roles.{role}.lora.{error}") from None
        return net.add_extra(*extra)

    def head(self, role: str, at: tuple[str, ...] = ("middle",)) -> nn.Module:
        """A GAN head over the teacher's taps."""
        return new_head(self.teacher, at)

    def helper(self, name: str) -> nn.Module:
        """A frozen network of the recipe's `helpers`: a file of jobs/features.py, or a denoiser."""
        if name not in self.recipe.helpers:
            raise ValueError(f"helpers.{name}: missing; {self.recipe.method.tag} needs it: give its folder or file")
        if name in SMALL:
            return SMALL[name](open_features(resolve(self.recipe.helpers[name])))
        return open_teacher(self.recipe.helpers[name], self.recipe.precision)

    def run(self, folder: str) -> nn.Module:
        """The student of another run, frozen: its averaged weights where it has them."""
        return open_net(folder)


def make_nets(recipe: Recipe) -> dict[str, nn.Module]:
    """Every role's network, the frozen ones among them; the same on all ranks. Raises ValueError naming the field."""
    teacher = make_teacher(recipe)
    torch.manual_seed(fold(recipe.seed, "nets"))  # of heads and embeddings, however much opening the teacher drew
    nets = recipe.method.nets(Maker(recipe, teacher))
    for role, how in recipe.roles.items():
        if how.lora is not None and not isinstance(nets.get(role), Lora | None):
            raise ValueError(f"roles.{role}.lora: {recipe.method.tag} makes this network anew, not from the teacher")
    if any(isinstance(net, Lora) for net in nets.values()):
        nets.setdefault("teacher", teacher)  # adapters run through it
    for role, ref in recipe.start.items():
        if role not in nets:
            raise ValueError(f"start.{role}: no such role; {recipe.method.tag} has {', '.join(nets)}")
        if any(isinstance(net, Lora) and net.base is nets[role] for net in nets.values()):
            raise ValueError(f"start.{role}: adapters change this network; give it by teacher=... instead")
        path, source = _start(ref, role)
        load_net(nets[role], read_weights(path, source), str(path))
    return nets


def _start(ref: str, role: str) -> tuple[Path | str, str]:
    """A run's newest checkpoint, and which of its networks: of `runs/a` the same role's, of `runs/a/net.student` that
    one. Raises ValueError for a folder without a checkpoint."""
    folder, _, last = ref.rstrip("/").rpartition("/")
    folder, source = (folder, last) if folder and last.startswith("net.") else (ref, f"net.{role}")
    path = latest(resolve_ref(folder))
    if path is None:
        raise ValueError(f"start.{role}: no checkpoint below {quoted(folder)}; give the folder of a run")
    return path, source


def open_net(folder: str) -> Denoiser:
    """The student of a run, from its newest checkpoint: averaged weights where it has them. Raises ValueError."""
    path = latest(resolve_ref(folder))
    if path is None:
        raise ValueError(f"run: no checkpoint below {folder!r}; give the folder of a run")
    return student_net(read_run(resolve(folder)), path, folder=resolve(folder))


def student_net(
    recipe: Recipe, checkpoint: Path | str, average: bool | None = None, folder: Path | None = None
) -> Denoiser:
    """The student in a checkpoint of a recipe's run, frozen; an adapter is merged into its base.

    average: its averaged weights; None: where it has them. folder: the run's, which may describe the student; else the
    teacher is opened for the shapes. Raises ValueError.
    """
    if average is None:
        average = has_average(checkpoint)
    net = None if folder is None else described_net(folder, recipe.precision)
    if net is None:
        net = recipe.method.nets(Maker(recipe, make_teacher(recipe)))["student"]
    load_net(net, read_weights(checkpoint, "net.average" if average else "net.student"), str(checkpoint))
    net = merge(net, *_probe(net)) if isinstance(net, Lora) else net
    return net.eval().requires_grad_(False)


class Described(Strict):
    """The student of a run in `network.json`, so that a finished run needs no teacher."""

    network: Network
    """The network."""
    extra: list[str] = []
    """Further scalars that it takes."""


def describe_net(folder: Path, student: nn.Module) -> None:
    """Writes `network.json` into a run's folder; nothing for an adapter, which is not whole without its base."""
    if isinstance(student, Denoiser):
        described = Described(network=network_of(student), extra=list(student.extras))
        write_private(folder / DESCRIBED, described.model_dump_json(indent=1) + "\n")


def described_net(folder: Path, precision: str) -> Denoiser | None:
    """A network as the student of a run, to be filled; None where the run's folder does not describe it.

    Raises ConfigError naming the file.
    """
    path = folder / DESCRIBED
    if not path.is_file():
        return None
    try:
        described = validate(Described, read_json(path))
        return empty_denoiser(described.network, precision).add_extra(*described.extra)
    except ValueError as error:
        text = "; ".join(str(error).splitlines())
        raise ConfigError(text if text.startswith(str(path)) else f"{path}: {text}") from None


def _probe(net: nn.Module) -> tuple[Tensor, Level, Any]:
    """Inputs of a denoiser from little noise to much, on which two networks are compared."""
    angle = torch.linspace(0.05, 1.52, 4).view(-1, 1, 1, 1)
    x_t = Draws(0, 0).normal("probe", (len(angle), *net.shape))
    return x_t, Level(angle.cos(), angle.sin()), net.conditions.zeros(len(angle))


def steps_done(recipe: Recipe) -> int:
    """Steps of a run's newest checkpoint; 0 where it has none."""
    path = newest(recipe.checkpoints)
    return 0 if path is None else read_manifest(path)["step"]


def has_average(checkpoint: Path | str) -> bool:
    """True where a checkpoint holds averaged weights of the student."""
    return any(name.startswith("net.average.") for name in read_manifest(checkpoint)["tensors"])


def latest(folder: Path | str, known: Sequence[str | None] = ()) -> Path | str | None:
    """The newest checkpoint of a run's folder, wherever its recipe keeps them, or of a URL; None where none is.

    known: URLs with their secrets, see `with_secrets`.
    """
    if "://" in str(folder):
        return newest(folder)
    found = newest(Path(folder) / "checkpoints")
    if found is None and (Path(folder) / "recipe.yaml").is_file():
        recipe = read_run(Path(folder), *known)
        check_secrets(recipe)
        found = newest(recipe.checkpoints)
    return found


def fingerprints(recipe: Recipe, shards: Shards | None) -> dict[str, str]:
    """Hashes of recipe, data and teacher, which tell two runs' ingredients apart."""
    marks = {"recipe": recipe.fingerprint}
    if shards is not None:
        marks["data"] = f"{fold(*[s.sha256 for s in shards.manifest.shards]):016x}"
    if recipe.teacher is not None:
        weights = sorted(locate(recipe.teacher).rglob("*.safetensors"))
        marks["teacher"] = f"{fold(*[sha256_of(path) for path in weights]):016x}"
    return marks


def make_feed(data: Data | None, seed: int) -> Feed | NoData:
    """The recipe's data, read in this process without Ray; a feed without columns where the recipe has no data.

    Raises ShardError naming the file at fault.
    """
    if data is None:
        return NoData()
    return open_feed(
        resolve(data.path), memory_bytes=data.memory_mib << 20, seed=seed, flip=data.flip, max_corrupt=data.max_corrupt
    )


def check_network(net: Denoiser) -> Denoiser:
    """The network itself. Raises ValueError for one that asks for texts, or whose samples are no pictures."""
    if isinstance(net.conditions, Texts):
        raise ValueError(
            "teacher: it generates from texts, which is not trained here; choose one of classes, or of none"
        )
    if net.shape[0] not in (1, 3):
        raise ValueError(
            f"teacher: it generates {net.shape[0]} channels, so latents, of which no pictures are made here; choose "
            "one that generates pixels"
        )
    return net


def check_start(recipe: Recipe) -> None:
    """Raises ValueError where a role is to start from a run that has no checkpoint."""
    for role, ref in recipe.start.items():
        _start(ref, role)


def check_data(data: Feed | NoData | Shards, student: Denoiser, needs: Sequence[str] = ()) -> None:
    """Raises ValueError where the images do not fit the network, or lack the method's columns.

    data: a feed, or the shard set that it will read. needs: of the method.
    """
    if isinstance(data, NoData):
        return
    if "noise" in needs and not (data if isinstance(data, Shards) else data.shards).has_noise:
        raise ValueError(
            "data.path: the rows have no noise, and the method trains on a teacher's pairs; make them with: "
            "python jobs/pairs.py teacher=... out=..."
        )
    if isinstance(data, Shards) and data.manifest.kind != "image":
        raise ValueError(f"data.path: holds {data.manifest.kind}s, of which no pictures are made here; prepare images")
    shape = tuple(data.size if isinstance(data, Shards) else data.shape)
    if shape != tuple(student.shape):
        raise ValueError(
            f"data.path: images of shape {shape} (C, H, W), but the network takes {tuple(student.shape)}; "
            "prepare them with size= of the network, or choose another teacher"
        )
    if student.classes is not None and not data.classes:
        raise ValueError(
            f"data.path: the images have no labels, but the network has {student.classes} classes; prepare them with "
            "labels: a sub-folder for each class, or metadata.csv"
        )
    if student.classes not in (None, data.classes):
        raise ValueError(
            f"data.path: labels of {data.classes} classes, but the network has {student.classes}; give "
            f"classes={student.classes} to jobs/prepare.py where not every class has images"
        )


def make_engine(recipe: Recipe, feed: Feed | NoData, world: World | None = None, folder: Path | None = None) -> Engine:
    """The engine of a recipe on this rank; `folder` is where its checkpoints go."""
    nets = make_nets(recipe)
    check_data(feed, nets["student"], recipe.method.needs)
    return Engine(
        recipe.method,
        nets,
        recipe.optim,
        feed,
        recipe.train,
        seed=recipe.seed,
        world=world,
        folder=folder,
        recipe=recipe.numbers,
        resume_allow=recipe.resume_allow,
        guard=recipe.failure.collapse,
    )


# Sampling


@dataclass(frozen=True)
class Sampler:
    """A way to make images from unit noise: its name, its network calls an image, and sample(z, cond, draws) -> x0."""

    name: str
    calls: int
    sample: Callable[[Tensor, Any, Draws], Tensor]
    shape: tuple[int, int, int]
    conditions: Conditions


def student_sampler(method: Any, nets: Mapping[str, nn.Module]) -> Sampler:
    """The trained generator, as its method calls it; nets: the roles that it calls, "student" among them."""
    net = nets["student"]
    calls = method.calls(net)
    return few_step_sampler(nets, calls) if calls else heun_sampler(net, method.heun_steps)


def few_step_sampler(nets: Mapping[str, nn.Module], calls: Sequence[Call]) -> Sampler:
    """A generator as a list of calls."""
    net = nets[calls[0].role]
    sample = lambda z, cond, draws: run_calls(nets, calls, z, cond, draws)
    return Sampler(f"few-step-{len(calls)}", len(calls), sample, net.shape, net.conditions)


def heun_sampler(net: nn.Module, steps: int, guidance: float = 1.0) -> Sampler:
    """A diffusion model by Heun's solver: 2 steps - 1 calls an image, twice that with guidance."""
    conditions = net.conditions

    def sample(z: Tensor, cond: Any, draws: Draws) -> Tensor:
        null = conditions.null(cond)
        return heun(lambda x_t, level, c: guided(net, x_t, level, c, guidance, null), z, cond, steps)

    name = f"heun-{steps}" + (f"-guided-{guidance:g}" if guidance != 1 else "")
    calls = (2 * steps - 1) * (2 if guidance != 1 else 1)
    return Sampler(name, calls, sample, net.shape, conditions)


@torch.no_grad()
def make_samples(
    sampler: Sampler,
    images: int,
    seed: int = 0,
    batch: int = 250,
    world: World | None = None,
    checkpoint: str = "last",
    alive: Callable[[], None] = lambda: None,
) -> Samples | None:
    """`images` samples with labels 0, 1, 2, ... in turn, the same for any world size; each rank makes its share.

    Returns Samples on rank 0 and None on the others. `seconds` is the sampling's alone: batches times their
    median, which a first call's set-up does not bend. alive: called before each batch.
    """
    world = world or World()
    batch = max(batch // world.size, 1) * world.size
    mine, laps = [], []
    for first in range(0, images, batch):
        alive()
        start = time.perf_counter()
        draws = Draws(fold(seed, "samples"), first, world.rank, world.size, world.device)
        z = draws.normal("z", (batch // world.size, *sampler.shape))
        numbers = torch.arange(first, first + batch, device=world.device)[world.rank :: world.size]
        cond = sampler.conditions.listed(numbers)
        mine.append(to_uint8(sampler.sample(z, cond, draws)).cpu())  # waits for the device
        laps.append(time.perf_counter() - start)
    seconds = median(laps) * images / batch
    whole = _interleave(torch.cat(mine), batch, world)
    if whole is None:
        return None
    labels = sampler.conditions.listed(torch.arange(images)) if sampler.conditions.classes else None
    return Samples(whole[:images], labels, sampler.name, sampler.calls, seconds, seed, checkpoint)


def _interleave(mine: Tensor, batch: int, world: World) -> Tensor | None:
    """All ranks' images in the order of their labels, on rank 0."""
    if world.size == 1:
        return mine
    gathered: list[Any] | None = [None] * world.size if world.rank == 0 else None
    dist.gather_object(mine, gathered)
    if gathered is None:
        return None
    return torch.stack(gathered, 1).flatten(0, 1)


def make_metrics(recipe: Recipe, device: torch.device | str = "cpu") -> list[Measure]:
    """The functions that score the recipe's samples. Raises ValueError for an unknown name or a missing file."""
    return recipe.evaluate.build(device, recipe.seen_by_loss)


def grid(images: Tensor, columns: int) -> Tensor:
    """uint8 (N, C, H, W) as one picture (rows H, columns W, C), for a person to look at."""
    n, c, h, w = images.shape
    rows = -(-n // columns)
    canvas = torch.zeros(rows * columns, c, h, w, dtype=torch.uint8)
    canvas[:n] = images
    return canvas.view(rows, columns, c, h, w).permute(0, 3, 1, 4, 2).reshape(rows * h, columns * w, c)
