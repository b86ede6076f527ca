"""Backbones: diffusers models behind one call, backbone(x, time, cond, mode, at, shift), with features at taps.

Those of classes stand here, those of texts in networks/families.py.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..texts import quoted
from .extras import add_shift, shifted

ELEMENTS = 1 << 28  # most that one sample has; a picture of 4096 x 4096 has 2^25.6


class _Leave(Exception):
    """Ends a forward pass at the last tap that was asked for."""


class Backbone(nn.Module):
    """A model and the modules inside it whose outputs are features.

    model: a diffusers model. taps: dotted names of those modules by tap name, in the order in which they run; "middle"
    is the bottleneck. shape: (C, H, W) of one sample. classes: number of labels without the null class, None for none.
    null: the null class's index, None for none. times: dotted names of the modules whose outputs are time embeddings.
    Subclasses say how the model is called. Raises ValueError for a model without those modules.
    apart: modules inside a block that the model also calls by themselves, so that they are laid out by themselves.
    attention_layers: ends of the paths of the attention's projections, which adapters change by default.
    stream: index of the features in the output of a module that has several. subtracts: it takes negative prompts.
    """

    apart: tuple[nn.Module, ...] = ()
    stream: int = 0
    subtracts: bool = False
    attention_layers: tuple[str, ...] = ("to_q", "to_k", "to_v", "to_out.0")  # diffusers' names

    def __init__(
        self,
        model: nn.Module,
        taps: dict[str, str],
        shape: tuple[int, int, int],
        classes: int | None = None,
        null: int | None = None,
        times: tuple[str, ...] = (),
    ):
        super().__init__()
        self.model, self.taps, self.shape, self.times = model, dict(taps), tuple(shape), times
        if math.prod(shape) > ELEMENTS:
            raise ValueError(f"a sample of shape {self.shape} has more than {ELEMENTS:,} elements")
        self.classes, self.null = classes, null
        for name, path in taps.items():
            try:
                model.get_submodule(path)
            except AttributeError:
                text = f"{type(model).__name__} has no {path}, whose output would be its tap {name!r}"
                raise ValueError(text) from None
        for path in times:
            model.get_submodule(path).register_forward_hook(add_shift)

    @property
    def time_width(self) -> int:
        """Channels of the time embedding. Raises ValueError for a model whose time embedding is not known."""
        if not self.times:
            name = type(self.model).__name__
            raise ValueError(f"{name}: its time embedding is not known, so it takes no extra scalar")
        last = [m for m in self.model.get_submodule(self.times[0]).modules() if isinstance(m, nn.Linear)][-1]
        return last.out_features

    def as_map(self, features: Tensor) -> Tensor:
        """The bottleneck's output as (B, F, h, w)."""
        return features

    def call(self, x: Tensor, time: Tensor, cond: Any) -> Tensor:
        """The model's prediction (B, C, H, W)."""
        raise NotImplementedError(f"{type(self).__name__}.call")

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

    def forward(
        self,
        x: Tensor,
        time: Tensor,
        cond: Any,
        mode: str,
        at: tuple[str, ...] = ("middle",),
        shift: Tensor | None = None,
    ) -> Any:
        """The prediction ("x0"), the maps of the taps `at` ("features"), or both. shift: (B, W), added to the time
        embedding. Raises ValueError for an unknown tap."""
        if mode == "x0":
            with shifted(shift):
                return self.call(x, time, cond)
        if unknown := [name for name in at if name not in self.taps]:
            raise ValueError(f"taps: {unknown[0]!r} is not one of {', '.join(self.taps)}")
        features: dict[str, Tensor] = {}

        def tap(name: str, module: nn.Module, args: Any, out: Any) -> None:
            features[name] = self.as_map(out[self.stream] if isinstance(out, tuple) else out)
            if mode == "features" and len(features) == len(set(at)):
                raise _Leave

        # registered for this pass, hence behind the hook that lays a sharded block out again
        handles = [self.model.get_submodule(self.taps[n]).register_forward_hook(partial(tap, n)) for n in set(at)]
        try:
            with shifted(shift):
                out = self.call(x, time, cond)
        except _Leave:
            return tuple(features[name] for name in at)
        finally:
            for handle in handles:
                handle.remove()
        if missing := [name for name in at if name not in features]:
            raise RuntimeError(f"backbone: module {self.taps[missing[0]]!r} was not reached, so there are no features")
        return out, tuple(features[name] for name in at)


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
                "networks here take a real-valued time and an integer label, so positional and null"
            )
        if embeds not in ((None,) if classes is None else (classes, classes + 1)):
            raise ValueError(
                f"classes: {classes}, but num_class_embeds is {embeds}; it counts the null class too, if any"
            )
        height, width = size_of(config.sample_size)
        if config.in_channels % patch**2:
            raise ValueError(f"patch: {patch}, but in_channels {config.in_channels} is no multiple of {patch}^2")
        shape = (config.in_channels // patch**2, height * patch, width * patch)
        null = classes if embeds != classes else None
        super().__init__(model, unet_taps(model), shape, classes, null, ("time_embedding",))
        self.patch = patch

    def call(self, x: Tensor, time: Tensor, cond: Any) -> Tensor:
        labels = self.labels(cond, x)
        x = F.pixel_unshuffle(x, self.patch) if self.patch > 1 else x
        out = mean_of(self.model(x, time, class_labels=labels, return_dict=False)[0], x)
        return F.pixel_shuffle(out, self.patch) if self.patch > 1 else out


class Tokens(Backbone):
    """A transformer over patches; a block's tokens are laid out as a map, and the middle block's is the bottleneck.

    patch: side of a patch. containers: the model's lists of blocks, in the order in which they run.
    """

    def __init__(
        self,
        model: nn.Module,
        shape: tuple[int, int, int],
        patch: int,
        containers: tuple[str, ...] = ("transformer_blocks",),
        **more: Any,
    ):
        blocks = [f"{name}.{i}" for name in containers for i in range(len(model.get_submodule(name)))]
        taps = {f"block{i}": path for i, path in enumerate(blocks)} | {"middle": blocks[len(blocks) // 2]}
        super().__init__(model, taps, shape, **more)
        self.grid = (shape[1] // patch, shape[2] // patch)

    def as_map(self, features: Tensor) -> Tensor:
        return features.transpose(1, 2).unflatten(2, self.grid)


class Transformer(Tokens):
    """diffusers DiTTransformer2DModel, class labels.

    Every block embeds the label anew and would drop it at random in training mode; which samples train without a label
    is the method's to decide, so that is switched off.
    """

    def __init__(self, model: nn.Module):
        config = model.config
        classes = config.num_embeds_ada_norm
        for block in model.transformer_blocks:
            block.norm1.emb.class_embedder.dropout_prob = 0.0
        shape = (config.in_channels, *size_of(config.sample_size))
        times = tuple(f"transformer_blocks.{i}.norm1.emb.timestep_embedder" for i in range(config.num_layers))
        super().__init__(model, shape, config.patch_size, classes=classes, null=classes, times=times)

    @property
    def apart(self) -> tuple[nn.Module, ...]:
        """The first block's embedding, which the model borrows for its output layer."""
        return (self.model.transformer_blocks[0].norm1.emb,)

    def call(self, x: Tensor, time: Tensor, cond: Any) -> Tensor:
        return mean_of(self.model(x, timestep=time, class_labels=self.labels(cond, x), return_dict=False)[0], x)


class EDMUNet(Backbone):
    """EDMUNetModel (networks/edm.py), class labels or none. The middle is the encoder's last block, as in DMD2."""

    attention_layers = ("qkv", "proj")

    def __init__(self, model: nn.Module):
        config, last = model.config, len(model.down_blocks) - 1
        taps = {f"down{i}": f"down_blocks.{i}" for i in range(last)} | {"middle": f"down_blocks.{last}"}
        shape, classes = (config.in_channels, *size_of(config.sample_size)), config.num_class_embeds
        super().__init__(model, taps, shape, classes, classes if config.null_class else None, ("time_embedding",))

    def call(self, x: Tensor, time: Tensor, cond: Any) -> Tensor:
        return self.model(x, time, class_labels=self.labels(cond, x))[0]


def unet_taps(model: nn.Module) -> dict[str, str]:
    """The down blocks and the bottleneck."""
    return {f"down{i}": f"down_blocks.{i}" for i in range(len(model.down_blocks))} | {"middle": "mid_block"}


def mean_of(out: Tensor, x: Tensor) -> Tensor:
    """The prediction alone: a model that also predicts the variance puts it behind."""
    return out if out.shape[1] == x.shape[1] else out[:, : x.shape[1]]
