"""What a framing does to the images of a source: how much is cut off, filled, stretched or enlarged."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from latentdiff.data.image_source import ImageSource
from latentdiff.data.transforms import SCALED, Preprocess, size_name
from latentdiff.errors import printable


def framing_facts(source: ImageSource, rule: Preprocess, indices: torch.Tensor | None = None) -> dict[str, Any]:
    """What a preprocessing with its size filled in does to the images of a source, or to those at `indices`.

    Returns {"size": [height, width], "framing": its name}, and those of these keys that apply to any image:
    cut (by "crop"): {"median", "worst", "image"}, the shares of an image's area, and the name of the worst image;
    stretched (by "resize"): likewise, by how much more one side is scaled than the other (0: not at all);
    filled (by "letterbox"): likewise, the shares of the result that are background;
    enlarged: {"images", "largest_factor", "image"}, how many images are made larger, by how much at most, and which image.
    """
    sizes = (source.sizes if indices is None else source.sizes[indices.numpy()]).astype(np.float64)  # [N, 2]
    rows = np.arange(len(source)) if indices is None else indices.numpy()
    _, _, height, width = rule.content
    facts: dict[str, Any] = {"size": [height, width], "framing": rule.framing}
    if rule.framing not in SCALED:
        return facts
    ratio = np.array([height, width]) / sizes  # [N, 2]
    small, large = ratio.min(axis=1), ratio.max(axis=1)
    names = {"crop": "cut", "resize": "stretched", "letterbox": "filled"}
    changed = large / small - 1 if rule.framing == "resize" else 1 - small / large
    if changed.max() > 0:
        worst = int(changed.argmax())
        facts[names[rule.framing]] = {
            "median": round(float(np.median(changed)), 4),
            "worst": round(float(changed[worst]), 4),
            "image": _image_name(source, int(rows[worst])),
        }
    factor = small if rule.framing == "letterbox" else large
    if factor.max() > 1:
        worst = int(factor.argmax())
        enlarged = {"images": int((factor > 1).sum()), "largest_factor": round(float(factor[worst]), 3)}
        facts["enlarged"] = enlarged | {"image": _image_name(source, int(rows[worst]))}
    return facts


def framing_lines(facts: dict[str, Any]) -> list[str]:
    """The facts of `framing_facts` as lines of text; none where images are brought to their size without loss."""
    lines, rule = [], f"data.framing={facts['framing']} to {size_name(facts['size'])}"
    for key, does in (("cut", "cuts off"), ("filled", "fills with background")):
        if key in facts and facts[key]["worst"] >= 0.005:
            entry = facts[key]
            shares = f"{entry['median']:.0%} of the median image and {entry['worst']:.0%} of {entry['image']}"
            lines.append(f"{rule} {does} {shares}")
    if "stretched" in facts and facts["stretched"]["worst"] >= 0.05:
        entry = facts["stretched"]
        factors = f"the median image by {1 + entry['median']:.2f} and {entry['image']} by {1 + entry['worst']:.2f}"
        lines.append(f"{rule} stretches {factors}")
    if "enlarged" in facts:
        entry = facts["enlarged"]
        lines.append(
            f"{rule} enlarges {entry['images']} images, {entry['image']} the most, {entry['largest_factor']:.1f} times"
        )
    return lines


def _image_name(source: ImageSource, i: int) -> str:
    """The image's file and its size as height x width."""
    files = getattr(source, "files", None)
    name = printable(files[i]) if files else f"image {i}"
    return f"{name} ({size_name(source.sizes[i])})"
