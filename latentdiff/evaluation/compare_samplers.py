"""`latentdiff compare MODEL`: what samplers cost on one checkpoint, and how far their images are from the data."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from latentdiff.errors import UserError
from latentdiff.evaluation import default_features
from latentdiff.evaluation.tables import NONE, markdown_table

TABLE = "comparison"
SCHEDULER = "scheduler"  # stands for the checkpoint's own diffusers scheduler


class EvaluationCounter:
    """Counts the samples that pass through a network, so that guidance and second-order steps count as what they cost."""

    def __init__(self, network: Any):
        self.rows = 0
        network.register_forward_pre_hook(self._count, with_kwargs=True)

    def _count(self, network: Any, inputs: tuple, keywords: dict) -> None:
        self.rows += len(inputs[0] if inputs else keywords["sample"])


def compare_samplers(
    model: str | Path,
    data: str,
    samplers: Sequence[str],
    steps: Sequence[int],
    num_images: int = 1000,
    out: str | Path = "comparison",
    features: str | Path | None = None,
    seed: int = 0,
    guidance: float | None = None,
    guidance_interval: tuple[float, float] | None = None,
    precision: str = "float32",
    batch_size: int = 128,
) -> dict[str, Any]:
    """Measure every sampler at every number of steps: Fréchet distance, label accuracy, network evaluations, seconds.

    Writes comparison.json after each cell, and comparison.md beside it. A cell that is there with the same protocol is not
    made again, so an interrupted comparison continues.

    Args:
        model: a checkpoint.
        data: a folder, fashion-mnist, a table or shards.
        samplers: names of `latentdiff.samplers`, or scheduler for the checkpoint's own.
        steps: numbers of steps.
        num_images: images in each cell, class-balanced, from the same seeds in every cell.
        out: the folder of the table.
        features: the feature network, as in `evaluate`.
        seed: of the images.
        guidance: classifier-free guidance scale; None is the checkpoint's.
        guidance_interval: guide only at t in this interval, 0 is data and 1 noise; None is the checkpoint's.
        precision: of the U-Net: float32 or bfloat16.
        batch_size: images in a batch.

    Returns:
        {"protocol", "cells", "floor"}. A cell has sampler, steps, evaluations and seconds per image (decoding included),
        frechet and label_accuracy. floor: the Fréchet distance of as many real test images.

    Raises:
        UserError: an unknown sampler, model or data set, or `out` holds a comparison with another protocol.
    """
    from latentdiff.guidance import check_interval
    from latentdiff.guidance.rules import default_call
    from latentdiff.utils.outputs import check_out_folder

    check_samplers(samplers)
    if min(steps) < 1 or num_images < 2 or batch_size < 1:
        raise UserError("compare: --steps and --batch-size must be at least 1, --num-images at least 2")
    check_out_folder(out)
    check_interval(guidance_interval, "--guidance-interval")
    benchmark = SamplerBenchmark(model, data, num_images, features, precision, batch_size)
    config = benchmark.pipeline.config
    interval = config.default_guidance_interval if guidance_interval is None else guidance_interval
    scale = config.default_guidance_scale if guidance is None else guidance
    protocol = benchmark.protocol | {
        "seed": seed,
        "guidance": scale,
        "guidance_interval": None if interval is None else list(interval),
        **(default_call(config) if scale != 1 else {}),
    }
    table = open_table(Path(out), TABLE, protocol)
    table["floor"] = benchmark.reference.floor
    for sampler in samplers:
        for length in steps:
            if any((cell["sampler"], cell["steps"]) == (sampler, length) for cell in table["cells"]):
                continue
            call = {"num_inference_steps": length, "guidance_scale": guidance, "guidance_interval": guidance_interval}
            table["cells"].append({"sampler": sampler, "steps": length} | benchmark.measure(sampler, seed, call))
            write_table(Path(out), TABLE, table, comparison_markdown(table))
            print(f"compare: {json.dumps(table['cells'][-1])}", file=sys.stderr)
    write_table(Path(out), TABLE, table, comparison_markdown(table))
    return table


def check_samplers(names: Sequence[str]) -> None:
    """UserError for a name that is neither one of latentdiff's samplers nor "scheduler", the checkpoint's own."""
    from latentdiff.samplers import names as valid_names

    for name in names:
        if name != SCHEDULER and name not in valid_names():
            raise UserError(f"--samplers {name}: unknown; valid: {SCHEDULER}, {', '.join(valid_names())}")


class SamplerBenchmark:
    """Class-balanced images of a checkpoint with any sampler: what they cost, and how far they are from a data set.

    Args:
        model, data, num_images, features, precision, batch_size: as in `compare_samplers`.

    Attributes:
        folder: of the checkpoint.
        pipeline: the loaded checkpoint.
        rows: its classes, or [None].
        protocol: what all measurements share.

    Raises:
        UserError: num_images is no multiple of the classes, or the data have other classes.
    """

    def __init__(
        self, model: str | Path, data: str, num_images: int, features: str | Path | None, precision: str, batch_size: int
    ):

        from latentdiff.checkpoints import is_over_codes, load, resolve_model
        from latentdiff.evaluation.feature_spaces import open_features
        from latentdiff.evaluation.reference_data import check_classes, data_rule, reference_sets
        from latentdiff.generation import every_class, set_precision
        from latentdiff.models.codec import LatentCodec

        self.folder, self.num_images, self.batch_size = resolve_model(model), num_images, batch_size
        self.pipeline = load(self.folder)
        if is_over_codes(self.pipeline.config):
            raise UserError("MODEL: draws codes, and this compares samplers of latents; measure it by evaluate --sampler")
        self.pipeline.set_progress_bar_config(disable=True)
        set_precision(self.pipeline, precision)
        self.rows = every_class(self.pipeline)
        if num_images % len(self.rows):
            raise UserError(f"--num-images {num_images}: must be a multiple of the model's {len(self.rows)} classes")
        codec = LatentCodec(self.pipeline.vae)
        net = open_features(default_features(codec.image_channels) if features is None else features)
        train, test = reference_sets(data, *data_rule(self.folder, codec))
        check_classes(self.pipeline, test, data)  # before anything is generated
        self.labels = None if self.rows == [None] else np.repeat(self.rows, num_images // len(self.rows))
        self.protocol = {
            "model": str(model),
            "data": data,
            "images": num_images,
            "precision": precision,
            "features": net.name,
            "reference": train.fingerprint(),
        }
        self._sets = net, train, test
        self._counter = EvaluationCounter(self.pipeline.unet)

    @cached_property
    def reference(self) -> Any:
        """The `ReferenceStatistics`. They cost a pass over all data, so a table's protocol is checked before they are used."""
        from latentdiff.evaluation.feature_metrics import ReferenceStatistics

        return ReferenceStatistics(*self._sets, self.labels, self.num_images)

    def measure(self, sampler: str, seed: int, call: dict[str, Any]) -> dict[str, Any]:
        """Generate the images and measure them.

        Args:
            sampler: its name, or "scheduler".
            seed: of the images.
            call: further arguments of the pipeline's call.

        Returns:
            {"evaluations" of the U-Net and "seconds" per image, "frechet", "label_accuracy" (None where the network was not
            trained on these classes)}.
        """

        from latentdiff.generation import generate_batches

        started, self._counter.rows = time.perf_counter(), 0
        call = {"sampler": None if sampler == SCHEDULER else sampler} | call
        per_row = self.num_images // len(self.rows)
        batches = generate_batches(self.pipeline, self.rows, per_row, seed, self.batch_size, **call)
        images = np.concatenate([images for images, _ in batches])
        cell: dict[str, Any] = {"evaluations": self._counter.rows / self.num_images}
        cell["seconds"] = (time.perf_counter() - started) / self.num_images
        cell["frechet"], cell["label_accuracy"] = self.reference.measure(images, self.labels)
        return cell


def open_table(out: Path, name: str, protocol: dict[str, Any]) -> dict[str, Any]:
    """The table that was begun in `out` under the same protocol, or an empty one. UserError for a table of another protocol."""
    path = out / f"{name}.json"
    if not path.is_file():
        return {"protocol": protocol, "cells": []}
    try:
        table = json.loads(path.read_text())
        different = [key for key in protocol if table["protocol"].get(key) != protocol[key]]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise UserError(f"{path}: not a {name}; move it away or name another --out") from None
    if different:
        raise UserError(f"{path}: made with another {different[0]}; name another --out")
    return table


def write_table(out: Path, name: str, table: dict[str, Any], text: str) -> None:
    """Write <out>/<name>.json and <name>.md (text), each the old or the new file, never half of it."""
    from latentdiff.utils.atomic import write_text

    write_text(out / f"{name}.json", json.dumps(table, indent=1) + "\n")
    write_text(out / f"{name}.md", text)


def comparison_markdown(table: dict[str, Any]) -> str:
    """The result of `compare_samplers` as a Markdown table, with its protocol below."""
    header = ("sampler", "steps", "evaluations", "seconds per image", "Fréchet distance", "label accuracy")
    rows = [
        (
            cell["sampler"],
            cell["steps"],
            f"{cell['evaluations']:.0f}",
            f"{cell['seconds']:.3f}",
            f"{cell['frechet']:.4f}",
            NONE if cell["label_accuracy"] is None else f"{cell['label_accuracy']:.3f}",
        )
        for cell in table["cells"]
    ]
    rows.append(("real test images", NONE, NONE, NONE, f"{table['floor']:.4f}", NONE))
    protocol = ", ".join(f"{key} {value}" for key, value in table["protocol"].items())
    return "\n".join([*markdown_table(header, rows), "", protocol]) + "\n"
