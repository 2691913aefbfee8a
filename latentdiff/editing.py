"""Images changed, completed, varied, restored, translated and interpolated by a checkpoint.

`edit` is the command. `variations` works on tensors. For restoring see `latentdiff.guidance.restoration`, for translating and
interpolating `latentdiff.translation`. torch, numpy and diffusers are imported within the functions that use them, so that
the command line starts quickly.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from latentdiff import generation
from latentdiff.errors import UserError
from latentdiff.generation import Subject
from latentdiff.utils import locks, processes, progress_bars, signals

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from latentdiff.pipelines.latent_diffusion import LatentDiffusionPipeline
    from latentdiff.utils.random import Generators

Task = Literal["img2img", "inpaint", "outpaint", "upscale", "deblur", "colorize", "translate", "variations", "interpolate"]
Method = Literal["known_pixels", "replacement", "posterior"]  # of inpaint
RESTORING = ("upscale", "deblur", "colorize")  # by posterior sampling, as inpaint is with --method posterior
BY_SAMPLER = ("translate", "variations", "interpolate")  # these run the model's ODE by Heun's method
TRANSLATION_STEPS = 50
# From what is named to something else by one model: tests/benchmarks/README.md, "Translation"
TRANSLATION_STRENGTH, TRANSLATION_GUIDANCE, TRANSLATION_INTERVAL = 0.8, 3.0, (0.0, 1.0)
OF_CODES = ("img2img", "inpaint")  # what a model over codes can do
# What a model does that was trained to be given a second image, by the kind of that image
TRAINED: dict[str, Task] = {"low_resolution": "upscale", "mask": "inpaint", "grey": "colorize", "pair": "translate"}
FRAMES = 8  # of an interpolation
VARIATION = 0.3  # strength of variations
ODE_STEPS = 30  # of Heun's method, in each direction
SHOWN = 64  # images of a folder in the grid beside it
FRAME_MS = 120  # of an animation
CELL = 96  # pixels of a grid's cells, about: smaller images are enlarged


@dataclass(frozen=True)
class Picture:
    """An image to edit.

    Attributes:
        name: of its file, relative to the folder that was given.
        pixels: uint8 [H, W, C], of the model's size and channels; to be upscaled, of its own size.
    """

    name: str
    pixels: np.ndarray

    @property
    def key(self) -> str:
        """Hex digest of the pixels: results depend on it, and not on the place of an image in a list."""
        return hashlib.sha256(str(self.pixels.shape).encode() + self.pixels.tobytes()).hexdigest()


@dataclass(frozen=True)
class Job:
    """What is done to every picture.

    Attributes:
        make: make(pictures [B], subjects [B], generators [B]) -> results, uint8 [B, H, W, C].
        condition: (caption, condition(picture) -> uint8 [H, W, C]) of what is shown beside the original, or None.
        shown: shown(picture) -> the original as it is shown, uint8 [H, W, C].
        depends_on: what the results depend on, {flag: JSON value}.
    """

    make: Callable[[list[Picture], list[Subject], list[Any]], np.ndarray]
    condition: tuple[str, Callable[[Picture], np.ndarray]] | None = None
    shown: Callable[[Picture], np.ndarray] = lambda picture: picture.pixels
    depends_on: dict[str, Any] = field(default_factory=dict)


def edit(
    model: str | Path,
    images: list[str | Path] | None = None,
    to: list[str | int] | None = None,
    task: Task | None = None,
    strength: float | None = None,
    mask: str | Path | None = None,
    mask_margin: int | None = None,
    expand: tuple[int, int, int, int] | None = None,
    source: str | int | None = None,
    into: str | Path | None = None,
    method: Method | None = None,
    blur: float | None = None,
    num_images: int | None = None,
    steps: int | None = None,
    sampler: str | None = None,
    guidance: float | None = None,
    guidance_interval: tuple[float, float] | None = None,
    guidance_rule: str | None = None,
    guidance_rescale: float | None = None,
    guidance_options: list[str] | None = None,
    weak: bool = False,
    negative: str | None = None,
    label: str | int | None = None,
    seed: int = 0,
    out: str | Path | None = None,
    batch_size: int = 64,
    precision: str = "float32",
    progress: bool = True,
    device: str = "auto",
    pipeline: LatentDiffusionPipeline | None = None,
) -> Path:
    """Change, complete, restore, translate, vary or interpolate images.

    The tasks:

    img2img (the default): noise is added to the image and taken away again, towards --to (SDEdit).

    inpaint (the default with --mask): the white part of the mask is drawn anew; every other pixel stays as it is.

    outpaint (the default with --expand): the image is continued beyond its edges.

    upscale, deblur, colorize: what a small, blurred or grey image may have been, by posterior sampling.

    translate: from --source to --to, by the noise that the ODE of the one encodes the image to (DDIB). With --into by two
    models. A model that is a bridge needs neither.

    variations: images near the one given, by the noise that the model's ODE encodes it to.

    interpolate: a path from each image to the next, or from --source to --to where no image is given.

    Images are brought to the model's size, as in its training. The same arguments give the same file. A folder of results
    that was stopped goes on when the call is made again.

    Args:
        model: a checkpoint folder, or the name of a shipped one.
        images: image files, or folders whose image files are all edited.
        to: what results are to show: class names or numbers, or prompts. Several give results for each.
        task: what is done, see above.
        strength: how much may change, from 0 to 1. The default is 0.8 for img2img, and for translate from --source by one
            model, 1 with a mask and for other translations, and 0.3 for variations.
        mask: an image, white where images are to be filled.
        mask_margin: latent cells around the mask that are drawn anew too; their known pixels still stay. The default is 2.
        expand: pixels of the model's size to add at the top, right, bottom and left.
        source: what the images show, for img2img, translate, variations and interpolate: a class or a prompt. img2img guides
            away from it, so that less strength is needed, and more of the image stays.
        into: a second model over the same autoencoder, which makes the results of translate.
        method: of inpaint: known_pixels, replacement, which costs no more than generating and leaves a seam, or posterior,
            which costs most. The default is known_pixels; with --strength or --mask-margin it is replacement.
        blur: standard deviation in pixels of the blur that deblur takes away. The default is 1.
        num_images: results of each image for each of `to`, or images of an interpolation. The default is 1, or 8.
        steps: steps of the sampler; the default is the checkpoint's, or that of the task.
        sampler: one of latentdiff's samplers instead of the checkpoint's scheduler; not for translate, variations and
            interpolate, which run the model's ODE by heun.
        guidance, guidance_interval, guidance_rule, guidance_rescale, guidance_options, weak, negative, label: as in `generate`.
        seed: every result depends on the seed, the image, what it is to show, and its number.
        out: .png (originals, conditions and results side by side), a folder (a PNG for each result, and the grid beside it), or
            for an interpolation .webp (animated). The default is edited.png, or the folder edited where a folder was given.
        batch_size: results made at a time.
        precision, progress, device, pipeline: as in `generate`.

    Returns:
        The path written.

    Raises:
        UserError: an image or mask that cannot be read, flags that do not go together, an unknown class or model, or a path
            that cannot be written.
    """
    # Refuse what can be refused before a model is loaded
    from latentdiff.utils.outputs import check_out

    files, is_folder = _files(images or [])
    asked_task = task
    task = task or ("outpaint" if expand else "inpaint" if mask else "img2img")
    for flag, value, valid in (("--task", task, get_args(Task)), ("--method", method, get_args(Method))):
        if value is not None and value not in valid:
            raise UserError(f"{flag} {value}: unknown; valid: {', '.join(valid)}")
    flags = (files, to, source, into, method, blur, mask, mask_margin, expand, strength, sampler)
    _check_flags(task, *flags)
    guiding = generation.guidance_call(guidance_rule, guidance_rescale, guidance_options or [])
    if min(batch_size, *(1 if number is None else number for number in (num_images, steps))) < 1:
        raise UserError("--num-images, --batch-size and --steps: must be at least 1")
    out = out if out is not None else "edited" if is_folder else "edited.png"
    kinds = (".png", ".webp") if task == "interpolate" else (".png",)
    path = check_out(out, 0, kinds)
    if task == "interpolate" and not path.suffix and locks.contents(path):
        raise UserError(f"--out {out}: the folder is not empty; an interpolation needs a new one")
    if is_folder and path.suffix:
        raise UserError(f"--out {out}: a folder of images gives a folder; name one")
    generation.check_sampler(sampler)
    generation.check_files({"--mask": mask})
    for flag, names in (("--to", to or []), ("--source", [] if source is None else [source])):
        generation.check_names(into if into is not None and flag == "--to" else model, names, flag)

    if processes.rank() > 0:  # one process does the work of all
        return path

    # Load the model and the images
    from latentdiff.checkpoints import is_over_codes, load, resolve_model
    from latentdiff.guidance.tasks import SETTINGS
    from latentdiff.pipelines.latent_diffusion import MAX_SAMPLE_SIZE

    folder = resolve_model(model)
    pipeline = load(folder) if pipeline is None else pipeline
    pipeline.set_progress_bar_config(disable=True)
    guiding = generation.other_than_default(pipeline, guiding)
    task_flag = "--expand" if expand and not asked_task else f"--task {task}"
    unread = {task_flag: task not in OF_CODES, f"--method {method}": method not in (None, "replacement"), "--weak": weak}
    generation.refuse_for_codes(pipeline, {**unread, **generation.rule_flags(guiding)})
    was_asked = bool(asked_task or mask or expand)
    task, is_trained = _task_of_model(pipeline, task, was_asked, mask)
    if not is_trained:
        _check_flags(task, *flags)  # again, because a bridge has chosen its task itself
    elif strength is not None and task != "inpaint":
        raise UserError(f"--strength: this model is given the whole picture for {task}; leave it out")
    elif method is not None:
        raise UserError(f"--method {method}: this model was trained to complete pictures; leave it out")
    flags_of_guidance = {
        "--guidance": guidance,
        "--guidance-interval": guidance_interval,
        **generation.rule_flags(guiding),
        "--weak": weak or None,
        "--negative": negative,
        "--label": label,
    }
    _check_guidance(task, is_trained, bool(files), flags_of_guidance)
    if task == "inpaint" and method is None:
        is_plain = is_trained or is_over_codes(pipeline.config)
        method = "replacement" if is_plain or strength is not None or mask_margin is not None else "known_pixels"
    restores = not is_trained and (task in RESTORING or (task == "inpaint" and method != "replacement"))
    scale = SETTINGS[task].guidance if restores and guidance is None else guidance
    generation.check_negative(pipeline, negative, scale)
    generation.place(pipeline, device, sampler or ("heun" if not is_trained and task in BY_SAMPLER or restores else None))
    generation.set_precision(pipeline, precision)
    rule = image_rule(folder, pipeline)
    pictures = [read_image(file, name, rule, own_size=task == "upscale") for file, name in files]

    if len({picture.pixels.shape for picture in pictures}) > 1:  # only where images keep their own size
        raise UserError("IMAGE: to be upscaled together, images must be of one size; give them one call each")

    # Check the call against the model
    rows: list[Subject] = generation.subjects(pipeline, list(to), flag="--to") if to else [None]
    shows = None if source is None else generation.subjects(pipeline, [source], flag="--source")[0]
    class_row = generation.class_of_prompts(pipeline, label, [*rows, shows])
    if class_row is not None and not any(isinstance(row, str) for row in [*rows, shows]):
        raise UserError(f"--label {label}: is the class of a prompt; give the prompt by --to or --source")
    if task == "translate" and not is_trained and not to and into is None and pipeline.config.get("bridge") is None:
        raise UserError("--to: missing; name what the images become, or give --into")
    away = shows if task == "img2img" else None
    if away is not None:
        if negative:
            raise UserError("--source: with img2img it is what to guide away from, as --negative is; give one of them")
        generation.check_negative(pipeline, str(source), scale, "--source")
        if weak:
            raise UserError("--weak: stands in for what to guide away from; leave --source out")
    targets = generation.guided_to(pipeline, rows, [class_row if isinstance(row, str) else None for row in rows])
    generation.check_rule(pipeline, guiding, weak, scale, bool(targets or negative) or away is not None or is_trained)
    call: dict[str, Any] = {
        "num_inference_steps": steps,
        "sampler": sampler,
        "guidance_scale": guidance,
        "guidance_interval": guidance_interval,
        "negative_prompt": away if isinstance(away, str) else negative,
        **guiding,
    }
    if away is not None and not isinstance(away, str):
        call["negative_class_labels"] = away
    of_model = {"--label": class_row, "--precision": precision, "device": pipeline.device.type, **call}
    call |= generation.weak_call(pipeline, folder, weak, negative)
    of_model |= {"--weak": True} if weak else {}
    if task == "interpolate":
        if pictures:
            stops = [shows, rows[0] if to else shows]
        else:
            stops = [*([] if source is None else [shows]), *rows]
        frames = FRAMES if num_images is None else num_images
        how = (steps, guidance, guidance_interval, seed, batch_size)
        return _interpolate(pipeline, folder, pictures, stops, class_row, frames, *how, path)

    # Say what is done to each picture
    change = partial(_change, pipeline, class_row, call)
    if is_trained and task != "inpaint":  # which the pipeline does by image and mask, as for any model
        job = _trained_job(change, task, pipeline.image_shape[1:])
    elif task == "variations":
        job = _variations_job(pipeline, folder, shows, rows, class_row, strength, steps)
    elif task == "translate":
        second = None if into is None else resolve_model(into)
        guided = {"guidance": guidance, "guidance_interval": guidance_interval}
        job = _translate_job(pipeline, folder, second, shows, strength, steps, guided, precision, path.suffix == "")
    elif restores:
        pixels = _read_mask(str(mask), rule) if task == "inpaint" else None
        job = _restore_job(pipeline, change, task, method, pixels, 1.0 if blur is None else blur, steps, sampler, guidance)
    elif task == "outpaint":
        top, right, bottom, left = expand or (0, 0, 0, 0)
        most, (height, width) = MAX_SAMPLE_SIZE * pipeline.vae_factor, pipeline.image_shape[1:]
        if max(height + top + bottom, width + left + right) > most:
            raise UserError(
                f"--expand {' '.join(map(str, expand or ()))}: the result may be at most {most} pixels high and wide"
            )
        job = _outpaint_job(change, (top, right, bottom, left), strength, mask_margin)
    elif task == "inpaint":
        job = _inpaint_job(change, _read_mask(str(mask), rule), strength, mask_margin)
    else:
        job = Job(partial(change, strength=strength))
    task_depends = {"--task": task, "--strength": strength, "--mask-margin": mask_margin, "--source": shows, **job.depends_on}

    # Make the results and write them
    depends_on = {
        "IMAGE": [picture.key for picture in pictures],
        "--to": rows,
        "--num-images": num_images or 1,
        "--seed": seed,
        "--batch-size": batch_size,
        "model": None if path.suffix else generation.fingerprint(folder, weak),
        **task_depends,
        **of_model,
    }
    row_names = _names_of(pipeline, rows, class_row)
    _write(path, job, pictures, rows, row_names, num_images or 1, seed, batch_size, depends_on, progress)
    return path


def variations(
    pipeline: LatentDiffusionPipeline,
    images: Tensor,
    strength: float = VARIATION,
    conditioning: dict[str, Tensor] | None = None,
    generator: Generators = None,
    steps: int = ODE_STEPS,
    use_mean: bool = False,
) -> Tensor:
    """Images near the given ones, [B, C, H, W] in [0, 1].

    The probability-flow ODE encodes each image to noise, which is turned by `samplers.slerp` towards newly drawn noise, and the
    ODE decodes that. Noise of both kinds is N(0, I), and so is what lies between. No guidance is used, because it has no useful
    inverse.

    Args:
        pipeline: a checkpoint.
        images: [B, C, H, W] in [0, 1], of the model's size.
        strength: from 0 (the image, encoded and decoded) to 1 (an image that has nothing to do with it).
        conditioning: keyword arguments of the U-Net that say what the images show, of B samples: `pipeline.conditioning`.
        generator: draws from the posterior, then the new noise: one, or a list of B.
        steps: of Heun's method in each direction.
        use_mean: encode the means of the posterior, for a denoiser that was trained on means.

    Raises:
        UserError: a strength outside of [0, 1], images of another size, or a bridge, which has no noise.
    """
    import torch

    from latentdiff.checkpoints import refuse_bridge
    from latentdiff.denoiser import Denoiser
    from latentdiff.samplers import encode, sample, slerp
    from latentdiff.translation import encode_images
    from latentdiff.utils.random import randn_like

    refuse_bridge(pipeline, "MODEL")

    if not 0 <= strength <= 1:
        raise UserError(f"strength {strength}: must be from 0 (the image stays) to 1 (nothing of it stays)")
    denoiser = Denoiser.from_pipeline(pipeline, **(conditioning or {}))
    with torch.no_grad():
        latents = encode_images(pipeline, images * 2 - 1, generator, use_mean)
        noise = encode(denoiser, latents, "heun", steps)
        noise = slerp(noise, randn_like(noise, generator), strength)
        return pipeline.decode_latents(sample(denoiser, noise, "heun", steps), "pt")


def frame_weights(frames: int) -> Tensor:
    """Weights of an interpolation, float64 [frames]: evenly from 0 to 1. UserError for fewer than 2."""
    import torch

    if frames < 2:
        raise UserError(f"an interpolation of {frames} images: needs at least 2, its ends")
    return torch.linspace(0, 1, frames, dtype=torch.float64)


def subject_conditioning(pipeline: LatentDiffusionPipeline, rows: list[Subject], label: int | None = None) -> dict[str, Tensor]:
    """The U-Net's keyword arguments that show subjects [B]: `pipeline.conditioning` of classes and prompts.

    rows: classes, prompts or None for nothing in particular. label: the class of every prompt. UserError where the model cannot
    show them, such as no class of a model that was trained without class dropout.
    """
    texts = [row if isinstance(row, str) else None for row in rows]
    labels = [label if isinstance(row, str) else row for row in rows]
    try:
        return pipeline.conditioning(*pipeline.match_inputs(texts, labels, None, None)[:2], pipeline.device)
    except ValueError as error:
        raise UserError(str(error)) from None


# Reading


def _files(images: Sequence[str | Path]) -> tuple[list[tuple[Path, str]], bool]:
    """([(file, its name in messages and results)], whether a folder was given). UserError for what is not there."""
    from latentdiff.data.folders import list_folder
    from latentdiff.data.image_source import Columns

    files: list[tuple[Path, str]] = []
    folders = [path for path in map(Path, images) if path.is_dir()]
    for path in map(Path, images):
        if path.is_dir():
            found = list_folder(path, Columns(), with_captions=False).files
            if not found:
                raise UserError(f"IMAGE {path}: the folder holds no images")
            files += [(path / name, name if len(folders) == 1 else f"{path.name}/{name}") for name in found]
        elif not path.is_file():
            raise UserError(f"IMAGE {path}: no such file or folder")
        else:
            files.append((path, path.name))
    return files, bool(folders)


def image_rule(folder: Path, pipeline: LatentDiffusionPipeline) -> Any:
    """How an image comes to the model's size: as in its training where that scaled images, else by cutting to the shape."""
    from latentdiff.checkpoints import META, read_meta
    from latentdiff.data.image_files import WHITE
    from latentdiff.data.transforms import SCALED, Preprocess

    config = read_meta(folder).get("config") if (folder / META).is_file() else None
    data = config.get("data", {}) if isinstance(config, dict) else {}
    framing = data.get("framing", data.get("fit"))
    channels, *size = pipeline.image_shape
    background = tuple(data.get("background", WHITE))
    return Preprocess(tuple(size), channels, framing if framing in SCALED else "crop", background=background)


def read_image(file: Path, name: str, rule: Any, own_size: bool = False, flag: str = "IMAGE") -> Picture:
    """An image file, brought to the model's channels, and to its size unless own_size.

    flag: what named the file. UserError, which names it too, where the file cannot be read.
    """
    from latentdiff.data.image_files import DECODING_ERRORS, decode, reason_of
    from latentdiff.utils.images import to_uint8

    try:
        pixels = decode(file, rule.channels, rule.background)
    except DECODING_ERRORS as error:
        raise UserError(f"{flag} {file}: cannot be read as an image ({reason_of(file, error)})") from None
    return Picture(name, pixels if own_size else to_uint8(rule(pixels)[None])[0])


def _read_mask(file: str, rule: Any) -> np.ndarray:
    """A mask, uint8 [H, W, 1], brought to the model's size as the images are. UserError for one that fills nothing."""
    from dataclasses import replace

    black = (0, 0, 0)
    pixels = read_image(Path(file), file, replace(rule, channels=1, background=black), flag="--mask").pixels
    if int(pixels.max()) < 128:
        raise UserError(f"--mask {file}: has no white, so nothing is filled; white is what is drawn anew, black stays")
    return pixels


def _check_flags(
    task: str,
    files: list[tuple[Path, str]],
    to: Sequence[str | int] | None,
    source: str | int | None,
    into: Any,
    method: Method | None,
    blur: float | None,
    mask: Any,
    mask_margin: int | None,
    expand: Any,
    strength: float | None,
    sampler: str | None,
) -> None:
    """UserError for flags that do not belong to a task, or are missing for it."""
    needed = {"inpaint": (mask, "--mask"), "outpaint": (expand, "--expand")}
    value, flag = needed.get(task, (True, ""))
    if value is None:
        raise UserError(f"{flag}: missing; --task {task} needs it")
    only_for = {
        "--mask": (mask, ("inpaint",)),
        "--mask-margin": (mask_margin, ("inpaint", "outpaint")),
        "--expand": (expand, ("outpaint",)),
        "--source": (source, ("img2img", *BY_SAMPLER)),
        "--into": (into, ("translate",)),
        f"--method {method}": (method, ("inpaint",)),
        "--blur": (blur, ("deblur",)),
        "--strength": (strength, ("img2img", "inpaint", "translate", "variations")),
        "--sampler": (sampler, ("img2img", "inpaint", "outpaint", *RESTORING)),
    }
    for flag, (value, tasks) in only_for.items():
        if value is not None and task not in tasks:
            raise UserError(f"{flag}: goes with --task {' or '.join(tasks)}, not {task}; leave it out")
    if strength is not None and not 0 <= strength <= 1:
        raise UserError(f"--strength {strength:g}: must be from 0 (the image stays) to 1 (nothing of it stays)")
    if sampler == "dopri5" and (task in RESTORING or method == "posterior"):
        raise UserError("--sampler dopri5: its adaptive steps do not end in posterior sampling; take another, such as heun")
    if method not in (None, "replacement") and (strength is not None or mask_margin is not None):
        raise UserError(f"--method {method}: takes neither --strength nor --mask-margin; leave them out")
    if blur is not None and not 0 < blur < float("inf"):
        raise UserError(f"--blur {blur:g}: must be a standard deviation in pixels, above 0")
    if mask_margin is not None and mask_margin < 0:
        raise UserError(f"--mask-margin {mask_margin}: must be a whole number of latent cells, at least 0")
    if expand is not None and (min(expand) < 0 or not any(expand)):
        raise UserError(f"--expand {' '.join(map(str, expand))}: must be four numbers of at least 0, and not all 0")
    if not files and task != "interpolate":
        raise UserError("IMAGE: missing; give image files or folders")
    if task == "interpolate":
        stops = (source is not None) + len(to or ())
        if len(files) == 1 or (not files and stops < 2):
            raise UserError("IMAGE: to interpolate, give two images or more, or none with --source and --to")
        if files and len(to or ()) > 1:
            raise UserError("--to: between images it is what the last one shows; give one")


def _check_guidance(
    task: str,
    is_trained: bool,
    has_images: bool,
    flags: dict[str, Any],
) -> None:
    """UserError for flags of guidance that a task does not read. flags: the value of each, None for one that is not given."""
    if is_trained or task not in BY_SAMPLER:
        return  # the pipeline reads them all
    read = {"--label"} if task != "translate" else set()
    if task != "variations" and not (task == "interpolate" and has_images):
        read |= {"--guidance", "--guidance-interval"}
    for flag, value in flags.items():
        if value is not None and flag not in read:
            of_images = " between images" if task == "interpolate" and has_images else ""
            raise UserError(f"{flag}: has no part in --task {task}{of_images}; leave it out")


def _task_of_model(pipeline: LatentDiffusionPipeline, task: Task, was_asked: bool, mask: Any) -> tuple[Task, bool]:
    """(the task, whether the model was trained for it by a second image).

    A model with a second image does one task, and a bridge translates. was_asked: the task follows from the flags. UserError
    where the model cannot do what was asked.
    """
    kind = (pipeline.config.get("image_condition") or {}).get("kind")
    own = TRAINED[kind] if kind is not None else "translate" if pipeline.config.get("bridge") is not None else None
    if own is None:
        return task, False
    if was_asked and task != own:
        given = f"is given a picture ({kind})" if kind is not None else "is a bridge"
        raise UserError(f"--task {task}: this model {given}, so all it does is {own}; leave --task out")
    if own == "inpaint" and mask is None:
        raise UserError("--mask: missing; this model completes pictures, so give what to fill")
    return own, kind is not None


def _names_of(pipeline: LatentDiffusionPipeline, rows: list[Subject], label: int | None) -> list[str]:
    """What each of `rows` is in words: the class, the prompt, or ""."""
    from latentdiff.utils.outputs import Names

    classes = [*(pipeline.class_names or map(str, range(pipeline.num_classes))), "no class"]
    labels = [label if isinstance(row, str) else row for row in rows]
    return Names(classes, rows, labels, 1).words


# The tasks


def _change(
    pipeline: LatentDiffusionPipeline,
    label: int | None,
    call: dict[str, Any],
    pictures: list[Picture],
    rows: list[Subject],
    generators: list[Any],
    finish: Callable[[Tensor], Tensor] = lambda images: images,
    **arguments: Any,
) -> np.ndarray:
    """The pipeline's results for pictures [B] as uint8 [B, H, W, C].

    finish: a function of the results [B, C, H, W] in [0, 1] that gives others. arguments: of the pipeline's call, such as
    mask_image; they come before those of `call`.
    """
    import numpy as np

    image = np.stack([picture.pixels for picture in pictures])
    asked: dict[str, Any] = {"class_labels": [label if isinstance(row, str) else row for row in rows]}
    if any(isinstance(row, str) for row in rows):
        asked["prompt"] = [row if isinstance(row, str) else None for row in rows]
    try:
        output = pipeline(**{"image": image, **call, **asked, **arguments}, generator=generators, output_type="pt").images
    except UserError:
        raise
    except ValueError as error:
        raise UserError(str(error)) from None
    return _as_pixels(finish(output))


def _inpaint_job(change: Callable[..., np.ndarray], mask: np.ndarray, strength: float | None, margin: int | None) -> Job:
    """The white of a mask [H, W, 1] drawn anew."""
    digest = hashlib.sha256(mask.tobytes()).hexdigest()
    make = partial(change, mask_image=mask[None], strength=strength, mask_margin=margin)
    return Job(make, ("to be filled", partial(_masked, mask=mask)), depends_on={"--mask": digest})


def _masked(picture: Picture, mask: np.ndarray) -> np.ndarray:
    """A picture as uint8 [H, W, C] whose masked part is mid-grey."""
    import numpy as np

    return np.where(mask >= 128, np.uint8(128), picture.pixels)


def _outpaint_job(
    change: Callable[..., np.ndarray], expand: tuple[int, int, int, int], strength: float | None, margin: int | None
) -> Job:
    """Pictures on a larger canvas, whose border is drawn."""
    import numpy as np

    top, right, bottom, left = expand

    def on_canvas(picture: Picture) -> np.ndarray:
        border = ((top, bottom), (left, right), (0, 0))
        return np.pad(picture.pixels, border, constant_values=128)

    def make(pictures: list[Picture], rows: list[Subject], generators: list[Any]) -> np.ndarray:
        mask = np.full((*on_canvas(pictures[0]).shape[:2], 1), 255, np.uint8)
        height, width = pictures[0].pixels.shape[:2]
        mask[top : top + height, left : left + width] = 0
        larger = [Picture(picture.name, on_canvas(picture)) for picture in pictures]
        arguments = {"mask_image": mask[None], "mask_margin": margin, "height": mask.shape[0], "width": mask.shape[1]}
        return change(larger, rows, generators, strength=strength, **arguments)

    return Job(make, shown=on_canvas, depends_on={"--expand": list(expand)})


def _restore_job(
    pipeline: LatentDiffusionPipeline,
    change: Callable[..., np.ndarray],
    task: str,
    method: Method | None,
    mask: np.ndarray | None,
    blur: float,
    steps: int | None,
    sampler: str | None,
    guidance: float | None,
) -> Job:
    """Pictures that were observed through a mask, a lower resolution, a blur or without colour: draws of what they were."""
    import torch

    from latentdiff.guidance import restoration
    from latentdiff.models.codec import LatentCodec

    codec, (_, *size) = LatentCodec(pipeline.vae), pipeline.image_shape
    hidden = None if mask is None else torch.from_numpy(mask).permute(2, 0, 1)[None].float() / 255
    given = {"steps": steps, "sampler": sampler, "guidance": guidance}
    settings: dict[str, Any] = {key: value for key, value in given.items() if value is not None}
    if method == "known_pixels":
        settings |= {"method": method, "encode": lambda images: codec.latents(images, use_mean=True)}
    if sampler is not None:
        settings["sampler_options"] = ()  # those of the default are of another sampler

    def make(pictures: list[Picture], rows: list[Subject], generators: list[Any]) -> np.ndarray:
        observed = _tensor(pictures) * 2 - 1
        restored = restoration(task, observed.to(pipeline.device), codec.decode, size, hidden, blur, **settings)
        return change(pictures, rows, generators, image=None, finish=restored.finish, **restored.call)

    shown = partial(_enlarged, size=size)
    condition: tuple[str, Callable[[Picture], np.ndarray]] | None = ("grey", _grey) if task == "colorize" else None
    digest = None
    if mask is not None:
        condition, digest = ("to be filled", partial(_masked, mask=mask)), hashlib.sha256(mask.tobytes()).hexdigest()
    return Job(make, condition, shown, {"--mask": digest, "--blur": blur, "--method": method or "posterior"})


def _trained_job(change: Callable[..., np.ndarray], task: str, size: Sequence[int]) -> Job:
    """Pictures given to a model that was trained for the task: small, grey, or paired with the result."""
    import numpy as np

    def make(pictures: list[Picture], rows: list[Subject], generators: list[Any]) -> np.ndarray:
        given = np.stack([picture.pixels for picture in pictures])
        return change(pictures, rows, generators, image=None, condition_image=given)

    condition = ("grey", _grey) if task == "colorize" else None
    return Job(make, condition, partial(_enlarged, size=size), {"trained": task})


def _enlarged(picture: Picture, size: Sequence[int]) -> np.ndarray:
    """A picture with its pixels repeated up to `size` (H, W)."""
    height, width = picture.pixels.shape[:2]
    return picture.pixels.repeat(size[0] // height, 0).repeat(size[1] // width, 1)


def _grey(picture: Picture) -> np.ndarray:
    """A picture without its colours, uint8 [H, W, 3]."""
    import numpy as np
    from PIL import Image

    return np.asarray(Image.fromarray(picture.pixels).convert("L").convert("RGB"))


def _translate_job(
    pipeline: LatentDiffusionPipeline,
    folder: Path,
    second: Path | None,
    source: Subject,
    strength: float | None,
    steps: int | None,
    guided: dict[str, Any],
    precision: str,
    in_folder: bool,
) -> Job:
    """Pictures taken from what they show to something else.

    second: the folder of the model that makes the results. guided: keyword arguments of guidance, of `translate_images`.
    """
    from latentdiff.checkpoints import load
    from latentdiff.translation import check_models, translate_images

    into = None if second is None else load(second)
    if into is not None:
        into.set_progress_bar_config(disable=True)
        generation.place(into, str(pipeline.device))
        generation.set_precision(into, precision)
    amount = 1.0 if strength is None else strength
    if source is not None and into is None:
        amount = TRANSLATION_STRENGTH if strength is None else strength
        defaults = {"guidance": TRANSLATION_GUIDANCE, "guidance_interval": TRANSLATION_INTERVAL}
        guided = {key: defaults[key] if value is None else value for key, value in guided.items()}
    check_models(pipeline, into, amount, [source])
    if amount == 0:
        raise UserError("--strength 0: nothing is translated; give a number above 0")
    use_mean = _trained_on_means(folder)

    def make(pictures: list[Picture], rows: list[Subject], generators: list[Any]) -> np.ndarray:
        images = (_tensor(pictures) * 2 - 1).to(pipeline.device)
        how = {"strength": amount, "generator": generators, "use_mean": use_mean, **guided}
        made = translate_images(pipeline, images, [source], rows, into, steps or TRANSLATION_STEPS, **how)
        return _as_pixels((made + 1) / 2)

    known = generation.fingerprint(second) if second is not None and in_folder else None
    return Job(make, depends_on={"--into": known})


def _variations_job(
    pipeline: LatentDiffusionPipeline,
    folder: Path,
    source: Subject,
    rows: list[Subject],
    label: int | None,
    strength: float | None,
    steps: int | None,
) -> Job:
    """Images near each picture; they show what it shows."""
    if any(row is not None for row in rows):
        raise UserError("--to: variations show what the image shows, which is --source; leave --to out")
    use_mean = _trained_on_means(folder)

    def make(pictures: list[Picture], rows: list[Subject], generators: list[Any]) -> np.ndarray:
        shown = subject_conditioning(pipeline, [source] * len(pictures), label)
        amount = VARIATION if strength is None else strength
        made = variations(pipeline, _tensor(pictures), amount, shown, generators, steps or ODE_STEPS, use_mean)
        return _as_pixels(made)

    return Job(make)


def _trained_on_means(folder: Path) -> bool:
    """Whether a checkpoint's denoiser was trained on posterior means instead of draws (cache.use_mean)."""
    from latentdiff.checkpoints import META, read_meta

    config = read_meta(folder).get("config") if (folder / META).is_file() else None
    return bool((config or {}).get("cache", {}).get("use_mean", False))


def _tensor(pictures: list[Picture]) -> Tensor:
    """float32 [B, C, H, W] in [0, 1]."""
    import numpy as np
    import torch

    return torch.from_numpy(np.stack([picture.pixels for picture in pictures])).permute(0, 3, 1, 2).float() / 255


def _as_pixels(images: Tensor) -> np.ndarray:
    """uint8 [B, H, W, C] of images [B, C, H, W] in [0, 1]."""
    from latentdiff.utils.images import to_uint8

    return to_uint8(images * 2 - 1)


# Interpolation


def _interpolate(
    pipeline: LatentDiffusionPipeline,
    folder: Path,
    pictures: list[Picture],
    stops: list[Subject],
    label: int | None,
    frames: int,
    steps: int | None,
    guidance: float | None,
    guidance_interval: tuple[float, float] | None,
    seed: int,
    batch_size: int,
    path: Path,
) -> Path:
    """Write the way from each picture to the next, or from each of `stops` to the next, as a strip or an animation."""
    frame_weights(frames)
    if pictures:
        parts = list(zip(pictures, pictures[1:], strict=False))
        shown = [stops[0], stops[-1]]
        use_mean = _trained_on_means(folder)
        make = partial(_between_pictures, pipeline, label, shown, frames, steps or ODE_STEPS, seed, batch_size, use_mean)
        ways = [make(first, last) for first, last in parts]
        names = [f"{first.name} - {last.name}" for first, last in parts]
        ends: list[tuple[np.ndarray, np.ndarray] | None] = [(first.pixels, last.pixels) for first, last in parts]
    else:
        pairs = list(zip(stops, stops[1:], strict=False))
        how = (frames, steps, guidance, guidance_interval, seed, batch_size)
        ways = [_between_subjects(pipeline, label, pair, *how) for pair in pairs]
        words = _names_of(pipeline, stops, label)
        names = [f"{first} - {last}" for first, last in zip(words, words[1:], strict=False)]
        ends = [None] * len(pairs)
    with locks.locked(path, "wait for it, or name another --out", beside=bool(path.suffix), alone=True):
        _save_ways(path, ways, names, ends)
    return path


def _between_pictures(
    pipeline: LatentDiffusionPipeline,
    label: int | None,
    shown: list[Subject],
    frames: int,
    steps: int,
    seed: int,
    batch_size: int,
    use_mean: bool,
    first: Picture,
    last: Picture,
) -> np.ndarray:
    """uint8 [frames, H, W, C] from one picture to another."""
    from latentdiff.translation import interpolate_images
    from latentdiff.utils.images import to_uint8
    from latentdiff.utils.random import derive_seed, generators

    draws = [generators(derive_seed(seed, "posterior", picture.key), [0]) for picture in (first, last)]
    made = interpolate_images(
        pipeline,
        _tensor([first]) * 2 - 1,
        _tensor([last]) * 2 - 1,
        frame_weights(frames).tolist(),
        shown[:1],
        steps,
        generator=draws[0],
        use_mean=use_mean,
        what_of_b=shown[1:],
        generator_of_b=draws[1],
        label=label,
        batch_size=batch_size,
    )
    return to_uint8(made[:, 0])


def _between_subjects(
    pipeline: LatentDiffusionPipeline,
    label: int | None,
    ends: tuple[Subject, Subject],
    frames: int,
    steps: int | None,
    guidance: float | None,
    guidance_interval: tuple[float, float] | None,
    seed: int,
    batch_size: int,
) -> np.ndarray:
    """uint8 [frames, H, W, C] of one noise, from what shows one subject to what shows another, with guidance."""
    import numpy as np
    import torch

    from latentdiff.samplers import sample
    from latentdiff.translation import Between, conditional_denoiser
    from latentdiff.utils.random import generators, randn

    noise = randn((1, *pipeline.latent_shape), generators(seed, [0])).to(pipeline.device)
    made = []
    for weights in frame_weights(frames).split(batch_size):
        count = len(weights)
        first, last = (conditional_denoiser(pipeline, [row], count, guidance, guidance_interval, label) for row in ends)
        with torch.no_grad():
            z = sample(Between(first, last, weights), noise.expand(count, -1, -1, -1), "heun", steps or ODE_STEPS)
            made.append(_as_pixels(pipeline.decode_latents(z, "pt")))
    return np.concatenate(made)


def _save_ways(path: Path, ways: list[np.ndarray], names: list[str], ends: list[tuple[np.ndarray, np.ndarray] | None]) -> None:
    """Write interpolations as a .png strip, an animated .webp that goes there and back, or a folder of their images."""
    from PIL import Image

    from latentdiff.utils import atomic
    from latentdiff.utils.images import captioned_grid, save_png

    if path.suffix == ".webp":
        frames = [Image.fromarray(_colour(image)) for way in ways for image in way]
        back = frames[-2:0:-1]
        with atomic.new_file(path) as temporary:
            frames[0].save(
                temporary,
                format="WEBP",
                save_all=True,
                append_images=frames[1:] + back,
                duration=FRAME_MS,
                loop=0,
                lossless=True,
            )
        return
    if path.suffix == ".png":
        grid, captions = [], []
        for way, pair in zip(ways, ends, strict=True):
            texts = [f"{weight:.2f}" for weight in frame_weights(len(way)).tolist()]
            grid.append(list(way) if pair is None else [pair[0], *way, pair[1]])
            captions.append(texts if pair is None else ["first", *texts, "last"])
        save_png(captioned_grid(grid, captions, names, _scale(ways[0].shape[1])), path)
        return
    path.mkdir(parents=True, exist_ok=True)
    for part, way in enumerate(ways):
        for k, image in enumerate(way):
            save_png(Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image), path / f"{part:03d}-{k:03d}.png")


def _colour(image: np.ndarray) -> np.ndarray:
    """uint8 [H, W, 3] of [H, W, 1] or [H, W, 3]."""
    import numpy as np

    return np.repeat(image, 3, axis=-1) if image.shape[-1] == 1 else image


def _scale(height: int) -> int:
    """How many pixels of a grid are as high as one of an image."""
    return max(1, round(CELL / height))


# Writing


def _write(
    path: Path,
    job: Job,
    pictures: list[Picture],
    rows: list[Subject],
    names: list[str],
    num_images: int,
    seed: int,
    batch_size: int,
    depends_on: dict[str, Any],
    progress: bool,
) -> None:
    """Make all results and write them: a grid, or a folder with a PNG for each and a grid beside it."""
    from latentdiff.utils.outputs import GRID_IMAGES, ImageFolder, check_out

    of_picture = len(rows) * num_images
    total = len(pictures) * of_picture
    beside = path if path.suffix else path.with_suffix(".png")
    columns = of_picture + 2
    shown = len(pictures) if path.suffix else max(1, min(len(pictures), SHOWN, GRID_IMAGES // columns))
    check_out(beside, shown * columns, (".png",))
    folder = None if path.suffix else ImageFolder(path, depends_on)
    file_names = _result_names(pictures, names, num_images)
    results: list[np.ndarray] = []
    with (
        signals.watched(signals.again) as watch,
        locks.locked(path, "wait for it, or name another --out", beside=bool(path.suffix), alone=True),
        progress_bars.bar(total=total, unit="image", disable=not progress, delay=0.5) as bar,
    ):
        if folder is not None:
            folder.start()
        with watch.deferred():
            for start in range(0, total, batch_size):
                numbers = range(start, min(start + batch_size, total))
                in_grid = start < shown * of_picture
                if in_grid or folder is None or not all(folder.has(number, file_names[number]) for number in numbers):
                    made = _make_batch(job, pictures, rows, num_images, seed, numbers)
                    results += list(made) if in_grid else []
                    for number, image in zip(numbers, made, strict=True):
                        if folder is not None:
                            folder.write(number, file_names[number], image)
                bar.update(len(numbers))
                if watch:
                    watch.stop()
        cells = [results[k * of_picture : (k + 1) * of_picture] for k in range(shown)]
        _save_grid(beside, job, pictures[:shown], cells, names, num_images)


def _make_batch(
    job: Job, pictures: list[Picture], rows: list[Subject], num_images: int, seed: int, numbers: range
) -> np.ndarray:
    """The results of some numbers, uint8 [B, H, W, C]. They are ordered by picture, then by row, then by number."""
    import torch

    from latentdiff.utils.random import derive_seed

    chosen, subjects, generators = [], [], []
    for number in numbers:
        place, k = divmod(number, num_images)
        picture, row = pictures[place // len(rows)], rows[place % len(rows)]
        key = -1 if row is None else row
        chosen.append(picture)
        subjects.append(row)
        generators.append(torch.Generator().manual_seed(derive_seed(seed, picture.key, key, k)))
    return job.make(chosen, subjects, generators)


def _result_names(pictures: list[Picture], names: list[str], num_images: int) -> list[str]:
    """What each result is, in words, for the names of files."""
    endings = [f" {name}".rstrip() + (f" {k + 1}" if num_images > 1 else "") for name in names for k in range(num_images)]
    return [str(Path(picture.name).with_suffix("")) + ending for picture in pictures for ending in endings]


def _save_grid(
    path: Path, job: Job, pictures: list[Picture], results: list[list[np.ndarray]], names: list[str], num_images: int
) -> None:
    """Write a PNG with a row for each picture: the original, the condition if there is one, and the results."""
    from latentdiff.utils.images import captioned_grid, save_png

    captions = [name or "result" for name in names for _ in range(num_images)]
    grid, texts = [], []
    for picture, cells in zip(pictures, results, strict=True):
        row, captions_of_row = [job.shown(picture)], ["original"]
        if job.condition is not None:
            caption, condition = job.condition
            row.append(condition(picture))
            captions_of_row.append(caption)
        grid.append([*row, *cells])
        texts.append([*captions_of_row, *captions])
    save_png(captioned_grid(grid, texts, [picture.name for picture in pictures], _scale(grid[0][0].shape[0])), path)
