"""Schedules of discrete diffusion: alpha(t), the probability that a code is still clean at time t."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

Time = float | Tensor


class Schedule:
    """The probability alpha(t) that a code is clean at t, for t in [0, 1]. It falls from alpha(0) = 1 to alpha(1) = 0.

    The parent of the schedules. Methods take a float or a tensor and return a float64 tensor of its shape, on its device.
    """

    def alpha(self, t: Time) -> Tensor:
        """alpha(t), in [0, 1]."""
        raise NotImplementedError

    def d_alpha(self, t: Time) -> Tensor:
        """alpha'(t), the derivative in t, not above 0."""
        raise NotImplementedError

    def time(self, alpha: Time) -> Tensor:
        """The time t at which a code is clean with probability alpha: the inverse of `alpha`."""
        raise NotImplementedError


class Linear(Schedule):
    """alpha = 1 - t: "linear" of MD4 (arXiv 2406.04329), "log-linear" of MDLM (arXiv 2406.07524)."""

    def alpha(self, t: Time) -> Tensor:
        return 1 - _f64(t)

    def d_alpha(self, t: Time) -> Tensor:
        return torch.full_like(_f64(t), -1.0)

    def time(self, alpha: Time) -> Tensor:
        return 1 - _f64(alpha)


class Cosine(Schedule):
    """alpha = 1 - cos(pi (1 - t) / 2): MaskGIT's cosine (arXiv 2202.04200, section 3.3), MD4's "cosine" (arXiv 2406.04329).

    Of the steps of sampling, the first ones fix few codes and the last ones many.
    """

    def alpha(self, t: Time) -> Tensor:
        t = _f64(t)
        late = 2 * torch.sin(math.pi / 4 * (1 - t)) ** 2  # the same without loss of digits near t = 1, but not exactly 1 at 0
        return torch.where(t < 0.5, 1 - torch.sin(math.pi / 2 * t), late)

    def d_alpha(self, t: Time) -> Tensor:
        return -math.pi / 2 * torch.sin(math.pi / 2 * (1 - _f64(t)))

    def time(self, alpha: Time) -> Tensor:
        return 1 - 4 / math.pi * torch.asin((_f64(alpha) / 2).clamp(0, 0.5).sqrt())


class CosineSquared(Schedule):
    """alpha = cos(pi t / 2)^2, as in D3PM's uniform diffusion (arXiv 2107.03006, appendix A.1, without its offset)."""

    def alpha(self, t: Time) -> Tensor:
        return torch.sin(math.pi / 2 * (1 - _f64(t))) ** 2  # exactly 0 at t = 1

    def d_alpha(self, t: Time) -> Tensor:
        return -math.pi / 2 * torch.sin(math.pi * (1 - _f64(t)))

    def time(self, alpha: Time) -> Tensor:
        return 1 - 2 / math.pi * torch.asin(_f64(alpha).clamp(0, 1).sqrt())


SCHEDULES: Mapping[str, Schedule] = {"linear": Linear(), "cosine": Cosine(), "cosine_squared": CosineSquared()}


def _f64(value: Time) -> Tensor:
    return torch.as_tensor(value, dtype=torch.float64)
