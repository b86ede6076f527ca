"""Our own latent text-to-image model: how its parts are trained, what the shipped ones do, and that stock diffusers
opens their folder."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from toy import same, weights

from fewstep import build
from fewstep.config import ConfigError, read_json, resolve
from fewstep.data.emoji import COLOURS, STYLES
from fewstep.data.feed import open_feed
from fewstep.data.manifest import Column
from fewstep.data.shards import ShardWriter
from fewstep.diffusion.draws import Draws
from fewstep.methods.codec import edge_loss, kl_divergence
from fewstep.networks.latents import find_latents
from fewstep.networks.parts import SCORER
from fewstep.networks.pretrained import open_teacher
from fewstep.networks.text import byte_pairs, new_clip, new_tokenizer, open_clip
from fewstep.recipe import open_recipe
from fewstep.students import open_student, save_teacher

RECIPES = Path(__file__).resolve().parents[1] / "jobs" / "recipes"
TEACHER = "shipped:emoji/teacher"
SHORT = {"train.steps": 2, "train.batch": 4, "train.report_every": 1, "train.save_every": 2, "name": "short"}


# Losses


def test_the_codecs_losses_are_zero_where_they_should_be_and_closed_forms_elsewhere():
    assert kl_divergence(torch.zeros(9), torch.ones(9)) == 0
    # KL(N(2, 0.5^2) || N(0, 1)) = (4 + 1/4 - 1 + 2 ln 2) / 2
    assert kl_divergence(torch.full((3,), 2.0), torch.full((3,), 0.5)).item() == pytest.approx(2.318147, abs=1e-5)
    ramp = torch.arange(4.0).view(1, 1, 1, 4).expand(1, 1, 3, 4)
    assert edge_loss(ramp, ramp + 5) == 0 and edge_loss(3 * ramp, ramp) == 2


# The tokenizer


def test_byte_pairs_are_merged_by_how_often_they_occur():
    # "ab" occurs 5 times; then "c</w>" follows it 3 times, and in "abd" the end follows twice
    assert byte_pairs({"abc": 3, "abd": 2}, 9) == [("a", "b"), ("ab", "c</w>"), ("ab", "d</w>")]
    assert byte_pairs({"abc": 3, "abd": 2}, 1) == [("a", "b")]
    assert byte_pairs({"aaa": 1}, 5) == [("a", "a</w>"), ("a", "aa</w>")]  # equal counts: the last in the alphabet


def test_a_tokenizer_has_the_captions_words_and_spells_all_others():
    captions = ["Red heart, in noto style", "green heart"]
    tokenizer = new_tokenizer(captions, 600, 8)
    words = tokenizer.convert_ids_to_tokens(tokenizer("red  HEART").input_ids)
    assert words == ["<|startoftext|>", "red</w>", "heart</w>", "<|endoftext|>"]
    spelt = tokenizer.convert_ids_to_tokens(tokenizer("é9").input_ids)
    assert spelt == ["<|startoftext|>", "Ã", "©</w>", "9</w>", "<|endoftext|>"]
    assert len(tokenizer("heart " * 20, truncation=True).input_ids) == 8
    assert new_tokenizer(captions, 600, 8).get_vocab() == tokenizer.get_vocab()
    with pytest.raises(ValueError, match="vocab_size: 500, and bytes with the ends of a text are 514 tokens"):
        new_tokenizer(captions, 500, 8)


def test_networks_that_cannot_be_built_are_errors_of_the_recipe():
    network = open_recipe("emoji_codec", RECIPES, {}).network
    with pytest.raises(ConfigError, match="network.config: AutoencoderKL: .*num_groups"):
        build.new_codec(network.config | {"norm_num_groups": 5})
    text = open_recipe("emoji_text", RECIPES, {}).network
    with pytest.raises(ConfigError, match="network.config: CLIPModel: vocab_size: 9"):
        new_clip(text.config | {"text_config": {"vocab_size": 9, "max_position_embeddings": 8}}, ["a"])


# The recipes


def encoded(path: Path) -> Path:
    """Eight rows of latents with the embeddings of captions, of the shapes of the recipe."""
    rng = np.random.default_rng(0)
    text = Column(name="text", kind="text", shape=(24, 128), dtype="float16")
    with ShardWriter(path, (4, 16, 16), encoding="float16", captions=True, columns=(text,)) as writer:
        for i in range(8):
            writer.add(rng.normal(size=(4, 16, 16)), caption=f"number {i}", text=rng.normal(size=(24, 128)))
    return path


def run(recipe: str, tmp_path: Path, **given) -> Path:
    """The folder that jobs/teach.py writes after two steps of a recipe, here in this process."""
    short = open_recipe(recipe, RECIPES, SHORT | {"out": str(tmp_path / recipe)} | given)
    with build.make_feed(short.data, 0, "caption" in short.method.needs) as feed:
        engine = build.make_engine(short, feed, folder=short.checkpoints)
        before = {name: value.clone() for name, value in engine.nets["student"].state_dict().items()}
        assert all(np.isfinite(list(report.metrics.values())).all() for report in engine.run())
        moved = [name for name, value in engine.nets["student"].state_dict().items() if not value.equal(before[name])]
        assert len(moved) > 0.9 * len(before)
    build.describe_net(short.folder, engine.nets["student"])
    (short.folder / "recipe.yaml").write_text(json.dumps(short.written))
    save_teacher(open_student(short.folder), short.folder / "teacher")
    return short.folder / "teacher"


def test_the_recipes_train_one_part_after_the_other_up_to_a_stock_pipeline(tmp_path):
    codec = run("emoji_codec", tmp_path)
    assert sorted(p.name for p in codec.iterdir()) == ["fewstep.json", "vae"]
    text = run("emoji_text", tmp_path, **{"network.parts": str(codec)})
    data = {"data.path": str(encoded(tmp_path / "encoded"))}
    teacher = run("emoji_teacher", tmp_path, **data, **{"network.parts": str(text)})
    assert {p.name for p in teacher.iterdir()} >= {"vae", "text_encoder", "tokenizer", "unet", "scheduler", SCORER}

    from diffusers import StableDiffusionPipeline

    pipe = StableDiffusionPipeline.from_pretrained(teacher)
    with torch.no_grad():
        ours, (x, t) = open_teacher(teacher), (torch.randn(2, 4, 16, 16), torch.tensor([10, 900]))
        cond = {"text": torch.randn(2, 24, 128)}
        raw = ours(x, ours.schedule.level(t.double(), 4), cond, "raw")
        torch.testing.assert_close(raw, pipe.unet(x, t, cond["text"]).sample)
        pixels = torch.rand(2, 3, 64, 64) * 2 - 1
        mean = pipe.vae.encode(pixels).latent_dist.mean * pipe.vae.config.scaling_factor
        torch.testing.assert_close(find_latents(teacher).encode(pixels), mean)


@pytest.mark.parametrize("variant", ["emoji_teacher_eps", "emoji_teacher_flow"])
def test_the_teachers_variants_train(tmp_path, variant):
    run(variant, tmp_path, **{"data.path": str(encoded(tmp_path / "encoded"))})


@pytest.mark.parametrize("name", ["sana_sprint", "rcm", "hyper_sd", "twinflow"])
def test_the_trajectory_recipes_start_and_train_on_the_shipped_teacher(tmp_path, name):
    given = SHORT | {"train.batch": 1, "out": str(tmp_path), "data.path": str(encoded(tmp_path / "encoded"))}
    short = open_recipe(f"emoji_{name}", RECIPES, given)
    with build.make_feed(short.data, 0) as feed:
        engine = build.make_engine(short, feed)
        before = weights(engine.nets["student"])
        assert all(np.isfinite(list(report.metrics.values())).all() for report in engine.run())
    assert not same(weights(engine.nets["student"]), before)
    sampler = build.student_sampler(short.method, engine.sampling)
    with torch.no_grad():
        x0 = sampler.sample(torch.randn(1, *sampler.shape), sampler.conditions.listed(torch.arange(1)), Draws(0, 0))
    assert sampler.calls == 4 and x0.shape == (1, 4, 16, 16) and x0.isfinite().all()


# What is shipped


@pytest.fixture(scope="module")
def held_out():
    """All pictures of the held-out pairs, with their captions."""
    with open_feed(resolve("shipped:emoji/held_out"), captions=True) as feed:
        return next(feed.batches(0, feed.rows))


@torch.no_grad()
def test_the_shipped_codec_keeps_held_out_pictures(held_out):
    x, codec = held_out["real"][:128], find_latents(resolve(TEACHER))
    latents = codec.encode(x)
    assert latents.std().item() == pytest.approx(1, abs=0.05)
    y = codec.decode(latents).clamp(-1, 1)
    assert F.l1_loss(y, x) < 0.055 and -10 * (F.mse_loss(y, x) / 4).log10() > 26.5  # 0.047 and 27.4 dB were obtained


def captioned(held_out) -> list[tuple[str, str, str]]:
    """Name, style and colour of each picture."""
    words = [caption.split(", ") for caption in held_out["caption"]]
    return [(name, style.split()[1], colour.split()[2]) for name, style, colour in words]


@torch.no_grad()
def test_the_shipped_scorer_tells_name_style_and_colour_of_pictures(held_out):
    scorer = open_clip(resolve("shipped:emoji/scorer"))
    x, rows = held_out["real"][::8], captioned(held_out)[::8]
    names = sorted({name for name, _, _ in captioned(held_out)})
    pictures = scorer.pictures(x)

    def right(options) -> float:
        """Share of the pictures whose own caption, the first of its options, fits best."""
        asked = [[f"{n}, in {s} style, on a {c} background" for n, s, c in options(*row)] for row in rows]
        texts = scorer.texts([text for texts in asked for text in texts]).unflatten(0, (len(rows), -1))
        return (torch.einsum("nd,nkd->nk", pictures, texts).argmax(1) == 0).float().mean().item()

    def own_first(own, others, count):
        return [own, *[other for other in others if other != own][: count - 1]]

    assert right(lambda n, s, c: [(other, s, c) for other in own_first(n, names, 20)]) > 0.85
    assert right(lambda n, s, c: [(n, other, c) for other in own_first(s, STYLES, 3)]) > 0.75
    assert right(lambda n, s, c: [(n, s, other) for other in own_first(c, COLOURS, 8)]) > 0.95


STOCK = """
import sys, torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
pipe = StableDiffusionPipeline.from_pretrained(sys.argv[1])
pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
prompts = ["red heart, in noto style, on a green background", "cat face, in twemoji style, on a red background"]
noise = torch.Generator().manual_seed(0)
images = pipe(prompts, num_inference_steps=3, guidance_scale=3.0, generator=noise, output_type="pt").images
assert not any(name.startswith("fewstep") for name in sys.modules)
print(list(images.shape), *[round(v, 3) for v in images[:, :, :4, :4].mean((2, 3)).flatten().tolist()])
"""


def test_stock_diffusers_samples_the_shipped_teacher_without_us():
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    command = [sys.executable, "-c", STOCK, str(resolve(TEACHER))]
    done = subprocess.run(command, capture_output=True, text=True, env=env, cwd="/", timeout=170)
    assert done.returncode == 0, done.stderr[-2000:]
    shape, _, colours = done.stdout.strip().splitlines()[-1].partition("] ")
    assert shape == "[2, 3, 64, 64"
    corners = 255 * np.array([float(v) for v in colours.split()]).reshape(2, 3)
    for corner, colour in zip(corners, ("green", "red"), strict=True):  # the background that was asked for is nearest
        assert min(COLOURS, key=lambda name: np.abs(corner - COLOURS[name]).sum()) == colour


def test_the_shipped_folder_says_what_it_is():
    scheduler = read_json(resolve(TEACHER) / "scheduler" / "scheduler_config.json")
    assert (scheduler["prediction_type"], scheduler["rescale_betas_zero_snr"]) == ("v_prediction", True)
    net = open_teacher(TEACHER, weights=False)
    assert net.shape == (4, 16, 16) and net.picture_shape == (3, 64, 64) and net.conditions.shapes == {"text": (1, 128)}
