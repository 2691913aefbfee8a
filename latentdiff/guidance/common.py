"""What all guidance shares: which samples are guided, and how their x0 and eps replace the denoiser's."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from latentdiff.denoiser import Denoised
from latentdiff.errors import UserError
from latentdiff.schedules import NoiseSchedule
from latentdiff.utils.tensors import flat_std, widen

Interval = tuple[float, float] | None


def check_interval(interval: Sequence[float] | None, name: str) -> None:
    """UserError unless interval is None or (low, high) in t with 0 <= low <= high <= 1. name: how the message begins."""
    if interval is not None and (len(interval) != 2 or not 0 <= interval[0] <= interval[1] <= 1):
        raise UserError(f"{name}: {interval} is not (low, high) in t with 0 <= low <= high <= 1, 0 data and 1 noise")


def check_options(interval: Interval, rescale: float) -> None:
    """UserError unless interval is None or (low, high) with 0 <= low <= high <= 1, and rescale is in [0, 1]."""
    check_interval(interval, "guidance interval")
    if not 0 <= rescale <= 1:
        raise UserError(f"guidance rescale: {rescale} is not in [0, 1]")


def check_same_path(schedule: NoiseSchedule, other: NoiseSchedule, what: str) -> None:
    """UserError unless `other`, the schedule of `what`, has the same alpha and sigma: the same t must mean the same noise."""
    low, high = max(schedule.t_min, other.t_min), min(schedule.t_max, other.t_max)
    t = torch.linspace(low, high, 9, dtype=torch.float64)
    for one, two in ((schedule.alpha(t), other.alpha(t)), (schedule.sigma(t), other.sigma(t))):
        if not torch.allclose(one, two, rtol=1e-3, atol=1e-3):
            raise UserError(
                f"guidance: {what} has the noise schedule {type(other).__name__}, which is not that of the denoiser "
                f"({type(schedule).__name__}): the same t would mean another noise level"
            )


def guided_rows(times: Tensor, on: bool, interval: Interval) -> Tensor:
    """Which samples are guided: bool [B].

    times: t of each sample, [B]. on: whether the guidance does anything at all. interval: (low, high) in t, or None for every
    t.
    """
    inside = torch.full_like(times, on, dtype=torch.bool)
    if interval is not None:
        inside &= (times >= interval[0]) & (times <= interval[1])
    return inside


def join_conditions(key: str, conditional: Any, others: list[Any], guided: Tensor) -> Any:
    """The values of one keyword argument for the conditional rows, then for the guided rows of each of the others.

    Args:
        key: its name in messages.
        conditional: its value for all rows: a tensor [B, ...], a dict of such, or anything else.
        others: its values in the other conditions, of the same kind. What is no tensor must be equal in all.
        guided: int64 [G], the guided rows.

    Raises:
        UserError: values that differ and are no tensors.
    """
    if isinstance(conditional, Tensor) and all(isinstance(other, Tensor) for other in others):
        return torch.cat([conditional, *(other[guided.to(other.device)] for other in others)])
    if isinstance(conditional, dict) and all(
        isinstance(other, dict) and conditional.keys() == other.keys() for other in others
    ):
        return {
            name: join_conditions(f"{key}.{name}", conditional[name], [other[name] for other in others], guided)
            for name in conditional
        }
    if any(conditional is not other and conditional != other for other in others):
        raise UserError(f"guidance: {key} must be a tensor in both conditions, or equal in both")
    return conditional


def replace_estimates(x: Tensor, denoised: Denoised, x0: Tensor, eps: Tensor, rows: Tensor, rescale: float) -> Denoised:
    """The denoiser's estimates with the guided ones in the rows that are guided.

    Args:
        x: x_t [B, ...].
        denoised: the estimates without guidance.
        x0, eps: the guided estimates, [B, ...].
        rows: which samples are guided, bool [B].
        rescale: phi of guidance rescale (Lin et al., arXiv 2305.08891, eq. 15-16), in [0, 1], applied to x0: the standard
            deviation of each sample's x0 goes from the guided one (0) to that of denoised.x0 (1). eps then follows from x0, so
            that x_t = alpha x0 + sigma eps still holds.
    """
    if rescale > 0:
        wide = flat_std(x0)
        ratio = torch.where(wide > 0, flat_std(denoised.x0) / wide.clamp_min(1e-30), torch.ones_like(wide))  # [B]
        x0 = x0 * widen(1 + rescale * (ratio - 1), x0)
        alpha, sigma = denoised.schedule.alpha(denoised.t), denoised.schedule.sigma(denoised.t)
        eps = (x.to(x0.dtype) - widen(alpha, x0) * x0) / widen(sigma, x0)
    if not bool(rows.all()):
        mask = rows.reshape(-1, *(1,) * (x0.ndim - 1))  # [B, 1, ...]
        x0, eps = torch.where(mask, x0, denoised.x0), torch.where(mask, eps, denoised.eps)
    return Denoised(x0, eps, denoised.schedule, denoised.t)


def add_to_score(x: Tensor, denoised: Denoised, shift: Tensor, rows: Tensor, rescale: float) -> Denoised:
    """The denoiser's estimates with `shift` [B, ...] added to the score: eps - sigma shift, and x0 + (sigma^2 / alpha) shift.

    The second is Tweedie's formula. x, rows and rescale: as in `replace_estimates`.
    """
    alpha, sigma = denoised.schedule.alpha(denoised.t), denoised.schedule.sigma(denoised.t)
    x0 = denoised.x0 + widen(sigma**2 / alpha, shift) * shift
    return replace_estimates(x, denoised, x0, denoised.eps - widen(sigma, shift) * shift, rows, rescale)


def as_variable(x: Tensor) -> tuple[Tensor, bool]:
    """(x as the variable of a derivative, in float32 at least; whether the caller will differentiate the result again).

    Samplers call under no_grad; the variable is then detached. A caller that follows gradients, such as another guidance around
    this one or the divergence of a likelihood, gets them through.
    """
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    if torch.is_grad_enabled() and x.requires_grad:
        return x, True
    return x.detach().requires_grad_(), False


def gradient(value: Tensor, of: Tensor, again: bool, retain: bool = False) -> Tensor:
    """The gradient of value [B] in `of` [B, ...], of the shape of `of`. Row i of value must depend on row i of `of` alone.

    again: the caller will differentiate the result. retain: the caller will use the graph of value again.
    """
    (result,) = torch.autograd.grad(value.sum(), of, create_graph=again, retain_graph=again or retain)
    return result


def differentiable(value: Tensor, what: str) -> Tensor:
    """Return `value` itself, after a check that autograd can differentiate it.

    what: the name of the value in the message. UserError where it has no gradient, as under no_grad.
    """
    if not value.requires_grad:
        raise UserError(f"guidance: {what} must depend on x through autograd; is it under no_grad, detached or constant?")
    return value


def conjugate_gradient(apply: Callable[[Tensor], Tensor], b: Tensor, steps: int) -> Tensor:
    """u [B, ...] with apply(u) = b, by conjugate gradients. apply is symmetric and positive, and treats each sample alone.

    A sample stops when its residual is at rounding level, or when apply is not positive for it, as may happen with the
    covariance of a network. There are at most `steps` applications. Samples do not influence one another.
    """

    def dot(a: Tensor, c: Tensor) -> Tensor:
        return (a * c).reshape(len(a), -1).sum(1)  # [B]

    u, residual, direction = torch.zeros_like(b), b, b
    size = dot(residual, residual)
    goal = size * torch.finfo(b.dtype).eps ** 1.5
    for _ in range(steps):
        if not bool((size > goal).any()):
            break
        image = apply(direction)
        curvature = dot(direction, image)
        going = (size > goal) & (curvature > 0)
        step = widen(torch.where(going, size / torch.where(going, curvature, 1), 0), b)
        u, residual = u + step * direction, residual - step * image
        after = dot(residual, residual)
        turn = widen(torch.where(going, after / torch.where(going, size, 1), 0), b)
        going_wide = going.reshape(-1, *(1,) * (b.ndim - 1))
        direction = torch.where(going_wide, residual + turn * direction, direction)
        size = torch.where(going, after, size)
    return u
