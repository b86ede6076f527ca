"""The folder of a latent text-to-image pipeline as it grows: a codec, then text encoders, then the network itself.

With all parts in it, it is a folder of diffusers' StableDiffusionPipeline, which samples networks of a DDPM schedule.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from ..config import read_json
from .codec import Codec
from .denoiser import Denoiser
from .pretrained import DESCRIPTION, Network, save_denoiser
from .prompts import INDEX
from .schedulers import to_scheduler
from .text import Clip

SCORER = "scorer"
COPIED = ("vae", "text_encoder", "tokenizer", SCORER)
CLASSES = {
    "vae": "AutoencoderKL",
    "text_encoder": "CLIPTextModel",
    "tokenizer": "CLIPTokenizer",
    "unet": "UNet2DConditionModel",
    "scheduler": "DDPMScheduler",  # where none is written yet
}


def save_part(net: Denoiser | Codec | Clip, folder: Path, parts: Path | None = None, half: bool = False) -> None:
    """Writes a trained part of a pipeline into a new folder, beside copies of the parts that are there already.

    parts: the folder with those. A codec is written to vae/; a pair of encoders to scorer/, its text encoder and its
    tokenizer to text_encoder/ and tokenizer/; a denoiser as `save_denoiser` does, with its scheduler if it has parts.
    half: store the weights as float16; `net` is float16, too, from then on. Raises ValueError for a schedule and a
    prediction for which diffusers has no scheduler.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name in COPIED if parts is not None else ():
        if (parts / name).is_dir():
            shutil.copytree(parts / name, folder / name)
    if half:
        net.half()
    if isinstance(net, Codec):
        _fresh(folder / "vae")
        net.model.save_pretrained(folder / "vae", safe_serialization=True)
        _describe(folder, "AutoencoderKL")
    elif isinstance(net, Clip):
        for name, part in (("text_encoder", net.model.text_model), ("tokenizer", net.tokenizer), (SCORER, net.model)):
            _fresh(folder / name).mkdir()
            part.save_pretrained(folder / name)
            _opened_in_float32(folder / name / "config.json")
        net.tokenizer.save_pretrained(folder / SCORER)
        _describe(folder, "CLIPModel")
    else:
        save_denoiser(net, folder)
        if parts is not None:
            scheduler = to_scheduler(net.schedule, net.prediction)
            (folder / "scheduler").mkdir()
            (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler, indent=1) + "\n")
    if (folder / "vae").is_dir() and (folder / "text_encoder").is_dir():
        _save_index(folder)


def _fresh(folder: Path) -> Path:
    """The folder's path, with nothing there."""
    shutil.rmtree(folder, ignore_errors=True)
    return folder


def _opened_in_float32(path: Path) -> None:
    """Has transformers open a model in float32, as diffusers does, and not in the type in which it is stored."""
    if path.is_file():
        path.write_text(json.dumps(read_json(path) | {"dtype": "float32"}, indent=1) + "\n")


def _describe(folder: Path, model: str) -> None:
    (folder / DESCRIPTION).write_text(Network(model=model).model_dump_json(include={"model", "schedule", "prediction"}))


def _save_index(folder: Path) -> None:
    """model_index.json of a StableDiffusionPipeline, also where its network is still to be trained."""
    import diffusers

    library = lambda name: "transformers" if name in ("text_encoder", "tokenizer") else "diffusers"
    index = {"_class_name": "StableDiffusionPipeline", "_diffusers_version": diffusers.__version__}
    index |= {name: [library(name), kind] for name, kind in CLASSES.items()}
    if (scheduler := folder / "scheduler" / "scheduler_config.json").is_file():
        index["scheduler"] = ["diffusers", read_json(scheduler)["_class_name"]]
    index |= {"safety_checker": [None, None], "feature_extractor": [None, None], "requires_safety_checker": False}
    (folder / INDEX).write_text(json.dumps(index, indent=1) + "\n")
