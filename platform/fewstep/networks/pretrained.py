"""Folders with networks: open a teacher, build a new network, write a folder that another job or diffusers can open.

A folder written here holds `unet/` or `transformer/` (diffusers' config.json and safetensors) and `fewstep.json`, with
fields that diffusers lacks: schedule, prediction, data_std, time_scale, classes, patch. Precision is left out: it is a
recipe's to choose.
"""

from __future__ import annotations

import json
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import nn

from ..checks import Check, tried
from ..config import ConfigError, Strict, read_json, validate
from ..diffusion.schedules import from_config, to_config
from ..storage.cache import listing, local
from ..storage.place import Place, located
from ..texts import one_line, quoted
from .backbones import Backbone, Tokens, UNet, size_of
from .blocks import in_float32
from .denoiser import Denoiser
from .families import BACKBONES, FLUX_SIDE
from .heads import Head
from .hub import PREFIX, snapshot
from .latents import find_latents
from .schedulers import from_scheduler
from .weights import (
    Stored,
    arguments_of,
    check_headers,
    check_memory,
    fill,
    headers,
    model_class,
    outline,
    unfilled,
    weight_files,
)

DESCRIPTION = "fewstep.json"
FLUX = "FluxTransformer2DModel"
QK_NORMS = {"SanaTransformer2DModel": "rms_norm_across_heads", "SD3Transformer2DModel": "rms_norm"}
"""The RMS norm of queries and keys that a model of diffusers has, by the value of its `qk_norm`."""


class Network(Strict):
    """A network as JSON types: a diffusers model and how it is read as a denoiser."""

    model: Literal[
        "UNet2DModel",
        "DiTTransformer2DModel",
        "EDMUNetModel",
        "UNet2DConditionModel",
        "SD3Transformer2DModel",
        "FluxTransformer2DModel",
        "SanaTransformer2DModel",
        "PixArtTransformer2DModel",
        "AutoencoderKL",
        "CLIPModel",
    ] = "UNet2DModel"
    """Class of diffusers. AutoencoderKL is a codec and CLIPModel, of transformers, a text and an image encoder, which a
    latent text-to-image model stands on; of the keys below they have `config` alone."""
    config: dict[str, Any] = {}
    """Its constructor's arguments; for a model read from a folder they stand in its config.json."""
    schedule: dict[str, Any] = {"name": "edm"}
    """Name and fields of a schedule (diffusion/schedules.py)."""
    prediction: Literal["eps", "v", "x0", "flow", "edm"] = "edm"
    """Meaning of the network's output: a row of the prediction table."""
    data_std: Annotated[float, Field(gt=0)] = 0.5
    """EDM's sigma_data."""
    time_scale: Annotated[float, Field(gt=0)] = 1.0
    """Factor on the network's noise conditioning."""
    classes: Annotated[int, Field(ge=1)] | None = None
    """Labels, the null class not counted (it has the index `classes`); null for none."""
    patch: Annotated[int, Field(ge=1)] = 1
    """Side of the pixel blocks folded into channels (UNet2DModel)."""
    size: Annotated[int, Field(ge=2, multiple_of=2)] | None = None
    """Side of a latent, for FLUX.1, whose config.json names none; null takes 128, of 1024 x 1024 pixels."""
    parts: str | None = None
    """Folder with parts of a pipeline (vae, text_encoder, tokenizer) that a new network works with. jobs/teach.py
    writes copies of them beside it."""


def _denoiser(model: nn.Module, network: Network, precision: str) -> Denoiser:
    """Raises ConfigError where model and description do not fit."""
    try:
        schedule = from_config(network.schedule)
    except ValueError as error:
        raise ConfigError(f"network.{error}") from None
    try:
        backbone = _backbone(model, network)
    except ValueError as error:
        raise ConfigError(f"network: {network.model}: {error}") from None
    try:
        return Denoiser(backbone, schedule, network.prediction, network.data_std, network.time_scale, precision)
    except ValueError as error:
        raise ConfigError(f"network.{error}") from None


def _backbone(model: nn.Module, network: Network) -> Backbone:
    if network.model == "UNet2DModel":
        return UNet(model, network.classes, network.patch)
    if network.size is not None and network.model != FLUX:
        raise ValueError(f"size: {network.size}, but its config.json names the size; leave it out")
    size = (network.size,) if network.size is not None else ()
    backbone = BACKBONES[network.model](model, *size)
    if network.classes not in (None, backbone.classes) or network.patch != 1:
        raise ValueError(
            f"classes {network.classes} and patch {network.patch}, but the model itself has classes {backbone.classes} "
            "and its own way with patches; leave both out"
        )
    return backbone


def new_denoiser(network: Network, precision: str = "fp32", weights: bool = True) -> Denoiser:
    """A network with random weights whose last layer is zero, so that it starts as its prediction's skip (EDM's start).

    Random weights come from torch's global generator; without `weights` they are on the meta device.
    Raises ConfigError for arguments that diffusers does not take.
    """
    config = dict(network.config)
    if network.classes is not None and network.model == "UNet2DModel":
        config.setdefault("num_class_embeds", network.classes + 1)
    outlined = _outlined(network, config, precision)
    if not weights:
        return outlined
    model = model_class(network.model)(**config)
    last = next(getattr(model, name) for name in ("conv_out", "proj_out_2", "proj_out") if hasattr(model, name))
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)
    return _denoiser(model, network, precision)


def new_head(denoiser: Denoiser, at: tuple[str, ...] = ("middle",)) -> Head:
    """A GAN head over a denoiser's taps, measured by one pass on one sample of zeros.

    Raises ValueError for an unknown tap and for a map that is not square.
    """
    backbone, device = denoiser.backbone, next(denoiser.parameters()).device
    if device.type == "meta":  # of a network that is still to be filled, whose buffers are not there
        backbone = deepcopy(backbone).to(device)
        in_float32(backbone)  # whose autocast the meta device has not
    with torch.no_grad():
        x, time = torch.zeros(1, *denoiser.shape, device=device), torch.zeros(1, device=device)
        maps = backbone(x, time, denoiser.conditions.zeros(1, device), "features", at)
    return Head(*(tuple(f.shape[1:]) for f in maps), at=at)


def _outlined(network: Network, config: dict[str, Any], precision: str = "fp32") -> Denoiser:
    """A network by its description, on the meta device. Raises ConfigError where it cannot be built, or is larger than
    the memory."""
    try:
        model = outline(network.model, config)
        check_memory(model)
        _check_call(_denoiser(model, network, "fp32"))
        return _denoiser(model, network, precision)
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(f"network.config: {network.model}: {error}") from None


def empty_denoiser(network: Network, precision: str = "fp32") -> Denoiser:
    """A network as `network_of` describes it, with weights of zero, to be filled. Raises ConfigError."""
    _outlined(network, network.config)
    model = unfilled(network.model, network.config)
    state = model.state_dict()
    model.load_state_dict({key: torch.zeros(value.shape) for key, value in state.items()}, assign=True)
    return _denoiser(model, network, precision)


def network_of(denoiser: Denoiser) -> Network:
    """The network's description, the inverse of building it."""
    backbone = denoiser.backbone
    # sharding changes the class of a module in place
    name = next(kind.__name__ for kind in type(backbone.model).__mro__ if kind.__name__ in BACKBONES)
    return Network(
        model=name,
        config=arguments_of(name, backbone.model.config),
        schedule=to_config(denoiser.schedule),
        prediction=denoiser.prediction,
        data_std=denoiser.data_std,
        time_scale=denoiser.time_scale,
        classes=backbone.classes,
        patch=getattr(backbone, "patch", 1),
        size=getattr(backbone, "size", None),
    )


def variant_of(denoiser: Denoiser, time_scale: float, qk_norm: bool = False) -> Denoiser:
    """A copy of a network with another factor on its time, and with an RMS norm of queries and keys; the norm's scales
    are one at first. Raises ValueError for a model without such a norm."""
    net = deepcopy(denoiser)
    if qk_norm:
        network = network_of(denoiser)
        if network.model not in QK_NORMS:
            raise ValueError(
                f"qk_norm: {network.model} has no norm of queries and keys; {', '.join(QK_NORMS)} have one"
            )
        config = network.config | {"qk_norm": QK_NORMS[network.model]}
        meta = next(denoiser.parameters()).is_meta
        net = new_denoiser(network.model_copy(update={"config": config}), denoiser.precision, weights=not meta)
        if not meta:
            net.load_state_dict(net.state_dict() | denoiser.state_dict())
        net.codec, net.conditions = denoiser.codec, denoiser.conditions
        net.train(denoiser.training)
    net.time_scale = time_scale
    return net


def save_denoiser(denoiser: Denoiser, folder: Path, name: str | None = None) -> None:
    """Writes `folder`/unet or `folder`/transformer (diffusers, safetensors) and `folder`/fewstep.json.

    name: of a sub-folder that gets both files, for a network beside another.
    Raises ValueError for an adapter, whose folder would hold its base alone.
    """
    if not isinstance(denoiser, Denoiser):
        raise ValueError(f"{folder}: a {type(denoiser).__name__} is no denoiser; merge an adapter into its base first")
    sub = folder / (name or ("transformer" if isinstance(denoiser.backbone, Tokens) else "unet"))
    denoiser.backbone.model.save_pretrained(sub, safe_serialization=True)
    config = read_json(sub / "config.json")
    config.pop("_name_or_path", None)  # where the weights once came from is a path on this machine
    (sub / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    network = network_of(denoiser).model_dump(exclude={"config", "parts"})
    ((sub if name else folder) / DESCRIPTION).write_text(json.dumps(network, indent=1) + "\n")


def locate(ref: str | Path, download: bool = True) -> Path:
    """The folder of a teacher: a path, "shipped:...", or "hub:owner/name" or a URL, which are downloaded once."""
    return snapshot(str(ref).removeprefix(PREFIX), download) if str(ref).startswith(PREFIX) else local(ref)


def check(recipe: Any) -> list[Check]:
    """The files of the teacher and of the helpers are here and fit together; their weights are not read."""
    named = {"teacher": recipe.teacher} if recipe.teacher else {}
    named |= {f"helpers.{name}": ref for name, ref in recipe.helpers.items()}
    remedy = "copy it there, to the same path, or use a folder that all nodes mount"
    return [tried(key, partial(_find_network, ref), remedy) for key, ref in named.items()]


def _find_network(ref: str) -> str:
    """The place of a network whose files are complete. Raises ValueError and OSError."""
    if not ref.startswith(PREFIX) and isinstance(place := located(ref), Place):
        return f"{place}: {len(listing(place))} files, to be copied once a node"
    folder = locate(ref, download=False)
    if not (folder / "recipe.yaml").is_file():  # a run's student is a teacher, too; its checkpoints are the engine's
        _read_folder(folder)
    return str(folder)


def open_teacher(ref: str | Path, precision: str = "fp32", weights: bool = True, filled: bool = True) -> Denoiser:
    """A denoiser from a folder of ours or of diffusers (a pipeline, or one model with its scheduler beside it).

    ref: see `locate`. Weights are float32 whatever they were saved as; without `weights` they are on the meta device,
    which takes no memory, and only the headers of their files are read. filled: False leaves them there until
    `weights.fill`.
    Reads safetensors and JSON only; no code that a folder brings is run. Raises ValueError naming what is missing.
    """
    folder = locate(ref)
    network, path, config, stored = _read_folder(folder)
    name, arguments = network.model, arguments_of(network.model, config)
    try:
        # parameters that are replaced while a model is built count twice
        model = outline(name, arguments, tensors=2 * len(stored) + 64)
        _check_call(_denoiser(model, network, "fp32"))
    except ValueError as error:
        raise ValueError(f"teacher: {path}: {error}") from None
    unread = check_headers(model, stored, path.parent)
    if weights:
        model = unfilled(name, arguments, unread)
        model = fill(model) if filled else model
    net = _denoiser(model, network, precision).eval()
    net.codec = find_latents(folder)
    return net


def _read_folder(folder: Path) -> tuple[Network, Path, dict[str, Any], dict[str, Stored]]:
    """A folder's network: its description, its config.json's path and content, its weights' names and places.

    Raises ValueError naming what is missing.
    """
    if not folder.is_dir():
        if folder.suffix in (".pkl", ".pickle", ".pt", ".pth", ".ckpt", ".bin"):
            raise ValueError(
                f"teacher: {str(folder)!r} is a pickle, which runs code when it is opened; convert it, running "
                "none, to a folder with: python jobs/convert.py pickle=... out=..., and network=... if it is not EDM's"
            )
        raise ValueError(
            f"teacher: no folder {str(folder)!r}; make one with: python jobs/teach.py, or download a pipeline there"
        )
    subs = ("unet", "transformer", ".")
    sub = next((folder / s for s in subs if (folder / s / "config.json").is_file()), None)
    if sub is None:
        raise ValueError(
            f"teacher: {str(folder)!r} holds no config.json, nor does a unet or a transformer folder in it"
        )
    path = sub / "config.json"
    config = read_json(path)
    name = _class_name(config, path)
    network = _network_fields(folder, name, config, path)
    return network, path, config, headers(weight_files(sub, name))


def _check_call(denoiser: Denoiser) -> None:
    """Calls a network on the meta device once. Raises ValueError where its parts do not fit each other."""
    backbone, shape = denoiser.backbone, (1, *denoiser.shape)
    cond = denoiser.conditions.zeros(1, "meta")
    try:
        with torch.no_grad():
            x = torch.zeros(shape, device="meta")
            out, (features,) = backbone(x, torch.zeros(1, device="meta"), cond, "both")
    except Exception as error:  # of layers that were built for sizes that fit each other
        raise ValueError(
            f"a sample of shape {denoiser.shape} does not pass: {type(error).__name__}: {one_line(error)}"
        ) from None
    if out.shape != shape or features.ndim != 4:
        raise ValueError(f"makes {tuple(out.shape[1:])} of a sample of shape {denoiser.shape}")


def _class_name(config: dict[str, Any], where: Path) -> str:
    """The class of a model's config.json; the published DiT has the class name of an older version of diffusers."""
    name = config.get("_class_name")
    if name == "Transformer2DModel" and config.get("norm_type") == "ada_norm_zero":
        return "DiTTransformer2DModel"
    if not isinstance(name, str) or name not in BACKBONES:
        raise ValueError(f"teacher: {where} is of class {quoted(name)}; known: {', '.join(BACKBONES)}")
    return name


def _network_fields(folder: Path, model: str, config: dict[str, Any], where: Path) -> Network:
    """The folder's own fewstep.json, or what a diffusers scheduler says. config: the model's, read from `where`."""
    path = folder / DESCRIPTION
    if path.is_file():
        fields = {"model": model} | read_json(path)
    else:
        names = ("scheduler/scheduler_config.json", "scheduler_config.json")
        path = next((folder / name for name in names if (folder / name).is_file()), None)
        if path is None:
            raise ValueError(f"teacher: {str(folder)!r} holds neither {DESCRIPTION} nor {names[0]}")
        classes = config.get("num_class_embeds") if model == "UNet2DModel" else None
        tokens = _tokens({"sample_size": FLUX_SIDE, "patch_size": 2} if model == FLUX else config, where)
        fields = {"model": model, "classes": classes, **from_scheduler(read_json(path), path, tokens)}
    try:
        network = validate(Network, fields)
    except ConfigError as error:
        raise ValueError(f"{path}: {'; '.join(str(error).splitlines())}") from None
    if network.model != model:
        raise ValueError(f"{path}: model is {network.model}, but {where} is of class {model}")
    return network


def _tokens(config: dict[str, Any], where: Path) -> int | None:
    """Patches of one sample, by the model's config; None where that names no size."""
    if config.get("sample_size") is None:
        return None
    try:
        height, width = size_of(config["sample_size"])
    except ValueError as error:
        raise ValueError(f"teacher: {where}: {error}") from None
    patch = config.get("patch_size", 1)
    return (height // patch) * (width // patch) if isinstance(patch, int) and patch > 0 else None
