"""Random changes to pictures, for training a judge that must tolerate the small faults of generated pictures.

Colours keep their hue and nothing is mirrored: a blue heart is not a red one, and a left arrow is not a right one.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from latentdiff.guidance.operators import LUMA as LUMA  # it was a name of this module
from latentdiff.guidance.operators import Grey

ROTATION = math.radians(15)
SCALE, SHIFT = 0.2, 0.12  # SCALE: around 1; SHIFT: share of the side
BRIGHTNESS, CONTRAST, SATURATION = 0.2, 0.25, 0.3
NOISE, BLOTCHES = 0.15, 0.25  # largest standard deviations, in units of [-1, 1]
ERASED, ERASED_SIDE = 0.5, 0.4  # share of the pictures; largest side of the rectangle
Strength = float | Tensor


def augment(images: Tensor, generator: torch.Generator, strength: Strength = 1.0) -> Tensor:
    """Change each of the images [B, 3, H, W] in [-1, 1] at random, independently of the others; same shape and range.

    They are turned, scaled and shifted on white; changed in brightness, contrast and saturation; blurred as an autoencoder
    blurs; given noise of pixels and of blotches an eighth of the side wide; and half of them get a rectangle of one colour.

    Args:
        images: the pictures.
        generator: of all draws.
        strength: 0 changes nothing, 1 is everything; one for all images, or one for each, [B, 1, 1, 1].
    """
    images = _place(images, generator, strength)
    images = _colours(images, generator, strength)
    images = _blur(images, generator, strength)
    images = _noise(images, generator, strength)
    return _erase(images, generator, strength).clamp(-1, 1)


def _spread(count: int, generator: torch.Generator, width: Strength) -> Tensor:
    """Uniform in [-width, width], [B, 1, 1, 1]."""
    return (torch.rand(count, 1, 1, 1, generator=generator) * 2 - 1) * width


def _place(images: Tensor, generator: torch.Generator, strength: Strength) -> Tensor:
    B = len(images)
    angle, grow, right, down = (_spread(B, generator, strength * w).flatten() for w in (ROTATION, SCALE, 2 * SHIFT, 2 * SHIFT))
    zoom = 1 / (1 + grow)
    cos, sin = angle.cos() * zoom, angle.sin() * zoom
    theta = torch.stack([torch.stack([cos, -sin, right], 1), torch.stack([sin, cos, down], 1)], 1)  # [B, 2, 3]
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    # Outside the picture are zeros, so it is shifted to make white zero
    return F.grid_sample(images - 1, grid, align_corners=False) + 1


def _colours(images: Tensor, generator: torch.Generator, strength: Strength) -> Tensor:
    light, contrast, colour = (_spread(len(images), generator, strength * w) for w in (BRIGHTNESS, CONTRAST, SATURATION))
    grey = Grey()(images)  # [B, 1, H, W]
    images = grey + (images - grey) * (1 + colour)
    return images * (1 + contrast) + light


def _blur(images: Tensor, generator: torch.Generator, strength: Strength) -> Tensor:
    """Move part of the way to the picture at half its resolution, then part of the way to that at a quarter."""
    size = images.shape[2:]
    for factor in (2, 4):
        # The square makes most of them only a little blurred
        share = torch.rand(len(images), 1, 1, 1, generator=generator).square() * strength
        small = F.interpolate(images, size=[max(1, side // factor) for side in size], mode="area")
        images = images.lerp(F.interpolate(small, size=size, mode="bilinear"), share.expand_as(images))
    return images


def _noise(images: Tensor, generator: torch.Generator, strength: Strength) -> Tensor:
    B, C, H, W = images.shape
    fine, coarse = (torch.rand(B, 1, 1, 1, generator=generator).square() * strength * w for w in (NOISE, BLOTCHES))
    blotches = F.interpolate(torch.randn(B, C, 8, 8, generator=generator), size=(H, W), mode="bilinear")
    return images + fine * torch.randn(images.shape, generator=generator) + coarse * blotches


def _erase(images: Tensor, generator: torch.Generator, strength: Strength) -> Tensor:
    B, C, H, W = images.shape
    chosen = torch.rand(B, 1, 1, 1, generator=generator) < ERASED * strength
    inside = chosen
    for side, shape in ((H, (1, 1, H, 1)), (W, (1, 1, 1, W))):
        centre, half = (torch.rand(B, 1, 1, 1, generator=generator) for _ in range(2))
        place = torch.linspace(0, 1, side).view(shape)
        inside = inside & ((place - centre).abs() < half * strength * ERASED_SIDE / 2)  # [B, 1, H, W] in the end
    colour = torch.rand(B, C, 1, 1, generator=generator) * 2 - 1
    return torch.where(inside, colour, images)
