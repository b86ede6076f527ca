"""Checkpoints: exact on any number of ranks, whole or not there, on a disk and in an object store."""

from __future__ import annotations

import ctypes
import errno
import json
import os
import re
import resource
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import fsspec
import pytest
import torch
import torch.distributed as dist
import toy
from safetensors.torch import load_file

from fewstep.config import differences
from fewstep.engine import checkpoint
from fewstep.engine.checkpoint import load, load_net, read_weights, tensors_of
from fewstep.engine.folder import checkpoints, complete, newest, step_of
from fewstep.engine.manifest import CheckpointError, covers, read_manifest, signature
from fewstep.engine.retention import Keep
from fewstep.engine.saver import Saver
from fewstep.engine.world import Layout, World, full
from fewstep.methods import METHODS
from fewstep.storage.place import Place, writable
from fewstep.texts import quoted

GAN = METHODS["dmd2"](critic_updates_per_student_update=2, gan_weight=0.05)
AGAIN = "remove that folder to resume from the one before it, or start anew under another name=..."


class Run:
    """Two networks and their optimisers, of which only the student's has stepped."""

    def __init__(self, seed: int = 0, world: World | None = None, steps: int = 2):
        self.world = world or World()
        self.nets = {"student": toy.denoiser(seed), "disc": toy.head(seed)}
        self.nets = {role: self.world.place(net) for role, net in self.nets.items()}
        self.optims = {r: torch.optim.AdamW(net.parameters(), lr=1e-2, fused=True) for r, net in self.nets.items()}
        for _ in range(steps):
            self.step()

    def step(self) -> None:
        for i, param in enumerate(self.nets["student"].parameters()):
            param.grad = torch.sin(param.detach() + i)
        self.optims["student"].step()

    def named(self) -> dict[str, torch.Tensor]:
        """All of it, whole, by name."""
        return {k: full(v).clone() for k, v in tensors_of(self.nets, self.optims).items()}

    def save(self, saver: Saver, step: int, recipe: dict | None = None, images: int | None = None, wait: bool = True):
        manifest = {"step": step, "images": 10 * step if images is None else images, "updates": {"student": step}}
        path = saver.save(self.nets, self.optims, manifest | {"recipe": recipe or {}})
        if wait:
            saver.wait()
        return path

    def load(self, path, **kwargs) -> dict:
        return load(path, self.nets, self.optims, self.world, **kwargs)


def steps(folder) -> list[int]:
    return [step_of(path) for path in checkpoints(folder)]


# One process


def test_what_is_loaded_is_what_was_saved_bit_for_bit(tmp_path):
    run, other = Run(), Run(seed=1, steps=5)
    path = run.save(Saver(tmp_path), 7, {"a": 1})
    assert path == tmp_path / "step-00000007" and complete(path) and newest(tmp_path) == path
    manifest = other.load(path, recipe={"a": 1})
    assert toy.same(other.named(), run.named())
    assert {k: manifest[k] for k in ("step", "images", "updates", "world")} == {
        "step": 7,
        "images": 70,
        "updates": {"student": 7},
        "world": 1,
    }
    run.step(), other.step()
    assert toy.same(other.named(), run.named())


def test_what_was_never_trained_has_no_optimiser_state_before_and_after(tmp_path):
    run, other = Run(), Run(seed=1)
    disc = torch.stack([p.square().sum() for p in other.nets["disc"].parameters()]).sum()
    disc.backward()
    other.optims["disc"].step()
    assert other.optims["disc"].state
    other.load(run.save(Saver(tmp_path), 1))
    assert not other.optims["disc"].state and toy.same(other.named(), run.named())


def test_a_file_is_plain_safetensors_and_no_pickle_is_written(tmp_path):
    run = Run()
    run.nets["student"].register_buffer("counts", torch.arange(3))
    run.nets["student"].register_buffer("halves", torch.tensor([0.5, -1.5, 3.0], dtype=torch.bfloat16))
    run.nets["student"].register_buffer("flag", torch.tensor(True))
    path = run.save(Saver(tmp_path), 1)
    assert sorted(p.name for p in path.iterdir()) == ["manifest.json", "rank-00000.safetensors"]
    assert toy.same(load_file(path / "rank-00000.safetensors"), run.named())
    assert toy.same(read_weights(path), run.named())
    assert toy.same(read_weights(path, "net.disc"), toy.weights(run.nets["disc"]))


def test_what_is_saved_is_the_state_at_the_call(tmp_path, monkeypatch):
    run, saver = Run(), Saver(tmp_path)
    write = checkpoint.write_tensors
    monkeypatch.setattr(checkpoint, "write_tensors", lambda *args: time.sleep(0.2) or write(*args))
    before, updates = run.named(), {"student": 1}
    path = saver.save(run.nets, run.optims, {"step": 1, "images": 1, "updates": updates, "recipe": {}})
    assert not complete(path) and saver.failed is None
    run.step()
    updates["student"] = 2
    saver.wait()
    assert toy.same(read_weights(path), before)
    assert read_manifest(path)["updates"] == {"student": 1}


def test_a_step_saved_twice_replaces_itself(tmp_path):
    saver, run = Saver(tmp_path), Run()
    for _ in range(2):
        run.step()
        path = run.save(saver, 1)
    assert toy.same(read_weights(path), run.named())
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


# Damage


@pytest.fixture
def saved(tmp_path) -> Path:
    return Run().save(Saver(tmp_path), 2, {"train": {"batch": 32}, "optim": {"student": {"lr": 1e-3}}})


def fails(path: Path, **kwargs) -> str:
    """The text with which a load is refused."""
    run = Run(seed=1)
    before = run.named()
    with pytest.raises(CheckpointError) as error:
        run.load(path, **kwargs)
    assert toy.same(run.named(), before)
    return str(error.value)


@pytest.mark.fault
def test_a_truncated_or_changed_file_is_named(saved):
    file = saved / "rank-00000.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-100])
    assert fails(saved) == f"{file}: truncated or changed since it was written; {AGAIN}"
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 1
    file.write_bytes(flipped)
    assert fails(saved) == f"{file}: truncated or changed since it was written; {AGAIN}"
    with pytest.raises(CheckpointError, match="truncated or changed"):
        read_weights(saved, "net.disc")


@pytest.mark.parametrize("name", ["manifest.json", "rank-00000.safetensors"])
def test_a_missing_file_is_named(saved, name):
    (saved / name).unlink()
    assert fails(saved) == f"{saved / name}: no such file, so {saved} is no complete checkpoint; {AGAIN}"


DAMAGE = [b'{"format": 2', b"[]", b"{}", b"7", b'{"format": 2, "step": \xff}', b"", b"[" * 999]


@pytest.mark.parametrize("content", DAMAGE, ids=range(len(DAMAGE)))
def test_a_damaged_manifest_is_named(saved, content):
    (saved / "manifest.json").write_bytes(content)
    text = fails(saved)
    assert text.startswith(f"{saved / 'manifest.json'}: damaged (") and text.endswith(AGAIN)
    assert text.count(str(saved)) == 1


def change(path: Path, signed: bool = True, **entries) -> None:
    """Sets fields of a manifest, or removes those given as None. signed: with the hash of the changed content."""
    manifest = json.loads((path / "manifest.json").read_text()) | entries
    manifest = {key: value for key, value in manifest.items() if value is not None and key != "sha256"}
    if signed:
        manifest["sha256"] = signature(manifest)
    (path / "manifest.json").write_text(json.dumps(manifest))


def damaged(path: Path, **kwargs) -> str:
    """The reason for which a manifest is refused."""
    text = fails(path, **kwargs)
    head, tail = f"{path / 'manifest.json'}: damaged (", f"); {AGAIN}"
    assert text.startswith(head) and text.endswith(tail) and "\n" not in text, text
    return text[len(head) : -len(tail)]


def test_a_manifest_vouches_for_itself_and_an_older_one_is_mentioned_once(saved, caplog):
    file, text = saved / "manifest.json", (saved / "manifest.json").read_text()
    file.write_text(text.replace('"images": 20', '"images": 21'))
    assert damaged(saved) == "changed since it was written"
    file.write_text(json.dumps(json.loads(text), indent=3, sort_keys=True))  # its content is the same
    Run(seed=1).load(saved)
    messages = lambda: [record.getMessage() for record in caplog.records if record.name == "fewstep.engine.manifest"]
    assert messages() == []
    change(saved, signed=False)
    for _ in range(2):
        Run(seed=1).load(saved)
    assert messages() == [
        f"{file}: written by an older version, without a hash of itself; only its fields were checked"
    ]


def test_a_manifest_without_a_step_or_of_another_format_is_refused(saved):
    change(saved, step=None)
    assert damaged(saved) == "'step' is missing"
    change(saved, step=2, format=1)
    assert fails(saved) == f"{saved}: checkpoint format 1, this version reads 2; {AGAIN}"


WRONG = {
    "step": ("2", -1, 2.0, True, [], 2**63),
    "images": ("many", -5, 1.5, 10**30),
    "world": (0, "1", False),
    "updates": ([], 3, {"student": -1}, {"student": "2"}, {"student": True}),
    "recipe": ("recipe", [1]),
    "fingerprint": (7, "0" * 16),
    "files": ([], {"rank-00000.safetensors": 5}, {"rank-00000.safetensors": {"bytes": "5", "sha256": "0" * 64}},
              {"rank-00000.safetensors": {"bytes": 5, "sha256": "short"}}),
    "tensors": ([], 5, {"net.disc.x": []}, {"net.disc.x": {"dtype": "F32", "shape": [48]}}),
}  # fmt: skip


@pytest.mark.parametrize("field", WRONG)
def test_each_field_of_a_manifest_has_a_type_and_a_range(saved, field):
    for value in WRONG[field]:
        change(saved, **{field: value})
        assert damaged(saved).startswith(field), value


def test_a_step_is_that_of_the_folder_it_lies_in(saved):
    saved.rename(saved.with_name("step-00000003"))
    assert damaged(saved.with_name("step-00000003")) == "step: 2, but its folder is step-00000003"


def test_files_of_a_checkpoint_are_plain_names_in_its_folder(saved):
    manifest = json.loads((saved / "manifest.json").read_text())
    entry = manifest["files"].pop("rank-00000.safetensors")
    (saved / "rank-00000.safetensors").rename(saved.parent / "outside.safetensors")
    for name in ("../outside.safetensors", str(saved.parent / "outside.safetensors"), "rank-0.safetensors", "a/b", ""):
        text = json.dumps(manifest["tensors"]).replace("rank-00000.safetensors", name)
        change(saved, files={name: entry}, tensors=json.loads(text))
        assert damaged(saved) == f"files: {quoted(name)} is no file of a checkpoint, such as rank-00000.safetensors"


NAME = "net.disc.layers.0.weight"


@pytest.mark.parametrize(
    "chunks",
    [
        [],
        [{"sizes": [24, 48]}],
        [{"offsets": [24, 0]}],
        [{"offsets": [0, 8], "sizes": [48, 40]}],
        [{"sizes": [49, 48]}],
        [{}, {}],
        [{"sizes": [48]}],
        [{"file": "rank-00001.safetensors"}],
        [{"key": 5}],
        "all",
    ],
)
def test_every_element_of_every_tensor_is_covered_once(saved, chunks):
    tensors = json.loads((saved / "manifest.json").read_text())["tensors"]
    entry = tensors[NAME]
    (whole,) = entry["chunks"]
    assert (entry["shape"], whole["sizes"], whole["offsets"]) == ([48, 48], [48, 48], [0, 0])
    entry["chunks"] = chunks if isinstance(chunks, str) else [whole | part for part in chunks]
    change(saved, tensors=tensors)
    assert damaged(saved).startswith(f"tensors.{NAME}.chunks")
    with pytest.raises(CheckpointError, match="chunks"):
        read_weights(saved, "net.student")  # also where that tensor is not asked for


def test_boxes_that_cover_a_shape_once():
    box = lambda *spans: ([a for a, _ in spans], [b - a for a, b in spans])
    assert covers([], [([], [])]) and not covers([], [([], []), ([], [])]) and not covers([], [])
    assert covers([4], [box((0, 4))]) and covers([4], [box((2, 4)), box((0, 2))])
    assert covers([0, 3], [box((0, 0), (0, 3))]) and not covers([0, 3], [])
    assert covers([4], [box((0, 4)), box((4, 4))])  # a rank that has no rows
    assert not covers([4], [box((0, 2)), box((0, 2))]) and not covers([4], [box((0, 3)), box((2, 3))])
    assert not covers([4], [box((0, 5))]) and not covers([4], [box((1, 5))])
    windmill = [box((0, 2), (0, 1)), box((2, 3), (0, 2)), box((1, 3), (2, 3)), box((0, 1), (1, 3)), box((1, 2), (1, 2))]
    assert covers([3, 3], windmill)
    assert not covers([3, 3], [*windmill[:4], box((0, 1), (0, 1))])
    grid = [box((i, i + 2), (j, j + 3), (0, 5)) for i in range(0, 64, 2) for j in range(0, 96, 3)]
    assert covers([64, 96, 5], grid) and not covers([64, 96, 5], [*grid[:-1], grid[0]])


def test_a_manifest_claims_no_more_than_its_files_hold(saved):
    manifest = json.loads((saved / "manifest.json").read_text())
    manifest["tensors"]["net.disc.large"] = {
        "dtype": "F32",
        "shape": [10**12],
        "chunks": [{"offsets": [0], "sizes": [10**12], "file": "rank-00000.safetensors", "key": "large"}],
    }
    change(saved, tensors=manifest["tensors"])
    assert re.fullmatch(r"files.rank-00000.safetensors: \d+ bytes, but its tensors have 40000\d+", damaged(saved))
    files = {"rank-00000.safetensors": manifest["files"]["rank-00000.safetensors"] | {"bytes": 5 * 10**12}}
    change(saved, files=files)
    with pytest.raises(CheckpointError, match="truncated or changed since it was written"):
        read_weights(saved)  # before it asks for the memory


def test_a_chunk_is_in_its_file_what_the_manifest_says(saved):
    tensors = json.loads((saved / "manifest.json").read_text())["tensors"]
    tensors[NAME]["chunks"][0]["key"] = "net.disc.layers.0.bias"
    change(saved, tensors=tensors)
    file = saved / "rank-00000.safetensors"
    with pytest.raises(CheckpointError) as error:
        read_weights(saved, "net.disc")
    assert str(error.value) == (
        f"{file}: net.disc.layers.0.bias is F32 [48] there, and F32 [48, 48] in the manifest; {AGAIN}"
    )
    tensors[NAME]["chunks"][0]["key"] = "nowhere"
    change(saved, tensors=tensors)
    assert f"{file}: " in fails(saved) and "nowhere" in fails(saved)


def test_numbers_that_are_not_finite_are_refused_by_name(tmp_path):
    run = Run()
    with torch.no_grad():
        run.nets["student"].backbone.encoder[0].bias[3] = float("nan")
    path = run.save(Saver(tmp_path), 1)
    text = f"{path}: net.student.backbone.encoder.0.bias holds numbers that are not finite; {AGAIN}"
    for read in (lambda: Run(seed=1).load(path), lambda: read_weights(path, "net.student")):
        with pytest.raises(CheckpointError) as error:
            read()
        assert str(error.value) == text
    assert read_weights(path, "net.disc")


@pytest.mark.parametrize(
    ("slot", "entry", "text"),
    [
        ("exp_avg", {"dtype": "F16"}, "is F16 [48, 11], expected F32 [48, 11]"),
        ("exp_avg_sq", {"dtype": "BOOL"}, "is BOOL [48, 11], expected F32 [48, 11]"),
        ("step", {"dtype": "I64"}, "is I64 [], expected F32 []"),
        ("exp_avg", {"shape": []}, "is F32 [], expected F32 [48, 11]"),
        ("exp_avg", None, "is of this optimiser alone"),
    ],
)
def test_an_optimiser_takes_back_only_what_it_keeps(saved, slot, entry, text):
    manifest = json.loads((saved / "manifest.json").read_text())
    name = f"optim.student.backbone.encoder.0.weight.{slot}"
    manifest["files"]["rank-00000.safetensors"]["bytes"] += 10**6
    manifest["tensors"][name] |= entry or {}
    (chunk,) = manifest["tensors"][name]["chunks"]
    chunk |= {"offsets": [0] * len(manifest["tensors"][name]["shape"]), "sizes": manifest["tensors"][name]["shape"]}
    if entry is None:
        del manifest["tensors"][name]
    change(saved, files=manifest["files"], tensors=manifest["tensors"])
    assert fails(saved) == f"{saved}: does not fit the optimiser; {name} {text}"


def test_a_run_takes_back_only_its_own_counts_and_rates(saved):
    ours = {"step": 0, "updates": {"student": 0}, "rates": {"student": 1.0, "disc": 1.0}, "roll_backs": 0}
    change(saved, rates={"student": 1.0, "disc": 0.2}, roll_backs=1)
    assert Run().load(saved, progress=ours)["roll_backs"] == 1
    for field, value, text in [
        ("rates", None, "rates: expected an object {...}, got null"),
        ("rates", {"student": 1.0}, "rates: disc stands in the checkpoint or in this run, and not in both"),
        ("rates", {"student": 1.0, "disc": "1"}, "rates.disc: expected a finite number, got '1'"),
        ("rates", {"student": 1.0, "disc": float("inf")}, "rates.disc: expected a finite number, got inf"),
        ("rates", {"student": 1.0, "disc": True}, "rates.disc: expected a finite number, got true"),
        ("roll_backs", 0.5, "roll_backs: expected a whole number from 0, got 0.5"),
        ("roll_backs", -1, "roll_backs: expected a whole number from 0, got -1"),
        ("updates", {"fake": 2}, "updates: fake, student stands in the checkpoint or in this run, and not in both"),
    ]:
        good = {"rates": {"student": 1.0, "disc": 0.2}, "roll_backs": 1, "updates": {"student": 2}}
        change(saved, **good | {field: value})
        assert fails(saved, progress=ours) == f"{saved / 'manifest.json'}: does not fit this run ({text}); {AGAIN}"


def test_files_of_others_in_a_folder_of_checkpoints_stay(tmp_path):
    (tmp_path / "step-00000007").mkdir()
    (tmp_path / ".step-of-mine").mkdir()
    for path in (tmp_path / "step-00000007" / "diary.txt", tmp_path / ".step-of-mine" / "rank-00000.safetensors"):
        path.write_text("mine")
    run, saver = Run(), Saver(tmp_path, keep=Keep(last=1))
    path = run.save(saver, 1)
    (path / "notes.txt").write_text("mine")
    run.save(saver, 2)
    run.save(saver, 3)
    left = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    assert left == {
        "step-00000007/diary.txt",
        ".step-of-mine/rank-00000.safetensors",
        "step-00000001/notes.txt",
        "step-00000003/manifest.json",
        "step-00000003/rank-00000.safetensors",
    }
    assert steps(tmp_path) == [3]


def test_a_checkpoint_of_other_networks_is_refused(saved):
    run = Run(seed=1)
    run.nets["student"] = toy.denoiser(width=16)
    text = r"step-00000002, student: does not fit the network; 7 tensors differ, such as backbone.encoder.0.weight, "
    with pytest.raises(CheckpointError, match=text):
        run.load(saved)
    with pytest.raises(CheckpointError, match="there: does not fit the network; 2 tensors differ"):
        weights = read_weights(saved, "net.disc")
        load_net(toy.head(), {k: v for k, v in weights.items() if "bias" in k}, "there")
    tensors = read_manifest(saved)["tensors"]
    name = "optim.student.backbone.encoder.0.weight.exp_avg"
    change(saved, tensors={k.replace(name, "optim.student.nothing.exp_avg"): v for k, v in tensors.items()})
    assert "does not fit the optimiser; optim.student.nothing.exp_avg belongs to no parameter" in fails(saved)


# Another recipe


def test_a_changed_recipe_is_refused_with_the_changed_fields(saved):
    new = {"train": {"batch": 64, "clip": [1, 2]}, "optim": {"student": {"lr": 2e-3}}}
    assert fails(saved, recipe=new) == (
        f"{saved}: written by another recipe:\n"
        "  optim.student.lr: 0.001 -> 0.002\n"
        "  train.batch: 32 -> 64\n"
        "  train.clip: not there -> [1, 2]\n"
        "If that is meant, go on with resume_allow=[optim.student.lr,train.batch,train.clip]; else give this run "
        "another name or out folder, or start from those weights with start.student=<run folder>"
    )
    assert "train.clip" not in fails(saved, recipe=new, allow=["train.clip", "optim.student"])
    assert "optim" not in fails(saved, recipe=new, allow=["optim"])
    run = Run(seed=1)
    run.load(saved, recipe=new, allow=["optim.student.lr", "train"])
    assert toy.same(run.named(), Run().named())


def test_differences_are_of_values_and_not_of_spellings():
    old = {"a": {"b": 1, "c": [0.9, 0.999]}, "d": None, "e": {}}
    assert differences(old, {"e": {}, "d": None, "a": {"c": (0.9, 0.999), "b": 1}}) == []
    assert differences(old, old | {"e": {"f": 1}}) == ["e: {} -> not there", "e.f: not there -> 1"]
    assert differences(old, old | {"a": {"b": 1}}, allow=["a.c"]) == []
    assert differences({"ab": 1}, {"ab": 2}, allow=["a"]) == ["ab: 1 -> 2"]


# What stays


def test_which_checkpoints_stay():
    images = {step: 100 * step for step in range(1, 11)}
    scores = {2: 0.5, 3: 0.1, 5: float("nan"), 7: 0.3, 9: 0.9}
    assert Keep(last=2).choose(images, scores) == {9, 10}
    assert Keep(last=20).choose(images, scores) == set(images)
    assert Keep(last=1, best=2).choose(images, scores) == {3, 7, 10}
    assert Keep(last=1, best=2, higher=True).choose(images, scores) == {2, 9, 10}
    assert Keep(last=1, best=9).choose(images, scores) == {2, 3, 7, 9, 10}
    assert Keep(last=1).choose(images, scores, pending=[4, 40]) == {4, 10}
    assert Keep(last=1, every_images=300).choose(images, {}) == {3, 6, 9, 10}
    assert Keep(last=1, every_images=250).choose(images, {}) == {3, 5, 8, 10}  # the first after 250, 500, 750, 1000
    assert Keep(last=1, back_steps=4).choose(images, {}) == {6, 7, 8, 9, 10}
    assert Keep(last=1, back_steps=4).choose({0: 0, 5: 500, 10: 1000}, {}) == {5, 10}
    assert Keep(last=1, back_steps=40).choose(images, {}) == set(images)


def test_retention_follows_the_scores_and_survives_a_restart(tmp_path):
    run, keep = Run(), Keep(last=1, best=1, every_images=100)
    saver = Saver(tmp_path, keep=keep)
    for step in range(1, 7):
        saver.pending(step)
        run.save(saver, step)
    assert steps(tmp_path) == [1, 2, 3, 4, 5, 6]
    for step in (1, 2, 3, 4, 5):
        saver.scored(step, abs(step - 3))
    run.save(saver, 7)
    assert steps(tmp_path) == [3, 6, 7]  # the best, one that still waits for its score, the newest
    saver = Saver(tmp_path, keep=keep)
    for step in (8, 9, 10, 11):
        run.save(saver, step)
    assert steps(tmp_path) == [3, 10, 11]
    saver.scored(11, 0.0)
    Saver(tmp_path, keep=Keep(last=1)).remove_after(10)
    assert steps(tmp_path) == [3, 10]


def test_an_engine_keeps_what_its_settings_say(tmp_path):
    train = {"steps": 12, "report_every": 2, "save_every": 2, "batch": 2, "keep": 2, "keep_every_images": 8}
    toy.finish(toy.make_engine("denoising", folder=tmp_path, **train))
    assert steps(tmp_path) == [4, 8, 10, 12]


# Where nothing can be written


@pytest.mark.fault
def test_a_folder_that_cannot_be_written_is_named_before_training(tmp_path):
    writable(tmp_path / "new" / "run")
    assert list((tmp_path / "new" / "run").iterdir()) == []
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        text = rf"storage: cannot write in {folder} \(.*\); choose another with storage="
        with pytest.raises(ValueError, match=text):
            writable(folder, "storage")
    with pytest.raises(ValueError, match=r"gs://bucket/x: gs:// needs another package: pip install gcsfs"):
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(sys.modules, "gcsfs", None)
            writable("gs://bucket/x")
    with pytest.raises(ValueError, match="nowhere://x: .*; give a path, or a URL such as s3://bucket/folder"):
        writable("nowhere://x")


def test_a_failed_write_is_known_at_once_and_raised_when_waited_for(tmp_path, monkeypatch):
    saver, run = Saver(tmp_path), Run()
    first = run.save(saver, 1)

    def lost(*args):
        raise OSError(errno.EROFS, "Read-only file system")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "write_tensors", lost)
        second = run.save(saver, 2, wait=False)
        deadline = time.monotonic() + 20
        while saver.failed is None and time.monotonic() < deadline:
            time.sleep(0.01)
        text = (
            f"{second}: not saved (rank 0: {tmp_path}/.step-00000002/rank-00000.safetensors: Read-only file system); "
            "the checkpoints before it are intact. "
            "Repair that or choose another place with storage=..., and start again"
        )
        assert str(saver.failed) == text
        with pytest.raises(CheckpointError) as error:
            run.save(saver, 3)
        assert str(error.value) == text and saver.failed is None
    assert steps(tmp_path) == [1] and toy.same(read_weights(first), run.named())
    assert (tmp_path / ".step-00000002").exists()
    run.save(saver, 3)
    assert steps(tmp_path) == [1, 3] and len(list(tmp_path.iterdir())) == 2


@pytest.mark.fault
def test_a_place_where_nothing_can_be_made_is_an_error_of_the_save():
    with pytest.raises(ValueError, match=r"out: cannot write in /proc/run \(.*\); choose another with out="):
        writable("/proc/run")
    with pytest.raises(
        CheckpointError, match=r"/proc/run/step-00000001: not saved \(rank 0: /proc/run/.step-00000001: "
    ):
        Run().save(Saver("/proc/run"), 1)


@pytest.mark.fault
def test_what_a_killed_write_left_is_removed_at_the_start(tmp_path):
    run = Run()
    run.save(Saver(tmp_path), 1)
    for name in (".step-00000002", ".step-00000003.1234", "step-00000004", ".step-00000005.removed"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "rank-00000.safetensors").write_bytes(b"half")
    (tmp_path / "step-00000001").rename(tmp_path / ".step-00000001.replaced")  # killed between two renames
    (tmp_path / "notes").mkdir()
    assert steps(tmp_path) == []
    Saver(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["notes", "step-00000001"]
    assert toy.same(read_weights(tmp_path / "step-00000001"), run.named())


# Object stores


def store_round(folder: str) -> None:
    """Save, replace, retain, load and clear, where nothing can be renamed."""
    run, saver = Run(), Saver(folder, keep=Keep(last=1, best=1))
    for step in (1, 2, 3):
        run.step()
        path = run.save(saver, step)
        if step == 1:
            saver.scored(1, 0.5)
            first = run.named()
    assert path == f"{folder}/step-00000003" and newest(folder) == path
    assert checkpoints(folder) == [f"{folder}/step-00000001", path]
    assert toy.same(read_weights(f"{folder}/step-00000001"), first)
    other = Run(seed=1)
    assert other.load(path, recipe={}, verify_all=True)["step"] == 3
    assert toy.same(other.named(), run.named())
    run.step()
    run.save(saver, 3)
    assert toy.same(read_weights(path), run.named())

    fs, inside = fsspec.url_to_fs(folder)
    fs.pipe_file(f"{inside}/step-00000009/rank-00000.safetensors", b"half")  # its manifest never came
    assert newest(folder) == path
    content = fs.cat_file(f"{inside}/step-00000003/rank-00000.safetensors")
    saver = Saver(folder, keep=Keep(last=1, best=1))  # a restart: it knows the scores
    assert not fs.exists(f"{inside}/step-00000009/rank-00000.safetensors")
    run.save(saver, 4)
    assert steps(folder) == [1, 4] and not fs.exists(f"{inside}/step-00000003/rank-00000.safetensors")
    fs.pipe_file(f"{inside}/step-00000004/rank-00000.safetensors", content[:-1])
    file = "step-00000004/rank-00000.safetensors"
    with pytest.raises(CheckpointError, match=f"{folder}/{file}: truncated or changed"):
        read_weights(newest(folder))
    fs.rm(f"{inside}/{file}")
    with pytest.raises(CheckpointError, match=f"{folder}/{file}: no such file, so {folder}/step-00000004 is no compl"):
        read_weights(f"{folder}/step-00000004")
    writable(folder)


def test_a_store_without_renames():
    store_round("memory:///bucket/run")


def test_checkpoints_in_s3(bucket):
    store_round(f"{bucket}/runs/one")
    with pytest.raises(ValueError, match=r"storage: cannot write in s3://nowhere/x \(.*\); choose another"):
        writable("s3://nowhere/x", "storage")


# Several processes

# A server imports once what costs most, and each process is a fork of it
CONTEXT = torch.multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    ["torch._dynamo", "torch.distributed.checkpoint", "torch.distributed.fsdp", "pytest", "fsspec"]
)


def processes(target: Callable, count: int, *args) -> list[int]:
    """Runs target(rank, *args) in `count` processes; their exit codes."""
    ranks = [CONTEXT.Process(target=target, args=(rank, *map(str, args))) for rank in range(count)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(120)
    return [process.exitcode for process in ranks]


def meet(folder: str, name: str, rank: int, size: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/{name}", rank=rank, world_size=size)


def slow(seconds: float) -> None:
    """Makes the writing slow, so that the training overtakes it."""
    write = checkpoint.write_tensors
    checkpoint.write_tensors = lambda *args: time.sleep(seconds) or write(*args)


def reshards(rank: int, folder: str) -> None:
    """Ranks 0 and 1 save sharded and replicated, and load again; then all four load what those two saved."""
    if rank < 2:
        meet(folder, "two", rank, 2)
        for placement in ("shard", "replicate"):
            run = Run(world=World.current(layout=Layout(placement=placement)))
            whole = run.named()
            path = run.save(Saver(f"{folder}/{placement}", run.world), 1)
            again = Run(1, run.world, steps=3)
            again.load(path)
            assert toy.same(again.named(), whole)
            again.step(), run.step()
            assert toy.same(again.named(), run.named())
        dist.destroy_process_group()
        Path(folder, f"ready-{rank}").touch()
    while not all(Path(folder, f"ready-{r}").exists() for r in (0, 1)):
        time.sleep(0.02)
    meet(folder, "four", rank, 4)
    for saved in ("shard", "replicate"):
        run = Run(1, World.current(layout=Layout(placement="shard")), steps=3)
        run.load(f"{folder}/{saved}/step-00000001", verify_all=True)
        assert toy.same(run.named(), Run().named())
    Path(folder, "shard/step-00000001/rank-00001.safetensors").write_bytes(b"short")
    dist.barrier()
    try:
        run.load(f"{folder}/shard/step-00000001")
    except CheckpointError as error:
        Path(folder, f"error-{rank}").write_text(str(error))
    dist.destroy_process_group()


@pytest.mark.fault
def test_two_ranks_save_and_one_two_or_four_load(tmp_path):
    assert processes(reshards, 4, tmp_path) == [0] * 4
    whole = Run().named()
    path = tmp_path / "replicate" / "step-00000001"
    assert toy.same(read_weights(path), whole)
    one = Run(seed=1)
    assert one.load(path)["world"] == 2
    assert toy.same(one.named(), whole)
    manifest = read_manifest(path)
    assert sorted(manifest["files"]) == ["rank-00000.safetensors", "rank-00001.safetensors"]
    sizes = [entry["bytes"] for entry in manifest["files"].values()]
    assert max(sizes) < 0.6 * sum(sizes)  # what both hold is written once, half by each
    sharded = read_manifest(tmp_path / "shard" / "step-00000001")["tensors"]
    chunks = sharded["net.student.backbone.encoder.0.weight"]["chunks"]
    assert [(chunk["offsets"], chunk["sizes"]) for chunk in chunks] == [([0, 0], [24, 11]), ([24, 0], [24, 11])]
    file = tmp_path / "shard/step-00000001/rank-00001.safetensors"
    for rank in range(4):  # all are told, whoever read the file
        assert f"{file}: truncated or changed since it was written" in (tmp_path / f"error-{rank}").read_text()


def overtakes(rank: int, folder: str) -> None:
    """Trains sharded with every step saved by a slow writer, and without."""
    meet(folder, "meet", rank, 2)
    world, every = World.current(layout=Layout(placement="shard")), {"report_every": 1, "save_every": 1, "steps": 6}
    plain = toy.make_engine(GAN, world=world, **every)
    toy.finish(plain)
    slow(0.1 + 0.1 * rank)
    engine = toy.make_engine(GAN, world=world, folder=Path(folder, "run"), **every)
    overlapped = 0
    for report in engine.run():
        overlapped += not complete(report.checkpoint)
    assert overlapped == 5  # all but the last, for which a run waits
    a, b = tensors_of(engine._parts(), engine.optims), tensors_of(plain._parts(), plain.optims)
    whole = {k: full(v) for k, v in a.items()}
    assert toy.same(whole, {k: full(v) for k, v in b.items()})
    assert toy.same(read_weights(Path(folder, "run/step-00000006")), whole)
    dist.destroy_process_group()


def test_saving_behind_the_training_changes_no_number_and_meets_none_of_its_collectives(tmp_path):
    assert processes(overtakes, 2, tmp_path) == [0, 0]
    assert steps(tmp_path / "run") == [5, 6]


def kill(*args, **kwargs) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def before_its_file(*args) -> None:
    checkpoint.write_tensors = kill


def after_its_file(*args) -> None:
    write = checkpoint.write_tensors
    checkpoint.write_tensors = lambda *args: (write(*args), kill())


def before_the_manifest() -> None:
    checkpoint.Writer.finish = kill


def before_the_rename() -> None:
    Place.rename = kill


POINTS = [before_its_file, before_the_manifest, before_the_rename]


def dies(rank: int, folder: str) -> None:
    point = POINTS[rank]
    saver, run = Saver(Path(folder, point.__name__)), Run()
    run.save(saver, 1)
    point()
    run.save(saver, 2)


@pytest.mark.fault
def test_a_writer_killed_at_three_points_leaves_the_checkpoint_before(tmp_path):
    assert processes(dies, 3, tmp_path) == [-signal.SIGKILL] * 3
    left = [["step-00000001", ".step-00000002"], [], ["rank-00000.safetensors"], ["manifest.json"]]
    for point, files in zip(POINTS, left[1:], strict=True):
        folder = tmp_path / point.__name__
        assert sorted(p.name for p in folder.iterdir()) == sorted(left[0])
        assert set(files) <= {p.name for p in (folder / ".step-00000002").iterdir()}
        assert steps(folder) == [1]
        run = Run(seed=1)
        run.load(newest(folder))
        assert toy.same(run.named(), Run().named())
        run.save(Saver(folder), 2)
        assert sorted(p.name for p in folder.iterdir()) == ["step-00000001", "step-00000002"]


def loses_a_rank(rank: int, folder: str) -> None:
    meet(folder, "meet", rank, 2)
    run = Run(world=World.current(layout=Layout(placement="shard")))
    saver = Saver(f"{folder}/run", run.world)
    run.save(saver, 1)
    if rank == 1:
        after_its_file()
    start = time.monotonic()
    try:
        run.save(saver, 2)
    except CheckpointError as error:
        Path(folder, "error").write_text(str(error))
    assert time.monotonic() - start < 20
    os._exit(0)  # the group has lost a member and cannot be left in order


@pytest.mark.fault
def test_a_rank_killed_while_it_writes_is_an_error_on_the_others_and_no_hang(tmp_path):
    assert processes(loses_a_rank, 2, tmp_path) == [0, -signal.SIGKILL]
    assert f"{tmp_path}/run/step-00000002: not saved (" in (tmp_path / "error").read_text()
    assert steps(tmp_path / "run") == [1]
    assert toy.same(read_weights(tmp_path / "run/step-00000001"), Run().named())


def small_disk(folder: Path, size: int) -> str:
    """A tmpfs that only this process and its children see; where that is not allowed, a limit on files. Its error."""
    libc = ctypes.CDLL(None, use_errno=True)
    new_mounts, new_user, private = 0x00020000, 0x10000000, 1 << 18 | 1 << 14
    for flags in (new_mounts, new_mounts | new_user):
        if libc.unshare(flags) == 0 and libc.mount(b"none", b"/", None, private, None) == 0:
            if libc.mount(b"none", os.fsencode(folder), b"tmpfs", 0, f"size={size}".encode()) == 0:
                return os.strerror(errno.ENOSPC)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size // 4, size // 4))
    return os.strerror(errno.EFBIG)


def fills(_: int, folder: str) -> None:
    """Two ranks on a disk that has room for one checkpoint: the file of the second rank is the larger."""
    disk = Path(folder, "disk")
    reason = small_disk(disk, 400 << 10)
    child = os.fork()
    rank = int(child == 0)
    meet(folder, "meet", rank, 2)
    run = Run(world=World.current(layout=Layout(placement="shard")))
    saver = Saver(disk, run.world)
    path, whole = run.save(saver, 1), run.named()
    if rank == 1:  # a part that only this rank has
        run.nets["large"] = torch.nn.Module()
        run.nets["large"].register_buffer("weight", torch.ones(200_000))
    with pytest.raises(CheckpointError) as error:
        run.save(saver, 2)
    says = rf"{path.parent}/step-00000002: not saved \(.*rank 1: {disk}/.step-00000002/rank-00001.safetensors: {reason}"
    assert re.match(says, str(error.value)), error.value  # rank 0 may meet the full disk too
    assert steps(disk) == [1] and toy.same(read_weights(path), whole)
    dist.barrier()
    dist.destroy_process_group()
    if child:
        _, status = os.waitpid(child, 0)
        os._exit(os.waitstatus_to_exitcode(status))
    os._exit(0)


@pytest.mark.fault
def test_a_full_disk_is_an_error_on_all_ranks_and_the_checkpoint_before_stays(tmp_path):
    (tmp_path / "disk").mkdir()
    assert processes(fills, 1, tmp_path) == [0]
