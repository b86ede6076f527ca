"""SwiftBrush: one-step text-to-image diffusion model with variational score distillation. Nguyen & Tran 2023,
arXiv:2312.05239. With the clamped loss of SwiftBrush v2, Dao et al. 2024, arXiv:2408.14176.

No images: the student is the scene of text-to-3D's score distillation, and an adapter of the teacher its critic.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from ..diffusion.draws import noised
from ..diffusion.guidance import choose, guided
from ..diffusion.level import Level
from ..diffusion.losses import clamped
from .base import Batch, Make, Nets, Terms
from .matching import DistributionMatching


class SwiftBrush(DistributionMatching):
    """One-step student of a guided teacher and an equally guided critic, updated in turn on the same samples.

    `roles: {fake: {lora: {...}}}` makes the critic the published adapter; without it the critic is a whole copy. v2 is
    `alignment_weight` on a student with an adapter, and then the mean of two students (jobs/merge.py).
    Read in the published code: weights, levels, guidance of both. Departs from it: the condition is dropped a sample
    and not a batch; other schedules than DDPM's take the weights of the variance-preserving level of equal angle; the
    clamped loss asks a helper's score of image and class, and its weight falls linearly (the shape is proposed).
    """

    name: Literal["swiftbrush"] = "swiftbrush"
    critic_updates_per_student_update: Annotated[int, Field(ge=1)] = 1
    """Critic updates a student update."""
    guidance: Annotated[float, Field(ge=1)] = 4.5
    """Guidance scale of both, the teacher and the critic."""
    drop_condition: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Probability that the critic learns without the condition, which its guidance needs."""
    alignment_weight: Annotated[float, Field(ge=0)] = 0.0
    """Weight of v2's clamped loss at the start of the run; it falls to 0 at the end. Needs `helpers.reward`."""
    alignment_clamp: float = 0.35
    """Score from which on an image needs no more alignment: a cosine of CLIP (0.35), or a log-probability."""

    needs: ClassVar[tuple[str, ...]] = ()

    def nets(self, make: Make) -> dict[str, Any]:
        return super().nets(make) | ({"reward": make.helper("reward")} if self.alignment_weight else {})

    def scale(self, batch: Batch) -> float | Tensor:
        """Guidance scale of both scores: a number, or one a sample (B,)."""
        return self.guidance

    def scores(self, nets: Nets, batch: Batch, x_t: Tensor, level: Level) -> tuple[Tensor, Tensor]:
        given = (x_t, level, batch.cond, self.scale(batch), batch.null)
        return guided(nets["teacher"], *given), guided(nets["fake"], *given)

    def direction(self, x: Tensor, real: Tensor, fake: Tensor, level: Level) -> tuple[Tensor, Tensor]:
        """sigma^2 (eps_real - eps_fake), which on x0 is the weight alpha sigma; alpha and sigma of norm 1."""
        weight = (level.angle.sin() * level.angle.cos()).float()
        return weight * (fake - real), weight.flatten()

    def extra(self, nets: Nets, batch: Batch, match: Terms) -> Terms:
        if not self.alignment_weight:
            return {}
        weight = self.alignment_weight * (1 - batch.progress)
        return {"alignment": weight * clamped(nets["reward"](batch.x, batch.cond), self.alignment_clamp)}

    def critic_condition(self, batch: Batch) -> Any:
        if batch.null is None or not self.drop_condition:
            return batch.cond
        return choose(batch.draws.uniform("drop", len(batch.z)) < self.drop_condition, batch.null, batch.cond)

    def critic_loss(self, nets: Nets, batch: Batch) -> tuple[Terms, Terms]:
        """alpha^2 |eps_fake - eps|^2 by x0: the error in eps is alpha / sigma times that in x0."""
        x, fake = batch.x.detach(), nets["fake"]
        x_t, level, _ = noised(batch.draws, "critic", fake.schedule, x)
        weight = (level.angle.cos() ** 2 / level.angle.sin()).float()
        x0 = fake(x_t, level, self.critic_condition(batch))
        return {"denoise": F.mse_loss(weight * x0, weight * x)}, {}
