#!/usr/bin/env python
"""Writes a set of images as the Parquet shards that training reads.

python jobs/prepare.py source=fashion_mnist split=train out=shards/fashion_mnist
python jobs/prepare.py source=folder path=pictures size=256 out=shards/pictures
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "platform"))

from fewstep.config import LocalPath, OutPathOrURL, Strict, command, resolve
from fewstep.data.decode import MAX_PIXELS
from fewstep.data.source import Reading
from fewstep.data.sources import SOURCES, pack
from fewstep.storage.place import located_out

FILES = ("folder", "webdataset", "parquet")
# Settings that only some sources have; anywhere else they would change nothing, in silence.
ONLY = {
    "split": ("fashion_mnist", "cifar10", "emoji", "parquet"),
    "encoding": ("folder", "webdataset"),
    "columns": ("parquet",),
    "groups": ("emoji",),
} | dict.fromkeys(("classes", "size", "channels", "background", "max_pixels"), FILES)


class Prepare(Strict):
    """Write a set of images as Parquet shards with a manifest."""

    source: Literal["fashion_mnist", "cifar10", "emoji", "folder", "webdataset", "parquet"]
    """Kind of the source: a known set, a folder of pictures, tars of webdataset, or Parquet files as hubs have them."""
    out: OutPathOrURL
    """Folder to write, or its URL (s3://bucket/x); `shipped:name` is in the package."""
    path: LocalPath | None = None
    """The source's file or folder; fashion_mnist and emoji find or download their own."""
    split: Literal["train", "test", "validation", "all"] = "train"
    """Part of fashion_mnist, of cifar10, of emoji, and of Parquet files named after their split. all: of emoji."""
    encoding: str | None = None
    """Encoding of captions and metadata, such as cp1252; null is UTF-8, or what a byte order mark says."""
    follow_links: bool = False
    """Also take what lies outside the source's folder and is reached by links in it."""
    classes: int | None = Field(None, ge=1)
    """Number of classes, where it is more than the labels show; names that are whole numbers are then class numbers."""
    columns: dict[Literal["image", "label", "caption"], str] = {}
    """Columns of Parquet files with other names than the usual, such as columns.label=fine_label."""
    groups: list[str] = []
    """Groups of emoji to take, such as "Food & Drink"; [] takes all."""
    limit: int | None = Field(None, ge=1)
    """Keep this many rows, chosen at random by the seed."""
    seed: int = Field(0, ge=0)
    """Seed of the choice and of the order in the shards."""
    size: int | None = Field(None, ge=1)
    """Resize the shorter side of files to this and crop the centre; without it files keep their size."""
    channels: Literal[1, 3] = 3
    """Channels of images from files: 1 is grey, 3 is colour."""
    format: Literal["png", "jpeg", "webp"] = "png"
    """Format of stored pixels; png and webp keep every one."""
    background: str = "white"
    """Colour behind transparent parts of files: a name or #rrggbb."""
    max_pixels: int = Field(MAX_PIXELS, ge=1)
    """A file with more pixels than this in its header counts as corrupt; it would take 4 bytes of memory for each."""
    max_corrupt: float = Field(0.001, ge=0, le=1)
    """Share of the rows that may be unusable; beyond it the job stops and lists them."""
    overwrite: bool = False
    """Replace a shard set at `out`. A folder that holds anything else, or the source, is never replaced."""

    @model_validator(mode="after")
    def _fits(self) -> Prepare:
        if self.path is None and self.source not in ("fashion_mnist", "emoji"):
            raise ValueError("path: missing; give the source's file or folder, path=...")
        for key in ONLY.keys() & self.model_fields_set:
            if self.source not in ONLY[key]:
                raise ValueError(f"{key}: source={self.source} has no such setting; {', '.join(ONLY[key])} have it")
        return self


@command(Prepare)
def main(job: Prepare) -> None:
    started = time.perf_counter()
    out = located_out(job.out)
    reading = Reading(job.encoding, job.follow_links, job.classes, job.columns, tuple(job.groups))
    source = SOURCES[job.source](resolve(job.path) if job.path else None, job.split, reading)
    manifest = pack(
        source, out, limit=job.limit, seed=job.seed, size=job.size, channels=job.channels,
        format=job.format, background=job.background, max_pixels=job.max_pixels, max_corrupt=job.max_corrupt,
        overwrite=job.overwrite,
    )  # fmt: skip
    summary = {
        "out": str(out),
        "rows": manifest.rows,
        "shards": len(manifest.shards),
        "mb": round(sum(shard.bytes for shard in manifest.shards) / 1e6, 2),
        "skipped": len(manifest.skipped),
        "seconds": round(time.perf_counter() - started, 1),
    }
    size = "x".join(map(str, manifest.size))
    print(f"{summary['out']}: {manifest.rows} rows of {size} and {manifest.classes} classes in {summary['shards']} "
          f"shards, {summary['mb']} MB, {summary['skipped']} skipped")  # fmt: skip
    for note in manifest.notes:
        print(f"  {note}")
    for name in manifest.skipped:
        print(f"  skipped {name}")
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
