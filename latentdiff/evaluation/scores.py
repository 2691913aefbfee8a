"""What is measured on images: Fréchet distance, label accuracy, classification accuracy score, PSNR, SSIM."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from latentdiff.evaluation.features import FeatureNet, extract
from latentdiff.evaluation.statistics import Moments, frechet_distance

# Trains a classifier on uint8 images [N, C, H, W] and labels [N] from a seed. Training is a lower room: it is
# handed in, so that generated and real images are certain to meet the same recipe.
ClassifierTrainer = Callable[[Tensor, Tensor, int], FeatureNet]


def frechet(features_a: Tensor, features_b: Tensor) -> float:
    """Fréchet distance of two sets of features [N, D] and [M, D], symmetric in its arguments."""
    moments = [Moments(f.shape[-1]).update(f) for f in (features_a, features_b)]
    return frechet_distance(*moments)


def label_accuracy(net: FeatureNet, images: Tensor, labels: Tensor) -> float:
    """Share of images [N, C, H, W] (uint8, or float in [-1, 1]) that net assigns to their labels [N]; in [0, 1]."""
    if len(images) != len(labels) or len(images) == 0:
        raise ValueError(f"images {list(images.shape)} and labels {list(labels.shape)} do not pair up")
    _, predicted = extract(net, images)
    return (predicted == labels.cpu()).double().mean().item()


@dataclass(frozen=True)
class ClassificationAccuracy:
    """Classification accuracy score (CAS, 1905.10887): test accuracies in [0, 1], one a seed.

    generated: of classifiers trained on the generated images alone; real: of the same trained on as many real ones.
    """

    generated: tuple[float, ...]
    real: tuple[float, ...]
    seeds: tuple[int, ...]

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
    generated: tuple[Tensor, Tensor],
    real: tuple[Tensor, Tensor],
    test: tuple[Tensor, Tensor],
    seeds: Sequence[int] = (0,),
) -> ClassificationAccuracy:
    """Train on generated images, and with the same recipe on as many real ones; test both on held-out real images.

    Each argument is a pair of images uint8 [N, C, H, W] and labels int64 [N]; generated and real must match in N
    and in the number of images of each class, so that the two trainings differ in the pictures alone.

    Raises:
        ValueError: the class counts of generated and real images differ.
    """
    bins = int(max(labels.max() for _, labels in (generated, real))) + 1
    counts = [torch.bincount(labels, minlength=bins) for _, labels in (generated, real)]
    if not torch.equal(*counts):
        raise ValueError(f"images per class differ: generated {counts[0].tolist()}, real {counts[1].tolist()}")
    scores = [
        tuple(label_accuracy(train(images, labels, seed), *test) for seed in seeds)
        for images, labels in (generated, real)
    ]
    return ClassificationAccuracy(generated=scores[0], real=scores[1], seeds=tuple(seeds))


def psnr(images: Tensor, reference: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each image [B, C, H, W] in [0, 1], in dB, [B] float64; infinite where equal."""
    _check_pair(images, reference)
    error = (images.double() - reference.double()).square().flatten(1).mean(dim=1)
    return -10 * torch.log10(error)


def ssim(images: Tensor, reference: Tensor) -> Tensor:
    """Structural similarity of each image [B, C, H, W] in [0, 1], [B]: Gaussian window of 11, sigma 1.5."""
    from torchmetrics.functional.image import structural_similarity_index_measure

    _check_pair(images, reference)
    return structural_similarity_index_measure(images, reference, data_range=1.0, reduction="none").reshape(-1)


def _check_pair(images: Tensor, reference: Tensor) -> None:
    if images.shape != reference.shape or images.ndim != 4:
        raise ValueError(f"expected two equal shapes [B, C, H, W], got {list(images.shape)}, {list(reference.shape)}")
