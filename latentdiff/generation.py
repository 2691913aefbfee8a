"""Images from a checkpoint in bulk: one seed per image, bounded memory, written as a grid, a folder or an npz.

`generate` is the command. `generate_batches` makes the images for other commands. torch, numpy and diffusers are imported
within the functions that use them, so that the command line starts quickly.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from latentdiff.errors import UserError
from latentdiff.utils import locks, processes, progress_bars, signals
from latentdiff.utils.shipped import shipped_weights

if TYPE_CHECKING:
    import numpy as np
    import torch

    from latentdiff.pipelines.latent_diffusion import LatentDiffusionPipeline
    from latentdiff.utils.outputs import Make, Names

DEFAULT_MODEL = "weights/fashion-mnist"
# What one image is to show: a class (its embedding row), a prompt, or None for nothing in particular
Subject = int | str | None
# guide(subjects of a batch) -> a function denoiser -> guided denoiser
Guide = Callable[[list[Subject]], Callable[[Any], Any]]
# given(rows of a batch) -> arguments of the pipeline for the second images of these rows
Given = Callable[[list[int]], dict[str, Any]]

# Arguments of samplers.sample that a call gives by other flags than --sampler-options
RESERVED_OPTIONS = ("denoiser", "noise_or_shape", "sampler", "steps", "generator", "callback", "device", "replacement")
PRECISIONS = ("float32", "bfloat16")
FEW_CLASSES = 60  # a message names them all


def generate(
    model: str | Path = DEFAULT_MODEL,
    what: list[str | int] | None = None,
    num_images: int = 8,
    steps: int | None = None,
    sampler: str | None = None,
    guidance: float | None = None,
    guidance_interval: tuple[float, float] | None = None,
    classifier_strength: float = 0.0,
    guidance_rule: str | None = None,
    guidance_rescale: float | None = None,
    guidance_options: list[str] | None = None,
    weak: bool = False,
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
    condition: str | Path | None = None,
    condition_mask: str | Path | None = None,
    image_guidance: float | None = None,
    pipeline: LatentDiffusionPipeline | None = None,
    callback: Callable[..., dict[str, Any] | None] | None = None,
) -> Path:
    """Make images of each class or prompt named and write them to a labelled grid, an npz file or a folder.

    The same arguments give the same file. Several processes of a launcher share the images, with the same result: each
    writes its own images into a folder, and the first one writes a single file. A folder is written batch by batch, so a
    call that was stopped goes on when it is made again. Memory holds one batch, except for a grid.

    Args:
        model: a checkpoint folder, or the name of a shipped one.
        what: class names or numbers, or prompts.
        num_images: images of each class or prompt.
        steps: steps of the sampler; the default is the checkpoint's, or more for some samplers.
        sampler: one of latentdiff's samplers instead of the checkpoint's scheduler.
        guidance: scale of classifier-free guidance, at least 0; 1 is off; the default is the checkpoint's.
        guidance_interval: guide only at times from LOW to HIGH, where 0 is data and 1 is noise.
        classifier_strength: also guide by the classifier in the model's folder; needs a sampler; 1 is Bayes' rule, 0 is off.
        guidance_rule: cfg; apg, adaptive projected guidance, which does not overexpose at a large scale; or cfg_zero, the scale
            of CFG-Zero*, for flows; the default is the checkpoint's.
        guidance_rescale: take back this share of the contrast that guidance adds, from 0, which is off, to 1; the default is
            the checkpoint's.
        guidance_options: key=value options of the rule: parallel, threshold and momentum of apg, and zero_init of cfg_zero; the
            default is the checkpoint's, or none where guidance_rule is given.
        weak: autoguidance: guide away from the weaker U-Net in the model's folder weak. --guidance is its scale.
        sampler_options: key=value options of the sampler, such as eta=0.5; needs a sampler.
        precision: float32 or bfloat16, of the U-Net alone.
        negative: a prompt to guide away from, for a model that reads text.
        label: a class, by name or number, for every prompt of a model with both prompts and classes.
        seed: every image depends on the seed, its class or prompt, and its number within that.
        out: .png (a labelled grid), .npz (arr_0 uint8 [N, H, W, 3], arr_1 int64 [N] classes), or a folder (a PNG per image).
        all_classes: every class of the model, instead of `what`.
        batch_size: images made at a time.
        progress: show a progress bar on stderr.
        device: auto, cpu, or torch's name of another device.
        condition: a picture, for a model that is given one: what to enlarge, complete or colour, or the paired picture.
        condition_mask: a picture that is white where that one is to be completed.
        image_guidance: scale of guidance by that picture; 1 is off.
        pipeline: the checkpoint of `model`, if it is loaded already.
        callback: called as f(pipeline, step, t, tensors) after each step of each batch, as the pipeline's
            callback_on_step_end. What it raises ends the call, and nothing of the batch is written.

    Returns:
        The path written.

    Raises:
        UserError: an unknown class, sampler or model, a path that cannot be written, a folder that holds images of another
            call, or one in which another job is writing.
        Stopped, Interrupted: a signal ended the call; see `latentdiff.utils.signals`.
    """
    # Refuse what can be refused before a model is loaded
    from latentdiff.utils.outputs import Names, check_out

    if min(num_images, batch_size, 1 if steps is None else steps) < 1:
        raise UserError("--num-images, --batch-size and --steps: must be at least 1")
    path = check_out(out, 0)
    options = parse_options(sampler_options or [])
    guiding = guidance_call(guidance_rule, guidance_rescale, guidance_options or [])
    check_sampler(sampler)
    check_files({"--condition": condition, "--condition-mask": condition_mask})
    check_names(model, list(what or []))
    processes.pick_device(device)

    # Load the model
    from latentdiff.checkpoints import load, resolve_model

    folder = resolve_model(model)
    pipeline = load(folder) if pipeline is None else pipeline
    pipeline.set_progress_bar_config(disable=True)
    place(pipeline, device, sampler)
    set_precision(pipeline, precision)

    # Check the call against the model
    guiding = other_than_default(pipeline, guiding)
    unread = {"--classifier-strength": classifier_strength, "--weak": weak, "--image-guidance": image_guidance is not None}
    refuse_for_codes(pipeline, {**unread, **rule_flags(guiding)})
    if (options or classifier_strength) and sampler is None and pipeline.scheduler is not None:
        raise UserError("--sampler-options and --classifier-strength: the checkpoint's scheduler has neither; add --sampler")
    given = given_picture(pipeline, condition, condition_mask)
    guide = classifier_guide(pipeline, folder, classifier_strength) if classifier_strength else None
    rows = subjects(pipeline, list(what or []), all_classes)
    class_row = class_of_prompts(pipeline, label, rows)
    if image_guidance in (None, 1.0):
        labels = [class_row if isinstance(row, str) else row for row in rows]
        has_target = bool(negative) or condition is not None or bool(guided_to(pipeline, rows, labels))
        check_rule(pipeline, guiding, weak, guidance, has_target)
    guiding |= weak_call(pipeline, folder, weak, negative)
    check_negative(pipeline, negative, guidance)
    total = len(rows) * num_images
    check_out(out, total)

    # Say on stderr what will be done
    progress = progress and processes.rank() == 0
    if progress and (cuts := pipeline.cut_off([*(row for row in rows if isinstance(row, str)), negative])):
        print(f"latentdiff: longer than the text encoder reads, prompts lose these parts: {cuts}", file=sys.stderr)
    if progress:
        processes.announce("generate", pipeline.device, total, batch_size)

    # Make the images and write them
    call: dict[str, Any] = {
        "num_inference_steps": steps,
        "sampler": sampler,
        "sampler_options": options,
        "guidance_scale": guidance,
        "guidance_interval": guidance_interval,
        "negative_prompt": negative,
        **guiding,
    }
    call |= {} if image_guidance is None else {"image_guidance_scale": image_guidance}
    depends_on = {
        "WHAT": rows,
        "--num-images": num_images,
        "--seed": seed,
        "--batch-size": batch_size,
        "--precision": precision,
        "--label": class_row,
        "--classifier-strength": classifier_strength,
        "device": pipeline.device.type,
        "model": None if path.suffix else fingerprint(folder, weak),
        **{key: value for key, value in call.items() if key != "weak_unet"},
    }
    for flag, file in (("--condition", condition), ("--condition-mask", condition_mask)):
        depends_on |= {} if file is None else {flag: hashlib.sha256(Path(file).read_bytes()).hexdigest()}
    classes = [*(pipeline.class_names or map(str, range(pipeline.num_classes))), "no class"]
    names = Names(classes, rows, [class_row if isinstance(row, str) else row for row in rows], num_images)
    call |= {"guide": guide, "label": class_row, "given": given}
    call |= {} if callback is None else {"callback_on_step_end": callback}
    make = partial(_batches_of_part, pipeline, rows, num_images, seed, batch_size, **call)
    _write(path, make, names, depends_on, batch_size, progress)
    return path


def check_files(files: dict[str, Any]) -> None:
    """UserError for a file that is not there. files: {flag: its path, or None}."""
    for flag, file in files.items():
        if file is not None and not Path(file).is_file():
            raise UserError(f"{flag} {file}: cannot be read as a picture (no such file)")


def check_names(model: str | Path, what: Sequence[str | int], flag: str = "") -> None:
    """UserError for a class that the checkpoint's model_index.json does not list, before torch and weights are loaded.

    What this file cannot tell is left to `subjects`, which says the same. Arguments as there.
    """
    folder = Path(model) if Path(model).is_dir() else shipped_weights(model)
    if folder is None or (folder / "text_encoder").is_dir():
        return
    try:
        names = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))["class_names"]
        names = [names[str(k)] for k in range(len(names))]
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return
    if not 0 < len(names) <= FEW_CLASSES or not all(isinstance(name, str) and name.isprintable() for name in names):
        return
    wrong = [entry for entry in what if isinstance(entry, str) and entry not in names and not entry.isdecimal()]
    if wrong:
        listed = ", ".join(f"{k} {name}" for k, name in enumerate(names))
        beginning = f"{flag}: " if flag else ""
        raise UserError(f"{beginning}unknown class {wrong[0]!r}; the classes are: {listed}")


def check_sampler(sampler: str | None) -> None:
    """UserError for a sampler that no model has: one of latentdiff's samplers, or an order in which codes are drawn."""
    if sampler is None:
        return
    from latentdiff import discrete, samplers

    valid = (*samplers.names(), *discrete.ORDERS)
    if sampler not in valid:
        raise UserError(f"--sampler {sampler}: unknown; valid: {', '.join(valid)}")


def refuse_for_codes(pipeline: LatentDiffusionPipeline, flags: dict[str, Any]) -> None:
    """UserError where a model draws codes, and a flag is set that it does not read. flags: their values, by name."""
    from latentdiff.checkpoints import is_over_codes

    given = [flag for flag, value in flags.items() if value]
    if given and is_over_codes(pipeline.config):
        raise UserError(f"{given[0]}: this model draws codes, and it has no part in that; leave it out")


def subjects(
    pipeline: LatentDiffusionPipeline, what: list[str | int], all_classes: bool = False, flag: str = ""
) -> list[Subject]:
    """What to draw, one entry for each of `what`: the embedding row of a class (int), or a prompt (str).

    Args:
        pipeline: the checkpoint.
        what: class names or numbers. For a model that reads text, every entry that is not a class name is a prompt.
        all_classes: every class of the model, in order; `what` must be empty.
        flag: what named them, for messages; "" where they were given by position.

    Returns:
        Rows and prompts. [None] where `what` is empty and the model is unconditional.

    Raises:
        UserError: an unknown class (the message lists the classes), nothing to draw, a prompt that is not valid UTF-8, or
            all_classes together with `what` or for a model without classes.
    """
    # Every class
    if all_classes and what:
        raise UserError(f"--all-classes: stands for every class, so leave out {what[0]!r}")
    if all_classes and not pipeline.num_classes:
        raise UserError("--all-classes: this model has no classes" + _what_it_takes(pipeline))
    if all_classes:
        return list(range(pipeline.num_classes))

    # Nothing, of an unconditional model
    reads_text = pipeline.text_encoder is not None
    if not what:
        if pipeline.num_classes or reads_text:
            raise UserError("nothing is named to draw; name it" + _what_it_takes(pipeline))
        return [None]

    # Prompts and classes
    try:
        if reads_text:  # refuses text that is not valid UTF-8
            pipeline.parse_prompts([entry for entry in what if isinstance(entry, str)] or None)
        class_names = pipeline.class_names
        return [entry if reads_text and entry not in class_names else pipeline.class_index(entry) for entry in what]
    except ValueError as error:
        raise UserError(f"{flag}: {error}" if flag else str(error)) from None


def given_picture(pipeline: LatentDiffusionPipeline, condition: str | Path | None, mask: str | Path | None) -> Given | None:
    """The same picture for every image of a call. UserError where the model is given none, or is not given what it needs."""
    rule = getattr(pipeline.config, "image_condition", None)
    if rule is None:
        if condition is not None or mask is not None:
            raise UserError("--condition: this model is given no picture; `latentdiff edit` changes one")
        return None
    if condition is None:
        if not rule.get("dropped"):
            raise UserError(f"--condition: this model is given a picture ({rule['kind']}) for every image; name its file")
        if mask is not None:
            raise UserError("--condition-mask: goes with --condition, the picture to complete")
        return None
    if (rule["kind"] == "mask") != (mask is not None):
        needs = "completes pictures, so give --condition-mask, white to fill" if mask is None else "takes no --condition-mask"
        raise UserError(f"--condition: this model {needs}")
    arguments = {"condition_image": read_picture(condition, "--condition")}
    if mask is not None:
        arguments["condition_mask"] = read_picture(mask, "--condition-mask")
    return lambda rows: arguments


def read_picture(path: str | Path, flag: str) -> Any:
    """A file as a PIL image in colour, read as training reads images. UserError, naming the flag, where it cannot be read."""
    from PIL import Image

    from latentdiff.data.image_files import DECODING_ERRORS, decode, one_line

    try:
        return Image.fromarray(decode(Path(path), 3))
    except DECODING_ERRORS as error:
        raise UserError(f"{flag} {path}: cannot be read as a picture ({one_line(error)})") from None


def refuse_second_image(pipeline: LatentDiffusionPipeline, what: str) -> None:
    """UserError for a model that is given a second image. what: the command that has none, for the message."""
    rule = getattr(pipeline.config, "image_condition", None)
    if rule is not None:
        raise UserError(
            f"MODEL: is given a picture ({rule['kind']}) for each image, and {what} has none; valid for it are generate "
            "--condition, edit and evaluate"
        )


def class_of_prompts(pipeline: LatentDiffusionPipeline, label: str | int | None, rows: list[Subject]) -> int | None:
    """The embedding row of the class that --label gives to every prompt of `rows`, or None. UserError where it cannot."""
    if label is None:
        return None
    if not pipeline.num_classes:
        raise UserError(f"--label {label}: this model has no classes; leave it out")
    if pipeline.text_encoder is None:
        raise UserError(f"--label {label}: goes with prompts, and this model reads none; name classes to draw")
    if any(isinstance(row, int) for row in rows):
        raise UserError(f"--label {label}: classes are named already; give prompts, or leave --label out")
    try:
        return pipeline.class_index(label)
    except ValueError as error:
        raise UserError(f"--label: {error}") from None


def check_negative(
    pipeline: LatentDiffusionPipeline, negative: str | None, guidance: float | None, flag: str = "--negative"
) -> None:
    """UserError for something to guide away from at guidance 1, where it does nothing.

    guidance: None is the checkpoint's default. flag: that names what to guide away from.
    """
    if negative and (pipeline.config.default_guidance_scale if guidance is None else guidance) == 1:
        raise UserError(f"{flag}: at guidance 1, which is off, nothing is guided away from; give --guidance above 1")


def check_rule(
    pipeline: LatentDiffusionPipeline, guiding: dict[str, Any], weak: bool, guidance: float | None, has_target: bool
) -> None:
    """UserError for a rule of guidance where guidance is off, so that it would do nothing.

    guiding: from `other_than_default`. weak, guidance: of `generate`. has_target: whether there is something to guide to.
    """
    scale = pipeline.config.default_guidance_scale if guidance is None else guidance
    given = [name for name, value in guiding.items() if value not in ("cfg", 0, {})]
    if not given or (scale != 1 and (weak or has_target)):
        return
    flag = "--" + given[0].replace("_", "-")
    if scale == 1:
        raise UserError(f"{flag}: at guidance 1, which is off, it changes nothing; give --guidance, such as 2")
    raise UserError(f"{flag}: there is no class or prompt to guide to, so it changes nothing; name one, or leave it out")


def weak_call(pipeline: LatentDiffusionPipeline, folder: Path, weak: bool, negative: str | None) -> dict[str, Any]:
    """The argument of the pipeline's call for --weak: the U-Net in the model's folder weak; {} where it is not asked for."""
    if not weak:
        return {}
    from latentdiff.checkpoints import load_weak

    if negative:
        raise UserError("--weak: stands in for the negative prompt; leave --negative out")
    return {"weak_unet": load_weak(folder, pipeline)}


def guided_to(pipeline: LatentDiffusionPipeline, rows: Sequence[Subject], labels: Sequence[int | str | None]) -> set[Subject]:
    """Those of `rows` that guidance can be towards: a class, or a prompt that is not empty. labels: the class of each."""
    nothing = (None, pipeline.config.null_class)
    return {
        row
        for row, label in zip(rows, labels, strict=True)
        if label is not None or (row.strip() if isinstance(row, str) else row not in nothing)
    }


def every_class(pipeline: LatentDiffusionPipeline) -> list[Subject]:
    """The subjects of class-balanced samples: each class, or [None] of an unconditional model.

    UserError for a model that reads text and has no classes, or one that is given a second image.
    """
    refuse_second_image(pipeline, "this command")
    if pipeline.text_encoder is not None and not pipeline.num_classes:
        raise UserError("MODEL: it reads prompts and has no classes; measure it by latentdiff evaluate or judge")
    return list(range(pipeline.num_classes)) or [None]


def _what_it_takes(pipeline: LatentDiffusionPipeline) -> str:
    """What may be named to draw, as the end of a message."""
    prompts = "" if pipeline.text_encoder is None else ', as prompts such as "a red apple"'
    classes = f"; {pipeline.describe_classes()}, or give --all-classes" if pipeline.num_classes else ""
    return prompts + classes or "; it is unconditional"


def image_generators(seed: int, subject: Subject, start: int, count: int) -> list[torch.Generator]:
    """Generators of images start ... start + count - 1 of a subject: functions of (seed, subject, number) alone.

    They draw on the CPU, so that the noise is the same on every device.
    """
    import torch

    from latentdiff.utils.random import derive_seed

    key = -1 if subject is None else subject
    return [torch.Generator().manual_seed(derive_seed(seed, key, start + k)) for k in range(count)]


class Numbered(Sequence[tuple[Subject, int, int]]):
    """All images of a call: (subject, number within the subject, index of the row), `num_images` for each of `rows`.

    A subject that is named again counts on, so no image comes twice. Entries are made when they are read: there may be
    millions.
    """

    def __init__(self, rows: Sequence[Subject], num_images: int):
        self.rows, self.num_images = rows, num_images
        counts = Counter[Subject]()
        self.first: list[int] = []  # the number of each row's first image
        for row in rows:
            self.first.append(counts[row])
            counts[row] += num_images

    def __len__(self) -> int:
        return len(self.rows) * self.num_images

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[k] for k in range(*index.indices(len(self)))]
        row, k = divmod(range(len(self))[index], self.num_images)
        return self.rows[row], self.first[row] + k, row


def place(pipeline: LatentDiffusionPipeline, device: str, sampler: str | None = None) -> torch.device:
    """Move a loaded pipeline to a device, by its name (see `processes.pick_device`), and return the device.

    latentdiff's samplers compute noise schedules in float64. Where a device has no float64, "auto" is the CPU for them, and
    any other name is a UserError. On the CPU, weights get the layout in which convolutions are fastest; the results are the
    same to rounding.
    """
    import torch

    target = processes.pick_device(device)
    if (sampler is not None or pipeline.scheduler is None) and not processes.holds_float64(target):
        if device != "auto":
            raise UserError(f"--device {device}: has no float64, which latentdiff's samplers need; valid: auto, cpu")
        target = processes.pick_device("cpu")
    pipeline.to(target)
    if target.type == "cpu":
        for network in (pipeline.unet, pipeline.vae):
            network.to(memory_format=torch.channels_last)
    return target


def set_precision(pipeline: LatentDiffusionPipeline, precision: str) -> None:
    """Run a loaded pipeline's U-Net in float32 or bfloat16; the sampler's arithmetic and the decoder stay in float32.

    bfloat16 is autocast: faster where the processor multiplies in it, but images then depend a little on the batch they are
    made in. UserError for another name.
    """
    if precision not in PRECISIONS:
        raise UserError(f"--precision {precision}: unknown; valid: {', '.join(PRECISIONS)}")
    if precision == "bfloat16":
        import torch

        # Autocast would cast these weights again at every evaluation. The first layer stays: diffusers takes its dtype for
        # the network's, and would round the embeddings of time and class to it.
        multiplying = [layer for layer in pipeline.unet.modules() if isinstance(layer, torch.nn.Conv2d | torch.nn.Linear)]
        for layer in multiplying[1:]:
            layer.to(torch.bfloat16)
        pipeline.unet.forward = torch.autocast(pipeline.device.type, torch.bfloat16)(pipeline.unet.forward)


def guidance_call(rule: str | None, rescale: float | None, options: list[str]) -> dict[str, Any]:
    """The arguments of the pipeline's call for --guidance-rule, --guidance-rescale and --guidance-options, where given.

    UserError for an unknown rule, or an option that is out of range or of another rule.
    """
    if rule is None and rescale is None and not options:
        return {}
    from latentdiff.guidance.rules import OPTIONS, OPTIONS_IN_WORDS, RULES

    if rule is not None and rule not in RULES:
        raise UserError(f"--guidance-rule {rule}: unknown; valid: {', '.join(RULES)}")
    if rescale is not None and not 0 <= rescale <= 1:
        raise UserError(f"--guidance-rescale {rescale:g}: must be from 0, which is off, to 1")
    values = parse_options(options, "--guidance-options", "parallel=0.5")
    known = {option for of_rule in OPTIONS.values() for option in of_rule}
    if values.keys() - known or not all(type(value) in (int, float) for value in values.values()):
        raise UserError(f"--guidance-options {' '.join(options)}: valid: {OPTIONS_IN_WORDS}, each as key=NUMBER")
    if rule is not None:  # else it is the checkpoint's, which `other_than_default` knows
        _check_rule_options(rule, values)
    given = {"guidance_rule": rule, "guidance_rescale": rescale, "guidance_options": values or None}
    return {name: value for name, value in given.items() if value is not None}


def other_than_default(pipeline: LatentDiffusionPipeline, guiding: dict[str, Any]) -> dict[str, Any]:
    """Those arguments of `guidance_call` that make a difference: what the checkpoint does by default is left out.

    UserError for an option of another rule than the checkpoint's.
    """
    if not guiding:
        return {}
    from latentdiff.guidance.rules import default_call

    default = default_call(pipeline.config)
    usual = {"guidance_rule": "cfg", "guidance_rescale": 0, "guidance_options": {}, **default}
    if "guidance_rule" not in guiding and "guidance_options" in guiding:
        _check_rule_options(usual["guidance_rule"], guiding["guidance_options"])
    # A call that names the rule has none of the default options, so that makes a difference even if the rule is the same
    needed = {"guidance_rule", "guidance_options"} if "guidance_rule" in guiding and usual["guidance_options"] else set()
    return {name: value for name, value in guiding.items() if name in needed or value != usual[name]}


def _check_rule_options(rule: str, options: dict[str, Any]) -> None:
    """UserError for an option of --guidance-options that is out of range or of another rule."""
    from latentdiff.guidance.rules import Rule

    try:
        Rule(rule, **options)
    except UserError as error:
        raise UserError(f"--guidance-options: {error}") from None


def rule_flags(guiding: dict[str, Any]) -> dict[str, Any]:
    """The values of the flags that gave `guiding`, from `guidance_call`, by the flags' names."""
    return {"--" + name.replace("_", "-"): value for name, value in guiding.items()}


def parse_options(items: list[str], flag: str = "--sampler-options", example: str = "eta=0.5") -> dict[str, Any]:
    """{key: value} of key=value items, with values read as YAML: numbers, words, [lists]. UserError for anything else.

    flag, example: for messages.
    """
    import yaml

    from latentdiff.utils.safe_yaml import read_yaml

    options = {}
    for item in items:
        key, separator, text = item.partition("=")
        try:
            value = read_yaml(text)
        except yaml.YAMLError:
            separator = ""
        if not key.isidentifier() or not separator:
            raise UserError(f"{flag} {item!r}: write each as key=value, for example {example}")
        if key in RESERVED_OPTIONS:
            raise UserError(f"{flag} {item!r}: the sampler has no option {key!r}; give it by its own flag, if any")
        if isinstance(value, str):
            with contextlib.suppress(ValueError):
                value = float(value)  # YAML reads 1e-3 as a word
        options[key] = value
    return options


def classifier_guide(pipeline: LatentDiffusionPipeline, folder: Path, strength: float) -> Guide:
    """A guide for `generate_batches`, towards each image's class, by the classifier in `folder`/classifier.

    UserError where there is none, or where it was not made for this model's latents, classes and noise levels.
    """
    import torch

    from latentdiff.denoiser import Denoiser
    from latentdiff.guidance import Classifier, check_same_path, load_classifier

    path = folder / "classifier"
    if not path.is_dir():
        raise UserError(f"--classifier-strength: {folder} has no classifier; train one and put it into {path}")
    classifier = load_classifier(path, pipeline.device)
    takes = classifier.config["channels"], classifier.config["classes"]
    needed = pipeline.latent_shape[0], pipeline.num_classes
    if takes != needed:
        raise UserError(f"{path}: takes (channels, classes) {takes}, and this model has {needed}")
    check_same_path(Denoiser.from_pipeline(pipeline).schedule, classifier.schedule, "the classifier")

    def guide(rows: list[Subject]) -> Callable[[Any], Any]:
        labels = [row for row in rows if isinstance(row, int)]
        if len(labels) != len(rows):
            raise UserError("--classifier-strength: every image needs a class to be guided to")
        log_prob = partial(classifier, labels=torch.tensor(labels, device=pipeline.device))
        return lambda denoiser: Classifier(denoiser, log_prob, strength)

    return guide


def generate_batches(
    pipeline: LatentDiffusionPipeline,
    rows: list[Subject],
    num_images: int,
    seed: int = 0,
    batch_size: int = 128,
    guide: Guide | None = None,
    label: int | None | Sequence[int] = None,
    part: slice = slice(None),
    given: Given | None = None,
    **call: Any,
) -> Iterator[tuple[np.ndarray, list[Subject]]]:
    """Yield (images uint8 [B, H, W, C], their subjects [B]), batch by batch and in order.

    An image depends on the checkpoint, the call, the seed, its subject and its number within the subject, but not on
    batch_size.

    Args:
        pipeline: a loaded pipeline, on its device.
        rows: classes, prompts or None, as `subjects` gives them.
        num_images: images of each row.
        seed: see `image_generators`.
        batch_size: images made at a time, the B above.
        guide: guide(classes [B]) is the pipeline's `guidance` for a batch.
        label: the class of every prompt, or a list with one for each of `rows`.
        part: which of all `len(rows) * num_images` images to make; all by default.
        given: given(places in `rows` [B]) is the pipeline's condition_image, and condition_mask, for a batch.
        call: further arguments of the pipeline's call.

    Raises:
        UserError: what the pipeline refuses.
    """
    import numpy as np

    labels = list(label) if isinstance(label, Sequence) else [label] * len(rows)

    # A batch of nothing but "no class" and empty prompts is made without guidance, which would change nothing and which the
    # pipeline refuses. A call of nothing else is left to the pipeline.
    has_negative = bool((call.get("negative_prompt") or "").strip())
    has_weak = call.get("weak_unet") is not None
    targets = guided_to(pipeline, rows, labels)

    images = Numbered(rows, num_images)
    first, last, _ = part.indices(len(images))
    for start in range(first, last, batch_size):
        batch = images[start : min(start + batch_size, last)]
        subjects_of_batch = [subject for subject, _, _ in batch]
        generators = [image_generators(seed, subject, number, 1)[0] for subject, number, _ in batch]
        arguments = {
            **call,
            "class_labels": [labels[row] if isinstance(subject, str) else subject for subject, _, row in batch],
        }
        if any(isinstance(subject, str) for subject in subjects_of_batch):
            arguments["prompt"] = [subject if isinstance(subject, str) else None for subject in subjects_of_batch]
        if guide is not None:
            arguments["guidance"] = guide(arguments["class_labels"])
        if given is not None:
            arguments |= given([row for _, _, row in batch])
        if targets and not has_negative and not has_weak and targets.isdisjoint(subjects_of_batch):
            arguments["guidance_scale"] = 1.0
        try:
            output = pipeline(**arguments, generator=generators, output_type="np").images  # [B, H, W, C] in [0, 1]
        except UserError:
            raise
        except ValueError as error:
            raise UserError(str(error)) from None
        yield np.round(output * 255).astype(np.uint8), subjects_of_batch


def generate_share(
    pipeline: LatentDiffusionPipeline,
    rows: list[Subject],
    num_images: int,
    seed: int = 0,
    batch_size: int = 128,
    report: Callable[[int], object] = lambda count: None,
    **call: Any,
) -> np.ndarray:
    """This process's share of what `generate_batches` makes: uint8 [n, H, W, C], n = 0 where processes outnumber batches.

    report: called with the number of images of each batch.
    """
    import numpy as np

    part = processes.share(len(rows) * num_images, batch_size)
    batches = list(_batches_of_part(pipeline, rows, num_images, seed, batch_size, part, report, **call))
    return np.concatenate(batches)[: part.stop - part.start]


def _batches_of_part(
    pipeline: LatentDiffusionPipeline,
    rows: list[Subject],
    num_images: int,
    seed: int,
    batch_size: int,
    part: slice,
    report: Callable[[int], object],
    **call: Any,
) -> Iterator[np.ndarray]:
    """The batches of images of a part, uint8 [B, H, W, C]. Of an empty part one image, which is reported as 0 images.

    So a process without a share refuses what the others refuse, and knows the size of an image.
    """
    total = len(rows) * num_images
    is_empty = part.start == part.stop
    part = slice(total - 1, total) if is_empty else part
    for images, _ in generate_batches(pipeline, rows, num_images, seed, batch_size, part=part, **call):
        report(0 if is_empty else len(images))
        yield images


def _write(path: Path, make: Make, names: Names, depends_on: dict[str, Any], batch_size: int, progress: bool) -> None:
    """Make the images and write them, under the lock of the folder or file; a signal ends it (see `utils.signals`)."""
    from latentdiff.utils.outputs import ImageFolder, to_folder, to_grid, to_npz

    part = processes.share(len(names), batch_size)
    with (
        signals.watched(signals.again) as watch,
        locks.locked(path, "wait for it, or name another --out", beside=bool(path.suffix)),
        progress_bars.bar(total=part.stop - part.start, unit="image", disable=not progress, delay=0.5) as bar,
    ):
        if path.suffix == ".png":
            to_grid(path, make, names, part, batch_size, bar.update)
        elif path.suffix == ".npz":
            to_npz(path, make, names, part, batch_size, bar.update)
        else:
            to_folder(ImageFolder(path, depends_on), make, names, part, batch_size, watch, bar.update)


def fingerprint(folder: Path, weak: bool = False) -> str:
    """sha256 over a checkpoint's weights and settings: all that its images depend on. weak: that they depend on weak/."""
    from latentdiff.checkpoints import weights_of

    digest = hashlib.sha256(weights_of(folder)["weights_sha256"].encode())
    others = ["model_index.json", "scheduler/scheduler_config.json", "classifier/model.safetensors"]
    for name in others + ["weak/diffusion_pytorch_model.safetensors"] * weak:
        if (folder / name).is_file():
            digest.update(name.encode() + (folder / name).read_bytes())
    return digest.hexdigest()
