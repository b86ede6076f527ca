"""One-step diffusion with distribution matching distillation (DMD). Yin et al. 2024, arXiv:2311.18828."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field
from torch.nn import functional as F

from ..diffusion.perceptual import clean_maps, feature_distance
from ..diffusion.samplers import run_calls
from .base import Batch, Make, Nets, Terms
from .matching import DistributionMatching


class DMD(DistributionMatching):
    """DMD: the matching term, and a regression on pairs of a noise and the teacher's sample of it (eq. 9).

    The pairs come from jobs/pairs.py. Without the regression and with equal rates this is the arm that DMD2 found
    unstable. Departs from the paper: no alpha_t in the weight (as in DMD2's code); the distance is on features of the
    frozen teacher, or on pixels or a helper's features, not on LPIPS' network; images of pairs have 8 bits.
    """

    name: Literal["dmd"] = "dmd"
    critic_updates_per_student_update: Annotated[int, Field(ge=1)] = 1
    """Critic updates a student update."""
    regression_weight: Annotated[float, Field(ge=0)] = 0.25
    """Weight of the regression; 0 is distribution matching alone."""
    distance: Literal["teacher", "helper", "pixels"] = "teacher"
    """Distance of the regression: between features of the teacher or of `helpers.features`, or the mean squared error.
    """
    taps: tuple[str, ...] = ("middle",)
    """Names of the teacher's taps whose features are compared."""

    needs: ClassVar[tuple[str, ...]] = ("real", "noise")

    def nets(self, make: Make) -> dict[str, Any]:
        helper = {"features": make.helper("features")} if self.distance == "helper" else {}
        return super().nets(make) | helper

    def extra(self, nets: Nets, batch: Batch, match: Terms) -> Terms:
        if not self.regression_weight:
            return {}
        z, cond, target = batch.rows["noise"], batch.real_cond, batch.real
        x = run_calls(nets, self.calls(nets["student"]), z, cond, batch.draws)
        if self.distance == "pixels":
            return {"pair": self.regression_weight * F.mse_loss(x, target)}
        maps = (
            nets["features"] if self.distance == "helper" else lambda x: clean_maps(nets["teacher"], x, cond, self.taps)
        )
        return {"pair": self.regression_weight * feature_distance(maps(x), maps(target))}
