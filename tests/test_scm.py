"""sCM: an exact map has no residual, the gradient is the consistency gradient, one call is near the teacher's map."""

from __future__ import annotations

import pytest
import torch
import toy
from torch import nn

from fewstep.diffusion.draws import Draws, lognormal_level
from fewstep.diffusion.samplers import ddim, run_calls
from fewstep.diffusion.tangent import TRIG, tangent, velocity
from fewstep.methods import METHODS, Batch
from fewstep.networks.conditions import Nothing

SCM = METHODS["scm"]
MEAN, STD = (0.3, -0.2), 0.25


class ExactMap(nn.Module):
    """The consistency function of N(mean, std^2): mean + std (x - cos t mean) / sqrt(cos^2 t std^2 + sin^2 t)."""

    def __init__(self):
        super().__init__()
        self.mean = nn.Parameter(torch.tensor(MEAN).view(1, 2, 1, 1))

    def forward(self, x, level, cond=None):
        scale = ((level.alpha * STD) ** 2 + level.sigma**2).sqrt()
        return self.mean + STD * (x - level.alpha * self.mean) / scale


def a_batch(count: int = 64, step: int = 5) -> Batch:
    draws = Draws(0, step)
    real, _ = toy.Mixture([MEAN], STD).sample(count, seed=step)
    return Batch(real, None, draws.normal("z", real.shape), None, draws, Nothing())


@pytest.mark.parametrize("tangents, bound", [("forward", 2e-4), ("difference", 2e-3)])
def test_the_exact_map_of_a_gaussian_has_no_residual(tangents, bound):
    method = SCM(warmup_steps=0, tangents=tangents)
    nets = {"teacher": toy.Mixture([MEAN], STD), "student": ExactMap()}
    _, health = method.loss(nets, a_batch())
    assert health["tangent_norm"] < bound
    _, wrong = method.loss(nets | {"teacher": toy.Mixture([MEAN], 2 * STD)}, a_batch())
    assert wrong["tangent_norm"] > 50 * bound  # of another teacher the same student has one


def test_the_gradient_is_that_of_the_consistency_function_against_its_derivative():
    """Before it is normalised: |F - sg(F + g)|^2 has the gradient of 2 f sg(df/dt) / tan t."""
    student, teacher = toy.denoiser(1), toy.Mixture([MEAN], STD)
    batch = a_batch(16)
    level = lognormal_level(batch.draws, "t", -1.0, 1.4, TRIG, batch.real)
    t = level.t
    x, cos, sin = level.noise(batch.real, batch.draws.normal("eps", batch.real.shape)), level.alpha, level.sigma
    dx = velocity(teacher, x, t, None).detach()
    f_theta = lambda x, t: cos * x - sin * velocity(student, x, t, None)
    whole = lambda x, t: TRIG.level(t, 4).alpha * x - TRIG.level(t, 4).sigma * velocity(student, x, t, None)
    _, slope = tangent(whole, (x, t), (dx, torch.ones_like(t)))
    F, dF = tangent(
        lambda x, t: velocity(student, x, t, None), (x, t), (cos * sin * dx, (cos * sin).double().flatten())
    )
    g = -(cos**2) * (F - dx) - (cos * sin * x + dF)
    torch.testing.assert_close(g, cos * slope, rtol=1e-3, atol=1e-3)
    parameters = list(student.parameters())
    ours = torch.autograd.grad((velocity(student, x, t, None) - F - g).square().sum(), parameters)
    theirs = torch.autograd.grad((2 * (cos / sin) * f_theta(x, t) * slope).sum(), parameters)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-2 * b.abs().max().item())


def test_one_call_of_the_student_is_nearer_to_the_teachers_map_than_four_euler_steps():
    mixture = toy.Mixture(std=0.3)
    method = SCM(warmup_steps=100, tangents="difference")
    train = {"steps": 700, "batch": 128, "report_every": 350, "save_every": 700, "average_decay": 0.95}
    engine = toy.make_engine(method, teacher=mixture, lr={"student": 2e-3}, **train)
    first, last = (report["health/tangent_norm"] for report in toy.finish(engine))
    assert last < 0.6 * first
    z = torch.randn(2000, 2, 1, 1, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        x = run_calls({"student": engine.student}, method.calls(engine.student), z, None, Draws(0, 0))
        endpoint, euler = (ddim(mixture, z, None, steps, TRIG) for steps in (100, 4))
    rms = lambda a: (a - endpoint).square().mean().sqrt().item()
    print(f"RMS map error: student at one call {rms(x):.3f}, teacher at four Euler steps {rms(euler):.3f}")
    assert rms(x) < rms(euler)
    assert toy.energy(x, mixture.sample(2000, seed=77)[0]) < 0.02


def test_two_calls_are_at_the_papers_times():
    calls = SCM(times=(1.5583, 1.1)).calls(toy.denoiser())
    assert [call.sigma / call.alpha for call in calls] == pytest.approx([80.0, 1.9648], rel=2e-2)
