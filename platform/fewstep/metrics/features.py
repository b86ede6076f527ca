"""Small classifiers whose penultimate features stand in for Inception's on small images: seconds on a CPU core.

There are two architectures, so that a score can be repeated by a network of another kind. Their Frechet distance is
reported as `fd_<name>`, never as `fid`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from fewstep.files import sha256_of
from fewstep.metrics.base import File, Metric, Outputs
from fewstep.metrics.reference import REFERENCE

REMAKE = "make one with: python jobs/features.py data=<shards> test=<shards> out=<folder>"


@dataclass(frozen=True)
class Info:
    """Facts about a small feature network: its shape, training data, test result, and which of `NETWORKS` it is.

    Raises ValueError for a name that would let its scores pass for Inception's, and for an unknown architecture.
    """

    name: str
    classes: int
    channels: int
    size: int
    trained_on: str = ""
    test_accuracy: float | None = None
    network: str = "plain"

    def __post_init__(self) -> None:
        if not self.name.isidentifier() or self.name.startswith("inception"):
            raise ValueError(f"name: {self.name!r}; expected a word such as 'fashion' or 'cifar10', and not inception")
        if self.network not in NETWORKS:
            raise ValueError(f"network: {self.network!r} is not one of {', '.join(NETWORKS)}")


def _block(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)
    )


class FeatureNet(nn.Module):
    """Five 3x3 convolutions with batch norm, two poolings, global average: 128 features, then a linear classifier.

    x: (B, channels, H, W) in [-1, 1]. Returns the features (B, 128) and the logits (B, classes). 279 k parameters for
    one channel and ten classes; any size that can be halved twice fits.
    """

    stages = ((0, 1), (1, 4), (4, 7))
    """Parts of `body` after which `FeatureMaps` reads."""

    def __init__(self, classes: int, channels: int, dropout: float = 0.2):
        super().__init__()
        self.body = nn.Sequential(
            _block(channels, 32),
            nn.MaxPool2d(2),
            _block(32, 64),
            _block(64, 64),
            nn.MaxPool2d(2),
            _block(64, 128),
            _block(128, 128),
        )
        self.dropout = nn.Dropout(dropout)
        self.classifier = nn.Linear(128, classes)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        features = self.body(x).float().mean((2, 3))
        return features, self.classifier(self.dropout(features))


class _Residual(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        half = lambda: (nn.GroupNorm(8, width), nn.SiLU(), nn.Conv2d(width, width, 3, padding=1))
        self.body = nn.Sequential(*half(), *half())

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


class ResidualNet(nn.Module):
    """Two strided convolutions with a residual block behind each, group norm, no pooling but the last: 64 features.

    x: (B, channels, H, W) in [-1, 1]. Returns the features (B, 64) and the logits (B, classes). 102 k parameters for
    one channel and ten classes; any size that can be halved twice fits.
    """

    stages = ((0, 2), (2, 4), (4, 6))

    def __init__(self, classes: int, channels: int):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(channels, 32, 4, stride=2, padding=1),
            _Residual(32),
            nn.Conv2d(32, 64, 2, stride=2),
            _Residual(64),
            nn.GroupNorm(8, 64),
            nn.SiLU(),
        )
        self.classifier = nn.Linear(64, classes)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        features = self.body(x).float().mean((2, 3))
        return features, self.classifier(features)


Net = FeatureNet | ResidualNet
NETWORKS: dict[str, type[Net]] = {"plain": FeatureNet, "residual": ResidualNet}


def train_features(
    batches: Iterable[tuple[Tensor, Tensor]],
    steps: int,
    *,
    classes: int,
    channels: int,
    seed: int = 0,
    lr: float = 6e-3,
    device: str | torch.device = "cpu",
    network: str = "plain",
) -> Net:
    """A network of `NETWORKS` trained for `steps` batches of (images (B, C, H, W) in [-1, 1], labels (B,)); eval mode.

    AdamW under a one-cycle rate with peak `lr`, label smoothing 0.05, bfloat16 autocast.
    The global random state is left as it was found. Raises ValueError for fewer than 2 classes.
    """
    if classes < 2:
        raise ValueError(f"classes: {classes}; the network learns its features by classifying, so images need labels")
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = NETWORKS[network](classes, channels).to(device, memory_format=torch.channels_last).train()
        optimizer = torch.optim.AdamW(net.parameters(), lr=lr, weight_decay=0.01)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=lr, total_steps=steps)
        for images, labels in islice(batches, steps):
            # bfloat16 and channels last halve the time on a CPU (0.22 -> 0.105 s for a batch of 128, one core)
            images = images.to(device, memory_format=torch.channels_last)
            with torch.autocast(torch.device(device).type, torch.bfloat16):
                logits = net(images)[1]
            loss = F.cross_entropy(logits.float(), labels.to(device), label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return net.eval()


def save_features(path: str | Path, net: Net, info: Info) -> None:
    """Writes the weights with `info` as metadata, as safetensors."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    weights = {key: value.detach().cpu().contiguous() for key, value in net.state_dict().items()}
    save_file(weights, path, metadata={"info": json.dumps(asdict(info), sort_keys=True)})


class SmallNetwork:
    """A trained network as an extractor: float32, eval mode, `batch` images at a time on `device`.

    On CUDA, PyTorch's own setting decides whether convolutions may round to TF32.
    """

    def __init__(self, net: Net, info: Info, hash: str, device: str | torch.device = "cpu", batch: int = 500):
        self.net = net.float().eval().requires_grad_(False).to(device)
        self.info, self.hash, self.device, self.batch = info, hash, torch.device(device), batch

    @property
    def name(self) -> str:
        return self.info.name

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Outputs:
        """Features (N, D) and logits (N, classes) of uint8 images (N, C, H, W). Raises ValueError on other shapes."""
        expected = (self.info.channels, self.info.size, self.info.size)
        if images.dtype != torch.uint8 or images.shape[1:] != expected:
            shape, kind = tuple(images.shape[1:]), "" if images.dtype == torch.uint8 else f"{images.dtype} "
            raise ValueError(
                f"features: {self.name!r} takes uint8 images of shape {expected} (C, H, W), not {kind}{shape}; "
                "train a network on your images: python jobs/features.py data=<shards> ..., and give it with features="
            )
        features, logits = [], []
        with torch.autocast(self.device.type, enabled=False):
            for part in images.split(self.batch):
                x = part.to(self.device, torch.float32) / 127.5 - 1
                f, y = self.net(x)
                features.append(f.cpu())
                logits.append(y.cpu())
        return Outputs(torch.cat(features).numpy(), torch.cat(logits).numpy())


def open_features(path: str | Path, device: str | torch.device = "cpu", batch: int = 500) -> SmallNetwork:
    """The small network in a safetensors file that `save_features` wrote; its hash is the file's.

    Raises FileNotFoundError, or ValueError naming the file and what in it is missing, unknown or of a wrong shape.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"features: no file {str(path)!r}; {REMAKE}")
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            weights = {key: file.get_tensor(key) for key in file.keys()}
    except SafetensorError as error:
        raise ValueError(f"features: {str(path)!r} is not a safetensors file ({error}); {REMAKE}") from None
    try:
        info = Info(**json.loads(metadata["info"]))
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"features: {str(path)!r} has no readable 'info' metadata ({error!r}); {REMAKE}") from None
    net = NETWORKS[info.network](info.classes, info.channels)
    expected = net.state_dict()
    wrong = [f"{key} missing" for key in expected.keys() - weights.keys()]
    wrong += [f"{key} unknown" for key in weights.keys() - expected.keys()]
    wrong += [
        f"{key} {tuple(weights[key].shape)} instead of {tuple(expected[key].shape)}"
        for key in expected.keys() & weights.keys()
        if weights[key].shape != expected[key].shape
    ]
    if wrong:
        raise ValueError(f"features: {str(path)!r} does not hold this network: {'; '.join(sorted(wrong))}; {REMAKE}")
    net.load_state_dict(weights)
    return SmallNetwork(net, info, sha256_of(path), device, batch)


class ClassReward(nn.Module):
    """Log-probability (B,) that the classifier gives to the class asked for, as a reward for a student's training.

    Called with images (B, C, H, W), about [-1, 1], and labels (B,); differentiable in the images. Scores of the same
    network are then marked `seen_by_loss`.
    """

    def __init__(self, network: SmallNetwork):
        super().__init__()
        self.net = network.net

    def forward(self, x: Tensor, cond: Tensor) -> Tensor:
        return -F.cross_entropy(self.net(x)[1].float(), cond, reduction="none")


class FeatureMaps(nn.Module):
    """The small network's maps at its three resolutions, to compare images by; called with images."""

    def __init__(self, network: SmallNetwork):
        super().__init__()
        self.net = network.net

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        body, maps = self.net.body, []
        for first, last in self.net.stages:
            x = body[first:last](x)
            maps.append(x)
        return tuple(maps)


FEATURES = File(
    open=open_features,
    suffix=".safetensors",
    remedy="python jobs/features.py makes it (--help), and shipped:fashion_mnist/features.safetensors is embedded",
)


def accuracy(outputs: Outputs, labels: np.ndarray) -> float:
    """Share of the images whose most likely class is their label. Raises ValueError without a classifier."""
    if outputs.logits is None:
        raise ValueError("class agreement needs an extractor that classifies; use the small network's features file")
    return float((outputs.logits.argmax(1) == np.asarray(labels)).mean())


class FeatureMetric(Metric):
    """Base of the metrics that ask the small network alone."""

    features: Annotated[str | None, FEATURES] = None
    """Weights of the small feature network."""


class ReferenceMetric(FeatureMetric):
    """Base of the metrics that compare the small network's features with those of real images."""

    reference: Annotated[str | None, REFERENCE] = None
    """Statistics of the real images under that network."""
