#!/usr/bin/env python
"""Trains the small feature network and writes the statistics of real images that scores are measured against."""

import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "platform"))

import numpy as np
import torch
from pydantic import Field

from fewstep.config import OutPathOrURL, Strict, command, resolve
from fewstep.data.decode import CorruptImage, read_picture
from fewstep.data.feed import Feed, open_feed
from fewstep.data.folder import folder
from fewstep.diffusion.samplers import to_uint8
from fewstep.engine.world import device_of
from fewstep.folders import files_in
from fewstep.metrics import METRICS
from fewstep.metrics.base import Extractor, File, file_fields
from fewstep.metrics.coco import PROTOCOLS, open_prepared
from fewstep.metrics.features import Info, SmallNetwork, accuracy, open_features, save_features, train_features
from fewstep.metrics.frechet import frechet_distance
from fewstep.metrics.reference import KEPT, moments, save_reference
from fewstep.storage.cache import local
from fewstep.storage.place import located_out

BATCH = 128


class Features(Strict):
    """Trains the small feature network on labelled images, or takes an extractor, and writes reference statistics."""

    data: str
    """Folder of shards: the real images, to train on and to describe. Of a protocol's extractor: folder of pictures."""
    test: str | None = None
    """Folder of shards that were not trained on: gives the accuracy, and the distance of a perfect generator."""
    out: OutPathOrURL
    """Folder for features.safetensors and statistics.npz, or its URL (s3://bucket/x)."""
    extractor: str | None = None
    """Describe the images with this network of a metric: a file, such as features.safetensors or Inception's .pt, the
    name of a network that is looked for, such as inception, or of a protocol: coco30k, coco10k or coco10k_patch."""
    network: Literal["plain", "residual"] = "plain"
    """Architecture of the network: five convolutions with batch norm, or a residual network with group norm."""
    name: str = "fashion"
    """Name of the network; its Frechet distance is called fd_<name>."""
    images: int | None = Field(None, ge=2)
    """Number of images to describe; null is all."""
    keep: int = Field(KEPT, ge=2, le=KEPT)
    """Features to keep of single images, for the metrics that compare neighbours and for kid."""
    epochs: int = Field(5, ge=1)
    """Passes over the images in training."""
    seed: int = Field(0, ge=0)
    """Seed of the first weights and of the order of the images."""
    device: str = "cpu"
    """Device: cpu or cuda."""


def open_images(path: str, seed: int = 0) -> Feed:
    """A feed of square images. Raises ValueError naming the folder for anything else."""
    feed = open_feed(path, seed=seed)
    if feed.shards.manifest.kind != "image" or feed.shape[1] != feed.shape[2]:
        raise ValueError(f"{path}: {feed.shards.manifest.kind}s of shape {feed.shape}; features need square images")
    return feed


def describe(feed: Feed, images: int) -> str:
    """Name of the reference in a score: its set and its number of images."""
    source = feed.shards.manifest.source
    name = " ".join(str(source[key]) for key in ("source", "split") if source.get(key)) or feed.shards.path.name
    return f"{images} images of {name}"


def read(feed: Feed, images: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The first images of the feed's order as uint8 (N, C, H, W), and their labels, zeros where there are none."""
    parts = list(islice(feed.batches(0, BATCH), -(-images // BATCH)))
    pixels = torch.cat([to_uint8(rows["real"]) for rows in parts])
    labels = torch.cat([rows.get("label", torch.zeros(len(rows["real"]), dtype=torch.int64)) for rows in parts])
    return pixels[:images], labels[:images]


def train(job: Features, feed: Feed, test: tuple[torch.Tensor, torch.Tensor] | None, path: Path) -> SmallNetwork:
    """Trains the network, writes it, and opens what was written."""
    channels, size, _ = feed.shape
    info = Info(job.name, feed.classes, channels, size, trained_on=describe(feed, feed.rows), network=job.network)
    steps = job.epochs * feed.rows // BATCH
    batches = ((rows["real"], rows["label"]) for rows in feed.batches(0, BATCH))
    options = {"seed": job.seed, "device": job.device, "network": job.network}
    net = train_features(batches, steps, classes=feed.classes, channels=channels, **options)
    if test:
        outputs = SmallNetwork(net, info, hash="", device=job.device)(test[0])
        info = replace(info, test_accuracy=accuracy(outputs, test[1].numpy()))
        print(f"accuracy on {len(test[0])} test images: {info.test_accuracy:.4f}", flush=True)
    save_features(path, net, info)
    return open_features(path, job.device)


def networks() -> dict[str, File]:
    """The networks of all metrics: by the name of the field that names one, its kind of file."""
    fields = (item for metric in METRICS.values() for item in file_fields(metric).items())
    return {name: kind for name, kind in fields if kind.suffix}


def open_extractor(ref: str, device: str) -> Extractor:
    """The network in a file, or the one that a metric looks for. Raises OSError or ValueError naming the file."""
    known = networks()
    if ref in known and known[ref].find is not None:
        return known[ref].open(known[ref].find(True), device)
    errors = []
    for kind in dict.fromkeys(kind for kind in known.values() if ref.endswith(kind.suffix)):
        try:
            return kind.open(local(ref), device)
        except (OSError, ValueError) as error:
            errors.append(str(error))
    names = [name for name, kind in known.items() if kind.find is not None]
    endings = ", ".join(sorted({kind.suffix for kind in known.values()}))
    raise ValueError("\n".join(errors) or f"extractor: {ref!r} is neither {' or '.join(names)} nor a file in {endings}")


def describe_pictures(job: Features, out: Path) -> dict:
    """Writes the statistics of a folder of pictures, of any sizes, as a protocol prepares them."""
    source = folder(resolve(job.data))

    def pictures() -> Iterator[np.ndarray]:
        for example in islice(source.examples(), job.images):
            if isinstance(example.image, CorruptImage):
                raise ValueError(f"data: {example.name}: {example.image}")
            try:
                yield read_picture(example.image, 3).pixels
            except CorruptImage as error:
                raise ValueError(f"data: {example.name}: {error}") from None

    extractor = open_prepared(job.extractor, job.device)
    outputs = extractor.describe(pictures())
    name = f"{len(outputs.features)} pictures of {resolve(job.data).name}"
    reference = save_reference(out / "statistics.npz", name, outputs, extractor)
    return {"extractor": extractor.hash, "reference": reference.hash, "images": reference.images}


def run(job: Features, out: Path) -> dict:
    """Trains or opens the extractor, writes the statistics to `out`, and returns what the job reports."""
    if job.extractor in PROTOCOLS:
        return describe_pictures(job, out)
    feed = open_images(job.data, job.seed)
    if job.images and job.images > feed.rows:
        raise ValueError(f"images: {job.images}; {job.data} has {feed.rows}")
    test = None
    if job.test:
        held_out = open_images(job.test)
        test = read(held_out, held_out.rows)
    if job.extractor is None:
        extractor = train(job, feed, test, out / "features.safetensors")
    else:
        extractor = open_extractor(job.extractor, job.device)
    images, labels = read(feed, job.images or feed.rows)
    reference = save_reference(
        out / "statistics.npz",
        describe(feed, len(images)),
        extractor(images),
        extractor,
        labels.numpy() if feed.classes else None,
        job.keep,
    )
    report = {"extractor": extractor.hash, "reference": reference.hash, "images": reference.images}
    if test:
        floor = frechet_distance(*moments(extractor(test[0]).features), reference.mean, reference.covariance)
        print(f"Frechet distance of {len(test[0])} test images: {floor:.4f}")
        report |= {"floor": floor, "test_images": len(test[0])}
    if isinstance(extractor, SmallNetwork):
        report["accuracy"] = extractor.info.test_accuracy
    return report


@command(Features)
def main(job: Features) -> None:
    device_of(job.device)
    out = located_out(job.out)
    marks = {"features.safetensors": '"info"', "statistics.npz": "covariance.npy"}
    if job.extractor is not None:
        del marks["features.safetensors"]
    with files_in(out, marks) as folder:
        report = run(job, folder)
    print(json.dumps(report | {"out": str(out)}))


if __name__ == "__main__":
    main()
