#!/usr/bin/env python
"""Serves a generator on Ray Serve: OpenAI's images API, and a page to try it.

    python jobs/serve.py model=runs/fashion_mnist-20260101-120000
    curl http://127.0.0.1:8000/v1/images/generations -H 'Content-Type: application/json' \\
         -d '{"prompt": "Sneaker", "n": 4, "seed": 0}'

It listens on 127.0.0.1; with FEWSTEP_TOKEN in the environment also elsewhere, for those who send it. Ctrl-C or SIGTERM
answers what is in work, and ends it.
"""

import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "platform"))

from fewstep.config import command, validate
from fewstep.serving.settings import Settings

PAGE = ROOT / "dashboards" / "serve.html"


@command(Settings)
def main(job: Settings) -> None:
    from fewstep.cluster.serve import run

    run(job, PAGE)


def application(args: dict[str, Any]) -> Any:
    """The application for a Serve configuration, as jobs.serve:application; see jobs/clusters/rayservice.yaml."""
    from fewstep.cluster.serve import application

    return application(validate(Settings, args), PAGE)[0]


if __name__ == "__main__":
    main()
