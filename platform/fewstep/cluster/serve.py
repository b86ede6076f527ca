"""A server on Ray Serve: replicas that take HTTP and draw, and a teacher beside them for the page."""

from __future__ import annotations

import contextlib
import json
import logging
import signal
import socket
import threading
from pathlib import Path
from typing import Any

import torch

from .session import connect, is_private, ray  # isort: skip - it sets Ray's environment before anything of Ray is imported

from ray import serve
from ray.serve.config import HTTPOptions
from ray.serve.handle import DeploymentHandle
from ray.serve.schema import LoggingConfig

from ..page import render
from ..serving.app import Application
from ..serving.generator import About, Generator, ImageRequest, ImageResult, open_beside, open_student
from ..serving.queue import Busy, Queue
from ..serving.settings import Settings, check, token_digest
from .gauges import ServeGauges

ONGOING = 100_000  # requests that Ray Serve passes to a replica, which has its own queue and says 429 itself
GRACE_S = 2.0  # after the time that a request has, Ray Serve itself ends it
LOGGING = LoggingConfig(log_level="WARNING", enable_access_log=False)


def close_port() -> None:
    """Keeps this replica of Ray Serve from listening.

    A replica opens a port on all addresses, whose callers are asked for no token and whose requests are unpickled,
    which runs what they like (`_on_initialized` in ray/serve/_private/replica.py, Ray 2.60). Deployments call each
    other through it only with RAY_SERVE_USE_GRPC_BY_DEFAULT=1, which is the choice of a cluster's owner.
    """
    from ray.serve._private import constants, replica

    if not constants.RAY_SERVE_USE_GRPC_BY_DEFAULT:
        replica.add_port_to_grpc_server = lambda server, address: 0


class Student:
    """A replica: the application over its own generator, and over the teacher's deployment."""

    def __init__(
        self, settings: Settings, teacher: About | None, handle: DeploymentHandle | None, page: str, token: bytes | None
    ):
        close_port()
        self.queue = open_queue(settings, open_student(settings))
        models = [self.queue, *([] if teacher is None else [Elsewhere(teacher, handle)])]
        limits = {"images": settings.images, "timeout_s": settings.timeout_s}
        self.application = Application(models, page, token=token, **limits)
        replica = serve.get_replica_context().replica_id.unique_id
        self.gauges = ServeGauges(self.queue.about.name, replica, self.application.meter, self.queue).__enter__()

    def __serve_build_asgi_app__(self) -> Any:
        return self.application.asgi

    async def drain(self, seconds: float) -> bool:
        """See `Application.drain`."""
        return await self.application.drain(seconds)


class Teacher:
    """The replica of the teacher."""

    def __init__(self, settings: Settings, student: About):
        close_port()
        self.queue = open_queue(settings, open_beside(settings, student))

    async def draw(self, request: ImageRequest) -> ImageResult | Busy:
        """See `Model`; Busy is returned, as Ray wraps what is raised."""
        try:
            return await self.queue.draw(request)
        except Busy as busy:
            return busy


class Elsewhere:
    """A model of another deployment."""

    def __init__(self, about: About, handle: DeploymentHandle):
        self.about, self.handle = about, handle

    async def draw(self, request: ImageRequest) -> ImageResult:
        """See `Model`."""
        answer = await self.handle.draw.remote(request)
        if isinstance(answer, Busy):
            raise answer
        return answer


def open_queue(settings: Settings, generator: Generator) -> Queue:
    """The queue of a generator, which has drawn once, so that the first request does not wait for its set-up."""
    torch.set_num_threads(settings.threads)
    takes = {"class": {"label": 0}, "text": {"text": "-"}, "nothing": {}}
    generator.draw([ImageRequest(1, 0, **takes[generator.about.takes])])
    return Queue(generator.about, generator.draw, settings.batch, settings.queue)


def describe(settings: Settings) -> tuple[About, About | None]:
    """The student and the teacher beside it. They are opened once, on the CPU. Raises ValueError naming the key."""
    settings = settings.model_copy(update={"device": "cpu"})
    student = open_student(settings).about
    teacher = open_beside(settings, student)
    return student, teacher and teacher.about


def application(settings: Settings, template: Path) -> tuple[serve.Application, About, About | None]:
    """The application that Ray Serve runs, and its models.

    template: of the page. Raises ValueError for a mistake in the settings, or in a model.
    """
    token = token_digest()
    check(settings, token)
    student, teacher = describe(settings)
    resources = {"num_cpus": settings.threads, "num_gpus": float(settings.device.startswith("cuda"))}
    options = {"ray_actor_options": resources, "max_ongoing_requests": ONGOING, "logging_config": LOGGING}
    options["graceful_shutdown_timeout_s"] = settings.drain_s
    page = render(template, title=student.name)
    beside = None
    if teacher is not None:
        beside = serve.deployment(Teacher).options(**options, num_replicas=1).bind(settings, student)
    replicas = serve.deployment(serve.ingress()(Student)).options(**options, num_replicas=settings.replicas)
    return replicas.bind(settings, teacher, beside, page, token), student, teacher


def run(settings: Settings, template: Path) -> None:
    """Serves until SIGTERM or Ctrl-C, then answers what is in work, and ends. Raises ValueError for a mistake."""
    app, student, teacher = application(settings, template)
    _check_port(settings)
    processes = settings.replicas + (teacher is not None)
    connect(processes * settings.threads)
    if settings.device != "cpu" and is_private() and processes > (gpus := int(ray.cluster_resources().get("GPU", 0))):
        raise ValueError(
            f"replicas: {settings.replicas}, and {processes - settings.replicas} for the teacher, take a GPU each, but "
            f"this machine has {gpus}; give fewer, or teacher=false"
        )
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    http = HTTPOptions(host=settings.host, port=settings.port, request_timeout_s=settings.timeout_s + GRACE_S)
    serve.start(proxy_location="HeadOnly", http_options=http, logging_config=LOGGING)
    current = serve.context._get_global_client().http_config
    if (current.host, current.port) != (settings.host, settings.port):
        raise ValueError(
            f"host: Ray Serve runs on this cluster already, at {current.host}:{current.port}; give host={current.host} "
            f"port={current.port}, or stop it with: serve shutdown"
        )
    stop = threading.Event()
    handle = serve.run(app, name=student.name, route_prefix="/")
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    address = f"http://{settings.host}:{settings.port}"
    beside = "" if teacher is None else f", {teacher.name} beside it"
    print(f"{student.name} is served by {settings.replicas} replicas at {address}{beside}; stop it with Ctrl-C")
    print(json.dumps({"url": address, "model": student.name, "replicas": settings.replicas}), flush=True)
    while not stop.wait(3600):
        pass
    print("stopping: requests in work are answered first", flush=True)
    done = handle.broadcast("drain", settings.drain_s).results(timeout_s=settings.drain_s + GRACE_S)
    with contextlib.suppress(Exception):  # of a cluster that ends, too
        serve.delete(student.name)
    print(json.dumps({"drained": all(done)}), flush=True)


def _check_port(settings: Settings) -> None:
    """Raises ValueError where the port is taken, which Ray Serve would report late."""
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    with socket.socket(family) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((settings.host, settings.port))
        except OSError as error:
            raise ValueError(
                f"port: {settings.host}:{settings.port} cannot be listened on ({error.strerror}); choose another"
            ) from None
