"""Trained generators by their folder: of a run, a checkpoint, an export or a teacher; and a run's export."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from . import build
from .config import ConfigError, override_all, read_json, resolve, validate
from .data.shards import ShardError
from .diffusion.samplers import Call
from .engine.folder import complete
from .engine.manifest import read_manifest
from .folders import EXPORT, PIPELINE, replaceable
from .locks import LOCK, locked
from .networks.card import Card
from .networks.codec import Codec
from .networks.conditions import Texts
from .networks.denoiser import Denoiser
from .networks.export import INFERENCE, check_exportable, export, exported_calls, exported_class_names
from .networks.export_pipeline import export_pipeline, is_stock, scheduler_of
from .networks.parts import save_part
from .networks.pretrained import locate, open_teacher
from .recipe import Recipe, read_run
from .storage.cache import local
from .storage.place import StoreError, located_out
from .texts import masked

SCALED = 1000  # pictures on which a codec's latents are measured


@dataclass(frozen=True)
class Student:
    """A trained network and what made it.

    folder: the run's. checkpoint: path or URL. averaged: whether these are the running average's weights.
    """

    net: Denoiser
    recipe: Recipe
    folder: Path
    checkpoint: Path | str
    step: int
    averaged: bool
    others: dict[str, Denoiser] = field(default_factory=dict)
    """The further networks that its generator calls, by role."""

    @property
    def sampler(self) -> build.Sampler:
        """The sampler of its method."""
        return build.student_sampler(self.recipe.method, self.others | {"student": self.net})


def open_student(
    folder: str | Path,
    average: bool | None = None,
    checkpoint: Path | str | None = None,
    known: Sequence[str | None] = (),
    method: Mapping[str, Any] | None = None,
) -> Student:
    """The student of a run (its last checkpoint, or the one given) or of one of its checkpoints.

    average: the running average's weights or the raw ones; None takes the average where the run kept one.
    known: URLs with their secrets, see `with_secrets`. method: fields of the run's method to change for sampling.
    Raises ValueError naming the file or the field at fault.
    """
    if "://" in str(folder):
        raise ValueError(
            f"run: {str(folder)!r} is not on this machine; give the run's folder, whose recipe.yaml says where its "
            "checkpoints are"
        )
    folder = resolve(folder)
    if complete(folder):
        checkpoint, folder = folder, folder.parents[1]
    elif checkpoint is None:
        checkpoint = build.latest(folder, known)
    if checkpoint is None:
        raise ValueError(
            f"run: no checkpoint below {str(folder)!r}; give a run's folder or one of its checkpoints/step-*"
        )
    recipe = read_run(folder, *known)
    manifest = read_manifest(checkpoint)
    kept = build.has_average(checkpoint)
    if average and not kept:
        raise ValueError(f"average: {checkpoint} holds none, as train.average_decay was null; give average=false")
    averaged = kept if average is None else average
    net = build.student_net(recipe, checkpoint, averaged, folder)
    others = build.other_nets(recipe, checkpoint, net)
    if method:
        recipe = _with_other_calls(recipe, net, method)
    return Student(net, recipe, folder, checkpoint, manifest["step"], averaged, others)


def _with_other_calls(recipe: Recipe, net: Denoiser, given: Mapping[str, Any]) -> Recipe:
    """The recipe with fields of its method changed. Raises ConfigError where that changes no call of the generator."""
    other = validate(
        Recipe, override_all(recipe.written, {f"method.{key}": value for key, value in given.items()})
    ).method
    if other.tag != recipe.method.tag:
        raise ConfigError(f"method.name: {other.tag}, but the run is of {recipe.method.tag}; leave it out")
    if other != recipe.method and other.calls(net) == recipe.method.calls(net):
        raise ConfigError(
            f"method: {', '.join(given)} changes nothing about how {recipe.method.tag} samples; leave it out, or "
            "name a field that its calls depend on, such as times or student_steps"
        )
    return recipe.model_copy(update={"method": other})


def save_teacher(student: Student, folder: Path, half: bool = False) -> None:
    """Writes what a run trained from random weights into a new folder, from which other runs take their teacher, or the
    parts that one works with. The scale of a codec's latents is measured on the run's own data. half: as float16."""
    recipe = student.recipe
    if isinstance(student.net, Codec):
        with build.make_feed(recipe.data, recipe.seed) as feed:
            student.net.fit_scale(next(feed.batches(0, min(SCALED, feed.rows)))["real"])
    parts = recipe.network.parts if recipe.network else None
    save_part(student.net, folder, None if parts is None else locate(parts), half)


def recipe_of(ref: str) -> Recipe | None:
    """The recipe of a run or a checkpoint; None for an export or a teacher. Raises ConfigError naming the file."""
    folder = locate(ref)
    path = (folder.parents[1] if complete(folder) else folder) / "recipe.yaml"
    return read_run(path.parent) if path.is_file() else None


@dataclass(frozen=True)
class Opened:
    """A generator whose networks are open: a student as it was distilled, or a teacher.

    sampler: made from the solver's steps and guidance, which count for a teacher alone. others: the further networks
    that it calls. pipeline: the folder with its codec and text encoders, if it has one. class_names: () if not known.
    """

    net: Denoiser
    sampler: Callable[[int, float], build.Sampler]
    others: dict[str, Denoiser] = field(default_factory=dict)
    pipeline: Path | None = None
    class_names: tuple[str, ...] = ()
    distilled: bool = True


def open_generator(
    ref: str | Path, device: torch.device | str = "cpu", method: Mapping[str, Any] | None = None
) -> Opened:
    """The generator of a run, a checkpoint or an export, or a teacher.

    method: fields of a run's method to change for sampling. Raises ValueError naming the file or the field at fault.
    """
    folder = locate(ref)
    if (folder / "recipe.yaml").is_file() or complete(folder):
        student = open_student(folder, method=method)
        names = _class_names(student) or ()
        sampler = lambda steps, guidance: student.sampler
        opened = Opened(student.net, sampler, student.others, build.pipeline_folder(student.recipe), names)
    elif method:
        raise ConfigError(f"method: {masked(str(ref))} is no run, and its calls are fixed; leave it out")
    else:
        net, calls = open_teacher(folder).requires_grad_(False), exported_calls(folder)
        names = {role for call in calls or () for role in call.roles} - {"student"}
        others = {name: open_teacher(folder / name).requires_grad_(False) for name in names}
        if calls is None:
            sampler = lambda steps, guidance: build.teacher_sampler(net, steps, guidance)
        else:
            sampler = lambda steps, guidance: build.few_step_sampler({"student": net} | others, calls)
        opened = Opened(net, sampler, others, folder, exported_class_names(folder, net.classes), calls is not None)
    for each in (opened.net, *opened.others.values()):
        each.to(device)
    return opened


def open_sampler(
    ref: str,
    steps: int = 18,
    guidance: float = 1.0,
    device: torch.device | str = "cpu",
    prompts: Sequence[str] | None = None,
    negative: str | None = None,
    negative_scale: float = 1.0,
    method: Mapping[str, Any] | None = None,
) -> build.Sampler:
    """The sampler of a run, a checkpoint or an export, as distilled; of a teacher, the solver of its kind.

    steps, guidance: of the solver, for a teacher alone. prompts: what to generate for, where the network takes texts;
    None takes those of a run's recipe. negative: a text to subtract from them in cross-attention, by `negative_scale`.
    method: fields of a run's method to change for sampling.
    Raises ValueError naming the file at fault.
    """
    opened = open_generator(ref, device, method)
    net, texts = opened.net, isinstance(opened.net.conditions, Texts)
    if prompts is not None and not texts:
        raise ValueError("prompts: this model takes no texts; leave them out")
    if prompts is not None:
        build.with_pipeline(net, opened.pipeline, listing=prompts)
    elif texts and net.conditions.listing is None and net.conditions.prompts is None:
        raise ValueError("prompts: missing; this model generates for texts: give one, a list, or a text file")
    if negative is not None:
        build.subtract(net, opened.pipeline, negative, negative_scale)
    return opened.sampler(steps, guidance)


def few_step_calls(method: Any, net: Denoiser) -> tuple[Call, ...]:
    """The calls of a method's generator. Raises ValueError for a method whose student stays a diffusion model."""
    calls = method.calls(net)
    if not calls:
        raise ValueError(
            f"run: {method.tag} samples by heun-{method.heun_steps}, which is no few-step generator; distil it, then "
            "export that"
        )
    return calls


def check_export(method: Any, net: Denoiser, folder: Path | None = None) -> None:
    """Raises ValueError for a student that cannot be exported. The weights are not looked at. folder: of its teacher's
    pipeline."""
    calls = few_step_calls(method, net)
    if is_stock(net, folder):
        scheduler_of(net, calls)
    else:
        check_exportable(net, calls)


def export_run(
    run: str | Path,
    rows: Sequence[dict[str, Any]] = (),
    out: str | Path | None = None,
    *,
    average: bool | None = None,
    licence: str | None = None,
    overwrite: bool | None = None,
    known: Sequence[str | None] = (),
    method: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Exports a run's student, by default to `<run>/export`, where an earlier export is replaced.

    out: another folder, or a URL.
    rows: of the closing table, for the model card; without any, those in `<run>/scores.json` if the run kept them.
    known: URLs with their secrets, see `with_secrets`. method: fields of the run's method to change for sampling; the
    scores of the run are then left out of the card.
    Returns what a job prints: folder, step, averaged, calls, max_difference; of a stock pipeline, call, its call's
    arguments, and lora, the folder of the adapter's files; both are None where there are none. Raises ValueError.
    """
    overwrite = (out is None) if overwrite is None else overwrite
    if out is not None:
        target = located_out(out)
        kind = PIPELINE if (target / INFERENCE).is_file() else EXPORT
        replaceable(target, kind, overwrite=overwrite)
    student = open_student(run, average, known=known, method=method)
    recipe, folder = student.recipe, student.folder
    scores = folder / "scores.json"
    if not rows and not method and scores.is_file():
        rows = read_json(scores, list)
        for i, row in enumerate(rows):
            if not isinstance(row, dict) or not {"sampler", "nfe", "images"} <= row.keys():
                raise ConfigError(f"{scores}: row {i + 1} is no line of a closing table; remove the file, or mend it")
    target = folder / "export" if out is None else target
    calls = few_step_calls(recipe.method, student.net)
    elsewhere = "export to another folder with out=..."
    card, stock, lora = _card(student, rows, licence), None, None
    with locked(folder / LOCK, way_out=elsewhere) if out is None else contextlib.nullcontext():
        pipeline = build.pipeline_folder(recipe)
        if is_stock(student.net, pipeline):
            adapter = None
            if recipe.lora("student") is not None:
                adapter = build.trained_student(recipe, student.checkpoint, student.averaged)
            options = {"calls": calls, "card": card, "adapter": adapter, "overwrite": overwrite}
            worst = export_pipeline(student.net, pipeline, target, **options)
            stock = read_json(local(target) / INFERENCE)["call"]
            lora = f"{target}/lora" if (local(target) / "lora").is_dir() else None
        else:
            options = {"others": student.others, "class_names": _class_names(student), "overwrite": overwrite}
            worst = export(student.net, target, calls=calls, card=card, **options)
    return {
        "folder": str(target),
        "step": student.step,
        "averaged": student.averaged,
        "calls": len(calls),
        "max_difference": worst,
        "call": stock,
        "lora": lora,
    }


def _card(student: Student, rows: Sequence[dict[str, Any]], licence: str | None) -> Card:
    recipe, train = student.recipe, student.recipe.train
    paper = (sys.modules[type(recipe.method).__module__].__doc__ or "").strip().splitlines()[0]
    weights = "running average" if student.averaged else "raw weights"
    if (adapter := recipe.lora("student")) is not None:
        weights += f" of a LoRA of rank {adapter.rank} on {', '.join(adapter.targets)}, merged"
    return Card(
        name=recipe.name,
        teacher=_public_name(recipe.teacher),
        method=f"{recipe.method.tag}: {paper}",
        data="" if recipe.data is None else _public_name(recipe.data.path),
        training=f"step {student.step} of {train.steps}, batch {train.batch}, seed {recipe.seed}, {weights}",
        licence=licence or recipe.licence,
        scores=tuple(rows),
        reference=_public_name(recipe.evaluate.reference or recipe.evaluate.inception_reference),
    )


def _public_name(ref: str | None) -> str:
    """A reference as others can read it: a path of this machine is only its last name, a URL is without its secrets."""
    return "" if ref is None else Path(ref).name if Path(ref).is_absolute() else masked(ref)


def _class_names(student: Student) -> tuple[str, ...] | None:
    """From the data's manifest, where the data is still at hand and is what the network was trained for."""
    if student.recipe.data is None:
        return None
    try:
        manifest = build.open_data(student.recipe.data).manifest
    except (ShardError, StoreError, ConfigError):  # it is gone, or not to be had from this machine
        return None
    return manifest.class_names if len(manifest.class_names) == student.net.classes else None
