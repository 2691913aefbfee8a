"""One pass of a feature network over images: mean and covariance of the features, label accuracy, a hash of the images."""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from latentdiff.data.datasets import ImageDataset
from latentdiff.errors import NotFiniteError
from latentdiff.evaluation.frechet import Moments
from latentdiff.models.feature_net import FeatureSpace, extract
from latentdiff.utils import processes, progress_bars
from latentdiff.utils.images import to_uint8

Batch = tuple[Tensor, Tensor | None]


def read_batches(dataset: ImageDataset, size: int = 250, doing: str = "", part: slice = slice(None)) -> Iterator[Batch]:
    """Yield a data set in order as batches (images [b, C, H, W] in [-1, 1], labels int64 [b] or None), b <= size.

    Args:
        dataset: the images.
        size: images in a batch.
        doing: the text of a progress bar on stderr, shown by the first process if reading takes a while; "" shows none.
        part: read these images only.
    """
    chosen = range(len(dataset))[part]
    with progress_bars.bar(
        total=len(chosen), unit="image", desc=doing, delay=0.5, disable=not doing or processes.rank() > 0
    ) as bar:
        for start in range(0, len(chosen), size):
            rows = chosen[start : start + size]
            yield dataset.batch(rows)
            bar.update(len(rows))


@dataclass(frozen=True)
class FeatureStatistics:
    """What one pass of a network over N images gives.

    Attributes:
        moments: mean and covariance of the features.
        accuracy: share of the images that are classified as their label says; None without labels or without a classifier.
        sha256: hash of the images and their labels.
        features: float32 [N, D], if they were to be kept.
        correct: bool [N], which images are classified correctly, if features were to be kept and there is an accuracy.
    """

    moments: Moments
    accuracy: float | None
    sha256: str
    features: Tensor | None = None
    correct: Tensor | None = None


def feature_statistics(net: FeatureSpace, batches: Iterable[Batch], keep_features: bool = False) -> FeatureStatistics:
    """Run a feature network over a stream of batches once. No image stays in memory.

    The hash is over the hashes of the images' 8-bit pixels, their shape and the labels, in order. It is the same for the
    same images, wherever they lie and however they are cut into batches.

    Args:
        net: the feature network.
        batches: of `read_batches`.
        keep_features: return the features and `correct` too.

    Raises:
        NotFiniteError: a feature is NaN or infinite.
    """
    moments, pixel_hash, label_hash = Moments(net.dim), hashlib.sha256(), hashlib.sha256()
    shape: tuple[int, ...] = ()
    all_features: list[Tensor] = []
    all_correct: list[Tensor] = []
    for images, labels in batches:
        features, predicted = extract(net, images)
        if not bool(features.isfinite().all()):
            raise NotFiniteError(f"feature network {net.name}: its features are not finite; its weights are damaged")
        moments.update(features)
        if keep_features:
            all_features.append(features.float())
        pixels = to_uint8(images)
        shape = pixels.shape[1:]
        pixel_hash.update(pixel_digests(pixels).tobytes())
        if labels is not None:
            label_hash.update(labels.numpy().tobytes())
        if labels is not None and predicted is not None:
            all_correct.append(predicted == labels)
    correct = torch.cat(all_correct) if all_correct else None
    accuracy = None if correct is None else int(correct.sum()) / moments.count
    sha256 = content_hash(shape, pixel_hash.hexdigest(), label_hash.hexdigest())
    if not keep_features:
        return FeatureStatistics(moments, accuracy, sha256)
    return FeatureStatistics(moments, accuracy, sha256, torch.cat(all_features), correct)


def pixel_digests(pixels: np.ndarray) -> np.ndarray:
    """The sha256 of each image of uint8 [B, H, W, C], as uint8 [B, 32]."""
    digests = b"".join(hashlib.sha256(image.tobytes()).digest() for image in pixels)
    return np.frombuffer(digests, np.uint8).reshape(len(pixels), 32)


def content_hash(shape: Sequence[int], pixels: str, labels: str) -> str:
    """The hash of a set of images as hex: of an image's shape and the hex hashes of all pixels and of all labels."""
    return hashlib.sha256(f"{list(shape)} {pixels} {labels}".encode()).hexdigest()
