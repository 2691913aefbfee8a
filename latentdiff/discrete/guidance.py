"""Classifier-free guidance on logits."""

from typing import Any

import torch
from torch import Tensor

from latentdiff.discrete.common import Predict
from latentdiff.errors import UserError
from latentdiff.guidance.common import Interval, check_interval, guided_rows, join_conditions

_LEAST = -1e4  # nats; stands for a log-probability of -inf, with which the difference of two would be NaN


class ClassifierFree:
    """Classifier-free guidance of codes: log p_uncond + scale (log p_cond - log p_uncond), normalised anew.

    The position's distribution is p_uncond (p_cond / p_uncond)^scale (arXiv 2412.10193, section 3; 2207.12598 for continuous
    diffusion). An instance is a function predict -> predict, for `sample(..., guidance=...)`. Guided samples cost two
    evaluations, made in one call of the network with at most 2 B samples.

    Args:
        conditional, unconditional: keyword arguments of predict, with the same keys. Tensors are [B, ...]. Anything else must
            be equal in both.
        scale: 1 is off: one evaluation of B samples with `conditional`.
        interval: (low, high) in t, outside of which a sample gets the conditional prediction. None: guide at every t.

    Raises:
        UserError: different keys, or an interval out of range.
    """

    def __init__(self, conditional: dict[str, Any], unconditional: dict[str, Any], scale: float, interval: Interval = None):
        check_interval(interval, "guidance interval")
        if conditional.keys() != unconditional.keys():
            raise UserError(
                f"guidance: conditional has {sorted(conditional)} and unconditional {sorted(unconditional)}; "
                "the keys must be the same"
            )
        self.conditional, self.unconditional, self.scale, self.interval = conditional, unconditional, scale, interval

    def __call__(self, predict: Predict) -> Predict:
        """The guided predict: its result is the guided logits, [B, ..., num_codes]."""

        def guided(codes: Tensor, t: Tensor, **conditioning: Any) -> Tensor:
            conditional = {**conditioning, **self.conditional}
            rows = guided_rows(t, self.scale != 1, self.interval).nonzero()[:, 0]  # [G]
            if not len(rows):
                return predict(codes, t, **conditional)
            unconditional = {**conditioning, **self.unconditional}
            logits = predict(
                torch.cat([codes, codes[rows]]),  # [B + G, ...]
                torch.cat([t, t[rows]]),
                **{key: join_conditions(key, conditional[key], [unconditional[key]], rows) for key in conditional},
            )
            own, other = logits.float().log_softmax(dim=-1).clamp_min(_LEAST).split([len(codes), len(rows)])
            return own.index_copy(0, rows, torch.lerp(other, own[rows], self.scale))

        return guided
