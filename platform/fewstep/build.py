"""Recipe -> engine, samplers and metrics. Nothing here starts anything."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .config import resolve, resolve_ref
from .data.feed import Feed, open_feed
from .data.shards import Shards
from .diffusion.draws import Draws, fold
from .diffusion.samplers import heun, to_uint8
from .engine.checkpoint import load_net, read_weights
from .engine.folder import newest
from .engine.train import Engine
from .engine.world import World
from .files import sha256_of
from .metrics.base import Measure, Samples
from .networks.denoiser import Denoiser, Guided
from .networks.pretrained import locate, new_denoiser, new_head, open_teacher
from .recipe import Data, Recipe, check_secrets, read_run


def make_teacher(recipe: Recipe) -> Denoiser:
    """The recipe's teacher, or its new network with weights drawn from the recipe's seed."""
    torch.manual_seed(fold(recipe.seed, "weights"))
    if recipe.network is not None:
        return new_denoiser(recipe.network, recipe.precision)
    return open_teacher(recipe.teacher, recipe.precision)


def make_nets(recipe: Recipe) -> dict[str, nn.Module]:
    """Every role's network, the frozen teacher among them; the same on all ranks."""
    teacher = make_teacher(recipe)
    nets = recipe.method.nets(teacher, lambda: new_head(teacher))
    for role, folder in recipe.start.items():
        path = latest(resolve_ref(folder))
        if path is None:
            raise ValueError(f"start.{role}: no checkpoint below {folder!r}; give the folder of a run")
        load_net(nets[role], read_weights(path, f"net.{role}"), str(path))
    if recipe.network is None:
        guidance = getattr(recipe.method, "guidance", 1.0)
        nets["teacher"] = Guided(teacher, guidance) if guidance > 1 else teacher
    return nets


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


def fingerprints(recipe: Recipe, shards: Shards) -> dict[str, str]:
    """Of recipe, data and teacher: the hashes that tell two runs' ingredients apart."""
    marks = {"recipe": recipe.fingerprint, "data": f"{fold(*[s.sha256 for s in shards.manifest.shards]):016x}"}
    if recipe.teacher is not None:
        weights = sorted(locate(recipe.teacher).rglob("*.safetensors"))
        marks["teacher"] = f"{fold(*[sha256_of(path) for path in weights]):016x}"
    return marks


def make_feed(data: Data, seed: int) -> Feed:
    """The recipe's data, read in this process without Ray. Raises ShardError naming the file at fault."""
    return open_feed(
        resolve(data.path), memory_bytes=data.memory_mib << 20, seed=seed, flip=data.flip, max_corrupt=data.max_corrupt
    )


def check_data(feed: Feed, student: Denoiser) -> None:
    """Raises ValueError where the images or their labels do not fit the network."""
    if tuple(feed.shape) != tuple(student.shape):
        raise ValueError(
            f"data.path: images of shape {tuple(feed.shape)} (C, H, W), but the network takes {tuple(student.shape)}; "
            "prepare them with size= of the network, or choose another teacher"
        )
    if student.classes is not None and not feed.classes:
        raise ValueError(
            f"data.path: the images have no labels, but the network has {student.classes} classes; prepare them with "
            "labels: a sub-folder for each class, or metadata.csv"
        )
    if student.classes not in (None, feed.classes):
        raise ValueError(
            f"data.path: labels of {feed.classes} classes, but the network has {student.classes}; give "
            f"classes={student.classes} to jobs/prepare.py where not every class has images"
        )


def make_engine(recipe: Recipe, feed: Feed, world: World | None = None, folder: Path | None = None) -> Engine:
    """The engine of a recipe on this rank; `folder` is where its checkpoints go."""
    nets = make_nets(recipe)
    check_data(feed, nets["student"])
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
    classes: int | None


def student_sampler(method: Any, net: nn.Module) -> Sampler:
    """The trained network, as its method samples it."""
    name, calls = method.describe_sampler()
    return Sampler(name, calls, lambda z, cond, draws: method.sample(net, z, cond, draws), net.shape, net.classes)


def heun_sampler(net: nn.Module, steps: int, guidance: float = 1.0) -> Sampler:
    """A teacher by Heun's solver: 2 steps - 1 calls an image, twice that with guidance."""
    guided = Guided(net, guidance) if guidance > 1 else net
    name = f"heun-{steps}" + (f"-guided-{guidance:g}" if guidance > 1 else "")
    calls = (2 * steps - 1) * (2 if guidance > 1 else 1)
    return Sampler(name, calls, lambda z, cond, draws: heun(guided, z, cond, steps), net.shape, net.classes)


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
        labels = torch.arange(first, first + batch, device=world.device)[world.rank :: world.size]
        cond = labels % sampler.classes if sampler.classes else None
        mine.append(to_uint8(sampler.sample(z, cond, draws)).cpu())  # waits for the device
        laps.append(time.perf_counter() - start)
    seconds = median(laps) * images / batch
    whole = _interleave(torch.cat(mine), batch, world)
    if whole is None:
        return None
    labels = torch.arange(images) % sampler.classes if sampler.classes else None
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
