"""What every source of images offers, however they are stored, and the rules that all kinds of storage share.

A source is read-only. It knows nothing of the size that a model needs, of batches or of epochs. Any image can be read by
its number, and image i is the same on every machine. So N processes can share an epoch, and a run can resume at the right
sample.
"""

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch

from latentdiff.data.file_report import FileReport
from latentdiff.data.image_files import DECODING_ERRORS, GREY_MODES, WHITE, Color, File, Header, decode, hash_ends, one_line
from latentdiff.errors import UserError

TEXT_COLUMNS = ("text", "caption")  # where captions are looked for when no column is named
SURROGATES = re.compile("[\ud800-\udfff]")  # halves of characters, which JSON can spell and no tokenizer reads
T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True)
class Columns:
    """Where a table or an archive keeps images, labels and captions; None: the usual names (see open_source).

    caption: of each image that has none; {class} in it becomes the name of the image's class. pair: the column of a metadata
    file that names the picture paired with each image; None: images have no pairs.
    """

    image: str | None = None
    label: str | None = None
    text: str | None = None
    caption: str | None = None
    pair: str | None = None


@dataclass(frozen=True)
class Reading:
    """How images are read.

    channels: 1, 3, or None for 1 where every image is grey, else 3. max_bad_share: the share of images that may be
    unreadable; one may, unless it is 0. background: the colour under transparency: red, green and blue, 0 to 255.
    """

    channels: int | None = None
    max_bad_share: float = 0.01
    background: Color = WHITE


@dataclass(frozen=True)
class Annotations:
    """What is known of images besides their pixels.

    labels: the index of each image's class in class_names, or None without classes. captions: one or more of each image,
    or None.
    """

    labels: list[int] | None
    class_names: list[str]
    captions: list[tuple[str, ...]] | None


class UnreadableImage(UserError):
    """One image file that cannot be decoded. A few of them are skipped; many are an error."""


class ImageSource:
    """N images with optional labels and captions.

    Attributes: name (as the user wrote it), channels (1 or 3: what `read` returns), class_names (empty when
    unlabelled), labels (int64 [N] or None), captions (N tuples of one caption or more, or None), sizes (int64 [N, 2],
    height and width as `read` returns them), bad ({file name: reason} of the images that were skipped), report (the other
    files that are not used, and remarks), unlabelled (why there are no labels where one may expect some), blocks (how many
    of the images lie together, one after another, where reading one of them reads them all; else None), pairs and
    pair_sizes (the file of the picture paired with each image, N names, and their heights and widths, int64 [N, 2]; or None).
    """

    blocks: tuple[int, ...] | None = None
    pairs: list[str] | None = None
    pair_sizes: np.ndarray | None = None
    unlabelled: str | None = None

    def __init__(
        self,
        name: str,
        channels: int,
        class_names: list[str],
        labels: torch.Tensor | None,
        captions: list[tuple[str, ...]] | None,
        sizes: np.ndarray,
    ):
        self.name, self.channels, self.class_names = name, channels, class_names
        self.labels, self.captions, self.sizes = labels, captions, sizes
        self.bad: dict[str, str] = {}
        self.report = FileReport()

    def __len__(self) -> int:
        return len(self.sizes)

    def read(self, i: int) -> np.ndarray:
        """Image i as uint8 [H, W, C]. Raises UnreadableImage for a file that cannot be decoded."""
        raise NotImplementedError

    def read_pair(self, i: int) -> np.ndarray:
        """The picture paired with image i, uint8 [H, W, C]. UserError where there is none, or it cannot be decoded."""
        raise UserError(f"data '{self.name}': its images have no paired pictures")

    def pairs_fingerprint(self) -> str:
        """Hex sha256 of the paired pictures: their names, and of each what `fingerprint` covers of an image."""
        raise UserError(f"data '{self.name}': its images have no paired pictures")

    def fingerprint(self) -> str:
        """Hex sha256 of what a model would see: the same wherever the same data lie."""
        raise NotImplementedError

    def latents_fingerprint(self) -> str:
        """The fingerprint that a latent cache keeps: without captions where they do not decide which data these are."""
        return self.fingerprint()


class ArraySource(ImageSource):
    """Images held in memory: uint8 [N, H, W, C] with int64 labels [N] or None."""

    def __init__(self, name: str, images: np.ndarray, labels: torch.Tensor | None, class_names: Sequence[str] = ()):
        n, height, width, channels = images.shape
        super().__init__(name, channels, list(class_names), labels, None, np.tile(np.array([height, width]), (n, 1)))
        self.images = images

    def read(self, i: int) -> np.ndarray:
        return self.images[i]

    def fingerprint(self) -> str:
        digest = hashlib.sha256(json.dumps([list(self.images.shape), self.class_names]).encode())
        digest.update(self.images.tobytes())
        if self.labels is not None:
            digest.update(self.labels.numpy().tobytes())
        return digest.hexdigest()


class EncodedImages(ImageSource):
    """Images as encoded bytes (PNG, JPEG, …), checked when the source opens and decoded when they are read.

    A subclass says how to `open` an image. Unreadable images are dropped. More of them than reading.max_bad_share allows
    are a UserError, and so is a source without a readable image. Attributes: files (a name for each image; messages show
    it after `place`), rows (the place of each among all images, the unreadable ones included), background.

    files, headers, annotations: of all images; a header is what `inspect` returned.
    """

    def __init__(
        self, name: str, place: str, files: list[str], headers: list[Header], annotations: Annotations, reading: Reading
    ):
        good = [i for i, header in enumerate(headers) if not isinstance(header, str)]
        modes = {headers[i][0] for i in good}
        labels, captions = annotations.labels, annotations.captions
        super().__init__(
            name,
            reading.channels or (1 if modes <= GREY_MODES else 3),
            annotations.class_names,
            None if labels is None else torch.tensor([labels[i] for i in good], dtype=torch.int64),
            None if captions is None else [captions[i] for i in good],
            np.array([headers[i][1] for i in good], dtype=np.int64).reshape(-1, 2),
        )
        self.place, self.rows, self.files = place, good, [files[i] for i in good]
        self._all, self._max_bad_share, self.background = len(files), reading.max_bad_share, reading.background
        self.bad = {file: header for file, header in zip(files, headers, strict=True) if isinstance(header, str)}
        self._check_bad()
        if not good:
            raise UserError(f"data '{name}': none of its {len(files)} images can be read")

    def open(self, i: int) -> File:
        """The encoded image i. An error of the storage is raised as it is: it does not make the image unreadable."""
        raise NotImplementedError

    def ends(self, limit: int | None = None) -> list[str]:
        """hash_ends of every image, or of the first `limit`."""
        return in_threads(lambda i: hash_ends(self.open(i)), range(len(self))[:limit])

    def read(self, i: int) -> np.ndarray:
        file = self.open(i)
        try:
            return decode(file, self.channels, self.background)
        except DECODING_ERRORS as error:
            name, reason = self.files[i], one_line(error)
            self.bad[name] = reason
            self._check_bad()
            raise UnreadableImage(f"{self.place}{name}: cannot be read as an image ({reason})") from error

    def _check_bad(self) -> None:
        share = self._max_bad_share
        if len(self.bad) > max(share * self._all, 1 if share else 0):
            shown = ", ".join(f"{self.place}{name} ({why})" for name, why in list(self.bad.items())[:3])
            raise UserError(
                f"data '{self.name}': {len(self.bad)} of {self._all} images cannot be read, more than "
                f"max_bad_share={share:g} allows: {shown}{', …' if len(self.bad) > 3 else ''}; "
                "remove them, or raise data.max_bad_share to leave them out"
            )

    def fingerprint(self) -> str:
        """Covers names, labels, captions, channels, and of each image the length and the first and last 32 KiB.

        For an image of up to 64 KiB that is its whole content. In a larger one, an edit that leaves the length and both
        ends alone is not noticed: terabytes are not read at every start. Times of modification do not count, so a copy has
        the same fingerprint.
        """
        return self._digest(self.captions)

    def _digest(self, captions: list[tuple[str, ...]] | None) -> str:
        labels = None if self.labels is None else self.labels.tolist()
        facts = [self.channels, self.class_names, self.files, labels, captions, self.ends()]
        facts += [] if self.background == WHITE else [self.background]  # earlier versions knew white alone and wrote nothing
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def in_threads(function: Callable[[T], R], items: Iterable[T]) -> list[R]:
    """function of each item, in order, by as many threads as there are processors, 16 at most."""
    with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
        return list(pool.map(function, items))


def all_or_none(values: Sequence[T | None], column: str, where: Callable[[int], str]) -> list[T] | None:
    """The values, or None where all are None; a UserError where only some are. where(i): how a message names row i."""
    missing = [i for i, value in enumerate(values) if value is None]
    if missing and len(missing) < len(values):
        raise UserError(f"{where(missing[0])}: has no {column} although others do")
    return None if missing else [value for value in values if value is not None]


def captions_of(text: object, where: str) -> tuple[str, ...] | None:
    """The captions of one row: a string, or a list of them; None for an empty one."""
    if text is None or text == "" or text == []:
        return None
    captions = tuple(text) if isinstance(text, list) else (str(text),)
    if isinstance(text, dict) or not all(isinstance(c, str) and c.strip() and not SURROGATES.search(c) for c in captions):
        raise UserError(f"{where}: text must be a caption, or a list of captions that are not empty")
    return captions


def class_names_of(labels: Iterable[str] | None) -> list[str]:
    """The distinct labels, sorted: as numbers when all are numbers, so that class 10 comes after class 9.

    Of two spellings of one number, such as 1 and 01, the shorter comes first.
    """
    names = sorted(set(labels or ()))
    if not all(name.isdecimal() and len(name) < 20 for name in names):
        return names
    return sorted(names, key=lambda name: (int(name), len(name)))


def numbered(labels: list[str] | None, class_names: list[str], where: str) -> list[int] | None:
    """The index of each label in the class names; a UserError for a label that is not among them."""
    if labels is None:
        return None
    index = {class_name: k for k, class_name in enumerate(class_names)}
    unknown = sorted(set(labels) - set(index))
    if unknown:
        raise UserError(f"{where}: class '{unknown[0]}' is not a class of train/; valid are {', '.join(class_names)}")
    return [index[label] for label in labels]
