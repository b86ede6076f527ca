"""Settings models, and data checked against them: every mistake at once, each with its key, value and nearest name."""

from __future__ import annotations

import difflib
import hashlib
import json
import logging
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, GetCoreSchemaHandler, ValidationError
from pydantic_core import CoreSchema, PydanticKnownError, core_schema

from ..texts import quoted
from .reading import DEPTH, ConfigError

MISTAKES = 20  # that one error lists; more are counted
INT_MIN, INT_MAX = -(2**63), 2**63 - 1
M = TypeVar("M", bound=BaseModel)
log = logging.getLogger("fewstep")

# Recipe keys of the last release that have another name now: dotted old name -> dotted new name, where * stands for any
# name, as in "optim.*.rate": "optim.*.lr". An entry is removed one release after the renaming.
RENAMED: dict[str, str] = {}


def _plain_numbers(schema: Any, model: type[BaseModel]) -> Any:
    """A model's pydantic schema in which numbers are finite and take no true or false, and whole ones have 64 bits."""
    if isinstance(schema, list):
        return [_plain_numbers(part, model) for part in schema]
    if not isinstance(schema, dict) or schema.get("cls", model) is not model:  # a model inside has been here by itself
        return schema
    kind = schema.get("type")
    if kind not in ("int", "float", "any"):
        return {key: _plain_numbers(part, model) for key, part in schema.items()}
    if kind == "int":
        schema = {"ge": INT_MIN} | ({} if "lt" in schema else {"le": INT_MAX}) | schema

    def check(value: Any) -> Any:
        if kind != "any" and isinstance(value, bool):
            raise PydanticKnownError(f"{kind}_type")
        if kind == "any" and not _all_finite(value):  # JSON has no other numbers, and they would be written as null
            raise PydanticKnownError("finite_number")
        return value

    return core_schema.no_info_before_validator_function(check, schema)


def _all_finite(value: Any) -> bool:
    """True where all numbers in a value, however deep, are finite."""
    if isinstance(value, (Mapping, list, tuple)):
        return all(map(_all_finite, value.values() if isinstance(value, Mapping) else value))
    return not isinstance(value, float) or math.isfinite(value)


class Strict(BaseModel):
    """Base of every settings model: frozen, and a key it does not know is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return _plain_numbers(handler(source), cls)


def flatten(nested: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings as {dotted key: value}; an empty mapping is a value."""
    out: dict[str, Any] = {}
    for key, value in nested.items():
        below = isinstance(value, Mapping) and value
        out |= flatten(value, f"{prefix}{key}.") if below else {f"{prefix}{key}": value}
    return out


def fingerprint(recipe: Mapping[str, Any]) -> str:
    """Sixteen letters that stand for what decides a run's numbers."""
    return hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()[:16]


def differences(old: Mapping[str, Any], new: Mapping[str, Any], allow: Iterable[str] = ()) -> list[str]:
    """The settings in which two recipes differ, as "train.batch: 32 -> 64".

    allow: dotted keys that may differ, with all below them.
    """
    old = {new_name(key): value for key, value in flatten(old).items()}
    a, b = ({key: json.dumps(value) for key, value in recipe.items()} for recipe in (old, flatten(new)))
    allow = tuple(map(new_name, allow))
    changed = [key for key in sorted(a.keys() | b.keys()) if a.get(key) != b.get(key)]
    changed = [key for key in changed if not any(key == name or key.startswith(f"{name}.") for name in allow)]
    return [f"{key}: {a.get(key, 'not there')} -> {b.get(key, 'not there')}" for key in changed]


def new_name(key: str) -> str:
    """The name that a dotted recipe key has now; RENAMED says which keys had another one in the last release."""
    parts = key.split(".")
    for old, new in RENAMED.items():
        pattern = old.split(".")
        if len(parts) >= len(pattern) and all(p in (part, "*") for p, part in zip(pattern, parts, strict=False)):
            names = iter([part for p, part in zip(pattern, parts, strict=False) if p == "*"])
            start = [next(names) if p == "*" else p for p in new.split(".")]
            return ".".join([*start, *parts[len(pattern) :]])
    return key


def renamed(data: Mapping[str, Any]) -> dict[str, Any]:
    """Dotted recipe keys with the names that they have now; each one that was renamed is logged as a warning.

    Raises ConfigError for a key that is given by both names.
    """
    out: dict[str, Any] = {}
    for key, value in data.items():
        new = new_name(key)
        if new != key:
            if new in data:
                raise ConfigError(f"{key}: is now called {new}, which is given too; leave {key} out")
            log.warning("%s: is now called %s; the old name works until the next release", key, new)
        out[new] = value
    return out


def with_new_names(data: dict[str, Any]) -> dict[str, Any]:
    """Nested recipe data with the names that its keys have now, see `renamed`."""
    flat = flatten(data)
    return data if all(new_name(key) == key for key in flat) else override_all({}, renamed(flat))


def override(data: dict[str, Any], dotted: str, value: Any) -> dict[str, Any]:
    """A copy of `data` with the dotted key set; mappings on the way are made or copied, never shared.

    Raises ConfigError where a value on the way is no mapping, or for a key of too many parts.
    """
    keys = dotted.split(".")
    if len(keys) > DEPTH:
        raise ConfigError(f"{quoted(dotted)}: a key of {len(keys)} parts, and no setting has as many")
    return _override(data, keys, value, dotted)


def override_all(data: dict[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of `data` with all dotted keys set, those of fewer parts first: `a.b` changes an `a` that is given too."""
    for key, value in sorted(values.items(), key=lambda item: item[0].count(".")):
        data = override(data, key, value)
    return data


def _override(data: dict[str, Any], keys: list[str], value: Any, dotted: str) -> dict[str, Any]:
    head, *rest = keys
    if rest:
        inner = data.get(head)
        if inner is not None and not isinstance(inner, dict):
            above = dotted.removesuffix("." + ".".join(rest))
            raise ConfigError(f"{dotted}: {above} is {quoted(inner)}, which has no fields to set")
        value = _override(inner or {}, rest, value, dotted)
    return {**data, head: value}


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


def not_found(what: str, ref: str, names: Sequence[str], suffix: str) -> ConfigError:
    """The error for a name that is none of `names`, where the path of a file would do too."""
    close = difflib.get_close_matches(ref, list(names), n=1, cutoff=0.6)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return ConfigError(f"{what}: no {what} {quoted(ref)}; {hint}there are {', '.join(names)}, or give a {suffix} file")


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
        mistakes = error.errors(include_url=False)
        lines = list(dict.fromkeys(_line(model, data, e) for e in mistakes[:MISTAKES]))
        more = [f"and {len(mistakes) - MISTAKES} more mistakes"] if len(mistakes) > MISTAKES else []
        raise ConfigError("\n".join(lines + more)) from None


# What pydantic calls a mistake: how we say it. {got} is the value, other names are pydantic's context.
TEXTS = {
    "int_type": "expected a whole number, got {got}",
    "int_parsing": "expected a whole number, got {got}",
    "int_parsing_size": "expected a whole number of 64 bits, got {got}",
    "int_from_float": "expected a whole number, got {got}",
    "float_type": "expected a number, got {got}",
    "float_parsing": "expected a number, got {got}",
    "finite_number": "expected a finite number, got {got}",
    "bool_type": "expected true or false, got {got}",
    "bool_parsing": "expected true or false, got {got}",
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


def _line(model: type[BaseModel], data: Any, e: Any) -> str:
    """One mistake in the data as a line: its dotted key, the value, the way out."""
    location = [part for part in e["loc"] if not (isinstance(part, str) and part.startswith("function-"))]
    visible = _user_location(data, location, e["type"] == "missing")
    dotted, context, got = ".".join(map(str, visible)), e.get("ctx", {}), quoted(e["input"])
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
        return f"{dotted}{'.name' if tagged else ''}: {quoted(value)} is not one of {', '.join(valid)}{hint}"
    if e["type"] == "string_type":
        return f"{dotted}: expected text, got {got}{_as_text(visible, e['input'])}"
    if e["type"] in TEXTS:
        return f"{dotted}: " + TEXTS[e["type"]].format(**{**context, "got": got, "dotted": dotted})
    message = e["msg"].removeprefix("Value error, ").removeprefix("Assertion failed, ")
    if not dotted or message.startswith(dotted):
        return message  # a check of several fields names them itself
    return f"{dotted}: {message[0].lower() + message[1:]}, got {got}"


def _as_text(location: Sequence[Any], value: Any) -> str:
    """The end of an error text: the spelling of a number, or of true or false, that is meant as text."""
    if not isinstance(value, (int, float)):
        return ""
    text = "..." if isinstance(value, float) else quoted(value)  # 1e5 and 100000.0 are one number, and two texts
    word = f", {'.'.join(location)}='\"{text}\"' on a command line" if all(isinstance(p, str) for p in location) else ""
    return f'; as text it has quotes: "{text}" in a file{word}'


def _tags(model: type[BaseModel], location: Sequence[Any]) -> list[str]:
    """The names that a tagged union at `location` knows."""
    here = [model]
    for part in location:
        fields = [m.model_fields[part] for m in here if part in m.model_fields]
        here = [m for field in fields for m in _models(field.annotation)]
    return sorted(m.tag for m in here if hasattr(m, "tag"))


def _user_location(data: Any, location: Sequence[Any], missing: bool) -> list[Any]:
    """The location as the user wrote it: without the labels that pydantic adds for the members of a union.

    missing: the last part is a key that the data lacks; all other parts are keys or indices in the data, or labels.
    """
    out: list[Any] = []
    for i, part in enumerate(location):
        if isinstance(data, Mapping) and part in data:
            data = data[part]
        elif isinstance(data, (list, tuple)) and isinstance(part, int):
            data = data[part] if part < len(data) else None
        elif not missing or i < len(location) - 1:
            continue
        out.append(part)
    return out
