"""Samplers side by side on one checkpoint: what each costs and how far its images are from the data, at several lengths."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from latentdiff.errors import UserError

TABLE = "comparison"
SCHEDULER = "scheduler"  # stands for the checkpoint's own diffusers scheduler


class RowCounter:
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
    features: str | Path = "weights/fashion-mnist-features",
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
    from latentdiff import samplers as rooms
    from latentdiff.autoencoders.codec import LatentCodec
    from latentdiff.checkpoints import load, resolve_model
    from latentdiff.commands import data_rule
    from latentdiff.evaluation.features import load_features
    from latentdiff.evaluation.report import Yardstick, reference_sets
    from latentdiff.generation import check_out_folder, every_class, set_precision
    from latentdiff.guidance import check_interval

    for name in samplers:
        if name != SCHEDULER and name not in rooms.names():
            raise UserError(f"--samplers {name}: unknown; valid: {SCHEDULER}, {', '.join(rooms.names())}")
    if min(steps) < 1 or num_images < 2 or batch_size < 1:
        raise UserError("compare: --steps and --batch-size must be at least 1, --num-images at least 2")
    check_out_folder(out)
    check_interval(guidance_interval, "--guidance-interval")
    folder = resolve_model(model)
    pipeline = load(folder)
    pipeline.set_progress_bar_config(disable=True)
    set_precision(pipeline, precision)
    rows = every_class(pipeline)
    if num_images % len(rows):
        raise UserError(f"--num-images {num_images}: must be a multiple of the model's {len(rows)} classes")
    net = load_features(resolve_model(features, "--features", "model.safetensors"))
    train, test = reference_sets(data, *data_rule(folder, LatentCodec(pipeline.vae)))
    labels = None if rows == [None] else np.repeat(rows, num_images // len(rows))
    interval = pipeline.config.default_guidance_interval if guidance_interval is None else guidance_interval
    protocol = {
        "model": str(model), "data": data, "images": num_images, "seed": seed, "precision": precision,
        "guidance": pipeline.config.default_guidance_scale if guidance is None else guidance,
        "guidance_interval": None if interval is None else list(interval), "features": net.name,
        "reference": train.fingerprint(),
    }  # fmt: skip
    table = _open(Path(out), protocol)
    yardstick = Yardstick(net, train, test, labels, num_images)
    table["floor"] = yardstick.floor
    counter = RowCounter(pipeline.unet)
    for sampler in samplers:
        for length in steps:
            if any((cell["sampler"], cell["steps"]) == (sampler, length) for cell in table["cells"]):
                continue
            started, counter.rows = time.perf_counter(), 0
            call = {"sampler": None if sampler == SCHEDULER else sampler, "num_inference_steps": length}
            call |= {"guidance_scale": guidance, "guidance_interval": guidance_interval}
            images = _images(pipeline, rows, num_images // len(rows), seed, batch_size, call)
            cell: dict[str, Any] = {"sampler": sampler, "steps": length, "evaluations": counter.rows / num_images}
            cell["seconds"] = (time.perf_counter() - started) / num_images
            cell["frechet"], cell["label_accuracy"] = yardstick.measure(images, labels)
            table["cells"].append(cell)
            _write(Path(out), table)
            print(f"compare: {json.dumps(table['cells'][-1])}", file=sys.stderr)
    _write(Path(out), table)
    return table


def _images(pipeline: Any, rows: list, per_row: int, seed: int, batch_size: int, call: dict[str, Any]) -> np.ndarray:
    from latentdiff.generation import generate_batches

    return np.concatenate([images for images, _ in generate_batches(pipeline, rows, per_row, seed, batch_size, **call)])


def _open(out: Path, protocol: dict[str, Any]) -> dict[str, Any]:
    path = out / f"{TABLE}.json"
    if not path.is_file():
        return {"protocol": protocol, "cells": []}
    try:
        table = json.loads(path.read_text())
        different = [key for key in protocol if table["protocol"].get(key) != protocol[key]]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise UserError(f"{path}: not a comparison; move it away or name another --out") from None
    if different:
        raise UserError(f"{path}: made with another {different[0]}; name another --out")
    return table


def _write(out: Path, table: dict[str, Any]) -> None:
    out.mkdir(parents=True, exist_ok=True)
    for suffix, text in ((".json", json.dumps(table, indent=1) + "\n"), (".md", markdown(table))):
        temporary = out / f".{TABLE}{suffix}.tmp"
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(out / f"{TABLE}{suffix}")


def markdown(table: dict[str, Any]) -> str:
    """The comparison as a table, with its protocol below."""
    head = "| sampler | steps | evaluations | seconds per image | Fréchet distance | label accuracy |"
    lines = [head, "|---|---|---|---|---|---|"]
    for cell in table["cells"]:
        accuracy = "–" if cell["label_accuracy"] is None else f"{cell['label_accuracy']:.3f}"
        cost = f"{cell['evaluations']:.0f} | {cell['seconds']:.3f}"
        lines.append(f"| {cell['sampler']} | {cell['steps']} | {cost} | {cell['frechet']:.4f} | {accuracy} |")
    lines.append(f"| real test images | – | – | – | {table['floor']:.4f} | – |")
    return "\n".join([*lines, "", ", ".join(f"{key} {value}" for key, value in table["protocol"].items())]) + "\n"
