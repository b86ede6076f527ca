"""Messages about mistakes in settings: every line names the dotted key, the value and the way out."""

from __future__ import annotations

from pathlib import Path

import pytest

from fewstep.config import (
    ASSETS,
    ConfigError,
    differences,
    nearest,
    override,
    parse_arguments,
    read,
    resolve,
    resolve_out,
    resolve_out_ref,
    settings,
)
from fewstep.methods import METHODS
from fewstep.recipe import Recipe, load_recipe
from fewstep.sweeps.space import load_space

RECIPES = Path(__file__).parents[1] / "jobs" / "recipes"

DISTIL = """
teacher: shipped:fashion_mnist/teacher
data: {path: "shipped:fashion_mnist/shards"}
method: {name: dmd2, gan_weight: 3e-3}
optim: {student: {lr: 1e-4}, fake: {lr: 4e-4}, disc: {lr: 4e-4}}
train: {steps: 1000, batch: 32}
"""


@pytest.fixture
def folder(tmp_path) -> Path:
    (tmp_path / "distil.yaml").write_text(DISTIL)
    return tmp_path


def mistakes(folder: Path, *argv: str) -> list[str]:
    """The lines a person reads for these arguments."""
    with pytest.raises(ConfigError) as error:
        load_recipe(list(argv), folder, "distil")
    return str(error.value).split("\n")


# Recipes


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda p: p.stem)
def test_every_recipe_loads_and_repeats_itself(path, tmp_path):
    recipe = load_recipe([f"recipe={path.stem}"], RECIPES, "none")
    assert recipe.recipe == path.stem and recipe.name.startswith(path.stem + "-")
    assert path.read_text().startswith("#"), "a recipe's head says what it reproduces"
    again = Recipe.model_validate(recipe.model_dump())  # what is logged with a run builds the same run
    assert again == recipe and again.fingerprint == recipe.fingerprint


def test_overrides_change_what_they_name_and_nothing_else(folder):
    plain = load_recipe(["name=a"], folder, "distil")
    changed = load_recipe(["name=a", "method.gan_weight=1e-2", "optim.fake.betas=[0, 0.99]"], folder, "distil")
    assert (plain.method.gan_weight, changed.method.gan_weight) == (3e-3, 1e-2)
    assert changed.optim["fake"].betas == (0.0, 0.99) and changed.optim["fake"].lr == 4e-4
    back = changed.model_dump() | {"method": plain.model_dump()["method"], "optim": plain.model_dump()["optim"]}
    assert back == plain.model_dump()


def test_a_fingerprint_is_of_what_decides_the_numbers(folder):
    plain = load_recipe([], folder, "distil").fingerprint
    for argument in ("name=b", "out=elsewhere", "train.keep=9", "cluster.workers=2", "evaluate.images=10"):
        assert load_recipe([argument], folder, "distil").fingerprint == plain
    for argument in ("seed=1", "train.batch=64", "optim.fake.lr=1e-5", "method.student_steps=2", "precision=bf16"):
        assert load_recipe([argument], folder, "distil").fingerprint != plain


def test_a_term_is_switched_off_by_its_weight_alone(folder):
    recipe = load_recipe(["method.gan_weight=0"], folder, "distil")
    assert recipe.method.roles == ("fake", "student") and set(recipe.optim) == {"disc", "fake", "student"}


def test_a_recipe_is_found_by_name_or_by_path(folder, monkeypatch):
    monkeypatch.chdir(folder)
    assert load_recipe(["recipe=distil.yaml"], RECIPES, "none").recipe == "distil"
    assert load_recipe([f"recipe={folder / 'distil.yaml'}"], RECIPES, "none").recipe == "distil"
    assert mistakes(folder, "recipe=distill") == [
        "recipe: no recipe 'distill'; did you mean 'distil'? there are distil, or give a .yaml file"
    ]
    assert mistakes(folder, "recipe=other.yaml") == ["recipe: no file 'other.yaml'"]


# Mistakes, one by one


@pytest.mark.parametrize(
    "arguments, lines",
    [
        (["train.stesp=3"], ["train.stesp: no such key; did you mean 'steps'?"]),
        (["tarin.steps=3"], ["tarin: no such key; did you mean 'train'?"]),
        (["method.guidanc=2"], ["method.guidanc: no such key; did you mean 'guidance'?"]),
        (["optim.fake.lrr=1e-4"], ["optim.fake.lrr: no such key; did you mean 'lr'?"]),
        (
            ["train.x=1", "train.keep=0"],
            [
                "train.keep: must be at least 1, got 0",
                "train.x: no such key; valid: accumulate, average_decay, average_std, batch, keep, "
                "keep_best, keep_best_by, keep_best_mode, keep_every_images, report_every, "
                "save_every, steps",
            ],
        ),
        (["seed=x"], ["seed: expected a whole number, got 'x'"]),
        (["train.steps=1.5"], ["train.steps: expected a whole number, got 1.5"]),
        (["optim.fake.lr=fast"], ["optim.fake.lr: expected a number, got 'fast'"]),
        (["data.flip=maybe"], ["data.flip: expected true or false, got 'maybe'"]),
        (
            ["data.path=5"],
            [
                'data.path: expected text, got 5; as text it has quotes: "5" in a file, '
                "data.path='\"5\"' on a command line"
            ],
        ),
        (["data=shards"], ["data: expected fields, such as data.key=value, got 'shards'"]),
        (["optim=1e-4"], ["optim: expected fields, such as optim.key=value, got 0.0001"]),
        (["train=null"], ["train: expected fields, such as train.key=value, got null"]),
        (["evaluate.metrics=fid"], ["evaluate.metrics: expected a list such as [a, b], got 'fid'"]),
        (
            ["evaluate.metrics=[fid, 3]"],
            ['evaluate.metrics.1: expected text, got 3; as text it has quotes: "3" in a file'],
        ),
        (["optim.fake.betas=[0.9]"], ["optim.fake.betas: its value number 2 is missing"]),
        (["optim.fake.betas=[0.9, 1]"], ["optim.fake.betas.1: must be below 1, got 1"]),
        (["optim.fake.betas=[0.9, 0.9, 0.9]"], ["optim.fake.betas: expected 2 values, got 3"]),
        (["method.match_range=[20, 1000]"], ["method.match_range.1: must be below 1000, got 1000"]),
        (["data.max_corrupt=2"], ["data.max_corrupt: must be at most 1, got 2"]),
        (["optim.student.clip=0"], ["optim.student.clip: must be above 0, got 0"]),
        (["method.gan_weight=.inf"], ["method.gan_weight: expected a finite number, got inf"]),
        (["method.gan_weight=.nan"], ["method.gan_weight: expected a finite number, got nan"]),
        (["precision=fp16"], ["precision: 'fp16' is not one of fp32, bf16"]),
        (
            ["cluster.placement=sharded"],
            ["cluster.placement: 'sharded' is not one of replicate, shard, hybrid; did you mean 'shard'?"],
        ),
        (
            ["method.name=dmd22"],
            [f"method.name: 'dmd22' is not one of {', '.join(sorted(METHODS))}; did you mean 'dmd2'?"],
        ),
        (["method={}"], [f"method.name: missing; valid: {', '.join(sorted(METHODS))}"]),
        (["method=dmd2"], ["method: expected fields, such as method.name=value, got 'dmd2'"]),
        (
            ["method.name=f_distill", "method.divergence=jss"],
            [
                "method.divergence: 'jss' is not one of reverse_kl, softened_reverse_kl, js, hellinger, kl, jeffreys, "
                "neyman; did you mean 'js'?"
            ],
        ),
        (["optim.fak.lr=1e-4"], ["optim.fak: no such role; dmd2 trains disc, fake, student; did you mean 'fake'?"]),
        (["optim={student: {lr: 1e-4}, disc: {lr: 1e-4}}"], ["optim.fake: missing; dmd2 trains it"]),
        (["start.critic=runs/a"], ["start.critic: no such role; dmd2 trains disc, fake, student"]),
        (["cluster.workers=3"], ["train.batch: 32 is not a multiple of workers x accumulate = 3"]),
        (["train.save_every=75"], ["train.save_every: 75 is not a multiple of report_every 50"]),
        (["teacher=null"], ["teacher: give either a teacher to distil or a network to train, and not both"]),
        (
            ["seed.x=1", "teacher.x=1"],
            ["teacher.x: teacher is 'shipped:fashion_mnist/teacher', which has no fields to set"],
        ),
        (["train.steps.x.y=1"], ["train.steps.x.y: train.steps is 1000, which has no fields to set"]),
    ],
    ids=lambda v: " ".join(v)[:40] if "=" in v[0] else "",
)
def test_a_mistake_is_reported_as_a_line(folder, arguments, lines):
    assert mistakes(folder, *arguments) == lines


def test_all_mistakes_are_reported_at_once(folder):
    argv = ["seed=x", "train.stesp=3", "data.max_corrupt=2", "method.guidanc=2", "cluster.device=gpu"]
    assert mistakes(folder, *argv) == [
        "seed: expected a whole number, got 'x'",
        "data.max_corrupt: must be at most 1, got 2",
        "method.guidanc: no such key; did you mean 'guidance'?",
        "train.stesp: no such key; did you mean 'steps'?",
        "cluster.device: 'gpu' is not one of cpu, cuda",
    ]
    assert mistakes(folder, "optim.fak.lr=1e-4", "start.fak=a", "cluster.workers=3") == [
        "optim.fak: no such role; dmd2 trains disc, fake, student; did you mean 'fake'?",
        "start.fak: no such role; dmd2 trains disc, fake, student",
        "train.batch: 32 is not a multiple of workers x accumulate = 3",
    ]


def test_all_malformed_words_are_reported_at_once():
    with pytest.raises(ConfigError) as error:
        parse_arguments(["steps", "--dryrun", "=3", "train.=5", ".x=1", "a..b=1", "seed=1", "seed=2", "x=["])
    form = "arguments have the form key=value or key.sub=value, such as seed=1"
    lines = str(error.value).split("\n")
    malformed = ("steps", "--dryrun", "=3", "train.=5", ".x=1", "a..b=1")
    assert lines[:7] == [f"{argument!r}: {form}" for argument in malformed] + ["seed: given twice"]
    assert lines[7].startswith("x: not valid YAML: ") and len(lines) == 8


def test_a_long_value_is_cut(folder):
    (line,) = mistakes(folder, "seed=" + "x" * 200)
    assert line == "seed: expected a whole number, got '" + "x" * 56 + "..."


# Arguments and files


def test_words_are_yaml():
    result = parse_arguments(
        ["a=1", "b=1e-4", "c=-2.5E+3", "d=true", "e=null", "f=[1, 2]", "g={x: 1}", "h=a=b", "i=.5e3", "j="]
    )
    numbers = {"a": 1, "b": 1e-4, "c": -2500.0, "i": 500.0}
    assert result == numbers | {"d": True, "e": None, "f": [1, 2], "g": {"x": 1}, "h": "a=b", "j": None}
    assert isinstance(result["a"], int) and isinstance(result["b"], float)


def test_a_date_and_a_path_are_text():
    result = parse_arguments(["name=2026-01-31", "path=shipped:fashion_mnist/shards", "out=1e4/x", "tag=e5"])
    assert result == {"name": "2026-01-31", "path": "shipped:fashion_mnist/shards", "out": "1e4/x", "tag": "e5"}


def test_override_leaves_the_original_alone():
    data = {"a": {"b": 1}, "c": 2}
    assert override(data, "a.d.e", 3) == {"a": {"b": 1, "d": {"e": 3}}, "c": 2}
    assert data == {"a": {"b": 1}, "c": 2}


def test_files_that_are_no_settings_are_named(tmp_path):
    path = tmp_path / "x.yaml"
    for content, text in (
        (None, "no such file"),
        ("", "expected `key: value` lines, got nothing"),
        ("- a\n- b\n", "expected `key: value` lines, got ['a', 'b']"),
        ("a: [1", "not valid YAML: "),
        ("a: 1\nb: {c: 1, c: 2}\n", "not valid YAML: key 'c' is given twice"),
    ):
        if content is not None:
            path.write_text(content)
        with pytest.raises(ConfigError) as error:
            read(path)
        assert str(error.value).startswith(f"{path}: {text}")


def test_paths_are_absolute_and_shipped_ones_are_in_the_package(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert resolve("runs/a") == tmp_path / "runs" / "a" and resolve("/a/b") == Path("/a/b")
    assert resolve("~/x") == Path.home() / "x"
    assert resolve("shipped:fashion_mnist/shards") == ASSETS / "fashion_mnist" / "shards"
    assert (resolve("shipped:fashion_mnist/shards") / "manifest.json").is_file()


def test_the_nearest_name_or_all_of_them():
    assert nearest("stesp", ["steps", "batch"]) == "did you mean 'steps'?"
    assert nearest("zzz", ["steps", "batch"]) == "valid: steps, batch"
    assert nearest("zzz", []) == "nothing can be set here"


# Keys of the last release


@pytest.fixture
def renamings(monkeypatch, caplog):
    """Three renamings in the one table, and the warnings that reading causes."""
    table = {"train.rhythm": "train.report_every", "optim.*.rate": "optim.*.lr", "teaching": "train"}
    monkeypatch.setattr(settings, "RENAMED", table)
    return lambda: [record.getMessage() for record in caplog.records]


def test_a_renamed_key_keeps_its_old_name_with_a_warning(folder, renamings):
    plain = load_recipe(["name=a", "train.report_every=25", "optim.fake.lr=0.5"], folder, "distil")
    assert renamings() == []
    assert load_recipe(["name=a", "train.rhythm=25", "optim.fake.rate=0.5"], folder, "distil") == plain
    end = "; the old name works until the next release"
    assert renamings() == [
        f"train.rhythm: is now called train.report_every{end}",
        f"optim.fake.rate: is now called optim.fake.lr{end}",
    ]
    old = DISTIL.replace("lr:", "rate:").replace("train: {", "teaching: {report_every: 50, ")
    (folder / "old.yaml").write_text(old)
    given = ["name=a", "optim.fake.lr=0.5"]  # a new name beside the old one of the file
    new = load_recipe(given, folder, "distil")
    assert load_recipe(given, folder, "old") == new.model_copy(update={"recipe": "old"})
    data = plain.model_dump(mode="json")
    data["train"]["rhythm"] = data["train"].pop("report_every")
    assert Recipe.model_validate(data) == plain  # the recipe.yaml of a run of the last release


def test_both_names_of_a_key_are_a_mistake(folder, renamings):
    assert mistakes(folder, "train.rhythm=25", "train.report_every=25") == [
        "train.rhythm: is now called train.report_every, which is given too; leave train.rhythm out"
    ]
    (folder / "both.yaml").write_text(DISTIL.replace("steps: 1000", "steps: 1000, rhythm: 5, report_every: 5"))
    assert mistakes(folder, "recipe=both") == [
        "train.rhythm: is now called train.report_every, which is given too; leave train.rhythm out"
    ]


def test_a_renamed_key_is_no_difference_to_an_old_checkpoint(folder, renamings):
    new = load_recipe(["name=a"], folder, "distil").numbers
    old = {
        **new,
        "optim": {role: {"rate" if k == "lr" else k: v for k, v in o.items()} for role, o in new["optim"].items()},
    }
    assert differences(old, new) == [] and renamings() == []
    changed = {**old, "optim": {**old["optim"], "fake": {**old["optim"]["fake"], "rate": 0.5}}}
    assert differences(changed, new) == ["optim.fake.lr: 0.5 -> 0.0004"]
    assert differences(changed, new, allow=["optim.fake.rate"]) == []


def test_a_renamed_key_of_a_space_is_searched_by_its_new_name(tmp_path, renamings):
    text = "SPACE = {'train.rhythm': choice(1, 2), 'optim.disc.rate': given('train.rhythm', loguniform(1e-4, 1e-3))}"
    (tmp_path / "mine.py").write_text(f"from fewstep.sweeps.space import *\nMETRIC = 'fd_fashion'\n{text}")
    domains = load_space(str(tmp_path / "mine.py"), tmp_path).domains
    assert (
        list(domains) == ["train.report_every", "optim.disc.lr"]
        and domains["optim.disc.lr"].key == "train.report_every"
    )
    assert len(renamings()) == 2


@pytest.fixture
def submitted(tmp_path, monkeypatch) -> tuple[Path, Path]:
    """The copy of the working directory in which a submitted job runs, which is the current one, and its home."""
    copy = tmp_path / "session" / "runtime_resources" / "working_dir_files" / "_ray_pkg_1"
    copy.mkdir(parents=True)
    monkeypatch.chdir(copy)
    monkeypatch.delenv("FEWSTEP_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    return copy, tmp_path / "fewstep"


def test_a_submitted_job_writes_to_its_home_and_reads_what_travelled_along_or_lies_there(submitted):
    copy, home = submitted
    assert resolve_out("runs") == resolve("runs") == home / "runs"  # a path that is missing, too
    assert resolve_out("/x") == Path("/x") and resolve_out("~/x") == home.parent / "x"
    assert (resolve_out_ref("s3://b/x"), resolve_out_ref("x")) == ("s3://b/x", home / "x")
    (copy / "photos").mkdir()
    assert (resolve("photos"), resolve_out("photos")) == (copy / "photos", home / "photos")
    (home / "photos").mkdir(parents=True)
    with pytest.raises(
        ConfigError, match=f"'photos' is there twice, as {copy}/photos and as {home}/photos; .*absolute"
    ):
        resolve("photos")
    (copy / "photos").rmdir()
    (copy / "photos").symlink_to(home / "photos")  # one folder by two names
    assert resolve("photos") == copy / "photos"


def test_a_job_that_is_started_by_hand_reads_and_writes_where_it_is_or_in_fewstep_home(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("FEWSTEP_HOME", raising=False)
    assert resolve("x") == resolve_out("x") == tmp_path / "x"
    monkeypatch.setenv("FEWSTEP_HOME", str(tmp_path / "home"))
    assert resolve("x") == resolve_out("x") == tmp_path / "home" / "x"
    (tmp_path / "x").touch()
    assert (resolve("x"), resolve_out("x")) == (tmp_path / "x", tmp_path / "home" / "x")
