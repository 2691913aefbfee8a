"""What an image was observed through: a mask, a lower resolution, a blur, or grey. For `Reconstruction`.

An operator maps images [B, C, H, W] in [-1, 1] to observations [B, ...]. All are linear and treat each sample alone.
`of_latents` puts one behind a decoder, so that it observes latents.
"""

import math
from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from latentdiff.errors import UserError

BLACK = -1.0  # the border that training puts around an image, with data.framing=pad
LUMA = (0.299, 0.587, 0.114)  # of red, green and blue in ITU-R BT.601, as in Pillow's convert("L")


class Operator(Protocol):
    """Any of the operators here."""

    def __call__(self, images: Tensor) -> Tensor:
        """The observation [B, ...] of images [B, C, H, W] in [-1, 1]."""
        ...

    def project(self, images: Tensor, y: Tensor) -> Tensor:
        """Images [B, C, H, W] changed so that they agree with the observation y exactly, where the operator allows it.

        What the observation states comes from y, the rest from the images (range and null space; DDNM, arXiv 2212.00490). The
        result may leave [-1, 1].
        """
        ...


class Mask:
    """The image with some of its pixels hidden: they are 0 in the observation, which is [B, C, H, W].

    mask: [1 or B, 1, H, W], or [H, W]. Values of at least 0.5 (white) are hidden, which are those to be filled in, as in
    diffusers. UserError for another shape.
    """

    def __init__(self, mask: Tensor):
        mask = mask[None, None] if mask.ndim == 2 else mask
        if mask.ndim != 4 or mask.shape[1] != 1:
            raise UserError(f"mask: has the shape {list(mask.shape)}; it must be [H, W], [1, 1, H, W] or [B, 1, H, W]")
        self.known = (mask < 0.5).float()  # [1 or B, 1, H, W]

    def __call__(self, images: Tensor) -> Tensor:
        if self.known.shape[-2:] != images.shape[-2:]:
            raise UserError(f"mask: is {_size(self.known)} and the image {_size(images)}; they must be of one size")
        return images * self.known.to(images)

    def project(self, images: Tensor, y: Tensor) -> Tensor:
        """The known pixels of y, pasted into the images."""
        return torch.where(self.known.to(images.device).bool(), y.to(images), images)


class Downsample:
    """A lower resolution: the mean of each square of factor x factor pixels, [B, C, H / factor, W / factor].

    UserError where the factor is below 1, or does not divide the sides of an image.
    """

    def __init__(self, factor: int):
        if factor < 1:
            raise UserError(f"factor: {factor} must be at least 1")
        self.factor = factor

    def __call__(self, images: Tensor) -> Tensor:
        if images.shape[-2] % self.factor or images.shape[-1] % self.factor:
            raise UserError(f"factor: {self.factor} does not divide the sides of the image, {_size(images)}")
        return F.avg_pool2d(images, self.factor)

    def project(self, images: Tensor, y: Tensor) -> Tensor:
        """Each square of pixels moved by one number, so that its mean is that of y."""
        return images + (y.to(images) - self(images)).repeat_interleave(self.factor, -2).repeat_interleave(self.factor, -1)


class Blur:
    """A Gaussian blur, [B, C, H, W]. At the border the weights that lie within the image are scaled up to sum to 1.

    std: of the Gaussian, in pixels, above 0; UserError otherwise.
    """

    def __init__(self, std: float):
        if not 0 < std < math.inf:
            raise UserError(f"blur: a standard deviation of {std} pixels; it must be above 0")
        self.std = std

    def __call__(self, images: Tensor) -> Tensor:
        rows, columns = (self._matrix(side, images) for side in images.shape[-2:])
        return rows @ images @ columns.T

    def _matrix(self, side: int, like: Tensor) -> Tensor:
        """The blur of one line of pixels, [side, side]."""
        place = torch.arange(side, dtype=torch.float64)
        weights = torch.exp(-0.5 * ((place[:, None] - place) / self.std) ** 2)
        return (weights / weights.sum(1, keepdim=True)).to(like)

    def project(self, images: Tensor, y: Tensor) -> Tensor:
        """The images as they are: the inverse of a blur would magnify every error of y."""
        return images


class Grey:
    """Grey of a colour image: 0.299 red + 0.587 green + 0.114 blue, [B, 1, H, W]. UserError for images without 3 channels."""

    def __call__(self, images: Tensor) -> Tensor:
        if images.shape[1] != 3:
            raise UserError(f"grey: the images have {images.shape[1]} channels; only colour images, of 3, can be made grey")
        return (images * torch.tensor(LUMA).to(images).reshape(3, 1, 1)).sum(1, keepdim=True)

    def project(self, images: Tensor, y: Tensor) -> Tensor:
        """All channels of a pixel moved by one number, so that its grey is that of y and its hue stays."""
        return images + (y.to(images) - self(images))


def centre(images: Tensor, size: Sequence[int] | None) -> Tensor:
    """The middle of images [B, C, H, W], of size (h, w): without the border that training padded. All of it for None."""
    if size is None:
        return images
    top, left = (images.shape[-2] - size[0]) // 2, (images.shape[-1] - size[1]) // 2
    return images[..., top : top + size[0], left : left + size[1]]


def with_border(images: Tensor, size: Sequence[int], value: float) -> Tensor:
    """Images [B, C, H, W] with a border of one value around them, so that their size becomes (H', W'); see `centre`."""
    tall, wide = (whole - side for whole, side in zip(size, images.shape[-2:], strict=True))
    return F.pad(images, (wide // 2, wide - wide // 2, tall // 2, tall - tall // 2), value=value)


def of_latents(
    operator: Callable[[Tensor], Tensor],
    decode: Callable[[Tensor], Tensor],
    image_size: Sequence[int] | None = None,
) -> Callable[[Tensor], Tensor]:
    """operator(decode(z)): what is observed of latents z [B, c, h, w], for `Reconstruction`.

    Args:
        operator: an operator on images, such as `Mask`.
        decode: images [B, C, H, W] of latents, differentiable, such as `LatentCodec.decode`.
        image_size: (H, W) of the images where decode gives them a border, as `LatentDiffusionPipeline.config.image_size`.
    """
    return lambda z: operator(centre(decode(z), image_size))


def _size(images: Tensor) -> str:
    return f"{images.shape[-2]}x{images.shape[-1]}"
