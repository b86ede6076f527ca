"""Extra scalars of a network, such as a guidance scale: their embeddings, and the sum that a pass adds to its time
embedding."""

from __future__ import annotations

from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn

FREQUENCIES = (1, 2, 4, 8, 16, 32)

# What the pass that runs adds to its time embedding, (B, W). A context variable: a recomputed block reads it again
_SHIFT: ContextVar[Tensor | None] = ContextVar("shift", default=None)


class ScalarEmbedding(nn.Module):
    """A scalar (B,) -> (B, width), zero until it is trained."""

    def __init__(self, width: int, hidden: int = 128):
        super().__init__()
        self.hidden = nn.Linear(1 + 2 * len(FREQUENCIES), hidden)
        self.out = nn.Linear(hidden, width)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, value: Tensor) -> Tensor:
        waves = [g(k * value) for k in FREQUENCIES for g in (torch.sin, torch.cos)]
        return self.out(nn.functional.silu(self.hidden(torch.stack([value, *waves], 1))))


class shifted:
    """Context in which time embeddings have the shift added; None adds nothing."""

    def __init__(self, shift: Tensor | None):
        self.shift = shift

    def __enter__(self) -> None:
        self.token = _SHIFT.set(self.shift)

    def __exit__(self, *error: Any) -> None:
        _SHIFT.reset(self.token)


def add_shift(embedder: nn.Module, args: tuple[Any, ...], out: Tensor) -> Tensor | None:
    """Forward hook of a module that computes time embeddings (B, W)."""
    shift = _SHIFT.get()
    return None if shift is None else out + shift.to(out.dtype)
