"""The one reader of YAML and JSON that people write or may damage: limits, encodings, and errors that name the file.

YAML is read as version 1.2 has it: 010, 10:00, yes and 2026-01-31 are text, 1e-4 is a number, `<<: *other` merges
another mapping. A key is text and stands once. Sizes are limited, so that no file takes longer than seconds to refuse.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from yaml.constructor import ConstructorError

from ..texts import quoted

DEPTH = 64  # mappings and lists inside each other
NODES = 10_000  # values and keys of a YAML file, where each use of an alias counts as what it stands for
DIGITS = 40  # of a whole number; the longest that any setting takes has 19
YAML_BYTES, JSON_BYTES = 1 << 20, 16 << 20
ODD = re.compile("[\0\ud800-\udfff]")  # characters that neither a path nor a file's text can hold
ESCAPED = re.compile(r"\\u[dD]|\\u0000")
BOMS = {codecs.BOM_UTF8: "utf-8", codecs.BOM_UTF32_LE: "utf-32", codecs.BOM_UTF32_BE: "utf-32"}
BOMS |= {codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}  # UTF-32's begins with UTF-16's


class UserError(Exception):
    """Base of errors that the user can mend; the message says all that is needed, so jobs print it and no traceback."""


class ConfigError(UserError, ValueError):
    """One or more mistakes in what the user wrote: a line each, which names the file or the dotted key, and the fix."""


def read(path: str | Path) -> dict[str, Any]:
    """A YAML file as a nested dict. Raises ConfigError naming the file, and the line of a mistake in it."""
    data = parse_yaml(_bytes(path, YAML_BYTES), str(path))
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: expected `key: value` lines, got {'nothing' if data is None else quoted(data)}")
    return data


def read_json(path: str | Path, expected: type = dict, limit: int = JSON_BYTES) -> Any:
    """A JSON file whose outermost value is of type `expected`: dict, list, or object for any.

    limit: of the file's size, in bytes. Raises ConfigError naming the file, and the line of a mistake in it.
    """
    return parse_json(_bytes(path, limit), str(path), expected, limit)


def read_json_lines(path: str | Path, limit: int = JSON_BYTES) -> Iterator[dict[str, Any]]:
    """The JSON objects of a file that has one a line; a last line without its end, still being written, is left out.

    limit: of a line's size, in bytes. Raises ConfigError naming the file and the line.
    """
    try:
        with open(path, "rb") as file:
            for number, line in enumerate(file, start=1):
                if line.endswith(b"\n"):
                    yield parse_json(line, f"{path}: line {number}", dict, limit)
    except OSError as error:
        raise _read_error(path, error) from None


def parse_yaml(content: str | bytes, where: str) -> Any:
    """The value of a YAML document. where: its file or key, for errors. Raises ConfigError."""
    text = as_text(content, where, YAML_BYTES)
    try:
        return _Loader(text).get_single_data()
    except yaml.YAMLError as error:
        raise ConfigError(f"{where}: not valid YAML: {_yaml_mistake(error, text)}") from None


def to_yaml(data: Any) -> str:
    """Data of JSON types as YAML, which `read` reads as the same data, and readers of YAML 1.1 too."""
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def parse_json(content: str | bytes, where: str, expected: type = dict, limit: int = JSON_BYTES) -> Any:
    """The value of a JSON document, of type `expected`. where: its file, for errors. Raises ConfigError."""
    text = as_text(content, where, limit)
    try:
        data = json.loads(text, object_pairs_hook=_unique_keys, parse_int=_whole_number)
    except RecursionError:
        raise ConfigError(f"{where}: {_too_deep()}") from None
    except json.JSONDecodeError as error:
        raise ConfigError(f"{where}: not valid JSON: {error}") from None
    except ValueError as error:
        raise ConfigError(f"{where}: {error}") from None
    if not isinstance(data, expected):
        kinds = {dict: "an object {...}", list: "a list [...]"}
        raise ConfigError(f"{where}: expected {kinds.get(expected, expected.__name__)}, got {quoted(data)}")
    level = [data]
    for _ in range(DEPTH + 1):
        level = [v for x in level if isinstance(x, (dict, list)) for v in (x.values() if isinstance(x, dict) else x)]
    if level:
        raise ConfigError(f"{where}: {_too_deep()}")
    if ESCAPED.search(text) and (odd := ODD.search("".join(_texts(data)))):
        raise ConfigError(f"{where}: character U+{ord(odd[0]):04X} in a text")
    return data


def _bytes(path: str | Path, limit: int) -> bytes:
    """A file's content, and one byte more than `limit` of a larger one."""
    path = Path(path)
    try:
        if not path.exists():
            raise ConfigError(f"{path}: no such file")
        if not path.is_file():
            raise ConfigError(f"{path}: {'a folder' if path.is_dir() else 'a device or pipe'}, expected a file")
        with open(path, "rb") as file:
            return file.read(limit + 1)
    except OSError as error:
        raise _read_error(path, error) from None


def _read_error(path: str | Path, error: OSError) -> ConfigError:
    return ConfigError(f"{str(path)[:300]}: cannot be read: {error.strerror or error}")


def as_text(
    content: str | bytes,
    where: str,
    limit: int,
    encoding: str | None = None,
    way_out: str = "save the file as UTF-8",
    line: int = 1,
) -> str:
    """The content as text: in UTF-16 or UTF-32 where a byte order mark says so, else in `encoding` or in UTF-8.

    where: its file, for errors; limit: of its size. line: number in the file of the content's first line.
    Raises ConfigError naming the file and the line.
    """
    if len(content) > limit:
        raise ConfigError(f"{where}: more than {limit >> 10} KiB, which no file of this kind has")
    if isinstance(content, str):
        return content.removeprefix("\ufeff")
    encoding = next((name for mark, name in BOMS.items() if content.startswith(mark)), encoding or "utf-8")
    try:
        text = content.decode(encoding).removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        line += content[: error.start].count(b"\n")
        wide = encoding.startswith(("utf-16", "utf-32"))
        at = f"byte {error.start}" if wide else f"line {line}, byte 0x{content[error.start]:02x}"
        raise ConfigError(f"{where}: not {encoding.upper()} text ({at}); {way_out}") from None
    if "\0" in text:
        line += text[: text.index("\0")].count("\n")
        raise ConfigError(f"{where}: a NUL character (line {line}), as in UTF-16 without a byte order mark; {way_out}")
    return text


def _too_deep() -> str:
    return f"more than {DEPTH} values inside each other, which no file of this kind has"


# JSON


def _texts(data: Any) -> Iterator[str]:
    """All texts in nested data, keys among them."""
    if isinstance(data, str):
        yield data
    elif isinstance(data, (dict, list)):
        for part in (*data.keys(), *data.values()) if isinstance(data, dict) else data:
            yield from _texts(part)


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    data = dict(pairs)
    if len(data) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"key {next(key for key in keys if keys.count(key) > 1)!r} is given twice")
    return data


def _whole_number(text: str) -> int:
    if len(text) > DIGITS:
        raise ValueError(f"{text[:10]}... has {len(text):,} digits, and a whole number at most {DIGITS}")
    return int(text, 0)


# YAML


class _Loader(yaml.SafeLoader):
    """YAML 1.2's core schema, with merge keys, and with limits on depth and on what aliases stand for."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}
    yaml_constructors: dict[str | None, Any] = {}

    def __init__(self, text: str):
        super().__init__(text)
        self.depth = self.nodes = 0
        self.sizes: dict[int, int] = {}  # of each finished node, by its id

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node:
        event, before = self.peek_event(), self.nodes
        if self.depth > DEPTH:
            raise ConstructorError(None, None, _too_deep(), event.start_mark)
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        if not isinstance(event, yaml.AliasEvent):
            self.nodes += 1
            self.sizes[id(node)] = self.nodes - before
        elif id(node) in self.sizes:
            self.nodes += self.sizes[id(node)]
        else:
            raise ConstructorError(None, None, f"*{event.anchor} stands inside what it stands for", event.start_mark)
        if self.nodes > NODES:
            what = f"more than {NODES:,} values, aliases counted as what they stand for"
            raise ConstructorError(None, None, f"{what}; no file of this kind has as many", event.start_mark)
        return node

    def compose_mapping_node(self, anchor: str | None) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen: set[str] = set()
        for key, _ in node.value:
            if key.tag == MERGE:
                continue
            if key.tag != TAG + "str":
                got = repr(key.value) if isinstance(key, yaml.ScalarNode) else "a list or a mapping"
                text = f"a key is text, got {got}; put it in quotes if it is meant as text"
                raise ConstructorError(None, None, text, key.start_mark)
            if key.value in seen:
                raise ConstructorError(None, None, f"key {key.value!r} is given twice", key.start_mark)
            seen.add(key.value)
        return node


class _Dumper(yaml.SafeDumper):
    """Quotes text that YAML 1.1 or 1.2 would take for something else."""


TAG = "tag:yaml.org,2002:"
MERGE = TAG + "merge"
_NAMES = {"null": None, "~": None, "": None, "true": True, "false": False}
# text without quotes that is no string: their patterns, and the letters that they begin with
_SCALARS = {
    "merge": ("<<", ["<"]),
    "null": ("null|Null|NULL|~|", ["n", "N", "~", ""]),
    "bool": ("true|True|TRUE|false|False|FALSE", list("tTfF")),
    "int": ("[-+]?(0|[1-9][0-9]*)|0o[0-7]+|0x[0-9a-fA-F]+", list("-+0123456789")),
    "float": (
        r"[-+]?(\.[0-9]+|[0-9]+\.[0-9]*)([eE][-+]?[0-9]+)?|[-+]?[0-9]+[eE][-+]?[0-9]+"
        r"|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        list("-+.0123456789"),
    ),
}


def _scalar(kind: str, value: Any) -> Any:
    """A constructor of scalars of a kind, which refuses text of another kind, such as `!!int x`."""

    def construct(loader: _Loader, node: yaml.ScalarNode) -> Any:
        text = loader.construct_scalar(node)
        if not re.fullmatch(_SCALARS[kind][0], text):
            raise ConstructorError(None, None, f"{quoted(text)} is no {kind}", node.start_mark)
        try:
            return value(text)
        except ValueError as error:
            raise ConstructorError(None, None, str(error), node.start_mark) from None

    return construct


def _plain_text(loader: _Loader, node: yaml.ScalarNode) -> str:
    text = loader.construct_scalar(node)
    if odd := ODD.search(text):
        raise ConstructorError(None, None, f"character U+{ord(odd[0]):04X} in a text", node.start_mark)
    return text


def _refuse_tag(loader: _Loader, node: yaml.Node) -> Any:
    text = f"tag {node.tag!r}: only plain text, numbers, lists and mappings are read"
    raise ConstructorError(None, None, text, node.start_mark)


for _kind, (_pattern, _first) in _SCALARS.items():
    for _cls in (_Loader, _Dumper):
        _cls.add_implicit_resolver(TAG + _kind, re.compile(f"(?:{_pattern})\\Z"), _first)
for _kind, _value in {
    "null": lambda text: _NAMES[text.lower()],
    "bool": lambda text: _NAMES[text.lower()],
    "int": _whole_number,
    "float": lambda text: float(re.sub(r"\.(?=inf|nan)", "", text.lower())),
}.items():
    _Loader.add_constructor(TAG + _kind, _scalar(_kind, _value))
_Loader.add_constructor(MERGE, _plain_text)  # as a value it is text
_Loader.add_constructor(TAG + "str", _plain_text)
for _kind in ("seq", "map"):
    _Loader.add_constructor(TAG + _kind, getattr(yaml.SafeLoader, f"construct_yaml_{_kind}"))
_Loader.add_constructor(None, _refuse_tag)


def _yaml_mistake(error: yaml.YAMLError, text: str) -> str:
    """An error of PyYAML's as one line: what is wrong, and its line and column."""
    if isinstance(error, yaml.reader.ReaderError):  # a character that YAML has not
        line = text.count("\n", 0, error.position) + 1
        return f"control character U+{error.character:04X} (line {line})"
    mark = error.problem_mark or error.context_mark
    what = ", ".join(part for part in (error.context, error.problem) if part)
    return f"{what} (line {mark.line + 1}, column {mark.column + 1})"
