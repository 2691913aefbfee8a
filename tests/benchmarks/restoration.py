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

`python tests/benchmarks/restoration.py colorize --data DATA` gives held-out pictures of emoji their colours back, by
weights/emoji, from their grey alone or with their prompt ({"told": true} in a setting). DATA is a folder that
`latentdiff prepare emoji` made. Beside the methods stand the grey pictures, the mean colour of the training pictures at each
level of grey, and the colours of the training picture whose grey is nearest. Measured:

- the distance of the colours from the original's, in the plane (a, b) of CIELAB (D50). It is the mean over the pixels whose
  grey is below 250 of 255: the others are the white ground. Of one draw of the posterior it is larger than that of its mean;
- chroma: the mean length of (a, b) over these pixels, as a share of the originals';
- KID and Fréchet distance to all training pictures in weights/rgb-features, which no loss of the model has seen;
- the share of pictures whose nearest real picture, by weights/emoji-judge, is of the right emoji;
- PSNR to the observation, before and after `Restoration.finish`, to the original, evaluations and seconds as above.

Settings are chosen by a quarter of the pictures, whose colour error stands in the first column. The other columns are of the
other pictures alone.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageCms
from torch import Tensor
from torch.nn import functional as F

from latentdiff.checkpoints import load
from latentdiff.data.pairs import read_pairs
from latentdiff.evaluation.compare_samplers import EvaluationCounter
from latentdiff.evaluation.feature_cache import reference_statistics
from latentdiff.evaluation.feature_spaces import open_features
from latentdiff.evaluation.feature_statistics import feature_statistics
from latentdiff.evaluation.frechet import frechet_distance
from latentdiff.evaluation.image_quality import psnr
from latentdiff.evaluation.kid import squared_mmd
from latentdiff.evaluation.reference_data import data_rule, reference_sets
from latentdiff.evaluation.retrieval import index_pictures, retrieval_scores
from latentdiff.evaluation.sample_sets import without_padding
from latentdiff.generation import place
from latentdiff.guidance import Blur, Downsample, Grey, Mask, restoration
from latentdiff.models.codec import LatentCodec
from latentdiff.models.judge_net import load_judge
from latentdiff.utils.images import save_rows, to_uint8

WEIGHTS = Path(__file__).parents[2] / "weights"
MODEL, FEATURES = WEIGHTS / "fashion-mnist", WEIGHTS / "fashion-mnist-features"
EMOJI, EMOJI_FEATURES, EMOJI_JUDGE = WEIGHTS / "emoji", WEIGHTS / "rgb-features", WEIGHTS / "emoji-judge"
BASELINES = {"upscale": "bicubic", "deblur": "as it is", "inpaint": "mean fill"}
SIDE = 28
GROUND = 250  # levels of grey from here on are the white ground of an emoji
SHOWN = 16  # emoji of the grid


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


@dataclass(frozen=True)
class Restored:
    """What a setting gives: images in [-1, 1] of 8 bits before and after `Restoration.finish`, and its cost for an image."""

    raw: Tensor
    finished: Tensor
    evaluations: float
    seconds: float


class Restorer:
    """A pipeline on the device that is there, with the number of evaluations of its U-Net."""

    def __init__(self, model: Path, batch_size: int):
        self.pipe, self.batch_size = load(model), batch_size
        self.device = place(self.pipe, "auto", "heun")
        self.pipe.set_progress_bar_config(disable=True)
        self.codec, self.counter = LatentCodec(self.pipe.vae), EvaluationCounter(self.pipe.unet)

    def restore(self, task: str, seen: Tensor, settings: dict[str, Any], call: dict[str, Any], **extra: Any) -> Restored:
        """Images of observations [N, ...]. settings, extra: of `restoration`. call: of the pipeline, lists of N and numbers."""
        self.counter.rows, started, finished, raw = 0, time.perf_counter(), [], []
        _, *size = self.pipe.image_shape
        for start in range(0, len(seen), self.batch_size):
            rows = slice(start, min(start + self.batch_size, len(seen)))
            plan = restoration(task, seen[rows].to(self.device), self.codec.decode, size, **extra, **settings)
            part = {key: value[rows] if isinstance(value, list) else value for key, value in call.items()}
            draws = [torch.Generator().manual_seed(k) for k in range(rows.start, rows.stop)]
            result = self.pipe(**{**plan.call, **part}, generator=draws, output_type="pt").images
            raw.append(eight_bits(2 * result - 1).cpu())
            finished.append(eight_bits(2 * plan.finish(result) - 1).cpu())
        seconds = (time.perf_counter() - started) / len(seen)
        return Restored(torch.cat(raw), torch.cat(finished), self.counter.rows / len(seen), seconds)


def name_of(settings: str) -> str:
    """A setting in a table's cell."""
    return settings.strip("{}").replace('"', "") or "default"


# Fashion-MNIST


def measure(given: argparse.Namespace) -> None:
    # The data, the networks, and the baseline
    restorer, net = Restorer(MODEL, given.batch_size), open_features(FEATURES)
    net.to(restorer.device)
    train, test = (without_padding(part) for part in reference_sets("fashion-mnist", *data_rule(MODEL, restorer.codec)))
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
        call: dict[str, Any] = {"class_labels": labels.tolist() if given.told else [None] * given.num_images}
        if given.told:
            call["guidance_scale"] = given.guidance or 1.0
        made = restorer.restore(given.task, seen, json.loads(text), call, **extra)
        distance, accuracy = frechet(made.finished)
        cells = [
            name_of(text),
            f"{distance:.3f}",
            f"{distance / floor[0]:.3f}",
            f"{accuracy:.0%}",
            f"{known_psnr(operator, made.raw, seen):.1f}",
            f"{known_psnr(operator, made.finished, seen):.1f}",
            f"{float(psnr(made.finished, images).mean()):.2f}",
            f"{made.evaluations:.0f}",
            f"{made.seconds:.2f}",
        ]
        print("| " + " | ".join(cells) + " |", flush=True)
        columns.append(made.finished)
    if given.grid:
        save_grid(given.grid, columns)


def save_grid(path: Path, columns: list[Tensor], rows: int = 16) -> None:
    """One line for each image, one column for each kind, enlarged four times."""
    from PIL import Image

    wide = [F.interpolate(column[:rows], size=(SIDE, SIDE)) for column in columns]
    sheet = torch.cat([torch.cat(list(column), dim=-2) for column in wide], dim=-1)[0]  # [rows * 28, columns * 28]
    pixels = ((sheet.clamp(-1, 1) + 1) * 127.5).round().byte().repeat_interleave(4, 0).repeat_interleave(4, 1)
    Image.fromarray(pixels.numpy()).save(path)


# Emoji


def ab_of(images: Tensor) -> Tensor:
    """The colours (a, b) of CIELAB under D50 of images [N, 3, H, W] in [-1, 1]: float32 [N, 2, H, W], in whole units."""
    profiles = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
    transform = ImageCms.buildTransform(*profiles, "RGB", "LAB")
    pixels = [np.asarray(ImageCms.applyTransform(Image.fromarray(each), transform)) for each in to_uint8(images)]
    return torch.from_numpy(np.stack(pixels)[..., 1:].view(np.int8)).permute(0, 3, 1, 2).float()


def mean_colours(train: Tensor, seen: Tensor) -> Tensor:
    """Grey images [N, 1, H, W] with the mean colour that pixels of `train` [M, 3, H, W] have at each level of grey."""
    levels = levels_of(eight_bits(Grey()(train))).flatten()
    pixels = torch.cat([train.permute(0, 2, 3, 1).reshape(-1, 3), torch.ones(len(levels), 1)], 1)
    sums = torch.zeros(256, 4, dtype=torch.float64).index_add(0, levels, pixels.double())
    means = (sums[:, :3] / sums[:, 3:].clamp_min(1)).float()  # [256, 3]
    colours = means[levels_of(seen[:, 0])].permute(0, 3, 1, 2)
    return eight_bits(Grey().project(colours, seen))


def nearest_colours(train: Tensor, seen: Tensor) -> Tensor:
    """Grey images [N, 1, H, W] with the colours of that one of `train` [M, 3, H, W] whose grey is nearest."""
    nearest = torch.cdist(seen.flatten(1), Grey()(train).flatten(1)).argmin(1)
    return eight_bits(Grey().project(train[nearest], seen))


def mean_length(ab: Tensor, part: Tensor) -> float:
    """The mean length of vectors (a, b) [N, 2, H, W] over the pixels of a part, bool [N, H, W]."""
    return float(ab.norm(dim=1)[part].mean())


def levels_of(images: Tensor) -> Tensor:
    """The 256 levels of images in [-1, 1], int64."""
    return ((images + 1) * 127.5).round().long()


def measure_colours(given: argparse.Namespace) -> None:
    # The data and the networks
    pairs = read_pairs(given.data)
    restorer, net = Restorer(EMOJI, given.batch_size), open_features(EMOJI_FEATURES)
    net.to(restorer.device)
    index = index_pictures(load_judge(EMOJI_JUDGE, restorer.device), pairs)
    held_out = pairs.held_out.nonzero()[:, 0]
    rows = held_out[torch.linspace(0, len(held_out) - 1, min(given.num_images, len(held_out))).round().long()]
    for_choice = torch.arange(len(rows)) % 4 == 0
    images, prompts = pairs.images(rows), [pairs.prompts[k] for k in rows.tolist()]
    seen = eight_bits(Grey()(images))
    drawn = levels_of(seen[:, 0]) < GROUND  # [N, H, W]
    reported = drawn & ~for_choice[:, None, None]
    real_ab = ab_of(images)
    train = pairs.images((~pairs.held_out).nonzero()[:, 0])
    reference = feature_statistics(net, [(part, None) for part in train.split(250)], keep_features=True)
    numbers = f"{int(for_choice.sum())} to choose by and {int((~for_choice).sum())} to report"
    print(f"held-out pictures: {numbers}; on {restorer.device.type}\n")
    header = ("pictures", "colour error, to choose by", "colour error", "chroma", "KID, thousandths", "Fréchet", "right emoji")
    header += ("dB to the grey", "finished", "dB to the original", "evaluations", "s")
    print(f"| {' | '.join(header)} |\n|{'---|' * len(header)}", flush=True)
    shown = []

    def row(name: str, made: Tensor, raw: Tensor | None = None, cost: Sequence[str] = ("", "")) -> None:
        ab = ab_of(made)
        colours = [mean_length(ab - real_ab, part) for part in (drawn & for_choice[:, None, None], reported)]
        features = feature_statistics(net, [(made[~for_choice], None)], keep_features=True)
        cells = [
            name,
            *(f"{error:.1f}" for error in colours),
            f"{mean_length(ab, reported) / mean_length(real_ab, reported):.2f}",
            f"{1000 * squared_mmd(features.features, reference.features):.2f}",
            f"{frechet_distance(features.moments, reference.moments):.3f}",
            f"{retrieval_scores(index, made[~for_choice], rows[~for_choice])['top1']:.0%}",
            "" if raw is None else f"{known_psnr(Grey(), raw[~for_choice], seen[~for_choice]):.1f}",
            f"{known_psnr(Grey(), made[~for_choice], seen[~for_choice]):.1f}",
            f"{float(psnr(made, images)[~for_choice].mean()):.2f}",
            *cost,
        ]
        print("| " + " | ".join(cells) + " |", flush=True)
        shown.append(made[torch.linspace(0, len(made) - 1, min(SHOWN, len(made))).round().long()])

    # What needs no diffusion model
    row("the pictures themselves", images)
    row("grey", seen.expand_as(images))
    row("mean colour of each grey", mean_colours(train, seen))
    row("colours of the nearest grey", nearest_colours(train, seen))

    # The methods
    for text in given.settings:
        settings = json.loads(text)
        told = settings.pop("told", given.told)
        call = {"prompt": prompts if told else [None] * len(rows)}
        if given.guidance is not None:
            settings.setdefault("guidance", given.guidance)
        made = restorer.restore("colorize", seen, settings, call)
        row(name_of(text), made.finished, made.raw, (f"{made.evaluations:.0f}", f"{made.seconds:.2f}"))
    if given.grid:
        save_rows(shown, given.grid)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=[*BASELINES, "colorize"])
    parser.add_argument("--data", help="for colorize: the folder that `latentdiff prepare emoji` made")
    parser.add_argument("--num-images", type=int, default=100)
    parser.add_argument("--batch-size", type=int, default=50)
    parser.add_argument("--told", action="store_true", help="tell the model each image's class or prompt")
    parser.add_argument("--guidance", type=float, help="classifier-free guidance scale, with --told")
    parser.add_argument(
        "--settings", nargs="+", default=["{}"], metavar="JSON", help='such as \'{"method": "dps", "steps": 50}\''
    )
    cache = Path(tempfile.gettempdir()) / "latentdiff-restoration"
    parser.add_argument("--cache", default=str(cache), help="folder for the training images' statistics")
    parser.add_argument("--grid", type=Path)
    given = parser.parse_args()
    if given.task == "colorize" and given.data is None:
        parser.error("--data: name the folder that `latentdiff prepare emoji` made")
    measure_colours(given) if given.task == "colorize" else measure(given)


if __name__ == "__main__":
    main()
