"""Pickles of others: tensors come out of them as they are, and nothing that they name is run."""

from __future__ import annotations

import json
import pickle
import sys
from collections import OrderedDict
from pathlib import Path
from types import ModuleType
from unittest.mock import patch

import numpy as np
import pytest
import torch
from job import job
from safetensors.torch import load_file
from test_networks import unet
from torch import nn

from fewstep.diffusion.schedules import EDM
from fewstep.networks.convert import read_pickle
from fewstep.networks.pretrained import open_teacher


class Persistent:
    """An object that is pickled as EDM's files have theirs: a call of a function of torch_utils, with code in it."""

    def __init__(self, name: str, **state):
        self.meta = {"type": "class", "version": 6, "module_src": "raise SystemExit", "class_name": name}
        self.meta["state"] = state

    def __reduce__(self):
        return sys.modules["torch_utils.persistence"]._reconstruct_persistent_obj, (self.meta,)


def write_pickle(content, path: Path, protocol: int = 4) -> Path:
    """A file with the pickle of a content, made where torch_utils is known and read where it is not."""
    module = ModuleType("torch_utils.persistence")
    exec("def _reconstruct_persistent_obj(meta): raise AssertionError('code of a pickle was run')", vars(module))
    module._reconstruct_persistent_obj.__module__ = module.__name__
    with patch.dict(sys.modules, {"torch_utils": ModuleType("torch_utils"), module.__name__: module}):
        path.write_bytes(pickle.dumps(content, protocol))
    return path


@pytest.fixture
def written(tmp_path):
    """(content, protocol) -> a file with its pickle."""
    return lambda content, protocol=4: write_pickle(content, tmp_path / "net.pkl", protocol)


def edm(model: nn.Module) -> dict:
    """A snapshot as EDM writes it, of a network of another class: it lies in "ema", beside what else training had."""
    inner = OrderedDict(model=model)
    state = {"training": False, "_parameters": OrderedDict(), "_buffers": OrderedDict(), "_modules": inner}
    network = Persistent("Wrapped", img_resolution=8, sigma_data=0.5, **state)
    return {"ema": network, "augment_pipe": None, "dataset_kwargs": {"resolution": 8, "mean": np.ones(3)}}


def test_a_snapshot_becomes_a_teacher_where_its_tensors_are_a_networks_and_safetensors_otherwise(written, tmp_path):
    model = unet(1)
    path = written(edm(plain(model)), 2)
    job("convert")([f"pickle={path}", f"network={described(model)}", "part=ema.model", f"out={tmp_path / 'teacher'}"])
    net = open_teacher(tmp_path / "teacher")
    assert isinstance(net.schedule, EDM) and net.data_std == 0.5
    for key, value in model.state_dict().items():
        assert torch.equal(net.backbone.model.state_dict()[key], value)

    job("convert")([f"pickle={path}", f"out={tmp_path / 'tensors'}"])
    tensors = load_file(tmp_path / "tensors" / "tensors.safetensors")
    assert {f"ema.model.{key}" for key in model.state_dict()} == tensors.keys()
    (module, *_) = json.loads((tmp_path / "tensors" / "modules.json").read_text())
    assert module["name"] == "ema" and module["class"] == "Wrapped"
    assert module["settings"] == {"training": False, "img_resolution": 8, "sigma_data": 0.5}


def described(model: nn.Module) -> str:
    """The network that a model of diffusers is, on EDM's schedule."""
    return json.dumps({"config": {key: value for key, value in model.config.items() if not key.startswith("_")}})


def plain(module: nn.Module) -> nn.Module:
    """The same tensors in modules of PyTorch's own classes, as far as a pickle shows it."""
    new = nn.Module()
    for name, value in module.named_parameters(recurse=False):
        new.register_parameter(name, value)
    for name, value in module.named_buffers(recurse=False):
        new.register_buffer(name, value)
    for name, child in module.named_children():
        new.add_module(name, plain(child))
    return new


class Evil:
    def __reduce__(self):
        return print, ("code of a pickle was run",)


class Large:
    """A tensor of a million million numbers in a storage of one."""

    def __reduce__(self):
        storage = torch.zeros(1).storage()
        return torch._utils._rebuild_tensor_v2, (storage, 0, (10**6, 10**6), (0, 0), False, OrderedDict())


class Nested:
    """Bytes of a storage that are a pickle of their own."""

    def __reduce__(self):
        return torch.storage._load_from_bytes, (pickle.dumps(Evil(), 2),)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ({"a": [Evil()]}, r"it names '(__builtin__|builtins).print', which is no tensor"),
        (Nested(), ""),
        ({"ema": Large()}, r"a tensor of shape \(1000000, 1000000\) in 1 numbers"),
        (Path("x"), "it names 'pathlib"),
    ],
    ids=["code", "nested", "large", "class"],
)
def test_a_hostile_pickle_is_refused_and_runs_nothing(written, content, says, capsys, tmp_path):
    path = written(content)
    with pytest.raises(ValueError, match=f"^pickle: {str(path)!r} is refused: .*{says}") as error:
        read_pickle(path)
    assert "\n" not in str(error.value) and "was run" not in capsys.readouterr().out
    with pytest.raises(SystemExit, match="2"):
        job("convert")([f"pickle={path}", f"out={tmp_path / 'out'}"])
    assert not list(tmp_path.glob("*out*"))


def test_files_of_torch_are_read_by_its_own_restricted_reader(written, tmp_path):
    state = {"state_dict": {"a": torch.ones(2, 3), "b": torch.zeros(4, dtype=torch.float16)}}
    for form in (True, False):
        torch.save(state, tmp_path / "model.ckpt", _use_new_zipfile_serialization=form)
        result = read_pickle(tmp_path / "model.ckpt")
        assert result.tensors.keys() == {"state_dict.a", "state_dict.b"} and not result.modules
        torch.save({"a": Evil()}, tmp_path / "evil.ckpt", _use_new_zipfile_serialization=form)
        with pytest.raises(ValueError, match="evil.ckpt' is refused"):
            read_pickle(tmp_path / "evil.ckpt")
    with pytest.raises(ValueError, match="holds no tensor"):
        read_pickle(written({"a": 1}))
    with pytest.raises(ValueError, match="is refused"):
        path = tmp_path / "cut.pkl"
        path.write_bytes(written(state).read_bytes()[:-40])
        read_pickle(path)


def test_tensors_of_another_network_are_distinguished(written, tmp_path, capsys):
    path = written(edm(plain(nn.Sequential(nn.Linear(2, 3)))))
    with pytest.raises(SystemExit, match="2"):
        job("convert")([f"pickle={path}", f"network={described(unet())}", "part=ema.model", f"out={tmp_path / 'x'}"])
    assert "part: 'ema.model': its tensors and those of UNet2DModel differ in" in capsys.readouterr().err
