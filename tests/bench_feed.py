"""Images a second of the cluster's feeds, against a plain torch DataLoader on the same shards. Run by `make bench`.

The feed of shards in an object store, an S3 server on this machine, is measured against the same feed of the folder.

Each figure is the median over rounds of a ratio of neighbours in time: a window of our feed, then one of the
DataLoader, each after as many batches as it keeps ready, so that only the steady state is counted. A materialised set
is decoded when it is opened; that time is printed beside. The last line is JSON.
"""

from __future__ import annotations

import io
import json
import logging
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
SOURCE = Path(__file__).resolve().parents[1] / "platform"
sys.path.insert(0, str(SOURCE))
os.environ["PYTHONPATH"] = os.pathsep.join([str(SOURCE), *filter(None, [os.environ.get("PYTHONPATH")])])

import fsspec  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
from moto.server import ThreadedMotoServer  # noqa: E402
from PIL import Image  # noqa: E402
from torch.utils.data import DataLoader, Dataset  # noqa: E402

from fewstep.cluster.session import ray, start  # noqa: E402
from fewstep.cluster.stream import RayFeed, publish  # noqa: E402
from fewstep.config import resolve  # noqa: E402
from fewstep.data.shards import Shards, ShardWriter, labels, open_shards  # noqa: E402

ROUNDS = 5
AHEAD = 17  # batches before the clock starts: more than either side keeps ready
TARGETS = {"materialised_28": 1.0, "streaming_28": 0.6, "store_28": 0.6, "streaming_512": 0.6}


class Plain(Dataset):
    """The encoded rows of all shards in a list; a row is decoded when it is asked for."""

    def __init__(self, shards: Shards):
        tables = [shards.read(unit) for unit in range(len(shards.units))]
        self.images = [data for table in tables for data in table.column("image").to_pylist()]
        self.labels = np.concatenate([labels(table) for table in tables])

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> tuple[torch.Tensor, int]:
        pixels = np.array(Image.open(io.BytesIO(self.images[i])))
        return torch.from_numpy(pixels.transpose(2, 0, 1) if pixels.ndim == 3 else pixels[None]), int(self.labels[i])


def plain(shards: Shards, batch: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Batches of the DataLoader without end, scaled as ours are."""
    loader = DataLoader(Plain(shards), batch, shuffle=True, num_workers=2, drop_last=True, persistent_workers=True)
    while True:
        for images, numbers in loader:
            yield images.float().div_(127.5).sub_(1), numbers


def rate(batches: Iterator[tuple[torch.Tensor, torch.Tensor]], count: int) -> float:
    """Images a second over `count` batches."""
    for _ in range(AHEAD):
        next(batches)
    started = time.perf_counter()
    images = sum(len(next(batches)[0]) for _ in range(count))
    return images / (time.perf_counter() - started)


def compare(name: str, ours: Iterator, theirs: Iterator, count: int, who: str = "DataLoader") -> dict[str, float]:
    """The medians of both rates and of their ratios; printed as a line."""
    pairs = [(rate(ours, count), rate(theirs, count)) for _ in range(ROUNDS)]
    us, them = (statistics.median(side) for side in zip(*pairs, strict=True))
    ratio = statistics.median(a / b for a, b in pairs)
    met = "met" if ratio >= TARGETS[name] else "NOT met"
    print(f"{name:16s} {us:10,.0f} images/s, {who} {them:10,.0f}: ratio {ratio:6.2f} "
          f"(target {TARGETS[name]:.1f} {met})", flush=True)  # fmt: skip
    return {"ratio": round(ratio, 3), "images_per_s": round(us), f"{who.lower()}_images_per_s": round(them)}


def in_store(folder: Path) -> Shards:
    """The set of a folder, copied to the S3 server."""
    fs = fsspec.filesystem("s3")
    fs.mkdir("bucket")
    fs.put(f"{folder}/", "bucket/set/", recursive=True)
    return open_shards("s3://bucket/set")


def photographs(out: Path, count: int = 1000, size: int = 512) -> Shards:
    """JPEGs of about 60 kB: noise at several scales, as spectra of photographs fall with frequency."""
    rng = np.random.default_rng(0)
    with ShardWriter(out, (3, size, size), encoding="jpeg", classes=10) as writer:
        for i in range(count):
            picture = np.zeros((size, size, 3), np.float32)
            for cells in (4, 16, 64, 256):
                noise = Image.fromarray(rng.integers(0, 256, (cells, cells, 3), dtype=np.uint8))
                picture += np.asarray(noise.resize((size, size), Image.Resampling.BILINEAR), np.float32) / cells**0.5
            picture = 255 * picture / picture.max()
            writer.add(picture.astype(np.uint8).transpose(2, 0, 1), i % 10)
    return open_shards(out)


def main() -> None:
    torch.set_num_threads(1)
    folder = Path(tempfile.mkdtemp(prefix="fb", dir="/tmp"))
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
    server.start()
    os.environ |= {
        "AWS_ENDPOINT_URL": "http://{}:{}".format(*server.get_host_and_port()),
        **dict.fromkeys(("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"), "none"),
        "AWS_DEFAULT_REGION": "us-east-1",
        "FEWSTEP_CACHE": str(folder / "cache"),
    }
    start(4, _temp_dir=str(folder / "ray"), object_store_memory=400 << 20)
    try:
        result = {}
        shards = open_shards(resolve("shipped:fashion_mnist/shards"))
        theirs = plain(shards, 256)
        started = time.perf_counter()
        with publish(shards.path).open() as feed:
            print(f"materialised and decoded in {time.perf_counter() - started:.1f} s", flush=True)
            result["materialised_28"] = compare("materialised_28", feed.batches(0, 256), theirs, 100)
        with RayFeed(shards) as feed:
            result["streaming_28"] = compare("streaming_28", feed.batches(0, 256), theirs, 100)
        theirs.close()
        with RayFeed(in_store(shards.path)) as feed, RayFeed(shards) as disk:
            result["store_28"] = compare("store_28", feed.batches(0, 256), disk.batches(0, 256), 100, "folder")
        shards = photographs(folder / "jpeg")
        mean = shards.manifest.shards[0].bytes / shards.manifest.shards[0].rows
        print(f"1000 JPEGs of 512x512, {mean / 1e3:.0f} kB each", flush=True)
        theirs = plain(shards, 16)
        with RayFeed(shards) as feed:
            result["streaming_512"] = compare("streaming_512", feed.batches(0, 16), theirs, 40)
        theirs.close()
    finally:
        ray.shutdown()
        server.stop()
        shutil.rmtree(folder, ignore_errors=True)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
