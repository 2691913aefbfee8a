"""Distances of known Gaussians and of collapsed samples against their true values, and records of evaluations that differ."""

import math
from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
import torch
from sklearn.metrics.pairwise import polynomial_kernel
from stripes import CLASSES, stripe_pixels, stripes

from latentdiff.data.datasets import ImageDataset
from latentdiff.data.sources import ArraySource
from latentdiff.data.transforms import Preprocess
from latentdiff.errors import UserError
from latentdiff.evaluation import feature_metrics, kid
from latentdiff.evaluation.frechet import frechet
from latentdiff.evaluation.metrics import evaluate_samples
from latentdiff.evaluation.precision_recall import precision_recall
from latentdiff.evaluation.records import EVALUATE_PROTOCOL, check_comparable, compare_records, make_record, write_record
from latentdiff.models.feature_net import FeatureNet, load_features

NET = "[stripes-net]"
MODES, WIDE = 8, 12.0  # modes of unit variance in 3 dimensions, and how far from each other they lie


def normal(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# known Gaussians


def raw_moments(mean: torch.Tensor, covariance: torch.Tensor) -> list[torch.Tensor]:
    """E[x], E[x x^T] and E[x x x] of a Gaussian (Isserlis)."""
    crossed = torch.einsum("ij,k->ijk", covariance, mean)
    third = torch.einsum("i,j,k->ijk", mean, mean, mean) + crossed + crossed.permute(0, 2, 1) + crossed.permute(2, 0, 1)
    return [mean, covariance + torch.outer(mean, mean), third]


def true_mmd(*gaussians: tuple[torch.Tensor, torch.Tensor]) -> float:
    """MMD^2 of two Gaussians under the kernel (x.y / D + 1)^3: an inner product of the first three moments."""
    p, q = (raw_moments(*each) for each in gaussians)
    d = len(gaussians[0][0])
    weights = [3 / d, 3 / d**2, 1 / d**3]
    return sum(float(w * (a - b).square().sum()) for w, a, b in zip(weights, p, q, strict=True))


def gaussians() -> tuple[tuple[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]:
    """(mean, covariance) of two in 4 dimensions whose covariances do not commute."""
    mixing = torch.eye(4, dtype=torch.float64) + 0.3 * normal(4, 4, seed=5)
    scales = torch.tensor([0.5, 1.0, 1.5, 2.0], dtype=torch.float64)
    mean = torch.tensor([0.3, -0.2, 0.0, 0.1], dtype=torch.float64)
    return (torch.zeros(4, dtype=torch.float64), torch.diag(scales)), (mean, mixing @ mixing.T)


def drawn(gaussian: tuple[torch.Tensor, torch.Tensor], count: int, seed: int) -> torch.Tensor:
    mean, covariance = gaussian
    return normal(count, len(mean), seed=seed) @ torch.linalg.cholesky(covariance).T + mean


def test_kernel_distance_of_known_gaussians_is_its_true_value_on_average():
    p, q = gaussians()
    truth = true_mmd(p, q)
    result = [kid.squared_mmd(drawn(p, 300, 2 * seed), drawn(q, 200, 2 * seed + 1)) for seed in range(60)]
    error = float(np.std(result, ddof=1)) / math.sqrt(60)
    assert abs(np.mean(result) - truth) < 3 * error < 0.3 * truth


def test_squared_mmd_is_that_of_scikit_learns_kernel():
    p, q = gaussians()
    x, y = drawn(p, 90, 1).numpy(), drawn(q, 70, 2).numpy()
    kernel = partial(polynomial_kernel, degree=3, gamma=1 / 4, coef0=1)
    within = [(k.sum() - np.trace(k)) / (len(k) * (len(k) - 1)) for k in (kernel(x), kernel(y))]
    expected = within[0] + within[1] - 2 * kernel(x, y).mean()
    assert kid.squared_mmd(torch.from_numpy(x), torch.from_numpy(y)) == pytest.approx(expected, rel=1e-6)


def test_subsets_of_the_kernel_distance_meet_every_row_and_average_to_the_whole():
    p, q = gaussians()
    x, y = drawn(p, 400, 1), drawn(q, 400, 2)
    whole = kid.squared_mmd(x, y)
    mean, spread = kid.kernel_distance(x, y, subsets=200, size=100)
    assert abs(mean - whole) < 4 * spread / math.sqrt(200) < 0.4 * whole
    assert kid.kernel_distance(x, y, subsets=1) == (pytest.approx(whole, rel=1e-9), 0.0)  # one subset, of everything


# collapse


def mixture(modes: int, count: int, seed: int) -> torch.Tensor:
    """Rows [count, 3] of the first `modes` of the corners of a cube, as many of each."""
    corners = WIDE * torch.tensor([[k & 1, k >> 1 & 1, k >> 2 & 1] for k in range(MODES)], dtype=torch.float64)
    return corners[torch.arange(count) % modes] + normal(count, 3, seed=seed)


@pytest.mark.parametrize("modes", [1, 2, 4])
def test_collapse_to_some_modes_costs_recall_alone_and_as_far_as_is_known(modes):
    real, samples = mixture(MODES, 1600, 1), mixture(modes, 800, 2)
    result = precision_recall(real, samples)
    assert result.precision > 0.95 and result.density > 0.9
    assert result.recall == pytest.approx(modes / MODES, abs=0.05) and result.coverage <= result.recall + 0.05
    # Of the mixtures' moments: along an axis with both ends variance 1 + 12^2 / 4 about 6, with one end 1 about 0
    lost = 3 - int(math.log2(modes))
    both = 1 + WIDE**2 / 4
    truth = lost * ((WIDE / 2) ** 2 + (math.sqrt(both) - 1) ** 2)
    assert frechet(real, samples) == pytest.approx(truth, rel=0.05)
    assert frechet(real, samples) > 100 * frechet(real, mixture(MODES, 800, 3))


def test_collapsed_images_keep_their_precision_and_lose_recall_in_a_report(net):
    pixels, labels = stripe_pixels(120, seed=3)
    one = np.arange(120) % 3
    alike = pixels[one].astype(int) + np.random.default_rng(0).integers(-3, 4, pixels.shape)  # near copies of three images
    values = measure(net, alike.clip(0, 255).astype(np.uint8), labels)["distribution"]
    real = measure(net, pixels, labels)["distribution"]
    assert values["precision" + NET]["value"] > 0.9 and values["precision" + NET]["floor"] > 0.8
    assert values["recall" + NET]["value"] < 0.2 and real["recall" + NET]["value"] > 0.8
    assert values["kid" + NET]["value"] > 3 * real["kid" + NET]["spread"] + real["kid" + NET]["value"]


# what differs is refused by the name of what differs


@pytest.fixture(scope="module")
def net(feature_folder) -> FeatureNet:
    return load_features(feature_folder)


def measure(net, pixels=None, labels=None, train=None, test=None, **options) -> dict:
    pixels, labels = stripe_pixels(30, seed=3) if pixels is None else (pixels, labels)
    return evaluate_samples(
        pixels,
        None if labels is None else labels.numpy(),
        train or stripes(240, 1),
        test or stripes(150, 2),
        net,
        **{"log": lambda line: None, **options},
    )


@pytest.fixture(scope="module")
def base(net) -> dict:
    return make_record(measure(net), {}, {})


def of_size(n: int, seed: int) -> ImageDataset:
    pixels, labels = stripe_pixels(n, seed, 20)
    return ImageDataset(ArraySource("stripes", pixels, labels, CLASSES), Preprocess())


def renamed(net: FeatureNet, feature_folder) -> FeatureNet:
    other = load_features(feature_folder)
    other.name = "another"
    return other


def retrained(net: FeatureNet, feature_folder) -> FeatureNet:
    other = load_features(feature_folder)
    with torch.no_grad():
        next(other.parameters()).mul_(1.01)
    return other


def uneven() -> tuple[np.ndarray, torch.Tensor]:
    """30 samples, 14 of the first class."""
    pixels, labels = stripe_pixels(60, seed=3)
    order = torch.cat([(labels == k).nonzero().flatten()[:count] for k, count in enumerate((14, 8, 8))])
    return pixels[order.numpy()], labels[order]


DIFFERENCES: dict[str, Callable[[FeatureNet], dict]] = {
    "images": lambda net: measure(net, *stripe_pixels(33, seed=3)),
    "seeds": lambda net: measure(net, more=[stripe_pixels(30, seed=4)[0]]),
    "image_size": lambda net: measure(net, *stripe_pixels(30, 3, 20), train=of_size(60, 1), test=of_size(60, 2)),
    "class_counts": lambda net: measure(net, *uneven()),
    "reference_sha256": lambda net: measure(net, train=stripes(240, 9)),
    "held_out_sha256": lambda net: measure(net, test=stripes(150, 9)),
    "draw_seed": lambda net: measure(net, draw_seed=1, test=stripes(30, 2)) | {},
}


@pytest.mark.parametrize("field", DIFFERENCES)
def test_evaluations_that_differ_are_refused_by_the_field(net, base, field):
    other = make_record(DIFFERENCES[field](net), {}, {})
    against = base if field != "draw_seed" else make_record(measure(net, test=stripes(30, 2)), {}, {})
    with pytest.raises(UserError, match=f"compare: {field} is .* in a and .* in b: values of unlike protocols"):
        check_comparable("a", against, "b", other)


@pytest.mark.parametrize(("field", "change"), [("features", renamed), ("features_sha256", retrained)])
def test_another_feature_network_is_refused(net, base, feature_folder, field, change):
    other = make_record(measure(change(net, feature_folder)), {}, {})
    with pytest.raises(UserError, match=f"compare: {field} is .* in a and .* in b"):
        check_comparable("a", base, "b", other)


def test_other_constants_of_the_measures_are_refused_by_their_name(net, base, monkeypatch):
    monkeypatch.setattr(kid, "SUBSETS", 7)
    monkeypatch.setattr(feature_metrics, "SUPPORT_IMAGES", 20)
    other = make_record(measure(net), {}, {})
    with pytest.raises(UserError, match=r"compare: settings\.kernel_subsets is 100 in a and 7 in b"):
        check_comparable("a", base, "b", other)


def test_what_is_being_compared_is_no_part_of_the_protocol(net, base):
    sampling = {"model": "other", "sampler": "heun", "steps": 3, "guidance": 2.0, "seed": 5}
    other = make_record(
        measure(net, stripe_pixels(30, seed=8)[0], stripe_pixels(30)[1], protocol=sampling), {"weights": "x"}, {}
    )
    check_comparable("a", base, "b", other)
    assert base["values"] != other["values"] and not set(sampling) & set(EVALUATE_PROTOCOL)


def test_floors_that_differ_are_all_shown(base, tmp_path):
    names = list(base["values"])
    other = base | {"values": {name: dict(entry) for name, entry in base["values"].items()}}
    other["values"][names[0]]["floor"] = 123.0
    a, b = (write_record(each, tmp_path / name).parent for name, each in (("a", base), ("b", other)))
    lines = [line.split("|") for line in compare_records([a, b]).splitlines() if "|" in line]
    rows = {cells[1].strip(): cells[-2].strip() for cells in lines}
    assert rows[names[0]] == f"{base['values'][names[0]]['floor']:.4f}, 123.0000"
    assert "," not in rows[names[1]]
