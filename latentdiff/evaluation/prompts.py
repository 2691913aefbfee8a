"""What a model that reads text is asked for when it is measured: captions of the data set's own images."""

from __future__ import annotations

import hashlib
import json
from typing import Any, NamedTuple

from torch import Tensor

from latentdiff.data.datasets import ImageDataset
from latentdiff.data.shuffling import permutation
from latentdiff.errors import UserError
from latentdiff.utils.random import derive_seed

PARTS = {"test": "held-out", "train": "training"}


class Prompts(NamedTuple):
    """Prompts [N], the class of each one's image, int64 [N], where images have such, and what a protocol says of them."""

    texts: list[str]
    labels: Tensor | None
    facts: dict[str, Any]


def draw_prompts(images: ImageDataset, count: int, part: str, data: str, seed: int = 0) -> Prompts:
    """`count` captions of a data set's images, of each image one of its captions, drawn as training draws them.

    Above the number of images, each comes as often as any other, or once more, its caption drawn anew.
    part: which images these are, a key of PARTS.  UserError where they have no captions; data: what the user called them.
    """
    captions = images.captions()
    if captions is None or not any(any(texts) for texts in captions):
        has = f"its {PARTS[part]} images have no captions, and this model is told by text what to draw"
        raise UserError(f"--data {data}: {has}; add a metadata.jsonl with file_name and text, or name the text column")
    captioned = [i for i, texts in enumerate(captions) if any(texts)]  # where some have none, theirs is the empty prompt
    order = permutation(len(captioned), seed, "prompts")
    rounds, rest = divmod(count, len(captioned))
    places = [(i, n) for n in range(rounds) for i in captioned]
    places += [(captioned[i], rounds) for i in order[:rest].sort().values.tolist()]
    texts = [captions[i][derive_seed(seed, "prompts", i, n) % len(captions[i])] for i, n in places]
    facts = {
        "captions_of": f"{PARTS[part]} images",
        "captioned_images": min(count, len(captioned)),
        "different": len(set(texts)),
        "sha256": hashlib.sha256(json.dumps(texts).encode()).hexdigest(),
    }
    return Prompts(texts, None if images.labels is None else images.labels[[i for i, _ in places]], facts)
