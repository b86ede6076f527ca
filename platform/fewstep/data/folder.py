"""Folders of pictures: labels from sub-folders, captions from text files, or both from a metadata file."""

from __future__ import annotations

import codecs
import csv
import posixpath
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from fewstep.config import ConfigError, parse_json
from fewstep.data.source import (
    PLAIN,
    SUFFIXES,
    TEXT_BYTES,
    WIDE_BYTES,
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
    read_image,
)
from fewstep.data.tree import Tree, walk

METADATA = ("metadata.csv", "metadata.jsonl")
OTHER_PICTURES = (".gif", ".bmp", ".tif", ".tiff", ".avif", ".heic", ".heif", ".jfif", ".jp2", ".jxl", ".svg")
_KNOWN = ("file", "file_name", "label", "caption", "text")


class Row(NamedTuple):
    """One picture: its file's path below the folder, its label and its caption."""

    file: str
    label: Label | None
    caption: str | None


def folder(path: Path | None, split: str = "train", reading: Reading = PLAIN) -> Source:
    """PNG, JPEG and WebP files below a folder; hidden ones are left out.

    Labels: the names of the first sub-folders where all images lie in sub-folders; whole numbers are sorted as numbers.
    Captions: a .txt file beside each image. Or metadata.csv / metadata.jsonl with the columns file, and caption and/or
    label: then only the files named in it are taken, and labels are integers from 0 or names.
    Raises SourceError and ConfigError naming the file, the line and the way out.
    """
    if path is None or not path.is_dir():
        raise SourceError(f"path: no folder {str(path)!r}; give path=<folder of images>")
    tree = walk(path, reading)
    metadata = [name for name in tree.files if posixpath.basename(name) in METADATA]
    if metadata and "/" in min(metadata, key=lambda name: name.count("/")):
        where = path / posixpath.dirname(metadata[0])
        raise SourceError(f"path: {metadata[0]!r} lies below {str(path)!r}, where it is not read; give path={where}")
    tops = [name for name in metadata if "/" not in name]
    if len(tops) > 1:
        raise SourceError(f"path: both {' and '.join(tops)} are in {str(path)!r}; keep one of them")
    rows, notes = _from_metadata(tree, tops[0], reading) if tops else _from_tree(tree, reading)
    notes += [f"left out: {name}, which lies below {tops[0]}" for name in metadata if "/" in name]
    if not rows:
        raise SourceError(f"path: no {', '.join(SUFFIXES)} files below {printable(str(path))!r}; {_remedy(tree)}")
    names = [printable(row.file) for row in rows]
    classes = classes_of([row.label for row in rows], names, reading.classes)
    captions = all_or_none([row.caption for row in rows], names, "caption")

    def examples() -> Iterator[Example]:
        for row, name, number in zip(rows, names, classes.numbers, strict=True):
            yield Example(name, read_image(path / row.file), number, row.caption)

    return Source(
        len(rows), examples, None, classes.count, classes.names, captions, str(path),
        {"source": "folder", "name": printable(path.name)}, path, (*tree.notes, *notes, *classes.notes),
    )  # fmt: skip


def _remedy(tree: Tree) -> str:
    """The way out for a folder without a picture."""
    ends = Counter(posixpath.splitext(name)[1].lower() for name in tree.files)
    for suffix, source in ((".parquet", "parquet"), (".tar", "webdataset")):
        if ends[suffix]:
            return f"its {suffix} files are read with source={source}"
    others = [suffix for suffix in OTHER_PICTURES if ends[suffix]]
    return f"convert its {', '.join(others)} files to PNG" if others else "give path=<folder of images>"


def _from_tree(tree: Tree, reading: Reading) -> tuple[list[Row], list[str]]:
    files = [name for name in tree.files if name.lower().endswith(SUFFIXES)]
    tree.check(name for name in tree.outside if name.lower().endswith((*SUFFIXES, ".txt")))
    texts = {name for name in tree.files if name.endswith(".txt")}
    nested = [name for name in files if "/" in name]
    rows: list[Row] = []
    for name in files:
        label = name.split("/")[0] if len(nested) == len(files) else None
        if label is not None and label != printable(label):
            raise SourceError(f"path: the folder {printable(label)!r} has a name that is not UTF-8; rename it")
        text = posixpath.splitext(name)[0] + ".txt"
        rows.append(Row(name, label, _caption(tree.root / text, reading) if text in texts else None))
    notes = []
    if 0 < len(nested) < len(files):
        notes.append(f"no labels: {len(nested)} images lie in sub-folders, but {len(files) - len(nested)} beside them")
    others = Counter(posixpath.splitext(name)[1].lower() for name in tree.files)
    notes += [
        f"left out: {others[end]} {end} files, a format that is not read" for end in OTHER_PICTURES if others[end]
    ]
    return rows, notes


def _caption(file: Path, reading: Reading) -> str:
    try:
        with file.open("rb") as lines:
            data = lines.read(TEXT_BYTES + 1)
    except OSError as error:
        raise SourceError(f"{printable(str(file))}: cannot be read: {error.strerror}") from None
    return reading.text(data, printable(str(file))).strip()


def _from_metadata(tree: Tree, name: str, reading: Reading) -> tuple[list[Row], list[str]]:
    """The rows of a metadata file, and notes."""
    tree.check([name])
    path, files = tree.root / name, set(tree.files)
    rows: list[Row] = []
    unused: Counter[str] = Counter()
    for number, line in (_csv_rows if name.endswith(".csv") else _jsonl_rows)(path, reading):
        where = f"{path}: line {number}"
        file = line.get("file") or line.get("file_name")
        if not file:
            columns = ", ".join(map(str, line))[:200]
            raise SourceError(f"{where} has no 'file'; the columns are file, caption, label, and here: {columns}")
        if not isinstance(file, str):
            raise SourceError(f"{where}: file: {file!r}; a file's name is text")
        plain = posixpath.normpath(file)
        if plain.startswith(("/", "../")) or plain == "..":
            raise SourceError(f"{where}: {file!r} lies outside {str(tree.root)!r}")
        tree.check([plain])
        if plain not in files:
            raise SourceError(f"{where}: no file {file!r} in {str(tree.root)!r}, hidden ones left out")
        unused.update(key for key in line if key not in _KNOWN)
        caption = line.get("caption") if "caption" in line else line.get("text")
        rows.append(Row(plain, label_of(line.get("label"), where), caption_of(caption, where)))
    if not rows:
        raise SourceError(f"{path}: no rows; the columns are file, caption, label")
    return rows, [f"{name}: columns that are not used: {', '.join(sorted(unused))}"] if unused else []


def _lines(path: Path, reading: Reading) -> Iterator[str]:
    """The lines of a text file, with their ends. Lines end at \\n alone: captions hold other separators."""
    with path.open("rb") as file:
        start = file.read(4)
        file.seek(0)
        if reading.wide or start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE, codecs.BOM_UTF32_BE)):
            text = reading.text(file.read(WIDE_BYTES + 1), str(path), limit=WIDE_BYTES)
            yield from (line + "\n" for line in text.split("\n"))
            return
        number = 1
        while line := file.readline(TEXT_BYTES + 1):
            yield reading.text(line, str(path), number)
            number += 1


def _csv_rows(path: Path, reading: Reading) -> Iterator[tuple[int, dict[str, Any]]]:
    """The line number and the columns of each row."""
    reader = csv.DictReader(_lines(path, reading), strict=True)
    try:
        reader.fieldnames = [name.strip() for name in reader.fieldnames or ()]
        for row in reader:
            if None in row:
                raise SourceError(
                    f"{path}: line {reader.line_num} has more values than the header; put a text with a comma in quotes"
                )
            yield reader.line_num, row
    except csv.Error as error:
        raise SourceError(f"{path}: line {reader.reader.line_num}: {error}") from None


def _jsonl_rows(path: Path, reading: Reading) -> Iterator[tuple[int, dict[str, Any]]]:
    """The line number and the object of each line."""
    for number, line in enumerate(_lines(path, reading), start=1):
        if line.strip():
            try:
                yield number, parse_json(line, f"{path}: line {number}")
            except ConfigError as error:
                raise SourceError(f'{error}; each line is one object, such as {{"file": "a.png"}}') from None
