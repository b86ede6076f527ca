"""An exported generator as an MLflow model, which loads where this repository is not installed."""

from __future__ import annotations

import json
import logging
from importlib.metadata import version
from pathlib import Path
from typing import Any

from .. import networks

CODE = Path(networks.__file__).with_name("fewstep_model.py")
PACKAGES = ("mlflow", "torch", "diffusers", "pillow", "pandas")
TEXT_PACKAGES = ("transformers",)


def save_model(export: Path, folder: Path) -> None:
    """Writes a model with the Python-function flavour: `MLmodel`, the export below `data`, the code that loads it.

    export: a folder of a generator. folder: must not exist. The signature is read from the export's model_index.json.
    """
    import mlflow

    index = export / "model_index.json"
    known: dict[str, Any] = json.loads(index.read_text(encoding="utf-8")) if index.is_file() else {}
    packages = PACKAGES + (TEXT_PACKAGES if "tokenizer" in known else ())
    signature, example = _signature(known)
    loud = logging.getLogger("mlflow.pyfunc")
    level = loud.level
    loud.setLevel(logging.ERROR)  # it announces each check of the example
    try:
        mlflow.pyfunc.save_model(
            str(folder),
            loader_module=CODE.stem,
            data_path=str(export),
            code_paths=[str(CODE)],
            signature=signature,
            input_example=example,
            pip_requirements=[f"{name}=={version(name)}" for name in packages],
        )
    finally:
        loud.setLevel(level)


def _signature(index: dict[str, Any]) -> tuple[Any, Any]:
    """The signature of a generator, and an example of its input; of an unknown folder neither."""
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, ParamSchema, ParamSpec, Schema

    count = ColSpec("long", "count", required=False)
    if "tokenizer" in index:
        asked, example = [ColSpec("string", "prompt"), count], {"prompt": ["a red heart"]}
    elif (index.get("sampling") or {}).get("classes"):
        asked, example = [ColSpec("long", "label"), count], {"label": [0, 1]}
    elif "sampling" in index:
        asked, example = [ColSpec("long", "count")], {"count": [2]}
    else:
        return None, None
    answer = Schema([ColSpec("long", "row"), ColSpec("binary", "image")])
    return ModelSignature(Schema(asked), answer, ParamSchema([ParamSpec("seed", "long", 0)])), example
