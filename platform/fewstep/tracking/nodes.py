"""System metrics of the node that a process runs on, under the names that MLflow's page knows."""

from __future__ import annotations

import contextlib
import platform
import re

PREFIX = "system/"  # MLflow shows these metrics on a tab of their own


class SystemMetrics:
    """Processor, memory, disk and network of this node, and its GPUs where nvidia-ml-py is installed.

    MLflow's own monitors read them. Its thread is not used, because it writes to the server and not to the journal.
    """

    def __init__(self) -> None:
        from mlflow.system_metrics.metrics.cpu_monitor import CPUMonitor
        from mlflow.system_metrics.metrics.disk_monitor import DiskMonitor
        from mlflow.system_metrics.metrics.gpu_monitor import GPUMonitor
        from mlflow.system_metrics.metrics.network_monitor import NetworkMonitor

        self.node = re.sub(r"[^A-Za-z0-9_.-]", "-", platform.node()) or "node"
        self.monitors = [CPUMonitor(), DiskMonitor(), NetworkMonitor()]
        with contextlib.suppress(ImportError, RuntimeError):  # no nvidia-ml-py, or no GPU
            self.monitors.append(GPUMonitor())
        self.read()  # the processors' use is that since the last reading

    def read(self) -> dict[str, float]:
        """Values by name, `system/<node>/<metric>`: percentages and megabytes; the processors' since the last call."""
        metrics = {}
        for monitor in self.monitors:
            monitor.collect_metrics()
            metrics |= {f"{PREFIX}{self.node}/{name}": float(v) for name, v in monitor.aggregate_metrics().items()}
            monitor.clear_metrics()
        return metrics
