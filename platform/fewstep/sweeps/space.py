"""Search spaces: dotted recipe keys and the domains of their values.

A space is a Python file. Naming it runs it, like any other program:

    METRIC = "fd_fashion"
    SPACE = {
        "method.gan_weight": zero_or(loguniform(1e-3, 3e-2)),
        "optim.disc.lr": given("method.gan_weight", loguniform(1e-4, 1e-3)),   # only where there is a discriminator
    }
    WHY = {"method.gan_weight": "..."}                                         # why these bounds

Its docstring states the question. OBJECTIVES = ["fd_fashion", "diversity"] lists the objectives of search=pareto. They
are metrics, or `hours`, the device hours of a trial's training. The metric fixes whether low or high scores are better.
MODE = "min" or "max", and OBJECTIVES = {"fd_fashion": "min", ...}, may repeat it.
"""

from __future__ import annotations

import json
import math
import runpy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import reduce
from itertools import product
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from ..config import ConfigError, nearest, new_name, not_found, override_all, renamed, resolve, validate
from ..metrics.base import MODES, better
from ..recipe import ASIDE, REPORTING, Recipe
from ..texts import quoted, shown

HOURS = "hours"
CHECKED_DRAWS = 64
DIGITS = 4  # significant digits of a drawn number, so that it is easy to read and type
GRID_LIMIT = 10_000
KEYS, CHOICES = 100, 1000  # most keys of a space and values of a choice; all are checked before anything runs
LARGEST, WHOLE = 1e100, 10**15  # largest bounds of a range and of whole numbers, which a float64 holds exactly
ZERO_GAP = 0.18  # share of an axis between zero and the smallest other value


class Source(Protocol):
    """A source of values, such as an Optuna trial."""

    def suggest_float(self, name: str, low: float, high: float, *, log: bool = False) -> float: ...

    def suggest_int(self, name: str, low: int, high: int) -> int: ...

    def suggest_categorical(self, name: str, choices: Sequence[Any]) -> Any: ...


class Dice:
    """A Source of random values. They are a function of the seeds and of the order of the calls."""

    def __init__(self, *seeds: int):
        self.random = np.random.default_rng(seeds)

    def suggest_float(self, name: str, low: float, high: float, *, log: bool = False) -> float:
        u = float(self.random.random())
        return min(max(low * (high / low) ** u, low), high) if log else low + u * (high - low)

    def suggest_int(self, name: str, low: int, high: int) -> int:
        return int(self.random.integers(low, high, endpoint=True))

    def suggest_categorical(self, name: str, choices: Sequence[Any]) -> Any:
        return choices[int(self.random.integers(len(choices)))]


class Domain(Protocol):
    """The domain of one key's values.

    draw: draws a value. params: the values of the Source that draw `value`. contains: true for a value of the domain.
    edges: the values that a check must try. points: the values of a grid, [] if the domain has none. axis_position:
    position of a value on an axis from 0 to 1. marks: the values written on that axis. span: the domain as a text.
    """

    def draw(self, key: str, source: Source) -> Any: ...

    def params(self, key: str, value: Any) -> dict[str, Any]: ...

    def contains(self, value: Any) -> bool: ...

    def edges(self) -> list[Any]: ...

    def points(self) -> list[Any]: ...

    def axis_position(self, value: Any) -> float: ...

    def marks(self) -> list[Any]: ...

    def span(self) -> str: ...


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


@dataclass(frozen=True)
class Choice:
    """One of several values. Ascending numbers count as ordered: 2 lies between 1 and 5."""

    values: tuple[Any, ...]

    @property
    def ordered(self) -> bool:
        return all(map(_number, self.values)) and list(self.values) == sorted(set(self.values))

    def draw(self, key: str, source: Source) -> Any:
        last = len(self.values) - 1
        if self.ordered:
            return self.values[source.suggest_int(key, 0, last)]
        return self.values[source.suggest_categorical(key, list(range(last + 1)))]

    def params(self, key: str, value: Any) -> dict[str, Any]:
        return {key: self.values.index(value)}

    def contains(self, value: Any) -> bool:
        return value in self.values

    def edges(self) -> list[Any]:
        return list(self.values)

    def axis_position(self, value: Any) -> float:
        return self.values.index(value) / max(len(self.values) - 1, 1)

    points = marks = edges

    def span(self) -> str:
        return ", ".join(map(shown, self.values))


@dataclass(frozen=True)
class Range:
    """Real numbers from low to high, both included. log: draw the logarithm uniformly. steps: points of a grid."""

    low: float
    high: float
    log: bool = False
    steps: int | None = None

    def draw(self, key: str, source: Source) -> float:
        value = source.suggest_float(key, self.low, self.high, log=self.log)
        return min(max(float(f"{value:.{DIGITS}g}"), self.low), self.high)

    def params(self, key: str, value: float) -> dict[str, Any]:
        return {key: float(value)}

    def contains(self, value: Any) -> bool:
        return _number(value) and self.low <= value <= self.high

    def edges(self) -> list[float]:
        return [self.low, self.high]

    def points(self) -> list[float]:
        if self.steps is None:
            return []
        space = np.geomspace if self.log else np.linspace
        inner = [float(f"{x:.6g}") for x in space(self.low, self.high, self.steps)[1:-1]]
        return [self.low, *inner, self.high]

    def axis_position(self, value: float) -> float:
        low, high, value = (math.log(x) if self.log else x for x in (self.low, self.high, value))
        return (value - low) / (high - low)

    def marks(self) -> list[float]:
        if self.steps is not None and self.steps <= 6:
            return self.points()
        if not self.log:
            return [float(f"{x:.6g}") for x in np.linspace(self.low, self.high, 5)]
        decades = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
        inner = [10.0**n for n in decades if self.low < 10.0**n < self.high]
        clear = [x for x in inner if 0.12 < self.axis_position(x) < 0.88]
        return [self.low, *clear, self.high]

    def span(self) -> str:
        return f"{self.low:g} to {self.high:g}{', logarithmic' if self.log else ''}"


@dataclass(frozen=True)
class Integers:
    """Whole numbers from low to high, both included."""

    low: int
    high: int

    def draw(self, key: str, source: Source) -> int:
        return source.suggest_int(key, self.low, self.high)

    def params(self, key: str, value: int) -> dict[str, Any]:
        return {key: value}

    def contains(self, value: Any) -> bool:
        return _number(value) and value == int(value) and self.low <= value <= self.high

    def edges(self) -> list[int]:
        return [self.low, self.high]

    def points(self) -> list[int]:
        if (size := self.high - self.low + 1) > GRID_LIMIT:
            raise ConfigError(f"SPACE: integers({self.low}, {self.high}): {size:,} points of a grid; use choice(...)")
        return list(range(self.low, self.high + 1))

    def axis_position(self, value: int) -> float:
        return (value - self.low) / (self.high - self.low)

    def marks(self) -> list[int]:
        return sorted({round(x) for x in np.linspace(self.low, self.high, min(5, self.high - self.low + 1))})

    def span(self) -> str:
        return f"{self.low} to {self.high}, whole"


@dataclass(frozen=True)
class ZeroOr:
    """Zero, which switches a feature off, or a value of another domain."""

    domain: Domain

    def draw(self, key: str, source: Source) -> Any:
        return self.domain.draw(key, source) if source.suggest_categorical(f"{key} on", [False, True]) else 0

    def params(self, key: str, value: Any) -> dict[str, Any]:
        return {f"{key} on": True} | self.domain.params(key, value) if value else {f"{key} on": False}

    def contains(self, value: Any) -> bool:
        return value == 0 or self.domain.contains(value)

    def edges(self) -> list[Any]:
        return [0, *self.domain.edges()]

    def points(self) -> list[Any]:
        return [0, *self.domain.points()] if self.domain.points() else []

    def axis_position(self, value: Any) -> float:
        return ZERO_GAP + (1 - ZERO_GAP) * self.domain.axis_position(value) if value else 0.0

    def marks(self) -> list[Any]:
        return [0, *self.domain.marks()]

    def span(self) -> str:
        return f"0, or {self.domain.span()}"


@dataclass(frozen=True)
class Conditional:
    """A domain that applies only if the value of `key` is not zero. `key` must precede it in the space."""

    key: str
    domain: Domain

    def __getattr__(self, name: str) -> Any:
        return getattr(self.domain, name)

    def span(self) -> str:
        return f"{self.domain.span()}, where {self.key} is not 0"


def choice(*values: Any) -> Choice:
    """Makes a domain of the listed values. Raises ConfigError for none, too many, a repeated or a non-JSON value."""
    if not 0 < len(values) <= CHOICES:
        what = f"{len(values):,}" if values else "no"
        raise ConfigError(f"choice: {what} values; give one to {CHOICES:,}, such as choice(1, 2, 5)")
    values = tuple(list(v) if isinstance(v, tuple) else v for v in values)
    for value in values:
        try:
            json.dumps(value, allow_nan=False)
        except (TypeError, ValueError, RecursionError):
            text = "give numbers, texts, or lists and mappings of them"
            raise ConfigError(f"choice: {quoted(value)} is not a value; {text}") from None
    if twice := [v for i, v in enumerate(values) if v in values[:i]]:
        raise ConfigError(f"choice: {quoted(twice[0])} is given twice")
    return Choice(values)


def uniform(low: float, high: float, points: int | None = None) -> Range:
    """Real numbers, uniform. points: number of points of a grid."""
    return _range("uniform", low, high, False, points)


def loguniform(low: float, high: float, points: int | None = None) -> Range:
    """Positive numbers, uniform in their logarithm. points: number of points of a grid."""
    return _range("loguniform", low, high, True, points)


def _range(name: str, low: float, high: float, log: bool, points: int | None) -> Range:
    if not (_number(low) and _number(high) and -LARGEST <= low < high <= LARGEST):
        text = f"give two numbers, the lower one first, between -{LARGEST:g} and {LARGEST:g}"
        raise ConfigError(f"{name}({quoted(low)}, {quoted(high)}): {text}")
    if log and low <= 0:
        raise ConfigError(f"{name}({low!r}, {high!r}): logarithms need a lower bound above 0; zero_or(...) adds zero")
    if points is not None and not (_is_whole(points) and 2 <= points <= GRID_LIMIT):
        raise ConfigError(f"{name}: points={quoted(points)}: a grid has at least both ends, and {GRID_LIMIT} at most")
    return Range(float(low), float(high), log, points)


def integers(low: int, high: int) -> Integers:
    """Whole numbers from low to high, both included."""
    if not (_is_whole(low) and _is_whole(high) and -WHOLE <= low < high <= WHOLE):
        text = "give two whole numbers of at most 15 digits, the lower one first"
        raise ConfigError(f"integers({quoted(low)}, {quoted(high)}): {text}")
    return Integers(low, high)


def zero_or(domain: Range | Integers) -> ZeroOr:
    """Adds zero to a domain of numbers, such as "no GAN" to a range of weights."""
    if not isinstance(domain, (Range, Integers)):
        raise ConfigError(f"zero_or({quoted(domain)}): give a domain of numbers, such as loguniform(1e-3, 1e-2)")
    return ZeroOr(domain)


def given(key: str, domain: Domain) -> Conditional:
    """Restricts a domain to settings in which `key` is not zero. In others the recipe's own value stays."""
    if not isinstance(key, str) or not isinstance(domain, (Choice, Range, Integers, ZeroOr)):
        raise ConfigError(f"given({quoted(key)}, {quoted(domain)}): give a key of the space and a domain")
    return Conditional(key, domain)


@dataclass(frozen=True)
class Space:
    """The search space of a sweep: domains by dotted key, metric and objectives.

    objectives: {metric: "min" or "max"}. why: {dotted key: reason of its bounds}.
    """

    name: str
    question: str
    domains: dict[str, Any]
    metric: str
    mode: str
    objectives: dict[str, str]
    why: dict[str, str] = field(default_factory=dict)

    def plain(self) -> dict[str, str]:
        """Returns domains, metric, mode and objectives as texts. Spaces with equal texts are the same."""
        domains = {key: repr(domain) for key, domain in self.domains.items()}
        return domains | {"METRIC": f"{self.metric} {self.mode}", "OBJECTIVES": repr(self.objectives)}

    def draw(self, source: Source) -> dict[str, Any]:
        """Draws one setting: {dotted key: value} of the keys that apply."""
        values: dict[str, Any] = {}
        for key, domain in self.domains.items():
            if self._applies(domain, values):
                values[key] = domain.draw(key, source)
        return values

    def params(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """Returns the values of a Source that draw `values`."""
        return {name: v for key, value in values.items() for name, v in self.domains[key].params(key, value).items()}

    def contains(self, values: Mapping[str, Any]) -> bool:
        """True if the space can draw exactly these values."""
        applicable = [key for key, domain in self.domains.items() if self._applies(domain, values)]
        return set(applicable) == set(values) and all(self.domains[key].contains(values[key]) for key in applicable)

    def grid(self) -> list[dict[str, Any]]:
        """All combinations of the domains' points, the last key fastest. Raises ConfigError for none or too many."""
        return list(self._combinations(lambda domain: domain.points()))

    def corners(self) -> list[dict[str, Any]]:
        """Returns the combinations of the first and the last point of each key."""
        return list(self._combinations(lambda domain: (p := domain.points()) and [p[0], p[-1]]))

    def _combinations(self, values_of: Callable[[Any], list[Any]]) -> Iterator[dict[str, Any]]:
        columns = {key: values_of(domain) for key, domain in self.domains.items()}
        if wrong := [key for key, column in columns.items() if not column]:
            way_out = "search=grid needs the points of a range; give points=5, or choice(...)"
            raise ConfigError("\n".join(f"SPACE[{key!r}]: {way_out}" for key in wrong))
        if (size := math.prod(map(len, columns.values()))) > GRID_LIMIT:
            raise ConfigError(f"SPACE: a grid of {size} points; give fewer points, or search=tpe")
        seen = []
        for row in product(*columns.values()):
            values: dict[str, Any] = {}
            for key, value in zip(columns, row, strict=True):
                if self._applies(self.domains[key], values):
                    values[key] = value
            if values not in seen:
                seen.append(values)
                yield values

    @staticmethod
    def _applies(domain: Domain | Conditional, values: Mapping[str, Any]) -> bool:
        return not isinstance(domain, Conditional) or bool(values.get(domain.key))


def find_space(ref: str, folder: Path) -> Path:
    """Finds a space's file by its stem in `folder` or by a path. Raises ConfigError that lists the known names."""
    if ref.endswith(".py"):
        path = resolve(ref)
        if path.is_file():
            return path
        raise ConfigError(f"space: no file {ref!r}")
    names = sorted(p.stem for p in folder.glob("*.py"))
    if ref in names:
        return folder / f"{ref}.py"
    raise not_found("space", ref, names, ".py")


def load_space(ref: str, folder: Path) -> Space:
    """Runs a space's file and reads its names. Raises ConfigError for each missing or wrong one."""
    path = find_space(ref, folder)
    try:
        names = runpy.run_path(str(path))
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    except (Exception, SystemExit) as error:
        raise ConfigError(f"{path}: cannot be run: {type(error).__name__}: {error}") from error
    wrong: list[str] = []
    domains = _domains(names.get("SPACE"), wrong)
    metric, mode = names.get("METRIC"), names.get("MODE")
    if not isinstance(metric, str):
        wrong.append("METRIC: missing; name the score that decides, such as fd_fashion")
    else:
        mode = _mode(metric, mode, "MODE", wrong)
    objectives = names.get("OBJECTIVES", {str(metric): mode})
    if isinstance(objectives, list) and all(isinstance(name, str) for name in objectives):
        objectives = dict.fromkeys(objectives)
    if not isinstance(objectives, dict) or not objectives or not all(isinstance(name, str) for name in objectives):
        wrong.append(f"OBJECTIVES: expected a list of metrics, got {quoted(objectives)}")
    elif "OBJECTIVES" in names:
        objectives = {name: _mode(name, given, f"OBJECTIVES[{name!r}]", wrong) for name, given in objectives.items()}
    why = names.get("WHY", {})
    if not isinstance(why, dict) or not all(isinstance(text, str) for text in (*why, *why.values())):
        wrong.append(f"WHY: expected {{dotted key: reason}}, got {quoted(why)}")
    else:
        why = {new_name(key): text for key, text in why.items()}
        wrong += [f"WHY[{key!r}]: not in SPACE; {nearest(key, list(domains))}" for key in why if key not in domains]
    if wrong:
        raise ConfigError("\n".join(f"{path}: {line}" for line in wrong))
    question = " ".join(str(names.get("__doc__") or path.stem).split())
    return Space(path.stem, question, domains, metric, mode, objectives, why)


def _domains(given: Any, wrong: list[str]) -> dict[str, Any]:
    """Returns the domains of a file's SPACE by the present names of their keys. Adds mistakes to `wrong`."""
    if not isinstance(given, dict) or not 0 < len(given) <= KEYS:
        what = "missing" if given is None else "empty" if given == {} else f"got {quoted(given)}"
        wrong.append(f"SPACE: {what}; give one to {KEYS} dotted recipe keys with a domain each")
        return {}
    if odd := [key for key in given if not isinstance(key, str)]:
        wrong.append(f"SPACE[{quoted(odd[0])}]: a key is the text of a recipe key, such as 'train.batch'")
        return {}
    domains: dict[str, Any] = {}
    for key, domain in renamed(given).items():
        if not isinstance(domain, (Choice, Range, Integers, ZeroOr, Conditional)):
            text = f"{quoted(domain)} is not a domain; use choice, uniform, loguniform or integers"
            wrong.append(f"SPACE[{key!r}]: {text}")
        elif isinstance(domain, Conditional):
            domain = replace(domain, key=new_name(domain.key))
            if domain.key not in domains:
                wrong.append(f"SPACE[{key!r}]: given {domain.key!r}, which must come before it in SPACE")
        domains[key] = domain
    return domains


def _mode(metric: str, given: Any, where: str, wrong: list[str]) -> Any:
    """Returns "min" or "max": the metric's own direction. `given` may repeat it but not reverse it."""
    direction = "lower" if metric == HOURS else better(metric)
    if given is None and direction is not None:
        return MODES[direction]
    if given not in MODES.values():
        wrong.append(f"{where}: {given!r} is not one of {', '.join(MODES.values())}")
    elif direction is not None and given != MODES[direction]:
        wrong.append(f"{where}: {given!r}, but a {direction} {metric} is better; leave it out")
    return given


def apply(recipe: Recipe, values: Mapping[str, Any], **more: Any) -> Recipe:
    """Returns the recipe with the dotted values set, and then the top-level fields `more`. Raises ConfigError."""
    return validate(Recipe, override_all(recipe.model_dump(mode="json"), values) | more)


def values_of(recipe: Recipe, keys: Iterable[str]) -> dict[str, Any]:
    """Returns {dotted key: the recipe's value}."""
    data = recipe.model_dump(mode="json")
    return {key: reduce(lambda inner, part: inner[part], key.split("."), data) for key in keys}


def check_space(space: Space, recipe: Recipe, objectives: Sequence[str]) -> None:
    """Validates a space against a recipe before anything runs. Raises ConfigError with every mistake and its key.

    Keys that do not change a run's numbers are refused. Each edge of each key is tried alone, then 64 random settings.
    objectives: the metrics that the sweep optimises.
    """
    wrong = []
    for key, domain in space.domains.items():
        head, *rest = key.split(".")
        if head in ASIDE or (head == "train" and rest and rest[0] in REPORTING):
            wrong.append(f"SPACE[{key!r}]: does not change the numbers of a run, so there is nothing to search")
        elif head == "seed":
            wrong.append("SPACE['seed']: a seed is not a setting; seeds=3 repeats the best trials with other seeds")
        else:
            wrong += _mistakes(recipe, [{key: value} for value in domain.edges()], f"SPACE[{key!r}]")
    if not wrong:
        wrong += _mistakes(recipe, [space.draw(Dice(0, n)) for n in range(CHECKED_DRAWS)], "SPACE")
    scored = [*recipe.evaluate.metrics, HOURS]
    for name in objectives:
        if name not in scored:
            wrong.append(
                f"METRIC: {name!r} is not scored by this recipe; evaluate.metrics scores "
                f"{', '.join(recipe.evaluate.metrics) or 'nothing'}; {nearest(name, recipe.evaluate.metrics)}"
            )
    if wrong:
        raise ConfigError("\n".join(wrong))


def _mistakes(recipe: Recipe, settings: list[dict[str, Any]], where: str) -> list[str]:
    """Returns the mistakes of the settings, each once."""
    mistakes: dict[str, None] = {}
    for values in settings:
        try:
            apply(recipe, values)
        except ConfigError as error:
            mistakes |= dict.fromkeys(f"{where}: {line}" for line in str(error).splitlines())
    return list(mistakes)
