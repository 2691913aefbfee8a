"""The data set that a model is measured against, read as the model's training read its data."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

from latentdiff.checkpoints import META, read_meta
from latentdiff.data.datasets import ImageDataset
from latentdiff.data.image_files import WHITE
from latentdiff.data.image_source import Columns
from latentdiff.data.sources import USUAL_COLUMNS, kind_of, open_source, splits, takes_columns
from latentdiff.data.splits import held_out
from latentdiff.data.transforms import Preprocess
from latentdiff.errors import UserError


def reference_sets(
    data: str,
    preprocess: Preprocess | None = None,
    held_out_share: float = 0.05,
    columns: Columns = USUAL_COLUMNS,
    streaming: bool = False,
    held_out_rule: str = "per_class",
    max_bad_share: float = 0.01,
    split_seed: int = 0,
) -> tuple[ImageDataset, ImageDataset]:
    """The training images and the held-out images of a data set.

    The held-out images are the data set's own test split where it has one, else the share that training held out.

    Args:
        data: a folder, a table, shards, or the name of a data set.
        preprocess: how images are prepared, as for the autoencoder; None leaves them as they are.
        held_out_share: the share of images that training held out.
        columns: names of columns, for data that has columns (see `takes_columns`).
        streaming: read a table as a stream (see `open_source`).
        held_out_rule: how images were held out.
        max_bad_share: the share of unreadable images that is allowed.
        split_seed: of the split.

    Raises:
        UserError: the data cannot be read, or nothing is held out because every class has one image.
    """
    preprocess = preprocess or Preprocess()
    channels, background = preprocess.channels, preprocess.background
    columns = columns if takes_columns(data) else replace(USUAL_COLUMNS, caption=columns.caption)
    streaming = streaming and kind_of(data) == "table"
    source = open_source(data, "train", channels, max_bad_share, columns, streaming, background)
    if "test" in splits(data, streaming):
        train = ImageDataset(source, preprocess)
        test = open_source(data, "test", channels, max_bad_share, columns, streaming, background)
        return train, ImageDataset(test, train.preprocess)
    kept, apart = held_out(source, held_out_share, split_seed, held_out_rule)
    if not len(apart):
        raise UserError(
            f"data '{data}': each class has one image, so none was held out of training to compare with; "
            "give a folder with train/ and test/"
        )
    return ImageDataset(source, preprocess, kept), ImageDataset(source, preprocess, apart)


def data_rule(folder: Path, codec: Any) -> tuple[Preprocess, float, Columns, bool, str, float]:
    """How a checkpoint's images were read: the arguments of `reference_sets` after the data, from its latentdiff.json.

    They are preprocess, held_out_share, columns, streaming, held_out_rule and max_bad_share. UserError for a checkpoint that
    was not trained by latentdiff.
    """
    config = _config(folder)
    if config is None:
        raise UserError(f"{folder}: was not trained here, so nothing says how images are prepared for it")
    data = config["data"]
    return (
        preprocessing(data, codec),
        data["held_out"],
        Columns(*(data.get(key) for key in ("image_column", "label_column", "text_column", "caption", "pair_column"))),
        data.get("streaming", False),
        data.get("held_out_rule", "random"),  # the only rule of earlier versions
        data.get("max_bad_share", 0.01),
    )


def preprocessing(data: dict[str, Any], codec: Any) -> Preprocess:
    """The preprocessing of a recorded data section. Its size may still be open; codec: the autoencoder, for its factor."""
    size = data["size"] and tuple(data["size"])
    framing = data["framing"] if "framing" in data else data["fit"]  # its name in earlier versions
    background = tuple(data.get("background", WHITE))
    return Preprocess(size, data["channels"], framing, math.lcm(codec.factor, data["multiple_of"]), background=background)


def trained_on_means(folder: Path) -> bool:
    """Whether a checkpoint's denoiser was trained on posterior means instead of draws (cache.use_mean)."""
    return bool((_config(folder) or {}).get("cache", {}).get("use_mean", False))


def check_classes(pipeline: Any, images: ImageDataset, data: str, advice: str = "") -> None:
    """UserError if a model has classes and a data set's classes are not the same, or its images have no labels.

    Args:
        pipeline: the model.
        images: the data set.
        data: the data set as the user named it.
        advice: the end of the message.
    """
    names, expected, count = list(images.class_names), pipeline.class_names, pipeline.num_classes
    if count and (images.labels is None or len(names) != count or (expected and expected != names)):
        listed = ", ".join(names) if images.labels is not None else images.source.unlabelled or "its images have none"
        raise UserError(f"--data {data}: its classes ({listed}) are not the model's ({', '.join(expected) or count}){advice}")


def _config(folder: Path) -> dict[str, Any] | None:
    """The training config in a checkpoint's latentdiff.json, if it has one."""
    return read_meta(folder).get("config") if (folder / META).is_file() else None
