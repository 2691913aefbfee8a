"""What a fit runs on: the device, its name and memory, and how long a training step of a network takes there."""

from __future__ import annotations

import gc
import os
import platform
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from latentdiff.utils import processes

GIB = 2**30
BUSY = 1.2  # load of a core from which on other programs take a good part of the time
CPUINFO = Path("/proc/cpuinfo")
ROUNDS = 3  # steps that are timed
ENCODED = 16  # pictures that are encoded to time it
BFLOAT16_FLAGS = ("avx512_bf16", "amx_bf16", "bf16")  # of x86 and ARM processors that compute in bfloat16


@dataclass(frozen=True)
class Machine:
    """A machine, as far as it decides what can be trained on it.

    Attributes:
        device: of torch, such as "cpu" or "cuda:0".
        name: of the GPU, or of the processor.
        cores: processors that this process may use.
        threads: of torch.
        memory: bytes, of the GPU or of the machine.
        bfloat16: whether the device has instructions for it; what is faster is measured.
        processes: of this launch, which share the batch.
        load: processes that wanted a processor over the last minute, for each core; about 1 where one program uses it all.
    """

    device: str
    name: str
    cores: int
    threads: int
    memory: int
    bfloat16: bool
    processes: int = 1
    load: float = 0.0

    @property
    def gpu(self) -> bool:
        return not self.device.startswith("cpu")

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    def line(self) -> str:
        """The machine in one line."""
        if self.gpu:
            several = f"{self.processes} of " if self.processes > 1 else ""
            return f"{several}{self.name} ({self.device}), {self.memory / GIB:.0f} GiB"
        kind = "with" if self.bfloat16 else "without"
        busy = f"; busy with other work (load {self.load:.1f} a core), so times are long" if self.load > BUSY else ""
        return f"{self.name}, {self.cores} cores, {self.memory / GIB:.0f} GiB, {kind} bfloat16 instructions, no GPU{busy}"


@dataclass(frozen=True)
class Timing:
    """How long a training step takes.

    Attributes:
        precision: the faster one.
        seconds: of a step in it.
        batch: samples of a step.
    """

    precision: str
    seconds: float
    batch: int


def measure() -> Machine:
    """The machine that this process runs on. It takes no longer than importing torch."""
    import psutil
    import torch

    device = processes.pick_device()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    count, threads = processes.count(), torch.get_num_threads()
    if device.type == "cuda":
        facts = torch.cuda.get_device_properties(device)
        bfloat16 = torch.cuda.is_bf16_supported(including_emulation=False)
        return Machine(str(device), facts.name, cores, threads, facts.total_memory, bfloat16, count)
    name, flags = _processor()
    memory = psutil.virtual_memory().total
    bfloat16 = any(flag in flags for flag in BFLOAT16_FLAGS)
    load = round(psutil.getloadavg()[0] / cores, 2)
    return Machine(str(device), name, cores, threads, memory, bfloat16, count, load)


def _processor() -> tuple[str, set[str]]:
    """(name, flags) of the processor; a name of the architecture alone where the system tells no more."""
    try:
        lines = CPUINFO.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    values = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    name = values.get("model name") or platform.processor() or platform.machine() or "unknown processor"
    return name, set((values.get("flags") or values.get("Features") or "").split())


def time_steps(trial: Any, device: str, batch: int, precision: str | None = None, patience: float = 5.0) -> Timing | None:
    """How long a training step takes, and in which precision it is faster; None where it does not fit in memory.

    It takes about three times `patience`, however busy the machine is. Where a step takes longer than that, its time follows
    from one on fewer samples.

    Args:
        trial: makes the steps, as of `latentdiff.training.precision.measure`.
        device: of torch.
        batch: samples of a step of one process.
        precision: the one to measure; None: each that the device may be faster in.
        patience: seconds after which no further step begins.
    """
    import torch

    from latentdiff.training.precision import PROBE, OneProcess, candidates, choose_precision

    where = torch.device(device)
    names = [precision] if precision is not None else candidates(where)
    probe = min(PROBE, batch)
    with torch.random.fork_rng(devices=[where] if where.type == "cuda" else []):
        try:
            step = trial(OneProcess(where))
            # A few samples tell the precisions apart
            timings: dict[str, float] = {}
            start = time.perf_counter()
            for name in names:
                timings[name] = _least(partial(step, name, probe), where, patience / len(names))
                if time.perf_counter() - start > patience:
                    break
            chosen = choose_precision(timings)
            # The step as it will be
            seconds = timings[chosen] * batch / probe
            if batch > probe and seconds < patience:
                seconds = _least(partial(step, chosen, batch), where, patience)
        except RuntimeError as error:
            if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
                raise
            return None
        finally:
            gc.collect()
            if where.type == "cuda":
                torch.cuda.empty_cache()
    return Timing(chosen, seconds, batch)


def _least(step: Callable[[], None], device: Any, patience: float) -> float:
    """Seconds of the quickest of ROUNDS steps, after one that warms up; of those begun before `patience` seconds, and of one.

    The first step may take several times as long as the others, so it tells nothing.
    """
    from latentdiff.training.dry_run import seconds_of

    seconds = [seconds_of(step, device) for _ in range(2)]
    while len(seconds) <= ROUNDS and sum(seconds) < patience:
        seconds.append(seconds_of(step, device))
    return min(seconds[1:])


def time_encoding(codec: Any, size: tuple[int, int]) -> float:
    """Seconds that an autoencoder takes to encode one picture of size (height, width), on the device where it is."""
    import torch

    pictures = torch.zeros(ENCODED, codec.image_channels, *size)

    def encode() -> None:
        with torch.no_grad():
            codec.moments(pictures)

    return _least(encode, codec.device, 3.0) / ENCODED
