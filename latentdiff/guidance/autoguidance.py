"""Autoguidance: away from a weaker model of the same data."""

from functools import partial
from typing import Any

from torch import Tensor

from latentdiff.denoiser import Denoised, DenoiserLike
from latentdiff.guidance.common import Interval, check_options, check_same_path, guided_rows, replace_estimates
from latentdiff.guidance.rules import CFG, Rule, RunningSum
from latentdiff.schedules import NoiseSchedule
from latentdiff.utils.tensors import per_sample


class Autoguidance:
    """Autoguidance (Karras et al., arXiv 2406.02507, eq. 3 with w = scale): weak + scale (denoiser - weak), on x0 and eps.

    Args:
        denoiser: a `Denoiser` or another guidance.
        weak: a denoiser with the same noise schedule that has the same faults, but larger: an earlier checkpoint of the same
            run, or a smaller network. Its prediction may be another. It gets the same conditioning.
        scale: 1 is off, and weak is not evaluated; 0 is weak alone.
        interval: (low, high) in t outside of which a sample is not guided; None: guide at every t.
        rescale: as in `ClassifierFree`, to the standard deviation of the denoiser's x0.
        rule: how the two estimates are combined; see `latentdiff.guidance.rules.Rule`.

    Raises:
        UserError: another schedule of weak, or an interval or rescale out of range.
    """

    def __init__(
        self,
        denoiser: DenoiserLike,
        weak: DenoiserLike,
        scale: float,
        interval: Interval = None,
        rescale: float = 0.0,
        rule: Rule = CFG,
    ):
        check_options(interval, rescale)
        check_same_path(denoiser.schedule, weak.schedule, "the weak denoiser")
        self.denoiser, self.weak = denoiser, weak
        self.scale, self.interval, self.rescale, self.rule = scale, interval, rescale, rule
        self.running = RunningSum(rule.momentum)
        self.schedule: NoiseSchedule = denoiser.schedule

    def __call__(self, x: Tensor, t: float | Tensor, **conditioning: Any) -> Denoised:
        """The guided estimates at x [B, ...] and t (a float or [B]), as `Denoised`. conditioning: given to both denoisers."""
        times = per_sample(t, x)
        denoised = self.denoiser(x, times, **conditioning)
        rows = guided_rows(times, self.scale != 1, self.interval)
        if not bool(rows.any()):
            return denoised
        weaker = self.weak(x, times, **conditioning)
        guided = rows.nonzero()[:, 0]  # [G]
        p, n = (Denoised(d.x0[guided], d.eps[guided], self.schedule, times[guided]) for d in (denoised, weaker))
        summed = partial(self.running.add, rows=guided, count=len(x))
        x0, eps = self.rule.combine(x[guided], p, n, self.scale, summed)
        x0, eps = denoised.x0.index_copy(0, guided, x0), denoised.eps.index_copy(0, guided, eps)
        return replace_estimates(x, denoised, x0, eps, rows, self.rescale)
