"""The reader of YAML and JSON: what is read as what, and that everything else is one line that names its file."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest
import yaml

from fewstep.config import (
    ConfigError,
    Strict,
    parse_arguments,
    parse_json,
    read,
    read_json,
    read_json_lines,
    to_yaml,
    validate,
)
from fewstep.config.reading import parse_yaml


def refused(read, *args) -> str:
    with pytest.raises(ConfigError) as error:
        read(*args)
    return str(error.value)


@pytest.fixture
def yaml_file(tmp_path):
    """Writes a YAML file of the given content, text or bytes, and returns its path."""

    def write(content):
        path = tmp_path / "r.yaml"
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    return write


# YAML


@pytest.mark.parametrize(
    "text, value",
    [
        ("010", "010"), ("0", 0), ("-7", -7), ("+5", 5), ("0o17", 15), ("0x1F", 31), ("10:00", "10:00"),
        ("1_000", "1_000"), ("20261126_2", "20261126_2"), ("2026-01-31", "2026-01-31"), ("1e-4", 1e-4), ("1.", 1.0),
        ("-.5E3", -500.0), ("1.2.3", "1.2.3"), ("e5", "e5"), ("1e4/x", "1e4/x"), (".inf", float("inf")),
        ("true", True), ("False", False), ("yes", "yes"), ("no", "no"), ("on", "on"), ("y", "y"), ("tRUE", "tRUE"),
        ("null", None), ("~", None), ("", None), ("nil", "nil"), ("=", "="), ("<<", "<<"), ("'010'", "010"),
        ("!!str 12", "12"), ("!!int '12'", 12), ("\u0661\u0662", "\u0661\u0662"), ("a=b", "a=b"),
    ],
)  # fmt: skip
def test_a_word_is_read_as_yaml_1_2_has_it(text, value):
    (result,) = parse_arguments([f"x={text}"]).values()
    assert result == value and type(result) is type(value)


class Numbers(Strict):
    """Numbers of both kinds, alone and inside others."""

    count: int = 0
    rate: float | None = None
    pair: tuple[int, float] = (0, 0)
    by_name: dict[str, int] = {}
    free: dict[str, Any] = {}
    on: bool = False


def test_numbers_take_numbers_as_written():
    assert validate(Numbers, parse_arguments(["count=010", "rate=1_000.5", "on=yes"])) == Numbers(
        count=10, rate=1000.5, on=True
    )
    assert validate(Numbers, parse_arguments(["count=1e3", "rate=3"])) == Numbers(count=1000, rate=3.0)
    lines = refused(
        validate, Numbers, parse_arguments(["count=true", "rate=false", "pair=[1, true]", "by_name={a: true}"])
    )
    assert lines.splitlines() == [
        "count: expected a whole number, got true",
        "rate: expected a number, got false",
        "pair.1: expected a number, got true",
        "by_name.a: expected a whole number, got true",
    ]
    lines = refused(validate, Numbers, parse_arguments(["count=10:00", f"rate={'9' * 400}."])).splitlines()
    assert lines == ["count: expected a whole number, got '10:00'", "rate: expected a finite number, got inf"]
    line = refused(validate, Numbers, parse_arguments(["free={a: [true, {b: .inf}]}"]))
    assert line.startswith("free.a: expected a finite number, got [True")
    assert refused(validate, Numbers, {"count": 2**63}).startswith("count: must be at most 9.22")
    assert validate(Numbers, {"count": 2**63 - 1}).count == 2**63 - 1


def test_merge_keys_and_aliases(yaml_file):
    path = yaml_file(
        "student: &adam {lr: 1e-4, betas: [0.0, 0.99]}\n"
        "fake: {<<: *adam, lr: 8e-4}\n"
        "deep: {deeper: &both {<<: *adam, lr: 1}}\n"
        "disc: {<<: [*both, {lr: 2, eps: 3}]}\n"
        "same: *adam\n"
    )
    adam = {"lr": 1e-4, "betas": [0.0, 0.99]}
    assert read(path) == {
        "student": adam,
        "fake": adam | {"lr": 8e-4},
        "deep": {"deeper": adam | {"lr": 1}},
        "disc": adam | {"lr": 1, "eps": 3},
        "same": adam,
    }


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_encodings_that_a_file_says(yaml_file, encoding):
    path = yaml_file("name: Grüße \N{GRINNING FACE}\r\nseed: 1\n".encode(encoding))
    assert read(path) == {"name": "Grüße \N{GRINNING FACE}", "seed": 1}


BOMB = "a: &a [x,x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{name}: &{name} [{','.join(['*' + below] * 10)}]\n" for below, name in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    "content, text",
    [
        ("a: 1\nb: {c: 1, c: 2}\n", "not valid YAML: key 'c' is given twice (line 2, column 11)"),
        ("a: 1\n? [b]\n: 2\n", "not valid YAML: a key is text, got a list or a mapping; put it in"),
        ("a: 1\n2: 3\n", "not valid YAML: a key is text, got '2'; put it in quotes if it is meant as text (line 2, c"),
        ("a: !!python/name:os.system x\n", "not valid YAML: tag 'tag:yaml.org,2002:python/name:os.system': only plain"),
        ("a: !!set {x}\n", "not valid YAML: tag 'tag:yaml.org,2002:set': only plain text, numbers, lists and mappings"),
        ("a: !!int x\n", "not valid YAML: 'x' is no int (line 1, column 4)"),
        ("a: " + "9" * 5000, "not valid YAML: 9999999999... has 5,000 digits, and a whole number at most 40 (line 1, "),
        ("a: 1\n---\nb: 2\n", "not valid YAML: expected a single document in the stream, but found another document ("),
        ("a: *b\n", "not valid YAML: found undefined alias 'b' (line 1, column 4)"),
        ("a: &a [*a]\n", "not valid YAML: *a stands inside what it stands for (line 1, column 8)"),
        ("a: &a {<<: *a}\n", "not valid YAML: *a stands inside what it stands for (line 1, column 12)"),
        ('a: "x\\0y"', "not valid YAML: character U+0000 in a text (line 1, column 4)"),
        ('"\\ud83d": 1', "not valid YAML: character U+D83D in a text (line 1, column 1)"),
        ("a: {<<: 3}\n", "not valid YAML: while constructing a mapping, expected a mapping or list of mappings for "),
        (BOMB, "not valid YAML: more than 10,000 values, aliases counted as what they stand for; no file of this "),
        ("".join(f"k{i}: 1\n" for i in range(5_001)), "not valid YAML: more than 10,000 values, aliases counted as "),
        ("[" * 10_000, "not valid YAML: more than 64 values inside each other, which no file of this kind has (line 1"),
        ("a: 1\nb: " + "- " * 9_000, "not valid YAML: "),
        ("\n".join(" " * i + "a:" for i in range(500)), "not valid YAML: more than 64 values inside each other, whi"),
        ("a: " + "x" * 2**20, "more than 1024 KiB, which no file of this kind has"),
        (b"a: 1\nname: \xff\n", "not UTF-8 text (line 2, byte 0xff); save the file as UTF-8"),
        ("name: x\n".encode("utf-16")[:-1], "not UTF-16 text (byte 16); save the file as UTF-8"),
        ("\nname: x\n".encode("utf-16-le"), "a NUL character (line 2), as in UTF-16 without a byte order mark; save"),
        (b"a: 1\nname: \x07\n", "not valid YAML: control character U+0007 (line 2)"),
        ("", "expected `key: value` lines, got nothing"),
    ],
    ids=lambda value: repr(value[:20]),
)  # fmt: skip
def test_what_is_no_settings_file_is_refused_at_once_with_its_line(yaml_file, content, text):
    path, start = yaml_file(content), time.process_time()
    line = refused(read, path)
    assert line.startswith(f"{path}: {text}") and "\n" not in line
    assert time.process_time() - start < 5


def test_what_cannot_be_read_is_named(tmp_path):
    assert refused(read, tmp_path / "none.yaml") == f"{tmp_path}/none.yaml: no such file"
    assert refused(read, tmp_path) == f"{tmp_path}: a folder, expected a file"
    assert refused(read, "/dev/zero") == "/dev/zero: a device or pipe, expected a file"
    assert refused(read, f"{tmp_path}/{'x' * 300}").endswith(": cannot be read: File name too long")


# JSON


@pytest.mark.parametrize(
    "content, text",
    [
        ("[1]", "expected an object {...}, got [1]"),
        ("7", "expected an object {...}, got 7"),
        ("{", "not valid JSON: Expecting property name enclosed in double quotes: line 1 column 2 (char 1)"),
        ('{"a": 1, "b": 2, "a": 3}', "key 'a' is given twice"),
        ('{"a": ' + "9" * 5000 + "}", "9999999999... has 5,000 digits, and a whole number at most 40"),
        ('{"a": {"\\u0000": 1}}', "character U+0000 in a text"),
        ('{"a": ["\\uD83d"]}', "character U+D83D in a text"),
        ('{"a": ' + "[" * 100_000, "more than 64 values inside each other, which no file of this kind has"),
        ('{"a": ' + "[" * 65 + "]" * 65 + "}", "more than 64 values inside each other, which no file of this kind "),
        (b'{"a": "\xff"}', "not UTF-8 text (line 1, byte 0xff); save the file as UTF-8"),
        (" " * (2**24 + 1), "more than 16384 KiB, which no file of this kind has"),
    ],
    ids=lambda value: repr(value[:20]),
)
def test_json_that_is_none_of_ours_is_refused_with_its_file(tmp_path, content, text):
    path = tmp_path / "x.json"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    assert refused(read_json, path).startswith(f"{path}: {text}")


def test_json_of_the_type_that_is_expected(tmp_path):
    path = tmp_path / "x.json"
    path.write_bytes("\ufeff".encode() + b'[{"a": 1.5}, null, 9223372036854775807]')
    assert read_json(path, list) == [{"a": 1.5}, None, 2**63 - 1]
    assert parse_json("-3", "x", object) == -3
    nested = "[" * 65 + "]" * 65
    assert json.dumps(parse_json(nested[1:-1], "x", list)) == nested[1:-1]
    assert parse_json('{"a": "\\ud83d\\ude00"}', "x") == {"a": "\U0001f600"}


def test_lines_of_json_and_the_one_that_is_still_being_written(tmp_path):
    path = tmp_path / "reports.jsonl"
    path.write_bytes('{"a": "\u2028"}\n{"a": 2}\n{"a": '.encode())
    assert list(read_json_lines(path)) == [{"a": "\u2028"}, {"a": 2}]
    path.write_bytes(b'{"a": 1}\n[2]\n')
    assert refused(list, read_json_lines(path)) == f"{path}: line 2: expected an object {{...}}, got [2]"


def test_text_is_written_so_that_every_reader_takes_it_for_text():
    texts = [
        "12e5",
        "0o17",
        "010",
        "1_000",
        "off",
        "null",
        "",
        "2026-01-31",
        "10:00",
        "<<",
        "=",
        "a: b",
        "a #b",
        "\u2028",
    ]
    data = {"name": "12e5", "list": texts, "number": 1e-8, "none": None, "nested": {"yes": True}}
    assert parse_yaml(to_yaml(data), "x") == data and yaml.safe_load(to_yaml(data)) == data
