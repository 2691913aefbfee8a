"""Reading files that strangers may have written: no links, no devices, nothing too large, and pictures are written anew."""

from __future__ import annotations

import base64
import errno
import io
import itertools
import os
import stat
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any, BinaryIO

from latentdiff.errors import printable

MOST_BYTES = 2**25  # of a file that is read as a whole
MOST_PIXELS = 2**24  # of a picture
EXACT_PIXELS = 2**16  # a larger picture is shown with small losses, because a page holds many
MOST_FOLDERS = 2_000  # that are looked into
MOST_DEPTH = 5  # folders within folders
SKIPPED = ("state", "snapshots", "latents", "logs", "cache")  # large folders of a run that hold nothing to show
MOST_LETTERS, MOST_ENTRIES = 2_000, 2_000  # of a text and of a list in a JSON file


def open_inside(root: Path, path: Path, most: int | None = MOST_BYTES) -> BinaryIO:
    """A regular file below a folder, open to read. OSError for all else.

    No part of the path below the root may be a link, and the file may be no device or pipe: what lies elsewhere is not shown.

    Args:
        root: the folder; it may be a link itself, because its owner named it.
        path: of the file, beginning with root.
        most: bytes that it may have; None: any number.
    """
    try:
        parts = path.relative_to(root).parts
    except ValueError:
        raise PermissionError(errno.EPERM, "outside the folder") from None
    if not parts or ".." in parts:
        raise PermissionError(errno.EPERM, "outside the folder")
    try:
        # Each part is opened within the one before, so that none can be exchanged for a link between a check and its use
        place = os.open(root, os.O_RDONLY | os.O_DIRECTORY)
        for part in parts[:-1]:
            try:
                inner = os.open(part, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=place)
            finally:
                os.close(place)
            place = inner
        try:
            # A pipe would wait for its writer
            handle = os.open(parts[-1], os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=place)
        finally:
            os.close(place)
    except ValueError as error:  # a NUL, or half a character
        raise FileNotFoundError(errno.ENOENT, "no such file") from error
    status = os.fstat(handle)
    if not stat.S_ISREG(status.st_mode) or (most is not None and status.st_size > most):
        os.close(handle)
        raise PermissionError(errno.EPERM, "not a regular file, or too large")
    return os.fdopen(handle, "rb")


def is_file(root: Path, path: Path) -> bool:
    """Whether `open_inside` opens it."""
    try:
        open_inside(root, path, None).close()
    except OSError:
        return False
    return True


def is_folder(root: Path, path: Path) -> bool:
    """Whether it is a folder below the root, and no part of its path from there on is a link."""
    place = root
    for part in path.relative_to(root).parts:
        place /= part
        if place.is_symlink():
            return False
    return place.is_dir()


def status_of(file: BinaryIO) -> os.stat_result:
    """Size and times of an open file."""
    return os.fstat(file.fileno())


def folders_below(root: Path, skipped: tuple[str, ...] = SKIPPED) -> Generator[tuple[Path, set[str]], bool | None, None]:
    """(folder, names of its files) of a folder and those in it, the outermost first. Links and hidden ones are left out.

    At most MOST_FOLDERS are looked into, and MOST_DEPTH levels. A caller may send True to keep out of a folder's own folders.
    """
    waiting, looked = [(root, 0)], 0
    while waiting and looked < MOST_FOLDERS:
        folder, depth = waiting.pop(0)
        looked += 1
        files, inside = set(), []
        try:
            with os.scandir(folder) as entries:
                for number, entry in enumerate(entries):
                    if number >= 10 * MOST_FOLDERS:
                        break
                    if entry.is_dir(follow_symlinks=False):
                        if not entry.name.startswith(".") and entry.name not in skipped:
                            inside.append(folder / entry.name)
                    elif entry.is_file(follow_symlinks=False):
                        files.add(entry.name)
        except OSError:
            continue
        stays = yield folder, files
        if not stays and depth < MOST_DEPTH:
            waiting += [(each, depth + 1) for each in sorted(inside)]


def shown_name(root: Path, path: Path) -> str:
    """What a folder or file below the root is called on the page: its path from there on; of the root itself its name."""
    return printable(path.relative_to(root).as_posix()) if path != root else printable(root.resolve().name or "runs")


# Pictures


def check_pixels(file: BinaryIO) -> str:
    """Pillow's mode of a picture. OSError where it is none, or has more than MOST_PIXELS."""
    from latentdiff.data import image_files

    try:
        opened = image_files.open_image(file)  # reads its header alone
    except image_files.DECODING_ERRORS as error:
        raise OSError(errno.EIO, image_files.one_line(error)) from error
    if opened.width * opened.height > MOST_PIXELS:
        raise PermissionError(errno.EPERM, f"has more than {MOST_PIXELS:,} pixels")
    return opened.mode


def picture_link(file: BinaryIO, widest: int | None = None) -> tuple[str, int, int]:
    """(a data: address, width, height) of a picture: decoded and written anew, so that nothing else in the file is served.

    Args:
        file: open to read.
        widest: pixels to which the picture is made smaller. One of more than EXACT_PIXELS is not exact.

    Raises:
        OSError: it is no picture, or has more than MOST_PIXELS.
    """
    from PIL import Image

    from latentdiff.data import image_files

    grey = check_pixels(file) in image_files.GREY_MODES
    try:
        pixels = image_files.decode(file, 1 if grey else 3)
    except image_files.DECODING_ERRORS as error:
        raise OSError(errno.EIO, image_files.one_line(error)) from error
    image = Image.fromarray(pixels[..., 0] if grey else pixels)
    width, height = image.size
    if widest is not None and width > widest:
        image = image.resize((widest, max(1, round(height * widest / width))), Image.Resampling.LANCZOS)
    stream, kind = io.BytesIO(), "png" if image.width * image.height <= EXACT_PIXELS else "webp"
    image.save(stream, kind, quality=85)
    return f"data:image/{kind};base64,{base64.b64encode(stream.getvalue()).decode('ascii')}", width, height


# Values of JSON files


def bounded(value: Any, change: Callable[[str], str], depth: int = 20) -> Any:
    """A JSON value with `change` done to each text in it, and no more of it than can be shown.

    Texts are cut to MOST_LETTERS, lists and objects to MOST_ENTRIES; what lies deeper than `depth` becomes None.
    """
    if isinstance(value, str):
        return change(value[:MOST_LETTERS])
    if isinstance(value, dict | list) and depth == 0:
        return None
    if isinstance(value, dict):
        entries = itertools.islice(value.items(), MOST_ENTRIES)
        return {change(key[:MOST_LETTERS]): bounded(each, change, depth - 1) for key, each in entries}
    if isinstance(value, list):
        return [bounded(each, change, depth - 1) for each in value[:MOST_ENTRIES]]
    return value
