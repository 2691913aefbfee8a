"""Networks small enough to build anew in a test: random ones from diffusers, and ones whose right answer is known."""

import torch
from diffusers import AutoencoderKL, UNet2DModel
from diffusers.configuration_utils import FrozenDict
from diffusers.models.autoencoders.vae import DecoderOutput
from diffusers.models.unets.unet_2d import UNet2DOutput


def tiny_unet(**config) -> UNet2DModel:
    """A random U-Net over [B, 4, 4, 4] latents; three classes and the null class unless told otherwise."""
    defaults = dict(
        sample_size=4,
        in_channels=4,
        out_channels=4,
        block_out_channels=(8,),
        norm_num_groups=4,
        layers_per_block=1,
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
        num_class_embeds=4,
        add_attention=False,
    )
    return UNet2DModel(**{**defaults, **config}).eval()


def tiny_vae(**config) -> AutoencoderKL:
    """A random autoencoder of grey [B, 1, 8, 8] images to [B, 4, 4, 4] latents."""
    defaults = dict(
        in_channels=1,
        out_channels=1,
        block_out_channels=(8, 8),
        layers_per_block=1,
        latent_channels=4,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        scaling_factor=1.0,
    )
    return AutoencoderKL(**{**defaults, **config}).eval()


class PointMassNet(torch.nn.Module):
    """The exact network where class k's data is one latent, `points[k]` (a scalar for each channel), null class last.

    Its output at x_t = alpha point + sigma eps is eps, or eps - point for the flow x_t = (1 - t) point + t eps; every
    sampler must end on the point. `calls` keeps (timestep, labels) of each forward.
    """

    def __init__(self, points: torch.Tensor, alphas_cumprod: torch.Tensor | None):
        super().__init__()
        self.points = torch.nn.Parameter(points, requires_grad=False)  # [K, c]
        self.alphas_cumprod = alphas_cumprod  # [N]; None: flow
        self.config = FrozenDict(in_channels=points.shape[1], sample_size=(2, 3), num_class_embeds=points.shape[0])
        self.calls: list[tuple[float, list[int]]] = []

    dtype = property(lambda self: self.points.dtype)
    device = property(lambda self: self.points.device)

    def forward(self, sample, timestep, class_labels=None):
        timestep = torch.as_tensor(timestep, dtype=torch.float64).reshape(-1)[0]
        self.calls.append((float(timestep), class_labels.tolist()))
        point = self.points[class_labels][:, :, None, None].double()  # [B, c, 1, 1]
        if self.alphas_cumprod is None:
            return UNet2DOutput(((sample - point) / (timestep / 1000)).float())
        log_snr = torch.log(self.alphas_cumprod / (1 - self.alphas_cumprod))  # [N], straight between its knots
        below = int(timestep.floor().clamp(0, len(log_snr) - 2))
        snr = torch.lerp(log_snr[below], log_snr[below + 1], timestep - below)
        alpha, sigma = torch.sigmoid(snr).sqrt(), torch.sigmoid(-snr).sqrt()
        return UNet2DOutput(((sample - alpha * point) / sigma).float())


class PictureVae(torch.nn.Module):
    """decode gives `picture` [C, H, W] whatever the latents, and keeps those in `decoded`."""

    def __init__(self, picture: torch.Tensor, **config):
        super().__init__()
        self.picture = torch.nn.Parameter(picture, requires_grad=False)
        self.config = FrozenDict(config)

    dtype = property(lambda self: self.picture.dtype)
    device = property(lambda self: self.picture.device)

    def decode(self, latents):
        self.decoded = latents
        return DecoderOutput(self.picture.expand(latents.shape[0], -1, -1, -1))
