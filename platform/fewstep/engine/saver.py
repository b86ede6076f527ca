"""The saver: writes a run's checkpoints while training goes on, and removes old ones."""

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

from ..storage.place import Place, Ref
from ..texts import reason
from .checkpoint import Planner, Stager, Writer, named, tensors_of
from .folder import checkpoints, clear, remove, step_of
from .manifest import CheckpointError, read_manifest
from .retention import Keep
from .world import World


class Saver:
    """Saves a run's checkpoints while training goes on, and removes those that `keep` does not keep.

    folder: a path or URL that all ranks reach. Every rank makes a saver, and all call `save` and `wait` together. The
    collectives of a save run at the same time as those of the training, so they have an own process group.
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
        """Starts to write a checkpoint and returns its path or URL; a collective.

        It first waits for the checkpoint before it, and returns once the tensors are copied. manifest: step, images,
        updates and recipe (the settings that change the numbers), and other JSON values that a resumed run needs.
        Raises CheckpointError on all ranks if the checkpoint before it failed.
        """
        self.wait()
        manifest = json.loads(json.dumps(manifest))  # a copy, because the run changes its own
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
        """Waits until the checkpoint is complete. Raises CheckpointError on all ranks if it failed."""
        if self._future is not None:
            error, self._future = _failure(self._path, self._future), None
            if error is not None:
                raise error

    @property
    def failed(self) -> CheckpointError | None:
        """The error that `wait` would raise now, or None. It does not wait."""
        return _failure(self._path, self._future) if self._future is not None and self._future.done() else None

    def pending(self, step: int) -> None:
        """Keeps this step's checkpoint until `scored` is called for it. A restart drops both mark and scoring."""
        self._pending.add(step)

    def scored(self, step: int, value: float) -> None:
        """Records the score of a step's checkpoint for `keep_best`. Rank 0's counts. Any thread may call it."""
        if self.world.rank == 0:
            self._scores[step] = value
            self.folder.make()
            (self.folder / "scores.json").write(json.dumps({str(k): v for k, v in self._scores.items()}).encode())
        self._pending.discard(step)

    def remove_after(self, step: int) -> None:
        """Removes the checkpoints after `step`, when a run rolls back to it. Every rank calls it."""
        self.wait()
        if self.world.rank == 0:
            for path in checkpoints(self.folder.ref):
                if step_of(path) > step:
                    remove(Place.of(path))
        self.world.barrier()

    def _prune(self) -> None:
        """Removes checkpoints that `keep` does not keep. The coordinator calls it after a checkpoint is visible."""
        paths = {step_of(path): path for path in checkpoints(self.folder.ref)}
        if self.keep.every_images:
            for step in paths.keys() - self._images.keys():
                self._images[step] = read_manifest(paths[step])["images"]
        images = {step: self._images.get(step, 0) for step in paths}
        for step in paths.keys() - self.keep.choose(images, self._scores, self._pending):
            remove(Place.of(paths[step]))


def _failure(path: Place, future: Future) -> CheckpointError | None:
    """Waits for a checkpoint and returns its error, or None if it was written."""
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
        "Repair that or choose another place with storage=..., and start again"
    )
