"""The sender: copies operations from the journal to MLflow, in order.

Sending an operation twice has the same effect as sending it once, so a crash between the server's answer and the
marker does no harm. Metrics carry the time of their journal entry, and an SQL store keeps one row per (name, time,
step, value). Parameters, tags and files overwrite themselves. The run and its model versions are found by a tag.
"""

from __future__ import annotations

import json
import re
import tempfile
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from mlflow.entities import (
    Dataset,
    DatasetInput,
    InputTag,
    LoggedModelOutput,
    LoggedModelStatus,
    Metric,
    Param,
    RunTag,
)
from mlflow.exceptions import MlflowException
from PIL import Image

from ..texts import masked
from .journal import Entry, Journal, log
from .model import save_model
from .nodes import PREFIX
from .store import TrackingError, experiment, page, prepare_store

METRICS, PARAMS = 1000, 100  # entities MLflow takes in one request
PERMANENT = ("INVALID_PARAMETER_VALUE", "BAD_REQUEST")  # errors that the same request gets again
THUMBNAIL = 256  # pixels; MLflow's page loads this copy before the full image


class Sender:
    """Sends a journal's operations to the store at `uri`. Used by one thread."""

    def __init__(self, journal: Journal, uri: str):
        self.journal, self.uri, self.client = journal, uri, None

    @property
    def page(self) -> str | None:
        """The run's page in MLflow, see store.page; None until the store has answered."""
        run_id, experiment_id = self.journal.run_id, self.journal.experiment_id
        return page(self.uri, experiment_id, run_id) if run_id and experiment_id else None

    def step(self) -> int:
        """Sends the oldest operations, many metrics in one request. Returns their number, 0 if none are waiting.

        Errors of MLflow pass through when the store cannot be reached; nothing is marked as sent then.
        """
        waiting = self.journal.pending()
        if not waiting:
            return 0
        if self.client is None:
            self.client = prepare_store(self.uri)
        if self.journal.run_id is None:
            self._find_or_create_run()
        batch = waiting[:1]
        try:
            if waiting[0].op["op"] == "metrics":
                batch = self._metrics(waiting)
            else:
                getattr(self, "_" + waiting[0].op["op"])(waiting[0])
        except MlflowException:
            self._check_active()
            raise
        self.journal.acknowledge(batch)
        return len(batch)

    # ------------------------------------------------------------------------------------------------ the run

    def _check_active(self) -> None:
        """Raises TrackingError for a run that was deleted: MLflow refuses its reports until it is restored."""
        run_id = self.journal.run_id
        if self.client.get_run(run_id).info.lifecycle_stage == "deleted":
            raise TrackingError(f"run {run_id} is deleted; bring it back with: mlflow runs restore --run-id {run_id}")

    def _find_or_create_run(self) -> None:
        opened = next(self.journal.entries()).op
        experiment_id = experiment(self.client, self.uri, opened["experiment"])
        if opened["run_id"]:
            run = self.client.get_run(opened["run_id"])
        else:
            runs = self.client.search_runs([experiment_id], f"tags.`fewstep.journal` = '{opened['journal']}'")
            tags = opened["tags"] | {"fewstep.journal": opened["journal"]}
            run = runs[0] if runs else self.client.create_run(experiment_id, opened["time"], tags, opened["name"])
        self.journal.run_id, self.journal.experiment_id = run.info.run_id, run.info.experiment_id
        self.journal.mark()

    def _open(self, entry: Entry) -> None:
        # a run that was created here has these tags already; one that the caller named has not
        if entry.op["run_id"]:
            self._tags(entry)

    def _resume(self, entry: Entry) -> None:
        self.client.update_run(self.journal.run_id, status="RUNNING")
        self._tags(entry)

    def _status(self, entry: Entry) -> None:
        self.client.set_terminated(self.journal.run_id, status=entry.op["status"], end_time=entry.op["time"])

    # ----------------------------------------------------------------------------- metrics, parameters, tags

    def _batches(self, entry: Entry, items: Sequence, size: int, send: Callable[[Sequence], None]) -> None:
        """Sends `items` in batches of `size`. The items of a refused batch are sent one by one, and those that are
        refused again are recorded."""
        for start in range(0, len(items), size):
            part = items[start : start + size]
            try:
                send(part)
            except MlflowException as error:
                if error.error_code not in PERMANENT:
                    raise
                self._check_active()  # else every report of a deleted run would count as refused
                if len(part) > 1:
                    self._batches(entry, part, 1, send)
                else:
                    self.journal.refuse(entry, f"{entry.op['op']} {part[0].key}", error.message.strip().splitlines()[0])

    def _metrics(self, waiting: list[Entry]) -> list[Entry]:
        batch, metrics = [], []
        for entry in waiting:
            if entry.op["op"] != "metrics" or len(metrics) >= METRICS:
                break
            op = entry.op
            for name, value in op["values"].items():
                metrics.append(Metric(name, value, op["time"], op["step"]))
                if not name.startswith(PREFIX):
                    metrics.append(Metric(f"by_images/{name}", value, op["time"], op["images"]))
            batch.append(entry)
        send = lambda part: self.client.log_batch(self.journal.run_id, metrics=part)
        self._batches(batch[0], metrics, METRICS, send)
        return batch

    def _params(self, entry: Entry) -> None:
        params = [Param(k, v) for k, v in entry.op["params"].items()]
        self._batches(entry, params, PARAMS, lambda part: self.client.log_batch(self.journal.run_id, params=part))

    def _tags(self, entry: Entry) -> None:
        tags = [RunTag(k, v) for k, v in entry.op["tags"].items()]
        self._batches(entry, tags, PARAMS, lambda part: self.client.log_batch(self.journal.run_id, tags=part))

    def _score(self, entry: Entry) -> None:
        score, time, step = entry.op["score"], entry.op["time"], entry.op["step"]
        metric = [Metric(f"score/{score['name']}", score["value"], time, step)]
        self._batches(entry, metric, 1, lambda part: self.client.log_batch(self.journal.run_id, metrics=part))
        so_far = [e.op["score"] | {"step": e.op["step"]} for e in self._entries_until(entry) if e.op["op"] == "score"]
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "scores.json"
            path.write_text(json.dumps(so_far, indent=1))
            self._upload(entry, path)

    def _entries_until(self, last: Entry):
        for entry in self.journal.entries():
            yield entry
            if entry.serial == last.serial:
                return

    # -------------------------------------------------------------------------------------------------- files

    def _upload(self, entry: Entry, path: Path, to: str = "") -> None:
        if path.exists():
            send = self.client.log_artifacts if path.is_dir() else self.client.log_artifact
            send(self.journal.run_id, str(path), to or None)
        else:
            self.journal.refuse(entry, f"{entry.op['op']} {path}", "the file is gone")

    def _artifact(self, entry: Entry) -> None:
        self._upload(entry, self.journal.file(entry), entry.op["to"])

    def _image(self, entry: Entry) -> None:
        """Uploads the PNG under its own path, and again with a small copy where MLflow's page looks for images."""
        op, path, run_id = entry.op, self.journal.file(entry), self.journal.run_id
        if not path.exists():
            return self.journal.refuse(entry, f"image {op['name']}", "its file is gone")
        image = Image.fromarray(np.load(path))
        # the names of MLflow's log_image, with an identity that is the same when the image is sent again
        identity = uuid.uuid5(uuid.NAMESPACE_URL, f"{run_id}/{entry.serial}")
        name = f"{op['name'].replace('/', '~')}+step+{op['step']}+timestamp+{op['time']}+{identity}"
        with tempfile.TemporaryDirectory() as folder:
            png = Path(folder) / f"step-{op['step']:08d}.png"
            image.save(png)
            self._upload(entry, png, f"grids/{op['name']}")
            png.rename(Path(folder) / f"{name}.png")
            image.thumbnail((THUMBNAIL, THUMBNAIL))
            image.save(Path(folder) / f"{name}+compressed.webp")
            self.client.log_artifacts(run_id, folder, "images")
        self.client.set_tag(run_id, "mlflow.loggedImages", "true")

    def _model(self, entry: Entry) -> None:
        """The export as a logged model with the run's scores, and as a version of the registered model."""
        op, run_id, client = entry.op, self.journal.run_id, self.client
        folder = Path(op["folder"])
        if not folder.is_dir():
            return self.journal.refuse(entry, f"model {folder}", "the folder is gone")
        model_id = self._logged_model(entry, folder)
        try:
            client.create_registered_model(op["name"])
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        tags = {"fewstep.serial": str(entry.serial)}
        versions = client.search_model_versions(f"name = '{op['name']}' and run_id = '{run_id}'")
        version = next((v for v in versions if tags.items() <= v.tags.items()), None)
        if version is None:
            source = client.get_logged_model(model_id).artifact_location  # an SQL store finds no models:/ of its own
            version = client.create_model_version(
                op["name"], source, run_id, tags=tags, await_creation_for=None, model_id=model_id
            )
        client.set_registered_model_alias(op["name"], op["alias"], version.version)

    def _logged_model(self, entry: Entry, folder: Path) -> str:
        """Id of the logged model of this entry, which is made and filled where it is not yet whole."""
        op, run_id, client = entry.op, self.journal.run_id, self.client
        experiments, tags = [self.journal.experiment_id], {"fewstep.serial": str(entry.serial)}
        models = client.search_logged_models(experiments, f"source_run_id = '{run_id}'")
        model = next((m for m in models if tags.items() <= m.tags.items()), None)
        if model is None:
            name = re.sub(r"[/:.%'\"]", "_", op["name"])  # what MLflow does not take in a logged model's name
            model = client.create_logged_model(experiments[0], name, run_id, tags)
        if model.status != LoggedModelStatus.READY:
            with tempfile.TemporaryDirectory() as tmp:
                save_model(folder, Path(tmp) / "model")
                client.log_model_artifacts(model.model_id, str(Path(tmp) / "model"))
            client.finalize_logged_model(model.model_id, "READY")
        step, scores = 0, {}
        for e in self._entries_until(entry):
            if e.op["op"] == "score":
                step = max(step, e.op["step"])
                scores[e.op["score"]["name"]] = e.op
        outputs = client.get_run(run_id).outputs
        if model.model_id not in {known.model_id for known in (outputs.model_outputs if outputs else ())}:
            client.log_outputs(run_id, [LoggedModelOutput(model.model_id, step)])
        for name, scored in scores.items():
            value, when, at = scored["score"]["value"], scored["time"], scored["step"]
            client.log_metric(run_id, f"score/{name}", value, when, at, model_id=model.model_id)
        return model.model_id

    def _input(self, entry: Entry) -> None:
        """The data set of the run."""
        op = entry.op
        data = Dataset(op["name"], op["digest"], "local", json.dumps({"uri": op["source"]}), profile=op["profile"])
        tags = [InputTag("mlflow.data.context", "training")]
        self.client.log_inputs(self.journal.run_id, [DatasetInput(data, tags)])


def drain(sender: Sender, give_up: Callable[[], bool], wait: Callable[[float], object]) -> None:
    """Sends until nothing is waiting or `give_up()`. After a failure it calls `wait(seconds)`, longer each time.

    It logs the first failure, with the reason, and the recovery.
    """
    pause_s, failures = 0.5, 0
    while not give_up():
        try:
            if not sender.step():
                return
        except Exception as error:  # of any kind: the thread must survive it
            if failures == 0:
                reason = masked(str(error).strip() or type(error).__name__).splitlines()[0]
                log.warning("tracking waits and training continues: %s", reason)
            failures += 1
            wait(pause_s)
            pause_s = min(2 * pause_s, 30.0)
        else:
            if failures:
                log.warning("tracking continues after %d failed attempts", failures)
            pause_s, failures = 0.5, 0
