"""Methods that learn the teacher's trajectories: the exact map of a Gaussian leaves no residual, and training nears the
teacher's own map. LCM and PCM are in test_lcm.py, sCM in test_scm.py."""

from __future__ import annotations

import pytest
import torch
import toy

from fewstep.diffusion.draws import Draws
from fewstep.diffusion.losses import matching_gradient
from fewstep.diffusion.schedules import Flow
from fewstep.diffusion.tangent import FLOW, TRIG, flow_velocity, velocity
from fewstep.methods import METHODS, Batch
from fewstep.methods.instaflow import path
from fewstep.networks.conditions import Nothing

RCM, SCM, TBCM, BOOT, MDT = (METHODS[name] for name in ("rcm", "scm", "tbcm", "boot", "mdt"))
INSTAFLOW, TWINFLOW = METHODS["instaflow"], METHODS["twinflow"]
MEAN, STD = (0.3, -0.2), 0.25


def a_batch(count: int = 64, step: int = 5, data: bool = True) -> Batch:
    draws = Draws(0, step)
    real = toy.Mixture([MEAN], STD).sample(count, seed=step)[0] if data else None
    return Batch(real, None, draws.normal("z", (count, 2, 1, 1)), None, draws, Nothing())


def exact(teacher_std: float = STD) -> dict:
    """The exact map of a Gaussian as the student, and its denoiser as the teacher."""
    student = toy.ExactMap(MEAN, STD)
    return {"teacher": toy.Mixture([MEAN], teacher_std), "student": student, "target": student}


def gradient(loss: torch.Tensor, net: torch.nn.Module) -> torch.Tensor:
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(net.parameters()), retain_graph=True)])


MIXTURE = toy.OVERLAPPING


def trained(method, start, steps: int, **options):
    """An engine on the mixture after a short training, and its last report."""
    settings = {"batch": 96, "report_every": steps, "save_every": steps, "average_decay": 0.95}
    settings |= {"optim": {"betas": (0.9, 0.99)}, "lr": {"student": 2e-3, "fake": 4e-3}, "teacher": MIXTURE}
    engine = toy.make_engine(method, start=start, steps=steps, **settings | options)
    return engine, toy.finish(engine)[-1]


# rCM


def test_rcm_without_matching_is_scm_bit_for_bit():
    settings = {"mean": -0.8, "std": 1.6, "warmup_steps": 0, "tangents": "difference"}
    one, other = (
        toy.make_engine(method, steps=4, report_every=1, save_every=4)
        for method in (SCM(**settings), RCM(matching_weight=0, **settings))
    )
    assert toy.finish(one) == toy.finish(other) and other.nets.keys() == one.nets.keys()
    assert toy.same(toy.weights(one.nets["student"]), toy.weights(other.nets["student"]))


def test_rcm_without_tangents_is_dmd_summed_over_a_samples_values():
    method = RCM(tangent_weight=0, matching_weight=0.1)
    nets = {"teacher": toy.Mixture(), "student": toy.denoiser(1), "fake": toy.denoiser(2)}
    batch = method.prepare(nets, a_batch(), ("student",))
    terms, _ = method.loss(nets, batch)
    x_t, level, _ = method.noised(batch, "match")
    dmd, _ = matching_gradient(batch.x, nets["teacher"](x_t, level), nets["fake"](x_t, level))
    (dx,) = torch.autograd.grad(terms["match"], batch.x, retain_graph=True)
    torch.testing.assert_close(dx, (0.1 * 2 / len(dx) * dmd).detach(), rtol=1e-4, atol=1e-7)
    assert list(terms) == ["match"]


def test_rcms_rollout_descends_and_only_its_last_call_has_a_graph():
    method, calls = RCM(), []
    student = toy.denoiser(1)
    student.register_forward_hook(lambda net, args, out: calls.append((args[1].t, out.requires_grad)))
    for step in range(8):
        calls.clear()
        method.prepare({"student": student}, a_batch(16, step), ("student",))
        assert [graph for _, graph in calls] == [False] * (len(calls) - 1) + [True]
        assert all((b <= a).all() for (a, _), (b, _) in zip(calls, calls[1:], strict=False))
        assert len(calls) == 1 + Draws(0, step).choice("calls", 4)


def test_rcms_critic_has_the_teachers_own_loss_when_it_is_the_teacher():
    method, net = RCM(), toy.denoiser(1)
    batch = a_batch().make(x=a_batch().real)
    loss = method.critic_loss({"fake": net}, batch)[0]["denoise"]
    x_t, level, eps = method.noised(batch, "critic")
    target = level.alpha * eps - level.sigma * batch.x
    assert loss.item() == pytest.approx((velocity(net, x_t, level.t, None) - target).square().mean().item())


def test_rcm_trains_student_or_critic_and_logs_the_ratio_of_their_gradients():
    method = RCM(matching_weight=0.5, student_every=2, tangents="difference")
    _, report = trained(method, None, steps=8)
    assert report["updates/student"] == report["updates/critic"] == 4
    assert report["health/match_ratio"] == pytest.approx(0.5 * report["health/match_gradient"])


# TBCM


def test_tbcms_points_are_on_the_teachers_trajectories_with_its_velocities():
    method, nets, batch = TBCM(states=6), exact(), a_batch(data=False)
    levels = method.levels(batch)
    assert len(levels) == 6 and (levels[0].t == TRIG.t_max).all()
    t = torch.stack([level.t for level in levels])
    assert (t.diff(dim=0) < 0).all()  # a draw in each cell, so in descending order
    x, level, dx, _, _ = method.points(nets, batch)
    assert len(x) == 5 * len(batch.z)  # the state of pure noise is left out
    state = batch.z
    for i, (a, b) in enumerate(zip(levels, levels[1:], strict=False)):
        state = a.step(state, nets["teacher"](state, a), b)
        mine = slice(i * len(state), (i + 1) * len(state))
        torch.testing.assert_close(x[mine], state, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(level.t[mine], b.t)
        torch.testing.assert_close(dx[mine], velocity(nets["teacher"], state, b.t, None), rtol=1e-3, atol=1e-3)
    assert not dx.requires_grad


def test_tbcm_needs_no_data_and_one_teacher_call_a_state():
    method, calls = TBCM(states=4, tangents="difference"), []
    nets = exact()
    nets["teacher"].register_forward_hook(lambda *_: calls.append(1))
    _, health = method.loss(nets, a_batch(data=False))
    assert method.needs == () and len(calls) == 4
    assert [method.warm(step) for step in (500, 10_000, 16_000, 20_000)] == [0.5, 1, 0.875, 0.75]
    _, health = method.loss(nets, a_batch(step=20_000, data=False))
    method = method.model_copy(update={"calm": 1.0})
    assert method.loss(nets, a_batch(step=20_000, data=False))[1]["tangent_norm"] < 2e-3 < health["tangent_norm"]


# BOOT


def test_boots_step_is_ddims():
    """y_s = y + k (x0 - y) is the signal of Level.step, whatever the teacher says."""
    method, flow = BOOT(), Flow()
    t = torch.linspace(0.1, 0.99, 16, dtype=torch.float64)
    s = t - 0.05
    y, z, x0 = (torch.randn(16, 2, 1, 1, generator=torch.Generator().manual_seed(i)) for i in range(3))
    level, to = flow.level(t, 4), flow.level(s, 4)
    x_s = level.step(level.noise(y, z), x0, to)
    expected = (x_s - to.sigma * z) / to.alpha
    k = method.k(t, s).float().view(-1, 1, 1, 1)
    torch.testing.assert_close(y + k * (x0 - y), expected, rtol=1e-4, atol=1e-5)
    assert method.k(t, torch.zeros_like(t)).eq(1).all()  # the last step ends at the teacher's x0
    euler = BOOT(coefficient="euler").k(t, t - 1e-5)
    torch.testing.assert_close(euler, method.k(t, t - 1e-5), rtol=5e-3, atol=0)  # the same, to first order
    assert BOOT(coefficient="euler").k(t, s).max() <= 1


def test_boots_boundary_holds_at_the_start_for_any_prediction():
    teacher = toy.denoiser(1)
    nets = {"teacher": teacher, "student": BOOT().nets(toy.Make(teacher, teacher))["student"]}
    terms, _ = BOOT().loss(nets, a_batch(data=False))
    assert terms["boundary"] == 0 and terms["bootstrap"] > 0 and BOOT().needs == ()


class Signal(torch.nn.Module):
    """The exact signal (x_t - t z) / (1 - t) of a Gaussian's path from z, asked for at a flow time."""

    schedule = toy.EDM()

    def forward(self, x, level, cond=None, extra=None):
        z, at = x / level.start, Flow().level(extra["time"].clamp(max=0.9999), 4)
        mean = torch.tensor(MEAN).view(1, 2, 1, 1)
        x_t = at.alpha * mean + ((at.alpha * STD) ** 2 + at.sigma**2).sqrt() * z
        return (x_t - at.sigma * z) / at.alpha


@pytest.mark.parametrize("coefficient", ["exponential", "euler"])
def test_the_exact_signal_leaves_a_residual_of_second_order(coefficient):
    def residual(step: float) -> float:
        nets = {"teacher": toy.Mixture([MEAN], STD), "student": Signal()}
        terms, _ = BOOT(step=step, coefficient=coefficient).loss(nets, a_batch(2000, data=False))
        return terms["bootstrap"].item() ** 0.5

    assert residual(0.01) < 3e-3 and residual(0.01) < residual(0.04) / 3


# MDT-dist


@pytest.mark.parametrize("tangents, bound", [("forward", 2e-4), ("difference", 2e-3)])
def test_the_exact_mean_velocity_matches_the_teachers(tangents, bound):
    method = MDT(tangents=tangents)
    _, health = method.loss(exact(), a_batch())
    assert health["residual_norm"] < bound
    terms, wrong = method.loss(exact(2 * STD), a_batch())
    assert wrong["residual_norm"] > 50 * bound and terms["distillation"] > 1e-3


def test_the_released_normalisation_has_another_fixed_point():
    """The derivative alone over its norm: the exact map is left, however long one trains. The residual's is not."""
    norms = {
        kind: MDT(normalise=kind).loss(exact(), a_batch())[1]["residual_norm"] for kind in ("derivative", "residual")
    }
    assert norms["derivative"] > 0.1 and norms["residual"] < 2e-2


# InstaFlow


def test_a_pair_is_the_teachers_euler_path_and_a_function_of_seed_and_step():
    z = a_batch(data=False).z
    end, bent = path(MIXTURE, z, None, 8)
    again, _ = path(MIXTURE, a_batch(data=False).z, None, 8)
    assert torch.equal(end, again)
    levels = [FLOW.level(torch.full((64,), FLOW.t_max * (1 - i / 8), dtype=torch.float64), 4) for i in range(8)]
    x = z * levels[0].start
    for level, to in zip(levels, levels[1:], strict=False):
        x = level.step(x, MIXTURE(x, level), to)
    torch.testing.assert_close(end, MIXTURE(x, levels[-1]), rtol=1e-4, atol=1e-4)
    straight = lambda x, level, cond: torch.zeros_like(x)  # all paths lead to one point
    assert path(straight, z, None, 8)[1] < 1e-3 < bent


def test_stored_pairs_give_the_loss_of_those_that_the_teacher_makes():
    fresh, stored = INSTAFLOW(teacher_steps=4), INSTAFLOW(stored=True)
    nets, batch = {"teacher": MIXTURE, "student": toy.denoiser(1)}, a_batch(data=False)
    end, _ = path(MIXTURE, batch.z, None, 4)
    pairs = Batch(end, None, torch.zeros_like(end), None, batch.draws, Nothing(), rows={"noise": batch.z})
    one, health = fresh.loss(nets, batch)
    assert torch.equal(stored.loss(nets | {"teacher": None}, pairs)[0]["pair"], one["pair"])
    assert stored.needs == ("real", "noise") and fresh.needs == () and health["straightness"] > 0


def test_reflow_straightens_and_the_distilled_step_nears_the_teachers_endpoint(pretrained):
    first, _ = trained(INSTAFLOW(teacher_steps=12), pretrained, steps=120)
    z = torch.randn(1000, 2, 1, 1, generator=torch.Generator().manual_seed(3))
    bent, straight = (path(net, z, None, 12)[1].item() for net in (MIXTURE, first.student))
    assert straight < bent / 5
    last = INSTAFLOW(stage="distil", teacher_steps=12)
    second, _ = trained(last, first.student, steps=40, teacher=first.student, data=MIXTURE)
    error = toy.student_map_error(second, MIXTURE)
    print(f"straightness {bent:.4f} -> {straight:.4f}; map error at one call {error:.3f}")
    assert error < 1


# TwinFlow


def test_twinflow_starts_as_the_teacher_at_every_span_and_side():
    method, teacher = TWINFLOW(), toy.denoiser(1)
    student = method.nets(toy.Make(teacher, teacher))["student"]
    x, t = torch.randn(8, 2, 1, 1), torch.linspace(0.1, 0.9, 8, dtype=torch.float64)
    for side in (1.0, -1.0):
        assert torch.equal(method.flow(student, None, side)(x, t, t), flow_velocity(teacher, x, t, None))
    assert "teacher" not in method.nets(toy.Make()) and method.needs == ("real",)


def test_twinflows_map_has_no_residual_at_the_exact_mean_velocity():
    """Jumps of a Gaussian's flow are affine: from t to r, x goes to (1 - r) m + std_r / std_t (x - (1 - t) m)."""
    mean, spread = torch.tensor(MEAN).view(1, 2, 1, 1), lambda t: (((1 - t) * STD) ** 2 + t**2).sqrt()

    def jump(x, t, r):
        t, r = (v.view(-1, 1, 1, 1) for v in (t, r))
        to = (1 - r) * mean + spread(r) / spread(t) * (x - (1 - t) * mean)
        return ((x - to) / (t - r)).float()

    t = torch.linspace(0.2, 0.95, 64, dtype=torch.float64)
    r, z = 0.3 * t, a_batch().z
    x = FLOW.level(t, 4).noise(a_batch().real, z)
    v = flow_velocity(toy.Mixture([MEAN], STD), x, t, None)
    for step, bound in ((0.01, 0.03), (0.001, 0.004)):
        method = TWINFLOW(step=step)
        assert method.residual(jump(x, t, r), jump, x, t, r, v).abs().max() < bound
    assert TWINFLOW().residual(jump(x, t, r) + 0.1, jump, x, t, r, v).abs().mean() > 0.3


def test_the_correction_reaches_the_one_step_map_alone():
    method = TWINFLOW(twin_weight=0)
    student = method.nets(toy.Make(toy.denoiser(1)))["student"]
    nets, graphs = {"student": student, "target": student}, []
    student.register_forward_hook(lambda net, args, out: graphs.append(out.requires_grad))
    terms, _ = method.loss(nets, a_batch())
    with torch.no_grad():  # the first call is the map's; without it nothing of the term is left
        expected = graphs[0]
    assert expected and graphs.count(True) == 3 and terms["rectify"].requires_grad  # the map, a jump and the anchor


def test_without_images_twinflow_asks_for_its_anchor():
    with pytest.raises(ValueError, match="anchor_weight: 0, and without images nothing else keeps the flow"):
        TWINFLOW(source="teacher", anchor_weight=0)
    method = TWINFLOW(source="teacher")
    assert method.needs == () and "teacher" in method.nets(toy.Make())


# Training


@pytest.mark.parametrize(
    "method, steps, bound",
    [
        (RCM(tangents="difference", student_every=2, mean=-1.0, std=1.4), 240, 1.9),
        (TBCM(tangents="difference", states=6, warmup_steps=30, shift=0.5), 150, 1.7),
        (BOOT(step=0.1), 100, 0.8),
        (MDT(mean=-1.0, std=1.5, distillation_weight=0), 200, 1.2),
        (TWINFLOW(), 100, 1.7),
        (TWINFLOW(source="teacher", step=0.02), 100, 1.6),
    ],
    ids=["rcm", "tbcm", "boot", "mdt", "twinflow", "twinflow-image-free"],
)
def test_training_nears_the_teachers_own_map(method, steps, bound, pretrained):
    """From 3.0 of the error of four Euler steps. These runs are short: after 500 student steps, 4 s, sCM is
    at 0.45, rCM at 0.42, MDT at 0.40, and TwinFlow at 0.47 after 400."""
    engine, _ = trained(method, pretrained, steps)
    error = toy.student_map_error(engine, MIXTURE)
    print(f"{method.tag}: RMS map error at one call over the teacher's at four Euler steps: {error:.3f}")
    assert error < bound
