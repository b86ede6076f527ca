"""Names and folders: what is plain, what may be replaced, and that nothing of another origin is touched."""

from __future__ import annotations

import json
import os
import stat

import pytest

from fewstep.folders import (
    EXPORT,
    MARK,
    NETWORK,
    SHARDS,
    FolderError,
    claim,
    cleaned_name,
    kind_of,
    overwritable,
    plain_name,
    replace,
    replaceable,
    usable,
    write_private,
)

NETWORK_JSON = json.dumps({"model": "UNet2DModel", "schedule": {"name": "edm"}, "prediction": "edm"})
MANIFEST = json.dumps({"format": 1, "kind": "image", "rows": 1, "shards": []})


def fill(folder, files):
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder


def content(folder):
    return {str(p.relative_to(folder)): p.read_text() for p in folder.rglob("*") if p.is_file()}


WHOLE = {
    SHARDS: {"manifest.json": MANIFEST, "shard-00000.parquet": "rows"},
    NETWORK: {"fewstep.json": NETWORK_JSON, "unet/config.json": "{}", "unet/diffusion_pytorch_model.safetensors": "w"},
    EXPORT: {
        "fewstep.json": NETWORK_JSON,
        "model_index.json": json.dumps({"sampling": {}}),
        "README.md": "card",
        "pipeline.py": "code",
        "unet/config.json": "{}",
        "unet/diffusion_pytorch_model.safetensors": "w",
    },
}


@pytest.mark.parametrize("name", ["a", "Mädchen 2", "v1.2+b_c-d", "-x", "n" * 128, "ü" * 64])
def test_plain_names_pass(name):
    assert plain_name(name) == name


@pytest.mark.parametrize(
    "name",
    ["", ".", "..", ".hidden", "a/b", "../x", "/abs", "a\\b", "a\n", "a\nb", "a\0", "50%", "a:b", "n" * 129, "ü" * 65],
)
def test_other_names_are_refused_and_cleaned(name):
    with pytest.raises(FolderError, match="^name: .* is no plain name; use letters"):
        plain_name(name)
    assert plain_name(cleaned_name(name, room=16), room=16)


def test_a_cleaned_name_keeps_what_it_can():
    assert cleaned_name("50% off") == "50_ off"
    assert cleaned_name("v1:b") == "v1_b"
    assert cleaned_name("fashion_mnist") == "fashion_mnist"
    assert cleaned_name("ü" * 100, room=16) == "ü" * 56


@pytest.mark.parametrize("kind", WHOLE, ids=lambda kind: kind.what.split()[1])
def test_a_whole_of_its_kind_is_replaced_when_asked(tmp_path, kind):
    old, new = fill(tmp_path / "out", WHOLE[kind]), fill(tmp_path / "new", {"a": "new"})
    with pytest.raises(FolderError, match="^out: .* exists; choose another folder, or replace it with overwrite=true"):
        replace(new, old, kind, overwrite=False)
    assert content(old) == WHOLE[kind]
    replace(new, old, kind, overwrite=True)
    assert content(old) == {"a": "new"}
    assert os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize("kind", WHOLE, ids=lambda kind: kind.what.split()[1])
@pytest.mark.parametrize("name", ["thesis.tex", "unet/notes.txt", ".git/config", "a folder/manifest.json"])
def test_a_folder_with_a_file_of_another_origin_is_not_replaced(tmp_path, kind, name):
    files = WHOLE[kind] | {name: "mine"}
    old, new = fill(tmp_path / "out", files), fill(tmp_path / "new", {"a": "new"})
    with pytest.raises(FolderError, match="so it is not replaced") as caught:
        replace(new, old, kind, overwrite=True)
    assert name in str(caught.value) and "\n" not in str(caught.value)
    assert content(old) == files and content(new) == {"a": "new"}


@pytest.mark.parametrize("kind", WHOLE, ids=lambda kind: kind.what.split()[1])
def test_folders_of_another_kind_are_not_replaced(tmp_path, kind):
    others = [files for other, files in WHOLE.items() if other is not kind]
    for i, files in enumerate([*others, {"thesis.tex": "mine"}, {"manifest.json": "[1]", "fewstep.json": "{" * 9999}]):
        if not (kind is NETWORK and files is WHOLE[EXPORT]):
            old = fill(tmp_path / f"{i}", files)
            with pytest.raises(FolderError, match=f"is not {kind.what}, so it is not replaced"):
                replaceable(old, kind, overwrite=True)
    with pytest.raises(FolderError, match="not replaced"):  # an export holds a network, and more
        replaceable(fill(tmp_path / "export", WHOLE[EXPORT]), NETWORK, overwrite=True)


def test_files_links_and_sources_are_not_replaced(tmp_path):
    fill(tmp_path, {"file": "mine", "photos/a.png": "mine"})
    whole = fill(tmp_path / "sets" / "shards", WHOLE[SHARDS])
    (tmp_path / "link").symlink_to(whole)
    for name, why in (("file", "is a file"), ("link", "is a link; give the folder that it leads to")):
        with pytest.raises(FolderError, match=why):
            replaceable(tmp_path / name, SHARDS, overwrite=True)
    for out in (tmp_path / "photos", tmp_path):
        with pytest.raises(FolderError, match="is or contains .*photos', which is read"):
            replaceable(out, SHARDS, overwrite=True, apart=[None, tmp_path / "photos"])
    with pytest.raises(FolderError, match="is or contains"):
        replaceable(whole, SHARDS, overwrite=True, apart=[tmp_path / "link"])
    replaceable(tmp_path / "photos" / "shards", SHARDS, overwrite=False, apart=[tmp_path / "photos"])
    (whole / "more.parquet").symlink_to(tmp_path / "file")
    with pytest.raises(FolderError, match="also holds 'more.parquet'"):
        replaceable(whole, SHARDS, overwrite=True)


def test_a_folder_that_grows_is_marked_before_anything_is_in_it(tmp_path):
    folder = tmp_path / "runs" / "a"
    claim(folder, "run")
    assert os.listdir(folder) == [MARK] and stat.S_IMODE(os.stat(folder / MARK).st_mode) == 0o600
    fill(folder, {"recipe.yaml": "x: 1", "notes.txt": "mine"})
    claim(folder, "run")
    assert kind_of(folder) == "run" and content(folder)["notes.txt"] == "mine"
    with pytest.raises(FolderError, match="^name: .* holds a run, and no sweep, so nothing is written there"):
        usable(folder, "sweep")


def test_a_folder_of_another_origin_is_not_used(tmp_path):
    mine = {"recipe.yaml": "mine", "checkpoints/step-00000007/thesis.txt": "mine"}
    folder = fill(tmp_path / "notes", mine)
    with pytest.raises(FolderError, match="holds files, but no run of ours, so nothing is written there; choose"):
        claim(folder, "run")
    assert content(folder) == mine
    with pytest.raises(FolderError, match="is a file"):
        claim(fill(tmp_path, {"file": "mine"}) / "file", "run")
    (tmp_path / "empty").mkdir()
    claim(tmp_path / "empty", "sweep")
    assert kind_of(tmp_path / "empty") == "sweep"


def test_runs_and_sweeps_of_earlier_versions_are_known_by_their_records(tmp_path):
    run = fill(tmp_path / "run", {"tracking/journal.jsonl": '{"serial": 1, "op": "open"}\n{"serial": 2}\n'})
    sweep = fill(tmp_path / "sweep", {"trials.jsonl": '{"event": "sweep"}\n', **content(run)})
    claim(run, "run")
    claim(sweep, "sweep")
    assert kind_of(run) == "run" and kind_of(sweep) == "sweep"
    for i, text in enumerate(["", "[]\n", "{\n", '{"op": "other"}\n', "[" * 9999]):
        with pytest.raises(FolderError, match="no run of ours"):
            usable(fill(tmp_path / f"other{i}", {"tracking/journal.jsonl": text}), "run")


def test_a_file_is_overwritten_only_where_it_was_made_here(tmp_path):
    fill(tmp_path, {"holiday.png": "x" * 300_000, "grid.png": "made by fewstep" + "x" * 300_000})
    (tmp_path / "end.npz").write_bytes(b"x" * 300_000 + b"covariance.npy")
    overwritable(tmp_path / "new.png")
    overwritable(tmp_path / "grid.png")
    overwritable(tmp_path / "end.npz", mark="covariance.npy")
    with pytest.raises(FolderError, match="^out: .*holiday.png' was not written by this job, so it is not overwritten"):
        overwritable(tmp_path / "holiday.png")
    with pytest.raises(FolderError, match="is no file"):
        overwritable(tmp_path)


def test_a_private_file_is_whole_and_its_owners_alone(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("old")
    path.chmod(0o644)
    write_private(path, "new ü")
    assert path.read_text(encoding="utf-8") == "new ü" and stat.S_IMODE(path.stat().st_mode) == 0o600
    with pytest.raises(UnicodeEncodeError):
        write_private(path, "\ud800")
    assert os.listdir(tmp_path) == ["recipe.yaml"]
