"""The training loss of discrete diffusion, and a lower bound on the log-probability of codes."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from latentdiff.discrete.common import Predict, check_codes, predict_logits, require_probs
from latentdiff.discrete.processes import Process, cross_entropy, turns
from latentdiff.errors import UserError
from latentdiff.likelihood import Bound, require_finite
from latentdiff.utils.random import Generators, rand
from latentdiff.utils.tensors import flat_mean, per_sample, widen

WEIGHTINGS = ("bound", "none")


def loss(
    predict: Predict,
    codes: Tensor,
    process: Process,
    t: float | Tensor,
    generator: Generators = None,
    weighting: str = "bound",
    **conditioning: Any,
) -> Tensor:
    """The training loss at t, in nats per code: [B], float32.

    Args:
        predict: predict(codes, t, **conditioning) -> logits; see `latentdiff.discrete`. Its gradients are followed.
        codes: clean codes, int64 [B, ...].
        process: corrupts them.
        t: a float or [B], in (0, 1]. Training draws it uniformly.
        generator: of the corruption: one, a list of B, or None.
        weighting: one of these.
            "bound": the mean over uniform t is minus the continuous-time bound, divided by the number of positions. For
                `Absorbing` it is the cross-entropy of the masked positions times -alpha'/(1 - alpha) (MDLM, arXiv 2406.07524;
                MD4, arXiv 2406.04329).
            "none": the mean cross-entropy of the masked positions (MaskGIT, arXiv 2202.04200), or for `Uniform` of all
                positions (the auxiliary loss of D3PM, arXiv 2107.03006, eq. 5). Of levels in turn, the one whose turn it is
                counts. A sample without masks has the loss 0.
        conditioning: keyword arguments of predict.

    Raises:
        UserError: an unknown weighting, or codes or logits of a wrong kind.
    """
    if weighting not in WEIGHTINGS:
        raise UserError(f"weighting: {weighting!r} is unknown for codes; valid: {', '.join(WEIGHTINGS)}")
    times = per_sample(t, codes)
    codes_t = process.corrupt(codes, times, generator)
    beliefs = torch.log_softmax(predict_logits(predict, codes_t, times, process.num_codes, conditioning), dim=-1)
    if weighting == "bound":
        rate = process.divergence_rate(codes, codes_t, beliefs, times)
        return (process.speed(times, codes) * rate / codes[0].numel()).float()
    losses = cross_entropy(codes, beliefs)  # [B, ...]
    if process.mask is None:
        return flat_mean(losses).float()
    is_masked = (codes_t.eq(process.mask) & process.has_turn(times, codes)).to(losses)
    return (flat_mean(losses * is_masked) / flat_mean(is_masked).clamp_min(1 / codes[0].numel())).float()


def bound(
    predict: Predict,
    codes: Tensor,
    process: Process,
    samples: int = 64,
    generator: Generators = None,
    steps: int | None = None,
    **conditioning: Any,
) -> Tensor:
    """A lower bound on log p(codes), estimated without bias: nats, float64 [B].

    Arguments and errors as in `bound_terms`, which also gives the terms and the standard error.
    """
    return bound_terms(predict, codes, process, samples, generator, steps, **conditioning).bound


@torch.no_grad()
def bound_terms(
    predict: Predict,
    codes: Tensor,
    process: Process,
    samples: int = 64,
    generator: Generators = None,
    steps: int | None = None,
    **conditioning: Any,
) -> Bound:
    """The evidence lower bound of codes and its terms, as `latentdiff.likelihood.Bound`: nats, float64 [B] each.

    With `steps` it is that of the model that `sample` draws from with order="random" and as many steps (D3PM, arXiv 2107.03006,
    eq. 1): -KL(q(x_1 | x0) || prior) + log p(x0 | x at 1/steps) - the sum over the other steps of KL(q(x_s | x_t, x0) ||
    p(x_s | x_t)). The more steps the higher it is, for an exact network. Without, it is the limit of infinitely many steps
    (`Absorbing`: MDLM, arXiv 2406.07524, and MD4, arXiv 2406.04329; `Uniform`: Campbell et al., arXiv 2205.14987). Its
    reconstruction term is 0. An exact network then reaches log p(codes), for both processes.

    Args:
        predict: predict(codes, t, **conditioning) -> logits; see `latentdiff.discrete`.
        codes: clean codes, int64 [B, ...].
        process: the process that the network was trained for.
        samples: evaluations of the network per sample, an even number. Two are drawn in each of samples / 2 strata of the time,
            and their difference gives the standard error.
        generator: one, a list of B, or None.
        steps: of the model; None for the limit.
        conditioning: keyword arguments of predict.

    Raises:
        UserError: fewer than 2 samples or an odd number, no steps, or codes or logits of a wrong kind.
        NotFiniteError: a bound that is not finite.
    """
    if samples < 2 or samples % 2:
        raise UserError(f"samples: must be even and at least 2, not {samples}")
    if steps is not None and steps < 1:
        raise UserError(f"steps: must be at least 1, not {steps}")
    check_codes(codes, process.num_codes, "bound")

    def beliefs(codes_t: Tensor, t: Tensor) -> Tensor:
        return require_probs(predict_logits(predict, codes_t, t, process.num_codes, conditioning).double().log_softmax(-1))

    prior = -process.prior_divergence(codes)
    reconstruction, diffusion, variance = (torch.zeros_like(prior) for _ in range(3))
    strata = samples // 2
    for k in range(strata):
        pair = []
        for _ in range(2):
            place = (k + rand((len(codes),), generator, codes.device, torch.float64)) / strata  # [B], in [0, 1)
            if steps is not None:
                number = (place * steps).long().clamp(max=steps - 1)  # [B], of the step, the last one of sampling is 0
                t, s = (number + 1).double() / steps, number.double() / steps
                codes_t = process.corrupt(codes, t, generator)
                cost = steps * process.step_divergence(codes, codes_t, beliefs(codes_t, t), t, s)
                is_last = number == 0
            else:
                cost = _continuous_cost(process, codes, place, generator, beliefs)
                is_last = torch.zeros_like(place, dtype=torch.bool)
            reconstruction = reconstruction - torch.where(is_last, cost, 0.0) / samples
            diffusion = diffusion - torch.where(is_last, 0.0, cost) / samples
            pair.append(cost)
        variance = variance + ((pair[0] - pair[1]) / samples) ** 2
    total = prior + reconstruction + diffusion
    require_finite(total, "bound")
    return Bound(total, prior, reconstruction, diffusion, variance.sqrt())


def _continuous_cost(
    process: Process, codes: Tensor, place: Tensor, generator: Generators, beliefs: Callable[[Tensor, Tensor], Tensor]
) -> Tensor:
    """A draw whose mean over place [B] ~ uniform(0, 1) is minus the continuous-time bound without its prior term: [B].

    With t drawn uniformly the variance would be infinite: near t = 0 rarely a position is corrupted, and then it counts much.
    So place chooses k, how many of the N positions are corrupted: from 1 to N under masking, where none costs nothing, else
    from 0 to N. They are those with the k smallest of N uniform numbers, and the share of corruption, m = 1 - alpha, is the
    k-th smallest. Its density is k C(N, k) m^(k-1) (1 - m)^(N-k), and C(N, k) m^k (1 - m)^(N-k) is to be integrated: the weight
    is m / k times the number of choices of k. For k = 0, m is the smallest, and the weight (1 - m) / N times that number.

    Levels in turn are as many integrals. The number of a position's turn is added to its uniform number, so that k of all N
    positions are whole levels and, of the level whose turn it is, as many as remain; these take the place of k.
    """
    size = codes[0].numel()
    least = 0 if process.mask is None else 1
    choices = size + 1 - least
    count = least + (place * choices).long().clamp(max=choices - 1)  # k, [B]
    chance = rand(codes.shape, generator, codes.device, torch.float64)
    levels = codes.shape[1] if process.in_turn else 1
    if process.in_turn:
        numbers = torch.arange(levels - 1, -1, -1, dtype=torch.float64, device=codes.device)  # the last level's turn is first
        chance = chance + numbers.reshape(1, -1, *(1,) * (codes.ndim - 2))
    last = chance.reshape(len(codes), -1).sort(dim=1).values.gather(1, (count[:, None] - 1).clamp_min(0))[:, 0]  # [B]
    is_corrupted = (chance <= widen(last, chance)) & (widen(count, chance) > 0)
    codes_t = torch.where(is_corrupted, process.prior_sample(codes.shape, generator, codes.device), codes)
    whole = ((count - 1).clamp_min(0) * levels).div(size, rounding_mode="floor")  # levels that are corrupted already, [B]
    share, count = last - whole, count - whole * (size // levels)  # m, and k of the level whose turn it is
    begins, lengths = (each.to(codes.device)[levels - 1 - whole] for each in turns(levels))
    t = begins + lengths * process.schedule.time(1 - share)
    weight = choices * torch.where(count > 0, share / count.clamp_min(1), (1 - share) / size)
    return weight * process.divergence_rate(codes, codes_t, beliefs(codes_t, t), t)
