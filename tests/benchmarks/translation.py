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
emoji (the nearest of all, or among the nearest five), and whether it is in the right style. Distances are root mean squares of
pixels in [0, 1], to the picture that was translated and to the real one of the other style, which nothing was shown. Beside the
methods stand pictures drawn from the prompt alone. A source without a name ("noto style") shows what the picture itself says.
Settings are chosen by the way back, from the second style to the first; --one-way leaves it out.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from latentdiff.checkpoints import load, resolve_model
from latentdiff.config import DataConfig
from latentdiff.data.pairs import Pairs, read_pairs
from latentdiff.evaluation.compare_samplers import EvaluationCounter
from latentdiff.evaluation.retrieval import PictureIndex, index_pictures, retrieval_scores
from latentdiff.generation import place
from latentdiff.models.feature_net import FeatureNet, extract, load_features
from latentdiff.models.judge_net import load_judge
from latentdiff.models.perceptual import Perceptual
from latentdiff.training.images import Images
from latentdiff.translation import cycle_error_of_images, translate_images
from latentdiff.utils.images import save_rows
from latentdiff.utils.random import generators
from latentdiff.utils.tensors import flat_mean

TRANSLATE = [(s, g) for s in (1.0, 0.9, 0.8, 0.75, 0.7) for g in (1.0, 4.0, 8.0)]
IMG2IMG = [(s, g) for s in (0.9, 0.8, 0.7) for g in (4.0, 8.0)]
AWAY = [(0.7, 6.0), (0.6, 10.0), (0.6, 16.0), (0.5, 20.0), (0.5, 24.0), (0.5, 28.0), (0.4, 32.0)]
EVERYWHERE = (0.0, 1.0)  # the interval of guidance: what a picture shows is decided at high noise
EMOJI_GUIDANCE = 4.0  # the checkpoint's
# (kind, strength, guidance) of emoji; see `EmojiTask`
EMOJI_METHODS = [
    ("translate", 1.0, 1.0),
    *(("translate", s, 4.0) for s in (1.0, 0.8, 0.7, 0.6, 0.5)),
    *(("away from the source", s, 4.0) for s in (0.8, 0.7, 0.6, 0.5)),
    *(("styles alone", s, 4.0) for s in (0.8, 0.7, 0.6)),
    *(("img2img", s, 4.0) for s in (0.8, 0.7, 0.6)),
]
SHOWN = 12  # images of the picture


def img2img(pipe: Any, images: Tensor, to: dict[str, Any], strength: float, guidance: float, steps: int) -> Tensor:
    """Images with noise of a strength, denoised as what `to` says, [B, C, H, W] in [-1, 1].

    to: class_labels or prompt, and the same of what to guide away from.
    """
    draws = generators(0, range(len(images)))
    call = {
        "strength": strength,
        "guidance_scale": guidance,
        "num_inference_steps": steps,
        "sampler": "heun",
        "guidance_interval": EVERYWHERE,
    }
    return (pipe(**to, image=(images + 1) / 2, generator=draws, output_type="pt", **call).images * 2 - 1).cpu()


def own_share(distances: Tensor) -> float:
    """Share of the pairs (i, j) in which result i is nearer to original i than to original j. distances: [N, N]."""
    nearer = distances.diag()[:, None] < distances
    return float(nearer.sum()) / (len(distances) * (len(distances) - 1))


def perceptual_distances(net: FeatureNet, results: Tensor, originals: Tensor) -> Tensor:
    """The perceptual distance of each result from each original, [N, N]."""
    distance, device = Perceptual(net), next(net.parameters()).device
    originals, results = originals.to(device), results.to(device)
    return torch.stack([distance(originals, result.expand_as(originals)) for result in results]).cpu()


def described(net: FeatureNet) -> str:
    """A judge in words."""
    made, accuracy = net.info["training"], net.info.get("test_accuracy", float("nan"))
    return f"a network of seed {made['seed']} and {made['steps']} steps (accuracy {accuracy:.3f})"


def measure(arguments: argparse.Namespace) -> None:
    pipe = load(resolve_model(arguments.model))
    device = place(pipe, "auto", "heun")
    pipe.set_progress_bar_config(disable=True)
    data = DataConfig(source=arguments.data, size=(28, 28), channels=1)
    held_out = Images(data, 1).held_out
    number = held_out.class_names.index(arguments.source)
    rows = (held_out.labels == number).nonzero()[: arguments.images, 0]
    originals = held_out.batch(rows)[0]
    nets = [load_features(folder).to(device) for folder in arguments.judge]
    features = [extract(net, originals)[0] for net in nets]
    counted, steps, source, to = EvaluationCounter(pipe.unet), arguments.steps, arguments.source, arguments.to

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
        ).cpu()

    def noised(strength: float, guidance: float) -> Tensor:
        return img2img(pipe, originals, {"class_labels": to}, strength, guidance, steps)

    def noised_away(strength: float, guidance: float) -> Tensor:
        return img2img(pipe, originals, {"class_labels": to, "negative_class_labels": source}, strength, guidance, steps)

    calls = {f"translate s={s} g={g}": (translated, s, g) for s, g in TRANSLATE}
    calls |= {f"img2img s={s} g={g}": (noised, s, g) for s, g in IMG2IMG}
    calls |= {f"img2img away from the source s={s} g={g}": (noised_away, s, g) for s, g in AWAY}
    print(f"{source} to {to}: {len(rows)} images, {steps} steps of Heun, judged by {', '.join(map(described, nets))}\n")
    print("| method | recognised | own | own, pooled | evaluations | seconds |\n|---|---|---|---|---|---|")
    shown = [originals[:SHOWN]]
    for name, (call, strength, guidance) in calls.items():
        if arguments.only and not any(part in name for part in arguments.only):
            continue
        counted.rows, began = 0, time.perf_counter()
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
            f"{counted.rows / len(rows):.0f}",
            f"{seconds:.2f}",
        ]
        print(f"| {' | '.join(cells)} |", flush=True)
        shown.append(results[:SHOWN])
    draws = generators(0, range(len(originals)))
    error = cycle_error_of_images(pipe, originals, [source], [to], steps=steps, generator=draws)
    print(f"\ncycle error of the latents: {float(error.mean()):.4f} (largest {float(error.max()):.4f}), of unit variance")
    if arguments.picture:
        save_rows(shown, arguments.picture)


@dataclass(frozen=True)
class EmojiTask:
    """Pictures of emoji in one style, to be translated to another, with what a pipeline draws of them.

    Attributes:
        pipe: the model.
        images: [N, 3, H, W] in [-1, 1].
        source, to: the prompts of the pictures and of what they become.
        source_style, to_style: the same without the name of what is shown, such as "noto style".
        steps: of Heun's method, each way.
    """

    pipe: Any
    images: Tensor
    source: list[str]
    to: list[str]
    source_style: str
    to_style: str
    steps: int

    def translate(self, strength: float, guidance: float) -> Tensor:
        """From prompt to prompt, guided away from no text."""
        return self._translated(self.source, self.to, [None], strength, guidance)

    def away(self, strength: float, guidance: float) -> Tensor:
        """From prompt to prompt, guided away from the source's prompt: what guidance adds is then the style alone."""
        return self._translated(self.source, self.to, self.source, strength, guidance)

    def styles(self, strength: float, guidance: float) -> Tensor:
        """From style to style, guided away from the source's. Nothing but the picture says what it shows."""
        return self._translated([self.source_style], [self.to_style], [self.source_style], strength, guidance)

    def noised(self, strength: float, guidance: float) -> Tensor:
        """With noise added and taken off for the prompt (SDEdit)."""
        return img2img(self.pipe, self.images, {"prompt": self.to}, strength, guidance, self.steps)

    def drawn(self, guidance: float, is_away: bool = False) -> Tensor:
        """From the prompts alone; away from the source's prompts, or from no text."""
        call = {"guidance_scale": guidance, "num_inference_steps": self.steps, "sampler": "heun", "output_type": "pt"}
        if is_away:
            call["negative_prompt"] = self.source
        draws = generators(0, range(len(self.images)))
        return (self.pipe(self.to, generator=draws, **call).images * 2 - 1).cpu()

    def _translated(
        self, source: list[str], to: list[str], away: Sequence[str | None], strength: float, guidance: float
    ) -> Tensor:
        """Through the Gaussian, by the ODE. [N, 3, H, W] in [-1, 1]."""
        call = {"steps": self.steps, "strength": strength, "guidance": guidance, "away": away}
        return translate_images(
            self.pipe, self.images, source, to, generator=generators(1, range(len(self.images))), **call
        ).cpu()


def measure_emoji(arguments: argparse.Namespace) -> None:
    pipe = load(resolve_model("weights/emoji"))
    device = place(pipe, "auto", "heun")
    pipe.set_progress_bar_config(disable=True)
    pairs = read_pairs(arguments.emoji)
    index = index_pictures(load_judge(resolve_model("weights/emoji-judge", "judge", "model.safetensors"), device), pairs)
    ways = [arguments.styles] if arguments.one_way else [arguments.styles[::-1], arguments.styles]
    shown = [results for styles in ways for results in emoji_table(arguments, pipe, pairs, index, styles)]
    if arguments.picture:
        save_rows(shown, arguments.picture)


def emoji_table(
    arguments: argparse.Namespace, pipe: Any, pairs: Pairs, index: PictureIndex, styles: Sequence[str]
) -> list[Tensor]:
    """Print what each method gives of pairs held out in the second style, and return some of its pictures, a row each."""
    source, to = (pairs.style_names.index(style) for style in styles)
    place_of = {(int(pairs.identities[k]), int(pairs.styles[k])): k for k in range(len(pairs))}
    targets = (pairs.held_out & (pairs.styles == to)).nonzero()[:, 0]
    targets = targets[torch.linspace(0, len(targets) - 1, min(arguments.images, len(targets))).round().long()]
    sources = torch.tensor([place_of[int(pairs.identities[k]), source] for k in targets.tolist()])
    images, real = pairs.images(sources), pairs.images(targets)
    prompts = [[pairs.prompts[k] for k in rows.tolist()] for rows in (sources, targets)]
    steps, count, counted = arguments.steps, len(targets), EvaluationCounter(pipe.unet)
    task = EmojiTask(pipe, images, *prompts, *(f"{style} style" for style in styles), steps)
    print(f"\n{' to '.join(styles)}: {count} held-out pairs on {pipe.device.type}, {steps} steps of Heun each way\n")
    header = ("pictures", "identity, top 1", "identity, top 5", "style", "top 5 in the right style")
    header += ("to the original", "to the real one", "evaluations", "s")
    print(f"| {' | '.join(header)} |\n|{'---|' * len(header)}", flush=True)
    shown = []

    def report(name: str, make: Callable[[], Tensor]) -> None:
        if arguments.only and not any(part in name for part in arguments.only):
            return
        counted.rows, began = 0, time.perf_counter()
        results = make()
        seconds = (time.perf_counter() - began) / count
        scores = retrieval_scores(index, results, targets)
        cells = [f"{100 * scores[key]:.1f} %" for key in ("top1", "top5", "style", "top5_in_style")]
        cells += [f"{float(flat_mean((results - other).square()).sqrt().mean()) / 2:.3f}" for other in (images, real)]
        cells += [f"{counted.rows / count:.0f}", f"{seconds:.2f}"]
        print(f"| {name} | {' | '.join(cells)} |", flush=True)
        shown.append(results[torch.linspace(0, count - 1, min(SHOWN, count)).round().long()])

    report("the originals themselves", lambda: images)
    report("the real ones", lambda: real)
    report("drawn from the prompt alone", lambda: task.drawn(EMOJI_GUIDANCE))
    report("drawn from the prompt, away from the source's", lambda: task.drawn(EMOJI_GUIDANCE, is_away=True))
    kinds = {
        "translate": task.translate,
        "away from the source": task.away,
        "styles alone": task.styles,
        "img2img": task.noised,
    }
    for kind, strength, guidance in EMOJI_METHODS:
        report(f"{kind} s={strength} g={guidance}", partial(kinds[kind], strength, guidance))
    return shown


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--judge", nargs="+", help="folders of the feature networks that judge")
    parser.add_argument("--emoji", help="folder that `latentdiff prepare emoji` made: translate emoji instead")
    parser.add_argument("--styles", nargs=2, default=["noto", "twemoji"], help="of emoji: of the pictures, and of the results")
    parser.add_argument("--one-way", action="store_true", help="of emoji: without the way back, by which settings are chosen")
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
