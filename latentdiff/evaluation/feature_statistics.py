"""One pass of a feature network over images: feature moments, label accuracy and a hash of the images."""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from latentdiff.data.datasets import ImageDataset
from latentdiff.errors import NotFiniteError
from latentdiff.evaluation.frechet import Moments
from latentdiff.models.feature_net import FeatureSpace, extract
from latentdiff.utils import processes
from latentdiff.utils.images import to_uint8

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
class FeatureStatistics:
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
            raise ValueError("the features were not kept: feature_statistics(..., keep=True)")
        return self.features


def feature_statistics(net: FeatureSpace, batches: Iterable[Batch], keep: bool = False) -> FeatureStatistics:
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
        pixel_hash.update(pixel_digests(pixels).tobytes())
        if labels is not None:
            label_hash.update(labels.numpy().tobytes())
        if labels is not None and predicted is not None:
            right.append(predicted == labels)
    told = torch.cat(right) if right else None
    accuracy = None if told is None else int(told.sum()) / moments.count
    sha256 = content_hash(shape, pixel_hash.hexdigest(), label_hash.hexdigest())
    return FeatureStatistics(moments, accuracy, sha256, torch.cat(kept) if keep else None, told if keep else None)


def pixel_digests(pixels: np.ndarray) -> np.ndarray:
    """sha256 of each image of uint8 [B, H, W, C], as uint8 [B, 32]."""
    found = b"".join(hashlib.sha256(image.tobytes()).digest() for image in pixels)
    return np.frombuffer(found, np.uint8).reshape(len(pixels), 32)


def content_hash(shape: Sequence[int], pixels: str, labels: str) -> str:
    return hashlib.sha256(f"{list(shape)} {pixels} {labels}".encode()).hexdigest()
