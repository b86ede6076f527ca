"""The settings of a sweep, and the checks of them before anything runs."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from ..config import ConfigError, Strict, UserError
from ..metrics.base import refusal
from ..recipe import Recipe, SweepName
from .space import Conditional, Space, apply, check_space

DEFAULT_TRIALS = 20
PBT_KEYS = r"optim\.\w+\.lr|method\.(\w+_)?weight"


class Unsweepable(UserError, RuntimeError):
    """The sweep cannot continue; the text says why, and what to do."""


class Sweep(Strict):
    """Searches a recipe's settings on a Ray cluster; the answer is a recipe, best.yaml, and a report."""

    space: str
    """A file of tune_spaces by its stem, or the path of your own .py file. The file is run."""
    name: SweepName = ""
    """The sweep's name and folder below the recipe's `out`. An existing sweep is resumed. Empty makes a new name."""
    search: Literal["grid", "random", "tpe", "gp", "pareto"] = "tpe"
    """Search algorithm: tpe and gp are Optuna's, pareto optimises the space's OBJECTIVES together."""
    scheduler: Literal["none", "asha", "median", "pbt"] = "none"
    """Early stopping by images seen. pbt changes learning rates and weights during training instead."""
    trials: Annotated[int, Field(ge=1)] | None = None
    """Number of settings to try, or the population of pbt. null is all of a grid, else 20 without a budget."""
    budget: str | None = None
    """Budget of the search. 200000images: no trial starts that would exceed it. 3hours (of the CPUs or GPUs in use): no
    trial starts after them."""
    parallel: Annotated[int, Field(ge=1)] = 2
    """Most trials at a time. The cluster may have room for fewer."""
    seeds: Annotated[int, Field(ge=1)] = 1
    """Seeds of each of the best settings before a winner is named. They do not count against the budget."""
    finalists: Annotated[int, Field(ge=1)] = 2
    """Number of best settings to repeat with other seeds."""
    corner_seeds: Annotated[int, Field(ge=1)] = 1
    """Seeds at the corners of a grid, to measure the spread over seeds there."""
    grace: Annotated[int, Field(ge=1)] | None = None
    """Images before a scheduler may stop or change a trial. null is the images between scores."""
    reduction: Annotated[int, Field(ge=2)] = 3
    """Reduction factor of ASHA: one trial of so many passes each rung, and each rung is so many times later."""
    warm_start: str | None = None
    """Name or id of an earlier sweep's parent run in MLflow. tpe, gp or pareto learn from its trials."""
    retry: bool = False
    """Run failed trials again."""

    @field_validator("budget")
    @classmethod
    def _budget(cls, text: str | None) -> str | None:
        if text is not None:
            Budget.parse(text)
        return text

    @model_validator(mode="after")
    def _fits(self) -> Sweep:
        wrong = []
        if self.search == "grid" and self.trials is not None:
            wrong.append("trials: a grid has one trial for each point; leave it out")
        if self.corner_seeds > 1 and self.search != "grid":
            wrong.append(f"corner_seeds: only a grid has corners, and search={self.search}")
        if self.warm_start and self.search in ("grid", "random"):
            wrong.append(f"warm_start: search={self.search} does not learn from trials; use tpe, gp or pareto")
        if self.search == "pareto" and self.scheduler != "none":
            wrong.append(f"scheduler: {self.scheduler} needs a single score, and search=pareto has several; use none")
        if self.search == "pareto" and self.seeds > 1:
            wrong.append("seeds: search=pareto has no single best to repeat; leave it out")
        if self.scheduler == "pbt" and self.search != "random":
            wrong.append("search: scheduler=pbt begins with random settings and changes them itself; use search=random")
        if self.scheduler == "pbt" and self.seeds > 1:
            wrong.append("seeds: pbt changes settings during training, which no recipe repeats; leave it out")
        if wrong:
            raise ConfigError("\n".join(wrong))
        return self

    @property
    def limit(self) -> int | None:
        """Most trials of the search. None leaves it to the grid or the budget."""
        if self.trials is None and self.search != "grid" and self.budget is None:
            return DEFAULT_TRIALS
        return self.trials

    def room(self, recipe: Recipe) -> int | None:
        """Returns how many whole trials fit the limit and the budget, or None if neither limits it."""
        budget = Budget.parse(self.budget) if self.budget else None
        images = int(budget.amount // images_of(recipe)) if budget and budget.unit == "images" else None
        return min((n for n in (self.limit, images) if n is not None), default=None)


@dataclass(frozen=True)
class Budget:
    """An amount of images or of device hours."""

    amount: float
    unit: str

    @classmethod
    def parse(cls, text: str) -> Budget:
        """Parses `200000images` or `1.5hours`. Raises ConfigError."""
        match = re.fullmatch(r"([\d_.]+(?:e\d+)?)\s*(images|hours)", text)
        try:
            amount = float(match[1]) if match else 0.0
        except ValueError:
            amount = 0.0
        if amount <= 0:
            raise ConfigError(f"budget: {text!r} is not an amount; write 200000images or 1.5hours")
        return cls(amount, match[2])


def images_of(recipe: Recipe) -> int:
    """Returns the images of a whole run of the recipe."""
    return recipe.train.steps * recipe.train.batch


def devices(recipe: Recipe) -> float:
    """Returns the GPUs of a run, or its CPUs if it trains on CPUs."""
    c = recipe.cluster
    return c.workers * (1 if c.device == "cuda" else c.cpus_per_worker)


def slots(recipe: Recipe, asked: int, need: float, device: str, cpus: float, gpus: float) -> int:
    """Returns how many trials of `need` CPUs each run at a time, at most `asked`. Raises Unsweepable for none."""
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
        print(f"parallel: {fits} trials at a time instead of {asked}: {needs}, {has}")
    return min(fits, asked)


def check(sweep: Sweep, space: Space, recipe: Recipe) -> None:
    """Checks a sweep before a cluster is asked. Raises ConfigError with every mistake."""
    objectives = list(space.objectives) if sweep.search == "pareto" else [space.metric]
    check_space(space, recipe, objectives)
    wrong = []
    if sweep.search == "pareto" and len(objectives) < 2:
        wrong.append(f"OBJECTIVES: search=pareto needs two or more, and space {space.name!r} has {len(objectives)}")
    if not recipe.evaluate.rank_seen_by_loss:
        tried = [recipe, *(apply(recipe, {key: value}) for key, d in space.domains.items() for value in d.edges())]
        seen = {name for one in tried for name in one.seen_by_loss}
        wrong += [f"METRIC: {refusal(name)}" for name in objectives if name in seen]
    if sweep.search == "grid":
        space.grid()
    if sweep.room(recipe) == 0:
        wrong.append(f"budget: {sweep.budget} has no room for one trial of {images_of(recipe)} images")
    every, report = recipe.evaluate.every_images, recipe.train.report_every * recipe.train.batch
    if sweep.scheduler != "none":
        if every is None or every >= images_of(recipe):
            some = max(images_of(recipe) // 9 // report, 1) * report
            wrong.append(
                f"evaluate.every_images: {every}: scheduler={sweep.scheduler} needs scores during training; "
                f"give the images between them, such as {some} of {images_of(recipe)}"
            )
        elif every % report:
            wrong.append(
                f"evaluate.every_images: {every} is not a multiple of report_every x batch = {report}, so scores would "
                "come later; give a multiple"
            )
    if sweep.scheduler == "pbt":
        for key in space.domains:
            if not re.fullmatch(PBT_KEYS, key):
                wrong.append(f"SPACE[{key!r}]: pbt changes learning rates and weights only; take it out of the space")
            elif isinstance(space.domains[key], Conditional) or 0 in space.domains[key].edges():
                wrong.append(
                    f"SPACE[{key!r}]: zero adds or removes networks, which a run cannot do; use loguniform(...)"
                )
        if (sweep.limit or 0) < 2:
            wrong.append("trials: pbt needs a population of two or more")
    if wrong:
        raise ConfigError("\n".join(wrong))
