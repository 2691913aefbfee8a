"""The discriminator of stage 1's adversarial loss."""

from collections.abc import Sequence
from math import gcd

from torch import Tensor, nn


class PatchDiscriminator(nn.Module):
    """PatchGAN (arXiv:1611.07004, section 3.2): a logit for each of many overlapping patches of an image.

    Every convolution but the last halves the image, so (32, 64, 128) ends at a quarter of its size. Normalisation is
    GroupNorm, after every convolution but the first: with BatchNorm an image's logits would depend on the other images, and
    on how many processes share the batch.

    Args:
        in_channels: image channels.
        channels: output channels of each convolution, two or more; one more convolution gives the logits.

    Raises:
        ValueError: fewer than two channels.
    """

    def __init__(self, in_channels: int, channels: Sequence[int] = (32, 64, 128)) -> None:
        super().__init__()
        if len(channels) < 2:
            raise ValueError(f"channels needs at least 2 entries, got {tuple(channels)}")
        layers: list[nn.Module] = []
        width = in_channels
        for i, out in enumerate(channels):
            first, last = i == 0, i == len(channels) - 1
            # With an even kernel at stride 2 every pixel is used equally often, so the gradient has no checkerboard
            kernel, stride = (3, 1) if last else (4, 2)
            layers.append(nn.Conv2d(width, out, kernel, stride, padding=1, bias=first))
            if not first:
                layers.append(nn.GroupNorm(gcd(8, out), out))
            layers.append(nn.LeakyReLU(0.2))
            width = out
        layers.append(nn.Conv2d(width, 1, kernel_size=3, padding=1))
        self.layers = nn.Sequential(*layers)

    def forward(self, images: Tensor) -> Tensor:
        """Logits [B, 1, h, w] of images [B, C, H, W]: high for real ones."""
        return self.layers(images)
