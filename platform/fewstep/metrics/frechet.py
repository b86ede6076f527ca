"""Frechet distance between feature Gaussians. Heusel et al. 2017, arXiv:1706.08500, eq. 6.

On clean-fid's Inception it is `fid`; on any other network it is `fd_<network>`.
"""

from __future__ import annotations

import numpy as np

from fewstep.metrics.base import Extractor, Files, Samples, Score, score, unknown
from fewstep.metrics.features import ReferenceMetric
from fewstep.metrics.inception import InceptionMetric
from fewstep.metrics.reference import Reference, moments


def _root(covariance: np.ndarray) -> np.ndarray:
    """Symmetric square root of a positive semi-definite matrix. Raises ValueError on a truly negative eigenvalue."""
    values, vectors = np.linalg.eigh(covariance)
    if values[0] < -1e-6 * max(values[-1], 0.0):
        raise ValueError(f"covariance: eigenvalue {values[0]:.3g}, below zero by more than rounding; not a covariance")
    return (vectors * np.sqrt(values.clip(0))) @ vectors.T


def frechet_distance(mean_a: np.ndarray, cov_a: np.ndarray, mean_b: np.ndarray, cov_b: np.ndarray) -> float:
    """|m_a - m_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2)) of two Gaussians; means (D,), covariances (D, D), float64.

    The trace of the root is that of the symmetric (S_a^(1/2) S_b S_a^(1/2))^(1/2), which has the same eigenvalues and,
    unlike S_a S_b, keeps them real and non-negative for singular covariances. Rounding below zero is returned as zero.
    """
    mean_a, cov_a, mean_b, cov_b = (np.asarray(value, np.float64) for value in (mean_a, cov_a, mean_b, cov_b))
    if mean_a.shape != mean_b.shape or cov_a.shape != cov_b.shape or cov_a.shape != mean_a.shape * 2:
        raise ValueError(f"unlike features: {mean_a.shape}, {cov_a.shape} and {mean_b.shape}, {cov_b.shape}")
    root = _root(cov_a)
    product = root @ cov_b @ root
    eigenvalues = np.linalg.eigvalsh((product + product.T) / 2)
    shift = mean_a - mean_b
    distance = shift @ shift + np.trace(cov_a) + np.trace(cov_b) - 2 * np.sqrt(eigenvalues.clip(0)).sum()
    return max(float(distance), 0.0)


class Frechet:
    """Frechet distance of the samples' features from the reference's; lower is better, 0 for the same Gaussian.

    Biased upwards by few samples (roughly as 1/N), which is why scores of unlike counts refuse to compare.
    """

    def __init__(self, extractor: Extractor, reference: Reference):
        reference.check(extractor)
        self.extractor, self.reference = extractor, reference
        self.name = "fid" if extractor.name == "inception" else f"fd_{extractor.name}"

    def __call__(self, samples: Samples) -> Score:
        mean, covariance = moments(samples.features.of(self.extractor).features)
        value = frechet_distance(mean, covariance, self.reference.mean, self.reference.covariance)
        return score(
            self.name,
            value,
            samples,
            extractor=self.extractor.hash,
            reference=self.reference.hash,
            reference_images=self.reference.images,
        )


class FeatureDistance(ReferenceMetric):
    """Frechet distance on the features of the small network."""

    names = ("fd_*",)
    better = "lower"

    def build(self, files: Files) -> Frechet:
        """Raises ValueError where the network has another name than the score."""
        extractor = files.open(self, "features")
        if self.name != f"fd_{extractor.name}":
            raise ValueError(unknown(self.name, f"fd_{extractor.name}"))
        return Frechet(extractor, files.open(self, "reference"))


class InceptionDistance(InceptionMetric):
    """Frechet inception distance: the Frechet distance on the features of clean-fid's Inception."""

    names = ("fid",)
    better = "lower"

    def build(self, files: Files) -> Frechet:
        return Frechet(self.network(files), files.open(self, "inception_reference"))
