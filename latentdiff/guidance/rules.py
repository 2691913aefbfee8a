"""How two estimates become a guided one: plain extrapolation, adaptive projected guidance, and CFG-Zero*.

`ClassifierFree` and `Autoguidance` each have two estimates: one to guide to, and one to guide away from.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from latentdiff import prediction as predictions
from latentdiff.denoiser import Denoised
from latentdiff.errors import UserError
from latentdiff.utils.tensors import widen

# The options of each rule
OPTIONS: dict[str, tuple[str, ...]] = {"cfg": (), "apg": ("parallel", "threshold", "momentum"), "cfg_zero": ("zero_init",)}
RULES = tuple(OPTIONS)
OPTIONS_IN_WORDS = "parallel, threshold and momentum of apg, and zero_init of cfg_zero"


@dataclass(frozen=True)
class Rule:
    """A rule by its name. With p the estimate to guide to, n the one to guide away from, and w the scale:

    - "cfg": n + w (p - n), on x0 and eps. The weights sum to one, so it is the same in every parameterization.
    - "apg": adaptive projected guidance (arXiv 2410.02416), on x0: p + (w - 1) (d_orthogonal + parallel d_parallel),
      where d = p - n is split into what is parallel to p and what is orthogonal to it. The parallel part raises contrast and
      saturation; without it large scales do not overexpose. d is first shortened to the norm `threshold`. With `momentum`, d is
      before that the running sum p - n + momentum * (the sum at the evaluation before); see `RunningSum`.
    - "cfg_zero": the optimised scale of CFG-Zero* (arXiv 2503.18886), on the velocity of the ODE: s n + w (p - s n) with
      s = <p, n> / |n|^2. With `zero_init` the velocity is 0 at the beginning, at t > 1 - zero_init: x_t then stays as it is.
      That is for flows, whose first predictions are poor.

    All norms and products are over the entries of one sample.

    Args:
        name: one of `RULES`.
        parallel: of "apg", the paper's eta: the share of the parallel part that is kept; 1 is all of it. Below 0 or above 1 is
            allowed.
        threshold: of "apg", the paper's r, above 0: the largest norm of d; inf is off.
        momentum: of "apg", the paper's beta, between -1 and 1; 0 is off. The paper takes -0.5 to -0.75, which damps what the
            steps have in common.
        zero_init: of "cfg_zero": the share of the time, in [0, 1), in which the velocity is 0; 0 is off. K of N equal steps of
            a flow are K / N. The paper takes 0.04.

    Raises:
        UserError: an unknown name, or an option that is out of range or of another rule.
    """

    name: str = "cfg"
    parallel: float = 0.0
    threshold: float = math.inf
    momentum: float = 0.0
    zero_init: float = 0.0

    def __post_init__(self) -> None:
        if self.name not in RULES:
            raise UserError(f"guidance rule: {self.name!r} is unknown; valid: {', '.join(RULES)}")
        if not (math.isfinite(self.parallel) and self.threshold > 0):
            raise UserError(f"guidance rule: parallel {self.parallel} must be finite, and threshold {self.threshold} above 0")
        if not -1 < self.momentum < 1:
            raise UserError(f"guidance rule: momentum {self.momentum} must be between -1 and 1; 0 is off")
        if not 0 <= self.zero_init < 1:
            raise UserError(f"guidance rule: zero_init {self.zero_init} must be from 0, which is off, to below 1")
        for option, default in (("parallel", 0), ("threshold", math.inf), ("momentum", 0), ("zero_init", 0)):
            if option not in OPTIONS[self.name] and getattr(self, option) != default:
                raise UserError(f"guidance rule: {self.name} has no {option}; there are {OPTIONS_IN_WORDS}")

    def combine(
        self, x: Tensor, p: Denoised, n: Denoised, scale: float, summed: Callable[[Tensor, Tensor], Tensor] | None = None
    ) -> tuple[Tensor, Tensor]:
        """The guided x0 and eps, each [B, ...], at x = x_t [B, ...].

        p, n: the estimates to guide to and away from. summed: summed(d [B, ...], t [B]) is d with momentum, from the
        evaluations before; None: there were none.
        """
        if self.name == "apg":
            d = p.x0 - n.x0
            if self.momentum and summed is not None:
                d = summed(d, p.t)
            if self.threshold < math.inf:
                d = d * widen((self.threshold / _dot(d, d).sqrt().clamp_min(1e-30)).clamp(max=1), d)
            along = widen(_dot(d, p.x0) / _dot(p.x0, p.x0).clamp_min(1e-30), d) * p.x0
            shift = (scale - 1) * (d - (1 - self.parallel) * along)
            ratio = widen(p.schedule.alpha(p.t) / p.schedule.sigma(p.t), d)
            return p.x0 + shift, p.eps - ratio * shift  # alpha x0 + sigma eps stays x
        if self.name == "cfg_zero":
            velocity, other = p.velocity, n.velocity
            other = widen(_dot(velocity, other) / _dot(other, other).clamp_min(1e-30), other) * other
            velocity = torch.lerp(other, velocity, scale)
            if self.zero_init:
                is_beginning = p.t > 1 - self.zero_init + 1e-6  # a time of the grid itself is no longer of the beginning
                velocity = torch.where(is_beginning.reshape(-1, *(1,) * (x.ndim - 1)), 0, velocity)
            return predictions.solve("flow", p.schedule, x.to(velocity.dtype), p.t, velocity)
        return torch.lerp(n.x0, p.x0, scale), torch.lerp(n.eps, p.eps, scale)


CFG = Rule()
CALL_ARGUMENTS = ("guidance_rule", "guidance_rescale", "guidance_options")  # of a pipeline's call


def default_call(config: Mapping[str, Any]) -> dict[str, Any]:
    """The rule of guidance that a checkpoint has by default, as those of `CALL_ARGUMENTS` that are not plain guidance's.

    config: of the pipeline, or model_index.json. {} for plain guidance.
    """
    return {name: value for name in CALL_ARGUMENTS if (value := config.get(f"default_{name}")) not in (None, "cfg", 0, {})}


def check_default_call(config: Mapping[str, Any], name: str) -> None:
    """UserError where a checkpoint's defaults are no rule of guidance. config: as in `default_call`. name: of its file."""
    rule, rescale, options = (config.get(f"default_{argument}") for argument in CALL_ARGUMENTS)
    if rescale is not None and not (type(rescale) in (int, float) and 0 <= rescale <= 1):
        raise UserError(f"{name}: default_guidance_rescale is {str(rescale)[:40]}; it must be a number from 0 to 1")
    if rule is not None and rule not in RULES:
        raise UserError(f"{name}: default_guidance_rule is {str(rule)[:40]}; valid: {', '.join(RULES)}")
    try:
        Rule(rule or "cfg", **({} if options is None else options))
    except UserError as error:
        raise UserError(f"{name}: default_guidance_options: {error}") from None
    except TypeError:
        raise UserError(
            f"{name}: default_guidance_options is {str(options)[:40]}; it must be numbers by name; valid: {OPTIONS_IN_WORDS}"
        ) from None


class RunningSum:
    """d + momentum * (the same at the evaluation before), for each sample (arXiv 2410.02416, algorithm 1).

    It holds one run of a sampler, which goes down in t. A sample whose t is above that of its last evaluation starts anew, and
    so does a batch of another shape. A sampler with several evaluations a step adds each of them.
    """

    def __init__(self, momentum: float):
        self.momentum = momentum
        self.sums = torch.zeros(0)
        self.times = torch.zeros(0)

    def add(self, d: Tensor, t: Tensor, rows: Tensor, count: int) -> Tensor:
        """The sums [G, ...] of d [G, ...] at t [G], of the rows [G] out of `count` samples."""
        shape = (count, *d.shape[1:])
        if self.sums.shape != shape:
            self.sums = d.new_zeros(shape)
            self.times = t.new_full((count,), -math.inf)
        goes_on = t <= self.times[rows]
        result = d + self.momentum * widen(goes_on.to(d.dtype), d) * self.sums[rows]
        self.sums = self.sums.index_copy(0, rows, result.detach())
        self.times = self.times.index_copy(0, rows, t)
        return result


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """The scalar product of each sample's entries, [B]."""
    return (a * b).reshape(len(a), -1).sum(1)
