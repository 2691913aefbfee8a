"""Samplers that move within p_t by Langevin dynamics: x + h score + sqrt(2 h) z, exact for p_t as h goes to 0."""

from collections.abc import Callable, Mapping
from itertools import pairwise

from torch import Tensor

from latentdiff.denoiser import Denoised
from latentdiff.errors import UserError
from latentdiff.samplers.adaptive import dopri5
from latentdiff.samplers.ancestral import ancestral, ddim
from latentdiff.samplers.common import Callback, DenoiserLike, Knot, knots, report
from latentdiff.samplers.ode import euler, heun
from latentdiff.samplers.sde import euler_maruyama, reverse_diffusion
from latentdiff.utils.random import Generators, randn_like
from latentdiff.utils.tensors import flat_mean, widen

# What can be broken off after each step; a multistep solver would lose its memory.
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
    """Predictor-corrector sampling, 2011.13456 algorithms 1, 4 and 5: each step of the predictor from t to s is
    followed by `corrector_steps` of Langevin dynamics at s: x + h score + sqrt(2 h) z, h = 2 a (snr |z| / |score|)^2.

    a = (alpha_t / alpha_s)^2, which is algorithm 4's 1 on VE and algorithm 5's 1 - beta on VP.
    predictor: ancestral, ddim, euler, heun, dopri5, euler_maruyama or reverse_diffusion.
    norms: "expected" puts |z| = sqrt(D) and |score| = sqrt(D) / sigma_s, what both tend to in high dimension D where
    noise dominates: h = 2 a (snr sigma_s)^2.  "measured" takes both norms from each sample.  score_sde takes their means
    over the batch, so that an image depends on its neighbours.  A sample's own make h a function of x and z, and
    Langevin dynamics is then not exact for p_t as h goes to 0: it gives a Gaussian in D dimensions (1 + 2/D)^2 of its
    variance (2 % too much at D = 200, nonsense at D = 1 or 2).
    One evaluation per corrector step besides the predictor's; a step to sigma = 0 is not corrected.
    x: the state [B, ...] at grid[0]; returns the state at grid[-1].  UserError for an option out of range.
    """
    if predictor not in PREDICTORS:
        raise UserError(f"predictor: {predictor!r} is unknown; valid: {', '.join(PREDICTORS)}")
    if norms not in _NORMS:
        raise UserError(f"norms: {norms!r} is unknown; valid: {', '.join(_NORMS)}")
    if corrector_steps < 0 or not snr > 0:
        raise UserError(f"corrector_steps: at least 0, and snr above 0, not {corrector_steps} and {snr}")
    found: list[Tensor] = []  # the predictor's x0
    for i, (now, then) in enumerate(pairwise(knots(denoiser.schedule, grid))):
        x = PREDICTORS[predictor](denoiser, x, grid[i : i + 2], generator, lambda _, __, ___, x0: found.append(x0))
        for _ in range(corrector_steps if then.sigma > 0 else 0):
            seen, z = denoiser(x, then.t), randn_like(x, generator)
            h = 2 * (now.alpha / then.alpha * snr * _noise_to_score(seen, z, then, norms)) ** 2
            x = x + h * seen.score + (2 * h) ** 0.5 * z
        x = report(callback, i, now.t, x, found.pop())
    return x


def _noise_to_score(seen: Denoised, z: Tensor, at: Knot, norms: str) -> float | Tensor:
    """|z| / |score|: a float, or [B, 1, ...]."""
    if norms == "expected":
        return at.sigma
    return widen((flat_mean(z**2) / flat_mean(seen.score**2)).sqrt(), z)


def annealed_langevin(
    denoiser: DenoiserLike,
    x: Tensor,
    grid: Tensor,
    generator: Generators = None,
    callback: Callback | None = None,
    inner_steps: int = 10,
    step_size: float = 0.2,
) -> Tensor:
    """Annealed Langevin dynamics, 1907.05600 algorithm 1, with p_t of x_t = alpha x0 + sigma eps as the noise levels:
    at each time of the grid `inner_steps` of x + (a/2) score + sqrt(a) z.

    a = step_size sigma_t^2: the paper's eps sigma_i^2 / sigma_L^2, its eps = 2e-5 at sigma_L = 0.01 being 0.2 here (and
    its inner_steps 100).  Each inner step brings x nearer to p_t by a factor 1 - step_size/2 where noise dominates, and
    leaves its noise step_size/4 too wide in variance; so (1 - step_size/2)^inner_steps should be below the ratio of
    sigmas between neighbouring times.
    From level to level x moves by (alpha_s - alpha_t) x0, nothing where alpha is 1 as in the paper: Langevin steps as small
    as sigma could not bring the data's part to its new scale, while they do bring the noise down.
    inner_steps evaluations a level, the first and last included; a grid that ends on sigma = 0 ends with the x0 estimate
    of the level before.  callback: once x is settled at the new level, with that level's t and the x0 found last.
    x: the state [B, ...] at grid[0]; returns the state at grid[-1].  UserError for an option out of range.
    """
    if inner_steps < 1 or not 0 < step_size < 4:
        raise UserError(f"inner_steps: at least 1, and step_size above 0 and below 4, not {inner_steps} and {step_size}")

    def settle(x: Tensor, at: Knot) -> tuple[Tensor, Tensor]:
        a = step_size * at.sigma**2
        for _ in range(inner_steps):
            seen = denoiser(x, at.t)
            x = x - 0.5 * a / at.sigma * seen.eps + a**0.5 * randn_like(x, generator)
        return x, seen.x0

    steps = knots(denoiser.schedule, grid)
    x, x0 = settle(x, steps[0])
    for i, (now, then) in enumerate(pairwise(steps)):
        if then.sigma > 0:
            x, x0 = settle(x + (then.alpha - now.alpha) * x0, then)
        else:
            x0 = denoiser(x, now.t).x0
            x = then.alpha * x0
        x = report(callback, i, then.t if then.sigma > 0 else now.t, x, x0)
    return x
