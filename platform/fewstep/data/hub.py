"""Parquet files as data hubs publish them: a column of pictures, and perhaps labels and captions."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from fewstep.data.decode import CorruptImage
from fewstep.data.source import (
    IMAGE_BYTES,
    PLAIN,
    Example,
    Label,
    Reading,
    Source,
    SourceError,
    all_or_none,
    caption_of,
    classes_of,
    label_of,
    printable,
    too_large,
)
from fewstep.data.tree import walk
from fewstep.texts import one_line

NAMES = {
    "image": ("image", "img", "picture", "jpg", "jpeg", "png", "webp"),
    "label": ("label", "labels", "cls"),
    "caption": ("caption", "text", "txt", "prompt"),
}
_OF_A_SPLIT = re.compile(r"(train|test|validation)-\d+-of-\d+([.-].*)?\.parquet")
_ROWS = 64  # read at a time: pictures are large


def parquet(path: Path | None, split: str = "train", reading: Reading = PLAIN) -> Source:
    """Parquet files with a column of encoded pictures: binary, or a struct of bytes and path, as hubs publish them.

    path: one file, or a folder of *.parquet, in the order of their names; of files named split-00000-of-00001.parquet
    those of `split` are taken. Columns are found by their usual names (NAMES), or named by reading.columns. Labels are
    whole numbers or names; the names of the classes are taken from the file's description where it has them.
    Raises SourceError naming the file, the column and the way out.
    """
    if path is None or not path.exists():
        raise SourceError(f"path: nothing at {str(path)!r}; give path=<a .parquet file, or a folder of them>")
    files, notes = _files(path, split, reading)
    columns = _columns(files[0], reading)
    labels: list[Label | None] = []
    captions: list[str | None] = []
    names: list[str] = []
    for file in files:
        if (others := _columns(file, reading)) != columns:
            raise SourceError(f"path: {printable(str(file))!r} has other columns, {others}, than the first, {columns}")
        here = [f"{printable(file.name)} row {i}" for i in range(_rows(file))]
        names += here
        for kind, values, check in (("label", labels, label_of), ("caption", captions, caption_of)):
            if kind in columns:
                column = (row[columns[kind]] for row in _read(file, [columns[kind]], 4096))
                values += [check(value, name) for value, name in zip(column, here, strict=True)]
    if not names:
        raise SourceError(f"path: no rows in {str(path)!r}; give other files")
    labels, captions = labels or [None] * len(names), captions or [None] * len(names)
    class_names = _class_names(files[0], columns.get("label"))
    classes = classes_of(labels, names, reading.classes or len(class_names) or None)
    if classes.names or len(class_names) != classes.count:
        class_names = classes.names
    captioned = all_or_none(captions, names, "caption")

    def examples() -> Iterator[Example]:
        row = 0
        for file in files:
            for values in _read(file, [columns["image"]], _ROWS):
                yield Example(names[row], _image(values[columns["image"]]), classes.numbers[row], captions[row])
                row += 1

    return Source(
        len(names), examples, None, classes.count, class_names, captioned, str(path),
        {"source": "parquet", "name": printable(path.name), "columns": columns}, path, (*notes, *classes.notes),
    )  # fmt: skip


def _files(path: Path, split: str, reading: Reading) -> tuple[list[Path], tuple[str, ...]]:
    if not path.is_dir():
        return [path], ()
    tree = walk(path, reading)
    names = [name for name in (*tree.files, *tree.outside) if name.endswith(".parquet")]
    tree.check(names)
    if not names:
        raise SourceError(f"path: no *.parquet below {str(path)!r}; give path=<a .parquet file, or a folder of them>")
    splits = [match and match[1] for match in (_OF_A_SPLIT.fullmatch(name.rpartition("/")[2]) for name in names)]
    if not all(splits):
        return [path / name for name in names], tree.notes
    taken = [path / name for name, its in zip(names, splits, strict=True) if its == split]
    if not taken:
        raise SourceError(f"split: {split!r}; the files in {str(path)!r} are of {', '.join(sorted(set(splits)))}")
    left = [name for name, its in zip(names, splits, strict=True) if its != split]
    return taken, (*tree.notes, *([f"left out: {len(left)} files of other splits"] if left else []))


def _columns(file: Path, reading: Reading) -> dict[str, str]:
    """The name of the column of each kind that there is."""
    schema = _schema(file)
    columns = {}
    for kind, usual in NAMES.items():
        wanted = reading.columns.get(kind)
        if wanted is not None and wanted not in schema.names:
            known = ", ".join(schema.names)
            raise SourceError(f"columns.{kind}: no column {wanted!r} in {printable(str(file))!r}; it has {known}")
        name = wanted or next((name for name in usual if name in schema.names), None)
        if name is not None:
            columns[kind] = name
    if "image" not in columns:
        raise SourceError(
            f"path: no column of images in {printable(str(file))!r}; it has {', '.join(schema.names)}; name one with "
            "columns.image=..."
        )
    kind = schema.field(columns["image"]).type
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    if pa.types.is_struct(kind):
        fields = [kind.field(i) for i in range(kind.num_fields)]
        good = any(field.name == "bytes" and _binary(field.type) for field in fields)
    else:
        good = _binary(kind)
    if not good:
        raise SourceError(
            f"path: the column {columns['image']!r} of {printable(str(file))!r} has the type {kind}; pictures are "
            "encoded files: binary, or a struct of bytes and path"
        )
    return columns


def _binary(kind: pa.DataType) -> bool:
    types = pa.types
    return any(test(kind) for test in (types.is_binary, types.is_large_binary, types.is_binary_view, types.is_null))


def _image(value: Any) -> bytes | CorruptImage:
    if isinstance(value, dict):
        data, path = value.get("bytes"), value.get("path")
        if data is None and path is not None:
            return CorruptImage(
                f"no bytes, only the path {printable(str(path))!r}; write the set with its images embedded"
            )
        value = data
    if value is None:
        return CorruptImage("no image")
    return value if len(value) <= IMAGE_BYTES else too_large(f"{len(value) >> 20}")


def _class_names(file: Path, column: str | None) -> tuple[str, ...]:
    """Names of the classes of a label column, from the description that the `datasets` library writes beside it."""
    try:
        described = json.loads((_schema(file).metadata or {})[b"huggingface"])
        names = described["info"]["features"][column]["names"]
    except (KeyError, TypeError, ValueError, RecursionError):
        return ()
    good = isinstance(names, list) and all(isinstance(name, str) and name.isprintable() for name in names)
    return tuple(names) if good else ()


def _schema(file: Path) -> pa.Schema:
    with _open_file(file) as content:
        return content.schema_arrow


def _rows(file: Path) -> int:
    with _open_file(file) as content:
        return content.metadata.num_rows


def _open_file(file: Path) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(file)
    except (OSError, pa.ArrowException) as error:
        raise _read_error(file, error) from None


def _read(file: Path, columns: list[str], rows: int) -> Iterator[dict[str, Any]]:
    try:
        with _open_file(file) as content:
            for batch in content.iter_batches(rows, columns=columns, use_threads=False):
                yield from batch.to_pylist()
    except (OSError, pa.ArrowException) as error:
        raise _read_error(file, error) from None


def _read_error(file: Path, error: BaseException) -> SourceError:
    return SourceError(f"{printable(str(file))}: not a readable Parquet file ({one_line(error)}); fetch it again")
