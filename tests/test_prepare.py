"""What each source gives is what its files hold; what is corrupt is named, and too much of it stops the job."""

from __future__ import annotations

import gzip
import io
import json
import os
import pickle
import runpy
import struct
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from fewstep.data import sources
from fewstep.data.decode import decode, encode
from fewstep.data.shards import CorruptRows, open_shards
from fewstep.data.sources import SourceError, cifar10, fashion_mnist, folder, pack, webdataset

JOB = Path(__file__).resolve().parents[1] / "jobs" / "prepare.py"
RNG = np.random.default_rng(0)
GREY = RNG.integers(0, 256, (30, 1, 28, 28), dtype=np.uint8)
COLOUR = RNG.integers(0, 256, (20, 3, 32, 32), dtype=np.uint8)
LABELS = np.arange(30) * 7 % 10


def rows(path):
    """{pixels as bytes: (label, caption)} of a written set."""
    shards = open_shards(path)
    table = pa.concat_tables(shards.read(unit) for unit in range(len(shards.units)))
    return {
        decode(row["image"], shards.size).tobytes(): (row.get("label"), row.get("caption")) for row in table.to_pylist()
    }


def tar(path, members):
    with tarfile.open(path, "w:gz" if path.name.endswith("gz") else "w") as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def idx(values, packed):
    data = struct.pack(">HBB", 0, 8, values.ndim) + struct.pack(f">{values.ndim}I", *values.shape) + values.tobytes()
    return gzip.compress(data) if packed else data


def fashion_files(path, packed, prefix="train"):
    path.mkdir(exist_ok=True)
    end = ".gz" if packed else ""
    (path / f"{prefix}-images-idx3-ubyte{end}").write_bytes(idx(GREY[:, 0], packed))
    (path / f"{prefix}-labels-idx1-ubyte{end}").write_bytes(idx(LABELS.astype(np.uint8), packed))
    return path


# Fashion-MNIST


@pytest.mark.parametrize("packed", [True, False])
def test_fashion_mnist_files_become_the_same_pixels_and_labels(tmp_path, packed):
    manifest = pack(fashion_mnist(fashion_files(tmp_path / "idx", packed)), tmp_path / "out")
    assert (manifest.rows, manifest.size, manifest.classes) == (30, (1, 28, 28), 10)
    assert manifest.class_names[9] == "Ankle boot"
    assert rows(tmp_path / "out") == {
        image.tobytes(): (label, None) for image, label in zip(GREY, LABELS.tolist(), strict=True)
    }


def test_a_limit_keeps_rows_chosen_by_the_seed(tmp_path):
    source = fashion_mnist(fashion_files(tmp_path / "idx", True))
    kept = []
    for i, seed in enumerate((0, 0, 1)):
        pack(source, tmp_path / f"out{i}", limit=10, seed=seed)
        kept.append(rows(tmp_path / f"out{i}"))
    assert kept[0] == kept[1] != kept[2] and len(kept[0]) == len(kept[2]) == 10
    first, second = (open_shards(tmp_path / f"out{i}").manifest.shards[0].sha256 for i in (0, 1))
    assert first == second


def test_missing_files_name_the_places_and_the_package(tmp_path, monkeypatch):
    with pytest.raises(SourceError, match="path: no train-images-idx3-ubyte.*dataset-fashion-mnist"):
        fashion_mnist(tmp_path)
    monkeypatch.setattr(sources, "DEBIAN", tmp_path / "not-installed")

    def offline(*args, **kwargs):
        raise RuntimeError("Error downloading")

    monkeypatch.setattr("torchvision.datasets.FashionMNIST", offline)
    with pytest.raises(SourceError, match="not-installed.*download failed.*dataset-fashion-mnist"):
        fashion_mnist()


def test_an_idx_file_cut_short_is_named(tmp_path):
    path = fashion_files(tmp_path / "idx", True)
    file = path / "train-images-idx3-ubyte.gz"
    file.write_bytes(file.read_bytes()[:2000])
    with pytest.raises(SourceError, match="train-images-idx3-ubyte.gz: cannot be read"):
        fashion_mnist(path)


# CIFAR-10


def cifar_archive(path, form):
    """The archive in one of its forms, four images a batch."""
    members, labels = {}, []
    for i in range(5):
        images, numbers = COLOUR[4 * i : 4 * i + 4], [(4 * i + k) % 10 for k in range(4)]
        labels += numbers
        name = f"data_batch_{i + 1}"
        if form == "binary":
            members[f"cifar-10-batches-bin/{name}.bin"] = b"".join(
                bytes([label]) + image.tobytes() for label, image in zip(numbers, images, strict=True)
            )
        elif form == "python":
            batch = {b"data": images.reshape(4, -1), b"labels": numbers}
            members[f"cifar-10-batches-py/{name}"] = pickle.dumps(batch, protocol=2)
        else:
            sheet = images.transpose(0, 2, 3, 1).reshape(4, 1024, 3)
            members[f"package/{name}.png"] = encode(sheet.transpose(2, 0, 1))
    if form == "sheets":
        members["package/train_lables.json"] = json.dumps(labels).encode()
    return tar(path, members)


@pytest.mark.parametrize("form", ["binary", "python", "sheets"])
@pytest.mark.parametrize("unpacked", [False, True])
def test_every_form_of_cifar10_gives_the_same_images(tmp_path, form, unpacked):
    path = cifar_archive(tmp_path / "cifar.tar.gz", form)
    if unpacked:
        with tarfile.open(path) as archive:
            archive.extractall(tmp_path / "folder", filter="data")
        path = tmp_path / "folder"
    manifest = pack(cifar10(path), tmp_path / "out")
    assert manifest.size == (3, 32, 32) and manifest.class_names[6] == "frog"
    assert rows(tmp_path / "out") == {image.tobytes(): (i % 10, None) for i, image in enumerate(COLOUR)}


def test_a_pickle_that_asks_for_code_is_refused(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path / 'owned'}",)

    members = {f"data_batch_{i}": pickle.dumps(Evil()) for i in range(1, 6)}
    with pytest.raises(SourceError, match="system, which is no array; use cifar-10-binary.tar.gz"):
        cifar10(tar(tmp_path / "evil.tar", members))
    assert not (tmp_path / "owned").exists()


# folders and archives of files


def picture(i, size=(16, 16), **options):
    return encode(np.full((3, *size), 5 * i, np.uint8), **options)


def test_class_folders_become_labels_and_bytes_are_kept(tmp_path):
    for i in range(9):
        (tmp_path / "in" / f"class{i % 3}").mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / f"class{i % 3}" / f"{i}.png").write_bytes(picture(i))
    manifest = pack(folder(tmp_path / "in"), tmp_path / "out")
    assert manifest.class_names == ("class0", "class1", "class2") and manifest.encoding == "source"
    table = open_shards(tmp_path / "out").read(0)
    assert {row["image"]: row["label"] for row in table.to_pylist()} == {picture(i): i % 3 for i in range(9)}


def test_captions_beside_the_files(tmp_path):
    (tmp_path / "in").mkdir()
    for i in range(4):
        (tmp_path / "in" / f"{i}.png").write_bytes(picture(i))
        (tmp_path / "in" / f"{i}.txt").write_text(f"grey {i}\n")
    manifest = pack(folder(tmp_path / "in"), tmp_path / "out")
    assert manifest.captions and manifest.classes == 0
    assert sorted(caption for _, caption in rows(tmp_path / "out").values()) == [f"grey {i}" for i in range(4)]
    (tmp_path / "in" / "2.txt").unlink()
    with pytest.raises(SourceError, match="1 of 4 rows have no caption, the first is '2.png'"):
        folder(tmp_path / "in")


@pytest.mark.parametrize("form", ["csv", "jsonl"])
def test_metadata_names_files_captions_and_labels(tmp_path, form):
    (tmp_path / "in").mkdir()
    for i in range(3):
        (tmp_path / "in" / f"{i}.png").write_bytes(picture(i))
    lines = {
        "csv": "file,caption,label\n0.png,zero,dark\n2.png,two,light\n",
        "jsonl": '{"file": "0.png", "caption": "zero", "label": "dark"}\n'
        '{"file": "2.png", "caption": "two", "label": "light"}\n',
    }[form]
    (tmp_path / "in" / f"metadata.{form}").write_text(lines)
    manifest = pack(folder(tmp_path / "in"), tmp_path / "out")
    assert manifest.class_names == ("dark", "light")
    assert sorted(rows(tmp_path / "out").values()) == [(0, "zero"), (1, "two")]


def test_metadata_stays_inside_its_folder(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "secret.png").write_bytes(picture(1))
    (tmp_path / "in" / "metadata.csv").write_text("file,label\n../secret.png,0\n")
    with pytest.raises(SourceError, match="line 2: '../secret.png' lies outside"):
        folder(tmp_path / "in")


def test_files_are_resized_by_the_shorter_side_and_cropped(tmp_path):
    (tmp_path / "in").mkdir()
    image = np.zeros((3, 20, 60), np.uint8)
    image[0, :, 12:48] = 255  # the middle is red, wider than the crop: a resize looks past its edges
    (tmp_path / "in" / "wide.png").write_bytes(encode(image))
    pack(folder(tmp_path / "in"), tmp_path / "out", size=10)
    pixels = np.frombuffer(next(iter(rows(tmp_path / "out"))), np.uint8).reshape(3, 10, 10)
    assert np.all(pixels[0] == 255) and np.all(pixels[1:] == 0)


def test_webdataset_members_with_one_key_are_a_row(tmp_path):
    (tmp_path / "in").mkdir()
    for part in range(2):
        members = {}
        for i in range(3 * part, 3 * part + 3):
            members[f"dir/{i:04d}.png"] = picture(i)
            if part:
                members[f"dir/{i:04d}.json"] = json.dumps({"label": i, "caption": f"c{i}"}).encode()
            else:
                members |= {f"dir/{i:04d}.cls": b"%d" % i, f"dir/{i:04d}.txt": b"c%d" % i}
        tar(tmp_path / "in" / f"{part}.tar", members)
    manifest = pack(webdataset(tmp_path / "in"), tmp_path / "out")
    assert manifest.classes == 6 and manifest.captions
    expected = {np.full((3, 16, 16), 5 * i, np.uint8).tobytes(): (i, f"c{i}") for i in range(6)}
    assert rows(tmp_path / "out") == expected


def test_an_archive_cut_short_is_named(tmp_path):
    path = tar(tmp_path / "a.tar", {f"{i}.png": picture(i, (64, 64), format="webp") for i in range(9)})
    path.write_bytes(path.read_bytes()[:3000])
    with pytest.raises(SourceError, match="a.tar: not a readable tar archive"):
        webdataset(path)


# what is corrupt


def broken_folder(path, count=40):
    path.mkdir()
    for i in range(count):
        (path / f"{i:02d}.png").write_bytes(picture(i))
    (path / "07.png").write_bytes(picture(7)[:30])
    (path / "09.png").write_bytes(b"")
    (path / "11.png").write_bytes(picture(11, (16, 17)))
    return path


def test_corrupt_files_are_skipped_and_named(tmp_path):
    manifest = pack(folder(broken_folder(tmp_path / "in")), tmp_path / "out", max_corrupt=0.1)
    assert manifest.rows == 37 and [name[:6] for name in manifest.skipped] == ["07.png", "09.png", "11.png"]
    assert "16x17 pixels where the set has 16x16" in manifest.skipped[2]


def test_too_many_corrupt_files_stop_the_job_and_leave_nothing(tmp_path):
    with pytest.raises(CorruptRows, match=r"2 corrupt rows, 1 allowed(.|\n)*07.png(.|\n)*09.png"):
        pack(folder(broken_folder(tmp_path / "in")), tmp_path / "out", max_corrupt=0.04)
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


# the job


def job(monkeypatch, capsys, *words):
    """Runs the job in this process: what it printed."""
    monkeypatch.setattr(sys, "argv", ["prepare.py", *words])
    runpy.run_path(str(JOB), run_name="__main__")
    return capsys.readouterr().out.splitlines()


def test_the_job_says_what_it_wrote(tmp_path, monkeypatch, capsys):
    source = fashion_files(tmp_path / "idx", True, "t10k")
    words = ["source=fashion_mnist", f"path={source}", "split=test", "limit=12", f"out={tmp_path / 'out'}"]
    out = job(monkeypatch, capsys, *words)
    assert "12 rows of 1x28x28 and 10 classes in 1 shards" in out[0]
    summary = json.loads(out[-1])
    assert summary["rows"] == 12 and summary["skipped"] == 0 and open_shards(summary["out"]).rows == 12
    with pytest.raises(SystemExit, match="exists; choose another folder or add overwrite=true"):
        job(monkeypatch, capsys, *words)


def test_the_job_names_a_field_it_does_not_know():
    asked = [sys.executable, str(JOB), "source=cifar10", "out=x", "overwite=true"]
    done = subprocess.run(asked, capture_output=True, text=True)
    assert done.returncode != 0 and "did you mean 'overwrite'?" in done.stderr and "Traceback" not in done.stderr


def test_pictures_turned_by_their_exif_stand_upright_when_resized(tmp_path):
    (tmp_path / "in").mkdir()
    image = Image.new("RGB", (8, 8))
    image.paste((255, 255, 255), (0, 0, 8, 4))  # the upper half is white
    exif = Image.Exif()
    exif[0x0112] = 3  # stored upside down
    image.save(tmp_path / "in" / "a.png", exif=exif)
    pack(folder(tmp_path / "in"), tmp_path / "out", size=8)
    pixels = np.frombuffer(next(iter(rows(tmp_path / "out"))), np.uint8).reshape(3, 8, 8)
    assert np.all(pixels[:, :4] == 0) and np.all(pixels[:, 4:] == 255)
