"""A record as a page for people: index.html with plots drawn in it and two pictures beside it, and no script at all."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
import torch

from latentdiff.data.datasets import ImageDataset
from latentdiff.evaluation.markdown_report import format_value
from latentdiff.evaluation.sample_sets import sample_set, without_padding
from latentdiff.utils.atomic import write_text
from latentdiff.utils.images import captioned_grid, labelled_grid, save_png, to_uint8

GRID, CLOSEST, PAGE = "samples.png", "closest.png", "index.html"
COLUMNS, ROWS = 12, 20
_AXES = ("recall", "precision")
OURS, REAL = "#3465a4", "#4e9a06"
STYLE = """body{font:15px/1.45 system-ui,sans-serif;max-width:62rem;margin:2rem auto;padding:0 1rem;color:#222}
table{border-collapse:collapse;margin:1rem 0}td,th{border-bottom:1px solid #ddd;padding:.25rem .7rem;text-align:left;
vertical-align:top;overflow-wrap:anywhere}td.n{text-align:right;font-variant-numeric:tabular-nums;white-space:nowrap}
img{max-width:100%;image-rendering:pixelated}figure{margin:1.5rem 0}svg text{font:12px system-ui,sans-serif}"""


def write_page(
    record: Mapping[str, Any],
    folder: str | Path,
    samples: np.ndarray,
    labels: np.ndarray | None,
    train: ImageDataset,
    prompts: Sequence[str] = (),
) -> list[Path]:
    """Write index.html, samples.png and closest.png; returns their paths.

    samples: those that the record is of (the first seed's), uint8 [N, H, W, C]; train: the reference. prompts: of each sample,
    where it was told by text what to draw.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    real = without_padding(train)
    generated = sample_set(samples, labels, real)
    save_png(_told(generated, prompts) if prompts else _grid(generated), folder / GRID)
    save_png(_closest(record["memorisation"], generated, real), folder / CLOSEST)
    write_text(folder / PAGE, page(record))
    return [folder / name for name in (PAGE, GRID, CLOSEST)]


def _grid(generated: ImageDataset) -> Any:
    """The first samples of each class, a row a class; of unlabelled ones the first of all."""
    if generated.labels is None:
        chosen = [list(range(start, min(start + COLUMNS, len(generated)))) for start in range(0, len(generated), COLUMNS)]
        names = [""] * len(chosen)
    else:
        present = [c for c in range(len(generated.class_names)) if bool((generated.labels == c).any())]
        chosen = [(generated.labels == c).nonzero().flatten()[:COLUMNS].tolist() for c in present]
        names = [generated.class_names[c] for c in present]
    rows = [list(_pixels(generated, row)) for row in chosen[:ROWS]]
    return labelled_grid(rows, names[:ROWS], _scale(generated))


def _told(generated: ImageDataset, prompts: Sequence[str]) -> Any:
    """Samples from all over the set, each above its prompt."""
    shown = sorted(set(np.linspace(0, len(generated) - 1, COLUMNS // 2 * 6).round().astype(int).tolist()))
    rows = [shown[start : start + COLUMNS // 2] for start in range(0, len(shown), COLUMNS // 2)]
    captions = [[prompts[k] for k in row] for row in rows]
    return captioned_grid([list(_pixels(generated, row)) for row in rows], captions, [""] * len(rows), _scale(generated))


def _closest(entry: Mapping[str, Any], generated: ImageDataset, train: ImageDataset) -> Any:
    """A row for each of the closest samples: the sample, its neighbour by features, its neighbour by pixels."""
    worst = entry["closest"]
    columns = [
        _pixels(images, [each[key] for each in worst])
        for images, key in ((generated, "sample"), (train, "feature_neighbour"), (train, "pixel_neighbour"))
    ]
    names = [f"{each['feature_distance']:.3f} features, {each['pixel_distance']:.3f} pixels" for each in worst]
    return labelled_grid([list(row) for row in zip(*columns, strict=True)], names, _scale(generated))


def _pixels(images: ImageDataset, rows: Sequence[int]) -> np.ndarray:
    return to_uint8(images.batch(torch.tensor(list(rows)))[0])


def _scale(images: ImageDataset) -> int:
    return 2 if max(images.preprocess.padded_size) <= 64 else 1


def page(record: Mapping[str, Any]) -> str:
    """The whole page as HTML; what it shows beside itself are the two pictures in its folder."""
    protocol, made = record["protocol"], record["made"]
    shown = "Samples with their prompts." if protocol["prompts"] else "Samples, the first of each class."
    title = f"{made.get('model') or 'samples'} against {made.get('data')}"
    parts = [
        f"<h1>{escape(title)}</h1>",
        f"<p>{protocol['images']} images from each of {protocol['seeds']} seed(s), against {protocol['reference_images']} "
        f"training images; real images: {protocol['held_out_images']} held-out ones, measured alike (the floor).</p>",
        _table(("", "samples", "real images", "reconstructions", "images"), _rows(record["values"])),
        f'<figure><img src="{GRID}" alt="samples"><figcaption>{shown}</figcaption></figure>',
        f'<figure><img src="{CLOSEST}" alt="samples and training images"><figcaption>The samples that come closest to a '
        "training image: sample, nearest by features, nearest by pixels; at the left the distances.</figcaption></figure>",
        precision_recall(record["values"]),
        guidance_plots(record.get("guidance_curve")),
        recall_curve(record.get("guidance_curve")),
        class_bars(record.get("per_class")),
        accuracy_bars(record.get("per_class")),
        "".join(f"<p>Left out: {escape(name)} ({escape(why)}).</p>" for name, why in record["left_out"].items()),
        "<h2>How the samples were made</h2>",
        _facts(made),
        "<h2>Protocol</h2>",
        _facts(protocol),
        "<h2>Seconds</h2>",
        _facts(record["seconds"]),
    ]
    head = f'<meta charset="utf-8"><title>{escape(title)}</title><link rel="icon" href="data:,"><style>{STYLE}</style>'
    body = "\n".join(part for part in parts if part)
    return f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body>\n{body}\n</body></html>\n'


def _rows(values: Mapping[str, Any]) -> list[tuple[str, ...]]:
    sides = ("value", "floor", "reconstruction")
    return [
        (name, *(format_value(entry, side) for side in sides), str(entry.get("images", "–"))) for name, entry in values.items()
    ]


def _table(head: Iterable[str], rows: Iterable[Sequence[str]]) -> str:
    top = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    body = "".join(
        f"<tr><td>{escape(row[0])}</td>{''.join(f'<td class=n>{escape(cell)}</td>' for cell in row[1:])}</tr>\n" for row in rows
    )
    return f"<table><tr>{top}</tr>\n{body}</table>"


def _facts(facts: Mapping[str, Any]) -> str:
    rows = []
    for key, value in facts.items():
        text = ", ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, Mapping) else str(value)
        said = "not stated" if value is None else escape(text)
        rows.append(f"<tr><td>{escape(key.replace('_', ' '))}</td><td>{said}</td></tr>")
    return f"<table>{''.join(rows)}</table>"


def precision_recall(values: Mapping[str, Any], side: int = 300) -> str:
    """Precision against recall as SVG, each from 0 to 1: the samples, each of several seeds, and the real images."""
    across, up = (next((entry for key, entry in values.items() if key.startswith(f"{what}[")), None) for what in _AXES)
    if across is None or up is None:
        return ""
    seeds = zip(across.get("by_seed", [across["value"]]), up.get("by_seed", [up["value"]]), strict=True)
    points = [(r, p, OURS, "samples") for r, p in seeds] + [(across["floor"], up["floor"], REAL, "real images")]
    return _square(points, "Precision against recall: samples blue, real images green.", side)


def recall_curve(curve: Mapping[str, Any] | None, side: int = 300) -> str:
    """Precision against recall as SVG along a guidance curve, its scales in order, and the real images."""
    if not curve or any(each[axis] is None for each in curve["points"] for axis in _AXES):
        return ""
    points = [(each["recall"], each["precision"], OURS, f"{each['guidance']:g}") for each in curve["points"]]
    if None not in (floor := [curve["floor"][axis] for axis in _AXES]):
        points.append((*floor, REAL, "real images"))
    caption = f"Precision against recall by guidance scale, {curve['images']} images each: samples blue, real images green."
    return _square(points, caption, side, joined=len(curve["points"]))


def _square(points: Sequence[tuple[float, float, str, str]], caption: str, side: int, joined: int = 0) -> str:
    """Points (recall, precision, colour, name) as SVG, each axis from 0 to 1; the first `joined` of them named, on a line."""
    edge, drawn = 45, []
    for k in range(6):
        at = side * k / 5
        drawn.append(f'<path d="M{edge + at:.0f} 10v{side}M{edge} {10 + at:.0f}h{side}" stroke="#ddd"/>')
        drawn.append(f'<text x="{edge + at:.0f}" y="{side + 26}" text-anchor="middle">{k / 5:.1f}</text>')
        drawn.append(f'<text x="{edge - 6}" y="{14 + at:.0f}" text-anchor="end">{1 - k / 5:.1f}</text>')
    places = [(edge + side * r, 10 + side * (1 - p)) for r, p, _, _ in points]
    if joined:
        line = "L".join(f"{x:.1f} {y:.1f}" for x, y in places[:joined])
        drawn.append(f'<path d="M{line}" stroke="{OURS}" fill="none"/>')
        for (x, y), (_, _, _, what) in zip(places[:joined], points, strict=False):  # into the square from where they lie
            drawn.append(f'<text x="{x - 8:.1f}" y="{y + (18 if y < 40 else -6):.1f}" text-anchor="end">{what}</text>')
    for (x, y), (r, p, colour, what) in zip(places, points, strict=True):
        told = f"<title>{what}: {r:.3f}, {p:.3f}</title>"
        drawn.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="5" fill="{colour}">{told}</circle>')
    drawn.append(f'<text x="{edge + side / 2:.0f}" y="{side + 44}" text-anchor="middle">recall</text>')
    middle = 10 + side // 2
    drawn.append(f'<text x="12" y="{middle}" text-anchor="middle" transform="rotate(-90 12 {middle})">precision</text>')
    return _figure(edge + side + 20, side + 52, drawn, caption)


def guidance_plots(curve: Mapping[str, Any] | None) -> str:
    """Each measure of a guidance curve against the scale as SVG, side by side; a green line is what real images score."""
    if not curve:
        return ""
    wide, side, edge = 250, 170, 48
    names = [key for key in ("frechet", "label_accuracy", "precision", "recall") if curve["points"][0][key] is not None]
    scales = [each["guidance"] for each in curve["points"]]
    span = (min(scales), max(scales) if max(scales) > min(scales) else min(scales) + 1)
    drawn = []
    for k, name in enumerate(names):
        values, floor = [each[name] for each in curve["points"]], curve["floor"][name]
        real = [] if floor is None else [floor]
        low, high = min(*values, *real, 0 if name == "frechet" else 1), max(*values, *real)
        high = high if high > low else low + 1
        left, top = edge + k % 2 * (wide + edge), 24 + k // 2 * (side + 56)
        at = [
            (left + wide * (s - span[0]) / (span[1] - span[0]), top + side * (high - v) / (high - low))
            for s, v in zip(scales, values, strict=True)
        ]
        drawn.append(f'<path d="M{left} {top}v{side}h{wide}" stroke="#888" fill="none"/>')
        for level in (top + side * (high - each) / (high - low) for each in real):
            drawn.append(f'<path d="M{left} {level:.1f}h{wide}" stroke="{REAL}"/>')
        drawn.append(f'<path d="M{"L".join(f"{x:.1f} {y:.1f}" for x, y in at)}" stroke="{OURS}" fill="none"/>')
        for (x, y), scale, value in zip(at, scales, values, strict=True):
            told = f"<title>{scale:g}: {value:.4f}</title>"
            drawn.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{OURS}">{told}</circle>')
            drawn.append(f'<text x="{x:.1f}" y="{top + side + 15}" text-anchor="middle">{scale:g}</text>')
        drawn.append(f'<text x="{left + wide / 2}" y="{top - 8}" text-anchor="middle">{name.replace("_", " ")}</text>')
        for value, y in ((high, top + 5), (low, top + side)):
            drawn.append(f'<text x="{left - 4}" y="{y}" text-anchor="end">{value:.3g}</text>')
    caption = f"By guidance scale, {curve['images']} images each: samples blue, as many real images green."
    return _figure(2 * (wide + edge) + 20, 24 + (len(names) + 1) // 2 * (side + 56), drawn, caption)


def class_bars(table: Mapping[str, Any] | None, width: int = 640) -> str:
    """The Fréchet distance of each class as SVG: a bar of the samples and one of real images."""
    if not table or not table["classes"]:
        return ""
    few = f" Fewer than {table['fewest_images']} images: {', '.join(map(str, table['left_out']))}." if table["left_out"] else ""
    return _bars(table["classes"], width, f"Fréchet distance of each class: samples blue, real images green.{few}")


def accuracy_bars(table: Mapping[str, Any] | None, width: int = 640) -> str:
    """The share of each class that is classified right as SVG: a bar of the samples and one of real images."""
    if not table or not table.get("label_accuracy"):
        return ""
    return _bars(table["label_accuracy"], width, "Label accuracy of each class: samples blue, real images green.")


def _bars(classes: Mapping[str, Any], width: int, caption: str) -> str:
    edge, room, line = 150, width - 150 - 90, 34
    most = max(max(entry["value"], entry["floor"] or 0) for entry in classes.values())
    most = most if most > 0 and math.isfinite(most) else 1.0
    drawn = []
    for k, (name, entry) in enumerate(classes.items()):
        drawn.append(f'<text x="{edge - 8}" y="{k * line + 19}" text-anchor="end">{escape(name[:20])}</text>')
        for n, (value, colour) in enumerate(((entry["value"], OURS), (entry["floor"], REAL))):
            if value is not None:
                top, long = k * line + 3 + 13 * n, room * value / most
                drawn.append(f'<rect x="{edge}" y="{top}" width="{long:.1f}" height="11" fill="{colour}"/>')
                drawn.append(f'<text x="{edge + long + 5:.1f}" y="{top + 10}">{value:.3g}</text>')
    return _figure(width, len(classes) * line + 6, drawn, caption)


def _figure(width: float, height: float, drawn: Iterable[str], caption: str) -> str:
    svg = f'<svg width="{width}" height="{height}" role="img">{"".join(drawn)}</svg>'
    return f"<figure>{svg}<figcaption>{escape(caption)}</figcaption></figure>"
