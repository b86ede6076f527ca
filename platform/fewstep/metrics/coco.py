"""Two protocols for text-to-image models on captions of COCO-2014, with their preparation of pictures.

Yin et al. 2024, arXiv:2405.14867, appendix G and the evaluation that was published with it.
coco30k: 30,000 pictures for captions of val2014, against all of val2014 (40,504 pictures), both as centre squares of
256 pixels: zero-shot FID, as for Stable Diffusion 1.5. coco10k: 10,000 pictures of at least 1024 pixels, against the
real pictures of the same captions, both as centre squares of 512 pixels; and the patch FID, of centres of 299 pixels
that are cut out and not resized. The prompts are evaluate.prompts. Reference statistics of a folder of real pictures:

    python jobs/features.py extractor=coco30k data=val2014 out=statistics/coco30k

Departs from it: pictures come from this project's seeds, not from a generator seeded with the number of the batch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fewstep.metrics.base import Device, Extractor, File, Files, Measure, Metric, Outputs, Samples, Score, score
from fewstep.metrics.frechet import Frechet
from fewstep.metrics.inception import INCEPTION, InceptionMetric
from fewstep.metrics.retrieval import Scorer, open_scorer

BATCH = 50
CAPTION = "A photo depicts "  # before each prompt in the CLIP score
CLIP_SIDE = 256  # of the centre square before CLIP's own preparation
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # CLIP's, of colours in [0, 1]
VIT_G_14 = {"hidden_size": 1408, "num_hidden_layers": 40, "patch_size": 14, "image_size": 224}


def square(picture: Image.Image, side: int) -> Image.Image:
    """The centre square, resized to `side` pixels by Lanczos."""
    short = min(picture.size)
    return centre(picture, short).resize((side, side), Image.Resampling.LANCZOS)


def centre(picture: Image.Image, side: int) -> Image.Image:
    """The centre of `side` x `side` pixels; a picture with a shorter side stays whole."""
    width, height = picture.size
    if min(width, height) < side:
        return picture
    left, top = round((width - side) / 2), round((height - side) / 2)
    return picture.crop((left, top, left + side, top + side))


@dataclass(frozen=True)
class Protocol:
    """Pictures of a protocol: how many, of how many pixels at least, and how they are prepared."""

    images: int
    side: int
    prepare: Callable[[Image.Image], Image.Image]

    def check(self, samples: Samples, name: str) -> None:
        """Raises ValueError for samples that are not the protocol's."""
        if len(samples) != self.images:
            raise ValueError(
                f"samples.images: {len(samples):,}; {name} is of {self.images:,}: set evaluate.images={self.images}"
            )
        channels, height, width = samples.images.shape[1:]
        if channels != 3 or min(height, width) < self.side:
            raise ValueError(
                f"samples.images: {channels} channels of {height} x {width} pixels; {name} takes colour pictures of "
                f"{self.side} pixels or more"
            )
        if 2 * len(set(samples.prompts)) <= self.images:
            raise ValueError(
                f"samples.prompts: {len(set(samples.prompts)):,} different prompts; {name} takes a caption for each of "
                f"{self.images:,} pictures: name a file of them, one a line, with evaluate.prompts=..."
            )


PROTOCOLS = {
    "coco30k": Protocol(30_000, 256, partial(square, side=256)),
    "coco10k": Protocol(10_000, 512, partial(square, side=512)),
    "coco10k_patch": Protocol(10_000, 1024, partial(centre, side=299)),
}


class Prepared:
    """An extractor that sees pictures as a protocol prepares them."""

    def __init__(self, network: Extractor, protocol: str):
        self.network, self.prepare = network, PROTOCOLS[protocol].prepare
        self.name = f"{network.name}-{protocol}"
        self.hash = _digest(network.hash, protocol)

    def describe(self, pictures: Iterable[Tensor | np.ndarray]) -> Outputs:
        """Features of pictures (3, H, W), uint8, of any sizes."""
        ready = (_pixels(self.prepare(_picture(picture))) for picture in pictures)
        parts = [self.network(part).features for part in _batches(ready)]
        return Outputs(np.concatenate(parts))

    def __call__(self, images: Tensor) -> Outputs:
        return self.describe(images)


def _digest(network: str, preparation: str) -> str:
    return hashlib.sha256(f"{network} {preparation}".encode()).hexdigest()


def _picture(pixels: Tensor | np.ndarray) -> Image.Image:
    return Image.fromarray(np.ascontiguousarray(np.asarray(pixels).transpose(1, 2, 0)))


def _pixels(picture: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)


def _batches(pictures: Iterable[Tensor]) -> Iterator[Tensor]:
    """Pictures of one size that follow each other, stacked."""
    for _, alike in groupby(pictures, key=lambda picture: picture.shape):
        part: list[Tensor] = []
        for picture in alike:
            part.append(picture)
            if len(part) == BATCH:
                yield torch.stack(part)
                part = []
        if part:
            yield torch.stack(part)


def open_prepared(protocol: str, device: Device = "cpu") -> Prepared:
    """clean-fid's Inception as a protocol shows it pictures. Raises OSError or ValueError naming the file."""
    return Prepared(INCEPTION.open(INCEPTION.find(True), device), protocol)


class CocoDistance(InceptionMetric):
    """Frechet inception distance of a protocol: coco30k at 256 pixels, coco10k at 512, and coco10k's patches."""

    names = ("fid_coco30k", "fid_coco10k", "patch_fid_coco10k")
    better = "lower"

    def build(self, files: Files) -> Measure:
        protocol = self.name.removeprefix("patch_").removeprefix("fid_") + "_patch" * self.name.startswith("patch_")
        measure = Frechet(Prepared(self.network(files), protocol), files.open(self, "inception_reference"))
        measure.name = self.name
        return partial(_checked, measure, PROTOCOLS[protocol])


def _checked(measure: Frechet, protocol: Protocol, samples: Samples) -> Score:
    protocol.check(samples, measure.name)
    return measure(samples)


class Clip(Scorer):
    """OpenCLIP's ViT-g-14, as transformers has it: pictures as centre squares of 256 pixels before CLIP's own way."""

    name, field = "clip", "clip"
    absent = "download model.safetensors, config.json and the tokenizer of laion/CLIP-ViT-g-14-laion2B-s12B-b42K there"

    def __init__(self, model: Any, tokenizer: Any, digest: str, device: Device):
        vision = model.config.vision_config
        if differ := [
            f"{key} {getattr(vision, key)}" for key, value in VIT_G_14.items() if getattr(vision, key) != value
        ]:
            raise ValueError(f"{', '.join(differ)}: not ViT-g-14, by which the protocol scores")
        super().__init__(model, tokenizer, _digest(digest, str(CLIP_SIDE)), device, BATCH)

    def pixels(self, images: Tensor) -> Tensor:
        """The network's input of uint8 images."""
        side = self.model.config.vision_config.image_size
        small = (square(_picture(image), CLIP_SIDE).resize((side, side), Image.Resampling.BICUBIC) for image in images)
        colours = torch.stack([_pixels(picture) for picture in small]).float() / 255
        mean, std = (torch.tensor(value).view(3, 1, 1) for value in (MEAN, STD))
        return (colours - mean) / std


def open_clip(path: Path, device: Device = "cpu") -> Clip:
    """ViT-g-14 whose weights are at `path`, with its config and tokenizer beside them. Raises ValueError."""
    return open_scorer(path, device, Clip)


CLIP = File(open=open_clip, remedy=Clip.absent, suffix="model.safetensors")


class ClipScore(Metric):
    """Mean cosine of pictures and their captions by OpenCLIP's ViT-g-14."""

    names = ("clip_coco30k", "clip_coco10k")
    better = "higher"

    clip: Annotated[str | None, CLIP] = None
    """Weights of ViT-g-14 (laion2b_s12b_b42k), a model.safetensors with its config and tokenizer beside it."""

    def build(self, files: Files) -> Measure:
        return partial(self._score, files.open(self, "clip"))

    def _score(self, clip: Clip, samples: Samples) -> Score:
        PROTOCOLS[self.name.removeprefix("clip_")].check(samples, self.name)
        pictures = torch.from_numpy(samples.features.of(clip).features)
        texts = clip.texts([CAPTION + prompt for prompt in samples.prompts])
        return score(self.name, (pictures * texts).sum(1).mean().item(), samples, extractor=clip.hash)
