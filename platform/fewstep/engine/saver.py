"""Saver: a run's checkpoints, written behind its training, and the retention of older ones."""

from __future__ import annotations

import json
from collections.abc import Mapping
from concurrent.futures import Future
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException

from ..texts import reason
from .checkpoint import Planner, Stager, Writer, named, tensors_of
from .folder import checkpoints, clear, remove, step_of
from .manifest import CheckpointError, read_manifest
from .retention import Keep
from .storage import Place, Ref
from .world import World


class Saver:
    """Saves a run's checkpoints behind its training, and removes those that need not be kept.

    folder: a path or URL that all ranks reach. Every rank makes one, and calls `save` and `wait` together; the
    collectives behind the training have a process group of their own, as they would get mixed up with the training's.
    """

    def __init__(self, folder: Ref, world: World | None = None, keep: Keep | None = None):
        self.folder, self.world, self.keep = Place.of(folder), world or World(), keep or Keep()
        together = dist.is_initialized() and dist.get_world_size() == self.world.size
        self._group = dist.new_group(backend="gloo") if together else None
        self._future: Future | None = None
        self._path = self.folder
        self._images: dict[int, int] = {}
        self._pending: set[int] = set()
        self._scores: dict[int, float] = {}
        if self.world.rank == 0:
            with named(self.folder):
                clear(self.folder)
            if (self.folder / "scores.json").is_file():
                self._scores = {int(step): s for step, s in json.loads((self.folder / "scores.json").read()).items()}

    def save(
        self,
        nets: Mapping[str, nn.Module],
        optims: Mapping[str, torch.optim.Optimizer],
        manifest: Mapping[str, Any],
    ) -> Ref:
        """Begins a checkpoint and returns where it will be; a collective. Waits for the one before it, and for copies.

        manifest: step, images, updates and recipe (what decides the numbers) of the run, and what else in JSON it needs
        to go on. Raises CheckpointError, on all ranks, if the one before it failed.
        """
        self.wait()
        manifest = json.loads(json.dumps(manifest))  # a copy: the run goes on
        self._path = self.folder / f"step-{manifest['step']:08d}"
        self._images[manifest["step"]] = manifest["images"]
        self._future = dcp.async_save(
            tensors_of(nets, optims),
            storage_writer=Writer(self._path, manifest, self.world, self._prune),
            planner=Planner(),
            process_group=self._group,
            async_stager=Stager(),
            no_dist=self._group is None,
        )
        return self._path.ref

    def wait(self) -> None:
        """Until the checkpoint that was begun is complete. Raises CheckpointError, on all ranks, if it failed."""
        if self._future is not None:
            error, self._future = _failure(self._path, self._future), None
            if error is not None:
                raise error

    @property
    def failed(self) -> CheckpointError | None:
        """What `wait` would raise, as far as it is known by now."""
        return _failure(self._path, self._future) if self._future is not None and self._future.done() else None

    def pending(self, step: int) -> None:
        """A score of this step's checkpoint is on its way: until it is there the checkpoint stays.

        A restart forgets this, as it does the scoring.
        """
        self._pending.add(step)

    def scored(self, step: int, value: float) -> None:
        """The score of this step's checkpoint, by which the best are kept; rank 0's counts. Any thread may call it."""
        if self.world.rank == 0:
            self._scores[step] = value
            self.folder.make()
            (self.folder / "scores.json").write(json.dumps({str(k): v for k, v in self._scores.items()}).encode())
        self._pending.discard(step)

    def remove_after(self, step: int) -> None:
        """Removes the checkpoints of later steps: of a course that the run has left. Every rank calls it."""
        self.wait()
        if self.world.rank == 0:
            for path in checkpoints(self.folder.ref):
                if step_of(path) > step:
                    remove(Place.of(path))
        self.world.barrier()

    def _prune(self) -> None:
        """Removes what need not be kept; on the coordinator, after a checkpoint has become visible."""
        found = {step_of(path): path for path in checkpoints(self.folder.ref)}
        if self.keep.every_images:
            for step in found.keys() - self._images.keys():
                self._images[step] = read_manifest(found[step])["images"]
        images = {step: self._images.get(step, 0) for step in found}
        for step in found.keys() - self.keep.choose(images, self._scores, self._pending):
            remove(Place.of(found[step]))


def _failure(path: Place, future: Future) -> CheckpointError | None:
    """Why a checkpoint was not written, once that is known; it waits."""
    try:
        future.result()
    except CheckpointException as error:
        who = "; ".join(f"rank {rank}: {wrapped[0]}" for rank, wrapped in sorted(error.failures.items()))
    except Exception as error:
        who = reason(error)
    else:
        return None
    return CheckpointError(
        f"{path}: not saved ({who}); the checkpoints before it are intact. "
        "Mend that, or let storage=... name another place, and start again"
    )
