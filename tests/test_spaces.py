"""Search spaces, proposals, the record of trials and the verdict: everything of a sweep that needs no cluster."""

from __future__ import annotations

import math
import re
from itertools import combinations
from pathlib import Path

import pytest

from fewstep.config import ConfigError, validate
from fewstep.recipe import Recipe, load_recipe
from fewstep.sweeps.answer import at_the_edge, label, short_names
from fewstep.sweeps.judge import front, importance, judge, settings
from fewstep.sweeps.proposals import SEARCHES, proposals
from fewstep.sweeps.record import FAILED, FINISHED, SEARCH, SEEDS, STOPPED, Record, Trial
from fewstep.sweeps.report import markdown
from fewstep.sweeps.settings import Budget, Sweep, check, images_of
from fewstep.sweeps.space import Dice, Space, apply, choice, given, integers, load_space, loguniform, uniform, zero_or

ROOT = Path(__file__).resolve().parents[1]
SPACES = ROOT / "tune_spaces"
TTUR, GAN, HEAD = "method.critic_updates_per_student_update", "method.gan_weight", "method.critic_gan_weight"


@pytest.fixture(scope="module")
def recipe() -> Recipe:
    return load_recipe(["evaluate.every_images=1600"], ROOT / "jobs" / "recipes", "fashion_mnist")


def space(domains: dict, metric: str = "fd_fashion", mode: str = "min", **objectives: str) -> Space:
    return Space("mine", "?", domains, metric, mode, objectives or {metric: mode})


TWO = {TTUR: choice(1, 2, 5, 10), GAN: zero_or(loguniform(1e-3, 3e-2, points=3)), HEAD: given(GAN, uniform(0.01, 0.02))}


# Spaces


@pytest.mark.parametrize("path", sorted(SPACES.glob("*.py")), ids=lambda p: p.stem)
def test_a_shipped_space_fits_its_recipe_and_says_why(path, recipe):
    result = load_space(path.stem, SPACES)
    check(Sweep(space=path.stem), result, recipe)
    assert set(result.why) == set(result.domains)
    drawn = [result.draw(Dice(0, n)) for n in range(5)]
    assert all(map(result.contains, drawn))
    assert all(apply(recipe, values).fingerprint != recipe.fingerprint for values in drawn)


def test_what_does_not_apply_is_not_asked():
    result = [space(TWO).draw(Dice(0, n)) for n in range(50)]
    assert {values[GAN] == 0 for values in result} == {True, False}
    assert all((HEAD in values) == (values[GAN] != 0) for values in result)
    grid = space(TWO | {HEAD: given(GAN, choice(0.01, 0.02))}).grid()
    assert len(grid) == 4 * (1 + 3 * 2)
    assert {values[GAN] for values in grid} == {0, 1e-3, 0.00547723, 3e-2}


def test_parameters_draw_the_values_they_came_from():
    class Params(dict):
        def suggest_float(self, name, low, high, log=False):
            return self[name]

        suggest_int = suggest_categorical = lambda self, name, *_: self[name]

    mixed = space(TWO | {"x": choice("a", "b", [1, 2]), "n": integers(2, 9)})
    for n in range(20):
        values = mixed.draw(Dice(1, n))
        assert mixed.draw(Params(mixed.params(values))) == values


def test_positions_run_from_zero_to_one():
    for domain in (
        choice(1, 2, 5),
        uniform(1, 4),
        loguniform(1e-4, 1e-1),
        integers(2, 9),
        zero_or(loguniform(1e-3, 1)),
    ):
        marks = domain.marks()
        assert domain.axis_position(marks[0]) == 0 and domain.axis_position(marks[-1]) == pytest.approx(1)
        places = [domain.axis_position(mark) for mark in marks]
        assert places == sorted(places)
    assert loguniform(1e-4, 1).axis_position(1e-2) == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("domains", "text"),
    [
        (
            {"method.gan_wieght": choice(0, 1)},
            r"SPACE\['method.gan_wieght'\]: .*no such key; did you mean 'gan_weight'",
        ),
        ({GAN: uniform(-1, 1)}, r"SPACE\['method.gan_weight'\]: .* must be at least 0, got -1.0"),
        ({TTUR: choice(1, 2.5)}, r"SPACE\['method.critic_updates.*: expected a whole number, got 2.5"),
        ({"seed": choice(0, 1)}, r"SPACE\['seed'\]: a seed is not a setting; seeds=3"),
        ({"train.report_every": choice(1, 2)}, r"SPACE\['train.report_every'\]: does not change the numbers of a run"),
        ({"cluster.workers": choice(1, 2)}, r"SPACE\['cluster.workers'\]: does not change the numbers of a run"),
        ({"method.name": choice("dmd2", "dmd22")}, r"SPACE\['method.name'\]: .*'dmd22' is not one of"),
    ],
)
def test_a_space_that_does_not_fit_is_refused_by_its_key(domains, text, recipe):
    with pytest.raises(ConfigError, match=text):
        check(Sweep(space="mine"), space(domains), recipe)


def test_a_metric_that_no_report_carries_is_refused(recipe):
    with pytest.raises(
        ConfigError, match=r"METRIC: 'fd_fasion' is not scored by this recipe.* did you mean 'fd_fashion'\?"
    ):
        check(Sweep(space="mine"), space({TTUR: choice(1)}, "fd_fasion"), recipe)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("SPACE = {}\nMETRIC, MODE = 'fd_fashion', 'min'", "SPACE: empty; give one to 100 dotted recipe keys"),
        ("METRIC, MODE = 'fd_fashion', 'min'", "SPACE: missing"),
        ("SPACE = {'seed': 3}\nMETRIC, MODE = 'fd_fashion', 'least'", "MODE: 'least' is not one of min, max"),
        ("SPACE = {'a.b': [1, 2]}\nMETRIC, MODE = 'x', 'min'", r"SPACE\['a.b'\]: \[1, 2\] is not a domain"),
        ("1 / 0", "cannot be run: ZeroDivisionError"),
        ("from fewstep.sweeps.space import *\nSPACE = {'a': loguniform(0, 1)}", r"loguniform\(0, 1\): logarithms need"),
        (
            "from fewstep.sweeps.space import *\nSPACE = {'a': given('b', choice(1))}",
            r"SPACE\['a'\]: given 'b', which must come before it",
        ),
    ],
)
def test_a_file_that_is_no_space_says_what_is_missing(text, message, tmp_path):
    (tmp_path / "mine.py").write_text(text)
    with pytest.raises(ConfigError, match=f"mine.py: {message}"):
        load_space(str(tmp_path / "mine.py"), SPACES)


IMPORTS = "from fewstep.sweeps.space import *\nMETRIC = 'fd_fashion'\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("SPACE = {1: choice(1)}", r"SPACE\[1\]: a key is the text of a recipe key"),
        ("SPACE = [1]", r"SPACE: got \[1\]; give one to 100 dotted recipe keys"),
        ("SPACE = {'a': choice()}", "choice: no values"),
        ("SPACE = {'a': choice(1, 2, 1)}", "choice: 1 is given twice"),
        ("SPACE = {'a': choice({1, 2})}", r"choice: \{1, 2\} is not a value; give numbers, texts, or lists"),
        ("SPACE = {'a': choice(float('nan'))}", "choice: nan is not a value; give numbers"),
        ("SPACE = {'a': choice(*range(2000))}", "choice: 2,000 values; give one to 1,000"),
        ("SPACE = {'a': uniform(1, 2, points=10**9)}", "uniform: points=1000000000: a grid has at least both ends"),
        (
            "SPACE = {'a': uniform(0, 10.0**300)}",
            r"uniform\(0, 1e\+300\): give two numbers, the lower one first, between",
        ),
        ("SPACE = {'a': integers(0, 10**30)}", r"integers\(0, 10+\): give two whole numbers of at most 15 digits"),
        ("SPACE = {'a': zero_or(3)}", r"zero_or\(3\): give a domain of numbers"),
        ("SPACE = {'a': given(1, choice(1))}", r"given\(1, Choice.*: give a key of the space and a domain"),
        ("SPACE = {'a': choice(1)}\nWHY = 3", "WHY: expected {dotted key: reason}, got 3"),
        ("SPACE = {'a': choice(1)}\nOBJECTIVES = [[1]]", r"OBJECTIVES: expected a list of metrics, got \[\[1\]\]"),
        ("raise SystemExit('bye')", "cannot be run: SystemExit: bye"),
        ("import nowhere", "cannot be run: ModuleNotFoundError"),
    ],
)
def test_a_domain_that_cannot_be_searched_is_refused(text, message, tmp_path):
    (tmp_path / "mine.py").write_text(IMPORTS + text)
    with pytest.raises(ConfigError, match=f"mine.py: {message}"):
        load_space(str(tmp_path / "mine.py"), SPACES)


def test_a_space_that_is_not_there_is_named_with_its_neighbours():
    with pytest.raises(ConfigError, match="no space 'tur'; did you mean 'ttur'"):
        load_space("tur", SPACES)


# What is asked of a sweep


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"search": "grid", "trials": 3}, "trials: a grid has one trial for each point"),
        ({"search": "random", "warm_start": "x"}, "warm_start: search=random does not learn from trials"),
        ({"budget": "3 days"}, "budget: '3 days' is not an amount; write 200000images or 1.5hours"),
        ({"search": "pareto", "scheduler": "asha"}, "scheduler: asha needs a single score"),
        ({"scheduler": "pbt", "search": "tpe"}, "use search=random"),
        ({"paralel": 3}, "paralel: no such key"),
    ],
)
def test_what_cannot_be_asked_is_refused(settings, text):
    with pytest.raises(ConfigError, match=text):
        validate(Sweep, {"space": "ttur"} | settings)


def test_budgets_are_amounts_of_images_or_hours():
    assert Budget.parse("2e5images") == Budget(2e5, "images")
    assert Budget.parse("1.5 hours") == Budget(1.5, "hours")


def test_early_stopping_needs_scores_on_the_way(recipe):
    domains = {TTUR: choice(1, 2)}
    for every, text in (
        (None, "needs scores during training"),
        (1000, "is not a multiple of report_every x batch"),
    ):
        bare = apply(recipe, {"evaluate.every_images": every})
        with pytest.raises(ConfigError, match=text):
            check(Sweep(space="mine", scheduler="asha"), space(domains), bare)


def test_a_population_changes_rates_and_weights_only(recipe):
    asked = Sweep(space="mine", search="random", scheduler="pbt", trials=2)
    with pytest.raises(ConfigError, match="pbt changes learning rates and weights only"):
        check(asked, space({TTUR: choice(1, 2)}), recipe)
    with pytest.raises(ConfigError, match="zero adds or removes networks"):
        check(asked, space({GAN: zero_or(loguniform(1e-3, 1e-2))}), recipe)
    check(asked, space({GAN: loguniform(1e-3, 1e-2), "optim.student.lr": loguniform(1e-5, 1e-4)}), recipe)


# Proposals


def bowl(values: dict) -> float:
    """Least at TTUR 5 with a GAN weight of 3e-3."""
    gan = abs(math.log10(values[GAN] / 3e-3)) if values[GAN] else 1.0
    return abs([1, 2, 5, 10].index(values[TTUR]) - 2) + gan


def tried(search: str, result: Space, count: int, seed: int = 0) -> list[tuple[dict, float]]:
    """The settings that a search tries, each told before the next."""
    source, out = proposals(result, search, seed), []
    for n in range(count):
        values = source.propose(n)
        if values is None:
            break
        out.append((values, bowl(values)))
        source.tell(n, [bowl(values)] * len(source.study.directions) if hasattr(source, "study") else [bowl(values)])
    return out


def test_a_grid_is_all_combinations_and_random_is_a_function_of_seed_and_number():
    result = space({TTUR: choice(1, 2, 5, 10), GAN: choice(0, 1e-3)})
    assert len(tried("grid", result, 99)) == 8
    assert tried("random", result, 6) == tried("random", result, 6) != tried("random", result, 6, seed=1)
    every = tried("random", result, 99)
    assert len(every) == 8  # none twice, and all of a small space
    late = proposals(result, "random", 0)
    assert late.propose(5) == every[5][0]  # whoever starts in the middle goes on in the same sequence


@pytest.mark.parametrize("search", ["tpe", "gp"])
def test_what_is_learned_beats_what_is_drawn(search):
    result = space({TTUR: choice(1, 2, 5, 10), GAN: loguniform(1e-4, 1)})
    best = lambda search: min(score for _, score in tried(search, result, 20)[8:])
    assert best(search) < best("random")


def test_a_search_that_gets_its_results_again_goes_on_alike():
    result = space({TTUR: choice(1, 2, 5, 10), GAN: zero_or(loguniform(1e-3, 3e-2))})
    history = tried("tpe", result, 10)
    again = proposals(result, "tpe", 0)
    for n, (values, score) in enumerate(history):
        again.adopt(n, values)
        again.tell(n, [score])
    first = proposals(result, "tpe", 0)
    for n, (_, score) in enumerate(history):
        first.propose(n)
        first.tell(n, [score])
    assert again.propose(10) == first.propose(10)


@pytest.mark.parametrize(("trials", "startup"), [(None, 8), (8, 3), (20, 5), (100, 8)])
def test_a_quarter_of_a_search_is_drawn_before_it_learns(trials, startup):
    """Its proposals depend on the results from then on, and not before."""
    result = space({TTUR: integers(1, 10), GAN: loguniform(1e-4, 1)})

    def proposed(sign: int) -> list[dict]:
        source, out = proposals(result, "tpe", 0, trials), []
        for n in range(startup + 4):
            out.append(source.propose(n))
            source.tell(n, [sign * bowl({TTUR: 5} | {GAN: out[-1][GAN]})])
        return out

    one, other = proposed(1), proposed(-1)
    assert one[:startup] == other[:startup] and one[startup:] != other[startup:]


def test_the_room_of_a_search_is_its_smallest_bound(recipe):
    whole = images_of(recipe)
    assert Sweep(space="s", search="grid").room(recipe) is None
    assert Sweep(space="s").room(recipe) == 20
    assert Sweep(space="s", budget=f"{8 * whole + 1}images").room(recipe) == 8
    assert Sweep(space="s", budget=f"{8 * whole}images", trials=5).room(recipe) == 5
    assert Sweep(space="s", budget="2hours").room(recipe) is None


def test_a_failed_trial_teaches_nothing_and_stops_nothing():
    source = proposals(space(TWO), "tpe", 0)
    for n in range(12):
        assert source.propose(n) is not None
        source.tell(n, None if n % 2 else [float(n)])
    with pytest.raises(KeyError):
        source.tell(3, [1.0])


def test_searches_are_those_a_sweep_may_name():
    assert set(SEARCHES) == set(Sweep.model_fields["search"].annotation.__args__)


# The record


def test_a_record_is_read_back_as_it_was_written(tmp_path):
    record = Record(tmp_path, {"space": "ttur"})
    record.add("trial", 0, values={TTUR: 5}, seed=0, phase=SEARCH, run="s-000")
    record.add("score", 0, images=32, step=4, scores={"fd_fashion": 3.0}, spent=32, hours=0.1)
    record.add("end", 0, state=FINISHED, reason=None, run_id="abc", spent=64, hours=0.2)
    record.add("trial", 1, values={TTUR: 1}, seed=0, phase=SEARCH, run="s-001")
    with open(record.path, "a") as file:
        file.write('{"event": "sco')  # the process died here
    again = Record(tmp_path, {"space": "ttur"})
    assert again.trials == record.trials
    assert [t.number for t in again.ended()] == [0] and [t.number for t in again.open()] == [1]
    assert again.trials[0].last == {"fd_fashion": 3.0, "hours": 0.2}
    assert again.path.read_text().endswith("\n")


def test_a_sweep_goes_on_with_what_it_was_begun_with(tmp_path):
    Record(tmp_path, {"space": "ttur", "trials": 3})
    Record(tmp_path, {"space": "ttur", "trials": 9}, {"trials"})
    with pytest.raises(ConfigError, match="space: 'dmd2', but sweep .* began with 'ttur'; give the same arguments"):
        Record(tmp_path, {"space": "dmd2", "trials": 9}, {"trials"})


# The verdict


def trial(number: int, values: dict, score: float, seed: int = 0, state: str = FINISHED, **more: float) -> Trial:
    scores = [{"images": 8, "step": 1, "scores": {"fd": score, **more}}]
    return Trial(number, values, seed, SEARCH if seed == 0 else SEEDS, f"s-{number}", 0.0, scores, state)


def name(values: dict) -> str:
    return label(values, {"a": "a", "b": "b"})


def test_one_seed_names_no_winner():
    verdict = judge([trial(0, {"a": 1}, 2.0), trial(1, {"a": 2}, 1.0)], "fd", "min", name)
    assert verdict.best.values == {"a": 2} and not verdict.won
    assert verdict.text == "No winner: a=2 has the best fd, 1, on one seed; another may differ."


@pytest.mark.parametrize(("mode", "sign"), [("min", 1), ("max", -1)])
def test_the_spread_of_seeds_decides(mode, sign):
    near = [trial(0, {"a": 1}, sign * 1.0), trial(1, {"a": 2}, sign * 1.1), trial(2, {"a": 3}, sign * 9.0)]
    near += [trial(3, {"a": 1}, sign * 1.4, 1), trial(4, {"a": 2}, sign * 1.3, 1)]
    verdict = judge(near, "fd", mode, name)  # means 1.2 and 1.2, spreads 0.28 and 0.14
    assert not verdict.won and [s.values for s in verdict.rivals] in ([{"a": 1}], [{"a": 2}])
    assert verdict.text.startswith("No winner:")
    clear = [trial(0, {"a": 1}, sign * 1.0), trial(1, {"a": 2}, sign * 2.0), trial(2, {"a": 1}, sign * 1.2, 1)]
    verdict = judge(clear, "fd", mode, name)
    assert verdict.won and verdict.best.score.std == pytest.approx(math.sqrt(0.02))
    assert verdict.text == f"a=1 wins: fd {sign * 1.1:.4g} ± 0.14 (2 seeds), 0.9 ahead of the next."


def test_a_repeated_corner_is_no_finalist():
    """Corners are repeated to see the spread: a better setting on one seed is not beaten by having been tried once."""
    trials = [trial(0, {"a": 1}, 3.0), trial(1, {"a": 2}, 1.0), trial(2, {"a": 1}, 3.1, 1)]
    verdict = judge(trials, "fd", "min", name)
    assert verdict.best.values == {"a": 2} and not verdict.won


def test_what_did_not_finish_is_not_judged():
    trials = [trial(0, {"a": 1}, 1.0, state=STOPPED), trial(1, {"a": 2}, math.nan), trial(2, {"a": 3}, 5.0)]
    assert [s.values for s in settings(trials, "fd", "min")] == [{"a": 3}]
    assert judge(trials[:2], "fd", "min", name) is None


def test_the_front_is_what_no_other_beats():
    points = [(1, 1), (2, 3), (3, 2), (2, 2), (0, 0)]
    trials = [trial(i, {"a": i}, float(x), d=float(y)) for i, (x, y) in enumerate(points)]
    result = {t.number for t in front(trials, {"fd": "min", "d": "max"})}
    beaten = {
        i
        for i, j in ((i, j) for a, b in combinations(range(5), 2) for i, j in ((a, b), (b, a)))
        if points[j][0] <= points[i][0] and points[j][1] >= points[i][1] and points[i] != points[j]
    }
    assert result == set(range(5)) - beaten == {0, 1, 4}


def test_importance_finds_what_matters():
    result = space({"a": uniform(0, 1), "b": uniform(0, 1)}, "fd")
    dice = [result.draw(Dice(0, n)) for n in range(40)]
    trials = [trial(n, values, 10 * values["a"] + 0.5 * values["b"]) for n, values in enumerate(dice)]
    shares = importance(result, trials, "fd")
    assert shares["a"] > 0.9 and shares["b"] < 0.1
    assert importance(result, trials[:5], "fd") is None


# What is left behind


def test_short_names_are_as_short_as_the_recipe_allows(recipe):
    result = load_space("dmd2", SPACES)
    names = short_names(result, recipe)
    assert names[GAN] == "gan_weight" and names["optim.student.lr"] == "student.lr"
    assert label({GAN: 0.003, "optim.student.lr": 1e-4}, names) == "gan_weight=0.003 student.lr=0.0001"


@pytest.mark.parametrize(
    ("ratio", "lr", "message"),
    [
        (5, 3e-5, ""),
        (1, 3e-5, ""),  # there is no ratio below one
        (10, 3e-5, " a=10 is the largest in this space: better may lie beyond."),
        (10, 1e-5, " a=10 is the largest and lr=1e-05 is the smallest in this space: better may lie beyond."),
    ],
)
def test_an_answer_at_the_edge_of_its_space_says_so(ratio, lr, message):
    result = space(
        {"a": choice(1, 5, 10), "lr": loguniform(1e-5, 1e-4), "b": choice("x", "y"), "c": zero_or(uniform(1, 2))}
    )
    values = {"a": ratio, "lr": lr, "b": "y", "c": 0}
    assert at_the_edge(values, result, {key: key for key in values}) == message


def test_the_table_is_of_the_finished_settings_best_first():
    result = space({"a": choice(1, 2)}, "fd")
    trials = [trial(0, {"a": 1}, 2.0), trial(1, {"a": 2}, 1.0), trial(2, {"a": 2}, 1.5, 1)]
    trials += [trial(3, {"a": 2}, 9.0, 2, STOPPED), trial(4, {"a": 2}, 9.0, 3, FAILED)]
    lines = markdown(result, trials, {"a": "a"}, ["fd"]).splitlines()
    assert lines[2:4] == ["| 2 | **1.25 ± 0.35** | 2 |", "| 1 | 2 | 1 |"]
    assert lines[-1] == "Not in the table: 1 trials stopped early, 1 failed."


def test_the_page_asks_for_nothing_and_escapes_its_texts(tmp_path, recipe):
    """Every plot of a made-up sweep is drawn, and an error's text stays text."""
    from fewstep.sweeps import plots
    from fewstep.sweeps.report import report

    result = space({TTUR: choice(1, 5), GAN: choice(0, 1e-3)}, "fd", d="max", fd="min")
    names = short_names(result, recipe)
    trials = [trial(n, values, 1.0 + n % 3, d=n / 4) for n, values in enumerate(result.grid())]
    trials += [trial(4, result.grid()[0], 9.0, state=STOPPED, d=0.1)]
    lost = trial(5, result.grid()[1], math.nan, state=FAILED)
    lost.reason = "ValueError: <script>alert(1)</script>"
    figures = plots.save(plots.draw(result, trials, names, {TTUR: 0.7, GAN: 0.2}), tmp_path)
    assert set(figures) == {"map", "parallel", "importance", "slices", "pareto"}
    assert sorted(p.name for p in tmp_path.glob("map.*")) == ["map.png", "map.svg"]
    ids = re.findall(r'id="([^"]+)"', "".join(figures.values()))
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'(?:href="#|url\(#)([^")]+)', "".join(figures.values()))) <= set(ids)
    verdict = judge(trials, "fd", "min", lambda values: label(values, names))
    template = ROOT / "dashboards" / "sweep.html"
    text = report(
        template, "a < b", result, [*trials, lost], names, ["fd", "d"], verdict, {"seed": "0"}, "again", figures
    )
    assert "<script" not in text and "&lt;script&gt;alert" in text and "a &lt; b" in text
    assert not re.search(r"\{\{|(?:src|href)=\"(?!#)", text)
