"""Backbones: diffusers models behind one call, backbone(x, time, cond, mode), with features at the bottleneck."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class _Leave(Exception):
    """Ends a forward pass at the bottleneck, carrying its features. Exact under FSDP2, before or after sharding."""

    def __init__(self, features: Tensor):
        self.features = features


class Backbone(nn.Module):
    """A model and the module whose output is its bottleneck.

    model: a diffusers model. at: the dotted name of the bottleneck module inside it. shape: (C, H, W) of one sample.
    classes: number of labels without the null class, None for none. Subclasses say how the model is called.
    """

    def __init__(self, model: nn.Module, at: str, shape: tuple[int, int, int], classes: int | None):
        super().__init__()
        self.model, self.at, self.shape, self.classes = model, at, tuple(shape), classes
        self._tapped: Tensor | None = None
        self._leave = False
        model.get_submodule(at).register_forward_hook(self._tap)

    def _tap(self, module: nn.Module, args: Any, out: Any) -> None:
        features = self.as_map(out[0] if isinstance(out, tuple) else out)
        if self._leave:
            raise _Leave(features)
        self._tapped = features

    def as_map(self, features: Tensor) -> Tensor:
        """The bottleneck's output as (B, F, h, w)."""
        return features

    def call(self, x: Tensor, time: Tensor, cond: Any) -> Tensor:
        """The model's prediction (B, C, H, W)."""
        raise TypeError(f"{type(self).__name__} does not say how its model is called")

    def forward(self, x: Tensor, time: Tensor, cond: Any, mode: str) -> Any:
        if mode == "features":
            self._leave = True
            try:
                self.call(x, time, cond)
            except _Leave as leave:
                return leave.features
            finally:
                self._leave = False
            raise RuntimeError(f"backbone: module {self.at!r} was not reached, so there are no features")
        out = self.call(x, time, cond)
        features, self._tapped = self._tapped, None  # held no longer than the pass: it carries a graph
        return (out, features) if mode == "both" else out


def labels_of(cond: Tensor | None, batch: Tensor, classes: int | None) -> Tensor | None:
    """Labels for a class-conditional model: None is the null class for each sample."""
    if classes is None:
        return None
    if cond is None:
        return torch.full((batch.shape[0],), classes, device=batch.device)
    return cond


class UNet(Backbone):
    """diffusers UNet2DModel, class labels or none.

    patch: p x p pixels are folded into channels before the model and unfolded behind it, which on CPUs buys more quality a
    second than full resolution does (1.2 times at 28 x 28 for the same parameters).
    """

    def __init__(self, model: nn.Module, classes: int | None = None, patch: int = 1):
        config = model.config
        size = config.sample_size if isinstance(config.sample_size, (tuple, list)) else [config.sample_size] * 2
        shape = (config.out_channels // patch**2, size[0] * patch, size[1] * patch)
        super().__init__(model, "mid_block", shape, classes)
        self.patch = patch

    def call(self, x: Tensor, time: Tensor, cond: Any) -> Tensor:
        x = F.pixel_unshuffle(x, self.patch) if self.patch > 1 else x
        out = self.model(x, time, class_labels=labels_of(cond, x, self.classes), return_dict=False)[0]
        return F.pixel_shuffle(out, self.patch) if self.patch > 1 else out


class TextUNet(Backbone):
    """diffusers UNet2DConditionModel; cond: {"text": (B, L, D)} and for SDXL also "pooled" (B, P) and "time_ids" (B, 6)."""

    def __init__(self, model: nn.Module):
        config = model.config
        size = config.sample_size if isinstance(config.sample_size, (tuple, list)) else [config.sample_size] * 2
        super().__init__(model, "mid_block", (config.in_channels, *size), None)

    def call(self, x: Tensor, time: Tensor, cond: dict[str, Tensor]) -> Tensor:
        added = None
        if "pooled" in cond:
            added = {"text_embeds": cond["pooled"], "time_ids": cond["time_ids"]}
        return self.model(
            x, time, encoder_hidden_states=cond["text"], added_cond_kwargs=added, return_dict=False
        )[0]


class Transformer(Backbone):
    """diffusers DiTTransformer2DModel, class labels; the bottleneck is its middle block, tokens laid out as a map."""

    def __init__(self, model: nn.Module):
        config = model.config
        blocks = len(model.transformer_blocks)
        self_shape = (config.in_channels, config.sample_size, config.sample_size)
        super().__init__(model, f"transformer_blocks.{blocks // 2}", self_shape, config.num_embeds_ada_norm)

    def as_map(self, features: Tensor) -> Tensor:
        side = self.shape[1] // self.model.config.patch_size
        return features.transpose(1, 2).unflatten(2, (side, side))

    def call(self, x: Tensor, time: Tensor, cond: Any) -> Tensor:
        labels = labels_of(cond, x, self.classes)
        out = self.model(x, timestep=time, class_labels=labels, return_dict=False)[0]
        return out[:, : x.shape[1]]  # a model that also predicts the variance puts it behind
