#!/usr/bin/env python
"""Draws docs/health.png, the health signals of four short runs:  python docs/health.py (about ten CPU-minutes)

One recipe, one seed: as it is, and with one setting changed so that one thing goes wrong. Each column is a run. The
last row has samples of its student, of the classes 0 to 9.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "platform"))

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from fewstep import build
from fewstep.engine.guard import signals_of
from fewstep.metrics.base import evaluate
from fewstep.recipe import open_recipe
from fewstep.sweeps.plots import BEST, QUIET, STYLE

BASE = {"train.steps": 300, "train.report_every": 5, "train.save_every": 300, "failure.collapse.policy": "off"}
RUNS: dict[str, dict[str, Any]] = {
    "healthy": {},
    "slow critic": {"optim.fake.lr": 3e-6},
    "collapse": {"method.critic_updates_per_student_update": 1, "train.steps": 120, "train.save_every": 120},
    "strong GAN": {"method.gan_weight": 10.0},
}
SIGNALS = {
    "brightness": ("brightness offset", (-2.0, 2.0), (-0.6, 0.6)),
    "saturation": ("saturation", (-0.1, 1.0), (0.5,)),
    "diversity": ("diversity", (0.0, 1.4), (0.5,)),
    "accuracy": ("discriminator's accuracy", (0.4, 1.0), (0.95,)),
    "student/match": ("matching loss", None, ()),
    "critic/denoise": ("critic's denoising loss", None, ()),
}


def train(changes: dict[str, Any]) -> tuple[list[int], dict[str, list[float]], np.ndarray, float]:
    """Returns steps, curves by name, the picture of the last student, and its fd_fashion (n = 2,000)."""
    recipe = open_recipe("fashion_mnist_short", ROOT / "jobs" / "recipes", BASE | changes)
    steps: list[int] = []
    curves: dict[str, list[float]] = {name: [] for name in SIGNALS}
    with build.make_feed(recipe.data, recipe.seed) as feed:
        engine = build.make_engine(recipe, feed)
        for report in engine.run():
            values = {**report.metrics, **signals_of(report.metrics)}
            steps.append(report.step)
            for name, curve in curves.items():
                curve.append(values.get(name, float("nan")))
    sampler = build.student_sampler(recipe.method, engine.sampling)
    samples = build.make_samples(sampler, images=2000)
    (score,) = [s for s in evaluate(build.make_metrics(recipe), samples) if s.name == "fd_fashion"]
    return steps, curves, build.grid(build.make_samples(sampler, images=20).images, columns=5), score.value


def main() -> None:
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(11, 13), layout="constrained")
        heights = [1.0] * len(SIGNALS) + [1.6]
        axes = figure.subplots(len(SIGNALS) + 1, len(RUNS), squeeze=False, height_ratios=heights)
        for column, (name, changes) in enumerate(RUNS.items()):
            steps, curves, grid, score = train(changes)
            print(f"{name}: fd_fashion {score:.3f} (n = 2,000, last checkpoint) after {steps[-1]} steps", flush=True)
            axes[0, column].set_title(f"{name}: fd_fashion {score:.1f}")
            for row, (signal, (label, limits, guard)) in enumerate(SIGNALS.items()):
                ax = axes[row, column]
                ax.plot(steps, curves[signal], color=BEST, linewidth=1.2)
                for y in guard:
                    ax.axhline(y, color=QUIET, linewidth=0.7, linestyle=":")
                ax.set_xlim(0, BASE["train.steps"])
                ax.tick_params(labelbottom=False)
                if limits:
                    ax.set_ylim(*limits)
                if column == 0:
                    ax.set_ylabel(label)
            axes[-2, column].set_xlabel("step")
            axes[-2, column].tick_params(labelbottom=True)
            axes[-1, column].imshow(grid, cmap="gray")
            axes[-1, column].axis("off")
        figure.savefig(ROOT / "docs" / "health.png", dpi=100)


if __name__ == "__main__":
    main()
