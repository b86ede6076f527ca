"""State in one import, for notebooks and scripts: save a run, list its checkpoints, read one, resume from it."""

from .checkpoint import load, load_net, read_weights, tensors_of
from .folder import checkpoints, complete, newest, step_of
from .manifest import CheckpointError, read_manifest
from .retention import Keep
from .saver import Saver

__all__ = [
    "CheckpointError",
    "Keep",
    "Saver",
    "checkpoints",
    "complete",
    "load",
    "load_net",
    "newest",
    "read_manifest",
    "read_weights",
    "step_of",
    "tensors_of",
]
