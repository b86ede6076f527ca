"""Learning transferable visual models from natural language supervision (CLIP). Radford et al. 2021, arXiv:2103.00020.

Trains a text encoder and an image encoder together, from random weights, so that a picture is near its caption.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from torch.nn import functional as F

from .base import Batch, Make, Method, Nets, Phase, Terms


class Contrastive(Method):
    """Each picture is matched with its caption among those of its micro-batch, and each caption with its picture."""

    name: Literal["contrastive"] = "contrastive"

    needs: ClassVar[tuple[str, ...]] = ("real", "caption")
    needs_teacher: ClassVar[bool] = False
    generates: ClassVar[bool] = False
    frozen: ClassVar[tuple[str, ...]] = ()
    headline: ClassVar[tuple[str, ...]] = ("health/right",)

    def nets(self, make: Make) -> dict[str, Any]:
        return {"student": make.teacher}

    def phases(self) -> tuple[Phase, ...]:
        return (Phase("contrastive", ("student",), self.loss),)

    def loss(self, nets: Nets, batch: Batch) -> tuple[Terms, Terms]:
        logits = nets["student"](batch.real, batch.rows["caption"])  # pictures down, captions across
        own = torch.arange(len(logits), device=logits.device)
        terms = {"picture": F.cross_entropy(logits, own) / 2, "caption": F.cross_entropy(logits.T, own) / 2}
        return terms, {"right": (logits.detach().argmax(1) == own).float().mean()}
