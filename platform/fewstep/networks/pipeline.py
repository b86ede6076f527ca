"""A few-step generator as a diffusers pipeline; it needs diffusers and torch, and comes with the weights.

from diffusers import DiffusionPipeline
pipe = DiffusionPipeline.from_pretrained("folder or hub id", trust_remote_code=True)
image = pipe(class_labels=3).images[0]
"""

import inspect
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput, ModelMixin
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image
from torch.nn import functional as F

Labels = None | int | str | list[int | str]


class FewStepPipeline(DiffusionPipeline):
    """Denoise, noise again to the next level, denoise, ...: as many network calls as `sampling["calls"]` has entries.

    unet: predicts in its own terms; each call's entry turns that into an image x0 = skip x + out F(input x, time) when
    x was noised to alpha x0 + sigma eps and rescaled. An entry says too how it leads to the next (`then`: "renoise"
    with fresh noise but for the share `kept`, "step" without), what it takes ("x", or the first "noise"), what it adds
    to the time embedding (`shift`, or null), and which network it calls (`unet`, or one of unet_2 to unet_4 that a
    model may have; or `routes`, the networks' names by class).
    sampling: "calls", "classes" (or null), "class_names" (or null), "patch" (side of the pixel blocks folded into
    channels), "network" (what fewstep.json says of the unet, for the tools that made it).
    """

    _optional_components = ["unet_2", "unet_3", "unet_4"]

    def __init__(
        self,
        unet: ModelMixin,
        unet_2: ModelMixin | None = None,
        unet_3: ModelMixin | None = None,
        unet_4: ModelMixin | None = None,
        sampling: dict | None = None,
    ):
        super().__init__()
        if not sampling:
            raise ValueError("sampling: missing in model_index.json, which says how this model is called")
        self.register_modules(unet=unet, unet_2=unet_2, unet_3=unet_3, unet_4=unet_4)
        self.register_to_config(sampling=sampling)

    def save_pretrained(self, save_directory: Any, *args: Any, push_to_hub: bool = False, **kwargs: Any) -> None:
        """Saves as every pipeline of diffusers does, with this file, without which the folder does not open."""
        if push_to_hub:
            raise ValueError("push_to_hub: save to a folder, or call pipe.push_to_hub(id), which uploads all files")
        super().save_pretrained(save_directory, *args, **kwargs)
        folder, source = Path(save_directory), Path(inspect.getfile(type(self)))
        if source.resolve() != (folder / "pipeline.py").resolve():
            shutil.copyfile(source, folder / "pipeline.py")
        index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
        index["_class_name"] = ["pipeline", type(self).__name__]
        for name, part in self.components.items():
            if isinstance(part, ModelMixin) and not type(part).__module__.startswith("diffusers."):
                code = Path(inspect.getfile(type(part)))
                index[name] = [code.stem, type(part).__name__]
                if code.resolve() != (folder / name / code.name).resolve():
                    shutil.copyfile(code, folder / name / code.name)
        (folder / "model_index.json").write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")
        if network := self.config.sampling.get("network"):
            calls = self.config.sampling["calls"]
            used = {name for call in calls for name in (call.get("routes") or [call.get("unet", "unet")])}
            for place in [folder, *(folder / name for name in used - {"unet"})]:
                (place / "fewstep.json").write_text(json.dumps(network, indent=1) + "\n", encoding="utf-8")

    def labels(self, class_labels: Labels, num_images: int | None) -> list[Any]:
        """One label an image; without any, the classes in turn. An unconditional model has None for each."""
        classes, names = self.config.sampling["classes"], self.config.sampling["class_names"] or []
        if isinstance(class_labels, (list, tuple)):
            if num_images not in (None, len(class_labels)):
                raise ValueError(f"num_images: {num_images}, but class_labels has {len(class_labels)}; leave one out")
            wanted = list(class_labels)
        elif class_labels is None and classes:
            wanted = [i % classes for i in range(num_images or 1)]
        else:
            wanted = [class_labels] * (num_images or 1)
        if not classes:
            if any(label is not None for label in wanted):
                raise ValueError("class_labels: this model has no classes; leave them out")
            return wanted
        numbers = [names.index(label) if label in names else label for label in wanted]
        for label in numbers:
            if not isinstance(label, int) or not 0 <= label < classes:
                known = f", or one of {', '.join(names)}" if names else ""
                raise ValueError(f"class_labels: {label!r} is no class; give 0 to {classes - 1}{known}")
        return numbers

    @torch.no_grad()
    def sample(self, labels: list[Any], generator: Any = None) -> torch.Tensor:
        """x0 (N, C, H, W) float32 as the network made it: about [-1, 1], not clamped. labels: one an image."""
        sampling, unet, device = self.config.sampling, self.unet, self._execution_device
        patch, count = sampling["patch"], len(labels)
        height, width = (size * patch for size in _pair(unet.config.sample_size))
        shape = (count, unet.config.in_channels // patch**2, height, width)
        cond = None if sampling["classes"] is None else torch.tensor(labels, device=device)
        z = randn_tensor(shape, generator=generator, device=device, dtype=torch.float32)
        x0 = x_t = before = None
        for call in sampling["calls"]:
            if before is None or call["takes"] == "noise":
                x_t = z * call["start"]
            elif before["then"] == "step":  # to this level along the noise that was there (DDIM)
                eps = (x_t - before["alpha"] * x0) / before["sigma"]
                x_t = call["alpha"] * x0 + call["sigma"] * eps
            else:
                eps = randn_tensor(shape, generator=generator, device=device, dtype=torch.float32)
                if kept := before["kept"]:
                    old = (x_t - before["alpha"] * x0) / before["sigma"]
                    eps = kept * old + (1 - kept**2) ** 0.5 * eps
                x_t = call["alpha"] * x0 + call["sigma"] * eps
            x, x0 = x_t * call["rescale"], torch.empty_like(x_t)
            for name, rows in _routed(call, labels):
                unet, own = getattr(self, name), None if cond is None else cond[rows]
                folded = F.pixel_unshuffle(x[rows] * call["input"], patch).to(unet.dtype)
                time = torch.full((len(folded),), call["time"], device=device)
                with _shifted(unet, call["shift"]):
                    out = unet(folded, time, class_labels=own, return_dict=False)[0][:, : folded.shape[1]]
                x0[rows] = call["skip"] * x[rows] + call["out"] * F.pixel_shuffle(out.float(), patch)
            before = call
        return x0

    def __call__(
        self,
        class_labels: Labels = None,
        num_images: int | None = None,
        generator: None | torch.Generator | list[torch.Generator] = None,
        num_inference_steps: int | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> ImagePipelineOutput | tuple:
        """Images of the classes asked for.

        class_labels: a class (number or name) for all `num_images`, or a list with one an image; None takes the classes
        in turn. generator: as everywhere in diffusers. num_inference_steps: fixed by the model's training, so None or
        that number. output_type: "pil", "pt" (N, C, H, W) in [0, 1], or "np" (N, H, W, C) in [0, 1].
        """
        steps = len(self.config.sampling["calls"])
        if num_inference_steps not in (None, steps):
            raise ValueError(f"num_inference_steps: {num_inference_steps}, but this model was distilled to {steps}")
        if output_type not in ("pil", "pt", "np"):
            raise ValueError(f"output_type: {output_type!r} is not one of pil, pt, np")
        x0 = self.sample(self.labels(class_labels, num_images), generator).clamp(-1, 1)
        if output_type == "pt":
            images = (x0 + 1) / 2
        elif output_type == "np":
            images = ((x0 + 1) / 2).permute(0, 2, 3, 1).cpu().numpy()
        else:
            pixels = ((x0 + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
            images = [Image.fromarray(p[..., 0] if p.shape[-1] == 1 else p) for p in pixels]
        return ImagePipelineOutput(images=images) if return_dict else (images,)


def _routed(call: dict, labels: list[Any]) -> list[tuple[str, Any]]:
    """Names of the networks of a call, and the samples of each."""
    if not (routes := call.get("routes")):
        return [(call.get("unet", "unet"), slice(None))]
    names = [routes[label] for label in labels]
    return [(name, [i for i, own in enumerate(names) if own == name]) for name in dict.fromkeys(names)]


@contextmanager
def _shifted(unet: ModelMixin, shift: list[float] | None) -> Iterator[None]:
    """Adds `shift` to the time embedding during a call."""
    if shift is None:
        yield
        return
    add = lambda module, args, out: out + torch.tensor(shift, device=out.device, dtype=out.dtype)
    handle = unet.time_embedding.register_forward_hook(add)
    try:
        yield
    finally:
        handle.remove()


def _pair(size: Any) -> Any:
    return size if isinstance(size, (list, tuple)) else (size, size)
