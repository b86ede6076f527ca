"""Changes that a population of trials makes to its settings while it trains (population based training)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .space import Choice, Dice, Space


def mutation(space: Space, key: str, seed: int) -> list[Any] | Callable[[], Any]:
    """Returns how a key changes in a population, as Ray's scheduler takes it: a list of values to step along, or a
    function that draws a new value."""
    domain = space.domains[key]
    if isinstance(domain, Choice):
        return list(domain.values)
    dice = Dice(seed, *key.encode())
    return lambda: domain.draw(key, dice)


def bounded(space: Space, values: dict[str, Any]) -> dict[str, Any]:
    """Returns the values that a population changed, clamped to the bounds of the space."""
    out = dict(values)
    for key, value in values.items():
        if not isinstance(space.domains[key], Choice):
            low, high = space.domains[key].edges()
            out[key] = min(max(float(f"{value:.4g}"), low), high)
    return out
