"""Export of a student as its teacher's pipeline, with its weights and a scheduler that calls it as it was trained, and
of an adapter as a file that load_lora_weights takes. Nothing of ours is needed to run either.

Before a folder gets its name, stock diffusers makes images of it in a fresh process, which must be the student's own.
"""

from __future__ import annotations

import json
import logging
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..config import read_json
from ..diffusion.samplers import Call, run_calls
from ..diffusion.schedules import DDPM, Flow
from ..folders import PIPELINE, appearing
from ..storage.place import Place
from .card import Card, write_card
from .conditions import Prompts, Texts
from .denoiser import Denoiser
from .export import INFERENCE, ExportError, InTurn, entries
from .families import Flux
from .lora import Lora
from .pretrained import network_of, save_denoiser
from .prompts import INDEX, open_encoder

log = logging.getLogger("fewstep.export")

TOLERANCE = 1e-4  # of an image in [-1, 1]
PROMPTS, LABELS = ("a red apple", ""), (0, 1)  # of the images that are compared
LORA = "pytorch_lora_weights.safetensors"
KOHYA = "kohya.safetensors"
KEPT = (".json", ".safetensors", ".txt", ".model")  # files of the teacher's folder that a student's has, too
NEGATIVES = Path(__file__).with_name("nasa.py")  # which an export of a network that subtracts has a copy of
BY_LABEL, FLUX, SANA = "DiTPipeline", "FluxPipeline", "SanaPipeline"
PIXART = ("PixArtAlphaPipeline", "PixArtSigmaPipeline")

CHECK = """
import diffusers, json, sys, torch
from safetensors.torch import save_file
student, teacher, lora, out, inputs = sys.argv[1:]
asked = json.load(open(student + "/inference.json"))["call"]
def images(pipe):
    generator = torch.manual_seed(0)
    return pipe(json.loads(inputs), generator=generator, output_type="pt", **asked).images.float().contiguous()
results = {"its images": images(diffusers.DiffusionPipeline.from_pretrained(student, dtype=torch.float32))}
if lora:
    pipe = diffusers.DiffusionPipeline.from_pretrained(teacher, dtype=torch.float32)
    config = json.load(open(student + "/scheduler/scheduler_config.json"))
    pipe.scheduler = getattr(diffusers, config["_class_name"]).from_config(config)
    pipe.load_lora_weights(lora)
    results["with the adapter its images"] = images(pipe)
assert "fewstep" not in sys.modules, "the folder needs more than diffusers"
save_file(results, out)
"""


def is_stock(net: Denoiser, folder: Path | None) -> bool:
    """True for a network that stock diffusers runs in the pipeline of its teacher's folder: of texts, or a DiT."""
    if isinstance(net.conditions, Texts):
        return True
    index = None if folder is None else folder / INDEX
    return index is not None and index.is_file() and read_json(index).get("_class_name") == BY_LABEL


def lora_refusal(adapter: Lora, folder: Path) -> str | None:
    """Reason why load_lora_weights does not load an adapter into its teacher's pipeline; None where it does."""
    import diffusers

    name = read_json(folder / INDEX)["_class_name"]
    if not hasattr(getattr(diffusers, name), "load_lora_weights"):
        return f"{name} takes no adapters"
    grouped = [key for key, layer in adapter.layers.items() if getattr(layer, "groups", 1) > 1]
    return f"{grouped[0]} is a convolution of several groups, which it does not adapt" if grouped else None


def scheduler_of(net: Denoiser, calls: Sequence[Call]) -> tuple[Any, dict[str, Any]]:
    """diffusers' scheduler that makes these calls, and the arguments of the pipeline's call that it takes for them.

    DDPM: LCMScheduler of the first T timesteps, T - 1 being the first call's, which with N steps has the timesteps
    T - 1, T - 1 - T / N, ... Flow: FlowMatchEulerDiscreteScheduler that noises anew, at sigmas of the call.
    Raises ExportError for calls that neither makes.
    """
    import diffusers

    if any(
        call.then != "renoise" or call.takes != "x" or call.routes or call.extra or call.t is None for call in calls
    ):
        raise ExportError("export: stock schedulers noise anew between calls, and this student's calls are others")
    schedule, count = net.schedule, len(calls)
    if isinstance(schedule, Flow):
        sigmas = [call.t / (schedule.shift - (schedule.shift - 1) * call.t) for call in calls]  # before the shift
        scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=schedule.shift, stochastic_sampling=True)
        return scheduler, {"num_inference_steps": count, "sigmas": [round(s, 6) for s in sigmas]}
    if not isinstance(schedule, DDPM):
        raise ExportError(f"export: no stock scheduler has the schedule {schedule.name}")
    total = round(calls[0].t) + 1
    wanted = [total - 1 - i * (total // count) for i in range(count)]
    if [round(call.t, 3) for call in calls] != wanted:
        times = ", ".join(f"{call.t:g}" for call in calls)
        raise ExportError(f"export: timesteps {times}, and LCMScheduler has {', '.join(map(str, wanted))}")
    betas = {"beta_schedule": schedule.beta_schedule, "beta_start": schedule.beta_start, "beta_end": schedule.beta_end}
    if total < schedule.steps:
        whole = diffusers.LCMScheduler(**betas, num_train_timesteps=schedule.steps)
        betas = {"trained_betas": whole.betas[:total].tolist()}
    predicts = {"eps": "epsilon", "v": "v_prediction", "x0": "sample"}[net.prediction]
    scheduler = diffusers.LCMScheduler(
        **betas,
        num_train_timesteps=total,
        original_inference_steps=count,
        prediction_type=predicts,
        rescale_betas_zero_snr=schedule.zero_snr,
    )
    return scheduler, {"num_inference_steps": count}


def export_pipeline(
    net: Denoiser,
    teacher: Path,
    folder: Path | Place,
    *,
    calls: Sequence[Call],
    card: Card,
    adapter: Lora | None = None,
    overwrite: bool = False,
) -> float:
    """Writes a student as a whole pipeline of diffusers, which appears only when it gives the student's images.

    net: the student, an adapter merged into it. teacher: the pipeline's folder, whose other parts are copied. adapter:
    the same student as an adapter of the teacher, which is written to `lora/` in both of the customary forms and
    compared, too, where load_lora_weights takes it.
    Returns the largest difference to the student's own images in [-1, 1], float32 on the CPU, at most 1e-4.
    Raises ExportError for a student that no stock scheduler calls and for an export whose images differ.
    """
    with appearing(folder, PIPELINE, overwrite=overwrite) as tmp:
        net = deepcopy(net).cpu().eval().float()
        _write(net, teacher, tmp, calls, card)
        ours = _images(net, teacher, calls)
        lora = None
        if adapter is not None and (why := lora_refusal(adapter, teacher)):
            log.warning(f"export: {folder.name} has no file for load_lora_weights: {why}")
        elif adapter is not None:
            (tmp / "lora").mkdir()
            lora = save_lora(adapter, tmp / "lora")
        return _compare(ours, tmp, teacher, lora, _inputs(net))


def _write(net: Denoiser, teacher: Path, folder: Path, calls: Sequence[Call], card: Card) -> None:
    scheduler, asked = scheduler_of(net, calls)
    index = read_json(teacher / INDEX)
    for part in (key for key, value in index.items() if isinstance(value, list) and None not in value):
        if part not in ("unet", "transformer", "scheduler"):
            shutil.copytree(teacher / part, folder / part, ignore=_ignored_files)
    save_denoiser(net, folder)
    scheduler.save_pretrained(folder / "scheduler")
    index["scheduler"] = ["diffusers", type(scheduler).__name__]
    index.pop("_name_or_path", None)
    (folder / INDEX).write_text(json.dumps(index, indent=1) + "\n")
    asked |= _arguments(index["_class_name"], net)
    numbers = entries(net, calls)
    (folder / INFERENCE).write_text(json.dumps({"call": asked, "calls": numbers}, indent=1) + "\n")
    if net.backbone.subtracts:
        shutil.copyfile(NEGATIVES, folder / NEGATIVES.name)
    text = write_card(card, numbers, None, net.classes, stock=asked, negatives=net.backbone.subtracts)
    (folder / "README.md").write_text(text)


def _arguments(pipeline: str, net: Denoiser) -> dict[str, Any]:
    """Arguments of a pipeline's call whose defaults do not fit the student."""
    asked: dict[str, Any] = {}
    if pipeline != FLUX:  # whose guidance scale is an input of the network
        asked["guidance_scale"] = 1.0  # the student has its teacher's guidance in its weights
    if pipeline in (FLUX, SANA):  # whose default is 1024 pixels, whatever the network's size
        asked["height"], asked["width"] = net.picture_shape[1:]
    if pipeline in (SANA, *PIXART):
        asked["use_resolution_binning"] = False  # which knows no other than the published sizes
    if pipeline in PIXART:
        asked["clean_caption"] = False  # which changes a prompt where bs4 and ftfy are installed
    return asked


def _ignored_files(folder: str, names: list[str]) -> list[str]:
    return [name for name in names if not name.endswith(KEPT) and not (Path(folder) / name).is_dir()]


def _inputs(net: Denoiser) -> tuple[Any, ...]:
    return PROMPTS if isinstance(net.conditions, Texts) else LABELS


class _Tokens(InTurn):
    """The noise between calls as FLUX.1's pipeline draws it: of tokens (B, L, 4 C)."""

    def __init__(self, generator: torch.Generator, backbone: Flux):
        super().__init__(generator)
        self.backbone = backbone

    def normal(self, name: str, shape: Any) -> Tensor:
        if name == "z":
            return super().normal(name, shape)
        b, c, h, w = shape
        return F.pixel_shuffle(self.backbone.as_map(super().normal(name, (b, h * w // 4, 4 * c))), 2)


@torch.no_grad()
def _images(net: Denoiser, teacher: Path, calls: Sequence[Call]) -> Tensor:
    """The student's own images of `_inputs`, as training samples them, in [-1, 1]."""
    generator = torch.Generator().manual_seed(0)
    draws = _Tokens(generator, net.backbone) if isinstance(net.backbone, Flux) else InTurn(generator)
    cond: Any = torch.tensor(LABELS)
    if isinstance(net.conditions, Texts):
        prompts = Prompts(open_encoder(teacher, network_of(net).model).columns(PROMPTS))
        cond = prompts.pick(torch.arange(len(PROMPTS)))
    z = draws.normal("z", (len(_inputs(net)), *net.shape))
    return net.pictures(run_calls({calls[0].role: net}, calls, z, cond, draws)).clamp(-1, 1)


def _compare(ours: Tensor, student: Path, teacher: Path, lora: Path | None, inputs: Sequence[Any]) -> float:
    """Largest difference of stock diffusers' images to ours. Raises ExportError."""
    with tempfile.TemporaryDirectory() as tmp:
        out = Path(tmp) / "images.safetensors"
        theirs = _run([str(student), str(teacher), str(lora or ""), str(out), json.dumps(inputs)], out)
    theirs = {what: images * 2 - 1 for what, images in theirs.items()}
    differences = {what: float((images - ours).abs().max()) for what, images in theirs.items()}
    for what, worst in differences.items():
        if not worst <= TOLERANCE:
            text = f"export: {what} differ by {worst:.3g} from the student's, more than {TOLERANCE}; not kept"
            raise ExportError(text)
    return max(differences.values())


def _run(arguments: list[str], out: Path) -> dict[str, Tensor]:
    """Images that CHECK writes to `out`, in a fresh process. Raises ExportError where diffusers does not run it."""
    from safetensors.torch import load_file

    done = subprocess.run(
        [sys.executable, "-P", "-c", CHECK, *arguments], capture_output=True, text=True, cwd=out.parent
    )
    if done.returncode:
        raise ExportError(f"export: diffusers does not run it, so it was not kept: {done.stderr.strip()[-600:]}")
    return load_file(out)


# Adapters


def save_lora(adapter: Lora, folder: Path) -> Path:
    """Writes an adapter's factors under the names that diffusers' load_lora_weights takes, and under kohya's and
    ComfyUI's. The scale alpha / rank is multiplied into `up`. Returns the former file."""
    from safetensors.torch import save_file

    part = "unet" if hasattr(adapter.base.backbone.model, "conv_in") else "transformer"
    stock, kohya = {}, {}
    for key, down in adapter.down.items():
        path = key.removeprefix("backbone/model/")
        up = (adapter.up[key] * adapter.scale).detach().cpu().contiguous()
        down = down.detach().cpu().contiguous()
        name = f"{part}.{path.replace('/', '.')}"
        stock |= {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up}
        name = f"lora_{part}_{path.replace('/', '_')}"
        alpha = torch.tensor(float(down.shape[0]))
        kohya |= {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up, f"{name}.alpha": alpha}
    save_file(stock, folder / LORA, {"format": "pt"})
    save_file({name: value.clone() for name, value in kohya.items()}, folder / KOHYA, {"format": "pt"})
    return folder / LORA
