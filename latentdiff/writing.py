"""What commands write: generated images as a grid, an npz or a folder, texts; and whether they can be written."""

from __future__ import annotations

import os
import re
import textwrap
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from latentdiff import atomic
from latentdiff.errors import UserError

GRID_COLUMNS = 16
GRID_IMAGES = 1024  # a PNG grid of more is not for people
NAME_LENGTH = 120  # bytes of a prompt in a file's name
ROW_NAME = 60  # characters of a prompt beside its row of a grid


def check_out(out: str | Path, total: int) -> Path:
    """The output path if it can be written: .png, .npz or a folder. UserError otherwise, before any work is done."""
    path = Path(out)
    if not str(out) or (not path.suffix and path.name.startswith(".")):
        raise UserError(f"--out {str(out)!r}: give a file that ends in .png or .npz, or a folder's name")
    if not path.suffix and path.is_dir() and any(path.iterdir()):
        raise UserError(f"--out {out}: the folder is not empty; name a new one, so that old images do not stand among the new")
    if path.suffix not in (".png", ".npz", ""):
        raise UserError(f"--out {out}: must end in .png (a grid) or .npz, or name a folder")
    if path.suffix and path.is_dir() or not path.suffix and path.is_file():
        raise UserError(f"--out {out}: is {'a folder' if path.is_dir() else 'a file'} already")
    if not path.suffix:
        check_out_folder(path)
    if path.suffix and not path.absolute().parent.is_dir():
        raise UserError(f"--out {out}: the folder {path.parent} does not exist")
    if path.suffix and not os.access(path.absolute().parent, os.W_OK):
        raise UserError(f"--out {out}: the folder {path.parent} cannot be written to")
    if path.suffix == ".png" and total > GRID_IMAGES:
        raise UserError(f"--out {out}: {total} images are too many for one grid ({GRID_IMAGES}); use .npz or a folder")
    return path


def check_out_folder(out: str | Path, flag: str = "--out") -> Path:
    """The folder of that name if files can be written there, now or once it is made. UserError otherwise, naming the flag."""
    path = Path(out)
    if not str(out):
        raise UserError(f"{flag} '': give a folder's name")
    if (path.exists() or path.is_symlink()) and not path.is_dir():
        raise UserError(f"{flag} {out}: is a file; name a folder")
    above = next(parent for parent in (path.absolute(), *path.absolute().parents) if parent.exists())
    if not above.is_dir():
        raise UserError(f"{flag} {out}: cannot be made, for {above} is a file")
    if not os.access(above, os.W_OK):
        raise UserError(f"{flag} {out}: the folder {above} cannot be written to")
    return path


def replace_text(path: Path, text: str) -> None:
    """Write a text file, whose folder is made: it is the old or the new one, never half of it."""
    atomic.write_text(path, text)


def write_file(path: Path, images: np.ndarray, names: list[str], labels: Sequence[int | None]) -> None:
    """uint8 images [N, H, W, C] as a .png or an .npz; names and labels are of each image, None is no class."""
    if path.suffix == ".npz":
        save_npz(path, images, np.array([-1 if label is None else label for label in labels]))
    else:
        from latentdiff.pictures import labelled_grid, save_png

        grid, captions = grid_rows(images, names)
        save_png(labelled_grid(grid, [textwrap.shorten(text, ROW_NAME, placeholder=" …") for text in captions]), path)


def write_folder(path: Path, images: np.ndarray, names: list[str], start: int = 0) -> None:
    """A PNG an image, numbered from `start`."""
    from PIL import Image

    path.mkdir(parents=True, exist_ok=True)
    for k, (image, text) in enumerate(zip(images, names, strict=True), start):
        name = re.sub(r"[^\w-]+", "_", text).encode()[:NAME_LENGTH].decode(errors="ignore") or "image"
        Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image).save(path / f"{k:05d}-{name}.png")


def grid_rows(images: np.ndarray, names: list[str]) -> tuple[list[list[np.ndarray]], list[str]]:
    """Rows of at most GRID_COLUMNS images of one subject, named at the first of its rows."""
    grid: list[list[np.ndarray]] = []
    captions: list[str] = []
    start = 0
    while start < len(names):
        stop = start
        while stop < len(names) and stop - start < GRID_COLUMNS and names[stop] == names[start]:
            stop += 1
        continues = start > 0 and names[start - 1] == names[start]
        captions.append("" if continues else names[start])
        grid.append(list(images[start:stop]))
        start = stop
    return grid, captions


def save_npz(path: Path, images: np.ndarray, labels: np.ndarray) -> None:
    """guided-diffusion's evaluation format: arr_0 uint8 [N, H, W, 3] (grey repeated), arr_1 int64 [N]; written atomically."""
    colour = np.repeat(images, 3, axis=-1) if images.shape[-1] == 1 else images
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.npz")
    np.savez(temporary, colour, labels.astype(np.int64))
    temporary.replace(path)
