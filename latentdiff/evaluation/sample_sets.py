"""Images that are compared: samples as a data set, real images without padding, and some drawn with the samples' classes."""

import hashlib
import json
import struct
import sys
import zlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple
from zipfile import BadZipFile

import numpy as np
import torch
from torch import Tensor

from latentdiff.data.datasets import ImageDataset
from latentdiff.data.shuffling import permutation
from latentdiff.data.sources import ArraySource, open_source
from latentdiff.data.transforms import Preprocess
from latentdiff.errors import UserError
from latentdiff.utils.random import derive_seed

# What numpy and zipfile raise on damaged archives; RuntimeError stands for encrypted ones and unknown methods
UNPACKING_ERRORS = (
    OSError,
    ValueError,
    KeyError,
    EOFError,
    BadZipFile,
    RuntimeError,
    SyntaxError,
    TypeError,
    OverflowError,
    MemoryError,
    struct.error,
    zlib.error,
)


def sample_set(samples: np.ndarray, labels: np.ndarray | None, train: ImageDataset) -> ImageDataset:
    """The samples as a data set of train's size, channels and classes, after checking that they go with it."""
    if samples.dtype != np.uint8 or samples.ndim != 4 or samples.shape[3] not in (1, 3) or len(samples) < 2:
        raise UserError(f"samples are {samples.dtype} {list(samples.shape)}: needs uint8 [N, H, W, 1 or 3] with N >= 2")
    rule = train.preprocess
    if tuple(samples.shape[1:3]) != rule.size:
        raise UserError(
            f"samples are {samples.shape[1]}x{samples.shape[2]}, the images of data '{train.source.name}' "
            f"{rule.content[2]}x{rule.content[3]}: evaluate at the size the samples were made for"
        )
    wanted = None
    if labels is not None:
        wanted = torch.as_tensor(np.asarray(labels), dtype=torch.int64)
        classes = len(train.class_names)
        if train.labels is None:
            raise UserError(f"samples have labels, data '{train.source.name}' has none: give a data set with classes")
        if wanted.shape != (len(samples),) or wanted.min() < 0 or wanted.max() >= classes:
            raise UserError(
                f"labels of the samples are {list(wanted.shape)} from {wanted.min()} to {wanted.max()}: "
                f"needs {len(samples)} of them, each 0 to {classes - 1}, the classes of data '{train.source.name}'"
            )
    source = ArraySource("samples", samples, wanted, train.class_names)
    return ImageDataset(source, Preprocess(size=rule.size, channels=rule.channels))


def read_folder(folder: str | Path, class_names: Sequence[str]) -> tuple[np.ndarray, np.ndarray | None]:
    """(uint8 [N, H, W, C], labels int64 [N] or None) of a folder of image files, in the order of their names.

    Labels are the sub-folders' names, which must be among class_names; without sub-folders there are none. UserError for
    a file that cannot be read, images of several sizes, or a class that is none.
    """
    try:
        source = open_source(str(folder), max_bad_share=0.0)
        for line in source.report.lines():
            print(f"--samples {folder}: {line}", file=sys.stderr)
        sizes = np.unique(source.sizes, axis=0)
        if len(sizes) > 1:
            raise UserError(f"images of {len(sizes)} sizes, {sizes[0].tolist()} and others; samples are of one size")
        images = np.stack([source.read(i) for i in range(len(source))])
    except UserError as error:
        raise UserError(f"--samples {folder}: {error}") from None
    if source.labels is None:
        return images, None
    unknown = [name for name in source.class_names if name not in class_names]
    if unknown:
        valid = ", ".join(class_names) or "none, so put the images into one folder"
        raise UserError(f"--samples {folder}: sub-folder {unknown[0]!r} is no class of the data; valid are {valid}")
    rows = np.array([list(class_names).index(name) for name in source.class_names])
    return images, rows[source.labels.numpy()]


def without_padding(dataset: ImageDataset) -> ImageDataset:
    """The same images without the border that a multiple_of asks for."""
    rule = replace(dataset.preprocess, size=dataset.preprocess.content[2:], multiple_of=1)
    return ImageDataset(dataset.source, rule, dataset.indices)


def subset(dataset: ImageDataset, rows: Tensor) -> ImageDataset:
    return ImageDataset(dataset.source, dataset.preprocess, dataset.indices[rows])


def matching_rows(dataset: ImageDataset, labels: Tensor | None, count: int, seed: int) -> Tensor:
    """Rows of dataset, ascending, drawn with the class counts of labels (None: any count rows), each at most once.

    Where some class has too few images, all counts shrink by the same factor, so that the mix of classes stays.
    """
    order = permutation(len(dataset), seed, "evaluation")
    if labels is None or dataset.labels is None:
        return order[:count].sort().values
    classes = len(dataset.class_names)
    wanted = torch.bincount(labels, minlength=classes)
    present = torch.bincount(dataset.labels, minlength=classes)
    used = wanted > 0
    share = min(1.0, (present[used] / wanted[used]).min().item())
    shuffled = dataset.labels[order]
    rows = [order[shuffled == c][: int(share * wanted[c] + 1e-9)] for c in range(classes)]
    chosen = torch.cat(rows).sort().values
    if len(chosen) < 2:
        names = dataset.class_names
        rare = used & (present <= share * wanted + 1e-9)  # those that all counts shrink for
        scarce = [f"{names[c]} ({int(present[c])})" for c in rare.nonzero().flatten().tolist()]
        few = f"{', '.join(scarce[:5])}{' …' if len(scarce) > 5 else ''}"
        raise UserError(
            f"data '{dataset.source.name}': {int(present.sum())} held-out images cannot be matched to the classes of "
            f"{int(wanted.sum())} samples: too few of {few}; hold out more (a test/ folder beside train/, at least "
            "two images of each class), or leave the scarce classes out of --data"
        )
    return chosen


def read_npz(path: str | Path | None) -> tuple[np.ndarray, np.ndarray | None]:
    """(arr_0 uint8 [N, H, W, C], arr_1 int64 [N] or None) of an npz file; UserError naming what is wrong with it."""
    try:
        with np.load(str(path), allow_pickle=False) as file:
            images, labels = file["arr_0"], file["arr_1"] if "arr_1" in file else None
    except FileNotFoundError:
        raise UserError(f"--samples {path}: no such file") from None
    except UNPACKING_ERRORS as error:
        raise UserError(f"--samples {path}: not an npz with arr_0 ({' '.join(str(error).split())})") from None
    if images.dtype != np.uint8 or images.ndim != 4:
        raise UserError(f"--samples {path}: arr_0 must be uint8 [N, H, W, C], it is {images.dtype} {list(images.shape)}")
    return images, None if labels is None or (labels < 0).all() else labels


PARTS = {"test": "held-out", "train": "training"}


class Prompts(NamedTuple):
    """Prompts [N], the class of each one's image, int64 [N], where images have such, and what a protocol says of them."""

    texts: list[str]
    labels: Tensor | None
    facts: dict[str, Any]


def draw_prompts(images: ImageDataset, count: int, part: str, data: str, seed: int = 0) -> Prompts:
    """`count` captions of a data set's images, of each image one of its captions, drawn as training draws them.

    Above the number of images, each comes as often as any other, or once more, its caption drawn anew.
    part: which images these are, a key of PARTS.  UserError where they have no captions; data: what the user called them.
    """
    captions = images.captions()
    if captions is None or not any(any(texts) for texts in captions):
        has = f"its {PARTS[part]} images have no captions, and this model is told by text what to draw"
        raise UserError(f"--data {data}: {has}; add a metadata.jsonl with file_name and text, or name the text column")
    captioned = [i for i, texts in enumerate(captions) if any(texts)]  # where some have none, theirs is the empty prompt
    order = permutation(len(captioned), seed, "prompts")
    rounds, rest = divmod(count, len(captioned))
    places = [(i, n) for n in range(rounds) for i in captioned]
    places += [(captioned[i], rounds) for i in order[:rest].sort().values.tolist()]
    texts = [captions[i][derive_seed(seed, "prompts", i, n) % len(captions[i])] for i, n in places]
    facts = {
        "captions_of": f"{PARTS[part]} images",
        "captioned_images": min(count, len(captioned)),
        "different": len(set(texts)),
        "sha256": hashlib.sha256(json.dumps(texts).encode()).hexdigest(),
    }
    return Prompts(texts, None if images.labels is None else images.labels[[i for i, _ in places]], facts)
