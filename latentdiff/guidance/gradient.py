"""Guidance by a gradient: score + grad log p(y | x_t), where y is a class or an observation.

By Bayes' rule that is the score of p_t(x_t | y). A classifier of noised samples gives the term itself. For an observation
y = A(x0) + noise it is computed from the denoiser's estimate of x0.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

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


class Reconstruction:
    """Guidance to samples with operator(x0) = y: score + strength grad_x log p(y | x_t), for y = operator(x0) + noise_std n.

    x0_hat = E[x0 | x_t] is the denoiser's estimate, through which the gradient goes. There are two approximations of p(y |
    x_t): - covariance=False: N(operator(x0_hat), noise_std^2), diffusion posterior sampling (DPS, arXiv 2209.14687, eq. 10 and
    16), the
      gradient of -|operator(x0_hat) - y|^2 / (2 noise_std^2). It needs one derivative of the denoiser. It ignores the
      uncertainty of x0_hat, so it is biased even where everything is linear and Gaussian. Where noise_std^2 is below A C A^T it
      overshoots, at few steps without bound: use a smaller strength there, found by trial.
    - covariance=True: N(operator(x0_hat), noise_std^2 + A C A^T), where A is the operator's derivative at x0_hat and
      C = Cov[x0 | x_t] = (sigma^2 / alpha) d x0_hat / d x_t (TMPD, arXiv 2310.06721, section 3), solved by conjugate gradients
      (MMPS, arXiv 2405.13712). At strength 1 x0 becomes x0_hat + C A^T (noise_std^2 + A C A^T)^-1 (y - A x0_hat), Kalman's
      update. This is exact for a linear operator and Gaussian data. It needs two derivatives of the operator and one of the
      denoiser for each of at most solver_steps steps.

    Args:
        denoiser: a `Denoiser` or another guidance, differentiable in x.
        operator: operator(x0 [B, ...]) -> [B, ...], differentiable, each sample alone.
        y: the observations, of the shape of the operator's result.
        strength: 0 is off.
        noise_std: standard deviation of the noise in y, above 0.
        covariance: see above.
        solver_steps: the most steps of conjugate gradients, at least 1.
        interval: (low, high) in t outside of which a sample is not guided; None: guide at every t.
        rescale: as in `ClassifierFree`, to the standard deviation of the denoiser's x0.

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
    ):
        check_options(interval, rescale)
        if noise_std <= 0 or solver_steps < 1:
            raise UserError(f"guidance: noise_std {noise_std} must be above 0 and solver_steps {solver_steps} at least 1")
        self.denoiser, self.operator, self.y, self.strength = denoiser, operator, y, strength
        self.noise_std, self.covariance, self.solver_steps = noise_std, covariance, solver_steps
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
            if self.covariance:
                shift = self._kalman(at, denoised, predicted, again)
            else:
                error = (predicted - self.y.to(predicted)).reshape(len(x), -1)  # [B, D]
                shift = gradient(-0.5 / self.noise_std**2 * error.square().sum(1), at, again)
        if not again:
            denoised, shift = (
                Denoised(denoised.x0.detach(), denoised.eps.detach(), denoised.schedule, denoised.t),
                shift.detach(),
            )
        return add_to_score(x, denoised, self.strength * shift, rows, self.rescale)

    def _predicted(self, x0: Tensor) -> Tensor:
        """operator(x0), checked for its shape and its gradient."""
        predicted = differentiable(self.operator(differentiable(x0, "the denoiser")), "operator(x0)")
        if predicted.shape != self.y.shape:
            raise UserError(f"guidance: operator(x0) is {list(predicted.shape)} and y {list(self.y.shape)}")
        return predicted

    def _kalman(self, at: Tensor, denoised: Denoised, predicted: Tensor, again: bool) -> Tensor:
        """J^T A^T u with (noise_std^2 + A C A^T) u = y - A x0_hat and C = (sigma^2 / alpha) J; J = d x0_hat / d x_t."""

        def pulled(out: Tensor, of: Tensor, v: Tensor) -> Tensor:
            """v^T (d out / d of), which leaves the graph for the next one."""
            return torch.autograd.grad(out, of, v, create_graph=again, retain_graph=True)[0]

        probe = torch.zeros_like(predicted, requires_grad=True)
        (back,) = torch.autograd.grad(predicted, denoised.x0, probe, create_graph=True)  # A^T probe, whose derivative is A
        alpha, sigma = denoised.schedule.alpha(denoised.t), denoised.schedule.sigma(denoised.t)
        ratio, noise = widen(sigma**2 / alpha, at), self.noise_std**2

        def apply(u: Tensor) -> Tensor:
            spread = ratio * pulled(denoised.x0, at, pulled(predicted, denoised.x0, u))  # C A^T u: C is symmetric
            return noise * u + pulled(back, probe, spread)

        error = self.y.to(predicted) - predicted
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
