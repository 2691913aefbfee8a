"""Is an image of its class? Label accuracy, and the classification accuracy score (CAS)."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from latentdiff.data.datasets import ImageDataset
from latentdiff.evaluation.feature_statistics import feature_statistics, read_batches
from latentdiff.models.feature_net import FeatureNet, FeatureSpace

# Trains a classifier on labelled images from a seed. CAS uses one trainer for generated and for real images
ClassifierTrainer = Callable[[ImageDataset, int], FeatureNet]


def class_counts(dataset: ImageDataset) -> list[int]:
    """Number of images of each class. ValueError for a data set without labels."""
    if dataset.labels is None:
        raise ValueError(f"data '{dataset.source.name}' has no labelled images")
    return torch.bincount(dataset.labels, minlength=len(dataset.class_names)).tolist()


def label_accuracy(net: FeatureSpace, dataset: ImageDataset) -> float:
    """Share of a labelled data set's images that net classifies as their label says, in [0, 1].

    ValueError without labels, or for a network that is no classifier.
    """
    accuracy = feature_statistics(net, read_batches(dataset)).accuracy
    if accuracy is None:
        raise ValueError(f"data '{dataset.source.name}' has no labelled images, or {net.name} tells no classes")
    return accuracy


@dataclass(frozen=True)
class ClassificationAccuracy:
    """Classification accuracy score (Ravuri & Vinyals, "Classification Accuracy Score", arXiv 1905.10887).

    Attributes:
        generated: test accuracies in [0, 1] of classifiers trained on the generated images alone, one for each seed.
        real: the same after training on as many real images.
    """

    generated: tuple[float, ...]
    real: tuple[float, ...]

    @property
    def value(self) -> float:
        """Mean accuracy after training on generated images."""
        return sum(self.generated) / len(self.generated)

    @property
    def real_value(self) -> float:
        """Mean accuracy after training on as many real images."""
        return sum(self.real) / len(self.real)

    @property
    def ratio(self) -> float:
        """value / real_value."""
        return self.value / self.real_value


def cas(
    train: ClassifierTrainer,
    generated: ImageDataset,
    real: ImageDataset,
    test: ImageDataset,
    seeds: Sequence[int] = (0,),
) -> ClassificationAccuracy:
    """Train classifiers on generated images, and in the same way on real ones; test both on held-out real images.

    Args:
        train: trains a classifier.
        generated: labelled samples.
        real: as many real images of each class.
        test: held-out real images.
        seeds: of the trainings; each seed trains one classifier on generated and one on real images.

    Raises:
        ValueError: the numbers of generated and of real images of a class differ.
    """
    counts = [class_counts(data) for data in (generated, real)]
    if counts[0] != counts[1]:
        raise ValueError(f"images per class differ: generated {counts[0]}, real {counts[1]}")
    scores = [tuple(label_accuracy(train(data, seed), test) for seed in seeds) for data in (generated, real)]
    return ClassificationAccuracy(generated=scores[0], real=scores[1])
