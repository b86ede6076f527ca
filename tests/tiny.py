"""Every text-to-image family, tiny and random: a model of diffusers' own class, and how its pipeline calls it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import Tensor, nn

TOKENS, SIZE = 8, 8
UNET = {
    "sample_size": SIZE,
    "in_channels": 4,
    "out_channels": 4,
    "layers_per_block": 1,
    "block_out_channels": (8, 16),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "attention_head_dim": 8,
    "norm_num_groups": 4,
    "cross_attention_dim": 12,
}
POOLED = {
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 4,
    "projection_class_embeddings_input_dim": 6 * 4 + 10,
}
HEADS = {"num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 8}
TOKEN = {"sample_size": SIZE, "in_channels": 4, "patch_size": 2} | HEADS
SD_BETAS = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}


@dataclass(frozen=True)
class Family:
    """One family. call: (model, x, time, cond) -> its own output, as its pipeline calls it."""

    model: str
    config: dict[str, Any]
    scheduler: Any
    columns: dict[str, tuple[int, ...]]
    call: Callable[[Any, Tensor, Tensor, dict[str, Tensor]], Tensor]
    described: dict[str, Any] = field(default_factory=dict)

    def make(self, seed: int = 0, **config: Any) -> nn.Module:
        """The model with random weights everywhere. config: other arguments of it."""
        torch.manual_seed(seed)
        model = getattr(diffusers, self.model)(**self.config | config).eval()
        for parameter in model.parameters():  # output layers start at zero
            if not parameter.any():
                nn.init.normal_(parameter, std=0.1)
        return model

    def save(self, folder: Path, seed: int = 0) -> Path:
        """A folder as diffusers writes it."""
        self.make(seed).save_pretrained(folder / ("unet" if "UNet" in self.model else "transformer"))
        self.scheduler.save_pretrained(folder / "scheduler")
        if self.described:
            (folder / "fewstep.json").write_text(json.dumps(self.described))
        return folder

    def cond(self, count: int, seed: int = 1) -> Any:
        """Conditions of any content."""
        generator = torch.Generator().manual_seed(seed)
        if not self.columns:
            return torch.randint(0, 5, (count,), generator=generator)
        result = {k: torch.randn(count, *shape, generator=generator) for k, shape in self.columns.items()}
        if "mask" in result:
            result["mask"] = (torch.arange(TOKENS) < TOKENS - 2).float().expand(count, -1)
        return result

    def rows(self, count: int, seed: int = 1) -> dict[str, Tensor]:
        """Columns of data."""
        real = torch.randn(count, 4, SIZE, SIZE, generator=torch.Generator().manual_seed(seed + 1))
        cond = self.cond(count, seed)
        return {"real": real, **(cond if isinstance(cond, dict) else {"label": cond})}


def tokenizer(length: int = TOKENS) -> Any:
    """CLIP's tokenizer with the bytes for a vocabulary."""
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import CLIPTokenizer

    letters = sorted(ByteLevel.alphabet())
    tokens = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer({token: i for i, token in enumerate(tokens)}, [], model_max_length=length)


def text_encoder(width: int, projected: bool = False, out: int = 10) -> Any:
    """CLIP's text encoder with random weights."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    tokens, size = {"vocab_size": 514, "bos_token_id": 512, "eos_token_id": 513, "pad_token_id": 513}, 2 * width
    layers = {"num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": TOKENS}
    config = CLIPTextConfig(hidden_size=width, intermediate_size=size, projection_dim=out, **tokens, **layers)
    return (CLIPTextModelWithProjection if projected else CLIPTextModel)(config).eval()


LETTERS = " abcdefghijklmnopqrstuvwxyz"


def t5() -> tuple[Any, Any]:
    """T5's tokenizer with letters for a vocabulary, and its encoder with random weights."""
    from transformers import T5Config, T5EncoderModel, T5Tokenizer

    pieces = ["<pad>", "</s>", "<unk>", *LETTERS.replace(" ", "\u2581")]
    sizes = {"d_model": 12, "d_kv": 6, "d_ff": 24, "num_layers": 2, "num_heads": 2, "vocab_size": len(pieces)}
    return T5Tokenizer([(piece, 0.0) for piece in pieces], extra_ids=0), T5EncoderModel(T5Config(**sizes)).eval()


def gemma() -> tuple[Any, Any]:
    """Gemma's tokenizer with letters for a vocabulary, and its decoder with random weights."""
    from transformers import Gemma2Config, Gemma2Model, GemmaTokenizer

    pieces = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", *LETTERS.replace(" ", "\u2581")]
    layers = {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 6}
    sizes = {"hidden_size": 12, "intermediate_size": 24, "vocab_size": len(pieces), "pad_token_id": 0}
    tokens = GemmaTokenizer({piece: i for i, piece in enumerate(pieces)}, [])
    return tokens, Gemma2Model(Gemma2Config(**layers, **sizes)).eval()


def codec(**more: Any) -> Any:
    """AutoencoderKL, 8 x down, with random weights."""
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    sizes = {"block_out_channels": (4,) * 4, "norm_num_groups": 2, "latent_channels": 4, "sample_size": 8 * SIZE}
    model = diffusers.AutoencoderKL(**blocks, **sizes, scaling_factor=0.5, **more).eval()
    with torch.no_grad():
        model.quant_conv.bias[4:] -= 6  # or a latent's noise would hide which picture it is of
    return model


def deep_codec() -> Any:
    """AutoencoderDC, 8 x down, with random weights."""
    sides = {}
    for side in ("encoder", "decoder"):
        sides |= {f"{side}_block_out_channels": (4, 4, 8, 8), f"{side}_layers_per_block": (1,) * 4}
        sides |= {f"{side}_block_types": "ResBlock", f"{side}_qkv_multiscales": ((),) * 4}
    return diffusers.AutoencoderDC(latent_channels=4, scaling_factor=0.5, **sides).eval()


def pipeline(name: str, folder: Path) -> Path:
    """A family's whole pipeline's folder."""
    torch.manual_seed(7)
    model, none = FAMILIES[name].make(), {"safety_checker": None, "feature_extractor": None}
    parts = {"vae": codec(), "scheduler": FAMILIES[name].scheduler}
    clip = {"tokenizer": tokenizer()}
    if name == "sdxl":
        clip |= {"text_encoder": text_encoder(4), "text_encoder_2": text_encoder(8, projected=True)}
        pipe = diffusers.StableDiffusionXLPipeline(unet=model, **parts, **clip, tokenizer_2=tokenizer())
    elif name in ("sd15", "sd21"):
        clip |= {"text_encoder": text_encoder(12), "requires_safety_checker": False}
        pipe = diffusers.StableDiffusionPipeline(unet=model, **parts, **clip, **none)
    elif name == "sd3":
        parts["vae"] = codec(shift_factor=0.25)
        clip |= {f"text_encoder{part}": text_encoder(4, projected=True, out=5) for part in ("", "_2")}
        clip["tokenizer_2"] = tokenizer()
        clip["tokenizer_3"], clip["text_encoder_3"] = t5()
        pipe = diffusers.StableDiffusion3Pipeline(transformer=model, **parts, **clip)
    elif name == "flux":
        parts["vae"] = codec(shift_factor=0.25)
        clip["text_encoder"] = text_encoder(10)
        clip["tokenizer_2"], clip["text_encoder_2"] = t5()
        pipe = diffusers.FluxPipeline(transformer=model, **parts, **clip)
    elif name == "sana":
        parts["vae"] = deep_codec()
        parts["tokenizer"], parts["text_encoder"] = gemma()
        pipe = diffusers.SanaPipeline(transformer=model, **parts)
    elif name == "pixart":
        model = FAMILIES[name].make(use_additional_conditions=False)  # its pipeline gives them to one size alone
        parts["tokenizer"], parts["text_encoder"] = t5()
        pipe = diffusers.PixArtAlphaPipeline(transformer=model, **parts)
    else:
        pipe = diffusers.DiTPipeline(transformer=model, **parts)
    pipe.save_pretrained(folder, safe_serialization=True)
    if described := FAMILIES[name].described:
        (folder / "fewstep.json").write_text(json.dumps(described))
    return folder


def _unet(model: Any, x: Tensor, t: Tensor, cond: dict[str, Tensor]) -> Tensor:
    added = None
    if "pooled" in cond:
        size = [8.0 * SIZE] * 2
        added = {"text_embeds": cond["pooled"], "time_ids": torch.tensor([[*size, 0, 0, *size]] * len(x))}
    return model(x, t, encoder_hidden_states=cond["text"], added_cond_kwargs=added).sample


def _sd3(model: Any, x: Tensor, t: Tensor, cond: dict[str, Tensor]) -> Tensor:
    named = {"encoder_hidden_states": cond["text"], "pooled_projections": cond["pooled"]}
    return model(hidden_states=x, timestep=t, **named).sample


def _flux(model: Any, x: Tensor, t: Tensor, cond: dict[str, Tensor]) -> Tensor:
    from diffusers import FluxPipeline

    b, c, h, w = x.shape
    packed = FluxPipeline._pack_latents(x, b, c, h, w)
    ids = FluxPipeline._prepare_latent_image_ids(b, h // 2, w // 2, x.device, x.dtype)
    named = {"encoder_hidden_states": cond["text"], "pooled_projections": cond["pooled"]}
    guidance = torch.full([b], 3.5)
    text_ids = torch.zeros(TOKENS, 3)
    out = model(packed, timestep=t / 1000, img_ids=ids, txt_ids=text_ids, guidance=guidance, **named).sample
    return FluxPipeline._unpack_latents(out, 8 * h, 8 * w, 8)


def _sana(model: Any, x: Tensor, t: Tensor, cond: dict[str, Tensor]) -> Tensor:
    return model(x, encoder_hidden_states=cond["text"], encoder_attention_mask=cond["mask"], timestep=t).sample


def _pixart(model: Any, x: Tensor, t: Tensor, cond: dict[str, Tensor]) -> Tensor:
    size = torch.tensor([[8.0 * SIZE, 8.0 * SIZE]] * len(x))
    added = {"resolution": size, "aspect_ratio": torch.ones(len(x), 1)}
    named = {"encoder_hidden_states": cond["text"], "encoder_attention_mask": cond["mask"]}
    return model(x, timestep=t, added_cond_kwargs=added, **named).sample.chunk(2, 1)[0]


def _dit(model: Any, x: Tensor, t: Tensor, cond: Tensor) -> Tensor:
    return model(x, timestep=t, class_labels=cond).sample.chunk(2, 1)[0]


TEXT, JOINT = {"text": (TOKENS, 12)}, {"text": (TOKENS, 12), "pooled": (10,)}
MASKED = {"text": (TOKENS, 12), "mask": (TOKENS,)}
FLOW = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
FAMILIES = {
    "sd15": Family("UNet2DConditionModel", UNET, diffusers.PNDMScheduler(**SD_BETAS), TEXT, _unet),
    "sd21": Family(
        "UNet2DConditionModel",
        UNET | {"use_linear_projection": True},
        diffusers.DDIMScheduler(**SD_BETAS, prediction_type="v_prediction"),
        TEXT,
        _unet,
    ),
    "sdxl": Family("UNet2DConditionModel", UNET | POOLED, diffusers.EulerDiscreteScheduler(**SD_BETAS), JOINT, _unet),
    "sd3": Family(
        "SD3Transformer2DModel",
        TOKEN
        | {
            "joint_attention_dim": 12,
            "caption_projection_dim": 16,
            "pooled_projection_dim": 10,
            "out_channels": 4,
            "pos_embed_max_size": 8,
            "dual_attention_layers": (0,),
            "qk_norm": "rms_norm",
        },
        FLOW,
        JOINT,
        _sd3,
    ),
    "flux": Family(
        "FluxTransformer2DModel",
        HEADS
        | {
            "in_channels": 16,
            "num_single_layers": 2,
            "joint_attention_dim": 12,
            "pooled_projection_dim": 10,
            "guidance_embeds": True,
            "axes_dims_rope": (2, 2, 4),
        },
        FLOW,
        JOINT,
        _flux,
        {"prediction": "flow", "schedule": {"name": "flow", "shift": 3.0}, "time_scale": 1000.0, "size": SIZE},
    ),
    "sana": Family(
        "SanaTransformer2DModel",
        TOKEN
        | {
            "out_channels": 4,
            "patch_size": 1,
            "num_cross_attention_heads": 2,
            "cross_attention_head_dim": 8,
            "cross_attention_dim": 16,
            "caption_channels": 12,
        },
        diffusers.DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0),
        MASKED,
        _sana,
    ),
    "pixart": Family(
        "PixArtTransformer2DModel",
        TOKEN
        | {
            "num_attention_heads": 3,
            "out_channels": 8,
            "cross_attention_dim": 24,
            "caption_channels": 12,
            "use_additional_conditions": True,
        },
        diffusers.DPMSolverMultistepScheduler(beta_start=0.0001, beta_end=0.02),
        MASKED,
        _pixart,
    ),
    "dit": Family(
        "DiTTransformer2DModel",
        TOKEN | {"out_channels": 8, "num_embeds_ada_norm": 5},
        diffusers.DDIMScheduler(),
        {},
        _dit,
    ),
}
