"""Completion by known pixels: what is known of x0 is encoded anew at each step, beside what is drawn for the rest."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from latentdiff.denoiser import Denoised, DenoiserLike
from latentdiff.errors import UserError
from latentdiff.guidance.operators import BLACK, centre, with_border
from latentdiff.schedules import NoiseSchedule
from latentdiff.utils.tensors import per_sample, widen


class KnownPixels:
    """The denoiser's estimates, with the known pixels put into the image that they stand for.

    At each call x0 is decoded, the known pixels take their places, and the image is encoded again. Latent cells without a
    hidden pixel get that encoding as their x0, and eps = (x_t - alpha x0) / sigma. So the cells beside the mask hold the known
    pixels together with what is drawn for the hidden ones, where `samplers.Replacement` holds an encoding of the known pixels
    beside a grey area. It is the gluing of PSLD (arXiv 2307.00619, section 4) without its gradient, and the pixel-space
    consistency of ReSample (arXiv 2307.08123) at every step.

    The estimate of the hidden part should be a mean over the noise that known cells may have at t. One draw of that noise makes
    it err, and the two parts go together badly. Therefore the denoiser can be given the known cells with a share of their
    noise, alpha x0 + noise (x_t - alpha x0), with the x0 of the call before. For a linear denoiser a share of 0 gives that
    mean. A network was not trained for cells with less noise than the others, so some is left.

    Like replacement it is no exact draw from the posterior. A sampler that adds new noise brings the two parts nearer to each
    other. It costs a decoding and an encoding at each call.

    Args:
        denoiser: a `Denoiser` or guidance around one. This wrapper must be the outermost.
        images: the known pixels, [1 or B, C, H, W] in [-1, 1]; hidden ones are not read.
        mask: [1 or B, 1, H, W], at least 0.5 (white) where pixels are hidden.
        encode: latents [B, c, h, w] of images [B, C, H', W'] in [-1, 1], such as the mean of the autoencoder's posterior.
        decode: images of latents, such as `LatentCodec.decode`. H' and W' may be larger than H and W by a border.
        noise: the share of their noise with which the denoiser sees known cells, in [0, 1]; 1 is x_t itself.

    One object is for one run of a sampler at a time: it remembers the encoding of the call before.

    Raises:
        UserError: the mask and the images are of two sizes, or a share outside [0, 1].
    """

    def __init__(
        self,
        denoiser: DenoiserLike,
        images: Tensor,
        mask: Tensor,
        encode: Callable[[Tensor], Tensor],
        decode: Callable[[Tensor], Tensor],
        noise: float = 1.0,
    ):
        if mask.ndim != 4 or mask.shape[1] != 1 or mask.shape[-2:] != images.shape[-2:]:
            shapes = f"{list(mask.shape)} for images {list(images.shape)}"
            raise UserError(f"mask: has the shape {shapes}; it must be [1 or B, 1, H, W], of the same H and W")
        if not 0 <= noise <= 1:
            raise UserError(f"noise: {noise}: the share of the known cells' noise must be from 0 to 1")
        self.denoiser, self.encode, self.decode, self.noise = denoiser, encode, decode, noise
        self.images, self.is_hidden = images, mask >= 0.5
        self.schedule: NoiseSchedule = denoiser.schedule
        self._last: tuple[Tensor, Tensor] | None = None  # of the call before: (the known x0, which cells are free)

    @torch.no_grad()
    def __call__(self, x: Tensor, t: float | Tensor, **conditioning: Any) -> Denoised:
        """The estimates at x [B, c, h, w] and t (a float or [B]), as `Denoised`. conditioning: given to the denoiser."""
        times = per_sample(t, x)
        alpha, sigma = (widen(law(times), x).to(x) for law in (self.schedule.alpha, self.schedule.sigma))
        out = self.denoiser(self._with_less_noise(x, times, alpha), t, **conditioning)
        decoded = self.decode(out.x0)
        size = self.images.shape[-2:]
        is_hidden = self.is_hidden.to(decoded.device)
        pasted = torch.where(is_hidden, centre(decoded, size).clamp(-1, 1), self.images.to(decoded))
        known = self.encode(with_border(pasted, decoded.shape[-2:], BLACK)).to(out.x0)
        hidden = with_border(is_hidden.float(), decoded.shape[-2:], 0.0)
        is_free = F.adaptive_max_pool2d(hidden, x.shape[-2:]) > 0.5
        self._last = known, is_free
        eps = (x.to(out.x0) - alpha.to(out.x0) * known) / sigma.to(out.x0).clamp_min(torch.finfo(out.x0.dtype).tiny)
        return Denoised(torch.where(is_free, out.x0, known), torch.where(is_free, out.eps, eps), self.schedule, times)

    def _with_less_noise(self, x: Tensor, times: Tensor, alpha: Tensor) -> Tensor:
        """x with `noise` of the noise of the known cells. x itself at the start of a run, where it holds nothing but noise."""
        if self.noise == 1 or self._last is None or bool((times >= self.schedule.t_max).any()):
            return x
        known, is_free = self._last
        if known.shape != x.shape:
            return x
        clean = alpha * known.to(x)
        return torch.where(is_free, x, clean + self.noise * (x - clean))
