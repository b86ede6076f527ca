"""Joining a cluster, or starting one on this machine; where a job's files go."""

from __future__ import annotations

import os
from pathlib import Path

for _name, _value in {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}.items():
    os.environ.setdefault(_name, _value)

import ray  # noqa: E402

SOURCE = Path(__file__).resolve().parents[2]


def connect(cpus: float) -> None:
    """Joins the cluster that RAY_ADDRESS names, else starts one on this machine with at least `cpus` logical CPUs.

    Logical CPUs are a count for scheduling: a laptop may declare more than it has, and so give the feed one of its own.
    """
    if ray.is_initialized():
        return
    paths = [str(SOURCE), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {"env_vars": {"PYTHONPATH": os.pathsep.join(paths)}}
    if os.environ.get("RAY_ADDRESS"):
        ray.init(runtime_env=environment, log_to_driver=False)
        return
    # a private cluster: token authentication is for those that others can reach
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    ray.init(
        address="local",
        num_cpus=max(os.cpu_count() or 1, int(-(-cpus // 1))),
        runtime_env=environment,
        log_to_driver=False,
        logging_level="warning",
        dashboard_host="127.0.0.1",
    )


def home() -> Path:
    """The folder that relative paths of a job's output start from: FEWSTEP_HOME, else the working directory.

    A job submitted with --working-dir runs in a copy that Ray removes; its output goes to ~/fewstep.
    """
    if os.environ.get("FEWSTEP_HOME"):
        return Path(os.environ["FEWSTEP_HOME"]).expanduser().absolute()
    here = Path.cwd()
    return Path.home() / "fewstep" if "runtime_resources" in here.parts else here
