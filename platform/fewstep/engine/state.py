"""State: a run at one step, each rank's shards in a file of its own, saved behind the training and restored exactly.

A checkpoint is a folder `step-00001234` on a disk or in an object store. It holds a safetensors file a rank and
`manifest.json`: step, images, updates, the recipe that decides the numbers, a sha256 for each file, and for each
tensor (`net.student.<parameter>`, `net.average.<parameter>`, `optim.student.<parameter>.exp_avg`) the chunks it
consists of. Any number of ranks may load it. torch.distributed.checkpoint plans who writes and reads what; the files
are ours, and nothing in them is ever executed.

What is visible is complete: on a disk a checkpoint is written under a hidden name and renamed when whole; in an object
store, which cannot rename, its manifest comes last, and a folder without one is none.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated, Any, TypeVar

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from pydantic import Field
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, ReadItem, SavePlan, TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.staging import AsyncStager
from torch.distributed.checkpoint.storage import WriteResult

from ..config import Strict, flatten
from .storage import Place, Ref, reason, writable
from .world import World

__all__ = [
    "CheckpointError",
    "Keep",
    "Saver",
    "checkpoints",
    "differences",
    "fingerprint",
    "complete",
    "load",
    "load_net",
    "newest",
    "read_manifest",
    "read_weights",
    "step_of",
    "tensors_of",
    "writable",
]

FORMAT = 2
MANIFEST = "manifest.json"
FIELDS = ("step", "images", "updates", "recipe", "fingerprint", "world", "files", "tensors")
NAME = re.compile(r"step-(\d{8,})")
REPLACED = ".replaced"  # a checkpoint while its successor of the same step takes its name
AGAIN = "remove that folder to resume from the one before it, or start anew under another name=..."

# safetensors' names
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}

T = TypeVar("T")

# one process needs no process group, and we say so ourselves by no_dist
warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")


class CheckpointError(ValueError):
    """A checkpoint that cannot be written or used; the text names the file and the way out."""


class Keep(Strict):
    """Which checkpoints outlive the next one: the newest, the best, milestones, and a way back."""

    last: Annotated[int, Field(ge=1)] = 2
    """The newest."""
    best: Annotated[int, Field(ge=0)] = 0
    """The best of those that were scored."""
    every_images: Annotated[int, Field(ge=1)] | None = None
    """The first after each multiple of so many images; null keeps none for that."""
    higher: bool = False
    """Whether a higher score is better."""
    back_steps: Annotated[int, Field(ge=0)] = 0
    """All of the last so many steps, and the one before those, to roll back to; 0 keeps none for that."""

    def choose(self, images: Mapping[int, int], scores: Mapping[int, float], pending: Iterable[int] = ()) -> set[int]:
        """The steps that stay, of checkpoints given as step -> images. A score that is not finite is none."""
        steps = sorted(images)
        stays = set(steps[-self.last :]) | (set(pending) & set(steps))
        scored = [step for step in steps if math.isfinite(scores.get(step, math.nan))]
        stays |= set(sorted(scored, key=lambda step: scores[step], reverse=self.higher)[: self.best])
        if self.back_steps:
            before = [step for step in steps if step <= steps[-1] - self.back_steps]
            stays |= {step for step in steps if step >= max(before, default=0)}
        first: dict[int, int] = {}
        for step in steps if self.every_images else []:
            first.setdefault(images[step] // self.every_images, step)
        return stays | {step for multiple, step in first.items() if multiple}


# Names


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


def _part(names: Iterable[str], prefix: str) -> dict[str, str]:
    """Names below a dotted prefix: the rest -> the whole name."""
    return {name.removeprefix(prefix + "."): name for name in names if name.startswith(prefix + ".")}


# Where


def step_of(path: Ref) -> int:
    """The step that a checkpoint's name says."""
    return int(NAME.fullmatch(Place.of(path).name)[1])


def complete(path: Ref) -> bool:
    """Whether a folder is a complete checkpoint."""
    place = Place.of(path)
    return NAME.fullmatch(place.name) is not None and (place / MANIFEST).is_file()


def checkpoints(folder: Ref) -> list[Ref]:
    """The complete checkpoints in a folder, oldest first: paths on a disk, URLs elsewhere."""
    place = Place.of(folder)
    steps = sorted((int(found[1]), name) for name in place.names() if (found := NAME.fullmatch(name)))
    return [(place / name).ref for _, name in steps if (place / name / MANIFEST).is_file()]


def newest(folder: Ref) -> Ref | None:
    """The newest complete checkpoint in a folder, or None."""
    found = checkpoints(folder)
    return found[-1] if found else None


def _remove(checkpoint: Place) -> None:
    """Removes a checkpoint; one of which a part is left never looks complete."""
    if checkpoint.local:
        hidden = checkpoint.beside(f".{checkpoint.name}.removed")
        checkpoint.rename(hidden)
        hidden.remove()
    else:
        if (checkpoint / MANIFEST).is_file():
            (checkpoint / MANIFEST).remove()
        checkpoint.remove()


def _clear(folder: Place) -> None:
    """Removes what a write that was killed or failed has left in a folder."""
    names = folder.names()
    for name in names:
        if name.endswith(REPLACED) and name[1 : -len(REPLACED)] not in names:
            (folder / name).rename(folder / name[1 : -len(REPLACED)])  # its successor did not arrive
        elif name.startswith(".step-"):
            (folder / name).remove()
        elif NAME.fullmatch(name) and not (folder / name / MANIFEST).is_file():
            (folder / name).remove()


# Writing


@dataclass(frozen=True)
class _Chunk:
    """What this rank holds of a tensor, on the CPU; its offsets in the whole, and the whole's shape."""

    tensor: Tensor
    offsets: torch.Size
    shape: torch.Size


class _Stager(AsyncStager):
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


class _Planner(DefaultSavePlanner):
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
def _named(place: Place) -> Iterator[None]:
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
        with _named(self.folder):
            _clear(self.target.parent)
            if not self.target.local and (self.target / MANIFEST).is_file():
                _remove(self.target)  # the same step once more, and there is no second name for it
            self.folder.make()
        return plans

    def write_data(self, plan: SavePlan, planner: dcp.SavePlanner) -> torch.futures.Future[list[WriteResult]]:
        """This rank's chunks; hashed as they are written."""
        file = self.folder / f"rank-{self.world.rank:05d}.safetensors"
        tensors = {item.index.fqn: planner.resolve_data(item) for item in plan.items}
        results = []
        if tensors:
            with _named(file):
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
        with _named(self.target):
            for name in files:
                if not (self.folder / name).is_file():
                    raise CheckpointError(
                        f"{self.folder / name}: written by another node and not to be seen here; let storage=... name "
                        "a folder or URL that all nodes share"
                    )
            (self.folder / MANIFEST).write(_json(manifest))
            if self.target.local:
                self._rename()
            self.published()

    def _rename(self) -> None:
        old = self.target.beside(f".{self.target.name}{REPLACED}")
        replaces = (self.target / MANIFEST).is_file()
        if replaces:
            self.target.rename(old)
        self.folder.rename(self.target)
        if replaces:
            old.remove()


def write_tensors(file: Place, tensors: Mapping[str, Tensor]) -> tuple[int, str]:
    """Writes CPU tensors in safetensors' format, piece by piece. Returns the file's (bytes, sha256)."""
    order = sorted(tensors, key=lambda name: -tensors[name].element_size())  # keeps every tensor aligned
    header, at = {}, 0
    for name in order:
        tensor = tensors[name]
        end = at + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": DTYPE_NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    digest, size = hashlib.sha256(), 0
    with file.writing() as out:
        for block in (len(text).to_bytes(8, "little"), text, *(tensors[name] for name in order)):
            for piece in _pieces(block):
                digest.update(piece)
                out.write(piece)
                size += len(piece)
    return size, digest.hexdigest()


def _pieces(block: bytes | Tensor, size: int = 16 << 20) -> Iterator[memoryview]:
    """The bytes of a block, in pieces that a store can take one by one."""
    data = block.contiguous().reshape(-1).view(torch.uint8).numpy() if isinstance(block, Tensor) else block
    view = memoryview(data)
    return (view[i : i + size] for i in range(0, len(view), size))


def _json(manifest: Mapping[str, Any]) -> bytes:
    """One line a field, and one a tensor, for those who look into it."""
    lines = [f" {json.dumps(key)}: {json.dumps(value)}" for key, value in manifest.items() if key != "tensors"]
    tensors = [f"  {json.dumps(key)}: {json.dumps(value)}" for key, value in manifest["tensors"].items()]
    lines.append(' "tensors": {\n' + ",\n".join(tensors) + "\n }")
    return ("{\n" + ",\n".join(lines) + "\n}\n").encode()


class Saver:
    """Saves a run's checkpoints behind its training, and removes those that need not be kept.

    folder: a path or URL that all ranks reach. Every rank makes one, and calls `save` and `wait` together; the
    collectives behind the training have a process group of their own, as they would get mixed up with the training's.
    """

    def __init__(self, folder: Ref, world: World | None = None, keep: Keep | None = None):
        self.folder, self.world, self.keep = Place.of(folder), world or World(), keep or Keep()
        together = dist.is_initialized() and dist.get_world_size() == self.world.size
        self._group = dist.new_group(backend="gloo") if together else None
        self._future: Future | None = None
        self._path = self.folder
        self._images: dict[int, int] = {}
        self._pending: set[int] = set()
        self._scores: dict[int, float] = {}
        if self.world.rank == 0:
            with _named(self.folder):
                _clear(self.folder)
            if (self.folder / "scores.json").is_file():
                self._scores = {int(step): s for step, s in json.loads((self.folder / "scores.json").read()).items()}

    def save(
        self,
        nets: Mapping[str, nn.Module],
        optims: Mapping[str, torch.optim.Optimizer],
        manifest: Mapping[str, Any],
    ) -> Ref:
        """Begins a checkpoint and returns where it will be; a collective. Waits for the one before it, and for copies.

        manifest: step, images, updates and recipe (what decides the numbers) of the run, and what else in JSON it needs
        to go on. Raises CheckpointError, on all ranks, if the one before it failed.
        """
        self.wait()
        manifest = json.loads(json.dumps(manifest))  # a copy: the run goes on
        self._path = self.folder / f"step-{manifest['step']:08d}"
        self._images[manifest["step"]] = manifest["images"]
        self._future = dcp.async_save(
            tensors_of(nets, optims),
            storage_writer=Writer(self._path, manifest, self.world, self._prune),
            planner=_Planner(),
            process_group=self._group,
            async_stager=_Stager(),
            no_dist=self._group is None,
        )
        return self._path.ref

    def wait(self) -> None:
        """Until the checkpoint that was begun is complete. Raises CheckpointError, on all ranks, if it failed."""
        if self._future is not None:
            error, self._future = _failure(self._path, self._future), None
            if error is not None:
                raise error

    @property
    def failed(self) -> CheckpointError | None:
        """What `wait` would raise, as far as it is known by now."""
        return _failure(self._path, self._future) if self._future is not None and self._future.done() else None

    def pending(self, step: int) -> None:
        """A score of this step's checkpoint is on its way: until it is there the checkpoint stays.

        A restart forgets this, as it does the scoring.
        """
        self._pending.add(step)

    def scored(self, step: int, value: float) -> None:
        """The score of this step's checkpoint, by which the best are kept; rank 0's counts. Any thread may call it."""
        if self.world.rank == 0:
            self._scores[step] = value
            self.folder.make()
            (self.folder / "scores.json").write(json.dumps({str(k): v for k, v in self._scores.items()}).encode())
        self._pending.discard(step)

    def remove_after(self, step: int) -> None:
        """Removes the checkpoints of later steps: of a course that the run has left. Every rank calls it."""
        self.wait()
        if self.world.rank == 0:
            for path in checkpoints(self.folder.ref):
                if step_of(path) > step:
                    _remove(Place.of(path))
        self.world.barrier()

    def _prune(self) -> None:
        """Removes what need not be kept; on the coordinator, after a checkpoint has become visible."""
        found = {step_of(path): path for path in checkpoints(self.folder.ref)}
        if self.keep.every_images:
            for step in found.keys() - self._images.keys():
                self._images[step] = read_manifest(found[step])["images"]
        images = {step: self._images.get(step, 0) for step in found}
        for step in found.keys() - self.keep.choose(images, self._scores, self._pending):
            _remove(Place.of(found[step]))


def _failure(path: Place, future: Future) -> CheckpointError | None:
    """Why a checkpoint was not written, once that is known; it waits."""
    try:
        future.result()
    except CheckpointException as error:
        who = "; ".join(f"rank {rank}: {wrapped[0]}" for rank, wrapped in sorted(error.failures.items()))
    except Exception as error:
        who = reason(error)
    else:
        return None
    return CheckpointError(
        f"{path}: not saved ({who}); the checkpoints before it are intact. "
        "Mend that, or let storage=... name another place, and start again"
    )


# Reading


def fingerprint(recipe: Mapping[str, Any]) -> str:
    """Sixteen letters that stand for what decides a run's numbers."""
    return hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()[:16]


def differences(old: Mapping[str, Any], new: Mapping[str, Any], allow: Iterable[str] = ()) -> list[str]:
    """What tells two recipes apart, as "train.batch: 32 -> 64".

    allow: dotted keys that may differ, with all below them.
    """
    a, b = ({key: json.dumps(value) for key, value in flatten(recipe).items()} for recipe in (old, new))
    allow = tuple(allow)
    changed = [key for key in sorted(a.keys() | b.keys()) if a.get(key) != b.get(key)]
    changed = [key for key in changed if not any(key == name or key.startswith(f"{name}.") for name in allow)]
    return [f"{key}: {a.get(key, 'not there')} -> {b.get(key, 'not there')}" for key in changed]


def read_manifest(path: Ref) -> dict[str, Any]:
    """A checkpoint's manifest. Raises CheckpointError naming the file and what is wrong with it."""
    path = Place.of(path)
    file = path / MANIFEST
    try:
        manifest = json.loads(file.read())
    except FileNotFoundError:
        raise _missing(file, path) from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{file}: damaged ({error}); {AGAIN}") from None
    if not isinstance(manifest, dict):
        raise CheckpointError(f"{file}: damaged (not a JSON object); {AGAIN}")
    if manifest.get("format", FORMAT) != FORMAT:
        raise CheckpointError(f"{path}: checkpoint format {manifest['format']}, this version reads {FORMAT}")
    if missing := [key for key in ("format", *FIELDS) if key not in manifest]:
        raise CheckpointError(f"{file}: damaged ({missing[0]!r} is missing); {AGAIN}")
    return manifest


def _missing(file: Place, checkpoint: Place) -> CheckpointError:
    return CheckpointError(f"{file}: no such file, so {checkpoint} is no complete checkpoint; {AGAIN}")


def _metadata(entries: Mapping[str, Any]) -> Metadata:
    """What a manifest says of its tensors, as the planner wants it; of each chunk (file, key)."""
    tensors, chunks = {}, {}
    for name, entry in entries.items():
        where = []
        for chunk in entry["chunks"]:
            offsets = torch.Size(chunk["offsets"])
            where.append(ChunkStorageMetadata(offsets, torch.Size(chunk["sizes"])))
            chunks[MetadataIndex(name, offsets)] = (chunk["file"], chunk["key"])
        properties = TensorProperties(dtype=DTYPES[entry["dtype"]])
        tensors[name] = TensorStorageMetadata(properties, torch.Size(entry["shape"]), where)
    return Metadata(tensors, storage_data=chunks)


class Reader(dcp.StorageReader):
    """Reads what is asked for out of a checkpoint's files, each verified before anything is taken from it.

    verify_all: also the files from which this rank needs nothing.
    """

    def __init__(self, path: Place, manifest: Mapping[str, Any], verify_all: bool = False):
        self.path, self.manifest, self.verify_all = path, manifest, verify_all
        try:
            self.metadata = _metadata(manifest["tensors"])
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"{path / MANIFEST}: damaged ({error!r}); {AGAIN}") from None

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
            wanted[self.metadata.storage_data[item.storage_index][0]].append(item)
        for name in self.manifest["files"] if self.verify_all else wanted:
            with self._verified(name) as file, safe_open(file, "pt") as tensors:
                for item in wanted.get(name, []):
                    target = planner.resolve_tensor(item).detach()
                    target.copy_(self._chunk(tensors, item))
                    planner.commit_tensor(item, target)
        done: torch.futures.Future[None] = torch.futures.Future()
        done.set_result(None)
        return done

    def _chunk(self, tensors: Any, item: ReadItem) -> Tensor:
        key = self.metadata.storage_data[item.storage_index][1]
        if not item.lengths:
            return tensors.get_tensor(key)
        spans = zip(item.storage_offsets, item.lengths, strict=True)
        return tensors.get_slice(key)[tuple(slice(first, first + length) for first, length in spans)]

    @contextmanager
    def _verified(self, name: str) -> Iterator[str]:
        """A file of the checkpoint, on this machine, with the content that was written."""
        place = self.path / name
        try:
            with place.fetched() as file:
                with open(file, "rb") as opened:
                    found = hashlib.file_digest(opened, "sha256").hexdigest()
                if found != self.manifest["files"][name]["sha256"]:
                    raise CheckpointError(f"{place}: truncated or changed since it was written; {AGAIN}")
                yield file
        except FileNotFoundError:
            raise _missing(place, self.path) from None
        except SafetensorError as error:
            raise CheckpointError(f"{place}: {error}; {AGAIN}") from None


def _read(reader: Reader, into: dict[str, Tensor]) -> None:
    """Fills tensors, sharded or not, from a checkpoint; each rank for itself."""
    planner = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    try:
        dcp.load(into, storage_reader=reader, planner=planner, no_dist=True)
    except CheckpointException as error:
        raise error.failures[0][0] from None


def load(
    path: Ref,
    nets: Mapping[str, nn.Module],
    optims: Mapping[str, torch.optim.Optimizer],
    world: World | None = None,
    recipe: Mapping[str, Any] | None = None,
    allow: Iterable[str] = (),
    verify_all: bool = False,
) -> dict[str, Any]:
    """Fills networks and their optimisers, sharded or not, from a checkpoint of any number of ranks; a collective.

    Each rank reads, and verifies, the files it needs something from. recipe: of the run that means to go on, whose
    differences outside `allow` are refused; None takes any. Returns the manifest. Raises CheckpointError, on all ranks.
    """
    path = Place.of(path)

    def work() -> dict[str, Any]:
        manifest = read_manifest(path.ref)
        if recipe is not None and (changed := differences(manifest["recipe"], recipe, allow)):
            names = ",".join(change.partition(": ")[0] for change in changed)
            raise CheckpointError(
                f"{path}: written by another recipe:\n  " + "\n  ".join(changed) + f"\nIf that is meant, go on with "
                f"resume_allow=[{names}]; else give this run another name or out folder, or start from those weights "
                "with start.student=<run folder>"
            )
        reader = Reader(path, manifest, verify_all)
        into: dict[str, Tensor] = {}
        for name, net in nets.items():
            found = _part(manifest["tensors"], f"net.{name}")
            own = net.state_dict()
            _fits(own, {key: manifest["tensors"][whole] for key, whole in found.items()}, f"{path}, {name}")
            into |= {whole: own[key].detach() for key, whole in found.items()}
        states = {role: _slots(manifest["tensors"], role, nets[role], into, path) for role in optims}
        _read(reader, into)
        for role, optim in optims.items():
            optim.state.clear()
            optim.state.update(states[role])
        return manifest

    return _together(world or World(), work)


def _slots(
    tensors: Mapping[str, Any], role: str, net: nn.Module, into: dict[str, Tensor], path: Place
) -> dict[Tensor, dict[str, Tensor]]:
    """Room for a role's optimiser state, laid out as its parameters, noted in `into` by name."""
    params, states = dict(net.named_parameters()), defaultdict(dict)
    for key, whole in _part(tensors, f"optim.{role}").items():
        name, _, slot = key.rpartition(".")
        param, entry = params.get(name), tensors[whole]
        if param is None or entry["shape"] not in ([], list(param.shape)):
            raise CheckpointError(f"{path}: does not fit the optimiser; {whole} belongs to no parameter")
        dtype = DTYPES[entry["dtype"]]
        room = torch.empty_like(param, dtype=dtype) if entry["shape"] else torch.empty((), dtype=dtype)
        into[whole] = states[param][slot] = room.detach().to(param.device)
    return states


def _fits(own: Mapping[str, Tensor], theirs: Mapping[str, Mapping[str, Any]], where: str) -> None:
    wrong = sorted(own.keys() ^ theirs.keys()) or [
        key
        for key, value in own.items()
        if [DTYPE_NAMES[value.dtype], list(value.shape)] != [theirs[key]["dtype"], theirs[key]["shape"]]
    ]
    if wrong:
        some = ", ".join(wrong[:3])
        raise CheckpointError(f"{where}: does not fit the network; {len(wrong)} tensors differ, such as {some}")


def _together(world: World, work: Callable[[], T]) -> T:
    """What each rank does by itself; where it fails on one it fails on all, and nobody waits for a rank that left."""
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
    names = _part(tensors, prefix) if prefix else {name: name for name in tensors}
    into = {n: torch.empty(tensors[n]["shape"], dtype=DTYPES[tensors[n]["dtype"]]) for n in names.values()}
    _read(reader, into)
    return {key: into[whole] for key, whole in names.items()}


def load_net(net: nn.Module, tensors: Mapping[str, Tensor], where: str) -> None:
    """Fills an unsharded network from whole tensors. Raises CheckpointError naming what does not fit."""
    theirs = {key: {"dtype": DTYPE_NAMES[value.dtype], "shape": list(value.shape)} for key, value in tensors.items()}
    _fits(net.state_dict(), theirs, where)
    net.load_state_dict(tensors)
