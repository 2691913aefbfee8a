"""The linear probe: it finds classes that are there, and none that are not."""

import pytest
import torch

from latentdiff.evaluation.linear_probe import STRENGTHS, USUAL_STRENGTH, fit_probe


def clusters(count: int, seed: int, dim: int = 6, classes: int = 3, noise: float = 0.7) -> tuple[torch.Tensor, torch.Tensor]:
    """Features around a centre of each class, far from zero and of unlike scales, and their labels."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % classes
    rows = torch.eye(dim)[labels] * 3 + noise * torch.randn(count, dim, generator=generator)
    return rows * torch.logspace(-3, 2, dim) + 100, labels


def test_classes_that_can_be_told_apart_are():
    features, labels = clusters(150, 0)
    probe = fit_probe(features, labels, 3)
    assert probe.accuracy(*clusters(90, 1)) > 0.9
    assert probe.images == 150
    assert probe.strength in STRENGTHS


def test_shuffled_labels_leave_chance():
    features, labels = clusters(300, 0)
    shuffled = labels[torch.randperm(300, generator=torch.Generator().manual_seed(3))]
    assert fit_probe(features, shuffled, 3).accuracy(*clusters(300, 1)) < 0.5


def test_the_penalty_is_strong_where_features_say_nothing():
    generator = torch.Generator().manual_seed(0)
    noise, labels = torch.randn(200, 40, generator=generator), torch.arange(200) % 4
    assert fit_probe(noise, labels, 4).strength == max(STRENGTHS)
    assert fit_probe(*clusters(200, 0, noise=0.05), 3).strength == min(STRENGTHS)


def test_a_rare_class_weighs_as_much_as_a_frequent_one():
    generator = torch.Generator().manual_seed(0)
    labels = torch.tensor([0] * 190 + [1] * 10)
    features = labels[:, None] * 1.0 + torch.randn(200, 1, generator=generator)
    probe = fit_probe(features, labels, 2)
    middle = -(probe.bias[1] - probe.bias[0]) / (probe.weight[1] - probe.weight[0]) * probe.std + probe.mean
    assert 0 < middle.item() < 1  # with the images' own weights it lies beyond 2


def test_few_images_absent_classes_and_still_features():
    features = torch.tensor([[0.0, 7.0], [1.0, 7.0], [0.1, 7.0]])
    probe = fit_probe(features, torch.tensor([0, 2, 0]), 4)
    assert probe.strength == USUAL_STRENGTH
    assert probe.predict(features).tolist() == [0, 2, 0]
    assert probe.correct(features, torch.tensor([0, 2, 1])).tolist() == [True, True, False]
    with pytest.raises(ValueError, match="at least one"):
        probe.accuracy(features[:0], torch.tensor([], dtype=torch.int64))
    with pytest.raises(ValueError, match="labels"):
        fit_probe(features, torch.tensor([0, 1]), 2)


def test_the_accuracy_of_another_mix_takes_every_image_of_a_class():
    probe = fit_probe(torch.tensor([[0.0], [1.0], [0.1], [0.9]]), torch.tensor([0, 1, 0, 1]), 3)
    features, labels = torch.tensor([[0.0], [0.1], [0.9], [1.0]]), torch.tensor([0, 0, 0, 1])
    assert probe.accuracy_for(features, labels, torch.tensor([0, 1])) == (pytest.approx(5 / 6), 4)  # 2/3 and 1
    assert probe.accuracy_for(features, labels, torch.tensor([1, 1, 2])) == (1.0, 1)
    with pytest.raises(ValueError, match="no image"):
        probe.accuracy_for(features, labels, torch.tensor([2]))
