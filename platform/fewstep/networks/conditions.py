"""Conditions of a network: class labels, embedded texts or none, and the condition that stands for none. Their form is
known to this file and to the network alone; everybody else passes them on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any, Protocol

import torch
from torch import Tensor

from ..diffusion.draws import Draws


class Conditions(Protocol):
    """The conditions of one network. `classes`: number of class labels; None for a network without labels."""

    classes: int | None

    def draw(self, draws: Draws, count: int, rows: Mapping[str, Any] = MappingProxyType({})) -> Any:
        """Conditions of `count` generated samples. rows: of data at hand, as many, by column."""

    def of(self, rows: Mapping[str, Any]) -> Any:
        """Conditions of rows of data, by column. Raises ValueError where a column is missing."""

    def null(self, like: Any) -> Any:
        """The condition that stands for none, as many as `like`; None where the network has no such condition."""

    def listed(self, numbers: Tensor) -> Any:
        """Conditions of the samples with these numbers (N,): those of scores and sample grids."""

    def zeros(self, count: int, device: torch.device | str = "cpu") -> Any:
        """Conditions of any content, to measure shapes with."""


@dataclass(frozen=True)
class Nothing:
    """A network that takes no condition."""

    classes: None = field(default=None, init=False)

    def draw(self, draws: Draws, count: int, rows: Mapping[str, Any] = MappingProxyType({})) -> None:
        return None

    def of(self, rows: Mapping[str, Any]) -> None:
        return None

    def null(self, like: Any) -> None:
        return None

    def listed(self, numbers: Tensor) -> None:
        return None

    def zeros(self, count: int, device: torch.device | str = "cpu") -> None:
        return None


@dataclass(frozen=True)
class Labels:
    """Class labels, int64 (B,). null_class: the label that stands for none, usually `classes`; None where there is
    none. listing: the labels that listed samples take in turn; () takes all of them."""

    classes: int
    null_class: int | None = None
    listing: tuple[int, ...] = ()

    def draw(self, draws: Draws, count: int, rows: Mapping[str, Any] = MappingProxyType({})) -> Tensor:
        return draws.integers("cond", 0, self.classes - 1, count)

    def of(self, rows: Mapping[str, Any]) -> Tensor:
        if "label" not in rows:
            raise ValueError(
                f"data.path: its rows have no labels, but the network has {self.classes} classes; prepare the data "
                "with labels"
            )
        return rows["label"]

    def null(self, like: Tensor) -> Tensor | None:
        return None if self.null_class is None else torch.full_like(like, self.null_class)

    def listed(self, numbers: Tensor) -> Tensor:
        if not self.listing:
            return numbers % self.classes
        return torch.tensor(self.listing, device=numbers.device)[numbers % len(self.listing)]

    def zeros(self, count: int, device: torch.device | str = "cpu") -> Tensor:
        return torch.zeros(count, dtype=torch.int64, device=device)


@dataclass(frozen=True)
class Prompts:
    """Embedded prompts: columns (N, ...), on the CPU, and the N texts, or () where they are not kept."""

    columns: Mapping[str, Tensor]
    texts: tuple[str, ...] = ()
    _held: dict[torch.device, dict[str, Tensor]] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __len__(self) -> int:
        return len(next(iter(self.columns.values())))

    def pick(self, numbers: Tensor) -> dict[str, Tensor]:
        """The prompts with these numbers (B,), float32, on the device of the numbers, to which all are moved once."""
        if numbers.device not in self._held:
            self._held[numbers.device] = {k: v.to(numbers.device) for k, v in self.columns.items()}
        return {k: v[numbers].float() for k, v in self._held[numbers.device].items()}


@dataclass(frozen=True)
class Texts:
    """Embedded texts by column: {"text": (B, L, D)}, and for some networks {"pooled": (B, P)} or {"mask": (B, L)}.

    shapes: of one sample, by column. prompts: for generated samples; without any a student generates for the texts of
    the data at hand. listing: prompts of listed samples, which take them in turn; None takes `prompts`. nothing: one
    sample's condition without text (1, ...), by column, as the family defines it: SD 1.5 the encoded empty string, SDXL
    zeros. negatives: negative prompts, for a method that trains with them. A copy is the object itself: networks share
    their prompts.
    """

    shapes: Mapping[str, tuple[int, ...]]
    prompts: Prompts | None = None
    nothing: Mapping[str, Tensor] = field(default_factory=dict)
    listing: Prompts | None = None
    negatives: Prompts | None = None
    classes: None = field(default=None, init=False)

    def __deepcopy__(self, memo: dict[int, Any]) -> Texts:
        return self

    def _listed(self) -> Prompts:
        if (prompts := self.listing or self.prompts) is None:
            raise ValueError("prompts: missing; a network that takes texts generates for embedded prompts")
        return prompts

    def draw(self, draws: Draws, count: int, rows: Mapping[str, Any] = MappingProxyType({})) -> dict[str, Tensor]:
        if self.prompts is None and rows:
            return self.of(rows)
        prompts = self._listed() if self.prompts is None else self.prompts
        return prompts.pick(draws.integers("cond", 0, len(prompts) - 1, count))

    def of(self, rows: Mapping[str, Any]) -> dict[str, Tensor]:
        missing = [name for name in self.shapes if name not in rows]
        if missing:
            raise ValueError(
                f"data.path: its rows have no column {missing[0]!r}, which the network takes; add it with: python "
                "jobs/encode.py"
            )
        return {name: rows[name].float() for name in self.shapes}

    def null(self, like: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
        if not self.nothing:
            return None
        same = lambda k, v: self.nothing[k].to(v.device, v.dtype).expand(v.shape)
        return {k: same(k, v) if k in self.nothing else torch.zeros_like(v) for k, v in like.items()}

    def draw_negatives(self, draws: Draws, count: int) -> dict[str, Tensor]:
        """Conditions of `count` of the negative prompts."""
        return self.negatives.pick(draws.integers("negatives", 0, len(self.negatives) - 1, count))

    def without(self, cond: Mapping[str, Tensor], negative: Mapping[str, Tensor], scale: Tensor) -> dict[str, Tensor]:
        """A condition of texts less negative ones, as many or one, by scales (B,); a scale of 0 subtracts nothing.

        Its further columns "negative" (B, L, D) and "negative_scale" (B,) are for networks/nasa.py.
        """
        text = negative["text"].expand(len(scale), *negative["text"].shape[1:])
        return {**cond, "negative": text, "negative_scale": scale.float()}

    def listing_without(self, negative: Mapping[str, Tensor], scale: float) -> Texts:
        """The same conditions, whose listed samples are less a negative prompt (1, ...), by column."""
        old = self._listed()
        columns = self.without(old.columns, negative, torch.full((len(old),), scale))
        return replace(self, listing=Prompts(columns, old.texts))

    def listed(self, numbers: Tensor) -> dict[str, Tensor]:
        return self._listed().pick(numbers % len(self._listed()))

    def listed_texts(self, count: int) -> tuple[str, ...]:
        """The prompts of the samples 0, 1, ..., count - 1, as they are listed; () where only their numbers are kept."""
        texts = self._listed().texts
        return tuple(texts[i % len(texts)] for i in range(count)) if texts else ()

    def zeros(self, count: int, device: torch.device | str = "cpu") -> dict[str, Tensor]:
        return {name: torch.zeros(count, *shape, device=device) for name, shape in self.shapes.items()}
