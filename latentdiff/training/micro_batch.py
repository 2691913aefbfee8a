"""`train.micro_batch: auto`: the most samples that a process can take through its network at once, found by trying.

A micro batch changes memory and speed alone: gradients are summed over the pieces, and all that is random belongs to the
sample. So what is found need not be kept: a resumed run looks again.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable
from typing import Any

import torch

from latentdiff.errors import UserError

AUTO = "auto"
FULL = 0.9  # share of the memory that may be in use: blocks come apart in a long run, and pictures take some too


def largest(share: int, attempt: Callable[[int], None], room: Callable[[int], bool]) -> int:
    """The largest of share, share / 2, share / 4, ... (rounded up) with which a step fits in memory.

    Sizes grow from 1, doubling, as long as `room(size)` says that the next one is worth trying; so a machine that would
    rather end a process than refuse memory is never filled. attempt(size): forward and backward of so many samples, and
    nothing kept. UserError where even one sample does not fit.
    """
    sizes = [share]
    while sizes[-1] > 1:
        sizes.append(-(-sizes[-1] // 2))
    found = 0
    for size in reversed(sizes):
        if found and not room(size):
            break
        try:
            attempt(size)
        except RuntimeError as error:
            if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
                raise
            break
        finally:
            gc.collect()
        found = size
    if not found:
        raise UserError(
            "train.micro_batch: not even one sample fits in memory; set train.gradient_checkpointing=true, or make model or "
            "data.size smaller"
        )
    return found


class Room:
    """Whether the next size is likely to fit: the memory of a step grows in proportion to its samples.

    device: a GPU's own memory is counted by torch; on the CPU the memory the system has left is.
    reserved: bytes that the run will take later, such as an optimizer's moments before the first step.
    """

    def __init__(self, device: torch.device, reserved: int):
        self.device, self.reserved = device, reserved
        self.sizes: list[tuple[int, int]] = []
        self.start = self._used()

    def _used(self) -> int:
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        import resource  # absent on Windows, where the largest size is tried at once

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024

    def _free(self) -> int:
        """Bytes that are still to be had."""
        if self.device.type == "cuda":
            free, _ = torch.cuda.mem_get_info(self.device)
            held = torch.cuda.memory_reserved(self.device) - torch.cuda.memory_allocated(self.device)
            return free + held
        import psutil

        return psutil.virtual_memory().available

    def measured(self, size: int) -> None:
        """Note what a step of this size took at its peak."""
        self.sizes.append((size, self._used() - self.start))

    def __call__(self, size: int) -> bool:
        if not self.sizes:
            return True
        before, taken = self.sizes[-1]
        expected = max(0, taken) * size / before
        return expected + self.reserved <= FULL * (self._free() + max(0, taken) * (self.device.type == "cpu"))


def resolve(config: Any, accelerator: Any, attempt: Callable[[int], None], reserved: int) -> Any:
    """The config with train.micro_batch as a number, the same on every process. Every process calls it.

    attempt(size): see `largest`; it must not call for other processes. The random state is left as it was.
    """
    if config.train.micro_batch != AUTO:
        return config
    share = config.train.batch_size // accelerator.num_processes
    device = accelerator.device
    room = Room(device, reserved)

    def measured(size: int) -> None:
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        try:
            attempt(size)
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
            raise
        room.measured(size)

    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        found = largest(share, measured, room)
    if device.type == "cuda":
        torch.cuda.empty_cache()
    if accelerator.num_processes > 1:
        least = accelerator.gather(torch.tensor([found], device=device)).min()
        found = int(least)
    accelerator.print(
        f"train.micro_batch: {found} of {share} samples at a time (auto: the most that fit in memory)", file=sys.stderr
    )
    return config.model_copy(update={"train": config.train.model_copy(update={"micro_batch": found})})
