"""Parquet tables read where they lie, a row group at a time and by ranges of bytes: `data.streaming` in a config.

The footers say how many rows each row group has, so any row can be asked for by its number. Labels and captions are read
when the table is opened. Images are read a row group at a time, and the last few groups are kept in memory. The order of
training stays within a few groups (`latentdiff.data.shuffling.stream`), so an epoch reads each group about once. Each
process reads for itself. At the first opening each file is read through once; what its images are is kept in the user's
cache folder.

`datasets.IterableDataset` is not used: its shuffle buffer cannot resume at a sample, alike on any number of processes.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from latentdiff.data.file_report import FileReport
from latentdiff.data.image_files import hash_ends, inspect, one_line
from latentdiff.data.image_source import Annotations, Columns, EncodedImages, Reading
from latentdiff.data.range_files import ImageRecord, RangeFile, expand, find_files, indexes
from latentdiff.data.shuffling import WINDOW
from latentdiff.data.tables import HUB_NAME, describe, import_datasets
from latentdiff.errors import UserError

if TYPE_CHECKING:
    import pyarrow.parquet as pq

FORMAT = 1  # of the index as it is kept on disk
GROUPS_KEPT = 2 * WINDOW  # in memory: the row groups of the window that is read, and of the one that is read ahead


class ParquetFile:
    """One parquet file. Attributes: file, schema (pyarrow's), groups (how many rows each row group has)."""

    def __init__(self, file: RangeFile):
        file.require_ranges("; leave data.streaming out")
        self.file, self._metadata = file, None
        with self._reader() as reader:
            self._metadata = reader.metadata
            self.schema = self._metadata.schema.to_arrow_schema()
        self.groups = [self._metadata.row_group(g).num_rows for g in range(self._metadata.num_row_groups)]

    @contextlib.contextmanager
    def _reader(self) -> Iterator[pq.ParquetFile]:
        """A reader of its own for each use, because threads read at once. What goes wrong is a UserError naming the file."""
        import pyarrow.parquet as pq

        try:
            yield pq.ParquetFile(self.file.random_access(), metadata=self._metadata, pre_buffer=self._metadata is not None)
        except UserError:
            raise
        except Exception as error:  # pyarrow has exceptions of its own
            raise UserError(f"{self.file.name}: cannot be read as parquet ({one_line(error)})") from error

    def values(self, column: str) -> list[Any]:
        """The values of a column, one for each row."""
        with self._reader() as reader:
            return reader.read(columns=[column]).column(0).to_pylist()

    def images(self, group: int, column: str) -> list[bytes]:
        """The encoded images of a row group; empty where the table has no bytes of an image."""
        with self._reader() as reader:
            rows = reader.read_row_group(group, columns=[column]).column(0).to_pylist()
        return [(row.get("bytes") if isinstance(row, dict) else row) or b"" for row in rows]

    def records(self, column: str) -> list[ImageRecord]:
        """A record of each row's image; its offset is its row group."""
        records: list[ImageRecord] = []
        for group in range(len(self.groups)):
            for data in self.images(group, column):
                header = inspect(BytesIO(data)) if data else "the table has no bytes of it"
                ends = hash_ends(BytesIO(data))
                records.append(ImageRecord(str(len(records)), "", group, len(data), header, ends, None, None))
        return records


class ParquetTable:
    """Files of one schema as `latentdiff.data.tables.describe` needs a table: values are read when they are asked for."""

    def __init__(self, files: list[RangeFile], data: str):
        self.files = [ParquetFile(file) for file in files]
        schema = self.files[0].schema
        for file in self.files:
            if not file.schema.equals(schema):
                raise UserError(f"data '{data}': {file.file.name} has other columns than {files[0].name}")
        self.features = import_datasets(data).Features.from_arrow_schema(schema)

    def values(self, column: str) -> list[Any]:
        return [value for file in self.files for value in file.values(column)]


class StreamedTable(EncodedImages):
    """The rows of parquet files. blocks: how many of its images each row group has, in order."""

    def __init__(self, name: str, files: list[ParquetFile], column: str, annotations: Annotations, reading: Reading):
        tables = {file.file: file for file in files}
        records = indexes(list(tables), ["rows", FORMAT, column], lambda file: tables[file].records(column))
        self._records = [record for group in records for record in group]
        self._column = column
        self._groups = [(file, group) for file in files for group in range(len(file.groups))]
        rows = [count for file in files for count in file.groups]
        self._first_row = np.cumsum([0, *rows])  # of each group
        self._group_of = np.repeat(np.arange(len(rows)), rows)  # of each row
        self._group_images = functools.lru_cache(GROUPS_KEPT)(self._read_group)
        self._lock = threading.Lock()
        names, headers = [f"row {row}" for row in range(len(self._records))], [record.header for record in self._records]
        super().__init__(name, f"{name} ", names, headers, annotations, reading)
        self.blocks = tuple(np.bincount(self._group_of[self.rows], minlength=len(rows)).tolist())

    def _read_group(self, group: int) -> list[bytes]:
        file, number = self._groups[group]
        return file.images(number, self._column)

    def open(self, i: int) -> BytesIO:
        row = self.rows[i]
        group = int(self._group_of[row])
        with self._lock:  # one thread reads a group; the others wait for it instead of reading it too
            images = self._group_images(group)
        return BytesIO(images[row - self._first_row[group]])

    def ends(self, limit: int | None = None) -> list[str]:
        return [self._records[row].ends for row in self.rows[:limit]]


def open_streamed(data: str, split: str, columns: Columns, reading: Reading) -> StreamedTable:
    """The table that `data` names, read where it lies; columns, classes and captions as `tables.open_table` finds them.

    data: parquet files (paths, or addresses that fsspec knows; braces and, where files can be listed, * and ?), a folder
    of them, or a Hub name. UserError: nothing is there, a file is damaged or has other columns than the first.
    """
    import_datasets(data)
    parts = _parts(data)
    if split not in parts:
        raise UserError(f"data '{data}' has no test split; hold a share of its images out")
    table = ParquetTable(parts[split], data)
    if not sum(sum(file.groups) for file in table.files):
        raise UserError(f"data '{data}': the table has no rows")
    report = FileReport()
    image, annotations = describe(
        table, lambda: table if split == "train" else ParquetTable(parts["train"], data), data, columns, report
    )
    source = StreamedTable(data, table.files, image, annotations, reading)
    source.report = report
    return source


def streamed_splits(data: str) -> tuple[str, ...]:
    """("train", "test") where files of both begin with these words, as the Hub names them, else ("train",)."""
    return tuple(_parts(data))


def _parts(data: str) -> dict[str, list[RangeFile]]:
    """The parquet files of each split, in the order of their names."""
    folder = Path(data).expanduser()
    if folder.is_dir():
        names = [str(path) for path in sorted(folder.glob("*.parquet")) or sorted((folder / "data").glob("*.parquet"))]
    elif ".parquet" in data:
        names = expand(data)
    elif HUB_NAME.fullmatch(data):
        name, _, config = data.partition(":")
        names = [f"hf://datasets/{name}/{config + '/' if config else '**/'}*.parquet"]
    else:
        names = []
    if not names:
        raise UserError(
            f"data '{data}': nothing to stream; data.streaming reads parquet files, folders of them and Hub names with them "
            "(shards are read by ranges as they are)"
        )
    files = [file for name in names for file in find_files(name, data)]
    if not files:
        raise UserError(f"data '{data}': no such parquet file")
    parts = {word: [file for file in files if file.name.rsplit("/", 1)[-1].startswith(word)] for word in ("train", "test")}
    return parts if all(parts.values()) else {"train": files}
