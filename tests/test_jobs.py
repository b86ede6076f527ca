"""The jobs end to end: a teacher is trained, scored and sampled with the words a person types."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]


def job(name: str, *words: str) -> None:
    script = str(ROOT / "jobs" / f"{name}.py")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [script, *words])
        runpy.run_path(script, run_name="__main__")


def closing(capsys) -> dict:
    """The JSON object of a job's last line."""
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_a_teacher_is_trained_scored_and_sampled(ray_cluster, store, tmp_path, capsys):
    out = [f"out={tmp_path / 'runs'}", f"tracking.uri={store}"]
    small = ["train.steps=4", "train.batch=8", "train.report_every=2", "train.save_every=4", "evaluate.metrics=[]"]
    job("teach", *out, *small, "name=small", "method.steps=2")
    taught = closing(capsys)
    teacher = tmp_path / "runs" / "small" / "teacher"
    assert taught["teacher"] == str(teacher)

    job("evaluate", f"model={teacher}", "steps=[2,3]", "images=20", "batch=10", "metrics=[fd_fashion]")
    scores = closing(capsys)["scores"]
    assert [(s["sampler"], s["calls"], s["images"]) for s in scores] == [("heun-2", 3, 20), ("heun-3", 5, 20)]
    assert all(s["reference_images"] == 60000 and s["checkpoint"] == "last" for s in scores)

    job("sample", f"model={teacher}", "steps=2", "images=20", f"out={tmp_path / 'grid.png'}")
    assert Image.open(tmp_path / "grid.png").width >= 10 * 28


def test_a_metric_without_its_weights_names_the_file_and_what_else_there_is(tmp_path, capsys):
    with pytest.raises(SystemExit):
        job("evaluate", "model=shipped:fashion_mnist/teacher", "metrics=[fid]", f"inception={tmp_path / 'none.pt'}")
    error = capsys.readouterr().err
    assert str(tmp_path / "none.pt") in error and "inception-2015-12-05.pt" in error and "fd_" in error
