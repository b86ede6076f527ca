"""Exports: what diffusers loads gives the images that the trained network gives, or there is no export."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
import toy
import yaml
from demo import another
from diffusers.utils import dynamic_modules_utils
from job import job as command
from PIL import Image
from safetensors.torch import load_file
from test_networks import TEXT, unet
from torch import nn

from fewstep.build import describe_net, make_samples, open_net
from fewstep.config import validate
from fewstep.diffusion.draws import Draws
from fewstep.diffusion.samplers import Call, calls_at, run_calls, to_uint8
from fewstep.diffusion.schedules import DDPM, EDM, Flow, Trig
from fewstep.engine.saver import Saver
from fewstep.folders import FolderError
from fewstep.locks import LOCK, Busy
from fewstep.methods import METHODS
from fewstep.networks import export as exporting
from fewstep.networks.backbones import UNet
from fewstep.networks.card import Card
from fewstep.networks.denoiser import Denoiser
from fewstep.networks.export import ExportError, entries, export
from fewstep.networks.families import TextUNet
from fewstep.networks.pipeline import FewStepPipeline
from fewstep.networks.pretrained import network_of, open_teacher, save_denoiser
from fewstep.recipe import Recipe, read_run
from fewstep.storage.cache import local
from fewstep.students import Student, export_run, few_step_calls, open_sampler, open_student

JOBS = Path(__file__).parents[1] / "jobs"
ROWS = [
    {"who": "student", "sampler": "few-step-2", "nfe": 2, "images": 2000, "images_per_s": 90.0, "fd_fashion": 1.875}
]


def student(seed: int = 0) -> Denoiser:
    """Ten classes and a null class, grey images of 16 x 16 in patches of 2 x 2, EDM."""
    model = unet(seed, num_class_embeds=11, in_channels=4, out_channels=4)
    return Denoiser(UNet(model, 10, 2), EDM(), "edm", time_scale=100.0)


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """The folder of a run that ended, as far as an export looks at it."""
    folder = tmp_path_factory.mktemp("runs") / "two-steps"
    save_denoiser(student(), folder.parent / "teacher")
    recipe = {
        "recipe": "two",
        "name": folder.name,
        "teacher": str(folder.parent / "teacher"),
        "data": {"path": "shipped:fashion_mnist/shards"},
        "method": {"name": "dmd2", "student_steps": 2},
        "optim": {role: {"lr": 1e-4} for role in ("student", "fake", "disc")},
        "train": {"steps": 30},
    }
    recipe = validate(Recipe, recipe)
    nets = {"student": student(1), "average": student(2)}
    manifest = {"step": 30, "images": 960, "updates": {}, "recipe": recipe.numbers}
    saver = Saver(folder / "checkpoints")
    saver.save(nets, {}, manifest)
    saver.wait()
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe.model_dump(mode="json")))
    (folder / "scores.json").write_text(json.dumps(ROWS))
    return folder


def job(name: str, *arguments: str) -> None:
    """Runs a job's main in this process."""
    command(name)(arguments)


@pytest.fixture(scope="module")
def exported(run) -> Path:
    """Its export, written by the job and compared in a fresh process."""
    job("export", f"run={run}", f"out={run.parent / 'model'}", "licence=cc-by-4.0")
    return run.parent / "model"


@pytest.fixture
def modules(tmp_path, monkeypatch) -> None:
    """diffusers' cache of pipeline code, away from the user's."""
    monkeypatch.setattr(dynamic_modules_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))


def test_the_cards_snippet_gives_the_students_images(exported, run, modules):
    """Exact to the grey level: the pipeline's pictures are our own uint8 images from the same noise."""
    card = (exported / "README.md").read_text()
    snippet = re.search(r"```python\n(.*?)```", card, re.S)[1].replace("path/to/this/folder", str(exported))
    names: dict = {}
    exec(snippet, names)
    pictures, pipe = names["images"], names["pipe"]
    result = open_student(run)
    assert result.averaged and result.step == 30
    generator = torch.Generator().manual_seed(0)
    z, eps = (torch.randn(8, 1, 16, 16, generator=generator) for _ in range(2))
    cond = torch.zeros(8, dtype=torch.int64)
    with torch.no_grad():
        x0 = run_calls({"student": student(2)}, [Call(1.0, s) for s in sigmas()], z, cond, toy.FixedDraws([eps]))
        theirs = pipe.sample([0] * 8, torch.Generator().manual_seed(0))
    difference = (theirs - x0).abs().max().item()
    print(f"largest difference of the pipeline's images: {difference:.2g}")
    assert difference <= 1e-5
    assert torch.equal(torch.stack([torch.from_numpy(np.array(p)) for p in pictures])[:, None], to_uint8(x0))


def sigmas() -> list[float]:
    """Noise levels of two student calls: the ramp's thousandths 999 and 499."""
    return EDM().ramp(torch.tensor([999, 499]) / 999).tolist()


def test_a_run_and_its_checkpoint_are_networks_for_another_runs_method(run):
    for ref in (run, run / "checkpoints" / "step-00000030"):
        net = open_net(str(ref))
        assert all(torch.equal(p, q) for p, q in zip(net.parameters(), student(2).parameters(), strict=True))
    with pytest.raises(ValueError, match="no checkpoint below"):
        open_net(str(run.parent / "teacher"))


def test_a_finished_run_needs_no_teacher(run, tmp_path, monkeypatch):
    describe_net(run, student())
    copy = Path(shutil.copytree(run, tmp_path / "runs" / run.name))
    (run / "network.json").unlink()
    recipe = yaml.safe_load((copy / "recipe.yaml").read_text())
    (copy / "recipe.yaml").write_text(yaml.safe_dump(recipe | {"teacher": str(tmp_path / "gone")}))
    a, b = open_student(copy), open_student(run)
    assert a.net.state_dict().keys() == b.net.state_dict().keys()
    assert all(torch.equal(p, q) for p, q in zip(a.net.parameters(), b.net.parameters(), strict=True))
    assert network_of(a.net) == network_of(b.net) and not a.net.training
    x, at = torch.randn(2, 1, 16, 16), Call(1.0, 2.0).level(torch.empty(2, 1, 1, 1))
    assert torch.equal(a.net(x, at, torch.tensor([1, 2])), b.net(x, at, torch.tensor([1, 2])))
    file, good = copy / "network.json", (copy / "network.json").read_text()
    for content, says in {
        "[]": "expected an object {...}, got []",
        "{}": "network: missing, and it has no default",
        good.replace('"norm_num_groups": 4', '"norm_num_groups": 0'): "network.config: UNet2DModel: ZeroDivisionError",
        good.replace('"classes": 10', '"classes": 7'): "classes: 7, but num_class_embeds is 11",
    }.items():
        file.write_text(content)
        with pytest.raises(ValueError, match=re.escape(says)) as error:
            open_student(copy)
        assert str(error.value).startswith(f"{file}: ") and "\n" not in str(error.value)
    file.unlink()
    with pytest.raises(ValueError, match="no folder .*gone"):
        open_student(copy)


def test_diffusers_asks_before_it_runs_the_pipelines_code(exported, modules):
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        diffusers.DiffusionPipeline.from_pretrained(exported)


def test_labels_are_numbers_or_names_and_outputs_are_diffusers_own(exported, modules):
    pipe = diffusers.DiffusionPipeline.from_pretrained(exported, trust_remote_code=True)

    def images(labels, count=None, **kwargs):
        return pipe(labels, count, torch.Generator().manual_seed(3), **kwargs).images

    arrays = images(None, 3, output_type="np")
    assert arrays.shape == (3, 16, 16, 1) and 0 <= arrays.min() and arrays.max() <= 1
    assert np.array_equal(images([0, "Trouser", 2], output_type="np"), arrays)
    assert torch.equal(images([0, 1, 2], output_type="pt").permute(0, 2, 3, 1), torch.from_numpy(arrays))
    assert not np.array_equal(images(7, 3, output_type="np"), arrays)
    assert len(images("Bag", 2, num_inference_steps=2)) == 2
    assert len(pipe().images) == 1
    seeds = [torch.Generator().manual_seed(s) for s in (5, 6)]
    alone = [pipe(1, 1, torch.Generator().manual_seed(s), output_type="pt").images[0] for s in (5, 6)]
    assert torch.allclose(pipe(1, 2, seeds, output_type="pt").images, torch.stack(alone), atol=1e-6)
    for call, says in {
        "pipe(10)": "10 is no class; give 0 to 9, or one of T-shirt/top",
        "pipe('Hat')": "'Hat' is no class",
        "pipe([1, 2], 3)": "num_images: 3, but class_labels has 2",
        "pipe(1, num_inference_steps=50)": "50, but this model was distilled to 2",
        "pipe(1, output_type='jpg')": "'jpg' is not one of",
    }.items():
        with pytest.raises(ValueError, match=says):
            eval(call, {"pipe": pipe})


def test_an_export_that_is_opened_and_saved_again_opens_again(exported, tmp_path, modules):
    pipe = diffusers.DiffusionPipeline.from_pretrained(exported, trust_remote_code=True)
    pipe.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again/pipeline.py").read_bytes() == (exported / "pipeline.py").read_bytes()
    again = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "again", trust_remote_code=True)
    a, b = (p([3, 8], generator=torch.Generator().manual_seed(1), output_type="pt").images for p in (pipe, again))
    assert torch.equal(a, b)
    ours = (open_sampler(str(folder)) for folder in (exported, tmp_path / "again"))
    a, b = (make_samples(sampler, 4, batch=4).images for sampler in ours)
    assert torch.equal(a, b)
    again.save_pretrained(tmp_path / "again")  # in its own place
    assert (tmp_path / "again/pipeline.py").read_bytes() == (exported / "pipeline.py").read_bytes()
    with pytest.raises(ValueError, match="push_to_hub: save to a folder"):
        pipe.save_pretrained(tmp_path / "hub", push_to_hub=True)


def test_the_card_says_what_it_is_and_names_no_place(exported, run):
    card = (exported / "README.md").read_text()
    head = yaml.safe_load(card.split("---")[1])
    assert head["library_name"] == "diffusers" and head["license"] == "cc-by-4.0"
    assert "| student | few-step-2 | 2 | 2000 | 1.875 |" in card
    assert "arXiv:2405.14867" in card and "step 30 of 30, batch 32, seed 0, running average" in card
    assert "9 Ankle boot" in card
    text = "".join(p.read_text() for p in exported.rglob("*") if p.suffix in (".md", ".json", ".py"))
    assert str(run.parent) not in text and "/tmp" not in text
    assert "import fewstep" not in text and "from fewstep" not in text


def test_the_export_is_read_here_too_and_sampled_alike(exported, run):
    ours, theirs = open_sampler(str(run)), open_sampler(str(exported))
    of = lambda sampler: (sampler.name, sampler.calls, sampler.conditions.classes)
    assert of(ours) == of(theirs) == ("few-step-2", 2, 10)
    a, b = make_samples(ours, 12, seed=5, batch=6), make_samples(theirs, 12, seed=5, batch=6)
    assert torch.equal(a.images, b.images)
    assert open_teacher(exported).classes == 10
    raw = open_student(run / "checkpoints/step-00000030", average=False)
    assert all(torch.equal(p, q) for p, q in zip(raw.net.parameters(), student(1).parameters(), strict=True))
    assert open_sampler(str(run.parent / "teacher"), steps=5).name == "heun-5"


def test_a_run_is_sampled_with_another_number_of_calls(exported, run):
    one, net = open_sampler(str(run), method={"student_steps": 1}), open_student(run).net
    z, cond = torch.randn(2, *net.shape), torch.tensor([3, 8])
    with torch.no_grad():
        (call,) = calls_at(net.schedule, (1.0,), on_ramp=True)
        expected = run_calls({"student": net}, (call,), z, cond, Draws(0, 0))
        assert torch.equal(one.sample(z, cond, Draws(0, 0)), expected)
    assert (one.name, one.calls) == ("few-step-1", 1)
    for folder, given, says in (
        (run, {"student_steps": 0}, "method.student_steps: "),
        (run, {"step": 1}, "method.step: no such key"),
        (run, {"gan_weight": 0.5}, "method: gan_weight changes nothing about how dmd2 samples; leave it out"),
        (run, {"name": "f_distill"}, "method.name: f_distill, but the run is of dmd2"),
        (exported, {"student_steps": 1}, "is no run, and its calls are fixed; leave it out"),
    ):
        with pytest.raises(ValueError, match=says):
            open_sampler(str(folder), method=given)


def test_an_export_is_sampled_as_its_calls_say_and_refused_where_they_say_nothing(exported, tmp_path):
    folder = Path(shutil.copytree(exported, tmp_path / "model"))
    index = folder / "model_index.json"
    good = json.loads(index.read_text())
    first, *rest = good["sampling"]["calls"]
    pictures = []
    for then in ("renoise", "step"):
        index.write_text(json.dumps(good | {"sampling": good["sampling"] | {"calls": [first | {"then": then}, *rest]}}))
        pictures.append(make_samples(open_sampler(str(folder)), 4, batch=4).images)
    assert not torch.equal(*pictures)
    assert torch.equal(pictures[0], make_samples(open_sampler(str(exported)), 4, batch=4).images)
    for sampling, says in {
        "[]": "sampling.calls: list should have at least 1 item",
        "7": "sampling.calls: expected a list such as [a, b], got 7",
        '{"calls": [[]]}': "sampling.calls.0: expected fields",
        '{"calls": [{"alpha": "x"}]}': "sampling.calls.0.alpha: expected a number, got 'x'",
        json.dumps({"calls": [first | {"sigma": -1}]}): "sampling.calls.0.sigma: must be at least 0, got -1",
        json.dumps({"calls": [first | {"shift": [1.0]}]}): "its calls take further scalars",
    }.items():
        index.write_text(f'{{"sampling": {sampling}}}')
        with pytest.raises(ValueError, match=re.escape(says)) as error:
            open_sampler(str(folder))
        assert str(error.value).startswith(f"{index}: ") and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("schedule", "prediction", "times"),
    [
        (DDPM(), "eps", (999, 749, 499, 249)),
        (DDPM("scaled_linear", 0.00085, 0.012), "eps", (399,)),
        (DDPM(zero_snr=True), "v", (999, 499)),
        (Flow(), "flow", (1.0, 0.5)),
        (Trig(), "v", (1.5, 0.9)),
        (EDM(), "edm", (80.0, 2.5)),
    ],
    ids=lambda v: getattr(v, "name", None),
)
def test_the_pipelines_numbers_are_the_denoisers_arithmetic(schedule, prediction, times):
    """Unconditional; the levels of EDM's own ramp on networks of every schedule and prediction."""
    net = Denoiser(UNet(unet(in_channels=3, out_channels=3)), schedule, prediction, time_scale=3.0)
    calls = calls_at(schedule, times)
    sampling = {"calls": entries(net, calls), "classes": None, "class_names": None, "patch": 1}
    pipe = FewStepPipeline(net.backbone.model, sampling=sampling)
    x0 = pipe.sample([None] * 3, torch.Generator().manual_seed(1))
    generator = torch.Generator().manual_seed(1)
    z, *noise = (torch.randn(3, 3, 8, 8, generator=generator) for _ in times)
    with torch.no_grad():
        expected = run_calls({"student": net}, calls, z, None, toy.FixedDraws(noise))
    assert expected.abs().max() > 0.1 and (x0 - expected).abs().max() <= 1e-5
    assert pipe(num_images=2).images[0].mode == "RGB"
    with pytest.raises(ValueError, match="no classes"):
        pipe(3)


@pytest.mark.parametrize("fields", [{"then": "step"}, {"takes": "noise"}, {"extra": {"w": 2.5}}], ids=str)
def test_the_pipeline_follows_every_kind_of_call(fields):
    net = Denoiser(UNet(unet(in_channels=3, out_channels=3)), DDPM(), "v")
    net.add_extra("w")
    nn.init.normal_(net.extras["w"].out.weight)
    calls = tuple(replace(call, **fields) for call in calls_at(DDPM(), (900, 500, 100)))
    sampling = {"calls": entries(net, calls), "classes": None, "class_names": None, "patch": 1}
    x0 = FewStepPipeline(net.backbone.model, sampling=sampling).sample([None] * 3, torch.Generator().manual_seed(1))
    generator = torch.Generator().manual_seed(1)
    z, *noise = (torch.randn(3, 3, 8, 8, generator=generator) for _ in calls)
    with torch.no_grad():
        expected = run_calls({"student": net}, calls, z, None, toy.FixedDraws(noise))
        plain = run_calls({"student": net}, calls_at(DDPM(), (900, 500, 100)), z, None, toy.FixedDraws(noise))
    assert (x0 - expected).abs().max() <= 1e-5 and not torch.allclose(x0, plain, atol=1e-3)


def test_calls_are_at_the_methods_levels():
    net = Denoiser(UNet(unet()), DDPM(), "eps")
    result = few_step_calls(METHODS["dmd2"](student_steps=4), net)
    times = [net.own_level(call.level(torch.empty(1, 1, 1, 1)), 4)[1].item() for call in result]
    assert times == pytest.approx([999, 749, 499, 249], abs=2e-3)
    assert len(few_step_calls(METHODS["regression"](), net)) == 1
    with pytest.raises(ValueError, match="denoising samples by heun-18, which is no few-step generator"):
        few_step_calls(METHODS["denoising"](), net)


def test_an_export_that_gives_other_images_is_not_kept(tmp_path, monkeypatch, exported):
    net = student()
    settings = {"calls": [Call(1.0, 80.0)], "card": Card(name="x")}
    right = {}

    def wrong(folder: Path) -> torch.Tensor:
        right["files"] = sorted(p.name for p in folder.iterdir())
        return torch.full((4, 1, 16, 16), torch.nan)

    monkeypatch.setattr(exporting, "_in_fresh_process", wrong)
    with pytest.raises(ExportError, match="differ by nan"):
        export(net, tmp_path / "model", **settings)
    assert right["files"] == ["README.md", "fewstep.json", "model_index.json", "pipeline.py", "unet"]
    assert list(tmp_path.iterdir()) == []
    before = {p: p.read_bytes() for p in exported.rglob("*") if p.is_file()}
    with pytest.raises(ExportError, match="differ"):
        export(net, exported, **settings, overwrite=True)
    with pytest.raises(FolderError, match="exists; choose another folder, or replace it with overwrite=true"):
        export(net, exported, **settings)
    assert {p: p.read_bytes() for p in exported.rglob("*") if p.is_file()} == before
    assert not [p.name for p in exported.parent.iterdir() if p.name.startswith(".")]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").touch()
    with pytest.raises(FolderError, match="is not an export, so it is not replaced"):
        export(net, tmp_path / "mine", **settings, overwrite=True)
    with pytest.raises(ExportError, match="2 names for 10 classes"):
        export(net, tmp_path / "model", **settings, class_names=["a", "b"])


def test_images_are_compared_as_people_get_them_within_what_rounding_gives(tmp_path, monkeypatch):
    net = Denoiser(UNet(unet(in_channels=3, out_channels=3)), DDPM(), "eps")
    settings = {"calls": calls_at(DDPM(), (999,)), "card": Card(name="x"), "overwrite": True}
    z = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        x0 = run_calls({"student": net}, settings["calls"], z, None, toy.FixedDraws())
    inside, above = x0.abs() < 0.9, x0 > 2
    assert x0.abs().max() > 100 and inside.any() and above.any()
    rounding = 1e-5 * abs(entries(net, settings["calls"])[0]["out"])
    assert 1.5e-3 < rounding < 1.7e-3
    trials = ((inside, 0.9 * rounding, True), (inside, 1.1 * rounding, False), (above, 0.9, True))
    for where, difference, kept in trials:
        theirs = x0 + difference * where
        monkeypatch.setattr(exporting, "_in_fresh_process", lambda folder, theirs=theirs: theirs)
        if kept:
            worst = export(net, tmp_path / "model", **settings)
            assert worst == pytest.approx(difference if where is inside else 0, abs=1e-6)
        else:
            with pytest.raises(ExportError, match="differ by 0.0017.* more than 0.0015"):
                export(net, tmp_path / "model", **settings)
    assert exporting.tolerance([{"out": -0.5}]) == 1e-5
    assert exporting.tolerance([{"out": 1e3}, {"out": 1.0}]) == 1 / 255


def test_an_earlier_export_is_replaced_whole(tmp_path, monkeypatch):
    net, settings = student(), {"calls": [Call(1.0, 80.0)], "card": Card(name="x")}
    z = torch.randn(4, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        x0 = run_calls({"student": net}, [Call(1.0, 80.0)], z, torch.arange(4), toy.FixedDraws())
    monkeypatch.setattr(exporting, "_in_fresh_process", lambda folder: x0 + 5e-6)
    assert export(net, tmp_path / "model", **settings) == pytest.approx(5e-6, rel=0.1)
    stale = tmp_path / "model/unet/diffusion_pytorch_model.fp16.safetensors"
    stale.touch()
    export(net, tmp_path / "model", **settings, overwrite=True)
    assert [p.name for p in tmp_path.iterdir()] == ["model"] and not stale.exists()
    (tmp_path / "model/notes.txt").touch()
    with pytest.raises(FolderError, match="also holds 'notes.txt', which is no part of an export"):
        export(net, tmp_path / "model", **settings, overwrite=True)
    assert (tmp_path / "model/notes.txt").exists()


def test_the_mean_of_two_runs_students_may_go_to_a_store(run, tmp_path, monkeypatch):
    recipe, nets = read_run(run), {"a": student(2), "b": student(3)}
    opened = lambda name: Student(nets[name], recipe, run, run, step=30, averaged=True)
    monkeypatch.setattr("fewstep.students.open_student", opened)
    monkeypatch.setattr(exporting, "_compare", lambda *_: 0.0)  # in a fresh process, which takes seconds
    monkeypatch.setenv("FEWSTEP_CACHE", str(tmp_path))
    job("merge", "first=a", "second=b", "weight=0.25", f"out=memory://{tmp_path}/merged")
    found = load_file(local(f"memory://{tmp_path}/merged") / "unet" / "diffusion_pytorch_model.safetensors")
    one, other = (net.backbone.model.state_dict() for net in nets.values())
    assert found.keys() == one.keys()
    for key, value in found.items():
        torch.testing.assert_close(value, 0.25 * one[key] + 0.75 * other[key])


def test_an_export_that_does_not_load_is_not_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(exporting, "CHECK", "raise SystemExit('broken on purpose')")
    with pytest.raises(ExportError, match="does not load it.*broken on purpose"):
        export(student(), tmp_path / "model", calls=[Call(1.0, 80.0)], card=Card(name="x"))
    assert not (tmp_path / "model").exists()


def test_text_models_are_refused(tmp_path):
    net = Denoiser(TextUNet(diffusers.UNet2DConditionModel(**TEXT)), DDPM(), "eps")
    with pytest.raises(ExportError, match="UNet2DConditionModel has no pipeline here"):
        export(net, tmp_path / "model", calls=calls_at(DDPM(), (999,)), card=Card(name="x"))


def test_what_is_no_run_is_named(tmp_path, run, exported):
    with pytest.raises(ValueError, match="no checkpoint below"):
        open_student(tmp_path)
    with pytest.raises(FolderError, match="exists"):
        export_run(run, out=exported)
    (tmp_path / "checkpoints").symlink_to(run / "checkpoints")
    with pytest.raises(ValueError, match="recipe.yaml"):
        open_student(tmp_path)


def test_a_run_that_is_at_work_is_exported_elsewhere_only(run):
    with another(run / LOCK), pytest.raises(Busy, match=rf"^{run}: in use by .*export to another folder with out="):
        export_run(run)
    assert not (run / "export").exists()


def test_sample_draws_the_classes_asked_for(exported, tmp_path, capsys):
    out = tmp_path / "pictures/grid.png"
    job(
        "sample",
        f"model={exported}",
        "images=6",
        "labels=[3,8]",
        "columns=3",
        f"out={out}",
        f"each={tmp_path / 'each'}",
    )
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (report["nfe"], report["images"]) == (2, 6) and report["images_per_s"] > 0
    picture = np.array(Image.open(out))
    assert picture.shape == (32, 48)
    each = [np.array(Image.open(tmp_path / f"each/{i:06d}.png")) for i in range(6)]
    assert np.array_equal(picture[16:, 32:], each[5])
    job("sample", f"model={exported}", "images=6", f"out={tmp_path / 'all.png'}", "columns=3")
    assert not np.array_equal(np.array(Image.open(tmp_path / "all.png")), picture)
    for argument, says in {"labels=[10]": "has 10 classes", f"model={tmp_path}": "holds no config.json"}.items():
        arguments = [f"model={exported}", argument] if argument.startswith("labels") else [argument]
        with pytest.raises(SystemExit) as stop:
            job("sample", *arguments)
        assert stop.value.code == 2 and says in capsys.readouterr().err
