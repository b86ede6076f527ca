"""The driver of a sweep, from settings to answer. A `Cluster` runs the trials; cluster/sweep.py has Ray Tune's."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Any, Protocol

from .. import run
from ..folders import claim, usable
from ..locks import LOCK, locked
from ..recipe import Recipe, dated_name
from ..texts import masked
from ..tracking.provenance import Provenance
from ..tracking.tracker import Tracker
from . import answer, judge
from .conductor import SAME_ERRORS, Conductor
from .record import FAILED, FINISHED, SEARCH, STOPPED, Record
from .settings import Sweep, Unsweepable, check, images_of
from .space import Space, apply
from .trial import STOP_S, Plan
from .warm import earlier_trials

MAY_DIFFER = {"parallel", "trials", "budget", "seeds", "finalists", "corner_seeds"}
MLFLOW_PARENT = "mlflow.parentRunId"


class Cluster(Protocol):
    """The machines that run the trials of a sweep."""

    def localized(self, recipe: Recipe) -> Recipe:
        """Returns the recipe with absolute paths, for runs that start in another folder."""

    def place(self, recipe: Recipe, parallel: int) -> tuple[int, str]:
        """Returns the number of trials at a time, at most `parallel`, and their device, "cpu" or "cuda".

        Raises Unsweepable if the cluster has no room for one."""

    def run(self, conductor: Conductor, plan: Plan, parallel: int) -> None:
        """Runs the trials of `conductor.next` until it returns None. The sweep's scheduler may stop some early."""


def sweep(
    asked: Sweep, space: Space, base: Recipe, template: Path, cluster: Cluster, dry_run: bool = False
) -> dict[str, Any] | None:
    """Runs or resumes a sweep, and returns the values of the job's last line.

    dry_run: only check everything and print the plan; returns None. template: of report.html.
    Raises ConfigError, Unsweepable, and Busy if another process runs the same sweep.
    """
    asked = asked.model_copy(update={"name": asked.name or dated_name(space.name)})
    check(asked, space, base)
    whole = cluster.localized(base)
    recipe = trial_recipe(whole, asked)
    usable(Path(recipe.out), "sweep")
    run.check(recipe)
    print(plan_text(asked, space, recipe))
    if dry_run:
        return None
    claim(Path(recipe.out), "sweep")
    with locked(Path(recipe.out) / LOCK):
        try:
            return _sweep(asked, space, base, recipe, template, cluster)
        except KeyboardInterrupt:
            own = [argument for argument in sys.argv[1:] if not argument.startswith("name=")]
            again = masked(shlex.join(["python", sys.argv[0], *own, f"name={asked.name}"]))
            raise KeyboardInterrupt(f"interrupted; resume with: {again}") from None


def trial_recipe(recipe: Recipe, sweep: Sweep) -> Recipe:
    """Returns the recipe that all trials share, with a folder for all of them.

    Only the student is scored, as the teacher's scores are the same for all. Trials wait longer for CPUs, because a
    trial that is stopping still has its own. A population saves at each report, and keeps the checkpoints that another
    member may copy.
    """
    common = {"evaluate.teacher_steps": [], "cluster.wait_s": max(recipe.cluster.wait_s, 2 * STOP_S)}
    if sweep.scheduler == "pbt":
        report = recipe.train.report_every
        apart = (sweep.grace or recipe.evaluate.every_images) // (report * recipe.train.batch)
        common |= {"train.save_every": report, "train.keep": max(recipe.train.keep, 2 * apart + 2)}
    return apply(recipe, common, out=str(Path(recipe.out) / sweep.name))


def plan_text(sweep: Sweep, space: Space, recipe: Recipe) -> str:
    """The plan of a sweep, as lines to print."""
    count = (
        f"{len(space.grid())}"
        if sweep.search == "grid"
        else f"up to {sweep.limit}"
        if sweep.limit
        else "as many as fit"
    )
    lines = [f"sweep {sweep.name}: {space.question}", f"  {sweep.search}, {sweep.scheduler} scheduler, {count} trials"]
    lines[-1] += f" of {images_of(recipe):,} images" + (f", budget {sweep.budget}" if sweep.budget else "")
    if sweep.seeds > 1:
        lines.append(f"  then the best {sweep.finalists} with {sweep.seeds} seeds each")
    if sweep.corner_seeds > 1:
        lines.append(f"  and the corners of the grid with {sweep.corner_seeds} seeds each")
    return "\n".join(lines)


def _sweep(
    sweep: Sweep, space: Space, base: Recipe, recipe: Recipe, template: Path, cluster: Cluster
) -> dict[str, Any]:
    """Runs the sweep, after all checks and with its folder locked."""
    folder = Path(recipe.out)
    parallel, device = cluster.place(recipe, sweep.parallel)
    recipe = apply(recipe, {"cluster.device": device})
    known = earlier_trials(sweep, space, recipe) if sweep.warm_start else []
    settings = {"recipe": recipe.numbers, "space": space.plain()} | sweep.model_dump(exclude={"name", "retry"})
    record = Record(folder, settings, MAY_DIFFER)
    params = {"sweep": sweep.model_dump(mode="json")} | recipe.written
    with Tracker.open(
        folder,
        uri=recipe.tracking.uri,
        experiment=recipe.tracking.experiment,
        name=sweep.name,
        recipe=params,
        tags={"sweep": sweep.name, "sweep.space": space.name, "sweep.question": space.question},
    ) as tracker:
        tracker.flush(timeout_s=60)
        if tracker.run_id is None:
            raise Unsweepable(
                f"tracking.uri: no answer from {recipe.tracking.uri}, and trials are children of the sweep's run there"
            )
        tags = {MLFLOW_PARENT: tracker.run_id, "sweep": sweep.name}
        conductor = Conductor(sweep, space, recipe, record, tracker)
        if sweep.retry:
            for trial in [t for t in record.ended() if t.state == FAILED]:
                record.add("again", trial.number)
        population = list(space.domains) if sweep.scheduler == "pbt" else None
        plan = Plan(recipe.model_dump(mode="json"), tags, conductor.short, space.metric, population)
        conductor.begin_search(known)
        cluster.run(conductor, plan, parallel)
        annotate(conductor, tags)
        if reason := conductor.alike():
            raise Unsweepable(
                f"the first {SAME_ERRORS} trials failed with the same error, so the sweep stops: {reason}; "
                "mend it, and run again with retry=true"
            )
        conductor.begin_seeds(repeats(sweep, space, recipe, record))
        if conductor.waiting:
            cluster.run(conductor, plan, parallel)
            annotate(conductor, tags)
        return answer.write(sweep, space, base, record, tracker, template)


def repeats(sweep: Sweep, space: Space, recipe: Recipe, record: Record) -> list[tuple[dict[str, Any], int]]:
    """Returns settings and seeds of the second phase: the best settings of the search, and the corners of a grid."""
    best = judge.settings(record.ended(SEARCH), space.metric, space.mode)[: sweep.finalists]
    wanted = [(s.values, recipe.seed + k) for s in best for k in range(1, sweep.seeds)]
    corners = space.corners() if sweep.corner_seeds > 1 else []
    wanted += [(values, recipe.seed + k) for values in corners for k in range(1, sweep.corner_seeds)]
    return [pair for i, pair in enumerate(wanted) if pair not in wanted[:i]]


def annotate(conductor: Conductor, tags: dict[str, str]) -> None:
    """Makes a run in MLflow, with the reason, for each trial that stopped or failed without one."""
    for trial in conductor.record.ended():
        if trial.state == FINISHED or trial.run_id is not None:
            continue
        recipe = apply(conductor.recipe, trial.values, seed=trial.seed, name=trial.run)
        own = tags | {"sweep.trial": conductor.name(trial.number), "sweep.state": trial.state}
        own |= {"sweep.reason": trial.reason or ""}
        with run.open_tracker(recipe, Provenance(own, {})) as tracker:
            tracker.finish("KILLED" if trial.state == STOPPED else "FAILED", timeout_s=30)
            if tracker.run_id:
                conductor.record.add("run", trial.number, run_id=tracker.run_id)
