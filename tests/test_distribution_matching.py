"""The relatives of DMD2, each by the proof that its paper or the algebra offers, on the toy."""

from __future__ import annotations

import json
import math
import shutil
from copy import deepcopy
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch
import toy
from diffusers.utils import dynamic_modules_utils
from job import job as command
from test_every_method import in_this_process, student
from test_methods import Calls, a_batch, a_team, gradient
from torch.nn import functional as F

from fewstep.build import check_data, make_nets
from fewstep.config import resolve
from fewstep.data.feed import open_feed
from fewstep.data.noise import noise
from fewstep.data.shards import open_shards
from fewstep.diffusion.draws import Draws
from fewstep.diffusion.frequency import edges, high_energy, high_pass
from fewstep.diffusion.level import Level
from fewstep.diffusion.losses import clamped, preference
from fewstep.diffusion.perceptual import feature_distance
from fewstep.diffusion.samplers import run_calls, to_uint8
from fewstep.diffusion.schedules import DDPM, EDM, Flow
from fewstep.diffusion.subinterval import Kernel, level_at
from fewstep.folders import claim, cleaned_name
from fewstep.methods import METHODS, Batch
from fewstep.methods.f_distill import H
from fewstep.metrics.features import ClassReward, FeatureMaps, open_features
from fewstep.networks import export as exporting
from fewstep.networks.average import between
from fewstep.networks.card import Card
from fewstep.networks.conditions import Labels
from fewstep.networks.lora import Lora, fingerprint
from fewstep.networks.passes import Passes
from fewstep.networks.pretrained import open_teacher
from fewstep.recipe import open_recipe
from fewstep.students import open_sampler

DMD2, SwiftBrush = METHODS["dmd2"], METHODS["swiftbrush"]
RECIPES = Path(__file__).resolve().parents[1] / "jobs" / "recipes"
SMALL = {
    "sample_size": 14, "in_channels": 4, "out_channels": 4, "layers_per_block": 1, "block_out_channels": [16, 32],
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D"], "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
    "attention_head_dim": 16, "norm_num_groups": 8,
}  # fmt: skip


def a_labelled_batch(count: int = 8, step: int = 0) -> Batch:
    draws = Draws(0, step)
    real, labels = toy.Mixture(labelled=True).sample(count, seed=step)
    return Batch(real, labels, draws.normal("z", real.shape), labels.flip(0), draws, Labels(4, 4))


def a_labelled_team(method, **nets) -> dict:
    team = method.nets(toy.Make(toy.denoiser(0, classes=4), toy.denoiser(1, classes=4)))
    return team | {"fake": toy.denoiser(2, classes=4)} | nets


def affine(teacher: toy.Mixture, gradient, steps: int = 150) -> tuple[float, float]:
    """Mean and scale that a student x = m + s z arrives at, from -1 and 1, by a gradient on x at six levels.

    gradient: (x, x_t, level, the student's exact x0 at x_t, log of its density there) -> (B, 1, 1, 1).
    """
    sigmas = torch.linspace(0.3, 1.5, 6).repeat_interleave(60)
    level = Level(torch.ones(360, 1, 1, 1), sigmas.view(-1, 1, 1, 1))
    m, log_s = torch.tensor(-1.0, requires_grad=True), torch.tensor(0.0, requires_grad=True)
    optim = torch.optim.Adam([m, log_s], lr=0.08)
    for step in range(steps):
        draws = Draws(0, step)
        x = m + log_s.exp() * draws.normal("z", (360, 1, 1, 1))
        with torch.no_grad():
            x_t = level.noise(x, draws.normal("eps", x.shape))
            var = log_s.exp() ** 2 + level.sigma**2
            own_x0 = x_t - level.sigma**2 * (x_t - m) / var
            log_q = -0.5 * ((x_t - m) ** 2 / var + (2 * torch.pi * var).log()).flatten()
            g = gradient(x, x_t, level, own_x0, log_q)
        optim.zero_grad()
        (g * x).mean().backward()
        optim.step()
    return m.item(), log_s.exp().item()


# f-distill


def test_mode_seeking_divergences_lock_on_one_mode_and_the_others_cover_both():
    """Against 0.7 N(-3, 0.5^2) + 0.3 N(3, 0.5^2), with the exact ratio of the densities."""
    teacher = toy.Mixture([[-3.0]] * 7 + [[3.0]] * 3, 0.5)

    def weighted(name, x, x_t, level, own_x0, log_q):
        r = (teacher.log_density(x_t, level) - log_q).exp().clamp(1e-3, 1e3).float()
        h = H[name](r).view_as(x) if name in H else 1.0
        return h * (own_x0 - teacher(x_t, level)) / level.sigma**2

    m, s = affine(teacher, partial(weighted, "reverse_kl"))
    assert m == pytest.approx(-3, abs=0.15) and s < 0.7
    for name in ("js", "kl"):
        assert affine(teacher, partial(weighted, name)) == pytest.approx((-1.2, 2.79), abs=0.3)  # moments of both


def test_bins_of_noise_levels_follow_the_ratio_in_them_and_divide_it():
    method = METHODS["f_distill"](gan_weight=0.05, bins=4, bin_decay=0.5)
    nets = method.nets(toy.Make())
    disc, batch = nets["disc"], method.prepare(nets, a_batch(64), ())
    means, own = method.measure(nets, batch)
    made = batch.make(**own, **{f"mean/{name}": value for name, value in means.items()})
    method.matching(nets, made)
    before = disc.bin_means.clone()
    method.after(nets, method.phases()[1], 0)
    assert torch.equal(disc.bin_means, before) and (before == 1).all()  # the critic's update changes none
    method.after(nets, method.phases()[0], 0)
    here = method.bin(own["angle"])
    r = disc_ratio = own["weight"] / (1 - own["weight"])  # h = r / (1 + r), and the bins were 1
    expected = torch.stack(
        [0.5 + 0.5 * disc_ratio[here[:, k] > 0].mean() if here[:, k].any() else before[k] for k in range(4)]
    )
    torch.testing.assert_close(disc.bin_means, expected)
    again, _ = method.measure(nets, batch)
    divided = r / (here @ disc.bin_means)
    torch.testing.assert_close(again["weight"], (divided / (1 + divided)).mean())


# Decoupled DMD and DP-DMD


def test_the_guidance_term_is_taken_at_its_own_levels():
    method = METHODS["decoupled_dmd"](gan_weight=0, guidance=3.0, guidance_range=(900, 980))
    nets, batch = a_labelled_team(method), a_labelled_batch()
    batch = method.prepare(nets, batch, ())
    calls = Calls(nets)
    x_t, level = method.match_noise(nets, batch, batch.x)
    real, fake = method.scores(nets, batch, x_t, level)
    pair, alone = calls.of("teacher")
    cond, uncond = pair.out.chunk(2)
    assert torch.equal(real, alone.out + 2.0 * (cond - uncond)) and torch.equal(alone.args[0], x_t)
    assert pair.args[1].sigma.min() >= EDM().ramp(torch.tensor(900 / 999)) and (pair.args[2][8:] == 4).all()
    assert torch.equal(fake, calls.of("fake")[0].out)


def test_the_first_call_learns_the_teachers_step_and_matching_trains_the_others():
    method = METHODS["dp_dmd"](student_steps=3, anchor_steps=1)
    teacher = toy.denoiser(3)
    nets = a_team(method, teacher=teacher, student=teacher)
    with torch.no_grad():
        assert method.extra(nets, a_batch(), {})["anchor"] < 1e-10  # one step of the teacher is its own first call
    nets = a_team(method, teacher=teacher)
    for step in range(6):
        calls = Calls(nets)
        method.prepare(nets, a_batch(4, step), ("student",))
        graphs = [call.out.requires_grad for call in calls.of("student")]
        assert len(graphs) in (2, 3) and graphs == [False] * (len(graphs) - 1) + [True]
    assert METHODS["dp_dmd"]().calls(nets["student"])[0].then == "step"


def test_the_first_calls_target_leads_to_where_the_teachers_steps_lead():
    method, teacher, batch = METHODS["dp_dmd"](student_steps=3, anchor_steps=8), toy.denoiser(3), a_batch(4)
    nets = a_team(method, teacher=teacher)
    first, second = (call.level(batch.z) for call in method.calls(nets["student"])[:2])
    x, _, x0 = method.anchor(nets, batch)
    ramp = EDM().ramp(torch.linspace(999, 666, 9).double() / 999)
    y = x
    with torch.no_grad():
        for t, to in zip(ramp, ramp[1:], strict=False):
            at = EDM().level(t.expand(4), 4)
            y = y + (to - t).float() * at.eps(y, teacher(y, at))
    torch.testing.assert_close(first.step(x, x0, second), y, rtol=1e-3, atol=1e-3)


# SwiftBrush and SNOOPI


def test_a_critic_that_is_a_new_adapter_of_the_teacher_gives_no_first_step():
    teacher = toy.denoiser(1, classes=4)
    for tag in ("swiftbrush", "snoopi"):
        method = METHODS[tag]()
        nets = a_labelled_team(method, teacher=teacher, fake=Lora(teacher, rank=4, targets="all"))
        batch = method.prepare(nets, a_labelled_batch(), ("student",))
        terms, health = method.student_loss(nets, batch)
        assert terms["match"] == 0 and health["match_gradient"] == 0
        assert (gradient(terms["match"], nets["student"]) == 0).all()


def test_the_gradient_is_sigma_squared_times_the_difference_in_noise_for_any_scale_of_the_level():
    x, real, fake = torch.randn(3, 5, 2, 1, 1)
    angle = torch.linspace(0.2, 1.4, 5).view(-1, 1, 1, 1)
    level, eps = Level(angle.cos(), angle.sin()), torch.randn(5, 2, 1, 1)
    x_t = level.noise(x, eps)
    expected = level.sigma**2 * (level.eps(x_t, real) - level.eps(x_t, fake))
    stretched = Level(3 * level.alpha, 3 * level.sigma)
    for at in (level, stretched):
        torch.testing.assert_close(SwiftBrush().direction(x, real, fake, at)[0], expected, rtol=1e-4, atol=1e-5)


def test_the_critic_learns_the_noise_and_a_tenth_of_it_without_condition():
    method = SwiftBrush(drop_condition=0.1)
    nets, batch = a_labelled_team(method), a_labelled_batch(4000)
    batch = method.prepare(nets, batch, ())
    calls = Calls(nets)
    terms, _ = method.critic_loss(nets, batch)
    (call,) = calls.of("fake")
    assert abs((call.args[2] == 4).float().mean() - 0.1) < 0.02
    x_t, level = call.args[:2]
    alpha = level.alpha / level.norm
    error = alpha * (level.eps(x_t, call.out) - level.eps(x_t, batch.x))
    torch.testing.assert_close(terms["denoise"], error.square().mean(), rtol=2e-2, atol=1e-5)


def test_without_a_critic_the_student_collapses():
    """SDS puts the sample itself in the critic's place; its one minimum is a point, that of VSD the distribution."""
    teacher, method = toy.Mixture([[1.0]], 0.5), SwiftBrush()
    direction = lambda fake, x, x_t, level: method.direction(x, teacher(x_t, level), fake, level)[0]
    vsd = affine(teacher, lambda x, x_t, level, own_x0, log_q: direction(own_x0, x, x_t, level))
    sds = affine(teacher, lambda x, x_t, level, own_x0, log_q: direction(x, x, x_t, level))
    assert vsd == pytest.approx((1.0, 0.5), abs=0.05)
    assert sds[0] == pytest.approx(1.0, abs=0.05) and sds[1] < 0.15


def test_scales_are_drawn_a_sample_and_shared_and_widen_both_scores():
    method = METHODS["snoopi"](guidance=2.25, guidance_spread=1.75)
    nets, batch = a_labelled_team(method), a_labelled_batch(256)
    scale = method.scale(batch)
    assert scale.shape == (256,) and 0.5 <= scale.min() < 0.6 and 3.9 < scale.max() <= 4.0
    batch = method.prepare(nets, batch, ())
    x_t, level = method.match_noise(nets, batch, batch.x)
    calls = Calls(nets)
    for score, role in zip(method.scores(nets, batch, x_t, level), ("teacher", "fake"), strict=True):
        cond, uncond = calls.of(role)[0].out.chunk(2)
        torch.testing.assert_close(score, uncond + scale.view(-1, 1, 1, 1) * (cond - uncond))
    fixed = method.model_copy(update={"guidance_spread": 0.0})
    wide, narrow = ((score - cond).std() for score in (m.scores(nets, batch, x_t, level)[0] for m in (method, fixed)))
    assert wide > narrow


def test_the_clamped_loss_leaves_what_is_good_enough_alone():
    score = torch.tensor([-1.0, 0.2, 0.5], requires_grad=True)
    clamped(score, 0.35).backward()
    assert score.grad.tolist() == pytest.approx([-1 / 3, -1 / 3, 0.0])
    method = SwiftBrush(alignment_weight=0.5, alignment_clamp=-0.1)
    nets, batch = a_labelled_team(method), a_labelled_batch()
    batch = method.prepare(nets, batch, ())
    loss = method.extra(nets, batch, {})["alignment"]
    torch.testing.assert_close(loss, 0.5 * F.relu(-0.1 - nets["reward"](batch.x, batch.cond)).mean())


# DMD


def test_the_regression_replays_the_pairs_noise_through_the_student():
    method = METHODS["dmd"](distance="pixels", regression_weight=0.5)
    nets, batch = a_labelled_team(method), a_labelled_batch()
    noise = torch.randn(8, 2, 1, 1)
    batch = method.prepare(nets, replace(batch, rows={"noise": noise}), ("student",))
    calls = Calls({"student": nets["student"]})
    loss = method.extra(nets, batch, {})["pair"]
    (call,) = calls.of("student")
    assert torch.equal(call.args[0], 80 * noise) and torch.equal(call.args[2], batch.real_cond)
    torch.testing.assert_close(loss, 0.5 * F.mse_loss(call.out, batch.real))


def test_the_feature_distance_is_of_directions():
    a, b = (torch.randn(4, 6, 3, 3) for _ in range(2))
    assert feature_distance((a,), (a * 3,)) < 1e-12
    cosine = (a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1))
    torch.testing.assert_close(feature_distance((a,), (b,)), (2 - 2 * cosine).mean())


def test_pairs_are_written_and_replayed_by_their_numbers(tmp_path):
    """The images that training reads are the teacher's samples of the noise that it reads beside them."""
    teacher, plain = "shipped:fashion_mnist/teacher", open_shards("shipped:fashion_mnist/shards", "size")
    command("pairs")([f"teacher={teacher}", f"out={tmp_path / 'pairs'}", "pairs=12", "steps=5", "batch=5", "seed=3"])
    sampler = open_sampler(teacher, 5)
    for memory in (1 << 20, 0):  # in memory, and streamed
        with open_feed(tmp_path / "pairs", memory_bytes=memory) as feed:
            rows = next(feed.batches(0, 12))
        with torch.no_grad():
            x0 = sampler.sample(rows["noise"], rows["label"], Draws(0, 0))
        assert (to_uint8(x0).int() - to_uint8(rows["real"]).int()).abs().max() <= 1  # another batch rounds otherwise
    assert rows["label"].bincount().tolist() == [2, 2] + 8 * [1]
    z = noise(np.arange(4000), (1, 28, 28))
    assert abs(z.mean()) < 2e-3 and abs(z.std() - 1) < 2e-3 and abs((z[:, :, 0] * z[:, :, 14]).mean()) < 1e-2
    assert torch.equal(noise(np.array([7]), (2, 3)), noise(np.array([3, 7]), (2, 3))[1:])
    with pytest.raises(ValueError, match="data.flip: a mirrored image is not what the teacher makes"):
        open_feed(tmp_path / "pairs", flip=True)
    with pytest.raises(ValueError, match="the rows have no noise, .*python jobs/pairs.py"):
        check_data(plain, open_teacher(teacher, weights=False), ("real", "noise"))


def test_a_files_network_rewards_a_class_and_compares_images():
    file = open_features(resolve("shipped:fashion_mnist/features.safetensors"))
    with open_feed("shipped:fashion_mnist/shards") as feed:
        rows = next(feed.batches(0, 64))
    right, wrong = (ClassReward(file)(rows["real"], (rows["label"] + k) % 10) for k in (0, 1))
    assert (right > -0.7).float().mean() > 0.8 and (right - wrong).mean() > 2
    maps = FeatureMaps(file)(rows["real"])
    assert [m.shape[1:] for m in maps] == [(32, 28, 28), (64, 14, 14), (128, 7, 7)]


# Phased DMD


LEVELS = {
    "edm": (EDM(), [0.3, 2.0]),
    "flow": (Flow(), [0.4, 0.8]),
    "ddpm": (DDPM("scaled_linear", 0.00085, 0.012), [300.0, 800.0]),
}


@pytest.mark.parametrize("name", LEVELS)
def test_the_subintervals_targets_have_the_clean_datas_means(name):
    """By quadrature over four points: E[target | x_t] of the kernel from s is E[x0 | x_t] and E[eps | x_t]."""
    schedule, times = LEVELS[name]
    s, t = (schedule.level(torch.tensor([time]), 1) for time in times)
    s, t = (Level(level.alpha.double(), level.sigma.double()) for level in (s, t))
    points = torch.tensor([-1.0, 0.0, 1.0, 2.0], dtype=torch.float64)
    grid = torch.linspace(-40, 40, 40001, dtype=torch.float64)  # of x_s
    density = sum(torch.exp(-0.5 * ((grid - s.alpha * p) / s.sigma) ** 2) for p in points)
    kernel, bias = Kernel(s, t), []
    for x_t in (-0.7, 0.4, 1.3):
        eps = (x_t - kernel.alpha * grid) / kernel.sigma
        weight = density * torch.exp(-0.5 * eps**2)
        x0, noise_target = kernel.targets(grid, eps)
        result = [(weight * target).sum() / weight.sum() for target in (x0, noise_target)]
        likely = torch.exp(-0.5 * ((x_t - t.alpha * points) / t.sigma) ** 2)
        mean = (likely * points).sum() / likely.sum()
        torch.testing.assert_close(torch.stack(result), torch.cat([mean[None], (x_t - t.alpha * mean) / t.sigma]))
        bias.append(abs((weight * grid / s.alpha).sum() / weight.sum() - mean))
    assert max(bias) > 0.01  # of x_s taken for clean


def test_a_kernel_from_clean_data_is_the_forward_process():
    level = EDM().level(torch.tensor([0.5, 3.0, 40.0]), 4)
    clean = Level(torch.ones(3, 1, 1, 1), torch.zeros(3, 1, 1, 1))
    x, eps = torch.randn(2, 3, 2, 1, 1)
    kernel = Kernel(clean, level)
    assert torch.equal(kernel.noise(x, eps), level.noise(x, eps))
    assert (kernel.weight(toy.denoiser().target) == 1).all()
    assert all(torch.equal(a, b) for a, b in zip(kernel.targets(x, eps), (x, eps), strict=True))


@pytest.mark.parametrize("name", LEVELS)
def test_the_targets_noise_is_independent_of_what_a_network_sees(name):
    """Target = x0 + n: n has the known spread, and no covariance with x0 or x_t."""
    schedule, times = LEVELS[name]
    s, t = (schedule.level(torch.full((20_000,), time).double(), 2) for time in times)
    x0, e, eps = torch.randn(3, 20_000, 1, generator=torch.Generator().manual_seed(0))
    kernel, x_s = Kernel(s, t), s.noise(x0, e)
    n, x_t = kernel.targets(x_s, eps)[0] - x0, kernel.noise(x_s, eps)
    torch.testing.assert_close(n.std(), kernel.spread[0, 0], rtol=0.02, atol=0)
    correlations = torch.corrcoef(torch.cat([n, x0, x_t], 1).T)[0, 1:]
    assert correlations.abs().max() < 0.025


def test_the_critics_weighted_targets_have_unit_variance_at_every_level_under_edm():
    """Data N(0, data_std^2): EDM's best output is 0 everywhere, and its loss is the variance of the target alone."""
    net, d = toy.denoiser(), toy.DATA_STD
    x0, e, eps = torch.randn(3, 40_000, 1, generator=torch.Generator().manual_seed(1))
    for s_sigma, t_sigma in ((2.5, 2.6), (2.5, 10.0), (2.5, 80.0), (0.3, 0.5), (20.0, 80.0)):
        s, t = (EDM().level(torch.full((40_000,), sigma).double(), 2) for sigma in (s_sigma, t_sigma))
        kernel = Kernel(s, t)
        targets = kernel.targets(s.noise(d * x0, e), eps)
        loss = kernel.weight(net.target) * net.target(t, *targets).square()
        assert loss.mean().item() == pytest.approx(1, abs=0.03), (s_sigma, t_sigma)
    near, nearer = (Kernel(s, EDM().level(torch.tensor([20.0 + h]).double(), 2)) for h in (0.2, 0.02))
    one = lambda kernel: kernel.weight(net.target)[0, 0] / kernel.sigma[0, 0] ** 2
    assert one(near) == pytest.approx(one(nearer).item(), rel=0.02)  # it falls as sigma^2


def test_a_phase_ends_at_its_boundary_and_its_experts_are_called_in_turn():
    Phased = METHODS["phased_dmd"]
    method = Phased(boundaries=(666, 333), phase_steps=2, earlier=("a", "b"))
    net = toy.denoiser()
    assert method.indices() == [999, 832, 666, 500, 333, 166] and method.end == 0
    assert [call.role for call in method.calls(net)] == 2 * ["expert1"] + 2 * ["expert2"] + 2 * ["student"]
    method = Phased(boundaries=(666, 333), phase_steps=2, earlier=("a",))
    assert method.indices() == [999, 832, 666, 500] and method.end == 333
    nets = a_team(method)
    for step in range(4):
        batch = a_batch(4, step)
        calls = Calls({"student": nets["student"]})
        made = method.prepare(nets, batch, ("student",))
        x_t, level = calls.of("student")[-1].args[:2]
        sigma = EDM().ramp(torch.tensor(333 / 999)).float()
        expected = made.x + sigma * level.eps(x_t, made.x)
        torch.testing.assert_close(made.made["x_s"], expected, rtol=1e-4, atol=1e-4)
        kernel, _ = method.kernel(nets, made, "match", *method.match_range)
        torch.testing.assert_close(kernel.s.sigma, sigma.expand(4, 1, 1, 1))
        assert (kernel.t.sigma > sigma).all()
        terms, _ = method.student_loss(nets, made)
        assert made.made["x_s"].requires_grad and gradient(terms["match"], nets["student"]).abs().sum() > 0
    with pytest.raises(ValueError, match="earlier: 3 runs, but the last of 3 phases has 2 before it"):
        Phased(boundaries=(666, 333), earlier=("a", "b", "c"))


def test_interleaved_phases_take_turns_and_leave_the_others_experts_alone():
    method = METHODS["phased_dmd"](boundaries=(666, 333), interleaved=True, critic_updates_per_student_update=2)
    assert [(phase.name, phase.trains[0]) for phase in method.phases()] == [
        ("student1", "expert1"), ("critic1", "fake1"), ("student2", "expert2"), ("critic2", "fake2"),
        ("student", "student"), ("critic", "fake"),
    ]  # fmt: skip
    engine = toy.make_engine(method, data=toy.Mixture(), steps=12, batch=4)
    feed, moved = engine.feed.batches(0, 4), []
    for _ in range(12):
        before = {role: toy.weights(net) for role, net in engine.nets.items()}
        engine.update(next(feed))
        moved.append({role for role, net in engine.nets.items() if not toy.same(before[role], toy.weights(net))})
    turns = [{"expert1", "fake1"}, {"expert2", "fake2"}, {"student", "fake", "average"}]
    assert moved[:3] == turns and moved[3:6] == [{"fake1"}, {"fake2"}, {"fake"}]
    assert moved[6:9] == turns and moved[9:] == moved[3:6]
    with pytest.raises(ValueError, match="earlier: an interleaved run trains the experts of all phases"):
        METHODS["phased_dmd"](interleaved=True, earlier=("a",))


def test_an_interleaved_phase_is_that_phases_own_run():
    """Losses of phase 2 of 3, bit for bit, with the same networks."""
    both = {"boundaries": (666, 333), "phase_steps": 2}
    turns, alone = METHODS["phased_dmd"](**both, interleaved=True), METHODS["phased_dmd"](**both, earlier=("a",))
    nets = a_team(turns)
    own = {"expert1": nets["expert1"], "student": nets["expert2"], "fake": nets["fake2"], "teacher": nets["teacher"]}
    batch = a_batch(8, step=7)  # the turn of phase 7 modulo 3
    ours, theirs = turns.prepare(nets, batch, ()), alone.prepare(own, batch, ())
    assert turns.end == 0 and torch.equal(ours.made["x_s"], theirs.made["x_s"])
    for update, loss in zip(turns.phases()[2:4], (alone.student_loss, alone.critic_loss), strict=True):
        assert update.loss(nets, ours)[0].keys() == loss(own, theirs)[0].keys()
        assert all(torch.equal(a, loss(own, theirs)[0][key]) for key, a in update.loss(nets, ours)[0].items())


def phase_one(boundary: int, steps: int, biased: bool, monkeypatch) -> float:
    """Energy distance of the first expert's samples to the true marginal at its end, after training on the toy."""
    if biased:
        clean = lambda kernel, x_s, eps: (x_s / kernel.s.alpha, kernel.sigma / kernel.t.sigma * eps)
        monkeypatch.setattr(Kernel, "targets", clean)  # x_s taken for a clean sample
    method, teacher = METHODS["phased_dmd"](boundaries=(boundary,), critic_updates_per_student_update=3), toy.Mixture()
    rates, often = {"student": 1e-3, "fake": 2e-3}, dict.fromkeys(("steps", "report_every", "save_every"), 3 * steps)
    engine = toy.make_engine(method, teacher=teacher, lr=rates, batch=256, average_decay=0.9, **often)
    toy.finish(engine)
    z = torch.randn(1500, 2, 1, 1, generator=torch.Generator().manual_seed(5))
    (call,) = method.calls(engine.student)
    with torch.no_grad():
        level = call.level(z)
        end = level_at(EDM(), boundary, z)
        x_s = level.step(z * level.start, engine.student(z * level.start, level), end)
    truth, _ = teacher.sample(1500, seed=9)
    noise = torch.randn(truth.shape, generator=torch.Generator().manual_seed(6))
    return toy.energy(x_s, end.noise(truth, noise))


def test_a_target_that_takes_intermediate_samples_for_clean_ones_does_not_reach_the_marginal(monkeypatch):
    """0.058 before training; two samples of the truth are 0.003 apart (three seeds: 0.009 to 0.022, and 0.054)."""
    assert phase_one(360, 120, False, monkeypatch) < 0.03
    assert phase_one(360, 120, True, monkeypatch) > 0.045


def test_an_earlier_phases_expert_has_the_same_fingerprint_after_the_next_phase(tmp_path):
    method, teacher = METHODS["phased_dmd"](earlier=("a",)), toy.denoiser(3)
    engine = toy.make_engine(method, teacher=teacher, data=toy.Mixture(), folder=tmp_path)
    before = {role: fingerprint(engine.nets[role]) for role in ("expert1", "student")}
    toy.finish(engine)
    after = {role: fingerprint(engine.nets[role]) for role in before}
    assert before["expert1"] == after["expert1"] == fingerprint(toy.Make(teacher=teacher).run("a"))
    assert before["student"] != after["student"]


def test_experts_are_exported_in_folders_of_their_own_and_opened_again(tmp_path, monkeypatch):
    monkeypatch.setattr(exporting, "_in_fresh_process", in_this_process)
    monkeypatch.setattr(dynamic_modules_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    method = METHODS["phased_dmd"](earlier=("a",))
    nets = {"student": student(1), "expert1": student(2)}
    calls = method.calls(nets["student"])
    exporting.export(nets["student"], tmp_path / "out", calls=calls, card=Card(name="x"), others=nets)
    assert {path.parent.name for path in tmp_path.glob("out/*/config.json")} == {"unet", "unet_2"}
    again, z = open_sampler(str(tmp_path / "out")), torch.randn(3, 1, 16, 16)
    cond = torch.tensor([0, 3, 9])
    with torch.no_grad():
        ours = run_calls(nets, calls, z, cond, Draws(0, 0))
        torch.testing.assert_close(again.sample(z, cond, Draws(0, 0)), ours, rtol=1e-4, atol=1e-4)
    alone = student(1)
    with torch.no_grad():
        wrong = run_calls({"student": alone, "expert1": alone}, calls, z, cond, Draws(0, 0))
    assert not torch.allclose(wrong, ours, atol=1e-2)


# DisBack


def test_nodes_are_the_targets_in_turn_and_the_critic_starts_as_the_first():
    method = METHODS["disback"](gan_weight=0, nodes=("a", "bc", "def"), node_steps=10)
    make = toy.Make(toy.denoiser(0), toy.denoiser(1))
    nets = method.nets(make)
    assert toy.same(toy.weights(nets["fake"]), toy.weights(make.run("a")))
    assert toy.same(toy.weights(nets["node2"]), toy.weights(make.run("def")))
    assert [method.target(step) for step in (0, 9, 10, 19, 20, 500)] == 2 * ["node1"] + 2 * ["node2"] + 2 * ["teacher"]
    for step, role in ((3, "node1"), (15, "node2"), (40, "teacher")):
        batch = method.prepare(nets, a_batch(4, step), ())
        calls = Calls(nets)
        method.matching(nets, batch)
        assert {call.role for call in calls.seen} == {role, "fake"}


def test_the_recorded_network_learns_the_untrained_students_samples():
    """Its loss on them falls from node to node."""
    method, teacher = METHODS["disback_record"](), toy.denoiser(3)
    train = {"steps": 60, "batch": 64, "report_every": 20, "save_every": 20, "average_decay": None}
    rates = {"student": 3e-3}
    engine = toy.make_engine(method, teacher=teacher, start=teacher, data=toy.Mixture(), lr=rates, **train)
    first, *_, last = (report["record/denoise"] for report in toy.finish(engine))
    assert last < 0.8 * first


# Flash-DMD


def test_matching_trains_the_calls_at_high_noise_and_the_gan_the_last():
    method = METHODS["flash_dmd"](gan_weight=0.5, student_steps=3)
    nets = a_team(method, teacher=toy.denoiser(3))
    levels = {call.level(torch.zeros(1, 2, 1, 1)).sigma.item() for call in method.calls(nets["student"])}
    last = min(levels)
    for step in range(6):
        calls = Calls({"student": nets["student"]})
        batch = method.prepare(nets, a_batch(4, step), ("student",))
        graphs = [(call.args[1].sigma[0].item() == last, call.out.requires_grad) for call in calls.of("student")]
        assert graphs[-1] == (True, True) and sum(graph for _, graph in graphs) == 2
        assert not calls.of("student")[-1].args[0].requires_grad  # nothing flows through the simulation
        (dx,) = torch.autograd.grad(method.student_loss(nets, batch)[0]["match"], batch.x, retain_graph=True)
        assert dx.abs().sum() > 0
        unused = torch.autograd.grad(
            method.student_loss(nets, batch)[0]["match"], batch.made["low"], allow_unused=True, retain_graph=True
        )
        assert unused == (None,)
        gan = method.extra(nets, batch, {})["gan"]
        assert torch.autograd.grad(gan, batch.x, allow_unused=True, retain_graph=True) == (None,)
        torch.testing.assert_close(gan, -0.5 * method.verdict(nets, batch.made["low"], None).mean())


def test_the_critic_is_drawn_to_the_student_after_its_update_alone():
    method = METHODS["flash_dmd"](coupling=0.9)
    nets = a_team(method)
    student, fake = toy.weights(nets["student"]), toy.weights(nets["fake"])
    with torch.no_grad():
        method.after(nets, method.phases()[1], 0)
        assert toy.same(fake, toy.weights(nets["fake"]))
        method.after(nets, method.phases()[0], 0)
    for key, value in toy.weights(nets["fake"]).items():
        torch.testing.assert_close(value, 0.9 * fake[key] + 0.1 * student[key])


def test_rewards_move_the_student_towards_what_is_rewarded():
    """The preference is log 2 where the student is the reference; its gradient points to the better candidate."""
    method = METHODS["flash_dmd"](reward_updates=5, reference="a", student_steps=2, reward_beta=5.0)
    nets = a_labelled_team(method)
    nets["reference"] = nets["student"]
    terms, _ = method.reward_loss(nets, a_labelled_batch(64))
    assert terms["preference"].item() == pytest.approx(math.log(2), abs=1e-6)
    assert [phase.name for phase in method.phases()] == ["student", "reward", "critic"]
    assert [phase.every for phase in method.phases()] == [6, 1, 1]
    better, worse = torch.tensor([0.3, -0.2]), torch.tensor([0.1, 0.4])
    expected = -torch.log(torch.sigmoid(5.0 * (better - worse))).mean()
    torch.testing.assert_close(preference(better, worse, 5.0), expected)


class RewardAlone(METHODS["flash_dmd"]):
    """The rewarded updates without distillation.

    Made for the curves (Chen et al. 2025, arXiv:2511.20549).
    """

    name: Literal["test_reward_alone"] = "test_reward_alone"

    def phases(self):
        _, reward, _ = super().phases()
        return (replace(reward, every=1, unless=None),)


def rewarded(kind, start: dict, steps: int) -> list[tuple[float, float]]:
    """(reward, diversity) before and along a run from trained networks: the mean reward of samples, and their standard
    deviation about their class's mean as a share of the data's."""
    data = toy.Mixture(std=0.3, labelled=True)
    method = kind(reward_updates=5, reference="a", student_steps=4, reward_beta=0.02, gan_weight=0)
    rates, often = {"student": 5e-4, "fake": 2e-3}, {"steps": steps, "report_every": steps // 4, "save_every": steps}
    engine = toy.make_engine(
        method, teacher=data, start=toy.denoiser(classes=4), batch=256, lr=rates, average_decay=None, **often
    )
    for role, weights in start.items():
        engine.nets[role].load_state_dict(weights)
    engine.nets["reference"] = deepcopy(engine.nets["student"])

    def look() -> tuple[float, float]:
        labels = torch.arange(2000) % 4
        z = torch.randn(2000, 2, 1, 1, generator=torch.Generator().manual_seed(4))
        with torch.no_grad():
            x = run_calls(engine.sampling, method.calls(engine.student), z, labels, Draws(0, 0))
        spread = torch.stack([x[labels == k].flatten(1).std(0) for k in range(4)]).mean() / 0.3
        return toy.Reward()(x, labels).mean().item(), spread.item()

    return [look()] + [look() for _ in engine.run()]


@pytest.mark.slow
def test_reward_alone_buys_reward_with_diversity_and_with_distillation_it_does_not():
    """The reward's best sample is its class's mean. Curves of (reward, diversity) stand in fashion_mnist_flash_dmd."""
    data = toy.Mixture(std=0.3, labelled=True)
    method = METHODS["flash_dmd"](student_steps=4, gan_weight=0)
    often = {"steps": 400, "report_every": 400, "save_every": 400}
    rates = {"student": 1e-3, "fake": 2e-3}
    distilled = toy.make_engine(
        method, teacher=data, start=toy.denoiser(classes=4), batch=256, lr=rates, average_decay=None, **often
    )
    toy.finish(distilled)
    start = {role: toy.weights(distilled.nets[role]) for role in ("student", "fake")}
    alone, joint = (rewarded(kind, start, 400) for kind in (RewardAlone, METHODS["flash_dmd"]))
    print({"alone": alone, "joint": joint})
    assert alone[-1][0] > joint[-1][0] > joint[0][0]  # both gain reward
    assert alone[-1][1] < 0.6 and joint[-1][1] > 0.8


# HiPA


def test_the_high_pass_keeps_what_is_fast_and_drops_what_is_slow():
    i = torch.arange(64.0)
    wave = lambda cycles: torch.cos(2 * math.pi * cycles * i).view(1, 1, 1, -1).expand(1, 1, 64, -1)
    inside = (..., slice(12, -12), slice(12, -12))
    for cycles, factor in ((0.375, 1 - math.exp(-4.5)), (0.125, 1 - math.exp(-0.5)), (0.03125, 1 - math.exp(-1 / 32))):
        torch.testing.assert_close(high_pass(wave(cycles))[inside], factor * wave(cycles)[inside], rtol=0, atol=0.05)
    flat, ramp = torch.ones(1, 1, 8, 8), 3 * torch.arange(8.0).expand(1, 1, 8, 8)
    assert high_pass(flat).abs().max() < 1e-5 and edges(flat).max() < 2e-3
    torch.testing.assert_close(edges(ramp)[..., 1:-1, 1:-1], torch.full((1, 1, 6, 6), 3.0))


def test_the_loss_on_high_frequencies_spends_a_small_students_capacity_there():
    """A filter of nine weights for targets that it can meet at high frequencies or at low ones, and not at both."""
    z = torch.randn(8, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    target, errors, ratios = 0.5 * z + 3 * (z - high_pass(z, pad=4)), [], []
    for weight in (0.0, 8.0):
        filters = torch.zeros(1, 1, 3, 3, requires_grad=True)
        optim = torch.optim.Adam([filters], lr=0.03)
        for _ in range(60):
            x = F.conv2d(z, filters, padding=1)
            high = F.l1_loss(high_pass(x), high_pass(target)) + F.l1_loss(edges(x), edges(target))
            optim.zero_grad()
            (F.l1_loss(x, target) + weight * high / 2).backward()
            optim.step()
        errors.append((high_pass(x) - high_pass(target)).abs().mean().item())
        ratios.append((high_energy(x) / high_energy(target)).item())
    assert errors[1] < 0.8 * errors[0] and abs(math.log(ratios[1])) < abs(math.log(ratios[0])), (errors, ratios)


# MSD


MSD = METHODS["msd"]


def test_a_student_of_a_part_generates_its_own_classes_alone():
    method = MSD(parts=toy.PARTS, number=1, others=("a",))
    nets, counts = a_labelled_team(MSD(parts=toy.PARTS, number=1)), torch.zeros(4)
    for step in range(20):
        batch = method.prepare(nets, a_labelled_batch(32, step), ())
        counts += batch.cond.bincount(minlength=4)
    assert counts[0] == counts[2] == 0 and abs(counts[1] - 320) < 70


def test_parts_hold_every_class_once_and_other_runs_have_the_same_parts():
    make = toy.Make(toy.denoiser(0, classes=4), toy.denoiser(1, classes=4))
    for wrong, message in (
        ({"parts": ((0, 1), (1, 2, 3))}, "class 1 is given twice"),
        ({"parts": ((0, 1), (2, 3)), "number": 2}, "number: 2, but parts are counted from 0 to 1"),
        ({"parts": toy.PARTS, "others": ("a", "b")}, "others: 2 runs, but 1 other parts"),
    ):
        with pytest.raises(ValueError, match=message):
            MSD(**wrong)
    for parts, message in (
        (((0, 1), (2,)), "method.parts: 3 is in no part"),
        (((0, 1), (2, 3, 7)), "method.parts: 7 is no class; the teacher has 4"),
        (((0, 1), (2, 3)), None),
    ):
        method = MSD(parts=parts)
        if message is None:
            assert set(method.nets(make)) == {"teacher", "student", "fake", "disc"}
        else:
            with pytest.raises(ValueError, match=message):
                method.nets(make)
    with pytest.raises(ValueError, match="method.others: 'a' is no run of part 1 of these parts"):
        MSD(parts=((0, 1), (2, 3)), others=("a",)).nets(make)  # that run has others


def test_each_class_is_answered_by_its_own_student_exactly(tmp_path, monkeypatch):
    monkeypatch.setattr(exporting, "_in_fresh_process", in_this_process)
    monkeypatch.setattr(dynamic_modules_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    parts = ((0, 1, 2, 3, 9), (4, 5, 6, 7, 8))
    method = MSD(parts=parts, number=1, others=("a",), student_steps=2)
    nets = {"student": student(1), "student1": student(2)}
    calls, z, cond = method.calls(nets["student"]), torch.randn(8, 1, 16, 16), torch.tensor([4, 0, 9, 5, 5, 1, 2, 8])
    assert [role for role, _ in zip(calls[0].routes, range(10), strict=True)] == 4 * ["student1"] + 5 * ["student"] + [
        "student1"
    ]
    noise = torch.randn(1, 8, 1, 16, 16)
    with torch.no_grad():
        ours = run_calls(nets, calls, z, cond, toy.FixedDraws(noise))
        for role, part in (("student1", parts[0]), ("student", parts[1])):
            own = torch.tensor([label in part for label in cond.tolist()])
            alone = MSD(student_steps=2).calls(nets[role])
            expected = run_calls({"student": nets[role]}, alone, z[own], cond[own], toy.FixedDraws(noise[:, own]))
            assert torch.equal(ours[own], expected)
    worst = exporting.export(nets["student"], tmp_path / "out", calls=calls, card=Card(name="x"), others=nets)
    assert worst <= exporting.TOLERANCE
    again = open_sampler(str(tmp_path / "out"))
    with torch.no_grad():
        theirs = again.sample(z, cond, toy.FixedDraws(noise))
    torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-4)
    other = student(3)
    other.data_std = 0.4
    with pytest.raises(exporting.ExportError, match="networks of different classes differ in schedule or prediction"):
        exporting.entries(nets["student"], calls, {"student1": other})


def test_score_matching_is_the_distance_to_the_teachers_x0_by_edms_weight():
    method, nets = METHODS["msd_score"](drop_labels=0), {"teacher": toy.denoiser(1, classes=4)}
    small, batch = toy.denoiser(2, classes=4, width=12), a_labelled_batch(64)
    calls = Calls(nets | {"student": small})
    loss = method.loss(nets | {"student": small}, batch)[0]["mse"]
    (call,) = calls.of("student")
    x_t, level, cond = call.args[:3]
    with torch.no_grad():
        error = small(x_t, level, cond) - nets["teacher"](x_t, level, cond)
    d, sigma = toy.DATA_STD, level.sigma
    expected = ((sigma**2 + d**2) / (sigma * d) ** 2 * error**2).mean()
    torch.testing.assert_close(loss, expected, rtol=1e-3, atol=1e-6)
    assert method.loss(nets | {"student": nets["teacher"]}, batch)[0]["mse"] < 1e-8


def test_a_roles_new_network_has_its_own_size_and_the_teachers_samples(tmp_path):
    network = {
        "model": "UNet2DModel",
        "config": SMALL,
        "prediction": "edm",
        "time_scale": 100,
        "classes": 10,
        "patch": 2,
    }
    given = {"roles.student.network": network, "method.gan_weight": 0.003}
    nets = make_nets(open_recipe("fashion_mnist_msd", RECIPES, given))
    count = lambda net: sum(p.numel() for p in net.parameters())
    assert 0.1 < count(nets["student"]) / count(nets["teacher"]) < 0.4 and count(nets["fake"]) == count(nets["teacher"])
    assert nets["student"].shape == nets["teacher"].shape
    for wrong, message in (
        ({"roles.student.network": network | {"patch": 1}}, "roles.student.network: its shape"),
        ({"roles.student.network": network | {"classes": 9}}, "roles.student.network: its classes 9 differ"),
        ({"roles.disc.network": network}, "roles.disc.network: msd makes this network anew"),
    ):
        with pytest.raises(ValueError, match=message):
            make_nets(open_recipe("fashion_mnist_msd", RECIPES, given | wrong))
    with pytest.raises(ValueError, match="roles.student.network: an adapter changes the teacher"):
        open_recipe("fashion_mnist_msd", RECIPES, given | {"roles.student.lora": {"rank": 4}})


# Jobs over several runs


def test_passes_are_those_of_the_published_step_without_a_gan():
    """4 for a critic's step, and 4 more for the student's turn: generation's gradient and the two scores."""
    method = DMD2(gan_weight=0, critic_updates_per_student_update=2)
    engine = toy.make_engine(method, teacher=toy.denoiser(1), data=toy.Mixture(), steps=2, batch=4)
    with Passes(engine.nets) as passes:
        toy.finish(engine)
    assert passes.count == 4 * (4 + 8)
    engine.nets["teacher"](torch.randn(3, 2, 1, 1), Level(torch.ones(3, 1, 1, 1), torch.ones(3, 1, 1, 1)))
    assert passes.count == 48  # not entered any more

    x, level = torch.randn(3, 1, 28, 28), Level(torch.ones(3, 1, 1, 1), torch.ones(3, 1, 1, 1))
    base = open_teacher("shipped:fashion_mnist/teacher").requires_grad_(False)
    with Passes({"teacher": base, "student": (adapter := Lora(base, 2))}) as passes:
        adapter(x, level, torch.zeros(3, dtype=torch.int64))
    assert passes.count == 9  # the adapter's pass and its gradient, and none of the base beside it


def test_the_mean_of_two_students_lies_between_them():
    a, b = toy.denoiser(1), toy.denoiser(2)
    net, first = between(a, b, 0.25), toy.weights(a)
    for key, value in toy.weights(net).items():
        torch.testing.assert_close(value, 0.25 * first[key] + 0.75 * toy.weights(b)[key])
    assert toy.same(toy.weights(between(a, b, 1.0)), first)
    with pytest.raises(ValueError, match="second: its network has other weights"):
        between(a, toy.denoiser(1, classes=4), 0.5)


def league(tmp_path, *more: str) -> list[dict]:
    """Rows of a small league in a folder, after one more start of the job."""
    scores = {"metrics": ["fd_fashion", "class_consistency", "map_error"]}
    scores["settings.map_error"] = {"images": 4, "steps": 2}
    arguments = [f"evaluate={json.dumps(scores)}", "images=20", f"out={tmp_path / 'league'}"]
    command("league")([*arguments, *more])
    return json.loads((tmp_path / "league" / "rows.json").read_text())


def test_a_league_pays_each_recipe_with_the_same_budget(tmp_path):
    given = ["recipes=[fashion_mnist]", "chains=[]"]
    (row,) = league(tmp_path, *given, "budget=120")
    assert row["method"] == "dmd2" and row["calls"] == 1 and 60 < row["passes"] < 400 and row["steps"] >= 1
    assert {"fd_fashion", "class_consistency", "map_error", "cpu_s"} <= row.keys() and row["seen_by_loss"] == []
    assert (tmp_path / "league" / "table.md").read_text().count("\n") == 3
    assert league(tmp_path, *given, "budget=120") == [row]  # which has run is not run again
    with pytest.raises(SystemExit):
        league(tmp_path, *given, "budget=121")


@pytest.mark.slow
def test_a_leagues_pairs_count_and_the_stages_of_a_chain_share_its_budget(tmp_path):
    (tmp_path / "two.yaml").write_text(
        "stages:\n- {recipe: fashion_mnist_instaflow, set: {method.teacher_steps: 3}}\n"
        "- {recipe: fashion_mnist_instaflow, set: {teacher: '{1}', method.stage: distil, method.teacher_steps: 2}}\n"
    )
    chains = f"chains=[{tmp_path / 'two.yaml'}]"
    theirs = tmp_path / "league" / "runs" / f"{cleaned_name(f'chain {tmp_path}/two.yaml')}-0-1"
    claim(tmp_path / "league", "league")
    theirs.mkdir(parents=True)
    (theirs / "photo.txt").write_text("mine")
    with pytest.raises(SystemExit):
        league(tmp_path, "recipes=[]", chains, "budget=600")
    assert [path.name for path in theirs.iterdir()] == ["photo.txt"]
    shutil.rmtree(theirs)
    pairs, chain = league(tmp_path, "recipes=[fashion_mnist_hipa]", chains, "budget=600")
    # 33 pairs of nine calls, then the adapter's pass with its gradient and three of the encoder, 0.4 of a pass each
    assert pairs["method"] == "hipa" and pairs["passes"] == pytest.approx(33 * 9 + pairs["steps"] * 32 * 4.2)
    # three and two passes of the teacher a sample, and in both stages three of the student
    assert chain["method"] == "instaflow" and chain["passes"] == 2 * 32 * 6 + 2 * 32 * 5 and chain["steps"] == 4
