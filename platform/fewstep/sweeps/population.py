"""Changes that a population of trials makes to its settings while it trains (population based training)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .space import Choice, Dice, Space


def mutation(space: Space, key: str, seed: int) -> list[Any] | Callable[[], Any]:
    """Change of a key in a population: along a list, or by a factor and now and then by a new draw."""
    domain = space.domains[key]
    if isinstance(domain, Choice):
        return list(domain.values)
    dice = Dice(seed, *key.encode())
    return lambda: domain.draw(key, dice)


def bounded(space: Space, values: dict[str, Any]) -> dict[str, Any]:
    """Values that a population changed, back between their bounds."""
    out = dict(values)
    for key, value in values.items():
        if not isinstance(space.domains[key], Choice):
            low, high = space.domains[key].edges()
            out[key] = min(max(float(f"{value:.4g}"), low), high)
    return out
