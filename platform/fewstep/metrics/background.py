"""Background: the colour that a caption asks for, read off the pixels; no network judges."""

from __future__ import annotations

import re

import torch
from torch import Tensor

from fewstep.metrics.base import Files, Metric, Samples, Score, score

ASKED = re.compile(r"(?P<name>.+), in (?P<style>\w+) style, on a (?P<colour>\w+) background")
EDGE = 2  # pixels of the frame that is looked at; drawings keep clear of it
COLOURS = {
    "white": (255, 255, 255), "grey": (150, 150, 150), "black": (20, 20, 20), "red": (220, 50, 50),
    "yellow": (250, 220, 90), "green": (80, 180, 90), "blue": (70, 130, 230), "purple": (150, 80, 200),
}  # fmt: skip


def asked(samples: Samples, part: str, metric: str) -> list[str]:
    """A part of each caption: name, style or colour. Raises ValueError for a caption that does not say it."""
    matches = [ASKED.fullmatch(prompt) for prompt in samples.prompts]
    if not matches or None in matches:
        wrong = repr(samples.prompts[matches.index(None)]) if matches else "none"
        raise ValueError(
            f"samples.prompts: {wrong}; {metric} needs '<name>, in <style> style, on a <colour> background'"
        )
    return [match[part] for match in matches]


def backgrounds(images: Tensor) -> list[str]:
    """The colour nearest to the median of each image's frame. images: uint8 (N, 3, H, W)."""
    inside = torch.zeros(images.shape[2:], dtype=torch.bool)
    inside[EDGE:-EDGE, EDGE:-EDGE] = True
    median = images[:, :, ~inside].float().median(dim=2).values
    nearest = torch.cdist(median, torch.tensor(list(COLOURS.values()), dtype=torch.float32)).argmin(1)
    return [list(COLOURS)[i] for i in nearest.tolist()]


class BackgroundShare(Metric):
    """Share of the samples whose background has the colour that their caption asks for, of the emoji's eight."""

    names = ("background",)
    better = "higher"

    def build(self, files: Files) -> Background:
        return Background()


class Background:
    """Function of samples; see `BackgroundShare`."""

    def __call__(self, samples: Samples) -> Score:
        colours = asked(samples, "colour", "background")
        if samples.images.shape[1] != 3:
            raise ValueError(f"samples.images: {samples.images.shape[1]} channels; background needs colour images")
        right = [a == b for a, b in zip(colours, backgrounds(samples.images), strict=True)]
        return score("background", sum(right) / len(right), samples)
