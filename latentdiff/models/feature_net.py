"""A small classifier whose features measure images without a downloaded network.

It serves three purposes: the space of the offline Fréchet distance, the perceptual loss of stage 1, and the
classifier behind label accuracy and the classification accuracy score. A number measured in it carries the
network's name; it is never a plain "FID", which means Inception.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import fuse_conv_bn_eval

from latentdiff.errors import UserError
from latentdiff.utils.weights import fingerprint, load_network, save_network

MIN_SIDE = 16


class Convolution(nn.Module):
    """3x3 convolution, then batch normalisation while the network is being trained. [B, i, h, w] -> [B, o, h', w']."""

    def __init__(self, inputs: int, outputs: int, stride: int, normed: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=not normed)
        self.norm = nn.BatchNorm2d(outputs) if normed else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x))

    def fold(self) -> None:
        """Put the normalisation with its running statistics into the convolution's weight and bias."""
        if isinstance(self.norm, nn.BatchNorm2d):
            self.conv = fuse_conv_bn_eval(self.conv.eval(), self.norm.eval())
            self.norm = nn.Identity()


class ResidualBlock(nn.Module):
    """Two convolutions around a skip, ReLU between and after. [B, c, h, w] -> [B, c, h, w]."""

    def __init__(self, width: int, normed: bool) -> None:
        super().__init__()
        self.first = Convolution(width, width, 1, normed)
        self.second = Convolution(width, width, 1, normed)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.second(F.relu(self.first(x))))


class FeatureSpace(nn.Module):
    """What images are measured in: a frozen network from images in [-1, 1] to vectors, and what numbers from it are called.

    channels: that it takes. dim: length of a vector. info: facts; class_names where it has a `head` of these classes.
    """

    name: str
    info: dict[str, Any]
    channels: int
    dim: int

    def features(self, x: Tensor) -> Tensor:
        """[B, dim] of images [B, channels, H, W] in [-1, 1]."""
        raise NotImplementedError

    def fingerprint(self) -> str:
        """Hex sha256 over all that the vectors depend on."""
        raise NotImplementedError


class FeatureNet(FeatureSpace):
    """A convolutional classifier of images [B, channels, H, W] in [-1, 1], any H, W >= 16.

    Three stages at full, half and quarter resolution, then a global mean. It is trained with batch normalisation
    (normed) and used without: fold() merges that into the convolutions, after which no output can depend on the rest
    of the batch and train() changes nothing.

    Args:
        channels: image channels, 1 (grey) or 3 (RGB).
        classes: number of classes of the head.
        widths: channels of the three stages; the last is the feature dimension D.
        name: what numbers measured in this space are labelled with.
        info: facts kept beside the weights (class names, accuracy, how trained); JSON values.
        normed: with batch normalisation, for training.
    """

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

    def fold(self) -> "FeatureNet":
        """Merge batch normalisation into the convolutions, in place; returns self, in eval mode."""
        for module in self.modules():
            if isinstance(module, Convolution):
                module.fold()
        return self.eval()

    def maps(self, x: Tensor) -> list[Tensor]:
        """Activations after the three stages: [B, w1, H, W], [B, w2, H/2, W/2], [B, w3, H/4, W/4] (rounded up)."""
        if x.ndim != 4 or x.shape[1] != self.channels or min(x.shape[2:]) < MIN_SIDE:
            raise ValueError(
                f"feature network {self.name!r} takes [B, {self.channels}, H, W] with H, W >= {MIN_SIDE}, got {list(x.shape)}"
            )
        first = self.stage1(x)
        second = self.stage2(first)
        return [first, second, self.stage3(second)]

    def features(self, x: Tensor) -> Tensor:
        """The pooled last activations, [B, D]: the space of the Fréchet distance."""
        return self.maps(x)[-1].mean(dim=(2, 3))

    def forward(self, x: Tensor) -> Tensor:
        """Class logits [B, classes]."""
        return self.head(self.features(x))

    def fingerprint(self) -> str:
        """Hex sha256 over structure and weights: equal for equal functions, whatever the name says."""
        return fingerprint(self, (self.channels, self.classes, self.widths))

    def save(self, folder: str | Path) -> None:
        """Write config.json and model.safetensors (float32) into folder; each file appears whole or not at all.

        Raises:
            ValueError: the network still has its batch normalisation; fold() it first.
        """
        if any(isinstance(module, nn.BatchNorm2d) for module in self.modules()):
            raise ValueError("fold() the feature network before saving it")
        config = {
            "_class_name": "FeatureNet",
            "name": self.name,
            "channels": self.channels,
            "classes": self.classes,
            "widths": list(self.widths),
            "info": self.info,
        }
        save_network(self, config, folder)


def load_features(folder: str | Path, device: str | torch.device = "cpu") -> FeatureNet:
    """The frozen feature network saved in folder, in eval mode on device.

    Raises:
        UserError: a file is missing, damaged, or does not describe a FeatureNet; the message names it.
    """

    def build(config: dict[str, Any]) -> FeatureNet:
        parts = {key: config[key] for key in ("channels", "classes", "name", "info")}
        return FeatureNet(widths=tuple(config["widths"]), **parts)

    return load_network(folder, build, "feature network", device)


def match_channels(images: Tensor, channels: int) -> Tensor:
    """Give images [B, C, H, W] the channels a network takes: grey is repeated to RGB, RGB is averaged to grey.

    Raises:
        ValueError: neither C nor channels is 1, so there is no stated rule.
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
    """Features [B, D] and, of a network with a head, predicted classes [B] (int64), on the CPU, of images in [-1, 1]."""
    device = next(net.parameters()).device
    features = net.features(match_channels(images.to(device), net.channels))  # [B, D]
    head = getattr(net, "head", None)
    return features.cpu(), None if head is None else head(features).argmax(dim=1).cpu()
