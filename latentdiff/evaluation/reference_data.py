"""How a checkpoint's training data was read, and whether another data set goes with it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from latentdiff.data.datasets import ImageDataset
from latentdiff.data.image_source import Columns
from latentdiff.data.sources import USUAL_COLUMNS, kind_of, open_source, splits, takes_columns
from latentdiff.data.splits import held_out
from latentdiff.data.transforms import Preprocess
from latentdiff.errors import UserError


def data_rule(folder: Path, codec: Any) -> tuple[Preprocess, float, Columns, bool, str, float]:
    """How a checkpoint's images were read, from its latentdiff.json: the arguments of `reference_sets` after the data.

    They are preprocessing, held-out share, columns, streaming, held-out rule and the share of unreadable images allowed.
    """
    from latentdiff.checkpoints import META, read_meta

    meta = read_meta(folder) if (folder / META).is_file() else {}
    if "config" not in meta:
        raise UserError(f"{folder}: was not trained here, so nothing says how images are prepared for it")
    data = meta["config"]["data"]
    columns = (data.get(f"{name}_column") for name in ("image", "label", "text"))
    split = data.get("held_out_rule", "random")  # the only one that earlier versions had
    allowed = data.get("max_bad_share", 0.01)
    return preprocessing(data, codec), data["held_out"], Columns(*columns), data.get("streaming", False), split, allowed


def preprocessing(data: dict[str, Any], codec: Any) -> Preprocess:
    """The preprocessing of a recorded data section, not resolved."""
    from latentdiff.data.image_files import WHITE

    size = data["size"] and tuple(data["size"])
    framing = data["framing"] if "framing" in data else data["fit"]  # its name in earlier versions
    background = tuple(data.get("background", WHITE))
    return Preprocess(size, data["channels"], framing, math.lcm(codec.factor, data["multiple_of"]), background=background)


def trained_on_means(folder: Path) -> bool:
    """Whether a checkpoint's denoiser was trained on posterior means instead of draws (cache.use_mean)."""
    from latentdiff.checkpoints import META, read_meta

    meta = read_meta(folder) if (folder / META).is_file() else {}
    return bool(meta.get("config", {}).get("cache", {}).get("use_mean", False))


def check_classes(pipeline: Any, images: Any, data: str, advice: str = "") -> None:
    """UserError where a data set's classes are not those of a model that has some, or its images have no labels."""
    theirs, names, count = list(images.class_names), pipeline.class_names, pipeline.num_classes
    if count and (images.labels is None or len(theirs) != count or (names and names != theirs)):
        said = ", ".join(theirs) if images.labels is not None else images.source.unlabelled or "its images have none"
        raise UserError(f"--data {data}: its classes ({said}) are not the model's ({', '.join(names) or count}){advice}")


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
    """(train, test) images of a data set, as the autoencoder sees them (preprocess) or as they are (None).

    test is the data set's own test split where it has one, else the share of its images that training held out.
    columns: of data that has columns (see takes_columns). streaming: of a table (see open_source).
    UserError where training could hold nothing out, because every class has one image.
    """
    preprocess = preprocess or Preprocess()
    channels, background = preprocess.channels, preprocess.background
    columns, streaming = columns if takes_columns(data) else USUAL_COLUMNS, streaming and kind_of(data) == "table"
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
