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

    Like replacement it is no exact draw from the posterior: the estimate at t sees the known part through its noise. A sampler
    that adds new noise brings the two parts nearer to each other. It costs a decoding and an encoding at each call.

    Args:
        denoiser: a `Denoiser` or guidance around one. This wrapper must be the outermost.
        images: the known pixels, [1 or B, C, H, W] in [-1, 1]; hidden ones are not read.
        mask: [1 or B, 1, H, W], at least 0.5 (white) where pixels are hidden.
        encode: latents [B, c, h, w] of images [B, C, H', W'] in [-1, 1], such as the mean of the autoencoder's posterior.
        decode: images of latents, such as `LatentCodec.decode`. H' and W' may be larger than H and W by a border.

    Raises:
        UserError: the mask and the images are of two sizes.
    """

    def __init__(
        self,
        denoiser: DenoiserLike,
        images: Tensor,
        mask: Tensor,
        encode: Callable[[Tensor], Tensor],
        decode: Callable[[Tensor], Tensor],
    ):
        if mask.ndim != 4 or mask.shape[1] != 1 or mask.shape[-2:] != images.shape[-2:]:
            shapes = f"{list(mask.shape)} for images {list(images.shape)}"
            raise UserError(f"mask: has the shape {shapes}; it must be [1 or B, 1, H, W], of the same H and W")
        self.denoiser, self.encode, self.decode = denoiser, encode, decode
        self.images, self.is_hidden = images, mask >= 0.5
        self.schedule: NoiseSchedule = denoiser.schedule

    @torch.no_grad()
    def __call__(self, x: Tensor, t: float | Tensor, **conditioning: Any) -> Denoised:
        """The estimates at x [B, c, h, w] and t (a float or [B]), as `Denoised`. conditioning: given to the denoiser."""
        out = self.denoiser(x, t, **conditioning)
        times = per_sample(t, x)
        decoded = self.decode(out.x0)
        size = self.images.shape[-2:]
        is_hidden = self.is_hidden.to(decoded.device)
        pasted = torch.where(is_hidden, centre(decoded, size).clamp(-1, 1), self.images.to(decoded))
        known = self.encode(with_border(pasted, decoded.shape[-2:], BLACK)).to(out.x0)
        hidden = with_border(is_hidden.float(), decoded.shape[-2:], 0.0)
        is_free = F.adaptive_max_pool2d(hidden, x.shape[-2:]) > 0.5
        alpha, sigma = widen(self.schedule.alpha(times), out.x0), widen(self.schedule.sigma(times), out.x0)
        eps = (x.to(out.x0) - alpha * known) / sigma.clamp_min(torch.finfo(out.x0.dtype).tiny)
        return Denoised(torch.where(is_free, out.x0, known), torch.where(is_free, out.eps, eps), self.schedule, times)
