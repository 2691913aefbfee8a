"""What both trainers share: processes and precision, the learning rate, logs, the clock that decides when to save."""

from __future__ import annotations

import contextlib
import functools
import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import nn

from latentdiff.config import OptimizerConfig, Section, TrainConfig, keep_split
from latentdiff.errors import UserError, printable
from latentdiff.training import distributed, state
from latentdiff.utils import atomic, locks, processes, signals

PRECISIONS = {"float32": "no", "bfloat16": "bf16", "float16": "fp16"}  # what can be asked for: accelerate's name for it
# Keys that may change when a run is resumed: they move neither what is trained nor the order of the data
FREE_ON_RESUME = (
    "output",
    "optimizer.",
    "sample.",
    "evaluate.",
    "validation_images",
    "data.workers",
    "cache.folder",
    "cache.batch_size",
    "cache.shard_size",
    "condition.text.folder",
    "train.steps",
    "train.threads",
    "train.log_every",
    "train.picture_every",
    "train.save_minutes",
    "train.keep",
    "train.micro_batch",
    "train.gradient_checkpointing",
    "train.compile",
    "train.bad_steps",
    "train.on_bad",
    "train.best",
    "train.snapshot_every",
    "train.timeout_minutes",
    "cache.check",
)


def start_accelerator(train: TrainConfig, shards: bool = False):
    """An Accelerator at the config's precision; `announcement` says what it has, once nothing can be refused.

    Where the precision is auto it is float32, until `precision.resolve` has named one: then start another.
    shards: whether the run can shard its network, where the launcher asks for that.
    """
    from accelerate import Accelerator, InitProcessGroupKwargs
    from accelerate.state import AcceleratorState

    distributed.check_launch(shards)
    # accelerate keeps the first run's precision for the life of the process, and refuses a second run in another
    AcceleratorState._reset_state()
    if train.threads is not None:
        torch.set_num_threads(train.threads)
    limit = timedelta(minutes=getattr(train, "timeout_minutes", 30.0))
    handlers = [InitProcessGroupKwargs(timeout=limit)]
    accelerator = Accelerator(mixed_precision=PRECISIONS.get(train.precision, "no"), kwargs_handlers=handlers)
    if train.precision == "float16":
        accelerator.native_amp = True  # accelerate would leave a CPU in float32, where torch can do it
        accelerator.scaler = None  # its own scaler takes one optimizer at a time; `LossScale` has one factor for all
    check_kind(str(accelerator.distributed_type.value))
    if train.batch_size % accelerator.num_processes:
        raise UserError(
            f"train.batch_size: {train.batch_size} (the global batch) cannot be shared by {accelerator.num_processes} "
            f"processes; use a multiple of {accelerator.num_processes}"
        )
    return accelerator


def check_kind(kind: str) -> None:
    """UserError for a way of sharing a run out, as accelerate names it, that is neither whole copies nor FSDP."""
    if kind not in ("NO", "FSDP") and not kind.startswith("MULTI_"):
        raise UserError(
            f"accelerate launch: {kind} is not supported; launch with --multi_gpu, or, where one device is too small for the "
            "U-Net, with --use_fsdp --fsdp_version 2"
        )


def meet(accelerator: Any) -> None:
    """Wait until every process is here and its thread has settled (see `processes.SETTLED`), ahead of the group's end."""
    accelerator.wait_for_everyone()
    if accelerator.num_processes > 1:
        time.sleep(processes.SETTLED)


def announcement(
    accelerator,
    train: TrainConfig,
    precision: str | None = None,
    command: str = "train",
    lines: Sequence[str] = (),
) -> Callable[[], None]:
    """A function that prints, the first time it is called, what the run really has: processes, device, precision.

    precision: in words, with the reason for it; None: the config's. lines: what follows it.
    """

    @functools.cache
    def announce() -> None:
        accelerator.print(
            f"latentdiff {command}: {accelerator.num_processes} process(es), device {accelerator.device}, "
            f"precision {precision or train.precision}, global batch {train.batch_size}, "
            f"{torch.get_num_threads()} CPU thread(s) per process"
            + (", the network sharded over them (FSDP2)" if distributed.sharded(accelerator) else ""),
            file=sys.stderr,
        )
        for line in lines:
            accelerator.print(printable(line), file=sys.stderr)

    return announce


def make_optimizer(parameters, config: OptimizerConfig) -> torch.optim.AdamW:
    return torch.optim.AdamW(
        parameters, lr=config.lr, betas=config.betas, weight_decay=config.weight_decay, eps=config.eps, fused=True
    )


def learning_rate(config: OptimizerConfig, step: int, steps: int) -> float:
    """The learning rate of step 0 <= step < steps: a pure function, so that a resumed run continues it exactly."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    done = (step - config.warmup_steps) / max(1, steps - config.warmup_steps)
    falling = min(1.0, (steps - step) / (config.decay_share * steps))
    shapes = {"constant": 1.0, "linear": 1.0 - done, "cosine": 0.5 * (1.0 + math.cos(math.pi * done)), "wsd": falling}
    shape = shapes[config.schedule]
    return config.lr * (config.final_share + (1.0 - config.final_share) * shape)


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr


def gradient_norm(module: nn.Module, clip: float | None) -> float:
    """Clip the gradient's norm to `clip` (None: measure only) and return what it was; of a sharded module, the whole one's."""
    norm = torch.nn.utils.clip_grad_norm_(module.parameters(), clip if clip is not None else math.inf)
    return float(distributed.whole(norm))


def recorded_config(output: Path, cls: type[Section]) -> Section:
    """The config of the run in a folder, with what its version took for granted; UserError where it cannot be read."""
    record = output / "run.json"
    try:
        tree = json.loads(record.read_text(encoding="utf-8"))
        return cls.model_validate({**_completed(tree, cls), "output": str(output)})
    except FileNotFoundError:
        raise UserError(f"{record}: not found, so {output} holds no training run") from None
    except (ValueError, AttributeError, RecursionError) as error:
        raise UserError(f"{record}: damaged ({' '.join(str(error).split())[:80]}), so nothing says what run this is") from None


@contextlib.contextmanager
def held(output: Path, config: Section, resume: bool) -> Iterator[bool]:
    """Have the output folder for this run alone, looked through; whether there is a state to go on from.

    Every process calls it, after the accelerator was made. What killed runs left in the folder is removed.
    """
    with locks.locked(output):
        restores = check_output(output, config, resume)
        processes.meet()
        if processes.rank() == 0:
            atomic.sweep(output)
            if resume and not restores:
                print(f"{output}: no state was saved yet; the run starts from its beginning", file=sys.stderr)
        processes.meet()
        yield restores


def check_output(output: Path, config: Section, resume: bool) -> bool:
    """Refuse to write over another run, and to resume one whose config differs in more than its length and logging.

    Returns whether there is a state to go on from: a run that was killed before its first one starts from the beginning,
    with --resume or without.
    """
    record, folders = output / "run.json", state.step_folders(output)
    products = [output / name for name in ("autoencoder", "model") if (output / name).is_dir()]
    if not resume:
        if state.newest_step(output) is not None:
            raise UserError(f"{output}: holds a training run already; continue it with --resume, or set output= elsewhere")
        if folders:
            problem = f"holds training states that are all damaged, such as {folders[-1].name}"
            raise UserError(f"{output}: {problem}; set output= elsewhere, or delete {output / 'state'}")
        if products:
            raise UserError(f"{products[0]}: is a finished model already; set output= elsewhere, or delete it")
        return False
    if not record.is_file():
        raise UserError(f"{record}: not found, so there is no run to resume; leave --resume out")
    try:
        tree = json.loads(record.read_text(encoding="utf-8"))
        keep_split(config, tree)
        key = first_difference(tree, config)
    except (ValueError, AttributeError, RecursionError) as error:
        raise UserError(f"{record}: damaged ({' '.join(str(error).split())[:80]}), so nothing says what run this is") from None
    if key is not None:
        raise UserError(f"{record}: {key} differs from the config given; --resume continues the same run")
    if not folders and products:
        raise UserError(f"{output / 'state'}: no training state to resume from, and {products[0].name} is finished")
    return bool(folders)


def first_difference(record: dict[str, Any], config: Section) -> str | None:
    """The first key by which a run's record is of another run than the config's; None where it is of the same.

    A precision of auto differs from none: the run keeps the one that it has.
    """
    before, now = _flat(_with_defaults(record, config)), _flat(config.model_dump(mode="json"))
    for key in sorted({**before, **now}):
        if key == "train.precision" and now.get(key) == "auto":
            continue
        if before.get(key) != now.get(key) and not key.startswith(FREE_ON_RESUME):
            return key
    return None


def _free_changes(output: Path, config: Section) -> list[str]:
    """Keys that may differ from the run's record, and do, so that a slip in the command is seen."""
    tree = _with_defaults(json.loads((output / "run.json").read_text(encoding="utf-8")), config)
    before, now = _flat(tree), _flat(config.model_dump(mode="json"))
    keys = [key for key in sorted(now) if key.startswith(FREE_ON_RESUME) and key != "output"]
    keys = [key for key in keys if before.get(key) != now[key] and now[key] != "auto"]  # what auto found is in the record
    return [f"{key}={now[key]} (was {before.get(key)})" for key in keys]


def _with_defaults(tree: dict[str, Any], config: Section) -> dict[str, Any]:
    """A run's config with the defaults of keys that came after it; as it is where it is not valid any more."""
    from pydantic import ValidationError

    tree = _completed(tree, type(config))
    try:
        return type(config).model_validate(tree).model_dump(mode="json")
    except ValidationError:
        return tree


def _completed(tree: dict[str, Any], cls: type[Section]) -> dict[str, Any]:
    """A run's record with what older versions took for granted, where their rule is not the default of today."""
    condition = tree.get("condition", {})
    if "condition" in cls.model_fields and isinstance(condition, dict):
        # Before there was this key, class and text were never dropped together
        tree = {**tree, "condition": {"joint_dropout": 0.0, **condition}}
    data = tree.get("data")
    if isinstance(data, dict) and "held_out" in data:  # one without a rule is of a version that knew no other
        tree = {**tree, "data": {"held_out_rule": "random", **data}}
    return tree


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dicts as one dict with dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


def goes_on(config: Section) -> str:
    """What a user does to go on with a run that a signal ended: the command, or the call under the Python API."""
    output = Path(config.output)  # type: ignore[attr-defined]
    step = state.newest_step(output)
    if step is None:
        line = signals.command(python="train(config)", without=("--resume",))
        return f"no state was saved yet; start again with: {line}"
    return f"the state of step {step} is saved; go on with: {signals.command(['--resume'], 'train(config, resume=True)')}"


@contextlib.contextmanager
def settings_kept() -> Iterator[None]:
    """What a run changes for the whole process comes back at the end: torch's threads and global random numbers."""
    threads = torch.get_num_threads()
    devices = range(torch.accelerator.device_count()) if torch.accelerator.is_available() else ()
    kind = torch.accelerator.current_accelerator()
    with torch.random.fork_rng(list(devices), device_type=kind.type if kind is not None else "cuda"):
        try:
            yield
        finally:
            torch.set_num_threads(threads)


def write_config(output: Path, config: Section, resumed: bool = False) -> None:
    """Record the config of a run. Of one that goes on, say first what it does otherwise than before."""
    for change in _free_changes(output, config) if resumed else ():
        print(printable(f"{output}: goes on with {change}"), file=sys.stderr)
    atomic.write_json(output / "run.json", config.model_dump(mode="json"))
