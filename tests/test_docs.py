"""What the pages of docs/ show runs as it stands there."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


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
