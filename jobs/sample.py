#!/usr/bin/env python
"""Draws a grid of images from a run's student, an export or a teacher, and says how fast they came."""

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "platform"))

import torch
from pydantic import Field

from fewstep.build import Sampler, given_prompts, grid, make_samples, png
from fewstep.config import OutPath, Strict, command, resolve_out
from fewstep.engine.world import World, device_of
from fewstep.folders import overwritable
from fewstep.students import open_sampler

Count = Annotated[int, Field(ge=1)]


class Sample(Strict):
    """Draws a grid of images from a run's student, an export or a teacher, and says how fast they came."""

    model: str
    """Folder of a run, a checkpoint, an export or a teacher; or hub:owner/name."""
    images: Count = 100
    """Number of images."""
    labels: list[int] | int | None = None
    """Classes to draw in turn, such as [3] or [0,1]; null takes all."""
    method: dict[str, Any] = {}
    """Fields of a run's method to change for sampling, such as method.times=[1.5583] or method.student_steps=2, for
    another number of calls by the same network."""
    prompts: list[str] | str | None = None
    """Texts to draw in turn, for a model that takes texts: one, a list, or a .txt file with one a line. null takes
    those of a run's recipe."""
    negative: str | None = None
    """Text that the images should not show, for a model of Stable Diffusion's family or SDXL; it is subtracted in
    cross-attention (NASA), which works in one call, too."""
    negative_scale: Annotated[float, Field(ge=0)] = 1.0
    """Scale of the subtraction; at 0 images keep their bits."""
    seed: int = 0
    """Seed of the noise."""
    out: OutPath = "grid.png"
    """File of the picture."""
    each: OutPath | None = None
    """Folder that gets each image as a file too."""
    columns: Count = 10
    """Columns of the picture."""
    steps: Count = 18
    """Solver steps of a teacher: Heun's (2 steps - 1 network calls an image), or DDIM's (one each) where it takes
    texts. A student has its own steps."""
    guidance: Annotated[float, Field(ge=1)] = 1.0
    """Guidance scale of a teacher."""
    batch: Count = 100
    """Images sampled at once."""
    device: str = "cpu"
    """Device: cpu or cuda."""


def of_classes(sampler: Sampler, labels: list[int]) -> Sampler:
    """The sampler for `labels` in turn. Raises ValueError for one that it has not."""
    classes = sampler.conditions.classes
    wrong = [label for label in labels if not 0 <= label < (classes or 0)]
    if wrong or not labels:
        raise ValueError(f"labels: {labels}, but the model has {classes or 'no'} classes, counted from 0")
    return replace(sampler, conditions=replace(sampler.conditions, listing=tuple(labels)))


def write(picture: torch.Tensor, path: Path) -> None:
    """uint8 (H, W, C) as a PNG file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(png(picture))


@command(Sample)
def main(job: Sample) -> None:
    device = device_of(job.device)
    out, each = resolve_out(job.out), [resolve_out(job.each) / f"{i:06d}.png" for i in range(job.images) if job.each]
    for path in (out, *each):
        overwritable(path, "out" if path == out else "each")
    given = given_prompts(job.prompts), job.negative, job.negative_scale, job.method
    sampler = open_sampler(job.model, job.steps, job.guidance, device, *given)
    if job.labels is not None:
        sampler = of_classes(sampler, [job.labels] if isinstance(job.labels, int) else job.labels)
    samples = make_samples(sampler, job.images, job.seed, min(job.batch, job.images), World(device=device))
    write(grid(samples.images, min(job.columns, job.images)), out)
    for image, path in zip(samples.images, each, strict=False):
        write(image.permute(1, 2, 0), path)
    speed = job.images / samples.seconds
    print(
        f"{job.images} images by {sampler.name}, {sampler.calls} network calls each: {speed:.1f} images/s on {device}"
    )
    report = {
        "out": str(out),
        "sampler": sampler.name,
        "nfe": sampler.calls,
        "images": job.images,
        "images_per_s": speed,
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main()
