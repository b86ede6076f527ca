"""Settings of a server, and who may reach it."""

from __future__ import annotations

import hashlib
import os
from ipaddress import ip_address
from typing import Annotated, Literal

from pydantic import Field

from ..config import Strict

TOKEN = "FEWSTEP_TOKEN"
TOKEN_CHARS = 16  # at least
MOST_IMAGES = 100  # jobs/sample.py draws so many as one batch, so the images of a seed are the same here and there
Count = Annotated[int, Field(ge=1)]
Seconds = Annotated[float, Field(gt=0, le=3600)]


class Settings(Strict):
    """Serves a generator over HTTP, with the API of OpenAI's images and a page to try it."""

    model: str
    """Folder of a run, a checkpoint, an export or a teacher; shipped:..., hub:owner/name; or models:/NAME@ALIAS, a
    registered model."""
    name: str | None = None
    """Name under which it is served; null takes the run's or the folder's."""
    teacher: str | Literal[False] | None = None
    """Teacher that the page shows beside it; null takes the run's own if its files are here, false takes none."""
    steps: Count = 18
    """Solver steps of a teacher, unless a request says otherwise: Heun's, or DDIM's where it takes texts."""
    guidance: Annotated[float, Field(ge=1)] = 1.0
    """Guidance scale of a teacher."""
    host: str = "127.0.0.1"
    """Address to listen on. One that others can reach needs a token in the environment variable FEWSTEP_TOKEN."""
    port: Annotated[int, Field(ge=1, le=65535)] = 8000
    """Port to listen on."""
    replicas: Count = 2
    """Processes that draw, each with the model."""
    images: Annotated[int, Field(ge=1, le=MOST_IMAGES)] = 16
    """Images of one request, at most."""
    batch: Annotated[int, Field(ge=1, le=4096)] = 16
    """Images that a replica draws at once, at most, for requests that wait together. With 1 each request is drawn by
    itself, and its images equal jobs/sample.py's to the last bit."""
    queue: Annotated[int, Field(ge=1, le=100_000)] = 64
    """Images that wait in a replica or are drawn there, at most. A request beyond that is answered with 429."""
    timeout_s: Seconds = 60.0
    """Seconds after which a request that has no images yet is answered with 504."""
    drain_s: Seconds = 30.0
    """Seconds that requests in work are given when the server is stopped."""
    threads: Count = 1
    """Threads of a replica's arithmetic on the CPU."""
    device: str = "cpu"
    """Device of a replica: cpu or cuda."""
    uri: str | None = None
    """Tracking server of a registered model; null takes MLFLOW_TRACKING_URI, else mlflow.db beside the runs."""


def token_digest() -> bytes | None:
    """SHA-256 of the token in the environment, which is itself passed to nobody; None without one. Raises ValueError
    for a short one."""
    token = os.environ.get(TOKEN)
    if token is None:
        return None
    if len(token) < TOKEN_CHARS or not token.isascii() or not token.isprintable() or " " in token:
        raise ValueError(
            f"{TOKEN}: a token has {TOKEN_CHARS} or more letters, digits and signs; make one with: openssl rand -hex 32"
        )
    return hashlib.sha256(token.encode()).digest()


def is_loopback(host: str) -> bool:
    """True for an address or a name that only this machine reaches."""
    if host == "localhost":
        return True
    try:
        return ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def check(settings: Settings, token: bytes | None) -> None:
    """Raises ValueError where the settings contradict each other, or would let everyone in."""
    if token is None and not is_loopback(settings.host):
        raise ValueError(
            f"host: {settings.host!r} can be reached from other machines; set a token in the environment variable "
            f"{TOKEN} first, for example by: export {TOKEN}=$(openssl rand -hex 32)"
        )
    if settings.queue < settings.images:
        raise ValueError(
            f"queue: {settings.queue}, but a request may ask for {settings.images} images (images=), and none would "
            "be taken; give as many or more"
        )
