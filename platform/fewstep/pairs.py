"""Pairs of a noise and a generator's sample of it, as a shard set to train on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from .build import Sampler
from .data.manifest import Column
from .data.noise import noise
from .data.shards import ShardWriter
from .diffusion.draws import Draws, fold
from .diffusion.samplers import to_uint8
from .storage.place import Place
from .texts import masked


@torch.no_grad()
def write_pairs(
    sampler: Sampler,
    out: Path | Place,
    pairs: int,
    seed: int = 0,
    batch: int = 250,
    device: torch.device | str = "cpu",
    overwrite: bool = False,
    **source: Any,
) -> None:
    """Writes a shard set of pairs: a sample, as an image or a latent, what it was asked for, a class or an embedded
    prompt, and the number of its noise, from which training makes the noise again. source: facts of the teacher, for
    the manifest. Raises ShardError."""
    classes, prompts = sampler.conditions.classes or 0, sampler.prompts(pairs)
    columns = [Column(name="noise", kind="noise", shape=(1,), dtype="int64")]
    for name, value in _stored(sampler.conditions.listed(torch.arange(1))).items():
        columns.append(Column(name=name, kind=name, shape=value.shape[1:], dtype=str(value.dtype)))
    latent = sampler.shape != sampler.picture_shape
    options = {"encoding": "float16" if latent else "png", "classes": classes, "captions": bool(prompts)}
    options |= {"source": {"source": "pairs", "sampler": sampler.name, "seed": seed} | masked(source)}
    with ShardWriter(out, sampler.shape, columns=columns, **options, seed=seed, overwrite=overwrite) as writer:
        for first in range(0, pairs, batch):
            rows = torch.arange(first, min(first + batch, pairs), device=device)
            numbers = np.array([fold(seed, "pairs", row) for row in rows.tolist()])
            cond, z = sampler.conditions.listed(rows), noise(numbers, sampler.shape).to(device)
            x0 = sampler.sample(z, cond, Draws(seed, first, device=device))
            samples = (x0.half() if latent else to_uint8(x0)).cpu().numpy()
            stored = _stored(cond) | {"noise": numbers[:, None]}
            for i, sample in enumerate(samples):
                label, caption = int(cond[i]) if classes else None, prompts[first + i] if prompts else None
                writer.add(sample, label, caption, **{name: value[i] for name, value in stored.items()})


def _stored(cond: Any) -> dict[str, np.ndarray]:
    """Embedded prompts as shards hold them, by column; none of a network without texts."""
    columns = cond if isinstance(cond, dict) else {}
    return {name: (v.byte() if name == "mask" else v.half()).cpu().numpy() for name, v in columns.items()}
