"""The three npm packages of the emoji recipe, made small enough for a test."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

VENDOR = {"noto": "google", "twemoji": "twitter"}


# identity, emoji-data's short names, emojibase's hexcode, label, group, tags
EMOJI = [
    ("1F34E", ["apple"], "1F34E", "red apple", 1, ["apple", "fruit", "red"]),
    ("1F436", ["dog"], "1F436", "dog face", 2, ["dog", "face", "pet"]),
    ("1F415", ["dog2"], "1F415", "dog", 2, ["animal", "pet"]),
    ("0031-FE0F-20E3", ["one"], "0031-20E3", "keycap: 1", 3, ["keycap"]),
    ("1F1EA-1F1EC", ["flag-eg"], "1F1EA-1F1EC", "flag: Egypt", 4, ["EG", "flag"]),
    ("1F44D", ["+1", "thumbsup"], "1F44D", "thumbs up", 0, ["hand", "yes"]),
    ("1F600", ["grinning"], "1F600", "grinning face", 0, ["face", "smile", "happy"]),
    ("1F499", ["blue_heart"], "1F499-FE0F", "blue heart", 0, ["blue", "love"]),
    ("1F355", ["pizza"], "1F355", "pizza", 1, ["cheese", "slice"]),
    ("1F680", ["rocket"], "1F680", "rocket", 5, ["space"]),
    ("00A9-FE0F", ["copyright"], "00A9", "copyright", 3, []),
    ("1F9D1-200D-1F9B0", ["red_haired_person"], "1F9D1-200D-1F9B0", "person: red hair", 0, ["adult"]),
]


GROUPS = ["faces", "food & drink", "animals", "symbols", "flags", "travel & places"]


def png(i: int, style: str) -> bytes:
    """Opaque on the left, half transparent in the middle, clear (but black underneath) on the right."""
    pixels = np.zeros((64, 64, 4), np.uint8)
    pixels[:, :40, :3] = (20 * i, 100 if style == "noto" else 200, 7)
    pixels[:, :20, 3], pixels[:, 20:40, 3] = 255, 128
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "png")
    return stream.getvalue()


def tarball(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w:gz") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(f"package/{name}")
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def picture_name(identity: str) -> str:
    return identity.lower() + ".png"


def package(name: str) -> dict[str, bytes]:
    """The members of a tiny package; its last emoji is drawn by Google alone."""
    about = {"package.json": json.dumps({"name": name, "version": "1.2.3"}).encode()}
    if name == "emojibase-data":
        skins = [{"hexcode": "1F44D-1F3FB", "label": "thumbs up: light skin tone", "group": 0}]
        labels = [{"hexcode": h, "label": n, "group": g, "tags": t, "skins": skins} for _, _, h, n, g, t in EMOJI]
        groups = {"groups": [{"order": i, "message": message} for i, message in enumerate(GROUPS)]}
        return about | {"en/messages.json": json.dumps(groups).encode(), "en/data.json": json.dumps(labels).encode()}
    style = "noto" if name.endswith("google") else "twemoji"
    both = {"has_img_google": True, "has_img_twitter": True, "category": "Misc"}
    entries = [{"unified": e[0], "image": picture_name(e[0]), "name": e[3].upper(), "short_names": e[1]} | both for e in EMOJI]
    unknown = {"unified": "1F6F8", "image": "1f6f8.png", "name": "FLYING SAUCER", "short_names": ["ufo"]} | both
    google = {"unified": "1FAE0", "image": "1fae0.png", "name": "MELTING", "short_names": ["melting"]} | both
    entries += [unknown, google | {"has_img_twitter": False}]
    pictures = {f"img/{VENDOR[style]}/64/{e['image']}": png(i, style) for i, e in enumerate(entries[:-1])}
    return about | pictures | {"emoji.json": json.dumps(entries).encode()}  # after the pictures, as the order is free
