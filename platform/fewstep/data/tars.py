"""webdataset archives: tars whose neighbouring members with one key are a row."""

from __future__ import annotations

import lzma
import tarfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from fewstep.config import parse_json
from fewstep.data.decode import CorruptImage
from fewstep.data.source import (
    IMAGE_BYTES,
    PLAIN,
    SUFFIXES,
    TEXT_BYTES,
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
from fewstep.data.tree import is_hidden, walk
from fewstep.texts import one_line

_EXTENDED = (b"x", b"g", b"X", b"L", b"K")  # headers whose content tarfile reads into memory, such as a long name
_HEADER_BYTES = 1 << 20
TEXTS = (".cls", ".txt", ".json")


class _Header(tarfile.TarInfo):
    """A header of a tar. tarfile takes a damaged one for the archive's end, and reads long names of any length."""

    @classmethod
    def frombuf(cls, buf: bytes, encoding: str, errors: str) -> tarfile.TarInfo:
        try:
            header = super().frombuf(buf, encoding, errors)
        except (tarfile.InvalidHeaderError, tarfile.TruncatedHeaderError) as error:
            raise tarfile.ReadError(str(error)) from None
        if header.type in _EXTENDED and header.size > _HEADER_BYTES:
            raise tarfile.ReadError(f"a header of {header.size} bytes")
        return header


def members(archive: Path, limit_of: Callable[[str], int]) -> Iterator[tuple[str, bytes | None]]:
    """The files in a tar, packed or not, in order: name, and content; None where it has more bytes than the limit.

    limit_of: bytes that a member of this name may have; 0 where it is not wanted, which is then not read.
    Raises SourceError naming the archive where it is damaged.
    """
    try:
        with tarfile.open(archive, tarinfo=_Header) as tar:
            for member in tar:
                if member.isfile():
                    read = member.size <= limit_of(member.name)
                    yield member.name, tar.extractfile(member).read() if read else None
    except (tarfile.TarError, OSError, EOFError, ValueError, zlib.error, lzma.LZMAError) as error:
        text = f"not a readable tar archive ({one_line(error)}); fetch it again"
        raise SourceError(f"{printable(str(archive))}: {text}") from None


def webdataset(path: Path | None, split: str = "train", reading: Reading = PLAIN) -> Source:
    """Tar archives whose members key.jpg|jpeg|png|webp, key.cls, key.txt and key.json form a row.

    path: one archive, or a folder of *.tar files, in the order of their names. key.json may hold label and caption (or
    text); key.cls and key.txt go before it. Other members are not read, hidden ones are left out.
    Raises SourceError and ConfigError naming the archive, the key and the way out.
    """
    how = "give path=<one .tar, or a folder of them>"
    if path is None or not path.exists():
        raise SourceError(f"path: nothing at {str(path)!r}; {how}")
    archives, notes = [path], ()
    if path.is_dir():
        tree = walk(path, reading)
        tops = [name for name in (*tree.files, *tree.outside) if "/" not in name and name.endswith(".tar")]
        tree.check(tops)
        archives, notes = [path / name for name in sorted(tops)], tree.notes
    if not archives:
        raise SourceError(f"path: no *.tar in {str(path)!r}; {how}")
    names: list[str] = []
    labels: list[Label | None] = []
    captions: list[str | None] = []
    hidden = 0
    for archive in archives:
        for row in _rows(archive, images=False):
            if row is None:
                hidden += 1
                continue
            names.append(row.name)
            labels.append(_label(row, reading))
            captions.append(_caption(row, reading))
    if not names:
        raise SourceError(f"path: no rows in {str(path)!r}; {how}")
    classes = classes_of(labels, names, reading.classes)
    captioned = all_or_none(captions, names, "caption")
    if hidden:
        notes = (*notes, f"left out: {hidden} hidden members")

    def examples() -> Iterator[Example]:
        numbers = iter(classes.numbers)
        for archive in archives:
            for row in _rows(archive, images=True):
                if row is not None:
                    yield Example(row.name, _image(row), next(numbers), _caption(row, reading))

    return Source(
        len(names), examples, None, classes.count, classes.names, captioned, str(path),
        {"source": "webdataset", "name": printable(path.name)}, path, (*notes, *classes.notes),
    )  # fmt: skip


class _Row(NamedTuple):
    """Members with one key. parts: what a row needs, by suffix; None was not read. suffixes: all there are."""

    name: str
    parts: dict[str, bytes | None]
    suffixes: list[str]


def _rows(archive: Path, images: bool) -> Iterator[_Row | None]:
    """The rows of a tar, and None for each hidden member."""
    key: str | None = None
    row = _Row("", {}, [])
    limits = dict.fromkeys(TEXTS, TEXT_BYTES) | dict.fromkeys(SUFFIXES, IMAGE_BYTES if images else 0)
    for name, data in members(archive, lambda name: limits.get(_key_and_suffix(name)[1], 0)):
        if is_hidden(name.removeprefix("./")):
            yield None
            continue
        here, suffix = _key_and_suffix(name)
        if here != key:
            if key is not None:
                yield row
            key, row = here, _Row(printable(f"{archive.name}:{here}"), {}, [])
        if suffix in row.suffixes:
            raise SourceError(f"{row.name}: two members with the suffix {suffix}; a key stands for one row")
        row.suffixes.append(suffix)
        if suffix in limits:
            row.parts[suffix] = data
    if key is not None:
        yield row


def _key_and_suffix(name: str) -> tuple[str, str]:
    """A member's key, which ends at the first dot of its last name, and the rest with that dot."""
    folder, slash, last = name.rpartition("/")
    stem, dot, suffix = last.partition(".")
    return folder + slash + stem, dot + suffix.lower()


def _image(row: _Row) -> bytes | CorruptImage:
    images = [suffix for suffix in row.suffixes if suffix in SUFFIXES]
    if len(images) != 1:
        others = ", ".join(row.suffixes[:8])
        return CorruptImage(
            f"{'no image' if not images else 'several images'} among its members ({others}); a member's suffix begins "
            "at the first dot of its name"
        )
    data = row.parts[images[0]]
    return too_large(f"more than {IMAGE_BYTES >> 20}") if data is None else data


def _member_bytes(row: _Row, suffix: str) -> bytes:
    data = row.parts[suffix]
    if data is None:
        raise SourceError(f"{row.name}{suffix}: more than {TEXT_BYTES >> 20} MiB, which no text of this kind has")
    return data


def _json_fields(row: _Row, reading: Reading) -> dict:
    where = f"{row.name}.json"
    return parse_json(reading.text(_member_bytes(row, ".json"), where), where) if ".json" in row.parts else {}


def _label(row: _Row, reading: Reading) -> Label | None:
    if ".cls" in row.parts:
        return label_of(reading.text(_member_bytes(row, ".cls"), f"{row.name}.cls").strip(), f"{row.name}.cls")
    return label_of(_json_fields(row, reading).get("label"), f"{row.name}.json")


def _caption(row: _Row, reading: Reading) -> str | None:
    if ".txt" in row.parts:
        return reading.text(_member_bytes(row, ".txt"), f"{row.name}.txt").strip()
    described = _json_fields(row, reading)
    return caption_of(described.get("caption", described.get("text")), f"{row.name}.json")
