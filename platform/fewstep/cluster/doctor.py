"""The doctor: it gathers facts about every node of a cluster before a run; fewstep.diagnosis judges them.

    print(table(judge(examine(recipe, limit_s=300))))

On each node a task checks versions and torchvision's operators, and runs `check(recipe)` of each part: storage,
tracking, metrics, networks, data. One process for each GPU, or at least two CPU processes, run an all-reduce. A node
that does not answer in time is reported, and not waited for.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import platform
import socket
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from dataclasses import asdict
from datetime import timedelta
from importlib import metadata
from typing import TYPE_CHECKING, Any

from packaging.requirements import Requirement

from ..checks import LOCK, Check
from ..storage.place import Place
from ..texts import one_line, reason
from .session import asks_for_token, connect

if TYPE_CHECKING:
    from ..recipe import Recipe  # it imports torch, which may be broken on a node

PACKAGES = ("torch", "torchvision", "ray", "diffusers", "mlflow", "pyarrow")
CPU_MIB, GPU_MIB, ROUNDS = 16, 256, 5  # of the all-reduce

# Runs in its own process, because operators that were built for another torch may kill the process that loads them.
NMS = """
import torch, torchvision.ops
boxes = torch.tensor([[0.0, 0.0, 2.0, 2.0], [0.0, 0.0, 2.0, 2.1], [5.0, 5.0, 6.0, 6.0]])
kept = torchvision.ops.nms(boxes, torch.tensor([0.5, 0.9, 0.1]), 0.5).tolist()
assert kept == [1, 2], f"nms kept boxes {kept} of three, and [1, 2] is right"
"""


PARTS = (  # each has check(recipe)
    "fewstep.storage.place",
    "fewstep.tracking.store",
    "fewstep.metrics.build",
    "fewstep.networks.pretrained",
    "fewstep.data.shards",
)
WITHOUT_RECIPE = ["class_consistency", "diversity", "fid", "kid"]
"""Metrics whose files are checked if no recipe is given."""


# Facts of a node


def versions() -> dict[str, str | None]:
    """Versions of Python and of the packages that must match on all nodes; None for a missing package."""
    versions: dict[str, str | None] = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = None
    return versions


def torch_wanted() -> str | None:
    """The torch that the installed torchvision requires, such as torch>=2.14.0."""
    try:
        needs = [Requirement(text) for text in metadata.requires("torchvision") or []]
    except metadata.PackageNotFoundError:
        return None
    return next((str(need) for need in needs if need.name == "torch"), None)


def operators(timeout_s: float) -> str | None:
    """The reason why torchvision's compiled operators fail, or None if they work. It calls nms for three boxes."""
    try:
        done = subprocess.run([sys.executable, "-c", NMS], capture_output=True, text=True, timeout=timeout_s)
    except subprocess.TimeoutExpired:
        return f"no answer within {timeout_s:.0f} s"
    return None if done.returncode == 0 else _last_line(done.stderr or f"ended with status {done.returncode}")


def part_checks(recipe: dict[str, Any]) -> list[Check]:
    """Runs the checks of all parts. A recipe that is refused and a part that cannot be imported are results, too."""
    try:
        from ..recipe import Recipe

        parsed = Recipe.model_validate(recipe)
    except Exception as error:
        return [Check("recipe", "broken", one_line(error), LOCK)]
    checks: list[Check] = []
    for name in PARTS:
        try:
            checks += importlib.import_module(name).check(parsed)
        except Exception as error:
            checks.append(Check(name, "broken", one_line(error), LOCK))
    return checks


def _write_probes(folders: dict[str, str], probe: str) -> None:
    """Writes a file to each folder, for the other nodes to see. `part_checks` reports folders that refuse it."""
    for folder in folders.values():
        with contextlib.suppress(Exception):
            (Place.of(folder) / probe).write(b"0")


def _visible_probes(folders: dict[str, str], probes: list[str]) -> dict[str, list[str]]:
    """Returns the probes of all nodes that this node can see, by setting."""
    return {key: [p for p in probes if (Place.of(folder) / p).is_file()] for key, folder in folders.items()}


def _remove_probes(folders: dict[str, str], probe: str) -> None:
    for folder in folders.values():
        if (Place.of(folder) / probe).is_file():
            (Place.of(folder) / probe).remove()


def look(recipe: dict[str, Any], probe: str, timeout_s: float) -> dict[str, Any]:
    """Returns the facts of one node, and writes its probes to the recipe's folders, for the other nodes to see."""
    facts = {
        "error": None,
        "versions": versions(),
        "torchvision": {"needs": torch_wanted(), "error": operators(timeout_s)},
        "checks": [asdict(check) for check in part_checks(recipe)],
        "sees": {},
    }
    _write_probes(folders_of(recipe), probe)
    return facts


def folders_of(recipe: dict[str, Any]) -> dict[str, str]:
    """The folders that all nodes must share, by setting."""
    return {key: recipe[key] for key in ("out", "storage") if recipe[key]}


class Peer:
    """One process of a short all-reduce; an actor on Ray."""

    def __init__(self, rank: int, size: int, backend: str, timeout_s: float):
        import torch.distributed as dist

        self.dist, self.rank, self.size, self.backend = dist, rank, size, backend
        self.patience, self.store = timedelta(seconds=timeout_s), None

    def serve(self) -> tuple[str, int]:
        """Opens the store through which the ranks meet, on rank 0. Returns its address and port."""
        import ray

        host = ray.util.get_node_ip_address()
        listener = socket.create_server((host, 0))  # the store alone would listen on every address
        port = listener.getsockname()[1]
        self.store = self.dist.TCPStore(
            host, port, self.size, True, self.patience, wait_for_workers=False, master_listen_fd=listener.detach()
        )
        return host, port

    def reduce(self, address: tuple[str, int], mib: int) -> dict[str, Any]:
        """Sums 1, 2, ..., size over all processes. Returns {right, seconds of a round, device}."""
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


# All nodes


def examine(recipe: Recipe, limit_s: float = 300.0, asked: bool = True) -> dict[str, Any]:
    """Joins the cluster, or starts one, and gathers the facts of all nodes within four fifths of `limit_s`.

    asked: True if the user gave this recipe; else the files of `WITHOUT_RECIPE` are checked, too.
    Raises ValueError for a tracking URI that is not a store.
    """
    from ray.exceptions import RayError

    until = time.monotonic() + 0.8 * limit_s
    address = os.environ.get("RAY_ADDRESS", "")
    try:
        connect(cpus=1)
    except (RayError, OSError, RuntimeError, ValueError) as error:
        return {"cluster": {"address": address, "error": _last_line(reason(error)), "nodes": {}}}
    from ..tracking.store import database
    from .train import localized  # slow to import: a failure to join is reported before

    if not asked:
        recipe = recipe.model_copy(update={"evaluate": recipe.evaluate.model_copy(update={"metrics": WITHOUT_RECIPE})})
    plain = localized(recipe, download=False).model_dump(mode="json")
    facts: dict[str, Any] = {"cluster": _cluster(), "driver": {"versions": versions()}, "asked": asked}
    facts["folders"] = folders_of(plain)
    facts["database"] = database(plain["tracking"]["uri"]) is not None
    ids = {name: node["id"] for name, node in facts["cluster"]["nodes"].items()}
    peers = _Peers(ids, max(until - time.monotonic(), 1))
    try:
        facts["nodes"] = _nodes_facts(plain, ids, until)
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


def _on_node(node: str) -> dict[str, Any]:
    """Options of a task or actor that runs on a given node, without waiting for a CPU."""
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    return {"num_cpus": 0, "scheduling_strategy": NodeAffinitySchedulingStrategy(node, soft=False)}


def _collect_answers(refs: dict[str, Any], until: float) -> dict[str, tuple[Any, str | None]]:
    """Returns (answer, None) or (None, reason of the failure) for each, after all have answered or the time is up."""
    import ray

    left = max(until - time.monotonic(), 0.1)
    done = set(ray.wait(list(refs.values()), num_returns=len(refs), timeout=left)[0]) if refs else set()
    answers: dict[str, tuple[Any, str | None]] = {}
    for name, ref in refs.items():
        if ref not in done:
            answers[name] = None, f"no answer within {left:.0f} s"
            continue
        try:
            answers[name] = ray.get(ref), None
        except Exception as error:  # any error is a result about that node
            answers[name] = None, _last_line(getattr(error, "cause", None) or error)
    return answers


def _nodes_facts(recipe: dict[str, Any], ids: dict[str, str], until: float) -> dict[str, Any]:
    """Gathers the facts of the nodes. Then each node looks for the probes of the others, and removes its own."""
    import ray

    folders, probes = folders_of(recipe), {name: f".doctor.{uuid.uuid4().hex}" for name in ids}
    most_s = 0.8 * (until - time.monotonic())  # for torchvision, which takes a minute to load from a cold disk

    def ask(function: Any, arguments: dict[str, tuple[Any, ...]]) -> dict[str, tuple[Any, str | None]]:
        task = ray.remote(max_retries=0)(function)
        return _collect_answers(
            {name: task.options(**_on_node(ids[name])).remote(*arguments[name]) for name in arguments}, until
        )

    answers = ask(look, {name: (recipe, probes[name], most_s) for name in ids})
    nodes = {name: {"error": error} if facts is None else facts for name, (facts, error) in answers.items()}
    alive = [name for name, facts in nodes.items() if facts["error"] is None]
    seen = ask(_visible_probes, {name: (folders, [probes[other] for other in alive]) for name in alive})
    for name, (visible, _) in seen.items():
        for key, files in (visible or {}).items():
            nodes[name]["sees"][key] = [other for other in alive if probes[other] in files]
    ask(_remove_probes, {name: (folders, probes[name]) for name in alive})
    return nodes


class _Peers:
    """The processes of the all-reduce: one for each free GPU; without GPUs one for each node, at least two."""

    def __init__(self, ids: dict[str, str], timeout_s: float):
        import ray

        self.gpus = int(ray.cluster_resources().get("GPU", 0))
        self.free = int(ray.available_resources().get("GPU", 0))
        self.backend = "nccl" if self.gpus else "gloo"
        if self.gpus:
            places = [{"num_cpus": 0, "num_gpus": 1}] * self.free
        else:
            nodes = list(ids.values())
            places = [_on_node(nodes[i % len(nodes)]) for i in range(max(len(nodes), 2))]
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
        address, error = _collect_answers({"": self.peers[0].serve.remote()}, until)[""]
        if error is not None:
            return facts | {"devices": [], "error": error}
        mib = GPU_MIB if self.gpus else CPU_MIB
        answers = _collect_answers(
            {f"rank {i}": p.reduce.remote(address, mib) for i, p in enumerate(self.peers)}, until
        )
        failed = [f"{name}: {error}" for name, (_, error) in answers.items() if error is not None]
        if not failed:
            failed = [f"{name}: the sum is wrong" for name, (answer, _) in answers.items() if not answer["right"]]
        if failed:
            return facts | {"devices": [], "error": "; ".join(failed)}
        seconds = max(answer["seconds"] for answer, _ in answers.values())
        # bytes over the slowest link of a ring, the "bus bandwidth" of nccl-tests
        moved = 2 * (size - 1) / size * (mib << 20)
        facts["gb_per_s"] = moved / seconds / 1e9 if size > 1 else None
        return facts | {"devices": [answer["device"] for answer, _ in answers.values()]}

    def close(self) -> None:
        import ray

        for peer in self.peers:
            ray.kill(peer)


def _last_line(error: Any) -> str:
    """Returns the last line of an error, which usually names the reason."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__


@contextlib.contextmanager
def within(limit_s: float) -> Iterator[None]:
    """Context that ends the process with status 1 after `limit_s`, as some library calls cannot be interrupted."""

    def stop() -> None:
        print(f"doctor: no answer within {limit_s:g} s; raise limit_s=..., or check what may hang: the cluster of "
              "RAY_ADDRESS, a mounted folder", file=sys.stderr, flush=True)  # fmt: skip
        os._exit(1)

    timer = threading.Timer(limit_s, stop)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
