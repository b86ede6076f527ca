"""Teachers' folders that say anything: each is opened, or refused in one line that names the file."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from safetensors.torch import load_file, save_file

from fewstep.config import ConfigError
from fewstep.networks import weights
from fewstep.networks.pretrained import Network, new_denoiser, open_teacher
from fewstep.texts import quoted

SMALL = dict(
    sample_size=8,
    in_channels=2,
    out_channels=2,
    block_out_channels=(8, 16),
    down_block_types=("DownBlock2D", "AttnDownBlock2D"),
    up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    layers_per_block=1,
    norm_num_groups=4,
    attention_head_dim=8,
)
DIT = dict(
    num_attention_heads=2, attention_head_dim=4, in_channels=2, num_layers=2, sample_size=8, patch_size=2,
    num_embeds_ada_norm=5,
)  # fmt: skip
FILE = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("teacher")
    diffusers.DDPMPipeline(diffusers.UNet2DModel(**SMALL), diffusers.DDPMScheduler()).save_pretrained(folder)
    return folder


@pytest.fixture
def teacher(saved, tmp_path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "t"))


def change(path: Path, **entries: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))


def refused(folder: Path, file: Path | None = None) -> str:
    """The one line with which a teacher is refused, soon, without the name of the file at fault."""
    start = time.monotonic()
    with pytest.raises(ValueError) as error:
        open_teacher(folder)
    assert time.monotonic() - start < 10
    text = str(error.value).removeprefix("teacher: ")
    assert "\n" not in text and (file is None or text.startswith(str(file))), text
    return text.removeprefix(f"{file}: ")


def test_the_folder_itself_is_opened(teacher):
    net = open_teacher(teacher)
    model = diffusers.UNet2DModel.from_pretrained(teacher / "unet").eval()
    assert net.backbone.model.state_dict().keys() == model.state_dict().keys()
    for a, b in zip(net.parameters(), model.parameters(), strict=True):
        assert torch.equal(a, b) and a.requires_grad and a.device.type == "cpu" and a.is_contiguous()
    x = torch.randn(1, 2, 8, 8)
    assert torch.equal(net.backbone.model(x, 7).sample, model(x, 7).sample)


@pytest.mark.parametrize(
    ("entries", "says"),
    [
        ({"_class_name": ["UNet2DModel"]}, "is of class ['UNet2DModel']; known: UNet2DModel, "),
        ({"norm_num_groups": 0}, "ZeroDivisionError: "),
        ({"norm_num_groups": -4}, "norm_num_groups: -4 is not between 0 and"),
        ({"attention_head_dim": 0}, "ZeroDivisionError: "),
        ({"norm_eps": float("nan")}, "norm_eps: nan is not finite"),
        ({"layers_per_block": 10**6}, "more than "),
        ({"layers_per_block": 10**9}, "layers_per_block: 1000000000 is not between"),
        ({"layers_per_block": "two"}, "TypeError: "),
        ({"layers_per_block": {}}, "layers_per_block: {} is no number, text or list"),
        ({"block_out_channels": [8] * 10**4}, "block_out_channels: a list of 10000 values"),
        ({"block_out_channels": 8}, "TypeError: "),
        ({"down_block_types": ["DownBlock2D", "Other"]}, "ValueError: "),
        ({"act_fn": "none of them"}, "ValueError: "),
        ({"act_fn": "x" * 10**5}, "act_fn: 'xxx"),
        ({"sample_size": "8"}, "sample_size: '8', expected a whole number above 0, or two"),
        ({"sample_size": 0}, "sample_size: 0, expected"),
        ({"sample_size": [8, 8, 8]}, "sample_size: [8, 8, 8], expected"),
        ({"sample_size": 1 << 20}, "a sample of shape (2, 1048576, 1048576) has more than"),
        ({"sample_size": 7}, "a sample of shape (2, 7, 7) does not pass: "),
        ({"in_channels": 3, "out_channels": 3}, None),
        ({"out_channels": 1}, "makes (1, 8, 8) of a sample of shape (2, 8, 8)"),
        ({"num_class_embeds": 10**12}, "num_class_embeds: 1000000000000 is not between"),
        ({"num_class_embeds": 1 << 20}, None),
        ({"mid_block_type": None}, "UNet2DModel has no mid_block"),
    ],
    ids=lambda v: "",
)
def test_a_config_that_says_anything(teacher, entries, says):
    file = teacher / "unet/config.json"
    change(file, **entries)
    text = refused(teacher, file if says is not None else teacher / "unet")
    if says is None:
        assert text.startswith("weights and config.json differ in ")
    else:
        assert says in text


@pytest.mark.parametrize("name", ["unet/config.json", "scheduler/scheduler_config.json", "fewstep.json"])
@pytest.mark.parametrize("content", [b"[]", b"7", b"", b"\xff\xfe7", b"{" * 10**5, b'{"a": ' * 999 + b"1" + b"}" * 999])
def test_json_beside_weights_is_an_object(teacher, name, content):
    (teacher / name).write_bytes(content)
    refused(teacher, teacher / name)


@pytest.mark.parametrize(
    ("name", "entries", "says"),
    [
        ("fewstep.json", {"schedule": {"name": ["edm"]}}, "schedule.name: ['edm'] is not one of"),
        ("fewstep.json", {"schedule": []}, "schedule: expected fields"),
        ("fewstep.json", {"schedule": {"name": "ddpm", "steps": 10**12}}, "steps 1000000000000"),
        ("fewstep.json", {"schedule": {"name": "ddpm", "steps": 50_000}}, "pure noise before its last step"),
        ("fewstep.json", {"schedule": {"name": "edm", "t_max": float("inf")}, "prediction": "edm"}, "t_max: expect"),
        ("fewstep.json", {"schedule": {"name": "edm", "rho": 1e-300}, "prediction": "edm"}, "rho 1e-300"),
        ("fewstep.json", {"schedule": {"name": "flow", "shift": float("inf")}, "prediction": "flow"}, "shift: expec"),
        ("fewstep.json", {"time_scale": 0}, "time_scale: must be above 0, got 0"),
        ("fewstep.json", {"patch": 3}, "patch: 3, but in_channels 2 is no multiple of 3^2"),
        ("fewstep.json", {"classes": 10**12}, "classes: 1000000000000, but num_class_embeds is None"),
        ("scheduler/scheduler_config.json", {"_class_name": ["DDPM"]}, "_class_name: expected text, got ['DDPM']"),
        ("scheduler/scheduler_config.json", {"prediction_type": []}, "prediction_type: expected text, got []"),
        ("scheduler/scheduler_config.json", {"num_train_timesteps": 10**12}, "num_train_timesteps: expected 2 to 100"),
        ("scheduler/scheduler_config.json", {"num_train_timesteps": "1"}, "num_train_timesteps: expected 2 to 100"),
        ("scheduler/scheduler_config.json", {"beta_schedule": ["linear"]}, "['linear'] is not one of"),
        ("scheduler/scheduler_config.json", {"beta_end": "x"}, "a value that gives no schedule"),
        ("scheduler/scheduler_config.json", {"_class_name": "EDMEulerScheduler"}, "sigma_min is missing"),
    ],
    ids=lambda v: "",
)  # fmt: skip
def test_a_description_that_says_anything(teacher, name, entries, says):
    if name == "fewstep.json":
        (teacher / name).write_text(json.dumps({"schedule": {"name": "ddpm"}, "prediction": "v"} | entries))
    else:
        change(teacher / name, **entries)
    assert says in refused(teacher)


def test_weights_that_are_not_finite_are_named(teacher):
    tensors = load_file(teacher / FILE)
    for value in (float("nan"), float("inf")):
        tensors["conv_in.bias"][1] = value
        save_file(tensors, teacher / FILE)
        assert refused(teacher, teacher / FILE) == "conv_in.bias holds numbers that are not finite"


def test_weights_of_another_dtype_or_cut_short_are_named(teacher):
    tensors = load_file(teacher / FILE)
    save_file(tensors | {"conv_in.bias": tensors["conv_in.bias"].to(torch.int64)}, teacher / FILE)
    assert refused(teacher, teacher / FILE) == "conv_in.bias is of dtype I64; known: F64, F32, F16, BF16"
    save_file(tensors, teacher / FILE)
    (teacher / FILE).write_bytes((teacher / FILE).read_bytes()[:-8])
    refused(teacher, teacher / FILE)


@pytest.fixture
def sharded(teacher) -> Path:
    model = diffusers.UNet2DModel.from_pretrained(teacher / "unet")
    (teacher / FILE).unlink()
    model.save_pretrained(teacher / "unet", max_shard_size="20KB")
    assert len(list((teacher / "unet").glob("*.safetensors"))) > 1
    return teacher


def test_an_index_names_safetensors_of_its_folder_and_nothing_else(sharded):
    assert open_teacher(sharded).shape == (2, 8, 8)
    index = sharded / f"{FILE}.index.json"
    good = json.loads(index.read_text())["weight_map"]
    first = sorted(set(good.values()))[0]
    shutil.copy(sharded / "unet" / first, sharded / "outside.safetensors")
    for name in ("../outside.safetensors", str(sharded / "outside.safetensors"), "model.bin", ".safetensors", 7, None):
        change(index, weight_map={key: name if file == first else file for key, file in good.items()})
        assert refused(sharded, index) == f"{quoted(name)} is no safetensors file of this folder"
    for wrong in ([], {}, 7):
        change(index, weight_map=wrong)
        assert refused(sharded, index) == f"weight_map: expected an object {{...}}, got {wrong!r}"
    change(index, weight_map=good | {"conv_in.bias": "gone.safetensors"})
    assert refused(sharded, sharded / "unet/gone.safetensors") == "no such file"
    change(index, weight_map={key: file for key, file in good.items() if key != "conv_in.bias"})
    assert refused(sharded, index) == "does not fit its files; 1 tensors differ, such as 'conv_in.bias'"
    index.write_bytes(b"[]")
    refused(sharded, index)


def test_shards_of_a_variant_are_found_by_their_index(teacher):
    model = diffusers.UNet2DModel.from_pretrained(teacher / "unet")
    (teacher / FILE).unlink()
    model.save_pretrained(teacher / "unet", max_shard_size="20KB", variant="fp16")
    net = open_teacher(teacher)
    for a, b in zip(net.parameters(), model.parameters(), strict=True):
        assert torch.equal(a, b)
    next((teacher / "unet").glob("*.index.*")).unlink()
    assert "no diffusion_pytorch_model.safetensors.index.fp16.json" in refused(teacher)


def test_a_folder_may_be_called_as_a_pickle_is(teacher):
    assert open_teacher(teacher.rename(teacher.with_name("model.ckpt"))).shape == (2, 8, 8)


def test_attention_of_the_first_repositories_is_renamed_as_diffusers_does(teacher):
    tensors = load_file(teacher / FILE)
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    renamed = {}
    for key, value in tensors.items():
        for now, then in old.items():
            key = key.replace(f"attentions.0.{now}.", f"attentions.0.{then}.")
        renamed[key] = value
    assert renamed.keys() != tensors.keys()
    before = open_teacher(teacher)
    save_file(renamed, teacher / FILE)
    for a, b in zip(open_teacher(teacher).parameters(), before.parameters(), strict=True):
        assert torch.equal(a, b)


def test_the_published_dit_has_an_older_class_name(tmp_path):
    torch.manual_seed(0)
    model = diffusers.DiTTransformer2DModel(**DIT, out_channels=4)
    model.save_pretrained(tmp_path / "transformer")
    diffusers.DDPMScheduler(variance_type="learned_range").save_pretrained(tmp_path / "scheduler")
    before = open_teacher(tmp_path)
    old = {"_class_name": "Transformer2DModel", "num_vector_embeds": None, "cross_attention_dim": None}
    change(tmp_path / "transformer/config.json", **old)
    net = open_teacher(tmp_path)
    x, label = torch.randn(1, 2, 8, 8), torch.tensor([3])
    with torch.no_grad():
        outs = [n.backbone(x, torch.tensor([7.0]), label, "x0") for n in (net, before)]
    assert net.classes == 5 and torch.equal(*outs)
    change(tmp_path / "transformer/config.json", norm_type="layer_norm")
    assert "is of class 'Transformer2DModel'; known: " in refused(tmp_path)


def test_a_model_computes_no_more_than_it_may_when_it_is_built(tmp_path):
    """A transformer's position embeddings are no weights: they grow with its sample_size alone."""
    diffusers.DiTTransformer2DModel(**DIT).save_pretrained(tmp_path / "transformer")
    diffusers.DDPMScheduler().save_pretrained(tmp_path / "scheduler")
    change(tmp_path / "transformer/config.json", sample_size=1 << 19)
    assert "computes 2,097,152 MiB when it is built, more than 1,024" in refused(tmp_path)


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"layers_per_block": 10**6}, "more than 200 parameters"),
        ({"block_out_channels": (1 << 19, 1 << 20)}, "GiB of parameters, and this machine has"),
        ({"norm_num_groups": 0}, "ZeroDivisionError"),
        ({"sample_size": 7}, "does not pass"),
    ],
    ids=lambda v: "",
)
def test_a_new_network_is_refused_before_memory_is_asked_for(config, says, monkeypatch):
    monkeypatch.setattr(weights, "TENSORS", 200)
    with pytest.raises(ConfigError, match=f"^network.config: UNet2DModel: .*{says}"):
        new_denoiser(Network(config=SMALL | config))


def test_only_this_threads_parameters_are_counted():
    import threading

    def build() -> None:
        torch.nn.Linear(1, 1)

    with weights._on_registration(weights._at_most(2)):
        thread = threading.Thread(target=lambda: [build() for _ in range(3)])
        thread.start(), thread.join()
        build()
        with pytest.raises(ValueError, match="more than 2 parameters"):
            build()
