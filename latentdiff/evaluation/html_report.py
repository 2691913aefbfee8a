"""A record of an evaluation as a web page: index.html with SVG plots, and two pictures beside it.

The page needs no network and has no script. The same record gives the same bytes. Its layout is in html_report.jinja.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from latentdiff.data.datasets import ImageDataset
from latentdiff.evaluation.sample_sets import sample_set, without_padding
from latentdiff.evaluation.tables import format_setting, value_cells
from latentdiff.utils.atomic import write_text
from latentdiff.utils.images import captioned_grid, labelled_grid, save_png, to_uint8

# The template names these files too
PAGE, GRID, CLOSEST = "index.html", "samples.png", "closest.png"
COLUMNS, ROWS = 12, 20  # of the grid of samples
GUIDANCE_METRICS = ("frechet", "label_accuracy", "precision", "recall")


def write_page(
    record: Mapping[str, Any],
    folder: str | Path,
    samples: np.ndarray,
    labels: np.ndarray | None,
    train: ImageDataset,
    prompts: Sequence[str] = (),
) -> list[Path]:
    """Write index.html, samples.png and closest.png into a folder; return their paths.

    Args:
        record: of `records.make_record`.
        folder: where to write; it is made.
        samples: the images that the record describes (those of the first seed), uint8 [N, H, W, C].
        labels: their classes, int64 [N], or None.
        train: the training images that they were compared with.
        prompts: the prompt of each sample, [N], for a model that reads text; else empty.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    real = without_padding(train)
    generated = sample_set(samples, labels, real)
    save_png(_prompt_grid(generated, prompts) if prompts else _class_grid(generated), folder / GRID)
    save_png(_closest_grid(record["memorisation"]["closest"], generated, real), folder / CLOSEST)
    write_text(folder / PAGE, page(record))
    return [folder / name for name in (PAGE, GRID, CLOSEST)]


def _class_grid(generated: ImageDataset) -> Image.Image:
    """The first samples of each class, one row for a class; of unlabelled samples the first of all."""
    if generated.labels is None:
        everything = torch.arange(len(generated))
        rows = [("", part) for part in everything.split(COLUMNS)]
    else:
        rows = [(name, (generated.labels == c).nonzero().flatten()) for c, name in enumerate(generated.class_names)]
    rows = [(name, members[:COLUMNS]) for name, members in rows if len(members)][:ROWS]
    return labelled_grid([_pixels(generated, members) for _, members in rows], [name for name, _ in rows], _scale(generated))


def _prompt_grid(generated: ImageDataset, prompts: Sequence[str]) -> Image.Image:
    """Samples spread evenly over the set, each above its prompt."""
    columns = COLUMNS // 2
    chosen = torch.from_numpy(np.unique(np.linspace(0, len(generated) - 1, columns * 6).round().astype(int)))
    rows = chosen.split(columns)
    captions = [[prompts[k] for k in row.tolist()] for row in rows]
    return captioned_grid([_pixels(generated, row) for row in rows], captions, [""] * len(rows), _scale(generated))


def _closest_grid(closest: Sequence[Mapping[str, Any]], generated: ImageDataset, train: ImageDataset) -> Image.Image:
    """A row for each of the closest samples: the sample, its neighbour by features, its neighbour by pixels."""
    sources = {"sample": generated, "feature_neighbour": train, "pixel_neighbour": train}
    columns = [_pixels(images, [entry[key] for entry in closest]) for key, images in sources.items()]
    names = [f"{entry['feature_distance']:.3f} features, {entry['pixel_distance']:.3f} pixels" for entry in closest]
    return labelled_grid([list(row) for row in zip(*columns, strict=True)], names, _scale(generated))


def _pixels(images: ImageDataset, rows: Sequence[int] | torch.Tensor) -> list[np.ndarray]:
    return list(to_uint8(images.batch(torch.as_tensor(rows))[0]))


def _scale(images: ImageDataset) -> int:
    return 2 if max(images.preprocess.padded_size) <= 64 else 1


@functools.cache
def _macros() -> Any:
    """The macros of html_report.jinja. They escape every value, so that a hostile class name or caption stays text."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined)
    environment.filters["setting"] = format_setting
    return environment.get_template("html_report.jinja").module


def page(record: Mapping[str, Any]) -> str:
    """The whole page of a record as HTML. It refers to two pictures, samples.png and closest.png, in its own folder."""
    made, curve, classes = record["made"], record.get("guidance_curve"), record.get("per_class")
    plots = [
        precision_recall(record["values"]),
        guidance_plots(curve),
        recall_curve(curve),
        class_bars(classes),
        accuracy_bars(classes),
    ]
    title = f"{made.get('model') or 'samples'} against {made.get('data')}"
    values = [(name, *value_cells(entry)) for name, entry in record["values"].items()]
    return str(_macros().page(record, title, values, [plot for plot in plots if plot]))


def precision_recall(values: Mapping[str, Any]) -> str:
    """Precision against recall as SVG: the samples of each seed, and the real images. "" where they were not measured."""
    precision, recall = (
        next((entry for key, entry in values.items() if key.startswith(f"{metric}[")), None)
        for metric in ("precision", "recall")
    )
    if precision is None or recall is None:
        return ""
    seeds = zip(recall.get("by_seed", [recall["value"]]), precision.get("by_seed", [precision["value"]]), strict=True)
    points = [{"recall": r, "precision": p, "real": False, "name": "samples"} for r, p in seeds]
    points.append({"recall": recall["floor"], "precision": precision["floor"], "real": True, "name": "real images"})
    return _macros().precision_recall_plot(points, "Precision against recall: samples blue, real images green.")


def recall_curve(curve: Mapping[str, Any] | None) -> str:
    """Precision against recall as SVG along a `guidance_curve`, and the real images. "" where they were not measured."""
    if not curve or any(None in (point["recall"], point["precision"]) for point in curve["points"]):
        return ""
    points = [point | {"real": False, "name": f"{point['guidance']:g}"} for point in curve["points"]]
    if None not in (curve["floor"]["recall"], curve["floor"]["precision"]):
        points.append(curve["floor"] | {"real": True, "name": "real images"})
    caption = f"Precision against recall by guidance scale, {curve['images']} images each: samples blue, real images green."
    return _macros().precision_recall_plot(points, caption, joined=len(curve["points"]))


def guidance_plots(curve: Mapping[str, Any] | None) -> str:
    """Each metric of a `guidance_curve` against the scale as SVG; a green line is the value of real images."""
    if not curve:
        return ""
    scales = [point["guidance"] for point in curve["points"]]
    width = max(scales) - min(scales) or 1
    panels = []
    for metric in GUIDANCE_METRICS:
        values, floor = [point[metric] for point in curve["points"]], curve["floor"][metric]
        if values[0] is None:
            continue
        levels = values if floor is None else [*values, floor]
        # A distance is read from 0 up, a share from 1 down
        low, high = min(*levels, 0 if metric == "frechet" else 1), max(levels)
        height = high - low if high > low else 1
        points = [
            {"x": (scale - min(scales)) / width, "y": (value - low) / height, "scale": scale, "value": value}
            for scale, value in zip(scales, values, strict=True)
        ]
        real = None if floor is None else (floor - low) / height
        panels.append({"name": metric, "low": low, "high": low + height, "points": points, "floor": real})
    caption = f"By guidance scale, {curve['images']} images each: samples blue, as many real images green."
    return _macros().guidance_panels(panels, caption)


def class_bars(per_class: Mapping[str, Any] | None) -> str:
    """The Fréchet distance of each class as SVG: a bar for the samples and one for real images."""
    if not per_class or not per_class["classes"]:
        return ""
    caption = "Fréchet distance of each class: samples blue, real images green."
    if per_class["left_out"]:
        caption += f" Fewer than {per_class['fewest_images']} images: {', '.join(map(str, per_class['left_out']))}."
    return _bars(per_class["classes"], caption)


def accuracy_bars(per_class: Mapping[str, Any] | None) -> str:
    """The share of each class that is classified correctly as SVG: a bar for the samples and one for real images."""
    if not per_class or not per_class.get("label_accuracy"):
        return ""
    return _bars(per_class["label_accuracy"], "Label accuracy of each class: samples blue, real images green.")


def _bars(classes: Mapping[str, Any], caption: str) -> str:
    longest = max(max(entry["value"], entry["floor"] or 0) for entry in classes.values())
    return _macros().class_bars(classes, longest if 0 < longest < math.inf else 1.0, caption)
