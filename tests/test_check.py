"""Mistakes that can be known before the first step are said before the first step: run.check, and the recipe itself."""

from __future__ import annotations

import re
from pathlib import Path

import diffusers
import numpy as np
import pytest

import fewstep.dryrun
from fewstep import build, run
from fewstep.config import ConfigError
from fewstep.data.shards import ShardWriter
from fewstep.engine.saver import Saver
from fewstep.folders import claim
from fewstep.recipe import Recipe, load_recipe
from fewstep.students import export_run

RECIPES = Path(__file__).resolve().parents[1] / "jobs" / "recipes"
NETWORK = "network={model: UNet2DModel, config: {sample_size: 28, in_channels: 1, out_channels: 1}}"


def recipe(folder: Path, *arguments: str) -> Recipe:
    return load_recipe(["recipe=fashion_mnist", "name=a", f"out={folder / 'runs'}", *arguments], RECIPES, "")


@pytest.fixture(autouse=True)
def in_a_folder(one_look, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("MLFLOW_TRACKING_URI", "FEWSTEP_STORAGE", "RAY_ADDRESS"):
        monkeypatch.delenv(name, raising=False)


def test_the_shipped_recipe_passes_and_leaves_nothing_but_the_folder_of_runs(tmp_path):
    run.check(recipe(tmp_path))
    assert [path.relative_to(tmp_path) for path in tmp_path.rglob("*")] == [Path("runs")]


@pytest.mark.parametrize(
    ("arguments", "says"),
    {
        "tracking.model=a/b": "tracking.model: a registered model's name has 1 to 256 characters, none of them / : %",
        "tracking.model=50%": "tracking.model: a registered model's name",
        "tracking.model=''": "tracking.model: a registered model's name",
        "tracking.experiment=''": "tracking.experiment: ",
        "seed=9223372036854775808": "seed: ",
        "seed=18446744073709551616": "seed: ",
        "method={name: f_distill, ratio: [-5, -1]}": "method.ratio: give two positive numbers, the lower one first",
        "method={name: f_distill, ratio: [0, 0]}": "method.ratio: give two positive numbers",
        "method={name: f_distill, ratio: [3, 2]}": "method.ratio: give two positive numbers",
        "method.match_range=[980, 20]": "method.match_range: give the lower one first, got [980, 20]",
        "train.average_std=0.1": "train.average_std: 0.1, and average_decay is 0.98; a run has one average, so set one",
        "resume_allow=[train.step]": "resume_allow: no such key 'train.step'; did you mean 'train.steps'?",
        "resume_allow=[optim.student.rate]": "resume_allow: no such key 'optim.student.rate'",
        f"{NETWORK} teacher=null": "teacher: missing; dmd2 distils one, and network is for methods without one",
        "storage=s3:/bucket/x": "storage: 's3:/bucket/x' is no path; a URL has two slashes: s3://...",
        "storage=''": "storage: an empty path; leave the key out, or give a path",
        "out=s3://bucket/x": "out: 's3://bucket/x' is no path; give a path of this machine",
        "out=''": "out: an empty path",
        "resume=s3:/bucket/x": "resume: 's3:/bucket/x' is no path",
        "start.fake=s3:/bucket/x": "start.fake: 's3:/bucket/x' is no path",
        "name=../a": "name: '../a' is no plain name",
    }.items(),
)
def test_a_recipe_refuses(tmp_path, arguments, says):
    parts = re.split(r" (?=[\w.]+=)", arguments)
    own = [argument for argument in ("name=a", f"out={tmp_path}") if argument.partition("=")[0] not in arguments]
    with pytest.raises(ConfigError) as error:
        load_recipe(["recipe=fashion_mnist", *own, *parts], RECIPES, "")
    assert str(error.value).splitlines()[0].startswith(says) and "Traceback" not in str(error.value)


@pytest.mark.parametrize(
    ("arguments", "says"),
    {
        "tracking.uri=ftp://host/x": "tracking.uri: 'ftp://host/x' is neither a server nor an SQL database",
        "storage=memory://x": "storage: memory:// ends with the process",
        "evaluate.batch=1000000000000": "evaluate.batch: 1,000,000,000,000 images sampled at once take",
        "evaluate.images=15": "evaluate.metrics: samples.labels: classes [5, 6, 7, 8, 9] have a single image",
        "evaluate.features=none.safetensors": "features: no file",
        "evaluate.reference=none.npz": "reference: no file",
        "teacher=nowhere": "teacher: no folder",
        "data.path=nowhere": "data.path: no folder",
        "resume=nowhere": "resume: no checkpoint 'nowhere'",
        "start.fake=nowhere": "start.fake: no checkpoint below 'nowhere'",
    }.items(),
)
def test_a_check_before_the_start_refuses(tmp_path, arguments, says):
    with pytest.raises((ValueError, OSError)) as error:
        run.check(recipe(tmp_path, arguments))
    assert str(error.value).startswith(says) and "\n" not in str(error.value)


def test_the_teachers_row_is_of_the_plain_teacher_whatever_guides_the_matching(tmp_path):
    """Its name, its calls and what it draws say the same: 2 steps - 1 calls, twice that where the row is guided."""
    asked = recipe(tmp_path, "method.guidance=3")
    teacher, passes = build.make_nets(asked)["teacher"], []
    teacher.register_forward_hook(lambda net, args, out: passes.append(len(args[0]) // 2))
    for scale, name, calls in ((asked.evaluate.teacher_guidance, "heun-3", 5), (2.0, "heun-3-guided-2", 10)):
        sampler = build.teacher_sampler(teacher, 3, scale)
        passes.clear()
        build.make_samples(sampler, 2, batch=2)
        assert (sampler.name, sampler.calls, sum(passes)) == (name, calls, calls)


@pytest.mark.parametrize(
    "key", ["train.steps", "optim.student.lr", "optim", "network.config.sample_size", "start.fake"]
)
def test_keys_that_exist_may_differ_at_a_resume(tmp_path, key):
    assert recipe(tmp_path, f"resume_allow=[{key}]").resume_allow == [key]


def test_all_mistakes_of_files_and_folders_are_reported_at_once(tmp_path):
    with pytest.raises(ConfigError) as error:
        run.check(
            recipe(tmp_path, "teacher=nowhere", "data.path=nowhere", "evaluate.features=x.safetensors", "resume=no")
        )
    lines = str(error.value).splitlines()
    assert [line.partition(":")[0] for line in lines] == ["resume", "teacher", "data.path", "features"]


def test_an_average_by_width_needs_no_word_on_decay_and_is_written_so_that_it_is_read_again(tmp_path):
    asked = recipe(tmp_path, "train.average_decay=null", "train.average_std=0.1")
    assert (asked.train.average_decay, asked.train.average_std) == (None, 0.1)
    data = asked.model_dump(mode="json")
    del data["train"]["average_decay"]
    again = Recipe.model_validate(data)
    assert again == asked and Recipe.model_validate(again.model_dump(mode="json")) == asked


def test_settings_that_are_seldom_intended_are_noted(tmp_path):
    assert recipe(tmp_path).notes == []
    assert recipe(tmp_path, "train.steps=10", "optim.fake.warmup_steps=5", "optim.disc.warmup_steps=0").notes == [
        "optim.student.warmup_steps: 20 is beyond train.steps 10, so the rate never reaches lr",
        "train.save_every: 300 is beyond train.steps 10: only the last step is saved",
    ]


def test_a_dry_run_says_what_this_machine_lacks(tmp_path, monkeypatch):
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    many = recipe(
        tmp_path, "cluster.workers=1000", "train.batch=1000", "cluster.device=cuda", "cluster.cpus_per_worker=2"
    )
    assert fewstep.dryrun.machine_notes(recipe(tmp_path, "cluster.workers=2")) == []
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert fewstep.dryrun.machine_notes(many) == [
        "cluster.workers: 1,000 of 2 CPUs each, and this machine has 2, which they would share",
        "cluster.device: cuda for 1,000 workers, and torch sees 0 GPUs on this machine",
    ]
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    assert fewstep.dryrun.machine_notes(many) == [
        "RAY_ADDRESS names a cluster, which was not asked what it has; python jobs/doctor.py asks it"
    ]


# Networks and data


def teacher(folder: Path, channels: int = 1, classes: int | None = None, kind: str = "UNet2DModel") -> Path:
    sizes = dict(sample_size=28, in_channels=channels, out_channels=channels, layers_per_block=1, norm_num_groups=4)
    levels = dict(block_out_channels=(8, 8), attention_head_dim=8)
    if kind == "UNet2DModel":
        levels |= dict(down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2)
        model, pipeline = diffusers.UNet2DModel(**sizes, **levels, num_class_embeds=classes), "unet"
    elif kind == "UNet2DConditionModel":
        levels |= dict(down_block_types=("CrossAttnDownBlock2D",) * 2, up_block_types=("CrossAttnUpBlock2D",) * 2)
        model, pipeline = diffusers.UNet2DConditionModel(**sizes, **levels, cross_attention_dim=8), "unet"
    else:
        model, pipeline = (
            diffusers.DiTTransformer2DModel(
                num_attention_heads=2, attention_head_dim=4, in_channels=channels, num_layers=1, sample_size=28,
                patch_size=2, num_embeds_ada_norm=classes, norm_num_groups=2,
            ),
            "transformer",
        )  # fmt: skip
    model.save_pretrained(folder / pipeline)
    diffusers.DDPMScheduler().save_pretrained(folder / "scheduler")
    return folder


def shards(folder: Path, size: tuple[int, int, int] = (1, 28, 28), classes: int = 0, encoding: str = "png") -> Path:
    with ShardWriter(folder, size, classes=classes, encoding=encoding) as writer:
        for i in range(4):
            kind = np.uint8 if encoding == "png" else np.float32
            writer.add(np.full(size, i, kind), label=i % classes if classes else None)
    return folder


@pytest.mark.parametrize(
    ("network", "data", "says"),
    [
        (dict(channels=4), {}, "teacher: it generates 4 channels, so latents, and its folder has no vae/config.json"),
        ({}, dict(size=(1, 8, 8)), "data.path: images of shape (1, 8, 8) (C, H, W), but the network takes (1, 28, 28)"),
        ({}, dict(encoding="float32"), "data.path: holds latents, but the network takes pixels"),
        (dict(classes=10), {}, "data.path: the images have no labels, but the network has 10 classes"),
        (dict(classes=10), dict(classes=2), "data.path: labels of 2 classes, but the network has 10"),
    ],
)
def test_a_network_or_data_that_do_not_fit_are_refused(tmp_path, network, data, says):
    arguments = [
        f"teacher={teacher(tmp_path / 'teacher', **network)}",
        f"data.path={shards(tmp_path / 'data', **data)}",
    ]
    with pytest.raises(ValueError) as error:
        run.check(recipe(tmp_path, *arguments, "evaluate.metrics=[]"))
    assert str(error.value).startswith(says) and "\n" not in str(error.value)


def test_scores_by_class_are_refused_for_a_network_without_classes(tmp_path):
    arguments = [f"teacher={teacher(tmp_path / 'teacher')}", f"data.path={shards(tmp_path / 'data')}"]
    with pytest.raises(
        ValueError, match="^evaluate.metrics: samples.labels: class_consistency needs the class asked for"
    ):
        run.check(recipe(tmp_path, *arguments, "evaluate.metrics=[class_consistency]"))
    run.check(recipe(tmp_path, *arguments, "evaluate.metrics=[fd_fashion]"))


def test_no_weights_are_read_to_look_at_a_teacher(tmp_path):
    net = build.make_teacher(recipe(tmp_path), weights=False)
    assert {p.device.type for p in net.parameters()} == {"meta"} and net.shape == (1, 28, 28) and net.classes == 10
    assert build.make_teacher(recipe(tmp_path)).shape == net.shape


def test_what_cannot_be_exported_is_reported_before_it_is_trained(tmp_path):
    assert run.export_notes(recipe(tmp_path)) == []
    dit = recipe(tmp_path, f"teacher={teacher(tmp_path / 'dit', classes=10, kind='DiTTransformer2DModel')}")
    assert run.export_notes(dit) == [
        "nothing will be exported: export: DiTTransformer2DModel has no pipeline here; exported are pixel-space "
        "generators of UNet2DModel and EDMUNetModel"
    ]
    denoising = load_recipe(["recipe=fashion_mnist_teacher", "name=a"], RECIPES, "")
    assert run.export_notes(denoising)[0].startswith("nothing will be exported: run: denoising samples by heun-18")


# A checkpoint that the run may not go on from


def saved(asked: Recipe, step: int = 2) -> Path:
    nets = {"student": build.make_teacher(asked)}
    saver = Saver(asked.checkpoints)
    path = saver.save(nets, {}, {"step": step, "images": 16, "updates": {}, "recipe": asked.numbers})
    saver.wait()
    return path


def test_a_checkpoint_of_another_recipe_is_refused_before_the_start(tmp_path):
    one = recipe(tmp_path)
    claim(one.folder, "run")
    path = saved(one)
    run.check(one)
    changed = recipe(tmp_path, "train.batch=8")
    with pytest.raises(ValueError) as error:
        run.check(changed)
    assert str(error.value).splitlines()[:2] == [f"{path}: written by another recipe:", "  train.batch: 32 -> 8"]
    run.check(recipe(tmp_path, "train.batch=8", "resume_allow=[train.batch]"))
    with pytest.raises(ValueError, match="written by another recipe"):
        run.check(recipe(tmp_path, "train.batch=8", f"resume={path}").model_copy(update={"name": "b"}))
    with pytest.raises(ValueError, match="^resume: never, but .*step-00000002 exists"):
        run.check(recipe(tmp_path, "resume=never"))
    (path / "thesis.tex").touch()
    with pytest.raises(
        ValueError, match="^name: .* holds 'step-00000002/thesis.tex', which is no part of a checkpoint"
    ):
        run.check(one)


# The end of a run


def test_a_failed_export_or_registration_is_one_line_and_nothing_more(tmp_path, monkeypatch, capsys):
    asked = recipe(tmp_path)
    monkeypatch.setattr(run, "register", lambda recipe, export: (_ for _ in ()).throw(RuntimeError("no\nanswer")))
    monkeypatch.setattr(run, "export_run", lambda *args, **kwargs: {"folder": "x", "max_difference": 0.0})
    assert run.publish(asked, []) == {"folder": "x", "max_difference": 0.0}
    assert capsys.readouterr().err == "not registered in MLflow: no answer; the run is finished and exported\n"
    monkeypatch.setattr(run, "export_run", export_run)
    assert run.publish(asked, []) is None
    message = capsys.readouterr().err
    assert message.startswith("not exported: run: no checkpoint below") and message.count("\n") == 1
    assert f"try again with: python jobs/export.py run={tmp_path}/runs/a" in message


def test_a_model_is_named_after_its_recipes_file_without_what_the_registry_refuses(tmp_path):
    text = (RECIPES / "fashion_mnist.yaml").read_text()
    for stem, name in {"50% off": "50_ off", "v1:b": "v1_b", "plain": "plain"}.items():
        (tmp_path / f"{stem}.yaml").write_text(text)
        asked = load_recipe([f"recipe={tmp_path / stem}.yaml"], RECIPES, "")
        assert asked.model_name == name and asked.name.startswith(f"{name}-2")
