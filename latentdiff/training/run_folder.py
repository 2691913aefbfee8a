"""The output folder of a training run: who may write to it, its record `run.json`, and what --resume may change."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from latentdiff.config import Section, keep_split
from latentdiff.errors import UserError, printable
from latentdiff.training import state
from latentdiff.utils import atomic, locks, processes, progress_bars, signals

# Keys that may change on --resume: they change neither what is trained nor the order of the data
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
    "condition.image.folder",
    "train.steps",
    "train.minutes",
    "train.picture_minutes",
    "train.snapshot_minutes",
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
    "train.trackers",
    "cache.check",
)


@contextlib.contextmanager
def locked_run_folder(output: Path, config: Section, resume: bool) -> Iterator[bool]:
    """Lock the output folder for this run, check it, and remove what a killed run left half written.

    Yields whether there is a state to resume from. Every process calls it, after the accelerator was made. UserError
    where another run writes there now, or `check_output` refuses the folder.
    """
    with locks.locked(output):
        resumes = check_output(output, config, resume)
        processes.meet()
        if processes.rank() == 0:
            atomic.sweep(output)
            if resume and not resumes:
                progress_bars.print_line(f"{output}: no state was saved yet; the run starts from its beginning")
        processes.meet()
        yield resumes


def check_output(output: Path, config: Section, resume: bool) -> bool:
    """Refuse to overwrite another run, and to resume one whose config differs in a key outside FREE_ON_RESUME.

    Returns whether there is a state to resume from. A run that was killed before its first state starts from the
    beginning, with or without --resume.
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
    with _damage_named(record):
        tree = json.loads(record.read_text(encoding="utf-8"))
        keep_split(config, tree)
        key = first_difference(tree, config)
    if key is not None:
        raise UserError(f"{record}: {key} differs from the config given; --resume continues the same run")
    if not folders and products:
        raise UserError(f"{output / 'state'}: no training state to resume from, and {products[0].name} is finished")
    return bool(folders)


def recorded_config(output: Path, cls: type[Section]) -> Section:
    """The config of the run in a folder, read from run.json. UserError where there is none, or it cannot be read.

    cls: the config class of the run's stage. Keys that are newer than the run get the values its version used.
    """
    record = output / "run.json"
    if not record.is_file():
        raise UserError(f"{record}: not found, so {output} holds no training run")
    with _damage_named(record):
        tree = json.loads(record.read_text(encoding="utf-8"))
        return cls.model_validate({**_with_old_rules(tree, cls), "output": str(output)})


def write_config(output: Path, config: Section, resumed: bool = False) -> None:
    """Write run.json. For a resumed run, first print each key that differs from the run's record."""
    if resumed:
        before = _flat(_with_defaults(json.loads((output / "run.json").read_text(encoding="utf-8")), config))
        for key, value in sorted(_flat(config.model_dump(mode="json")).items()):
            # What auto chose is in the record, so auto itself is no change
            if key.startswith(FREE_ON_RESUME) and key != "output" and value not in (before.get(key), "auto"):
                progress_bars.print_line(printable(f"{output}: goes on with {key}={value} (was {before.get(key)})"))
    atomic.write_json(output / "run.json", config.model_dump(mode="json"))


def first_difference(record: dict[str, Any], config: Section) -> str | None:
    """The first key, dotted, in which a run's record differs from a config; None where they describe the same run.

    Keys in FREE_ON_RESUME do not count. train.precision=auto equals any precision: the run keeps the one it has.
    """
    before, now = _flat(_with_defaults(record, config)), _flat(config.model_dump(mode="json"))
    for key in sorted({**before, **now}):
        if key == "train.precision" and now.get(key) == "auto":
            continue
        if before.get(key) != now.get(key) and not key.startswith(FREE_ON_RESUME):
            return key
    return None


def how_to_continue(config: Section) -> str:
    """How a user continues a run that a signal ended: the command, or the call in Python."""
    step = state.newest_step(Path(config.output))  # type: ignore[attr-defined]
    if step is None:
        line = signals.command(python="train(config)", without=("--resume",))
        return f"no state was saved yet; start again with: {line}"
    return f"the state of step {step} is saved; go on with: {signals.command(['--resume'], 'train(config, resume=True)')}"


@contextlib.contextmanager
def _damage_named(record: Path) -> Iterator[None]:
    try:
        yield
    except (ValueError, AttributeError, RecursionError) as error:
        raise UserError(f"{record}: damaged ({' '.join(str(error).split())[:80]}), so nothing says what run this is") from None


def _with_defaults(tree: dict[str, Any], config: Section) -> dict[str, Any]:
    """A run's record with defaults for the keys that came after it. A record that is not valid any more stays as it is."""
    tree = _with_old_rules(tree, type(config))
    try:
        return type(config).model_validate(tree).model_dump(mode="json")
    except ValidationError:
        return tree


def _with_old_rules(tree: dict[str, Any], cls: type[Section]) -> dict[str, Any]:
    """A run's record with the values that older versions used, for keys whose default of today is another one."""
    condition = tree.get("condition", {})
    if "condition" in cls.model_fields and isinstance(condition, dict):
        # Before there was this key, class and text were never dropped together
        tree = {**tree, "condition": {"joint_dropout": 0.0, **condition}}
    data = tree.get("data")
    if isinstance(data, dict) and "held_out" in data:
        # Before there was this key, held-out images were drawn at random
        tree = {**tree, "data": {"held_out_rule": "random", **data}}
    return tree


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dicts as one dict with dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat
