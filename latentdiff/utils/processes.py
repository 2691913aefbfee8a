"""Where work is done: on which device, in which of the processes that a launcher started, and how their shares meet.

A launcher (`accelerate launch`, torchrun) says by environment variables who a process is. Nothing is initialised before
processes meet, and what meets are arrays in main memory, by gloo: so it is the same whatever the devices are.
"""

from __future__ import annotations

import atexit
import functools
import os
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from latentdiff.errors import UserError

if TYPE_CHECKING:
    import numpy as np
    import torch

LIMIT = timedelta(hours=2)  # how long a process waits for the slowest one
PATIENCE = 10.0  # seconds in which the first process says a mistake that all of them have found
CHUNK = 2**24  # bytes that a process sends at a time
# torch (2.13, gloo) ends a group with Python's lock held and waits for a thread that needs it to let go of the last
# collective: this many seconds without the lock are thousands of times what the thread takes
SETTLED = 0.25


def count() -> int:
    """How many processes share the work: 1 unless a launcher started several."""
    return int(os.environ.get("WORLD_SIZE", "1")) if int(os.environ.get("LOCAL_RANK", "-1")) >= 0 else 1


def rank() -> int:
    """Which of them this is, from 0. The first one alone prints, and writes what is one file."""
    return int(os.environ.get("RANK", "0")) if count() > 1 else 0


def share(total: int, batch: int, of: int | None = None) -> slice:
    """Which of `total` images, made in batches, are this process's, or that of rank `of`: neighbouring batches.

    Batches are never cut, for an image depends on its batch in the last bit, and a pixel then now and then by one level: so
    several processes make what one makes. Nobody has two batches more than another, and the first one is never idle.
    """
    place, processes, batches = rank() if of is None else of, count(), -(-total // batch)
    first, last = (-(-batches * k // processes) * batch for k in (place, place + 1))
    return slice(min(first, total), min(last, total))


def pick_device(name: str = "auto") -> torch.device:
    """The device of that name: auto (an accelerator if there is one, of several processes each its own), cpu, or torch's name.

    Under ACCELERATE_USE_CPU=true, accelerate's own switch, auto is the CPU. UserError for a device that is not here.
    """
    import torch

    cpu, kind = torch.device("cpu"), torch.accelerator.current_accelerator()
    number = torch.accelerator.device_count() if kind is not None and torch.accelerator.is_available() else 0
    there = [torch.device(kind.type, k) for k in range(number)] if kind is not None else []
    own = there[int(os.environ.get("LOCAL_RANK", "0")) % number if count() > 1 else 0] if there else cpu
    unwanted = os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes", "y", "on", "t")
    named = {"auto": cpu if unwanted else own, "cpu": cpu, own.type: own, **{str(device): device for device in there}}
    if name not in named:
        raise UserError(f"--device {name}: is no device of this machine; valid: {', '.join(named)}")
    return named[name]


def holds_float64(device: torch.device) -> bool:
    """Whether a device has float64, in which noise schedules are computed."""
    import torch

    try:
        torch.zeros(1, dtype=torch.float64, device=device)
    except (TypeError, RuntimeError):
        return False
    return True


def announce(command: str, device: torch.device, total: int, batch: int) -> None:
    """Say on stderr what a command has for so many images, where that is more than one process on the CPU."""
    if rank() == 0 and (count() > 1 or device.type != "cpu"):
        batches = -(-total // batch)
        few = f"; {batches} batch(es) to share, a smaller --batch-size makes more" if batches < count() else ""
        print(f"latentdiff {command}: {count()} process(es), device {device}{few}", file=sys.stderr)


def meet() -> None:
    """Wait until every process is here."""
    if count() > 1:
        import torch.distributed as dist

        dist.barrier(_group())


def agree(value: bool) -> bool:
    """What the first process says, on all of them."""
    if count() == 1:
        return value
    import torch
    import torch.distributed as dist

    said = torch.tensor([value], dtype=torch.uint8)
    dist.broadcast(said, 0, _group())
    return bool(said.item())


def gather(mine: np.ndarray, total: int, batch: int, take: Callable[[np.ndarray], None] | None = None) -> np.ndarray | None:
    """All `total` images [total, ...] on the first process, in order; None on the others, which are then done.

    mine: what this process has made, its `share(total, batch)`.
    take: called on the first process with one piece after another, in order, in the place of keeping them all; then the
    first process gets None too.
    """
    if count() == 1:
        if take is None:
            return mine
        for piece in _pieces(mine):
            take(piece)
        return None
    import numpy as np
    import torch
    import torch.distributed as dist

    group, own = _group(), share(total, batch)
    if rank() == 0 and take is not None:
        whole = None
        for piece in _pieces(mine):
            take(piece)
        for of in range(1, count()):
            part = share(total, batch, of)
            # The memory of one image stands for all, so that pieces are cut as the sender cuts them
            for piece in _pieces(np.broadcast_to(mine[:1], (part.stop - part.start, *mine.shape[1:]))):
                received = np.empty_like(piece, order="C", subok=False)
                dist.recv(torch.from_numpy(received), of, group)
                take(received)
    elif rank() == 0:
        whole = np.empty((total, *mine.shape[1:]), mine.dtype)
        whole[own] = mine
        for of in range(1, count()):
            for piece in _pieces(whole[share(total, batch, of)]):
                dist.recv(torch.from_numpy(piece), of, group)
    else:
        whole = None
        for piece in _pieces(np.ascontiguousarray(mine)):
            dist.send(torch.from_numpy(piece), 0, group)
    dist.barrier(group)
    return whole


def _pieces(images: np.ndarray) -> list[np.ndarray]:
    """Views of at most CHUNK bytes, but at least one image."""
    size = max(1, CHUNK // max(1, images[:1].nbytes))
    return [images[start : start + size] for start in range(0, len(images), size)]


def _group() -> Any:
    """All processes, joined by gloo."""
    import torch.distributed as dist

    if not dist.is_initialized():
        dist.init_process_group("gloo", timeout=LIMIT)
        atexit.register(_leave)
    world = dist.group.WORLD
    return world if dist.get_backend(world) == "gloo" else _beside(world)


@functools.cache
def _beside(world: Any) -> Any:
    """The same processes joined by gloo, where a caller has joined them by something else."""
    import torch.distributed as dist

    return dist.new_group(backend="gloo", timeout=LIMIT)


def _leave() -> None:
    import torch.distributed as dist

    time.sleep(SETTLED)
    if dist.is_initialized():
        dist.destroy_process_group()
