"""Methods with heads on frozen features, and score identity distillation: values, gradients and passes."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
import toy

from fewstep.diffusion.draws import Draws
from fewstep.diffusion.losses import hinge_discriminator, hinge_generator
from fewstep.diffusion.samplers import run_calls
from fewstep.diffusion.tangent import TRIG
from fewstep.methods import METHODS, Batch
from fewstep.methods.ladd import Heads
from fewstep.networks.conditions import Labels, Nothing

LADD, SANA, SID = METHODS["ladd"], METHODS["sana_sprint"], METHODS["sid"]
MEAN, STD = (0.3, -0.2), 0.25


def a_batch(count: int = 64, step: int = 5, labels: bool = False) -> Batch:
    draws, conditions = Draws(0, step), Labels(4, 4) if labels else Nothing()
    real, cond = toy.Mixture(labelled=True).sample(count, seed=step)
    z, made = draws.normal("z", real.shape), conditions.draw(draws, count)
    return Batch(real, cond if labels else None, z, made, draws, conditions)


def test_hinge_losses_are_zero_beyond_the_margin_and_linear_within():
    real, fake = torch.tensor([2.0, 0.5, -1.0]), torch.tensor([-3.0, -0.5, 2.0])
    assert hinge_discriminator(real, fake).item() == pytest.approx((0 + 0.5 + 2) / 3 + (0 + 0.5 + 3) / 3)
    assert hinge_generator(fake).item() == pytest.approx((3 + 0.5 - 2) / 3)


# LADD


def test_each_tap_has_a_head_of_its_own():
    heads = Heads([toy.head(1), toy.head(2)], ("a", "b"))
    maps = tuple(torch.randn(5, 48, 1, 1) for _ in range(2))
    logits = heads(maps)
    assert logits.shape == (5, 2)
    for i, head in enumerate(heads.heads):
        assert torch.equal(logits[:, i], head((maps[i],)))


class Seen:
    """Calls of a network: mode, taps, conditions and gradient."""

    def __init__(self, net: torch.nn.Module):
        self.calls = []
        net.register_forward_hook(self, with_kwargs=True)

    def __call__(self, net, args, kwargs, out):
        mode = args[3] if len(args) > 3 else "x0"
        first = out[0] if isinstance(out, tuple) else out
        self.calls.append((mode, kwargs.get("at"), args[2], first.requires_grad))

    def count(self) -> Counter:
        return Counter((mode, graph) for mode, _, _, graph in self.calls)


@pytest.mark.parametrize("synthetic", [False, True])
def test_ladd_reads_every_tap_of_the_frozen_teacher_once_a_verdict(synthetic):
    method = LADD(taps=("middle", "middle"), synthetic=synthetic, teacher_steps=3)
    nets = method.nets(toy.Make(toy.denoiser(1), toy.denoiser(2)))
    nets["teacher"].requires_grad_(False)
    seen = Seen(nets["teacher"])
    batch = method.prepare(nets, a_batch(), ("student",))
    assert seen.count() == ({("x0", False): 5} if synthetic else {})  # 3 Heun steps
    seen.calls.clear()
    terms, _ = method.student_loss(nets, batch)
    assert seen.count() == {("features", True): 1} and seen.calls[0][1] == ("middle", "middle")
    (dx,) = torch.autograd.grad(terms["gan"], batch.x)
    assert dx.abs().sum() > 0
    seen.calls.clear()
    method.disc_loss(nets, batch.detached())
    assert seen.count() == {("features", False): 2}
    assert method.needs == (() if synthetic else ("real",))
    assert synthetic or torch.equal(batch.made["real"], a_batch().real)


def test_ladd_trains_at_its_times_with_their_probabilities_and_samples_at_some():
    method, levels = LADD(), []
    record = lambda x, level, cond: levels.append(level.sigma.flatten()) or x
    method.prepare({"student": record}, a_batch(4000), ())
    times, counts = levels[0].unique(return_counts=True)
    assert times.tolist() == pytest.approx([0.25, 0.5, 0.75, 1.0])
    assert (counts / 4000).tolist() == pytest.approx([0.1, 0.1, 0.1, 0.7], abs=0.02)
    assert [call.t for call in LADD(student_steps=2).calls(None)] == [1.0, 0.5]
    with pytest.raises(ValueError, match="student_steps: 3 does not divide the number of times"):
        LADD(student_steps=3)


# SANA-Sprint


def sana(**settings):
    return SANA(**{"tangents": "difference", "guidance": 2.0, "guidance_range": (1.0, 3.0)} | settings)


def test_sana_sprints_student_is_the_teacher_at_step_0_in_1_2_and_4_calls():
    teacher = toy.denoiser(1, classes=4)
    student = sana().nets(toy.Make(teacher, teacher))["student"]
    z, cond = a_batch(labels=True).z, torch.arange(64) % 4
    for times in ((1.5583,), (1.5583, 1.3), (1.5583, 1.3, 1.1, 0.6)):
        ours, plain = sana(times=times), sana(times=times, guidance_range=None)
        one, other = (
            run_calls({"student": net}, method.calls(net), z, cond, Draws(0, 0))
            for method, net in ((ours, student), (plain, teacher))
        )
        assert torch.equal(one, other) and len(ours.calls(student)) == len(times)


def test_sana_sprints_heads_see_misaligned_pairs_as_fake():
    method, batch = sana(), a_batch(labels=True)
    teacher = toy.denoiser(1, classes=4)
    nets = method.nets(toy.Make(teacher, teacher))
    seen, logits = Seen(nets["teacher"]), []
    nets["disc"].register_forward_hook(lambda net, args, out: logits.append(out))
    batch = batch.make(x=batch.z)
    terms, _ = method.disc_loss(nets, batch)
    real, fake, misaligned = logits
    assert [cond.equal(batch.real_cond) for _, _, cond, _ in seen.calls] == [True, True, False]
    assert torch.equal(seen.calls[2][2], batch.cond)
    expected = hinge_discriminator(real, torch.cat([fake, misaligned]))
    assert torch.equal(terms["gan"], expected)


def test_half_of_sana_sprints_judged_samples_come_from_pure_noise():
    method, levels = sana(guidance_range=None), []
    record = lambda x, level, cond: levels.append(level.t) or x
    method.prepare({"student": record}, a_batch(4000), ())
    assert (levels[0] == TRIG.t_max).double().mean().item() == pytest.approx(0.5, abs=0.03)


# SiD


class Gaussian(torch.nn.Module):
    """The exact denoiser of N(mean, std^2) by its closed form, m + k (x - alpha m)."""

    def __init__(self, mean: float, std: float):
        super().__init__()
        self.mean, self.std, self.schedule = mean, std, toy.EDM()

    def slope(self, level):
        return level.alpha * self.std**2 / ((level.alpha * self.std) ** 2 + level.sigma**2)

    def forward(self, x, level, cond=None, mode="x0"):
        x0 = self.mean + self.slope(level) * (x - level.alpha * self.mean)
        return (x0, None) if mode == "both" else x0


@pytest.mark.parametrize("alpha", [0.0, 1.0, 1.2])
def test_sids_gradient_on_a_gaussian_is_its_closed_form_through_both_scores(alpha):
    """With r = a + p x and f = b + q x of the samples themselves, d/dx of (r - f)((r - x) - alpha (r - f))."""
    method, real, fake = SID(alpha=alpha), Gaussian(0.3, 0.25), Gaussian(-0.1, 0.4)
    batch = a_batch()
    x = (0.4 * batch.z - 0.1).requires_grad_()
    terms, _ = method.student_loss({"teacher": real, "fake": fake}, batch.make(x=x))
    (dx,) = torch.autograd.grad(terms["score"], x)
    x_t, level, _ = method.noised({"fake": fake}, batch, "match", x.detach(), *method.match_range)
    r, f, p, q = real(x_t, level), fake(x_t, level), real.slope(level), fake.slope(level)  # alpha is 1: dx_t = dx
    scale = (x - r).detach().abs().mean((1, 2, 3), keepdim=True)
    by_hand = ((p - q) * ((r - x) - alpha * (r - f)) + (r - f) * ((p - 1) - alpha * (p - q))) / scale / x.numel()
    torch.testing.assert_close(dx, by_hand.detach(), rtol=1e-4, atol=1e-7)
    if alpha == 1:  # the score identity: with the exact fake score, (r - f)(f - x) is 0 on average
        x = 0.4 * a_batch(200_000).z - 0.1
        x_t, level, _ = method.noised({"fake": fake}, a_batch(200_000), "match", x, *method.match_range)
        r, f = real(x_t, level), fake(x_t, level)
        product = (r - f) * (f - x)
        assert product.mean().abs() < 4 * product.std() / product.numel() ** 0.5


def test_where_student_and_teacher_agree_sid_has_no_loss_and_no_gradient():
    method, net, batch = SID(), Gaussian(0.3, 0.25), a_batch()
    x = batch.real.clone().requires_grad_()
    terms, _ = method.student_loss({"teacher": net, "fake": net}, batch.make(x=x))
    assert terms["score"] == 0 and not torch.autograd.grad(terms["score"], x)[0].any()


def test_sida_judges_by_the_critics_own_features_without_another_network():
    method, plain = SID(gan_weight=0.01), SID()
    assert method.nets(toy.Make()).keys() == plain.nets(toy.Make()).keys() and plain.needs == ()
    nets = {"teacher": toy.denoiser(1), "student": toy.denoiser(2), "fake": toy.denoiser(3)}
    batch = method.prepare(nets, a_batch(), ("student",))
    seen = Seen(nets["fake"])
    terms, _ = method.student_loss(nets, batch)
    assert seen.count() == {("both", True): 1}  # the score's pass serves the discriminator, too
    (dx,) = torch.autograd.grad(terms["gan"], batch.x)
    assert dx.abs().sum() > 0
    terms, health = method.critic_loss(nets, batch.detached())
    assert set(terms) == {"denoise", "gan"} and 0 <= health["d_accuracy"] <= 1


# Training


@pytest.mark.parametrize("method", [SID(conditioning=999), LADD(mean=-1.5)], ids=["sid", "ladd"])
def test_training_brings_the_student_to_the_data(method, pretrained):
    mixture = toy.OVERLAPPING
    lr = {"student": 1e-3 if method.tag == "sid" else 2e-3, "fake": 4e-3, "disc": 8e-3}
    settings = {"lr": lr, "optim": {"betas": (0.0, 0.99)}, "batch": 96}
    engine = toy.make_engine(
        method,
        teacher=mixture if method.tag == "sid" else pretrained,
        start=pretrained,
        data=mixture,
        steps=150,
        report_every=150,
        save_every=150,
        average_decay=0.9,
        **settings,
    )

    def energy(net) -> float:
        z = torch.randn(1500, 2, 1, 1, generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            x = run_calls({"student": net}, method.calls(net), z, None, Draws(0, 0))
        return toy.energy(x, mixture.sample(1500, seed=9)[0])

    toy.finish(engine)
    before, after = energy(pretrained), energy(engine.student)
    print(f"{method.tag}: energy distance {before:.4f} -> {after:.4f}")
    assert after < before / 3
