"""The order of the data: a pure function of seed and epoch, so that a run can stop anywhere and resume exactly.

Positions count samples, not batches or epochs. Position p of the endless stream is the same sample at any batch size and
on any number of processes.
"""

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache
from typing import Protocol

import numpy as np
import torch

from latentdiff.errors import UserError
from latentdiff.utils.random import derive_seed

Batch = tuple[torch.Tensor, torch.Tensor | None]
WINDOW = 4  # blocks whose samples are shuffled together


class Indexed(Protocol):
    """What `Batches` needs of a data set: its length, and batches, mirrored where `flips` is True."""

    def __len__(self) -> int: ...

    def batch(self, indices: torch.Tensor, *, flips: torch.Tensor | bool = False) -> Batch: ...


def permutation(n: int, seed: int, *parts: int | str) -> torch.Tensor:
    """A permutation of 0..n-1, int64 [n]. It depends on (n, seed, *parts) alone, not on the version of any library."""
    return torch.from_numpy(np.argsort(_mix(np.arange(n), seed, *parts), kind="stable"))


def stream(n: int, seed: int, start: int, count: int, blocks: tuple[int, ...] | None = None) -> torch.Tensor:
    """Sample indices at positions start..start+count-1 of the endless concatenation of shuffled epochs. int64 [count].

    Each epoch has each of the n samples once. blocks: the samples lie in blocks of these sizes, each of which is read as a
    whole; then the blocks are shuffled, and the samples within windows of WINDOW blocks. UserError for n = 0.
    """
    if n < 1:
        raise UserError("the data set has no images to draw from")
    pieces, position, end = [torch.empty(0, dtype=torch.int64)], start, start + count
    while position < end:
        epoch, offset = divmod(position, n)
        take = min(n - offset, end - position)
        pieces.append(_epoch_order(n, seed, epoch, blocks)[offset : offset + take])
        position += take
    return torch.cat(pieces)


def coin_flips(seed: int, start: int, count: int) -> torch.Tensor:
    """A fair coin for each position of the stream: whether the sample is mirrored there. bool [count]."""
    return torch.from_numpy(_mix(np.arange(start, start + count), seed, "flip") >> np.uint64(63) == 1)


class Batches:
    """Endless iterator of this process's (images, labels), from sample position `start` of the stream.

    The global batch at position p is stream(n, seed, p, global_batch). Process `rank` of `world` gets its rank-th slice, so
    N processes together get what one process would. flips: each sample is mirrored with probability 1/2. workers: threads
    that prepare batches ahead (decoding releases the interpreter lock); with 0, a batch is prepared when it is asked for.
    position: the first position that was not returned yet. Save it, and resume with start=position.
    """

    def __init__(
        self,
        dataset: Indexed,
        global_batch: int,
        seed: int,
        start: int = 0,
        rank: int = 0,
        world: int = 1,
        workers: int = 0,
        flips: bool = False,
    ):
        if global_batch < 1 or global_batch % world:
            raise UserError(f"global batch {global_batch} cannot be shared equally by {world} processes")
        self.dataset, self.global_batch, self.seed, self.flips = dataset, global_batch, seed, flips
        self.rank, self.world, self.position = rank, world, start
        self._ahead: deque[Future[Batch]] = deque()
        self._pool = ThreadPoolExecutor(workers, "batches") if workers else None
        self._depth = 2 * workers

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        if self._pool is None:
            batch = self._prepare(self.position)
        else:
            while len(self._ahead) < self._depth:
                position = self.position + len(self._ahead) * self.global_batch
                self._ahead.append(self._pool.submit(self._prepare, position))
            batch = self._ahead.popleft().result()
        self.position += self.global_batch
        return batch

    def close(self) -> None:
        """Drops the batches that were prepared ahead, and ends the threads."""
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
            self._ahead.clear()

    def _prepare(self, position: int) -> Batch:
        local = self.global_batch // self.world
        first = position + self.rank * local
        indices = stream(len(self.dataset), self.seed, first, local, getattr(self.dataset, "blocks", None))
        return self.dataset.batch(indices, flips=coin_flips(self.seed, first, local) if self.flips else False)


@lru_cache(maxsize=4)
def _epoch_order(n: int, seed: int, epoch: int, blocks: tuple[int, ...] | None = None) -> torch.Tensor:
    if blocks is None:
        return permutation(n, seed, "epoch", epoch)
    place = np.empty(len(blocks), dtype=np.int64)
    place[permutation(len(blocks), seed, "blocks", epoch).numpy()] = np.arange(len(blocks))
    window = np.repeat(place // WINDOW, blocks)  # [n]
    return torch.from_numpy(np.lexsort((_mix(np.arange(n), seed, "epoch", epoch), window)))


def _mix(values: np.ndarray, *parts: int | str) -> np.ndarray:
    """64 well-mixed bits for each value: the output function of SplitMix64 with a stream offset hashed from `parts`."""
    z = values.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(derive_seed("order", *parts))
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))
