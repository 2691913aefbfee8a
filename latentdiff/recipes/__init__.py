"""Data sets that latentdiff makes out of public files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal


def prepare(
    name: Literal["emoji"],
    out: str | Path,
    tarballs: Sequence[str | Path] | None = None,
    seed: int = 0,
    held_out: float = 0.05,
) -> dict[str, Any]:
    """Write a data set's pictures and captions to a folder with train/ and test/ splits, whole or not at all.

    Args:
        name: the data set. emoji: pictures of emoji in two styles, with captions.
        out: a new or empty folder.
        tarballs: the .tgz files of the npm packages that it is made of, in any order. By default npm fetches the pinned
            versions.
        seed: of the held-out pairs and the captions.
        held_out: share of the pairs of style and emoji that go to test/; above 0 and at most 0.5.

    Returns:
        Facts about the data set: numbers of pictures, captions and held-out pairs, and the packages' versions.

    Raises:
        UserError: a folder that is not empty, packages that cannot be fetched or read, or a share out of range.
    """
    from latentdiff.recipes.emoji.prepare import prepare_emoji

    return prepare_emoji(out, tarballs, seed, held_out)
