"""Did a model copy its training images? How close samples come to them, compared with held-out real images."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d, normalize

from latentdiff.data.datasets import ImageDataset
from latentdiff.evaluation.precision_recall import BLOCK, nearest_rows
from latentdiff.utils import progress_bars

PIXELS = 4096  # at most so many values of an image are compared; larger images are averaged over squares first
PERCENTILES = (1, 5, 50)
CLOSEST = 8  # samples that are named
PENALTY = 1e-3  # times the held-out images' distance: keeps the penalty of perfect copies finite, at most 1000
FORMULA = (
    "Fréchet distance x max(1, r / (s + r/1000)); s, r: mean cosine distance of samples and of held-out images to their "
    "nearest training image in feature space; after 2106.03062 section 3, whose factor is 1/s below a fixed threshold"
)


class NearestImages(NamedTuple):
    """For each of N images the distance to its nearest training image, [N], and that image's index, int64 [N]."""

    distances: Tensor
    rows: Tensor


def nearest_by_features(features: Tensor, train: Tensor) -> NearestImages:
    """The nearest of the training features [T, D] to each of the features [N, D]; Euclidean distances in float64."""
    centre = train.double().mean(dim=0)
    rows = nearest_rows(features.double() - centre, (part.double() - centre for part in train.split(BLOCK)))
    return NearestImages((features.double() - train[rows].double()).norm(dim=1), rows)


def cosine_distance(features: Tensor, train: Tensor) -> float:
    """The mean cosine distance of features [N, D] to the nearest of the training features [T, D], from 0 to 2.

    The cosine distance of two features is 1 minus the cosine of the angle between them. It is computed in float64. Nearest is
    the training feature with the smallest cosine distance.

    "Memorization-informed Fréchet Inception Distance" (arXiv 2106.03062, section 3) takes the absolute value of the cosine.
    For features without negative entries that is the same.
    """
    unit, unit_train = (normalize(rows.double(), dim=1) for rows in (features, train))
    rows = nearest_rows(unit, unit_train.split(BLOCK))
    return ((unit - unit_train[rows]).square().sum(dim=1) / 2).mean().item()


def nearest_by_pixels(images: ImageDataset, others: ImageDataset, train: ImageDataset) -> tuple[NearestImages, NearestImages]:
    """The nearest training images of two sets of images, found in one pass through train.

    Distances are root mean square differences of pixels whose range is 1, in float32. Large images are averaged over
    squares first, see `compared_size`.
    """
    queries = torch.cat([rows for dataset in (images, others) for rows in pixel_rows(dataset)])  # [N, P]
    nearest = nearest_rows(queries, pixel_rows(train, "nearest in pixels"))
    distances = torch.cat(
        [
            (part - compared(train.batch(rows)[0])).square().mean(dim=1).sqrt() / 2  # from [-1, 1] to a range of 1
            for part, rows in zip(queries.split(BLOCK), nearest.split(BLOCK), strict=True)
        ]
    )
    count = len(images)
    return NearestImages(distances[:count], nearest[:count]), NearestImages(distances[count:], nearest[count:])


def pixel_rows(dataset: ImageDataset, doing: str = "") -> Iterator[Tensor]:
    """Yield images as rows of at most PIXELS values in [-1, 1], BLOCK at a time: float32 [b, P].

    doing: the text of a progress bar on stderr, shown if reading takes a while; "" shows none.
    """
    with progress_bars.bar(total=len(dataset), unit="image", desc=doing, delay=0.5, disable=not doing) as bar:
        for start in range(0, len(dataset), BLOCK):
            rows = range(start, min(start + BLOCK, len(dataset)))
            yield compared(dataset.batch(rows)[0])
            bar.update(len(rows))


def compared_size(channels: int, height: int, width: int) -> tuple[int, int, int]:
    """The side of the squares over which pixels are averaged, and the height and width of what is then compared."""
    side = 1
    while channels * -(-height // side) * -(-width // side) > PIXELS and side < max(height, width):
        side += 1
    return side, -(-height // side), -(-width // side)


def compared(images: Tensor) -> Tensor:
    """What is compared of images [B, C, H, W]: their pixels [B, P], averaged over squares."""
    side, _, _ = compared_size(*images.shape[1:])
    return (images if side == 1 else avg_pool2d(images, side, ceil_mode=True)).flatten(1)


def distance_summary(samples: Tensor, held_out: Tensor) -> dict[str, Any]:
    """Compare the distances of samples [N] to training images with those of held-out images [n].

    Returns:
        {"images", "median", "held_out_images", "held_out_median", "closer_than_held_out"}. The last has for each percentile
        p of PERCENTILES: distance, the p-th percentile of held_out; share, of the samples that are closer than that;
        held_out, the same share of held-out images (ties can move it from p %). A model that copies nothing has a share of
        about p %.
    """
    limits = [held_out.double().quantile(p / 100).item() for p in PERCENTILES]
    return {
        "images": len(samples),
        "median": samples.median().item(),
        "held_out_images": len(held_out),
        "held_out_median": held_out.median().item(),
        "closer_than_held_out": [
            {
                "percentile": p,
                "distance": limit,
                "share": (samples < limit).double().mean().item(),
                "held_out": (held_out < limit).double().mean().item(),
            }
            for p, limit in zip(PERCENTILES, limits, strict=True)
        ],
    }


def closest_samples(
    features: tuple[NearestImages, float], pixels: tuple[NearestImages, float], count: int = CLOSEST
) -> list[dict[str, Any]]:
    """The `count` samples that are closest to a training image in either space, the closest first.

    Args:
        features: the samples' nearest images by features, and the median distance of held-out images, which is the unit.
        pixels: the same by pixels.
        count: how many.

    Returns:
        For each: sample (its index), feature_distance, feature_neighbour (the training image's index), pixel_distance,
        pixel_neighbour.
    """
    ratios = [nearest.distances.double() / (median or 1.0) for nearest, median in (features, pixels)]
    order = torch.minimum(*ratios).sort(stable=True).indices[:count].tolist()
    return [
        {
            "sample": i,
            "feature_distance": features[0].distances[i].item(),
            "feature_neighbour": int(features[0].rows[i]),
            "pixel_distance": pixels[0].distances[i].item(),
            "pixel_neighbour": int(pixels[0].rows[i]),
        }
        for i in order
    ]


def penalized_distance(distance: float, samples: float, held_out: float) -> float:
    """A Fréchet distance times a penalty for closeness to training images, by FORMULA.

    samples, held_out: the mean cosine distances s and r.
    """
    return distance * max(1.0, held_out / (samples + PENALTY * held_out)) if held_out > 0 else distance
