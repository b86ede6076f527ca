"""Recipe -> engine, samplers and metrics. Nothing here starts anything."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import partial
from io import BytesIO
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor, nn

from .config import ConfigError, Strict, read_json, resolve, resolve_ref, validate
from .data.feed import Feed, open_feed
from .data.shards import Shards, captions, latents, numbers, open_shards
from .diffusion.draws import Draws, Joined, fold
from .diffusion.guidance import guided
from .diffusion.level import Level
from .diffusion.samplers import Call, ddim, heun, run_calls, to_uint8
from .engine.checkpoint import load_net, read_weights
from .engine.folder import complete, newest
from .engine.manifest import read_manifest
from .engine.train import Engine, NoData
from .engine.world import World
from .files import sha256_of
from .folders import MADE_HERE, write_private
from .methods import Method
from .metrics.base import Measure, Samples
from .metrics.features import ClassReward, FeatureMaps, open_features
from .networks.codec import Codec, new_codec
from .networks.conditions import Conditions, Prompts, Texts
from .networks.denoiser import Denoiser
from .networks.latents import FOLDER as CODEC
from .networks.latents import find_latents
from .networks.lora import Lora, merge
from .networks.pretrained import (
    Network,
    empty_denoiser,
    locate,
    network_of,
    new_denoiser,
    new_head,
    open_teacher,
    variant_of,
)
from .networks.prompts import open_encoder, pipeline_class
from .networks.text import Clip, new_clip
from .networks.weights import fill, unread_of
from .recipe import Data, Recipe, Role, check_secrets, read_run
from .storage.cache import local
from .texts import one_line, quoted

log = logging.getLogger("fewstep.build")

DESCRIBED = "network.json"
SMALL = {"reward": ClassReward, "features": FeatureMaps}  # helpers that are files of jobs/features.py
LISTED = 1000  # captions of the data that scores and grids ask for, where a recipe names no prompts


def make_teacher(recipe: Recipe, weights: bool = True, filled: bool = True) -> Denoiser | Codec | Clip:
    """The recipe's teacher, or its new network with weights drawn from the recipe's seed.

    weights: without them the network is on the meta device. filled: see `open_teacher`; other teachers always are.
    Raises ValueError naming the file or field.
    """
    network = recipe.network
    if network is not None:
        torch.manual_seed(fold(recipe.seed, "weights"))
        if network.model == "AutoencoderKL":
            return new_codec(network.config, weights)
        if network.model == "CLIPModel":
            return new_clip(network.config, captions(recipe.data.path), weights)
        net = new_denoiser(network, recipe.precision, weights)
        net.codec = None if network.parts is None else find_latents(locate(network.parts))
    elif ((folder := locate(recipe.teacher)) / "recipe.yaml").is_file():  # a run's student is a teacher, too
        net = open_net(folder) if weights else make_teacher(read_run(folder), weights=False)
    else:
        net = open_teacher(recipe.teacher, recipe.precision, weights, filled)
    return furnish(net, recipe) if weights else net


def pipeline_folder(recipe: Recipe) -> Path | None:
    """The folder of the pipeline whose network a run distils, at the beginning of a chain of runs, or whose parts a new
    network works with; None without one."""
    while recipe.teacher is not None:
        folder = locate(recipe.teacher)
        if not (folder / "recipe.yaml").is_file():
            return folder
        recipe = read_run(folder)
    network = recipe.network
    return None if network is None or network.parts is None else locate(network.parts)


def furnish(net: Denoiser, recipe: Recipe) -> Denoiser:
    """The network itself, with what its teacher's pipeline has beside it: the codec, and the recipe's prompts in the
    text encoders' numbers. Raises ValueError naming the file or field."""
    folder = pipeline_folder(recipe)
    if folder is None:
        return net
    if not isinstance(net.conditions, Texts):
        return with_pipeline(net, folder)
    prompts = None if recipe.prompts is None else read_prompts(recipe.prompts, "prompts")
    listing = None if recipe.evaluate.prompts is None else read_prompts(recipe.evaluate.prompts, "evaluate.prompts")
    negatives = None if recipe.negatives is None else read_prompts(recipe.negatives, "negatives")
    with_pipeline(net, folder, prompts, listing, negatives)
    if prompts is None and listing is None and recipe.data is not None:
        shards = open_data(recipe.data)
        net.conditions = replace(net.conditions, listing=prompts_of(shards, tuple(net.conditions.shapes)))
    return net


def with_pipeline(
    net: Denoiser,
    folder: Path,
    prompts: Sequence[str] | None = None,
    listing: Sequence[str] | None = None,
    negatives: Sequence[str] | None = None,
) -> Denoiser:
    """The network itself, with the codec of a pipeline's folder, and with prompts where it takes texts: the text
    encoders are open for that alone. Raises ValueError naming what the folder lacks."""
    net.codec = find_latents(folder)
    if isinstance(net.conditions, Texts):
        encoder = open_encoder(folder, network_of(net).model)
        embed = lambda texts: None if texts is None else Prompts(encoder.columns(texts), tuple(texts))
        given = embed(prompts), encoder.nothing(), embed(listing), embed(negatives)
        net.conditions = Texts(net.conditions.shapes, *given)
        if encoder.cut:
            log.warning(f"prompts: {encoder.cut} are longer than the text encoder reads, and were cut there")
    return net


def subtract(net: Denoiser, folder: Path, negative: str, scale: float) -> None:
    """Makes the listed samples of a network of texts those less a negative prompt (networks/nasa.py). folder: of its
    pipeline. Raises ValueError for a network whose cross-attention is not known here."""
    check_subtracts(net, "negative")
    columns = open_encoder(folder, network_of(net).model).columns([negative])
    net.conditions = net.conditions.listing_without(columns, scale)


def check_subtracts(net: Denoiser, field: str) -> None:
    """Raises ValueError, naming the field, for a network that takes no negative prompts."""
    if not net.backbone.subtracts:
        raise ValueError(
            f"{field}: {network_of(net).model} takes none; negative prompts are subtracted in the cross-attention of "
            "Stable Diffusion 1.5 and 2.1, and SDXL"
        )


def read_prompts(ref: str, field: str) -> list[str]:
    """The prompts of a text file, one a line. Raises ValueError naming the field and the line."""
    path = resolve(ref)
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{field}: {str(path)!r} is no readable text file ({one_line(error)}); give one") from None
    if not lines:
        raise ValueError(f"{field}: {str(path)!r} is empty; give a prompt a line")
    for number, line in enumerate(lines, 1):
        if not line.strip():
            raise ValueError(f"{field}: {str(path)!r}: line {number} is empty; give a prompt, or remove the line")
    return lines


def given_prompts(given: list[str] | str | None) -> list[str] | None:
    """The prompts that a job was given: one, a list, or a .txt file. Raises ValueError for an empty one."""
    if isinstance(given, str):
        given = read_prompts(given, "prompts") if given.endswith(".txt") else [given]
    if given is not None and not all(text.strip() for text in given or [""]):
        raise ValueError(f"prompts: {given}, of which one is empty; give texts")
    return given


def listed_prompts(recipe: Recipe) -> list[str]:
    """The prompts that scores and grids ask for, as `furnish` chooses them; [] where none are known. Nothing is
    encoded."""
    for field, ref in (("evaluate.prompts", recipe.evaluate.prompts), ("prompts", recipe.prompts)):
        if ref is not None:
            return read_prompts(ref, field)
    if recipe.data is None or not (shards := open_data(recipe.data)).manifest.captions:
        return []
    return list(prompts_of(shards, ()).texts)


def prompts_of(shards: Shards, columns: Sequence[str], count: int = LISTED) -> Prompts:
    """The first embedded captions of a shard set. columns: their names. Raises ShardError for a column that is not
    there."""
    described = [shards.column(name) for name in columns]
    names, tables, rows = [*columns, *(["caption"] if shards.manifest.captions else [])], [], 0
    for unit, where in enumerate(shards.units):
        if rows < count:
            tables.append(shards.read(unit, columns=names))
            rows += where.rows
    arrays = {c.name: np.concatenate([numbers(table, c) for table in tables])[:count] for c in described}
    texts = [text for table in tables for text in table.column("caption").to_pylist()] if "caption" in names else []
    return Prompts({name: torch.from_numpy(values) for name, values in arrays.items()}, tuple(texts[:count]))


@dataclass
class Maker:
    """Makes a method's networks as its recipe says (methods/base.py, Make)."""

    recipe: Recipe
    teacher: Denoiser

    def __post_init__(self) -> None:
        self.copied: set[str] = set()  # roles whose settings were followed

    def copy(self, role: str, extra: tuple[str, ...] = ()) -> nn.Module:
        """A denoiser that starts as the teacher, whole or an adapter of it, or a new one."""
        self.copied.add(role)
        adapter, network = self.recipe.lora(role), self.recipe.roles.get(role, Role()).network
        if network is not None:
            return self._new(role, network).add_extra(*extra)
        if adapter is None:
            return deepcopy(self.teacher).add_extra(*extra)
        try:
            net = Lora(self.teacher, adapter.rank, adapter.alpha, adapter.targets, seed=fold(self.recipe.seed, role))
        except ValueError as error:
            raise ValueError(f"roles.{role}.lora.{error}") from None
        return net.add_extra(*extra)

    def _new(self, role: str, network: Network) -> Denoiser:
        net, teacher = new_denoiser(network, self.recipe.precision), self.teacher
        for what in ("shape", "classes"):
            if (own := getattr(net, what)) != (wanted := getattr(teacher, what)):
                raise ValueError(f"roles.{role}.network: its {what} {own} differ from the teacher's {wanted}")
        net.codec, net.conditions = teacher.codec, teacher.conditions
        return net

    def variant(self, role: str, time_scale: float, qk_norm: bool) -> nn.Module:
        """A whole copy of the teacher with another factor on its time, and with an RMS norm of queries and keys."""
        if qk_norm and unread_of(self.teacher):  # the norm is no copy, so the others have to be read
            fill(self.teacher)
        return variant_of(self.teacher, time_scale, qk_norm)

    def head(self, role: str, at: tuple[str, ...] = ("middle",)) -> nn.Module:
        """A GAN head over the teacher's taps."""
        return new_head(self.teacher, at)

    def helper(self, name: str) -> nn.Module:
        """A frozen network of the recipe's `helpers`: a file of jobs/features.py, or a denoiser."""
        if name not in self.recipe.helpers:
            raise ValueError(f"helpers.{name}: missing; {self.recipe.method.tag} needs it: give its folder or file")
        if name in SMALL:
            return SMALL[name](open_features(local(self.recipe.helpers[name])))
        return open_teacher(self.recipe.helpers[name], self.recipe.precision)

    def run(self, folder: str) -> nn.Module:
        """The student of another run, frozen: its averaged weights where it has them."""
        return open_net(folder)

    def method(self, folder: str) -> Method:
        """The method of another run."""
        return read_run(locate(folder)).method


def make_nets(recipe: Recipe, teacher: Denoiser | None = None, filled: bool = True) -> dict[str, nn.Module]:
    """Every role's network, the frozen ones among them; the same on all ranks. Raises ValueError naming the field.

    teacher: one whose weights do not matter, to count by; None opens the recipe's. filled: False leaves the weights of
    the teacher and its copies in their files, so that World.place reads a rank's shards alone.
    """
    weights, teacher = teacher is None, teacher or make_teacher(recipe, filled=False)
    torch.manual_seed(fold(recipe.seed, "nets"))  # of heads and embeddings, however much opening the teacher drew
    maker = Maker(recipe, teacher)
    nets = recipe.method.nets(maker)
    for role, how in recipe.roles.items():
        if how.given and role in nets and role not in maker.copied:
            raise ValueError(
                f"roles.{role}.{how.given}: {recipe.method.tag} makes this network anew, not from the teacher"
            )
    if any(isinstance(net, Lora) for net in nets.values()):
        nets.setdefault("teacher", teacher)  # adapters run through it
    for role, ref in recipe.start.items() if weights else ():
        if role not in nets:
            raise ValueError(f"start.{role}: no such role; {recipe.method.tag} has {', '.join(nets)}")
        if any(isinstance(net, Lora) and net.base is nets[role] for net in nets.values()):
            raise ValueError(f"start.{role}: adapters change this network; give it by teacher=... instead")
        path, source = _start(ref, role)
        load_net(fill(nets[role]), read_weights(path, source), str(path))
    for net in nets.values() if filled else ():
        fill(net)
    return nets


def _start(ref: str, role: str) -> tuple[Path | str, str]:
    """A run's newest checkpoint, and which of its networks: of `runs/a` the same role's, of `runs/a/net.student` that
    one. Raises ValueError for a folder without a checkpoint."""
    folder, _, last = ref.rstrip("/").rpartition("/")
    folder, source = (folder, last) if folder and last.startswith("net.") else (ref, f"net.{role}")
    path = latest(resolve_ref(folder))
    if path is None:
        raise ValueError(f"start.{role}: no checkpoint below {quoted(folder)}; give the folder of a run")
    return path, source


def open_net(folder: str | Path) -> Denoiser:
    """The student of a run, or of one of its checkpoints: averaged weights where it has them. Raises ValueError."""
    place = locate(folder)
    path, run = (place, place.parents[1]) if complete(place) else (latest(place), place)
    if path is None:
        raise ValueError(f"run: no checkpoint below {quoted(str(folder))}; give the folder of a run")
    return student_net(read_run(run), path, folder=run)


def student_net(
    recipe: Recipe, checkpoint: Path | str, average: bool | None = None, folder: Path | None = None
) -> Denoiser:
    """The student in a checkpoint of a recipe's run, frozen; an adapter is merged into its base.

    average: its averaged weights; None: where it has them. folder: the run's, which may describe the student; else the
    teacher is opened for the shapes. Raises ValueError.
    """
    net = None if folder is None else described_net(folder, recipe.precision)
    if net is not None:
        furnish(net, recipe)
        _load_student(net, checkpoint, average)
    else:
        net = trained_student(recipe, checkpoint, average)
    net = merge(net, *_probe(net)) if isinstance(net, Lora) else net
    return net.eval().requires_grad_(False)


def trained_student(recipe: Recipe, checkpoint: Path | str, average: bool | None = None) -> nn.Module:
    """The student in a checkpoint as it was trained: whole, or an adapter on its teacher. average: see `student_net`.
    Raises ValueError."""
    net = recipe.method.nets(Maker(recipe, make_teacher(recipe)))["student"]
    _load_student(net, checkpoint, average)
    return net


def _load_student(net: nn.Module, checkpoint: Path | str, average: bool | None) -> None:
    average = has_average(checkpoint) if average is None else average
    load_net(net, read_weights(checkpoint, "net.average" if average else "net.student"), str(checkpoint))


def other_nets(recipe: Recipe, checkpoint: Path | str, student: Denoiser) -> dict[str, Denoiser]:
    """The networks beside the student that its generator calls, frozen, by role. Raises ValueError."""
    roles = {role for call in recipe.method.calls(student) for role in call.roles} - {"student"}
    if not roles:
        return {}
    nets = recipe.method.nets(Maker(recipe, make_teacher(recipe)))
    for role in roles & set(recipe.method.roles):
        load_net(nets[role], read_weights(checkpoint, f"net.{role}"), str(checkpoint))
    return {role: nets[role].eval().requires_grad_(False) for role in sorted(roles)}


class Described(Strict):
    """The student of a run in `network.json`, so that a finished run needs no teacher."""

    network: Network
    """The network."""
    extra: list[str] = []
    """Further scalars that it takes."""


def describe_net(folder: Path, student: nn.Module) -> None:
    """Writes `network.json` into a run's folder; nothing for an adapter, which is not whole without its base."""
    if isinstance(student, Denoiser):
        described = Described(network=network_of(student), extra=list(student.extras))
        write_private(folder / DESCRIBED, described.model_dump_json(indent=1) + "\n")


def described_net(folder: Path, precision: str) -> Denoiser | None:
    """A network as the student of a run, to be filled; None where the run's folder does not describe it.

    Raises ConfigError naming the file.
    """
    path = folder / DESCRIBED
    if not path.is_file():
        return None
    try:
        described = validate(Described, read_json(path))
        return empty_denoiser(described.network, precision).add_extra(*described.extra)
    except ValueError as error:
        text = "; ".join(str(error).splitlines())
        raise ConfigError(text if text.startswith(str(path)) else f"{path}: {text}") from None


def _probe(net: nn.Module) -> tuple[Tensor, Level, Any]:
    """Inputs of a denoiser from little noise to much, on which two networks are compared."""
    angle = torch.linspace(0.05, 1.52, 4).view(-1, 1, 1, 1)
    x_t = Draws(0, 0).normal("probe", (len(angle), *net.shape))
    return x_t, Level(angle.cos(), angle.sin()), net.conditions.zeros(len(angle))


def steps_done(recipe: Recipe) -> int:
    """Steps of a run's newest checkpoint; 0 where it has none."""
    path = newest(recipe.checkpoints)
    return 0 if path is None else read_manifest(path)["step"]


def has_average(checkpoint: Path | str) -> bool:
    """True where a checkpoint holds averaged weights of the student."""
    return any(name.startswith("net.average.") for name in read_manifest(checkpoint)["tensors"])


def latest(folder: Path | str, known: Sequence[str | None] = ()) -> Path | str | None:
    """The newest checkpoint of a run's folder, wherever its recipe keeps them, or of a URL; None where none is.

    known: URLs with their secrets, see `with_secrets`.
    """
    if "://" in str(folder):
        return newest(folder)
    checkpoint = newest(Path(folder) / "checkpoints")
    if checkpoint is None and (Path(folder) / "recipe.yaml").is_file():
        recipe = read_run(Path(folder), *known)
        check_secrets(recipe)
        checkpoint = newest(recipe.checkpoints)
    return checkpoint


def fingerprints(recipe: Recipe, shards: Shards | None) -> dict[str, str]:
    """Hashes of recipe, data and teacher, which tell two runs' ingredients apart."""
    marks = {"recipe": recipe.fingerprint}
    if shards is not None:
        marks["data"] = f"{fold(*[s.sha256 for s in shards.manifest.shards]):016x}"
    if recipe.teacher is not None:
        weights = sorted(locate(recipe.teacher).rglob("*.safetensors"))
        marks["teacher"] = f"{fold(*[sha256_of(path) for path in weights]):016x}"
    return marks


def open_data(data: Data) -> Shards:
    """The recipe's shard set, of which sizes are compared and not every byte. Raises ShardError and StoreError."""
    return open_shards(data.path, "size", data.cache_mib << 20)


def make_feed(data: Data | None, seed: int, captions: bool = False) -> Feed | NoData:
    """The recipe's data, read in this process without Ray; a feed without columns where the recipe has no data.

    captions: rows have their captions, too. Raises ShardError naming the file at fault, and StoreError.
    """
    if data is None:
        return NoData()
    return open_feed(
        open_shards(data.path, cache_bytes=data.cache_mib << 20),
        memory_bytes=data.memory_mib << 20,
        seed=seed,
        flip=data.flip,
        captions=captions,
        max_corrupt=data.max_corrupt,
    )


def check_network(recipe: Recipe, net: Denoiser) -> Denoiser:
    """The network itself. Raises ValueError for one that makes no pictures, and for a network of texts whose prompts
    cannot be encoded or whose licence is missing. Nothing is encoded."""
    if net.picture_shape[0] not in (1, 3):
        raise ValueError(
            f"teacher: it generates {net.shape[0]} channels, so latents, and its folder has no {CODEC}/config.json, "
            "whose codec makes pictures of them; copy the codec there, or choose one that generates pixels"
        )
    if recipe.negatives is not None:
        check_subtracts(net, "negatives")
        read_prompts(recipe.negatives, "negatives")
    folder = pipeline_folder(recipe)
    if isinstance(net.conditions, Texts) and folder is not None:
        pipeline_class(folder, network_of(net).model)
        for field, ref in (("prompts", recipe.prompts), ("evaluate.prompts", recipe.evaluate.prompts)):
            if ref is not None:
                read_prompts(ref, field)
        if recipe.licence is None:
            raise ValueError(
                "licence: missing; say the licence of the teacher's weights, such as creativeml-openrail-m, which "
                "stands in the card of every model made from them"
            )
    return net


def check_start(recipe: Recipe) -> None:
    """Raises ValueError where a role is to start from a run that has no checkpoint."""
    for role, ref in recipe.start.items():
        _start(ref, role)


def check_data(data: Feed | NoData | Shards, student: Denoiser, needs: Sequence[str] = ()) -> None:
    """Raises ValueError where the images do not fit the network, or lack the method's columns.

    data: a feed, or the shard set that it will read. needs: of the method.
    """
    if isinstance(data, NoData):
        return
    if "noise" in needs and not (data if isinstance(data, Shards) else data.shards).has_noise:
        raise ValueError(
            "data.path: the rows have no noise, and the method trains on a teacher's pairs; make them with: "
            "python jobs/pairs.py teacher=... out=..."
        )
    shards = data if isinstance(data, Shards) else getattr(data, "shards", None)
    kind = "image" if shards is None else shards.manifest.kind
    if (kind == "latent") != (student.codec is not None):
        holds = "holds latents, but the network takes pixels; prepare images"
        if kind == "image":
            holds = "holds images, but the network takes latents; make them with: python jobs/encode.py"
        raise ValueError(f"data.path: {holds}")
    shape = tuple(data.size if isinstance(data, Shards) else data.shape)
    if shape != tuple(student.shape):
        raise ValueError(
            f"data.path: {kind}s of shape {shape} (C, H, W), but the network takes {tuple(student.shape)}; "
            "prepare them with size= of the network, or choose another teacher"
        )
    if shards is not None and isinstance(student.conditions, Texts):
        for name, wanted in student.conditions.shapes.items():
            own = shards.column(name).shape
            if name != "mask" and own[-1:] != wanted[-1:]:
                raise ValueError(
                    f"data.path: its column {name!r} has {own[-1]} numbers a token, but the network takes "
                    f"{wanted[-1]}; encode the captions with this teacher's text encoders: python jobs/encode.py"
                )
    if isinstance(data, Shards) and student.codec is not None:
        first = torch.from_numpy(latents(data.read(0), shape).copy())
        student.codec.check_scale(first, f"data.path: {str(data.path)!r}")
    if student.classes is not None and not data.classes:
        raise ValueError(
            f"data.path: the images have no labels, but the network has {student.classes} classes; prepare them with "
            "labels: a sub-folder for each class, or metadata.csv"
        )
    if student.classes not in (None, data.classes):
        raise ValueError(
            f"data.path: labels of {data.classes} classes, but the network has {student.classes}; give "
            f"classes={student.classes} to jobs/prepare.py where not every class has images"
        )


def make_engine(recipe: Recipe, feed: Feed | NoData, world: World | None = None, folder: Path | None = None) -> Engine:
    """The engine of a recipe on this rank; `folder` is where its checkpoints go."""
    nets = make_nets(recipe, filled=False)
    check_data(feed, nets["student"], recipe.method.needs)
    return Engine(
        recipe.method,
        nets,
        recipe.optim,
        feed,
        recipe.train,
        seed=recipe.seed,
        world=world,
        folder=folder,
        recipe=recipe.numbers,
        resume_allow=recipe.resume_allow,
        guard=recipe.failure.collapse,
    )


# Sampling


@dataclass(frozen=True)
class Sampler:
    """A way to make images from unit noise: its name, its network calls an image, and sample(z, cond, draws) -> x0.

    pictures, picture_shape: of samples; see `Denoiser`.
    """

    name: str
    calls: int
    sample: Callable[[Tensor, Any, Draws], Tensor]
    shape: tuple[int, int, int]
    conditions: Conditions
    picture_shape: tuple[int, int, int]
    pictures: Callable[[Tensor], Tensor] = lambda x0: x0

    def prompts(self, images: int) -> tuple[str, ...]:
        """The prompts of the first samples; () of a network that takes none."""
        return self.conditions.listed_texts(images) if isinstance(self.conditions, Texts) else ()


def student_sampler(method: Any, nets: Mapping[str, nn.Module]) -> Sampler:
    """The trained generator, as its method calls it; nets: the roles that it calls, "student" among them."""
    net = nets["student"]
    calls = method.calls(net)
    return few_step_sampler(nets, calls) if calls else heun_sampler(net, method.heun_steps)


def few_step_sampler(nets: Mapping[str, nn.Module], calls: Sequence[Call]) -> Sampler:
    """A generator as a list of calls."""
    net = nets[calls[0].role]
    sample = lambda z, cond, draws: run_calls(nets, calls, z, cond, draws)
    return Sampler(
        f"few-step-{len(calls)}", len(calls), sample, net.shape, net.conditions, net.picture_shape, net.pictures
    )


def heun_sampler(net: nn.Module, steps: int, guidance: float = 1.0) -> Sampler:
    """A diffusion model by Heun's solver: 2 steps - 1 calls an image, twice that with guidance."""
    conditions = net.conditions

    def sample(z: Tensor, cond: Any, draws: Draws) -> Tensor:
        null = conditions.null(cond)
        return heun(lambda x_t, level, c: guided(net, x_t, level, c, guidance, null), z, cond, steps)

    name = f"heun-{steps}" + (f"-guided-{guidance:g}" if guidance != 1 else "")
    calls = (2 * steps - 1) * (2 if guidance != 1 else 1)
    return Sampler(name, calls, sample, net.shape, conditions, net.picture_shape, net.pictures)


def ddim_sampler(net: nn.Module, steps: int, guidance: float = 1.0) -> Sampler:
    """A diffusion model by DDIM on its own schedule: `steps` calls an image, twice that with guidance."""

    def sample(z: Tensor, cond: Any, draws: Draws) -> Tensor:
        null = net.conditions.null(cond)
        return ddim(lambda x_t, level, c: guided(net, x_t, level, c, guidance, null), z, cond, steps, net.schedule)

    name = f"ddim-{steps}" + (f"-guided-{guidance:g}" if guidance != 1 else "")
    return Sampler(
        name, steps * (2 if guidance != 1 else 1), sample, net.shape, net.conditions, net.picture_shape, net.pictures
    )


def teacher_sampler(net: nn.Module, steps: int, guidance: float = 1.0) -> Sampler:
    """A teacher by the solver of its kind: DDIM for a network of texts, Heun's for any other."""
    return (ddim_sampler if isinstance(net.conditions, Texts) else heun_sampler)(net, steps, guidance)


def sample_draws(seed: int, world: World, first: int = 0) -> Draws:
    """The random numbers of the batch of samples that begins with number `first`."""
    return Draws(fold(seed, "samples"), first, world.rank, world.size, world.device)


@torch.no_grad()
def draw(sampler: Sampler, draws: Draws | Joined, images: int, cond: Any) -> Tensor:
    """uint8 (images, C, H, W) on the CPU: one batch of samples. cond: a condition for each of them."""
    z = draws.normal("z", (images, *sampler.shape))
    return to_uint8(sampler.pictures(sampler.sample(z, cond, draws))).cpu()  # waits for the device


def make_samples(
    sampler: Sampler,
    images: int,
    seed: int = 0,
    batch: int = 250,
    world: World | None = None,
    checkpoint: str = "last",
    alive: Callable[[], None] = lambda: None,
) -> Samples | None:
    """`images` samples with labels 0, 1, 2, ... in turn, the same for any world size; each rank makes its share.

    Returns Samples on rank 0 and None on the others. `seconds` is the sampling's alone: batches times their
    median, which a first call's set-up does not bend. alive: called before each batch.
    """
    world = world or World()
    batch = max(batch // world.size, 1) * world.size
    mine, laps = [], []
    for first in range(0, images, batch):
        alive()
        start = time.perf_counter()
        numbers = torch.arange(first, first + batch, device=world.device)[world.rank :: world.size]
        cond = sampler.conditions.listed(numbers)
        mine.append(draw(sampler, sample_draws(seed, world, first), batch // world.size, cond))
        laps.append(time.perf_counter() - start)
    seconds = median(laps) * images / batch
    whole = _interleave(torch.cat(mine), batch, world)
    if whole is None:
        return None
    shape, conditions, prompts = sampler.shape, sampler.conditions, sampler.prompts(images)
    labels = conditions.listed(torch.arange(images)) if conditions.classes else None

    def starts(count: int) -> tuple[Tensor, Any]:
        parts = [Draws(fold(seed, "samples"), i, device=world.device) for i in range(0, count, batch)]
        z = torch.cat([draws.normal("z", (batch, *shape)) for draws in parts])[:count]
        return z, conditions.listed(torch.arange(count, device=world.device))

    return Samples(whole[:images], labels, sampler.name, sampler.calls, seconds, seed, checkpoint, prompts, starts)


def _interleave(mine: Tensor, batch: int, world: World) -> Tensor | None:
    """All ranks' images in the order of their labels, on rank 0."""
    if world.size == 1:
        return mine
    gathered: list[Any] | None = [None] * world.size if world.rank == 0 else None
    dist.gather_object(mine, gathered)
    if gathered is None:
        return None
    return torch.stack(gathered, 1).flatten(0, 1)


def make_metrics(recipe: Recipe, device: torch.device | str = "cpu") -> list[Measure]:
    """The functions that score the recipe's samples. Raises ValueError for an unknown name or a missing file."""
    teacher = None if recipe.teacher is None else partial(make_teacher, recipe)
    return recipe.evaluate.build(device, recipe.seen_by_loss, teacher)


def grid(images: Tensor, columns: int) -> Tensor:
    """uint8 (N, C, H, W) as one picture (rows H, columns W, C), for a person to look at."""
    n, c, h, w = images.shape
    rows = -(-n // columns)
    canvas = torch.zeros(rows * columns, c, h, w, dtype=torch.uint8)
    canvas[:n] = images
    return canvas.view(rows, columns, c, h, w).permute(0, 3, 1, 4, 2).reshape(rows * h, columns * w, c)


def png(picture: Tensor) -> bytes:
    """A uint8 picture (H, W, C) as a PNG file that says that it was made here."""
    made, file = PngInfo(), BytesIO()
    made.add_text("Software", MADE_HERE)
    Image.fromarray(picture.squeeze(-1).numpy()).save(file, "PNG", pnginfo=made)
    return file.getvalue()
