"""A sweep without a cluster: trials are made up, and everything that follows from their scores is real."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fewstep.config import read, validate
from fewstep.recipe import Recipe, load_recipe
from fewstep.sweeps import plots
from fewstep.sweeps.conductor import Conductor
from fewstep.sweeps.driver import MAY_DIFFER, sweep
from fewstep.sweeps.record import FAILED, FINISHED, SEARCH, SEEDS, Record
from fewstep.sweeps.settings import Sweep, Unsweepable, images_of
from fewstep.sweeps.space import Space, choice
from fewstep.sweeps.trial import Plan, TrialRun, read_pointer
from fewstep.tracking import Store

ROOT = Path(__file__).resolve().parents[1]
RECIPES, TEMPLATE = ROOT / "jobs" / "recipes", ROOT / "dashboards" / "sweep.html"
GAN, LR = "method.gan_weight", "optim.student.lr"
SPACE = Space(
    "mine", "Which?", {GAN: choice(0, 1e-3), LR: choice(1e-5, 1e-4)}, "fd_fashion", "min", {"fd_fashion": "min"}
)
MILLISECONDS = 1e-3 / 3600


def score(values: dict[str, Any], seed: int) -> float:
    """Best without a GAN at the high rate: 1 with seed 0, and 0.1 more for each seed."""
    return 1 + (values[GAN] > 0) + 2 * (values[LR] < 1e-4) + seed / 10


class MadeUp:
    """Trials that end at once with a score, or with an error where `score` raises one; `calls` are what was run."""

    def __init__(self, score: Callable[[dict[str, Any], int], float] = score, seen: tuple[str, ...] = ()):
        self.score, self.seen, self.calls = score, seen, []

    def localized(self, recipe: Recipe) -> Recipe:
        return recipe

    def place(self, recipe: Recipe, parallel: int) -> tuple[int, str]:
        return parallel, "cpu"

    def run(self, conductor: Conductor, plan: Plan, parallel: int) -> None:
        while (trial := conductor.next()) is not None:
            self.calls.append((conductor.phase, trial.number, trial.seed))
            images = plan.recipe["train"]["steps"] * plan.recipe["train"]["batch"]
            ended = {"run": trial.run, "spent": images, "hours": MILLISECONDS, "values": trial.values, "images": images}
            try:
                value = self.score(trial.values, trial.seed)
                scored = {"at": plan.recipe["train"]["steps"], "scores": {"fd_fashion": value, "diversity": 0.5}}
                ended |= scored | {"score": value, "seen_by_loss": list(self.seen)}
                ended |= {"state": FINISHED, "run_id": f"run-{trial.number}"}
            except ValueError as error:
                ended |= {"state": FAILED, "reason": str(error)}
            conductor.result(trial.number, ended)


def recipe_of(tmp: Path, *arguments: str) -> Recipe:
    small = [f"out={tmp}", "train.steps=6", "train.batch=8", "train.report_every=3", "train.save_every=3"]
    return load_recipe([*small, "evaluate.metrics=[fd_fashion,diversity]", *arguments], RECIPES, "fashion_mnist")


def conducted(tmp: Path, cluster: MadeUp, recipe: Recipe, **asked: Any) -> Conductor:
    """The search of a sweep alone, going on from the record that lies in `tmp`."""
    settings = Sweep(space="mine", **asked)
    record = Record(tmp, settings.model_dump(), MAY_DIFFER)
    conductor = Conductor(settings, SPACE, recipe, record, SimpleNamespace(log=lambda *_: None))
    conductor.begin_search([])
    cluster.run(conductor, Plan(recipe.model_dump(mode="json"), {}, {}, "fd_fashion", None), 1)
    return conductor


def test_a_sweep_from_its_space_to_its_answer(tmp_path, store, capsys, monkeypatch):
    recipe = recipe_of(tmp_path, f"tracking.uri={store}", "tracking.experiment=conductor")
    asked, cluster = Sweep(space="mine", search="grid", seeds=3, finalists=1, name="s"), MadeUp()
    closing = sweep(asked, SPACE, recipe, TEMPLATE, cluster)
    assert cluster.calls == [(SEARCH, n, 0) for n in range(4)] + [(SEEDS, 4, 1), (SEEDS, 5, 2)]
    assert {k: closing[k] for k in ("trials", "finished", "failed", "images", "winner")} == dict(
        trials=6, finished=6, failed=0, images=6 * 48, winner=True
    )
    assert closing["fd_fashion"] == pytest.approx(1.1)
    best = validate(Recipe, read(closing["best"]))
    assert (best.method.gan_weight, best.optim["student"].lr, best.seed) == (0, 1e-4, 0)
    assert (
        "gan_weight=0 student.lr=0.0001 wins: fd_fashion 1.1 ± 0.1 (3 seeds), 0.9 ahead of the next."
        in capsys.readouterr().out
    )
    run = Store(store, "conductor").find("s")
    assert (run.metrics["sweep/trials"], run.metrics["sweep/best_fd_fashion"]) == (6, 1.0)

    before = (tmp_path / "s" / "trials.jsonl").read_bytes()
    again = MadeUp()
    monkeypatch.setattr(plots, "draw", lambda *_: {})
    assert sweep(asked, SPACE, recipe, TEMPLATE, again)["run_id"] == closing["run_id"]
    assert again.calls == [] and (tmp_path / "s" / "trials.jsonl").read_bytes() == before


def test_a_dry_run_runs_nothing(tmp_path, capsys):
    cluster = MadeUp()
    assert (
        sweep(Sweep(space="mine", search="grid", corner_seeds=2), SPACE, recipe_of(tmp_path), TEMPLATE, cluster, True)
        is None
    )
    assert cluster.calls == [] and list(tmp_path.rglob("trials.jsonl")) == []
    assert "grid, none scheduler, 4 trials of 48 images" in capsys.readouterr().out


def test_a_cut_sweep_goes_on_where_it_was(tmp_path):
    """The process dies after the second trial: its record is all that is left."""
    recipe = recipe_of(tmp_path)

    def cut(values: dict[str, Any], seed: int) -> float:
        if len(first.calls) == 3:
            raise KeyboardInterrupt
        return score(values, seed)

    first, second, whole = MadeUp(cut), MadeUp(), MadeUp()
    with pytest.raises(KeyboardInterrupt):
        conducted(tmp_path / "cut", first, recipe, search="tpe", trials=4)
    conducted(tmp_path / "cut", second, recipe, search="tpe", trials=4)
    conducted(tmp_path / "whole", whole, recipe, search="tpe", trials=4)
    assert [number for _, number, _ in first.calls + second.calls] == [0, 1, 2, 2, 3]
    trials = [Record(tmp_path / name, {}, {"search", "space", *Sweep.model_fields}).trials for name in ("cut", "whole")]
    assert [t.values for t in trials[0].values()] == [t.values for t in trials[1].values()]
    assert all(t.state == FINISHED for t in trials[0].values())


def test_a_search_stops_where_the_next_trial_would_exceed_its_budget(tmp_path):
    recipe = recipe_of(tmp_path)
    whole = images_of(recipe)
    for budget, ran in ((f"{3 * whole}images", 3), (f"{3 * whole - 1}images", 2)):
        conductor = conducted(tmp_path / budget, MadeUp(), recipe, search="random", budget=budget)
        assert [t.images for t in conductor.record.trials.values()] == [whole] * ran
    conductor = conducted(
        tmp_path / "hours", MadeUp(), recipe, search="random", budget=f"{1.5 * MILLISECONDS:.12f}hours"
    )
    assert len(conductor.record.trials) == 2  # the second was begun within the budget


def test_trials_that_fail_alike_end_the_sweep_and_run_again_once_mended(tmp_path, store, monkeypatch):
    monkeypatch.setattr(plots, "draw", lambda *_: {})
    recipe = recipe_of(tmp_path, f"tracking.uri={store}", "tracking.experiment=alike-conductor")

    def lost(values: dict[str, Any], seed: int) -> float:
        raise ValueError("data.path: no folder '/lost'")

    asked, cluster = Sweep(space="mine", search="grid", name="s"), MadeUp(lost)
    with pytest.raises(
        Unsweepable, match="first 3 trials failed with the same error, so the sweep stops: data.path: no"
    ):
        sweep(asked, SPACE, recipe, TEMPLATE, cluster)
    assert len(cluster.calls) == 3
    runs = Store(store, "alike-conductor")
    children = runs.children(runs.find("s"))
    assert {run.status for run in children} == {"FAILED"} and len(children) == 3
    assert {run.tags["sweep.reason"] for run in children} == {"data.path: no folder '/lost'"}

    closing = sweep(asked.model_copy(update={"retry": True}), SPACE, recipe, TEMPLATE, MadeUp())
    assert {k: closing[k] for k in ("trials", "finished", "failed")} == dict(trials=4, finished=4, failed=0)


def test_a_score_that_is_not_finite_or_seen_by_a_loss_makes_its_trial_fail(tmp_path):
    recipe = recipe_of(tmp_path)
    conductor = conducted(tmp_path / "nan", MadeUp(lambda *_: math.nan), recipe, search="grid")
    assert {t.reason for t in conductor.record.trials.values()} == {"fd_fashion is nan"}
    seen = MadeUp(seen=("fd_fashion",))
    conductor = conducted(tmp_path / "seen", seen, recipe, search="grid")
    reasons = [t.reason for t in conductor.record.trials.values()]
    assert len(reasons) == 3 and all(r.startswith("a loss of the run used the network of fd_fashion") for r in reasons)
    allowed = recipe_of(tmp_path, "evaluate.rank_seen_by_loss=true")
    conductor = conducted(tmp_path / "allowed", seen, allowed, search="grid")
    trials = conductor.record.trials.values()
    assert [t.state for t in trials] == [FINISHED] * 4 and all(t.seen_by_loss("fd_fashion") for t in trials)


# A trial


def fitted(recipe: Recipe, follow: Callable, *, tags: dict[str, str], shared: bool) -> dict[str, Any]:
    """A run that reports at once: two scores, the second of the last step."""
    recipe.folder.mkdir(parents=True)
    lines = [{"step": s, "images": 8 * s, "metrics": {"images_per_s": 8.0}} for s in (3, 6)]
    (recipe.folder / "reports.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (recipe.folder / "recipe.yaml").write_text(json.dumps(recipe.model_dump(mode="json")))
    for step in (3, 6):
        follow({"step": step, "images": 8 * step, "scores": {"fd_fashion": 9.0 - step}, "seen_by_loss": []})
        follow({"step": step, "images": 8 * step, "metrics": {}})
    fitted.tags = tags
    return {"run_id": "abc", "finished": True, "step": 6}


def test_a_trial_gives_its_scores_one_by_one_and_the_last_with_its_end(tmp_path):
    recipe = recipe_of(tmp_path)
    plan = Plan(recipe.model_dump(mode="json"), {"sweep": "s"}, {GAN: "gan_weight"}, "fd_fashion", None)
    run = TrialRun("s-000", plan, fitted, {GAN: 0}, seed=3)
    first, last = run.next_result(), run.next_result()
    hours = pytest.approx(6 / 3600)
    assert first | {"hours": hours} == {
        "run": "s-000", "values": {GAN: 0}, "images": 24, "spent": 48, "hours": hours, "at": 3,
        "scores": {"fd_fashion": 6.0}, "score": 6.0, "seen_by_loss": [],
    }  # fmt: skip
    assert (last["at"], last["score"], last["state"], last["run_id"], last["done"]) == (6, 3.0, FINISHED, "abc", True)
    assert fitted.tags == {"sweep": "s", "sweep.trial": "s-000", "sweep.run": "s-000", "sweep.gan_weight": "0"}
    assert validate(Recipe, read(tmp_path / "s-000" / "recipe.yaml")).seed == 3

    resumed = TrialRun("s-001", plan, fitted, {GAN: 0}, seed=3, scored_images=24)
    assert resumed.next_result()["at"] == 6  # what the record has is not passed on again

    run.write_pointer(tmp_path)
    assert read_pointer(tmp_path) == {"trial": "s-000", "run": "s-000", "checkpoint": None}


def test_a_trial_whose_run_fails_says_why(tmp_path):
    def failing(*_: Any, **__: Any) -> dict[str, Any]:
        raise FloatingPointError("student: nan at step 3\nmore")

    plan = Plan(recipe_of(tmp_path).model_dump(mode="json"), {}, {GAN: "gan_weight"}, "fd_fashion", None)
    result = TrialRun("s-000", plan, failing, {GAN: 0}, seed=0).next_result()
    assert (result["state"], result["reason"]) == (FAILED, "FloatingPointError: student: nan at step 3")
    assert (result["spent"], result["hours"], result["done"]) == (0, 0.0, True)
