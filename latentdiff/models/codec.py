"""A frozen autoencoder as stage 2 uses it: images to latents and latents to images, with one normaliser."""

from __future__ import annotations

import hashlib
import json

import torch
from torch import Tensor, nn

from latentdiff.errors import NotFiniteError, UserError
from latentdiff.models import codebook
from latentdiff.utils.random import Generators, randn

NORMALISER = ("scaling_factor", "shift_factor", "latents_mean", "latents_std")  # its keys in an autoencoder's config


class LatentCodec:
    """A frozen diffusers autoencoder with its latent normaliser.

    Normalised latents are (z - shift) * scale. Shift and scale are per channel, from latents_mean and latents_std in the
    autoencoder's config, where they are set; else they come from shift_factor and scaling_factor.

    Args:
        vae: the autoencoder; it is frozen, in place.
        refuse_non_finite: raise NotFiniteError, naming encoder or decoder, where its output is NaN or infinite.

    Attributes:
        shift, scale: [c] or [1].
        image_channels, latent_channels: C and c.
        factor: image side / latent side.
        num_codes: K, the codes of a codebook; None where the autoencoder has no codebook.
        code_levels: L, the codebooks, each with K codes: 1 for a VQModel or FSQModel; 0 where there is none.
    """

    def __init__(self, vae: nn.Module, refuse_non_finite: bool = True):
        self.vae = vae.eval().requires_grad_(False)
        self.refuse_non_finite = refuse_non_finite
        config = vae.config
        shift, scale = _normaliser(config)
        self.shift = shift  # [c] or [1]
        self.scale = scale
        self.image_channels = int(config.in_channels)
        # A VQModel's latents are what enters its codebook, with vq_embed_dim channels
        self.latent_channels = int(getattr(config, "vq_embed_dim", None) or config.latent_channels)
        self.factor = _spatial_factor(vae)
        books = codebook.codebooks(vae)  # [L, K, d]
        self.num_codes: int | None = None if books is None else books.shape[1]
        self.code_levels = 0 if books is None else books.shape[0]

    @property
    def device(self) -> torch.device:
        return next(self.vae.parameters()).device

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """(c, h, w) of the latent of an image of height x width pixels, both divisible by `factor`."""
        return self.latent_channels, height // self.factor, width // self.factor

    def moments(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the posterior, each [B, c, h, w], not normalised.

        Autoencoders without a posterior (VQModel, AutoencoderTiny, AutoencoderDC) give their latents and a standard
        deviation of 0. Gradients reach images that require them.

        images: [B, C, H, W] in [-1, 1], on any device.

        Raises:
            UserError: another number of channels, or sides that are not divisible by `factor`.
            NotFiniteError: the encoder's output is not finite.
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
            # Contiguous, because the encoder may give a channels-last layout, which safetensors cannot store
            mean, std = out.latent_dist.mean.float().contiguous(), out.latent_dist.std.float().contiguous()
            return self._finite(mean, "encoder"), self._finite(std, "encoder")
        latents = (out.latents if hasattr(out, "latents") else out.latent).float().contiguous()
        return self._finite(latents, "encoder"), torch.zeros_like(latents)

    def latents(self, images: Tensor, generator: Generators = None, use_mean: bool = False) -> Tensor:
        """Normalised latents [B, c, h, w] of images [B, C, H, W] in [-1, 1]: one sample of each posterior.

        A denoiser is trained on samples, so it must be measured on samples too: posterior means are smoother.

        generator: as in `latentdiff.utils.random.randn`. use_mean: posterior means instead, for a denoiser that was trained
        on them (cache.use_mean). Errors as in `moments`.
        """
        mean, std = self.moments(images)
        return self.normalise(mean if use_mean else mean + std * randn(std.shape, generator).to(std))

    def normalise(self, z: Tensor) -> Tensor:
        """Normalised latents of raw ones, [B, c, h, w]: (z - shift) * scale."""
        return (z - self.shift.to(z)[:, None, None]) * self.scale.to(z)[:, None, None]

    def denormalise(self, z: Tensor) -> Tensor:
        """Raw latents of normalised ones, [B, c, h, w]; the inverse of `normalise`."""
        return z / self.scale.to(z)[:, None, None] + self.shift.to(z)[:, None, None]

    def decode(self, z: Tensor) -> Tensor:
        """Images [B, C, H, W] from normalised latents [B, c, h, w]: about [-1, 1], not clipped, float32.

        Gradients reach a z that requires them, which guidance by an observed image needs. NotFiniteError where the
        decoder's output is not finite.
        """
        raw = self.denormalise(z.to(self.device).float())
        return self._finite(self.vae.decode(raw.to(next(self.vae.parameters()).dtype)).sample.float(), "decoder")

    def codes(self, images: Tensor) -> Tensor:
        """The codes of images [B, C, H, W] in [-1, 1]: int64 [B, L, h, w], each from 0 to num_codes - 1.

        The first of the L levels is the coarsest. Errors as in `moments`; UserError where there is no codebook.
        """
        self._check_codebook()
        return codebook.codes_of(self.vae, self.moments(images)[0].to(next(self.vae.parameters()).dtype))

    def code_vectors(self) -> Tensor:
        """The normalised latents that codes stand for, [L, K, d]: of a position's L codes they add up to its latent.

        UserError where there is no codebook.
        """
        self._check_codebook()
        books = codebook.codebooks(self.vae)
        assert books is not None
        vectors = books.detach().cpu().float() * self.scale
        vectors[0] -= self.shift * self.scale
        return vectors

    def decode_codes(self, codes: Tensor) -> Tensor:
        """Images [B, C, H, W] of codes [B, L, h, w], int64, each from 0 to num_codes - 1. About [-1, 1], not clipped, float32.

        Raises:
            UserError: there is no codebook.
            ValueError: codes of another shape or type, or one that is not in the codebook, such as a mask code.
            NotFiniteError: the decoder's output is not finite.
        """
        self._check_codebook()
        if codes.ndim != 4 or codes.shape[1] != self.code_levels or codes.dtype != torch.int64:
            shape, kind = tuple(codes.shape), str(codes.dtype).removeprefix("torch.")
            raise ValueError(f"codes must be int64 [B, {self.code_levels}, h, w], not {kind} {shape}")
        if codes.numel() and not 0 <= int(codes.min()) <= int(codes.max()) < (self.num_codes or 0):
            found = f"{int(codes.min())} to {int(codes.max())}"
            raise ValueError(f"codes must be from 0 to {(self.num_codes or 0) - 1}; these are from {found}")
        codes = codes.to(self.device)
        if getattr(self.vae.config, "lookup_from_codebook", False):  # then diffusers looks the rows up itself
            shape = (len(codes), *codes.shape[2:], self.latent_channels)
            output = self.vae.decode(codes, force_not_quantize=True, shape=shape)
        else:
            output = self.vae.decode(codebook.quantised(self.vae, codes), force_not_quantize=True)
        return self._finite(output.sample.float(), "decoder")

    def _check_codebook(self) -> None:
        if self.num_codes is None:
            raise UserError(f"{type(self.vae).__name__} has no codebook, so no codes: take an autoencoder with one (VQModel)")

    def _finite(self, output: Tensor, stage: str) -> Tensor:
        if self.refuse_non_finite and not bool(output.isfinite().all()):
            dtype = str(next(self.vae.parameters()).dtype).removeprefix("torch.")
            reason = "its weights are damaged or have diverged, or their numbers are too large for it"
            raise NotFiniteError(f"{stage} ({type(self.vae).__name__}, {dtype}): its output is not finite; {reason}")
        return output

    def reconstruct(self, images: Tensor) -> Tensor:
        """Images [B, C, H, W] encoded to their posterior means and decoded again; of the same shape."""
        return self.decode(self.normalise(self.moments(images)[0]))

    def fingerprint(self, latents_only: bool = False) -> str:
        """Hex sha256 over weights and config. latents_only: over what raw latents depend on (no decoder, no normaliser)."""
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
