"""A generator opened once for many small requests, each with its own seed and condition."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import torch

from ..build import Sampler, draw, png, sample_draws, with_pipeline
from ..config import resolve
from ..diffusion.draws import Joined
from ..engine.world import World, device_of
from ..folders import cleaned_name, plain_name
from ..networks.conditions import Prompts, Texts
from ..networks.pretrained import locate, network_of
from ..networks.prompts import open_encoder
from ..students import Opened, open_generator, recipe_of
from ..texts import quoted
from ..tracking import exported
from .settings import Settings

REGISTERED = "models:/"
KEPT_PROMPTS = 256  # whose embeddings are kept


@dataclass(frozen=True)
class About:
    """A served model, as people and programs choose it.

    takes: what its prompts are. size: (height, width) in pixels. calls: network calls an image, as `sampler` makes
    them. steps: of a teacher's solver; None for a student, which has its own.
    """

    name: str
    role: Literal["student", "teacher"]
    takes: Literal["class", "text", "nothing"]
    size: tuple[int, int]
    sampler: str
    calls: int
    classes: int | None = None
    class_names: tuple[str, ...] = ()
    steps: int | None = None

    def to_dict(self) -> dict[str, Any]:
        """The fields in JSON types."""
        return asdict(self) | {"size": f"{self.size[1]}x{self.size[0]}", "class_names": list(self.class_names)}


@dataclass(frozen=True)
class ImageRequest:
    """One request: `images` images for a class label, for a text, or for neither. steps: of a teacher's solver."""

    images: int
    seed: int
    label: int | None = None
    text: str | None = None
    steps: int | None = None


@dataclass(frozen=True)
class ImageResult:
    """The answer: PNG files; the seconds that the whole batch took; and its images, those of other requests too."""

    pngs: tuple[bytes, ...]
    seconds: float
    together: int


class Generator:
    """An opened generator. It draws requests together, and each gets the images that jobs/sample.py draws for its seed.

    Requests that are drawn together differ from those drawn alone by the rounding of float32: a pixel in ten thousand,
    by one grey level.
    """

    def __init__(self, opened: Opened, name: str, device: torch.device, steps: int = 18, guidance: float = 1.0):
        self.net, self.opened, self.device, self.guidance = opened.net, opened, device, guidance
        texts = isinstance(self.net.conditions, Texts)
        if texts:
            with_pipeline(self.net, opened.pipeline)  # its codec, and what stands for no text
            self.encoder = open_encoder(opened.pipeline, network_of(self.net).model, device)
        sampler, classes = opened.sampler(steps, guidance), self.net.conditions.classes
        self.about = About(
            name,
            "student" if opened.distilled else "teacher",
            "text" if texts else "class" if classes else "nothing",
            tuple(self.net.picture_shape[1:]),
            sampler.name,
            sampler.calls,
            classes,
            opened.class_names,
            None if opened.distilled else steps,
        )
        self.embedded = lru_cache(KEPT_PROMPTS)(self._embedded)

    def sampler(self, request: ImageRequest) -> Sampler:
        """The sampler for a request."""
        return self.opened.sampler(request.steps or self.about.steps or 1, self.guidance)

    def draw(self, requests: Sequence[ImageRequest]) -> list[ImageResult]:
        """The answers to requests with the same `steps`, drawn as one batch."""
        start, world = time.perf_counter(), World(device=self.device)
        images = sum(request.images for request in requests)
        draws = Joined(tuple((sample_draws(request.seed, world), request.images) for request in requests))
        pictures = draw(self.sampler(requests[0]), draws, images, self.conditions(requests))
        seconds = time.perf_counter() - start
        answers = []
        for part in pictures.split([request.images for request in requests]):
            files = tuple(png(picture.permute(1, 2, 0)) for picture in part)
            answers.append(ImageResult(files, seconds, images))
        return answers

    def conditions(self, requests: Sequence[ImageRequest]) -> Any:
        """The conditions of all images of the requests, in their order."""
        if self.about.takes == "nothing":
            return None
        if self.about.takes == "class":
            return torch.tensor(
                [request.label for request in requests for _ in range(request.images)], device=self.device
            )
        parts = [
            self.embedded(request.text).pick(torch.zeros(request.images, dtype=torch.int64)) for request in requests
        ]
        return {name: torch.cat([part[name] for part in parts]).to(self.device) for name in parts[0]}

    def _embedded(self, text: str) -> Prompts:
        return Prompts(self.encoder.columns([text]), (text,))


def name_of(ref: str) -> str:
    """A plain name for the model of a reference: that of a run, of a registered model, or of a folder."""
    if ref.startswith(REGISTERED):
        return cleaned_name(ref.removeprefix(REGISTERED).partition("@")[0].partition("/")[0])
    if ref.startswith("hub:"):
        return cleaned_name(ref.removeprefix("hub:").rpartition("/")[2])
    recipe = recipe_of(ref)
    if recipe is not None:
        return recipe.name
    folder = resolve(ref)
    return cleaned_name(folder.parent.name if folder.name == "export" else folder.name)


def open_student(settings: Settings) -> Generator:
    """The generator that the settings name. Raises ValueError naming the key and the file at fault."""
    name = plain_name(name_of(settings.model) if settings.name is None else settings.name)
    with contextlib.ExitStack() as stack:
        ref: str | Path = settings.model
        if settings.model.startswith(REGISTERED):
            ref = stack.enter_context(exported(settings.model, settings.uri))
        elif not (folder := locate(settings.model)).is_dir():
            raise ValueError(f"model: no folder {str(folder)!r}; give a run, a checkpoint, an export or a teacher")
        device = device_of(settings.device)
        return Generator(open_generator(ref, device), name, device, settings.steps, settings.guidance)


def teacher_of(settings: Settings) -> str | None:
    """The reference of the teacher to show beside the student; None where there is none. Raises ValueError."""
    if settings.teacher is False:
        return None
    if settings.teacher is not None:
        if not locate(settings.teacher).is_dir():
            raise ValueError(f"teacher: no folder {quoted(settings.teacher)}; give a teacher's, or teacher=false")
        return settings.teacher
    if settings.model.startswith(REGISTERED):
        return None
    recipe = recipe_of(settings.model)
    if recipe is None or recipe.teacher is None:
        return None
    try:
        return recipe.teacher if locate(recipe.teacher, download=False).is_dir() else None
    except ValueError:  # of the hub, and not here
        return None


def open_beside(settings: Settings, student: About) -> Generator | None:
    """The teacher to show beside a student, if there is one. Raises ValueError where they do not fit together."""
    ref = teacher_of(settings)
    if ref is None:
        return None
    device = device_of(settings.device)
    opened = open_generator(ref, device)
    names = student.class_names if student.classes == opened.net.conditions.classes else ()
    opened = replace(opened, class_names=opened.class_names or names)
    teacher = Generator(opened, f"{student.name}-teacher", device, settings.steps, settings.guidance)
    if (teacher.about.takes, teacher.about.classes) != (student.takes, student.classes):
        raise ValueError(
            f"teacher: {quoted(ref)} takes another kind of prompt than the model; give its own, or teacher=false"
        )
    return teacher
