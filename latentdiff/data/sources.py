"""Image sources: one string names a data set, and every kind answers the same few questions.

A source is read-only and knows nothing of sizes wanted, batches or epochs. Image i is the same on every machine:
files are sorted by name, never listed in the order of the file system.
"""

import os
from pathlib import Path

import numpy as np
import torch

from latentdiff.data import parquet_stream, tables, webdataset
from latentdiff.data.folders import Listing, list_folder, report_beside
from latentdiff.data.image_files import WHITE, Color, examine, read_idx
from latentdiff.data.image_source import ArraySource, Columns, EncodedImages, ImageSource, class_names_of, in_threads, numbered
from latentdiff.data.metadata import METADATA
from latentdiff.data.splits import HELD_OUT_RULES, held_out  # noqa: F401  # version 0.1 had them here
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
USUAL_COLUMNS = Columns()


class FolderSource(EncodedImages):
    """Image files below one folder. labels: of each file of the listing, indices into class_names, or None."""

    def __init__(
        self,
        name: str,
        root: Path,
        listing: Listing,
        labels: list[int] | None,
        class_names: list[str],
        channels: int | None,
        max_bad_share: float,
        background: Color = WHITE,
    ):
        found = in_threads(lambda file: examine(root / file), listing.files)
        headers = [header for header, _ in found]
        super().__init__(
            name, f"{root}/", listing.files, headers, labels, class_names, listing.captions, channels, max_bad_share, background
        )
        self._captions_ignored_before = listing.captions_ignored_before
        self.root, self.report, self.unlabelled = root, listing.report, listing.unlabelled
        for file, (_, several) in zip(listing.files, found, strict=True):
            if several:
                self.report.remark("has several frames or pages, of which the first is used", file)

    def open(self, i: int) -> Path:
        return self.root / self.files[i]

    def latents_fingerprint(self) -> str:
        """Without captions of a kind that earlier versions did not read: their caches of the same images stay valid."""
        return self._digest(None if self._captions_ignored_before else self.captions)


def open_source(
    data: str,
    split: str = "train",
    channels: int | None = None,
    max_bad_share: float = 0.01,
    columns: Columns = USUAL_COLUMNS,
    streaming: bool = False,
    background: Color = WHITE,
) -> ImageSource:
    """Opens the data set that one string names.

    data: "fashion-mnist"; or a folder of image files; or a table: parquet files ("data/*.parquet"), a folder of them or
    one that `datasets` saved, a Hub name ("owner/name" or "owner/name:config"); or WebDataset shards
    ("shards-{000..099}.tar", here or at http(s)://, s3://, gs://, hf://).
    A folder's classes are its sub-folders; or it has metadata.jsonl/.csv with the
    columns file_name and label or text (or both; in .jsonl text may be a list of captions of one image); or it holds
    images only, which are then unlabelled. Without metadata an image's caption may lie beside it (a.png and a.txt).
    With train/ and test/ inside it has two splits, each in one of these forms, and the classes are those of train/.
    Images both beside and inside sub-folders have no classes; `unlabelled` says why.
    channels: 1, 3 or None (1 when every image is grey, else 3). EXIF rotation is applied.
    max_bad_share: the share of images that may be unreadable (one at least, unless it is 0); they are named in `.bad` and
    skipped. What else is not used is in `.report`.
    columns: of tables, shards and metadata; see latentdiff.data.tables, webshards and metadata for the usual ones.
    streaming: parquet is read where it lies and never stored; see latentdiff.data.parquet_stream.
    background: the colour that transparency is laid on, red, green and blue.
    """
    if channels not in (None, 1, 3):
        raise UserError(f"channels={channels}: valid are 1, 3 or none (taken from the data)")
    if split not in ("train", "test"):
        raise UserError(f"split '{split}': valid are train and test")
    kind = kind_of(data)
    if kind == "fashion-mnist" and columns != USUAL_COLUMNS:
        raise UserError(f"data '{data}': has no columns; leave image_column, label_column and text_column out")
    if streaming:
        return parquet_stream.open_streamed(data, split, channels, max_bad_share, columns, background)
    if kind == "fashion-mnist":
        return _fashion_mnist(split, channels or 1)
    if kind == "table":
        return tables.open_table(data, split, channels, max_bad_share, columns, background)
    if kind == "shards":
        if split == "test":
            raise UserError(f"data '{data}': shards have no test split; hold a share of their images out")
        return webdataset.open_shards(data, channels, max_bad_share, columns, background)
    return _open_folder(data, split, channels, max_bad_share, columns, background)


def kind_of(data: str) -> str:
    """What the string names: "fashion-mnist", "table", "shards" or "folder" (also where nothing is there)."""
    if data == "fashion-mnist":
        return data
    folder = Path(data).expanduser()
    if folder.is_dir():
        return "table" if tables.is_table_folder(folder) else "folder"
    if webdataset.is_shards(data):
        return "shards"
    return "table" if tables.is_table_name(data) else "folder"


def is_data_name(data: str) -> bool:
    """Whether a string that names no folder can be nothing but a data set: fashion-mnist, parquet files or shards."""
    return data == "fashion-mnist" or ".parquet" in data or webdataset.is_shards(data)


def takes_columns(data: str) -> bool:
    """Whether a data set has columns that can be named: a table, shards, or a folder with metadata."""
    kind, folder = kind_of(data), Path(data).expanduser()
    return kind in ("table", "shards") or any((folder / part / name).is_file() for part in ("", "train") for name in METADATA)


def _open_folder(
    data: str, split: str, channels: int | None, max_bad_share: float, columns: Columns, background: Color
) -> FolderSource:
    folder = Path(data).expanduser()
    if not folder.is_dir():
        others = "fashion-mnist, .parquet files, a Hub name owner/name, or .tar shards"
        raise UserError(f"data '{data}': no such folder, and none of {others}")
    parts = splits(data)
    if split not in parts:
        raise UserError(f"data '{data}' has no test/ folder: add one, or hold a share of its images out")
    root = _split_root(folder, split)
    listing = list_folder(root, columns)
    if len(parts) == 2 and split == "train":
        for reason, names in report_beside(folder, parts).left_out.items():
            listing.report.left_out.setdefault(reason, names)
    labels_of_train = listing.labels
    if split == "test":
        labels_of_train = list_folder(_split_root(folder, "train"), columns, with_captions=False).labels
    class_names = class_names_of(labels_of_train)
    labels = numbered(listing.labels, class_names, str(root))
    return FolderSource(data, root, listing, labels, class_names, channels, max_bad_share, background)


def splits(data: str, streaming: bool = False) -> tuple[str, ...]:
    """("train", "test") where the data set comes with a test split of its own, else ("train",)."""
    if streaming:
        return parquet_stream.streamed_splits(data)
    kind, folder = kind_of(data), Path(data).expanduser()
    if kind == "table":
        return tables.table_splits(data)
    two = kind == "fashion-mnist" or ((folder / "train").is_dir() and (folder / "test").is_dir())
    return ("train", "test") if two else ("train",)


def _split_root(folder: Path, split: str) -> Path:
    return folder / split if len(splits(str(folder))) == 2 else folder


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
