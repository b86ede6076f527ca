"""Tracking of runs with MLflow. A report is written to disk at once, and sent as soon as the server answers."""

from .provenance import Provenance, provenance
from .runs import Point, Run, Store, exported, find_run
from .store import prepare_store, tracking_uri
from .tracker import SendCounts, Tracker, send

__all__ = [
    "Point",
    "Provenance",
    "Run",
    "SendCounts",
    "Store",
    "Tracker",
    "exported",
    "find_run",
    "prepare_store",
    "provenance",
    "send",
    "tracking_uri",
]
