"""Denoiser: any network, on any schedule, with any prediction, seen as E[x0 | x_t]."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..diffusion.level import PREDICTIONS, TARGETS, Level
from ..diffusion.schedules import EDM, Schedule, ends_in_noise
from .blocks import Pass, in_bf16, in_float32

Mode = Literal["x0", "raw", "features", "both", "raw+features"]


class Denoiser(nn.Module):
    """D(x_t, level, cond) -> x0, where `level` may come from another schedule than the network's own.

    backbone: called as backbone(x, time, cond, mode) in the network's own scale; see networks/backbones.py.
    prediction: a row of the prediction table. data_std: EDM's sigma_data. time_scale: what the network's noise
    conditioning (its own time, or ln(sigma) / 4 for EDM) is multiplied by.
    precision: "fp32" or "bf16" for the arithmetic of the backbone's blocks, for good; its input and output layers are
    float32, and so are the x0 algebra and what leaves. `forward` is the only entry point, as a sharded module needs.
    running: which pass runs, or ran last.
    """

    running: Pass = "full"

    def __init__(
        self,
        backbone: nn.Module,
        schedule: Schedule,
        prediction: str,
        data_std: float = 0.5,
        time_scale: float = 1.0,
        precision: str = "fp32",
    ):
        super().__init__()
        if prediction not in PREDICTIONS:
            raise ValueError(f"prediction: {prediction!r} is not one of {', '.join(PREDICTIONS)}")
        if prediction == "edm" and not isinstance(schedule, EDM):
            raise ValueError(
                f"prediction: edm takes ln(sigma) for its time, so its schedule is edm, not {schedule.name}"
            )
        if prediction == "eps" and ends_in_noise(schedule):
            raise ValueError(
                f"prediction: eps says nothing of the image at alpha = 0, where the schedule {schedule.name} ends; "
                "v, x0 and flow do"
            )
        if precision not in ("fp32", "bf16"):
            raise ValueError(f"precision: {precision!r} is not one of fp32, bf16 (fp16 diverges: DMD2, appendix)")
        self.backbone, self.schedule, self.prediction = backbone, schedule, prediction
        self.data_std, self.time_scale, self._precision = data_std, time_scale, precision
        if precision == "bf16":
            in_bf16(backbone)

    @property
    def precision(self) -> str:
        """Of the blocks: "fp32" or "bf16"."""
        return self._precision

    def float(self) -> Denoiser:
        """Blocks compute in float32 from now on, whatever they did before, and so are all parameters."""
        in_float32(self.backbone)
        self._precision = "fp32"
        return super().float()

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of one sample."""
        return self.backbone.shape

    @property
    def classes(self) -> int | None:
        """Number of class labels, the null class not counted; None for a network without labels."""
        return self.backbone.classes

    @property
    def null(self) -> int | None:
        """Index of the null class, `classes` by convention; None for a network that has none."""
        return getattr(self.backbone, "null", self.classes)

    def own(self, level: Level, ndim: int) -> tuple[Level, Tensor]:
        """The level of the same angle on the network's own schedule, and its time (B,) float64.

        A level that the network's own schedule made is returned as it is; any other is held within t_min and t_max.
        """
        if level.schedule == self.schedule:
            return level, level.t
        t = self.schedule.time(level.angle.flatten()).clamp(self.schedule.t_min, self.schedule.t_max)
        return self.schedule.level(t, ndim), t

    def conditioning(self, own: Level, t: Tensor) -> tuple[Tensor | float, Tensor]:
        """(factor on what enters the network, 1.0 for none; its noise conditioning (B,) float32) at its own level."""
        if self.prediction == "edm":
            scale = torch.rsqrt((own.alpha * self.data_std) ** 2 + own.sigma**2)
            return scale, (t.log() * (self.time_scale / 4)).float()
        return 1.0, (t * self.time_scale).float()

    def target(self, level: Level, x0: Tensor, eps: Tensor) -> Tensor:
        """What the network should predict (mode "raw") for x_t = alpha x0 + sigma eps, all (B, ...).

        The mean squared error to it is the published loss of each prediction. Nothing cancels in it near t = 0.
        """
        own, _ = self.own(level, level.alpha.ndim)
        of_x0, of_eps = TARGETS[self.prediction](own.alpha, own.sigma, self.data_std)
        return of_x0 * x0 + of_eps * eps

    def forward(self, x_t: Tensor, level: Level, cond: Any = None, mode: Mode = "x0"):
        """The network at x_t (B, ...); all that leaves is float32.

        mode: "x0": (B, ...). "raw": its own output F (B, ...), as `target` has it. "features": the bottleneck's
        (B, F, h, w), for a head; no decoder is run. "both": (x0, features). "raw+features": (F, features).
        """
        own, t = self.own(level, x_t.ndim)
        x_own = x_t if own is level else x_t * (own.norm / level.norm)
        scale, time = self.conditioning(own, t)
        entering = x_own * scale if isinstance(scale, Tensor) else x_own
        self.running = "no_grad" if not torch.is_grad_enabled() else "encoder" if mode == "features" else "full"
        with torch.autocast(x_t.device.type, enabled=False):  # a caller's region does not change what precision means
            out = self.backbone(entering, time, cond, {"raw": "x0", "raw+features": "both"}.get(mode, mode))
        if mode == "features":
            return out.float()
        f, features = out if isinstance(out, tuple) else (out, None)
        f = f.float()
        if mode in ("x0", "both"):
            c_skip, c_out = PREDICTIONS[self.prediction](own.alpha, own.sigma, self.data_std)
            f = c_skip * x_own + c_out * f
        return f if features is None else (f, features.float())


class Guided(nn.Module):
    """Classifier-free guidance by composition: x0 = uncond + scale (cond - uncond), both in one batch of 2B.

    scale: 1 is the conditional denoiser, and costs no second half. null: what stands for "no condition", by default the
    denoiser's null class. Linear in x0, hence equal to guidance on eps, v or F (Ho & Salimans 2022).
    """

    def __init__(self, denoiser: Denoiser, scale: float, null: Any = None):
        super().__init__()
        if null is None and getattr(denoiser, "null", denoiser.classes) is None:
            raise ValueError(
                f"guidance: {scale:g}, but this network has no null class; use guidance=1, or give the null condition"
            )
        self.denoiser, self.scale, self.null = denoiser, scale, null

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("denoiser"), name)

    def forward(self, x_t: Tensor, level: Level, cond: Any, mode: Mode = "x0") -> Tensor:
        if mode != "x0" or self.scale == 1:
            return self.denoiser(x_t, level, cond, mode)
        twice = level.map(lambda v: torch.cat([v.expand(len(x_t), *v.shape[1:])] * 2))
        null = torch.full_like(cond, self.denoiser.null) if self.null is None else self.null
        x0, x0_null = self.denoiser(torch.cat([x_t, x_t]), twice, _cat(cond, null)).chunk(2)
        return x0_null + self.scale * (x0 - x0_null)


def _cat(a: Any, b: Any) -> Any:
    if isinstance(a, dict):
        return {key: _cat(a[key], b[key]) for key in a}
    return torch.cat([a, b.expand(a.shape) if b.shape[0] == 1 else b])
