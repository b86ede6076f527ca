"""Scores: closed forms, brute force, and what real images, noise and repeated means must give."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Annotated
from urllib.error import URLError

import numpy as np
import pytest
import torch
import toy
from cleanfid import fid as clean_fid
from job import job
from safetensors.torch import load_file, save_file
from scipy.linalg import sqrtm
from torch import nn

from fewstep.build import few_step_sampler, make_metrics, make_samples
from fewstep.checks import Check
from fewstep.cluster.progress import table as closing_table
from fewstep.cluster.train import localized
from fewstep.compare import Record
from fewstep.compare import scores as compare_runs
from fewstep.config import ConfigError, resolve
from fewstep.data.feed import open_feed
from fewstep.data.shards import ShardWriter
from fewstep.diffusion.samplers import calls_at, to_uint8
from fewstep.diffusion.schedules import EDM
from fewstep.files import sha256_of
from fewstep.metrics import METRICS, Metric, better, find_metric, inception, kid, prdc
from fewstep.metrics.base import (
    File,
    Files,
    Measure,
    Outputs,
    Samples,
    Score,
    check_samples,
    compare,
    evaluate,
    score,
)
from fewstep.metrics.build import Metrics
from fewstep.metrics.build import check as check_files
from fewstep.metrics.classes import Diversity
from fewstep.metrics.features import (
    NETWORKS,
    FeatureMaps,
    FeatureNet,
    Info,
    SmallNetwork,
    open_features,
    save_features,
    train_features,
)
from fewstep.metrics.frechet import Frechet, frechet_distance
from fewstep.metrics.inception import Inception
from fewstep.metrics.kid import Kernel, kernel_distance
from fewstep.metrics.prdc import Neighbours
from fewstep.metrics.reference import moments, open_reference, save_reference
from fewstep.networks.card import Card, write_card
from fewstep.recipe import Recipe, load_recipe
from fewstep.run import Row
from fewstep.run import check as check_run
from fewstep.sweeps.judge import judge
from fewstep.sweeps.record import FINISHED, Trial
from fewstep.sweeps.report import markdown
from fewstep.sweeps.settings import Sweep
from fewstep.sweeps.settings import check as check_sweep
from fewstep.sweeps.space import Space, apply, choice, load_space

FEATURES = "shipped:fashion_mnist/features.safetensors"
STATISTICS = "shipped:fashion_mnist/statistics.npz"
ALL = ("fd_fashion", "precision", "recall", "density", "coverage", "class_consistency", "diversity")
JOB = Path(__file__).parents[1] / "jobs" / "features.py"
RECIPES = Path(__file__).parents[1] / "jobs" / "recipes"


def build(names, features: str | None = None, reference: str | None = None, **settings) -> list:
    """The functions that score samples by these metrics."""
    return Metrics(metrics=list(names), features=features, reference=reference, **settings).build()


def spd(size: int, seed: int, rank: int | None = None) -> np.ndarray:
    root = np.random.default_rng(seed).normal(size=(size, rank or 2 * size))
    return root @ root.T / size


def samples_of(images: torch.Tensor, labels: torch.Tensor | None = None, **fields) -> Samples:
    return Samples(images, labels, **({"sampler": "one step", "calls": 1, "seconds": 2.0, "seed": 0} | fields))


def noise(images: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (images, 1, 28, 28), dtype=torch.uint8, generator=generator)


class Pixels:
    """An extractor whose features are the first pixels, which counts how often it is asked."""

    name, hash = "pixels", "f" * 64

    def __init__(self, width: int = 4):
        self.width, self.calls, self.info = width, 0, Info("pixels", 2, 1, 28)

    def __call__(self, images: torch.Tensor) -> Outputs:
        self.calls += 1
        features = images.flatten(1)[:, : self.width].float().numpy()
        return Outputs(features, np.stack([-features[:, 0], features[:, 0] - 255], 1))


@pytest.fixture(scope="module")
def real() -> tuple[torch.Tensor, torch.Tensor]:
    """5000 of the shipped Fashion-MNIST images and their labels."""
    with open_feed(resolve("shipped:fashion_mnist/shards"), seed=3) as feed:
        images, labels = next(feed.batches(0, 5000)).values()
    return to_uint8(images), labels


# Frechet distance


def test_frechet_distance_of_diagonal_gaussians_is_that_of_their_means_and_deviations():
    m, n = np.array([0.0, 1.0, -2.0]), np.array([0.5, 1.0, 3.0])
    s, t = np.array([1.0, 2.0, 0.0]), np.array([3.0, 0.5, 4.0])
    expected = ((m - n) ** 2).sum() + ((s - t) ** 2).sum()
    assert frechet_distance(m, np.diag(s**2), n, np.diag(t**2)) == pytest.approx(expected, rel=1e-12)


def test_frechet_distance_of_a_shift_is_its_square_and_of_a_scaling_its_excess_variance():
    m, cov = np.arange(6.0), spd(6, 0)
    assert frechet_distance(m, cov, m, cov) == pytest.approx(0, abs=1e-10)
    assert frechet_distance(m, cov, m + 0.5, cov) == pytest.approx(6 * 0.25, rel=1e-9)
    assert frechet_distance(m, cov, m, 9 * cov) == pytest.approx((3 - 1) ** 2 * np.trace(cov), rel=1e-9)


def test_frechet_distance_of_rank_one_covariances():
    u, v, zero = np.array([1.0, 2.0, 0.0]), np.array([3.0, -1.0, 1.0]), np.zeros(3)
    expected = u @ u + v @ v - 2 * abs(u @ v)
    assert frechet_distance(zero, np.outer(u, u), zero, np.outer(v, v)) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("rank", [None, 10])
def test_frechet_distance_equals_the_general_matrix_square_root(rank):
    a, b = spd(24, 1, rank), spd(24, 2)
    expected = np.trace(a) + np.trace(b) - 2 * np.trace(sqrtm(a @ b)).real
    result = frechet_distance(np.zeros(24), a, np.zeros(24), b)
    assert result == pytest.approx(expected, rel=1e-6)
    assert frechet_distance(np.zeros(24), b, np.zeros(24), a) == pytest.approx(result, rel=1e-7)


def test_frechet_distance_refuses_what_is_not_a_covariance():
    with pytest.raises(ValueError, match="eigenvalue -1"):
        frechet_distance(np.zeros(2), np.diag([1.0, -1.0]), np.zeros(2), np.eye(2))
    with pytest.raises(ValueError, match="unlike features"):
        frechet_distance(np.zeros(2), np.eye(2), np.zeros(3), np.eye(3))


def test_moments_are_the_unbiased_ones_in_float64():
    features = np.float32([[1, 2], [3, 2], [5, 5]]) + np.float32(1e4)  # float32 sums would lose the small differences
    mean, covariance = moments(features)
    assert np.allclose(mean, [10003, 10003], atol=1e-9)
    assert np.allclose(covariance, [[4, 3], [3, 3]], atol=1e-9)


# Precision, recall, density, coverage


def brute_prdc(real: np.ndarray, fake: np.ndarray, k: int) -> tuple[float, ...]:
    def radius(x, i):
        return sorted(np.linalg.norm(x[i] - x[j]) for j in range(len(x)) if j != i)[k - 1]

    inside_real = [[np.linalg.norm(r - f) < radius(real, i) for f in fake] for i, r in enumerate(real)]
    inside_fake = [[np.linalg.norm(r - f) < radius(fake, j) for j, f in enumerate(fake)] for r in real]
    balls = np.array(inside_real)
    return balls.any(0).mean(), np.array(inside_fake).any(1).mean(), balls.sum() / k / len(fake), balls.any(1).mean()


@pytest.mark.parametrize("rows", [1000, 7])
def test_prdc_equals_brute_force_in_one_piece_and_in_many(monkeypatch, rows):
    monkeypatch.setattr(prdc, "ROWS", rows)
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(40, 3)), 0.7 * rng.normal(size=(30, 3)) + 0.8
    assert prdc.prdc(a, b, k=3) == pytest.approx(brute_prdc(a, b, 3), rel=1e-12)


def test_prdc_of_identical_far_and_half_covered_sets():
    a = np.random.default_rng(1).normal(size=(200, 4))
    assert prdc.prdc(a, a, k=5) == pytest.approx((1, 1, 1, 1), abs=2e-3)
    assert prdc.prdc(a, a + 100, k=5) == (0, 0, 0, 0)
    two = np.concatenate([a, a + 100])
    assert prdc.prdc(two, a, k=5) == pytest.approx((1, 0.5, 1, 0.5), abs=2e-3)
    with pytest.raises(ValueError, match="more than 5"):
        prdc.prdc(a, a[:5], k=5)


# Kernel distance


def test_kernel_distance_is_the_unbiased_estimate_of_the_whole_set_when_one_subset_holds_it():
    rng = np.random.default_rng(0)
    real, fake = rng.normal(size=(50, 8)), rng.normal(size=(50, 8)) + 0.5
    k = lambda x, y: (x @ y / 8 + 1) ** 3
    within = sum(k(x, y) for z in (real, fake) for i, x in enumerate(z) for j, y in enumerate(z) if i != j) / (50 * 49)
    between = np.mean([[k(x, y) for y in fake] for x in real])
    expected = within - 2 * between
    assert kernel_distance(real, fake) == pytest.approx(expected, rel=1e-9)
    assert clean_fid.kernel_distance(real, fake) == pytest.approx(expected, rel=1e-9)


def test_kernel_distance_of_subsets_is_near_clean_fids_and_repeatable(monkeypatch):
    monkeypatch.setattr(kid, "SUBSET_IMAGES", 100)
    rng = np.random.default_rng(1)
    real, fake = rng.normal(size=(300, 4)), rng.normal(size=(200, 4)) + 1
    assert kernel_distance(real, fake) == kernel_distance(real, fake)
    np.random.seed(0)
    assert kernel_distance(real, fake) == pytest.approx(
        clean_fid.kernel_distance(real, fake, max_subset_size=100), rel=0.05
    )


# Inception


class Layers(nn.Module):
    """The mean of each third of 2048 features is the mean of one colour."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.mean([2, 3]).repeat_interleave(683, 1)[:, :2048]


class Tiny(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = Layers()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("inception") / "some-network.pt"
    torch.jit.script(Tiny()).save(str(path))
    return path


def flat(levels: list[int]) -> torch.Tensor:
    return torch.tensor(levels, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 1, 28, 28).contiguous()


def test_inception_sees_grey_images_resized_and_centred_as_clean_fid_does(tiny):
    features = Inception(tiny, batch=2)(flat([0, 128, 192])).features
    assert features.shape == (3, 2048)
    assert np.allclose(features, np.array([[-1], [0], [0.5]]), atol=1e-6)
    colour = torch.zeros(1, 3, 40, 32, dtype=torch.uint8)
    colour[:, 1] = 255
    assert np.allclose(Inception(tiny)(colour).features[0, [0, 700, 2047]], [-1, 127 / 128, -1], atol=1e-6)


def test_fid_and_kid_from_the_weights_file_to_the_score(tiny, tmp_path, monkeypatch):
    """A flat image has 2048 equal features, so that fid is 2048 times the distance in one of them."""
    monkeypatch.setattr(inception, "SHA256", sha256_of(tiny))
    levels, others = [64, 128, 192], [96, 128, 160]
    network = Inception(tiny)
    save_reference(tmp_path / "real.npz", "flat", network(flat(levels)), network)
    metrics = build(["kid", "fid"], inception=str(tiny), inception_reference=str(tmp_path / "real.npz"))
    kernel, fid = evaluate(metrics, samples_of(flat(others)))
    x, y = (np.array(v) / 128 - 1 for v in (levels, others))
    assert (fid.name, kernel.name, fid.extractor) == ("fid", "kid", sha256_of(tiny))
    assert fid.value == pytest.approx(2048 * (x.std(ddof=1) - y.std(ddof=1)) ** 2, rel=1e-4)
    assert kernel.value == pytest.approx(kernel_distance(x[:, None], y[:, None]), rel=1e-6)


def test_scores_of_other_weights_are_not_called_fid(tiny, tmp_path):
    network = Inception(tiny)
    reference = save_reference(tmp_path / "real.npz", "flat", network(flat([1, 2])), network)
    assert Frechet(network, reference).name == f"fd_inception-{sha256_of(tiny)[:8]}"
    assert Kernel(network, reference).name == f"kd_inception-{sha256_of(tiny)[:8]}"
    with pytest.raises(ValueError, match=f"sha256 {sha256_of(tiny)[:12]}.*not called fid"):
        build(["fid"], inception=str(tiny), inception_reference=str(tmp_path / "real.npz"))


def test_missing_inception_names_the_file_the_places_and_the_alternatives(tmp_path, monkeypatch):
    from cleanfid import downloads_helper

    def offline(folder):
        raise URLError("no network")

    monkeypatch.setattr(downloads_helper, "check_download_inception", offline)
    monkeypatch.setattr(inception, "folders", lambda: (tmp_path / "cache", tmp_path / "tmp"))
    with pytest.raises(FileNotFoundError) as error:
        build(["fid"])
    for part in (
        "inception-2015-12-05.pt",
        str(tmp_path / "cache"),
        "https://",
        "inception=<path>",
        "fd_",
        "no network",
    ):
        assert part in str(error.value)
    assert list((tmp_path / "cache").iterdir()) == []
    with pytest.raises(FileNotFoundError, match="nowhere.pt"):
        build(["kid"], inception=str(tmp_path / "nowhere.pt"))


def test_a_download_that_is_not_inception_is_refused_and_not_kept(tmp_path, monkeypatch):
    from cleanfid import downloads_helper

    def page(folder):
        (Path(folder) / inception.FILE).write_text("<html>try later</html>")
        return str(Path(folder) / inception.FILE)

    monkeypatch.setattr(downloads_helper, "check_download_inception", page)
    monkeypatch.setattr(inception, "folders", lambda: (tmp_path / "cache", tmp_path / "tmp"))
    with pytest.raises(ValueError, match=inception.SHA256):
        build(["fid"])
    assert list((tmp_path / "cache").iterdir()) == []


def test_inception_refuses_a_file_that_is_no_network(tmp_path):
    (tmp_path / "x.pt").write_text("text")
    with pytest.raises(ValueError, match="x.pt.*not a TorchScript"):
        Inception(tmp_path / "x.pt")


# The small network


def test_feature_net_has_the_parameters_of_its_recipe():
    convolutions = 9 * (1 * 32 + 32 * 64 + 64 * 64 + 64 * 128 + 128 * 128)
    norms, classifier = 2 * (32 + 64 + 64 + 128 + 128), 128 * 10 + 10
    assert sum(p.numel() for p in FeatureNet(10, 1).parameters()) == convolutions + norms + classifier == 278_890


def toy_batches(seed: int):
    """Dark and bright noise: class 1 is brighter by half the range."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        labels = torch.randint(0, 2, (32,), generator=generator)
        yield (torch.rand(32, 1, 8, 8, generator=generator) - 1 + labels.view(-1, 1, 1, 1)), labels


@pytest.mark.parametrize("network", NETWORKS)
def test_training_learns_is_repeatable_and_leaves_the_random_state_alone(network):
    state, options = torch.random.get_rng_state(), {"classes": 2, "channels": 1, "network": network}
    nets = [train_features(toy_batches(0), 20, seed=seed, **options) for seed in (1, 1, 2)]
    assert torch.equal(torch.random.get_rng_state(), state)
    weights = [torch.cat([p.flatten() for p in net.parameters()]) for net in nets]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])
    images, labels = next(toy_batches(7))
    outputs = SmallNetwork(nets[0], Info("toy", 2, 1, 8, network=network), "")(to_uint8(images))
    assert (outputs.logits.argmax(1) == labels.numpy()).all()
    with pytest.raises(ValueError, match="classes: 0"):
        train_features(toy_batches(0), 1, classes=0, channels=1)


@pytest.mark.parametrize("network", NETWORKS)
def test_a_saved_network_gives_the_same_features_in_any_batch_and_its_hash_is_the_files(tmp_path, network):
    torch.manual_seed(0)
    net, info = NETWORKS[network](3, 1).eval(), Info("toy", 3, 1, 28, "noise", 0.5, network)
    save_features(tmp_path / "f.safetensors", net, info)
    opened = open_features(tmp_path / "f.safetensors", batch=7)
    assert (opened.info, opened.hash, opened.name) == (info, sha256_of(tmp_path / "f.safetensors"), "toy")
    images = noise(20)
    with torch.no_grad():
        features, logits = net(images / 127.5 - 1)
    outputs = opened(images)
    assert np.allclose(outputs.features, features.numpy(), atol=1e-5)
    assert np.allclose(outputs.logits, logits.numpy(), atol=1e-5)
    maps = FeatureMaps(opened)(images[:2] / 127.5 - 1)
    assert [m.shape[-1] for m in maps] == ([28, 14, 7] if network == "plain" else [14, 7, 7])
    assert np.allclose(maps[-1].mean((2, 3)).numpy(), outputs.features[:2], atol=1e-5)


def test_open_features_says_what_is_wrong_with_a_file(tmp_path):
    path = tmp_path / "f.safetensors"
    with pytest.raises(FileNotFoundError, match="jobs/features.py"):
        open_features(path)
    path.write_bytes(b"not tensors")
    with pytest.raises(ValueError, match="not a safetensors file"):
        open_features(path)
    save_features(path, FeatureNet(3, 1), Info("toy", 3, 1, 28))
    weights = load_file(path)
    save_file(weights, path)
    with pytest.raises(ValueError, match="'info' metadata"):
        open_features(path)
    info = json.dumps({"name": "toy", "classes": 4, "channels": 1, "size": 28})
    weights["extra"] = weights.pop("body.0.0.weight")
    save_file(weights, path, metadata={"info": info})
    with pytest.raises(ValueError) as error:
        open_features(path)
    for part in ("body.0.0.weight missing", "extra unknown", "classifier.weight (3, 128) instead of (4, 128)"):
        assert part in str(error.value)
    save_file(weights, path, metadata={"info": info.replace("}", ', "network": "vast"}')})
    with pytest.raises(ValueError, match="network: 'vast' is not one of plain, residual"):
        open_features(path)


@pytest.mark.parametrize("name", ["inception", "inception_v3", "two arguments", ""])
def test_a_network_cannot_take_a_name_it_has_not_earned(name):
    with pytest.raises(ValueError, match="name:"):
        Info(name, 10, 1, 28)


def test_small_network_refuses_images_of_another_kind():
    extractor = SmallNetwork(FeatureNet(3, 1), Info("toy", 3, 1, 28), "")
    for images in (noise(2).float(), noise(2)[:, :, :20], noise(2).expand(-1, 3, -1, -1)):
        with pytest.raises(ValueError, match=r"takes uint8 images of shape \(1, 28, 28\)"):
            extractor(images)


# References


def test_a_reference_is_read_as_it_was_written_and_only_for_its_own_network(tmp_path):
    extractor, images = Pixels(), noise(50)
    labels = np.arange(50) % 2
    outputs = extractor(images)
    reference = save_reference(tmp_path / "r.npz", "50 noise", outputs, extractor, labels)
    assert (reference.name, reference.images, reference.hash) == ("50 noise", 50, sha256_of(tmp_path / "r.npz"))
    assert np.allclose(reference.covariance, np.cov(outputs.features.T.astype(np.float64)))
    assert np.allclose(reference.features, outputs.features)
    within = [outputs.features[labels == c].var(0, ddof=1).sum() for c in (0, 1)]
    assert np.allclose(reference.variances, within, rtol=1e-6)
    other = Pixels()
    other.hash = "0" * 64
    for metric in (Frechet, Kernel, Diversity, lambda e, r: Neighbours("recall", e, r)):
        with pytest.raises(ValueError, match="made with extractor ffffffffffff, not with 'pixels'"):
            metric(other, reference)


def test_open_reference_says_what_is_wrong_with_a_file(tmp_path):
    path = tmp_path / "r.npz"
    with pytest.raises(FileNotFoundError, match="jobs/features.py"):
        open_reference(path)
    for write in (
        lambda: path.write_text("x"),
        lambda: np.savez(path, mean=np.zeros(3)),
        lambda: np.savez(path, mean=np.array([{}], dtype=object)),
    ):
        write()
        with pytest.raises(ValueError, match="r.npz.*does not hold reference statistics"):
            open_reference(path)


# Samples and scores


def test_samples_refuse_what_is_not_images_with_labels():
    with pytest.raises(ValueError, match="samples.images: torch.float32"):
        samples_of(noise(3).float())
    with pytest.raises(ValueError, match=r"samples.labels: torch.int64 \(2,\)"):
        samples_of(noise(3), torch.zeros(2, dtype=torch.int64))


def test_scores_compare_by_value_and_refuse_unlike_measurements():
    a = Score("fd_x", 1.5, 100, "one step", 1, "a" * 64, "b" * 64, 60000, "last", 2.0)
    b = replace(a, value=2.0, sampler="two steps", calls=2)
    assert compare(a, b) == -0.5 and a < b and b > a and min(b, a) is a
    for change, text in (
        ({"images": 50}, r"images \(100 and 50\)"),
        ({"reference": "c" * 64}, "reference"),
        ({"extractor": "c" * 64}, "extractor"),
        ({"name": "fid"}, r"name \(fd_x and fid\)"),
    ):
        with pytest.raises(ValueError, match=text):
            _ = a < replace(b, **change)
    best = str(replace(a, checkpoint="best of 12"))
    assert "1.5" in best and "100 images" in best and "best of 12" in best
    assert json.loads(json.dumps(a.to_dict()))["value"] == 1.5


class Gaussian(toy.Mixture):
    """A teacher of one Gaussian, whose map from noise to the end of the trajectory is known."""

    codec = None

    def __init__(self):
        super().__init__([[0.3, -0.2]], 0.25)

    pictures = staticmethod(lambda x0: x0)
    picture_shape = property(lambda self: self.shape)


def test_the_map_error_of_the_exact_map_is_nothing_and_of_the_teachers_own_steps_one():
    teacher, exact, opened = Gaussian(), toy.ExactMap([0.3, -0.2], 0.25), []
    for name in ("shape", "conditions", "pictures", "picture_shape"):
        setattr(exact, name, getattr(teacher, name))
    measure = find_metric("map_error")(name="map_error").build(Files(open_teacher=lambda: opened.append(1) or teacher))
    assert not opened  # a check before a run reads no weights

    def map_error(net, *shares: float, shift: float = 0.0) -> Score:
        calls = [replace(call, then="step") for call in calls_at(EDM(), shares, on_ramp=True)]
        sampler = replace(few_step_sampler({"student": net}, calls), pictures=lambda x0: x0 + shift)
        return measure(make_samples(sampler, 250, batch=50))

    result = map_error(exact, 1.0)
    assert result.value < 0.02 and (result.images, result.reference_images) == (100, 100)
    one, four = map_error(teacher, 1.0), map_error(teacher, 1.0, 0.75, 0.5, 0.25)
    assert (one.value, four.value) == (1.0, 1.0) and one.reference == result.reference and len(opened) == 1
    # one call of the teacher gives its mean, so that the error is over the data's deviation
    assert map_error(exact, 1.0, shift=0.1).value == pytest.approx(0.1 / 0.25, rel=0.1)


def test_a_map_error_needs_the_teacher_and_says_that_a_loss_had_it():
    with pytest.raises(ValueError, match="map_error needs the teacher, and only a run's recipe says which"):
        build(["map_error"])
    recipe = load_recipe(["evaluate.metrics=[map_error]"], RECIPES, "fashion_mnist")
    assert recipe.seen_by_loss == ["map_error"]
    check_samples(make_metrics(recipe), (1, 28, 28), 10, 20)


def test_features_are_computed_once_for_all_metrics(tmp_path):
    extractor, images = Pixels(), noise(60)
    labels = torch.arange(60) % 2
    reference = save_reference(tmp_path / "r.npz", "noise", extractor(noise(60, 1)), extractor, labels.numpy())
    extractor.calls = 0
    metrics = [Frechet(extractor, reference), Diversity(extractor, reference), Kernel(extractor, reference)]
    metrics += [Neighbours(name, extractor, reference) for name in prdc.PRDC._fields]
    samples = samples_of(images, labels)
    first = evaluate(metrics, samples)
    assert extractor.calls == 1
    evaluate(metrics, samples_of(images, labels))
    assert extractor.calls == 2
    alone = prdc.prdc(reference.features, extractor(images).features)
    assert [s.value for s in first[3:]] == list(alone)


def test_diversity_is_the_ratio_of_within_class_variances(tmp_path):
    extractor = Pixels(width=1)
    real = torch.tensor([0, 2, 10, 14] * 2, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 1, 28, 28)
    labels = torch.tensor([0, 0, 1, 1] * 2)
    reference = save_reference(tmp_path / "r.npz", "levels", extractor(real), extractor, labels.numpy())
    metric = Diversity(extractor, reference)
    assert metric(samples_of(real, labels)).value == pytest.approx(1)
    assert metric(samples_of(real // 2, labels)).value == pytest.approx(0.25)
    assert metric(samples_of(real[:2].repeat(4, 1, 1, 1), torch.zeros(8, dtype=torch.int64))).value == pytest.approx(
        (8 / 7) / (4 / 3)
    )
    with pytest.raises(ValueError, match=r"classes \[1\] have a single image"):
        metric(samples_of(real[:3], labels[:3]))
    with pytest.raises(ValueError, match="needs the class asked for"):
        metric(samples_of(real))
    with pytest.raises(ValueError, match=r"0\.\.5; the extractor knows the classes 0\.\.1"):
        metric(samples_of(real, labels * 5))


# Names


def test_build_metrics_keeps_the_order_and_names_the_nearest_of_an_unknown():
    samples = samples_of(noise(40), torch.arange(40) % 10)
    assert [s.name for s in evaluate(build(ALL[::-1], FEATURES, STATISTICS), samples)] == list(ALL[::-1])
    with pytest.raises(ValueError, match="no metric 'recal'; did you mean 'recall'"):
        build(["recal"])
    with pytest.raises(ValueError, match="no metric 'fd_fashoin'; did you mean 'fd_fashion'"):
        build(["fd_fashoin", "recall"], FEATURES, STATISTICS)
    with pytest.raises(ValueError, match="features: precision needs this file"):
        build(["precision"])
    with pytest.raises(ValueError, match="reference: diversity needs this file"):
        build(["diversity"], FEATURES)


def test_a_name_belongs_to_one_metric_and_says_which_direction_is_better():
    result = {name: better(name) for name in (*ALL, "fid", "kid", "fd_cifar10", "loss")}
    assert [name for name, which in result.items() if which == "lower"] == ["fd_fashion", "fid", "kid", "fd_cifar10"]
    assert result["loss"] is None and find_metric("fd_cifar10") is find_metric("fd_fashion")
    with pytest.raises(TypeError, match="Second: Shares already has the name 'recall'"):
        type("Second", (Metric,), {"__module__": __name__, "names": ("recall",), "better": "lower"})


# A metric of one's own


def read_limit(path: Path, device: object) -> int:
    """The content of the file of the metric below."""
    if not path.is_file():
        raise FileNotFoundError(f"threshold: no file {str(path)!r}")
    return int(path.read_text())


@pytest.fixture
def bright():
    """A metric as a person would add it: one class. It is taken out of the registry afterwards."""

    class Bright(Metric):
        """Share of the pixels above a threshold."""

        names = ("bright",)
        better = "higher"

        threshold: Annotated[str | None, File(open=read_limit, remedy="write a number into it")] = None
        """File with the threshold."""

        def build(self, files: Files) -> Measure:
            limit = files.open(self, "threshold")

            def measure(samples: Samples) -> Score:
                return score("bright", (samples.images > limit).float().mean().item(), samples)

            return measure

    yield Bright
    del METRICS["bright"]


def test_a_metric_of_one_class_serves_recipe_score_comparison_and_sweep(bright, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "limit").write_text("127")
    arguments = [
        "evaluate.metrics=[bright]",
        "evaluate.settings.bright.threshold=limit",
        "evaluate.every_images=1600",
        f"out={tmp_path / 'runs'}",
        "train.keep_best=1",
        "train.keep_best_by=bright",
        "train.keep_best_mode=max",
    ]
    recipe = localized(load_recipe([*arguments, "train.save_every=50", "train.batch=32"], RECIPES, "fashion_mnist"))
    assert recipe.evaluate.settings == {"bright": {"threshold": str(tmp_path / "limit")}}
    check_run(recipe)

    metrics = make_metrics(recipe)
    dark, light = (evaluate(metrics, samples_of(flat([level, 255])))[0] for level in (0, 200))
    assert (dark.name, dark.value, light.value) == ("bright", 0.5, 1.0)

    runs = [Record(None, "0", {"a": str(i)}, [], {}, [s.to_dict() | {"step": 4}], {}, None)
            for i, s in enumerate((dark, light))]  # fmt: skip
    table = compare_runs(runs, [[0], [1]])
    assert [column["better"] for column in table["columns"]] == ["higher"]
    assert [row["cells"][0].get("mark") for row in table["rows"]] == [None, "best"]

    (tmp_path / "mine.py").write_text(
        "from fewstep.sweeps.space import *\nMETRIC = 'bright'\nSPACE = {'method.gan_weight': choice(0, 1e-3)}"
    )
    space = load_space(str(tmp_path / "mine.py"), tmp_path)
    check_sweep(Sweep(space="mine"), space, recipe)
    scored = [[{"images": 8, "step": 4, "scores": {s.name: s.value}}] for s in (light, dark)]
    trials = [Trial(i, v, 0, "search", f"s-{i}", 0.0, scored[i], FINISHED) for i, v in enumerate(space.grid())]
    assert judge(trials, space.metric, space.mode, str).best.values == {"method.gan_weight": 0}

    assert check_files(recipe) == [Check("weights settings.bright.threshold", "ok", str(tmp_path / "limit"))]
    (tmp_path / "limit").unlink()
    (lost,) = check_files(recipe)
    assert (lost.status, lost.result) == ("broken", f"threshold: no file {str(tmp_path / 'limit')!r}")
    assert lost.remedy == "name it with evaluate.settings.bright.threshold=<path>; write a number into it"


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["evaluate.metrics=[recal]"], "evaluate.metrics: no metric 'recal'; did you mean 'recall'?"),
        (["evaluate.settings.recall.k=3"], "evaluate.settings.recall: no such metric in metrics; valid: fd_fashion"),
        (
            ["evaluate.metrics=[bright]", "evaluate.settings.bright.treshold=x"],
            "evaluate.settings.bright.treshold: no such key; did you mean 'threshold'?",
        ),
        (
            ["evaluate.metrics=[bright]", "evaluate.settings.bright.threshold=3"],
            "evaluate.settings.bright.threshold: expected text, got 3",
        ),
        (
            ["train.keep_best=1", "train.keep_best_by=diversity", "evaluate.every_images=16000"],
            "train.keep_best_mode: 'min', but the higher diversity is the better; give max",
        ),
    ],
)
def test_a_setting_of_a_metric_that_does_not_fit_is_named(bright, arguments, text):
    with pytest.raises(ConfigError) as error:
        load_recipe(arguments, RECIPES, "fashion_mnist")
    assert [line for line in str(error.value).splitlines() if line.startswith(text)]


def test_a_direction_is_the_metrics_and_no_space_turns_it_round(tmp_path):
    text = "from fewstep.sweeps.space import *\nSPACE = {'method.gan_weight': choice(0, 1)}\n"
    (tmp_path / "mine.py").write_text(text + "METRIC = 'diversity'\nOBJECTIVES = ['diversity', 'hours']")
    space = load_space(str(tmp_path / "mine.py"), tmp_path)
    assert (space.mode, space.objectives) == ("max", {"diversity": "max", "hours": "min"})
    for more, message in (
        ("METRIC, MODE = 'diversity', 'min'", "MODE: 'min', but a higher diversity is better; leave it out"),
        ("METRIC = 'mine'", "MODE: None is not one of min, max"),
        ("METRIC = 'fid'\nOBJECTIVES = {'fid': 'max'}", r"OBJECTIVES\['fid'\]: 'max', but a lower fid"),
        ("METRIC = 'fid'\nOBJECTIVES = []", "OBJECTIVES: expected a list of metrics"),
    ):
        (tmp_path / "mine.py").write_text(text + more)
        with pytest.raises(ConfigError, match=message):
            load_space(str(tmp_path / "mine.py"), tmp_path)


# Scores by a network that a loss used


@pytest.fixture
def seeing(tmp_path) -> Recipe:
    """A recipe whose teacher's folder holds the features that its scores are measured with, under another name."""
    shutil.copytree(resolve("shipped:fashion_mnist/teacher"), tmp_path / "teacher")
    shutil.copy(resolve(FEATURES), tmp_path / "teacher" / "head.safetensors")
    arguments = [f"teacher={tmp_path / 'teacher'}", f"out={tmp_path / 'runs'}", "train.keep_best=1"]
    best = ["train.keep_best_by=fd_fashion", "evaluate.every_images=9600"]
    return load_recipe([*arguments, *best], RECIPES, "fashion_mnist")


def test_a_network_that_a_loss_used_is_known_by_its_bytes(seeing, tmp_path):
    plain = load_recipe([], RECIPES, "fashion_mnist")
    assert plain.seen_by_loss == [] and seeing.seen_by_loss == ["fd_fashion", "class_consistency", "diversity"]
    samples = samples_of(noise(40), torch.arange(40) % 10)
    flags = [{s.name: s.seen_by_loss for s in evaluate(make_metrics(one), samples)} for one in (plain, seeing)]
    assert flags == [dict.fromkeys(seeing.evaluate.metrics, seen) for seen in (False, True)]
    assert [s.seen_by_loss for s in evaluate(build(ALL, FEATURES, STATISTICS), samples)] == [None] * len(ALL)

    same_size = bytearray((tmp_path / "teacher" / "head.safetensors").read_bytes())
    same_size[-1] ^= 1
    (tmp_path / "teacher" / "head.safetensors").write_bytes(same_size)
    assert seeing.seen_by_loss == []


def test_nothing_is_ranked_by_a_score_that_a_loss_saw_unless_asked(seeing, tmp_path):
    a = Score("fd_fashion", 1.5, 100, "one step", 1, "a" * 64, "b" * 64, 60000, "last", 2.0, seen_by_loss=True)
    b = replace(a, value=2.0, seen_by_loss=False)
    with pytest.raises(ValueError, match="a loss of the run used the network of fd_fashion"):
        _ = a < b
    assert compare(a, b, rank_seen_by_loss=True) == -0.5 and "seen by a loss" in str(a)

    with pytest.raises(ValueError, match="^train.keep_best_by: a loss of the run used .*rank_seen_by_loss=true"):
        check_run(seeing)
    check_run(apply(seeing, {"evaluate.rank_seen_by_loss": True}))

    text = "from fewstep.sweeps.space import *\nMETRIC = 'fd_fashion'\nSPACE = {'teacher': choice(%r, %r)}"
    other = resolve("shipped:fashion_mnist/teacher")
    (tmp_path / "mine.py").write_text(text % (str(other), str(tmp_path / "teacher")))
    space, plain = load_space(str(tmp_path / "mine.py"), tmp_path), apply(seeing, {"teacher": str(other)})
    assert plain.seen_by_loss == []  # one of the trials would be
    with pytest.raises(ConfigError, match="^METRIC: a loss of the run used the network of fd_fashion"):
        check_sweep(Sweep(space="mine"), space, plain)
    check_sweep(Sweep(space="mine"), space, apply(plain, {"evaluate.rank_seen_by_loss": True}))

    def record(gan: str, score: Score) -> Record:
        return Record(None, "0", {"gan": gan}, [], {}, [score.to_dict() | {"step": 4}], {}, None)

    runs = [record("1", a), record("2", replace(a, value=3.0)), record("3", b), record("4", replace(b, value=3.0))]
    for rank_all, marks in ((False, [None, None, "best", None]), (True, ["best", None, "best", None])):
        table = compare_runs(runs, [[0], [1], [2], [3]], rank_all)
        assert [column["seen_by_loss"] for column in table["columns"]] == [True, False]
        assert [[cell.get("mark") for cell in row["cells"] if cell] for row in table["rows"]] == [[m] for m in marks]


def test_every_table_says_which_scores_a_loss_saw():
    a = Score("fd_x", 1.5, 100, "one step", 1, "a" * 64, "b" * 64, 60000, "last", 2.0, seen_by_loss=True)
    b = replace(a, name="diversity", seen_by_loss=False)
    row = Row.of("student", samples_of(noise(8)), [a, b]).to_dict() | {"who": "student"}
    assert row["seen_by_loss"] == ["fd_x"] and json.loads(json.dumps(row)) == row
    head, line = closing_table([row]).splitlines()
    assert head.split("  ")[-2:] == ["fd_x (n=8, seen by a loss)", "diversity (n=8)"] and len(line.split()) == 7
    card = write_card(Card(name="x", scores=(row,)), [], None, None)
    assert "| fd_x (seen by a loss) | diversity |" in card and "| 1.5 | 1.5 |" in card
    score = {"images": 8, "step": 4, "scores": {"fd_x": 1.5, "diversity": 1.0}, "seen_by_loss": ["fd_x"]}
    space = Space("s", "?", {"a": choice(1, 2)}, "fd_x", "min", {"fd_x": "min"})
    trial = Trial(0, {"a": 1}, 0, "search", "s-0", 0.0, [score], FINISHED)
    text = markdown(space, [trial], {"a": "a"}, list(score["scores"]))
    assert text.startswith("| `a` | fd_x (seen by a loss) | diversity | seeds |")


# Fashion-MNIST


def test_real_images_score_as_real_and_the_score_says_by_what(real):
    images, labels = real
    metrics = build([n for n in ALL if n in ("fd_fashion", "class_consistency", "diversity")], FEATURES, STATISTICS)
    scores = {s.name: s for s in evaluate(metrics, samples_of(images, labels))}
    assert scores["fd_fashion"].value < 0.05
    assert scores["class_consistency"].value > 0.9
    assert 0.9 < scores["diversity"].value < 1.1
    fd = scores["fd_fashion"]
    assert (fd.images, fd.reference_images) == (5000, 60000)
    assert fd.extractor == sha256_of(resolve(FEATURES)) and fd.reference == sha256_of(resolve(STATISTICS))


def test_real_images_are_covered_and_the_four_shares_state_their_counts(real):
    images, labels = real[0][:2000], real[1][:2000]
    precision, recall, density, coverage = evaluate(
        build(prdc.PRDC._fields, FEATURES, STATISTICS), samples_of(images, labels)
    )
    assert (coverage.images, coverage.reference_images) == (2000, 2000)
    # For two sets of one law E[coverage] = 1 - 2^-k for large counts (arXiv:2002.09797, section 3.3).
    assert coverage.value == pytest.approx(1 - 2**-5, abs=0.02)
    assert density.value == pytest.approx(1, abs=0.05)
    assert precision.value > 0.9 and recall.value > 0.9


def test_noise_is_far_and_repeated_means_are_not_diverse(real):
    images, labels = real
    metrics = build(["fd_fashion", "diversity", "coverage"], FEATURES, STATISTICS)
    fd, _, coverage = evaluate(metrics, samples_of(noise(1000), labels[:1000]))
    assert fd.value > 20 and coverage.value < 0.01
    means = torch.stack([images[labels == c].float().mean(0).round().to(torch.uint8) for c in range(10)])
    fd, diversity, _ = evaluate(metrics, samples_of(means.repeat(100, 1, 1, 1), torch.arange(10).repeat(100)))
    assert fd.value > 5 and diversity.value == pytest.approx(0, abs=1e-6)


def test_shipped_network_is_the_one_described():
    extractor, reference = open_features(resolve(FEATURES)), open_reference(resolve(STATISTICS))
    assert extractor.info.test_accuracy > 0.92
    assert (extractor.name, extractor.info.classes, extractor.info.size) == ("fashion", 10, 28)
    assert (reference.images, reference.features.shape, reference.extractor) == (60000, (10_000, 128), extractor.hash)
    assert resolve(STATISTICS).stat().st_size < 2.7e6


def test_the_second_shipped_network_is_of_another_kind_and_sees_real_images_as_real(real):
    place = "shipped:fashion_mnist/residual/{}"
    extractor = open_features(resolve(place.format("features.safetensors")))
    reference = open_reference(resolve(place.format("statistics.npz")))
    assert extractor.info.network == "residual" and extractor.info.test_accuracy > 0.89
    assert (extractor.name, reference.extractor, reference.images) == ("fashion_residual", extractor.hash, 60000)
    assert sum(resolve(place.format(name)).stat().st_size for name in ("features.safetensors", "statistics.npz")) < 8e5
    files = {"features": place.format("features.safetensors"), "reference": place.format("statistics.npz")}
    name = "fd_fashion_residual"
    own = build([name], settings={name: files})
    (near,), (far,) = evaluate(own, samples_of(*real)), evaluate(own, samples_of(noise(500), torch.arange(500) % 10))
    assert near.name == name and 100 * near.value < far.value


# The job


def shards(folder: Path, images: int, seed: int) -> Path:
    rng = np.random.default_rng(seed)
    with ShardWriter(folder, size=(1, 8, 8), classes=2) as writer:
        for i in range(images):
            writer.add(rng.integers(0, 128, (1, 8, 8)).astype(np.uint8) + np.uint8(127 * (i % 2)), label=i % 2)
    return folder


def run_job(monkeypatch, capsys, *arguments: str) -> dict:
    job("features")(arguments)
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_the_job_ends_with_one_line_when_it_cannot_go_on(tmp_path, monkeypatch, capsys):
    def refused(*arguments: str) -> str:
        with pytest.raises(SystemExit) as stop:
            run_job(monkeypatch, capsys, f"out={tmp_path / 'out'}", *arguments)
        assert stop.value.code == 2
        return capsys.readouterr().err

    assert re.match("data.path: no folder .*jobs/prepare.py", refused(f"data={tmp_path / 'nowhere'}"))
    with ShardWriter(tmp_path / "wide", size=(1, 8, 16)) as writer:
        writer.add(np.zeros((1, 8, 16), np.uint8))
    error = refused(f"data={tmp_path / 'wide'}")
    assert "wide: images of shape (1, 8, 16); features need square images" in error
    data = shards(tmp_path / "data", 40, 0)
    error = refused(f"data={data}", f"extractor={tmp_path / 'gone.safetensors'}")
    assert re.match("features: no file.*gone.safetensors", error)


def test_the_job_trains_describes_and_describes_again(tmp_path, monkeypatch, capsys):
    data, test = shards(tmp_path / "data", 600, 0), shards(tmp_path / "test", 200, 1)
    arguments = (f"data={data}", f"test={test}", "name=toy")
    report = run_job(monkeypatch, capsys, *arguments, f"out={tmp_path / 'out'}", "epochs=4")
    assert report["accuracy"] == 1 and report["images"] == 600 and report["test_images"] == 200
    reference = open_reference(tmp_path / "out" / "statistics.npz")
    extractor = open_features(tmp_path / "out" / "features.safetensors")
    assert (report["extractor"], report["reference"]) == (extractor.hash, reference.hash)
    with open_feed(test) as feed:
        mean, covariance = moments(extractor(to_uint8(next(feed.batches(0, 200))["real"])).features)
    floor = frechet_distance(mean, covariance, reference.mean, reference.covariance)
    assert report["floor"] == pytest.approx(floor, rel=1e-5)
    again = run_job(
        monkeypatch,
        capsys,
        *arguments,
        f"out={tmp_path / 'again'}",
        f"extractor={tmp_path / 'out' / 'features.safetensors'}",
    )
    assert again["reference"] == report["reference"] and not (tmp_path / "again" / "features.safetensors").exists()
