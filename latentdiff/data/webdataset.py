"""WebDataset shards: plain tar archives whose images are read where they lie (see `latentdiff.data.range_files`).

The webdataset library itself reads a shard from its start to its end, or copies it to the disk first. It is not used:
here any image can be asked for by its number, and nothing is copied or unpacked.
"""

from __future__ import annotations

import json
import os
import re
import tarfile
from dataclasses import dataclass, field
from io import BytesIO
from typing import Any, BinaryIO

from latentdiff.data.image_files import ADVICE, Header, hash_ends, image_suffixes, inspect, one_line, why_not_read
from latentdiff.data.image_source import (
    TEXT_COLUMNS,
    Annotations,
    Columns,
    EncodedImages,
    Reading,
    all_or_none,
    captions_of,
    class_names_of,
    numbered,
)
from latentdiff.data.range_files import ImageRecord, RangeFile, expand, find_files, indexes
from latentdiff.errors import UserError

ARCHIVE = re.compile(r"\.(tar|tgz)(?![A-Za-z0-9])")
FORMAT = 2  # of the index as it is kept on disk; 1 knew fewer suffixes
COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
MEMBER = re.compile(r"((?:.*/)?[^./][^./]*)\.([^/]+)")  # the key is all up to the first dot of the last part
TEXTS = ("cls", "txt", "json")  # extensions of members that describe an image


class WebDatasetSource(EncodedImages):
    """The images of all shards, in the order of the shards and of their members."""

    def __init__(
        self,
        name: str,
        images: list[tuple[RangeFile, ImageRecord]],
        annotations: Annotations,
        reading: Reading,
    ):
        self._images = images
        place = os.path.commonprefix([shard.name for shard, _ in images])
        place = place[: place.rfind("/") + 1]
        files = [f"{shard.name[len(place) :]}/{record.member}" for shard, record in images]
        super().__init__(name, place, files, [record.header for _, record in images], annotations, reading)

    def open(self, i: int) -> BinaryIO:
        shard, record = self._images[self.rows[i]]
        return BytesIO(shard.read(record.offset, record.size))

    def ends(self, limit: int | None = None) -> list[str]:
        return [self._images[row][1].ends for row in self.rows[:limit]]


def is_shards(data: str) -> bool:
    """Whether a string that names no folder is meant as shards."""
    return bool(ARCHIVE.search(data))


def open_shards(data: str, columns: Columns, reading: Reading) -> WebDatasetSource:
    """The shards that a pattern names: braces ({000..127}, {a,b}) anywhere, * and ? except at http(s)://.

    A sample is what shares a member's name up to its first dot. The image is its png, jpg, jpeg, webp, …; the label its
    cls, a whole number, else `label` of its json; captions its txt, else `text` or `caption` of its json. In columns,
    image is the extension of the image where there are several, label and text are keys of the json.
    A sample whose only image is of a kind that is not read here counts as an unreadable image.
    UserError: a shard is missing, compressed, cut short or damaged; a sample has no image; or some have no label or
    caption although others do. The message names the shard and the sample.
    """
    shards = [shard for name in expand(data) for shard in find_files(name, data)]
    if not shards:
        raise UserError(f"data '{data}': no such shard")
    records = indexes(shards, [FORMAT, columns.image, columns.label, columns.text], lambda shard: _look(shard, columns))
    images = [(shard, record) for shard, group in zip(shards, records, strict=True) for record in group]
    if not images:
        raise UserError(f"data '{data}': the shards have no samples")

    def where(i: int) -> str:
        return f"{images[i][0].name}: sample {images[i][1].key}"

    names = all_or_none([record.label for _, record in images], columns.label or "label", where)
    captions = all_or_none([record.captions for _, record in images], columns.text or "caption", where)
    for column, values in ((columns.label, names), (columns.text, captions)):
        if column and values is None:
            raise UserError(f"data '{data}': no sample has {column} in its json")
    class_names = class_names_of(names)
    return WebDatasetSource(data, images, Annotations(numbered(names, class_names, data), class_names, captions), reading)


def _look(shard: RangeFile, columns: Columns) -> list[ImageRecord]:
    shard.require_ranges(", so no image can be read alone")
    try:
        with shard.stream() as stream:
            return index_shard(stream, shard.size, shard.name, columns)
    except UserError:
        raise
    except Exception as error:  # each storage has exceptions of its own
        raise UserError(f"{shard.name}: cannot be read ({one_line(error)})") from error


@dataclass
class _Members:
    """The members of one sample, by their extensions.

    images: (offset, size, header, ends) of each. texts: contents. unread: extensions of images of kinds that are not read.
    """

    images: dict[str, tuple[int, int, Header, str]] = field(default_factory=dict)
    texts: dict[str, bytes] = field(default_factory=dict)
    unread: list[str] = field(default_factory=list)


def index_shard(stream: BinaryIO, length: int, shard: str, columns: Columns) -> list[ImageRecord]:
    """A record of each sample of one shard, in the order in which their first members come.

    stream: the archive, `length` bytes long. shard: its name in messages. Members are read as bytes and nothing is
    unpacked. Links, and what belongs to no sample, are passed over. An image that cannot be decoded is kept, with the
    reason as its header.
    """
    start = stream.read(8)
    for magic, kind in COMPRESSED.items():
        if start.startswith(magic):
            raise UserError(f"{shard}: is compressed ({kind}); images in it could not be read alone: unpack it to a plain .tar")
    stream.seek(0)
    samples: dict[str, _Members] = {}
    try:
        with tarfile.open(fileobj=stream, mode="r:") as archive:
            for member in archive:
                name = MEMBER.fullmatch(member.name.removeprefix("./"))
                if not (name and member.isreg()):
                    continue
                key, extension = name.groups()
                if extension in TEXTS or _suffix(extension) in image_suffixes():
                    _add(samples.setdefault(key, _Members()), extension, stream, member, shard)
                elif _suffix(extension) in ADVICE:
                    samples.setdefault(key, _Members()).unread.append(extension)
            end = archive.offset
    except tarfile.TarError as error:
        raise UserError(f"{shard}: cut short, or not a tar archive ({one_line(error)})") from error
    # tarfile takes the end of the file, or a header that it cannot read, for the end of the archive
    stream.seek(min(end, length))
    last = stream.read(tarfile.BLOCKSIZE)
    if len(last) < tarfile.BLOCKSIZE:
        raise UserError(f"{shard}: cut short, it ends without an archive's end mark")
    if any(last):
        raise UserError(f"{shard}: damaged, no member begins at byte {end} where one should")
    return [_record(key, members, f"{shard}: sample {key}", columns) for key, members in samples.items()]


def _suffix(extension: str) -> str:
    return "." + extension.lower().rpartition(".")[2]


def _add(sample: _Members, extension: str, stream: BinaryIO, member: tarfile.TarInfo, shard: str) -> None:
    if member.issparse():
        raise UserError(f"{shard}: member {member.name} is a sparse file; write it in full")
    if extension in sample.images or extension in sample.texts:
        raise UserError(f"{shard}: member {member.name} is there twice")
    stream.seek(member.offset_data)
    content = stream.read(member.size)
    if len(content) < member.size:
        raise UserError(f"{shard}: cut short, member {member.name} is not whole")
    if extension in TEXTS:
        sample.texts[extension] = content
    else:
        file = BytesIO(content)
        sample.images[extension] = (member.offset_data, member.size, inspect(file), hash_ends(file))


def _record(key: str, members: _Members, where: str, columns: Columns) -> ImageRecord:
    row = _json(members.texts.get("json"), where)
    label = _label(members.texts, row, columns.label, where)
    captions = _captions(members.texts, row, columns.text, where)
    images = members.images
    if members.unread and not images:
        extension = members.unread[0]
        return ImageRecord(key, extension, 0, 0, why_not_read(_suffix(extension)), "", label, captions)
    if columns.image is None and len(images) > 1:
        raise UserError(f"{where} has several images ({', '.join(images)}): name one of these as image_column")
    if not images or columns.image not in (None, *images):
        missing = f"{columns.image}, its images are {', '.join(images)}" if columns.image and images else "image"
        raise UserError(f"{where} has no {missing}")
    extension = columns.image or next(iter(images))
    return ImageRecord(key, extension, *images[extension], label, captions)


def _json(content: bytes | None, where: str) -> dict[str, Any]:
    if content is None:
        return {}
    try:
        row = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: its json cannot be read ({one_line(error)})") from error
    if not isinstance(row, dict):
        raise UserError(f"{where}: its json must be an object with named fields")
    return row


def _label(texts: dict[str, bytes], row: dict[str, Any], column: str | None, where: str) -> str | None:
    if column is None and "cls" in texts:
        text = texts["cls"].decode("ascii", "replace").strip()
        if not text.isdecimal():
            raise UserError(f"{where}: its cls must be a whole number, not {text[:40]!r}")
        return str(int(text))
    value = row.get(column or "label")
    if value is None or value == "":
        return None
    if not isinstance(value, (str, int)):
        raise UserError(f"{where}: {column or 'label'} in its json must be a whole number or a string, not {value!r}")
    return str(value)


def _captions(texts: dict[str, bytes], row: dict[str, Any], column: str | None, where: str) -> tuple[str, ...] | None:
    if column is None and "txt" in texts:
        try:
            return captions_of(texts["txt"].decode("utf-8").strip(), where)
        except UnicodeDecodeError as error:
            raise UserError(f"{where}: its txt is not UTF-8 text ({one_line(error)})") from error
    values = [row[name] for name in ([column] if column else TEXT_COLUMNS) if row.get(name) not in (None, "", [])]
    return captions_of(values[0], where) if values else None
