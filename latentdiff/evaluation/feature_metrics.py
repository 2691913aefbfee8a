"""Metrics from the features of samples, held-out images and training images, each value beside its floor.

The floor of a metric is its value for held-out real images, measured in the same way.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from latentdiff.data.datasets import ImageDataset
from latentdiff.data.shuffling import permutation
from latentdiff.errors import UserError
from latentdiff.evaluation import kid, memorization
from latentdiff.evaluation.feature_statistics import FeatureStatistics, feature_statistics, read_batches
from latentdiff.evaluation.frechet import Moments, extrapolate_frechet, frechet_distance, smallest_sample
from latentdiff.evaluation.precision_recall import NEIGHBOURS, PrecisionRecall, precision_recall
from latentdiff.evaluation.sample_sets import matching_rows, sample_set, subset, without_padding
from latentdiff.models.feature_net import FeatureSpace

SUPPORT_IMAGES = 10_000  # most images on a side of precision and recall, whose cost grows with the square
CLASS_ROWS = 2  # images that a class needs for each dimension of the features, or its covariance says nothing
Entries = dict[str, dict[str, Any]]


def metric_settings(channels: int, size: Sequence[int]) -> dict[str, Any]:
    """The constants that the metrics depend on, for images of this size (height, width). Records compare only if they agree."""
    side, height, width = memorization.compared_size(channels, *size)
    return {
        "version": 1,
        "kernel_subsets": kid.SUBSETS,
        "kernel_subset_size": kid.SUBSET_SIZE,
        "neighbours": NEIGHBOURS,
        "support_images": SUPPORT_IMAGES,
        "pixels": [height, width],
        "pixels_averaged_over": side,
        "percentiles": list(memorization.PERCENTILES),
    }


class FeatureMetrics:
    """Measures sets of samples against training images (the reference), beside held-out images (the floor).

    Args:
        name: of the feature network; it becomes part of a metric's name, as in "kid[name]".
        reference: statistics of the training images, with features.
        floor: statistics of the held-out images, with features.
        train: the training images.
        held_out: the held-out images, with the samples' class counts.
        seed: draws subsets of images.
        log: gets lines of progress.

    Attributes:
        left_out: {metric: why it could not be measured}, filled as metrics are computed.
    """

    def __init__(
        self,
        name: str,
        reference: FeatureStatistics,
        floor: FeatureStatistics,
        train: ImageDataset,
        held_out: ImageDataset,
        seed: int = 0,
        log: Callable[[str], None] = lambda line: None,
    ):
        self.name, self.reference, self.floor, self.train, self.held_out = name, reference, floor, train, held_out
        self.seed, self.log, self.left_out = seed, log, dict[str, str]()
        # Precision and recall need sets of one size: as many real images and samples as there are held-out ones here
        chosen = permutation(len(held_out), seed, "support")[:SUPPORT_IMAGES].sort().values
        self._labels = None if held_out.labels is None else held_out.labels[chosen]
        self._count = len(chosen)
        self._real = reference.features[self._rows(train)]
        log(f"evaluate: floors of {len(held_out)} held-out images")
        self._floor = self._measure(floor, chosen)

    def distribution(self, current: FeatureStatistics, samples: ImageDataset) -> Entries:
        """Metrics of the samples' distribution: {"metric[network]": {value, floor, images, floor_images, errors ...}}.

        Metrics: kid, precision, recall, density, coverage, frechet_of_infinite, penalised_frechet.
        current: statistics of the samples, with features.
        """
        self.log(f"evaluate: kernel distance, neighbours and extrapolation of {len(samples)} samples")
        entries: Entries = {}
        for metric, entry in self._measure(current, self._rows(samples)).items():
            floor = self._floor.get(metric)
            if floor is None:
                self.left_out.setdefault(metric, "the held-out images are too few, so that there is no floor")
                continue
            entry |= {"floor": floor["value"], "floor_images": floor["images"]}
            entry |= {f"floor_{key}": floor[key] for key in ("spread", "stderr") if key in floor}
            entries[f"{metric}[{self.name}]"] = entry
        return entries

    def _rows(self, images: ImageDataset) -> Tensor:
        """As many images as the floor has, with its class counts where they have these classes."""
        try:
            return matching_rows(images, self._labels, self._count, self.seed)
        except UserError:
            return matching_rows(images, None, self._count, self.seed)

    def _measure(self, current: FeatureStatistics, rows: Tensor) -> Entries:
        """{metric: entry} of a set of images. rows: the subset used by metrics that need equally large sets."""
        images, entries = current.moments.count, Entries()
        value, spread = kid.kernel_distance(current.features, self.reference.features, self.seed)
        size = min(kid.SUBSET_SIZE, images, self.reference.moments.count)
        entries["kid"] = {"value": value, "spread": spread, "images": images, "subsets": kid.SUBSETS, "subset_size": size}

        smaller = min(len(rows), len(self._real))
        if smaller > NEIGHBOURS:
            manifold = precision_recall(self._real, current.features[rows])
            counts = {"images": len(rows), "real_images": len(self._real), "neighbours": NEIGHBOURS}
            entries |= {metric: {"value": share} | counts for metric, share in manifold._asdict().items()}
        else:
            reason = f"{smaller} images of a kind; needs more than {NEIGHBOURS}"
            self.left_out |= dict.fromkeys(PrecisionRecall._fields, reason)

        limit = extrapolate_frechet(current.features, self.reference.moments, self.seed)
        if limit is None:
            dim = current.features.shape[1]
            self.left_out["frechet_of_infinite"] = f"{images} images; needs {smallest_sample(dim)} for {dim} features"
        else:
            entries["frechet_of_infinite"] = {
                "value": limit.value,
                "stderr": limit.stderr,
                "images": images,
                "sizes": list(limit.sizes),
            }

        distance = frechet_distance(current.moments, self.reference.moments)
        cosine = memorization.cosine_distance(current.features, self.reference.features)
        held_out = cosine if current is self.floor else self._floor["penalised_frechet"]["cosine_distance"]
        entries["penalised_frechet"] = {
            "value": memorization.penalized_distance(distance, cosine, held_out),
            "images": images,
            "cosine_distance": cosine,
            "formula": memorization.FORMULA,
        }
        return entries

    def memorisation(self, current: FeatureStatistics, samples: ImageDataset) -> dict[str, Any]:
        """How close samples come to training images, compared with held-out images.

        Returns {"features": summary, "pixels": summary, "closest": [...]}: see `memorization.distance_summary` and
        `memorization.closest_samples`.
        """
        self.log(f"evaluate: nearest of {len(self.train)} training images in pixels and features")
        by_features = [
            memorization.nearest_by_features(each.features, self.reference.features) for each in (current, self.floor)
        ]
        by_pixels = memorization.nearest_by_pixels(samples, self.held_out, self.train)
        report: dict[str, Any] = {}
        units = []
        for space, (nearest, floor) in {"features": by_features, "pixels": by_pixels}.items():
            report[space] = memorization.distance_summary(nearest.distances, floor.distances)
            units.append((nearest, report[space]["held_out_median"]))
        return report | {"closest": memorization.closest_samples(*units)}

    def per_class(
        self, current: FeatureStatistics, samples: ImageDataset, with_accuracy: bool = False
    ) -> dict[str, Any] | None:
        """The Fréchet distance of each class's samples to its training images, and the share classified correctly.

        Args:
            current: statistics of the samples, with features.
            samples: the samples.
            with_accuracy: the network knows these classes, so label_accuracy is measured.

        Returns:
            {"fewest_images", "classes": {name: {value, images, floor, floor_images}}, "left_out": {name: images},
            "label_accuracy": entries like those of classes}. A class with fewer than CLASS_ROWS images for each dimension
            is in left_out. None without labels.
        """
        if samples.labels is None or self.train.labels is None or self.held_out.labels is None:
            return None
        least = CLASS_ROWS * current.features.shape[1]
        table: dict[str, Any] = {"fewest_images": least, "classes": {}, "left_out": {}}
        correct, floor_correct = current.correct, self.floor.correct
        if with_accuracy and correct is not None and floor_correct is not None:
            table["label_accuracy"] = {}
        for c, name in enumerate(self.train.class_names):
            chosen, held_out = samples.labels == c, self.held_out.labels == c
            if not chosen.any():
                continue
            if "label_accuracy" in table:
                real_correct = floor_correct[held_out]
                table["label_accuracy"][name] = {
                    "value": correct[chosen].double().mean().item(),
                    "images": int(chosen.sum()),
                    "floor": real_correct.double().mean().item() if len(real_correct) else None,
                    "floor_images": len(real_correct),
                }
            features = current.features[chosen], self.floor.features[held_out], self.reference.features[self.train.labels == c]
            generated, floor, reference = (Moments(rows.shape[1]).update(rows) for rows in features)
            if min(generated.count, reference.count) < least:
                table["left_out"][name] = min(generated.count, reference.count)
                continue
            table["classes"][name] = {
                "value": frechet_distance(generated, reference),
                "images": generated.count,
                "floor": frechet_distance(floor, reference) if floor.count >= least else None,
                "floor_images": floor.count,
            }
        return table


def mean_over_seeds(by_seed: Sequence[Mapping[str, dict[str, Any]]]) -> Entries:
    """Merge the entries of several sets of samples: value is the mean over sets; by_seed has all values.

    seed_spread: their standard deviation. Everything else in an entry is that of the first set.
    """
    first, *others = by_seed
    if not others:
        return {name: dict(entry) for name, entry in first.items()}
    merged: Entries = {}
    for name, entry in first.items():
        values = torch.tensor([entries[name]["value"] for entries in by_seed], dtype=torch.float64)
        merged[name] = entry | {
            "value": values.mean().item(),
            "by_seed": values.tolist(),
            "seed_spread": values.std(correction=1).item(),
        }
    return merged


class ReferenceStatistics:
    """The training and held-out images of a data set, measured once, so that many sets of samples can be compared with them.

    The distance is `evaluation.frechet.frechet_distance` (arXiv 1706.08500, eq. 6), in squared units of the features.

    Args:
        net: the feature network.
        train: the training images, the reference.
        test: the held-out images.
        labels: the classes of the samples to come, int64 [N]; None for samples without a class.
        count: how many held-out images make the floor where labels is None. They are drawn by a fixed seed.
        batch: images in a batch of the network.

    Attributes:
        floor: the Fréchet distance of held-out images to all training images. With labels these images have their class
            counts, or the same mix of fewer images.

    Raises:
        UserError: fewer than two held-out images can be drawn in that mix.
    """

    def __init__(
        self,
        net: FeatureSpace,
        train: ImageDataset,
        test: ImageDataset,
        labels: np.ndarray | None,
        count: int,
        batch: int = 250,
    ):
        self.net, self.batch, self.train = net, batch, without_padding(train)
        rows = matching_rows(test, None if labels is None else torch.as_tensor(labels), count, 0)
        self.reference = feature_statistics(net, read_batches(self.train, batch))
        self.floor = self._compare(subset(without_padding(test), rows))[0]

    def measure(self, samples: np.ndarray, labels: np.ndarray | None) -> tuple[float, float | None]:
        """(Fréchet distance to all training images, label accuracy) of uint8 samples [N, H, W, C].

        The accuracy is None without labels, and where the network was trained on other classes.
        """
        distance, accuracy = self._compare(sample_set(samples, labels, self.train))
        return distance, accuracy if self.net.info.get("class_names") == list(self.train.class_names) else None

    def _compare(self, images: ImageDataset) -> tuple[float, float | None]:
        current = feature_statistics(self.net, read_batches(images, self.batch))
        return frechet_distance(current.moments, self.reference.moments), current.accuracy
