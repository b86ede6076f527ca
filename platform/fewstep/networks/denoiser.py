"""Denoiser: any network, on any schedule, with any prediction, seen as E[x0 | x_t]."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from ..diffusion.level import PREDICTIONS, TARGETS, Level
from ..diffusion.schedules import EDM, Schedule, ends_in_noise
from .blocks import Pass, in_bf16, in_float32
from .conditions import Conditions, Labels, Nothing
from .extras import ScalarEmbedding
from .lora import active

Mode = Literal["x0", "raw", "features", "both", "raw+features"]


class Codec(Protocol):
    """Pictures of latents; see networks/latents.py."""

    def shape_of(self, latent: tuple[int, int, int]) -> tuple[int, int, int]: ...

    def decode(self, latents: Tensor) -> Tensor: ...


class Denoiser(nn.Module):
    """D(x_t, level, cond) -> x0, where `level` may come from another schedule than the network's own.

    backbone: called as backbone(x, time, cond, mode, at, shift) in the network's own scale; see networks/backbones.py.
    prediction: a row of the prediction table. data_std: EDM's sigma_data. time_scale: what the network's noise
    conditioning (its own time, or ln(sigma) / 4 for EDM) is multiplied by.
    precision: "fp32" or "bf16" for the arithmetic of the backbone's blocks, for good; its input and output layers are
    float32, and so are the x0 algebra and what leaves. `forward` is the only entry point, as a sharded module needs.
    running: which pass runs, or ran last. codec: of a network of latents, which copies share; None for one of pixels.
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
        self.extras, self._conditions = nn.ModuleDict(), None
        self.codec: Codec | None = None
        if precision == "bf16":
            in_bf16(backbone)

    @property
    def precision(self) -> str:
        """Arithmetic of the blocks: "fp32" or "bf16"."""
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
    def picture_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of one sample's picture."""
        return self.shape if self.codec is None else self.codec.shape_of(self.shape)

    def pictures(self, x0: Tensor) -> Tensor:
        """Pictures (B, C, H, W), about [-1, 1], of samples: the samples themselves, or what the codec makes of them."""
        return x0 if self.codec is None else self.codec.decode(x0)

    @property
    def classes(self) -> int | None:
        """Number of class labels, the null class not counted; None for a network without labels."""
        return self.backbone.classes

    @property
    def null(self) -> int | None:
        """Index of the null class, `classes` by convention; None for a network that has none."""
        return getattr(self.backbone, "null", self.classes)

    def own_level(self, level: Level, ndim: int) -> tuple[Level, Tensor]:
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
        """The training target of the network's own output (mode "raw") for x_t = alpha x0 + sigma eps, all (B, ...).

        The mean squared error to it is the published loss of each prediction. Nothing cancels in it near t = 0.
        """
        own, _ = self.own_level(level, level.alpha.ndim)
        of_x0, of_eps = TARGETS[self.prediction](own.alpha, own.sigma, self.data_std)
        return of_x0 * x0 + of_eps * eps

    @property
    def conditions(self) -> Conditions:
        """The conditions that the network takes: those that it was given, or by shape alone."""
        if self._conditions is not None:
            return self._conditions
        own = getattr(self.backbone, "conditions", None)
        if own is not None:
            return own
        return Nothing() if self.classes is None else Labels(self.classes, self.null)

    @conditions.setter
    def conditions(self, conditions: Conditions) -> None:
        self._conditions = conditions

    def add_extra(self, *names: str) -> Denoiser:
        """Gives the network further scalars, by name, through embeddings that have no effect until they are trained.

        Raises ValueError for a network whose time embedding is not known here.
        """
        width = self.backbone.time_width
        for name in names:
            self.extras[name] = ScalarEmbedding(width)
        return self

    def forward(
        self,
        x_t: Tensor,
        level: Level,
        cond: Any = None,
        mode: Mode = "x0",
        *,
        at: tuple[str, ...] = ("middle",),
        extra: Mapping[str, Tensor] = MappingProxyType({}),
    ):
        """The network at x_t (B, ...); all that leaves is float32.

        mode: "x0": (B, ...). "raw": its own output F (B, ...), as `target` has it. "features": a tuple of maps
        (B, F, h, w), one for each tap of `at`; the pass leaves at the last of them, so after "middle" no decoder is
        run. "both": (x0, features). "raw+features": (F, features). extra: further scalars (B,) by name, as `add_extra`
        has them.
        """
        own, t = self.own_level(level, x_t.ndim)
        x_own = x_t if own is level else x_t * (own.norm / level.norm)
        scale, time = self.conditioning(own, t)
        entering = x_own * scale if isinstance(scale, Tensor) else x_own
        self.running = "no_grad" if not torch.is_grad_enabled() else "encoder" if mode == "features" else "full"
        shift = self.shift(extra)
        with torch.autocast(x_t.device.type, enabled=False):  # a caller's region does not change what precision means
            own_mode = {"raw": "x0", "raw+features": "both"}.get(mode, mode)
            out = self.backbone(entering, time, cond, own_mode, at, shift)
        if mode == "features":
            return tuple(f.float() for f in out)
        f, features = out if isinstance(out, tuple) else (out, None)
        f = f.float()
        if mode in ("x0", "both"):
            c_skip, c_out = PREDICTIONS[self.prediction](own.alpha, own.sigma, self.data_std)
            f = c_skip * x_own + c_out * f
        return f if features is None else (f, tuple(f.float() for f in features))

    def shift(self, extra: Mapping[str, Tensor]) -> Tensor | None:
        """The sum (B, W) that extra scalars (B,) add to the time embedding; None without any.

        The embeddings are this network's and those of the adapter that runs. Raises ValueError for other names.
        """
        adapter = active()
        known = {**self.extras, **(adapter.extras if adapter is not None else {})}
        if unknown := extra.keys() - known.keys():
            takes = ", ".join(known) or "none"
            raise ValueError(f"extra: {', '.join(sorted(unknown))}; this network takes {takes}")
        shifts = [known[name](value.float()) for name, value in extra.items()]
        return torch.stack(shifts).sum(0) if shifts else None
