"""Counts and times of a server's answers, for its gauges."""

from __future__ import annotations

import math
import time
from collections import Counter, deque

WINDOW_S = 60.0
QUANTILES = (0.5, 0.95, 0.99)


class Meter:
    """The answers of one process: their number by HTTP status, their images, and the times of the last minute."""

    def __init__(self) -> None:
        self.requests: Counter[int] = Counter({200: 0, 429: 0, 504: 0})
        self.images = 0
        self._times: deque[tuple[float, float]] = deque(maxlen=10_000)

    def count(self, status: int) -> None:
        """Counts an answer to a request for images."""
        self.requests[status] += 1

    def record_answer(self, seconds: float, images: int) -> None:
        """Notes the time from a request to its images."""
        self.images += images
        self._times.append((time.monotonic(), seconds))

    def quantiles(self) -> dict[float, float]:
        """Seconds by quantile (nearest rank) over the last minute; {} without an answer in it."""
        since = time.monotonic() - WINDOW_S
        ordered = sorted(seconds for at, seconds in list(self._times) if at >= since)  # another thread adds to them
        return {q: quantile(ordered, q) for q in QUANTILES} if ordered else {}


def quantile(ordered: list[float], q: float) -> float:
    """The smallest value of a sorted list that at least the share `q` of it does not exceed; q in (0, 1]."""
    return ordered[math.ceil(q * len(ordered)) - 1]
