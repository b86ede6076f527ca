"""Scores of what a caption asks for: the background by its pixels, name and style by a contrastive scorer."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fewstep.data.emoji import COLOURS, STYLES, caption
from fewstep.metrics.background import COLOURS as KNOWN
from fewstep.metrics.background import Background, backgrounds
from fewstep.metrics.base import Outputs, Samples, check_samples
from fewstep.metrics.retrieval import Retrieval, open_scorer

NAMES = [f"thing {i}" for i in range(30)]


def samples(prompts: list[str], images: torch.Tensor) -> Samples:
    return Samples(images, None, "four steps", 4, 1.0, 0, prompts=tuple(prompts))


def painted(colours: list[str], noise: int = 12) -> torch.Tensor:
    """Pictures of 64 x 64 with a drawing of noise on a plain background that is a little off its colour."""
    rng = np.random.default_rng(0)
    plain = np.array([COLOURS[colour] for colour in colours])[:, :, None, None] + rng.normal(0, noise, (1, 3, 64, 64))
    images = plain.repeat(1, 0)
    images[:, :, 6:-6, 6:-6] = rng.integers(0, 256, (len(colours), 3, 52, 52))
    return torch.from_numpy(images.clip(0, 255).astype(np.uint8))


def test_the_background_is_read_off_the_pixels():
    assert KNOWN == COLOURS
    colours = list(COLOURS)
    assert backgrounds(painted(colours)) == colours
    prompts = [caption("red-apple", "noto", colour) for colour in colours]
    assert Background()(samples(prompts, painted(colours))).value == 1.0
    shifted = colours[1:] + colours[:1]
    half = colours[:4] + shifted[4:]
    assert Background()(samples(prompts, painted(half))).value == 0.5
    with pytest.raises(ValueError, match="samples.prompts: 'a cat'; background needs '<name>, in <style> style"):
        check_samples([Background()], (3, 64, 64), None, 4, ["a cat"])
    with pytest.raises(ValueError, match="samples.prompts: none; background needs"):
        check_samples([Background()], (3, 64, 64), None, 4)


class Known:
    """A scorer whose pictures say in their first pixel which caption of a list they show."""

    name, hash = "known", "0" * 64

    def __init__(self, shown: list[str]):
        self.shown = shown
        self.asked = 0

    def direction(self, prompt: str) -> np.ndarray:
        name, style = prompt.split(", in ")[0], prompt.split(", in ")[1].split()[0]
        vector = np.zeros(40, np.float32)
        vector[NAMES.index(name)], vector[30 + list(STYLES).index(style)] = 1, 1
        return vector

    def texts(self, prompts):
        self.asked = len(prompts)
        return torch.from_numpy(np.stack([self.direction(text) for text in prompts]))

    def __call__(self, images):
        return Outputs(np.stack([self.direction(text) for text in self.shown[: len(images)]]))


def test_names_are_found_among_twenty_and_styles_among_all():
    styles = list(STYLES)
    prompts = [caption(name.replace(" ", "-"), styles[i % 3], "red") for i, name in enumerate(NAMES)]
    shown = [*prompts[:20], *(caption("thing-0", style, "red") for style in (styles[i % 3] for i in range(20, 30)))]
    scorer = Known(shown)
    given = samples(prompts, torch.zeros(30, 3, 8, 8, dtype=torch.uint8))
    score = Retrieval("name", scorer)(given)
    order = sorted(NAMES)
    missed = [name for name in NAMES[20:] if -order.index(name) % 30 < 20]  # whose twenty hold the name that is shown
    assert score.name == "name_retrieval" and score.value == pytest.approx(1 - len(missed) / 30) and missed
    assert 30 < scorer.asked <= 600
    assert Retrieval("style", scorer)(given).value == 1.0
    with pytest.raises(ValueError, match="all ask for the style 'noto'; style_retrieval needs several"):
        only = [caption("a-b", "noto", "red")] * 2
        Retrieval("style", Known(prompts))(samples(only, torch.zeros(2, 3, 8, 8, dtype=torch.uint8)))


def test_a_scorer_that_is_not_there_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="scorer: no file .*model.safetensors'; recipe=emoji_text of"):
        open_scorer(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").write_bytes(b"x")
    with pytest.raises(ValueError, match="scorer: .* holds no such CLIP model"):
        open_scorer(tmp_path / "model.safetensors")
