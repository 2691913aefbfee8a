"""Which images are held out of training: a fixed function of the data set and the seed."""

import numpy as np
import torch

from latentdiff.data.image_source import ImageSource
from latentdiff.data.shuffling import permutation
from latentdiff.errors import UserError

HELD_OUT_RULES = ("per_class", "random")


def held_out(source: ImageSource, share: float, seed: int, rule: str = "per_class") -> tuple[torch.Tensor, torch.Tensor]:
    """Which images of a source are trained on and which are held out: (train_indices, held_out_indices), int64, ascending.

    The result depends on the number of images, their labels and the arguments, and on nothing else.

    Args:
        source: the images.
        share: of all images that are held out, in (0, 1).
        seed: any integer.
        rule: "per_class" holds out about the share of each class, but never a class's only image. So it holds out none where
            every class has one image. "random", the rule of earlier versions, draws from all images alike. Without labels
            the two are the same: at least one image is held out and at least one is kept.

    Raises:
        UserError: an unknown rule, a share that is not in (0, 1), or fewer than two images.
    """
    n = len(source)
    if rule not in HELD_OUT_RULES:
        raise UserError(f"held_out_rule '{rule}': valid are {', '.join(HELD_OUT_RULES)}")
    if not 0 < share < 1 or n < 2:
        raise UserError(f"held-out share {share:g} of {n} images: needs a share between 0 and 1 and at least 2 images")
    order = permutation(n, seed, "held-out")
    count = min(n - 1, max(1, round(share * n)))
    if rule == "random" or source.labels is None:
        return order[count:].sort().values, order[:count].sort().values
    labels = source.labels[order].numpy()
    quotas = _per_class(np.bincount(labels), share, count, seed)
    taken = np.zeros(n, dtype=bool)
    for c, quota in enumerate(quotas):
        taken[(labels == c).nonzero()[0][:quota]] = True
    apart = torch.from_numpy(taken)
    return order[~apart].sort().values, order[apart].sort().values


def _per_class(sizes: np.ndarray, share: float, count: int, seed: int) -> np.ndarray:
    """How many images of each class are held out, int64 [K]: `count` in all, if every class can keep one image.

    sizes: int64 [K], images of each class. Each class gives the whole part of its share; the rest of `count` comes from the
    classes with the largest remainders.
    """
    spare = np.maximum(sizes - 1, 0)
    quotas = np.minimum(np.floor(share * sizes).astype(np.int64), spare)
    places = np.empty(len(sizes), dtype=np.int64)
    places[permutation(len(sizes), seed, "held-out classes").numpy()] = np.arange(len(sizes))  # the order of equal remainders
    while quotas.sum() < count and (quotas < spare).any():
        rest = np.where(quotas < spare, share * sizes - quotas, -np.inf)
        quotas[np.lexsort((places, -rest))[0]] += 1
    return quotas
