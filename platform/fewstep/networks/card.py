"""The model card: the README.md of an export."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..config import Strict, to_yaml
from ..texts import shown


class Card(Strict):
    """Facts about an exported generator that its other files do not hold."""

    name: str
    """Title."""
    teacher: str = ""
    """The teacher model."""
    method: str = ""
    """The paper, with its arXiv number."""
    data: str = ""
    """The training images."""
    training: str = ""
    """Length, batch, seed, checkpoint."""
    licence: str | None = None
    """SPDX name, or the hub's name, of the weights' licence. null states none."""
    scores: tuple[dict[str, Any], ...] = ()
    """Rows of who, sampler, nfe, images, images_per_s, each score under its name, and seen_by_loss, the names of the
    scores whose network a loss of the run used."""
    reference: str = ""
    """The reference set of the scores."""


OWN_CODE = (
    "`pipeline.py` in this folder is loaded as the pipeline's code, hence `trust_remote_code`; it needs torch and",
    "diffusers only.",
    "",
)
OWN_NEGATIVES = (
    "Negative prompts work in so few calls by `nasa.py` in this folder, which needs torch only:",
    '`with subtracted(pipe, "a red background", 0.5): images = pipe(...).images`.',
    "",
)
NOT_SCORES = ("who", "sampler", "nfe", "images", "images_per_s", "seen_by_loss")


def write_card(
    card: Card,
    calls: Sequence[dict[str, float]],
    class_names: Sequence[str] | None,
    classes: int | None,
    stock: dict[str, Any] | None = None,
    negatives: bool = False,
) -> str:
    """Returns README.md as Markdown, with the hub's metadata as YAML front matter.

    stock: arguments of the call of a pipeline of diffusers' own, which takes prompts, or labels where there are
    classes; None for a pipeline of ours. negatives: the folder has nasa.py.
    """
    head: dict[str, Any] = {
        "library_name": "diffusers",
        "pipeline_tag": "text-to-image" if stock and classes is None else "unconditional-image-generation",
        "tags": ["diffusion-distillation", "few-step"],
    }
    if card.licence:
        head["license"] = card.licence
    steps = "one network call" if len(calls) == 1 else f"{len(calls)} network calls"
    facts = {
        "Teacher": card.teacher,
        "Method": card.method,
        "Data": card.data,
        "Training": card.training,
        "Licence of the weights": card.licence or "not stated; ask whoever gave you this folder",
    }
    label = "" if classes is None else "class_labels=[0], " if stock else "class_labels=0, "
    lines = [
        "---",
        to_yaml(head).strip(),
        "---",
        "",
        f"# {card.name}",
        "",
        f"An image generator distilled from a diffusion model: an image takes {steps}.",
        "",
        *(f"- {key}: {value}" for key, value in facts.items() if value),
        "",
        "## Use",
        "",
        *(() if stock else OWN_CODE),
        "```python",
        snippet("path/to/this/folder", label, stock),
        "```",
        "",
        *(OWN_NEGATIVES if negatives else ()),
        *_classes(class_names, classes),
        *_scores(card),
        "## Sampling",
        "",
        "Pure noise times `start` enters the first call. Before each later one the image is noised afresh to",
        "alpha x0 + sigma eps.",
        "",
        "| call | alpha | sigma | network's time |",
        "|---|---|---|---|",
        *(f"| {i + 1} | {shown(c['alpha'])} | {shown(c['sigma'])} | {shown(c['time'])} |" for i, c in enumerate(calls)),
        "",
        "The noise levels belong to the weights: neither a scheduler nor the number of calls can be exchanged.",
    ]
    return "\n".join(lines) + "\n"


def snippet(folder: str, label: str = "", stock: dict[str, Any] | None = None) -> str:
    """Returns the Python code that loads the export. stock: arguments of the call of a pipeline of diffusers' own.

    Some of those draw the noise between calls from torch's global generator, so that is the one that is seeded.
    """
    trust, arguments, generator = ", trust_remote_code=True", f"{label}num_images=8", "torch.Generator().manual_seed(0)"
    if stock is not None:
        trust, generator = "", "torch.manual_seed(0)"
        arguments = (label or '"a red apple", ') + ", ".join(f"{name}={value!r}" for name, value in stock.items())
    return (
        "import torch\n"
        "from diffusers import DiffusionPipeline\n\n"
        f'pipe = DiffusionPipeline.from_pretrained("{folder}"{trust})\n'
        f"images = pipe({arguments}, generator={generator}).images"
    )


def _classes(names: Sequence[str] | None, classes: int | None) -> list[str]:
    if classes is None:
        return []
    named = ": " + ", ".join(f"{i} {name}" for i, name in enumerate(names)) if names else ""
    return [f"Classes 0 to {classes - 1}{named}.", ""]


def _scores(card: Card) -> list[str]:
    if not card.scores:
        return []
    names = list(dict.fromkeys(key for row in card.scores for key in row if key not in NOT_SCORES))
    seen = {name for row in card.scores for name in row.get("seen_by_loss", ())}
    heads = (f"{name} (seen by a loss)" if name in seen else name for name in names)
    head = ["", "sampler", "calls an image", "samples", *heads]
    rows = [
        [r.get("who", ""), r["sampler"], r["nfe"], r["images"], *(shown(r.get(n, ""), 4) for n in names)]
        for r in card.scores
    ]
    table = ["| " + " | ".join(map(str, row)) + " |" for row in [head, ["---"] * len(head), *rows]]
    note = "Of the last checkpoint, not the best of several" + (
        f"; reference: {card.reference}." if card.reference else "."
    )
    return ["## Scores", "", *table, "", note, ""]
