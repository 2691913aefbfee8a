"""Fonts for the labels of grids: one that has a label's characters, where the machine has such a font."""

from __future__ import annotations

import functools
import os
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from PIL import ImageFont

from latentdiff.errors import printable

# Where systems keep fonts
FOLDERS = (
    "/usr/share/fonts",
    "/usr/local/share/fonts",
    "~/.local/share/fonts",
    "~/.fonts",
    "/System/Library/Fonts",
    "/Library/Fonts",
    "~/Library/Fonts",
    "C:/Windows/Fonts",
)
# The fonts to try first: they have many scripts and read well at small sizes
FIRST = ("dejavusans.ttf", "notosans-regular.ttf", "arial unicode.ttf", "arial.ttf", "segoeui.ttf", "notosanscjk-regular.ttc")
ENDINGS = (".ttf", ".otf", ".ttc")
MOST_FONTS = 2000  # tried for one label
NO_CHARACTER = "\U0010ffff"  # no font has this code point, so it is drawn as the box of a missing glyph


def labelled_font(text: str, size: int) -> tuple[Any, str]:
    """A Pillow font of `size` pixels for a label, and the label as that font can draw it.

    The font is Pillow's own if that has every character, else the installed one that has the most. A character that the font
    lacks becomes the letter under its accent, or its code: "U+65E5". Control characters are written out.
    """
    text = printable(text)
    font = _font_for("".join(sorted(set(text))), size)
    return font, "".join(_readable(character, font) for character in text)


@functools.lru_cache(maxsize=256)
def _font_for(characters: str, size: int) -> Any:
    """The font that has the most of these characters."""
    best = ImageFont.load_default(size=size)
    fewest = len(_lacking(characters, best))
    if fewest == 0:
        return best
    for path in _installed():
        try:
            font = ImageFont.truetype(str(path), size)
            lacking = len(_lacking(characters, font))
        except (OSError, ValueError):  # not a font that FreeType reads
            continue
        if lacking < fewest:
            best, fewest = font, lacking
        if fewest == 0:
            break
    return best


def _installed() -> Iterator[Path]:
    """The fonts of this machine in a fixed order, those of FIRST before others."""
    paths = [
        Path(folder) / file
        for name in FOLDERS
        for folder, _, files in os.walk(Path(name).expanduser())
        for file in files
        if file.lower().endswith(ENDINGS)
    ]
    rank = {name: place for place, name in enumerate(FIRST)}
    paths.sort(key=lambda path: (rank.get(path.name.lower(), len(FIRST)), "regular" not in path.name.lower(), str(path)))
    yield from paths[:MOST_FONTS]


def _lacking(characters: str, font: Any) -> list[str]:
    """The characters that a font draws as it draws one that does not exist."""
    box = bytes(font.getmask(NO_CHARACTER))
    return [each for each in characters if not each.isspace() and bytes(font.getmask(each)) == box]


def _readable(character: str, font: Any) -> str:
    """A character, or what stands for it if the font lacks it."""
    if not _lacking(character, font):
        return character
    letter = unicodedata.normalize("NFKD", character)[0]
    return letter if letter != character and not _lacking(letter, font) else f"U+{ord(character):04X} "
