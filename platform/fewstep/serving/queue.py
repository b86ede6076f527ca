"""The queue before a generator: what waits together is drawn together, and only so much may wait."""

from __future__ import annotations

import asyncio
import math
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

from .generator import About, ImageRequest, ImageResult

REMEMBERED = 0.9  # share of the old value in the running mean of the speed


class Busy(Exception):
    """Too many images wait; try again in `retry_s` whole seconds."""

    def __init__(self, retry_s: int):
        super().__init__(retry_s)
        self.retry_s = retry_s


class Model(Protocol):
    """A model that is served, wherever it draws."""

    about: About

    async def draw(self, request: ImageRequest) -> ImageResult:
        """The answer to a request. Raises Busy. A caller that is cancelled gives up its place."""


class Queue:
    """A generator in this process, with a thread that draws one batch after the other.

    A batch is what waits when the last one is done, up to `batch` images. (Ray Serve's own batching closes a batch
    after a fixed time, so under load it waits with small ones.) limit: images that wait or are drawn, at most.
    """

    def __init__(
        self, about: About, draw: Callable[[Sequence[ImageRequest]], list[ImageResult]], batch: int, limit: int
    ):
        self.about, self.batch, self.limit = about, batch, limit
        self.images = 0  # that wait or are drawn
        self.drawn = 0  # since the start
        self.speed: float | None = None  # images a second, a running mean
        self._draw, self._thread = draw, ThreadPoolExecutor(1, "fewstep-draw")
        self._waiting: deque[tuple[ImageRequest, asyncio.Future[ImageResult]]] = deque()
        self._worker: asyncio.Task[None] | None = None

    async def draw(self, request: ImageRequest) -> ImageResult:
        """See `Model`."""
        if self.images + request.images > self.limit:
            raise Busy(max(1, math.ceil(self.images / self.speed)) if self.speed else 1)
        future = asyncio.get_running_loop().create_future()
        self._waiting.append((request, future))
        self.images += request.images
        if self._worker is None or self._worker.done():
            self._worker = asyncio.create_task(self._draw_batches())
        try:
            return await future
        finally:
            self.images -= request.images

    def _next_batch(self) -> list[tuple[ImageRequest, asyncio.Future[ImageResult]]]:
        """The next batch: the oldest request, and others with its `steps` as far as they fit in the order they came."""
        chosen: list[tuple[ImageRequest, asyncio.Future[ImageResult]]] = []
        left: deque[tuple[ImageRequest, asyncio.Future[ImageResult]]] = deque()
        images, full = 0, False
        for request, future in self._waiting:
            if future.done():  # the caller has given up
                continue
            fits = not chosen or (
                request.steps == chosen[0][0].steps and images + request.images <= self.batch and not full
            )
            full = full or not fits
            (chosen if fits else left).append((request, future))
            images += request.images if fits else 0
        self._waiting = left
        return chosen

    async def _draw_batches(self) -> None:
        loop = asyncio.get_running_loop()
        while batch := self._next_batch():
            start = loop.time()
            try:
                answers = await loop.run_in_executor(self._thread, self._draw, [request for request, _ in batch])
            except Exception as error:
                for _, future in batch:
                    if not future.done():
                        future.set_exception(error)
                continue
            images = sum(request.images for request, _ in batch)
            speed = images / max(loop.time() - start, 1e-9)
            self.speed = speed if self.speed is None else REMEMBERED * self.speed + (1 - REMEMBERED) * speed
            self.drawn += images
            for (_, future), answer in zip(batch, answers, strict=True):
                if not future.done():
                    future.set_result(answer)
