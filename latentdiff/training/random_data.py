"""Random latents, labels and captions with the shapes of a config's real ones, to time steps before anything is encoded."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from latentdiff.config import DiffusionConfig
from latentdiff.data.captions import Captions
from latentdiff.models.image_condition import ImageCondition, image_condition
from latentdiff.models.text_encoder import (
    LONGEST,
    OWN_LENGTH,
    ClassCondition,
    build_text_encoder,
    longest_prompt,
    states_width,
)
from latentdiff.training.conditioning import Conditions, TextCondition
from latentdiff.training.images import Images

STAND_IN = 4096  # number of images, where it is not known


class RandomCache:
    """Random latents in place of a LatentCache, with the methods that a training step calls. Nothing is stored.

    shape: of one latent, (c, h, w), or of codes (L, h, w). count: how many images the cache claims to hold. num_codes: of the
    codebook, if there is one.

    `moments(indices)` returns standard normal means and deviations of 0, float32 [B, c, h, w], drawn anew by torch's default
    generator.
    """

    def __init__(self, shape: tuple[int, int, int], count: int, num_codes: int | None = None):
        self.latent_shape, self.count, self.num_codes = shape, count, num_codes

    def __len__(self) -> int:
        return self.count

    def moments(self, indices: Tensor, flips: Tensor | bool = False) -> tuple[Tensor, Tensor]:
        shape = (len(indices), *self.latent_shape)
        return torch.randn(shape), torch.zeros(shape)

    def codes(self, indices: Tensor, flips: Tensor | bool = False) -> Tensor:
        """Uniformly random codes, int64 [B, L, h, w]."""
        return torch.randint(self.num_codes or 1, (len(indices), *self.latent_shape))


class RandomStates:
    """Random states [B, L, d] in place of a frozen text encoder's CaptionStates on disk."""

    def __init__(self, length: int, width: int):
        self.shape = (length, width)

    def __getitem__(self, rows: Tensor) -> Tensor:
        return torch.randn(len(rows), *self.shape)


class RandomPictures:
    """Random tensors beside x_t in place of a PictureCondition. condition: their meaning. shape: of a latent, (c, h, w)."""

    def __init__(self, condition: ImageCondition, shape: tuple[int, int, int]):
        self.condition, self.shape = condition, shape

    def look_up(self, indices: Tensor, choice: Tensor, dropped: Tensor, flips: Tensor | bool) -> Tensor:
        return torch.randn(len(indices), self.condition.channels(self.shape[0]), *self.shape[1:])


class Vocabulary:
    """In place of a tokenizer that is not trained yet: what `build_text_encoder` needs from it."""

    bos_token_id, eos_token_id, pad_token_id = 0, 1, 1

    def __init__(self, size: int, length: int):
        self.size, self.model_max_length = size, length

    def __len__(self) -> int:
        return self.size


def random_conditions(
    config: DiffusionConfig, images: Images | None, class_count: int, latent_shape: tuple[int, int, int]
) -> Conditions:
    """Random labels, captions and second images, one for each image; they are drawn and dropped as in training.

    images: None where they are not there. class_count: number of classes. latent_shape: (c, h, w).
    """
    count = len(images.train) if images else STAND_IN
    joint = config.condition.effective_joint_dropout
    classes = labels = text = None
    if config.condition.includes("class"):
        classes = ClassCondition(class_count, config.condition.dropout, joint)
        labels = torch.randint(classes.num_classes, (count,))
    if config.condition.includes("text"):
        captions = images.train.captions() if images else None
        text = _text_condition(config, Captions(captions or [("a caption",)] * count))
    condition = image_condition(config.condition)
    image: Any = None if condition is None else RandomPictures(condition, latent_shape)
    return Conditions(classes, labels, text, joint, image)


def _text_condition(config: DiffusionConfig, captions: Captions) -> TextCondition:
    text = config.condition.text
    if text.encoder is not None:
        width = states_width(text.encoder)
        frozen: Any = SimpleNamespace(encoder=None, width=width)
        states: Any = RandomStates(text.max_length or min(LONGEST, longest_prompt(text.encoder) or LONGEST), width)
        return TextCondition(captions, text.dropout, frozen, states)
    # The tokenizer is not trained yet; it will have at most condition.text.vocabulary tokens
    length = text.max_length or OWN_LENGTH
    encoder = build_text_encoder(Vocabulary(text.vocabulary, length), text.width, text.layers, text.heads)
    prompt_encoder: Any = SimpleNamespace(encoder=encoder, width=text.width)
    ids = torch.randint(text.vocabulary, (len(captions.distinct), length))
    return TextCondition(captions, text.dropout, prompt_encoder, {"input_ids": ids})
