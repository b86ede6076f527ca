"""Sources: sets of pictures before they are shards, and one set of rules for their labels, captions and texts."""

from __future__ import annotations

import codecs
import contextlib
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from fewstep.config import UserError, as_text
from fewstep.data.decode import CorruptImage
from fewstep.data.manifest import MAX_CLASSES
from fewstep.texts import quoted

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
IMAGE_BYTES = 512 << 20  # the most that one picture's file, or one file of CIFAR-10, may have
TEXT_BYTES = 4 << 20  # the most that one caption, one label or one line of metadata may have
WIDE_BYTES = 256 << 20  # the most that a metadata file in UTF-16 or UTF-32 may have: it is read as a whole


class SourceError(UserError, ValueError):
    """A source that is not what it should be; the text names the file, the value and the way out."""


@dataclass(frozen=True)
class Example:
    """One row of a source. image: an encoded file, uint8 pixels (C, H, W), or the reason why there is none."""

    name: str
    image: bytes | np.ndarray | CorruptImage
    label: int | None = None
    caption: str | None = None


@dataclass(frozen=True)
class Source:
    """A set that can be read from its start: how many rows there are, and what they hold.

    size: (C, H, W), or None where it is that of the first good image. `examples` gives all `total` rows in order.
    where: how errors name the source; info: what the manifest says of it. path: the file or folder that is read.
    notes: what of it was left out on purpose, with counts.
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
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Reading:
    """Settings for sources that are people's own files.

    encoding: of captions and metadata; None is UTF-8, or what a byte order mark says.
    follow_links: also take what lies outside the source's folder and is reached by links in it.
    classes: how many there are, where the labels do not show it.
    columns: names of a Parquet file's columns, by what they hold: image, label, caption.
    groups: of emoji to take; () takes all.
    Raises SourceError for an encoding that Python does not know.
    """

    encoding: str | None = None
    follow_links: bool = False
    classes: int | None = None
    columns: dict[str, str] = field(default_factory=dict)
    groups: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        try:
            with contextlib.suppress(UnicodeDecodeError):
                b"a".decode(self.encoding or "utf-8")
        except LookupError:
            raise SourceError(f"encoding: {self.encoding!r} is no encoding; give utf-8, utf-16, cp1252, ...") from None

    @property
    def wide(self) -> bool:
        """True where characters have two or four bytes, so that a byte 10 need not end a line."""
        return codecs.lookup(self.encoding or "utf-8").name.startswith(("utf-16", "utf-32"))

    def text(self, data: bytes, where: str, line: int = 1, limit: int = TEXT_BYTES) -> str:
        """A file's content, or its lines from number `line` on, as text. Raises ConfigError naming `where` and the
        line. limit: of its size in bytes."""
        way_out = "save it as UTF-8, or name its encoding, such as encoding=cp1252"
        return as_text(data, where, limit, self.encoding, way_out, line)


PLAIN = Reading()


def printable(name: str) -> str:
    """A file's name for texts and manifests: bytes that are not UTF-8 as \\xNN."""
    return name.encode(errors="surrogateescape").decode(errors="backslashreplace")


def read_image(path: Path) -> bytes | CorruptImage:
    """A picture's file, or the reason why it cannot be had."""
    try:
        with path.open("rb") as file:
            data = file.read(IMAGE_BYTES + 1)
    except OSError as error:
        return CorruptImage(f"cannot be read: {error.strerror}")
    return data if len(data) <= IMAGE_BYTES else too_large(f"more than {IMAGE_BYTES >> 20}")


def too_large(size: str) -> CorruptImage:
    """The reason why a file of `size` MiB is not read."""
    return CorruptImage(f"{size} MiB, and a picture's file may have {IMAGE_BYTES >> 20}")


# Labels and captions

Label = int | str
_WHOLE = re.compile(r"(-?\d{1,18})(\.0*)?", re.ASCII)


def label_of(value: Any, where: str) -> Label | None:
    """A label as it stands in metadata: a class number, or a class's name; None and "" are no label.

    Whole numbers are numbers however they are written (3, 3.0, "3", "3.0"). Raises SourceError for other values.
    """
    if value is None or value == "":
        return None
    if isinstance(value, str):
        whole = _WHOLE.fullmatch(value.strip())
        return int(whole[1]) if whole else _encodable(value.strip(), "label", where)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or value != value or value % 1:
        raise SourceError(f"{where}: label: {quoted(value)}; a label is a whole number from 0 or a name")
    return int(value)


def caption_of(value: Any, where: str) -> str | None:
    """A caption as it stands in metadata; None is no caption. Raises SourceError for a value that is no text."""
    if value is None:
        return None
    if not isinstance(value, str):
        raise SourceError(f"{where}: caption: {quoted(value)}; a caption is one text")
    return _encodable(value, "caption", where)


def _encodable(text: str, what: str, where: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        odd = f"U+{ord(text[error.start]):04X}"
        raise SourceError(
            f"{where}: {what}: {quoted(text)} holds {odd}, half of a character; write the whole"
        ) from None
    return text


def all_or_none(values: Sequence[Any], names: Sequence[str], what: str) -> bool:
    """True where all rows have a value, False where none has. Raises SourceError naming the first that lacks one."""
    missing = [name for name, value in zip(names, values, strict=True) if value is None]
    if 0 < len(missing) < len(values):
        raise SourceError(f"path: {len(missing)} of {len(values)} rows have no {what}, the first is {missing[0]!r}")
    return not missing


@dataclass(frozen=True)
class Classes:
    """The classes of a source: how many, their names where labels are names, each row's number, and notes."""

    count: int
    names: tuple[str, ...]
    numbers: list[int] | list[None]
    notes: tuple[str, ...] = ()


def classes_of(labels: Sequence[Label | None], names: Sequence[str], classes: int | None = None) -> Classes:
    """The classes that rows' labels stand for.

    labels, names: of each row. Numbers are class numbers. Names are sorted, those that are whole numbers as numbers,
    and numbered from 0; with `classes` given, names that are all whole numbers are class numbers.
    classes: how many there are; None is the largest number and one, or the number of names.
    Raises SourceError where some rows have no label, or labels are names and numbers, negative, or too large.
    """
    if not all_or_none(labels, names, "label"):
        if classes is not None:
            raise SourceError(f"classes: {classes}, but no row has a label")
        return Classes(0, (), [None] * len(labels))
    first = {isinstance(label, str): (label, name) for label, name in zip(labels[::-1], names[::-1], strict=True)}
    if len(first) == 2:
        raise SourceError(
            f"path: labels are names in some rows and numbers in others: {first[True][0]!r} of {first[True][1]!r}, "
            f"{first[False][0]} of {first[False][1]!r}"
        )
    distinct = sorted(set(labels), key=_in_order)
    numeric = True not in first or all(isinstance(_in_order(name)[1], int) for name in distinct)
    if True in first and not (numeric and classes is not None):
        if classes is not None and classes != len(distinct):
            raise SourceError(f"classes: {classes}, but the labels have {len(distinct)} names")
        number = {name: i for i, name in enumerate(distinct)}
        notes = ()
        if numeric and [_in_order(name)[1] for name in distinct] != list(range(len(distinct))):
            some = ", ".join(distinct[:3])
            notes = (f"the names {some}, ... are classes 0, 1, ...; classes=N takes them as class numbers",)
        return Classes(len(distinct), tuple(distinct), [number[label] for label in labels], notes)
    values = [_in_order(label)[1] for label in labels] if True in first else list(labels)
    for bad in (min(values), max(values)):
        if not 0 <= bad < (classes or MAX_CLASSES):
            name = names[values.index(bad)]
            limit = f"classes={classes}" if classes else f"at most {MAX_CLASSES}"
            raise SourceError(f"path: the label {bad} of {name!r}; labels count from 0, and there are {limit}")
    count = classes or max(values) + 1
    present = set(values)
    empty = [str(number) for number in range(count) if number not in present]
    some = ", ".join(empty[:5]) + ", ..." * (len(empty) > 5)
    notes = (f"{len(empty)} of {count} classes have no image: {some}",) if empty else ()
    return Classes(count, (), values, notes)


def _in_order(label: Label) -> tuple[int, Label, str]:
    """Sorts whole numbers as numbers, and before other names; the second item is the number where it is one."""
    if isinstance(label, int):
        return 0, label, ""
    whole = re.fullmatch(r"\d{1,18}", label, re.ASCII)
    return (0, int(label), label) if whole else (1, label, label)
