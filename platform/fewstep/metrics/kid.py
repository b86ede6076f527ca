"""Kernel Inception distance. Binkowski et al. 2018, arXiv:1801.01401, section 4; clean-fid's estimator."""

from __future__ import annotations

import numpy as np

from fewstep.metrics.base import Extractor, Samples, Score, score
from fewstep.metrics.reference import Reference


def kernel_distance(real: np.ndarray, fake: np.ndarray) -> float:
    """clean-fid's squared MMD under the cubic kernel, unbiased, over 100 subsets of at most 1000 of each.

    The subsets are the same every time; NumPy's global random state, from which clean-fid draws, is left as it was.
    """
    from cleanfid import fid

    state = np.random.get_state()
    np.random.seed(0)
    try:
        return fid.kernel_distance(real.astype(np.float64), fake.astype(np.float64))
    finally:
        np.random.set_state(state)


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
