"""NASA: negative prompts by subtracting cross-attention, for generators of one or a few calls (SNOOPI, Nguyen et al.
2024, arXiv:2412.02687).

In every cross-attention layer Z = Z+ - scale Z-: the attention to the prompt less that to the negative prompt, before
the layer's output projection. Guidance on outputs needs many calls; in few it blends two images.

This file needs torch alone, and an exported Stable Diffusion or SDXL student has a copy of it:

    pipe = DiffusionPipeline.from_pretrained(folder)
    with subtracted(pipe, "a red background", 0.3):
        image = pipe("an apple", num_inference_steps=1, guidance_scale=1).images[0]
"""

from __future__ import annotations

from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn

# What the pass that runs subtracts: embedded texts (B, L, D) and scales (B,). A recomputed block reads it again
_NEGATIVE: ContextVar[tuple[Tensor, Tensor] | None] = ContextVar("negative", default=None)


class Subtract:
    """Attention processor of a cross-attention layer: the layer's own, less its attention to the negative prompt.

    Outside of `subtracting` it is the own processor alone, and a sample of scale 0 keeps its bits, too.
    """

    def __init__(self, own: Any):
        self.own = own

    def __call__(self, attn: nn.Module, hidden_states: Tensor, encoder_hidden_states: Any = None, **given: Any) -> Any:
        out, negative = self.own(attn, hidden_states, encoder_hidden_states, **given), _NEGATIVE.get()
        if negative is None:
            return out
        text, scale = negative
        text = text.to(hidden_states.dtype).expand(len(out), *text.shape[1:])
        minus = self.own(attn, hidden_states, text, **given | {"attention_mask": None})
        bias = attn.to_out[0].bias  # the projection is linear but for it
        return out - scale.to(out.dtype).view(-1, 1, 1) * (minus if bias is None else minus - bias)


class subtracting:
    """Context in which a UNet of diffusers subtracts texts (B or 1, L, D) by scales (B,); None subtracts nothing.

    Raises ValueError for a model without cross-attention layers of the usual name.
    """

    def __init__(self, unet: nn.Module, text: Tensor | None, scale: Tensor | None):
        self.given = None if text is None else (text, scale)
        layers = [] if text is None else [m for name, m in unet.named_modules() if name.split(".")[-1] == "attn2"]
        if text is not None and not layers:
            raise ValueError(f"negative: {type(unet).__name__} has no cross-attention layers attn2")
        for layer in layers:
            if not isinstance(layer.processor, Subtract):
                layer.processor = Subtract(layer.processor)

    def __enter__(self) -> None:
        self.token = _NEGATIVE.set(self.given)

    def __exit__(self, *error: Any) -> None:
        _NEGATIVE.reset(self.token)


def subtracted(pipe: Any, negative: str, scale: float) -> subtracting:
    """Context in which a Stable Diffusion or SDXL pipeline of diffusers, called with guidance_scale=1, subtracts a
    negative prompt. Scales of 0.1 to 1 are useful; at 0 images keep their bits."""
    with torch.no_grad():
        given = {"device": pipe.device, "num_images_per_prompt": 1, "do_classifier_free_guidance": False}
        text = pipe.encode_prompt(negative, **given)[0]
    return subtracting(pipe.unet, text, torch.tensor([float(scale)], device=pipe.device))
