"""Sets of images to measure: samples read from files, data sets without padding, and real images with the samples' classes."""

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

from latentdiff.data.condition_images import ConditionImages
from latentdiff.data.datasets import ImageDataset
from latentdiff.data.shuffling import permutation
from latentdiff.data.sources import ArraySource, open_source
from latentdiff.data.transforms import Preprocess
from latentdiff.errors import UserError
from latentdiff.models.image_condition import ImageCondition
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
PARTS = {"test": "held-out", "train": "training"}


def sample_set(samples: np.ndarray, labels: np.ndarray | None, train: ImageDataset) -> ImageDataset:
    """Samples as a data set with train's size, channels and classes.

    Args:
        samples: uint8 [N, H, W, 1 or 3], N >= 2.
        labels: indices into train.class_names, [N], or None.
        train: the data set that they will be compared with.

    Raises:
        UserError: the samples or their labels do not fit to train.
    """
    if samples.dtype != np.uint8 or samples.ndim != 4 or samples.shape[3] not in (1, 3) or len(samples) < 2:
        raise UserError(f"samples are {samples.dtype} {list(samples.shape)}: needs uint8 [N, H, W, 1 or 3] with N >= 2")
    rule = train.preprocess
    if tuple(samples.shape[1:3]) != rule.size:
        raise UserError(
            f"samples are {samples.shape[1]}x{samples.shape[2]}, the images of data '{train.source.name}' "
            f"{rule.content[2]}x{rule.content[3]}: evaluate at the size the samples were made for"
        )
    classes = None
    if labels is not None:
        classes = torch.as_tensor(np.asarray(labels), dtype=torch.int64)
        count = len(train.class_names)
        if train.labels is None:
            raise UserError(f"samples have labels, data '{train.source.name}' has none: give a data set with classes")
        if classes.shape != (len(samples),) or classes.min() < 0 or classes.max() >= count:
            raise UserError(
                f"labels of the samples are {list(classes.shape)} from {classes.min()} to {classes.max()}: "
                f"needs {len(samples)} of them, each 0 to {count - 1}, the classes of data '{train.source.name}'"
            )
    source = ArraySource("samples", samples, classes, train.class_names)
    return ImageDataset(source, Preprocess(size=rule.size, channels=rule.channels))


def read_folder(folder: str | Path, class_names: Sequence[str]) -> tuple[np.ndarray, np.ndarray | None]:
    """Read samples from a folder of image files, in the order of their names.

    Args:
        folder: images of one size. Names of sub-folders are their classes; without sub-folders they have none.
        class_names: the names that sub-folders may have.

    Returns:
        Images uint8 [N, H, W, C], and labels int64 [N], indices into class_names, or None.

    Raises:
        UserError: a file cannot be read, images have several sizes, or a sub-folder is no class.
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


def read_npz(path: str | Path | None) -> tuple[np.ndarray, np.ndarray | None]:
    """Read samples from an npz file: arr_0, uint8 [N, H, W, C], and arr_1, int64 [N], or None.

    Labels that are all below 0 stand for samples without a class. UserError naming what is wrong with the file.
    """
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


def without_padding(dataset: ImageDataset) -> ImageDataset:
    """The same images without the border that `multiple_of` adds."""
    rule = replace(dataset.preprocess, size=dataset.preprocess.content[2:], multiple_of=1)
    return ImageDataset(dataset.source, rule, dataset.indices)


def subset(dataset: ImageDataset, rows: Tensor) -> ImageDataset:
    """The images of these rows, int64 [n]."""
    return ImageDataset(dataset.source, dataset.preprocess, dataset.indices[rows])


def matching_rows(dataset: ImageDataset, labels: Tensor | None, count: int, seed: int) -> Tensor:
    """Draw rows of a data set that have the class counts of samples, each row at most once.

    Where a class has too few images, all counts shrink by the same factor, so that the mix of classes stays.

    Args:
        dataset: where to draw from.
        labels: the samples' classes, int64 [N]; None draws any `count` rows.
        count: the number of rows where there are no classes.
        seed: of the draw.

    Returns:
        Rows in ascending order, int64 [n].

    Raises:
        UserError: fewer than two rows can be drawn.
    """
    order = permutation(len(dataset), seed, "evaluation")
    if labels is None or dataset.labels is None:
        return order[:count].sort().values
    classes = len(dataset.class_names)
    needed = torch.bincount(labels, minlength=classes)
    present = torch.bincount(dataset.labels, minlength=classes)
    used = needed > 0
    share = min(1.0, (present[used] / needed[used]).min().item())
    shuffled = dataset.labels[order]
    rows = [order[shuffled == c][: int(share * needed[c] + 1e-9)] for c in range(classes)]
    chosen = torch.cat(rows).sort().values
    if len(chosen) < 2:
        names = dataset.class_names
        rare = used & (present <= share * needed + 1e-9)  # the classes for which all counts shrink
        scarce = [f"{names[c]} ({int(present[c])})" for c in rare.nonzero().flatten().tolist()]
        few = f"{', '.join(scarce[:5])}{' …' if len(scarce) > 5 else ''}"
        raise UserError(
            f"data '{dataset.source.name}': {int(present.sum())} held-out images cannot be matched to the classes of "
            f"{int(needed.sum())} samples: too few of {few}; hold out more (a test/ folder beside train/, at least "
            "two images of each class), or leave the scarce classes out of --data"
        )
    return chosen


class CaptionPrompts(NamedTuple):
    """Prompts drawn from the captions of images.

    Attributes:
        texts: N prompts.
        labels: the class of each prompt's image, int64 [N], or None.
        facts: how they were drawn, for the protocol: captions_of, captioned_images, different, sha256.
    """

    texts: list[str]
    labels: Tensor | None
    facts: dict[str, Any]


def draw_prompts(images: ImageDataset, count: int, part: str, data: str, seed: int = 0) -> CaptionPrompts:
    """Draw `count` prompts from the captions of a data set: one caption of each image, drawn as training draws it.

    Where count is larger than the number of images, each image comes equally often or once more, with another draw of its
    caption.

    Args:
        images: the data set.
        count: how many prompts.
        part: which part of the data the images are, a key of PARTS.
        data: the data set as the user named it, for errors.
        seed: of the draw.

    Raises:
        UserError: no image has a caption.
    """
    captions = images.captions()
    if captions is None or not any(any(texts) for texts in captions):
        raise UserError(
            f"--data {data}: its {PARTS[part]} images have no captions, and this model reads text; "
            "add a metadata.jsonl with file_name and text, or name the text column"
        )
    captioned = [i for i, texts in enumerate(captions) if any(texts)]  # an image without caption has the empty prompt
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
    return CaptionPrompts(texts, None if images.labels is None else images.labels[[i for i, _ in places]], facts)


class GivenImages:
    """The second images that a model is given to make `count` images from those of a data set.

    Args:
        images: the data set.
        rule: the pipeline's config entry image_condition: kind and factor.
        count: how many. Where there are fewer images, each comes equally often or once more, with another mask.
        part: which part of the data the images are, a key of PARTS.

    Attributes:
        rows: the image of each, int64 [count].
        facts: how they were drawn, for the protocol.

    Called with places in `rows`, it returns the pipeline's arguments condition_image and condition_mask.

    Raises:
        UserError: the images have no such second image.
    """

    def __init__(self, images: ImageDataset, rule: dict[str, Any], count: int, part: str):
        kind = rule["kind"]
        condition = ImageCondition(kind, rule.get("factor") or 1, rule.get("masks", "mixed") if kind == "mask" else None)
        rounds, rest = divmod(count, len(images))
        extra = permutation(len(images), 0, "given images")[:rest].sort().values
        self.rows = torch.cat([torch.arange(len(images)).repeat(rounds), extra])
        self.draws = torch.arange(count) // len(images)
        draws = rounds + 1 if kind == "mask" else 1
        self._images = ConditionImages(images, replace(condition, draws=draws), PARTS[part])
        self.facts = {"given": {"kind": kind, "factor": condition.factor}, "images_of": f"{PARTS[part]} images"}
        self.facts |= {"different_images": min(count, len(images))}

    def __call__(self, places: Sequence[int]) -> dict[str, Tensor]:
        chosen = torch.as_tensor(places)
        draws = self._images.condition.draws
        given, hidden = self._images.given(self.rows[chosen] * draws + self.draws[chosen] % draws)
        arguments = {"condition_image": (given / 2 + 0.5).clamp(0, 1)}
        return arguments if hidden is None else {**arguments, "condition_mask": hidden}

    def captions(self, data: str) -> list[str]:
        """The first caption of each image. UserError where no image has one; data: as the user named it."""
        captions = self._images.dataset.captions()
        if captions is None or not any(any(texts) for texts in captions):
            raise UserError(f"--data {data}: its images have no captions, and this model reads text")
        return [captions[row][0] for row in self.rows.tolist()]
