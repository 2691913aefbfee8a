"""WebDataset shards: plain tar files, here or behind http(s)://, s3://, gs:// and hf://, read by ranges of bytes.

Each shard is read through once, when it is first opened: where each image lies, its size, its label and captions are
kept as an index in the user's cache folder. From then on an image is one read at its place in the archive, so the data
may be larger than the disk, any image can be asked for, and nothing is ever unpacked. Addresses need the fsspec library
(pip install latentdiff[data]); s3:// and gs:// also s3fs and gcsfs.
"""

from __future__ import annotations

import glob
import hashlib
import json
import os
import re
import secrets
import time
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO

from latentdiff.data.image_files import WHITE, Color, one_line
from latentdiff.data.image_source import Columns, EncodedImages, all_or_none, class_names_of, numbered
from latentdiff.data.patterns import expand
from latentdiff.data.tar_index import FORMAT, Sample, index_shard
from latentdiff.errors import UserError

ARCHIVE = re.compile(r"\.(tar|tgz)(?![A-Za-z0-9])")
STAMPS = (  # what tells versions of one file apart, as far as its storage says it
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
TRIES = 4


class Shard:
    """One archive: `file` is a path or an address, `info` what its storage says of it (size, and what marks a version)."""

    def __init__(self, file: str, storage: Any = None):
        self.file, self._storage = file, storage
        try:
            self.info = storage.info(file) if storage else _local_info(file)
        except Exception as error:  # each storage has exceptions of its own
            raise UserError(f"{file}: no such shard, or not reachable ({one_line(error)})") from error
        if not self.info.get("size"):
            raise UserError(f"{file}: its storage does not say how long it is, or it is empty")

    def stream(self) -> BinaryIO:
        return self._storage.open(self.file, "rb") if self._storage else open(self.file, "rb")

    def read(self, offset: int, size: int) -> bytes:
        """`size` bytes from `offset` on. What fails on the net is tried again; then it is a UserError, not a bad image."""
        for attempt in range(TRIES):
            try:
                if self._storage:
                    found = self._storage.cat_file(self.file, start=offset, end=offset + size)
                else:
                    with open(self.file, "rb") as stream:
                        stream.seek(offset)
                        found = stream.read(size)
                if len(found) != size:
                    raise OSError(f"asked for {size} bytes at {offset}, got {len(found)}: changed, or ranges are not served")
                return found
            except Exception as error:  # each storage has exceptions of its own
                if not self._storage or attempt + 1 == TRIES:
                    raise UserError(f"{self.file}: cannot be read ({one_line(error)})") from error
                time.sleep(0.25 * 4**attempt)
        raise AssertionError("unreachable")

    def index(self, columns: Columns) -> list[Sample]:
        """Its samples, from the cache folder where this version was indexed before."""
        return cached_index(self, [FORMAT, columns.image, columns.label, columns.text], lambda: self._look(columns))

    def _look(self, columns: Columns) -> list[Sample]:
        if self.info.get("partial") is False:
            raise UserError(f"{self.file}: its server does not serve ranges of bytes, so no image can be read alone")
        try:
            with self.stream() as stream:
                return index_shard(stream, self.info["size"], self.file, columns)
        except UserError:
            raise
        except Exception as error:
            raise UserError(f"{self.file}: cannot be read ({one_line(error)})") from error

    def identity(self) -> list[Any]:
        """Which file it is, and which version of it as far as its storage tells."""
        stamps = {key: str(self.info[key]) for key in STAMPS if self.info.get(key) is not None}
        return [self.file if self._storage else os.path.abspath(self.file), stamps]


def cached_index(shard: Shard, what: list[Any], look: Callable[[], list[Sample]]) -> list[Sample]:
    """An index from the cache folder where this version of a file was indexed so before, else what look() finds, kept there."""
    identity = [*what, *shard.identity()]
    path = _cache_folder() / (hashlib.sha256(json.dumps(identity).encode()).hexdigest() + ".json")
    kept = _kept(path, identity)
    if kept is None:
        kept = look()
        _keep(path, identity, kept)
    return kept


class WebShardSource(EncodedImages):
    """The samples of all shards, in the order of the shards and of their members."""

    def __init__(
        self,
        name: str,
        shards: list[Shard],
        samples: list[tuple[int, Sample]],
        labels: list[int] | None,
        class_names: list[str],
        captions: list[tuple[str, ...]] | None,
        channels: int | None,
        max_bad_share: float,
        background: Color = WHITE,
    ):
        self._shards, self._samples = shards, samples
        place = os.path.commonprefix([shard.file for shard in shards])
        place = place[: place.rfind("/") + 1]
        files = [f"{shards[k].file[len(place) :]}/{sample.member}" for k, sample in samples]
        headers = [sample.header for _, sample in samples]
        super().__init__(name, place, files, headers, labels, class_names, captions, channels, max_bad_share, background)

    def open(self, i: int) -> BinaryIO:
        k, sample = self._samples[self.rows[i]]
        return BytesIO(self._shards[k].read(sample.offset, sample.size))

    def ends(self) -> list[str]:
        return [self._samples[row][1].ends for row in self.rows]


def is_shards(data: str) -> bool:
    """Whether a string that names no folder is meant as shards."""
    return bool(ARCHIVE.search(data))


def open_shards(
    data: str, channels: int | None, max_bad_share: float, columns: Columns, background: Color = WHITE
) -> WebShardSource:
    """The shards that a pattern names: braces ({000..127}, {a,b}) anywhere, * and ? except at http(s)://.

    A sample is what shares a member's name up to its first dot. The image is its png, jpg, jpeg, webp, …; the label its
    cls, a whole number, else `label` of its json; captions its txt, else `text` or `caption` of its json. In columns,
    image is the extension of the image where there are several, label and text are keys of the json.
    A sample whose only image is of a kind that is not read here counts as an unreadable image.
    UserError: a shard is missing, compressed, cut short or damaged; a sample has no image; or some have no label or
    caption although others do. The message names the shard and the sample.
    """
    shards = [shard for name in expand(data) for shard in find_shards(name, data)]
    if not shards:
        raise UserError(f"data '{data}': no such shard")
    samples = [(k, sample) for k, found in enumerate(_indexes(shards, columns)) for sample in found]
    if not samples:
        raise UserError(f"data '{data}': the shards have no samples")

    def where(i: int) -> str:
        k, sample = samples[i]
        return f"{shards[k].file}: sample {sample.key}"

    labels: list[str | None] = [sample.label for _, sample in samples]
    texts: list[tuple[str, ...] | None] = [sample.captions for _, sample in samples]
    names = all_or_none(labels, columns.label or "label", where)
    captions = all_or_none(texts, columns.text or "caption", where)
    for column, found in ((columns.label, names), (columns.text, captions)):
        if column and found is None:
            raise UserError(f"data '{data}': no sample has {column} in its json")
    class_names = class_names_of(names)
    return WebShardSource(
        data, shards, samples, numbered(names, class_names, data), class_names, captions, channels, max_bad_share, background
    )


def find_shards(name: str, data: str) -> list[Shard]:
    """The shards of one name without braces, which may have * and ?."""
    if "://" not in name:
        path = str(Path(name).expanduser())
        found = sorted(glob.glob(path, recursive=True)) if glob.has_magic(path) and not Path(path).is_file() else [path]
        return [Shard(file) for file in found]
    try:
        from fsspec.core import url_to_fs
    except ImportError:
        raise UserError(f"data '{data}': addresses need the fsspec library; pip install latentdiff[data]") from None
    try:
        storage, path = url_to_fs(name)
        web = name.startswith(("http://", "https://"))  # there ? begins a query, and nothing lists the files
        if web and "*" in name:
            raise UserError(f"data '{data}': * finds nothing at an http address; write the shards as {{000..127}}")
        found = sorted(storage.glob(path)) if not web and glob.has_magic(path) else [path]
    except UserError:
        raise
    except Exception as error:  # each storage has exceptions of its own, and a missing one says what to install
        raise UserError(f"data '{data}': cannot be reached ({one_line(error)})") from error
    return [Shard(file, storage) for file in found]


def _indexes(shards: list[Shard], columns: Columns) -> list[list[Sample]]:
    from concurrent.futures import ThreadPoolExecutor

    from tqdm import tqdm

    with ThreadPoolExecutor(min(16, 2 * (os.cpu_count() or 1))) as pool:
        indexes = pool.map(lambda shard: shard.index(columns), shards)
        return list(tqdm(indexes, "indexing", len(shards), leave=False, delay=2, unit="shard"))


def _local_info(file: str) -> dict[str, Any]:
    stat = os.stat(file)
    return {"size": stat.st_size, "mtime": stat.st_mtime_ns}


def _cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "latentdiff" / "shards"


def _kept(path: Path, identity: list[Any]) -> list[Sample] | None:
    """An index from the cache folder; None where there is none, or it is damaged."""
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
        return [Sample.from_json(row) for row in kept["samples"]] if kept["identity"] == identity else None
    except (OSError, ValueError, TypeError, KeyError, IndexError):
        return None


def _keep(path: Path, identity: list[Any], samples: list[Sample]) -> None:
    """Written whole or not at all; a cache folder that cannot be written to costs time at the next start and no more."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f"{path.name}.{secrets.token_hex(8)}.part")
        part.write_text(json.dumps({"identity": identity, "samples": [s.as_json() for s in samples]}), encoding="utf-8")
        part.replace(path)
    except OSError:
        pass
