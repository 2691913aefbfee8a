"""The `accelerate.Accelerator` of a run: processes, device and precision, and what the run prints about them."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from typing import Any

import torch

from latentdiff.config import TrainConfig
from latentdiff.errors import UserError, printable
from latentdiff.training import distributed
from latentdiff.training.logging import check_trackers
from latentdiff.utils import processes, progress_bars

PRECISIONS = {"float32": "no", "bfloat16": "bf16", "float16": "fp16"}  # train.precision -> accelerate's name


def start_accelerator(train: TrainConfig, shards: bool = False) -> Any:
    """An `accelerate.Accelerator` in the config's precision. Call `announcement` later to print what it has.

    With train.precision=auto it computes in float32; `precision.resolve` then names a precision, and the caller starts a
    second one. shards: whether this run can shard its network where the launcher asks for it.

    Raises:
        UserError: the launcher asks for something that is not supported, or the batch cannot be split over the processes.
    """
    from accelerate import Accelerator, InitProcessGroupKwargs
    from accelerate.state import AcceleratorState

    distributed.check_launch(shards)
    check_trackers(train.trackers)
    # accelerate keeps the first run's precision for the life of the process, and refuses a second run in another one
    AcceleratorState._reset_state()
    if train.threads is not None:
        torch.set_num_threads(train.threads)
    timeout = timedelta(minutes=getattr(train, "timeout_minutes", 30.0))
    accelerator = Accelerator(
        mixed_precision=PRECISIONS.get(train.precision, "no"), kwargs_handlers=[InitProcessGroupKwargs(timeout=timeout)]
    )
    processes.leave_at_exit()
    if train.precision == "float16":
        accelerator.native_amp = True  # accelerate would leave a CPU in float32, although torch can do float16 there
        accelerator.scaler = None  # accelerate's scaler serves one optimizer at a time; `LossScale` has one factor for all
    check_distribution(str(accelerator.distributed_type.value))
    if train.batch_size % accelerator.num_processes:
        raise UserError(
            f"train.batch_size: {train.batch_size} (the global batch) cannot be shared by {accelerator.num_processes} "
            f"processes; use a multiple of {accelerator.num_processes}"
        )
    return accelerator


def check_distribution(kind: str) -> None:
    """UserError unless the run has one process, copies of the network on several (DDP), or shards of it (FSDP).

    kind: the value of an `accelerate.DistributedType`.
    """
    if kind not in ("NO", "FSDP") and not kind.startswith("MULTI_"):
        raise UserError(
            f"accelerate launch: {kind} is not supported; launch with --multi_gpu, or, where one device is too small for the "
            "U-Net, with --use_fsdp --fsdp_version 2"
        )


def announcement(
    accelerator: Any,
    train: TrainConfig,
    precision: str | None = None,
    command: str = "train",
    lines: Sequence[str] = (),
) -> Callable[[], None]:
    """A function that prints, the first time it is called, what the run really has: processes, device, precision, batch.

    precision: how to describe the precision, with the reason for it; None: the config's value. lines: printed after it.
    """

    @functools.cache
    def announce() -> None:
        if not accelerator.is_local_main_process:
            return
        progress_bars.print_line(
            f"latentdiff {command}: {accelerator.num_processes} process(es), device {accelerator.device}, "
            f"precision {precision or train.precision}, global batch {train.batch_size}, "
            f"{torch.get_num_threads()} CPU thread(s) per process"
            + (", the network sharded over them (FSDP2)" if distributed.sharded(accelerator) else "")
        )
        for line in lines:
            progress_bars.print_line(printable(line))

    return announce


@contextlib.contextmanager
def torch_settings_restored() -> Iterator[None]:
    """Within the block a run may change torch's thread count and global random state; afterwards both are as before."""
    threads = torch.get_num_threads()
    devices = range(torch.accelerator.device_count()) if torch.accelerator.is_available() else ()
    kind = torch.accelerator.current_accelerator()
    with torch.random.fork_rng(list(devices), device_type=kind.type if kind is not None else "cuda"):
        try:
            yield
        finally:
            torch.set_num_threads(threads)
