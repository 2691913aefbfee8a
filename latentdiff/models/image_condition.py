"""The second image that a U-Net may be given beside x_t: made from the training image, or paired with it.

What a user gives a trained model is the condition image, of the content's size without the border that training pads, or a
`factor` smaller. `ImageCondition.given` makes it from a training image. `condition_picture` and `condition_mask` of
pipelines/latent_diffusion.py make what is encoded from it, in training and in the pipeline alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from latentdiff.config import ConditionConfig
from latentdiff.errors import UserError
from latentdiff.models.codec import LatentCodec
from latentdiff.utils.random import derive_seed

SHAPES = ("side", "rectangles", "frame")  # of masks; "mixed" is each of them equally often
KEY = "image_condition"  # the keyword under which the network is given the condition
Content = tuple[int, int, int, int]  # (top, left, height, width) of the image inside the padded one


@dataclass(frozen=True)
class ImageCondition:
    """What the condition image is, and how often training leaves it out.

    Attributes:
        kind: "low_resolution", "mask", "grey" or "pair"; see `latentdiff.config.ImageConfig`.
        factor: of low_resolution.
        masks: what the masks of kind "mask" hide.
        draws: how many condition images each training image has; 1 unless kind is "mask".
        dropout: share of samples whose condition is replaced by zeros.
        joint: share of samples that lose all conditions together.
    """

    kind: str
    factor: int = 1
    masks: str | None = None
    draws: int = 1
    dropout: float = 0.1
    joint: float = 0.0

    def channels(self, latent_channels: int) -> int:
        """Channels that lie beside the latent's own: those of the encoded image, and one for a mask."""
        return latent_channels + (self.kind == "mask")

    def describe(self) -> dict[str, Any]:
        """What decides the encoded images, as JSON values: caches are compared by it."""
        return {"kind": self.kind, "factor": self.factor, "masks": self.masks, "draws": self.draws}

    def published(self) -> dict[str, Any]:
        """What a pipeline needs to know: its config entry image_condition."""
        dropped = self.dropout > 0 or self.joint > 0
        rule = {"kind": self.kind, "factor": self.factor, "dropped": dropped}
        return rule if self.masks is None else {**rule, "masks": self.masks}

    def check(self, size: tuple[int, int], image_channels: int) -> None:
        """UserError where images of this size (H, W) and number of channels have no such condition."""
        if self.kind == "grey" and image_channels != 3:
            raise UserError(
                "condition.image.kind: grey images have no colour to leave out; set data.channels=3, or another kind"
            )
        if any(side % self.factor for side in size):
            raise UserError(
                f"condition.image.factor: {self.factor} does not divide the images' {size[0]}x{size[1]}; set a factor that "
                "divides both sides, or data.size"
            )

    def given(self, images: Tensor, content: Content) -> Tensor:
        """The condition images of training images, as a user gives them: [B, C, H / factor, W / factor] in [-1, 1].

        low_resolution is the mean of factor x factor pixels. That and grey are rounded to 8 bits, as pictures in files are.

        images: [B, C, H', W'] in [-1, 1], padded; of kind "pair" the paired ones. content: where the image is in them.
        """
        from latentdiff.pipelines.latent_diffusion import in_grey

        top, left, height, width = content
        inside = images[..., top : top + height, left : left + width]
        if self.kind == "low_resolution":
            return _as_8_bits(functional.avg_pool2d(inside, self.factor))
        if self.kind == "grey":
            return in_grey(inside)
        return inside

    def hidden(self, keys: Sequence[int | str], content: Content) -> Tensor | None:
        """Masks [B, 1, H, W], 1 where the image is hidden and 0 elsewhere; None unless kind is "mask".

        keys: one for each mask, which follows from it alone.
        """
        if self.masks is None:
            return None
        return torch.stack([draw_mask(self.masks, content[2:], derive_seed("mask", key)) for key in keys])

    def latents(
        self, codec: LatentCodec, given: Tensor, hidden: Tensor | None, content: Content, padded: tuple[int, int]
    ) -> Tensor:
        """Raw latents [B, c, h, w] of condition images, their posteriors' means, on the codec's device.

        given, hidden: as `given` and `hidden` return them. content, padded: of the training images.
        """
        from latentdiff.pipelines.latent_diffusion import condition_picture

        return codec.moments(condition_picture(given, hidden, content[2:], padded))[0]


def image_condition(config: ConditionConfig) -> ImageCondition | None:
    """What the second image of a config is; None where its U-Net is given none."""
    if not config.includes("image"):
        return None
    image = config.image
    masks, draws = (image.masks, image.draws) if image.kind == "mask" else (None, 1)
    factor = image.factor if image.kind == "low_resolution" else 1
    return ImageCondition(image.kind, factor, masks, draws, image.dropout, config.effective_joint_dropout)


def extra_channels(config: ConditionConfig, latent_channels: int) -> int:
    """Channels of the U-Net's input beside the latent's own: 0 without a second image."""
    condition = image_condition(config)
    return 0 if condition is None else condition.channels(latent_channels)


def beside(latents: Tensor, hidden: Tensor | None, padded: tuple[int, int]) -> Tensor:
    """What lies beside x_t, [B, e, h, w]: normalised latents [B, c, h, w] of condition images, after the mask if there is one.

    hidden: masks [B, 1, H, W] or None. padded: (H', W') of the padded images.
    """
    from latentdiff.pipelines.latent_diffusion import condition_mask

    if hidden is None:
        return latents
    return torch.cat([condition_mask(hidden, padded, latents.shape[-2:]).to(latents), latents], dim=1)


def draw_mask(masks: str, size: tuple[int, int], seed: int) -> Tensor:
    """A mask [1, H, W], 1 where the image is hidden, from its seed alone. masks: "mixed", or one of SHAPES. size: (H, W)."""
    u = torch.rand(14, generator=torch.Generator().manual_seed(seed)).tolist()
    shape = SHAPES[int(3 * u[0])] if masks == "mixed" else masks
    height, width = size
    mask = torch.zeros(1, height, width)
    if shape == "side":
        share, side = 0.25 + 0.5 * u[1], int(4 * u[2])
        rows, columns = max(1, round(share * height)), max(1, round(share * width))
        place = (slice(rows), slice(height - rows, None), slice(columns), slice(width - columns, None))[side]
        mask[(0, place) if side < 2 else (0, slice(None), place)] = 1
    elif shape == "rectangles":
        for k in range(1 + int(3 * u[1])):
            mask[(0, *_rectangle(size, 0.2, 0.6, u[2 + 4 * k : 6 + 4 * k]))] = 1
    else:
        mask[:] = 1
        mask[(0, *_rectangle(size, 0.25, 0.75, u[2:6]))] = 0
    return mask


def _rectangle(size: tuple[int, int], least: float, most: float, u: Sequence[float]) -> tuple[slice, slice]:
    """Rows and columns of a rectangle inside an image of this size, its sides from `least` to `most` of the image's.

    u: four numbers in [0, 1): both sides and both places.
    """
    slices = []
    for side, length, place in zip(size, u[:2], u[2:], strict=True):
        extent = max(1, round((least + (most - least) * length) * side))
        start = int(place * (side - extent + 1))
        slices.append(slice(start, start + extent))
    return slices[0], slices[1]


def _as_8_bits(images: Tensor) -> Tensor:
    """Images in [-1, 1], rounded to the 256 values of 8 bits."""
    return ((images + 1) * 127.5).round().clamp(0, 255) / 127.5 - 1
