"""Continuous and discrete latents side by side: python tests/benchmarks/discrete.py NAME=MODEL... [--num-images N] [--out DIR]

Each MODEL is a checkpoint of classes on the same data set, trained for as long as the others, for example by
    latentdiff train configs/fashion-mnist/diffusion.yaml train.minutes=30        # the latents of a KL autoencoder
    latentdiff train configs/fashion-mnist/diffusion-vq.yaml train.minutes=30     # the latents before a codebook
    latentdiff train configs/fashion-mnist/discrete.yaml train.minutes=30         # codes
Reported are, for each, by `latentdiff evaluate` and `likelihood` themselves:
    Fréchet        distance to the training images, in the space of each feature network
    accuracy       share of the images whose class a classifier sees
    CAS            accuracy on real images of a classifier that was trained on the images
    bits/dim       a bound; none for a model whose autoencoder has no density
    evaluations    of the network, for each image; guidance evaluates twice
    images/s       without loading the model
With --quick only distances and accuracy are measured, for many settings of one model.
A NAME may end in :KEY=VALUE,... with steps, sampler and guidance of the call: codes:sampler=confidence,steps=12=DIR.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from reporting import Table

from latentdiff.checkpoints import load, resolve_model
from latentdiff.data.transforms import Preprocess
from latentdiff.errors import UserError
from latentdiff.evaluation.compare_samplers import EvaluationCounter
from latentdiff.evaluation.evaluate import evaluate
from latentdiff.evaluation.feature_cache import reference_statistics
from latentdiff.evaluation.feature_spaces import open_features
from latentdiff.evaluation.frechet import Moments, frechet_distance
from latentdiff.evaluation.measure_likelihood import measure_likelihood
from latentdiff.evaluation.reference_data import reference_sets
from latentdiff.evaluation.sample_sets import without_padding
from latentdiff.generation import every_class, generate_share, place
from latentdiff.models.feature_net import extract
from latentdiff.utils.processes import pick_device
from latentdiff.utils.safe_yaml import read_yaml

CALL = {"steps": "num_inference_steps", "sampler": "sampler", "guidance": "guidance_scale"}
COLUMNS = {"accuracy": "{:.3f}", "CAS": "{:.3f}", "bits/dim": "{:.3f}", "evaluations": "{:.0f}", "images/s": "{:.1f}"}


def call_of(name: str) -> dict[str, Any]:
    """The arguments of the pipeline's call that a name ends in, after a colon."""
    words = [word.partition("=") for word in name.partition(":")[2].split(",") if word]
    return {CALL[key]: read_yaml(value) for key, _, value in words}


def drawn(name: str, model: str, count: int, batch: int, device: str, out: Path) -> tuple[Path, dict[str, list[float]]]:
    """(an npz of `count` images of a model, as many of each class; evaluations and images a second)."""
    pipe = load(resolve_model(model))
    pipe.set_progress_bar_config(disable=True)
    place(pipe, device)
    counted, rows = EvaluationCounter(pipe.unet), every_class(pipe)
    each = count // len(rows)
    generate_share(pipe, rows, 1, 1, batch, **call_of(name))  # warms up
    counted.rows, began = 0, time.perf_counter()
    images = generate_share(pipe, rows, each, 0, batch, **call_of(name))
    seconds = time.perf_counter() - began
    path = out / f"{name.replace(':', '-').replace(',', '-')}.npz"
    np.savez(path, arr_0=images, arr_1=np.repeat(np.asarray(rows, np.int64), each))
    return path, {"evaluations": [counted.rows / len(images)], "images/s": [len(images) / seconds]}


def quickly(path: Path, arguments: argparse.Namespace) -> dict[str, list[float]]:
    """Distances and accuracy alone, of the images in an npz."""
    train = without_padding(reference_sets(arguments.data, Preprocess(channels=1))[0])
    with np.load(path) as file:
        images, labels = torch.from_numpy(file["arr_0"]).permute(0, 3, 1, 2), torch.from_numpy(file["arr_1"])
    row = {}
    for k, features in enumerate(arguments.features):
        net = open_features(features).to(pick_device(arguments.device))
        reference: Any = reference_statistics(net, train, 1000, Path(arguments.out) / f"reference-{k}", print)
        parts = [extract(net, batch / 127.5 - 1) for batch in images.split(1000)]
        moments = Moments(net.dim).update(torch.cat([part[0] for part in parts]))
        row[f"Fréchet {k + 1}"] = [frechet_distance(moments, reference.moments)]
        if k == 0 and parts[0][1] is not None:
            row["accuracy"] = [float((torch.cat([part[1] for part in parts]) == labels).double().mean())]
    return row


def measured(name: str, model: str, arguments: argparse.Namespace) -> dict[str, list[float]]:
    """The numbers of one model, by column."""
    path, row = drawn(name, model, arguments.num_images, arguments.batch_size, arguments.device, Path(arguments.out))
    if arguments.quick:
        return row | quickly(path, arguments)
    for k, features in enumerate(arguments.features):
        seeds = 0 if k else arguments.cas_seeds
        cache = Path(arguments.out) / f"reference-{k}"
        report: Any = evaluate(
            None,
            arguments.data,
            samples=path,
            features=features,
            cas_seeds=seeds,
            device=arguments.device,
            reference_cache=cache,
        )
        metrics = {key.partition("[")[0]: entry["value"] for key, entry in report["metrics"].items()}
        row[f"Fréchet {k + 1}"] = [metrics["frechet"]]
        if k == 0 and "label_accuracy" in metrics:
            row["accuracy"] = [metrics["label_accuracy"]]
        if seeds:
            row["CAS"] = [metrics["cas"]]
    print(f"{name}: {row}", flush=True)  # the bound may take long
    if arguments.bits_images:
        images, device = arguments.bits_images, arguments.device
        try:
            row["bits/dim"] = [measure_likelihood(model, arguments.data, images, device=device)["bits_per_dim"]]
        except UserError as error:
            print(f"{name}: {error}")
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", metavar="NAME=MODEL")
    parser.add_argument("--data", default="fashion-mnist")
    parser.add_argument("--num-images", type=int, default=10_000)
    parser.add_argument("--features", nargs="+", default=["weights/fashion-mnist-features"])
    parser.add_argument("--cas-seeds", type=int, default=1)
    parser.add_argument("--bits-images", type=int, default=200)
    parser.add_argument("--batch-size", type=int, default=250)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--out", default="discrete-benchmark")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    Path(arguments.out).mkdir(parents=True, exist_ok=True)
    rows = {}
    columns = {f"Fréchet {k + 1}": "{:.3f}" for k in range(len(arguments.features))} | COLUMNS
    for item in arguments.models:
        name, _, model = item.rpartition("=")
        rows[name] = measured(name, model, arguments)
        print(Table("Continuous and discrete latents", columns, {name: rows[name]}).markdown(), flush=True)
    text = Table("Continuous and discrete latents", columns, rows).markdown()
    (Path(arguments.out) / "table.md").write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
