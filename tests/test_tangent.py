"""Tangents: exact on closed forms, zero on an exact consistency map, equal to differences on the shipped network."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny
import torch
import torch.distributed as dist
from test_networks import unet

from fewstep.diffusion.schedules import Flow, Trig
from fewstep.diffusion.tangent import TRIG, tangent, velocity
from fewstep.engine.world import Layout, World
from fewstep.networks.backbones import UNet
from fewstep.networks.denoiser import Denoiser
from fewstep.networks.families import BACKBONES
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


# The table: forward mode through every family's network. Its error is to central differences in float32, whose own is
# below 1e-3 at this step; bfloat16's is to float32. Differences in bfloat16 are no derivative: at the usual step the
# rounding is as large as the difference.

TABLE = {"unet": 3e-4, "sd15": 4e-4, "dit": 3e-4, "sana": 2e-3}
BF16 = {"unet": 1e-2, "sd15": 2e-2, "dit": 1e-2, "sana": 0.2}


def a_network(name: str, precision: str = "fp32") -> Denoiser:
    """A tiny network with random weights, whose time is of order 10."""
    if name == "unet":
        backbone = UNet(unet(0, num_class_embeds=6, in_channels=2, out_channels=2), 5, 1)
    else:
        family = tiny.FAMILIES[name]
        backbone = BACKBONES[family.model](family.make())
    return Denoiser(backbone, Flow(), "flow", precision=precision, time_scale=10.0).eval().requires_grad_(False)


def derivative(net: Denoiser, how: str = "forward", h: float = 3e-3) -> torch.Tensor:
    """The tangent that sCM takes, in float32."""
    t = torch.linspace(0.2, 1.5, 4, dtype=torch.float64)
    cond = net.conditions.zeros(4)
    if isinstance(cond, dict):
        cond = {k: torch.ones_like(v) if k == "mask" else normal(*v.shape, seed=3) for k, v in cond.items()}
    level, x = TRIG.level(t, 4), normal(4, *net.shape)
    scale = level.alpha * level.sigma
    along = (scale * normal(4, *net.shape, seed=1), scale.flatten().double())
    return tangent(lambda x, t: velocity(net, x, t, cond), (x, t), along, how, h)[1]


def off(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


@pytest.mark.parametrize("name", TABLE)
def test_forward_mode_passes_through_every_kind_of_network(name):
    exact = derivative(a_network(name))
    assert off(derivative(a_network(name), "difference"), exact) < TABLE[name]
    checkpointed = World(layout=Layout(checkpoint_activations=True)).place(a_network(name))
    assert torch.equal(derivative(checkpointed.requires_grad_(False)), exact)
    half = World().place(a_network(name, "bf16"), "frozen")  # its blocks are stored in bfloat16
    assert off(derivative(half), exact) < BF16[name]
    assert off(derivative(half, "difference", 1e-3), exact) > 0.5


def two_ranks(rank: int, folder: str) -> None:
    """One of two processes that take the tangents through sharded networks."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    for name in TABLE:
        net = World.current(layout=Layout(placement="shard")).place(a_network(name))
        result = derivative(net.requires_grad_(False))
        if rank == 0:
            torch.save(result, f"{folder}/{name}")
    dist.barrier()
    dist.destroy_process_group()


def test_forward_mode_passes_through_networks_sharded_over_two_ranks(tmp_path: Path):
    torch.multiprocessing.spawn(two_ranks, (str(tmp_path),), nprocs=2)
    for name in TABLE:
        assert off(torch.load(tmp_path / name, weights_only=True), derivative(a_network(name))) < 1e-5
