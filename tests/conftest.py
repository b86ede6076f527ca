"""One Ray instance for the whole session, small and quiet; its environment is set before ray is imported."""

from __future__ import annotations

import os
import sys
from pathlib import Path

SETTINGS = {
    "PYTHONPATH": str(Path(__file__).resolve().parents[1] / "platform"),  # for Ray's workers and the jobs
    "OMP_NUM_THREADS": "1",
    "OMP_WAIT_POLICY": "PASSIVE",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.1",
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "30",
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DO_NOT_TRACK": "true",
}
for key, value in SETTINGS.items():
    os.environ.setdefault(key, value)
# a submitted job runs under the cluster's PATH: this environment's python comes first, as after `activate`
os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"

import shutil  # noqa: E402
import tempfile  # noqa: E402

import pytest  # noqa: E402
import torch  # noqa: E402

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def ray_cluster():
    """A private Ray of four logical CPUs, with a dashboard for submitted jobs; its folder's path is short, for UNIX
    sockets."""
    from fewstep.cluster.session import ray, start

    folder = tempfile.mkdtemp(prefix="ray", dir="/tmp")
    start(4, include_dashboard=True, _temp_dir=f"{folder}/ray", object_store_memory=200 * 2**20)
    yield ray
    ray.shutdown()
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def outlined():
    """`open_teacher` that makes the shipped teacher without weights once a session."""
    from functools import cache

    from fewstep.networks.pretrained import locate, open_teacher

    outline = cache(lambda folder, precision: open_teacher(folder, precision, False))
    shipped = locate("shipped:fashion_mnist/teacher")

    def opened(ref, precision="fp32", weights=True, filled=True):
        cached = not weights and locate(ref) == shipped
        return outline(ref, precision) if cached else open_teacher(ref, precision, weights, filled)

    return opened


@pytest.fixture
def one_look(outlined, monkeypatch):
    """For tests of checks that are not of the teacher: they look at the shipped one once a session."""
    monkeypatch.setattr("fewstep.build.open_teacher", outlined)


@pytest.fixture(scope="session")
def pretrained():
    """A denoiser trained on samples of `toy.OVERLAPPING` by the project's own method."""
    import toy

    from fewstep.methods import METHODS

    train = {"steps": 1000, "batch": 96, "report_every": 1000, "save_every": 1000, "average_decay": 0.99}
    method, settings = METHODS["denoising"](mean=-0.5, ramp_share=0.3), {"lr": {"student": 4e-3}}
    engine = toy.make_engine(method, data=toy.OVERLAPPING, optim={"decay_from": 0.3}, **settings, **train)
    toy.finish(engine)
    return engine.student


@pytest.fixture(scope="session")
def store(tmp_path_factory) -> str:
    """URI of one MLflow database for all runs of the session: its seventy migrations take seconds."""
    from fewstep.tracking.store import prepare_store

    uri = f"sqlite:///{tmp_path_factory.mktemp('store') / 'mlflow.db'}"
    prepare_store(uri)
    return uri


@pytest.fixture(scope="session")
def s3_server():
    """URL of an S3 server on this machine."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
    server.start()
    yield "http://{}:{}".format(*server.get_host_and_port())
    server.stop()


@pytest.fixture
def bucket(s3_server, monkeypatch, tmp_path) -> str:
    """An empty bucket of the S3 server, and an empty folder for copies of what it holds."""
    import urllib.request

    import fsspec

    urllib.request.urlopen(urllib.request.Request(f"{s3_server}/moto-api/reset", method="POST"), timeout=30).close()
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_server)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "none")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "none")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("FEWSTEP_CACHE", str(tmp_path / "cache"))
    fsspec.filesystem("s3", skip_instance_cache=True).mkdir("bucket")
    yield "s3://bucket"
    fsspec.get_filesystem_class("s3").clear_instance_cache()
