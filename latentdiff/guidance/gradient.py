"""Guidance by a gradient: score + grad log p(y | x_t), where y is a class or an observation.

By Bayes' rule that is the score of p_t(x_t | y). A classifier of noised samples gives the term itself. For an observation
y = A(x0) + noise it is computed from the denoiser's estimate of x0.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from latentdiff.denoiser import Denoised, DenoiserLike
from latentdiff.errors import UserError
from latentdiff.guidance.common import (
    Interval,
    add_to_score,
    as_variable,
    check_options,
    conjugate_gradient,
    differentiable,
    gradient,
    guided_rows,
)
from latentdiff.schedules import NoiseSchedule
from latentdiff.utils.tensors import per_sample, widen


class Classifier:
    """Classifier guidance (ADM, arXiv 2105.05233, section 4): score + strength grad_x log p(y | x_t, t).

    Args:
        denoiser: a `Denoiser` or another guidance.
        log_prob_fn: log_prob_fn(x, t) -> [B] in nats, with x = x_t [B, ...] and t [B] float64: the log-probability of each
            sample's class, differentiable in x. For example functools.partial(load_classifier(folder), labels=labels).
        strength: 0 is off. 1 is Bayes' rule: with the exact p(y | x_t, t) it gives the conditional score.
        interval: (low, high) in t outside of which a sample is not guided; None: guide at every t.
        rescale: as in `ClassifierFree`, to the standard deviation of the denoiser's x0.

    Raises:
        UserError: an interval or rescale out of range. When called: a log_prob_fn that is not differentiable or not [B].
    """

    def __init__(
        self,
        denoiser: DenoiserLike,
        log_prob_fn: Callable[[Tensor, Tensor], Tensor],
        strength: float,
        interval: Interval = None,
        rescale: float = 0.0,
    ):
        check_options(interval, rescale)
        self.denoiser, self.log_prob_fn = denoiser, log_prob_fn
        self.strength, self.interval, self.rescale = strength, interval, rescale
        self.schedule: NoiseSchedule = denoiser.schedule

    def __call__(self, x: Tensor, t: float | Tensor, **conditioning: Any) -> Denoised:
        """The guided estimates at x [B, ...] and t (a float or [B]), as `Denoised`. conditioning: given to the denoiser."""
        if _inference(x):
            return _normal_mode(self, x, t, conditioning)
        times = per_sample(t, x)
        denoised = self.denoiser(x, times, **conditioning)
        rows = _guided_rows(self, times)
        if not bool(rows.any()):
            return denoised
        at, again = as_variable(x)
        with torch.enable_grad():
            log_p = differentiable(self.log_prob_fn(at, times), "log_prob_fn(x, t)")
            if log_p.shape != (len(x),):
                raise UserError(f"guidance: log_prob_fn gave {list(log_p.shape)} for {len(x)} samples; one number each")
            shift = self.strength * gradient(log_p, at, again)
        return add_to_score(x, denoised, shift.to(denoised.x0.dtype), rows, self.rescale)


RECONSTRUCTION_METHODS = ("gradient", "dps", "pigdm", "mmps")


class Reconstruction:
    """Guidance to samples with operator(x0) = y: score + strength grad_x log p(y | x_t), for y = operator(x0) + noise_std n.

    x0_hat = E[x0 | x_t] is the denoiser's estimate, through which the gradient goes: J = d x0_hat / d x_t. A is the operator's
    derivative at x0_hat, r = y - operator(x0_hat), and M the number of its entries. The methods approximate p(y | x_t):

    - "gradient": N(operator(x0_hat), noise_std^2), with the gradient J^T A^T r / noise_std^2 (DPS, arXiv 2209.14687, eq. 10 and
      16). It needs one derivative of the denoiser. It ignores the uncertainty of x0_hat, so it is biased even where everything
      is linear and Gaussian. Where noise_std^2 is below A C A^T it overshoots, at few steps without bound: use a smaller
      strength there, found by trial.
    - "dps": the same with v = max(noise_std^2, |r|^2 / M) for noise_std^2, in each sample. DPS also divides by the size of the
      residual (algorithm 1, zeta = zeta' / |r|), so that it does not overshoot. |r|^2 / M estimates the mean of the entries'
      variances, A C A^T + noise_std^2, of which this is the isotropic approximation. Biased as well.
    - "pigdm": N(operator(x0_hat), noise_std^2 + v A A^T) with v = sigma^2 / (alpha^2 + sigma^2), solved by conjugate gradients
      (PiGDM, Song et al., ICLR 2023, "Pseudoinverse-guided diffusion models for inverse problems", section 3). It
      needs one derivative of the denoiser, and two of the operator for each step of the solver. Exact where the data are N(m,
      1) in each entry, independent of each other.
    - "mmps": N(operator(x0_hat), noise_std^2 + A C A^T) with C = Cov[x0 | x_t] = (sigma^2 / alpha) J (TMPD, arXiv 2310.06721,
      section 3), solved by conjugate gradients (MMPS, arXiv 2405.13712). At strength 1 x0 becomes x0_hat + C A^T (noise_std^2
      + A C A^T)^-1 (y - A x0_hat), Kalman's update. This is exact for a linear operator and Gaussian data. It needs two
      derivatives of the operator and one of the denoiser for each of at most solver_steps steps.

    Args:
        denoiser: a `Denoiser` or another guidance, differentiable in x.
        operator: operator(x0 [B, ...]) -> [B, ...], differentiable, each sample alone; see `latentdiff.guidance.operators`.
        y: the observations, of the shape of the operator's result; or [1, ...], one observation for all samples.
        strength: 0 is off. 1 is Bayes' rule under the method's approximation.
        noise_std: standard deviation of the noise in y, above 0.
        covariance: True is method "mmps", False "gradient"; for calls that give no method.
        solver_steps: the most steps of conjugate gradients, at least 1.
        interval: (low, high) in t outside of which a sample is not guided; None: guide at every t.
        rescale: as in `ClassifierFree`, to the standard deviation of the denoiser's x0.
        method: one of `RECONSTRUCTION_METHODS`; see above.

    Raises:
        UserError: an option out of range. When called: an operator that is not differentiable or whose result has another
            shape.
    """

    def __init__(
        self,
        denoiser: DenoiserLike,
        operator: Callable[[Tensor], Tensor],
        y: Tensor,
        strength: float,
        noise_std: float = 1.0,
        covariance: bool = False,
        solver_steps: int = 10,
        interval: Interval = None,
        rescale: float = 0.0,
        method: str | None = None,
    ):
        check_options(interval, rescale)
        if noise_std <= 0 or solver_steps < 1:
            raise UserError(f"guidance: noise_std {noise_std} must be above 0 and solver_steps {solver_steps} at least 1")
        method = method or ("mmps" if covariance else "gradient")
        if method not in RECONSTRUCTION_METHODS:
            raise UserError(f"guidance method: {method!r} is unknown; valid: {', '.join(RECONSTRUCTION_METHODS)}")
        self.denoiser, self.operator, self.y, self.strength = denoiser, operator, y, strength
        self.noise_std, self.method, self.solver_steps = noise_std, method, solver_steps
        self.interval, self.rescale = interval, rescale
        self.schedule: NoiseSchedule = denoiser.schedule

    def __call__(self, x: Tensor, t: float | Tensor, **conditioning: Any) -> Denoised:
        """The guided estimates at x [B, ...] and t (a float or [B]), as `Denoised`. conditioning: given to the denoiser."""
        if _inference(x):
            return _normal_mode(self, x, t, conditioning)
        times = per_sample(t, x)
        rows = _guided_rows(self, times)
        if not bool(rows.any()):
            return self.denoiser(x, times, **conditioning)
        at, again = as_variable(x)
        with torch.enable_grad():
            denoised = self.denoiser(at, times, **conditioning)
            predicted = self._predicted(denoised.x0)
            error = self._observed(predicted) - predicted
            if self.method in ("pigdm", "mmps"):
                shift = self._solved(at, denoised, predicted, error, again)
            else:
                shift = self._slope(at, error, again)
        if not again:
            denoised, shift = (
                Denoised(denoised.x0.detach(), denoised.eps.detach(), denoised.schedule, denoised.t),
                shift.detach(),
            )
        return add_to_score(x, denoised, self.strength * shift, rows, self.rescale)

    def _predicted(self, x0: Tensor) -> Tensor:
        """operator(x0), checked for its gradient."""
        x0 = differentiable(x0, "the denoiser")
        if self.method in ("pigdm", "mmps"):
            # Of attention, torch differentiates only the plain formula twice
            with sdpa_kernel(SDPBackend.MATH):
                return differentiable(self.operator(x0), "operator(x0)")
        return differentiable(self.operator(x0), "operator(x0)")

    def _observed(self, predicted: Tensor) -> Tensor:
        """y for each sample, in the shape of operator(x0), which it must have."""
        y = self.y.to(predicted)
        if y.shape[:1] == (1,) and y.shape[1:] == predicted.shape[1:]:
            return y.expand_as(predicted)
        if predicted.shape != y.shape:
            raise UserError(f"guidance: operator(x0) is {list(predicted.shape)} and y {list(y.shape)}")
        return y

    def _slope(self, at: Tensor, error: Tensor, again: bool) -> Tensor:
        """J^T A^T error / v, with the variance v of "gradient" or of "dps"."""
        size = error.reshape(len(error), -1).square()  # [B, M]
        slope = gradient(-0.5 * size.sum(1), at, again)
        if self.method == "gradient":
            return slope / self.noise_std**2
        variance = size.mean(1).clamp_min(self.noise_std**2)  # [B]
        return slope / widen(variance if again else variance.detach(), slope)

    def _solved(self, at: Tensor, denoised: Denoised, predicted: Tensor, error: Tensor, again: bool) -> Tensor:
        """J^T A^T u with (noise_std^2 + A C A^T) u = error, where C is the method's covariance of x0 given x_t."""

        def pulled(out: Tensor, of: Tensor, v: Tensor) -> Tensor:
            """v^T (d out / d of), which leaves the graph for the next one."""
            return torch.autograd.grad(out, of, v, create_graph=again, retain_graph=True)[0]

        probe = torch.zeros_like(predicted, requires_grad=True)
        (back,) = torch.autograd.grad(predicted, denoised.x0, probe, create_graph=True)  # A^T probe, whose derivative is A
        alpha, sigma = denoised.schedule.alpha(denoised.t), denoised.schedule.sigma(denoised.t)
        ratio, unit = widen(sigma**2 / alpha, at), widen(sigma**2 / (alpha**2 + sigma**2), at)

        def spread(v: Tensor) -> Tensor:
            """C v [B, ...]: (sigma^2 / alpha) J v, where J is symmetric; or what it is for data N(m, 1)."""
            return unit * v if self.method == "pigdm" else ratio * pulled(denoised.x0, at, v)

        def apply(u: Tensor) -> Tensor:
            return self.noise_std**2 * u + pulled(back, probe, spread(pulled(predicted, denoised.x0, u)))

        u = conjugate_gradient(apply, error if again else error.detach(), self.solver_steps)
        return pulled(denoised.x0, at, pulled(predicted, denoised.x0, u))


def _inference(x: Tensor) -> bool:
    """Whether no derivative can be taken: in torch.inference_mode, or of a tensor made in it."""
    return torch.is_inference_mode_enabled() or x.is_inference()


def _normal_mode(guide: Classifier | Reconstruction, x: Tensor, t: float | Tensor, conditioning: dict[str, Any]) -> Denoised:
    """guide(x, t, **conditioning) outside of inference mode, with copies of the tensors that were made in it."""

    def normal(value: Any) -> Any:
        return value.clone() if isinstance(value, Tensor) and value.is_inference() else value

    with torch.inference_mode(False), torch.no_grad():
        try:
            return guide(normal(x), normal(t), **{key: normal(value) for key, value in conditioning.items()})
        except RuntimeError as error:
            if "inference tensor" not in str(error).lower():
                raise
            raise UserError(
                f"guidance: {type(guide).__name__} needs derivatives, and something in it was made under "
                "torch.inference_mode; use torch.no_grad instead"
            ) from None


def _guided_rows(guide: Classifier | Reconstruction, times: Tensor) -> Tensor:
    """Which samples are guided, bool [B]; none at alpha = 0, where x_t does not depend on x0 and the shift would be 0/0."""
    return guided_rows(times, guide.strength != 0, guide.interval) & (guide.schedule.alpha(times) > 0)
