"""Translation of a class into another: python tests/benchmarks/translation.py --judge FOLDER... [--images N] [--picture PNG]

The first N held-out images of the source class are taken to another class by each of the methods below. Reported are, for each:
    recognised    share of the results that the judge takes for the class they should be; 0.7 is asked for
    own           share of all pairs in which a result is nearer to its own original than to that of another; 0.9 is asked for.
                  The distance is the perceptual one, in the judge's feature maps
    own, pooled   the same in the features averaged over the image, which say little but what kind of thing it shows
    evaluations   of the network, for each image; guidance evaluates twice
    seconds       for each image

The judge is a feature network that no loss has seen: `latentdiff train configs/fashion-mnist/features.yaml seed=1 output=DIR`
makes it, in DIR/features.

Methods: "translate" is latentdiff.translation through the Gaussian; "img2img" adds noise up to a time and takes it off for
the other class (SDEdit, arXiv 2108.01073). Each has a strength s and a scale g of guidance.

`python tests/benchmarks/translation.py --emoji DATA` translates pictures in one style of emoji to the other instead, by
weights/emoji: the pairs of style and emoji that training has not seen. weights/emoji-judge says whether the result is the right
emoji (the nearest of all, or among the nearest five), and whether it is in the right style. Beside it stand pictures drawn from
the prompt alone.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from latentdiff.checkpoints import load, resolve_model
from latentdiff.config import DataConfig
from latentdiff.data.pairs import read_pairs
from latentdiff.evaluation.retrieval import index_pictures, retrieval_scores
from latentdiff.models.feature_net import FeatureNet, extract, load_features
from latentdiff.models.judge_net import load_judge
from latentdiff.models.perceptual import Perceptual
from latentdiff.training.images import Images
from latentdiff.translation import cycle_error_of_images, translate_images
from latentdiff.utils.images import save_rows
from latentdiff.utils.random import generators

TRANSLATE = [(s, g) for s in (1.0, 0.9, 0.8, 0.75, 0.7) for g in (1.0, 4.0, 8.0)]
IMG2IMG = [(s, g) for s in (0.9, 0.8, 0.7) for g in (4.0, 8.0)]
EVERYWHERE = (0.0, 1.0)  # the interval of guidance: what a picture shows is decided at high noise
EMOJI_SOURCE, EMOJI_TO = "noto", "twemoji"
EMOJI_GUIDANCE, EMOJI_STRENGTHS = 4.0, (1.0, 0.9, 0.8, 0.7)
SHOWN = 12  # images of the picture


class Counted:
    """Counts how many samples a network evaluates."""

    def __init__(self, network: torch.nn.Module):
        self.samples = 0
        network.register_forward_pre_hook(self._count)

    def _count(self, module: Any, inputs: tuple) -> None:
        self.samples += len(inputs[0])


def img2img(pipe: Any, images: Tensor, to: str, strength: float, guidance: float, steps: int) -> Tensor:
    """Images with noise of a strength, denoised as the class `to`. [B, C, H, W] in [-1, 1]."""
    draws = generators(0, range(len(images)))
    call = {
        "strength": strength,
        "guidance_scale": guidance,
        "num_inference_steps": steps,
        "sampler": "heun",
        "guidance_interval": EVERYWHERE,
    }
    return pipe(class_labels=to, image=(images + 1) / 2, generator=draws, output_type="pt", **call).images * 2 - 1


def own_share(distances: Tensor) -> float:
    """Share of the pairs (i, j) in which result i is nearer to original i than to original j. distances: [N, N]."""
    nearer = distances.diag()[:, None] < distances
    return float(nearer.sum()) / (len(distances) * (len(distances) - 1))


def perceptual_distances(net: FeatureNet, results: Tensor, originals: Tensor) -> Tensor:
    """The perceptual distance of each result from each original, [N, N]."""
    distance = Perceptual(net)
    return torch.stack([distance(originals, result.expand_as(originals)) for result in results])


def described(net: FeatureNet) -> str:
    """A judge in words."""
    made, accuracy = net.info["training"], net.info.get("test_accuracy", float("nan"))
    return f"a network of seed {made['seed']} and {made['steps']} steps (accuracy {accuracy:.3f})"


def measure(arguments: argparse.Namespace) -> None:
    pipe = load(resolve_model(arguments.model))
    pipe.set_progress_bar_config(disable=True)
    data = DataConfig(source=arguments.data, size=(28, 28), channels=1)
    held_out = Images(data, 1).held_out
    number = held_out.class_names.index(arguments.source)
    rows = (held_out.labels == number).nonzero()[: arguments.images, 0]
    originals = held_out.batch(rows)[0]
    nets = [load_features(folder) for folder in arguments.judge]
    features = [extract(net, originals)[0] for net in nets]
    counted, steps, source, to = Counted(pipe.unet), arguments.steps, arguments.source, arguments.to

    def translated(strength: float, guidance: float) -> Tensor:
        draws = generators(0, range(len(originals)))
        return translate_images(
            pipe,
            originals,
            [source],
            [to],
            steps=steps,
            strength=strength,
            guidance=guidance,
            guidance_interval=EVERYWHERE,
            generator=draws,
        )

    calls = {f"translate s={s} g={g}": (translated, s, g) for s, g in TRANSLATE}
    calls |= {f"img2img s={s} g={g}": (lambda s, g: img2img(pipe, originals, to, s, g, steps), s, g) for s, g in IMG2IMG}
    print(f"{source} to {to}: {len(rows)} images, {steps} steps of Heun, judged by {', '.join(map(described, nets))}\n")
    print("| method | recognised | own | own, pooled | evaluations | seconds |\n|---|---|---|---|---|---|")
    shown = [originals[:SHOWN]]
    for name, (call, strength, guidance) in calls.items():
        if arguments.only and not any(part in name for part in arguments.only):
            continue
        counted.samples, began = 0, time.perf_counter()
        results = call(strength, guidance)
        seconds = (time.perf_counter() - began) / len(rows)
        recognised, own, pooled = [], [], []
        for net, real in zip(nets, features, strict=True):
            found, classes = extract(net, results)
            recognised.append(f"{float((classes == net.info['class_names'].index(to)).float().mean()):.2f}")
            own.append(f"{own_share(perceptual_distances(net, results, originals)):.3f}")
            pooled.append(f"{own_share(torch.cdist(found.double(), real.double())):.3f}")
        cells = [
            name,
            ", ".join(recognised),
            ", ".join(own),
            ", ".join(pooled),
            f"{counted.samples / len(rows):.0f}",
            f"{seconds:.2f}",
        ]
        print(f"| {' | '.join(cells)} |", flush=True)
        shown.append(results[:SHOWN])
    draws = generators(0, range(len(originals)))
    error = cycle_error_of_images(pipe, originals, [source], [to], steps=steps, generator=draws)
    print(f"\ncycle error of the latents: {float(error.mean()):.4f} (largest {float(error.max()):.4f}), of unit variance")
    if arguments.picture:
        save_rows(shown, arguments.picture)


def measure_emoji(arguments: argparse.Namespace) -> None:
    pipe = load(resolve_model("weights/emoji"))
    pipe.set_progress_bar_config(disable=True)
    pairs = read_pairs(arguments.emoji)
    index = index_pictures(load_judge(resolve_model("weights/emoji-judge", "judge", "model.safetensors")), pairs)
    style = pairs.style_names.index(EMOJI_TO)
    targets = (pairs.held_out & (pairs.styles == style)).nonzero()[:, 0]
    place = {(int(pairs.identities[k]), int(pairs.styles[k])): k for k in range(len(pairs))}
    other = pairs.style_names.index(EMOJI_SOURCE)
    targets = torch.tensor([k for k in targets.tolist() if (int(pairs.identities[k]), other) in place][: arguments.images])
    sources = torch.tensor([place[int(pairs.identities[k]), other] for k in targets.tolist()])
    images = pairs.images(sources)
    source_prompts, prompts = ([pairs.prompts[k] for k in rows.tolist()] for rows in (sources, targets))
    steps, count = arguments.steps, len(targets)
    print(f"{EMOJI_SOURCE} to {EMOJI_TO}: {count} held-out pairs, {steps} steps of Heun each way, guidance {EMOJI_GUIDANCE}\n")
    print("| pictures | identity, top 1 | identity, top 5 | style | top 5 in the right style |\n|---|---|---|---|---|")
    shown = [images[:SHOWN]]

    def report(name: str, results: Tensor) -> None:
        scores = retrieval_scores(index, results, targets)
        cells = " | ".join(f"{100 * scores[key]:.1f} %" for key in ("top1", "top5", "style", "top5_in_style"))
        print(f"| {name} | {cells} |", flush=True)
        shown.append(results[:SHOWN])

    report("the originals themselves", images)
    drawn = pipe(
        prompts,
        guidance_scale=EMOJI_GUIDANCE,
        num_inference_steps=steps,
        sampler="heun",
        generator=generators(0, range(count)),
        output_type="pt",
    ).images
    report("drawn from the prompt alone", drawn * 2 - 1)
    for strength in EMOJI_STRENGTHS:
        results = [
            translate_images(
                pipe,
                images[rows],
                [source_prompts[k] for k in rows],
                [prompts[k] for k in rows],
                steps=steps,
                strength=strength,
                guidance=EMOJI_GUIDANCE,
                generator=generators(1, rows),
            )
            for rows in torch.arange(count).split(32)
            for rows in [rows.tolist()]
        ]
        report(f"translated, s={strength}", torch.cat(results))
    if arguments.picture:
        save_rows(shown, arguments.picture)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--judge", nargs="+", help="folders of the feature networks that judge")
    parser.add_argument("--emoji", help="folder that `latentdiff prepare emoji` made: translate emoji instead")
    parser.add_argument("--model", default="weights/fashion-mnist")
    parser.add_argument("--data", default="fashion-mnist")
    parser.add_argument("--source", default="Sneaker")
    parser.add_argument("--to", default="Ankle boot")
    parser.add_argument("--images", type=int, default=100)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--only", nargs="*", default=[], help="measure only the methods whose name contains one of these")
    parser.add_argument("--picture", type=Path, help="write originals and results, a row for each method")
    arguments = parser.parse_args()
    if not arguments.emoji and not arguments.judge:
        parser.error("--judge: name the folder of a feature network, or give --emoji")
    measure_emoji(arguments) if arguments.emoji else measure(arguments)


if __name__ == "__main__":
    main()
