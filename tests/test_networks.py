"""Networks: diffusers models as denoisers, their features, guidance, averages, heads, and their folders."""

from __future__ import annotations

import json
import math
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace

import diffusers
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from fewstep.config import ConfigError
from fewstep.diffusion.draws import Draws
from fewstep.diffusion.guidance import guided
from fewstep.diffusion.level import PREDICTIONS, Level
from fewstep.diffusion.samplers import heun, run_calls
from fewstep.diffusion.schedules import DDPM, EDM, Flow, Trig, from_config, to_config
from fewstep.methods.dmd2 import DMD2
from fewstep.networks.average import Exponential, Power, average
from fewstep.networks.backbones import Backbone, Transformer, UNet
from fewstep.networks.conditions import Labels
from fewstep.networks.denoiser import Denoiser
from fewstep.networks.families import TextUNet
from fewstep.networks.heads import Head
from fewstep.networks.pretrained import Network, new_denoiser, new_head, open_teacher, save_denoiser
from fewstep.networks.schedulers import from_scheduler

SD = DDPM("scaled_linear", 0.00085, 0.012)
SMALL = {
    "sample_size": 8,
    "in_channels": 2,
    "out_channels": 2,
    "layers_per_block": 1,
    "block_out_channels": (8, 16),
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    "attention_head_dim": 8,
    "norm_num_groups": 4,
}
TEXT = SMALL | {
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "cross_attention_dim": 12,
    "transformer_layers_per_block": 1,
}
SDXL = TEXT | {
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 4,
    "projection_class_embeddings_input_dim": 6 * 4 + 10,
}
DIT = {
    "sample_size": 8,
    "in_channels": 2,
    "out_channels": 4,
    "num_layers": 3,
    "num_attention_heads": 2,
    "attention_head_dim": 4,
    "num_embeds_ada_norm": 5,
}


def unet(seed: int = 0, **config) -> diffusers.UNet2DModel:
    torch.manual_seed(seed)
    return diffusers.UNet2DModel(**SMALL | config).eval()


def labelled(precision: str = "fp32", patch: int = 1, **kwargs) -> Denoiser:
    """A network of 5 classes and a null class with random weights everywhere."""
    channels = 2 * patch**2
    model = unet(num_class_embeds=6, in_channels=channels, out_channels=channels)
    return Denoiser(
        UNet(model, 5, patch), kwargs.pop("schedule", EDM()), kwargs.pop("prediction", "edm"), precision=precision
    )


def level(schedule, *times: float) -> Level:
    return schedule.level(torch.tensor(times, dtype=torch.float64), 4)


def config_of(scheduler) -> dict:
    """The content of its scheduler_config.json."""
    return json.loads(scheduler.to_json_string())


def draw(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# Denoiser


class Known(Backbone):
    """A backbone with a target for output, which remembers what it was called with."""

    def __init__(self):
        nn.Module.__init__(self)
        self.shape, self.classes, self.seen, self.target = (2, 8, 8), None, None, None

    def forward(self, x, time, cond, mode, *taps):
        self.seen = (x, time)
        return self.target


SCHEDULES = {"edm": EDM(), "ddpm": DDPM(), "sd": SD, "zero_snr": DDPM(zero_snr=True), "flow": Flow(), "trig": Trig()}


def trained(prediction: str, name: str) -> bool:
    """True if a network of this prediction can have this schedule."""
    return name == "edm" if prediction == "edm" else prediction != "eps" or name not in ("zero_snr", "flow", "trig")


CELLS = [(p, name) for p in PREDICTIONS for name in SCHEDULES if trained(p, name)]


@pytest.mark.parametrize("prediction, name", CELLS)
def test_a_perfect_network_gives_back_x0_at_a_level_of_any_other_schedule(prediction, name):
    own = SCHEDULES[name]
    x0, eps = draw(1, 4, 2, 8, 8), draw(2, 4, 2, 8, 8)
    given = level(EDM(), 0.05, 0.5, 2.0, 12.0)
    net = Denoiser(Known(), own, prediction, data_std=0.5)
    mine, t = net.own_level(given, 4)
    c_skip, c_out = PREDICTIONS[prediction](mine.alpha.double(), mine.sigma.double(), 0.5)
    net.backbone.target = ((x0 - c_skip * mine.noise(x0, eps)) / c_out).float()
    result = net(given.noise(x0, eps), given)
    assert (result - x0).abs().max() < 2e-4
    if prediction != "edm":
        x, time = net.backbone.seen
        assert (x - mine.noise(x0, eps)).abs().max() < 1e-5
        assert torch.equal(time, t.float())


def test_a_prediction_without_an_x0_on_its_schedule_is_refused():
    for name, schedule in SCHEDULES.items():
        for prediction in PREDICTIONS:
            if not trained(prediction, name):
                with pytest.raises(ValueError, match=f"prediction: {prediction} .* {schedule.name}"):
                    Denoiser(Known(), schedule, prediction)
    assert Denoiser(Known(), Flow(t_max=0.99), "eps").prediction == "eps"  # alpha stays above 0
    assert Denoiser(Known(), DDPM("squaredcos_cap_v2"), "eps").prediction == "eps"


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_level_of_the_networks_own_schedule_is_answered_where_it_was_made(name):
    own = SCHEDULES[name]
    net, t = Denoiser(Known(), own, "edm" if name == "edm" else "v"), own.ramp(torch.linspace(0, 1, 7))
    net.backbone.target = draw(1, 7, 2, 8, 8)
    made = own.level(t, 4)
    mine, time = net.own_level(made, 4)
    assert mine is made and torch.equal(time, t)  # no rounding to alpha and sigma on the way
    x_t = draw(2, 7, 2, 8, 8)
    result = net(x_t, made)
    x, time = net.backbone.seen
    assert torch.equal(time, ((t.log() / 4) if name == "edm" else t).float())
    assert name == "edm" or x is x_t
    # the same level without its origin takes the way over the angle and arrives within rounding
    unknown = Level(made.alpha, made.sigma)
    torch.testing.assert_close(net.own_level(unknown, 4)[1], t, rtol=1e-5, atol=1e-3 if isinstance(own, DDPM) else 1e-7)
    torch.testing.assert_close(net(x_t, unknown), result, rtol=1e-4, atol=1e-5)
    part = made.map(lambda v: v[2:4])
    assert torch.equal(net.own_level(part, 4)[1], t[2:4]) and part.alpha.shape == (2, 1, 1, 1)


def test_a_call_at_the_networks_own_schedule_takes_few_operations_beside_the_backbone():
    class Count(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, f, types, args=(), kwargs=None):
            self.count += 1
            return f(*args, **(kwargs or {}))

    counts = {}
    for name, prediction in (("edm", "edm"), ("ddpm", "eps"), ("sd", "v"), ("flow", "flow"), ("trig", "v")):
        net, own, x = Denoiser(Known(), SCHEDULES[name], prediction), SCHEDULES[name], draw(1, 2, 2, 8, 8)
        net.backbone.target = x
        made = own.level(own.ramp(torch.tensor([0.2, 0.7])), 4)
        with torch.no_grad(), Count() as count:
            net(x, made)
        counts[name] = count.count
    # 37, 44, 49, 31 and 30 by the way over the angle
    assert counts == {"edm": 21, "ddpm": 9, "sd": 14, "flow": 11, "trig": 14}


def test_a_network_on_its_own_schedule_is_called_as_diffusers_calls_it():
    """eps-prediction: x0 = (x_t - sqrt(1 - ab) eps) / sqrt(ab) with the scheduler's own ab at integer timesteps."""
    model = unet()
    scheduler = diffusers.DDPMScheduler(1000, 0.00085, 0.012, "scaled_linear", clip_sample=False)
    t = torch.tensor([20, 399, 749])
    x0, eps = draw(1, 3, 2, 8, 8), draw(2, 3, 2, 8, 8)
    x_t = scheduler.add_noise(x0, eps, t)
    ab = scheduler.alphas_cumprod[t].view(-1, 1, 1, 1)
    with torch.no_grad():
        expected = (x_t - (1 - ab).sqrt() * model(x_t, t).sample) / ab.sqrt()
        result = Denoiser(UNet(model), SD, "eps")(x_t, level(SD, 20, 399, 749))
    assert (result - expected).abs().max() < 2e-4


def test_edm_preconditioning_is_that_of_table_1():
    net = labelled()
    x, s = draw(1, 2, 2, 8, 8), torch.tensor([0.3, 40.0])
    cond = torch.tensor([1, 4])
    sigma = s.view(-1, 1, 1, 1)
    with torch.no_grad():
        f = net.backbone.model(x / (sigma**2 + 0.25).sqrt(), s.log() / 4, class_labels=cond).sample
        expected = 0.25 / (sigma**2 + 0.25) * x + sigma * 0.5 / (sigma**2 + 0.25).sqrt() * f
        at = level(EDM(), *s.tolist())
        assert (net(x, at, cond) - expected).abs().max() < 1e-5
        assert (net(x, at, cond, "raw") - f).abs().max() < 1e-5


def test_flow_matching_counts_time_in_thousandths():
    model = unet()
    x, s = draw(1, 2, 2, 8, 8), torch.tensor([0.25, 1.0])
    net = Denoiser(UNet(model), Flow(), "flow", time_scale=1000.0)
    with torch.no_grad():
        expected = x - s.view(-1, 1, 1, 1) * model(x, 1000 * s).sample
        assert (net(x, level(Flow(), 0.25, 1.0)) - expected).abs().max() < 1e-5


def test_patches_are_folded_into_channels_and_back():
    net = labelled(patch=2)
    assert net.shape == (2, 16, 16)
    x = draw(1, 3, 2, 16, 16)
    cond = torch.tensor([0, 1, 2])
    with torch.no_grad():
        folded = net.backbone.model(nn.functional.pixel_unshuffle(x, 2), torch.ones(3), class_labels=cond).sample
        assert torch.equal(net.backbone(x, torch.ones(3), cond, "x0"), nn.functional.pixel_shuffle(folded, 2))


def test_no_condition_is_the_null_class_and_a_network_without_one_says_so():
    net, x, at = labelled(), draw(1, 2, 2, 8, 8), level(EDM(), 1.0, 3.0)
    assert net.null == 5
    with torch.no_grad():
        assert torch.equal(net(x, at), net(x, at, torch.tensor([5, 5])))
    bare = Denoiser(UNet(unet(num_class_embeds=5), 5), EDM(), "edm")
    assert bare.null is None and bare.classes == 5
    with pytest.raises(ValueError, match="5 classes and no null class"):
        bare(x, at)
    with pytest.raises(ValueError, match="guidance: 2, but this network has no null class"):
        guided(bare, x, at, torch.tensor([0, 1]), 2.0, bare.conditions.null(torch.tensor([0, 1])))
    with pytest.raises(ValueError, match="classes: 3, but num_class_embeds is 5"):
        UNet(unet(num_class_embeds=5), 3)


def test_a_transformer_predicts_without_its_variance_and_drops_no_label_by_itself():
    torch.manual_seed(0)
    net = Denoiser(Transformer(diffusers.DiTTransformer2DModel(**DIT)), DDPM(), "eps").train()
    assert (net.classes, net.null, net.shape) == (5, 5, (2, 8, 8))
    x, at, cond = draw(1, 3, 2, 8, 8), level(DDPM(), 3, 500, 999), torch.tensor([0, 3, 4])
    model = net.backbone.model
    with torch.no_grad():
        result = net.backbone(x, torch.tensor([3.0, 500.0, 999.0]), cond, "x0")
        model.eval()
        expected = model(x, timestep=torch.tensor([3, 500, 999]), class_labels=cond).sample[:, :2]
        assert torch.equal(result, expected)
        assert torch.equal(net(x, at), net(x, at, torch.full((3,), 5)))
        (features,) = net(x, at, cond, "features")
    assert features.shape == (3, 8, 4, 4)
    tokens = []
    handle = model.transformer_blocks[1].register_forward_hook(lambda m, a, out: tokens.append(out))
    with torch.no_grad():
        model(x, timestep=net.own_level(at, 4)[1].float(), class_labels=cond)
    handle.remove()
    assert torch.allclose(features[:, :, 1, 2], tokens[0][:, 1 * 4 + 2], atol=1e-5)


@pytest.mark.parametrize("config", [TEXT, SDXL], ids=["sd", "sdxl"])
def test_a_text_unet_takes_its_embeddings_by_name(config):
    torch.manual_seed(0)
    net = Denoiser(TextUNet(diffusers.UNet2DConditionModel(**config).eval()), SD, "eps")
    cond = {"text": draw(3, 2, 7, 12)}
    if config is SDXL:
        cond |= {"pooled": draw(4, 2, 10)}
    x, at = draw(1, 2, 2, 8, 8), level(SD, 100, 900)
    with torch.no_grad():
        added = {"text_embeds": cond.get("pooled"), "time_ids": torch.tensor([[64.0, 64, 0, 0, 64, 64]] * 2)}
        t = net.own_level(at, 4)[1].float()
        eps = net.backbone.model(x, t, cond["text"], added_cond_kwargs=added).sample
        assert torch.equal(net(x, at, cond), (1 / at.alpha) * x + (-at.sigma / at.alpha) * eps)
        null = net.conditions.zeros(2)
        null = {k: v.expand(-1, 7, -1) if k == "text" else v for k, v in null.items()}
        both = net(x, at, cond), net(x, at, null)
        result = guided(net, x, at, cond, 4.0, null)
    assert torch.allclose(result, both[1] + 4 * (both[0] - both[1]), atol=1e-3)
    assert new_head(net)(net(x, at, cond, "features")).shape == (2,)


# Features


def test_features_leave_before_the_decoder_and_equal_those_of_the_whole_pass():
    net, cond = labelled(), torch.tensor([0, 5])
    x, at = draw(1, 2, 2, 8, 8), level(EDM(), 0.5, 20.0)
    calls = {"down_blocks": 0, "up_blocks": 0, "conv_out": 0}
    for name in calls:
        part = net.backbone.model.get_submodule(name)
        for module in part if isinstance(part, nn.ModuleList) else [part]:
            module.register_forward_hook(lambda *_, name=name: calls.update({name: calls[name] + 1}))
    (features,) = net(x, at, cond, "features")
    assert calls == {"down_blocks": 2, "up_blocks": 0, "conv_out": 0}
    x0, (together,) = net(x, at, cond, "both")
    raw, (again,) = net(x, at, cond, "raw+features")
    assert calls == {"down_blocks": 6, "up_blocks": 4, "conv_out": 2}
    assert torch.equal(features, together) and torch.equal(features, again)
    assert torch.equal(raw, net(x, at, cond, "raw"))
    assert torch.equal(x0, net(x, at, cond))
    assert not net.backbone.model.mid_block._forward_hooks  # nothing holds the pass's graph


def test_gradients_reach_the_input_through_frozen_weights():
    net = labelled().requires_grad_(False)
    head = Head((16, 4, 4))
    x, at, cond = draw(1, 2, 2, 8, 8).requires_grad_(), level(EDM(), 0.5, 2.0), torch.tensor([0, 1])
    (gradient,) = torch.autograd.grad(head(net(x, at, cond, "features")).sum(), x)
    (same,) = torch.autograd.grad(head(net(x, at, cond, "both")[1]).sum(), x)
    assert gradient.abs().sum() > 0 and torch.equal(gradient, same)
    assert all(p.grad is None for p in net.parameters())


def test_a_copy_taps_its_own_bottleneck():
    net = labelled()
    copy = deepcopy(net)
    with torch.no_grad():
        for p in copy.parameters():
            p.mul_(1.5)
    x, at, cond = draw(1, 2, 2, 8, 8), level(EDM(), 0.5, 2.0), torch.tensor([0, 1])
    with torch.no_grad():
        (before,) = net(x, at, cond, "features")
        (other,) = copy(x, at, cond, "features")
        assert torch.equal(other, copy(x, at, cond, "both")[1][0])
        assert not torch.equal(other, before)
        assert torch.equal(net(x, at, cond, "features")[0], before)


def test_logits_of_real_and_fake_together_equal_those_apart():
    net, head = labelled(), Head((16, 4, 4))
    a, b, cond = draw(1, 3, 2, 8, 8), draw(2, 3, 2, 8, 8), torch.tensor([0, 1, 2])
    at = level(EDM(), 0.1, 1.0, 10.0)
    both = Level(torch.cat([at.alpha] * 2), torch.cat([at.sigma] * 2))
    with torch.no_grad():
        together = head(net(torch.cat([a, b]), both, torch.cat([cond] * 2), "features"))
        apart = torch.cat([head(net(x, at, cond, "features")) for x in (a, b)])
    assert (together - apart).abs().max() < 1e-5


# Precision


def test_bf16_leaves_x0_and_features_in_float32_and_near_fp32():
    x, at, cond = draw(1, 2, 2, 8, 8), level(EDM(), 0.5, 2.0), torch.tensor([0, 1])
    with torch.no_grad():
        x0, (features,) = labelled("bf16")(x, at, cond, "both")
        exact = labelled("fp32")(x, at, cond)
    assert x0.dtype == features.dtype == torch.float32
    assert 0 < (x0 - exact).abs().max() < 0.05


def test_weights_have_gradients_after_a_pass_without_any():
    """A cache of cast weights that outlived the no-grad pass would cut the graph."""
    net = labelled("bf16")
    x, at, cond = draw(1, 2, 2, 8, 8), level(EDM(), 0.5, 2.0), torch.tensor([0, 1])
    with torch.no_grad():
        net(x, at, cond)
    net(x, at, cond).square().mean().backward()
    assert all(p.grad is not None for p in net.parameters())
    with torch.autocast("cpu", torch.bfloat16):  # a caller's own region does not change what "fp32" means
        outside = labelled()(x, at, cond)
    assert torch.equal(outside, labelled()(x, at, cond))


# Guidance


class Counted(nn.Module):
    def __init__(self, net: Denoiser):
        super().__init__()
        self.net, self.batches = net, []
        self.classes, self.null, self.schedule = net.classes, net.null, net.schedule

    def forward(self, x, level, cond, mode="x0"):
        self.batches.append(len(x))
        return self.net(x, level, cond, mode)


def test_guidance_is_linear_in_one_call_of_twice_the_batch():
    net = Counted(labelled(schedule=SD, prediction="eps"))
    x, at, cond = draw(1, 3, 2, 8, 8), level(SD, 100, 500, 900), torch.tensor([0, 1, 2])
    with torch.no_grad():
        one, null = net(x, at, cond), net(x, at, torch.full((3,), 5))
        net.batches.clear()
        result = guided(net, x, at, cond, 3.0, Labels(5, 5).null(cond))
        assert net.batches == [6]
        eps = at.eps(x, null) + 3 * (at.eps(x, one) - at.eps(x, null))
        assert torch.allclose(result, (x - at.sigma * eps) / at.alpha, atol=1e-4)
        net.batches.clear()
        assert torch.equal(guided(net, x, at, cond, 1.0), one) and net.batches == [3]
        each = guided(net, x, at, cond, torch.tensor([1.0, 3.0, 2.0]), Labels(5, 5).null(cond))
        assert torch.allclose(each[1], result[1], atol=1e-4) and torch.allclose(each[0], one[0], atol=1e-4)


# Averages


@pytest.mark.parametrize("std", [0.03, 0.05, 0.1, 0.25])
def test_power_profile_has_the_width_it_is_named_by(std):
    profile = Power(std)
    g = profile.gamma
    assert math.isclose((g + 1) / ((g + 2) ** 2 * (g + 3)), std**2, rel_tol=1e-9)
    t = (torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000
    weight = t**g / (t**g).sum()
    mean = (weight * t).sum()
    assert math.isclose((weight * (t - mean) ** 2).sum().sqrt(), std, rel_tol=1e-4)
    assert math.isclose(mean, (g + 1) / (g + 2), rel_tol=1e-4)


def ramp_average(profile, updates: int) -> float:
    """The average of weights that are 1, 2, 3, ... after each update."""
    net, mean = nn.Linear(1, 1, bias=False).double(), nn.Linear(1, 1, bias=False).double()
    nn.init.constant_(mean.weight, 1e9)  # the first update must forget where it began, or its profile says otherwise
    for n in range(updates):
        nn.init.constant_(net.weight, n + 1.0)
        average(mean, net, profile.decay_at(n))
    return mean.weight.item()


def test_power_average_of_a_ramp_is_the_closed_form():
    profile, n = Power(0.1), 400
    t = torch.arange(n + 1, dtype=torch.float64) / n
    exact = (torch.diff(t ** (profile.gamma + 1)) * torch.arange(1, n + 1)).sum().item()
    result = ramp_average(profile, n)
    assert math.isclose(result, exact, rel_tol=1e-9)
    assert math.isclose(result / n, (profile.gamma + 1) / (profile.gamma + 2), rel_tol=5e-3)


def test_exponential_average_lags_a_ramp_by_its_length():
    """After the ramp-up, mean(n) = n - d / (1 - d) for weights that grow by one an update."""
    profile = Exponential(0.9)
    assert [profile.decay_at(n) for n in (0, 1, 100)] == [0.1, 2 / 11, 0.9]
    net, mean = nn.Linear(1, 1, bias=False).double(), nn.Linear(1, 1, bias=False).double()
    nn.init.zeros_(mean.weight)
    for n in range(500):
        nn.init.constant_(net.weight, n + 1.0)
        average(mean, net, profile.decay_at(n))
    assert math.isclose(mean.weight.item(), 500 - 0.9 / 0.1, rel_tol=1e-9)


def test_averages_carry_buffers_of_statistics_too():
    net, mean = nn.BatchNorm1d(2), nn.BatchNorm1d(2)
    net.running_mean += 1.0
    average(mean, net, 0.75)
    assert torch.equal(mean.running_mean, torch.full((2,), 0.25))


# Heads


def test_head_on_edms_bottleneck_has_18_9_million_parameters():
    assert sum(p.numel() for p in Head((768, 8, 8)).parameters()) == 18_879_745


@pytest.mark.parametrize(("size", "convs"), [(3, 0), (4, 0), (7, 1), (8, 1), (9, 1), (16, 2), (32, 3)])
def test_head_gives_one_logit_a_sample_at_any_size(size, convs):
    head = Head((8, size, size))
    assert (
        sum(isinstance(m, nn.Conv2d) and m.stride == (2, 2) and m.kernel_size == (4, 4) for m in head.layers) == convs
    )
    assert head((torch.randn(5, 8, size, size),)).shape == (5,)


@pytest.mark.parametrize(("channels", "groups"), [(768, 32), (1280, 32), (64, 4), (16, 1), (12, 1)])
def test_head_keeps_the_published_groups_and_a_gradient_in_narrow_networks(channels, groups):
    head = Head((channels, 2, 2))
    assert {m.num_groups for m in head.layers if isinstance(m, nn.GroupNorm)} == {groups}
    features = draw(1, 2, channels, 2, 2).requires_grad_()
    (gradient,) = torch.autograd.grad(head((features,)).sum(), features)
    assert gradient.norm() > 1e-2


def test_head_is_measured_on_the_bottleneck():
    head = new_head(labelled())
    assert head.layers[0].in_channels == 16 and head.layers[0].kernel_size == (4, 4)
    wide = Denoiser(UNet(unet(sample_size=(8, 16))), EDM(), "edm")
    with pytest.raises(ValueError, match="4 x 8, and a GAN head needs a square one"):
        new_head(wide)


# Schedules against diffusers


@pytest.mark.parametrize(
    "settings",
    [
        {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
        {"beta_schedule": "linear"},
        {"beta_schedule": "squaredcos_cap_v2"},
    ],
    ids=lambda s: s["beta_schedule"],
)
@pytest.mark.parametrize("name", ["DDPMScheduler", "DDIMScheduler", "PNDMScheduler", "EulerDiscreteScheduler"])
def test_alphas_are_those_of_diffusers(name, settings):
    scheduler = getattr(diffusers, name)(**settings)
    fields = from_scheduler(config_of(scheduler), Path("x"))
    assert fields["prediction"] == "eps"
    angles = DDPM(**{k: v for k, v in fields["schedule"].items() if k != "name"}).angles()
    assert (angles.cos() ** 2 - scheduler.alphas_cumprod).abs().max() < 2e-6


def test_zero_snr_and_v_prediction_are_read():
    scheduler = diffusers.DDIMScheduler(rescale_betas_zero_snr=True, prediction_type="v_prediction")
    fields = from_scheduler(config_of(scheduler), Path("x"))
    assert fields["prediction"] == "v" and fields["schedule"]["zero_snr"] is True
    angles = DDPM(zero_snr=True).angles()
    assert (angles.cos() ** 2 - scheduler.alphas_cumprod).abs().max() < 2e-6
    assert math.isclose(angles[-1], math.pi / 2, rel_tol=1e-12)


def test_stable_diffusions_alphas():
    ab = SD.angles().cos() ** 2
    for t, value in {
        999: 0.0046601,
        980: 0.0058438,
        749: 0.0566235,
        499: 0.2776697,
        399: 0.4260864,
        249: 0.6754324,
        20: 0.9813144,
    }.items():
        assert ab[t].item() == pytest.approx(value, abs=6e-8)


@pytest.mark.parametrize("name", ["FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler"])
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_a_flows_training_levels_are_those_of_diffusers(name, shift):
    scheduler = getattr(diffusers, name)(shift=shift)
    theirs = scheduler.sigmas[:1000].flip(0).double()  # ascending
    fields = from_scheduler(config_of(getattr(diffusers, name)(shift=shift)), Path("x"))
    assert (fields["prediction"], fields["time_scale"]) == ("flow", 1000.0)
    schedule = from_config(fields["schedule"])
    assert schedule.shift == shift and schedule.t_min == pytest.approx(scheduler.sigmas[999].item(), rel=1e-5)
    ours = schedule.ramp(torch.arange(1000) / 999)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)
    x0, eps, index = draw(1, 3, 2, 8, 8), draw(2, 3, 2, 8, 8), torch.tensor([0, 499, 999])
    if name.startswith("FlowMatchEuler"):
        noised = scheduler.scale_noise(x0, scheduler.timesteps.flip(0)[index], eps)
        torch.testing.assert_close(schedule.level(ours[index], 4).noise(x0, eps), noised, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["exponential", "linear"])
@pytest.mark.parametrize("tokens, mu", [(256, 0.5), (4096, 1.15), (2176, 0.825)])
def test_a_dynamic_shift_follows_the_images_size_as_in_diffusers(kind, tokens, mu):
    """mu of the SD3 and FLUX pipelines: 0.5 at 256 tokens, 1.15 at 4096, a straight line through both."""
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, time_shift_type=kind)
    scheduler.set_timesteps(sigmas=[1.0, 0.75, 0.5, 0.25], mu=mu)
    schedule = from_config(from_scheduler(config_of(scheduler), Path("x"), tokens)["schedule"])
    sigmas = torch.tensor([call.sigma for call in DMD2(student_steps=4).calls(SimpleNamespace(schedule=schedule))])
    torch.testing.assert_close(sigmas, scheduler.sigmas[:4], rtol=1e-5, atol=0)
    with pytest.raises(ValueError, match="use_dynamic_shifting needs the image's size"):
        from_scheduler(config_of(scheduler), Path("x"))


def test_a_teachers_dynamic_shift_is_that_of_its_own_size(tmp_path):
    torch.manual_seed(0)
    model = diffusers.DiTTransformer2DModel(**DIT | {"sample_size": 32})
    model.save_pretrained(tmp_path / "transformer", safe_serialization=True)
    diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True).save_pretrained(tmp_path / "scheduler")
    schedule = open_teacher(tmp_path).schedule
    assert isinstance(schedule, Flow) and schedule.shift == pytest.approx(math.exp(0.5))  # 256 patches of 2 x 2


def test_a_shift_of_another_solver_is_read_too():
    """Sana and Wan come with multistep solvers, whose flow_shift is the flow's shift."""
    solver = diffusers.DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    )
    solver.set_timesteps(4)
    schedule = from_config(from_scheduler(config_of(solver), Path("x"))["schedule"])
    u = (torch.linspace(0.999, 0, 5)[:4] - 0.001) / 0.999  # its own grid, as shares of the ramp
    torch.testing.assert_close(schedule.ramp(u).float(), solver.sigmas[:4], rtol=1e-5, atol=0)


def test_edm_scheduler_names_its_preconditioning():
    fields = from_scheduler(config_of(diffusers.EDMEulerScheduler(sigma_max=50.0, sigma_data=0.4)), Path("x"))
    assert fields == {"schedule": to_config(EDM(0.002, 50.0, 7.0)), "prediction": "edm", "data_std": 0.4}


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"_class_name": "CMStochasticIterativeScheduler"}, "no beta schedule; put a fewstep.json"),
        ({"beta_schedule": "sigmoid", "beta_start": 1e-4, "beta_end": 0.02}, "'sigmoid' is not one of linear"),
        ({"beta_schedule": "linear", "trained_betas": [0.1]}, "trained_betas"),
        ({"beta_schedule": "linear", "prediction_type": "score"}, "'score' is not one of epsilon"),
        ({"_class_name": "EDMEulerScheduler", "prediction_type": "v_prediction"}, "epsilon"),
        ({"_class_name": "EDMEulerScheduler", "sigma_max": 80.0}, "sigma_min is missing"),
        ({"_class_name": "EDMEulerScheduler", "sigma_min": 0.0, "sigma_max": 80.0}, "edm has t_min 0.0 and t_max 80.0"),
        ({"_class_name": "FlowMatchEulerDiscreteScheduler", "invert_sigmas": True}, "invert_sigmas counts time"),
        ({"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 0.0}, "flow has t_min 0.0"),
        ({"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": "3"}, "a value that gives no schedule"),
        (
            {"_class_name": "FlowMatchEulerDiscreteScheduler", "use_dynamic_shifting": True, "time_shift_type": "x"},
            "time_shift_type 'x' is not one of exponential, linear",
        ),
    ],
)
def test_schedulers_that_name_no_schedule_are_refused(config, says):
    with pytest.raises(ValueError, match=says):
        from_scheduler(config, Path("scheduler_config.json"), 1024)


def test_one_step_at_399_starts_from_ab_399():
    """SDXL's one-step student: x0 = (n - 0.7576 eps) / 0.6528, told timestep 399, its input pure noise."""
    model = unet()
    net, n = Denoiser(UNet(model), SD, "eps"), draw(1, 2, 2, 8, 8)
    with torch.no_grad():
        result = run_calls({"student": net}, DMD2(conditioning=399).calls(net), n, None, Draws(0, 0))
        eps = model(n, torch.tensor([399, 399])).sample
    ab = 0.4260864
    assert math.isclose(math.sqrt(1 - ab), 0.7576, abs_tol=5e-5) and math.isclose(math.sqrt(ab), 0.6528, abs_tol=5e-5)
    assert (result - (n - math.sqrt(1 - ab) * eps) / math.sqrt(ab)).abs().max() < 1e-4


# Folders


def ddpm_pipeline(folder: Path, scheduler=None, **config) -> diffusers.UNet2DModel:
    model = unet(**config)
    diffusers.DDPMPipeline(model, scheduler or diffusers.DDPMScheduler()).save_pretrained(folder)
    return model


def test_a_diffusers_pipeline_is_a_teacher(tmp_path):
    model = ddpm_pipeline(tmp_path / "p")
    net = open_teacher(tmp_path / "p")
    assert (net.schedule, net.prediction, net.shape, net.classes) == (DDPM(), "eps", (2, 8, 8), None)
    x, t = draw(1, 2, 2, 8, 8), torch.tensor([10, 700])
    with torch.no_grad():
        eps = level(DDPM(), 10, 700).eps(x, net(x, level(DDPM(), 10, 700)))
        assert (eps - model(x, t).sample).abs().max() < 1e-3
        assert heun(net, x, None, 3).isfinite().all()


def test_a_model_beside_its_scheduler_is_a_teacher(tmp_path):
    """The layout of the first DDPM repositories: config.json and scheduler_config.json at the top."""
    unet().save_pretrained(tmp_path)
    diffusers.DDPMScheduler(prediction_type="v_prediction").save_pretrained(tmp_path)
    net = open_teacher(tmp_path)
    assert net.prediction == "v" and net.schedule == DDPM()


def test_a_pipeline_of_classes_counts_a_null_class_only_where_the_folder_says_so(tmp_path):
    ddpm_pipeline(tmp_path, num_class_embeds=6)
    assert (open_teacher(tmp_path).classes, open_teacher(tmp_path).null) == (6, None)
    (tmp_path / "fewstep.json").write_text(
        json.dumps({"schedule": {"name": "ddpm"}, "prediction": "eps", "classes": 5})
    )
    assert (open_teacher(tmp_path).classes, open_teacher(tmp_path).null) == (5, 5)


@pytest.mark.parametrize("sub", ["transformer", "unet"])
def test_other_models_are_opened_from_their_pipelines_folders(tmp_path, sub):
    torch.manual_seed(0)
    model = diffusers.DiTTransformer2DModel(**DIT) if sub == "transformer" else diffusers.UNet2DConditionModel(**TEXT)
    model.save_pretrained(tmp_path / sub)
    diffusers.FlowMatchEulerDiscreteScheduler().save_pretrained(tmp_path / "scheduler")
    net = open_teacher(tmp_path)
    assert (net.prediction, net.time_scale, net.schedule) == ("flow", 1000.0, Flow())
    assert net.classes == (5 if sub == "transformer" else None)
    save_denoiser(net, tmp_path / "again")
    again = open_teacher(tmp_path / "again")
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), again.parameters(), strict=True))


def test_what_is_saved_is_what_is_opened_and_names_no_place(tmp_path):
    net = labelled(patch=2)
    save_denoiser(net, tmp_path / "a")
    save_denoiser(open_teacher(tmp_path / "a"), tmp_path / "b")
    again = open_teacher(tmp_path / "b", "bf16")
    assert again.precision == "bf16" and again.classes == 5 and again.backbone.patch == 2
    again = open_teacher(tmp_path / "b")
    x, at = draw(1, 2, 2, 16, 16), level(EDM(), 0.5, 2.0)
    with torch.no_grad():
        assert torch.equal(again(x, at), net(x, at))
    assert str(tmp_path) not in "".join(path.read_text() for path in (tmp_path / "b").rglob("*.json"))


@pytest.mark.parametrize("variant", [None, "fp16"])
def test_half_precision_files_become_float32(tmp_path, variant):
    dtype = torch.bfloat16 if variant is None else torch.float16
    model = unet().to(dtype)
    model.save_pretrained(tmp_path / "unet", variant=variant)
    diffusers.DDPMScheduler().save_pretrained(tmp_path / "scheduler")
    net = open_teacher(tmp_path)
    for a, b in zip(net.parameters(), model.parameters(), strict=True):
        assert a.dtype == torch.float32 and torch.equal(a, b.float())


def test_pickles_and_incomplete_folders_are_refused_with_the_way_out(tmp_path):
    ddpm_pipeline(tmp_path / "p")
    weights = tmp_path / "p/unet/diffusion_pytorch_model.safetensors"
    with pytest.raises(ValueError, match="edm.pkl.*runs code when it is opened; convert it, running none, to"):
        open_teacher(tmp_path / "edm.pkl")
    with pytest.raises(ValueError, match="no folder .*jobs/teach.py"):
        open_teacher(tmp_path / "missing")
    with pytest.raises(ValueError, match="holds no config.json"):
        open_teacher(tmp_path)
    tensors = load_file(weights)
    save_file({k: v for k, v in tensors.items() if k != "conv_out.bias"}, weights, {"format": "pt"})
    with pytest.raises(ValueError, match="differ in 1 of .* 'conv_out.bias': missing in the weights, .2,. by config"):
        open_teacher(tmp_path / "p")
    save_file(tensors | {"conv_out.bias": torch.zeros(3)}, weights, {"format": "pt"})
    with pytest.raises(ValueError, match="conv_out.bias"):
        open_teacher(tmp_path / "p")
    weights.write_bytes(b"not safetensors")
    with pytest.raises(ValueError, match=str(tmp_path / "p/unet")):
        open_teacher(tmp_path / "p")
    weights.rename(weights.with_suffix(".bin"))
    with pytest.raises(
        ValueError, match="pickled weights.*diffusers.UNet2DModel.from_pretrained.*use_safetensors=False"
    ):
        open_teacher(tmp_path / "p")
    weights.with_suffix(".bin").unlink()
    with pytest.raises(ValueError, match="no diffusion_pytorch_model.safetensors"):
        open_teacher(tmp_path / "p")
    (tmp_path / "p/unet/config.json").write_text('{"_class_name": "VQModel"}')
    with pytest.raises(ValueError, match="class 'VQModel'; known: UNet2DModel"):
        open_teacher(tmp_path / "p")
    (tmp_path / "p/unet/config.json").write_text("{")
    with pytest.raises(ValueError, match="config.json: not valid JSON"):
        open_teacher(tmp_path / "p")


def test_a_description_that_does_not_fit_its_model_is_refused(tmp_path):
    save_denoiser(labelled(), tmp_path)
    path = tmp_path / "fewstep.json"
    good = json.loads(path.read_text())
    for change, says in {
        ("classes", 7): "classes: 7, but num_class_embeds is 6",
        ("prediction", "epsilon"): "prediction",
        ("patchs", 2): "patchs: no such key; did you mean 'patch'",
        ("schedule", ("trig",)): "schedule",
        ("model", "DiTTransformer2DModel"): "model is DiT.*, but .* is of class UNet2DModel",
    }.items():
        path.write_text(json.dumps(good | {change[0]: change[1]}))
        with pytest.raises(ValueError, match=says):
            open_teacher(tmp_path)


def test_hub_repositories_come_from_the_hubs_cache(tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ValueError, match=r"hub repository 'google/ddpm-cifar10-32'.*teacher=./ddpm-cifar10-32"):
        open_teacher("hub:google/ddpm-cifar10-32")
    commit = "0" * 40
    repo = tmp_path / "models--google--ddpm-cifar10-32"
    ddpm_pipeline(repo / "snapshots" / commit)
    (repo / "refs").mkdir()
    (repo / "refs/main").write_text(commit)
    assert open_teacher("hub:google/ddpm-cifar10-32").shape == (2, 8, 8)


# New networks


@pytest.mark.parametrize("model", ["UNet2DModel", "DiTTransformer2DModel"])
def test_a_new_network_starts_as_its_skip(model):
    config = SMALL if model == "UNet2DModel" else DIT
    net = new_denoiser(Network(model=model, config=config, classes=5))
    x, at = draw(1, 2, 2, 8, 8), level(EDM(), 0.5, 2.0)
    with torch.no_grad():
        assert torch.allclose(net(x, at), 0.25 / (at.sigma**2 + 0.25) * x, atol=1e-6)
    assert net.null == 5


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"config": SMALL | {"sample_sise": 8}}, "network.config: UNet2DModel: .*sample_sise"),
        ({"config": SMALL | {"num_class_embeds": 4}, "classes": 2}, "classes: 2, but num_class_embeds is 4"),
        ({"config": SMALL | {"sample_size": None}}, "sample_size is missing"),
        ({"config": SMALL | {"time_embedding_type": "fourier"}}, "time_embedding_type 'fourier'"),
        ({"config": SMALL | {"mid_block_type": None}}, "no mid_block"),
        ({"config": SMALL, "schedule": {"name": "ddpm"}}, "network.prediction: edm takes ln"),
        ({"config": SMALL, "schedule": {"name": "ddpm", "zero_snr": True}, "prediction": "eps"}, "alpha = 0, .* ddpm"),
        ({"config": SMALL, "schedule": {"name": "flow"}, "prediction": "eps"}, "network.prediction: eps says .* flow"),
        ({"config": SMALL, "schedule": {"name": "trig"}, "prediction": "eps"}, "network.prediction: eps says .* trig"),
        ({"config": SMALL, "schedule": {"name": "flow", "shift": -1.0}}, "network.schedule: flow has the shift -1"),
        (
            {"config": SMALL, "schedule": {"name": "edm", "t_min": "a"}},
            "network.schedule.t_min: 'a' of edm is no float",
        ),
        ({"config": SMALL, "schedule": {"name": "cosine"}}, "network.schedule.name: 'cosine'"),
        ({"model": "DiTTransformer2DModel", "config": DIT, "patch": 2}, "its own way with patches"),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_mistakes_in_a_new_network_name_their_field(fields, says):
    with pytest.raises(ConfigError, match=says):
        new_denoiser(Network(**fields))


def test_a_denoiser_in_bfloat16_put_back_to_float32_answers_as_if_it_had_never_been():
    torch.manual_seed(0)
    x, level, cond = torch.randn(2, 1, 16, 16), EDM().level(torch.tensor([0.1, 2.0]).double(), 4), torch.tensor([0, 1])
    nets = []
    for precision in ("fp32", "bf16"):
        backbone = UNet(unet(0, num_class_embeds=11, in_channels=4, out_channels=4), 10, 2)
        nets.append(Denoiser(backbone, EDM(), "edm", precision=precision).eval())
    with torch.no_grad():
        plain, cast = (net(x, level, cond) for net in nets)
        assert not torch.equal(plain, cast)
        assert torch.equal(plain, nets[1].float()(x, level, cond)) and nets[1].precision == "fp32"
