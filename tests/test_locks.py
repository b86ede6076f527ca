"""Two starts of one name: the second is one line and exit status 2, and nothing of the first is touched."""

from __future__ import annotations

import errno
import os
import threading
import time
from pathlib import Path

import pytest
from demo import another, arguments
from job import job as command

from fewstep import locks
from fewstep.cluster import train
from fewstep.folders import claim
from fewstep.locks import LOCK, Busy, locked


def seen(folder: Path) -> dict[str, tuple[bytes, int]]:
    """Content and time of change of every file below a folder."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path): (path.read_bytes(), path.stat().st_mtime_ns) for path in files}


def test_a_lock_keeps_other_processes_out_until_its_own_ends_however_it_ends(tmp_path):
    with another(tmp_path / LOCK) as other:
        with pytest.raises(Busy, match=rf"^{tmp_path}: in use by process {other.pid} on \S+ since 20\d\d-.*; wait"):
            locks.hold(tmp_path / LOCK)
        other.kill()
        other.wait()
        with locked(tmp_path / LOCK), locked(tmp_path / LOCK):  # a process may take again what it has
            pass
    with another(tmp_path / LOCK):  # and has let go of it
        pass


def test_a_lock_is_waited_for(tmp_path):
    with another(tmp_path / LOCK) as other:
        threading.Timer(0.5, other.kill).start()
        started = time.monotonic()
        with locked(tmp_path / LOCK, wait_s=30):
            assert 0.3 < time.monotonic() - started < 20


def test_a_file_system_without_locks_is_reported_and_one_that_cannot_be_written_is_refused(
    tmp_path, monkeypatch, capsys
):
    def none(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(locks.fcntl, "flock", none)
    with locked(tmp_path / LOCK):
        pass
    assert "this file system has no locks; do not start the same name twice" in capsys.readouterr().err
    with pytest.raises(ValueError, match=r"/nowhere/\.lock: cannot be made \(No such file or directory\)"):
        locks.hold(Path("/nowhere/.lock"))


def refused(monkeypatch, capsys, folder: Path, job: str, *arguments: str) -> str:
    """The message of a second start, which leaves the folder as it was and asks for no cluster."""
    monkeypatch.setattr(train, "connect", lambda cpus: pytest.fail("the lock comes first"))
    monkeypatch.setattr("fewstep.cluster.sweep.connect", lambda cpus: pytest.fail("the lock comes first"))
    with another(folder / LOCK) as other:
        before = seen(folder)
        with pytest.raises(SystemExit) as stop:
            command(job)(arguments)
        assert stop.value.code == 2 and seen(folder) == before
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and error.startswith(f"{folder}: in use by process {other.pid} on ")
    return error


def test_a_second_start_of_a_run_is_one_line_and_the_first_is_unharmed(tmp_path, monkeypatch, capsys):
    folder = tmp_path / "runs" / "twice"
    claim(folder, "run")
    for name, content in {
        "recipe.yaml": "the first one's",
        "reports.jsonl": '{"step": 1, "images": 8, "metrics": {}}\n',
        "stop": "",  # its driver has been asked to stop
        "checkpoints/.step-00000003/rank-00000.safetensors": "being written",
    }.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content)
    error = refused(monkeypatch, capsys, folder, "distill", *arguments(tmp_path, "name=twice"))
    assert f"touch {folder / 'stop'}" in error and "name=..." in error


def test_a_second_start_of_a_sweep_is_one_line_and_the_first_is_unharmed(tmp_path, monkeypatch, capsys):
    folder = tmp_path / "runs" / "twice"
    claim(folder, "sweep")
    (folder / "trials.jsonl").write_text('{"event": "sweep", "settings": {}}\n{"event": "tri')  # a line being written
    small = [*arguments(tmp_path, "evaluate.metrics=[fd_fashion]"), "space=ttur", "search=grid", "name=twice"]
    assert "name=..." in refused(monkeypatch, capsys, folder, "sweep", *small)
