"""Latent text-to-image models from a pipeline's folder: prompts, codec, data, training, and mistakes in each."""

from __future__ import annotations

import json
import resource
import shutil
from dataclasses import replace
from pathlib import Path

import diffusers
import numpy as np
import pytest
import tiny
import torch
import toy
import yaml
from job import job, names
from safetensors.torch import load_file

from fewstep import build, dryrun, run
from fewstep.cluster.encode import Encode
from fewstep.cluster.session import Sealed
from fewstep.config import ConfigError
from fewstep.data.decode import decode_all
from fewstep.data.feed import open_feed
from fewstep.data.manifest import Column
from fewstep.data.shards import ShardWriter, join, open_shards
from fewstep.methods.dmd2 import DMD2
from fewstep.networks import export_pipeline as exporting
from fewstep.networks import pretrained
from fewstep.networks.card import Card
from fewstep.networks.conditions import Texts
from fewstep.networks.denoiser import Denoiser
from fewstep.networks.export import ExportError
from fewstep.networks.export_pipeline import export_pipeline
from fewstep.networks.latents import Latents
from fewstep.networks.lora import Lora, merge
from fewstep.networks.pretrained import Network, new_denoiser, open_teacher
from fewstep.networks.prompts import open_encoder
from fewstep.recipe import Recipe, open_recipe
from fewstep.students import export_run, open_sampler, open_student

NET = "UNet2DConditionModel"
RECIPES = Path(__file__).resolve().parents[1] / "jobs" / "recipes"
WORDS = ["a cat", "a dog", "", "w" * 10_000]


@pytest.fixture(scope="module")
def sd(tmp_path_factory) -> Path:
    return tiny.pipeline("sd15", tmp_path_factory.mktemp("sd15") / "sd")


@pytest.fixture(scope="module")
def sdxl(tmp_path_factory) -> Path:
    return tiny.pipeline("sdxl", tmp_path_factory.mktemp("sdxl") / "sdxl")


def shards(folder: Path, scale: float = 1.0, width: int = 12, rows: int = 8, columns=("text",)) -> Path:
    """Latents with embedded captions, of any content."""
    draw = np.random.default_rng(0).standard_normal
    shapes = {name: {"text": (tiny.TOKENS, width), "pooled": (10,)}[name] for name in columns}
    kinds = [Column(name=name, kind=name, shape=shape, dtype="float32") for name, shape in shapes.items()]
    with ShardWriter(folder, (4, 8, 8), encoding="float32", captions=True, columns=kinds) as writer:
        for i in range(rows):
            more = {name: draw(shape).astype(np.float32) for name, shape in shapes.items()}
            writer.add((scale * draw((4, 8, 8))).astype(np.float32), caption=f"thing {i}", **more)
    return folder


def recipe(folder: Path, teacher: Path, data: Path | None, *arguments: str) -> Recipe:
    path = folder / "tiny.yaml"
    roles = ("student", "fake", "disc")
    content = {
        "teacher": str(teacher),
        "licence": "cc-by-4.0",
        "data": None if data is None else {"path": str(data)},
        "method": {"name": "dmd2", "student_steps": 4, "guidance": 3.0},
        "optim": {role: {"lr": 1e-3} for role in roles},
        "train": {"steps": 2, "batch": 4, "report_every": 1, "save_every": 2},
        "out": str(folder / "runs"),
    }
    path.write_text(yaml.safe_dump(content))
    named = dict(argument.split("=", 1) for argument in ("name=a", *arguments))
    return open_recipe(str(path), folder, {key: yaml.safe_load(value) for key, value in named.items()})


# Prompts and pictures


@pytest.mark.parametrize("name", ["sd15", "sdxl"])
def test_prompts_are_embedded_as_the_pipeline_does(name, sd, sdxl):
    folder = {"sd15": sd, "sdxl": sdxl}[name]
    encoder = open_encoder(folder, NET)
    result = encoder.columns(WORDS, batch=3)
    assert encoder.cut == 1  # CLIP cuts a text of 10,000 letters, and it is counted
    pipe = diffusers.DiffusionPipeline.from_pretrained(folder)
    kept = pipe.tokenizer(WORDS, padding="max_length", max_length=tiny.TOKENS, truncation=True, return_tensors="pt")
    with torch.no_grad():
        if name == "sd15":
            expected = {"text": pipe.text_encoder(kept.input_ids)[0]}
        else:
            one = pipe.text_encoder(kept.input_ids, output_hidden_states=True)
            two = pipe.text_encoder_2(kept.input_ids, output_hidden_states=True)
            text = torch.cat([one.hidden_states[-2], two.hidden_states[-2]], -1)
            expected = {"text": text, "pooled": two.text_embeds}
    assert result.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(result[key], value, rtol=1e-5, atol=1e-6)
        empty = torch.zeros_like(value[2:3]) if name == "sdxl" else value[2:3]  # SDXL's nothing is zeros
        torch.testing.assert_close(encoder.nothing()[key], empty, rtol=1e-5, atol=1e-6)


def test_latents_become_the_pictures_that_the_pipeline_makes(sd):
    net = open_teacher(sd)
    vae = diffusers.AutoencoderKL.from_pretrained(sd / "vae")
    x = torch.randn(2, 4, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(net.pictures(x), vae.decode(x / 0.5).sample)
        pictures, eps = torch.randn(2, 3, 64, 64), torch.randn(2, 4, 8, 8)
        dist = vae.encode(pictures).latent_dist
        torch.testing.assert_close(net.codec.encode(pictures, eps), 0.5 * (dist.mean + dist.std * eps))
        torch.testing.assert_close(net.codec.encode(pictures), 0.5 * dist.mean)
    assert net.picture_shape == (3, 64, 64)
    shifted = replace_config(sd, "vae", shift_factor=0.25)
    with torch.no_grad():
        torch.testing.assert_close(Latents(shifted).decode(x), vae.decode(x / 0.5 + 0.25).sample)


def replace_config(folder: Path, part: str, **fields) -> Path:
    """A copy of a pipeline's folder with other values in the config of one of its parts."""
    copy = folder.with_name(f"{folder.name}-{part}-{'-'.join(fields)}")
    shutil.copytree(folder, copy, dirs_exist_ok=True)
    path = copy / part / "config.json" if part else copy / "model_index.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    return copy


# Columns


def test_columns_are_added_shard_by_shard_and_a_second_start_goes_on(tmp_path, sd):
    draw = np.random.default_rng(0).integers
    with ShardWriter(tmp_path / "pictures", (3, 64, 64), captions=True, shard_bytes=1, group_rows=3) as writer:
        for i in range(6):
            writer.add(draw(0, 256, (3, 64, 64)).astype(np.uint8), caption=f"thing {i}")
    assert len(writer.manifest.shards) == 2
    encoder = lambda source: Encode(Sealed((str(source), str(sd), tmp_path / "parts")), 0, 2, "cpu")
    make = lambda: encoder(tmp_path / "pictures")
    first = make()
    assert first({"part": np.array([0])})["rows"].tolist() == [3]
    stamp = (tmp_path / "parts" / "00000" / "manifest.json").stat().st_mtime_ns
    assert make()({"part": np.array([0, 1])})["rows"].tolist() == [3, 3]
    assert (tmp_path / "parts" / "00000" / "manifest.json").stat().st_mtime_ns == stamp
    join([tmp_path / "parts" / f"{i:05d}" for i in range(2)], tmp_path / "encoded", {"source": "encode"})
    with build.make_feed(recipe(tmp_path, sd, tmp_path / "encoded").data, 0) as feed:
        rows = next(feed.batches(0, 6))
    assert rows["real"].shape == (6, 4, 8, 8) and rows["text"].shape == (6, tiny.TOKENS, 12)
    source = open_shards(tmp_path / "pictures")
    tables = [source.read(unit) for unit in range(len(source.units))]
    captions = [text for table in tables for text in table.column("caption").to_pylist()]
    pixels = np.concatenate([decode_all(table.column("image").to_pylist(), source.size)[0] for table in tables])
    means = first.codec.encode(torch.from_numpy(pixels).float() / 127.5 - 1)
    near = torch.cdist(rows["real"].flatten(1), means.flatten(1))
    texts = first.encoder.columns(captions)["text"]
    same_text = torch.cdist(rows["text"].flatten(1), texts.flatten(1)).argmin(1)
    assert torch.equal(near.argmin(1), same_text) and sorted(same_text.tolist()) == list(range(6))


def test_what_cannot_be_encoded_is_refused(tmp_path, sd):
    with ShardWriter(tmp_path / "small", (3, 32, 32), captions=True) as writer:
        writer.add(np.zeros((3, 32, 32), np.uint8), caption="a")
    encoder = lambda source: Encode(Sealed((str(source), str(sd), tmp_path / "parts")), 0, 2, "cpu")
    with pytest.raises(ValueError, match=r"pictures of shape \(3, 32, 32\), but the teacher takes pictures of shape"):
        encoder(tmp_path / "small")
    with pytest.raises(ValueError, match="has no images with captions, of which columns are made"):
        encoder(shards(tmp_path / "latents"))


# A run


def test_a_recipe_trains_on_latents_and_embedded_captions(tmp_path, sd):
    asked = recipe(tmp_path, sd, shards(tmp_path / "data"))
    run.check(asked)
    engine = build.make_engine(asked, build.make_feed(asked.data, 0), folder=asked.checkpoints)
    conditions = engine.conditions
    assert isinstance(conditions, Texts) and conditions.prompts is None
    assert len(conditions.listing) == 8 and set(conditions.listed_texts(8)) == {f"thing {i}" for i in range(8)}
    torch.testing.assert_close(conditions.nothing["text"], open_encoder(sd, NET).columns([""])["text"])
    before = toy.weights(engine.nets["student"])
    toy.finish(engine)
    assert not toy.same(before, toy.weights(engine.nets["student"]))
    sampler = build.student_sampler(asked.method, engine.sampling)
    samples = build.make_samples(sampler, 5, batch=4)
    assert samples.images.shape == (5, 3, 64, 64) and samples.prompts == conditions.listed_texts(5)
    assert samples.calls == 4 and samples.labels is None
    teacher = build.make_samples(build.teacher_sampler(engine.nets["teacher"], 8, 2.0), 2)
    assert (teacher.sampler, teacher.calls) == ("ddim-8-guided-2", 16)
    asked.folder.mkdir(parents=True, exist_ok=True)
    (asked.folder / "recipe.yaml").write_text(yaml.safe_dump(asked.model_dump(mode="json")))
    build.describe_net(asked.folder, engine.nets["student"])
    again = build.make_samples(open_sampler(str(asked.folder)), 5, batch=4)
    assert torch.equal(again.images, samples.images)
    other = build.make_samples(open_sampler(str(asked.folder), prompts=["a cat"]), 2)
    assert other.prompts == ("a cat", "a cat")


def test_a_student_generates_for_the_prompts_of_a_file(tmp_path, sd):
    (tmp_path / "prompts.txt").write_text("a cat\na dog\na bird\n")
    arguments = [f"prompts={tmp_path / 'prompts.txt'}"]
    asked = recipe(tmp_path, sd, shards(tmp_path / "data"), *arguments)
    net = build.make_teacher(asked)
    assert net.conditions.prompts.texts == ("a cat", "a dog", "a bird")
    expected = open_encoder(sd, NET).columns(["a dog"])["text"]
    torch.testing.assert_close(net.conditions.listed(torch.tensor([1, 4]))["text"], expected.expand(2, -1, -1))
    drawn = net.conditions.draw(build.Draws(0, 0), 64)["text"]
    assert len({tuple(row.flatten().tolist()) for row in drawn}) == 3


def test_a_regression_on_pairs_of_a_text_teacher_prepares_a_student_as_a_chain(tmp_path, sdxl):
    """The chain of sdxl_1step on a tiny SDXL: each row of the pairs is the teacher's sample of its noise and prompt."""
    pairs, prompts = tmp_path / "pairs", ["a cat", "a dog", "a bird"]
    job("pairs")([f"teacher={sdxl}", f"prompts={json.dumps(prompts)}", "pairs=7", "steps=3", "batch=4", f"out={pairs}"])
    with open_feed(pairs) as feed:
        rows = next(feed.batches(0, 7))
    net = build.with_pipeline(open_teacher(sdxl), sdxl)
    assert {rows[name].shape[1:] for name in ("real", "noise")} == {net.shape}
    with torch.no_grad():
        x0 = build.teacher_sampler(net, 3).sample(rows["noise"], net.conditions.of(rows), build.Draws(0, 0))
    torch.testing.assert_close(rows["real"], x0, rtol=1e-2, atol=1e-2)
    columns = open_encoder(sdxl, NET).columns(prompts)
    nearest = torch.cdist(rows["pooled"], columns["pooled"])
    assert nearest.min(1).values.max() < 1e-2 and sorted(nearest.argmin(1).bincount().tolist()) == [2, 2, 3]

    chain = yaml.safe_load((RECIPES.parent / "chains" / "sdxl_1step.yaml").read_text())
    own = {"teacher": str(sdxl), "out": str(tmp_path / "runs"), "precision": "fp32", "cluster": {"workers": 1}}
    own |= {"train": {"steps": 2, "batch": 4, "report_every": 1, "save_every": 2}, "evaluate.metrics": []}
    for stage, data in zip(
        chain["stages"], (pairs, shards(tmp_path / "data", columns=("text", "pooled"))), strict=True
    ):
        stage["set"] = stage.get("set", {}) | own | {"data.path": str(data), "optim.student.lr": 1e-3}
    (tmp_path / "chain.yaml").write_text(yaml.safe_dump(chain))
    read = names("chain")
    warm, last = read["recipes"](read["Chain"](chain=str(tmp_path / "chain.yaml"), name="one"))
    assert warm.method.calls(net)[0].t == last.method.calls(net)[0].t == 399
    engine = build.make_engine(warm, build.make_feed(warm.data, 0), folder=warm.checkpoints)
    reports = toy.finish(engine)
    assert {"student/spatial"} <= reports[0].keys() and "student/high" not in reports[0]
    prepared = toy.weights(engine.nets["student"])
    nets = build.make_nets(last)
    assert toy.same(toy.weights(nets["student"]), prepared) and not toy.same(toy.weights(nets["fake"]), prepared)
    assert {"student/match"} <= toy.finish(build.make_engine(last, build.make_feed(last.data, 0)))[0].keys()


# Exports: what stock diffusers makes in a fresh process


def saved(asked: Recipe) -> Recipe:
    """A run's folder after its training."""
    engine = build.make_engine(asked, build.make_feed(asked.data, 0), folder=asked.checkpoints)
    toy.finish(engine)
    (asked.folder / "recipe.yaml").write_text(yaml.safe_dump(asked.model_dump(mode="json")))
    build.describe_net(asked.folder, engine.nets["student"])
    return asked


def test_a_student_is_exported_as_a_stock_pipeline_and_its_adapter_for_load_lora_weights(tmp_path, sd):
    """One run with an adapter is compared twice: merged into the exported U-Net, and loaded into the teacher's."""
    lora = "roles.student.lora={rank: 4, alpha: 8, targets: [all]}"
    asked = saved(recipe(tmp_path, sd, shards(tmp_path / "data"), lora, "optim.student.lr=0.1"))
    assert run.export_notes(asked) == []
    report = export_run(asked.folder)
    out = Path(report["folder"])
    assert report["max_difference"] <= 1e-4 and report["call"] == {"num_inference_steps": 4, "guidance_scale": 1.0}
    scheduler = diffusers.LCMScheduler.from_pretrained(out / "scheduler")
    scheduler.set_timesteps(4)
    assert scheduler.timesteps.tolist() == [999, 749, 499, 249]
    card = (out / "README.md").read_text()
    assert "license: cc-by-4.0" in card and "num_inference_steps=4, guidance_scale=1.0" in card
    kohya = load_file(out / "lora" / "kohya.safetensors")
    name = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
    assert kohya[f"{name}.lora_down.weight"].shape == (4, 16) and kohya[f"{name}.alpha"] == 4
    student, teacher = open_student(asked.folder).net, open_teacher(sd)
    weight = lambda net: net.backbone.model.mid_block.attentions[0].transformer_blocks[0].attn1.to_q.weight
    change = kohya[f"{name}.lora_up.weight"] @ kohya[f"{name}.lora_down.weight"]
    torch.testing.assert_close(weight(student), weight(teacher) + change, rtol=1e-4, atol=1e-6)
    assert change.abs().max() > 1e-2
    again = build.make_samples(open_sampler(str(out), prompts=["a cat"]), 2)
    ours = build.make_samples(open_sampler(str(asked.folder), prompts=["a cat"]), 2)
    assert again.calls == 4 and (again.images.int() - ours.images.int()).abs().max() <= 1


STOCK = {
    "sd15": True,
    "sd21": True,
    "sdxl": True,
    "sd3": True,
    "flux": True,
    "sana": True,
    "pixart": False,
    "dit": False,
}


def exported_as_stock(name: str, tmp: Path) -> Path:
    """The export of an adapter with random factors in two calls, merged and beside, and read here again."""
    folder = tiny.pipeline(name, tmp / "teacher")
    net = open_teacher(folder).requires_grad_(False)
    adapter, generator = Lora(net, 2, alpha=4, targets="attention"), torch.Generator().manual_seed(3)
    for up in adapter.up.values():
        up.data.normal_(std=0.3, generator=generator)
    merged = merge(adapter, *build._probe(net), tolerance=1e-3)
    calls = DMD2(student_steps=2).calls(net)
    out = tmp / "out"
    assert export_pipeline(merged, folder, out, calls=calls, card=Card(name=name), adapter=adapter) <= 1e-4
    assert (out / "lora" / "pytorch_lora_weights.safetensors").is_file() == STOCK[name]
    assert exporting.is_stock(net, folder) and exporting.is_stock(net, None) == (name != "dit")
    prompts = None if name == "dit" else ["a red apple", "a dog"]
    ours = build.few_step_sampler({"student": build.with_pipeline(merged, folder, listing=prompts)}, calls)
    ours, again = (build.make_samples(s, 2, batch=2).images for s in (ours, open_sampler(str(out), prompts=prompts)))
    assert torch.equal(ours, again) and not torch.equal(ours[0], ours[1])
    teacher = build.few_step_sampler({"student": build.with_pipeline(net, folder, listing=prompts)}, calls)
    assert not torch.equal(build.make_samples(teacher, 2, batch=2).images, ours)
    return out


@pytest.mark.parametrize("name", ["sd3", "flux", "sana", "pixart", "dit"])
def test_a_student_of_every_family_is_exported_as_its_teachers_pipeline(name, tmp_path, monkeypatch):
    """diffusers runs the folder in this process, where its import is paid for; the next test is of a fresh one."""

    def here(arguments: list[str], out: Path) -> dict[str, torch.Tensor]:
        with monkeypatch.context() as patch:
            patch.setattr("sys.argv", ["check", *arguments])
            exec(exporting.CHECK.replace('assert "fewstep"', 'assert True or "fewstep"'), {})
        return load_file(out)

    monkeypatch.setattr(exporting, "_run", here)
    exported_as_stock(name, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", STOCK)
def test_stock_diffusers_in_a_fresh_process_makes_the_images_of_every_familys_student(name, tmp_path):
    exported_as_stock(name, tmp_path)


def test_an_adapter_of_grouped_convolutions_has_no_file_for_load_lora_weights(tmp_path):
    folder = tiny.pipeline("sana", tmp_path / "sana")
    net = open_teacher(folder)
    why = exporting.lora_refusal(Lora(net, 2, targets="all"), folder)
    assert why.endswith("is a convolution of several groups, which it does not adapt")
    assert exporting.lora_refusal(Lora(net, 2), folder) is None


def test_sana_puts_its_instruction_before_a_prompt_and_not_before_the_text_that_stands_for_none(tmp_path):
    encoder = open_encoder(tiny.pipeline("sana", tmp_path), "SanaTransformer2DModel")
    empty, nothing = encoder.columns([""]), encoder.nothing()
    bare = encoder.pipe.encode_prompt([""], do_classifier_free_guidance=False)[0]
    torch.testing.assert_close(nothing["text"], bare)
    assert empty["mask"].sum() > nothing["mask"].sum() and not torch.allclose(empty["text"], nothing["text"])


@pytest.mark.slow
def test_sdxl_in_one_step_at_399_is_exported_with_the_first_400_timesteps(tmp_path, sdxl):
    net = open_teacher(sdxl)
    method = DMD2(conditioning=399)
    worst = export_pipeline(net, sdxl, tmp_path / "xl", calls=method.calls(net), card=Card(name="xl"))
    assert worst <= 1e-4
    scheduler = diffusers.LCMScheduler.from_pretrained(tmp_path / "xl" / "scheduler")
    scheduler.set_timesteps(1)
    assert scheduler.timesteps.tolist() == [399]
    assert scheduler.alphas_cumprod[399].item() == pytest.approx(0.4260864, rel=1e-5)


@pytest.mark.slow
def test_an_export_that_makes_other_images_is_refused(tmp_path, sd, monkeypatch):
    net = open_teacher(sd)
    calls = DMD2(student_steps=2).calls(net)
    monkeypatch.setattr(Denoiser, "pictures", lambda self, x0: self.codec.decode(x0 * 1.01))
    with pytest.raises(ExportError, match="its images differ by .* from the student's, more than 0.0001; not kept"):
        export_pipeline(net, sd, tmp_path / "x", calls=calls, card=Card(name="x"))
    assert not (tmp_path / "x").exists() and not list(tmp_path.glob(".x.*"))
    steps = tuple(replace(call, then="step") for call in calls)
    with pytest.raises(ExportError, match="stock schedulers noise anew between calls"):
        export_pipeline(net, sd, tmp_path / "x", calls=steps, card=Card(name="x"))


# Mistakes


def test_mistakes_are_named_at_the_door(tmp_path, sd, sdxl):
    data = shards(tmp_path / "data")

    def refused(says: str, teacher: Path = sd, path: Path = data, *arguments: str):
        with pytest.raises((ValueError, ConfigError), match=says) as error:
            run.check(recipe(tmp_path, teacher, path, *arguments))
        assert "\n" not in str(error.value)

    refused("licence: missing; say the licence of the teacher's weights", sd, data, "licence=null")
    inpaint = replace_config(sd, "", _class_name="StableDiffusionInpaintPipeline")
    refused(
        r"model_index.json: its pipeline is 'StableDiffusionInpaintPipeline'; of a UNet2DConditionModel are read "
        "StableDiffusionPipeline, StableDiffusionXLPipeline",
        inpaint,
    )
    deaf = replace_config(sd, "vae", deaf=True)
    shutil.rmtree(deaf / "text_encoder")
    refused("has no text_encoder, so its prompts cannot be encoded; copy it there", deaf)
    blind = replace_config(sd, "vae", blind=True)
    shutil.rmtree(blind / "vae")
    refused("teacher: it generates 4 channels, so latents, and its folder has no vae/config.json", blind)
    refused("of class 'VQModel'; known: AutoencoderKL, AutoencoderDC", replace_config(sd, "vae", _class_name="VQModel"))
    refused("is of class 'UNetMotionModel'; known: ", replace_config(sd, "unet", _class_name="UNetMotionModel"))
    forgotten = shards(tmp_path / "forgotten", scale=2.0)  # z, where the network takes z / 2
    refused("latents have the standard deviation 1.*so the scaling factor is wrong: store", sd, forgotten)
    twice = shards(tmp_path / "twice", scale=0.5)
    refused("latents have the standard deviation 0.*so the scaling factor is wrong: store", sd, twice)
    bare = shards(tmp_path / "bare", columns=())
    refused("has no column 'text'", sd, bare)
    refused("its column 'text' has 9 numbers a token, but the network takes 12", sd, shards(tmp_path / "w", width=9))
    refused("has no column 'pooled'", sdxl)
    (tmp_path / "gap.txt").write_text("a cat\n\na dog\n")
    refused("gap.txt': line 2 is empty; give a prompt, or remove the line", sd, data, f"prompts={tmp_path}/gap.txt")
    refused("evaluate.prompts: .* is no readable text file", sd, data, f"evaluate.prompts={tmp_path}/none.txt")
    with pytest.raises(ValueError, match="prompts: missing; this model generates for texts: give one"):
        open_sampler(str(sd))


def test_a_teacher_whose_maps_are_not_square_has_no_gan_head(tmp_path, sd):
    wide = replace_config(sd, "unet", sample_size=[8, 16])
    with pytest.raises(ValueError, match="a tap's map is 4 x 8, and a GAN head needs a square one; set gan_weight=0"):
        build.make_nets(recipe(tmp_path, wide, shards(tmp_path / "data")))


# The dry run, which allocates nothing


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("lora", [False, True], ids=["whole", "lora"])
def test_memory_is_counted_without_networks_as_with_them(tmp_path, sd, lora, precision):
    arguments = ["roles.student.lora={rank: 4}", "roles.fake.lora={rank: 4}"] if lora else []
    asked = recipe(tmp_path, sd, shards(tmp_path / "data"), f"precision={precision}", *arguments)
    for mine, real in zip(dryrun.memory(asked), dryrun._rows(asked, build.make_nets(asked)), strict=True):
        mine["activations"] = pytest.approx(mine["activations"], rel=0.15)  # attention keeps less on a real CPU
        assert real == mine


SDXL = {
    "sample_size": 128,
    "block_out_channels": [320, 640, 1280],
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "cross_attention_dim": 2048,
    "attention_head_dim": [5, 10, 20],
    "transformer_layers_per_block": [1, 2, 10],
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
LARGE = {
    "sdxl_4step": ("UNet2DConditionModel", SDXL, 2_567_463_684, 2_567_463_684),
    "sdxl_4step_lora": ("UNet2DConditionModel", SDXL, 2_567_463_684, None),
    "flux_4step_lora": ("FluxTransformer2DModel", {"guidance_embeds": True}, 11_901_408_320, None),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", LARGE)
def test_published_sizes_are_counted_on_any_number_of_gpus(name, monkeypatch):
    """In this process's own memory nothing of their 10 to 48 GB appears."""
    model, config, size, trained = LARGE[name]
    flow = {"schedule": {"name": "flow", "shift": 3.0}, "prediction": "flow", "time_scale": 1000.0}
    ddpm = {"schedule": {"name": "ddpm", **tiny.SD_BETAS}, "prediction": "eps"}
    network = Network(model=model, config=config, **(flow if "flux" in name else ddpm))
    monkeypatch.setattr(pretrained, "check_memory", lambda model: None)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    rows = {}
    for workers in (1, 8, 64):
        changes = {"data": None, "cluster.workers": workers, "train.batch": 2 * workers, "name": "a", "prompts": None}
        changes |= {"method.gan_weight": 0} if "flux" not in name else {}
        asked = open_recipe(name, RECIPES, {key: value for key, value in changes.items() if key != "data"})
        asked = asked.model_copy(update={"data": None})
        monkeypatch.setattr(build, "make_teacher", lambda *a, **k: new_denoiser(network, "bf16", weights=False))
        rows[workers] = {row["role"]: row for row in dryrun.memory(asked)}
        print(name, workers, rows[workers])
    assert rows[1]["teacher"]["parameters"] == size
    assert trained is None or rows[1]["student"]["parameters"] == trained
    assert rows[1]["teacher"]["weights"] == pytest.approx(2 * size, rel=0.1)
    if "flux" in name:  # sharded over all
        assert rows[64]["teacher"]["weights"] == rows[1]["teacher"]["weights"] // 64
    assert rows[1]["student"]["activations"] == rows[64]["student"]["activations"] > 1 << 20
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 2 << 20, f"{grown >> 10} MiB"  # in KiB


@pytest.mark.slow
def test_adapters_of_sdxl_take_a_fraction_of_weights_and_optimisers(monkeypatch):
    """Three networks take 71.7 GiB; half of it with the student alone as an adapter, an eighth with the critic too."""
    network = Network(model=NET, config=SDXL, schedule={"name": "ddpm", **tiny.SD_BETAS}, prediction="eps")
    monkeypatch.setattr(pretrained, "check_memory", lambda model: None)
    monkeypatch.setattr(build, "make_teacher", lambda *a, **k: new_denoiser(network, "bf16", weights=False))
    monkeypatch.setattr(dryrun, "activations", lambda forward, count: 0)

    def counted(name: str, **changes) -> float:
        shared = {"name": "a", "cluster.workers": 1, "train.batch": 2, "method.gan_weight": 0}
        asked = open_recipe(name, RECIPES, shared | changes).model_copy(update={"data": None})
        return sum(row["weights"] + row["optimiser"] for row in dryrun.memory(asked)) / 2**30

    whole = counted("sdxl_4step")
    assert whole == pytest.approx(71.7, abs=0.1)
    assert counted("sdxl_4step_lora") / whole == pytest.approx(0.51, abs=0.01)
    assert counted("sdxl_4step_lora", **{"roles.fake.lora.rank": 64}) / whole == pytest.approx(0.12, abs=0.01)
