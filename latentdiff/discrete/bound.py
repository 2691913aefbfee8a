"""The training loss of discrete diffusion, and a lower bound on the log-probability of codes."""

from typing import Any

import torch
from torch import Tensor

from latentdiff.discrete.common import Predict, check_codes, log_probs, predict_logits
from latentdiff.discrete.processes import Absorbing, Process, cross_entropy
from latentdiff.errors import UserError
from latentdiff.likelihood import Bound, require_finite
from latentdiff.utils.random import Generators, rand
from latentdiff.utils.tensors import flat_mean, per_sample

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
                positions (the auxiliary loss of D3PM, arXiv 2107.03006, eq. 5). A sample without masks has the loss 0.
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
        speed = -process.schedule.d_alpha(times)
        return (speed * process.divergence_rate(codes, codes_t, beliefs, times) / codes[0].numel()).float()
    losses = cross_entropy(codes, beliefs)  # [B, ...]
    if process.mask is None:
        return flat_mean(losses).float()
    is_masked = codes_t.eq(process.mask).to(losses)
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
        return log_probs(predict_logits(predict, codes_t, t, process.num_codes, conditioning))

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


def _continuous_cost(process: Process, codes: Tensor, place: Tensor, generator: Generators, beliefs: Any) -> Tensor:
    """A draw whose mean over place [B] ~ uniform(0, 1) is minus the continuous-time bound without its prior term: [B].

    The mean over t of `Process.divergence_rate`, times -alpha', would have an infinite variance: near t = 0 rarely anything is
    corrupted, and then it counts much. `Absorbing` therefore draws k, how many of the N positions are masked, uniformly. It
    masks those with the k smallest of N uniform numbers, and takes the time at which the k-th smallest is the share of masks.
    Given k, that share has its exact distribution, Beta(k, N - k + 1), and the weight 1 / (1 - alpha) becomes N / k. `Uniform`
    draws 1 - alpha with a density in proportion to its inverse root.
    """
    if isinstance(process, Absorbing):
        size = codes[0].numel()
        count = (place * size).long().clamp(max=size - 1)[:, None]  # k - 1
        chance = rand(codes.shape, generator, codes.device, torch.float64)
        share = chance.reshape(len(codes), -1).sort(dim=1).values.gather(1, count)  # [B, 1], the k-th smallest
        is_masked = chance <= share.reshape(-1, *(1,) * (codes.ndim - 1))
        codes_t = torch.where(is_masked, process.num_codes, codes)
        t = process.schedule.time(1 - share[:, 0])
        losses = torch.where(is_masked, cross_entropy(codes, beliefs(codes_t, t)), 0.0)
        return losses.reshape(len(codes), -1).sum(1) * size / (count[:, 0] + 1)
    t = process.schedule.time(1 - place**2)
    codes_t = process.corrupt(codes, t, generator)
    return 2 * place * process.divergence_rate(codes, codes_t, beliefs(codes_t, t), t)
