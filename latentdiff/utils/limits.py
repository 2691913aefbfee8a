"""Limits for the numbers in a checkpoint's JSON files: values without meaning, or that would take all memory, are refused."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from latentdiff.errors import UserError

MAX_STEPS = 100_000  # sampling steps
MAX_TIMESTEPS = 1_000_000  # of a scheduler, which has several tables of this length
MAX_SIDE = 4096  # height or width of latents
MAX_IMAGE_SIDE = 65_536  # pixels
MAX_CLASSES = 10_000_000
MAX_TOKENS = 100_000  # of a prompt. A tokenizer without a length of its own says 10^30
MAX_FACTOR = 64  # how many times smaller a second image is
IMAGE_KINDS = ("low_resolution", "mask", "grey", "pair")  # of second images
MASKS = ("mixed", "side", "rectangles", "frame")  # what the masks of training hide


def check_index(file: Path, index: Mapping[str, Any]) -> None:
    """UserError, naming the field, for values of model_index.json that a pipeline cannot work with. file: for the message."""
    if "default_num_inference_steps" in index:
        whole(file, "default_num_inference_steps", index["default_num_inference_steps"], 1, MAX_STEPS)
    scale = index.get("default_guidance_scale", 1.0)
    if not _number(scale) or not 0 <= scale < math.inf:
        raise UserError(f"{file}: default_guidance_scale is {str(scale)[:40]}; it must be a finite number of at least 0")
    interval = index.get("default_guidance_interval")
    if interval is not None and not (_pair(interval) and all(map(_number, interval)) and 0 <= interval[0] <= interval[1] <= 1):
        raise UserError(f"{file}: default_guidance_interval is {str(interval)[:40]}; it must be [low, high] within 0 and 1")
    if index.get("image_size") is not None:
        _sides(file, "image_size", index["image_size"], MAX_IMAGE_SIDE)
    if index.get("null_class") is not None:
        whole(file, "null_class", index["null_class"], 0, MAX_CLASSES)
    _check_image_condition(file, index.get("image_condition"))
    names = index.get("class_names")
    listed = list(names.values()) if isinstance(names, dict) else names
    keyed = not isinstance(names, dict) or all(isinstance(key, str) and key.isdecimal() and len(key) < 9 for key in names)
    if names is not None and not (isinstance(listed, list) and keyed and all(isinstance(name, str) for name in listed)):
        raise UserError(f"{file}: class_names must be texts, by their index from 0 on")


def _check_image_condition(file: Path, rule: Any) -> None:
    """UserError unless the entry image_condition is missing, or says what the second image of a U-Net is."""
    if rule is None:
        return
    if not isinstance(rule, dict) or rule.get("kind") not in IMAGE_KINDS or not isinstance(rule.get("dropped"), bool):
        raise UserError(
            f"{file}: image_condition is {str(rule)[:80]}; it must have a factor, dropped, and a kind: {', '.join(IMAGE_KINDS)}"
        )
    whole(file, "image_condition.factor", rule.get("factor"), 1, MAX_FACTOR)
    if rule.get("masks", "mixed") not in MASKS:
        raise UserError(f"{file}: image_condition.masks is {str(rule['masks'])[:40]}; valid are {', '.join(MASKS)}")


def check_latent_size(file: Path, config: Mapping[str, Any]) -> None:
    """UserError for a bad sample_size in a U-Net's config: the latent's side, or its [height, width]."""
    size = config.get("sample_size")
    if size is not None:
        _sides(file, "sample_size", [size, size] if not isinstance(size, list) else size, MAX_SIDE)


def whole(file: Path, field: str, value: Any, low: int, high: int) -> None:
    """UserError, naming file and field, unless the value is a whole number from low to high."""
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise UserError(f"{file}: {field} is {str(value)[:40]}; it must be a whole number from {low} to {high}")


def _sides(file: Path, field: str, sides: Any, most: int) -> None:
    if not _pair(sides):
        raise UserError(f"{file}: {field} is {str(sides)[:40]}; it must be [height, width]")
    for side in sides:
        whole(file, field, side, 1, most)


def _pair(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
