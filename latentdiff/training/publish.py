"""`latentdiff publish`: makes a checkpoint of one step of a training run, from a training state or a snapshot."""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from latentdiff.errors import UserError
from latentdiff.utils import locks, processes, signals

if TYPE_CHECKING:
    from latentdiff.config import AutoencoderConfig, DiffusionConfig, DiscreteConfig, Section
    from latentdiff.training.train_diffusion import DiffusionTrainer

PRODUCTS = {
    "autoencoder": "autoencoder",
    "diffusion": "model",
    "discrete": "model",
}  # the folder that a stage publishes, within its output


def publish(
    run_folder: str | Path,
    step: int | None = None,
    best: bool = False,
    out: str | Path | None = None,
    weak_step: int | None = None,
) -> Path:
    """Publish one step of a training run of either stage, as if the run had ended there.

    The averaged weights come from a training state or from a snapshot (train.snapshot_every). The learning rate of the steps
    is what the run had: with a schedule over the run's length, a shorter run would have had another.

    Args:
        run_folder: a run's output folder. Its images, and in stage 2 its autoencoder, must still be where they were.
        step: the step of a state or of a snapshot. By default the newest undamaged state.
        best: publish the state that train.best kept, instead of a step.
        out: a new folder, or one that this run has published. By default model/ or autoencoder/ in the run's folder.
        weak_step: an earlier step, whose U-Net is written to the folder weak of the checkpoint, for autoguidance (--weak).

    Returns:
        The published folder.

    Raises:
        UserError: there is no such run or step, the data have changed, or `out` holds something else.
    """
    from latentdiff.config import AutoencoderConfig
    from latentdiff.training import state
    from latentdiff.training.accelerator import torch_settings_restored

    if processes.count() > 1:
        raise UserError("publish: runs in one process; start it without accelerate launch")
    output = Path(run_folder)
    config = _config(output)
    if step is not None and best:
        raise UserError("--step and --best: give one of them")
    folder = Path(out) if out is not None else output / PRODUCTS[config.stage]
    if out is not None:
        check_out(folder, config)
    advice = "wait for it, or give --out another folder"
    held = locks.locked(output, advice) if out is None else locks.locked(folder, advice, beside=True)
    with torch_settings_restored(), signals.watched(signals.again), held:
        source = state_to_publish(output, step, best)
        tensors, meta = state.load_folder(source)
        weak = None
        if weak_step is not None:
            if config.stage != "diffusion":
                raise UserError(f"--weak-step: is for a run of stage diffusion; this one is of stage {config.stage}")
            if weak_step >= meta["step"]:
                raise UserError(f"--weak-step {weak_step}: must be before step {meta['step']}, which is published")
            weak = state.load_folder(state_to_publish(output, weak_step, False, "--weak-step"))
        print(f"publishing step {meta['step']} of {output}", file=sys.stderr)
        try:
            if isinstance(config, AutoencoderConfig):
                _publish_autoencoder(config, folder, tensors, meta)
            else:
                _publish_diffusion(config, folder, tensors, meta, weak)
        except KeyError as error:
            raise UserError(f"{source}: damaged ({error} is missing)") from error
    return folder


def _publish_autoencoder(config: AutoencoderConfig, folder: Path, tensors: dict[str, Any], meta: dict[str, Any]) -> None:
    """Write a stage-1 run's averaged weights to `folder`. tensors, meta: of a state or snapshot."""
    from latentdiff.models.codec import LatentCodec
    from latentdiff.training import state
    from latentdiff.training.accelerator import start_accelerator
    from latentdiff.training.autoencoder_checkpoint import save_autoencoder
    from latentdiff.training.images import Images
    from latentdiff.training.train_autoencoder import make_autoencoder
    from latentdiff.training.trainer import check_made_from

    output, accelerator = Path(config.output), start_accelerator(config.train)
    vae = make_autoencoder(config)
    images = Images(config.data, LatentCodec(vae).factor)
    check_made_from(output, meta.get("made_of"), {"data": images.train.fingerprint()})
    state.load_into(vae, tensors["ema"], str(output))
    vae.to(accelerator.device)
    save_autoencoder(config, images, vae, accelerator, folder, {"steps": meta["step"], "ema_updates": meta["ema_updates"]})


def _publish_diffusion(
    config: DiffusionConfig | DiscreteConfig,
    folder: Path,
    tensors: dict[str, Any],
    meta: dict[str, Any],
    weak: tuple[dict[str, Any], dict[str, Any]] | None,
) -> None:
    """The same for stage 2. weak: tensors and meta of the state whose U-Net is the weaker one, of a run of latents."""
    trainer = open_diffusion(config)
    if weak is None:
        load_averages(trainer, tensors, meta)
        trainer.publish(folder, meta["step"])
        return
    load_averages(trainer, *weak)
    weaker = copy.deepcopy(trainer.pipeline_parts()["unet"])
    load_averages(trainer, tensors, meta)
    trainer.publish(folder, meta["step"], (weaker, weak[1]["step"]))


def open_diffusion(config: DiffusionConfig | DiscreteConfig) -> DiffusionTrainer:
    """A stage-2 run with its images, autoencoder, text encoder and network, but none of its weights.

    The run's latent cache is opened, or built again where it is not there any more. config: as the run recorded it.
    """
    from latentdiff.training import bridge, conditioning
    from latentdiff.training.accelerator import start_accelerator
    from latentdiff.training.latents import open_inputs, prepare_latents, progress_bar
    from latentdiff.training.train_discrete import of_stage

    accelerator = start_accelerator(config.train)
    with progress_bar("encoding", True, lambda: None) as bar:
        codec, images = open_inputs(config, accelerator.device)
        source_images = bridge.open_images(config, images, codec)
        latents = prepare_latents(config, accelerator, bar, (codec, images))
        source = bridge.open_source(config, latents, source_images, accelerator, bar)
        reader, _ = conditioning.open_text(config, latents.images, accelerator, resume=True)
        conditions = conditioning.prepare_conditions(config, latents, accelerator, bar, reader)
    _, trainer_class = of_stage(config)
    return trainer_class(config, latents, conditions, accelerator, source)


def load_averages(trainer: DiffusionTrainer, tensors: dict[str, Any], meta: dict[str, Any]) -> None:
    """Put the averaged weights of a state or snapshot into a run's `ema_model`. UserError where they are of other data.

    tensors, meta: as `state.load_folder` gives them; of the tensors only "ema" is used.
    """
    from latentdiff.training import state
    from latentdiff.training.trainer import check_made_from

    output = Path(trainer.config.output)
    check_made_from(output, meta.get("made_of"), trainer.made_from())
    state.load_into(trainer.ema_model, tensors["ema"], str(output), trainer.trained)
    trainer.ema.updates = meta["ema_updates"]


def _config(output: Path) -> AutoencoderConfig | DiffusionConfig | DiscreteConfig:
    from latentdiff.config import AutoencoderConfig, DiffusionConfig, DiscreteConfig
    from latentdiff.training.run_folder import recorded_config

    stages: dict[str, type[Section]] = {
        "autoencoder": AutoencoderConfig,
        "diffusion": DiffusionConfig,
        "discrete": DiscreteConfig,
    }
    record = output / "run.json"
    try:
        stage = json.loads(record.read_text(encoding="utf-8"))["stage"]
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        raise UserError(f"{output}: holds no training run, for it has no run.json; give a run's output folder") from None
    if stage not in stages:
        raise UserError(f"{record}: stage {stage!r} keeps no training states; valid: {', '.join(stages)}")
    return recorded_config(output, stages[stage])  # type: ignore[return-value]


def publishable(output: Path) -> dict[int, Path]:
    """{step: folder} of the steps of a run that can be published, in order: its states, and snapshots of other steps.

    Only the lengths of their files are checked.
    """
    from latentdiff.training import state

    found = {}
    for kind in ("snapshots", "state"):
        for folder in state.step_folders(output, kind):
            if state.damage(folder, quick=True) is None:
                found[int(folder.name.removeprefix("step-"))] = folder
    return dict(sorted(found.items()))


def state_to_publish(output: Path, step: int | None, best: bool, flag: str = "--step") -> Path:
    """The folder of the state or snapshot to publish, undamaged; arguments as `publish`. UserError names the valid steps.

    flag: what named the step, for messages.

    Where a state is damaged, a snapshot of the same step or an older state is taken, with a warning on stderr.
    """
    from latentdiff.training import state

    if best:
        step = state.best_step(output)
        if step is None:
            raise UserError(f"{output}: no state was kept as the best; set train.best while training, or give --step")
    steps = publishable(output)
    if not steps:
        raise UserError(f"{output}: holds no training state and no snapshot, so there is nothing to publish")
    if step is not None:
        if step not in steps:
            raise UserError(f"{flag} {step}: {output} holds the steps {', '.join(map(str, steps))}")
        candidates = [steps[step], output / "snapshots" / f"step-{step}"]
    else:
        candidates = [folder for folder in reversed(steps.values()) if folder.parent.name == "state"]
        candidates = candidates or [*steps.values()][-1:]
    problems = []
    for folder in candidates:
        problem = state.damage(folder)
        if problem is None:
            for text in problems:
                print(f"warning: {text}; {folder} is taken", file=sys.stderr)
            return folder
        problems.append(f"{folder}: damaged ({problem})")
    raise UserError(problems[0])


def check_out(folder: Path, config: Section) -> None:
    """UserError unless a folder is new, is empty, or was published by this run."""
    from latentdiff.training.run_folder import first_difference
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
