"""No job deletes or overwrites what it did not write: every file of jobs/ is tried on a folder of somebody else's."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from job import job as command
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
TINY = ["train.steps=2", "train.batch=8", "train.report_every=2", "train.save_every=2", "evaluate.metrics=[]"]

# Arguments of each job that would write into the folder `mine`. It holds files of somebody else: photos, notes, and
# files with the names that the platform gives to its own.
WRITING = {
    "chain": ["chain=fashion_mnist_two_stages name=../mine", "chain={mine}/recipe.yaml name=two"],
    "compare": ["runs=[last] out={mine}/report.html", "runs=[last] out={mine}"],
    "convert": ["pickle={mine}/notes/manifest.json out={mine}", "pickle={mine}/notes/manifest.json out={mine}/teacher"],
    "distill": [
        "recipe=fashion_mnist out={mine}/.. name=mine",
        "recipe=fashion_mnist out={mine}/.. name=../mine",
        "recipe=fashion_mnist out={mine} name=.",
        "recipe=fashion_mnist out={mine}/.. name=new storage={mine}/..",  # {mine}/../new holds no checkpoints
        "recipe=fashion_mnist out={mine}/.. name=new --dry-run storage={mine}/..",
    ],
    "encode": [
        "data=shipped:emoji/shards teacher=shipped:emoji/teacher out={mine}",
        "data=shipped:emoji/shards teacher=shipped:emoji/teacher out={mine}/notes overwrite=true",
    ],
    "export": [
        "run={mine} out={mine} overwrite=true",
        "run={mine} out={mine}/export overwrite=true",
        "run={mine}/checkpoints/step-00000007 out={mine}/export",
    ],
    "features": ["data=shipped:fashion_mnist/shards out={mine}"],
    "league": ["recipes=[fashion_mnist] out={mine}"],
    "merge": ["first={mine} second={mine} out={mine}", "first={mine} second={mine} out={mine}/export overwrite=true"],
    "pairs": [
        "teacher=shipped:fashion_mnist/teacher pairs=2 out={mine}",
        "teacher=shipped:fashion_mnist/teacher pairs=2 out={mine}/notes overwrite=true",
    ],
    "prepare": [
        "source=folder path={mine}/photos out={mine} overwrite=true",
        "source=folder path={mine}/photos out={mine}/photos overwrite=true",
        "source=folder path={mine}/photos out={mine}/notes overwrite=true",
        "source=folder path={mine}/photos out={mine}/notes",
    ],
    "sample": [
        "model=shipped:fashion_mnist/teacher images=2 out={mine}/photos/000000.png",
        "model=shipped:fashion_mnist/teacher images=2 out={mine}",
        "model=shipped:fashion_mnist/teacher images=2 out={free}/grid.png each={mine}/photos",
    ],
    "sweep": [
        "space=ttur recipe=fashion_mnist out={mine}/.. name=mine",
        "space=ttur recipe=fashion_mnist out={mine}/.. name=../mine",
    ],
    "teach": ["recipe=fashion_mnist_teacher out={mine}/.. name=mine"],
    "track": ["folder={mine}"],
}
# doctor.py writes probes under new names and removes them; evaluate.py and serve.py write nothing.
READING = {"doctor", "evaluate", "serve"}


def test_every_job_is_tried_here():
    assert {path.stem for path in (ROOT / "jobs").glob("*.py")} == WRITING.keys() | READING


@pytest.fixture
def mine(tmp_path) -> Path:
    folder = tmp_path / "somebody" / "mine"
    for path in ("photos", "checkpoints/step-00000007", "export", "teacher", "notes", "../new/step-00000001"):
        (folder / path).mkdir(parents=True)
    for i in range(3):
        Image.new("RGB", (8, 8), (i, i, i)).save(folder / "photos" / f"{i:06d}.png")
    for name in (
        "recipe.yaml report.html thesis.tex scores.json reports.jsonl stop features.safetensors statistics.npz "
        "checkpoints/step-00000007/thesis.tex export/model_index.json teacher/fewstep.json notes/manifest.json "
        "student.png ../new/step-00000001/thesis.tex"
    ).split():
        (folder / name).write_text("mine")
    return folder


def content(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize(
    ("job", "arguments"), [(job, arguments) for job, all_words in WRITING.items() for arguments in all_words]
)
def test_a_job_leaves_the_files_of_others_alone(job, arguments, mine, one_look, tmp_path, monkeypatch, capsys):
    (tmp_path / "free").mkdir()
    monkeypatch.chdir(tmp_path / "free")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    before = content(mine.parent)
    if job in ("distill", "teach"):
        arguments += " " + " ".join(TINY)
    arguments = arguments.format(mine=mine, free=tmp_path / "free").split()
    with pytest.raises(SystemExit) as ended:
        command(job)(arguments)
    assert ended.value.code == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("note: ")]
    assert len(lines) == 1, lines
    assert re.match(r"(name|out|each|folder|storage|chain|runs|.*recipe\.yaml): ", lines[0]), lines
    assert content(mine.parent) == before
