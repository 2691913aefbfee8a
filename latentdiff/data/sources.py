"""Opening a data set: one string names it, and every kind of storage gives an `ImageSource`.

Image i is the same on every machine: files are sorted by name, and never used in the order of the file system.
"""

import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from latentdiff.data import parquet_stream, tables, webdataset
from latentdiff.data.folders import folder_splits, open_folder
from latentdiff.data.image_files import WHITE, Color, read_idx
from latentdiff.data.image_source import ArraySource, Columns, ImageSource, Reading
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

    data: one of
        "fashion-mnist";
        a folder of image files;
        a table: parquet files ("data/*.parquet"), a folder of them or one that `datasets` saved, or a Hub name
        ("owner/name" or "owner/name:config");
        WebDataset shards ("shards-{000..099}.tar", on this machine or at http(s)://, s3://, gs://, hf://).
    split: "train" or "test". A folder with train/ and test/ inside it has both, each in one of the forms below; the classes
        are those of train/.
    channels: 1, 3, or None for 1 where every image is grey, else 3.
    max_bad_share: the share of images that may be unreadable. One may, unless it is 0. They are skipped, and named in `.bad`.
    columns: where a table, shards or metadata have images, labels and captions. Without it: the usual names, which
        `latentdiff.data.tables`, `webdataset` and `metadata` state.
    streaming: parquet files are read where they lie and never stored; see `latentdiff.data.parquet_stream`.
    background: the colour that transparency is laid on: red, green and blue, 0 to 255.

    A folder's classes are its sub-folders. Or it has metadata.jsonl or metadata.csv, with the columns file_name and label or
    text, or both; in .jsonl, text may be a list of captions of one image. Or it holds images alone, which then have no
    classes. Without metadata an image's caption may lie beside it (a.png and a.txt). If images lie both beside and inside
    sub-folders, there are no classes, and `.unlabelled` says why. Files that are not used are in `.report`.

    UserError: there is no such data set or split, or it cannot be read; the message names the file, the field or the row.
    """
    if channels not in (None, 1, 3):
        raise UserError(f"channels={channels}: valid are 1, 3 or none (taken from the data)")
    if split not in ("train", "test"):
        raise UserError(f"split '{split}': valid are train and test")
    if columns.caption is not None:
        named = replace(columns, caption=None)
        source = open_source(data, split, channels, max_bad_share, named, streaming, background)
        return _with_captions(source, columns.caption)
    kind, reading = kind_of(data), Reading(channels, max_bad_share, background)
    if columns.pair is not None and kind != "folder":
        raise UserError(
            f"data '{data}': pair_column {columns.pair} is of a folder with metadata.jsonl or metadata.csv, whose column names "
            "the paired pictures; leave it out"
        )
    if kind == "fashion-mnist" and columns != USUAL_COLUMNS:
        raise UserError(f"data '{data}': has no columns; leave image_column, label_column and text_column out")
    if streaming:
        return parquet_stream.open_streamed(data, split, columns, reading)
    if kind == "fashion-mnist":
        return _fashion_mnist(split, channels or 1)
    if kind == "table":
        return tables.open_table(data, split, columns, reading)
    if kind == "shards":
        if split == "test":
            raise UserError(f"data '{data}': shards have no test split; hold a share of their images out")
        return webdataset.open_shards(data, columns, reading)
    return open_folder(data, split, columns, reading)


def _with_captions(source: ImageSource, caption: str) -> ImageSource:
    """The source, in which every image without a caption has this one. UserError for {class} where there are no classes."""
    texts = [caption] * len(source)
    if "{class}" in caption:
        if source.labels is None:
            raise UserError(f"data.caption: {caption!r} names the class, and data '{source.name}' has no classes")
        texts = [caption.replace("{class}", source.class_names[label]) for label in source.labels.tolist()]
    before = source.captions or [()] * len(source)
    source.captions = [own if any(own) else (text,) for own, text in zip(before, texts, strict=True)]
    return source


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


def splits(data: str, streaming: bool = False) -> tuple[str, ...]:
    """("train", "test") where the data set comes with a test split of its own, else ("train",)."""
    if streaming:
        return parquet_stream.streamed_splits(data)
    kind = kind_of(data)
    if kind == "table":
        return tables.table_splits(data)
    return ("train", "test") if kind == "fashion-mnist" else folder_splits(Path(data).expanduser())


def _fashion_mnist(split: str, channels: int) -> ArraySource:
    """Fashion-MNIST (arXiv 1708.07747): 60,000 + 10,000 grey images of 28 x 28 in ten classes, from idx(.gz) files."""
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
