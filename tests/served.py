"""A small generator of ten classes, its export, and an application over HTTP in this process, for tests of serving."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
import torch
import uvicorn
from demo import ROOT, free_port
from diffusers.utils import dynamic_modules_utils
from test_every_method import in_this_process
from test_networks import unet

from fewstep import build
from fewstep.diffusion.samplers import calls_at
from fewstep.diffusion.schedules import EDM
from fewstep.networks import export as exporting
from fewstep.networks.backbones import UNet
from fewstep.networks.card import Card
from fewstep.networks.denoiser import Denoiser
from fewstep.page import render
from fewstep.serving.app import Application
from fewstep.serving.generator import Generator
from fewstep.serving.queue import Queue
from fewstep.students import Opened, open_generator

NAMES = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")
CALLS = calls_at(EDM(), (1.0, 0.7), on_ramp=True)


def network() -> Denoiser:
    """Ten classes, one channel, random weights."""
    model = unet(0, num_class_embeds=11, in_channels=4, out_channels=4)
    return Denoiser(UNet(model, 10, 2), EDM(), "edm").requires_grad_(False)


def exported(tmp: Path) -> Path:
    """An export of two calls, which draws noise between them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exporting, "_in_fresh_process", in_this_process)
        patch.setattr(dynamic_modules_utils, "HF_MODULES_CACHE", str(tmp / "modules"))
        exporting.export(network(), tmp / "two", calls=CALLS, card=Card(name="two"), class_names=NAMES)
    return tmp / "two"


def student(folder: Path) -> Generator:
    """The generator of an export."""
    return Generator(open_generator(folder), "two", torch.device("cpu"))


def teacher() -> Generator:
    """The same network as a teacher."""
    net = network()
    sampler = lambda steps, guidance: build.teacher_sampler(net, steps, guidance)
    opened = Opened(net, sampler, class_names=NAMES, distilled=False)
    return Generator(opened, "two-teacher", torch.device("cpu"), steps=3)


def page() -> str:
    """The page to try it."""
    return render(ROOT / "dashboards" / "serve.html", title="two")


def application(*generators: Generator, batch: int = 16, limit: int = 64, **options: Any) -> Application:
    """An application that draws in this process."""
    queues = [Queue(each.about, each.draw, batch, limit) for each in generators]
    return Application(queues, page(), **options)


@contextlib.contextmanager
def over_http(app: Application) -> Iterator[str]:
    """The address of the application while the body runs."""
    port = free_port()
    server = uvicorn.Server(uvicorn.Config(app.asgi, port=port, log_level="error"))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive()
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join()


@dataclass(frozen=True)
class Running:
    """A server as a job of its own. log: what it prints."""

    process: subprocess.Popen
    url: str
    log: Path


@contextlib.contextmanager
def running(tmp: Path, *arguments: str, env: Mapping[str, str] = MappingProxyType({})) -> Iterator[Running]:
    """`jobs/serve.py` with these arguments, on a free port and a private cluster, from its first answer on."""
    port, log = free_port(), tmp / "log"
    command = [sys.executable, str(ROOT / "jobs" / "serve.py"), f"port={port}", *arguments]
    environment = {k: v for k, v in os.environ.items() if k not in ("RAY_ADDRESS", "FEWSTEP_TOKEN")} | env
    with open(log, "w") as out:
        process = subprocess.Popen(command, stdout=out, stderr=out, env=environment, start_new_session=True)
    try:
        deadline = time.monotonic() + 600
        while '"url"' not in log.read_text():
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.2)
        yield Running(process, f"http://127.0.0.1:{port}", log)
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(60)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
