"""World: which rank we are, on which device, and how a network is laid out over the ranks."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..config import Strict
from ..networks.blocks import Pass, blocks, checkpoint_activations, compile_passes, store_in, units
from ..networks.lora import Lora
from ..networks.weights import fill
from ..texts import quoted

Placement = Literal["replicate", "shard", "hybrid"]
Kind = Literal["trained", "averaged", "frozen"]


class Layout(Strict):
    """Layout of networks over the ranks, and trades between memory and speed."""

    placement: Placement = "replicate"
    """Networks whole on each worker, sharded over all, or sharded inside a node and replicated across (hybrid)."""
    teacher_placement: Placement | None = None
    """Placement of the teacher and other frozen networks; null: as the others."""
    checkpoint_activations: bool = False
    """Networks keep the inputs of their blocks only, and run each block again in the backward pass: about a third more
    arithmetic for a fraction of the memory."""
    offload_average: bool = False
    """The averaged weights live on the CPU, and visit the device a block at a time when they are sampled."""
    compile: list[Pass] = []
    """Passes in which torch.compile optimises the blocks: full, encoder (what the GAN head sees), no_grad (teacher,
    matching). On CUDA; the CPU compiles none."""

    def of(self, kind: Kind) -> Placement:
        """The placement of networks of a kind; all frozen ones go with the teacher."""
        return (self.teacher_placement or self.placement) if kind == "frozen" else self.placement


@dataclass(frozen=True)
class World:
    """rank of size, and this rank's device. `World()` is one process on the CPU; `current` asks torch.distributed.

    local_size: ranks of a node, the same on all; None stands for all ranks. Raises ValueError for a hybrid placement
    that does not fill its nodes.
    """

    rank: int = 0
    size: int = 1
    device: torch.device = torch.device("cpu")
    layout: Layout = Layout()
    local_size: int | None = None
    _meshes: dict[Placement, Any] = field(default_factory=dict, init=False, repr=False, compare=False)
    _frozen: list[nn.Module] = field(default_factory=list, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        local = self.local_size or self.size
        if "hybrid" in (self.layout.placement, self.layout.of("frozen")) and self.size % local:
            raise ValueError(
                f"cluster.placement: hybrid needs nodes of equally many workers, but {self.size} workers are no "
                f"multiple of the {local} on this node; choose cluster.workers so, or cluster.placement=shard"
            )

    @classmethod
    def current(cls, device: torch.device | str = "cpu", layout: Layout | None = None) -> World:
        """This process as torch.distributed knows it. Whoever starts the workers of a node sets LOCAL_WORLD_SIZE to
        their number (Ray Train and torchrun do); without it there is one node."""
        device, layout = torch.device(device), layout or Layout()
        if not dist.is_initialized():
            return cls(device=device, layout=layout)
        size = dist.get_world_size()
        return cls(dist.get_rank(), size, device, layout, int(os.environ.get("LOCAL_WORLD_SIZE", size)))

    def place(self, net: nn.Module, kind: Kind = "trained") -> nn.Module:
        """A network on our device, its parameters laid out over the ranks; call it once, after all copies. One that is
        still to be filled gets its weights now, of which each rank reads its own shards.

        A frozen network in bf16 has its blocks stored so. An adapter is laid out whole, and its base as the frozen
        network that it is, once for all who use it. One wrapper serves every placement: FSDP2's
        fully_shard of each block and then the root, on a mesh (replicas, shards); it moves one block at a time to the
        device. Blocks of a bf16 network are gathered in bfloat16 and their gradients reduced in float32; its root and
        the GAN heads stay float32. A process without torch.distributed needs no wrapper.
        """
        layout, averaged = self.layout, kind == "averaged"
        if isinstance(net, Lora):
            self.place(net.base, "frozen")
        if kind == "frozen":
            if any(net is placed for placed in self._frozen):
                return net
            self._frozen.append(net)
        half = getattr(net, "precision", "fp32") == "bf16"
        offload = averaged and layout.offload_average
        if offload and not dist.is_initialized():
            raise ValueError(
                "cluster.offload_average: true needs torch.distributed, which this process has not initialised; start "
                "the run through jobs/distill.py, or set cluster.offload_average=false"
            )
        if kind == "frozen":
            net.requires_grad_(False)
            if half:
                for block in blocks(net):
                    store_in(block, torch.bfloat16)
        if layout.checkpoint_activations and not averaged:
            checkpoint_activations(net)  # the teacher too: adapters train through it
        if layout.compile and self.device.type == "cuda" and not averaged:
            compile_passes(net, layout.compile)
        placement = layout.of(kind)
        if self.size > 1 or (dist.is_initialized() and (placement != "replicate" or offload)):
            return fill(self._shard(net, placement, half, offload), "cpu" if offload else self.device)
        fill(net, self.device)
        there = all(value.device == self.device for value in (*net.parameters(), *net.buffers()))
        return net if there else net.to(self.device)

    def _shard(self, net: nn.Module, placement: Placement, half: bool, offload: bool) -> nn.Module:
        from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard

        policy = CPUOffloadPolicy(pin_memory=self.device.type == "cuda") if offload else OffloadPolicy()
        lay = {"mesh": self._mesh(placement), "offload_policy": policy}
        # inputs are cast where the block runs: a cast of all would round the times, too
        narrow = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
        for unit in units(net):
            fully_shard(unit, **lay, mp_policy=narrow if half else MixedPrecisionPolicy())
        return fully_shard(net, **lay)

    def _mesh(self, placement: Placement) -> Any:
        """The (replicas, shards) device mesh of a placement, one for all networks: each has process groups."""
        if placement not in self._meshes:
            from torch.distributed.device_mesh import init_device_mesh

            shards = {"replicate": 1, "shard": self.size, "hybrid": self.local_size or self.size}[placement]
            shape, names = (self.size // shards, shards), ("replicate", "shard")
            self._meshes[placement] = init_device_mesh(self.device.type, shape, mesh_dim_names=names)
        return self._meshes[placement]

    def reshard(self, net: nn.Module) -> None:
        """Lays a network's parameters out again as `place` did. A pass without gradients leaves them whole on each
        rank, and an optimiser, an average or a change of requires_grad would miss the ones that last."""
        if isinstance(net, Lora):
            self.reshard(net.base)
        if hasattr(net, "reshard"):
            for module in net.modules():
                if hasattr(module, "reshard"):
                    module.reshard()

    def any(self, flag: Tensor) -> Tensor:
        """0-d float, 1 where any rank's flag is not 0: ranks must agree before an optimiser steps."""
        if self.size > 1:
            dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        return flag

    def mean(self, values: Tensor) -> Tensor:
        """Average over ranks, in place."""
        if self.size > 1:
            dist.all_reduce(values)
            values /= self.size
        return values

    def gather(self, values: dict[str, float]) -> dict[str, float]:
        """The mappings of all ranks in one; of a name that several ranks give, the last rank's value."""
        if self.size == 1:
            return values
        gathered: list[dict[str, float]] = [{}] * self.size
        dist.all_gather_object(gathered, values)
        return {name: value for of_rank in gathered for name, value in of_rank.items()}

    def barrier(self) -> None:
        if self.size > 1:
            dist.barrier()


def full(tensor: Tensor) -> Tensor:
    """A sharded tensor whole (a collective: every rank calls it), any other as it is. A shard that lives on the CPU is
    gathered on the device that its ranks talk through."""
    if not hasattr(tensor, "full_tensor"):
        return tensor
    return tensor.to(tensor.device_mesh.device_type).full_tensor()


def device_of(name: str, field: str = "device") -> torch.device:
    """The device that a setting names: cpu, cuda or cuda:1. Raises ValueError where this process has no such device."""
    if not re.fullmatch(r"cpu|cuda(:\d{1,3})?", name):
        raise ValueError(f"{field}: {quoted(name)} is no device; give cpu, cuda or cuda:1")
    device = torch.device(name)
    count = torch.cuda.device_count() if device.type == "cuda" else 0
    if device.type == "cuda" and (device.index or 0) >= count:
        have = f"{count} GPU{'s' if count > 1 else ''}" if count else "no GPU that torch can use"
        raise ValueError(f"{field}: {name}, but this machine has {have}; give {field}=cpu" + ", or cuda" * (count > 0))
    return device
