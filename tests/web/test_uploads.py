"""Uploaded pictures: the one decoder, and the limits."""

import io
import struct
import zlib
from types import SimpleNamespace

import gradio as gr
import numpy as np
import pytest
from fastapi import HTTPException
from gradio.components.image_editor import EditorData
from PIL import Image

from latentdiff.errors import UserError
from latentdiff.web.jobs.uploads import read_upload
from latentdiff.web.limits import Limits
from latentdiff.web.uploads import LAYERS, PAINTINGS, undecoded, undecoded_editor

LIMITS = Limits(pixels=1000, upload=5000)


def png(size=(20, 10), color=(255, 0, 0, 128), mode="RGBA") -> bytes:
    stream = io.BytesIO()
    Image.new(mode, size, color).save(stream, "PNG")
    return stream.getvalue()


def png_that_says(width: int, height: int) -> bytes:
    """A small file whose header says another size."""
    content = bytearray(png((1, 1)))
    content[16:24] = struct.pack(">II", width, height)
    content[29:33] = struct.pack(">I", zlib.crc32(content[12:29]))
    return bytes(content)


@pytest.mark.parametrize("as_file", [True, False])
def test_a_picture_is_decoded_as_everywhere(tmp_path, as_file):
    content = png()
    file = tmp_path / "a.png"
    file.write_bytes(content)
    picture = np.asarray(read_upload(file if as_file else content, LIMITS))
    assert picture.shape == (10, 20, 3) and picture[0, 0].tolist() == [255, 127, 127]  # transparency is laid on white
    assert np.asarray(read_upload(content, LIMITS, channels=1, background=(0, 0, 0))).max() < 60


@pytest.mark.parametrize(
    ("content", "line"),
    [
        (png((50, 50)), "mask: has 2,500 pixels; at most 1,000 are allowed, the server's --max-pixels"),
        (png_that_says(20_000, 20_000), "mask: has far too many pixels; at most 1,000 are allowed, the server's --max-pixels"),
        (b"x" * 6000, "mask: has 6,000 bytes; at most 5,000 are allowed, the server's --max-upload"),
        (b"no picture", "mask: cannot be read as a picture (not a known image format)"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "mask: cannot be read as a picture (not a known image format)"),
        (png()[:60], "mask: cannot be read as a picture"),
    ],
)
def test_what_cannot_be_read_is_refused_in_one_line(tmp_path, content, line):
    file = tmp_path / "upload"
    file.write_bytes(content)
    for upload in (file, content):
        with pytest.raises(UserError) as error:
            read_upload(upload, LIMITS, "mask")
        assert str(error.value).startswith(line) and str(tmp_path) not in str(error.value)


def test_gradio_decodes_nothing(tmp_path):
    file = tmp_path / "a.png"
    file.write_bytes(b"no picture")
    with gr.Blocks():
        image = undecoded(gr.Image())
    assert image.preprocess(image.data_model(path=str(file))) == file
    with pytest.raises(UserError):
        image.preprocess(image.data_model(url="data:image/png;base64,AAAA"))


def test_a_painting_comes_in_pieces_and_is_bounded():
    with gr.Blocks():
        editor = undecoded_editor(gr.ImageEditor(), LIMITS)

    def send(key, kind, content, index="null"):
        pieces = SimpleNamespace(data={"type": kind, "index": index, "id": key}, files=[("file", content)])
        editor.accept_blobs(pieces)

    send("a", "background", b"1")
    send("a", "layer", b"2", "1")
    assert editor.preprocess(EditorData(id="a")) == {"background": b"1", "layers": [b"2"], "composite": None}
    assert editor.preprocess(EditorData(id="a")) is None  # it is kept until its event
    for key in range(PAINTINGS + 1):
        send(key, "background", b"3")
    assert editor.preprocess(EditorData(id="0")) is None and editor.preprocess(EditorData(id="1")) is not None
    for index, content in ((str(LAYERS), b"4"), ("-1", b"4"), ("0", b"4" * 5001)):
        with pytest.raises(HTTPException):
            send("b", "layer", content, index)
    with pytest.raises(HTTPException):
        send("b", "layer", b"4", "x")
