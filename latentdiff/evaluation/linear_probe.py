"""A linear probe: logistic regression on features of real images, for networks that do not know the classes of the data.

It says whether an image shows the class that was asked for, in any feature space ("Understanding intermediate layers using
linear classifier probes", arXiv 1610.01644). Beside its accuracy on samples stands that on held-out real images, which is
what the probe can tell apart at all.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from latentdiff.data.shuffling import permutation

VERSION = 1  # of the fit; accuracies of different versions cannot be compared
STRENGTHS = (1e-4, 1e-3, 1e-2, 1e-1)  # of the L2 penalty, tried on images that are set aside
USUAL_STRENGTH = 1e-2  # where there are too few images to set any aside
ASIDE = 0.2  # the share of the images of each class on which the strength is chosen
FEWEST_ASIDE = 20  # images set aside, or the choice would be chance
STEPS = 100  # of L-BFGS, at most
MOST_IMAGES = 10_000  # that it is fitted to


@dataclass(frozen=True)
class LinearProbe:
    """A classifier of features.

    Attributes:
        mean: of the training features, float64 [D].
        std: their standard deviation, [D]; 1 where a feature never changes.
        weight: float64 [classes, D], for standardised features.
        bias: float64 [classes].
        strength: of the L2 penalty.
        images: number of images that it was fitted to.
    """

    mean: Tensor
    std: Tensor
    weight: Tensor
    bias: Tensor
    strength: float
    images: int

    def predict(self, features: Tensor) -> Tensor:
        """The classes of features [N, D], int64 [N]."""
        return F.linear((features.double() - self.mean) / self.std, self.weight, self.bias).argmax(dim=1)

    def correct(self, features: Tensor, labels: Tensor) -> Tensor:
        """Which of features [N, D] are classified as their labels [N] say, bool [N]."""
        return self.predict(features) == labels

    def describe(self) -> str:
        """What it is, in words. Accuracies of probes that are described alike can be compared."""
        return f"linear probe {VERSION} on the features of {self.images} training images"

    def accuracy(self, features: Tensor, labels: Tensor) -> float:
        """The share of features [N, D] that are classified as their labels [N] say. ValueError for N = 0."""
        if not len(labels):
            raise ValueError("an accuracy needs at least one image")
        return self.correct(features, labels).double().mean().item()

    def accuracy_for(self, features: Tensor, labels: Tensor, wanted: Tensor) -> tuple[float, int]:
        """(accuracy on real images in another mix of classes, number of the images that it is of).

        The accuracy of each class is taken over all its images. So it is more certain than that of as many images of each
        class as the mix asks for, of which the rarest class may have few.

        Args:
            features: of the images, [N, D].
            labels: their classes, int64 [N].
            wanted: classes in the mix that is asked for, int64 [M], such as those of samples. Those without images are left
                out.

        Raises:
            ValueError: no image is of such a class.
        """
        correct, values, weights, count = self.correct(features, labels).double(), [], [], 0
        for c in wanted.unique().tolist():
            members = labels == c
            if members.any():
                values.append(correct[members].mean().item())
                weights.append(int((wanted == c).sum()))
                count += int(members.sum())
        if not count:
            raise ValueError("no image is of a class that is asked for")
        return sum(value * weight for value, weight in zip(values, weights, strict=True)) / sum(weights), count


def fit_probe(features: Tensor, labels: Tensor, classes: int, seed: int = 0) -> LinearProbe:
    """Multinomial logistic regression, by L-BFGS in float64, on at most MOST_IMAGES images.

    Each class weighs the same, however many images it has: samples are drawn evenly over the classes. The L2 penalty is the
    one of STRENGTHS that serves best on a fifth of each class; then all images are fitted.

    Args:
        features: of the real training images, [N, D].
        labels: their classes, int64 [N].
        classes: number of classes; some may have no image.
        seed: draws the images where there are more, and those that are set aside.

    Raises:
        ValueError: no images, or as many labels as features are not there.
    """
    if not len(features) or labels.shape != (len(features),):
        raise ValueError(f"a probe needs features [N, D] and labels [N], got {list(features.shape)} and {list(labels.shape)}")
    if len(features) > MOST_IMAGES:
        drawn = permutation(len(features), seed, "linear probe's images")[:MOST_IMAGES]
        features, labels = features[drawn], labels[drawn]
    mean = features.double().mean(dim=0)
    std = features.double().std(dim=0, correction=0)
    std = torch.where(std > 0, std, torch.ones_like(std))
    rows = (features.double() - mean) / std

    # The strength of the penalty, by images that the fit does not see
    strength, aside = USUAL_STRENGTH, _set_aside(labels, seed)
    if int(aside.sum()) >= FEWEST_ASIDE:
        losses, start = [], None
        for each in reversed(STRENGTHS):
            start = _fit(rows[~aside], labels[~aside], classes, each, start)
            losses.append(_loss(rows[aside], labels[aside], classes, *start).item())
        strength = STRENGTHS[::-1][losses.index(min(losses))]
    return LinearProbe(mean, std, *_fit(rows, labels, classes, strength), strength, len(rows))


def _set_aside(labels: Tensor, seed: int) -> Tensor:
    """Which images are set aside, bool [N]: a share of each class, rounded down."""
    aside = torch.zeros(len(labels), dtype=torch.bool)
    order = permutation(len(labels), seed, "linear probe")
    for c in labels.unique().tolist():
        members = order[labels[order] == c]
        aside[members[: int(ASIDE * len(members))]] = True
    return aside


def _fit(
    rows: Tensor, labels: Tensor, classes: int, strength: float, start: tuple[Tensor, Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """(weight [classes, D], bias [classes]) of the smallest loss with a penalty. start: where to begin."""
    shape = (classes, rows.shape[1])
    weight, bias = start or (rows.new_zeros(shape), rows.new_zeros(classes))
    weight, bias = weight.clone().requires_grad_(), bias.clone().requires_grad_()
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=STEPS, tolerance_grad=1e-5, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = _loss(rows, labels, classes, weight, bias) + strength / 2 * weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return weight.detach(), bias.detach()


def _loss(rows: Tensor, labels: Tensor, classes: int, weight: Tensor, bias: Tensor) -> Tensor:
    """The mean cross-entropy of rows [N, D], each class with the same weight."""
    counts = torch.bincount(labels, minlength=classes).double()
    shares = torch.where(counts > 0, 1 / counts.clamp(min=1), counts)
    return F.cross_entropy(F.linear(rows, weight, bias), labels, shares)
