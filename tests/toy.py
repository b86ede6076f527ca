"""A toy whose truth is known: an analytic Gaussian mixture as teacher and data, and networks small enough for a test.

Images are (B, D, 1, 1): points of the plane in the shape that the library trains on.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from pathlib import Path

import torch
from torch import Tensor, nn

from fewstep.diffusion.draws import Draws
from fewstep.diffusion.level import Level
from fewstep.diffusion.samplers import ddim, run_calls
from fewstep.diffusion.schedules import EDM, Schedule
from fewstep.diffusion.tangent import TRIG
from fewstep.engine.guard import Guard
from fewstep.engine.optim import Optim
from fewstep.engine.train import Engine, Train
from fewstep.engine.world import World
from fewstep.methods import METHODS, Method
from fewstep.networks.conditions import Labels, Nothing
from fewstep.networks.denoiser import Denoiser
from fewstep.networks.pretrained import new_head, variant_of

CORNERS = [[0.6, 0.6], [-0.6, 0.6], [0.6, -0.6], [-0.6, -0.6]]
DATA_STD = 0.6
PARTS = ((0, 2), (1, 3))


class Mixture(nn.Module):
    """The exact denoiser E[x0 | x_t] of equally likely isotropic Gaussians, with the interface of a Denoiser.

    means: (K, D). With `classes` label k is the k-th Gaussian alone and label K the whole mixture.
    """

    def __init__(self, means: Sequence = CORNERS, std: float = 0.1, schedule: Schedule | None = None, labelled=False):
        super().__init__()
        self.means = nn.Parameter(torch.as_tensor(means, dtype=torch.float32))
        self.std, self.schedule = std, schedule or EDM()
        self.classes = len(means) if labelled else None
        self.shape = (self.means.shape[1], 1, 1)

    def sample(self, count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
        """Images (count, D, 1, 1) and the Gaussians they come from (count,)."""
        generator = torch.Generator().manual_seed(seed)
        labels = torch.randint(len(self.means), (count,), generator=generator)
        noise = torch.randn(count, self.means.shape[1], generator=generator)
        return (self.means.detach()[labels] + self.std * noise)[..., None, None], labels

    def log_likelihoods(self, x_t: Tensor, level: Level) -> Tensor:
        """log N(x_t; alpha mean_k, alpha^2 std^2 + sigma^2), (B, K), in float64."""
        a, s = level.alpha.double().view(-1, 1), level.sigma.double().view(-1, 1)
        var = (a * self.std) ** 2 + s**2
        square = ((x_t.double().flatten(1)[:, None] - a[..., None] * self.means) ** 2).sum(-1)
        return -0.5 * square / var - 0.5 * x_t[0].numel() * (2 * torch.pi * var).log()

    def log_density(self, x_t: Tensor, level: Level) -> Tensor:
        """log of the noised density at x_t, (B,) float64."""
        return self.log_likelihoods(x_t, level).logsumexp(1) - math.log(len(self.means))

    @property
    def conditions(self):
        return Nothing() if self.classes is None else Labels(self.classes, self.classes)

    def forward(self, x_t: Tensor, level: Level, cond: Tensor | None = None, mode: str = "x0", *, at=("middle",)):
        logs = self.log_likelihoods(x_t, level)
        if mode == "features":
            return (logs.float()[..., None, None],)
        if self.classes is not None and cond is not None:
            alone = nn.functional.one_hot(cond, self.classes + 1)[:, :-1].bool()
            logs = torch.where(alone | (cond == self.classes)[:, None], logs, -torch.inf)
        a, s = level.alpha.double().view(-1, 1, 1), level.sigma.double().view(-1, 1, 1)
        shrink = a * self.std**2 / ((a * self.std) ** 2 + s**2)
        each = self.means + shrink * (x_t.double().flatten(1)[:, None] - a * self.means)
        x0 = (logs.softmax(1)[..., None] * each).sum(1).to(x_t.dtype).view_as(x_t)
        return (x0, (logs.float()[..., None, None],)) if mode == "both" else x0


# Its Gaussians overlap a little: from a student that knows the mean alone, reverse KL drops modes that lie far apart.
OVERLAPPING = Mixture(std=0.3)


class ExactMap(nn.Module):
    """The teacher's own map from any level to its endpoint, for data N(mean, std^2) per value: the affine solution of
    the probability-flow ODE, mean + std (x - alpha mean) / sqrt(alpha^2 std^2 + sigma^2)."""

    def __init__(self, mean: Sequence[float], std: float, schedule: Schedule | None = None):
        super().__init__()
        self.mean = nn.Parameter(torch.tensor(mean).view(1, -1, 1, 1))
        self.std, self.schedule = std, schedule or EDM()

    def forward(self, x: Tensor, level: Level, cond=None, extra=None) -> Tensor:
        scale = ((level.alpha * self.std) ** 2 + level.sigma**2).sqrt()
        return self.mean + self.std * (x - level.alpha * self.mean) / scale


class MLP(nn.Module):
    """A backbone with an encoder and a decoder, so that it has a bottleneck, its one tap."""

    time_width = 48

    def __init__(self, dim: int = 2, width: int = 48, classes: int | None = None):
        super().__init__()
        self.shape, self.classes = (dim, 1, 1), classes
        self.encoder = nn.Sequential(nn.Linear(dim + 9, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU())
        self.decoder = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, dim))
        self.label = nn.Embedding(classes + 1, width) if classes else None

    def forward(self, x: Tensor, time: Tensor, cond: Tensor | None, mode: str, at=("middle",), shift=None):
        waves = [g(k * time) for k in (1, 2, 4, 8) for g in (torch.sin, torch.cos)]
        features = self.encoder(torch.cat([x.flatten(1), torch.stack([time, *waves], 1)], 1))
        if self.label is not None:
            features = features + self.label(torch.full_like(time, self.classes).long() if cond is None else cond)
        if shift is not None:
            features = features + shift
        maps = (features[..., None, None],) * len(at)
        if mode == "features":
            return maps
        out = self.decoder(features).view_as(x)
        return (out, maps) if mode == "both" else out


class Head(nn.Module):
    """Features of one tap, ((B, F, 1, 1),) -> logits (B,)."""

    def __init__(self, width: int = 48):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, 1))

    def forward(self, features: tuple[Tensor, ...]) -> Tensor:
        return self.layers(features[0].flatten(1)).flatten()


class Reward(nn.Module):
    """A score of how well an image fits its label, (x, labels) -> (B,): here minus its distance to one mean a label."""

    def forward(self, x: Tensor, cond: Tensor | None) -> Tensor:
        means = torch.tensor(CORNERS)
        means = means.mean(0) if cond is None else means[cond]
        return -(x.flatten(1)[:, :2] - means).square().sum(1)


class Feed:
    """Batches drawn from a mixture: a function of the position, whoever reads it."""

    def __init__(self, mixture: Mixture):
        self.mixture = deepcopy(mixture)  # an engine may shard the parameters of the one it is given

    def batches(self, position: int, batch: int, rank: int = 0, world: int = 1) -> Iterator[dict[str, Tensor]]:
        while True:
            images, labels = self.mixture.sample(batch, seed=position + 1)
            noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(position))
            yield {"real": images[rank::world], "label": labels[rank::world], "noise": noise[rank::world]}
            position += batch


class FixedDraws:
    """Draws of the noise between a generator's calls, in turn, as given."""

    def __init__(self, noise: Sequence[Tensor] = ()):
        self.noise = list(noise)

    def normal(self, name: str, shape) -> Tensor:
        return self.noise.pop(0)


def denoiser(seed: int = 0, schedule: Schedule | None = None, prediction: str = "edm", **kwargs) -> Denoiser:
    """A network with random weights, the same for a seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        time_scale = 1e-3 if getattr(schedule, "name", "edm") == "ddpm" else 1.0
        return Denoiser(MLP(**kwargs), schedule or EDM(), prediction, DATA_STD, time_scale)


def head(seed: int = 0) -> Head:
    """A GAN head with random weights, the same for a seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Head()


class Make:
    """Networks for a method's roles: copies of `start`, by default with random weights."""

    def __init__(self, start: nn.Module | None = None, teacher: nn.Module | None = None):
        self.start, self.teacher = start or denoiser(), teacher or Mixture()

    def copy(self, role: str, extra: tuple[str, ...] = ()) -> nn.Module:
        return deepcopy(self.start).add_extra(*extra)

    def variant(self, role: str, time_scale: float, qk_norm: bool) -> nn.Module:
        return variant_of(self.start, time_scale, qk_norm)

    def head(self, role: str, at: tuple[str, ...] = ("middle",)) -> nn.Module:
        return head() if isinstance(self.start.backbone, MLP) else new_head(self.start, at)

    def helper(self, name: str) -> nn.Module:
        return Reward() if name == "reward" else deepcopy(self.teacher)

    def run(self, folder: str) -> nn.Module:
        """A network of its own for each folder: the teacher with scaled weights."""
        net = deepcopy(self.teacher)
        with torch.no_grad():
            for p in net.parameters():
                p *= 0.5 + 0.1 * len(folder)
        return net

    def method(self, folder: str) -> Method:
        """The second of two students whose parts are the even and the odd of four classes."""
        return METHODS["msd"](parts=PARTS, number=1)


def make_engine(
    method: Method | str = "dmd2",
    *,
    teacher: nn.Module | None = None,
    start: nn.Module | None = None,
    lr: dict[str, float] | None = None,
    world: World | None = None,
    folder: Path | None = None,
    seed: int = 0,
    data: Mixture | None = None,
    optim: dict | None = None,
    guard: Guard | None = None,
    **train,
) -> Engine:
    """An engine on the toy; the student and the critic start as `start`, by default random weights."""
    method = METHODS[method]() if isinstance(method, str) else method
    teacher = teacher or Mixture()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # of heads and embeddings
        nets = {"teacher": teacher} | method.nets(Make(start, teacher))
    rates = {"student": 1e-3, "fake": 1e-3, "disc": 1e-3} | (lr or {})
    optims = {role: Optim(lr=rates.get(role, 1e-3), **(optim or {})) for role in method.roles}
    settings = Train(**{"steps": 10, "batch": 16, "report_every": 5, "save_every": 10} | train)
    feed = Feed(data or teacher)
    return Engine(
        method, nets, optims, feed, settings, seed=seed, world=world, folder=folder, recipe={"toy": 1}, guard=guard
    )


def finish(engine: Engine) -> list[dict[str, float]]:
    """Runs an engine to its end; the metrics of its reports without the seconds."""
    timed = ("_s", "images_per_s", "data_wait")
    return [{k: v for k, v in r.metrics.items() if not k.endswith(timed)} for r in engine.run()]


def weights(net: nn.Module) -> dict[str, Tensor]:
    """A copy of a network's parameters and buffers."""
    return {k: v.detach().clone() for k, v in net.state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    """Bit for bit."""
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def map_error(sample: Callable[[Tensor], Tensor], teacher: Mixture, count: int = 2000) -> float:
    """RMS distance of sample(z) to the teacher's endpoint for the same noise, as a share of its four Euler steps'."""
    z = torch.randn(count, *teacher.shape, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        endpoint, euler = (ddim(teacher, z, None, steps, TRIG) for steps in (100, 4))
        errors = [(x - endpoint).square().mean().sqrt() for x in (sample(z), euler)]
    return (errors[0] / errors[1]).item()


def student_map_error(engine: Engine, teacher: Mixture) -> float:
    """`map_error` of an engine's trained student, sampled as its method does."""
    calls = engine.method.calls(engine.student)
    return map_error(lambda z: run_calls(engine.sampling, calls, z, None, Draws(0, 0)), teacher)


def energy(a: Tensor, b: Tensor) -> float:
    """Energy distance of two samples (Szekely & Rizzo 2013): 0 when and only when the distributions are equal."""
    a, b = a.flatten(1), b.flatten(1)
    between, within = torch.cdist(a, b).mean(), torch.cdist(a, a).mean() + torch.cdist(b, b).mean()
    return (2 * between - within).item()
