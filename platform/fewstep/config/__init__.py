"""Settings from files and command lines, validated; every mistake is reported before anything runs.

A recipe is YAML; `key.sub=value` arguments override it (values are YAML too); a pydantic model validates the whole.
"""

from .command import Command, command, parse_arguments, plain_errors
from .keys import page
from .paths import (
    ASSETS,
    LocalPath,
    OutPath,
    OutPathOrURL,
    PathOrURL,
    checked,
    home,
    resolve,
    resolve_out,
    resolve_out_ref,
    resolve_ref,
)
from .reading import ConfigError, UserError, as_text, parse_json, read, read_json, read_json_lines, to_yaml
from .reading import parse_yaml as _yaml
from .settings import (
    Strict,
    differences,
    fingerprint,
    flatten,
    nearest,
    new_name,
    not_found,
    override,
    override_all,
    renamed,
    validate,
    with_new_names,
)

__all__ = [
    "ASSETS",
    "Command",
    "ConfigError",
    "LocalPath",
    "OutPath",
    "OutPathOrURL",
    "PathOrURL",
    "Strict",
    "UserError",
    "_yaml",
    "as_text",
    "checked",
    "command",
    "differences",
    "fingerprint",
    "flatten",
    "home",
    "nearest",
    "new_name",
    "not_found",
    "override",
    "override_all",
    "page",
    "parse_arguments",
    "parse_json",
    "plain_errors",
    "read",
    "read_json",
    "read_json_lines",
    "renamed",
    "resolve",
    "resolve_out",
    "resolve_out_ref",
    "resolve_ref",
    "to_yaml",
    "validate",
    "with_new_names",
]
