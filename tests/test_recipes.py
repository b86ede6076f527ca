"""The promises of the recipes' heads: their commands are valid, and CIFAR-10's chain runs, from the official archive to
scores of a one-step student, with the recipes' own paths and bfloat16, narrower networks, ten steps each."""

from __future__ import annotations

import io
import shlex
import tarfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from job import job as command
from toy import same, weights

from fewstep import build
from fewstep.config import ConfigError, parse_arguments
from fewstep.dryrun import activations, describe, saved_bytes
from fewstep.engine.train import Engine, Report
from fewstep.metrics.base import evaluate
from fewstep.networks.conditions import Nothing
from fewstep.networks.pretrained import open_teacher, save_denoiser
from fewstep.recipe import load_recipe, open_recipe

ROOT = Path(__file__).resolve().parents[1]
RECIPES = ROOT / "jobs" / "recipes"
PREPARATIONS = {"prepare", "features", "encode", "chain", "pairs"}  # the other jobs take a recipe
SHORT = ["train.steps=10", "train.batch=1", "train.report_every=1", "train.save_every=10"]
NARROW = "network.config.block_out_channels=[32,64,64]"  # many processors are slow in bfloat16


def commands(recipe: str) -> list[tuple[str, dict[str, Any]]]:
    """The `python jobs/x.py key=value ...` lines in a recipe's head: job, and its arguments."""
    head = "#   python jobs/"
    lines = (RECIPES / f"{recipe}.yaml").read_text().splitlines()
    split = [shlex.split(line.removeprefix(head)) for line in lines if line.startswith(head)]
    return [(job.removesuffix(".py"), parse_arguments(rest)) for job, *rest in split]


def argv(given: dict[str, Any], **instead: Any) -> list[str]:
    return [f"{key}={value}" for key, value in (given | instead).items()]


@pytest.mark.parametrize("recipe", sorted(path.stem for path in RECIPES.glob("*.yaml")))
def test_the_commands_in_a_recipes_head_are_valid(recipe):
    result = commands(recipe)
    assert result[-1][1]["recipe"].startswith(recipe.split("_teacher")[0])
    for job, given in result:
        asked, *changed = command(job).read(argv(given))
        if job not in PREPARATIONS:
            open_recipe(asked.recipe, RECIPES, *changed)


# CIFAR-10


def archive(path: Path) -> None:
    """cifar-10-binary.tar.gz in small: 64 images a file, speckled with the colour of their class, every value half-way
    to black or white so that the mean square is EDM's data_std squared."""
    rng = np.random.default_rng(0)
    labels = np.arange(64, dtype=np.uint8) % 10
    colour = np.repeat((labels[:, None] + 1 >> np.arange(3)) & 1, 32 * 32, axis=1)
    with tarfile.open(path, "w:gz", compresslevel=1) as tar:
        for name in [*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin"]:
            pixels = np.where(colour ^ (rng.random(colour.shape) < 0.2), 191, 64).astype(np.uint8)
            records = np.concatenate([labels[:, None], pixels], axis=1).tobytes()
            member = tarfile.TarInfo(f"cifar-10-batches-bin/{name}")
            member.size = len(records)
            tar.addfile(member, io.BytesIO(records))


def trained(recipe) -> tuple[Engine, list[Report], set[torch.dtype]]:
    """A recipe's engine after its steps, its reports, and the types in which the student's middle answered."""
    dtypes: set[torch.dtype] = set()
    with build.make_feed(recipe.data, recipe.seed) as feed:
        engine = build.make_engine(recipe, feed)
        middle = engine.nets["student"].backbone.model.mid_block
        hook = middle.register_forward_hook(lambda module, args, out: dtypes.add(out.dtype))
        reports = list(engine.run())
        hook.remove()
    return engine, reports, dtypes


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder in which the commands of the teacher's head were run as far as the teacher, and we are in it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("cifar10"))
        Path("data").mkdir()
        archive(Path("data/cifar-10-binary.tar.gz"))
        for job, given in commands("cifar10_teacher"):
            if job in PREPARATIONS:
                small = {"epochs": 1, "device": "cpu"} if job == "features" else {}
                command(job)(argv(given, **small))
        yield Path.cwd()


@pytest.fixture(scope="module")
def teacher(place):
    """The teacher's engine and reports; its average is where the student's recipe looks for it."""
    given = next(given for job, given in commands("cifar10_teacher") if job == "teach")
    recipe = load_recipe([*argv(given), *SHORT, NARROW], RECIPES, "none")
    engine, reports, dtypes = trained(recipe)
    save_denoiser(engine.student, recipe.folder / "teacher")
    return engine, reports, dtypes


def test_the_cifar10_teacher_trains_ten_steps_in_bfloat16(teacher):
    engine, reports, dtypes = teacher
    assert dtypes == {torch.bfloat16} and all(p.dtype == torch.float32 for p in engine.student.parameters())
    assert [r.step for r in reports] == list(range(1, 11)) and reports[-1].images == 10
    # EDM's preconditioning gives the network a target of unit variance, and a new network answers zero
    assert reports[0].metrics["denoise/mse"] == pytest.approx(1, abs=0.03)
    assert any(p.detach().abs().max() > 0 for p in engine.nets["student"].backbone.model.conv_out.parameters())


def test_the_cifar10_student_trains_ten_steps_from_that_teacher_and_is_scored(teacher):
    recipe = load_recipe(["recipe=cifar10", *SHORT], RECIPES, "none")
    engine, reports, dtypes = trained(recipe)
    assert dtypes == {torch.bfloat16}
    assert reports[-1].metrics["updates/student"] == 2 and reports[-1].metrics["updates/critic"] == 10
    gradients = [reports[step].metrics["health/match_gradient"] for step in (0, 5)]
    # a critic that starts as the teacher pulls nowhere, up to bfloat16's rounding of a mean distance of 1 a value
    assert gradients[0] < 2**-8 * 3072**0.5 and gradients[0] < gradients[1]
    before = weights(teacher[0].student)
    assert same(weights(open_teacher(recipe.teacher)), before)
    frozen = weights(engine.nets["teacher"])  # which may be kept in bfloat16
    assert same(frozen, {key: value.to(frozen[key].dtype) for key, value in before.items()})
    assert not same(weights(engine.nets["student"]), before) and not same(weights(engine.nets["fake"]), before)

    samples = build.make_samples(build.student_sampler(recipe.method, engine.sampling), 20, batch=10)
    scores = {score.name: score.value for score in evaluate(build.make_metrics(recipe), samples)}
    assert samples.calls == 1 and list(scores) == ["fd_cifar10", "class_consistency", "diversity"]
    assert np.isfinite(list(scores.values())).all()


def test_dry_runs_of_both_and_no_large_batch_in_them(teacher):
    narrow = sum(p.numel() for p in teacher[0].student.parameters())
    for name, fits in (("cifar10_teacher", lambda count: round(count / 1e6) == 26), ("cifar10", narrow.__eq__)):
        text = describe(load_recipe([f"recipe={name}"], RECIPES, "none"))
        count = next(line.split()[1] for line in text.splitlines() if line.startswith("student"))
        assert text.endswith("Nothing was trained.") and fits(int(count.replace(",", "")))


def test_activations_of_a_large_batch_follow_from_small_ones():
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.GroupNorm(2, 8), torch.nn.SiLU())
    forward = lambda samples: saved_bytes(net, (torch.randn(samples, 3, 9, 9),))
    assert activations(forward, 64) == forward(64)


@pytest.mark.parametrize(
    "recipe, given, text",
    [
        ("cifar10", [], r"features: no file .*data/cifar10_features/.*python jobs/features.py"),
        ("cifar10", ["evaluate.metrics=[]"], r"data.path: no folder .*data/cifar10'.*python jobs/prepare.py"),
        ("cifar10_teacher", ["evaluate.metrics=[]"], r"data.path: no folder .*data/cifar10'.*python jobs/prepare.py"),
    ],
)
def test_a_missing_file_is_named_with_the_job_that_makes_it(tmp_path, monkeypatch, recipe, given, text):
    monkeypatch.chdir(tmp_path)
    with pytest.raises((ValueError, OSError), match=text):
        describe(load_recipe([f"recipe={recipe}", *given], RECIPES, "none"))


def test_a_missing_teacher_is_named_with_the_job_that_makes_it(place):
    with pytest.raises(ValueError, match=r"teacher: no folder .*elsewhere'.*python jobs/teach.py"):
        describe(load_recipe(["recipe=cifar10", "teacher=elsewhere"], RECIPES, "none"))


@pytest.mark.parametrize(
    "shape, labels, classes, reason",
    [
        ((1, 28, 28), 10, 10, None),
        ((1, 28, 28), 10, None, None),  # labels that the network does not take
        ((1, 28, 28), 0, None, None),
        ((1, 28, 28), 0, 10, "the images have no labels, but the network has 10 classes; prepare them with labels"),
        ((1, 28, 28), 9, 10, "labels of 9 classes, but the network has 10; give classes=10 to jobs/prepare.py"),
        ((1, 28, 27), 10, 10, r"images of shape \(1, 28, 27\) .*prepare them with size="),
    ],
)
def test_images_and_labels_that_do_not_fit_the_network_are_refused(shape, labels, classes, reason):
    feed = SimpleNamespace(shape=shape, classes=labels)
    net = SimpleNamespace(shape=(1, 28, 28), classes=classes, codec=None, conditions=Nothing())
    if reason is None:
        return build.check_data(feed, net)
    with pytest.raises(ValueError, match=f"^data.path: {reason}"):
        build.check_data(feed, net)


def test_a_method_that_differentiates_its_networks_refuses_bf16():
    with pytest.raises(ConfigError, match="precision: bf16, but scm takes derivatives of its networks; give fp32"):
        load_recipe(["recipe=fashion_mnist_scm", "precision=bf16"], RECIPES, "fashion_mnist")
