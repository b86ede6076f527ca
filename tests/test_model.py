"""A registered student as an MLflow model: loaded by its alias in a process that does not know this repository."""

from __future__ import annotations

import base64
import io
import json
import os
import re
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import torch
from demo import free_port
from diffusers import DiffusionPipeline
from diffusers.utils import dynamic_modules_utils
from PIL import Image
from test_every_method import in_this_process
from test_networks import unet

from fewstep.config import UserError
from fewstep.diffusion.samplers import calls_at
from fewstep.diffusion.schedules import EDM
from fewstep.networks import export as exporting
from fewstep.networks.backbones import UNet
from fewstep.networks.card import Card
from fewstep.networks.denoiser import Denoiser
from fewstep.networks.export import export
from fewstep.tracking import Tracker
from fewstep.tracking.runs import exported, inside

LOAD = """
import base64, json, sys
import mlflow, pandas as pd
model = mlflow.pyfunc.load_model("models:/two@newest")
table = model.predict(pd.DataFrame({"label": [3, 1], "count": [1, 2]}), params={"seed": 5})
assert not [name for name in sys.modules if name == "fewstep" or name.startswith("fewstep.")]
print(json.dumps([table["row"].tolist(), [base64.b64encode(png).decode() for png in table["image"]]]))
try:
    model.predict(pd.DataFrame({"label": [3], "count": [10**6]}))
except ValueError as error:
    print(error)
"""


@pytest.fixture(scope="module")
def registered(store, tmp_path_factory) -> tuple[Path, dict[str, str]]:
    """The export of a two-step generator of ten classes, and the environment that finds its registered model."""
    tmp = tmp_path_factory.mktemp("model")
    net = Denoiser(UNet(unet(0, num_class_embeds=11, in_channels=4, out_channels=4), 10, 2), EDM(), "edm")
    with pytest.MonkeyPatch.context() as patch:  # the test below loads the export in a fresh process anyway
        patch.setattr(exporting, "_in_fresh_process", in_this_process)
        patch.setattr(dynamic_modules_utils, "HF_MODULES_CACHE", str(tmp / "modules"))
        export(net, tmp / "export", calls=calls_at(EDM(), (1.0, 0.7), on_ramp=True), card=Card(name="two"))
    run = {"uri": store, "experiment": "model", "name": "two", "recipe": {}, "tags": {}}
    with Tracker.open(tmp / "run", **run) as tracker:
        tracker.model(tmp / "export", "two", "newest")
    assert tracker.unsent == tracker.refused == 0
    return tmp / "export", {**os.environ, "PYTHONPATH": "", "MLFLOW_TRACKING_URI": store}


def expected(folder: Path) -> list[np.ndarray]:
    pipe = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)
    generators = [torch.Generator().manual_seed(seed) for seed in (5, 6, 7)]
    return [np.asarray(image) for image in pipe([3, 1, 1], generator=generators).images]


def decoded(text: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(text))))


def test_a_model_loads_by_its_alias_and_gives_the_images_of_its_pipeline(registered, tmp_path):
    folder, env = registered
    done = subprocess.run([sys.executable, "-P", "-c", LOAD], env=env, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    answer, error = done.stdout.strip().splitlines()
    rows, images = json.loads(answer)
    assert rows == [0, 1, 1] and error == "count: [1000000]; give 1 or more a row, and at most 1000 together"
    for got, wanted in zip(images, expected(folder), strict=True):
        assert np.array_equal(decoded(got), wanted)


def test_its_export_is_found_by_alias_and_by_version(registered):
    folder, env = registered
    for ref in ("models:/two@newest", "models:/two/1"):
        with exported(ref, env["MLFLOW_TRACKING_URI"]) as result:
            names = sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
            assert [(result / name).read_bytes() for name in names] == [(folder / name).read_bytes() for name in names]
        assert not result.exists()


@pytest.mark.parametrize(
    ("ref", "says"),
    [
        ("models:/two@older", "'models:/two@older' is not in"),
        ("models:/three/1", "'models:/three/1' is not in"),
        ("models:/two", "is no registered model"),
        ("models:/../two@newest", "is no registered model"),
        ("models:/..@newest", "is no registered model"),
        ("models:/two@newest/../..", "is no registered model"),
    ],
)
def test_a_reference_to_no_model_is_an_error_of_one_line(registered, ref, says):
    with pytest.raises((UserError, ValueError), match=re.escape(says)) as error:
        with exported(ref, registered[1]["MLFLOW_TRACKING_URI"]):
            pass
    assert "\n" not in str(error.value)


def test_a_model_does_not_point_out_of_its_folder(tmp_path):
    (tmp_path / "MLmodel").write_text("flavors:\n  python_function:\n    data: ../..\n    loader_module: x\n")
    with pytest.raises(ValueError, match="it holds no export of ours"):
        inside(tmp_path)


@pytest.mark.slow
def test_mlflow_serves_it(registered, tmp_path):
    folder, env = registered
    port = free_port()
    command = [sys.executable, "-m", "mlflow", "models", "serve", "-m", "models:/two@newest", "--env-manager", "local"]
    with open(tmp_path / "log", "w") as log:
        command += ["--host", "127.0.0.1", "--port", str(port)]
        server = subprocess.Popen(command, env=env, cwd=tmp_path, stdout=log, stderr=log, start_new_session=True)
    try:
        asked = {"dataframe_split": {"columns": ["label", "count"], "data": [[3, 1], [1, 2]]}, "params": {"seed": 5}}
        request = urllib.request.Request(
            f"http://127.0.0.1:{port}/invocations", json.dumps(asked).encode(), {"Content-Type": "application/json"}
        )
        deadline = time.monotonic() + 120
        while True:
            try:
                answer = json.load(urllib.request.urlopen(request, timeout=60))
                break
            except urllib.error.HTTPError as error:
                pytest.fail(error.read().decode())
            except OSError:
                assert time.monotonic() < deadline and server.poll() is None, (tmp_path / "log").read_text()
                time.sleep(0.5)
    finally:
        os.killpg(server.pid, 15)
        server.wait()
    for row, wanted in zip(answer["predictions"], expected(folder), strict=True):
        assert np.array_equal(decoded(row["image"]), wanted)
