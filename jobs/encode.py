#!/usr/bin/env python
"""Writes a shard set of latents and embedded captions from images with captions, by a teacher's own encoders.

    python jobs/encode.py data=shipped:emoji/shards teacher=shipped:emoji/teacher out=data/emoji_encoded

A second start with the same arguments goes on with the shards that are not done yet.
"""

import json
import sys
from pathlib import Path
from typing import Annotated

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "platform"))

from pydantic import Field

from fewstep.config import OutPathOrURL, Strict, command
from fewstep.storage.place import located_out

Count = Annotated[int, Field(ge=1)]


class EncodeJob(Strict):
    """Writes a shard set of latents and embedded captions from images with captions, by a teacher's own encoders."""

    data: str
    """Folder of shards with images and captions, or its URL (s3://bucket/x)."""
    teacher: str
    """Folder of a diffusers pipeline with a codec and text encoders, its URL, or hub:owner/name."""
    out: OutPathOrURL
    """Folder to write, or its URL."""
    workers: Count = 1
    """Actors; each has a CPU, or a GPU, and one shard at a time."""
    device: str = "cpu"
    """Device: cpu or cuda."""
    batch: Count = 64
    """Images encoded at once."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Seed of the latents, which are samples of the codec's distribution."""
    overwrite: bool = False
    """Replace a shard set at `out`."""


@command(EncodeJob)
def main(job: EncodeJob) -> None:
    from fewstep.cluster.encode import encode

    out = located_out(job.out)
    settings = job.model_dump(include={"seed", "batch", "workers", "device", "overwrite"})
    manifest = encode(job.data, job.teacher, out, **settings)
    columns = [column.name for column in manifest.columns]
    print(f"{out}: {manifest.rows:,} rows of {', '.join(columns)}")
    print(json.dumps({"out": str(out), "rows": manifest.rows, "columns": columns}))


if __name__ == "__main__":
    main()
