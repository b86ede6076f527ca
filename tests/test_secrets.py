"""No secret is written anywhere: what a recipe leaves on disk, how its secrets are found again, and a whole run."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from fewstep.build import latest
from fewstep.config import ConfigError
from fewstep.recipe import Recipe, load_recipe, read_run
from fewstep.run import report_lines
from fewstep.students import export_run
from fewstep.sweeps.record import Record

ROOT = Path(__file__).resolve().parents[1]
SECRET = f"s3cret-{os.getpid()}"  # not what the checkout's own diff holds, which a run keeps
URI, STORAGE = f"http://ann:{SECRET}@127.0.0.1:9", f"sftp://me:{SECRET}@host/runs"


def recipe(*arguments: str) -> Recipe:
    return load_recipe(["recipe=fashion_mnist", "name=a", *arguments], ROOT / "jobs" / "recipes", "")


@pytest.fixture(autouse=True)
def without_environment(monkeypatch):
    for name in ("MLFLOW_TRACKING_URI", "FEWSTEP_STORAGE"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def full() -> Recipe:
    return recipe(f"tracking.uri={URI}", f"storage={STORAGE}", f"resume={STORAGE}/b", f"start.fake={STORAGE}/c")


def test_what_a_recipe_writes_holds_no_secret_and_its_numbers_do_not_depend_on_one(full):
    assert SECRET not in json.dumps(full.written) and SECRET not in json.dumps(full.numbers)
    assert full.written["tracking"]["uri"] == "http://ann:***@127.0.0.1:9"
    assert full.written["start"] == {"fake": "sftp://me:***@host/runs/c"}
    other = recipe(f"start.fake={STORAGE.replace(SECRET, 'another')}/c")
    assert other.fingerprint == full.fingerprint


@pytest.fixture
def folder(full, tmp_path) -> Path:
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(full.written))
    return tmp_path


def test_a_written_recipe_gets_its_secrets_from_the_environment_or_from_another_recipe(full, folder, monkeypatch):
    assert read_run(folder) != full
    assert read_run(folder, *full.urls) == full
    monkeypatch.setenv("MLFLOW_TRACKING_URI", URI)
    monkeypatch.setenv("FEWSTEP_STORAGE", STORAGE)
    assert read_run(folder) == full  # resume= and start= lie below the storage, and are found with it
    again = load_recipe([f"recipe={folder / 'recipe.yaml'}"], folder, "")
    assert again == full


def test_a_missing_secret_is_asked_for_with_its_key_and_its_variable(folder, monkeypatch):
    arguments = [f"recipe={folder / 'recipe.yaml'}"]
    with pytest.raises(ConfigError) as error:
        load_recipe(arguments, folder, "")
    lines = str(error.value).splitlines()
    result = {line.partition(":")[0]: line for line in lines}
    assert result.keys() == {"tracking.uri", "storage", "resume", "start.fake"}
    assert result["tracking.uri"] == (
        "tracking.uri: http://ann:***@127.0.0.1:9 lacks its secret, which is never written to disk; give the whole URL "
        "as tracking.uri=... or in the environment variable MLFLOW_TRACKING_URI"
    )
    assert "storage=... or in the environment variable FEWSTEP_STORAGE" in result["storage"]
    monkeypatch.setenv("FEWSTEP_STORAGE", STORAGE)
    assert load_recipe([*arguments, f"tracking.uri={URI}"], folder, "").storage == STORAGE
    monkeypatch.delenv("FEWSTEP_STORAGE")
    for action in (latest, export_run):
        with pytest.raises(ConfigError, match="storage: sftp://me:.* lacks its secret"):
            action(folder)


def test_a_sweeps_record_holds_no_secret_and_is_its_owners_alone(tmp_path):
    record = Record(tmp_path, {"a": URI})
    record.add("trial", 0, values={}, seed=0, phase="search", run="x")
    record.add("end", 0, state="failed", reason=f"cannot reach {URI}")
    text = record.path.read_text()
    assert SECRET not in text and text.count("***") == 2
    assert stat.S_IMODE(record.path.stat().st_mode) == 0o600
    assert (
        Record(tmp_path, {"a": URI.replace(SECRET, "***")}).trials[0].reason
        == "cannot reach http://ann:***@127.0.0.1:9"
    )


# Files of a run's folder that were damaged


@pytest.mark.parametrize(
    "text", ["\xff\xfe\x00", "{", "[1", "null", "name: [", "x: 1\n", "teacher: a\ndata: 3\n", "&a [*a]"]
)
def test_a_damaged_recipe_is_named_in_every_line(tmp_path, text):
    (tmp_path / "recipe.yaml").write_bytes(text.encode("latin-1"))
    for read in (read_run, latest):
        with pytest.raises(ConfigError) as error:
            read(tmp_path)
        lines = str(error.value).splitlines()
        assert lines and all(line.startswith(f"{tmp_path}/recipe.yaml: ") for line in lines)


GOOD = '{"step": 1, "images": 8, "metrics": {}}\n'


@pytest.mark.parametrize("line", ["{", "[]", "null", "{}", '{"step": 1, "images": 8}', "\xff", "[" * 99999])
def test_a_damaged_report_is_named(tmp_path, line):
    (tmp_path / "reports.jsonl").write_bytes(GOOD.encode() + line.encode("latin-1") + b"\n" + GOOD.encode())
    with pytest.raises(ConfigError, match=r"reports\.jsonl: line 2") as error:
        report_lines(tmp_path)
    assert "\n" not in str(error.value)


def test_a_report_that_is_still_being_written_is_left_for_the_next_time(tmp_path):
    (tmp_path / "reports.jsonl").write_text(GOOD + '{"step": 2')
    assert report_lines(tmp_path) == [{"step": 1, "images": 8, "metrics": {}}]
    assert report_lines(tmp_path / "nowhere") == []


@pytest.mark.parametrize(
    "line",
    ["{", "[]", "{}", '{"event": "sweep"}', '{"event": "end", "trial": 7}', '{"event": "score", "trial": 0}', "\xff"],
)
def test_a_damaged_record_of_a_sweep_is_named(tmp_path, line):
    record = Record(tmp_path, {"a": 1})
    record.add("trial", 0, values={}, seed=0, phase="search", run="x")
    with open(record.path, "ab") as file:
        file.write(line.encode("latin-1") + b"\n")
    with pytest.raises(ConfigError, match=r"trials\.jsonl: line 3") as error:
        Record(tmp_path, {"a": 1})
    assert "\n" not in str(error.value)


@pytest.mark.slow
def test_a_run_leaves_no_secret_in_its_folder_in_mlflow_in_rays_logs_or_on_the_screen(tmp_path):
    """The password of a tracking server that does not answer, in a job of its own: grep finds it nowhere."""
    rays = Path("/tmp/ray")
    before = set(rays.glob("session_2*"))
    arguments = (
        "recipe=fashion_mnist name=a train.steps=2 train.batch=8 train.report_every=2 train.save_every=2".split()
    )
    job = [sys.executable, ROOT / "jobs" / "distill.py", *arguments, "evaluate.metrics=[]", "evaluate.teacher_steps=[]"]
    environment = os.environ | {"MLFLOW_TRACKING_URI": URI, "RAY_ADDRESS": ""}
    done = subprocess.run(job, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert SECRET not in done.stdout + done.stderr and "http://ann:***@127.0.0.1:9" in done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["export"] == str(tmp_path / "runs" / "a" / "export")
    looked = [path for path in (tmp_path / "runs").rglob("*") if path.is_file()]
    looked += [path for new in set(rays.glob("session_2*")) - before for path in new.rglob("*") if path.is_file()]
    assert not [path for path in looked if SECRET.encode() in path.read_bytes()]
    for name in ("recipe.yaml", "reports.jsonl", "scores.json", "tracking/journal.jsonl"):
        assert stat.S_IMODE((tmp_path / "runs" / "a" / name).stat().st_mode) == 0o600
