"""The conditions of stage 2: the class, the caption, a second image or several of them, dropped per sample for guidance."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from latentdiff.config import ConditionConfig, DiffusionConfig, ImageConfig, TextConfig
from latentdiff.data.captions import Captions, CaptionStates, build_states
from latentdiff.errors import UserError
from latentdiff.models.image_condition import KEY
from latentdiff.models.text_encoder import (
    ClassCondition,
    PromptEncoder,
    UNetWithTextEncoder,
    build_text_encoder,
    load_prompt_encoder,
    states_width,
    token_counts,
    train_tokenizer,
)
from latentdiff.training import image_conditions
from latentdiff.training.image_conditions import PictureCondition
from latentdiff.training.images import Images
from latentdiff.training.latents import Latents
from latentdiff.utils import atomic
from latentdiff.utils.random import rand

# The key of the share of samples that lose a condition alone, in the section condition
DROPOUT_KEYS = {"class": "dropout", "text": "text.dropout", "image": "image.dropout"}


def with_recorded_dropout(config: DiffusionConfig, output: Path) -> DiffusionConfig:
    """The config of a resumed run, with the joint dropout of its run.json where the config does not set it.

    A run.json without that key is of a version that never dropped class and text together.
    """
    if "joint_dropout" in config.condition.model_fields_set:
        return config
    try:
        recorded = json.loads((output / "run.json").read_text())["condition"].get("joint_dropout", 0.0)
        condition = ConditionConfig.model_validate({**config.condition.model_dump(), "joint_dropout": recorded})
    except (OSError, ValueError, LookupError, AttributeError, RecursionError):
        return config  # a damaged record is refused later, by `run_folder.locked_run_folder`
    return config.model_copy(update={"condition": condition})


def guidance_scale(config: DiffusionConfig) -> float:
    """The guidance scale of pictures and of the published pipeline, at least 0; 1 is no guidance.

    It guides by class and text where the model has one of them, else by its second image.

    Raises:
        UserError: the config sets a scale, and training never drops the condition, so that guidance is not possible.
    """
    condition, scale = config.condition, config.sample.guidance
    by_image = condition.type == "image"
    shares = {kind: share for kind, share in condition.shares.items() if by_image or kind != "image"}
    joint = condition.effective_joint_dropout
    never = [DROPOUT_KEYS[kind] for kind, share in shares.items() if share == 0 and joint == 0]
    if shares and not never:
        return (1.0 if by_image else 1.5) if scale is None else scale
    if scale not in (None, 1.0):
        why = f"condition.{never[0]} is 0" if never else "condition.type is none"
        raise UserError(
            f"sample.guidance: {scale:g} needs an unconditional prediction, and {why}, so the model never learns one; "
            f"{'set it to 0.1' if never else 'train on a condition'}, or sample.guidance to 1"
        )
    return 1.0


def check(config: DiffusionConfig) -> None:
    """UserError, before anything is encoded, for conditions, guidance or prompts that are impossible or have no effect."""
    _refuse_unused(config)
    condition, text = config.condition, config.condition.text
    shares = [
        ("dropout", "class", condition.dropout),
        ("text.dropout", "caption", text.dropout),
        ("image.dropout", "second image", condition.image.dropout),
        ("joint_dropout", "condition" if condition.includes("image") else "class and caption", condition.joint_dropout),
    ]
    for key, kind, share in shares:
        if share == 1:
            raise UserError(
                f"condition.{key}: 1 drops every {kind}, so nothing would be learnt of them; set it below 1, or take them "
                "out of condition.type (none: no condition at all)"
            )
    if len(condition.shares) > 2 and condition.effective_joint_dropout > 0.5:
        raise UserError(
            f"condition.joint_dropout: {condition.joint_dropout:g}: with class, text and image as many samples again "
            "lose class and text alone, so it is at most 0.5"
        )
    guidance_scale(config)
    if not condition.includes("text"):
        return
    never_empty = text.dropout == 0 and condition.effective_joint_dropout == 0
    if never_empty and not all(prompt.strip() for prompt in config.sample.prompts):
        raise UserError(
            "sample.prompts: an empty prompt stands for no text, which with condition.text.dropout 0 the model never learns; "
            "leave it out, or set condition.text.dropout to 0.1"
        )
    if text.encoder is not None:
        states_width(text.encoder)
    elif text.width % text.heads:
        raise UserError(f"condition.text.width: {text.width} is not a multiple of condition.text.heads {text.heads}")


def _refuse_unused(config: DiffusionConfig) -> None:
    """UserError for a key about a condition that the model is not trained on.

    Keys with their default values pass, because run.json contains all of them.
    """
    condition = config.condition
    fields = TextConfig.model_fields
    about_text = [f"condition.text.{key}" for key in fields if getattr(condition.text, key) != fields[key].default]
    about_text += ["sample.prompts"] if config.sample.prompts else []
    about_class = ["condition.dropout"] if condition.dropout != ConditionConfig.model_fields["dropout"].default else []
    if condition.joint_dropout and len(condition.shares) < 2:
        raise UserError(
            f"condition.joint_dropout: condition.type is {condition.type}, so there are no two conditions to drop together; "
            "leave it out, or set condition.type to class+text"
        )
    fields = ImageConfig.model_fields
    about_image = [f"condition.image.{key}" for key in fields if getattr(condition.image, key) != fields[key].default]
    for kind, keys in (("text", about_text), ("class", about_class), ("image", about_image)):
        if keys and not condition.includes(kind):
            hint = "; captions are dropped by condition.text.dropout" if kind == "class" and condition.type == "text" else ""
            raise UserError(
                f"{keys[0]}: condition.type is {condition.type}, so the model is not conditioned on {kind}; leave it out, or "
                f"set condition.type to {kind} or {'class+image' if kind == 'image' else 'class+text'}{hint}"
            )
    for key, kind in (("factor", "low_resolution"), ("masks", "mask"), ("draws", "mask")):
        if f"condition.image.{key}" in about_image and condition.image.kind != kind:
            raise UserError(
                f"condition.image.{key}: is of kind {kind}, and condition.image.kind is {condition.image.kind}; leave it out"
            )


def check_data(config: DiffusionConfig, images: Images) -> None:
    """UserError where the training images or the held-out ones have no classes or captions, and the config needs them."""
    source = config.data.source
    image_conditions.check_images(config, images)
    for part in (images.train, images.held_out):
        where = "" if part is images.train else " in its held-out part"
        if config.condition.includes("class") and part.labels is None:
            raise UserError(
                f"data.source {source}: {part.source.unlabelled or f'has no classes{where}'}; "
                "or set condition.type=none (or text), or add class folders"
            )
        if config.condition.includes("text") and part.source.captions is None:
            raise UserError(
                f"data.source {source}: has no captions{where}; add a caption beside each image (a.png and a.txt), or a "
                "metadata.jsonl with file_name and text, or set condition.type=class or none"
            )
        if config.condition.includes("text"):
            without = sum(not any(texts) for texts in part.source.captions)
            if 2 * without > len(part.source):
                raise UserError(
                    f"data.source {source}: {without} of {len(part.source)} images{where} have no caption; add them, or set "
                    "condition.type=class or none"
                )


@dataclass
class TextCondition:
    """The captions of a run, in the form that the network takes.

    Attributes:
        captions: which captions each training image has, as rows of a table of the U distinct captions.
        dropout: share of samples whose caption is replaced by the empty one.
        prompt_encoder: tokenizer and text encoder.
        table: for an encoder that is trained with the U-Net, tokens of the U captions: input_ids [U, L], and attention_mask
            where it takes one. For a frozen encoder, their states [U, L, d] on disk.
    """

    captions: Captions
    dropout: float
    prompt_encoder: PromptEncoder
    table: dict[str, Tensor] | CaptionStates

    def look_up(self, rows: Tensor) -> dict[str, Tensor]:
        """Keyword arguments of the network for these rows [B] of the table, on the CPU."""
        if isinstance(self.table, dict):
            return {name: values[rows] for name, values in self.table.items()}
        return {"encoder_hidden_states": self.table[rows]}

    def encode(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """Keyword arguments of the network for any texts [B], on the CPU."""
        if isinstance(self.table, dict):
            return self.prompt_encoder.tokens(texts)
        return {"encoder_hidden_states": self.prompt_encoder.states(texts).cpu()}


@dataclass
class Conditions:
    """Everything that a run conditions the U-Net on.

    Attributes:
        classes: the rows of the U-Net's class embedding; None without classes.
        labels: classes of the training images, int64 [N].
        text: the captions; None without text.
        joint: share of samples that lose all conditions together, in addition to those that lose one of them.
        image: the second image; None without one.
    """

    classes: ClassCondition | None
    labels: Tensor | None
    text: TextCondition | None
    joint: float = 0.0
    image: PictureCondition | None = None

    def draw(self, batch: int, generator: torch.Generator) -> dict[str, Tensor]:
        """The random numbers that decide about the conditions of a global batch: uniform in [0, 1), [batch], by name."""
        # "joint" comes after these, so that they are the same numbers with and without it; an image is newer still
        names = ["class", *(["caption", "text"] if self.text else []), *(["joint"] if self.joint > 0 else [])]
        names += ["image", "picture"] if self.image else []
        return {name: rand((batch,), generator) for name in names}

    def __call__(
        self, indices: Tensor, draws: dict[str, Tensor], device: Any, flips: Tensor | bool = False
    ) -> dict[str, Tensor]:
        """Keyword arguments of the network for training images, each condition dropped where its random number says so.

        indices: of the images, int64 [B]. draws: what `draw` gave, the same B samples of it. flips: which images are mirrored,
        bool [B] or one for all.
        """
        conditioning: dict[str, Tensor] = {}
        none = torch.zeros(len(indices), dtype=torch.bool)
        everything = draws["joint"] < self.joint if self.joint > 0 else none  # [B]
        both = everything
        if self.joint > 0 and self.classes is not None and self.text is not None and self.image is not None:
            both = draws["joint"] < 2 * self.joint  # half of them keep the image
        if self.classes is not None and self.labels is not None:
            labels = self.labels[indices]
            if self.classes.null_class is not None:
                dropped = (draws["class"] < self.classes.dropout) | both
                labels = torch.where(dropped, self.classes.null_class, labels)
            conditioning |= self.classes(labels, device)
        if self.text is not None:
            rows = self.text.captions.draw(indices, draws["caption"], (draws["text"] < self.text.dropout) | both)
            conditioning |= {name: value.to(device) for name, value in self.text.look_up(rows).items()}
        if self.image is not None:
            dropped = (draws["image"] < self.image.condition.dropout) | everything
            conditioning[KEY] = self.image.look_up(indices, draws["picture"], dropped, flips).to(device)
        return conditioning

    def encode(
        self,
        labels: Tensor | None,
        texts: Sequence[str] | None,
        device: Any,
        pictures: tuple[Tensor, Tensor | None] | None = None,
    ) -> dict[str, Tensor]:
        """Keyword arguments of the network for labels [B], texts [B] and condition images; nothing is dropped.

        pictures: condition images with their masks, as `PictureCondition.of_held_out` gives them.
        """
        conditioning: dict[str, Tensor] = {}
        if self.classes is not None and labels is not None:
            conditioning |= self.classes(labels, device)
        if self.text is not None and texts is not None:
            conditioning |= {name: value.to(device) for name, value in self.text.encode(texts).items()}
        if self.image is not None and pictures is not None:
            conditioning[KEY] = self.image.encode(*pictures).to(device)
        return conditioning

    def held_out_pictures(self, images: Images, count: int) -> tuple[Tensor, Tensor | None] | None:
        """(condition images, masks or None) of `images.held_out_batch(count)`; None without a second image."""
        return None if self.image is None else self.image.of_held_out(images.held_out, images.held_out_rows(count))

    def example_captions(self, classes: Sequence[int | None]) -> list[str]:
        """Captions for pictures of these classes: each of a training image of its class.

        Without classes, of images spread over the data; there may be fewer of them than classes were given.
        ValueError where the model is not conditioned on text.
        """
        if self.text is None:
            raise ValueError("a model that is not conditioned on text has no captions")
        captions = self.text.captions
        if self.classes is None or self.labels is None:
            return captions.spread(len(classes))
        images = [torch.eq(self.labels, -1 if row is None else row).nonzero().flatten()[:1] for row in classes]
        # A class without a training image takes the first image's caption
        return [captions.first(image if len(image) else torch.zeros(1, dtype=torch.int64))[0] for image in images]


def open_text(config: DiffusionConfig, images: Images, accelerator: Any, resume: bool = False) -> tuple[Any, list[str]]:
    """(what reads the captions, warnings), before anything is encoded or written.

    For a frozen encoder, a PromptEncoder. For one that is trained with the U-Net, the main process trains its tokenizer on
    the captions. None without text, for a resumed run (which has its tokenizer), and on the other processes.
    """
    if not config.condition.includes("text"):
        return None, []
    text, captions, reader = config.condition.text, Captions(images.train.captions() or []), None
    if text.encoder is not None:
        reader = load_prompt_encoder(text.encoder, text.max_length)
    if not accelerator.is_main_process:
        return reader, []
    if text.encoder is None and not resume:
        reader = train_tokenizer(captions.distinct, text.vocabulary, text.max_length)
    tokenizer = getattr(reader, "tokenizer", reader)
    return reader, [] if tokenizer is None else caption_warnings(tokenizer, captions)


def caption_warnings(tokenizer: Any, captions: Captions) -> list[str]:
    """One warning where captions have more tokens than the encoder reads; else none."""
    length = tokenizer.model_max_length
    cut = int((token_counts(tokenizer, captions.distinct) > length)[captions.rows].sum())
    if not cut:
        return []
    return [f"{cut} of {len(captions.rows)} captions are longer than {length} tokens and are cut (condition.text.max_length)"]


def prepare_conditions(
    config: DiffusionConfig,
    latents: Latents,
    accelerator: Any,
    progress: Callable[[int, int], None] | None = None,
    reader: Any = None,
) -> Conditions:
    """The conditions of a config over its cached latents.

    The states of a frozen text encoder are written to disk, or opened where they are there. The tokenizer of an encoder
    that is trained with the U-Net is written into <output>/tokenizer, from where all processes and resumed runs read it.

    Args:
        config: of the run.
        latents: with the images and their latent cache.
        accelerator: of accelerate; every process calls this.
        progress: progress(done, total) while captions are encoded.
        reader: what `open_text` gave.

    Raises:
        UserError: states or tokenizer on disk are missing, damaged, or of other captions or another encoder.
    """
    condition, classes, text = config.condition, None, None
    if condition.includes("class"):
        classes = ClassCondition(len(latents.images.class_names), condition.dropout, condition.effective_joint_dropout)
    if condition.includes("text"):
        captions = Captions(latents.images.samples.captions(latents.cache.manifest["unreadable"]) or [])
        text = _text_condition(config, captions, accelerator, progress, reader)
    image = image_conditions.prepare(config, latents, accelerator, progress)
    return Conditions(classes, latents.cache.labels, text, condition.effective_joint_dropout, image)


def _text_condition(config: DiffusionConfig, captions: Captions, accelerator: Any, progress: Any, reader: Any) -> TextCondition:
    text = config.condition.text
    if text.encoder is None:
        tokenizer = _own_tokenizer(config, reader, accelerator)
        encoder = PromptEncoder(tokenizer, build_text_encoder(tokenizer, text.width, text.layers, text.heads))
        return TextCondition(captions, text.dropout, encoder, encoder.tokens(captions.distinct))
    reader.encoder.to(accelerator.device)
    states = build_states(
        reader,
        captions,
        Path(text.folder or Path(config.output) / "captions"),
        progress=progress,
        rank=accelerator.process_index,
        world=accelerator.num_processes,
        wait=accelerator.wait_for_everyone,
        check=config.cache.check,
    )
    return TextCondition(captions, text.dropout, reader, states)


def _own_tokenizer(config: DiffusionConfig, trained: Any, accelerator: Any) -> Any:
    """The tokenizer in <output>/tokenizer, which `trained`, if there is one, is written to first."""
    from transformers import CLIPTokenizer

    folder = Path(config.output) / "tokenizer"
    if trained is not None:
        with atomic.new_folder(folder) as new:
            trained.save_pretrained(new)
    accelerator.wait_for_everyone()
    if not (folder / "tokenizer.json").is_file():
        raise UserError(f"{folder}: the run's tokenizer is missing, and without it its captions cannot be read again")
    return CLIPTokenizer.from_pretrained(folder)


def network_of(unet: nn.Module, conditions: Conditions) -> nn.Module:
    """The network that is trained: the U-Net, together with the text encoder where that is trained too."""
    text = conditions.text
    return UNetWithTextEncoder(unet, text.prompt_encoder.encoder) if text and isinstance(text.table, dict) else unet
