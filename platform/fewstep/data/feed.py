"""Batches for training: shards read in the order of the plan, decoded, and scaled to [-1, 1].

    feed = open_feed("shards", seed=0)
    for rows in feed.batches(position, batch=256, rank=0, world=1): rows["real"], rows["label"], ...

`position` is the number of images that all ranks together have consumed, the whole state of a feed: the stream from a
position is the same whether it was reached in one run or in ten, by one rank or by eight.

A row that cannot be used is replaced, never left out: a batch is full on every rank, so no rank waits for another's
rows. What replaces it is a function of the plan, the row, and which row groups can be read at that moment; no rank's
memory of earlier failures enters, so ranks, restarts and world sizes agree as soon as they see the same files. While
they do not (one rank had read a shard before it vanished) they differ in that row alone, which no other rank ever asks
about.
"""

from __future__ import annotations

import logging
import os
import threading
import weakref
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from queue import Empty, Full, Queue
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import torch

from fewstep.data.decode import CorruptImage, decode, decode_all
from fewstep.data.noise import noise
from fewstep.data.plan import Piece, Plan, check
from fewstep.data.shards import CorruptRows, ShardError, Shards, labels, latents, numbers, open_shards, refuse

log = logging.getLogger("fewstep.data")

MEMORY_BYTES = 512 << 20
Read = tuple[Piece, pa.Table | ShardError]  # the rows of a piece, or the error that it cannot be read
T = TypeVar("T")


class Rows(dict[str, Any]):
    """A batch's columns by name; a whole number gives the column at that place, as of a table: 0 are the images."""

    def __missing__(self, key: Any) -> Any:
        if isinstance(key, int):
            return list(self.values())[key]
        raise KeyError(key)


class Feed(ABC):
    """The batches of a set for training.

    seed: of the order. flip: mirror half of the images, chosen anew each epoch.
    captions: batches have a column "caption", too.
    max_corrupt: the part of the rows that may lack a usable image, on their own or because their shard was lost. They
        are named in `corrupt` and counted in `corrupt_rows`, each rank's by itself, and others take their place: the
        next good row of the row group in the order of the epoch; of a row group that is lost, the row of the same
        number (modulo its rows) of the next one that can be read.
    Raises CorruptRows where more rows than that are found, ValueError for a flip of latents or of pairs.
    """

    def __init__(
        self, shards: Shards, seed: int = 0, flip: bool = False, captions: bool = False, max_corrupt: float = 0.001
    ):
        if flip and shards.manifest.kind == "latent":
            raise ValueError("data.flip: a mirrored latent is not the latent of the mirrored image; use flip=false")
        if flip and shards.has_noise:
            raise ValueError("data.flip: a mirrored image is not what the teacher makes of its noise; use flip=false")
        if captions and not shards.manifest.captions:
            raise ValueError(f"data.captions: the rows of {str(shards.path)!r} have none; use captions=false")
        self.shards, self.flip, self.with_captions = shards, flip, captions
        self.plan = Plan([unit.rows for unit in shards.units], seed)
        self.rows, self.shape, self.classes = shards.rows, shards.size, shards.classes
        self.class_names = shards.manifest.class_names
        self.allowed = int(max_corrupt * shards.rows)
        self._corrupt: dict[int, str] = {}
        self._lost: dict[int, str] = {}  # units, and the shard's error
        self._warned: set[str] = set()
        self._live: weakref.WeakSet[Generator[Any, None, None]] = weakref.WeakSet()

    @property
    def corrupt(self) -> list[str]:
        """The corrupt rows so far by file and row, with the reason, and then the lost shards."""
        rows: dict[str, int] = {}
        for unit, reason in sorted(self._lost.items()):
            rows[reason] = rows.get(reason, 0) + self.shards.units[unit].rows
        return [self._corrupt[row] for row in sorted(self._corrupt)] + [f"{n} rows: {r}" for r, n in rows.items()]

    @property
    def corrupt_rows(self) -> int:
        """Number of corrupt rows so far, with those of lost shards."""
        return len(self._corrupt) + sum(self.shards.units[unit].rows for unit in list(self._lost))

    def batches(self, position: int, batch: int, rank: int = 0, world: int = 1) -> Iterator[dict[str, Any]]:
        """The rank's part of one global batch after another, from a position on, without end.

        batch: images of a global batch, a multiple of world.
        Yields rows by column: "real" float32 (batch / world, C, H, W), images in [-1, 1] or latents as stored; "label"
        int64 (batch / world,) of a set with classes; "caption", a list of texts, where asked for; and each further
        column of numbers under its name, float32 (batch / world, ...): of pairs, "noise" (batch / world, C, H, W).
        """
        check(batch, rank, world)
        if position < 0:
            raise ValueError(f"position: {position}; it counts images from 0")
        stream = self._batches(position, batch, rank, world)
        self._live.add(stream)
        return stream

    def close(self) -> None:
        """Closes all open batch streams and their threads."""
        for stream in list(self._live):
            stream.close()

    def __enter__(self) -> Feed:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @abstractmethod
    def _batches(self, position: int, batch: int, rank: int, world: int) -> Generator[dict[str, Any], None, None]: ...

    def _count_row(self, row: int, reason: str) -> None:
        """Counts a row as corrupt."""
        if row not in self._corrupt and self.plan.unit(row)[0] not in self._lost:
            self._corrupt[row] = f"{self.shards.name(*self.plan.unit(row))}: {reason}"
            self._check_limit()

    def _count_unit(self, unit: int, error: ShardError) -> None:
        """Counts the rows of a unit that cannot be read as corrupt, and those of its shard where all of it is lost."""
        if unit in self._lost:
            return
        self._lost |= {other: str(error) for other in self.shards.lost_with(unit) if other not in self._lost}
        for row in [row for row in self._corrupt if self.plan.unit(row)[0] in self._lost]:
            del self._corrupt[row]  # counted with its shard
        self._check_limit()
        self._warn(unit, f"{error}; other rows take the place of its own while max_corrupt allows it")

    def _warn(self, unit: int, text: str) -> None:
        """Logs a warning once per shard."""
        file = self.shards.units[unit].file
        if file not in self._warned:
            self._warned.add(file)
            log.warning(text)

    def _check_limit(self) -> None:
        if self.corrupt_rows > self.allowed:
            raise refuse(self.corrupt, self.allowed, str(self.shards.path), self.corrupt_rows)

    def _nothing_left(self) -> CorruptRows:
        where = f"{self.shards.path}: no row is left to take a corrupt one's place"
        return refuse(self.corrupt, self.allowed, where, self.corrupt_rows)

    def _columns(
        self,
        values: torch.Tensor,
        row_labels: np.ndarray,
        texts: list[str] | None,
        more: Mapping[str, torch.Tensor],
        epochs: np.ndarray,
        rows: np.ndarray,
    ) -> dict[str, Any]:
        """A batch as it is handed out; epochs and rows are those of the plan, whatever took a corrupt row's place.

        more: further columns of numbers.
        """
        images = values.float()
        if self.shards.manifest.kind == "image":
            images = images.div_(127.5).sub_(1)
        if self.flip:
            mirrored = torch.from_numpy(self.plan.flips(epochs, rows))
            images[mirrored] = images[mirrored].flip(-1)
        columns = Rows(real=images)
        if self.classes:
            columns["label"] = torch.from_numpy(np.array(row_labels, np.int64))
        if self.with_captions:
            columns["caption"] = texts
        columns |= {name: tensor.float() for name, tensor in more.items() if name != "noise"}
        if "noise" in more:
            columns["noise"] = noise(more["noise"][:, 0].numpy(), self.shape)
        return columns


class MemoryFeed(Feed):
    """A small set, decoded once: a batch is an index, and a step waits for nothing.

    tables: the units in order, where they come from elsewhere than the shards' files.
    """

    def __init__(self, shards: Shards, *args: Any, tables: Iterable[pa.Table] | None = None, **kwargs: Any):
        super().__init__(shards, *args, **kwargs)
        if tables is None:
            tables = (shards.read(unit) for unit in range(len(shards.units)))
        kind, threads = shards.manifest.kind, _threads()
        dtype = np.uint8 if kind == "image" else shards.manifest.encoding
        values = np.empty((self.rows, *self.shape), dtype)
        self._labels = np.empty(self.rows, np.int64)
        self._texts: list[str] = []
        self._more = {c.name: np.empty((self.rows, *c.shape), c.dtype) for c in shards.numbers}
        row = 0
        with ThreadPoolExecutor(threads) as pool:
            for table in tables:
                here = slice(row, row + table.num_rows)
                if kind == "latent":
                    values[here] = latents(table, self.shape)
                else:
                    values[here], bad = decode_all(table.column("image").to_pylist(), self.shape, pool, threads)
                    for i, reason in bad:
                        self._count_row(row + i, reason)
                self._labels[here] = labels(table)
                if self.with_captions:
                    self._texts += table.column("caption").to_pylist()
                for column in shards.numbers:
                    self._more[column.name][here] = numbers(table, column)
                row = here.stop
        if row != self.rows:
            raise ValueError(f"tables: {row} rows where the manifest of {str(shards.path)!r} says {self.rows}")
        self._values = torch.from_numpy(values)

    def _batches(self, position: int, batch: int, rank: int, world: int) -> Generator[dict[str, Any], None, None]:
        for start in count(position, batch):
            positions = np.arange(start + rank, start + batch, world)
            epochs, rows = self.plan.epochs(positions), self.plan.rows_at(positions)
            used = rows.copy()
            if self._corrupt:
                for i in np.flatnonzero(np.isin(rows, list(self._corrupt))):
                    used[i] = self._replacement_row(int(epochs[i]), int(rows[i]))
            texts = [self._texts[row] for row in used] if self.with_captions else None
            more = _tensors({name: values[used] for name, values in self._more.items()})
            yield self._columns(self._values[torch.from_numpy(used)], self._labels[used], texts, more, epochs, rows)

    def _replacement_row(self, epoch: int, row: int) -> int:
        for _, others in self.plan.stand_ins(epoch, row):
            for other in others.tolist():
                if other not in self._corrupt:
                    return other
        raise self._nothing_left()


class StreamFeed(Feed):
    """A set of any size: row groups are read, and images decoded, by threads that keep ahead of the step.

    In memory are the encoded row groups of the plan's lanes (16 of 8 MB) and the batches that wait for the step.
    threads: that decode; ahead_bytes: the most that ready batches hold (never fewer than two batches).
    """

    def __init__(
        self, shards: Shards, *args: Any, threads: int | None = None, ahead_bytes: int = 128 << 20, **kwargs: Any
    ):
        super().__init__(shards, *args, **kwargs)
        self.threads, self.ahead_bytes = threads or _threads(), ahead_bytes

    def _batches(self, position: int, batch: int, rank: int, world: int) -> Generator[dict[str, Any], None, None]:
        size = batch // world
        depth = min(max(self.ahead_bytes // (4 * size * int(np.prod(self.shape))), 2), 16)
        return ahead(self._decoded(position, size, rank, world), depth)

    def _tables(self, position: int, rank: int, world: int) -> Generator[Read, None, None]:
        """The plan's pieces with what was read; the next two are read while one is used."""
        pieces = self.plan.pieces(position, rank, world)
        waiting: deque[tuple[Piece, Any]] = deque()
        with ThreadPoolExecutor(1) as pool:
            for piece in pieces:
                waiting.append((piece, pool.submit(self.shards.read, piece.unit, piece.rows)))
                if len(waiting) > 2:
                    done, reading = waiting.popleft()
                    error = reading.exception()
                    yield done, error if isinstance(error, ShardError) else reading.result()

    def _usable_pieces(self, read: Iterable[Read]) -> Iterator[tuple[Piece, pa.Table]]:
        """The pieces with rows that can be used, the id of each in a column `row`."""
        for piece, table in read:
            unit, rows = piece.unit, piece.rows
            if isinstance(table, ShardError):
                unit, rows, table = self._replacement_piece(piece, table)
            yield piece, table.append_column("row", pa.array(self.plan.first[unit] + rows))

    def _replacement_piece(self, piece: Piece, error: ShardError) -> tuple[int, np.ndarray, pa.Table]:
        """Unit, row numbers and rows for a piece that could not be read: tried once more here, then another unit's."""
        for unit in self.plan.units_from(piece.epoch, piece.unit):
            rows = piece.rows % self.plan.units[unit]
            try:
                table = self.shards.read(unit, rows)
            except ShardError as another:
                self._count_unit(unit, another)
                continue
            if unit == piece.unit:
                self._warn(unit, f"{error}; it could be read when it was tried again")
            return unit, rows, table
        raise self._nothing_left()

    def _decoded(self, position: int, size: int, rank: int, world: int) -> Generator[dict[str, Any], None, None]:
        tables = self._tables(position, rank, world)
        with ThreadPoolExecutor(self.threads) as pool:
            try:
                for epochs, rows, table in assemble(self.plan, self._usable_pieces(tables), size):
                    yield self._decode(epochs, rows, table, pool)
            finally:
                tables.close()

    def _decode(self, epochs: np.ndarray, rows: np.ndarray, table: pa.Table, pool: ThreadPoolExecutor) -> Any:
        row_labels = labels(table)
        texts = table.column("caption").to_pylist() if self.with_captions else None
        more = {c.name: numbers(table, c).copy() for c in self.shards.numbers}
        if self.shards.manifest.kind == "latent":
            values = torch.from_numpy(latents(table, self.shape).copy())
            return self._columns(values, row_labels, texts, _tensors(more), epochs, rows)
        values, bad = decode_all(table.column("image").to_pylist(), self.shape, pool, self.threads)
        if bad:
            row_labels, used = row_labels.copy(), table.column("row").to_numpy()
        for i, reason in bad:
            self._count_row(int(used[i]), reason)
            values[i], other = self._replacement_row(int(epochs[i]), int(rows[i]))
            row_labels[i] = labels(other)[0]
            if texts is not None:
                texts[i] = other.column("caption")[0].as_py()
            for column in self.shards.numbers:
                more[column.name][i] = numbers(other, column)[0]
        return self._columns(torch.from_numpy(values), row_labels, texts, _tensors(more), epochs, rows)

    def _replacement_row(self, epoch: int, row: int) -> tuple[np.ndarray, pa.Table]:
        """The pixels and the row that replace a corrupt one; its row group is read once more."""
        for unit, others in self.plan.stand_ins(epoch, row):
            try:
                whole = self.shards.read(unit)
            except ShardError as error:
                self._count_unit(unit, error)
                continue
            for other in others.tolist():
                candidate = whole.slice(other - int(self.plan.first[unit]), 1)
                try:
                    return decode(candidate.column("image")[0].as_py() or b"", self.shape), candidate
                except CorruptImage as error:
                    self._count_row(other, str(error))
        raise self._nothing_left()


def assemble(
    plan: Plan, tables: Iterable[tuple[Piece, pa.Table]], size: int
) -> Iterator[tuple[np.ndarray, np.ndarray, pa.Table]]:
    """Batches of `size` rows out of pieces that come in the order in which they are first needed.

    Yields (epochs, row ids, rows), in the order of the places. Ends where the pieces do.
    """
    coming = iter(tables)
    following = next(coming, None)
    lanes: list[tuple[Piece, pa.Table, int]] = []  # a piece, its rows, and how many of them are used up
    for end in count(size, size):
        while following is not None and following[0].places[0] < end:
            lanes.append((*following, 0))
            following = next(coming, None)
        places, epochs, rows, parts, left = [], [], [], [], []
        for piece, table, used in lanes:
            stop = int(np.searchsorted(piece.places, end))
            if stop > used:
                places.append(piece.places[used:stop])
                epochs.append(np.full(stop - used, piece.epoch))
                rows.append(plan.first[piece.unit] + piece.rows[used:stop])
                parts.append(table.slice(used, stop - used))
            if stop < len(piece.places):
                left.append((piece, table, stop))
        lanes = left
        if sum(map(len, places)) < size:
            return
        order = np.argsort(np.concatenate(places))
        yield np.concatenate(epochs)[order], np.concatenate(rows)[order], pa.concat_tables(parts).take(pa.array(order))


def ahead(source: Generator[T, None, None], depth: int, patience_s: float | None = None) -> Generator[T, None, None]:
    """The items of a generator, made by a thread that keeps up to `depth` of them ready; its errors are raised here.

    patience_s: raise TimeoutError when an item takes longer than that; None waits for ever.
    """
    ready: Queue[tuple[T | None, BaseException | None]] = Queue(depth)
    stop = threading.Event()

    def put(item: tuple[T | None, BaseException | None]) -> None:
        while not stop.is_set():
            try:
                return ready.put(item, timeout=0.1)
            except Full:
                continue

    def work() -> None:
        try:
            for item in source:
                put((item, None))
                if stop.is_set():
                    break
            else:
                put((None, StopIteration()))
        except BaseException as error:  # noqa: BLE001 - whatever it is, the consumer must see it and not wait for ever
            put((None, error))
        finally:
            source.close()

    thread = threading.Thread(target=work, name="fewstep-feed", daemon=True)
    thread.start()
    wait_s = 30  # for the item that is being made: what follows may close what it is made of
    try:
        while True:
            try:
                item, error = ready.get(timeout=patience_s)
            except Empty:
                wait_s = 0
                raise TimeoutError(f"nothing came for {patience_s:g} s") from None
            if isinstance(error, StopIteration):
                return
            if error is not None:
                raise error
            yield item
    finally:
        stop.set()
        while not ready.empty():
            try:
                ready.get_nowait()
            except Empty:
                break
        thread.join(wait_s)


def _tensors(columns: Mapping[str, np.ndarray]) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(values) for name, values in columns.items()}


def _threads() -> int:
    return max(1, min(4, len(os.sched_getaffinity(0))))


def open_feed(
    path: str | os.PathLike[str] | Shards, *, memory_bytes: int = MEMORY_BYTES, verify: str = "sha256", **options: Any
) -> Feed:
    """The feed of a folder of shards: in memory where the decoded set fits in `memory_bytes`, else streamed.

    options: seed, flip, captions, max_corrupt. Raises ShardError as open_shards does.
    """
    shards = path if isinstance(path, Shards) else open_shards(path, verify)
    return (MemoryFeed if shards.decoded_bytes <= memory_bytes else StreamFeed)(shards, **options)
