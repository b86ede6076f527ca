"""Consistency over a solver's steps: LCM, PCM and Hyper-SD, on closed forms and on the toy."""

from __future__ import annotations

import pytest
import torch
import toy

from fewstep.diffusion.draws import Draws, grid_level
from fewstep.diffusion.samplers import Call, run_calls
from fewstep.diffusion.schedules import DDPM
from fewstep.methods import METHODS, Batch
from fewstep.networks.conditions import Nothing

LCM, PCM, HYPER = METHODS["lcm"], METHODS["pcm"], METHODS["hyper_sd"]
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
    low, high = seen
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
    end = method.end_number(number, None)
    assert end.tolist() == [0] * 10 + [10] * 10 + [20] * 10 + [30] * 10
    assert (end <= number - 1).all()  # the neighbour's own target is in the same phase
    with pytest.raises(ValueError, match="solver_steps: 50 is no multiple of student_steps 4"):
        PCM(solver_steps=50, student_steps=4)


# Hyper-SD


@pytest.mark.parametrize("segments", [8, 4, 2, 1])
@pytest.mark.parametrize("ends", ["uniform", "mixed", "conditioned"])
def test_states_meet_inside_their_segment(segments, ends):
    method, draws = HYPER(segments=segments, ends=ends), Draws(0, 0)
    number = draws.integers("t", 1, 40, 4000)
    end, size = method.end_number(number, draws), 40 // segments
    edge = (number - 1) // size * size
    assert (edge <= end).all() and (end <= number - 1).all()
    share = (end == edge).double().mean().item()
    assert end.min() == 0 and len(end.unique()) > 35  # every level is an end of some pair, if rarely
    assert share > 0.5 if ends == "mixed" else share < 0.6
    with pytest.raises(ValueError, match="solver_steps: 40 is no multiple of segments 3"):
        HYPER(segments=3)


class Jump(torch.nn.Module):
    """The x0 with which a step from a level lands on the Gaussian's path at the angle `end`."""

    def __init__(self, schedule):
        super().__init__()
        self.schedule = schedule

    def forward(self, x, level, cond=None, extra=None):
        end, mean = extra["end"].double().view_as(level.alpha), torch.tensor(MEAN).view(1, 2, 1, 1)
        own = self.schedule.level(self.schedule.time(end.flatten()).clamp(min=self.schedule.t_min), x.ndim)
        spread = lambda level: ((level.alpha * STD) ** 2 + level.sigma**2).sqrt()
        to = own.alpha * mean + spread(own) / spread(level) * (x - level.alpha * mean)
        share = own.alpha - own.sigma / level.sigma * level.alpha  # 0 at its end already, where any x0 will do
        return torch.where(share.abs() < 1e-6, 0, (to - own.sigma / level.sigma * x) / share)


def test_a_student_that_knows_its_end_is_consistent_for_all_ends_on_the_exact_path():
    def residual(steps: int) -> float:
        net = Jump(toy.EDM())
        nets = {"teacher": toy.Mixture([MEAN], STD), "student": net, "target": net}
        method = HYPER(segments=1, student_steps=1, solver_steps=steps, ends="conditioned", distance="mse")
        return method.pair(nets, a_batch())["ours"].sub(method.pair(nets, a_batch())["goal"]).square().mean().sqrt()

    assert residual(500) < residual(50) / 4 and residual(500) < 2e-2


@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
def test_tcds_sampling_keeps_the_distribution_whatever_its_noise(eta):
    net, method = Jump(toy.EDM()), HYPER(segments=4, student_steps=4, ends="conditioned", eta=eta)
    calls = method.calls(net)
    x = run_calls({"student": net}, calls, a_batch(20_000).z, None, Draws(0, 0))
    assert x.mean((0, 2, 3)).tolist() == pytest.approx(list(MEAN), abs=0.01)
    assert x.std((0, 2, 3)).tolist() == pytest.approx([STD, STD], rel=0.03)
    assert {call.then for call in calls[:-1]} == {"renoise" if eta else "step"}


def test_tcds_sampling_is_diffusers():
    from diffusers import TCDScheduler

    sd, eta = DDPM("scaled_linear", 0.00085, 0.012), 0.3
    theirs = TCDScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, clip_sample=False)
    theirs.set_timesteps(4, original_inference_steps=40)
    net = lambda x, level, cond=None: 0.3 * torch.tanh(x)
    net.schedule = sd
    z = torch.randn(3, 2, 1, 1, generator=torch.Generator().manual_seed(1))
    noise = [torch.randn(z.shape, generator=torch.Generator().manual_seed(i)) for i in range(4)]
    calls = HYPER(segments=4, student_steps=4, eta=eta).calls(net)
    ours = run_calls({"student": net}, calls, z, None, toy.FixedDraws(noise))
    x, alpha = z, theirs.alphas_cumprod.sqrt()
    for i, t in enumerate(theirs.timesteps[:-1]):
        eps = (x - alpha[t] * net(x, None)) / (1 - alpha[t] ** 2).sqrt()
        x = theirs.step(eps, t, x, eta=eta, generator=torch.Generator().manual_seed(i)).prev_sample
    torch.testing.assert_close(ours, net(x, None), rtol=5e-3, atol=5e-3)  # they round 1 - eta of an index down


def test_feedback_is_the_rewards_and_ends_at_its_goal():
    method = HYPER(feedback_weight=2.0, student_steps=2, segments=2, reward_goal=50.0)
    nets = method.nets(toy.Make()) | {"target": toy.denoiser()}
    nets["reward"] = lambda x, cond: x.flatten(1).mean(1)
    batch = method.prepare(nets, a_batch(16), ("student",))
    terms, health = method.loss(nets, batch)
    assert terms["feedback"].requires_grad
    assert terms["feedback"].item() == pytest.approx(2 * (50 - health["reward"].item()))
    enough = method.model_copy(update={"reward_goal": -100.0})
    assert enough.loss(nets, batch)[0]["feedback"] == 0
    with pytest.raises(ValueError, match="consistency_weight: 0, and so are"):
        HYPER(consistency_weight=0)


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
