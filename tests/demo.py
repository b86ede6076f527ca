"""The demo's recipe cut to a few small steps, for tests of everything around them."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil

from fewstep.recipe import Recipe, load_recipe
from fewstep.run import read_reports

ROOT = Path(__file__).resolve().parents[1]
RECIPES = ROOT / "jobs" / "recipes"
STEPS = 6


def arguments(tmp: Path, *more: str) -> list[str]:
    """A demo recipe of six small steps that reports each one; `more` replaces or adds."""
    small = [
        f"out={tmp / 'runs'}",
        f"train.steps={STEPS}",
        "train.batch=8",
        "train.report_every=1",
        "train.save_every=3",
        "cluster.threads=1",
        "cluster.wait_s=5",
        "evaluate.metrics=[]",
        "evaluate.teacher_steps=[]",
    ]
    return list({argument.split("=")[0]: argument for argument in (*small, *more)}.values())


def recipe(tmp: Path, *more: str) -> Recipe:
    """The recipe of these arguments, validated."""
    return load_recipe(arguments(tmp, *more), RECIPES, "fashion_mnist")


def untimed(metrics: dict[str, float]) -> dict[str, float]:
    """Losses, gradients and health; not the clocks."""
    timing = ("_s", "images_per_s", "data_wait")
    return {key: value for key, value in metrics.items() if not key.endswith(timing)}


def losses(folder: Path) -> list[dict[str, float]]:
    """The metrics of each report of a run, without the clocks."""
    return [untimed(report["metrics"]) for report in read_reports(folder)]


def mlflow_history(store: str, run_id: str, key: str) -> list[tuple[int, float]]:
    """(step, value) of every point of a metric that MLflow holds, in order of steps."""
    from mlflow import MlflowClient

    return sorted((m.step, m.value) for m in MlflowClient(store).get_metric_history(run_id, key))


def listening(root: psutil.Process | None = None) -> list[tuple[str, str, int]]:
    """(process, address, port) of every socket that a process, by default this one, or one below it listens on."""
    root, result = root or psutil.Process(), []
    for process in (root, *root.children(recursive=True)):
        with contextlib.suppress(psutil.NoSuchProcess):
            for open_socket in process.net_connections("inet"):
                if open_socket.status == psutil.CONN_LISTEN:
                    result.append(
                        (process.name(), open_socket.laddr.ip.removeprefix("::ffff:"), open_socket.laddr.port)
                    )
    return result


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


HOLDS = "import sys; from fewstep.locks import *; hold(Path(sys.argv[1])); print('has it', flush=True); input()"


@contextlib.contextmanager
def another(file: Path) -> Iterator[subprocess.Popen]:
    """Another process, which has a lock while the body runs, or until it is killed there."""
    environment = os.environ | {"PYTHONPATH": str(ROOT / "platform")}
    command = [sys.executable, "-c", HOLDS, str(file)]
    with subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "has it\n"
        yield other
        other.kill()
