"""Tries a pretrained autoencoder on a sample of a folder's images, and says whether stage 1 can be left out."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from latentdiff.errors import UserError

if TYPE_CHECKING:
    import torch

    from latentdiff.config import DataConfig, DiffusionConfig
    from latentdiff.data.datasets import ImageDataset
    from latentdiff.models.codec import LatentCodec

AUTOENCODER = "weights/autoencoder-rgb"  # comes with latentdiff
# Mean PSNR from which on an autoencoder that is named is used as it is. It is what training one reaches in the time that a fit
# of half an hour or an hour has for it: that of weights/emoji reached 26.3 dB on held-out pictures of its own kind, in 27
# minutes of one core
SKIP_DB = 26.0
DECODER_DB = 22.0  # from which on the encoder is kept: below it, what the decoder cannot see is lost to any decoder
FAR_BELOW = 5.0  # dB that a class may lie below SKIP_DB
MOMENT = (0.7, 1.4)  # second moment of normalised latents for which a stored normaliser is kept
BATCH_PIXELS = 16 * 64 * 64  # of the images that are reconstructed together
LEAST_IMAGES = 4  # that are reconstructed, however slow the autoencoder is
# Steps of DECODER_BATCH images each. Sixty of them took the label accuracy of the same latents, of 325 icons, from 52 % to 78 %
DECODER_STEPS = 30
DECODER_BATCH = 16
STEP_COST = 3.0  # a training step takes about this many times the reconstruction of its images
SHOWING, FEWEST_SHOWN, MOST_SHOWN = 4.0, 4, 8  # of a picture of reconstructions: seconds, and images

# Noise on the latents that the decoder learns from, in their standard deviations. On 325 icons it took the Fréchet distance of
# what a small U-Net drew after half an hour on two cores from 47 to 25
LATENT_NOISE = 0.4

Decision = Literal["skip", "decoder", "train"]


@dataclass(frozen=True)
class Verdict:
    """What a pretrained autoencoder is worth for a folder.

    Attributes:
        where: the autoencoder, as a config names it.
        decision: "skip" uses it as it is, "decoder" goes on with its decoder alone (`freeze_encoder`), "train" trains another.
        reason: one sentence with the numbers.
        images: how many were reconstructed.
        psnr_db: mean over these images; None where the autoencoder does not fit the images at all.
        per_class: mean PSNR in dB of each class that has an image in the sample; {} without classes.
        worst_classes: up to three classes far below, the worst first.
        second_moment: mean of z^2 of its normalised latents, which a denoiser expects to be 1; None as psnr_db.
        normaliser: what the config of stage 2 should say: "stored", or "measured" where the stored one does not fit.
        factor, latent_channels: image side / latent side, and channels of its latents; None where it cannot be opened.
        trainable: whether stage 1 can go on with its decoder.
        seconds_per_image: to encode and decode one, on the device that was used.
    """

    where: str
    decision: Decision
    reason: str
    images: int = 0
    psnr_db: float | None = None
    per_class: Mapping[str, float] | None = None
    worst_classes: tuple[str, ...] = ()
    second_moment: float | None = None
    normaliser: Literal["stored", "measured"] = "stored"
    factor: int | None = None
    latent_channels: int | None = None
    trainable: bool = False
    seconds_per_image: float | None = None

    def as_json(self) -> dict[str, Any]:
        """The same as JSON values, for `from_json`."""
        return asdict(self) | {"per_class": dict(self.per_class or {}), "worst_classes": list(self.worst_classes)}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Verdict:
        """A verdict of what `as_json` gave."""
        return cls(**{**values, "worst_classes": tuple(values["worst_classes"])})

    def decoder_seconds(self) -> float:
        """About the least time in which going on with the decoder is worth it, on the device that was used."""
        return DECODER_STEPS * DECODER_BATCH * STEP_COST * (self.seconds_per_image or 0.0)

    def within(self, seconds: float) -> Verdict:
        """The verdict where stage 1 may take so many seconds: "decoder" becomes "skip" if they are too few for it."""
        if self.decision != "decoder" or seconds >= self.decoder_seconds():
            return self
        found = self.reason.rpartition(": ")[0]
        return replace(self, decision="skip", reason=f"{found}: it is used as it is, as there is no time to train its decoder")


def try_autoencoder(
    where: str | None,
    data: DataConfig,
    limit_images: int = 96,
    limit_seconds: float = 10.0,
    device: str = "cpu",
) -> Verdict:
    """Reconstruct a sample of the images by a pretrained autoencoder, and decide what stage 1 has to do.

    The autoencoder has seen none of the images, so training and held-out ones serve alike. The sample is the same in each
    call: evenly spread over the classes, and within each over its images.

    Args:
        where: a folder, a Hub name or weights/NAME. None: the one that ships, which may turn out not to fit. One that is
            named is used in any case.
        data: the data section of stage 2: the images in its framing are what is reconstructed.
        limit_images: how many are reconstructed at most.
        limit_seconds: no more are begun after this time; LEAST_IMAGES are in any case.
        device: of torch.

    Raises:
        UserError: the images cannot be read; or the autoencoder that is named cannot be used: there is none, or its channels
            or its factor do not fit data.channels and data.size.
    """
    name = where or AUTOENCODER
    try:
        codec = _open(name, data, device)
    except UserError as error:
        if where is not None:
            raise
        return Verdict(name, "train", f"the pretrained autoencoder does not fit these images: {error}")
    from latentdiff.data.datasets import ImageDataset
    from latentdiff.training.images import Images

    try:
        opened = Images(data, codec.factor).train
    except UserError as error:
        if where is not None or "is not a multiple of" not in str(error):
            raise
        return Verdict(name, "train", f"the pretrained autoencoder does not fit these images: {error}")
    images = ImageDataset(opened.source, opened.preprocess)  # held-out ones too
    scores, labels, moment, seconds = _reconstruct(codec, images, limit_images, limit_seconds)
    mean = sum(scores) / len(scores)
    classes = _per_class(scores, labels, images.class_names)
    worst = sorted((n for n, db in classes.items() if db < SKIP_DB - FAR_BELOW), key=classes.__getitem__)[:3]
    trainable = type(codec.vae).__name__ == "AutoencoderKL"
    decision = _decide(mean, bool(worst), trainable, where is not None)
    return Verdict(
        name,
        decision,
        _reason(name, decision, mean, len(scores), classes, worst),
        len(scores),
        round(mean, 2),
        {n: round(db, 2) for n, db in classes.items()},
        tuple(worst),
        round(moment, 3),
        "stored" if MOMENT[0] <= moment <= MOMENT[1] else "measured",
        codec.factor,
        codec.latent_channels,
        trainable,
        seconds,
    )


def show_reconstructions(config: DiffusionConfig, path: Path, seconds_per_image: float | None = None) -> bool:
    """Write a picture of held-out images above their reconstructions by the autoencoder of stage 2.

    Args:
        config: of stage 2. Its autoencoder is there already.
        path: of the PNG.
        seconds_per_image: to encode and decode one; None: not known. A slow autoencoder shows fewer images.

    Returns:
        Whether it was written. It is not where that takes too long, or where the autoencoder or an image cannot be used:
        training says what is wrong.
    """
    from latentdiff.training.autoencoder_checkpoint import save_reconstructions
    from latentdiff.training.images import Images

    count = FEWEST_SHOWN if seconds_per_image is None else int(min(MOST_SHOWN, SHOWING / max(seconds_per_image, 1e-6)))
    if count < FEWEST_SHOWN:
        return False
    try:
        codec = _open(str(config.autoencoder), config.data, "cpu")
        save_reconstructions(codec.vae, Images(config.data, codec.factor), path, count)
    except UserError:
        return False
    return True


def _open(name: str, data: DataConfig, device: str) -> LatentCodec:
    from latentdiff.models.autoencoder import load_autoencoder
    from latentdiff.models.codec import LatentCodec

    codec = LatentCodec(load_autoencoder(name).to(device))
    if codec.image_channels != data.channels:
        raise UserError(
            f"autoencoder {name}: takes {codec.image_channels} channels, and data.channels is {data.channels}; "
            f"set data.channels={codec.image_channels}"
        )
    return codec


def _reconstruct(
    codec: LatentCodec, images: ImageDataset, limit: int, limit_seconds: float
) -> tuple[list[float], list[int] | None, float, float]:
    """(PSNR in dB of each image, their classes or None, second moment of the latents, seconds per image)."""
    import torch

    from latentdiff.evaluation.image_quality import psnr

    height, width = images.preprocess.padded_size
    batch = max(1, min(16, BATCH_PIXELS // (height * width)))
    scores: list[float] = []
    labels: list[int] = []
    moments: list[float] = []
    start = time.monotonic()
    computing = 0.0
    for indices in _batches(_sample(images, limit), batch):
        x, classes = images.batch(indices)
        begun = time.monotonic()
        with torch.inference_mode():
            mean, std = codec.moments(x)
            z = codec.normalise(mean)  # [B, c, h, w]
            y = codec.decode(z).clamp(-1, 1).cpu()
            # Of samples: the posterior's variance counts too
            square = z.square() + (std * codec.scale.to(std)[:, None, None]).square()
        computing += time.monotonic() - begun
        scores += psnr(images.preprocess.crop_content(y), images.preprocess.crop_content(x)).tolist()
        moments += square.flatten(1).mean(1).tolist()
        labels += [] if classes is None else classes.tolist()
        if time.monotonic() - start > limit_seconds and len(scores) >= LEAST_IMAGES:
            break
    return scores, labels or None, sum(moments) / len(moments), computing / len(scores)


def _sample(images: ImageDataset, limit: int) -> torch.Tensor:
    """Indices [at most `limit`] of the data set: one of each class in turn, so that each beginning of it is spread too."""
    import torch

    count = min(limit, len(images))
    if images.labels is None:
        # Evenly spaced, in an order in which each beginning is spread: halves, quarters ...
        even = torch.linspace(0, len(images) - 1, count).long()
        return even[torch.arange(count).mul(0.6180339887).frac().argsort()]
    names = images.labels.unique().tolist()
    if len(names) > count:
        names = [names[i] for i in torch.linspace(0, len(names) - 1, count).long().tolist()]
    each = -(-count // len(names))
    members = [(images.labels == k).nonzero()[:, 0] for k in names]
    spread = [m[torch.linspace(0, len(m) - 1, min(each, len(m))).long()] for m in members]
    rounds = [[m[i] for m in spread if i < len(m)] for i in range(each)]
    return torch.stack([index for turn in rounds for index in turn])[:count]


def _batches(indices: torch.Tensor, batch: int) -> Iterator[torch.Tensor]:
    yield from indices.split(batch)


def _per_class(scores: list[float], labels: list[int] | None, names: Any) -> dict[str, float]:
    if labels is None:
        return {}
    found = {k: [s for s, label in zip(scores, labels, strict=True) if label == k] for k in sorted(set(labels))}
    return {str(names[k]): sum(values) / len(values) for k, values in found.items()}


def _decide(mean: float, some_far_below: bool, trainable: bool, named: bool) -> Decision:
    if mean >= SKIP_DB and not some_far_below and (named or not trainable):
        return "skip"
    if trainable and (mean >= DECODER_DB or named):
        return "decoder"
    return "skip" if named else "train"


def _reason(name: str, decision: Decision, mean: float, count: int, classes: Mapping[str, float], worst: list[str]) -> str:
    means = {
        "skip": "it is used as it is" if mean >= SKIP_DB else "it is used all the same, as it was asked for",
        "decoder": "its encoder is kept, and its decoder learns these pictures",
        "train": "so an autoencoder is trained on these images",
    }
    lowest = min(classes, key=classes.__getitem__) if len(classes) > 1 else None
    spread = f", the lowest class, {lowest}, at {classes[lowest]:.1f} dB" if lowest is not None else ""
    bound = f"{SKIP_DB:g} dB are enough" + (f", with no class under {SKIP_DB - FAR_BELOW:g} dB" if worst else "")
    return f"{name} reconstructs {count} of the images at {mean:.1f} dB on average{spread} ({bound}): {means[decision]}"
