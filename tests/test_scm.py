"""sCM: an exact map has no residual, the gradient is the consistency gradient, one call is near the teacher's map."""

from __future__ import annotations

import pytest
import torch
import toy
from tiny import FAMILIES

from fewstep.diffusion.draws import Draws, lognormal_level
from fewstep.diffusion.samplers import run_calls
from fewstep.diffusion.tangent import TRIG, tangent, velocity
from fewstep.methods import METHODS, Batch
from fewstep.networks.conditions import Nothing
from fewstep.networks.pretrained import open_teacher, save_denoiser

SCM = METHODS["scm"]
MEAN, STD = (0.3, -0.2), 0.25


def a_batch(count: int = 64, step: int = 5) -> Batch:
    draws = Draws(0, step)
    real, _ = toy.Mixture([MEAN], STD).sample(count, seed=step)
    return Batch(real, None, draws.normal("z", real.shape), None, draws, Nothing())


@pytest.mark.parametrize("tangents, bound", [("forward", 2e-4), ("difference", 2e-3)])
def test_the_exact_map_of_a_gaussian_has_no_residual(tangents, bound):
    method = SCM(warmup_steps=0, tangents=tangents)
    nets = {"teacher": toy.Mixture([MEAN], STD), "student": toy.ExactMap(MEAN, STD)}
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


def test_one_call_of_the_student_is_nearer_to_the_teachers_map_than_four_euler_steps(pretrained):
    mixture, method = toy.OVERLAPPING, SCM(warmup_steps=0, tangents="difference")
    train = {"steps": 300, "batch": 96, "report_every": 150, "save_every": 300, "average_decay": 0.95}
    engine = toy.make_engine(method, teacher=mixture, start=pretrained, lr={"student": 2e-3}, **train)
    first, last = (report["health/tangent_norm"] for report in toy.finish(engine))
    assert last < 0.9 * first
    error = toy.student_map_error(engine, mixture)
    print(f"RMS map error at one call over the teacher's at four Euler steps: {error:.3f}")
    assert error < 1
    z = torch.randn(2000, 2, 1, 1, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        x = run_calls({"student": engine.student}, method.calls(engine.student), z, None, Draws(0, 0))
    assert toy.energy(x, mixture.sample(2000, seed=77)[0]) < 0.06  # from 0.56


def test_two_calls_are_at_the_papers_times():
    calls = SCM(times=(1.5583, 1.1)).calls(toy.denoiser())
    assert [call.sigma / call.alpha for call in calls] == pytest.approx([80.0, 1.9648], rel=2e-2)


def test_without_a_teacher_the_velocity_is_the_datas_own_and_the_exact_map_has_no_residual_on_average():
    """Consistency training: cos t eps - sin t x0 is an unbiased velocity, so the residual is noise of mean zero."""
    method = SCM(warmup_steps=0, training=True)
    assert not method.needs_teacher and list(method.nets(toy.Make())) == ["student"]
    batch = a_batch(20_000)
    x, level, dx, _, _ = method.points({}, batch)
    exact = velocity(toy.Mixture([MEAN], STD), x, level.t, None).detach()
    near = ((level.t - 0.7).abs() < 0.05).view(-1)
    error = (dx - exact)[near].mean((0, 2, 3)).abs().max()
    assert error < 4 * (dx - exact)[near].std() / near.sum() ** 0.5 and (dx - exact).abs().mean() > 0.1
    with pytest.raises(ValueError, match="consistency training has no teacher to guide"):
        SCM(training=True, guidance=2)


def test_the_learned_weight_starts_at_one_and_goes_to_the_inverse_of_the_loss():
    """The minimum of e^w l - w over w is where e^w l is 1 on average."""
    method, plain = SCM(weighting="learned"), SCM()
    nets = method.nets(toy.Make(toy.denoiser(1), toy.Mixture([MEAN], STD)))
    batch = a_batch()
    one = plain.loss(nets, batch)[0]["tangent"]
    assert method.loss(nets, batch)[0]["tangent"].item() == pytest.approx(one.item() / 2, rel=1e-6)  # D = 2 values
    optim = torch.optim.Adam(nets["weighting"].parameters(), lr=0.1)
    for _ in range(60):
        optim.zero_grad()
        method.loss(nets, batch)[0]["tangent"].backward()
        optim.step()
    w = nets["weighting"](method.points(nets, batch)[1].t)
    assert w.mean() > 0.5 and (method.loss(nets, batch)[0]["tangent"] + w.mean()).item() == pytest.approx(1, rel=0.05)


def test_a_student_with_the_guidance_scale_as_input_starts_as_the_teacher_at_every_scale():
    method = SCM(guidance=2.0, guidance_range=(1.0, 3.0))
    teacher = toy.denoiser(1, classes=4)
    student = method.nets(toy.Make(teacher, teacher))["student"]
    level, x, cond = TRIG.level(torch.tensor([0.3, 1.5]), 4), torch.randn(2, 2, 1, 1), torch.tensor([0, 4])
    for scale in (1.0, 2.5):
        conditioned = method.with_scalars(student, torch.full((2,), scale))
        assert torch.equal(conditioned(x, level, cond), teacher(x, level, cond))
    assert [dict(call.extra) for call in method.calls(student)] == [{"guidance": 2.0}]
    scales = method.scale(Draws(0, 0), 4000)
    assert 1 <= scales.min() and scales.max() < 3 and abs(scales.mean() - 2) < 0.05
    with pytest.raises(ValueError, match="give the lower one first"):
        SCM(guidance_range=(3, 1))


# SANA-Sprint's preparation of the teacher


def test_a_teacher_keeps_its_answers_with_another_factor_on_its_time(pretrained):
    method = METHODS["preparation"](time_scale=0.25, mean=-0.5)
    train = {"steps": 400, "batch": 96, "report_every": 20, "save_every": 400}
    options = {"data": toy.OVERLAPPING, "lr": {"student": 4e-3}, "optim": {"decay_from": 0.3}}
    before = toy.weights(pretrained)
    engine = toy.make_engine(method, teacher=pretrained, start=pretrained, **options, **train)
    reports = toy.finish(engine)
    first, *_, last = ((r["student/mse"] / r["health/teacher_square"]) ** 0.5 for r in reports)
    print(f"relative error of the outputs: {first:.3f} in the first steps, {last:.3f} at the end")
    assert (pretrained.time_scale, engine.student.time_scale) == (1.0, 0.25)
    assert last < 0.15 < 0.35 < first and toy.same(toy.weights(pretrained), before)
    sprint = METHODS["sana_sprint"]().nets(toy.Make(engine.student, engine.student))
    x, extra = torch.randn(8, 2, 1, 1), {"guidance": torch.full((8,), 4.5)}
    level = TRIG.level(torch.linspace(0.1, 1.5, 8), 4)
    assert torch.equal(sprint["student"](x, level, extra=extra), sprint["teacher"](x, level))


def test_a_prepared_transformer_has_the_norms_and_is_stock_diffusers_again(tmp_path):
    family = FAMILIES["sana"]
    teacher = open_teacher(family.save(tmp_path / "sana"))
    prepared = METHODS["preparation"](qk_norm=True).nets(toy.Make(teacher, teacher))["student"]
    own, theirs = prepared.state_dict(), teacher.state_dict()
    added = own.keys() - theirs.keys()
    assert (teacher.time_scale, prepared.time_scale) == (1000.0, 1.0)
    assert added and all(".norm_q." in name or ".norm_k." in name for name in added)
    assert all(torch.equal(own[name], value) for name, value in theirs.items())

    save_denoiser(prepared, tmp_path / "prepared")
    again, cond = open_teacher(tmp_path / "prepared"), family.cond(2)
    x, level = torch.randn(2, *teacher.shape), prepared.schedule.level(torch.tensor([0.3, 0.9]), 4)
    sprint = METHODS["sana_sprint"]().nets(toy.Make(again, again))
    with torch.no_grad():
        expected = prepared(x, level, cond)
        assert torch.equal(again(x, level, cond), expected) and not torch.equal(teacher(x, level, cond), expected)
        student = sprint["student"](x, level, cond, extra={"guidance": torch.tensor([1.0, 4.5])})
        assert torch.equal(student, expected)


def test_a_network_without_a_norm_of_queries_and_keys_says_which_ones_have_it(tmp_path):
    teacher = open_teacher(FAMILIES["pixart"].save(tmp_path / "pixart"))
    with pytest.raises(ValueError, match="qk_norm: PixArtTransformer2DModel has no norm of queries and keys; Sana"):
        METHODS["preparation"](qk_norm=True).nets(toy.Make(teacher, teacher))
