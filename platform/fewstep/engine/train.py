"""The loop: phases, one optimiser a role, the average, checkpoints, and a report every so many steps."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, Protocol

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from ..config import Strict, UserError
from ..diffusion.draws import Draws
from ..diffusion.losses import finite
from ..methods.base import Batch, Method, Phase, Terms
from ..networks.average import Constant, Exponential, Power, Profile, average
from ..storage.place import Ref
from ..texts import one_line, quoted
from .checkpoint import load
from .folder import checkpoints, step_of
from .guard import Alarm, Guard, Watch
from .manifest import AGAIN, CheckpointError
from .optim import Optim, grad_norms
from .retention import Keep
from .saver import Saver
from .world import Kind, World


class Train(Strict):
    """Length, batch, and what is saved when. A step is one critic update."""

    steps: Annotated[int, Field(ge=1)]
    """Steps of the run."""
    batch: Annotated[int, Field(ge=1)] = 32
    """Global batch: images a step, over all workers."""
    accumulate: Annotated[int, Field(ge=1)] = 1
    """Micro-batches a worker's share is cut into; the numbers stay those of one batch."""
    average_decay: Annotated[float, Field(ge=0, lt=1)] | None = 0.98
    """Decay a student update of the exponential average, the network that is scored and exported; null averages
    nothing."""
    average_std: Annotated[float, Field(gt=0, lt=0.28)] | None = None
    """Instead of average_decay: EDM2's power-function average of this relative width."""
    report_every: Annotated[int, Field(ge=1)] = 50
    """Steps between reports."""
    save_every: Annotated[int, Field(ge=1)] = 500
    """Steps between checkpoints; a multiple of report_every. The last step is always saved."""
    keep: Annotated[int, Field(ge=1)] = 2
    """Newest checkpoints kept."""
    keep_best: Annotated[int, Field(ge=0)] = 0
    """Best checkpoints kept beside the newest."""
    keep_best_by: str | None = None
    """The score that says which are best, one of evaluate.metrics."""
    keep_best_mode: Literal["min", "max"] = "min"
    """Direction of the score: min where low is good, max where high is good."""
    keep_every_images: Annotated[int, Field(ge=1)] | None = None
    """Keep for ever the first checkpoint after each multiple of so many images."""

    @model_validator(mode="before")
    @classmethod
    def _one_average(cls, data: Any) -> Any:
        given = isinstance(data, dict) and data.get("average_std") is not None
        if given and data.get("average_decay") is not None:
            raise ValueError(
                f"train.average_std: {quoted(data['average_std'])}, and average_decay is "
                f"{quoted(data['average_decay'])}; a run has one average, so set one of them to null"
            )
        return {**data, "average_decay": None} if given else data

    @property
    def profile(self) -> Profile | None:
        if self.average_std is not None:
            return Power(self.average_std)
        return None if self.average_decay is None else Exponential(self.average_decay)


class Feed(Protocol):
    """Rows of data from a position on, by column: "real" are images or latents; see data/feed.py."""

    def batches(self, position: int, batch: int, rank: int, world: int) -> Iterator[Mapping[str, Any]]: ...


class NoData:
    """The feed of a method that trains on conditions alone. rows: of data, none."""

    rows = 0

    def __enter__(self) -> NoData:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def batches(self, position: int, batch: int, rank: int, world: int) -> Iterator[Mapping[str, Any]]:
        """Rows without columns, without end."""
        while True:
            yield {}


@dataclass(frozen=True)
class Event:
    """Something that a person should know of a run. kind: collapse, roll_back, ...; step: the one it speaks of."""

    kind: str
    step: int
    reason: str


@dataclass(frozen=True)
class Report:
    """Metrics and events since the last report.

    images: real images seen so far. checkpoint: of this step, which may still be on its way to the disk, or None.
    After an event of kind roll_back, training goes on from that event's step.
    """

    step: int
    images: int
    metrics: dict[str, float]
    checkpoint: Ref | None = None
    events: tuple[Event, ...] = ()


class NonFinite(FloatingPointError):
    """A loss or a gradient was not finite; no optimiser stepped from that phase on, on any rank."""


class Collapsed(UserError, RuntimeError):
    """The student collapsed, and the guard's policy, or its patience, says to stop."""


@dataclass
class Meter:
    """Sums of named 0-d tensors, kept on the device and read once a report."""

    device: torch.device
    sums: dict[str, Tensor] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)

    def add(self, values: Mapping[str, Tensor]) -> None:
        for name, value in values.items():
            value = value.detach().double()
            self.sums[name] = self.sums[name] + value if name in self.sums else value
            self.counts[name] = self.counts.get(name, 0) + 1

    def read(self, world: World) -> dict[str, float]:
        """Means over steps and ranks; the one place where the host waits for the device. Starts anew."""
        if not self.sums:
            return {}
        names = sorted(self.sums)
        means = torch.stack([self.sums[n] / self.counts[n] for n in names]).to(self.device)
        means = world.mean(means).tolist()
        self.sums, self.counts = {}, {}
        return dict(zip(names, means, strict=True))


class Clock:
    """Seconds by name: device events on CUDA, read once a report; the wall clock elsewhere."""

    def __init__(self, device: torch.device):
        self.cuda = device.type == "cuda"
        self.marks: list[tuple[str, Any, Any]] = []

    def now(self) -> Any:
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def lap(self, name: str, since: Any) -> Any:
        now = self.now()
        self.marks.append((name, since, now))
        return now

    def read(self) -> dict[str, float]:
        if self.cuda and self.marks:
            self.marks[-1][2].synchronize()
        out: dict[str, float] = {}
        for name, a, b in self.marks:
            out[name] = out.get(name, 0.0) + (a.elapsed_time(b) / 1000 if self.cuda else b - a)
        self.marks = []
        return out


class Delayed:
    """A number on the device that the host reads one step later, when the copy has arrived, so that nothing waits."""

    def __init__(self, device: torch.device):
        self.cuda = device.type == "cuda"
        self.hosts = [torch.zeros((), pin_memory=self.cuda) for _ in range(2)]
        self.arrived = [torch.cuda.Event() for _ in range(2)] if self.cuda else []
        self.count = 0

    def put(self, value: Tensor) -> float:
        """Sends this step's number and returns the step's before it; 0 at first."""
        here, before = self.count % 2, (self.count + 1) % 2
        self.hosts[here].copy_(value, non_blocking=True)
        if self.cuda:
            self.arrived[here].record()
            if self.count:
                self.arrived[before].synchronize()
        self.count += 1
        return self.hosts[before].item() if self.count > 1 else 0.0


STOP, SAVE_FAILED = 1, 2  # requests of one rank to all; the largest counts


class Engine:
    """Trains a method's networks.

    nets: every role's network, the frozen ones among them, as made (the engine places them on the world's devices and
    adds the averaged ones). optims: settings for each role that trains. feed: rows of data. seed: of all randomness,
    with the step.
    folder: path or URL where checkpoints go; None saves none. recipe: what decides the numbers, kept in checkpoints; a
    resume refuses another one, but for the dotted keys in `resume_allow`.
    """

    def __init__(
        self,
        method: Method,
        nets: Mapping[str, nn.Module],
        optims: Mapping[str, Optim],
        feed: Feed | None,
        train: Train,
        *,
        seed: int = 0,
        world: World | None = None,
        folder: Ref | None = None,
        recipe: Mapping[str, Any] | None = None,
        resume_allow: Iterable[str] = (),
        guard: Guard | None = None,
    ):
        self.method, self.settings, self.feed, self.train = method, dict(optims), feed or NoData(), train
        self.world = world = world or World()
        self.seed, self.folder, self.step = seed, folder, 0
        self.recipe, self.resume_allow = dict(recipe or {}), tuple(resume_allow)
        if train.batch % (world.size * train.accumulate):
            share = f"workers x accumulate = {world.size} x {train.accumulate}"
            raise ValueError(f"train.batch: {train.batch} is not a multiple of {share}")
        for role in method.roles:
            if role not in nets:
                raise ValueError(f"{role}: no such network; {method.tag} has {', '.join(nets)}")
        self.shape, self.conditions = tuple(nets["student"].shape), nets["student"].conditions
        self.averages = {role: (source, Constant(decay)) for role, (source, decay) in method.averages().items()}
        if train.profile is not None:
            self.averages["average"] = ("student", train.profile)
        # averaged copies are made before placement: a sharded module cannot be copied
        copies = {role: deepcopy(nets[source]) for role, (source, _) in self.averages.items()}
        self.nets = {role: world.place(net, self._kind(role)) for role, net in (dict(nets) | copies).items()}
        for net in self.nets.values():
            net.eval()  # dropout stays off for all, as published
            net.requires_grad_(False)
        for role in method.roles:
            if role not in self.settings:
                raise ValueError(f"optim.{role}: missing; {method.tag} trains {', '.join(method.roles)}")
        self.optims = {role: self.settings[role].build(self.nets[role]) for role in method.roles}
        self.meter, self.clock = Meter(world.device), Clock(world.device)
        self.bad = torch.zeros((), device=world.device)  # 1 from the first phase that was not finite
        self.bad_at = torch.zeros((), device=world.device, dtype=torch.int64)
        self.updates = dict.fromkeys((p.name for p in method.phases()), 0)
        self.rates = dict.fromkeys(method.roles, 1.0)  # factors on the learning rates, which roll-backs lower
        self.roll_backs = 0
        self.watch = None if guard is None or guard.policy == "off" else Watch(guard)
        slowest = max(phase.every for phase in method.phases())
        self.look_every = 0 if self.watch is None else guard.steps(train.batch, slowest)
        rolls = self.watch is not None and guard.policy == "roll_back"
        keep = Keep(
            last=train.keep,
            best=train.keep_best,
            every_images=train.keep_every_images,
            higher=train.keep_best_mode == "max",
            back_steps=guard.window * self.look_every if rolls else 0,  # as far back as an alarm may date the trouble
        )
        self.saver = None if folder is None else Saver(folder, world, keep)
        self.health = Meter(world.device)  # signals of the guard, between reports
        self.stopping = False
        self.request = torch.zeros((), device=world.device)  # the largest request of all ranks
        self.delayed_request = Delayed(world.device)
        self.place, self.place_since = "set-up", time.monotonic()

    def _kind(self, role: str) -> Kind:
        return "trained" if role in self.method.roles else "averaged" if role in self.averages else "frozen"

    @property
    def images(self) -> int:
        """Images seen so far, by all ranks; also the position in the data."""
        return self.step * self.train.batch

    @property
    def student(self) -> nn.Module:
        """The network to score and export: the average where there is one."""
        return self.nets.get("average", self.nets["student"])

    @property
    def sampling(self) -> dict[str, nn.Module]:
        """The networks that sample: every role's, the student's averaged where there is an average."""
        return self.nets | {"student": self.student}

    @property
    def finished(self) -> bool:
        """True when the last step is done."""
        return self.step >= self.train.steps

    def stop(self) -> None:
        """Asks all ranks to finish the step at hand, save and end; any rank and any thread may ask."""
        self.stopping = True

    def heartbeat(self, place: str) -> None:
        """Records the place where this rank is, and the time; the watchdog reads both."""
        self.place, self.place_since = place, time.monotonic()

    def run(self) -> Iterator[Report]:
        """Trains to the last step, or to a stop, yielding a report every `report_every` steps and at the end.

        Raises NonFinite, Collapsed, and CheckpointError where a checkpoint could not be written; on all ranks together.
        """
        train = self.train
        if self.step == 0 and self.folder and self.watch is not None and self.watch.guard.policy == "roll_back":
            self.save()  # there is always a place to go back to
        stream = self._stream()
        wall, waited_s, seen = time.perf_counter(), 0.0, 0
        while not self.finished:
            self.heartbeat(f"step {self.step}, waiting for data")
            start = time.perf_counter()
            rows = next(stream)
            waited_s += time.perf_counter() - start
            self.update(rows)
            seen += train.batch
            stops = self._stop_requested()
            alarm = self._check_guard()
            if not (self.finished or stops or alarm or self.step % train.report_every == 0):
                continue
            metrics = self.read()
            now = time.perf_counter()
            metrics |= {"images_per_s": seen / (now - wall), "data_wait": waited_s / (now - wall)}
            metrics |= self._corrupt_rows()
            step, images, path = self.step, self.images, None
            events = () if alarm is None else self._apply_policy(alarm)
            if self.step < step:  # rolled back
                stream.close()
                stream = self._stream()
            elif self.folder and (self.finished or stops or self.step % train.save_every == 0):
                path = self.save()
            if self.finished or stops:
                self.wait()
            yield Report(step, images, metrics, path, events)
            if stops:
                return
            wall, waited_s, seen = time.perf_counter(), 0.0, 0

    def _stream(self) -> Iterator[Mapping[str, Any]]:
        return self.feed.batches(self.images, self.train.batch, self.world.rank, self.world.size)

    def _corrupt_rows(self) -> dict[str, float]:
        """Rows that had to be replaced so far, on all ranks; of feeds that count them."""
        rows = getattr(self.feed, "corrupt_rows", None)
        if rows is None:
            return {}
        mean = self.world.mean(torch.tensor(float(rows), device=self.world.device))
        return {"corrupt_rows": mean.item() * self.world.size}

    def _stop_requested(self) -> bool:
        """True when all ranks agreed on a stop in the step before. No rank waits for its device to know."""
        request = self.delayed_request.put(self.request)
        if request == SAVE_FAILED:
            self.wait()
        return request == STOP

    def update(self, rows: Mapping[str, Any]) -> None:
        """One step on this rank's share of a batch, by column: "real" (B, C, H, W) in codec range, "label" (B,), ..."""
        self._reshard()
        micro, ran = self._micro(rows), set()
        for index, phase in enumerate(self.method.phases()):
            if (self.step - phase.first) % phase.every or phase.unless in ran:
                continue
            mark = self.clock.now()
            self.heartbeat(f"step {self.step}, phase {phase.name}")
            for role, net in self.nets.items():
                wanted, first = role in phase.trains, next(net.parameters(), None)
                if first is not None and first.requires_grad != wanted:
                    net.requires_grad_(wanted)
            means = self._measure(phase, micro, prepared=bool(ran))
            losses = []
            for i, batch in enumerate(micro):
                if not ran and not (means and len(micro) == 1):
                    batch = self.method.prepare(self.nets, batch, phase.trains)
                terms, health = phase.loss(self.nets, batch.make(**means) if means else batch)
                loss = sum(terms.values())
                (loss / len(micro)).backward()
                losses.append(loss.detach())
                micro[i] = batch.detached()
                health = {f"health/{k}": v for k, v in health.items()}
                self.meter.add({f"{phase.name}/{k}": v for k, v in terms.items()} | health)
                if self.watch is not None:
                    self.health.add(health)
            self._reshard()
            self._optimise(index, phase, losses)
            ran.add(phase.name)
            self._after_update(phase)
            self.clock.lap(f"{phase.name}_s", mark)
            self.updates[phase.name] += 1
        self.step += 1

    def _after_update(self, phase: Phase) -> None:
        """Runs after an update: the averages of the roles that it trained, then the method's own rule."""
        for role, (source, profile) in self.averages.items():
            if source in phase.trains:
                average(self.nets[role], self.nets[source], profile.decay_at(self.updates[phase.name]))
        with torch.no_grad():
            self.method.after(self.nets, phase, self.step)

    def _measure(self, phase: Phase, micro: list[Batch], prepared: bool) -> dict[str, Tensor]:
        """The phase's measures, averaged over the global batch. A single micro-batch keeps the graph of what was
        prepared for it; several are prepared again, each when its loss is due."""
        if phase.measure is None:
            return {}
        measures: list[Terms] = []
        for i, batch in enumerate(micro):
            if not prepared:
                batch = self.method.prepare(self.nets, batch, phase.trains if len(micro) == 1 else ())
            with torch.no_grad():
                means, own = phase.measure(self.nets, batch)
            measures.append(means)
            micro[i] = (batch if prepared or len(micro) == 1 else micro[i]).make(**own)
        names = sorted(measures[0])
        means = torch.stack([torch.stack([f[name].detach() for f in measures]).mean() for name in names])
        return {f"mean/{n}": v for n, v in zip(names, self.world.mean(means.to(self.world.device)), strict=True)}

    def _reshard(self) -> None:
        """All networks as `World.place` laid them out, whoever called them last."""
        for net in self.nets.values():
            self.world.reshard(net)

    def _micro(self, rows: Mapping[str, Any]) -> list[Batch]:
        """The step's micro-batches. Sample k of the global batch gets the same draws whoever holds it: part p of n has
        the samples k = p modulo n, of the data and of the noise alike."""
        world, n, count = self.world, self.train.accumulate, self.train.batch // self.world.size
        rows = {k: v.to(world.device, non_blocking=True) if isinstance(v, Tensor) else v for k, v in rows.items()}
        out = []
        for i in range(n):
            draws = Draws(self.seed, self.step, i * world.size + world.rank, n * world.size, world.device)
            mine = {name: values[i::n] for name, values in rows.items()}
            real = mine.pop("real", None)
            out.append(
                Batch(
                    real=real,
                    real_cond=None if real is None else self.conditions.of(mine),
                    z=draws.normal("z", (count // n, *self.shape)),
                    cond=self.conditions.draw(draws, count // n, mine),
                    draws=draws,
                    conditions=self.conditions,
                    progress=self.step / self.train.steps,
                    rows=mine,
                )
            )
        return out

    def _optimise(self, index: int, phase: Phase, losses: list[Tensor]) -> None:
        """Clips and steps the phase's optimisers, unless something is not finite; then, and ever after, none steps.

        The decision stays on the device (`found_inf` cancels a fused update), so the host need not wait for it.
        """
        norms = grad_norms((self.nets[r] for r in phase.trains), self.world.device)
        norm = norms[0] if len(norms) == 1 else torch.linalg.vector_norm(norms)
        # one reduction carries the flag of non-finite values and the requests of the ranks
        own = SAVE_FAILED if self.saver and self.saver.failed else STOP if self.stopping else 0
        bad, self.request = self.world.any(torch.stack([(~finite(norm, *losses)).float(), torch.full_like(norm, own)]))
        first = (bad > 0) & (self.bad == 0)
        self.bad_at = torch.where(first, self.step * len(self.updates) + index, self.bad_at)
        self.bad = torch.maximum(self.bad, bad)
        for role, own_norm in zip(phase.trains, norms, strict=True):
            settings, optim = self.settings[role], self.optims[role]
            for group in optim.param_groups:
                group["lr"] = settings.rate_at(self.step, self.train.steps) * self.rates[role]
            if settings.clip is not None:
                optim.grad_scale = ((own_norm + 1e-6) / settings.clip).clamp(min=1.0)  # gradients are divided by it
            optim.found_inf = self.bad
            optim.step()
            optim.zero_grad(set_to_none=True)
        self.meter.add({f"{phase.name}/grad_norm": norm})

    def read(self) -> dict[str, float]:
        """Metrics since the last report. Raises NonFinite, on all ranks together, naming step, phase and term."""
        metrics = self.meter.read(self.world)
        if self.bad.item():
            step, index = divmod(int(self.bad_at), len(self.updates))
            phase = self.method.phases()[index]
            terms = [k for k, v in metrics.items() if k.startswith(f"{phase.name}/") and not math.isfinite(v)]
            what = ", ".join(terms) or "the loss"
            raise NonFinite(
                f"step {step}, phase {phase.name}: {what} not finite; the weights are those before it. "
                + self._cure(step, phase)
            )
        metrics |= self.clock.read()
        return metrics | {f"updates/{name}": float(n) for name, n in self.updates.items()}

    def _cure(self, step: int, phase: Phase) -> str:
        """Advice after a value that was not finite in a phase of `step`, by what can have caused it; a collective."""
        local = lambda p: p.to_local() if hasattr(p, "to_local") else p
        nets = {role: net for role, net in self.nets.items() if role not in self.averages}
        broken = [any(not local(p).isfinite().all() for p in net.parameters()) for net in nets.values()]
        broken = self.world.any(torch.tensor(broken, dtype=torch.float32, device=self.world.device)).tolist()
        if any(broken):
            roles = ", ".join(role for role, bad in zip(nets, broken, strict=True) if bad)
            return f"Weights of {roles} are not finite themselves: give another teacher or start"
        if step == 0:
            return "No update came before it, so no learning rate caused it: look at the data, the teacher and start"
        rates = f"Lower {' or '.join(f'optim.{role}.lr' for role in phase.trains)}"
        bf16 = any(getattr(net, "precision", "fp32") == "bf16" for net in self.nets.values())
        return rates + (", or set precision=fp32" if bf16 else "")

    # The guard

    def _check_guard(self) -> Alarm | None:
        """The guard's alarm, or None; asked every `look_every` steps. All ranks get the same."""
        if self.watch is None or self.step % self.look_every:
            return None
        return self.watch.check(self.step, self.health.read(self.world))

    def _apply_policy(self, alarm: Alarm) -> tuple[Event, ...]:
        """Applies the guard's policy to an alarm. Raises Collapsed."""
        policy, collapse = self.watch.guard.policy, Event("collapse", alarm.step, alarm.reason)
        cure = self.method.cure
        if policy == "warn":
            return (collapse,)
        if policy == "stop":
            raise Collapsed(f"step {alarm.step}: {alarm.reason}. {cure}, or choose failure.collapse.policy=roll_back")
        if self.roll_backs == self.watch.guard.max_roll_backs:
            raise Collapsed(f"step {alarm.step}: {alarm.reason}, after {self.roll_backs} roll-backs. {cure}")
        return collapse, self._roll_back(alarm)

    def _roll_back(self, alarm: Alarm) -> Event:
        """Back to the newest checkpoint from before the trouble, with a lower rate for the student."""
        if self.folder is None:
            raise Collapsed(f"step {alarm.step}: {alarm.reason}, and without a folder there is nothing to go back to")
        self.wait()
        older = [path for path in checkpoints(self.folder) if step_of(path) < max(alarm.since, 1)]
        if not older:
            raise Collapsed(f"step {alarm.step}: {alarm.reason}, and no checkpoint is older. {self.method.cure}")
        rate, roll_backs = self.rates["student"] * self.watch.guard.rate, self.roll_backs + 1
        self.resume(older[-1])
        self.saver.remove_after(self.step)  # a restart must not go on from what was left behind
        self.rates["student"], self.roll_backs = rate, roll_backs
        self.watch.reset(self.step)
        lower = f"the student's rate is now {rate:g} of optim.student.lr"
        return Event("roll_back", self.step, f"from step {alarm.step} to the checkpoint of step {self.step}; {lower}")

    # State

    def _parts(self) -> dict[str, nn.Module]:
        return {role: net for role, net in self.nets.items() if self._kind(role) != "frozen"}

    def save(self) -> Ref:
        """Begins to save everything this run needs to go on; a collective. Returns where the checkpoint will be."""
        self._reshard()
        manifest = self._progress() | {"images": self.images, "recipe": self.recipe}
        manifest |= {"watch": None if self.watch is None else self.watch.state}
        return self.saver.save(self._parts(), self.optims, manifest)

    def _progress(self) -> dict[str, Any]:
        """The state of a run beside its tensors."""
        return {"step": self.step, "updates": self.updates, "rates": self.rates, "roll_backs": self.roll_backs}

    def wait(self) -> None:
        """Waits until the last checkpoint is complete. Raises CheckpointError, on all ranks together."""
        if self.saver is not None:
            self.saver.wait()

    def resume(self, path: Ref) -> None:
        """Goes on from a checkpoint of the same recipe, exactly; a collective. Raises CheckpointError."""
        manifest = load(
            path, self._parts(), self.optims, self.world, self.recipe, self.resume_allow, progress=self._progress()
        )
        if not all(0 < rate <= 1 for rate in manifest["rates"].values()):
            raise CheckpointError(f"{path}: rates: {quoted(manifest['rates'])}, expected factors in (0, 1]; {AGAIN}")
        self.step, self.updates = manifest["step"], dict(manifest["updates"])
        self.rates, self.roll_backs = dict(manifest["rates"]), manifest["roll_backs"]
        if self.watch is not None and manifest.get("watch"):
            try:
                self.watch.load(manifest["watch"])
            except ValueError as error:
                raise CheckpointError(f"{path}: watch: {one_line(error)}; {AGAIN}") from None
