"""Fonts for the labels of grids: one that has the label's characters, where the machine has any."""

from __future__ import annotations

import functools
import os
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from PIL import ImageFont

from latentdiff.errors import printable

# Where systems keep fonts, and the ones to look at first: they have many scripts and read well at small sizes
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
FIRST = ("dejavusans.ttf", "notosans-regular.ttf", "arial unicode.ttf", "arial.ttf", "segoeui.ttf", "notosanscjk-regular.ttc")
ENDINGS = (".ttf", ".otf", ".ttc")
MOST_FONTS = 2000  # that are looked at for one label
NO_CHARACTER = "\U0010ffff"  # a code point that no font has, so it draws the box of a missing glyph


def labelled_font(text: str, size: int) -> tuple[Any, str]:
    """A font of `size` pixels for a label, and the label with what the font lacks written otherwise.

    The font is Pillow's own where that has every character, else the installed one that has the most. A character that it
    lacks becomes the letter under its accent, or its number: "U+65E5".
    """
    text = printable(text)
    font = _font_for("".join(sorted(set(text))), size)
    return font, "".join(_readable(character, font) for character in text)


@functools.lru_cache(maxsize=256)
def _font_for(characters: str, size: int) -> Any:
    best = ImageFont.load_default(size=size)
    least = len(_lacking(characters, best))
    if least == 0:
        return best
    for path in _installed():
        try:
            font = ImageFont.truetype(str(path), size)
            lacking = len(_lacking(characters, font))
        except (OSError, ValueError):  # not a font that FreeType reads
            continue
        if lacking < least:
            best, least = font, lacking
        if least == 0:
            break
    return best


def _installed() -> Iterator[Path]:
    """The fonts of this machine, those of FIRST before others, in a fixed order."""
    found = []
    for name in FOLDERS:
        for folder, _, files in os.walk(Path(name).expanduser()):
            found += [Path(folder) / file for file in files if file.lower().endswith(ENDINGS)]
    rank = {name: place for place, name in enumerate(FIRST)}
    found.sort(key=lambda path: (rank.get(path.name.lower(), len(FIRST)), "regular" not in path.name.lower(), str(path)))
    yield from found[:MOST_FONTS]


def _lacking(characters: str, font: Any) -> list[str]:
    """The characters for which a font draws what it draws for one that does not exist."""
    box = bytes(font.getmask(NO_CHARACTER))
    return [each for each in characters if not each.isspace() and bytes(font.getmask(each)) == box]


def _readable(character: str, font: Any) -> str:
    if not _lacking(character, font):
        return character
    letter = unicodedata.normalize("NFKD", character)[0]
    return letter if letter != character and not _lacking(letter, font) else f"U+{ord(character):04X} "
