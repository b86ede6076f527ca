"""The COCO-2014 protocols: preparation of pictures, FID and patch FID, CLIP score, and what they refuse."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny as families
import torch
from job import job
from PIL import Image
from test_metrics import build
from torch.nn import functional as F

from fewstep.metrics import coco
from fewstep.metrics.base import Outputs, Samples, check_samples
from fewstep.metrics.coco import PROTOCOLS, Prepared, centre, square
from fewstep.metrics.reference import save_reference

FEW = 4


class Means:
    """In Inception's place: an image's mean colours in [-1, 1]."""

    name, hash = "inception", "0" * 64

    def __call__(self, images: torch.Tensor) -> Outputs:
        return Outputs((images.float().mean((2, 3)) / 128 - 1).numpy())


def samples(images: torch.Tensor, prompts: tuple[str, ...] | None = None) -> Samples:
    prompts = tuple(f"thing {i}" for i in range(len(images))) if prompts is None else prompts
    return Samples(images, None, "four steps", 4, 1.0, 0, prompts=prompts)


@pytest.fixture
def few(monkeypatch):
    """Protocols of four pictures."""
    for name, protocol in PROTOCOLS.items():
        monkeypatch.setitem(PROTOCOLS, name, replace(protocol, images=FEW))


def coloured(values, height: int, width: int) -> torch.Tensor:
    """Plain pictures whose left and right ends, outside the centre square, are white."""
    images = torch.tensor(values, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, height, width).clone()
    out = (width - height) // 2
    images[:, :, :, :out] = images[:, :, :, width - out :] = 255
    return images


def test_a_protocol_shows_the_centre_square_by_lanczos_and_the_patch_as_it_is():
    numbers = np.arange(480 * 640 * 3).reshape(480, 640, 3).astype(np.uint8)
    picture = Image.fromarray(numbers)
    expected = Image.fromarray(numbers[:, 80:560]).resize((256, 256), Image.Resampling.LANCZOS)
    assert np.array_equal(np.array(square(picture, 256)), np.array(expected))
    plain = Image.fromarray(coloured([70], 512, 640)[0].permute(1, 2, 0).numpy())
    assert set(np.array(square(plain, 256)).flatten()) == {70}
    assert np.array_equal(np.array(centre(picture, 299)), numbers[90:389, 170:469])
    assert centre(Image.new("RGB", (640, 280)), 299).size == (640, 280)
    assert np.array_equal(np.array(square(Image.fromarray(numbers[:256, :256]), 256)), numbers[:256, :256])


@pytest.mark.parametrize("name", ["fid_coco30k", "fid_coco10k", "patch_fid_coco10k"])
def test_the_distance_is_of_prepared_pictures(name, tmp_path, monkeypatch, few):
    """A plain grey picture has three equal features, so the distance is three times that in one of them."""
    monkeypatch.setattr(coco.CocoDistance, "network", lambda self, files: Means())
    protocol = {"fid_coco30k": "coco30k", "fid_coco10k": "coco10k"}.get(name, "coco10k_patch")
    extractor, real, others = Prepared(Means(), protocol), [64, 128, 192, 128], [96, 128, 160, 132]
    wide = (coloured([value], 300, 500)[0] for value in real)  # their white ends are seen by no protocol
    save_reference(tmp_path / "real.npz", "real", extractor.describe(wide), extractor)
    (metric,) = build([name], inception_reference=str(tmp_path / "real.npz"))
    side = 1024 if "patch" in name else 512
    score = metric(samples(coloured(others, side, side)))
    x, y = (np.array(v) / 128 - 1 for v in (real, others))
    expected = (x.mean() - y.mean()) ** 2 + (x.std(ddof=1) - y.std(ddof=1)) ** 2
    assert score.value == pytest.approx(3 * expected, rel=1e-4)
    assert (score.name, score.images, score.reference_images) == (name, FEW, FEW)
    save_reference(tmp_path / "plain.npz", "real", Means()(coloured(real, 256, 256)), Means())
    with pytest.raises(ValueError, match=f"made with extractor 000000000000, not with 'inception-{protocol}'"):
        build([name], inception_reference=str(tmp_path / "plain.npz"))


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> Path:
    """A CLIP model of transformers' class with random weights, and its tokenizer."""
    from transformers import CLIPConfig, CLIPModel

    folder = tmp_path_factory.mktemp("clip")
    size = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {"vocab_size": 514, "bos_token_id": 512, "eos_token_id": 513, "max_position_embeddings": 32}
    vision = {"image_size": 32, "patch_size": 8}
    torch.manual_seed(0)
    model = CLIPModel(CLIPConfig(text_config=size | text, vision_config=size | vision, projection_dim=6))
    model.eval().save_pretrained(folder)
    families.tokenizer(32).save_pretrained(folder)
    return folder / "model.safetensors"


def test_the_clip_score_is_the_mean_cosine_after_clips_own_preparation(clip, monkeypatch, few):
    from transformers import CLIPImageProcessor, CLIPModel

    monkeypatch.setattr(coco, "VIT_G_14", {})
    images = torch.randint(0, 256, (FEW, 3, 512, 512), dtype=torch.uint8)
    prompts = ("a cat", "a dog", "two cups on a table", "a red bus")
    (metric,) = build(["clip_coco30k"], settings={"clip_coco30k": {"clip": str(clip)}})
    score = metric(samples(images, prompts))

    model, ids = CLIPModel.from_pretrained(clip.parent).eval(), []
    processor = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    small = [Image.fromarray(i.permute(1, 2, 0).numpy()).resize((256, 256), Image.Resampling.LANCZOS) for i in images]
    pixels = processor(small, return_tensors="pt").pixel_values
    tokenizer = families.tokenizer(32)
    for text in prompts:
        ids.append(tokenizer(f"A photo depicts {text}", return_tensors="pt", truncation=True).input_ids)
    with torch.no_grad():
        pictures = model.get_image_features(pixel_values=pixels).pooler_output
        texts = torch.cat([model.get_text_features(input_ids=row).pooler_output for row in ids])
    expected = F.cosine_similarity(pictures, texts).mean().item()
    assert score.value == pytest.approx(expected, abs=2e-3) and score.name == "clip_coco30k"
    other = metric(samples(images, prompts[1:] + prompts[:1])).value
    assert abs(other - score.value) > 1e-4


def test_what_is_not_the_protocols_is_refused(clip, tmp_path, monkeypatch):
    where = {"settings": {"clip_coco10k": {"clip": str(clip)}}}
    with pytest.raises(ValueError, match="clip: .*hidden_size 8, num_hidden_layers 1, .*: not ViT-g-14, by which the"):
        build(["clip_coco10k"], **where)
    with pytest.raises(ValueError, match="clip: clip_coco10k needs this file and none is given; download model.safe"):
        build(["clip_coco10k"])
    with pytest.raises(FileNotFoundError, match="clip: no file .*gone.safetensors'; download .* of laion/CLIP-ViT-g"):
        build(["clip_coco10k"], settings={"clip_coco10k": {"clip": str(tmp_path / "gone.safetensors")}})
    monkeypatch.setattr(coco, "VIT_G_14", {})
    metrics = build(["clip_coco10k"], **where)
    prompts = [f"thing {i}" for i in range(10_000)]

    def refused(says: str, *given) -> None:
        with pytest.raises(ValueError, match=says):
            check_samples(metrics, *given)

    refused("samples.images: 2,000; clip_coco10k is of 10,000: set evaluate.images=10000", (3, 1024, 1024), None, 2000)
    refused("samples.images: 3 channels of 64 x 64 pixels; clip_coco10k takes", (3, 64, 64), None, 10_000, prompts)
    refused("samples.prompts: 0 different prompts; clip_coco10k takes a caption for each", (3, 512, 512), None, 10_000)
    refused(
        "samples.prompts: 1,000 different prompts; .*evaluate.prompts=", (3, 512, 512), None, 10_000, prompts[:1000]
    )
    check_samples(metrics, (3, 512, 512), None, 10_000, prompts)
    monkeypatch.setattr(coco.CocoDistance, "network", lambda self, files: Means())
    with pytest.raises(
        ValueError, match="inception_reference: fid_coco30k needs this file .*jobs/features.py makes it"
    ):
        build(["fid_coco30k"])


def test_statistics_of_a_folder_of_pictures_are_written_as_a_protocol_prepares_them(tmp_path, monkeypatch, capsys):
    kind = replace(coco.INCEPTION, find=lambda download: tmp_path, open=lambda path, device: Means())
    monkeypatch.setattr(coco, "INCEPTION", kind)
    (tmp_path / "real").mkdir()
    pictures = [coloured([60 + 20 * i], 300, 360 + 40 * (i % 2))[0] for i in range(5)]
    for i, picture in enumerate(pictures):
        Image.fromarray(picture.permute(1, 2, 0).numpy()).save(tmp_path / "real" / f"{i}.png")
    job("features")(["extractor=coco30k", f"data={tmp_path / 'real'}", f"out={tmp_path / 'out'}", "images=4"])
    report = json.loads(capsys.readouterr().out)
    assert report["images"] == 4
    levels = np.array([60, 80, 100, 120]) / 128 - 1
    with np.load(tmp_path / "out" / "statistics.npz") as file:
        assert file["mean"] == pytest.approx([levels.mean()] * 3)
        assert file["covariance"] == pytest.approx(np.full((3, 3), levels.var(ddof=1)))
    (tmp_path / "real" / "broken.png").write_bytes(b"no picture")
    with pytest.raises(SystemExit, match="2"):
        job("features")(["extractor=coco30k", f"data={tmp_path / 'real'}", f"out={tmp_path / 'other'}"])
    assert "broken.png" in capsys.readouterr().err
