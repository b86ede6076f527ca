"""The tracking store: its URI, its creation, and whether it can be used."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import socket
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

from ..checks import Check
from ..config import UserError, home
from ..storage.place import probe
from ..texts import has_masked, masked, quoted, reason, revealed

# MLflow reads these when it is imported (telemetry) and at each call (the rest). With MLflow's defaults the sender
# would wait four minutes for a server that does not answer; with these it waits some seconds.
for _name, _value in {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
}.items():
    os.environ.setdefault(_name, _value)

from mlflow import MlflowClient  # noqa: E402
from mlflow.exceptions import MlflowException  # noqa: E402

from .journal import TrackingError  # noqa: E402

PORTS = {"http": 80, "https": 443, "postgresql": 5432, "mysql": 3306, "mssql": 1433}
SCHEMES = ("sqlite", *PORTS)


def tracking_uri(uri: str | None = None, root: Path | None = None) -> str:
    """Absolute URI of the tracking store.

    uri: None takes MLFLOW_TRACKING_URI, and when that is unset `sqlite:///<root>/mlflow.db`, which `mlflow ui` shows
    without options when it is started in `root`. root: default `home`, the folder that jobs write to. It differs in a
    training worker, so call this in the driver. Raises ValueError for a store that is neither a server nor an SQL
    database, and for a URI whose password was masked.
    """
    base = (root or home()).absolute()
    uri = uri or os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{base / 'mlflow.db'}"
    if urlsplit(uri).scheme.partition("+")[0] not in SCHEMES:
        raise ValueError(
            f"tracking.uri: {quoted(uri)} is neither a server nor an SQL database; give http://host:port or "
            "sqlite:///path/mlflow.db"
        )
    uri = revealed(uri, os.environ.get("MLFLOW_TRACKING_URI"))
    if has_masked(uri):
        raise ValueError(
            f"tracking.uri: {uri} lacks its password, which is never written to disk; give the whole URI as "
            "tracking.uri=..., or as uri=... where a job has that, or in the environment variable MLFLOW_TRACKING_URI"
        )
    if path := database(uri):
        return f"sqlite:///{base / path}"
    return uri.rstrip("/")


def database(uri: str) -> Path | None:
    """Returns the file of an SQLite store, or None for another store."""
    return Path(uri.removeprefix("sqlite:///")) if uri.startswith("sqlite:///") else None


def without_password(uri: str) -> str:
    """Returns the URI with *** for passwords and other secrets, so that it can be written to disk."""
    return masked(uri)


def check(recipe: Any) -> list[Check]:
    """Checks that this process can use the tracking store: it can write an SQLite file, or the server answers."""
    uri = recipe.tracking.uri
    parts, file = urlsplit(uri), database(uri)
    if file is not None:
        remedy = "choose another folder with FEWSTEP_HOME=..., or a server with MLFLOW_TRACKING_URI=http://host:port"
    else:
        remedy = (
            f"start it with: mlflow server --host {parts.hostname} --port {parts.port or 5000}, or name another with "
            "uri=... or MLFLOW_TRACKING_URI"
        )
    error = reach(uri)
    if error is None:
        return [Check("MLflow", "ok", f"{masked(uri)}: {'answers' if file is None else 'writable'}")]
    status = "warning" if error.startswith("answers") else "broken"
    return [Check("MLflow", status, f"{masked(uri)}: {error}", remedy)]


def reach(uri: str, timeout_s: float = 10.0) -> str | None:
    """Returns the reason why this process cannot use the tracking store; None if it can.

    The folder of an SQLite file must be writable, a server must answer /health, the port of another database be open.
    """
    file = database(uri)
    if file is not None and file.exists() and not os.access(file, os.W_OK):
        return f"{file} is not writable"
    parts = urlsplit(uri)
    try:
        if file is not None:
            probe(file.parent)
        elif not parts.scheme.startswith("http"):
            port = parts.port or PORTS[parts.scheme.partition("+")[0]]
            socket.create_connection((parts.hostname, port), timeout_s).close()
        else:
            address = f"{parts.scheme}://{parts.hostname}:{parts.port or PORTS[parts.scheme]}{parts.path}/health"
            with urllib.request.urlopen(address, timeout=timeout_s) as answer:  # noqa: S310 - http or https
                answer.read()
    except urllib.error.HTTPError as error:
        return f"answers {error.code} {error.reason} on /health"
    except OSError as error:
        why = getattr(error, "reason", error)  # an error of urllib holds the socket's
        return reason(why) if isinstance(why, BaseException) else str(why)
    return None


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def prepare_store(uri: str) -> MlflowClient:
    """Returns a client of the store. An SQLite database is created first, with its tables.

    MLflow creates an SQLite database in some seventy migrations. If several processes start them at once, all but one
    fail. So a file lock beside the database lets one process create it while the others wait.
    """
    path = database(uri)
    with _locked(path.with_name(path.name + ".lock")) if path else contextlib.nullcontext():
        client = MlflowClient(uri)
        if path:
            client.search_experiments(max_results=1)
            client.search_registered_models(max_results=1)
        return client


@contextlib.contextmanager
def store_errors(uri: str) -> Iterator[None]:
    """Context that turns every error of a store's client into a TrackingError that names the store: the file is no
    database, the driver is missing, the server does not answer."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # of MLflow, SQLAlchemy, a driver or the network
        text = masked(str(error).strip().split("\n")[0]) or type(error).__name__
        raise TrackingError(f"tracking.uri: {without_password(uri)} cannot be used: {text[:300]}") from error


def experiment(client: MlflowClient, uri: str, name: str) -> str:
    """Returns the id of the experiment, and creates it if it is missing. Other processes may do so at the same time.

    With SQLite its artifacts go to `mlartifacts/` beside the database; a server chooses the place itself.
    Raises TrackingError for a deleted experiment.
    """
    path = database(uri)
    place = (path.parent / "mlartifacts" / re.sub(r"[^\w.-]", "_", name)).as_uri() if path else None
    experiment = client.get_experiment_by_name(name)
    if experiment is None:
        try:
            return client.create_experiment(name, artifact_location=place)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        experiment = client.get_experiment_by_name(name)
    if experiment.lifecycle_stage == "deleted":
        raise TrackingError(
            f"experiment {name!r} is deleted; bring it back with: mlflow experiments restore "
            f"--experiment-id {experiment.experiment_id}"
        )
    return experiment.experiment_id


def page(uri: str, experiment_id: str, run_id: str) -> str:
    """Returns the URL of a run's page; for a database also the command that serves the page."""
    path = f"#/experiments/{quote(experiment_id)}/runs/{quote(run_id)}"
    if uri.startswith("http"):
        return f"{without_password(uri)}/{path}"
    return f"http://127.0.0.1:5000/{path} while this runs: mlflow ui --backend-store-uri {without_password(uri)}"
