"""The contract of every method: frozen networks stay, resume is exact, however a batch is cut the numbers are those of
one, a neutral setting is the host bit for bit, health has its common names, and an export gives the same images.

A new method needs one entry in tests/cells.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
import torch
import toy
from cells import CELLS, EVERY, engine, method, one_of_two
from diffusers import DiffusionPipeline
from diffusers.utils import dynamic_modules_utils
from test_networks import unet

from fewstep.diffusion.schedules import EDM
from fewstep.engine.checkpoint import read_weights, tensors_of
from fewstep.engine.train import Engine
from fewstep.methods import METHODS
from fewstep.networks import export as exporting
from fewstep.networks.backbones import UNet
from fewstep.networks.card import Card
from fewstep.networks.denoiser import Denoiser

SLICED = ("_std", "_spread")  # a standard deviation is no mean over slices


def everything(of: Engine) -> dict[str, torch.Tensor]:
    return {key: value.clone() for key, value in tensors_of(of._parts(), of.optims).items()}


class Moves:
    """Roles that a phase's optimisers moved, and roles that its loss left a gradient on, by phase."""

    def __init__(self, watched: Engine):
        self.engine, self.optimise, self.moved, self.left = watched, watched._optimise, {}, {}
        watched._optimise = self

    def __call__(self, index, phase, losses):
        nets = self.engine.nets
        result = {role for role, net in nets.items() if any(p.grad is not None for p in net.parameters())}
        self.left.setdefault(phase.name, set()).update(result - set(phase.trains))
        before = {role: toy.weights(net) for role, net in nets.items()}
        self.optimise(index, phase, losses)
        moved = {role for role, net in nets.items() if not toy.same(before[role], toy.weights(net))}
        self.moved.setdefault(phase.name, set()).update(moved)


@dataclass(frozen=True)
class Whole:
    """An undisturbed run: where its checkpoints lie, its reports, all that is saved at its end, and what moved."""

    folder: Path
    reports: list[dict[str, float]]
    end: dict[str, torch.Tensor]
    moves: Moves


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The undisturbed run of a method, made once."""

    @cache
    def run(tag: str) -> Whole:
        folder = tmp_path_factory.mktemp(tag)
        one = engine(method(tag), folder)
        moves = Moves(one)
        return Whole(folder, toy.finish(one), everything(one), moves)

    return run


def assert_near(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    for key in a:
        torch.testing.assert_close(a[key], b[key], rtol=0, atol=1e-6, msg=lambda text, key=key: f"{key}: {text}")


def test_every_method_has_its_cell():
    denoisers = {tag for tag, kind in METHODS.items() if kind.generates}  # codecs and encoders have tests of their own
    assert {tag for tag in denoisers if not tag.startswith("test_")} == {c.of or tag for tag, c in CELLS.items()}


@pytest.mark.parametrize("tag", EVERY)
def test_a_phase_moves_what_it_trains_and_leaves_no_gradient_on_another_network(tag, whole):
    chosen, moves = method(tag), whole(tag).moves
    assert {phase.name for phase in chosen.phases()} == set(moves.moved)
    for phase in chosen.phases():
        assert moves.moved[phase.name] == set(phase.trains) and moves.left[phase.name] == set()
    assert "teacher" not in chosen.roles


@pytest.mark.parametrize("tag", EVERY)
def test_two_steps_a_resume_and_two_more_are_four(tag, whole, tmp_path):
    undisturbed = whole(tag)
    second = engine(method(tag), tmp_path, seed=99)
    second.resume(undisturbed.folder / "step-00000002")
    assert toy.finish(second) == undisturbed.reports[1:]
    assert toy.same(everything(second), undisturbed.end)


@pytest.mark.parametrize("tag", EVERY)
def test_two_micro_batches_are_one_batch(tag, whole):
    two = engine(method(tag), accumulate=2)
    reports = toy.finish(two)
    assert_near(everything(two), whole(tag).end)
    for mine, theirs in zip(reports, whole(tag).reports, strict=True):
        same = {key: value for key, value in theirs.items() if not key.endswith(SLICED)}
        assert {key: mine[key] for key in same} == pytest.approx(same, rel=1e-4, abs=1e-5)


@pytest.fixture(scope="module")
def two_workers(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("two")
    torch.multiprocessing.spawn(one_of_two, (str(folder),), nprocs=2)
    return folder


@pytest.mark.parametrize("tag", EVERY)
def test_two_workers_are_one(tag, whole, two_workers):
    assert_near(read_weights(two_workers / tag / "step-00000004"), whole(tag).end)


@pytest.mark.parametrize("tag", [tag for tag in EVERY if CELLS[tag].off is not None])
def test_switched_off_a_method_is_its_host_bit_for_bit(tag):
    cell = CELLS[tag]
    own, host = engine(method(tag, cell.off)), engine(method(*cell.host))
    assert toy.finish(own) == toy.finish(host)
    for role in {"student", "fake", "average"} & host.nets.keys():
        assert toy.same(toy.weights(own.nets[role]), toy.weights(host.nets[role]))


@pytest.mark.parametrize("tag", EVERY)
def test_health_and_headline_have_their_names(tag, whole):
    chosen, names = method(tag), set().union(*whole(tag).reports)
    assert chosen.headline and set(chosen.headline) <= names
    if CELLS[tag].generates:
        assert {f"health/student_{what}" for what in ("mean", "std", "spread", "saturated")} <= names
    if "disc" in chosen.roles:
        assert "health/d_accuracy" in names


def student(seed: int, classes: int = 10) -> Denoiser:
    """Classes and a null class, grey images of 16 x 16 in patches of 2 x 2, EDM."""
    model = unet(seed, num_class_embeds=classes + 1, in_channels=4, out_channels=4)
    return Denoiser(UNet(model, classes, 2), EDM(), "edm", time_scale=100.0)


def exported(tag: str, folder: Path) -> float:
    """The largest difference of an export's images to those of the method's untrained generator."""
    chosen, start = method(tag), student(1, classes=4)
    nets = chosen.nets(toy.Make(start, student(2, classes=4)))
    calls = chosen.calls(nets["student"])
    if not calls:
        pytest.skip("a diffusion model, which a solver samples")
    card = Card(name=tag, teacher="", method=tag, data="", training="")
    return exporting.export(nets["student"], folder / "model", calls=calls, card=card, others=nets)


def in_this_process(folder: Path) -> torch.Tensor:
    pipe = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)
    return pipe.sample(pipe.labels(None, exporting.CHECKED_IMAGES), torch.Generator().manual_seed(0))


@pytest.mark.parametrize("tag", EVERY)
def test_an_export_gives_the_generators_images(tag, tmp_path, monkeypatch):
    monkeypatch.setattr(exporting, "_in_fresh_process", in_this_process)
    monkeypatch.setattr(dynamic_modules_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    assert exported(tag, tmp_path) <= exporting.GREY


@pytest.mark.slow
@pytest.mark.parametrize("tag", EVERY)
def test_an_export_gives_the_generators_images_in_a_fresh_process(tag, tmp_path):
    assert exported(tag, tmp_path) <= exporting.GREY
