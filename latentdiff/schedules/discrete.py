"""The noise schedule that is given by a list of betas, and the lists that have a name."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from latentdiff.errors import UserError
from latentdiff.schedules.base import Time, VariancePreserving, f64, reads_scheduler


class DiscreteVP(VariancePreserving):
    """The discrete chain of DDPM (arXiv 2006.11239) as a schedule in continuous time.

    alpha^2 at t = (k + 1)/N is prod_{i <= k} (1 - beta_i), exactly. Between these N times the log-SNR is linear in t. Below
    t_min = 1/N sigma falls linearly to sigma(0) = 0, so that the last step of sampling may end on data.

    betas: N numbers in (0, 1], at least two; else UserError.
    """

    def __init__(self, betas: Sequence[float] | Tensor):
        betas = torch.as_tensor(betas, dtype=torch.float64).cpu()
        if betas.ndim != 1 or len(betas) < 2 or not bool(((betas > 0) & (betas <= 1)).all()):
            raise UserError("betas: DiscreteVP needs at least two numbers in (0, 1]")
        alpha_bar = torch.cumprod(1 - betas, 0)
        self.zero_terminal_snr = float(alpha_bar[-1]) == 0
        # The log of a zero terminal SNR is infinite. diffusers' Euler and DPM-Solver use the same 2^-24 in its place
        alpha_bar = torch.where(alpha_bar > 0, alpha_bar, 2.0**-24)
        self.num_steps = len(betas)
        self.t_min = 1 / self.num_steps
        self._log_snr = alpha_bar.log() - torch.log1p(-alpha_bar)  # [N], falling
        self._sigma_min = float((1 - alpha_bar[0]).sqrt())
        self._betas: dict[str, Any] = {"trained_betas": betas.tolist()}

    @classmethod
    def named(
        cls,
        beta_schedule: str,
        beta_start: float = 1e-4,
        beta_end: float = 0.02,
        num_steps: int = 1000,
        zero_terminal_snr: bool = False,
    ) -> "DiscreteVP":
        """The schedule of one of diffusers' beta schedules, computed in float64.

        Args:
            beta_schedule: "linear", "scaled_linear" or "squaredcos_cap_v2".
            beta_start, beta_end: the first and the last beta; not used by squaredcos_cap_v2.
            num_steps: N, the number of betas.
            zero_terminal_snr: rescale the betas so that alpha is 0 at t = 1 (Lin et al., zero terminal SNR, arXiv 2305.08891,
                algorithm 1).
        """
        betas = BETAS[beta_schedule](beta_start, beta_end, num_steps)
        schedule = cls(_without_signal(betas) if zero_terminal_snr else betas)
        schedule._betas = {"beta_schedule": beta_schedule, "beta_start": beta_start, "beta_end": beta_end}
        return schedule

    @classmethod
    def from_config(cls, config: Mapping[str, Any], betas: Tensor) -> "DiscreteVP":
        """The schedule of a diffusers config: by its formula, in float64, if it names one; else by the given betas [N]."""
        zero = bool(config.get("rescale_betas_zero_snr"))
        if config.get("trained_betas") is not None:
            betas = torch.as_tensor(config["trained_betas"], dtype=torch.float64)
            return cls(_without_signal(betas) if zero else betas)
        if config["beta_schedule"] not in BETAS:
            return cls(betas)
        return cls.named(config["beta_schedule"], config["beta_start"], config["beta_end"], config["num_train_timesteps"], zero)

    def betas(self) -> dict[str, Any]:
        # Rescaling rescaled betas changes nothing, and makes diffusers handle the last one separately too
        return {**self._betas, **({"rescale_betas_zero_snr": True} if self.zero_terminal_snr else {})}

    def to_scheduler(self, name: str | None = None, prediction: str = "epsilon", **config: Any) -> Any:
        """As in `VariancePreserving`. UserError at zero terminal SNR for epsilon and for HeunDiscreteScheduler."""
        if self.zero_terminal_snr and (prediction == "epsilon" or name == "HeunDiscreteScheduler"):
            raise UserError(
                f"scheduler: {name or self.default_scheduler} with prediction {prediction} is not possible at zero "
                "terminal SNR; valid: v_prediction or sample, with any but HeunDiscreteScheduler"
            )
        return super().to_scheduler(name, prediction, **config)

    def _slot(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """(index of the interval between two trained times that holds t, log-SNR at t), each of the shape of t."""
        nodes = self._log_snr.to(t.device)
        place = (t * self.num_steps - 1).clamp(0, self.num_steps - 1)
        index = place.floor().long().clamp(max=self.num_steps - 2)
        return index, torch.lerp(nodes[index], nodes[index + 1], place - index)

    def _slope(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """(log-SNR at t, its derivative in t), each of the shape of t."""
        index, log_snr = self._slot(t)
        nodes = self._log_snr.to(t.device)
        return log_snr, (nodes[index + 1] - nodes[index]) * self.num_steps

    def log_snr(self, t: Time) -> Tensor:
        t = f64(t)
        below = torch.log1p(-(self._below(t) ** 2)) - 2 * self._below(t).log()
        return torch.where(t < self.t_min, below, self._slot(t)[1])

    def _below(self, t: Tensor) -> Tensor:
        """sigma at t below t_min."""
        return self._sigma_min * (t / self.t_min).clamp(0, 1)

    def alpha(self, t: Time) -> Tensor:
        t = f64(t)
        return torch.where(t < self.t_min, (1 - self._below(t) ** 2).sqrt(), torch.sigmoid(self._slot(t)[1]).sqrt())

    def sigma(self, t: Time) -> Tensor:
        t = f64(t)
        return torch.where(t < self.t_min, self._below(t), torch.sigmoid(-self._slot(t)[1]).sqrt())

    def d_alpha(self, t: Time) -> Tensor:
        return -self.sigma(t) * self.d_sigma(t) / self.alpha(t)

    def d_sigma(self, t: Time) -> Tensor:
        t = f64(t)
        log_snr, slope = self._slope(t)
        inside = -0.5 * slope * torch.sigmoid(-log_snr).sqrt() * torch.sigmoid(log_snr)
        return torch.where(t < self.t_min, torch.full_like(t, self._sigma_min / self.t_min), inside)

    def time_from_log_snr(self, log_snr: Time) -> Tensor:
        log_snr = f64(log_snr)
        rising = -self._log_snr.to(log_snr.device)
        index = (torch.searchsorted(rising, -log_snr.contiguous()) - 1).clamp(0, self.num_steps - 2)
        place = index + (-log_snr - rising[index]) / (rising[index + 1] - rising[index])
        inside = (place.clamp(max=self.num_steps - 1) + 1) / self.num_steps
        below = torch.sigmoid(-log_snr).sqrt() / self._sigma_min * self.t_min
        return torch.where(-log_snr < rising[0], below, inside)


@reads_scheduler
def _discrete_of(scheduler: Any) -> DiscreteVP | None:
    """DiscreteVP, where the scheduler is made of betas and does not run on flow sigmas."""
    config = scheduler.config
    is_discrete = "beta_start" in config and "sigma_data" not in config and not config.get("use_flow_sigmas")
    return DiscreteVP.from_config(config, scheduler.betas) if is_discrete else None


def _without_signal(betas: Tensor) -> Tensor:
    """Betas [N] whose last alpha_bar is 0 and whose first is unchanged (Lin et al., arXiv 2305.08891, algorithm 1)."""
    root = torch.cumprod(1 - betas, 0).sqrt()
    root = (root - root[-1]) * root[0] / (root[0] - root[-1])
    alpha_bar = torch.cat([torch.ones(1, dtype=torch.float64), root**2])
    return 1 - alpha_bar[1:] / alpha_bar[:-1]


def _linear(start: float, end: float, n: int) -> Tensor:
    return torch.linspace(start, end, n, dtype=torch.float64)


def _scaled_linear(start: float, end: float, n: int) -> Tensor:
    return torch.linspace(start**0.5, end**0.5, n, dtype=torch.float64) ** 2


def _squared_cosine(start: float, end: float, n: int) -> Tensor:
    """Improved DDPM (arXiv 2102.09672) eq. 17 with s = 0.008 and beta at most 0.999; start and end are not used."""
    edges = torch.cos((torch.arange(n + 1, dtype=torch.float64) / n + 0.008) / 1.008 * math.pi / 2) ** 2
    return (1 - edges[1:] / edges[:-1]).clamp(max=0.999)


BETAS: Mapping[str, Callable[[float, float, int], Tensor]] = {
    "linear": _linear,
    "scaled_linear": _scaled_linear,
    "squaredcos_cap_v2": _squared_cosine,
}
