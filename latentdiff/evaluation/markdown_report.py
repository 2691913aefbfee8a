"""The report of `latentdiff evaluate` as two files: evaluation.json, and evaluation.md for people."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from latentdiff.evaluation import guidance_curve
from latentdiff.evaluation.tables import NONE, format_value, markdown_table
from latentdiff.utils.atomic import write_text

REPORT_NAME = "evaluation"


def write_report(report: Mapping[str, Any], folder: str | Path) -> tuple[Path, Path]:
    """Write evaluation.json and evaluation.md into folder, each whole or not at all; return their paths.

    Args:
        report: of `metrics.evaluate_samples`.
        folder: where to write; it is made.
    """
    paths = Path(folder) / f"{REPORT_NAME}.json", Path(folder) / f"{REPORT_NAME}.md"
    write_text(paths[0], json.dumps(report, indent=2) + "\n")
    write_text(paths[1], report_markdown(report))
    return paths


def report_markdown(report: Mapping[str, Any]) -> str:
    """The report of `metrics.evaluate_samples` as Markdown: the values, each with its floor, then their protocol."""
    # Metrics, with the number of real images where it is another than that of the samples
    rows = []
    for name, entry in {**report["metrics"], **report["distribution"]}.items():
        side = "floor" if "floor" in entry else "real"
        floor, images = format_value(entry, side), entry.get(f"{side}_images")
        if images is not None and images != entry.get("images"):
            floor += f" ({images} images)"
        rows.append((name, format_value(entry), floor, format_value(entry, "reconstruction")))
    if "cas" in report["metrics"]:
        rows.append(("cas, share of real", f"{report['metrics']['cas']['ratio']:.4f}", "1", NONE))
    lines = markdown_table(("metric", "samples", "real images", "reconstructions"), rows)

    if "reconstruction" in report:
        entry = report["reconstruction"]
        quality = f"PSNR {entry['psnr']:.2f} dB, SSIM {entry['ssim']:.4f}"
        lines += ["", f"Reconstructions of {entry['images']} test images: {quality}."]
    lines += ["", *_memorisation_table(report["memorisation"])]
    if "per_class" in report:
        lines += ["", *_class_tables(report["per_class"])]
    if "guidance_curve" in report:
        lines += ["", *guidance_curve.table(report["guidance_curve"])]
    if "likelihood" in report:
        entry = report["likelihood"]
        error = "" if entry["stderr"] is None else f" ± {entry['stderr']:.4f}"
        images = entry["protocol"]["images"]
        lines += [
            "",
            f"At most {entry['bits_per_dim']:.4f}{error} bits per dimension for the pixels of {images} held-out images.",
        ]
    if report["left_out"]:
        lines += ["", *(f"Left out: {name} ({reason})." for name, reason in report["left_out"].items())]

    # How the samples were made, what they were compared with, and the constants of the metrics
    prefixes = {"protocol": "", "reference": "reference ", "settings": "measured with "}
    rows = [
        (prefix + key.replace("_", " "), "not stated" if value is None else value)
        for section, prefix in prefixes.items()
        for key, value in report[section].items()
    ]
    return "\n".join([*lines, "", *markdown_table(("protocol", ""), rows)]) + "\n"


def _memorisation_table(spaces: Mapping[str, Any]) -> list[str]:
    header = (
        "nearest training image, in",
        "median",
        "of held-out images",
        "samples closer than held-out images at 1 / 5 / 50 %",
    )
    rows = []
    for name in ("features", "pixels"):
        entry = spaces[name]
        closer = " / ".join(f"{100 * each['share']:.1f} %" for each in entry["closer_than_held_out"])
        rows.append((name, f"{entry['median']:.4f}", f"{entry['held_out_median']:.4f}", closer))
    return markdown_table(header, rows)


def _class_tables(per_class: Mapping[str, Any]) -> list[str]:
    def rows(entries: Mapping[str, Any]) -> list[tuple[Any, ...]]:
        return [(name, format_value(entry), format_value(entry, "floor"), entry["images"]) for name, entry in entries.items()]

    distances = rows(per_class["classes"])
    if per_class["left_out"]:
        few = ", ".join(f"{name} ({count})" for name, count in per_class["left_out"].items())
        distances.append((f"fewer than {per_class['fewest_images']} images: {few}", NONE, NONE, NONE))
    lines = markdown_table(("class", "Fréchet distance", "real images", "samples"), distances)
    if "label_accuracy" in per_class:
        header = ("class", "label accuracy", "real images", "samples")
        lines += ["", *markdown_table(header, rows(per_class["label_accuracy"]))]
    return lines
