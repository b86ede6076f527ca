"""The emoji: their packages, their pictures and captions, and what is held out."""

from __future__ import annotations

import io
import json
import subprocess
import tarfile

import numpy as np
import pytest

from fewstep.data.emoji import COLOURS, NEEDED, STYLES, caption, emoji, held_out
from fewstep.data.source import Reading, SourceError

NAMES = ["red-heart", "zebra", "1st-place-medal", "cat-face", "dove", "avocado", "bed", "comet", "cow", "door"]
# A drawing that fills its left half; with the margin of 1/16 on each side its 64 pixels are 56.9 wide, from 3.6 on.
LEFT = '<path fill="#f00" d="M0 0h8v16h-8z"/>'


def package(style: str, names: list[str]) -> dict[str, bytes]:
    """The two files of a package, with drawings under these names and one of a skin tone."""
    icons = {name: {"body": LEFT} for name in [*names, f"only-{style}", "hand-light-skin-tone"]}
    content = {"icons.json": {"icons": icons, "width": 16, "height": 16}}
    content["metadata.json"] = {"categories": {"Pets": ["cat-face", "cow", "bed"], "Rest": ["door"]}}
    content["package.json"] = {"version": STYLES[style].version}
    return {name: json.dumps(content[name]).encode() for name in NEEDED}


@pytest.fixture
def packages(tmp_path):
    """A folder with one package as npm packs it, and two unpacked in the two places where they may lie."""
    with tarfile.open(tmp_path / STYLES["twemoji"].archive, "w:gz") as tar:
        for name, data in package("twemoji", NAMES).items():
            member = tarfile.TarInfo(f"package/{name}")
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    for style, place in (("fluent", tmp_path), ("noto", tmp_path / "node_modules")):
        folder = place / STYLES[style].package
        folder.mkdir(parents=True)
        for name, data in package(style, NAMES).items():
            (folder / name).write_bytes(data)
    return tmp_path


def test_captions_name_the_drawing_its_style_and_its_background(packages):
    captions = [row.caption for row in emoji(packages).examples()]
    assert captions[:8] == [f"1st place medal, in twemoji style, on a {colour} background" for colour in COLOURS]
    assert caption("red-heart", "noto", "blue") == "red heart, in noto style, on a blue background"


def test_a_tenth_of_the_pairs_is_held_out_and_of_each_name_something_stays(packages):
    train, test = emoji(packages), emoji(packages, "test")
    assert (train.total, test.total) == (8 * 27, 8 * 3) and train.info["names"] == 10
    rows = [{row.caption for row in source.examples()} for source in (train, test)]
    assert not rows[0] & rows[1] and len(rows[0] | rows[1]) == 8 * 30
    assert {row.caption for row in emoji(packages, "all").examples()} == rows[0] | rows[1]
    pairs = {text.rpartition(",")[0] for text in rows[1]}
    assert pairs == {f"{name.replace('-', ' ')}, in {style} style" for name, style in HELD}  # the same for ever
    many = [held_out(f"name-{i}") for i in range(3000)]
    assert [round(many.count(style) / 3000, 1) for style in STYLES] == [0.1, 0.1, 0.1]


HELD = [("red-heart", "noto"), ("1st-place-medal", "fluent"), ("cat-face", "twemoji")]


def test_groups_of_names_may_be_taken_alone(packages):
    rows = {row.caption.partition(",")[0] for row in emoji(packages, reading=Reading(groups=("Pets",))).examples()}
    assert rows == {"cat face", "cow", "bed"}
    with pytest.raises(SourceError, match="groups: 'Cats' is not one of Pets, Rest"):
        emoji(packages, reading=Reading(groups=("Cats",)))


def test_a_drawing_lies_on_its_background_with_a_margin(packages):
    row = next(iter(emoji(packages).examples()))
    edges = row.image[:, 32, :]
    white, red = np.array(COLOURS["white"]), np.array((255, 0, 0))
    assert row.image.shape == (3, 64, 64) and row.image.dtype == np.uint8
    assert (row.image[:, :3].reshape(3, -1).T == white).all()
    assert (edges[:, 4:32].T == red).all() and (edges[:, 32:].T == white).all()
    assert edges[0, 3] == 255 and (np.abs(edges[1:, 3] - 142.0) <= 16).all()  # 4/9 of this pixel is covered


@pytest.mark.parametrize(
    "damage, text",
    [
        (lambda files: files.pop("icons.json"), "no iconify-json-fluent-emoji-flat-1.2.6.tgz"),
        (lambda files: files.update({"package.json": b'{"version": "9"}'}), "fluent-emoji-flat 9; run `npm pack"),
        (lambda files: files.update({"icons.json": b'{"icons": 1}'}), "is damaged .*; run `npm pack"),
        (lambda files: files.update({"icons.json": b"{"}), "icons.json: not valid JSON"),
    ],
)
def test_a_package_that_is_not_as_published_is_named(packages, damage, text):
    folder = packages / STYLES["fluent"].package
    files = {name: (folder / name).read_bytes() for name in NEEDED}
    damage(files)
    for name in NEEDED:
        (folder / name).unlink()
    for name, data in files.items():
        (folder / name).write_bytes(data)
    with pytest.raises(SourceError, match=text):
        emoji(packages)


def test_a_download_that_fails_names_the_package_and_the_way_out(monkeypatch):
    failed = subprocess.CompletedProcess([], 1, "", "npm error 404 Not Found")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(SourceError, match="@iconify-json/twemoji@1.2.5: the download failed .*404.*give path="):
        emoji()
    with pytest.raises(SourceError, match="split: 'validation'; this set has train, test and all"):
        emoji(split="validation")
