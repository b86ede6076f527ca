"""Reference statistics: what an extractor says of the real images, kept in one .npz file."""

from __future__ import annotations

import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fewstep.files import sha256_of
from fewstep.metrics.base import Extractor, File, Outputs

KEPT = 10_000  # features kept for the metrics that compare neighbours; their cost grows with the square
REMAKE = "make one with: python jobs/features.py extractor=<file or inception> data=<shards> out=<folder>"


def moments(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean (D,) and unbiased covariance (D, D) of features (N, D), in float64. Raises ValueError for N < 2."""
    if len(features) < 2:
        raise ValueError(f"samples.images: {len(features)}; a covariance needs at least 2")
    features = features.astype(np.float64)
    return features.mean(0), np.cov(features, rowvar=False).reshape(features.shape[1], -1)


def class_variances(features: np.ndarray, labels: np.ndarray, classes: int) -> np.ndarray:
    """Total unbiased feature variance within each class, (classes,) float64; nan for classes of fewer than 2."""
    features = features.astype(np.float64)
    parts = (features[labels == c] for c in range(classes))
    return np.array([part.var(0, ddof=1).sum() if len(part) > 1 else np.nan for part in parts])


@dataclass(frozen=True)
class Reference:
    """Statistics of real images under one extractor.

    mean (D,), covariance (D, D): float64, of all `images`. features (at most 10,000, D): float16 of the first, a random
    subset when the images came shuffled. variances (classes,): within each class, empty without labels.
    extractor: hash of the network. hash: digest of this file.
    """

    name: str
    images: int
    mean: np.ndarray
    covariance: np.ndarray
    features: np.ndarray
    variances: np.ndarray
    extractor: str
    hash: str
    path: str

    def check(self, extractor: Extractor) -> None:
        """Raises ValueError when the statistics were made with another network."""
        if self.extractor != extractor.hash:
            raise ValueError(
                f"reference: {self.path!r} was made with extractor {self.extractor[:12]}, not with {extractor.name!r} "
                f"({extractor.hash[:12]}); {REMAKE}"
            )


FIELDS = ("name", "images", "mean", "covariance", "features", "variances", "extractor")


def save_reference(
    path: str | Path,
    name: str,
    outputs: Outputs,
    extractor: Extractor,
    labels: np.ndarray | None = None,
    keep: int = KEPT,
) -> Reference:
    """Writes the statistics of an extractor's outputs on real images, in the order given; returns them as read back.

    keep: images whose features are kept, the first ones.
    """
    mean, covariance = moments(outputs.features)
    classes = 0 if labels is None or outputs.logits is None else outputs.logits.shape[1]
    variances = class_variances(outputs.features, labels, classes) if classes else np.zeros(0)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(
        path,
        name=np.array(name),
        images=np.array(len(outputs.features)),
        mean=mean,
        covariance=covariance,
        features=outputs.features[:keep].astype(np.float16),
        variances=variances,
        extractor=np.array(extractor.hash),
    )
    return open_reference(path)


def open_reference(path: str | Path) -> Reference:
    """The statistics in an .npz file; its hash is the file's. Raises FileNotFoundError or ValueError with its name."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"reference: no file {str(path)!r}; {REMAKE}")
    try:
        with np.load(path, allow_pickle=False) as file:
            missing = [name for name in FIELDS if name not in file.files]
            if missing:
                raise ValueError(f"it lacks {', '.join(missing)}")
            values = {name: file[name] for name in FIELDS}
    except (ValueError, zipfile.BadZipFile) as error:
        raise ValueError(f"reference: {str(path)!r} does not hold reference statistics ({error}); {REMAKE}") from None
    for name, kind in (("name", str), ("images", int), ("extractor", str)):
        values[name] = kind(values[name])
    width = len(values["mean"])
    if values["covariance"].shape != (width, width) or values["features"].shape[1:] != (width,):
        raise ValueError(
            f"reference: {str(path)!r}: mean ({width},), covariance {values['covariance'].shape} and features "
            f"{values['features'].shape} are not of one width; {REMAKE}"
        )
    return Reference(**values, hash=sha256_of(path), path=str(path))


REFERENCE = File(
    open=lambda path, device: open_reference(path),
    remedy="python jobs/features.py makes it (--help), and shipped:fashion_mnist/statistics.npz is embedded",
)
