"""Texts: a value and an error as a person reads them."""

from __future__ import annotations

from typing import Any


def quoted(value: Any, chars: int = 60) -> str:
    """A value as an error quotes it, cut to `chars`: its repr; null, true and false are spelt as in YAML and JSON."""
    text = str(value).lower() if isinstance(value, bool) else "null" if value is None else repr(value)
    return text if len(text) <= chars else text[: chars - 3] + "..."


def shown(value: Any) -> str:
    """A setting's value as tables and figures show it: six digits of a real number, and anything else as it is."""
    return f"{value:g}" if isinstance(value, float) else str(value)


def reason(error: BaseException) -> str:
    """Why something failed: the error's own text, without the file's name of an OSError; its class without a text."""
    text = error.strerror if isinstance(error, OSError) and error.strerror else error
    return str(text) or type(error).__name__


def one_line(error: BaseException, chars: int = 300) -> str:
    """`str(error)` on one line, cut to `chars`; the error's class where it has no text."""
    return " ".join(str(error).split())[:chars] or type(error).__name__
