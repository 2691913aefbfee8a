"""How alike two images are: PSNR and SSIM."""

from typing import Any

from torch import Tensor

SSIM_MIN_SIDE = 11  # its Gaussian window


def psnr(reconstruction: Tensor, images: Tensor) -> Tensor:
    """Peak signal-to-noise ratio per image in dB for a range of 2 ([-1, 1]), [B]; at most 100."""
    mse = ((reconstruction.float() - images.float()) / 2).square().flatten(1).mean(1)
    return -10 * mse.clamp_min(1e-10).log10()


def ssim(reconstruction: Tensor, images: Tensor) -> Tensor:
    """Structural similarity per image, [B] (Wang et al. 2004, as torchmetrics computes it), images in [-1, 1]."""
    from torchmetrics.functional.image import structural_similarity_index_measure

    a, b = (reconstruction.float() + 1) / 2, (images.float() + 1) / 2
    per_image: Any = structural_similarity_index_measure(a, b, data_range=1.0, reduction="none")
    return per_image.reshape(len(images))  # [B]
