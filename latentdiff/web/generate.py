"""The tab Generate: images of classes and prompts, made by `jobs.draw`."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gradio as gr

from latentdiff.web.commands import command_line, python_call
from latentdiff.web.fields import Dropdown, Number, Slider
from latentdiff.web.jobs.draw import IMAGES, OUT, OWN_SAMPLER, Drawn, Settings, draw
from latentdiff.web.parts import code_fields, facts_of_model, let_stop, updates_of
from latentdiff.web.uploads import undecoded
from latentdiff.web.work import QUEUE

if TYPE_CHECKING:
    from latentdiff.web.context import Context
    from latentdiff.web.facts import Facts

SMALL = 128  # pixels; smaller images are enlarged without blurring


def as_command(facts: Facts, arguments: dict[str, Any]) -> str:
    """The command that makes the same files."""
    flags = {"model": facts.shown, **_named(arguments), "out": OUT}
    words = flags.pop("what")
    line = command_line("generate", [word for word in words if not word.startswith("-")], flags)
    dashed = [word for word in words if word.startswith("-")]  # a prompt that would be taken for a flag
    return f"{line} -- {shlex.join(dashed)}" if dashed else line


def as_python(facts: Facts, arguments: dict[str, Any]) -> str:
    """The Python that makes the same files."""
    return python_call("generate", {"model": facts.shown, **_named(arguments), "out": OUT})


def _named(arguments: dict[str, Any]) -> dict[str, Any]:
    """The arguments with the name of a picture in the place of its file, which is the server's."""
    return {name: f"{name}.png" if isinstance(value, Path) else value for name, value in arguments.items()}


def summary(facts: Facts, drawn: Drawn) -> str:
    """The line under finished images."""
    count = len(drawn.files)
    images = "1 image" if count == 1 else f"{count} images"
    line = f"{images} in {drawn.seconds:.1f} seconds."
    if drawn.cut:
        line += " The prompts are longer than the model reads; this was cut off: " + "; ".join(drawn.cut)
    if not facts.shown.startswith("weights/"):
        line += f" In the command, {facts.shown} stands for the folder of the model."
    return line


def describe(facts: Facts) -> str:
    """What a model is, in a line."""
    _, height, width = facts.image_shape
    kind = "codes" if facts.over_codes else "latents"
    line = f"Images of {width}×{height} pixels, drawn through {kind}."
    if facts.condition:
        line += f" Each is drawn for a picture that you upload ({facts.condition.replace('_', ' ')})."
    if facts.bridge:
        line += " It is a bridge, which starts from images of another data set: use the tab Edit."
    return line


def build(context: Context) -> None:
    """Fill the tab."""
    models, limits = context.models, context.limits
    if not models.names:
        gr.Markdown("There is no model yet. Start the server again when training has made one.")
        return
    # What is asked for, and what is shown
    first = models.facts(models.names[0])
    with gr.Row():
        with gr.Column(scale=2, min_width=320):
            model = Dropdown(models.names, value=first.name, label="Model", filterable=False)
            about = gr.Markdown(describe(first))
            classes = Dropdown(label="Classes", multiselect=True, allow_custom_value=True, **_classes(first))
            prompt = gr.Textbox(
                label="Prompt", placeholder="a red apple (one prompt a line)", lines=2, max_lines=6, **_prompt(first)
            )
            negative = gr.Textbox(label="Negative prompt", placeholder="what to guide away from", lines=1, **_negative(first))
            picture = {"type": "filepath", "sources": ["upload", "clipboard"], "height": 200}
            condition = undecoded(gr.Image(label="Picture", **picture, **_condition(first)))
            mask = undecoded(gr.Image(label="Mask, white to fill", **picture, **_mask(first)))
            with gr.Row():
                count = Number(min(IMAGES, limits.images), label="Images of each", precision=0, minimum=1)
                seed = Number(0, label="Seed", precision=0)
            with gr.Row():
                steps = Number(label="Steps", precision=0, minimum=1, **_steps(first))
                sampler = Dropdown(label="Sampler", allow_custom_value=True, **_sampler(first))
            with gr.Group(**_guided(first)) as guided:
                guidance = Slider(0, 15, step=0.1, label="Guidance", info="1 is off", value=first.guidance)
                with gr.Row():
                    low = Slider(0, 1, step=0.01, label="Guidance from", info="0 is data", value=first.interval[0])
                    high = Slider(0, 1, step=0.01, label="Guidance to", info="1 is noise", value=first.interval[1])
            with gr.Row():
                start = gr.Button("Generate", variant="primary")
                stop = gr.Button("Stop")
        with gr.Column(scale=3, min_width=320):
            status = gr.Markdown("Nothing drawn yet.", elem_id="generate-status")
            with gr.Column(elem_classes="when-full"):
                gallery = gr.Gallery(
                    label="Images",
                    show_label=False,
                    columns=4,
                    height="auto",
                    object_fit="contain",
                    buttons=["download", "fullscreen"],
                    interactive=False,
                    elem_id="generate-images",
                    elem_classes=["whole", *_pixels(first)],
                )
                archive = gr.DownloadButton("Download all")
            with gr.Column(elem_classes="when-full"):
                gr.Markdown("From noise to images: what the model expects the first images to become, after some of the steps")
                path = gr.Image(
                    label="From noise to images",
                    show_label=False,
                    interactive=False,
                    buttons=["fullscreen"],
                    height="auto",
                    elem_id="generate-trajectory",
                    elem_classes=_pixels(first),
                )
            command, python = code_fields(elem_classes="when-full")

    # Another model has other fields
    def choose(name: str) -> list[Any]:
        """The fields for another model."""
        facts = facts_of_model(context, name)
        return [
            describe(facts),
            gr.update(**_classes(facts)),
            gr.update(**_prompt(facts)),
            gr.update(**_negative(facts)),
            gr.update(**_steps(facts)),
            gr.update(**_sampler(facts)),
            gr.update(**_guided(facts)),
            gr.update(**_condition(facts)),
            gr.update(**_mask(facts)),
            facts.guidance,
            *facts.interval,
            gr.update(elem_classes=["whole", *_pixels(facts)]),
            gr.update(elem_classes=_pixels(facts)),
        ]

    fields = [about, classes, prompt, negative, steps, sampler, guided, condition, mask, guidance, low, high, gallery, path]
    model.change(choose, model, fields, api_visibility="private", **QUEUE)

    # Drawing, and stopping it
    def generate(
        model: str,
        classes: list[str],
        prompt: str,
        negative: str,
        num_images: float,
        seed: float,
        steps: float,
        sampler: str,
        guidance: float,
        low: float,
        high: float,
        condition: Path | None = None,  # the default makes the field optional in the API
        condition_mask: Path | None = None,
        request: gr.Request = None,
    ) -> Iterator[Any]:
        """Draw images of classes or prompts."""
        settings = Settings(
            model, classes, prompt, negative, num_images, seed, steps, sampler, guidance, low, high, condition, condition_mask
        )
        outputs = ("status", "path", "gallery", "archive", "command", "python")

        def shown(**changes: Any) -> list[Any]:
            return [changes.get(name, gr.skip()) for name in outputs]

        try:
            work = partial(draw, limits=limits, settings=settings)
            for update in updates_of(context, request.session_hash, work):
                if not update.done or update.stopped:
                    yield shown(status=update.text, **({} if update.shown is None else {"path": update.shown}))
                    continue
                facts, drawn = models.facts(model), update.result
                yield shown(
                    status=summary(facts, drawn),
                    gallery=[(str(file), name or None) for file, name in zip(drawn.files, drawn.captions, strict=True)],
                    archive=str(drawn.archive),
                    **({} if drawn.picture is None else {"path": drawn.picture}),
                    command=as_command(facts, drawn.arguments),
                    python=as_python(facts, drawn.arguments),
                )
        except gr.Error as error:  # the line stays where the visitor looks, also when the message is closed
            yield shown(status=error.message)
            raise

    inputs = [model, classes, prompt, negative, count, seed, steps, sampler, guidance, low, high, condition, mask]
    event = gr.on(
        [start.click, prompt.submit],
        generate,
        inputs,
        [status, path, gallery, archive, command, python],
        api_name="generate",
        show_progress="minimal",
        show_progress_on=status,
        **QUEUE,
    )

    let_stop(context, stop, status, event)


def _classes(facts: Facts) -> dict[str, Any]:
    names = list(facts.class_names)
    chosen = names[:1] if not facts.reads_text else []
    return {"choices": names, "value": chosen, "visible": bool(names)}


def _prompt(facts: Facts) -> dict[str, Any]:
    return {"visible": facts.reads_text, "value": ""}


def _negative(facts: Facts) -> dict[str, Any]:
    return {"visible": facts.reads_text and facts.can_guide, "value": ""}


def _steps(facts: Facts) -> dict[str, Any]:
    return {"value": facts.steps}


def _sampler(facts: Facts) -> dict[str, Any]:
    return {"choices": [OWN_SAMPLER, *facts.samplers], "value": OWN_SAMPLER}


def _guided(facts: Facts) -> dict[str, Any]:
    return {"visible": facts.can_guide}


def _condition(facts: Facts) -> dict[str, Any]:
    return {"visible": bool(facts.condition), "value": None}


def _mask(facts: Facts) -> dict[str, Any]:
    return {"visible": facts.condition == "mask", "value": None}


def _pixels(facts: Facts) -> list[str]:
    return ["pixels"] if max(facts.image_shape[1:]) <= SMALL else []
