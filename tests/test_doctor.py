"""The doctor says what is there, names what is broken with the way out, and never waits for it."""

from __future__ import annotations

import copy
import http.server
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from job import job

from fewstep.checks import Check
from fewstep.cluster import doctor
from fewstep.cluster.doctor import part_checks
from fewstep.cluster.train import localized
from fewstep.config import resolve
from fewstep.diagnosis import healthy, judge, table
from fewstep.metrics import inception
from fewstep.metrics.build import Metrics
from fewstep.metrics.build import check as metric_checks
from fewstep.recipe import load_recipe
from fewstep.tracking.store import reach

ROOT = Path(__file__).resolve().parents[1]
ASSETS = resolve("shipped:fashion_mnist")


def run(capsys, *arguments: str) -> tuple[int, str]:
    """Exit status and output of the job, in this process and so on this session's cluster."""
    try:
        job("doctor")(arguments)
        status = 0
    except SystemExit as stop:
        status = stop.code
    return status, capsys.readouterr().out


def closed_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def by_name(checks) -> dict:
    return {c.check: c for c in checks}


def test_a_healthy_cluster_is_described_and_nothing_is_broken(ray_cluster, tmp_path, capsys):
    arguments = [f"out={tmp_path / 'runs'}", f"storage={tmp_path / 'store'}", f"uri=sqlite:///{tmp_path / 'mlflow.db'}"]
    status, output = run(capsys, "recipe=fashion_mnist", *arguments, "--json")
    result = json.loads(output.splitlines()[-1])
    assert status == 0 and result["healthy"]
    assert {c["check"]: c["status"] for c in result["checks"] if c["status"] != "ok"} == {}
    cluster, has = result["facts"]["cluster"], ray_cluster.cluster_resources()
    assert (cluster["cpus"], cluster["gpus"], len(cluster["nodes"])) == (has["CPU"], has.get("GPU", 0), 1)
    assert cluster["memory_gib"] * 2**30 == has["memory"]
    assert cluster["object_store_gib"] * 2**30 == has["object_store_memory"]
    (node,) = result["facts"]["nodes"].values()
    assert node["versions"]["torch"].partition("+")[0] == torch.__version__.partition("+")[0]
    assert node["versions"]["python"] == sys.version.split()[0] and node["versions"]["ray"] == ray_cluster.__version__
    assert node["torchvision"]["error"] is None and {key: len(seen) for key, seen in node["sees"].items()} == {
        "out": 1,
        "storage": 1,
    }
    results = {c["check"]: c["result"] for c in result["checks"]}
    assert results["data"].endswith("fashion_mnist/shards: 10,000 rows, on 1 node")
    assert results["teacher"].endswith("fashion_mnist/teacher, on 1 node")
    assert results["storage storage"] == f"{tmp_path / 'store'}: writable, on 1 node"
    assert results["MLflow"] == f"sqlite:///{tmp_path / 'mlflow.db'}: writable, on 1 node"
    assert results["weights features"].endswith("features.safetensors, on 1 node")
    reduce = result["facts"]["reduce"]
    assert (reduce["backend"], reduce["workers"]) == ("gloo", 2) and reduce["gb_per_s"] > 0.001
    assert (cluster["token"], cluster["address"].split(":")[0]) == (True, "127.0.0.1")
    left = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert left == []  # the probes are gone, and no database was made


class Reduced:
    """In place of the all-reduce, which the test above has seen."""

    def __init__(self, ids, timeout_s): ...

    def reduce(self, until):
        return {"backend": "gloo", "workers": 2, "gpus": 0, "error": None, "gb_per_s": 1.0, "devices": ["CPU", "CPU"]}

    def close(self): ...


@pytest.mark.slow
def test_everything_that_is_broken_is_named_with_the_way_out(ray_cluster, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(doctor, "_Peers", Reduced)
    recipe = (ROOT / "jobs" / "recipes" / "fashion_mnist.yaml").read_text()
    assert "metrics: [fd_fashion, " in recipe
    file = tmp_path / "broken.yaml"
    file.write_text(recipe.replace("metrics: [fd_fashion, ", f"inception: {tmp_path / 'none.pt'}\n  metrics: [fid, "))
    port = closed_port()
    status, output = run(capsys, f"recipe={file}", "out=/proc/runs", f"uri=http://127.0.0.1:{port}", "json=true")
    actual = json.loads(output.splitlines()[-1])
    broken = {c["check"]: (c["result"], c["remedy"]) for c in actual["checks"] if c["status"] == "broken"}
    assert status == 1 and not actual["healthy"]
    assert broken.keys() == {"storage out", "MLflow", "weights inception", "weights inception_reference"}
    for check, result, remedy in (
        ("storage out", ": /proc/runs: cannot write: No such file or directory", "out=..."),
        ("MLflow", f": http://127.0.0.1:{port}: Connection refused", f"mlflow server --host 127.0.0.1 --port {port}"),
        ("weights inception", str(tmp_path / "none.pt"), "evaluate.inception=<path>"),
        ("weights inception_reference", "fid need this file and the recipe names none", "jobs/features.py"),
    ):
        assert result in broken[check][0] and remedy in broken[check][1]


def test_what_does_not_answer_is_a_finding_and_not_a_wait(ray_cluster):
    @ray_cluster.remote(num_cpus=0)
    def hang(seconds):
        time.sleep(seconds)
        return "here"

    @ray_cluster.remote(num_cpus=0, max_retries=0)
    def fail():
        raise ModuleNotFoundError("No module named 'fewstep'")

    ray_cluster.get(hang.remote(0))
    refs = {"a": hang.remote(0), "b": hang.remote(600), "c": fail.remote()}
    ray_cluster.wait([refs["c"]])
    started = time.monotonic()
    result = doctor._collect_answers(refs, started + 3)
    assert time.monotonic() - started < 6
    ray_cluster.cancel(refs["b"], force=True)
    assert result == {
        "a": ("here", None),
        "b": (None, "no answer within 3 s"),
        "c": (None, "No module named 'fewstep'"),
    }


def test_a_cluster_that_is_not_there_is_reported_at_once(tmp_path):
    """In a process of its own: this one has joined a cluster."""
    environment = os.environ | {"RAY_ADDRESS": f"127.0.0.1:{closed_port()}", "FEWSTEP_HOME": str(tmp_path)}
    started = time.monotonic()
    command = [sys.executable, str(ROOT / "jobs" / "doctor.py")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 1 and time.monotonic() - started < 60
    assert "BROKEN" in done.stdout and "Connection refused" in done.stdout and "ray start --head" in done.stdout


def test_a_body_that_hangs_ends_at_the_limit():
    code = "import time\nfrom fewstep.cluster.doctor import within\nwith within(0.2):\n    time.sleep(60)"
    started = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1 and "no answer within 0.2 s; raise limit_s=" in done.stderr
    assert time.monotonic() - started < 50


# The judgement, of made-up facts

WELL = {
    "storage out": "/x/runs: writable",
    "MLflow": "http://u:***@h:5000: answers",
    "weights features": "/x/features.safetensors",
    "data": "/x/data: 10 rows",
}


def node(**changes) -> dict:
    versions = {"python": "3.11.7", "torch": "2.15.0+cu132", "torchvision": "0.29.2", "ray": "2.60.0",
                "diffusers": "0.42.1", "mlflow": "3.17.2", "pyarrow": "25.0.1"}  # fmt: skip
    checks = {name: Check(name, "ok", result) for name, result in WELL.items()}
    if "broken" in changes:
        name, result = changes.pop("broken")
        checks[name] = Check(name, "broken", result, f"the remedy of {name}")
    return {
        "error": None,
        "versions": versions | changes.pop("versions", {}),
        "torchvision": {"needs": "torch>=2.14.0", "error": None},
        "checks": [vars(check) for check in checks.values()],
        "sees": {"out": ["a", "b"]},
    } | changes


def facts(a: dict | None = None, b: dict | None = None, **changes) -> dict:
    """Facts of two nodes a and b with a GPU each, where all is well but for the changes."""
    has = {"id": "0", "cpus": 8.0, "gpus": 1.0, "memory_gib": 30.0, "object_store_gib": 9.0}
    doors = {"address": "10.0.0.1:6379", "token": True, "dashboard": "127.0.0.1:8265"}
    made = {
        "cluster": has | doors | {"error": None, "cpus": 16.0, "nodes": {"a": has, "b": has}},
        "driver": {"versions": node()["versions"]},
        "nodes": {"a": node(**(a or {})), "b": node(**(b or {}))},
        "reduce": {"backend": "nccl", "workers": 2, "gpus": 2, "error": None, "gb_per_s": 40.0, "devices": ["X", "X"]},
        "folders": {"out": "/x/runs"},
        "database": False,
        "asked": True,
    }
    return copy.deepcopy(made | changes)


def test_a_whole_cluster_has_nothing_broken():
    checks = judge(facts())
    assert healthy(checks) and {c.status for c in checks} == {"ok"}
    assert by_name(checks)["all-reduce (nccl)"].result == "2 GPUs (X) add up, 40.00 GB/s"
    assert {name: by_name(checks)[name].result for name in WELL} == {k: f"{v}, on 2 nodes" for k, v in WELL.items()}
    assert table(checks, width=300).splitlines()[-1] == "0 broken, 0 warnings"


BROKEN = {
    "versions differ": (
        facts(b={"versions": {"torch": "2.14.1"}}),
        ("versions", "torch: 2.15.0+cu132 on a, this process; 2.14.1 on b", "requirements.lock"),
    ),
    "another python": (
        facts(a={"versions": {"python": "3.12.1"}}),
        ("versions", "python: 3.12.1 on a; 3.11.7 on b, this process", "one Python"),
    ),
    "a package is missing": (
        facts(a={"versions": {"mlflow": None}}),
        ("versions", "mlflow: none on a; 3.17.2 on b, this process", "requirements.lock"),
    ),
    "torch too old for torchvision": (
        facts(
            **{n: {"torchvision": {"needs": "torch==2.14.0", "error": "operator torchvision::nms does not exist"}}
               for n in "ab"}
        ),
        ("torch and torchvision",
         "a, b: torchvision 0.29.2 needs torch==2.14.0 and torch is 2.15.0+cu132 (operator torchvision::nms does not",
         "built for each other"),
    ),
    "operators that do not load": (
        facts(b={"torchvision": {"needs": None, "error": "undefined symbol: _ZN3c10"}}),
        ("torch and torchvision", "b: undefined symbol: _ZN3c10", "built for each other"),
    ),
    "GPUs do not see each other": (
        facts(reduce={"backend": "nccl", "workers": 2, "gpus": 2, "error": "rank 1: timed out", "gb_per_s": None,
                      "devices": []}),
        ("all-reduce (nccl)", "2 GPUs: rank 1: timed out", "NCCL_SOCKET_IFNAME"),
    ),
    "storage of one node only": (
        facts(a={"sees": {"out": ["a"]}}, b={"sees": {"out": ["b"]}}),
        ("storage out", "not shared: a does not see what b wrote; b does not see what a wrote", "storage=s3://"),
    ),
    "storage that one node cannot write": (
        facts(b={"broken": ("storage out", "/x/runs: cannot write: Read-only file system"), "sees": {}}),
        ("storage out", "b: /x/runs: cannot write: Read-only file system", "the remedy of storage out"),
    ),
    "data on one node only": (
        facts(b={"broken": ("data", "data.path: no folder '/x/data'")}),
        ("data", "b: data.path: no folder '/x/data'", "the remedy of data"),
    ),
    "weights on no node": (
        facts(**{n: {"broken": ("weights features", "features: no file")} for n in "ab"}),
        ("weights features", "a, b: features: no file", "the remedy of weights features"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", BROKEN)
def test_one_broken_thing_is_one_broken_line_with_its_remedy(what):
    made, (name, result, remedy) = BROKEN[what]
    broken = [c for c in judge(made) if c.status == "broken"]
    assert [c.check for c in broken] == [name] and not healthy(broken)
    assert result in broken[0].result and remedy in broken[0].remedy


def test_a_silent_node_is_one_line_and_the_others_are_judged():
    for error, remedy in (("no answer within 90 s", "ray logs"), ("No module named 'fewstep'", "--working-dir .")):
        made = facts()
        made["nodes"]["b"] = {"error": error}
        made["nodes"]["a"]["sees"]["out"] = ["a"]
        checks = judge(made)
        assert [(c.check, c.result) for c in checks if c.status == "broken"] == [("node b", error)]
        assert remedy in by_name(checks)["node b"].remedy
    made["nodes"]["a"] = {"error": "no answer within 90 s"}
    assert [c.check for c in judge(made) if c.status == "broken"] == ["node a", "node b"]
    assert doctor._collect_answers({}, time.monotonic()) == {}


@pytest.mark.parametrize(
    ("doors", "status", "result", "remedy"),
    [
        ({}, "ok", "a token is asked for, and other machines reach 10.0.0.1:6379, with a dashboard at 127.0.0.1:8265",
         ""),
        ({"address": "127.0.0.1:41", "dashboard": ""}, "ok",
         "a token is asked for, and only this machine reaches it, without a dashboard", ""),
        ({"dashboard": "10.0.0.1:8265"}, "warning", "other machines reach 10.0.0.1:6379 and 10.0.0.1:8265",
         "ray start --dashboard-host=127.0.0.1"),
        ({"token": False}, "warning", "open: no token is asked for, and other machines reach 10.0.0.1:6379",
         "export RAY_AUTH_MODE=token"),
        ({"token": False, "address": "127.0.0.1:41"}, "warning", "no token is asked for, and only this machine reaches",
         "export RAY_AUTH_MODE=token"),
    ],
)  # fmt: skip
def test_an_open_cluster_is_reported_as_open(doors, status, result, remedy):
    made = facts()
    made["cluster"] |= doors
    check = by_name(judge(made))["access"]
    assert check.status == status and result in check.result and remedy in check.remedy and healthy(judge(made))


def test_a_cluster_that_cannot_be_joined_is_all_there_is_to_say():
    (check,) = judge({"cluster": {"address": "10.0.0.1:6379", "error": "timed out", "nodes": {}}})
    assert (check.check, check.status) == ("cluster", "broken") and "ray start --head" in check.remedy


def test_warnings_do_not_fail():
    busy = {"backend": "nccl", "workers": 0, "gpus": 2, "error": None, "gb_per_s": None, "devices": []}
    absent = ("weights inception", "no inception-2015-12-05.pt")
    checks = judge(facts(a={"broken": absent}, reduce=busy, database=True, asked=False))
    assert healthy(checks)
    warned = {c.check: c.result for c in checks if c.status == "warning"}
    assert warned.keys() == {"all-reduce (nccl)", "MLflow", "weights inception"}
    assert warned["all-reduce (nccl)"] == "all 2 GPUs are in use"
    assert warned["MLflow"].endswith("on 2 nodes; several nodes should not share a file")
    asked = by_name(judge(facts(a={"broken": absent})))
    assert asked["weights inception"].status == "broken" and asked["weights inception"].result == f"a: {absent[1]}"
    nobody = judge(facts(a={"broken": ("weights inception_reference", "fid need this file")}, asked=False))
    assert healthy(nobody) and "weights inception_reference" not in by_name(nobody)  # only a recipe can name it


# What is looked at


@pytest.mark.parametrize("status", [200, 404])
def test_a_tracking_server_is_asked_for_its_health(status):
    asked = []

    class Server(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            self.send_response(status)
            self.end_headers()

        def log_message(self, *_):
            pass

    server = http.server.HTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        error = reach(f"http://user:secret@127.0.0.1:{server.server_port}/mlflow")
    finally:
        server.shutdown()
        server.server_close()
    assert asked == ["/mlflow/health"] and error == (None if status == 200 else "answers 404 Not Found on /health")


def test_a_store_that_cannot_be_used_says_why(tmp_path):
    assert "refused" in reach(f"http://127.0.0.1:{closed_port()}")
    assert "refused" in reach(f"postgresql+psycopg2://u:p@127.0.0.1:{closed_port()}/mlflow")
    assert reach("sqlite:////proc/x/mlflow.db") == "No such file or directory"
    assert reach(f"sqlite:///{tmp_path}/mlflow.db") is None and list(tmp_path.iterdir()) == []


def test_operators_run_in_a_process_that_may_die(monkeypatch):
    for code, error in (
        (
            "raise RuntimeError('operator torchvision::nms does not exist')",
            "RuntimeError: operator torchvision::nms does",
        ),
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "ended with status -11"),
        ("import time; time.sleep(60)", "no answer within 1 s"),
    ):
        monkeypatch.setattr(doctor, "NMS", code)
        assert doctor.operators(1.0 if "sleep" in code else 60.0).startswith(error)


def test_inception_is_looked_for_and_a_wrong_file_is_no_inception(tmp_path, monkeypatch):
    monkeypatch.setattr(inception, "folders", lambda: (tmp_path / "cache", tmp_path / "tmp"))

    def looked() -> Check:
        result = metric_checks(SimpleNamespace(evaluate=Metrics(metrics=["fid", "kid"])))
        assert [c.check for c in result] == ["weights inception", "weights inception_reference"]
        assert result[1].result == "fid and kid need this file and the recipe names none"
        return result[0]

    absent = looked()
    assert absent.status == "broken" and absent.result.startswith("no inception-2015-12-05.pt in ")
    assert str(tmp_path / "cache") in absent.result and absent.result.endswith(", and so no fid and kid")
    assert absent.remedy.startswith("name it with evaluate.inception=<path>; where there is a network: python -c ")
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / inception.FILE).write_bytes(b"something else")
    assert "is not the official inception-2015-12-05.pt" in looked().result
    monkeypatch.setattr(inception, "SHA256", inception.sha256_of(tmp_path / "cache" / inception.FILE))
    assert looked() == Check("weights inception", "ok", str(tmp_path / "cache" / inception.FILE))


def test_each_part_looks_at_what_the_recipe_names(tmp_path, monkeypatch):
    monkeypatch.setenv("FEWSTEP_HOME", str(tmp_path))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)

    def looked(*arguments: str) -> dict[str, Check]:
        recipe = load_recipe([*arguments], ROOT / "jobs" / "recipes", "fashion_mnist")
        return by_name(part_checks(localized(recipe, download=False).model_dump(mode="json")))

    well = looked()
    assert {c.status for c in well.values()} == {"ok"}
    assert {name: check.result for name, check in well.items()} == {
        "storage out": f"{tmp_path / 'runs'}: writable",
        "MLflow": f"sqlite:///{tmp_path / 'mlflow.db'}: writable",
        "weights features": str(ASSETS / "features.safetensors"),
        "weights reference": str(ASSETS / "statistics.npz"),
        "teacher": str(ASSETS / "teacher"),
        "data": f"{ASSETS / 'shards'}: 10,000 rows",
    }
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []

    shutil.copytree(ASSETS / "teacher", tmp_path / "teacher")
    next((tmp_path / "teacher" / "unet").glob("*.safetensors")).unlink()
    arguments = [f"teacher={tmp_path / 'teacher'}", "data.path=/nowhere", "storage=/proc/x", "evaluate.reference=null"]
    broken = {n: c for n, c in looked(*arguments, "helpers.lpips=hub:nobody/nothing").items() if c.status != "ok"}
    assert {name: re.search(text, broken[name].result) is not None for name, text in {
        "storage storage": "^/proc/x: cannot write: No such file or directory$",
        "weights reference": "^fd_fashion and diversity need this file and the recipe names none$",
        "teacher": f"^teacher: no diffusion_pytorch_model.safetensors in '{tmp_path}/teacher/unet'$",
        "helpers.lpips": "^teacher: hub repository 'nobody/nothing' is neither in the local cache nor",
        "data": "^data.path: no folder '/nowhere'",
    }.items()} == dict.fromkeys(broken, True)  # fmt: skip
    assert all(check.remedy for check in broken.values())


def test_a_part_that_does_not_load_and_a_recipe_that_does_not_fit_are_findings(tmp_path, monkeypatch):
    monkeypatch.setattr(doctor, "PARTS", ("fewstep.nothing",))
    recipe = load_recipe([f"out={tmp_path}"], ROOT / "jobs" / "recipes", "fashion_mnist").model_dump(mode="json")
    (lost,) = part_checks(recipe)
    assert (lost.check, lost.status) == ("fewstep.nothing", "broken") and "No module named" in lost.result
    (unfit,) = part_checks(recipe | {"seed": -1})
    assert unfit.check == "recipe" and "requirements.lock" in unfit.remedy
