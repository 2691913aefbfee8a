"""Samplers with Langevin dynamics within p_t: x + h score + sqrt(2 h) z, which is exact for p_t as h goes to 0."""

from collections.abc import Callable, Mapping
from itertools import pairwise

from torch import Tensor

from latentdiff.denoiser import Denoised
from latentdiff.errors import UserError
from latentdiff.samplers.adaptive import dopri5
from latentdiff.samplers.ancestral import ancestral, ddim
from latentdiff.samplers.common import Callback, DenoiserLike, GridPoint, apply_callback, grid_points
from latentdiff.samplers.ode import euler, heun
from latentdiff.samplers.sde import euler_maruyama, reverse_diffusion
from latentdiff.utils.random import Generators, randn_like
from latentdiff.utils.tensors import flat_mean, widen

# Samplers that can be called for one step at a time; a multistep solver would lose its earlier evaluations
PREDICTORS: Mapping[str, Callable[..., Tensor]] = {
    "ancestral": ancestral,
    "ddim": ddim,
    "euler_maruyama": euler_maruyama,
    "reverse_diffusion": reverse_diffusion,
    "euler": euler,
    "heun": heun,
    "dopri5": dopri5,
}
_NORMS = ("expected", "measured")


def predictor_corrector(
    denoiser: DenoiserLike,
    x: Tensor,
    grid: Tensor,
    generator: Generators = None,
    callback: Callback | None = None,
    predictor: str = "reverse_diffusion",
    corrector_steps: int = 1,
    snr: float = 0.16,
    norms: str = "expected",
) -> Tensor:
    """Predictor-corrector sampling (Score SDE, arXiv 2011.13456, algorithms 1, 4 and 5).

    Each step of the predictor from t to s is followed by `corrector_steps` of Langevin dynamics at s: x + h score + sqrt(2 h) z
    with h = 2 a (snr |z| / |score|)^2 and a = (alpha_t / alpha_s)^2, which is 1 on VE (algorithm 4) and 1 - beta on VP
    (algorithm 5). Each corrector step costs one evaluation of the denoiser. A step to sigma = 0 is not corrected.

    Args:
        denoiser: a `Denoiser`, or guidance around one.
        x: the state x_t [B, ...] at grid[0].
        grid: descending times [n + 1] in [0, 1], float64; 0 is data.
        generator: draws the noise: one, a list of B (one per sample), or None.
        callback: called after each step; see `latentdiff.samplers.common.Callback`.
        predictor: "ancestral", "ddim", "euler", "heun", "dopri5", "euler_maruyama" or "reverse_diffusion".
        corrector_steps: at least 0.
        snr: the paper's r, above 0.
        norms: "expected" takes |z| = sqrt(D) and |score| = sqrt(D) / sigma_s, their limits in high dimension D where noise
            dominates: h = 2 a (snr sigma_s)^2. "measured" takes the norms of each sample. (The paper's code takes their means
            over the batch, so that an image depends on the others.) With the norms of a sample, h depends on x and z, and
            Langevin dynamics is no longer exact for p_t as h goes to 0: a Gaussian in D dimensions gets (1 + 2/D)^2 of its
            variance (2 % too much at D = 200; useless at D = 1 or 2).

    Returns:
        The state [B, ...] at grid[-1].

    Raises:
        UserError: an option out of range.
    """
    if predictor not in PREDICTORS:
        raise UserError(f"predictor: {predictor!r} is unknown; valid: {', '.join(PREDICTORS)}")
    if norms not in _NORMS:
        raise UserError(f"norms: {norms!r} is unknown; valid: {', '.join(_NORMS)}")
    if corrector_steps < 0 or not snr > 0:
        raise UserError(f"corrector_steps: at least 0, and snr above 0, not {corrector_steps} and {snr}")
    estimates: list[Tensor] = []  # x0 of the predictor
    for i, (now, then) in enumerate(pairwise(grid_points(denoiser.schedule, grid))):
        x = PREDICTORS[predictor](denoiser, x, grid[i : i + 2], generator, lambda _, __, ___, x0: estimates.append(x0))
        for _ in range(corrector_steps if then.sigma > 0 else 0):
            out, z = denoiser(x, then.t), randn_like(x, generator)
            h = 2 * (now.alpha / then.alpha * snr * _noise_to_score(out, z, then, norms)) ** 2
            x = x + h * out.score + (2 * h) ** 0.5 * z
        x = apply_callback(callback, i, now.t, x, estimates.pop())
    return x


def _noise_to_score(out: Denoised, z: Tensor, at: GridPoint, norms: str) -> float | Tensor:
    """|z| / |score|, a float or [B, 1, ...]."""
    if norms == "expected":
        return at.sigma
    return widen((flat_mean(z**2) / flat_mean(out.score**2)).sqrt(), z)


def annealed_langevin(
    denoiser: DenoiserLike,
    x: Tensor,
    grid: Tensor,
    generator: Generators = None,
    callback: Callback | None = None,
    inner_steps: int = 10,
    step_size: float = 0.2,
) -> Tensor:
    """Annealed Langevin dynamics (NCSN, arXiv 1907.05600, algorithm 1) with p_t of x_t = alpha x0 + sigma eps as noise levels.

    At each time of the grid there are `inner_steps` of x + (a/2) score + sqrt(a) z with a = step_size sigma_t^2, one evaluation
    of the denoiser each. This is the paper's eps sigma_i^2 / sigma_L^2: its eps = 2e-5 at sigma_L = 0.01 is a step_size of 0.2
    here, and its inner_steps are 100. Where noise dominates, each inner step brings x closer to p_t by a factor 1 -
    step_size/2, and leaves a variance that is step_size/4 too large. So (1 - step_size/2)^inner_steps should be below the ratio
    of sigmas between neighbouring times.

    From level to level x moves by (alpha_s - alpha_t) x0, which is 0 where alpha is 1, as in the paper: Langevin steps of the
    size of sigma cannot change the scale of the data. A grid that ends on sigma = 0 ends with the x0 estimate of the level
    before.

    Args:
        denoiser: a `Denoiser`, or guidance around one.
        x: the state x_t [B, ...] at grid[0].
        grid: descending times [n + 1] in [0, 1], float64; 0 is data.
        generator: draws the noise: one, a list of B (one per sample), or None.
        callback: called after each level, with the t and the last x0 of that level; see `latentdiff.samplers.common.Callback`.
        inner_steps: steps at each time of the grid, the first and last included; at least 1.
        step_size: see above; above 0 and below 4.

    Returns:
        The state [B, ...] at grid[-1].

    Raises:
        UserError: an option out of range.
    """
    if inner_steps < 1 or not 0 < step_size < 4:
        raise UserError(f"inner_steps: at least 1, and step_size above 0 and below 4, not {inner_steps} and {step_size}")

    def settle(x: Tensor, at: GridPoint) -> tuple[Tensor, Tensor]:
        a = step_size * at.sigma**2
        for _ in range(inner_steps):
            out = denoiser(x, at.t)
            x = x - 0.5 * a / at.sigma * out.eps + a**0.5 * randn_like(x, generator)
        return x, out.x0

    steps = grid_points(denoiser.schedule, grid)
    x, x0 = settle(x, steps[0])
    for i, (now, then) in enumerate(pairwise(steps)):
        if then.sigma > 0:
            x, x0 = settle(x + (then.alpha - now.alpha) * x0, then)
        else:
            x0 = denoiser(x, now.t).x0
            x = then.alpha * x0
        x = apply_callback(callback, i, then.t if then.sigma > 0 else now.t, x, x0)
    return x
