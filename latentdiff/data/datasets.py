"""The images of a source, brought to one shape: what the trainers, the metrics and the latent cache read."""

import hashlib
from collections.abc import Collection, Sequence

import numpy as np
import torch

from latentdiff.data.copies import ONCE, Copies
from latentdiff.data.image_source import ImageSource, UnreadableImage
from latentdiff.data.transforms import Preprocess
from latentdiff.errors import UserError


class ImageDataset:
    """The images of a source with a preprocessing applied.

    indices: which images of the source, in this order (default: all). split: the rule that chose the indices, where it is
    not the rule of earlier versions; a latent cache keeps it. copies: how often each image stands in the data set, one copy
    after another. Attributes: source, preprocess (with size and channels filled in from the source), copies, indices (int64
    [N]; each image stands copies.count times in it), class_names, labels (int64 [N] or None), blocks (as the source's, of
    these N images).
    """

    means_only = False  # a latent cache keeps mean and deviation of each posterior

    def __init__(
        self,
        source: ImageSource,
        preprocess: Preprocess,
        indices: torch.Tensor | Sequence[int] | None = None,
        split: str | None = None,
        copies: Copies = ONCE,
    ):
        self.source, self.preprocess, self.split, self.copies = source, preprocess.for_source(source), split, copies
        self._images = torch.arange(len(source)) if indices is None else torch.as_tensor(indices, dtype=torch.int64)
        self.indices = self._images.repeat_interleave(copies.count)
        self.class_names = source.class_names
        self.labels = None if source.labels is None else source.labels[self.indices]
        self.blocks = None if source.blocks is None else self._blocks(source.blocks)

    def _blocks(self, sizes: tuple[int, ...]) -> tuple[int, ...]:
        """How many of this data set's images lie in each of the source's blocks."""
        block = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))[self.indices]
        if bool((block.diff() < 0).any()):
            raise ValueError("indices of a streamed source must keep its order")
        return tuple(torch.bincount(block, minlength=len(sizes)).tolist())

    def __len__(self) -> int:
        return len(self.indices)

    def batch(
        self,
        indices: torch.Tensor | Sequence[int],
        *,
        flips: torch.Tensor | bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(images float32 [B, C, H', W'] in [-1, 1], labels int64 [B] | None) at the given indices of this data set.

        flips: bool or [B]; True mirrors left-right. An image that cannot be read is replaced, together with its label, by the
        next image of this data set that can. UserError where more images are bad than the source allows. Of an image that
        comes several times, as its copies, the pixels are read once.
        """
        index = torch.as_tensor(indices, dtype=torch.int64)
        mirrored = torch.as_tensor(flips).expand(len(index)).tolist()
        count = self.copies.count
        read = {i: self._read_or_next(i * count) for i in dict.fromkeys((index // count).tolist())}
        numbered = [read[i] for i in (index // count).tolist()]
        copies = (index % count).tolist()
        moves = [self.copies.move(j, copy) for (j, _), copy in zip(numbered, copies, strict=True)]
        images = self.preprocess.batch([image for _, image in numbered], mirrored, moves)
        labels = None if self.source.labels is None else self.source.labels[[j for j, _ in numbered]]
        return images, labels

    def pairs(self, indices: torch.Tensor | Sequence[int], *, flips: torch.Tensor | bool = False) -> torch.Tensor:
        """The pictures that are paired with images, prepared as the images are: float32 [B, C, H', W'] in [-1, 1].

        indices, flips: as in `batch`. Where an image cannot be read, it is the pair of its substitute.
        UserError where the images have no pairs, or one cannot be read.
        """
        index = torch.as_tensor(indices, dtype=torch.int64)
        mirrored = torch.as_tensor(flips).expand(len(index)).tolist()
        rows = [self._read_or_next(i)[0] for i in index.tolist()]
        return self.preprocess.batch([self.source.read_pair(j) for j in rows], mirrored)

    def _read_or_next(self, i: int) -> tuple[int, np.ndarray]:
        """(index in the source, image): image i of this data set, or the next one that can be read, from the start at the end.

        The substitute is always one of this data set, so a held-out image is never trained on. It depends on i alone, so the
        order of a run stays a function of its seed.
        """
        for step in range(len(self)):
            j = int(self.indices[(i + step) % len(self)])
            try:
                return j, self.source.read(j)
            except UnreadableImage:
                continue
        raise UserError(f"data '{self.source.name}': none of the {len(self)} images in use can be read")

    def captions(self, unreadable: Collection[str] = ()) -> list[tuple[str, ...]] | None:
        """The captions of every image, or None; of its substitute (see `batch`) where its file is among the unreadable."""
        texts = self.source.captions
        if texts is None:
            return None
        rows = self.indices.tolist()
        files = getattr(self.source, "files", [""] * len(self.source))
        read = [files[j] not in unreadable for j in rows]
        n, captions = len(rows), []
        for i in range(n):
            while not read[i % n]:
                i += 1
            captions.append(texts[rows[i % n]])
        return captions

    def fingerprint(self) -> str:
        """Hex sha256 of the source's content and of which of its images are used, whatever their copies."""
        return self._digest(self.source.fingerprint())

    def latents_fingerprint(self) -> str:
        """The fingerprint that a latent cache keeps; see ImageSource.latents_fingerprint."""
        return self._digest(self.source.latents_fingerprint())

    def _digest(self, content: str) -> str:
        return hashlib.sha256(content.encode() + self._images.numpy().tobytes()).hexdigest()
