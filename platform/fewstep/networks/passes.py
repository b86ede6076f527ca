"""The compute of a training step in forward passes of the teacher, one sample each."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from .denoiser import Denoiser
from .lora import Lora, active

ENCODER = 0.4  # of a pass that leaves at a tap; 0.27 to 0.43 of the published UNets


class Passes:
    """Counts the passes of denoisers while it is entered, in units of one sample's forward pass.

    A pass whose output has a graph counts its backward pass, too: twice the forward one where the network trains, once
    where the graph only runs through it. A pass for features alone counts `ENCODER`. Heads and helpers count nothing. A
    network of another size than the teacher's counts as one of its size.
    """

    def __init__(self, nets: Mapping[str, nn.Module]):
        self.nets, self.count = [net for net in nets.values() if isinstance(net, Denoiser | Lora)], 0.0

    def __enter__(self) -> Passes:
        self.handles = [net.register_forward_hook(self._count_pass, with_kwargs=True) for net in self.nets]
        return self

    def __exit__(self, *error: Any) -> None:
        for handle in self.handles:
            handle.remove()

    def _count_pass(self, net: nn.Module, args: Any, kwargs: Mapping[str, Any], out: Any) -> None:
        if isinstance(net, Denoiser) and active() is not None:
            return  # the adapter's own pass, which counts as the adapter's
        mode = args[3] if len(args) > 3 else kwargs.get("mode", "x0")
        first = out
        while isinstance(first, tuple):
            first = first[0]
        trains = any(p.requires_grad for p in net.parameters())
        cost = 1.0 + (0 if not torch.is_tensor(first) or not first.requires_grad else 2 if trains else 1)
        self.count += len(args[0]) * cost * (ENCODER if mode == "features" else 1.0)
