"""The ratios that the README quotes, each side by side in one run: `make bench`. The last line is a JSON object.

A cycle of DMD2 under its settings (`python tests/bench.py cycle` measures this alone); student against teacher,
images/s at one batch size; the step under Ray against the bare loop; the share of time spent
waiting for data; what a checkpoint costs; and, by bench_feed.py in a process of its own, Ray Data against a torch
DataLoader.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from functools import partial
from pathlib import Path
from statistics import median
from time import perf_counter, process_time
from typing import Any

os.environ.setdefault("RAY_worker_niceness", "0")  # workers and the bare loop compete as equals for the cores

import torch

from fewstep.build import heun_sampler, make_engine, make_feed, make_samples, make_teacher, student_sampler
from fewstep.cluster.train import fit
from fewstep.recipe import Recipe, load_recipe
from fewstep.run import read_reports

ROOT = Path(__file__).resolve().parents[1]
ROUNDS, STEPS, SAVE_EVERY = 3, 40, 5


def recipe(folder: str, name: str) -> Recipe:
    arguments = [
        *(f"out={folder}", f"name={name}", f"tracking.uri=sqlite:///{folder}/mlflow.db"),
        *(f"train.steps={STEPS}", "train.report_every=1", f"train.save_every={STEPS}"),
        *("evaluate.metrics=[]", "evaluate.teacher_steps=[]", "cluster.threads=1"),
    ]
    return load_recipe(arguments, ROOT / "jobs" / "recipes", "fashion_mnist")


CYCLES = {
    "published": ["method.share_draws=false"],
    "default": [],
    "teacher_features": ["method.gan_features=teacher"],
    "teacher_features_at_the_matching_draw": ["method.gan_features=teacher", "method.gan_draw=match"],
}


def cycle() -> dict[str, float]:
    """CPU-seconds of a cycle of one student and five critic updates over the default's, in turns; and its passes.

    A pass is a network's forward: whole, or the encoder alone, each with or without a graph.
    """
    torch.set_num_threads(1)
    engines, passes = {}, {}
    for name, arguments in CYCLES.items():
        ratio = "method.critic_updates_per_student_update=5"
        r = load_recipe(["train.steps=100000", ratio, *arguments], ROOT / "jobs" / "recipes", "fashion_mnist")
        feed = make_feed(r.data, r.seed)
        engines[name] = make_engine(r, feed), feed.batches(0, r.train.batch)
        passes[name] = Counter()
        for role in ("student", "fake", "teacher"):
            engines[name][0].nets[role].register_forward_hook(partial(_count, passes[name]), with_kwargs=True)
    seconds: dict[str, list[float]] = {name: [] for name in CYCLES}
    for turn in range(ROUNDS + 1):  # the first warms up
        for name, (engine, stream) in engines.items():
            passes[name].clear()
            start = process_time()
            for _ in range(5):
                engine.update(next(stream))
            if turn:
                seconds[name].append(process_time() - start)
    result = {}
    for name in CYCLES:
        kinds = ", ".join(f"{n} {kind}" for kind, n in sorted(passes[name].items()))
        ratio = median(a / b for a, b in zip(seconds[name], seconds["default"], strict=True))
        result[f"cycle_{name}_over_default"] = ratio
        print(f"cycle, {name}: {ratio:.3f} of the default's CPU-seconds; passes: {kinds}")
    return result


def _count(passes: Counter, net: Any, args: Any, kwargs: Any, out: Any) -> None:
    while isinstance(out, tuple):
        out = out[0]
    mode = args[3] if len(args) > 3 else kwargs.get("mode", "x0")
    part = "encoder" if mode == "features" else "whole"
    passes[f"{part} {'with a graph' if out.requires_grad else 'without'}"] += 1


def sampling() -> dict[str, float]:
    """Images/s of the one-step student over the teacher's 18 Heun steps; both networks have the teacher's shape."""
    r = load_recipe([], ROOT / "jobs" / "recipes", "fashion_mnist")
    net = make_teacher(r)
    student, teacher = student_sampler(r.method, {"student": net}), heun_sampler(net, 18)
    ratios = []
    for seed in range(ROUNDS):
        slow = make_samples(teacher, 500, seed, 250).seconds
        fast = make_samples(student, 2500, seed, 250).seconds / 5
        ratios.append(slow / fast)
    return {"student_over_teacher_images_per_s": median(ratios), "teacher_calls": teacher.calls}


def stepping(folder: str) -> dict[str, float]:
    """Median seconds of a step under Ray over the bare loop's, in turns; and Ray's share of time waiting for data."""
    ratios, waits = [], []
    for i in range(ROUNDS):
        r = recipe(folder, f"ray-{i}")
        torch.set_num_threads(1)
        with make_feed(r.data, r.seed) as feed:
            bare = [report.metrics for report in make_engine(r, feed).run()]
        fit(r)
        ray = [report["metrics"] for report in read_reports(r.folder)]
        seconds = [median(1 / m["images_per_s"] for m in run[5:]) for run in (ray, bare)]
        ratios.append(seconds[0] / seconds[1])
        waits.append(median(m["data_wait"] for m in ray[5:]))
    return {"ray_step_over_bare_step": median(ratios), "data_wait": median(waits)}


def saving(folder: str) -> dict[str, float]:
    """Seconds that a checkpoint costs the training, in steps: saved behind it, and waited for; against none."""
    lost: dict[str, list[float]] = {"behind": [], "waited": []}
    torch.set_num_threads(1)
    for i in range(ROUNDS):
        took = {}
        for how in ("none", "behind", "waited"):
            r = recipe(folder, f"{how}-{i}")
            with make_feed(r.data, r.seed) as feed:
                engine = make_engine(r, feed, folder=None if how == "none" else r.folder)
                start = perf_counter()
                for report in engine.run():
                    if how != "none" and report.step % SAVE_EVERY == 0 and not engine.finished:
                        engine.save()
                        if how == "waited":
                            engine.wait()
                took[how] = perf_counter() - start
        for how in lost:
            lost[how].append((took[how] - took["none"]) / (STEPS / SAVE_EVERY) / (took["none"] / STEPS))
    return {f"steps_lost_by_a_checkpoint_{how}": median(values) for how, values in lost.items()}


def main() -> None:
    torch.set_num_threads(1)
    result = cycle()
    if sys.argv[1:] == ["cycle"]:
        print(json.dumps(result))
        return
    result |= sampling()
    print(f"sampling: student {result['student_over_teacher_images_per_s']:.1f} x the teacher's images/s at 35 calls")
    with tempfile.TemporaryDirectory(prefix="bench", dir="/tmp") as folder:
        result |= stepping(folder)
        result |= saving(folder)
    print("a checkpoint costs {steps_lost_by_a_checkpoint_behind:.2f} steps".format(**result), end="")
    print(", waited for {steps_lost_by_a_checkpoint_waited:.2f}".format(**result))
    print(
        f"step: Ray over bare loop {result['ray_step_over_bare_step']:.3f}, waiting for data {result['data_wait']:.4f}"
    )
    feed = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "bench_feed.py")], stdout=subprocess.PIPE, text=True, check=True
    )
    print(feed.stdout, end="")
    print(json.dumps(result | {"feed": json.loads(feed.stdout.splitlines()[-1])}))


if __name__ == "__main__":
    main()
