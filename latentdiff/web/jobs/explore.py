"""What lies between two things, what guidance does, how noise becomes an image, and which training images are nearest.

`between`, `sweep`, `path_of` and `nearest_images` do the work. `interpolate`, `guide`, `follow` and `find` are the requests.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from latentdiff.editing import edit, image_rule, read_image
from latentdiff.errors import UserError
from latentdiff.web.commands import command_line, python_call
from latentdiff.web.jobs.draw import number, whole
from latentdiff.web.jobs.edit import typed
from latentdiff.web.jobs.uploads import Upload, read_upload

if TYPE_CHECKING:
    from torch import Tensor

    from latentdiff.data.datasets import ImageDataset
    from latentdiff.evaluation.gallery import GallerySampler
    from latentdiff.generation import Subject
    from latentdiff.pipelines.latent_diffusion import LatentDiffusionPipeline
    from latentdiff.web.facts import Facts
    from latentdiff.web.jobs.job import Job
    from latentdiff.web.jobs.models import Models
    from latentdiff.web.limits import Limits

NEAREST = 8  # training images that are shown
WAY, SWEEP, PATH = "way.webp", "guidance.png", "trajectory.png"  # names of files
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
        "from latentdiff.generation import place",
        "",
        f"pipeline = load(resolve_model({shown!r}))",
        'place(pipeline, "auto")',
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

    train = training_images(pipeline, model, data)
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


def training_images(pipeline: LatentDiffusionPipeline, model: Path, data: str) -> ImageDataset:
    """The images that a model was trained on. Arguments and errors as of `nearest_images`."""
    from latentdiff.evaluation.reference_data import data_rule, reference_sets
    from latentdiff.models.codec import LatentCodec

    return reference_sets(data, *data_rule(model, LatentCodec(pipeline.vae)))[0]


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


# Requests


@dataclass(frozen=True)
class Asked:
    """What a visitor asks for, in all parts of the tab. Nothing is checked yet.

    Attributes:
        model: its name on the page.
        of_class, prompt: what is drawn: the prompt where the model reads one.
        seed, steps, sampler: of the images.
    """

    model: str
    of_class: Any
    prompt: Any
    seed: Any
    steps: Any
    sampler: Any = ""

    def subject(self, facts: Facts) -> str:
        """The class or prompt; "" for nothing in particular."""
        return _named(facts, self.of_class, self.prompt)

    def number_of_steps(self, limits: Limits) -> int:
        """UserError for none, or more than are allowed."""
        value = whole(self.steps, "steps")
        limits.check_steps(value)
        return value


def _named(facts: Facts, of_class: Any, prompt: Any) -> str:
    return str((prompt if facts.reads_text else of_class) or "")


def interpolate(
    models: Models,
    job: Job,
    limits: Limits,
    asked: Asked,
    to_class: Any,
    to_prompt: Any,
    pictures: Sequence[Upload | None],
    frames: Any,
    folder: Path,
) -> Explored:
    """Go from one class, prompt or picture to another: see `between`."""
    facts = models.facts(asked.model)
    ends = asked.subject(facts), _named(facts, to_class, to_prompt)
    files = [picture for picture in pictures if isinstance(picture, Path)]
    for file in files:
        read_upload(file, limits)
    number_of = whole(frames, "images of the way")
    limits.check_images(number_of, facts.pixels)
    settings = (whole(asked.seed, "seed"), asked.number_of_steps(limits), None, folder, models.device)
    with models.use(asked.model, job) as pipeline:
        return between(pipeline, models.folder(asked.model), facts.shown, ends, files, number_of, *settings)


def guide(models: Models, job: Job, limits: Limits, asked: Asked, scales: str, count: Any, folder: Path) -> Explored:
    """Draw a class or prompt at several scales of guidance: see `sweep`."""
    facts, values = models.facts(asked.model), scales_of(scales)
    number_of = whole(count, "images of each scale")
    limits.check_images(number_of * len(values), facts.pixels)
    settings = (number_of, whole(asked.seed, "seed"), asked.number_of_steps(limits), str(asked.sampler or SAMPLER), folder)
    with models.use(asked.model, job) as pipeline:
        return sweep(pipeline, facts.shown, asked.subject(facts), values, *settings)


def follow(models: Models, job: Job, limits: Limits, asked: Asked, guidance: str, folder: Path) -> Explored:
    """Show the estimate of the final image after each step: see `path_of`."""
    facts = models.facts(asked.model)
    steps = asked.number_of_steps(limits)
    limits.check_images(1, facts.pixels * steps)
    scale = typed(guidance, "guidance") if guidance else None
    settings = (whole(asked.seed, "seed"), steps, str(asked.sampler or SAMPLER), scale, folder)
    with models.use(asked.model, job) as pipeline:
        return path_of(pipeline, facts.shown, asked.subject(facts), *settings)


def find(
    models: Models, job: Job, limits: Limits, asked: Asked, data: str | None, picture: Upload | None, folder: Path
) -> Explored:
    """Find the training images that are nearest to a picture, or to an image of a class or prompt: see `nearest_images`."""
    if data is None:
        raise UserError("the server was given no data set; `latentdiff serve --data` names one")
    facts = models.facts(asked.model)
    if picture is not None:
        read_upload(picture, limits)
    file = picture if isinstance(picture, Path) else None
    settings = (whole(asked.seed, "seed"), asked.number_of_steps(limits), str(asked.sampler or SAMPLER), job.step)
    with models.use(asked.model, job) as pipeline:
        return nearest_images(pipeline, models.folder(asked.model), data, file, asked.subject(facts), *settings)


def check_data(models: Models, job: Job, data: str) -> None:
    """A request: UserError, naming the flag, where the data set is not one that the first model can have been trained on."""
    for name in models.names[:1]:
        with models.use(name, job) as pipeline:
            try:
                training_images(pipeline, models.folder(name), data)
            except UserError as error:
                raise UserError(f"--data {data}: {error}") from None
