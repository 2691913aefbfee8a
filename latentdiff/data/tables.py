"""Tables of images: parquet files, what `datasets` saved, and data sets of the Hub, memory-mapped by `datasets`.

A row's image is decoded from its encoded bytes by the rules of folders. So a table and a folder of the same files give the
same pixels. Needs the `datasets` library (pip install latentdiff[data]).
"""

from __future__ import annotations

import contextlib
import functools
import glob
import re
import sys
from collections.abc import Callable, Iterator
from io import BytesIO
from pathlib import Path
from typing import Any, Protocol

from latentdiff.data.file_report import FileReport
from latentdiff.data.image_files import File, Header, image_suffixes, inspect, one_line
from latentdiff.data.image_source import (
    TEXT_COLUMNS,
    Annotations,
    Columns,
    EncodedImages,
    Reading,
    all_or_none,
    captions_of,
    class_names_of,
    in_threads,
    numbered,
)
from latentdiff.data.range_files import expand
from latentdiff.errors import UserError

SAVED = ("dataset_dict.json", "state.json")  # what save_to_disk leaves in a folder
HUB_NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*(:[\w.-]+)?")


def is_table_folder(folder: Path) -> bool:
    """A folder that `datasets` saved, or one with parquet files in it or in data/, as the Hub lays them out."""
    return _is_saved(folder) or any(next(folder.glob(pattern), None) for pattern in ("*.parquet", "data/*.parquet"))


def is_table_name(data: str) -> bool:
    """Whether a string that names no folder is meant as parquet files, or as a data set of the Hub."""
    return ".parquet" in data or bool(HUB_NAME.fullmatch(data))


class Table(Protocol):
    """What `describe` needs of a table: the features of its columns, by name, and the values of one column."""

    features: Any

    def values(self, column: str) -> list[Any]: ...


class LoadedTable:
    """A datasets.Dataset as `describe` needs it."""

    def __init__(self, dataset: Any):
        self.dataset, self.features = dataset, dataset.features

    def values(self, column: str) -> list[Any]:
        return self.dataset.with_format(None).select_columns([column])[:][column]


class TableSource(EncodedImages):
    """The images of a `datasets.Dataset`, one for each row. Pixels stay on disk until they are read.

    Args:
        name: of the data set, as the user wrote it.
        dataset: the `datasets.Dataset`.
        image_column: the column with the encoded images.
        annotations: labels and captions, one for each row.
        reading: how images are read.

    Raises:
        UserError: no image can be read, or more cannot be read than reading.max_bad_share allows.
    """

    def __init__(self, name: str, dataset: Any, image_column: str, annotations: Annotations, reading: Reading):
        import datasets

        images = dataset.with_format(None).select_columns([image_column])
        self._images, self._column = images.cast_column(image_column, datasets.Image(decode=False)), image_column
        headers = in_threads(self._header, range(len(images)))
        super().__init__(name, f"{name} ", [f"row {row}" for row in range(len(images))], headers, annotations, reading)

    def open(self, i: int) -> File:
        return self._encoded(self.rows[i])

    def _header(self, row: int) -> Header:
        file = self._encoded(row)
        if isinstance(file, Path) and not _is_fetched(file):
            return f"the table has its path alone ({file}), not its bytes"
        if isinstance(file, BytesIO) and not file.getbuffer().nbytes:
            return "the row has no image"
        return inspect(file)

    def _encoded(self, row: int) -> File:
        """Bytes, or the path of a file that was fetched from the Hub together with the table."""
        image = self._images[row][self._column] or {}
        if image.get("bytes") is None and image.get("path"):
            return Path(image["path"])
        return BytesIO(image.get("bytes") or b"")


def open_table(data: str, split: str, columns: Columns, reading: Reading) -> TableSource:
    """The table that `data` names: parquet files, a folder, or a Hub name.

    Columns that are not named: the one column of images, else `image`; `label`, where it has classes, whole numbers or
    strings; `text`, else `caption`, where it has strings or lists of them. Classes are those of the training split.
    UserError: `datasets` is missing, nothing is there, a column is not there or holds something else, or a row has no
    label or caption although others do.
    """
    parts = _parts(data)
    if split not in _named_splits(parts):
        raise UserError(f"data '{data}' has no test split; hold a share of its images out")
    table, report = _load(data, parts, split), FileReport()
    image, annotations = describe(
        table, lambda: table if split == "train" else _load(data, parts, "train"), data, columns, report
    )
    source = TableSource(data, table.dataset, image, annotations, reading)
    source.report = report
    return source


def describe(
    table: Table, load_train: Callable[[], Table], data: str, columns: Columns, report: FileReport
) -> tuple[str, Annotations]:
    """(the name of the column of images, the labels and captions of each row) of one split of a table.

    Args:
        table: the split.
        load_train: gives the training split, whose classes all splits share. It is called only where there are labels.
        data: the data set as the user wrote it, for messages. Where it is a folder, image files in it are reported.
        columns: the columns that the user named. For the others see `open_table`.
        report: gets the columns and image files that are not used.

    Raises:
        UserError: a column is not there or holds something else, or a row has no label or caption although others do.
    """
    image = _image_column(table, columns.image, data)
    label = _column(table, columns.label, ("label",), _is_label, "label_column", "classes, whole numbers or strings", data)
    text = _column(table, columns.text, TEXT_COLUMNS, _is_text, "text_column", "strings or lists of strings", data)
    for name in table.features:
        if name not in (image, label, text):
            report.remark("column that is not used", name)
    folder = Path(data).expanduser()
    for path in sorted(folder.rglob("*")) if folder.is_dir() else ():
        if path.suffix.lower() in image_suffixes() and path.is_file():
            report.leave_out("lies in a folder of tables, which are read instead", path.relative_to(folder).as_posix())
    names = None if label is None else _label_names(table, label, data)
    class_names: list[str] = []
    if label is not None and names is not None:
        train = load_train()
        if hasattr(train.features.get(label), "names"):
            class_names = list(train.features[label].names)
        elif label in train.features:
            class_names = class_names_of(_label_names(train, label, data))
    captions = None
    if text is not None:
        texts = [captions_of(value, f"{data} row {row}") for row, value in enumerate(table.values(text))]
        captions = all_or_none(texts, text, lambda row: f"{data} row {row}")
    return image, Annotations(numbered(names, class_names, data), class_names, captions)


def table_splits(data: str) -> tuple[str, ...]:
    """("train", "test") where the table has both splits, else ("train",)."""
    return _named_splits(_parts(data))


def _named_splits(parts: dict[str, Any]) -> tuple[str, ...]:
    return ("train", "test") if {"train", "test"} <= set(parts) else ("train",)


def _is_saved(folder: Path) -> bool:
    return any((folder / name).is_file() for name in SAVED)


def _parts(data: str) -> dict[str, Callable[[], Any]]:
    """{split: what loads it as a datasets.Dataset}."""
    folder = Path(data).expanduser()
    if not folder.is_dir() and ".parquet" in data:
        return {"train": lambda: _load_files(data)}
    with _reading(data) as datasets:
        if _is_saved(folder):
            saved = datasets.load_from_disk(str(folder))
            splits = saved if isinstance(saved, datasets.DatasetDict) else {"train": saved}
            return {name: functools.partial(splits.get, name) for name in splits}
        if folder.is_dir():
            name, config, names = str(folder), None, datasets.get_dataset_split_names(str(folder))
        else:
            name, _, config = data.partition(":")
            names = _hub_split_names(name, config or None)
        return {split: functools.partial(datasets.load_dataset, name, config or None, split=split) for split in names}


@functools.lru_cache(maxsize=32)  # each question goes over the net
def _hub_split_names(name: str, config: str | None) -> list[str]:
    import datasets

    return datasets.get_dataset_split_names(name, config)


def _load_files(data: str) -> Any:
    """Local files in the order of their names; an address goes to `datasets` as it is."""
    files: list[str] = []
    for name in expand(data):
        files += [name] if "://" in name else sorted(glob.glob(str(Path(name).expanduser()), recursive=True))
    if not files:
        raise UserError(f"data '{data}': no such parquet file")
    return import_datasets(data).load_dataset("parquet", data_files=files, split="train")


def _load(data: str, parts: dict[str, Callable[[], Any]], split: str) -> LoadedTable:
    """One split. The only split of a table is its train split, whatever its name."""
    if split not in parts and (split != "train" or len(parts) != 1):
        raise UserError(f"data '{data}': has no {split} split; it has {', '.join(parts)}")
    with _reading(data):
        table = parts.get(split, next(iter(parts.values())))()
    if not len(table):
        raise UserError(f"data '{data}': the table has no rows")
    return LoadedTable(table)


def import_datasets(data: str) -> Any:
    """The `datasets` library; a UserError that says how to install it where it is missing."""
    try:
        import datasets
    except ImportError:
        raise UserError(f"data '{data}': tables need the datasets library; pip install latentdiff[data]") from None
    return datasets


@contextlib.contextmanager
def _reading(data: str) -> Iterator[Any]:
    """The `datasets` library, silent where nobody watches. Its errors about missing or damaged data become one line."""
    datasets = import_datasets(data)
    level, bars = datasets.logging.get_verbosity(), datasets.are_progress_bars_disabled()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    try:
        yield datasets
    except UserError:
        raise
    except Exception as error:  # damaged files, storages and the Hub raise almost anything through it
        local = Path(data).expanduser().is_dir() or ".parquet" in data
        what = "cannot be read" if local else "no such folder, and as a name of the Hub it cannot be read"
        raise UserError(f"data '{data}': {what} ({one_line(error.__cause__ or error)})") from error
    finally:
        datasets.logging.set_verbosity(level)
        if not bars:
            datasets.enable_progress_bars()


def _is_fetched(file: Path) -> bool:
    """Whether a file lies where the Hub's are kept: a table must not have files read from anywhere else."""
    from datasets import config
    from huggingface_hub.constants import HF_HUB_CACHE

    places = (config.HF_CACHE_HOME, config.HF_DATASETS_CACHE, HF_HUB_CACHE)
    return any(file.resolve().is_relative_to(Path(place).expanduser().resolve()) for place in places)


def _label_names(table: Table, column: str, data: str) -> list[str] | None:
    """The class of each row by name; None where no row has one. ClassLabel's -1 stands for none."""
    names = getattr(table.features[column], "names", None)
    values: list[str | None] = [
        None if v is None or v == "" or (names and v < 0) else names[v] if names else str(v) for v in table.values(column)
    ]
    return all_or_none(values, column, lambda row: f"{data} row {row}")


def _image_column(table: Table, named: str | None, data: str) -> str:
    import datasets

    if named is None:
        typed = [name for name, feature in table.features.items() if isinstance(feature, datasets.Image)]
        named = typed[0] if len(typed) == 1 else "image"
        if named not in table.features:
            columns = ", ".join(table.features)
            raise UserError(f"data '{data}': which column has the images? Set image_column to one of {columns}")
    _check_column(table, named, _is_image, "image_column", "images", data)
    return named


def _column(
    table: Table,
    named: str | None,
    usual: tuple[str, ...],
    fits: Callable[[Any], bool],
    key: str,
    holds: str,
    data: str,
) -> str | None:
    """The column named, or the first usual one that is there and fits, or None."""
    if named is None:
        return next((name for name in usual if name in table.features and fits(table.features[name])), None)
    _check_column(table, named, fits, key, holds, data)
    return named


def _check_column(table: Table, named: str, fits: Callable[[Any], bool], key: str, holds: str, data: str) -> None:
    if named not in table.features or not fits(table.features[named]):
        wrong = f"must hold {holds}" if named in table.features else "is not a column"
        raise UserError(f"data '{data}': {key} {named} {wrong}; the columns are {', '.join(table.features)}")


def _is_image(feature: Any) -> bool:
    """datasets.Image, encoded bytes, or a struct of bytes and path."""
    import datasets

    binary = getattr(feature, "dtype", "") in ("binary", "large_binary")
    return binary or isinstance(feature, datasets.Image) or (isinstance(feature, dict) and "bytes" in feature)


def _is_label(feature: Any) -> bool:
    """ClassLabel's own dtype is int64."""
    return re.fullmatch(r"u?int\d+|bool|(large_)?string", str(getattr(feature, "dtype", ""))) is not None


def _is_text(feature: Any) -> bool:
    inner = feature[0] if isinstance(feature, list) and feature else getattr(feature, "feature", feature)
    return getattr(inner, "dtype", "") in ("string", "large_string")
