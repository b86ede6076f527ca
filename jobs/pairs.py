#!/usr/bin/env python
"""Writes pairs of a noise and a teacher's sample of it as a shard set, for methods that fit a student to them.

    python jobs/pairs.py teacher=shipped:fashion_mnist/teacher out=shards/pairs pairs=2000

A row holds the sample as an image, its class, and the number of its noise, from which training makes the noise again.
"""

import json
import sys
from pathlib import Path
from typing import Annotated

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "platform"))

import torch
from pydantic import Field

from fewstep.config import Strict, command, resolve_out
from fewstep.data.manifest import Column
from fewstep.data.noise import noise
from fewstep.data.shards import ShardWriter
from fewstep.diffusion.draws import Draws, fold
from fewstep.diffusion.samplers import to_uint8
from fewstep.engine.world import device_of
from fewstep.students import open_sampler

Count = Annotated[int, Field(ge=1)]


class Pairs(Strict):
    """Writes pairs of a noise and a teacher's sample of it as a shard set."""

    teacher: str
    """Folder of a teacher, or hub:owner/name; the folder of a run gives that student's samples."""
    out: str
    """Folder to write."""
    pairs: Count = 2000
    """Number of pairs."""
    steps: Count = 18
    """Heun steps of the teacher (2 steps - 1 network calls a pair)."""
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
    sampler = open_sampler(job.teacher, job.steps, job.guidance, device=device)
    classes = sampler.conditions.classes or 0
    column = Column(name="noise", kind="noise", shape=(1,), dtype="int64")
    source = {"source": "pairs", "teacher": job.teacher, "sampler": sampler.name, "seed": job.seed}
    out = resolve_out(job.out)
    with ShardWriter(
        out, sampler.shape, classes=classes, columns=[column], source=source, seed=job.seed, overwrite=job.overwrite
    ) as writer:
        for first in range(0, job.pairs, job.batch):
            rows = torch.arange(first, min(first + job.batch, job.pairs))
            numbers = torch.tensor([fold(job.seed, "pairs", row) for row in rows.tolist()])
            labels, z = sampler.conditions.listed(rows), noise(numbers.numpy(), sampler.shape).to(device)
            with torch.no_grad():
                cond = labels.to(device) if classes else None
                x0 = sampler.sample(z, cond, Draws(job.seed, first, device=device))
            for i, image in enumerate(to_uint8(x0).cpu().numpy()):
                writer.add(image, int(labels[i]) if classes else None, noise=numbers[i : i + 1].numpy())
    print(f"{out}: {job.pairs} pairs by {sampler.name}")
    print(json.dumps({"out": str(out), "rows": job.pairs, "sampler": sampler.name}))


if __name__ == "__main__":
    main()
