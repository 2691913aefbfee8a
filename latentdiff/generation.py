"""Images from a checkpoint in bulk: one seed per image, bounded memory, written as a grid, a folder or an npz."""

from __future__ import annotations

import contextlib
import hashlib
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import yaml

from latentdiff.checkpoints import weights_of
from latentdiff.errors import UserError
from latentdiff.utils import locks, processes, signals
from latentdiff.utils.outputs import ImageFolder, Make, Names, check_out, to_folder, to_grid, to_npz
from latentdiff.utils.random import derive_seed
from latentdiff.utils.safe_yaml import read_yaml

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


class Numbered(Sequence[tuple[Subject, int, int]]):
    """(subject, its number, its place in rows), num_images of each row; a subject named again counts on, so none comes twice.

    Made as they are asked for: there may be millions.
    """

    def __init__(self, rows: Sequence[Subject], num_images: int):
        self.rows, self.num_images = rows, num_images
        drawn = Counter[Subject]()
        self.first: list[int] = []  # the number of each row's first image
        for row in rows:
            self.first.append(drawn[row])
            drawn[row] += num_images

    def __len__(self) -> int:
        return len(self.rows) * self.num_images

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[k] for k in range(*index.indices(len(self)))]
        place, k = divmod(range(len(self))[index], self.num_images)
        return self.rows[place], self.first[place] + k, place


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
    images = Numbered(rows, num_images)
    first, last, _ = part.indices(len(images))
    for start in range(first, last, batch_size):
        batch = images[start : min(start + batch_size, last)]
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
    one a single file. A folder is written batch by batch: a call that was stopped goes on when it is made again. Memory
    holds a batch, but for a grid.

    negative: a prompt to guide away from, for a model that reads text.  label: the class of every prompt, for a model
    told both.
    out: .png, a labelled grid; .npz, arr_0 uint8 [N, H, W, 3] and arr_1 int64 [N]; else a folder with a PNG an image.
    classifier_strength: of classifier guidance, on top of classifier-free, by the classifier in the model's folder; 0 is
    off.  sampler_options: key=value, the sampler's own keywords.  Both need a sampler.
    device: auto, cpu, or torch's name of another.
    The same arguments give the same file. UserError for an unknown class, sampler, model, a path that cannot be written,
    a folder of another call, and one in which another job is writing. A signal ends the call: see
    `latentdiff.utils.signals`.
    """
    path, options = _checked(out, num_images, batch_size, steps, sampler, sampler_options or [])
    processes.pick_device(device)
    folder, pipeline = _opened(model, device, sampler, precision)
    if (options or classifier_strength) and sampler is None and pipeline.scheduler is not None:
        raise UserError("--sampler-options and --classifier-strength: the checkpoint's scheduler has neither; add --sampler")
    guide = classifier_guide(pipeline, folder, classifier_strength) if classifier_strength else None
    rows = subjects(pipeline, list(what or []), all_classes)
    beside = class_beside(pipeline, label, rows)
    if negative and (pipeline.config.default_guidance_scale if guidance is None else guidance) == 1:
        raise UserError("--negative: at guidance 1, which is off, nothing is guided away from; give --guidance above 1")
    total = len(rows) * num_images
    check_out(out, total)
    call: dict[str, Any] = {
        "num_inference_steps": steps,
        "sampler": sampler,
        "sampler_options": options,
        "guidance_scale": guidance,
        "guidance_interval": guidance_interval,
        "negative_prompt": negative,
    }
    progress = progress and processes.rank() == 0
    if progress and (cuts := pipeline.cut_off([*(row for row in rows if isinstance(row, str)), negative])):
        print(f"latentdiff: longer than the text encoder reads, prompts lose these parts: {cuts}", file=sys.stderr)
    if progress:
        processes.announce("generate", pipeline.device, total, batch_size)

    classes = [*(pipeline.class_names or map(str, range(pipeline.num_classes))), "no class"]
    names = Names(classes, rows, [beside if isinstance(row, str) else row for row in rows], num_images)
    make = partial(_made, pipeline, rows, num_images, seed, batch_size, guide=guide, label=beside, **call)
    depends_on = {
        "WHAT": rows,
        "--num-images": num_images,
        "--seed": seed,
        "--batch-size": batch_size,
        "--precision": precision,
        "--label": beside,
        "--classifier-strength": classifier_strength,
        "device": pipeline.device.type,
        "model": None if path.suffix else _fingerprint(folder),
        **call,
    }
    _write(path, make, names, depends_on, batch_size, progress)
    return path


def _write(path: Path, make: Make, names: Names, depends_on: dict[str, Any], batch_size: int, progress: bool) -> None:
    """Make the images and write them, alone in the folder or at the file; a signal ends it (`utils.signals`)."""
    from tqdm import tqdm

    part = processes.share(len(names), batch_size)
    with (
        signals.watched(signals.again) as watch,
        locks.locked(path, "wait for it, or name another --out", beside=bool(path.suffix)),
        tqdm(total=part.stop - part.start, unit="image", disable=not progress, delay=0.5) as bar,
    ):
        if path.suffix == ".png":
            to_grid(path, make, names, part, batch_size, bar.update)
        elif path.suffix == ".npz":
            to_npz(path, make, names, part, batch_size, bar.update)
        else:
            to_folder(ImageFolder(path, depends_on), make, names, part, batch_size, watch, bar.update)


def _checked(
    out: str | Path, num_images: int, batch_size: int, steps: int | None, sampler: str | None, options: list[str]
) -> tuple[Path, dict[str, Any]]:
    """The output's path and the sampler's options, all that can be refused before a model is loaded being looked at."""
    if min(num_images, batch_size, 1 if steps is None else steps) < 1:
        raise UserError("--num-images, --batch-size and --steps: must be at least 1")
    path, parsed = check_out(out, 0), parse_options(options)
    if sampler is not None:
        from latentdiff import samplers

        if sampler not in samplers.names():
            raise UserError(f"--sampler {sampler}: unknown; valid: {', '.join(samplers.names())}")
    return path, parsed


def _opened(model: str | Path, device: str, sampler: str | None, precision: str) -> tuple[Path, LatentDiffusionPipeline]:
    """The model's folder, and its pipeline on the device, in the precision."""
    from latentdiff.checkpoints import load, resolve_model

    folder = resolve_model(model)
    pipeline = load(folder)
    pipeline.set_progress_bar_config(disable=True)
    place(pipeline, device, sampler)
    set_precision(pipeline, precision)
    return folder, pipeline


def _made(
    pipeline: LatentDiffusionPipeline,
    rows: list[Subject],
    num_images: int,
    seed: int,
    batch_size: int,
    part: slice,
    report: Callable[[int], object],
    **call: Any,
) -> Iterator[np.ndarray]:
    """Batches of images of a part, uint8 [B, H, W, C]. Of an empty part one image, which counts for nothing.

    So a process without a share refuses what the others refuse, and knows the size of an image.
    """
    total = len(rows) * num_images
    idle = part.start == part.stop
    for images, _ in generate_batches(
        pipeline, rows, num_images, seed, batch_size, part=slice(total - 1, total) if idle else part, **call
    ):
        report(0 if idle else len(images))
        yield images


def _fingerprint(folder: Path) -> str:
    """sha256 over a checkpoint's weights and settings: what its images depend on."""
    digest = hashlib.sha256(weights_of(folder)["weights_sha256"].encode())
    for name in ("model_index.json", "scheduler/scheduler_config.json", "classifier/model.safetensors"):
        if (folder / name).is_file():
            digest.update(name.encode() + (folder / name).read_bytes())
    return digest.hexdigest()
