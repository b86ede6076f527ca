"""Recipe files and dotted overrides, checked before anything runs.

A recipe is YAML; `key.sub=value` words override it (values are YAML too); a pydantic model validates the whole. Every
mistake is reported at once, with its dotted key, the value and the nearest valid name.
"""

from __future__ import annotations

import contextlib
import difflib
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

ASSETS = Path(__file__).parent / "assets"
M = TypeVar("M", bound=BaseModel)


class ConfigError(ValueError):
    """One or more mistakes in what the user asked for; each line names a dotted key and the way out."""


class Strict(BaseModel):
    """Base of every settings model: frozen, and a key it does not know is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)


class _Loader(yaml.SafeLoader):
    """YAML as people write it: 1e-4 is a float and 2026-01-31 a text (in YAML 1.1 a string and a date), and a key given
    twice is a mistake."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        if twice := [key for i, key in enumerate(keys) if key in keys[:i]]:
            raise yaml.constructor.ConstructorError(None, None, f"key {twice[0]!r} is given twice", node.start_mark)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d[\d_]*\.?[\d_]*|\.\d+)[eE][-+]?\d+$"),
    list("-+0123456789."),
)
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in pairs if not tag.endswith(":timestamp")]
    for first, pairs in _Loader.yaml_implicit_resolvers.items()
}


def _yaml(text: str, where: str) -> Any:
    try:
        return yaml.load(text, Loader=_Loader)  # noqa: S506 - a SafeLoader with one more float spelling
    except yaml.YAMLError as error:
        raise ConfigError(f"{where}: not valid YAML: {' '.join(str(error).split())}") from None


def resolve(path: str | Path) -> Path:
    """Absolute path of a file or folder named by a user; `shipped:x` is x in the package's embedded defaults."""
    text = str(path)
    if text.startswith("shipped:"):
        return ASSETS / text.removeprefix("shipped:")
    return Path(text).expanduser().absolute()


def resolve_ref(ref: str | Path) -> Path | str:
    """A URL such as s3://bucket/x as it is, and anything else as `resolve` has it."""
    return str(ref) if "://" in str(ref) else resolve(ref)


def flatten(nested: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings as {dotted key: value}; an empty mapping is a value."""
    out: dict[str, Any] = {}
    for key, value in nested.items():
        below = isinstance(value, Mapping) and value
        out |= flatten(value, f"{prefix}{key}.") if below else {f"{prefix}{key}": value}
    return out


def read(path: str | Path) -> dict[str, Any]:
    """A YAML file as a nested dict. Raises ConfigError naming the file when it is missing or is not a mapping."""
    path = Path(path)
    if not path.is_file():
        raise ConfigError(f"{path}: no such file")
    data = _yaml(path.read_text(), str(path))
    if not isinstance(data, dict):
        found = "nothing" if data is None else _short(data)
        raise ConfigError(f"{path}: expected `key: value` lines, found {found}")
    return data


def override(data: dict[str, Any], dotted: str, value: Any) -> dict[str, Any]:
    """A copy of `data` with the dotted key set; mappings on the way are made or copied, never shared."""
    return _override(data, dotted.split("."), value, dotted)


def _override(data: dict[str, Any], keys: list[str], value: Any, dotted: str) -> dict[str, Any]:
    head, *rest = keys
    if rest:
        inner = data.get(head)
        if inner is not None and not isinstance(inner, dict):
            above = dotted.removesuffix("." + ".".join(rest))
            raise ConfigError(f"{dotted}: {above} is {inner!r}, which has no fields to set")
        value = _override(inner or {}, rest, value, dotted)
    return {**data, head: value}


def words(argv: Sequence[str]) -> dict[str, Any]:
    """`key.sub=value` words as {dotted key: value}. Raises ConfigError for words of another form or given twice."""
    found: dict[str, Any] = {}
    wrong = []
    for word in argv:
        key, equals, text = word.partition("=")
        if not equals or not all(key.split(".")):
            wrong.append(f"{word!r}: arguments have the form key=value or key.sub=value, such as seed=1")
        elif key in found:
            wrong.append(f"{key}: given twice")
        else:
            try:
                found[key] = _yaml(text, key)
            except ConfigError as error:
                wrong.append(str(error))
    if wrong:
        raise ConfigError("\n".join(wrong))
    return found


def _models(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [m for arg in get_args(annotation) for m in _models(arg)]


def _fields_at(model: type[BaseModel], location: Sequence[Any]) -> list[str]:
    """Names that are valid where `location` points, through nested and tagged models."""
    here = [model]
    for part in location:
        tagged = [m for m in here if getattr(m, "tag", None) == part]
        if tagged:
            here = tagged
            continue
        fields = [m.model_fields[part] for m in here if part in m.model_fields]
        if not fields:
            # a dict's key: the models are those of its values
            continue
        here = [m for f in fields for m in _models(f.annotation)]
    return sorted({name for m in here for name in m.model_fields})


def nearest(name: str, valid: Sequence[str]) -> str:
    """The end of an error text: the nearest valid name, or all of them when none is near."""
    close = difflib.get_close_matches(str(name), list(valid), n=1, cutoff=0.6)
    if close:
        return f"did you mean {close[0]!r}?"
    return f"valid: {', '.join(map(str, valid))}" if valid else "nothing can be set here"


def validate(model: type[M], data: dict[str, Any]) -> M:
    """`data` as a frozen model. Raises ConfigError listing every mistake, a line each."""
    try:
        return model.model_validate(data)
    except ValidationError as error:
        raise ConfigError("\n".join(_line(model, e) for e in error.errors())) from None


# What pydantic calls a mistake: how we say it. {got} is the value, other names are pydantic's context.
TEXTS = {
    "int_type": "expected a whole number, got {got}",
    "int_parsing": "expected a whole number, got {got}",
    "int_from_float": "expected a whole number, got {got}",
    "float_type": "expected a number, got {got}",
    "float_parsing": "expected a number, got {got}",
    "finite_number": "expected a finite number, got {got}",
    "bool_type": "expected true or false, got {got}",
    "bool_parsing": "expected true or false, got {got}",
    "string_type": "expected text, got {got}",
    "list_type": "expected a list such as [a, b], got {got}",
    "tuple_type": "expected a list such as [a, b], got {got}",
    "too_long": "expected {max_length} values, got {actual_length}",
    "dict_type": "expected fields, such as {dotted}.key=value, got {got}",
    "model_type": "expected fields, such as {dotted}.key=value, got {got}",
    "model_attributes_type": "expected fields, such as {dotted}.name=value, got {got}",
    "greater_than": "must be above {gt:g}, got {got}",
    "greater_than_equal": "must be at least {ge:g}, got {got}",
    "less_than": "must be below {lt:g}, got {got}",
    "less_than_equal": "must be at most {le:g}, got {got}",
}


def _line(model: type[BaseModel], e: Any) -> str:
    """One mistake as a line: its dotted key, the value, the way out."""
    location = [part for part in e["loc"] if not (isinstance(part, str) and part.startswith("function-"))]
    visible = _visible(model, location)
    dotted, context, got = ".".join(map(str, visible)), e.get("ctx", {}), _short(e["input"])
    if e["type"] == "extra_forbidden":
        return f"{dotted}: no such key; {nearest(visible[-1], _fields_at(model, location[:-1]))}"
    if e["type"] == "missing":
        if visible and isinstance(visible[-1], int):
            return f"{'.'.join(map(str, visible[:-1]))}: its value number {visible[-1] + 1} is missing"
        return f"{dotted}: missing, and it has no default"
    if e["type"] == "union_tag_not_found":
        return f"{dotted}.name: missing; valid: {', '.join(_tags(model, location))}"
    if e["type"] in ("union_tag_invalid", "literal_error"):
        tagged = e["type"] == "union_tag_invalid"
        value = e["input"].get("name") if tagged else e["input"]
        valid = _tags(model, location) if tagged else re.findall(r"'([^']*)'", context["expected"])
        close = difflib.get_close_matches(str(value), valid, n=1, cutoff=0.76)  # fp16 does not mean bf16
        hint = f"; did you mean {close[0]!r}?" if close else ""
        return f"{dotted}{'.name' if tagged else ''}: {_short(value)} is not one of {', '.join(valid)}{hint}"
    if e["type"] in TEXTS:
        return f"{dotted}: " + TEXTS[e["type"]].format(**{**context, "got": got, "dotted": dotted})
    message = e["msg"].removeprefix("Value error, ").removeprefix("Assertion failed, ")
    if not dotted or message.startswith(dotted):
        return message  # a check of several fields names them itself
    return f"{dotted}: {message[0].lower() + message[1:]}, got {got}"


def _short(value: Any) -> str:
    text = "null" if value is None else repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _tags(model: type[BaseModel], location: Sequence[Any]) -> list[str]:
    """The names that a tagged union at `location` knows."""
    here = [model]
    for part in location:
        fields = [m.model_fields[part] for m in here if part in m.model_fields]
        here = [m for field in fields for m in _models(field.annotation)]
    return sorted(m.tag for m in here if hasattr(m, "tag"))


def _visible(model: type[BaseModel], location: Sequence[Any]) -> list[Any]:
    """The location without the tags that pydantic adds for a union's members: the key as the user wrote it."""
    out: list[Any] = []
    here: list[type[BaseModel]] = [model]
    for part in location:
        if any(getattr(m, "tag", None) == part for m in here) and not any(part in m.model_fields for m in here):
            here = [m for m in here if getattr(m, "tag", None) == part]
            continue
        out.append(part)
        fields = [m.model_fields[part] for m in here if part in m.model_fields]
        if fields:
            here = [m for f in fields for m in _models(f.annotation)]
    return out


def parse(model: type[M], argv: Sequence[str] | None = None, **defaults: Any) -> M:
    """A job's settings from its `key=value` words over `defaults`; prints the fields and exits on `--help`.

    Exits with status 2 and a line a mistake on standard error: people run jobs, and a traceback hides the answer.
    """
    argv = sys.argv[1:] if argv is None else argv
    if "--help" in argv or "-h" in argv:
        print(describe(model))
        raise SystemExit(0)
    try:
        data = dict(defaults)
        for key, value in words(argv).items():
            data = override(data, key, value)
        return validate(model, data)
    except ConfigError as error:
        print(error, file=sys.stderr)
        raise SystemExit(2) from None


@contextlib.contextmanager
def plain_errors(*others: type[Exception]) -> Iterator[None]:
    """Mistakes that a person can mend, printed as they are, and exit status 2; anything else keeps its traceback.

    Those are ValueError, FileNotFoundError and FloatingPointError, and `others`.
    """
    try:
        yield
    except (ValueError, FileNotFoundError, FloatingPointError, *others) as error:
        print(error, file=sys.stderr)
        raise SystemExit(2) from None


def describe(model: type[BaseModel]) -> str:
    """What `--help` prints: the model's first line, then a line a field."""
    lines = [(model.__doc__ or model.__name__).strip(), "", "Arguments are key=value words:"]
    for name, field in model.model_fields.items():
        default = "required" if field.is_required() else f"default {field.get_default(call_default_factory=True)!r}"
        lines.append(f"  {name:14s} {field.description or ''} ({default})")
    return "\n".join(lines)
