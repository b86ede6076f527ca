"""Trials of a sweep on Ray Tune: its schedulers, and an actor for each trial. fewstep.sweeps has the rest of a sweep.

A trial is an ordinary run of Ray Train. A small actor of Tune, which takes a hundredth of a CPU, starts it and passes
its scores to Tune, whose schedulers stop or change trials. A killed sweep resumes from its own record, not from Tune's.
"""

from __future__ import annotations

import logging
import math
import os
import random
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..build import open_data
from ..recipe import Recipe
from ..sweeps.conductor import Conductor
from ..sweeps.population import bounded, mutation
from ..sweeps.record import FAILED, FINISHED, SEARCH, STOPPED, Record
from ..sweeps.settings import Sweep, images_of, slots
from ..sweeps.space import Space
from ..sweeps.trial import Plan, TrialRun, read_pointer
from ..texts import first_line
from .session import connect
from .stream import DATA_CPUS
from .train import Lost, fit, localized

for _name, _value in {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # the record and MLflow replace them
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
ARGUMENTS = ("values", "seed", "scored_images")  # of TrialRun, in Tune's config; Tune knows the name itself


class Runner(tune.Trainable):
    """The actor of a trial. Its checkpoint for Tune is a pointer to a checkpoint of the engine."""

    def setup(self, config: dict[str, Any], plan: Plan) -> None:
        self.plan = plan
        self.donor: dict[str, Any] | None = None
        self.trial_run: TrialRun | None = None

    def step(self) -> dict[str, Any]:
        """Waits for the trial's next result. The first call starts the trial, after Tune has loaded a donor."""
        if self.trial_run is None:
            arguments = {key: self.config[key] for key in ARGUMENTS}
            self.trial_run = TrialRun(self.trial_name, self.plan, fit, **arguments, donor=self.donor)
        return self.trial_run.next_result()

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        self.trial_run.write_pointer(Path(checkpoint_dir))

    def load_checkpoint(self, checkpoint_dir: str) -> None:
        self.donor = read_pointer(Path(checkpoint_dir))

    def cleanup(self) -> None:
        if self.trial_run is not None:
            self.trial_run.stop()


class Source(Searcher):
    """Gives Tune the conductor's next trial."""

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
    """Returns the number of a Tune trial, from its name, because a population may have changed its settings."""
    return int(trial.custom_trial_name.rpartition("-")[2])


class Results(tune.Callback):
    """Passes the trials' results from Tune to the conductor."""

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
            error = trial.get_pickled_error() if trial.pickled_error else Lost()
            self.conductor.end(number, FAILED, first_line(error))


@dataclass(frozen=True)
class EndedTrial:
    """A trial that ended before this process started, with the attributes that a scheduler reads."""

    trial_id: str
    status: str = "TERMINATED"


def scheduler_of(sweep: Sweep, space: Space, recipe: Recipe, record: Record) -> TrialScheduler:
    """Returns Tune's scheduler, which measures time in images. It gets the scores of the trials in the record."""
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
            min_time_slice=math.inf,  # never pause a trial for another: a restart costs more than the wait
        )
    for trial in record.ended(SEARCH):
        if trial.scores:
            ended = EndedTrial(f"ended-{trial.number}")
            scheduler.on_trial_add(None, ended)
            results = [{"images": s["images"], "score": s["scores"].get(space.metric, math.nan)} for s in trial.scores]
            results = [dict(result, training_iteration=i + 1, time_total_s=i) for i, result in enumerate(results)]
            for result in results:
                scheduler.on_trial_result(None, ended, result)
            if trial.state == FINISHED:
                scheduler.on_trial_complete(None, ended, results[-1])
    return scheduler


class TuneCluster:
    """The cluster that RAY_ADDRESS names, else one on this machine (implements sweeps.driver.Cluster)."""

    def localized(self, recipe: Recipe) -> Recipe:
        """Returns the recipe with absolute paths."""
        return localized(recipe)

    def place(self, recipe: Recipe, parallel: int) -> tuple[int, str]:
        """Joins or starts the cluster. Returns the number of trials at a time, and their device, "cpu" or "cuda"."""
        import ray

        ours = not ray.is_initialized() and not os.environ.get("RAY_ADDRESS")
        cores = os.cpu_count() or 1
        connect(cpus=cores + 1)  # if it starts a cluster: one logical CPU more than cores, for the actors
        total, c = ray.cluster_resources(), recipe.cluster
        device = c.device or ("cuda" if total.get("GPU", 0) else "cpu")
        d = recipe.data
        streaming = d is not None and open_data(d).decoded_bytes > d.memory_mib << 20
        need = c.workers * c.cpus_per_worker + (DATA_CPUS if streaming else 0) + (0 if ours else ACTOR_CPUS)
        cpus = cores if ours else total.get("CPU", 0)
        return slots(recipe, parallel, need, device, cpus, total.get("GPU", 0)), device

    def run(self, conductor: Conductor, plan: Plan, parallel: int) -> None:
        """Runs trials until the conductor has none left. Only the search has a scheduler."""
        logging.getLogger("ray.tune").setLevel(logging.ERROR)  # the record has the failed trials
        scheduler = FIFOScheduler()
        if conductor.phase == SEARCH:
            scheduler = scheduler_of(conductor.sweep, conductor.space, conductor.recipe, conductor.record)
        search: dict[str, Any] = dict(search_alg=Source(conductor), num_samples=-1)
        space = None
        if isinstance(scheduler, PopulationBasedTraining):  # it takes no search algorithm, but all trials at the start
            configs = {config["name"]: config for config in map(conductor.config, iter(conductor.next, None))}
            if not configs:
                return
            search = {}
            look_up = lambda key: tune.sample_from(lambda spec: configs[spec.config.name][key])
            space = {"name": tune.grid_search(list(configs))} | {key: look_up(key) for key in ARGUMENTS}
        tune.Tuner(
            tune.with_resources(tune.with_parameters(Runner, plan=plan), {"CPU": ACTOR_CPUS}),
            param_space=space,
            tune_config=tune.TuneConfig(
                scheduler=scheduler,
                max_concurrent_trials=parallel,
                trial_name_creator=lambda trial: trial.config["name"],
                trial_dirname_creator=lambda trial: trial.config["name"],
                **search,
            ),
            run_config=tune.RunConfig(
                name=f"tune-{time.time_ns():x}",
                storage_path=str(Path(plan.recipe["out"]) / "ray"),
                callbacks=[Results(conductor)],
                failure_config=tune.FailureConfig(max_failures=0),
                checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
                verbose=0,
            ),
        ).fit()
