"""What lies where in one WebDataset shard, found by reading it once from its start to its end."""

from __future__ import annotations

import json
import re
import tarfile
from dataclasses import asdict, dataclass, field
from io import BytesIO
from typing import Any, BinaryIO

from latentdiff.data.image_files import ADVICE, Header, hash_ends, image_suffixes, inspect, one_line, why_not_read
from latentdiff.data.image_source import TEXT_COLUMNS, Columns, captions_of
from latentdiff.errors import UserError

FORMAT = 2  # of the index as it is kept on disk; 1 knew fewer suffixes
BLOCK = tarfile.BLOCKSIZE
COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
MEMBER = re.compile(r"((?:.*/)?[^./][^./]*)\.([^/]+)")  # WebDataset: the key is all up to the first dot of the last part
SIDES = ("cls", "txt", "json")


@dataclass(frozen=True)
class Sample:
    """One image in a shard: size bytes from offset on; what `inspect` and `hash_ends` say of it; label and captions."""

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

    def as_json(self) -> list[Any]:
        return list(asdict(self).values())

    @classmethod
    def from_json(cls, row: list[Any]) -> Sample:
        key, extension, offset, size, header, ends, label, captions = row
        header = header if isinstance(header, str) else (header[0], (header[1][0], header[1][1]))
        return cls(key, extension, offset, size, header, ends, label, None if captions is None else tuple(captions))


@dataclass
class _Parts:
    """Of one sample: (offset, size, header, ends) of each image by its extension, and the bytes of its other members.

    unread: extensions of members that are images, or the like, of a kind that is not read.
    """

    images: dict[str, tuple[int, int, Header, str]] = field(default_factory=dict)
    sides: dict[str, bytes] = field(default_factory=dict)
    unread: list[str] = field(default_factory=list)


def index_shard(stream: BinaryIO, length: int, shard: str, columns: Columns) -> list[Sample]:
    """The samples of one shard in the order in which their first members come.

    stream: the archive, `length` bytes long; shard: its name in messages. Members are read as bytes and nothing is
    unpacked; links, and what belongs to no sample, are passed over. An image that cannot be decoded is kept, with the
    reason as its header.
    """
    found = _parts(stream, length, shard)
    return [_sample(key, parts, f"{shard}: sample {key}", columns) for key, parts in found.items()]


def _parts(stream: BinaryIO, length: int, shard: str) -> dict[str, _Parts]:
    head = stream.read(8)
    for magic, kind in COMPRESSED.items():
        if head.startswith(magic):
            raise UserError(f"{shard}: is compressed ({kind}); images in it could not be read alone: unpack it to a plain .tar")
    stream.seek(0)
    found: dict[str, _Parts] = {}
    try:
        with tarfile.open(fileobj=stream, mode="r:") as archive:
            for member in archive:
                name = MEMBER.fullmatch(member.name.removeprefix("./"))
                if member.isreg() and name and (name[2] in SIDES or _suffix(name[2]) in image_suffixes()):
                    _take(found.setdefault(name[1], _Parts()), name[2], stream, member, shard)
                elif member.isreg() and name and _suffix(name[2]) in ADVICE:
                    found.setdefault(name[1], _Parts()).unread.append(name[2])
            end = archive.offset
    except tarfile.TarError as error:
        raise UserError(f"{shard}: cut short, or not a tar archive ({one_line(error)})") from error
    # tarfile takes the end of the file, or a header it cannot read, for the end of the archive
    stream.seek(min(end, length))
    last = stream.read(BLOCK)
    if len(last) < BLOCK:
        raise UserError(f"{shard}: cut short, it ends without an archive's end mark")
    if any(last):
        raise UserError(f"{shard}: damaged, no member begins at byte {end} where one should")
    return found


def _suffix(extension: str) -> str:
    return "." + extension.lower().rpartition(".")[2]


def _take(parts: _Parts, extension: str, stream: BinaryIO, member: tarfile.TarInfo, shard: str) -> None:
    if member.issparse():
        raise UserError(f"{shard}: member {member.name} is a sparse file; write it in full")
    if extension in parts.images or extension in parts.sides:
        raise UserError(f"{shard}: member {member.name} is there twice")
    stream.seek(member.offset_data)
    content = stream.read(member.size)
    if len(content) < member.size:
        raise UserError(f"{shard}: cut short, member {member.name} is not whole")
    if extension in SIDES:
        parts.sides[extension] = content
    else:
        file = BytesIO(content)
        parts.images[extension] = (member.offset_data, member.size, inspect(file), hash_ends(file))


def _sample(key: str, parts: _Parts, where: str, columns: Columns) -> Sample:
    row = _json(parts.sides.get("json"), where)
    label = _label(parts.sides, row, columns.label, where)
    captions = _captions(parts.sides, row, columns.text, where)
    if parts.unread and not parts.images:
        return Sample(key, parts.unread[0], 0, 0, why_not_read(_suffix(parts.unread[0])), "", label, captions)
    extension = columns.image
    if extension is None and len(parts.images) > 1:
        raise UserError(f"{where} has several images ({', '.join(parts.images)}): name one of these as image_column")
    if extension is None:
        extension = next(iter(parts.images), None)
    if extension not in parts.images:
        wanted = f"{extension}, its images are {', '.join(parts.images)}" if parts.images and extension else "image"
        raise UserError(f"{where} has no {wanted}")
    offset, size, header, ends = parts.images[extension]
    return Sample(key, extension, offset, size, header, ends, label, captions)


def _json(content: bytes | None, where: str) -> dict[str, Any]:
    if content is None:
        return {}
    try:
        row = json.loads(content)
    except ValueError as error:
        raise UserError(f"{where}: its json cannot be read ({one_line(error)})") from error
    if not isinstance(row, dict):
        raise UserError(f"{where}: its json must be an object with named fields")
    return row


def _label(sides: dict[str, bytes], row: dict[str, Any], column: str | None, where: str) -> str | None:
    if column is None and "cls" in sides:
        text = sides["cls"].decode("ascii", "replace").strip()
        if not text.isdecimal():
            raise UserError(f"{where}: its cls must be a whole number, not {text[:40]!r}")
        return str(int(text))
    value = row.get(column or "label")
    if value is None or value == "":
        return None
    if not isinstance(value, (str, int)):
        raise UserError(f"{where}: {column or 'label'} in its json must be a whole number or a string, not {value!r}")
    return str(value)


def _captions(sides: dict[str, bytes], row: dict[str, Any], column: str | None, where: str) -> tuple[str, ...] | None:
    if column is None and "txt" in sides:
        try:
            return captions_of(sides["txt"].decode("utf-8").strip(), where)
        except UnicodeDecodeError as error:
            raise UserError(f"{where}: its txt is not UTF-8 text ({one_line(error)})") from error
    found = [row[name] for name in ([column] if column else TEXT_COLUMNS) if row.get(name) not in (None, "", [])]
    return captions_of(found[0], where) if found else None
