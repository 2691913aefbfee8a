"""All metrics of generated images: each value beside its floor, with the protocol that made it.

A distance alone says little. It depends on the number of images, the reference, the classes and the feature network. So a
report holds all of these. It also holds the floor: the value of real held-out images, as many as the samples. And it holds
the value of the autoencoder's own reconstructions of them; no denoiser in its latent space can be expected to do better.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from latentdiff.data.datasets import ImageDataset
from latentdiff.errors import UserError
from latentdiff.evaluation import guidance_curve
from latentdiff.evaluation.classification import ClassifierTrainer, cas, class_counts
from latentdiff.evaluation.feature_metrics import FeatureMetrics, mean_over_seeds, metric_settings
from latentdiff.evaluation.feature_statistics import FeatureStatistics, feature_statistics, read_batches
from latentdiff.evaluation.frechet import frechet_distance
from latentdiff.evaluation.image_quality import psnr, ssim
from latentdiff.evaluation.linear_probe import LinearProbe, fit_probe
from latentdiff.evaluation.sample_sets import matching_rows, sample_set, subset, without_padding
from latentdiff.models.codec import LatentCodec
from latentdiff.models.feature_net import FeatureSpace
from latentdiff.utils import progress_bars

OWN_CLASSES = "the feature network's own classes"  # who tells the classes for the label accuracy
# What a reader needs to repeat a number. What the caller does not know stays None and is shown as "not stated"
PROTOCOL_FIELDS = ("model", "sampler", "steps", "guidance", "seed")


def say(line: str) -> None:
    """Print a line of progress to stderr."""
    progress_bars.print_line(line)


def evaluate_samples(
    samples: np.ndarray,
    labels: np.ndarray | None,
    train: ImageDataset,
    test: ImageDataset,
    net: FeatureSpace,
    *,
    protocol: Mapping[str, Any] | None = None,
    codec: LatentCodec | None = None,
    train_classifier: ClassifierTrainer | None = None,
    cas_seeds: Sequence[int] = (0,),
    draw_seed: int = 0,
    batch: int = 250,
    more: Sequence[np.ndarray] = (),
    reference: FeatureStatistics | None = None,
    guided: tuple[Mapping[float, np.ndarray], np.ndarray | None] | None = None,
    log: Callable[[str], None] = say,
) -> dict[str, Any]:
    """Measure generated images against real ones.

    The reference of every Fréchet distance is the whole of train. The floor is the same distance for N held-out images
    with the samples' class counts (fewer where test has fewer; the report says how many). All images are compared without
    padding, in 8 bits. Images are read batch by batch; memory holds the samples and one float32 feature vector per image.

    Args:
        samples: uint8 [N, H, W, C]; grey samples may come as RGB, as `generate` writes them.
        labels: int64 [N], indices into train.class_names; None for samples without a class: no label accuracy, no CAS.
        train: the training images.
        test: the held-out images.
        net: the feature network.
        protocol: how the samples were made: model, sampler, steps, guidance, seed, and whatever else the report should hold.
        codec: the autoencoder, for the reconstructions; None leaves them out.
        train_classifier: trains a classifier from (data set, seed), for CAS; None leaves CAS out.
        cas_seeds: seeds of CAS's classifiers.
        draw_seed: draws the real images of the floor and of CAS, and subsets of images.
        batch: images in a batch of the network.
        more: further sets like samples, of other seeds. Values are then means over all sets, with their spread. CAS,
            per_class, memorisation and samples_sha256 are of the first set alone.
        reference: statistics of train without padding, with features (`feature_cache`); None: measured here.
        guided: ({guidance scale: samples}, their labels) for a guidance curve; None leaves it out.
        log: gets lines of progress.

    Returns:
        The report as JSON values: protocol, reference, metrics, distribution and memorisation (see `FeatureMetrics`),
        settings, left_out; where measured also guidance_curve, per_class and reconstruction (psnr in dB, ssim).

    Raises:
        UserError: samples, labels and data do not go together; the message says how.
    """
    # The sets of images
    train_content, test_content = without_padding(train), without_padding(test)
    sets = [sample_set(each, labels, train_content) for each in (samples, *more)]
    generated = sets[0]
    if any(len(each) != len(generated) for each in sets):
        raise UserError(f"sets of samples from several seeds must be equally large, got {[len(each) for each in sets]}")
    floor_rows = matching_rows(test, generated.labels, len(generated), draw_seed)
    held_out = subset(test_content, floor_rows)
    log(f"evaluate: features of {len(train)} reference images, {len(generated)} samples, {len(floor_rows)} test images")
    if len(floor_rows) < min(len(generated), 2 * net.dim):
        few = f"{len(floor_rows)} held-out images beside {len(generated)} samples, for {net.dim} features"
        log(f"warning: the floor is of {few}: it is high for their number alone, so values under it say nothing")

    # Features of all of them
    reference = reference or feature_statistics(net, read_batches(train_content, batch), keep_features=True)
    of_sets = [feature_statistics(net, read_batches(each, batch, "features of samples"), keep_features=True) for each in sets]
    floor = feature_statistics(net, read_batches(held_out, batch, "features of test images"), keep_features=True)

    # Who tells the classes: the network itself if it knows them, else a linear probe on its features
    probe, real = _probe(net, train, reference, generated, log), floor
    if probe is not None:
        of_sets = [_classified(each, probe, images) for each, images in zip(of_sets, sets, strict=True)]
        floor = _classified(floor, probe, held_out)
        real = floor if len(held_out) == len(test) else feature_statistics(net, read_batches(test_content, batch), True)

    # Metrics of each set, averaged
    metrics = mean_over_seeds([_basic_metrics(net, train, reference, each, floor, probe) for each in of_sets])
    accuracy = next((name for name in metrics if name.startswith("label_accuracy")), None)
    if probe is not None and accuracy is not None:
        metrics[accuracy] |= _real_accuracy(probe, real, test_content, generated)
    if train_classifier is not None and generated.labels is not None:
        log(f"evaluate: training {2 * len(cas_seeds)} classifiers for CAS")
        metrics["cas"] = _cas(train_classifier, generated, train_content, test_content, cas_seeds, draw_seed)
    measure = FeatureMetrics(net.name, reference, floor, train_content, held_out, draw_seed, log)
    report: dict[str, Any] = {
        "protocol": _protocol(protocol, generated, of_sets[0], draw_seed, len(sets)),
        "reference": {
            "data": train.source.name,
            "images": len(train),
            "sha256": reference.sha256,
            "preprocessing": train.preprocess.describe(),
            "class_names": list(train.class_names),
            "features": net.name,
            "features_sha256": net.fingerprint(),
            "features_accuracy": net.info.get("test_accuracy"),
            "classifier": None if accuracy is None else OWN_CLASSES if probe is None else probe.describe(),
            "held_out_sha256": floor.sha256,
            "held_out_images": len(floor_rows),
        },
        "metrics": metrics,
        "distribution": mean_over_seeds([measure.distribution(*each) for each in zip(of_sets, sets, strict=True)]),
        "memorisation": measure.memorisation(of_sets[0], generated),
        "settings": metric_settings(generated.preprocess.channels or 1, generated.preprocess.content[2:]),
        "left_out": measure.left_out,
    }

    # What is measured only where it is wanted, or where there are classes
    if guided is not None:
        report["guidance_curve"] = guidance_curve.guidance_curve(
            net, reference, train, test, *guided, draw_seed, batch, log, probe
        )
    per_class = measure.per_class(of_sets[0], generated, accuracy is not None)
    if per_class is not None:
        report["per_class"] = per_class
    if codec is not None:
        log(f"evaluate: reconstructing {len(floor_rows)} test images")
        decoded, report["reconstruction"] = _reconstruction(net, codec, subset(test, floor_rows), batch)
        metrics[f"frechet[{net.name}]"]["reconstruction"] = frechet_distance(decoded.moments, reference.moments)
    return report


def _basic_metrics(
    net: FeatureSpace,
    train: ImageDataset,
    reference: FeatureStatistics,
    current: FeatureStatistics,
    floor: FeatureStatistics,
    probe: LinearProbe | None,
) -> dict[str, dict[str, Any]]:
    """The Fréchet distance, and the label accuracy where the network or a probe on its features tells the classes."""
    metrics: dict[str, dict[str, Any]] = {
        f"frechet[{net.name}]": {
            "value": frechet_distance(current.moments, reference.moments),
            "floor": frechet_distance(floor.moments, reference.moments),
            "images": current.moments.count,
            "floor_images": floor.moments.count,
        }
    }
    by = net.name if probe is None else f"linear probe on {net.name}"
    if current.accuracy is not None and (probe is not None or net.info.get("class_names") == list(train.class_names)):
        metrics[f"label_accuracy[{by}]"] = {
            "value": current.accuracy,
            "real": floor.accuracy,
            "images": current.moments.count,
            "real_images": floor.moments.count,
        }
    return metrics


def _probe(
    net: FeatureSpace,
    train: ImageDataset,
    reference: FeatureStatistics,
    generated: ImageDataset,
    log: Callable[[str], None],
) -> LinearProbe | None:
    """A linear probe on the training images, where samples and data have classes that the network does not know; or None."""
    names = list(train.class_names)
    known = len(names) < 2 or net.info.get("class_names") == names
    if known or generated.labels is None or train.labels is None or reference.features is None:
        return None
    log(f"evaluate: {net.name!r} does not know the classes of data '{train.source.name}'; a linear probe on it tells them")
    return fit_probe(reference.features, train.labels, len(names))


def _real_accuracy(
    probe: LinearProbe, real: FeatureStatistics, test: ImageDataset, generated: ImageDataset
) -> dict[str, float | int]:
    """A probe's accuracy on all held-out images, in the samples' mix of classes. real: the statistics of test."""
    if real.features is None or test.labels is None or generated.labels is None:
        return {}
    value, count = probe.accuracy_for(real.features, test.labels, generated.labels)
    return {"real": value, "real_images": count}


def _classified(statistics: FeatureStatistics, probe: LinearProbe, images: ImageDataset) -> FeatureStatistics:
    """Statistics with features whose accuracy is that of a probe; None where the images have no labels."""
    if images.labels is None or statistics.features is None:
        return replace(statistics, accuracy=None, correct=None)
    correct = probe.correct(statistics.features, images.labels)
    return replace(statistics, accuracy=correct.double().mean().item(), correct=correct)


def _cas(
    train_classifier: ClassifierTrainer,
    generated: ImageDataset,
    train: ImageDataset,
    test: ImageDataset,
    seeds: Sequence[int],
    draw_seed: int,
) -> dict[str, Any]:
    """CAS beside that of as many real images. Both sides shrink alike where train has too few images of a class."""
    real = subset(train, matching_rows(train, generated.labels, len(generated), draw_seed))
    generated = subset(generated, matching_rows(generated, real.labels, len(real), draw_seed))
    score = cas(train_classifier, generated, real, test, seeds)
    return {
        "value": score.value,
        "real": score.real_value,
        "ratio": score.ratio,
        "images": len(real),
        "seeds": list(seeds),
        "values": list(score.generated),
        "real_values": list(score.real),
    }


def _reconstruction(
    net: FeatureSpace, codec: LatentCodec, images: ImageDataset, batch: int
) -> tuple[FeatureStatistics, dict[str, Any]]:
    """Images decoded from their posterior mean, in 8 bits, without padding: their statistics; mean PSNR in dB and SSIM."""
    errors: dict[str, list[Tensor]] = {"psnr": [], "ssim": []}
    crop = images.preprocess.crop_content

    def decoded() -> Iterator[tuple[Tensor, None]]:
        for x, _ in read_batches(images, batch, "reconstructing"):
            y = codec.decode(codec.normalise(codec.moments(x)[0])).cpu()
            levels = ((y.clamp(-1, 1) + 1) * 127.5).round()  # what an image file can hold
            y, x = crop(levels / 127.5 - 1), crop(x)
            errors["psnr"].append(psnr(y, x))
            errors["ssim"].append(ssim(y, x))
            yield y, None

    statistics = feature_statistics(net, decoded())
    means = {name: torch.cat(parts).mean().item() for name, parts in errors.items()}
    return statistics, {"images": len(images), **means, "autoencoder_sha256": codec.fingerprint()}


def _protocol(
    protocol: Mapping[str, Any] | None, generated: ImageDataset, statistics: FeatureStatistics, draw_seed: int, seeds: int
) -> dict[str, Any]:
    """What the caller says of the samples, and what can be read off them."""
    record: dict[str, Any] = dict.fromkeys(PROTOCOL_FIELDS) | dict(protocol or {})
    record |= {
        "images": len(generated),
        "image_size": list(generated.preprocess.size or ()),
        "samples_sha256": statistics.sha256,
        "draw_seed": draw_seed,
        "seeds": seeds,
    }
    if generated.labels is not None:
        counts = class_counts(generated)
        record |= {"class_counts": counts, "class_balanced": len(set(counts)) == 1}
    return record
