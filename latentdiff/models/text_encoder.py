"""Class labels and text as inputs of the U-Net, with per-sample dropout for classifier-free guidance (arXiv:2207.12598)."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from latentdiff.errors import UserError
from latentdiff.models.loading import load_part, quiet, refuse_code
from latentdiff.utils.random import rand

OWN_LENGTH = 32  # tokens of a prompt, for a text encoder that is trained with the U-Net
LONGEST = 128  # most tokens of a prompt for a pretrained encoder, unless the config sets another length
NULL_PROMPT = ""  # replaces a dropped prompt
# model_type of a config: the class of the text encoder alone. AutoModel for others
ENCODERS = {
    "clip": "CLIPTextModel",
    "clip_text_model": "CLIPTextModel",
    "t5": "T5EncoderModel",
    "mt5": "MT5EncoderModel",
    "umt5": "UMT5EncoderModel",
}


def drop(
    labels: torch.Tensor,
    null_class: int,
    p: float,
    generator: torch.Generator | list[torch.Generator] | None = None,
) -> torch.Tensor:
    """Labels [B], each replaced by `null_class` with probability p, independently. The input is not changed.

    generator: one for the batch, or a list of one for each label; with a list, a label's result is the same in any batch.
    """
    dropped = rand((labels.shape[0],), generator, labels.device, torch.float32) < p  # [B]
    return torch.where(dropped, torch.full_like(labels, null_class), labels)


@dataclass(frozen=True)
class ClassCondition:
    """The meaning of the rows of the U-Net's class embedding: one a class, then the null class if there is one.

    Args:
        num_classes: classes; they are rows 0 to num_classes - 1.
        dropout: probability, below 1, that training replaces a label by the null class.
        joint: probability, below 1, that training drops class and text together. Where both are 0, there is no null class,
            and classifier-free guidance by class is not possible.

    Raises:
        UserError: a number is out of its range.
    """

    num_classes: int
    dropout: float = 0.1
    joint: float = 0.0

    def __post_init__(self) -> None:
        if self.num_classes < 1:
            raise UserError(f"num_classes {self.num_classes}: a class condition needs at least one class")
        if not 0 <= self.dropout < 1:
            raise UserError(f"class dropout {self.dropout}: must be at least 0 and below 1")
        if not 0 <= self.joint < 1:
            raise UserError(f"joint dropout {self.joint}: must be at least 0 and below 1")

    @property
    def null_class(self) -> int | None:
        """The row that stands for "no class": num_classes; None without dropout."""
        return self.num_classes if self.dropout > 0 or self.joint > 0 else None

    @property
    def num_embeddings(self) -> int:
        """Number of rows, the null class included: the U-Net's num_class_embeds."""
        return self.num_classes + (self.null_class is not None)

    def __call__(self, labels: torch.Tensor, device: torch.device | str | None = None) -> dict[str, torch.Tensor]:
        """Labels [B], integers in [0, num_embeddings), as keyword arguments of the U-Net, on `device`.

        Give labels on the CPU: their range is checked on the device where they are, and on a GPU that waits for it.

        Raises:
            UserError: a label is out of range. (Unchecked, it would abort the process on a GPU.)
        """
        labels = labels.long()
        if labels.numel() and not 0 <= int(labels.min()) <= int(labels.max()) < self.num_embeddings:
            raise UserError(
                f"class labels from {int(labels.min())} to {int(labels.max())}: this model's rows are 0 to "
                f"{self.num_embeddings - 1} ({self.num_classes} classes)"
            )
        return {"class_labels": labels.to(device)}

    def drop(self, labels: torch.Tensor, generator: torch.Generator | list[torch.Generator] | None = None) -> torch.Tensor:
        """Labels [B] for training: each is replaced by the null class with probability `dropout`."""
        if self.null_class is None:
            return labels
        return drop(labels, self.null_class, self.dropout, generator)

    def unconditional(self, batch: int, device: torch.device | str | None = None) -> dict[str, torch.Tensor]:
        """Keyword arguments of the U-Net for `batch` images without a class. UserError where there is no null class."""
        if self.null_class is None:
            raise UserError("class dropout is 0, so the model has no null class and no unconditional prediction")
        return {"class_labels": torch.full((batch,), self.null_class, dtype=torch.long, device=device)}


class PromptEncoder:
    """A tokenizer with its text encoder: turns prompts into states, in training and in the pipeline in the same way.

    Every prompt is padded or cut to `length` tokens. As in diffusers' pipelines, the encoder gets an attention mask for the
    padding where its config says use_attention_mask, and the U-Net attends to all `length` states.

    Attributes:
        tokenizer, encoder: of transformers.
        length: tokens of a prompt.
        width: of the encoder's states.
    """

    def __init__(self, tokenizer: Any, encoder: Any):
        self.tokenizer, self.encoder = tokenizer, encoder
        self.length: int = tokenizer.model_max_length
        self.width: int = encoder.config.hidden_size

    def tokens(self, prompts: Sequence[str]) -> dict[str, torch.Tensor]:
        """input_ids [B, length]; also attention_mask [B, length] where the encoder takes one."""
        out = self.tokenizer(list(prompts), padding="max_length", max_length=self.length, truncation=True, return_tensors="pt")
        names = ["input_ids", "attention_mask"] if uses_mask(self.encoder) else ["input_ids"]
        return {name: out[name] for name in names}

    @torch.no_grad()
    def states(self, prompts: Sequence[str]) -> torch.Tensor:
        """The encoder's last hidden states [B, length, width], float32, on the encoder's device."""
        device = next(self.encoder.parameters()).device
        return self.encoder(**{k: v.to(device) for k, v in self.tokens(prompts).items()})[0].float()


def token_counts(tokenizer: Any, prompts: Sequence[str]) -> torch.Tensor:
    """Number of tokens of each prompt before it is cut, with the tokens for its start and end, int64 [B]."""
    counts: list[int] = []
    for start in range(0, len(prompts), 4096):
        part = list(prompts[start : start + 4096])
        counts += map(len, tokenizer(part, truncation=False, return_attention_mask=False, verbose=False)["input_ids"])
    return torch.tensor(counts, dtype=torch.int64)


class UNetWithTextEncoder(torch.nn.Module):
    """A U-Net and the text encoder that is trained with it, as one network, so that DDP and EMA cover both."""

    def __init__(self, unet: torch.nn.Module, text_encoder: torch.nn.Module):
        super().__init__()
        self.unet, self.text_encoder = unet, text_encoder

    def forward(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        **conditioning: Any,
    ) -> Any:
        """The U-Net's output for sample [B, c, h, w] at timestep [B], with the text of input_ids [B, L]."""
        states = self.text_encoder(input_ids=input_ids, attention_mask=attention_mask)[0]  # [B, L, d]
        return self.unet(sample, timestep, encoder_hidden_states=states, **conditioning)


def uses_mask(encoder: torch.nn.Module) -> bool:
    """Whether an encoder gets an attention mask for padding: use_attention_mask of its config, as in diffusers."""
    return bool(getattr(encoder.config, "use_attention_mask", False))


def train_tokenizer(captions: Iterable[str], vocabulary: int, length: int | None = None) -> Any:
    """A CLIP tokenizer (lower-case byte-pair encoding, arXiv:1508.07909) trained on captions.

    The numbers of its tokens differ between two calls with the same captions, so train it once and save it.

    Args:
        captions: texts; duplicates do not count.
        vocabulary: most tokens it may have.
        length: tokens that a prompt is padded or cut to; None: OWN_LENGTH.
    """
    from transformers import CLIPTokenizer

    start, end = "<|startoftext|>", "<|endoftext|>"
    blank = CLIPTokenizer(vocab={start: 0, end: 1}, merges=[], model_max_length=length or OWN_LENGTH)
    return blank.train_new_from_iterator([sorted(set(captions))], vocab_size=vocabulary, show_progress=False)


def build_text_encoder(tokenizer: Any, width: int, layers: int, heads: int) -> torch.nn.Module:
    """A new CLIPTextModel for a tokenizer's tokens, as Stable Diffusion's pipeline expects. UserError for unfit sizes.

    tokenizer: its size, model_max_length and special tokens are used. width: of the states, a multiple of `heads`.
    """
    from transformers import CLIPTextConfig, CLIPTextModel

    if width % heads:
        raise UserError(f"condition.text.width: {width} is not a multiple of condition.text.heads {heads}")
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=4 * width,
        projection_dim=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        max_position_embeddings=tokenizer.model_max_length,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextModel(config)


def load_prompt_encoder(where: str, length: int | None = None) -> PromptEncoder:
    """A pretrained text encoder, frozen, with its tokenizer. CLIP text models, T5 encoders, BERT and similar ones.

    Args:
        where: a folder with both, a pipeline's folder (its text_encoder/ and tokenizer/), or a Hub name.
        length: tokens of a prompt; None: the tokenizer's own length.

    Raises:
        UserError: there is no such encoder, or it cannot read prompts of this length.
    """
    import transformers

    config, places = _text_config(where)
    name = ENCODERS.get(config.model_type, "AutoModel")
    if name == "AutoModel" and getattr(config, "is_encoder_decoder", False):
        raise UserError(
            f"condition.text.encoder {where}: {config.model_type} also decodes; of such models only T5's kinds are supported"
        )
    tokenizer = load_tokenizer(where, length)
    try:
        encoder = load_part(places[0], getattr(transformers, name))
    except UserError as error:
        raise UserError(f"condition.text.encoder {error}") from None
    if not hasattr(encoder.config, "use_attention_mask"):
        # CLIP needs no mask: it is causal, so padding at the end does not change the tokens before it
        encoder.config.use_attention_mask = name != "CLIPTextModel"
    prompts = PromptEncoder(tokenizer, encoder.requires_grad_(False))
    _try_out(prompts, where)
    return prompts


def load_tokenizer(where: str, length: int | None = None) -> Any:
    """The tokenizer of a pretrained text encoder. Arguments and errors as `load_prompt_encoder`."""
    import transformers

    places = _text_config(where)[1]
    try:
        with quiet():
            tokenizer = transformers.AutoTokenizer.from_pretrained(places[1], trust_remote_code=False)
    except (OSError, ValueError, KeyError, json.JSONDecodeError) as error:
        raise UserError(f"condition.text.encoder {where}: no tokenizer of transformers ({_brief(error)})") from None
    if not any(any(map(str.isalnum, token)) for token in set(tokenizer.get_vocab()) - set(tokenizer.all_special_tokens)):
        # transformers makes an empty one where its files are missing, for which all prompts are the same
        raise UserError(f"condition.text.encoder {where}: its tokenizer knows no words; put the tokenizer's files there")
    longest = longest_prompt(where)
    own = min(tokenizer.model_max_length, LONGEST, longest or LONGEST)
    if length is not None and longest is not None and length > longest:
        raise UserError(f"condition.text.max_length: {length}, but {where} reads at most {longest} tokens")
    tokenizer.model_max_length = length or own
    return tokenizer


def _try_out(prompts: PromptEncoder, where: str) -> None:
    """UserError unless the encoder gives a finite state for each token of a prompt that fills the whole length."""
    try:
        states = prompts.states(["a " * prompts.length])
    except (ValueError, TypeError, KeyError, AttributeError, IndexError, RuntimeError) as error:
        raise UserError(
            f"condition.text.encoder {where}: cannot read a prompt of {prompts.length} tokens, condition.text.max_length "
            f"({_brief(error)})"
        ) from None
    if states.shape[1:] != (prompts.length, prompts.width) or not bool(states.isfinite().all()):
        raise UserError(f"condition.text.encoder {where}: gives no finite state of width {prompts.width} for each token")


def longest_prompt(where: str) -> int | None:
    """Most tokens that a pretrained encoder can read, from its config alone; None where that does not say."""
    config = _text_config(where)[0]
    return getattr(getattr(config, "text_config", config), "max_position_embeddings", None)


def states_width(where: str) -> int:
    """The width of a pretrained encoder's states, from its config alone. UserError as `load_prompt_encoder`."""
    config = _text_config(where)[0]
    width = getattr(getattr(config, "text_config", config), "hidden_size", None)  # CLIP's config also has a vision_config
    if not isinstance(width, int):
        raise UserError(f"condition.text.encoder {where}: {config.model_type} states no hidden_size; it is no text encoder")
    return width


def _text_config(where: str) -> tuple[Any, tuple[str, str]]:
    """(a pretrained encoder's config, (where the encoder is, where its tokenizer is))."""
    import transformers

    folder = Path(where)
    piped = (folder / "text_encoder" / "config.json").is_file()
    places = (str(folder / "text_encoder"), str(folder / "tokenizer")) if piped else (where, where)
    if not piped and not (folder / "config.json").is_file() and (folder.exists() or where.startswith((".", "/"))):
        raise UserError(f"condition.text.encoder {where}: needs config.json there, or text_encoder/ and tokenizer/")
    try:
        refuse_code(transformers.PretrainedConfig.get_config_dict(places[0])[0], f"condition.text.encoder {where}: config.json")
        return transformers.AutoConfig.from_pretrained(places[0], trust_remote_code=False), places
    except UserError:
        raise
    except (OSError, ValueError, KeyError, json.JSONDecodeError) as error:
        raise UserError(f"condition.text.encoder {where}: no encoder of transformers ({_brief(error)})") from None


def _brief(error: Exception) -> str:
    return " ".join(str(error).split())[:160]
