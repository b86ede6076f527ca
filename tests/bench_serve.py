"""The load that a server bears: `make bench-serve`. The last line is a JSON object.

`jobs/serve.py` serves the demo's network as a generator of one call (the shipped teacher's weights: times do not
depend on them). A request asks for one image. The capacity is what 64 callers get who each ask again at once; then
requests come at 50, 80 and 120 % of it, at random moments (a Poisson process) whether or not earlier ones are
answered, and their times count from those moments. The callers run on the same machine and take their share of it.

    python tests/bench_serve.py seconds=10        # shorter; `model=...` for another one, `queue=...` as for the job
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Annotated, Any

import aiohttp
from pydantic import Field
from served import running

from fewstep.config import Strict, command
from fewstep.diffusion.samplers import calls_at
from fewstep.diffusion.schedules import EDM
from fewstep.networks.card import Card
from fewstep.networks.export import export
from fewstep.networks.pretrained import open_teacher
from fewstep.serving.meter import QUANTILES, quantile

CALLERS = 64
SHARES = (0.5, 0.8, 1.2)
CONNECTIONS = 1000
HEAD = "| offered | answered/s | p50 ms | p95 ms | p99 ms | longest ms | 429 | others |\n" + 8 * "|---" + "|"


class Bench(Strict):
    """Measures a server's capacity, and its times below, at and above it."""

    seconds: Annotated[float, Field(gt=0)] = 60.0
    """Seconds of each measurement."""
    model: str | None = None
    """A model to serve; null makes one of the demo's network."""
    replicas: Annotated[int, Field(ge=1)] = 2
    """Replicas of the server."""
    batch: Annotated[int, Field(ge=1)] = 16
    """Images drawn at once."""
    queue: Annotated[int, Field(ge=1)] = 16
    """Images that may wait in a replica."""


async def one(session: aiohttp.ClientSession, url: str, seed: int) -> tuple[int, str | None]:
    """The status of a request for one image, and its Retry-After."""
    body = {"prompt": str(seed % 10), "seed": seed}
    async with session.post(f"{url}/v1/images/generations", json=body) as answer:
        await answer.read()
        return answer.status, answer.headers.get("Retry-After")


async def closed(url: str, seconds: float) -> float:
    """Answers a second that callers get who each ask again at once."""
    ended, done = time.perf_counter() + seconds, 0

    async def caller(session: aiohttp.ClientSession, number: int) -> None:
        nonlocal done
        while time.perf_counter() < ended:
            status, _ = await one(session, url, number)
            if status == 200:
                done += time.perf_counter() < ended
            else:
                await asyncio.sleep(0.05)  # a full queue

    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=CONNECTIONS)) as session:
        await asyncio.gather(*(caller(session, number) for number in range(CALLERS)))
    return done / seconds


async def opened(url: str, rate: float, seconds: float) -> dict[str, Any]:
    """The answers to requests that come at this rate: their number by status, and quantiles of the times of images."""
    clock, rng, statuses, times, refused, hints = time.perf_counter, random.Random(0), Counter(), [], [], Counter()

    async def request(session: aiohttp.ClientSession, due: float, seed: int) -> None:
        await asyncio.sleep(due - clock())
        try:
            status, hint = await one(session, url, seed)
        except aiohttp.ClientError as error:
            status, hint = type(error).__name__, None
        statuses[status] += 1
        hints[hint] += status == 429
        (times if status == 200 else refused).append(clock() - due)

    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=CONNECTIONS)) as session:
        tasks, due, end = [], clock() + 0.1, clock() + 0.1 + seconds
        while (due := due + rng.expovariate(rate)) < end:
            tasks.append(asyncio.create_task(request(session, due, len(tasks))))
        await asyncio.gather(*tasks)
    times.sort()
    return {
        "offered_per_s": len(tasks) / seconds,
        "answered_per_s": len(times) / seconds,
        "statuses": {str(status): count for status, count in sorted(statuses.items(), key=str)},
        "retry_after": {hint: count for hint, count in hints.items() if hint},
        **{f"p{round(100 * q)}_ms": 1000 * quantile(times, q) for q in QUANTILES},
        "longest_ms": 1000 * times[-1],
        "longest_refusal_ms": 1000 * max(refused, default=0.0),
    }


def network(folder: Path) -> Path:
    """An export of one call with the demo's network."""
    net = open_teacher("shipped:fashion_mnist/teacher").requires_grad_(False)
    export(net, folder / "one", calls=calls_at(EDM(), (1.0,), on_ramp=True), card=Card(name="one"))
    return folder / "one"


@command(Bench)
def main(bench: Bench) -> None:
    with tempfile.TemporaryDirectory() as tmp:
        model = bench.model or network(Path(tmp))
        arguments = [f"{key}={getattr(bench, key)}" for key in ("replicas", "batch", "queue")]
        with running(Path(tmp), f"model={model}", "images=1", "teacher=false", *arguments) as server:
            asyncio.run(closed(server.url, min(5, bench.seconds)))  # warms up
            capacity = asyncio.run(closed(server.url, bench.seconds))
            load = os.getloadavg()[0]
            print(f"capacity: {capacity:.1f} images/s on {os.cpu_count()} CPUs, load {load:.1f}", flush=True)
            print(HEAD, flush=True)
            rows = {}
            for share in SHARES:
                row = rows[f"{share:.0%}"] = asyncio.run(opened(server.url, share * capacity, bench.seconds))
                others = sum(n for status, n in row["statuses"].items() if status not in ("200", "429"))
                cells = [f"{share:.0%} ({row['offered_per_s']:.1f}/s)", f"{row['answered_per_s']:.1f}"]
                cells += [f"{row[key]:.0f}" for key in ("p50_ms", "p95_ms", "p99_ms", "longest_ms")]
                print(f"| {' | '.join([*cells, str(row['statuses'].get('429', 0)), str(others)])} |", flush=True)
    print(json.dumps({"capacity_per_s": capacity, "seconds": bench.seconds, "rows": rows}))


if __name__ == "__main__":
    sys.exit(main())
