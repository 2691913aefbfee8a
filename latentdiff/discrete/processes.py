"""The two corruptions of codes, `Absorbing` and `Uniform`, and the exact steps back.

With alpha = alpha(t), x0 the clean codes and K = num_codes, each position for itself:
    Absorbing   q(x_t | x0) = alpha [x_t = x0] + (1 - alpha) [x_t = mask]      (MDLM, arXiv 2406.07524)
    Uniform     q(x_t | x0) = alpha [x_t = x0] + (1 - alpha) / K               (D3PM, arXiv 2107.03006, appendix A.2.1)
Both are Markov: from s to t > s a position is corrupted anew with probability 1 - alpha(t) / alpha(s).
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from latentdiff.discrete.common import Predict, check_codes, draw
from latentdiff.discrete.schedules import SCHEDULES, Schedule
from latentdiff.errors import UserError
from latentdiff.utils.random import Generators, rand
from latentdiff.utils.tensors import per_sample, widen

_TINY = 1e-12  # the least probability that is divided by: at t = 0 nothing is corrupted, at t = 1 nothing is clean


class Process:
    """A corruption of codes. The parent of `Absorbing` and `Uniform`.

    In all methods codes are int64 [B, ...], and a time is a float or [B], in [0, 1]. Probabilities are float64, and their last
    axis is the S states of a position.

    Args:
        num_codes: K, how many codes there are, at least 2.
        schedule: a name of `SCHEDULES`, or a `Schedule`.

    Attributes:
        num_codes: K.
        num_states: S: the values that a position can take, with the mask.
        mask: the mask's code, None where there is none.
        schedule: the `Schedule`.

    Raises:
        UserError: fewer than 2 codes, an unknown schedule, or one that does not start at alpha(0) = 1.
    """

    mask: int | None = None

    def __init__(self, num_codes: int, schedule: str | Schedule = "linear"):
        if num_codes < 2:
            raise UserError(f"num_codes: {num_codes} is below 2")
        if isinstance(schedule, str) and schedule not in SCHEDULES:
            raise UserError(f"schedule: {schedule!r} is unknown for codes; valid: {', '.join(SCHEDULES)}")
        self.num_codes = self.num_states = num_codes
        self.schedule = SCHEDULES[schedule] if isinstance(schedule, str) else schedule
        if float(self.schedule.alpha(0.0)) != 1:
            raise UserError("schedule: alpha(0) must be 1, since sampling ends with clean codes")

    def prior_probs(self) -> Tensor:
        """The distribution of a position at t = 1, [S]."""
        raise NotImplementedError

    def prior_sample(
        self, shape: Sequence[int], generator: Generators = None, device: torch.device | str | None = None
    ) -> Tensor:
        """Codes at t = 1: int64 of the given shape [B, ...].

        generator: one, a list of B, or None. device: of the result, by default the CPU.
        """
        raise NotImplementedError

    def corrupt(self, codes: Tensor, t: float | Tensor, generator: Generators = None) -> Tensor:
        """A draw of q(x_t | x0): int64 [B, ...].

        codes: x0 [B, ...]. generator: one, a list of B, or None. UserError for codes out of range.
        """
        check_codes(codes, self.num_codes, "corrupt")
        chance = rand(codes.shape, generator, codes.device, torch.float64)
        is_replaced = chance < widen(1 - self.schedule.alpha(per_sample(t, codes)), chance)
        return torch.where(is_replaced, self.prior_sample(codes.shape, generator, codes.device), codes)

    def marginal(self, codes: Tensor, t: float | Tensor) -> Tensor:
        """q(x_t | x0), [B, ..., S], for x0 = codes [B, ...]."""
        clean = functional.one_hot(codes, self.num_states).double()
        return torch.lerp(self.prior_probs().to(codes.device).expand_as(clean), clean, self._alpha(t, clean))

    def posterior(self, codes_t: Tensor, codes: Tensor, t: float | Tensor, s: float | Tensor) -> Tensor:
        """q(x_s | x_t, x0) for s < t, by Bayes' rule: [B, ..., S].

        codes_t: x_t. codes: x0. UserError unless s < t.
        """
        return self.reverse(codes_t, functional.one_hot(codes, self.num_codes).double(), t, s)

    def reverse(self, codes_t: Tensor, probs: Tensor, t: float | Tensor, s: float | Tensor) -> Tensor:
        """The model's step p(x_s | x_t), the mean of q(x_s | x_t, x0) over x0 ~ probs (D3PM, eq. 4): [B, ..., S].

        codes_t: x_t. probs: what the network believes of x0, float64 [B, ..., K]. UserError unless s < t.
        """
        raise NotImplementedError

    def evidence(self, codes_t: Tensor, t: float | Tensor) -> Tensor:
        """log q(x_t | x0) for every x0 of a position, up to a constant: [B, ..., K]. See `add_evidence`."""
        raise NotImplementedError

    def step(
        self, codes_t: Tensor, probs: Tensor, t: float | Tensor, s: float | Tensor, generator: Generators = None
    ) -> Tensor:
        """A draw of the model's step p(x_s | x_t): int64 [B, ...], by way of a draw of x0.

        Arguments and errors as in `reverse`; probs may be of any precision. generator: one, a list of B, or None.
        """
        return self.posterior_sample(codes_t, draw(probs, generator), t, s, generator)

    def posterior_sample(
        self, codes_t: Tensor, codes: Tensor, t: float | Tensor, s: float | Tensor, generator: Generators = None
    ) -> Tensor:
        """A draw of `posterior`: int64 [B, ...]. Arguments and errors as there. generator: one, a list of B, or None."""
        raise NotImplementedError

    def step_divergence(
        self, codes: Tensor, codes_t: Tensor, log_probs: Tensor, t: float | Tensor, s: float | Tensor
    ) -> Tensor:
        """KL(q(x_s | x_t, x0) || p(x_s | x_t)) in nats, summed over the positions: float64 [B] (D3PM, eq. 1).

        At s = 0 it is -log p(x0 | x_t). codes: x0. codes_t: x_t. log_probs: of x0 by the network, [B, ..., K].
        """
        exact = self.posterior(codes_t, codes, t, s)
        model = self.reverse(codes_t, log_probs.double().exp(), t, s)
        return _sum(torch.special.xlogy(exact, exact) - torch.special.xlogy(exact, model))

    def divergence_rate(self, codes: Tensor, codes_t: Tensor, log_probs: Tensor, t: float | Tensor) -> Tensor:
        """What `step_divergence` becomes in the limit of short steps, per unit of the corruption m = 1 - alpha: float64 [B].

        Its mean over q(x_t | x0), integrated over m from 0 to 1, is minus the continuous-time bound in nats. Arguments as in
        `step_divergence`.
        """
        raise NotImplementedError

    def prior_divergence(self, codes: Tensor) -> Tensor:
        """KL(q(x_1 | x0) || prior) in nats, float64 [B]: 0 where alpha(1) = 0, as it is for all of `SCHEDULES`."""
        exact = self.marginal(codes, 1.0)
        return _sum(torch.special.xlogy(exact, exact) - torch.special.xlogy(exact, self.prior_probs().to(exact.device)))

    def _alpha(self, t: float | Tensor, x: Tensor) -> Tensor:
        """alpha(t) shaped to multiply x [B, ...]."""
        return widen(self.schedule.alpha(per_sample(t, x)), x)

    def _alphas(self, t: float | Tensor, s: float | Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """(alpha(t), alpha(s)) shaped to multiply x [B, ...]. UserError unless s < t."""
        if not bool((per_sample(s, x) < per_sample(t, x)).all()):
            raise UserError(f"step: s = {s} must be below t = {t}")
        return self._alpha(t, x), self._alpha(s, x)


class Absorbing(Process):
    """Masking: a position is replaced by the mask code, K, and stays so (D3PM, arXiv 2107.03006; MDLM, arXiv 2406.07524)."""

    def __init__(self, num_codes: int, schedule: str | Schedule = "linear"):
        super().__init__(num_codes, schedule)
        self.mask, self.num_states = num_codes, num_codes + 1
        if float(self.schedule.alpha(1.0)) != 0:
            raise UserError("schedule: alpha(1) must be 0 for Absorbing, since sampling starts from nothing but masks")

    def prior_probs(self) -> Tensor:
        return functional.one_hot(torch.tensor(self.num_codes), self.num_states).double()

    def prior_sample(
        self, shape: Sequence[int], generator: Generators = None, device: torch.device | str | None = None
    ) -> Tensor:
        return torch.full(tuple(shape), self.num_codes, device=device)

    def reverse(self, codes_t: Tensor, probs: Tensor, t: float | Tensor, s: float | Tensor) -> Tensor:
        """A mask stays one with probability (1 - alpha(s)) / (1 - alpha(t)), else it becomes x0; the rest stays."""
        alpha_t, alpha_s = self._alphas(t, s, probs)
        stay = (1 - alpha_s) / (1 - alpha_t).clamp_min(_TINY)
        unmasked = torch.cat([probs * (1 - stay), stay.expand_as(probs[..., :1])], dim=-1)
        return torch.where(
            codes_t.eq(self.num_codes)[..., None], unmasked, functional.one_hot(codes_t, self.num_states).double()
        )

    def posterior_sample(
        self, codes_t: Tensor, codes: Tensor, t: float | Tensor, s: float | Tensor, generator: Generators = None
    ) -> Tensor:
        chance = rand(codes.shape, generator, codes.device, torch.float64)
        alpha_t, alpha_s = self._alphas(t, s, chance)
        is_shown = codes_t.eq(self.num_codes) & (chance * (1 - alpha_t) >= 1 - alpha_s)
        return torch.where(is_shown, codes, codes_t)

    def evidence(self, codes_t: Tensor, t: float | Tensor) -> Tensor:
        """0: a mask says nothing of its own x0, and the x0 of other positions is not asked for."""
        return torch.zeros((), dtype=torch.float64, device=codes_t.device).expand(*codes_t.shape, self.num_codes)

    def divergence_rate(self, codes: Tensor, codes_t: Tensor, log_probs: Tensor, t: float | Tensor) -> Tensor:
        """-log p(x0 | x_t) summed over the masked positions, divided by 1 - alpha (MDLM; MD4, arXiv 2406.04329)."""
        losses = torch.where(codes_t.eq(self.num_codes), cross_entropy(codes, log_probs), 0.0)
        return _sum(losses).double() / (1 - self.schedule.alpha(per_sample(t, codes))).clamp_min(_TINY)


class Uniform(Process):
    """Replacement by codes that are drawn uniformly from all K (D3PM, arXiv 2107.03006; multinomial diffusion, 2102.05379)."""

    def prior_probs(self) -> Tensor:
        return torch.full((self.num_codes,), 1 / self.num_codes, dtype=torch.float64)

    def prior_sample(
        self, shape: Sequence[int], generator: Generators = None, device: torch.device | str | None = None
    ) -> Tensor:
        chance = rand(shape, generator, device, torch.float64)
        return (chance * self.num_codes).long().clamp(max=self.num_codes - 1)

    def reverse(self, codes_t: Tensor, probs: Tensor, t: float | Tensor, s: float | Tensor) -> Tensor:
        """The mean over x0 of q(x_t | x_s) q(x_s | x0) / q(x_t | x0) (D3PM, eq. 3 and 4)."""
        alpha_t, alpha_s = self._alphas(t, s, probs)
        kept = alpha_t / alpha_s.clamp_min(_TINY)  # the probability that s to t does not corrupt
        forward = kept * functional.one_hot(codes_t, self.num_codes) + (1 - kept) / self.num_codes  # q(x_t | x_s)
        return forward * self._mean_ratio(codes_t, probs, alpha_t, alpha_s)

    def posterior_sample(
        self, codes_t: Tensor, codes: Tensor, t: float | Tensor, s: float | Tensor, generator: Generators = None
    ) -> Tensor:
        """From x0 over x_s to x_t there are four ways, by which of the two steps corrupt. One is drawn by its share."""
        chance = rand(codes.shape, generator, codes.device, torch.float64)
        alpha_t, alpha_s = self._alphas(t, s, chance)
        kept = alpha_t / alpha_s.clamp_min(_TINY)
        ways = [
            torch.where(codes_t == codes, alpha_t, 0.0).expand_as(chance),  # none: x_s = x0 = x_t
            (alpha_s * (1 - kept) / self.num_codes).expand_as(chance),  # the second alone: x_s = x0
            ((1 - alpha_s) * kept / self.num_codes).expand_as(chance),  # the first alone: x_s = x_t
            ((1 - alpha_s) * (1 - kept) / self.num_codes).expand_as(chance),  # both: x_s is any code
        ]
        way = draw(torch.stack(ways, dim=-1), generator)
        anything = (chance * self.num_codes).long().clamp(max=self.num_codes - 1)
        return torch.where(way < 2, codes, torch.where(way == 2, codes_t, anything))

    def evidence(self, codes_t: Tensor, t: float | Tensor) -> Tensor:
        """log(1 + K alpha / (1 - alpha)) for x0 = x_t, 0 for the others."""
        alpha = self._alpha(t, torch.empty(codes_t.shape, dtype=torch.float64, device=codes_t.device)[..., None])
        own = torch.log1p(self.num_codes * alpha / (1 - alpha).clamp_min(_TINY)).expand(*codes_t.shape, 1)
        return own.new_zeros(*codes_t.shape, self.num_codes).scatter(-1, codes_t[..., None], own)

    def divergence_rate(self, codes: Tensor, codes_t: Tensor, log_probs: Tensor, t: float | Tensor) -> Tensor:
        """The divergence between two jump processes (Campbell et al., arXiv 2205.14987, proposition 2; SEDD, arXiv 2310.16834).

        Back in time a position jumps from z = x_t to y at a rate in proportion to q(y | x0) / q(z | x0), or in the model to the
        mean of this over the network's x0. Jumps from rate r, modelled by r', cost r' - r + r log(r / r') per unit of time.
        """
        size, probs = self.num_codes, log_probs.double().exp()
        alpha = self._alpha(t, probs)[..., 0]  # [B, 1, ...]
        noise = (1 - alpha).clamp_min(_TINY) / size
        model = self._mean_ratio(codes_t, probs, alpha[..., None], alpha[..., None]).clamp_min(torch.finfo(torch.float64).tiny)
        logs = model.log()
        own, clean = codes_t[..., None], codes[..., None]
        sum_model, sum_logs = (each.sum(-1) - each.gather(-1, own)[..., 0] for each in (model, logs))  # over y that are not z
        # The exact ratio is `low` for every y where z = x0; else it is `high` for y = x0, and 1 for the others
        low, high = noise / (alpha + noise), (alpha + noise) / noise
        same = sum_model + (size - 1) * (torch.special.xlogy(low, low) - low) - low * sum_logs
        log_clean = logs.gather(-1, clean)[..., 0]
        other = sum_model - high + high * (high.log() - log_clean) - (size - 2) - (sum_logs - log_clean)
        return _sum(torch.where(codes_t == codes, same, other) / (size * alpha.clamp_min(_TINY)))

    def _mean_ratio(self, codes_t: Tensor, probs: Tensor, alpha_t: Tensor, alpha_s: Tensor) -> Tensor:
        """The mean over x0 ~ probs of q(x_s = y | x0) / q(x_t | x0), for every y: [B, ..., K]."""
        noise = (1 - alpha_t).clamp_min(_TINY) / self.num_codes
        own = codes_t[..., None]
        chances = noise.expand_as(probs).scatter(-1, own, (alpha_t + noise).expand_as(own))  # q(x_t | x0)
        weights = probs / chances
        return alpha_s * weights + (1 - alpha_s) / self.num_codes * weights.sum(dim=-1, keepdim=True)


PROCESSES: Mapping[str, type[Process]] = {"absorbing": Absorbing, "uniform": Uniform}


def make_process(name: str, num_codes: int, schedule: str = "linear") -> Process:
    """A process by its name, "absorbing" or "uniform". num_codes, schedule: as in `Process`. UserError for an unknown name."""
    if name not in PROCESSES:
        raise UserError(f"process: {name!r} is unknown; valid: {', '.join(PROCESSES)}")
    return PROCESSES[name](num_codes, schedule)


def add_evidence(predict: Predict, process: Process) -> Predict:
    """The function predict with log q(x_t | x0) of each position added to its logits.

    p(x0 | x_t) is in proportion to q(x_t | x0) and to what the other positions say of x0. With this the network has to learn
    the second alone. Under `Uniform` near t = 0, x_t is all but certainly x0. A network that has not learned that has a loss
    without bound there, so train with this. Under `Absorbing` nothing changes.

    predict: see `latentdiff.discrete`. Sampling and the bound need the same wrapped function as training.
    """

    def informed(codes: Tensor, t: Tensor, **conditioning: Any) -> Tensor:
        logits = predict(codes, t, **conditioning)
        return logits + process.evidence(codes, t).to(torch.promote_types(logits.dtype, torch.float32))

    return informed


def cross_entropy(codes: Tensor, log_probs: Tensor) -> Tensor:
    """-log p(x0) at each position, [B, ...]. codes: x0 [B, ...]. log_probs: [B, ..., K]."""
    return -log_probs.gather(-1, codes[..., None])[..., 0]


def _sum(x: Tensor) -> Tensor:
    """The sum over all axes but the batch: [B, ...] -> [B]."""
    return x.reshape(x.shape[0], -1).sum(dim=1)
