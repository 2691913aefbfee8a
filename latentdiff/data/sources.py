"""Image sources: one string names a data set, and every kind answers the same few questions.

A source is read-only and knows nothing of sizes wanted, batches or epochs. Image i is the same on every machine:
files are sorted by name, never listed in the order of the file system.
"""

import csv
import hashlib
import json
import os
import re
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

from latentdiff.data.files import DECODING_ERRORS, GREY_MODES, decode, hash_ends, inspect, one_line, read_idx
from latentdiff.data.order import permutation
from latentdiff.errors import UserError

FASHION_MNIST_CLASSES = [
    "T-shirt",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
]
FASHION_MNIST_FOLDER = "/usr/share/datasets/fashion-mnist"
SURROGATES = re.compile("[\ud800-\udfff]")  # halves of characters, which JSON can spell and no tokenizer reads
IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".pgm", ".ppm"}


class UnreadableImage(UserError):
    """One image file that cannot be decoded; few of them are skipped, many are an error."""


class ImageSource:
    """N images with optional labels and captions.

    Attributes: name (as the user wrote it), channels (1 or 3: what `read` returns), class_names (empty when
    unlabelled), labels (int64 [N] or None), captions (N tuples of one caption or more, or None), sizes (int64 [N, 2],
    height and width as `read` returns them), bad ({file name: reason} of what was skipped).
    """

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

    def __len__(self) -> int:
        return len(self.sizes)

    def read(self, i: int) -> np.ndarray:
        """Image i as uint8 [H, W, C]. Raises UnreadableImage for a file that cannot be decoded."""
        raise NotImplementedError

    def fingerprint(self) -> str:
        """Hex sha256 of what a model would see: the same wherever the same data lie."""
        raise NotImplementedError


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


class FolderSource(ImageSource):
    """Image files below one folder, checked when it opens and decoded when they are read."""

    def __init__(
        self,
        name: str,
        root: Path,
        files: list[str],
        labels: list[int] | None,
        class_names: list[str],
        captions: list[tuple[str, ...]] | None,
        channels: int | None,
        max_bad_share: float,
    ):
        with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
            headers = list(pool.map(lambda file: inspect(root / file), files))
        good = [i for i, header in enumerate(headers) if not isinstance(header, str)]
        modes = {headers[i][0] for i in good}
        sizes = np.array([headers[i][1] for i in good], dtype=np.int64).reshape(-1, 2)
        super().__init__(
            name,
            channels or (1 if modes <= GREY_MODES else 3),
            class_names,
            None if labels is None else torch.tensor([labels[i] for i in good], dtype=torch.int64),
            None if captions is None else [captions[i] for i in good],
            sizes,
        )
        self.root, self.files = root, [files[i] for i in good]
        self._found, self._max_bad_share = len(files), max_bad_share
        for file, header in zip(files, headers, strict=True):
            if isinstance(header, str):
                self._note_bad(file, header)
        if not good:
            raise UserError(f"data '{name}': none of its {len(files)} images can be read")

    def read(self, i: int) -> np.ndarray:
        try:
            return decode(self.root / self.files[i], self.channels)
        except DECODING_ERRORS as error:
            self._note_bad(self.files[i], one_line(error))
            raise UnreadableImage(f"{self.root / self.files[i]}: cannot be read as an image ({one_line(error)})") from error

    def _note_bad(self, file: str, reason: str) -> None:
        self.bad[file] = reason
        if len(self.bad) > self._max_bad_share * self._found:
            shown = ", ".join(f"{self.root / name} ({why})" for name, why in list(self.bad.items())[:3])
            raise UserError(
                f"data '{self.name}': {len(self.bad)} of {self._found} images cannot be read, more than "
                f"max_bad_share={self._max_bad_share:g} allows: {shown}{', …' if len(self.bad) > 3 else ''}"
            )

    def fingerprint(self) -> str:
        """Covers names, labels, captions, channels and each file's length with its first and last 32 KiB.

        Up to 64 KiB a file that is the whole content; beyond it an edit that leaves the length and both ends alone goes
        unseen, the price of not reading terabytes at every start. Times of modification are left out: a copy is the
        same data.
        """
        with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
            ends = list(pool.map(lambda file: hash_ends(self.root / file), self.files))
        labels = None if self.labels is None else self.labels.tolist()
        facts = [self.channels, self.class_names, self.files, labels, self.captions, ends]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def open_source(data: str, split: str = "train", channels: int | None = None, max_bad_share: float = 0.01) -> ImageSource:
    """Opens the data set that one string names.

    data: "fashion-mnist", or a folder. A folder's classes are its sub-folders; or it has metadata.jsonl/.csv with the
    columns file_name and label or text (or both; in .jsonl text may be a list of captions of one image); or it holds
    images only, which are then unlabelled. With train/ and test/
    inside it has two splits, each in one of these forms, and the classes are those of train/.
    channels: 1, 3 or None (1 when every image is grey, else 3). Transparency is laid on white; EXIF rotation is
    applied.
    max_bad_share: the share of images that may be unreadable; they are named in `.bad` and skipped.
    """
    if channels not in (None, 1, 3):
        raise UserError(f"channels={channels}: valid are 1, 3 or none (taken from the data)")
    if split not in ("train", "test"):
        raise UserError(f"split '{split}': valid are train and test")
    if data == "fashion-mnist":
        return _fashion_mnist(split, channels or 1)
    folder = Path(data).expanduser()
    if not folder.is_dir():
        raise UserError(f"data '{data}': no such folder, and not a data set known by name (fashion-mnist)")
    if split not in splits(data):
        raise UserError(f"data '{data}' has no test/ folder: add one, or hold a share of its images out")
    root = _split_root(folder, split)
    files, label_names, captions = _listing(root)
    class_names = _class_names(_listing(_split_root(folder, "train"))[1] if split == "test" else label_names)
    labels = None
    if label_names is not None:
        index = {class_name: k for k, class_name in enumerate(class_names)}
        unknown = sorted(set(label_names) - set(index))
        if unknown:
            raise UserError(f"{root}: class '{unknown[0]}' is not a class of train/; valid are {', '.join(class_names)}")
        labels = [index[class_name] for class_name in label_names]
    return FolderSource(data, root, files, labels, class_names, captions, channels, max_bad_share)


def splits(data: str) -> tuple[str, ...]:
    """("train", "test") where the data set comes with a test split of its own, else ("train",)."""
    folder = Path(data).expanduser()
    two = data == "fashion-mnist" or ((folder / "train").is_dir() and (folder / "test").is_dir())
    return ("train", "test") if two else ("train",)


def held_out(source: ImageSource, share: float, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(train_indices, held_out_indices), int64 and ascending: a fixed function of the number of images, share and seed.

    At least one image is held out and at least one kept; share is in (0, 1).
    """
    n = len(source)
    if not 0 < share < 1 or n < 2:
        raise UserError(f"held-out share {share:g} of {n} images: needs a share between 0 and 1 and at least 2 images")
    count = min(n - 1, max(1, round(share * n)))
    order = permutation(n, seed, "held-out")
    return order[count:].sort().values, order[:count].sort().values


def _split_root(folder: Path, split: str) -> Path:
    return folder / split if len(splits(str(folder))) == 2 else folder


def _listing(root: Path) -> tuple[list[str], list[str] | None, list[tuple[str, ...]] | None]:
    """(files relative to root, class name of each | None, captions of each | None), sorted by file name."""
    for name in ("metadata.jsonl", "metadata.csv"):
        if (root / name).is_file():
            return _read_metadata(root / name)
    flat = [p.name for p in root.iterdir() if _is_image(p)]
    nested = {p.name: _images_below(p) for p in root.iterdir() if p.is_dir() and not p.name.startswith((".", "__"))}
    nested = {name: files for name, files in nested.items() if files}
    if flat and nested:
        raise UserError(
            f"{root} has images both beside and inside its sub-folders ({sorted(flat)[0]}, {sorted(nested)[0]}/): "
            "move every image into a class folder, or all into one"
        )
    if not flat and not nested:
        raise UserError(f"{root} has no images ({' '.join(sorted(IMAGE_SUFFIXES))}), in it or in class sub-folders")
    if flat:
        return sorted(flat), None, None
    pairs = sorted((f"{name}/{file}", name) for name, files in nested.items() for file in files)
    return [file for file, _ in pairs], [name for _, name in pairs], None


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith(".") and path.is_file()


def _images_below(folder: Path) -> list[str]:
    return [p.relative_to(folder).as_posix() for p in folder.rglob("*") if _is_image(p)]


def _read_metadata(path: Path) -> tuple[list[str], list[str] | None, list[tuple[str, ...]] | None]:
    rows: list[tuple[str, str | None, tuple[str, ...] | None, int]] = []
    for number, row in _metadata_rows(path):
        if not isinstance(row, dict) or not row.get("file_name"):
            raise UserError(f"{path} line {number}: needs file_name, and label or text")
        label = None if row.get("label") in (None, "") else str(row["label"])
        rows.append((str(row["file_name"]), label, _captions(row.get("text"), path, number), number))
    if not rows:
        raise UserError(f"{path} has no rows: each needs file_name, and label or text")
    rows.sort(key=lambda row: row[0])
    for place, column in ((1, "label"), (2, "text")):
        missing = [row[3] for row in rows if row[place] is None]
        if missing and len(missing) < len(rows):
            raise UserError(f"{path} line {min(missing)}: has no {column} although other lines do")
    labels = [row[1] for row in rows if row[1] is not None]
    captions = [row[2] for row in rows if row[2] is not None]
    return [row[0] for row in rows], labels or None, captions or None


def _captions(text: object, path: Path, number: int) -> tuple[str, ...] | None:
    """The captions of one row: a string, or a list of them."""
    if text is None or text == "" or text == []:
        return None
    captions = tuple(text) if isinstance(text, list) else (str(text),)
    if isinstance(text, dict) or not all(isinstance(c, str) and c.strip() and not SURROGATES.search(c) for c in captions):
        raise UserError(f"{path} line {number}: text must be a caption, or a list of captions that are not empty")
    return captions


def _metadata_rows(path: Path) -> Iterable[tuple[int, object]]:
    try:
        with open(path, encoding="utf-8-sig", newline="") as stream:
            if path.suffix == ".csv":
                yield from enumerate(csv.DictReader(stream), start=2)
                return
            for number, line in enumerate(stream, start=1):
                if line.strip():
                    yield number, json.loads(line)
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path}: not UTF-8 text, or not a table ({one_line(error)})") from error
    except ValueError as error:
        raise UserError(f"{path} line {number}: not JSON ({error})") from error


def _class_names(label_names: list[str] | None) -> list[str]:
    """Sorted; as numbers when all are numbers, so that class 10 comes after class 9."""
    names = set(label_names or ())
    return sorted(names, key=int) if all(name.isdecimal() for name in names) else sorted(names)


def _fashion_mnist(split: str, channels: int) -> ArraySource:
    """Fashion-MNIST (1708.07747): 60,000 + 10,000 grey images of 28 x 28 in ten classes, from idx(.gz) files."""
    prefix = "train" if split == "train" else "t10k"
    images = read_idx(_find_idx(f"{prefix}-images-idx3-ubyte"), dims=3)
    labels = read_idx(_find_idx(f"{prefix}-labels-idx1-ubyte"), dims=1)
    if len(images) != len(labels):
        raise UserError(f"fashion-mnist: {len(images)} images but {len(labels)} labels in the {prefix} files")
    pixels = np.repeat(images[..., None], channels, axis=-1)  # [N, 28, 28, C]
    return ArraySource("fashion-mnist", pixels, torch.from_numpy(labels.astype(np.int64)), FASHION_MNIST_CLASSES)


def _find_idx(name: str) -> Path:
    folder = Path(os.environ.get("FASHION_MNIST_DIR") or FASHION_MNIST_FOLDER)
    for candidate in (folder / name, folder / f"{name}.gz"):
        if candidate.is_file():
            return candidate
    raise UserError(
        f"fashion-mnist: no {name}(.gz) in {folder}; install the Debian package dataset-fashion-mnist, "
        "or set FASHION_MNIST_DIR to the folder that has the idx files"
    )
