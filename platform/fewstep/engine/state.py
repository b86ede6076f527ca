"""State: a run at one step, saved atomically and restored exactly.

A checkpoint is a folder `step-00001234` with `state.safetensors` (every tensor by name: `net.student.<parameter>`,
`net.average.<parameter>`, `optim.student.<parameter>.exp_avg`) and `manifest.json` (step, images, updates, the recipe's
fingerprint, sha256). It is written under another name and renamed when whole, so what is visible is complete.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from .world import full

FORMAT = 1
MANIFEST = ("format", "step", "images", "updates", "fingerprint", "sha256")


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; the text names the file and the way out."""


def tensors_of(nets: Mapping[str, nn.Module], optims: Mapping[str, torch.optim.Optimizer]) -> dict[str, Tensor]:
    """All state of networks and optimisers by name, whole and on the CPU; a collective when they are sharded."""
    out = {}
    for name, net in nets.items():
        for key, value in net.state_dict().items():
            out[f"net.{name}.{key}"] = full(value.detach()).cpu().contiguous()
    for role, optim in optims.items():
        names = {p: n for n, p in nets[role].named_parameters()}
        for param, state in optim.state.items():
            for key, value in state.items():
                out[f"optim.{role}.{names[param]}.{key}"] = full(value.detach()).cpu().contiguous()
    return out


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def save(folder: Path, tensors: dict[str, Tensor], manifest: dict[str, Any], keep: int) -> Path:
    """Writes `folder`/step-N and removes all but the newest `keep` checkpoints. Returns its path; rank 0 calls it.

    manifest: step, images, updates and fingerprint of the run.
    """
    target = folder / f"step-{manifest['step']:08d}"
    tmp = folder / f".{target.name}.{os.getpid()}"
    shutil.rmtree(tmp, ignore_errors=True)
    tmp.mkdir(parents=True)
    save_file(tensors, tmp / "state.safetensors")
    manifest = {"format": FORMAT, **manifest, "sha256": _sha256(tmp / "state.safetensors")}
    (tmp / "manifest.json").write_text(json.dumps(manifest, indent=1))
    shutil.rmtree(target, ignore_errors=True)  # the same step saved twice: after a resume, with the same content
    os.replace(tmp, target)
    for old in checkpoints(folder)[:-keep]:
        shutil.rmtree(old)
    return target


def checkpoints(folder: Path) -> list[Path]:
    """The complete checkpoints below a folder, oldest first."""
    return sorted(p for p in folder.glob("step-*") if (p / "manifest.json").is_file())


def read(path: Path, fingerprint: str | None = None) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(tensors, manifest) of a checkpoint, verified.

    fingerprint: of the recipe that means to go on from it; None takes any. Raises CheckpointError.
    """
    again = "remove that folder to resume from the one before it, or start anew under another name=..."
    file = path / "manifest.json"
    try:
        manifest = json.loads(file.read_text())
        if not isinstance(manifest, dict):
            raise CheckpointError(f"{file}: damaged (not a JSON object); {again}")
        if manifest.get("format", FORMAT) != FORMAT:
            raise CheckpointError(f"{path}: checkpoint format {manifest['format']}, this version reads {FORMAT}")
        if missing := [key for key in MANIFEST if key not in manifest]:
            raise CheckpointError(f"{file}: damaged ({missing[0]!r} is missing); {again}")
        found = _sha256(path / "state.safetensors")
    except FileNotFoundError as error:
        raise CheckpointError(f"{error.filename}: no such file, so {path} is no complete checkpoint; {again}") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{file}: damaged ({error}); {again}") from None
    if found != manifest["sha256"]:
        raise CheckpointError(f"{path / 'state.safetensors'}: truncated or changed since it was written; {again}")
    if fingerprint is not None and manifest["fingerprint"] != fingerprint:
        raise CheckpointError(
            f"{path}: written by another recipe (fingerprint {manifest['fingerprint']}, ours {fingerprint}); give this "
            "run another name or out folder, or start from those weights with start.student=<run folder>"
        )
    try:
        return load_file(path / "state.safetensors"), manifest
    except SafetensorError as error:
        raise CheckpointError(f"{path / 'state.safetensors'}: {error}; {again}") from None


def part(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors below a dotted prefix, without it."""
    return {k.removeprefix(prefix + "."): v for k, v in tensors.items() if k.startswith(prefix + ".")}


def load_net(net: nn.Module, tensors: Mapping[str, Tensor], where: str) -> None:
    """Fills a network, sharded or not, from whole tensors. Raises CheckpointError naming what does not fit."""
    own = net.state_dict()
    wrong = sorted(own.keys() ^ tensors.keys()) or [k for k in own if own[k].shape != tensors[k].shape]
    if wrong:
        some = ", ".join(wrong[:3])
        raise CheckpointError(f"{where}: does not fit the network; {len(wrong)} tensors differ, such as {some}")
    with torch.no_grad():
        for key, value in own.items():
            value.copy_(_like(tensors[key], value))


def load_optim(optim: torch.optim.Optimizer, net: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Fills an AdamW's moments; parameters without any had not been trained when the checkpoint was written."""
    state: dict[Tensor, dict[str, Tensor]] = {}
    params = dict(net.named_parameters())
    for key, value in tensors.items():
        name, _, slot = key.rpartition(".")
        param = params[name]
        state.setdefault(param, {})[slot] = value.to(param.device) if value.ndim == 0 else _like(value, param).clone()
    optim.state.clear()
    optim.state.update(state)


def _like(value: Tensor, other: Tensor) -> Tensor:
    """A whole tensor laid out as `other`: distributed over its mesh when it is sharded."""
    if hasattr(other, "full_tensor"):
        from torch.distributed.tensor import distribute_tensor

        return distribute_tensor(value.to(other.device), other.device_mesh, other.placements)
    return value.to(other.device)


def writable(folder: Path) -> None:
    """Raises ValueError when nothing can be written below `folder`: better before hours of training than after."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".probe.{os.getpid()}"
        probe.write_bytes(b"")
        probe.unlink()
    except OSError as error:
        raise ValueError(f"out: cannot write in {folder} ({error.strerror}); choose another with out=...") from None
