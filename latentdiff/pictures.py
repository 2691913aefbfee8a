"""PNG pictures for people: rows of images, and grids with class names."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from latentdiff.data.preprocess import to_uint8

GAP = 2  # pixels between tiles


def save_rows(rows: list[Tensor], path: Path, scale: int = 2) -> None:
    """Write rows of images, each row [B, C, H, W] in [-1, 1], as one PNG enlarged `scale` times."""
    save_png(tile([list(to_uint8(row)) for row in rows], scale), path)


def labelled_grid(rows: list[list[np.ndarray]], names: list[str], scale: int = 2) -> Image.Image:
    """A grid with one row per name, the name at its left. Images are uint8 [H, W, C] of one size."""
    grid = tile(rows, scale).convert("RGB")
    font = ImageFont.load_default(size=14)
    margin = 12 + max(int(font.getlength(name)) for name in names)
    canvas = Image.new("RGB", (grid.width + margin, grid.height), "white")
    canvas.paste(grid, (margin, 0))
    height = rows[0][0].shape[0] * scale + GAP
    draw = ImageDraw.Draw(canvas)
    for k, name in enumerate(names):
        draw.text((6, k * height + height // 2), name, fill="black", font=font, anchor="lm")
    return canvas


def save_png(image: Image.Image, path: Path) -> None:
    """Write a PNG so that the file is whole or absent."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    image.save(temporary, format="PNG")
    temporary.replace(path)


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
