"""What the modules of discrete diffusion share: the network's answer as log-probabilities, and draws of codes."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from latentdiff.errors import NotFiniteError, UserError
from latentdiff.utils.random import Generators, rand

# predict(codes [B, ...], t [B], **conditioning) -> logits [B, ..., num_codes]
Predict = Callable[..., Tensor]


def predict_logits(predict: Predict, codes: Tensor, t: Tensor, num_codes: int, conditioning: Mapping[str, Any]) -> Tensor:
    """The network's logits of the clean codes, [B, ..., num_codes], in float32 at least.

    codes: corrupted codes [B, ...]. t: float64 [B]. UserError for logits of another shape.
    """
    logits = predict(codes, t, **conditioning)
    if logits.shape != (*codes.shape, num_codes):
        raise UserError(
            f"predict: logits of shape {list(logits.shape)} for codes of shape {list(codes.shape)}; "
            f"needed are {[*codes.shape, num_codes]}: one for each of the {num_codes} codes, none for the mask"
        )
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def require_probs(probs: Tensor) -> Tensor:
    """probs [..., K], a softmax or its logarithm. NotFiniteError for NaN: of logits with NaN, +inf or nothing but -inf."""
    if bool(probs.isnan().any()):
        raise NotFiniteError("predict: logits that are not finite; the network or its weights have diverged")
    return probs


def draw(probs: Tensor, generator: Generators = None) -> Tensor:
    """One draw from each of the distributions probs [B, ..., S], which need not sum to 1: int64 [B, ...].

    What has probability 0 is not drawn. The distribution function is inverted at a float64 uniform number. Gumbel noise of
    float32 ends at 16.6, so codes of small probability would come too seldom (arXiv 2409.02908).

    generator: one, a list of B, or None.
    """
    cumulative = probs.cumsum(dim=-1, dtype=torch.float64)  # [B, ..., S]
    chance = rand(probs.shape[:-1], generator, probs.device, torch.float64)[..., None]
    # chance is at most 1 - 2^-53, so that even its rounded product with the total is below the total
    return torch.searchsorted(cumulative, chance * cumulative[..., -1:], right=True)[..., 0]


def check_codes(codes: Tensor, num_codes: int, what: str, least: int = 0) -> None:
    """UserError unless codes is int64 with values in least..num_codes - 1. what: how the message begins."""
    if codes.dtype != torch.int64:
        raise UserError(f"{what}: codes must be int64, not {str(codes.dtype).removeprefix('torch.')}")
    if codes.numel() and not (least <= int(codes.min()) and int(codes.max()) < num_codes):
        found = f"{int(codes.min())} to {int(codes.max())}"
        raise UserError(f"{what}: codes must be from {least} to {num_codes - 1}, not {found}")
