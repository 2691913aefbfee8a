"""Labels of grids in any script: drawn where a font has the characters, written readably where none has."""

import numpy as np
import pytest
from PIL import ImageFont

from latentdiff.utils import fonts
from latentdiff.utils.images import captioned_grid, labelled_grid

NAMES = ["Äpfel", "яблоко", "日本"]


@pytest.fixture
def no_fonts(monkeypatch):
    monkeypatch.setattr(fonts, "FOLDERS", ())
    fonts._font_for.cache_clear()
    yield
    fonts._font_for.cache_clear()


def test_ascii_is_drawn_by_the_font_that_comes_with_pillow():
    font, text = fonts.labelled_font("Ankle boot", 14)
    assert text == "Ankle boot" and font.getname() == ImageFont.load_default(size=14).getname()


def test_an_installed_font_draws_what_pillows_own_lacks():
    if not any(path.name == "DejaVuSans.ttf" for path in fonts._installed()):
        pytest.skip("needs the font DejaVu Sans (Debian: fonts-dejavu-core)")
    for name in NAMES[:2]:
        font, text = fonts.labelled_font(name, 14)
        assert text == name and font.getname()[0] == "DejaVu Sans"
        assert fonts._lacking(text, font) == []


def test_without_a_font_every_label_is_readable_still(no_fonts):
    assert [fonts.labelled_font(name, 14)[1] for name in NAMES] == [
        "Apfel",
        "U+044F U+0431 U+043B U+043E U+043A U+043E ",
        "U+65E5 U+672C ",
    ]


def test_grids_draw_what_is_readable(no_fonts):
    tile = np.zeros((40, 40, 3), np.uint8)
    readable = [fonts.labelled_font(name, 14)[1] for name in NAMES]
    rows = [[tile]] * 3
    assert labelled_grid(rows, NAMES).tobytes() == labelled_grid(rows, readable).tobytes()
    captions, same = [[name] for name in NAMES], [[name] for name in readable]
    assert captioned_grid(rows, captions, NAMES).tobytes() == captioned_grid(rows, same, readable).tobytes()
