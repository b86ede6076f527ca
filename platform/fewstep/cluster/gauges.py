"""Gauges of a run, or of a server, in Ray's Prometheus endpoints. Workers set theirs at each report, the driver at any
time, a server's replicas every second.

Ray puts `ray_` before the names. Counts are gauges, too: a counter of Ray does not exist before its first event, so a
rate would miss that event, and it outlives its process. A process that ends exports its last values, unless it was
killed by SIGKILL.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from ..engine.guard import signals_of
from ..engine.train import Engine, Report
from ..serving.meter import Meter
from ..serving.queue import Queue

ABOUT = {
    "step": "Steps done; a step is one critic update",
    "images": "Real images seen by all workers",
    "images_per_second": "Real images that all workers trained on in a second, since the last report",
    "phase_seconds": "Seconds of a phase since the last report",
    "data_wait_ratio": "Share of the time since the last report that a worker waited for data",
    "memory_bytes": "Memory of a role on a worker: weights, gradients during its phase, optimiser",
    "cuda_memory_bytes": "Memory of a worker on its device: allocated, peak of allocated, reserved",
    "gradient_norm": "L2 norm of a phase's gradients before clipping, averaged since the last report",
    "health": "Signals that the guard judges, averaged since the last report",
    "events": "Number of events of the run since its driver started, by kind",
    "last_report_timestamp_seconds": "Unix time of the last report; before the first, of the driver's start",
}
SERVING = {
    "serve_requests": "Answers to requests for images since the replica started, by HTTP status",
    "serve_images": "Images sent since the replica started",
    "serve_waiting_images": "Images that wait in a replica or are drawn there",
    "serve_latency_seconds": "Seconds from a request to its images, quantile over the last minute of a replica",
}
REFRESH_S = 1.0  # Ray forgets a gauge that was not set for two of its export intervals, 20 s by default
EVENTS = ("collapse", "roll_back", "non_finite", "not_saved", "stall", "lost", "restart", "stopped", "failed")


class Gauges:
    """A run's gauges by name, `fewstep_<name>`. Each has the tag `run`, and always the same further tags.

    Use as a context manager: the gauges keep their values inside it and disappear some seconds after it, so a gauge
    that exists belongs to a living process.
    """

    about = ABOUT

    def __init__(self, run: str):
        self.run = run
        self._gauges: dict[str, Any] = {}
        self._values: dict[tuple[str, tuple[tuple[str, str], ...]], float] = {}
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._refresh, name="fewstep-gauges", daemon=True)

    def __enter__(self) -> Gauges:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def set(self, name: str, value: float, **tags: str) -> None:
        """Sets the gauge of these tags. Raises KeyError for a name that `about` does not explain."""
        from ray.util.metrics import Gauge

        if name not in self._gauges:
            self._gauges[name] = Gauge(f"fewstep_{name}", self.about[name], ("run", *tags))
        self._values[name, tuple(tags.items())] = value
        self._gauges[name].set(value, {"run": self.run, **tags})

    def _refresh(self) -> None:
        while not self._done.wait(REFRESH_S):
            self.refresh()

    def refresh(self) -> None:
        """Sets all gauges again."""
        for name, tags in list(self._values):
            self._gauges[name].set(self._values[name, tags], {"run": self.run, **dict(tags)})


class ServeGauges(Gauges):
    """The gauges of a server's replica, read from its meter and its queue. `run` is the name of the served model."""

    about = SERVING

    def __init__(self, run: str, replica: str, meter: Meter, queue: Queue):
        super().__init__(run)
        self.replica, self.meter, self.queue = replica, meter, queue

    def refresh(self) -> None:
        """Sets all gauges to what they are now."""
        for status, count in list(self.meter.requests.items()):
            self.set("serve_requests", count, replica=self.replica, status=str(status))
        self.set("serve_images", self.meter.images, replica=self.replica)
        self.set("serve_waiting_images", self.queue.images, replica=self.replica)
        for q, seconds in self.meter.quantiles().items():
            self.set("serve_latency_seconds", seconds, replica=self.replica, quantile=f"{q:g}")


class WorkerGauges(Gauges):
    """A worker's gauges, set at each report: its times and memory; rank 0 also sets the values that all ranks share."""

    def __call__(self, engine: Engine, report: Report) -> None:
        rank, metrics = str(engine.world.rank), report.metrics
        self.set("images_per_second", metrics["images_per_s"], rank=rank)
        self.set("data_wait_ratio", metrics["data_wait"], rank=rank)
        for role, kinds in memory(engine).items():
            for kind, size in kinds.items():
                self.set("memory_bytes", size, rank=rank, role=role, kind=kind)
        for kind, size in cuda_memory(engine.world.device).items():
            self.set("cuda_memory_bytes", size, rank=rank, kind=kind)
        for phase in engine.updates:
            if f"{phase}_s" in metrics:  # a phase may not have run since the last report
                self.set("phase_seconds", metrics[f"{phase}_s"], rank=rank, phase=phase)
        if engine.world.rank:
            return
        self.set("step", report.step)
        self.set("images", report.images)
        for phase in engine.updates:
            if f"{phase}/grad_norm" in metrics:
                self.set("gradient_norm", metrics[f"{phase}/grad_norm"], phase=phase)
        for signal, value in signals_of(metrics).items():
            self.set("health", value, signal=signal)


class DriverGauges(Gauges):
    """The driver's gauges of a run; they exist even if all workers are gone.

    ends: {type of an exception that ends the run: kind of event, one of EVENTS}; other exceptions count as "failed".
    """

    def __init__(self, run: str, ends: Mapping[type[BaseException], str]):
        super().__init__(run)
        self.ends, self.counts = ends, dict.fromkeys(EVENTS, 0)

    def __enter__(self) -> DriverGauges:
        self.set("last_report_timestamp_seconds", time.time())
        for kind, count in self.counts.items():
            self.set("events", count, kind=kind)
        super().__enter__()
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, Exception):
            self.count(self.ends.get(type(error), "failed"))
        super().__exit__(kind, error, trace)

    def count(self, kind: str) -> None:
        """Counts an event of this kind."""
        self.counts[kind] = self.counts.get(kind, 0) + 1
        self.set("events", self.counts[kind], kind=kind)

    def follow(self, line: Mapping[str, Any]) -> None:
        """Takes a line of the run's reports: {step, images}, with metrics or scores, and maybe events."""
        if "metrics" in line:
            self.set("last_report_timestamp_seconds", time.time())
        for event in line.get("events", []):
            self.count(event["kind"])


def memory(engine: Engine) -> dict[str, dict[str, int]]:
    """Bytes on this worker by role and kind. Of a sharded tensor only the own shard counts. The average is a role, too.

    Gradients count as they are during the phase of a role; they are freed after its update.
    """
    out = {role: {"weights": _bytes(net.parameters())} for role, net in engine.nets.items()}
    for role, optim in engine.optims.items():
        state = (value for of_one in optim.state.values() for value in of_one.values())
        out[role] |= {"gradients": out[role]["weights"], "optimiser": _bytes(state)}
    return out


def _bytes(values: Iterable[Any]) -> int:
    local = (v.to_local() if hasattr(v, "to_local") else v for v in values if isinstance(v, Tensor))
    return sum(v.numel() * v.element_size() for v in local)


def cuda_memory(device: torch.device) -> dict[str, int]:
    """Bytes of this process on a CUDA device, as PyTorch's allocator counts them; empty for another device."""
    if device.type != "cuda":
        return {}
    return {
        "allocated": torch.cuda.memory_allocated(device),
        "peak": torch.cuda.max_memory_allocated(device),
        "reserved": torch.cuda.memory_reserved(device),
    }
