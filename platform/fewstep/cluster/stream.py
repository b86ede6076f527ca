"""The feed of a cluster: the order is the plan's, its execution Ray Data's.

    published = publish("shards")             # in the driver: verified once; a small set goes to the object store
    check_cpus(workers=2, cpus_per_worker=1, streaming=published.streaming)
    feed = published.open(seed=0)             # in each worker: the interface of fewstep.data.feed

A small set is materialised: its encoded rows lie in the object store, each worker decodes them once, and a batch is an
index. A large set is streamed: a worker gives Ray Data the pieces of its own rank's plan, tasks read the row groups,
and the worker decodes ahead of its step. One execution covers thousands of row groups, so Ray Data's start-up time
(1-3 s) is paid once and not every epoch. Each rank runs its own pipeline: none waits for another, and a restarted
worker starts where it stands. The folder of shards must be visible from every node under the same path.
"""

from __future__ import annotations

import logging
import os
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

DATA_CPUS = 1  # what a streaming pipeline needs beside the workers
# Far below Ray Data's block size: a task's answer is one block, so no task waits for its reader while it holds a CPU.
TASK_BYTES = 16 << 20
TASK_PIECES = 16
EXECUTION_TASKS = 512


class NotEnoughCPUs(UserError, RuntimeError):
    """The cluster cannot run the workers and the pipeline that feeds them; the text says what is short."""


def check_cpus(workers: int, cpus_per_worker: float, streaming: bool) -> None:
    """Raises NotEnoughCPUs where training would wait for ever: Ray Data's tasks need a CPU that no worker holds.

    Counts the cluster's logical CPUs, whoever uses them now. A materialised set needs none while training.
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
    """A verified set that workers can open; it travels to them in the trainer's configuration."""

    shards: Shards
    dataset: Dataset | None

    @property
    def streaming(self) -> bool:
        return self.dataset is None

    def open(self, **options: Any) -> Feed:
        """The set's feed, in the process that calls. options: seed, flip, captions, max_corrupt."""
        if self.dataset is None:
            return RayFeed(self.shards, **options)
        return MemoryFeed(self.shards, **options, tables=_blocks(self.dataset))


def publish(path: str | os.PathLike[str], memory_bytes: int = MEMORY_BYTES, verify: str = "sha256") -> Published:
    """Verifies a set and, where it fits decoded in `memory_bytes`, puts its encoded rows in the object store.

    Called in the driver, which reads a small set itself: a set that is materialised so never waits for a free CPU. What
    it returns is valid while the driver lives. Raises ShardError as open_shards does.
    """
    shards = open_shards(path, verify)
    if shards.decoded_bytes > memory_bytes:
        return Published(shards, None)
    _quiet()
    # from_blocks and not from_arrow, which runs a task for each table's metadata and would wait for a CPU
    units = ((unit, None) for unit in range(len(shards.units)))
    dataset = ray.data.from_blocks([_whole(read_units(task, shards)) for task in _tasks(shards, units)])
    dataset.context.execution_options.preserve_order = True
    dataset.context.enable_progress_bars = False
    return Published(shards, dataset.materialize())


class RayFeed(StreamFeed):
    """A set of any size whose row groups are read by Ray Data, for one rank.

    A task whose process dies is run again by Ray; what a task cannot read the worker tries itself, and then treats as
    every feed does. Whatever else fails in Ray Data is raised here.
    readers: tasks that read at a time; store_bytes: the most that blocks on their way hold of the object store.
    patience_s: how long no row group may come before the feed gives up with an error that shows the cluster's CPUs.
    """

    def __init__(
        self,
        shards: Shards,
        *args: Any,
        readers: int = 2,
        store_bytes: int = 256 << 20,
        patience_s: float = 120.0,
        **options: Any,
    ):
        super().__init__(shards, *args, **options)
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
        """The blocks of one execution after another, without end."""
        tasks = _tasks(self.shards, ((p.unit, p.rows) for p in self.plan.pieces(position, rank, world)))
        while True:
            dataset = _pipeline(self.shards, list(islice(tasks, EXECUTION_TASKS)), self.readers)
            store = min(self.store_bytes, ray.cluster_resources()["object_store_memory"] / (4 * world))
            limits = ExecutionResources.for_limits(cpu=self.readers, object_store_memory=store)
            dataset.context.execution_options.resource_limits = limits
            yield from _blocks(dataset)


def _tasks(shards: Shards, wanted: Iterator[tuple[int, np.ndarray | None]]) -> Iterator[pa.Table]:
    """A task's reading list: a table of units and their rows (null is all), of about TASK_BYTES of shards."""
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
    """Ray Data's execution of some tasks, in their order: one block each, rows still encoded."""
    _quiet()
    dataset = ray.data.from_blocks(tasks).map_batches(
        read_units, batch_size=None, batch_format="pyarrow", fn_kwargs={"shards": shards}, num_cpus=DATA_CPUS,
        compute=TaskPoolStrategy(size=readers),
    )  # fmt: skip
    dataset.context.execution_options.preserve_order = True
    dataset.context.enable_progress_bars = False
    return dataset


def _quiet() -> None:
    """Ray Data's account of each execution goes to its log file, not to the terminal of every worker."""
    log_once("ray_data_progress_manager_disabled")  # taken here, so that Ray Data's own notice does not appear
    for handler in logging.getLogger("ray.data").handlers:
        if isinstance(handler, logging.StreamHandler):
            handler.setLevel(logging.WARNING)


def _blocks(dataset: Dataset) -> Generator[pa.Table, None, None]:
    """A dataset's blocks in order.

    Fetches them itself: the threads of `iter_batches` outlive its iterator, and one that asks for a block after
    ray.shutdown ends the process.
    """
    for bundle in dataset.iter_internal_ref_bundles():
        for entry in bundle.blocks:
            yield ray.get(entry.ref)


def _whole(table: pa.Table) -> pa.Table:
    """The result of read_units; raises the ShardError that it met."""
    reasons = table.column("error").drop_null()
    if len(reasons):
        raise ShardError(reasons[0].as_py())
    return table
