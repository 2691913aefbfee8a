"""The patch discriminator of stage 1."""

from collections.abc import Sequence
from math import gcd

from torch import Tensor, nn


class PatchDiscriminator(nn.Module):
    """PatchGAN (1611.07004, section 3.2): images [B, C, H, W] -> logits [B, 1, h, w], one per overlapping patch.

    Each entry of `channels` is a convolution; all but the last halve the image, so (32, 64, 128) ends at a quarter of
    its size. GroupNorm after every convolution but the first: BatchNorm would let an image's verdict depend on its
    neighbours and on how many processes share the batch.
    """

    def __init__(self, in_channels: int, channels: Sequence[int] = (32, 64, 128)) -> None:
        super().__init__()
        if len(channels) < 2:
            raise ValueError(f"channels needs at least 2 entries, got {tuple(channels)}")
        layers: list[nn.Module] = []
        width = in_channels
        for i, out in enumerate(channels):
            first, last = i == 0, i == len(channels) - 1
            # Even kernels at stride 2 give every pixel the same number of taps: no checkerboard in the gradient.
            kernel, stride = (3, 1) if last else (4, 2)
            layers.append(nn.Conv2d(width, out, kernel, stride, padding=1, bias=first))
            if not first:
                layers.append(nn.GroupNorm(gcd(8, out), out))
            layers.append(nn.LeakyReLU(0.2))
            width = out
        layers.append(nn.Conv2d(width, 1, kernel_size=3, padding=1))
        self.layers = nn.Sequential(*layers)

    def forward(self, images: Tensor) -> Tensor:
        return self.layers(images)  # [B, 1, h, w]
