"""A method: its fields are its hyperparameters, its functions are the paper's equations, and its networks come by role
name. It knows no optimiser, no rank and no timestep."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Annotated, Any, ClassVar, Protocol, TypeVar

from pydantic import AfterValidator, Field
from torch import Tensor, nn

from ..config import Strict
from ..diffusion.draws import INDICES, Draws
from ..diffusion.guidance import guided
from ..diffusion.samplers import Call

METHODS: dict[str, type[Method]] = {}
Nets = Mapping[str, nn.Module]
Terms = dict[str, Tensor]
Number = TypeVar("Number")


def _ascending(pair: tuple[Number, Number]) -> tuple[Number, Number]:
    if pair[0] > pair[1]:
        raise ValueError("give the lower one first")
    return pair


Index = Annotated[int, Field(ge=0, lt=INDICES)]  # a noise level in thousandths of a schedule's ramp
Range = Annotated[tuple[Number, Number], AfterValidator(_ascending)]


class Make(Protocol):
    """Networks for a method's roles. A network that no phase trains is frozen."""

    teacher: Any
    """The denoiser to distil; of a recipe that trains a new network, that network."""

    def copy(self, role: str, extra: tuple[str, ...] = ()) -> nn.Module:
        """A denoiser that starts as the teacher, or where the recipe's `roles` says so an adapter or a new network.

        extra: names of further scalars that it is given, such as a guidance scale; they have no effect at first.
        """

    def variant(self, role: str, time_scale: float, qk_norm: bool) -> nn.Module:
        """A whole copy of the teacher with another factor on its time, and with an RMS norm of queries and keys.

        Raises ValueError for a network that has no such norm.
        """

    def head(self, role: str, at: tuple[str, ...] = ("middle",)) -> nn.Module:
        """A GAN head, (maps of the taps `at`) -> logits (B,)."""

    def helper(self, name: str) -> nn.Module:
        """A frozen network that the recipe's `helpers` names: a feature network, a reward. Raises ValueError."""

    def run(self, folder: str) -> nn.Module:
        """The student of another run, frozen. Raises ValueError."""

    def method(self, folder: str) -> Method:
        """The method of another run. Raises ValueError."""


@dataclass(frozen=True)
class Batch:
    """One step's data and noise, this rank's slice of it.

    real: (B, C, H, W) data in codec range, and real_cond their conditions; None for a method that needs no data.
    z: (B, C, H, W) N(0, I), the student's input noise, and cond its conditions, drawn apart from the real ones.
    draws: all other randomness of the step. conditions: of the student (networks/conditions.py).
    progress: share of the run that is done, in [0, 1). rows: the columns of data that the method needs.
    made: tensors that the phases of the step share, made once by `prepare`; "x" are the generated samples.
    """

    real: Tensor | None
    real_cond: Any
    z: Tensor
    cond: Any
    draws: Draws
    conditions: Any = None
    progress: float = 0.0
    rows: Mapping[str, Tensor] = field(default_factory=dict)
    made: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def x(self) -> Tensor:
        """The generated samples (B, C, H, W) that `prepare` made."""
        return self.made["x"]

    @property
    def null(self) -> Any:
        """The condition that stands for none, as many as `cond`; None where the student has no such condition."""
        return None if self.conditions is None else self.conditions.null(self.cond)

    def make(self, **tensors: Tensor) -> Batch:
        """The same batch with more tensors that the phases share."""
        return replace(self, made={**self.made, **tensors})

    def detached(self) -> Batch:
        """The same batch without the graphs of what was made."""
        return replace(self, made={name: tensor.detach() for name, tensor in self.made.items()})


@dataclass(frozen=True)
class Phase:
    """One optimiser update: its roles, its loss, and the steps that have it.

    loss(nets, batch) returns the terms, named 0-d losses already weighted that the engine adds up, and health signals,
    named 0-d tensors without a graph. Both stay on the device.
    every: the steps first, first + every, first + 2 every, ... have it; unless: but not those in which this earlier
    phase ran.
    measure(nets, batch) runs before the loss, without gradients, for what must be normalised over the global batch. It
    returns named 0-d tensors, whose means over all samples the loss finds in `batch.made` under "mean/<name>", and
    tensors of its own samples, which the loss finds there under their names.
    """

    name: str
    trains: tuple[str, ...]
    loss: Callable[[Nets, Batch], tuple[Terms, Terms]]
    every: int = 1
    first: int = 0
    unless: str | None = None
    measure: Callable[[Nets, Batch], tuple[Terms, Terms]] | None = None


class Method(Strict):
    """Base of every method; a recipe chooses one by `name`. A subclass with a `name` default registers itself."""

    tag: ClassVar[str]
    needs: ClassVar[tuple[str, ...]] = ("real",)
    """Columns of data: "real" are images or latents with their conditions, "caption" their texts; () trains on
    conditions alone."""
    needs_teacher: ClassVar[bool] = True
    """A recipe must name a teacher, rather than a new network."""
    needs_float32: ClassVar[bool] = False
    """The loss takes derivatives of networks along a direction, for which the blocks must compute in float32."""
    needs_negatives: ClassVar[bool] = False
    """A recipe must name negative prompts."""
    generates: ClassVar[bool] = True
    """The student generates samples, of which grids are drawn and scores are taken."""
    frozen: ClassVar[tuple[str, ...]] = ("teacher",)
    """Roles that no phase trains, and that a recipe's `start` may name."""
    headline: ClassVar[tuple[str, ...]] = ()
    """The metrics that a person watches, most important first; progress and the comparison page show them."""
    cure: ClassVar[str] = "Lower optim.student.lr"
    """Advice when the student collapses."""

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: Any) -> None:
        if "name" in cls.model_fields:
            cls.tag = cls.model_fields["name"].default
            METHODS[cls.tag] = cls

    @abstractmethod
    def nets(self, make: Make) -> dict[str, nn.Module]:
        """The networks by role, the frozen ones among them; one is the "student"."""

    @abstractmethod
    def phases(self) -> tuple[Phase, ...]:
        """The updates of a step, in order."""

    def averages(self) -> dict[str, tuple[str, float]]:
        """Roles that follow another by an exponential average, as role: (source, decay per update of the source)."""
        return {}

    def prepare(self, nets: Nets, batch: Batch, trains: tuple[str, ...]) -> Batch:
        """Makes what the phases of a step share, once, before its first phase; `trains`: the roles of that phase."""
        return batch

    def after(self, nets: Nets, phase: Phase, step: int) -> None:
        """Runs after an update, without gradients. It may depend on the networks and the step only."""

    def calls(self, net: Any) -> tuple[Call, ...]:
        """The calls of the trained few-step generator, from noise to clean; () for a diffusion model, which a solver
        samples in `heun_steps`. net: the student, which tells its schedule."""
        return ()

    @property
    def heun_steps(self) -> int:
        """Steps of Heun's solver that sample a student without `calls`."""
        return 18

    @property
    def roles(self) -> tuple[str, ...]:
        """The roles that train, sorted."""
        return tuple(sorted({role for phase in self.phases() for role in phase.trains}))

    @property
    def known_roles(self) -> tuple[str, ...]:
        """Every role that other settings of this method would train: a recipe may set their optimisers all the same."""
        return self.roles


class Trajectory(Method):
    """Base of methods whose student learns the teacher's trajectories. A subclass gives `loss` and `calls`."""

    guidance: Annotated[float, Field(ge=1)] = 1.0
    """Guidance scale of the teacher, and of the samples."""
    guidance_range: Range[Annotated[float, Field(ge=1)]] | None = None
    """Guidance scales of the teacher, drawn uniformly; the student gets them as an input and samples at `guidance`.
    null trains at `guidance` alone, without the input."""

    @property
    def inputs(self) -> tuple[str, ...]:
        """Names of the further scalars that the student gets."""
        return () if self.guidance_range is None else ("guidance",)

    def nets(self, make: Make) -> dict[str, nn.Module]:
        return {"teacher": make.teacher, "student": make.copy("student", self.inputs)}

    def phases(self) -> tuple[Phase, ...]:
        return (Phase("student", ("student",), self.loss),)

    @abstractmethod
    def loss(self, nets: Nets, batch: Batch) -> tuple[Terms, Terms]:
        """The student's terms and health signals, as `Phase` has them."""

    def scale(self, draws: Draws, count: int) -> float | Tensor:
        """The teacher's guidance scale: one number, or (B,) drawn from the range."""
        if self.guidance_range is None:
            return self.guidance
        low, high = self.guidance_range
        return low + (high - low) * draws.uniform("guidance", count)

    def teacher(self, nets: Nets, scale: float | Tensor, null: Any) -> Callable[..., Tensor]:
        """The guided teacher, (x_t, level, cond) -> x0."""
        return lambda x_t, level, cond: guided(nets["teacher"], x_t, level, cond, scale, null)

    def with_scalars(self, net: nn.Module, scale: float | Tensor, **more: Tensor) -> Callable[..., Tensor]:
        """A network of the student's kind that gets the scale, and `more` scalars (B,) by name."""
        extra = more if self.guidance_range is None else {"guidance": scale} | more
        return partial(net, extra=extra) if extra else net

    def at_guidance(self, calls: tuple[Call, ...], **more: float) -> tuple[Call, ...]:
        """The calls, which give the student the samples' guidance scale, and `more` scalars by name."""
        extra = more if self.guidance_range is None else {"guidance": self.guidance} | more
        return tuple(replace(call, extra=extra) for call in calls) if extra else calls
