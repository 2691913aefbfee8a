"""Restoring test images of Fashion-MNIST with weights/fashion-mnist: python tests/benchmarks/restoration.py upscale

Each method of `latentdiff.guidance.restoration` beside what needs no model: bicubic interpolation for upscaling, the
observation itself for deblurring, a mean fill for inpainting. The model is told nothing of an image but its observation,
unless --told. Measured:

- the Fréchet distance to all training images, in the features of weights/fashion-mnist-features, also as a share of the
  baseline's;
- PSNR to the observation: the result observed again, beside what was observed, in dB; before and after `Restoration.finish`;
- PSNR to the original image, in dB. Of one draw of the posterior it is lower than that of the posterior's mean;
- evaluations of the U-Net (its derivatives are not counted) and seconds for an image, decoding included.

Images are rounded to 8 bits, the observation too. --grid FILE.png shows original, observation, baseline and results.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from latentdiff.checkpoints import load
from latentdiff.evaluation.compare_samplers import EvaluationCounter
from latentdiff.evaluation.feature_cache import reference_statistics
from latentdiff.evaluation.feature_spaces import open_features
from latentdiff.evaluation.feature_statistics import feature_statistics
from latentdiff.evaluation.frechet import frechet_distance
from latentdiff.evaluation.image_quality import psnr
from latentdiff.evaluation.reference_data import data_rule, reference_sets
from latentdiff.evaluation.sample_sets import without_padding
from latentdiff.guidance import Blur, Downsample, Mask, restoration
from latentdiff.models.codec import LatentCodec

ROOT = Path(__file__).parents[2]
MODEL, FEATURES = ROOT / "weights" / "fashion-mnist", ROOT / "weights" / "fashion-mnist-features"
BASELINES = {"upscale": "bicubic", "deblur": "as it is", "inpaint": "mean fill"}
SIDE = 28


def eight_bits(images: Tensor) -> Tensor:
    """Images in [-1, 1], clipped and rounded to 256 levels."""
    return ((images.clamp(-1, 1) + 1) * 127.5).round() / 127.5 - 1


def observe(task: str, images: Tensor) -> tuple[Tensor, Tensor, dict[str, Any], Any]:
    """(what is observed, the baseline's images, further arguments of `restoration`, the operator)."""
    if task == "upscale":
        seen = eight_bits(Downsample(4)(images))
        return seen, eight_bits(F.interpolate(seen, scale_factor=4, mode="bicubic")), {}, Downsample(4)
    if task == "deblur":
        seen = eight_bits(Blur(1.5)(images))
        return seen, seen, {"blur_std": 1.5}, Blur(1.5)
    mask = torch.zeros(SIDE, SIDE)
    mask[SIDE // 2 :] = 1
    known = images[:, :, : SIDE // 2].mean((1, 2, 3), keepdim=True)
    return images, eight_bits(torch.where(mask.bool(), known, images)), {"mask": mask}, Mask(mask)


def known_psnr(operator: Any, images: Tensor, seen: Tensor) -> float:
    """Mean PSNR of what is observed of images, beside what was observed; of the known pixels alone for a mask."""
    error = (operator(images) - (operator(seen) if isinstance(operator, Mask) else seen)) / 2
    share = float(operator.known.mean()) if isinstance(operator, Mask) else 1.0
    mse = error.square().flatten(1).mean(1) / share
    return float((-10 * mse.clamp_min(1e-10).log10()).mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=list(BASELINES))
    parser.add_argument("--num-images", type=int, default=100)
    parser.add_argument("--batch-size", type=int, default=50)
    parser.add_argument("--told", action="store_true", help="tell the model each image's class")
    parser.add_argument("--guidance", type=float, help="classifier-free guidance scale, with --told")
    parser.add_argument(
        "--settings", nargs="+", default=["{}"], metavar="JSON", help='such as \'{"method": "dps", "steps": 50}\''
    )
    cache = Path(tempfile.gettempdir()) / "latentdiff-restoration"
    parser.add_argument("--cache", default=str(cache), help="folder for the training images' statistics")
    parser.add_argument("--grid", type=Path)
    given = parser.parse_args()

    # The data, the networks, and the baseline
    pipe, net = load(MODEL), open_features(FEATURES)
    pipe.set_progress_bar_config(disable=True)
    codec, counter = LatentCodec(pipe.vae), EvaluationCounter(pipe.unet)
    train, test = (without_padding(part) for part in reference_sets("fashion-mnist", *data_rule(MODEL, codec)))
    reference = reference_statistics(net, train, 250, given.cache, lambda line: print(line, file=sys.stderr))
    assert reference is not None
    images, labels = test.batch(range(given.num_images))
    seen, baseline, extra, operator = observe(given.task, images)

    def frechet(images: Tensor) -> tuple[float, float | None]:
        statistics = feature_statistics(net, [(images, labels)])
        return frechet_distance(statistics.moments, reference.moments), statistics.accuracy

    real, floor = frechet(images), frechet(baseline)
    print("| method | Fréchet | share | recognised | dB to the observation | finished | dB to the image | evaluations | s |")
    print("|---|---|---|---|---|---|---|---|---|")
    print(f"| the images themselves | {real[0]:.3f} | {real[0] / floor[0]:.3f} | {real[1]:.0%} | | | | | |")
    again = known_psnr(operator, baseline, seen)
    row = f"{floor[0]:.3f} | 1 | {floor[1]:.0%} | {again:.1f} | | {float(psnr(baseline, images).mean()):.2f}"
    print(f"| {BASELINES[given.task]} | {row} | | |", flush=True)

    # The methods
    columns = [images, seen if given.task != "inpaint" else operator(images), baseline]
    for text in given.settings:
        settings = json.loads(text)
        counter.rows, started, made, raw = 0, time.perf_counter(), [], []
        for start in range(0, given.num_images, given.batch_size):
            rows = slice(start, min(start + given.batch_size, given.num_images))
            plan = restoration(given.task, seen[rows], codec.decode, (SIDE, SIDE), **extra, **settings)
            call = {"class_labels": labels[rows].tolist() if given.told else [None] * (rows.stop - rows.start)}
            if given.told:
                call["guidance_scale"] = given.guidance or 1.0
            generators = [torch.Generator().manual_seed(k) for k in range(rows.start, rows.stop)]
            result = pipe(**call, **plan.call, generator=generators, output_type="pt").images
            raw.append(eight_bits(2 * result - 1))
            made.append(eight_bits(2 * plan.finish(result) - 1))
        seconds = (time.perf_counter() - started) / given.num_images
        results, before = torch.cat(made), torch.cat(raw)
        distance, accuracy = frechet(results)
        cells = [
            text.strip("{}").replace('"', "") or "default",
            f"{distance:.3f}",
            f"{distance / floor[0]:.3f}",
            f"{accuracy:.0%}",
            f"{known_psnr(operator, before, seen):.1f}",
            f"{known_psnr(operator, results, seen):.1f}",
            f"{float(psnr(results, images).mean()):.2f}",
            f"{counter.rows / given.num_images:.0f}",
            f"{seconds:.2f}",
        ]
        print("| " + " | ".join(cells) + " |", flush=True)
        columns.append(results)
    if given.grid:
        save_grid(given.grid, columns)


def save_grid(path: Path, columns: list[Tensor], rows: int = 16) -> None:
    """One line for each image, one column for each kind, enlarged four times."""
    from PIL import Image

    wide = [F.interpolate(column[:rows], size=(SIDE, SIDE)) for column in columns]
    sheet = torch.cat([torch.cat(list(column), dim=-2) for column in wide], dim=-1)[0]  # [rows * 28, columns * 28]
    pixels = ((sheet.clamp(-1, 1) + 1) * 127.5).round().byte().repeat_interleave(4, 0).repeat_interleave(4, 1)
    Image.fromarray(pixels.numpy()).save(path)


if __name__ == "__main__":
    main()
