"""What people write, from files and command lines to validated settings; every mistake is said before anything runs.

A recipe is YAML; `key.sub=value` words override it (values are YAML too); a pydantic model validates the whole.
"""

from .command import describe, parse, plain_errors, words
from .reading import ConfigError, UserError, as_text, parse_json, read, read_json, read_json_lines
from .reading import parse_yaml as _yaml
from .settings import (
    ASSETS,
    Strict,
    differences,
    fingerprint,
    flatten,
    nearest,
    override,
    override_all,
    resolve,
    resolve_ref,
    validate,
)

__all__ = [
    "ASSETS",
    "ConfigError",
    "Strict",
    "UserError",
    "_yaml",
    "as_text",
    "describe",
    "differences",
    "fingerprint",
    "flatten",
    "nearest",
    "override",
    "override_all",
    "parse",
    "parse_json",
    "plain_errors",
    "read",
    "read_json",
    "read_json_lines",
    "resolve",
    "resolve_ref",
    "validate",
    "words",
]
