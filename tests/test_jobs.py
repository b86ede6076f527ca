"""The jobs end to end: a teacher is trained, scored and sampled by command lines."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from job import job as command
from PIL import Image

from fewstep.tracking import tracking_uri

ROOT = Path(__file__).resolve().parents[1]


def job(name: str, *arguments: str) -> None:
    """Runs a job in this process."""
    command(name)(arguments)


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
    assert json.loads((teacher.parent / "network.json").read_text())["network"]["classes"] == 10

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


def refused(capsys, *arguments: str) -> str:
    """The one line with which evaluate ends, with exit status 2, before anything is sampled."""
    with pytest.raises(SystemExit) as ended, pytest.MonkeyPatch.context() as patch:
        patch.setattr("fewstep.build.make_samples", lambda *args, **kwargs: pytest.fail("sampled"))
        job("evaluate", *arguments)
    out, error = capsys.readouterr()
    assert ended.value.code == 2 and out == "" and error.count("\n") == 1, error
    return error.rstrip("\n")


def test_evaluate_knows_before_sampling_what_it_cannot_do(tmp_path, capsys):
    import diffusers

    unet = diffusers.UNet2DModel(
        sample_size=28, block_out_channels=(4, 4), norm_num_groups=2, layers_per_block=1, attention_head_dim=4,
        down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2,
    )  # fmt: skip
    diffusers.DDPMPipeline(unet, diffusers.DDPMScheduler()).save_pretrained(tmp_path / "colour")
    colour, grey = f"model={tmp_path / 'colour'}", "model=shipped:fashion_mnist/teacher"
    assert refused(capsys, colour) == (
        "features: 'fashion' takes uint8 images of shape (1, 28, 28) (C, H, W), not (3, 28, 28); train a "
        "network on your images: python jobs/features.py data=<shards> ..., and give it with features="
    )
    assert refused(capsys, grey, "device=gpu") == "device: 'gpu' is no device; give cpu, cuda or cuda:1"
    if not torch.cuda.is_available():
        no_gpu = "device: cuda, but this machine has no GPU that torch can use; give device=cpu"
        assert refused(capsys, grey, "device=cuda") == no_gpu
    assert refused(capsys, grey, "images=12", "metrics=[diversity]") == (
        "samples.labels: classes [2, 3, 4, 5, 6, 7, 8, 9] have a single image; a variance needs at least 2 a class"
    )
    assert str(tmp_path / "none.npz") in refused(capsys, grey, f"reference={tmp_path / 'none.npz'}")
    assert str(tmp_path / "none") in refused(capsys, f"model={tmp_path / 'none'}")


def test_a_submitted_job_finds_the_files_of_the_one_before(tmp_path, monkeypatch, capsys):
    copies = [tmp_path / "runtime_resources" / name for name in "abc"]  # each job has a copy, which Ray removes
    for i in range(10):
        folder = copies[0] / "photos" / str(i)
        folder.mkdir(parents=True)
        Image.new("L", (28, 28), 20 * i).save(folder / "x.png")
    for copy in copies[1:]:
        copy.mkdir()
    monkeypatch.setenv("HOME", str(tmp_path))
    for variable in ("FEWSTEP_HOME", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(variable, raising=False)
    home = tmp_path / "fewstep"

    monkeypatch.chdir(copies[0])
    job("prepare", "source=folder", "path=photos", "channels=1", "out=data/photos")
    assert closing(capsys)["out"] == str(home / "data" / "photos")

    monkeypatch.chdir(copies[1])
    job("distill", "data.path=data/photos", "evaluate.metrics=[]", "train.batch=8", "--dry-run")
    assert "data/photos" in capsys.readouterr().out

    monkeypatch.chdir(copies[2])
    job("sample", "model=shipped:fashion_mnist/teacher", "steps=1", "images=2", "out=pictures/grid.png")
    assert closing(capsys)["out"] == str(home / "pictures" / "grid.png")
    assert tracking_uri() == f"sqlite:///{home / 'mlflow.db'}"
    for copy in copies:
        assert [path for path in copy.rglob("*") if path.is_file() and path.suffix != ".png"] == []
    assert {path.name for path in home.iterdir()} == {"data", "pictures", "runs"}
