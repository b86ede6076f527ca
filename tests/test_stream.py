"""Ray Data gives the images of the plan in the plan's order, and says what is wrong instead of waiting."""

from __future__ import annotations

import itertools
import os
import threading
import time

import numpy as np
import psutil
import pytest
import torch
from ray.exceptions import RayTaskError

from fewstep.cluster.stream import NotEnoughCPUs, Published, RayFeed, check_cpus, publish
from fewstep.data.feed import MemoryFeed, StreamFeed
from fewstep.data.shards import ShardError, Shards, ShardWriter, open_shards


def write(path, rows):
    with ShardWriter(path, (1, 8, 8), classes=10, group_rows=16, shard_bytes=3000) as writer:
        for i in range(rows):
            writer.add(np.full((1, 8, 8), i % 256, np.uint8), i % 10)
    return open_shards(path)


def take(feed, batches, position=0, rank=0, world=1):
    result = [tuple(rows.values()) for rows in itertools.islice(feed.batches(position, 24, rank, world), batches)]
    feed.close()
    return result


def running():
    """Threads of Ray Data's executions."""
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("StreamingExecutor")]


def same(a, b):
    return all(torch.equal(x[0], y[0]) and torch.equal(x[1], y[1]) for x, y in zip(a, b, strict=True))


def test_published_sets_give_the_order_of_the_plan(ray_cluster, tmp_path, monkeypatch):
    shards = write(tmp_path / "set", 200)
    reference = MemoryFeed(shards, seed=5, flip=True)
    expected = take(reference, 40, position=120)
    small = publish(shards.path)
    assert not small.streaming and same(take(small.open(seed=5, flip=True), 40, position=120), expected)
    large = publish(shards.path, memory_bytes=0)
    assert large.streaming
    # executions of four tasks, so that the seam between two of them is crossed, and five epochs
    monkeypatch.setattr("fewstep.cluster.stream.EXECUTION_TASKS", 4)
    assert same(take(large.open(seed=5, flip=True), 40, position=120), expected)
    for rank in range(3):
        ours = take(large.open(seed=5, flip=True), 12, position=120, rank=rank, world=3)
        assert same(ours, take(reference, 12, position=120, rank=rank, world=3))
    assert running() == []


def test_a_set_is_opened_in_another_process(ray_cluster, tmp_path):
    published = publish(write(tmp_path / "set", 100).path)

    @ray_cluster.remote(num_cpus=1)
    def first(published: Published) -> torch.Tensor:
        return next(published.open(seed=1).batches(0, 24))["real"]

    expected = take(MemoryFeed(published.shards, seed=1), 1)[0][0]
    assert torch.equal(ray_cluster.get(first.remote(published)), expected)


@pytest.mark.fault
def test_a_shard_lost_in_mid_run_is_named_in_seconds(ray_cluster, tmp_path, monkeypatch):
    shards = write(tmp_path / "set", 3000)
    monkeypatch.setattr("fewstep.cluster.stream.EXECUTION_TASKS", 2)
    batches = RayFeed(shards).batches(0, 24)
    next(batches)
    for file in shards.path.glob("*.parquet"):
        file.unlink()
    started = time.perf_counter()
    with pytest.raises(ShardError, match=r"shard-000\d\d.parquet: row group \d+ cannot be read.*prepare.py"):
        for _ in batches:
            pass
    assert time.perf_counter() - started < 60


@pytest.mark.fault
def test_a_lost_shard_below_the_limit_is_replaced_as_without_ray(ray_cluster, tmp_path, caplog):
    shards = write(tmp_path / "set", 200)
    (shards.path / "shard-00001.parquet").unlink()
    expected = take(StreamFeed(shards, seed=5, max_corrupt=0.9), 20)
    feed = RayFeed(shards, seed=5, max_corrupt=0.9)
    assert same(take(feed, 20), expected) and feed.corrupt_rows == shards.manifest.shards[1].rows
    assert len(caplog.records) == 2 and "shard-00001.parquet" in caplog.text  # one for each feed


@pytest.mark.fault
def test_a_reading_process_that_is_killed_is_replaced(ray_cluster, tmp_path):
    readers = tmp_path / "readers"
    readers.mkdir()

    class Slow(Shards):
        """The first process that reads leaves its number and hangs. A local class, so that tasks can unpickle it."""

        def read(self, unit, rows=None):
            first = not any(readers.iterdir())
            (readers / str(os.getpid())).touch()
            time.sleep(600 if first else 0)
            return super().read(unit, rows)

    shards = write(tmp_path / "set", 100)
    expected = take(MemoryFeed(shards, seed=3), 3)
    stream = RayFeed(Slow(shards.path, shards.manifest), seed=3).batches(0, 24)
    killed = []

    def kill():
        deadline = time.monotonic() + 60
        while not killed and time.monotonic() < deadline:
            for result in list(readers.iterdir())[:1]:
                reader = psutil.Process(int(result.name))
                killed.append(" ".join(reader.cmdline()))
                reader.kill()
            time.sleep(0.05)

    killer = threading.Thread(target=kill)
    killer.start()
    started = time.perf_counter()
    assert same(list(itertools.islice(stream, 3)), expected)
    stream.close()
    killer.join()
    assert killed and killed[0].startswith("ray::MapBatches(read_units)")
    assert time.perf_counter() - started < 120
    assert len(list(readers.iterdir())) > 1  # another process read what the killed one was reading


def test_a_task_that_fails_is_raised_and_not_waited_for(ray_cluster, tmp_path):
    class Broken(Shards):
        def read(self, unit, rows=None):
            raise RuntimeError("the disk controller is on fire")

    shards = write(tmp_path / "set", 100)
    started = time.perf_counter()
    with pytest.raises(RayTaskError, match="the disk controller is on fire"):
        take(RayFeed(Broken(shards.path, shards.manifest)), 1)
    assert time.perf_counter() - started < 60


def test_workers_that_leave_no_cpu_are_refused(ray_cluster):
    check_cpus(workers=3, cpus_per_worker=1, streaming=True)
    check_cpus(workers=4, cpus_per_worker=1, streaming=False)
    with pytest.raises(NotEnoughCPUs, match=r"need 5 logical CPUs and it has 4; use fewer workers.*--num-cpus=5"):
        check_cpus(workers=4, cpus_per_worker=1, streaming=True)
    with pytest.raises(NotEnoughCPUs, match="need 4.5"):
        check_cpus(workers=3, cpus_per_worker=1.5, streaming=False)


def test_without_a_free_cpu_a_small_set_is_fed_and_a_stream_gives_up(ray_cluster, tmp_path):
    shards = write(tmp_path / "set", 100)

    @ray_cluster.remote(num_cpus=4)
    class Hog:
        def ready(self) -> bool:
            return True

    hog = Hog.remote()
    assert ray_cluster.get(hog.ready.remote(), timeout=60)
    try:
        assert same(take(publish(shards.path).open(seed=2), 5), take(MemoryFeed(shards, seed=2), 5))
        with pytest.raises(TimeoutError, match="nothing came for 2 s from Ray Data; free CPUs now: 0 of 4"):
            take(RayFeed(shards, patience_s=2), 1)
    finally:
        ray_cluster.kill(hog)
    deadline = time.monotonic() + 30
    while running():
        assert time.monotonic() < deadline, "the pipeline that was given up is still running"
        time.sleep(0.05)
