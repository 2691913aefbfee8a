"""Random latents, labels, captions and states in the place of real ones, of the shapes that a config makes them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from latentdiff.config import DiffusionConfig
from latentdiff.data.captions import Captions
from latentdiff.models.text_encoder import LONGEST, OWN_LENGTH, ClassCondition, _text_config, build_text_encoder, states_width
from latentdiff.training.conditioning import Conditions, TextCondition
from latentdiff.training.images import Images

STAND_IN = 4096  # images, where it is not known how many there are


class RandomCache:
    """What a training step needs of a LatentCache."""

    def __init__(self, shape: tuple[int, int, int], count: int):
        self.latent_shape, self.count = shape, count

    def __len__(self) -> int:
        return self.count

    def moments(self, indices: Tensor, flips: Tensor | bool = False) -> tuple[Tensor, Tensor]:
        shape = (len(indices), *self.latent_shape)
        return torch.randn(shape), torch.zeros(shape)


class RandomStates:
    """Captions' states [B, L, d], as a frozen encoder's are read from disk."""

    def __init__(self, length: int, width: int):
        self.shape = (length, width)

    def __getitem__(self, rows: Tensor) -> Tensor:
        return torch.randn(len(rows), *self.shape)


class Vocabulary:
    """What the size of a text encoder needs of its tokenizer."""

    bos_token_id, eos_token_id, pad_token_id = 0, 1, 1

    def __init__(self, size: int, length: int):
        self.size, self.model_max_length = size, length

    def __len__(self) -> int:
        return self.size


def random_conditions(config: DiffusionConfig, images: Images | None, class_count: int) -> Conditions:
    """As many labels and captions as there are images, drawn and dropped as training does."""
    count = len(images.train) if images else STAND_IN
    joint = config.condition.effective_joint_dropout
    classes = labels = text = None
    if config.condition.includes("class"):
        classes = ClassCondition(class_count, config.condition.dropout, joint)
        labels = torch.randint(classes.num_classes, (count,))
    if config.condition.includes("text"):
        found = images.train.captions() if images else None
        text = _text(config, Captions(found or [("a caption",)] * count))
    return Conditions(classes, labels, text, joint)


def _text(config: DiffusionConfig, captions: Captions) -> TextCondition:
    """Of an encoder of one's own, the tokenizer is yet to be learnt: it has at most condition.text.vocabulary tokens."""
    wanted = config.condition.text
    if wanted.encoder is not None:
        width = states_width(wanted.encoder)
        frozen: Any = SimpleNamespace(encoder=None, width=width)
        known = _text_config(wanted.encoder)[0]
        longest = getattr(getattr(known, "text_config", known), "max_position_embeddings", None) or LONGEST
        states: Any = RandomStates(wanted.max_length or min(LONGEST, longest), width)
        return TextCondition(captions, wanted.dropout, frozen, states)
    length = wanted.max_length or OWN_LENGTH
    encoder = build_text_encoder(Vocabulary(wanted.vocabulary, length), wanted.width, wanted.layers, wanted.heads)
    prompts: Any = SimpleNamespace(encoder=encoder, width=wanted.width)
    ids = torch.randint(wanted.vocabulary, (len(captions.distinct), length))
    return TextCondition(captions, wanted.dropout, prompts, {"input_ids": ids})
