"""Alignment by a contrastive scorer: does an image fit its own caption best? And a Frechet distance on its features."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
from torch import Tensor

from fewstep.files import sha256_of
from fewstep.metrics.background import ASKED, asked
from fewstep.metrics.base import File, Files, Metric, Outputs, Samples, Score, score
from fewstep.metrics.frechet import Frechet
from fewstep.metrics.reference import REFERENCE
from fewstep.texts import one_line

CHOICES = 20  # captions of other names that an image could be taken for, its own among them


class Scorer:
    """A CLIP model and its tokenizer: pictures and texts as directions. As an extractor its features are pictures'.

    field: that names its file; absent: what to do where it is not there."""

    name, field = "emoji", "scorer"
    absent = "recipe=emoji_text of jobs/teach.py trains one"

    def __init__(self, model: Any, tokenizer: Any, digest: str, device: str | torch.device, batch: int = 250):
        self.model, self.tokenizer, self.hash = model.to(device).eval(), tokenizer, digest
        self.device, self.batch = device, batch

    @torch.no_grad()
    def pictures(self, images: Tensor) -> Tensor:
        """Directions (N, D) of uint8 images (N, 3, H, W)."""
        parts = (self.pixels(part).to(self.device) for part in images.split(self.batch))
        features = [self.model.get_image_features(pixel_values=part).pooler_output.cpu() for part in parts]
        return torch.nn.functional.normalize(torch.cat(features), dim=1)

    def pixels(self, images: Tensor) -> Tensor:
        """The network's input of uint8 images."""
        return images.float() / 127.5 - 1

    @torch.no_grad()
    def texts(self, captions: Sequence[str]) -> Tensor:
        """Directions (T, D) of texts."""
        tokens = self.tokenizer(list(captions), padding="max_length", truncation=True, return_tensors="pt").input_ids
        parts = [part.to(self.device) for part in tokens.split(self.batch)]
        features = [self.model.get_text_features(input_ids=part).pooler_output.cpu() for part in parts]
        return torch.nn.functional.normalize(torch.cat(features), dim=1)

    def __call__(self, images: Tensor) -> Outputs:
        return Outputs(self.pictures(images).numpy())


def open_scorer(path: Path, device: str | torch.device = "cpu", kind: type[Scorer] = Scorer) -> Any:
    """The scorer whose weights are at `path`, with its config and tokenizer beside them. Raises ValueError."""
    from safetensors import SafetensorError
    from transformers import CLIPModel, CLIPTokenizer

    if not path.is_file():
        raise FileNotFoundError(f"{kind.field}: no file {str(path)!r}; {kind.absent}")
    try:
        model = CLIPModel.from_pretrained(path.parent, use_safetensors=True, local_files_only=True)
        tokenizer = CLIPTokenizer.from_pretrained(path.parent, local_files_only=True)
        return kind(model, tokenizer, sha256_of(path), device)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ValueError(f"{kind.field}: {str(path.parent)!r} holds no such CLIP model ({one_line(error)})") from None


SCORER = File(
    open=open_scorer,
    remedy="shipped:emoji/scorer/model.safetensors is embedded",
    suffix="scorer/model.safetensors",
)


class ScorerMetric(Metric):
    """Base of the metrics by the scorer."""

    scorer: Annotated[str | None, SCORER] = None
    """Weights of the contrastive scorer, a model.safetensors with its config and tokenizer beside it."""


class NameRetrieval(ScorerMetric):
    """Share of the samples that fit their own name best among 20: their caption, and the same with 19 other names."""

    names = ("name_retrieval",)
    better = "higher"

    def build(self, files: Files) -> Retrieval:
        return Retrieval("name", files.open(self, "scorer"))


class StyleRetrieval(ScorerMetric):
    """Share of the samples that fit their own style best, among all styles that are asked for."""

    names = ("style_retrieval",)
    better = "higher"

    def build(self, files: Files) -> Retrieval:
        return Retrieval("style", files.open(self, "scorer"))


class Retrieval:
    """Function of samples; see `NameRetrieval` and `StyleRetrieval`. A sample's other names are those that follow its
    own in the alphabet of all that are asked for."""

    def __init__(self, part: str, scorer: Scorer):
        self.part, self.scorer = part, scorer
        self.name = f"{part}_retrieval"

    def __call__(self, samples: Samples) -> Score:
        own = asked(samples, self.part, self.name)
        pictures = torch.from_numpy(samples.features.of(self.scorer).features)
        known = sorted(set(own))
        if len(known) < 2:
            raise ValueError(f"samples.prompts: all ask for the {self.part} {known[0]!r}; {self.name} needs several")
        count = min(CHOICES, len(known))
        rows = []
        for prompt, mine in zip(samples.prompts, own, strict=True):
            start, (first, last) = known.index(mine), ASKED.fullmatch(prompt).span(self.part)
            rows.append([prompt[:first] + known[(start + i) % len(known)] + prompt[last:] for i in range(count)])
        distinct = list(dict.fromkeys(text for row in rows for text in row))
        place = {text: i for i, text in enumerate(distinct)}
        texts = self.scorer.texts(distinct)[torch.tensor([[place[text] for text in row] for row in rows])]
        right = (texts @ pictures[:, :, None]).squeeze(2).argmax(1) == 0
        return score(self.name, right.float().mean().item(), samples, extractor=self.scorer.hash)


class FrechetEmoji(ScorerMetric):
    """Frechet distance on the scorer's features of pictures."""

    names = ("fd_emoji",)
    better = "lower"

    reference: Annotated[str | None, REFERENCE] = None
    """Statistics of the real images under the scorer."""

    def build(self, files: Files) -> Frechet:
        return Frechet(files.open(self, "scorer"), files.open(self, "reference"))
