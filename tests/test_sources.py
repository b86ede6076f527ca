"""People's own files: what is theirs, which links are followed, and how labels, captions and texts are read."""

from __future__ import annotations

import io
import json
import os
import tarfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from test_prepare import COLOUR, job, picture, refused, rows, tar

from fewstep.config import ConfigError
from fewstep.data import known, source, tars
from fewstep.data.decode import encode
from fewstep.data.folder import folder
from fewstep.data.hub import parquet
from fewstep.data.known import cifar10
from fewstep.data.source import Reading, SourceError, caption_of, classes_of, label_of
from fewstep.data.sources import pack
from fewstep.data.tars import webdataset
from fewstep.data.tree import walk

FOLLOW = Reading(follow_links=True)


def fill(root, files):
    """Writes files below a folder: bytes, text, or the number of a picture."""
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        data = picture(content) if isinstance(content, int) else content
        path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return root


def facts(set_, **fields):
    """The rows of a source: {name: (label, caption)}."""
    return {example.name: (example.label, example.caption) for example in set_.examples()}


def mistake(call, *args):
    """The one line of an error that a person can mend."""
    with pytest.raises((SourceError, ConfigError)) as error:
        call(*args)
    assert "\n" not in str(error.value)
    return str(error.value)


# which files are the user's


def test_hidden_files_and_what_systems_leave_behind_are_no_images_and_no_classes(tmp_path):
    files = ("cat/0.png", "dog/1.png", ".ipynb_checkpoints/2.png", "__MACOSX/cat/0.png", "cat/._0.png",
             "dog/@eaDir/1.png/thumb.jpg", "cat/.thumbs/0.png")  # fmt: skip
    fill(tmp_path, {name: i for i, name in enumerate(files)})
    set_ = folder(tmp_path)
    assert set_.class_names == ("cat", "dog") and facts(set_) == {"cat/0.png": (0, None), "dog/1.png": (1, None)}
    some = ".ipynb_checkpoints, __MACOSX, cat/._0.png, ..."
    assert set_.notes == (f"left out: 5 hidden files and folders: {some}",)


def test_hidden_members_and_archives_are_left_out(tmp_path):
    (tmp_path / "in").mkdir()
    members = {"0.png": picture(0), "0.cls": b"1", "._0.png": b"x", "__MACOSX/0.png": b"x", "./1.png": picture(1)}
    tar(tmp_path / "in" / "a.tar", members | {"./1.cls": b"0"})
    (tmp_path / "in" / "._a.tar").write_bytes(b"AppleDouble")
    set_ = webdataset(tmp_path / "in")
    assert facts(set_) == {"a.tar:0": (1, None), "a.tar:./1": (0, None)}
    assert set_.notes == ("left out: 1 hidden file or folder: ._a.tar", "left out: 2 hidden members")
    for i in range(1, 6):
        fill(tmp_path / "cifar", {f"data_batch_{i}.bin": bytes(3073), f".old/data_batch_{i}.bin": b"\xff" * 3073})
    assert {example.label for example in cifar10(tmp_path / "cifar").examples()} == {0}


def test_pictures_of_other_formats_and_beside_the_classes_are_counted(tmp_path):
    fill(tmp_path, {"cat/0.png": 0, "dog/1.png": 1, "cover.png": 2, "dog/2.heic": "x", "cat/3.HEIC": "x", "a.gif": "x"})
    set_ = folder(tmp_path)
    assert set_.classes == 0 and set_.notes == (
        "no labels: 2 images lie in sub-folders, but 1 beside them",
        "left out: 1 .gif files, a format that is not read",
        "left out: 2 .heic files, a format that is not read",
    )


@pytest.mark.parametrize(
    "name, way_out",
    [("a.parquet", "source=parquet"), ("a.tar", "source=webdataset"), ("a.heic", "convert its .heic files to PNG")],
)
def test_a_folder_without_images_says_what_its_files_are(tmp_path, name, way_out):
    assert way_out in mistake(folder, fill(tmp_path, {name: "x"}))


def test_metadata_below_the_folder_is_not_overlooked(tmp_path):
    fill(tmp_path, {"train/0.png": 0, "train/metadata.jsonl": '{"file": "0.png", "label": 3}\n'})
    assert f"'train/metadata.jsonl' lies below {str(tmp_path)!r}, where it is not read" in mistake(folder, tmp_path)
    assert facts(folder(tmp_path / "train")) == {"0.png": (3, None)}
    fill(tmp_path, {"train/metadata.csv": "file,label\n0.png,3\n"})
    assert "both metadata.csv and metadata.jsonl" in mistake(folder, tmp_path / "train")


# links


def test_links_inside_the_folder_are_followed_once_and_cycles_end(tmp_path):
    fill(tmp_path, {"in/cat/0.png": 0, "in/all/dogs/1.png": 1})
    (tmp_path / "in" / "dog").symlink_to("all/dogs")
    (tmp_path / "in" / "all" / "dogs" / "up").symlink_to(tmp_path / "in")
    (tmp_path / "in" / "cat" / "self").symlink_to(".")
    (tmp_path / "in" / "cat" / "2.png").symlink_to("0.png")
    (tmp_path / "link").symlink_to("in")
    for root in ("in", "link"):
        tree = walk(tmp_path / root, Reading())
        assert tree.files == ("all/dogs/1.png", "cat/0.png", "cat/2.png", "dog/1.png")
        some = "all/dogs/up, cat/self, dog/up"
        assert tree.notes == (f"left out: 3 links to folders that are read already: {some}",)


def test_folders_that_link_to_each_other_are_entered_once_each(tmp_path):
    names = [f"{i:02d}" for i in range(12)]
    for name in names:
        fill(tmp_path, {f"{name}/{name}.png": 0})
        for other in names:
            (tmp_path / name / f"to{other}").symlink_to(tmp_path / other)
    assert 12 <= len(walk(tmp_path, Reading()).files) <= 24


def test_a_link_out_of_the_folder_is_named_and_followed_only_when_asked(tmp_path):
    fill(tmp_path, {"in/cat/0.png": 0, "disk2/dog/1.png": 1, "secret.txt": "mine"})
    (tmp_path / "in" / "dog").symlink_to(tmp_path / "disk2" / "dog")
    line = mistake(folder, tmp_path / "in")
    assert f"'dog' in {str(tmp_path / 'in')!r} is a link to {str(tmp_path / 'disk2' / 'dog')!r}, outside" in line
    assert "follow_links=true" in line
    assert folder(tmp_path / "in", "train", FOLLOW).class_names == ("cat", "dog")
    (tmp_path / "in" / "dog").unlink()
    (tmp_path / "in" / "note.md").symlink_to(tmp_path / "secret.txt")  # nothing that is read
    assert folder(tmp_path / "in").total == 1
    caption = tmp_path / "in" / "cat" / "0.txt"
    caption.symlink_to(tmp_path / "secret.txt")
    assert "'cat/0.txt'" in mistake(folder, tmp_path / "in")
    assert facts(folder(tmp_path / "in", "train", FOLLOW)) == {"cat/0.png": (0, "mine")}
    caption.unlink()
    for name, line in (
        ("metadata.csv", "file\ncat/../../secret.png\n"),
        ("metadata.jsonl", '{"file": "/etc/x.png"}\n'),
    ):
        file = fill(tmp_path / "in", {name: line}) / name
        assert "lies outside" in mistake(folder, tmp_path / "in")
        file.unlink()
    (tmp_path / "in" / "metadata.csv").symlink_to(tmp_path / "secret.txt")
    assert facts(folder(tmp_path / "in")) == {"cat/0.png": (0, None)}
    (tmp_path / "in" / "cat" / "0.png").unlink()
    (tmp_path / "in" / "cat" / "0.png").symlink_to(tmp_path / "disk2" / "dog" / "1.png")
    assert "'cat/0.png'" in mistake(folder, tmp_path / "in")


def test_archives_and_parquet_files_that_are_links_obey_the_same_rule(tmp_path):
    (tmp_path / "in").mkdir()
    tar(tmp_path / "out.tar", {"0.png": picture(0)})
    pq.write_table(pa.table({"image": [picture(0)]}), tmp_path / "out.parquet")
    for call, name in ((webdataset, "a.tar"), (parquet, "a.parquet")):
        (tmp_path / "in" / name).symlink_to(tmp_path / f"out{os.path.splitext(name)[1]}")
        assert "follow_links=true" in mistake(call, tmp_path / "in")
        assert call(tmp_path / "in", "train", FOLLOW).total == 1


def test_a_file_that_cannot_be_read_is_a_corrupt_row(tmp_path):
    fill(tmp_path / "in", {f"{i}.png": i for i in range(3)})
    (tmp_path / "in" / "9.png").symlink_to("gone.png")
    manifest = pack(folder(tmp_path / "in"), tmp_path / "out", max_corrupt=0.3)
    assert manifest.skipped == ("9.png: cannot be read: No such file or directory",) and manifest.rows == 3


def test_names_that_are_not_utf8_end_in_words(tmp_path):
    fill(tmp_path / "in", {"0.png": 0, "1.png": 1, os.fsdecode(b"caf\xe9.png"): "no picture"})
    manifest = pack(folder(tmp_path / "in"), tmp_path / "out", max_corrupt=0.5)
    assert manifest.skipped == ("caf\\xe9.png: no PNG, JPEG, WEBP file",)
    fill(tmp_path / "classes", {os.fsdecode(b"caf\xe9/0.png"): 0, "tea/1.png": 1})
    assert "the folder 'caf\\\\xe9' has a name that is not UTF-8; rename it" in mistake(folder, tmp_path / "classes")


# texts


@pytest.mark.parametrize("kind", ["txt", "metadata.csv", "metadata.jsonl", "tar"])
def test_a_text_in_another_encoding_is_named_with_its_line_and_read_when_it_is_given(tmp_path, kind):
    caption = "café \u2028 crème"

    def write(encoding, caption=caption):
        row = json.dumps({"file": "0.png", "caption": caption}, ensure_ascii=False)
        text = {"metadata.csv": f"file,caption\n0.png,{caption}\n", "metadata.jsonl": f"{row}\n"}.get(kind, caption)
        data = text.encode(encoding, "replace")
        if kind == "tar":
            return tar(tmp_path / "a.tar", {"0.png": picture(0), "0.txt": data})
        return fill(tmp_path, {"0.png": 0, "0.txt" if kind == "txt" else kind: data})

    call = webdataset if kind == "tar" else folder
    for encoding in ("utf-8", "utf-8-sig", "utf-16", "utf-32"):
        assert [caption for _, caption in facts(call(write(encoding))).values()] == ["café \u2028 crème"]
    line = mistake(call, write("cp1252"))
    where = {"txt": "0.txt", "tar": "a.tar:0.txt"}.get(kind, kind)
    number = 2 if kind == "metadata.csv" else 1
    assert f"{where}: not UTF-8 text (line {number}, byte 0xe9); save it as UTF-8, or name its encoding" in line
    set_ = call(write("cp1252"), "train", Reading(encoding="cp1252"))
    assert [caption for _, caption in facts(set_).values()] == ["café ? crème"]
    assert "NUL character" in mistake(call, write("utf-16-le", "a cat"))
    set_ = call(write("utf-16-le"), "train", Reading(encoding="utf-16-le"))
    assert [caption for _, caption in facts(set_).values()] == ["café \u2028 crème"]


def test_an_unknown_encoding_is_refused_by_its_name():
    for name in ("utf8000", "hex"):
        assert mistake(Reading, name).startswith(f"encoding: '{name}' is no encoding")


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\x1c", "\x1e", "\r"])
def test_a_line_of_metadata_ends_at_a_newline_alone(tmp_path, separator):
    text = f"first{separator}second"
    lines = [json.dumps({"file_name": f"{i}.png", "text": text}, ensure_ascii=False) for i in range(2)]
    for end in ("\n", "\r\n"):
        fill(tmp_path / "jsonl", {"0.png": 0, "1.png": 1, "metadata.jsonl": end.join(lines) + end})
        assert {caption for _, caption in facts(folder(tmp_path / "jsonl")).values()} == {text}
        content = end.join(["file,caption", f'0.png,"{text}"', f'1.png,"{text}"'])
        fill(tmp_path / "csv", {"0.png": 0, "1.png": 1, "metadata.csv": content})
        assert {caption for _, caption in facts(folder(tmp_path / "csv")).values()} == {text}


BAD_LINES = {
    "metadata.csv": {
        "file,caption\n0.png,a cat, sitting\n": "line 2 has more values than the header; put a text with a comma in q",
        'file,caption\n0.png,"a cat\n': "line 2: unexpected end of data",
        "file;caption\n0.png;a cat\n": "line 2 has no 'file'; the columns are file, caption, label, and here: file;",
        "caption\nx\n": "line 2 has no 'file'",
        "file\n1.png\n": "line 2: no file '1.png' in",
        "file,label\n0.png,-1\n": "the label -1 of '0.png'; labels count from 0",
        "file,label\n0.png,1e9\n": None,
        "": "no rows",
    },
    "metadata.jsonl": {
        "[\n": "line 1: not valid JSON",
        '[{"file": "0.png"}]\n': "line 1: expected an object {...}, got [{'file': '0.png'}]; each line is one object",
        "3\n": "line 1: expected an object {...}, got 3",
        "[" * 100_000: "line 1: more than 64 values inside each other",
        '{"file": 7}\n': "line 1: file: 7; a file's name is text",
        '{"file": "0.png", "caption": 5}\n': "line 1: caption: 5; a caption is one text",
        '{"file": "0.png", "text": ["a", "b"]}\n': "line 1: caption: ['a', 'b']; a caption is one text",
        '\n{"file": "0.png", "caption": "\\ud800"}\n': "line 2: character U+D800 in a text",
        '{"file": "0.png", "label": [1]}\n': "line 1: label: [1]; a label is a whole number from 0 or a name",
        '{"file": "0.png", "label": true}\n': "line 1: label: true; a label is",
        '{"file": "0.png", "label": 1.5}\n': "line 1: label: 1.5; a label is",
        '{"file": "0.png", "label": NaN}\n': "line 1: label: nan; a label is",
        '{"file": "0.png", "label": 1e999}\n': "line 1: label: inf; a label is",
        '{"file": "0.png", "label": 1000000}\n': "the label 1000000 of '0.png'; labels count from 0, and there are at",
        '{"file": "0.png", "label": %s}\n' % ("9" * 5000): "line 1: 9999999999... has 5,000 digits",
        '{"file": "0.png\\u0000"}\n': "line 1: character U+0000 in a text",
    },
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_LINES)
def test_metadata_that_makes_no_sense_is_named_with_its_line(tmp_path, name):
    for text, reason in BAD_LINES[name].items():
        fill(tmp_path, {"0.png": 0, name: text})
        if reason is None:
            folder(tmp_path)
        else:
            line = mistake(folder, tmp_path)
            assert reason in line and (name in line or line.startswith("path: the label")), text[:50]


def test_columns_that_are_not_used_are_named(tmp_path):
    fill(tmp_path, {"0.png": 0, "metadata.csv": "file, label ,captions\n0.png,3,a cat\n"})
    set_ = folder(tmp_path)
    assert set_.notes[0] == "metadata.csv: columns that are not used: captions" and facts(set_) == {"0.png": (3, None)}


# labels


def test_folders_named_by_whole_numbers_are_classes_in_the_order_of_the_numbers(tmp_path):
    fill(tmp_path, {f"{i}/a.png": i for i in range(12)})
    set_ = folder(tmp_path)
    assert set_.class_names == tuple(map(str, range(12))) and set_.notes == ()
    assert facts(set_) == {f"{i}/a.png": (i, None) for i in range(12)}


def test_what_labels_stand_for():
    def classes(labels, count=None):
        answer = classes_of(labels, [f"row {i}" for i in range(len(labels))], count)
        return answer.count, answer.names, answer.numbers, answer.notes

    assert classes(["10", "9", "cat"]) == (3, ("9", "10", "cat"), [1, 0, 2], ())
    assert classes(["b", "a", "b"], 2) == (2, ("a", "b"), [1, 0, 1], ())
    gap = "the names 5, 10, 207, ... are classes 0, 1, ...; classes=N takes them as class numbers"
    assert classes(["10", "5", "207"]) == (3, ("5", "10", "207"), [1, 0, 2], (gap,))
    assert classes(["10", "5", "207"], 1000)[:3] == (1000, (), [10, 5, 207])
    assert classes([0, 2, 2]) == (3, (), [0, 2, 2], ("1 of 3 classes have no image: 1",))
    assert classes([0, 1], 10)[3] == ("8 of 10 classes have no image: 2, 3, 4, 5, 6, ...",)
    assert classes([None, None]) == (0, (), [None, None], ())
    for labels, count, reason in (
        ([1, "cat"], None, "names in some rows and numbers in others: 'cat' of 'row 1', 1 of 'row 0'"),
        ([1, None], None, "1 of 2 rows have no label, the first is 'row 1'"),
        ([0, 10], 10, "the label 10 of 'row 1'; labels count from 0, and there are classes=10"),
        (["a", "b"], 3, "classes: 3, but the labels have 2 names"),
        ([None], 3, "classes: 3, but no row has a label"),
    ):
        assert reason in mistake(classes_of, labels, [f"row {i}" for i in range(len(labels))], count)


def test_labels_as_files_have_them():
    for value, label in ((3, 3), ("3", 3), (" 3.0 ", 3), (3.0, 3), ("-1", -1), ("0.5", "0.5"), ("²", "²"), ("٣", "٣"),
                         ("1e3", "1e3"), ("cat", "cat"), ("", None), (None, None), ("007", 7)):  # fmt: skip
        assert label_of(value, "here") == label
    assert caption_of("", "here") == "" and caption_of(None, "here") is None


# archives


def test_members_that_no_row_uses_are_not_read(tmp_path, monkeypatch):
    """A sparse member says a terabyte; a picture, a text and a long name are read up to a limit."""
    monkeypatch.setattr(tars, "TEXT_BYTES", 1000)
    monkeypatch.setattr(tars, "IMAGE_BYTES", 2000)

    def write(names):
        path = tmp_path / "a.tar"
        with tarfile.open(path, "w") as archive:
            for name, (data, size) in names.items():
                info = tarfile.TarInfo(name)
                info.size = len(data)
                if size:
                    info.pax_headers = {"GNU.sparse.map": f"0,{len(data)}", "GNU.sparse.size": str(size)}
                archive.addfile(info, io.BytesIO(data))
        return path

    good = {"0.png": (picture(0), 0), "0.txt": (b"zero", 0)}
    set_ = webdataset(write(good | {"0.npy": (b"x", 1 << 40), "1.npy": (b"x", 1 << 40), "1.txt": (b"one", 0),
                                    "2.png": (b"x", 1 << 40), "2.txt": (b"two", 0)}))  # fmt: skip
    images = {example.name: example.image for example in set_.examples()}
    assert images["a.tar:0"] == picture(0)
    assert str(images["a.tar:1"]) == ("no image among its members (.npy, .txt); a member's suffix begins at the first "
                                      "dot of its name")  # fmt: skip
    assert "more than 0 MiB" in str(images["a.tar:2"])
    assert "a.tar:0.txt: more than" in mistake(webdataset, write({"0.png": (b"", 0), "0.txt": (b"x", 1 << 40)}))
    long = tarfile.TarInfo("x")
    long.type, long.size = tarfile.GNUTYPE_LONGNAME, 1 << 40
    member = write({"0.txt": (b"zero", 0)}).read_bytes()[:1024]
    (tmp_path / "long.tar").write_bytes(member + long.tobuf(tarfile.GNU_FORMAT) + bytes(1024))
    line = mistake(webdataset, tmp_path / "long.tar")
    assert line.endswith("long.tar: not a readable tar archive (a header of 1099511627776 bytes); fetch it again")


def test_a_damaged_header_is_no_end_of_an_archive(tmp_path):
    path = tar(tmp_path / "a.tar", {f"{i}.png": picture(i) for i in range(4)})
    data = bytearray(path.read_bytes())
    with tarfile.open(path) as archive:
        at = archive.getmembers()[2].offset
    data[at + 3] ^= 1
    path.write_bytes(data)
    assert mistake(webdataset, path).endswith("a.tar: not a readable tar archive (bad checksum); fetch it again")
    path.write_bytes(data[: at + 100])
    assert "not a readable tar archive (truncated header)" in mistake(webdataset, path)
    path.write_bytes(b"no tar at all" * 100)
    assert "not a readable tar archive (file could not be opened" in mistake(webdataset, path)


def test_a_row_of_an_archive_is_refused_by_its_key(tmp_path):
    for members, reason in (
        ({"0.json": b'{"label": [1]}'}, "a.tar:0.json: label: [1]; a label is"),
        ({"0.json": b'{"caption": 5}'}, "a.tar:0.json: caption: 5; a caption is one text"),
        ({"0.json": b"[]"}, "a.tar:0.json: expected an object {...}, got []"),
        ({"0.json": b"{"}, "a.tar:0.json: not valid JSON"),
        ({"0.txt": b"a", "0.TXT": b"b"}, "a.tar:0: two members with the suffix .txt"),
        ({"0.cls": b"1", "1.txt": b"x"}, "1 of 2 rows have no label, the first is 'a.tar:1'"),
    ):
        assert reason in mistake(webdataset, tar(tmp_path / "a.tar", members))
    members = {"v1.0.png": picture(0), "b.png": picture(1), "b.webp": picture(2), "c.png": picture(3)}
    manifest = pack(webdataset(tar(tmp_path / "a.tar", members)), tmp_path / "out", max_corrupt=0.7)
    assert manifest.rows == 1 and manifest.skipped[0].startswith("a.tar:v1: no image among its members (.0.png)")
    assert manifest.skipped[1].startswith("a.tar:b: several images among its members (.png, .webp)")


def test_class_names_in_archives(tmp_path):
    path = tar(tmp_path / "a.tar", {"0.png": picture(0), "0.cls": b"dog\n", "1.png": picture(1), "1.cls": b"cat"})
    assert webdataset(path).class_names == ("cat", "dog") and facts(webdataset(path)) == {
        "a.tar:0": (1, None),
        "a.tar:1": (0, None),
    }


# Parquet


def hub_table(form):
    images = [encode(image) for image in COLOUR]
    struct = pa.array([{"bytes": data, "path": f"{i}.png"} for i, data in enumerate(images)])
    image = {
        "struct": struct,
        "binary": pa.array(images),
        "large": pa.array(images, pa.large_binary()),
        "dictionary": pa.array(images).dictionary_encode(),
    }[form]
    return pa.table({"image": image, "label": [i % 10 for i in range(20)], "text": [f"number {i}" for i in range(20)]})


@pytest.mark.parametrize("form", ["struct", "binary", "large", "dictionary"])
def test_parquet_from_a_hub_becomes_the_same_pixels_labels_and_captions(tmp_path, form):
    (tmp_path / "hub" / "data").mkdir(parents=True)
    table = hub_table(form)
    pq.write_table(table.slice(0, 12), tmp_path / "hub" / "data" / "train-00000-of-00002.parquet", row_group_size=5)
    pq.write_table(table.slice(12), tmp_path / "hub" / "data" / "train-00001-of-00002.parquet")
    pq.write_table(table.slice(0, 1), tmp_path / "hub" / "data" / "test-00000-of-00001.parquet")
    set_ = parquet(tmp_path / "hub")
    assert set_.notes == ("left out: 1 files of other splits",) and parquet(tmp_path / "hub", "test").total == 1
    manifest = pack(set_, tmp_path / "out")
    assert (manifest.rows, manifest.size, manifest.classes, manifest.captions) == (20, (3, 32, 32), 10, True)
    assert rows(tmp_path / "out") == {image.tobytes(): (i % 10, f"number {i}") for i, image in enumerate(COLOUR)}
    assert "split: 'validation'; the files in" in mistake(parquet, tmp_path / "hub", "validation")


def test_labels_and_columns_of_parquet(tmp_path):
    file = tmp_path / "a.parquet"
    images = [encode(image) for image in COLOUR[:4]]
    names = {"info": {"features": {"kind": {"names": ["cat", "dog", "owl"], "_type": "ClassLabel"}}}}
    table = pa.table(
        {"photo": images, "kind": [0, 1, 1, 0], "word": pa.array(["b", "a", "a", "b"]).dictionary_encode()}
    )
    pq.write_table(table.replace_schema_metadata({"huggingface": json.dumps(names)}), file)
    assert "no column of images" in mistake(parquet, file) and "photo, kind, word" in mistake(parquet, file)

    def read(**columns):
        return parquet(file, "train", Reading(columns={"image": "photo"} | columns))

    assert read().classes == 0
    set_ = read(label="kind")
    assert set_.class_names == ("cat", "dog", "owl") and [e.label for e in set_.examples()] == [0, 1, 1, 0]
    assert set_.notes == ("1 of 3 classes have no image: 2",)
    set_ = read(label="word", caption="word")
    assert set_.class_names == ("a", "b") and [e.label for e in set_.examples()] == [1, 0, 0, 1]
    assert "columns.label: no column 'kin' in" in mistake(parquet, file, "train", Reading(columns={"label": "kin"}))
    assert "has the type int64; pictures are encoded files" in mistake(lambda: read(image="kind"))
    assert "caption: 0; a caption is one text" in mistake(lambda: read(caption="kind"))


def test_parquet_that_cannot_be_read_is_named(tmp_path):
    file = tmp_path / "a.parquet"
    for values, reason in (
        ([{"bytes": None, "path": "0.png"}], "no bytes, only the path '0.png'; write the set with its images embedded"),
        (pa.array([None], pa.binary()), "no image"),
    ):
        pq.write_table(pa.table({"image": values}), file)
        assert f"a.parquet row 0: {reason}" in mistake(pack, parquet(file), tmp_path / "out")
    pq.write_table(pa.table({"image": [picture(0)] * 2, "label": [1, None]}), file)
    assert "1 of 2 rows have no label, the first is 'a.parquet row 1'" in mistake(parquet, file)
    pq.write_table(pa.table({"image": [picture(0)] * 2, "label": [1, -1]}), file)
    assert "the label -1 of 'a.parquet row 1'; labels count from 0" in mistake(parquet, file)
    file.write_bytes(file.read_bytes()[:-20])
    assert "a.parquet: not a readable Parquet file" in mistake(parquet, file)
    assert "no *.parquet below" in mistake(parquet, fill(tmp_path / "empty", {"a.txt": ""}))


# known sets


def test_damaged_files_of_cifar10_end_in_words(tmp_path, monkeypatch):
    import pickle

    for name, data in (
        ("bin", bytes(3000)),
        ("bin", b""),
        ("png", b"no picture"),
        ("", b"no pickle"),
        ("", pickle.dumps({b"data": np.zeros(7, np.uint8), b"labels": [1]})),
        ("", pickle.dumps([1, 2])),
    ):
        files = {f"data_batch_{i}{'.' * bool(name)}{name}": data for i in range(1, 6)}
        path = fill(tmp_path / str(len(list(tmp_path.iterdir()))), files | {"train_lables.json": "[1]"})
        line = mistake(cifar10, path)
        assert line.startswith(f"path: {str(path)!r}") and "give path=<cifar-10-binary.tar.gz" in line
    monkeypatch.setattr(known, "IMAGE_BYTES", 10)
    assert "data_batch_1.bin: more than" in mistake(cifar10, tar(tmp_path / "a.tar", {"data_batch_1.bin": bytes(11)}))
    assert mistake(cifar10, tmp_path, "validation") == "split: 'validation'; this set has train and test"


# the job


def test_the_job_hands_its_settings_to_the_source(tmp_path, monkeypatch, capsys):
    fill(tmp_path, {"in/1/0.png": 0, "in/1/0.txt": "caf\xe9".encode("cp1252"), "disk2/1.png": 1, "disk2/1.txt": "x"})
    (tmp_path / "in" / "3").symlink_to(tmp_path / "disk2")
    arguments = ["source=folder", f"path={tmp_path / 'in'}", f"out={tmp_path / 'out'}"]
    assert "follow_links=true" in refused(capsys, *arguments)
    arguments.append("follow_links=true")
    assert "encoding=cp1252" in refused(capsys, *arguments)
    out = job(capsys, *arguments, "encoding=cp1252", "classes=4")
    assert "2 rows of 3x16x16 and 4 classes" in out[0] and out[1] == "  2 of 4 classes have no image: 0, 2"
    assert sorted(rows(tmp_path / "out").values()) == [(1, "café"), (3, "x")]
    monkeypatch.setattr(source, "IMAGE_BYTES", 10)
    assert "more than 0 MiB" in refused(capsys, *arguments, "encoding=cp1252", "overwrite=true")
