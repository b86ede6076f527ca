"""Optimisers: one a role, by name, its rate a function of (settings, step) and so no state."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import nn

from ..config import Strict


class Optim(Strict):
    """The optimiser of one role. Steps are the run's steps (critic updates), for every role."""

    kind: Literal["adamw", "adam", "sgd"] = "adamw"
    """Update rule; sgd has the momentum betas[0]."""

    lr: Annotated[float, Field(gt=0, lt=1)]
    """Learning rate after the warm-up."""
    clip: Annotated[float, Field(gt=0)] | None = 10.0
    """The role's gradient is clipped to this global L2 norm; null does not clip."""
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.999)
    """Moment decays of Adam and AdamW."""
    eps: Annotated[float, Field(gt=0)] = 1e-8
    """Denominator floor of Adam and AdamW."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    """Decoupled, on all parameters, as the published DMD2."""
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    """Steps of linear warm-up."""
    decay_from: Annotated[float, Field(ge=0, le=1)] = 1.0
    """Share of the run after which the rate falls linearly to `final`; 1 keeps it constant."""
    final: Annotated[float, Field(ge=0, le=1)] = 0.02
    """Rate at the end of the fall, as a share of lr."""

    def rate_at(self, step: int, steps: int) -> float:
        """Learning rate of step 0..steps-1 of a run of `steps`."""
        warm = min(1.0, (step + 1) / self.warmup_steps) if self.warmup_steps else 1.0
        start = self.decay_from * steps
        fall = 0.0 if step < start else (step - start) / max(steps - 1 - start, 1)
        return self.lr * warm * (1 - (1 - self.final) * fall)

    def build(self, net: nn.Module) -> torch.optim.Optimizer:
        """The optimiser of a network's parameters; the caller sets its rate at each step."""
        # fused: one kernel, which scales the gradients and cancels an update without asking the device
        params, shared = net.parameters(), {"lr": 0.0, "weight_decay": self.weight_decay, "fused": True}
        if self.kind == "sgd":
            return torch.optim.SGD(params, momentum=self.betas[0], **shared)
        rule = torch.optim.AdamW if self.kind == "adamw" else torch.optim.Adam
        return rule(params, betas=self.betas, eps=self.eps, **shared)


def grad_norms(nets: Iterable[nn.Module], device: torch.device) -> torch.Tensor:
    """Global L2 norm of each network's gradients, (N,) on the device; 0 for one without gradients."""
    norms = []
    for net in nets:
        grads = [p.grad for p in net.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(grads) if grads else torch.zeros((), device=device)
        norms.append(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)
    return torch.stack(norms)
