"""The tab Generate: images of classes and prompts, made by the function of `latentdiff generate`."""

from __future__ import annotations

import math
import shlex
import time
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gradio as gr

from latentdiff.errors import UserError
from latentdiff.web.commands import command_line, python_call
from latentdiff.web.parts import code_fields, facts_of_model, let_stop, updates_of
from latentdiff.web.preview import Trajectory
from latentdiff.web.uploads import read_upload, undecoded
from latentdiff.web.work import QUEUE, Job

if TYPE_CHECKING:
    from PIL import Image

    from latentdiff.web.context import Context
    from latentdiff.web.models import Facts

IMAGES = 16  # that the page asks for at first
OWN_SAMPLER = "default"
OUT = "images"  # the folder in the command that is shown
SMALL = 128  # pixels; smaller images are enlarged without blurring
BETWEEN = 1.5  # seconds between two updates of what is drawn
BATCH = 128  # of `latentdiff generate`; the metadata of an image name it


@dataclass(frozen=True)
class Settings:
    """What a visitor asks for. Nothing is checked yet: see `call`.

    Attributes:
        model: its name on the page.
        classes: names of classes.
        prompt: prompts, one a line.
        negative: a prompt to guide away from.
        num_images: images of each class or prompt.
        seed: of the images.
        steps, sampler, guidance: of `latentdiff generate`; None, or "" for the sampler, is the model's own.
        low, high: the times at which guidance is on; None is the model's own.
        condition, condition_mask: uploaded pictures, for a model that is given them.
    """

    model: str
    classes: list[str] = field(default_factory=list)
    prompt: str = ""
    negative: str = ""
    num_images: float | None = None
    seed: float | None = None
    steps: float | None = None
    sampler: str = ""
    guidance: float | None = None
    low: float | None = None
    high: float | None = None
    condition: Path | None = None
    condition_mask: Path | None = None


@dataclass(frozen=True)
class Drawn:
    """Finished images.

    Attributes:
        files: a PNG of each image, with its settings as metadata.
        captions: what each shows; "" where all show the same.
        archive: all of them in a zip file.
        picture: how they arose, with what was not in the updates; None where those had all of it.
        arguments: of `latentdiff.generate`, see `call`.
        cut: the ends of prompts that are longer than the text encoder reads.
        seconds: that it took.
    """

    files: list[Path]
    captions: list[str]
    archive: Path
    picture: Image.Image | None
    arguments: dict[str, Any]
    cut: list[str]
    seconds: float


def whole(value: Any, name: str) -> int:
    """A field's value as a whole number. UserError, naming the field, for anything else."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value) or value != int(value):
        raise UserError(f"{name}: give a whole number")
    return int(value)


def number(value: Any, name: str) -> float:
    """A field's value as a finite number. UserError, naming the field, for anything else."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise UserError(f"{name}: give a number")
    return float(value)


def call(context: Context, settings: Settings) -> dict[str, Any]:
    """The arguments of `latentdiff.generate` for a visitor's settings, without model and out.

    UserError for more than the server allows. What the model cannot do is refused by `latentdiff.generate` itself.
    """
    facts, limits = context.models.facts(settings.model), context.limits
    prompts = [line.strip() for line in str(settings.prompt or "").splitlines() if line.strip()]
    classes = [str(name) for name in settings.classes or []]
    if prompts and not facts.reads_text:
        raise UserError("prompt: this model reads none; choose classes")
    if classes and not facts.class_names:
        raise UserError("classes: this model has none; give a prompt" if facts.reads_text else "classes: this model has none")
    if prompts and len(classes) > 1:
        raise UserError("classes: choose one class for the prompts, or none")
    what: list[str] = prompts or classes
    num_images = whole(IMAGES if settings.num_images is None else settings.num_images, "number of images")
    limits.check_images(num_images * max(1, len(what)), facts.pixels)
    steps = whole(facts.steps if settings.steps is None else settings.steps, "steps")
    limits.check_steps(steps)
    arguments: dict[str, Any] = {"what": what, "num_images": num_images, "steps": steps}
    if settings.sampler and settings.sampler != OWN_SAMPLER:
        if settings.sampler not in facts.samplers:
            raise UserError(f"sampler {str(settings.sampler)[:40]}: valid: {', '.join(facts.samplers)}")
        arguments["sampler"] = settings.sampler
    if facts.can_guide:
        arguments["guidance"] = number(facts.guidance if settings.guidance is None else settings.guidance, "guidance")
        low, high = facts.interval
        low = low if settings.low is None else number(settings.low, "guidance from")
        high = high if settings.high is None else number(settings.high, "guidance to")
        if (low, high) != (0.0, 1.0) or facts.interval != (0.0, 1.0):
            arguments["guidance_interval"] = (low, high)
    if str(settings.negative or "").strip():
        arguments["negative"] = str(settings.negative).strip()
    if prompts and classes:
        arguments["label"] = classes[0]
    arguments["seed"] = whole(0 if settings.seed is None else settings.seed, "seed")
    for name in ("condition", "condition_mask"):
        if getattr(settings, name) is not None:
            read_upload(getattr(settings, name), limits, name.replace("_", " "))
            arguments[name] = getattr(settings, name)
    return arguments


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


def draw(context: Context, settings: Settings, folder: Path, job: Job) -> Drawn:
    """Make the images that a visitor asks for, by `latentdiff.generate`, into an empty folder.

    The job's updates show the step, and a picture of the x0 estimates so far.

    UserError for what the server does not allow or the model cannot do; `Cancelled` where the visitor has stopped it.
    """
    from latentdiff.generation import generate

    arguments, facts = call(context, settings), context.models.facts(settings.model)
    total = arguments["num_images"] * max(1, len(arguments["what"]))
    batches = -(-total // BATCH)
    began = time.monotonic()
    with context.models.use(settings.model, job) as pipeline:
        path = Trajectory(pipeline, arguments.get("guidance", 1.0))
        batch, is_new = 0, False
        start = shown = time.monotonic()

        def after_step(pipe: Any, step: int, _: Any, tensors: dict[str, Any]) -> None:
            nonlocal batch, shown, is_new
            batch += step == 0
            steps, count = pipe.num_timesteps, len(next(iter(tensors.values())))
            done = (batch - 1) * steps + step + 1
            is_new = (batch == 1 and path.add(step, steps, count)) or is_new
            # Updates take the server and the browser some time, so there is none shortly before the end
            now = time.monotonic()
            left = (now - start) * (batches * steps / done - 1)
            if min(now - shown, left) < BETWEEN:
                return job.check()
            shown = now
            job.step(done, batches * steps, path.picture() if is_new else None)
            is_new = False

        with path.watching():
            generate(
                context.models.folder(settings.model),
                **arguments,
                out=folder / OUT,
                batch_size=BATCH,
                device=context.models.device,
                progress=False,
                pipeline=pipeline,
                callback=after_step,
            )
        picture = path.picture() if is_new else None
        cut = pipeline.cut_off([*arguments["what"], arguments.get("negative")]) if facts.reads_text else []
    files = sorted((folder / OUT).glob("*.png"))
    archive = folder / f"{OUT}.zip"
    with zipfile.ZipFile(archive, "w") as pack:  # a PNG is compressed already
        for file in files:
            pack.write(file, f"{OUT}/{file.name}")
    # One class or prompt needs no caption under each image
    what = arguments["what"] if len(arguments["what"]) > 1 else [""]
    names = [name for name in what for _ in range(arguments["num_images"])]
    return Drawn(files, names, archive, picture, arguments, cut, time.monotonic() - began)


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
            model = gr.Dropdown(models.names, value=first.name, label="Model", filterable=False)
            about = gr.Markdown(describe(first))
            classes = gr.Dropdown(label="Classes", multiselect=True, allow_custom_value=True, **_classes(first))
            prompt = gr.Textbox(
                label="Prompt", placeholder="a red apple (one prompt a line)", lines=2, max_lines=6, **_prompt(first)
            )
            negative = gr.Textbox(label="Negative prompt", placeholder="what to guide away from", lines=1, **_negative(first))
            picture = {"type": "filepath", "sources": ["upload", "clipboard"], "height": 200}
            condition = undecoded(gr.Image(label="Picture", **picture, **_condition(first)))
            mask = undecoded(gr.Image(label="Mask, white to fill", **picture, **_mask(first)))
            with gr.Row():
                count = gr.Number(min(IMAGES, limits.images), label="Images of each", precision=0, minimum=1)
                seed = gr.Number(0, label="Seed", precision=0)
            with gr.Row():
                steps = gr.Number(label="Steps", precision=0, minimum=1, **_steps(first))
                sampler = gr.Dropdown(label="Sampler", allow_custom_value=True, **_sampler(first))
            with gr.Group(**_guided(first)) as guided:
                guidance = gr.Slider(0, 15, step=0.1, label="Guidance", info="1 is off", value=first.guidance)
                with gr.Row():
                    low = gr.Slider(0, 1, step=0.01, label="Guidance from", info="0 is data", value=first.interval[0])
                    high = gr.Slider(0, 1, step=0.01, label="Guidance to", info="1 is noise", value=first.interval[1])
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

        yield shown(status="Working …")
        try:
            for update in updates_of(context, request.session_hash, partial(draw, context, settings)):
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
