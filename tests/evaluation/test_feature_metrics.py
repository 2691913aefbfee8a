"""Kernel distance, neighbours, extrapolation and memorisation against independent references and known truths."""

import math

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm
from scipy.spatial.distance import cdist
from sklearn.neighbors import NearestNeighbors
from stripes import stripe_pixels, stripes
from test_frechet import rows, rows_with

from latentdiff.data.datasets import ImageDataset
from latentdiff.data.sources import ArraySource
from latentdiff.data.transforms import Preprocess
from latentdiff.evaluation import kid, memorization
from latentdiff.evaluation.frechet import Moments, extrapolate_frechet, frechet_distance_to, smallest_sample
from latentdiff.evaluation.precision_recall import nearest_rows, precision_recall


def moments(x: torch.Tensor) -> Moments:
    return Moments(x.shape[1]).update(x)


def normal(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("count", [400, 12])  # 12 rows of 20 features: singular covariances
def test_distance_from_one_reference_is_scipys(count):
    reference, measure = rows(500, 20, 1), frechet_distance_to(moments(rows(500, 20, 1)))
    for seed in (2, 3):
        x = rows(count, 20, seed)
        cx, cy = x.T.cov().numpy(), reference.T.cov().numpy()
        trace = np.trace(cx + cy - 2 * sqrtm(cx @ cy).real)
        assert measure(moments(x)) == pytest.approx((x.mean(0) - reference.mean(0)).square().sum().item() + trace, rel=1e-6)


def test_squared_mmd_is_the_double_loop():
    x, y = rows(7, 3, 1), rows(5, 3, 2)

    def k(a, b):
        return (sum(p * q for p, q in zip(a.tolist(), b.tolist(), strict=True)) / 3 + 1) ** 3

    pairs = [[(s[i], s[j]) for i in range(len(s)) for j in range(len(s)) if i != j] for s in (x, y)]
    within = [sum(k(a, b) for a, b in each) / len(each) for each in pairs]
    across = sum(k(a, b) for a in x for b in y) / 35
    assert kid.squared_mmd(x, y) == pytest.approx(within[0] + within[1] - 2 * across, rel=1e-10)
    with pytest.raises(ValueError, match="at least 2 rows"):
        kid.squared_mmd(x[:1], y)


def test_kernel_distance_has_no_bias_and_sees_a_shift():
    same = [kid.kernel_distance(normal(60, 4, seed=k), normal(60, 4, seed=100 + k), subsets=1)[0] for k in range(60)]
    mean, error = float(np.mean(same)), float(np.std(same)) / math.sqrt(60)
    assert abs(mean) < 3 * error and min(same) < 0
    shifted, spread = kid.kernel_distance(normal(300, 4, seed=1) + 0.7, normal(300, 4, seed=2), subsets=20, size=100)
    assert shifted > 5 * error and 0 < spread < shifted
    assert kid.kernel_distance(normal(300, 4, seed=1), normal(300, 4, seed=2), seed=3) == kid.kernel_distance(
        normal(300, 4, seed=1), normal(300, 4, seed=2), seed=3
    )


def scikit_support(real: np.ndarray, fake: np.ndarray, k: int) -> list[float]:
    """Precision, recall, density, coverage by scikit-learn's neighbours."""
    radius = [NearestNeighbors(n_neighbors=k + 1).fit(x).kneighbors(x)[0][:, k] for x in (real, fake)]
    inside = cdist(real, fake) <= radius[0][:, None]
    result = cdist(real, fake) <= radius[1][None]
    own = NearestNeighbors(n_neighbors=1).fit(fake).kneighbors(real)[0][:, 0] <= radius[0]
    return [inside.any(0).mean(), result.any(1).mean(), inside.sum() / (k * len(fake)), own.mean()]


@pytest.mark.parametrize("block", [1, 17, 5000])
@pytest.mark.parametrize("k", [1, 5])
def test_support_is_scikit_learns_at_any_block_size(k, block):
    real, fake = rows(90, 6, 1) + 1e4, rows(70, 6, 1)[:70] * 0.8 + 1e4 + rows(70, 6, 2) * 0.2
    expected = scikit_support(real.numpy(), fake.numpy(), k)
    assert precision_recall(real, fake, k, block) == pytest.approx(expected, abs=1e-9)
    assert 0.05 < min(expected[:2])  # so that the comparison says something
    with pytest.raises(ValueError, match="70 rows have no 70 neighbours"):
        precision_recall(real, fake, 70)


def test_mode_collapse_keeps_precision_and_loses_recall_and_wide_samples_the_reverse():
    centres = 12 * normal(8, 5, seed=0)
    real, same = (centres[torch.arange(400) % 8] + normal(400, 5, seed=s) for s in (1, 2))
    collapsed = centres[torch.arange(400) % 2] + normal(400, 5, seed=3)
    wide = 12 * normal(400, 5, seed=4)
    whole, few, spread = (precision_recall(real, each) for each in (same, collapsed, wide))
    assert min(whole.precision, whole.recall, whole.coverage) > 0.9 and whole.density == pytest.approx(1, abs=0.15)
    assert few.precision > 0.9 and few.recall < 0.35 and few.coverage < 0.35 and few.density > 0.9
    assert spread.precision < 0.2 and spread.recall > 0.9 and spread.density < 0.1


def test_extrapolation_takes_the_bias_away_and_knows_its_error():
    """Against the closed form for Gaussians, over many draws: at N samples the distance is too large, its limit is not."""
    zero, mean = torch.zeros(4, dtype=torch.float64), torch.tensor([0.2, 0, 0, -0.1], dtype=torch.float64)
    scales = torch.tensor([1.2, 1.0, 0.8, 1.0], dtype=torch.float64)
    reference = moments(rows_with(zero, torch.eye(4, dtype=torch.float64)))
    truth = float(mean.square().sum() + (scales - 1).square().sum())
    at_n, limits, scores = [], [], []
    for seed in range(80):
        x = normal(120, 4, seed=seed) * scales + mean
        result = extrapolate_frechet(x, reference, seed)
        at_n.append(frechet_distance_to(reference)(moments(x)) - truth)
        limits.append(result.value - truth)
        scores.append((result.value - truth) / result.stderr)
    error = np.std(limits) / math.sqrt(80)
    assert result.sizes == (120, 60, 40, 30, 24)
    assert np.mean(at_n) > 3 * np.std(at_n) / math.sqrt(80) and abs(np.mean(limits)) < 2.5 * error
    assert 0.6 < np.std(scores) < 1.5
    assert extrapolate_frechet(x, reference, 1) == extrapolate_frechet(x, reference, 1) != extrapolate_frechet(x, reference, 2)


def test_extrapolation_needs_three_points():
    reference = moments(rows(200, 4))
    assert extrapolate_frechet(rows(smallest_sample(4) - 1, 4), reference) is None
    assert len(extrapolate_frechet(rows(smallest_sample(4), 4), reference).sizes) == 3


@pytest.mark.parametrize("block", [1, 13, 1000])
def test_nearest_is_scipys_at_any_block_size_and_cut_of_the_references(block):
    queries, references = rows(40, 5, 1), rows(90, 5, 1)[torch.randperm(90, generator=torch.Generator().manual_seed(0))]
    expected = cdist(queries.numpy(), references.numpy()).argmin(axis=1)
    assert nearest_rows(queries, references.split(block), block).tolist() == expected.tolist()


def test_cosine_distance_is_torchmetrics():
    from torchmetrics.image.mifid import _compute_cosine_distance

    samples, train = rows(30, 6, 1).abs(), rows(50, 6, 2).abs()  # as after a ReLU: the metric's modulus changes nothing
    peer = _compute_cosine_distance(samples, train, cosine_distance_eps=10.0)
    assert memorization.cosine_distance(samples, train) == pytest.approx(peer.item(), rel=1e-6)


def test_the_penalty_leaves_what_is_far_and_multiplies_what_is_near():
    assert memorization.penalized_distance(2.0, 0.3, 0.3) == memorization.penalized_distance(2.0, 0.9, 0.3) == 2.0
    assert memorization.penalized_distance(2.0, 0.1, 0.3) == pytest.approx(2 * 3 / 1.003)
    assert memorization.penalized_distance(2.0, 0.0, 0.3) == pytest.approx(2000)
    assert memorization.penalized_distance(2.0, 0.0, 0.0) == 2.0


def test_pixel_distances_are_root_mean_squares_over_a_range_of_one():
    train, images = stripes(40, 1), stripes(9, 2)
    near, _ = memorization.nearest_by_pixels(images, stripes(5, 3), train)
    flat = [data.source.images.reshape(len(data), -1) / 255 for data in (images, train)]
    distances = cdist(*flat) / math.sqrt(18 * 18)
    assert near.rows.tolist() == distances.argmin(axis=1).tolist()
    assert near.distances.numpy() == pytest.approx(distances.min(axis=1), rel=1e-5)


def test_large_images_are_compared_by_means_of_squares():
    assert memorization.compared_size(1, 28, 28) == (1, 28, 28) and memorization.compared_size(3, 64, 64) == (2, 32, 32)
    side, height, width = memorization.compared_size(3, 301, 77)
    assert 3 * height * width <= memorization.PIXELS and height == -(-301 // side)
    pixels = np.random.default_rng(0).integers(0, 256, (3, 130, 70, 1), dtype=np.uint8)
    data = ImageDataset(ArraySource("big", pixels, None), Preprocess())
    (flat,) = memorization.pixel_rows(data)
    side, height, width = memorization.compared_size(1, 130, 70)
    assert flat.shape == (3, height * width)
    corner = pixels[:, :side, :side, 0].reshape(3, -1).mean(axis=1) / 127.5 - 1
    assert flat[:, 0].numpy() == pytest.approx(corner, abs=1e-6)


def test_shares_count_the_samples_closer_than_held_out_images():
    held_out = torch.arange(1, 102, dtype=torch.float64)  # percentile p is p + 1
    samples = torch.tensor([0.5, 1.5, 5.5, 30.0, 60.0, 90.0, 95.0, 99.0, 100.0, 200.0], dtype=torch.float64)
    result = memorization.distance_summary(samples, held_out)
    assert [each["share"] for each in result["closer_than_held_out"]] == [0.2, 0.3, 0.4]
    assert [each["distance"] for each in result["closer_than_held_out"]] == pytest.approx([2, 6, 51])
    assert result["median"] == 60.0 and result["held_out_median"] == 51.0


def test_planted_copies_are_the_worst_and_are_named():
    train, held_out = stripes(60, 1), stripes(60, 2)
    pixels, _ = stripe_pixels(60, 3)
    pixels[[4, 7]] = train.source.images[[50, 11]]
    samples = ImageDataset(ArraySource("samples", pixels, None), Preprocess())
    flat = [torch.from_numpy(d.source.images.reshape(60, -1)).double() for d in (samples, held_out, train)]
    by_features = [memorization.nearest_by_features(x, flat[2]) for x in flat[:2]]
    by_pixels = memorization.nearest_by_pixels(samples, held_out, train)
    nearest = [(pair[0], pair[1].distances.median().item()) for pair in (by_features, by_pixels)]
    first, second, third = memorization.closest_samples(*nearest, count=3)
    assert {(e["sample"], e["feature_neighbour"], e["pixel_neighbour"]) for e in (first, second)} == {(4, 50, 50), (7, 11, 11)}
    assert first["feature_distance"] == first["pixel_distance"] == second["pixel_distance"] == 0 < third["pixel_distance"]
    share = memorization.distance_summary(by_pixels[0].distances, by_pixels[1].distances)["closer_than_held_out"][0]
    assert share["percentile"] == 1 and share["share"] >= 2 / 60 > share["held_out"]
