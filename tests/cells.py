"""Every method's settings for the contract of tests/test_every_method.py, and its engine on the toy.

A new method needs one entry in CELLS.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import toy

from fewstep.engine.train import Engine
from fewstep.engine.world import World
from fewstep.methods import METHODS, Method


@dataclass(frozen=True)
class Cell:
    """One method's part of the contract.

    settings: of the method; each phase runs within four steps. off, host: settings that make it equal to a method of
    other settings, (name, settings). generates: its step makes samples of the student, and reports their health. of:
    the method, where the cell is named otherwise.
    """

    settings: dict[str, Any] = field(default_factory=dict)
    off: dict[str, Any] | None = None
    host: tuple[str, dict[str, Any]] = ("dmd2", {})
    generates: bool = True
    of: str | None = None


TTUR = {"critic_updates_per_student_update": 2}
GAN = TTUR | {"gan_weight": 0.05}
CELLS = {
    "dmd2": Cell(GAN | {"student_steps": 2}),
    "f_distill": Cell(GAN | {"bins": 3}, GAN | {"divergence": "reverse_kl"}, ("dmd2", GAN)),
    "decoupled_dmd": Cell(GAN | {"guidance": 2.0}, GAN | {"guidance_range": None}, ("dmd2", GAN | {"guidance": 2.0})),
    "dp_dmd": Cell(
        TTUR | {"anchor_steps": 2}, TTUR | {"anchor_steps": 0}, ("dmd2", TTUR | {"gan_weight": 0, "student_steps": 4})
    ),
    "dmd": Cell(TTUR),
    "phased_dmd": Cell(
        TTUR | {"earlier": ("a",), "phase_steps": 2}, TTUR | {"boundaries": ()}, ("dmd2", TTUR | {"gan_weight": 0})
    ),
    "phased_dmd interleaved": Cell(
        TTUR | {"interleaved": True, "phase_steps": 2},
        TTUR | {"interleaved": True, "boundaries": ()},
        ("dmd2", TTUR | {"gan_weight": 0}),
        of="phased_dmd",
    ),
    "disback": Cell(GAN | {"nodes": ("a", "bc", "def"), "node_steps": 2}, GAN, ("dmd2", GAN)),
    "disback_record": Cell(generates=False),
    "flash_dmd": Cell(
        {"gan_weight": 0.05, "student_steps": 3, "reward_updates": 1, "reference": "a"},
        {"split": False, "coupling": None, "student_steps": 2},
        ("dmd2", {"student_steps": 2, "gan_weight": 5e-3, "critic_updates_per_student_update": 1}),
    ),
    "hipa": Cell(),
    "msd": Cell(GAN | {"parts": toy.PARTS, "others": ("a",)}, GAN, ("dmd2", GAN)),
    "msd_score": Cell(generates=False),
    "swiftbrush": Cell({"alignment_weight": 0.1}),
    "snoopi": Cell({}, {"guidance_spread": 0.0}, ("swiftbrush", {"guidance": 2.25})),
    "regression": Cell({"steps": 3}),
    "denoising": Cell(generates=False),
    "preparation": Cell({"time_scale": 0.5}, generates=False),
    "scm": Cell({"warmup_steps": 2, "weighting": "learned", "guidance_range": (1, 3)}, generates=False),
    "lcm": Cell({"guidance": 2, "guidance_range": (1, 3)}),
    "pcm": Cell({"solver_steps": 20}),
    "hyper_sd": Cell({"segments": 2, "student_steps": 2, "eta": 0.3, "gan_weight": 0.1, "ends": "conditioned"}),
    "rcm": Cell(
        {"student_every": 2, "guidance_range": (1, 3)},
        {"matching_weight": 0, "mean": -1, "std": 1.4, "warmup_steps": 2},
        ("scm", {"warmup_steps": 2}),
    ),
    "tbcm": Cell({"states": 3, "warmup_steps": 2}, generates=False),
    "boot": Cell({"guidance": 2}),
    "instaflow": Cell({"teacher_steps": 3}),
    "mdt": Cell({"guidance": 2}),
    "twinflow": Cell({"guidance": 2}),
    "sana_sprint": Cell({"warmup_steps": 2, "taps": ("middle", "middle"), "guidance_range": (1, 3)}),
    "ladd": Cell({"taps": ("middle", "middle")}),
    "sid": Cell({"gan_weight": 0.05}),
}
EVERY = sorted(CELLS)


def method(tag: str, settings: dict[str, Any] | None = None) -> Method:
    return METHODS[CELLS[tag].of or tag](**(CELLS[tag].settings if settings is None else settings))


def engine(chosen: Method, folder: Path | None = None, seed: int = 2, **options: Any) -> Engine:
    """Four steps on the labelled toy with a network for a teacher; the optimisers' floor of 1 keeps updates smooth."""
    return toy.make_engine(
        chosen,
        teacher=toy.denoiser(1, classes=4),
        start=toy.denoiser(seed, classes=4),
        data=toy.Mixture(labelled=True),
        folder=folder,
        **{"steps": 4, "batch": 8, "report_every": 2, "save_every": 2, "keep": 5, "optim": {"eps": 1.0}} | options,
    )


def one_of_two(rank: int, folder: str) -> None:
    """One of two workers that train every method."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    for tag in EVERY:
        toy.finish(engine(method(tag), Path(folder, tag), world=World.current()))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
