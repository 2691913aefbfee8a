"""A small classifier whose features measure images, so that no network has to be downloaded.

It serves as the feature space of the Fréchet distance, as the perceptual loss of stage 1, and as the classifier of label
accuracy and of the classification accuracy score. A number measured with it carries the network's name. It is never
called "FID", which means the Inception network.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import fuse_conv_bn_eval

from latentdiff.errors import UserError
from latentdiff.utils.weights import SavedNetwork, fingerprint

MIN_SIDE = 16


class Convolution(nn.Module):
    """A 3x3 convolution, followed by batch normalisation while the network is trained. [B, i, h, w] -> [B, o, h', w']."""

    def __init__(self, inputs: int, outputs: int, stride: int, normed: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=not normed)
        self.norm = nn.BatchNorm2d(outputs) if normed else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x))

    def fold(self) -> None:
        """Merge the normalisation, with its running statistics, into the convolution's weight and bias."""
        if isinstance(self.norm, nn.BatchNorm2d):
            self.conv = fuse_conv_bn_eval(self.conv.eval(), self.norm.eval())
            self.norm = nn.Identity()


class ResidualBlock(nn.Module):
    """Two convolutions with a skip connection; ReLU between and after. [B, c, h, w] -> [B, c, h, w]."""

    def __init__(self, width: int, normed: bool) -> None:
        super().__init__()
        self.first = Convolution(width, width, 1, normed)
        self.second = Convolution(width, width, 1, normed)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.second(F.relu(self.first(x))))


class FeatureSpace(nn.Module):
    """A frozen network that turns images into feature vectors, in which sets of images are compared.

    Attributes:
        name: what numbers measured in this space are labelled with.
        channels: image channels that it takes.
        dim: length of a feature vector.
        info: facts about it; class_names where it has a `head` that tells these classes. Without them a head means nothing.
    """

    name: str
    info: dict[str, Any]
    channels: int
    dim: int

    def features(self, x: Tensor) -> Tensor:
        """[B, dim] of images [B, channels, H, W] in [-1, 1]."""
        raise NotImplementedError

    def fingerprint(self) -> str:
        """Hex sha256 over everything that the features depend on."""
        raise NotImplementedError


class FoldableNetwork(SavedNetwork):
    """A network of `Convolution`s whose batch normalisation is merged into them before it is saved."""

    def fold(self) -> Self:
        """Merge batch normalisation into the convolutions, in place; returns self, in eval mode."""
        for module in self.modules():
            if isinstance(module, Convolution):
                module.fold()
        return self.eval()

    def save(self, folder: str | Path) -> None:
        """As `SavedNetwork.save`. ValueError where the network still has its batch normalisation: fold() it first."""
        if any(isinstance(module, nn.BatchNorm2d) for module in self.modules()):
            raise ValueError(f"fold() the {self.kind} before saving it")
        super().save(folder)


class FeatureNet(FoldableNetwork, FeatureSpace):
    """A convolutional classifier of images [B, channels, H, W] in [-1, 1], any H, W >= 16.

    Three stages at full, half and quarter resolution, then a mean over positions. It is trained with batch normalisation
    (normed). fold() merges that into the convolutions; then an image's features depend on no other image of the batch,
    and train() changes nothing.

    Args:
        channels: image channels, 1 (grey) or 3 (RGB).
        classes: number of classes of the head.
        widths: channels of the three stages; the last is the feature dimension D.
        name: what numbers measured in this space are labelled with.
        info: facts that are saved with the weights (class names, accuracy, how it was trained); JSON values.
        normed: with batch normalisation, for training.

    Raises:
        UserError: not three widths.
    """

    kind = "feature network"
    arguments = ("name", "channels", "classes", "widths", "info")

    def __init__(
        self,
        channels: int = 1,
        classes: int = 10,
        widths: Sequence[int] = (32, 64, 128),
        name: str = "features",
        info: dict[str, Any] | None = None,
        normed: bool = False,
    ) -> None:
        super().__init__()
        if len(widths) != 3:
            raise UserError(f"feature network: widths needs three numbers, one a stage, got {list(widths)}")
        self.channels, self.classes, self.widths = channels, classes, tuple(widths)
        self.name, self.info = name, dict(info or {})
        a, b, c = self.widths
        self.dim = c
        self.stage1 = nn.Sequential(Convolution(channels, a, 1, normed), nn.ReLU())
        self.stage2 = nn.Sequential(Convolution(a, b, 2, normed), nn.ReLU(), ResidualBlock(b, normed))
        self.stage3 = nn.Sequential(Convolution(b, c, 2, normed), nn.ReLU(), ResidualBlock(c, normed))
        self.head = nn.Linear(c, classes)

    def maps(self, x: Tensor) -> list[Tensor]:
        """Activations after the three stages: [B, w1, H, W], [B, w2, H/2, W/2], [B, w3, H/4, W/4], sides rounded up.

        x: images [B, channels, H, W] in [-1, 1]. ValueError for other channels, or sides below 16.
        """
        if x.ndim != 4 or x.shape[1] != self.channels or min(x.shape[2:]) < MIN_SIDE:
            raise ValueError(
                f"feature network {self.name!r} takes [B, {self.channels}, H, W] with H, W >= {MIN_SIDE}, got {list(x.shape)}"
            )
        first = self.stage1(x)
        second = self.stage2(first)
        return [first, second, self.stage3(second)]

    def features(self, x: Tensor) -> Tensor:
        """The last activations averaged over positions, [B, D]: the vectors of the Fréchet distance."""
        return self.maps(x)[-1].mean(dim=(2, 3))

    def forward(self, x: Tensor) -> Tensor:
        """Class logits [B, classes]."""
        return self.head(self.features(x))

    def fingerprint(self) -> str:
        """Hex sha256 over structure and weights, without the name: equal for networks that compute the same."""
        return fingerprint(self, (self.channels, self.classes, self.widths))


def load_features(folder: str | Path, device: str | torch.device = "cpu") -> FeatureNet:
    """The feature network saved in a folder: frozen, in eval mode, on device. UserError as `SavedNetwork.load`."""
    return FeatureNet.load(folder, device)


def match_channels(images: Tensor, channels: int) -> Tensor:
    """Images [B, C, H, W] with the channels that a network takes: grey is repeated to RGB, RGB is averaged to grey.

    Raises:
        ValueError: C and channels differ, and neither is 1.
    """
    if images.shape[1] == channels:
        return images
    if images.shape[1] == 1:
        return images.expand(-1, channels, -1, -1)
    if channels == 1:
        return images.mean(dim=1, keepdim=True)
    raise ValueError(f"cannot show images {list(images.shape)} to a network of {channels} channels")


@torch.no_grad()
def extract(net: FeatureSpace, images: Tensor) -> tuple[Tensor, Tensor | None]:
    """(features [B, D], predicted classes int64 [B]) of images [B, C, H, W] in [-1, 1], both on the CPU.

    The classes are None for a network without a head, or with one that names no classes. ValueError as `match_channels`.
    """
    device = next(net.parameters()).device
    features = net.features(match_channels(images.to(device), net.channels))  # [B, D]
    head = getattr(net, "head", None) if net.info.get("class_names") else None
    return features.cpu(), None if head is None else head(features).argmax(dim=1).cpu()
