"""Perceptual distances: how different two images are in the feature maps of a frozen network.

Both classes are called as distance(reconstruction, images) -> [B], with images [B, C, H, W] in [-1, 1]. Gradients reach the
reconstruction, not the network. Where the network takes another number of channels than C, each channel is given to it as a
grey image, and the distances are averaged over channels. So a grey image becomes a grey RGB image, and of six channels none
is left out.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, nn

from latentdiff.errors import UserError


class MapsNetwork(Protocol):
    """What `Perceptual` needs from a network: the image channels it takes, and its feature maps, each [B, c, h, w]."""

    channels: int

    def maps(self, images: Tensor) -> list[Tensor]: ...


class Perceptual(nn.Module):
    """LPIPS (arXiv:1801.03924, eq. 1) in the feature maps of `net`, with equal weights for all maps and channels.

    Feature vectors are scaled to unit length at every position. Their squared difference is summed over channels and
    averaged over positions and maps: 0 for equal images, at most 4.

    net: an nn.Module with `channels` and `maps`, such as a FeatureNet. It is frozen and stays in eval mode.
    """

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net.eval().requires_grad_(False)

    def train(self, mode: bool = True) -> Perceptual:
        super().train(mode)
        self.net.eval()
        return self

    def forward(self, reconstruction: Tensor, images: Tensor) -> Tensor:
        batch = _checked_batch(reconstruction, images)
        net: MapsNetwork = self.net  # type: ignore[assignment]
        with torch.no_grad():
            targets = net.maps(_to_channels(images, net.channels))
        maps = net.maps(_to_channels(reconstruction, net.channels))
        per_map = [_unit_distance(a, b) for a, b in zip(maps, targets, strict=True)]
        return torch.stack(per_map).mean(0).view(batch, -1).mean(1)  # [B]


class Lpips(nn.Module):
    """LPIPS (arXiv:1801.03924) with its trained weights, by the package `lpips`, which downloads its network on first use.

    net: a network of lpips: vgg, alex or squeeze.

    Raises:
        UserError: the package is missing, or its weights can be neither found nor downloaded.
    """

    def __init__(self, net: str = "vgg") -> None:
        super().__init__()
        instead = "or give the folder of a feature network (latentdiff train .../features.yaml) instead"
        try:
            import lpips
        except ImportError as error:
            raise UserError(f"perceptual: lpips needs the package lpips (pip install lpips), {instead}") from error
        try:
            self.net = lpips.LPIPS(net=net, verbose=False).eval().requires_grad_(False)
        except (OSError, RuntimeError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise UserError(f"perceptual: the weights of lpips ({net}) cannot be loaded: {reason}; {instead}") from error

    def train(self, mode: bool = True) -> Lpips:
        super().train(mode)
        self.net.eval()
        return self

    def forward(self, reconstruction: Tensor, images: Tensor) -> Tensor:
        batch = _checked_batch(reconstruction, images)
        distances = self.net(_to_channels(reconstruction, 3), _to_channels(images, 3))
        return distances.float().view(batch, -1).mean(1)  # [B]


def _checked_batch(reconstruction: Tensor, images: Tensor) -> int:
    if reconstruction.shape != images.shape:
        raise ValueError(f"shapes differ: {tuple(reconstruction.shape)} and {tuple(images.shape)}")
    return images.shape[0]


def _to_channels(images: Tensor, channels: int) -> Tensor:
    """[B, C, H, W] -> [B, channels, H, W], or [B * C, channels, H, W] with each channel as a grey image."""
    if images.shape[1] == channels:
        return images
    return images.flatten(0, 1).unsqueeze(1).expand(-1, channels, -1, -1)


def _unit_distance(a: Tensor, b: Tensor) -> Tensor:
    """Squared distance of feature vectors scaled to unit length, averaged over positions: two of [N, c, h, w] -> [N]."""
    # The constant bounds the gradient where all channels are near zero, as in an empty background
    a, b = (m.to(torch.promote_types(m.dtype, torch.float32)) for m in (a, b))
    a, b = (m * torch.rsqrt(m.square().sum(1, keepdim=True) + 1e-4) for m in (a, b))
    return (a - b).square().sum(1).mean((1, 2))  # [N]
