"""Guidance by a gradient: score + grad log p(y | x_t), y being a class or an observation.

By Bayes' rule that is the score of p_t(x_t | y).  A classifier of noised samples gives the term itself; an operator
y = A(x0) + noise needs what is believed of x0 given x_t, which is the denoiser's to say.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from latentdiff.denoiser import Denoised, DenoiserLike
from latentdiff.errors import UserError
from latentdiff.guidance.common import (
    Interval,
    check_options,
    conjugate_gradient,
    differentiable,
    gradient,
    tilted,
    touched,
    variable,
)
from latentdiff.schedules import NoiseSchedule
from latentdiff.utils.tensors import per_sample, widen


class Classifier:
    """Classifier guidance (2105.05233 section 4): score + strength grad_x log p(y | x_t, t).

    log_prob_fn(x, t) -> [B] nats, x being x_t [B, ...] and t [B] in float64: each row's log-probability of the class
    wanted for that row, differentiable in x; such as functools.partial(load_classifier(folder), labels=labels).
    strength: 0 is off; 1 is Bayes' rule, where p(y | x_t, t) of the right classifier gives the conditional score.
    interval: (low, high) in t outside of which a sample is not guided.  rescale: as in ClassifierFree, to the standard
    deviation of denoiser's x0.
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
        """x: [B, ...]; t: float or [B]; conditioning: the denoiser's."""
        if _inference(x):
            return _normal_mode(self, x, t, conditioning)
        times = per_sample(t, x)
        seen = self.denoiser(x, times, **conditioning)
        rows = _touched(self, times)
        if not bool(rows.any()):
            return seen
        at, again = variable(x)
        with torch.enable_grad():
            log_p = differentiable(self.log_prob_fn(at, times), "log_prob_fn(x, t)")
            if log_p.shape != (len(x),):
                raise UserError(f"guidance: log_prob_fn gave {list(log_p.shape)} for {len(x)} samples; one number each")
            shift = self.strength * gradient(log_p, at, again)
        return tilted(x, seen, shift.to(seen.x0.dtype), rows, self.rescale)


class Reconstruction:
    """Towards samples whose operator(x0) is y: score + strength grad_x log p(y | x_t), y = operator(x0) + noise_std n.

    With x0_hat(x_t) = E[x0 | x_t] of the denoiser, through which the gradient goes, there are two readings of p(y | x_t):
    - covariance=False: N(operator(x0_hat), noise_std^2), diffusion posterior sampling (2209.14687 eq. 10 and 16), the
      gradient of -|operator(x0_hat) - y|^2 / (2 noise_std^2).  One derivative of the denoiser.  It leaves out how
      uncertain x0_hat is: biased even where all is linear and Gaussian, and it overshoots, at few steps without bound,
      wherever noise_std^2 is below A C A^T: there it needs a smaller strength, found by trial.
    - covariance=True: N(operator(x0_hat), noise_std^2 + A C A^T), with A the operator's derivative at x0_hat and
      C = Cov[x0 | x_t] = (sigma^2 / alpha) d x0_hat / d x_t: 2310.06721 section 3 (TMPD), solved by conjugate gradients
      as in 2405.13712 (MMPS).  At strength 1 x0 becomes x0_hat + C A^T (noise_std^2 + A C A^T)^-1 (y - A x0_hat), Kalman's
      update: exact for a linear operator and Gaussian data.  Two derivatives of the operator and one of the denoiser
      for each of at most solver_steps steps.

    operator(x0 [B, ...]) -> [B, ...], differentiable, each sample by itself; y: of its result's shape.
    strength: 0 is off.  interval: (low, high) in t outside of which a sample is not guided.  rescale: as in
    ClassifierFree, to the standard deviation of denoiser's x0.
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
        """x: [B, ...]; t: float or [B]; conditioning: the denoiser's."""
        if _inference(x):
            return _normal_mode(self, x, t, conditioning)
        times = per_sample(t, x)
        rows = _touched(self, times)
        if not bool(rows.any()):
            return self.denoiser(x, times, **conditioning)
        at, again = variable(x)
        with torch.enable_grad():
            seen = self.denoiser(at, times, **conditioning)
            predicted = self._predicted(seen.x0)
            if self.covariance:
                shift = self._kalman(at, seen, predicted, again)
            else:
                error = (predicted - self.y.to(predicted)).reshape(len(x), -1)  # [B, D]
                shift = gradient(-0.5 / self.noise_std**2 * error.square().sum(1), at, again)
        if not again:
            seen, shift = Denoised(seen.x0.detach(), seen.eps.detach(), seen.schedule, seen.t), shift.detach()
        return tilted(x, seen, self.strength * shift, rows, self.rescale)

    def _predicted(self, x0: Tensor) -> Tensor:
        """operator(x0), checked."""
        predicted = differentiable(self.operator(differentiable(x0, "the denoiser")), "operator(x0)")
        if predicted.shape != self.y.shape:
            raise UserError(f"guidance: operator(x0) is {list(predicted.shape)} and y {list(self.y.shape)}")
        return predicted

    def _kalman(self, at: Tensor, seen: Denoised, predicted: Tensor, again: bool) -> Tensor:
        """J^T A^T u with (noise_std^2 + A C A^T) u = y - A x0_hat and C = (sigma^2 / alpha) J; J = d x0_hat / d x_t."""

        def pulled(out: Tensor, of: Tensor, v: Tensor) -> Tensor:
            """v^T (d out / d of), which leaves the graph for the next one."""
            return torch.autograd.grad(out, of, v, create_graph=again, retain_graph=True)[0]

        probe = torch.zeros_like(predicted, requires_grad=True)
        (back,) = torch.autograd.grad(predicted, seen.x0, probe, create_graph=True)  # A^T probe, whose derivative is A
        alpha, sigma = seen.schedule.alpha(seen.t), seen.schedule.sigma(seen.t)
        ratio, noise = widen(sigma**2 / alpha, at), self.noise_std**2

        def apply(u: Tensor) -> Tensor:
            spread = ratio * pulled(seen.x0, at, pulled(predicted, seen.x0, u))  # C A^T u: C is symmetric
            return noise * u + pulled(back, probe, spread)

        error = self.y.to(predicted) - predicted
        u = conjugate_gradient(apply, error if again else error.detach(), self.solver_steps)
        return pulled(seen.x0, at, pulled(predicted, seen.x0, u))


def _inference(x: Tensor) -> bool:
    """Whether no derivative can be had as things are: in torch.inference_mode, or of a tensor made in it."""
    return torch.is_inference_mode_enabled() or x.is_inference()


def _normal_mode(guide: Classifier | Reconstruction, x: Tensor, t: float | Tensor, conditioning: dict[str, Any]) -> Denoised:
    """guide(x, t, **conditioning) out of inference mode, with copies of the tensors that were made in it."""

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


def _touched(guide: Classifier | Reconstruction, times: Tensor) -> Tensor:
    """Which samples are guided, bool [B]; never at alpha = 0, where x_t says nothing of x0 and its shift would be 0/0."""
    return touched(times, guide.strength != 0, guide.interval) & (guide.schedule.alpha(times) > 0)
