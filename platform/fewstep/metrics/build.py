"""The metrics that score a run, and the files that they are measured with."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Self

from fewstep.checks import Check, tried
from fewstep.config import ConfigError, Strict, nearest, resolve_ref, validate
from fewstep.files import sha256_of
from fewstep.metrics.base import Device, File, Files, Measure, Metric, file_fields, find_metric, unknown
from fewstep.metrics.features import FEATURES
from fewstep.metrics.inception import INCEPTION
from fewstep.metrics.reference import REFERENCE
from fewstep.metrics.retrieval import SCORER
from fewstep.storage.cache import local


class Metrics(Strict):
    """Metrics by the names of their scores, and what they share."""

    metrics: list[str] = []
    """Names, such as fd_fashion, class_consistency, diversity, precision, recall, fid; none scores nothing."""
    features: Annotated[str | None, FEATURES] = None
    """Weights of the small feature network, for every metric but fid and kid."""
    reference: Annotated[str | None, REFERENCE] = None
    """Statistics of the real images under that network."""
    scorer: Annotated[str | None, SCORER] = None
    """Weights of the contrastive scorer, for name_retrieval, style_retrieval and fd_emoji."""
    inception: Annotated[str | None, INCEPTION] = None
    """clean-fid's Inception weights, for fid and kid; null looks where clean-fid keeps them."""
    inception_reference: Annotated[str | None, REFERENCE] = None
    """Statistics of the real images under Inception."""
    settings: dict[str, dict[str, Any]] = {}
    """Other settings of a metric, by its name: evaluate.settings.<metric>.<field>=value."""

    def mistakes(self) -> list[str]:
        """A line for each unknown name and each setting that does not fit its metric, keys without a prefix."""
        wrong = []
        for name in dict.fromkeys(self.metrics):
            try:
                self._settings(name)
            except ConfigError as error:
                wrong += str(error).splitlines()
        spare = [name for name in self.settings if name not in self.metrics]
        return wrong + [f"settings.{name}: no such metric in metrics; {nearest(name, self.metrics)}" for name in spare]

    def chosen(self) -> list[Metric]:
        """The settings of each metric, in order. Raises ConfigError with the lines of `mistakes`."""
        if wrong := self.mistakes():
            raise ConfigError("\n".join(wrong))
        return [self._settings(name) for name in self.metrics]

    def _settings(self, name: str) -> Metric:
        metric = find_metric(name)
        if metric is None:
            raise ConfigError(unknown(name))
        shared = {key: getattr(self, key) for key in metric.model_fields if key in file_fields(type(self))}
        try:
            return validate(metric, shared | self.settings.get(name, {}) | {"name": name})
        except ConfigError as error:
            lines = str(error).splitlines()
            raise ConfigError("\n".join(f"settings.{name}.{line}" for line in lines)) from None

    def build(
        self,
        device: Device = "cpu",
        seen_by_loss: Sequence[str] | None = None,
        open_teacher: Callable[[], Any] | None = None,
    ) -> list[Measure]:
        """The functions that score samples, in order; only files that a metric needs are opened, each once.

        seen_by_loss: the metrics whose network a loss of the run used, as `seen_by` finds them; None where no run is
        known. open_teacher: see `Files`. Raises ConfigError as `chosen` does, OSError or ValueError for a file that is
        not given or not usable.
        """
        files = Files(device, open_teacher)
        known = seen_by_loss is not None
        return [_marked(m.build(files), m.name in seen_by_loss if known else None) for m in self.chosen()]

    def resolved(self) -> Self:
        """The same choice with absolute paths."""
        settings = {name: dict(values) for name, values in self.settings.items()}
        for metric in self.chosen():
            for key in file_fields(type(metric)).keys() & settings.get(metric.name, {}).keys():
                settings[metric.name][key] = _absolute(settings[metric.name][key])
        shared = {key: _absolute(getattr(self, key)) for key in file_fields(type(self))}
        return self.model_copy(update=shared | {"settings": settings})

    def needs(self) -> list[Need]:
        """The files that the metrics are measured with, each once."""
        needs: dict[tuple[str, str | None], Need] = {}
        for metric in self.chosen():
            for name, kind in file_fields(type(metric)).items():
                key = name if name in file_fields(type(self)) else f"settings.{metric.name}.{name}"
                need = needs.setdefault((key, getattr(metric, name)), Need(key, getattr(metric, name), kind, []))
                need.metrics.append(metric.name)
        return list(needs.values())

    def seen_by(self, networks: Iterable[Path]) -> list[str]:
        """The metrics whose network is one of these files, byte for byte, and those of the teacher.

        networks: files, or folders of files.
        """
        own: dict[Path, list[str]] = {}
        for need in self.needs():
            if need.kind.suffix:
                # a file that is not there scores nothing: `build` says so
                with contextlib.suppress(OSError, ValueError):
                    own.setdefault(need.find().resolve(strict=True), []).extend(need.metrics)
        sizes = {path.stat().st_size for path in own}
        files = [path for ref in networks for path in _files(ref) if path.stat().st_size in sizes] if own else []
        hashes = {sha256_of(path) for path in files}
        seen = [name for path, names in own.items() if hashes and sha256_of(path) in hashes for name in names]
        return [name for name in self.metrics if name in seen or find_metric(name).of_teacher]


@dataclass(frozen=True)
class Need:
    """A file that metrics are measured with: the setting that names it, its path there, its kind, and the metrics."""

    key: str
    path: str | None
    kind: File
    metrics: list[str]

    def find(self) -> Path:
        """The file's path. Nothing is downloaded but what lies at a URL. Raises ValueError where there is none."""
        names = " and ".join(self.metrics)
        if self.path is not None:
            return local(self.path)
        if self.kind.find is None:
            raise ValueError(f"{names} need this file and the recipe names none")
        try:
            return self.kind.find(False)
        except OSError as error:
            raise ValueError(f"{error}, and so no {names}") from None

    def look(self) -> Path:
        """The file's path, once it is known to be usable. Raises OSError or ValueError."""
        path = self.find()
        self.kind.look(path)
        return path


def check(recipe: Any) -> list[Check]:
    """The files that the recipe's metrics are measured with can be used here. Nothing is downloaded."""
    remedy = "name it with evaluate.{}=<path>; {}"
    return [
        tried(f"weights {need.key}", lambda need=need: str(need.look()), remedy.format(need.key, need.kind.remedy))
        for need in recipe.evaluate.needs()
    ]


def _marked(measure: Measure, seen: bool | None) -> Measure:
    """The same function, whose scores say whether a loss used their network."""
    return lambda samples: replace(measure(samples), seen_by_loss=seen)


def _files(ref: Path) -> list[Path]:
    """The file, or all files of the folder; none where nothing is there."""
    return [path for path in (ref.rglob("*") if ref.is_dir() else [ref]) if path.is_file()]


def _absolute(path: str | None) -> str | None:
    return None if path is None else str(resolve_ref(path))
