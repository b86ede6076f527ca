"""Trials of an earlier sweep, read from MLflow, for a search to learn from."""

from __future__ import annotations

import json
import math
from typing import Any

from ..config import ConfigError
from ..recipe import Recipe
from ..tracking.runs import Run, Store
from ..tracking.tracker import params_of
from .settings import Sweep, devices
from .space import HOURS, Space


def earlier_trials(sweep: Sweep, space: Space, recipe: Recipe) -> list[tuple[dict[str, Any], list[float]]]:
    """Returns the trials of the sweep `sweep.warm_start` as (setting, score of each objective).

    Raises ValueError if there is no such sweep, or if its runs differ from this recipe in a key outside the space, as
    such scores do not compare. Trials outside this space are left out; a line says how many are used.
    """
    store = Store(recipe.tracking.uri)
    parent = store.find(sweep.warm_start)
    children = [child for child in store.children(parent) if child.status == "FINISHED"]
    if not children:
        raise ConfigError(f"warm_start: run {parent.name!r} has no finished trials; give a sweep's parent run")
    wanted = params_of(recipe.numbers)
    for key in [key for key in wanted if key not in space.domains and key != "seed"]:
        if any(child.params.get(key, wanted[key]) != wanted[key] for child in children):
            theirs = next(c.params[key] for c in children if c.params.get(key, wanted[key]) != wanted[key])
            raise ConfigError(
                f"warm_start: sweep {parent.name!r} has {key} {theirs} and this one {wanted[key]}, so scores do not "
                "compare; give the same value, or search the key"
            )
    trials = [_trial(store, sweep, space, recipe, child) for child in children]
    used = [trial for trial in trials if trial is not None]
    print(f"warm_start: {len(used)} of the {len(children)} trials of {parent.name} lie in this space")
    return used


def _trial(
    store: Store, sweep: Sweep, space: Space, recipe: Recipe, child: Run
) -> tuple[dict[str, Any], list[float]] | None:
    values: dict[str, Any] = {}
    for key, domain in space.domains.items():
        text = child.params.get(key)
        if text is not None and not (getattr(domain, "key", None) and not values.get(domain.key)):
            values[key] = _parameter_value(text)
    names = list(space.objectives) if sweep.search == "pareto" else [space.metric]
    scores = [_hours(store, recipe, child) if n == HOURS else child.metrics.get(f"score/{n}", math.nan) for n in names]
    return (values, scores) if space.contains(values) and all(map(math.isfinite, scores)) else None


def _hours(store: Store, recipe: Recipe, child: Run) -> float:
    """Returns the device hours of a run's training."""
    speeds = store.history(child, "by_images/images_per_s")
    images = [0, *(point.step for point in speeds)]
    seconds = sum((b - a) / p.value for a, b, p in zip(images, images[1:], speeds, strict=False))
    return seconds * devices(recipe) / 3600


def _parameter_value(text: str) -> Any:
    """Returns the value of a logged parameter: strings are logged as they are, other values as JSON."""
    try:
        return json.loads(text)
    except ValueError:
        return text
