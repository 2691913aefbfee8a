"""Samples of which some entries are known: replacement after each step, and RePaint's resampling. For every sampler."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from latentdiff.errors import UserError
from latentdiff.samplers.common import Callback, DenoiserLike, GridPoint, apply_callback, grid_points
from latentdiff.utils.random import Generators, randn_like


@dataclass(frozen=True, eq=False)
class Replacement:
    """Entries of x0 that are known. After each step they take the place of the sampler's own, with the noise of that time.

    Replacement (Score SDE, arXiv 2011.13456, appendix I.2) sets the known entries of x_s to alpha_s x0 + sigma_s z. The hidden
    entries then fit noised known ones, and not x0, so it does not draw from the posterior, however many steps it takes.
    Resampling (RePaint, arXiv 2201.09865, algorithm 1) brings it closer: it runs each part of the grid several times, with
    noise added in between to go back to the start of the part. The last step, to sigma = 0, is run once.

    Args:
        known: x0 [B or 1, ...]; its hidden entries are not read.
        hidden: 1 (at least 0.5) where x0 is drawn, 0 where it is known; it broadcasts to `known`, as [B or 1, 1, h, w] does.
        resamples: how often each part of the grid is run, RePaint's U. 1 is plain replacement. It multiplies the evaluations.
        jump: steps of the grid in a part, RePaint's jump length. A multistep sampler starts anew with each part.
        noise: z [B, ...], the same in every step, as in diffusers; None: a new one is drawn in each. With the noise that the
            sampler starts from, the known entries keep to the path of a deterministic sampler.

    Raises:
        UserError: a number below 1, or shapes that do not go together.
    """

    known: Tensor
    hidden: Tensor
    resamples: int = 1
    jump: int = 1
    noise: Tensor | None = None

    def __post_init__(self) -> None:
        if self.resamples < 1 or self.jump < 1:
            raise UserError(f"replacement: resamples {self.resamples} and jump {self.jump} must be at least 1")
        try:
            torch.broadcast_shapes(self.known.shape, self.hidden.shape)
        except RuntimeError:
            shapes = f"{list(self.hidden.shape)} does not go with known {list(self.known.shape)}"
            raise UserError(f"replacement: hidden {shapes}; give [B or 1, 1, h, w]") from None

    def put(self, x: Tensor, at: GridPoint | None, generator: Generators) -> Tensor:
        """x [B, ...] with the known entries replaced by those of x_t at a grid point, or by x0 for None."""
        known = self.known.to(x)
        if at is not None and at.sigma > 0:
            noise = randn_like(x, generator) if self.noise is None else self.noise.to(x)
            known = at.alpha * known + at.sigma * noise
        return torch.where(self.hidden.to(x) >= 0.5, x, known.expand_as(x))


def run_replaced(
    run: Callable[..., Tensor],
    denoiser: DenoiserLike,
    x: Tensor,
    grid: Tensor,
    generator: Generators,
    callback: Callback | None,
    replacement: Replacement,
    whole: bool = True,
    **options: Any,
) -> Tensor:
    """What run(denoiser, x, grid, generator, callback, **options) gives, with `replacement` after each step.

    Args:
        run: a sampler; it calls back after each step of the grid, or once at the grid's end.
        denoiser, x, grid, generator, callback, options: the sampler's arguments. The callback counts the steps that are run.
        replacement: what is known.
        whole: without resampling, run the grid in one go, which a multistep sampler needs. False for a sampler that calls back
            once: it is then run step by step.

    Returns:
        The state [B, ...] at grid[-1].
    """
    points, steps = grid_points(denoiser.schedule, grid), 0
    for first, last, times in _parts(points, replacement, whole):
        for time in range(times):
            ends = iter(points[first + 1 : last + 1])

            def replace(step: int, t: float, state: Tensor, x0: Tensor, ends: Any = ends) -> Tensor:
                nonlocal steps
                state = replacement.put(state, next(ends), generator)
                steps += 1
                return apply_callback(callback, steps - 1, t, state, x0)

            x = run(denoiser, x, grid[first : last + 1], generator, replace, **options)
            if time < times - 1:
                x = _noised(x, points[last], points[first], generator)
    return x


def _parts(points: list[GridPoint], replacement: Replacement, whole: bool) -> list[tuple[int, int, int]]:
    """(first, last, times) of each part of the grid: the places of its ends, and how often it is run."""
    steps = len(points) - 1
    if replacement.resamples == 1:
        return [(0, steps, 1)] if whole else [(i, i + 1, 1) for i in range(steps)]
    # The step to sigma = 0 ends on the mean of x0. Noise added to that would give too narrow an x_t
    again = steps - 1 if points[-1].sigma == 0 else steps
    jump = replacement.jump if whole else 1
    parts = [(i, min(i + jump, again), replacement.resamples) for i in range(0, again, jump)]
    return parts + [(again, steps, 1)] * (again < steps)


def _noised(x: Tensor, now: GridPoint, back: GridPoint, generator: Generators) -> Tensor:
    """x_t at the noisier point `back`, drawn given x [B, ...] at `now`: the transition of the forward process."""
    kept = back.alpha / now.alpha
    return kept * x + max(back.sigma**2 - (kept * now.sigma) ** 2, 0.0) ** 0.5 * randn_like(x, generator)
