"""The command line of a job: `key.sub=value` words, --help, and one way to report a mistake."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

from pydantic import BaseModel

from .reading import ConfigError, parse_yaml
from .settings import override_all, validate

M = TypeVar("M", bound=BaseModel)


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
                found[key] = parse_yaml(text, key)
            except ConfigError as error:
                wrong.append(str(error))
    if wrong:
        raise ConfigError("\n".join(wrong))
    return found


def parse(model: type[M], argv: Sequence[str] | None = None, **defaults: Any) -> M:
    """A job's settings from its `key=value` words over `defaults`; prints the fields and exits on `--help`.

    Exits with status 2 and a line a mistake on standard error: people run jobs, and a traceback hides the answer.
    """
    argv = sys.argv[1:] if argv is None else argv
    if "--help" in argv or "-h" in argv:
        print(describe(model))
        raise SystemExit(0)
    try:
        return validate(model, override_all(defaults, words(argv)))
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
