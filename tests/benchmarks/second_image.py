"""What a trained second image does: python tests/benchmarks/second_image.py MODEL --features NET [--images N] [--steps S]

MODEL enlarges Fashion-MNIST's test images from 7x7 (configs/fashion-mnist/upscale.yaml), or completes their hidden lower half
(inpaint.yaml), told the class with --told. NET is a feature network that no loss has seen, such as one of
configs/fashion-mnist/features.yaml with seed=1. Printed as JSON, for the model's images, for bicubic interpolation (enlarging)
and for the real images: the PSNR to the originals in dB, the Fréchet distance from the training images in NET's features, and
the share that NET recognises as their class. For enlarging also the PSNR of the result, made small again, to what was given.
"""

from __future__ import annotations

import argparse
import json
import time
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from latentdiff.checkpoints import load
from latentdiff.data.datasets import ImageDataset
from latentdiff.data.sources import open_source
from latentdiff.data.transforms import Preprocess
from latentdiff.evaluation.frechet import Moments, frechet_distance
from latentdiff.evaluation.image_quality import psnr
from latentdiff.models.feature_net import extract, load_features
from latentdiff.utils.processes import pick_device
from latentdiff.utils.random import generators

BATCH = 100
REFERENCE = 10_000  # training images


def lower_half(images: Tensor) -> Tensor:
    """Masks [B, 1, H, W] that hide the lower half."""
    masks = torch.zeros(len(images), 1, *images.shape[-2:])
    masks[..., images.shape[-2] // 2 :, :] = 1
    return masks


def draw(pipe: Any, images: Tensor, labels: Tensor | None, kind: str, factor: int, steps: int | None) -> Tensor:
    """The model's images [N, 1, H, W] in [-1, 1], rounded to 8 bits, for what is given of real ones."""
    made = []
    for rows in torch.arange(len(images)).split(BATCH):
        chosen = images[rows] / 2 + 0.5
        given: dict[str, Any] = {"condition_image": functional.avg_pool2d(chosen, factor)}
        if kind == "mask":
            given = {"condition_image": chosen, "condition_mask": lower_half(chosen)}
        told = [None] * len(rows) if labels is None else labels[rows].tolist()
        output = pipe(
            class_labels=told, num_inference_steps=steps, generator=generators(0, rows.tolist()), output_type="pt", **given
        ).images
        made.append((output.cpu() * 255).round() / 127.5 - 1)
    return torch.cat(made)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--features", required=True)
    parser.add_argument("--images", type=int, default=500)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--told", action="store_true")
    arguments = parser.parse_args()
    pipe = load(arguments.model).to(pick_device("auto"))
    pipe.set_progress_bar_config(disable=True)
    rule = pipe.config.image_condition
    net = load_features(arguments.features)
    test, train = (ImageDataset(open_source("fashion-mnist", part), Preprocess()) for part in ("test", "train"))
    rows = torch.linspace(0, len(test) - 1, min(arguments.images, len(test))).long()
    images, labels = test.batch(rows)
    reference = torch.linspace(0, len(train) - 1, REFERENCE).long()
    moments = [extract(net, train.batch(part)[0])[0] for part in reference.split(BATCH)]
    real = Moments(moments[0].shape[1]).update(torch.cat(moments))

    began = time.perf_counter()
    made = draw(pipe, images, labels if arguments.told else None, rule["kind"], rule["factor"], arguments.steps)
    seconds = (time.perf_counter() - began) / len(images)
    sets = {"model": made, "real": images}
    if rule["kind"] == "mask":
        masks = lower_half(images)
        sets["model"] = torch.where(masks > 0, made, images)
        sets["hidden"] = torch.where(masks > 0, torch.zeros(()), images)
    else:
        small = functional.avg_pool2d(images, rule["factor"])
        sets["bicubic"] = functional.interpolate(small, images.shape[-2:], mode="bicubic").clamp(-1, 1)
    report: dict[str, Any] = {"images": len(images), "seconds_per_image": round(seconds, 4)}
    for name, values in sets.items():
        features, classes = extract(net, values)
        facts = {"frechet": frechet_distance(Moments(features.shape[1]).update(features), real)}
        facts["psnr"] = float(psnr(values, images).mean())
        if classes is not None:
            facts["recognised"] = float((classes == labels).double().mean())
        if rule["kind"] != "mask":
            facts["psnr_small"] = float(psnr(functional.avg_pool2d(values, rule["factor"]), small).mean())
        report[name] = {key: round(value, 4) for key, value in facts.items()}
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
