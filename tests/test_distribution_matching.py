"""The relatives of DMD2, each by the proof that its paper or the algebra offers, on the toy."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
import toy
from job import job as command
from test_methods import Calls, a_batch, a_team, gradient
from torch.nn import functional as F

from fewstep.build import check_data
from fewstep.config import resolve
from fewstep.data.feed import open_feed
from fewstep.data.noise import noise
from fewstep.data.shards import open_shards
from fewstep.diffusion.draws import Draws
from fewstep.diffusion.level import Level
from fewstep.diffusion.losses import clamped
from fewstep.diffusion.perceptual import feature_distance
from fewstep.diffusion.samplers import to_uint8
from fewstep.diffusion.schedules import EDM
from fewstep.methods import METHODS, Batch
from fewstep.methods.f_distill import H
from fewstep.metrics.features import ClassReward, FeatureMaps, open_features
from fewstep.networks.conditions import Labels
from fewstep.networks.lora import Lora
from fewstep.networks.pretrained import open_teacher
from fewstep.students import open_sampler

DMD2, SwiftBrush = METHODS["dmd2"], METHODS["swiftbrush"]


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
