"""The loop: exact resume, equal numbers however a batch is cut, nothing moved by accident, no hidden waits."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path

import pytest
import torch
import toy
from torch.utils._python_dispatch import TorchDispatchMode

from fewstep.diffusion.draws import Draws
from fewstep.diffusion.samplers import run_calls
from fewstep.diffusion.schedules import EDM
from fewstep.engine.checkpoint import read_weights, tensors_of
from fewstep.engine.folder import checkpoints, newest, step_of
from fewstep.engine.guard import Alarm, Guard
from fewstep.engine.optim import Optim
from fewstep.engine.train import Collapsed, Engine, Event, NonFinite, Train
from fewstep.engine.world import Layout, World
from fewstep.methods import METHODS
from fewstep.networks.denoiser import Denoiser

DMD2 = METHODS["dmd2"]
GAN = DMD2(critic_updates_per_student_update=2, gan_weight=0.05)


def everything(engine: Engine) -> dict[str, torch.Tensor]:
    """All state of a run by name, as its checkpoints hold it."""
    return {k: v.clone() for k, v in tensors_of(engine._parts(), engine.optims).items()}


def moments(engine: Engine, role: str, slot: str) -> torch.Tensor:
    """One of AdamW's moments of all of a role's parameters, in a row."""
    optim = engine.optims[role]
    return torch.cat([optim.state[p][slot].flatten() for p in engine.nets[role].parameters() if p in optim.state])


def assert_near(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor], atol: float) -> None:
    assert a.keys() == b.keys()
    for key in a:
        torch.testing.assert_close(a[key], b[key], rtol=0, atol=atol, msg=lambda text, key=key: f"{key}: {text}")


# Resume


@pytest.mark.parametrize(
    "method, train",
    [
        (GAN, {}),
        (DMD2(gan_weight=0, student_steps=2), {"average_decay": None, "accumulate": 2}),
        (METHODS["f_distill"](critic_updates_per_student_update=3), {"average_std": 0.1}),
        (METHODS["denoising"](), {}),
        (METHODS["regression"](steps=3), {}),
        (METHODS["scm"](tangents="difference", warmup_steps=30), {}),
    ],
    ids=["dmd2-gan", "dmd2-two-steps", "f_distill", "denoising", "regression", "scm"],
)
def test_sixty_steps_equal_forty_and_twenty_more_after_a_resume(tmp_path, method, train):
    train = {"steps": 60, "report_every": 20, "save_every": 20, "keep": 3, "batch": 8, **train}
    optim = {"warmup_steps": 10, "decay_from": 0.5}
    whole = toy.make_engine(method, folder=tmp_path / "a", optim=optim, **train)
    reports = toy.finish(whole)

    torch.manual_seed(random.randrange(2**31))  # the state of the global generator is no part of a run
    second = toy.make_engine(method, start=toy.denoiser(99), folder=tmp_path / "b", optim=optim, **train)
    second.resume(tmp_path / "a" / "step-00000040")
    assert second.step == 40 and second.images == 320
    assert toy.finish(second) == reports[2:]
    assert toy.same(everything(second), everything(whole))
    assert toy.same(read_weights(tmp_path / "a/step-00000060"), everything(second))


def test_a_run_is_a_function_of_its_seed():
    first, again, other = (toy.make_engine(GAN, seed=s, steps=6) for s in (0, 0, 1))
    assert toy.finish(first) == toy.finish(again)
    toy.finish(other)
    assert toy.same(everything(first), everything(again))
    assert not toy.same(toy.weights(first.nets["student"]), toy.weights(other.nets["student"]))


def test_a_changed_rate_takes_effect_on_resume(tmp_path):
    toy.finish(toy.make_engine(GAN, folder=tmp_path, steps=10))
    engine = toy.make_engine(GAN, folder=tmp_path, steps=20, lr={"fake": 0.5})
    engine.resume(tmp_path / "step-00000010")
    toy.finish(engine)
    assert engine.optims["fake"].param_groups[0]["lr"] == 0.5


# However a batch is cut

# AdamW with a floor of 1 is smooth in the gradient; with the usual floor the sign of a rounding error decides
SMOOTH = {"eps": 1.0}
PLAIN = [GAN, DMD2(gan_weight=0.05, student_steps=2, backward_simulation=False), METHODS["denoising"]()]
SLICED = ("_std", "_spread")  # a standard deviation is no mean over slices


def without(metrics: dict[str, float], ends: tuple[str, ...]) -> dict[str, float]:
    return {k: v for k, v in metrics.items() if not k.endswith(ends)}


@pytest.mark.parametrize("method", PLAIN, ids=["gan", "two-steps", "denoising"])
def test_accumulating_four_micro_batches_equals_one_batch(method):
    train = {"steps": 8, "batch": 16, "optim": SMOOTH, "report_every": 8}
    one, four = toy.make_engine(method, **train), toy.make_engine(method, accumulate=4, **train)
    a, b = toy.finish(one)[-1], toy.finish(four)[-1]
    assert_near(everything(four), everything(one), atol=1e-6)
    assert without(b, SLICED) == pytest.approx(without(a, SLICED), rel=1e-4, abs=1e-6)


class Poisoned(toy.Feed):
    """Data with one NaN, in the share of one rank at one step."""

    def __init__(self, mixture, step: int, rank: int = 0):
        super().__init__(mixture)
        self.step, self.rank = step, rank

    def batches(self, position, batch, rank=0, world=1):
        for rows in super().batches(position, batch, rank, world):
            if position == self.step * batch and rank == self.rank:
                images = rows["real"].clone()
                images[0] = math.nan
                rows["real"] = images
            yield rows
            position += batch


def one_of_two(rank: int, folder: str) -> None:
    """One of two processes: it trains replicated, trains sharded, resumes, and meets bad data on rank 1 only."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    train = {"steps": 8, "batch": 16, "optim": SMOOTH, "report_every": 8, "save_every": 8, "keep": 5}
    for placement in ("replicate", "shard"):
        world, out = World.current(layout=Layout(placement=placement)), Path(folder, placement)
        engine = toy.make_engine(GAN, world=world, folder=out, **train)
        metrics = toy.finish(engine)[-1]
        if rank == 0:
            (out / "metrics.json").write_text(json.dumps(metrics))
        further = toy.make_engine(GAN, start=toy.denoiser(99), world=world, folder=out, **(train | {"steps": 16}))
        further.resume(out / "step-00000008")
        for net in (further.student, further.nets["student"]):
            with torch.no_grad():  # as an evaluation does between two steps
                run_calls({"student": net}, GAN.calls(net), torch.zeros(1, 2, 1, 1), None, Draws(0, 0))
        toy.finish(further)
    bad = toy.make_engine(GAN, world=World.current(), **train)
    bad.feed = Poisoned(toy.Mixture(), step=3, rank=1)
    try:
        toy.finish(bad)
    except NonFinite as error:
        Path(folder, f"error-{rank}").write_text(str(error))
    torch.distributed.destroy_process_group()


def test_two_processes_equal_one_replicated_or_sharded(tmp_path):
    torch.multiprocessing.spawn(one_of_two, (str(tmp_path),), nprocs=2)
    train = {"steps": 8, "batch": 16, "optim": SMOOTH, "report_every": 8}
    one, longer = toy.make_engine(GAN, **train), toy.make_engine(GAN, **(train | {"steps": 16}))
    metrics = toy.finish(one)[-1]
    toy.finish(longer)
    for placement in ("replicate", "shard"):
        out = tmp_path / placement
        assert_near(read_weights(out / "step-00000008"), everything(one), atol=1e-6)
        assert_near(read_weights(out / "step-00000016"), everything(longer), atol=1e-6)
        theirs = json.loads((out / "metrics.json").read_text())
        assert without(theirs, SLICED) == pytest.approx(without(metrics, SLICED), rel=1e-4, abs=1e-6)
    for rank in (0, 1):  # both ranks stop, at the same step and phase
        assert (tmp_path / f"error-{rank}").read_text().startswith("step 3, phase critic: critic/")


def test_a_batch_that_cannot_be_shared_is_refused():
    with pytest.raises(ValueError, match=r"train.batch: 16 is not a multiple of workers x accumulate = 1 x 3"):
        toy.make_engine(GAN, accumulate=3)


def test_roles_without_a_place_are_refused():
    nets = GAN.nets(toy.Make())
    optims, feed, train = {role: Optim(lr=1e-3) for role in GAN.roles}, toy.Feed(toy.Mixture()), Train(steps=1, batch=2)
    with pytest.raises(ValueError, match="disc: no such network; dmd2 has teacher, student, fake"):
        Engine(GAN, {role: net for role, net in nets.items() if role != "disc"}, optims, feed, train)
    del optims["fake"]
    with pytest.raises(ValueError, match="optim.fake: missing; dmd2 trains disc, fake, student"):
        Engine(GAN, nets, optims, feed, train)


# What moves


class Watch:
    """Copies of all weights before and after each phase of an engine, by (step, phase)."""

    def __init__(self, engine: Engine):
        self.engine, self.before, self.after = engine, {}, {}
        self.optimise, engine._optimise = engine._optimise, self

    def __call__(self, index, phase, losses):
        key = (self.engine.step, phase.name)
        self.before[key] = self.look()
        self.optimise(index, phase, losses)
        self.after[key] = self.look()

    def look(self):
        nets = self.engine.nets.items()  # the average moves at the end of a step
        return {role: toy.weights(net) for role, net in nets if role != "average"}


def test_a_phase_moves_what_it_trains_and_nothing_else():
    engine = toy.make_engine(GAN, steps=6)
    watch = Watch(engine)
    toy.finish(engine)
    trains = {phase.name: phase.trains for phase in GAN.phases()}
    assert [key for key in watch.after if key[1] == "student"] == [(0, "student"), (2, "student"), (4, "student")]
    assert [key for key in watch.after if key[1] == "critic"] == [(step, "critic") for step in range(6)]
    previous = None
    for (step, phase), after in watch.after.items():
        before = watch.before[step, phase]
        moved = {role for role in after if not toy.same(before[role], after[role])}
        assert moved == set(trains[phase])
        assert previous is None or all(toy.same(previous[role], before[role]) for role in before)
        previous = after
    assert all(p.grad is None for net in engine.nets.values() for p in net.parameters())


# Where something is not finite


def poison_data(engine):
    engine.feed = Poisoned(toy.Mixture(), step=7)


def poison_teacher(engine):
    at = lambda module, args, out: out * math.inf if engine.step == 4 else None
    engine.nets["teacher"].register_forward_hook(at)


def poison_gradient(engine):
    weight = engine.nets["student"].backbone.decoder[0].weight
    weight.requires_grad_(True).register_hook(lambda g: g * math.nan if engine.step == 6 else g)


@pytest.mark.parametrize(
    "poison, step, phase, named, not_named",
    [
        (poison_data, 7, "critic", ["critic/gan", "critic/grad_norm"], ["critic/denoise"]),
        (poison_teacher, 4, "student", ["student/match", "student/grad_norm"], ["student/gan"]),
        (poison_gradient, 6, "student", ["student/grad_norm"], ["student/match", "student/gan"]),
    ],
    ids=["data", "teacher", "gradient"],
)
def test_what_is_not_finite_is_named_and_no_weight_moves_from_there_on(poison, step, phase, named, not_named, tmp_path):
    engine = toy.make_engine(GAN, steps=20, report_every=10, save_every=10, folder=tmp_path)
    watch = Watch(engine)
    poison(engine)
    with pytest.raises(NonFinite) as error:
        toy.finish(engine)
    text = str(error.value)
    assert text.startswith(f"step {step}, phase {phase}: ") and "the weights are those before it" in text
    terms = text.removeprefix(f"step {step}, phase {phase}: ").split(" not finite")[0].split(", ")
    assert set(named) <= set(terms) and not set(not_named) & set(terms)
    assert engine.step == 10 and list(tmp_path.iterdir()) == []  # told at the report, and nothing bad was saved
    stopped = watch.before[step, phase]
    assert all(toy.same(stopped[role], now) for role, now in watch.look().items())
    assert all(v.isfinite().all() for v in everything(engine).values())


def test_the_advice_fits_what_is_not_finite():
    def advice(step, **settings):
        engine = toy.make_engine(GAN, steps=4, report_every=1, save_every=4, **settings)
        engine.feed = Poisoned(toy.Mixture(), step)
        with pytest.raises(NonFinite) as error:
            toy.finish(engine)
        return str(error.value).split("the weights are those before it. ")[1]

    rates = "Lower optim.fake.lr or optim.disc.lr"
    assert advice(2) == rates
    assert advice(2, start=Denoiser(toy.MLP(), EDM(), "edm", precision="bf16")) == f"{rates}, or set precision=fp32"
    assert advice(0).startswith("No update came before it, so no learning rate caused it: look at the data")
    start = toy.denoiser()
    with torch.no_grad():
        start.backbone.decoder[0].bias[0] = math.inf
    assert advice(2, start=start) == (
        "Weights of student, fake are not finite themselves: give another teacher or start"
    )


# Optimisers


def test_the_learning_rate_warms_up_holds_and_falls():
    optim = Optim(lr=0.5, warmup_steps=4, decay_from=0.5, final=0.2)
    rates = [optim.rate_at(step, 21) for step in range(21)]
    assert rates[:5] == [0.125, 0.25, 0.375, 0.5, 0.5]
    assert rates[10] == 0.5 and rates[20] == pytest.approx(0.1)
    assert rates[15] == pytest.approx(0.5 * (1 - 0.8 * 4.5 / 9.5))
    assert Optim(lr=0.5).rate_at(0, 100) == Optim(lr=0.5).rate_at(99, 100) == 0.5


def test_each_role_learns_at_the_rate_of_the_step():
    engine = toy.make_engine(GAN, steps=4, lr={"student": 0.01, "fake": 0.02}, optim={"warmup_steps": 8})
    watch, rates = Watch(engine), []
    toy.finish(engine)
    rates = {role: optim.param_groups[0]["lr"] for role, optim in engine.optims.items()}
    # the student's last update was at step 2, the critic's at step 3
    assert rates == pytest.approx({"student": 0.01 * 3 / 8, "fake": 0.02 * 4 / 8, "disc": 0.001 * 4 / 8})
    assert len(watch.after) == 6


def test_adamws_first_update_is_the_sign_of_the_gradient_and_decays_every_parameter():
    engine = toy.make_engine(DMD2(gan_weight=0), steps=1, lr={"fake": 0.01}, optim={"weight_decay": 0.5})
    watch = Watch(engine)
    toy.finish(engine)
    before, after = watch.before[0, "critic"]["fake"], watch.after[0, "critic"]["fake"]
    for name, param in engine.nets["fake"].named_parameters():
        g = engine.optims["fake"].state[param]["exp_avg"] / 0.1
        expected = before[name] * (1 - 0.01 * 0.5) - 0.01 * g / (g.abs() + 1e-8)
        torch.testing.assert_close(after[name], expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("clip", [1e-3, 1e6, None])
def test_gradients_of_a_role_are_clipped_to_its_norm(clip):
    whole = toy.make_engine(GAN, steps=1, report_every=1, optim={"clip": None})
    engine = toy.make_engine(GAN, steps=1, report_every=1, optim={"clip": clip})
    toy.finish(whole)
    (metrics,) = toy.finish(engine)
    norms = {role: moments(whole, role, "exp_avg").norm().item() / (1 - 0.9) for role in GAN.roles}
    for role, norm in norms.items():
        clipped = moments(engine, role, "exp_avg").norm().item() / (1 - 0.9)
        assert clipped == pytest.approx(norm if clip is None else min(norm, clip), rel=1e-3)
    together = math.hypot(norms["fake"], norms["disc"])  # a phase reports one norm, before clipping
    assert metrics["critic/grad_norm"] == pytest.approx(together, rel=1e-3)


@pytest.mark.parametrize("kind", ["adam", "sgd"])
def test_every_optimiser_steps_resumes_exactly_and_is_cancelled_by_what_is_not_finite(kind, tmp_path):
    settings = {"optim": {"kind": kind, "weight_decay": 0.0}, "report_every": 2, "save_every": 2, "keep": 5}
    whole = toy.make_engine(GAN, steps=4, folder=tmp_path / "a", **settings)
    toy.finish(whole)
    second = toy.make_engine(GAN, steps=4, start=toy.denoiser(99), folder=tmp_path / "b", **settings)
    second.resume(tmp_path / "a" / "step-00000002")
    toy.finish(second)
    assert toy.same(everything(second), everything(whole))
    bad = toy.make_engine(GAN, steps=4, **settings)
    poison_teacher(bad)
    bad.nets["teacher"].register_forward_hook(lambda module, args, out: out * math.nan)
    before = everything(bad)
    with pytest.raises(NonFinite):
        toy.finish(bad)
    assert all(torch.equal(before[k], v) for k, v in everything(bad).items() if k.startswith("net.student"))


# The average


def trained_weights(engine: Engine) -> list[torch.Tensor]:
    """The student's weights after each step, as rows."""
    rows = []
    for _ in engine.run():
        rows.append(torch.cat([p.detach().flatten() for p in engine.nets["student"].parameters()]).double())
    return rows


def flat(net) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in net.parameters()]).double()


def test_the_power_average_follows_its_closed_form():
    engine = toy.make_engine("denoising", steps=12, report_every=1, save_every=12, average_std=0.15)
    rows, exponent = torch.stack(trained_weights(engine)), engine.train.profile.gamma + 1
    t = torch.arange(1, 13, dtype=torch.float64)
    weight = (t**exponent - (t - 1) ** exponent) / 12**exponent
    torch.testing.assert_close(flat(engine.student), weight @ rows, rtol=1e-5, atol=1e-6)


def test_the_exponential_average_follows_its_closed_form():
    engine = toy.make_engine("denoising", steps=12, report_every=1, save_every=12, average_decay=0.3)
    start = flat(engine.nets["student"])
    rows = trained_weights(engine)
    decay = [min(0.3, (1 + n) / (10 + n)) for n in range(12)]
    expected = math.prod(decay) * start
    for i, row in enumerate(rows):
        expected += (1 - decay[i]) * math.prod(decay[i + 1 :]) * row
    torch.testing.assert_close(flat(engine.student), expected, rtol=1e-5, atol=1e-6)
    assert engine.student is engine.nets["average"] and engine.student is not engine.nets["student"]


@pytest.mark.parametrize("ratio", [1, 3])
def test_the_average_counts_student_updates_at_any_ttur_ratio(ratio):
    method = DMD2(gan_weight=0, critic_updates_per_student_update=ratio)
    engine = toy.make_engine(method, steps=6, report_every=1, save_every=6, average_decay=0.15)
    expected, updates = flat(engine.nets["student"]), 0
    for _ in engine.run():
        if (engine.step - 1) % ratio == 0:
            decay = min(0.15, (1 + updates) / (10 + updates))
            expected, updates = decay * expected + (1 - decay) * flat(engine.nets["student"]), updates + 1
        torch.testing.assert_close(flat(engine.student), expected, rtol=1e-5, atol=1e-7)
    assert updates == 6 // ratio


def test_without_an_average_the_student_itself_is_scored(tmp_path):
    engine = toy.make_engine(GAN, steps=2, average_decay=None, folder=tmp_path)
    toy.finish(engine)
    assert engine.student is engine.nets["student"]
    assert not any("average" in key for key in read_weights(tmp_path / "step-00000002"))


# Reports


def test_reports_come_when_they_should_and_say_what_happened(tmp_path):
    engine = toy.make_engine(GAN, steps=13, batch=8, report_every=5, save_every=10, folder=tmp_path)
    reports = list(engine.run())
    assert [(r.step, r.images) for r in reports] == [(5, 40), (10, 80), (13, 104)]
    assert [r.checkpoint for r in reports] == [None, tmp_path / "step-00000010", tmp_path / "step-00000013"]
    assert [(r.metrics["updates/student"], r.metrics["updates/critic"]) for r in reports] == [(3, 5), (5, 10), (7, 13)]
    for report in reports:
        assert all(math.isfinite(v) for v in report.metrics.values())
        assert report.metrics["images_per_s"] > 0 and 0 <= report.metrics["data_wait"] <= 1
    assert list(engine.run()) == []  # the run is over


def test_metrics_are_means_over_the_steps_since_the_last_report():
    each = toy.finish(toy.make_engine(GAN, steps=6, report_every=1, save_every=6))
    third = toy.finish(toy.make_engine(GAN, steps=6, report_every=3, save_every=6))
    names = ["critic/denoise", "critic/gan", "critic/grad_norm", "health/d_real"]
    for i, report in enumerate(third):
        for name in names:
            assert report[name] == pytest.approx(sum(m[name] for m in each[3 * i : 3 * i + 3]) / 3, rel=1e-9)
    assert third[0]["student/match"] == pytest.approx((each[0]["student/match"] + each[2]["student/match"]) / 2)


class Waits(TorchDispatchMode):
    """Raises where the host would wait for the device: reading a value, or a branch on a tensor."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default):
            raise AssertionError(f"a step asks the device: {func}")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "method",
    [
        GAN,
        DMD2(gan_weight=0.05, student_steps=4, share_draws=False),
        DMD2(gan_weight=0.05, student_steps=4, backward_simulation=False),
        METHODS["f_distill"](),
        METHODS["denoising"](),
        METHODS["regression"](steps=3),
    ],
    ids=["gan", "four-steps", "no-simulation", "f_distill", "denoising", "regression"],
)
def test_no_step_reads_a_value_from_the_device(method, monkeypatch):
    engine = toy.make_engine(method, teacher=toy.denoiser(1), data=toy.Mixture(), accumulate=2)
    rows = next(engine.feed.batches(0, 16))
    engine.update(rows)  # the levels of the student's calls are made once
    for name in ("tolist", "numpy", "cpu", "item", "__bool__", "__float__", "__int__", "__index__"):
        monkeypatch.setattr(torch.Tensor, name, lambda *a, name=name, **k: pytest.fail(f"a step calls Tensor.{name}"))
    with Waits():
        for _ in range(3):
            engine.update(rows)


def test_the_watch_for_waits_sees_them():
    for wait in (lambda x: x.item(), bool, float, lambda x: x.nonzero(), lambda x: 1 if x > 0 else 0):
        with Waits(), pytest.raises(AssertionError, match="asks the device"):
            wait(torch.ones(()))


# Requests to stop, and the guard


class Alarms:
    """A watch that raises the alarm at given steps, once each, whatever it is shown."""

    def __init__(self, guard, *alarms):
        self.guard, self.alarms, self.state = guard, list(alarms), {}
        self.resets = []

    def check(self, step, metrics):
        due = [alarm for alarm in self.alarms if alarm.step == step]
        self.alarms = [alarm for alarm in self.alarms if alarm.step != step]
        return due[0] if due else None

    def reset(self, step):
        self.resets.append(step)

    def load(self, state): ...


def guarded(folder, policy, *alarms, **settings):
    """An engine of 20 steps whose guard looks at each step and raises these alarms."""
    guard = Guard(policy=policy, every=1, images=1, rate=0.5)
    engine = toy.make_engine(folder=folder, steps=20, report_every=5, save_every=5, guard=guard, **settings)
    engine.watch, engine.look_every = Alarms(guard, *alarms), 1
    return engine


def test_a_request_to_stop_ends_after_the_next_step_saved_and_the_run_goes_on_from_there(tmp_path):
    whole = toy.make_engine(steps=20)
    toy.finish(whole)
    engine = toy.make_engine(folder=tmp_path, steps=20, report_every=5)
    reports = []
    for report in engine.run():
        reports.append(report)
        engine.stop()
    assert [r.step for r in reports] == [5, 7]  # said after step 5, agreed on in the sixth, heard by all in the seventh
    assert not engine.finished and step_of(reports[-1].checkpoint) == 7
    again = toy.make_engine(folder=tmp_path, steps=20)
    again.resume(newest(tmp_path))
    toy.finish(again)
    assert again.finished and toy.same(toy.weights(whole.student), toy.weights(again.student))


def test_a_warning_changes_no_number(tmp_path):
    plain, warned = toy.make_engine(steps=20), guarded(tmp_path, "warn", Alarm(7, 6, "dark"))
    toy.finish(plain)
    events = [event for report in warned.run() for event in report.events]
    assert events == [Event("collapse", 7, "dark")]
    assert toy.same(toy.weights(plain.student), toy.weights(warned.student))


def test_a_roll_back_goes_to_the_checkpoint_before_the_trouble_with_a_lower_rate(tmp_path):
    engine = guarded(tmp_path / "a", "roll_back", Alarm(17, 12, "dark"))
    reports = list(engine.run())
    assert [r.step for r in reports] == [5, 10, 15, 17, 15, 20]
    collapse, back = reports[3].events
    assert (collapse.kind, back.kind, back.step) == ("collapse", "roll_back", 10)
    assert "rate is now 0.5 of optim.student.lr" in back.reason
    assert engine.watch.resets == [10] and engine.rates == {"disc": 1.0, "fake": 1.0, "student": 0.5}

    # the same by hand: ten steps, then ten more with half the student's rate
    first = toy.make_engine(folder=tmp_path / "b", steps=20, save_every=5, keep=9)
    for report in first.run():
        if report.step == 10:
            break
    first.wait()
    second = toy.make_engine(folder=tmp_path / "b", steps=20)
    second.resume(newest(tmp_path / "b"))
    second.rates["student"] = 0.5
    toy.finish(second)
    assert toy.same(toy.weights(engine.student), toy.weights(second.student))


def test_what_a_roll_back_left_behind_is_removed_and_its_rate_survives_a_restart(tmp_path):
    engine = guarded(tmp_path, "roll_back", Alarm(17, 12, "dark"))
    steps = []
    for report in engine.run():
        if report.step == 17:
            engine.wait()
            steps = [step_of(path) for path in checkpoints(tmp_path)]
    assert steps == [0, 5, 10]
    again = guarded(tmp_path, "roll_back")
    again.resume(newest(tmp_path))
    assert again.step == 20 and again.rates["student"] == 0.5 and again.roll_backs == 1


def test_an_early_collapse_goes_back_to_the_start(tmp_path):
    engine = guarded(tmp_path, "roll_back", Alarm(3, 1, "dark"))
    assert [event.step for report in engine.run() for event in report.events] == [3, 0]
    assert engine.finished


def test_the_guard_stops_the_run_where_its_policy_says_or_after_enough_roll_backs(tmp_path):
    with pytest.raises(Collapsed, match="step 7: dark.*policy=roll_back"):
        list(guarded(tmp_path / "a", "stop", Alarm(7, 6, "dark")).run())
    engine = guarded(tmp_path / "b", "roll_back", *[Alarm(step, step, "dark") for step in (12, 13, 14, 16)])
    with pytest.raises(Collapsed, match="step 16: dark, after 3 roll-backs"):
        list(engine.run())
