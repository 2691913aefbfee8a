"""The report of stage 1: how well an autoencoder reconstructs, and whether its latents suit diffusion.

With a poor autoencoder stage 2 trains all the same, and its pictures are bad. The report tells beforehand.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from latentdiff.evaluation.image_quality import SSIM_MIN_SIDE, psnr, ssim
from latentdiff.models.codebook import CodeUsage, codebooks, codes_of
from latentdiff.utils import atomic

if TYPE_CHECKING:
    from latentdiff.models.codec import LatentCodec

# Where a line of the report turns from pass to warn
PSNR_WARN = 25.0  # dB
SSIM_WARN = 0.85
NOISE_SHARE_WARN = 0.25  # of a latent's variance
DEAD_SHARE = 0.01  # a channel with less signal than this share of its variance carries nothing
OUTLIER_WARN = 10.0  # standard deviations
CODES_WARN = 0.5  # share of codes used

Box = tuple[int, int, int, int]


class LatentStatistics:
    """Mean and variance of each latent channel over many batches, in float64, whatever the batch sizes.

    Batches are merged by the update of Chan, Golub and LeVeque (1983, eq. 2.1). For posteriors N(mean, std^2) the statistics
    are those of latents drawn from them, by the law of total variance: Var z = Var(mean) + E[std^2].
    """

    def __init__(self, channels: int) -> None:
        self._state = torch.zeros(4, channels, dtype=torch.float64)  # count, mean, squared deviations, sum of std^2

    def update(self, mean: Tensor, std: Tensor | None = None) -> None:
        """Add latents, or means and standard deviations of posteriors; each [B, c, h, w]. std=None stands for 0."""
        values = mean.detach().double().cpu().movedim(1, 0).flatten(1)  # [c, n]
        centre = values.mean(1)
        spread = (values - centre[:, None]).square().sum(1)
        noise = torch.zeros_like(centre) if std is None else std.detach().double().cpu().square().sum((0, 2, 3))
        self._absorb(torch.stack([torch.full_like(centre, values.shape[1]), centre, spread, noise]))

    def merge(self, other: LatentStatistics) -> None:
        """Add all latents of another object."""
        self._absorb(other._state)

    def state(self) -> Tensor:
        """Everything this object holds, float64 [4, c], for another process to `merge` by `from_state`."""
        return self._state.clone()

    @classmethod
    def from_state(cls, state: Tensor) -> LatentStatistics:
        """The object whose `state` this was."""
        statistics = cls(state.shape[1])
        statistics._absorb(state.detach().double().cpu())
        return statistics

    def _absorb(self, new: Tensor) -> None:
        if new.shape != self._state.shape:
            raise ValueError(f"latents of {new.shape[1]} channels for statistics of {self._state.shape[1]}")
        (n, mean, m2, noise), (k, new_mean, new_m2, new_noise) = self._state, new
        total, delta = n + k, new_mean - mean
        share = k / total.clamp_min(1)
        self._state = torch.stack([total, mean + delta * share, m2 + new_m2 + delta.square() * n * share, noise + new_noise])

    def _filled(self) -> Tensor:
        if self.count == 0:
            raise ValueError("no latents seen yet")
        return self._state

    @property
    def count(self) -> int:
        """Latent positions of each channel: images times h times w."""
        return int(self._state[0, 0])

    @property
    def mean(self) -> Tensor:
        """Mean of each channel, [c], float64."""
        return self._filled()[1].clone()

    @property
    def signal_variance(self) -> Tensor:
        """Variance of the posteriors' means, [c], float64; divided by the count, not by count - 1."""
        state = self._filled()
        return state[2] / state[0]

    @property
    def noise_variance(self) -> Tensor:
        """Mean variance of the posteriors, [c], float64."""
        state = self._filled()
        return state[3] / state[0]

    @property
    def std(self) -> Tensor:
        """Standard deviation of drawn latents, [c], float64."""
        return (self.signal_variance + self.noise_variance).sqrt()


@torch.no_grad()
def stage1_report(
    codec: LatentCodec,
    batches: Iterable[Any],
    content: Box | None = None,
    examples: int = 16,
    keeps_normaliser: bool = False,
) -> tuple[dict[str, Any], Image.Image]:
    """Measure an autoencoder on held-out images: (the report as JSON values, a picture of images and reconstructions).

    Images are reconstructed from the posterior's mean and clipped to [-1, 1]. In the report psnr_db is the mean over images
    and psnr_db_pooled is of the mean squared error of all; ssim is None for content smaller than its window.

    Args:
        codec: the autoencoder, frozen.
        batches: images [B, C, H, W] in [-1, 1], or tuples that begin with them.
        content: (top, left, height, width) of what is not padding; only that is measured. None: everything.
        examples: images in the picture.
        keeps_normaliser: see `verdict`.

    Raises:
        ValueError: there are no images.
    """
    statistics = LatentStatistics(codec.latent_channels)
    books = codebooks(codec.vae)  # [L, K, d]
    usage = None if books is None else CodeUsage(books.shape[1], books.shape[0])
    positions = 0  # of an image
    psnrs: list[Tensor] = []
    ssims: list[Tensor] = []
    shown: list[tuple[Tensor, Tensor]] = []
    largest = torch.zeros(())
    for batch in batches:
        images = (batch if isinstance(batch, Tensor) else batch[0]).to(codec.device)
        mean, std = codec.moments(images)
        statistics.update(mean, std)
        normalised = codec.normalise(mean)
        largest = torch.maximum(largest, normalised.abs().max().cpu())
        if usage is not None:
            usage.update(codes_of(codec.vae, mean).movedim(1, -1))
            positions = mean.shape[2] * mean.shape[3]
        real, fake = (_crop(x, content) for x in (images, codec.decode(normalised).clamp(-1, 1)))
        psnrs.append(psnr(fake, real).cpu())
        if min(real.shape[-2:]) >= SSIM_MIN_SIDE:
            ssims.append(ssim(fake, real).cpu())
        if sum(len(a) for a, _ in shown) < examples:
            shown.append((real.cpu(), fake.cpu()))
    if not psnrs:
        raise ValueError("the stage-1 report needs at least one held-out image")

    report = {**_quality(torch.cat(psnrs), torch.cat(ssims) if ssims else None), "content_box": content}
    report["latents"] = _latents(codec, statistics, float(largest))
    if usage is not None:
        report["codes"] = _codes(usage, positions)
    report = _finite(report)
    report["lines"] = verdict(report, keeps_normaliser)
    real, fake = (torch.cat(side)[:examples] for side in zip(*shown, strict=True))
    return report, reconstruction_grid(real, fake)


def _quality(psnrs: Tensor, ssims: Tensor | None) -> dict[str, Any]:
    pooled = -10 * (10 ** (-psnrs.double() / 10)).mean().log10()
    return {
        "images": len(psnrs),
        "psnr_db": float(psnrs.double().mean()),
        "psnr_db_pooled": float(pooled),
        "psnr_db_worst": float(psnrs.min()),
        "ssim": None if ssims is None else float(ssims.double().mean()),
    }


def _latents(codec: LatentCodec, statistics: LatentStatistics, largest: float) -> dict[str, Any]:
    mean, std = statistics.mean, statistics.std
    at_mean, at_std = codec.normalise(mean.view(1, -1, 1, 1)), codec.normalise((mean + std).view(1, -1, 1, 1))
    signal, total = statistics.signal_variance, statistics.std.square()
    dead = (signal <= DEAD_SHARE * total) | (signal <= 1e-4 * signal.max())
    noise = statistics.noise_variance
    tiny = torch.finfo(torch.float64).tiny  # a channel that never varies has no noise share: 0, not 0 / 0
    return {
        "channels": len(mean),
        "mean": mean.tolist(),
        "std": std.tolist(),
        "normalised_mean": at_mean.flatten().tolist(),
        "normalised_std": (at_std - at_mean).flatten().tolist(),
        "posterior_variance_share": (noise / total.clamp_min(tiny)).tolist(),
        "posterior_variance_share_all": float(noise.sum() / total.sum().clamp_min(tiny)),
        "dead_channels": dead.nonzero().flatten().tolist(),
        "largest_normalised": largest,
    }


def _codes(usage: CodeUsage, positions: int) -> dict[str, Any]:
    """How the codes of `usage` were used. positions: of an image's latent; each has a code of every level."""
    levels = usage.levels()
    codes = len(levels[0].counts)
    facts = {"codes": codes, "used": usage.usage(), "perplexity": usage.perplexity(), "dead": len(usage.dead())}
    facts |= {"levels": len(levels), "bits_per_image": len(levels) * positions * math.log2(codes)}
    if len(levels) > 1:
        named = [{"used": level.usage(), "perplexity": level.perplexity(), "dead": len(level.dead())} for level in levels]
        facts["of_each_level"] = named
    return facts


@torch.no_grad()
def codebook_picture(codec: LatentCodec, most: int = 4096, batch_size: int = 256) -> Image.Image | None:
    """A picture of the codebook: a tile for each code, decoded alone, from dark to light; None where there is no codebook.

    A tile is the middle of what the decoder makes of a latent that has this code everywhere. With several levels, which lie one
    below another, the rows of the other levels are at their mean.

    codec: the autoencoder. most: codes drawn of each level, the first ones. batch_size: codes decoded at a time.
    """
    books = codebooks(codec.vae)
    if books is None:
        return None
    side, factor = 3, codec.factor  # of the latent that is decoded, and of a tile
    enlarge = max(1, 8 // factor)
    blocks = []
    for level, book in enumerate(books):
        others = books.mean(1).sum(0) - books.mean(1)[level] if len(books) > 1 else torch.zeros_like(book[0])  # [d]
        tiles = []
        for rows in (book[:most] + others).split(batch_size):
            latents = rows[:, :, None, None].expand(-1, -1, side, side)
            images = codec.vae.decode(latents, force_not_quantize=True).sample.float()
            tiles.append(images[..., factor : 2 * factor, factor : 2 * factor].cpu())
        found = torch.cat(tiles)
        blocks.append(_tiled(found[found.mean((1, 2, 3)).argsort()], enlarge))
    gap = torch.full((blocks[0].shape[0], 4 * enlarge, blocks[0].shape[2]), 255, dtype=torch.uint8)
    canvas = torch.cat([part for block in blocks for part in (block, gap)][:-1], 1)
    array = canvas.permute(1, 2, 0).numpy()
    return Image.fromarray(np.ascontiguousarray(array[:, :, 0] if array.shape[2] == 1 else array))


def _tiled(tiles: Tensor, enlarge: int) -> Tensor:
    """Tiles [K, C, s, s] in [-1, 1] as one nearly square picture, uint8 [C or 1, H, W], with white lines between them."""
    pixels = _pixels(tiles, enlarge)
    k, c, h, w = pixels.shape
    columns = math.ceil(math.sqrt(k))
    rows = -(-k // columns)
    whole = torch.full((rows * columns, c, h + 1, w + 1), 255, dtype=torch.uint8)
    whole[:k, :, :h, :w] = pixels
    return whole.view(rows, columns, c, h + 1, w + 1).permute(2, 0, 3, 1, 4).reshape(c, rows * (h + 1), columns * (w + 1))


def verdict(report: dict[str, Any], keeps_normaliser: bool = False) -> list[str]:
    """Lines "pass: FACT" or "warn: FACT; what follows from it, and what to do", one for each question.

    keeps_normaliser: the autoencoder keeps that of the data that its encoder was trained on. It is then no mistake that the
    latents of these images have another root mean square, and stage 2 measures its own.
    """
    latents, psnr_db = report["latents"], report["psnr_db"]
    dead, share = latents["dead_channels"], latents["posterior_variance_share_all"]
    largest, rms = latents["largest_normalised"], _normalised_rms(latents)
    checks = [
        (
            psnr_db is not None and psnr_db >= PSNR_WARN,
            f"PSNR {_number(psnr_db)} dB over {report['images']} held-out images",
            f"under {PSNR_WARN:g} dB all images of stage 2 will be blurred: train longer, or with more latent_channels",
        ),
        (
            not dead,
            f"latent channels that carry nothing: {', '.join(map(str, dead)) or 'none'}",
            "stage 2 spends itself on noise: lower the KL weight or use fewer channels",
        ),
        (
            share is not None and share <= NOISE_SHARE_WARN,
            f"posterior noise is {_number(share, 3)} of the latents' variance",
            "stage 2 cannot predict it, so it is a floor under its loss: lower the KL weight",
        ),
        (
            rms is not None and (keeps_normaliser or 0.8 <= rms <= 1.25),
            f"normalised latents have a root mean square of {_number(rms, 3)}",
            "it should be 1: the normaliser in the autoencoder's config is missing or belongs to other data",
        ),
        (
            largest is not None and largest <= OUTLIER_WARN,
            f"the largest normalised latent is {_number(largest)}",
            f"beyond {OUTLIER_WARN:g} outliers dominate the diffusion loss: raise the KL weight",
        ),
    ]
    if report["ssim"] is not None:
        checks.insert(
            1, (report["ssim"] >= SSIM_WARN, f"SSIM {report['ssim']:.3f}", f"under {SSIM_WARN:g} fine detail is lost")
        )
    if "codes" in report:
        codes = report["codes"]
        each = f" of each of {codes['levels']} levels" if codes.get("levels", 1) > 1 else ""
        fact = f"{codes['used']:.0%} of {codes['codes']} codes{each} used, perplexity {codes['perplexity']:.1f}"
        checks.append((codes["used"] >= CODES_WARN, fact, "the codebook is mostly idle: use fewer codes"))
    return [f"pass: {fact}" if good else f"warn: {fact}; {hint}" for good, fact, hint in checks]


def _normalised_rms(latents: dict[str, Any]) -> float | None:
    """The latents' root mean square over all channels. A VQModel has one scaling factor for all, so one channel may be off."""
    means, stds = latents["normalised_mean"], latents["normalised_std"]
    if None in means + stds:
        return None
    return math.sqrt(sum(m * m + s * s for m, s in zip(means, stds, strict=True)) / len(means))


def _number(value: float | None, digits: int = 2) -> str:
    return "not finite" if value is None else f"{value:.{digits}f}"


def _finite(value: Any) -> Any:
    """The same structure with None in place of numbers that JSON does not have."""
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _crop(images: Tensor, content: Box | None) -> Tensor:
    if content is None:
        return images
    top, left, height, width = content
    return images[..., top : top + height, left : left + width]


def reconstruction_grid(images: Tensor, reconstruction: Tensor, columns: int = 8) -> Image.Image:
    """A picture of images above their reconstructions, row by row; each [N, C, H, W] in [-1, 1]. Small images are enlarged.

    One channel is drawn as grey, three as RGB, any other number as the mean over the channels.
    """
    pixels = []
    for x in (images, reconstruction):
        pixels.append(_pixels(x, enlarge=max(1, 64 // max(x.shape[-2:]))))
    n, c, h, w = pixels[0].shape
    columns, gap = min(columns, n), 2
    rows = -(-n // columns)
    canvas = torch.full((c, rows * (2 * h + 3 * gap), columns * (w + gap) + gap), 255, dtype=torch.uint8)
    for i in range(n):
        left = gap + (i % columns) * (w + gap)
        for side, x in enumerate(pixels):
            top = gap + (i // columns) * (2 * h + 3 * gap) + side * (h + gap // 2)
            canvas[:, top : top + h, left : left + w] = x[i]
    array = canvas.permute(1, 2, 0).numpy()
    return Image.fromarray(np.ascontiguousarray(array[:, :, 0] if c == 1 else array))


def _pixels(images: Tensor, enlarge: int) -> Tensor:
    """Images [N, C, H, W] in [-1, 1] as uint8 [N, 1 or 3, H', W'] on the CPU, with sides `enlarge` times longer."""
    x = images.detach().float().cpu()
    x = x if x.shape[1] in (1, 3) else x.mean(1, keepdim=True)
    x = ((x.nan_to_num().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return x.repeat_interleave(enlarge, 2).repeat_interleave(enlarge, 3)


def write_report(folder: str | Path, report: dict[str, Any], picture: Image.Image, name: str = "report") -> None:
    """Write NAME.json and NAME.png into a folder, which is made if it is missing; each file is whole or absent."""
    text = json.dumps(report, indent=2, allow_nan=False) + "\n"  # first, so that a bad report leaves no picture
    with atomic.new_file(Path(folder) / f"{name}.png") as temporary:
        picture.save(temporary, format="PNG")
    atomic.write_text(Path(folder) / f"{name}.json", text)
