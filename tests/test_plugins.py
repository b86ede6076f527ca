"""Kinds of methods, each one class here and no edit elsewhere: it trains, resumes exactly, samples and is exported."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar, Literal

import pytest
import torch
import toy
from diffusers.utils import dynamic_modules_utils
from test_every_method import in_this_process
from test_predictions import Images, unet
from torch import Tensor
from torch.nn import functional as F

from fewstep.build import make_nets
from fewstep.cluster.gauges import Gauges, WorkerGauges
from fewstep.cluster.progress import Progress
from fewstep.compare import _headlines, _sort_key
from fewstep.diffusion.draws import INDICES, Draws, index_level
from fewstep.diffusion.health import statistics
from fewstep.diffusion.samplers import Call, calls_at, run_calls
from fewstep.diffusion.schedules import EDM
from fewstep.engine.checkpoint import read_weights, tensors_of
from fewstep.engine.guard import Guard
from fewstep.engine.optim import Optim
from fewstep.engine.train import Collapsed, Engine, Train
from fewstep.methods import METHODS, Method, Phase
from fewstep.methods.base import Batch, Make, Nets, Terms
from fewstep.networks import export as exporting
from fewstep.networks.card import Card
from fewstep.networks.export import export
from fewstep.recipe import load_recipe
from fewstep.texts import shown

TRAIN = {"batch": 16, "report_every": 4, "save_every": 4, "keep": 5}


def one_call(net: Any) -> tuple[Call, ...]:
    return calls_at(net.schedule, (1.0,), on_ramp=True)


class Follower(Method):
    """The student is drawn to its own slow average, and to a frozen helper's x0: an EMA target and a helper."""

    name: Literal["test_follower"] = "test_follower"
    frozen: ClassVar[tuple[str, ...]] = ("guide",)

    def nets(self, make: Make) -> dict[str, Any]:
        return {"student": make.copy("student"), "guide": make.helper("guide")}

    def averages(self) -> dict[str, tuple[str, float]]:
        return {"target": ("student", 0.5)}

    def phases(self) -> tuple[Phase, ...]:
        return (
            Phase("follow", ("student",), self.loss, every=2),
            Phase("settle", ("student",), self.loss, unless="follow"),
        )

    def calls(self, net: Any) -> tuple[Call, ...]:
        return one_call(net)

    def loss(self, nets: Nets, batch: Batch) -> tuple[Terms, Terms]:
        level = index_level(batch.draws, "t", nets["student"].schedule, 100, INDICES - 1, batch.real)
        x_t = level.noise(batch.real, batch.draws.normal("eps", batch.real.shape))
        x = nets["student"](x_t, level, batch.real_cond)
        with torch.no_grad():
            target, guide = nets["target"](x_t, level, batch.real_cond), nets["guide"](x_t, level)
        return {"pull": F.mse_loss(x, target), "guide": F.mse_loss(x, guide)}, statistics(x, batch.real)


class Fitter(Method):
    """A one-call generator fitted to data by its moments: no teacher."""

    name: Literal["test_fitter"] = "test_fitter"
    needs_teacher: ClassVar[bool] = False
    frozen: ClassVar[tuple[str, ...]] = ()

    def nets(self, make: Make) -> dict[str, Any]:
        return {"student": make.copy("student")}

    def phases(self) -> tuple[Phase, ...]:
        return (Phase("fit", ("student",), self.loss),)

    def calls(self, net: Any) -> tuple[Call, ...]:
        return one_call(net)

    def loss(self, nets: Nets, batch: Batch) -> tuple[Terms, Terms]:
        x = run_calls(nets, self.calls(nets["student"]), batch.z, batch.cond, batch.draws)
        return {"mean": F.mse_loss(x.mean(0), batch.real.mean(0))}, {}


class Dreamer(Method):
    """The student learns the teacher's denoising of its own images: no data."""

    name: Literal["test_dreamer"] = "test_dreamer"
    needs: ClassVar[tuple[str, ...]] = ()

    def nets(self, make: Make) -> dict[str, Any]:
        return {"teacher": make.teacher, "student": make.copy("student")}

    def phases(self) -> tuple[Phase, ...]:
        return (Phase("dream", ("student",), self.loss),)

    def calls(self, net: Any) -> tuple[Call, ...]:
        return one_call(net)

    def loss(self, nets: Nets, batch: Batch) -> tuple[Terms, Terms]:
        assert batch.real is None and batch.real_cond is None and not batch.rows
        x = run_calls(nets, self.calls(nets["student"]), batch.z, batch.cond, batch.draws)
        level = index_level(batch.draws, "t", nets["student"].schedule, 100, 900, x)
        with torch.no_grad():
            target = nets["teacher"](level.noise(x, batch.draws.normal("eps", x.shape)), level, batch.cond)
        return {"dream": F.mse_loss(x, target)}, statistics(x)


class Diverging(Method):
    """Phases with names of their own, and a student that is driven out of the data's range."""

    name: Literal["test_diverging"] = "test_diverging"
    headline: ClassVar[tuple[str, ...]] = ("push/away",)
    cure: ClassVar[str] = "Push less"

    def nets(self, make: Make) -> dict[str, Any]:
        return {"teacher": make.teacher, "student": make.copy("student")}

    def phases(self) -> tuple[Phase, ...]:
        return (Phase("push", ("student",), self.loss),)

    def calls(self, net: Any) -> tuple[Call, ...]:
        return one_call(net)

    def loss(self, nets: Nets, batch: Batch) -> tuple[Terms, Terms]:
        x = run_calls(nets, self.calls(nets["student"]), batch.z, batch.cond, batch.draws)
        return {"away": -x.mean()}, statistics(x, batch.real)


@pytest.fixture(scope="module", autouse=True)
def registry():
    """Methods of this file leave the registry when it is done."""
    yield
    for method in (Follower, Fitter, Dreamer, Diverging):
        METHODS.pop(method.tag, None)


def an_engine(method: Method, folder=None, seed: int = 0, make: toy.Make | None = None, **train) -> Engine:
    """An engine whose networks come from `Method.nets` alone, and its data, if it wants any, from the teacher."""
    make = make or toy.Make(toy.denoiser(seed))
    nets = method.nets(make)
    optims = {role: Optim(lr=1e-3) for role in method.roles}
    feed = toy.Feed(make.teacher) if "real" in method.needs else None
    return Engine(method, nets, optims, feed, Train(**{"steps": 8} | TRAIN | train), folder=folder, recipe={"toy": 1})


def everything(engine: Engine) -> dict[str, Tensor]:
    return {k: v.clone() for k, v in tensors_of(engine._parts(), engine.optims).items()}


@pytest.mark.parametrize("method", [Follower(), Fitter(), Dreamer()], ids=lambda m: m.tag)
def test_a_method_of_one_class_trains_resumes_exactly_and_samples(method, tmp_path):
    whole = an_engine(method, tmp_path / "a")
    before = toy.weights(whole.nets["student"])
    reports = toy.finish(whole)
    assert not toy.same(before, toy.weights(whole.nets["student"]))
    second = an_engine(method, tmp_path / "b", seed=99)
    second.resume(tmp_path / "a" / "step-00000004")
    assert toy.finish(second) == reports[1:]
    assert toy.same(everything(second), everything(whole))
    assert toy.same(read_weights(tmp_path / "a" / "step-00000008"), everything(second))
    with torch.no_grad():
        x = run_calls(whole.sampling, method.calls(whole.student), torch.randn(4, 2, 1, 1), None, Draws(0, 0))
    assert x.shape == (4, 2, 1, 1) and x.isfinite().all()


@pytest.mark.parametrize("method", [Follower(), Fitter(), Dreamer()], ids=lambda m: m.tag)
def test_a_method_of_one_class_is_exported_with_the_images_of_its_generator(method, tmp_path, monkeypatch):
    """`export` compares the images; diffusers loads the folder in this process, where its import is paid for."""
    monkeypatch.setattr(dynamic_modules_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(exporting, "_in_fresh_process", in_this_process)
    engine = an_engine(method, make=toy.Make(unet(EDM(), "edm", 0), Images(EDM())), steps=2, report_every=2)
    calls, start = method.calls(engine.student), toy.weights(engine.student)
    toy.finish(engine)
    assert not toy.same(start, toy.weights(engine.student))
    assert export(engine.student, tmp_path / "model", calls=calls, card=Card(name=method.tag)) <= 1e-5


def test_an_averaged_role_follows_every_update_of_its_source_and_a_frozen_one_stays():
    engine = an_engine(Follower(), steps=1, report_every=1, save_every=1)
    start, guide = toy.weights(engine.nets["student"]), toy.weights(engine.nets["guide"])
    toy.finish(engine)
    target, student = toy.weights(engine.nets["target"]), toy.weights(engine.nets["student"])
    for key in target:
        torch.testing.assert_close(target[key], 0.5 * start[key] + 0.5 * student[key])
    assert toy.same(guide, toy.weights(engine.nets["guide"]))
    assert {name.split(".")[1] for name in everything(engine) if name.startswith("net.")} == {
        "student",
        "target",
        "average",
    }


def test_a_phase_is_left_out_of_the_steps_in_which_another_ran():
    (_, report) = toy.finish(an_engine(Follower()))
    assert report["updates/follow"] == 4 and report["updates/settle"] == 4


def test_the_guard_and_its_advice_serve_a_method_with_phases_of_any_name():
    method = Diverging()
    nets, guard = method.nets(toy.Make()), Guard(policy="stop", every=1, images=16)
    optims = {"student": Optim(lr=3e-2)}
    train = Train(steps=200, batch=16, report_every=10, save_every=200)
    engine = Engine(method, nets, optims, toy.Feed(toy.Mixture()), train, guard=guard)
    with pytest.raises(Collapsed, match="brightness .* Push less, or choose failure.collapse.policy=roll_back"):
        toy.finish(engine)


def test_progress_gauges_and_comparison_show_the_phases_of_any_name(monkeypatch):
    method = Diverging()
    engine = an_engine(method, steps=2, report_every=2)
    [report] = engine.run()
    away = report.metrics["push/away"]
    line = Progress(SimpleNamespace(method=method, train=engine.train)).line(vars(report))
    assert line.endswith(f"  away {shown(away, 3)}")
    values = {}
    monkeypatch.setattr(Gauges, "set", lambda self, name, value, **tags: values.update({(name, *tags.values()): value}))
    WorkerGauges("run")(engine, report)
    assert values["phase_seconds", "0", "push"] == report.metrics["push_s"]
    assert values["gradient_norm", "push"] == report.metrics["push/grad_norm"]
    assert {("health", signal) for signal in ("brightness", "saturation", "diversity")} <= values.keys()
    run = SimpleNamespace(params={"method.name": method.tag})
    headlines = _headlines([SimpleNamespace(run=run)])
    assert headlines == ("score/", "push/away")
    assert (
        sorted(["a/first", "push/away", "push/grad_norm"], key=lambda name: _sort_key(name, headlines))[0]
        == "push/away"
    )


def test_a_recipes_networks_are_a_function_of_its_seed():
    """All ranks make the same head, whatever a process drew before."""
    arguments = ["recipe=fashion_mnist"]
    recipes = Path(__file__).parents[1] / "jobs" / "recipes"
    first, again, other = (load_recipe([*arguments, f"seed={seed}"], recipes, "fashion_mnist") for seed in (0, 0, 1))
    heads = []
    for recipe in (first, again, other):
        torch.rand(3)
        heads.append(toy.weights(make_nets(recipe)["disc"]))
    assert toy.same(heads[0], heads[1]) and not toy.same(heads[0], heads[2])
