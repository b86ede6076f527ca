"""What a cluster has, and what of it would break a run: facts gathered on every node, and a judgement of them.

    facts = examine(wanted(recipe=None, out="runs"), limit_s=300)
    checks = judge(facts)                     # a pure function: (check, status, result, remedy) of each
    print(table(checks))

One task a node looks at versions, torchvision's operators, storage, tracking, files and data, from where workers will
run; one process a GPU (or two and more CPU processes) adds numbers up over all of them. Whatever has not answered in
time is a finding, not a wait.
"""

from __future__ import annotations

import contextlib
import io
import os
import platform
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import timedelta
from importlib import metadata
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import urlsplit

from packaging.requirements import Requirement

from ..config import resolve, resolve_out_ref
from ..engine.storage import Place, reason
from .session import asks_for_token, connect

if TYPE_CHECKING:  # with torch, which a node should not need to be looked at
    from ..metrics.build import Metrics
    from ..recipe import Recipe

PACKAGES = ("torch", "torchvision", "ray", "diffusers", "mlflow", "pyarrow")
LOCK = "install the same requirements.lock on every node: pip install -r requirements.lock"
CPU_MIB, GPU_MIB, ROUNDS = 16, 256, 5  # of the all-reduce
PORTS = {"http": 80, "https": 443, "postgresql": 5432, "mysql": 3306, "mssql": 1433}

# In a process of its own: operators built for another torch may end the process that loads them.
NMS = """
import torch, torchvision.ops
boxes = torch.tensor([[0.0, 0.0, 2.0, 2.0], [0.0, 0.0, 2.0, 2.1], [5.0, 5.0, 6.0, 6.0]])
kept = torchvision.ops.nms(boxes, torch.tensor([0.5, 0.9, 0.1]), 0.5).tolist()
assert kept == [1, 2], f"nms kept {kept} of three boxes where it has to keep [1, 2]"
"""


@dataclass(frozen=True)
class Check:
    """One line of the doctor's table. `remedy` is what to do; empty where nothing is to be done."""

    check: str
    status: Literal["ok", "warning", "broken"]
    result: str
    remedy: str = ""


@dataclass(frozen=True)
class Wanted:
    """What runs will use, with absolute paths: what the doctor looks for.

    folders: by setting (out, storage). uri: of the tracking store. database: its file, where it is SQLite.
    data: folder of shards.
    """

    folders: dict[str, str]
    uri: str
    database: str | None
    data: str | None


SHIPPED = {
    "metrics": ["class_consistency", "diversity", "fid", "kid"],
    "features": "shipped:fashion_mnist/features.safetensors",
    "reference": "shipped:fashion_mnist/statistics.npz",
}
"""What is scored with where there is no recipe."""


def wanted(
    recipe: Recipe | None = None, out: str | None = None, storage: str | None = None, uri: str | None = None
) -> Wanted:
    """What a recipe's run would use; what is given beside it comes first.

    Raises ValueError for a tracking store that is none.
    """
    from ..tracking.store import database, tracking_uri

    out = out or (recipe.out if recipe else "runs")
    storage = storage or (recipe.storage if recipe else None)
    folders = {key: str(resolve_out_ref(path)) for key, path in (("out", out), ("storage", storage)) if path}
    uri = tracking_uri(uri or (recipe.tracking.uri if recipe else None))
    file = database(uri)
    return Wanted(
        folders=folders,
        uri=uri,
        database=None if file is None else str(file),
        data=str(resolve(recipe.data.path)) if recipe and recipe.data else None,
    )


# What is looked at on a node


def versions() -> dict[str, str | None]:
    """Of Python and the packages that have to match, in this process; None for one that is not installed."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found


def torch_wanted() -> str | None:
    """Which torch the installed torchvision says it needs, such as torch>=2.14.0."""
    try:
        needs = [Requirement(text) for text in metadata.requires("torchvision") or []]
    except metadata.PackageNotFoundError:
        return None
    return next((str(need) for need in needs if need.name == "torch"), None)


def operators(timeout_s: float) -> str | None:
    """Why torchvision's compiled operators do not work here, or None: nms is called for three boxes."""
    try:
        done = subprocess.run([sys.executable, "-c", NMS], capture_output=True, text=True, timeout=timeout_s)
    except subprocess.TimeoutExpired:
        return f"no answer within {timeout_s:.0f} s"
    return None if done.returncode == 0 else _last_line(done.stderr or f"ended with status {done.returncode}")


def reach(uri: str, database: str | None, timeout_s: float = 10.0) -> str | None:
    """Why the tracking store cannot be used from here, or None.

    An SQLite file's folder has to be writable; a server has to answer /health; any other database's port to be open.
    """
    if database is not None:
        if os.path.exists(database) and not os.access(database, os.W_OK):
            return f"{database} is not writable"
        folder, probe = os.path.dirname(database), f".doctor.{uuid.uuid4().hex}"
        return _write(folder, probe) or _unwrite({"": folder}, probe)
    parts = urlsplit(uri)
    port = parts.port or PORTS[parts.scheme.partition("+")[0]]
    try:
        if not parts.scheme.startswith("http"):
            socket.create_connection((parts.hostname, port), timeout_s).close()
            return None
        address = f"{parts.scheme}://{parts.hostname}:{port}{parts.path}/health"
        with urllib.request.urlopen(address, timeout=timeout_s) as answer:  # noqa: S310 - http or https
            answer.read()
    except urllib.error.HTTPError as error:
        return f"answers {error.code} {error.reason} on /health"
    except OSError as error:
        return _last_line(reason(getattr(error, "reason", error)))
    return None


def _write(folder: str, probe: str) -> str | None:
    """Writes a probe and reads it back: why that failed, or None."""
    try:
        place = Place.of(folder)
        place.make()
        (place / probe).write(probe.encode())
        return None if (place / probe).read() == probe.encode() else "what was written reads back otherwise"
    except Exception as error:  # an object store's library has errors of its own, and each is a finding
        return _last_line(reason(error))


def _see(folders: dict[str, str], probes: list[str]) -> dict[str, list[str]]:
    """Which of the probes that the nodes wrote can be seen from here, by setting."""
    return {key: [p for p in probes if (Place.of(folder) / p).is_file()] for key, folder in folders.items()}


def _unwrite(folders: dict[str, str], probe: str) -> None:
    for folder in folders.values():
        if (Place.of(folder) / probe).is_file():
            (Place.of(folder) / probe).remove()


def _shards(path: str) -> dict[str, Any]:
    """Whether a set of shards is all there: sizes, footers and columns are looked at, not every byte."""
    from ..data.shards import ShardError, open_shards

    try:
        return {"rows": open_shards(path, "size").rows, "error": None}
    except (ShardError, OSError) as error:
        return {"rows": 0, "error": " ".join(str(error).split())}


def look(wanted: Wanted, probe: str, files: list[str], timeout_s: float) -> dict[str, Any]:
    """What one node has: the facts that `judge` asks of each. Its probes in the folders stay, for the others to see."""
    return {
        "error": None,
        "versions": versions(),
        "torchvision": {"needs": torch_wanted(), "error": operators(timeout_s)},
        "storage": {key: {"error": _write(folder, probe), "sees": []} for key, folder in wanted.folders.items()},
        "tracking": reach(wanted.uri, wanted.database),
        "files": {path: os.path.isfile(path) and os.access(path, os.R_OK) for path in files},
        "data": _shards(wanted.data) if wanted.data else None,
    }


class Peer:
    """One process of a short all-reduce over all of them; an actor on Ray."""

    def __init__(self, rank: int, size: int, backend: str, timeout_s: float):
        import torch.distributed as dist

        self.dist, self.rank, self.size, self.backend = dist, rank, size, backend
        self.patience, self.store = timedelta(seconds=timeout_s), None

    def serve(self) -> tuple[str, int]:
        """Opens the store where the others meet, on rank 0: its address and port."""
        import ray

        host = ray.util.get_node_ip_address()
        listener = socket.create_server((host, 0))  # by itself the store would listen on every address
        port = listener.getsockname()[1]
        self.store = self.dist.TCPStore(
            host, port, self.size, True, self.patience, wait_for_workers=False, master_listen_fd=listener.detach()
        )
        return host, port

    def reduce(self, address: tuple[str, int], mib: int) -> dict[str, Any]:
        """Sums 1, 2, ..., size over all processes: whether the sum is right, seconds a round, and the device."""
        import torch

        store = self.store or self.dist.TCPStore(*address, self.size, False, self.patience)
        cuda = self.backend == "nccl"
        device = torch.device("cuda", 0) if cuda else torch.device("cpu")
        options = {"device_id": device} if cuda else {}
        self.dist.init_process_group(
            self.backend, store=store, rank=self.rank, world_size=self.size, timeout=self.patience, **options
        )
        try:
            values = torch.full((mib << 18,), float(self.rank + 1), device=device)
            self.dist.all_reduce(values)
            right = bool((values == self.size * (self.size + 1) / 2).all())
            start = time.perf_counter()
            for _ in range(ROUNDS):
                self.dist.all_reduce(values)
            if cuda:
                torch.cuda.synchronize()
            seconds = (time.perf_counter() - start) / ROUNDS
        finally:
            self.dist.destroy_process_group()
        name = torch.cuda.get_device_name(device) if cuda else "CPU"
        return {"right": right, "seconds": seconds, "device": name}


# Asking all nodes


def examine(wanted: Wanted, limit_s: float = 300.0, recipe: Recipe | None = None) -> dict[str, Any]:
    """Joins the cluster, or starts one, and gathers the facts of all nodes within four fifths of `limit_s`."""
    from ray.exceptions import RayError

    from ..metrics.build import Metrics

    until = time.monotonic() + 0.8 * limit_s
    address = os.environ.get("RAY_ADDRESS", "")
    try:
        connect(cpus=1)
    except (RayError, OSError, RuntimeError, ValueError) as error:
        return {"cluster": {"address": address, "error": _last_line(reason(error)), "nodes": {}}}
    facts: dict[str, Any] = {"cluster": _cluster(), "driver": {"versions": versions()}}
    facts["wanted"] = asdict(wanted)
    evaluate = recipe.evaluate if recipe else Metrics(**SHIPPED)
    facts["weights"] = weights(evaluate, strict=recipe is not None)
    ids = {name: node["id"] for name, node in facts["cluster"]["nodes"].items()}
    peers = _Peers(ids, max(until - time.monotonic(), 1))
    try:
        facts["nodes"] = _look(wanted, ids, [w["path"] for w in facts["weights"] if w["path"]], until)
        facts["reduce"] = peers.reduce(until)
    finally:
        peers.close()
    return facts


def _cluster() -> dict[str, Any]:
    import ray

    nodes = {}
    for node in sorted((node for node in ray.nodes() if node["Alive"]), key=lambda node: node["NodeID"]):
        has = node["Resources"]
        name = f"{node['NodeManagerAddress']} {node['NodeID'][:6]}"
        nodes[name] = {
            "id": node["NodeID"],
            "cpus": has.get("CPU", 0.0),
            "gpus": has.get("GPU", 0.0),
            "memory_gib": has.get("memory", 0.0) / 2**30,
            "object_store_gib": has.get("object_store_memory", 0.0) / 2**30,
        }
    keys = ("cpus", "gpus", "memory_gib", "object_store_gib")
    total = {key: sum(node[key] for node in nodes.values()) for key in keys}
    address = ray.get_runtime_context().gcs_address
    doors = {"token": asks_for_token(address), "dashboard": ray._private.worker._global_node.webui_url or ""}
    return {"address": address, "error": None, "nodes": nodes, **doors, **total}


def _at(node: str) -> dict[str, Any]:
    """Options of a task or actor that runs on a node and waits for no CPU there."""
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    return {"num_cpus": 0, "scheduling_strategy": NodeAffinitySchedulingStrategy(node, soft=False)}


def _gather(refs: dict[str, Any], until: float) -> dict[str, tuple[Any, str | None]]:
    """(answer, why there is none) of each, when all have answered or the time is up."""
    import ray

    left = max(until - time.monotonic(), 0.1)
    done = set(ray.wait(list(refs.values()), num_returns=len(refs), timeout=left)[0]) if refs else set()
    found: dict[str, tuple[Any, str | None]] = {}
    for name, ref in refs.items():
        if ref not in done:
            found[name] = None, f"no answer within {left:.0f} s"
            continue
        try:
            found[name] = ray.get(ref), None
        except Exception as error:  # whatever a node raises is a finding about that node
            found[name] = None, _last_line(getattr(error, "cause", None) or error)
    return found


def _look(wanted: Wanted, ids: dict[str, str], files: list[str], until: float) -> dict[str, Any]:
    """The facts of each node; then each looks for the others' probes, then each removes its own."""
    import ray

    probes = {name: f".doctor.{uuid.uuid4().hex}" for name in ids}
    most_s = 0.8 * (until - time.monotonic())  # for torchvision; a process that reads a cold disk may need a minute

    def ask(function: Any, arguments: dict[str, tuple[Any, ...]]) -> dict[str, tuple[Any, str | None]]:
        task = ray.remote(max_retries=0)(function)
        return _gather({name: task.options(**_at(ids[name])).remote(*arguments[name]) for name in arguments}, until)

    answers = ask(look, {name: (wanted, probes[name], files, most_s) for name in ids})
    nodes = {name: {"error": error} if facts is None else facts for name, (facts, error) in answers.items()}
    alive = [name for name, facts in nodes.items() if facts["error"] is None]
    seen = ask(_see, {name: (wanted.folders, [probes[other] for other in alive]) for name in alive})
    for name, (found, _) in seen.items():
        for key, files in (found or {}).items():
            nodes[name]["storage"][key]["sees"] = [other for other in alive if probes[other] in files]
    ask(_unwrite, {name: (wanted.folders, probes[name]) for name in alive})
    return nodes


class _Peers:
    """The processes of the all-reduce: one for each free GPU, or one a node and at least two where there are none."""

    def __init__(self, ids: dict[str, str], timeout_s: float):
        import ray

        self.gpus = int(ray.cluster_resources().get("GPU", 0))
        self.free = int(ray.available_resources().get("GPU", 0))
        self.backend = "nccl" if self.gpus else "gloo"
        if self.gpus:
            places = [{"num_cpus": 0, "num_gpus": 1}] * self.free
        else:
            nodes = list(ids.values())
            places = [_at(nodes[i % len(nodes)]) for i in range(max(len(nodes), 2))]
        actor = ray.remote(Peer)
        self.peers = [
            actor.options(**options).remote(rank, len(places), self.backend, timeout_s)
            for rank, options in enumerate(places)
        ]

    def reduce(self, until: float) -> dict[str, Any]:
        size = len(self.peers)
        facts = {"backend": self.backend, "workers": size, "gpus": self.gpus, "error": None, "gb_per_s": None}
        if not size:
            return facts | {"devices": []}
        address, error = _gather({"": self.peers[0].serve.remote()}, until)[""]
        if error is not None:
            return facts | {"devices": [], "error": error}
        mib = GPU_MIB if self.gpus else CPU_MIB
        answers = _gather({f"rank {i}": p.reduce.remote(address, mib) for i, p in enumerate(self.peers)}, until)
        failed = [f"{name}: {error}" for name, (_, error) in answers.items() if error is not None]
        if not failed:
            failed = [f"{name}: the sum is wrong" for name, (answer, _) in answers.items() if not answer["right"]]
        if failed:
            return facts | {"devices": [], "error": "; ".join(failed)}
        seconds = max(answer["seconds"] for answer, _ in answers.values())
        # what crosses the slowest link in a ring, as nccl-tests counts "bus bandwidth"
        moved = 2 * (size - 1) / size * (mib << 20)
        facts["gb_per_s"] = moved / seconds / 1e9 if size > 1 else None
        return facts | {"devices": [answer["device"] for answer, _ in answers.values()]}

    def close(self) -> None:
        import ray

        for peer in self.peers:
            ray.kill(peer)


def weights(evaluate: Metrics, strict: bool = True) -> list[dict[str, Any]]:
    """The files that the metrics need, opened in this process. Nothing is downloaded.

    strict: whether a recipe asks for the metrics; where none does, a file that is looked for in the usual places may
    be absent. Returns {what, path, error, needed, remedy} of each file.
    """
    found = []
    for need in evaluate.needs():
        searched = need.kind.find is not None
        if not strict and need.path is None and not searched:
            continue
        path, error = need.path and str(resolve(need.path)), None
        try:
            path = str(need.look())
        except (OSError, ValueError) as problem:
            error = " ".join(str(problem).split())
        remedy = f"name it with evaluate.{need.key}=<path>; {need.kind.remedy}"
        line = {"what": need.key, "path": path, "error": error, "needed": strict or not searched, "remedy": remedy}
        found.append(line)
    return found


def _last_line(error: Any) -> str:
    """The last line of an error, which says what happened."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__


@contextlib.contextmanager
def within(limit_s: float) -> Iterator[None]:
    """Ends the process with status 1 where its body takes longer: a call into a library may not be interruptible."""

    def stop() -> None:
        print(f"doctor: no answer within {limit_s:g} s; raise limit_s=..., or look at what hangs: the cluster that "
              "RAY_ADDRESS names, a mounted folder", file=sys.stderr, flush=True)  # fmt: skip
        os._exit(1)

    timer = threading.Timer(limit_s, stop)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


# The judgement


def judge(facts: dict[str, Any]) -> list[Check]:
    """A check for each thing that facts tell of, in the order in which a person would mend them. Pure."""
    cluster = facts["cluster"]
    if cluster["error"] is not None:
        where = cluster["address"] or "this machine"
        said, _, way_out = cluster["error"].removeprefix("RAY_ADDRESS: ").partition("; ")
        start = "start one with: ray start --head, or unset RAY_ADDRESS to use this machine alone"
        return [Check("cluster", "broken", f"{where}: {said}", way_out or start)]
    nodes = {name: node for name, node in facts["nodes"].items() if node["error"] is None}
    if not nodes:
        return list(_judge_cluster(facts))
    checks = [
        *_judge_cluster(facts),
        _judge_access(cluster),
        *_judge_versions({**nodes, "this process": facts["driver"]}),
        *_judge_torchvision(nodes),
        _judge_reduce(facts["reduce"]),
        *(_judge_storage(key, folder, nodes) for key, folder in facts["wanted"]["folders"].items()),
        _judge_tracking(facts["wanted"], nodes),
        *_judge_weights(facts["weights"], nodes),
    ]
    return checks + ([_judge_data(facts["wanted"]["data"], nodes)] if facts["wanted"]["data"] else [])


def _count(n: float, what: str) -> str:
    return f"{n:g} {what}" + ("" if n == 1 else "s")


def _has(node: dict[str, float]) -> str:
    return (
        f"{_count(node['cpus'], 'CPU')}, {_count(node['gpus'], 'GPU')}, {node['memory_gib']:.1f} GiB memory, "
        f"{node['object_store_gib']:.1f} GiB object store"
    )


def _judge_cluster(facts: dict[str, Any]) -> Iterator[Check]:
    cluster = facts["cluster"]
    yield Check("cluster", "ok", f"{cluster['address']}: {_count(len(cluster['nodes']), 'node')}, {_has(cluster)}")
    for name, node in cluster["nodes"].items():
        error = facts["nodes"][name]["error"]
        if error is None:
            yield Check(f"node {name}", "ok", _has(node))
        elif "fewstep" in error:
            yield Check(f"node {name}", "broken", error,
                        "submit with: ray job submit --working-dir . -- python jobs/doctor.py, or install the package "
                        "there")  # fmt: skip
        else:
            yield Check(f"node {name}", "broken", error, "look at its log with: ray logs, and start it again")


def _judge_access(cluster: dict[str, Any]) -> Check:
    """Who can run programs on the cluster. Encryption is not looked at: Ray has none by default."""
    here = [address for address in (cluster["address"], cluster["dashboard"]) if address and not _loopback(address)]
    reach = f"other machines reach {' and '.join(here)}" if here else "only this machine reaches it"
    dashboard = f", with a dashboard at {cluster['dashboard']}" if cluster["dashboard"] else ", without a dashboard"
    if not cluster["token"]:
        return Check("access", "warning",
                     f"open: no token is asked for, and {reach}{dashboard}: whoever does runs programs as its user",
                     "export RAY_AUTH_MODE=token before ray start on every node; ray get-auth-token --generate makes "
                     "the token that all nodes and drivers need")  # fmt: skip
    if cluster["dashboard"] in here:
        return Check("access", "warning", f"a token is asked for, and {reach}{dashboard}",
                     "ray start --dashboard-host=127.0.0.1 keeps the dashboard to its machine")  # fmt: skip
    return Check("access", "ok", f"a token is asked for, and {reach}{dashboard}")


def _loopback(address: str) -> bool:
    """Whether host:port is of the loopback interface."""
    host = address.rpartition(":")[0].strip("[]")
    return host == "localhost" or host == "::1" or host.startswith("127.")


def _by_value(values: dict[str, Any]) -> dict[Any, str]:
    """Which nodes have each value: {value: "node a, node b"}."""
    found: dict[Any, list[str]] = {}
    for name, value in values.items():
        found.setdefault(value, []).append(name)
    return {value: ", ".join(names) for value, names in found.items()}


def _judge_versions(nodes: dict[str, Any]) -> Iterator[Check]:
    same = []
    for package in ("python", *PACKAGES):
        found = _by_value({name: node["versions"][package] for name, node in nodes.items()})
        if len(found) == 1 and None not in found:
            same.append(f"{package} {next(iter(found))}")
            continue
        where = "; ".join(f"{version or 'none'} on {names}" for version, names in found.items())
        remedy = LOCK if package != "python" else "use one Python for the cluster and for who submits"
        yield Check("versions", "broken", f"{package}: {where}", remedy)
    if same:
        yield Check("versions", "ok", ", ".join(same))


def _judge_torchvision(nodes: dict[str, Any]) -> Iterator[Check]:
    errors = {}
    for name, node in nodes.items():
        torch, needs = node["versions"]["torch"], node["torchvision"]["needs"]
        error = node["torchvision"]["error"]
        if torch and needs and not Requirement(needs).specifier.contains(torch.partition("+")[0], prereleases=True):
            error = f"torchvision {node['versions']['torchvision']} needs {needs} and torch is {torch}" + (
                f" ({error})" if error else ""
            )
        errors[name] = error
    for error, names in _by_value(errors).items():
        if error is None:
            yield Check("torch and torchvision", "ok", f"torchvision's operators work on {names}")
        else:
            yield Check("torch and torchvision", "broken", f"{names}: {error}",
                        f"they have to be built for each other; {LOCK}")  # fmt: skip


def _judge_reduce(reduce: dict[str, Any]) -> Check:
    size, gpus, backend = reduce["workers"], reduce["gpus"], reduce["backend"]
    what = _count(size, "GPU") if gpus else f"{size} CPU processes"
    name = f"all-reduce ({backend})"
    if not size:
        return Check(name, "warning", f"all {gpus} GPUs are in use", "ask again when they are free")
    if reduce["error"] is not None:
        variable = "NCCL_SOCKET_IFNAME" if gpus else "GLOO_SOCKET_IFNAME"
        remedy = f"nodes have to reach each other on every port; {variable} names the network interface"
        remedy += "; NCCL_DEBUG=INFO says more" if gpus else ""
        return Check(name, "broken", f"{what}: {reduce['error']}", remedy)
    devices = ", ".join(sorted(set(reduce["devices"])))
    speed = "" if reduce["gb_per_s"] is None else f", {reduce['gb_per_s']:.2f} GB/s"
    result = f"{what} ({devices}) add up{speed}"
    if size < gpus:
        return Check(name, "warning", f"{result}; {_count(gpus - size, 'GPU')} in use and left out",
                     "ask again when they are free")  # fmt: skip
    return Check(name, "ok", result)


def _judge_storage(key: str, folder: str, nodes: dict[str, Any]) -> Check:
    name, here = f"storage {key}", {name: node["storage"][key] for name, node in nodes.items()}
    errors = {node: facts["error"] for node, facts in here.items() if facts["error"] is not None}
    if errors:
        found = "; ".join(f"{error} on {names}" for error, names in _by_value(errors).items())
        return Check(name, "broken", f"{folder}: cannot write: {found}",
                     f"choose another with {key}=..., or make it writable for who runs Ray there")  # fmt: skip
    blind = {node: [other for other in here if other not in facts["sees"]] for node, facts in here.items()}
    blind = {node: others for node, others in blind.items() if others}
    if blind:
        found = "; ".join(f"{node} does not see what {', '.join(others)} wrote" for node, others in blind.items())
        return Check(name, "broken", f"{folder}: written by every node and not shared: {found}",
                     f"choose a folder that all nodes mount with {key}=..., or storage=s3://bucket/folder for "
                     "the checkpoints")  # fmt: skip
    shared = "written by one node" if len(here) == 1 else f"written by {len(here)} nodes and shared by them"
    return Check(name, "ok", f"{folder}: {shared}")


def _judge_tracking(wanted: dict[str, Any], nodes: dict[str, Any]) -> Check:
    parts = urlsplit(wanted["uri"])
    uri = wanted["uri"].replace(f":{parts.password}@", ":***@") if parts.password else wanted["uri"]
    errors = {node: facts["tracking"] for node, facts in nodes.items() if facts["tracking"] is not None}
    if errors:
        found = "; ".join(f"{error} on {names}" for error, names in _by_value(errors).items())
        if wanted["database"]:
            remedy = (
                "choose another folder with FEWSTEP_HOME=..., or a server with MLFLOW_TRACKING_URI=http://host:port"
            )
        else:
            port = parts.port or 5000
            remedy = (
                f"start it with: mlflow server --host {parts.hostname} --port {port}, or name another with uri=... or "
                "MLFLOW_TRACKING_URI"
            )
        answers = all(error.startswith("answers") for error in errors.values())
        return Check("MLflow", "warning" if answers else "broken", f"{uri}: {found}", remedy)
    if wanted["database"] and len(nodes) > 1:
        return Check("MLflow", "warning", f"{uri}: a file, which several nodes should not share",
                     "start mlflow server and set MLFLOW_TRACKING_URI=http://host:port")  # fmt: skip
    return Check("MLflow", "ok", f"{uri}: " + ("writable" if wanted["database"] else "answers"))


def _judge_weights(weights: list[dict[str, Any]], nodes: dict[str, Any]) -> Iterator[Check]:
    for file in weights:
        name, bad = f"weights {file['what']}", "broken" if file["needed"] else "warning"
        absent = [node for node, facts in nodes.items() if not facts["files"].get(file["path"], True)]
        if file["error"] is not None:
            yield Check(name, bad, file["error"], file["remedy"])
        elif absent:
            yield Check(name, bad, f"{file['path']}: not on {', '.join(absent)}",
                        "copy it there, to the same path, or use a folder that all nodes mount")  # fmt: skip
        else:
            yield Check(name, "ok", file["path"])


def _judge_data(path: str, nodes: dict[str, Any]) -> Check:
    errors = {node: facts["data"]["error"] for node, facts in nodes.items() if facts["data"]["error"] is not None}
    if errors:
        found = "; ".join(f"{names}: {error}" for error, names in _by_value(errors).items())
        return Check(
            "data", "broken", found, "the folder of shards has to be visible from every node under the same path"
        )
    rows = ", ".join(f"{rows:,}" for rows in _by_value({name: facts["data"]["rows"] for name, facts in nodes.items()}))
    return Check("data", "ok", f"{path}: {rows} rows, readable from {_count(len(nodes), 'node')}")


def healthy(checks: list[Check]) -> bool:
    """Whether nothing is broken; a warning is not."""
    return all(check.status != "broken" for check in checks)


def table(checks: list[Check], width: int = 140) -> str:
    """The checks as people read them: status, check, result, what to do; and how many are broken."""
    from rich.console import Console
    from rich.table import Table

    rows = Table(box=None, padding=(0, 2, 0, 0))
    for head in ("", "check", "result", "what to do"):
        rows.add_column(head, overflow="fold")
    for check in checks:
        rows.add_row(check.status.upper() if check.status == "broken" else check.status, check.check, check.result,
                     check.remedy)  # fmt: skip
    console = Console(file=io.StringIO(), width=width, highlight=False, markup=False)
    console.print(rows)
    broken, warnings = (sum(check.status == status for check in checks) for status in ("broken", "warning"))
    closing = f"{broken} broken, {_count(warnings, 'warning')}"
    return "\n".join(line.rstrip() for line in console.file.getvalue().splitlines()) + f"\n{closing}"
