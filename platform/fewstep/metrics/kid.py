"""Kernel Inception distance. Binkowski et al. 2018, arXiv:1801.01401, section 4; estimated as clean-fid does."""

from __future__ import annotations

import numpy as np

from fewstep.metrics.base import Extractor, Files, Samples, Score, score
from fewstep.metrics.inception import InceptionMetric
from fewstep.metrics.reference import Reference

SUBSETS, SUBSET_IMAGES = 100, 1000  # clean-fid's


def _kernel(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    inner = x @ y.T / x.shape[1] + 1
    return inner * inner * inner  # NumPy's power of negative numbers takes 18 times as long


def kernel_distance(real: np.ndarray, fake: np.ndarray) -> float:
    """Squared MMD under (x.y / D + 1)^3 of features (N, D) and (M, D): the mean of unbiased estimates over 100 subsets.

    A subset has min(N, M, 1000) of each side. Subsets are the same every time; they come from a generator of their own,
    because clean-fid's come from NumPy's global one, which a training loop in another thread may be using.
    """
    m = min(len(real), len(fake), SUBSET_IMAGES)
    if m < 2:
        raise ValueError(f"samples.images: {len(fake)} against {len(real)} real ones; an estimate needs 2 of each")
    real, fake = real.astype(np.float64), fake.astype(np.float64)
    rng = np.random.default_rng(0)
    total = 0.0
    for _ in range(SUBSETS):
        x, y = rng.choice(real, m, replace=False), rng.choice(fake, m, replace=False)
        within = _kernel(x, x) + _kernel(y, y)
        total += (within.sum() - np.trace(within)) / (m * (m - 1)) - 2 * _kernel(x, y).mean()
    return float(total / SUBSETS)


class Kernel:
    """Kernel distance of the samples' features from the reference's; lower is better, and it can fall below 0."""

    def __init__(self, extractor: Extractor, reference: Reference):
        reference.check(extractor)
        self.extractor, self.reference = extractor, reference
        self.name = "kid" if extractor.name == "inception" else f"kd_{extractor.name}"

    def __call__(self, samples: Samples) -> Score:
        value = kernel_distance(self.reference.features, samples.features.of(self.extractor).features)
        return score(
            self.name,
            value,
            samples,
            extractor=self.extractor.hash,
            reference=self.reference.hash,
            reference_images=len(self.reference.features),
        )


class InceptionKernel(InceptionMetric):
    """Kernel inception distance: the kernel distance on the features of clean-fid's Inception."""

    names = ("kid",)
    better = "lower"

    def build(self, files: Files) -> Kernel:
        return Kernel(self.network(files), files.open(self, "inception_reference"))
