"""A chain of recipes: each stage finds the runs before it; a chain that is started again goes on where it stopped."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from job import names

from fewstep.config import ConfigError

JOB = names("chain")
TINY = "train.steps: 2, train.batch: 8, train.report_every: 1, train.save_every: 1, evaluate.metrics: []"


def a_chain(tmp_path: Path, second: str) -> Path:
    path = tmp_path / "chain.yaml"
    own = f"{TINY}, out: {tmp_path}/runs, tracking.uri: 'sqlite:///{tmp_path}/mlflow.db'"
    path.write_text(
        f"stages:\n- {{recipe: fashion_mnist, set: {{{own}, method.gan_weight: 0}}}}\n"
        f"- {{recipe: fashion_mnist, set: {{{own}, {second}}}}}\n"
    )
    return path


def test_a_later_stage_names_the_folders_of_the_earlier(tmp_path):
    chain = a_chain(tmp_path, 'start: {student: "{1}", fake: "{1}/net.student"}')
    first, second = JOB["recipes"](JOB["Chain"](chain=str(chain), name="two"))
    assert (first.name, first.method.gan_weight, second.name) == ("two-1", 0, "two-2")
    assert second.start == {"student": str(first.folder), "fake": f"{first.folder}/net.student"}
    with pytest.raises(ConfigError, match="no such key"):
        JOB["recipes"](JOB["Chain"](chain=str(a_chain(tmp_path, "train.stesp: 1")), name="two"))
    with pytest.raises(ConfigError, match="stages"):
        (tmp_path / "none.yaml").write_text("stages: []\n")
        JOB["recipes"](JOB["Chain"](chain=str(tmp_path / "none.yaml"), name="two"))


@pytest.mark.slow
def test_a_chain_runs_once_and_goes_on_where_it_stopped(ray_cluster, tmp_path, monkeypatch, capfd):
    chain = a_chain(tmp_path, 'start: {student: "{1}", fake: "{1}/net.student"}')
    JOB["main"]([f"chain={chain}", "name=two"])
    runs = json.loads(capfd.readouterr().out.splitlines()[-1])["runs"]
    assert [Path(run).name for run in runs] == ["two-1", "two-2"]
    JOB["main"]([f"chain={chain}", "name=two"])
    assert "two-1: finished, 2 steps\ntwo-2: finished, 2 steps" in capfd.readouterr().out
