"""What is measured on images: Fréchet distance, label accuracy, classification accuracy score (CAS)."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from latentdiff.data.datasets import ImageDataset
from latentdiff.evaluation.feature_statistics import feature_statistics, read_batches
from latentdiff.models.feature_net import FeatureNet, FeatureSpace

# Trains a classifier on labelled images from a seed. Training is a lower room, so the trainer is handed in; generated
# and real images then certainly meet the same recipe.
ClassifierTrainer = Callable[[ImageDataset, int], FeatureNet]


def class_counts(dataset: ImageDataset) -> list[int]:
    """Images of each class of a labelled data set."""
    if dataset.labels is None:
        raise ValueError(f"data '{dataset.source.name}' has no labelled images")
    return torch.bincount(dataset.labels, minlength=len(dataset.class_names)).tolist()


def label_accuracy(net: FeatureSpace, dataset: ImageDataset) -> float:
    """Share of a labelled data set's images that net assigns to their labels; in [0, 1]."""
    accuracy = feature_statistics(net, read_batches(dataset)).accuracy
    if accuracy is None:
        raise ValueError(f"data '{dataset.source.name}' has no labelled images, or {net.name} tells no classes")
    return accuracy


@dataclass(frozen=True)
class ClassificationAccuracy:
    """Classification accuracy score (CAS, 1905.10887): test accuracies in [0, 1], one a seed.

    generated: of classifiers trained on the generated images alone; real: of the same trained on as many real ones.
    """

    generated: tuple[float, ...]
    real: tuple[float, ...]

    @property
    def value(self) -> float:
        """Mean accuracy after training on generated images."""
        return sum(self.generated) / len(self.generated)

    @property
    def real_value(self) -> float:
        """Mean accuracy after training on as many real images: what the generated ones stand beside."""
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
    """Train on generated images, and with the same recipe on as many real ones; test both on held-out real images.

    Raises:
        ValueError: generated and real images differ in number within a class, so that more than the pictures differs.
    """
    counts = [class_counts(data) for data in (generated, real)]
    if counts[0] != counts[1]:
        raise ValueError(f"images per class differ: generated {counts[0]}, real {counts[1]}")
    scores = [tuple(label_accuracy(train(data, seed), test) for seed in seeds) for data in (generated, real)]
    return ClassificationAccuracy(generated=scores[0], real=scores[1])
