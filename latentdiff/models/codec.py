"""The frozen first stage as stage 2 sees it: images to posterior moments, latents to images, one normaliser."""

from __future__ import annotations

import hashlib
import json

import torch
from torch import Tensor, nn

from latentdiff.errors import NotFiniteError, UserError
from latentdiff.utils.random import Generators, randn

NORMALISER = ("scaling_factor", "shift_factor", "latents_mean", "latents_std")  # its keys in an autoencoder's config


class LatentCodec:
    """A frozen diffusers autoencoder with its latent normaliser.

    Normalised latents are z_n = (z - shift) * scale, per channel from latents_mean and latents_std of the
    autoencoder's config where they are set, else from shift_factor and scaling_factor.

    refuse_non_finite: NotFiniteError, naming encoder or decoder, where what it gives is NaN or infinite.
    """

    def __init__(self, vae: nn.Module, refuse_non_finite: bool = True):
        self.vae = vae.eval().requires_grad_(False)
        self.refuse_non_finite = refuse_non_finite
        config = vae.config
        shift, scale = _normaliser(config)
        self.shift = shift  # [c] or [1]
        self.scale = scale
        self.image_channels = int(config.in_channels)
        # VQModel: what is diffused is what enters the codebook, of vq_embed_dim channels
        self.latent_channels = int(getattr(config, "vq_embed_dim", None) or config.latent_channels)
        self.factor = _spatial_factor(vae)

    @property
    def device(self) -> torch.device:
        return next(self.vae.parameters()).device

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """(c, h, w) of the latent of an image of height x width pixels, both divisible by `factor`."""
        return self.latent_channels, height // self.factor, width // self.factor

    def moments(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the posterior, raw (not normalised), each [B, c, h, w].

        images: [B, C, H, W] in [-1, 1]. Autoencoders without a posterior (VQModel, AutoencoderTiny,
        AutoencoderDC) give their latents and a standard deviation of zero.  Gradients reach images that require them.
        """
        if images.ndim != 4 or images.shape[1] != self.image_channels:
            raise UserError(
                f"images of shape {tuple(images.shape)} for an autoencoder of {self.image_channels} channels: "
                f"expected [B, {self.image_channels}, H, W]; set data.channels={self.image_channels}"
            )
        if images.shape[2] % self.factor or images.shape[3] % self.factor:
            raise UserError(
                f"images of {images.shape[2]}x{images.shape[3]}: the autoencoder needs sides divisible by {self.factor}; "
                "set data.framing to pad, crop, letterbox or resize"
            )
        out = self.vae.encode(images.to(self.device, next(self.vae.parameters()).dtype))
        if hasattr(out, "latent_dist"):
            # contiguous: the encoder may leave a channels-last layout, which safetensors refuses to store
            mean, std = out.latent_dist.mean.float().contiguous(), out.latent_dist.std.float().contiguous()
            return self._finite(mean, "encoder"), self._finite(std, "encoder")
        latents = (out.latents if hasattr(out, "latents") else out.latent).float().contiguous()
        return self._finite(latents, "encoder"), torch.zeros_like(latents)

    def latents(self, images: Tensor, generator: Generators = None, use_mean: bool = False) -> Tensor:
        """Normalised latents [B, c, h, w] of images [B, C, H, W] in [-1, 1]: one draw from each posterior.

        A denoiser is trained on draws, so that is what it has to be measured on: posterior means are smoother.
        use_mean: the posterior means, for a denoiser that was trained on those (cache.use_mean).  generator: as in
        latentdiff.utils.random.randn.
        """
        mean, std = self.moments(images)
        return self.normalise(mean if use_mean else mean + std * randn(std.shape, generator).to(std))

    def normalise(self, z: Tensor) -> Tensor:
        """Raw latents [B, c, h, w] to the space the denoiser works in."""
        return (z - self.shift.to(z)[:, None, None]) * self.scale.to(z)[:, None, None]

    def denormalise(self, z: Tensor) -> Tensor:
        """The inverse of normalise."""
        return z / self.scale.to(z)[:, None, None] + self.shift.to(z)[:, None, None]

    def decode(self, z: Tensor) -> Tensor:
        """Images [B, C, H, W], about [-1, 1] and not clipped, from normalised latents [B, c, h, w].

        Gradients reach a z that requires them, as in guidance by an observation of the image.  The weights are frozen, so
        that nothing is kept for a backward pass otherwise.
        """
        raw = self.denormalise(z.to(self.device).float())
        return self._finite(self.vae.decode(raw.to(next(self.vae.parameters()).dtype)).sample.float(), "decoder")

    def _finite(self, output: Tensor, stage: str) -> Tensor:
        if self.refuse_non_finite and not bool(output.isfinite().all()):
            dtype = str(next(self.vae.parameters()).dtype).removeprefix("torch.")
            reason = "its weights are damaged or have diverged, or their numbers are too large for it"
            raise NotFiniteError(f"{stage} ({type(self.vae).__name__}, {dtype}): its output is not finite; {reason}")
        return output

    def reconstruct(self, images: Tensor) -> Tensor:
        """decode(normalise(posterior mean)): [B, C, H, W] in, the same out."""
        return self.decode(self.normalise(self.moments(images)[0]))

    def fingerprint(self, latents_only: bool = False) -> str:
        """sha256 over the weights and the config; latents_only: without what no raw latent depends on (decoder, normaliser)."""
        digest = hashlib.sha256()
        config = {k: v for k, v in sorted(dict(self.vae.config).items()) if not k.startswith("_")}
        if latents_only:
            config = {k: v for k, v in config.items() if k not in NORMALISER}
        digest.update(json.dumps(config, sort_keys=True, default=list).encode())
        for name, tensor in sorted(self.vae.state_dict().items()):
            if latents_only and name.startswith(("decoder.", "post_quant_conv.")):
                continue
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()


def _normaliser(config) -> tuple[Tensor, Tensor]:
    mean, std = getattr(config, "latents_mean", None), getattr(config, "latents_std", None)
    factor = float(getattr(config, "scaling_factor", None) or 1.0)
    if mean is not None and std is not None:
        return torch.tensor(mean).flatten().float(), factor / torch.tensor(std).flatten().float()
    return torch.tensor([float(getattr(config, "shift_factor", None) or 0.0)]), torch.tensor([factor])


def _spatial_factor(vae: nn.Module) -> int:
    blocks = getattr(vae.config, "block_out_channels", None) or vae.config.encoder_block_out_channels
    return 2 ** (len(blocks) - 1)
