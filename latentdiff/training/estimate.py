"""What a run will cost, and what is likely wrong with its config, before it starts: behind `latentdiff info CONFIG`.

The trainers' own networks and steps run on random data, so what is measured is what training does. Nothing is written to
disk, and nothing is fetched from the Hub.
"""

from __future__ import annotations

import contextlib
import math
import os
import statistics
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from latentdiff.config import (
    AutoencoderConfig,
    Config,
    DataConfig,
    DiffusionConfig,
    DiscreteConfig,
    Stage2Config,
    load_config,
    parse_config,
)
from latentdiff.data.captions import Captions
from latentdiff.data.sources import open_source
from latentdiff.data.tables import HUB_NAME
from latentdiff.data.tensor_shards import read_manifest
from latentdiff.data.transforms import Preprocess
from latentdiff.errors import UserError
from latentdiff.models.autoencoder import load_autoencoder
from latentdiff.models.code_unet import make_code_unet
from latentdiff.models.codec import LatentCodec
from latentdiff.models.image_condition import extra_channels
from latentdiff.models.text_encoder import load_tokenizer, train_tokenizer
from latentdiff.models.unet import find_pretrained, make_unet
from latentdiff.training import bridge, conditioning, messages, precision, train_autoencoder
from latentdiff.training.accelerator import start_accelerator
from latentdiff.training.conditioning import Conditions
from latentdiff.training.dry_run import dry_run, three_figures
from latentdiff.training.images import Images, columns_of
from latentdiff.training.latents import TOLERANCE, Latents, cache_bytes, cache_folder, cached_shape, check_codebook, shape_of
from latentdiff.training.memory import Memory
from latentdiff.training.micro_batch import find_micro_batch
from latentdiff.training.random_data import STAND_IN, RandomCache, random_conditions
from latentdiff.training.train_discrete import of_stage
from latentdiff.utils.json_files import read_json

HOLD_BACK = 2.0  # seconds for which the first progress lines wait
ENCODED = 256  # images that are encoded to time it and to check the normaliser
ENCODING_LIMIT = 5.0  # seconds after which that stops
DAY = 24.0  # hours; a longer run on a CPU is warned of


class PlanningProgress:
    """Prints a line on stderr for each stage of the planning, which may take minutes. A context manager.

    The first lines are held back for HOLD_BACK seconds: a mistake in the config is mostly found in that time, and is then
    the only line on stderr. They are printed after that time, or as soon as the config cannot be refused any more
    (`release`), and are dropped where the block ends in an error.
    """

    def __init__(self) -> None:
        self._held: list[str] | None = []
        self._lock = threading.Lock()
        self._timer = threading.Timer(HOLD_BACK, self.release)
        self._timer.daemon = True

    def __call__(self, line: str) -> None:
        with self._lock:
            if self._held is not None:
                self._held.append(line)
                return
        print(f"info: {line}", file=sys.stderr, flush=True)

    def release(self) -> None:
        """Print the lines that were held back; later ones are printed at once."""
        with self._lock:
            held, self._held = self._held or [], None
        for line in held:
            print(f"info: {line}", file=sys.stderr, flush=True)

    def __enter__(self) -> PlanningProgress:
        self._timer.start()
        return self

    def __exit__(self, kind: object, *error: object) -> None:
        self._timer.cancel()
        if kind is None:
            self.release()


@dataclass
class Notes:
    """What the planning says in words.

    Attributes:
        progress: takes a line on what the planning is doing.
        unknown: {part: why it is not known}.
        warnings: what is likely a mistake in the config.
    """

    progress: PlanningProgress
    unknown: dict[str, str] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)


def plan(config: Config, path: Path) -> dict[str, Any]:
    """Facts of a stage-1 or stage-2 config that was read from `path`, as JSON values; {} for a config of another stage.

    Besides data, parameters, step, memory and hours: `warnings`, and `unknown`, a reason for each part that cannot be known
    yet. Prints a line on stderr for each stage of the planning.

    Raises:
        UserError: training would refuse the config, for a reason that is not among those warned of.
    """
    if not isinstance(config, AutoencoderConfig | Stage2Config):
        return {}
    threads = torch.get_num_threads()
    try:
        with torch.random.fork_rng(), PlanningProgress() as progress:
            notes = Notes(progress)
            if config.train.minutes is None:  # otherwise the length follows from the time of a step
                notes.warnings += messages.length_warnings(config)
            if config.train.compile:
                notes.unknown["compile"] = "it takes minutes and writes to disk, so the steps are timed without it"
            if isinstance(config, AutoencoderConfig):
                facts = _plan_autoencoder(config, notes)
            else:
                facts = _plan_diffusion(config, path, notes)
            config = _as_long_as_its_minutes(config, facts, notes)
            _say_time(config, facts, notes)
    finally:
        torch.set_num_threads(threads)
    return {**facts, "warnings": notes.warnings, "unknown": notes.unknown}


def _plan_autoencoder(config: AutoencoderConfig, notes: Notes) -> dict[str, Any]:
    pretrained = config.model.pretrained
    if pretrained is not None and not _is_here(pretrained):
        notes.unknown["model"] = f"{pretrained}: no autoencoder there, nor in the Hub's cache; what it costs follows from it"
        notes.warnings.append(f"model.pretrained: {notes.unknown['model']}")
        return _data_facts(config, _find_images(config.data, 1, notes), None, notes)
    # Network and images
    accelerator = start_accelerator(config.train)
    notes.progress("building the autoencoder")
    vae = train_autoencoder.make_autoencoder(config)
    codec = LatentCodec(vae)
    images = _find_images(config.data, codec.factor, notes)
    shape = _image_shape(config.data, images, codec.factor, notes)
    # Precision and micro-batch, as training chooses them
    chosen: str = config.train.precision
    if shape is not None:
        trial = partial(train_autoencoder.trial_steps, config, vae, shape)
        config, chosen = _resolve(config, accelerator, trial, notes)
        config = find_micro_batch(config, accelerator, trial)
        accelerator = start_accelerator(config.train)
    memory = Memory(accelerator.device)
    trainer = train_autoencoder.AutoencoderTrainer(config, vae, images, accelerator)
    facts = _data_facts(config, images, shape, notes)
    facts["precision"] = chosen
    facts["parameters"] = _parameters(
        autoencoder=vae, discriminator=trainer.discriminator, perceptual_frozen=trainer.perceptual
    )
    if shape is None:
        notes.unknown["step"] = "the shape of the images is not known"
        return facts
    facts["latent_shape"] = list(codec.latent_shape(*shape[1:]))
    # Steps before the discriminator takes part, and steps with it
    notes.progress.release()
    notes.progress(f"timing training steps in {config.train.precision}")

    def step(number: int, batch: int) -> None:
        x = torch.rand(batch, *shape) * 2 - 1
        trainer.config = _with_batch(config, batch)
        trainer.update(x.to(accelerator.device), number, config.optimizer.lr)

    steps = config.train.steps
    first = min(config.loss.adversarial_start, steps) if config.loss.adversarial > 0 else 0
    phases = [(number, count) for number, count in ((0, first), (first, steps - first)) if count]
    return facts | _note_memory(dry_run(step, phases, config.train, memory), notes)


def _plan_diffusion(config: Stage2Config, path: Path, notes: Notes) -> dict[str, Any]:
    config = _without_impossible_guidance(config, notes)
    check, trainer_class = of_stage(config)
    # What is there: autoencoder, images, captions
    notes.progress(f"opening the autoencoder {config.autoencoder}")
    codec, origin = _find_autoencoder(config.autoencoder, path)
    factor = codec.factor if codec else 1
    images = _find_images(config.data, factor, notes)
    if images is not None:
        conditioning.check_data(config, images)
    shape = _image_shape(config.data, images, factor, notes)
    facts = _data_facts(config, images, shape, notes)
    if config.condition.includes("text") and images is not None:
        notes.progress("counting the tokens of the captions")
        notes.warnings += _caption_warnings(config, images)
    if codec is None or shape is None:
        check(config)
        if codec is None:
            notes.unknown["autoencoder"] = origin
            notes.warnings.append(f"autoencoder: {origin}; train it first, or name another")
        notes.unknown["step"] = "the shape of the latents is not known, and the U-Net's size follows from it"
        return facts
    trained = origin == config.autoencoder
    notes.warnings += messages.autoencoder_warnings(config.autoencoder) if trained else []
    facts["autoencoder"] = origin if trained else f"as {origin} will make it; not there yet"
    check_codebook(config, codec)
    latent_shape = shape_of(config, codec, *shape[1:])
    facts["latent_shape"] = list(latent_shape)
    # U-Net and conditions, on random data
    accelerator = start_accelerator(config.train)
    codec.vae.to(accelerator.device)
    classes = _class_count(config, images, notes) if config.condition.includes("class") else 1
    notes.progress("building the U-Net")
    conditions = random_conditions(config, images, classes, latent_shape)
    fits = _unet_fits(config, latent_shape, conditions, notes, codec.num_codes)
    cached = _encoding_facts(config, codec, images, notes, trained)
    if config.bridge is not None:
        source = bridge.source_config(config)
        source_images = _find_images(source.data, factor, notes)
        of_source = _encoding_facts(source, codec, source_images, notes, trained)
        if source_images is not None:
            of_source |= {"source": config.bridge.source, "images": len(source_images.train)}
        if "hours" in of_source and "hours" in cached:
            both = of_source.pop("hours")["encoding"] + cached["hours"]["encoding"]
            cached["hours"]["encoding"] = three_figures(both)
        facts["bridge"] = of_source
    if not fits:
        return facts | cached | {"parameters": _parameters(autoencoder_frozen=codec.vae)}
    # Precision and micro-batch, as training chooses them
    trial = partial(trainer_class.trial_steps, config, codec, images, latent_shape, classes)
    config, facts["precision"] = _resolve(config, accelerator, trial, notes)
    config = find_micro_batch(config, accelerator, trial)
    accelerator = start_accelerator(config.train)
    # Steps
    notes.progress(f"timing training steps in {config.train.precision}")
    memory = Memory(accelerator.device)
    cache: Any = RandomCache(latent_shape, len(images.train) if images else STAND_IN, codec.num_codes)
    latents = Latents(codec, images, cache)  # type: ignore[arg-type]
    trainer = trainer_class(config, latents, conditions, accelerator)
    unet, text_encoder = getattr(trainer.model, "unet", trainer.model), getattr(trainer.model, "text_encoder", None)
    facts["parameters"] = _parameters(unet=unet, text_encoder=text_encoder, autoencoder_frozen=codec.vae)

    def step(number: int, batch: int) -> None:
        trainer.config = _with_batch(config, batch)
        trainer.train_step(number, config.optimizer.lr)

    measured = _note_memory(dry_run(step, [(0, config.train.steps)], config.train, memory), notes)
    if "hours" in measured and "hours" in cached:
        measured["hours"] = cached.pop("hours") | measured["hours"]
    return facts | cached | measured


# What the run reads, as far as it is there


def _is_here(name: str) -> bool:
    """Whether an autoencoder can be read without fetching it: a folder, or a Hub name that was fetched before."""
    if any((Path(name) / part / "config.json").is_file() for part in ("", "autoencoder", "vae")):
        return True
    if Path(name).exists() or name.count("/") != 1 or name.startswith((".", "/")):
        return False
    from huggingface_hub import try_to_load_from_cache

    with contextlib.suppress(ValueError):  # not a name that the Hub could have
        return any(isinstance(try_to_load_from_cache(name, f"{part}config.json"), str) for part in ("", "vae/"))
    return False


def _find_autoencoder(name: str, path: Path) -> tuple[LatentCodec | None, str]:
    """(the autoencoder, where it is from): `name` itself, or a config that will train it there, with random weights.

    Such a config is looked for in the record of a run in that folder, beside the config at `path`, and one folder up.
    (None, the reason) where there is neither.
    """
    if _is_here(name):
        return LatentCodec(load_autoencoder(name)), name
    record = Path(name) / "run.json"
    above = Path(os.path.normpath(path.parent / ".."))
    for place in (record, *sorted(path.parent.glob("*.yaml")), *sorted(above.glob("*.yaml"))):
        config = None
        with contextlib.suppress(UserError, OSError):  # another config, which may be wrong, or no config at all
            config = parse_config(read_json(place), str(place)) if place == record else load_config(place)
        if not isinstance(config, AutoencoderConfig) or (place != record and Path(config.output) != Path(name)):
            continue
        if config.model.pretrained is None or _is_here(config.model.pretrained):
            return LatentCodec(train_autoencoder.make_autoencoder(config)), str(place)
    return None, f"{name}: there is none yet, and no config beside this one makes it; a Hub name is not fetched for this"


def _find_images(data: DataConfig, factor: int, notes: Notes) -> Images | None:
    """The images; None with a note where they are not there. UserError where they are and the config does not fit them."""
    notes.progress(f"reading the images of {data.source}")
    exists = Path(data.source).expanduser().exists()
    if not exists and ("://" in data.source or HUB_NAME.fullmatch(data.source)):
        notes.unknown["data"] = f"{data.source}: no such folder; a data set of the Hub, or elsewhere, is not fetched for this"
        return None
    try:
        return Images(data, factor)
    except UserError as error:
        if exists or _opens(data):
            raise
        notes.unknown["data"] = f"{error}; the number of images, and what follows from it, is not known"
        return None


def _opens(data: DataConfig) -> bool:
    try:
        open_source(data.source, "train", data.channels, data.max_bad_share, columns_of(data), data.streaming)
        return True
    except UserError:
        return False


def _image_shape(data: DataConfig, images: Images | None, factor: int, notes: Notes) -> tuple[int, int, int] | None:
    """(C, H, W) of the image tensors; None with a note where the size follows from images that are not there."""
    multiple = math.lcm(factor, data.multiple_of)
    preprocess = images.preprocess if images else Preprocess(data.size, data.channels, data.framing, multiple)
    if preprocess.size is None:
        notes.unknown["shapes"] = "data.size is not set and the images are not there; set data.size to plan without them"
        return None
    return (data.channels, *preprocess.padded_size)


def _class_count(config: Stage2Config, images: Images | None, notes: Notes) -> int:
    if images is not None:
        return len(images.class_names)
    if config.model.pretrained is not None:
        null_class = config.condition.dropout > 0 or config.condition.effective_joint_dropout > 0
        return max(1, (find_pretrained(config).config.get("num_class_embeds") or 1) - null_class)
    notes.unknown["classes"] = "the images are not there; the U-Net is built for one class"
    return 1


# Facts and warnings


def _data_facts(
    config: AutoencoderConfig | Stage2Config, images: Images | None, shape: tuple[int, int, int] | None, notes: Notes
) -> dict[str, Any]:
    """shape: (C, H, W) of the tensors, if known. Warns where the run's length does not suit the number of images."""
    facts: dict[str, Any] = {"source": config.data.source}
    if images is not None:
        count = len(images.train)
        facts |= images.facts() | {"classes": len(images.class_names)}
        # The first line only counts
        notes.warnings += [f"data {config.data.source}: {line}" for line in images.report_lines()[1:]]
        if config.train.minutes is None:
            facts["epochs"] = three_figures(config.train.steps * config.train.batch_size / count)
            notes.warnings += messages.data_warnings(config, count)
    return {"data": facts | ({"tensor": list(shape)} if shape else {})}


def _parameters(**modules: nn.Module | None) -> dict[str, int]:
    return {name: sum(p.numel() for p in module.parameters()) for name, module in modules.items() if module is not None}


def _without_impossible_guidance(config: Stage2Config, notes: Notes) -> Stage2Config:
    """The config; where its guidance scale needs what training leaves out, a warning, and the config without the scale."""
    try:
        conditioning.guidance_scale(config)
        return config
    except UserError as error:
        notes.warnings.append(str(error))
        return config.model_copy(update={"sample": config.sample.model_copy(update={"guidance": None})})


def _caption_warnings(config: Stage2Config, images: Images) -> list[str]:
    text, captions = config.condition.text, Captions(images.train.captions() or [])
    if text.encoder is not None:
        tokenizer = load_tokenizer(text.encoder, text.max_length)
    else:
        tokenizer = train_tokenizer(captions.distinct, text.vocabulary, text.max_length)
    return conditioning.caption_warnings(tokenizer, captions)


def _unet_fits(
    config: Stage2Config, latent_shape: tuple[int, int, int], conditions: Conditions, notes: Notes, num_codes: int | None
) -> bool:
    """Whether the U-Net takes latents (c, h, w); notes where not. UserError where something else than the shape is wrong.

    num_codes: K; latent_shape is then (L, h, w), of codes.
    """
    channels = latent_shape[0]
    channels_fit = True
    make: Callable[..., Any] = make_unet
    if isinstance(config, DiscreteConfig):
        make = partial(make_code_unet, num_codes=num_codes)  # which makes the layers that are of other channels anew
    elif config.model.pretrained is not None:
        taken = channels, channels + extra_channels(config.condition, channels)
        channels_fit = find_pretrained(config).config.get("in_channels") in taken
    if channels_fit:
        of_stage(config)[0](config)
    rows = conditions.classes.num_embeddings if conditions.classes else None
    width = conditions.text.prompt_encoder.width if conditions.text else None
    # A new U-Net is built without memory for its weights; a trained one is read
    with torch.device("meta") if config.model.pretrained is None else contextlib.nullcontext():
        try:
            make(config, latent_shape, num_class_embeds=rows, text_width=width)
            return True
        except UserError as error:
            if channels_fit:  # the sides may be wrong; with sides that fit, this raises whatever else is wrong
                make(config, (latent_shape[0], 256, 256), num_class_embeds=rows, text_width=width)
            notes.warnings.append(str(error))
    notes.unknown["step"] = "the shapes of autoencoder and U-Net disagree"
    return False


def _encoding_facts(
    config: Stage2Config, codec: LatentCodec, images: Images | None, notes: Notes, trained: bool
) -> dict[str, Any]:
    """Size of the latent cache and hours to build it. trained: False where the codec has random weights."""
    name, stored = f"autoencoder {config.autoencoder}", codec.vae.config
    keys = "(scaling_factor, or latents_mean and latents_std, in its config.json)"
    normalised = getattr(stored, "latents_mean", None) or getattr(stored, "scaling_factor", None)
    is_stored = trained and isinstance(config, DiffusionConfig) and config.normaliser == "stored"
    if is_stored and not normalised:
        notes.warnings.append(f"{name}: has no normaliser {keys}; set normaliser=measured")
    channels_fit = codec.image_channels == config.data.channels
    if not channels_fit:
        notes.warnings.append(f"data.channels: {config.data.channels}, but the {name} takes {codec.image_channels}")
    if images is None:
        return {}
    finished = read_manifest(cache_folder(config)) is not None
    size = cache_bytes(config, len(images.samples), cached_shape(config, codec, images))
    facts: dict[str, Any] = {"latent_cache": {"folder": str(cache_folder(config)), "bytes": size, "finished": finished}}
    if not channels_fit:
        return facts
    notes.progress.release()
    notes.progress("encoding a few images, for the time it takes")
    rms, seconds = _encode_some(codec, images)
    if is_stored and normalised and not 1 / TOLERANCE <= rms <= TOLERANCE:
        notes.warnings.append(
            f"{name}: its normaliser {keys} gives latents of this data a root mean square of {rms:.3g} instead of 1; set "
            "normaliser=measured"
        )
    images_to_encode = 0 if finished else len(images.samples) * (1 + config.data.flips)
    return facts | {"hours": {"encoding": three_figures(seconds * images_to_encode / 3600)}}


@torch.no_grad()
def _encode_some(codec: LatentCodec, images: Images) -> tuple[float, float]:
    """(root mean square of normalised latents, seconds an image) over a few images spread over the data."""
    n, began = len(images.train), time.perf_counter()
    squares, seconds = [], []
    for rows in torch.linspace(0, n - 1, min(n, ENCODED)).long().split(16):
        start = time.perf_counter()
        mean, std = codec.moments(images.train.batch(rows)[0])
        squares.append(float(codec.normalise(mean + std * torch.randn_like(mean)).square().mean()))
        seconds.append((time.perf_counter() - start) / len(rows))
        if time.perf_counter() - began > ENCODING_LIMIT:
            break
    return math.sqrt(statistics.mean(squares)), statistics.median(seconds)


def _resolve(config: Any, accelerator: Any, trial: precision.Trial, notes: Notes) -> tuple[Any, str]:
    """(the config with the precision that training would choose here, that precision and the reason for it in words)."""
    if config.train.precision == precision.AUTO:
        notes.progress.release()
        notes.progress(f"timing a few steps in {' and in '.join(precision.candidates(accelerator.device))}")
    return precision.resolve(config, Path(config.output), accelerator, trial)


def _with_batch(config: Any, batch: int) -> Any:
    return config.model_copy(update={"train": config.train.model_copy(update={"batch_size": batch})})


def _note_memory(facts: dict[str, Any], notes: Notes) -> dict[str, Any]:
    """The facts of a dry run; where it ran out of memory, a warning and a note."""
    if "out_of_memory" in facts:
        notes.warnings.append(facts.pop("out_of_memory"))
        notes.unknown["step"] = "the memory does not suffice for one"
    return facts


def _as_long_as_its_minutes(config: Any, facts: dict[str, Any], notes: Notes) -> Any:
    """The config with the steps that its train.minutes allow on this machine; the facts then tell them, and their hours.

    Without train.minutes, or where the time of a step is not known, the config is as it was.
    """
    if config.train.minutes is None:
        return config
    hours, data = facts.get("hours"), facts.get("data", {})
    if hours is None or "step" not in facts:
        notes.unknown["steps"] = "train.minutes ends the run, and the time of a step is not known"
        return config
    # Encoding is a part of the minutes
    left = max(0.0, config.train.minutes / 60 - hours.get("encoding", 0.0))
    steps = min(config.train.steps, max(1, int(left * 3600 / facts["step"]["seconds"])))
    hours["training"] = min(hours["training"], three_figures(left))
    facts["steps"] = steps
    config = config.model_copy(update={"train": config.train.model_copy(update={"steps": steps, "minutes": None})})
    notes.progress(f"train.minutes: about {steps} steps, of {three_figures(facts['step']['seconds'])} s each")
    notes.warnings += messages.length_warnings(config)
    if "images" in data:
        data["epochs"] = three_figures(steps * config.train.batch_size / data["images"])
        notes.warnings += messages.data_warnings(config, data["images"])
    return config


def _say_time(config: AutoencoderConfig | Stage2Config, facts: dict[str, Any], notes: Notes) -> None:
    """Print how long the run takes here, and warn where that is days of a CPU."""
    hours, step = facts.get("hours"), facts.get("step")
    if hours is None or step is None:
        return
    parts = " and ".join(f"{value:.2g} h of {name}" for name, value in hours.items())
    where = f"{step['device']}, {step['threads']} CPU thread(s), {step['precision']}"
    notes.progress(f"on this machine ({where}) the run takes {parts}")
    asked_for = "steps" in facts  # by train.minutes
    if step["device"] != "cpu" or hours["training"] <= DAY or asked_for:
        return
    steps = int(config.train.steps * DAY / hours["training"])
    narrower = "a smaller data.size" + (" or model.config.block_out_channels" if config.model.pretrained is None else "")
    notes.warnings.append(
        f"train.steps: the run takes {hours['training'] / DAY:.1f} days of this CPU; {steps} steps take one. Lower it, set "
        f"{narrower}, or train on a GPU"
    )
