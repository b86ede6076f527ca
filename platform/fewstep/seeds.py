"""Seeds: runs that differ by the seed only, and the mean and spread of their scores."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from .texts import shown

T = TypeVar("T")


def grouped(items: Iterable[T], settings: Callable[[T], Mapping[str, Any]]) -> list[list[T]]:
    """Groups items whose settings are equal, in the order in which the settings first appear."""
    groups: dict[str, list[T]] = {}
    for item in items:
        groups.setdefault(json.dumps(settings(item), sort_keys=True), []).append(item)
    return list(groups.values())


@dataclass(frozen=True)
class Spread:
    """Mean and sample standard deviation (n - 1) of a score over seeds; std is None for one seed."""

    mean: float
    std: float | None
    seeds: int

    @classmethod
    def over(cls, values: Iterable[tuple[Hashable, float]]) -> Spread:
        """Returns the spread of (seed, score) pairs; scores of one seed count once, by their mean.

        A score that is not finite makes the mean not finite and std None.
        """
        by_seed: dict[Hashable, list[float]] = {}
        for seed, value in values:
            by_seed.setdefault(seed, []).append(value)
        means = [statistics.fmean(same) for same in by_seed.values()]
        if not all(map(math.isfinite, means)):
            return cls(math.nan, None, len(means))
        return cls(statistics.fmean(means), statistics.stdev(means) if len(means) > 1 else None, len(means))

    def near(self, other: Spread) -> bool:
        """True if the means differ by no more than the larger of the two standard deviations."""
        return abs(self.mean - other.mean) <= max(self.std or 0.0, other.std or 0.0)

    def __str__(self) -> str:
        return shown(self.mean, 4) + ("" if self.std is None else f" ± {shown(self.std, 2)}")
