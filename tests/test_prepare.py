"""A source gives what its files hold; corrupt files are named, and too many of them stop the job."""

from __future__ import annotations

import gzip
import io
import json
import os
import pickle
import random
import struct
import subprocess
import sys
import tarfile
import tracemalloc
import zlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest
from job import job as command
from PIL import Image, ImageCms
from PIL.PngImagePlugin import PngInfo

from fewstep.data import known
from fewstep.data.decode import COLOURS, DEPTH, FRAME, LAID, CorruptImage, decode, encode, read_picture
from fewstep.data.folder import folder
from fewstep.data.known import cifar10, fashion_mnist
from fewstep.data.shards import CorruptRows, open_shards
from fewstep.data.source import SourceError
from fewstep.data.sources import pack
from fewstep.data.tars import webdataset

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
    monkeypatch.setattr(known, "DEBIAN", tmp_path / "not-installed")

    def offline(*args, **kwargs):
        raise RuntimeError("Error downloading")

    monkeypatch.setitem(sys.modules, "torchvision", SimpleNamespace())  # its import takes seconds
    monkeypatch.setitem(sys.modules, "torchvision.datasets", SimpleNamespace(FashionMNIST=offline))
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


def test_too_many_corrupt_files_stop_the_job_with_a_list_of_all_and_leave_nothing(tmp_path):
    source = folder(broken_folder(tmp_path / "in"))
    with pytest.raises(CorruptRows) as error:
        pack(source, tmp_path / "out", max_corrupt=0.04)
    first, *names = str(error.value).splitlines()
    assert first.endswith(
        "3 corrupt rows, 1 allowed; bring all to one size with size=16 or another, or raise max_corrupt:"
    )
    assert [name.split(":")[0].strip() for name in names] == ["07.png", "09.png", "11.png"]
    with pytest.raises(CorruptRows, match="2 corrupt rows, 1 allowed; restore them or raise max_corrupt"):
        pack(source, tmp_path / "out", max_corrupt=0.04, size=16)  # brings 11.png to the size
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


# the job


def job(capsys, *arguments):
    """Runs the job in this process: the lines that it printed."""
    command("prepare")(arguments)
    return capsys.readouterr().out.splitlines()


def refused(capsys, *arguments):
    """Runs a job that must end with exit status 2: its one line on standard error."""
    with pytest.raises(SystemExit) as end:
        job(capsys, *arguments)
    assert end.value.code == 2
    return capsys.readouterr().err.strip()


def test_the_job_says_what_it_wrote(tmp_path, capsys):
    source = fashion_files(tmp_path / "idx", True, "t10k")
    arguments = ["source=fashion_mnist", f"path={source}", "split=test", "limit=12", f"out={tmp_path / 'out'}"]
    out = job(capsys, *arguments)
    assert "12 rows of 1x28x28 and 10 classes in 1 shards" in out[0]
    summary = json.loads(out[-1])
    assert summary["rows"] == 12 and summary["skipped"] == 0 and open_shards(summary["out"]).rows == 12
    assert "exists; choose another folder, or replace it with overwrite=true" in refused(capsys, *arguments)


@pytest.mark.parametrize(
    "arguments, line",
    [
        (["source=folder"], "path: missing; give the source's file or folder, path=..."),
        (["source=fashion_mnist", "size=32"], "size: source=fashion_mnist has no such setting; folder, webdataset"),
        (["source=cifar10", "path=x", "classes=3"], "classes: source=cifar10 has no such setting; folder, webdataset"),
        (["source=folder", "path=x", "split=test"], "split: source=folder has no such setting; fashion_mnist, cifar10"),
        (["source=folder", "path=x", "columns.label=a"], "columns: source=folder has no such setting; parquet have it"),
        (["source=parquet", "path=x", "encoding=cp1252"], "encoding: source=parquet has no such setting; folder, web"),
        (["source=parquet", "path=x", "columns.lable=a"], "columns.lable"),
    ],
)
def test_a_setting_that_a_source_does_not_have_is_refused(capsys, arguments, line):
    assert refused(capsys, *arguments, "out=never").startswith(line)


def test_only_a_shard_set_is_replaced_and_never_the_source_or_what_holds_it(tmp_path, capsys):
    for name in ("photos", "data/originals"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "a.png").write_bytes(picture(1))
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "thesis.tex").write_text("years of work")
    (tmp_path / "link").symlink_to(tmp_path / "photos")
    before = {str(path): path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    for path, out, reason in (
        ("photos", "photos", "is or contains"),
        ("data/originals", "data", "is or contains"),
        ("link", "photos", "is or contains"),
        ("photos/../photos", "photos", "is or contains"),
        ("photos", "link", "is or contains"),
        ("photos", "notes", "is not a shard set, so it is not replaced"),
        ("photos", "", "is or contains"),
    ):
        arguments = ["source=folder", f"path={tmp_path / path}", "size=8", f"out={tmp_path / out}", "overwrite=true"]
        line = refused(capsys, *arguments)
        assert line.startswith("out: ") and reason in line and "\n" not in line
    pack(folder(tmp_path / "photos"), tmp_path / "set")
    (tmp_path / "set" / "mine.txt").write_text("keep")
    arguments = ["source=folder", f"path={tmp_path / 'photos'}", f"out={tmp_path / 'set'}", "overwrite=true"]
    assert "also holds 'mine.txt'" in refused(capsys, *arguments)
    (tmp_path / "set" / "mine.txt").unlink()
    assert "1 rows" in job(capsys, *arguments)[0]
    assert {str(path): path.read_bytes() for path in tmp_path.rglob("*") if str(path) in before} == before
    assert not [path.name for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_the_job_names_a_field_it_does_not_know():
    asked = [sys.executable, str(JOB), "source=cifar10", "out=x", "overwite=true"]
    done = subprocess.run(asked, capture_output=True, text=True)
    assert done.returncode != 0 and "did you mean 'overwrite'?" in done.stderr and "Traceback" not in done.stderr


# pictures as people see them


def saved(picture, format="PNG", **options):
    """The bytes of a Pillow image's file."""
    buffer = io.BytesIO()
    picture.save(buffer, format, **options)
    return buffer.getvalue()


def turned(data, format="PNG"):
    """A file of pixels (H, W) or (H, W, 3) that is stored for each EXIF orientation such that people see `data`."""
    transposed = np.swapaxes(data, 0, 1)
    # by the tag's definition, the edge of the picture that the first row and the first column hold
    stored = {
        1: data,
        2: data[:, ::-1],
        3: data[::-1, ::-1],
        4: data[::-1],
        5: transposed,
        6: transposed[::-1],
        7: transposed[::-1, ::-1],
        8: transposed[:, ::-1],
    }
    for tag, values in stored.items():
        exif = Image.Exif()
        exif[0x0112] = tag
        yield tag, saved(Image.fromarray(np.ascontiguousarray(values)), format, exif=exif, **LOSSLESS[format])


LOSSLESS = {"PNG": {}, "WEBP": {"lossless": True}, "JPEG": {"quality": 95, "subsampling": 0}}


@pytest.mark.parametrize("format", LOSSLESS)
def test_pictures_turned_by_their_exif_tag_stand_upright_with_and_without_size(tmp_path, format):
    shown = np.repeat(np.repeat(RNG.integers(0, 256, (2, 2, 3), dtype=np.uint8), 8, 0), 8, 1)
    (tmp_path / "in").mkdir()
    for tag, data in turned(shown, format):
        (tmp_path / "in" / f"{tag}.{format.lower()}").write_bytes(data)
    for size in (None, 16):
        manifest = pack(folder(tmp_path / "in"), tmp_path / f"out{size}", size=size)
        assert manifest.notes == ("7 pictures turned as the EXIF tag says",)
        for row in open_shards(tmp_path / f"out{size}").read(0).to_pylist():
            with Image.open(io.BytesIO(row["image"])) as image:  # by any reader, not only by ours
                kept = image.format == format and size is None
                assert (image.getexif().get(0x0112, 1) == 1) and (kept or image.format == "PNG")
                assert np.abs(np.asarray(image).astype(int) - shown).max() <= (6 if format == "JPEG" else 0)


def test_a_turned_picture_has_the_size_that_people_see(tmp_path):
    wide = RNG.integers(0, 256, (6, 10), dtype=np.uint8)
    files = dict(turned(wide))
    for tag, data in files.items():
        assert read_picture(data, 1).pixels.shape == (1, 6, 10), tag
        assert np.array_equal(decode(data, (1, 6, 10))[0], wide), tag
    with pytest.raises(CorruptImage, match="6x10 pixels where the set has 10x6"):
        decode(files[6], (1, 10, 6))


def test_transparent_parts_show_one_background_and_never_the_colours_below_them(tmp_path):
    colours = RNG.integers(0, 256, (8, 8, 4), dtype=np.uint8)
    colours[:4, :, 3] = 0
    colours[4:, :, 3] = 255
    palette = Image.new("P", (8, 8), 7)
    palette.putpalette([i for k in range(256) for i in (k, 0, 0)])
    grey = Image.fromarray(np.full((8, 8), 9, np.uint8))
    deep = Image.fromarray(np.full((8, 8), 9, np.uint16))
    files = {
        "rgba": (saved(Image.fromarray(colours)), colours[4:, :, :3]),
        "webp": (saved(Image.fromarray(colours), "WEBP", lossless=True), colours[4:, :, :3]),
        "grey and alpha": (saved(Image.fromarray(colours[..., [0, 3]])), colours[4:, :, [0, 0, 0]]),
        "palette with a transparent entry": (saved(palette, transparency=7), None),
        "grey with a transparent value": (saved(grey, transparency=9), None),
        "16 bits with a transparent value": (saved(deep, transparency=9), None),
    }
    for name, (data, opaque) in files.items():
        for background, channels in (((255, 255, 255), 3), ((10, 20, 30), 3), ((7, 7, 7), 1)):
            picture = read_picture(data, channels, background=background)
            upper = picture.pixels if opaque is None else picture.pixels[:, :4]
            assert (upper == np.array(background)[:channels, None, None]).all(), name
            assert LAID in picture.changes
            if opaque is not None and channels == 3:
                assert np.array_equal(picture.pixels[:, 4:].transpose(1, 2, 0), opaque), name
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.png").write_bytes(files["rgba"][0])
    for size in (None, 8):
        manifest = pack(folder(tmp_path / "in"), tmp_path / f"out{size}", size=size, background="#0a141e")
        assert manifest.notes == ("1 picture with transparency, laid over the background",)
        pixels = np.frombuffer(next(iter(rows(tmp_path / f"out{size}"))), np.uint8).reshape(3, 8, 8)
        assert (pixels[:, :4] == np.array([10, 20, 30])[:, None, None]).all()
    with pytest.raises(SourceError, match="background: 'whit' is no colour"):
        pack(folder(tmp_path / "in"), tmp_path / "never", background="whit")


def test_half_transparent_pixels_are_mixed_and_an_opaque_alpha_changes_nothing():
    half = np.zeros((4, 4, 4), np.uint8)
    half[..., 3] = 51  # a fifth
    assert np.all(read_picture(saved(Image.fromarray(half)), 3).pixels == 204)
    half[..., 3] = 255
    picture = read_picture(saved(Image.fromarray(half)), 3)
    assert picture.changes == () and np.all(picture.pixels == 0)


def test_grey_values_of_16_bits_are_scaled_and_not_clipped():
    values = np.array([[0, 256, 32768, 65535]], np.uint16)
    picture = read_picture(saved(Image.fromarray(values)), 1)
    assert picture.pixels.tolist() == [[[0, 1, 128, 255]]] and picture.changes == (DEPTH,)


def test_inks_and_colour_profiles_become_srgb():
    ink = Image.new("CMYK", (8, 8), (0, 255, 255, 0))
    picture = read_picture(saved(ink, "JPEG", quality=95), 3)
    assert np.abs(picture.pixels.astype(int) - np.array([255, 0, 0])[:, None, None]).max() <= 3
    assert picture.changes == (COLOURS,)
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    swapped = srgb.replace(b"rXYZ", b"....", 1).replace(b"bXYZ", b"rXYZ", 1).replace(b"....", b"bXYZ", 1)
    red = Image.new("RGB", (8, 8), (255, 0, 0))
    plain, other = (read_picture(saved(red, icc_profile=profile), 3) for profile in (srgb, swapped))
    assert plain.changes == () and plain.pixels[:, 0, 0].tolist() == [255, 0, 0]
    assert other.changes == (COLOURS,) and np.abs(other.pixels[:, 0, 0] - np.array([0, 0, 255])).max() <= 1
    assert read_picture(saved(red, icc_profile=b"none"), 3).changes == ()


@pytest.mark.parametrize("format", ["PNG", "WEBP"])
def test_of_an_animated_file_the_first_frame_is_taken(format):
    frames = [Image.new("RGB", (8, 8), (40 * i, 0, 0)) for i in range(1, 4)]
    data = saved(frames[0], format, save_all=True, append_images=frames[1:], **LOSSLESS[format])
    picture = read_picture(data, 3)
    assert picture.changes == (FRAME,) and np.all(picture.pixels[0] == 40)


def test_a_huge_picture_in_a_small_file_is_refused_by_its_header(tmp_path):
    header = struct.pack(">II", 30000, 30000) + bytes([8, 2, 0, 0, 0])
    data = bytearray(saved(Image.new("RGB", (8, 8))))
    data[16:33] = header + struct.pack(">I", zlib.crc32(b"IHDR" + header))
    (tmp_path / "huge.png").write_bytes(data)
    tracemalloc.start()
    for limits in ({}, {"fit": 8}, {"max_pixels": 899_999_999}):
        with pytest.raises(CorruptImage, match=r"30000x30000 pixels in its header, more than max_pixels=\d+$"):
            read_picture(bytes(data), 3, **limits)
    assert tracemalloc.get_traced_memory()[1] < 1e6
    tracemalloc.stop()
    assert read_picture(saved(Image.new("L", (30, 20))), 1, max_pixels=600).pixels.shape == (1, 20, 30)
    with pytest.raises(SourceError, match="no readable image in .*huge.png: 30000x30000 pixels in its header"):
        pack(folder(tmp_path), tmp_path / "out")


def test_megabytes_of_text_in_a_file_reject_no_pixels():
    text = PngInfo()
    text.add_text("workflow", "x" * (2 << 20), zip=True)
    exif = Image.Exif()
    exif[0x0112] = 3
    pixels = RNG.integers(0, 256, (5, 6), dtype=np.uint8)
    data = saved(Image.fromarray(pixels), pnginfo=text, exif=exif)
    assert np.array_equal(read_picture(data, 1).pixels[0], pixels[::-1, ::-1])


@pytest.mark.parametrize("format", LOSSLESS)
def test_a_truncated_file_is_corrupt(format):
    data = saved(Image.fromarray(COLOUR[0].transpose(1, 2, 0)), format, **LOSSLESS[format])
    for end in (8, 40, len(data) // 2, len(data) - 40):
        with pytest.raises(CorruptImage):
            read_picture(data[:end], 3)


@pytest.mark.filterwarnings("ignore")  # of Pillow, about damaged metadata
def test_damaged_pictures_end_in_pixels_or_in_one_line():
    """Seeded mutations of files of each format, with metadata, whose PNG checksums agree in half of the cases."""
    rng, exif = random.Random(0), Image.Exif()
    exif[0x0112] = 6
    colours = Image.fromarray(RNG.integers(0, 256, (20, 24, 4), dtype=np.uint8))
    files = [saved(colours, "PNG", exif=exif), saved(colours, "WEBP", exif=exif), saved(colours.convert("P"), "PNG")]
    files += [saved(colours.convert(mode), "JPEG", exif=exif) for mode in ("L", "RGB", "CMYK")]
    good = bad = 0
    for _ in range(600):
        data = bytearray(rng.choice(files))
        for _ in range(rng.choice((1, 1, 2, 5, 20))):
            at = rng.randrange(len(data))
            data[at : at + rng.choice((0, 1, 1, 1, 9))] = rng.randbytes(rng.choice((0, 1, 1, 1, 9)))
        if data.startswith(b"\x89PNG") and rng.random() < 0.5:
            at = 8
            while (end := at + 12 + int.from_bytes(data[at : at + 4], "big")) <= len(data):
                data[end - 4 : end] = struct.pack(">I", zlib.crc32(data[at + 4 : end - 4]))
                at = end
        try:
            assert read_picture(bytes(data), 3, fit=rng.choice((None, 8))).pixels.shape[0] == 3
            good += 1
        except CorruptImage as error:
            assert str(error) and "\n" not in str(error)
            bad += 1
    assert good > 60 and bad > 200


def test_small_pictures_that_size_enlarges_are_counted(tmp_path):
    (tmp_path / "in").mkdir()
    for i in range(3):
        (tmp_path / "in" / f"{i}.png").write_bytes(picture(i, (16, 8 * i + 8)))
    manifest = pack(folder(tmp_path / "in"), tmp_path / "out", size=12)
    assert manifest.notes == ("1 picture smaller than size, enlarged",)
