"""Two nodes, one of which dies: `python tests/elastic.py <folder> <tracking uri>` prints what became of the run."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[1] / "platform"), str(Path(__file__).resolve().parent)]
os.environ["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"] = "20"

from demo import recipe  # noqa: E402

from fewstep.cluster.session import private, ray  # noqa: E402 - which sets Ray's environment first
from fewstep.cluster.train import fit  # noqa: E402


def main(tmp: Path, store: str) -> None:
    from ray.cluster_utils import Cluster

    private()
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    second = cluster.add_node(num_cpus=1)
    ray.init(address=cluster.address, log_to_driver=False)
    gone = []

    def follow(line: dict) -> None:
        if line["step"] >= 10 and not gone:
            gone.append(line["step"])
            cluster.remove_node(second, allow_graceful=False)

    small = ["train.steps=24", "train.save_every=4", "train.report_every=2", "cluster.wait_s=60"]
    elastic = ["cluster.workers=2", "cluster.workers_min=1", "cluster.placement=shard"]
    result = fit(recipe(tmp, "name=elastic", f"tracking.uri={store}", *small, *elastic), follow)
    print(
        json.dumps({"finished": result["finished"], "step": result["step"], "run_id": result["run_id"], "gone": gone})
    )
    ray.shutdown()
    cluster.shutdown()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
