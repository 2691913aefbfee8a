"""Images of classes and prompts, made by the function of `latentdiff generate`."""

from __future__ import annotations

import math
import time
import zipfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from latentdiff.errors import UserError
from latentdiff.web.jobs.trajectory import Trajectory
from latentdiff.web.jobs.uploads import read_upload

if TYPE_CHECKING:
    from PIL import Image

    from latentdiff.web.facts import Facts
    from latentdiff.web.jobs.job import Job
    from latentdiff.web.jobs.models import Models
    from latentdiff.web.limits import Limits

IMAGES = 16  # where a visitor gives no number
OWN_SAMPLER = "default"
OUT = "images"  # the folder in the command that is shown
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


def call(facts: Facts, limits: Limits, settings: Settings) -> dict[str, Any]:
    """The arguments of `latentdiff.generate` for a visitor's settings, without model and out. facts: of the model.

    UserError for more than the server allows. What the model cannot do is refused by `latentdiff.generate` itself.
    """
    prompts = [line.strip() for line in str(settings.prompt or "").splitlines() if line.strip()]
    if not isinstance(settings.classes, list | None):
        raise UserError("classes: give a list of names")
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


def draw(models: Models, job: Job, limits: Limits, settings: Settings, folder: Path) -> Drawn:
    """A request: make the images that a visitor asks for, by `latentdiff.generate`, into an empty folder.

    The job's updates show the step, and a picture of the x0 estimates so far.

    UserError for what the server does not allow or the model cannot do; `Cancelled` where the visitor has stopped it.
    """
    from latentdiff.generation import generate

    facts = models.facts(settings.model)
    arguments = call(facts, limits, settings)
    total = arguments["num_images"] * max(1, len(arguments["what"]))
    batches = -(-total // BATCH)
    began = time.monotonic()
    with models.use(settings.model, job) as pipeline:
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
                models.folder(settings.model),
                **arguments,
                out=folder / OUT,
                batch_size=BATCH,
                device=models.device,
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
