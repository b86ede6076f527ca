"""The judgement of a cluster's facts, which cluster.doctor gathers: one check for each thing, and the table of them."""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from packaging.requirements import Requirement

from .checks import LOCK, Check, Status

STATUSES: tuple[Status, ...] = ("ok", "warning", "broken")  # from good to bad


def judge(facts: dict[str, Any]) -> list[Check]:
    """A check for each thing that facts tell of, in the order in which a person would mend them. Pure."""
    cluster = facts["cluster"]
    if cluster["error"] is not None:
        where = cluster["address"] or "this machine"
        reason, _, way_out = cluster["error"].removeprefix("RAY_ADDRESS: ").partition("; ")
        start = "start one with: ray start --head, or unset RAY_ADDRESS to use this machine alone"
        return [Check("cluster", "broken", f"{where}: {reason}", way_out or start)]
    nodes = {name: node for name, node in facts["nodes"].items() if node["error"] is None}
    if not nodes:
        return list(_judge_cluster(facts))
    checks = [
        *_judge_cluster(facts),
        _judge_access(cluster),
        *_judge_versions({**nodes, "this process": facts["driver"]}),
        *_judge_torchvision(nodes),
        _judge_reduce(facts["reduce"]),
        *_judge_parts(facts, nodes),
    ]
    return checks


def _count(n: float, what: str) -> str:
    return f"{n:g} {what}" + ("" if n == 1 else "s")


def _resources(node: dict[str, float]) -> str:
    return (
        f"{_count(node['cpus'], 'CPU')}, {_count(node['gpus'], 'GPU')}, {node['memory_gib']:.1f} GiB memory, "
        f"{node['object_store_gib']:.1f} GiB object store"
    )


def _judge_cluster(facts: dict[str, Any]) -> Iterator[Check]:
    cluster = facts["cluster"]
    yield Check(
        "cluster", "ok", f"{cluster['address']}: {_count(len(cluster['nodes']), 'node')}, {_resources(cluster)}"
    )
    for name, node in cluster["nodes"].items():
        error = facts["nodes"][name]["error"]
        if error is None:
            yield Check(f"node {name}", "ok", _resources(node))
        elif "fewstep" in error:
            yield Check(f"node {name}", "broken", error,
                        "submit with: ray job submit --working-dir . -- python jobs/doctor.py, or install the package "
                        "there")  # fmt: skip
        else:
            yield Check(f"node {name}", "broken", error, "look at its log with: ray logs, and start it again")


def _judge_access(cluster: dict[str, Any]) -> Check:
    """People who can run programs on the cluster. Encryption is not checked: Ray has none by default."""
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
    """True where host:port is of the loopback interface."""
    host = address.rpartition(":")[0].strip("[]")
    return host == "localhost" or host == "::1" or host.startswith("127.")


def _nodes_by_value(values: dict[str, Any]) -> dict[Any, str]:
    """The names of the nodes that have each value: {value: "node a, node b"}."""
    nodes_of: dict[Any, list[str]] = {}
    for name, value in values.items():
        nodes_of.setdefault(value, []).append(name)
    return {value: ", ".join(names) for value, names in nodes_of.items()}


def _judge_versions(nodes: dict[str, Any]) -> Iterator[Check]:
    same = []
    for package in next(iter(nodes.values()))["versions"]:
        nodes_of = _nodes_by_value({name: node["versions"][package] for name, node in nodes.items()})
        if len(nodes_of) == 1 and None not in nodes_of:
            same.append(f"{package} {next(iter(nodes_of))}")
            continue
        where = "; ".join(f"{version or 'none'} on {names}" for version, names in nodes_of.items())
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
    for error, names in _nodes_by_value(errors).items():
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


def _judge_parts(facts: dict[str, Any], nodes: dict[str, Any]) -> Iterator[Check]:
    """The parts' checks, each once for all nodes, and what only a look at several nodes can tell."""
    by_name: dict[str, dict[str, Check]] = {}
    for node, has in nodes.items():
        for check in has["checks"]:
            by_name.setdefault(check["check"], {})[node] = Check(**check)
    for name, checks in by_name.items():
        merged = _merged_check(name, checks)
        if merged.status == "ok" and name.removeprefix("storage ") in facts["folders"]:
            merged = _judge_shared(name.removeprefix("storage "), merged, nodes)
        if merged.status == "ok" and name == "MLflow" and facts["database"] and len(nodes) > 1:
            merged = replace(merged, status="warning", result=f"{merged.result}; several nodes should not share a file",
                             remedy="start mlflow server and set MLFLOW_TRACKING_URI=http://host:port")  # fmt: skip
        if merged.status == "broken" and name.startswith("weights inception") and not facts["asked"]:
            if name != "weights inception":
                continue
            merged = replace(merged, status="warning")
        yield merged


def _merged_check(name: str, checks: dict[str, Check]) -> Check:
    """One check of all nodes: the worst of them, with the nodes that say so."""
    status = max((check.status for check in checks.values()), key=STATUSES.index)
    worst = {node: check for node, check in checks.items() if check.status == status}
    nodes_of = _nodes_by_value({node: check.result for node, check in worst.items()})
    if status == "ok" and len(nodes_of) == 1:
        return replace(next(iter(worst.values())), result=f"{next(iter(nodes_of))}, on {_count(len(checks), 'node')}")
    result = "; ".join(f"{names}: {result}" for result, names in nodes_of.items())
    return Check(name, status, result, next(iter(worst.values())).remedy)


def _judge_shared(key: str, check: Check, nodes: dict[str, Any]) -> Check:
    """A folder that every node can write has to be one folder."""
    blind = {node: [other for other in nodes if other not in has["sees"].get(key, [])] for node, has in nodes.items()}
    lines = [f"{node} does not see what {', '.join(others)} wrote" for node, others in blind.items() if others]
    if not lines:
        return check
    return Check(check.check, "broken", f"{check.result}, and not shared: {'; '.join(lines)}",
                 f"choose a folder that all nodes mount with {key}=..., or storage=s3://bucket/folder for the "
                 "checkpoints")  # fmt: skip


def healthy(checks: list[Check]) -> bool:
    """True where nothing is broken; a warning is not."""
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
