"""The report of an evaluation as Markdown: every value with its floor, then the protocol."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from latentdiff.evaluation import guidance_curve
from latentdiff.utils import atomic

REPORT_NAME = "evaluation"


def write_report(report: Mapping[str, Any], folder: str | Path) -> tuple[Path, Path]:
    """Write evaluation.json and evaluation.md into folder, each whole or not at all; returns their paths."""
    folder = Path(folder)
    contents = {".json": json.dumps(report, indent=2) + "\n", ".md": report_markdown(report)}
    paths = [folder / f"{REPORT_NAME}{suffix}" for suffix in contents]
    for path, text in zip(paths, contents.values(), strict=True):
        atomic.write_text(path, text)
    return paths[0], paths[1]


def report_markdown(report: Mapping[str, Any]) -> str:
    """The report as a table of numbers, then the protocol that belongs to them."""
    lines = ["| metric | samples | real images | reconstructions |", "|---|---|---|---|"]
    for name, entry in {**report["metrics"], **report["distribution"]}.items():
        side = "floor" if "floor" in entry else "real"
        floor, images = format_value(entry, side), entry.get(f"{side}_images")
        if images is not None and images != entry.get("images"):
            floor += f" ({images} images)"
        values = (format_value(entry), floor, format_value(entry, "reconstruction"))
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


def format_value(entry: Mapping[str, Any], side: str = "value") -> str:
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
        lines.append(f"| {name} | {format_value(entry)} | {format_value(entry, 'floor')} | {entry['images']} |")
    if table["left_out"]:
        few = ", ".join(f"{name} ({count})" for name, count in table["left_out"].items())
        lines.append(f"| fewer than {table['fewest_images']} images: {few} | – | – | – |")
    if "label_accuracy" in table:
        lines += ["", "| class | label accuracy | real images | samples |", "|---|---|---|---|"]
        for name, entry in table["label_accuracy"].items():
            lines.append(f"| {name} | {format_value(entry)} | {format_value(entry, 'floor')} | {entry['images']} |")
    return lines
