"""Sweeps on Ray Tune: which trials run, where and how long. What they try and what follows is fewstep.sweeps.

A trial is a normal run of Ray Train, begun by a small actor of Tune's that holds a hundredth of a CPU and passes the
run's scores on. Tune's schedulers stop or change trials by them; the sweep's own record, and not Tune's, is what a
killed sweep goes on from.
"""

from __future__ import annotations

import json
import logging
import math
import os
import queue
import random
import shlex
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import run
from ..config import UserError
from ..data.shards import open_shards
from ..engine.folder import checkpoints, complete, newest, step_of
from ..folders import claim, usable
from ..metrics.base import refusal
from ..recipe import Recipe, dated_name, read_run
from ..sweeps import answer, judge
from ..sweeps.proposals import Grid, Proposals, proposals
from ..sweeps.record import FAILED, FINISHED, SEARCH, SEEDS, STOPPED, Record, Trial
from ..sweeps.settings import Budget, Sweep, check, devices, images_of
from ..sweeps.space import Choice, Dice, Space, apply, values_of
from ..sweeps.warm import earlier_trials
from ..texts import masked
from ..tracking.provenance import Provenance
from ..tracking.tracker import Tracker
from ..watchdog import STOP
from .session import connect
from .stream import DATA_CPUS
from .train import Lost, fit, localized, reason_of

for _name, _value in {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # the record and MLflow are the logs
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",  # a failed trial has no score
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
    "RAY_AIR_NEW_OUTPUT": "0",
}.items():
    os.environ.setdefault(_name, _value)

from ray import tune  # noqa: E402
from ray.tune.schedulers import (  # noqa: E402
    AsyncHyperBandScheduler,
    FIFOScheduler,
    MedianStoppingRule,
    PopulationBasedTraining,
    TrialScheduler,
)
from ray.tune.search import Searcher  # noqa: E402

ACTOR_CPUS = 0.01
SAME_ERRORS = 3  # trials that fail alike before any other ended: then the sweep, and not a setting, is at fault
STOP_S = 120.0  # for a stopped run to save and say goodbye
MAY_DIFFER = {"parallel", "trials", "budget", "seeds", "finalists", "corner_seeds"}
POINTER = "pointer.json"
MLFLOW_PARENT = "mlflow.parentRunId"


class Unsweepable(UserError, RuntimeError):
    """The sweep cannot go on as asked; the text says why and how it can."""


# What runs in Tune's actors


class Runner(tune.Trainable):
    """One trial in its actor: a run of Ray Train beside it, whose scores are its results.

    config: `values` and `seed` of the trial; `told`, images of the newest score that the record has. plan: the recipe,
    the tags of its MLflow run, the metric that schedulers go by, and the space's keys where a population trains.
    A checkpoint of Tune's is a pointer to one of the engine's.
    """

    def setup(self, config: dict[str, Any], plan: dict[str, Any]) -> None:
        self.plan, self.told = plan, config["told"]
        self.donor: dict[str, Any] | None = None
        self.recipe: Recipe | None = None
        self.lines: queue.Queue = queue.Queue()
        self.held: dict[str, Any] | None = None
        self.checkpoint: str | None = None

    def _begin(self) -> None:
        self.recipe = self._my_recipe()
        values = self.config["values"]
        self.values = values if self.plan["population"] is None else values_of(self.recipe, values)
        self.thread = threading.Thread(target=self._fit, name="fewstep-trial", daemon=True)
        self.thread.start()

    def _my_recipe(self) -> Recipe:
        """The trial's recipe. In a population its newest generation's, or that of a new one that starts at a donor's
        checkpoint: a changed rate makes another run."""
        base, values = Recipe.model_validate(self.plan["recipe"]), self.config["values"]
        own = dict(seed=self.config["seed"], name=self.trial_name)
        if self.plan["population"] is None:
            return apply(base, values, **own)
        folders = generations(Path(base.out), self.trial_name)
        if self.donor and self.donor["trial"] != self.trial_name:
            self.told = -1
            own |= dict(name=f"{self.trial_name}-g{len(folders) + 1}", resume_allow=self.plan["population"])
            return apply(base, values, **own, resume=self._donated())
        if folders:
            scored = [line["images"] for line in run.report_lines(folders[-1]) if "scores" in line]
            self.told = max(scored, default=-1)
            return read_run(folders[-1], base.tracking.uri, base.storage)
        return apply(base, values, **own)

    def _donated(self) -> str:
        """The donor's checkpoint; where it has made way for newer ones by now, the newest."""
        given = self.donor["checkpoint"]
        if complete(given):
            return given
        recipe = self.plan["recipe"]
        donor = read_run(Path(recipe["out"]) / self.donor["run"], recipe["tracking"]["uri"], recipe["storage"])
        return str(newest(donor.checkpoints))

    def _fit(self) -> None:
        tags = self.plan["tags"] | {"sweep.trial": self.trial_name, "sweep.run": self.recipe.name}
        tags |= {f"sweep.{self.plan['short'][key]}": str(value) for key, value in self.values.items()}
        if self.donor:
            tags["sweep.from"] = self.recipe.resume
        try:
            self.lines.put(("end", fit(self.recipe, self._follow, tags=tags, shared=True)))
        except BaseException as error:  # whatever ends a run is this trial's result, and not the sweep's end
            self.lines.put(("error", error))

    def _follow(self, line: dict[str, Any]) -> None:
        if "scores" in line:
            self.lines.put(("score", line))

    def step(self) -> dict[str, Any]:
        """Waits for the run's next score, or its end."""
        if self.recipe is None:
            self._begin()
        while True:
            kind, said = self.lines.get()
            if kind == "score" and said["images"] > self.told:
                if said["step"] == self.recipe.train.steps:
                    self.held = said  # told with the end, which follows
                    continue
                if self.plan["population"] is not None:
                    self._await_checkpoint(said["step"])
                return self._result(said)
            if kind == "end":
                done = {"state": FINISHED, "run_id": said["run_id"], "done": True}
                if not said["finished"]:
                    done |= {"state": FAILED, "reason": f"asked to stop at step {said['step']}; retry=true goes on"}
                return self._result(self.held) | done
            if kind == "error":
                return self._result(None) | {"state": FAILED, "reason": reason_of(said), "done": True}

    def _result(self, line: dict[str, Any] | None) -> dict[str, Any]:
        images, hours = spent(Path(self.recipe.out), self.trial_name)
        result = {"run": self.recipe.name, "spent": images, "hours": hours, "values": self.values}
        if line is None:
            return result | {"images": images}
        self.told = line["images"]
        score = (line["scores"] | {"hours": hours}).get(self.plan["metric"], math.nan)
        result |= {"images": line["images"], "at": line["step"], "scores": line["scores"], "score": score}
        return result | {"seen_by_loss": line.get("seen_by_loss", [])}

    def _await_checkpoint(self, step: int) -> None:
        """A score is passed on when the weights that made it can be taken over."""
        while self.thread.is_alive():
            found = [c for c in checkpoints(self.recipe.checkpoints) if step_of(c) == step]
            if found:
                self.checkpoint = str(found[0])
                return
            time.sleep(0.1)

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        pointer = {"trial": self.trial_name, "run": self.recipe.name, "checkpoint": self.checkpoint}
        (Path(checkpoint_dir) / POINTER).write_text(json.dumps(pointer))

    def load_checkpoint(self, checkpoint_dir: str) -> None:
        self.donor = json.loads((Path(checkpoint_dir) / POINTER).read_text())

    def cleanup(self) -> None:
        """A run that still trains is asked to stop, saves, and ends in MLflow as one that was stopped."""
        if self.recipe is not None and self.thread.is_alive():
            self.recipe.folder.mkdir(parents=True, exist_ok=True)
            (self.recipe.folder / STOP).touch()
            self.thread.join(STOP_S)


def generations(folder: Path, name: str) -> list[Path]:
    """The folders of a trial's runs, oldest first: `<name>`, and `<name>-g2`, ... where a population changed it."""
    found = [folder / name, *sorted(folder.glob(f"{name}-g*"), key=lambda p: int(p.name.rpartition("-g")[2]))]
    return [path for path in found if (path / "recipe.yaml").is_file()]


def spent(folder: Path, name: str) -> tuple[int, float]:
    """Images that a trial's runs trained on, and the hours it took times the devices they held."""
    images = hours = 0.0
    for path in generations(folder, name):
        recipe = read_run(path)
        before = None
        for report in run.read_reports(path):
            first = max(report["images"] - recipe.train.report_every * recipe.train.batch, 0)
            seen = report["images"] - (first if before is None else before)
            before = report["images"]
            images += seen
            hours += devices(recipe) * seen / report["metrics"]["images_per_s"] / 3600
    return int(images), hours


# What the driver does


class Conductor:
    """Decides which trial is next and writes down what becomes of each; `Ask` and `Tell` tie it to Tune."""

    def __init__(self, sweep: Sweep, space: Space, recipe: Recipe, record: Record, tracker: Tracker):
        self.sweep, self.space, self.recipe, self.record, self.tracker = sweep, space, recipe, record, tracker
        self.budget = Budget.parse(sweep.budget) if sweep.budget else None
        self.short = answer.short_names(space, recipe)
        self.proposals: Proposals = Grid([])
        self.phase, self.waiting = SEARCH, []

    def __getstate__(self) -> dict[str, Any]:
        return {}  # Tune pickles what it is given; a sweep goes on from its record

    def label(self, trial: Trial) -> str:
        """A trial as a person reads it."""
        settings = answer.label(trial.values, self.short)
        return f"{trial.number:03d}  {settings}" + (f"  seed={trial.seed}" if trial.phase == SEEDS else "")

    def name(self, number: int) -> str:
        """Of a trial in Tune, and of its run."""
        return f"{Path(self.recipe.out).name}-{number:03d}"

    def config(self, trial: Trial) -> dict[str, Any]:
        """What Tune gives the trial's actor."""
        told = trial.scores[-1]["images"] if trial.scores else -1
        return {"name": self.name(trial.number), "values": trial.values, "seed": trial.seed, "told": told}

    # the search

    def begin_search(self, known: list[tuple[dict[str, Any], list[float]]]) -> None:
        """The search phase, going on from the record; `known` are an earlier sweep's settings and scores."""
        self.phase = SEARCH
        self.proposals = proposals(self.space, self.sweep.search, self.recipe.seed, self.sweep.room(self.recipe))
        for i, (values, scores) in enumerate(known):
            self.proposals.adopt(-1 - i, values)
            self.proposals.tell(-1 - i, scores)
        for trial in (t for t in self.record.trials.values() if t.phase == SEARCH):
            self.proposals.adopt(trial.number, trial.values)
            for score in trial.scores:
                self.proposals.report(trial.number, score["images"], score["scores"].get(self.space.metric, math.nan))
            if trial.state:
                self._tell(trial)
        self.waiting = self.record.open(SEARCH)

    def begin_seeds(self, wanted: list[tuple[dict[str, Any], int]]) -> None:
        """The phase that repeats settings with other seeds; what the record has is not run again."""
        self.phase, self.proposals = SEEDS, Grid([])
        tried = [(t.values, t.seed) for t in self.record.trials.values()]
        self.waiting = self.record.open(SEEDS)
        for values, seed in wanted:
            if (values, seed) not in tried:
                self.waiting.append(self._new(values, seed))

    def next(self) -> Trial | None:
        """The next trial to run; None where nothing is left, or the budget is spent."""
        if self.waiting:
            return self.waiting.pop(0)
        if self.phase == SEEDS or self.alike() or self._spent():
            return None
        count = sum(t.phase == SEARCH for t in self.record.trials.values())
        if self.sweep.limit is not None and count >= self.sweep.limit:
            return None
        values = self.proposals.propose(count)
        return None if values is None else self._new(values, self.recipe.seed)

    def _new(self, values: dict[str, Any], seed: int) -> Trial:
        number = len(self.record.trials)
        return self.record.add("trial", number, values=values, seed=seed, phase=self.phase, run=self.name(number))

    def _spent(self) -> bool:
        """Whether the budget has no room for another trial, those that run counted as if they ran to their end."""
        if self.budget is None:
            return False
        trials = [t for t in self.record.trials.values() if t.phase == SEARCH]
        if self.budget.unit == "hours":
            return sum(t.hours for t in trials) >= self.budget.amount
        whole = lambda t: t.images if t.state else images_of(apply(self.recipe, t.values))
        return sum(map(whole, trials)) + images_of(self.recipe) > self.budget.amount

    def alike(self) -> str | None:
        """The reason for which the first trials all failed, if they did."""
        ended = [self.record.trials[number] for number in self.record.order]
        first = [t for t in ended if t.phase == SEARCH][:SAME_ERRORS]
        reasons = {t.reason if t.state == FAILED else None for t in first}
        return reasons.pop() if len(first) == SAME_ERRORS and len(reasons) == 1 else None

    # what becomes of them

    def result(self, number: int, result: dict[str, Any]) -> None:
        """A score, an end, or both."""
        spent = {"spent": result["spent"], "hours": result["hours"]}
        trial = self.record.trials[number]
        if "scores" in result:
            scores = {key: result[key] for key in ("images", "scores", "seen_by_loss")} | {"step": result["at"]}
            trial = self.record.add("score", number, **spent, **scores, run=result["run"], values=result["values"])
            if trial.phase == SEARCH:
                self.proposals.report(number, result["images"], result["score"])
            text = "  ".join(f"{name} {value:.4g}" for name, value in result["scores"].items())
            print(f"{number:03d}  {text}  at {result['images']:,} images", flush=True)
        if "state" in result:
            state, reason = result["state"], result.get("reason")
            metric, ranks = self.space.metric, self.recipe.evaluate.rank_seen_by_loss
            if state == FINISHED and not math.isfinite(trial.score(metric)):
                state, reason = FAILED, f"{metric} is {trial.score(metric)}"
            elif state == FINISHED and trial.seen_by_loss(metric) and not ranks:
                state, reason = FAILED, refusal(metric)
            self.end(number, state, reason, run_id=result.get("run_id"), **spent)

    def end(self, number: int, state: str, reason: str | None, **fields: Any) -> None:
        """A trial is over."""
        trial = self.record.add("end", number, state=state, reason=reason, **fields)
        if trial.phase == SEARCH:
            self._tell(trial)
        print(f"{number:03d}  {state}{f': {reason}' if reason else ''}", flush=True)
        ended = self.record.ended()
        best = answer.best_score(ended, self.space)
        numbers = {"sweep/trials": len(ended), "sweep/hours": sum(t.hours for t in ended)}
        numbers |= {} if best is None else {f"sweep/best_{self.space.metric}": best}
        self.tracker.log(numbers, len(ended), sum(t.images for t in ended))

    def _tell(self, trial: Trial) -> None:
        names = self.space.objectives if self.sweep.search == "pareto" else [self.space.metric]
        values = None if trial.state == FAILED else [trial.score(name) for name in names]
        self.proposals.tell(trial.number, values, stopped=trial.state == STOPPED)


class Ask(Searcher):
    """Tune's question for the next trial."""

    def __init__(self, conductor: Conductor):
        super().__init__(metric="score", mode=conductor.space.mode)
        self.conductor = conductor

    def suggest(self, trial_id: str) -> dict[str, Any] | str:
        trial = self.conductor.next()
        return Searcher.FINISHED if trial is None else self.conductor.config(trial)

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None: ...

    def save(self, checkpoint_path: str) -> None: ...

    def restore(self, checkpoint_path: str) -> None: ...


def number_of(trial: Any) -> int:
    """Of Tune's trial, whose settings may be another one's by now: its name stays."""
    return int(trial.custom_trial_name.rpartition("-")[2])


class Tell(tune.Callback):
    """Tune's news of the trials."""

    def __init__(self, conductor: Conductor):
        self.conductor = conductor

    def on_trial_start(self, iteration: int, trials: list, trial: Any, **info: Any) -> None:
        mine = self.conductor.record.trials[number_of(trial)]
        print(f"{self.conductor.label(mine)}  starts", flush=True)

    def on_trial_result(self, iteration: int, trials: list, trial: Any, result: dict[str, Any], **info: Any) -> None:
        self.conductor.result(number_of(trial), result)

    def on_trial_complete(self, iteration: int, trials: list, trial: Any, **info: Any) -> None:
        number = number_of(trial)
        mine = self.conductor.record.trials[number]
        if mine.state is None:
            at = f"{mine.scores[-1]['images']:,} images" if mine.scores else "the start"
            self.conductor.end(number, STOPPED, f"{self.conductor.sweep.scheduler}, at {at}")

    def on_trial_error(self, iteration: int, trials: list, trial: Any, **info: Any) -> None:
        number = number_of(trial)
        if self.conductor.record.trials[number].state is None:
            self.conductor.end(number, FAILED, reason_of(trial.pickled_error and trial.get_pickled_error() or Lost()))


@dataclass(frozen=True)
class Told:
    """A trial that ended before this process began, as far as a scheduler looks at one."""

    trial_id: str
    status: str = "TERMINATED"


def scheduler_of(sweep: Sweep, space: Space, recipe: Recipe, record: Record) -> TrialScheduler:
    """Tune's scheduler, on images seen. What finished trials reported is told to it again."""
    every = recipe.evaluate.every_images
    known = dict(time_attr="images", metric="score", mode=space.mode)
    if sweep.scheduler == "none":
        return FIFOScheduler()
    if sweep.scheduler == "pbt":
        random.seed(recipe.seed)
        return PopulationBasedTraining(
            **known,
            perturbation_interval=sweep.grace or every,
            hyperparam_mutations={"values": {key: mutation(space, key, recipe.seed) for key in space.domains}},
            custom_explore_fn=lambda config: config | {"values": bounded(space, config["values"])},
            quantile_fraction=0.25 if (sweep.limit or 0) >= 4 else 0.5,
            log_config=False,
        )
    if sweep.scheduler == "asha":
        whole = images_of(recipe)
        scheduler = AsyncHyperBandScheduler(
            **known, grace_period=sweep.grace or every, max_t=whole, reduction_factor=sweep.reduction
        )
    else:
        scheduler = MedianStoppingRule(
            **known,
            grace_period=sweep.grace or every,
            min_samples_required=3,
            min_time_slice=math.inf,  # a trial makes way for no other: to begin again costs more than to wait
        )
    for trial in record.ended(SEARCH):
        if trial.scores:
            told = Told(f"told-{trial.number}")
            scheduler.on_trial_add(None, told)
            results = [{"images": s["images"], "score": s["scores"].get(space.metric, math.nan)} for s in trial.scores]
            results = [dict(result, training_iteration=i + 1, time_total_s=i) for i, result in enumerate(results)]
            for result in results:
                scheduler.on_trial_result(None, told, result)
            if trial.state == FINISHED:
                scheduler.on_trial_complete(None, told, results[-1])
    return scheduler


def mutation(space: Space, key: str, seed: int) -> list[Any] | Callable[[], Any]:
    """How a population changes a key: along a list, or by a factor and now and then by a new draw."""
    domain = space.domains[key]
    if isinstance(domain, Choice):
        return list(domain.values)
    dice = Dice(seed, *key.encode())
    return lambda: domain.draw(key, dice)


def bounded(space: Space, values: dict[str, Any]) -> dict[str, Any]:
    """Values that a population changed, back between their bounds."""
    out = dict(values)
    for key, value in values.items():
        if not isinstance(space.domains[key], Choice):
            low, high = space.domains[key].edges()
            out[key] = min(max(float(f"{value:.4g}"), low), high)
    return out


def slots(recipe: Recipe, asked: int, need: float, device: str, cpus: float, gpus: float) -> int:
    """How many trials of `need` CPUs each run at a time, at most `asked`. Raises Unsweepable for none."""
    workers = recipe.cluster.workers
    by_cpus = math.floor(cpus / need + 1e-9)
    fits = min(by_cpus, math.floor(gpus / workers)) if device == "cuda" else by_cpus
    needs = f"a trial needs {need:g} CPUs" + (f" and {workers} GPUs" if device == "cuda" else "")
    has = f"the cluster has {cpus:g} CPUs and {gpus:g} GPUs"
    if fits < 1:
        raise Unsweepable(
            f"cluster.workers: {needs}, {has}; use fewer workers, a smaller cluster.cpus_per_worker, or add nodes"
        )
    if fits < asked:
        print(f"parallel: {fits} at a time and not {asked}: {needs}, {has}")
    return min(fits, asked)


def place(recipe: Recipe, asked: int) -> tuple[int, str]:
    """Joins or starts the cluster. Returns how many trials run at a time, and whether on cpu or cuda."""
    import ray

    ours = not ray.is_initialized() and not os.environ.get("RAY_ADDRESS")
    cores = os.cpu_count() or 1
    connect(cpus=cores + 1)  # where it starts one: a logical CPU beyond the cores, for the actors
    total, c = ray.cluster_resources(), recipe.cluster
    device = c.device or ("cuda" if total.get("GPU", 0) else "cpu")
    d = recipe.data
    streaming = d is not None and open_shards(d.path, "size").decoded_bytes > d.memory_mib << 20
    need = c.workers * c.cpus_per_worker + (DATA_CPUS if streaming else 0) + (0 if ours else ACTOR_CPUS)
    return slots(recipe, asked, need, device, cores if ours else total.get("CPU", 0), total.get("GPU", 0)), device


def run_phase(conductor: Conductor, scheduler: TrialScheduler, parallel: int, plan: dict[str, Any]) -> None:
    """Runs trials until the conductor has no more."""
    logging.getLogger("ray.tune").setLevel(logging.ERROR)  # trials that fail are the record's to tell
    known: dict[str, Any] = dict(search_alg=Ask(conductor), num_samples=-1)
    space = None
    if isinstance(scheduler, PopulationBasedTraining):  # which takes no search: its trials are all there at the start
        configs = {config["name"]: config for config in map(conductor.config, iter(conductor.next, None))}
        if not configs:
            return
        known = {}
        look_up = lambda key: tune.sample_from(lambda spec: configs[spec.config.name][key])
        space = {"name": tune.grid_search(list(configs))} | {key: look_up(key) for key in ("values", "seed", "told")}
    tune.Tuner(
        tune.with_resources(tune.with_parameters(Runner, plan=plan), {"CPU": ACTOR_CPUS}),
        param_space=space,
        tune_config=tune.TuneConfig(
            scheduler=scheduler,
            max_concurrent_trials=parallel,
            trial_name_creator=lambda trial: trial.config["name"],
            trial_dirname_creator=lambda trial: trial.config["name"],
            **known,
        ),
        run_config=tune.RunConfig(
            name=f"tune-{time.time_ns():x}",
            storage_path=str(Path(plan["recipe"]["out"]) / "ray"),
            callbacks=[Tell(conductor)],
            failure_config=tune.FailureConfig(max_failures=0),
            checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
            verbose=0,
        ),
    ).fit()


def annotate(conductor: Conductor, tags: dict[str, str]) -> None:
    """Says in MLflow why trials ended that did not finish; one that failed before it had a run gets one."""
    for trial in conductor.record.ended():
        if trial.state == FINISHED or trial.run_id is not None:
            continue
        recipe = apply(conductor.recipe, trial.values, seed=trial.seed, name=trial.run)
        said = tags | {"sweep.trial": conductor.name(trial.number), "sweep.state": trial.state}
        said |= {"sweep.reason": trial.reason or ""}
        with run.open_tracker(recipe, Provenance(said, {})) as tracker:
            tracker.finish("KILLED" if trial.state == STOPPED else "FAILED", timeout_s=30)
            if tracker.run_id:
                conductor.record.add("run", trial.number, run_id=tracker.run_id)


def sweep(asked: Sweep, space: Space, base: Recipe, template: Path, dry_run: bool = False) -> dict[str, Any] | None:
    """Runs a sweep to its end, or goes on with one, and returns the last line of the job.

    With `dry_run` it checks everything, prints the plan and returns None. template: of report.html.
    Raises ConfigError, Unsweepable and Unplaceable.
    """
    asked = asked.model_copy(update={"name": asked.name or dated_name(space.name)})
    check(asked, space, base)
    whole = localized(base)
    recipe = trial_recipe(whole, asked)
    usable(Path(recipe.out), "sweep")
    run.check(recipe)
    print(plan_text(asked, space, recipe))
    if dry_run:
        return None
    try:
        return _sweep(asked, space, base, recipe, template)
    except KeyboardInterrupt:
        own = [word for word in sys.argv[1:] if not word.startswith("name=")]
        again = masked(shlex.join(["python", sys.argv[0], *own, f"name={asked.name}"]))
        raise KeyboardInterrupt(f"interrupted; go on with: {again}") from None


def trial_recipe(recipe: Recipe, sweep: Sweep) -> Recipe:
    """What trials have in common: a folder, scores of the student only, since the teacher's are the same for all, and
    the patience to wait for the CPUs of a trial that is being stopped. A population saves at each report, and keeps
    what another may take over."""
    common = {"evaluate.teacher_steps": [], "cluster.wait_s": max(recipe.cluster.wait_s, 2 * STOP_S)}
    if sweep.scheduler == "pbt":
        report = recipe.train.report_every
        apart = (sweep.grace or recipe.evaluate.every_images) // (report * recipe.train.batch)
        common |= {"train.save_every": report, "train.keep": max(recipe.train.keep, 2 * apart + 2)}
    return apply(recipe, common, out=str(Path(recipe.out) / sweep.name))


def plan_text(sweep: Sweep, space: Space, recipe: Recipe) -> str:
    """What is about to happen, in a few lines."""
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


def _sweep(sweep: Sweep, space: Space, base: Recipe, recipe: Recipe, template: Path) -> dict[str, Any]:
    """The sweep, once it is checked."""
    folder = Path(recipe.out)
    claim(folder, "sweep")
    parallel, device = place(recipe, sweep.parallel)
    recipe = apply(recipe, {"cluster.device": device})
    known = earlier_trials(sweep, space, recipe) if sweep.warm_start else []
    said = {"recipe": recipe.numbers, "space": space.plain()} | sweep.model_dump(exclude={"name", "retry"})
    record = Record(folder, said, MAY_DIFFER)
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
                f"tracking.uri: no answer from {recipe.tracking.uri}, and trials need the sweep's run to belong to"
            )
        tags = {MLFLOW_PARENT: tracker.run_id, "sweep": sweep.name}
        conductor = Conductor(sweep, space, recipe, record, tracker)
        if sweep.retry:
            for trial in [t for t in record.ended() if t.state == FAILED]:
                record.add("again", trial.number)
        plan = {
            "recipe": recipe.model_dump(mode="json"),
            "tags": tags,
            "short": conductor.short,
            "metric": space.metric,
            "population": list(space.domains) if sweep.scheduler == "pbt" else None,
        }
        conductor.begin_search(known)
        run_phase(conductor, scheduler_of(sweep, space, recipe, record), parallel, plan)
        annotate(conductor, tags)
        if reason := conductor.alike():
            raise Unsweepable(
                f"the first {SAME_ERRORS} trials failed alike, so the sweep stops: {reason}; mend it, and retry=true"
            )
        conductor.begin_seeds(repeats(sweep, space, recipe, record))
        if conductor.waiting:
            run_phase(conductor, FIFOScheduler(), parallel, plan)
            annotate(conductor, tags)
        return answer.write(sweep, space, base, record, tracker, template)


def repeats(sweep: Sweep, space: Space, recipe: Recipe, record: Record) -> list[tuple[dict[str, Any], int]]:
    """Settings and seeds of the second phase: the best settings of the search, and the corners of a grid."""
    best = judge.settings(record.ended(SEARCH), space.metric, space.mode)[: sweep.finalists]
    wanted = [(s.values, recipe.seed + k) for s in best for k in range(1, sweep.seeds)]
    corners = space.corners() if sweep.corner_seeds > 1 else []
    wanted += [(values, recipe.seed + k) for values in corners for k in range(1, sweep.corner_seeds)]
    return [pair for i, pair in enumerate(wanted) if pair not in wanted[:i]]
