"""What commands write: generated images as a grid, an npz or a folder, texts; and whether they can be written.

Images may be more than memory holds: a folder and an npz are written as the images are made, a grid is of a few.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
import re
import shutil
import tempfile
import textwrap
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from latentdiff.errors import ReportedElsewhere, UserError
from latentdiff.utils import atomic, locks, processes, signals

GRID_COLUMNS = 16
GRID_IMAGES = 1024  # a PNG grid of more is not for people
NAME_LENGTH = 120  # bytes of a prompt in a file's name
ROW_NAME = 60  # characters of a prompt beside its row of a grid
METADATA = "latentdiff"  # the PNG text chunk that says what call made an image
BLOCK = 4096  # bytes that a small file takes on most disks
# Make(part, report): batches of the images of a part, uint8 [B, H, W, C]; report(n) is called with how many each had. Of an
# empty part it gives one image, which counts for nothing but shows the size
Make = Callable[[slice, Callable[[int], object]], Iterator[np.ndarray]]
PNG_START = b"\x89PNG\r\n\x1a\n"
PNG_END = b"\x00\x00\x00\x00IEND\xaeB`\x82"  # the last bytes of a whole PNG


def check_out(out: str | Path, total: int) -> Path:
    """The output path if it can be written: .png, .npz or a folder. UserError otherwise, before any work is done.

    total: how many images there will be; 0 where that is not known yet. A folder may hold images of `ImageFolder`, which
    looks itself whether they are of the same call.
    """
    path = Path(out)
    if not str(out) or (not path.suffix and path.name.startswith(".")):
        raise UserError(f"--out {str(out)!r}: give a file that ends in .png or .npz, or a folder's name")
    if not path.suffix and path.is_dir() and (there := _contents(path)) and metadata(there[0]) is None:
        raise UserError(_not_empty(path))
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


def check_space(path: Path, images: int, image_bytes: int) -> None:
    """UserError where the disk cannot hold so many images, each of at least `image_bytes`."""
    above = next(parent for parent in path.absolute().parents if parent.exists())
    needed, free = images * image_bytes, shutil.disk_usage(above).free
    if needed > free:
        raise UserError(
            f"--out {path}: {images:,} images take at least {needed / 1e9:,.1f} GB, and the disk has {free / 1e9:,.1f} GB "
            "free; make fewer, or name a place on another disk"
        )


def replace_text(path: Path, text: str) -> None:
    """Write a text file, whose folder is made: it is the old or the new one, never half of it."""
    atomic.write_text(path, text)


def write_grid(path: Path, images: np.ndarray, names: Sequence[str]) -> None:
    """uint8 images [N, H, W, C] as a labelled PNG grid; names are of each image."""
    from latentdiff.utils.images import labelled_grid, save_png

    grid, captions = grid_rows(images, names)
    save_png(labelled_grid(grid, [textwrap.shorten(text, ROW_NAME, placeholder=" …") for text in captions]), path)


class ImageFolder:
    """A folder of generated images, a PNG each, written as they are made; the same call goes on where it was stopped.

    Every image says in its metadata what call made it. A folder with images of another call, or with anything else, is
    refused. Several processes may write at once, each its own images, under one lock that their caller holds.
    """

    def __init__(self, path: Path, call: Mapping[str, Any]):
        """call: all that the images depend on, as JSON takes it, in the words of the command line."""
        self.path = path
        self.call: dict[str, Any] = json.loads(json.dumps(call))
        text = json.dumps(self.call, sort_keys=True)
        self.digest = hashlib.sha256(text.encode()).hexdigest()
        # A list of prompts may be long, and is not repeated in every file; the digest is over all of it
        self.short = {key: value for key, value in self.call.items() if not isinstance(value, (list, dict))}

    def start(self) -> None:
        """Take the folder: remove what a killed process left, and look at every image in it. One process calls it.

        UserError where the folder holds anything but images of this call.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        atomic.sweep(self.path)
        for path in locks.contents(self.path):
            found = metadata(path)
            if found is None and _is_whole(path):
                raise UserError(_not_empty(self.path))
            if found is not None and found.get("digest") != self.digest:
                raise UserError(
                    f"--out {self.path}: holds images of another call ({self._difference(found)}); give the same arguments "
                    "to go on, or name another folder"
                )

    def _difference(self, found: Mapping[str, Any]) -> str:
        call = found.get("call")
        call = call if isinstance(call, dict) else {}
        keys = [key for key in {**call, **self.short} if call.get(key) != self.short.get(key)]
        return ", ".join(f"{k} {_shown(call.get(k))}, now {_shown(self.short.get(k))}" for k in keys[:3]) or "other subjects"

    def has(self, number: int, name: str) -> bool:
        """Whether an image of this call is there, whole."""
        path = self.path / file_name(number, name)
        return _is_whole(path) and (metadata(path) or {}).get("digest") == self.digest

    def write(self, number: int, name: str, image: np.ndarray) -> None:
        """Write a uint8 image [H, W, C]; the file is whole or absent."""
        from PIL import Image
        from PIL.PngImagePlugin import PngInfo

        path, info = self.path / file_name(number, name), PngInfo()
        about = {"digest": self.digest, "image": number, "shows": name, "call": self.short}
        info.add_itxt(METADATA, json.dumps(about, ensure_ascii=False))
        temporary = path.with_name(f".{path.name}.tmp")
        with atomic.naming(path):  # not synced: thousands of small files would take minutes, and `has` looks at their ends
            Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image).save(temporary, format="PNG", pnginfo=info)
            os.replace(temporary, path)


def metadata(path: Path) -> dict[str, Any] | None:
    """What `ImageFolder` says of an image, in the file itself; None where it says nothing, or the file is no PNG."""
    from PIL import Image

    try:
        with Image.open(path, formats=["PNG"]) as file:
            found = json.loads(file.info.get(METADATA, "null"))
    except (OSError, ValueError, SyntaxError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def _is_whole(path: Path) -> bool:
    """Whether a PNG has its end: one that a system lost with its power may lack it. True for other files."""
    try:
        with path.open("rb") as file:
            if file.read(len(PNG_START)) not in (PNG_START, b""):
                return True
            file.seek(-len(PNG_END), os.SEEK_END)
            return file.read() == PNG_END
    except OSError:
        return path.exists() and path.is_dir()


@contextlib.contextmanager
def npz_writer(path: Path, labels: np.ndarray) -> Iterator[Callable[[np.ndarray], None]]:
    """A function to which uint8 images [B, H, W, C] are given as they are made, all [N, ...] of them in order.

    The file is in guided-diffusion's evaluation format: arr_0 uint8 [N, H, W, 3] (grey repeated) and arr_1 int64 [N], which
    is `labels`, -1 for none. It appears, whole, when the block ends without an error.
    """
    with atomic.new_file(path) as temporary, zipfile.ZipFile(temporary, "w", allowZip64=True) as archive:
        with contextlib.ExitStack() as stack:
            streams: list[Any] = []

            def add(images: np.ndarray) -> None:
                colour = np.repeat(images, 3, axis=-1) if images.shape[-1] == 1 else images
                if not streams:  # the size of an image is known now
                    streams.append(stack.enter_context(archive.open("arr_0.npy", "w", force_zip64=True)))
                    header = {"descr": "|u1", "fortran_order": False, "shape": (len(labels), *colour.shape[1:])}
                    np.lib.format.write_array_header_1_0(streams[0], header)
                streams[0].write(np.ascontiguousarray(colour))

            yield add
        with archive.open("arr_1.npy", "w", force_zip64=True) as stream:
            np.lib.format.write_array(stream, labels.astype(np.int64))


class Names(Sequence[str]):
    """What each of N images shows, in words, and its class, for rows of `num_images` each; made as they are asked for."""

    def __init__(self, classes: Sequence[str], rows: Sequence[int | str | None], labels: Sequence[int | None], num_images: int):
        """classes: the model's names, one for "none" at the end.  rows: prompts, classes or None.  labels: their classes."""
        self.num_images, self.labels = num_images, labels
        pairs = [("" if label is None else classes[label], row) for label, row in zip(labels, rows, strict=True)]
        self.words = [": ".join(part for part in pair if part and isinstance(part, str)) for pair in pairs]

    def __len__(self) -> int:
        return len(self.words) * self.num_images

    def __getitem__(self, index: Any) -> Any:
        return self.words[range(len(self))[index] // self.num_images]

    def classes(self) -> np.ndarray:
        """int64 [N], -1 for none."""
        return np.repeat([-1 if label is None else label for label in self.labels], self.num_images).astype(np.int64)


def to_folder(
    folder: ImageFolder,
    made: Make,
    names: Names,
    part: slice,
    batch_size: int,
    watch: signals.Watch,
    report: Callable[[int], object],
) -> None:
    """Write this process's part of the images batch by batch, leaving out what is there; a signal ends it after a batch."""
    problem = None
    if processes.rank() == 0:
        try:
            check_space(folder.path, len(names), BLOCK)
            folder.start()
        except UserError as error:
            problem = error
    if not processes.agree(problem is None):
        raise problem if problem is not None else ReportedElsewhere(f"{folder.path}: holds images of another call")
    with watch.deferred():
        # Batches are never cut, for an image depends on its batch in the last bit: one that is not whole is made again
        for start in range(part.start, part.stop, batch_size):
            batch = slice(start, min(start + batch_size, part.stop))
            numbers = range(batch.start, batch.stop)
            if all(folder.has(number, names[number]) for number in numbers):
                report(len(numbers))
            else:
                for number, image in zip(numbers, next(made(batch, report)), strict=True):
                    folder.write(number, names[number], image)
            if watch:
                watch.stop()
    if part.start == part.stop:
        next(made(part, report))
    processes.meet()


def to_grid(path: Path, made: Make, names: Names, part: slice, batch_size: int, report: Callable[[int], object]) -> None:
    """Write all images as a labelled PNG grid, by the first process."""
    mine = np.concatenate(list(made(part, report)))[: part.stop - part.start]
    images = processes.gather(mine, len(names), batch_size)
    if images is not None:
        write_grid(path, images, names)


def to_npz(
    path: Path,
    made: Make,
    names: Names,
    part: slice,
    batch_size: int,
    report: Callable[[int], object],
) -> None:
    """Write all images to an npz. Memory holds a batch: one process writes as it goes, several keep theirs on the disk."""
    total, batches = len(names), made(part, report)
    first = next(batches)
    check_space(path, total, int(np.prod(first.shape[1:-1])) * 3)
    with contextlib.ExitStack() as stack:
        writes = processes.rank() == 0
        add = stack.enter_context(npz_writer(path, names.classes())) if writes else lambda images: None
        if processes.count() == 1:
            for images in itertools.chain([first], batches):
                add(images)
            return
        spool = stack.enter_context(tempfile.TemporaryFile())
        for images in itertools.chain([first], batches):
            spool.write(np.ascontiguousarray(images))
        spool.flush()
        mine = np.memmap(spool, np.uint8, "r+", shape=(max(1, part.stop - part.start), *first.shape[1:]))
        processes.gather(mine[: part.stop - part.start], total, batch_size, take=add)


def file_name(number: int, text: str) -> str:
    """The name of an image in a folder: its number, and what it shows as far as that makes a file name."""
    name = re.sub(r"[^\w-]+", "_", text).encode()[:NAME_LENGTH].decode(errors="ignore") or "image"
    return f"{number:05d}-{name}.png"


def grid_rows(images: np.ndarray, names: Sequence[str]) -> tuple[list[list[np.ndarray]], list[str]]:
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


def _contents(folder: Path) -> list[Path]:
    """What lies in a folder, but for locks and what killed processes left."""
    return [path for path in locks.contents(folder) if not atomic.is_leftover(path)]


def _not_empty(path: Path) -> str:
    return f"--out {path}: the folder is not empty; name a new one, so that old images do not stand among the new"


def _shown(value: Any) -> str:
    return textwrap.shorten(json.dumps(value, ensure_ascii=False), 40, placeholder=" …")
