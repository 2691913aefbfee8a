"""Samplers side by side on one checkpoint: what each costs and how far its images are from the data, at several lengths."""

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
from latentdiff.evaluation import DEFAULT_FEATURES

TABLE = "comparison"
SCHEDULER = "scheduler"  # stands for the checkpoint's own diffusers scheduler


class EvaluationCounter:
    """Counts the samples that pass through a network, so that guidance and second-order steps are paid for as they are."""

    def __init__(self, network: Any):
        self.rows = 0
        network.register_forward_pre_hook(self._count, with_kwargs=True)

    def _count(self, network: Any, inputs: tuple, keywords: dict) -> None:
        self.rows += len(inputs[0] if inputs else keywords["sample"])


def compare(
    model: str | Path,
    data: str,
    samplers: Sequence[str],
    steps: Sequence[int],
    num_images: int = 1000,
    out: str | Path = "comparison",
    features: str | Path = DEFAULT_FEATURES,
    seed: int = 0,
    guidance: float | None = None,
    guidance_interval: tuple[float, float] | None = None,
    precision: str = "float32",
    batch_size: int = 128,
) -> dict[str, Any]:
    """Fréchet distance, label accuracy, network evaluations and seconds per image of every sampler at every length.

    guidance, guidance_interval: as in the pipeline's call; None: the checkpoint's.
    samplers: names of `latentdiff.samplers`, or "scheduler" for the checkpoint's own. num_images: class-balanced, the same
    seeds in every cell. Writes <out>/comparison.json after each cell and comparison.md beside it; a cell that is there
    with the same protocol is not made again, so an interrupted comparison goes on. Seconds include decoding.

    UserError for an unknown sampler, model or data set, or where <out> holds a comparison with another protocol.
    """
    from latentdiff.guidance import check_interval
    from latentdiff.utils.outputs import check_out_folder

    check_samplers(samplers)
    if min(steps) < 1 or num_images < 2 or batch_size < 1:
        raise UserError("compare: --steps and --batch-size must be at least 1, --num-images at least 2")
    check_out_folder(out)
    check_interval(guidance_interval, "--guidance-interval")
    bench = SamplerBenchmark(model, data, num_images, features, precision, batch_size)
    config = bench.pipeline.config
    interval = config.default_guidance_interval if guidance_interval is None else guidance_interval
    protocol = bench.protocol | {
        "seed": seed,
        "guidance": config.default_guidance_scale if guidance is None else guidance,
        "guidance_interval": None if interval is None else list(interval),
    }
    table = open_table(Path(out), TABLE, protocol)
    table["floor"] = bench.yardstick.floor
    for sampler in samplers:
        for length in steps:
            if any((cell["sampler"], cell["steps"]) == (sampler, length) for cell in table["cells"]):
                continue
            call = {"num_inference_steps": length, "guidance_scale": guidance, "guidance_interval": guidance_interval}
            table["cells"].append({"sampler": sampler, "steps": length} | bench.measure(sampler, seed, call))
            write_table(Path(out), TABLE, table, comparison_markdown(table))
            print(f"compare: {json.dumps(table['cells'][-1])}", file=sys.stderr)
    write_table(Path(out), TABLE, table, comparison_markdown(table))
    return table


def check_samplers(names: Sequence[str]) -> None:
    """UserError for a name that is neither a sampler of latentdiff nor the checkpoint's own scheduler."""
    from latentdiff import samplers as rooms

    for name in names:
        if name != SCHEDULER and name not in rooms.names():
            raise UserError(f"--samplers {name}: unknown; valid: {SCHEDULER}, {', '.join(rooms.names())}")


class SamplerBenchmark:
    """A checkpoint before a data set: class-balanced images of any call, what they cost and how far they are from the data.

    protocol: what every number shares.  yardstick: its floor is the Fréchet distance of as many real test images.
    """

    def __init__(self, model: str | Path, data: str, num_images: int, features: str | Path, precision: str, batch_size: int):
        from latentdiff.checkpoints import load, resolve_model
        from latentdiff.evaluation.feature_spaces import open_features
        from latentdiff.evaluation.reference_data import check_classes, data_rule, reference_sets
        from latentdiff.generation import every_class, set_precision
        from latentdiff.models.codec import LatentCodec

        self.folder, self.num_images, self.batch_size = resolve_model(model), num_images, batch_size
        self.pipeline = load(self.folder)
        self.pipeline.set_progress_bar_config(disable=True)
        set_precision(self.pipeline, precision)
        self.rows = every_class(self.pipeline)
        if num_images % len(self.rows):
            raise UserError(f"--num-images {num_images}: must be a multiple of the model's {len(self.rows)} classes")
        net = open_features(features)
        train, test = reference_sets(data, *data_rule(self.folder, LatentCodec(self.pipeline.vae)))
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
        self.counter = EvaluationCounter(self.pipeline.unet)

    @cached_property
    def yardstick(self) -> Any:
        """Looks through the whole data set, so only once a table has been found to be of this protocol."""
        from latentdiff.evaluation.feature_metrics import ReferenceStatistics

        return ReferenceStatistics(*self._sets, self.labels, self.num_images)

    def measure(self, sampler: str, seed: int, call: dict[str, Any]) -> dict[str, Any]:
        """evaluations and seconds an image, frechet, label_accuracy (None where it says nothing); call: of the pipeline."""
        from latentdiff.generation import generate_batches

        started, self.counter.rows = time.perf_counter(), 0
        call = {"sampler": None if sampler == SCHEDULER else sampler} | call
        per_row = self.num_images // len(self.rows)
        batches = generate_batches(self.pipeline, self.rows, per_row, seed, self.batch_size, **call)
        images = np.concatenate([images for images, _ in batches])
        cell: dict[str, Any] = {"evaluations": self.counter.rows / self.num_images}
        cell["seconds"] = (time.perf_counter() - started) / self.num_images
        cell["frechet"], cell["label_accuracy"] = self.yardstick.measure(images, self.labels)
        return cell


def open_table(out: Path, name: str, protocol: dict[str, Any]) -> dict[str, Any]:
    """The table begun in `out` under the same protocol, or an empty one; UserError where what is there is another."""
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
    """<out>/<name>.json and .md, each the old or the new one, never half of it."""
    from latentdiff.utils.atomic import write_text

    write_text(out / f"{name}.json", json.dumps(table, indent=1) + "\n")
    write_text(out / f"{name}.md", text)


def comparison_markdown(table: dict[str, Any]) -> str:
    """The comparison as a table, with its protocol below."""
    head = "| sampler | steps | evaluations | seconds per image | Fréchet distance | label accuracy |"
    lines = [head, "|---|---|---|---|---|---|"]
    for cell in table["cells"]:
        accuracy = "–" if cell["label_accuracy"] is None else f"{cell['label_accuracy']:.3f}"
        cost = f"{cell['evaluations']:.0f} | {cell['seconds']:.3f}"
        lines.append(f"| {cell['sampler']} | {cell['steps']} | {cost} | {cell['frechet']:.4f} | {accuracy} |")
    lines.append(f"| real test images | – | – | – | {table['floor']:.4f} | – |")
    return "\n".join([*lines, "", ", ".join(f"{key} {value}" for key, value in table["protocol"].items())]) + "\n"
