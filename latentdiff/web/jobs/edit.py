"""An uploaded picture changed, completed, restored, translated or varied, by the function of `latentdiff edit`."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from latentdiff.editing import (
    BY_SAMPLER,
    OF_CODES,
    TRAINED,
    TRANSLATION_STRENGTH,
    VARIATION,
    edit,
    image_rule,
    read_image,
)
from latentdiff.errors import UserError
from latentdiff.web.jobs.draw import number, whole
from latentdiff.web.jobs.uploads import Upload, read_upload

if TYPE_CHECKING:
    from latentdiff.pipelines.latent_diffusion import LatentDiffusionPipeline
    from latentdiff.web.facts import Facts
    from latentdiff.web.jobs.job import Job
    from latentdiff.web.jobs.models import Models
    from latentdiff.web.limits import Limits

# What the page calls each task
TASKS = {
    "img2img": "Change it",
    "inpaint": "Fill the painted part",
    "outpaint": "Continue it beyond its edges",
    "upscale": "Enlarge it",
    "deblur": "Sharpen it",
    "colorize": "Colour it",
    "translate": "Turn one thing into another",
    "variations": "Vary it",
}
STRENGTHS = {"img2img": 0.8, "inpaint": 1.0, "translate": TRANSLATION_STRENGTH, "variations": VARIATION}
MASK, OUT = "mask.png", "edited"  # names of files in the command
LAYERS = 8  # of a painted picture
LAYER_PIXELS = 4_000_000  # of what was painted
PAINTED = 32  # of 255: a pixel of the layer that is painted on is at least so bright
BLACK = (0, 0, 0)


def tasks_of(facts: Facts) -> list[str]:
    """The tasks of `latentdiff edit` that a model can do to a picture. The first one is the default."""
    if facts.condition:
        return [TRAINED[facts.condition]]
    if facts.bridge:
        return ["translate"]
    if facts.over_codes:
        return list(OF_CODES)
    return [task for task in TASKS if task != "colorize" or facts.image_shape[0] == 3]


def fields_of(task: str, facts: Facts, method: str | None = None) -> set[str]:
    """The settings of `latentdiff edit` that a task reads from the page, by name. method: of inpaint."""
    trained = bool(facts.condition)
    plain = not (trained or facts.over_codes)
    fields = {"num_images", "steps", "seed"}
    if (facts.class_names or facts.reads_text) and task != "variations":
        fields.add("to")
    if task in ("translate", "variations") and not (trained or facts.bridge) and (facts.class_names or facts.reads_text):
        fields.add("source")
    if task == "img2img" and plain and facts.can_guide and not facts.reads_text:  # which has a negative prompt
        fields.add("source")
    if task == "inpaint":
        fields |= {"mask", "method"} if plain else {"mask"}
    # The other methods of inpaint keep the known pixels by themselves
    if task in STRENGTHS and not (task == "inpaint" and plain and method != "replacement"):
        fields |= {"strength"} if not (facts.bridge or trained and task != "inpaint") else set()
    fields |= {"outpaint": {"expand"}, "deblur": {"blur"} if plain else set()}.get(task, set())
    if task not in BY_SAMPLER:
        fields.add("sampler")
    if facts.can_guide and task != "variations":
        fields.add("guidance")
        if facts.reads_text and (trained or task not in BY_SAMPLER):
            fields.add("negative")
    return fields


def call_of(facts: Facts, form: Mapping[str, Any], picture: str) -> dict[str, Any]:
    """The arguments of `latentdiff.edit` for the settings of the page, with names of files in place of paths.

    Settings that the task does not read, and empty ones, are left out.

    Args:
        facts: of the model.
        form: the task and the values of the page, by the names of `edit`'s arguments.
        picture: the name of the picture's file.

    Raises:
        UserError: a task that the model does not do, or a value of another kind.
    """
    task = form.get("task") or tasks_of(facts)[0]
    if task not in tasks_of(facts):
        raise UserError(f"task {str(task)[:40]!r}: this model does not do it; valid: {', '.join(tasks_of(facts))}")
    fields = fields_of(task, facts, form.get("method"))
    numbers = {"strength": number, "blur": number, "guidance": typed, "num_images": whole, "steps": typed_whole, "seed": whole}
    call: dict[str, Any] = {"model": facts.shown, "images": [picture], "task": task}
    for name in ("to", "source", "strength", "mask", "method", "expand", "blur", *list(numbers)[2:], "sampler", "negative"):
        value = MASK if name == "mask" else form.get(name)
        if name not in fields or value is None or value == "" or name == "num_images" and value == 1:
            continue
        if name in numbers:
            value = numbers[name](value, name)
        elif not isinstance(value, str):
            raise UserError(f"{name}: must be text")
        if name == "expand":
            value = sides(value)
        call[name] = [value] if name == "to" else value
    call["out"] = OUT
    return call


def typed(text: Any, name: str) -> float:
    """The number in a text. UserError, naming the field, for anything else."""
    try:
        return number(float(str(text)), name)
    except ValueError:
        raise UserError(f"{name}: give a number, or leave it empty") from None


def typed_whole(text: Any, name: str) -> int:
    """The whole number in a text. UserError, naming the field, for anything else."""
    return whole(typed(text, name), name)


def sides(text: str) -> tuple[int, int, int, int]:
    """Pixels at the top, right, bottom and left of a text with one number for all sides or four. UserError otherwise."""
    words = text.replace(",", " ").split()
    values = [int(word) for word in words if word.isdecimal() and len(word) < 6]
    if len(values) not in (1, 4) or len(values) < len(words):
        raise UserError("expand: give one number of pixels for every side, or four: top, right, bottom, left")
    top, right, bottom, left = values * 4 if len(values) == 1 else values
    return top, right, bottom, left


def mask_of(layers: Sequence[np.ndarray], height: int, width: int) -> np.ndarray:
    """A mask uint8 [height, width] of what was painted: 255 where half of a pixel of the model or more is painted, else 0.

    layers: uint8 [H, W, 1] each, black where nothing is painted. UserError where nothing is painted.
    """
    painted = np.zeros((height, width))
    for layer in layers:
        area = Image.fromarray(np.where(layer[..., 0] >= PAINTED, 255, 0).astype(np.uint8))
        painted = np.maximum(painted, np.asarray(area.resize((width, height), Image.Resampling.BOX)))
    if not (painted >= 128).any():
        raise UserError("mask: nothing is painted; paint over what is to be drawn anew")
    return np.where(painted >= 128, 255, 0).astype(np.uint8)


@dataclass(frozen=True)
class Edited:
    """What `edit_picture` made.

    Attributes:
        before: the picture as it was given to the model, uint8 [H, W, C].
        after: the results, uint8 [H, W, C] each, of the size of `before`.
        files: the files that the command writes, and those that it reads besides the picture.
    """

    before: np.ndarray
    after: list[np.ndarray]
    files: list[Path]


def edit_picture(
    pipeline: LatentDiffusionPipeline,
    model: Path,
    call: Mapping[str, Any],
    picture: Path,
    mask: np.ndarray | None,
    folder: Path,
    device: str = "auto",
) -> Edited:
    """Run `latentdiff.edit` with the arguments of `call_of`.

    Args:
        pipeline: the model, loaded.
        model: its folder.
        call: from `call_of`.
        picture: the file that was uploaded. The result depends on its name too, which stands in the grid.
        mask: uint8 [H, W], for inpaint.
        folder: an empty folder, where the files are written.
        device: as of `edit`.

    Raises:
        UserError: as `edit` does, with names of files in place of paths.
    """
    file = folder / "given" / call["images"][0]
    file.parent.mkdir()
    shutil.copyfile(picture, file)
    if mask is not None:
        from latentdiff.utils.images import save_png

        save_png(Image.fromarray(mask), folder / MASK)
    places = {"model": model, "images": [file], "out": folder / OUT}
    places |= {"mask": folder / MASK} if "mask" in call else {}
    try:
        edit(**{**call, **places}, pipeline=pipeline, device=device, progress=False)
        shown = read_image(file, file.name, image_rule(model, pipeline), own_size=call["task"] == "upscale").pixels
    except UserError as error:
        raise UserError(str(error).replace(f"{file.parent}/", "").replace(f"{folder}/", "")) from None
    results = sorted((folder / OUT).glob("*.png"))
    after = [_pixels(path) for path in results]
    if "expand" in call:
        top, right, bottom, left = call["expand"]
        shown = np.pad(shown, ((top, bottom), (left, right), (0, 0)), constant_values=128)
    beside = [folder / f"{OUT}.png", *([folder / MASK] if mask is not None else [])]
    return Edited(resized(shown, after[0].shape), after, [*beside, *results])


def _pixels(path: Path) -> np.ndarray:
    """uint8 [H, W, C] of a file that was written here."""
    pixels = np.asarray(Image.open(path))
    return pixels[..., None] if pixels.ndim == 2 else pixels


def resized(image: np.ndarray, shape: Sequence[int]) -> np.ndarray:
    """An image [h, w, C] with its pixels repeated, or left out, to the height and width of `shape`."""
    rows, columns = (np.arange(new) * old // new for old, new in zip(image.shape[:2], shape[:2], strict=True))
    return image[rows][:, columns]


def edit_upload(
    models: Models,
    job: Job,
    limits: Limits,
    model: str,
    picture: Upload | None,
    painted: dict[str, Any] | None,
    form: dict[str, Any],
    subjects: dict[str, tuple[Any, Any]],
    folder: Path,
) -> tuple[dict[str, Any], Edited]:
    """A request: (the arguments of `edit`, what it made).

    Args:
        models, job: of the process that computes.
        limits: of the server.
        model: its name on the page.
        picture: what was uploaded.
        painted: the value of the editor, see `uploads.undecoded_editor`.
        form: the settings, as of `call_of`.
        subjects: {argument: (class, prompt)}.
        folder: an empty folder, where the files are written.

    Raises:
        UserError: what the server does not allow, or `edit` refuses.
        Cancelled: the visitor has stopped it.
    """
    if not isinstance(picture, Path):
        raise UserError("picture: missing; upload one")
    facts = models.facts(model)
    form |= {name: pair[1] if facts.reads_text else pair[0] for name, pair in subjects.items()}
    call = call_of(facts, form, picture.name)
    read_upload(picture, limits)
    height, width = facts.image_shape[1:]
    top, right, bottom, left = call.get("expand", (0, 0, 0, 0))
    limits.check_images(call.get("num_images", 1), (height + top + bottom) * (width + left + right))
    if "steps" in call:
        limits.check_steps(call["steps"])
    mask = None
    if "mask" in call:
        of_layers = replace(limits, pixels=LAYER_PIXELS)
        layers = [read_upload(layer, of_layers, "mask", 1, BLACK) for layer in (painted or {}).get("layers", [])[:LAYERS]]
        mask = mask_of([np.asarray(layer)[..., None] for layer in layers], height, width)
    with models.use(model, job) as pipeline:
        return call, edit_picture(pipeline, models.folder(model), call, picture, mask, folder, models.device)
