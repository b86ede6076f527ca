"""The Python function of a registered generator: rows of labels or prompts in, PNG images out.

This file travels with the model, so it needs diffusers, torch, pillow and what MLflow brings, and nothing of fewstep.
"""

import io
import json
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from diffusers import DiffusionPipeline

MOST_IMAGES = 1000  # of one request


class Images:
    """An exported few-step generator."""

    def __init__(self, folder: Path):
        own_code = (folder / "pipeline.py").is_file()
        self.pipe = DiffusionPipeline.from_pretrained(folder, trust_remote_code=own_code)
        self.pipe.set_progress_bar_config(disable=True)
        self.pipe.to("cuda" if torch.cuda.is_available() else "cpu")
        settings = folder / "inference.json"
        self.settings = json.loads(settings.read_text(encoding="utf-8")) if settings.is_file() else {}

    def predict(self, model_input: Any, params: dict[str, Any] | None = None) -> pd.DataFrame:
        """PNG images: a table with the columns `row` (of the input) and `image` (bytes).

        model_input: a table, a row for each request: `label` (a class number) or `prompt`, and `count` (images, 1 where
        it is left out). params: `seed`; image number i of the answer has the noise of seed + i, whatever else is asked.
        Raises ValueError for more than 1,000 images, and for a label that is no class.
        """
        table = pd.DataFrame(model_input)
        counts = table["count"].fillna(1).astype(int) if "count" in table else pd.Series(1, index=table.index)
        if (counts < 1).any() or counts.sum() > MOST_IMAGES:
            raise ValueError(f"count: {counts.tolist()}; give 1 or more a row, and at most {MOST_IMAGES} together")
        rows = [row for row, count in enumerate(counts) for _ in range(count)]
        first = int((params or {}).get("seed", 0))
        generators = [torch.Generator().manual_seed(first + i) for i in range(len(rows))]
        if "prompt" in table:
            prompts = [str(table["prompt"].iloc[row]) for row in rows]
            images = self.pipe(prompts, generator=generators, **self.settings).images
        else:
            labels = [int(table["label"].iloc[row]) for row in rows] if "label" in table else None
            images = self.pipe(labels, None if labels else len(rows), generator=generators).images
        return pd.DataFrame({"row": rows, "image": [_png(image) for image in images]})


def _png(image: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def _load_pyfunc(data_path: str) -> Images:
    """Loads the model; MLflow calls it."""
    return Images(Path(data_path))
