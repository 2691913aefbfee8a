"""What guidance trades: Fréchet distance, precision, recall and label accuracy at several guidance scales."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch

from latentdiff.data.datasets import ImageDataset
from latentdiff.evaluation.feature_statistics import FeatureStatistics, feature_statistics, read_batches
from latentdiff.evaluation.frechet import frechet_distance
from latentdiff.evaluation.linear_probe import LinearProbe
from latentdiff.evaluation.precision_recall import NEIGHBOURS, precision_recall
from latentdiff.evaluation.sample_sets import matching_rows, sample_set, subset, without_padding
from latentdiff.evaluation.tables import NONE, markdown_table
from latentdiff.models.feature_net import FeatureSpace

METRICS = {"frechet": "Fréchet distance", "label_accuracy": "label accuracy", "precision": "precision", "recall": "recall"}


def guidance_curve(
    net: FeatureSpace,
    reference: FeatureStatistics,
    train: ImageDataset,
    test: ImageDataset,
    sets: Mapping[float, np.ndarray],
    labels: np.ndarray | None,
    seed: int = 0,
    batch: int = 250,
    log: Callable[[str], None] = lambda line: None,
    probe: LinearProbe | None = None,
) -> dict[str, Any]:
    """Measure sets of samples from the same noise at several guidance scales, and as many real images in the same way.

    All values are at this number of images N. Compare them with the floor in the same result, not with values at another N.

    Args:
        net: the feature network.
        reference: the statistics of train, with features.
        train: the training images.
        test: the held-out images, from which the floor is drawn.
        sets: {guidance scale: samples, uint8 [N, H, W, C]}, all of one size.
        labels: the classes of each set, int64 [N]; None for samples without a class.
        seed: draws the real images.
        batch: images in a batch of the network.
        log: gets a line of progress for each scale.
        probe: tells the classes where the network does not know them.

    Returns:
        {"images": N, "points": [...], "floor": {...}, "floor_images"}. A point has guidance, frechet, label_accuracy (None
        where neither network nor probe tells these classes), precision and recall (arXiv 1904.06991; None for NEIGHBOURS
        images or fewer). The floor has the same metrics for held-out images.
    """
    train, test = without_padding(train), without_padding(test)
    classes = None if labels is None else torch.as_tensor(np.asarray(labels), dtype=torch.int64)
    count = len(next(iter(sets.values())))
    real = reference.features[matching_rows(train, classes, count, seed)]  # [n, D]
    classifies = net.info.get("class_names") == list(train.class_names)

    def accuracy(images: ImageDataset, current: FeatureStatistics) -> float | None:
        if probe is not None:
            return None if images.labels is None else probe.accuracy(current.features, images.labels)
        return current.accuracy if classifies else None

    def measure(images: ImageDataset) -> dict[str, Any]:
        current = feature_statistics(net, read_batches(images, batch), keep_features=True)
        enough = min(len(real), len(current.features)) > NEIGHBOURS
        manifold = precision_recall(real, current.features) if enough else None
        return {
            "frechet": frechet_distance(current.moments, reference.moments),
            "label_accuracy": accuracy(images, current),
            "precision": manifold and manifold.precision,
            "recall": manifold and manifold.recall,
        }

    points = []
    for scale, images in sorted(sets.items()):
        log(f"evaluate: {count} samples at guidance {scale:g}")
        points.append({"guidance": scale} | measure(sample_set(images, labels, train)))
    held_out = subset(test, matching_rows(test, classes, count, seed))
    return {"images": count, "points": points, "floor": measure(held_out), "floor_images": len(held_out)}


def table(curve: Mapping[str, Any]) -> list[str]:
    """A result of `guidance_curve` as the lines of a Markdown table."""
    points = {f"{point['guidance']:g}": point for point in curve["points"]}
    points[f"real images ({curve['floor_images']})"] = curve["floor"]
    rows = [
        (name, *(NONE if point[metric] is None else f"{point[metric]:.4f}" for metric in METRICS))
        for name, point in points.items()
    ]
    return markdown_table((f"guidance, {curve['images']} images", *METRICS.values()), rows)
