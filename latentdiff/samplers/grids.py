"""Time grids: the times t at which a sampler evaluates the denoiser.

Every grid is float64 [n + 1], strictly descending, and starts at t_max. Where sigma(0) = 0, the last entry is 0, and the last
step of a sampler ends on its own x0 estimate: n steps are n evaluations of a first-order method. Where sigma(0) > 0 (VE), the
last entry is t_min, and sampling ends with one more evaluation. The three grids of timesteps (trailing, leading, linspace) have
one step less where two of their times are at t_max.

Each function takes a schedule, which gives t_min and t_max, and the number of steps n, at least 1.
"""

from collections.abc import Callable, Mapping, Sequence
from inspect import signature
from operator import index
from typing import Any

import torch
from torch import Tensor

from latentdiff.errors import UserError
from latentdiff.schedules import NoiseSchedule
from latentdiff.utils.limits import MAX_STEPS


def uniform(schedule: NoiseSchedule, n: int) -> Tensor:
    """Equal steps in t, from t_max to the end: float64 [n + 1]."""
    return _even(schedule, schedule.t_max, schedule.t_min, n)


def angle(schedule: NoiseSchedule, n: int) -> Tensor:
    """Equal steps in atan(sigma/alpha), the direction of the path in the (alpha, sigma) plane: float64 [n + 1]. The default.

    On a variance-preserving schedule this is the spacing of the cosine schedule (Improved DDPM, arXiv 2102.09672). On a
    Gaussian mixture of unit variance, at 10 and 20 evaluations, Euler, Heun and DPM-Solver++ 2M have a smaller error with it
    than with any other grid here on VP, subVP and DDPM's schedules, often by half. On the straight path `uniform` is about as
    good; on VE it is better for the two methods of second order.
    """
    ends = torch.tensor([schedule.t_max, schedule.t_min], dtype=torch.float64)
    edges = torch.atan(torch.exp(-0.5 * schedule.log_snr(ends)))
    angles = _even(schedule, float(edges[0]), float(edges[1]), n)[: _inner(schedule, n)]
    times = schedule.time_from_log_snr(-2 * torch.tan(angles).log())
    times[0] = schedule.t_max
    return _closed(schedule, times)


def log_snr(schedule: NoiseSchedule, n: int) -> Tensor:
    """Equal steps in log-SNR from t_max to t_min (DPM-Solver, arXiv 2206.00927, section 3.3), then the end: float64 [n + 1]."""
    edges = schedule.log_snr(torch.tensor([schedule.t_max, schedule.t_min], dtype=torch.float64))
    inner = torch.linspace(float(edges[0]), float(edges[1]), _inner(schedule, n), dtype=torch.float64)
    return _closed(schedule, _pinned(schedule, schedule.time_from_log_snr(inner)))


def karras(schedule: NoiseSchedule, n: int, rho: float = 7.0) -> Tensor:
    """Equal steps in (sigma/alpha)^(1/rho) from t_max to t_min (EDM, arXiv 2206.00364, eq. 5), then the end: float64 [n + 1].

    UserError unless rho is above 0.
    """
    if not rho > 0:
        raise UserError(f"rho: above 0, not {rho}")
    edges = torch.exp(-0.5 * schedule.log_snr(torch.tensor([schedule.t_max, schedule.t_min], dtype=torch.float64)))
    ramp = torch.linspace(0, 1, _inner(schedule, n), dtype=torch.float64)
    high, low = edges ** (1 / rho)
    ratio = (high + ramp * (low - high)) ** rho
    return _closed(schedule, _pinned(schedule, schedule.time_from_log_snr(-2 * ratio.log())))


def trailing(schedule: NoiseSchedule, n: int) -> Tensor:
    """The "trailing" timesteps of diffusers (Lin et al., arXiv 2305.08891, table 2): every N/n-th from the last down, rounded.

    Float64 [n + 1], with the end. UserError where n is above the schedule's num_steps N.
    """
    _at_most_all(schedule, n, "trailing")
    steps = schedule.num_steps - torch.arange(n, dtype=torch.float64) * (schedule.num_steps / n)
    return _closed(schedule, steps.round() / schedule.num_steps)


def leading(schedule: NoiseSchedule, n: int) -> Tensor:
    """The "leading" timesteps of diffusers (those of DDIM and Euler, offset 0): every (N // n)-th from 0 up. Float64 [n + 1].

    It starts below t_max (at timestep 950 of 1000 for n = 20): for comparison with checkpoints that were sampled so. UserError
    where n is above the schedule's num_steps N.
    """
    _at_most_all(schedule, n, "leading")
    steps = torch.arange(n - 1, -1, -1, dtype=torch.float64) * (schedule.num_steps // n) + 1
    return _closed(schedule, steps / schedule.num_steps)


def linspace(schedule: NoiseSchedule, n: int) -> Tensor:
    """The "linspace" timesteps of diffusers (those of DDPM and DDIM): n from 0 to the last, evenly, rounded. Float64 [n + 1].

    The last time before the end is t_min on DDPM's schedules. n = 1 is the last timestep, where diffusers has timestep 0.
    UserError where n is above the schedule's num_steps N.
    """
    _at_most_all(schedule, n, "linspace")
    steps = torch.linspace(schedule.num_steps - 1, 0, n, dtype=torch.float64).round() + 1
    return _closed(schedule, steps / schedule.num_steps)


def shifted(schedule: NoiseSchedule, n: int, shift: float = 3.0) -> Tensor:
    """Equal steps in u with t = shift u / (1 + (shift - 1) u) (Stable Diffusion 3, arXiv 2403.03206, eq. 23): float64 [n + 1].

    On the straight path this shifts the log-SNR by -2 log(shift). Above 1, more of the steps are at high noise, where models of
    large latents need them; Stable Diffusion 3 uses 3. UserError unless shift is above 0.
    """
    if not shift > 0:
        raise UserError(f"shift: above 0, not {shift}")
    ends = torch.tensor([schedule.t_max, schedule.t_min], dtype=torch.float64)
    high, low = (ends / (shift - (shift - 1) * ends)).tolist()
    u = _even(schedule, high, low, n)
    times = shift * u / (1 + (shift - 1) * u)
    times[0] = schedule.t_max
    return times if _ends_clean(schedule) else _pinned(schedule, times)


_GRIDS: Mapping[str, Callable[..., Tensor]] = {
    "angle": angle,
    "uniform": uniform,
    "karras": karras,
    "log_snr": log_snr,
    "trailing": trailing,
    "leading": leading,
    "linspace": linspace,
    "shifted": shifted,
}


def names() -> list[str]:
    """The names of the grids."""
    return list(_GRIDS)


def make_grid(
    grid: str | Tensor | Sequence[float], schedule: NoiseSchedule, n: int, grid_options: Mapping[str, Any] | None = None
) -> Tensor:
    """A grid of times, float64 [n + 1] (on the CPU).

    Args:
        grid: one of `names()`, or a list or tensor of times, which is checked: 1-d, strictly descending, within [0, 1].
        schedule: gives t_min and t_max.
        n: the number of steps, at least 1; not used for a list of times.
        grid_options: options of the named grid: rho for karras, shift for shifted.

    Raises:
        UserError: an unknown grid or option, a list that is not a grid, or a wrong number of steps.
    """
    if not isinstance(grid, str):
        if grid_options:
            raise UserError(f"grid_options: a list of times has none, not {', '.join(map(str, grid_options))}")
        try:
            times = torch.as_tensor(grid, dtype=torch.float64).cpu()
        except (TypeError, ValueError, RuntimeError):
            raise UserError(f"grid: {grid!r} is neither one of {', '.join(_GRIDS)} nor a list of times") from None
        falls = times.ndim == 1 and len(times) > 1 and bool((times.diff() < 0).all())
        if not (falls and times[-1] >= 0 and times[0] <= 1):
            raise UserError("grid: a list of times must be 1-d, strictly descending and within [0, 1]")
        return times
    if grid not in _GRIDS:
        raise UserError(f"grid: {grid!r} is unknown; valid: {', '.join(_GRIDS)}, or a list of times")
    try:
        count = index(n)
    except TypeError:
        raise UserError(f"steps: an integer of at least 1 is needed, not {n!r}") from None
    if count > MAX_STEPS:
        raise UserError(f"steps: at most {MAX_STEPS} are taken, not {n}")
    if count < 1:
        raise UserError(f"steps: at least 1 is needed, not {n}")
    options, valid = dict(grid_options or {}), list(signature(_GRIDS[grid]).parameters)[2:]
    for option in options:
        if option not in valid:
            raise UserError(f"grid_options: {grid} has no option {option!r}; valid: {', '.join(valid) or 'none'}")
    return _GRIDS[grid](schedule, count, **options)


def _ends_clean(schedule: NoiseSchedule) -> bool:
    """Whether x at t = 0 is data without noise."""
    return float(schedule.sigma(0.0)) == 0.0


def _inner(schedule: NoiseSchedule, n: int) -> int:
    """The number of times before the end that is appended."""
    return n if _ends_clean(schedule) else n + 1


def _even(schedule: NoiseSchedule, high: float, low: float, n: int) -> Tensor:
    """n equal steps [n + 1] in a quantity, from `high` to the end: to `low`, its value at t_min, or past it to 0.

    Where n steps to 0 are so many that the last would begin below `low`, the last begins at `low`, and the others are equal
    above.
    """
    if not _ends_clean(schedule):
        return torch.linspace(high, low, n + 1, dtype=torch.float64)
    if high / n >= low:
        return torch.linspace(high, 0.0, n + 1, dtype=torch.float64)
    return torch.cat([torch.linspace(high, low, n, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)])


def _pinned(schedule: NoiseSchedule, times: Tensor) -> Tensor:
    """The times with exactly t_max and, if there are several, t_min at their ends, without the rounding of an inverse."""
    times[-1], times[0] = schedule.t_min, schedule.t_max
    return times


def _closed(schedule: NoiseSchedule, times: Tensor) -> Tensor:
    """The times within [t_min, t_max], with the end: t = 0 where that is data without noise, else t_min.

    Times beyond t_max become t_max, and only one of them is kept: timesteps 1000 and 999 of 1000 where t_max is 0.999.
    """
    times = times.clamp(schedule.t_min, schedule.t_max)
    times = times[torch.cat([torch.ones(1, dtype=torch.bool), times.diff() < -1e-12])]
    if _ends_clean(schedule):
        return torch.cat([times, times.new_zeros(1)])
    if float(times[-1]) - schedule.t_min < 1e-12:
        times[-1] = schedule.t_min
        return times
    return torch.cat([times, times.new_tensor([schedule.t_min])])


def _at_most_all(schedule: NoiseSchedule, n: int, name: str) -> None:
    """UserError where a grid of timesteps would have more steps than the schedule."""
    if n > schedule.num_steps:
        raise UserError(f"steps: the {name} grid has at most {schedule.num_steps}, not {n}")
