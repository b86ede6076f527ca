#!/usr/bin/env python
"""Writes pairs of a noise and a teacher's sample of it as a shard set, for methods that fit a student to them.

    python jobs/pairs.py teacher=shipped:fashion_mnist/teacher out=shards/pairs pairs=2000

A row holds the sample, as an image or a latent, what it was asked for, a class or an embedded prompt, and the number of
its noise, from which training makes the noise again.
"""

import json
import sys
from pathlib import Path
from typing import Annotated

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "platform"))

from pydantic import Field

from fewstep.build import given_prompts
from fewstep.config import OutPathOrURL, Strict, command
from fewstep.engine.world import device_of
from fewstep.pairs import write_pairs
from fewstep.storage.place import located_out
from fewstep.students import open_sampler

Count = Annotated[int, Field(ge=1)]


class Pairs(Strict):
    """Writes pairs of a noise and a teacher's sample of it as a shard set."""

    teacher: str
    """Folder of a teacher, its URL, or hub:owner/name; the folder of a run gives that student's samples."""
    out: OutPathOrURL
    """Folder to write, or its URL (s3://bucket/x)."""
    pairs: Count = 2000
    """Number of pairs."""
    prompts: list[str] | str | None = None
    """Texts to sample in turn, for a teacher that takes texts: one, a list, or a .txt file with one a line."""
    steps: Count = 18
    """Solver steps of the teacher: Heun's (2 steps - 1 network calls a pair), or DDIM's (one each) where it takes
    texts."""
    guidance: Annotated[float, Field(ge=1)] = 1.0
    """Guidance scale of the teacher, which the student then learns with the pairs."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Seed of the noises."""
    batch: Count = 250
    """Pairs sampled at once."""
    device: str = "cpu"
    """Device: cpu or cuda."""
    overwrite: bool = False
    """Replace a shard set at `out`."""


@command(Pairs)
def main(job: Pairs) -> None:
    device = device_of(job.device)
    sampler = open_sampler(job.teacher, job.steps, job.guidance, device, given_prompts(job.prompts))
    out = located_out(job.out)
    write_pairs(sampler, out, job.pairs, job.seed, job.batch, device, job.overwrite, teacher=job.teacher)
    print(f"{out}: {job.pairs} pairs by {sampler.name}")
    print(json.dumps({"out": str(out), "rows": job.pairs, "sampler": sampler.name}))


if __name__ == "__main__":
    main()
