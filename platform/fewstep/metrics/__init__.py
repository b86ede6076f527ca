"""One metric, one file. Every module of this folder is imported, so a new metric needs no edit elsewhere."""

from importlib import import_module
from pkgutil import iter_modules

from .base import METRICS, Metric, better, find_metric

for _module in iter_modules(__path__):
    import_module(f"{__name__}.{_module.name}")

__all__ = ["METRICS", "Metric", "better", "find_metric"]
