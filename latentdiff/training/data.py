"""The images of a run: a training part and a held-out part, preprocessed alike, read in a resumable order."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from latentdiff.config import DataConfig
from latentdiff.data.images import Columns
from latentdiff.data.order import Batches
from latentdiff.data.preprocess import ImageDataset, Preprocess
from latentdiff.data.sources import held_out, open_source, splits

SPLIT_SEED = 0  # the held-out share must not move with the training seed, or two runs would not compare


class Images:
    """train and held_out ImageDatasets of one data section.

    The held-out part is the data set's own test split where it has one, else a fixed share of the images. `multiple_of`
    is what both sides of the tensors must be divisible by.
    """

    def __init__(self, config: DataConfig, multiple_of: int):
        columns = columns_of(config)
        source = open_source(config.source, "train", config.channels, config.max_bad_share, columns, config.streaming)
        rule = Preprocess(config.size, config.channels, config.fit, math.lcm(multiple_of, config.multiple_of))
        if "test" in splits(config.source, config.streaming):
            test = open_source(config.source, "test", config.channels, config.max_bad_share, columns, config.streaming)
            self.train = ImageDataset(source, rule)
            self.held_out = ImageDataset(test, self.train.preprocess)
        else:
            kept, apart = held_out(source, config.held_out, SPLIT_SEED)
            self.train, self.held_out = ImageDataset(source, rule, kept), ImageDataset(source, rule, apart)
        self.preprocess = self.train.preprocess
        self.class_names = list(source.class_names)
        self.bad = source.bad
        self.workers = config.workers
        self.flips = config.flips
        self._shown: dict[int, tuple[Tensor, Tensor | None]] = {}

    def batches(self, seed: int, batch_size: int, start_step: int, accelerator) -> Batches:
        """Endless training batches of this process, from the given step on; batch_size is global."""
        return Batches(
            self.train, batch_size, seed, start_step * batch_size, accelerator.process_index, accelerator.num_processes,
            self.workers, self.flips,
        )  # fmt: skip

    def held_out_batch(self, count: int) -> tuple[Tensor, Tensor | None]:
        """`count` held-out images, spread evenly over the part: always the same ones, read once."""
        n = len(self.held_out)
        if count not in self._shown:
            self._shown[count] = self.held_out.batch(torch.linspace(0, n - 1, min(count, n)).long())
        return self._shown[count]

    def held_out_captions(self, count: int) -> list[str] | None:
        """The first caption of each image of `held_out_batch`; None where the data have none."""
        texts = self.held_out.captions()
        n = len(self.held_out)
        return None if texts is None else [texts[i][0] for i in torch.linspace(0, n - 1, min(count, n)).long().tolist()]


def columns_of(config: DataConfig) -> Columns:
    return Columns(config.image_column, config.label_column, config.text_column)


def sweep(dataset: ImageDataset, batch_size: int, rank: int = 0, world: int = 1) -> Iterator[Tensor]:
    """All images of a dataset once, in order, as [B, C, H, W]; of several processes, each takes every world-th batch."""
    for indices in torch.arange(len(dataset)).split(batch_size)[rank::world]:
        yield dataset.batch(indices)[0]
