"""How alike an image and its reconstruction are: PSNR and SSIM."""

from typing import Any

from torch import Tensor

SSIM_MIN_SIDE = 11  # pixels: the width of its Gaussian window


def psnr(reconstruction: Tensor, images: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each image in dB, [B]; at most 100.

    Both arguments are [B, C, H, W] in [-1, 1], so the peak is 2.
    """
    mse = ((reconstruction.float() - images.float()) / 2).square().flatten(1).mean(1)
    return -10 * mse.clamp_min(1e-10).log10()


def ssim(reconstruction: Tensor, images: Tensor) -> Tensor:
    """Structural similarity of each image, [B], at most 1 (Wang et al. 2004, "Image Quality Assessment", as in torchmetrics).

    Both arguments are [B, C, H, W] in [-1, 1] with H, W >= SSIM_MIN_SIDE.
    """
    from torchmetrics.functional.image import structural_similarity_index_measure

    a, b = (reconstruction.float() + 1) / 2, (images.float() + 1) / 2
    per_image: Any = structural_similarity_index_measure(a, b, data_range=1.0, reduction="none")
    return per_image.reshape(len(images))
