"""Recipes, command lines and search spaces changed at random: each is read, or refused by one ConfigError, at once.

Every case is a function of its number; a failing one is repeated by `python tests/test_fuzz_recipes.py arguments 123`.
"""

from __future__ import annotations

import random
import re
import resource
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml

from fewstep.config import ConfigError, read
from fewstep.config.keys import keys
from fewstep.config.reading import parse_yaml, to_yaml
from fewstep.recipe import Recipe, load_recipe
from fewstep.sweeps.settings import Sweep, check
from fewstep.sweeps.space import load_space

ROOT = Path(__file__).parents[1]
RECIPES = ROOT / "jobs" / "recipes"
MUTATIONS, SECONDS, BYTES, LINES = 500, 10, 2 << 30, 200


def listed(text: str) -> list[str]:
    """The texts that two spaces or more, or an end of a line, part."""
    return re.split(r"\s{2,}|\n", text.strip())


TEXTS = listed(r"""
null  ~  true  yes  off  010  0x1F  0o17  10:00  1_000  1e400  -1e400  .inf  -.inf  .nan  1e-4  -0.0  2026-01-31  1.5
-1
0  1  2  1000  ''  ""  []  {}  [[]]  [null]  [0, 1]  [1, 0]  [-1, 2.5]  {a: b}  *none  &a [*a]  &a {<<: *a}  <<  {<<: 3}
!!int x  !!binary aGk=  !!python/name:os.system  !x  @x  %x  `x  |  >  '  "  - x  ? x  : x  #x  a #b  a: b: c
"\0"  "\ud800"
"\x07"  ../..  /  .  ~nobody/x  s3:/bucket  s3://  ://  fd_fashion  dmd2  fp16  shipped:x  hub:a/b
""")
TEXTS += ["\u2028", "\x85", "\ufeff", "\u0661", "\U0001f600", "9" * 25, "9" * 45, "9" * 5000, "a" * 70_000, "[" * 100]
TEXTS += [
    "[" * 5000,
    "{a: " * 5000,
    "- " * 500,
    "[" + "x," * 30_000 + "]",
    f"{{{','.join(f'k{i}: 1' for i in range(6000))}}}",
]
ARGUMENTS = listed("""
seed=3  seed=0x10  train.steps=1e3  train.batch=64  data.flip=yes  method.gan_weight=0  method={name: regression}
name=a
optim.fake.lr=1e-5  tracking.uri=null  out=x  evaluate.metrics=[]  cluster.workers=2  cluster.compile=[full]
precision=bf16  failure.collapse.policy=off  train.average_decay=null
""")
VALUES = listed("""
0  -1  1  2**70  float('nan')  1e400  None  True  'x'  b'x'  object()  []  [1]  {}  {1: 2}  {1, 2}  print  10**12  SPACE
METRIC  1 / 0  exit()  'fd_fashion'  'min'  'max'  choice()  choice(1)  choice([1], [2])  choice(None, True)  zero_or(1)
choice(*range(5000))  uniform(1, 0)  uniform(0, 1, points=10**9)  uniform(-1e308, 1e308)  loguniform(1e-320, 1)
integers(0, 2**70)  integers(0, 10**14)  integers(True, 9)  given(1, 2)  given('x', choice(1))  [i for i in SPACE]
['fd_fashion', 'diversity']  {'fd_fashion': 'min'}
""")
DOMAINS = listed("""
'method.gan_weight': choice(0, 1e-3)  'train.batch': choice(32, 64)  'optim.fake.lr': loguniform(1e-5, 1e-3)
'method.critic_updates_per_student_update': integers(1, 9)  'method.guidance': uniform(1, 4, points=3)
'method.critic_gan_weight': given('method.gan_weight', choice(1e-2, 2e-2))
""")
BASES = {path.stem: path.read_text() for path in sorted(RECIPES.glob("*.yaml"))}
KEYS = sorted({key.name for key in keys(Recipe)} | {"recipe", "a", "", "a.b", ".", "optim.fake.lr", "start.student"})


@contextmanager
def bounded() -> Iterator[None]:
    """Raises TimeoutError after SECONDS, and MemoryError where the process has grown by more than BYTES."""

    def stop(*_: Any) -> None:
        raise TimeoutError(f"more than {SECONDS} s")

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    old = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, SECONDS * 4)  # of a loaded machine
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, old)
    if (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) << 10 > BYTES:
        raise MemoryError(f"grew by more than {BYTES >> 20} MiB")


def changed(dice: random.Random, text: str) -> bytes:
    """A recipe's text with one to four changes, from a letter to an encoding."""
    for _ in range(dice.randint(1, 4)):
        lines = text.split("\n")
        at, where = dice.randrange(len(lines)), dice.randrange(len(text) + 1)
        kind = dice.randrange(9)
        if kind == 0:  # another value
            lines[at] = lines[at].split(":")[0] + ": " + dice.choice(TEXTS)
        elif kind == 1:  # another line
            lines.insert(at, dice.choice(["", " ", "  ", "    "]) + f"{dice.choice(KEYS)}: {dice.choice(TEXTS)}")
        elif kind == 2:  # another indentation
            lines[at] = " " * dice.randrange(5) + lines[at].lstrip()
        elif kind == 3:
            lines[at] = lines[dice.randrange(len(lines))]
        elif kind == 4:
            lines.pop(at)
        text = "\n".join(lines)
        if kind == 5:
            text = text[:where] + dice.choice(TEXTS) + text[where:]
        elif kind == 6:
            text = text[:where] + text[where + dice.randint(1, 40) :]
        elif kind == 7:
            text = text[:where]
        elif kind == 8:
            text = text[:where] + dice.choice("{}[]:,&*!|>'\"%@`#?-\t\n\r\0") + text[where:]
    content = text.encode(dice.choice(["utf-8"] * 8 + ["utf-16", "utf-8-sig"]), "surrogatepass")
    if dice.random() < 0.1:
        at = dice.randrange(len(content) + 1)
        content = content[:at] + dice.randbytes(dice.randint(1, 4)) + content[at:]
    return content


def recipe_of_file(dice: random.Random, folder: Path) -> Recipe:
    (folder / "r.yaml").write_bytes(changed(dice, BASES[dice.choice(list(BASES))]))
    return load_recipe(["recipe=r"], folder, "r")


def recipe_of_arguments(dice: random.Random, folder: Path) -> Recipe:
    form = lambda: dice.choice(["{}={}"] * 20 + ["{}", "--{}={}", "{}.x={}", "={1}", "{}=={}"])
    arguments = dice.sample(ARGUMENTS, dice.randint(0, 4))
    for _ in range(dice.randint(0, 2)):
        arguments.append(form().format(dice.choice(KEYS).replace("*", "fake"), dice.choice(TEXTS)))
    return load_recipe(arguments, RECIPES, dice.choice(list(BASES)))


def recipe_of_space(dice: random.Random, folder: Path) -> Recipe:
    """The recipe that a space was checked with."""
    value = lambda: dice.choice(VALUES)
    domains = dice.sample(DOMAINS, dice.randint(0, 3))
    for _ in range(dice.choice([0, 0, 0, 1, 2])):
        domains.append(f"{dice.choice(KEYS).replace('*', 'fake')!r}: {value()}")
    lines = ["from fewstep.sweeps.space import *", f"SPACE = {{{', '.join(domains)}}}", "METRIC = 'fd_fashion'"]
    for _ in range(dice.choice([0, 0, 1, 2])):
        name = dice.choice(["SPACE", "METRIC", "MODE", "OBJECTIVES", "WHY", "__doc__", f"SPACE[{value()}]"])
        lines.append(f"{name} = {value()}")
    text = "\n".join(lines)
    if dice.random() < 0.2:
        at = dice.randrange(len(text))
        text = text[:at] + text[at + dice.randint(1, 9) :]
    (folder / "s.py").write_text(text)
    recipe = load_recipe(["evaluate.every_images=1600"], RECIPES, "fashion_mnist")
    result = load_space(str(folder / "s.py"), folder)
    check(Sweep(space="s", search=dice.choice(["grid", "tpe", "pareto"])), result, recipe)
    return recipe


CASES: dict[str, Callable[[random.Random, Path], Recipe]] = {
    "file": recipe_of_file,
    "arguments": recipe_of_arguments,
    "space": recipe_of_space,
}


def outcome(kind: str, number: int, folder: Path) -> Recipe | str:
    """The recipe of a case, or the text of its ConfigError."""
    with bounded():
        try:
            return CASES[kind](random.Random(f"{kind} {number}"), folder)
        except ConfigError as error:
            return str(error)


@pytest.mark.slow
@pytest.mark.parametrize("kind", CASES)
def test_whatever_is_written_ends_in_a_recipe_or_in_one_config_error(kind, tmp_path):
    failures, read_again = [], 0
    for number in range(MUTATIONS):
        try:
            result = outcome(kind, number, tmp_path)
            if isinstance(result, Recipe):
                (tmp_path / "again.yaml").write_text(to_yaml(result.model_dump(mode="json")))
                assert Recipe.model_validate(read(tmp_path / "again.yaml")) == result
                read_again += 1
            else:
                lines = result.split("\n")
                assert all(line.strip() for line in lines) and len(lines) <= LINES and len(result) < 100_000
        except Exception as error:
            failures.append(f"{kind} {number}: {type(error).__name__}: {str(error)[:200]}")
    assert failures == []
    assert MUTATIONS // 50 < read_again < MUTATIONS  # neither was every case refused, nor did every one pass


@pytest.mark.slow
def test_whatever_text_is_written_is_read_as_it_was():
    dice = random.Random(0)
    for _ in range(20 * MUTATIONS):
        letters = dice.choice(
            ["0123456789.eE+-_:xo", "truefalsnyoTF~<=", "ab \n\t#'\"[]{}&*!|>%@`,:?-\\\u00e9\u2028\U0001f600"]
        )
        text = "".join(dice.choice(letters) for _ in range(dice.randint(0, 7)))
        for data in ({"a": text}, {"a": [text]}, {"a": {"b": text}}):
            written = to_yaml(data)
            assert parse_yaml(written, "x") == data and yaml.safe_load(written) == data, repr(text)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as place:
        print(outcome(sys.argv[1], int(sys.argv[2]), Path(place)))
