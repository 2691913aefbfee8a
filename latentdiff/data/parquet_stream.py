"""Parquet tables read where they lie, a row group at a time and by ranges of bytes: `data.streaming` in a config.

The footers say how many rows each row group has, so any row can be asked for by its number. Labels and captions are read
when the table is opened. Images are read a row group at a time, and the last few groups are kept in memory. The order of
training stays within a few groups (`latentdiff.data.shuffling.stream`), so an epoch reads each group about once. Each
process reads for itself. At the first opening each file is read through once; what its images are is kept in the user's
cache folder.

`datasets.IterableDataset` is not used: its shuffle buffer cannot resume at a sample, alike on any number of processes.
"""

from __future__ import annotations

import io
import os
import threading
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path
from typing import Any

from latentdiff.data.file_report import FileReport
from latentdiff.data.image_files import WHITE, Color, hash_ends, inspect, one_line
from latentdiff.data.image_source import Columns, EncodedImages
from latentdiff.data.patterns import expand
from latentdiff.data.shuffling import WINDOW
from latentdiff.data.tables import HUB_NAME, describe
from latentdiff.data.tar_index import Sample
from latentdiff.data.webdataset import Shard, cached_index, find_shards
from latentdiff.errors import UserError

FORMAT = 1  # of the index as it is kept on disk
KEPT = 2 * WINDOW  # row groups in memory: those of the window that is read, and of the one read ahead


class _Ranges(io.RawIOBase):
    """A file of a storage as pyarrow reads it; each read is one range, tried again where the net fails."""

    def __init__(self, shard: Shard):
        self._shard, self._place, self._size = shard, 0, int(shard.info["size"])

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._place

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._place = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._place, io.SEEK_END: self._size}[whence]
        return self._place

    def read(self, size: int = -1) -> bytes:
        left = max(0, self._size - self._place)
        size = left if size is None or size < 0 else min(size, left)
        found = self._shard.read(self._place, size) if size else b""
        self._place += size
        return found


class Parquet:
    """One parquet file. groups: rows of each row group."""

    def __init__(self, shard: Shard):
        import pyarrow.parquet as pq

        self.shard, self._pq = shard, pq
        if shard.info.get("partial") is False:
            raise UserError(f"{shard.file}: its server does not serve ranges of bytes; leave data.streaming out")
        self.metadata = self._say(lambda: pq.read_metadata(_Ranges(shard)))
        self.schema = self._say(self.metadata.schema.to_arrow_schema)
        self.groups = [self.metadata.row_group(g).num_rows for g in range(self.metadata.num_row_groups)]

    def _say(self, read: Callable[[], Any]) -> Any:
        try:
            return read()
        except UserError:
            raise
        except Exception as error:  # pyarrow has exceptions of its own
            raise UserError(f"{self.shard.file}: cannot be read as parquet ({one_line(error)})") from error

    def _reader(self) -> Any:
        # A reader each time: threads read at once, and a reader has one place in its file
        return self._pq.ParquetFile(_Ranges(self.shard), metadata=self.metadata, pre_buffer=True)

    def values(self, column: str) -> list[Any]:
        return self._say(lambda: self._reader().read(columns=[column]).column(0).to_pylist())

    def images(self, group: int, column: str) -> list[bytes]:
        """The encoded images of a row group; empty where the table has a path alone."""
        rows = self._say(lambda: self._reader().read_row_group(group, columns=[column]).column(0).to_pylist())
        return [(row.get("bytes") if isinstance(row, dict) else row) or b"" for row in rows]

    def index(self, column: str) -> list[Sample]:
        """A record of each row: its group (offset), the image's length, header and hash of its ends."""
        return cached_index(self.shard, ["rows", FORMAT, column], lambda: self._look(column))

    def _look(self, column: str) -> list[Sample]:
        found = []
        for group in range(len(self.groups)):
            for data in self.images(group, column):
                header = inspect(BytesIO(data)) if data else "the table has no bytes of it"
                found.append(Sample(str(len(found)), "", group, len(data), header, hash_ends(BytesIO(data)), None, None))
        return found


class Rows:
    """What `tables.describe` asks of a table, its values read when they are asked for."""

    def __init__(self, files: list[Parquet], data: str):
        import datasets

        for file in files:
            if not file.schema.equals(files[0].schema):
                raise UserError(f"data '{data}': {file.shard.file} has other columns than {files[0].shard.file}")
        self.files = files
        self.features = datasets.Features.from_arrow_schema(files[0].schema)
        self.column_names = list(self.features)

    def values(self, column: str) -> list[Any]:
        return [value for file in self.files for value in file.values(column)]


class StreamedTable(EncodedImages):
    """The rows of parquet files. blocks: how many of its images each row group has, in order."""

    def __init__(
        self,
        name: str,
        files: list[Parquet],
        column: str,
        labels: list[int] | None,
        class_names: list[str],
        captions: list[tuple[str, ...]] | None,
        channels: int | None,
        max_bad_share: float,
        background: Color = WHITE,
    ):
        with ThreadPoolExecutor(min(16, 2 * (os.cpu_count() or 1))) as pool:
            indexes = list(pool.map(lambda file: file.index(column), files))
        self._files, self._column = files, column
        self._samples = [sample for index in indexes for sample in index]
        self._starts: dict[tuple[int, int], int] = {}  # the first row of each (file, group)
        self._places: list[tuple[int, int]] = []
        for k, file in enumerate(files):
            for group, rows in enumerate(file.groups):
                self._starts[k, group] = len(self._places)
                self._places += [(k, group)] * rows
        self._kept: OrderedDict[tuple[int, int], list[bytes]] = OrderedDict()
        self._lock = threading.Lock()
        names = [f"row {row}" for row in range(len(self._samples))]
        headers = [sample.header for sample in self._samples]
        super().__init__(name, f"{name} ", names, headers, labels, class_names, captions, channels, max_bad_share, background)
        counts = dict.fromkeys(self._starts, 0)
        for row in self.rows:
            counts[self._places[row]] += 1
        self.blocks = tuple(counts.values())

    def open(self, i: int) -> BytesIO:
        row = self.rows[i]
        place = self._places[row]
        with self._lock:  # one thread reads a group, the others wait for it instead of reading it too
            group = self._kept.get(place)
            if group is None:
                group = self._files[place[0]].images(place[1], self._column)
                self._kept[place] = group
                while len(self._kept) > KEPT:
                    self._kept.popitem(last=False)
            self._kept.move_to_end(place)
        return BytesIO(group[row - self._starts[place]])

    def ends(self) -> list[str]:
        return [self._samples[row].ends for row in self.rows]


def open_streamed(
    data: str, split: str, channels: int | None, max_bad_share: float, columns: Columns, background: Color = WHITE
) -> StreamedTable:
    """The table that `data` names, read where it lies; columns, classes and captions as `tables.open_table` finds them.

    data: parquet files (paths, or addresses that fsspec knows; braces and, where files can be listed, * and ?), a folder
    of them, or a Hub name. UserError: nothing is there, a file is damaged or has other columns than the first.
    """
    try:
        import datasets  # noqa: F401
    except ImportError:
        raise UserError(f"data '{data}': tables need the datasets library; pip install latentdiff[data]") from None
    parts = _parts(_listed(data))
    if split not in parts:
        raise UserError(f"data '{data}' has no test split; hold a share of its images out")
    rows = Rows([Parquet(shard) for shard in parts[split]], data)
    if not sum(sum(file.groups) for file in rows.files):
        raise UserError(f"data '{data}': the table has no rows")

    def train() -> Rows:
        return rows if split == "train" else Rows([Parquet(shard) for shard in parts["train"]], data)

    report = FileReport()
    image, labels, class_names, captions = describe(rows, train, data, columns, report)
    source = StreamedTable(data, rows.files, image, labels, class_names, captions, channels, max_bad_share, background)
    source.report = report
    return source


def streamed_splits(data: str) -> tuple[str, ...]:
    """("train", "test") where files of both begin with these words, as the Hub names them, else ("train",)."""
    return tuple(_parts(_listed(data)))


def _parts(shards: list[Shard]) -> dict[str, list[Shard]]:
    named = {word: [s for s in shards if s.file.rsplit("/", 1)[-1].startswith(word)] for word in ("train", "test")}
    return named if all(named.values()) else {"train": shards}


def _listed(data: str) -> list[Shard]:
    """The parquet files that a string names, in the order of their names."""
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
    found = [shard for name in names for shard in find_shards(name, data)]
    if not found:
        raise UserError(f"data '{data}': no such parquet file")
    return found
