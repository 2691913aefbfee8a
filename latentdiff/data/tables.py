"""Tables of images: parquet files, what `datasets` saved, and data sets of the Hub; memory-mapped, read row by row.

A row's image is decoded from its encoded bytes by the rules of folders, so that a table and a folder of the same files
give the same pixels. Needs the `datasets` library (pip install latentdiff[data]).
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
from typing import Any

from latentdiff.data.file_report import FileReport
from latentdiff.data.image_files import WHITE, Color, File, Header, image_suffixes, inspect, one_line
from latentdiff.data.image_source import (
    TEXT_COLUMNS,
    Columns,
    EncodedImages,
    all_or_none,
    captions_of,
    class_names_of,
    in_threads,
    numbered,
)
from latentdiff.data.patterns import expand
from latentdiff.errors import UserError

SAVED = ("dataset_dict.json", "state.json")  # what save_to_disk leaves in a folder
HUB_NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*(:[\w.-]+)?")


def is_table_folder(folder: Path) -> bool:
    """A folder that `datasets` saved, or one with parquet files in it or in data/, as the Hub lays them out."""
    return any((folder / name).is_file() for name in SAVED) or any(
        next(folder.glob(pattern), None) for pattern in ("*.parquet", "data/*.parquet")
    )


def is_table_name(data: str) -> bool:
    """Whether a string that names no folder is meant as parquet files, or as a data set of the Hub."""
    return ".parquet" in data or bool(HUB_NAME.fullmatch(data))


class Loaded:
    """A datasets.Dataset as `describe` asks a table."""

    def __init__(self, table: Any):
        self.table, self.features, self.column_names = table, table.features, table.column_names

    def values(self, column: str) -> list[Any]:
        return self.table.with_format(None).select_columns([column])[:][column]


class TableSource(EncodedImages):
    """The rows of a `datasets.Dataset`; pixels stay on disk until they are read."""

    def __init__(
        self,
        name: str,
        table: Any,
        image_column: str,
        labels: list[int] | None,
        class_names: list[str],
        captions: list[tuple[str, ...]] | None,
        channels: int | None,
        max_bad_share: float,
        background: Color = WHITE,
    ):
        import datasets

        table = table.with_format(None).select_columns([image_column])
        self._table, self._column = table.cast_column(image_column, datasets.Image(decode=False)), image_column
        headers = in_threads(self._header, range(len(table)))
        files = [f"row {row}" for row in range(len(table))]
        super().__init__(name, f"{name} ", files, headers, labels, class_names, captions, channels, max_bad_share, background)

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
        image = self._table[row][self._column] or {}
        if image.get("bytes") is None and image.get("path"):
            return Path(image["path"])
        return BytesIO(image.get("bytes") or b"")


def open_table(
    data: str, split: str, channels: int | None, max_bad_share: float, columns: Columns, background: Color = WHITE
) -> TableSource:
    """The table that `data` names: parquet files, a folder, or a Hub name.

    Columns that are not named: the one column of images, else `image`; `label`, where it has classes, whole numbers or
    strings; `text`, else `caption`, where it has strings or lists of them. Classes are those of the training split.
    UserError: `datasets` is missing, nothing is there, a column is not there or holds something else, or a row has no
    label or caption although others do.
    """
    if split not in table_splits(data):
        raise UserError(f"data '{data}' has no test split; hold a share of its images out")
    table = _load(data, split)
    described, report = Loaded(table), FileReport()
    image, labels, class_names, captions = describe(
        described, lambda: described if split == "train" else Loaded(_load(data, "train")), data, columns, report
    )
    source = TableSource(data, table, image, labels, class_names, captions, channels, max_bad_share, background)
    source.report = report
    return source


def describe(
    table: Any, load_train: Callable[[], Any], data: str, columns: Columns, report: FileReport
) -> tuple[str, list[int] | None, list[str], list[tuple[str, ...]] | None]:
    """(the column of images, labels, class names, captions) of a table; classes are those of load_train()'s.

    table: has features (of `datasets`), column_names and values(column). Its other columns, and images in a folder of
    parquet files, go into the report as not used.
    """
    image = _image_column(table, columns.image, data)
    label = _column(table, columns.label, ("label",), _is_label, "label_column", "classes, whole numbers or strings", data)
    text = _column(table, columns.text, TEXT_COLUMNS, _is_text, "text_column", "strings or lists of strings", data)
    for name in table.column_names:
        if name not in (image, label, text):
            report.remark("column that is not used", name)
    note_images_beside(Path(data).expanduser(), report)
    names = None if label is None else _label_names(table, label, data)
    train = table if label is None else load_train()
    if label is None or names is None:
        class_names, names = [], None
    elif label in train.column_names and hasattr(train.features[label], "names"):
        class_names = list(train.features[label].names)
    else:
        class_names = class_names_of(_label_names(train, label, data) if label in train.column_names else None)
    captions = None
    if text is not None:
        texts = [captions_of(value, f"{data} row {row}") for row, value in enumerate(table.values(text))]
        captions = all_or_none(texts, text, lambda row: f"{data} row {row}")
    return image, numbered(names, class_names, data), class_names, captions


def note_images_beside(folder: Path, report: FileReport) -> None:
    """Name the image files of a folder that is read as a table."""
    if folder.is_dir():
        for path in sorted(folder.rglob("*")):
            if path.suffix.lower() in image_suffixes() and path.is_file():
                report.leave_out("lies in a folder of tables, which are read instead", path.relative_to(folder).as_posix())


def table_splits(data: str) -> tuple[str, ...]:
    """("train", "test") where the table has both splits, else ("train",)."""
    folder = Path(data).expanduser()
    if folder.is_dir() and any((folder / name).is_file() for name in SAVED):
        found = _load_saved(folder)
        names = list(found) if hasattr(found, "keys") else []
    elif folder.is_dir() or ".parquet" not in data:
        names = _split_names(data)
    else:
        names = []
    return ("train", "test") if "train" in names and "test" in names else ("train",)


def _load(data: str, split: str) -> Any:
    """One split, as a datasets.Dataset. A table with a single split has it as train, whatever its name."""
    folder = Path(data).expanduser()
    if folder.is_dir() and any((folder / name).is_file() for name in SAVED):
        found = _load_saved(folder)
        table = found[_pick(data, list(found), split)] if hasattr(found, "keys") else found
    elif folder.is_dir() or ".parquet" not in data:
        names = _split_names(data)
        name, config = _hub_name(data)
        with _reading(data) as datasets:
            table = datasets.load_dataset(name, config, split=_pick(data, names, split))
    else:
        files = [file for pattern in expand(data) for file in _matches(pattern)]
        if not files:
            raise UserError(f"data '{data}': no such parquet file")
        with _reading(data) as datasets:
            table = datasets.load_dataset("parquet", data_files=files, split="train")
    if not len(table):
        raise UserError(f"data '{data}': the table has no rows")
    return table


def _load_saved(folder: Path) -> Any:
    with _reading(str(folder)) as datasets:
        return datasets.load_from_disk(str(folder))


def _matches(pattern: str) -> list[str]:
    """Local files in the order of their names; an address goes to `datasets` as it is."""
    return [pattern] if "://" in pattern else sorted(glob.glob(str(Path(pattern).expanduser()), recursive=True))


def _split_names(data: str) -> list[str]:
    """Of a folder as it is now; of a Hub name as it was when first asked for, because each question goes over the net."""
    return _ask_split_names(data) if Path(data).expanduser().is_dir() else _hub_split_names(data)


def _ask_split_names(data: str) -> list[str]:
    name, config = _hub_name(data)
    with _reading(data) as datasets:
        return list(datasets.get_dataset_split_names(name, config))


_hub_split_names = functools.lru_cache(maxsize=32)(_ask_split_names)


def _hub_name(data: str) -> tuple[str, str | None]:
    folder = Path(data).expanduser()
    if folder.is_dir():
        return str(folder), None
    name, _, config = data.partition(":")
    return name, config or None


def _pick(data: str, names: list[str], split: str) -> str:
    if split in names:
        return split
    if split == "train" and len(names) == 1:
        return names[0]
    raise UserError(f"data '{data}': has no {split} split; it has {', '.join(names)}")


@contextlib.contextmanager
def _reading(data: str) -> Iterator[Any]:
    """The `datasets` library, silent where nobody watches; what it says of missing or damaged data becomes one line."""
    try:
        import datasets
    except ImportError:
        raise UserError(f"data '{data}': tables need the datasets library; pip install latentdiff[data]") from None
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


def _label_names(table: Any, column: str, data: str) -> list[str] | None:
    """The class of each row by name; None where no row has one. ClassLabel's -1 stands for none."""
    names = getattr(table.features[column], "names", None)
    values: list[str | None] = [
        None if v is None or v == "" or (names and v < 0) else names[v] if names else str(v) for v in table.values(column)
    ]
    return all_or_none(values, column, lambda row: f"{data} row {row}")


def _image_column(table: Any, named: str | None, data: str) -> str:
    import datasets

    if named is None:
        typed = [name for name, feature in table.features.items() if isinstance(feature, datasets.Image)]
        named = typed[0] if len(typed) == 1 else "image"
        if named not in table.column_names:
            raise UserError(f"data '{data}': which column has the images? Set image_column to one of {_list(table)}")
    _check_there(table, named, "image_column", data)
    feature = table.features[named]
    binary = getattr(feature, "dtype", "") in ("binary", "large_binary")
    if not (binary or isinstance(feature, datasets.Image) or (isinstance(feature, dict) and "bytes" in feature)):
        raise UserError(f"data '{data}': image_column {named} holds no images; the columns are {_list(table)}")
    return named


def _column(table: Any, named: str | None, usual: tuple[str, ...], fits: Any, key: str, holds: str, data: str) -> str | None:
    """The column named, or the first usual one that is there and fits, or None."""
    if named is None:
        return next((name for name in usual if name in table.column_names and fits(table.features[name])), None)
    _check_there(table, named, key, data)
    if not fits(table.features[named]):
        raise UserError(f"data '{data}': {key} {named} must hold {holds}; the columns are {_list(table)}")
    return named


def _check_there(table: Any, named: str, key: str, data: str) -> None:
    if named not in table.column_names:
        raise UserError(f"data '{data}': {key} {named} is not a column; the columns are {_list(table)}")


def _list(table: Any) -> str:
    return ", ".join(table.column_names)


def _is_label(feature: Any) -> bool:
    """ClassLabel's own dtype is int64."""
    return re.fullmatch(r"u?int\d+|bool|(large_)?string", str(getattr(feature, "dtype", ""))) is not None


def _is_text(feature: Any) -> bool:
    inner = feature[0] if isinstance(feature, list) and feature else getattr(feature, "feature", feature)
    return getattr(inner, "dtype", "") in ("string", "large_string")
