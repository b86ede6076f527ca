"""What a method is: its fields are its hyperparameters, its functions are the paper's equations, and its networks are
handed to it by role name. It knows no optimiser, no rank and no timestep."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from torch import Tensor, nn

from ..config import Strict
from ..diffusion.draws import Draws

METHODS: dict[str, type[Method]] = {}
Nets = Mapping[str, nn.Module]
Terms = dict[str, Tensor]


@dataclass(frozen=True)
class Batch:
    """What one step trains on, this rank's slice of it.

    real: (B, C, H, W) data in codec range, real_cond their conditions. z: like real, N(0, I), the student's input
    noise; cond: what it generates for, drawn apart from the real ones. draws: all other randomness of the step.
    x: the generated samples, shared by the phases of the step once a method's `prepare` made them.
    """

    real: Tensor
    real_cond: Any
    z: Tensor
    cond: Any
    draws: Draws
    x: Tensor | None = None

    def detached(self) -> Batch:
        """The same batch without the graph of x."""
        return self if self.x is None else replace(self, x=self.x.detach())


@dataclass(frozen=True)
class Phase:
    """One optimiser update: which roles learn, from which loss, every how many steps.

    loss(nets, batch) returns the terms, named 0-d losses already weighted that the engine adds up, and health signals,
    named 0-d tensors without a graph. Both stay on the device.
    """

    name: str
    trains: tuple[str, ...]
    loss: Callable[[Nets, Batch], tuple[Terms, Terms]]
    every: int = 1


class Method(Strict):
    """Base of every method; a recipe chooses one by `name`. A subclass with a `name` default registers itself."""

    tag: ClassVar[str]

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: Any) -> None:
        cls.tag = cls.model_fields["name"].default
        METHODS[cls.tag] = cls

    def nets(self, teacher: nn.Module, head: Callable[[], nn.Module]) -> dict[str, nn.Module]:
        """The networks that train, by role. teacher: the frozen denoiser; head: makes a GAN head for its bottleneck."""
        raise TypeError(f"{self.tag}: a method says which networks it trains")

    def phases(self) -> tuple[Phase, ...]:
        """The updates of a step, in order."""
        raise TypeError(f"{self.tag}: a method says which phases it has")

    def prepare(self, nets: Nets, batch: Batch, trains: tuple[str, ...]) -> Batch:
        """What the phases of a step share, made once before its first phase, which trains `trains`."""
        return batch

    @property
    def roles(self) -> tuple[str, ...]:
        """The roles that train, sorted."""
        return tuple(sorted({role for phase in self.phases() for role in phase.trains}))

    @property
    def known_roles(self) -> tuple[str, ...]:
        """Every role that other settings of this method would train: a recipe may set their optimisers all the same."""
        return self.roles

    def describe_sampler(self) -> tuple[str, int]:
        """Name of the way a trained network is sampled, and its network calls an image."""
        raise TypeError(f"{self.tag}: a method says how its student is sampled")

    def sample(self, student: nn.Module, z: Tensor, cond: Any, draws: Draws) -> Tensor:
        """x0 (B, ...) from unit noise z."""
        raise TypeError(f"{self.tag}: a method says how its student is sampled")
