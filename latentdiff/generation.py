"""Images from a checkpoint in bulk: one seed per image, bounded memory, written as a grid, a folder or an npz."""

from __future__ import annotations

import contextlib
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import yaml

from latentdiff import processes
from latentdiff.errors import UserError
from latentdiff.plain import read_yaml
from latentdiff.rng import derive_seed
from latentdiff.writing import check_out, write_file, write_folder

if TYPE_CHECKING:
    from latentdiff.pipelines.latent_diffusion import LatentDiffusionPipeline

Subject = int | str | None  # what an image is to show: a class's embedding row, a prompt, or nothing in particular
# guide(subjects of a batch) -> guidance(denoiser) -> denoiser
Guide = Callable[[list[Subject]], Callable[[Any], Any]]


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
        raise UserError("MODEL: it is told by text what to draw and has no classes; measure it by latentdiff evaluate or judge")
    return list(range(pipeline.num_classes)) or [None]


def _what_it_takes(pipeline: LatentDiffusionPipeline) -> str:
    prompts = "" if pipeline.text_encoder is None else ', as prompts such as "a red apple"'
    classes = f"; {pipeline._listed_classes()}, or give --all-classes" if pipeline.num_classes else ""
    return prompts + classes or "; it is unconditional"


def image_generators(seed: int, subject: Subject, start: int, count: int) -> list[torch.Generator]:
    """Generators of images start ... start + count - 1 of a subject: functions of (seed, subject, number) alone.

    They draw on the CPU, so that the noise is the same on every device.
    """
    label = -1 if subject is None else subject
    return [torch.Generator().manual_seed(derive_seed(seed, label, start + k)) for k in range(count)]


def numbered(rows: Sequence[Subject], num_images: int) -> list[tuple[Subject, int, int]]:
    """(subject, its number, its place in rows), num_images of each; a subject named again counts on, so none comes twice."""
    drawn, wanted = Counter[Subject](), list[tuple[Subject, int, int]]()
    for place, row in enumerate(rows):
        wanted += [(row, drawn[row] + k, place) for k in range(num_images)]
        drawn[row] += num_images
    return wanted


# What samplers.sample takes besides the sampler's own options, and a call has other ways to give
COMMON = ("denoiser", "noise_or_shape", "sampler", "steps", "generator", "callback", "device")
PRECISIONS = ("float32", "bfloat16")


def place(pipeline: LatentDiffusionPipeline, device: str, sampler: str | None = None) -> torch.device:
    """Move a loaded pipeline to the device of this name (see `processes.pick_device`), and return which it is.

    latentdiff's samplers compute with schedules in float64. Where a device has none, auto is the CPU for them, and any other
    name is a UserError.
    """
    found = processes.pick_device(device)
    if (sampler is not None or pipeline.scheduler is None) and not processes.holds_float64(found):
        if device != "auto":
            raise UserError(f"--device {device}: has no float64, which latentdiff's samplers need; valid: auto, cpu")
        found = torch.device("cpu")
    pipeline.to(found)
    return found


def set_precision(pipeline: LatentDiffusionPipeline, precision: str) -> None:
    """Run a loaded pipeline's U-Net in this precision; the sampler's own arithmetic and the decoder stay as they are.

    bfloat16 is autocast: faster where the processor multiplies in it, and images then depend a little on the batch they are
    made in. What autocast would cast anew at every evaluation is cast once, here. UserError for another name.
    """
    if precision not in PRECISIONS:
        raise UserError(f"--precision {precision}: unknown; valid: {', '.join(PRECISIONS)}")
    if precision == "bfloat16":
        # All but the first, whose dtype diffusers takes for the network's and rounds the embeddings of t and class to
        multiplying = [layer for layer in pipeline.unet.modules() if isinstance(layer, torch.nn.Conv2d | torch.nn.Linear)]
        for layer in multiplying[1:]:
            layer.to(torch.bfloat16)
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
    label: int | None | Sequence[int] = None,
    part: slice = slice(None),
    **call: Any,
) -> Iterator[tuple[np.ndarray, list[Subject]]]:
    """Yield (uint8 [B, H, W, C], rows [B]): `num_images` for each row, in order; `call` goes to the pipeline.

    rows: classes, prompts or None, as `subjects` gives them.  guide: guide(classes [B]) is the pipeline's guidance for a
    batch.  label: the class of every prompt, or one for each of rows.  part: only these of all the images. An image depends
    on the checkpoint, the call, the seed, its subject and its number within that, not on batch_size. UserError for what the
    pipeline refuses.
    """
    null, away = pipeline.config.null_class, (call.get("negative_prompt") or "").strip()
    beside = list(label) if isinstance(label, Sequence) else [label] * len(rows)
    # Of what names nothing, guidance changes nothing: only a call of nothing else is the pipeline's to refuse
    told = zip(rows, beside, strict=True)
    named = {r for r, c in told if c is not None or (r.strip() if isinstance(r, str) else r not in (None, null))}
    wanted = numbered(rows, num_images)[part]
    for start in range(0, len(wanted), batch_size):
        batch = wanted[start : start + batch_size]
        generators = [image_generators(seed, row, k, 1)[0] for row, k, _ in batch]
        labels = [row for row, _, _ in batch]
        asked = {**call, "class_labels": [beside[place] if isinstance(row, str) else row for row, _, place in batch]}
        if any(isinstance(row, str) for row in labels):
            asked["prompt"] = [row if isinstance(row, str) else None for row in labels]
        if guide is not None:
            asked["guidance"] = guide(asked["class_labels"])
        if named and not away and named.isdisjoint(labels):
            asked["guidance_scale"] = 1.0
        try:
            out = pipeline(**asked, generator=generators, output_type="np").images  # [B, H, W, C]
        except UserError:
            raise
        except ValueError as error:
            raise UserError(str(error)) from None
        yield np.round(out * 255).astype(np.uint8), labels


def generate_share(
    pipeline: LatentDiffusionPipeline,
    rows: list[Subject],
    num_images: int,
    seed: int = 0,
    batch_size: int = 128,
    report: Callable[[int], object] = lambda count: None,
    **call: Any,
) -> np.ndarray:
    """This process's share of what `generate_batches` yields, uint8 [n, H, W, C]; n is 0 where processes outnumber batches.

    report: told how many images each batch had.
    """
    total = len(rows) * num_images
    part = processes.share(total, batch_size)
    idle = part.start == part.stop
    # A process without a share makes the last image for itself: it refuses what the others refuse, and does not wait for them
    todo = slice(total - 1, total) if idle else part
    made = []
    for images, _ in generate_batches(pipeline, rows, num_images, seed, batch_size, part=todo, **call):
        made.append(images)
        report(0 if idle else len(images))
    return np.concatenate(made)[: part.stop - part.start]


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
    device: str = "auto",
) -> Path:
    """Generate `num_images` of each class or prompt in `what` and write them; returns the path written.

    Several processes of a launcher share the images, with the same result; each writes its own into a folder, the first
    one a single file.

    negative: a prompt to guide away from, for a model that reads text.  label: the class of every prompt, for a model
    told both.
    out: .png, a labelled grid; .npz, arr_0 uint8 [N, H, W, 3] and arr_1 int64 [N]; else a folder with a PNG an image.
    classifier_strength: of classifier guidance, on top of classifier-free, by the classifier in the model's folder; 0 is
    off.  sampler_options: key=value, the sampler's own keywords.  Both need a sampler.
    device: auto, cpu, or torch's name of another.
    The same arguments give the same file. UserError for an unknown class, sampler, model or a path that cannot be
    written.
    """
    from tqdm import tqdm

    from latentdiff.checkpoints import load, resolve_model

    if min(num_images, batch_size, 1 if steps is None else steps) < 1:
        raise UserError("--num-images, --batch-size and --steps: must be at least 1")
    path, options = check_out(out, 0), parse_options(sampler_options or [])
    processes.pick_device(device)
    if sampler is not None:
        from latentdiff import samplers

        if sampler not in samplers.names():
            raise UserError(f"--sampler {sampler}: unknown; valid: {', '.join(samplers.names())}")
    folder = resolve_model(model)
    pipeline = load(folder)
    pipeline.set_progress_bar_config(disable=True)
    found = place(pipeline, device, sampler)
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
    progress = progress and processes.rank() == 0
    if progress and (cuts := pipeline.cut_off([*(row for row in rows if isinstance(row, str)), negative])):
        print(f"latentdiff: longer than the text encoder reads, prompts lose these parts: {cuts}", file=sys.stderr)
    if progress:
        processes.announce("generate", found, len(rows) * num_images, batch_size)
    part = processes.share(len(rows) * num_images, batch_size)
    with tqdm(total=part.stop - part.start, unit="image", disable=not progress, delay=0.5) as bar:
        call |= {"guide": guide, "label": beside}
        images = generate_share(pipeline, rows, num_images, seed, batch_size, report=bar.update, **call)
    _write(path, images, batch_size, [row for row in rows for _ in range(num_images)], pipeline, beside)
    return path


def _write(
    path: Path, mine: np.ndarray, batch_size: int, rows: list[Subject], pipeline: LatentDiffusionPipeline, beside: int | None
) -> None:
    """Write all images, of which this process has made its share; rows are those of all."""
    classes = [*(pipeline.class_names or map(str, range(pipeline.num_classes))), "no class"]
    labels = [beside if isinstance(row, str) else row for row in rows]
    pairs = [("" if label is None else classes[label], row) for label, row in zip(labels, rows, strict=True)]
    names = [": ".join(part for part in pair if part and isinstance(part, str)) for pair in pairs]
    if path.suffix:
        images = processes.gather(mine, len(rows), batch_size)
        if images is not None:
            write_file(path, images, names, labels)
    else:
        part = processes.share(len(rows), batch_size)
        processes.meet()  # before anything is written: each has looked whether the folder is empty
        write_folder(path, mine, names[part], part.start)
        processes.meet()
