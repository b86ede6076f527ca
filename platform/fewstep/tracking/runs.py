"""Reading runs back, for the jobs that continue with what another job made."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from mlflow.entities import Run as MlflowRun
from mlflow.exceptions import MlflowException

from .store import database, prepare_store, tracking_uri


@dataclass(frozen=True)
class Run:
    """A tracked run. params and tags: text by name; metrics: the last value by name.

    folder: where the run's checkpoints and journal were written, None for a run that was not made here. It may lie on
    another machine: check that it exists.
    """

    run_id: str
    name: str
    status: str
    params: dict[str, str]
    tags: dict[str, str]
    metrics: dict[str, float]
    artifact_uri: str
    folder: Path | None


def find_run(uri: str | None, ref: str, experiment: str | None = None) -> Run:
    """The run that `ref` means: a run's id, a run's name, or `last` for the one started last.

    uri: see `tracking_uri`. experiment: look in this experiment only, default in all.
    Raises ValueError when no run, or more than one, is meant; the text names those that could be.
    """
    uri = tracking_uri(uri)
    path = database(uri)
    if path and not path.is_file():
        raise ValueError(
            f"tracking.uri: no runs yet, {str(path)!r} does not exist; set MLFLOW_TRACKING_URI or train first"
        )
    client = prepare_store(uri)
    known = client.search_experiments()
    experiments = [e.experiment_id for e in known if experiment in (None, e.name)]
    if not experiments:
        raise ValueError(f"experiment: no {experiment!r} in {uri}; there are: {', '.join(e.name for e in known)}")
    if re.fullmatch(r"[0-9a-f]{32}", ref):
        try:
            return _run(client.get_run(ref))
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
    newest = ["attributes.start_time DESC"]
    if ref == "last":
        found = client.search_runs(experiments, max_results=1, order_by=newest)
    else:
        quoted = '"' if "'" in ref else "'"
        named = f"attributes.run_name = {quoted}{ref}{quoted}"
        found = client.search_runs(experiments, named, max_results=5, order_by=newest)
    if len(found) == 1:
        return _run(found[0])
    if found:
        raise ValueError(
            f"run: {ref!r} is the name of several runs; give an id: {', '.join(r.info.run_id for r in found)}"
        )
    latest = client.search_runs(experiments, max_results=5, order_by=newest)
    names = ", ".join(r.info.run_name for r in latest) or "no run at all"
    raise ValueError(f"run: no run has the id or name {ref!r} in {uri}; the latest are: {names}")


def _run(run: MlflowRun) -> Run:
    folder = run.data.tags.get("fewstep.folder")
    return Run(
        run_id=run.info.run_id,
        name=run.info.run_name,
        status=run.info.status,
        params=dict(run.data.params),
        tags=dict(run.data.tags),
        metrics=dict(run.data.metrics),
        artifact_uri=run.info.artifact_uri,
        folder=Path(folder) if folder else None,
    )
