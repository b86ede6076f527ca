"""The keys of settings models, with type, default, range and meaning: what --help prints and docs/keys.md shows."""

from __future__ import annotations

import json
import re
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel

from .reading import ConfigError, parse_yaml
from .settings import INT_MAX, INT_MIN, nearest

WIDTH = 100
GROUP = "keys below"
PLAIN = re.compile(r"[\w./-][\w./:-]*")  # text that needs no quotes, unless YAML takes it for something else
KINDS = {"integer": "whole number", "number": "number", "string": "text", "boolean": "true or false", "null": "null"}


@dataclass(frozen=True)
class Key:
    """One key of a model. `*` in its name stands for any name, such as a role's.

    default: spelt as in YAML; None where the key is required. choice: what makes the key valid, such as
    method.name=dmd2; the first key of a choice has that name and the choice's meaning.
    """

    name: str
    type: str
    default: str | None
    meaning: str
    choice: str = ""

    @property
    def group(self) -> bool:
        """True if there are keys below this one."""
        return self.type.startswith(GROUP)

    @property
    def value(self) -> str:
        """Type, range and default, as text."""
        if self.group and self.default not in ("null", "{}"):
            return self.type
        return f"{self.type}; {'required' if self.default is None else f'default {self.default}'}"


def names(model: type[BaseModel]) -> dict[str, Any]:
    """A model's own keys, as the user writes them, and their Python types."""
    return {field.alias or name: field.annotation for name, field in model.model_fields.items()}


def keys(model: type[BaseModel]) -> list[Key]:
    """Every key of a model, a group before the keys in it."""
    schema = model.model_json_schema()
    return list(_keys_below(schema, schema.get("$defs", {}), "", ""))


def _keys_below(node: Mapping[str, Any], defs: Mapping[str, Any], prefix: str, choice: str) -> Iterator[Key]:
    for name, field in node["properties"].items():
        if choice != f"{prefix}{name}={field.get('const')}":
            yield from _key(field, defs, prefix + name, name in node.get("required", ()), choice)


def _key(field: Mapping[str, Any], defs: Mapping[str, Any], name: str, required: bool, choice: str) -> Iterator[Key]:
    shapes = [_dereferenced(shape, defs) for shape in field.get("anyOf", field.get("oneOf", [field]))]
    kind = " or ".join(dict.fromkeys(_type(shape, defs) for shape in shapes))
    meaning = _summary(field) or _summary(_dereferenced(field, defs))
    yield Key(name, kind, None if required else _yaml_text(field.get("default")), meaning, choice)
    tag = field.get("discriminator", {}).get("propertyName")
    for group in shapes:
        if "properties" in group and tag is None:
            yield from _keys_below(group, defs, f"{name}.", choice)
        elif "properties" in group:
            chosen = f"{name}.{tag}={group['properties'][tag]['const']}"
            yield Key(chosen, GROUP, None, _summary(group), chosen)
            yield from _keys_below(group, defs, f"{name}.", chosen)
        elif isinstance(inner := group.get("additionalProperties"), Mapping):
            yield from _key(inner, defs, f"{name}.*", True, choice)


def _dereferenced(shape: Mapping[str, Any], defs: Mapping[str, Any]) -> Mapping[str, Any]:
    return defs[shape["$ref"].rsplit("/", 1)[1]] if "$ref" in shape else shape


def _summary(shape: Mapping[str, Any]) -> str:
    """The description's first paragraph, on one line."""
    return " ".join(shape.get("description", "").split("\n\n")[0].split())


def _type(shape: Mapping[str, Any], defs: Mapping[str, Any]) -> str:
    """A JSON schema's type and range, as text."""
    shape = _dereferenced(shape, defs)
    if "anyOf" in shape:
        return " or ".join(_type(part, defs) for part in shape["anyOf"])
    if "enum" in shape or "const" in shape:
        return " | ".join(_yaml_text(value) for value in shape.get("enum", [shape.get("const")]))
    kind = shape.get("type", "")
    if kind == "array":
        items = [_type(item, defs) for item in shape.get("prefixItems", [shape.get("items", {})])]
        length = f" of {len(items)}" if "prefixItems" in shape else ""
        return f"list{length} ({'each ' + items[0] if len(set(items)) == 1 else ', '.join(items)})"
    if kind == "object":
        return GROUP
    limits = {"minimum": "at least", "exclusiveMinimum": "above", "maximum": "at most", "exclusiveMaximum": "below"}
    limits |= {"pattern": "of the form"}
    bounds = [
        f"{phrase} {shape[key]}" for key, phrase in limits.items() if shape.get(key) not in (None, INT_MIN, INT_MAX)
    ]
    return " ".join([KINDS.get(kind, "any value"), " and ".join(bounds)]).strip()


def _yaml_text(value: Any) -> str:
    """A value as one writes it in YAML."""
    if isinstance(value, str):
        return value if PLAIN.fullmatch(value) and parse_yaml(value, "") == value else json.dumps(value)
    if isinstance(value, list):
        return f"[{', '.join(map(_yaml_text, value))}]"
    return json.dumps(value)


# A terminal


def help_text(doc: str, models: Sequence[type[BaseModel]], prefixes: Sequence[str] = ()) -> str:
    """The text of --help: all keys of the models, of which the first is the job's own; or those below the prefixes.

    Raises ConfigError for a prefix that no key has.
    """
    own = keys(models[0])
    others = [key for model in models[1:] for key in keys(model) if key.name not in {key.name for key in own}]
    if prefixes:
        return "\n".join(_lines(key for prefix in prefixes for key in _with_prefix([*own, *others], prefix)))
    lines = [doc, "", "Arguments have the form key=value; values are YAML:", "", *_lines(own)]
    if others:
        lines += ["", "All other arguments are keys of the recipe. --help KEY prints those below KEY alone:", ""]
    return "\n".join([*lines, *_lines(others)])


def _with_prefix(all_keys: Sequence[Key], prefix: str) -> list[Key]:
    parts = prefix.split(".")
    matches = [key for key in all_keys if _matches(key.name.split("."), parts) or key.choice == prefix]
    if not matches:
        known = sorted({key.name for key in all_keys})
        raise ConfigError(f"--help {prefix}: no such key; {nearest(prefix, known)}")
    return matches


def _matches(key: Sequence[str], prefix: Sequence[str]) -> bool:
    return len(key) >= len(prefix) and all(a in (b, "*") for a, b in zip(key, prefix, strict=False))


def _lines(all_keys: Iterable[Key]) -> Iterator[str]:
    choice = ""
    for key in all_keys:
        if key.choice not in ("", choice, key.name):
            yield f"with {key.choice}:"
        choice = key.choice
        yield f"with {key.choice}:" if key.name == choice != "" else f"{key.name}: {key.value}"
        if key.meaning:
            yield textwrap.fill(key.meaning, WIDTH, initial_indent="    ", subsequent_indent="    ")


# A page

HEAD = """# Keys

All keys of the recipes and of the jobs. The page is made from the settings models by `make docs`; do not edit it.
`python jobs/JOB.py --help` prints the same, and `--help method` the keys below `method`. Values are YAML 1.2:
`1e-4` is a number, `010` and `yes` are text, and `name='"2026"'` is text on a command line. `*` stands for any name,
such as a role's."""


def page(jobs: Mapping[str, Sequence[type[BaseModel]]], recipe: type[BaseModel]) -> str:
    """A Markdown page of all keys: the recipe's, then each job's own. jobs: the models of each, its own first."""
    parts = [HEAD, "## Recipes", *_sections(keys(recipe))]
    for file, (own, *others) in jobs.items():
        parts += [f"## {file}", " ".join((own.__doc__ or "").split()), _table(keys(own))]
        parts += ["All other arguments are keys of the recipe."] if others else []
    return "\n\n".join(parts) + "\n"


def _sections(all_keys: Sequence[Key]) -> Iterator[str]:
    """A table of the keys without a dot, and one of each group and of each choice."""
    sections: dict[str, list[Key]] = {"": []}
    for key in all_keys:
        head, dot, _ = key.name.partition(".")
        sections.setdefault(key.choice or (head if dot or key.group else ""), []).append(key)
    for name, (first, *rest) in sections.items():
        yield from [f"### {name}", first.meaning] if name else []
        yield _table(rest if name else [first, *rest])


def _table(all_keys: Sequence[Key]) -> str:
    cells = [(f"`{key.name}`", key.type, _default(key), key.meaning) for key in all_keys]
    rows = [[cell.replace("|", "\\|") for cell in row] for row in cells]
    return "\n".join(f"| {' | '.join(row)} |" for row in [("key", "type", "default", "meaning"), ["---"] * 4, *rows])


def _default(key: Key) -> str:
    if key.group and key.default not in ("null", "{}"):
        return ""
    return "required" if key.default is None else f"`{key.default}`"
