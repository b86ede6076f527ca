"""The order of images: a pure function of (seed, epoch), so one integer gives the position in training.

A *unit* is what is read at once: a row group of a shard. An epoch permutes the units, and the rows inside each unit, by
hashes of (seed, epoch); the concatenation is cut into `lanes`, contiguous spans of (almost) equal length, and the epoch
takes one row from each lane in turn:

    row k of the epoch  =  lane k mod L, offset k div L

so a batch mixes L units although each unit is read once, from its start to its end. Epochs follow one another without
a gap: position p, the images consumed by all ranks so far, is row p mod N of epoch p div N. Rank r of w takes the
positions p = start + r (mod w). Where w divides L each lane belongs to one rank for an epoch and only the units that a
lane's end cuts are read by two ranks; for any other w the batches are the same and a rank reads units of which it needs
a part.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import count
from math import gcd

import numpy as np

LANES = 16
_UNITS, _ROWS, _FLIPS = 1, 2, 3  # purpose of a hash: independent streams of one seed


def mix(*words: int | np.ndarray) -> np.ndarray:
    """A hash of integers, broadcast over arrays: uint64, uniform. The finaliser of SplitMix64 after each word.

    Written out because it must never change: NumPy keeps no promise about the stream of `Generator.permutation`.
    Source: Steele, Lea and Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014.
    """
    h = np.zeros(1, np.uint64)
    for word in words:
        h = (h ^ np.atleast_1d(np.asarray(word)).astype(np.uint64)) + np.uint64(0x9E3779B97F4A7C15)
        h = (h ^ (h >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        h = (h ^ (h >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        h = h ^ (h >> np.uint64(31))
    return h


@dataclass(frozen=True, eq=False)
class Piece:
    """The part of one unit that one rank needs in one lane of an epoch.

    rows: (n,) row numbers inside the unit, in the order in which they are needed.
    places: (n,) increasing; where they go in the rank's own stream, whose place 0 is its first image from the start.
    """

    epoch: int
    unit: int
    rows: np.ndarray
    places: np.ndarray


class Plan:
    """The row at each position.

    units: rows in each unit, in the order of the shards; row ids count through them, 0 <= id < rows.
    Raises ValueError when there are no rows.
    """

    def __init__(self, units: Sequence[int], seed: int = 0, lanes: int = LANES):
        self.units = np.asarray(units, np.int64)
        self.rows_total = int(self.units.sum())
        if self.rows_total < 1 or (self.units < 1).any():
            raise ValueError(f"units: every unit needs at least one row, got {self.units.tolist()}")
        self.seed = seed
        self.lanes = min(lanes, self.rows_total)
        self.first = np.concatenate([[0], np.cumsum(self.units)])  # row id of each unit's first row
        length, longer = divmod(self.rows_total, self.lanes)
        lane = np.arange(self.lanes + 1)
        self._lane_start = lane * length + np.minimum(lane, longer)
        self._epoch = lru_cache(maxsize=4)(self._epoch_units)
        self._inside = lru_cache(maxsize=max(8 * self.lanes, 256))(self._unit_rows)

    def _epoch_units(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The units in the order of an epoch, and where each starts in the concatenation (one more: the end)."""
        order = np.argsort(mix(self.seed, _UNITS, epoch, np.arange(len(self.units))), kind="stable")
        return order, np.concatenate([[0], np.cumsum(self.units[order])])

    def _unit_rows(self, epoch: int, unit: int) -> np.ndarray:
        """The rows of a unit in the order of an epoch."""
        return np.argsort(mix(self.seed, _ROWS, epoch, unit, np.arange(self.units[unit])), kind="stable")

    def epochs(self, positions: np.ndarray) -> np.ndarray:
        """The epoch of each position."""
        return np.asarray(positions) // self.rows_total

    def rows_at(self, positions: np.ndarray) -> np.ndarray:
        """Row ids (n,) at the positions (n,), in any order and over any epochs."""
        positions = np.asarray(positions, np.int64)
        ids = np.empty(len(positions), np.int64)
        epochs, k = np.divmod(positions, self.rows_total)
        place = self._lane_start[k % self.lanes] + k // self.lanes
        for epoch in np.unique(epochs).tolist():
            order, start = self._epoch(epoch)
            slot = np.searchsorted(start, place, side="right") - 1
            for s in np.unique(slot[epochs == epoch]).tolist():
                here = (epochs == epoch) & (slot == s)
                unit = int(order[s])
                ids[here] = self.first[unit] + self._inside(epoch, unit)[place[here] - start[s]]
        return ids

    def rows(self, position: int, count: int, rank: int = 0, world: int = 1) -> np.ndarray:
        """Rank's row ids among the `count` images from `position` on: (count / world,); world must divide count."""
        check(count, rank, world)
        return self.rows_at(np.arange(position + rank, position + count, world))

    def unit(self, row: int) -> tuple[int, int]:
        """The unit of a row id, and the row's number inside it."""
        unit = int(np.searchsorted(self.first, row, side="right")) - 1
        return unit, int(row - self.first[unit])

    def flips(self, epochs: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """True for rows that are mirrored in their epoch: bool (n,), a fair coin per (seed, epoch, row)."""
        return (mix(self.seed, _FLIPS, epochs, rows) >> np.uint64(63)).astype(bool)

    def units_from(self, epoch: int, unit: int) -> Iterator[int]:
        """The units in the order of an epoch from `unit` on, round to the one before it."""
        order, _ = self._epoch(epoch)
        yield from np.roll(order, -int(np.flatnonzero(order == unit)[0])).tolist()

    def stand_ins(self, epoch: int, row: int) -> Iterator[tuple[int, np.ndarray]]:
        """Row ids (n,) that replace a row which cannot be used, best first, unit by unit: (unit, ids).

        Those after it in its unit's order, round to the one before it; then, for each unit that follows in the epoch,
        the row of the same number modulo that unit's rows, and those after it. Every rank walks the same way.
        """
        unit, inside = self.unit(row)
        for other in self.units_from(epoch, unit):
            order = self._inside(epoch, other)
            here = int(np.flatnonzero(order == inside % self.units[other])[0])
            ids = self.first[other] + np.roll(order, -here)
            yield other, ids[1:] if other == unit else ids

    def pieces(self, position: int, rank: int = 0, world: int = 1) -> Iterator[Piece]:
        """The parts of units that a rank reads from `position` on, without end, in the order in which it needs them."""
        check(world, rank, world)
        start = position + rank
        # Along a lane positions grow by L: of its rows, every stride-th is this rank's, or none is.
        stride = world // gcd(world, self.lanes)
        for epoch in count(position // self.rows_total):
            order, unit_start = self._epoch(epoch)
            cuts = np.union1d(unit_start, self._lane_start)
            begin, length = cuts[:-1], np.diff(cuts)
            lane = np.searchsorted(self._lane_start, begin, side="right") - 1
            slot = np.searchsorted(unit_start, begin, side="right") - 1
            p = epoch * self.rows_total + (begin - self._lane_start[lane]) * self.lanes + lane  # of each first row
            steps = np.maximum(-((p - start) // self.lanes), 0)  # rows that lie before the start
            mine = (p[:, None] + self.lanes * (steps[:, None] + np.arange(stride)) - start) % world == 0
            skip = steps + mine.argmax(1)
            used = np.flatnonzero(mine.any(1) & (skip < length))
            for s in used[np.argsort((p + self.lanes * skip)[used])].tolist():
                j = np.arange(skip[s], length[s], stride)
                unit = int(order[slot[s]])
                rows = self._inside(epoch, unit)[begin[s] - unit_start[slot[s]] + j]
                yield Piece(epoch, unit, rows, (p[s] + self.lanes * j - start) // world)


def check(batch: int, rank: int, world: int) -> None:
    """Raises ValueError when a global batch cannot be shared equally, or the rank does not exist."""
    if world < 1 or not 0 <= rank < world:
        raise ValueError(f"rank: {rank} of a world of {world}; ranks are 0..{max(world - 1, 0)}")
    if batch < 1 or batch % world:
        raise ValueError(f"batch: {batch} images cannot be shared equally by {world} ranks; use a multiple of {world}")
