"""Ray Train's trainer for clusters without a dashboard, and for private clusters whose ranks meet without a socket.

It replaces two parts. PlacementGroupCleaner asks a dashboard if the run's controller is alive; without a dashboard it
may ask that of another cluster on the machine, which does not know the controller. torch's TCPStore listens on every
address.
"""

from __future__ import annotations

import tempfile
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray._raylet import PlacementGroupID
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.torch.config import _set_torch_distributed_env_vars, _setup_torch_process_group, _TorchBackend
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2._internal.execution.callback import WorkerGroupCallback
from ray.util.placement_group import PlacementGroup, remove_placement_group

from .session import is_private, own_folder


class Trainer(TorchTrainer):
    """A TorchTrainer that frees the workers' resources itself if its controller dies."""

    def _create_default_callbacks(self) -> list[Any]:
        return [c for c in super()._create_default_callbacks() if not isinstance(c, PlacementGroupCleanerCallback)]

    def _initialize_and_run_controller(self, **settings: Any) -> Any:
        with tempfile.TemporaryDirectory(prefix="fewstep-") as folder:  # the controller runs on this node
            note = Path(folder) / "placement_group"
            settings["callbacks"].append(_NotePlacementGroup(note))
            try:
                return super()._initialize_and_run_controller(**settings)
            except ray.exceptions.RayActorError:
                if note.exists():
                    remove_placement_group(PlacementGroup(PlacementGroupID(bytes.fromhex(note.read_text()))))
                raise


class _NotePlacementGroup(WorkerGroupCallback):
    """Writes the id of the workers' placement group to a file, in hexadecimal digits."""

    def __init__(self, file: Path):
        self.file = file

    def after_worker_group_start(self, worker_group: Any) -> None:
        group = worker_group.get_worker_group_state().placement_group_handle.placement_group
        self.file.write_text(group.id.hex())


class OnWorkers(WorkerGroupCallback):
    """Calls `act` on the main thread of every worker when it starts; training runs on another thread."""

    def __init__(self, act: Callable[[], None]):
        self.act = act

    def after_worker_group_start(self, worker_group: Any) -> None:
        worker_group.execute(self.act)


def torch_config(**settings: Any) -> TorchConfig:
    """Returns Ray Train's settings of torch.distributed for the cluster of this process."""
    if not is_private():
        return TorchConfig(**settings)
    return _FileConfig(**settings, folder=str(own_folder()))


@dataclass
class _FileConfig(TorchConfig):
    """Settings for ranks of one machine, which meet through a file in `folder` that only this user can enter."""

    folder: str = ""

    @property
    def backend_cls(self) -> type[_TorchBackend]:
        return _FileBackend


class _FileBackend(_TorchBackend):
    def on_start(self, worker_group: Any, backend_config: _FileConfig) -> None:
        self.file = Path(backend_config.folder) / f"ranks-{uuid.uuid4().hex}"
        worker_group.execute(_set_torch_distributed_env_vars)
        ray.get(
            [
                worker_group.execute_single_async(
                    rank,
                    _setup_torch_process_group,
                    backend=backend_config.backend,
                    world_rank=rank,
                    world_size=len(worker_group),
                    init_method=f"file://{self.file}",
                    timeout_s=backend_config.timeout_s,
                )
                for rank in range(len(worker_group))
            ]
        )

    def on_shutdown(self, worker_group: Any, backend_config: _FileConfig) -> None:
        try:
            super().on_shutdown(worker_group, backend_config)
        finally:
            self.file.unlink(missing_ok=True)
