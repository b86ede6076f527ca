"""Backbones: diffusers models behind one call, backbone(x, time, cond, mode), with features at the bottleneck."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..texts import quoted

ELEMENTS = 1 << 28  # most that one sample has; a picture of 4096 x 4096 has 2^25.6


class _Leave(Exception):
    """Ends a forward pass at the bottleneck."""


class Backbone(nn.Module):
    """A model and the module whose output is its bottleneck.

    model: a diffusers model. at: the dotted name of the bottleneck module inside it. shape: (C, H, W) of one sample.
    classes: number of labels without the null class, None for none. null: the null class's index, None for none.
    Subclasses say how the model is called. Raises ValueError for a model without that module.
    apart: modules inside a block that the model also calls by themselves, so that they are laid out by themselves.
    attention_layers: ends of the paths of the attention's projections, which adapters change by default.
    """

    apart: tuple[nn.Module, ...] = ()
    attention_layers: tuple[str, ...] = ("to_q", "to_k", "to_v", "to_out.0")  # diffusers' names

    def __init__(
        self,
        model: nn.Module,
        at: str,
        shape: tuple[int, int, int],
        classes: int | None = None,
        null: int | None = None,
    ):
        super().__init__()
        self.model, self.at, self.shape = model, at, tuple(shape)
        if math.prod(shape) > ELEMENTS:
            raise ValueError(f"a sample of shape {self.shape} has more than {ELEMENTS:,} elements")
        self.classes, self.null = classes, null
        try:
            model.get_submodule(at)
        except AttributeError:
            raise ValueError(f"{type(model).__name__} has no {at}, whose output would be its bottleneck") from None

    def as_map(self, features: Tensor) -> Tensor:
        """The bottleneck's output as (B, F, h, w)."""
        return features

    def call(self, x: Tensor, time: Tensor, cond: Any) -> Tensor:
        """The model's prediction (B, C, H, W)."""
        raise TypeError(f"{type(self).__name__} does not say how its model is called")

    def labels(self, cond: Tensor | None, x: Tensor) -> Tensor | None:
        """Class labels (B,) for the model; no condition is the null class for every sample."""
        if self.classes is None:
            return None
        if cond is not None:
            return cond
        if self.null is None:
            raise ValueError(
                f"cond: this network has {self.classes} classes and no null class; give every sample a label"
            )
        return torch.full((len(x),), self.null, device=x.device)

    def forward(self, x: Tensor, time: Tensor, cond: Any, mode: str) -> Any:
        if mode == "x0":
            return self.call(x, time, cond)
        features: list[Tensor] = []

        def tap(module: nn.Module, args: Any, out: Any) -> None:
            features.append(self.as_map(out[0] if isinstance(out, tuple) else out))
            if mode == "features":
                raise _Leave

        # registered for this pass, hence behind the hook that lays a sharded bottleneck out again
        handle = self.model.get_submodule(self.at).register_forward_hook(tap)
        try:
            out = self.call(x, time, cond)
        except _Leave:
            return features[0]
        finally:
            handle.remove()
        if not features:
            raise RuntimeError(f"backbone: module {self.at!r} was not reached, so there are no features")
        return out, features[0]


def size_of(sample_size: Any) -> tuple[int, int]:
    """(H, W) of a model's sample_size, a whole number or two. Raises ValueError for anything else."""
    if sample_size is None:
        raise ValueError("sample_size is missing in the model's config.json; set it to the size it was trained at")
    size = tuple(sample_size) if isinstance(sample_size, (tuple, list)) else (sample_size, sample_size)
    if len(size) != 2 or not all(type(side) is int and side > 0 for side in size):
        raise ValueError(f"sample_size: {quoted(sample_size)}, expected a whole number above 0, or two")
    return size


class UNet(Backbone):
    """diffusers UNet2DModel, class labels or none.

    classes: labels without the null class; the model has an embedding more when it has a null class (index `classes`).
    patch: p x p pixels are folded into channels before the model and unfolded behind it. On CPUs that buys more quality
    a second than full resolution does (1.2 times at 28 x 28 for the same parameters).
    """

    def __init__(self, model: nn.Module, classes: int | None = None, patch: int = 1):
        config = model.config
        embeds = config.num_class_embeds
        if config.class_embed_type is not None or config.time_embedding_type != "positional":
            raise ValueError(
                f"time_embedding_type {config.time_embedding_type!r}, class_embed_type {config.class_embed_type!r}: "
                "networks here are told a real-valued time and an integer label, so positional and null"
            )
        if embeds not in ((None,) if classes is None else (classes, classes + 1)):
            raise ValueError(
                f"classes: {classes}, but num_class_embeds is {embeds}; it counts the null class too, if any"
            )
        height, width = size_of(config.sample_size)
        if config.in_channels % patch**2:
            raise ValueError(f"patch: {patch}, but in_channels {config.in_channels} is no multiple of {patch}^2")
        shape = (config.in_channels // patch**2, height * patch, width * patch)
        super().__init__(model, "mid_block", shape, classes, classes if embeds != classes else None)
        self.patch = patch

    def call(self, x: Tensor, time: Tensor, cond: Any) -> Tensor:
        labels = self.labels(cond, x)
        x = F.pixel_unshuffle(x, self.patch) if self.patch > 1 else x
        out = _mean(self.model(x, time, class_labels=labels, return_dict=False)[0], x)
        return F.pixel_shuffle(out, self.patch) if self.patch > 1 else out


class TextUNet(Backbone):
    """diffusers UNet2DConditionModel.

    cond: {"text": (B, L, D)}, and for SDXL also "pooled" (B, P) and "time_ids" (B, 6).
    """

    def __init__(self, model: nn.Module):
        config = model.config
        if config.in_channels != config.out_channels:
            raise ValueError(
                f"in_channels {config.in_channels} and out_channels {config.out_channels} of a text UNet differ"
            )
        super().__init__(model, "mid_block", (config.in_channels, *size_of(config.sample_size)))

    def call(self, x: Tensor, time: Tensor, cond: dict[str, Tensor]) -> Tensor:
        added = None
        if "pooled" in cond:
            added = {"text_embeds": cond["pooled"], "time_ids": cond["time_ids"]}
        return self.model(x, time, encoder_hidden_states=cond["text"], added_cond_kwargs=added, return_dict=False)[0]

    def zeros(self, count: int, device: torch.device) -> dict[str, Tensor]:
        """A condition of zeros for `count` samples, one token long: enough to measure shapes."""
        config = self.model.config
        cond = {"text": torch.zeros(count, 1, config.cross_attention_dim, device=device)}
        if config.addition_embed_type == "text_time":
            pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
            cond |= {
                "pooled": torch.zeros(count, pooled, device=device),
                "time_ids": torch.zeros(count, 6, device=device),
            }
        return cond


class Transformer(Backbone):
    """diffusers DiTTransformer2DModel, class labels; the bottleneck is its middle block, tokens laid out as a map.

    Every block embeds the label anew and would drop it at random in training mode; which samples train without a label
    is the method's to decide, so that is switched off.
    """

    def __init__(self, model: nn.Module):
        config = model.config
        classes = config.num_embeds_ada_norm
        for block in model.transformer_blocks:
            block.norm1.emb.class_embedder.dropout_prob = 0.0
        shape = (config.in_channels, *size_of(config.sample_size))
        at = f"transformer_blocks.{len(model.transformer_blocks) // 2}"
        super().__init__(model, at, shape, classes, null=classes)

    @property
    def apart(self) -> tuple[nn.Module, ...]:
        """The first block's embedding, which the model borrows for its output layer."""
        return (self.model.transformer_blocks[0].norm1.emb,)

    def as_map(self, features: Tensor) -> Tensor:
        side = self.shape[1] // self.model.config.patch_size
        return features.transpose(1, 2).unflatten(2, (side, side))

    def call(self, x: Tensor, time: Tensor, cond: Any) -> Tensor:
        return _mean(self.model(x, timestep=time, class_labels=self.labels(cond, x), return_dict=False)[0], x)


def _mean(out: Tensor, x: Tensor) -> Tensor:
    """The prediction alone: a model that also predicts the variance puts it behind."""
    return out if out.shape[1] == x.shape[1] else out[:, : x.shape[1]]
