"""The evaluation of generated images: every number beside its floor and with the protocol that made it.

A distance alone says little: it depends on the number of images, the reference, the classes drawn and the network.
So a report holds all of these, what real held-out images score at the same N (the floor), and what the autoencoder's
own reconstructions of them score, below which no denoiser in its latent space can be expected to go.
"""

import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from latentdiff.autoencoders.codec import LatentCodec
from latentdiff.autoencoders.report import psnr, ssim
from latentdiff.data.images import Columns
from latentdiff.data.order import permutation
from latentdiff.data.preprocess import ImageDataset, Preprocess
from latentdiff.data.sources import USUAL_COLUMNS, ArraySource, held_out, kind_of, open_source, splits
from latentdiff.errors import UserError
from latentdiff.evaluation.features import FeatureNet
from latentdiff.evaluation.scores import ClassifierTrainer, Seen, cas, class_counts, look, read_batches
from latentdiff.evaluation.statistics import frechet_distance

REPORT_NAME = "evaluation"
# What a reader needs to repeat a number; what the caller cannot tell stays null and is shown as "not stated".
PROTOCOL_FIELDS = ("model", "sampler", "steps", "guidance", "seed")


def reference_sets(
    data: str,
    preprocess: Preprocess | None = None,
    held_out_share: float = 0.05,
    columns: Columns = USUAL_COLUMNS,
    split_seed: int = 0,
) -> tuple[ImageDataset, ImageDataset]:
    """(train, test) images of a data set, as the autoencoder sees them (preprocess) or as they are (None).

    test is the data set's own test split where it has one, else the share of its images that training held out.
    columns: of a table or shards; a folder has none.
    """
    preprocess = preprocess or Preprocess()
    columns = columns if kind_of(data) in ("table", "shards") else USUAL_COLUMNS
    source = open_source(data, "train", preprocess.channels, columns=columns)
    if "test" in splits(data):
        train = ImageDataset(source, preprocess)
        return train, ImageDataset(open_source(data, "test", preprocess.channels, columns=columns), train.preprocess)
    kept, apart = held_out(source, held_out_share, split_seed)
    return ImageDataset(source, preprocess, kept), ImageDataset(source, preprocess, apart)


def evaluate_samples(
    samples: np.ndarray,
    labels: np.ndarray | None,
    train: ImageDataset,
    test: ImageDataset,
    net: FeatureNet,
    *,
    protocol: Mapping[str, Any] | None = None,
    codec: LatentCodec | None = None,
    train_classifier: ClassifierTrainer | None = None,
    cas_seeds: Sequence[int] = (0,),
    draw_seed: int = 0,
    batch: int = 250,
    log: Callable[[str], None] = lambda line: print(line, file=sys.stderr),
) -> dict[str, Any]:
    """Measure generated images against real ones; the report as JSON values.

    The reference of every Fréchet distance is the whole of train. The floor is the same distance of N real test
    images with the samples' class counts (fewer where test has fewer: the report says how many), and the
    reconstruction that of these images through codec. All are compared without padding, in 8 bits. Images are read
    batch by batch; beyond the samples nothing grows with the number of images.

    Args:
        samples: uint8 [N, H, W, C]; grey samples may come as RGB, as `generate` writes them.
        labels: int64 [N], indices into train.class_names; None: unconditional samples, no label accuracy, no CAS.
        protocol: how the samples were made: model, sampler, steps, guidance, seed, and whatever else is to stand there.
        codec: the first stage, for the reconstruction row.
        train_classifier: trains a classifier from (data set, seed), for CAS; None leaves CAS out.
        draw_seed: which real images make the floor and CAS's real side.

    Raises:
        UserError: samples, labels and data do not go together; the message says how.
    """
    train_content, test_content = _without_padding(train), _without_padding(test)
    generated = _sample_set(samples, labels, train_content)
    floor_rows = _matching_rows(test, generated.labels, len(generated), draw_seed)
    log(f"evaluate: features of {len(train)} reference images, {len(generated)} samples, {len(floor_rows)} test images")
    reference = look(net, read_batches(train_content, batch))
    seen = look(net, read_batches(generated, batch))
    floor = look(net, read_batches(_subset(test_content, floor_rows), batch))
    frechet, metrics = _metrics(net, train, reference, seen, floor, log)
    if train_classifier is not None and generated.labels is not None:
        log(f"evaluate: training {2 * len(cas_seeds)} classifiers for CAS")
        metrics["cas"] = _cas(train_classifier, generated, train_content, test_content, cas_seeds, draw_seed)
    report: dict[str, Any] = {
        "protocol": _protocol(protocol, generated, seen, draw_seed),
        "reference": _reference(train, reference, net),
        "metrics": metrics,
    }
    if codec is not None:
        log(f"evaluate: reconstructing {len(floor_rows)} test images")
        report["reconstruction"] = _reconstruction(net, codec, _subset(test, floor_rows), batch)
        moments = report["reconstruction"].pop("moments")
        frechet["reconstruction"] = frechet_distance(moments, reference.moments)
    return report


class Yardstick:
    """A data set seen once by a feature network, to measure many sets of samples against.

    floor: the distance of `count` real test images, with the class counts of labels (None: of any class).
    """

    def __init__(
        self, net: FeatureNet, train: ImageDataset, test: ImageDataset, labels: np.ndarray | None, count: int, batch: int = 250
    ):
        self.net, self.batch, self.train = net, batch, _without_padding(train)
        rows = _matching_rows(test, None if labels is None else torch.as_tensor(labels), count, 0)
        self.reference = look(net, read_batches(self.train, batch))
        self.floor = self._distance(_subset(_without_padding(test), rows))[0]

    def measure(self, samples: np.ndarray, labels: np.ndarray | None) -> tuple[float, float | None]:
        """(Fréchet distance to the whole of train, label accuracy) of uint8 samples [N, H, W, C].

        The accuracy is None without labels, and where the network was trained on other classes.
        """
        distance, accuracy = self._distance(_sample_set(samples, labels, self.train))
        return distance, accuracy if self.net.info.get("class_names") == list(self.train.class_names) else None

    def _distance(self, images: ImageDataset) -> tuple[float, float | None]:
        seen = look(self.net, read_batches(images, self.batch))
        return frechet_distance(seen.moments, self.reference.moments), seen.accuracy


def _metrics(
    net: FeatureNet, train: ImageDataset, reference: Seen, seen: Seen, floor: Seen, log: Callable[[str], None]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """(the entry of the Fréchet distance, all entries that need nothing beyond one pass of net)."""
    frechet: dict[str, Any] = {
        "value": frechet_distance(seen.moments, reference.moments),
        "floor": frechet_distance(floor.moments, reference.moments),
        "floor_images": floor.moments.count,
    }
    metrics: dict[str, Any] = {f"frechet[{net.name}]": frechet}
    if seen.accuracy is not None and net.info.get("class_names") == list(train.class_names):
        metrics[f"label_accuracy[{net.name}]"] = {"value": seen.accuracy, "real": floor.accuracy}
    elif seen.accuracy is not None:
        log(f"evaluate: no label accuracy: {net.name!r} was not trained on the classes of data '{train.source.name}'")
    return frechet, metrics


def write_report(report: Mapping[str, Any], folder: str | Path) -> tuple[Path, Path]:
    """Write evaluation.json and evaluation.md into folder, each whole or not at all; returns their paths."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    contents = {".json": json.dumps(report, indent=2) + "\n", ".md": markdown(report)}
    paths = [folder / f"{REPORT_NAME}{suffix}" for suffix in contents]
    with tempfile.TemporaryDirectory(dir=folder, prefix=".writing-") as scratch:
        for path, text in zip(paths, contents.values(), strict=True):
            Path(scratch, path.name).write_text(text, encoding="utf-8")
        for path in paths:
            os.replace(Path(scratch, path.name), path)
    return paths[0], paths[1]


def markdown(report: Mapping[str, Any]) -> str:
    """The report as a table of numbers, then the protocol that belongs to them."""
    lines = ["| metric | samples | real images | reconstructions |", "|---|---|---|---|"]
    for name, entry in report["metrics"].items():
        real = entry["floor"] if "floor" in entry else entry["real"]
        values = (entry["value"], real, entry.get("reconstruction"))
        lines.append(f"| {name} | {' | '.join('–' if value is None else f'{value:.4f}' for value in values)} |")
    if "cas" in report["metrics"]:
        lines.append(f"| cas, share of real | {report['metrics']['cas']['ratio']:.4f} | 1 | – |")
    if "reconstruction" in report:
        entry = report["reconstruction"]
        quality = f"PSNR {entry['psnr']:.2f} dB, SSIM {entry['ssim']:.4f}"
        lines += ["", f"Reconstructions of {entry['images']} test images: {quality}."]
    lines += ["", "| protocol | |", "|---|---|"]
    for section in ("protocol", "reference"):
        for key, value in report[section].items():
            shown = "not stated" if value is None else value
            lines.append(f"| {'' if section == 'protocol' else 'reference '}{key.replace('_', ' ')} | {shown} |")
    return "\n".join(lines) + "\n"


def _sample_set(samples: np.ndarray, labels: np.ndarray | None, train: ImageDataset) -> ImageDataset:
    """The samples as a data set of train's size, channels and classes, after checking that they go with it."""
    if samples.dtype != np.uint8 or samples.ndim != 4 or samples.shape[3] not in (1, 3) or len(samples) < 2:
        raise UserError(f"samples are {samples.dtype} {list(samples.shape)}: needs uint8 [N, H, W, 1 or 3] with N >= 2")
    rule = train.preprocess
    if tuple(samples.shape[1:3]) != rule.size:
        raise UserError(
            f"samples are {samples.shape[1]}x{samples.shape[2]}, the images of data '{train.source.name}' "
            f"{rule.content[2]}x{rule.content[3]}: evaluate at the size the samples were made for"
        )
    wanted = None
    if labels is not None:
        wanted = torch.as_tensor(np.asarray(labels), dtype=torch.int64)
        classes = len(train.class_names)
        if train.labels is None:
            raise UserError(f"samples have labels, data '{train.source.name}' has none: give a data set with classes")
        if wanted.shape != (len(samples),) or wanted.min() < 0 or wanted.max() >= classes:
            raise UserError(
                f"labels of the samples are {list(wanted.shape)} from {wanted.min()} to {wanted.max()}: "
                f"needs {len(samples)} of them, each 0 to {classes - 1}, the classes of data '{train.source.name}'"
            )
    source = ArraySource("samples", samples, wanted, train.class_names)
    return ImageDataset(source, Preprocess(size=rule.size, channels=rule.channels))


def _without_padding(dataset: ImageDataset) -> ImageDataset:
    """The same images without the border that a multiple_of asks for."""
    rule = replace(dataset.preprocess, size=dataset.preprocess.content[2:], multiple_of=1)
    return ImageDataset(dataset.source, rule, dataset.indices)


def _subset(dataset: ImageDataset, rows: Tensor) -> ImageDataset:
    return ImageDataset(dataset.source, dataset.preprocess, dataset.indices[rows])


def _matching_rows(dataset: ImageDataset, labels: Tensor | None, count: int, seed: int) -> Tensor:
    """Rows of dataset, ascending, drawn with the class counts of labels (None: any count rows), each at most once.

    Where some class has too few images, all counts shrink by the same factor, so that the mix of classes stays.
    """
    order = permutation(len(dataset), seed, "evaluation")
    if labels is None or dataset.labels is None:
        return order[:count].sort().values
    classes = len(dataset.class_names)
    wanted = torch.bincount(labels, minlength=classes)
    present = torch.bincount(dataset.labels, minlength=classes)
    used = wanted > 0
    share = min(1.0, (present[used] / wanted[used]).min().item())
    shuffled = dataset.labels[order]
    rows = [order[shuffled == c][: int(share * wanted[c] + 1e-9)] for c in range(classes)]
    chosen = torch.cat(rows).sort().values
    if len(chosen) < 2:
        raise UserError(
            f"data '{dataset.source.name}' has too few images of the samples' classes to compare with: "
            f"{present.tolist()} held out, {wanted.tolist()} in the samples"
        )
    return chosen


def _cas(
    train_classifier: ClassifierTrainer,
    generated: ImageDataset,
    train: ImageDataset,
    test: ImageDataset,
    seeds: Sequence[int],
    draw_seed: int,
) -> dict[str, Any]:
    """CAS beside that of as many real images; both sides shrink alike where train has too few of a class."""
    real = _subset(train, _matching_rows(train, generated.labels, len(generated), draw_seed))
    generated = _subset(generated, _matching_rows(generated, real.labels, len(real), draw_seed))
    score = cas(train_classifier, generated, real, test, seeds)
    return {
        "value": score.value, "real": score.real_value, "ratio": score.ratio, "images": len(real), "seeds": list(seeds),
        "values": list(score.generated), "real_values": list(score.real),
    }  # fmt: skip


def _reconstruction(net: FeatureNet, codec: LatentCodec, images: ImageDataset, batch: int) -> dict[str, Any]:
    """Feature moments, PSNR in dB and SSIM of images decoded from their posterior mean, in 8 bits, without padding."""
    errors: dict[str, list[Tensor]] = {"psnr": [], "ssim": []}
    crop = images.preprocess.crop_content

    def decoded() -> Iterator[tuple[Tensor, None]]:
        for x, _ in read_batches(images, batch):
            y = codec.decode(codec.normalise(codec.moments(x)[0])).cpu()
            levels = ((y.clamp(-1, 1) + 1) * 127.5).round()  # what an image file can hold
            y, x = crop(levels / 127.5 - 1), crop(x)
            errors["psnr"].append(psnr(y, x))
            errors["ssim"].append(ssim(y, x))
            yield y, None

    moments = look(net, decoded()).moments
    means = {name: torch.cat(parts).mean().item() for name, parts in errors.items()}
    return {"moments": moments, "images": len(images), **means, "autoencoder_sha256": codec.fingerprint()}


def _protocol(stated: Mapping[str, Any] | None, generated: ImageDataset, seen: Seen, draw_seed: int) -> dict[str, Any]:
    record: dict[str, Any] = {field: None for field in PROTOCOL_FIELDS} | dict(stated or {})
    record |= {"images": len(generated), "image_size": list(generated.preprocess.size or ())}
    record |= {"samples_sha256": seen.sha256, "draw_seed": draw_seed}
    if generated.labels is not None:
        counts = class_counts(generated)
        record |= {"class_counts": counts, "class_balanced": len(set(counts)) == 1}
    return record


def _reference(train: ImageDataset, seen: Seen, net: FeatureNet) -> dict[str, Any]:
    return {
        "data": train.source.name,
        "images": len(train),
        "sha256": seen.sha256,
        "preprocessing": train.preprocess.describe(),
        "class_names": list(train.class_names),
        "features": net.name,
        "features_sha256": net.fingerprint(),
        "features_accuracy": net.info.get("test_accuracy"),
    }
