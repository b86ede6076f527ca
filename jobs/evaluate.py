#!/usr/bin/env python
"""Scores a run, one of its checkpoints, an export or a teacher folder, with sample count and reference.

    python jobs/evaluate.py model=shipped:fashion_mnist/teacher steps=[5,18,35] images=10000
    python jobs/evaluate.py model=runs/fashion_mnist-20260101-120000

The last line is a JSON object with every score and what it depends on.
"""

import json
import sys
from functools import partial
from pathlib import Path
from typing import Annotated, Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "platform"))

from pydantic import Field

from fewstep.config import command
from fewstep.metrics.build import Metrics
from fewstep.metrics.features import FEATURES
from fewstep.metrics.reference import REFERENCE


class Evaluate(Metrics):
    """Scores a run, a checkpoint, an export or a teacher folder."""

    model: str
    """Folder of a run, a checkpoint, an export or a teacher."""
    steps: list[Annotated[int, Field(ge=1)]] = [18]
    """Heun steps (2 steps - 1 calls), for a teacher; a student is sampled as it was distilled."""
    guidance: Annotated[float, Field(ge=1)] = 1.0
    """Guidance scale, for a teacher."""
    metrics: list[str] = ["fd_fashion", "class_consistency", "diversity"]
    """Metric names."""
    features: Annotated[str | None, FEATURES] = "shipped:fashion_mnist/features.safetensors"
    """Weights of the small feature network."""
    reference: Annotated[str | None, REFERENCE] = "shipped:fashion_mnist/statistics.npz"
    """Statistics of the real images under it."""
    method: dict[str, Any] = {}
    """Fields of a run's method to change for sampling, such as method.times=[1.5583] or method.student_steps=2, for
    another number of calls by the same network."""
    prompts: list[str] | str | None = None
    """Texts to score in turn, for a model that takes texts: one, a list, or a .txt file with one a line. null takes
    those of a run's recipe."""
    images: Annotated[int, Field(ge=2)] = 10000
    """Sample count."""
    batch: Annotated[int, Field(ge=1)] = 250
    """Images sampled at once."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Seed of the samples."""
    threads: Annotated[int, Field(ge=1)] = 1
    """Threads of the CPU arithmetic."""
    device: str = "cpu"
    """Device to sample on: cpu, cuda or cuda:1."""


@command(Evaluate)
def main(job: Evaluate) -> None:
    import torch

    from fewstep.build import given_prompts, make_samples, make_teacher
    from fewstep.cluster.progress import table
    from fewstep.engine.world import World, device_of
    from fewstep.metrics.base import check_samples, evaluate
    from fewstep.run import Row
    from fewstep.students import open_sampler, recipe_of
    from fewstep.texts import masked

    torch.set_num_threads(job.threads)
    world = World(device=device_of(job.device))
    recipe = recipe_of(job.model)
    seen = None if recipe is None else job.seen_by(recipe.loss_networks)
    teacher = None if recipe is None or recipe.teacher is None else partial(make_teacher, recipe)
    metrics, prompts = job.build(world.device, seen, teacher), given_prompts(job.prompts)
    options = {"prompts": prompts, "method": job.method}
    samplers = [open_sampler(job.model, steps, job.guidance, world.device, **options) for steps in job.steps]
    for sampler in samplers:
        check_samples(
            metrics, sampler.picture_shape, sampler.conditions.classes, job.images, sampler.prompts(job.images)
        )
    rows, scores = [], []
    for sampler in {s.name: s for s in samplers}.values():  # a student's is the same for any number of steps
        samples = make_samples(sampler, job.images, job.seed, job.batch, world)
        own_scores = evaluate(metrics, samples)
        rows.append(Row.of("", samples, own_scores).to_dict() | {"who": ""})
        scores += [score.to_dict() for score in own_scores]
    print(table(rows))
    print(json.dumps({"model": masked(job.model), "scores": scores}))


if __name__ == "__main__":
    main()
