"""What a run prints besides its progress: warnings about its config, a summary of stage 1, and where the results are."""

from __future__ import annotations

import json
import math
import shlex
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from latentdiff.config import AutoencoderConfig, DiffusionConfig, DiscreteConfig, EmaConfig
from latentdiff.errors import printable
from latentdiff.models.autoencoder import autoencoder_folder
from latentdiff.training.lora import FILE as LORA_FILE
from latentdiff.utils import atomic

MANY_EPOCHS = 1000  # passes over the images after which a small model has memorised them
REPORT = "report.json"


def print_lines(lines: Iterable[str]) -> None:
    """Print lines on stderr, above any progress bar; control characters are written out."""
    from tqdm import tqdm

    for line in lines:
        tqdm.write(printable(line), file=sys.stderr)


def as_warnings(warnings: Iterable[str]) -> list[str]:
    """The texts as lines that begin with "warning: "."""
    return [f"warning: {text}" for text in warnings]


# Warnings about a config


AnyStage = AutoencoderConfig | DiffusionConfig | DiscreteConfig


def length_warnings(config: AnyStage) -> list[str]:
    """Warnings about parts of a config that do not suit the run's length: warm-up, EMA, adversarial loss."""
    steps, warm_up = config.train.steps, config.optimizer.warmup_steps
    warnings: list[str] = []
    if 2 * warm_up > steps:
        warnings.append(
            f"optimizer.warmup_steps: the learning rate rises for {warm_up} steps, and the run has {steps}; "
            f"a twentieth of the run is optimizer.warmup_steps={max(1, steps // 20)}"
        )
    if (half_life := ema_half_life(config.ema)) > steps:
        warnings.append(
            f"ema.decay: {config.ema.decay:g} takes {half_life:.0f} steps to forget half of the old weights, and the run has "
            f"{steps}; ema.decay={1 - float(f'{1 - 0.5 ** (10 / steps):.3g}'):g} takes a tenth of the run"
        )
    if isinstance(config, AutoencoderConfig) and config.loss.adversarial > 0 and config.loss.adversarial_start >= steps:
        warnings.append(
            f"loss.adversarial_start: {config.loss.adversarial_start}, but the run has {steps} steps, so the discriminator is "
            "never used; start it earlier, or set loss.adversarial=0"
        )
    return warnings


def ema_half_life(ema: EmaConfig) -> float:
    """Steps after which old weights have half of their influence on the average, at its full decay."""
    return math.log(0.5) / math.log(ema.decay) if ema.decay > 0 else 0.0


def data_warnings(config: AnyStage, count: int) -> list[str]:
    """Warnings about a run's length and batch size for `count` training images."""
    train = config.train
    warnings: list[str] = []
    epochs = train.steps * train.batch_size / count
    if config.data.copies == 1 and (config.data.shift or config.data.zoom):
        warnings.append("data.copies: 1, so data.shift and data.zoom move nothing; each image stands data.copies times")
    if train.batch_size > count * config.data.copies:
        warnings.append(
            f"train.batch_size: {train.batch_size}, but only {count} images train, so a step sees some of them twice; lower it"
        )
    if epochs < 1:
        warnings.append(f"train.steps: {train.steps} steps see {epochs:.0%} of the {count} images; raise it to see them all")
    # With train.minutes the steps are only an upper bound; mostly the clock ends the run long before
    if epochs > MANY_EPOCHS and train.minutes is None:
        fewer = max(1, MANY_EPOCHS * count // train.batch_size)
        warnings.append(
            f"train.steps: {train.steps} steps see each of the {count} images {epochs:.0f} times, and a model memorises so "
            f"few; {fewer} steps see them {MANY_EPOCHS} times"
        )
    return warnings


# The report of stage 1


def save_report_lines(folder: Path, report: dict[str, Any]) -> None:
    """Write the numbers and lines of a stage-1 report beside the autoencoder's weights, so that a copy has them too."""
    atomic.write_json(folder / REPORT, {key: report[key] for key in ("images", "psnr_db", "ssim", "lines")})


def report_lines(where: str) -> list[str]:
    """The lines of an autoencoder's report; [] where it has none. where: as a config names the autoencoder."""
    folder = autoencoder_folder(where)
    if folder is None:
        return []
    for place in (folder, folder.parent):  # older runs have the report in the folder above
        try:
            lines = json.loads((place / REPORT).read_text(encoding="utf-8"))["lines"]
        except (OSError, ValueError, LookupError, TypeError, RecursionError):
            continue
        if isinstance(lines, list):
            return [line for line in lines if isinstance(line, str)]
    return []


def autoencoder_warnings(where: str) -> list[str]:
    """The warnings in an autoencoder's report, for a run that uses the autoencoder."""
    lines = [line.removeprefix("warn: ") for line in report_lines(where) if line.startswith("warn: ")]
    return [f"autoencoder {where}: {line}" for line in lines]


# Where the results are


def where_results_appear(config: AnyStage) -> str:
    """One line on where a run's pictures and curves appear."""
    output, every, minutes = Path(config.output), config.train.picture_every, config.train.picture_minutes
    pictures = f"{output / 'pictures'} every {every} steps"
    if minutes is not None:
        pictures = f"{output / 'pictures'} every {minutes:g} minutes"
    elif every > config.train.steps:
        # Stage 2 draws a picture at its last step in any case
        pictures = f"{output / ('report.png' if isinstance(config, AutoencoderConfig) else 'pictures')} at the end"
    return f"pictures: {pictures}; curves: {output / 'metrics.jsonl'}, tensorboard --logdir {shlex.quote(str(output / 'logs'))}"


def autoencoder_finished(folder: Path, lines: Sequence[str]) -> list[str]:
    """What a finished stage-1 run prints: the lines of its report, and where the autoencoder in `folder` is used."""
    weak = sum(line.startswith("warn: ") for line in lines)
    summary = f"{weak} of {len(lines)} points are weak" if weak else "all points pass"
    return [
        f"stage 1 on held-out images: {summary}",
        *(f"  {line}" for line in lines),
        f"see {folder.parent / 'report.png'}: held-out images above their reconstructions",
        f"the autoencoder is in {folder}; stage 2 takes it by autoencoder={folder}",
    ]


def model_finished(config: DiffusionConfig | DiscreteConfig, prompt: str | None) -> list[str]:
    """What a finished stage-2 run prints: where the model is, and the command for images. prompt: an example, with text."""
    output = Path(config.output)
    what = "--all-classes " if config.condition.includes("class") else ""
    what = f"{shlex.quote(prompt or 'a prompt')} " if config.condition.includes("text") else what
    if config.condition.includes("image"):
        what += "--condition PICTURE " + ("--condition-mask MASK " if config.condition.image.kind == "mask" else "")
    lora = []
    if isinstance(config, DiffusionConfig) and config.model.lora is not None:
        lora = [f"the LoRA alone is in {output / 'model' / LORA_FILE}, for load_lora_weights on {config.model.pretrained}"]
    return [
        f"the model is in {output / 'model'}; pictures drawn while training: {output / 'pictures'}",
        *lora,
        f"see more: latentdiff generate {what}--model {shlex.quote(str(output / 'model'))} --out samples.png",
    ]
