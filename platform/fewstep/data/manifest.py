"""manifest.json of a shard set: its columns, its files with their sizes and hashes, and where it came from."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field, field_validator, model_validator

from fewstep.config import ConfigError, Strict, UserError, parse_json, read_json, validate
from fewstep.folders import plain_name
from fewstep.storage.place import Place
from fewstep.texts import one_line

FORMAT = 1
MANIFEST = "manifest.json"
MANIFEST_BYTES = 256 << 20
MAX_CLASSES = 1_000_000
MAX_SIDE, MAX_VALUES = 1 << 16, 1 << 28  # of one row's numbers or pixels
MAX_LATENT = 1e4  # latents of the published codecs stay below 100
WRITE = "write one with: python jobs/prepare.py source=... out=..."
AGAIN = "restore the file, or write the set to another folder: python jobs/prepare.py source=... out=..."

Count = Annotated[int, Field(ge=1, le=1 << 53)]
Shape = tuple[Annotated[int, Field(ge=1, le=MAX_SIDE)], ...]


class ShardError(UserError, ValueError):
    """A set that cannot be read as its manifest says; the text names the file and the way out."""


# Kinds of columns: how many axes a row has, and in which types it may be stored.
_KINDS: dict[str, tuple[int, tuple[str, ...]]] = {
    "image": (3, ("uint8",)),
    "latent": (3, ("float16", "float32")),
    "label": (0, ("int64",)),
    "caption": (0, ("string",)),
    "text": (2, ("float16", "float32")),
    "pooled": (1, ("float16", "float32")),
    "mask": (1, ("uint8",)),
    "noise": (1, ("int64",)),
}


class Column(Strict):
    """One column of a set's rows."""

    name: str
    """Its name in the Parquet files: small letters, digits and _."""
    kind: Literal["image", "latent", "label", "caption", "text", "pooled", "mask", "noise"]
    """image: an encoded file, (C, H, W) when decoded. latent: a codec's numbers (C, H, W). label: a class number.
    caption: a text. text: a text encoder's numbers (tokens, width) for the caption; pooled: its summary (width,);
    mask: 1 for the tokens (tokens,) that count. noise: the number (1,) of the noise (data/noise.py) of which a teacher
    made the row's image."""
    shape: Shape = ()
    """Shape of one row's values; () for a label and a caption."""
    dtype: str
    """Type of the values: uint8 for images and masks, int64 for labels and noises, string for captions, or float16 or
    float32."""

    @model_validator(mode="after")
    def _fits(self) -> Column:
        axes, dtypes = _KINDS[self.kind]
        if not re.fullmatch(r"[a-z][a-z0-9_]{0,63}", self.name) or self.name in ("row", "unit", "error"):
            raise ValueError(f"name: {self.name!r} names no column; use small letters, digits and _")
        if len(self.shape) != axes or np.prod(self.shape, dtype=float) > MAX_VALUES:
            raise ValueError(
                f"shape: {list(self.shape)}; the kind {self.kind} has {axes} axes and at most {MAX_VALUES} values"
            )
        if self.dtype not in dtypes:
            raise ValueError(f"dtype: {self.dtype!r}; the kind {self.kind} is stored as {' or '.join(dtypes)}")
        return self

    @property
    def is_numbers(self) -> bool:
        """True where rows are arrays of numbers, which are stored flat."""
        return self.kind not in ("image", "label", "caption")

    def mistake(self, values: np.ndarray, limits: tuple[float, float] | None = None) -> tuple[int, str] | None:
        """The first row with a number that cannot be meant, and the reason; None where all can.

        values: (n, ...). limits: the smallest and the largest number that there may be.
        """
        if values.dtype.kind != "f":
            return None
        flat = values.reshape(len(values), -1).astype(np.float32)
        low, high = limits or (-np.inf, np.inf)
        bad = ~np.isfinite(flat) | (flat < np.float32(low)) | (flat > np.float32(high))
        if not bad.any():
            return None
        row = int(bad.any(1).argmax())
        text = f"a number {flat[row][bad[row]][0]:g} in the column {self.name!r}"
        return row, text + (f", and there are {low:g} to {high:g}" if limits else ", and all are finite")


class Shard(Strict):
    """One Parquet file."""

    file: str
    """Its name in the set's folder."""
    rows: Count
    row_groups: tuple[Count, ...]
    """Rows of each group."""
    bytes: Annotated[int, Field(ge=0)]
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]

    @field_validator("file")
    @classmethod
    def _plain(cls, name: str) -> str:
        return plain_name(name, "file")

    @model_validator(mode="after")
    def _fits(self) -> Shard:
        if sum(self.row_groups) != self.rows:
            raise ValueError(f"rows: {self.rows}, but its row_groups have {sum(self.row_groups)}")
        return self


class Manifest(Strict):
    """The content of manifest.json."""

    format: Literal[1] = FORMAT
    kind: Literal["image", "latent"]
    rows: Annotated[int, Field(ge=0)]
    size: Shape
    """(C, H, W) of every row."""
    range: tuple[float, float]
    """Smallest and largest stored value: [0, 255] for images, the extremes found for latents."""
    encoding: Literal["png", "jpeg", "webp", "source", "float16", "float32"]
    """Format of the images; source where files are kept byte for byte, but for those of `notes`. Type of latents."""
    classes: Annotated[int, Field(ge=0, le=MAX_CLASSES)]
    """Labels are 0..classes-1; 0 where rows have no label."""
    class_names: tuple[str, ...] = ()
    captions: bool = False
    """True where rows have a caption."""
    columns: tuple[Column, ...] = ()
    """Columns of the rows; manifests that do not list them have image or latent, then label and caption."""
    seed: int = 0
    """Seed of the order in which the rows were written."""
    shards: tuple[Shard, ...]
    source: dict[str, Any] = {}
    skipped: tuple[str, ...] = ()
    """Corrupt files and rows of the source, which were left out: name and reason."""
    notes: tuple[str, ...] = ()
    """Changes made to pictures, and what of the source was left out on purpose, with counts."""

    @model_validator(mode="after")
    def _fits(self) -> Manifest:
        latent = self.kind == "latent"
        low, high = self.range
        if latent != self.encoding.startswith("float"):
            raise ValueError(f"encoding: {self.encoding!r} is no encoding of {self.kind}s")
        if not latent and self.size[:1] not in ((1,), (3,)):
            raise ValueError(f"size: {list(self.size)}; an image has 1 or 3 channels")
        limit = MAX_LATENT if latent else 255
        if not -limit <= low <= high <= limit:
            raise ValueError(f"range: {list(self.range)}; {self.kind}s have values up to {limit:g}, the smallest first")
        if self.class_names and len(self.class_names) != self.classes:
            raise ValueError(f"class_names: {len(self.class_names)} names for {self.classes} classes")
        files = [shard.file for shard in self.shards]
        if twice := [file for file in files if files.count(file) > 1]:
            raise ValueError(f"shards: {twice[0]!r} is listed twice")
        needed = {column.name: column for column in self._required_columns()}
        listed = {column.name: column for column in self.columns}
        if len(listed) < len(self.columns):
            raise ValueError("columns: a name is listed twice")
        named = {name: column for name, column in listed.items() if name in needed or column.kind in _NAMED}
        if self.columns and named != needed:
            wrong = next(name for name in (*needed, *named) if named.get(name) != needed.get(name))
            raise ValueError(f"columns: {wrong!r} is not as kind, size, encoding, classes and captions say")
        return self

    def _required_columns(self) -> tuple[Column, ...]:
        """The columns that the other fields speak of."""
        dtype = self.encoding if self.kind == "latent" else "uint8"
        columns = [Column(name=self.kind, kind=self.kind, shape=self.size, dtype=dtype)]
        if self.classes:
            columns.append(Column(name="label", kind="label", dtype="int64"))
        if self.captions:
            columns.append(Column(name="caption", kind="caption", dtype="string"))
        return tuple(columns)

    @property
    def all_columns(self) -> tuple[Column, ...]:
        """The columns of a row, listed or not."""
        return self.columns or self._required_columns()


_NAMED = ("image", "latent", "label", "caption")  # kinds of which there is one column, of the same name


def read_manifest(folder: Path | Place) -> Manifest:
    """The manifest of a set's folder. Raises ShardError naming the file, each mistake in it, and the way out, and
    StoreError."""
    path = folder / MANIFEST
    try:
        data = (_read_store if isinstance(folder, Place) else _read_disk)(folder)
    except ConfigError as error:
        raise ShardError(f"{error}; {AGAIN}") from None
    try:
        if data.get("format") != FORMAT:
            raise ConfigError(f"format: {data.get('format')!r}, and {FORMAT} is read")
        return validate(Manifest, data)
    except ConfigError as error:
        mistakes = one_line(ConfigError("; ".join(str(error).splitlines())))
        raise ShardError(f"{path}: not a manifest of format {FORMAT} ({mistakes}); {AGAIN}") from None


def _read_disk(folder: Path) -> dict[str, Any]:
    if not folder.is_dir():
        raise ShardError(f"data.path: no folder {str(folder)!r}; {WRITE}")
    if not (folder / MANIFEST).is_file():
        parquet = any(folder.glob("*.parquet"))
        write = WRITE.replace("source=...", f"source=parquet path={folder}") if parquet else WRITE
        raise ShardError(f"data.path: no {MANIFEST} in {str(folder)!r}; {write}")
    return read_json(folder / MANIFEST, limit=MANIFEST_BYTES)


def _read_store(folder: Place) -> dict[str, Any]:
    path = folder / MANIFEST
    try:
        return parse_json(path.read(MANIFEST_BYTES + 1), str(path), limit=MANIFEST_BYTES)
    except FileNotFoundError:
        folder.files()  # raises for a bucket that does not exist
        raise ShardError(f"data.path: no {MANIFEST} in {str(folder)!r}; {WRITE}") from None
