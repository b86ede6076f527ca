"""Export: a trained few-step generator as a folder that diffusers' DiffusionPipeline.from_pretrained loads.

The folder is whole by itself: weights and JSON, a model card, and `pipeline.py`, the code that diffusers runs. Before
it gets its name it is loaded in a fresh process and must give the images that the denoiser gives here.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, Literal

import torch
from pydantic import ConfigDict, Field
from torch import Tensor

from ..config import ConfigError, Strict, read_json, validate
from ..diffusion.level import PREDICTIONS
from ..diffusion.samplers import Call, run_calls
from ..folders import EXPORT, appearing
from ..storage.place import Place
from .backbones import EDMUNet, UNet
from .card import Card, write_card
from .denoiser import Denoiser
from .pretrained import network_of, save_denoiser

PIPELINE = Path(__file__).with_name("pipeline.py")
OWN = {"EDMUNetModel": Path(__file__).with_name("edm.py")}  # classes that diffusers has not
INDEX = "model_index.json"
INFERENCE = "inference.json"  # of a stock pipeline's folder, which has no place for the calls elsewhere
TOLERANCE = 1e-5  # of the network's own output, from float32's rounding in another process
GREY = 1 / 255  # half a grey level, in [-1, 1]
CHECKED_IMAGES = 4
NETWORKS = 4  # the pipeline names so many components

CHECK = """
import sys, torch
from diffusers import DiffusionPipeline
from safetensors.torch import save_file
pipe = DiffusionPipeline.from_pretrained(sys.argv[1], trust_remote_code=True)
labels = pipe.labels(None, int(sys.argv[2]))
x0 = pipe.sample(labels, torch.Generator().manual_seed(0))
assert "fewstep" not in sys.modules, "pipeline.py needs more than diffusers and torch"
save_file({"x0": x0.contiguous()}, sys.argv[3])
"""


class ExportError(ValueError):
    """A generator that cannot be exported, or an export that does not give the same images; nothing was written."""


def names(calls: Sequence[Call]) -> dict[str, str]:
    """Names of the networks in an export by role: "unet" is the student, the others follow as "unet_2", "unet_3"."""
    others = dict.fromkeys(role for call in calls for role in call.roles if role != "student")
    return {"student": "unet"} | {role: f"unet_{i}" for i, role in enumerate(others, 2)}


def entries(
    denoiser: Denoiser, calls: Sequence[Call], others: Mapping[str, Denoiser] = MappingProxyType({})
) -> list[dict[str, Any]]:
    """The pipeline's arithmetic at each call, as numbers: the denoiser's own, at a batch of one in float32.

    calls: from noise to clean. others: networks of roles that are not the student's. Keys: unet (the network's name);
    alpha, sigma (of the noising); start (factor on the first noise); rescale (to the network's own schedule), input
    (factor on what enters it), time (its noise conditioning), skip and out (x0 = skip x + out F); then, kept and takes,
    as in diffusion/samplers.py; shift (the sum that extra scalars add to the time embedding, or null); routes (the
    networks' names by class, or null). Raises ExportError for classes whose networks differ in these numbers.
    """
    out, nets, unets = [], {"student": denoiser, **others}, names(calls)
    for call in calls:
        first, *more = (_numbers(nets[role], call) for role in call.roles)
        if any(numbers != first for numbers in more):
            raise ExportError("export: networks of different classes differ in schedule or prediction; give them one")
        fields = {
            "unet": unets[call.roles[0]],
            "then": call.then,
            "kept": call.kept,
            "takes": call.takes,
            "routes": [unets[role] for role in call.routes] or None,
        }
        out.append(first | fields)
    return out


def _numbers(denoiser: Denoiser, call: Call) -> dict[str, Any]:
    """One network's part of an entry."""
    level = call.level(torch.empty(1, 1, 1, 1))
    own, t = denoiser.own_level(level, level.alpha.ndim)
    skip, factor = PREDICTIONS[denoiser.prediction](own.alpha, own.sigma, denoiser.data_std)
    scale, time = denoiser.conditioning(own, t)
    entry = {
        "alpha": level.alpha,
        "sigma": level.sigma,
        "start": level.start,
        "rescale": own.norm / level.norm,
        "input": scale,
        "time": time,
        "skip": skip,
        "out": factor,
    }
    shift = denoiser.shift({name: torch.full((1,), float(v)) for name, v in call.extra.items()})
    return {key: float(value) for key, value in entry.items()} | {"shift": None if shift is None else shift[0].tolist()}


UNetName = Annotated[str, Field(pattern="^unet(_[2-4])?$")]


class Entry(Strict):
    """A call in an export's model_index.json, as `entries` writes it; one of an older version always noises anew."""

    alpha: Annotated[float, Field(ge=0)]
    sigma: Annotated[float, Field(ge=0)]
    start: float
    rescale: float
    input: float
    time: float
    skip: float
    out: float
    then: Literal["renoise", "step"] = "renoise"
    kept: Annotated[float, Field(ge=0, le=1)] = 0.0
    takes: Literal["x", "noise"] = "x"
    shift: list[float] | None = None
    unet: UNetName = "unet"
    routes: list[UNetName] | None = None


class _Sampling(Strict):
    model_config = ConfigDict(extra="ignore")

    calls: Annotated[list[Entry], Field(min_length=1, max_length=1000)]


def exported_calls(folder: Path) -> tuple[Call, ...] | None:
    """The calls of an export, from noise to clean; None for the folder of a teacher. Raises ValueError naming the file.

    A call's role is "student", or the name of the sub-folder that holds another network.

    An export whose calls take further scalars is refused, as its network has no embedding for them here.
    """
    index = folder / INDEX
    if (folder / INFERENCE).is_file():
        index, sampling = folder / INFERENCE, read_json(folder / INFERENCE)
    else:
        sampling = read_json(index).get("sampling") if index.is_file() else None
    if sampling is None:
        return None
    try:
        entries = validate(_Sampling, sampling if isinstance(sampling, dict) else {"calls": sampling}).calls
    except ConfigError as error:
        raise ValueError(f"{index}: sampling.{'; '.join(str(error).splitlines())}") from None
    if any(entry.shift is not None for entry in entries):
        raise ValueError(f"{index}: its calls take further scalars, which only its own pipeline.py knows; give the run")
    role = lambda unet: "student" if unet == "unet" else unet
    return tuple(
        Call(e.alpha, e.sigma, role(e.unet), e.then, e.kept, e.takes, tuple(map(role, e.routes or ()))) for e in entries
    )


def exported_class_names(folder: Path, classes: int | None) -> tuple[str, ...]:
    """Names of the classes in an export, in order; () where it has none, or not one for each class."""
    index = folder / INDEX
    sampling = read_json(index).get("sampling") if index.is_file() else None
    names = sampling.get("class_names") if isinstance(sampling, dict) else None
    if not isinstance(names, list) or len(names) != classes or not all(isinstance(name, str) for name in names):
        return ()
    return tuple(names)


def check_exportable(denoiser: Denoiser, calls: Sequence[Call]) -> None:
    """Raises ExportError for a generator without a pipeline here. The weights are not looked at."""
    if not isinstance(denoiser.backbone, (UNet, EDMUNet)):
        raise ExportError(
            f"export: {type(denoiser.backbone.model).__name__} has no pipeline here; exported are pixel-space "
            "generators of UNet2DModel and EDMUNetModel"
        )
    if len(names(calls)) > NETWORKS:
        raise ExportError(
            f"export: its calls are of {len(names(calls))} networks; a pipeline here has {NETWORKS} at most"
        )


def export(
    denoiser: Denoiser,
    folder: Path | Place,
    *,
    calls: Sequence[Call],
    card: Card,
    others: Mapping[str, Denoiser] = MappingProxyType({}),
    class_names: Sequence[str] | None = None,
    overwrite: bool = False,
) -> float:
    """Writes a few-step generator to `folder`, which appears only when it is whole and gives the same images.

    denoiser: the network of the role "student". calls: the generator's, from noise to clean. others: networks of its
    further roles, each of which gets a sub-folder. overwrite: replace an earlier export, in whose
    folder nothing else lies. Returns the largest difference to the denoiser's own images, clamped to [-1, 1] as people
    get them, in float32 on the CPU; it is at most `tolerance`.
    Raises ExportError for a network without a pipeline here and an export that fails to compare, FolderError for a
    folder in the way.
    """
    check_exportable(denoiser, calls)
    if class_names and len(class_names) != denoiser.classes:
        raise ExportError(f"class_names: {len(class_names)} names for {denoiser.classes} classes")
    with appearing(folder, EXPORT, overwrite=overwrite) as tmp:
        given = {"student": denoiser, **others}
        nets = {role: deepcopy(given[role]).cpu().eval().float() for role in names(calls)}
        _write(nets, tmp, calls, card, class_names)
        return _compare(nets, tmp, calls)


def _write(
    nets: Mapping[str, Denoiser], folder: Path, calls: Sequence[Call], card: Card, class_names: Sequence[str] | None
) -> None:
    import diffusers

    net = nets["student"]
    numbers = entries(net, calls, nets)
    save_denoiser(net, folder)
    for role, name in names(calls).items():
        if role != "student":
            save_denoiser(nets[role], folder, name)
    shutil.copyfile(PIPELINE, folder / PIPELINE.name)
    classes = {name: network_of(nets[role]).model for role, name in names(calls).items()}
    for name, kind in classes.items():
        if kind in OWN:
            shutil.copyfile(OWN[kind], folder / name / OWN[kind].name)
    index: dict[str, Any] = {
        "_class_name": [PIPELINE.stem, "FewStepPipeline"],
        "_diffusers_version": diffusers.__version__,
        **{name: [OWN[kind].stem if kind in OWN else "diffusers", kind] for name, kind in classes.items()},
        "sampling": {
            "calls": numbers,
            "classes": net.classes,
            "class_names": list(class_names) if class_names else None,
            "patch": getattr(net.backbone, "patch", 1),
            "network": network_of(net).model_dump(exclude={"config"}),
        },
    }
    (folder / INDEX).write_text(json.dumps(index, indent=1) + "\n")
    (folder / "README.md").write_text(write_card(card, numbers, class_names, net.classes))


class InTurn:
    """Noise from one generator in the order of the calls, as a diffusers pipeline draws it."""

    def __init__(self, generator: torch.Generator):
        self.generator = generator

    def normal(self, name: str, shape: Any) -> Tensor:
        return torch.randn(shape, generator=self.generator)


@torch.no_grad()
def _compare(nets: Mapping[str, Denoiser], folder: Path, calls: Sequence[Call]) -> float:
    """Largest difference of the folder's images, made in a fresh process, to the denoisers' from the same noise."""
    net = nets["student"]
    draws = InTurn(torch.Generator().manual_seed(0))
    z = draws.normal("z", (CHECKED_IMAGES, *net.shape))
    cond = net.conditions.listed(torch.arange(CHECKED_IMAGES))
    ours = run_calls(nets, calls, z, cond, draws)
    theirs = _in_fresh_process(folder)
    worst = float((theirs.clamp(-1, 1) - ours.clamp(-1, 1)).abs().max())
    allowed = tolerance(entries(net, calls, nets))
    if not worst <= allowed:
        raise ExportError(
            f"export: its images differ by {worst:.3g} from the generator's, more than {allowed:.3g}; not kept"
        )
    return worst


def tolerance(numbers: Sequence[dict[str, Any]]) -> float:
    """The difference in [-1, 1] that an export's images may have: at least 1e-5, at most half a grey level.

    x0 is c_out times the network's output, and so is the rounding: c_out is 157 at the last step of a DDPM that
    predicts eps. numbers: `entries` of its calls.
    """
    return min(TOLERANCE * max(1.0, *(abs(call["out"]) for call in numbers)), GREY)


def _in_fresh_process(folder: Path) -> Tensor:
    from safetensors.torch import load_file

    with tempfile.TemporaryDirectory() as tmp:
        images = Path(tmp) / "images.safetensors"
        # diffusers copies pipeline.py into its module cache before it runs it: not into the user's for a trial
        env = os.environ | {"HF_MODULES_CACHE": str(Path(tmp) / "modules"), "HF_HUB_OFFLINE": "1"}
        fields = [sys.executable, "-P", "-c", CHECK, str(folder), str(CHECKED_IMAGES), str(images)]
        done = subprocess.run(fields, env=env, capture_output=True, text=True, cwd=tmp)
        if done.returncode:
            raise ExportError(f"export: diffusers does not load it, so it was not kept: {done.stderr.strip()[-600:]}")
        return load_file(images)["x0"]
