"""Folders with networks: open a teacher, build a new network, write a folder that another job or diffusers can open.

A folder written here holds `unet/` (diffusers' config.json and safetensors) and `fewstep.json`, which says what diffusers
has no word for: schedule, prediction, data_std, time_scale, classes, patch, precision left out (it belongs to a recipe).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field
from torch import nn

from ..config import ConfigError, Strict, validate
from ..diffusion.schedules import DDPM, Schedule, from_config, to_config
from .backbones import Backbone, TextUNet, Transformer, UNet
from .denoiser import Denoiser
from .heads import Head

BACKBONES = {"UNet2DModel": UNet, "UNet2DConditionModel": TextUNet, "DiTTransformer2DModel": Transformer}
PREDICTION_TYPES = {"epsilon": "eps", "v_prediction": "v", "sample": "x0"}  # diffusers' word: ours
WEIGHTS = "diffusion_pytorch_model.safetensors"


class Network(Strict):
    """A network as JSON types: a diffusers model and how it is read as a denoiser."""

    model: Literal["UNet2DModel", "UNet2DConditionModel", "DiTTransformer2DModel"] = "UNet2DModel"
    """diffusers class."""
    config: dict[str, Any] = {}
    """Its constructor's arguments; for a model read from a folder they stand in its config.json."""
    schedule: dict[str, Any] = {"name": "edm"}
    """Name and fields of a schedule (diffusion/schedules.py)."""
    prediction: Literal["eps", "v", "x0", "flow", "edm"] = "edm"
    """What the network predicts."""
    data_std: Annotated[float, Field(gt=0)] = 0.5
    """EDM's sigma_data."""
    time_scale: float = 1.0
    """Factor on the network's noise conditioning."""
    classes: Annotated[int, Field(ge=1)] | None = None
    """Labels, the null class not counted (it has the index `classes`); null for none."""
    patch: Annotated[int, Field(ge=1)] = 1
    """Side of the pixel blocks folded into channels (UNet2DModel)."""


def _backbone(model: nn.Module, network: Network) -> Backbone:
    if network.model == "UNet2DModel":
        return UNet(model, network.classes, network.patch)
    return BACKBONES[network.model](model)


def _denoiser(model: nn.Module, network: Network, precision: str) -> Denoiser:
    try:
        schedule = from_config(network.schedule)
    except ValueError as error:
        raise ConfigError(f"network.{error}") from None
    backbone = _backbone(model, network)
    return Denoiser(backbone, schedule, network.prediction, network.data_std, network.time_scale, precision)


def new_denoiser(network: Network, precision: str = "fp32") -> Denoiser:
    """A network with random weights whose last layer is zero, so that it starts as its prediction's skip (EDM's start).

    Random weights come from torch's global generator. Raises ConfigError for arguments that diffusers does not take.
    """
    import diffusers

    cls = getattr(diffusers, network.model)
    config = dict(network.config)
    if network.classes is not None and network.model == "UNet2DModel":
        config.setdefault("num_class_embeds", network.classes + 1)
    try:
        model = cls(**config)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"network.config: {network.model}: {error}") from None
    if hasattr(model, "conv_out"):
        nn.init.zeros_(model.conv_out.weight)
        nn.init.zeros_(model.conv_out.bias)
    return _denoiser(model, network, precision)


def new_head(denoiser: Denoiser, at: int | None = None) -> Head:
    """A GAN head for a denoiser's bottleneck, measured by one pass on one sample of zeros."""
    import torch

    from ..diffusion.level import Level

    device = next(denoiser.parameters()).device
    x = torch.zeros(1, *denoiser.shape, device=device)
    one = torch.ones(1, 1, 1, 1, device=device)
    cond = None
    if isinstance(denoiser.backbone, TextUNet):
        config = denoiser.backbone.model.config
        cond = {"text": torch.zeros(1, 1, config.cross_attention_dim, device=device)}
    with torch.no_grad():
        _, channels, size, _ = denoiser(x, Level(one, one), cond, "features").shape
    return Head(channels, size)


def network_of(denoiser: Denoiser) -> Network:
    """The network's description, the inverse of building it."""
    backbone = denoiser.backbone
    return Network(
        model=type(backbone.model).__name__,
        schedule=to_config(denoiser.schedule),
        prediction=denoiser.prediction,
        data_std=denoiser.data_std,
        time_scale=denoiser.time_scale,
        classes=backbone.classes,
        patch=getattr(backbone, "patch", 1),
    )


def save_denoiser(denoiser: Denoiser, folder: Path) -> None:
    """Writes `folder`/unet (diffusers, safetensors) and `folder`/fewstep.json."""
    denoiser.backbone.model.save_pretrained(folder / "unet", safe_serialization=True)
    network = network_of(denoiser).model_dump(exclude={"config"})
    (folder / "fewstep.json").write_text(json.dumps(network, indent=1) + "\n")


def open_teacher(folder: str | Path, precision: str = "fp32") -> Denoiser:
    """A denoiser from a folder of ours or of diffusers (a pipeline with a DDPM-family scheduler).

    Reads safetensors and JSON only; no code that a folder brings is run. Raises ValueError naming what is missing.
    """
    import diffusers

    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"teacher: no folder {str(folder)!r}; make one with: python jobs/teach.py, or download a pipeline there")
    sub = next((s for s in ("unet", "transformer") if (folder / s / "config.json").is_file()), None)
    if sub is None:
        raise ValueError(f"teacher: {str(folder)!r} holds neither unet/config.json nor transformer/config.json")
    config = _json(folder / sub / "config.json")
    if config.get("_class_name") not in BACKBONES:
        raise ValueError(
            f"teacher: {folder / sub / 'config.json'} is of class {config.get('_class_name')!r}; known: {', '.join(BACKBONES)}"
        )
    network = _described(folder, config)
    try:
        model = getattr(diffusers, network.model).from_pretrained(
            folder / sub, use_safetensors=True, local_files_only=True, low_cpu_mem_usage=False
        )
    except (OSError, RuntimeError, ValueError) as error:
        raise ValueError(f"teacher: {folder / sub}: {' '.join(str(error).split())[:300]}") from None
    return _denoiser(model, network, precision).eval()


def _json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: not valid JSON ({error})") from None


def _described(folder: Path, config: dict[str, Any]) -> Network:
    """The folder's own fewstep.json, or what a diffusers pipeline's scheduler says."""
    if (folder / "fewstep.json").is_file():
        try:
            return validate(Network, _json(folder / "fewstep.json"))
        except ConfigError as error:
            raise ValueError(f"{folder / 'fewstep.json'}: {error}") from None
    path = folder / "scheduler" / "scheduler_config.json"
    if not path.is_file():
        raise ValueError(f"teacher: {str(folder)!r} holds neither fewstep.json nor scheduler/scheduler_config.json")
    schedule, prediction = from_scheduler(_json(path), path)
    classes = config.get("num_class_embeds")
    return Network(
        model=config["_class_name"],
        schedule=to_config(schedule),
        prediction=prediction,
        classes=classes if config["_class_name"] == "UNet2DModel" else None,
    )


def from_scheduler(config: dict[str, Any], where: Path) -> tuple[Schedule, str]:
    """Our schedule and prediction for a diffusers scheduler's config. Raises ValueError for one that has no beta schedule."""
    name = config.get("_class_name", "")
    if "beta_schedule" not in config:
        raise ValueError(f"{where}: {name} has no beta schedule; write a fewstep.json beside it that names schedule and prediction")
    schedule = DDPM(
        config["beta_schedule"],
        config["beta_start"],
        config["beta_end"],
        config["num_train_timesteps"],
        config.get("rescale_betas_zero_snr", False),
    )
    word = config.get("prediction_type", "epsilon")
    if word not in PREDICTION_TYPES:
        raise ValueError(f"{where}: prediction_type {word!r} is not one of {', '.join(PREDICTION_TYPES)}")
    return schedule, PREDICTION_TYPES[word]
