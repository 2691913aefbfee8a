"""The evaluation of generated images: every number beside its floor and with the protocol that made it.

A distance alone says little: it depends on the number of images, the reference, the classes drawn and the network.
So a report holds all of these, what real held-out images score at the same N (the floor), and what the autoencoder's
own reconstructions of them score, below which no denoiser in its latent space can be expected to go.
"""

import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from latentdiff.data.datasets import ImageDataset
from latentdiff.data.image_source import Columns
from latentdiff.data.sources import USUAL_COLUMNS, kind_of, open_source, splits, takes_columns
from latentdiff.data.splits import held_out
from latentdiff.data.transforms import Preprocess
from latentdiff.errors import UserError
from latentdiff.evaluation import guidance_curve
from latentdiff.evaluation.classification import ClassifierTrainer, Seen, cas, class_counts, look, read_batches
from latentdiff.evaluation.frechet import frechet_distance
from latentdiff.evaluation.image_quality import psnr, ssim
from latentdiff.evaluation.reference_values import Surroundings, over_seeds, settings
from latentdiff.evaluation.sample_sets import matching_rows, sample_set, subset, without_padding
from latentdiff.models.codec import LatentCodec
from latentdiff.models.feature_net import FeatureSpace
from latentdiff.utils import atomic

REPORT_NAME = "evaluation"
# What a reader needs to repeat a number; what the caller cannot tell stays null and is shown as "not stated".
PROTOCOL_FIELDS = ("model", "sampler", "steps", "guidance", "seed")


def say(line: str) -> None:
    print(line, file=sys.stderr)


def reference_sets(
    data: str,
    preprocess: Preprocess | None = None,
    held_out_share: float = 0.05,
    columns: Columns = USUAL_COLUMNS,
    streaming: bool = False,
    held_out_rule: str = "per_class",
    max_bad_share: float = 0.01,
    split_seed: int = 0,
) -> tuple[ImageDataset, ImageDataset]:
    """(train, test) images of a data set, as the autoencoder sees them (preprocess) or as they are (None).

    test is the data set's own test split where it has one, else the share of its images that training held out.
    columns: of data that has columns (see takes_columns). streaming: of a table (see open_source).
    UserError where training could hold nothing out, because every class has one image.
    """
    preprocess = preprocess or Preprocess()
    channels, background = preprocess.channels, preprocess.background
    columns, streaming = columns if takes_columns(data) else USUAL_COLUMNS, streaming and kind_of(data) == "table"
    source = open_source(data, "train", channels, max_bad_share, columns, streaming, background)
    if "test" in splits(data, streaming):
        train = ImageDataset(source, preprocess)
        test = open_source(data, "test", channels, max_bad_share, columns, streaming, background)
        return train, ImageDataset(test, train.preprocess)
    kept, apart = held_out(source, held_out_share, split_seed, held_out_rule)
    if not len(apart):
        raise UserError(
            f"data '{data}': each class has one image, so none was held out of training to compare with; "
            "give a folder with train/ and test/"
        )
    return ImageDataset(source, preprocess, kept), ImageDataset(source, preprocess, apart)


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
    reference: Seen | None = None,
    guided: tuple[Mapping[float, np.ndarray], np.ndarray | None] | None = None,
    log: Callable[[str], None] = say,
) -> dict[str, Any]:
    """Measure generated images against real ones; the report as JSON values.

    The reference of every Fréchet distance is the whole of train. The floor is the same distance of N real test
    images with the samples' class counts (fewer where test has fewer: the report says how many), and the
    reconstruction that of these images through codec. All are compared without padding, in 8 bits. Images are read
    batch by batch; what grows with their number is the samples, and one float32 feature vector for each image.
    "distribution": what `latentdiff.evaluation.reference_values` takes from these features; "per_class" and "memorisation" too.

    Args:
        samples: uint8 [N, H, W, C]; grey samples may come as RGB, as `generate` writes them.
        labels: int64 [N], indices into train.class_names; None: unconditional samples, no label accuracy, no CAS.
        protocol: how the samples were made: model, sampler, steps, guidance, seed, and whatever else is to stand there.
        codec: the first stage, for the reconstruction row.
        train_classifier: trains a classifier from (data set, seed), for CAS; None leaves CAS out.
        draw_seed: which real images make the floor and CAS's real side, and subsets of images.
        more: further sets like samples, from other seeds: values are then means over all sets, with their spread; CAS,
            per_class, memorisation and samples_sha256 are of the first alone.
        reference: what net sees in train without padding, features kept, where that is known (`see_reference`).
        guided: ({guidance scale: samples}, their labels), for "guidance_curve".

    Raises:
        UserError: samples, labels and data do not go together; the message says how.
    """
    train_content, test_content = without_padding(train), without_padding(test)
    sets = [sample_set(each, labels, train_content) for each in (samples, *more)]
    generated = sets[0]
    if any(len(each) != len(generated) for each in sets):
        raise UserError(f"sets of samples from several seeds must be equally large, got {[len(each) for each in sets]}")
    floor_rows = matching_rows(test, generated.labels, len(generated), draw_seed)
    held_out_images = subset(test_content, floor_rows)
    log(f"evaluate: features of {len(train)} reference images, {len(generated)} samples, {len(floor_rows)} test images")
    if len(floor_rows) < min(len(generated), 2 * net.dim):
        few = f"{len(floor_rows)} held-out images beside {len(generated)} samples, for {net.dim} features"
        log(f"warning: the floor is of {few}: it is high for their number alone, so values under it say nothing")
    reference = reference or look(net, read_batches(train_content, batch), keep=True)
    seen = [look(net, read_batches(each, batch, "features of samples"), keep=True) for each in sets]
    floor = look(net, read_batches(held_out_images, batch, "features of test images"), keep=True)
    metrics = over_seeds([_metrics(net, train, reference, each, floor, log) for each in seen])
    frechet = metrics[f"frechet[{net.name}]"]
    if train_classifier is not None and generated.labels is not None:
        log(f"evaluate: training {2 * len(cas_seeds)} classifiers for CAS")
        metrics["cas"] = _cas(train_classifier, generated, train_content, test_content, cas_seeds, draw_seed)
    around = Surroundings(net.name, reference, floor, train_content, held_out_images, draw_seed, log)
    report: dict[str, Any] = {
        "protocol": _protocol(protocol, generated, seen[0], draw_seed, len(sets)),
        "reference": _reference(train, reference, net) | {"held_out_sha256": floor.sha256, "held_out_images": len(floor_rows)},
        "metrics": metrics,
        "distribution": over_seeds([around.distribution(*each) for each in zip(seen, sets, strict=True)]),
        "memorisation": around.memorisation(seen[0], generated),
        "settings": settings(generated.preprocess.channels or 1, generated.preprocess.content[2:]),
        "left_out": around.left_out,
    }
    if guided is not None:
        report["guidance_curve"] = guidance_curve.guidance_curve(net, reference, train, test, *guided, draw_seed, batch, log)
    classes = around.per_class(seen[0], generated, f"label_accuracy[{net.name}]" in metrics)
    if classes is not None:
        report["per_class"] = classes
    if codec is not None:
        log(f"evaluate: reconstructing {len(floor_rows)} test images")
        report["reconstruction"] = _reconstruction(net, codec, subset(test, floor_rows), batch)
        moments = report["reconstruction"].pop("moments")
        frechet["reconstruction"] = frechet_distance(moments, reference.moments)
    return report


class Yardstick:
    """A data set seen once by a feature network, to measure many sets of samples against.

    floor: the distance of `count` real test images, with the class counts of labels (None: of any class).
    """

    def __init__(
        self,
        net: FeatureSpace,
        train: ImageDataset,
        test: ImageDataset,
        labels: np.ndarray | None,
        count: int,
        batch: int = 250,
    ):
        self.net, self.batch, self.train = net, batch, without_padding(train)
        rows = matching_rows(test, None if labels is None else torch.as_tensor(labels), count, 0)
        self.reference = look(net, read_batches(self.train, batch))
        self.floor = self._distance(subset(without_padding(test), rows))[0]

    def measure(self, samples: np.ndarray, labels: np.ndarray | None) -> tuple[float, float | None]:
        """(Fréchet distance to the whole of train, label accuracy) of uint8 samples [N, H, W, C].

        The accuracy is None without labels, and where the network was trained on other classes.
        """
        distance, accuracy = self._distance(sample_set(samples, labels, self.train))
        return distance, accuracy if self.net.info.get("class_names") == list(self.train.class_names) else None

    def _distance(self, images: ImageDataset) -> tuple[float, float | None]:
        seen = look(self.net, read_batches(images, self.batch))
        return frechet_distance(seen.moments, self.reference.moments), seen.accuracy


def _metrics(
    net: FeatureSpace, train: ImageDataset, reference: Seen, seen: Seen, floor: Seen, log: Callable[[str], None]
) -> dict[str, dict[str, Any]]:
    """The Fréchet distance and the label accuracy."""
    frechet: dict[str, Any] = {
        "value": frechet_distance(seen.moments, reference.moments),
        "floor": frechet_distance(floor.moments, reference.moments),
        "images": seen.moments.count,
        "floor_images": floor.moments.count,
    }
    metrics: dict[str, Any] = {f"frechet[{net.name}]": frechet}
    if seen.accuracy is not None and net.info.get("class_names") == list(train.class_names):
        metrics[f"label_accuracy[{net.name}]"] = {
            "value": seen.accuracy,
            "real": floor.accuracy,
            "images": seen.moments.count,
            "real_images": floor.moments.count,
        }
    elif seen.accuracy is not None:
        log(f"evaluate: no label accuracy: {net.name!r} was not trained on the classes of data '{train.source.name}'")
    return metrics


def write_report(report: Mapping[str, Any], folder: str | Path) -> tuple[Path, Path]:
    """Write evaluation.json and evaluation.md into folder, each whole or not at all; returns their paths."""
    folder = Path(folder)
    contents = {".json": json.dumps(report, indent=2) + "\n", ".md": markdown(report)}
    paths = [folder / f"{REPORT_NAME}{suffix}" for suffix in contents]
    for path, text in zip(paths, contents.values(), strict=True):
        atomic.write_text(path, text)
    return paths[0], paths[1]


def markdown(report: Mapping[str, Any]) -> str:
    """The report as a table of numbers, then the protocol that belongs to them."""
    lines = ["| metric | samples | real images | reconstructions |", "|---|---|---|---|"]
    for name, entry in {**report["metrics"], **report["distribution"]}.items():
        side = "floor" if "floor" in entry else "real"
        floor, images = shown(entry, side), entry.get(f"{side}_images")
        if images is not None and images != entry.get("images"):
            floor += f" ({images} images)"
        values = (shown(entry), floor, shown(entry, "reconstruction"))
        lines.append(f"| {name} | {' | '.join(values)} |")
    if "cas" in report["metrics"]:
        lines.append(f"| cas, share of real | {report['metrics']['cas']['ratio']:.4f} | 1 | – |")
    if "reconstruction" in report:
        entry = report["reconstruction"]
        quality = f"PSNR {entry['psnr']:.2f} dB, SSIM {entry['ssim']:.4f}"
        lines += ["", f"Reconstructions of {entry['images']} test images: {quality}."]
    lines += ["", *_nearness(report["memorisation"])]
    if "per_class" in report:
        lines += ["", *_classes(report["per_class"])]
    if "guidance_curve" in report:
        lines += ["", *guidance_curve.table(report["guidance_curve"])]
    if "likelihood" in report:
        entry = report["likelihood"]
        error = "" if entry["stderr"] is None else f" ± {entry['stderr']:.4f}"
        images = entry["protocol"]["images"]
        lines += ["", f"At most {entry['bits_per_dim']:.4f}{error} bits per dimension of {images} held-out images' pixels."]
    if report["left_out"]:
        lines += ["", *(f"Left out: {name} ({reason})." for name, reason in report["left_out"].items())]
    lines += ["", "| protocol | |", "|---|---|"]
    for section in ("protocol", "reference", "settings"):
        for key, value in report[section].items():
            stated = "not stated" if value is None else value
            before = {"protocol": "", "reference": "reference ", "settings": "measured with "}[section]
            lines.append(f"| {before}{key.replace('_', ' ')} | {stated} |")
    return "\n".join(lines) + "\n"


def shown(entry: Mapping[str, Any], side: str = "value") -> str:
    """A value, its floor or the like with what is known of its error: standard error, else spread over seeds or subsets."""
    value = entry.get(side)
    if value is None:
        return "–"
    before = "" if side == "value" else f"{side}_"
    errors = (entry.get(f"{before}{key}") for key in ("stderr", "seed_spread", "spread"))
    error = next((e for e in errors if e is not None), None)
    return f"{value:.4f}" if error is None else f"{value:.4f} ± {error:.4f}"


def _nearness(entry: Mapping[str, Any]) -> list[str]:
    head = "| nearest training image, in | median | of held-out images | samples closer than held-out images at 1 / 5 / 50 % |"
    lines = [head, "|---|---|---|---|"]
    for space in ("features", "pixels"):
        found = entry[space]
        closer = " / ".join(f"{100 * each['share']:.1f} %" for each in found["closer_than_held_out"])
        lines.append(f"| {space} | {found['median']:.4f} | {found['held_out_median']:.4f} | {closer} |")
    return lines


def _classes(table: Mapping[str, Any]) -> list[str]:
    lines = ["| class | Fréchet distance | real images | samples |", "|---|---|---|---|"]
    for name, entry in table["classes"].items():
        lines.append(f"| {name} | {shown(entry)} | {shown(entry, 'floor')} | {entry['images']} |")
    if table["left_out"]:
        few = ", ".join(f"{name} ({count})" for name, count in table["left_out"].items())
        lines.append(f"| fewer than {table['fewest_images']} images: {few} | – | – | – |")
    if "label_accuracy" in table:
        lines += ["", "| class | label accuracy | real images | samples |", "|---|---|---|---|"]
        for name, entry in table["label_accuracy"].items():
            lines.append(f"| {name} | {shown(entry)} | {shown(entry, 'floor')} | {entry['images']} |")
    return lines


def _cas(
    train_classifier: ClassifierTrainer,
    generated: ImageDataset,
    train: ImageDataset,
    test: ImageDataset,
    seeds: Sequence[int],
    draw_seed: int,
) -> dict[str, Any]:
    """CAS beside that of as many real images; both sides shrink alike where train has too few of a class."""
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


def _reconstruction(net: FeatureSpace, codec: LatentCodec, images: ImageDataset, batch: int) -> dict[str, Any]:
    """Feature moments, PSNR in dB and SSIM of images decoded from their posterior mean, in 8 bits, without padding."""
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

    moments = look(net, decoded()).moments
    means = {name: torch.cat(parts).mean().item() for name, parts in errors.items()}
    return {"moments": moments, "images": len(images), **means, "autoencoder_sha256": codec.fingerprint()}


def _protocol(
    stated: Mapping[str, Any] | None, generated: ImageDataset, seen: Seen, draw_seed: int, seeds: int
) -> dict[str, Any]:
    record: dict[str, Any] = {field: None for field in PROTOCOL_FIELDS} | dict(stated or {})
    record |= {"images": len(generated), "image_size": list(generated.preprocess.size or ())}
    record |= {"samples_sha256": seen.sha256, "draw_seed": draw_seed, "seeds": seeds}
    if generated.labels is not None:
        counts = class_counts(generated)
        record |= {"class_counts": counts, "class_balanced": len(set(counts)) == 1}
    return record


def _reference(train: ImageDataset, seen: Seen, net: FeatureSpace) -> dict[str, Any]:
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
