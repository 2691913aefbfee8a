"""What a data set holds: the facts that `latentdiff info DATA` prints."""

from __future__ import annotations

import hashlib
import statistics
from collections import Counter
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np

from latentdiff.config import DataConfig, parse_data
from latentdiff.data.captions import own_token_facts
from latentdiff.data.framing import framing_facts, framing_lines
from latentdiff.data.image_source import Columns, EncodedImages, ImageSource, in_threads
from latentdiff.data.sources import kind_of, open_source, splits
from latentdiff.data.transforms import Preprocess
from latentdiff.errors import UserError, printable

FEW = 5  # entries shown of a long list
FOLDER_SIZE = (64, 64)  # of the images in configs/folder
MANY_PIXELS = 10**9  # more than this are not all decoded for a summary
MAX_BAD_SHARE = 0.999  # a summary is of use even where nearly all images are damaged

# {hash of an image's pixels: {split: names of the images that have them}}
Pictures = dict[bytes, dict[str, list[str]]]


def summarize_data(what: str, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Sizes, classes, captions, duplicates and unreadable files of each split, read as a config reads it.

    Args:
        what: a data set: a folder, fashion-mnist, a Hub name, or a pattern of tables or shards.
        overrides: data.key=value, as in a config. Framing is shown for data.size and data.framing; by default those of
            configs/folder, which crops to 64x64.
    """
    data = parse_data({"source": what}, overrides)
    channels = data.channels if "channels" in data.model_fields_set else None  # None: as the images have them
    columns = Columns(data.image_column, data.label_column, data.text_column, data.caption, data.pair_column)
    sources = {
        split: open_source(what, split, channels, MAX_BAD_SHARE, columns, data.streaming, data.background)
        for split in splits(what, data.streaming)
    }
    # This reads the images, and so finds more of them that cannot be read
    compared, pictures = equal_pictures(sources, MANY_PIXELS)
    facts: dict[str, Any] = {"data": what}
    for split, source in sources.items():
        facts[split] = _split_facts(source)
        groups = [names for places in pictures.values() if len(names := places.get(split, [])) > 1]
        facts[split]["duplicates"] = _groups(groups, sum(len(names) - 1 for names in groups), compared)
        if source.unlabelled:
            facts[split]["no_classes"] = source.unlabelled
        if data.size is not None or kind_of(what) != "fashion-mnist":
            facts[split]["framing"] = _framing(source, data)
    if len(sources) > 1:
        both = [places for places in pictures.values() if len(places) > 1]
        facts["in_both_splits"] = _groups(both, len(both), compared)
    return facts


def class_counts(names: Sequence[str], labels: Any) -> dict[str, int]:
    """{class: its number of images}; labels: int64 tensor [N], or None where there are no classes."""
    return {} if labels is None else dict(zip(names, labels.bincount(minlength=len(names)).tolist(), strict=True))


def _split_facts(source: ImageSource) -> dict[str, Any]:
    sizes, times = np.unique(source.sizes, axis=0, return_counts=True)
    most_common = np.argsort(-times, kind="stable")[:FEW]
    return {
        "images": len(source),
        "channels": source.channels,
        "smallest": sizes.min(0).tolist(),
        "largest": sizes.max(0).tolist(),
        "sizes": len(sizes),
        "most_common_sizes": [{"size": sizes[k].tolist(), "images": int(times[k])} for k in most_common],
        "classes": class_counts(source.class_names, source.labels),
        "captions": None if source.captions is None else _caption_facts(source.captions),
        "unreadable": {printable(file): reason for file, reason in source.bad.items()},
        "files": source.report.with_unreadable(source.bad).as_json(),
    }


def _framing(source: ImageSource, data: DataConfig) -> dict[str, Any]:
    """What data.framing does to the images, or why it refuses them."""
    size = data.size or FOLDER_SIZE
    framing = "crop" if data.size is None and data.framing == "exact" else data.framing
    try:
        rule = Preprocess(size, None, framing, data.multiple_of, background=data.background)
        facts = framing_facts(source, rule.for_source(source))
    except UserError as error:
        return {"size": list(size), "framing": framing, "refused": str(error)}
    return facts | {"in_words": framing_lines(facts)}


def _groups(groups: list[Any], images: int, compared: str) -> dict[str, Any]:
    """Facts on groups of equal images, with the first names of the first groups. images: how many could be left out."""

    def first(group: Any) -> Any:
        return {split: names[:FEW] for split, names in group.items()} if isinstance(group, dict) else group[:FEW]

    return {"images": images, "groups": len(groups), "first": [first(group) for group in groups[:FEW]], "compared": compared}


def _caption_facts(captions: list[tuple[str, ...]]) -> dict[str, Any]:
    """Facts on all captions. Tokens are those of a text encoder trained with the config's default length and vocabulary."""
    texts = [text for several in captions for text in several if text]
    words = [len(text.split()) for text in texts]
    lengths = {"min": min(words), "median": statistics.median(words), "max": max(words)}
    return {"captions": len(texts), "distinct": len(set(texts)), "words": lengths, "tokens": own_token_facts(texts)}


def equal_pictures(sources: dict[str, ImageSource], many_pixels: int, limit: int | None = None) -> tuple[str, Pictures]:
    """(what was compared, the pictures by their pixels).

    Where there are more than many_pixels, which take too long to decode, only files are decoded that have the same length,
    start and end as another file. A picture that was encoded twice is then not found. limit: of a source, the first so many
    pictures are compared; None: all.
    """
    candidates: dict[str, Sequence[int]] = {split: range(len(source))[:limit] for split, source in sources.items()}
    compared = "pixels"
    encoded = {split: source for split, source in sources.items() if isinstance(source, EncodedImages)}
    if encoded and sum(int(source.sizes[:limit].prod(1).sum()) for source in encoded.values()) > many_pixels:
        compared = "files"
        ends = {split: source.ends(limit) for split, source in encoded.items()}
        times = Counter(end for several in ends.values() for end in several)
        candidates = {split: [i for i, end in enumerate(several) if times[end] > 1] for split, several in ends.items()}
    pictures: Pictures = {}
    for split, source in sources.items():
        digests = in_threads(partial(_pixel_hash, source), candidates[split])
        names = getattr(source, "files", None)
        for i, digest in zip(candidates[split], digests, strict=True):
            if digest is not None:
                pictures.setdefault(digest, {}).setdefault(split, []).append(printable(names[i]) if names else str(i))
    return compared, pictures


def _pixel_hash(source: ImageSource, i: int) -> bytes | None:
    """None for an image that cannot be read; the source notes which."""
    try:
        pixels = source.read(i)
    except Exception:  # damaged files make decoders raise almost anything, and a summary must not fail
        return None
    return hashlib.blake2b(str(pixels.shape).encode() + pixels.tobytes(), digest_size=16).digest()
