"""The HTTP application: OpenAI's images API, its health, and the page to try it."""

from __future__ import annotations

import asyncio
import base64
import json
import logging
import re
import secrets
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

from pydantic import Field
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route

from ..config import ConfigError, Strict, validate
from ..texts import quoted
from .generator import About, ImageRequest
from .guard import Refusal, admit
from .meter import Meter
from .queue import Busy, Model

log = logging.getLogger("fewstep.serving")

BODY_BYTES = 64 * 1024
PROMPT_CHARS = 4000
MOST_STEPS = 1000
SAFE = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}
PAGE = SAFE | {
    "X-Frame-Options": "DENY",
    "Content-Security-Policy": "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; "
    "img-src data:; connect-src 'self'; form-action 'none'; base-uri 'none'; frame-ancestors 'none'",
}


class Body(Strict):
    """A request for images. `seed` and `steps` are ours, the rest is OpenAI's."""

    model: str | None = None
    prompt: int | str
    n: int = Field(default=1, ge=1)
    size: str | None = None
    response_format: str | None = None
    seed: int | None = Field(default=None, ge=0)
    steps: int | None = Field(default=None, ge=1, le=MOST_STEPS)
    user: str | None = None


class Application:
    """The routes over the models that are served; `asgi` is the application.

    models: the first is taken where a request names none. page: HTML. token: see `admit`. images: of a request, at
    most. timeout_s: see settings.
    """

    def __init__(
        self,
        models: Sequence[Model],
        page: str,
        *,
        token: bytes | None = None,
        images: int = 16,
        timeout_s: float = 60.0,
    ):
        self.models = {model.about.name: model for model in models}
        self.default, self.page, self.token = models[0].about.name, page, token
        self.images, self.timeout_s = images, timeout_s
        self.since, self.meter = int(time.time()), Meter()
        self.closing, self.open = False, 0  # requests for images that are in work
        routes = [
            Route("/", self._home),
            Route("/healthz", self._health),
            Route("/v1/models", self._guarded(self._list)),
            Route("/v1/models/{name}", self._guarded(self._retrieve)),
            Route("/v1/images/generations", self._guarded(self._generate), methods=["POST"]),
        ]
        self.asgi = Starlette(routes=routes, exception_handlers={HTTPException: _no_route})

    # The routes

    async def _home(self, request: Request) -> Response:
        return HTMLResponse(self.page, headers=PAGE)

    async def _health(self, request: Request) -> Response:
        return JSONResponse({"status": "ok"}, headers=SAFE)

    async def _list(self, request: Request) -> dict[str, Any]:
        return {"object": "list", "data": [self._model_fields(model.about) for model in self.models.values()]}

    async def _retrieve(self, request: Request) -> dict[str, Any]:
        return self._model_fields(self._model(request.path_params["name"]).about)

    def _model_fields(self, about: About) -> dict[str, Any]:
        openai = {"id": about.name, "object": "model", "created": self.since, "owned_by": "fewstep"}
        return openai | about.to_dict() | {"images": self.images}

    async def _generate(self, request: Request) -> dict[str, Any]:
        if self.closing:
            text, headers = "the server is being stopped; try again later", {"Retry-After": "10", "Connection": "close"}
            raise Refusal(503, text, "unavailable", headers=headers)
        body = read(await _read_body(request))
        model = self._model(body.model or self.default)
        image_request = self._parse(body, model.about)
        start = time.perf_counter()
        self.open += 1
        try:
            async with asyncio.timeout(self.timeout_s):
                drawn = await model.draw(image_request)
        except TimeoutError:
            raise Refusal(504, f"no images after {self.timeout_s:g} s; ask for fewer, or later", "timeout") from None
        except Busy as busy:
            text = f"too many images wait; try again in {busy.retry_s} s"
            raise Refusal(429, text, "rate_limit_exceeded", headers={"Retry-After": str(busy.retry_s)}) from None
        finally:
            self.open -= 1
        self.meter.record_answer(time.perf_counter() - start, image_request.images)
        return {
            "created": int(time.time()),
            "data": [{"b64_json": base64.b64encode(file).decode()} for file in drawn.pngs],
            "output_format": "png",
            "size": model.about.to_dict()["size"],
            "model": model.about.name,
            "seed": image_request.seed,
            "seconds": drawn.seconds,
            "drawn_together": drawn.together,
        }

    async def drain(self, seconds: float) -> bool:
        """Refuses new requests, and waits for those in work. False if some are not answered after `seconds`."""
        self.closing = True
        deadline = time.monotonic() + seconds
        while self.open and time.monotonic() < deadline:
            await asyncio.sleep(0.02)
        return not self.open

    # What a request means

    def _model(self, name: str) -> Model:
        if name not in self.models:
            known = ", ".join(self.models)
            raise Refusal(404, f"model: no {quoted(name)} here; there is {known}", "model_not_found", "model")
        return self.models[name]

    def _parse(self, body: Body, about: About) -> ImageRequest:
        """The request for a model. Raises Refusal naming the field."""
        size = about.to_dict()["size"]
        if body.n > self.images:
            raise _invalid("n", f"{body.n} images, but a request may ask for {self.images}")
        if body.size not in (None, "auto", size):
            raise _invalid("size", f"{quoted(body.size)}, but this model makes {size}")
        if body.response_format not in (None, "b64_json"):
            raise _invalid("response_format", f"{quoted(body.response_format)}; images are sent as b64_json only")
        if body.steps is not None and about.steps is None:
            raise _invalid("steps", "this model is a student, which has its own; leave them out")
        seed = secrets.randbelow(2**31) if body.seed is None else body.seed
        text = str(body.prompt)
        if len(text) > PROMPT_CHARS:
            raise _invalid("prompt", f"{len(text):,} letters; give {PROMPT_CHARS:,} at most")
        if about.takes == "nothing":
            if text:
                raise _invalid("prompt", "this model takes none; send an empty one")
            return ImageRequest(body.n, seed, steps=body.steps)
        if about.takes == "class":
            return ImageRequest(body.n, seed, label=label_of(text, about), steps=body.steps)
        if not text.strip():
            raise _invalid("prompt", "empty; give a text")
        return ImageRequest(body.n, seed, text=text, steps=body.steps)

    # Around a route

    def _guarded(self, route: Callable[[Request], Awaitable[dict[str, Any]]]) -> Callable[[Request], Any]:
        """The route for those who may ask; an error as OpenAI writes it."""

        async def answer(request: Request) -> Response:
            number = request.headers.get("x-request-id", "")
            headers: Mapping[str, str] = {}
            try:
                admit(request.headers, self.token)
                status, content = 200, await route(request)
            except Refusal as refusal:
                status, content, headers = refusal.status, refusal.to_dict(), refusal.headers
            except ClientDisconnect:
                return Response(status_code=499)
            except Exception:
                log.exception("request %s failed", quoted(number))
                refusal = Refusal(500, f"internal error; the log of the server has it under {number}", "internal_error")
                status, content = refusal.status, refusal.to_dict()
            if request.method == "POST":
                self.meter.count(status)
            return JSONResponse(content, status, headers=SAFE | dict(headers))

        return answer


def label_of(text: str, about: About) -> int:
    """The class that a prompt names, by number or by name. Raises Refusal."""
    if re.fullmatch(r"[0-9]{1,9}", text) and int(text) < about.classes:
        return int(text)
    names = [name.casefold() for name in about.class_names]
    if names.count(text.strip().casefold()) == 1:
        return names.index(text.strip().casefold())
    known = f", or a name: {', '.join(about.class_names[:20])}" if names else ""
    raise _invalid("prompt", f"{quoted(text)} is no class; give a number from 0 to {about.classes - 1}{known}")


def read(data: bytes) -> Body:
    """The body of a request. Raises Refusal naming the field."""
    try:
        content = json.loads(data, parse_constant=_no_number)
        if not isinstance(content, dict):
            raise ValueError("give an object")
    except (ValueError, RecursionError) as error:
        raise Refusal(400, f"the body is no JSON object: {quoted(str(error))}", "invalid_json") from None
    try:
        return validate(Body, content)
    except ConfigError as error:
        lines = str(error).splitlines()
        raise Refusal(400, "; ".join(lines), "invalid_value", lines[0].partition(":")[0]) from None


def _no_number(text: str) -> Any:
    raise ValueError(f"{text} is no number of JSON")


async def _read_body(request: Request) -> bytes:
    """The body of a request of JSON. Raises Refusal for another type and for too many bytes, of which no more are
    kept."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json" or "content-encoding" in request.headers:
        raise Refusal(415, "Content-Type: send application/json, not compressed", "unsupported_type")
    length = request.headers.get("content-length", "0")
    body, too_long = bytearray(), Refusal(413, f"the body is longer than {BODY_BYTES:,} bytes", "too_long")
    if not length.isdecimal() or int(length) > BODY_BYTES:
        raise too_long
    async for chunk in request.stream():
        body += chunk
        if len(body) > BODY_BYTES:
            raise too_long
    return bytes(body)


def _invalid(field: str, text: str) -> Refusal:
    return Refusal(400, f"{field}: {text}", "invalid_value", field)


async def _no_route(request: Request, error: Exception) -> Response:
    """An unknown path or method, as OpenAI writes it."""
    status = getattr(error, "status_code", 404)
    text, code = ("no such method here", "method_not_allowed") if status == 405 else ("no such path", "not_found")
    headers = SAFE | dict(getattr(error, "headers", None) or {})
    return JSONResponse(Refusal(status, text, code).to_dict(), status, headers=headers)
