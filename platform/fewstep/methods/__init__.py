"""One paper, one file. Every module of this folder is imported, so a new method needs no edit elsewhere."""

from importlib import import_module
from pkgutil import iter_modules

from .base import METHODS, Batch, Method, Phase

for _module in iter_modules(__path__):
    import_module(f"{__name__}.{_module.name}")

__all__ = ["METHODS", "Batch", "Method", "Phase"]
