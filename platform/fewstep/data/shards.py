"""A set of images on disk: Parquet shards and the manifest that accounts for each of their bytes.

A row is an `image` (an encoded PNG, JPEG or WebP file) or a `latent` (numbers, shape in the manifest), with a `label`
(int64) and/or a `caption`, and perhaps further columns of numbers, such as a caption's text embedding. The manifest
beside the shards gives columns, sizes, hashes and row groups, so what is missing, cut short, changed or no possible
value is found when the set is opened, and named.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from fewstep.checks import Check, tried
from fewstep.config import validate
from fewstep.data.decode import WHITE, CorruptImage, encode, read_picture, size_of
from fewstep.data.manifest import MANIFEST, MAX_LATENT, Column, Manifest, Shard, ShardError, read_manifest
from fewstep.data.output import output
from fewstep.data.plan import mix
from fewstep.files import sha256_of
from fewstep.storage.cache import CACHE_BYTES, copy_of
from fewstep.storage.place import Place, Ref, StoreError, located, located_out
from fewstep.texts import one_line

TRIES = 3  # to read a copy that other processes remove from the cache
LISTED = 200  # corrupt rows that an error names
RESTORE = "restore the file, or write the set again: python jobs/prepare.py source=... out=... overwrite=true"


class CorruptRows(ShardError):
    """More rows without a usable image than `max_corrupt` allows; the text lists them."""


def refuse(
    names: Sequence[str],
    allowed: int,
    where: str,
    rows: int | None = None,
    way_out: str = "restore them or raise max_corrupt",
) -> CorruptRows:
    """The error of a set with too many corrupt rows: their names with the reasons, how many are allowed, the way out.

    rows: how many they are, where a name stands for more than one.
    """
    listed = "\n  ".join(names[:LISTED]) + (f"\n  and {len(names) - LISTED} more" if len(names) > LISTED else "")
    rows = len(names) if rows is None else rows
    return CorruptRows(f"{where}: {rows} corrupt rows, {allowed} allowed; {way_out}:\n  {listed}")


class Unit(NamedTuple):
    """A row group, which is read as a whole. `first` is the number in the file of its first row."""

    file: str
    group: int
    rows: int
    first: int


class Shards:
    """A set that was opened; `open_shards` makes one. It holds no open file, so it can be sent to another process.

    path: its folder, or its place in an object store. cache_bytes: see `open_shards`.
    """

    def __init__(self, path: Path | Place, manifest: Manifest, cache_bytes: int = CACHE_BYTES):
        self.path, self.manifest, self.cache_bytes = path, manifest, cache_bytes

    @property
    def rows(self) -> int:
        return self.manifest.rows

    @property
    def size(self) -> tuple[int, int, int]:
        return self.manifest.size

    @property
    def classes(self) -> int:
        return self.manifest.classes

    @property
    def decoded_bytes(self) -> int:
        """Size of all rows in memory: a byte a value for images, the stored numbers for latents and other columns."""
        columns = [self.manifest.all_columns[0], *self.numbers]
        return self.rows * sum(int(np.prod(c.shape)) * np.dtype(c.dtype).itemsize for c in columns)

    @property
    def numbers(self) -> list[Column]:
        """The further columns of numbers, such as a caption's embedding."""
        return [column for column in self.manifest.all_columns[1:] if column.is_numbers]

    @property
    def columns(self) -> list[str]:
        """The columns that `read` gives: all of the rows."""
        return [column.name for column in self.manifest.all_columns]

    @property
    def has_noise(self) -> bool:
        """True for pairs: a row holds the number of the noise of which a teacher made its image."""
        return any(column.kind == "noise" for column in self.numbers)

    def column(self, name: str) -> Column:
        """A column of the manifest. Raises ShardError with the columns there are."""
        known = {column.name: column for column in self.manifest.all_columns}
        if name not in known:
            raise ShardError(f"data.path: {str(self.path)!r} has no column {name!r}; it has {', '.join(known)}")
        return known[name]

    @cached_property
    def units(self) -> list[Unit]:
        """The row groups of all shards, in order."""
        return [
            Unit(shard.file, group, rows, sum(shard.row_groups[:group]))
            for shard in self.manifest.shards
            for group, rows in enumerate(shard.row_groups)
        ]

    def read(self, unit: int, rows: np.ndarray | None = None, columns: Sequence[str] | None = None) -> pa.Table:
        """The rows (numbers inside the unit, in the order given; None is all) of a unit.

        columns: names of those to read; None is `self.columns`.
        Raises ShardError that names the file when it is gone, cut short, or its pages do not match their checksums.
        """
        where, columns = self.units[unit], list(columns or self.columns)
        path = self.path / where.file
        try:
            table = self._from_store(where, columns) if isinstance(path, Place) else _group(path, where.group, columns)
        except StoreError as error:
            raise ShardError(str(error)) from None
        except (OSError, pa.ArrowException, IndexError) as error:
            raise ShardError(f"{path}: row group {where.group} cannot be read ({one_line(error)}); {RESTORE}") from None
        if table.num_rows != where.rows:
            raise ShardError(
                f"{path}: row group {where.group} has {table.num_rows} rows, the manifest says {where.rows}; {RESTORE}"
            )
        return table if rows is None else table.take(pa.array(rows))

    def _from_store(self, where: Unit, columns: list[str]) -> pa.Table:
        """A row group of a store: of this node's copy of the shard where the cache can hold the set, else alone."""
        place, shard = self.path / where.file, self.shard(where.file)
        if sum(shard.bytes for shard in self.manifest.shards) > self.cache_bytes:

            def read() -> pa.Table:
                with place.fs.open(place.path, "rb", cache_type="none") as file:
                    return _group(file, where.group, columns)

            return place.ask(read, passed=(pa.ArrowException, IndexError))
        for _ in range(TRIES):
            copy = copy_of(place, shard.sha256, shard.bytes, self.cache_bytes, partial(_verify, self, shard))
            try:
                return _group(copy, where.group, columns)
            except FileNotFoundError:  # another process needed its room
                continue
            except (OSError, pa.ArrowException):
                copy.unlink(missing_ok=True)  # damaged on this disk; the next try fetches it again
                raise
        raise StoreError(f"{place}: its copies are removed while they are read; raise data.cache_mib")

    def shard(self, file: str) -> Shard:
        """The entry of the manifest for a file."""
        return self._by_file[file]

    @cached_property
    def _by_file(self) -> dict[str, Shard]:
        return {shard.file: shard for shard in self.manifest.shards}

    def lost_with(self, unit: int) -> list[int]:
        """The units that are lost when one cannot be read: all of its file where that is gone or has another size."""
        file = self.units[unit].file
        path = self.path / file
        try:
            size = path.size() if isinstance(path, Place) else path.stat().st_size
            whole = size == self.shard(file).bytes
        except OSError:
            whole = False
        return [unit] if whole else [other for other, where in enumerate(self.units) if where.file == file]

    def name(self, unit: int, row: int) -> str:
        """A row's name in errors and reports: its file, and its number in the file from 0."""
        return f"{self.units[unit].file} row {self.units[unit].first + row}"


def read_units(task: pa.Table, shards: Shards) -> pa.Table:
    """Rows of several units, with the unit each came from: what a task does for a training worker, without torch.

    task: `unit`, and `rows`, the row numbers inside it in the order wanted; null is all of them.
    The rows of a unit that cannot be read come back empty, with the text of the ShardError in the column `error`.
    """
    schema, parts = _schema(shards.manifest, shards.columns), []
    for unit, rows in zip(task.column("unit").to_pylist(), task.column("rows"), strict=True):
        count = len(rows.values) if rows.is_valid else shards.units[unit].rows
        reason = None
        try:
            table = shards.read(unit, rows.values.to_numpy() if rows.is_valid else None)
        except ShardError as error:
            reason = str(error)
            table = pa.table([pa.nulls(count, field.type) for field in schema], schema=schema)
        table = table.append_column("unit", pa.array(np.full(count, unit, np.int32)))
        parts.append(table.append_column("error", pa.array([reason] * count, pa.string())))
    return pa.concat_tables(parts)


def _group(source: Path | BinaryIO, group: int, columns: list[str]) -> pa.Table:
    """A row group of a Parquet file, whose pages are compared with their checksums."""
    # No memory map: the pages of a file that another program truncates end the process with SIGBUS.
    with pq.ParquetFile(source, page_checksum_verification=True, pre_buffer=not isinstance(source, Path)) as file:
        return file.read_row_group(group, columns, use_threads=False)


def numbers(table: pa.Table, column: Column) -> np.ndarray:
    """A column of numbers: (n, ...) in the type that was stored."""
    values = table.column(column.name).combine_chunks()
    return values.flatten().to_numpy(zero_copy_only=False).reshape(len(values), *column.shape)


def latents(table: pa.Table, size: tuple[int, int, int]) -> np.ndarray:
    """The `latent` column: (n, C, H, W) in the type that was stored."""
    column = table.column("latent").combine_chunks()
    return column.flatten().to_numpy(zero_copy_only=False).reshape(len(column), *size)


def labels(table: pa.Table) -> np.ndarray:
    """The `label` column, or zeros where there is none: int64 (n,)."""
    if "label" not in table.column_names:
        return np.zeros(table.num_rows, np.int64)
    return table.column("label").to_numpy()


def open_shards(
    path: Ref | Place, verify: Literal["sha256", "size"] = "sha256", cache_bytes: int = CACHE_BYTES
) -> Shards:
    """The set in a folder (`shipped:name` is the package's own) or at a URL, compared with its manifest.

    verify: "sha256" reads every byte once and looks at every value but the pixels of images: none is missing, labels
    are in range, numbers are finite and in range. "size" looks at file sizes, footers and columns. Of a set in an
    object store only sizes are compared here; the rest follows on each node that fetches a shard.
    cache_bytes: disk space of a node for copies of a store's shards. The row groups of a larger set are read from the
    store each time, compared with the checksums of their pages.
    Raises ShardError naming the file and the way out, and StoreError.
    """
    path = located(path)
    if verify not in ("sha256", "size"):
        raise ValueError(f"verify: {verify!r}; valid: sha256, size")
    manifest = read_manifest(path)
    total = sum(shard.rows for shard in manifest.shards)
    if total != manifest.rows or total < 1:
        raise ShardError(f"{path / MANIFEST}: says {manifest.rows} rows, its shards have {total}; {RESTORE}")
    shards = Shards(path, manifest, cache_bytes)
    if isinstance(path, Place):
        sizes = {name: info["size"] for name, info in path.files().items()}
        for shard in manifest.shards:
            _verify_size(path / shard.file, sizes.get(shard.file), shard)
        return shards
    for shard in manifest.shards:
        file = path / shard.file
        _verify_size(file, file.stat().st_size if file.is_file() else None, shard)
        _verify(shards, shard, file, verify == "sha256")
    return shards


def captions(path: str | os.PathLike[str]) -> list[str]:
    """All captions of a set, in order. Raises ShardError, also where it has none."""
    shards = open_shards(path, "size")
    shards.column("caption")
    tables = (shards.read(unit, columns=["caption"]) for unit in range(len(shards.units)))
    return [text for table in tables for text in table.column("caption").to_pylist()]


def check(recipe: Any) -> list[Check]:
    """The recipe's shards are all here: sizes, footers and columns are looked at, not every byte."""
    if recipe.data is None:
        return []
    path = recipe.data.path
    look = lambda: f"{located(path)}: {open_shards(path, 'size').rows:,} rows"
    return [tried("data", look, "every node has to see the shards: a folder under the same path, or the same URL")]


def _verify_size(path: Path | Place, size: int | None, shard: Shard) -> None:
    if size is None:
        raise ShardError(f"{path}: missing; {RESTORE}")
    if size != shard.bytes:
        raise ShardError(f"{path}: {size} bytes, the manifest says {shard.bytes}; {RESTORE}")


def _verify(shards: Shards, shard: Shard, source: Path, whole: bool = True) -> None:
    """Compares a file, or a copy of it, with the manifest. whole: every byte and every value but pixels."""
    path = shards.path / shard.file  # which errors name
    if whole and (digest := sha256_of(source)) != shard.sha256:
        raise ShardError(f"{path}: its sha256 {digest[:12]}... is not the manifest's {shard.sha256[:12]}...; {RESTORE}")
    try:
        with pq.ParquetFile(source) as file:
            schema, footer = file.schema_arrow, file.metadata
            groups = tuple(footer.row_group(i).num_rows for i in range(footer.num_row_groups))
            expected = _schema(shards.manifest)
            if not schema.equals(expected):
                columns = ", ".join(f"{field.name} {field.type}" for field in schema)
                wanted = ", ".join(f"{field.name} {field.type}" for field in expected)
                raise ShardError(f"{path}: has the columns ({columns}) where the manifest says ({wanted}); {RESTORE}")
            if groups != shard.row_groups:
                raise ShardError(f"{path}: {sum(groups)} rows in {len(groups)} row groups, the manifest says "
                                 f"{shard.rows} in {len(shard.row_groups)}; {RESTORE}")  # fmt: skip
            if whole:
                _verify_values(shards.manifest, path, file)
        if shards.manifest.kind == "image":
            _verify_first_image(shards.manifest, path, _group(source, 0, ["image"]))
    except (OSError, pa.ArrowException) as error:
        raise ShardError(f"{path}: not a readable Parquet file ({one_line(error)}); {RESTORE}") from None


def _verify_values(manifest: Manifest, path: Path | Place, file: pq.ParquetFile) -> None:
    """Every value but images, a row group at a time: none is missing, labels and numbers are possible ones."""
    columns = [column for column in manifest.all_columns if column.kind != "image"]
    first = 0
    for group in range(file.num_row_groups if columns else 0):
        table = file.read_row_group(group, [column.name for column in columns], use_threads=False)
        for column in columns:
            values = table.column(column.name).combine_chunks()
            wrong = None
            if values.null_count or (column.is_numbers and values.flatten().null_count):
                lacking = values.is_null() if values.null_count else pc.is_null(values.flatten())
                row = lacking.to_numpy(zero_copy_only=False).argmax() // (len(lacking) // len(values))
                wrong = row, f"has no {column.name}"
            elif column.kind == "label":
                labels = values.to_numpy()
                bad = np.flatnonzero((labels < 0) | (labels >= manifest.classes))
                if len(bad):
                    wrong = bad[0], f"has the label {labels[bad[0]]}, the manifest says 0 <= label < {manifest.classes}"
            elif column.is_numbers:
                mistake = column.mistake(numbers(table, column), manifest.range if column.kind == "latent" else None)
                wrong = mistake and (mistake[0], f"has {mistake[1]}")
            if wrong is not None:
                raise ShardError(f"{path}: row {first + int(wrong[0])} {wrong[1]}; {RESTORE}")
        first += table.num_rows


def _verify_first_image(manifest: Manifest, path: Path | Place, group: pa.Table) -> None:
    """The size of a shard's first readable image: cheap, and finds a set that was written at another size."""
    for data in group.column("image").slice(0, 8).to_pylist():
        try:
            height, width = size_of(data or b"")
        except CorruptImage:
            continue  # one bad image is the feed's to count
        if (height, width) != manifest.size[1:]:
            wanted = "x".join(map(str, manifest.size[1:]))
            raise ShardError(f"{path}: images of {height}x{width} pixels where the manifest says {wanted}; {RESTORE}")
        return


def _schema(manifest: Manifest, names: Sequence[str] | None = None) -> pa.Schema:
    """Arrow's schema of some columns of a set, or of all."""
    types = {"image": pa.binary(), "label": pa.int64(), "caption": pa.string()}
    return pa.schema(
        pa.field(
            column.name,
            pa.list_(pa.from_numpy_dtype(column.dtype), int(np.prod(column.shape)))
            if column.is_numbers
            else types[column.kind],
        )
        for column in manifest.all_columns
        if names is None or column.name in names
    )


class ShardWriter:
    """Writes a set; it appears under its name only when it is complete.

        with ShardWriter(out, size=(1, 28, 28), classes=10) as writer:
            writer.add(pixels, label=3)
        writer.manifest

    size: (C, H, W) of every row.
    encoding: how arrays are stored: png, jpeg or webp for uint8 pixels, float16 or float32 for latents; "source" where
        only files (bytes) are added.
    Files are kept byte for byte where their stored pixels are those that people see. Others (turned by their EXIF tag,
        transparent, of other colours) are stored anew in the format `recode`, laid over `background` (RGB).
    classes: labels are 0..classes-1; 0 means rows without labels. captions: rows have a text. columns: further columns
        of numbers.
    seed: of the order. Rows are shuffled when written, so that a row group is a fair sample of the set; where the
        encoded rows exceed `window_bytes` they are shuffled window by window.
    group_bytes, group_rows: the size of a row group, whichever comes first; shard_bytes: of a file.
    out: a folder, or a URL: an object store gets each shard when it is finished, and the manifest last.
    overwrite: replace a shard set; nothing else is ever replaced. apart: files and folders that are read, which `out`
        may neither be nor contain.
    Raises FolderError when `out` may not be made, StoreError, and leaves nothing behind when the body raises.
    """

    def __init__(
        self,
        out: Ref | Place,
        size: tuple[int, int, int],
        *,
        encoding: str = "png",
        recode: str = "png",
        background: tuple[int, int, int] = WHITE,
        classes: int = 0,
        class_names: Sequence[str] = (),
        captions: bool = False,
        columns: Sequence[Column] = (),
        source: dict[str, Any] | None = None,
        seed: int = 0,
        overwrite: bool = False,
        apart: Sequence[Path | Place | None] = (),
        group_rows: int = 1000,
        group_bytes: int = 8 << 20,
        shard_bytes: int = 256 << 20,
        window_bytes: int = 1 << 30,
    ):
        self.out = located_out(out)
        self.manifest = validate(Manifest, dict(
            kind="latent" if encoding.startswith("float") else "image",
            rows=0, size=size, range=(0, 255), encoding=encoding, classes=classes, class_names=tuple(class_names),
            captions=captions, seed=seed, shards=(), source=source or {},
        ))  # fmt: skip
        self.manifest = self.manifest.model_copy(update={"columns": (*self.manifest.all_columns, *columns)})
        self.extra = tuple(columns)
        self.output = output(self.out, overwrite, apart)
        self.group_rows, self.group_bytes = group_rows, group_bytes
        self.shard_bytes, self.window_bytes = shard_bytes, window_bytes
        self.recode, self.background = recode, background
        self.changes: Counter[str] = Counter()  # pictures, by what `read_picture` did to them
        self.notes: list[str] = []
        self._window: list[tuple[Any, ...]] = []
        self._window_bytes = self._windows = 0
        self._extremes = (np.inf, -np.inf)
        self._shards: list[Shard] = []
        self._skipped: list[str] = []
        self._file: pq.ParquetWriter | None = None
        self._groups: list[int] = []
        self._file_bytes = 0

    def add(
        self,
        image: bytes | np.ndarray,
        label: int | None = None,
        caption: str | None = None,
        **numbers: np.ndarray,
    ) -> None:
        """One row: an encoded file, or an array (C, H, W): uint8 for an image, numbers for a latent.

        numbers: values of the further columns, by name.
        Raises as `content` does, and ValueError for a wrong label, caption or number.
        """
        m = self.manifest
        if m.classes and (label is None or not 0 <= label < m.classes):
            raise ValueError(f"label: {label} where the set has classes 0..{m.classes - 1}")
        if m.captions and caption is None:
            raise ValueError("caption: missing; every row of a captioned set needs one")
        content = self.content(image)
        row = (content,) + ((int(label),) if m.classes else ()) + ((caption,) if m.captions else ())
        if numbers.keys() != {column.name for column in self.extra}:
            raise ValueError(f"columns: {sorted(numbers)} where the set has {[column.name for column in self.extra]}")
        row += tuple(_stored(numbers[column.name], column) for column in self.extra)
        self._window.append(row)
        self._window_bytes += _bytes(row)
        if self._window_bytes >= self.window_bytes:
            self._write_window()

    def content(self, image: bytes | np.ndarray) -> bytes | np.ndarray:
        """The bytes, or a latent's numbers, that `add` stores for an image.

        Raises CorruptImage when bytes cannot be decoded or have another size, ValueError for a wrong shape or type.
        """
        m = self.manifest
        if isinstance(image, bytes):
            picture = read_picture(image, m.size[0], size=tuple(m.size[1:]), background=self.background)
            self.changes.update(picture.changes)
            return encode(picture.pixels, self.recode) if picture.changes else image
        if m.kind == "image":
            if image.shape != tuple(m.size):
                raise ValueError(f"image: shape {image.shape} where the set has {m.size}")
            if image.dtype != np.uint8:
                raise ValueError(f"image: dtype {image.dtype}; images are uint8")
            return encode(image, m.encoding)
        numbers = _stored(image, m.all_columns[0], (-MAX_LATENT, MAX_LATENT))
        self._extremes = min(self._extremes[0], float(numbers.min())), max(self._extremes[1], float(numbers.max()))
        return numbers

    def skip(self, name: str) -> None:
        """Names a corrupt row of the source, which is left out."""
        self._skipped.append(name)

    def _write_window(self) -> None:
        order = np.argsort(mix(self.manifest.seed, self._windows, np.arange(len(self._window))), kind="stable")
        rows, self._window = self._window, []
        self._windows, self._window_bytes = self._windows + 1, 0
        group: list[tuple[Any, ...]] = []
        size = 0
        for i in order.tolist():
            group.append(rows[i])
            size += _bytes(rows[i])
            if len(group) == self.group_rows or size >= self.group_bytes:
                self._write_group(group, size)
                group, size = [], 0
        if group:
            self._write_group(group, size)

    def _write_group(self, rows: list[tuple[Any, ...]], size: int) -> None:
        schema = _schema(self.manifest)
        columns = []
        for field, values in zip(schema, zip(*rows, strict=True), strict=True):
            if isinstance(values[0], np.ndarray):
                columns.append(pa.FixedSizeListArray.from_arrays(np.concatenate(values), field.type.list_size))
            else:
                columns.append(pa.array(values, field.type))
        if self._file is None:
            name = f"shard-{len(self._shards):05d}.parquet"
            # 28x28 PNGs share most of their header: zstd saves 10% of them, and costs JPEG nothing to read.
            self._file = pq.ParquetWriter(
                self.output.temp / name, schema, compression="zstd", use_dictionary=False, write_statistics=False,
                write_page_checksum=True,
            )  # fmt: skip
        self._file.write_table(pa.table(columns, schema=schema), row_group_size=len(rows))
        self._groups.append(len(rows))
        self._file_bytes += size
        if self._file_bytes >= self.shard_bytes:
            self._end_file()

    def _end_file(self) -> None:
        if self._file is None:
            return
        self._file.close()
        path = self.output.temp / f"shard-{len(self._shards):05d}.parquet"
        shard = Shard(file=path.name, rows=sum(self._groups), row_groups=tuple(self._groups),
                      bytes=path.stat().st_size, sha256=sha256_of(path))  # fmt: skip
        self._shards.append(self.output.add(shard))
        self._file, self._groups, self._file_bytes = None, [], 0

    def close(self) -> Manifest:
        """Writes what is left and the manifest, and gives the folder its name. Raises ShardError without a row."""
        if self._window:
            self._write_window()
        self._end_file()
        if not self._shards:
            raise ShardError(f"out: no rows were written to {str(self.out)!r}; the source gave none")
        fields = {"range": self._extremes} if self.manifest.kind == "latent" else {}
        changed = [f"{count} picture{'s' * (count > 1)} {change}" for change, count in sorted(self.changes.items())]
        self.manifest = self.manifest.model_copy(
            update=fields | {"rows": sum(s.rows for s in self._shards), "shards": tuple(self._shards),
                            "skipped": tuple(self._skipped), "notes": (*self.notes, *changed)}
        )  # fmt: skip
        self.output.finish(self.manifest)
        return self.manifest

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                self.close()
        finally:
            if self._file is not None:
                self._file.close()
            self.output.discard()


def join(parts: Sequence[Path | Place], out: Path | Place, source: dict[str, Any], overwrite: bool = False) -> Manifest:
    """Writes one set with the files of several that have the same columns. Returns its manifest. Raises ShardError.

    parts: folders for a folder, or places of the same store for a place of it.
    """
    opened = [open_shards(part) for part in parts]
    first, kept = opened[0].manifest, []
    whole = output(out, overwrite)
    try:
        for shards in opened:
            if shards.manifest.columns != first.columns:
                raise ShardError(f"{shards.path}: has other columns than {opened[0].path}; write both again")
            for shard in shards.manifest.shards:
                named = shard.model_copy(update={"file": f"shard-{len(kept):05d}.parquet"})
                kept.append(whole.copy(shards.path / shard.file, named))
        low, high = zip(*(shards.manifest.range for shards in opened), strict=True)
        fields = {"range": (min(low), max(high)), "rows": sum(s.rows for s in opened), "shards": tuple(kept)}
        manifest = first.model_copy(update=fields | {"source": source})
        whole.finish(manifest)
    finally:
        whole.discard()
    return manifest


def _stored(values: np.ndarray, column: Column, limits: tuple[float, float] | None = None) -> np.ndarray:
    """A row's numbers as they are stored, flat. Raises ValueError for another shape and for an impossible number."""
    if values.shape != column.shape:
        raise ValueError(f"{column.name}: shape {values.shape} where the set has {column.shape}")
    with np.errstate(over="ignore"):  # becomes infinite, and is refused as that
        stored = np.asarray(values, column.dtype)
    if (wrong := column.mistake(stored[None], limits)) is not None:
        raise ValueError(f"{column.name}: {wrong[1]}")
    return stored.ravel()


def _bytes(row: tuple[Any, ...]) -> int:
    """Size of a row's image or numbers, and of its caption."""
    return sum(
        value.nbytes if isinstance(value, np.ndarray) else len(value) for value in row if not isinstance(value, int)
    )
