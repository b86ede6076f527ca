"""Samples in, scores out: the settings of a metric, the files it is measured with, and when two scores compare."""

from __future__ import annotations

import contextlib
from abc import abstractmethod
from collections.abc import Callable, Hashable, Sequence
from dataclasses import asdict, dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from fewstep.config import Strict, nearest
from fewstep.storage.cache import local
from fewstep.texts import shown

METRICS: dict[str, type[Metric]] = {}
Better = Literal["lower", "higher"]
MODES: dict[Better, Literal["min", "max"]] = {"lower": "min", "higher": "max"}
"""Mode of a search by the direction in which the score improves."""
SEEN = "seen by a loss"
"""Beside a score in a table: a loss of the run used the metric's network."""
Device = str | torch.device
T = TypeVar("T")


@dataclass(frozen=True)
class Outputs:
    """Output of an extractor for N images: features (N, D) float32, and logits (N, classes) of a classifier."""

    features: np.ndarray
    logits: np.ndarray | None = None


class Extractor(Protocol):
    """A fixed network that describes images; `hash` is the digest of its weights file."""

    name: str
    hash: str

    def __call__(self, images: Tensor) -> Outputs:
        """Images are uint8 (N, C, H, W) on the CPU."""
        ...


class Features:
    """Features and statistics of one set of images. Each is computed once for all metrics."""

    def __init__(self, images: Tensor):
        self._images = images
        self._known: dict[Hashable, Any] = {}

    def once(self, key: Hashable, compute: Callable[[], T]) -> T:
        """`compute()` the first time the key is asked for, the same object ever after."""
        if key not in self._known:
            self._known[key] = compute()
        return self._known[key]

    def of(self, extractor: Extractor) -> Outputs:
        """The extractor's features and logits of all the images."""
        return self.once(("outputs", extractor.hash), lambda: extractor(self._images))


@dataclass(frozen=True)
class Samples:
    """Images to be scored, and how they came about.

    images: uint8 (N, C, H, W), CPU. labels: int64 (N,), the classes asked for; None for an unconditional sampler.
    sampler: the sampler and its settings, as text. calls: network calls an image. seconds: time to make all of them.
    checkpoint: "last", or "best of n" where the checkpoint was chosen by its score among n. prompts: those asked
    for, N of them, or () of a sampler that takes none. starts: unit noises and conditions of the first n samples, by n;
    None where they are not known.
    Raises ValueError naming the field when types or counts do not fit.
    """

    images: Tensor
    labels: Tensor | None
    sampler: str
    calls: int
    seconds: float
    seed: int
    checkpoint: str = "last"
    prompts: tuple[str, ...] = ()
    starts: Callable[[int], tuple[Tensor, Any]] | None = field(default=None, repr=False, compare=False)
    features: Features = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.images.dtype != torch.uint8 or self.images.ndim != 4 or self.images.device.type != "cpu":
            raise ValueError(
                f"samples.images: {self.images.dtype} {tuple(self.images.shape)} on {self.images.device}; "
                "expected uint8 (N, C, H, W) on the CPU, as to_uint8(x).cpu() gives"
            )
        if self.labels is not None and (self.labels.dtype != torch.int64 or self.labels.shape != self.images.shape[:1]):
            raise ValueError(
                f"samples.labels: {self.labels.dtype} {tuple(self.labels.shape)}; "
                f"expected int64 ({len(self.images)},), a class for every image"
            )
        if len(self.prompts) not in (0, len(self.images)):
            raise ValueError(f"samples.prompts: {len(self.prompts)} for {len(self.images)} images; one for every image")
        object.__setattr__(self, "features", Features(self.images))

    def __len__(self) -> int:
        return len(self.images)


@dataclass(frozen=True)
class Score:
    """A number with everything it depends on.

    images: samples scored. calls: network calls an image. extractor, reference: digests of the network and of the
    reference statistics; None for what the metric does not use. reference_images: images behind the reference.
    seconds: time to make the samples. seen_by_loss: whether a loss of the run used the metric's network, so that the
    score says less of the samples; None for samples of no known run. `a < b` orders by value and refuses scores that
    do not compare.
    """

    name: str
    value: float
    images: int
    sampler: str
    calls: int
    extractor: str | None
    reference: str | None
    reference_images: int
    checkpoint: str
    seconds: float
    seen_by_loss: bool | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        measured = f"{self.images} images, {self.sampler}, {self.calls} calls an image, {self.checkpoint} checkpoint"
        by = f", extractor {self.extractor[:8]}" if self.extractor else ""
        against = f", {self.reference_images} reference images ({self.reference[:8]})" if self.reference else ""
        seen = f", {SEEN}" if self.seen_by_loss else ""
        return f"{self.name} {shown(self.value, 4)} ({measured}{by}{against}{seen})"

    def __lt__(self, other: Score) -> bool:
        return compare(self, other) < 0

    def __gt__(self, other: Score) -> bool:
        return compare(self, other) > 0


ALIKE = ("name", "images", "extractor", "reference", "reference_images")


def compare(a: Score, b: Score, rank_seen_by_loss: bool = False) -> float:
    """a.value - b.value, for scores of one metric, extractor, reference and sample count.

    Raises ValueError that lists the differences, which would say nothing about the generators; and for scores by a
    network that a loss used, unless rank_seen_by_loss is true: a loss can lower such a score by itself.
    """
    unlike = [f"{key} ({getattr(a, key)} and {getattr(b, key)})" for key in ALIKE if getattr(a, key) != getattr(b, key)]
    if unlike:
        raise ValueError(f"scores do not compare: they differ in {', '.join(unlike)}; evaluate both in the same way")
    if (a.seen_by_loss or b.seen_by_loss) and not rank_seen_by_loss:
        raise ValueError(f"scores do not compare: {refusal(a.name)}")
    return a.value - b.value


def refusal(name: str) -> str:
    """The error text where a score would rank generators, and a loss used the score's network."""
    return (
        f"a loss of the run used the network of {name}, so {name} does not tell which is better; take a metric with "
        "another network, or set evaluate.rank_seen_by_loss=true"
    )


Measure = Callable[[Samples], Score]
"""A function that scores samples."""


@dataclass(frozen=True)
class File:
    """A kind of file that metrics are measured with.

    A field of a metric's settings holds the path of one when it is annotated with the kind: `Annotated[str | None,
    FEATURES] = None`. Such paths become absolute before a run starts, the doctor looks at the files, and
    `Files.open` reads them.

    open(path, device): the content. Raises OSError or ValueError naming the file.
    check(path): the same errors without the cost of opening; None opens the file on the CPU.
    find(download): a path where the settings give none. Raises FileNotFoundError. None where only the settings can
    name a file.
    suffix: the end of the file's name where the content is an Extractor, so that jobs/features.py can describe images
    with it; "" for other content. remedy: one clause on how a person gets the file.
    """

    open: Callable[[Path, Device], Any]
    remedy: str
    suffix: str = ""
    check: Callable[[Path], Any] | None = None
    find: Callable[[bool], Path] | None = None

    def look(self, path: Path) -> None:
        """Raises OSError or ValueError where the file cannot be used."""
        if self.check is None:
            self.open(path, "cpu")
        else:
            self.check(path)


def file_fields(model: type[Strict]) -> dict[str, File]:
    """The fields of a settings model that name a file, with the kind of each."""
    kinds_by_field = {name: [m for m in f.metadata if isinstance(m, File)] for name, f in model.model_fields.items()}
    return {name: kinds[0] for name, kinds in kinds_by_field.items() if kinds}


class Metric(Strict):
    """Settings of one metric; a subclass with `names` registers itself, and recipes find it by the names of its scores.

    Its fields are its settings. Those that `evaluate` has too, such as `features`, are taken from there; the others
    are given as `evaluate.settings.<name>.<field>`.
    """

    names: ClassVar[tuple[str, ...]] = ()
    """Names of its scores; `fd_*` stands for every name that starts with fd_."""
    better: ClassVar[Better]
    """The direction in which its scores improve."""
    of_teacher: ClassVar[bool] = False
    """It compares with the run's teacher, which a loss of the run used."""

    name: str
    """Name of the score, as the recipe gives it."""

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: Any) -> None:
        for name in cls.__dict__.get("names", ()):
            if METRICS.setdefault(name, cls) is not cls:
                raise TypeError(f"{cls.__name__}: {METRICS[name].__name__} already has the name {name!r}")

    @abstractmethod
    def build(self, files: Files) -> Measure:
        """The function that scores samples. Raises OSError or ValueError for a file that cannot be used."""


class Files:
    """Opens the files of metrics, each once however many metrics use it. device: where their networks run.

    open_teacher: opens the run's teacher, a denoiser; None where no run or no teacher is known.
    """

    def __init__(self, device: Device = "cpu", open_teacher: Callable[[], Any] | None = None):
        self.device, self.open_teacher = device, open_teacher
        self._opened: dict[tuple[File, Path], Any] = {}

    def open(self, metric: Metric, name: str) -> Any:
        """The content of the file that the metric's field `name` names.

        Raises ValueError for a file that is needed and not given, and what the kind's `open` and `find` raise.
        """
        kind, given = file_fields(type(metric))[name], getattr(metric, name)
        if given is None and kind.find is None:
            raise ValueError(f"{name}: {metric.name} needs this file and none is given; {kind.remedy}")
        path = kind.find(True) if given is None else local(given)
        if (kind, path) not in self._opened:
            self._opened[kind, path] = kind.open(path, self.device)
        return self._opened[kind, path]


def find_metric(name: str) -> type[Metric] | None:
    """The metric whose score has this name; None where no metric has."""
    return METRICS.get(name) or next((m for names, m in METRICS.items() if fnmatchcase(name, names)), None)


def unknown(name: str, *more: str) -> str:
    """The error text for a name that no metric has. more: names that are valid beside the registered ones."""
    return f"metrics: no metric {name!r}; {nearest(name, [*(n for n in METRICS if '*' not in n), *more])}"


def better(name: str) -> Better | None:
    """The direction in which scores of this name improve; None for a name that no metric has."""
    metric = find_metric(name)
    return None if metric is None else metric.better


def score(
    name: str,
    value: float,
    samples: Samples,
    *,
    extractor: str | None = None,
    reference: str | None = None,
    reference_images: int = 0,
    images: int | None = None,
) -> Score:
    """A Score that takes from the samples what it says of them; `images` where only a part of them was scored."""
    return Score(
        name=name,
        value=float(value),
        images=len(samples) if images is None else images,
        sampler=samples.sampler,
        calls=samples.calls,
        extractor=extractor,
        reference=reference,
        reference_images=reference_images,
        checkpoint=samples.checkpoint,
        seconds=samples.seconds,
    )


class _Reached(Exception):
    """Raised where a metric reads features or noises of the samples: all that it checks before that is in order."""


class _OneImage(Features):
    """Features that describe one image, to see whether the extractor takes it."""

    def of(self, extractor: Extractor) -> Outputs:
        extractor(self._images[:1])
        raise _Reached


def _no_starts(count: int) -> Any:
    raise _Reached


def check_samples(
    metrics: Sequence[Measure],
    shape: tuple[int, int, int],
    classes: int | None,
    images: int,
    prompts: Sequence[str] = (),
) -> None:
    """Raises ValueError where a metric cannot score what a sampler will make; nothing is sampled.

    shape: (C, H, W) of an image. classes: labels are 0, 1, ..., classes - 1 in turn; None for no labels. prompts: those
    that are asked for in turn; () of a sampler that takes none.
    """
    pixels = torch.zeros(1, *shape, dtype=torch.uint8).expand(images, *shape)
    labels = torch.arange(images) % classes if classes else None
    asked = tuple(prompts[i % len(prompts)] for i in range(images)) if prompts else ()
    samples = Samples(pixels, labels, "none", 0, 0.0, 0, prompts=asked, starts=_no_starts)
    object.__setattr__(samples, "features", _OneImage(pixels))
    for metric in metrics:
        with contextlib.suppress(_Reached):
            metric(samples)


def evaluate(metrics: Sequence[Measure], samples: Samples) -> list[Score]:
    """Every metric's score of the samples, in order; features are computed once for all of them."""
    return [metric(samples) for metric in metrics]
