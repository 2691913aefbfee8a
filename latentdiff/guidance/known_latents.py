"""Completion by replacement: a part of x0 is known, and the denoiser's estimate of it is replaced by what is known."""

from typing import Any

import torch
from torch import Tensor

from latentdiff.denoiser import Denoised, DenoiserLike
from latentdiff.errors import UserError
from latentdiff.schedules import NoiseSchedule
from latentdiff.utils.tensors import per_sample, widen


class KnownLatents:
    """The denoiser's estimates, with x0 = known and eps = (x_t - alpha known) / sigma where entries are not free.

    A sampler that starts from x_t = alpha known + sigma eps there keeps to that path: a deterministic one with the same eps at
    every step, a stochastic one with the noise it draws. This is replacement (Score SDE, arXiv 2011.13456, appendix I.2; the
    known part of RePaint, arXiv 2201.09865, algorithm 1). The free entries see the known ones at the right noise, but what is
    drawn for them is not a draw from p(free | known): the network's estimate at t knows the known part only through its noisy
    version. The error falls with the noise, and strong dependence between the parts leaves a seam.

    Args:
        denoiser: a `Denoiser` or guidance around one. This wrapper must be the outermost.
        known: the known x0, [B, ...] (what it holds in free entries is not used).
        is_free: which entries are drawn, bool, of a shape that broadcasts to that of known, such as [B, 1, h, w].

    Raises:
        UserError: the shapes do not go together, when it is made or called.
    """

    def __init__(self, denoiser: DenoiserLike, known: Tensor, is_free: Tensor):
        self.denoiser, self.known, self.is_free = denoiser, known, is_free
        self.schedule: NoiseSchedule = denoiser.schedule
        try:
            fits = torch.broadcast_shapes(known.shape, is_free.shape) == known.shape
        except RuntimeError:
            fits = False
        if not fits:
            raise UserError(f"guidance: is_free {list(is_free.shape)} does not broadcast to known {list(known.shape)}")

    def __call__(self, x: Tensor, t: float | Tensor, **conditioning: Any) -> Denoised:
        """The estimates at x [B, ...] and t (a float or [B]), as `Denoised`. conditioning: given to the denoiser."""
        if x.shape != self.known.shape:
            raise UserError(f"guidance: x {list(x.shape)} is not of the shape of known {list(self.known.shape)}")
        out = self.denoiser(x, t, **conditioning)
        times = per_sample(t, x)
        known, is_free = self.known.to(out.x0), self.is_free.to(x.device)
        alpha, sigma = widen(self.schedule.alpha(times), out.x0), widen(self.schedule.sigma(times), out.x0)
        eps = (x.to(out.x0) - alpha * known) / sigma.clamp_min(torch.finfo(out.x0.dtype).tiny)
        x0, eps = torch.where(is_free, out.x0, known), torch.where(is_free, out.eps, eps)
        return Denoised(x0, eps, self.schedule, times)
