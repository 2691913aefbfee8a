"""What one pass of a feature network over samples, held-out and training images says, each value beside its floor."""

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
from latentdiff.evaluation.precision_recall import NEIGHBOURS, precision_recall
from latentdiff.evaluation.sample_sets import matching_rows, sample_set, subset, without_padding
from latentdiff.models.feature_net import FeatureSpace

SUPPORT_IMAGES = 10_000  # a side of precision and recall, whose cost grows with the square
CLASS_ROWS = 2  # images of a class for each dimension of the features, or its covariance says nothing
Entries = dict[str, dict[str, Any]]


def settings(channels: int, size: Sequence[int]) -> dict[str, Any]:
    """The constants that the values depend on: two records are alike only if these are."""
    side, height, width = memorization.compared_size(channels, *size)
    return {
        "version": 1,
        "kernel_subsets": kid.SUBSETS,
        "kernel_subset_size": kid.SUBSET,
        "neighbours": NEIGHBOURS,
        "support_images": SUPPORT_IMAGES,
        "pixels": [height, width],
        "pixels_averaged_over": side,
        "percentiles": list(memorization.PERCENTILES),
    }


class FeatureMetrics:
    """What samples are held against: the training images, and held-out ones with the samples' class counts (the floor).

    reference, floor: seen with their features kept. train, held_out: the images that they were seen on. What could not be
    measured is in `left_out`, by name, with the reason.
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
        chosen = permutation(len(held_out), seed, "support")[:SUPPORT_IMAGES].sort().values
        self._labels = None if held_out.labels is None else held_out.labels[chosen]
        self._count = len(chosen)
        self._real = reference.kept[self._rows(train)]
        log(f"evaluate: floors of {len(held_out)} held-out images")
        self._floor = self._measure(floor, chosen)

    def distribution(self, seen: FeatureStatistics, samples: ImageDataset) -> Entries:
        """Kernel distance, precision, recall, density, coverage, the distance of infinitely many, and the penalised one."""
        self.log(f"evaluate: kernel distance, neighbours and extrapolation of {len(samples)} samples")
        values = self._measure(seen, self._rows(samples))
        entries: Entries = {}
        for name, entry in values.items():
            floor = self._floor.get(name)
            if floor is None:
                self.left_out.setdefault(name, "the held-out images are too few, so that there is no floor")
                continue
            added = {"floor": floor["value"], "floor_images": floor["images"]}
            added |= {f"floor_{key}": floor[key] for key in ("spread", "stderr") if key in floor}
            entries[f"{name}[{self.name}]"] = entry | added
        return entries

    def _rows(self, images: ImageDataset) -> Tensor:
        """As many of the images as the floor has, with its class counts where they have such classes."""
        try:
            return matching_rows(images, self._labels, self._count, self.seed)
        except UserError:
            return matching_rows(images, None, self._count, self.seed)

    def _measure(self, seen: FeatureStatistics, rows: Tensor) -> Entries:
        """{name: entry} of a set of images; rows: which of them stand for it where sets must be of one size."""
        images, entries = seen.moments.count, dict[str, dict[str, Any]]()
        value, spread = kid.kernel_distance(seen.kept, self.reference.kept, self.seed)
        size = min(kid.SUBSET, images, self.reference.moments.count)
        entries["kid"] = {"value": value, "spread": spread, "images": images, "subsets": kid.SUBSETS, "subset_size": size}
        if min(len(rows), len(self._real)) > NEIGHBOURS:
            found = precision_recall(self._real, seen.kept[rows])._asdict()
            entries |= {
                name: {"value": share, "images": len(rows), "real_images": len(self._real), "neighbours": NEIGHBOURS}
                for name, share in found.items()
            }
        else:
            reason = f"{min(len(rows), len(self._real))} images of a kind; needs more than {NEIGHBOURS}"
            self.left_out |= {name: reason for name in ("precision", "recall", "density", "coverage")}
        limit = extrapolate_frechet(seen.kept, self.reference.moments, self.seed)
        if limit is None:
            least = smallest_sample(seen.kept.shape[1])
            self.left_out["frechet_of_infinite"] = f"{images} images; needs {least} for {seen.kept.shape[1]} features"
        else:
            entries["frechet_of_infinite"] = {
                "value": limit.value,
                "stderr": limit.stderr,
                "images": images,
                "sizes": list(limit.sizes),
            }
        entries["penalised_frechet"] = self._penalised(seen, images)
        return entries

    def _penalised(self, seen: FeatureStatistics, images: int) -> dict[str, Any]:
        near = memorization.cosine_distance(seen.kept, self.reference.kept)
        real = near if seen is self.floor else self._floor["penalised_frechet"]["cosine_distance"]
        distance = frechet_distance(seen.moments, self.reference.moments)
        value = memorization.penalized_distance(distance, near, real)
        return {"value": value, "images": images, "cosine_distance": near, "formula": memorization.FORMULA}

    def memorisation(self, seen: FeatureStatistics, samples: ImageDataset) -> dict[str, Any]:
        """How near samples come to training images in feature and in pixel space, beside the held-out images."""
        self.log(f"evaluate: nearest of {len(self.train)} training images in pixels and features")
        train = self.reference.kept
        in_features = [memorization.nearest_by_features(each.kept, train) for each in (seen, self.floor)]
        in_pixels = memorization.nearest_by_pixels(samples, self.held_out, self.train)
        spaces = {"features": in_features, "pixels": in_pixels}
        found = {name: memorization.distance_summary(*(near.distances for near in pair)) for name, pair in spaces.items()}
        ours = {name: (pair[0], found[name]["held_out_median"]) for name, pair in spaces.items()}
        return {**found, "closest": memorization.closest_samples(ours["features"], ours["pixels"])}

    def per_class(self, seen: FeatureStatistics, samples: ImageDataset, told: bool = False) -> dict[str, Any] | None:
        """The Fréchet distance of each class's samples to its training images, and the share classified right.

        The distance only of classes with CLASS_ROWS images a dimension; the others are in left_out, with their number of
        samples. The share where told: the network knows these classes. None without labels.
        """
        if samples.labels is None or self.train.labels is None or self.held_out.labels is None:
            return None
        least = CLASS_ROWS * seen.kept.shape[1]
        table: dict[str, Any] = {"fewest_images": least, "classes": {}, "left_out": {}}
        for c, name in enumerate(self.train.class_names):
            parts = [
                each.kept[images.labels == c]
                for each, images in ((seen, samples), (self.floor, self.held_out), (self.reference, self.train))
                if images.labels is not None
            ]
            if not len(parts[0]):
                continue
            if min(len(parts[0]), len(parts[2])) < least:
                table["left_out"][name] = min(len(parts[0]), len(parts[2]))
                continue
            ours, floor, real = (Moments(part.shape[1]).update(part) for part in parts)
            table["classes"][name] = {
                "value": frechet_distance(ours, real),
                "images": ours.count,
                "floor": frechet_distance(floor, real) if floor.count >= least else None,
                "floor_images": floor.count,
            }
        if told and seen.right is not None and self.floor.right is not None:
            table["label_accuracy"] = self._recognised(seen.right, samples)
        return table

    def _recognised(self, right: Tensor, samples: ImageDataset) -> Entries:
        """{class: {value, images, floor, floor_images}}: shares of its samples and of held-out images classified right."""
        found: Entries = {}
        for c, name in enumerate(self.train.class_names):
            ours, real = right[samples.labels == c], self.floor.right[self.held_out.labels == c]
            if len(ours):
                share = real.double().mean().item() if len(real) else None
                found[name] = {"value": ours.double().mean().item(), "images": len(ours)}
                found[name] |= {"floor": share, "floor_images": len(real)}
        return found


def mean_over_seeds(found: Sequence[Mapping[str, dict[str, Any]]]) -> Entries:
    """Entries of several sets of samples as one: value is the mean over seeds; by_seed and seed_spread say how they differ.

    seed_spread: standard deviation. What is not a value is the first set's.
    """
    first, *others = found
    if not others:
        return {name: dict(entry) for name, entry in first.items()}
    merged: Entries = {}
    for name, entry in first.items():
        values = torch.tensor([each[name]["value"] for each in found], dtype=torch.float64)
        merged[name] = entry | {
            "value": values.mean().item(),
            "by_seed": values.tolist(),
            "seed_spread": values.std(correction=1).item(),
        }
    return merged


class ReferenceStatistics:
    """A data set seen once by a feature network, to measure many sets of samples against.

    floor: the distance of `count` real test images, with the class counts of labels (None: of any class).
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
        self.floor = self._distance(subset(without_padding(test), rows))[0]

    def measure(self, samples: np.ndarray, labels: np.ndarray | None) -> tuple[float, float | None]:
        """(Fréchet distance to the whole of train, label accuracy) of uint8 samples [N, H, W, C].

        The accuracy is None without labels, and where the network was trained on other classes.
        """
        distance, accuracy = self._distance(sample_set(samples, labels, self.train))
        return distance, accuracy if self.net.info.get("class_names") == list(self.train.class_names) else None

    def _distance(self, images: ImageDataset) -> tuple[float, float | None]:
        seen = feature_statistics(self.net, read_batches(images, self.batch))
        return frechet_distance(seen.moments, self.reference.moments), seen.accuracy
