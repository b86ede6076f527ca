"""HiPA: enabling one-step text-to-image diffusion models via high-frequency-promoting adaptation. Zhang & Hooi 2023,
arXiv:2311.18158.

One call of a diffusion model lacks high frequencies mostly. An adapter is fitted to the teacher's samples of the same
noise by a perceptual loss, and by one on high frequencies and edges.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch.nn import functional as F

from ..diffusion.draws import INDICES
from ..diffusion.frequency import edges, high_energy, high_pass
from ..diffusion.health import statistics
from ..diffusion.perceptual import clean_maps, feature_distance
from ..diffusion.samplers import Call, calls_at, run_calls
from .base import Batch, Index, Make, Method, Nets, Phase, Terms


class HiPA(Method):
    """Regression on pairs of jobs/pairs.py; `roles: {student: {lora: {...}}}` makes the student the published adapter.

    Known of the paper: an adapter, a spatial perceptual loss, and a loss on Fourier's high frequencies and edges. All
    formulas, the cut and the weight are proposed: the spatial loss is a distance of the frozen teacher's features, and
    the mean absolute difference of pixels.
    """

    name: Literal["hipa"] = "hipa"
    high_weight: Annotated[float, Field(ge=0)] = 1.0
    """Weight of the loss on high frequencies and edges; 0 is plain regression."""
    cut: Annotated[float, Field(gt=0, le=0.5)] = 0.125
    """Frequency in cycles a pixel above which content counts as high."""
    taps: tuple[str, ...] = ("middle",)
    """Names of the teacher's taps whose features are compared."""
    conditioning: Index = INDICES - 1
    """Level at which the student is called, in thousandths."""

    needs: ClassVar[tuple[str, ...]] = ("real", "noise")
    headline: ClassVar[tuple[str, ...]] = ("student/spatial", "health/high_energy_ratio")

    def nets(self, make: Make) -> dict[str, Any]:
        return {"teacher": make.teacher, "student": make.copy("student")}

    def phases(self) -> tuple[Phase, ...]:
        return (Phase("student", ("student",), self.loss),)

    def calls(self, net: Any) -> tuple[Call, ...]:
        return calls_at(net.schedule, (self.conditioning / (INDICES - 1),), on_ramp=True)

    def loss(self, nets: Nets, batch: Batch) -> tuple[Terms, Terms]:
        target, cond = batch.real, batch.real_cond
        x = run_calls(nets, self.calls(nets["student"]), batch.rows["noise"], cond, batch.draws)
        maps, wanted = (clean_maps(nets["teacher"], images, cond, self.taps) for images in (x, target))
        terms = {"spatial": feature_distance(maps, wanted) + F.l1_loss(x, target)}
        if self.high_weight:
            fourier = F.l1_loss(high_pass(x, self.cut), high_pass(target, self.cut))
            terms["high"] = self.high_weight * (fourier + F.l1_loss(edges(x), edges(target))) / 2
        with torch.no_grad():
            ratio = high_energy(x, self.cut) / high_energy(target, self.cut).clamp_min(1e-12)
        return terms, statistics(x, target) | {"high_energy_ratio": ratio}
