"""What guidance trades: distance, precision, recall and label accuracy of the same noises at several guidance scales."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch

from latentdiff.data.datasets import ImageDataset
from latentdiff.evaluation.feature_statistics import FeatureStatistics, feature_statistics, read_batches
from latentdiff.evaluation.frechet import frechet_distance
from latentdiff.evaluation.precision_recall import NEIGHBOURS, precision_recall
from latentdiff.evaluation.sample_sets import matching_rows, sample_set, subset, without_padding
from latentdiff.models.feature_net import FeatureSpace


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
) -> dict[str, Any]:
    """{images, points, floor}: a point for each guidance scale, and real held-out images as many, measured alike.

    reference: train as the network sees it, with its features. sets: {scale: uint8 [N, H, W, C]}, all of one size and with
    these labels [N] (None: of no class). A point has guidance, frechet, label_accuracy (None where the network was not
    trained on these classes), precision and recall (None below NEIGHBOURS + 1 images; 1904.06991), all at this N: compare
    them with the floor beside them and not with values of another N.
    """
    train, test = without_padding(train), without_padding(test)
    wanted = None if labels is None else torch.as_tensor(np.asarray(labels), dtype=torch.int64)
    count = len(next(iter(sets.values())))
    real = reference.kept[matching_rows(train, wanted, count, seed)]
    told = net.info.get("class_names") == list(train.class_names)

    def point(images: ImageDataset) -> dict[str, Any]:
        seen = feature_statistics(net, read_batches(images, batch), keep=True)
        near = precision_recall(real, seen.kept) if min(len(real), len(seen.kept)) > NEIGHBOURS else None
        return {
            "frechet": frechet_distance(seen.moments, reference.moments),
            "label_accuracy": seen.accuracy if told else None,
            "precision": near and near.precision,
            "recall": near and near.recall,
        }

    points = []
    for scale, images in sorted(sets.items()):
        log(f"evaluate: {count} samples at guidance {scale:g}")
        points.append({"guidance": scale} | point(sample_set(images, labels, train)))
    held_out = subset(test, matching_rows(test, wanted, count, seed))
    return {"images": count, "points": points, "floor": point(held_out), "floor_images": len(held_out)}


def table(curve: Mapping[str, Any]) -> list[str]:
    """The curve as lines of a Markdown table."""
    lines = [
        f"| guidance, {curve['images']} images | Fréchet distance | label accuracy | precision | recall |",
        "|---|---|---|---|---|",
    ]
    rows = [(f"{each['guidance']:g}", each) for each in curve["points"]]
    for name, each in [*rows, (f"real images ({curve['floor_images']})", curve["floor"])]:
        cells = (each[key] for key in ("frechet", "label_accuracy", "precision", "recall"))
        lines.append(f"| {name} | {' | '.join('–' if cell is None else f'{cell:.4f}' for cell in cells)} |")
    return lines
