"""Checks: what was looked at, whether it is in order, and what to do. Parts make them with `check(recipe)`.

A part's `check(recipe)` looks at what a run of the recipe needs of it on this machine, trains and downloads nothing,
and raises nothing that a user can mend. The doctor runs it on every node.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from .texts import one_line

Status = Literal["ok", "warning", "broken"]
LOCK = "install the same requirements.lock on every node: pip install -r requirements.lock"


@dataclass(frozen=True)
class Check:
    """One line of the doctor's table. `remedy` is what to do; empty where nothing is to be done."""

    check: str
    status: Status
    result: str
    remedy: str = ""


def tried(name: str, look: Callable[[], str], remedy: str) -> Check:
    """A check that is in order with the text that `look` returns, and broken where it raises.

    Any exception is a finding: libraries of storage and of networks have errors of their own.
    """
    try:
        return Check(name, "ok", look())
    except Exception as error:
        return Check(name, "broken", one_line(error), remedy)
