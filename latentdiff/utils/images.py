"""PNG pictures for people: rows of images, and grids with class names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from latentdiff.utils import atomic
from latentdiff.utils.fonts import labelled_font

GAP = 2  # pixels between tiles
CAPTION_LINE = 12


def save_rows(rows: list[Tensor], path: Path, scale: int = 2) -> None:
    """Write rows of images, each row [B, C, H, W] in [-1, 1], as one PNG enlarged `scale` times."""
    save_png(tile([list(to_uint8(row)) for row in rows], scale), path)


def labelled_grid(rows: list[list[np.ndarray]], names: list[str], scale: int = 2) -> Image.Image:
    """A grid with one row per name, the name at its left. Images are uint8 [H, W, C] of one size."""
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
    """A grid with a caption of two lines at most under each image and a name at the left of each row ("": none).

    Images are uint8 [H, W, C] of one size.
    """
    labels = [labelled_font(name, 14) for name in names]
    height, width = (side * scale for side in rows[0][0].shape[:2])
    margin = 12 + max(int(font.getlength(name)) for font, name in labels)
    step, line = height + 2 * CAPTION_LINE + 4 * GAP, width + 3 * GAP
    canvas = Image.new("RGB", (margin + max(map(len, rows)) * line, len(rows) * step), "white")
    draw = ImageDraw.Draw(canvas)
    for r, (row, texts, (font, name)) in enumerate(zip(rows, captions, labels, strict=True)):
        draw.text((6, r * step + height // 2), name, fill="black", font=font, anchor="lm")
        for k, (image, text) in enumerate(zip(row, texts, strict=True)):
            left = margin + k * line
            canvas.paste(tile([[image]], scale).convert("RGB").crop((0, 0, width, height)), (left, r * step))
            small, text = labelled_font(text, 10)
            for n, words in enumerate(_wrapped(text, small, width)[:2]):
                place = (left + width // 2, r * step + height + GAP + n * CAPTION_LINE)
                draw.text(place, words, fill="black", font=small, anchor="ma")
    return canvas


def _wrapped(text: str, font: Any, width: int) -> list[str]:
    """text in lines of at most `width` pixels, a longer word on a line of its own."""
    lines: list[str] = []
    for word in text.split():
        if lines and font.getlength(f"{lines[-1]} {word}") <= width:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    return lines


def save_png(image: Image.Image, path: Path) -> None:
    """Write a PNG so that the file is whole or absent."""
    with atomic.new_file(path) as temporary:
        image.save(temporary, format="PNG")


def tile(rows: list[list[np.ndarray]], scale: int) -> Image.Image:
    """Rows of uint8 images [h, w, C] as one picture, each pixel `scale` wide; smaller ones sit in cells of the largest."""
    C = rows[0][0].shape[2]
    H, W = (max(image.shape[side] for row in rows for image in row) for side in (0, 1))
    canvas = np.full((len(rows) * (H * scale + GAP), max(map(len, rows)) * (W * scale + GAP), C), 255, np.uint8)
    for r, row in enumerate(rows):
        for k, tile in enumerate(row):
            big = tile.repeat(scale, 0).repeat(scale, 1)
            top, left = r * (H * scale + GAP), k * (W * scale + GAP)
            canvas[top : top + big.shape[0], left : left + big.shape[1]] = big
    return Image.fromarray(canvas[..., 0] if C == 1 else canvas)


def to_uint8(images: Tensor) -> np.ndarray:
    """[B, C, H, W] in [-1, 1] (clipped) -> uint8 [B, H, W, C]: the exact inverse of preprocessing on all 256 levels."""
    pixels = ((images.detach().to("cpu", torch.float32) + 1.0) * 127.5).round().clamp(0, 255)
    return pixels.to(torch.uint8).permute(0, 2, 3, 1).numpy()
