"""Grafana's files ask only for metrics that a real run exports, and those say what the run's reports say."""

from __future__ import annotations

import json
import re
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
import yaml
from demo import ROOT, recipe
from prometheus_client.parser import text_string_to_metric_families
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from fewstep import build
from fewstep.cluster.gauges import ABOUT, EVENTS, DriverGauges, memory
from fewstep.cluster.train import fit
from fewstep.engine.guard import Guard
from fewstep.run import read_reports
from fewstep.watchdog import STOP

GRAFANA = ROOT / "dashboards" / "grafana"
WITH_CUDA = {"ray_fewstep_cuda_memory_bytes", "ray_node_gpus_utilization", "ray_node_gram_used"}
BY_PROMETHEUS = {"ALERTS"}
FUNCTIONS = {"abs", "and", "by", "clamp_max", "count", "delta", "max", "max_over_time", "min", "min_over_time", "sum"}
FUNCTIONS |= {"clamp_min", "label_values", "on", "time"}

Samples = dict[str, list[tuple[dict[str, str], float]]]


# Reading the files


def dashboard() -> dict[str, Any]:
    return json.loads((GRAFANA / "fewstep.json").read_text())


def rules() -> dict[str, str]:
    """Expressions by alert."""
    groups = yaml.safe_load((GRAFANA / "alerts.yml").read_text())["groups"]
    return {rule["alert"]: rule["expr"] for group in groups for rule in group["rules"]}


def queries() -> list[str]:
    board = dashboard()
    out = [target["expr"] for panel in board["panels"] for target in panel.get("targets", [])]
    out += [a["expr"] for a in board["annotations"]["list"] if "expr" in a]
    out += [variable["query"]["query"] for variable in board["templating"]["list"]]
    return [*out, *rules().values()]


def selectors(query: str) -> Iterator[tuple[str, dict[str, set[str]]]]:
    """Each metric of a PromQL query, with the values that it asks of labels, but for template variables."""
    bare = re.sub(r"\b(by|on)\s*\([^)]*\)|\[\w+\]|,\s*run\)$", " ", query)
    for name, braces in re.findall(r"([a-zA-Z_:][\w:]*)\s*(\{[^}]*\})?", bare):
        if name not in FUNCTIONS:
            asked = re.findall(r'(\w+)=~?"([^"$]*)"', braces)
            yield name, {label: set(values.split("|")) for label, values in asked}


def test_the_selectors_of_a_query_are_found():
    query = 'max by (run) (delta(a_b{kind=~"x|y", run=~"$run"}[10m])) / on (run) c > 0.6 and min by (z) (d:e) == 1'
    assert list(selectors(query)) == [("a_b", {"kind": {"x", "y"}}), ("c", {}), ("d:e", {})]
    assert list(selectors("label_values(a, run)")) == [("a", {})]


# A real run


def scrape(port: int) -> Samples:
    """The series of a node's endpoint now: (labels, value) of each, by name."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=60) as answer:
        text = answer.read().decode()
    out: Samples = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            out.setdefault(sample.name, []).append((sample.labels, sample.value))
    return out


@pytest.fixture(scope="module")
def exported(ray_cluster, store, tmp_path_factory) -> tuple[Any, Samples]:
    """A run's recipe, and what its node exported while it was at work: it is stopped once its worker has spoken."""
    port = ray_cluster.nodes()[0]["MetricsExportPort"]
    long = ("train.steps=2000", "train.save_every=2000")
    r = recipe(tmp_path_factory.mktemp("grafana"), "name=scraped", f"tracking.uri={store}", *long)
    seen: Samples = {}
    ended = threading.Event()

    def watch() -> None:
        while not ended.wait(0.5):
            try:
                if max(values(scrape(port), "step"), default=0) >= 2:  # then all of the first report is on its way
                    ended.wait(0.5)
                    seen.update(scrape(port))
                    (r.folder / STOP).touch()
                    return
            except OSError:  # an agent that is short of time; the run is long enough to ask again
                continue

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        assert not fit(r)["finished"]
    finally:
        ended.set()
        watcher.join()
    return r, seen


def values(samples: Samples, name: str, **tags: str) -> list[float]:
    """Values of this run's series with these tags."""
    wanted = (tags | {"run": "scraped"}).items()
    return [value for labels, value in samples.get(f"ray_fewstep_{name}", []) if wanted <= labels.items()]


def test_every_query_asks_for_what_a_run_exports(exported):
    _, samples = exported
    missing = []
    for query in queries():
        for name, asked in selectors(query):
            if name in WITH_CUDA | BY_PROMETHEUS:
                continue
            known = [labels for labels, _ in samples.get(name, [])]
            missing += [f"{name}: {query}"] if not known else []
            for label, wanted in asked.items():
                strange = wanted - {labels.get(label) for labels in known}
                missing += [f"{name}{{{label}={strange}}}: {query}"] if strange else []
    assert missing == []


def test_every_metric_of_ours_is_asked_for_and_explained(exported):
    _, samples = exported
    ours = {name for name in samples if name.startswith("ray_fewstep_")}
    asked = {name for query in queries() for name, _ in selectors(query)}
    assert ours == {f"ray_fewstep_{name}" for name in ABOUT} - WITH_CUDA
    assert ours <= asked


def test_what_is_exported_is_what_the_reports_say(exported):
    r, samples = exported
    reports = read_reports(r.folder)
    by_step = {report["step"]: report["metrics"] for report in reports}
    [speed] = values(samples, "images_per_second", rank="0")
    assert speed in [metrics["images_per_s"] for metrics in by_step.values()]
    [wait] = values(samples, "data_wait_ratio", rank="0")
    assert wait in [metrics["data_wait"] for metrics in by_step.values()]
    [step] = values(samples, "step")
    [images] = values(samples, "images")
    assert step in by_step and images in [report["images"] for report in reports]  # the export may fall in between
    for phase in ("critic", "student"):
        [seconds] = values(samples, "phase_seconds", rank="0", phase=phase)
        assert seconds in [metrics.get(f"{phase}_s") for metrics in by_step.values()]
        [norm] = values(samples, "gradient_norm", phase=phase)
        assert norm in [metrics.get(f"{phase}/grad_norm") for metrics in by_step.values()]
    [accuracy] = values(samples, "health", signal="accuracy")
    assert accuracy in [metrics["health/d_accuracy"] for metrics in by_step.values()]
    [last] = values(samples, "last_report_timestamp_seconds")
    assert 0 <= time.time() - last < 600


def test_nothing_happened_to_the_run_but_being_asked_to_stop(exported):
    _, samples = exported
    for kind in EVENTS:
        assert values(samples, "events", kind=kind) == [0], kind


def test_memory_by_role_is_four_bytes_a_parameter_and_twice_that_for_adam(exported):
    r, samples = exported
    nets = build.make_nets(r)
    parameters = {role: sum(p.numel() for p in net.parameters()) for role, net in nets.items()}
    for role, count in (parameters | {"average": parameters["student"]}).items():
        assert values(samples, "memory_bytes", role=role, kind="weights") == [4 * count], role
    for role in r.method.roles:
        assert values(samples, "memory_bytes", role=role, kind="gradients") == [4 * parameters[role]]
        adam = 8 * parameters[role] + 4 * len(list(nets[role].parameters()))  # two moments; of each tensor, its updates
        assert values(samples, "memory_bytes", role=role, kind="optimiser") == [adam]
    assert values(samples, "memory_bytes", role="teacher", kind="optimiser") == []


# Without a run


class Noted(DriverGauges):
    """The driver's gauges as a dict of the last values."""

    def __init__(self, *args: Any):
        super().__init__(*args)
        self.seen: dict[str, float] = {}

    def set(self, name: str, value: float, **tags: str) -> None:
        self.seen[tags.get("kind", name)] = value


def test_the_driver_counts_what_the_reports_and_the_end_say():
    with pytest.raises(MemoryError), Noted("run", {ValueError: "lost"}) as gauges:
        before = gauges.seen["last_report_timestamp_seconds"]
        events = [{"kind": "collapse", "step": 4}, {"kind": "roll_back", "step": 2}]
        gauges.follow({"step": 4, "images": 32, "scores": {"fd_fashion": 1.0}})
        assert gauges.seen["last_report_timestamp_seconds"] == before  # scores come from elsewhere, and late
        gauges.follow({"step": 4, "images": 32, "metrics": {}, "events": events})
        gauges.follow({"step": 4, "images": 32, "metrics": {}, "events": events[:1]})
        assert gauges.seen["last_report_timestamp_seconds"] > before
        gauges.count("restart")
        raise MemoryError
    assert {k: v for k, v in gauges.counts.items() if v} == {"collapse": 2, "roll_back": 1, "restart": 1, "failed": 1}
    assert all(gauges.seen[kind] == count for kind, count in gauges.counts.items())
    with pytest.raises(ValueError), Noted("run", {ValueError: "lost"}) as gauges:
        raise ValueError
    assert {k: v for k, v in gauges.counts.items() if v} == {"lost": 1}


def test_memory_of_a_sharded_network_is_that_of_its_own_shards():
    """Rank 0 of three that exist in name only: a (7, 2) weight lies there as its first three rows."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=3)
    try:
        mesh = init_device_mesh("cpu", (3,))
        net = torch.nn.Linear(2, 7, bias=False)
        net.weight = torch.nn.Parameter(distribute_tensor(net.weight.detach(), mesh, [Shard(0)]))
        optim = torch.optim.AdamW(net.parameters())
        net.weight.grad = torch.zeros_like(net.weight)
        optim.step()
        engine = SimpleNamespace(nets={"student": net}, optims={"student": optim}, average=None)
        assert memory(engine) == {"student": {"weights": 24, "gradients": 24, "optimiser": 2 * 24 + 4}}
    finally:
        dist.destroy_process_group()


def test_alerts_fire_at_the_guards_limits_and_before_the_watchdog_ends_the_run(tmp_path):
    alerts, guard = rules(), Guard()
    assert alerts["FewstepBrightness"].endswith(f"> {guard.brightness:g}")
    assert alerts["FewstepSaturation"].endswith(f"> {guard.saturation:g}")
    assert alerts["FewstepDiscriminator"].endswith(f"> {guard.accuracy:g}")
    assert f"< {guard.diversity:g} * " in alerts["FewstepDiversity"]
    limit = int(alerts["FewstepStall"].split("> ")[1])
    assert limit < 60 * recipe(tmp_path).failure.stall_minutes


def test_panels_are_distinct_lie_beside_each_other_and_ask_the_provisioned_source():
    board = dashboard()
    panels = board["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    rows = [panel["title"] for panel in panels if panel["type"] == "row"]
    assert rows == ["Training", "Phases", "Data", "Memory", "Health", "Cluster", "Failures"]
    taken: set[tuple[int, int]] = set()
    for panel in panels:
        at = panel["gridPos"]
        cells = {(at["x"] + i, at["y"] + j) for i in range(at["w"]) for j in range(at["h"])}
        assert at["x"] + at["w"] <= 24 and not cells & taken, panel["title"]
        taken |= cells
    provisioned = yaml.safe_load((GRAFANA / "provisioning" / "datasources" / "fewstep.yaml").read_text())
    [source] = provisioned["datasources"]
    own = {"type": source["type"], "uid": source["uid"]}
    built_in = {"type": "grafana", "uid": "-- Grafana --"}
    assert all(result in (own, built_in) for result in sources(board))
    assert sum(result == own for result in sources(board)) >= len(panels) - len(rows)
    [provider] = yaml.safe_load((GRAFANA / "provisioning" / "dashboards" / "fewstep.yaml").read_text())["providers"]
    assert provider["options"]["path"] == "$FEWSTEP_GRAFANA"
    assert "FEWSTEP_GRAFANA=$PWD/dashboards/grafana " in (GRAFANA / "README.md").read_text()


def sources(node: Any) -> Iterator[dict[str, str]]:
    """Every datasource that a dashboard names."""
    if isinstance(node, dict):
        for key, value in node.items():
            if key == "datasource":
                yield value
            else:
                yield from sources(value)
    elif isinstance(node, list):
        for item in node:
            yield from sources(item)


def test_prometheus_reads_the_alerts_beside_it_and_the_file_that_ray_writes(ray_cluster):
    config = yaml.safe_load((GRAFANA / "prometheus.yml").read_text())
    assert [(GRAFANA / name).is_file() for name in config["rule_files"]] == [True]
    [job] = config["scrape_configs"]
    [path] = job["file_sd_configs"][0]["files"]
    folder = Path(ray_cluster._private.worker._global_node.get_session_dir_path())
    written = folder / Path(path).relative_to("/tmp/ray/session_latest")
    targets = [target for group in json.loads(written.read_text()) for target in group["targets"]]
    node = ray_cluster.nodes()[0]
    assert f"{node['NodeManagerAddress']}:{node['MetricsExportPort']}" in targets
