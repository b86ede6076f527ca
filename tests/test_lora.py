"""Adapters: the teacher stays as it is, the student starts as the teacher, and the rest is as for whole networks."""

from __future__ import annotations

import threading
from copy import deepcopy
from pathlib import Path

import demo
import pytest
import torch
import toy
import yaml
from test_engine import everything
from test_world import backbone, backbone_loss, distance, inputs, lora_engine
from torch import Tensor, nn
from torch.func import functional_call

from fewstep import build
from fewstep.diffusion.draws import Draws
from fewstep.diffusion.samplers import run_calls
from fewstep.diffusion.schedules import EDM
from fewstep.dryrun import memory, saved_bytes
from fewstep.engine import checkpoint
from fewstep.engine.folder import checkpoints
from fewstep.engine.train import Engine
from fewstep.engine.world import Layout, World
from fewstep.networks.average import average
from fewstep.networks.blocks import blocks, checkpoint_activations, compile_passes, units
from fewstep.networks.denoiser import Denoiser
from fewstep.networks.lora import Lora, active, fingerprint, merge, open_adapter, save_adapter, using
from fewstep.networks.pretrained import open_teacher, save_denoiser
from fewstep.recipe import Recipe, load_recipe
from fewstep.students import export_run, open_sampler, open_student

NAMES = ("unet", "text", "dit")


def moved(adapter: Lora, seed: int = 7, std: float = 0.2) -> Lora:
    """The adapter with random factors, so that it changes what its base answers."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for up in adapter.up.values():
            up.copy_(torch.randn(up.shape, generator=generator) * std)
    return adapter


def ask(name: str) -> tuple:
    """Inputs of a network."""
    if name != "toy":
        return inputs(name)
    times = torch.tensor([0.5, 2.0, 9.0, 60.0], dtype=torch.float64)
    return torch.randn(4, 2, 1, 1, generator=torch.Generator().manual_seed(3)), EDM().level(times, 4), None


def answer(net: nn.Module, name: str) -> Tensor:
    with torch.no_grad():
        return net(*ask(name))


def gradients(net: nn.Module, name: str) -> dict[str, Tensor]:
    backbone_loss(net, *ask(name)).backward()
    return {key: p.grad.clone() for key, p in net.named_parameters() if p.grad is not None}


# One layer


LAYERS = {
    "linear": (lambda: nn.Linear(6, 4), (3, 6)),
    "linear of tokens": (lambda: nn.Linear(6, 4, bias=False), (3, 5, 6)),
    "1x1": (lambda: nn.Conv2d(6, 4, 1), (3, 6, 5, 5)),
    "3x3 with stride": (lambda: nn.Conv2d(6, 4, 3, stride=2, padding=1), (3, 6, 8, 8)),
    "groups": (lambda: nn.Conv2d(6, 4, 3, groups=2, padding=1), (3, 6, 5, 5)),
    "depthwise": (lambda: nn.Conv2d(6, 6, 3, groups=6, padding=1), (3, 6, 5, 5)),
    "dilated and reflected": (lambda: nn.Conv2d(6, 4, 3, dilation=2, padding=2, padding_mode="reflect"), (3, 6, 7, 7)),
    "same padding": (lambda: nn.Conv2d(6, 4, (3, 1), padding="same"), (3, 6, 5, 5)),
    "1d": (lambda: nn.Conv1d(6, 4, 3), (3, 6, 5)),
    "3d": (lambda: nn.Conv3d(6, 4, 3, padding=1), (3, 6, 3, 4, 5)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_an_adapted_layer_is_the_layer_with_a_changed_weight(name):
    torch.manual_seed(0)
    make, shape = LAYERS[name]
    net, x = nn.Sequential(make()), torch.randn(shape)
    adapter = moved(Lora(net, rank=3, alpha=6, targets="all"))
    (key, layer), plain = next(iter(adapter.layers.items())), net(x)
    change = adapter.weight_change(key, layer)
    assert change.shape == layer.weight.shape and change.abs().max() > 0.05
    expected = functional_call(net, {"0.weight": (layer.weight.double() + change).float()}, x)
    torch.testing.assert_close(adapter(x), expected, rtol=0, atol=1e-5)
    assert torch.equal(net(x), plain)
    torch.testing.assert_close(merge(adapter, x)(x), expected, rtol=0, atol=1e-5)


def test_a_change_is_alpha_over_rank_times_up_times_down():
    net = nn.Sequential(nn.Linear(2, 2, bias=False))
    adapter = Lora(net, rank=2, alpha=3, targets="0")
    with torch.no_grad():
        adapter.down["0"].copy_(torch.tensor([[1.0, 2], [0, 1]]))
        adapter.up["0"].copy_(torch.tensor([[1.0, 0], [4, 1]]))
    assert adapter.weight_change("0", net[0]).tolist() == [[1.5, 3.0], [6.0, 13.5]]
    assert Lora(net, rank=2, targets="0").scale == 1


def test_the_rank_of_a_change_is_at_most_that_of_the_layers_matrix():
    net = nn.Sequential(nn.Conv2d(1, 8, 3), nn.Conv2d(8, 2, 3), nn.Conv2d(8, 8, 3, groups=8))
    adapter = Lora(net, rank=16, alpha=16, targets="all")
    assert {key: tuple(down.shape) for key, down in adapter.down.items()} == {
        "0": (8, 1, 3, 3),
        "1": (2, 8, 3, 3),
        "2": (8, 1, 3, 3),
    }
    assert {key: tuple(up.shape) for key, up in adapter.up.items()} == {
        "0": (8, 8, 1, 1),
        "1": (2, 2, 1, 1),
        "2": (8, 1, 1, 1),
    }
    assert adapter.scale == 1


def test_initial_factors_are_a_function_of_seed_and_layer():
    net = nn.Sequential(nn.Linear(400, 300), nn.Linear(300, 400))
    one, both, other = Lora(net, 200, targets="1"), Lora(net, 200, targets="all"), Lora(net, 200, targets="1", seed=1)
    assert torch.equal(one.down["1"], both.down["1"]) and not torch.equal(one.down["1"], other.down["1"])
    assert not torch.equal(both.down["0"][:, :300], both.down["1"])
    for key, width in (("0", 400), ("1", 300)):
        assert both.down[key].std().item() * width**0.5 == pytest.approx(1, abs=0.02)
        assert not both.up[key].any()


# Which layers


def test_targets_are_ends_of_layer_paths():
    net = backbone("unet")
    result = lambda *targets: [key.replace("/", ".") for key in Lora(net, 2, targets=targets).down]
    model = "backbone.model."
    attention = result("attention")
    assert attention == result("to_q", "to_k", "to_v", "to_out.0")
    assert len(attention) == 16 and f"{model}mid_block.attentions.0.to_out.0" in attention
    assert result("mid_block.*.conv1") == [f"{model}mid_block.resnets.{i}.conv1" for i in (0, 1)]
    assert result("conv_out", "conv_in") == [f"{model}conv_in", f"{model}conv_out"]  # the base's order
    assert result(f"{model}conv_in") == [f"{model}conv_in"]
    layers = [path for path, layer in net.named_modules() if isinstance(layer, nn.Linear | nn.Conv2d)]
    assert result("all") == layers and len(layers) > 40


@pytest.mark.parametrize(
    "targets, says",
    [
        ("to_qq", r"targets: 'to_qq' matches no linear or convolution layer; nearest: to_q, "),
        (["attention", "mid_block.resnets.0.conv3"], r"'mid_block.resnets.0.conv3' .* nearest: .*resnets.0.conv1"),
        ("xyz", r"layer paths here end in conv, conv1, .*to_out.0, to_q, to_v$"),
        ("group_norm", r"'group_norm' matches .*attentions.0.group_norm, a GroupNorm; only linear and convolution"),
        ("mid_block", r"'mid_block' matches backbone.model.mid_block, a UNetMidBlock2D; .*; mid_block.\* names those"),
        ([], "targets: none given"),
    ],
)
def test_a_target_that_names_no_layer_is_refused_with_the_nearest(targets, says):
    with pytest.raises(ValueError, match=says):
        Lora(backbone("unet"), targets=targets)


def test_a_network_without_named_attention_says_so():
    with pytest.raises(ValueError, match="targets: attention, but this network names no attention projections; .* all"):
        Lora(toy.denoiser())


# Whole networks


@pytest.mark.parametrize(("name", "targets"), [("unet", "attention"), *((name, "all") for name in NAMES)])
def test_a_new_adapter_equals_its_base_and_a_base_is_the_same_with_and_without(name, targets):
    base = backbone(name)
    before = answer(base, name)
    first, second = (Lora(base, 4, targets=targets, seed=seed) for seed in (0, 1))
    assert torch.equal(answer(first, name), before)
    assert not torch.equal(answer(moved(second), name), before)
    assert torch.equal(answer(first, name), before) and torch.equal(answer(base, name), before)
    assert active() is None


@pytest.mark.parametrize(("name", "precision"), [*((name, "fp32") for name in NAMES), ("unet", "bf16")])
def test_gradients_are_those_of_a_network_with_changed_weights(name, precision):
    """Through a pass without gradients, a whole one and one that leaves at the bottleneck."""
    adapter = moved(Lora(backbone(name, precision), 4, targets="all"))
    result = gradients(adapter, name)
    factors = {key: p.detach().requires_grad_() for key, p in adapter.named_parameters()}
    weights = {}
    for key, layer in adapter.layers.items():
        product = factors[f"up.{key}"].flatten(1) @ factors[f"down.{key}"].flatten(1)
        weights[key.replace("/", ".") + ".weight"] = layer.weight + adapter.scale * product.view(layer.weight.shape)
    changed = lambda *args: functional_call(adapter.base, weights, args)
    backbone_loss(changed, *ask(name)).backward()
    expected = {key: p.grad for key, p in factors.items() if p.grad is not None}
    assert result.keys() == expected.keys() and all(g.dtype == torch.float32 for g in result.values())
    assert len(expected) > 0.9 * len(factors)  # all but those of layers without gradient
    assert distance(result, expected) < (2e-6 if precision == "fp32" else 0.03)
    assert not any(p.requires_grad or p.grad is not None for p in adapter.base.parameters())


def test_an_adapter_has_the_interface_of_its_base():
    base = backbone("unet", "bf16")
    adapter = Lora(base, 2)
    assert (adapter.shape, adapter.classes, adapter.null, adapter.precision) == ((2, 8, 8), 5, 5, "bf16")
    assert adapter.schedule is base.schedule
    assert adapter.own_level(inputs("unet")[1], 4)[1].tolist() == [0.5, 20, 2, 1]  # a method of the base
    with pytest.raises(AttributeError, match="'Denoiser' object has no attribute 'colour'"):
        adapter.colour  # noqa: B018
    assert {key.split(".")[0] for key in adapter.state_dict()} == {"down", "up", "identity"}


def test_a_copy_has_factors_of_its_own_on_the_same_base():
    adapter = Lora(backbone("unet"), 2)
    together = deepcopy({"student": adapter, "fake": adapter, "teacher": adapter.base})
    copy = together["student"]
    assert copy.base is adapter.base is together["teacher"] and together["fake"] is copy
    before = answer(adapter, "unet")
    moved(copy)
    assert torch.equal(answer(adapter, "unet"), before) and not torch.equal(answer(copy, "unet"), before)
    hooks = [len(layer._forward_hooks) for layer in adapter.layers.values()]
    assert hooks == [1] * len(hooks)


def test_an_adapter_is_laid_out_whole():
    adapter = Lora(backbone("dit"), 2)
    assert blocks(adapter) == [] and units(adapter) == [] and len(blocks(adapter.base)) == 3


# The teacher while a student's pass is in flight


def test_the_teacher_is_the_same_bit_for_bit_while_the_students_pass_is_in_flight():
    base = backbone("unet")
    before, result = answer(base, "unet"), {}
    student = moved(Lora(base, 4, targets="all"))

    def meanwhile(*args):
        if "inside" in result:
            return  # the thread's own pass
        result["inside"] = active()
        thread = threading.Thread(target=lambda: result.update(thread=answer(base, "unet")))
        thread.start()
        thread.join()

    handle = base.backbone.model.mid_block.register_forward_hook(meanwhile)
    x0 = student(*inputs("unet"))
    handle.remove()
    result["graph alive"] = answer(base, "unet")
    x0.square().mean().backward()
    result["after"] = answer(base, "unet")
    assert result.pop("inside") is student
    assert result.keys() == {"thread", "graph alive", "after"}
    assert all(torch.equal(value, before) for value in result.values())


def test_a_pass_that_fails_leaves_no_adapter_active():
    student = Lora(backbone("unet"), 2)
    with pytest.raises(RuntimeError):
        student(torch.zeros(1, 3, 8, 8), *inputs("unet")[1:])
    assert active() is None


def three_passes(base: nn.Module, student: nn.Module, fake: nn.Module, name: str = "unet") -> dict[str, Tensor]:
    """Gradients of both adapters, whose passes and the teacher's lie between a student's pass and its second run."""
    loss = backbone_loss(student, *ask(name)) + backbone_loss(fake, *ask(name)) * 0.5
    answer(base, name)
    loss.backward()
    nets = {"student": student, "fake": fake}
    return {f"{role}.{key}": p.grad for role, net in nets.items() for key, p in net.named_parameters()}


def adapters(base: nn.Module) -> tuple[nn.Module, Lora, Lora]:
    return base, moved(Lora(base, 4, targets="all")), moved(Lora(base, 4, targets="all", seed=1), seed=8)


def test_recomputed_activations_run_again_with_the_adapter_of_their_first_run():
    base = backbone("unet")
    checkpoint_activations(base)
    expected = three_passes(*adapters(backbone("unet")))
    assert toy.same(three_passes(*adapters(base)), expected)
    of = lambda role: {key.partition(".")[2]: g for key, g in expected.items() if key.startswith(f"{role}.up")}
    assert distance(of("student"), of("fake")) > 0.1  # a mistaken adapter would show


def test_recomputed_activations_allow_a_second_backward_pass():
    student = moved(Lora(toy.denoiser(1), 4, targets="all"))
    checkpoint_activations(student.base)
    loss = backbone_loss(student, *ask("toy"))
    first, second = (torch.autograd.grad(loss, [*student.up.values()], retain_graph=True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


# Extra scalars


def with_extra(net: nn.Module, seed: int = 5) -> nn.Module:
    """The network with a scalar "w" whose embedding is trained already, so that it changes the answer."""
    net.add_extra("w")
    draw = lambda *shape: 0.3 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        for value in net.extras["w"].parameters():
            value.copy_(draw(*value.shape))
    return net


def asked(net: nn.Module, name: str, w: float) -> Tensor:
    x, level, cond = ask(name)
    return net(x, level, cond, extra={"w": torch.full((len(x),), w)})


def test_an_adapter_takes_scalars_that_its_base_does_not():
    base, name = backbone("dit"), "dit"
    adapter = Lora(base, 2).add_extra("w")
    assert torch.equal(asked(adapter, name, 3.0), answer(base, name))  # no effect until it is trained
    adapter, other = with_extra(moved(Lora(base, 2))), moved(Lora(base, 2))
    assert not torch.allclose(asked(adapter, name, 3.0), asked(adapter, name, 1.0), atol=1e-3)
    for net in (base, other):
        with pytest.raises(ValueError, match="extra: w; this network takes none"):
            asked(net, name, 3.0)


@pytest.mark.parametrize("name", ["unet", "dit"])
@pytest.mark.parametrize("kind", ["whole", "adapter"])
def test_recomputed_blocks_take_the_extra_scalar_of_their_first_run(kind, name):
    """Between a pass and its second run others run, with another scalar and with none."""

    def gradients(recompute: bool) -> dict[str, Tensor]:
        base = backbone(name)
        net = with_extra(base if kind == "whole" else moved(Lora(base, 2, targets="all")))
        if recompute:
            checkpoint_activations(base)
        loss = asked(net, name, 3.0).square().mean() + asked(net, name, 1.0).square().mean()
        answer(base, name)
        loss.backward()
        return {key: p.grad for key, p in net.named_parameters() if p.grad is not None}

    expected = gradients(False)
    assert expected.keys() >= {"extras.w.hidden.weight", "extras.w.out.weight"}
    assert distance(gradients(True), expected) < 2e-6


@pytest.mark.parametrize("name", ["unet", "dit"])
def test_a_merged_network_and_a_file_keep_the_scalars_of_an_adapter(name, tmp_path):
    base = backbone(name)
    adapter = with_extra(moved(Lora(base, 2, targets="all")))
    merged = merge(adapter, *ask(name))
    save_adapter(adapter, tmp_path / "adapter.safetensors")
    opened = open_adapter(backbone(name), tmp_path / "adapter.safetensors")
    with torch.no_grad():
        expected = asked(adapter, name, 3.0)
        assert (asked(merged, name, 3.0) - expected).abs().max() < 1e-5
        assert torch.equal(asked(opened, name, 3.0), expected)
    assert not base.extras and "extras.w.out.weight" in merged.state_dict()


@pytest.mark.slow
@pytest.mark.parametrize("recompute", [False, True])
def test_compiled_blocks_take_the_extra_scalar_of_the_pass(recompute):
    def gradients(compiled: bool) -> dict[str, Tensor]:
        net = with_extra(backbone("dit"))
        if recompute:
            checkpoint_activations(net)
        if compiled:
            compile_passes(net, ["full", "no_grad"], backend="eager")
        with torch.no_grad():
            answer(net, "dit")
            asked(net, "dit", 2.0)
        (asked(net, "dit", 3.0).square().mean() + asked(net, "dit", 1.0).square().mean()).backward()
        return {key: p.grad for key, p in net.named_parameters() if p.grad is not None}

    assert distance(gradients(True), gradients(False)) < 2e-6


@pytest.mark.slow
@pytest.mark.parametrize("recompute", [False, True])
def test_compiled_blocks_run_with_the_adapter_of_the_pass(recompute):
    base, graphs = toy.denoiser(1), []

    def backend(graph, example):
        graphs.append(graph)
        return graph

    if recompute:
        checkpoint_activations(base)
    compile_passes(base, ["full", "encoder", "no_grad"], backend=backend)
    expected, roles = three_passes(*adapters(toy.denoiser(1)), "toy"), adapters(base)
    assert distance(three_passes(*roles, "toy"), expected) < 1e-6
    assert torch.equal(answer(base, "toy"), answer(toy.denoiser(1), "toy"))
    inputs = [sum(node.op == "placeholder" for node in graph.graph.nodes) for graph in graphs]
    # of two blocks: two adapters' with and without gradients, to which four factors come; the teacher's without
    assert sorted(inputs) == [5] * 2 + [9] * 8
    three_passes(*roles, "toy")
    assert len(graphs) == 10


# In the engine


def test_an_engine_trains_the_factors_and_nothing_else():
    engine = lora_engine(steps=6)
    teacher = engine.nets["teacher"]
    before = {role: answer(net, "toy") for role, net in engine.nets.items() if role != "disc"}
    assert torch.equal(before["student"], before["teacher"]) and torch.equal(before["fake"], before["teacher"])
    weights = toy.weights(teacher)
    toy.finish(engine)
    assert toy.same(toy.weights(teacher), weights) and torch.equal(answer(teacher, "toy"), before["teacher"])
    after = [answer(net, "toy") for net in (engine.nets["student"], engine.nets["fake"], engine.student)]
    assert len({tuple(value.flatten().tolist()) for value in (before["teacher"], *after)}) == 4


def test_two_steps_a_resume_and_four_more_equal_six(tmp_path):
    train = {"steps": 6, "report_every": 2, "save_every": 2, "keep": 9}
    one = lora_engine(folder=tmp_path / "one", **train)
    toy.finish(one)
    four = lora_engine(folder=tmp_path / "two", seed_factors=5, **train)
    four.resume(tmp_path / "one" / "step-00000002")
    toy.finish(four)
    assert toy.same(everything(four), everything(one))
    saved = checkpoint.read_weights(tmp_path / "one" / "step-00000006")
    assert toy.same(saved, everything(one))
    heads = {".".join(key.split(".")[:3]) for key in saved if "disc" not in key}
    networks = {f"net.{role}.{part}" for role in ("student", "fake", "average") for part in ("down", "up", "identity")}
    moments = {f"optim.{role}.{part}" for role in ("student", "fake") for part in ("down", "up")}
    assert heads == networks | moments


def test_an_adapter_of_another_teacher_or_scale_is_refused(tmp_path):
    train = {"steps": 2, "report_every": 2, "save_every": 2}
    path = tmp_path / "step-00000002"
    toy.finish(lora_engine(folder=tmp_path, **train))
    says = r"step-00000002: .*student.identity is not this network's, such as an adapter's of another teacher"
    for other in ({"base": toy.denoiser(99)}, {"alpha": 2.0}):
        engine = lora_engine(**train, **other)
        with pytest.raises(checkpoint.CheckpointError, match=says.replace("student", "(average|student|fake)")):
            engine.resume(path)
        with pytest.raises(checkpoint.CheckpointError, match="there: identity is not this network's"):
            checkpoint.load_net(engine.nets["student"], checkpoint.read_weights(path, "net.student"), "there")
    lora_engine(**train).resume(path)


def test_averages_are_of_factors():
    engine = lora_engine(steps=1, average_decay=0.75)
    start = toy.weights(engine.student)
    toy.finish(engine)
    decay = engine.train.profile.decay_at(0)
    for key, value in engine.student.state_dict().items():
        now = engine.nets["student"].state_dict()[key]
        assert torch.equal(value, now if key == "identity" else torch.lerp(start[key], now, 1 - decay)), key
    assert engine.student.base is engine.nets["teacher"]
    into, net = (moved(Lora(engine.nets["teacher"], 2, targets="all"), seed) for seed in (1, 2))
    a, b = toy.weights(into), toy.weights(net)
    average(into, net, 0.9)
    assert all(torch.equal(v, torch.lerp(a[k], b[k], 0.1)) for k, v in toy.weights(into).items() if k != "identity")


def test_the_world_places_a_base_once_whichever_role_comes_first():
    base = backbone("unet", "bf16")
    world = World(layout=Layout(checkpoint_activations=True))
    student, fake = Lora(base, 4, seed=1), Lora(base, 4, seed=2)
    expected = answer(base, "unet")
    for net, kind in ((student, "trained"), (base, "frozen"), (fake, "trained"), (deepcopy(student), "averaged")):
        assert world.place(net, kind) is net
    stored = {p.dtype for block in blocks(base) for p in block.parameters()}
    assert stored == {torch.bfloat16} and all(p.dtype == torch.float32 for p in student.parameters())
    assert [block.forward.args for block in blocks(base) if block.forward.func.__name__ == "_recompute"] != []
    inner = [block.forward.args[0] for block in blocks(base)]  # of the recomputation: what ran before
    assert all(getattr(run, "func", None).__name__ == "_autocast" for run in inner)
    for net in (student, fake, base):
        assert torch.equal(answer(net, "unet"), expected)
    result = gradients(moved(student), "unet")
    assert all(g.dtype == torch.float32 and g.isfinite().all() for g in result.values())


def test_an_engine_in_bfloat16_with_recomputed_activations_trains_factors_near_those_in_float32():
    plain, half = (
        lora_engine(),
        lora_engine(base=bf16(toy.denoiser(1)), world=World(layout=Layout(checkpoint_activations=True))),
    )
    start = toy.weights(plain.nets["fake"])
    metrics = [toy.finish(engine)[-1] for engine in (plain, half)]
    losses = [key for key in metrics[0] if key.startswith("critic/")]
    assert [metrics[1][key] for key in losses] == pytest.approx([metrics[0][key] for key in losses], rel=0.05)
    result, expected = (
        {k: v - start[k] for k, v in toy.weights(engine.nets["fake"]).items() if k != "identity"}
        for engine in (half, plain)
    )
    assert distance(result, expected) < 0.1


def bf16(net: nn.Module) -> nn.Module:
    return type(net)(net.backbone, net.schedule, net.prediction, net.data_std, net.time_scale, "bf16")


# Merged


@pytest.mark.parametrize("name", NAMES)
def test_a_merged_network_gives_what_the_adapter_gives_and_is_plain(name):
    base = backbone(name)
    adapter = moved(Lora(base, 4, alpha=2, targets="all"), std=0.05)
    before, expected = answer(base, name), answer(adapter, name)
    net = merge(adapter, *ask(name))
    assert type(net) is type(base) and net.state_dict().keys() == base.state_dict().keys()
    assert (answer(net, name) - expected).abs().max() < 1e-4 < 0.01 < (expected - before).abs().max()
    hooks = lambda net: sum(len(module._forward_hooks) for module in net.modules())
    assert hooks(net) == hooks(backbone(name)) < hooks(base)
    assert torch.equal(answer(base, name), before) and torch.equal(answer(adapter, name), expected)
    with using(adapter):
        assert torch.equal(answer(net, name), answer(merge(adapter, *ask(name)), name))


def test_a_merged_network_computes_in_its_bases_precision():
    adapter = moved(Lora(backbone("unet", "bf16"), 4, targets="all"), std=0.05)
    net, exact = (
        merge(a, *inputs("unet")) for a in (adapter, moved(Lora(backbone("unet"), 4, targets="all"), std=0.05))
    )
    assert net.precision == "bf16" and all(p.dtype == torch.float32 for p in net.parameters())
    assert toy.same(toy.weights(net), toy.weights(exact))
    rounding = (answer(adapter, "unet") - answer(exact, "unet")).abs().max()
    assert (answer(net, "unet") - answer(exact, "unet")).abs().max() < 2 * rounding < 0.1


class Tied(nn.Module):
    """Two layers with one weight, of which an adapter changes the first."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).tanh())


def test_a_merge_that_would_answer_otherwise_is_refused():
    torch.manual_seed(0)
    adapter, x = moved(Lora(Tied(), 2, targets="first")), torch.randn(8, 4)
    with pytest.raises(ValueError, match=r"merged into its base .* differ by \d.*, above 0.0001; layers that share"):
        merge(adapter, x)
    both = moved(Lora(Tied(), 2, targets="all"))  # each has a change of its own, and they share a weight
    with pytest.raises(ValueError, match="layers that share a weight"):
        merge(both, x)


def test_a_merge_that_is_not_finite_is_refused():
    adapter = moved(Lora(nn.Sequential(nn.Linear(4, 4)), 2, targets="all"), std=float("nan"))
    with pytest.raises(ValueError, match="differ by nan"):
        merge(adapter, torch.randn(2, 4))


# Files


def test_what_is_saved_is_what_is_opened(tmp_path):
    base, path = backbone("unet"), tmp_path / "adapter.safetensors"
    adapter = moved(Lora(base, 3, alpha=5, targets=["attention", "conv_in"]))
    save_adapter(adapter, path)
    result = open_adapter(backbone("unet"), path)
    assert (result.rank, result.alpha, result.targets) == (3, 5.0, ("attention", "conv_in"))
    assert toy.same(toy.weights(result), toy.weights(adapter))
    assert torch.equal(answer(result, "unet"), answer(adapter, "unet"))
    stored = World().place(backbone("unet", "bf16"), "frozen")
    assert fingerprint(stored) == fingerprint(base)
    assert toy.same(toy.weights(open_adapter(stored, path)), toy.weights(adapter))


def test_files_of_another_base_and_damaged_files_are_refused(tmp_path):
    path, other = tmp_path / "adapter.safetensors", backbone("unet")
    save_adapter(Lora(backbone("unet"), 3), path)
    with torch.no_grad():
        other.backbone.model.conv_in.weight.mul_(1.05)
    with pytest.raises(ValueError, match=r"adapter.safetensors: its factors were trained on another network"):
        open_adapter(other, path)
    with pytest.raises(ValueError, match=r"adapter.safetensors: targets: attention, but this network names no"):
        open_adapter(toy.denoiser(), path)
    with pytest.raises(ValueError, match=r"missing.safetensors: .*[Nn]o such file"):
        open_adapter(other, tmp_path / "missing.safetensors")
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(ValueError, match=r"adapter.safetensors: .*incomplete|adapter.safetensors: .*[Ee]rror"):
        open_adapter(backbone("unet"), path)
    save_denoiser(other, tmp_path / "net")
    with pytest.raises(ValueError, match=r"no adapter; its metadata has no 'lora'"):
        open_adapter(other, tmp_path / "net" / "unet" / "diffusion_pytorch_model.safetensors")


def test_an_adapter_is_not_saved_as_if_it_were_its_base(tmp_path):
    with pytest.raises(ValueError, match="net: a Lora is no denoiser; merge"):
        save_denoiser(Lora(backbone("unet"), 2), tmp_path / "net")
    assert not (tmp_path / "net").exists()


# As a recipe names them


LORA = ["roles.student.lora={rank: 4, alpha: 8, targets: [all]}", "roles.fake.lora={rank: 4, targets: [all]}"]
FAST = [f"optim.{role}={{lr: 1e-2}}" for role in ("student", "fake")]


def trained(folder: Path) -> tuple[Recipe, Engine]:
    """Two steps of the demo with adapters, saved as a run saves them."""
    recipe = demo.recipe(folder, "name=lora", "train.steps=2", "train.save_every=1", *LORA, *FAST)
    engine = build.make_engine(recipe, build.make_feed(recipe.data, 0), folder=recipe.checkpoints)
    toy.finish(engine)
    recipe.folder.mkdir(parents=True, exist_ok=True)
    (recipe.folder / "recipe.yaml").write_text(yaml.safe_dump(recipe.model_dump(mode="json")))
    return recipe, engine


@pytest.fixture(scope="module")
def lora_run(tmp_path_factory) -> tuple[Recipe, Engine]:
    return trained(tmp_path_factory.mktemp("runs"))


def test_a_recipe_trains_adapters_on_its_teacher(lora_run):
    recipe, engine = lora_run
    student, fake, teacher = (engine.nets[role] for role in ("student", "fake", "teacher"))
    assert isinstance(student, Lora) and (student.rank, student.alpha, student.targets) == (4, 8.0, ("all",))
    assert fake.scale == 1 and fake.base is student.base is engine.student.base is teacher
    assert toy.same(toy.weights(teacher), toy.weights(open_teacher(recipe.teacher)))
    start = build.make_nets(recipe)
    assert all(not torch.equal(start["student"].down[key], start["fake"].down[key]) for key in student.down)
    assert not toy.same(toy.weights(start["student"]), toy.weights(student))


def test_a_run_with_adapters_resumes_exactly(lora_run):
    recipe, two = lora_run
    one_more = build.make_engine(recipe, build.make_feed(recipe.data, 0))
    one_more.resume(checkpoints(recipe.checkpoints)[0])
    assert one_more.step == 1 and not toy.same(everything(one_more), everything(two))
    toy.finish(one_more)
    assert toy.same(everything(one_more), everything(two))


def test_the_student_of_a_run_with_adapters_is_opened_merged(lora_run):
    recipe, engine = lora_run
    for averaged, net in ((True, engine.student), (False, engine.nets["student"])):
        student = open_student(recipe.folder, None if averaged else False)
        assert type(student.net) is Denoiser and student.averaged == averaged
        z, cond = torch.randn(4, 1, 28, 28), torch.arange(4)
        calls = recipe.method.calls(net)
        with torch.no_grad():
            expected, start = (
                run_calls({"student": n}, calls, z, cond, Draws(0, 0)) for n in (net, engine.nets["teacher"])
            )
            result = student.sampler.sample(z, cond, Draws(0, 0))
        assert (result - expected).abs().max() < 1e-5 < 1e-2 < (expected - start).abs().max()
    assert open_sampler(str(recipe.folder)).name == "few-step-1"
    another = demo.recipe(recipe.folder, f"teacher={recipe.folder}")  # a run is a teacher, too
    assert toy.same(toy.weights(build.make_teacher(another)), toy.weights(open_student(recipe.folder).net))


@pytest.mark.slow
def test_a_run_with_adapters_is_exported_merged_and_gives_the_same_images_in_a_fresh_process(lora_run, tmp_path):
    recipe, engine = lora_run
    report = export_run(recipe.folder, out=tmp_path / "model")
    assert report["max_difference"] <= 1e-5 and report["averaged"]
    exported = open_teacher(tmp_path / "model")
    assert toy.same(toy.weights(exported), toy.weights(open_student(recipe.folder).net))
    card = (tmp_path / "model" / "README.md").read_text()
    assert "running average of a LoRA of rank 4 on all, merged" in card


def test_a_run_whose_merge_would_answer_otherwise_is_not_opened(lora_run, monkeypatch):
    recipe, _ = lora_run
    monkeypatch.setattr(Lora, "weight_change", lambda self, key, layer: torch.zeros_like(layer.weight))
    with pytest.raises(ValueError, match="adapter: merged into its base it gives outputs that differ by"):
        open_student(recipe.folder)


def test_a_second_stage_starts_from_the_first_ones_factors(lora_run, tmp_path):
    recipe, engine = lora_run
    starts = [f"start.student={recipe.folder}", f"start.fake={recipe.folder}/net.fake"]
    nets = build.make_nets(demo.recipe(tmp_path, *LORA, *starts))
    for role in ("student", "fake"):
        assert toy.same(toy.weights(nets[role]), toy.weights(engine.nets[role]))
    with pytest.raises(ValueError, match="start.teacher: adapters change this network; give it by teacher=... instead"):
        build.make_nets(demo.recipe(tmp_path, *LORA, f"start.teacher={recipe.folder}"))
    other = LORA[0].replace("alpha: 8", "alpha: 4")
    with pytest.raises(ValueError, match=r"step-00000002: identity is not this network's, .* another alpha"):
        build.make_nets(demo.recipe(tmp_path, LORA[1], other, *starts))


@pytest.mark.parametrize(
    "arguments, says",
    [
        (
            ["roles.student.lora={targets: [to_qq]}"],
            "roles.student.lora.targets: 'to_qq' matches no .* nearest: to_q,",
        ),
        (["roles.student.lora={rnak: 4}"], r"roles.student.lora.rnak: no such key; did you mean 'rank'\?"),
        (["roles.student.lora={rank: 0}"], "roles.student.lora.rank: must be at least 1, got 0"),
        (["roles.studnet.lora={rank: 4}"], "roles.studnet: no such role; .*; did you mean 'student'"),
        (["roles.disc.lora={rank: 4}"], "roles.disc.lora: dmd2 makes this network anew, not from the teacher"),
    ],
)
def test_mistakes_in_a_role_name_their_field(tmp_path, arguments, says):
    with pytest.raises(ValueError, match=says):
        build.make_nets(demo.recipe(tmp_path, *arguments))


def test_a_new_network_has_no_adapters():
    with pytest.raises(ValueError, match="roles.student.lora: an adapter changes a teacher, not a new network"):
        load_recipe(["roles.student.lora={rank: 4}"], demo.RECIPES, "fashion_mnist_teacher")


def test_a_method_without_a_teachers_role_has_one_with_adapters(tmp_path):
    arguments = ["method={name: denoising}", "optim={student: {lr: 1e-3}}", LORA[0]]
    nets = build.make_nets(demo.recipe(tmp_path, *arguments))
    assert nets.keys() == {"student", "teacher"} and nets["student"].base is nets["teacher"]


# Memory


def test_weights_and_optimisers_of_the_demo_with_adapters_are_at_most_three_tenths(tmp_path):
    """Counted by the dry run: teacher, student with its average, critic, head, and AdamW's moments of what trains."""

    def counted(*arguments: str) -> tuple[int, dict[str, int]]:
        rows = {row["role"]: row for row in memory(demo.recipe(tmp_path, *arguments))}
        total = sum(row["weights"] + row["optimiser"] for row in rows.values())
        return total, {role: row["parameters"] for role, row in rows.items()}

    (whole, parameters), (lora, of_lora) = counted(), counted(*LORA)
    print(f"weights and optimisers with adapters: {lora / whole:.3f} of those without")
    assert of_lora["teacher"] == parameters["teacher"] == parameters["student"] == 704_484
    assert of_lora["student"] == of_lora["fake"] == 62_624 and of_lora["disc"] == parameters["disc"]
    numbers = lambda of: of["teacher"] + 4 * of["student"] + 3 * of["fake"] + 3 * of["disc"]
    assert (whole, lora) == (4 * numbers(parameters), 4 * numbers(of_lora))
    assert lora / whole <= 0.3


def test_a_dry_run_counts_a_teacher_as_it_is_stored(tmp_path):
    """Blocks of a frozen network in bf16 have two bytes a weight; what trains has four."""
    rows = {row["role"]: row for row in memory(demo.recipe(tmp_path, "precision=bf16", *LORA))}
    teacher = open_teacher("shipped:fashion_mnist/teacher")
    inside = sum(p.numel() for block in blocks(teacher) for p in block.parameters())
    assert inside > 0.9 * rows["teacher"]["parameters"]
    assert rows["teacher"]["weights"] == 4 * rows["teacher"]["parameters"] - 2 * inside
    assert rows["student"]["weights"] == 2 * 4 * rows["student"]["parameters"]
    assert rows["fake"]["optimiser"] == 2 * 4 * rows["fake"]["parameters"]


def test_activations_of_an_adapter_count_none_of_its_bases_weights():
    net = nn.Sequential(nn.Linear(300, 300, bias=False), nn.Linear(300, 300, bias=False))
    x = torch.randn(2, 300)
    # of both layers: what enters `down` (300), and what it gives (3), for each sample
    assert saved_bytes(Lora(net, 3, targets="all"), (x,)) == 4 * 2 * 2 * 303
