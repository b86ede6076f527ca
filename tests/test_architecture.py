"""The floors of the parts, the cost of an import, and rules for every file."""

from __future__ import annotations

import ast
import importlib
import json
import pkgutil
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "platform" / "fewstep"

# A part imports from lower floors only; parts of one floor do not know each other.
FLOORS = [
    {"texts"},
    {"files", "locks", "checks", "seeds", "page"},
    {"config", "diffusion"},
    {"storage"},
    {"folders"},
    {"networks", "data", "methods", "metrics"},
    {"engine"},
    {"recipe"},
    {"build"},
    {"students", "pairs", "tracking", "watchdog"},
    {"run", "compare", "serving"},
    {"dryrun", "sweeps", "diagnosis"},
    {"cluster"},
]

# Who alone may import an outside library. Ray Data's blocks are Arrow tables, so cluster/ handles them too.
ONLY = {
    "ray": {"cluster"},
    "mlflow": {"tracking"},
    "diffusers": {"networks"},
    "transformers": {"networks", "metrics"},
    "peft": {"networks"},
    "huggingface_hub": {"networks"},
    "cleanfid": {"metrics"},
    "optuna": {"sweeps"},
    "matplotlib": {"sweeps"},
    "jinja2": {"page"},
    "starlette": {"serving"},
    "pyarrow": {"data", "cluster"},
    "torchvision": {"data"},
    "resvg_py": {"data"},
    "fsspec": {"storage"},
}

# The engine knows what a method is and no particular one; of networks it knows the average, the blocks, adapters and
# weights.
NARROW = {("engine", "methods"): {"base"}, ("engine", "networks"): {"average", "blocks", "lora", "weights"}}

SOURCES = sorted(PACKAGE.rglob("*.py"))


def part_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path: Path) -> Iterator[tuple[str, ...]]:
    """Every imported name of a file as a tuple, ("fewstep", part, module, ...) for our own."""
    package = ("fewstep", *path.relative_to(PACKAGE).parts[:-1])
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (tuple(alias.name.split(".")) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = (*base, *(node.module.split(".") if node.module else ()))
            yield from ((*module, alias.name) for alias in node.names)


def breaches(path: Path) -> Iterator[str]:
    part = part_of(path)
    floor = {name: i for i, names in enumerate(FLOORS) for name in names}
    for name in imports(path):
        if part not in ONLY.get(name[0], {part}):
            yield f"{part} imports {name[0]}; only {', '.join(sorted(ONLY[name[0]]))} may"
        if name[0] != "fewstep" or len(name) < 2 or name[1] in (part, "__version__"):
            continue
        if floor[name[1]] >= floor[part]:
            yield f"{part} imports {name[1]}, which is on no lower floor"
        if name[2:3] and name[2] not in NARROW.get((part, name[1]), {name[2]}):
            yield f"{part} imports {'.'.join(name[1:])}; of {name[1]} it may know {NARROW[part, name[1]]}"


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_a_file_imports_only_from_lower_floors(path):
    if path != PACKAGE / "__init__.py":
        assert list(breaches(path)) == []


def test_every_part_has_a_floor():
    assert {part_of(path) for path in SOURCES} - {"__init__"} <= set().union(*FLOORS)


def test_breaches_are_seen(tmp_path, monkeypatch):
    monkeypatch.setitem(globals(), "PACKAGE", tmp_path)
    (tmp_path / "engine").mkdir()
    file = tmp_path / "engine" / "x.py"
    file.write_text(
        "import ray.train\nfrom ..methods.dmd2 import DMD2\nfrom ..methods.base import Batch\nfrom .. import run\n"
        "def f():\n    from fewstep.tracking import tracker\n"
    )
    assert list(breaches(file)) == [
        "engine imports ray; only cluster may",
        "engine imports methods.dmd2.DMD2; of methods it may know {'base'}",
        "engine imports run, which is on no lower floor",
        "engine imports tracking, which is on no lower floor",
    ]


def test_platform_is_a_folder_and_not_a_package():
    assert not (ROOT / "platform" / "__init__.py").exists()  # it would shadow Python's own `platform`
    import platform

    assert platform.python_implementation()


# What an import costs

HEAVY = {"ray", "mlflow", "diffusers", "transformers", "peft", "cleanfid", "pyarrow", "torchvision"}


def fresh(code: str) -> list:
    """The JSON that `code` prints in a new interpreter."""
    run = [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(ROOT / 'platform')!r})\n{code}"]
    return json.loads(subprocess.run(run, capture_output=True, text=True, check=True, timeout=120).stdout)


def test_importing_the_package_is_free():
    code = (
        "import json, time; t = time.perf_counter(); import fewstep; t = time.perf_counter() - t\n"
        "print(json.dumps([t, [m.split('.')[0] for m in sys.modules]]))"
    )
    times, modules = zip(*(fresh(code) for _ in range(3)), strict=True)
    assert min(times) < 0.2
    assert not set(modules[0]) & (HEAVY | {"torch", "numpy", "pydantic"})


def test_the_mathematics_the_methods_and_the_engine_need_only_torch():
    code = "\n".join(
        [
            "import json",
            "import fewstep.diffusion.samplers, fewstep.methods, fewstep.engine.train, fewstep.networks.denoiser",
            "core = [m.split('.')[0] for m in sys.modules]",
            "import fewstep.recipe",
            "print(json.dumps([core, [m.split('.')[0] for m in sys.modules]]))",
        ]
    )
    core, recipe = fresh(code)
    assert not set(core) & HEAVY
    assert not set(recipe) & HEAVY  # checking a recipe waits for no heavy import either


# What is true of every file


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_whatever_is_public_says_what_it_is(path):
    tree = ast.parse(path.read_text())
    assert ast.get_docstring(tree)
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    public = [node for node in tree.body if isinstance(node, kinds) and not node.name.startswith("_")]
    assert [node.name for node in public if not ast.get_docstring(node)] == []


RIDDLES = {"What", "Where", "How", "Whether", "Which", "Of", "Who"}  # a docstring opens with its subject


def docstrings(path: Path) -> Iterator[str]:
    """Every docstring of a file, those of fields and constants included."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        for child in ast.iter_child_nodes(node):
            value = child.value.value if isinstance(child, ast.Expr) and isinstance(child.value, ast.Constant) else None
            if isinstance(value, str):
                yield value


def test_docstrings_open_with_their_subject(tmp_path):
    unclear = set()
    for path in [
        *SOURCES,
        *(p for part in ("jobs", "tests", "docs", "tune_spaces") for p in (ROOT / part).glob("*.py")),
    ]:
        if RIDDLES & {text.split()[0] for text in docstrings(path) if text.strip()}:
            unclear.add(path.relative_to(ROOT).as_posix().removeprefix("platform/fewstep/"))
    assert unclear == set()
    sample = tmp_path / "x.py"
    sample.write_text('"""A file."""\nclass C:\n    """A class."""\n    x: int\n    """Of the class."""\n')
    assert list(docstrings(sample)) == ["A file.", "A class.", "Of the class."]


def settings(part: str) -> list[type]:
    """The settings models of a part, its modules imported."""
    from fewstep.config import Strict

    module = importlib.import_module(f"fewstep.{part}")
    for info in pkgutil.iter_modules(getattr(module, "__path__", [])):
        importlib.import_module(f"{module.__name__}.{info.name}")
    result, models = [Strict], []
    while result:
        model = result.pop()
        result += model.__subclasses__()
        models += [model] if model.__module__.startswith(module.__name__) else []
    return models


@pytest.mark.parametrize("part", ["methods", "engine", "recipe"])
def test_every_setting_is_documented(part):
    models = settings(part)
    assert models
    for model in models:
        silent = [name for name, field in model.model_fields.items() if not field.description and name != "name"]
        assert silent == [], model.__name__


def test_every_method_opens_with_its_paper():
    for path in sorted((PACKAGE / "methods").glob("*.py")):
        if path.stem not in ("__init__", "base"):
            head = ast.get_docstring(ast.parse(path.read_text())).split("\n\n")[0]
            assert re.search(r"( et al\.| & \w+)\s\d{4},\s+arXiv:\d{4}\.\d{5}\.$", head), path.name


TEXTS = [
    path
    for folder in ("platform", "jobs", "tests", "tune_spaces", "dashboards", ".ci")
    for path in sorted((ROOT / folder).rglob("*"))
    if path.is_file() and path.suffix in {".py", ".yaml", ".yml", ".md", ".toml", ".sh", ".txt", ".json", ""}
] + [path for path in sorted(ROOT.iterdir()) if path.suffix in {".md", ".toml"} or path.name == "Makefile"]


def test_nothing_is_left_undone_and_no_machine_is_named():
    undone = "|".join(("TO" + "DO", "FIX" + "ME"))
    places = "|".join(f"(?<![\\w.]){place}" for place in ("/ho" + "me/", "/wo" + "rk/", "/Us" + "ers/", "/ro" + "ot/"))
    pattern = re.compile(f"{undone}|{places}")
    result = []
    for path in TEXTS:
        if "__pycache__" not in path.parts:
            lines = enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
            result += [f"{path.relative_to(ROOT)}:{i}: {line}" for i, line in lines if pattern.search(line)]
    assert result == []
