"""Single files: is it a whole image, its pixels, its hash; and the idx format of MNIST and its kin.

A file is a path, or an open binary stream that can seek: an image may lie inside a table or an archive.
"""

import gzip
import hashlib
import math
import os
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageOps

from latentdiff.errors import UserError

File = Path | BinaryIO
Header = tuple[str, tuple[int, int]] | str  # (mode, (height, width)), or the reason why it is no image

GREY_MODES = {"1", "L", "LA", "La", "I", "I;16", "I;16L", "I;16B", "I;16N"}
# What Pillow's decoders raise on damaged files
DECODING_ERRORS = (
    OSError, EOFError, SyntaxError, ValueError, struct.error, zlib.error, Image.DecompressionBombError,
    Image.DecompressionBombWarning, LookupError, TypeError, AttributeError, ArithmeticError, RuntimeError, MemoryError,
)  # fmt: skip
_QUARTER_TURNS = (5, 6, 7, 8)  # EXIF orientations that swap height and width


def inspect(file: File) -> Header:
    """(mode, (height, width)) of a readable image file, or the reason why it is not one.

    As cheap as finding truncated files allows: PNG checksums are verified, a JPEG is decoded only if its end marker is
    missing, other formats are decoded.
    """
    try:
        with _opened(file) as stream, Image.open(stream) as image:
            refuse_bomb(image)
            mode, (width, height), kind = image.mode, image.size, image.format
            rotated = kind != "PNG" and image.getexif().get(0x0112, 1) in _QUARTER_TURNS
            if kind == "PNG":
                image.verify()
            elif kind != "JPEG" or not _has_jpeg_end(stream):
                image.load()
        return mode, ((width, height) if rotated else (height, width))
    except FileNotFoundError:
        return "no such file"
    except DECODING_ERRORS as error:
        return "not a known image format" if "cannot identify" in str(error) else one_line(error)


def refuse_bomb(image: Image.Image) -> None:
    """DecompressionBombError for more pixels than Pillow's limit, where Pillow itself warns up to twice as many."""
    limit = Image.MAX_IMAGE_PIXELS
    if limit is not None and image.width * image.height > limit:
        raise Image.DecompressionBombError(f"{image.width}x{image.height} pixels are more than Pillow's limit of {limit}")


def leaves(root: Path, name: str) -> bool:
    """Whether a file's name, given below root, leads out of it or is none: absolute, by "..", or with a NUL.

    Links are followed: a folder's owner made them, and the Hub's own downloads consist of them.
    """
    try:
        os.path.realpath(root / name)
    except ValueError:  # no file's name: a NUL, half a character
        return True
    return Path(name).is_absolute() or ".." in Path(name).parts


def one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


@contextmanager
def _opened(file: File) -> Iterator[BinaryIO]:
    """The file at its start; closed afterwards where it was a path."""
    if isinstance(file, Path):
        with open(file, "rb") as stream:
            yield stream
    else:
        file.seek(0)
        yield file


def _has_jpeg_end(stream: BinaryIO) -> bool:
    """Leaves the stream where it was: a decoder may stand there."""
    place = stream.tell()
    stream.seek(-2, os.SEEK_END)
    end = stream.read()
    stream.seek(place)
    return end == b"\xff\xd9"


def decode(file: File, channels: int) -> np.ndarray:
    """uint8 [H, W, channels]. 16-bit greys are scaled to 8 bits (PIL's own conversion would clip them)."""
    with _opened(file) as stream, Image.open(stream) as opened:
        refuse_bomb(opened)
        # A PNG may carry its orientation after the pixels, where `inspect` could not see it without decoding
        image = opened if opened.format == "PNG" else ImageOps.exif_transpose(opened)
        if image.mode == "F":
            raise ValueError("floating-point pixels have no known range")
        if image.mode.startswith("I"):
            image = Image.fromarray(np.round(np.clip(np.asarray(image, dtype=np.float64), 0, 65535) / 257).astype(np.uint8))
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        pixels = np.array(image.convert("L" if channels == 1 else "RGB"))
    return pixels[..., None] if channels == 1 else pixels  # [H, W, C]


def hash_ends(file: File, span: int = 32768) -> str:
    """Hex sha256 of the length, and of the first and last `span` bytes."""
    with _opened(file) as stream:
        length = stream.seek(0, os.SEEK_END)
        stream.seek(0)
        digest = hashlib.sha256(f"{length}:".encode() + stream.read(span))
        stream.seek(max(span, length - span))
        digest.update(stream.read(span))
    return digest.hexdigest()


def read_idx(path: Path, dims: int) -> np.ndarray:
    """uint8 array of an idx file: bytes 0, 0, 8 (unsigned byte), dims, big-endian 32-bit sizes, then the values."""
    try:
        with gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as stream:
            header = stream.read(4 + 4 * dims)
            if header[:4] != bytes([0, 0, 8, dims]) or len(header) != 4 + 4 * dims:
                raise ValueError("wrong header")
            shape = struct.unpack(f">{dims}I", header[4:])
            raw = _read_exactly(stream, math.prod(shape))
        return np.frombuffer(raw, np.uint8).reshape(shape)
    except (OSError, EOFError, ValueError, zlib.error, MemoryError) as error:
        raise UserError(f"{path}: not a whole idx file of {dims} dimensions ({one_line(error)})") from error


def _read_exactly(stream: BinaryIO, count: int, piece: int = 1 << 24) -> bytearray:
    """The next `count` bytes, which must be the last; takes memory for what is there, not for what is claimed."""
    raw = bytearray()
    while len(raw) <= count and (part := stream.read(min(piece, count + 1 - len(raw)))):
        raw += part
    if len(raw) != count:
        raise ValueError("wrong length")
    return raw
