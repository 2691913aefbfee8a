"""Completing test images of Fashion-MNIST: python tests/benchmarks/completion.py --judge FOLDER [--num-images N]

The lower half of held-out images is hidden, and weights/fashion-mnist fills it in, told the class of each: by replacement
(`mask_image=`), with known pixels (as `latentdiff edit --mask` does) and by posterior sampling. Reported are, for each way:
    recognised     share of completed images that the judge takes for their class; 0.85 is asked for
    Fréchet        distance of whole pictures to training images, in the judge's features, and the model's own beside it: that
                   of as many generated images of the same classes
    hidden half    the same with the known half of all images black
    known          the largest difference of a known pixel; 0 is asked for
    cost           seconds over those of generating as many images with as many steps; 1.2 is asked for of replacement
The last line says how far 16 completions of one image differ: the mean standard deviation of a hidden pixel, in [0, 1].

The judge is a feature network that no loss has seen: `latentdiff train configs/fashion-mnist/features.yaml seed=1 output=DIR`
makes it, in DIR/features.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from latentdiff.checkpoints import load
from latentdiff.evaluation.feature_spaces import open_features
from latentdiff.evaluation.feature_statistics import feature_statistics
from latentdiff.evaluation.frechet import frechet_distance
from latentdiff.evaluation.reference_data import data_rule, reference_sets
from latentdiff.evaluation.sample_sets import without_padding
from latentdiff.guidance import restoration
from latentdiff.models.codec import LatentCodec
from latentdiff.utils.images import save_rows
from latentdiff.utils.processes import pick_device
from latentdiff.utils.random import generators

MODEL = Path(__file__).parents[2] / "weights" / "fashion-mnist"
SIDE = 28
# (margin of replacement or method of `restoration`, sampler, steps, its options); None: the checkpoint's, or the method's
SETTINGS: list[tuple[int | str, str | None, int | None, dict[str, Any]]] = [
    (0, None, None, {}),
    (1, None, None, {}),
    (2, None, None, {}),
    (1, "ddim", 30, {}),
    ("known_pixels", None, None, {}),
    ("known_pixels", "dpmpp_2m_sde", 12, {}),
    ("mmps", None, None, {}),
    ("known_pixels", "ddim", 50, {"eta": 1.0}),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--judge", type=Path, required=True)
    parser.add_argument("--num-images", type=int, default=100)
    parser.add_argument("--reference-images", type=int, default=2000)
    parser.add_argument("--batch-size", type=int, default=50)
    parser.add_argument("--settings", type=int, nargs="+", default=list(range(len(SETTINGS))), help="which rows")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--picture", type=Path)
    given = parser.parse_args()

    device = pick_device("auto")
    pipe, net = load(MODEL).to(device), open_features(given.judge).to(device)
    pipe.set_progress_bar_config(disable=True)
    codec = LatentCodec(pipe.vae)
    train, test = (without_padding(part) for part in reference_sets("fashion-mnist", *data_rule(MODEL, codec)))
    images, labels = test.batch(torch.linspace(0, len(test) - 1, given.num_images).long())
    assert labels is not None
    mask = torch.zeros(1, 1, SIDE, SIDE)
    mask[..., SIDE // 2 :, :] = 1
    reference = train.batch(torch.linspace(0, len(train) - 1, given.reference_images).long())[0]
    wholes, halves = (feature_statistics(net, [(each, None)]).moments for each in (reference, hidden_half(reference, mask)))

    def draw(way: int | str | None, **call: Any) -> tuple[Tensor, float]:
        """(images in [-1, 1], seconds): generated where `way` is None, else completed."""
        made, started = [], time.perf_counter()
        for start in range(0, given.num_images, given.batch_size):
            rows = slice(start, min(start + given.batch_size, given.num_images))
            more: dict[str, Any] = {
                "class_labels": labels[rows].tolist(),
                "generator": generators(given.seed, range(*rows.indices(10**9))),
            }
            if isinstance(way, str):
                made.append(restored(images[rows], way, call, more))
                continue
            if way is not None:
                more |= {"image": (images[rows] + 1) / 2, "mask_image": mask, "mask_margin": way}
            made.append(pipe(**call, **more, output_type="pt").images.cpu() * 2 - 1)
        return torch.cat(made), time.perf_counter() - started

    def restored(known: Tensor, method: str, call: dict[str, Any], more: dict[str, Any]) -> Tensor:
        """Images completed by a method of `restoration`."""
        settings: dict[str, Any] = {"method": method, "encode": lambda images: codec.latents(images, use_mean=True)}
        if call["sampler"]:
            options = tuple(call["sampler_options"].items())
            settings |= {"sampler": call["sampler"], "steps": call["num_inference_steps"], "sampler_options": options}
        plan = restoration("inpaint", known.to(device), codec.decode, (SIDE, SIDE), mask.to(device), **settings)
        made = plan.finish(pipe(**plan.call, **more, output_type="pt").images).cpu()
        return torch.where(mask > 0.5, made * 2 - 1, known)

    def row(name: str, made: Tensor, cost: str) -> None:
        whole = feature_statistics(net, [(made, labels)])
        half = feature_statistics(net, [(hidden_half(made, mask), None)])
        known = ((made - images).abs() * (1 - mask)).max() / 2
        print(
            f"| {name} | {whole.accuracy:.1%} | {frechet_distance(whole.moments, wholes):.3f} "
            f"| {frechet_distance(half.moments, halves):.3f} | {float(known):.2g} | {cost} |",
            flush=True,
        )

    print("| | recognised | Fréchet | hidden half | known | cost |\n|---|---|---|---|---|---|")
    row("the images themselves", images, "")
    columns, generated = [images, hidden_half(images, 1 - mask)], {}
    for place in given.settings:
        way, sampler, steps, options = SETTINGS[place]
        call = {"sampler": sampler, "num_inference_steps": steps, "sampler_options": options}
        if (sampler, steps) not in generated:
            plain, seconds = draw(None, **call)
            generated[sampler, steps] = seconds
            row(f"generated, {sampler or 'scheduler'}, {steps or 'default'} steps", plain, "1")
        made, seconds = draw(way, **call)
        name = way if isinstance(way, str) else f"replacement, margin {way}"
        name = f"{name}, {sampler or 'default'}, {steps or 'default'} steps"
        row(name, made, f"{seconds / generated[sampler, steps]:.2f}")
        columns.append(made)
    many = pipe(
        class_labels=[int(labels[0])] * 16,
        image=(images[:1] + 1) / 2,
        mask_image=mask,
        generator=generators(1, range(16)),
        output_type="pt",
    ).images.cpu()
    print(f"16 completions of one image: {float(many.std(0)[..., SIDE // 2 :, :].mean()):.3f}")
    if given.picture:
        save_rows([column[:12] for column in columns], given.picture, scale=3)


def hidden_half(images: Tensor, mask: Tensor) -> Tensor:
    """Images [B, 1, H, W] in [-1, 1] that are black where the mask is 0."""
    return torch.where(mask > 0.5, images, -1.0)


if __name__ == "__main__":
    main()
