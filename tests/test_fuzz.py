"""Seeded mutations of every JSON file beside weights: each ends in a result or in one line, within 10 s and 2 GB."""

from __future__ import annotations

import json
import multiprocessing
import random
import resource
import signal
import traceback
from collections.abc import Callable
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any

import pytest

MUTATIONS, SECONDS, BYTES = 500, 10, 2 << 30
ODD = [
    None, True, False, 0, -1, 1, 2, 3, 7, 1000, 2**31, 2**63, 10**12, 10**30, 0.0, -0.5, 1e-300, 1e300, "", "x", "../x",
    "/etc/passwd", "7", "nan", "x" * 5000, "\u2028\x00", [], {}, [[]], [None], {"name": []}, [1] * 1000, [8, 8, 8],
]  # fmt: skip


def places(value: Any, path: tuple = ()) -> list[tuple]:
    """The path of each value inside a JSON value, itself included."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(place for key, below in inner for place in places(below, (*path, key)))]


def mutated(value: Any, dice: random.Random) -> Any:
    """A copy of a JSON value with one to three changes: a value replaced, removed, doubled, scaled or renamed."""
    value = deepcopy(value)
    for _ in range(dice.choice([1, 1, 1, 2, 3])):
        path = dice.choice(places(value))
        if not path:
            if dice.random() < 0.1:
                return deepcopy(dice.choice(ODD))
            continue
        parent = value
        for key in path[:-1]:
            parent = parent[key]
        key, old = path[-1], parent[path[-1]]
        kind = dice.randrange(6)
        if kind == 0:
            del parent[key]
        elif kind == 1 and isinstance(parent, dict):
            parent[dice.choice(["", "x", key + "s", key.upper()])] = parent.pop(key)
        elif kind == 2 and isinstance(old, (int, float)) and not isinstance(old, bool):
            parent[key] = dice.choice([-old, old + 1, old - 1, old * 1000, old / 2, float("inf"), float("nan")])
        elif kind == 3 and isinstance(parent, list):
            parent.extend(parent * dice.choice([1, 3]))
        else:
            parent[key] = deepcopy(dice.choice(ODD))
    return value


def damaged(content: bytes, dice: random.Random) -> bytes:
    """The bytes with a few flipped, cut or doubled, or deep nesting in their place."""
    kind = dice.randrange(4)
    if kind == 0:
        return content[: dice.randrange(len(content))]
    if kind == 1:
        return dice.choice([b"[", b'{"a":']) * dice.choice([99, 10**5])
    out = bytearray(content)
    for _ in range(dice.choice([1, 3, 30])):
        out[dice.randrange(len(out))] = dice.randrange(256)
    return bytes(out) * (2 if kind == 2 else 1)


def overdue(*_: Any) -> None:
    raise TimeoutError(f"more than {SECONDS} s")


Readers = dict[Path, Callable[[], Any]]
"""Files, and how each is read."""


def trials(make: Callable[[Path], Readers], folder: str, out: Any) -> None:
    """Reads files after each of many mutations; sends the share refused, and what went wrong."""
    import torch

    torch.set_num_threads(1)
    readers = make(Path(folder))
    for read in readers.values():
        read()
    # what this process holds by now, and 2 GB more
    current_bytes = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (current_bytes + BYTES, current_bytes + BYTES))
    signal.signal(signal.SIGALRM, overdue)
    wrong, refused = [], 0
    for file, read in readers.items():
        good = file.read_bytes()
        for number in range(MUTATIONS):
            dice = random.Random(f"{file.name} {number}")
            if number % 10 == 9:
                content = damaged(good, dice)
            else:
                content = json.dumps(mutated(json.loads(good), dice)).encode()
            file.write_bytes(content)
            signal.alarm(SECONDS)
            try:
                read()
            except ValueError as error:
                refused += 1
                if "\n" in str(error) or not str(error) or str(folder) not in str(error):
                    wrong.append(f"{file.name} {number}: {str(error)[:300]!r}")
            except BaseException:
                wrong.append(f"{file.name} {number}: {content[:200]!r}\n{traceback.format_exc()[-1500:]}")
            finally:
                signal.alarm(0)
        file.write_bytes(good)
        read()
    out.send((refused / (MUTATIONS * len(readers)), wrong))


def unet() -> Any:
    import diffusers
    import torch

    torch.manual_seed(0)
    return diffusers.UNet2DModel(
        sample_size=8, in_channels=2, out_channels=2, block_out_channels=(8, 16), norm_num_groups=4,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1, attention_head_dim=8, num_class_embeds=6,
    )  # fmt: skip


def of_a_teacher(folder: Path) -> Readers:
    """A teacher written here, in shards: config.json, fewstep.json and index.json."""
    from fewstep.networks.pretrained import open_teacher

    unet().save_pretrained(folder / "unet", max_shard_size="20KB")
    (folder / "fewstep.json").write_text(
        json.dumps({"schedule": {"name": "ddpm", "steps": 1000}, "prediction": "v", "classes": 5, "time_scale": 1.0})
    )
    index = next((folder / "unet").glob("*.index.json"))
    files = (folder / "unet/config.json", folder / "fewstep.json", index)
    return dict.fromkeys(files, lambda: open_teacher(folder))


def of_pipelines(folder: Path) -> Readers:
    """Pipelines of diffusers: the configs of three kinds of scheduler."""
    import diffusers

    from fewstep.networks.pretrained import open_teacher

    kinds = ("DDPMScheduler", "EDMEulerScheduler", "FlowMatchEulerDiscreteScheduler")
    for kind in kinds:
        unet().save_pretrained(folder / kind / "unet")
        getattr(diffusers, kind)().save_pretrained(folder / kind / "scheduler")
    return {folder / kind / "scheduler/scheduler_config.json": partial(open_teacher, folder / kind) for kind in kinds}


def of_a_run(folder: Path) -> Readers:
    """The manifest of a checkpoint without its hash, by which all changes would be found."""
    import torch
    import toy

    from fewstep.engine.checkpoint import load
    from fewstep.engine.saver import Saver

    net = toy.denoiser()
    optim = torch.optim.AdamW(net.parameters(), fused=True)
    net.backbone.encoder[0].weight.grad = torch.ones_like(net.backbone.encoder[0].weight)
    optim.step()
    progress = {"step": 7, "updates": {"student": 7}, "rates": {"student": 1.0}, "roll_backs": 0}
    saver = Saver(folder / "checkpoints")
    path = saver.save({"student": net}, {"student": optim}, progress | {"images": 70, "recipe": {"a": {"b": [1, 2]}}})
    saver.wait()
    manifest = path / "manifest.json"
    content = json.loads(manifest.read_text())
    del content["sha256"]
    manifest.write_text(json.dumps(content))
    return {manifest: lambda: load(path, {"student": net}, {"student": optim}, progress=progress)}


def of_an_export(folder: Path) -> Readers:
    """The model_index.json of an export, as far as it is read here, and the network.json of a run."""
    import diffusers
    from test_networks import labelled

    from fewstep.build import describe_net, described_net
    from fewstep.diffusion.samplers import Call
    from fewstep.networks.export import entries, exported_calls

    net = labelled()
    calls = entries(net, [Call(1.0, 80.0), Call(1.0, 2.0)])
    index = {"_class_name": ["pipeline", "FewStepPipeline"], "_diffusers_version": diffusers.__version__}
    (folder / "model_index.json").write_text(json.dumps(index | {"sampling": {"calls": calls, "classes": 5}}))
    describe_net(folder, net)

    return {
        folder / "model_index.json": lambda: exported_calls(folder),
        folder / "network.json": lambda: described_net(folder, "fp32"),
    }


def of_shards(folder: Path) -> Readers:
    """The manifest of a shard set."""
    import numpy as np

    from fewstep.data.shards import ShardWriter, open_shards

    with ShardWriter(folder / "set", (2, 3, 3), encoding="float32", classes=3, captions=True) as writer:
        for i in range(12):
            writer.add(np.full((2, 3, 3), i, np.float32), i % 3, f"number {i}")
    return {folder / "set/manifest.json": lambda: open_shards(folder / "set")}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("make", "least"),
    [(of_a_teacher, 0.4), (of_pipelines, 0.2), (of_a_run, 0.5), (of_an_export, 0.3), (of_shards, 0.3)],
    ids=["a teacher", "pipelines", "a run", "an export", "shards"],
)
def test_mutations_end_in_a_result_or_in_one_line(make, least, tmp_path):
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=trials, args=(make, str(tmp_path), theirs))
    process.start()
    theirs.close()
    refused, wrong = ours.recv()  # EOFError where the process has died
    process.join()
    assert wrong == [], f"{len(wrong)}: " + "\n".join(wrong[:20])
    assert refused >= least  # or the mutations would change nothing that is read
