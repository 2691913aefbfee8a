"""The tab Edit: an uploaded picture changed, completed, restored, translated or varied, with the bytes of `latentdiff edit`.

`tasks_of`, `fields_of`, `call_of`, `mask_of` and `edit_picture` are plain functions. `build` lays the tab out.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gradio as gr
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
from latentdiff.utils.images import save_png
from latentdiff.web.commands import command_line, python_call
from latentdiff.web.generate import number, whole
from latentdiff.web.parts import code_fields, facts_of_model, let_stop, updates_of
from latentdiff.web.uploads import LAYERS, Upload, read_upload, undecoded, undecoded_editor
from latentdiff.web.work import QUEUE

if TYPE_CHECKING:
    from latentdiff.pipelines.latent_diffusion import LatentDiffusionPipeline
    from latentdiff.web.context import Context
    from latentdiff.web.models import Facts
    from latentdiff.web.work import Job

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
METHODS = {
    "known_pixels": "known_pixels: no seam",
    "replacement": "replacement: has a strength",
    "posterior": "posterior: slow",
}
STRENGTHS = {"img2img": 0.8, "inpaint": 1.0, "translate": TRANSLATION_STRENGTH, "variations": VARIATION}
MASK, OUT = "mask.png", "edited"  # names of files in the command
SLIDER = 500  # pixels: with another height than that of its pictures, gradio shows the two at different places
SHOWN = 448  # pixels of the side of a picture on the page, about: smaller ones are enlarged
PAINTED = 32  # of 255: a pixel of the layer that is painted on is at least so bright
BRUSH = "#ff2d9b"
LAYER_PIXELS = 4_000_000  # of what was painted
BLACK = (0, 0, 0)


# Plain functions


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


def enlarged(image: np.ndarray) -> Image.Image:
    """A picture of uint8 [H, W, C], with its pixels repeated until it is about SHOWN high."""
    scale = max(1, round(SHOWN / max(image.shape[:2])))
    image = image.repeat(scale, 0).repeat(scale, 1)
    return Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)


# The tab


def build(context: Context) -> None:
    """Fill the tab."""
    names = context.models.names
    if not names:
        gr.Markdown("There is no model to edit with. Give one: `latentdiff serve MODEL`.")
        return
    # What is asked for, and what is shown
    facts = context.models.facts(names[0])
    first = tasks_of(facts)[0]
    shown = fields_of(first, facts)
    with gr.Row():
        with gr.Column(min_width=300):
            model = gr.Dropdown(names, value=names[0], label="Model", visible=len(names) > 1)
            picture = undecoded(gr.Image(label="Picture", type="filepath", sources=["upload", "clipboard"], height=260))
            task = gr.Radio(_task_choices(facts), value=first, label="What to do")
            with gr.Column(visible=False) as painting:
                painted = _painted_editor(context)
            to_class = gr.Dropdown(
                **class_choices(facts), label="What it becomes", visible="to" in shown and not facts.reads_text
            )
            to_prompt = gr.Textbox(label="What it becomes", info="A prompt", visible="to" in shown and facts.reads_text)
            from_class = gr.Dropdown(
                **class_choices(facts), label="What it shows now", visible="source" in shown and not facts.reads_text
            )
            from_prompt = gr.Textbox(label="What it shows now", info="A prompt", visible=False)
            method = gr.Radio(
                [(text, name) for name, text in METHODS.items()], value="known_pixels", label="Method", visible=False
            )
            strength = gr.Slider(
                0, 1, STRENGTHS["img2img"], step=0.05, label="Strength", info="0 keeps the picture, 1 keeps nothing of it"
            )
            expand = gr.Textbox("4", label="Pixels to add", info="For every side, or top right bottom left", visible=False)
            blur = gr.Slider(0.1, 5, 1, step=0.1, label="Blur to take away", info="In pixels", visible=False)
            num_images = gr.Slider(1, context.limits.images, 1, step=1, label="Number of results")
            seed = gr.Number(0, precision=0, label="Seed")
            with gr.Accordion("Steps and guidance", open=False):
                # Texts, because an empty field of numbers becomes 0 in the browser
                steps = gr.Textbox(label="Steps", placeholder="the default of the task", max_lines=1)
                sampler = gr.Dropdown(**_samplers(facts), label="Sampler")
                guidance = gr.Textbox(
                    label="Guidance", placeholder="the model's default", max_lines=1, visible="guidance" in shown
                )
                negative = gr.Textbox(label="Negative prompt", visible="negative" in shown)
            with gr.Row():
                start = gr.Button("Edit", variant="primary")
                stop = gr.Button("Stop")
        with gr.Column(min_width=300):
            slider = gr.ImageSlider(
                label="Before and after", format="png", interactive=False, height=SLIDER, elem_id="edit-slider"
            )
            gallery = gr.Gallery(
                label="Results",
                show_label=False,
                format="png",
                columns=4,
                height="auto",
                buttons=["download", "fullscreen"],
                visible=False,
                elem_classes="whole",
            )
            status = gr.Markdown(elem_id="edit-status")
            files = gr.File(label="Files", file_count="multiple", interactive=False, visible=False, elem_id="edit-files")
            command, code = code_fields(visible=False)
            kept = gr.State(None, time_to_live=900)  # (before, results), for the slider

    # Settings that the model and the task have
    fields = {
        "to": (to_class, to_prompt),
        "source": (from_class, from_prompt),
        # The column: gradio makes a new component where one is updated, and the editor is not decoded by gradio (see uploads)
        "mask": (painting,),
        "method": (method,),
        "strength": (strength,),
        "expand": (expand,),
        "blur": (blur,),
        "sampler": (sampler,),
        "guidance": (guidance,),
        "negative": (negative,),
    }
    components = [component for group in fields.values() for component in group]

    def visibility(facts: Facts, task: str, method: str) -> dict[Any, Any]:
        needed = fields_of(task, facts, method)
        updates = {}
        for name, group in fields.items():
            for component in group:
                of_model = len(group) == 1 or facts.reads_text == (component is group[1])
                updates[component] = gr.update(visible=name in needed and of_model)
        return updates

    def choose_model(name: str, method: str) -> dict[Any, Any]:
        facts = facts_of_model(context, name)
        tasks = tasks_of(facts)
        updates = visibility(facts, tasks[0], method)
        for component in (to_class, from_class):
            updates[component] |= gr.update(**class_choices(facts))
        updates[sampler] |= gr.update(**_samplers(facts))
        updates[strength] |= gr.update(value=STRENGTHS.get(tasks[0], 1.0))
        return updates | {task: gr.update(choices=_task_choices(facts), value=tasks[0])}

    def choose_task(name: str, task: str, method: str) -> dict[Any, Any]:
        updates = visibility(facts_of_model(context, name), task, method)
        updates[strength] |= gr.update(value=STRENGTHS.get(task, 1.0))
        return updates

    def show_painted(name: str, picture: Upload | None) -> Any:
        if picture is None:
            return None
        try:
            return _to_paint_on(context, name, picture)
        except Exception as error:
            raise context.work.error(error) from None

    own = {"api_visibility": "private", "show_progress": "hidden"}
    model.change(choose_model, [model, method], [task, *components], **own)
    task.input(choose_task, [model, task, method], components, **own)
    method.input(choose_task, [model, task, method], components, **own)
    gr.on([picture.change, model.change], show_painted, [model, picture], painted, **own)

    # Running, and stopping it
    def run(
        model: str,
        picture: Upload | None,
        task: str,
        painted: dict[str, Any] | None,
        to_class: str | None,
        to_prompt: str | None,
        from_class: str | None,
        from_prompt: str | None,
        method: str | None,
        strength: float | None,
        expand: str | None,
        blur: float | None,
        num_images: int | None,
        seed: int | None,
        steps: str | None,
        sampler: str | None,
        guidance: str | None,
        negative: str | None,
        request: gr.Request,
    ) -> Iterator[Any]:
        form = {
            "task": task,
            "method": method,
            "strength": strength,
            "expand": expand,
            "blur": blur,
            "num_images": num_images,
            "seed": seed,
            "steps": steps,
            "sampler": sampler,
            "guidance": guidance,
            "negative": negative,
        }
        subjects = {"to": (to_class, to_prompt), "source": (from_class, from_prompt)}
        work = partial(_edit, context, model, picture, painted, form, subjects)
        yield {status: "Working …"}
        for update in updates_of(context, request.session_hash, work):
            yield {status: update.text} if update.result is None else shown_result(*update.result)

    def shown_result(call: dict[str, Any], result: Edited) -> dict[Any, Any]:
        pictures = [enlarged(image) for image in result.after]
        flags = {name: value for name, value in call.items() if name != "images"}
        return {
            slider: (enlarged(result.before), pictures[0]),
            gallery: gr.update(value=pictures, visible=len(pictures) > 1, selected_index=None),
            files: gr.update(value=[str(path) for path in result.files], visible=True),
            status: "Done." if len(pictures) == 1 else "Done. Choose a result to compare it with the picture.",
            command: gr.update(value=command_line("edit", call["images"], flags), visible=True),
            code: gr.update(value=python_call("edit", call), visible=True),
            kept: (result.before, result.after),
        }

    def choose_result(kept: Any, event: gr.SelectData) -> Any:
        if kept is None or not 0 <= event.index < len(kept[1]):
            return gr.skip()
        return enlarged(kept[0]), enlarged(kept[1][event.index])

    settings = [model, picture, task, painted, to_class, to_prompt, from_class, from_prompt, method, strength, expand, blur]
    settings += [num_images, seed, steps, sampler, guidance, negative]
    results = [slider, gallery, files, status, command, code, kept]
    event = start.click(run, settings, results, api_name="edit", show_progress="minimal", show_progress_on=status, **QUEUE)
    let_stop(context, stop, status, event)
    gallery.select(choose_result, kept, slider, **own)


def _edit(
    context: Context,
    model: str,
    picture: Upload | None,
    painted: dict[str, Any] | None,
    form: dict[str, Any],
    subjects: dict[str, tuple[Any, Any]],
    folder: Path,
    job: Job,
) -> tuple[dict[str, Any], Edited]:
    """The work of a request: (the arguments of `edit`, what it made). subjects: {argument: (class, prompt)}."""
    if not isinstance(picture, Path):
        raise UserError("picture: missing; upload one")
    facts = context.models.facts(model)
    form |= {name: pair[1] if facts.reads_text else pair[0] for name, pair in subjects.items()}
    call = call_of(facts, form, picture.name)
    read_upload(picture, context.limits)
    height, width = facts.image_shape[1:]
    top, right, bottom, left = call.get("expand", (0, 0, 0, 0))
    context.limits.check_images(call.get("num_images", 1), (height + top + bottom) * (width + left + right))
    if "steps" in call:
        context.limits.check_steps(call["steps"])
    mask = None
    if "mask" in call:
        limits = replace(context.limits, pixels=LAYER_PIXELS)
        layers = [read_upload(layer, limits, "mask", 1, BLACK) for layer in (painted or {}).get("layers", [])[:LAYERS]]
        mask = mask_of([np.asarray(layer)[..., None] for layer in layers], height, width)
    with context.models.use(model, job) as pipeline:
        return call, edit_picture(pipeline, context.models.folder(model), call, picture, mask, folder, context.models.device)


def _to_paint_on(context: Context, model: str, picture: Upload) -> dict[str, Any]:
    """The value of the editor: the picture as the model is given it, with nothing painted on it."""
    read_upload(picture, context.limits)
    if not isinstance(picture, Path):
        raise UserError("picture: upload it as a file")
    rule = image_rule(context.models.folder(model), context.models.facts(model))
    image = enlarged(read_image(picture, picture.name, rule).pixels).convert("RGB")
    return {"background": image, "layers": [], "composite": image}


def _task_choices(facts: Facts) -> list[tuple[str, str]]:
    """(what the page calls a task, its name) for the tasks of a model."""
    return [(TASKS[task], task) for task in tasks_of(facts)]


def class_choices(facts: Facts) -> dict[str, Any]:
    """Choices of a list of classes, and that none is chosen."""
    return {"choices": [("nothing in particular", ""), *((name, name) for name in facts.class_names)], "value": ""}


def _samplers(facts: Facts) -> dict[str, Any]:
    """Choices of a list of samplers, and that the default is chosen."""
    return {"choices": [("the default", ""), *((name, name) for name in facts.samplers)], "value": ""}


def _painted_editor(context: Context) -> gr.ImageEditor:
    """A picture that is painted on with one brush."""
    editor = gr.ImageEditor(
        label="Paint here",
        sources=(),
        transforms=(),
        layers=False,
        format="png",
        brush=gr.Brush(default_size=32, colors=[BRUSH], default_color=BRUSH, color_mode="fixed"),
        eraser=gr.Eraser(default_size=32),
        canvas_size=(SHOWN, SHOWN),
        buttons=[],
    )
    return undecoded_editor(editor, context.limits)
