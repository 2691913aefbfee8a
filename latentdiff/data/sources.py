"""Image sources: one string names a data set, and every kind answers the same few questions.

A source is read-only and knows nothing of sizes wanted, batches or epochs. Image i is the same on every machine:
files are sorted by name, never listed in the order of the file system.
"""

import csv
import json
import os
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch

from latentdiff.data import rowgroups, tables, webshards
from latentdiff.data.files import inspect, leaves, one_line, read_idx
from latentdiff.data.images import (
    IMAGE_SUFFIXES,
    ArraySource,
    Columns,
    EncodedImages,
    ImageSource,
    captions_of,
    class_names_of,
    in_threads,
    numbered,
)
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
USUAL_COLUMNS = Columns()


class FolderSource(EncodedImages):
    """Image files below one folder."""

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
        headers = in_threads(lambda file: inspect(root / file), files)
        super().__init__(name, f"{root}/", files, headers, labels, class_names, captions, channels, max_bad_share)
        self.root = root

    def open(self, i: int) -> Path:
        return self.root / self.files[i]


def open_source(
    data: str,
    split: str = "train",
    channels: int | None = None,
    max_bad_share: float = 0.01,
    columns: Columns = USUAL_COLUMNS,
    streaming: bool = False,
) -> ImageSource:
    """Opens the data set that one string names.

    data: "fashion-mnist"; or a folder of image files; or a table: parquet files ("data/*.parquet"), a folder of them or
    one that `datasets` saved, a Hub name ("owner/name" or "owner/name:config"); or WebDataset shards
    ("shards-{000..099}.tar", here or at http(s)://, s3://, gs://, hf://).
    A folder's classes are its sub-folders; or it has metadata.jsonl/.csv with the
    columns file_name and label or text (or both; in .jsonl text may be a list of captions of one image); or it holds
    images only, which are then unlabelled. With train/ and test/
    inside it has two splits, each in one of these forms, and the classes are those of train/.
    channels: 1, 3 or None (1 when every image is grey, else 3). Transparency is laid on white; EXIF rotation is
    applied.
    max_bad_share: the share of images that may be unreadable; they are named in `.bad` and skipped.
    columns: of tables and shards; see latentdiff.data.tables and latentdiff.data.webshards for the usual ones.
    streaming: parquet is read where it lies and never stored; see latentdiff.data.rowgroups.
    """
    if channels not in (None, 1, 3):
        raise UserError(f"channels={channels}: valid are 1, 3 or none (taken from the data)")
    if split not in ("train", "test"):
        raise UserError(f"split '{split}': valid are train and test")
    kind = kind_of(data)
    if kind not in ("table", "shards") and columns != USUAL_COLUMNS:
        raise UserError(f"data '{data}': image_column, label_column and text_column are for tables and shards alone")
    if streaming:
        return rowgroups.open_streamed(data, split, channels, max_bad_share, columns)
    if kind == "fashion-mnist":
        return _fashion_mnist(split, channels or 1)
    if kind == "table":
        return tables.open_table(data, split, channels, max_bad_share, columns)
    if kind == "shards":
        if split == "test":
            raise UserError(f"data '{data}': shards have no test split; hold a share of their images out")
        return webshards.open_shards(data, channels, max_bad_share, columns)
    return _open_folder(data, split, channels, max_bad_share)


def kind_of(data: str) -> str:
    """What the string names: "fashion-mnist", "table", "shards" or "folder" (also where nothing is there)."""
    if data == "fashion-mnist":
        return data
    folder = Path(data).expanduser()
    if folder.is_dir():
        return "table" if tables.is_table_folder(folder) else "folder"
    if webshards.is_shards(data):
        return "shards"
    return "table" if tables.is_table_name(data) else "folder"


def is_data_name(data: str) -> bool:
    """Whether a string that names no folder can be nothing but a data set: fashion-mnist, parquet files or shards."""
    return data == "fashion-mnist" or ".parquet" in data or webshards.is_shards(data)


def _open_folder(data: str, split: str, channels: int | None, max_bad_share: float) -> FolderSource:
    folder = Path(data).expanduser()
    if not folder.is_dir():
        others = "fashion-mnist, .parquet files, a Hub name owner/name, or .tar shards"
        raise UserError(f"data '{data}': no such folder, and none of {others}")
    if split not in splits(data):
        raise UserError(f"data '{data}' has no test/ folder: add one, or hold a share of its images out")
    root = _split_root(folder, split)
    files, label_names, captions = _listing(root)
    class_names = class_names_of(_listing(_split_root(folder, "train"))[1] if split == "test" else label_names)
    labels = numbered(label_names, class_names, str(root))
    return FolderSource(data, root, files, labels, class_names, captions, channels, max_bad_share)


def splits(data: str, streaming: bool = False) -> tuple[str, ...]:
    """("train", "test") where the data set comes with a test split of its own, else ("train",)."""
    if streaming:
        return rowgroups.streamed_splits(data)
    kind, folder = kind_of(data), Path(data).expanduser()
    if kind == "table":
        return tables.table_splits(data)
    two = kind == "fashion-mnist" or ((folder / "train").is_dir() and (folder / "test").is_dir())
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
        if not isinstance(row, dict) or not isinstance(row.get("file_name"), str) or not row["file_name"]:
            raise UserError(f"{path} line {number}: needs file_name, and label or text")
        if leaves(path.parent, row["file_name"]):
            shown = repr(row["file_name"][:200])
            raise UserError(f"{path} line {number}: file_name {shown} is not inside {path.parent}; copy it there")
        label = None if row.get("label") in (None, "") else str(row["label"])
        rows.append((row["file_name"], label, captions_of(row.get("text"), f"{path} line {number}"), number))
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
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} line {number}: not JSON ({error})") from error


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
