"""Perceptual distances: how far apart two images are in the feature maps of a frozen network.

Both classes here are called as distance(reconstruction, images) -> [B], images [B, C, H, W] in [-1, 1]. The gradient
reaches the reconstruction and never the network. Rule for channels: when C is what the network takes, images go in
as they are; otherwise every channel is shown to it as a grey image of its own, repeated to the channels it takes, and
the distances are averaged over C. So a grey image becomes a grey RGB one, and no channel of six is left out.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, nn

from latentdiff.errors import UserError


class MapsNetwork(Protocol):
    """What `Perceptual` needs of a network: the channels it takes and its feature maps, [B, c, h, w] each."""

    channels: int

    def maps(self, images: Tensor) -> list[Tensor]: ...


class Perceptual(nn.Module):
    """LPIPS-like distance (1801.03924, eq. 1) in the maps of `net`, every map and channel weighing the same.

    Maps are scaled to unit length over channels at every position; the squared difference is summed over channels,
    averaged over positions, then over maps: 0 for equal images, at most 4. `net` is an nn.Module with `.channels` and
    `.maps`; it is frozen and put in eval mode, for good.
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
    """LPIPS (1801.03924) with its trained weights, through the package `lpips`, which fetches its VGG on first use.

    UserError when the package is missing or its weights can be neither found nor fetched.
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
            raise UserError(f"perceptual: the weights of lpips ({net}) are not at hand: {reason}; {instead}") from error

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
    """Squared distance of unit vectors over channels, mean over positions: [N, c, h, w] twice -> [N]."""
    # The constant in the root bounds the gradient where all channels are near zero (background after an activation).
    a, b = (m.to(torch.promote_types(m.dtype, torch.float32)) for m in (a, b))
    a, b = (m * torch.rsqrt(m.square().sum(1, keepdim=True) + 1e-4) for m in (a, b))
    return (a - b).square().sum(1).mean((1, 2))  # [N]
