"""The tab Edit: an uploaded picture changed, completed, restored, translated or varied, by `jobs.edit`."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gradio as gr
import numpy as np
from PIL import Image

from latentdiff.editing import image_rule, read_image
from latentdiff.errors import UserError
from latentdiff.web.commands import command_line, python_call
from latentdiff.web.fields import Dropdown, Number, Radio, Slider
from latentdiff.web.jobs.edit import STRENGTHS, TASKS, Edited, edit_upload, fields_of, tasks_of
from latentdiff.web.jobs.uploads import Upload, read_upload
from latentdiff.web.parts import code_fields, facts_of_model, let_stop, updates_of
from latentdiff.web.uploads import undecoded, undecoded_editor
from latentdiff.web.work import QUEUE

if TYPE_CHECKING:
    from latentdiff.web.context import Context
    from latentdiff.web.facts import Facts

METHODS = {
    "known_pixels": "known_pixels: no seam",
    "replacement": "replacement: has a strength",
    "posterior": "posterior: slow",
}
SLIDER = 500  # pixels: with another height than that of its pictures, gradio shows the two at different places
SHOWN = 448  # pixels of the side of a picture on the page, about: smaller ones are enlarged
BRUSH = "#ff2d9b"


def enlarged(image: np.ndarray) -> Image.Image:
    """A picture of uint8 [H, W, C], with its pixels repeated until it is about SHOWN high."""
    scale = max(1, round(SHOWN / max(image.shape[:2])))
    image = image.repeat(scale, 0).repeat(scale, 1)
    return Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)


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
            model = Dropdown(names, value=names[0], label="Model", visible=len(names) > 1)
            picture = undecoded(gr.Image(label="Picture", type="filepath", sources=["upload", "clipboard"], height=260))
            task = Radio(_task_choices(facts), value=first, label="What to do")
            with gr.Column(visible=False) as painting:
                painted = _painted_editor(context)
            to_class = Dropdown(**class_choices(facts), label="What it becomes", visible="to" in shown and not facts.reads_text)
            to_prompt = gr.Textbox("", label="What it becomes", info="A prompt", visible="to" in shown and facts.reads_text)
            from_class = Dropdown(
                **class_choices(facts), label="What it shows now", visible="source" in shown and not facts.reads_text
            )
            from_prompt = gr.Textbox("", label="What it shows now", info="A prompt", visible=False)
            method = Radio(
                [(text, name) for name, text in METHODS.items()], value="known_pixels", label="Method", visible=False
            )
            strength = Slider(
                0, 1, STRENGTHS["img2img"], step=0.05, label="Strength", info="0 keeps the picture, 1 keeps nothing of it"
            )
            expand = gr.Textbox("4", label="Pixels to add", info="For every side, or top right bottom left", visible=False)
            blur = Slider(0.1, 5, 1, step=0.1, label="Blur to take away", info="In pixels", visible=False)
            num_images = Slider(1, context.limits.images, 1, step=1, label="Number of results")
            seed = Number(0, precision=0, label="Seed")
            with gr.Accordion("Steps and guidance", open=False):
                # Texts, because an empty field of numbers becomes 0 in the browser
                steps = gr.Textbox("", label="Steps", placeholder="the default of the task", max_lines=1)
                sampler = Dropdown(**_samplers(facts), label="Sampler")
                guidance = gr.Textbox(
                    "", label="Guidance", placeholder="the model's default", max_lines=1, visible="guidance" in shown
                )
                negative = gr.Textbox("", label="Negative prompt", visible="negative" in shown)
            with gr.Row():
                start = gr.Button("Edit", variant="primary")
                stop = gr.Button("Stop")
        with gr.Column(min_width=300):
            slider = gr.ImageSlider(
                label="Before and after", format="png", interactive=False, height=SLIDER, elem_id="edit-slider"
            )
            # What is shown and hidden are columns, so that the values are plain ones for a program too
            with gr.Column(visible=False) as several:
                gallery = gr.Gallery(
                    label="Results",
                    show_label=False,
                    format="png",
                    columns=4,
                    height="auto",
                    buttons=["download", "fullscreen"],
                    elem_classes="whole",
                )
            status = gr.Markdown(elem_id="edit-status")
            with gr.Column(visible=False) as made:
                files = gr.File(label="Files", file_count="multiple", interactive=False, elem_id="edit-files")
                command, code = code_fields()
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
        painted: dict[str, Any] | None = None,
        to_class: str | None = None,
        to_prompt: str | None = None,
        from_class: str | None = None,
        from_prompt: str | None = None,
        method: str | None = None,
        strength: float | None = None,
        expand: str | None = None,
        blur: float | None = None,
        num_images: int | None = None,
        seed: int | None = None,
        steps: str | None = None,
        sampler: str | None = None,
        guidance: str | None = None,
        negative: str | None = None,
        request: gr.Request = None,
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
        work = partial(
            edit_upload,
            limits=context.limits,
            model=model,
            picture=picture,
            painted=painted,
            form=form,
            subjects=subjects,
        )
        try:
            for update in updates_of(context, request.session_hash, work):
                yield {status: update.text} if update.result is None else shown_result(*update.result)
        except gr.Error as error:  # the line stays where the visitor looks, also when the message is closed
            yield {status: error.message, made: gr.update(visible=False)}
            raise

    def shown_result(call: dict[str, Any], result: Edited) -> dict[Any, Any]:
        pictures = [enlarged(image) for image in result.after]
        flags = {name: value for name, value in call.items() if name != "images"}
        return {
            slider: (enlarged(result.before), pictures[0]),
            gallery: pictures,
            several: gr.update(visible=len(pictures) > 1),
            files: [str(path) for path in result.files],
            status: "Done." if len(pictures) == 1 else "Done. Choose a result to compare it with the picture.",
            command: command_line("edit", call["images"], flags),
            code: python_call("edit", call),
            made: gr.update(visible=True),
            kept: (result.before, result.after),
        }

    def choose_result(kept: Any, event: gr.SelectData) -> Any:
        if kept is None or not 0 <= event.index < len(kept[1]):
            return gr.skip()
        return enlarged(kept[0]), enlarged(kept[1][event.index])

    settings = [model, picture, task, painted, to_class, to_prompt, from_class, from_prompt, method, strength, expand, blur]
    settings += [num_images, seed, steps, sampler, guidance, negative]
    results = [slider, gallery, files, status, command, code, kept, several, made]
    event = start.click(run, settings, results, api_name="edit", show_progress="minimal", show_progress_on=status, **QUEUE)
    event.success(lambda: gr.update(selected_index=None), None, gallery, queue=False, **own)
    let_stop(context, stop, status, event)
    gallery.select(choose_result, kept, slider, **own)


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
