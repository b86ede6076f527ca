"""Consistency over a solver's steps: LCM and PCM, on closed forms and on the toy."""

from __future__ import annotations

import pytest
import torch
import toy

from fewstep.diffusion.draws import Draws, grid_level
from fewstep.diffusion.samplers import Call
from fewstep.methods import METHODS, Batch
from fewstep.networks.conditions import Nothing

LCM, PCM = METHODS["lcm"], METHODS["pcm"]
MEAN, STD = (0.3, -0.2), 0.25


def a_batch(count: int = 256, step: int = 5) -> Batch:
    draws = Draws(0, step)
    real, _ = toy.Mixture([MEAN], STD).sample(count, seed=step)
    return Batch(real, None, draws.normal("z", real.shape), None, draws, Nothing())


@pytest.mark.parametrize("kind", [LCM, PCM])
def test_the_exact_map_of_a_gaussian_is_consistent_up_to_the_solvers_step(kind):
    """The residual is the solver's own error, which falls with the number of its steps, four-fold a halved step."""

    def residual(steps: int, std: float = STD) -> float:
        method = kind(solver_steps=steps, student_steps=1, distance="mse")
        net = toy.ExactMap(MEAN, STD)
        nets = {"teacher": toy.Mixture([MEAN], std), "student": net, "target": net}
        return method.loss(nets, a_batch())[0]["consistency"].item() ** 0.5

    coarse, fine = residual(50), residual(500)
    assert fine < 2e-3 and fine < coarse / 6
    assert residual(50, std=2 * STD) > 5 * coarse  # of another teacher's path


def test_neighbours_are_one_step_of_the_grid_apart_and_meet_at_the_clean_end():
    method, seen = LCM(guidance=1.0), []
    net = toy.ExactMap(MEAN, STD)
    record = lambda x, level, cond=None: seen.append(level) or net(x, level, cond)
    method.loss({"teacher": toy.Mixture([MEAN], STD), "student": record, "target": record}, a_batch())
    high, low = seen
    grid = grid_level(net.schedule, torch.arange(51), 50, torch.zeros(51, 1, 1, 1)).sigma.flatten()
    number = (high.sigma.flatten()[:, None] - grid).abs().argmin(1)
    assert torch.equal(high.sigma.flatten(), grid[number]) and torch.equal(low.sigma.flatten(), grid[number - 1])
    assert number.min() == 1 and number.max() == 50  # off by one, the ends would be 0 or 49


def test_the_calls_are_lcms_and_pcms():
    net = toy.denoiser()
    assert LCM(student_steps=4).numbers() == [50, 38, 25, 13]  # timesteps 999, 759, 499, 259, as diffusers has them
    assert [round(call.sigma, 4) for call in LCM(student_steps=1).calls(net)] == [80.0]
    calls = PCM(student_steps=4).calls(net)
    assert PCM(student_steps=4).numbers() == [40, 30, 20, 10] and {call.then for call in calls} == {"step"}
    assert all(isinstance(call, Call) for call in calls)


def test_a_phase_ends_at_the_edge_below_and_no_pair_crosses_one():
    method = PCM(student_steps=4)
    number = torch.arange(1, 41)
    end = method.end(number, None)
    assert end.tolist() == [0] * 10 + [10] * 10 + [20] * 10 + [30] * 10
    assert (end <= number - 1).all()  # the neighbour's own target is in the same phase
    with pytest.raises(ValueError, match="solver_steps: 50 is no multiple of student_steps 4"):
        PCM(solver_steps=50, student_steps=4)


@pytest.mark.parametrize(
    "method, bound",
    [(LCM(student_steps=1, solver_steps=20, target_decay=0.9), 1.7), (PCM(student_steps=4, target_decay=0.9), 0.85)],
    ids=["lcm", "pcm"],
)
def test_the_student_is_nearer_to_the_teachers_map_than_its_four_euler_steps(method, bound, pretrained):
    mixture = toy.OVERLAPPING
    train = {"steps": 150, "batch": 96, "report_every": 150, "save_every": 150, "average_decay": 0.95}
    engine = toy.make_engine(method, teacher=mixture, start=pretrained, lr={"student": 2e-3}, **train)
    toy.finish(engine)
    error = toy.student_map_error(engine, mixture)
    print(f"{method.tag}: RMS map error over that of the teacher at four Euler steps: {error:.3f}")
    assert error < bound
