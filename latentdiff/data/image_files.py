"""Single image files: whether a file is a whole image, its pixels, its hash. Also the idx format of MNIST.

A file is a path, or an open binary stream that can seek, because an image may lie inside a table or an archive. `decode`
is the one decoder of every command. What it does with transparency, orientation and bit depth is stated there.
"""

import functools
import gzip
import hashlib
import io
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
Color = tuple[int, int, int]  # red, green and blue, 0 to 255
Header = tuple[str, tuple[int, int]] | str  # (Pillow's mode, (height, width)), or the reason why it is no image

GREY_MODES = {"1", "L", "LA", "La", "I", "I;16", "I;16L", "I;16B", "I;16N"}
# What Pillow's decoders raise on damaged files
DECODING_ERRORS = (
    OSError,
    EOFError,
    SyntaxError,
    ValueError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
    Image.DecompressionBombWarning,
    LookupError,
    TypeError,
    AttributeError,
    ArithmeticError,
    RuntimeError,
    MemoryError,
)
_QUARTER_TURNS = (5, 6, 7, 8)  # EXIF orientations that swap height and width
WHITE: Color = (255, 255, 255)
# Formats that Pillow knows and that are never opened: EPS starts Ghostscript, WMF works on Windows only, PSD is the working
# file of an editor, IPTC is a part of another file, and for the others (films, measurements) Pillow has no decoder
NEVER_OPENED = {"EPS", "WMF", "PSD", "IPTC", "MPEG", "BUFR", "GRIB", "HDF5"}
ANIMATIONS = {"GIF", "PNG", "WEBP", "AVIF", "TIFF"}  # a second frame of others, such as MPO, is a preview
_DRAWING = "a drawing without pixels: export it as .png"
_EDITOR = "the working file of an editor: export it as .png"
_RAW = "a camera's raw data: develop it to .png or .jpg"
_ARCHIVE = "an archive: unpack it"
_FILM = "a film: take still pictures out of it"
ADVICE = {  # suffixes that are not read: what such a file is, and what to do
    **dict.fromkeys((".heic", ".heif", ".hif"), "install pillow-heif to read it"),
    **dict.fromkeys((".avif", ".avifs"), "needs Pillow 11.3 or later"),
    **dict.fromkeys((".svg", ".svgz", ".pdf", ".eps", ".ps", ".ai", ".wmf", ".emf"), _DRAWING),
    **dict.fromkeys((".psd", ".psb", ".xcf", ".kra"), _EDITOR),
    **dict.fromkeys((".cr2", ".cr3", ".nef", ".arw", ".dng", ".orf", ".raf", ".rw2"), _RAW),
    **dict.fromkeys((".zip", ".tar", ".gz", ".tgz", ".7z", ".rar"), _ARCHIVE),
    **dict.fromkeys((".mp4", ".mov", ".avi", ".mkv", ".webm", ".mpg", ".mpeg"), _FILM),
}


@functools.cache
def readable_formats() -> tuple[str, ...]:
    """Pillow's names of the formats that are opened: all that it can decode here, except NEVER_OPENED."""
    Image.init()
    try:
        import pillow_heif

        pillow_heif.register_heif_opener()
    except ImportError:
        pass  # such files are then named, with what to install
    return tuple(sorted(set(Image.OPEN) - NEVER_OPENED))


@functools.cache
def image_suffixes() -> frozenset[str]:
    """Suffixes of image files, in lower case with their dot: those that Pillow registers for `readable_formats`."""
    formats = {*readable_formats(), "MPO"}  # which Pillow opens as JPEG
    return frozenset(suffix for suffix, kind in Image.registered_extensions().items() if kind in formats)


def why_not_read(suffix: str) -> str:
    """The reason why files of a suffix are left out of a data set, with advice where there is some."""
    if not suffix:
        return "no suffix, so not looked at"
    advice = ADVICE.get(suffix)
    return f"suffix {suffix} is not read" + (f" ({advice})" if advice else "")


def inspect(file: File) -> Header:
    """(mode, (height, width)) of a readable image file, or the reason why it is not one.

    Truncated files are found, at the least cost: the checksums of a PNG are verified, a JPEG is decoded only if its end
    marker is missing, and other formats are decoded.
    """
    return examine(file)[0]


def examine(file: File) -> tuple[Header, bool]:
    """What `inspect` returns, and whether the file has several frames or pages, of which only the first is read."""
    try:
        with _opened(file) as stream:
            if not stream.read(1):
                return "an empty file (0 bytes)", False
            stream.seek(0)
            with open_image(stream) as image:
                refuse_bomb(image)
                mode, (width, height), kind = image.mode, image.size, image.format
                rotated = kind != "PNG" and image.getexif().get(0x0112, 1) in _QUARTER_TURNS
                several = kind == "PNG" and _has_frames(image)
                if kind == "PNG":
                    image.verify()
                elif kind != "JPEG" or not _has_jpeg_end(stream):
                    image.load()
                    several = kind in ANIMATIONS and _has_frames(image)
            return (mode, ((width, height) if rotated else (height, width))), several
    except DECODING_ERRORS as error:
        return reason_of(file, error), False


def open_image(stream: BinaryIO) -> Image.Image:
    """Pillow's image of a stream, in one of `readable_formats`. So no file starts another program."""
    return Image.open(stream, formats=readable_formats())


def _has_frames(image: Image.Image) -> bool:
    try:
        return bool(getattr(image, "is_animated", False))
    except DECODING_ERRORS:  # the first frame can be read although the second is damaged
        return False


def reason_of(file: File, error: BaseException) -> str:
    """Why decoding failed, in one line: Pillow's own message for an unknown format names a Python object."""
    if isinstance(error, FileNotFoundError):
        return "no such file"
    if "cannot identify" not in str(error):
        return one_line(error)
    advice = ADVICE.get(file.suffix.lower()) if isinstance(file, Path) else None
    return "not a known image format" + (f" ({advice})" if advice else "")


def refuse_bomb(image: Image.Image) -> None:
    """DecompressionBombError for more pixels than Pillow's limit. Pillow itself only warns, up to twice the limit."""
    limit = Image.MAX_IMAGE_PIXELS
    if limit is not None and image.width * image.height > limit:
        raise Image.DecompressionBombError(f"{image.width}x{image.height} pixels are more than Pillow's limit of {limit}")


def leaves(root: Path, name: str) -> bool:
    """Whether a file's name, relative to root, leads out of root (it is absolute or has ".."), or is no name (it has a NUL).

    Links are allowed: a folder's owner made them, and the Hub's own downloads consist of them.
    """
    try:
        os.path.realpath(root / name)
    except ValueError:  # a NUL, or half a character
        return True
    return Path(name).is_absolute() or ".." in Path(name).parts


def one_line(error: BaseException) -> str:
    """An error's message without line breaks, or the name of its type where it has no message."""
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
    """Leaves the stream where it was, because a decoder reads on from there."""
    place = stream.tell()
    stream.seek(-2, os.SEEK_END)
    end = stream.read()
    stream.seek(place)
    return end == b"\xff\xd9"


def decode(file: File, channels: int, background: Color = WHITE) -> np.ndarray:
    """uint8 [H, W, channels] of an image file; channels is 1 or 3.

    The orientation in EXIF is applied. Transparency is laid on the background. 16-bit greys are scaled to 8 bits (Pillow's
    own conversion would clip them). CMYK and palettes become RGB. Of several frames or pages the first is read. Raises one
    of DECODING_ERRORS for a file that cannot be decoded or has more pixels than Pillow's limit.
    """
    with _opened(file) as stream, open_image(stream) as opened:
        refuse_bomb(opened)
        # A PNG may carry its orientation after the pixels, where `inspect` could not see it without decoding
        image = opened if opened.format == "PNG" else ImageOps.exif_transpose(opened)
        if image.mode == "F":
            raise ValueError("floating-point pixels have no known range")
        if image.mode.startswith("I"):
            image = Image.fromarray(np.round(np.clip(np.asarray(image, dtype=np.float64), 0, 65535) / 257).astype(np.uint8))
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, (*background, 255)), image)
        pixels = np.array(image.convert("L" if channels == 1 else "RGB"))
    return pixels[..., None] if channels == 1 else pixels  # [H, W, C]


def hash_ends(file: File, span: int = 32768) -> str:
    """Hex sha256 of a file's length and of its first and last `span` bytes."""
    with _opened(file) as stream:
        length = stream.seek(0, os.SEEK_END)
        stream.seek(0)
        digest = hashlib.sha256(f"{length}:".encode() + stream.read(span))
        stream.seek(max(span, length - span))
        digest.update(stream.read(span))
    return digest.hexdigest()


def read_idx(path: Path, dims: int) -> np.ndarray:
    """The uint8 array of an idx file, which may be gzipped (.gz). UserError for a file that is not one, or not whole.

    Its format: the bytes 0, 0, 8 (unsigned byte) and dims; big-endian 32-bit sizes; then the values.
    """
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


def _read_exactly(stream: gzip.GzipFile | io.BufferedReader, count: int, piece: int = 1 << 24) -> bytearray:
    """The next `count` bytes, which must be the last. Memory is used for what is there, not for what the header claims."""
    raw = bytearray()
    while len(raw) <= count and (part := stream.read(min(piece, count + 1 - len(raw)))):
        raw += part
    if len(raw) != count:
        raise ValueError("wrong length")
    return raw
