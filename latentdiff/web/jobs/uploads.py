"""Reading the pictures that visitors upload, by the project's own decoder."""

from __future__ import annotations

import io
from pathlib import Path

from PIL import Image

from latentdiff.data.image_files import DECODING_ERRORS, Color, decode, open_image, reason_of
from latentdiff.errors import UserError
from latentdiff.web.limits import Limits

Upload = Path | bytes  # the file of an upload, in gradio's folder of uploads, or its content


def read_upload(
    file: Upload, limits: Limits, what: str = "picture", channels: int = 3, background: Color = (255, 255, 255)
) -> Image.Image:
    """An uploaded picture, decoded as `latentdiff.data.image_files.decode` does it.

    Args:
        file: from `uploads.undecoded` or `uploads.undecoded_editor`.
        limits: of the server.
        what: the name of the field, for messages.
        channels: 1 for grey, 3 for colour.
        background: what transparent places become.

    Raises:
        UserError: it is too large, or cannot be read. Its file is not named, for that is the server's.
    """
    try:
        size = len(file) if isinstance(file, bytes) else file.stat().st_size
        if size > limits.upload:
            raise UserError(f"{what}: has {size:,} bytes; at most {limits.upload:,} are allowed, the server's --max-upload")
        with io.BytesIO(file) if isinstance(file, bytes) else file.open("rb") as stream:
            with open_image(stream) as image:  # reads the size, and no pixels
                width, height = image.size
            if width * height > limits.pixels:
                raise UserError(
                    f"{what}: has {width * height:,} pixels; at most {limits.pixels:,} are allowed, the server's --max-pixels"
                )
            pixels = decode(stream, channels, background)
    except UserError:
        raise
    except Image.DecompressionBombError:  # Pillow's own limit comes before ours
        allowed = f"at most {limits.pixels:,} are allowed, the server's --max-pixels"
        raise UserError(f"{what}: has far too many pixels; {allowed}") from None
    except DECODING_ERRORS as error:
        reason = reason_of(io.BytesIO() if isinstance(file, bytes) else file, error)
        raise UserError(f"{what}: cannot be read as a picture ({reason})") from None
    return Image.fromarray(pixels[..., 0] if channels == 1 else pixels)
