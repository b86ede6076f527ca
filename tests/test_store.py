"""Data, networks and files in an object store: as in a folder, and errors that name the URL and the way out."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import re
import shutil
import sys
import time
import urllib.request
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path

import fsspec
import numpy as np
import pytest
import torch
import toy
from demo import losses, recipe
from fsspec.implementations.dirfs import DirFileSystem
from fsspec.implementations.local import LocalFileSystem
from fsspec.registry import _registry
from job import JOBS, job
from moto.s3.models import S3Backend
from PIL import Image
from safetensors.torch import load_file
from test_data import same, take, write
from tiny import pipeline

from fewstep import build
from fewstep.config import ConfigError, resolve, validate
from fewstep.data.feed import StreamFeed, open_feed
from fewstep.data.manifest import ShardError
from fewstep.data.shards import ShardWriter, join, open_shards
from fewstep.engine.checkpoint import read_weights
from fewstep.engine.folder import newest, step_of
from fewstep.files import sha256_of
from fewstep.folders import EXPORT, FolderError, appearing, files_in
from fewstep.locks import share, unused
from fewstep.networks.pretrained import open_teacher, save_denoiser
from fewstep.recipe import load_recipe
from fewstep.storage import place as place_module
from fewstep.storage.cache import IN_USE, cache_folder, copy_of, local
from fewstep.storage.place import Place, StoreError
from fewstep.watchdog import STOP

RECIPES = Path(__file__).resolve().parents[1] / "jobs" / "recipes"
NUMBERS = ("critic/", "student/", "health/")
TEACHER = "shipped:fashion_mnist/teacher"


def send(folder: Path, url: str) -> str:
    """Copies a folder to a store as any tool would."""
    place = Place.of(url)
    place.fs.put(str(folder), place.path, recursive=True)
    return url


def names(url: str) -> list[str]:
    return list(Place.of(url).files())


def copies() -> list[Path]:
    folder = cache_folder() / "shards"
    return sorted(path for path in folder.glob("*") if not path.name.startswith(".")) if folder.is_dir() else []


@pytest.fixture
def sets(bucket, tmp_path) -> tuple[Path, str]:
    """The same set in a folder and in a bucket: 160 rows in several shards."""
    write(tmp_path / "set", rows=160, shard_bytes=2500)
    return tmp_path / "set", send(tmp_path / "set", f"{bucket}/set")


# Reading


def test_a_set_in_a_store_is_that_of_the_folder(sets):
    folder, url = (open_shards(ref) for ref in sets)
    assert folder.manifest == url.manifest and str(url.path) == "s3://bucket/set"
    for unit in range(len(folder.units)):
        assert folder.read(unit).equals(url.read(unit))
    shards = folder.manifest.shards
    assert [path.name for path in copies()] == sorted(shard.sha256 for shard in shards)
    assert all(sha256_of(path) == path.name for path in copies())
    assert folder.name(3, 2) == url.name(3, 2)


def test_losses_are_those_of_the_folder(bucket, tmp_path):
    """Three steps of DMD2 from streamed shards, the teacher at a URL, too."""
    teacher = send(resolve(TEACHER), "s3://bucket/teacher")

    def losses(path: object, teacher: str) -> list[dict]:
        arguments = "train.steps=3 train.batch=4 train.report_every=1 train.save_every=3 optim.student.warmup_steps=0"
        arguments = [*arguments.split(), f"data.path={path}", "data.memory_mib=0", f"teacher={teacher}"]
        recipe = load_recipe(["recipe=fashion_mnist", f"out={tmp_path}", *arguments], RECIPES, "")
        with build.make_feed(recipe.data, recipe.seed) as feed:
            assert isinstance(feed, StreamFeed)
            engine = build.make_engine(recipe, feed)
            return [{k: v for k, v in report.metrics.items() if k.startswith(NUMBERS)} for report in engine.run()]

    big = tmp_path / "big"
    write(big, rows=60, size=(1, 28, 28))
    result = losses(send(big, "s3://bucket/big"), teacher)
    assert len(result) == 3 and {"critic/denoise", "student/match"} <= result[0].keys()
    assert result == losses(big, TEACHER)


def test_a_resume_in_mid_epoch_reads_no_row_twice_and_misses_none(sets, monkeypatch, tmp_path):
    _, url = sets
    seen = []
    for position, batches in ((0, 4), (4 * 16, 5), (9 * 16, 2)):  # the last is of the next epoch
        monkeypatch.setenv("FEWSTEP_CACHE", str(tmp_path / f"node {position}"))  # each start is on a new machine
        with StreamFeed(open_shards(url), seed=3) as feed:
            for rows in islice(feed.batches(position, 16), batches):
                seen += [round(127.5 * (float(x) + 1)) for x in rows["real"][:, 0, 0, 0]]
    assert sorted(seen[:160]) == list(range(160)) and len(seen) == 11 * 16


def train_runs(folder: Path, runs: dict[str, list[str]]) -> None:
    """Two workers train each run, in a process whose cluster finds the store in its environment. The run from the store
    is stopped after its first reports, and goes on."""
    from fewstep.cluster.train import fit

    small = ["train.steps=30", "train.save_every=30", "data.memory_mib=0", "cluster.workers=2", "cluster.wait_s=60"]
    fit(recipe(folder, "name=folder", *small, *runs["folder"]))
    store = recipe(folder, "name=store", *small, *runs["store"])
    stopped = fit(store, lambda line: (store.folder / STOP).touch())
    (folder / "stopped.json").write_text(json.dumps([stopped["finished"], stopped["step"]]))
    shutil.rmtree(cache_folder() / "shards")  # it goes on on a new machine
    fit(store)


@pytest.mark.slow
def test_a_run_on_ray_from_a_store_is_that_of_the_folder_and_goes_on_in_mid_epoch(bucket, store, tmp_path):
    """Two workers stream 103 rows more than twice, and every loss and the last checkpoint have the same bits."""
    from test_export import student  # which imports more than the processes of the runs need

    shards = write(tmp_path / "set", rows=103, size=(1, 16, 16)).manifest.shards
    save_denoiser(student(), tmp_path / "teacher")
    places = {"folder": str(tmp_path), "store": bucket}
    for name in ("set", "teacher"):
        send(tmp_path / name, f"{bucket}/{name}")
    runs = {
        name: [f"tracking.uri={store}", f"data.path={place}/set", f"teacher={place}/teacher"]
        for name, place in places.items()
    }
    process = multiprocessing.get_context("spawn").Process(target=train_runs, args=(tmp_path, runs))
    process.start()
    process.join(540)
    process.kill()
    assert process.exitcode == 0
    finished, step = json.loads((tmp_path / "stopped.json").read_text())
    assert not finished and 0 < step < 30 and 8 * step % 103  # not at the end of an epoch
    assert len(shards) > 1 and [path.name for path in copies()] == sorted(shard.sha256 for shard in shards)
    folder, store = (tmp_path / "runs" / name for name in runs)
    assert losses(store) == losses(folder) and len(losses(folder)) == 30
    assert {"critic/denoise", "student/match"} <= losses(folder)[0].keys()
    ours, theirs = (newest(run / "checkpoints") for run in (store, folder))
    assert step_of(ours) == step_of(theirs) == 30
    assert toy.same(read_weights(ours), read_weights(theirs))  # which of two ranks writes a tensor may differ


def test_a_set_larger_than_the_cache_is_read_from_the_store(sets):
    folder = open_shards(sets[0])
    url = open_shards(sets[1], cache_bytes=sum(shard.bytes for shard in folder.manifest.shards) - 1)
    assert same(take(StreamFeed(folder, seed=1), 5), take(StreamFeed(url, seed=1), 5))
    assert copies() == []


def test_copies_that_were_not_used_for_the_longest_time_make_room(sets, tmp_path):
    _, url = sets
    first = open_shards(url)
    size = sum(shard.bytes for shard in first.manifest.shards)
    for unit in range(len(first.units)):
        first.read(unit)
    oldest = copies()
    for age, path in enumerate(oldest):
        os.utime(path, (1000 - age, 1000 - age))
    write(tmp_path / "other", rows=60, seed=5)
    other = open_shards(send(tmp_path / "other", "s3://bucket/other"), cache_bytes=size)
    for unit in range(len(other.units)):
        other.read(unit)
    assert sum(path.stat().st_size for path in copies()) <= size
    left = [path for path in oldest if path.exists()]
    assert 0 < len(left) < len(oldest) and left == oldest[: len(left)]  # those with the newest times


def test_a_damaged_copy_is_fetched_again(sets):
    shards = open_shards(sets[1])
    whole = shards.read(0)
    copy = cache_folder() / "shards" / shards.manifest.shards[0].sha256
    content = copy.read_bytes()
    copy.write_bytes(content[:-1])
    assert shards.read(0).equals(whole) and copy.read_bytes() == content  # another size: no copy
    copy.write_bytes(b"\0" * len(content))
    with pytest.raises(ShardError, match="shard-00000.parquet: row group 0 cannot be read"):
        shards.read(0)
    assert shards.read(0).equals(whole)


def fetch_all(folder: str, limit: int, turns: int, seed: int) -> None:
    """One of several processes that share a cache with room for two of the five files."""
    os.environ["FEWSTEP_CACHE"] = f"{folder}/cache"
    store = Place(DirFileSystem(path=f"{folder}/store", fs=fsspec.filesystem("file")), "files")
    entries = json.loads(Path(folder, "entries.json").read_text())
    for i in np.random.default_rng(seed).integers(0, len(entries), turns).tolist():
        name, sha256, size = entries[i]
        for _ in range(100):  # another process may remove a copy before it is opened
            try:
                content = copy_of(store / name, sha256, size, limit, lambda path: None).read_bytes()
                break
            except FileNotFoundError:
                continue
        assert content == bytes([i]) * size
        copies = [p for p in Path(folder, "cache/shards").glob("*") if len(p.name) == 64]
        assert len(copies) <= 5
    Path(folder, f"done-{seed}").touch()


def test_processes_share_the_copies_of_their_node(tmp_path):
    (tmp_path / "store" / "files").mkdir(parents=True)
    entries = []
    for i in range(5):
        file = tmp_path / "store" / "files" / f"f{i}"
        file.write_bytes(bytes([i]) * 50_000)
        entries.append((file.name, sha256_of(file), 50_000))
    (tmp_path / "entries.json").write_text(json.dumps(entries))
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=fetch_all, args=(str(tmp_path), 100_000, 40, seed)) for seed in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert [worker.exitcode for worker in workers] == [0, 0, 0]
    left = [path for path in (tmp_path / "cache" / "shards").iterdir() if path.suffix != ".lock"]
    assert 0 < len(left) <= 3 and not [path for path in left if path.name.startswith(".")]


# What a store does that a disk does not


def lost(file: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    file.unlink()


def other(file: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    content = bytearray(file.read())
    content[100] ^= 1
    file.write(bytes(content))


def slow(file: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """The server takes a second for an answer, and less than that is allowed."""
    get = S3Backend.get_object
    monkeypatch.setattr(S3Backend, "get_object", lambda *args, **named: (time.sleep(1), get(*args, **named))[1])
    monkeypatch.setattr(place_module, "SLOW_S", 0.2)


def refused(file: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    ask_for_keys(True)


def ask_for_keys(yes: bool) -> None:
    server = os.environ["AWS_ENDPOINT_URL"]
    data, headers = b"0" if yes else b"inf", {"Content-Type": "text/plain"}
    request = urllib.request.Request(f"{server}/moto-api/reset-auth", data, headers, method="POST")
    urllib.request.urlopen(request, timeout=30).close()


@pytest.fixture
def keys():
    """At the end the server asks for no keys."""
    yield
    ask_for_keys(False)


DAMAGE = {
    lost: r"row group \d cannot be read \(.*No such file.*; restore the file, or write the set again: python",
    other: r"its sha256 \w+\.\.\. is not the manifest's \w+\.\.\.; restore the file",
    slow: r"no answer within 0.2\d* s; look at the network and the store, and start again",
    refused: r"access refused: .*look at the credentials of this machine \(AWS_ACCESS_KEY_ID and",
}


def test_what_is_wrong_with_a_shard_in_mid_run_is_one_line_with_the_url_and_the_way_out(sets, keys):
    shards = open_shards(sets[1])
    for number, (damage, text) in enumerate(DAMAGE.items()):
        name = f"shard-{number:05d}.parquet"
        unit = next(i for i, where in enumerate(shards.units) if where.file == name)
        with pytest.MonkeyPatch.context() as patch:
            damage(shards.path / name, patch)
            with pytest.raises(ShardError, match=f"s3://bucket/set/{name}: {text}") as error:
                shards.read(unit)
        assert "\n" not in str(error.value)
    assert copies() == []


def test_rows_of_a_lost_shard_are_replaced_as_those_of_a_folder_are(sets):
    feeds = [StreamFeed(open_shards(ref), seed=2, max_corrupt=0.5) for ref in sets]
    (sets[0] / "shard-00001.parquet").unlink()
    (Place.of(sets[1]) / "shard-00001.parquet").unlink()
    assert same(*(take(feed, 8) for feed in feeds)) and feeds[0].corrupt_rows == feeds[1].corrupt_rows > 0


def test_a_place_that_is_not_there_is_one_line_before_anything_starts(bucket, capsys):
    with pytest.raises(SystemExit) as stop:
        job("distill")(["recipe=fashion_mnist", "--dry-run", "evaluate.metrics=[]", "data.path=s3://nowhere/set"])
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert stop.value.code == 2
    assert re.match(r"s3://nowhere/set: no such place \(The specified bucket does not exist\); look at the URL", line)
    with pytest.raises(ShardError, match="no manifest.json in 's3://bucket/no'; write one with: python jobs/prepare"):
        open_shards(f"{bucket}/no")
    with pytest.raises(ValueError, match="nowhere://x: .*; give a path, or a URL such as s3://bucket/folder"):
        open_shards("nowhere://x")


def test_a_wrong_credential_and_a_lost_shard_are_one_line_when_a_set_is_opened(sets, bucket, keys):
    (Place.of(sets[1]) / "shard-00002.parquet").unlink()
    with pytest.raises(ShardError, match="s3://bucket/set/shard-00002.parquet: missing; restore the file"):
        open_shards(sets[1])
    with pytest.raises(StoreError, match="s3://bucket/none: nothing is there"):
        open_teacher("s3://bucket/none")
    ask_for_keys(True)
    with pytest.raises(StoreError, match=r"s3://bucket/set/manifest.json: access refused: .*AWS_PROFILE"):
        open_shards(sets[1])
    with pytest.raises(StoreError, match=r"s3://bucket/teacher: access refused"):
        open_teacher("s3://bucket/teacher")


# Whole folders and files


def test_a_folder_is_copied_once_and_again_when_it_has_changed(bucket, monkeypatch):
    url = send(resolve(TEACHER), f"{bucket}/teacher")
    path = local(url)
    assert {p.relative_to(path) for p in path.rglob("*")} == {
        p.relative_to(resolve(TEACHER)) for p in resolve(TEACHER).rglob("*")
    }
    fetched = []
    monkeypatch.setattr(Place, "fetch", lambda self, *args: fetched.append(str(self)))
    assert local(url) == path and not fetched
    monkeypatch.undo()
    os.environ["FEWSTEP_CACHE"] = str(path.parents[2])
    (Place.of(url) / "fewstep.json").write((resolve(TEACHER) / "fewstep.json").read_bytes() + b" ")
    assert local(url) != path
    fake = Place.of(url) / ".." / "escape"
    monkeypatch.setattr(type(fake.fs), "find", lambda *_, **__: {fake.path: {"type": "file", "size": 1}})
    with pytest.raises(StoreError, match="which is no plain path below it"):
        local(url)


def in_another(call: Callable[[], object]) -> None:
    """Calls something in a process of its own, which then ends."""
    process = multiprocessing.get_context("fork").Process(target=call)
    process.start()
    process.join(60)
    assert process.exitcode == 0


def test_folders_that_no_process_uses_make_room_for_others_and_nothing_else_does(tmp_path, monkeypatch):
    """Copies of 1 MiB each, of which three have room; every process that made one has ended, but for the oldest's."""
    monkeypatch.setenv("FEWSTEP_CACHE", str(tmp_path))
    monkeypatch.setenv("FEWSTEP_CACHE_MIB", "3")
    for name in "abcdef":
        Place.of(f"memory://bucket/{name}/weights").write(name.encode() * (1 << 20))
    foreign = [tmp_path / "folders" / "mine" / "thesis.tex", tmp_path / "folders" / "notes"]
    foreign[0].parent.mkdir(parents=True)
    for path in foreign:
        path.write_bytes(b"0" * (4 << 20))
    here = lambda: sorted(path.name for path in (tmp_path / "folders").glob("*/?"))
    fork = multiprocessing.get_context("fork")
    ready, go = fork.Event(), fork.Event()
    user = fork.Process(target=lambda: (local("memory://bucket/a"), ready.set(), go.wait(60)))
    user.start()
    assert ready.wait(60)
    for age, name in enumerate("abc"):
        if name != "a":
            in_another(lambda name=name: local(f"memory://bucket/{name}"))
        (copy,) = (path.parent for path in (tmp_path / "folders").glob(f"*/{name}"))
        os.utime(copy, (age, age))
    in_another(lambda: local("memory://bucket/b"))  # which makes c the oldest that nobody uses
    half = tmp_path / "folders" / f".{'0' * 64}.12345678"  # of a process that was killed
    half.mkdir()
    (half / "part").write_bytes(b"0" * (1 << 20))
    os.utime(half, (0, 0))
    assert here() == ["a", "b", "c"]
    in_another(lambda: local("memory://bucket/d"))
    assert here() == ["a", "b", "d"] and not half.exists()
    monkeypatch.setenv("FEWSTEP_CACHE_MIB", "0")
    assert local("memory://bucket/e").joinpath("weights").read_bytes() == b"e" * (1 << 20)
    assert here() == ["a", "e"]
    go.set()
    user.join(60)
    local("memory://bucket/f")
    assert here() == ["e", "f"]  # both are this process's
    assert all(path.stat().st_size == 4 << 20 for path in foreign)
    monkeypatch.setenv("FEWSTEP_CACHE_MIB", "1 GB")
    with pytest.raises(ConfigError, match="^FEWSTEP_CACHE_MIB: '1 GB' is no number of MiB; give one, such as 20480"):
        local("memory://bucket/f")


def test_a_copy_that_is_being_removed_is_waited_for_and_then_fetched_again(tmp_path, monkeypatch):
    monkeypatch.setenv("FEWSTEP_CACHE", str(tmp_path))
    Place.of("memory://bucket/a/weights").write(b"1")
    in_another(lambda: local("memory://bucket/a"))
    (copy,) = (path.parent for path in (tmp_path / "folders").glob("*/a"))
    with ThreadPoolExecutor() as pool, unused(copy / IN_USE) as free:
        assert free
        waiting = pool.submit(share, copy / IN_USE)
        with pytest.raises(TimeoutError):
            waiting.result(0.2)
        copy.rename(tmp_path / "gone")
        with unused(copy / IN_USE) as there:
            assert not there
    assert waiting.result(30) is False
    assert local("memory://bucket/a").joinpath("weights").read_bytes() == b"1"
    with unused(copy / IN_USE) as free:
        assert not free


def test_a_cache_that_is_read_only_is_read(tmp_path, monkeypatch):
    monkeypatch.setenv("FEWSTEP_CACHE", str(tmp_path))
    Place.of("memory://bucket/a/weights").write(b"1")
    path = local("memory://bucket/a")

    def refused(file: Path) -> bool:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr("fewstep.storage.cache.share", refused)
    assert local("memory://bucket/a") == path


def test_a_network_statistics_and_an_export_at_a_url_are_those_of_the_folder(bucket, tmp_path, capsys):
    shipped = resolve("shipped:fashion_mnist")
    for name in ("teacher", "features.safetensors", "statistics.npz"):
        send(shipped / name, f"{bucket}/{name}")
    arguments = "images=20 batch=20 steps=[1] metrics=[fd_fashion]".split()

    def scores(root: str) -> list[dict]:
        files = [f"features={root}/features.safetensors", f"reference={root}/statistics.npz"]
        job("evaluate")([f"model={root}/teacher", *files, *arguments])
        result = json.loads(capsys.readouterr().out.splitlines()[-1])["scores"]
        return [{key: value for key, value in score.items() if key != "seconds"} for score in result]

    assert scores(bucket) == scores(str(shipped))


# Writing


def pictures(folder: Path, count: int = 12) -> Path:
    for i in range(count):
        (folder / str(i % 2)).mkdir(parents=True, exist_ok=True)
        Image.new("L", (8, 8), 20 * i).save(folder / str(i % 2) / f"{i}.png")
    return folder


def prepare(out: object, photos: Path, *arguments: str) -> None:
    job("prepare")(["source=folder", f"path={photos}", "channels=1", f"out={out}", *arguments])


def test_prepare_writes_the_same_rows_to_a_store_and_the_manifest_last(bucket, tmp_path, capsys, monkeypatch):
    photos = pictures(tmp_path / "photos")
    order = []
    put, write_bytes = Place.put, Place.write
    monkeypatch.setattr(Place, "put", lambda self, path: (order.append(self.name), put(self, path)))
    monkeypatch.setattr(Place, "write", lambda self, data: (order.append(self.name), write_bytes(self, data)))
    prepare(f"{bucket}/set", photos)
    prepare(tmp_path / "set", photos)
    assert json.loads(capsys.readouterr().out.splitlines()[1])["out"] == "s3://bucket/set"
    store, folder = open_shards(f"{bucket}/set"), open_shards(tmp_path / "set")
    shard, (sha256,) = store.manifest.shards[0], [shard.sha256 for shard in folder.manifest.shards]
    assert shard.sha256 == sha256 and shard.file == f"shard-00000-{sha256[:8]}.parquet"
    assert order == [shard.file, "manifest.json"] and same(
        take(StreamFeed(store), 2, batch=4), take(StreamFeed(folder), 2, batch=4)
    )
    feed = open_feed(f"{bucket}/set")
    assert feed.rows == 12 and feed.classes == 2


def test_a_set_in_a_store_is_replaced_as_a_folder_is(bucket, tmp_path, capsys):
    photos, url = pictures(tmp_path / "photos"), f"{bucket}/set"
    prepare(url, photos)
    first = names(url)
    with pytest.raises(SystemExit):
        prepare(url, photos)
    assert "out: 's3://bucket/set' exists; choose another folder, or replace it with" in capsys.readouterr().err
    prepare(url, pictures(tmp_path / "more", 20), "overwrite=true")
    second = names(url)
    assert len(second) == 2 and set(first) & set(second) == {"manifest.json"} and open_shards(url).rows == 20
    (Place.of(url) / "notes.txt").write(b"mine")
    with pytest.raises(SystemExit):
        prepare(url, photos, "overwrite=true")
    assert "also holds 'notes.txt', which is no part of a shard set" in capsys.readouterr().err
    with pytest.raises(FolderError, match="is or contains 's3://bucket/set/a', which is read"):
        ShardWriter(url, (1, 8, 8), overwrite=True, apart=[Place.of(url) / "a"])
    for out, text in ((f"{bucket}/set/notes.txt", "is a file"), ("s3://nowhere/x", "no such place")):
        with pytest.raises(SystemExit):
            prepare(out, photos, "overwrite=true")
        assert re.search(text, capsys.readouterr().err)
    assert names(url) == sorted([*second, "notes.txt"])
    with pytest.raises(SystemExit):
        job("features")(["data=nowhere", "out=s3://nowhere/x"])
    assert capsys.readouterr().err.startswith("out: cannot write in s3://nowhere/x (")  # before the data is looked at


def test_a_set_that_was_not_finished_is_not_there(bucket):
    url = f"{bucket}/set"

    def rows(writer: ShardWriter, value: int) -> None:
        for _ in range(12):
            writer.add(np.full((1, 8, 8), value, np.uint8))
            writer._write_window()

    options = {"shard_bytes": 300, "group_rows": 4}
    with pytest.raises(RuntimeError):
        with ShardWriter(url, (1, 8, 8), **options) as writer:
            rows(writer, 1)
            assert len(names(url)) > 1 and not (writer.output.temp / "shard-00000.parquet").exists()
            raise RuntimeError
    assert names(url) == []
    with ShardWriter(url, (1, 8, 8), **options) as first:
        rows(first, 1)
        with pytest.raises(FolderError, match="exists"), ShardWriter(url, (1, 8, 8), **options):
            pass
        with ShardWriter(f"{bucket}/other", (1, 8, 8), **options) as second:
            rows(second, 2)
    with pytest.raises(ShardError, match="lost while the set was written; start again"):
        with ShardWriter(url, (1, 8, 8), overwrite=True, **options) as writer:
            rows(writer, 3)
            (Place.of(url) / next(iter(writer.output.sent))).unlink()
    assert open_shards(url).manifest == first.manifest and len(names(url)) == len(first.manifest.shards) + 1


def test_what_is_encoded_from_and_to_a_store_is_that_of_a_folder(bucket, tmp_path):
    from fewstep.cluster.encode import Encode
    from fewstep.cluster.session import Sealed

    teacher, made = pipeline("sd15", tmp_path / "sd15"), []
    for root in (tmp_path, Place.of(bucket)):
        with ShardWriter(root / "set", (3, 64, 64), captions=True) as writer:
            for i in range(4):
                writer.add(np.full((3, 64, 64), 60 * i, np.uint8), caption=f"grey {i}")
        encoder = Encode(Sealed((str(root / "set"), str(teacher), root / "parts")), 0, 4, "cpu")
        assert [encoder.encode(0), encoder.encode(0)] == [4, 4]  # the second time it is there
        join([root / "parts" / "00000"], root / "encoded", {"source": "encode"})
        made.append(open_shards(root / "encoded"))
    folder, store = made
    assert folder.manifest.columns == store.manifest.columns and folder.read(0).equals(store.read(0))


def test_an_export_goes_to_a_store_whole(bucket, tmp_path):
    url = Place.of(f"{bucket}/export")
    for text in ("one", "two"):
        with appearing(url, EXPORT, overwrite=text == "two") as folder:
            (folder / "unet").mkdir()
            for name in ("README.md", "unet/config.json", "pipeline.py")[: 3 if text == "one" else 2]:
                (folder / name).write_text(text)
            (folder / "model_index.json").write_text('{"sampling": {}}')
            (folder / "fewstep.json").write_text('{"model": 1, "schedule": 1, "prediction": 1}')
    assert list(url.files()) == ["README.md", "fewstep.json", "model_index.json", "unet/config.json"]
    assert (url / "README.md").read() == b"two"
    with pytest.raises(FolderError, match="exists"), appearing(url, EXPORT, overwrite=False):
        pass


def test_statistics_go_to_a_store_and_replace_their_own_kind_alone(tmp_path, capsys):
    data, url = write(tmp_path / "data", rows=20, size=(1, 28, 28)).path, f"memory://{tmp_path}/statistics"

    def described(out: object) -> dict:
        job("features")([f"data={data}", f"out={out}", "extractor=shipped:fashion_mnist/features.safetensors"])
        return json.loads(capsys.readouterr().out.splitlines()[-1])

    on_disk = described(tmp_path / "statistics")
    for _ in range(2):
        assert described(url) == on_disk | {"out": url}
    file = Place.of(url) / "statistics.npz"
    assert file.read() == (tmp_path / "statistics" / "statistics.npz").read_bytes() and len(names(url)) == 1
    file.write(b"mine")
    with pytest.raises(SystemExit):
        described(url)
    assert "statistics.npz' was not written by this job" in capsys.readouterr().err and file.read() == b"mine"


def test_files_go_to_a_store_in_their_order_when_all_are_written(tmp_path, monkeypatch):
    order, put = [], Place.put
    monkeypatch.setattr(Place, "put", lambda self, path: (order.append(self.name), put(self, path)))
    url, marks = Place.of(f"memory://{tmp_path}/files"), {"b": "ours", "a": "ours"}
    with files_in(url, marks) as folder:
        (folder / "a").write_bytes(b"ours, last")
        (folder / "b").write_bytes(b"ours, first")
        assert not list(url.files())
    assert order == ["b", "a"] and (url / "a").read() == b"ours, last" and not folder.exists()
    with pytest.raises(RuntimeError), files_in(url, marks) as folder:
        (folder / "b").write_bytes(b"half")
        raise RuntimeError
    assert (url / "b").read() == b"ours, first" and list(url.files()) == ["a", "b"]


def test_a_converted_network_goes_to_a_store(tmp_path, monkeypatch):
    monkeypatch.setenv("FEWSTEP_CACHE", str(tmp_path / "cache"))
    torch.save({"a": torch.ones(2, 3)}, tmp_path / "model.bin")
    job("convert")([f"pickle={tmp_path / 'model.bin'}", f"out=memory://{tmp_path}/net"])
    assert names(f"memory://{tmp_path}/net") == ["modules.json", "tensors.safetensors"]
    found = load_file(local(f"memory://{tmp_path}/net") / "tensors.safetensors")
    assert torch.equal(found["a"], torch.ones(2, 3))


def test_every_job_says_which_key_takes_no_url():
    """Pictures, pages and the folders of runs lie on a disk; what other jobs read again may be anywhere."""
    found = {}
    for path in JOBS.glob("*.py"):
        for key in {"out", "each", "storage"} & job(path.stem).settings.model_fields.keys():
            said = ""
            for url in ("s3:/bucket/x", "s3://bucket/x"):
                with pytest.raises(ConfigError) as error:
                    validate(job(path.stem).settings, {key: url, "x": 0})  # x is another mistake
                said += str(error.value)
            assert f"{key}: 's3:/bucket/x' is no path; a URL has two slashes: s3://..." in said
            refused = f"{key}: 's3://bucket/x' is no path; give a path of this machine" in said
            assert said.count(f"{key}:") == 1 + refused
            found[f"{path.stem} {key}"] = not refused
    anywhere = "convert encode export features merge pairs prepare".split()
    assert {key for key, taken in found.items() if taken} == {f"{name} out" for name in anywhere} | {"doctor storage"}


# Other stores


@pytest.mark.parametrize(("protocol", "package"), [("gs", "gcsfs"), ("abfs", "adlfs")])
def test_a_store_of_another_kind_is_used_alike_where_its_package_is_installed(protocol, package, tmp_path, monkeypatch):
    monkeypatch.setenv("FEWSTEP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setitem(sys.modules, package, None)
    url = f"{protocol}://bucket/set"
    for use in (open_shards, local, lambda url: ShardWriter(url, (1, 8, 8))):
        with pytest.raises(ValueError, match=rf"^{url}: {protocol}:// needs another package: pip install {package} "):
            use(url)

    class Installed(DirFileSystem):
        def __init__(self, **options):
            super().__init__(path=str(tmp_path / "store"), fs=LocalFileSystem(auto_mkdir=True))

    Installed.protocol = protocol
    monkeypatch.setitem(_registry, protocol, Installed)
    prepare(url, pictures(tmp_path / "photos"))
    prepare(tmp_path / "set", tmp_path / "photos")
    shards = open_shards(url)
    assert str(shards.path) == url and names(url)[0] == "manifest.json"
    ours, theirs = (take(StreamFeed(found), 4, batch=5) for found in (shards, open_shards(tmp_path / "set")))
    assert same(ours, theirs) and len(copies()) == 1
    assert (local(url) / "manifest.json").read_bytes() == (Place.of(url) / "manifest.json").read()


# Secrets


def test_no_secret_of_a_url_is_written_or_shown(monkeypatch, tmp_path, capsys):
    secret = f"s3cret-{os.getpid()}"
    url = f"sftp://me:{secret}@127.0.0.1/data"
    arguments = [f"data.path={url}/set", f"teacher={url}/teacher", f"evaluate.features={url}/f.safetensors"]
    recipe = load_recipe(["recipe=fashion_mnist", "name=a", *arguments], RECIPES, "")
    assert secret not in json.dumps(recipe.written) + json.dumps(recipe.numbers) + recipe.fingerprint
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe.written))
    again = [f"recipe={tmp_path / 'recipe.yaml'}"]
    with pytest.raises(SystemExit):
        job("distill")([*again, "--dry-run"])
    lines = capsys.readouterr().err.splitlines()
    assert {line.partition(":")[0] for line in lines} == {"data.path", "teacher", "evaluate.features"}
    monkeypatch.setenv("FEWSTEP_STORAGE", url)
    assert load_recipe(again, tmp_path, "") == recipe
    monkeypatch.setenv("FEWSTEP_CACHE", str(tmp_path / "cache"))
    memory = Place.of("memory://bucket/x")
    memory.write(b"1")
    monkeypatch.setattr(Place, "__str__", lambda self: place_module.masked(f"sftp://me:{secret}@host{self.path}"))
    assert local("memory://bucket/x").read_bytes() == b"1"
    assert secret not in " ".join(map(str, (tmp_path / "cache").rglob("*")))
    with pytest.raises(StoreError, match="sftp://me:") as error:
        local("memory://bucket/y")
    assert secret not in str(error.value)
