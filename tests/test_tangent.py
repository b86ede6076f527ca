"""Tangents: exact on closed forms, zero on an exact consistency map, equal to differences on the shipped network."""

from __future__ import annotations

import pytest
import torch

from fewstep.diffusion.schedules import Trig
from fewstep.diffusion.tangent import tangent
from fewstep.networks.pretrained import open_teacher


def normal(*shape: int, seed: int = 0, dtype=torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def test_a_tangent_is_the_directional_derivative_and_has_no_graph():
    x, t = normal(5, 3, dtype=torch.float64).requires_grad_(), normal(5, 1, seed=1, dtype=torch.float64)
    dx, dt = normal(5, 3, seed=2, dtype=torch.float64), torch.full((5, 1), 2.0, dtype=torch.float64)
    f = lambda x, t: x.sin() * t.exp() + x**3
    expected = (x.cos() * t.exp() + 3 * x**2) * dx + x.sin() * t.exp() * dt
    for how, near in (("forward", 1e-14), ("difference", 1e-4)):
        value, derivative = tangent(f, (x, t), (dx, dt), how)
        assert torch.equal(value, f(x, t)) and not value.requires_grad and not derivative.requires_grad
        assert (derivative - expected).abs().max() < near * expected.abs().max()
    # the error of a difference falls with h squared
    errors = [(tangent(f, (x, t), (dx, dt), "difference", h)[1] - expected).norm().item() for h in (0.04, 0.02, 0.01)]
    assert all(3.9 < a / b < 4.1 for a, b in zip(errors, errors[1:], strict=False))
    with pytest.raises(ValueError, match="how: 'reverse' is not one of forward, difference"):
        tangent(f, (x, t), (dx, dt), "reverse")


def test_the_exact_consistency_map_has_no_tangent_along_the_teachers_trajectory():
    """For data N(mu, S^2) the probability-flow ODE is affine, and its solution at t = 0 known."""
    mu, std = torch.tensor(0.3, dtype=torch.float64), torch.tensor(0.6, dtype=torch.float64)
    x, t = normal(64, dtype=torch.float64), torch.linspace(0.05, 1.55, 64, dtype=torch.float64)
    spread = lambda t: ((t.cos() * std) ** 2 + t.sin() ** 2).sqrt()
    f = lambda x, t: mu + std * (x - t.cos() * mu) / spread(t)
    x0 = mu + t.cos() * std**2 / spread(t) ** 2 * (x - t.cos() * mu)  # E[x0 | x_t], the teacher
    velocity = (t.cos() * x - x0) / t.sin()
    _, slope = tangent(f, (x, t), (velocity, torch.ones_like(t)))
    assert slope.abs().max() < 1e-13
    _, slope = tangent(f, (x, t), (velocity, torch.ones_like(t)), "difference")
    assert slope.abs().max() < 1e-4


def test_forward_mode_agrees_with_differences_on_the_shipped_network():
    net = open_teacher("shipped:fashion_mnist/teacher").requires_grad_(False)
    t, cond = torch.linspace(0.2, 1.5, 4, dtype=torch.float64), torch.arange(4)
    f = lambda x, t: net(x, Trig().level(t, 4), cond)
    level = Trig().level(t, 4)
    x = level.noise(0.5 * normal(4, 1, 28, 28), normal(4, 1, 28, 28, seed=1))
    scale = level.alpha * level.sigma  # sCM's: near pure noise the derivative in t grows as 1 / (cos t sin t)
    along = (scale * normal(4, 1, 28, 28, seed=2), scale.flatten().double())
    value, exact = tangent(f, (x, t), along)
    again, near = tangent(f, (x, t), along, "difference", 3e-3)
    assert (value - again).abs().max() < 1e-5  # attention by another kernel
    assert (near - exact).norm() < 5e-4 * exact.norm()
    assert exact.flatten(1).norm(dim=1).min() > 1
