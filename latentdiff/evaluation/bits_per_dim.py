"""Bits per dimension of pixels through both stages of a model: an upper bound, as three terms.

For an image x of 8-bit values, with z drawn from the encoder's posterior q(z | x),
    log p(x) >= E_q [ log p(x | z) + log p(z) - log q(z | x) ].

- log p(x | z) is exact: a probability of integers under an observation model, so nothing is dequantised.
- log q(z | x) is exact: a diagonal Gaussian. So is the volume of the latent normaliser.
- log p(z) is the density of the denoiser's probability-flow ODE: unbiased with Hutchinson's estimator, and exact up to the
  solver's tolerance.

The only bound is Jensen's inequality over q; one z per image estimates it without bias. For a class-conditional model
every term is given the true class, which makes it log p(x | y).

A model over codes has one code c(x) for an image, so log q is 0: log p(x) >= log p(x | c(x)) + log p(c(x)). Here log p(c) is
itself a bound (`latentdiff.discrete.bound`).
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from latentdiff.data.datasets import ImageDataset
from latentdiff.data.shuffling import permutation
from latentdiff.denoiser import DenoiserLike
from latentdiff.discrete import Process, bound_terms
from latentdiff.errors import UserError
from latentdiff.likelihood import bits_per_dim, log_prob
from latentdiff.models.codec import LatentCodec
from latentdiff.utils.random import Generators, derive_seed, generators, randn_like

LEVELS, BANDS = 256, 32
CODE_SAMPLES = 64  # evaluations of a network over codes for an image, for each probe
_SCALES = torch.logspace(-1, math.log10(LEVELS / 2), 48, dtype=torch.float64)  # candidates of a fit, in levels
_SHRINK = 100  # each band gets so many pixels of the channel's average, so that a rare band has a sane scale

# (images, decoder's means), both [B, C, H, W] with levels 0 ... 255 at -1 ... 1 -> log p(x | z), nats, float64 [B]
Observation = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class DiscretisedLogistic:
    """p(x | z): each value is a logistic around the decoder's mean m, cut into 256 levels.

    This is PixelCNN++'s, arXiv 1701.05517, eq. 2:

        P(v) = F((v + 1/2 - m) / s) - F((v - 1/2 - m) / s), in levels

    The mass below 0 and above 255 belongs to these two, so the 256 probabilities sum to one. Calling it with images and the
    decoder's means, both [B, C, H, W] in [-1, 1], gives log p(x | z) in nats, float64 [B].

    Attributes:
        scales: s in levels, float64 [C, BANDS]: one for each channel and each of 32 equal bands of m, because a decoder is
            surer of some values (a dark background) than of others.
    """

    scales: Tensor

    def __call__(self, images: Tensor, means: Tensor) -> Tensor:
        values, centre = _levels(images).round(), _levels(means)
        channel = torch.arange(images.shape[1], device=images.device).reshape(-1, 1, 1)
        scale = self.scales.to(images.device)[channel, _bands(centre)]  # [B, C, H, W]
        return _log_logistic(values, centre, scale).flatten(1).sum(dim=1)


def fit_observation(
    codec: LatentCodec, batches: Iterable[tuple[Tensor, Generators]], crop=lambda x: x, over_codes: bool = False
) -> DiscretisedLogistic:
    """Fit the observation model: the scales that make training images likeliest, with z drawn as in the bound.

    Args:
        codec: the autoencoder.
        batches: (images [B, C, H', W'] in [-1, 1], generators for z).
        crop: takes the padding off images.
        over_codes: z are the codes of the images.
    """
    table = counts = torch.zeros(())
    for images, generator in batches:
        if over_codes:
            means = codec.decode_codes(codec.codes(images)).cpu()
        else:
            means = codec.decode(codec.normalise(_draw(codec, images, generator)[0])).cpu()
        values, centre = _levels(crop(images)).round(), _levels(crop(means))
        channels = values.shape[1]
        slot = (_bands(centre) + BANDS * torch.arange(channels).reshape(-1, 1, 1)).flatten()
        rows = [torch.bincount(slot, _log_logistic(values, centre, scale).flatten(), channels * BANDS) for scale in _SCALES]
        table = table + torch.stack(rows).reshape(-1, channels, BANDS)  # [G, C, 32] nats
        counts = counts + torch.bincount(slot, minlength=channels * BANDS).reshape(channels, BANDS)
    average = table.sum(dim=2, keepdim=True) / counts.sum(dim=1, keepdim=True)  # [G, C, 1] nats a pixel
    return DiscretisedLogistic(_SCALES[(table + _SHRINK * average).argmax(dim=0)])


def _levels(images: Tensor) -> Tensor:
    return (images.double() + 1) * ((LEVELS - 1) / 2)


def _bands(centre: Tensor) -> Tensor:
    return (centre * (BANDS / LEVELS)).floor().clamp(0, BANDS - 1).long()


def _log_logistic(values: Tensor, centre: Tensor, scale: Tensor) -> Tensor:
    """log P(v) in nats, elementwise. F(a) - F(b) = F(a) F(-b) (1 - exp(b - a)) has no cancellation."""
    above, below = (values + 0.5 - centre) / scale, (values - 0.5 - centre) / scale
    inside = logsigmoid(above) + logsigmoid(-below) + torch.log(-torch.expm1(-1 / scale))
    return torch.where(values <= 0, logsigmoid(above), torch.where(values >= LEVELS - 1, logsigmoid(-below), inside))


class PixelTerms(NamedTuple):
    """The terms of the bound log p(x) >= decoder + prior + encoder, for one latent z of each image: nats, float64 [B].

    The bound is the evidence lower bound of "Auto-Encoding Variational Bayes" (arXiv 1312.6114, eq. 2 and 3). It holds for the
    mean over z. Each term is summed over an image's values or its latent's.

    Attributes:
        decoder: log p(x | z).
        prior: log p(z), the density of latents before they are normalised.
        encoder: -log q(z | x).
        probe_stderr: standard error of prior over Hutchinson's probes; nan for a single probe.
        nfe: evaluations of the network, int64 [B].
    """

    decoder: Tensor
    prior: Tensor
    encoder: Tensor
    probe_stderr: Tensor
    nfe: Tensor


def pixel_terms(
    codec: LatentCodec,
    denoiser: DenoiserLike,
    images: Tensor,
    observation: Observation,
    generator: Generators = None,
    crop: Callable[[Tensor], Tensor] = lambda x: x,
    probes: int = 1,
    tolerance: float = 1e-2,
    divergence: str = "hutchinson",
) -> PixelTerms:
    """The bound's terms for images, with one z ~ q(z | x) for each.

    Args:
        codec: the autoencoder.
        denoiser: over normalised latents, with the class of each image built in (ClassifierFree at scale 1).
        images: [B, C, H', W'] in [-1, 1].
        observation: the observation model.
        generator: for z and the probes; one, or one per image.
        crop: takes the padding off. The encoder sees the padding, but it is not data.
        probes: random vectors of Hutchinson's estimator.
        tolerance: rtol and atol of the ODE.
        divergence: the estimator, as in `likelihood.log_prob`.

    Raises:
        UserError: the autoencoder has no posterior.
    """
    z, encoder = _draw(codec, images, generator)
    latents = codec.normalise(z)
    density = log_prob(denoiser, latents, divergence, probes, tolerance, tolerance, generator)
    volume = codec.scale.double().abs().log().expand(z.shape[1]).sum() * math.prod(z.shape[2:])  # log |d normalised / d z|
    decoder = observation(crop(images).to(z.device), crop(codec.decode(latents)))
    return PixelTerms(decoder, density.log_prob + volume.to(z.device), encoder, density.stderr, density.nfe)


def code_terms(
    codec: LatentCodec,
    predict: Callable[..., Tensor],
    process: Process,
    images: Tensor,
    observation: Observation,
    generator: Generators = None,
    crop: Callable[[Tensor], Tensor] = lambda x: x,
    samples: int = 64,
) -> PixelTerms:
    """The bound's terms for images under a model over codes; the encoder's is 0.

    Args:
        codec: the autoencoder, with a codebook.
        predict: predict(codes, t) -> logits [B, L, h, w, K], with the class of each image built in.
        process: that the model was trained for.
        images, observation, crop: as in `pixel_terms`.
        generator: for the times and the corruption; one, or one per image.
        samples: evaluations of the network, an even number.
    """
    codes = codec.codes(images)
    prior = bound_terms(predict, codes, process, samples, generator)
    decoder = observation(crop(images).to(codes.device), crop(codec.decode_codes(codes)))
    nfe = torch.full((len(codes),), samples, device=codes.device)
    return PixelTerms(decoder, prior.bound, torch.zeros_like(prior.bound), prior.stderr, nfe)


def _draw(codec: LatentCodec, images: Tensor, generator: Generators) -> tuple[Tensor, Tensor]:
    """z ~ q(z | x), raw [B, c, h, w], and -log q(z | x), nats, float64 [B]."""
    mean, std = codec.moments(images)
    if not bool((std > 0).all()):
        raise UserError(
            f"likelihood: {type(codec.vae).__name__} has no posterior: it gives one latent for an image, with no density "
            "q(z|x), so the bound's encoder term is infinite; a model on an AutoencoderKL is needed"
        )
    eps = randn_like(mean, generator)
    nats = 0.5 * eps.double().square() + std.double().log() + 0.5 * math.log(2 * math.pi)
    return mean + std * eps, nats.flatten(1).sum(dim=1)


def pixel_bits(
    codec: LatentCodec,
    denoiser_for: Callable[[Tensor | None, int], DenoiserLike],
    train: ImageDataset,
    test: ImageDataset,
    num_images: int = 200,
    probes: int = 1,
    seed: int = 0,
    tolerance: float = 1e-2,
    fit_images: int = 512,
    batch_size: int = 50,
    progress: Callable[[int], None] = lambda count: None,
    process: Process | None = None,
) -> dict[str, Any]:
    """The bound on `num_images` images of test, drawn by seed.

    An image's numbers depend on (seed, image), not on its batch.

    Args:
        codec: the autoencoder.
        denoiser_for: (labels int64 [B] or None, B) -> the denoiser of images of these classes; over codes, `predict`.
        train: images on which the observation model is fitted.
        test: images to measure.
        num_images: how many.
        probes: random vectors of Hutchinson's estimator for each image; over codes, CODE_SAMPLES evaluations each.
        seed: of all draws.
        tolerance: rtol and atol of the ODE.
        fit_images: images of train for the fit.
        batch_size: images in a batch.
        progress: called with the number of images after each batch.
        process: of a model over codes; None for one over latents.

    Returns:
        JSON values: nats and bits_per_dim, means over images; stderr, the standard error of bits_per_dim over images, which
        includes what the draw of z and the probes add; stderr_probes, the probes' share of it (None for one probe); terms,
        the same for each term; protocol.

    Raises:
        UserError: a number is out of range, or the autoencoder has no posterior.
    """
    if not 1 <= num_images <= len(test):
        raise UserError(f"--num-images {num_images}: must be from 1 to {len(test)}, the images of this split")
    if batch_size < 1 or probes < 1:
        raise UserError(f"--batch-size {batch_size} and --probes {probes}: must be at least 1")
    crop = test.preprocess.crop_content
    fit_rows = permutation(len(train), seed, "observation")[:fit_images]
    batches = ((train.batch(rows)[0], _image_generators(seed, "observation", rows)) for rows in fit_rows.split(batch_size))
    observation = fit_observation(codec, batches, crop, process is not None)
    parts = []
    for rows in permutation(len(test), seed, "likelihood")[:num_images].split(batch_size):
        images, labels = test.batch(rows)
        generators_of_rows = _image_generators(seed, "likelihood", rows)
        denoiser = denoiser_for(labels, len(rows))
        if process is None:
            terms = pixel_terms(codec, denoiser, images, observation, generators_of_rows, crop, probes, tolerance)
        else:
            samples = probes * CODE_SAMPLES
            terms = code_terms(codec, denoiser, process, images, observation, generators_of_rows, crop, samples)
        parts.append(terms)
        progress(len(rows))
    terms = PixelTerms(*(torch.cat(column).cpu() for column in zip(*parts, strict=True)))
    dims = math.prod(crop(images).shape[1:])
    observation_text = (
        f"discretised logistic over {LEVELS} levels around the decoder's mean, one scale for each channel and each of "
        f"{BANDS} bands of the mean, fitted on {len(fit_rows)} training images"
    )
    over_codes = {
        "solver": "the bound in continuous time, its times drawn in strata",
        "rtol": None,
        "atol": None,
        "divergence": None,
    }
    return {
        **_summary(terms, dims),
        "protocol": {
            "data": test.source.name,
            "images": num_images,
            "dims": dims,
            "seed": seed,
            "levels": LEVELS,
            "preprocessing": test.preprocess.describe(),
            "observation": observation_text,
            "scales_in_levels": [round(float(s), 2) for s in (observation.scales.min(), observation.scales.max())],
            "posterior_draws": 1,
            "solver": "dopri5 (torchode), a step of its own for each image",
            "rtol": tolerance,
            "atol": tolerance,
            "divergence": "hutchinson, rademacher",
            "probes": probes,
            "nfe": {"mean": float(terms.nfe.double().mean()), "max": int(terms.nfe.max())},
            **({} if process is None else over_codes),
        },
    }


def _image_generators(seed: int, purpose: str, rows: Tensor) -> Sequence[torch.Generator]:
    """A generator for each image, from the seed and the image's row."""
    return generators(derive_seed(seed, purpose), rows.tolist())


def _summary(terms: PixelTerms, dims: int) -> dict[str, Any]:
    """Means over images in nats per image and bits per dimension, with standard errors; None where one image gives none."""
    count = len(terms.nfe)

    def entry(nats: Tensor) -> dict[str, float | None]:
        error = float(nats.std()) / math.sqrt(count) if count > 1 else None
        return {
            "nats": float(nats.mean()),
            "bits_per_dim": float(bits_per_dim(nats.mean(), dims, LEVELS, (0, LEVELS))),
            "stderr": None if error is None else error / (dims * math.log(2)),
        }

    probes = float(terms.probe_stderr.square().sum().sqrt()) / count / (dims * math.log(2))
    shares = {
        "decoder: log p(x|z)": entry(terms.decoder),
        "prior: log p(z)": entry(terms.prior),
        "encoder: -log q(z|x)": entry(terms.encoder),
    }
    total = entry(terms.decoder + terms.prior + terms.encoder)
    return {**total, "stderr_probes": None if math.isnan(probes) else probes, "terms": shares}
