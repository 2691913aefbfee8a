"""`latentdiff agreement`: how well denoisers remove noise, by noise level, and how far apart the answers of several are.

At one log-SNR and one noise, x_t / alpha = x0 + exp(-log_snr / 2) eps for every process, and E[x0 | x_t] is a function of
that ratio ("Variational Diffusion Models", arXiv 2107.00630, section 5.1; "EDM", arXiv 2206.00364, eq. 4 and 6). So denoisers
trained on different processes estimate the same function, and can be compared on the same inputs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from latentdiff.errors import NotFiniteError, UserError
from latentdiff.evaluation.tables import NONE, markdown_table

if TYPE_CHECKING:
    from torch import Tensor

LOG_SNRS = (-6.0, -4.0, -2.0, 0.0, 2.0, 4.0, 6.0)


def agreement(
    models: Sequence[str | Path],
    data: str,
    num_images: int = 500,
    log_snrs: Sequence[float] = LOG_SNRS,
    seed: int = 0,
    batch_size: int = 100,
) -> dict[str, Any]:
    """Compare how well models denoise at each noise level, and how far their answers are from the first model's.

    Held-out latents are noised to each log-SNR, and every model estimates x0. Latents are draws from the posteriors of test
    images, as in training (means, where the models were trained on means), normalised to unit variance. Classes are given.
    Draws and noise are the same for all models.

    Args:
        models: one or more checkpoints over the same autoencoder.
        data: a data set: a folder, fashion-mnist, a Hub name, or a pattern of tables or shards. Its test images are denoised.
        num_images: test images.
        log_snrs: noise levels, as log(alpha^2 / sigma^2).
        seed: chooses the images and draws latents and noise.
        batch_size: images denoised at a time.

    Returns:
        {"log_snrs", "models": [{"model", "errors", "distances"}], "protocol"}. Errors are mean squared errors of x0, and
        distances mean squared differences from the first model's x0; one for each log-SNR, as [mean, standard error over
        images], or None where a log-SNR is beyond the model's process.

    Raises:
        UserError: models of other autoencoders, preprocessing or classes, data of other classes, or numbers out of range.
    """
    from latentdiff.data.shuffling import permutation
    from latentdiff.utils.random import derive_seed, generators, randn

    if num_images < 2 or batch_size < 1 or not all(map(math.isfinite, log_snrs)):
        raise UserError("agreement: --num-images must be at least 2, --batch-size at least 1, every one of --log-snrs finite")
    loaded, codec, use_mean, test = _load(models, data)
    if num_images > len(test):
        raise UserError(f"--num-images {num_images}: --data {data} has {len(test)} test images")

    # [model][log-SNR] -> batches of values, one for each image
    errors: list[list[list[Tensor]]] = [[[] for _ in log_snrs] for _ in loaded]
    distances: list[list[list[Tensor]]] = [[[] for _ in log_snrs] for _ in loaded]
    for rows in permutation(len(test), seed, "agreement")[:num_images].split(batch_size):
        images, labels = test.batch(rows)
        x0 = codec.latents(images, generators(derive_seed(seed, "agreement", "posterior"), rows.tolist()), use_mean)
        noise = randn(x0.shape, generators(derive_seed(seed, "agreement"), rows.tolist())).to(x0)
        for j, log_snr in enumerate(log_snrs):
            first: Tensor | None = None
            for i, (pipeline, denoiser) in enumerate(loaded):
                conditioning = {"class_labels": labels.to(x0.device)} if pipeline.num_classes else {}
                current = estimate_x0(denoiser, x0, noise, log_snr, **conditioning)
                if current is None:
                    continue
                if not bool(current.isfinite().all()):
                    raise NotFiniteError(f"{models[i]}: its U-Net's output is not finite at log-SNR {log_snr:g}")
                first = current if i == 0 else first
                errors[i][j].append((current - x0).square().flatten(1).mean(1))
                if first is not None:
                    distances[i][j].append((current - first).square().flatten(1).mean(1))

    results = [
        {"model": str(name), "errors": [*map(_mean, errors[i])], "distances": [*map(_mean, distances[i])]}
        for i, name in enumerate(models)
    ]
    latents = "posterior means" if use_mean else "posterior draws"
    protocol = {"data": data, "images": num_images, "seed": seed, "latents": latents, "autoencoder": codec.fingerprint()}
    return {"log_snrs": list(log_snrs), "models": results, "protocol": protocol}


def estimate_x0(denoiser: Any, x0: Tensor, noise: Tensor, log_snr: float, **conditioning: Any) -> Tensor | None:
    """A denoiser's estimate of E[x0 | x_t], [B, ...], at one log-SNR; None beyond its schedule's usable interval.

    Args:
        denoiser: a `Denoiser`.
        x0: clean latents [B, ...].
        noise: standard normal, [B, ...].
        log_snr: log(alpha^2 / sigma^2).
        conditioning: of the denoiser's call.
    """
    import torch

    from latentdiff.objective import add_noise

    schedule = denoiser.schedule
    ends = schedule.log_snr(torch.tensor([schedule.t_max, schedule.t_min], dtype=torch.float64))
    if not ends[0] <= log_snr <= ends[1]:
        return None
    t = float(schedule.time_from_log_snr(log_snr))
    with torch.no_grad():
        return denoiser(add_noise(schedule, x0, noise, t), t, **conditioning).x0


def _load(models: Sequence[str | Path], data: str) -> tuple[list[tuple[Any, Any]], Any, bool, Any]:
    """([(pipeline, denoiser)], their one codec, whether they were trained on posterior means, the test images)."""
    from latentdiff.checkpoints import load, refuse_bridge, resolve_model
    from latentdiff.denoiser import Denoiser
    from latentdiff.evaluation.reference_data import check_classes, data_rule, reference_sets, trained_on_means
    from latentdiff.generation import refuse_second_image
    from latentdiff.models.codec import LatentCodec

    loaded: list[tuple[Any, Any]] = []
    first: dict[str, Any] = {}
    for name in models:
        folder = resolve_model(name)
        pipeline = load(folder)
        refuse_bridge(pipeline, str(name))
        refuse_second_image(pipeline, "agreement")
        if pipeline.text_encoder is not None:
            raise UserError(f"{name}: reads text; agreement compares models with classes or without a condition")
        codec = LatentCodec(pipeline.vae)
        facts = {
            "autoencoder": codec.fingerprint(),
            "preprocessing and held-out share": data_rule(folder, codec),
            "number of classes": pipeline.num_classes,
            "cache.use_mean": trained_on_means(folder),
        }
        first = first or facts
        for key in facts:
            if facts[key] != first[key]:
                raise UserError(f"{name}: has another {key} than {models[0]}, so their answers cannot be compared")
        loaded.append((pipeline, Denoiser.from_pipeline(pipeline)))
    test = reference_sets(data, *first["preprocessing and held-out share"])[1]
    for pipeline, _ in loaded:
        check_classes(pipeline, test, data)
    return loaded, codec, first["cache.use_mean"], test


def _mean(parts: list[Tensor]) -> list[float] | None:
    """[mean, standard error] over images; None without any."""
    import torch

    if not parts:
        return None
    values = torch.cat(parts).double()
    return [float(values.mean()), float(values.std()) / math.sqrt(len(values))]


def agreement_markdown(result: dict[str, Any]) -> str:
    """The result of `agreement` as Markdown: the errors, the distances, the protocol."""
    header = ["model", *(f"{log_snr:g}" for log_snr in result["log_snrs"])]
    titles = {"errors": "Mean squared error of x0 by log-SNR", "distances": f"The same from {result['models'][0]['model']}"}
    lines: list[str] = []
    for key, title in titles.items():
        rows = [
            (each["model"], *(NONE if cell is None else f"{cell[0]:.4f} ± {cell[1]:.4f}" for cell in each[key]))
            for each in result["models"]
        ]
        lines += [f"{title}:", "", *markdown_table(header, rows), ""]
    return "\n".join([*lines, ", ".join(f"{key} {value}" for key, value in result["protocol"].items())]) + "\n"
