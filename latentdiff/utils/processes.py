"""Where work runs: on which device, in which process of a launch, and how processes share images and collect them.

A launcher (`accelerate launch`, torchrun) tells a process its place by environment variables. Reading them needs no torch,
so a light command can. The processes are joined (torch.distributed, gloo) only where they first wait for one another. What
they exchange are arrays in main memory, so it is the same on every kind of device.

accelerate's `PartialState` is not used here: it imports torch and joins the processes when it is made, its
`split_between_processes` would cut batches, and its `gather` holds everything on every process.
"""

from __future__ import annotations

import atexit
import functools
import os
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from latentdiff.errors import ReportedElsewhere, UserError
from latentdiff.utils import progress_bars

if TYPE_CHECKING:
    import numpy as np
    import torch

LIMIT = timedelta(hours=2)  # how long a process waits for the slowest one
PATIENCE = 10.0  # seconds in which the first process reports a mistake that all of them make
CHUNK = 2**24  # bytes that a process sends at a time
# torch (2.13, gloo) ends a group while it holds Python's lock, and waits for a thread that needs this lock to let go of the
# last collective. So many seconds without the lock are thousands of times what the thread takes
SETTLED = 0.25


def count() -> int:
    """The number of processes of this launch; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1")) if int(os.environ.get("LOCAL_RANK", "-1")) >= 0 else 1


def rank() -> int:
    """The number of this process in its launch, from 0. Only process 0 prints, and writes what is one file."""
    return int(os.environ.get("RANK", "0")) if count() > 1 else 0


def share(total: int, batch: int, of: int | None = None) -> slice:
    """Which of `total` images, made in batches of `batch`, belong to this process, or to the process with rank `of`.

    Batches are never cut: an image depends on its batch in the last bit, so a cut batch would now and then change a pixel by
    one level. So several processes make exactly what one makes. Shares differ by at most one batch, and process 0 is never
    without one.
    """
    place = rank() if of is None else of
    batches = -(-total // batch)
    first, last = (-(-batches * k // count()) * batch for k in (place, place + 1))
    return slice(min(first, total), min(last, total))


def pick_device(name: str = "auto") -> torch.device:
    """The device of that name: "auto", "cpu", or torch's name of another, such as "cuda" or "cuda:1".

    auto is an accelerator if there is one, and a different one for each process of a launch. It is the CPU where
    accelerate's own switch ACCELERATE_USE_CPU is set. UserError, listing the devices, for one that this machine lacks.
    """
    import torch

    cpu = torch.device("cpu")
    kind = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    devices = [torch.device(kind.type, k) for k in range(torch.accelerator.device_count())] if kind is not None else []
    own = devices[int(os.environ.get("LOCAL_RANK", "0")) % len(devices) if count() > 1 else 0] if devices else cpu
    use_cpu = os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes", "y", "on", "t")
    valid = {"auto": cpu if use_cpu else own, "cpu": cpu, own.type: own, **{str(device): device for device in devices}}
    if name not in valid:
        raise UserError(f"--device {name}: is no device of this machine; valid: {', '.join(valid)}")
    return valid[name]


def holds_float64(device: torch.device) -> bool:
    """Whether a device has float64. latentdiff's samplers compute noise schedules in it."""
    import torch

    try:
        torch.zeros(1, dtype=torch.float64, device=device)
    except (TypeError, RuntimeError):
        return False
    return True


def announce(command: str, device: torch.device, total: int, batch: int) -> None:
    """Print on stderr which processes and which device make the images, unless it is one process on the CPU.

    command: its name. device: of the models. total, batch: the number of images, in all and in a batch.
    """
    if rank() == 0 and (count() > 1 or device.type != "cpu"):
        batches = -(-total // batch)
        advice = f"; {batches} batch(es) to share, a smaller --batch-size makes more" if batches < count() else ""
        progress_bars.print_line(f"latentdiff {command}: {count()} process(es), device {device}{advice}")


def meet() -> None:
    """Wait until every process of the launch has called this; at most LIMIT. Returns at once where there is one process."""
    if count() > 1:
        import torch.distributed as dist

        dist.barrier(_group())


def agree(value: bool) -> bool:
    """The value that process 0 passes, on every process. All of them must call it."""
    if count() == 1:
        return value
    import torch
    import torch.distributed as dist

    decision = torch.tensor([value], dtype=torch.uint8)
    dist.broadcast(decision, 0, _group())
    return bool(decision.item())


def raise_together(problem: UserError | None) -> None:
    """Where process 0 has a mistake, raise it there, and `ReportedElsewhere` on the other processes. All of them must call it.

    problem: the mistake, or None; only that of process 0 counts.
    """
    if not agree(problem is None):
        raise problem or ReportedElsewhere("process 0 of this launch has reported a mistake")


def gather(own: np.ndarray, total: int, batch: int, take: Callable[[np.ndarray], None] | None = None) -> np.ndarray | None:
    """All `total` images [total, ...] in order, on process 0; None on the others.

    Args:
        own: the images of this process, its `share(total, batch)`.
        total: the number of images of all processes.
        batch: the number of images in a batch.
        take: called on process 0 with one piece of the images after another, in order, instead of keeping them all. The
            result is then None.
    """
    if count() == 1 and take is None:
        return own
    import numpy as np

    whole = None
    if rank() > 0:
        import torch
        import torch.distributed as dist

        for piece in _pieces(np.ascontiguousarray(own)):
            dist.send(torch.from_numpy(piece), 0, _group())
    elif take is not None:
        for piece in _in_order(own, total, batch):
            take(piece)
    else:
        whole = np.empty((total, *own.shape[1:]), own.dtype)
        filled = 0
        for piece in _in_order(own, total, batch):
            whole[filled : filled + len(piece)] = piece
            filled += len(piece)
    meet()
    return whole


def _in_order(own: np.ndarray, total: int, batch: int) -> Iterator[np.ndarray]:
    """The images of all processes in order, a piece at a time: those of process 0, which are given, then what others send."""
    import numpy as np
    import torch
    import torch.distributed as dist

    yield from _pieces(own)
    for sender in range(1, count()):
        part = share(total, batch, sender)
        # The memory of one image stands for all of them: pieces are cut as the sender cuts them
        for piece in _pieces(np.broadcast_to(own[:1], (part.stop - part.start, *own.shape[1:]))):
            received = np.empty_like(piece, order="C", subok=False)
            dist.recv(torch.from_numpy(received), sender, _group())
            yield received


def _pieces(images: np.ndarray) -> list[np.ndarray]:
    """Views of at most CHUNK bytes, but at least one image."""
    size = max(1, CHUNK // max(1, images[:1].nbytes))
    return [images[start : start + size] for start in range(0, len(images), size)]


def _group() -> Any:
    """All processes, joined by gloo."""
    import torch.distributed as dist

    if not dist.is_initialized():
        dist.init_process_group("gloo", timeout=LIMIT)
        leave_at_exit()
    world = dist.group.WORLD
    return world if dist.get_backend(world) == "gloo" else _gloo_beside(world)


@functools.cache
def _gloo_beside(world: Any) -> Any:
    """The same processes joined by gloo, where they were joined by another backend before, such as nccl."""
    import torch.distributed as dist

    return dist.new_group(backend="gloo", timeout=LIMIT)


@functools.cache
def leave_at_exit() -> None:
    """Have this process leave its launch when it ends, and not before.

    The processes of a launch join once. The launcher's store keeps the addresses of those who joined, also after they left.
    So a process that joins again may read where another one was before, and wait there for good.
    """
    atexit.register(leave)


def leave() -> None:
    """Leave the processes of a launch, where this process had joined them. It cannot join them again."""
    import torch.distributed as dist

    if dist.is_initialized():
        time.sleep(SETTLED)
        dist.destroy_process_group()
