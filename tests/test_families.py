"""Text-to-image families, tiny and random: each is called as its own pipeline calls it, and trains like any network."""

from __future__ import annotations

from copy import deepcopy

import diffusers
import pytest
import torch
import toy
from tiny import FAMILIES
from torch.nn import functional as F

from fewstep.diffusion.draws import Draws
from fewstep.diffusion.guidance import guided
from fewstep.diffusion.level import PREDICTIONS
from fewstep.engine.optim import Optim
from fewstep.engine.train import Engine, Train
from fewstep.engine.world import Layout, World
from fewstep.methods.base import Batch
from fewstep.methods.dmd2 import DMD2
from fewstep.networks.conditions import Texts
from fewstep.networks.denoiser import Denoiser
from fewstep.networks.lora import Lora, merge
from fewstep.networks.pretrained import new_head, open_teacher, save_denoiser

PREDICTS = {"sd15": "eps", "sd21": "v", "sdxl": "eps", "pixart": "eps", "dit": "eps"}  # the others a flow


class Rows:
    """A feed of a family's data."""

    def __init__(self, family):
        self.family = family

    def batches(self, position, batch, rank=0, world=1):
        while True:
            yield {k: v[rank::world] for k, v in self.family.rows(batch, seed=position + 1).items()}
            position += batch


@pytest.fixture(scope="module", params=FAMILIES)
def opened(request, tmp_path_factory):
    """A family's name, itself, and its teacher opened from a folder."""
    family = FAMILIES[request.param]
    net = open_teacher(family.save(tmp_path_factory.mktemp(request.param)))
    if isinstance(net.conditions, Texts):
        net.conditions = Texts(net.conditions.shapes, nothing=family.cond(1, seed=9))
    return request.param, family, net


def some(net: Denoiser, family, count: int = 3):
    level = net.schedule.level(net.schedule.ramp(torch.linspace(0.2, 1, count)), 4)
    return torch.randn(count, 4, 8, 8, generator=torch.Generator().manual_seed(0)), level, family.cond(count)


@torch.no_grad()
def test_a_family_is_called_as_its_pipeline_calls_it(opened):
    name, family, net = opened
    assert (net.prediction, net.shape) == (PREDICTS.get(name, "flow"), (4, 8, 8))
    x, level, cond = some(net, family)
    raw = family.call(net.backbone.model, x, (level.t * net.time_scale).float(), cond)
    assert torch.equal(net(x, level, cond, "raw"), raw) and raw.std() > 0.01
    skip, out = PREDICTIONS[net.prediction](level.alpha, level.sigma, 0.5)
    torch.testing.assert_close(net(x, level, cond), skip * x + out * raw)
    null = net.conditions.null(cond)
    both = net(x, level, cond), net(x, level, null)
    result = guided(net, x, level, cond, 3.0, null)
    torch.testing.assert_close(result, both[1] + 3 * (both[0] - both[1]), rtol=1e-3, atol=1e-3)
    assert (both[0] - both[1]).abs().max() > 1e-5


@torch.no_grad()
def test_a_familys_taps_are_maps_and_the_pass_leaves_at_the_last(opened):
    name, family, net = opened
    x, level, cond = some(net, family)
    taps = tuple(net.backbone.taps)
    x0, maps = net(x, level, cond, "both", at=taps)
    early = net(x, level, cond, "features", at=taps)
    assert torch.equal(x0, net(x, level, cond))
    for early_map, late_map in zip(early, maps, strict=True):
        assert torch.equal(early_map, late_map) and early_map.ndim == 4 and early_map.shape[2] == early_map.shape[3]
    assert new_head(net, taps)(maps).shape == (3,)
    ran = []
    model = net.backbone.model
    layer = next(getattr(model, name) for name in ("conv_out", "proj_out_2", "proj_out") if hasattr(model, name))
    last = layer.register_forward_hook(lambda *args: ran.append(1))
    net(x, level, cond, "features")
    last.remove()
    assert not ran


@torch.no_grad()
def test_a_family_takes_further_scalars_and_blocks_in_bf16(opened):
    name, family, net = opened
    x, level, cond = some(net, family)
    other = deepcopy(net).add_extra("w")
    assert torch.equal(other(x, level, cond, extra={"w": torch.ones(3)}), net(x, level, cond))
    torch.nn.init.normal_(other.extras["w"].out.bias)
    assert (other(x, level, cond, "raw", extra={"w": torch.ones(3)}) - net(x, level, cond, "raw")).abs().max() > 1e-3
    half = Denoiser(deepcopy(net.backbone), net.schedule, net.prediction, time_scale=net.time_scale, precision="bf16")
    raw, low = net(x, level, cond, "raw"), half(x, level, cond, "raw")
    assert 0 < (raw - low).abs().max() < 0.1 * raw.abs().max()


FOUR_STEPS = DMD2(student_steps=4, guidance=2.0)


def engine(net: Denoiser, family, lora: bool = False, method: DMD2 = FOUR_STEPS, **layout) -> Engine:
    """DMD2 in four steps with backward simulation, guidance and a GAN head, unless another is given."""
    base = deepcopy(net)
    copy = (lambda seed: Lora(base, 2, targets="all", seed=seed)) if lora else (lambda seed: deepcopy(base))
    torch.manual_seed(0)
    nets = {"teacher": base, "student": copy(1), "fake": copy(2), "disc": new_head(base)}
    optims = {role: Optim(lr=1e-3, warmup_steps=0) for role in method.roles}
    train = Train(steps=1, batch=4, report_every=1, save_every=1)
    return Engine(method, nets, optims, Rows(family), train, world=World(layout=Layout(**layout)))


@pytest.mark.parametrize("lora", [False, True], ids=["whole", "lora"])
def test_a_family_trains_is_saved_and_opened_again(opened, lora, tmp_path):
    name, family, net = opened
    run = engine(net, family, lora)
    before = {role: toy.weights(run.nets[role]) for role in run.nets}
    (report,) = toy.finish(run)
    assert {"student/match", "student/gan", "critic/denoise", "critic/gan"} <= report.keys()
    for role in ("student", "fake", "disc"):
        assert not toy.same(before[role], toy.weights(run.nets[role]))
    assert toy.same(before["teacher"], toy.weights(run.nets["teacher"]))
    again = engine(net, family, lora, checkpoint_activations=True)
    assert toy.finish(again) == [pytest.approx(report, rel=1e-4, abs=1e-6)]
    x, level, cond = some(net, family)
    student = run.nets["student"]
    with torch.no_grad():
        whole = merge(student, x, level, cond, tolerance=1e-3) if lora else student
        expected = student(x, level, cond, "raw")
        save_denoiser(whole, tmp_path / "student")
        result = open_teacher(tmp_path / "student")(x, level, cond, "raw")
    torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-5)
    assert (result - net(x, level, cond, "raw")).abs().max() > 1e-5


# A step of DMD2 by the letter: the losses of specs in float64, from the models as diffusers calls them


def literal(family, nets: dict, method: DMD2, rows: dict, draws: Draws) -> dict[str, torch.Tensor]:
    """The two phases' losses and the gradient on the student's images, as the paper and its code have them.

    One call at timestep 999; t in [20, 980] for matching, in [0, 999] elsewhere; eps-prediction; float64 throughout.
    """
    models = {role: deepcopy(nets[role]).double() for role in ("teacher", "student", "fake", "disc")}
    eps_of = lambda role, x, t, c: family.call(models[role].backbone.model, x, t, c)
    double = lambda cond: {k: v.double() for k, v in cond.items()}
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    bar = (1 - betas).cumprod(0)
    batch = len(rows["real"])

    def noised(x, name, low, high):
        t = low + ((high + 1 - low) * draws.uniform(f"{name}/t", batch)).floor().long()
        eps, ab = draws.normal(f"{name}/eps", x.shape).double(), bar[t].view(-1, 1, 1, 1)
        return ab.sqrt() * x + (1 - ab).sqrt() * eps, t.double(), eps, ab

    def logits(x_t, t, c):
        result = []
        handle = models["fake"].backbone.model.mid_block.register_forward_hook(lambda m, a, out: result.append(out))
        eps_of("fake", x_t, t, c)
        handle.remove()
        return models["disc"]((result[0],))

    cond = real_cond = double({k: v for k, v in rows.items() if k != "real"})
    null = {k: v.double().expand_as(cond[k]) for k, v in nets["student"].conditions.nothing.items()}
    z, last = draws.normal("z", rows["real"].shape).double(), torch.full((batch,), 999.0, dtype=torch.float64)
    x = (z - (1 - bar[999]).sqrt() * eps_of("student", z, last, cond)) / bar[999].sqrt()
    x = x.detach().requires_grad_()
    with torch.no_grad():
        x_t, t, _, ab = noised(x, "match", 20, 980)
        mu = lambda eps: (x_t - (1 - ab).sqrt() * eps) / ab.sqrt()
        unconditional, conditional = (eps_of("teacher", x_t, t, c) for c in (null, cond))
        real = mu(unconditional + method.guidance * (conditional - unconditional))
        weight = (x - real).abs().mean((1, 2, 3), keepdim=True)
        g = (mu(eps_of("fake", x_t, t, cond)) - real) / weight
    match = 0.5 * ((x - (x - g).detach()) ** 2).mean()
    gan = method.gan_weight * F.softplus(-logits(*noised(x, "gan", 0, 999)[:2], cond)).mean()
    (gradient,) = torch.autograd.grad(match + gan, x)
    fake = x.detach()
    x_t, t, eps, _ = noised(fake, "critic", 0, 999)
    denoise = ((eps_of("fake", x_t, t, cond) - eps) ** 2).mean()
    d_fake = logits(*noised(fake, "critic/fake", 0, 999)[:2], cond)
    d_real = logits(*noised(rows["real"].double(), "critic/real", 0, 999)[:2], real_cond)
    classify = method.critic_gan_weight * (F.softplus(d_fake).mean() + F.softplus(-d_real).mean())
    values = {"match": match, "gan": gan, "denoise": denoise, "classify": classify, "gradient": gradient, "g": g}
    return {name: value.detach() for name, value in values.items()}


@pytest.mark.parametrize("name", ["sd15", "sdxl"])
def test_a_step_of_dmd2_is_the_papers_to_the_letter(name, tmp_path):
    family = FAMILIES[name]
    teacher = open_teacher(family.save(tmp_path))
    teacher.conditions = Texts(teacher.conditions.shapes, nothing=family.cond(1, seed=9))
    method = DMD2(guidance=1.75, gan_weight=1e-3, share_draws=False)
    nets = {"teacher": teacher, "student": deepcopy(teacher), "fake": deepcopy(teacher), "disc": new_head(teacher)}
    for seed, role in enumerate(("student", "fake"), 1):  # no two networks agree, as after some training
        nets[role].backbone.model.load_state_dict(family.make(seed).state_dict())
    rows, draws = family.rows(4), Draws(3, 0)
    cond = teacher.conditions.of(rows)
    expected = literal(family, nets, method, rows, draws)

    z = draws.normal("z", rows["real"].shape)
    batch = Batch(rows["real"], cond, z, cond, draws, teacher.conditions)
    batch = method.prepare(nets, batch, ("student",))
    x = batch.x.detach().requires_grad_()
    terms, _ = method.student_loss(nets, batch.make(x=x))
    (gradient,) = torch.autograd.grad(sum(terms.values()), x)
    critic, _ = method.critic_loss(nets, batch.detached())
    result = {"match": terms["match"], "gan": terms["gan"], "denoise": critic["denoise"], "classify": critic["gan"]}
    result |= {"gradient": gradient, "g": method.matching(nets, batch)["gradient"]}
    for key, value in expected.items():
        difference = (result[key].double() - value).norm() / value.norm()
        print(f"{name} {key}: relative difference {difference:.1e}")
        assert difference < 1e-5, key
        assert value.abs().max() > 1e-6


@pytest.mark.parametrize("name", ["sd3", "sana"])
def test_a_flows_shift_is_that_of_its_scheduler(name, tmp_path):
    net = open_teacher(FAMILIES[name].save(tmp_path))
    calls = DMD2(student_steps=4).calls(net)
    euler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    euler.set_timesteps(sigmas=[1.0, 0.75, 0.5, 0.25])
    assert [call.sigma for call in calls] == pytest.approx(euler.sigmas[:4].tolist(), rel=1e-6)
    time = torch.tensor([call.t * net.time_scale for call in calls])
    assert time.tolist() == pytest.approx(euler.timesteps.tolist(), rel=1e-6)
