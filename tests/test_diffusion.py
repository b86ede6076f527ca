"""The algebra: closed forms, published values, diffusers' tables, and solvers on an analytic mixture."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
import toy
from torch import nn

from fewstep.diffusion.draws import (
    Draws,
    descending_levels,
    fold,
    grid_level,
    index_level,
    lognormal_level,
    noised,
    ramp_level,
)
from fewstep.diffusion.level import PREDICTIONS, TARGETS, Level, boundary
from fewstep.diffusion.losses import (
    finite,
    gan_discriminator,
    gan_generator,
    matching_gradient,
    pseudo_huber,
    surrogate,
    unit,
)
from fewstep.diffusion.samplers import Call, calls_at, ddim, enter_call, heun, run_calls, to_uint8
from fewstep.diffusion.schedules import DDPM, EDM, Flow, Trig, from_config, to_config
from fewstep.networks.denoiser import Denoiser

SD = DDPM("scaled_linear", 0.00085, 0.012)
SCHEDULES = [EDM(), Flow(), Flow(shift=3.0), Trig(), DDPM(), SD, DDPM("squaredcos_cap_v2"), DDPM(zero_snr=True)]
NAMES = ["edm", "flow", "shifted-flow", "trig", "ddpm", "sd", "cosine", "zero-snr"]


def normal(*shape: int, seed: int = 0, dtype=torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def inner_times(schedule, count: int = 64) -> torch.Tensor:
    """Times from a schedule's ramp that keep away from its two ends, where alpha or sigma is 0 for some."""
    return schedule.ramp(torch.linspace(0.02, 0.98, count, dtype=torch.float64))


def level_of(alpha: float, sigma: float, count: int = 1) -> Level:
    return Level(torch.full((count, 1, 1, 1), alpha), torch.full((count, 1, 1, 1), sigma))


# Levels and predictions


@pytest.mark.parametrize("schedule", SCHEDULES, ids=NAMES)
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_every_prediction_on_every_schedule_returns_x0(schedule, prediction):
    level = schedule.level(inner_times(schedule), 4)
    level = Level(level.alpha.double(), level.sigma.double())
    x0, eps = normal(64, 3, 2, 2, dtype=torch.float64), normal(64, 3, 2, 2, seed=1, dtype=torch.float64)
    x_t = level.noise(x0, eps)
    c_skip, c_out = PREDICTIONS[prediction](level.alpha, level.sigma, 0.5)
    of_x0, of_eps = TARGETS[prediction](level.alpha, level.sigma, 0.5)
    target = of_x0 * x0 + of_eps * eps
    definitions = {
        "x0": x0,
        "eps": eps,
        "v": level.alpha * eps - level.sigma * x0,
        "flow": eps - x0,
        "edm": (x0 - level.alpha * 0.25 / (level.alpha**2 * 0.25 + level.sigma**2) * x_t)
        * (level.alpha**2 * 0.25 + level.sigma**2).sqrt()
        / (level.sigma * 0.5),
    }[prediction]
    torch.testing.assert_close(target, definitions, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(c_skip * x_t + c_out * target, x0, rtol=1e-9, atol=1e-9)


def test_edm_coefficients_are_those_of_the_paper():
    sigma = torch.logspace(-3, 2, 50, dtype=torch.float64)
    c_skip, c_out = PREDICTIONS["edm"](torch.ones_like(sigma), sigma, 0.5)
    torch.testing.assert_close(c_skip, 0.25 / (sigma**2 + 0.25))
    torch.testing.assert_close(c_out, sigma * 0.5 / (sigma**2 + 0.25).sqrt())
    torch.testing.assert_close(1 / c_out**2, (sigma**2 + 0.25) / (sigma * 0.5) ** 2)  # the published weight
    torch.testing.assert_close(1 / c_out**2, 1 / sigma**2 + 4)  # DMD2's spelling of it


def test_dmd2s_weight_at_the_ends_of_edms_ramp():
    ends = EDM().level(EDM().ramp(torch.tensor([0.0, 1.0])), 1)
    c_out = PREDICTIONS["edm"](ends.alpha, ends.sigma, 0.5)[1]
    torch.testing.assert_close(1 / c_out**2, torch.tensor([250004.0, 4.00016]), rtol=1e-5, atol=0)


def test_a_level_knows_its_noise_its_score_and_the_next_level():
    level, to = SD.level(torch.tensor([749.0]), 4), SD.level(torch.tensor([249.0]), 4)
    x0, eps = normal(1, 2, 4, 4), normal(1, 2, 4, 4, seed=1)
    x_t = level.noise(x0, eps)
    torch.testing.assert_close(level.eps(x_t, x0), eps, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(level.score(x_t, x0), -eps / level.sigma, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(level.step(x_t, x0, to), to.noise(x0, eps), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(level_of(3.0, 4.0).norm, torch.full((1, 1, 1, 1), 5.0))
    assert level_of(0.0, 2.0).angle.item() == math.pi / 2 and level_of(2.0, 0.0).angle.item() == 0


def test_the_toys_denoiser_agrees_with_the_gradient_of_its_own_log_density():
    mixture, level = toy.Mixture(), level_of(0.8, 0.5, 32)
    x_t = normal(32, 2, 1, 1, dtype=torch.float64).requires_grad_()
    (score,) = torch.autograd.grad(mixture.log_density(x_t, level).sum(), x_t)
    torch.testing.assert_close(level.score(x_t, mixture(x_t, level)), score, rtol=1e-5, atol=1e-5)


# Schedules


@pytest.mark.parametrize("schedule", SCHEDULES, ids=NAMES)
def test_time_is_the_inverse_of_level(schedule):
    t = inner_times(schedule)
    assert t.dtype == torch.float64
    back = schedule.time(schedule.level(t, 4).angle.flatten())
    assert back.dtype == torch.float64
    # a level leaves in float32; from the angle in float64 the way back is exact
    torch.testing.assert_close(back, t, rtol=1e-5, atol=1e-3 if isinstance(schedule, DDPM) else 1e-7)
    exact = _angle64(schedule, t)
    torch.testing.assert_close(schedule.time(exact), t, rtol=1e-12, atol=1e-9)


def _angle64(schedule, t):
    if isinstance(schedule, EDM):
        return t.atan()
    if isinstance(schedule, Flow):
        return torch.atan2(t, 1 - t)
    if isinstance(schedule, Trig):
        return t
    table = schedule.angles()
    low = t.floor().long()
    return table[low] + (t - low) * (table[low + 1] - table[low])


@pytest.mark.parametrize("schedule", SCHEDULES, ids=NAMES)
def test_ramps_rise_from_clean_to_noise_within_the_bounds(schedule):
    t = schedule.ramp(torch.linspace(0, 1, 1000, dtype=torch.float64))
    torch.testing.assert_close(t[[0, -1]], torch.tensor([schedule.t_min, schedule.t_max], dtype=torch.float64))
    assert (schedule.level(t, 1).angle.diff() > 0).all()


def test_no_ramp_reaches_the_level_without_noise():
    for schedule in SCHEDULES:
        clean = schedule.level(schedule.ramp(torch.zeros(1)), 1)
        assert 1e-3 <= clean.sigma / clean.alpha < 0.03, schedule  # of Stable Diffusion's first step: 0.0292


def test_a_shift_multiplies_the_noise_of_every_level():
    u = torch.linspace(0.01, 0.99, 50)
    plain, shifted = (Flow(1e-12, 1.0, shift).level(Flow(1e-12, 1.0, shift).ramp(u), 1) for shift in (1.0, 3.0))
    torch.testing.assert_close(shifted.sigma / shifted.alpha, 3 * plain.sigma / plain.alpha, rtol=1e-5, atol=0)


def test_edms_ramp_has_the_published_karras_values():
    # the published table has four digits: index 100, 250, 500, 750 of the thousand, ascending
    sigma = EDM().ramp(torch.tensor([0, 20, 100, 250, 500, 750, 980, 999]) / 999)
    expected = torch.tensor([0.002, 0.00323, 0.0168, 0.170, 2.527, 17.6, 72.05, 80.0], dtype=torch.float64)
    torch.testing.assert_close(sigma, expected, rtol=4e-3, atol=0)


def test_stable_diffusions_alphas_have_the_published_values():
    t = torch.tensor([999, 980, 749, 499, 399, 249, 20], dtype=torch.float64)
    expected = [0.0046601, 0.0058438, 0.0566235, 0.2776697, 0.4260864, 0.6754324, 0.9813144]
    torch.testing.assert_close(SD.angles()[t.long()].cos() ** 2, torch.tensor(expected).double(), rtol=0, atol=8e-8)
    level = SD.level(t, 1)
    torch.testing.assert_close(level.alpha**2 + level.sigma**2, torch.ones(7))
    # the noise that dividing by a small alpha multiplies: 14.6 at 999 and 1.16 at 399
    torch.testing.assert_close((level.sigma / level.alpha)[[0, 4]], torch.tensor([14.6, 1.16]), rtol=2e-3, atol=0)


@pytest.mark.parametrize("zero_snr", [False, True])
@pytest.mark.parametrize(
    "betas", [("linear", 1e-4, 2e-2), ("scaled_linear", 0.00085, 0.012), ("squaredcos_cap_v2", 1e-4, 2e-2)]
)
def test_ddpm_equals_diffusers_scheduler(betas, zero_snr):
    from diffusers import DDPMScheduler

    name, start, end = betas
    theirs = DDPMScheduler(beta_schedule=name, beta_start=start, beta_end=end, rescale_betas_zero_snr=zero_snr)
    ours = DDPM(name, start, end, zero_snr=zero_snr).level(torch.arange(1000.0), 1)
    torch.testing.assert_close(ours.alpha**2, theirs.alphas_cumprod, rtol=2e-4, atol=1e-6)
    x0, eps, t = normal(4, 1, 2, 2), normal(4, 1, 2, 2, seed=1), torch.tensor([0, 333, 700, 998])
    level = DDPM(name, start, end, zero_snr=zero_snr).level(t, 4)
    torch.testing.assert_close(level.noise(x0, eps), theirs.add_noise(x0, eps, t), rtol=1e-4, atol=1e-4)


def test_zero_snr_ends_in_pure_noise_and_starts_where_it_did():
    level = DDPM(zero_snr=True).level(torch.tensor([0.0, 999.0]), 1)
    assert level.alpha[1] < 1e-7 and level.sigma[1] == 1
    torch.testing.assert_close(level.alpha[0], DDPM().level(torch.tensor([0.0]), 1).alpha[0])


@pytest.mark.parametrize("schedule", SCHEDULES, ids=NAMES)
def test_a_schedule_survives_its_config(schedule):
    assert from_config(to_config(schedule)) == schedule


def test_a_wrong_schedule_is_named():
    with pytest.raises(ValueError, match="schedule.name: 'karras' is not one of edm, ddpm, flow, trig"):
        from_config({"name": "karras"})
    with pytest.raises(ValueError, match="edm has the fields t_min, t_max, rho; got sigma"):
        from_config({"name": "edm", "sigma": 1})
    with pytest.raises(ValueError, match="beta_schedule: 'cosine' is not one of linear"):
        DDPM("cosine")
    with pytest.raises(ValueError, match="ddpm has beta_start 0.1, beta_end 0.02 and steps 1000; they need"):
        DDPM(beta_start=0.1)


@pytest.mark.parametrize(
    "config, says",
    [
        ({"name": "edm", "t_min": 0.0}, "edm has t_min 0.0 and t_max 80.0; they need 0 < t_min < t_max"),
        ({"name": "flow", "t_max": 1.5}, "flow has t_min 0.001 and t_max 1.5; they need 0 < t_min < t_max <= 1"),
        ({"name": "trig", "t_min": 2}, "trig has t_min 2 and t_max 1.57"),
        ({"name": "flow", "shift": 0}, "flow has the shift 0; it needs a positive number"),
        ({"name": "flow", "shift": math.nan}, "schedule.shift: nan of flow is no float"),
        ({"name": "flow", "shift": "3"}, "schedule.shift: '3' of flow is no float"),
        ({"name": "ddpm", "zero_snr": 1}, "schedule.zero_snr: 1 of ddpm is no bool"),
        ({"name": "ddpm", "steps": 10.5}, "schedule.steps: 10.5 of ddpm is no int"),
    ],
)
def test_a_schedules_wrong_value_is_named(config, says):
    with pytest.raises(ValueError, match=says):
        from_config(config)


class Exact(nn.Module):
    """A backbone that answers as a perfectly trained network of one prediction on one schedule would."""

    shape, classes = (2, 1, 1), None

    def __init__(self, schedule, prediction, mixture):
        super().__init__()
        self.schedule, self.prediction, self.mixture = schedule, prediction, mixture

    def forward(self, x, time, cond, mode, *taps):
        t = (time.double() * 4).exp() if self.prediction == "edm" else time.double()
        level = self.schedule.level(t, x.ndim)
        if self.prediction == "edm":
            x = x * ((level.alpha * toy.DATA_STD) ** 2 + level.sigma**2).sqrt()
        c_skip, c_out = PREDICTIONS[self.prediction](level.alpha, level.sigma, toy.DATA_STD)
        return (self.mixture(x, level) - c_skip * x) / c_out


@pytest.mark.parametrize("asked", [EDM(), Flow(), Trig(), SD], ids=["edm", "flow", "trig", "sd"])
@pytest.mark.parametrize(
    "own, prediction",
    [(DDPM(), "eps"), (SD, "v"), (Flow(), "flow"), (EDM(), "edm"), (Trig(), "v"), (DDPM(zero_snr=True), "v")],
)
def test_a_network_answers_on_every_schedule(own, prediction, asked):
    mixture = toy.Mixture()
    net = Denoiser(Exact(own, prediction, mixture), own, prediction, toy.DATA_STD)
    level = asked.level(inner_times(asked), 4)
    x_t = level.noise(mixture.sample(64)[0], normal(64, 2, 1, 1))
    inside = (level.sigma / level.alpha).flatten() < 12  # where every schedule here has a level of that angle
    inside &= (level.sigma / level.alpha).flatten() > 0.03
    torch.testing.assert_close(net(x_t, level)[inside], mixture(x_t, level)[inside], rtol=1e-3, atol=1e-3)


# Samplers


def solver_errors(solver, counts):
    """Largest distance to the solution with many steps, for each count of steps."""
    mixture, z = toy.Mixture(std=0.3), normal(64, 2, 1, 1)
    schedule = EDM(t_min=0.02, t_max=20.0)
    with torch.no_grad():
        truth = heun(mixture, z, None, 600, schedule)
        return [(solver(mixture, z, None, n, schedule) - truth).abs().mean().item() for n in counts]


def test_heun_converges_at_second_order_and_ddim_at_first():
    second, first = solver_errors(heun, (20, 40, 80)), solver_errors(ddim, (20, 40, 80))
    assert all(3.2 < a / b < 5.0 for a, b in zip(second, second[1:], strict=False)), second
    assert all(1.7 < a / b < 2.3 for a, b in zip(first, first[1:], strict=False)), first
    assert second[0] < first[0] / 5


def test_the_exact_flow_maps_noise_to_the_mixture():
    mixture, z = toy.Mixture(), normal(1000, 2, 1, 1)
    with torch.no_grad():
        x = heun(mixture, z, None, 40)
    data, other = mixture.sample(1000, seed=1)[0], mixture.sample(1000, seed=2)[0]
    assert toy.energy(x, data) < toy.energy(other, data) + 0.01


def test_the_solution_does_not_depend_on_the_schedule_it_is_solved_on():
    mixture, z = toy.Mixture(std=0.3), normal(64, 2, 1, 1)
    with torch.no_grad():
        edm = heun(mixture, z, None, 200, EDM(t_min=0.01, t_max=80.0))
        trig = ddim(mixture, z, None, 2000, Trig(t_min=0.01, t_max=math.atan(80.0)))
    torch.testing.assert_close(trig, edm, rtol=0, atol=5e-3)


class Counting:
    """Counts its calls and remembers their levels; answers half of what it is shown."""

    def __init__(self):
        self.sigmas = []

    def __call__(self, x_t, level, cond):
        self.sigmas.append(level.sigma.flatten()[0].item())
        return x_t / 2


@pytest.mark.parametrize("steps", [1, 2, 7])
def test_network_calls_are_as_stated(steps):
    z = normal(2, 1, 1, 1)
    for sampler, calls in ((heun, 2 * steps - 1), (ddim, steps)):
        counting = Counting()
        sampler(counting, z, None, steps)
        assert len(counting.sigmas) == calls
        assert counting.sigmas[0] == 80.0
    calls = [Call(1.0, float(s)) for s in range(steps, 0, -1)]
    counting = Counting()
    run_calls({"student": counting}, calls, z, None, toy.FixedDraws([z] * (steps - 1)))
    assert counting.sigmas == list(range(steps, 0, -1))


def test_calls_denoise_and_noise_in_turn():
    z, noise = normal(3, 1, 2, 2), [normal(3, 1, 2, 2, seed=s) for s in (1, 2)]
    calls = [Call(a, s) for a, s in ((0.6, 0.8), (0.8, 0.6), (1.0, 0.5))]
    half = {"student": lambda x, level, cond: x / 2}
    first = z / 2  # on a variance-preserving level the entry is z itself
    second = (0.8 * first + 0.6 * noise[0]) / 2
    third = (second + 0.5 * noise[1]) / 2
    torch.testing.assert_close(run_calls(half, calls, z, None, toy.FixedDraws(noise)), third)
    x_t, level = enter_call(half, calls, z, None, toy.FixedDraws(noise), 1)
    torch.testing.assert_close(x_t, 0.8 * first + 0.6 * noise[0])
    torch.testing.assert_close(level.sigma, torch.full((3, 1, 1, 1), 0.6))


def test_sampling_begins_at_the_published_scale():
    """EDM's at 80 z, a variance-preserving schedule's at z."""
    z, same = normal(3, 1, 2, 2), {"student": lambda x, level, cond: x}
    for schedule, start in ((EDM(), 80.0), (SD, 1.0), (Flow(), 1.0), (Trig(), 1.0), (DDPM(zero_snr=True), 1.0)):
        (call,) = calls_at(schedule, (1.0,), on_ramp=True)
        for calls, noise in (([call], []), ([call, replace(call, takes="noise")], [z])):
            result = run_calls(same, calls, z, None, toy.FixedDraws(noise))
            torch.testing.assert_close(result, start * z, rtol=1e-6, atol=0)
            assert schedule != EDM() or torch.equal(result, 80 * z)
    first = []
    for solver in (heun, ddim):
        solver(lambda x, level, cond: first.append(x) or x, z, None, 3)
    assert torch.equal(first[0], 80 * z) and torch.equal(first[5], 80 * z)


def test_a_call_may_step_without_noise_take_the_first_noise_and_be_of_another_network():
    z = normal(3, 1, 2, 2)
    nets = {"student": lambda x, level, cond: x / 2, "late": lambda x, level, cond: x + 1}
    step = [Call(0.6, 0.8, then="step"), Call(0.8, 0.6, role="late")]
    eps = (z - 0.6 * z / 2) / 0.8
    torch.testing.assert_close(run_calls(nets, step, z, None, toy.FixedDraws()), 0.8 * z / 2 + 0.6 * eps + 1)
    again = [Call(0.6, 0.8), Call(1.0, 0.75, takes="noise")]
    torch.testing.assert_close(run_calls(nets, again, z, None, toy.FixedDraws()), 0.75 * z / 2)


def test_a_call_hands_its_extra_scalars_to_the_network():
    seen = {}

    def net(x, level, cond, extra=None):
        seen.update(extra)
        return x

    run_calls({"student": net}, [Call(0.0, 1.0, extra={"w": 4.5})], normal(3, 1, 2, 2), None, toy.FixedDraws())
    assert torch.equal(seen["w"], torch.full((3,), 4.5))


def test_calls_with_all_levels_stepped_through_are_ddim():
    mixture, z, schedule = toy.Mixture(std=0.3), normal(8, 2, 1, 1), EDM(t_min=0.01)
    calls = [replace(c, then="step") for c in calls_at(schedule, tuple(torch.linspace(1, 0, 9).tolist()), on_ramp=True)]
    with torch.no_grad():
        expected = ddim(mixture, z, None, 9, schedule)
        torch.testing.assert_close(run_calls({"student": mixture}, calls, z, None, toy.FixedDraws()), expected)


def test_to_uint8_clamps_and_rounds_to_nearest():
    x = torch.tensor([-2.0, -1.0, -1 + 0.49 / 127.5, -1 + 0.51 / 127.5, 0.0, 1.0, 3.0])
    assert to_uint8(x).tolist() == [0, 0, 0, 1, 128, 255, 255]
    every = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_uint8(every.float() / 127.5 - 1), every)


# Losses


def test_the_surrogates_gradient_is_the_matching_gradient_over_n():
    x, real, fake = (normal(4, 3, 5, 5, seed=s) for s in range(3))
    gradient, scale = matching_gradient(x, real, fake)
    torch.testing.assert_close(scale, (x - real).abs().mean((1, 2, 3)))
    torch.testing.assert_close(gradient, (fake - real) / scale.view(4, 1, 1, 1))
    x.requires_grad_()
    loss = surrogate(x, gradient)
    (grad,) = torch.autograd.grad(loss, x)
    torch.testing.assert_close(grad, gradient / x.numel(), rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(loss, 0.5 * (gradient**2).mean())


def test_descent_moves_samples_to_the_teacher_and_away_from_the_critic():
    x, real = normal(4, 3, 5, 5), normal(4, 3, 5, 5, seed=1)
    fake = x + 0.1 * normal(4, 3, 5, 5, seed=2)  # a critic that knows the student well
    moved = x - 0.01 * matching_gradient(x, real, fake)[0]
    assert ((moved - real).abs().mean((1, 2, 3)) < (x - real).abs().mean((1, 2, 3))).all()
    away = x - 0.01 * matching_gradient(x, x + 1, fake)[0]
    assert (away - fake).pow(2).sum() > (x - fake).pow(2).sum()


def test_the_matching_gradient_vanishes_exactly_where_the_two_agree():
    x, real = normal(4, 1, 2, 2), normal(4, 1, 2, 2, seed=1)
    assert (matching_gradient(x, real, real.clone())[0] == 0).all()
    gradient, scale = matching_gradient(x, x.clone(), x + 1)  # a normaliser of 0 has a floor, no infinity
    assert torch.equal(scale, torch.full((4,), 1e-6)) and gradient.isfinite().all()


def test_a_weight_multiplies_each_samples_gradient():
    x, real, fake = (normal(4, 1, 2, 2, seed=s) for s in range(3))
    weight = torch.tensor([0.0, 1.0, 2.0, 3.0])
    plain, weighted = matching_gradient(x, real, fake)[0], matching_gradient(x, real, fake, weight)[0]
    torch.testing.assert_close(weighted, plain * weight.view(4, 1, 1, 1))


def test_eps_v_and_f_space_give_the_gradient_of_x0_space():
    x, n, a, b = (normal(8, 1, 4, 4, seed=s, dtype=torch.float64) for s in range(4))
    near_noise = {"eps": SD, "flow": Flow(), "edm": EDM()}
    for prediction, schedule in near_noise.items():
        level = schedule.level(schedule.ramp(torch.linspace(0.05, 0.98, 8, dtype=torch.float64)), 4)
        level = Level(level.alpha.double(), level.sigma.double())
        x_t = level.noise(x, n)
        c_skip, c_out = PREDICTIONS[prediction](level.alpha, level.sigma, 0.5)
        own = (x - c_skip * x_t) / c_out  # eps: n; flow: n - x; EDM: F*
        real, fake = own + a, own + b  # two networks' outputs
        inner = (real - fake) if prediction != "edm" else (fake - real)
        expected = inner / (real - own).abs().mean((1, 2, 3), keepdim=True)
        got, _ = matching_gradient(x, c_skip * x_t + c_out * real, c_skip * x_t + c_out * fake)
        torch.testing.assert_close(got, expected, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("prediction, schedule", [("edm", EDM()), ("eps", SD), ("flow", Flow()), ("v", Trig())])
def test_the_error_of_what_a_network_predicts_is_its_weighted_error_in_x0(prediction, schedule):
    net = toy.denoiser(schedule=schedule, prediction=prediction)
    level = schedule.level(schedule.ramp(torch.linspace(0.1, 0.9, 8, dtype=torch.float64)), 4)
    x0, eps = normal(8, 2, 1, 1), normal(8, 2, 1, 1, seed=1)
    with torch.no_grad():
        raw, x0_hat = (net(level.noise(x0, eps), level, None, mode) for mode in ("raw", "x0"))
    c_out = PREDICTIONS[prediction](level.alpha, level.sigma, toy.DATA_STD)[1]
    error = (raw - net.target(level, x0, eps)) ** 2
    torch.testing.assert_close(error, (x0_hat - x0) ** 2 / c_out**2, rtol=2e-3, atol=1e-4)


def test_nothing_cancels_in_a_target_near_the_clean_end():
    """The published code computes this loss on x0 in float64, from float32 images; ours in float32 is as near."""
    net, level = toy.denoiser(), EDM().level(torch.full((4096,), 0.002), 4)
    x0, eps, f = (normal(4096, 2, 1, 1, seed=s) for s in range(3))
    c_skip, c_out = PREDICTIONS["edm"](level.alpha.double(), level.sigma.double(), toy.DATA_STD)
    exact = ((f - (x0 - c_skip * level.noise(x0.double(), eps.double())) / c_out) ** 2).mean()
    published = (((c_skip * level.noise(x0, eps) + c_out * f - x0) / c_out) ** 2).mean()
    ours = ((f - net.target(level, x0, eps)) ** 2).mean()
    assert abs(ours - exact) < 1e-6 * exact
    assert abs(ours - exact) < abs(published - exact) / 8


def test_a_unit_residual_has_the_published_norm():
    residual = normal(4, 3, 2, 2) * torch.tensor([0.0, 1e-3, 1.0, 1e3]).view(4, 1, 1, 1)
    result, norm = unit(residual, 0.1), residual.flatten(1).norm(dim=1)
    torch.testing.assert_close(result.flatten(1).norm(dim=1), norm / (norm + 0.1))
    torch.testing.assert_close(result[2] * (norm[2] + 0.1), residual[2])


def test_pseudo_huber_is_quadratic_near_its_target_and_linear_far_from_it():
    target = torch.zeros(5, dtype=torch.float64)
    loss = lambda d: pseudo_huber(target + d, target, 1e-3).item()
    assert loss(0.0) == 0
    assert loss(1e-5) == pytest.approx(1e-10 / 2e-3, rel=1e-4)
    assert loss(2.0) == pytest.approx(2.0 - 1e-3, rel=1e-6)


def test_the_boundary_of_a_consistency_function_is_lcms():
    from diffusers import LCMScheduler

    theirs = LCMScheduler()
    for t in (0, 1, 19, 999):
        c_skip, c_out = boundary(torch.tensor([t]).double())
        expected = theirs.get_scalings_for_boundary_condition_discrete(t)
        assert (c_skip.item(), c_out.item()) == pytest.approx(tuple(map(float, expected)))
    assert [v.item() for v in boundary(torch.zeros(1))] == [1, 0]


def test_adversarial_losses_are_softplus_means():
    real, fake = torch.tensor([2.0, -1.0]), torch.tensor([0.5, 3.0])
    softplus = lambda z: math.log1p(math.exp(z))
    assert gan_generator(fake).item() == pytest.approx((softplus(-0.5) + softplus(-3)) / 2)
    expected = (softplus(-2) + softplus(1)) / 2 + (softplus(0.5) + softplus(3)) / 2
    assert gan_discriminator(real, fake).item() == pytest.approx(expected)
    assert gan_discriminator(torch.zeros(1), torch.zeros(1)).item() == pytest.approx(2 * math.log(2))


def test_finite_sees_one_bad_element_among_many():
    good = torch.ones(3)
    assert finite(good, torch.zeros(()))
    assert not finite(good, torch.tensor([0.0, math.nan])) and not finite(torch.tensor(math.inf), good)


# Draws


@pytest.mark.parametrize("parts", [2, 4])
def test_parts_are_strided_slices_of_one_global_draw(parts):
    kinds = {
        "normal": lambda d, n: d.normal("a", (n, 3)),
        "uniform": lambda d, n: d.uniform("a", n),
        "stratified": lambda d, n: d.uniform("a", n, stratified=True),
        "integers": lambda d, n: d.integers("a", 0, 9, n),
    }
    for kind, draw in kinds.items():
        whole = draw(Draws(3, 5), 16)
        for part in range(parts):
            mine = draw(Draws(3, 5, part, parts), 16 // parts)
            assert torch.equal(mine, whole[part::parts]), kind


def test_draws_differ_by_name_step_and_seed_and_repeat_otherwise():
    first = Draws(0, 0).normal("a", (8,))
    assert torch.equal(first, Draws(0, 0).normal("a", (8,)))
    for other in (Draws(0, 0).normal("b", (8,)), Draws(0, 1).normal("a", (8,)), Draws(1, 0).normal("a", (8,))):
        assert not torch.equal(first, other)


def test_seeds_are_the_same_on_every_machine():
    assert fold(0, 0, "z") == 2338768425345457439  # a change here changes every run's numbers
    assert fold(1, 23) != fold(12, 3) and 0 <= fold("x") < 2**63


def test_stratified_draws_have_one_in_each_interval_and_uniform_marginals():
    for step in range(5):
        u = Draws(0, step).uniform("u", 64, stratified=True)
        assert torch.equal((u * 64).long().sort().values, torch.arange(64))
    first = torch.stack([Draws(0, step).uniform("u", 16, stratified=True)[0] for step in range(2000)])
    counts = torch.histc(first, 10, 0, 1)
    assert ((counts - 200) ** 2 / 200).sum() < 27.9  # chi-square, 9 degrees of freedom, p = 0.001
    assert abs(first.mean() - 0.5) < 4 * (1 / 12 / 2000) ** 0.5


def test_choices_are_uniform_and_equal_on_all_parts():
    picks = torch.tensor([Draws(0, step).choice("last", 4) for step in range(4000)])
    counts = picks.bincount(minlength=4)
    assert ((counts - 1000) ** 2 / 1000).sum() < 16.3  # chi-square, 3 degrees of freedom, p = 0.001
    for step in range(50):
        assert len({Draws(0, step, part, 8).choice("last", 4) for part in range(8)}) == 1


@pytest.mark.parametrize("low, high", [(20, 980), (0, 999)])
@pytest.mark.parametrize("schedule", [DDPM(), EDM()], ids=["ddpm", "edm"])
def test_index_levels_are_uniform_over_their_range_with_both_ends(schedule, low, high):
    like = torch.zeros(200_000, 1, 1, 1)
    level = index_level(Draws(0, 0), "t", schedule, low, high, like)
    assert level.alpha.shape == (200_000, 1, 1, 1) and level.alpha.dtype == torch.float32
    t = schedule.time(level.angle.flatten())
    if isinstance(schedule, EDM):
        lo, hi = 0.002 ** (1 / 7), 80 ** (1 / 7)
        t = (t ** (1 / 7) - lo) / (hi - lo) * 999
    index = t.round().long()
    assert (t - index).abs().max() < 0.02
    assert index.min() == low and index.max() == high
    counts = index.bincount(minlength=1000)[low : high + 1].double()
    expected = 200_000 / (high - low + 1)
    chi, freedom = ((counts - expected) ** 2 / expected).sum(), high - low
    assert abs(chi - freedom) < 4 * (2 * freedom) ** 0.5


def test_lognormal_levels_have_the_asked_moments():
    like = torch.zeros(100_000, 1, 1, 1)
    level = lognormal_level(Draws(0, 0), "t", -1.2, 1.2, EDM(), like)
    log = (level.sigma / level.alpha).log().flatten()
    assert abs(log.mean() + 1.2) < 0.015 and abs(log.std() - 1.2) < 0.012


def test_a_share_of_the_lognormal_levels_comes_from_the_ramp():
    like = torch.zeros(100_000, 1, 1, 1)
    level = lognormal_level(Draws(0, 0), "t", -1.2, 1.2, EDM(), like, 0.25)
    high = (level.sigma > EDM().ramp(torch.tensor(0.5))).float().mean()  # half of the ramp, 0.04 of the log-normal
    normal_tail = 0.5 * math.erfc((math.log(EDM().ramp(torch.tensor(0.5)).item()) + 1.2) / 1.2 / 2**0.5)
    assert abs(high - (0.25 * 0.5 + 0.75 * normal_tail)) < 0.005
    assert level.sigma.max() <= 80 and level.sigma.min() >= 0.002


def test_ramp_levels_are_uniform_over_the_ramp_and_stratified():
    like = torch.zeros(1000, 1, 1, 1)
    for schedule in (Flow(shift=3.0), Trig(), EDM()):
        result = ramp_level(Draws(0, 0), "t", schedule, like).t.sort().values
        cells = schedule.ramp(torch.arange(1001) / 1000)
        assert ((cells[:-1] <= result) & (result <= cells[1:])).all()  # one in each thousandth


def test_a_shift_adds_its_logarithm_to_a_lognormal_draws_mean():
    """Logit-normal t of a flow is log-normal sigma / alpha: N(0, 1) shifted by 3 is N(ln 3, 1)."""
    like, wide = torch.zeros(4096, 1, 1, 1), Flow(t_min=1e-9)
    plain, moved = (lognormal_level(Draws(0, 0), "t", mean, 1.0, wide, like).t for mean in (0.0, math.log(3)))
    torch.testing.assert_close(moved, 3 * plain / (1 + 2 * plain), rtol=1e-9, atol=0)
    logit = (plain / (1 - plain)).log()
    assert abs(logit.mean()) < 0.06 and abs(logit.std() - 1) < 0.05


def test_lognormal_levels_are_scms_times():
    """t = arctan(e^tau / sigma_d) of noise with sigma_d's standard deviation: sigma / alpha = e^tau of unit noise."""
    level = lognormal_level(Draws(0, 0), "t", -1.0, 1.4, Trig(), torch.zeros(4096, 1, 1, 1))
    tau = level.t.tan().log()
    assert abs(tau.mean() + 1) < 0.08 and abs(tau.std() - 1.4) < 0.06


def test_levels_of_a_rollout_descend_from_the_noisiest():
    like = torch.zeros(512, 1, 1, 1)
    levels = descending_levels(Draws(0, 0), "t", 4, 0.0, 1.6, Trig(), like)
    assert (levels[0].t == math.pi / 2).all() and len(levels) == 4
    for before, after in zip(levels, levels[1:], strict=False):
        assert (after.t <= before.t).all() and (after.t < before.t).any()
    second = lognormal_level(Draws(0, 0), "t/1", 0.0, 1.6, Trig(), like).t
    assert torch.equal(levels[1].t, second)  # no draw is above pi/2


def test_noised_samples_are_those_of_their_level_and_noise():
    x, draws = torch.randn(6, 2, 1, 1), Draws(3, 1)
    x_t, level, eps = noised(draws, "a", EDM(), x, 100, 200)
    assert torch.equal(x_t, level.alpha * x + level.sigma * eps)
    assert torch.equal(level.sigma, index_level(draws, "a/t", EDM(), 100, 200, x).sigma)
    assert torch.equal(eps, draws.normal("a/eps", x.shape))


def test_a_solvers_grid_is_lcms():
    """Luo et al. 2023, as published: timesteps 19, 39, ..., 999 of 50 steps; below the least of them is 0."""
    numbers = torch.arange(51)
    t = grid_level(SD, numbers, 50, torch.zeros(51, 1, 1, 1)).t
    expected = torch.tensor([0, *range(19, 1000, 20)])
    assert (t - expected).abs().max() < 1e-9
