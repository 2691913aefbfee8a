"""Moved and scaled copies of the training images, for small data sets.

The copies are safe by construction: the network learns to draw what it is shown, so a copy shows nothing that is not in the
data. A drawing on a plain ground is never cut, and what is uncovered around it has the ground's colour. A photograph stays
as large as the frame: the window moves and shrinks inside the picture. So neither gets a new border.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from latentdiff.errors import UserError
from latentdiff.utils.random import derive_seed

Box = tuple[float, float, float, float]  # top, left, bottom, right, in pixels of the picture
GROUND_LEVELS = 8  # by which pixels of one ground may differ, of 255: JPEG does not keep them equal
GROUND_SHARE = 0.25  # of a side's line of pixels, which the ground must be; a photograph's dark corners are less
SUPPORT = 3  # pixels on either side that Lanczos's filter reads, at the coarser of the two scales


@dataclass(frozen=True)
class Move:
    """How a copy differs from its image: three numbers, uniform in [-1, 1], as shares of what the config allows.

    shift and zoom: the largest shift as a share of a side, and the largest relative change of scale.
    """

    shift: float
    zoom: float
    down: float
    right: float
    scale: float


@dataclass(frozen=True)
class Copies:
    """How often each image stands in a data set, and how far its copies are moved.

    count: how often, the image itself included; it is copy 0. shift: the largest shift, as a share of a side. zoom: the
    largest relative change of scale.

    UserError where there would be copies that do not differ.
    """

    count: int
    shift: float
    zoom: float

    def __post_init__(self) -> None:
        if self.count > 1 and self.shift == 0 and self.zoom == 0:
            raise UserError(
                f"data.copies: all {self.count} would be the image itself; say how they differ, as by data.shift=0.05 or "
                "data.zoom=0.1, or set data.copies=1"
            )

    def move(self, image: int, copy: int) -> Move | None:
        """The move of a copy, from the numbers of image and copy alone; None for copy 0, which is the image as it is."""
        if copy == 0:
            return None
        down, right, scale = (2 * derive_seed("copies", image, copy, what) / 2**63 - 1 for what in ("down", "right", "scale"))
        return Move(self.shift, self.zoom, down, right, scale)

    def describe(self) -> dict[str, Any]:
        """What decides the copies, as JSON values: caches are compared by it."""
        return {"copies": self.count, "shift": self.shift, "zoom": self.zoom}


ONCE = Copies(1, 0.0, 0.0)


def moved(image: np.ndarray, box: Box, size: tuple[int, int], background: np.ndarray, move: Move) -> np.ndarray:
    """A moved and scaled copy of a picture, resampled once, by Lanczos's filter with antialiasing.

    Args:
        image: uint8 [H0, W0, C].
        box: what the image itself shows. Where it is larger than the picture, bars of the background lie beside it.
        size: (H, W) of the result.
        background: uint8 [C], of the bars.
        move: how far to go. It goes less far where a drawing would be cut, or a photograph would uncover a border.

    Returns:
        uint8 [H, W, C].
    """
    sides = np.array(image.shape[:2], dtype=np.float64)
    first, last = np.array(box[:2]), np.array(box[2:])
    bars = (first < 0) | (last > sides)  # of the two axes
    ground, is_open = plain_sides(image)
    drawing = _extent(image, ground) if ground is not None else np.stack([np.zeros(2), sides])
    on_background = ground is not None and bool(_near(ground, background))
    for axis in (0, 1):
        if bars[axis] and not on_background:
            drawing[:, axis] = 0, sides[axis]  # the whole picture is what lies between the bars
    is_open = is_open | bars[:, None]
    # A drawing keeps a pixel of its ground around it, if it has one; what the image itself does not show need not be kept
    length = last - first
    pixel = length / size
    keep = np.clip(drawing + np.stack([-pixel, pixel]), first, last)  # [2, axis]

    # The scale: not so large that a drawing is cut, nor so small that a photograph ends inside the frame
    closed = np.array([not is_open[axis].any() for axis in (0, 1)])
    smallest = float(np.max(length / sides, where=closed, initial=0))
    largest = float(np.min(length / np.maximum(keep[1] - keep[0], 1e-9), where=~closed, initial=np.inf))
    scale = 1 + move.zoom * move.scale
    if not smallest <= scale <= largest:
        scale = min(max(1 / scale, smallest), largest)

    # The place, within the same bounds
    length = length / scale
    start = (first + last - length) / 2 - move.shift * np.array([move.down, move.right]) * length
    mirrored = closed & (sides - length < 1e-6)
    for axis in (0, 1):
        low, high = (-np.inf, np.inf) if closed[axis] else (keep[1, axis] - length[axis], keep[0, axis])
        if not mirrored[axis]:
            low = low if is_open[axis, 0] else max(low, 0.0)
            high = high if is_open[axis, 1] else min(high, sides[axis] - length[axis])
            start[axis] = min(max(start[axis], low), high)
    if np.allclose(length, size):
        start = np.round(start)  # whole pixels stay as sharp as they are

    # Fill what lies beyond the picture: between the bars first, because bars run along the whole picture
    margin = np.ceil(SUPPORT * np.maximum(length / size, 1))
    for axis in np.argsort(bars, kind="stable"):
        below, above = -start[axis], start[axis] + length[axis] - sides[axis]
        if max(below, above) <= 1e-6:
            continue
        widths = [int(max(0, np.ceil(beyond) + margin[axis])) if beyond > 1e-6 else 0 for beyond in (below, above)]
        color = None if mirrored[axis] else background if bars[axis] or ground is None else ground
        image = _extended(image, axis, widths, color)
        start[axis] += widths[0]
    (top, left), (bottom, right) = start.tolist(), (start + length).tolist()
    limits = (image.shape[1], image.shape[0])
    frame = (max(left, 0.0), max(top, 0.0), min(right, limits[0]), min(bottom, limits[1]))
    picture = Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)
    result = np.asarray(picture.resize((size[1], size[0]), Image.Resampling.LANCZOS, box=frame))
    return result[..., None] if image.shape[-1] == 1 else result


def plain_sides(image: np.ndarray) -> tuple[np.ndarray | None, np.ndarray]:
    """The ground that a picture's drawing stands on, and at which sides the ground may go on beyond the picture.

    The ground is the colour that three corners share, or all. It goes on beyond a side if both corners of the side have it,
    and a quarter of the line of pixels between them. A picture without such sides is taken for a photograph.

    Args:
        image: uint8 [H0, W0, C].

    Returns:
        The colour, uint8 [C], or None for a photograph; and bool [2, 2]: top and bottom, left and right.
    """
    corners = image[[0, 0, -1, -1], [0, -1, 0, -1]]  # [4, C]: top left, top right, bottom left, bottom right
    alike = np.stack([_near(corners, corner) for corner in corners])
    ground = corners[int(alike.sum(axis=1).argmax())]
    same = _near(corners, ground)
    if same.sum() < 3:
        return None, np.zeros((2, 2), dtype=bool)
    ends = (((0, 1), (2, 3)), ((0, 2), (1, 3)))
    lines = ((image[0], image[-1]), (image[:, 0], image[:, -1]))
    is_open = np.array(
        [
            [bool(same[list(ends[axis][k])].all() and _near(lines[axis][k], ground).mean() >= GROUND_SHARE) for k in (0, 1)]
            for axis in (0, 1)
        ]
    )
    return (ground if is_open.any() else None), is_open


def _near(colors: np.ndarray, color: np.ndarray) -> np.ndarray:
    """Which of uint8 colours [..., C] are a colour [C], but for noise; bool [...]."""
    return (np.maximum(colors, color) - np.minimum(colors, color) <= GROUND_LEVELS).all(axis=-1)


def _extent(image: np.ndarray, ground: np.ndarray) -> np.ndarray:
    """[[top, left], [bottom, right]] of what is not the ground, float64; the middle of the picture where all of it is."""
    drawn = ~_near(image, ground)
    if not drawn.any():
        middle = np.array(image.shape[:2]) / 2
        return np.stack([middle, middle])
    spans = [np.flatnonzero(drawn.any(axis=1 - axis)) for axis in (0, 1)]
    return np.array([[span[0] for span in spans], [span[-1] + 1 for span in spans]], dtype=np.float64)


def _extended(image: np.ndarray, axis: int, widths: list[int], color: np.ndarray | None) -> np.ndarray:
    """The picture with so many lines before and after it along an axis: of a colour [C], or mirrored where it is None."""
    border = [(0, 0), (0, 0), (0, 0)]
    border[axis] = (widths[0], widths[1])
    if color is None:
        return np.pad(image, border, mode="symmetric")
    shape = list(image.shape)
    pieces = []
    for width in widths:
        shape[axis] = width
        pieces.append(np.broadcast_to(color, shape))
    return np.concatenate([pieces[0], image, pieces[1]], axis=axis)
