"""From images of any size to the tensors that an autoencoder takes: sizes, channels and borders, by explicit rules."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from PIL import Image

from latentdiff.data.copies import Box, Move, moved
from latentdiff.data.image_files import WHITE, Color
from latentdiff.data.image_source import ImageSource
from latentdiff.errors import UserError

FRAMINGS = ("exact", "resize", "crop", "pad", "letterbox")
WAYS = {"crop": "cuts the ends off", "letterbox": "fills with data.background", "resize": "stretches"}
SCALED = ("resize", "crop", "letterbox")  # framings that bring an image of any size to any other
PAD_MODES = ("constant", "edge", "reflect")


@dataclass(frozen=True)
class Preprocess:
    """How a uint8 image becomes a float32 tensor in [-1, 1].

    size: (H, W) of the result; None: the one size that all images of the source share.
    channels: 1 or 3; None: as the source. Grey to RGB repeats, RGB to grey is the luma of ITU-R 601.
    framing: how images come to one shape. "exact": images are H x W already. "resize": stretched to H x W. "crop": scaled,
        aspect kept, until H x W is covered, then cut out of the middle. "letterbox": scaled, aspect kept, until the longer
        side fills H x W, the rest filled with `background` on both sides alike. "pad": images are all of one size, at most
        H x W, and a border around them brings both sides to H x W and up to the next multiple of `multiple_of`; the border
        is taken off what the model makes.
    multiple_of: each side must be a multiple of this (the autoencoder's factor times the U-Net's); with "pad" the border
        sees to it, else `size` must be one.
    pad_mode: "constant" (black, -1), "edge" or "reflect". The border is split evenly; an odd pixel goes to the
        bottom/right.
    content_size: (H, W) of the images inside the border, filled in by `for_source`; None: `size`.
    background: red, green and blue, 0 to 255, of what fills a letterbox, and of what lies under transparency where a source
        is opened with this rule. With one channel it is the colour's luma.
    """

    size: tuple[int, int] | None = None
    channels: int | None = None
    framing: str = "exact"
    multiple_of: int = 1
    pad_mode: str = "constant"
    content_size: tuple[int, int] | None = None
    background: Color = WHITE

    def __post_init__(self) -> None:
        if self.framing not in FRAMINGS:
            raise UserError(f"framing '{self.framing}': valid are {', '.join(FRAMINGS)}")
        if self.pad_mode not in PAD_MODES:
            raise UserError(f"pad_mode '{self.pad_mode}': valid are {', '.join(PAD_MODES)}")
        if self.channels not in (None, 1, 3):
            raise UserError(f"channels={self.channels}: valid are 1 and 3")
        if self.multiple_of < 1:
            raise UserError(f"multiple_of={self.multiple_of}: must be at least 1")
        if self.size is not None:
            if len(self.size) != 2 or min(self.size) < 1:
                raise UserError(f"size={list(self.size)}: needs [height, width], each at least 1")
            object.__setattr__(self, "size", (int(self.size[0]), int(self.size[1])))  # so that a list from YAML compares equal
            self._check_multiple(*self.size)

    def for_source(self, source: ImageSource) -> "Preprocess":
        """This rule with size and channels filled in from the source. UserError for an image that does not fit."""
        sizes = np.unique(source.sizes, axis=0)
        if self.size is None and len(sizes) > 1:
            raise UserError(
                f"data '{source.name}' has images of {len(sizes)} sizes ({size_name(sizes[0])} … {size_name(sizes[-1])}): "
                f"set data.size=[height,width] and data.framing=crop ({WAYS['crop']}), letterbox ({WAYS['letterbox']}) or "
                f"resize ({WAYS['resize']})"
            )
        first = (int(sizes[0][0]), int(sizes[0][1]))
        size = self.size or first
        inside = first if self.framing == "pad" and first[0] <= size[0] and first[1] <= size[1] else size
        resolved = replace(self, size=size, channels=self.channels or source.channels, content_size=self.content_size or inside)
        for height, width in sizes.tolist():
            resolved.check_fits(height, width)
        return resolved

    @property
    def padded_size(self) -> tuple[int, int]:
        """(H', W') of the tensors, border included."""
        height, width = self._known_size()
        if self.framing != "pad":
            return height, width
        return _round_up(height, self.multiple_of), _round_up(width, self.multiple_of)

    @property
    def content(self) -> tuple[int, int, int, int]:
        """(top, left, height, width) of the image's content within the padded image."""
        (height, width), (tall, wide) = self.content_size or self._known_size(), self.padded_size
        return (tall - height) // 2, (wide - width) // 2, height, width

    def crop_content(self, images: torch.Tensor) -> torch.Tensor:
        """[..., H', W'] -> [..., H, W]: takes the border off again."""
        top, left, height, width = self.content
        return images[..., top : top + height, left : left + width]

    def describe(self) -> dict[str, Any]:
        """Everything that decides the pixels, as JSON values: caches are compared by it.

        The framing has its old name there, fit, because existing caches and records have it.
        """
        rule = {
            "padded_size": list(self.padded_size),
            "content": list(self.content),
            "channels": self.channels,
            "fit": self.framing,
            "pad_mode": self.pad_mode if self.framing == "pad" else None,
            "resample": "lanczos" if self.framing in SCALED else None,
        }
        return rule | ({"background": list(self.background)} if self.framing == "letterbox" else {})

    def __call__(self, image: np.ndarray, flip: bool = False) -> torch.Tensor:
        """uint8 [H0, W0, C0] -> float32 [C, H', W'] in [-1, 1]; mirrored left-right before padding when `flip`."""
        return self.batch([image], [flip])[0]

    def batch(
        self, images: Sequence[np.ndarray], flips: Sequence[bool], moves: Sequence[Move | None] | None = None
    ) -> torch.Tensor:
        """B images, uint8 [H0, W0, C0] each -> float32 [B, C, H', W'] in [-1, 1].

        flips: for each image, whether it is mirrored left-right, before padding. moves: for each image, how it is moved and
        scaled, before it is mirrored; None: not at all. UserError for an image that does not fit.
        """
        fitted = np.stack([self._fit(image, move) for image, move in zip(images, moves or [None] * len(images), strict=True)])
        mirrored = np.asarray(flips, dtype=bool)
        fitted[mirrored] = fitted[mirrored, :, ::-1]
        (top, left, height, width), (tall, wide) = self.content, self.padded_size
        if (tall, wide) != (height, width):
            border = ((0, 0), (top, tall - height - top), (left, wide - width - left), (0, 0))
            fitted = np.pad(fitted, border, mode=self.pad_mode)  # type: ignore[call-overload]  # constant: 0, that is -1
        planes = np.ascontiguousarray(fitted.transpose(0, 3, 1, 2))
        # Through one dimension: of a single channel numpy leaves strides that torch takes for channels-last. The whole
        # autoencoder would then run in that order, in which group normalisation on a CPU is several times slower
        pixels = torch.from_numpy(planes.reshape(-1)).view(planes.shape)
        return pixels.to(torch.float32) / 127.5 - 1.0

    def _fit(self, image: np.ndarray, move: Move | None = None) -> np.ndarray:
        """uint8 [H0, W0, C0] -> uint8 [H, W, C]: the content."""
        self.check_fits(*image.shape[:2])
        image = _match_channels(image, self.channels or image.shape[-1])
        _, _, height, width = self.content
        if move is not None:
            color = _color(self.background, image.shape[-1])
            return moved(image, self._shown(image.shape[:2], (height, width)), (height, width), color, move)
        if image.shape[:2] == (height, width):
            return image
        if self.framing == "letterbox":
            return _letterbox(image, (height, width), self.background)
        return _resample(image, (height, width), crop=self.framing == "crop")

    def _shown(self, old: tuple[int, int], size: tuple[int, int]) -> Box:
        """The box of an image of size `old` that the content of size (H, W) shows, in the image's pixels."""
        if self.framing == "crop":
            return _cropped_box(old, size)
        if self.framing != "letterbox":
            return 0.0, 0.0, float(old[0]), float(old[1])
        (top, left), inner = _letterbox_place(old, size)
        dense, across = old[0] / inner[0], old[1] / inner[1]
        return -top * dense, -left * across, (size[0] - top) * dense, (size[1] - left) * across

    def _known_size(self) -> tuple[int, int]:
        if self.size is None:
            raise UserError("size is not set: give size=[height,width], or take it from the data with for_source")
        return self.size

    def _check_multiple(self, height: int, width: int) -> None:
        m = self.multiple_of
        if self.framing != "pad" and (height % m or width % m):
            larger = (_round_up(height, m), _round_up(width, m))
            smaller = (max(m, height // m * m), max(m, width // m * m))
            raise UserError(
                f"size {size_name((height, width))} is not a multiple of {m}: set framing=pad, or size={list(smaller)} or "
                f"size={list(larger)} with framing=crop, letterbox or resize"
            )

    def check_fits(self, height: int, width: int) -> None:
        """UserError for an image of this size that the framing cannot bring to `size`."""
        expected = self.content_size or self._known_size()
        if self.framing in ("exact", "pad") and (height, width) != expected:
            ways = ", ".join(f"{way} ({does})" for way, does in WAYS.items())
            raise UserError(
                f"an image of {size_name((height, width))} does not fit {size_name(expected)} with framing={self.framing}, "
                f"which takes images of one size; for mixed sizes set data.framing to one of {ways}"
            )


def _match_channels(image: np.ndarray, channels: int) -> np.ndarray:
    """uint8 [H, W, C0] -> [H, W, channels]."""
    if image.shape[-1] == channels:
        return image
    if channels == 3:
        return np.repeat(image, 3, axis=-1)
    return np.asarray(Image.fromarray(image).convert("L"))[..., None]


def _resample(image: np.ndarray, size: tuple[int, int], crop: bool) -> np.ndarray:
    """Lanczos with antialiasing to `size`; with crop, of the largest centred box that has the new aspect ratio."""
    height, width = size
    top, left, bottom, right = _cropped_box(image.shape[:2], size) if crop else (0.0, 0.0, *map(float, image.shape[:2]))
    # Rounding may put the box outside by 1e-15, which Pillow refuses
    top, left, bottom, right = max(0.0, top), max(0.0, left), min(bottom, image.shape[0]), min(right, image.shape[1])
    picture = Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)
    resized = np.asarray(picture.resize((width, height), Image.Resampling.LANCZOS, box=(left, top, right, bottom)))
    return resized[..., None] if image.shape[-1] == 1 else resized


def _letterbox(image: np.ndarray, size: tuple[int, int], background: Color) -> np.ndarray:
    """The whole image, scaled with its aspect kept to fit into `size`, in the middle of the background."""
    (top, left), (tall, wide) = _letterbox_place(image.shape[:2], size)
    whole = np.tile(_color(background, image.shape[-1]), (*size, 1))
    scaled = image if image.shape[:2] == (tall, wide) else _resample(image, (tall, wide), crop=False)
    whole[top : top + tall, left : left + wide] = scaled
    return whole


def _cropped_box(old: tuple[int, int], size: tuple[int, int]) -> Box:
    """The largest centred box of an image of size `old` that has the aspect ratio of `size`."""
    scale = min(old[0] / size[0], old[1] / size[1])
    box_height, box_width = size[0] * scale, size[1] * scale
    left, top = (old[1] - box_width) / 2, (old[0] - box_height) / 2
    return top, left, top + box_height, left + box_width


def _letterbox_place(old: tuple[int, int], size: tuple[int, int]) -> tuple[tuple[int, int], tuple[int, int]]:
    """((top, left), (height, width)) of an image of size `old` within a letterbox of `size`."""
    scale = min(size[0] / old[0], size[1] / old[1])
    tall, wide = (min(side, max(1, round(length * scale))) for side, length in zip(size, old, strict=True))
    return ((size[0] - tall) // 2, (size[1] - wide) // 2), (tall, wide)


def _color(color: Color, channels: int) -> np.ndarray:
    """The colour as uint8 [channels]."""
    return _match_channels(np.array([[color]], dtype=np.uint8), channels)[0, 0]


def _round_up(side: int, multiple: int) -> int:
    return -(-side // multiple) * multiple


def size_name(size: Sequence[int] | np.ndarray) -> str:
    """A size (height, width) as text, "HxW"."""
    return f"{size[0]}x{size[1]}"
