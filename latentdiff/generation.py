"""Images from a checkpoint in bulk: one seed per image, bounded memory, written as a grid, a folder or an npz."""

from __future__ import annotations

import contextlib
import os
import re
import sys
import textwrap
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import yaml

from latentdiff.errors import UserError
from latentdiff.plain import read_yaml
from latentdiff.rng import derive_seed

if TYPE_CHECKING:
    from latentdiff.pipelines.latent_diffusion import LatentDiffusionPipeline

Subject = int | str | None  # what an image is to show: a class's embedding row, a prompt, or nothing in particular
# guide(subjects of a batch) -> guidance(denoiser) -> denoiser
Guide = Callable[[list[Subject]], Callable[[Any], Any]]

GRID_COLUMNS = 16
GRID_IMAGES = 1024  # a PNG grid of more is not for people
NAME_LENGTH = 120  # bytes of a prompt in a file's name
ROW_NAME = 60  # characters of a prompt beside its row of a grid


def subjects(pipeline: LatentDiffusionPipeline, what: list[str | int], all_classes: bool = False) -> list[Subject]:
    """What WHAT asks for: prompts of a model that reads text (but for its class names), else embedding rows of classes.

    [None] for an unconditional model. UserError listing the classes, or saying that a prompt is needed.
    """
    if all_classes and what:
        raise UserError(f"--all-classes: stands for every class, so leave out {what[0]!r}")
    if all_classes and not pipeline.num_classes:
        raise UserError("--all-classes: this model is not told classes" + _what_it_takes(pipeline))
    if all_classes:
        return list(range(pipeline.num_classes))
    if not what:
        if pipeline.num_classes or pipeline.text_encoder is not None:
            raise UserError("WHAT: name what to draw" + _what_it_takes(pipeline))
        return [None]
    try:
        texted = pipeline.text_encoder is not None
        if texted:
            pipeline._texts([label for label in what if isinstance(label, str)] or None, "prompt")  # not UTF-8 is refused
        return [label if texted and label not in pipeline.class_names else pipeline.class_index(label) for label in what]
    except ValueError as error:
        raise UserError(f"WHAT: {error}") from None


def class_beside(pipeline: LatentDiffusionPipeline, label: str | int | None, rows: list[Subject]) -> int | None:
    """The embedding row of the class that --label puts beside every prompt of `rows`, if any. UserError where it cannot."""
    if label is None:
        return None
    if not pipeline.num_classes:
        raise UserError(f"--label {label}: this model has no classes; leave it out")
    if pipeline.text_encoder is None:
        raise UserError(f"--label {label}: goes with prompts, and this model reads none; name classes as WHAT")
    if any(isinstance(row, int) for row in rows):
        raise UserError(f"--label {label}: WHAT names classes already; give prompts, or leave --label out")
    try:
        return pipeline.class_index(label)
    except ValueError as error:
        raise UserError(f"--label: {error}") from None


def every_class(pipeline: LatentDiffusionPipeline) -> list[Subject]:
    """What class-balanced samples are of: each class, or [None] of an unconditional model. UserError for text alone."""
    if pipeline.text_encoder is not None and not pipeline.num_classes:
        raise UserError("MODEL: it is told what to draw by text and has no classes; measure it with latentdiff judge")
    return list(range(pipeline.num_classes)) or [None]


def _what_it_takes(pipeline: LatentDiffusionPipeline) -> str:
    prompts = "" if pipeline.text_encoder is None else ', as prompts such as "a red apple"'
    classes = f"; {pipeline._listed_classes()}, or give --all-classes" if pipeline.num_classes else ""
    return prompts + classes or "; it is unconditional"


def image_generators(seed: int, subject: Subject, start: int, count: int) -> list[torch.Generator]:
    """Generators of images start ... start + count - 1 of a subject: functions of (seed, subject, number) alone."""
    label = -1 if subject is None else subject
    return [torch.Generator().manual_seed(derive_seed(seed, label, start + k)) for k in range(count)]


# What samplers.sample takes besides the sampler's own options, and a call has other ways to give
COMMON = ("denoiser", "noise_or_shape", "sampler", "steps", "generator", "callback", "device")
PRECISIONS = ("float32", "bfloat16")


def set_precision(pipeline: LatentDiffusionPipeline, precision: str) -> None:
    """Run a loaded pipeline's U-Net in this precision; the sampler's own arithmetic and the decoder stay as they are.

    bfloat16 is autocast over float32 weights: faster where the processor multiplies in it, and images then depend a
    little on the batch they are made in. UserError for another name.
    """
    if precision not in PRECISIONS:
        raise UserError(f"--precision {precision}: unknown; valid: {', '.join(PRECISIONS)}")
    if precision == "bfloat16":
        pipeline.unet.forward = torch.autocast(pipeline.device.type, torch.bfloat16)(pipeline.unet.forward)


def parse_options(items: list[str]) -> dict[str, Any]:
    """{key: value} of key=value items, the values as YAML: numbers, words, [lists].  UserError for anything else."""
    options = {}
    for item in items:
        key, eq, text = item.partition("=")
        try:
            value = read_yaml(text)
        except yaml.YAMLError:
            eq = ""
        if not key.isidentifier() or not eq:
            raise UserError(f"--sampler-options {item!r}: write each as key=value, for example eta=0.5")
        if key in COMMON:
            raise UserError(f"--sampler-options {item!r}: the sampler has no option {key!r}; give it by its own flag, if any")
        if isinstance(value, str):
            with contextlib.suppress(ValueError):
                value = float(value)  # YAML takes 1e-3 for a word
        options[key] = value
    return options


def classifier_guide(pipeline: LatentDiffusionPipeline, folder: Path, strength: float) -> Guide:
    """The guide of `generate_batches` towards each image's class, by the classifier in `folder`/classifier.

    UserError where there is none, or where it is not one of this model's latents, classes and noise levels.
    """
    from latentdiff.denoiser import Denoiser
    from latentdiff.guidance import Classifier, check_same_path, load_classifier

    if not (folder / "classifier").is_dir():
        raise UserError(f"--classifier-strength: {folder} has no classifier; train one and put it into {folder / 'classifier'}")
    classifier = load_classifier(folder / "classifier", pipeline.device)
    theirs = classifier.config["channels"], classifier.config["classes"]
    ours = pipeline.latent_shape[0], pipeline.num_classes
    if theirs != ours:
        raise UserError(f"{folder / 'classifier'}: takes (channels, classes) {theirs}, and this model has {ours}")
    check_same_path(Denoiser.from_pipeline(pipeline).schedule, classifier.schedule, "the classifier")

    def guide(rows: list[Subject]) -> Callable[[Any], Any]:
        wanted = [row for row in rows if isinstance(row, int)]
        if len(wanted) != len(rows):
            raise UserError("--classifier-strength: every image needs a class to be guided to")
        log_prob = partial(classifier, labels=torch.tensor(wanted, device=pipeline.device))
        return lambda denoiser: Classifier(denoiser, log_prob, strength)

    return guide


@torch.no_grad()
def generate_batches(
    pipeline: LatentDiffusionPipeline,
    rows: list[Subject],
    num_images: int,
    seed: int = 0,
    batch_size: int = 128,
    guide: Guide | None = None,
    label: int | None = None,
    **call: Any,
) -> Iterator[tuple[np.ndarray, list[Subject]]]:
    """Yield (uint8 [B, H, W, C], rows [B]): `num_images` for each row, in order; `call` goes to the pipeline.

    rows: classes, prompts or None, as `subjects` gives them.  guide: guide(classes [B]) is the pipeline's guidance for a
    batch.  label: the class of every prompt. An image depends on the checkpoint, the call, the seed, its subject and its
    number within that, not on batch_size. UserError for what the pipeline refuses.
    """
    null, away = pipeline.config.null_class, (call.get("negative_prompt") or "").strip()
    # Of what names nothing, guidance changes nothing: only a call of nothing else is the pipeline's to refuse
    named = {row for row in rows if label is not None or (row.strip() if isinstance(row, str) else row not in (None, null))}
    wanted = [(row, k) for row in rows for k in range(num_images)]
    for start in range(0, len(wanted), batch_size):
        part = wanted[start : start + batch_size]
        generators = [image_generators(seed, row, k, 1)[0] for row, k in part]
        labels = [row for row, _ in part]
        told = {**call, "class_labels": [label if isinstance(row, str) else row for row in labels]}
        if any(isinstance(row, str) for row in labels):
            told["prompt"] = [row if isinstance(row, str) else None for row in labels]
        if guide is not None:
            told["guidance"] = guide(told["class_labels"])
        if named and not away and named.isdisjoint(labels):
            told["guidance_scale"] = 1.0
        try:
            out = pipeline(**told, generator=generators, output_type="np").images  # [B, H, W, C]
        except UserError:
            raise
        except ValueError as error:
            raise UserError(str(error)) from None
        yield np.round(out * 255).astype(np.uint8), labels


def check_out(out: str | Path, total: int) -> Path:
    """The output path if it can be written: .png, .npz or a folder. UserError otherwise, before any work is done."""
    path = Path(out)
    if not str(out) or (not path.suffix and path.name.startswith(".")):
        raise UserError(f"--out {str(out)!r}: give a file that ends in .png or .npz, or a folder's name")
    if not path.suffix and path.is_dir() and any(path.iterdir()):
        raise UserError(f"--out {out}: the folder is not empty; name a new one, so that old images do not stand among the new")
    if path.suffix not in (".png", ".npz", ""):
        raise UserError(f"--out {out}: must end in .png (a grid) or .npz, or name a folder")
    if path.suffix and path.is_dir() or not path.suffix and path.is_file():
        raise UserError(f"--out {out}: is {'a folder' if path.is_dir() else 'a file'} already")
    if not path.suffix:
        check_out_folder(path)
    if path.suffix and not path.absolute().parent.is_dir():
        raise UserError(f"--out {out}: the folder {path.parent} does not exist")
    if path.suffix and not os.access(path.absolute().parent, os.W_OK):
        raise UserError(f"--out {out}: the folder {path.parent} cannot be written to")
    if path.suffix == ".png" and total > GRID_IMAGES:
        raise UserError(f"--out {out}: {total} images are too many for one grid ({GRID_IMAGES}); use .npz or a folder")
    return path


def check_out_folder(out: str | Path) -> Path:
    """The folder of that name if files can be written there, now or once it is made. UserError otherwise."""
    path = Path(out)
    if not str(out):
        raise UserError("--out '': give a folder's name")
    if (path.exists() or path.is_symlink()) and not path.is_dir():
        raise UserError(f"--out {out}: is a file; name a folder")
    above = next(parent for parent in (path.absolute(), *path.absolute().parents) if parent.exists())
    if not above.is_dir():
        raise UserError(f"--out {out}: cannot be made, for {above} is a file")
    if not os.access(above, os.W_OK):
        raise UserError(f"--out {out}: the folder {above} cannot be written to")
    return path


def generate(
    model: str | Path,
    what: list[str | int] | None = None,
    num_images: int = 8,
    steps: int | None = None,
    sampler: str | None = None,
    guidance: float | None = None,
    guidance_interval: tuple[float, float] | None = None,
    classifier_strength: float = 0.0,
    sampler_options: list[str] | None = None,
    precision: str = "float32",
    negative: str | None = None,
    label: str | int | None = None,
    seed: int = 0,
    out: str | Path = "samples.png",
    all_classes: bool = False,
    batch_size: int = 128,
    progress: bool = True,
) -> Path:
    """Generate `num_images` of each class or prompt in `what` and write them; returns the path written.

    negative: a prompt to guide away from, for a model that reads text.  label: the class of every prompt, for a model
    told both.
    out: .png, a labelled grid; .npz, arr_0 uint8 [N, H, W, 3] and arr_1 int64 [N]; else a folder with a PNG an image.
    classifier_strength: of classifier guidance, on top of classifier-free, by the classifier in the model's folder; 0 is
    off.  sampler_options: key=value, the sampler's own keywords.  Both need a sampler.
    The same arguments give the same file. UserError for an unknown class, sampler, model or a path that cannot be
    written.
    """
    from tqdm import tqdm

    from latentdiff.checkpoints import load, resolve_model

    if min(num_images, batch_size, 1 if steps is None else steps) < 1:
        raise UserError("--num-images, --batch-size and --steps: must be at least 1")
    path, options = check_out(out, 0), parse_options(sampler_options or [])
    if sampler is not None:
        from latentdiff import samplers

        if sampler not in samplers.names():
            raise UserError(f"--sampler {sampler}: unknown; valid: {', '.join(samplers.names())}")
    folder = resolve_model(model)
    pipeline = load(folder)
    pipeline.set_progress_bar_config(disable=True)
    set_precision(pipeline, precision)
    if (options or classifier_strength) and sampler is None and pipeline.scheduler is not None:
        raise UserError("--sampler-options and --classifier-strength: the checkpoint's scheduler has neither; add --sampler")
    guide = classifier_guide(pipeline, folder, classifier_strength) if classifier_strength else None
    rows = subjects(pipeline, list(what or []), all_classes)
    beside = class_beside(pipeline, label, rows)
    if negative and (pipeline.config.default_guidance_scale if guidance is None else guidance) == 1:
        raise UserError("--negative: at guidance 1, which is off, nothing is guided away from; give --guidance above 1")
    check_out(out, len(rows) * num_images)
    call: dict[str, Any] = {
        "num_inference_steps": steps, "sampler": sampler, "sampler_options": options, "guidance_scale": guidance,
        "guidance_interval": guidance_interval, "negative_prompt": negative,
    }  # fmt: skip
    if progress and (cuts := pipeline.cut_off([*(row for row in rows if isinstance(row, str)), negative])):
        print(f"latentdiff: longer than the text encoder reads, prompts lose these parts: {cuts}", file=sys.stderr)
    images: list[np.ndarray] = []
    labels: list[Subject] = []
    with tqdm(total=len(rows) * num_images, unit="image", disable=not progress, delay=0.5) as bar:
        for batch, part in generate_batches(pipeline, rows, num_images, seed, batch_size, guide, beside, **call):
            images.extend(batch)
            labels.extend(part)
            bar.update(len(part))
    _write(path, np.stack(images), labels, pipeline, beside)
    return path


def _write(path: Path, images: np.ndarray, rows: list[Subject], pipeline: LatentDiffusionPipeline, beside: int | None) -> None:
    classes = [*(pipeline.class_names or map(str, range(pipeline.num_classes))), "no class"]
    labels = [beside if isinstance(row, str) else row for row in rows]
    pairs = [("" if label is None else classes[label], row) for label, row in zip(labels, rows, strict=True)]
    names = [": ".join(part for part in pair if part and isinstance(part, str)) for pair in pairs]
    if path.suffix == ".npz":
        save_npz(path, images, np.array([-1 if label is None else label for label in labels]))
    elif path.suffix == ".png":
        from latentdiff.pictures import labelled_grid, save_png

        grid, captions = _grid_rows(images, names)
        save_png(labelled_grid(grid, [textwrap.shorten(text, ROW_NAME, placeholder=" …") for text in captions]), path)
    else:
        from PIL import Image

        path.mkdir(parents=True, exist_ok=True)
        for k, (image, text) in enumerate(zip(images, names, strict=True)):
            name = re.sub(r"[^\w-]+", "_", text).encode()[:NAME_LENGTH].decode(errors="ignore") or "image"
            Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image).save(path / f"{k:05d}-{name}.png")


def _grid_rows(images: np.ndarray, names: list[str]) -> tuple[list[list[np.ndarray]], list[str]]:
    """Rows of at most GRID_COLUMNS images of one subject, named at the first of its rows."""
    grid: list[list[np.ndarray]] = []
    captions: list[str] = []
    start = 0
    while start < len(names):
        stop = start
        while stop < len(names) and stop - start < GRID_COLUMNS and names[stop] == names[start]:
            stop += 1
        continues = start > 0 and names[start - 1] == names[start]
        captions.append("" if continues else names[start])
        grid.append(list(images[start:stop]))
        start = stop
    return grid, captions


def save_npz(path: Path, images: np.ndarray, labels: np.ndarray) -> None:
    """guided-diffusion's evaluation format: arr_0 uint8 [N, H, W, 3] (grey repeated), arr_1 int64 [N]; written atomically."""
    colour = np.repeat(images, 3, axis=-1) if images.shape[-1] == 1 else images
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.npz")
    np.savez(temporary, colour, labels.astype(np.int64))
    temporary.replace(path)
