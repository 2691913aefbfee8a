"""Log-densities of a denoiser, in nats: the density of its probability-flow ODE, and a lower bound of that of its reverse SDE.

Two models share one denoiser (Maximum likelihood training, arXiv 2101.09258): the ODE, whose density `log_prob` computes, and
the SDE, whose density `variational_bound` bounds from below. With an exact score they are the same, up to what [t_min, t_max]
leaves out.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from latentdiff.denoiser import DenoiserLike
from latentdiff.errors import NotFiniteError, UserError
from latentdiff.samplers import adaptive
from latentdiff.schedules import NoiseSchedule
from latentdiff.utils.random import Generators, rand, randn, randn_like
from latentdiff.utils.tensors import per_sample, widen

DIVERGENCES = ("hutchinson", "exact")
NOISES = ("rademacher", "gaussian")
_STEP = 0.03  # of the finite difference in the check of derivatives, in units of the standard deviation of x_t
_CHUNK = 16  # rows of the Jacobian at a time, which need the memory of so many backward passes


class LogProb(NamedTuple):
    """The result of `log_prob`.

    Attributes:
        log_prob: nats, float64 [B].
        latent: where the ODE takes x0, at t_max, [B, ...].
        nfe: evaluations of the denoiser that each sample needed, int64 [B].
        stderr: standard error of log_prob over the probes, nats [B]; 0 for the exact divergence, nan for a single probe.
    """

    log_prob: Tensor
    latent: Tensor
    nfe: Tensor
    stderr: Tensor


class Bound(NamedTuple):
    """The result of `bound_terms`, in nats, each float64 [B]: bound = prior + reconstruction + diffusion.

    Attributes:
        bound: the lower bound on log p(x0), an estimate.
        prior: -KL(q(x at t_max | x0) || prior), exact.
        reconstruction: E log p(x0 | x at t_min), an estimate.
        diffusion: what the reverse process loses between t_max and t_min, an estimate; its expectation is not above 0.
        stderr: standard error of the bound over the draws.
    """

    bound: Tensor
    prior: Tensor
    reconstruction: Tensor
    diffusion: Tensor
    stderr: Tensor


def log_prob(
    denoiser: DenoiserLike,
    x0: Tensor,
    divergence: str = "hutchinson",
    probes: int = 1,
    rtol: float = 1e-5,
    atol: float = 1e-5,
    generator: Generators = None,
    noise: str = "rademacher",
    max_steps: int = 1000,
) -> LogProb:
    """The log-density of x0 under the probability-flow ODE (Score SDE, arXiv 2011.13456, eq. 39), as `LogProb`.

    log p(x0) = log prior(x at t_max) + the integral over [t_min, t_max] of the divergence of dx/dt. x0 is taken to be x at
    t_min, as is usual: the density is that of data with the noise of t_min (sigma(t_min), 1e-3 on the straight path). The prior
    is N(0, prior_std^2 I), which the forward process ends close to, not on. Both belong to the model, whose density is computed
    exactly but for rtol and atol.

    The ODE is solved in the angle atan(sigma / alpha), for the state x / sqrt(alpha^2 + sigma^2). So every schedule has the
    same, smooth ODE. In t, a DDPM schedule would have a thousand kinks, and VE would grow by four decades.

    Args:
        denoiser: a `Denoiser` or guidance, differentiable in x (for conditioning: `ClassifierFree` at scale 1).
        x0: data [B, ...]; D is the number of its entries per sample. The denoiser is called in its dtype, float32 at least; the
            state is float64.
        divergence: "exact" takes the trace of the Jacobian from D vector-Jacobian products. "hutchinson" estimates it without
            bias as v^T J v (FFJORD, arXiv 1810.01367), with a v that stays the same along the solution.
        probes: how many such v. They share one trajectory: 1 forward and `probes` backward passes per evaluation.
        rtol, atol, max_steps: as in `latentdiff.samplers.adaptive.solve`.
        generator: draws v: one, or a list of B (the v of a sample is then the same at any batch size).
        noise: the distribution of v, "rademacher" or "gaussian".

    Raises:
        UserError: an unknown divergence or noise, a wrong number of probes, an ODE that needs more than max_steps, or a
            denoiser whose derivative is not that of its values, such as a network under no_grad. The last is checked once, with
            three evaluations that nfe does not count.
        NotFiniteError: a result that is not finite.
    """
    _check(divergence, noise, probes)
    try:
        with torch.inference_mode(False), torch.no_grad():  # tensors of inference mode have no derivatives
            x0 = x0.clone() if x0.is_inference() else x0
            x0 = x0.to(torch.promote_types(x0.dtype, torch.float32))
            if x0.shape[0] == 0:
                nothing = x0.new_zeros(0, dtype=torch.float64)
                return LogProb(nothing, x0, nothing.long(), nothing)
            _check_derivative(denoiser, x0)
            vectors = None if divergence == "exact" else torch.stack([_probe(x0, noise, generator) for _ in range(probes)])
            return _integrated(denoiser, x0, vectors, rtol, atol, max_steps)
    except RuntimeError as error:
        if "inference tensor" not in str(error).lower():
            raise
        raise UserError(
            "log_prob: the denoiser holds tensors made under torch.inference_mode; use torch.no_grad instead"
        ) from None


def _integrated(
    denoiser: DenoiserLike, x0: Tensor, vectors: Tensor | None, rtol: float, atol: float, max_steps: int
) -> LogProb:
    """`log_prob` with the vectors [P, B, ...] of Hutchinson's estimate, or None for the exact trace."""
    schedule, batch, dims = denoiser.schedule, x0.shape[0], math.prod(x0.shape[1:])
    ends = torch.tensor([schedule.t_min, schedule.t_max], dtype=torch.float64)
    start, end = torch.atan2(schedule.sigma(ends), schedule.alpha(ends)).tolist()
    first, last = torch.hypot(schedule.sigma(ends), schedule.alpha(ends)).tolist()

    def dynamics(angle: Tensor, state: Tensor) -> Tensor:
        u = state[:, :dims].reshape(x0.shape).to(x0.dtype)
        drift, traces = drift_and_divergence(denoiser, u, angle, vectors)
        return torch.cat([drift.reshape(batch, dims).double(), traces], dim=1)  # [B, D + P]

    def norm(ratios: Tensor) -> Tensor:
        # The integrals are weighed separately: among the D entries of a state their error would hardly count. With a weight of
        # 4 and the default tolerance the error is below 1e-3 nats on mixtures in 16 dimensions
        state, integrals = (part.square().mean(dim=1).sqrt() for part in (ratios[:, :dims], ratios[:, dims:]))
        return torch.maximum(state, 4 * integrals)

    count = 1 if vectors is None else len(vectors)
    state = torch.cat([x0.reshape(batch, dims).double() / first, x0.new_zeros((batch, count), dtype=torch.float64)], 1)
    solution = adaptive.solve(dynamics, state, start, end, rtol, atol, max_steps, norm, variable="angle")
    latent, integrals = last * solution.y[:, :dims].reshape(x0.shape), solution.y[:, dims:]
    stderr = integrals.std(dim=1) / math.sqrt(count) if count > 1 else torch.full((batch,), math.nan).to(integrals)
    density = schedule.prior_log_prob(latent) + dims * math.log(last / first) + integrals.mean(dim=1)
    require_finite(density, "log_prob")
    return LogProb(density, latent.to(x0.dtype), solution.nfe, torch.zeros_like(stderr) if vectors is None else stderr)


def require_finite(nats: Tensor, what: str) -> None:
    """NotFiniteError, naming `what`, where one of nats [B] is NaN or infinite."""
    if wrong := int((~nats.isfinite()).sum()):
        raise NotFiniteError(f"{what}: not finite for {wrong} of {len(nats)} samples; the network or its weights have diverged")


def drift_and_divergence(denoiser: DenoiserLike, u: Tensor, angle: Tensor, vectors: Tensor | None) -> tuple[Tensor, Tensor]:
    """(du/d angle [B, ...], its divergence in u, float64 [B, P]) at angles [B], from one forward of the denoiser.

    u = x / sqrt(alpha^2 + sigma^2) = cos(angle) x0 + sin(angle) eps, whose probability-flow ODE is
    du/d angle = cos(angle) eps - sin(angle) x0.

    vectors: [P, B, ...] for P estimates v^T J v; None for the exact trace, with P = 1.
    """
    schedule = denoiser.schedule
    t = schedule.time_from_log_snr(-2 * angle.tan().log()).clamp(schedule.t_min, schedule.t_max)
    scale = torch.hypot(schedule.alpha(t), schedule.sigma(t))
    with torch.enable_grad():
        u = u.detach().requires_grad_()
        out = denoiser(widen(scale, u) * u, t)
        drift = widen(angle.cos(), u) * out.eps - widen(angle.sin(), u) * out.x0
        if vectors is None:
            return drift.detach(), _exact_trace(drift, u)[:, None]
        traces = []
        for i, v in enumerate(vectors):
            (product,) = torch.autograd.grad(drift, u, v.to(drift), retain_graph=i + 1 < len(vectors))  # v^T J
            traces.append((product * v).flatten(1).double().sum(dim=1))
    return drift.detach(), torch.stack(traces, dim=1)


def _exact_trace(drift: Tensor, x: Tensor) -> Tensor:
    """The sum of d drift_i / d x_i, float64 [B], from rows of the Jacobian: _CHUNK rows of every sample at a time."""
    batch, dims = x.shape[0], math.prod(x.shape[1:])
    trace = torch.zeros(batch, dtype=torch.float64, device=x.device)
    rows = torch.eye(dims, dtype=drift.dtype, device=x.device)
    for start in range(0, dims, _CHUNK):
        chunk = rows[start : start + _CHUNK]  # [k, D]
        seeds = chunk[:, None].expand(-1, batch, -1).reshape(-1, *x.shape)  # [k, B, ...]
        entries = _products(drift, x, seeds).reshape(len(chunk), batch, dims)[:, :, start : start + _CHUNK]  # [k, B, k]
        trace += entries.diagonal(dim1=0, dim2=2).double().sum(-1)
    return trace


def _products(drift: Tensor, x: Tensor, seeds: Tensor) -> Tensor:
    """v^T (d drift / d x) for each v of seeds [k, B, ...], [k, B, ...]; in one batched backward pass where torch can."""
    try:
        return torch.autograd.grad(drift, x, seeds, retain_graph=True, is_grads_batched=True)[0]
    except RuntimeError:  # some kernels have no batched backward pass, such as attention on the CPU
        return torch.stack([torch.autograd.grad(drift, x, seed, retain_graph=True)[0] for seed in seeds])


def _probe(x0: Tensor, noise: str, generator: Generators) -> Tensor:
    """One v of the shape of x0, with E v v^T = I."""
    if noise == "gaussian":
        return randn_like(x0, generator)
    return 2.0 * (rand(x0.shape, generator, x0.device, x0.dtype) < 0.5).to(x0.dtype) - 1.0


def _check(divergence: str, noise: str, probes: int) -> None:
    """UserError for an unknown divergence or noise, or a wrong number of probes."""
    if divergence not in DIVERGENCES:
        raise UserError(f"divergence: {divergence!r} is unknown; valid: {', '.join(DIVERGENCES)}")
    if noise not in NOISES:
        raise UserError(f"noise: {noise!r} is unknown; valid: {', '.join(NOISES)}")
    if probes < 1:
        raise UserError(f"probes: at least 1 is needed, not {probes}")
    if divergence == "exact" and probes != 1:
        raise UserError(f"probes: the exact divergence has none; leave it at 1, not {probes}, or take hutchinson")


def _check_derivative(denoiser: DenoiserLike, x0: Tensor) -> None:
    """UserError if, for most of the samples, v^T J v from autograd differs from finite differences of the drift.

    A network under no_grad still leaves a derivative: that of the formulas around it. The check is where alpha and sigma are
    equal; at t_min a density may change direction within any step. The tolerance is loose, for networks in low precision: 5 %
    of the unit Jacobian's, and what the second difference shows of curvature and rounding. It uses a generator of its own.
    """
    schedule, own = denoiser.schedule, torch.Generator().manual_seed(0)
    w, v = (randn(x0.shape[1:], own, x0.device, x0.dtype) for _ in range(2))
    t = schedule.time_from_log_snr(torch.zeros(1, dtype=torch.float64)).clamp(schedule.t_min, schedule.t_max)
    scale = torch.hypot(schedule.alpha(t), schedule.sigma(t))
    alpha, sigma = (float(value / scale) for value in (schedule.alpha(t), schedule.sigma(t)))
    times = t.to(x0.device).expand(len(x0))

    def drift(u: Tensor) -> Tensor:
        out = denoiser(float(scale) * u, times)
        return alpha * out.eps - sigma * out.x0

    def along_v(change: Tensor) -> Tensor:
        return (change.detach() * v).flatten(1).double().sum(1)  # [B]

    u = (alpha * x0 + sigma * w).detach()
    back, ahead = drift(u - _STEP * v), drift(u + _STEP * v)
    with torch.enable_grad():
        u.requires_grad_()
        here = drift(u)
        product = torch.autograd.grad(here, u, v.expand_as(u).to(here))[0] if here.requires_grad else torch.zeros_like(u)
    measured = along_v(ahead - back) / (2 * _STEP)
    doubt = along_v(ahead - 2 * here + back).abs() / _STEP + 0.05 * (v.double().square().sum() + measured.abs())
    if float(((along_v(product) - measured).abs() > doubt).double().mean()) > 0.5:
        raise UserError(
            "log_prob: the denoiser's derivative in x is not that of its values; its network must not run under no_grad, "
            "nor its output be detached"
        )


def variational_bound(denoiser: DenoiserLike, x0: Tensor, samples: int = 64, generator: Generators = None) -> Tensor:
    """A lower bound on log p(x0) of the reverse SDE (VDM, arXiv 2107.00630, eq. 11), estimated without bias: nats, float64 [B].

    Arguments and errors as in `bound_terms`, which also gives the terms and the standard error.
    """
    return bound_terms(denoiser, x0, samples, generator).bound


@torch.no_grad()
def bound_terms(denoiser: DenoiserLike, x0: Tensor, samples: int = 64, generator: Generators = None) -> Bound:
    """The continuous-time evidence lower bound of x0 and its terms (VDM, arXiv 2107.00630, eq. 11-17), as `Bound`.

    bound = -KL(q(x_T | x0) || prior) + E log p(x0 | x_t at t_min) - 1/2 integral of E |eps - eps_hat(x_t)|^2 d lambda, where
    lambda is the log-SNR, which falls from t_min to t_max, and p(x0 | x_t) = N(x0_hat(x_t), (sigma / alpha)^2 I). Here x0 is
    data, not x at t_min as in `log_prob`. With an exact score the bound is tight, up to the error of the prior and a gap of
    second order in (sigma(t_min) / spread of the data)^2.

    Args:
        denoiser: a `Denoiser` or guidance.
        x0: data [B, ...].
        samples: evaluations for the integral, an even number. lambda is uniform, so all weights are equal, and stratified: two
            draws in each of samples / 2 intervals, whose difference gives the standard error. The reconstruction takes two
            more.
        generator: one, a list of B, or None.

    Raises:
        UserError: fewer than 2 samples, or an odd number.
        NotFiniteError: a result that is not finite.
    """
    if samples < 2 or samples % 2:
        raise UserError(f"samples: must be even and at least 2, not {samples}")
    schedule, dims = denoiser.schedule, math.prod(x0.shape[1:])
    x0 = x0.to(torch.promote_types(x0.dtype, torch.float32))
    low, high = schedule.log_snr(torch.tensor([schedule.t_max, schedule.t_min], dtype=torch.float64)).tolist()
    first = per_sample(schedule.t_min, x0)
    a, b = (_noise_error(denoiser, x0, first, generator) for _ in range(2))
    variance = float(schedule.sigma(schedule.t_min) / schedule.alpha(schedule.t_min)) ** 2
    reconstruction = -0.5 * dims * math.log(2 * math.pi * variance) - 0.25 * (a + b)
    spread = (0.25 * (a - b)) ** 2
    strata, total = samples // 2, torch.zeros_like(a)
    weight = 0.5 * (high - low) / strata
    for k in range(strata):
        times = [_time_within(schedule, low, high, k, strata, x0, generator) for _ in range(2)]
        a, b = (_noise_error(denoiser, x0, t, generator) for t in times)
        total = total + 0.5 * (a + b)
        spread = spread + (weight * 0.5 * (a - b)) ** 2
    alpha, sigma = float(schedule.alpha(schedule.t_max)), float(schedule.sigma(schedule.t_max))
    ratio = (sigma / schedule.prior_std) ** 2
    signal = (alpha / schedule.prior_std) ** 2 * x0.double().square().flatten(1).sum(1)
    prior = -0.5 * (dims * (ratio - 1 - math.log(ratio)) + signal)
    diffusion = -weight * total
    require_finite(bound := prior + reconstruction + diffusion, "variational bound")
    return Bound(bound, prior, reconstruction, diffusion, spread.sqrt())


def _time_within(
    schedule: NoiseSchedule, low: float, high: float, k: int, strata: int, x0: Tensor, generator: Generators
) -> Tensor:
    """One t per sample [B], whose log-SNR is uniform in interval k of `strata` equal ones between low and high."""
    place = (k + rand((x0.shape[0],), generator, x0.device, torch.float64)) / strata
    return schedule.time_from_log_snr(low + (high - low) * place).clamp(schedule.t_min, schedule.t_max)


def _noise_error(denoiser: DenoiserLike, x0: Tensor, t: Tensor, generator: Generators) -> Tensor:
    """An unbiased draw of E |eps - eps_hat(x_t)|^2 at t [B]: [B].

    Where alpha is large eps_hat is small, and the draw is mostly |eps|^2, whose mean is known. So share^2 (|eps|^2 - D) is
    subtracted, where share is what a denoiser of unit-variance Gaussian data leaves of eps. This does not change the mean.
    """
    eps = randn(x0.shape, generator, x0.device, x0.dtype)
    alpha, sigma = (widen(value, x0) for value in (denoiser.schedule.alpha(t), denoiser.schedule.sigma(t)))
    estimate = denoiser(alpha * x0 + sigma * eps, t).eps
    share = torch.sigmoid(denoiser.schedule.log_snr(t))
    size = eps.double().square().flatten(1).sum(1) - math.prod(x0.shape[1:])
    return (eps - estimate).double().square().flatten(1).sum(1) - share**2 * size


def bits_per_dim(nats: Tensor, dims: int, levels: int = 256, data_range: tuple[float, float] = (-1.0, 1.0)) -> Tensor:
    """Bits per dimension of data with `levels` levels (256 for 8 bits), from log-densities in nats: a tensor of the same shape.

    bits = -nats / (dims ln 2) - log2((high - low) / levels).

    Args:
        nats: log-densities of data that were dequantised by uniform noise, so that the `levels` bins fill data_range. A level
            then has the probability density * (high - low) / levels in each dimension.
        dims: numbers per sample.
        levels: values that each number can take.
        data_range: (low, high). (0, levels) is for log-probabilities of the levels themselves.

    Raises:
        UserError: dims or levels below 1, or a range without width.
    """
    low, high = data_range
    if dims < 1 or levels < 1 or not high > low:
        raise UserError(f"bits_per_dim: dims {dims}, levels {levels}, data_range {data_range}: each must be positive")
    return -torch.as_tensor(nats) / (dims * math.log(2)) - math.log2((high - low) / levels)
