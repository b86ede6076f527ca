"""Names to metrics."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from fewstep.config import nearest, resolve
from fewstep.metrics.base import Metric
from fewstep.metrics.classes import ClassConsistency, Diversity
from fewstep.metrics.features import open_features
from fewstep.metrics.frechet import Frechet
from fewstep.metrics.inception import SHA256, open_inception
from fewstep.metrics.kid import Kernel
from fewstep.metrics.prdc import PRDC, Neighbours
from fewstep.metrics.reference import open_reference

INCEPTION = ("fid", "kid")
SMALL = (*PRDC._fields, "class_consistency", "diversity")


def build_metrics(
    names: Sequence[str],
    features: str | Path | None = None,
    reference: str | Path | None = None,
    inception: str | Path | None = None,
    inception_reference: str | Path | None = None,
    device: str | torch.device = "cpu",
) -> list[Metric]:
    """The metrics of these names, in order. Files are opened once, and only those that a name needs.

    names: fid, kid; fd_<features' name>, precision, recall, density, coverage, class_consistency, diversity.
    features, reference: the small network and the statistics of the real images under it.
    inception: clean-fid's TorchScript weights; None looks for them. inception_reference: statistics under these.
    Raises ValueError for unknown names (each with the nearest valid one) and for a file that is needed and not given.
    """
    _refuse_unknown(names, [*INCEPTION, *SMALL, *(name for name in names if name.startswith("fd_"))])
    built: dict[str, Callable[[], Metric]] = {}
    small = [name for name in names if name not in INCEPTION]
    if small:
        extractor = open_features(_given(features, "features", small[0]), device)
        frechet = f"fd_{extractor.name}"
        _refuse_unknown(small, [*INCEPTION, *SMALL, frechet])
        built["class_consistency"] = lambda: ClassConsistency(extractor)
        if any(name != "class_consistency" for name in small):
            statistics = open_reference(_given(reference, "reference", small[0]))
            built[frechet] = lambda: Frechet(extractor, statistics)
            built["diversity"] = lambda: Diversity(extractor, statistics)
            for name in PRDC._fields:
                built[name] = lambda name=name: Neighbours(name, extractor, statistics)
    if len(small) < len(names):
        needs = next(name for name in names if name in INCEPTION)
        network = open_inception(None if inception is None else resolve(inception), device)
        if network.name != "inception":
            raise ValueError(
                f"inception: {str(inception)!r} has sha256 {network.hash[:12]}..., the official weights "
                f"{SHA256[:12]}...; a score by other weights is not called {needs}"
            )
        real = open_reference(_given(inception_reference, "inception_reference", needs))
        built["fid"] = lambda: Frechet(network, real)
        built["kid"] = lambda: Kernel(network, real)
    return [built[name]() for name in names]


def _refuse_unknown(names: Sequence[str], valid: Sequence[str]) -> None:
    wrong = [f"metrics: no metric {name!r}; {nearest(name, valid)}" for name in names if name not in valid]
    if wrong:
        raise ValueError("\n".join(wrong))


def _given(path: str | Path | None, argument: str, metric: str) -> Path:
    if path is None:
        raise ValueError(
            f"{argument}: {metric} needs this file and none is given; python jobs/features.py makes it (--help), and "
            "shipped:fashion_mnist/ has features.safetensors and statistics.npz for Fashion-MNIST"
        )
    return resolve(path)
