"""Whether the device computes what the CPU computes, within tolerances that are stated beside each value.

Rows have `right`: a tolerance that is not kept is "NO" there, and gpu.py ends with status 1.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.functional import scaled_dot_product_attention

ROOT = Path(__file__).parents[2]
MODEL = ROOT / "weights" / "fashion-mnist"
# Mean difference of 8-bit images allowed, in levels of 255. float32 differs in the order of sums alone: over the 11 steps of
# the sampler its 1e-7 grows to some 1e-5 of the range. bfloat16 and TF32 keep 8 and 10 bits: 2e-3 to 4e-3 at each product
LEVELS = {"float32": 0.05, "TF32": 1.0, "bfloat16": 4.0}
# Largest difference of a loss curve from the CPU's in float32, as a share of its first value
LOSSES = {"float32": 2e-3, "bfloat16": 0.1, "float16": 0.05}


def measure(name: str, device: torch.device, clock: Any, results: Any) -> None:
    pictures(device, clock, results)
    attention(device, clock, results)
    with tempfile.TemporaryDirectory() as root:
        training(device, Path(root), clock, results)


def pictures(device: torch.device, clock: Any, results: Any) -> None:
    """weights/fashion-mnist: the same seeds on the CPU and on the device, where all of the pipeline must be."""
    from latentdiff.checkpoints import load
    from latentdiff.generation import generate_batches, set_precision

    each, call = (1, {"num_inference_steps": 2}) if clock.dry else (2, {})

    def draw(where: torch.device, precision: str) -> np.ndarray:
        pipeline = load(MODEL).to(where)
        pipeline.set_progress_bar_config(disable=True)
        set_precision(pipeline, precision)
        models = (pipeline.unet, pipeline.vae)
        places = {tensor.device.type for model in models for tensor in (*model.parameters(), *model.buffers())}
        results.add(f"placement on {where.type}, {precision}", right=places == {where.type})
        return np.concatenate([images for images, _ in generate_batches(pipeline, list(range(10)), each, **call)])

    expected = draw(torch.device("cpu"), "float32")
    tf32 = (False, True) if device.type == "cuda" else (False,)
    for precision, allowed in [("float32", tf) for tf in tf32] + [("bfloat16", False)]:
        with matrix_precision(allowed):
            made = draw(device, precision)
        difference = float(np.abs(made.astype(float) - expected.astype(float)).mean())
        kind = "TF32" if allowed else precision
        results.add(
            f"pictures, {kind}",
            **{"mean difference, levels": difference, "allowed": LEVELS[kind], "right": difference <= LEVELS[kind]},
            largest=int(np.abs(made.astype(int) - expected.astype(int)).max()),
        )


@contextmanager
def matrix_precision(tf32: bool) -> Iterator[None]:
    """Within the block float32 products and convolutions of a GPU round their factors to TF32, or do not."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = tf32
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


def attention(device: torch.device, clock: Any, results: Any) -> None:
    """torch's fused attention against float64, at the lengths of 8x8 and 32x32 latents."""
    for positions in (64, 256 if clock.dry else 1024):
        q, k, v = (torch.randn(4, 4, positions, 32, device=device) for _ in range(3))
        exact = scaled_dot_product_attention(*(x.double() for x in (q, k, v)))
        for dtype, bound in ((torch.float32, 1e-3), (torch.bfloat16, 2e-2), (torch.float16, 4e-3)):
            fused = scaled_dot_product_attention(*(x.to(dtype) for x in (q, k, v))).double()
            error = float((fused - exact).norm() / exact.norm())
            kind = str(dtype).removeprefix("torch.")
            results.add(
                f"attention over {positions}, {kind}", **{"relative error": error, "allowed": bound, "right": error <= bound}
            )


def training(device: torch.device, folder: Path, clock: Any, results: Any) -> None:
    """Tiny runs of both stages on the device and on the CPU; a run that was stopped and goes on against one that was not."""
    from tiny_runs import write_stripes

    data, steps = write_stripes(folder / "data"), 6
    expected = curves(data, folder / "cpu", "float32", torch.device("cpu"), steps)
    if expected.pop("device") != "cpu":
        raise RuntimeError("the reference was not trained on the CPU")
    for precision in ("float32", "bfloat16", "float16"):
        made = curves(data, folder / precision, precision, device, steps)
        results.add(f"training in {precision} on {device.type}", right=made.pop("device") == device.type)
        for stage, losses in made.items():
            reference = np.array(expected[stage])
            difference = float(np.abs(np.array(losses) - reference).max() / reference[0])
            results.add(
                f"{stage}, {precision}: losses beside the CPU's",
                **{"relative difference": difference, "allowed": LOSSES[precision], "right": difference <= LOSSES[precision]},
            )
        difference = resumed(data, folder / precision, precision, device, steps)
        # Sums whose order is not fixed make a GPU's float32 differ from itself in the last bits
        bound = 0.0 if device.type == "cpu" else 1e-3
        results.add(
            f"stage 2, {precision}: resumed half-way",
            **{"relative difference": difference, "allowed": bound, "right": difference <= bound},
        )


def curves(data: Path, folder: Path, precision: str, device: torch.device, steps: int) -> dict[str, Any]:
    """Losses of tiny runs of both stages, and the type of the device they ran on. `resumed` needs the second stage's output."""
    import json

    from accelerate import PartialState
    from tiny_runs import autoencoder_config, diffusion_config

    from latentdiff.training import train

    with trainers_on(device):
        train(autoencoder_config(data, folder / "stage1", train__steps=steps, train__precision=precision))
        # The second stage sees the same latents everywhere: those of the CPU's first stage
        first = folder.parent / "cpu" / "stage1"
        train(diffusion_config(data, folder / "stage2", first, train__steps=steps, train__precision=precision))
        found: dict[str, Any] = {"device": PartialState().device.type}
    for stage, key in (("stage 1", "train/total"), ("stage 2", "train/loss")):
        lines = (folder / stage.replace(" ", "") / "metrics.jsonl").read_text().splitlines()
        found[stage] = [value[key] for value in map(json.loads, lines) if key in value]
    return found


def resumed(data: Path, folder: Path, precision: str, device: torch.device, steps: int) -> float:
    """Largest difference of the weights of a run stopped half-way and resumed, as a share of the unbroken run's largest."""
    from tiny_runs import diffusion_config

    from latentdiff.training import state, train

    first = folder.parent / "cpu" / "stage1"
    with trainers_on(device):
        for done, resume in ((steps // 2, False), (steps, True)):
            train(diffusion_config(data, folder / "half", first, train__steps=done, train__precision=precision), resume)
    one, other = (state.load_state(folder / run, warn=False)[0] for run in ("stage2", "half"))
    largest = max(float(value.abs().max()) for value in one["model"].values())
    return max(float((one["model"][key] - other["model"][key]).abs().max()) for key in one["model"]) / largest


@contextmanager
def trainers_on(device: torch.device) -> Iterator[None]:
    """Within the block accelerate takes this device."""
    from accelerate.state import AcceleratorState

    before = os.environ.pop("ACCELERATE_USE_CPU", None)
    if device.type == "cpu":
        os.environ["ACCELERATE_USE_CPU"] = "true"
    # accelerate keeps the first run's device for the life of the process
    AcceleratorState._reset_state(reset_partial_state=True)
    try:
        yield
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
        os.environ.pop("ACCELERATE_USE_CPU", None)
        if before is not None:
            os.environ["ACCELERATE_USE_CPU"] = before
