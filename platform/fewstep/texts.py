"""Texts: a value and an error as a person reads them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

HIDDEN = "***"
# user:password@ behind ://, up to the last @ of its part of the URL; a password that has / ? or # unescaped ends at the
# last @ of the word. In http(s) a user alone may be a token.
_WORD = r"\s'\"<>"
_PASSWORD = re.compile(rf"(://[^:@/?#{_WORD}]*):(?:[^/?#{_WORD}]*@|(?!\d+[/?#])[^{_WORD}]*@)")
_TOKEN = re.compile(rf"(?i)(https?://)[^:@/?#{_WORD}]+@")
_QUERY = re.compile(
    rf"(?i)([?&;#][\w.-]*(?:pass|pwd|secret|token|key|sig|cred|auth|odbc_connect)[\w.-]*)=[^&;#{_WORD}]+"
)


def masked(value: Any) -> Any:
    """A text, or the texts in mappings and lists, as it may be written down: secrets in URLs become ***.

    Those are passwords (user:password@host), users of http(s) URLs without a password, which may be tokens, and values
    of the query's password, token, key, signature and the like. masked(masked(x)) is masked(x).
    """
    if isinstance(value, str):
        if "://" not in value:
            return value
        value = _TOKEN.sub(rf"\1{HIDDEN}@", _PASSWORD.sub(rf"\1:{HIDDEN}@", value))
        return _QUERY.sub(rf"\1={HIDDEN}", value)
    if isinstance(value, Mapping):
        return {key: masked(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [masked(item) for item in value]
    return value


def has_masked(url: str | None) -> bool:
    """True if `masked` replaced a secret of the URL."""
    return url is not None and "://" in url and HIDDEN in url


def revealed(url: str | None, *known: str | None) -> str | None:
    """A masked URL with its secrets, where one of `known` stands for it or for its beginning; else as it is."""
    for full in known:
        if full and has_masked(url) and (url == masked(full) or url.startswith(masked(full).rstrip("/") + "/")):
            return full.rstrip("/") + url.removeprefix(masked(full).rstrip("/"))
    return url


def quoted(value: Any, chars: int = 60) -> str:
    """A value as an error quotes it, masked and cut to `chars`: its repr; null, true and false as in YAML and JSON."""
    value = masked(value)
    text = shown(value) if value is None or isinstance(value, bool) else repr(value)
    return text if len(text) <= chars else text[: chars - 3] + "..."


def shown(value: Any, digits: int = 6) -> str:
    """A value as tables, figures and messages show it: `digits` digits of a real number; null, true and false as in
    YAML. Settings have six digits, scores four, standard deviations two."""
    if value is None or isinstance(value, bool):
        return "null" if value is None else str(value).lower()
    return f"{value:.{digits}g}" if isinstance(value, float) else str(value)


def reason(error: BaseException) -> str:
    """Why something failed: the error's own text, masked, without the file's name of an OSError; else its class."""
    text = error.strerror if isinstance(error, OSError) and error.strerror else error
    return masked(str(text)) or type(error).__name__


def one_line(error: BaseException, chars: int = 300) -> str:
    """`str(error)` on one line, masked and cut to `chars`; the error's class where it has no text."""
    return masked(" ".join(str(error).split()))[:chars] or type(error).__name__


def first_line(error: BaseException) -> str:
    """An error's class and the first line of its text, masked."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {masked(lines[0].strip())}" if lines else type(error).__name__
