"""Negative prompts by subtracting cross-attention: the layer's formula, the switch, what it does to pictures, an export
that needs nothing of ours, and training."""

from __future__ import annotations

import importlib.util
import re
from dataclasses import replace

import diffusers
import pytest
import torch
import toy
from diffusers.models.attention_processor import Attention
from job import job as command
from test_texts_to_images import recipe, sd, sdxl, shards  # noqa: F401 - fixtures among them

from fewstep import build, run
from fewstep.config import ConfigError, resolve
from fewstep.diffusion.draws import Draws
from fewstep.methods import METHODS, Batch
from fewstep.metrics.background import backgrounds
from fewstep.networks import export_pipeline as exporting
from fewstep.networks.card import Card
from fewstep.networks.conditions import Prompts
from fewstep.networks.export import InTurn
from fewstep.networks.nasa import Subtract, subtracting
from fewstep.networks.pretrained import open_teacher
from fewstep.students import open_sampler

TEACHER = "shipped:emoji/teacher"


class Layer(torch.nn.Module):
    """One cross-attention layer of diffusers, under its usual name."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.attn2 = Attention(12, cross_attention_dim=6, heads=3, dim_head=4)


@torch.no_grad()
def test_a_layer_subtracts_the_attention_to_the_negative_prompt():
    layer, x, text, negative = Layer(), torch.randn(3, 5, 12), torch.randn(3, 7, 6), torch.randn(3, 4, 6)
    attn, scale = layer.attn2, torch.tensor([0.0, 0.3, 1.2])
    heads = lambda v: v.unflatten(2, (3, 4)).transpose(1, 2)

    def z(text):
        q, k, v = heads(attn.to_q(x)), heads(attn.to_k(text)), heads(attn.to_v(text))
        return ((q @ k.transpose(2, 3) / 2).softmax(-1) @ v).transpose(1, 2).flatten(2)

    plain = attn(x, encoder_hidden_states=text)
    with subtracting(layer, negative, scale):
        out = attn(x, encoder_hidden_states=text)
    torch.testing.assert_close(out, attn.to_out[0](z(text) - scale.view(3, 1, 1) * z(negative)), rtol=1e-4, atol=1e-5)
    assert torch.equal(out[0], plain[0])  # a scale of 0
    with subtracting(layer, text, torch.full((3,), 0.25)):
        less = attn(x, encoder_hidden_states=text)
    torch.testing.assert_close(less, attn.to_out[0](0.75 * z(text)), rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="negative: Linear has no cross-attention layers attn2"):
        subtracting(torch.nn.Linear(2, 2), text, scale)


@torch.no_grad()
def test_without_a_negative_prompt_a_network_keeps_its_bits_and_self_attention_is_never_touched():
    net, x = open_teacher(TEACHER), torch.randn(2, 4, 16, 16)
    level, cond = net.schedule.level(torch.tensor([900.0, 300.0]).double(), 4), {"text": torch.randn(2, 24, 128)}
    before = net(x, level, cond)
    less = net.conditions.without(cond, {"text": torch.randn(1, 24, 128)}, torch.tensor([0.5, 0.0]))
    out = net(x, level, less)
    assert not torch.allclose(out[0], before[0], atol=1e-3) and torch.equal(out[1], before[1])
    assert torch.equal(net(x, level, cond), before)
    layers = {name: m.processor for name, m in net.backbone.model.named_modules() if hasattr(m, "processor")}
    assert all(isinstance(own, Subtract) == name.endswith("attn2") for name, own in layers.items()) and len(layers) > 2


def test_a_negative_background_colour_disappears_from_the_pictures():
    """Counted from the pixels, of the teacher by 8 DDIM steps: 16 of 16 pictures had it, and 4 have."""
    things, colours = ("red heart", "cat face", "pizza", "rocket"), ("red", "green", "blue", "yellow")
    asked = [(thing, colour) for thing in things for colour in colours]
    prompts = [f"{thing}, in noto style, on a {colour} background" for thing, colour in asked]
    net, folder = open_teacher(TEACHER).requires_grad_(False), resolve(TEACHER)
    build.with_pipeline(net, folder, listing=prompts, negatives=[f"{colour} background" for colour in colours])
    plain, still = net.conditions, []
    negatives = plain.negatives.pick(torch.arange(16) % 4)
    for scale in (0.0, 1.0):
        less = plain.without(plain.listing.columns, negatives, torch.full((16,), scale))
        net.conditions = replace(plain, listing=Prompts(less))
        pictures = build.make_samples(build.ddim_sampler(net, 8), 16, batch=16).images
        still.append(sum(a == b for a, (_, b) in zip(backgrounds(pictures), asked, strict=True)))
    assert still[0] == 16 and still[1] <= 7


def test_an_exports_own_file_subtracts_in_a_stock_pipeline_what_a_sampler_here_does(tmp_path, sd, monkeypatch):  # noqa: F811
    monkeypatch.setattr(exporting, "_compare", lambda *given: 0.0)
    net, method, out = open_teacher(sd), METHODS["dmd2"](student_steps=2), tmp_path / "out"
    exporting.export_pipeline(net, sd, out, calls=method.calls(net), card=Card(name="x"))
    assert "nasa.py" in (out / "README.md").read_text()
    exporting.export_pipeline(net, sd, out, calls=method.calls(net), card=Card(name="x"), overwrite=True)
    spec = importlib.util.spec_from_file_location("copied", out / "nasa.py")
    copied = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(copied)
    assert not re.search(r"^(from|import) (?!__future__|contextvars|typing|torch)", (out / "nasa.py").read_text(), re.M)
    pipe = diffusers.DiffusionPipeline.from_pretrained(out)
    asked = {"num_inference_steps": 2, "guidance_scale": 1.0, "output_type": "pt"}
    draw = lambda: pipe(["a cat", "a dog"], generator=torch.Generator().manual_seed(0), **asked).images
    plain = draw()
    with copied.subtracted(pipe, "a bird", 0.7):
        theirs = draw()
    assert torch.equal(draw(), plain)
    sampler = open_sampler(str(out), prompts=["a cat", "a dog"], negative="a bird", negative_scale=0.7)
    draws = InTurn(torch.Generator().manual_seed(0))
    with torch.no_grad():
        x0 = sampler.sample(draws.normal("z", (2, *sampler.shape)), sampler.conditions.listed(torch.arange(2)), draws)
        ours = (sampler.pictures(x0).clamp(-1, 1) + 1) / 2
    torch.testing.assert_close(theirs, ours, rtol=1e-3, atol=1e-4)
    assert (theirs - plain).abs().max() > 1e-2
    with pytest.raises(ValueError, match="negative: UNet2DModel takes none"):
        build.subtract(open_teacher("shipped:fashion_mnist/teacher", weights=False), sd, "a", 1.0)
    picture = f"out={tmp_path / 'grid.png'}"
    command("sample")(
        [f"model={out}", 'prompts=["a cat"]', "negative=a bird", "negative_scale=0.5", "images=2", picture]
    )
    assert (tmp_path / "grid.png").is_file()


# Training


def test_the_student_alone_subtracts_and_the_teacher_is_guided_away_from_the_negative_prompt(sd):  # noqa: F811
    method = METHODS["snoopi"](negative_scale=1.0)
    teacher = build.with_pipeline(open_teacher(sd), sd, ["a cat", "a dog"], negatives=["blurry", "dark", "noisy"])
    nets = method.nets(toy.Make(open_teacher(sd), teacher))
    nets["student"].conditions = teacher.conditions
    draws = Draws(0, 3)
    z, conditions = draws.normal("z", (6, *teacher.shape)), teacher.conditions
    cond = conditions.draw(draws, 6)
    batch, seen = Batch(None, None, z, cond, draws, conditions), {}
    for role, net in nets.items():
        net.register_forward_pre_hook(lambda net, args, role=role: seen.setdefault(role, []).append(args[2]))
    made = method.prepare(nets, batch, ())
    (given,) = seen["student"]
    assert 0 <= given["negative_scale"].min() and 0.3 < given["negative_scale"].max() <= 1
    drawn = conditions.draw_negatives(draws, 6)["text"]
    assert torch.equal(given["negative"], drawn) and torch.equal(given["text"], cond["text"])
    assert len(drawn.flatten(1).unique(dim=0)) > 1 and made.cond.keys() == {"text"}
    x_t, level = method.match_noise(nets, made, made.x)
    with torch.no_grad():
        method.scores(nets, made, x_t, level)
    (of_teacher,), (of_critic,) = seen["teacher"], seen["fake"]
    assert torch.equal(of_teacher["text"][6:], drawn)
    assert torch.equal(of_critic["text"][6:], conditions.null(cond)["text"])
    assert of_teacher.keys() == of_critic.keys() == {"text"}


def test_a_recipe_trains_with_negative_prompts(tmp_path, sd):  # noqa: F811
    (tmp_path / "bad.txt").write_text("blurry\ndark\n")
    arguments = ("method={name: snoopi, negative_scale: 1.0}", f"negatives={tmp_path / 'bad.txt'}")
    roles = "optim={student: {lr: 0.001}, fake: {lr: 0.001}}"
    asked = recipe(tmp_path, sd, shards(tmp_path / "data"), roles, *arguments)
    run.check(asked)
    engine = build.make_engine(asked, build.make_feed(asked.data, 0))
    before = toy.weights(engine.nets["student"])
    toy.finish(engine)
    assert not toy.same(before, toy.weights(engine.nets["student"]))
    with pytest.raises(ConfigError, match="negatives: missing; snoopi trains with negative prompts"):
        recipe(tmp_path, sd, None, roles, arguments[0])
    plain = recipe(tmp_path, sd, shards(tmp_path / "data2"), roles, "method={name: snoopi}", arguments[1])
    labels = plain.model_copy(update={"teacher": "shipped:fashion_mnist/teacher"})
    with pytest.raises(ValueError, match="negatives: UNet2DModel takes none"):
        build.check_network(labels, open_teacher(labels.teacher, weights=False))
