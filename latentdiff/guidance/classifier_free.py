"""Classifier-free guidance."""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from latentdiff.denoiser import Denoised, DenoiserLike
from latentdiff.errors import UserError
from latentdiff.guidance.common import Interval, check_options, guided_rows, join_conditions, replace_estimates
from latentdiff.guidance.rules import CFG, Rule, RunningSum
from latentdiff.schedules import NoiseSchedule
from latentdiff.utils.tensors import per_sample


class ClassifierFree:
    """Classifier-free guidance (Ho & Salimans, arXiv 2207.12598, eq. 6 with scale = 1 + w): uncond + scale (cond - uncond).

    It acts on x0 and eps, on every channel.

    Args:
        denoiser: a `Denoiser` or another guidance. It is called with `conditional` or `unconditional`, both in one forward of
            at most 2 B samples.
        conditional, unconditional: keyword arguments with the same keys. Tensors are [B, ...], also within a dict, such as
            SDXL's added_cond_kwargs. Anything else must be equal in both.
        scale: 1 is off: one forward of B samples, and `unconditional` is not used.
        interval: (low, high) in t (Kynkäänniemi et al., arXiv 2404.07724). Outside of it a sample gets the conditional
            prediction, and costs one evaluation. None: guide at every t.
        rescale: phi of guidance rescale (Lin et al., arXiv 2305.08891, eq. 15-16), in [0, 1], applied to x0: the standard
            deviation of each sample goes from the guided one (0) to the conditional one (1).
        rule: how the two estimates are combined; see `latentdiff.guidance.rules.Rule`.
        bare: keyword arguments with the same keys, without a condition that the other two share, such as a second image. None:
            there is none.
        bare_scale: scale of that condition (InstructPix2Pix, arXiv 2211.09800, eq. 3); 1 is off:
            bare + bare_scale (uncond - bare) + scale (cond - uncond). Guided samples cost three evaluations then.

    Raises:
        UserError: different keys, or an interval or rescale out of range.
    """

    def __init__(
        self,
        denoiser: DenoiserLike,
        conditional: dict[str, Any],
        unconditional: dict[str, Any],
        scale: float,
        interval: Interval = None,
        rescale: float = 0.0,
        rule: Rule = CFG,
        bare: dict[str, Any] | None = None,
        bare_scale: float = 1.0,
    ):
        check_options(interval, rescale)
        bare = None if bare_scale == 1 else bare
        if (scale != 1 or bare is not None) and not conditional.keys() == unconditional.keys() == (bare or conditional).keys():
            raise UserError(
                f"guidance: conditional has {sorted(conditional)} and unconditional {sorted(unconditional)}; "
                "the keys must be the same"
            )
        self.denoiser, self.conditional, self.unconditional = denoiser, conditional, unconditional
        self.scale, self.interval, self.rescale, self.rule = scale, interval, rescale, rule
        self.bare, self.bare_scale = bare, bare_scale
        self.running = RunningSum(rule.momentum)
        self.schedule: NoiseSchedule = denoiser.schedule

    def __call__(self, x: Tensor, t: float | Tensor, **conditioning: Any) -> Denoised:
        """The guided estimates at x [B, ...] and t (a float or [B]), as `Denoised`.

        conditioning: given to both branches; tensors are [B, ...].
        """
        times = per_sample(t, x)
        conditional = {**conditioning, **self.conditional}
        rows = guided_rows(times, self.scale != 1 or self.bare is not None, self.interval)
        if not bool(rows.any()):
            return self.denoiser(x, times, **conditional)
        guided = rows.nonzero()[:, 0]  # [G]
        others = [{**conditioning, **each} for each in (self.unconditional, self.bare) if each is not None]
        together = self.denoiser(
            torch.cat([x, *[x[guided]] * len(others)]),  # [B + G, ...], or [B + 2 G, ...]
            torch.cat([times, *[times[guided]] * len(others)]),
            **{key: join_conditions(key, conditional[key], [each[key] for each in others], guided) for key in conditional},
        )
        sizes = [len(x), *[len(guided)] * len(others)]
        (first, *rest), (first_eps, *rest_eps) = together.x0.split(sizes), together.eps.split(sizes)
        denoised = Denoised(first, first_eps, self.schedule, times)
        positive = Denoised(denoised.x0[guided], denoised.eps[guided], self.schedule, times[guided])  # [G, ...]
        negative = Denoised(rest[0], rest_eps[0], self.schedule, times[guided])
        summed = partial(self.running.add, rows=guided, count=len(x))
        x0, eps = self.rule.combine(x[guided], positive, negative, self.scale, summed)
        if self.bare is not None:
            x0 = x0 + (self.bare_scale - 1) * (rest[0] - rest[1])
            eps = eps + (self.bare_scale - 1) * (rest_eps[0] - rest_eps[1])
        x0, eps = denoised.x0.index_copy(0, guided, x0), denoised.eps.index_copy(0, guided, eps)
        return replace_estimates(x, denoised, x0, eps, rows, self.rescale)
