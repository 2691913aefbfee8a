"""Single files: is it a whole image, its pixels, its hash; and the idx format of MNIST and its kin."""

import gzip
import hashlib
import os
import struct
import zlib
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from latentdiff.errors import UserError

GREY_MODES = {"1", "L", "LA", "La", "I", "I;16", "I;16L", "I;16B", "I;16N"}
# What Pillow's decoders raise on damaged files
DECODING_ERRORS = (OSError, EOFError, SyntaxError, ValueError, struct.error, zlib.error, Image.DecompressionBombError)
_QUARTER_TURNS = (5, 6, 7, 8)  # EXIF orientations that swap height and width


def inspect(path: Path) -> tuple[str, tuple[int, int]] | str:
    """(mode, (height, width)) of a readable image file, or the reason why it is not one.

    As cheap as finding truncated files allows: PNG checksums are verified, a JPEG is decoded only if its end marker is
    missing, other formats are decoded.
    """
    try:
        with Image.open(path) as image:
            mode, (width, height), kind = image.mode, image.size, image.format
            rotated = kind != "PNG" and image.getexif().get(0x0112, 1) in _QUARTER_TURNS
            if kind == "PNG":
                image.verify()
            elif kind != "JPEG" or not _has_jpeg_end(path):
                image.load()
        return mode, ((width, height) if rotated else (height, width))
    except FileNotFoundError:
        return "no such file"
    except DECODING_ERRORS as error:
        return "not a known image format" if "cannot identify" in str(error) else one_line(error)


def one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _has_jpeg_end(path: Path) -> bool:
    with open(path, "rb") as stream:
        stream.seek(-2, os.SEEK_END)
        return stream.read() == b"\xff\xd9"


def decode(path: Path, channels: int) -> np.ndarray:
    """uint8 [H, W, channels]. 16-bit greys are scaled to 8 bits (PIL's own conversion would clip them)."""
    with Image.open(path) as opened:
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


def hash_ends(path: Path, span: int = 32768) -> str:
    with open(path, "rb") as stream:
        length = stream.seek(0, os.SEEK_END)
        stream.seek(0)
        digest = hashlib.sha256(f"{length}:".encode() + stream.read(span))
        stream.seek(max(span, length - span))
        digest.update(stream.read(span))
    return digest.hexdigest()


def read_idx(path: Path, dims: int) -> np.ndarray:
    """uint8 array of an idx file: bytes 0, 0, 8 (unsigned byte), dims, big-endian 32-bit sizes, then the values."""
    try:
        raw = gzip.open(path).read() if path.suffix == ".gz" else path.read_bytes()
        shape = tuple(np.frombuffer(raw, ">u4", dims, 4).tolist())
        if raw[:4] != bytes([0, 0, 8, dims]) or len(raw) != 4 + 4 * dims + int(np.prod(shape)):
            raise ValueError("wrong header or length")
        return np.frombuffer(raw, np.uint8, offset=4 + 4 * dims).reshape(shape)
    except (OSError, EOFError, ValueError) as error:
        raise UserError(f"{path}: not a whole idx file of {dims} dimensions ({error})") from error
