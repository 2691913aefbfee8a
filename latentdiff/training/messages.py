"""What a run says beside its progress: what is likely wrong with it, how its first stage came out, where everything is."""

from __future__ import annotations

import json
import math
import shlex
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from latentdiff.config import AutoencoderConfig, DiffusionConfig, EmaConfig
from latentdiff.errors import printable
from latentdiff.models.autoencoder import autoencoder_folder
from latentdiff.utils import atomic

MANY_EPOCHS = 1000  # passes over the images after which a small model has learnt them by heart
REPORT = "report.json"


def print_lines(lines: Iterable[str]) -> None:
    """Write lines on stderr, above any progress bar."""
    from tqdm import tqdm

    for line in lines:
        tqdm.write(printable(line), file=sys.stderr)


def as_warnings(warnings: Iterable[str]) -> list[str]:
    return [f"warning: {text}" for text in warnings]


# What is likely wrong with a config


def length_warnings(config: AutoencoderConfig | DiffusionConfig) -> list[str]:
    """Warnings about parts of a config that do not fit into the run's length."""
    steps, warm_up, found = config.train.steps, config.optimizer.warmup_steps, list[str]()
    if 2 * warm_up > steps:
        found.append(
            f"optimizer.warmup_steps: {warm_up} of the run's {steps} steps are spent on raising the learning rate; with "
            f"{max(1, steps // 20)} it is a twentieth of them"
        )
    if (half_life := ema_half_life(config.ema)) > steps:
        found.append(
            f"ema.decay: {config.ema.decay:g} takes {half_life:.0f} steps to forget half, and the run has {steps}; with "
            f"{1 - float(f'{1 - 0.5 ** (10 / steps):.3g}'):g} it takes a tenth of them"
        )
    if isinstance(config, AutoencoderConfig) and config.loss.adversarial > 0 and config.loss.adversarial_start >= steps:
        found.append(
            f"loss.adversarial_start: {config.loss.adversarial_start}, but the run has {steps} steps, so the adversary never "
            "plays; start it earlier, or set loss.adversarial=0"
        )
    return found


def ema_half_life(ema: EmaConfig) -> float:
    """Steps after which an average at its full decay has forgotten half of what it was."""
    return math.log(0.5) / math.log(ema.decay) if ema.decay > 0 else 0.0


def data_warnings(config: AutoencoderConfig | DiffusionConfig, count: int) -> list[str]:
    """Warnings about a run's length and batch beside the number of training images."""
    train, found = config.train, list[str]()
    epochs = train.steps * train.batch_size / count
    if train.batch_size > count:
        found.append(
            f"train.batch_size: {train.batch_size}, but only {count} images train, so a step sees some of them twice; lower it"
        )
    if epochs < 1:
        found.append(f"train.steps: {train.steps} steps see {epochs:.0%} of the {count} images; raise it to see them all")
    if epochs > MANY_EPOCHS:
        fewer = max(1, MANY_EPOCHS * count // train.batch_size)
        found.append(
            f"train.steps: {train.steps} steps see each of the {count} images {epochs:.0f} times, and a model learns so few by "
            f"heart; {fewer} steps see them {MANY_EPOCHS} times"
        )
    return found


# How the first stage came out


def save_report_lines(folder: Path, report: dict[str, Any]) -> None:
    """Put a report's lines beside an autoencoder's weights, so that they go wherever it goes."""
    atomic.write_json(folder / REPORT, {key: report[key] for key in ("images", "psnr_db", "ssim", "lines")})


def report_lines(where: str) -> list[str]:
    """The lines of the report of an autoencoder, by the name a config gives it; none where it has none."""
    folder = autoencoder_folder(where)
    if folder is None:
        return []
    for place in (folder, folder.parent):  # runs before the report was kept in the folder itself have it above
        try:
            lines = json.loads((place / REPORT).read_text(encoding="utf-8"))["lines"]
        except (OSError, ValueError, LookupError, TypeError, RecursionError):
            continue
        if isinstance(lines, list):
            return [line for line in lines if isinstance(line, str)]
    return []


def autoencoder_warnings(where: str) -> list[str]:
    """What the report of stage 1 warns of, for those who build on it."""
    bad = [line.removeprefix("warn: ") for line in report_lines(where) if line.startswith("warn: ")]
    return [f"autoencoder {where}: {line}" for line in bad]


# Where everything is


def where_results_appear(config: AutoencoderConfig | DiffusionConfig) -> str:
    """One line on where a run's pictures and curves appear."""
    output, every = Path(config.output), config.train.picture_every
    last = isinstance(config, DiffusionConfig)  # which draws at its last step whatever the period
    pictures = f"{output / 'pictures'} every {every} steps"
    if every > config.train.steps:
        pictures = f"{output / 'pictures'} at the end" if last else f"{output / 'report.png'} at the end"
    return f"pictures: {pictures}; curves: {output / 'metrics.jsonl'}, tensorboard --logdir {shlex.quote(str(output / 'logs'))}"


def autoencoder_finished(folder: Path, lines: Sequence[str]) -> list[str]:
    """The verdict on the autoencoder in `folder`, and where everything is."""
    warned = sum(line.startswith("warn: ") for line in lines)
    head = f"{warned} of {len(lines)} points are weak" if warned else "all points pass"
    return [
        f"the first stage on held-out images: {head}",
        *(f"  {line}" for line in lines),
        f"see {folder.parent / 'report.png'}: held-out images above their reconstructions",
        f"the autoencoder is in {folder}; stage 2 takes it by autoencoder={folder}",
    ]


def model_finished(config: DiffusionConfig, prompt: str | None) -> list[str]:
    """Where everything is, and the command that shows pictures. prompt: one of the data's, of a model that reads text."""
    output = Path(config.output)
    what = {"class": "--all-classes ", "none": ""}.get(config.condition.type, f"{shlex.quote(prompt or 'a prompt')} ")
    return [
        f"the model is in {output / 'model'}; pictures drawn while training: {output / 'pictures'}",
        f"see more: latentdiff generate {what}--model {shlex.quote(str(output / 'model'))} --out samples.png",
    ]
