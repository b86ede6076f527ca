"""The command line of jobs: arguments, --help, mistakes; and the page of all keys."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from job import job
from pydantic import Field

from fewstep.config import Strict, UserError, command, override_all, parse_arguments, validate

ROOT = Path(__file__).parents[1]
FORM = "arguments have the form key=value or key.sub=value, such as seed=1"


class Pack(Strict):
    """Packs pictures into shards."""

    source: str
    """Source of the pictures."""
    size: Annotated[int, Field(ge=1)] | None = None
    """Pixels a side; null keeps them."""
    dry_run: bool = False
    """Check, and write nothing."""
    tags: list[int] | int | None = None
    """Tags of the pictures."""


class Circle(Strict):
    """A round thing."""

    name: Literal["circle"] = "circle"
    radius: Annotated[float, Field(gt=0, lt=10)] = 1.0
    """Half of its width."""


class Square(Strict):
    """A square thing."""

    name: Literal["square"] = "square"
    side: float
    """Its width."""


class Drawing(Strict):
    """A drawing of shapes."""

    shape: Annotated[Circle | Square, Field(discriminator="name")]
    """The shape, by name."""
    points: tuple[int, int] = (0, 9)
    """First and last point."""
    mode: Literal["off", "on"] = "off"
    """Light."""
    labels: list[int] | int | None = None
    """Labels to draw."""
    pens: dict[str, Circle] = {}
    """A pen for each colour."""


@command(Pack)
def pack(job: Pack) -> int | None:
    """Returns the status that its source names, or raises."""
    if job.source == "unplaceable":
        raise UserError("cluster.workers: 64 workers, and the cluster has 4 CPUs")
    if job.source == "missing":
        open("/nowhere/at/all").close()
    if job.source == "bug":
        raise KeyError("bug")
    if job.source == "stop":
        raise KeyboardInterrupt
    print(job)
    return 1 if job.source == "one" else None


@command(Pack, Drawing)
def draw(job: Pack, given: dict[str, Any]) -> None:
    print(validate(Drawing, override_all({}, given)))


def ended(capsys, main, *argv: str) -> tuple[int, str, list[str]]:
    """Exit status, output and lines of standard error."""
    status = 0
    try:
        main(argv)
    except SystemExit as stop:
        status = stop.code
    out, err = capsys.readouterr()
    return status, out, err.splitlines()


# Arguments


def test_words_become_settings(capsys):
    assert pack.read(["source=x", "size=64"]) == (Pack(source="x", size=64),)
    assert pack.read(["--dry-run", "source=x"]) == (Pack(source="x", dry_run=True),)
    assert draw.read(["shape.name=circle", "source=x", "size=3"]) == (
        Pack(source="x", size=3),
        {"shape.name": "circle"},
    )
    assert ended(capsys, pack, "source=one")[0] == 1 and ended(capsys, pack, "source=x")[0] == 0


def test_a_word_that_changes_part_of_another_comes_after_it():
    given = parse_arguments(["shape.radius=2", "shape={name: circle, radius: 1}"])
    assert override_all({"mode": "on"}, given) == {"mode": "on", "shape": {"name": "circle", "radius": 2}}


@pytest.mark.parametrize(
    "argv, lines",
    [
        (
            ["size=big", "sise=3"],
            [
                "source: missing, and it has no default",
                "size: expected a whole number, got 'big'",
                "sise: no such key; did you mean 'size'?",
            ],
        ),
        (
            ["source=x", "tags=[a, b]"],
            [
                "tags.0: expected a whole number, got 'a'",
                "tags.1: expected a whole number, got 'b'",
                "tags: expected a whole number, got ['a', 'b']",
            ],
        ),
        (["source=x", "--dryrun"], ["--dryrun: no such option; did you mean '--dry-run'?"]),
        (["source=x", "--size=3"], ["--size: no such key; did you mean 'size'?"]),
        (["source=x", "size"], [f"'size': {FORM}"]),
        (["source=x", "source=y"], ["source: given twice"]),
        (["source=a #1"], ["source: a # begins a comment; put the value in quotes: 'source=\"a #1\"'"]),
        (
            ["source=20261126"],
            ['source: expected text, got 20261126; as text it has quotes: "20261126" in a file, source='],
        ),
        (
            ["source=true"],
            ['source: expected text, got true; as text it has quotes: "true" in a file, source=\'"true"\' on'],
        ),
        (["source=null"], ["source: expected text, got null"]),
        (["source=1e3"], ['source: expected text, got 1000.0; as text it has quotes: "..." in a file, source=']),
        ([".".join("a" * 100) + "=1"], ["'" + "a." * 28 + "...: a key of 100 parts, and no setting has as many"]),
        (["source=missing"], ["/nowhere/at/all: No such file or directory"]),
        (["source=unplaceable"], ["cluster.workers: 64 workers, and the cluster has 4 CPUs"]),
    ],
    ids=lambda value: value[0][:20],
)
def test_a_mistake_is_one_line_on_standard_error_and_exit_status_2(capsys, argv, lines):
    status, out, err = ended(capsys, pack, *argv)
    assert (status, out) == (2, "") and [line[: len(text)] for line, text in zip(err, lines, strict=True)] == lines


def test_a_slip_in_a_jobs_own_word_is_found_among_its_own_and_the_recipes(capsys):
    assert ended(capsys, draw, "sourcce=x", "sise=3")[2] == [
        "source: missing, and it has no default",
        "sourcce: no such key; did you mean 'source'?",
        "sise: no such key; did you mean 'size'?",
    ]
    assert ended(capsys, draw, "source=x", "shape.name=circle", "pont=3")[2] == [
        "pont: no such key; did you mean 'points'?"
    ]


def test_an_interruption_and_a_bug(capsys, monkeypatch):
    assert ended(capsys, pack, "source=stop") == (130, "", ["interrupted"])
    with pytest.raises(KeyError, match="bug"):
        pack(["source=bug"])
    monkeypatch.setenv("FEWSTEP_TRACEBACK", "1")
    with pytest.raises(UserError):
        pack(["source=unplaceable"])


# --help


def test_help_lists_every_key_with_type_default_range_and_meaning(capsys):
    status, out, err = ended(capsys, draw, "--help")
    assert (status, err) == (0, []) and out.splitlines()[2:] == [
        "Arguments have the form key=value; values are YAML:",
        "",
        "source: text; required",
        "    Source of the pictures.",
        "size: whole number at least 1 or null; default null",
        "    Pixels a side; null keeps them.",
        "dry_run: true or false; default false",
        "    Check, and write nothing.",
        "tags: list (each whole number) or whole number or null; default null",
        "    Tags of the pictures.",
        "",
        "All other arguments are keys of the recipe. --help KEY prints those below KEY alone:",
        "",
        "shape: keys below",
        "    The shape, by name.",
        "with shape.name=circle:",
        "    A round thing.",
        "shape.radius: number above 0 and below 10; default 1.0",
        "    Half of its width.",
        "with shape.name=square:",
        "    A square thing.",
        "shape.side: number; required",
        "    Its width.",
        "points: list of 2 (each whole number); default [0, 9]",
        "    First and last point.",
        "mode: off | on; default off",
        "    Light.",
        "labels: list (each whole number) or whole number or null; default null",
        "    Labels to draw.",
        "pens: keys below; default {}",
        "    A pen for each colour.",
        "pens.*: keys below",
        "    A round thing.",
        "pens.*.name: circle; default circle",
        "pens.*.radius: number above 0 and below 10; default 1.0",
        "    Half of its width.",
    ]


def test_help_narrows_to_a_prefix(capsys):
    radius = ["    Half of its width."]
    kind = "radius: number above 0 and below 10; default 1.0"
    for prefix, lines in (
        ("shape.radius", ["with shape.name=circle:", f"shape.{kind}"]),
        ("pens.red.radius", [f"pens.*.{kind}"]),
    ):
        assert ended(capsys, draw, "--help", prefix) == (0, "\n".join([*lines, *radius]) + "\n", [])
    assert ended(capsys, draw, "source=x", "-h", "mode")[1].splitlines() == [
        "mode: off | on; default off",
        "    Light.",
    ]
    assert ended(capsys, draw, "--help", "shap")[::2] == (2, ["--help shap: no such key; did you mean 'shape'?"])


JOBS = sorted(path for path in (ROOT / "jobs").glob("*.py"))


@pytest.mark.parametrize("path", JOBS, ids=lambda path: path.stem)
def test_every_job_says_what_each_of_its_keys_means(path, capsys):
    main = job(path.stem)
    status, out, err = ended(capsys, main, "--help")
    lines = out.splitlines()
    for model in main.models:
        for name, field in model.model_fields.items():
            key = field.alias or name
            at = next(i for i, line in enumerate(lines) if line.startswith(f"{key}: "))
            assert lines[at + 1].startswith("    "), f"{key} of {path.stem} has no docstring"


def test_the_page_of_keys_is_current():
    assert (ROOT / "docs" / "keys.md").read_text() == runpy.run_path(str(ROOT / "docs" / "keys.py"))["text"]()
