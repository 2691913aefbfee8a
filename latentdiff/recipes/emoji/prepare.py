"""The emoji data set: the same things drawn in two styles, with captions, from three public npm packages.

Each picture is a pair (style, emoji). A few pairs are held out: a model is trained on that emoji in the other style, and
on that style with other emoji, but never on the two together.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zlib
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from latentdiff.data.image_files import DECODING_ERRORS, decode, one_line
from latentdiff.data.shuffling import permutation
from latentdiff.errors import UserError
from latentdiff.recipes.emoji.captions import Words, captions, words
from latentdiff.utils import atomic

VENDORS = {"noto": "google", "twemoji": "twitter"}  # name of a style here: its name in emoji-data
PICTURES = {style: f"emoji-datasource-{vendor}" for style, vendor in VENDORS.items()}
NAMES = "emojibase-data"
VERSIONS = {PICTURES["noto"]: "16.0.0", PICTURES["twemoji"]: "16.0.0", NAMES: "17.0.0"}
SIZE = 64
MAX_MEMBER = 1 << 26  # bytes; the longest list has 3 million
_PACKAGE = "package/package.json"
_LIST, _LABELS, _MESSAGES = "package/emoji.json", "package/en/data.json", "package/en/messages.json"


@dataclass(frozen=True)
class Emoji:
    """One emoji: its code points ("1F34E"), its picture's file name ("1f34e.png"), its words and its group."""

    identity: str
    file: str
    words: Words
    group: str


@dataclass(frozen=True)
class Package:
    """The tarball of one npm package."""

    path: Path
    version: str


def prepare_emoji(
    out: str | Path, tarballs: Sequence[str | Path] | None = None, seed: int = 0, held_out: float = 0.05
) -> dict[str, Any]:
    """Write the emoji data set to the folder `out`, whole or not at all, and return facts about it.

    tarballs: the .tgz files of the three packages, in any order; None: the pinned versions are fetched with npm.
    seed: of the held-out pairs and of the tags in captions. held_out: the share of the (style, emoji) pairs that go
    to test/ instead of train/, above 0 and at most 0.5, because an emoji is held out in one style only.

    Returns {"out", "emoji", "pictures", "train", "test", "held_out", "captions", "caption_tokens", "groups", "seed",
    "packages"}: counts, and the versions of the packages. UserError: `out` is not empty, or a package is missing or damaged.
    """
    folder = Path(out).expanduser().absolute()
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
        raise UserError(f"--out {out}: exists and is not an empty folder; name a new one")
    if not 0 < held_out <= 0.5:
        raise UserError(f"--held-out {held_out:g}: valid are shares above 0 and at most 0.5")
    with tempfile.TemporaryDirectory() as scratch:
        packages = _identify(tarballs if tarballs is not None else _fetch(Path(scratch)))
        emoji = _emoji(packages)
        pictures = {style: _pictures(packages[PICTURES[style]].path, vendor, emoji) for style, vendor in VENDORS.items()}
    split = _held_out(emoji, pictures, seed, held_out)
    with atomic.new_folder(folder) as new:
        facts = _write(new, emoji, pictures, split, seed)
        versions = {name: package.version for name, package in packages.items()}
        facts = {"out": str(out), **facts, "seed": seed, "packages": versions}
        (new / "README.md").write_text(_readme(facts), encoding="utf-8")
    return facts


def _fetch(folder: Path) -> list[Path]:
    """The pinned packages, downloaded into `folder` by npm."""
    npm = shutil.which("npm")
    if npm is None:
        packages = " ".join(f"{name}@{version}" for name, version in VERSIONS.items())
        raise UserError(f"npm is not installed: install it, or give --tarballs with the files of {packages}")
    for name, version in VERSIONS.items():
        print(f"fetching {name}@{version} with npm", file=sys.stderr)
        command = [npm, "pack", f"{name}@{version}", "--silent", "--ignore-scripts", "--pack-destination", str(folder)]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
        if done.returncode:
            output = (done.stderr.strip() or done.stdout.strip() or f"exit status {done.returncode}").splitlines()
            raise UserError(f"npm pack {name}@{version} failed ({output[-1]}): download it by hand and give --tarballs")
    return sorted(folder.glob("*.tgz"))


def _identify(tarballs: Iterable[str | Path]) -> dict[str, Package]:
    """{package name: its tarball}, by the package.json in each."""
    packages: dict[str, Package] = {}
    for path in map(Path, tarballs):
        (about,) = _read_json(path, _PACKAGE)
        name = about.get("name") if isinstance(about, dict) else None
        if name not in VERSIONS:
            raise UserError(f"--tarballs {path}: is the package {name!r}; valid are {', '.join(VERSIONS)}")
        if name in packages:
            raise UserError(f"--tarballs {path}: is {name}, as {packages[name].path} is; give one of each")
        packages[name] = Package(path, str(about.get("version")))
    missing = [name for name in VERSIONS if name not in packages]
    if missing:
        raise UserError(f"--tarballs: no file of the package {' nor of '.join(missing)} was given")
    return packages


def _read(path: Path, names: Collection[str]) -> dict[str, bytes]:
    """The named members of a tarball. Read in the file's own order: seeking back would decompress it again."""
    needed, contents = set(names), {}
    try:
        with tarfile.open(path, "r:gz") as tar:
            for member in tar:
                # Links are no files: they are not followed. Nothing is ever extracted, so no name becomes a path
                if member.name in needed and member.isreg() and (stream := tar.extractfile(member)) is not None:
                    if member.size > MAX_MEMBER:
                        raise UserError(f"--tarballs {path}: {member.name} has {member.size} bytes, which no such file has")
                    contents[member.name] = stream.read()
                    if len(contents) == len(needed):
                        break
    except FileNotFoundError as error:
        raise UserError(f"--tarballs {path}: no such file") from error
    except UserError:
        raise
    except (tarfile.TarError, EOFError, zlib.error, OSError, ValueError, ArithmeticError, LookupError) as error:
        raise UserError(f"--tarballs {path}: not a whole .tgz file ({one_line(error)})") from error
    missing = [name for name in names if name not in contents]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise UserError(f"--tarballs {path}: has no {missing[0]}{more}")
    return contents


def _read_json(path: Path, *names: str) -> list[Any]:
    """The values of JSON members of a tarball, in the order of the names."""
    contents, values = _read(path, names), []
    for name in names:
        try:
            values.append(json.loads(contents[name]))
        except (ValueError, RecursionError) as error:
            raise UserError(f"--tarballs {path}: {name} is not JSON ({one_line(error)})") from error
    return values


def _emoji(packages: dict[str, Package]) -> list[Emoji]:
    """The emoji that both styles draw, without variants of skin tone, sorted by identity."""
    source, names = packages[PICTURES["noto"]].path, packages[NAMES].path
    (entries,) = _read_json(source, _LIST)
    labels, messages = _read_json(names, _LABELS, _MESSAGES)
    try:
        groups = {group["order"]: group["message"] for group in messages["groups"]}
        # emojibase's entries and their `skins`
        known = {_bare(e["hexcode"]): e for entry in labels for e in (*entry.get("skins", []), entry)}
        drawn = [entry for entry in entries if all(entry[f"has_img_{vendor}"] for vendor in VENDORS.values())]
        emoji = [_one(entry, known.get(_bare(entry["unified"]), {}), groups) for entry in drawn]
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"--tarballs {source} or {names}: not laid out as expected ({error!r})") from error
    if len(emoji) < 2:
        raise UserError(f"--tarballs {source}: {_LIST} lists {len(emoji)} emoji in both styles; at least 2 are needed")
    return sorted(emoji, key=lambda e: e.identity)


def _one(entry: dict[str, Any], known: dict[str, Any], groups: dict[int, str]) -> Emoji:
    """One emoji. entry: emoji-data's; known: emojibase's, {} where it has none."""
    identity, file = entry["unified"].upper(), entry["image"]
    if not re.fullmatch(r"[0-9a-f]+(-[0-9a-f]+)*\.png", file):  # it becomes a path
        raise UserError(f"{_LIST}: the image of {identity} is {file!r}, not code points and .png")
    group = groups.get(known.get("group", -1)) or entry["category"].lower()
    names = words(known.get("label") or entry["name"], known.get("tags") or [], entry["short_names"], group)
    return Emoji(identity, file, names, group)


def _bare(identity: str) -> str:
    """Code points without the variation selector FE0F, which the packages write in different places."""
    return "-".join(part for part in identity.upper().split("-") if part != "FE0F")


def _pictures(path: Path, vendor: str, emoji: list[Emoji]) -> list[Image.Image]:
    """The RGB picture of each emoji, on white."""
    names = [f"package/img/{vendor}/{SIZE}/{e.file}" for e in emoji]
    members, pictures = _read(path, names), []
    for name in names:
        try:
            picture = Image.fromarray(decode(io.BytesIO(members[name]), 3))
        except DECODING_ERRORS as error:
            raise UserError(f"--tarballs {path}: {name} cannot be read as an image ({one_line(error)})") from error
        if picture.size != (SIZE, SIZE):
            raise UserError(f"--tarballs {path}: {name} is {picture.width}x{picture.height} pixels, not {SIZE}x{SIZE}")
        pictures.append(picture)
    return pictures


def _held_out(emoji: list[Emoji], pictures: dict[str, list[Image.Image]], seed: int, share: float) -> dict[str, set[int]]:
    """{style: indices of the emoji held out in it}: no emoji in both, and equally many in each, or one more.

    An emoji with the same picture as another one (the flags of Norway and Svalbard) stays in train/: its pixels would be
    there under the other's name.
    """
    shared = set()
    for style in VENDORS:
        digests = [hashlib.sha256(picture.tobytes()).digest() for picture in pictures[style]]
        counts = Counter(digests)
        shared |= {i for i, digest in enumerate(digests) if counts[digest] > 1}
    order = [i for i in permutation(len(emoji), seed, "held-out pairs").tolist() if i not in shared]
    count = max(len(VENDORS), round(share * len(VENDORS) * len(emoji)))
    if count > len(order):
        raise UserError(f"--held-out {share:g}: is {count} pairs, but only {len(order)} emoji have pictures of their own")
    return {style: set(order[k : count : len(VENDORS)]) for k, style in enumerate(VENDORS)}


def _write(
    folder: Path, emoji: list[Emoji], pictures: dict[str, list[Image.Image]], split: dict[str, set[int]], seed: int
) -> dict[str, Any]:
    """Write train/ and test/ into the folder, and return what can be counted."""
    rows: dict[str, list[dict[str, Any]]] = {"train": [], "test": []}
    for style in sorted(VENDORS):
        for part in rows:
            (folder / part / style).mkdir(parents=True)
        for i, (e, picture) in enumerate(zip(emoji, pictures[style], strict=True)):
            part = "test" if i in split[style] else "train"
            picture.save(folder / part / style / e.file)
            row = {"file_name": f"{style}/{e.file}", "text": captions(e.words, style, seed, e.identity), "style": style}
            row |= {"identity": e.identity, "name": e.words.name, "group": e.group, "tags": e.words.tags}
            rows[part].append(row)
    from latentdiff.data.captions import own_token_facts  # imports the transformers library, which nothing else here needs

    for part, lines in rows.items():
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in lines)
        (folder / part / "metadata.jsonl").write_text(text, encoding="utf-8")
    return {
        "emoji": len(emoji),
        "pictures": len(rows["train"]) + len(rows["test"]),
        "train": len(rows["train"]),
        "test": len(rows["test"]),
        "held_out": {style: len(held) for style, held in split.items()},
        "captions": sum(len(row["text"]) for lines in rows.values() for row in lines),
        "caption_tokens": own_token_facts([text for row in rows["train"] for text in row["text"]]),
        "groups": dict(Counter(e.group for e in emoji)),
    }


def _readme(facts: dict[str, Any]) -> str:
    held_out = " and ".join(f"{count} in {style}" for style, count in facts["held_out"].items())
    styles = " and ".join(VENDORS)
    version = facts["packages"]
    return f"""# Emoji in two styles, with captions

{facts["pictures"]} RGB pictures of {SIZE}x{SIZE} pixels on white: {facts["emoji"]} emoji, each in the styles {styles}.
Made by `latentdiff prepare emoji` with seed {facts["seed"]}.

- train/: {facts["train"]} pictures
- test/: {facts["test"]} pictures, pairs of style and emoji that are held out ({held_out}); each of these emoji is in train/
  in the other style

metadata.jsonl has a line a picture: file_name, text (a list of captions, any of which describes it), style, identity
(code points), name, group and tags. {facts["captions"]} captions in all.

## Sources and licences

- noto: Noto Emoji pictures by Google, Apache-2.0, from the npm package {PICTURES["noto"]} {version[PICTURES["noto"]]}
- twemoji: Twemoji graphics by Twitter and contributors, CC-BY 4.0, from {PICTURES["twemoji"]} {version[PICTURES["twemoji"]]}
- list of emoji and short names: emoji-data, MIT, in the same packages
- names, tags and groups: emojibase, MIT, from {NAMES} {version[NAMES]}

The pictures were laid on white and are otherwise unchanged.
"""
