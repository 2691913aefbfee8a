"""What a folder of pictures holds, as far as it decides how a model of it is trained.

Everything is read by the data layer, as training reads it. Headers are read of all files, pixels of a sample.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import numpy as np
from PIL import Image

from latentdiff.config import DataConfig, parse_data
from latentdiff.data.image_files import DECODING_ERRORS, open_image
from latentdiff.data.image_source import Columns, EncodedImages, ImageSource, in_threads
from latentdiff.data.sources import open_source, splits
from latentdiff.data.summary import class_counts, equal_pictures
from latentdiff.errors import UserError, printable

SAMPLE = 400  # pictures whose pixels are looked at
SECONDS = 6.0  # after which no further pixels are looked at
THUMBNAIL = 48  # pixels of a side; colours and transparency need no more
MAX_BAD_SHARE = 0.2  # more unreadable pictures than this are refused: the folder is probably another one than was meant
DUPLICATES = 20_000  # pictures that are compared with one another
COMPARED_PIXELS = 10**8  # of more, only equal files are found
TRANSPARENT = 0.01  # a picture uses its alpha channel where more than this share of it shows the background
SEEN = 0.15  # a colour is seen on a background that differs by so much of the range, on average over red, green and blue
VANISHED = 0.15  # a picture vanishes where less than this share of its opaque part is seen
GROUNDS = {"white": (255, 255, 255), "black": (0, 0, 0), "grey": (128, 128, 128)}  # backgrounds that are compared
TINY_CLASS = 10  # pictures; what a class of fewer has in common can hardly be told from chance
# Words that a mirrored picture would make wrong
SIDES = frozenset(
    "left right leftwards rightwards east west clockwise counterclockwise anticlockwise letter letters text word words number "
    "numbers digit digits keycap flag flags writing sign signs arrow arrows clock".split()
)
# Networks of this kind copy or mix training pictures where they have fewer than about 1,000 of them. From about 10,000 on,
# two that were trained on different pictures draw the same ones (arXiv:2310.02557, faces of 80x80 pixels)
COPIED, GENERALISED = 1_000, 10_000
FEW = 50  # below, there is nothing to generalise from


@dataclass
class Facts:
    """What was found in a data set; JSON values throughout.

    Attributes:
        source: its name, as `data.source` takes it.
        images: pictures that can be read and are no test part.
        test_images: pictures of its own test part; None where it has none.
        smallest, median, largest: [height, width] of the images, each side by itself.
        aspect: [10 %, 50 %, 90 %] quantiles of width / height.
        cropped: share of the median picture that a square crop cuts off.
        sampled: pictures whose pixels were looked at.
        transparent: share of those that show a background through their alpha channel.
        lightness: of their opaque pixels, the median, 0 (black) to 1 (white); None without transparent pictures.
        hidden: {background: share of the transparent pictures that would vanish on it}.
        dark_border: share of the opaque pictures whose border is nearly black.
        grey: share of the pictures without colour.
        duplicates: pictures that equal another one.
        duplicates_across: of these, groups with pictures in several classes.
        compared: what was compared to find them, in words.
        classes: {name: pictures}; empty without classes.
        captions: {"captions", "distinct", "without"}, or None.
        sided: whether class names or captions have words that a mirrored picture would make wrong.
        unreadable: {file: reason}.
        left_out: {reason: files}.
        remarks: what is noteworthy about how the files are read, as lines.
    """

    source: str
    images: int
    test_images: int | None = None
    smallest: list[int] = field(default_factory=list)
    median: list[int] = field(default_factory=list)
    largest: list[int] = field(default_factory=list)
    aspect: list[float] = field(default_factory=lambda: [1.0, 1.0, 1.0])
    cropped: float = 0.0
    sampled: int = 0
    transparent: float = 0.0
    lightness: float | None = None
    hidden: dict[str, float] = field(default_factory=dict)
    dark_border: float = 0.0
    grey: float = 0.0
    duplicates: int = 0
    duplicates_across: int = 0
    compared: str = ""
    classes: dict[str, int] = field(default_factory=dict)
    captions: dict[str, int] | None = None
    sided: bool = False
    unreadable: dict[str, str] = field(default_factory=dict)
    left_out: dict[str, int] = field(default_factory=dict)
    remarks: list[str] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    @property
    def condition(self) -> str:
        """What a model can be conditioned on: a value of condition.type.

        Classes need two classes, and pictures of a class in common: where all classes have one picture, a class is a name
        for a picture.
        """
        classes = len(self.classes) > 1 and max(self.classes.values()) > 1
        kinds = [kind for kind, there in (("class", classes), ("text", self.captions is not None)) if there]
        return "+".join(kinds) or "none"

    @property
    def tiny_classes(self) -> list[str]:
        """Classes with fewer pictures than TINY_CLASS, the smallest first."""
        small = [name for name, count in self.classes.items() if count < TINY_CLASS]
        return sorted(small, key=lambda name: self.classes[name])

    def lines(self) -> list[str]:
        """What was found, for people: one thought a line."""
        test = f", and {self.test_images} in its test part" if self.test_images else ""
        lines = [f"{self.images} pictures{test}, {self._sizes()}{self._kinds()}", self._labels()]
        lines += self.warnings()
        return lines

    def warnings(self) -> list[str]:
        """What may be a mistake, or will limit the model."""
        lines = [self.verdict()] if self.images < COPIED else []
        if self.condition == "none" and len(self.classes) > 2:
            lines.append("each class has one picture, so the model is not told the class")
        elif self.tiny_classes:
            shown = ", ".join(f"{printable(name)} {self.classes[name]}" for name in self.tiny_classes[:5])
            more = f" and {len(self.tiny_classes) - 5} more" if len(self.tiny_classes) > 5 else ""
            lines.append(f"classes with fewer than {TINY_CLASS} pictures will hardly be learnt: {shown}{more}")
        if self.uneven:
            most, least = max(self.classes.values()), min(self.classes.values())
            lines.append(f"the classes are very uneven ({least} to {most} pictures): those with few will be drawn worse")
        if self.captions and self.captions["without"]:
            lines.append(f"{self.captions['without']} pictures have no caption; they are learnt without one")
        if self.duplicates:
            across = f"; in {self.duplicates_across} cases with copies in several classes" if self.duplicates_across else ""
            lines.append(f"{self.duplicates} pictures are copies of another one (by {self.compared}){across}")
        if self.unreadable:
            file, why = next(iter(self.unreadable.items()))
            more = f", and {len(self.unreadable) - 1} more" if len(self.unreadable) > 1 else ""
            lines.append(f"cannot be read and left out: {printable(file)} ({printable(why)}){more}")
        lines += [f"not used: {count} files ({printable(reason)})" for reason, count in list(self.left_out.items())[:3]]
        return lines + self.remarks[:2]

    @property
    def uneven(self) -> bool:
        """Whether the largest class has more than ten times the pictures of the smallest."""
        counts = self.classes.values()
        return len(counts) > 1 and max(counts) > 10 * min(counts)

    def verdict(self) -> str:
        """Whether there are enough pictures to generalise from, in words."""
        if self.images < FEW:
            return (
                f"{self.images} pictures are too few to generalise from: the model will remember them, and draw them again "
                f"with small changes (some {COPIED} are needed before new ones appear)"
            )
        if self.images < COPIED:
            return (
                f"{self.images} pictures are few: much of what is drawn will be remembered or mixed from them "
                f"(networks of this kind copy up to about {COPIED} pictures); the report says how much"
            )
        if self.images < GENERALISED:
            return f"{self.images} pictures are enough to draw new ones; single ones may still be remembered"
        return f"{self.images} pictures are enough to generalise from"

    def _sizes(self) -> str:
        if self.smallest == self.largest:
            return f"all {_times(self.median)} pixels"
        return f"{_times(self.smallest)} to {_times(self.largest)} pixels, median {_times(self.median)}"

    def _kinds(self) -> str:
        words = []
        if self.grey > 0.995:
            words.append("grey")
        elif self.grey > 0.02:
            words.append(f"{self.grey:.0%} grey")
        if self.transparent > 0:
            words.append("with transparency" if self.transparent > 0.995 else f"{self.transparent:.0%} with transparency")
        return "".join(f", {word}" for word in words)

    def _labels(self) -> str:
        parts = []
        if len(self.classes) > 1:
            least, most = min(self.classes.values()), max(self.classes.values())
            each = f"{least}" if least == most else f"{least} to {most}"
            names = [printable(name) for name in self.classes]
            shown = ", ".join(names[:6]) + (", …" if len(names) > 6 else "")
            parts.append(f"{len(names)} classes of {each} pictures ({shown})")
        elif self.classes:
            parts.append(f"one class ({printable(next(iter(self.classes)))}), so there is nothing to tell apart")
        if self.captions:
            parts.append(f"{self.captions['captions']} captions, {self.captions['distinct']} of them different")
        return " and ".join(parts) or "neither classes nor captions: the model draws pictures like these, of its own choice"


def look(folder: str, overrides: Sequence[str] = ()) -> Facts:
    """Look at a data set.

    Args:
        folder: a folder, or whatever else `data.source` takes.
        overrides: data.key=value, as for a config.

    Raises:
        UserError: there is no such data set, it holds no pictures or a single one, or too many cannot be read.
    """
    data = parse_data({"source": folder}, overrides)
    sources = {split: _open(data, split) for split in splits(data.source, data.streaming)}
    train, test = sources["train"], sources.get("test")
    if len(train) < 2 and test is None:
        raise UserError(
            f"data '{folder}': has one picture that can be read; a model needs at least 2, one of them to measure it by"
        )
    heights, widths = train.sizes[:, 0], train.sizes[:, 1]
    aspects = widths / np.maximum(heights, 1)
    small, large = np.minimum(heights, widths), np.maximum(heights, widths)
    facts = Facts(
        source=data.source,
        images=len(train),
        test_images=None if test is None else len(test),
        smallest=train.sizes.min(0).tolist(),
        median=np.median(train.sizes, axis=0).astype(int).tolist(),
        largest=train.sizes.max(0).tolist(),
        aspect=[round(float(value), 3) for value in np.quantile(aspects, (0.1, 0.5, 0.9))],
        cropped=round(float(np.median(1 - small / np.maximum(large, 1))), 3),
        classes=class_counts(train.class_names, train.labels),
        captions=_caption_facts(train),
    )
    facts.sided = _is_sided(train)
    _look_at_pixels(train, facts)
    _find_duplicates(train, facts)
    for source in sources.values():
        facts.unreadable |= source.bad
        for reason, names in source.report.left_out.items():
            facts.left_out[reason] = facts.left_out.get(reason, 0) + names.count
        facts.remarks += [f"{remark}: {names.short()}" for remark, names in source.report.remarks.items()]
    return facts


def _open(data: DataConfig, split: str) -> ImageSource:
    share = data.max_bad_share if "max_bad_share" in data.model_fields_set else MAX_BAD_SHARE
    columns = Columns(data.image_column, data.label_column, data.text_column, data.caption, data.pair_column)
    return open_source(data.source, split, None, share, columns, data.streaming, data.background)


def _caption_facts(source: ImageSource) -> dict[str, int] | None:
    if source.captions is None:
        return None
    texts = [text for several in source.captions for text in several if text]
    without = sum(not any(several) for several in source.captions)
    return {"captions": len(texts), "distinct": len(set(texts)), "without": without}


def _is_sided(source: ImageSource) -> bool:
    """Whether names or captions speak of sides or writing, or the class names look like letters or digits."""
    names = source.class_names
    if len(names) > 1 and all(len(name) <= 2 for name in names):
        return True
    captions = source.captions or []
    texts = [*names, *(text for several in captions for text in several)]
    return any(not SIDES.isdisjoint(_words(text)) for text in texts)


def _words(text: str) -> list[str]:
    return "".join(each if each.isalpha() else " " for each in text.lower()).split()


# Pixels


@dataclass
class _Look:
    """What the pixels of one picture tell. seen: {background: share of its opaque part that is seen on it}."""

    grey: bool
    transparent: bool
    lightness: float
    seen: dict[str, float]
    dark_border: bool


def _look_at_pixels(source: ImageSource, facts: Facts) -> None:
    """Fill in what the pixels tell, of a sample evenly spread over the data."""
    rows = np.unique(np.linspace(0, len(source) - 1, min(len(source), SAMPLE)).astype(int)).tolist()
    rows = rows[::2] + rows[1::2]  # where the time runs out, what was seen is still spread over the data
    end = time.monotonic() + SECONDS
    looks = [each for each in in_threads(partial(_look, source, end), rows) if each is not None]
    facts.sampled = len(looks)
    if not looks:
        return
    facts.grey = _share(each.grey for each in looks)
    facts.transparent = _share(each.transparent for each in looks)
    clear, opaque = ([each for each in looks if each.transparent is wanted] for wanted in (True, False))
    if clear:
        facts.lightness = round(float(np.median([each.lightness for each in clear])), 3)
        facts.hidden = {name: _share(each.seen[name] < VANISHED for each in clear) for name in GROUNDS}
    facts.dark_border = _share(each.dark_border for each in opaque)


def _share(truths: Iterator[bool]) -> float:
    values = list(truths)
    return round(sum(values) / len(values), 4) if values else 0.0


def _look(source: ImageSource, end: float, i: int) -> _Look | None:
    """None for a picture that cannot be read, or after the time `end`."""
    if time.monotonic() > end:
        return None
    try:
        pixels = _thumbnail(source, i)  # [h, w, 4], 0 to 1
    except (*DECODING_ERRORS, UserError):
        return None
    colour, alpha = pixels[..., :3], pixels[..., 3]
    opaque = max(float(alpha.sum()), 1e-6)
    seen = {}
    for name, ground in GROUNDS.items():
        apart = np.abs(colour - np.array(ground) / 255).mean(-1) > SEEN
        seen[name] = float((apart * alpha).sum()) / opaque
    brightness = colour @ np.array([0.299, 0.587, 0.114])
    border = np.concatenate([brightness[0], brightness[-1], brightness[:, 0], brightness[:, -1]])
    return _Look(
        grey=float(((colour.max(-1) - colour.min(-1)) * alpha).max()) < 0.05,
        transparent=float(alpha.mean()) < 1 - TRANSPARENT,
        lightness=float((brightness * alpha).sum()) / opaque,
        seen=seen,
        dark_border=float(border.mean()) < 0.1,
    )


def _thumbnail(source: ImageSource, i: int) -> np.ndarray:
    """Picture i as float32 [h, w, 4] in [0, 1]: red, green, blue and alpha, at most THUMBNAIL wide and high."""
    if isinstance(source, EncodedImages):
        file = source.open(i)
        with open_image(file) as image:  # type: ignore[arg-type]
            image.draft("RGB", (THUMBNAIL, THUMBNAIL))  # a JPEG is decoded at the size that is needed
            clear = image.has_transparency_data
            small = image.convert("RGBA" if clear else "RGB")
    else:
        pixels = source.read(i)
        small = Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels).convert("RGB")
    small.thumbnail((THUMBNAIL, THUMBNAIL), Image.Resampling.BOX)
    return np.asarray(small.convert("RGBA"), dtype=np.float32) / 255


def _find_duplicates(source: ImageSource, facts: Facts) -> None:
    """Fill in which pictures equal others: by pixels where that is quick, else by files, of the first pictures where many."""
    if not isinstance(source, EncodedImages):
        facts.compared = "nothing"
        return
    first = np.arange(min(len(source), DUPLICATES))
    compared, pictures = equal_pictures({"train": source}, COMPARED_PIXELS, DUPLICATES)
    more = f" of {len(first)}" if len(first) < len(source) else ""
    facts.compared = compared + more
    index = {printable(name): i for i, name in enumerate(source.files)}
    for places in pictures.values():
        names = places["train"]
        facts.duplicates += len(names) - 1
        if source.labels is not None and len(names) > 1:
            facts.duplicates_across += len({int(source.labels[index[name]]) for name in names}) > 1


def _times(size: Sequence[int]) -> str:
    """A size [height, width] as people write it: width x height."""
    return f"{size[1]}x{size[0]}"
