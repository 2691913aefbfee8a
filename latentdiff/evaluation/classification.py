"""What is measured on images: Fréchet distance, label accuracy, classification accuracy score (CAS)."""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from latentdiff.data.datasets import ImageDataset
from latentdiff.errors import NotFiniteError
from latentdiff.evaluation.frechet import Moments, frechet_distance
from latentdiff.models.feature_net import FeatureNet, FeatureSpace, extract
from latentdiff.utils import processes
from latentdiff.utils.images import to_uint8

# Trains a classifier on labelled images from a seed. Training is a lower room, so the trainer is handed in; generated
# and real images then certainly meet the same recipe.
ClassifierTrainer = Callable[[ImageDataset, int], FeatureNet]
Batch = tuple[Tensor, Tensor | None]


def read_batches(dataset: ImageDataset, size: int = 250, doing: str = "", part: slice = slice(None)) -> Iterator[Batch]:
    """Successive (images [b, C, H, W] in [-1, 1], labels [b] | None) of a data set, b <= size.

    doing: shown with a bar on stderr, by the first process, where it takes a while; "" shows nothing. part: only these images.
    """
    wanted = range(len(dataset))[part]
    with tqdm(total=len(wanted), unit="image", desc=doing, delay=0.5, disable=not doing or processes.rank() > 0) as bar:
        for start in range(0, len(wanted), size):
            rows = wanted[start : start + size]
            yield dataset.batch(rows)
            bar.update(len(rows))


@dataclass(frozen=True)
class Seen:
    """One pass of a network over images: feature moments, share classified right (None: no labels or no head), content hash.

    features: float32 [N, D] where they were to be kept; then right: bool [N], classified right, where accuracy is there.
    """

    moments: Moments
    accuracy: float | None
    sha256: str
    features: Tensor | None = None
    right: Tensor | None = None

    @property
    def kept(self) -> Tensor:
        """The features, which must have been kept."""
        if self.features is None:
            raise ValueError("the features were not kept: look(..., keep=True)")
        return self.features


def look(net: FeatureSpace, batches: Iterable[Batch], keep: bool = False) -> Seen:
    """Feature moments, label accuracy and hash of a stream of batches, in one pass that keeps no image.

    keep: the features too, [N, D] in float32. The hash is over the hashes of the images' 8-bit pixels, their shape and the
    labels, in order: equal for equal images wherever they lie and however they are cut into batches.
    """
    moments, pixel_hash, label_hash = Moments(net.dim), hashlib.sha256(), hashlib.sha256()
    shape: tuple[int, ...] = ()
    right: list[Tensor] = []
    kept: list[Tensor] = []
    for images, labels in batches:
        features, predicted = extract(net, images)
        if not bool(features.isfinite().all()):
            raise NotFiniteError(f"feature network {net.name}: its features are not finite; its weights are damaged")
        moments.update(features)
        if keep:
            kept.append(features.float())
        pixels = to_uint8(images)
        shape = pixels.shape[1:]
        pixel_hash.update(digests(pixels).tobytes())
        if labels is not None:
            label_hash.update(labels.numpy().tobytes())
        if labels is not None and predicted is not None:
            right.append(predicted == labels)
    told = torch.cat(right) if right else None
    accuracy = None if told is None else int(told.sum()) / moments.count
    sha256 = content_hash(shape, pixel_hash.hexdigest(), label_hash.hexdigest())
    return Seen(moments, accuracy, sha256, torch.cat(kept) if keep else None, told if keep else None)


def digests(pixels: np.ndarray) -> np.ndarray:
    """sha256 of each image of uint8 [B, H, W, C], as uint8 [B, 32]."""
    found = b"".join(hashlib.sha256(image.tobytes()).digest() for image in pixels)
    return np.frombuffer(found, np.uint8).reshape(len(pixels), 32)


def content_hash(shape: Sequence[int], pixels: str, labels: str) -> str:
    return hashlib.sha256(f"{list(shape)} {pixels} {labels}".encode()).hexdigest()


def frechet(features_a: Tensor, features_b: Tensor) -> float:
    """Fréchet distance of two sets of features [N, D] and [M, D], symmetric in its arguments."""
    moments = [Moments(f.shape[-1]).update(f) for f in (features_a, features_b)]
    return frechet_distance(*moments)


def class_counts(dataset: ImageDataset) -> list[int]:
    """Images of each class of a labelled data set."""
    if dataset.labels is None:
        raise ValueError(f"data '{dataset.source.name}' has no labelled images")
    return torch.bincount(dataset.labels, minlength=len(dataset.class_names)).tolist()


def label_accuracy(net: FeatureSpace, dataset: ImageDataset) -> float:
    """Share of a labelled data set's images that net assigns to their labels; in [0, 1]."""
    accuracy = look(net, read_batches(dataset)).accuracy
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
