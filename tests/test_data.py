"""The order is a pure function of (seed, position), shards are what their manifest says, and feeds agree with both."""

from __future__ import annotations

import copy
import functools
import itertools
import json
import operator
import random
import re
import resource
import shutil
import struct
import threading
import time
import tracemalloc
import zlib
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from fewstep.config import ConfigError
from fewstep.data import shards as shards_module
from fewstep.data.decode import CorruptImage, Picture, decode, decode_all, encode
from fewstep.data.feed import MemoryFeed, StreamFeed, ahead, open_feed
from fewstep.data.manifest import Column, ShardError
from fewstep.data.plan import LANES, Plan, mix
from fewstep.data.shards import CorruptRows, ShardWriter, latents, numbers, open_shards
from fewstep.folders import FolderError

GOLDEN = [5, 3, 6, 4, 10, 9, 7, 11, 8, 0, 1, 2, 6, 3, 4, 5, 11, 7, 8, 9, 10, 0, 1, 2]
UNITS = [7, 60, 1, 33, 60, 60, 12, 60, 5, 60, 41]


def write(out, rows=200, size=(1, 12, 12), classes=10, bad=(), monkeypatch=None, **options):
    """A set whose image number i has all pixels i mod 256 and label i mod classes; `bad` ones are bytes, no image."""
    if bad:
        monkeypatch.setattr(shards_module, "read_picture", lambda *_, **__: Picture(None, ()))
    with ShardWriter(out, size, classes=classes, **({"group_rows": 16, "shard_bytes": 4000} | options)) as writer:
        for i in range(rows):
            image = b"\x89PNG broken" if i in bad else np.full(size, i % 256, np.uint8)
            writer.add(image, i % classes if classes else None)
    if bad:
        monkeypatch.undo()
    return open_shards(out)


def take(feed, batches, position=0, batch=24, rank=0, world=1):
    """Batches as the tuples of their columns."""
    return [tuple(rows.values()) for rows in itertools.islice(feed.batches(position, batch, rank, world), batches)]


def same(a, b):
    return all(all(map(torch.equal, x, y)) for x, y in zip(a, b, strict=True))


# the order


def test_the_hash_is_splitmix64():
    # The first output of the published generator seeded with 0.
    assert int(mix(0)[0]) == 0xE220A8397B1DCDAF


def test_the_order_never_changes():
    """A checkpoint's position means the same images in every later version."""
    assert Plan([3, 4, 5], seed=0).rows(0, 24).tolist() == GOLDEN


def test_every_epoch_is_a_permutation_and_no_two_are_equal():
    plan = Plan(UNITS, seed=3)
    orders = [plan.rows(epoch * plan.rows_total, plan.rows_total) for epoch in range(4)]
    for order in orders:
        assert sorted(order.tolist()) == list(range(sum(UNITS)))
    other = Plan(UNITS, seed=4).rows(0, plan.rows_total)
    assert all(not np.array_equal(a, b) for a, b in itertools.combinations([*orders, other], 2))


@pytest.mark.parametrize("world", [1, 2, 3, 4, 8])
def test_ranks_share_the_same_global_batches(world):
    plan, batch = Plan(UNITS, seed=1), 24
    for position in range(0, 2 * plan.rows_total, batch):  # over the seam of two epochs
        parts = [plan.rows(position, batch, rank, world) for rank in range(world)]
        assert np.stack(parts, 1).ravel().tolist() == plan.rows(position, batch).tolist()


def test_a_batch_mixes_units():
    plan = Plan([1000] * 64, seed=0)
    units = {plan.unit(row)[0] for row in plan.rows(0, 64).tolist()}
    assert len(units) == LANES


@pytest.mark.parametrize("world", [1, 2, 3, 4, 5, 8, 32])
@pytest.mark.parametrize("position", [0, 1, 17, 398, 399, 1000])
def test_pieces_give_each_rank_its_rows_where_it_needs_them(world, position):
    plan, mine = Plan(UNITS, seed=2), 90
    expected = plan.rows(position, mine * world)
    for rank in range(world):
        got, first = np.full(mine, -1), -1
        for piece in plan.pieces(position, rank, world):
            assert piece.places[0] >= first and np.all(np.diff(piece.places) > 0)
            first = piece.places[0]
            if first >= mine:
                break
            near = piece.places < mine
            assert np.all(got[piece.places[near]] == -1)
            got[piece.places[near]] = plan.first[piece.unit] + piece.rows[near]
        assert np.array_equal(got, expected[rank::world])


@pytest.mark.parametrize("world", [1, 2, 4, 8, 16])
def test_a_unit_is_read_by_one_rank_unless_a_lane_ends_in_it(world):
    plan = Plan([50] * 64)
    readers: dict[int, set[int]] = {}
    for rank in range(world):
        for piece in itertools.takewhile(lambda p: p.epoch == 0, plan.pieces(0, rank, world)):
            readers.setdefault(piece.unit, set()).add(rank)
    assert sum(len(ranks) for ranks in readers.values()) <= 64 + LANES - 1
    assert sum(len(ranks) > 1 for ranks in readers.values()) < LANES


def test_flips_are_a_fair_coin_per_epoch_and_row():
    plan, rows = Plan(UNITS, seed=0), np.arange(20000)
    first, second = (plan.flips(np.full(20000, epoch), rows) for epoch in (0, 1))
    for coin in (first, second, first == second):
        assert abs(coin.mean() - 0.5) < 4 * 0.5 / np.sqrt(20000)
    assert np.array_equal(plan.flips(np.zeros(10, int), rows[:10]), first[:10])


def test_stand_ins_are_the_rest_of_the_unit_and_then_the_units_that_follow_in_the_epoch():
    plan = Plan([4, 6, 3], seed=5)
    for row in range(13):
        unit, inside = plan.unit(row)
        (own, others), *following = plan.stand_ins(7, row)
        assert own == unit and plan.unit(int(following[0][1][0])) == (
            following[0][0],
            inside % [4, 6, 3][following[0][0]],
        )
        assert sorted([*others, row]) == list(range(int(plan.first[unit]), int(plan.first[unit + 1])))
        order = plan._epoch(7)[0].tolist()
        assert [u for u, _ in following] == (2 * order)[order.index(unit) + 1 :][:2]
        for u, ids in following:
            assert sorted(ids.tolist()) == list(range(int(plan.first[u]), int(plan.first[u + 1])))


@pytest.mark.parametrize("batch, rank, world", [(10, 0, 3), (8, 2, 2), (0, 0, 1), (4, 0, 0)])
def test_a_batch_that_cannot_be_shared_is_refused(batch, rank, world):
    with pytest.raises(ValueError, match="batch|rank"):
        Plan([5]).rows(0, batch, rank, world)


# pixels


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("format", ["png", "webp"])
def test_lossless_formats_return_every_pixel(channels, format):
    pixels = np.random.default_rng(0).integers(0, 256, (channels, 9, 14), dtype=np.uint8)
    if channels == 1 and format == "webp":  # webp knows colour only: grey comes back through its luma
        assert np.abs(decode(encode(pixels, format), pixels.shape).astype(int) - pixels).max() <= 1
    else:
        assert np.array_equal(decode(encode(pixels, format), pixels.shape), pixels)


def test_jpeg_is_near():
    ramp = np.broadcast_to(np.arange(0, 256, 4, dtype=np.uint8), (3, 64, 64))
    assert np.abs(decode(encode(ramp, "jpeg"), (3, 64, 64)).astype(int) - ramp).max() <= 6


def test_bad_bytes_are_named_and_the_rest_is_decoded():
    good = encode(np.full((1, 8, 8), 7, np.uint8))
    other = encode(np.zeros((1, 8, 9), np.uint8))
    pixels, bad = decode_all([good, b"", good[:40], other, good], (1, 8, 8))
    assert [i for i, _ in bad] == [1, 2, 3] and "8x9" in bad[2][1]
    assert [int(p.max()) for p in pixels] == [7, 0, 0, 0, 7]


def test_a_forged_size_is_refused_before_it_is_unpacked():
    data = bytearray(encode(np.zeros((1, 28, 28), np.uint8)))
    data[16:24] = struct.pack(">II", 9000, 9000)  # width and height in a PNG's header, and its checksum
    data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    tracemalloc.start()
    with pytest.raises(CorruptImage, match="9000x9000 pixels where the set has 28x28"):
        decode(bytes(data), (1, 28, 28))
    assert tracemalloc.get_traced_memory()[1] < 1e6
    tracemalloc.stop()


# shards


def test_what_is_written_is_read(tmp_path):
    shards = write(tmp_path / "set", rows=200)
    assert len(shards.manifest.shards) > 1 and shards.rows == 200 and shards.classes == 10
    table = pa.concat_tables(shards.read(unit) for unit in range(len(shards.units)))
    values = np.array([decode(data, shards.size)[0, 0, 0] for data in table.column("image").to_pylist()])
    assert sorted(values.tolist()) == list(range(200))
    assert np.array_equal(table.column("label").to_numpy(), values % 10)
    assert values.tolist() != list(range(200))  # shuffled, so that a row group is a sample of all
    assert sum(unit.rows for unit in shards.units) == 200


def test_a_set_appears_whole_or_not_at_all(tmp_path):
    with pytest.raises(RuntimeError, match="half way"):
        with ShardWriter(tmp_path / "set", (1, 4, 4)) as writer:
            writer.add(np.zeros((1, 4, 4), np.uint8))
            raise RuntimeError("half way")
    assert list(tmp_path.iterdir()) == []


def test_an_existing_set_is_replaced_only_when_asked(tmp_path):
    write(tmp_path / "set", rows=20)
    with pytest.raises(FolderError, match="overwrite=true"):
        write(tmp_path / "set", rows=30)
    assert write(tmp_path / "set", rows=30, overwrite=True).rows == 30
    assert [path.name for path in tmp_path.iterdir()] == ["set"]


def test_rows_that_do_not_fit_are_refused(tmp_path):
    with ShardWriter(tmp_path / "set", (1, 4, 4), classes=3) as writer:
        with pytest.raises(ValueError, match="label: 3"):
            writer.add(np.zeros((1, 4, 4), np.uint8), 3)
        with pytest.raises(ValueError, match="shape"):
            writer.add(np.zeros((3, 4, 4), np.uint8), 1)
        with pytest.raises(CorruptImage, match="5x5"):
            writer.add(encode(np.zeros((1, 5, 5), np.uint8)), 1)
        writer.add(np.zeros((1, 4, 4), np.uint8), 1)


def _edit_manifest(path, change):
    data = json.loads((path / "manifest.json").read_text())
    change(data)
    (path / "manifest.json").write_text(json.dumps(data))


def _rewrite(path, change):
    """The first shard with other rows, and a manifest that vouches for its bytes."""
    file = path / "shard-00000.parquet"
    groups = [change(pq.ParquetFile(file).read_row_group(i)) for i in range(pq.ParquetFile(file).num_row_groups)]
    with pq.ParquetWriter(file, groups[0].schema) as writer:
        for group in groups:
            writer.write_table(group)

    def vouch(data):
        data["shards"][0] |= {"bytes": file.stat().st_size, "sha256": shards_module.sha256_of(file)}

    _edit_manifest(path, vouch)


def _flip_byte(path):
    file = path / "shard-00001.parquet"
    column = pq.ParquetFile(file).metadata.row_group(1).column(0)
    data = bytearray(file.read_bytes())
    data[column.data_page_offset + column.total_compressed_size - 9] ^= 1
    file.write_bytes(data)


def _cut(path):
    (path / "shard-00001.parquet").write_bytes((path / "shard-00001.parquet").read_bytes()[:-100])


def _cut_and_vouch(path):
    _cut(path)
    file = path / "shard-00001.parquet"
    _edit_manifest(
        path,
        lambda data: data["shards"][1].update(bytes=file.stat().st_size, sha256=shards_module.sha256_of(file)),
    )


def _set(table, column, values):
    return table.set_column(table.column_names.index(column), column, values)


DAMAGE = {
    "no manifest": (lambda p: (p / "manifest.json").unlink(), r"no manifest.json in .*prepare.py"),
    "bad manifest": (lambda p: (p / "manifest.json").write_text("{}"), r"manifest.json: not a manifest"),
    "missing shard": (lambda p: (p / "shard-00001.parquet").unlink(), r"shard-00001.parquet: missing.*prepare.py"),
    "cut short": (_cut, r"shard-00001.parquet: \d+ bytes, the manifest says \d+"),
    "cut short, vouched for": (_cut_and_vouch, r"shard-00001.parquet: not a readable Parquet file"),
    "one bit changed": (_flip_byte, r"shard-00001.parquet: its sha256"),
    "other columns": (lambda p: _rewrite(p, lambda t: t.rename_columns(["pixels", "label"])), r"columns \(pixels"),
    "fewer rows": (lambda p: _rewrite(p, lambda t: t.slice(1)), r"shard-00000.parquet: \d+ rows in"),
    "label out of range": (
        lambda p: _rewrite(p, lambda t: _set(t, "label", pa.array([10] * t.num_rows, pa.int64()))),
        r"row 0 has the label 10, the manifest says 0 <= label < 10",
    ),
    "other size": (
        lambda p: _edit_manifest(p, lambda data: (data.update(size=[1, 16, 16]), data.pop("columns"))),
        r"shard-00000.parquet: images of 12x12 pixels",
    ),
    "wrong total": (lambda p: _edit_manifest(p, lambda data: data.update(rows=7)), r"says 7 rows, its shards have"),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_damage_is_found_at_opening_and_named(tmp_path, what):
    write(tmp_path / "set")
    damage, text = DAMAGE[what]
    damage(tmp_path / "set")
    with pytest.raises(ShardError, match=text):
        open_shards(tmp_path / "set")


# A manifest's fields, each with a value that it cannot have, and what is said of it.
MISTAKES = {
    "format": [(2, "format: 2, and 1 is read"), (None, "format: None")],
    "kind": [("video", "kind: 'video' is not one of image, latent"), ("latent", "'png' is no encoding of latents")],
    "rows": [(-1, "rows: must be at least 0"), ("many", "rows: expected a whole number")],
    "size": [([2, 12, 12], "size: [2, 12, 12]; an image has 1 or 3 channels"), ([1, 0, 12], "size.1: must be at lea"),
             ([1, 1 << 20, 1], "size.1: must be at most 65536"), ([3, 65536, 65536], "at most 268435456 values"),
             ([1, 12], "shape: [1, 12]; the kind image has 3 axes")],
    "range": [([255, 0], "range: [255.0, 0.0]; images have values up to 255"), ([0, float("nan")], "range.1"),
              ([0], "range: its value number 2 is missing")],
    "encoding": [("gif", "encoding: 'gif' is not one of png")],
    "classes": [(-1, "classes: must be at least 0"), (10**9, "classes: must be at most 1e+06"),
                (0, "columns: 'label' is not as kind, size, encoding, classes and captions say")],
    "class_names": [(["a"], "class_names: 1 names for 10 classes")],
    "columns": [([{"name": "image", "kind": "image", "shape": [1, 9, 9], "dtype": "uint8"}], "'image' is not as kind"),
                ([{"name": "../x", "kind": "pooled", "shape": [3], "dtype": "float16"}], "'../x' names no column"),
                ([{"name": "x", "kind": "pooled", "shape": [3], "dtype": "object"}], "'object'; the kind pooled is")],
    "shards.0.file": [(name, "is no plain name") for name in ("../set/shard-00000.parquet", "/etc/passwd", "a/b", "",
                                                              ".", "a\nb", "x" * 999)],
    "shards.0.rows": [(1, "rows: 1, but its row_groups have"), (0, "shards.0.rows: must be at least 1")],
    "shards.0.row_groups": [([-5, 5], "row_groups.0: must be at least 1"), ("all", "row_groups: expected a list")],
    "shards.0.sha256": [("", "shards.0.sha256")],
    "shards.1.file": [("shard-00000.parquet", "shards: 'shard-00000.parquet' is listed twice")],
    "shards": [({}, "shards: expected a list"), ([None], "shards.0: expected fields")],
    "nothing": [(1, "nothing: no such key")],
}  # fmt: skip


@pytest.fixture(scope="module")
def good_set(tmp_path_factory):
    return write(tmp_path_factory.mktemp("data") / "set")


@pytest.mark.parametrize("field", MISTAKES)
def test_a_manifest_that_makes_no_sense_is_refused_in_one_line_that_names_the_field(tmp_path, good_set, field):
    folder = shutil.copytree(good_set.path, tmp_path / "set", dirs_exist_ok=True)
    whole = json.loads((folder / "manifest.json").read_text())
    for value, text in MISTAKES[field]:
        data = json.loads(json.dumps(whole))
        *above, last = (int(part) if part.isdigit() else part for part in field.split("."))
        functools.reduce(operator.getitem, above, data)[last] = value
        (folder / "manifest.json").write_text(json.dumps(data))
        with pytest.raises(ShardError) as error:
            open_shards(folder)
        line = str(error.value)
        assert text in line and "manifest.json: not a manifest of format 1 (" in line and "\n" not in line


@pytest.mark.parametrize(
    "content, text",
    [
        (b"", "not valid JSON"),
        (b"[]", "expected an object {...}, got []"),
        (b"\xff", "not UTF-8 text (line 1, byte 0xff)"),
        (b"[" * 100_000, "more than 64 values inside each other"),
        (b'{"rows": ' + b"9" * 5000 + b"}", "has 5,000 digits, and a whole number at most 40"),
    ],
)
def test_a_manifest_that_is_no_json_object_is_named(tmp_path, content, text):
    (tmp_path / "manifest.json").write_bytes(content)
    with pytest.raises(ShardError) as error:
        open_shards(tmp_path)
    assert f"{tmp_path / 'manifest.json'}: " in str(error.value) and text in str(error.value)


def test_a_manifest_without_columns_has_the_usual_ones(tmp_path, good_set):
    folder = shutil.copytree(good_set.path, tmp_path / "set")
    _edit_manifest(folder, lambda data: data.pop("columns"))
    old = open_shards(folder)
    assert old.manifest.columns == () and old.manifest.all_columns == good_set.manifest.columns
    assert [(column.name, column.shape) for column in old.manifest.all_columns] == [
        ("image", (1, 12, 12)),
        ("label", ()),
    ]
    assert same(take(MemoryFeed(old), 3), take(MemoryFeed(good_set), 3))
    assert open_shards("shipped:fashion_mnist/shards").manifest.columns == ()


TEXT = Column(name="text", kind="text", shape=(3, 2), dtype="float16")
POOLED = Column(name="pooled", kind="pooled", shape=(5,), dtype="float32")


def write_latents(out, columns=(), rows=12, **options):
    rng = np.random.default_rng(0)
    values = [
        {column.name: rng.normal(size=column.shape).astype(column.dtype) for column in columns} for _ in range(rows)
    ]
    with ShardWriter(
        out, (4, 3, 2), encoding="float16", columns=columns, group_rows=5, captions=True, **options
    ) as writer:
        for i, row in enumerate(values):
            writer.add(np.full((4, 3, 2), i, np.float32), caption=str(i), **row)
    return open_shards(out), values


def test_further_columns_are_listed_and_read_when_they_are_asked_for(tmp_path):
    shards, values = write_latents(tmp_path / "set", (TEXT, POOLED))
    assert [column.name for column in shards.manifest.columns] == ["latent", "caption", "text", "pooled"]
    assert shards.columns == ["latent", "caption", "text", "pooled"] == shards.read(0).column_names
    for unit in range(len(shards.units)):
        table = shards.read(unit, columns=["caption", "text", "pooled"])
        for name in ("text", "pooled"):
            read = numbers(table, shards.column(name))
            wanted = [values[int(caption)][name] for caption in table.column("caption").to_pylist()]
            assert read.dtype == shards.column(name).dtype and np.array_equal(read, wanted)
    assert same(take(StreamFeed(shards), 3, batch=4), take(MemoryFeed(shards), 3, batch=4))
    with pytest.raises(ShardError, match="no column 'mask'; it has latent, caption, text, pooled"):
        shards.column("mask")
    with ShardWriter(tmp_path / "never", (1, 4, 4), columns=(POOLED,)) as writer:
        with pytest.raises(ValueError, match=r"columns: \[\] where the set has \['pooled'\]"):
            writer.add(np.zeros((1, 4, 4), np.uint8))
        with pytest.raises(ValueError, match=r"pooled: shape \(4,\) where the set has \(5,\)"):
            writer.add(np.zeros((1, 4, 4), np.uint8), pooled=np.zeros(4))
        writer.add(np.zeros((1, 4, 4), np.uint8), pooled=np.zeros(5))


def _number(column, row, value):
    """Replaces one number of a column of lists; None is a missing one."""

    def change(table):
        rows = table.column(column).to_pylist()
        if row < len(rows):
            rows[row] = value if value is None else [value, *rows[row][1:]]
        return _set(table, column, pa.array(rows, table.schema.field(column).type))

    return lambda path: _rewrite(path, change)


def _labels(label):
    """Other labels for all rows: a function of their number in the row group."""
    return lambda p: _rewrite(p, lambda t: _set(t, "label", pa.array([label(i) for i in range(len(t))], pa.int64())))


VALUES = {
    "label missing": (_labels(lambda i: None if i > 2 else 1), "row 3 has no label"),
    "label negative": (_labels(lambda i: -1), "row 0 has the label -1, the manifest says 0 <= label < 10"),
    "caption missing": (lambda p: _rewrite(p, lambda t: _set(t, "caption", pa.nulls(len(t), pa.string()))),
                        "row 0 has no caption"),
    "latent missing": (_number("latent", 2, None), "not a readable Parquet file (Expected all lists to be of size=24"),
    "latent's number missing": (lambda p: _rewrite(p, lambda t: _set(t, "latent", pa.array(
        [[None] * 24] * len(t), t.schema.field("latent").type))), "row 0 has no latent"),
    "latent not a number": (_number("latent", 4, float("nan")), "row 4 has a number nan in the column 'latent'"),
    "latent infinite": (_number("latent", 1, float("-inf")), "row 1 has a number -inf in the column 'latent'"),
    "latent beyond the range": (_number("latent", 0, 11.5), "row 0 has a number 11.5 in the column 'latent', and there "
                                "are 0 to 11"),
    "embedding not a number": (_number("text", 3, float("nan")), "row 3 has a number nan in the column 'text', and a"),
    "embedding missing": (_number("pooled", 3, None), "not a readable Parquet file (Expected all lists to be of size"),
}  # fmt: skip


@pytest.mark.parametrize("what", VALUES)
def test_a_missing_or_impossible_value_is_found_at_opening_and_named_by_its_row(tmp_path, what):
    damage, text = VALUES[what]
    if what.startswith("label"):
        write(tmp_path / "set")
    else:
        write_latents(tmp_path / "set", (TEXT, POOLED))
    damage(tmp_path / "set")
    with pytest.raises(ShardError, match=f"shard-00000.parquet: {re.escape(text)}"):
        open_shards(tmp_path / "set")
    open_shards(tmp_path / "set", verify="size")  # looks at no value


def test_impossible_numbers_are_not_written(tmp_path):
    with ShardWriter(tmp_path / "set", (1, 1, 2), encoding="float16", columns=(POOLED,)) as writer:
        for value in (float("nan"), float("inf"), 1e5, -2e4):
            with pytest.raises(
                ValueError, match="latent: a number (nan|inf|-20000) in the column 'latent', and there are"
            ):
                writer.add(np.array([[[0, value]]]), pooled=np.zeros(5))
        with pytest.raises(ValueError, match="pooled: a number nan in the column 'pooled', and all are finite"):
            writer.add(np.zeros((1, 1, 2)), pooled=np.full(5, np.nan))
        writer.add(np.array([[[-3, 7]]]), pooled=np.zeros(5))
    assert open_shards(tmp_path / "set").manifest.range == (-3, 7)


def test_a_latent_set_whose_manifest_allows_any_number_is_refused(tmp_path):
    write_latents(tmp_path / "set")
    _edit_manifest(tmp_path / "set", lambda data: data.update(range=[-1e30, 1e30]))
    with pytest.raises(ShardError, match="latents have values up to 10000, the smallest first"):
        open_shards(tmp_path / "set")


def test_parquet_files_that_are_no_set_name_the_source_that_reads_them(tmp_path):
    pq.write_table(pa.table({"image": [b""]}), tmp_path / "train-00000-of-00001.parquet")
    with pytest.raises(ShardError, match=f"prepare.py source=parquet path={tmp_path} out=..."):
        open_shards(tmp_path)


HOSTILE = [None, True, -1, 0, 1, 7, 2**31, 2**63, 10**39, 0.5, -0.0, 1e308, float("nan"), float("inf"),
           "", "x", "../x", "/etc/passwd", "a\0b", "\ud800", "\u2028", "9" * 50, "shard-00001.parquet", "float16",
           "latent", "x" * 70_000, [], [[]], [None], [1, 2, 3], [3, 12, 12], [0, 255], [2**40] * 3,
           list(range(3000)), {}, {"file": "x"}]  # fmt: skip


def places(data):
    """(container, key) of every value in nested lists and mappings."""
    for key in data if isinstance(data, dict) else range(len(data)) if isinstance(data, list) else ():
        yield data, key
        yield from places(data[key])


def mutated(text, rng):
    """A manifest with one to three fields replaced, removed, doubled or nested, or with some of its bytes changed."""
    if rng.random() < 0.2:
        data = bytearray(text)
        for _ in range(rng.choice((1, 1, 3, 20))):
            at = rng.randrange(len(data))
            data[at : at + rng.choice((0, 1, 1, 50))] = rng.randbytes(rng.choice((0, 1, 1, 4)))
        return bytes(data)
    data = json.loads(text)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        above, key = rng.choice(list(places(data)))
        kind = rng.random()
        if kind < 0.7:
            above[key] = copy.deepcopy(rng.choice(HOSTILE))
        elif kind < 0.8:
            del above[key]
        elif kind < 0.9 and isinstance(above, list):
            above.insert(key, copy.deepcopy(rng.choice(above)))
        else:
            above[rng.choice(["x", "columns"]) if isinstance(above, dict) else key] = {"a": above[key]}
    return json.dumps(data).encode()


@pytest.mark.slow
def test_five_hundred_damaged_manifests_end_in_a_batch_or_in_one_line(tmp_path, monkeypatch):
    """Seeded; each within 10 s, and all within 2 GiB more than the process has."""
    monkeypatch.chdir(tmp_path)
    sets = {"images": write(tmp_path / "images", rows=60), "latents": write_latents(tmp_path / "latents", (TEXT,))[0]}
    texts = [(name, (tmp_path / name / "manifest.json").read_bytes()) for name in sets]
    listed = sets["images"].manifest.model_dump(mode="json")
    texts.append(("images", json.dumps({key: listed[key] for key in listed if key != "columns"}).encode()))
    rng, batches, lines = random.Random(0), 0, set()
    before = resource.getrlimit(resource.RLIMIT_AS)
    now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + (2 << 30), before[1]))
    try:
        for i in range(500):
            name, text = texts[i % len(texts)]
            (tmp_path / name / "manifest.json").write_bytes(mutated(text, rng))
            started = time.perf_counter()
            try:
                with open_feed(tmp_path / name, memory_bytes=rng.choice((0, 1 << 20))) as feed:
                    next(feed.batches(0, 4))
                    batches += 1
            except (ShardError, ConfigError) as error:
                assert "\n" not in str(error) and str(tmp_path / name) in str(error) and len(str(error)) < 1000
                lines.add(str(error))
            assert time.perf_counter() - started < 10
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
    assert batches >= 10 and len(lines) > 200


def test_a_missing_folder_says_how_to_make_one(tmp_path):
    with pytest.raises(ShardError, match=r"data.path: no folder .*python jobs/prepare.py"):
        open_shards(tmp_path / "nowhere")


def test_the_quick_look_leaves_changed_bytes_to_the_page_checksums(tmp_path):
    write(tmp_path / "set")
    _flip_byte(tmp_path / "set")
    shards = open_shards(tmp_path / "set", verify="size")
    with pytest.raises(ShardError, match="shard-00001.parquet: row group 1 cannot be read"):
        for unit in range(len(shards.units)):
            shards.read(unit)


def test_the_shipped_images_are_whole():
    shards = open_shards("shipped:fashion_mnist/shards")
    assert (shards.rows, shards.size, shards.classes) == (10000, (1, 28, 28), 10)
    assert sum(shard.bytes for shard in shards.manifest.shards) < 6e6
    labels = np.concatenate([shards_module.labels(shards.read(unit)) for unit in range(len(shards.units))])
    assert np.all(np.abs(np.bincount(labels, minlength=10) - 1000) < 4 * np.sqrt(900))


# feeds


def test_pixels_arrive_in_minus_one_to_one_with_their_labels(tmp_path):
    shards = write(tmp_path / "set", rows=256)
    images, labels = take(MemoryFeed(shards), 1, batch=256)[0]
    assert images.shape == (256, 1, 12, 12) and images.dtype == torch.float32 and labels.dtype == torch.int64
    values = ((images[:, 0, 0, 0] + 1) * 127.5).round().long()
    assert sorted(values.tolist()) == list(range(256)) and torch.equal(labels, values % 10)
    assert float(images.min()) == -1 and float(images.max()) == 1


@pytest.mark.parametrize("world", [1, 2, 3, 8])
def test_streaming_equals_memory_for_every_rank(tmp_path, world):
    shards = write(tmp_path / "set")
    memory, stream = MemoryFeed(shards, seed=4, flip=True), StreamFeed(shards, seed=4, flip=True)
    whole = take(memory, 20, position=120)
    for rank in range(world):
        ours = take(stream, 20, position=120, rank=rank, world=world)
        assert all(torch.equal(a[0], b[0][rank::world]) for a, b in zip(ours, whole, strict=True))
        assert same(ours, take(memory, 20, position=120, rank=rank, world=world))


@pytest.mark.parametrize("kind", [MemoryFeed, StreamFeed])
def test_a_resumed_stream_continues_where_it_was(tmp_path, kind):
    shards = write(tmp_path / "set")
    whole = take(kind(shards, seed=1), 20)
    for done in (1, 7, 19):
        assert same(take(kind(shards, seed=1), 20 - done, position=24 * done), whole[done:])


@pytest.mark.fault
@pytest.mark.parametrize("kind", [MemoryFeed, StreamFeed])
def test_another_world_goes_on_at_the_first_unseen_row(tmp_path, kind):
    """Two ranks consume the first 72 images; worlds of 1 to 4 give the other 178 of the epoch, then the next one."""
    shards = write(tmp_path / "set", rows=250)
    plan = kind(shards, seed=6).plan

    def images(position, batches, world):
        parts = [take(kind(shards, seed=6), batches, position, rank=rank, world=world) for rank in range(world)]
        return torch.cat([torch.stack([part[i][0] for part in parts], 1).flatten(0, 1) for i in range(batches)])

    values = lambda x: ((x[:, 0, 0, 0] + 1) * 127.5).round().long().tolist()
    seen = values(images(0, 3, world=2))
    tails = [values(images(72, 12, world)) for world in (1, 2, 3, 4)]
    assert tails[1:] == tails[:1] * 3
    assert sorted(seen + tails[0][:178]) == list(range(250))
    assert sorted(plan.rows(0, 72).tolist() + plan.rows_at(np.arange(72, 250)).tolist()) == list(range(250))


def test_flipped_images_are_mirrored(tmp_path):
    ramp = np.broadcast_to(np.arange(12, dtype=np.uint8), (1, 12, 12))
    with ShardWriter(tmp_path / "set", (1, 12, 12)) as writer:
        for _ in range(50):
            writer.add(ramp)
    plain, mirrored = (take(open_feed(tmp_path / "set", flip=flip), 1, batch=50)[0][0] for flip in (False, True))
    kept = (mirrored == plain).flatten(1).all(1)
    turned = (mirrored == plain.flip(-1)).flatten(1).all(1)
    assert torch.all(kept ^ turned) and 10 < int(turned.sum()) < 40


def test_columns_of_numbers_arrive_with_their_rows(tmp_path):
    text = Column(name="text", kind="text", shape=(2, 3), dtype="float16")
    with ShardWriter(tmp_path / "set", (1, 4, 4), columns=(text,), group_rows=7) as writer:
        for i in range(30):
            writer.add(np.full((1, 4, 4), i, np.uint8), text=np.full((2, 3), i / 8))
    shards = open_shards(tmp_path / "set")
    assert shards.decoded_bytes == 30 * (16 + 6 * 2)
    for feed in (MemoryFeed(shards), StreamFeed(shards)):
        with feed:
            rows = next(feed.batches(0, 30))
        number = ((rows["real"][:, 0, 0, 0] + 1) * 127.5).round()
        assert sorted(number.tolist()) == list(range(30))
        assert rows["text"].dtype == torch.float32
        assert torch.equal(rows["text"], (number / 8).view(-1, 1, 1).expand(-1, 2, 3))


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_latents_arrive_as_stored(tmp_path, dtype):
    numbers = np.random.default_rng(0).normal(size=(40, 4, 3, 2)).astype(dtype)
    with ShardWriter(tmp_path / "set", (4, 3, 2), encoding=dtype, classes=40, group_rows=9) as writer:
        for i, latent in enumerate(numbers):
            writer.add(latent, i)
    shards = open_shards(tmp_path / "set")
    assert shards.manifest.range == (float(numbers.min()), float(numbers.max()))
    assert latents(shards.read(0), shards.size).dtype == dtype
    for feed in (MemoryFeed(shards), StreamFeed(shards)):
        images, labels = take(feed, 1, batch=40)[0]
        assert torch.equal(images, torch.from_numpy(numbers[labels.numpy()]).float())
    with pytest.raises(ValueError, match="data.flip"):
        MemoryFeed(shards, flip=True)


def test_columns_are_found_by_name_and_by_place(tmp_path):
    rows = next(MemoryFeed(write(tmp_path / "set")).batches(0, 8))
    assert list(rows) == ["real", "label"] and rows[0] is rows["real"] and rows[1] is rows["label"]
    with pytest.raises(KeyError):
        rows["caption"]


def test_captions_follow_their_images_and_labels_may_be_missing(tmp_path):
    with ShardWriter(tmp_path / "set", (1, 4, 4), captions=True, group_rows=7) as writer:
        for i in range(30):
            writer.add(np.full((1, 4, 4), i, np.uint8), caption=f"number {i}")
    shards = open_shards(tmp_path / "set")
    assert shards.classes == 0
    for feed in (MemoryFeed(shards, captions=True), StreamFeed(shards, captions=True)):
        images, captions = take(feed, 1, batch=30)[0]  # without a column of labels
        numbers = ((images[:, 0, 0, 0] + 1) * 127.5).round().int().tolist()
        assert captions == [f"number {i}" for i in numbers]


def test_open_feed_streams_what_does_not_fit(tmp_path):
    write(tmp_path / "set")
    size = 200 * 12 * 12
    assert type(open_feed(tmp_path / "set", memory_bytes=size)) is MemoryFeed
    assert type(open_feed(tmp_path / "set", memory_bytes=size - 1)) is StreamFeed


# what goes wrong in the middle


@pytest.mark.parametrize("world", [1, 2, 3])
def test_corrupt_rows_are_named_and_replaced_alike_everywhere(tmp_path, monkeypatch, world):
    shards = write(tmp_path / "set", rows=250, bad=(3, 50, 51, 249), monkeypatch=monkeypatch)
    memory, stream = (kind(shards, seed=2, max_corrupt=0.02) for kind in (MemoryFeed, StreamFeed))
    assert len(memory.corrupt) == 4 and all("shard-0000" in name and " row " in name for name in memory.corrupt)
    whole = take(memory, 25)
    values = torch.cat([((images[:, 0, 0, 0] + 1) * 127.5).round().long() for images, _ in whole])
    assert not set(values.tolist()) & {3, 50, 51, 249}
    assert torch.equal(torch.cat([labels for _, labels in whole]), values % 10)
    for rank in range(world):
        assert same(take(stream, 25, rank=rank, world=world), take(memory, 25, rank=rank, world=world))
    assert stream.corrupt == memory.corrupt


@pytest.mark.parametrize("kind", [MemoryFeed, StreamFeed])
def test_too_many_corrupt_rows_stop_and_are_listed(tmp_path, monkeypatch, kind):
    shards = write(tmp_path / "set", rows=250, bad=(3, 50, 51, 249), monkeypatch=monkeypatch)
    with pytest.raises(CorruptRows, match=r"4 corrupt rows, 3 allowed(.|\n)*shard-0000\d.parquet row \d+"):
        take(kind(shards, max_corrupt=0.015), 25)


LOSSES = {
    "removed": lambda file: file.unlink(),
    "cut short": lambda file: file.write_bytes(file.read_bytes()[:-100]),
    "emptied": lambda file: file.write_bytes(b""),
}


def lost_rows(shards, number):
    """The row ids of a shard."""
    first = sum(shard.rows for shard in shards.manifest.shards[:number])
    return range(first, first + shards.manifest.shards[number].rows)


@pytest.mark.fault
@pytest.mark.parametrize("damage", LOSSES)
def test_a_shard_lost_in_mid_run_stops_it_above_the_limit_and_is_named_with_its_rows(tmp_path, damage):
    shards = write(tmp_path / "set", rows=2000)
    feed = StreamFeed(shards, max_corrupt=0.01)
    batches = feed.batches(0, 24)
    next(batches)
    LOSSES[damage](tmp_path / "set" / "shard-00003.parquet")
    count = len(lost_rows(shards, 3))
    started = time.perf_counter()
    wanted = rf"{count} corrupt rows, 20 allowed; restore them or raise max_corrupt:\n  {count} rows: "
    with pytest.raises(CorruptRows, match=wanted + r".*shard-00003.parquet: row group \d+ cannot be read.*prepare.py"):
        for _ in batches:
            pass
    assert time.perf_counter() - started < 20 and feed.corrupt_rows == count > 20


@pytest.mark.fault
@pytest.mark.parametrize("damage", LOSSES)
def test_rows_of_a_lost_shard_are_replaced_alike_for_every_world(tmp_path, caplog, damage):
    """Position k holds the plan's row, or for a lost one the row of its number in the next unit that can be read."""
    shards = write(tmp_path / "set", rows=250)
    pixels = np.concatenate([[decode(data, shards.size)[0, 0, 0] for data in shards.read(u).column("image").to_pylist()]
                             for u in range(len(shards.units))])  # fmt: skip
    feed = StreamFeed(shards, seed=3, flip=True, max_corrupt=0.9, ahead_bytes=1)
    batches = (tuple(rows.values()) for rows in feed.batches(0, 24))
    whole = [next(batches)]
    LOSSES[damage](tmp_path / "set" / "shard-00001.parquet")
    whole += itertools.islice(batches, 30)  # three epochs
    lost, plan = set(lost_rows(shards, 1)), feed.plan

    def expected(position):
        row, epoch = int(plan.rows_at([position])[0]), position // plan.rows_total
        unit, inside = plan.unit(row)
        units = (u for u in plan.units_from(epoch, unit) if int(plan.first[u]) not in lost)
        unit = next(units)
        return pixels[plan.first[unit] + inside % plan.units[unit]]

    # what was read before the loss is still used; from the second epoch on every read comes after it
    values = torch.cat([((images[:, 0, 0, 0] + 1) * 127.5).round().long() for images, _ in whole]).tolist()
    assert values[250:] == [expected(position) for position in range(250, 31 * 24)]
    assert torch.cat([labels for _, labels in whole]).tolist() == [value % 10 for value in values]
    for world in (1, 2, 3, 4):
        parts = [StreamFeed(shards, seed=3, flip=True, max_corrupt=0.9) for _ in range(world)]
        parts = [take(part, 19, position=288, rank=rank, world=world) for rank, part in enumerate(parts)]
        assert all(
            torch.equal(torch.stack([part[i][k] for part in parts], 1).flatten(0, 1), whole[12 + i][k])
            for i in range(19)
            for k in (0, 1)
        )
    assert feed.corrupt_rows == len(lost) and feed.corrupt[0].startswith(f"{len(lost)} rows: ")
    warnings = [record.getMessage() for record in caplog.records if record.name == "fewstep.data"]
    assert len(warnings) == 11 and all("shard-00001.parquet" in text and "max_corrupt" in text for text in warnings)


def test_a_damaged_row_group_costs_its_own_rows_and_a_stand_in_may_be_corrupt_itself(tmp_path, monkeypatch):
    bad = tuple(range(0, 200, 9))
    write(tmp_path / "set", rows=200, bad=bad, monkeypatch=monkeypatch)
    _flip_byte(tmp_path / "set")
    shards = open_shards(tmp_path / "set", verify="size")
    feed = StreamFeed(shards, max_corrupt=0.5)
    whole = take(feed, 25)
    values = torch.cat([((images[:, 0, 0, 0] + 1) * 127.5).round().long() for images, _ in whole])
    assert not set(values.tolist()) & set(bad) and torch.equal(torch.cat([x for _, x in whole]), values % 10)
    damaged = next(i for i, unit in enumerate(shards.units) if (unit.file, unit.group) == ("shard-00001.parquet", 1))
    readable = [decode_all(shards.read(u).column("image").to_pylist(), shards.size)[1]
                for u in range(len(shards.units)) if u != damaged]  # fmt: skip
    assert feed.corrupt_rows == shards.units[damaged].rows + sum(map(len, readable))
    for world in (2, 3):
        parts = [take(StreamFeed(shards, max_corrupt=0.5), 25, rank=rank, world=world) for rank in range(world)]
        for batches in zip(whole, *parts, strict=True):
            assert torch.equal(torch.stack([part[0] for part in batches[1:]], 1).flatten(0, 1), batches[0][0])


def test_what_is_back_when_it_is_tried_again_is_used_and_reported(tmp_path, monkeypatch, caplog):
    shards = write(tmp_path / "set")
    expected = take(StreamFeed(shards), 20)
    read, failed = shards.read, []

    def once(unit, rows=None):
        if unit not in failed:
            failed.append(unit)
            raise ShardError(f"{shards.units[unit].file}: row group {shards.units[unit].group} cannot be read")
        return read(unit, rows)

    monkeypatch.setattr(shards, "read", once)
    feed = StreamFeed(shards)
    assert same(take(feed, 20), expected) and feed.corrupt_rows == 0 and len(failed) == len(shards.units)
    assert len(caplog.records) == len(shards.manifest.shards) and "tried again" in caplog.text


def test_nothing_is_left_when_everything_is_lost(tmp_path):
    feed = StreamFeed(write(tmp_path / "set"), max_corrupt=1.0)
    for file in (tmp_path / "set").glob("*.parquet"):
        file.unlink()
    with pytest.raises(CorruptRows, match="no row is left to take a corrupt one's place: 200 corrupt rows"):
        take(feed, 1)


def test_closing_a_feed_ends_its_threads(tmp_path):
    feed = StreamFeed(write(tmp_path / "set"))
    before = threading.active_count()
    streams = [feed.batches(0, 24), feed.batches(48, 24)]
    for stream in streams:
        next(stream)
    assert threading.active_count() > before
    feed.close()
    assert threading.active_count() == before and list(streams[0]) == []


def test_a_source_that_gives_nothing_is_given_up():
    def silent():
        time.sleep(0.5)
        yield 1

    with pytest.raises(TimeoutError, match="nothing came for 0.05 s"):
        next(ahead(silent(), 2, patience_s=0.05))


def test_a_finite_source_ends():
    assert list(ahead((i for i in range(100)), 3)) == list(range(100))
