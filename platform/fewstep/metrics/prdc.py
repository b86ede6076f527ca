"""Precision, recall, density and coverage of the samples' features among the real ones'.

Kynkaanniemi et al. 2019, arXiv:1904.06991 (precision, recall); Naeem et al. 2020, arXiv:2002.09797 (density, coverage).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from fewstep.metrics.base import Extractor, Files, Samples, Score, score
from fewstep.metrics.features import ReferenceMetric
from fewstep.metrics.reference import Reference

NEIGHBOURS = 5  # k of arXiv:2002.09797, section 4.1
ROWS = 1000  # rows of the distance matrix held at once: 80 MB of float64 against 10,000 columns


class PRDC(NamedTuple):
    """The four shares; density alone can exceed 1."""

    precision: float
    recall: float
    density: float
    coverage: float


def _squared(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return (a * a).sum(1)[:, None] + (b * b).sum(1) - 2 * a @ b.T


def _radii(x: np.ndarray, k: int) -> np.ndarray:
    """Squared distance from each row of x to its k-th neighbour among the other rows."""
    # In ascending order of distances place 0 is the row itself, so place k is its k-th neighbour.
    parts = (_squared(x[i : i + ROWS], x) for i in range(0, len(x), ROWS))
    return np.concatenate([np.partition(part, k, axis=1)[:, k] for part in parts])


def prdc(real: np.ndarray, fake: np.ndarray, k: int = NEIGHBOURS) -> PRDC:
    """The four shares for features real (N, D) and fake (M, D); a ball reaches to its centre's k-th neighbour.

    precision: fakes inside some real ball. recall: reals inside some fake ball. density: real balls around a fake, over
    k, on average. coverage: real balls with a fake inside. Balls are open, which makes density 1 for identical sets.
    Raises ValueError when a set has k images or fewer.
    """
    if min(len(real), len(fake)) <= k:
        raise ValueError(f"k: {k} neighbours need more than {k} images on both sides, got {len(real)} and {len(fake)}")
    real, fake = real.astype(np.float64), fake.astype(np.float64)
    real_radii, fake_radii = _radii(real, k), _radii(fake, k)
    around = np.zeros(len(fake))  # real balls around each fake
    recalled = covered = 0
    for i in range(0, len(real), ROWS):
        distances, radii = _squared(real[i : i + ROWS], fake), real_radii[i : i + ROWS, None]
        inside = distances < radii
        around += inside.sum(0)
        covered += inside.any(1).sum()
        recalled += (distances < fake_radii).any(1).sum()
    return PRDC(
        precision=float((around > 0).mean()),
        recall=float(recalled / len(real)),
        density=float(around.mean() / k),
        coverage=float(covered / len(real)),
    )


class Neighbours:
    """One of the four shares, k = 5. The four share one pass over the distances.

    Both sides are cut to the smaller count (their first images), because the shares depend on the ratio of counts; the
    score states it as `images` and `reference_images`.
    """

    def __init__(self, name: str, extractor: Extractor, reference: Reference):
        reference.check(extractor)
        self.name, self.extractor, self.reference = name, extractor, reference

    def __call__(self, samples: Samples) -> Score:
        fake, real = samples.features.of(self.extractor).features, self.reference.features
        images = min(len(fake), len(real))
        shares = samples.features.once(("prdc", self.reference.hash), lambda: prdc(real[:images], fake[:images]))
        return score(
            self.name,
            getattr(shares, self.name),
            samples,
            images=images,
            extractor=self.extractor.hash,
            reference=self.reference.hash,
            reference_images=images,
        )


class Shares(ReferenceMetric):
    """One of the four shares on the features of the small network."""

    names = PRDC._fields
    better = "higher"

    def build(self, files: Files) -> Neighbours:
        return Neighbours(self.name, files.open(self, "features"), files.open(self, "reference"))
