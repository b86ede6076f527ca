"""Recipe files and dotted overrides, checked before anything runs.

A recipe is YAML; `key.sub=value` words override it (values are YAML too); a pydantic model validates the whole and every
mistake is reported at once with its dotted key, the value, and the nearest valid name.
"""

from __future__ import annotations

import difflib
import re
import sys
from collections.abc import Sequence
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

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class _Loader(yaml.SafeLoader):
    """YAML as people write numbers: 1e-4 is a float (YAML 1.1 would read a string)."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d[\d_]*\.?[\d_]*|\.\d+)[eE][-+]?\d+$"),
    list("-+0123456789."),
)


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


def read(path: str | Path) -> dict[str, Any]:
    """A YAML file as a nested dict. Raises ConfigError naming the file when it is missing or is not a mapping."""
    path = Path(path)
    if not path.is_file():
        raise ConfigError(f"{path}: no such file")
    data = _yaml(path.read_text(), str(path))
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: expected `key: value` lines, found {type(data).__name__}")
    return data


def override(data: dict[str, Any], dotted: str, value: Any) -> dict[str, Any]:
    """A copy of `data` with the dotted key set; mappings on the way are made or copied, never shared."""
    head, _, rest = dotted.partition(".")
    inner = data.get(head)
    if rest:
        if inner is not None and not isinstance(inner, dict):
            raise ConfigError(f"{dotted}: {head} is {inner!r}, which has no fields to set")
        value = override(inner or {}, rest, value)
    return {**data, head: value}


def words(argv: Sequence[str]) -> dict[str, Any]:
    """`key.sub=value` words as {dotted key: value}. Raises ConfigError for a word of another form or given twice."""
    found: dict[str, Any] = {}
    for word in argv:
        key, equals, text = word.partition("=")
        if not equals or not key:
            raise ConfigError(f"{word!r}: arguments have the form key=value, such as seed=1")
        if key in found:
            raise ConfigError(f"{key}: given twice")
        found[key] = _yaml(text, key)
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


def _line(model: type[BaseModel], e: Any) -> str:
    location = [part for part in e["loc"] if not (isinstance(part, str) and part.startswith("function-"))]
    visible = _visible(model, location)
    dotted = ".".join(map(str, visible)) or "recipe"
    if e["type"] == "extra_forbidden":
        return f"{dotted}: no such key; {nearest(visible[-1], _fields_at(model, location[:-1]))}"
    if e["type"] == "missing":
        return f"{dotted}: missing, and it has no default"
    message = e["msg"].removeprefix("Value error, ").removeprefix("Assertion failed, ")
    if e["type"] == "value_error" and message.startswith(dotted):
        return message
    return f"{dotted}: {message[0].lower() + message[1:]}" + (
        f" (got {e['input']!r})" if not isinstance(e["input"], dict) else ""
    )


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

    Exits with status 2 and one line a mistake on standard error: a job is run by people, and a traceback hides the answer.
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


def describe(model: type[BaseModel]) -> str:
    """What `--help` prints: the model's first line, then a line a field."""
    lines = [(model.__doc__ or model.__name__).strip(), "", "Arguments are key=value words:"]
    for name, field in model.model_fields.items():
        default = "required" if field.is_required() else f"default {field.default!r}"
        lines.append(f"  {name:14s} {field.description or ''} ({default})")
    return "\n".join(lines)
