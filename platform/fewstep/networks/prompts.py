"""Prompts -> columns of a condition, by the text encoders of the teacher's own pipeline: one function a family.

A pipeline's own encode_prompt chooses the layer and the encoder that its network reads, so a student is trained on the
numbers that it will get inside stock diffusers.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..config import read_json
from ..texts import one_line, quoted

INDEX = "model_index.json"
Columns = dict[str, Tensor]


def _sd(pipe: Any, prompts: list[str]) -> Columns:
    return {"text": pipe.encode_prompt(prompts, pipe.device, 1, False)[0]}


def _sdxl(pipe: Any, prompts: list[str]) -> Columns:
    text, _, pooled, _ = pipe.encode_prompt(prompts, device=pipe.device, do_classifier_free_guidance=False)
    return {"text": text, "pooled": pooled}


def _sd3(pipe: Any, prompts: list[str]) -> Columns:
    outputs = pipe.encode_prompt(prompts, None, None, device=pipe.device, do_classifier_free_guidance=False)
    return {"text": outputs[0], "pooled": outputs[2]}


def _flux(pipe: Any, prompts: list[str]) -> Columns:
    text, pooled, _ = pipe.encode_prompt(prompts, None, pipe.device)
    return {"text": text, "pooled": pooled}


def _masked(pipe: Any, prompts: list[str], **more: Any) -> Columns:
    text, mask, *_ = pipe.encode_prompt(prompts, do_classifier_free_guidance=False, device=pipe.device, **more)
    return {"text": text, "mask": mask}


def _sana(pipe: Any, prompts: list[str]) -> Columns:
    """Sana's pipeline puts an instruction before each prompt, but not before the empty one that stands for none."""
    name = "complex_human_instruction"
    return _masked(pipe, prompts, **{name: inspect.signature(pipe.__call__).parameters[name].default})


FAMILIES: dict[str, tuple[str, Callable[[Any, list[str]], Columns]]] = {
    "StableDiffusionPipeline": ("UNet2DConditionModel", _sd),
    "StableDiffusionXLPipeline": ("UNet2DConditionModel", _sdxl),
    "StableDiffusion3Pipeline": ("SD3Transformer2DModel", _sd3),
    "FluxPipeline": ("FluxTransformer2DModel", _flux),
    "SanaPipeline": ("SanaTransformer2DModel", _sana),
    "PixArtAlphaPipeline": ("PixArtTransformer2DModel", _masked),
    "PixArtSigmaPipeline": ("PixArtTransformer2DModel", _masked),
}
NOTHING = {"SanaPipeline": _masked}  # embeds the empty text that stands for none, where the prompts' function does not
ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3")
TOKENIZERS = ("tokenizer", "tokenizer_2", "tokenizer_3")


class Encoder:
    """The text encoders of a pipeline's folder, float32. cut: prompts so far that were longer than an encoder reads,
    and were cut there."""

    def __init__(self, pipe: Any, encode: Callable[[Any, list[str]], Columns]):
        self.pipe, self.encode, self.cut = pipe, encode, 0

    @torch.no_grad()
    def columns(self, prompts: Sequence[str], batch: int = 64) -> Columns:
        """Embedded prompts (N, ...) by column, on the CPU; an empty one is the encoded empty string."""
        with _errors_only():  # of texts that are cut, which are counted
            self.cut += self.too_long(prompts)
            parts = [self.encode(self.pipe, list(prompts[i : i + batch])) for i in range(0, len(prompts), batch)]
        return {name: torch.cat([part[name].cpu() for part in parts]) for name in parts[0]}

    def too_long(self, prompts: Sequence[str]) -> int:
        """Number of prompts with more tokens than the first tokenizer's longest text."""
        tokens = self.pipe.tokenizer(list(prompts), truncation=False).input_ids
        return sum(len(row) > self.pipe.tokenizer.model_max_length for row in tokens)

    def nothing(self) -> Columns:
        """One sample's condition without text (1, ...): zeros where the pipeline says so, as SDXL's does, else the
        encoded empty string."""
        encode = NOTHING.get(type(self.pipe).__name__, self.encode)
        empty = Encoder(self.pipe, encode).columns([""])
        zeros = getattr(self.pipe.config, "force_zeros_for_empty_prompt", False)
        return {name: torch.zeros_like(value) for name, value in empty.items()} if zeros else empty


def pipeline_class(folder: Path, model: str) -> str:
    """The class of a pipeline's folder. Nothing is opened.

    model: class of its network. Raises ValueError for a pipeline of another family and for a missing text encoder.
    """
    index = folder / INDEX
    if not index.is_file():
        raise ValueError(
            f"teacher: {str(folder)!r} has no {INDEX}, which names the text encoders; give a whole pipeline's folder"
        )
    parts = read_json(index)
    name = parts.get("_class_name")
    known = [pipe for pipe, (network, _) in FAMILIES.items() if network == model]
    if name not in known:
        raise ValueError(f"{index}: its pipeline is {quoted(name)}; of a {model} are read {', '.join(known)}")
    for part in (*ENCODERS, *TOKENIZERS):
        there = isinstance(parts.get(part), list) and None not in parts[part]
        needed = there or part in ("text_encoder", "tokenizer")
        if needed and not (folder / part).is_dir():
            raise ValueError(f"teacher: {str(folder)!r} has no {part}, so its prompts cannot be encoded; copy it there")
    return name


def network_class(folder: Path) -> str:
    """The class of the network of a pipeline's folder, which need not be there itself. Raises ValueError."""
    index = folder / INDEX
    name = read_json(index).get("_class_name") if index.is_file() else None
    if name not in FAMILIES:
        raise ValueError(f"{index}: its pipeline is {quoted(name)}; known: {', '.join(FAMILIES)}")
    return FAMILIES[name][0]


def open_encoder(folder: Path, model: str, device: torch.device | str = "cpu") -> Encoder:
    """The text encoders of a pipeline's folder. Safetensors and JSON are read, and no code that the folder brings is
    run. model: class of its network. Raises ValueError naming what is missing."""
    name = pipeline_class(folder, model)
    import diffusers

    without = dict.fromkeys(("unet", "transformer", "vae", "scheduler", "safety_checker", "feature_extractor"))
    present = {key: None for key in without if key in read_json(folder / INDEX)}
    try:
        with _errors_only():
            opened = {"use_safetensors": True, "local_files_only": True, "dtype": torch.float32}
            pipe = getattr(diffusers, name).from_pretrained(folder, **present, **opened)
    except (OSError, ValueError, ImportError, RuntimeError) as error:
        raise ValueError(f"teacher: {str(folder)!r}: its text encoders do not open: {one_line(error)}") from None
    return Encoder(pipe.to(device), FAMILIES[name][1])


@contextmanager
def _errors_only() -> Iterator[None]:
    """Context in which diffusers and transformers report errors alone, and draw no bars."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    logs = diffusers_logging, transformers_logging
    levels = [log.get_verbosity() for log in logs]
    for log in logs:
        log.set_verbosity_error()
        log.disable_progress_bar()
    try:
        yield
    finally:
        for log, level in zip(logs, levels, strict=True):
            log.set_verbosity(level)
            log.enable_progress_bar()
