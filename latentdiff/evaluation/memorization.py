"""Did a model copy its training images? How near samples come to them, beside how near held-out real images come."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d
from tqdm import tqdm

from latentdiff.data.datasets import ImageDataset
from latentdiff.evaluation.precision_recall import BLOCK, nearest_rows

PIXELS = 4096  # values of an image that are compared at most; larger ones are averaged over squares first
PERCENTILES = (1, 5, 50)
WORST = 8
PENALTY = 1e-3  # of the held-out images' distance: keeps the penalty of perfect copies finite, at most 1000
FORMULA = (
    "Fréchet distance x max(1, r / (s + r/1000)); s, r: mean cosine distance of samples and of held-out images to their "
    "nearest training image in feature space; after 2106.03062 section 3, whose factor is 1/s below a fixed threshold"
)


class NearestImages:
    """Distances [N] to the nearest training image, and which one that is, int64 [N]."""

    def __init__(self, distances: Tensor, rows: Tensor):
        self.distances, self.rows = distances, rows


def nearest_by_features(features: Tensor, train: Tensor) -> NearestImages:
    """Euclidean, of features [N, D] to those of the training images [T, D], in float64."""
    centre = train.double().mean(dim=0)
    rows = nearest_rows(features.double() - centre, (part.double() - centre for part in train.split(BLOCK)))
    return NearestImages((features.double() - train[rows].double()).norm(dim=1), rows)


def cosine_distance(features: Tensor, train: Tensor) -> float:
    """Mean over features [N, D] of 1 - cosine to the training features [T, D] that are nearest in this sense; float64.

    The memorisation distance of 2106.03062 (section 3), where features are not negative: it takes the cosine's modulus.
    """
    unit = [torch.nn.functional.normalize(rows.double(), dim=1) for rows in (features, train)]
    found = nearest_rows(unit[0], unit[1].split(BLOCK))
    return ((unit[0] - unit[1][found]).square().sum(dim=1) / 2).mean().item()


def nearest_by_pixels(images: ImageDataset, others: ImageDataset, train: ImageDataset) -> tuple[NearestImages, NearestImages]:
    """Of two sets of images in one pass through train: root mean square over pixels whose range is 1, in float32."""
    queries = torch.cat([rows for dataset in (images, others) for rows in pixel_rows(dataset)])  # [N, P]
    found = nearest_rows(queries, pixel_rows(train, "nearest in pixels"))
    distances = torch.cat(
        [
            (part - _flat(train.batch(rows)[0])).square().mean(dim=1).sqrt() / 2  # from [-1, 1] to a range of 1
            for part, rows in zip(queries.split(BLOCK), found.split(BLOCK), strict=True)
        ]
    )
    count = len(images)
    return NearestImages(distances[:count], found[:count]), NearestImages(distances[count:], found[count:])


def pixel_rows(dataset: ImageDataset, doing: str = "") -> Iterator[Tensor]:
    """Images as rows of at most PIXELS values in [-1, 1], BLOCK of them at a time: float32 [b, P].

    doing: shown with a bar on stderr where it takes a while.
    """
    with tqdm(total=len(dataset), unit="image", desc=doing, delay=0.5, disable=not doing) as bar:
        for start in range(0, len(dataset), BLOCK):
            rows = range(start, min(start + BLOCK, len(dataset)))
            yield _flat(dataset.batch(rows)[0])
            bar.update(len(rows))


def compared_size(channels: int, height: int, width: int) -> tuple[int, int, int]:
    """(side of the squares that pixels are averaged over, height and width that are left)."""
    side = 1
    while channels * -(-height // side) * -(-width // side) > PIXELS and side < max(height, width):
        side += 1
    return side, -(-height // side), -(-width // side)


def _flat(images: Tensor) -> Tensor:
    """[B, C, H, W] -> [B, P]"""
    side, _, _ = compared_size(*images.shape[1:])
    return (images if side == 1 else avg_pool2d(images, side, ceil_mode=True)).flatten(1)


def distance_summary(samples: Tensor, held_out: Tensor) -> dict[str, Any]:
    """How distances of samples [N] to training images stand against those of held-out images [n].

    share: of samples that are closer to a training image than so many per cent of the held-out images are.  A model that
    copies nothing has about as many per cent; held_out: the held-out images' own share, which ties can move.
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
    features: tuple[NearestImages, float], pixels: tuple[NearestImages, float], count: int = WORST
) -> list[dict[str, Any]]:
    """The samples that are closest to a training image in either space, in units of the held-out images' median.

    features, pixels: nearness of the samples, and that median.
    """
    scales = [median or 1.0 for _, median in (features, pixels)]
    ratios = [near.distances.double() / scale for (near, _), scale in zip((features, pixels), scales, strict=True)]
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
    """FORMULA: a Fréchet distance times what closeness to training images costs."""
    return distance * max(1.0, held_out / (samples + PENALTY * held_out)) if held_out > 0 else distance
