"""Families: text-to-image models of diffusers as backbones, one adapter each.

An adapter says how the condition's columns enter its model, how large a sample is, and which outputs are taps. A
model's prediction and schedule, with a flow's shift, are its scheduler's to say (networks/schedulers.py), and the scale
of its latents is its codec's (networks/codec.py).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .backbones import Backbone, EDMUNet, Tokens, Transformer, UNet, mean_of, size_of, unet_taps
from .conditions import Texts
from .nasa import subtracting

Cond = dict[str, Tensor]
JOINT = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
PIXELS = 8  # of an image's side to one of its latent's, in the families that take the image's size
FLUX_SIDE = 128  # of a FLUX.1 latent at 1024 x 1024 pixels; its config.json names no size


class TextUNet(Backbone):
    """UNet2DConditionModel: Stable Diffusion 1.5 and 2.1, and SDXL.

    cond: "text" (B, L, D), and for SDXL "pooled" (B, P). SDXL also takes the size before and after a crop; here that
    is always the image's own, without a crop, as published. Negative prompts ("negative", "negative_scale") are
    subtracted as networks/nasa.py has it.
    """

    subtracts = True

    def __init__(self, model: nn.Module):
        config = model.config
        if config.in_channels != config.out_channels:
            raise ValueError(
                f"in_channels {config.in_channels} and out_channels {config.out_channels} of a text UNet differ"
            )
        shape = (config.in_channels, *size_of(config.sample_size))
        super().__init__(model, unet_taps(model), shape, times=("time_embedding",))
        size = [float(PIXELS * side) for side in shape[1:]]
        self.time_ids = nn.Buffer(torch.tensor([[*size, 0.0, 0.0, *size]]), persistent=False)

    def call(self, x: Tensor, time: Tensor, cond: Cond) -> Tensor:
        added = None
        if "pooled" in cond:
            added = {"text_embeds": cond["pooled"], "time_ids": self.time_ids.to(x.device).expand(len(x), -1)}
        given = {"encoder_hidden_states": cond["text"], "added_cond_kwargs": added, "return_dict": False}
        with subtracting(self.model, cond.get("negative"), cond.get("negative_scale")):
            return self.model(x, time, **given)[0]

    @property
    def conditions(self) -> Texts:
        """Texts of the model's own widths; one token is enough to measure shapes."""
        config = self.model.config
        shapes: dict[str, tuple[int, ...]] = {"text": (1, config.cross_attention_dim)}
        if config.addition_embed_type == "text_time":
            shapes["pooled"] = (config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim,)
        return Texts(shapes)


class SD3(Tokens):
    """SD3Transformer2DModel: Stable Diffusion 3 and 3.5. cond: "text" (B, L, D), "pooled" (B, P)."""

    attention_layers, stream = JOINT, 1

    def __init__(self, model: nn.Module):
        shape = (model.config.in_channels, *size_of(model.config.sample_size))
        super().__init__(model, shape, model.config.patch_size, times=("time_text_embed.timestep_embedder",))

    def call(self, x: Tensor, time: Tensor, cond: Cond) -> Tensor:
        return self.model(x, cond["text"], cond["pooled"], time, return_dict=False)[0]

    @property
    def conditions(self) -> Texts:
        """Texts of the model's own widths."""
        config = self.model.config
        return Texts({"text": (1, config.joint_attention_dim), "pooled": (config.pooled_projection_dim,)})


class Flux(Tokens):
    """FluxTransformer2DModel: FLUX.1. cond: "text" (B, L, D), "pooled" (B, P).

    size: side of a latent. FLUX.1 [dev] embeds a guidance scale, which is always its pipeline's 3.5 here.
    """

    attention_layers, stream = JOINT, 1
    guidance = 3.5

    def __init__(self, model: nn.Module, size: int = FLUX_SIDE):
        shape = (model.config.in_channels // 4, *size_of(size))
        containers = ("transformer_blocks", "single_transformer_blocks")
        super().__init__(model, shape, 2, containers, times=("time_text_embed.timestep_embedder",))
        rows, columns = (torch.arange(side, dtype=torch.float32) for side in self.grid)
        ids = torch.cartesian_prod(torch.zeros(1), rows, columns)
        self.size, self.image_ids = size, nn.Buffer(ids, persistent=False)

    def call(self, x: Tensor, time: Tensor, cond: Cond) -> Tensor:
        tokens, text = F.pixel_unshuffle(x, 2).flatten(2).transpose(1, 2), cond["text"]
        guidance = torch.full_like(time, self.guidance) if self.model.config.guidance_embeds else None
        image_ids, text_ids = self.image_ids.to(x.device), x.new_zeros(text.shape[1], 3)
        ids = {"img_ids": image_ids, "txt_ids": text_ids, "guidance": guidance, "return_dict": False}
        out = self.model(tokens, text, cond["pooled"], time / 1000, **ids)[0]  # the model counts time in [0, 1]
        return F.pixel_shuffle(self.as_map(out), 2)

    @property
    def conditions(self) -> Texts:
        """Texts of the model's own widths."""
        config = self.model.config
        return Texts({"text": (1, config.joint_attention_dim), "pooled": (config.pooled_projection_dim,)})


class Sana(Tokens):
    """SanaTransformer2DModel. cond: "text" (B, L, D), "mask" (B, L) with 1 for the tokens that count."""

    def __init__(self, model: nn.Module):
        config = model.config
        if config.guidance_embeds:
            raise ValueError("guidance_embeds: a Sana that takes a guidance scale is a student already; use its base")
        super().__init__(
            model,
            (config.in_channels, *size_of(config.sample_size)),
            config.patch_size,
            times=("time_embed.emb.timestep_embedder",),
        )

    def call(self, x: Tensor, time: Tensor, cond: Cond) -> Tensor:
        time = time * self.model.config.timestep_scale
        return self.model(x, cond["text"], time, encoder_attention_mask=cond["mask"], return_dict=False)[0]

    @property
    def conditions(self) -> Texts:
        """Texts of the model's own width."""
        return Texts({"text": (1, self.model.config.caption_channels), "mask": (1,)})


class PixArt(Tokens):
    """PixArtTransformer2DModel: PixArt-alpha and -Sigma. cond: "text" (B, L, D), "mask" (B, L) with 1 for the tokens
    that count. The 1024-pixel alpha also takes the image's size and the ratio of its sides."""

    def __init__(self, model: nn.Module):
        config = model.config
        shape = (config.in_channels, *size_of(config.sample_size))
        super().__init__(model, shape, config.patch_size, times=("adaln_single.emb.timestep_embedder",))
        height, width = (float(PIXELS * side) for side in shape[1:])
        self.resolution = nn.Buffer(torch.tensor([[height, width]]), persistent=False)

    def call(self, x: Tensor, time: Tensor, cond: Cond) -> Tensor:
        size = {"resolution": None, "aspect_ratio": None}
        if self.model.use_additional_conditions:
            pixels = self.resolution.to(x.device).expand(len(x), -1)
            size = {"resolution": pixels, "aspect_ratio": pixels[:, :1] / pixels[:, 1:]}
        masked = {"encoder_attention_mask": cond["mask"], "added_cond_kwargs": size}
        return mean_of(self.model(x, cond["text"], time, return_dict=False, **masked)[0], x)

    @property
    def conditions(self) -> Texts:
        """Texts of the model's own width."""
        return Texts({"text": (1, self.model.config.caption_channels), "mask": (1,)})


BACKBONES: dict[str, type[Backbone]] = {
    "UNet2DModel": UNet,
    "DiTTransformer2DModel": Transformer,
    "EDMUNetModel": EDMUNet,
    "UNet2DConditionModel": TextUNet,
    "SD3Transformer2DModel": SD3,
    "FluxTransformer2DModel": Flux,
    "SanaTransformer2DModel": Sana,
    "PixArtTransformer2DModel": PixArt,
}
