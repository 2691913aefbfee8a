"""What commands write: generated images as a grid, an npz or a folder, and the checks that these can be written.

There may be more images than memory holds: a folder and an npz are written batch by batch. A grid is small.
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

from latentdiff.errors import UserError
from latentdiff.utils import atomic, locks, processes, signals

GRID_COLUMNS = 16
GRID_IMAGES = 1024  # more images in one PNG are not for people
NAME_LENGTH = 120  # bytes of a prompt in a file's name
ROW_NAME = 60  # characters of a prompt beside its row of a grid
METADATA = "latentdiff"  # the PNG text chunk that holds the call that made an image
BLOCK = 4096  # bytes that a small file takes on most disks
PNG_START = b"\x89PNG\r\n\x1a\n"
PNG_END = b"\x00\x00\x00\x00IEND\xaeB`\x82"  # the last bytes of a whole PNG

# Make(part, report) yields the batches of images of a part, uint8 [B, H, W, C], and calls report(n) with the size of each.
# Of an empty part it yields one image and reports 0: the image is not written, but shows its size
Make = Callable[[slice, Callable[[int], object]], Iterator[np.ndarray]]


def check_out(out: str | Path, total: int, kinds: Sequence[str] = (".png", ".npz")) -> Path:
    """The output path, if it can be written: a .png, a .npz or a folder. UserError otherwise, before any work is done.

    total: the number of images; 0 where it is not known yet. kinds: the suffixes of files that may be written. A folder may
    hold images of `ImageFolder`, which checks by itself that they are of the same call.
    """
    path = Path(out)
    is_folder = not path.suffix
    if not str(out) or (is_folder and path.name.startswith(".")):
        raise UserError(f"--out {str(out)!r}: give a file that ends in {' or '.join(kinds)}, or a folder's name")
    if path.suffix not in (*kinds, ""):
        listed = " or ".join(".png (a grid)" if kind == ".png" else kind for kind in kinds)
        raise UserError(f"--out {out}: must end in {listed}, or name a folder")
    if is_folder:
        if path.is_file():
            raise UserError(f"--out {out}: is a file already")
        entries = [entry for entry in locks.contents(path) if not atomic.is_leftover(entry)]
        if entries and metadata(entries[0]) is None:
            raise UserError(_not_empty(path))
        return check_out_folder(path)
    if path.is_dir():
        raise UserError(f"--out {out}: is a folder already")
    if not path.absolute().parent.is_dir():
        raise UserError(f"--out {out}: the folder {path.parent} does not exist")
    if not os.access(path.absolute().parent, os.W_OK):
        raise UserError(f"--out {out}: the folder {path.parent} cannot be written to")
    if path.suffix == ".png" and total > GRID_IMAGES:
        other = ".npz or a folder" if ".npz" in kinds else "a folder"
        raise UserError(f"--out {out}: {total} images are too many for one grid ({GRID_IMAGES}); use {other}")
    return path


def check_out_folder(out: str | Path, flag: str = "--out") -> Path:
    """The path of a folder, if files can be written there, now or once it is made. UserError otherwise, naming the flag."""
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
    """UserError where the disk is too small for the images.

    path: where they will be written. images: how many. image_bytes: the least size of each.
    """
    above = next(parent for parent in path.absolute().parents if parent.exists())
    needed, free = images * image_bytes, shutil.disk_usage(above).free
    if needed > free:
        raise UserError(
            f"--out {path}: {images:,} images take at least {needed / 1e9:,.1f} GB, and the disk has {free / 1e9:,.1f} GB "
            "free; make fewer, or name a place on another disk"
        )


class ImageFolder:
    """A folder of generated images, one PNG each, written as they are made. The same call goes on where it was stopped.

    The metadata of every image hold the call that made it. A folder with images of another call, or with anything else, is
    refused. Several processes may write at once, each its own images, under one lock that their caller holds.
    """

    def __init__(self, path: Path, call: Mapping[str, Any]):
        """call: everything that the images depend on, {flag or argument: JSON value}."""
        self.path = path
        self.call: dict[str, Any] = json.loads(json.dumps(call))
        text = json.dumps(self.call, sort_keys=True)
        self.digest = hashlib.sha256(text.encode()).hexdigest()
        # A list of prompts may be long, so it is not repeated in every file. The digest is over all of it
        self.short = {key: value for key, value in self.call.items() if not isinstance(value, (list, dict))}

    def start(self) -> None:
        """Remove what a killed process left in the folder, and check every image in it. Only process 0 calls this.

        UserError where the folder holds anything but images of this call.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        atomic.sweep(self.path)
        for path in locks.contents(self.path):
            entry = metadata(path)
            if entry is None and _is_whole(path):
                raise UserError(_not_empty(self.path))
            if entry is not None and entry.get("digest") != self.digest:
                raise UserError(
                    f"--out {self.path}: holds images of another call ({self._difference(entry)}); give the same arguments "
                    "to go on, or name another folder"
                )

    def _difference(self, entry: Mapping[str, Any]) -> str:
        """How the call of an image differs from this one, in words."""
        call = entry.get("call")
        call = call if isinstance(call, dict) else {}
        keys = [key for key in {**call, **self.short} if call.get(key) != self.short.get(key)]
        changes = [f"{key} {_shown(call.get(key))}, now {_shown(self.short.get(key))}" for key in keys[:3]]
        return ", ".join(changes) or "other subjects"

    def has(self, number: int, name: str) -> bool:
        """Whether an image of this call is there, whole."""
        path = self.path / file_name(number, name)
        return _is_whole(path) and (metadata(path) or {}).get("digest") == self.digest

    def write(self, number: int, name: str, image: np.ndarray) -> None:
        """Write a uint8 image [H, W, C]. The file is whole or absent. UserError where it cannot be written."""
        from PIL import Image
        from PIL.PngImagePlugin import PngInfo

        path, info = self.path / file_name(number, name), PngInfo()
        entry = {"digest": self.digest, "image": number, "shows": name, "call": self.short}
        info.add_itxt(METADATA, json.dumps(entry, ensure_ascii=False))
        temporary = path.with_name(f".{path.name}.tmp")
        with atomic.naming(path):  # not synced: that takes minutes for thousands of files, and `has` checks their ends
            Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image).save(temporary, format="PNG", pnginfo=info)
            os.replace(temporary, path)


def metadata(path: Path) -> dict[str, Any] | None:
    """What `ImageFolder` wrote into an image: {digest, image, shows, call}. None for any other file."""
    from PIL import Image

    try:
        with Image.open(path, formats=["PNG"]) as file:
            entry = json.loads(file.info.get(METADATA, "null"))
    except (OSError, ValueError, SyntaxError, RecursionError):
        return None
    return entry if isinstance(entry, dict) else None


def _is_whole(path: Path) -> bool:
    """Whether a PNG has its end, which one may lack after a power failure. True for other files, False for empty ones."""
    try:
        with path.open("rb") as file:
            if file.read(len(PNG_START)) not in (PNG_START, b""):
                return True
            file.seek(-len(PNG_END), os.SEEK_END)
            return file.read() == PNG_END
    except OSError:
        return path.is_dir()


@contextlib.contextmanager
def npz_writer(path: Path, labels: np.ndarray) -> Iterator[Callable[[np.ndarray], None]]:
    """A function to call with uint8 images [B, H, W, C] as they are made, until all [N, ...] are given, in order.

    The file has the format of guided-diffusion's evaluation: arr_0 uint8 [N, H, W, 3] (grey is repeated) and arr_1 int64 [N],
    which is `labels`, -1 for no class. It appears, whole, when the block ends without an error.
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
    """What each of N images shows, in words, and its class. A row stands for `num_images` images."""

    def __init__(self, classes: Sequence[str], rows: Sequence[int | str | None], labels: Sequence[int | None], num_images: int):
        """
        Args:
            classes: the model's class names, then one for "no class".
            rows: prompts, classes or None.
            labels: the class of each row, or None.
            num_images: images of each row.
        """
        self.num_images, self.labels = num_images, labels
        pairs = [("" if label is None else classes[label], row) for label, row in zip(labels, rows, strict=True)]
        self.words = [": ".join(part for part in pair if part and isinstance(part, str)) for pair in pairs]

    def __len__(self) -> int:
        return len(self.words) * self.num_images

    def __getitem__(self, index: Any) -> Any:
        return self.words[range(len(self))[index] // self.num_images]

    def classes(self) -> np.ndarray:
        """The class of each image, int64 [N], -1 for none."""
        return np.repeat([-1 if label is None else label for label in self.labels], self.num_images).astype(np.int64)


def to_folder(
    folder: ImageFolder,
    make: Make,
    names: Names,
    part: slice,
    batch_size: int,
    watch: signals.Watch,
    report: Callable[[int], object],
) -> None:
    """Write this process's part of the images batch by batch, except those that exist. A signal ends it after a batch.

    Args:
        folder: where, and for which call.
        make: makes the images of a part, see `Make`.
        names: what each of all images shows.
        part: the images of this process, see `processes.share`.
        batch_size: images made at a time.
        watch: the signals of the job.
        report: called with the number of images of each batch, made or found.

    Raises:
        UserError: the disk is too small, or the folder holds anything but images of this call.
    """
    # Process 0 checks the folder for all
    problem = None
    if processes.rank() == 0:
        try:
            check_space(folder.path, len(names), BLOCK)
            folder.start()
        except UserError as error:
            problem = error
    processes.raise_together(problem)

    # An image depends on its batch in the last bit, so a batch that is not complete is made again as a whole
    with watch.deferred():
        for start in range(part.start, part.stop, batch_size):
            batch = slice(start, min(start + batch_size, part.stop))
            numbers = range(batch.start, batch.stop)
            if all(folder.has(number, names[number]) for number in numbers):
                report(len(numbers))
            else:
                for number, image in zip(numbers, next(make(batch, report)), strict=True):
                    folder.write(number, names[number], image)
            if watch:
                watch.stop()
    if part.start == part.stop:
        next(make(part, report))
    processes.meet()


def to_grid(path: Path, make: Make, names: Names, part: slice, batch_size: int, report: Callable[[int], object]) -> None:
    """Write all images as one labelled PNG grid, by process 0; the others send it their part.

    path: the file. make, names, part, batch_size, report: as in `to_folder`.
    """
    from latentdiff.utils.images import labelled_grid, save_png

    own = np.concatenate(list(make(part, report)))[: part.stop - part.start]
    images = processes.gather(own, len(names), batch_size)
    if images is not None:
        grid, captions = grid_rows(images, names)
        save_png(labelled_grid(grid, [textwrap.shorten(text, ROW_NAME, placeholder=" …") for text in captions]), path)


def to_npz(path: Path, make: Make, names: Names, part: slice, batch_size: int, report: Callable[[int], object]) -> None:
    """Write all images to one npz, by process 0; the others send it their part. Memory holds one batch.

    path: the file; for its format see `npz_writer`. make, names, part, batch_size, report: as in `to_folder`. UserError where
    the
    disk is too small.
    """
    total, batches = len(names), make(part, report)
    first = next(batches)
    batches = itertools.chain([first], batches)
    check_space(path, total, int(np.prod(first.shape[1:-1])) * 3)
    with contextlib.ExitStack() as stack:
        is_writer = processes.rank() == 0
        add = stack.enter_context(npz_writer(path, names.classes())) if is_writer else lambda images: None
        if processes.count() == 1:  # written as they are made
            for images in batches:
                add(images)
            return
        spool = stack.enter_context(tempfile.TemporaryFile())
        for images in batches:
            spool.write(np.ascontiguousarray(images))
        spool.flush()
        own = np.memmap(spool, np.uint8, "r+", shape=(max(1, part.stop - part.start), *first.shape[1:]))
        processes.gather(own[: part.stop - part.start], total, batch_size, take=add)


def file_name(number: int, text: str) -> str:
    """The file name of an image: its number, and as much of what it shows as makes a file name."""
    name = re.sub(r"[^\w-]+", "_", text).encode()[:NAME_LENGTH].decode(errors="ignore") or "image"
    return f"{number:05d}-{name}.png"


def grid_rows(images: np.ndarray, names: Sequence[str]) -> tuple[list[list[np.ndarray]], list[str]]:
    """(rows of images, caption of each row), of at most GRID_COLUMNS images of one name in a row.

    images: uint8 [N, H, W, C]. names: of each image; equal neighbours share rows, and the first of these has the name as
    caption.
    """
    grid: list[list[np.ndarray]] = []
    captions: list[str] = []
    start = 0
    for name, group in itertools.groupby(names):
        stop = start + len(list(group))
        for left in range(start, stop, GRID_COLUMNS):
            grid.append(list(images[left : min(left + GRID_COLUMNS, stop)]))
            captions.append(name if left == start else "")
        start = stop
    return grid, captions


def _not_empty(path: Path) -> str:
    return f"--out {path}: the folder is not empty; name a new one, so that old images do not stand among the new"


def _shown(value: Any) -> str:
    return textwrap.shorten(json.dumps(value, ensure_ascii=False), 40, placeholder=" …")
