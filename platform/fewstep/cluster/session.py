"""The Ray session: join a cluster, or start a private one on this machine."""

from __future__ import annotations

import atexit
import os
import secrets
import socket
import stat
import tempfile
from collections.abc import Mapping
from functools import cache
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import psutil

for _name, _value in {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}.items():
    os.environ.setdefault(_name, _value)

import ray  # noqa: E402

from ..texts import reason  # noqa: E402

SOURCE = Path(__file__).resolve().parents[2]


class Sealed:
    """Settings for workers that print nothing of their values, because Ray stores the text of settings and shows it in
    its dashboard."""

    def __init__(self, value: Any):
        self.value = value


def connect(cpus: float) -> None:
    """Joins the cluster that RAY_ADDRESS names, else starts a private one with at least `cpus` logical CPUs.

    Logical CPUs are a number for Ray's scheduler. A laptop may declare more than it has, so that one is left for the
    feed. A joined cluster keeps the authentication and the addresses of its owner. Raises ValueError if no cluster
    answers, or if it asks for a token that this machine does not have.
    """
    if ray.is_initialized():
        return
    if address := os.environ.get("RAY_ADDRESS"):
        _authenticate(address)
        ray.init(runtime_env=_environment(), log_to_driver=False)
    else:
        start(max(os.cpu_count() or 1, int(-(-cpus // 1))))


def start(cpus: int, **options: Any) -> None:
    """Starts a private cluster on this machine: nobody else can reach it, read its files or run anything in it.

    options: further arguments of ray.init. Raises ValueError if its folder belongs to another user.
    """
    folder = private()
    settings = {
        "num_cpus": cpus,
        "include_dashboard": False,
        "log_to_driver": False,
        "logging_level": "warning",
        "_temp_dir": str(folder / "ray"),
    }
    ray.init(address="local", runtime_env=_environment(), **settings | options)


@cache
def private() -> Path:
    """Makes every cluster that this process starts a private one, and returns the folder for its files.

    Ray's processes then listen on 127.0.0.1 only, and ask every caller for a token. The token is made here, in a file
    that only this user can read, and removed when this process ends.
    """
    from ray._private import ray_constants
    from ray._raylet import Config

    folder = own_folder()
    file, token = tempfile.mkstemp(prefix="token-", dir=folder)  # its mode is 0600
    os.write(file, secrets.token_hex(32).encode())
    os.close(file)
    atexit.register(_end, Path(token))
    os.environ.pop("RAY_AUTH_TOKEN", None)  # Ray prefers it to the file
    loopback = _loopback()
    os.environ |= {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": token,
        # Ray uses 127.0.0.1 as a node's address only if it believes that no other node can join
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        # torch.distributed would listen on the address of the host's name
        "GLOO_SOCKET_IFNAME": loopback,
        "NCCL_SOCKET_IFNAME": loopback,
    }
    # processes that Ray starts read the environment; this process read it when it imported Ray, so it reads again
    Config.initialize("")
    ray_constants.ENABLE_RAY_CLUSTER = False
    return folder


def own_folder() -> Path:
    """Returns the folder of this user's private clusters. Nobody else can enter it, as files of Ray are open to all.

    It is /tmp/fewstep-<user id>, or in RAY_TMPDIR. Raises ValueError if it cannot be made, or belongs to another user.
    """
    folder = Path(os.environ.get("RAY_TMPDIR") or "/tmp") / f"fewstep-{os.getuid()}"
    way_out = "name a folder of your own, with a short path, by RAY_TMPDIR=..."
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        info = folder.lstat()
    except OSError as error:
        raise ValueError(f"{folder}: cannot be made for Ray's files ({reason(error)}); {way_out}") from None
    if not stat.S_ISDIR(info.st_mode) or info.st_uid != os.getuid() or info.st_mode & 0o077:
        raise ValueError(
            f"{folder}: belongs to another user or is open to others, and Ray's files would lie in it; remove it, or "
            + way_out
        )
    return folder


def _authenticate(address: str, timeout_s: float = 10.0) -> None:
    """Turns on token authentication if the cluster at host:port asks for it.

    Ray alone would try for minutes before it reports that no cluster answers, or that the token is wrong.
    """
    from ray._raylet import AuthenticationTokenLoader, Config

    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not port.isdigit():
        return  # "auto" is the cluster of this machine, whose token Ray finds itself
    if host in ("localhost", "127.0.0.1"):
        host = ray.util.get_node_ip_address()  # Ray uses that address, too
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout_s).close()
    except OSError as error:
        raise ValueError(
            f"RAY_ADDRESS: nothing answers at {address} ({reason(error)}); start a cluster with ray start --head, or "
            "unset RAY_ADDRESS to use this machine alone"
        ) from None
    if address.startswith("ray://") or not asks_for_token(f"{host}:{port}"):
        return
    os.environ["RAY_AUTH_MODE"] = "token"
    Config.initialize("")  # Ray read the mode when it was imported
    tokens = AuthenticationTokenLoader.instance()
    tokens.reset_cache()
    wrong = None
    if not tokens.has_token(ignore_auth_mode=True):
        wrong = "this machine has none"
    elif asks_for_token(f"{host}:{port}", tokens.get_token_for_http_header()):
        wrong = "the one of this machine is wrong"
    if wrong:
        raise ValueError(
            f"RAY_ADDRESS: the cluster at {address} asks for a token, and {wrong}; name its file by "
            "RAY_AUTH_TOKEN_PATH=..., or copy it to ~/.ray/auth_token"
        )


def asks_for_token(address: str, headers: Mapping[str, str] | None = None) -> bool:
    """True if the control service of the cluster at host:port refuses a call with these headers."""
    import grpc

    with grpc.insecure_channel(address) as channel:
        call = channel.unary_unary("/ray.rpc.NodeInfoGcsService/CheckAlive")
        try:
            call(b"", timeout=10, metadata=[(key.lower(), value) for key, value in (headers or {}).items()])
        except grpc.RpcError as error:
            return error.code() == grpc.StatusCode.UNAUTHENTICATED
    return False


def _end(token: Path) -> None:
    ray.shutdown()
    token.unlink(missing_ok=True)


def _environment() -> dict[str, Any]:
    """Returns the runtime environment of every worker, which has the path of this package."""
    paths = [str(SOURCE), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {"env_vars": {"PYTHONPATH": os.pathsep.join(paths)}}


def _loopback() -> str:
    """Returns the name of the network interface with 127.0.0.1, such as lo."""
    interfaces = psutil.net_if_addrs()
    return next(name for name in interfaces if any(address.address == "127.0.0.1" for address in interfaces[name]))


def is_private() -> bool:
    """True if the cluster of this process listens on the loopback address only."""
    return ip_address(ray.get_runtime_context().gcs_address.rpartition(":")[0].strip("[]")).is_loopback
