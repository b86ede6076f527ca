"""A dry run: the resolved recipe, its parameters and its memory a worker, without training."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks

from . import build, run
from .config import to_yaml
from .diffusion.level import Level
from .diffusion.schedules import DDPM
from .engine.world import Layout, World
from .networks.codec import Codec
from .networks.conditions import Texts
from .networks.denoiser import Denoiser
from .networks.lora import Lora
from .networks.text import Clip
from .recipe import Recipe

MIB = 2**20


def saved_bytes(net: nn.Module, inputs: tuple[Any, ...]) -> int:
    """Bytes that one forward pass keeps for its backward, each storage counted once, the weights not at all."""
    weights = [*net.parameters(), *(net.base.parameters() if isinstance(net, Lora) else ())]
    own = {p.untyped_storage()._cdata for p in weights}  # which tells storages apart that hold nothing, too
    seen: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            seen[storage._cdata] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        out = net(*inputs)  # held until the count is made, or its storages would be counted under one address
    total = sum(seen.values())
    del out
    return total


def activations(forward: Callable[[int], int], count: int) -> int:
    """Bytes kept for a micro-batch of `count`, from passes on two and three samples: no large batch is run here.

    forward: samples -> `saved_bytes`. From the second sample on each adds the same, so this is exact for two or more.
    """
    two, three = forward(2), forward(3)
    return two + (count - 2) * (three - two)


def memory(recipe: Recipe) -> list[dict[str, Any]]:
    """Bytes each role needs on a worker: weights, gradients, optimiser, activations of one micro-batch.

    How many workers a node will have is not known beforehand: what is sharded inside a node counts whole. Adapters have
    a row each for their factors, and the teacher that they share has one. Networks of texts, which are large, are
    counted without being allocated.
    """
    teacher = build.make_teacher(recipe, weights=False)
    if not isinstance(teacher.conditions, Texts):
        return _rows(recipe, build.make_nets(recipe))
    if recipe.data is not None:
        shards = build.open_data(recipe.data)
        teacher.conditions = Texts({name: shards.column(name).shape for name in teacher.conditions.shapes})
    if isinstance(teacher.schedule, DDPM):
        teacher.schedule.angles()  # a table that is kept, and must hold numbers
    with FakeTensorMode(allow_non_fake_inputs=True):
        return _rows(recipe, build.make_nets(recipe, teacher.to_empty(device="cpu")))


def _rows(recipe: Recipe, nets: dict[str, nn.Module]) -> list[dict[str, Any]]:
    layout = recipe.cluster
    count = recipe.train.batch // (recipe.cluster.workers * recipe.train.accumulate)
    student = nets["student"]
    world = World(layout=Layout(checkpoint_activations=layout.checkpoint_activations))
    averaged = [source for source, _ in recipe.method.averages().values()]
    averaged += ["student"] if recipe.train.profile else []

    def inputs(net: nn.Module, samples: int) -> tuple[Any, ...]:
        if isinstance(net, Codec | Clip):
            return net.zeros(samples)
        x, one = torch.randn(samples, *student.shape), torch.ones(samples, 1, 1, 1)
        cond = student.conditions.zeros(samples)
        if isinstance(net, Denoiser | Lora):
            return x, Level(one, one), cond
        if not hasattr(net, "at"):  # a weight of the noise level
            return (torch.rand(samples, dtype=torch.float64),)
        with torch.no_grad():
            return (student(x, Level(one, one), cond, "features", at=net.at),)

    rows = []
    for role, net in nets.items():
        kind = "trained" if role in recipe.method.roles else "frozen"
        trains = kind == "trained"
        world.place(net.eval(), kind).requires_grad_(trains)  # a frozen network in bf16 is stored so
        size = sum(p.numel() * p.element_size() for p in net.parameters())
        shards = recipe.cluster.workers if layout.of(kind) == "shard" else 1
        copies = 0 if layout.offload_average else averaged.count(role)
        forward = lambda samples, net=net: saved_bytes(net, inputs(net, samples))
        rows.append(
            {
                "role": role,
                "parameters": sum(p.numel() for p in net.parameters()),
                "weights": size * (1 + copies) // shards,
                "gradients": size // shards if trains else 0,
                "optimiser": 2 * size // shards if trains else 0,
                "activations": activations(forward, count) if trains else 0,
            }
        )
    return rows


def machine_notes(recipe: Recipe) -> list[str]:
    """Lines on what this machine lacks of the recipe's workers. Of a cluster nothing is known here."""
    c, cpus = recipe.cluster, os.cpu_count() or 1
    if os.environ.get("RAY_ADDRESS"):
        return ["RAY_ADDRESS names a cluster, which was not asked what it has; python jobs/doctor.py asks it"]
    notes = []
    if c.workers * c.cpus_per_worker > cpus:
        notes.append(
            f"cluster.workers: {c.workers:,} of {c.cpus_per_worker:g} CPUs each, and this machine has {cpus}, which "
            "they would share"
        )
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if c.device == "cuda" and gpus < c.workers:
        notes.append(f"cluster.device: cuda for {c.workers:,} workers, and torch sees {gpus} GPUs on this machine")
    return notes


def describe(recipe: Recipe, exports: bool = False) -> str:
    """The text that --dry-run prints. Raises as a real start would for files, shapes and names that do not fit.

    exports: the job exports the student of a finished run.
    """
    run.check(recipe)
    notes = [*recipe.notes, *machine_notes(recipe), *(run.export_notes(recipe) if exports else ())]
    with build.make_feed(recipe.data, recipe.seed, "caption" in recipe.method.needs) as feed:
        rows_of_data = feed.rows
    rows = memory(recipe)
    columns = ("weights", "gradients", "optimiser", "activations")
    lines = [to_yaml(recipe.written)]
    lines.append(f"{'role':10s}{'parameters':>14s}" + "".join(f"{c:>14s}" for c in columns) + "   (MiB a worker)")
    for row in rows:
        lines.append(f"{row['role']:10s}{row['parameters']:14,d}" + "".join(f"{row[c] / MIB:14.1f}" for c in columns))
    total = sum(row[c] for row in rows for c in columns)
    t = recipe.train
    lines.append(f"{'total':10s}{sum(r['parameters'] for r in rows):14,d}{total / MIB:14.1f}")
    lines.append("weights count a network's running averages; what trains and its optimiser are float32.")
    images = t.steps * t.batch
    epochs = f": {images / rows_of_data:.1f} epochs of {rows_of_data:,}" if rows_of_data else ", without data"
    lines.append(f"{t.steps:,} steps of {t.batch} images{epochs}.")
    lines += [f"note: {note}" for note in notes]
    lines.append("Nothing was trained.")
    return "\n".join(lines)
