"""The two corruptions of codes, `Absorbing` and `Uniform`, and the exact steps back.

With alpha = alpha(t), x0 the clean codes and K = num_codes, each position for itself:
    Absorbing   q(x_t | x0) = alpha [x_t = x0] + (1 - alpha) [x_t = mask]      (MDLM, arXiv 2406.07524)
    Uniform     q(x_t | x0) = alpha [x_t = x0] + (1 - alpha) / K               (D3PM, arXiv 2107.03006, appendix A.2.1)
Both are Markov: from s to t > s a position is corrupted anew with probability 1 - alpha(t) / alpha(s).

Codes of a residual quantiser, [B, L, ...], have L levels, of which the first is the coarsest. `Absorbing` can mask them one
level after the other, so that sampling draws all of the first level before the second (SoundStorm, arXiv 2305.09636, section
3.3). Then alpha depends on the level. The last level's turn is next to t = 0, and each turn is twice as long as the one before
it, since a fine level needs fewer steps.
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

LEVELS = ("together", "coarse_first")
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
        in_turn: whether the levels of codes [B, L, ...] are corrupted one after the other.
        schedule: the `Schedule`.

    Raises:
        UserError: fewer than 2 codes, an unknown schedule, or one that does not start at alpha(0) = 1.
    """

    mask: int | None = None
    in_turn = False

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
        is_replaced = chance < 1 - self.alpha(t, chance)
        return torch.where(is_replaced, self.prior_sample(codes.shape, generator, codes.device), codes)

    def marginal(self, codes: Tensor, t: float | Tensor) -> Tensor:
        """q(x_t | x0), [B, ..., S], for x0 = codes [B, ...]."""
        clean = functional.one_hot(codes, self.num_states).double()
        return torch.lerp(self.prior_probs().to(codes.device).expand_as(clean), clean, self.alpha(t, clean))

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

        Its mean over q(x_t | x0), integrated over m from 0 to 1, is minus the continuous-time bound in nats. Where levels are
        corrupted one after the other, m is that of the level whose turn it is at t, and the bound has one such integral for
        each level. Arguments as in `step_divergence`.
        """
        raise NotImplementedError

    def speed(self, t: float | Tensor, codes: Tensor) -> Tensor:
        """dm/dt, how fast codes [B, ...] are corrupted at t: float64 [B]."""
        return -self.schedule.d_alpha(per_sample(t, codes))

    def has_turn(self, t: float | Tensor, codes: Tensor) -> Tensor:
        """Which positions of codes [B, ...] are being corrupted at t: bool, of a shape that broadcasts to theirs."""
        return torch.ones((1,) * codes.ndim, dtype=torch.bool, device=codes.device)

    def prior_divergence(self, codes: Tensor) -> Tensor:
        """KL(q(x_1 | x0) || prior) in nats, float64 [B]: 0 where alpha(1) = 0, as it is for all of `SCHEDULES`."""
        exact = self.marginal(codes, 1.0)
        return _sum(torch.special.xlogy(exact, exact) - torch.special.xlogy(exact, self.prior_probs().to(exact.device)))

    def alpha(self, t: float | Tensor, x: Tensor) -> Tensor:
        """alpha(t), the probability that a position is clean, shaped to multiply x [B, ...]: float64."""
        return widen(self.schedule.alpha(per_sample(t, x)), x)

    def _alphas(self, t: float | Tensor, s: float | Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """(alpha(t), alpha(s)) shaped to multiply x [B, ...]. UserError unless s < t."""
        if not bool((per_sample(s, x) < per_sample(t, x)).all()):
            raise UserError(f"step: s = {s} must be below t = {t}")
        return self.alpha(t, x), self.alpha(s, x)


class Absorbing(Process):
    """Masking: a position is replaced by the mask code, K, and stays so (D3PM, arXiv 2107.03006; MDLM, arXiv 2406.07524).

    Args:
        num_codes, schedule: as in `Process`.
        levels: "together": all positions follow the one schedule. "coarse_first": codes are [B, L, ...], and of their L levels
            the last one is masked first, then the one before, and so on; each by the schedule, in a part of the time that
            `turns` gives. Sampling then draws the first level first.

    Raises:
        UserError: as in `Process`, or unknown levels.
    """

    def __init__(self, num_codes: int, schedule: str | Schedule = "linear", levels: str = "together"):
        super().__init__(num_codes, schedule)
        if levels not in LEVELS:
            raise UserError(f"levels: {levels!r} is unknown; valid: {', '.join(LEVELS)}")
        self.mask, self.num_states = num_codes, num_codes + 1
        self.in_turn = levels == "coarse_first"
        if float(self.schedule.alpha(1.0)) != 0:
            raise UserError("schedule: alpha(1) must be 0 for Absorbing, since sampling starts from nothing but masks")

    def alpha(self, t: float | Tensor, x: Tensor) -> Tensor:
        """As in `Process`; with levels in turn it is [B, L, 1, ...]."""
        if not self.in_turn:
            return super().alpha(t, x)
        return self.schedule.alpha(level_times(per_sample(t, x), x.shape[1])).reshape(len(x), -1, *(1,) * (x.ndim - 2))

    def speed(self, t: float | Tensor, codes: Tensor) -> Tensor:
        times = per_sample(t, codes)
        if not self.in_turn:
            return super().speed(times, codes)
        turn = self._turn(times, codes.shape[1])[:, None]
        inner = level_times(times, codes.shape[1]).gather(1, turn)
        return (-self.schedule.d_alpha(inner) / turns(codes.shape[1])[1].to(codes.device)[turn])[:, 0]

    def has_turn(self, t: float | Tensor, codes: Tensor) -> Tensor:
        if not self.in_turn:
            return super().has_turn(t, codes)
        turn = self._turn(per_sample(t, codes), codes.shape[1])
        numbers = torch.arange(codes.shape[1], device=codes.device)
        return (numbers == turn[:, None]).reshape(len(codes), -1, *(1,) * (codes.ndim - 2))

    @staticmethod
    def _turn(times: Tensor, count: int) -> Tensor:
        """The level, of `count`, that is being masked at times [B] in (0, 1], the first that has masks: int64 [B]."""
        return level_times(times, count).gt(0).int().argmax(dim=1)

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
        """-log p(x0 | x_t) summed over the masked positions, divided by 1 - alpha (MDLM; MD4, arXiv 2406.04329).

        With levels in turn only those positions count whose turn it is.
        """
        is_counted = codes_t.eq(self.num_codes) & self.has_turn(t, codes)
        losses = torch.where(is_counted, cross_entropy(codes, log_probs), 0.0).double()
        return _sum(losses / (1 - self.alpha(t, losses)).clamp_min(_TINY))


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
        alpha = self.alpha(t, torch.empty(codes_t.shape, dtype=torch.float64, device=codes_t.device)[..., None])
        own = torch.log1p(self.num_codes * alpha / (1 - alpha).clamp_min(_TINY)).expand(*codes_t.shape, 1)
        return own.new_zeros(*codes_t.shape, self.num_codes).scatter(-1, codes_t[..., None], own)

    def divergence_rate(self, codes: Tensor, codes_t: Tensor, log_probs: Tensor, t: float | Tensor) -> Tensor:
        """The divergence between two jump processes (Campbell et al., arXiv 2205.14987, proposition 2; SEDD, arXiv 2310.16834).

        Back in time a position jumps from z = x_t to y at a rate in proportion to q(y | x0) / q(z | x0), or in the model to the
        mean of this over the network's x0. Jumps from rate r, modelled by r', cost r' - r + r log(r / r') per unit of time.
        """
        size, probs = self.num_codes, log_probs.double().exp()
        alpha = self.alpha(t, probs)[..., 0]  # [B, 1, ...]
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


def make_process(name: str, num_codes: int, schedule: str = "linear", levels: str = "together") -> Process:
    """A process by its name, "absorbing" or "uniform".

    num_codes, schedule: as in `Process`. levels: as in `Absorbing`. UserError for an unknown name, or levels in turn of another
    process than "absorbing".
    """
    if name not in PROCESSES:
        raise UserError(f"process: {name!r} is unknown; valid: {', '.join(PROCESSES)}")
    if name == "absorbing":
        return Absorbing(num_codes, schedule, levels)
    if levels != "together":
        raise UserError(f"levels: {levels!r} is for process absorbing; valid for {name}: together")
    return PROCESSES[name](num_codes, schedule)


def turns(count: int) -> tuple[Tensor, Tensor]:
    """(when the turn of each of `count` levels begins, how long it is), in t: float64 [count] each.

    The first level's turn ends at t = 1, and each is twice as long as that of the level after.
    """
    parts = 2.0 ** torch.arange(count - 1, -1, -1, dtype=torch.float64)
    return (parts - 1) / (2.0**count - 1), parts / (2.0**count - 1)


def level_times(t: Tensor, count: int) -> Tensor:
    """How far each of `count` levels in turn is corrupted at t [B], as a time of the schedule in [0, 1]: float64 [B, count]."""
    begins, lengths = (each.to(t.device) for each in turns(count))
    # 1e-12: times are sums of steps, and the rounding of one must not begin a turn
    inner = (t.double()[:, None] - begins) / lengths
    return torch.where(inner < 1e-12, 0.0, torch.where(inner > 1 - 1e-12, 1.0, inner))


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
