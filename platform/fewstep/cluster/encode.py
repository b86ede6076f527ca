"""Columns that a teacher reads, made once: latents of pictures and embeddings of captions, by Ray Data actors.

Each shard of the source becomes a set of its own in a folder beside `out`, whole or not there, so that a second start
goes on where the first one stopped. At the end their files become one set, and the folder goes. All of these may be at
URLs of an object store.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..data.decode import decode_all
from ..data.manifest import MANIFEST, Column, Manifest, ShardError
from ..data.shards import Shards, ShardWriter, join, open_shards
from ..diffusion.draws import Draws, fold
from ..folders import SHARDS, replaceable
from ..networks.latents import find_latents
from ..networks.pretrained import locate, open_teacher
from ..networks.prompts import network_class, open_encoder
from ..storage.place import Place
from ..texts import masked
from .session import Sealed, connect, ray


class Encode:
    """An actor: the teacher's codec and text encoders on one device. encode(part) -> its number of rows."""

    def __init__(self, places: Sealed, seed: int, batch: int, device: str):
        source, teacher, parts = places.value
        torch.set_num_threads(1)
        self.shards, self.folder = open_shards(source, "size"), locate(teacher)
        self.parts, self.seed, self.batch, self.device = parts, seed, batch, device
        self.codec, self.encoder = open_parts(self.shards, self.folder, device)

    def __call__(self, block: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        rows = [self.encode(int(part)) for part in block["part"]]
        return {"rows": np.array(rows), "cut": np.array([self.encoder.cut] * len(rows))}

    def encode(self, part: int) -> int:
        """Writes one shard of the source with its new columns, unless that was done before."""
        out, name = self.parts / f"{part:05d}", self.shards.manifest.shards[part].file
        if (out / MANIFEST).is_file():
            return open_shards(out).rows
        units = [number for number, unit in enumerate(self.shards.units) if unit.file == name]
        with self.writer(out) as writer:
            for unit in units:
                table = self.shards.read(unit, columns=["image", "caption"])
                pixels, bad = decode_all(table.column("image").to_pylist(), self.shards.size)
                if bad:
                    raise ShardError(f"{self.shards.name(unit, bad[0][0])}: {bad[0][1]}; prepare the set without it")
                captions = table.column("caption").to_pylist()
                for first in range(0, len(captions), self.batch):
                    here = slice(first, first + self.batch)
                    # by the name of a shard on a disk: in a store it holds a hash, too, and latents are the same
                    draws = Draws(self.seed, fold(f"shard-{part:05d}.parquet", unit, first))
                    latents, columns = self.columns(pixels[here], captions[here], draws)
                    for i, caption in enumerate(captions[here]):
                        writer.add(latents[i], caption=caption, **{key: value[i] for key, value in columns.items()})
        return writer.manifest.rows

    @torch.no_grad()
    def columns(
        self, pixels: np.ndarray, captions: list[str], draws: Draws
    ) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """Sampled latents, scaled as the network takes them, and the captions' embeddings, float16."""
        pictures = torch.from_numpy(pixels).to(self.device).float().div_(127.5).sub_(1)
        shape = (len(captions), *latent_shape(self.codec, self.shards.size))
        latents = self.codec.encode(pictures, draws.normal("latent", shape).to(self.device))
        embedded = self.encoder.columns(captions)
        kept = {key: value.byte() if key == "mask" else value.half() for key, value in embedded.items()}
        return latents.cpu().half().numpy(), {key: value.numpy() for key, value in kept.items()}

    def writer(self, out: Path | Place) -> ShardWriter:
        """The writer of one shard's set."""
        _, columns = self.columns(np.zeros((1, *self.shards.size), np.uint8), [""], Draws(0, 0))
        kinds = [Column(name=key, kind=key, shape=v.shape[1:], dtype=str(v.dtype)) for key, v in columns.items()]
        options = {"encoding": "float16", "captions": True, "columns": kinds, "shard_bytes": 1 << 60}
        return ShardWriter(out, latent_shape(self.codec, self.shards.size), **options, seed=self.seed)


def latent_shape(codec: Any, picture: tuple[int, int, int]) -> tuple[int, int, int]:
    """(C, H, W) of a picture's latent."""
    return (codec.config["latent_channels"], picture[1] // codec.down, picture[2] // codec.down)


def open_parts(shards: Shards, folder: Path, device: str) -> tuple[Any, Any]:
    """The codec and the text encoders of a teacher's folder, whose own network may be still to be trained. Raises
    ValueError where the set or the teacher lack what is encoded."""
    if shards.manifest.kind != "image" or not shards.manifest.captions:
        raise ShardError(f"data: {str(shards.path)!r} has no images with captions, of which columns are made")
    codec = find_latents(folder)
    if codec is not None and not any((folder / name).is_dir() for name in ("unet", "transformer")):
        return codec, open_encoder(folder, network_class(folder), device)
    net = open_teacher(folder, weights=False)
    if codec is None or codec.shape_of(net.shape) != tuple(shards.size):
        wanted = "pixels" if codec is None else f"pictures of shape {codec.shape_of(net.shape)}"
        raise ValueError(f"data: pictures of shape {tuple(shards.size)}, but the teacher takes {wanted}")
    return codec, open_encoder(folder, type(net.backbone.model).__name__, device)


def encode(
    source: str, teacher: str, out: Path | Place, *, seed: int, batch: int, workers: int, device: str, overwrite: bool
) -> Manifest:
    """Writes the set with the teacher's columns to `out`. Raises ValueError naming what does not fit."""
    shards = open_shards(source)
    replaceable(out, SHARDS, overwrite=overwrite, apart=(shards.path,))
    open_parts(shards, locate(teacher), "cpu")
    connect(workers + 1)
    mark = fold(masked(teacher), seed, *[shard.sha256 for shard in shards.manifest.shards])
    name = f".{out.name}.{mark:016x}.parts"
    parts = out.beside(name) if isinstance(out, Place) else out.with_name(name)
    if isinstance(parts, Path):
        parts.mkdir(parents=True, exist_ok=True)
    resources = {"num_gpus": 1} if device == "cuda" else {"num_cpus": 1}
    made = ray.data.from_items([{"part": i} for i in range(len(shards.manifest.shards))]).map_batches(
        Encode,
        fn_constructor_args=(Sealed((source, teacher, parts)), seed, batch, device),
        batch_size=1,
        concurrency=min(workers, len(shards.manifest.shards)),
        **resources,
    )
    made.materialize()
    origin = {"source": "encode", "teacher": masked(teacher), "seed": seed, "of": shards.manifest.source}
    manifest = join([parts / f"{i:05d}" for i in range(len(shards.manifest.shards))], out, origin, overwrite)
    parts.remove() if isinstance(parts, Place) else shutil.rmtree(parts)
    return manifest
