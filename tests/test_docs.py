"""The command lines and the code on the pages of docs/ run as they stand there."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from job import job

from fewstep.recipe import open_recipe

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def commands(page: Path) -> list[list[str]]:
    """The arguments of each line of a page that starts a job: <job>.py, key=value, ..."""
    lines = [line.strip() for line in page.read_text().splitlines()]
    result = [shlex.split(line, comments=True) for line in lines if line.startswith("python jobs/")]
    return [[Path(arguments[1]).stem, *arguments[2:]] for arguments in result if arguments[1].endswith(".py")]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_command_lines_of_a_page_are_taken(page):
    """Each key exists and each value has its type. Recipes are opened with them."""
    for name, *arguments in commands(page):
        if any(re.search(r"<|\.\.\.|my\.yaml|runs/.*\.yaml", argument) for argument in arguments):
            continue  # stands for what the reader has
        taken = job(name).read([argument for argument in arguments if argument not in ("--help", "method")])
        if name in ("distill", "teach"):
            open_recipe(taken[0].recipe, ROOT / "jobs" / "recipes", taken[1])


@pytest.mark.slow
def test_the_page_on_runs_is_typed_from_top_to_bottom(tmp_path):
    environment = os.environ | {"PYTHONPATH": str(ROOT / "platform")}
    for name, *arguments in commands(ROOT / "docs" / "runs.md"):
        line = [sys.executable, str(ROOT / "jobs" / f"{name}.py"), *arguments]
        done = subprocess.run(line, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, f"{name} {arguments}\n{done.stderr[-3000:]}"
    made = ["runs/first/export/README.md", "runs/second/scores.json", "samples.png", "compare.html", "early.png"]
    assert [path for path in made if not (tmp_path / path).exists()] == []


def test_the_notebook_trains_samples_and_scores_without_ray():
    code = re.search(r"```python\n(.*?)```", (ROOT / "docs" / "notebook.md").read_text(), re.S)[1]
    assert len([line for line in code.splitlines() if line.strip()]) < 20
    code += "import sys; assert not {'ray', 'mlflow'} & sys.modules.keys()\n"
    env = os.environ | {"PYTHONPATH": str(ROOT / "platform")}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = [line.split() for line in done.stdout.splitlines()]
    reports, scores = [line for line in lines if line[0].isdigit()], [line for line in lines if not line[0].isdigit()]
    assert [line[:2] for line in reports] == [["5", "160"], ["10", "320"]]
    assert [line[0] for line in scores] == ["fd_fashion", "class_consistency", "diversity"]
    assert all(0 < float(line[1]) < 100 for line in scores) and {line[2] for line in scores} == {"200"}
