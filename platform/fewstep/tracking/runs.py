"""Reads tracked runs, for jobs that continue or compare the work of other jobs."""

from __future__ import annotations

import contextlib
import difflib
import re
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import mlflow
from mlflow.entities import Run as MlflowRun
from mlflow.exceptions import MlflowException
from mlflow.utils.mlflow_tags import MLFLOW_PARENT_RUN_ID

from ..config import UserError
from ..texts import quoted
from .store import database, prepare_store, store_errors, tracking_uri, without_password

NEWEST = ["attributes.start_time DESC"]
PAGE = 1000  # runs asked for at once


@dataclass(frozen=True)
class Run:
    """A tracked run. params and tags: text by name; metrics: the last value by name; start_ms: since the epoch.

    folder: where the run's checkpoints and journal were written, None for a run that was not made here. It may lie on
    another machine: check that it exists.
    """

    run_id: str
    name: str
    status: str
    start_ms: int
    params: dict[str, str]
    tags: dict[str, str]
    metrics: dict[str, float]
    artifact_uri: str
    folder: Path | None


class Point(NamedTuple):
    """One report of a metric. step: the image count for metrics under `by_images/`."""

    step: int
    value: float
    time_ms: int


class Store:
    """Read access to the runs of one tracking store.

    uri: see `tracking_uri`; experiment: look in this experiment only, default in all.
    Raises ValueError when there is no such database or experiment. All methods raise TrackingError when the store
    cannot be used: the file is no database, or the server does not answer.
    """

    def __init__(self, uri: str | None = None, experiment: str | None = None):
        uri = tracking_uri(uri)
        path = database(uri)
        if path and not path.is_file():
            raise ValueError(
                f"tracking.uri: no runs yet, {str(path)!r} does not exist; set MLFLOW_TRACKING_URI or train first"
            )
        self.uri = without_password(uri)
        with store_errors(uri):
            self._client = prepare_store(uri)
            known = self._client.search_experiments()
        self._experiments = [e.experiment_id for e in known if experiment in (None, e.name)]
        if not self._experiments:
            raise ValueError(
                f"experiment: no {experiment!r} in {self.uri}; there are: {', '.join(e.name for e in known)}"
            )

    def find(self, ref: str) -> Run:
        """Returns the run of a reference: a run's id, a run's name, or `last` for the one started last.

        Raises ValueError when no run or several runs match; the text lists the candidates.
        """
        if re.fullmatch(r"[0-9a-f]{32}", ref):
            with store_errors(self.uri):
                try:
                    return _run(self._client.get_run(ref))
                except MlflowException as error:
                    if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                        raise
        if ref == "last":
            runs = self._search("", 1)
        elif "'" in ref and '"' in ref:  # a query of MLflow cannot quote both
            runs = [run for run in self._search("", None) if run.name == ref]
        else:
            mark = '"' if "'" in ref else "'"
            runs = self._search(f"attributes.run_name = {mark}{ref}{mark}", 5)
        if len(runs) == 1:
            return runs[0]
        if runs:
            raise ValueError(
                f"run: {ref!r} is the name of several runs; give an id: {', '.join(r.run_id for r in runs)}"
            )
        names = [run.name for run in self._search("", PAGE)]
        hint = "".join(f"did you mean {name!r}? " for name in difflib.get_close_matches(ref, names, n=1))
        latest = ", ".join(names[:5]) or "no run at all"
        raise ValueError(f"run: no run has the id or name {ref!r} in {self.uri}; {hint}the latest are: {latest}")

    def children(self, parent: Run) -> list[Run]:
        """The child runs of `parent`, such as the trials of a sweep, sorted by name."""
        children = self._search(f"tags.`{MLFLOW_PARENT_RUN_ID}` = '{parent.run_id}'", None)
        return sorted(children, key=lambda run: (run.name, run.start_ms))

    def history(self, run: Run, metric: str) -> list[Point]:
        """All reports of a metric, sorted by step. Of several at one step the newest counts, as on MLflow's page."""
        with store_errors(self.uri):
            points = self._client.get_metric_history(run.run_id, metric)
        newest = {m.step: Point(m.step, m.value, m.timestamp) for m in sorted(points, key=lambda m: m.timestamp)}
        return [newest[step] for step in sorted(newest)]

    def files(self, run: Run, folder: str = "") -> list[str]:
        """Paths of the run's artifact files directly in `folder`; an empty list if there is no such folder."""
        with store_errors(self.uri):
            return [f.path for f in self._client.list_artifacts(run.run_id, folder or None) if not f.is_dir]

    def read(self, run: Run, path: str) -> bytes:
        """Returns the content of one artifact file."""
        with store_errors(self.uri), tempfile.TemporaryDirectory() as folder:
            return Path(self._client.download_artifacts(run.run_id, path, folder)).read_bytes()

    def grids(self, run: Run, name: str) -> dict[int, str]:
        """The artifact paths of the images that the run reported under `name`, by step."""
        pictures = [(re.fullmatch(r".*/step-(\d+)\.png", path), path) for path in self.files(run, f"grids/{name}")]
        return dict(sorted((int(match[1]), path) for match, path in pictures if match))

    def _search(self, query: str, limit: int | None) -> list[Run]:
        """The newest `limit` runs that match a query; None: all of them."""
        runs, token = [], None
        while limit is None or len(runs) < limit:
            with store_errors(self.uri):
                page = self._client.search_runs(
                    self._experiments, query, max_results=limit or PAGE, order_by=NEWEST, page_token=token
                )
            runs += [_run(run) for run in page]
            token = page.token
            if not token:
                break
        return runs[:limit]


def find_run(uri: str | None, ref: str, experiment: str | None = None) -> Run:
    """Finds a run. Arguments and errors are those of `Store` and `Store.find`."""
    return Store(uri, experiment).find(ref)


@contextlib.contextmanager
def exported(ref: str, uri: str | None = None) -> Iterator[Path]:
    """The export in a registered model, copied to this machine while the context lasts.

    ref: models:/NAME@ALIAS or models:/NAME/VERSION. uri: see `tracking_uri`. Raises ValueError for another form, and
    TrackingError or UserError for a model that is not there or is none of ours.
    """
    form = re.fullmatch(r"models:/([^/:@%'\"]+)(?:@([\w-]+)|/(\d+))", ref)
    if form is None or set(form[1]) == {"."}:
        raise ValueError(f"model: {quoted(ref)} is no registered model; give models:/NAME@ALIAS, or models:/NAME/1")
    name, alias, version = form.groups()
    store = Store(uri)
    client = store._client
    with tempfile.TemporaryDirectory() as folder:
        with store_errors(store.uri):
            try:
                if alias is not None:
                    version = client.get_model_version_by_alias(name, alias).version
                source = client.get_model_version_download_uri(name, version)
            except MlflowException as error:
                if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
                    raise
                raise UserError(f"model: {quoted(ref)} is not in {store.uri}; mlflow ui shows what is there") from None
            options = {"dst_path": folder, "tracking_uri": client.tracking_uri}
            place = Path(mlflow.artifacts.download_artifacts(source, **options))
            try:
                path = inside(place)
            except ValueError as error:
                raise UserError(f"model: {quoted(ref)}: {error}") from None
        yield path


def inside(folder: Path) -> Path:
    """The export in the folder of a downloaded model. Raises ValueError where it has none, or points elsewhere."""
    from mlflow.models import Model

    path = folder / "MLmodel"
    data = Model.load(str(path)).flavors.get("python_function", {}).get("data") if path.is_file() else None
    if not isinstance(data, str) or not (path := (folder / data).resolve()).is_relative_to(folder.resolve()):
        raise ValueError("it holds no export of ours; register one with tracking.model of a run")
    return path


def _run(run: MlflowRun) -> Run:
    folder = run.data.tags.get("fewstep.folder")
    return Run(
        run_id=run.info.run_id,
        name=run.info.run_name,
        status=run.info.status,
        start_ms=run.info.start_time,
        params=dict(run.data.params),
        tags=dict(run.data.tags),
        metrics=dict(run.data.metrics),
        artifact_uri=run.info.artifact_uri,
        folder=Path(folder) if folder else None,
    )
