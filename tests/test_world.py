"""One layout equals another: sharded, hybrid and replicated workers against one plain process; memory; known traps."""

from __future__ import annotations

import gc
import json
from functools import cache
from pathlib import Path

import diffusers
import node
import pytest
import torch
import torch.distributed as dist
import toy
from node import resident
from test_networks import DIT, TEXT, labelled
from torch import Tensor, nn

from fewstep.diffusion.draws import Draws
from fewstep.diffusion.level import Level
from fewstep.diffusion.samplers import run_calls
from fewstep.diffusion.schedules import DDPM, EDM
from fewstep.diffusion.tangent import tangent
from fewstep.engine.optim import Optim
from fewstep.engine.train import Engine, Train
from fewstep.engine.world import Layout, World, full
from fewstep.methods import METHODS
from fewstep.networks.average import average
from fewstep.networks.backbones import EDMUNet, Transformer
from fewstep.networks.blocks import blocks, checkpoint_activations, compile_passes
from fewstep.networks.denoiser import Denoiser
from fewstep.networks.edm import EDMUNetModel
from fewstep.networks.families import TextUNet
from fewstep.networks.lora import Lora
from fewstep.networks.pretrained import Network, new_denoiser, open_teacher, save_denoiser

GAN = METHODS["dmd2"](gan_weight=0.05, critic_updates_per_student_update=2, student_steps=2)
TRAIN = {"steps": 30, "batch": 16, "report_every": 10}
LAYOUTS = {
    "replicate": Layout(),
    "shard": Layout(placement="shard"),
    "shard, recompute": Layout(placement="shard", checkpoint_activations=True, teacher_placement="replicate"),
    "hybrid": Layout(placement="hybrid"),
}
ADAPTED = {
    "replicate": Layout(teacher_placement="shard"),
    "shard": Layout(placement="shard", checkpoint_activations=True, offload_average=True),
}
FILLED = {
    "whole": ("whole", "fp32", Layout()),
    "sharded": ("whole", "fp32", Layout(placement="shard")),
    "averaged": ("averaged", "fp32", Layout(placement="shard", offload_average=True)),
    "under adapters": ("adapter", "bf16", Layout(placement="shard")),
}
OF_SIZE = {2: ["replicate", "shard", "shard, recompute"], 4: ["replicate", "shard", "hybrid"]}


class Descent(torch.optim.Optimizer):
    """Gradient descent whose update `found_inf` cancels, as the engine asks of an optimiser."""

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.sub_(p.grad * (group["lr"] * (1 - self.found_inf.item())))


class Sgd(Optim):
    """In AdamW's place: updates are linear in the gradients, so rounding stays rounding."""

    def build(self, net: nn.Module) -> Descent:
        return Descent(net.parameters(), {"lr": 0.0})


def descending(engine: Engine) -> Engine:
    """The engine with SGD for its optimisers."""
    engine.settings = {role: Sgd(lr=0.05) for role in engine.settings}
    engine.optims = {role: engine.settings[role].build(engine.nets[role]) for role in engine.settings}
    return engine


def sgd_engine(world: World | None = None, **settings):
    """An engine on the toy whose optimisers are SGD, and the gradients of its first two steps by step, phase, name."""
    engine = descending(toy.make_engine(GAN, world=world, **(TRAIN | settings)))
    gradients, optimise = {}, engine._optimise

    def record(index, phase, losses):
        if engine.step < 2:
            for role in phase.trains:
                for name, p in engine.nets[role].named_parameters():
                    gradients[f"{engine.step} {phase.name} {role}.{name}"] = full(p.grad).clone()
        optimise(index, phase, losses)

    engine._optimise = record
    return engine, gradients


def lora_engine(
    world: World | None = None,
    folder: Path | None = None,
    base: Denoiser | None = None,
    alpha: float = 4.0,
    seed_factors: int = 0,
    **train,
) -> Engine:
    """An engine whose student and critic are adapters on its teacher, a network with random weights."""
    base = base or toy.denoiser(1)
    adapters = {role: Lora(base, 4, alpha, "all", seed=seed_factors + i) for i, role in enumerate(("student", "fake"))}
    optims = {role: Optim(lr=3e-3) for role in GAN.roles}
    settings = Train(**{"steps": 10, "batch": 16, "report_every": 5, "save_every": 10} | train)
    nets = {"teacher": base, "disc": toy.head()} | adapters
    feed = toy.Feed(toy.Mixture())
    return Engine(GAN, nets, optims, feed, settings, world=world, folder=folder, recipe={"toy": 1})


def everything(engine) -> dict[str, Tensor]:
    """All trained weights and their average, whole."""
    nets = {role: engine.nets[role] for role in engine.method.roles} | {"average": engine.student}
    return {f"{role}.{k}": full(v).detach().clone() for role, net in nets.items() for k, v in net.state_dict().items()}


def distance(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """|a - b| / |b| over all tensors together."""
    assert a.keys() == b.keys() and len(a)
    square = lambda tensors: sum(t.double().square().sum() for t in tensors)
    return (square(a[k] - b[k] for k in a) / square(b.values())).sqrt().item()


# Networks that diffusers makes

MODELS = ("unet", "text", "dit", "edm")
EDM_UNET = {"layout": "ncsn++", "sample_size": 8, "in_channels": 2, "channels": 8, "channel_mult": (1, 2)}
EDM_UNET |= {"layers_per_block": 1, "attention_sizes": (4,), "num_class_embeds": 5}


def backbone(name: str, precision: str = "fp32") -> Denoiser:
    torch.manual_seed(0)
    if name == "unet":
        return labelled(precision)
    if name == "text":
        model = diffusers.UNet2DConditionModel(**TEXT).eval()
        return Denoiser(TextUNet(model), DDPM(), "eps", time_scale=1e-3, precision=precision)
    if name == "edm":
        model = EDMUNetModel(**EDM_UNET).eval()
        return Denoiser(EDMUNet(model), EDM(), "edm", precision=precision)
    model = diffusers.DiTTransformer2DModel(**DIT).eval()
    for p in model.parameters():  # its output layer starts at zero
        nn.init.normal_(p, std=0.1)
    return Denoiser(Transformer(model), EDM(), "edm", precision=precision)


def inputs(name: str, rank: int = 0, size: int = 1) -> tuple[Tensor, Level, object]:
    """A rank's share of four samples."""
    generator = torch.Generator().manual_seed(5)
    x, text = torch.randn(4, 2, 8, 8, generator=generator), torch.randn(4, 3, 12, generator=generator)
    schedule = DDPM() if name == "text" else EDM()
    times = torch.tensor([100.0, 900, 500, 300] if name == "text" else [0.5, 20, 2, 1], dtype=torch.float64)
    cond = {"text": text[rank::size]} if name == "text" else torch.tensor([0, 4, 2, 3])[rank::size]
    return x[rank::size], schedule.level(times[rank::size], 4), cond


def backbone_loss(net: nn.Module, x: Tensor, level: Level, cond: object) -> Tensor:
    """On a pass without gradients, a whole one and one that leaves at the bottleneck, as a critic's is."""
    with torch.no_grad():
        target = net(x + 1, level, cond)
    x0, (features,) = net(x, level, cond, "both")
    (early,) = net(x - 1, level, cond, "features")
    return (x0 - target).square().mean() + features.square().mean() + early.mean()


def backbone_gradients(net: nn.Module, x: Tensor, level: Level, cond: object) -> dict[str, Tensor]:
    backbone_loss(net, x, level, cond).backward()
    return {name: full(p.grad).float() for name, p in net.named_parameters() if p.grad is not None}


def backbone_tangent(net: nn.Module, x: Tensor, level: Level, cond: object) -> Tensor:
    """Derivative of x0 along a direction in x and in time."""
    f = lambda x, t: net(x, level.schedule.level(t, 4), cond)
    return tangent(f, (x, level.t), (x.cos(), torch.ones_like(level.t)))[1]


# What each process of a world does


def work(rank: int, size: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=size)
    results = {name: equal_training(layout, size) for name, layout in ((n, LAYOUTS[n]) for n in OF_SIZE[size])}
    if size == 2:
        results["teacher"] = bf16_teacher()
        results["adapters"] = {name: trained_adapters(layout) for name, layout in ADAPTED.items()}
        results["frozen first"], results["trained first"] = critic_gradients(True), critic_gradients(False)
        offloaded = World.current(layout=Layout(placement="shard", offload_average=True))
        results["average"] = everything(trained_average(offloaded))
        results["filled"] = {name: filled(*how, Path(folder)) for name, how in FILLED.items()}
        for name in MODELS:
            for precision in ("fp32", "bf16"):
                net = World.current(layout=LAYOUTS["shard, recompute"]).place(backbone(name, precision))
                if precision == "fp32":
                    results[f"{name} tangent"] = backbone_tangent(net, *inputs(name, rank, size))
                results[f"{name} {precision}"] = backbone_gradients(net, *inputs(name, rank, size))
    torch.save(results, f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def world_of(layout: Layout) -> World:
    """Ours; two ranks make a node."""
    return World(dist.get_rank(), dist.get_world_size(), layout=layout, local_size=2)


def equal_training(layout: Layout, size: int) -> dict:
    engine, gradients = sgd_engine(world_of(layout))
    toy.finish(engine)
    smooth = toy.finish(toy.make_engine(GAN, world=world_of(layout), **TRAIN))
    shares = sum(p.to_local().numel() for p in engine.nets["fake"].parameters())
    return {"gradients": gradients, "weights": everything(engine), "metrics": smooth, "held": shares}


def trained_adapters(layout: Layout) -> dict:
    """Factors after ten steps of SGD; numbers that this rank holds of the critic's and of the teacher."""
    engine = descending(lora_engine(world_of(layout)))
    toy.finish(engine)
    engine._reshard()
    sizes = {role: sum(p.to_local().numel() for p in engine.nets[role].parameters()) for role in ("fake", "teacher")}
    return {"factors": everything(engine), "held": sizes}


def bf16_denoiser(seed: int = 0, **kwargs) -> Denoiser:
    return Denoiser(toy.denoiser(seed, **kwargs).backbone, EDM(), "edm", toy.DATA_STD, precision="bf16")


def bf16_teacher() -> dict:
    """A guided teacher's weights before and after six steps, and whether any asked for gradients in a phase."""
    world = World.current(layout=LAYOUTS["shard, recompute"])
    teacher, start = bf16_denoiser(1, classes=4), toy.denoiser(classes=4)
    method = GAN.model_copy(update={"guidance": 2.0})
    engine = toy.make_engine(
        method, teacher=teacher, start=start, data=toy.Mixture(labelled=True), world=world, steps=6
    )
    teacher, asked, optimise = engine.nets["teacher"], [], engine._optimise

    def look(index, phase, losses):
        asked.append(any(p.requires_grad or p.grad is not None for p in teacher.parameters()))
        optimise(index, phase, losses)

    engine._optimise = look
    before = {k: full(v).clone() for k, v in teacher.state_dict().items()}
    toy.finish(engine)
    engine._reshard()
    return {"before": before, "after": {k: full(v) for k, v in teacher.state_dict().items()}, "asked": asked}


def critic_gradients(frozen_first: bool) -> dict[str, Tensor]:
    """Gradients of a bf16 critic whose first pass was, or was not, with frozen weights, as in DMD2's first phase."""
    world = World.current(layout=Layout(placement="shard"))
    net = world.place(bf16_denoiser())
    generator = torch.Generator().manual_seed(world.rank)
    x = torch.randn(8, 2, 1, 1, generator=generator)
    level = EDM().level(torch.full((8,), 2.0, dtype=torch.float64), 4)
    for train in (False, True) if frozen_first else (True,):
        net.requires_grad_(train)
        net(x.clone().requires_grad_(), level).square().mean().backward()
        world.reshard(net)
    assert all(p.grad.dtype == torch.float32 for p in net.parameters())
    return {name: full(p.grad) for name, p in net.named_parameters()}


def filled(kind: str, precision: str, layout: Layout, folder: Path) -> dict[str, Tensor]:
    """State of a network that was placed before its weights were read; its critic's adapter is not trained."""
    net = open_teacher(folder / "net", precision, filled=False)
    adapter = Lora(net, 2)
    net = World.current(layout=layout).place(
        adapter if kind == "adapter" else net, "averaged" if kind == "averaged" else "trained"
    )
    source = net.base if kind == "adapter" else net
    return {name: full(value).clone() for name, value in source.state_dict().items()} | {"identity": adapter.identity}


def trained_average(world: World | None):
    engine, _ = sgd_engine(world, steps=10)
    toy.finish(engine)
    return engine


@pytest.fixture(scope="module")
def world_results(tmp_path_factory):
    """Results of the ranks of a world of n processes; each world is started once."""

    @cache
    def folder(size: int) -> Path:
        return tmp_path_factory.mktemp(f"world-{size}")

    def results(size: int) -> list[dict]:
        if not (folder(size) / "meet").exists():
            save_denoiser(backbone("text"), folder(size) / "net")
            torch.multiprocessing.set_forkserver_preload(["test_world"])  # imported once for all ranks
            torch.multiprocessing.start_processes(work, (size, str(folder(size))), size, start_method="forkserver")
        return [torch.load(folder(size) / f"{rank}.pt", weights_only=True) for rank in range(size)]

    return results


@pytest.fixture(scope="module")
def single():
    """One plain process: gradients, weights after SGD, metrics of AdamW."""
    engine, gradients = sgd_engine()
    toy.finish(engine)
    return {"gradients": gradients, "weights": everything(engine), "metrics": toy.finish(toy.make_engine(GAN, **TRAIN))}


FOUR = [pytest.param(4, name, marks=pytest.mark.slow) for name in OF_SIZE[4]]
WORLDS = [*((2, name) for name in OF_SIZE[2]), *FOUR]


@pytest.mark.parametrize("size, name", WORLDS)
def test_workers_give_the_gradients_of_one_process_in_every_phase(world_results, single, size, name):
    for rank in world_results(size):
        result, expected = rank[name]["gradients"], single["gradients"]
        phases = {" ".join(key.split()[:2]) for key in expected}
        assert phases == {"0 student", "0 critic", "1 critic"}
        for phase in phases:
            part = lambda grads, phase=phase: {k: v for k, v in grads.items() if k.startswith(phase)}
            assert distance(part(result), part(expected)) < 1e-6


@pytest.mark.parametrize("size, name", WORLDS)
def test_workers_have_the_weights_of_one_process_after_thirty_steps_of_sgd(world_results, single, size, name):
    start = everything(sgd_engine()[0])
    assert distance(start, single["weights"]) > 1e-2  # they moved
    for rank in world_results(size):
        assert distance(rank[name]["weights"], single["weights"]) < 1e-6


@pytest.mark.parametrize("size, name", WORLDS)
def test_workers_have_the_losses_of_one_process_after_thirty_steps_of_adamw(world_results, single, size, name):
    losses = ("student/match", "student/gan", "critic/denoise", "critic/gan")
    for rank in world_results(size):
        for result, expected in zip(rank[name]["metrics"], single["metrics"], strict=True):
            assert [result[k] for k in losses] == pytest.approx([expected[k] for k in losses], rel=1e-3)


@pytest.mark.parametrize("size, name", WORLDS)
def test_each_worker_holds_its_share_of_the_weights(world_results, size, name):
    whole = sum(p.numel() for p in toy.denoiser().parameters())
    shards = {"replicate": 1, "hybrid": 2}.get(name, size)
    sizes = [rank[name]["held"] for rank in world_results(size)]
    assert sum(sizes) == whole * size / shards and max(sizes) < 1.1 * whole / shards


@pytest.mark.parametrize("name", ADAPTED)
def test_adapters_of_two_workers_equal_those_of_one_on_a_sharded_base(world_results, name):
    """Replicated factors; and sharded ones, with activations recomputed and the average on the CPU."""
    engine = descending(lora_engine())
    toy.finish(engine)
    expected = {key: value for key, value in everything(engine).items() if ".up." in key}  # they start at zero
    assert {key.split(".")[0] for key in expected} == {"student", "fake", "average"} and all(
        map(torch.any, expected.values())
    )
    whole = {role: sum(p.numel() for p in engine.nets[role].parameters()) for role in ("fake", "teacher")}
    ranks = [rank["adapters"][name] for rank in world_results(2)]
    for rank in ranks:
        assert distance({key: rank["factors"][key] for key in expected}, expected) < 1e-6
    sizes = {role: sum(rank["held"][role] for rank in ranks) for role in whole}
    assert sizes == {"fake": whole["fake"] * (2 if name == "replicate" else 1), "teacher": whole["teacher"]}


@pytest.mark.parametrize("name", MODELS)
def test_sharded_diffusers_models_give_the_gradients_of_plain_ones(world_results, name):
    """With activations recomputed, early exit, and (dit) an embedding that is called inside and outside its block."""
    for precision, near in (("fp32", 1e-6), ("bf16", 0.01)):
        expected = backbone_gradients(backbone(name, precision), *inputs(name))
        for rank in world_results(2):
            assert distance(rank[f"{name} {precision}"], expected) < near


@pytest.mark.parametrize("name", MODELS)
def test_sharded_diffusers_models_have_the_tangents_of_plain_ones(world_results, name):
    expected = backbone_tangent(backbone(name).requires_grad_(False), *inputs(name))
    for rank, results in enumerate(world_results(2)):
        difference = results[f"{name} tangent"] - expected[rank::2]
        assert difference.norm() < 1e-5 * expected.norm()
        assert expected[rank::2].flatten(1).norm(dim=1).min() > 1e-2


# The traps


def test_trap_11_the_teacher_is_never_unfrozen_nor_changed(world_results):
    for rank in world_results(2):
        teacher = rank["teacher"]
        assert len(teacher["asked"]) == 9 and not any(teacher["asked"])
        assert toy.same(teacher["before"], teacher["after"])
        dtypes = {k: v.dtype for k, v in teacher["before"].items()}
        assert dtypes.pop("backbone.label.weight") == torch.float32  # all else is in the blocks
        assert set(dtypes.values()) == {torch.bfloat16}
    net = World().place(labelled("bf16"), "frozen")
    stored = {name: p.dtype for name, p in net.backbone.model.named_parameters()}
    for name, dtype in stored.items():
        assert dtype == (torch.bfloat16 if "blocks." in name or "mid_block." in name else torch.float32)
    assert all(p.dtype == torch.float32 for p in World().place(labelled("bf16")).parameters())


def test_trap_12_a_critic_that_first_ran_frozen_reduces_its_gradients_in_float32(world_results):
    for rank in world_results(2):
        assert toy.same(rank["frozen first"], rank["trained first"])
        for gradient in rank["frozen first"].values():  # the mean of two bf16 gradients has more digits than bf16 has
            assert gradient.abs().max() == 0 or not torch.equal(gradient, gradient.bfloat16().float())


def test_trap_15_the_step_of_backward_simulation_is_one_for_all_ranks_and_no_message_says_so():
    assert not dist.is_initialized()
    for step in range(50):
        parts = {Draws(3, step, rank, size).choice("last", 4) for size in (1, 2, 4) for rank in range(size)}
        assert len(parts) == 1
    assert {Draws(3, step).choice("last", 4) for step in range(50)} == {0, 1, 2, 3}


def test_trap_18_the_output_layer_near_pure_noise_is_not_rounded_to_bf16():
    """There eps, and its rounding with it, becomes x0 with the factor sigma / alpha."""
    net, seen = labelled("bf16", schedule=DDPM(), prediction="eps"), []
    layer = net.backbone.model.conv_out
    layer.register_forward_hook(lambda module, args, eps: seen.extend((args[0], eps)))
    x, at = inputs("unet")[0], DDPM().level(torch.full((4,), 999.0, dtype=torch.float64), 4)
    with torch.no_grad():
        net(x, at, torch.tensor([0, 1, 2, 3]))
        features, eps = seen
        exact = nn.functional.conv2d(features.double(), layer.weight.double(), layer.bias.double(), padding=1)
    assert (eps - exact).abs().max() < 1e-6 < 1e-4 < (exact.bfloat16() - exact).abs().max()


def test_trap_19_a_pass_without_gradients_leaves_those_of_the_next_alone():
    """Even where the caller's own autocast region, whose cache outlives a pass, spans both."""
    net = backbone("unet", "bf16")
    with torch.autocast("cpu", torch.bfloat16):
        loss = backbone_loss(net, *inputs("unet"))
    loss.backward()
    result = {name: p.grad for name, p in net.named_parameters()}
    assert toy.same(result, backbone_gradients(backbone("unet", "bf16"), *inputs("unet")))


# Memory and speed by switch


@pytest.mark.parametrize("name", MODELS)
def test_recomputed_activations_give_the_same_gradients_and_names(name):
    plain, thrifty = backbone(name), backbone(name)
    checkpoint_activations(thrifty)
    assert plain.state_dict().keys() == thrifty.state_dict().keys()
    assert distance(backbone_gradients(thrifty, *inputs(name)), backbone_gradients(plain, *inputs(name))) < 2e-6


class Counted:
    """A backend of torch.compile that runs the graph as it is and counts the runs."""

    def __init__(self):
        self.runs = 0

    def __call__(self, graph, example_inputs):
        def run(*args):
            self.runs += 1
            return graph.forward(*args)

        return run


@pytest.mark.parametrize("passes", [[], ["full"], ["encoder"], ["no_grad"], ["encoder", "no_grad"]])
def test_only_the_chosen_passes_are_compiled(passes):
    net, plain, backend = toy.denoiser(), toy.denoiser(), Counted()
    compile_passes(net, passes, backend=backend)
    x, level = torch.randn(4, 2, 1, 1), EDM().level(torch.full((4,), 2.0, dtype=torch.float64), 4)
    runs = {}
    for name, mode in (("full", "both"), ("encoder", "features"), ("no_grad", "x0")):
        before = backend.runs
        with torch.set_grad_enabled(name != "no_grad"):
            torch.testing.assert_close(net(x, level, None, mode), plain(x, level, None, mode), rtol=0, atol=0)
        runs[name] = backend.runs - before
    parts = {"full": 2, "encoder": 1, "no_grad": 2}  # the encoder pass needs no decoder
    assert runs == {name: count * (name in passes) for name, count in parts.items()}


def test_blocks_are_the_outermost_and_cover_what_is_heavy():
    unet, dit = backbone("unet"), backbone("dit")
    model = unet.backbone.model
    assert set(blocks(unet)) == {*model.down_blocks, model.mid_block, *model.up_blocks}
    assert len(blocks(backbone("text"))) == 5  # not the transformer blocks inside
    assert blocks(dit) == list(dit.backbone.model.transformer_blocks)
    mlp, head = toy.denoiser(), toy.head()
    assert blocks(mlp) == [mlp.backbone.encoder, mlp.backbone.decoder]
    assert blocks(head) == [head.layers] and blocks(toy.Mixture()) == []


def test_an_offloaded_average_equals_the_plain_one(world_results):
    expected = everything(trained_average(None))
    for rank in world_results(2):
        assert distance(rank["average"], expected) < 1e-6


@pytest.fixture
def alone(tmp_path):
    """A world of one process that torch.distributed knows of."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_one_sharded_process_equals_a_plain_one_bit_for_bit(alone):
    layout = Layout(placement="shard", offload_average=True, checkpoint_activations=True)
    plain, sharded = trained_average(None), trained_average(World.current(layout=layout))
    assert all(hasattr(p, "full_tensor") for p in sharded.student.parameters())
    assert toy.same(everything(plain), everything(sharded))
    z, draws = torch.randn(8, 2, 1, 1), Draws(0, 0)
    with torch.no_grad():
        x = [run_calls({"student": e.student}, GAN.calls(e.student), z, None, draws) for e in (sharded, plain)]
        assert torch.equal(*x)


def test_compiled_recomputed_sharded_blocks_give_the_gradients_of_plain_ones(alone):
    net = backbone("unet")
    checkpoint_activations(net)
    compile_passes(net, ["encoder"], backend="eager")
    net = World.current(layout=Layout(placement="shard")).place(net)
    expected = backbone_gradients(backbone("unet"), *inputs("unet"))
    assert distance(backbone_gradients(net, *inputs("unet")), expected) < 2e-6


def test_an_average_may_live_elsewhere_than_what_it_averages():
    into, net = nn.Linear(2, 2), nn.Linear(2, 2)
    expected = torch.lerp(into.weight.detach(), net.weight.detach(), 0.25)
    average(into, net, 0.75)
    assert torch.equal(into.weight, expected)


def test_offloading_needs_torch_distributed():
    with pytest.raises(ValueError, match="cluster.offload_average: true needs torch.distributed, .* jobs/distill.py"):
        toy.make_engine(GAN, world=World(layout=Layout(offload_average=True)))


def test_hybrid_needs_full_nodes():
    with pytest.raises(ValueError, match="cluster.placement: hybrid .* 6 workers are no multiple of the 4 on"):
        World(0, 6, layout=Layout(teacher_placement="hybrid"), local_size=4)


def test_the_workers_of_a_node_are_counted_from_the_environment(alone, monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    assert World.current().local_size == 1
    monkeypatch.delenv("LOCAL_WORLD_SIZE")
    assert World.current().local_size == World.current().size == 1


@pytest.mark.parametrize("name", FILLED)
def test_a_rank_that_reads_its_own_shards_has_the_weights_of_the_files(world_results, name):
    expected = backbone("text")
    identity = Lora(expected, 2).identity
    if name == "under adapters":
        expected = World().place(Denoiser(expected.backbone, DDPM(), "eps", precision="bf16"), "frozen")
    expected = expected.state_dict() | {"identity": identity}
    for rank in world_results(2):
        result = rank["filled"][name]
        assert result.keys() == expected.keys()
        for key, value in expected.items():
            assert torch.equal(result[key], value) and result[key].dtype == value.dtype, key


# Peak memory


class Deep(nn.Module):
    """A backbone of about 38 MB whose activations are nothing: twelve blocks of two layers."""

    WIDTH, BLOCKS = 640, 12

    def __init__(self):
        super().__init__()
        self.shape, self.classes = (2, 1, 1), None
        self.first, self.last = nn.Linear(3, self.WIDTH), nn.Linear(self.WIDTH, 2)
        layer = lambda: nn.Linear(self.WIDTH, self.WIDTH)
        self.blocks = nn.ModuleList(nn.Sequential(layer(), nn.SiLU(), layer()) for _ in range(self.BLOCKS))

    def forward(self, x: Tensor, time: Tensor, cond: None, mode: str, at=("middle",), shift=None):
        h = self.first(torch.cat([x.flatten(1), time[:, None]], 1))
        for i, block in enumerate(self.blocks):
            h = h + 0.1 * block(h)
            if i == self.BLOCKS // 2:
                features = (h[:, :48, None, None],)
                if mode == "features":
                    return features
        out = self.last(h).view_as(x)
        return (out, features) if mode == "both" else out


def measure(rank: int, size: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=size)
    world = World.current(layout=LAYOUTS["shard"])
    train = {"steps": 4, "batch": 4 * size, "average_decay": None, "world": world}
    toy.finish(toy.make_engine(GAN, **train))  # what is loaded on first use is no part of the state
    gc.collect()
    before = resident("VmRSS")
    engine = toy.make_engine(GAN, start=Denoiser(Deep(), EDM(), "edm", toy.DATA_STD), **train)
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")
    toy.finish(engine)
    Path(folder, str(rank)).write_text(str(resident("VmHWM") - before))
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.slow
def test_four_workers_hold_a_third_of_the_state_and_one_block_at_their_peak(tmp_path, monkeypatch):
    """Student and critic with gradients and AdamW's moments, against what one worker would hold of them."""
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "65536")  # what is freed goes back at once
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "65536")
    torch.multiprocessing.spawn(measure, (4, str(tmp_path)), nprocs=4)
    net = Deep()
    size = lambda module: sum(p.numel() * p.element_size() for p in module.parameters())
    state, block = 2 * 4 * size(net), size(net.blocks[0])
    peaks = [int((tmp_path / str(rank)).read_text()) for rank in range(4)]
    share = (max(peaks) - block) / state
    print(f"peak {max(peaks) / 2**20:.1f} MiB: one block and {share:.3f} of the state of {state / 2**20:.0f} MiB")
    assert state > 250 * 2**20 and 0.25 < share <= 0.35


@pytest.mark.slow
def test_two_workers_that_start_a_large_model_hold_little_more_than_its_roles_once(tmp_path, monkeypatch):
    """Teacher, student, critic and average of 200 M parameters on one node, interpreters and libraries included."""
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "65536")  # what is freed goes back at once
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "65536")
    widths = {"block_out_channels": [288, 576, 896], "down_block_types": ["DownBlock2D"] * 3}
    config = {"sample_size": 8, "layers_per_block": 2, "up_block_types": ["UpBlock2D"] * 3} | widths
    net = new_denoiser(Network(config=config | {"in_channels": 3, "out_channels": 3}))
    size = sum(p.nbytes for p in net.parameters())
    assert size > 4 * 200e6
    save_denoiser(net, tmp_path / "large")
    del net
    recipe = {"teacher": str(tmp_path / "large"), "method": {"name": "swiftbrush"}, "train": {"steps": 1}}
    recipe |= {
        "optim": {"student": {"lr": 1e-4}, "fake": {"lr": 1e-4}},
        "cluster": {"workers": 2, "placement": "shard"},
    }
    (tmp_path / "large.yaml").write_text(json.dumps(recipe))
    torch.multiprocessing.spawn(node.start, (2, str(tmp_path)), nprocs=2)
    ranks = [json.loads((tmp_path / str(rank)).read_text()) for rank in range(2)]
    shared = min(rank["libraries"] for rank in ranks)  # pages of libraries are in memory once, and count for each rank
    before, peak, sizes = (sum(rank[name] for rank in ranks) for name in ("before", "peak", "held"))
    peak -= shared
    print(
        f"{peak / 2**20:.0f} MiB at most, {(before - shared) / 2**20:.0f} before: {peak / (4 * size):.2f} of the roles"
    )
    assert sizes == pytest.approx(4 * size, rel=0.01)
    assert peak <= 1.6 * 4 * size
