"""Images as pictures for people: 8-bit pixels, grids with names and captions, PNG files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from latentdiff.utils import atomic
from latentdiff.utils.fonts import labelled_font

GAP = 2  # pixels between the images of a grid
CAPTION_LINE = 12  # pixels
CAPTION_LINES = 2


def to_uint8(images: Tensor) -> np.ndarray:
    """Images [B, C, H, W] in [-1, 1] (clipped) as uint8 [B, H, W, C]: the exact inverse of preprocessing on all 256 levels."""
    pixels = ((images.detach().to("cpu", torch.float32) + 1.0) * 127.5).round().clamp(0, 255)
    return pixels.to(torch.uint8).permute(0, 2, 3, 1).numpy()


def tile(rows: list[list[np.ndarray]], scale: int) -> Image.Image:
    """Rows of uint8 images [h, w, C] as one picture, each pixel `scale` wide. Smaller images lie in cells of the largest."""
    C = rows[0][0].shape[2]
    H, W = (max(image.shape[side] for row in rows for image in row) for side in (0, 1))
    canvas = np.full((len(rows) * (H * scale + GAP), max(map(len, rows)) * (W * scale + GAP), C), 255, np.uint8)
    for r, row in enumerate(rows):
        for k, image in enumerate(row):
            enlarged = image.repeat(scale, 0).repeat(scale, 1)
            top, left = r * (H * scale + GAP), k * (W * scale + GAP)
            canvas[top : top + enlarged.shape[0], left : left + enlarged.shape[1]] = enlarged
    return Image.fromarray(canvas[..., 0] if C == 1 else canvas)


def labelled_grid(rows: list[list[np.ndarray]], names: list[str], scale: int = 2) -> Image.Image:
    """A grid of uint8 images [H, W, C] of one size, with a name at the left of each row. Each pixel is `scale` wide."""
    grid = tile(rows, scale).convert("RGB")
    labels = [labelled_font(name, 14) for name in names]
    margin = 12 + max(int(font.getlength(name)) for font, name in labels)
    canvas = Image.new("RGB", (grid.width + margin, grid.height), "white")
    canvas.paste(grid, (margin, 0))
    height = rows[0][0].shape[0] * scale + GAP
    draw = ImageDraw.Draw(canvas)
    for k, (font, name) in enumerate(labels):
        draw.text((6, k * height + height // 2), name, fill="black", font=font, anchor="lm")
    return canvas


def captioned_grid(rows: list[list[np.ndarray]], captions: list[list[str]], names: list[str], scale: int = 2) -> Image.Image:
    """A grid with a caption under each image and a name at the left of each row.

    Args:
        rows: uint8 images [H, W, C] of one size.
        captions: of each image; what does not fit into two lines is left out.
        names: of each row; "" for none.
        scale: the width of an image's pixel.
    """
    labels = [labelled_font(name, 14) for name in names]
    height, width = (side * scale for side in rows[0][0].shape[:2])
    margin = 12 + max(int(font.getlength(name)) for font, name in labels)
    row_height, column_width = height + CAPTION_LINES * CAPTION_LINE + 4 * GAP, width + 3 * GAP
    canvas = Image.new("RGB", (margin + max(map(len, rows)) * column_width, len(rows) * row_height), "white")
    draw = ImageDraw.Draw(canvas)
    for r, (row, texts, (font, name)) in enumerate(zip(rows, captions, labels, strict=True)):
        top = r * row_height
        draw.text((6, top + height // 2), name, fill="black", font=font, anchor="lm")
        for k, (image, text) in enumerate(zip(row, texts, strict=True)):
            left = margin + k * column_width
            canvas.paste(tile([[image]], scale).convert("RGB").crop((0, 0, width, height)), (left, top))
            small, text = labelled_font(text, 10)
            for n, line in enumerate(_wrapped(text, small, width)[:CAPTION_LINES]):
                place = (left + width // 2, top + height + GAP + n * CAPTION_LINE)
                draw.text(place, line, fill="black", font=small, anchor="ma")
    return canvas


def _wrapped(text: str, font: Any, width: int) -> list[str]:
    """A text in lines of at most `width` pixels. A longer word has a line of its own."""
    lines: list[str] = []
    for word in text.split():
        if lines and font.getlength(f"{lines[-1]} {word}") <= width:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    return lines


def save_png(image: Image.Image, path: Path) -> None:
    """Write a PNG, so that the file is whole or absent."""
    with atomic.new_file(path) as temporary:
        image.save(temporary, format="PNG")


def save_rows(rows: list[Tensor], path: Path, scale: int = 2) -> None:
    """Write rows of images, each row [B, C, H, W] in [-1, 1], as one PNG in which each pixel is `scale` wide."""
    save_png(tile([list(to_uint8(row)) for row in rows], scale), path)
