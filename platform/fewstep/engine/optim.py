"""Optimisers: AdamW a role, its rate a function of (settings, step) and so no state."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated

import torch
from pydantic import Field
from torch import nn

from ..config import Strict


class Optim(Strict):
    """AdamW for one role. Steps are the run's steps (critic updates), for every role."""

    lr: Annotated[float, Field(gt=0, lt=1)]
    """Learning rate after the warm-up."""
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.999)
    """AdamW's moment decays."""
    eps: Annotated[float, Field(gt=0)] = 1e-8
    """AdamW's denominator floor."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    """Decoupled, on all parameters, as the published DMD2."""
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    """Steps of linear warm-up."""
    decay_from: Annotated[float, Field(ge=0, le=1)] = 1.0
    """Share of the run after which the rate falls linearly to `final`; 1 keeps it constant."""
    final: Annotated[float, Field(ge=0, le=1)] = 0.02
    """Rate at the end of the fall, as a share of lr."""

    def at(self, step: int, steps: int) -> float:
        """Learning rate of step 0..steps-1 of a run of `steps`."""
        warm = min(1.0, (step + 1) / self.warmup_steps) if self.warmup_steps else 1.0
        start = self.decay_from * steps
        fall = 0.0 if step < start else (step - start) / max(steps - 1 - start, 1)
        return self.lr * warm * (1 - (1 - self.final) * fall)

    def build(self, net: nn.Module) -> torch.optim.AdamW:
        # fused: one kernel, and it takes `found_inf`, which cancels an update without asking the device
        return torch.optim.AdamW(
            net.parameters(), lr=0.0, betas=self.betas, eps=self.eps, weight_decay=self.weight_decay, fused=True
        )


def grad_norm(nets: Iterable[nn.Module], device: torch.device) -> torch.Tensor:
    """Global L2 norm of the gradients, a 0-d tensor on the device; 0 where nothing has a gradient."""
    grads = [p.grad for net in nets for p in net.parameters() if p.grad is not None]
    norm = torch.nn.utils.get_total_norm(grads) if grads else torch.zeros((), device=device)
    return norm.full_tensor() if hasattr(norm, "full_tensor") else norm
