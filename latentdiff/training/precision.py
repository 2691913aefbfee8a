"""The precision of a run. `train.precision: auto` is measured when the run starts, and then kept.

A processor without bfloat16 instructions takes several times as long in bfloat16 as in float32; one with them takes less.
Only a measurement tells them apart, so a few steps of the run's own network are timed in each precision.
"""

from __future__ import annotations

import gc
import json
import statistics
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from latentdiff.config import Section
from latentdiff.errors import UserError
from latentdiff.training.accelerator import PRECISIONS
from latentdiff.training.dry_run import seconds_of
from latentdiff.training.run_folder import first_difference

AUTO = "auto"
TIE = 1.05  # float32 is kept unless another precision is faster by more than this factor
PROBE = 8  # samples of the first steps timed: enough where one precision is far slower than the other
CLEAR = 2.0  # a factor between two precisions that a larger batch does not reverse
ROUNDS = 3  # steps timed in each precision, by turns
SAFE = 32  # samples that are timed while it is not known how many fit in memory
PATIENCE = 6.0  # seconds after which no further round begins

# step(precision, batch): one training step on `batch` random samples. A trial makes it, with networks of its own.
Step = Callable[[str, int], None]
Trial = Callable[["OneProcess"], Step]


class OneProcess:
    """What the trainers need of an Accelerator, for one process by itself, in a precision that can be switched.

    The main process measures while the others wait, so nothing here may communicate with them.
    """

    num_processes, process_index, is_main_process = 1, 0, True

    def __init__(self, device: torch.device):
        from accelerate.utils import DistributedType

        self.device, self.precision, self.distributed_type = device, "float32", DistributedType.NO

    def autocast(self, *options: Any) -> torch.autocast:
        return torch.autocast(self.device.type, getattr(torch, self.precision), enabled=self.precision != "float32")

    def prepare(self, *objects: Any) -> Any:
        """Modules on the device and under autocast, as accelerate has them; optimizers as they are."""
        for module in objects:
            if isinstance(module, nn.Module):
                module.to(self.device)
                self._cast(module)
        return objects if len(objects) > 1 else objects[0]

    def _cast(self, module: nn.Module) -> None:
        from accelerate.utils import convert_outputs_to_fp32

        forward = module.forward

        def under_autocast(*inputs: Any, **keywords: Any) -> Any:
            with self.autocast():
                return forward(*inputs, **keywords)

        module.forward = convert_outputs_to_fp32(under_autocast)

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def gather(self, tensor: Tensor) -> Tensor:
        return tensor

    def reduce(self, tensor: Tensor, reduction: str = "sum") -> Tensor:
        return tensor


def choose_precision(timings: Mapping[str, float]) -> str:
    """The precision to train in, given {precision: seconds per sample}: the fastest, or float32 if it is almost as fast.

    float32 may take up to TIE times as long as the fastest: its results are more exact, and noise shall not decide.
    """
    fastest = min(timings, key=lambda name: timings[name])
    if "float32" in timings and timings["float32"] <= TIE * timings[fastest]:
        return "float32"
    return fastest


def resolve(config: Any, output: Path, accelerator: Any, trial: Trial, resume: bool = False) -> tuple[Any, str]:
    """(the config with a precision instead of auto, that precision with the reason for it). Every process gets the same.

    With auto, a run that is resumed, or started again in its own folder, keeps the precision in run.json. Otherwise the main
    process times steps on as many samples as one process takes through the network at once.

    Args:
        config: of any stage.
        output: the run's folder.
        accelerator: the run's.
        trial: makes the steps to time, given a `OneProcess`.
        resume: whether the run is resumed.
    """
    if config.train.precision != AUTO:
        return config, config.train.precision
    answer: list[Any] = [None]
    if accelerator.is_main_process:
        kept = _recorded(config, output, resume)
        if kept is not None:
            answer = [(kept, f"{kept} (auto: kept from {output / 'run.json'})")]
        else:
            answer = [measure(trial, accelerator.device, _largest_batch(config.train, accelerator.num_processes))]
    if accelerator.num_processes > 1:
        from accelerate.utils import broadcast_object_list

        broadcast_object_list(answer)
    chosen, words = answer[0]
    return named(config, chosen), words


def named(config: Any, precision: str, batch: int | None = None) -> Any:
    """A copy of the config with this precision and, where given, this batch size."""
    changes: dict[str, Any] = {"precision": precision} | ({} if batch is None else {"batch_size": batch})
    return config.model_copy(update={"train": config.train.model_copy(update=changes)})


def _largest_batch(train: Any, processes: int) -> int:
    """Samples that one process takes through the network at once."""
    share = max(1, train.batch_size // processes)
    micro = getattr(train, "micro_batch", None)
    # What fits in memory is looked for once the precision is known; until then a modest batch
    return min(share, SAFE if micro == AUTO else micro or share)


def check_state(meta: Mapping[str, Any], config: Any, output: Path) -> None:
    """UserError where a training state was made in another precision than the run has now. meta: the state's."""
    before = meta.get("precision", config.train.precision)
    if before != config.train.precision:
        raise UserError(
            f"{output / 'state'}: was made with train.precision={before}, and {output / 'run.json'} says "
            f"{config.train.precision}; set train.precision there to {before}"
        )


def _recorded(config: Section, output: Path, resume: bool) -> str | None:
    """The precision in run.json, if that is of this same run. Records older than the key are of float32 runs."""
    try:
        record = json.loads((output / "run.json").read_text(encoding="utf-8"))
        before = record["train"].get("precision", "float32")
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return None
    if before not in PRECISIONS or not (resume or first_difference(record, config) is None):
        return None
    return before


def candidates(device: torch.device) -> list[str]:
    """The precisions that are worth measuring on a device."""
    if device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        return ["float32"]
    return ["float32", "bfloat16"]  # float16 needs care with the range of numbers, so it is asked for by name


def measure(trial: Trial, device: torch.device, batch: int) -> tuple[str, str]:
    """(the precision to train in, the same with the reason in words), from steps timed in each precision by turns.

    It takes a few seconds. Where one precision is far slower on a small batch, that decides; otherwise `batch` samples do.
    The global random state stays as it was.
    """
    names = candidates(device)
    if len(names) == 1:
        return names[0], f"{names[0]} (auto: the device computes in no other)"
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        try:
            timings = _timed(trial(OneProcess(device)), device, names, batch)
        except RuntimeError as error:
            if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
                raise
            # A network that will be sharded may not fit on one device. On a GPU bfloat16 is fast, and saves memory
            chosen = "bfloat16" if device.type == "cuda" else "float32"
            timings, words = {}, f"{chosen} (auto: not measured, the network alone fills the memory)"
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    if not timings:
        return chosen, words
    chosen = choose_precision(timings)
    others = ", ".join(f"{1 / seconds:.3g} in {name}" for name, seconds in timings.items() if name != chosen)
    return chosen, f"{chosen} (auto: measured {1 / timings[chosen]:.3g} img/s against {others})"


def _timed(step: Step, device: torch.device, names: list[str], batch: int) -> dict[str, float]:
    """{precision: seconds per sample}, medians over rounds: on a small batch if the difference is clear, else on `batch`."""
    began, timings = time.perf_counter(), dict[str, float]()
    for size in dict.fromkeys((min(PROBE, batch), batch)):
        seconds: dict[str, list[float]] = {name: [] for name in names}
        for name in names:
            step(name, size)
        for _ in range(ROUNDS):
            for name in names:
                seconds[name].append(seconds_of(partial(step, name, size), device) / size)
            if time.perf_counter() - began > PATIENCE:
                break
        timings = {name: statistics.median(several) for name, several in seconds.items()}
        if max(timings.values()) > CLEAR * min(timings.values()) or time.perf_counter() - began > PATIENCE:
            break
    return timings


def plain_steps(alone: OneProcess, network: nn.Module, loss: Callable[[nn.Module, int], Tensor]) -> Step:
    """step(precision, batch) of a trainer with one network and AdamW. loss: (network, batch) -> scalar, on random inputs."""
    network.to(alone.device).train()
    optimizer = torch.optim.AdamW(network.parameters(), fused=True)

    def step(precision: str, batch: int) -> None:
        alone.precision = precision
        with alone.autocast():
            value = loss(network, batch)
        value.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step
