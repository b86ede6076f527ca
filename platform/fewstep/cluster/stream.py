"""The feed of a cluster: fewstep.data.plan decides the order, Ray Data reads.

    published = publish("shards")             # in the driver: verified once; a small set goes to the object store
    check_cpus(workers=2, cpus_per_worker=1, streaming=published.streaming)
    feed = published.open(seed=0)             # in each worker: the interface of fewstep.data.feed

A small set is materialised: its encoded rows are in the object store, each worker decodes them once, and a batch is an
index into them. A large set is streamed: a worker passes the pieces of its rank's plan to Ray Data, tasks read the row
groups, and the worker decodes ahead of its step. One execution covers thousands of row groups, so Ray Data's start-up
time (1-3 s) is paid once and not every epoch. Each rank has its own pipeline, so no rank waits for another, and a
restarted worker begins at its own position. Every node must see the folder of shards under the same path, or reach the
object store that holds them; then the tasks keep copies of the shards on the disk of their node (storage/cache.py).
"""

from __future__ import annotations

import logging
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import pyarrow as pa
import ray
from ray.data import Dataset, ExecutionResources, TaskPoolStrategy
from ray.util import log_once

from fewstep.config import UserError
from fewstep.data.feed import MEMORY_BYTES, Feed, MemoryFeed, Read, StreamFeed, ahead
from fewstep.data.shards import ShardError, Shards, open_shards, read_units
from fewstep.storage.cache import CACHE_BYTES
from fewstep.storage.place import Place, Ref

DATA_CPUS = 1  # CPUs of a streaming pipeline, beside those of the workers
# Far below Ray Data's block size, so that a task returns one block and never waits for its reader with a CPU in use.
TASK_BYTES = 16 << 20
TASK_PIECES = 16
EXECUTION_TASKS = 512


class NotEnoughCPUs(UserError, RuntimeError):
    """The cluster has too few CPUs for the workers and their data pipeline; the text says how many are missing."""


def check_cpus(workers: int, cpus_per_worker: float, streaming: bool) -> None:
    """Raises NotEnoughCPUs if training would wait for ever, because Ray Data's tasks need a CPU that no worker has.

    It counts all logical CPUs of the cluster, also those in use. A materialised set needs none during training.
    """
    total = ray.cluster_resources().get("CPU", 0.0)
    needed = workers * cpus_per_worker + (DATA_CPUS if streaming else 0)
    if needed > total + 1e-9:
        pipeline = f" and {DATA_CPUS} for Ray Data, which streams the images" if streaming else ""
        raise NotEnoughCPUs(
            f"cluster: {workers} workers of {cpus_per_worker:g} CPUs{pipeline} need {needed:g} logical CPUs and it "
            f"has {total:g}; use fewer workers, a smaller cpus_per_worker, or declare more logical CPUs: "
            f"ray start --head --num-cpus={int(np.ceil(needed))}"
        )


@dataclass(frozen=True)
class Published:
    """A verified set that workers can open. They get it with the trainer's configuration."""

    shards: Shards
    dataset: Dataset | None

    @property
    def streaming(self) -> bool:
        return self.dataset is None

    def open(self, **options: Any) -> Feed:
        """Opens the set's feed in the calling process. options: seed, flip, captions, max_corrupt."""
        if self.dataset is None:
            return RayFeed(self.shards, **options)
        return MemoryFeed(self.shards, **options, tables=_blocks(self.dataset))


def publish(
    path: Ref, memory_bytes: int = MEMORY_BYTES, verify: str = "sha256", cache_bytes: int = CACHE_BYTES
) -> Published:
    """Verifies a set. If its decoded rows fit in `memory_bytes`, it puts the encoded rows in the object store.

    The driver calls it, and reads a small set itself, so that this needs no free CPU. The result is valid while the
    driver lives. verify, cache_bytes: see open_shards. Raises ShardError and StoreError as it does.
    """
    shards = open_shards(path, verify, cache_bytes)
    if shards.decoded_bytes > memory_bytes:
        return Published(shards, None)
    _hide_progress()
    # from_blocks and not from_arrow, which runs a task for each table's metadata and would wait for a CPU
    units = ((unit, None) for unit in range(len(shards.units)))
    dataset = ray.data.from_blocks([_table_or_error(read_units(task, shards)) for task in _tasks(shards, units)])
    dataset.context.execution_options.preserve_order = True
    dataset.context.enable_progress_bars = False
    return Published(shards, dataset.materialize())


class RayFeed(StreamFeed):
    """A set of any size whose row groups are read by Ray Data, for one rank.

    Ray repeats a task whose process dies. If a task cannot read a row group, the worker tries it, and then treats it as
    every feed does. Other errors of Ray Data are raised here.
    readers: number of tasks that read at a time; store_bytes: object store memory for blocks in transit, at most.
    patience_s: time without a row group after which the feed raises an error that shows the cluster's CPUs. None is
        120, and ten minutes for shards in an object store, which may be slow.
    """

    def __init__(
        self,
        shards: Shards,
        *args: Any,
        readers: int = 2,
        store_bytes: int = 256 << 20,
        patience_s: float | None = None,
        **options: Any,
    ):
        super().__init__(shards, *args, **options)
        if patience_s is None:
            patience_s = 600.0 if isinstance(shards.path, Place) else 120.0
        self.readers, self.store_bytes, self.patience_s = readers, store_bytes, patience_s

    def _tables(self, position: int, rank: int, world: int) -> Generator[Read, None, None]:
        blocks = ahead(self._executions(position, rank, world), 2, self.patience_s)
        rest = pa.table({})
        try:
            for piece in self.plan.pieces(position, rank, world):
                if not rest.num_rows:
                    rest = next(blocks)
                rows = len(piece.rows)
                if rest.column("unit")[0].as_py() != piece.unit or rest.num_rows < rows:
                    raise RuntimeError(f"Ray Data gave row group {rest.column('unit')[0]} where {piece.unit} is next")
                here, rest = rest.slice(0, rows), rest.slice(rows)
                reason = here.column("error")[0].as_py()
                yield piece, here.select(self.shards.columns) if reason is None else ShardError(reason)
        except TimeoutError as error:
            raise TimeoutError(
                f"data: {error} from Ray Data; free CPUs now: {ray.available_resources().get('CPU', 0):g} of "
                f"{ray.cluster_resources().get('CPU', 0):g}. Leave it one: fewer workers or a smaller cpus_per_worker"
            ) from None
        finally:
            blocks.close()

    def _executions(self, position: int, rank: int, world: int) -> Generator[pa.Table, None, None]:
        """Yields the blocks of one execution after the other, without end."""
        tasks = _tasks(self.shards, ((p.unit, p.rows) for p in self.plan.pieces(position, rank, world)))
        while True:
            dataset = _pipeline(self.shards, list(islice(tasks, EXECUTION_TASKS)), self.readers)
            store = min(self.store_bytes, ray.cluster_resources()["object_store_memory"] / (4 * world))
            limits = ExecutionResources.for_limits(cpu=self.readers, object_store_memory=store)
            dataset.context.execution_options.resource_limits = limits
            yield from _blocks(dataset)


def _tasks(shards: Shards, wanted: Iterator[tuple[int, np.ndarray | None]]) -> Iterator[pa.Table]:
    """Yields the input of each task: a table of units and their rows (null is all), about TASK_BYTES of shards."""
    weight = {shard.file: shard.bytes / shard.rows for shard in shards.manifest.shards}
    units: list[int] = []
    rows: list[np.ndarray | None] = []
    size = 0.0
    for unit, numbers in wanted:
        this = weight[shards.units[unit].file] * shards.units[unit].rows
        if units and (size + this > TASK_BYTES or len(units) == TASK_PIECES):
            yield _task(units, rows)
            units, rows, size = [], [], 0.0
        units.append(unit)
        rows.append(numbers)
        size += this
    if units:
        yield _task(units, rows)


def _task(units: list[int], rows: list[np.ndarray | None]) -> pa.Table:
    return pa.table({"unit": pa.array(units, pa.int32()), "rows": pa.array(rows, pa.list_(pa.int32()))})


def _pipeline(shards: Shards, tasks: list[pa.Table], readers: int) -> Dataset:
    """Returns the dataset of some tasks, in their order: one block for each, with encoded rows."""
    _hide_progress()
    dataset = ray.data.from_blocks(tasks).map_batches(
        read_units, batch_size=None, batch_format="pyarrow", fn_kwargs={"shards": shards}, num_cpus=DATA_CPUS,
        compute=TaskPoolStrategy(size=readers),
    )  # fmt: skip
    dataset.context.execution_options.preserve_order = True
    dataset.context.enable_progress_bars = False
    return dataset


def _hide_progress() -> None:
    """Keeps Ray Data's messages about each execution out of the terminal; its log file has them."""
    log_once("ray_data_progress_manager_disabled")  # marks Ray Data's notice as printed
    for handler in logging.getLogger("ray.data").handlers:
        if isinstance(handler, logging.StreamHandler):
            handler.setLevel(logging.WARNING)


def _blocks(dataset: Dataset) -> Generator[pa.Table, None, None]:
    """Yields a dataset's blocks in order.

    It does not use `iter_batches`, whose threads outlive the iterator: a thread that asks for a block after
    ray.shutdown ends the process.
    """
    for bundle in dataset.iter_internal_ref_bundles():
        for entry in bundle.blocks:
            yield ray.get(entry.ref)


def _table_or_error(table: pa.Table) -> pa.Table:
    """Returns the result of read_units. Raises the ShardError that it reports."""
    reasons = table.column("error").drop_null()
    if len(reasons):
        raise ShardError(reasons[0].as_py())
    return table
