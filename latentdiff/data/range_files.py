"""Files read by ranges of bytes, on this machine or at an address, and the index that is kept of each.

Archives and tables may be larger than the disk. So they are never copied or unpacked: an image is one read at its place
in the file. For that a file is read through once, when it is first opened, and a record of each image (its place, its
size, its label and captions) is kept in the user's cache folder, in $XDG_CACHE_HOME/latentdiff/shards.

Addresses (http(s)://, hf://, and s3:// and gs:// with s3fs and gcsfs installed) are read by the fsspec library.
"""

from __future__ import annotations

import contextlib
import glob
import hashlib
import itertools
import json
import math
import os
import re
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any, BinaryIO

from fsspec.core import url_to_fs
from fsspec.spec import AbstractBufferedFile
from tqdm import tqdm

from latentdiff.data.image_files import Header, one_line
from latentdiff.errors import UserError
from latentdiff.utils import atomic

MOST_NAMES = 1_000_000  # of one pattern: a typing error in a range must not fill the memory
TRIES = 4  # of a read over the net
# Keys under which storages say which version of a file they have
VERSION_KEYS = (
    "size",
    "mtime",
    "ETag",
    "etag",
    "LastModified",
    "last_modified",
    "Last-Modified",
    "Content-MD5",
    "Digest",
    "md5Hash",
    "crc32c",
)


def expand(pattern: str) -> list[str]:
    """The names that a pattern's braces stand for, in order: shards-{000..127}.tar, {train,extra}-0.parquet.

    Braces may stand anywhere and any number of times, but not inside one another. A range keeps the width of its first
    number. UserError for braces that are neither a range nor a choice, and for more than MOST_NAMES names.
    """
    parts = re.split(r"\{([^{}]*)\}", pattern)  # every second part stood in braces
    choices = [_choices(part, pattern) if k % 2 else [part] for k, part in enumerate(parts)]
    if math.prod(map(len, choices)) > MOST_NAMES:
        raise UserError(f"data '{pattern}': stands for more than {MOST_NAMES} files")
    return list(dict.fromkeys(map("".join, itertools.product(*choices))))


def _choices(inside: str, pattern: str) -> list[str]:
    numbers = re.fullmatch(r"(\d+)\.\.(\d+)", inside)
    if numbers:
        first, last = map(int, numbers.groups())
        if not 0 <= last - first < MOST_NAMES:
            raise UserError(f"data '{pattern}': {{{inside}}} must run upwards, over {MOST_NAMES} numbers at most")
        return [str(k).zfill(len(numbers[1])) for k in range(first, last + 1)]
    if "," not in inside:
        raise UserError(f"data '{pattern}': {{{inside}}} is neither a range as {{000..127}} nor a choice as {{a,b}}")
    return inside.split(",")


class RangeFile:
    """A file that is read by ranges of bytes.

    Attributes: name (a path, or an address as its storage spells it), size (bytes). storage: the fsspec file system of an
    address; None for a path. UserError: there is no such file, or nothing says how long it is.
    """

    def __init__(self, name: str, storage: Any = None):
        self.name, self._storage = name, storage
        try:
            self._info = storage.info(name) if storage else _local_info(name)
        except Exception as error:  # each storage has exceptions of its own
            raise UserError(f"{name}: no such shard, or not reachable ({one_line(error)})") from error
        if not self._info.get("size"):
            raise UserError(f"{name}: its storage does not say how long it is, or it is empty")
        self.size = int(self._info["size"])

    def require_ranges(self, advice: str) -> None:
        """UserError, which ends with the advice, for a server that is known to send whole files alone."""
        if self._info.get("partial") is False:
            raise UserError(f"{self.name}: its server does not serve ranges of bytes{advice}")

    def stream(self) -> BinaryIO:
        """The file opened for reading from its start to its end."""
        return self._storage.open(self.name, "rb") if self._storage else open(self.name, "rb")

    def random_access(self) -> BinaryIO:
        """The file as an open stream that can seek; each read of it is one range, and nothing is read ahead."""
        return _RandomAccess(None, self.name, cache_type="none", size=self.size, range_file=self)

    def read(self, offset: int, size: int) -> bytes:
        """`size` bytes from `offset` on.

        UserError where they cannot be had. Over the net that is tried TRIES times. An image is not called unreadable for it.
        """
        for attempt in range(TRIES):
            try:
                if self._storage:
                    content = self._storage.cat_file(self.name, start=offset, end=offset + size)
                else:
                    with open(self.name, "rb") as stream:
                        stream.seek(offset)
                        content = stream.read(size)
                if len(content) != size:
                    received = f"asked for {size} bytes at {offset}, got {len(content)}"
                    raise OSError(f"{received}: changed, or ranges are not served")
                return content
            except Exception as error:
                if not self._storage or attempt + 1 == TRIES:
                    raise UserError(f"{self.name}: cannot be read ({one_line(error)})") from error
                time.sleep(0.25 * 4**attempt)
        raise AssertionError("unreachable")

    def version(self) -> list[Any]:
        """Which file this is, and which version of it as far as its storage tells."""
        stamps = {key: str(self._info[key]) for key in VERSION_KEYS if self._info.get(key) is not None}
        return [self.name if self._storage else os.path.abspath(self.name), stamps]


class _RandomAccess(AbstractBufferedFile):
    def _fetch_range(self, start: int, end: int) -> bytes:
        return self.kwargs["range_file"].read(start, min(end, self.size) - start)


def _local_info(name: str) -> dict[str, Any]:
    stat = os.stat(name)
    return {"size": stat.st_size, "mtime": stat.st_mtime_ns}


def find_files(name: str, data: str) -> list[RangeFile]:
    """The files of one name without braces, sorted by name. It may have * and ?, except at an http address.

    data: the data set as the user wrote it, for messages.
    """
    if "://" not in name:
        path = str(Path(name).expanduser())
        found = sorted(glob.glob(path, recursive=True)) if glob.has_magic(path) and not Path(path).is_file() else [path]
        return [RangeFile(file) for file in found]
    web = name.startswith(("http://", "https://"))  # there ? begins a query, and nothing lists the files
    if web and "*" in name:
        raise UserError(f"data '{data}': * finds nothing at an http address; write the shards as {{000..127}}")
    try:
        storage, path = url_to_fs(name)
        found = sorted(storage.glob(path)) if not web and glob.has_magic(path) else [path]
    except Exception as error:  # a storage whose library is missing says what to install
        raise UserError(f"data '{data}': cannot be reached ({one_line(error)})") from error
    return [RangeFile(file, storage) for file in found]


@dataclass(frozen=True)
class ImageRecord:
    """What an index keeps of one image.

    key, extension: of its name in an archive. offset: where it begins in an archive, or its row group in a table. size:
    its length in bytes. header, ends: what `inspect` and `hash_ends` gave. label, captions: None where there are none.
    """

    key: str
    extension: str
    offset: int
    size: int
    header: Header
    ends: str
    label: str | None
    captions: tuple[str, ...] | None

    @property
    def member(self) -> str:
        return f"{self.key}.{self.extension}"

    @classmethod
    def from_json(cls, row: list[Any]) -> ImageRecord:
        """A record from the list that JSON made of its fields."""
        key, extension, offset, size, header, ends, label, captions = row
        header = header if isinstance(header, str) else (header[0], (header[1][0], header[1][1]))
        return cls(key, extension, offset, size, header, ends, label, None if captions is None else tuple(captions))


def indexes(
    files: Sequence[RangeFile], settings: list[Any], make: Callable[[RangeFile], list[ImageRecord]]
) -> list[list[ImageRecord]]:
    """For each file the records of its images, in the order of `files`. They are kept in a cache folder for the next time.

    The cache is latentdiff/shards in $XDG_CACHE_HOME, by default in ~/.cache. A damaged entry is made again. Files are read
    in threads, with a progress bar.

    Args:
        files: archives or tables.
        settings: what the records depend on besides the file and its version, as JSON values.
        make: reads a file through and returns its records. It is called where the cache has none. Its errors are passed on.
    """
    with ThreadPoolExecutor(min(16, 2 * (os.cpu_count() or 1))) as pool:
        made = pool.map(lambda file: _index(file, settings, make), files)
        return list(tqdm(made, "indexing", len(files), leave=False, delay=2, unit="file"))


def _index(file: RangeFile, settings: list[Any], make: Callable[[RangeFile], list[ImageRecord]]) -> list[ImageRecord]:
    identity = [*settings, *file.version()]
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "latentdiff" / "shards"
    path = folder / (hashlib.sha256(json.dumps(identity).encode()).hexdigest() + ".json")
    try:
        return [ImageRecord.from_json(row) for row in json.loads(path.read_text(encoding="utf-8"))["samples"]]
    except (OSError, ValueError, TypeError, KeyError, IndexError, RecursionError):
        pass  # none yet, or damaged: it is made again
    records = make(file)
    # A cache folder that cannot be written to costs time at the next start, and no more
    with contextlib.suppress(OSError, UserError):
        atomic.write_text(path, json.dumps({"identity": identity, "samples": [astuple(record) for record in records]}))
    return records
