"""The files of jobs/clusters: against the schema and the versions that there are, and SLURM's on this machine.

Not run anywhere here: an image (it takes a Docker daemon), KubeRay (a Kubernetes cluster) and AWS.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import jsonschema
import pytest
import ray
import yaml
from demo import ROOT, arguments
from ray._common.utils import import_attr
from ray.serve.schema import ServeDeploySchema

from fewstep.config import parse_arguments, validate
from fewstep.recipe import open_recipe
from fewstep.serving.settings import TOKEN, Settings

CLUSTERS = ROOT / "jobs" / "clusters"
LOCK = dict(line.split("==") for line in (ROOT / "requirements.lock").read_text().split())


def test_the_autoscaling_cluster_fits_rays_schema():
    schema = json.loads((Path(ray.__file__).parent / "autoscaler" / "ray-schema.json").read_text())
    jsonschema.validate(yaml.safe_load((CLUSTERS / "autoscaler.yaml").read_text()), schema)


@pytest.mark.parametrize("name", ["rayjob-distill", "rayjob-sweep"])
def test_a_rayjob_runs_the_locked_ray_and_a_command_line_that_is_valid(name):
    job = yaml.safe_load((CLUSTERS / f"{name}.yaml").read_text())
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    cluster = job["spec"]["rayClusterSpec"]
    assert cluster["rayVersion"] == LOCK["ray"] and cluster["authOptions"] == {"mode": "token"}
    python, script, *argv = shlex.split(job["spec"]["entrypoint"])
    assert python == "python" and (ROOT / script).is_file()
    given = parse_arguments(argv)
    own = ("recipe", "space", "search", "seeds", "name")
    recipe = open_recipe(given["recipe"], ROOT / "jobs" / "recipes", {k: v for k, v in given.items() if k not in own})
    most = sum(group["maxReplicas"] for group in cluster["workerGroupSpecs"])
    assert recipe.cluster.workers <= most and recipe.cluster.wait_s >= 600  # nodes of an autoscaler take minutes
    check_pods(cluster)


def check_pods(cluster):
    """No pod runs as root, and what is mounted is there."""
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        pod = group["template"]["spec"]
        assert pod["securityContext"]["runAsNonRoot"]
        mounted = {mount["name"] for mount in pod["containers"][0]["volumeMounts"]}
        assert mounted == {volume["name"] for volume in pod["volumes"]}


def test_the_rayservice_runs_the_locked_ray_and_an_application_that_wants_a_token(tmp_path, monkeypatch):
    service = yaml.safe_load((CLUSTERS / "rayservice.yaml").read_text())
    assert (service["apiVersion"], service["kind"]) == ("ray.io/v1", "RayService")
    cluster = service["spec"]["rayClusterConfig"]
    assert cluster["rayVersion"] == LOCK["ray"] and cluster["authOptions"] == {"mode": "token"}
    check_pods(cluster)
    config = ServeDeploySchema(**yaml.safe_load(service["spec"]["serveConfigV2"]))
    [app] = config.applications
    settings = validate(Settings, app.args)
    assert (config.http_options.host, config.http_options.port) == (settings.host, settings.port)
    assert config.http_options.request_timeout_s > settings.timeout_s
    [workers] = cluster["workerGroupSpecs"]
    assert settings.replicas == workers["maxReplicas"] and settings.device == "cuda"
    for group in (cluster["headGroupSpec"], workers):
        env = {e["name"]: e for e in group["template"]["spec"]["containers"][0]["env"]}
        assert env["PYTHONPATH"]["value"] == "/app" and "secretKeyRef" in env[TOKEN]["valueFrom"]
    monkeypatch.syspath_prepend(str(ROOT))
    build = import_attr(app.import_path)
    monkeypatch.delenv(TOKEN, raising=False)
    with pytest.raises(ValueError, match="set a token in the environment variable FEWSTEP_TOKEN"):
        build(app.args)
    monkeypatch.setenv(TOKEN, "0" * 64)
    built = build(app.args | {"model": "shipped:fashion_mnist/teacher"})
    options = built._bound_deployment
    assert (options.num_replicas, options.ray_actor_options["num_gpus"]) == (settings.replicas, 1)


def test_the_image_has_the_locked_python_and_runs_as_nobody_special():
    text = (CLUSTERS / "Dockerfile").read_text()
    assert re.search(r"^FROM python:3\.11\.\d+-", text, re.M) and "pip install -r requirements.lock" in text
    for target in ("cpu", "cuda"):
        stage = text.split(f" AS {target}\n")[1].split("\nFROM ")[0]
        assert "USER fewstep" in stage


@pytest.mark.slow
def test_slurms_script_starts_ray_on_the_allocation_and_trains(tmp_path):
    """`srun` and `scontrol` are stand-ins that run on this machine; Ray, its token and the job are real."""
    tools = tmp_path / "bin"
    tools.mkdir()
    (tools / "scontrol").write_text("#!/bin/sh\necho localhost\n")
    run = '#!/bin/bash\nwhile [[ "$1" == -* ]]; do [ "$1" = -w ] && shift; shift; done\n'
    (tools / "srun").write_text(run + '[ "$1" = hostname ] && { echo 127.0.0.1; exit; }\nexec "$@"\n')
    for tool in tools.iterdir():
        tool.chmod(0o755)
    here = tmp_path / "checkout"
    (here / ".venv" / "bin").mkdir(parents=True)
    (here / ".venv" / "bin" / "activate").write_text(f'export PATH="{Path(sys.executable).parent}:$PATH"\n')
    for name in ("jobs", "platform"):
        (here / name).symlink_to(ROOT / name)
    slurm = {"SUBMIT_DIR": str(here), "JOB_NODELIST": "localhost", "JOB_ID": str(os.getpid()), "CPUS_PER_TASK": "3"}
    env = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")} | {
        f"SLURM_{k}": v for k, v in slurm.items()
    }
    short = tempfile.mkdtemp(prefix="ray", dir="/tmp")  # paths of sockets are short
    env |= {"PATH": f"{tools}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT / "platform"), "RAY_TMPDIR": short}
    command = [
        "bash",
        str(CLUSTERS / "slurm.sh"),
        "distill",
        *arguments(tmp_path, f"tracking.uri=sqlite:///{tmp_path}/m.db"),
    ]
    with open(tmp_path / "out", "w") as out, open(tmp_path / "errors", "w") as errors:
        process = subprocess.Popen(command, env=env, stdout=out, stderr=errors, start_new_session=True)
    try:
        assert process.wait(timeout=300) == 0, (tmp_path / "errors").read_text()[-3000:]
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        shutil.rmtree(short, ignore_errors=True)
    assert json.loads((tmp_path / "out").read_text().strip().splitlines()[-1])["export_max_difference"] < 1e-5


@pytest.mark.parametrize(
    ("argv", "says"), [([], "usage: sbatch"), (["nothing"], "nothing: no file"), (["distill"], "run this by sbatch")]
)
def test_slurms_script_says_what_is_missing(argv, says, tmp_path):
    env = {"PATH": os.environ["PATH"]} | ({} if argv == ["distill"] else {"SLURM_SUBMIT_DIR": str(ROOT)})
    done = subprocess.run(["bash", str(CLUSTERS / "slurm.sh"), *argv], env=env, capture_output=True, text=True)
    assert done.returncode and says in done.stdout + done.stderr
