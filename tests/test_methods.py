"""The methods: DMD2's acceptance tests, its variations against it, and distillation of a mixture known exactly."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace

import pytest
import torch
import toy

from fewstep.diffusion.draws import Draws
from fewstep.diffusion.level import Level
from fewstep.diffusion.samplers import heun, run_calls
from fewstep.diffusion.schedules import DDPM, EDM, Flow, Trig
from fewstep.engine.train import Engine
from fewstep.methods import METHODS, Batch
from fewstep.methods.f_distill import H
from fewstep.networks.conditions import Labels

DMD2, FDistill, Denoising, Regression = (METHODS[n] for n in ("dmd2", "f_distill", "denoising", "regression"))
SD = DDPM("scaled_linear", 0.00085, 0.012)


def a_batch(count: int = 8, step: int = 0, seed: int = 0, part: int = 0, parts: int = 1) -> Batch:
    draws = Draws(seed, step, part, parts)
    real, _ = toy.Mixture().sample(count * parts, seed=step)
    return Batch(real[part::parts], None, draws.normal("z", (count, 2, 1, 1)), None, draws)


def a_team(method, seed: int = 0, **nets) -> dict:
    """The roles of a method with networks that all differ."""
    team = method.nets(toy.Make(toy.denoiser(seed)))
    if "fake" in team:
        team["fake"] = toy.denoiser(seed + 1)
    return team | nets


def gradient(loss, net) -> torch.Tensor:
    grads = torch.autograd.grad(loss, list(net.parameters()), allow_unused=True)
    pairs = zip(grads, net.parameters(), strict=True)
    return torch.cat([torch.zeros_like(p).flatten() if g is None else g.flatten() for g, p in pairs])


class Calls:
    """Counts the passes of each network by mode and by whether they build a graph, and keeps what went in and out."""

    def __init__(self, nets: dict):
        self.count, self.seen = Counter(), []
        for role, net in nets.items():
            net.register_forward_hook(lambda *a, role=role: self._note(role, *a), with_kwargs=True)

    def _note(self, role, net, args, kwargs, out):
        mode = args[3] if len(args) > 3 else kwargs.get("mode", "x0")
        first = out
        while isinstance(first, tuple):
            first = first[0]
        self.count[role, "head" if role == "disc" else mode, first.requires_grad] += 1
        self.seen.append(SimpleNamespace(role=role, mode=mode, args=args, out=first))

    def of(self, role: str, mode: str | None = None) -> list:
        return [c for c in self.seen if c.role == role and mode in (None, c.mode)]


# What is generated, and what moves


def test_the_teacher_stays_bit_identical():
    for method in (DMD2(gan_weight=0.05), FDistill(), Regression(steps=3)):
        engine = toy.make_engine(method, teacher=toy.denoiser(1), data=toy.Mixture(), steps=7)
        before = toy.weights(engine.nets["teacher"])
        toy.finish(engine)
        assert toy.same(before, toy.weights(engine.nets["teacher"]))
        assert all(p.grad is None and not p.requires_grad for p in engine.nets["teacher"].parameters())


class Phases:
    """Weights before and after each phase of an engine, and the gradients that a phase left behind."""

    def __init__(self, engine: Engine):
        self.engine, self.optimise, self.moved, self.left = engine, engine._optimise, {}, {}
        engine._optimise = self

    def __call__(self, index, phase, losses):
        nets, key = self.engine.nets, (self.engine.step, phase.name)
        others = [role for role in nets if role not in phase.trains]
        self.left[key] = [role for role in others if any(p.grad is not None for p in nets[role].parameters())]
        before = {role: toy.weights(net) for role, net in nets.items()}
        self.optimise(index, phase, losses)
        self.moved[key] = {role for role, net in nets.items() if not toy.same(before[role], toy.weights(net))}


def test_student_and_critic_move_in_their_own_phase_and_leave_no_gradient_on_the_other():
    engine = toy.make_engine(DMD2(gan_weight=0.05, critic_updates_per_student_update=3), steps=4)
    phases = Phases(engine)
    toy.finish(engine)
    turns = {(0, "student"), (3, "student")}
    assert {key for key in phases.moved if key[1] == "student"} == turns
    assert all(phases.moved[key] == {"student"} for key in turns)
    assert all(phases.moved[step, "critic"] == {"fake", "disc"} for step in range(4))
    assert all(left == [] for left in phases.left.values())
    assert all(p.grad is None for net in engine.nets.values() for p in net.parameters())


@pytest.mark.parametrize("student_steps", [1, 4])
def test_the_critic_learns_from_the_images_of_the_students_turn(student_steps):
    method = DMD2(gan_weight=0.05, student_steps=student_steps)
    engine = toy.make_engine(method, steps=1)
    images = {}
    for name in ("student_loss", "critic_loss"):
        loss = getattr(method, name)

        def keep(nets, batch, name=name, loss=loss):
            images[name] = batch.x
            return loss(nets, batch)

        object.__setattr__(method, name, keep)
    before = toy.weights(engine.nets["student"])
    calls = Calls({"student": engine.nets["student"]})
    toy.finish(engine)
    assert torch.equal(images["student_loss"], images["critic_loss"])  # made once, before the student's update
    assert images["student_loss"].requires_grad and not images["critic_loss"].requires_grad
    assert torch.equal(calls.of("student")[-1].out, images["critic_loss"])
    assert not toy.same(before, toy.weights(engine.nets["student"]))


def test_images_of_a_critic_only_step_have_no_graph():
    method = DMD2(gan_weight=0, critic_updates_per_student_update=2)
    nets, batch = a_team(method), a_batch()
    assert method.prepare(nets, batch, ("student",)).x.requires_grad
    assert not method.prepare(nets, batch, ("fake",)).x.requires_grad


# The student's calls


@pytest.mark.parametrize(
    "settings, expected",
    [
        ({"student_steps": 4}, [999, 749, 499, 249]),
        ({"student_steps": 2}, [999, 499]),
        ({"student_steps": 8}, [999, 874, 749, 624, 499, 374, 249, 124]),
        ({"student_steps": 1}, [999]),
        ({"conditioning": 399}, [399]),
    ],
)
def test_the_student_is_called_at_the_published_levels(settings, expected):
    method = DMD2(**settings)
    assert method.indices() == expected
    student = toy.denoiser(schedule=SD, prediction="eps")
    levels = [call.level(torch.zeros(3, 2, 1, 1)) for call in method.calls(student)]
    times = [SD.time(level.angle).flatten() for level in levels]
    wanted = torch.tensor(expected).double()[:, None].expand(-1, 3)
    torch.testing.assert_close(torch.stack(times), wanted, rtol=0, atol=1e-3)


def test_the_first_call_takes_pure_noise_and_turns_it_to_x0_at_its_level():
    z = a_batch().z
    student = toy.denoiser(schedule=SD, prediction="eps")
    calls = Calls({"backbone": student.backbone})
    x = DMD2(conditioning=399).prepare({"student": student}, a_batch(), ()).x
    ((noise, time, *_),) = (c.args for c in calls.of("backbone"))
    torch.testing.assert_close(noise, z)  # unit noise, not mixed with alpha
    torch.testing.assert_close(time, torch.full((8,), 0.399))  # the toy divides time by 1000
    eps = calls.of("backbone")[0].out
    torch.testing.assert_close(x, (z - 0.7576 * eps) / 0.6528, rtol=2e-4, atol=2e-4)

    student = toy.denoiser()
    calls = Calls({"student": student})
    DMD2().prepare({"student": student}, a_batch(), ())
    x_t, level = calls.of("student")[0].args[:2]
    assert (level.sigma == 80).all()
    assert torch.equal(x_t, 80 * z)


def test_backward_simulation_picks_every_step_equally_and_all_ranks_the_same():
    method, student, picked = DMD2(student_steps=4), toy.denoiser(), []
    calls = Calls({"student": student})
    with torch.no_grad():
        for step in range(400):
            for part in range(2):
                calls.seen.clear()
                method.prepare({"student": student}, a_batch(1, step, part=part, parts=2), ())
                picked.append(len(calls.seen))
    assert picked[0::2] == picked[1::2]
    counts = torch.tensor(picked[0::2]).bincount(minlength=5)[1:]
    assert ((counts - 100.0) ** 2 / 100).sum() < 16.3  # chi-square, 3 degrees of freedom, p = 0.001


def test_backward_simulation_is_the_sampler_up_to_its_step_and_gradient_flows_through_the_last_call_only():
    method, student = DMD2(student_steps=4), toy.denoiser()
    calls, lengths = Calls({"student": student}), set()
    for step in range(16):
        calls.seen.clear()
        batch = a_batch(4, step)
        x = method.prepare({"student": student}, batch, ("student",)).x
        made = calls.of("student")
        lengths.add(len(made))
        assert [c.out.requires_grad for c in made] == [False] * (len(made) - 1) + [True]
        assert not made[-1].args[0].requires_grad  # so no gradient enters an earlier call
        # sample() of a full run uses the same levels and the same noise, so its calls are the same
        calls.seen.clear()
        with torch.no_grad():
            run_calls({"student": student}, method.calls(student), batch.z, None, batch.draws)
        for ours, its in zip(made, calls.of("student"), strict=False):
            assert torch.equal(ours.args[0], its.args[0]) and torch.equal(ours.args[1].sigma, its.args[1].sigma)
        assert torch.equal(x, calls.of("student")[len(made) - 1].out)
    assert lengths == {1, 2, 3, 4}


def test_without_backward_simulation_each_sample_is_a_noised_real_image_at_its_own_step():
    method, student = DMD2(student_steps=4, backward_simulation=False), toy.denoiser()
    calls, batch = Calls({"student": student}), a_batch(400)
    out = method.prepare({"student": student}, batch, ())
    x_t, level = calls.of("student")[0].args[:2]
    sigmas = EDM().ramp(torch.tensor([999, 749, 499, 249]).double() / 999).float()
    which = (level.sigma.flatten()[:, None] - sigmas).abs().argmin(1)
    torch.testing.assert_close(level.sigma.flatten(), sigmas[which])
    assert ((which.bincount(minlength=4) - 100.0) ** 2 / 100).sum() < 16.3
    first = (which == 0)[:, None, None, None]
    expected = torch.where(first, 80 * batch.z, batch.real + level.sigma * batch.z)
    torch.testing.assert_close(x_t, expected, rtol=1e-4, atol=1e-5)
    assert len(calls.seen) == 1 and out.cond is batch.real_cond


# The losses


def test_a_critic_equal_to_the_teacher_gives_exactly_no_matching_gradient():
    teacher, method = toy.denoiser(3), DMD2(gan_weight=0)
    nets = a_team(method, teacher=teacher, fake=teacher)
    batch = method.prepare(nets, a_batch(), ("student",))
    terms, health = method.student_loss(nets, batch)
    assert terms["match"] == 0 and health["match_gradient"] == 0
    assert (gradient(terms["match"], nets["student"]) == 0).all()


def test_the_matching_term_is_the_papers_formula():
    method = DMD2(gan_weight=0, matching_weight=2.0)
    nets = a_team(method)
    batch = method.prepare(nets, a_batch(), ("student",))
    calls = Calls(nets)
    terms, health = method.student_loss(nets, batch)
    (teacher,), (fake,) = calls.of("teacher"), calls.of("fake")
    assert torch.equal(teacher.args[0], fake.args[0]) and teacher.args[1] is fake.args[1]  # one noised x for both
    x, real, mu = batch.x, teacher.out, fake.out
    normaliser = (x - real).abs().mean((1, 2, 3), keepdim=True)
    g = ((mu - real) / normaliser).detach()
    (dx,) = torch.autograd.grad(terms["match"], x)
    torch.testing.assert_close(dx, 2.0 * g / x.numel(), rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(health["match_normaliser"], normaliser.mean())
    torch.testing.assert_close(health["match_gradient"], g.flatten(1).norm(dim=1).mean())


def test_levels_stay_in_the_published_ranges():
    method, net = DMD2(gan_weight=0.05, share_draws=False), toy.denoiser()
    nets, lows = a_team(method, student=net), {}
    calls = Calls(nets)
    for step in range(40):
        batch = method.prepare(nets, a_batch(64, step), ())
        for loss, part in ((method.student_loss, "student"), (method.critic_loss, "critic")):
            calls.seen.clear()
            loss(nets, batch)
            for c in calls.seen:
                if c.role in ("teacher", "fake"):
                    lows.setdefault((part, c.role, c.mode), []).append(c.args[1].sigma.flatten())
    ramp = EDM().ramp(torch.tensor([0, 20, 60, 920, 980, 999]).double() / 999).float()
    for (part, _role, mode), sigmas in lows.items():
        sigma = torch.cat(sigmas)
        low, high = (1, 4) if (part, mode) == ("student", "x0") else (0, 5)
        assert ramp[low] <= sigma.min() <= ramp[2] and ramp[3] <= sigma.max() <= ramp[high]
        if high == 5:  # the critic and the head also learn where the matching term does not look
            assert sigma.min() < ramp[1] and sigma.max() > ramp[4]
    assert len(lows) == 5


def test_the_critics_denoising_is_the_mean_squared_error_of_what_it_predicts():
    for schedule, prediction in ((EDM(), "edm"), (SD, "eps"), (SD, "v"), (Flow(), "flow"), (Trig(), "x0")):
        method, fake = DMD2(gan_weight=0), toy.denoiser(1, schedule, prediction)
        nets = a_team(method, fake=fake)
        batch = method.prepare(nets, a_batch(), ())
        calls = Calls({"fake": fake, "backbone": fake.backbone})
        terms, _ = method.critic_loss(nets, batch)
        (outer,), (inner,) = calls.of("fake"), calls.of("backbone")
        level, eps = outer.args[1], batch.draws.normal("critic/eps", batch.x.shape)
        torch.testing.assert_close(outer.args[0], level.noise(batch.x, eps))
        target = {
            "eps": eps,
            "v": level.alpha * eps - level.sigma * batch.x,
            "flow": eps - batch.x,
            "x0": batch.x,
            "edm": (batch.x * level.sigma - 0.36 * eps) / ((0.36 + level.sigma**2).sqrt() * 0.6),
        }[prediction]
        torch.testing.assert_close(terms["denoise"], ((inner.out - target) ** 2).mean(), rtol=1e-5, atol=1e-6)


def test_the_adversarial_terms_are_the_papers_formula():
    method = DMD2(gan_weight=0.3, critic_gan_weight=0.7, matching_weight=0, share_draws=False)
    nets = a_team(method)
    batch = method.prepare(nets, a_batch(), ("student",))
    calls = Calls(nets)
    (name,) = method.student_loss(nets, batch)[0]
    assert name == "gan" and calls.of("teacher") == []
    calls.seen.clear()
    terms, _ = method.student_loss(nets, batch)
    (logits,) = (c.out for c in calls.of("disc"))
    torch.testing.assert_close(terms["gan"], 0.3 * torch.log1p(torch.exp(-logits)).mean())
    assert torch.autograd.grad(terms["gan"], batch.x)[0].abs().sum() > 0  # through the noising and the frozen critic

    calls.seen.clear()
    terms, health = method.critic_loss(nets, batch)
    d_real, d_fake = calls.of("disc")[0].out.chunk(2)
    expected = torch.log1p(torch.exp(-d_real)).mean() + torch.log1p(torch.exp(d_fake)).mean()
    torch.testing.assert_close(terms["gan"], 0.7 * expected)
    torch.testing.assert_close(health["d_real"], d_real.sigmoid().mean())
    torch.testing.assert_close(health["d_fake"], d_fake.sigmoid().mean())
    right = torch.cat([d_real > 0, d_fake < 0]).float().mean()
    torch.testing.assert_close(health["d_accuracy"], right)
    fake_pass, real_pass = calls.of("fake", "features")
    own = torch.cat([nets["disc"]((real_pass.out,)), nets["disc"]((fake_pass.out,))])  # one batch of both equals two
    torch.testing.assert_close(torch.cat([d_real, d_fake]), own)
    assert not torch.equal(fake_pass.args[1].sigma, real_pass.args[1].sigma)


def test_sharing_draws_keeps_the_mean_gradient():
    shared = DMD2(gan_weight=0.05, critic_gan_weight=1.0)
    literal = shared.model_copy(update={"share_draws": False})
    nets = a_team(shared)
    batch = shared.prepare(nets, a_batch(1), ())

    def draws_of(method, count=8, each=512):
        rows = []
        for step in range(count):  # many draws for one image: what differs between the two is the draw alone
            real, x = (v.expand(each, -1, -1, -1) for v in (batch.real, batch.x))
            many = Batch(real, None, batch.z, None, Draws(1, step), made={"x": x})
            terms, _ = method.critic_loss(nets, many)
            rows.append(gradient(sum(terms.values()), nets["fake"]))
        return torch.stack(rows)

    a, b = draws_of(shared), draws_of(literal)
    spread = (a.std(0).square() / len(a) + b.std(0).square() / len(b)).sum().sqrt()
    difference = (a.mean(0) - b.mean(0)).norm()
    assert difference < 2 * spread  # Monte-Carlo error
    assert difference < 0.05 * a.mean(0).norm()


# Cost


def passes(method, teacher=None) -> tuple[Counter, Counter]:
    """Network passes of a step that trains the student and of one that does not: (role, mode, with a graph): count."""
    engine = toy.make_engine(method, teacher=teacher, data=toy.Mixture(), steps=2, batch=4)
    calls, out = Calls(engine.nets), []
    stream = engine.feed.batches(0, 4)
    for _ in range(2):
        calls.count.clear()
        engine.update(next(stream))
        out.append(Counter(calls.count))
    return out[0], out[1]


def test_network_passes_are_those_of_the_published_step():
    turn, critic = passes(DMD2(gan_weight=0.05, share_draws=False))
    assert critic == {
        ("student", "x0", False): 1,  # generate
        ("fake", "raw", True): 1,  # denoise the generated
        ("fake", "features", True): 2,  # classify real and generated
        ("disc", "head", True): 1,  # both at once
    }
    assert turn - critic == {
        ("student", "x0", True): 1,  # the same generation, with a graph
        ("teacher", "x0", False): 1,
        ("fake", "x0", False): 1,
        ("fake", "features", True): 1,  # classify the generated
        ("disc", "head", True): 1,
    }
    assert critic - turn == {("student", "x0", False): 1}


def test_shared_draws_save_one_encoder_pass_a_step():
    turn, critic = passes(DMD2(gan_weight=0.05))
    assert critic == {
        ("student", "x0", False): 1,
        ("fake", "raw+features", True): 1,  # denoise and classify the generated at once
        ("fake", "features", True): 1,
        ("disc", "head", True): 1,
    }
    assert turn["fake", "raw+features", True] == 1 and turn["fake", "features", True] == 2


def test_the_teachers_features_take_no_gradient_through_the_critic():
    method = DMD2(gan_weight=0.05, gan_features="teacher")
    turn, critic = passes(method, teacher=toy.denoiser(1))
    assert critic == {
        ("student", "x0", False): 1,
        ("fake", "raw", True): 1,  # the critic denoises alone
        ("teacher", "features", False): 2,  # of real and generated
        ("disc", "head", True): 1,
    }
    assert turn["teacher", "features", True] == 1 and turn["fake", "features", True] == 0
    nets = a_team(method, teacher=toy.denoiser(1))
    batch = method.prepare(nets, a_batch(), ("student",))
    (dx,) = torch.autograd.grad(method.student_loss(nets, batch)[0]["gan"], batch.x)
    assert dx.abs().sum() > 0  # through the teacher's encoder to the images


@pytest.mark.parametrize("role, guidance", [("critic", 1.0), ("teacher", 1.0), ("teacher", 2.0)])
def test_the_students_adversarial_term_may_share_the_matching_terms_pass(role, guidance):
    own = DMD2(gan_weight=0.05, gan_features=role, guidance=guidance)
    method = own.model_copy(update={"gan_draw": "match"})
    teacher, start = toy.denoiser(1, classes=4), toy.denoiser(2, classes=4)
    nets = a_team(method, teacher=teacher, student=start, fake=toy.denoiser(3, classes=4))
    draws = Draws(0, 0)
    cond = torch.arange(8) % 4
    real = toy.Mixture().sample(8)[0]
    batch = Batch(real, cond, draws.normal("z", real.shape), cond, draws, Labels(4, 4))
    batch = method.prepare(nets, batch, ("student",))
    calls = Calls(nets)
    terms, _ = method.student_loss(nets, batch)
    judge = "fake" if role == "critic" else "teacher"
    assert len(calls.of("fake")) == 1 and len(calls.of("teacher")) == (1 if guidance == 1 else 2)
    levels = {c.args[1].sigma.flatten()[0].item() for c in calls.seen if c.role != "disc"}
    assert len(levels) == 1 and calls.of("disc")  # one draw for all
    plain, _ = own.student_loss(nets, batch)
    assert torch.equal(plain["match"], terms["match"])
    (dx,) = torch.autograd.grad(terms["gan"], batch.x)
    assert dx.abs().sum() > 0 and all(p.grad is None for p in nets[judge].parameters())


def test_a_shared_draw_needs_a_matching_term_without_a_weight():
    for settings in ({"matching_weight": 0}, {"name": "f_distill"}):
        with pytest.raises(ValueError, match="gan_draw: match shares the pass"):
            METHODS[settings.pop("name", "dmd2")](gan_draw="match", **settings)


def test_without_a_gan_there_is_no_head_and_no_classification():
    method = DMD2(gan_weight=0)
    assert method.roles == ("fake", "student") and "disc" not in method.nets(toy.Make())
    turn, critic = passes(method)
    assert critic == {("student", "x0", False): 1, ("fake", "raw", True): 1}
    assert turn == {
        ("student", "x0", True): 1,
        ("teacher", "x0", False): 1,
        ("fake", "x0", False): 1,
        ("fake", "raw", True): 1,
    }


def test_a_weight_needs_no_pass_of_its_own():
    turn, critic = passes(FDistill(gan_weight=0.05))
    plain, _ = passes(DMD2(gan_weight=0.05))
    assert turn - plain == {("fake", "both", False): 1, ("disc", "head", False): 1}
    assert plain - turn == {("fake", "x0", False): 1}


def test_guidance_is_one_pass_of_twice_the_batch_and_the_teachers_alone():
    teacher = toy.denoiser(1, classes=4)
    nets = {"teacher": teacher, "start": toy.denoiser(2, classes=4), "data": toy.Mixture(labelled=True)}
    engine = toy.make_engine(DMD2(gan_weight=0, guidance=2.0), **nets, steps=1, batch=4)
    calls = Calls({"inside": teacher, "fake": engine.nets["fake"]})
    toy.finish(engine)
    (inside,) = calls.of("inside")
    assert len(inside.args[0]) == 8 and inside.args[2][4:].tolist() == [4] * 4
    assert all(len(c.args[0]) == 4 and (c.args[2] < 4).all() for c in calls.of("fake"))


# Variations


@pytest.mark.parametrize("gan_weight", [0.0, 0.05])
def test_f_distill_with_reverse_kl_is_dmd2_bit_for_bit(gan_weight):
    settings = {"gan_weight": gan_weight, "critic_updates_per_student_update": 2, "student_steps": 2}
    engines = [
        toy.make_engine(method, steps=6, report_every=1, save_every=6)
        for method in (DMD2(**settings), FDistill(divergence="reverse_kl", **settings))
    ]
    one, other = (toy.finish(engine) for engine in engines)
    assert one == other
    for role in engines[0].nets:
        assert toy.same(toy.weights(engines[0].nets[role]), toy.weights(engines[1].nets[role]))


# r = p_data / p_student, and h(r) = r^2 f''(r) of each f with f(1) = 0, constants apart
GENERATORS = {
    "softened_reverse_kl": lambda r: (r + 1) * torch.log((r + 1) / (2 * r)),
    "js": lambda r: r * torch.log(2 * r / (r + 1)) + torch.log(2 / (r + 1)),
    "hellinger": lambda r: (1 - r.sqrt()) ** 2,
    "kl": lambda r: r * r.log(),
    "jeffreys": lambda r: (r - 1) * r.log(),
    "neyman": lambda r: (1 - r) ** 2 / r,
}


@pytest.mark.parametrize("divergence", GENERATORS)
def test_the_weight_is_the_second_derivative_of_its_divergence(divergence):
    r = torch.linspace(0.1, 20, 50, dtype=torch.float64)
    second = torch.func.vmap(torch.func.grad(torch.func.grad(GENERATORS[divergence])))(r)
    ratio = r**2 * second / H[divergence](r)
    torch.testing.assert_close(ratio, ratio[:1].expand(50), rtol=1e-6, atol=0)


def test_the_js_weight_multiplies_each_samples_gradient():
    method = FDistill(divergence="js", gan_weight=0)
    nets = a_team(method)
    with torch.no_grad():
        nets["disc"].layers[-1].weight *= 1000  # so that some ratios reach the clamp
    batch = method.prepare(nets, a_batch(32), ("student",))
    calls = Calls(nets)
    means, own = method.measure(nets, batch)
    terms, _ = method.student_loss(nets, batch.make(**own, **{"mean/weight": means["weight"]}))
    (teacher,), (fake,), (disc,) = calls.of("teacher"), calls.of("fake"), calls.of("disc")
    r = disc.out.exp().clamp(0.1, 20)
    assert (r.min(), r.max()) == (torch.tensor(0.1), 20) and len(r.unique()) > 2
    h = r / (r + 1)
    plain = (fake.out - teacher.out) / (batch.x - teacher.out).abs().mean((1, 2, 3), keepdim=True)
    (dx,) = torch.autograd.grad(terms["match"], batch.x)
    expected = (h / h.mean()).view(-1, 1, 1, 1) * plain.detach() / batch.x.numel()
    torch.testing.assert_close(dx, expected, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("divergence", ["js", "kl"])
def test_f_distill_normalises_its_weight_over_the_global_batch(divergence):
    """However the batch is cut, the numbers are those of one batch; AdamW's floor of 1 keeps it smooth."""
    method = FDistill(divergence=divergence, gan_weight=0.05, critic_updates_per_student_update=2)
    train = {"steps": 6, "batch": 16, "report_every": 6, "save_every": 6, "optim": {"eps": 1.0}}
    one, four = toy.make_engine(method, **train), toy.make_engine(method, accumulate=4, **train)
    a, b = toy.finish(one)[-1], toy.finish(four)[-1]
    for role in ("student", "fake", "disc"):
        for p, q in zip(one.nets[role].parameters(), four.nets[role].parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=0, atol=1e-6)
    for name in ("student/match", "student/gan", "critic/denoise", "critic/gan"):
        assert b[name] == pytest.approx(a[name], rel=1e-4)


# Conditions


def test_labels_for_generation_are_uniform_and_drawn_apart_from_the_real_ones():
    mixture, seen = toy.Mixture(labelled=True), []
    train = {"steps": 40, "batch": 32, "report_every": 40, "save_every": 40}
    engine = toy.make_engine(DMD2(gan_weight=0.05), start=toy.denoiser(classes=4), teacher=mixture, **train)
    calls = Calls({"student": engine.nets["student"], "fake": engine.nets["fake"], "teacher": mixture})
    for _ in engine.run():
        pass
    generated = torch.cat([c.args[2] for c in calls.of("student")])
    assert ((generated.bincount(minlength=4) - 320.0) ** 2 / 320).sum() < 16.3
    real = torch.cat([c.args[2] for c in calls.of("fake", "features")][1::2])
    assert real.min() >= 0 and real.max() <= 3 and not torch.equal(real[:100], generated[:100])
    for made, judged in zip(calls.of("student")[::5], calls.of("teacher"), strict=False):
        assert torch.equal(made.args[2], judged.args[2])  # teacher and critic see the label it was generated for
        seen.append(made)
    assert len(seen) == 8


def test_denoising_drops_the_asked_share_of_labels():
    for share in (0.0, 0.25, 1.0):
        method, net = Denoising(drop_labels=share), toy.denoiser(classes=4)
        batch = a_batch(4000)
        batch = Batch(batch.real, torch.full((4000,), 2), batch.z, None, batch.draws, Labels(4, 4))
        calls = Calls({"net": net})
        method.loss({"student": net}, batch)
        cond = calls.of("net")[0].args[2]
        assert set(cond.unique().tolist()) <= {2, 4}
        assert abs((cond == 4).float().mean() - share) < 0.025


def test_a_generator_is_the_list_of_its_calls():
    student = toy.denoiser()
    for method, count in ((DMD2(), 1), (DMD2(student_steps=4), 4), (Regression(), 1)):
        calls = Calls({"student": student})
        with torch.no_grad():
            x = run_calls({"student": student}, method.calls(student), a_batch().z, None, Draws(0, 0))
        assert len(method.calls(student)) == len(calls.seen) == count and x.shape == (8, 2, 1, 1)
    assert Denoising(steps=6).calls(student) == () and Denoising(steps=6).heun_steps == 6


# Truth: what training arrives at


MIXTURE = toy.OVERLAPPING


def test_denoising_arrives_at_the_exact_denoiser(pretrained):
    start = toy.denoiser()
    x0, eps = MIXTURE.sample(2000, seed=5)[0], a_batch(2000).z
    for sigma in (0.3, 1.0, 5.0, 50.0):
        level = Level(torch.ones(2000, 1, 1, 1), torch.full((2000, 1, 1, 1), sigma))
        x_t = level.noise(x0, eps)
        with torch.no_grad():
            exact = MIXTURE(x_t, level)
            error, before = (((net(x_t, level) - exact) ** 2).mean() for net in (pretrained, start))
        assert error < 0.01 * x0.var() and error < before / 2, sigma


def test_regression_arrives_at_the_teachers_own_map():
    # one Gaussian: its probability-flow ODE is linear and the noise-to-image map known
    gaussian, steps = toy.Mixture(means=[[0.3, -0.2]], std=0.4), 40
    method, train = Regression(steps=steps, distance="mse"), {"steps": 200, "batch": 64, "save_every": 200}
    optim = {"lr": {"student": 3e-3}, "optim": {"decay_from": 0.3}}
    engine = toy.make_engine(method, teacher=gaussian, report_every=200, **optim, **train)
    toy.finish(engine)
    z = a_batch(500, seed=9).z
    mean = gaussian.means.detach().view(1, 2, 1, 1)
    exact = mean + 0.4 * (80 * z - mean) / (0.4**2 + 80**2) ** 0.5
    with torch.no_grad():
        assert (heun(gaussian, z, None, steps) - exact).abs().max() < 0.02
        student = run_calls({"student": engine.student}, method.calls(engine.student), z, None, Draws(0, 0))
    assert ((student - exact) ** 2).mean() < 0.02 * exact.var()


def energies(method, student) -> float:
    """Energy distance of a student's samples to the mixture; 0.0008 for the mixture's own samples."""
    with torch.no_grad():
        x = run_calls({"student": student}, method.calls(student), a_batch(2000, seed=4).z, None, Draws(0, 0))
    return toy.energy(x, MIXTURE.sample(2000, seed=77)[0])


@pytest.mark.parametrize(
    "method, factor",
    [
        (DMD2(gan_weight=0.05, critic_updates_per_student_update=2), 25),
        (FDistill(gan_weight=0.05, critic_updates_per_student_update=2, divergence="js"), 25),
        (DMD2(gan_weight=0, critic_updates_per_student_update=2, student_steps=2), 6),
    ],
    ids=["dmd2", "f_distill", "two-steps"],
)
def test_distillation_of_the_exact_teacher_brings_the_student_to_the_data(method, factor, pretrained):
    train = {"steps": 500, "batch": 96, "report_every": 500, "save_every": 500, "average_decay": 0.95}
    optim = {"lr": {"student": 1e-3, "fake": 4e-3}, "optim": {"betas": (0.0, 0.99)}}
    engine = toy.make_engine(method, teacher=MIXTURE, start=pretrained, **optim, **train)
    toy.finish(engine)
    before, after = energies(method, pretrained), energies(method, engine.student)
    assert after < before / factor, (before, after)
