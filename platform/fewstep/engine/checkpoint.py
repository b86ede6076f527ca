"""One checkpoint: networks and optimisers by name, written by all ranks and read by any number of them.

It holds a safetensors file a rank and `manifest.json`: step, images, updates, the recipe that decides the numbers, a
sha256 for each file, and for each tensor (`net.student.<parameter>`, `net.average.<parameter>`,
`optim.student.<parameter>.exp_avg`) the chunks it consists of. torch.distributed.checkpoint plans who writes and reads
what; the files are ours, and nothing in them is ever executed.
"""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
)
from torch.distributed.checkpoint.planner import LoadPlan, ReadItem, SavePlan, TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.staging import AsyncStager
from torch.distributed.checkpoint.storage import WriteResult

from ..config import differences, fingerprint
from ..files import sha256_of
from ..storage.place import Place, Ref
from ..texts import reason
from .folder import MANIFEST, clear, discard, remove
from .manifest import (
    AGAIN,
    FORMAT,
    CheckpointError,
    check_alike,
    manifest_text,
    metadata_of,
    not_there,
    read_manifest,
)
from .tensor_file import DTYPE_NAMES, DTYPES, write_tensors
from .world import World

CHANGED = "truncated or changed since it was written"

T = TypeVar("T")

# one process needs no process group, and we say so ourselves by no_dist
warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")


def tensors_of(nets: Mapping[str, nn.Module], optims: Mapping[str, torch.optim.Optimizer]) -> dict[str, Tensor]:
    """All state of networks and optimisers by name: the live tensors, sharded as they are.

    A parameter that was never trained has no optimiser state, here and in a checkpoint.
    """
    out = {}
    for name, net in nets.items():
        for key, value in net.state_dict().items():
            out[f"net.{name}.{key}"] = value.detach()
    for role, optim in optims.items():
        names = {param: name for name, param in nets[role].named_parameters()}
        for param, slots in optim.state.items():
            for slot, value in slots.items():
                out[f"optim.{role}.{names[param]}.{slot}"] = value.detach()
    return out


def _names_below(names: Iterable[str], prefix: str) -> dict[str, str]:
    """Names below a dotted prefix: the rest -> the whole name."""
    return {name.removeprefix(prefix + "."): name for name in names if name.startswith(prefix + ".")}


# Writing


@dataclass(frozen=True)
class _Chunk:
    """Returns this rank's shard of a tensor on the CPU, its offsets in the whole tensor, and the shape of the whole."""

    tensor: Tensor
    offsets: torch.Size
    shape: torch.Size


class Stager(AsyncStager):
    """Copies this rank's shards to the CPU: all that training waits for."""

    should_synchronize_after_execute = False

    @torch.no_grad()
    def stage(self, state_dict: dict[str, Tensor]) -> dict[str, _Chunk]:
        out, cuda = {}, False
        for name, tensor in state_dict.items():
            here, offsets = tensor, torch.Size([0] * tensor.ndim)
            if hasattr(tensor, "to_local"):
                here, offsets = tensor.to_local(), tensor.__create_chunk_list__()[0].offsets
                if not here.numel() and tensor.numel():
                    continue  # fewer rows than ranks: this one has none
            cuda |= here.is_cuda
            copy = torch.empty(here.shape, dtype=here.dtype, pin_memory=here.is_cuda)
            out[name] = _Chunk(copy.copy_(here, non_blocking=here.is_cuda), offsets, tensor.shape)
        if cuda:
            torch.cuda.current_stream().synchronize()
        return out


class Planner(DefaultSavePlanner):
    """Plans staged chunks; a chunk that several ranks hold is written by one, so that the files are of even size."""

    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)

    def create_local_plan(self) -> SavePlan:
        self.plan = SavePlan([_item(name, chunk) for name, chunk in self.state_dict.items()])
        return self.plan

    def lookup_object(self, index: MetadataIndex) -> Tensor:
        return self.state_dict[index.fqn].tensor


def _item(name: str, chunk: _Chunk) -> WriteItem:
    where = ChunkStorageMetadata(chunk.offsets, chunk.tensor.shape)
    data = TensorWriteData(where, TensorProperties(dtype=chunk.tensor.dtype), chunk.shape)
    return WriteItem(MetadataIndex(name, chunk.offsets), WriteItemType.SHARD, tensor_data=data)


@contextmanager
def named(place: Place) -> Iterator[None]:
    """Errors as text with the file's name: those of a store's library may not travel between processes."""
    try:
        yield
    except CheckpointError:
        raise
    except Exception as error:
        raise CheckpointError(f"{place}: {reason(error)}") from None


class Writer(dcp.StorageWriter):
    """Writes one checkpoint: a file a rank, then the manifest, by the coordinator, then its name."""

    def __init__(self, target: Place, manifest: Mapping[str, Any], world: World, published: Callable[[], None]):
        self.target, self.manifest, self.world, self.published = target, dict(manifest), world, published
        self.folder = target.beside(f".{target.name}") if target.local else target

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        return True

    def reset(self, checkpoint_id: Any = None) -> None:
        pass

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        pass

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """On the coordinator, before anybody writes."""
        with named(self.folder):
            clear(self.target.parent)
            if not self.target.local and (self.target / MANIFEST).is_file():
                remove(self.target)  # the same step once more, and there is no second name for it
            self.folder.make()
        return plans

    def write_data(self, plan: SavePlan, planner: dcp.SavePlanner) -> torch.futures.Future[list[WriteResult]]:
        """This rank's chunks; hashed as they are written."""
        file = self.folder / f"rank-{self.world.rank:05d}.safetensors"
        tensors = {item.index.fqn: planner.resolve_data(item) for item in plan.items}
        results = []
        if tensors:
            with named(file):
                self.folder.make()
                size, sha256 = write_tensors(file, tensors)
            results = [WriteResult(item.index, size, (file.name, size, sha256)) for item in plan.items]
        done: torch.futures.Future[list[WriteResult]] = torch.futures.Future()
        done.set_result(results)
        return done

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """On the coordinator, when all have written."""
        files, tensors = {}, {}
        for written in (result for of_rank in results for result in of_rank):
            name, size, sha256 = written.storage_data
            files[name] = {"bytes": size, "sha256": sha256}
        for written in (result for of_rank in results for result in of_rank):
            of, index = metadata.state_dict_metadata[written.index.fqn], written.index
            entry = tensors.setdefault(
                index.fqn, {"dtype": DTYPE_NAMES[of.properties.dtype], "shape": list(of.size), "chunks": []}
            )
            sizes = next(chunk.sizes for chunk in of.chunks if chunk.offsets == index.offset)
            chunk = {"offsets": list(index.offset), "sizes": list(sizes), "file": written.storage_data[0]}
            entry["chunks"].append(chunk | {"key": index.fqn})
        recipe = self.manifest.setdefault("recipe", {})
        manifest = {"format": FORMAT, **self.manifest, "fingerprint": fingerprint(recipe)}
        manifest |= {"world": self.world.size, "files": files, "tensors": tensors}
        with named(self.target):
            for name in files:
                if not (self.folder / name).is_file():
                    raise CheckpointError(
                        f"{self.folder / name}: written by another node and not to be seen here; let storage=... name "
                        "a folder or URL that all nodes share"
                    )
            (self.folder / MANIFEST).write(manifest_text(manifest))
            if self.target.local:
                self.folder.rename(self.target, discard)
            self.published()


# Reading


class Reader(dcp.StorageReader):
    """Reads what is asked for out of a checkpoint's files, each verified before anything is taken from it.

    verify_all: also the files from which this rank needs nothing.
    """

    def __init__(self, path: Place, manifest: Mapping[str, Any], verify_all: bool = False):
        self.path, self.manifest, self.verify_all = path, manifest, verify_all
        self.metadata = metadata_of(manifest["tensors"])

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        return True

    def reset(self, checkpoint_id: Any = None) -> None:
        pass

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return self.metadata

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        pass

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        return plans

    def read_data(self, plan: LoadPlan, planner: dcp.LoadPlanner) -> torch.futures.Future[None]:
        wanted: dict[str, list[ReadItem]] = defaultdict(list)
        for item in plan.items:
            wanted[self.metadata.storage_data[item.storage_index]["file"]].append(item)
        for name in self.manifest["files"] if self.verify_all else wanted:
            with self._verified(name) as file, safe_open(file, "pt") as tensors:
                items = wanted.get(name, [])
                for item in items:
                    self._check_chunk(tensors, item, name)
                for item in items:
                    target = planner.resolve_tensor(item).detach()
                    target.copy_(self._chunk(tensors, item))
                    planner.commit_tensor(item, target)
        done: torch.futures.Future[None] = torch.futures.Future()
        done.set_result(None)
        return done

    def _check_chunk(self, tensors: Any, item: ReadItem, file: str) -> None:
        chunk = self.metadata.storage_data[item.storage_index]
        stored = tensors.get_slice(chunk["key"])
        if [stored.get_dtype(), stored.get_shape()] != [chunk["dtype"], chunk["sizes"]]:
            raise CheckpointError(
                f"{self.path / file}: {chunk['key']} is {stored.get_dtype()} {stored.get_shape()} there, and "
                f"{chunk['dtype']} {chunk['sizes']} in the manifest; {AGAIN}"
            )

    def _chunk(self, tensors: Any, item: ReadItem) -> Tensor:
        key = self.metadata.storage_data[item.storage_index]["key"]
        if not item.lengths:
            return tensors.get_tensor(key)
        spans = zip(item.storage_offsets, item.lengths, strict=True)
        return tensors.get_slice(key)[tuple(slice(first, first + length) for first, length in spans)]

    def check_sizes(self, names: Iterable[str]) -> None:
        """Raises CheckpointError where a file that holds a part of these tensors has not the size that was written.

        A manifest's tensors are no larger than its files, so room for tensors that passed is no more than their files.
        """
        chunks = (chunk for name in names for chunk in self.manifest["tensors"][name]["chunks"])
        for name in sorted({chunk["file"] for chunk in chunks}):
            self._check_size(name)

    def _check_size(self, name: str) -> None:
        place = self.path / name
        try:
            size = place.size()
        except FileNotFoundError:
            raise not_there(place, self.path) from None
        if size != self.manifest["files"][name]["bytes"]:
            raise CheckpointError(f"{place}: {CHANGED}; {AGAIN}")

    @contextmanager
    def _verified(self, name: str) -> Iterator[str]:
        """A file of the checkpoint, on this machine, with the content that was written."""
        place = self.path / name
        self._check_size(name)
        with named(place):
            try:
                with place.fetched() as file:
                    if sha256_of(file) != self.manifest["files"][name]["sha256"]:
                        raise CheckpointError(f"{place}: {CHANGED}; {AGAIN}")
                    yield file
            except FileNotFoundError:
                raise not_there(place, self.path) from None
            except SafetensorError as error:
                raise CheckpointError(f"{place}: {error}; {AGAIN}") from None


def _read(reader: Reader, into: dict[str, Tensor]) -> None:
    """Fills tensors, sharded or not, from a checkpoint; each rank for itself. Refuses numbers that are not finite."""
    planner = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    try:
        dcp.load(into, storage_reader=reader, planner=planner, no_dist=True)
    except CheckpointException as error:
        raise error.failures[0][0] from None
    for name, tensor in into.items():
        here = tensor.to_local() if hasattr(tensor, "to_local") else tensor
        if here.is_floating_point() and not here.isfinite().all():
            raise CheckpointError(f"{reader.path}: {name} holds numbers that are not finite; {AGAIN}")


def check_recipe(manifest: Mapping[str, Any], recipe: Mapping[str, Any], allow: Iterable[str], where: str) -> None:
    """Raises CheckpointError where a checkpoint was written by a recipe that differs from this one outside `allow`.

    where: the checkpoint, for the error.
    """
    if changed := differences(manifest["recipe"], recipe, allow):
        names = ",".join(change.partition(": ")[0] for change in changed)
        raise CheckpointError(
            f"{where}: written by another recipe:\n  " + "\n  ".join(changed) + f"\nIf that is meant, go on with "
            f"resume_allow=[{names}]; else give this run another name or out folder, or start from those weights "
            "with start.student=<run folder>"
        )


def load(
    path: Ref,
    nets: Mapping[str, nn.Module],
    optims: Mapping[str, torch.optim.Optimizer],
    world: World | None = None,
    recipe: Mapping[str, Any] | None = None,
    allow: Iterable[str] = (),
    verify_all: bool = False,
    progress: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Fills networks and their optimisers, sharded or not, from a checkpoint of any number of ranks; a collective.

    Each rank reads, and verifies, the files it needs something from. recipe: of the run that means to go on, whose
    differences outside `allow` are refused; None takes any. progress: the run's own fields of a manifest, such as its
    updates and rates; the checkpoint's must be of their kinds. Returns the manifest. Raises CheckpointError, on all
    ranks.
    """
    path = Place.of(path)

    def work() -> dict[str, Any]:
        manifest = read_manifest(path.ref)
        if recipe is not None:
            check_recipe(manifest, recipe, allow, str(path))
        try:
            check_alike({key: manifest.get(key) for key in progress or {}}, progress or {}, "")
        except ValueError as error:
            raise CheckpointError(f"{path / MANIFEST}: does not fit this run ({error}); {AGAIN}") from None
        reader = Reader(path, manifest, verify_all)
        into: dict[str, Tensor] = {}
        constants: dict[str, Tensor] = {}
        for name, net in nets.items():
            names = _names_below(manifest["tensors"], f"net.{name}")
            own = net.state_dict()
            _check_tensors(own, {key: manifest["tensors"][whole] for key, whole in names.items()}, f"{path}, {name}")
            into |= {whole: own[key].detach() for key, whole in names.items()}
            constants |= {whole: value for key, whole in names.items() if not (value := own[key]).is_floating_point()}
        into |= {whole: torch.empty_like(value) for whole, value in constants.items()}
        tensors = manifest["tensors"]
        states = {role: _slots(tensors, role, nets[role], optim, into, path) for role, optim in optims.items()}
        _read(reader, into)
        _check_constants(constants, into, str(path))
        for role, optim in optims.items():
            optim.state.clear()
            optim.state.update(states[role])
        return manifest

    return _on_all_ranks(world or World(), work)


def _slots(
    tensors: Mapping[str, Any],
    role: str,
    net: nn.Module,
    optim: torch.optim.Optimizer,
    into: dict[str, Tensor],
    path: Place,
) -> dict[Tensor, dict[str, Tensor]]:
    """Room for a role's optimiser state, laid out as its parameters, noted in `into` by name.

    Raises CheckpointError where the checkpoint's state is not what this optimiser keeps of a parameter that trains.
    """
    params, slots_of, states = dict(net.named_parameters()), defaultdict(dict), {}
    for key, whole in _names_below(tensors, f"optim.{role}").items():
        name, _, slot = key.rpartition(".")
        if name not in params:
            raise CheckpointError(f"{path}: does not fit the optimiser; {whole} belongs to no parameter")
        slots_of[name][slot] = whole
    kept: dict[Any, dict[str, Tensor]] = {}
    for name, slots in slots_of.items():
        param = params[name]
        alike = (param.ndim, param.dtype, param.device)
        if alike not in kept:
            kept[alike] = _state_of_one(optim, param)
        if wrong := sorted(slots.keys() ^ kept[alike].keys()):
            where = "of this optimiser alone" if wrong[0] in kept[alike] else "of the checkpoint alone"
            raise CheckpointError(f"{path}: does not fit the optimiser; optim.{role}.{name}.{wrong[0]} is {where}")
        states[param] = {}
        for slot, whole in slots.items():
            value, entry = kept[alike][slot], tensors[whole]
            shape = list(param.shape) if value.ndim == param.ndim else []
            ours, theirs = [DTYPE_NAMES[value.dtype], shape], [entry["dtype"], entry["shape"]]
            if ours != theirs:
                raise CheckpointError(
                    f"{path}: does not fit the optimiser; {whole} is {theirs[0]} {theirs[1]}, expected {ours[0]} "
                    f"{ours[1]}"
                )
            room = torch.empty_like(param, dtype=value.dtype) if shape else torch.empty_like(value)
            into[whole] = states[param][slot] = room.detach()
    return states


def _state_of_one(optim: torch.optim.Optimizer, param: Tensor) -> dict[str, Tensor]:
    """The state that an optimiser keeps of a parameter, seen on one of a single element that takes one step."""
    one = torch.zeros([1] * param.ndim, dtype=param.dtype, device=param.device, requires_grad=True)
    one.grad = torch.zeros_like(one)
    trial = copy(optim)
    trial.state, trial.param_groups = defaultdict(dict), [{**optim.param_groups[0], "params": [one]}]
    trial.step()
    return trial.state[one]


def _check_tensors(own: Mapping[str, Tensor], theirs: Mapping[str, Mapping[str, Any]], where: str) -> None:
    wrong = sorted(own.keys() ^ theirs.keys()) or [
        key
        for key, value in own.items()
        if [DTYPE_NAMES[value.dtype], list(value.shape)] != [theirs[key]["dtype"], theirs[key]["shape"]]
    ]
    if wrong:
        some = ", ".join(wrong[:3])
        raise CheckpointError(f"{where}: does not fit the network; {len(wrong)} tensors differ, such as {some}")


def _check_constants(own: Mapping[str, Tensor], theirs: Mapping[str, Tensor], where: str) -> None:
    """Training changes no whole number: those of a network tell what it is, such as an adapter's base."""
    for key, value in own.items():
        if not value.is_floating_point() and not torch.equal(theirs[key].to(value.device), value):
            raise CheckpointError(
                f"{where}: {key} is not this network's, such as an adapter's of another teacher or another alpha; "
                "give those of that run, or start anew under another name=..."
            )


def _on_all_ranks(world: World, work: Callable[[], T]) -> T:
    """Runs `work` on each rank. An error on one rank is raised on all, so no rank waits for one that left."""
    if world.size == 1:
        return work()
    result, error = None, None
    try:
        result = work()
    except Exception as problem:
        error = problem
    texts: list[str | None] = [None] * world.size
    dist.all_gather_object(texts, None if error is None else reason(error))
    if error is not None:
        raise error
    if any(texts):
        rank = next(i for i, text in enumerate(texts) if text)
        raise CheckpointError(f"rank {rank}: {texts[rank]}")
    return result


def read_weights(path: Ref, prefix: str = "") -> dict[str, Tensor]:
    """Whole tensors on the CPU out of a checkpoint of any number of ranks; needs no process group.

    prefix: such as "net.average", which the names then lose; "" takes everything. Raises CheckpointError.
    """
    path = Place.of(path)
    manifest = read_manifest(path.ref)
    reader, tensors = Reader(path, manifest), manifest["tensors"]
    names = _names_below(tensors, prefix) if prefix else {name: name for name in tensors}
    reader.check_sizes(names.values())
    into = {n: torch.empty(tensors[n]["shape"], dtype=DTYPES[tensors[n]["dtype"]]) for n in names.values()}
    _read(reader, into)
    return {key: into[whole] for key, whole in names.items()}


def load_net(net: nn.Module, tensors: Mapping[str, Tensor], where: str) -> None:
    """Fills an unsharded network from whole tensors. Raises CheckpointError naming what does not fit."""
    theirs = {key: {"dtype": DTYPE_NAMES[value.dtype], "shape": list(value.shape)} for key, value in tensors.items()}
    _check_tensors(net.state_dict(), theirs, where)
    _check_constants(net.state_dict(), tensors, where)
    net.load_state_dict(tensors)
