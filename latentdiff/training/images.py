"""The images of a run: a training part and a held-out part, preprocessed in the same way, read in a resumable order."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from latentdiff.config import DataConfig
from latentdiff.data.copies import Copies
from latentdiff.data.datasets import ImageDataset
from latentdiff.data.file_report import FileReport
from latentdiff.data.framing import framing_facts, framing_lines
from latentdiff.data.image_source import Columns, ImageSource
from latentdiff.data.shuffling import Batches
from latentdiff.data.sources import open_source, splits
from latentdiff.data.splits import held_out
from latentdiff.data.transforms import Preprocess
from latentdiff.errors import printable
from latentdiff.utils import processes

SPLIT_SEED = 0  # not the training seed: runs with different seeds must hold out the same images to be comparable


class Images:
    """The images of a config's data section.

    The held-out part is the data set's own test split where it has one, else a fixed share of the images. Where every class
    has only one image, nothing can be held out, and the held-out part is the training images.

    Args:
        config: the data section.
        multiple_of: both sides of the image tensors must be divisible by it (the autoencoder's factor).

    Attributes:
        train, held_out: ImageDatasets of the images as they are.
        samples: the ImageDataset that training draws from: `train` with data.copies of each image.
        nothing_held_out: whether held_out is the training images.
        split: how the held-out part was chosen, in words.
        preprocess: what turns an image into a tensor.
        class_names: of the data set.

    Raises:
        UserError: the data set cannot be opened, or does not fit the config.
    """

    def __init__(self, config: DataConfig, multiple_of: int):
        source = _open(config, "train")
        multiple = math.lcm(multiple_of, config.multiple_of)
        preprocess = Preprocess(config.size, config.channels, config.framing, multiple, background=config.background)
        self.nothing_held_out = False
        if "test" in splits(config.source, config.streaming):
            kept = torch.arange(len(source)) if config.limit else None
            self.train = ImageDataset(source, preprocess, _limited(kept, config.limit))
            self.held_out = ImageDataset(_open(config, "test"), self.train.preprocess)
            self.split = "its test part"
        else:
            kept, apart = held_out(source, config.held_out, SPLIT_SEED, config.held_out_rule)
            self.nothing_held_out = not len(apart)
            per_class = source.labels is not None and config.held_out_rule == "per_class"
            self.split = "drawn per class" if per_class else "drawn at random"
            split = "per_class" if per_class else None
            kept = _limited(kept, config.limit)
            self.train = ImageDataset(source, preprocess, kept, split)
            self.held_out = ImageDataset(source, preprocess, kept if self.nothing_held_out else apart, split)
        self.samples, copies = self.train, Copies(config.copies, config.shift, config.zoom)
        if copies.count > 1:
            self.samples = ImageDataset(source, self.train.preprocess, self.train.indices, self.train.split, copies)
        self.preprocess = self.train.preprocess
        self.class_names = list(source.class_names)
        self.workers = config.workers
        self.flips = config.flips
        self._printed = False
        self._held_out_batches: dict[int, tuple[Tensor, Tensor | None]] = {}

    def file_reports(self) -> dict[str, FileReport]:
        """What happened to every file of the data set, by part: "train", and "test" where it has one."""
        sources = {"train": self.train.source, "test": self.held_out.source}
        return {
            part: source.report.with_unreadable(source.bad)
            for part, source in sources.items()
            if part == "train" or source is not self.train.source
        }

    def facts(self) -> dict[str, Any]:
        """The numbers of images used, the files left out with the reasons, and the effect of framing, as JSON values."""
        copies = {} if self.samples is self.train else {"copies": self.samples.copies.count}
        return {
            "images": len(self.train),
            **copies,
            "held_out": 0 if self.nothing_held_out else len(self.held_out),
            "split": self.split,
            "framing": framing_facts(self.train.source, self.preprocess),
            "files": {part: report.as_json() for part, report in self.file_reports().items()},
        }

    def report_lines(self) -> list[str]:
        """The same as `facts`, as short lines of text."""
        apart = f"{len(self.held_out)} held out ({self.split})"
        if self.nothing_held_out:
            apart = "none held out, because each class has one image; what is measured on held-out images is measured on these"
        times = (
            "" if self.samples is self.train else f" ({self.samples.copies.count} copies of each, {len(self.samples)} in all)"
        )
        lines = [f"{len(self.train)} images to train on{times}, {apart}"]
        if self.split == "drawn per class" and not self.nothing_held_out:
            alone = int((torch.bincount(self.train.source.labels) == 1).sum())
            lines[0] += f"; {alone} classes have one image, which is trained on" if alone else ""
        for part, report in self.file_reports().items():
            lines += [line if part == "train" else f"{part}/: {line}" for line in report.lines()]
        return lines + framing_lines(framing_facts(self.train.source, self.preprocess))

    def print_report(self) -> None:
        """Print the lines on stderr, the first time that it is called, on the first process."""
        if processes.rank() == 0 and not self._printed:
            for line in self.report_lines():
                tqdm.write(printable(f"data {self.train.source.name}: {line}"), file=sys.stderr)
        self._printed = True

    def then_print_report(self, progress: Callable[[int, int], None] | None) -> Callable[[int, int], None]:
        """A progress(done, total) function that also calls `print_report`: then work has begun, and nothing is refused."""

        def report(done: int, total: int) -> None:
            if progress:
                progress(done, total)
            self.print_report()

        return report

    def batches(self, seed: int, batch_size: int, start_step: int, accelerator) -> Batches:
        """Endless training batches of this process, from the given step on. batch_size: of all processes together."""
        return Batches(
            self.samples,
            batch_size,
            seed,
            start_step * batch_size,
            accelerator.process_index,
            accelerator.num_processes,
            self.workers,
            self.flips,
        )

    def held_out_rows(self, count: int) -> Tensor:
        """The places of `count` held-out images, or of all, evenly spread: int64 [B]."""
        n = len(self.held_out)
        return torch.linspace(0, n - 1, min(count, n)).long()

    def held_out_batch(self, count: int) -> tuple[Tensor, Tensor | None]:
        """(images [B, C, H, W], labels [B] or None) of `count` held-out images, or all, evenly spread; always the same ones."""
        if count not in self._held_out_batches:
            self._held_out_batches[count] = self.held_out.batch(self.held_out_rows(count))
        return self._held_out_batches[count]

    def held_out_captions(self, count: int) -> list[str] | None:
        """The first caption of each image of `held_out_batch(count)`; None where the data set has no captions."""
        texts = self.held_out.captions()
        return None if texts is None else [texts[i][0] for i in self.held_out_rows(count).tolist()]


def _limited(indices: Tensor | None, limit: int | None) -> Tensor | None:
    """The indices, or `limit` of them, spread evenly: as images are sorted by class and name, each class keeps its share."""
    if limit is None or indices is None or len(indices) <= limit:
        return indices
    return indices[torch.linspace(0, len(indices) - 1, limit, dtype=torch.float64).long()]


def _open(config: DataConfig, part: str) -> ImageSource:
    columns, background = columns_of(config), config.background
    return open_source(config.source, part, config.channels, config.max_bad_share, columns, config.streaming, background)


def columns_of(config: DataConfig) -> Columns:
    """The columns of images, labels, captions and pairs that a data section names, and its caption for images without one."""
    return Columns(config.image_column, config.label_column, config.text_column, config.caption, config.pair_column)


def sweep(dataset: ImageDataset, batch_size: int, rank: int = 0, world: int = 1) -> Iterator[Tensor]:
    """All images of a dataset once, in order, as [B, C, H, W]. With several processes, each takes every world-th batch."""
    for indices in torch.arange(len(dataset)).split(batch_size)[rank::world]:
        yield dataset.batch(indices)[0]
