"""The plan of each stage: what there is, the trainer's own parts, a few of its steps on random data."""

from __future__ import annotations

import contextlib
from functools import partial
from pathlib import Path
from typing import Any

import torch

from latentdiff.config import AutoencoderConfig, DiffusionConfig
from latentdiff.data.captions import Captions
from latentdiff.errors import UserError
from latentdiff.models.codec import LatentCodec
from latentdiff.models.text_encoder import load_tokenizer, train_tokenizer
from latentdiff.training import conditioning, notices, precision, train_autoencoder, train_diffusion
from latentdiff.training.accelerator import start_accelerator
from latentdiff.training.autoencoder_step import update
from latentdiff.training.conditioning import Conditions
from latentdiff.training.estimate.dry_run import dry_run
from latentdiff.training.estimate.facts import data_facts, encoding, parameters, without_impossible_guidance
from latentdiff.training.estimate.inputs import Notes, find_images, first_stage, image_shape, is_here, latent_shape
from latentdiff.training.images import Images
from latentdiff.training.latents import Latents
from latentdiff.training.memory import Memory
from latentdiff.training.micro_batch import find_micro_batch
from latentdiff.training.random_data import STAND_IN, RandomCache, random_conditions
from latentdiff.training.unets import find_start, make_unet


def plan_autoencoder(config: AutoencoderConfig, notes: Notes) -> dict[str, Any]:
    where = config.model.pretrained
    if where is not None and not is_here(where):
        notes.unknown["model"] = f"{where}: no autoencoder there, nor in the Hub's cache; what it costs follows from it"
        notes.warnings.append(f"model.pretrained: {notes.unknown['model']}")
        return data_facts(config, find_images(config.data, 1, notes), None, notes)
    accelerator = start_accelerator(config.train)
    notes.say("building the autoencoder")
    vae = train_autoencoder.make_autoencoder(config)
    codec = LatentCodec(vae)
    images = find_images(config.data, codec.factor, notes)
    shape = image_shape(config.data, images, codec.factor, notes)
    train_autoencoder.to_train(config, vae)
    words: str = config.train.precision
    if shape is not None:
        trial = partial(train_autoencoder.trial_steps, config, vae, shape)
        config, words = _resolve(config, accelerator, trial, notes)
        config = find_micro_batch(config, accelerator, trial)
        accelerator = start_accelerator(config.train)
    memory = Memory(accelerator.device)
    parts = train_autoencoder.make_parts(config, vae, codec.factor, accelerator)
    facts = data_facts(config, images, shape, notes)
    facts["precision"] = words
    facts["parameters"] = parameters(autoencoder=vae, discriminator=parts.critic, perceptual_frozen=parts.perceptual)
    if shape is None:
        notes.unknown["step"] = "the shape of the images is not known"
        return facts
    facts["latent_shape"] = list(latent_shape(codec, shape))
    notes.say.release()
    notes.say(f"timing training steps in {config.train.precision}")

    def step(number: int, batch: int) -> None:
        x = torch.rand(batch, *shape) * 2 - 1
        update(_of_batch(config, batch), parts, accelerator, x.to(accelerator.device), number, config.optimizer.lr)

    steps = config.train.steps
    first = min(config.loss.adversarial_start, steps) if config.loss.adversarial > 0 else 0  # step with the adversary
    phases = [(number, count) for number, count in ((0, first), (first, steps - first)) if count]
    return facts | _measured(dry_run(step, phases, config.train, memory), notes)


def plan_diffusion(config: DiffusionConfig, path: Path, notes: Notes) -> dict[str, Any]:
    config = without_impossible_guidance(config, notes)
    notes.say(f"opening the autoencoder {config.autoencoder}")
    codec, origin = first_stage(config.autoencoder, path)
    factor = codec.factor if codec else 1
    images = find_images(config.data, factor, notes)
    if images is not None:
        conditioning.check_data(config, images)
    shape = image_shape(config.data, images, factor, notes)
    facts = data_facts(config, images, shape, notes)
    if conditioning.takes(config.condition, "text") and images is not None:
        notes.say("counting the tokens of the captions")
        notes.warnings += _caption_warnings(config, images)
    if codec is None or shape is None:
        train_diffusion.check_config(config)
        if codec is None:
            notes.unknown["autoencoder"] = origin
            notes.warnings.append(f"autoencoder: {origin}; train it first, or name another")
        notes.unknown["step"] = "the shape of the latents is not known, and the U-Net's size follows from it"
        return facts
    trained = origin == config.autoencoder
    notes.warnings += notices.first_stage_warnings(config.autoencoder) if trained else []
    facts["autoencoder"] = origin if trained else f"as {origin} will make it; not there yet"
    latents = latent_shape(codec, shape)
    facts["latent_shape"] = list(latents)
    accelerator = start_accelerator(config.train)
    codec.vae.to(accelerator.device)
    classes = class_count(config, images, notes) if conditioning.takes(config.condition, "class") else 1
    notes.say("building the U-Net")
    told = random_conditions(config, images, classes)
    agree = _shapes_agree(config, latents, told, notes)
    cached = encoding(config, codec, images, notes, trained)
    if not agree:
        return facts | cached | {"parameters": parameters(autoencoder_frozen=codec.vae)}
    trial = partial(train_diffusion.trial_steps, config, codec, images, latents, classes)
    config, facts["precision"] = _resolve(config, accelerator, trial, notes)
    config = find_micro_batch(config, accelerator, trial)
    accelerator = start_accelerator(config.train)
    notes.say(f"timing training steps in {config.train.precision}")
    memory = Memory(accelerator.device)
    cache: Any = RandomCache(latents, len(images.train) if images else STAND_IN)
    parts = train_diffusion.make_parts(config, Latents(codec, images, cache), told, accelerator)  # type: ignore[arg-type]
    parts.network.train()
    unet, text = getattr(parts.bare, "unet", parts.bare), getattr(parts.bare, "text_encoder", None)
    facts["parameters"] = parameters(unet=unet, text_encoder=text, autoencoder_frozen=codec.vae)

    def step(number: int, batch: int) -> None:
        train_diffusion.train_step(_of_batch(config, batch), parts, accelerator, number, config.optimizer.lr)

    measured = _measured(dry_run(step, [(0, config.train.steps)], config.train, memory), notes)
    if "hours" in measured and "hours" in cached:
        measured["hours"] = cached.pop("hours") | measured["hours"]
    return facts | cached | measured


def _resolve(config: Any, accelerator: Any, trial: precision.Trial, notes: Notes) -> tuple[Any, str]:
    """The config with the precision that training would choose here, and what is said of it."""
    if config.train.precision == precision.AUTO:
        notes.say.release()
        notes.say(f"timing a few steps in {' and in '.join(precision.candidates(accelerator.device))}")
    return precision.resolve(config, Path(config.output), accelerator, trial)


def _caption_warnings(config: DiffusionConfig, images: Images) -> list[str]:
    wanted, captions = config.condition.text, Captions(images.train.captions() or [])
    if wanted.encoder is not None:
        tokenizer = load_tokenizer(wanted.encoder, wanted.max_length)
    else:
        tokenizer = train_tokenizer(captions.distinct, wanted.vocabulary, wanted.max_length)
    return conditioning.caption_warnings(tokenizer, captions)


def class_count(config: DiffusionConfig, images: Images | None, notes: Notes) -> int:
    if images is not None:
        return len(images.class_names)
    if config.model.pretrained is not None:
        null = config.condition.dropout > 0 or conditioning.joint_dropout(config.condition) > 0
        return max(1, (find_start(config).config.get("num_class_embeds") or 1) - null)
    notes.unknown["classes"] = "the images are not there; the U-Net is built for one class"
    return 1


def _of_batch(config: Any, batch: int) -> Any:
    return config.model_copy(update={"train": config.train.model_copy(update={"batch_size": batch})})


def _measured(facts: dict[str, Any], notes: Notes) -> dict[str, Any]:
    """What a dry run found; its failure becomes a note."""
    if "out_of_memory" in facts:
        notes.warnings.append(facts.pop("out_of_memory"))
        notes.unknown["step"] = "the memory does not suffice for one"
    return facts


def _shapes_agree(config: DiffusionConfig, latents: tuple[int, int, int], told: Conditions, notes: Notes) -> bool:
    """Whether the U-Net takes latents [c, h, w]; notes where not. UserError where it is not the shapes that are wrong."""
    fits = config.model.pretrained is None or find_start(config).config.get("in_channels") == latents[0]
    if fits:
        train_diffusion.check_config(config)
    rows = told.classes.num_embeddings if told.classes else None
    width = told.text.prompts.width if told.text else None
    # A fresh one is looked at without memory for it; a trained one is read
    with torch.device("meta") if config.model.pretrained is None else contextlib.nullcontext():
        try:
            make_unet(config, latents, rows, width)
            return True
        except UserError as error:
            if fits:  # then it may be the sides that do not; sides that would fit raise what else is wrong
                make_unet(config, (latents[0], 256, 256), rows, width)
            notes.warnings.append(str(error))
    notes.unknown["step"] = "the shapes of autoencoder and U-Net disagree"
    return False
