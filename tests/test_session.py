"""Access to a cluster: a private one answers nobody without its token, and a joined one keeps its owner's mode."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

import grpc
import psutil
import pytest
from demo import listening

from fewstep.cluster import session
from fewstep.cluster.session import asks_for_token, own_folder


def status(url: str, headers: dict[str, str]) -> int:
    """The HTTP status of a job that is submitted with these headers."""
    request = urllib.request.Request(url, b'{"entrypoint": "true"}', {"Content-Type": "application/json"} | headers)
    try:
        with urllib.request.urlopen(request) as answer:
            return answer.status
    except urllib.error.HTTPError as error:
        return error.code


def called(address: str, method: str) -> str:
    """The outcome of a call of Ray's services without a token."""
    with grpc.insecure_channel(address) as channel:
        try:
            channel.unary_unary(f"/ray.rpc.{method}")(b"", timeout=10)
        except grpc.RpcError as error:
            return error.code().name
    return "answered"


def test_a_private_cluster_answers_nobody_without_its_token(ray_cluster):
    file = Path(os.environ["RAY_AUTH_TOKEN_PATH"])
    token = file.read_text()
    assert len(token) == 64
    address = ray_cluster.get_runtime_context().gcs_address
    node = ray_cluster.nodes()[0]
    dashboard = ray_cluster._private.worker._global_node.address_info["webui_url"]
    right, another = ({"Authorization": f"Bearer {word}"} for word in (token, "0" * 64))
    assert [asks_for_token(address, headers) for headers in ({}, another, right)] == [True, True, False]
    raylet = f"{node['NodeManagerAddress']}:{node['NodeManagerPort']}"
    assert called(raylet, "NodeManagerService/RequestWorkerLease") == "UNAUTHENTICATED"
    driver = next(port for process, _, port in listening() if process == psutil.Process().name())
    assert called(f"127.0.0.1:{driver}", "CoreWorkerService/PushTask") == "UNAUTHENTICATED"
    assert [status(f"http://{dashboard}/api/jobs/", headers) for headers in ({}, another)] == [401, 403]


def test_the_token_is_for_its_owner_alone(ray_cluster):
    file = Path(os.environ["RAY_AUTH_TOKEN_PATH"])
    token = file.read_text()
    assert (file.stat().st_mode & 0o777, file.parent.stat().st_mode & 0o777) == (0o600, 0o700)
    folder = Path(ray_cluster._private.worker._global_node.get_session_dir_path())
    assert folder.parents[1].stat().st_mode & 0o777 == 0o700  # Ray opens the folders below it to everybody
    processes = [psutil.Process(), *psutil.Process().children(recursive=True)]
    assert not [process for process in processes if token in " ".join(process.cmdline())]
    logs = [path for path in folder.rglob("*") if path.is_file()]
    assert len(logs) > 10 and not [path for path in logs if token.encode() in path.read_bytes()]


@pytest.mark.parametrize("how", ["open to others", "a link", "a file"])
def test_a_folder_for_rays_files_that_others_could_enter_is_refused(tmp_path, monkeypatch, how):
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    folder = tmp_path / f"fewstep-{os.getuid()}"
    assert own_folder() == folder and folder.stat().st_mode & 0o777 == 0o700
    folder.rmdir()
    if how == "open to others":
        folder.mkdir()
        folder.chmod(0o755)
    elif how == "a link":
        (tmp_path / "other").mkdir(mode=0o700)
        folder.symlink_to(tmp_path / "other")
    else:
        folder.touch()
    with pytest.raises(ValueError, match=rf"{folder}: .*RAY_TMPDIR="):
        own_folder()


JOIN = """
import json, os, sys
from fewstep.cluster.session import _authenticate
said = []
for variables in json.loads(sys.argv[2]):
    os.environ |= variables
    try:
        _authenticate(sys.argv[1])
        said.append(os.environ["RAY_AUTH_MODE"])
    except ValueError as error:
        said.append(str(error))
print(json.dumps(said))
"""


def test_joining_takes_on_the_clusters_mode_and_says_which_token_is_missing(ray_cluster, tmp_path):
    address = ray_cluster.get_runtime_context().gcs_address
    (tmp_path / "another").write_text("0" * 64)
    files = (str(tmp_path / "another"), os.environ["RAY_AUTH_TOKEN_PATH"])
    tokens = [{}, *({"RAY_AUTH_TOKEN_PATH": file} for file in files)]
    bare = {key: value for key, value in os.environ.items() if not key.startswith("RAY_AUTH")} | {"HOME": str(tmp_path)}
    command = [sys.executable, "-c", JOIN, address, json.dumps(tokens)]
    none, another, right = json.loads(subprocess.run(command, env=bare, capture_output=True, check=True).stdout)
    asks = f"RAY_ADDRESS: the cluster at {address} asks for a token, and "
    assert none.startswith(f"{asks}this machine has none; name its file by RAY_AUTH_TOKEN_PATH=")
    assert another.startswith(f"{asks}the one of this machine is wrong; name its file by RAY_AUTH_TOKEN_PATH=")
    assert right == "token"


def test_an_address_where_nothing_answers_is_reported_at_once():
    with pytest.raises(ValueError, match=r"RAY_ADDRESS: nothing answers at 127.0.0.1:1 \(Connection refused\); start"):
        session._authenticate("127.0.0.1:1")
