"""A worker of a node that starts a run, with no more imports than a run has: its memory is measured."""

from __future__ import annotations

import json
import re
from pathlib import Path

import torch
import torch.distributed as dist


def resident(name: str) -> int:
    """Bytes of this process's memory: VmRSS now, VmHWM at most since it was last asked to forget, RssFile of files."""
    return 1024 * int(re.search(rf"{name}:\s+(\d+)", Path("/proc/self/status").read_text())[1])


def start(rank: int, size: int, folder: str) -> None:
    """Makes the engine of `folder`/large.yaml as one of `size` ranks, and writes what it held before and at most."""
    from fewstep.build import make_engine, make_feed
    from fewstep.engine.world import World
    from fewstep.recipe import open_recipe

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=size)
    recipe, before = open_recipe(f"{folder}/large.yaml", Path(folder), {}), resident("VmRSS")
    engine = make_engine(recipe, make_feed(None, 0), World.current(layout=recipe.cluster))
    size_held = sum(p.to_local().nbytes for net in engine.nets.values() for p in net.parameters())
    result = {"before": before, "peak": resident("VmHWM"), "libraries": resident("RssFile"), "held": size_held}
    Path(folder, str(rank)).write_text(json.dumps(result))
    dist.barrier()
    dist.destroy_process_group()
