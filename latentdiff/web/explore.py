"""The tab Explore: what lies between two things, what guidance does, how noise becomes an image,
and which training images are nearest.

`between`, `sweep`, `path_of` and `nearest_images` are plain functions. `build` lays the tab out.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gradio as gr
import numpy as np
from PIL import Image

from latentdiff.editing import FRAMES, edit, image_rule, read_image
from latentdiff.errors import UserError
from latentdiff.evaluation.gallery import SCALES
from latentdiff.web.commands import command_line, python_call
from latentdiff.web.edit import SHOWN, class_choices, enlarged, typed
from latentdiff.web.generate import number, whole
from latentdiff.web.parts import code_fields, facts_of_model, let_stop, updates_of
from latentdiff.web.uploads import Upload, read_upload, undecoded
from latentdiff.web.work import QUEUE

if TYPE_CHECKING:
    from torch import Tensor

    from latentdiff.data.datasets import ImageDataset
    from latentdiff.evaluation.gallery import GallerySampler
    from latentdiff.generation import Subject
    from latentdiff.pipelines.latent_diffusion import LatentDiffusionPipeline
    from latentdiff.web.context import Context
    from latentdiff.web.models import Facts
    from latentdiff.web.work import Job

NEAREST = 8  # training images that are shown
WAY, SWEEP, PATH = "way.webp", "guidance.png", "trajectory.png"  # names of files
STEPS = 30  # of a trajectory and of guidance at several scales, as the page asks for them at first
SAMPLER = "dpmpp_2m"
MOST_SCALES = 12


@dataclass(frozen=True)
class Explored:
    """What was drawn.

    Attributes:
        images: uint8 [H, W, C] each.
        captions: of each image.
        file: that was written; None for none.
        command: the command that writes the same file; "" where there is none.
        code: Python that writes the same file; "" where there is none.
    """

    images: list[np.ndarray]
    captions: list[str]
    file: Path | None = None
    command: str = ""
    code: str = ""


# Interpolation


def between(
    pipeline: LatentDiffusionPipeline,
    model: Path,
    shown: str,
    ends: tuple[str, str],
    pictures: Sequence[Path],
    frames: int,
    seed: int,
    steps: int | None,
    guidance: float | None,
    folder: Path,
    device: str = "auto",
) -> Explored:
    """The way from one class, prompt or picture to another, by `latentdiff.edit` with task interpolate.

    Args:
        pipeline: the model, loaded.
        model: its folder.
        shown: how the command names it.
        ends: the classes or prompts of both ends; "" is nothing in particular.
        pictures: none, or the files of both ends, which `ends` then describe.
        frames: images of the way.
        seed, steps, guidance: of `edit`. Between pictures there is no guidance.
        folder: an empty folder, where the file is written.
        device: as of `edit`.

    Raises:
        UserError: as `edit` does, with names of files in place of paths.
    """
    names = [path.name for path in pictures]
    if len(pictures) == 1:
        raise UserError("picture: between pictures there are two; upload the other one, or none")
    if len(set(names)) < len(names):
        names[1] = f"2-{names[1]}"
    files = []
    for path, name in zip(pictures, names, strict=True):
        files.append(folder / name)
        shutil.copyfile(path, files[-1])
    call: dict[str, Any] = {"model": shown, "images": names or None, "task": "interpolate"}
    call |= {"source": ends[0] or None, "to": [ends[1]] if ends[1] else None}
    call |= {"num_images": frames, "seed": seed, "steps": steps, "guidance": None if pictures else guidance, "out": WAY}
    call = {name: value for name, value in call.items() if value is not None}
    places = {"model": model, "images": files or None, "out": folder / WAY}
    try:
        edit(**{**call, **places}, pipeline=pipeline, device=device, progress=False)
    except UserError as error:
        raise UserError(str(error).replace(f"{folder}/", "")) from None
    flags = {name: value for name, value in call.items() if name != "images"}
    captions = [f"{weight:.2f}" for weight in np.linspace(0, 1, frames)]
    line = command_line("edit", names, flags)
    return Explored(_frames(folder / WAY, frames), captions, folder / WAY, line, python_call("edit", call))


def _frames(file: Path, count: int) -> list[np.ndarray]:
    """The first frames of an animation that was written here, uint8 [H, W, 3] each. The others lead back."""
    frames = []
    with Image.open(file) as animation:
        for k in range(count):
            animation.seek(k)
            frames.append(np.asarray(animation.convert("RGB")))
    return frames


# Guidance at several scales, and the trajectory


def sweep(
    pipeline: LatentDiffusionPipeline,
    shown: str,
    what: str,
    scales: Sequence[float],
    count: int,
    seed: int,
    steps: int,
    sampler: str,
    folder: Path,
) -> Explored:
    """Images of one class or prompt with guidance at several scales. Each row of the file has the same noise.

    Args:
        pipeline: the model, loaded.
        shown: how the Python code names it.
        what: a class or a prompt.
        scales: of classifier-free guidance; 1 is off.
        count: images of each scale.
        seed, steps, sampler: of `latentdiff.evaluation.gallery.GallerySampler`.
        folder: where the file is written.

    Raises:
        UserError: a model that guidance cannot change, an unknown class, or a scale below 0.
    """
    import torch

    if min(scales) < 0:
        raise UserError(f"scales: {min(scales):g}: must be at least 0; 1 is off")
    images, code = _sampler(pipeline, shown, what, count, seed, steps, sampler)
    if not images.has_guidance:
        raise UserError("guidance: changes nothing here; name a class or a prompt, of a model that was trained for guidance")
    with torch.no_grad():
        columns = [images.draw(images.guided(scale)) for scale in scales]
    images.save(columns, folder / SWEEP)
    code += [f"    columns = [images.draw(images.guided(scale)) for scale in {list(scales)}]"]
    code += [f'images.save(columns, Path("{SWEEP}"))']
    cells = [image for row in zip(*map(_as_arrays, columns), strict=True) for image in row]
    return Explored(cells, [f"{scale:g}" for scale in scales] * count, folder / SWEEP, code="\n".join(code))


def path_of(
    pipeline: LatentDiffusionPipeline,
    shown: str,
    what: str,
    seed: int,
    steps: int,
    sampler: str,
    guidance: float | None,
    folder: Path,
) -> Explored:
    """The x0 estimate after each step, from noise to an image of a class or prompt. Arguments as in `sweep`.

    guidance: its scale; None: the model's default.
    """
    import torch

    from latentdiff.evaluation.gallery import trajectory

    images, code = _sampler(pipeline, shown, what, 1, seed, steps, sampler)
    with torch.no_grad():
        columns = trajectory(images, steps, guidance)
    images.save(columns, folder / PATH)
    code[3] += ", trajectory"
    code += [f"    columns = trajectory(images, {steps}, {guidance})", f'images.save(columns, Path("{PATH}"))']
    captions = [f"step {k + 1}" for k in range(len(columns))]
    return Explored([_as_arrays(column)[0] for column in columns], captions, folder / PATH, code="\n".join(code))


def _sampler(
    pipeline: LatentDiffusionPipeline, shown: str, what: str, count: int, seed: int, steps: int, sampler: str
) -> tuple[GallerySampler, list[str]]:
    """(what draws `count` images of a class or prompt, the lines of Python that make the same)."""
    from latentdiff.checkpoints import refuse_bridge
    from latentdiff.evaluation.gallery import GallerySampler
    from latentdiff.generation import check_sampler, refuse_second_image

    check_sampler(sampler)
    refuse_second_image(pipeline, "this part of the page")
    refuse_bridge(pipeline, "MODEL")
    row = subject_of(pipeline, what)
    lines = [
        "from pathlib import Path",
        "import torch",
        "from latentdiff.checkpoints import load, resolve_model",
        "from latentdiff.evaluation.gallery import GallerySampler",
        "",
        f"pipeline = load(resolve_model({shown!r}))",
        f"images = GallerySampler(pipeline, {seed}, {steps}, {sampler!r}, [{row!r}] * {count})",
        "with torch.no_grad():",
    ]
    return GallerySampler(pipeline, seed, steps, sampler, [row] * count), lines


def subject_of(pipeline: LatentDiffusionPipeline, what: str) -> Subject:
    """A class or prompt as `latentdiff.generation.subjects` gives it; None, nothing in particular, for ""."""
    from latentdiff.generation import subjects

    return subjects(pipeline, [what])[0] if what else None


def _as_arrays(images: Tensor) -> list[np.ndarray]:
    """uint8 [H, W, C] each, of images [K, C, H, W] in about [-1, 1]."""
    from latentdiff.utils.images import to_uint8

    return list(to_uint8(images.clamp(-1, 1)))


def scales_of(text: str) -> list[float]:
    """The scales of guidance in a text. UserError where they are not numbers, or too many."""
    words = str(text or "").replace(",", " ").split()
    try:
        scales = [number(float(word), "scales") for word in words]
    except ValueError:
        scales = []
    if not 1 <= len(scales) <= MOST_SCALES:
        raise UserError(f"scales: give numbers, such as 1 2 4, and at most {MOST_SCALES}")
    return scales


# The nearest training images


def nearest_images(
    pipeline: LatentDiffusionPipeline,
    model: Path,
    data: str,
    picture: Path | None,
    what: str,
    seed: int,
    steps: int,
    sampler: str,
    step: Callable[[int, int], None],
) -> Explored:
    """An image and the training images that are nearest to it, with their classes and distances.

    Args:
        pipeline: the model, loaded.
        model: its folder.
        data: its data set.
        picture: a file; None draws one image of `what`, as `path_of` does.
        what, seed, steps, sampler: as of `path_of`.
        step: step(done, total) is called while the training images are gone through.

    Raises:
        UserError: a model that was not trained here, other data, or a picture that cannot be read.
    """
    import torch

    from latentdiff.evaluation.reference_data import data_rule, reference_sets
    from latentdiff.models.codec import LatentCodec

    train, _ = reference_sets(data, *data_rule(model, LatentCodec(pipeline.vae)))
    if picture is None:
        images, _ = _sampler(pipeline, "", what, 1, seed, steps, sampler)
        config = pipeline.config
        with torch.no_grad():
            guided = images.guided(config.default_guidance_scale, interval=config.default_guidance_interval)
            query = _as_arrays(images.draw(guided))[0]
    else:
        query = read_image(picture, picture.name, image_rule(model, pipeline)).pixels
    found = nearest(train.preprocess(query), train, NEAREST, step)
    images, labels = train.batch([k for _, k in found])
    height, width = query.shape[:2]
    top, left = (images.shape[2] - height) // 2, (images.shape[3] - width) // 2  # without the border of training
    shown = _as_arrays(images[..., top : top + height, left : left + width])
    classes = [""] * len(found) if labels is None else [f"{train.class_names[label]}, " for label in labels.tolist()]
    captions = [f"{name}{distance:.3f}" for name, (distance, _) in zip(classes, found, strict=True)]
    return Explored([query, *shown], ["the image", *captions])


def nearest(image: Tensor, train: ImageDataset, count: int, step: Callable[[int, int], None]) -> list[tuple[float, int]]:
    """The training images that are nearest to an image: [(distance, index in `train`)], the nearest first.

    The distance is the root mean square difference of pixels whose range is 1, as in
    `latentdiff.evaluation.memorization.nearest_by_pixels`, which finds one alone. Large images are averaged over squares first.

    Args:
        image: [C, H, W] in [-1, 1], as `train` gives its own.
        train: the training images.
        count: how many; all of them where there are fewer.
        step: step(done, total) is called while the images are gone through.
    """
    import torch

    from latentdiff.evaluation.memorization import compared, pixel_rows

    query = compared(image[None])  # [1, P]
    distances: list[Tensor] = []
    done = 0
    for rows in pixel_rows(train):
        distances.append((rows - query).square().mean(dim=1).sqrt() / 2)  # from [-1, 1] to a range of 1
        done += len(rows)
        step(done, len(train))
    values, places = torch.cat(distances).topk(min(count, done), largest=False)
    return list(zip(values.tolist(), places.tolist(), strict=True))


# The tab


def build(context: Context) -> None:
    """Fill the tab."""
    models, limits = context.models, context.limits
    if not models.names:
        gr.Markdown("There is no model to explore. Give one: `latentdiff serve MODEL`.")
        return
    # What is asked for, and what is shown
    facts = models.facts(models.names[0])
    upload: dict[str, Any] = {"type": "filepath", "sources": ["upload", "clipboard"], "height": 200}
    with gr.Row():
        model = gr.Dropdown(models.names, value=facts.name, label="Model", filterable=False, visible=len(models.names) > 1)
        one_class = gr.Dropdown(label="Class", **_class_field(facts))
        one_prompt = gr.Textbox(label="Prompt", **_prompt_field(facts))
        seed = gr.Number(0, label="Seed", precision=0)
        steps = gr.Number(min(STEPS, limits.steps), label="Steps", precision=0, minimum=1)
        sampler = gr.Dropdown(label="Sampler", **_sampler_field(facts))
    with gr.Accordion("From one to another", open=True):
        with gr.Row():
            other_class = gr.Dropdown(label="To the class", **_class_field(facts, 1))
            other_prompt = gr.Textbox(label="To the prompt", **_prompt_field(facts))
            frames = gr.Number(min(FRAMES, limits.images), label="Images of the way", precision=0, minimum=2)
        with gr.Accordion("Between two pictures", open=False):
            gr.Markdown("What they show is the class or prompt of each end. Leave it out if you do not know it.")
            with gr.Row():
                first = undecoded(gr.Image(label="First picture", **upload))
                last = undecoded(gr.Image(label="Last picture", **upload))
        way = Results("interpolate", "Go from one to another", "Place on the way")
    with gr.Accordion("What guidance does", open=False):
        with gr.Row():
            scales = gr.Textbox(" ".join(f"{scale:g}" for scale in SCALES), label="Scales of guidance", info="1 is off")
            count = gr.Number(min(3, limits.images), label="Images of each scale", precision=0, minimum=1)
        swept = Results("guidance", "Draw at each scale")
    with gr.Accordion("From noise to an image", open=False):
        guidance = gr.Textbox(label="Guidance", placeholder="the model's default", max_lines=1)
        path = Results("trajectory", "Draw step by step", "Step")
    with gr.Accordion("Nearest training images", open=False, visible=context.data is not None):
        gr.Markdown(
            "Of an uploaded picture, or else of an image of the class or prompt above. Distances are root mean square "
            "differences of pixels from 0 to 1."
        )
        picture = undecoded(gr.Image(label="Picture", **upload))
        near = Results("nearest", "Find the nearest")

    # Another model has other fields
    def choose(name: str) -> list[Any]:
        """The fields for another model."""
        facts = facts_of_model(context, name)
        classes = [gr.update(**_class_field(facts, number)) for number in (0, 1)]
        prompt = gr.update(**_prompt_field(facts))
        return [classes[0], prompt, gr.update(**_sampler_field(facts)), classes[1], prompt]

    fields = [one_class, one_prompt, sampler, other_class, other_prompt]
    model.change(choose, model, fields, api_visibility="private", **QUEUE)

    # The requests of the four parts
    def named(facts: Facts, of_class: Any, prompt: Any) -> str:
        """What a visitor names: a prompt or a class."""
        return str((prompt if facts.reads_text else of_class) or "")

    def run(results: Results, visitor: str | None, work: Callable[[Path, Job], Explored]) -> Iterator[Any]:
        """Run a request, and show its results."""
        yield {results.status: "Working …"}
        for update in updates_of(context, visitor, work):
            yield {results.status: update.text} if update.result is None else results.shown(update.result)

    def interpolate(
        model: str,
        from_class: str,
        from_prompt: str,
        to_class: str,
        to_prompt: str,
        first: Upload | None,
        last: Upload | None,
        frames: float,
        seed: float,
        steps: float,
        request: gr.Request,
    ) -> Iterator[Any]:
        """Go from one class, prompt or picture to another."""

        def work(folder: Path, job: Job) -> Explored:
            facts = models.facts(model)
            ends = named(facts, from_class, from_prompt), named(facts, to_class, to_prompt)
            pictures = [picture for picture in (first, last) if isinstance(picture, Path)]
            for picture in pictures:
                read_upload(picture, limits)
            number_of = whole(frames, "images of the way")
            limits.check_images(number_of, facts.pixels)
            settings = (whole(seed, "seed"), _checked_steps(context, steps), None, folder, models.device)
            with models.use(model, job) as pipeline:
                return between(pipeline, models.folder(model), facts.shown, ends, pictures, number_of, *settings)

        yield from run(way, request.session_hash, work)

    def guide(
        model: str,
        of_class: str,
        prompt: str,
        scales: str,
        count: float,
        seed: float,
        steps: float,
        sampler: str,
        request: gr.Request,
    ) -> Iterator[Any]:
        """Draw a class or prompt at several scales of guidance."""

        def work(folder: Path, job: Job) -> Explored:
            facts, values = models.facts(model), scales_of(scales)
            number_of = whole(count, "images of each scale")
            limits.check_images(number_of * len(values), facts.pixels)
            settings = (number_of, whole(seed, "seed"), _checked_steps(context, steps), str(sampler or SAMPLER), folder)
            with models.use(model, job) as pipeline:
                return sweep(pipeline, facts.shown, named(facts, of_class, prompt), values, *settings)

        yield from run(swept, request.session_hash, work)

    def follow(
        model: str,
        of_class: str,
        prompt: str,
        guidance: str,
        seed: float,
        steps: float,
        sampler: str,
        request: gr.Request,
    ) -> Iterator[Any]:
        """Show the estimate of the final image after each step, from noise to an image."""

        def work(folder: Path, job: Job) -> Explored:
            facts = models.facts(model)
            number_of = _checked_steps(context, steps)
            limits.check_images(1, facts.pixels * number_of)
            scale = typed(guidance, "guidance") if guidance else None
            settings = (whole(seed, "seed"), number_of, str(sampler or SAMPLER), scale, folder)
            with models.use(model, job) as pipeline:
                return path_of(pipeline, facts.shown, named(facts, of_class, prompt), *settings)

        yield from run(path, request.session_hash, work)

    def find(
        model: str,
        of_class: str,
        prompt: str,
        picture: Upload | None,
        seed: float,
        steps: float,
        sampler: str,
        request: gr.Request,
    ) -> Iterator[Any]:
        """Find the training images that are nearest to a picture, or to an image of a class or prompt."""

        def work(folder: Path, job: Job) -> Explored:
            if context.data is None:
                raise UserError("the server was given no data set; `latentdiff serve --data` names one")
            facts = models.facts(model)
            if picture is not None:
                read_upload(picture, limits)
            file = picture if isinstance(picture, Path) else None
            settings = (whole(seed, "seed"), _checked_steps(context, steps), str(sampler or SAMPLER), job.step)
            with models.use(model, job) as pipeline:
                what = named(facts, of_class, prompt)
                return nearest_images(pipeline, models.folder(model), context.data, file, what, *settings)

        yield from run(near, request.session_hash, work)

    # The buttons
    named_by = [one_class, one_prompt]
    drawn_by = [seed, steps, sampler]
    ends = [*named_by, other_class, other_prompt, first, last]
    way.wire(context, interpolate, [model, *ends, frames, seed, steps])
    swept.wire(context, guide, [model, *named_by, scales, count, *drawn_by])
    path.wire(context, follow, [model, *named_by, guidance, *drawn_by])
    near.wire(context, find, [model, *named_by, picture, *drawn_by])


class Results:
    """The buttons of a part of the tab, and what it shows.

    Args:
        name: of the request, in the API and in the page's elements.
        button: what the button says.
        scrubber: the label of a slider that chooses one of the images; "" for none.
    """

    def __init__(self, name: str, button: str, scrubber: str = ""):
        self.name = name
        with gr.Row():
            self.start = gr.Button(button, variant="primary")
            self.stop = gr.Button("Stop")
        self.status = gr.Markdown(elem_id=f"explore-{name}")
        self.scrubber = gr.Slider(1, 2, 1, step=1, label=scrubber, visible=False) if scrubber else None
        self.gallery = gr.Gallery(
            label="Images",
            format="png",
            columns=4,
            height=SHOWN if scrubber else "auto",
            object_fit="contain",
            interactive=False,
            visible=False,
            preview=bool(scrubber),
            elem_classes=["whole", "rows"],
            show_label=False,
            buttons=["download", "fullscreen"],
        )
        self.file = gr.File(label="File", interactive=False, visible=False, elem_id=f"explore-{name}-file")
        self.command, self.code = code_fields("file", visible=False)

    @property
    def components(self) -> list[Any]:
        """What a request changes."""
        scrubber = [] if self.scrubber is None else [self.scrubber]
        return [self.status, *scrubber, self.gallery, self.file, self.command, self.code]

    def wire(self, context: Context, function: Callable[..., Iterator[Any]], inputs: list[Any]) -> None:
        """Run function(*inputs, request) where the button is pressed, and stop it at the other one."""
        shown = {"show_progress": "minimal", "show_progress_on": self.status}
        event = self.start.click(function, inputs, self.components, api_name=self.name, **shown, **QUEUE)
        let_stop(context, self.stop, self.status, event)
        if self.scrubber is not None:
            self.scrubber.input(
                lambda place: gr.update(selected_index=int(place) - 1),
                self.scrubber,
                self.gallery,
                queue=False,
                show_progress="hidden",
                api_visibility="private",
            )

    def shown(self, result: Explored) -> dict[Any, Any]:
        """The values of the components for a result."""
        images = [(enlarged(image), caption) for image, caption in zip(result.images, result.captions, strict=True)]
        last = len(images)
        updates = {
            self.status: "Done.",
            self.gallery: gr.update(value=images, visible=True, columns=min(8, len(dict.fromkeys(result.captions)) or 1)),
            self.file: gr.update(value=None if result.file is None else str(result.file), visible=result.file is not None),
            self.command: gr.update(value=result.command, visible=bool(result.command)),
            self.code: gr.update(value=result.code, visible=bool(result.code)),
        }
        if self.scrubber is not None:
            updates[self.gallery] = gr.update(value=images, visible=True, selected_index=last - 1)
            updates[self.scrubber] = gr.update(maximum=max(2, last), value=last, visible=last > 1)
        return updates


def _checked_steps(context: Context, steps: Any) -> int:
    """The steps of a form. UserError for none, or more than are allowed."""
    value = whole(steps, "steps")
    context.limits.check_steps(value)
    return value


def _class_field(facts: Facts, number: int = 0) -> dict[str, Any]:
    chosen = facts.class_names[number : number + 1]
    is_asked = bool(facts.class_names) and not facts.reads_text
    return class_choices(facts) | {"value": chosen[0] if chosen else "", "visible": is_asked}


def _prompt_field(facts: Facts) -> dict[str, Any]:
    return {"visible": facts.reads_text}


def _sampler_field(facts: Facts) -> dict[str, Any]:
    from latentdiff import samplers

    names = samplers.names()
    return {"choices": names, "value": SAMPLER, "visible": not facts.over_codes}
