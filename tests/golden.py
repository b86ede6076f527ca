"""Golden losses: the first steps of every shipped method, as text, so that a change of numbers shows as a changed file.

    python tests/golden.py            writes tests/golden.txt anew

A line is one loss of one step of one cell. A cell is a method on the labelled toy mixture, run by one process, by one
process that accumulates two micro-batches, or by two processes whose networks are sharded.
"""

from __future__ import annotations

import platform
import re
import sys
import tempfile
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import toy

from fewstep.engine.world import Layout, World
from fewstep.methods import METHODS

FILE = Path(__file__).with_name("golden.txt")
STEPS = 20
# losses and gradients; health signals are no losses
NAMES = ("match", "gan", "denoise", "pair", "mse", "tangent", "grad_norm")
DMD2 = METHODS["dmd2"]
CELLS = {
    "dmd2": DMD2(critic_updates_per_student_update=2, gan_weight=0.05),
    "dmd2-no-gan": DMD2(critic_updates_per_student_update=2, gan_weight=0),
    "dmd2-4-steps": DMD2(critic_updates_per_student_update=2, gan_weight=0.05, student_steps=4),
    "dmd2-guided": DMD2(critic_updates_per_student_update=2, gan_weight=0.05, guidance=2.0),
    "f_distill": METHODS["f_distill"](critic_updates_per_student_update=2, gan_weight=0.05),
    "regression": METHODS["regression"](steps=3),
    "denoising": METHODS["denoising"](),
    "scm": METHODS["scm"](warmup_steps=10),
}
LAYOUTS = ("one", "accumulate-2", "two-sharded")


def losses(method: str, world: World | None = None, **train) -> list[str]:
    """Every loss of every step of a cell, as lines `method step name value`."""
    engine = toy.make_engine(
        CELLS[method],
        teacher=toy.Mixture(labelled=True),
        start=toy.denoiser(classes=4),
        world=world,
        **{"steps": STEPS, "batch": 16, "report_every": 1, "save_every": STEPS} | train,
    )
    return [
        f"{method} {step} {name} {value!r}"
        for step, metrics in enumerate(toy.finish(engine))
        for name, value in sorted(metrics.items())
        if name.rsplit("/", 1)[-1] in NAMES
    ]


def two_sharded(rank: int, folder: str) -> None:
    """One of two processes that train every cell with all networks sharded; the first writes what it saw."""
    torch.set_num_threads(1)
    meet = f"file://{folder}/meet"
    dist.init_process_group("gloo", init_method=meet, rank=rank, world_size=2, timeout=timedelta(seconds=120))
    world = World.current(layout=Layout(placement="shard"))
    lines = [line for method in CELLS for line in losses(method, world)]
    if rank == 0:
        Path(folder, "lines").write_text("\n".join(lines))
    dist.barrier()
    dist.destroy_process_group()


def measure(layout: str) -> list[str]:
    """The lines of all cells in one layout, `layout method step name value`."""
    if layout == "two-sharded":
        with tempfile.TemporaryDirectory() as folder:
            torch.multiprocessing.spawn(two_sharded, (folder,), nprocs=2)
            lines = Path(folder, "lines").read_text().splitlines()
    else:
        lines = [line for method in CELLS for line in losses(method, accumulate=1 + (layout == "accumulate-2"))]
    return [f"{layout} {line}" for line in lines]


def machine() -> str:
    """The versions that equal bits depend on: of PyTorch, and of the processor, for which it and its libraries choose
    their kernels. A virtual machine's processor may have a name without a model, so its numbers are needed, too."""
    info = Path("/proc/cpuinfo")
    text = info.read_text() if info.is_file() else ""
    fields = [re.search(rf"^{name}\s*: (.*)", text, re.M) for name in ("model name", "cpu family", "model")]
    name, family, model = (field[1] if field else "" for field in fields)
    kernels = torch.backends.cpu.get_cpu_capability()
    return f"# torch {torch.__version__}, {name or platform.processor()}, family {family}, model {model}, {kernels}"


def read() -> tuple[str, dict[str, str]]:
    """The file's machine, and its values by `layout method step name`."""
    head, *lines = FILE.read_text().splitlines()
    return head, dict(line.rsplit(" ", 1) for line in lines)


if __name__ == "__main__":
    torch.set_num_threads(1)
    lines = [machine(), *(line for layout in LAYOUTS for line in measure(layout))]
    FILE.write_text("\n".join(lines) + "\n")
    print(f"{FILE.name}: {len(lines) - 1} values", file=sys.stderr)
