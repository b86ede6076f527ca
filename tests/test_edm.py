"""Networks of EDM: a pickle of each architecture becomes a teacher that gives the published network's outputs, and is
distilled like any other.

edm.json holds facts of networks that EDM's own code made: names and shapes of all tensors, attention heads and scale of
each residual block, and outputs, float64, of the weights and inputs that `waves` makes.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import toy
from diffusers import DiffusionPipeline
from diffusers.utils import dynamic_modules_utils
from job import job
from test_convert import Persistent, write_pickle
from test_families import engine
from torch import Tensor, nn

from fewstep.diffusion.level import PREDICTIONS
from fewstep.diffusion.samplers import run_calls
from fewstep.methods.dmd2 import DMD2
from fewstep.networks import export as exporting
from fewstep.networks.card import Card
from fewstep.networks.convert import edm_denoiser, read_pickle
from fewstep.networks.denoiser import Denoiser
from fewstep.networks.lora import Lora, merge
from fewstep.networks.pretrained import network_of, new_head, open_teacher

FACTS = json.loads(Path(__file__).with_name("edm.json").read_text())
SIGMAS, LABELS = [0.02, 1.0, 80.0], [0, 2, 4]
CLASS = {"ddpm++": "SongUNet", "ncsn++": "SongUNet", "adm": "DhariwalUNet"}
FILTER = {"ddpm++": [1, 1], "ncsn++": [1, 3, 3, 1], "adm": [1, 1]}


def waves(shape, first: float = 0) -> Tensor:
    """Numbers in [-1, 1] that a formula makes, float64."""
    i = torch.arange(torch.Size(shape).numel(), dtype=torch.float64)
    return torch.cos(first + 0.37 * i**2).reshape(shape)


def weight(layout: str, number: int, name: str, shape: list[int]) -> Tensor:
    """The tensor of that number in a layout's list."""
    if name.endswith("resample_filter"):
        row = torch.tensor(FILTER[layout], dtype=torch.float64) / sum(FILTER[layout])
        return torch.outer(row, row)[None, None]
    value = waves(shape, number)
    if len(shape) > 1:
        return value * (2 / torch.Size(shape[1:]).numel()) ** 0.5
    return value + 1 if "norm" in name and name.endswith("weight") else value


def snapshot(layout: str, kind: str = "EDMPrecond", **changed) -> dict:
    """The content of a pickle of EDM's. changed: tensors by name, and settings of the residual blocks."""
    facts = FACTS[layout]
    tree: dict = {}
    for number, (name, shape) in enumerate(facts["shapes"].items()):
        *path, last = name.split(".")
        at = tree
        for part in path:
            at = at.setdefault(part, {})
        at[last] = changed.get(name, weight(layout, number, name, shape)).float()

    def module(at: dict, path: str) -> Persistent:
        tensors = OrderedDict((k, v) for k, v in at.items() if isinstance(v, Tensor))
        modules = OrderedDict((k, module(v, f"{path}.{k}".lstrip("."))) for k, v in at.items() if isinstance(v, dict))
        state = {"_parameters": tensors, "_modules": modules}
        if path in facts["heads"]:
            state |= {"num_heads": facts["heads"][path], "skip_scale": np.float64(facts["skip_scale"])}
            state |= {key: value for key, value in changed.items() if key in state}
            return Persistent("UNetBlock", **state)
        return Persistent("Module" if path else CLASS[layout], label_dropout=0, **state)

    settings = {"img_resolution": 8, "img_channels": 3, "label_dim": 0 if layout == "ncsn++" else 5, "sigma_data": 0.5}
    return {"ema": Persistent(kind, **settings, _modules=OrderedDict(model=module(tree, "")))}


# what only repeats another layout's path is left to the slow tests
ONE = [pytest.param(layout, marks=() if layout == "ddpm++" else pytest.mark.slow) for layout in FACTS]


@pytest.fixture(scope="module")
def opened(request, tmp_path_factory) -> tuple[str, Denoiser]:
    """A layout, and the network of its pickle."""
    path = write_pickle(snapshot(request.param), tmp_path_factory.mktemp("edm") / "net.pkl", 2)
    return request.param, edm_denoiser(read_pickle(path)).eval()


def some(net: Denoiser) -> tuple:
    level = net.schedule.level(torch.tensor(SIGMAS, dtype=torch.float64), 4)
    return waves((3, 3, 8, 8)).float(), level, torch.tensor(LABELS) if net.classes else None


@pytest.mark.parametrize("opened", FACTS, indirect=True)
@torch.no_grad()
def test_a_converted_network_gives_the_outputs_of_edms_own(opened):
    """To float64's rounding, but for the attention weights, which EDM's code takes in float32."""
    layout, net = opened
    assert net.prediction == "edm" and net.data_std == 0.5 and net.null is None
    x, level, cond = some(net)
    expected = torch.tensor(FACTS[layout]["outputs"], dtype=torch.float64).view(3, 3, 3, 3)
    exact, time = deepcopy(net.backbone).double(), level.t.log() / 4
    exact_of = lambda x: exact(x, time, cond, "x0")[:, :, ::3, ::3]
    difference = (exact_of(waves(x.shape)) - expected).abs().max().item()
    print(f"{layout}: largest difference to EDM's own {difference:.1e}, of outputs up to {expected.abs().max():.2f}")
    assert difference < 1e-6
    skip, out = PREDICTIONS["edm"](level.alpha, level.sigma, 0.5)
    entering = x * (level.sigma**2 + 0.25).sqrt()
    result = net(entering, level, cond)[:, :, ::3, ::3]
    torch.testing.assert_close(result, skip * entering[:, :, ::3, ::3] + (out * expected).float(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("opened", ONE, indirect=True)
@torch.no_grad()
def test_its_taps_are_the_levels_of_the_encoder_and_the_pass_leaves_at_the_last(opened):
    layout, net = opened
    x, level, cond = some(net)
    taps = tuple(net.backbone.taps)
    x0, maps = net(x, level, cond, "both", at=taps)
    last = FACTS[layout]["shapes"]["dec.2x2_in0.conv0.weight" if layout == "ncsn++" else "dec.4x4_in0.conv0.weight"][0]
    assert maps[-1].shape == (3, last, 8 >> (len(taps) - 1), 8 >> (len(taps) - 1)) and taps[-1] == "middle"
    ran = []
    after = net.backbone.model.mid_block.register_forward_hook(lambda *args: ran.append(1))
    early = net(x, level, cond, "features", at=taps)
    after.remove()
    assert not ran and all(torch.equal(a, b) for a, b in zip(early, maps, strict=True))
    assert new_head(net, taps)(maps).shape == (3,) and torch.equal(x0, net(x, level, cond))


@pytest.mark.parametrize("opened", ONE, indirect=True)
@torch.no_grad()
def test_it_takes_further_scalars_and_blocks_in_bf16(opened):
    layout, net = opened
    x, level, cond = some(net)
    other = deepcopy(net).add_extra("w")
    assert torch.equal(other(x, level, cond, extra={"w": torch.ones(3)}), net(x, level, cond))
    torch.nn.init.ones_(other.extras["w"].out.bias)
    assert (other(x, level, cond, "raw", extra={"w": torch.ones(3)}) - net(x, level, cond, "raw")).abs().max() > 1e-3
    half = Denoiser(deepcopy(net.backbone), net.schedule, "edm", precision="bf16")
    raw, low = net(x, level, cond, "raw"), half(x, level, cond, "raw")
    assert 0 < (raw - low).abs().max() < 0.05 * raw.abs().max()


TWO_STEPS = DMD2(student_steps=2, gan_weight=1e-2)


def rows(count: int, seed: int) -> dict[str, Tensor]:
    return {"real": waves((count, 3, 8, 8), seed).float(), "label": torch.arange(count) % 5}


def distilled(net: Denoiser, lora: bool = False, **layout) -> tuple[nn.Module, dict[str, float]]:
    """The student after a step of DMD2, and the step's report."""
    run = engine(net, SimpleNamespace(rows=rows), lora, TWO_STEPS, **layout)
    before = {role: toy.weights(run.nets[role]) for role in run.nets}
    (report,) = toy.finish(run)
    assert {role for role in run.nets if toy.same(before[role], toy.weights(run.nets[role]))} == {"teacher"}
    return run.nets["student"], report


@pytest.mark.parametrize("opened", ONE, indirect=True)
def test_its_adapters_are_distilled_and_merged(opened):
    layout, net = opened
    student, _ = distilled(net, lora=True, checkpoint_activations=True)
    whole = merge(student, *some(net))
    assert (whole(*some(net)) - net(*some(net))).abs().max() > 1e-5
    attention = Lora(deepcopy(net), 2, targets="attention").layers
    heads = FACTS[layout]["heads"].values()
    assert len(attention) == 2 * sum(map(bool, heads)) and {key.split("/")[-1] for key in attention} == {"qkv", "proj"}


@pytest.mark.parametrize("layout", ONE)
def test_a_pickle_is_converted_distilled_exported_and_opened_again(layout, tmp_path, monkeypatch):
    monkeypatch.setattr(dynamic_modules_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(exporting, "_in_fresh_process", loaded)
    path = write_pickle(snapshot(layout), tmp_path / "net.pkl", 2)
    job("convert")([f"pickle={path}", f"out={tmp_path / 'net'}"])
    net = open_teacher(tmp_path / "net")
    assert toy.same(toy.weights(net), toy.weights(edm_denoiser(read_pickle(path))))
    (student, report), calls = distilled(net), TWO_STEPS.calls(net)
    assert distilled(net, checkpoint_activations=True)[1] == pytest.approx(report, rel=1e-4, abs=1e-6)
    card = Card(name="edm", teacher="edm", method="dmd2", licence="cc-by-nc-sa-4.0")
    exporting.export(student, tmp_path / "model", calls=calls, card=card)
    result = open_teacher(tmp_path / "model")
    assert network_of(result) == network_of(net)
    assert all(torch.equal(p, q) for p, q in zip(result.parameters(), student.parameters(), strict=True))
    pipe = DiffusionPipeline.from_pretrained(tmp_path / "model", trust_remote_code=True)
    pipe.save_pretrained(tmp_path / "copy")
    draws = exporting.InTurn(torch.Generator().manual_seed(0))
    z = draws.normal("z", (4, 3, 8, 8))
    with torch.no_grad():
        ours = run_calls({"student": student}, calls, z, net.conditions.listed(torch.arange(4)), draws)
    assert (loaded(tmp_path / "copy") - ours).abs().max() < 1e-5
    exporting.export(student, tmp_path / "model", calls=calls, card=card, overwrite=True)


def loaded(folder: Path) -> Tensor:
    """Images of the pipeline in a folder."""
    pipe = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)
    assert not type(pipe.unet).__module__.startswith("fewstep")
    return pipe.sample(pipe.labels(None, exporting.CHECKED_IMAGES), torch.Generator().manual_seed(0))


def test_the_label_after_the_last_is_a_row_of_zeros_where_labels_were_dropped(tmp_path):
    content = snapshot("adm")
    content["ema"].meta["state"]["_modules"]["model"].meta["state"]["label_dropout"] = 0.1
    net = edm_denoiser(read_pickle(write_pickle(content, tmp_path / "net.pkl")))
    x, level, _ = some(net)
    without = deepcopy(net)
    torch.nn.init.zeros_(without.backbone.model.time_embedding.label.weight)
    with torch.no_grad():
        assert net.null == 5 and torch.equal(net(x, level, None), without(x, level, torch.tensor(LABELS)))


REFUSED = {
    "ema is a 'Precond'; EDM's EDMPrecond opens, its baselines and EDM2 do not": {"kind": "Precond"},
    "ema is a 'VPPrecond'; EDM's": {"kind": "VPPrecond"},
    "skip_scale is 1.0, expected 0.7": {"skip_scale": 1.0},
    r"resample_filter: not the filter \(1, 1\) of ddpm\+\+": {"enc.4x4_down.conv0.resample_filter": torch.zeros(2, 2)},
    "differ in 1 of .* 'conv_out.bias'": {"dec.8x8_aux_conv.bias": torch.zeros(4)},
}


@pytest.mark.parametrize("says", REFUSED)
def test_networks_with_other_settings_are_refused(says, tmp_path):
    path = write_pickle(snapshot("ddpm++", **REFUSED[says]), tmp_path / "net.pkl")
    with pytest.raises(ValueError, match=f"^pickle: .*{says}") as error:
        edm_denoiser(read_pickle(path))
    assert "\n" not in str(error.value)


def test_one_of_several_networks_is_named(tmp_path):
    both = {"net": snapshot("ddpm++")["ema"], "ema": snapshot("adm")["ema"]}
    result = read_pickle(write_pickle(both, tmp_path / "net.pkl"))
    with pytest.raises(ValueError, match="part: the pickle holds the networks net, ema; name one of them"):
        edm_denoiser(result)
    assert network_of(edm_denoiser(result, "net")).config["layout"] == "ddpm++"
