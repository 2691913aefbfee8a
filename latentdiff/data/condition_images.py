"""The second images of a data set, for a U-Net that is given one: a data set itself, which the latent cache can read."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from latentdiff.data.datasets import ImageDataset
from latentdiff.data.image_source import ImageSource
from latentdiff.data.transforms import Preprocess
from latentdiff.errors import UserError
from latentdiff.models.image_condition import ImageCondition


@dataclass(frozen=True)
class ConditionRule:
    """How a data set's condition images come to be: for the identity of their cache."""

    preprocess: Preprocess
    condition: ImageCondition

    def describe(self) -> dict[str, Any]:
        """Everything that decides their pixels, as JSON values."""
        return {**self.preprocess.describe(), "condition": self.condition.describe()}


class ConditionImages:
    """The condition images of a data set, condition.draws of each image, one after another: an ImageDataset for `build_cache`.

    Args:
        dataset: the images.
        condition: what is made of each.
        keys: what the masks of this data set are drawn by, beside an image's number; such as "train".

    Raises:
        UserError: the images have no such condition: no pairs, no colour, or sides that cannot be divided.
    """

    means_only = True  # a condition is the mean of its posterior

    def __init__(self, dataset: ImageDataset, condition: ImageCondition, keys: str = "train"):
        self.dataset, self.condition, self.keys = dataset, condition, keys
        self.source: ImageSource = dataset.source
        self.split, self.copies = dataset.split, dataset.copies
        self.preprocess = ConditionRule(dataset.preprocess, condition)
        self.labels, self.class_names = None, list[str]()
        self.content = dataset.preprocess.content
        condition.check(self.content[2:], dataset.preprocess.channels or dataset.source.channels)
        if condition.kind == "pair":
            self._check_pairs()

    def _check_pairs(self) -> None:
        if self.source.pairs is None:
            raise UserError(
                f"data '{self.source.name}': its images have no paired pictures; name the column of its metadata.jsonl or "
                "metadata.csv that has their files by data.pair_column"
            )
        if self.copies.count > 1:
            raise UserError("data.copies: moves images and not the pictures paired with them; set data.copies=1")
        for height, width in np.unique(self.source.pair_sizes, axis=0).tolist():
            self.dataset.preprocess.check_fits(height, width)

    def __len__(self) -> int:
        return len(self.dataset) * self.condition.draws

    def given(self, indices: Tensor | Sequence[int], *, flips: Tensor | bool = False) -> tuple[Tensor, Tensor | None]:
        """(condition images as a user gives them, their masks or None) of these numbers; see `ImageCondition`."""
        index = torch.as_tensor(indices, dtype=torch.int64)
        rows = index // self.condition.draws
        paired = self.condition.kind == "pair"
        images = self.dataset.pairs(rows, flips=flips) if paired else self.dataset.batch(rows, flips=flips)[0]
        return self.condition.given(images, self.content), self.hidden(index)

    def hidden(self, index: Tensor) -> Tensor | None:
        """The masks [B, 1, H, W] of these numbers [B]; None unless the condition has masks."""
        return self.condition.hidden([f"{self.keys} {number}" for number in index.tolist()], self.content)

    def batch(self, indices: Tensor | Sequence[int], *, flips: Tensor | bool = False) -> tuple[Tensor, None]:
        """(what is encoded, float32 [B, C, H', W'] in [-1, 1]; None) of these numbers. flips: bool or [B]."""
        from latentdiff.pipelines.latent_diffusion import condition_picture

        given, hidden = self.given(indices, flips=flips)
        return condition_picture(given, hidden, self.content[2:], self.dataset.preprocess.padded_size), None

    def latents_fingerprint(self) -> str:
        """The fingerprint that their cache keeps: that of the images, and of the pictures paired with them."""
        content = self.dataset.latents_fingerprint()
        if self.condition.kind != "pair":
            return content
        return hashlib.sha256((content + self.source.pairs_fingerprint()).encode()).hexdigest()
