"""Streaming statistics and distances against closed forms and peers."""

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm
from stripes import CLASSES, stripes

from latentdiff.evaluation.classification import cas, label_accuracy
from latentdiff.evaluation.feature_statistics import feature_statistics, read_batches
from latentdiff.evaluation.feature_training import train_features
from latentdiff.evaluation.frechet import Moments, frechet, frechet_distance
from latentdiff.models.feature_net import FeatureNet

WIDTHS = (8, 8, 16)


def rows(n: int, d: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(d, d, generator=generator, dtype=torch.float64)
    return torch.randn(n, d, generator=generator, dtype=torch.float64) @ mixing + torch.randn(d, generator=generator)


def rows_with(mean: torch.Tensor, covariance: torch.Tensor, seed: int = 0) -> torch.Tensor:
    """Rows [500, D] whose mean and unbiased covariance are the given ones exactly."""
    x = torch.randn(500, len(mean), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    x = x - x.mean(0)
    white = torch.linalg.solve_triangular(torch.linalg.cholesky(x.T.cov()), x.T, upper=False)  # [D, 500]
    return (torch.linalg.cholesky(covariance) @ white).T + mean


@pytest.mark.parametrize("cut", [1, 7, 100, 1000])
def test_moments_do_not_depend_on_the_batch_size_even_far_from_zero(cut):
    x = rows(1000, 5) + 1e6
    moments = Moments(5)
    for part in x.split(cut):
        moments.update(part)
    torch.testing.assert_close(moments.mean, x.mean(0), rtol=1e-13, atol=0)
    torch.testing.assert_close(moments.covariance, (x - 1e6).T.cov(), rtol=1e-7, atol=1e-7)


def test_moments_merge_like_one_stream():
    x = rows(30, 4)
    merged = Moments(4).merge(Moments(4)).update(x[:11]).merge(Moments(4).update(x[11:]))
    torch.testing.assert_close(merged.covariance, x.T.cov())
    assert merged.count == 30


def test_moments_refuse_other_shapes_and_too_few_rows():
    with pytest.raises(ValueError, match=r"\[n, 4\].*\[3, 5\]"):
        Moments(4).update(torch.zeros(3, 5))
    with pytest.raises(ValueError, match="2 rows"):
        _ = Moments(4).update(torch.zeros(1, 4)).covariance


def test_distance_of_gaussians_with_diagonal_covariance_is_the_closed_form():
    a, b = torch.tensor([4.0, 9.0, 0.25]).double(), torch.tensor([1.0, 16.0, 4.0]).double()
    mean = torch.tensor([1.0, -2.0, 0.5]).double()
    x, y = rows_with(torch.zeros(3).double(), a.diag(), 1), rows_with(mean, b.diag(), 2)
    expected = mean.square().sum() + (a.sqrt() - b.sqrt()).square().sum()
    assert frechet(x, y) == pytest.approx(expected.item(), rel=1e-10)


def test_distance_with_covariances_that_do_not_commute_matches_scipy():
    x, y = rows(300, 6, 1), rows(200, 6, 2)
    cx, cy = x.T.cov().numpy(), y.T.cov().numpy()
    expected = (x.mean(0) - y.mean(0)).square().sum().item() + np.trace(cx + cy - 2 * sqrtm(cx @ cy).real)
    assert frechet(x, y) == pytest.approx(expected, rel=1e-9) == frechet(y, x)


def test_distance_with_fewer_rows_than_dimensions_is_finite_and_zero_to_itself():
    x = rows(10, 40)
    assert frechet(x, x) == pytest.approx(0, abs=1e-5 * x.T.cov().trace().item())
    shifted = x + 3.0
    assert frechet(x, shifted) == pytest.approx(9 * 40, rel=1e-4)


def test_the_image_path_gives_what_torchmetrics_gives_with_the_same_network():
    from torchmetrics.image.fid import FrechetInceptionDistance

    class Features(torch.nn.Module):
        num_features = WIDTHS[-1]

        def __init__(self, net):
            super().__init__()
            self.net = net

        def forward(self, x):
            return self.net.features(x)

    torch.manual_seed(0)
    net = FeatureNet(1, 3, WIDTHS).eval()
    real, fake = stripes(60), stripes(50, seed=1)
    peer = FrechetInceptionDistance(feature=Features(net))
    peer.update(real.batch(range(60))[0], real=True)
    peer.update(fake.batch(range(50))[0], real=False)
    both = [feature_statistics(net, read_batches(data, 16)).moments for data in (real, fake)]
    assert frechet_distance(*both) == pytest.approx(peer.compute().item(), rel=1e-3, abs=1e-6)


def test_the_hash_follows_pixels_and_labels_and_not_the_batch_size():
    torch.manual_seed(0)
    net = FeatureNet(1, 3, WIDTHS).eval()
    one, two = feature_statistics(net, read_batches(stripes(40), 40)), feature_statistics(net, read_batches(stripes(40), 7))
    assert one.sha256 == two.sha256 != feature_statistics(net, read_batches(stripes(40, seed=1), 40)).sha256
    relabelled = stripes(40)
    relabelled.source.labels[3] = (relabelled.source.labels[3] + 1) % 3
    assert feature_statistics(net, read_batches(relabelled, 40)).sha256 != one.sha256


def quick_trainer(dataset, seed):
    return train_features(dataset, steps=30, batch=24, seed=seed, widths=WIDTHS)


def test_cas_is_near_one_for_real_images_and_low_for_wrong_labels():
    real, test = stripes(90, seed=3), stripes(60, seed=5)
    good = cas(quick_trainer, stripes(90, seed=4), real, test)
    assert good.ratio > 0.9
    scrambled = stripes(90, seed=4)
    # each pattern under the next class' name: a classifier that learns this is wrong on real images
    scrambled.source.labels.copy_((scrambled.source.labels + 1) % 3)
    bad = cas(quick_trainer, scrambled, real, test)
    assert bad.value < 0.3 and bad.real == good.real


def test_cas_averages_over_seeds_and_refuses_other_class_counts():
    test, trainings = stripes(30), []

    def trainer(dataset, seed):
        trainings.append((dataset.source.name, seed))
        torch.manual_seed(seed)
        return FeatureNet(1, 3, WIDTHS, info={"class_names": CLASSES}).eval()

    score = cas(trainer, stripes(30, seed=1), stripes(30, seed=2), test, seeds=(3, 4))
    assert [seed for _, seed in trainings] == [3, 4, 3, 4]
    expected = [label_accuracy(trainer(test, seed), test) for seed in (3, 4)]
    assert score.generated == tuple(expected) and score.value == pytest.approx(sum(expected) / 2)
    with pytest.raises(ValueError, match=r"\[11, 10, 10\].*\[10, 10, 10\]"):
        cas(trainer, stripes(31), stripes(30), test)
