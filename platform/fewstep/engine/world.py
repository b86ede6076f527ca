"""World: which rank we are, on which device, and how a network is laid out over the ranks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

Placement = Literal["replicate", "shard"]


@dataclass(frozen=True)
class World:
    """rank of size, and this rank's device. `World()` is one process on the CPU; `current` asks torch.distributed."""

    rank: int = 0
    size: int = 1
    device: torch.device = torch.device("cpu")
    placement: Placement = "replicate"

    @classmethod
    def current(cls, device: torch.device | str = "cpu", placement: Placement = "replicate") -> World:
        device = torch.device(device)
        if not dist.is_initialized():
            return cls(device=device, placement=placement)
        return cls(dist.get_rank(), dist.get_world_size(), device, placement)

    def place(self, net: nn.Module) -> nn.Module:
        """The network on our device, its parameters laid out over the ranks by FSDP2's fully_shard.

        One wrapper serves both placements: replication is a mesh (size, 1), sharding is (1, size). One rank needs none.
        """
        net = net.to(self.device)
        if self.size == 1:
            return net
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        shape = (self.size, 1) if self.placement == "replicate" else (1, self.size)
        mesh = init_device_mesh(self.device.type, shape, mesh_dim_names=("replicate", "shard"))
        return fully_shard(net, mesh=mesh)

    def reshard(self, net: nn.Module) -> None:
        """Lays a network's parameters out again as `place` did. A pass without gradients leaves them whole on each
        rank, and an optimiser, an average or a change of requires_grad would miss the ones that last."""
        if self.size > 1:
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

    def barrier(self) -> None:
        if self.size > 1:
            dist.barrier()


def full(tensor: Tensor) -> Tensor:
    """A sharded tensor whole (a collective: every rank calls it), any other as it is."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
