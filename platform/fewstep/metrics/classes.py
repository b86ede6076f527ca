"""Class consistency and diversity: samples show the class that was asked for, and vary within it."""

from __future__ import annotations

import numpy as np

from fewstep.metrics.base import Extractor, Files, Samples, Score, score
from fewstep.metrics.features import FeatureMetric, ReferenceMetric, SmallNetwork, accuracy
from fewstep.metrics.reference import Reference, class_variances


def _labels(samples: Samples, classes: int, metric: str) -> np.ndarray:
    if samples.labels is None:
        raise ValueError(f"samples.labels: {metric} needs the class asked for in each image; none is given")
    low, high = int(samples.labels.min()), int(samples.labels.max())
    if low < 0 or high >= classes:
        raise ValueError(f"samples.labels: {low}..{high}; the extractor knows the classes 0..{classes - 1}")
    return samples.labels.numpy()


class ClassConsistency:
    """Share of the samples that the extractor's classifier assigns to the class asked for; higher is better.

    On real images this is the classifier's accuracy, so that is what a perfect generator is expected to reach.
    """

    name = "class_consistency"

    def __init__(self, extractor: SmallNetwork):
        self.extractor = extractor

    def __call__(self, samples: Samples) -> Score:
        labels = _labels(samples, self.extractor.info.classes, self.name)
        value = accuracy(samples.features.of(self.extractor), labels)
        return score(self.name, value, samples, extractor=self.extractor.hash)


class Diversity:
    """Feature variance within the classes asked for, over that of the real images of these classes.

    1 is as diverse as the data, 0 one image a class. It does not see quality (real images with pixel noise of
    deviation 0.1 have 0.99): read it beside a Frechet distance.
    """

    name = "diversity"

    def __init__(self, extractor: Extractor, reference: Reference):
        reference.check(extractor)
        if not len(reference.variances):
            raise ValueError(f"reference: {reference.path!r} was made without labels; diversity is measured by class")
        self.extractor, self.reference = extractor, reference

    def __call__(self, samples: Samples) -> Score:
        classes = len(self.reference.variances)
        labels = _labels(samples, classes, self.name)
        present = np.unique(labels)
        few = [int(c) for c in present if (labels == c).sum() < 2]
        if few:
            raise ValueError(f"samples.labels: classes {few} have a single image; a variance needs at least 2 a class")
        variances = class_variances(samples.features.of(self.extractor).features, labels, classes)
        return score(
            self.name,
            variances[present].sum() / self.reference.variances[present].sum(),
            samples,
            extractor=self.extractor.hash,
            reference=self.reference.hash,
            reference_images=self.reference.images,
        )


class ConsistencyShare(FeatureMetric):
    """Class consistency by the small network's classifier."""

    names = ("class_consistency",)
    better = "higher"

    def build(self, files: Files) -> ClassConsistency:
        return ClassConsistency(files.open(self, "features"))


class DiversityRatio(ReferenceMetric):
    """Diversity on the features of the small network."""

    names = ("diversity",)
    better = "higher"

    def build(self, files: Files) -> Diversity:
        return Diversity(files.open(self, "features"), files.open(self, "reference"))
