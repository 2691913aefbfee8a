"""What stage 2 tells the U-Net of each image: class, caption or both, dropped on their own and together, per sample."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from latentdiff.config import ConditionConfig, DiffusionConfig, TextConfig
from latentdiff.data.captions import Captions, CaptionStates, build_states
from latentdiff.errors import UserError
from latentdiff.models.text_encoder import (
    NULL_PROMPT,
    ClassCondition,
    PromptEncoder,
    UNetWithTextEncoder,
    build_text_encoder,
    load_prompt_encoder,
    states_width,
    token_counts,
    train_tokenizer,
)
from latentdiff.training.images import Images
from latentdiff.training.latents import Latents
from latentdiff.utils import atomic
from latentdiff.utils.random import rand


def with_recorded_dropout(config: DiffusionConfig, output: Path) -> DiffusionConfig:
    """The config of a run that is resumed, with the joint dropout it began with where the config leaves that open.

    A run.json without the key was written before there was one, when nothing was dropped together.
    """
    if "joint_dropout" in config.condition.model_fields_set:
        return config
    try:
        began = json.loads((output / "run.json").read_text())["condition"].get("joint_dropout", 0.0)
        condition = ConditionConfig.model_validate({**config.condition.model_dump(), "joint_dropout": began})
    except (OSError, ValueError, LookupError, AttributeError, RecursionError):
        return config  # run_folder.check_output says what is wrong with it
    return config.model_copy(update={"condition": condition})


def guidance_scale(config: DiffusionConfig) -> float:
    """The scale that pictures and the published pipeline use; UserError where it asks for what training leaves out."""
    condition, asked = config.condition, config.sample.guidance
    kept = [("dropout", "class", condition.dropout), ("text.dropout", "text", condition.text.dropout)]
    joint = condition.effective_joint_dropout
    never = [key for key, kind, share in kept if condition.includes(kind) and share == 0 and joint == 0]
    if condition.type == "none" or never:
        if asked not in (None, 1.0):
            why = f"condition.{never[0]} is 0" if never else "condition.type is none"
            raise UserError(
                f"sample.guidance: {asked:g} needs an unconditional prediction, and {why}, so the model never learns one; "
                f"{'set it to 0.1' if never else 'train on a condition'}, or sample.guidance to 1"
            )
        return 1.0
    return 1.5 if asked is None else asked


def check(config: DiffusionConfig) -> None:
    """UserError, before anything is encoded, for guidance, dropout, prompts or a text encoder that cannot be or do nothing."""
    _refuse_unused(config)
    condition, wanted = config.condition, config.condition.text
    shares = [
        ("dropout", "class", condition.dropout),
        ("text.dropout", "caption", wanted.dropout),
        ("joint_dropout", "class and caption", condition.joint_dropout),
    ]
    for key, kind, share in shares:
        if share == 1:
            raise UserError(
                f"condition.{key}: 1 drops every {kind}, so nothing would be learnt of them; set it below 1, or take them "
                "out of condition.type (none: no condition at all)"
            )
    guidance_scale(config)
    if not condition.includes("text"):
        return
    never_empty = wanted.dropout == 0 and condition.effective_joint_dropout == 0
    if never_empty and not all(text.strip() for text in config.sample.prompts):
        raise UserError(
            "sample.prompts: an empty prompt stands for no text, which with condition.text.dropout 0 the model never learns; "
            "leave it out, or set condition.text.dropout to 0.1"
        )
    if wanted.encoder is not None:
        states_width(wanted.encoder)
    elif wanted.width % wanted.heads:
        raise UserError(f"condition.text.width: {wanted.width} is not a multiple of condition.text.heads {wanted.heads}")


def _refuse_unused(config: DiffusionConfig) -> None:
    """UserError for a key that says something of a condition that the model is not told.

    Values that are the defaults pass, though nothing reads them: run.json writes them all out.
    """
    condition = config.condition
    fields = TextConfig.model_fields
    told = [f"condition.text.{key}" for key in fields if getattr(condition.text, key) != fields[key].default]
    told += ["sample.prompts"] if config.sample.prompts else []
    dropped = ["condition.dropout"] if condition.dropout != ConditionConfig.model_fields["dropout"].default else []
    if condition.joint_dropout and condition.type != "class+text":
        raise UserError(
            f"condition.joint_dropout: condition.type is {condition.type}, so there are no two conditions to drop together; "
            "leave it out, or set condition.type to class+text"
        )
    for kind, keys in (("text", told), ("class", dropped)):
        if keys and not condition.includes(kind):
            instead = "; captions are dropped by condition.text.dropout" if keys == dropped and condition.type == "text" else ""
            raise UserError(
                f"{keys[0]}: condition.type is {condition.type}, so the model is told no {kind}; leave it out, or set "
                f"condition.type to {kind} or class+text{instead}"
            )


def check_data(config: DiffusionConfig, images: Images) -> None:
    """UserError where the images, training or held-out ones, lack what the config conditions on."""
    source = config.data.source
    for part in (images.train, images.held_out):
        apart = "" if part is images.train else " in its held-out part"
        if config.condition.includes("class") and part.labels is None:
            raise UserError(
                f"data.source {source}: {part.source.unlabelled or f'has no classes{apart}'}; "
                "or set condition.type=none (or text), or add class folders"
            )
        if config.condition.includes("text") and part.source.captions is None:
            raise UserError(
                f"data.source {source}: has no captions{apart}; add a caption beside each image (a.png and a.txt), or a "
                "metadata.jsonl with file_name and text, or set condition.type=class or none"
            )
        if config.condition.includes("text"):
            without = sum(not any(texts) for texts in part.source.captions)
            if 2 * without > len(part.source):
                raise UserError(
                    f"data.source {source}: {without} of {len(part.source)} images{apart} have no caption; add them, or set "
                    "condition.type=class or none"
                )


@dataclass
class TextCondition:
    """Captions as the network takes them: tokens for an encoder trained with it, states of a frozen one.

    table: input_ids [U, L] (and attention_mask), or the cached states, of the U distinct captions.
    """

    captions: Captions
    dropout: float
    prompt_encoder: PromptEncoder
    table: dict[str, Tensor] | CaptionStates

    def rows(self, rows: Tensor) -> dict[str, Tensor]:
        if isinstance(self.table, dict):
            return {name: values[rows] for name, values in self.table.items()}
        return {"encoder_hidden_states": self.table[rows]}

    def of(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """The same for any texts [B]."""
        if isinstance(self.table, dict):
            return self.prompt_encoder.tokens(texts)
        return {"encoder_hidden_states": self.prompt_encoder.states(texts).cpu()}


@dataclass
class Conditions:
    """All that a run conditions on. labels: int64 [N] of the training images, where classes count.

    joint: share of samples that lose class and text together, besides those that lose either on its own.
    """

    classes: ClassCondition | None
    labels: Tensor | None
    text: TextCondition | None
    joint: float = 0.0

    def draw(self, batch: int, generator: torch.Generator) -> dict[str, Tensor]:
        """What is random about the conditions of a global batch: uniform numbers [batch] by name."""
        # "joint" comes last, so that the others are the same numbers with and without it
        names = ["class", *(["caption", "text"] if self.text else []), *(["joint"] if self.joint > 0 else [])]
        return {name: rand((batch,), generator) for name in names}

    def __call__(self, indices: Tensor, draws: dict[str, Tensor], device: Any) -> dict[str, Tensor]:
        """Keywords of the network for training images [B], each condition dropped where its number says so."""
        conditioning: dict[str, Tensor] = {}
        both = draws["joint"] < self.joint if self.joint > 0 else torch.zeros(len(indices), dtype=torch.bool)  # [B]
        if self.classes is not None and self.labels is not None:
            labels = self.labels[indices]
            if self.classes.null_class is not None:
                dropped = (draws["class"] < self.classes.dropout) | both
                labels = torch.where(dropped, self.classes.null_class, labels)
            conditioning |= self.classes(labels, device)
        if self.text is not None:
            rows = self.text.captions.draw(indices, draws["caption"], (draws["text"] < self.text.dropout) | both)
            conditioning |= {name: value.to(device) for name, value in self.text.rows(rows).items()}
        return conditioning

    def of(self, labels: Tensor | None, texts: Sequence[str] | None, device: Any) -> dict[str, Tensor]:
        """Keywords for given labels [B] and texts [B], nothing dropped."""
        conditioning: dict[str, Tensor] = {}
        if self.classes is not None and labels is not None:
            conditioning |= self.classes(labels, device)
        if self.text is not None and texts is not None:
            conditioning |= {name: value.to(device) for name, value in self.text.of(texts).items()}
        return conditioning

    def shown(self, classes: Sequence[int | None]) -> list[str]:
        """Captions to draw beside these classes: each of a training image of the class, or spread over the data.

        There may be fewer than classes where the data have fewer images. ValueError where the model is told no text.
        """
        if self.text is None:
            raise ValueError("a model that is told no text has no captions to show")
        captions = self.text.captions
        if self.classes is None or self.labels is None:
            return captions.spread(len(classes))
        images = [torch.eq(self.labels, -1 if row is None else row).nonzero().flatten()[:1] for row in classes]
        # A class without a training image is drawn with the caption of any
        return [captions.first(image if len(image) else torch.zeros(1, dtype=torch.int64))[0] for image in images]


def open_text(config: DiffusionConfig, images: Images, accelerator, resume: bool = False) -> tuple[Any, list[str]]:
    """(what reads the captions, what it warns of), before anything is encoded or written.

    A frozen encoder with its tokenizer; or the tokenizer of an encoder of one's own, learnt by the main process. None for a
    model that is told no text, where the run has its tokenizer, and on the other processes.
    """
    if not config.condition.includes("text"):
        return None, []
    wanted, captions, reader = config.condition.text, Captions(images.train.captions() or []), None
    if wanted.encoder is not None:
        reader = load_prompt_encoder(wanted.encoder, wanted.max_length)
    if not accelerator.is_main_process:
        return reader, []
    if wanted.encoder is None and not resume:
        reader = train_tokenizer(captions.distinct, wanted.vocabulary, wanted.max_length)
    tokenizer = getattr(reader, "tokenizer", reader)
    return reader, [] if tokenizer is None else caption_warnings(tokenizer, captions)


def caption_warnings(tokenizer: Any, captions: Captions) -> list[str]:
    """A warning where captions have more tokens than the encoder is given."""
    length = tokenizer.model_max_length
    cut = int((token_counts(tokenizer, captions.distinct) > length)[captions.rows].sum())
    said = f"{cut} of {len(captions.rows)} captions are longer than {length} tokens and are cut (condition.text.max_length)"
    return [said] if cut else []


def prepare_conditions(
    config: DiffusionConfig,
    latents: Latents,
    accelerator,
    progress: Callable[[int, int], None] | None = None,
    reader: Any = None,
) -> Conditions:
    """The conditions of a config over its cached latents; a frozen encoder's states are built or opened on disk.

    reader: what `open_text` gave. The tokenizer of an encoder of one's own is written into <output>/tokenizer, and read by
    all processes, and by a resumed run.
    """
    condition, classes, text = config.condition, None, None
    if condition.includes("class"):
        classes = ClassCondition(len(latents.images.class_names), condition.dropout, condition.effective_joint_dropout)
    if condition.includes("text"):
        found = latents.images.train.captions(latents.cache.manifest["unreadable"])
        text = _text(config, Captions(found or []), accelerator, progress, reader)
    return Conditions(classes, latents.cache.labels, text, condition.effective_joint_dropout)


def _text(config: DiffusionConfig, captions: Captions, accelerator, progress, reader: Any) -> TextCondition:
    wanted = config.condition.text
    if wanted.encoder is None:
        tokenizer = _own_tokenizer(config, reader, accelerator)
        prompts = PromptEncoder(tokenizer, build_text_encoder(tokenizer, wanted.width, wanted.layers, wanted.heads))
        return TextCondition(captions, wanted.dropout, prompts, prompts.tokens(captions.distinct))
    reader.encoder.to(accelerator.device)
    folder = Path(wanted.folder or Path(config.output) / "captions")
    states = build_states(
        reader,
        captions,
        folder,
        progress=progress,
        rank=accelerator.process_index,
        world=accelerator.num_processes,
        wait=accelerator.wait_for_everyone,
        check=config.cache.check,
    )
    return TextCondition(captions, wanted.dropout, reader, states)


def _own_tokenizer(config: DiffusionConfig, learnt: Any, accelerator) -> Any:
    from transformers import CLIPTokenizer

    folder = Path(config.output) / "tokenizer"
    if learnt is not None:
        with atomic.new_folder(folder) as new:
            learnt.save_pretrained(new)
    accelerator.wait_for_everyone()
    if not (folder / "tokenizer.json").is_file():
        raise UserError(f"{folder}: the run's tokenizer is missing, and without it its captions cannot be read again")
    return CLIPTokenizer.from_pretrained(folder)


def network_of(unet: nn.Module, conditions: Conditions) -> nn.Module:
    """What is trained: the U-Net, with the text encoder where that is trained too."""
    text = conditions.text
    return UNetWithTextEncoder(unet, text.prompt_encoder.encoder) if text and isinstance(text.table, dict) else unet


def pipeline_pieces(network: nn.Module, conditions: Conditions, class_names: list[str]) -> dict[str, Any]:
    """U-Net, text encoder, tokenizer, class names and what stands for "nothing", as the pipeline takes them."""
    together, text, classes = isinstance(network, UNetWithTextEncoder), conditions.text, conditions.classes
    return {
        "unet": network.unet if together else network,
        "text_encoder": network.text_encoder if together else text and text.prompt_encoder.encoder,
        "tokenizer": text and text.prompt_encoder.tokenizer,
        "class_names": class_names if classes else None,
        "null_class": classes.null_class if classes else None,
        "null_prompt": NULL_PROMPT if text and (text.dropout > 0 or conditions.joint > 0) else None,
    }
