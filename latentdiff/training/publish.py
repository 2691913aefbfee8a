"""`latentdiff publish`: a training state, or a snapshot of the averaged weights, becomes a checkpoint."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from latentdiff.config import AutoencoderConfig, DiffusionConfig, Section
from latentdiff.errors import UserError
from latentdiff.training import state
from latentdiff.training.accelerator import torch_settings_restored
from latentdiff.training.run_folder import first_difference, recorded_config
from latentdiff.utils import locks, processes, signals

STAGES: dict[str, type[Section]] = {"autoencoder": AutoencoderConfig, "diffusion": DiffusionConfig}
PRODUCTS = {"autoencoder": "autoencoder", "diffusion": "model"}  # the folder that a stage publishes, in its output folder


def publish(run_folder: str | Path, step: int | None = None, best: bool = False, out: str | Path | None = None) -> Path:
    """Publish one step of a training run of either stage, as the run would have done had it ended there.

    The averaged weights are those of a training state, or of a snapshot (train.snapshot_every). A step's learning rate is
    what the run had: where it falls over the run's length, a shorter run would have had another.

    Args:
        run_folder: a run's output folder. Its images, and in stage 2 its autoencoder, must still be where they were.
        step: the step of a state or of a snapshot. By default the newest whole state.
        best: publish the state that train.best kept, instead of a step.
        out: a new folder, or one that this run has published. By default model/ or autoencoder/ in the run's folder.

    Returns:
        The published folder.

    Raises:
        UserError: there is no such run or step, its data have changed, or `out` holds something else.
    """
    if processes.count() > 1:
        raise UserError("publish: runs in one process; start it without accelerate launch")
    output = Path(run_folder)
    config = _config(output)
    if step is not None and best:
        raise UserError("--step and --best: give one of them")
    folder = Path(out) if out is not None else output / PRODUCTS[config.stage]
    if out is not None:
        _check_out(folder, config)
    advice = "wait for it, or give --out another folder"
    held = locks.locked(output, advice) if out is None else locks.locked(folder, advice, beside=True)
    with torch_settings_restored(), signals.watched(signals.again), held:
        source = chosen(output, step, best)
        tensors, meta = state.load_folder(source)
        print(f"publishing step {meta['step']} of {output}", file=sys.stderr)
        try:
            if isinstance(config, AutoencoderConfig):
                from latentdiff.training.train_autoencoder import publish_state as publish_autoencoder

                publish_autoencoder(config, folder, tensors, meta, output)
            else:
                from latentdiff.training.train_diffusion import publish_state as publish_diffusion

                publish_diffusion(config, folder, tensors, meta, output)
        except KeyError as error:
            raise UserError(f"{source}: damaged ({error} is missing)") from error
    return folder


def _config(output: Path) -> AutoencoderConfig | DiffusionConfig:
    record = output / "run.json"
    try:
        stage = json.loads(record.read_text(encoding="utf-8"))["stage"]
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        raise UserError(f"{output}: holds no training run, for it has no run.json; give a run's output folder") from None
    if stage not in STAGES:
        raise UserError(f"{record}: stage {stage!r} keeps no training states; valid: {', '.join(STAGES)}")
    return recorded_config(output, STAGES[stage])  # type: ignore[return-value]


def publishable(output: Path) -> dict[int, Path]:
    """The steps of a run that can be published, by their files' lengths: whole states, and snapshots for the others."""
    found = {}
    for kind in ("snapshots", "state"):
        for folder in state.step_folders(output, kind):
            if state.damage(folder, quick=True) is None:
                found[int(folder.name.removeprefix("step-"))] = folder
    return dict(sorted(found.items()))


def chosen(output: Path, step: int | None, best: bool) -> Path:
    """The folder of the state or snapshot that is asked for, whole. UserError that names what there is."""
    if best:
        step = state.best_step(output)
        if step is None:
            raise UserError(f"{output}: no state was kept as the best; set train.best while training, or give --step")
    steps = publishable(output)
    if not steps:
        raise UserError(f"{output}: holds no training state and no snapshot, so there is nothing to publish")
    if step is not None:
        if step not in steps:
            raise UserError(f"--step {step}: {output} holds the steps {', '.join(map(str, steps))}")
        wanted = [steps[step], output / "snapshots" / f"step-{step}"]
    else:
        wanted = [folder for folder in reversed(steps.values()) if folder.parent.name == "state"] or [*steps.values()][-1:]
    problems = []
    for folder in wanted:
        problem = state.damage(folder)
        if problem is None:
            for text in problems:
                print(f"warning: {text}; {folder} is taken", file=sys.stderr)
            return folder
        problems.append(f"{folder}: damaged ({problem})")
    raise UserError(problems[0])


def _check_out(folder: Path, config: Section) -> None:
    """UserError unless a folder is new, empty, or one that this run has published."""
    from latentdiff.utils.outputs import check_out_folder

    check_out_folder(folder)
    if not locks.contents(folder):
        return
    try:
        record: Any = json.loads((folder / "latentdiff.json").read_text(encoding="utf-8"))["config"]
        difference = first_difference(record, config)
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        difference = "latentdiff.json"
    if difference is not None:
        raise UserError(f"--out {folder}: is not empty, and was not published by this run; name a new folder")
