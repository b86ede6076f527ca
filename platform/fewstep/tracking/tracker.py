"""The tracker that training calls. Each report is on disk when the call returns; a thread sends it to MLflow later."""

from __future__ import annotations

import json
import logging
import numbers
import re
import shutil
import threading
import time
import uuid
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..config import flatten, to_yaml
from ..folders import write_private
from ..texts import masked
from .journal import Journal
from .sender import Sender, drain
from .store import tracking_uri, without_password

log = logging.getLogger("fewstep.tracking")

LINGER_S = 0.5  # seconds in which reports are gathered, to be sent together
PARAM_CHARS = 6000  # MLflow's limit on a parameter's value
TAG_CHARS = 8000
NAME = re.compile(r"[\w.: -][\w./: -]{0,199}", re.ASCII)
IMAGE_NAME = re.compile(r"[\w-][\w./ -]{0,99}", re.ASCII)
STATUSES = ("FINISHED", "FAILED", "KILLED")


class Tracker:
    """Reports of one run. Open it with `Tracker.open`, on one rank only.

    After that a failing server, network or disk raises nothing. A mistake of the caller does: TypeError and ValueError
    for a value that cannot be reported, RuntimeError for a report after `finish`.
    As a context manager it finishes the run: FINISHED, KILLED on KeyboardInterrupt or SystemExit, otherwise FAILED.
    """

    def __init__(self, journal: Journal, uri: str):
        self._journal, self._sender = journal, Sender(journal, uri)
        self._replayed: set[tuple[str, str, int]] = set()
        self._wake = threading.Condition()
        self._closing = self._finished = False
        self._hurry = 0  # number of callers that wait in flush()
        self._thread = threading.Thread(target=self._send, name="fewstep-tracking", daemon=True)

    @classmethod
    def open(
        cls,
        folder: Path,
        *,
        uri: str | None,
        experiment: str,
        name: str,
        recipe: Mapping[str, Any],
        tags: Mapping[str, str],
        run_id: str | None = None,
        aside: Collection[str] = (),
    ) -> Tracker:
        """Opens or resumes the tracking of a run and starts sending. It does not wait for the server.

        folder: the run's folder. If it has a journal, the same MLflow run continues, and unsent operations go first.
        uri: see `tracking_uri`. recipe: resolved and nested; logged as dotted parameters and whole as `recipe.yaml`.
        A parameter that a resumed run changes becomes the tag `changed.<key>`: MLflow's parameters are immutable.
        run_id: an existing MLflow run to report to, instead of a new one. aside: recipe keys that change no numbers.
        They are not logged as parameters, so that a comparison of runs shows the settings that matter.
        Raises ValueError for an unusable name, uri or run_id, TrackingError when another process tracks this folder.
        """
        uri = tracking_uri(uri)
        recipe = masked(recipe)
        params, tags = params_of({k: v for k, v in recipe.items() if k not in aside}), _tags(tags)
        for key in params:
            _check_name("recipe", key)
        if not experiment or not name:
            raise ValueError(f"tracking: experiment {experiment!r} and name {name!r} must not be empty")
        journal = Journal(folder)
        tracker = cls(journal, uri)
        try:
            tracker._begin(without_password(uri), experiment, name, params, recipe, tags, run_id)
        except BaseException:
            journal.close()
            raise
        tracker._thread.start()
        return tracker

    def _begin(
        self,
        uri: str,
        experiment: str,
        name: str,
        params: dict[str, str],
        recipe: Mapping[str, Any],
        tags: dict[str, str],
        run_id: str | None,
    ) -> None:
        journal = self._journal
        known: dict[str, str] = {}
        opens = 0
        opened = None
        for entry in journal.entries():
            opened = opened or entry.op
            opens += entry.op["op"] in ("open", "resume")
            known |= entry.op.get("params", {})
        tags = tags | {"fewstep.folder": str(journal.run_folder), "fewstep.opened": str(opens + 1)}
        if opened is None:
            op = {"op": "open", "uri": uri, "experiment": experiment, "name": name, "run_id": run_id, "tags": tags}
            journal.append(op | {"journal": uuid.uuid4().hex})
        else:
            if run_id not in (None, journal.run_id, opened["run_id"]):
                raise ValueError(
                    f"run_id: {run_id!r}, but {str(journal.run_folder)!r} belongs to run {journal.run_id!r}; "
                    "leave run_id out or give another folder"
                )
            changed = {f"changed.{k}": v for k, v in params.items() if k in known and v != known[k]}
            journal.append({"op": "resume", "tags": tags | changed})
        new = {k: v for k, v in params.items() if k not in known}
        if new:
            journal.append({"op": "params", "params": new})
        if params != known:
            self._text("recipe.yaml", to_yaml(_json_value(recipe)))
        if journal.lost:
            raise OSError(f"{journal.folder}: cannot be written; free some space or give another folder")

    def rewind(self, step: int) -> None:
        """Resumes the records at `step`. Reports that the journal already holds after `step` are not recorded again.

        A metric, image or score with the name and step of one in the journal is dropped once. It is the same report,
        as training is a function of (seed, step). The journal itself does not change.
        """
        _check_step(step)
        self._replayed = {key for entry in self._journal.entries() for key in _keys(entry.op) if key[2] > step}

    def _new(self, kind: str, name: str, step: int) -> bool:
        key = (kind, name, int(step))
        if key in self._replayed:
            self._replayed.discard(key)
            return False
        return True

    # ------------------------------------------------------------------------------------------------ reports

    def log(self, metrics: Mapping[str, float], step: int, images: int) -> None:
        """Records each metric against steps under its name and against images under `by_images/<name>`.

        Metrics `system/...` are recorded against steps alone.

        metrics: Python or numpy numbers; nan is kept, an SQL store keeps an infinity as the largest float64.
        images: number of images that all ranks have trained on. Raises TypeError for a tensor, because reading it would
        wait for the device, and ValueError for a name that MLflow does not take.
        """
        _check_step(step)
        _check_step(images, "images")
        values = {_check_name("metrics", name): _number(f"metrics.{name}", value) for name, value in metrics.items()}
        values = {name: value for name, value in values.items() if self._new("metrics", name, step)}
        if values:
            self._append({"op": "metrics", "step": int(step), "images": int(images), "values": values})

    def image(self, name: str, array: np.ndarray, step: int) -> None:
        """Records an image, (H, W) or (H, W, C) uint8 with C of 1, 3 or 4, as `grids/<name>/step-<8 digits>.png`.

        It also appears at its step in the image view of MLflow's page. Name: letters, digits and ._-/ or space.
        """
        _check_step(step)
        if not IMAGE_NAME.fullmatch(name) or ".." in name:
            raise ValueError(f"image: {name!r} is not a name of letters, digits, space and ._-/")
        if not isinstance(array, np.ndarray) or array.dtype != np.uint8:
            raise TypeError(f"image {name}: expected a uint8 array, got {_kind(array)}")
        if array.ndim == 3 and array.shape[2] == 1:
            array = array[:, :, 0]
        if array.size == 0 or not (array.ndim == 2 or (array.ndim == 3 and array.shape[2] in (3, 4))):
            raise ValueError(f"image {name}: shape {array.shape} is not (H, W) or (H, W, C) with C of 1, 3 or 4")
        if self._new("image", name, step):
            # raw: the sender makes the PNG, which takes seconds for a large grid
            self._append_with_file(
                {"op": "image", "name": name, "step": int(step)}, "image.npy", lambda p: np.save(p, array)
            )

    def artifact(self, path: Path, to: str = "") -> None:
        """Records a copy of a small file or folder as it is now, below the artifact folder `to`."""
        path = Path(path)
        if not path.exists():
            raise FileNotFoundError(f"artifact: {str(path)!r} does not exist")
        copy = shutil.copytree if path.is_dir() else shutil.copyfile
        to = f"{to}/{path.name}".lstrip("/") if path.is_dir() else to
        self._append_with_file({"op": "artifact", "to": to}, path.name, lambda new: copy(path, new))

    def text(self, name: str, content: str) -> None:
        """Records a text file, its secrets masked; `name` may have folders. The same name again replaces it."""
        if not name or name.startswith("/") or ".." in Path(name).parts:
            raise ValueError(f"text: {name!r} is not a relative path")
        self._text(name, content)

    def _text(self, name: str, content: str) -> None:
        folder, _, file = name.rpartition("/")
        self._append_with_file(
            {"op": "artifact", "to": folder}, file, lambda path: write_private(path, masked(content))
        )

    def score(self, score: Mapping[str, Any], step: int = 0) -> None:
        """Records a score: its `value` as the metric `score/<name>` at `step`, and all of it in `scores.json`.

        score: JSON types and numpy numbers; must have `name` and `value`.
        """
        _check_step(step)
        if missing := {"name", "value"} - set(score):
            raise ValueError(f"score: {sorted(missing)} missing in {dict(score)!r}")
        _check_name("score", score["name"])
        plain = _json_value(score) | {"value": _number(f"score.{score['name']}", score["value"])}
        if self._new("score", score["name"], step):
            self._append({"op": "score", "score": plain, "step": int(step)})

    def event(self, kind: str, step: int, images: int, reason: str) -> None:
        """Records an event: the metric `event/<kind>` is 1 at `step`, the tag `event.<step>.<kind>` is the reason."""
        self.log({f"event/{kind}": 1.0}, step, images)
        self.tags({f"event.{step:08d}.{kind}": reason})

    def diverge(self) -> None:
        """Ends the effect of `rewind`: after a roll-back training differs, so all further reports are recorded."""
        self._replayed = set()

    def tags(self, tags: Mapping[str, str]) -> None:
        """Sets tags of the run; a tag set before is replaced."""
        self._append({"op": "tags", "tags": _tags(tags)})

    def model(self, folder: Path, name: str, alias: str) -> None:
        """Logs an exported folder as an MLflow model, and registers it as a version of `name` with an alias.

        The alias then points to it. The model has the Python-function flavour and the run's scores, see model.py. The
        folder is not copied here: it must stay until it is sent.
        """
        if not Path(folder).is_dir():
            raise FileNotFoundError(f"model: no folder {str(folder)!r}")
        if not re.fullmatch(r"[^/:%'\"]+", name):
            raise ValueError(f"model: {name!r} is not a name; leave out / : % and quotes")
        if not re.fullmatch(r"[\w-]+", alias) or re.fullmatch(r"[vV]\d+|latest", alias):
            raise ValueError(f"model: {alias!r} is not an alias; use letters, digits, _ and -, not 'latest' or 'v1'")
        self._append({"op": "model", "folder": str(Path(folder).absolute()), "name": name, "alias": alias})

    def data(self, name: str, digest: str, source: str, **profile: Any) -> None:
        """Records the data set that the run trains on. digest: its hash, at most 36 letters. source: path or URL.

        profile: more facts, such as its number of rows.
        """
        op = {"op": "input", "name": name, "digest": digest[:36], "source": masked(source)}
        self._append(op | {"profile": json.dumps(_json_value(profile))})

    def _append_with_file(self, op: dict[str, Any], file: str, write: Callable[[Path], object]) -> None:
        try:
            folder = self._journal.stage()
            write(folder / file)
        except OSError as error:
            self._journal.lose(error)
            return
        self._append(op | {"file": f"{folder.name}/{file}"})

    def _append(self, op: dict[str, Any]) -> None:
        if self._finished:
            raise RuntimeError(f"{op['op']}: reported after finish(); open the run's folder again to go on")
        self._journal.append(op)
        with self._wake:
            self._wake.notify_all()

    # ------------------------------------------------------------------------------------------------ sending

    @property
    def run_id(self) -> str | None:
        """The MLflow run, None until the server has answered."""
        return self._journal.run_id

    @property
    def page(self) -> str | None:
        """The run's page in MLflow, see store.page; None until the store has answered."""
        return self._sender.page

    @property
    def unsent(self) -> int:
        """Number of operations that the server has not acknowledged yet."""
        return self._journal.unsent

    @property
    def refused(self) -> int:
        """Number of refused operations and parts of them; `tracking/refused.jsonl` lists them with the reasons."""
        return self._journal.refused

    @property
    def dropped(self) -> int:
        """Number of incomplete lines in the journal when it was opened: 1 if a process died while it wrote."""
        return self._journal.dropped

    @property
    def lost(self) -> int:
        """Number of reports that could not be written to disk."""
        return self._journal.lost

    def _send(self) -> None:
        try:
            while not self._closing:
                with self._wake:
                    self._wake.wait_for(lambda: self._closing or self._journal.unsent)
                    self._wake.wait_for(lambda: self._closing or self._hurry, LINGER_S)
                drain(self._sender, lambda: self._closing, self._pause)
                with self._wake:
                    self._wake.notify_all()
        finally:
            self._journal.close()

    def _pause(self, seconds: float) -> None:
        """Waits before the next attempt, at most half a second while a caller waits in flush()."""
        with self._wake:
            if not self._wake.wait_for(lambda: self._closing or self._hurry, seconds):
                return
            self._wake.wait_for(lambda: self._closing, min(seconds, 0.5))

    def flush(self, timeout_s: float) -> int:
        """Waits until all operations are sent, at most `timeout_s`. Returns the number of unsent ones."""
        with self._wake:
            self._hurry += 1
            self._wake.notify_all()
            self._wake.wait_for(lambda: not self._journal.unsent, timeout_s)
            self._hurry -= 1
        return self._journal.unsent

    def finish(self, status: str = "FINISHED", timeout_s: float = 60.0) -> int:
        """Ends the run as FINISHED, FAILED or KILLED. Sends for at most `timeout_s`; returns the number of unsent
        operations, which stay in the run's folder. A line on standard error has the command that sends them."""
        if status not in STATUSES:
            raise ValueError(f"status: {status!r} is not one of {', '.join(STATUSES)}")
        if self._finished:
            return self._journal.unsent
        self._append({"op": "status", "status": status})
        self._finished = True
        unsent = self.flush(timeout_s)
        with self._wake:
            self._closing = True
            self._wake.notify_all()
        # a request to a dead server ends by its own timeout; the thread is a daemon, and the journal keeps the rest
        self._thread.join(0.0 if unsent else 5.0)
        if unsent:
            log.warning("%s", later(self._journal.run_folder, unsent))
        if self._journal.lost:
            log.error(
                "%s: %d reports could not be written to disk and are lost", self._journal.folder, self._journal.lost
            )
        return unsent

    def __enter__(self) -> Tracker:
        return self

    def __exit__(self, kind, error, trace) -> None:
        killed = kind is not None and issubclass(kind, (KeyboardInterrupt, SystemExit))
        self.finish("FINISHED" if kind is None else "KILLED" if killed else "FAILED")


def later(folder: Path, unsent: int) -> str:
    """Returns a line with the number of unsent operations of a run and the command that sends them."""
    return f"{unsent} tracked operations are not sent yet; send them with: python jobs/track.py folder={folder}"


class SendCounts(NamedTuple):
    """Counts of operations after `send`. refused: those that the server refuses for good, as `refused.jsonl` lists."""

    sent: int
    unsent: int
    refused: int


def send(folder: Path, *, uri: str | None = None, timeout_s: float = 60.0) -> SendCounts:
    """Sends the unsent operations of a run's journal, in this thread, for about `timeout_s` at most.

    uri: the store, by default that of the run. Raises as `Journal` does, and ValueError when the store needs a
    password, which is never written to disk.
    """
    journal = Journal(Path(folder), create=False, lock_s=1.0)
    try:
        before = journal.unsent
        if before:
            uri = tracking_uri(uri or next(journal.entries()).op["uri"])
            deadline = time.monotonic() + timeout_s
            pause = lambda seconds: time.sleep(max(0.0, min(seconds, 5.0, deadline - time.monotonic())))
            drain(Sender(journal, uri), lambda: time.monotonic() > deadline, pause)
        return SendCounts(before - journal.unsent, journal.unsent, journal.refused)
    finally:
        journal.close()


# ---------------------------------------------------------------------------------------------------- checks


def params_of(recipe: Mapping[str, Any]) -> dict[str, str]:
    """Nested settings as {dotted key: text}: strings as they are, other values as JSON. A long value is cut, with a
    note that says so."""
    out: dict[str, str] = {}
    for key, value in flatten(recipe).items():
        value = _json_value(value)
        text = value if isinstance(value, str) else json.dumps(value)
        out[key] = _shortened(text, PARAM_CHARS, " ... (cut; whole in recipe.yaml)")
    return out


def _shortened(text: str, chars: int, note: str) -> str:
    return text if len(text) <= chars else text[: chars - len(note)] + note


def _tags(tags: Mapping[str, Any]) -> dict[str, str]:
    return {_check_name("tags", key): _shortened(str(value), TAG_CHARS, " ... (cut)") for key, value in tags.items()}


def _json_value(value: Any) -> Any:
    """Returns the value in types of JSON and YAML."""
    if isinstance(value, Mapping):
        return {str(k): _json_value(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_json_value(v) for v in value]
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, Path):
        return str(value)
    if value is None or isinstance(value, (str, bool, int, float)):
        return value
    raise TypeError(f"{_kind(value)} cannot be tracked; give numbers, texts, lists and mappings")


def _number(where: str, value: Any) -> float:
    if isinstance(value, numbers.Real):
        return float(value)
    raise TypeError(f"{where}: expected a number, got {_kind(value)}; pass value.item()")


def _kind(value: Any) -> str:
    kind = f"{type(value).__module__}.{type(value).__name__}"
    return f"{kind} of {value.dtype}" if hasattr(value, "dtype") else kind


def _check_name(where: str, name: str) -> str:
    if not isinstance(name, str) or not NAME.fullmatch(name) or ".." in name or "//" in name or name.endswith("/"):
        raise ValueError(f"{where}: {name!r} is not a name of at most 200 letters, digits, space and ._-:/")
    return name


def _check_step(step: int, where: str = "step") -> None:
    if isinstance(step, bool) or not isinstance(step, numbers.Integral) or step < 0:
        raise ValueError(f"{where}: {step!r} is not a count")


def _keys(op: Mapping[str, Any]) -> Iterator[tuple[str, str, int]]:
    """Yields the identity of each report of an operation: (kind, name, step)."""
    if op["op"] == "metrics":
        yield from (("metrics", name, op["step"]) for name in op["values"])
    elif op["op"] == "image":
        yield ("image", op["name"], op["step"])
    elif op["op"] == "score":
        yield ("score", op["score"]["name"], op["step"])
