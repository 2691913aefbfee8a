"""Training configs: one YAML file for each run, with typed keys, `key=value` overrides and errors that name the nearest key.

Each class is a section of the file. `Field(description=...)` says what a key means; docs/configuration.md lists them all.
"""

from __future__ import annotations

import difflib
import reprlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, get_args

import yaml
from PIL import ImageColor
from pydantic import BaseModel, ConfigDict, Field, PositiveInt, TypeAdapter, ValidationError, field_validator, model_validator

from latentdiff.errors import UserError
from latentdiff.utils import processes
from latentdiff.utils.safe_yaml import read_yaml

Share = Annotated[float, Field(ge=0, lt=1)]
Level = Annotated[int, Field(ge=0, le=255)]  # of red, green or blue
JOINT_DROPOUT = 0.1  # of several conditions where the config sets none: as much as of each on its own
# pydantic's types of mistakes whose own message speaks of Python's types
IN_WORDS = {
    "bool_parsing": "must be true or false",
    "bool_type": "must be true or false",
    "dict_type": "must be a mapping, such as {key: value}",
    "float_parsing": "must be a number",
    "float_type": "must be a number",
    "int_from_float": "must be a whole number",
    "int_parsing": "must be a whole number",
    "int_type": "must be a whole number",
    "list_type": "must be a list, such as [a, b]",
    "model_type": "must be a section of keys",
    "string_type": "must be a text",
    "tuple_type": "must be a list of numbers, such as [a, b]",
}
BOTH_NAMES = "data.fit is the old name of data.framing, and both are given; leave data.fit out"


class Section(BaseModel):
    """A section of a config. A key that it does not have is an error."""

    model_config = ConfigDict(extra="forbid")


class DataConfig(Section):
    """Which images, and how they become tensors of one shape."""

    source: str = Field(
        description="a folder, fashion-mnist, a table (parquet files, a folder of `datasets`, a Hub name) or WebDataset shards"
    )
    streaming: bool = Field(False, description="read parquet files where they lie, a row group at a time")
    image_column: str | None = Field(None, description="column of tables, shards and metadata files; None: the usual names")
    label_column: str | None = Field(None, description="column of the class; None: the usual names")
    text_column: str | None = Field(None, description="column of the caption; None: the usual names")
    pair_column: str | None = Field(
        None, description="column of a metadata file that names the picture paired with each image (condition.image.kind: pair)"
    )
    caption: str | None = Field(
        None, min_length=1, description="caption of each image that has none; {class} in it becomes the class's name"
    )
    size: tuple[PositiveInt, PositiveInt] | None = Field(
        None, description="(height, width) of the content; None: the images' own size"
    )
    channels: Literal[1, 3] = Field(3, description="1 for grey, 3 for colour")
    framing: Literal["exact", "resize", "crop", "pad", "letterbox"] = Field(
        "exact", description="how images come to one size; its old name is fit"
    )
    background: tuple[Level, Level, Level] = Field(
        (255, 255, 255), description="under transparency and around a letterbox: a name, '#rrggbb' or [red, green, blue]"
    )
    multiple_of: int = Field(
        1, gt=0, description="sides are padded to, or checked for, a multiple of this and of the autoencoder's factor"
    )
    held_out: float = Field(
        0.05, gt=0, lt=1, description="share of the images kept from training, where the source has no test split"
    )
    held_out_rule: Literal["per_class", "random"] = Field(
        "per_class", description="how they are drawn; per_class never takes a class's only image"
    )
    max_bad_share: float = Field(
        0.01, ge=0, lt=1, description="share of the images that may be unreadable; one always may, unless this is 0"
    )
    flips: bool = Field(False, description="mirror images left-right at random")
    limit: PositiveInt | None = Field(
        None, description="images that are trained on at most, spread evenly over the data; None: all"
    )
    copies: int = Field(
        1, ge=1, le=1000, description="how often each training image is there: itself, and moved and scaled copies of it"
    )
    shift: float = Field(0.0, ge=0, le=0.5, description="how far copies are moved at most, as a share of the sides")
    zoom: float = Field(0.0, ge=0, le=0.5, description="how much larger or smaller copies are at most: 0.1 is 0.9 to 1.1 times")
    workers: int = Field(0, ge=0, description="threads that read images ahead")

    @model_validator(mode="before")
    @classmethod
    def _rename_fit(cls, value: Any) -> Any:
        if isinstance(value, dict) and "fit" in value and "framing" not in value:
            return {("framing" if key == "fit" else key): each for key, each in value.items()}
        return value

    @field_validator("background", mode="before")
    @classmethod
    def _color(cls, value: Any) -> Any:
        if isinstance(value, str):
            try:
                return ImageColor.getrgb(value)[:3]
            except ValueError:
                raise ValueError("not a colour; write a name such as white, '#rrggbb' or [red, green, blue]") from None
        return value


class ModelConfig(Section):
    """The network: a diffusers class with its arguments, or a trained one to start from."""

    type: str | None = Field(None, description="a class of diffusers, such as AutoencoderKL or UNet2DModel")
    config: dict[str, Any] = Field({}, description="arguments of the class")
    pretrained: str | None = Field(
        None,
        description="where to start from. Stage 1: a folder or Hub name, for a type with codes also an AutoencoderKL; stage 2: "
        "a pipeline's folder, or a U-Net's",
    )


class LoraConfig(Section):
    """Low-rank changes of a pretrained U-Net (LoRA, arXiv:2106.09685): only they are trained, the U-Net itself stays.

    The weight W [out, in] of a target becomes W + alpha / rank * B A, with A [rank, in] and B [out, rank]; B starts at 0.
    """

    rank: PositiveInt = Field(8, description="rank of the changes: the more, the more can be learnt, and the larger the file")
    alpha: float | None = Field(
        None, gt=0, allow_inf_nan=False, description="the changes are multiplied by alpha / rank; None: the rank, a factor of 1"
    )
    targets: list[str] = Field(
        ["to_q", "to_k", "to_v", "to_out.0"],
        min_length=1,
        description="layers that are changed, by the end of their names; by default those of attention",
    )

    @property
    def scale(self) -> float:
        """The factor alpha / rank."""
        return 1.0 if self.alpha is None else self.alpha / self.rank


class DiffusionModelConfig(ModelConfig):
    """The U-Net of stage 2."""

    match_classes: bool = Field(
        False, description="classes take the rows that model.pretrained's pipeline has for their names; new ones start anew"
    )
    lora: LoraConfig | None = Field(None, description="train low-rank changes of model.pretrained alone; None: all its weights")


class OptimizerConfig(Section):
    """AdamW. The learning rate is absolute: it is never scaled by the batch size or the number of processes."""

    lr: float = Field(1e-4, gt=0, allow_inf_nan=False, description="learning rate")
    betas: tuple[Share, Share] = Field((0.9, 0.999), description="decay of the gradient's mean and of its square's")
    weight_decay: float = Field(0.0, ge=0, description="weight decay, decoupled")
    eps: float = Field(1e-8, gt=0, allow_inf_nan=False, description="added to the denominator of a step")
    warmup_steps: int = Field(0, ge=0, description="steps over which the learning rate rises from 0")
    schedule: Literal["constant", "cosine", "linear", "wsd"] = Field(
        "constant",
        description="how the learning rate falls after the warm-up, down to final_share. wsd is constant, then linear over "
        "the last decay_share of the steps (arXiv:2405.18392): a run that is made longer before it decays is the longer run",
    )
    decay_share: float = Field(0.2, gt=0, le=1, description="share of the steps in which wsd falls")
    final_share: float = Field(0.0, ge=0, le=1, description="the last learning rate, as a share of lr")
    clip: float | None = Field(1.0, gt=0, description="largest norm of the gradient; None: no limit")


class EmaConfig(Section):
    """Averaged weights: at step k the decay is min(decay, 1 - (1 + k)^-power), so short runs are not mostly their start."""

    decay: float = Field(0.999, ge=0, lt=1, description="largest decay of the average, for each step")
    power: float = Field(0.75, gt=0, description="how fast the decay rises to that")


class TrainConfig(Section):
    """How a run goes: its length, precision, logs and training states."""

    steps: int = Field(gt=0, description="steps of the optimizer")
    batch_size: int = Field(64, gt=0, description="samples of a step, over all processes together")
    precision: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="auto: the faster one, measured when the run starts, and then kept"
    )
    threads: int | None = Field(None, gt=0, description="CPU threads of each process; None: torch's choice")
    log_every: int = Field(20, gt=0, description="steps between lines of the log")
    picture_every: int = Field(500, gt=0, description="steps between pictures")
    save_minutes: float = Field(5.0, gt=0, description="minutes between training states")
    keep: int = Field(2, gt=0, description="training states kept")
    trackers: list[str] = Field(
        ["tensorboard"],
        description="where curves and pictures go besides metrics.jsonl: trackers of accelerate, such as wandb, if installed",
    )


class LoopConfig(TrainConfig):
    """Training options shared by both stages. Most affect speed, memory and recovery, not results."""

    minutes: float | None = Field(
        None,
        gt=0,
        allow_inf_nan=False,
        description="minutes that the run may take, all its parts together; the learning rate then falls by the clock, and "
        "steps is an upper bound. None: no limit",
    )
    picture_minutes: float | None = Field(
        None, gt=0, allow_inf_nan=False, description="minutes of training between pictures, besides those of picture_every"
    )
    snapshot_minutes: float | None = Field(
        None, gt=0, allow_inf_nan=False, description="minutes of training between snapshots, besides those of snapshot_every"
    )
    precision: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="as in the other stages; float16, with a scaled loss, is for GPUs without bfloat16"
    )
    micro_batch: PositiveInt | Literal["auto"] | None = Field(
        None,
        description="samples that a process takes through the network at once; None: its whole share, auto: as many as fit "
        "in memory",
    )
    gradient_checkpointing: bool = Field(
        False, description="compute activations again in the backward pass: less memory, more time"
    )
    compile: bool = Field(False, description="torch.compile of the network, compared with eager before it is used")
    bad_steps: int = Field(
        10, ge=0, description="steps in a row that may be skipped, as their loss or gradient is not finite, before on_bad"
    )
    on_bad: Literal["stop", "rollback"] = Field(
        "stop", description="rollback: back to the last training state, at half the learning rate"
    )
    best: Literal["validation/loss_ema", "validation/loss_raw", "evaluation/frechet"] | None = Field(
        None, description="stage 2: also keep the training state where this is lowest"
    )
    snapshot_every: int | None = Field(
        None, gt=0, description="steps between averaged weights that are kept for good, for `latentdiff publish`"
    )
    timeout_minutes: float = Field(30.0, gt=0, description="how long a process waits for the others before it gives up")


class Stage1Loss(Section):
    """Weights of the loss's terms in stage 1. A term of weight 0 is neither computed nor logged.

    The terms of the pixels and the perceptual one are means over an image, the KL term is a sum over its latent. In latent
    diffusion (arXiv:2112.10752) the pixels are summed too, so kl=1e-6 there is 1e-6 / (C H W) here.
    """

    l1: float = Field(1.0, ge=0, description="absolute error of the pixels")
    l2: float = Field(1.0, ge=0, description="squared error of the pixels")
    perceptual: float = Field(0.0, ge=0, description="distance in the features of a network")
    perceptual_network: str | None = Field(None, description="that network: a feature network's folder, or lpips")
    kl: float = Field(
        1e-6, ge=0, description="KL divergence of an image's posterior from N(0, 1), summed over its latent (AutoencoderKL)"
    )
    commitment: float = Field(
        1.0,
        ge=0,
        description="distance of latents and codes, |sg(z) - e|^2 + 0.25 |z - sg(e)|^2 (arXiv:1711.00937, eq. 3; VQModel); "
        "with codebook.update=ema 0.25 |z - sg(e)|^2 alone",
    )
    adversarial: float = Field(0.0, ge=0, description="the patch discriminator's judgement")
    adversarial_start: int = Field(0, ge=0, description="first step with the adversarial term")
    adaptive: bool = Field(True, description="scale the adversarial term to the reconstruction's gradient at the last layer")
    discriminator_channels: int = Field(32, gt=0, description="channels of the discriminator's first layer; they double")
    discriminator_layers: int = Field(2, gt=0, description="its layers that halve the sides")
    discriminator_lr: float = Field(2e-4, gt=0, description="its learning rate")

    def adversarial_at(self, step: int) -> bool:
        """Whether the adversarial term is part of this step (0 is the first). Before, the discriminator is not trained."""
        return self.adversarial > 0 and step >= self.adversarial_start


class CodebookConfig(Section):
    """How the codebook of a VQModel or ResidualVQModel starts, and what moves it. An FSQModel's is a fixed grid."""

    update: Literal["gradient", "ema"] = Field(
        "gradient",
        description="gradient: the optimizer, by the commitment term; ema: running means of the latents that chose each code "
        "(arXiv:1711.00937, appendix A.1)",
    )
    decay: float = Field(0.99, gt=0, lt=1, description="of the running means, for each step (update: ema)")
    start: Literal["random", "data"] = Field(
        "random", description="random: small values, as diffusers has it; data: latents of the first batch"
    )
    revive_every: int | None = Field(
        None, gt=0, description="steps over which use is counted; then unused codes are revived. None: an epoch"
    )


class AutoencoderConfig(Section):
    """Stage 1: train an autoencoder for reconstruction."""

    stage: Literal["autoencoder"]
    output: str = Field(description="folder of the run")
    seed: int = Field(0, description="of weights, order of the data, and noise")
    data: DataConfig
    model: ModelConfig
    initial_logvar: float | None = Field(
        -5.0, description="where the log-variance of the posterior starts (AutoencoderKL); None: where diffusers puts it"
    )
    freeze_encoder: bool = Field(
        False,
        description="train the decoder of model.pretrained alone; its latents stay, and so do caches and U-Nets made of them",
    )
    latent_noise: float = Field(
        0.0,
        ge=0,
        description="noise on the latents that the decoder learns from, in their standard deviations (with freeze_encoder): it "
        "then forgives stage 2 small errors",
    )
    revive_dead_codes: bool = Field(
        True, description="give unused codes new values, random latents, after codebook.revive_every steps (VQModel)"
    )
    codebook: CodebookConfig = CodebookConfig()
    loss: Stage1Loss = Stage1Loss()
    optimizer: OptimizerConfig = OptimizerConfig()
    ema: EmaConfig = EmaConfig()
    train: LoopConfig


class CacheConfig(Section):
    """The latent cache: the mean and deviation of the autoencoder's posterior, for each training image."""

    folder: str | None = Field(None, description="where the cache is; None: latents/ in the run's folder")
    batch_size: int = Field(256, gt=0, description="images encoded at once")
    shard_size: int = Field(4096, gt=0, description="images in a file, of a cache that is not finished yet")
    check: Literal["full", "size"] = Field(
        "full", description="full: read the whole cache before a run, and compare its hashes; size: compare lengths alone"
    )
    use_mean: bool = Field(False, description="train on the posteriors' means, instead of a fresh draw at each step")


class NamedConfig(Section):
    """A noise schedule or a distribution of training times, by its name. The name alone may be written as a string.

    An unknown name or parameter is a UserError when the run begins, not when the config is read.
    """

    name: str = Field(description="a name of `latentdiff.schedules.names()`, or of `latentdiff.noise_levels.names()`")
    params: dict[str, Any] = Field({}, description="what the name takes; it is checked where it is used")

    @model_validator(mode="before")
    @classmethod
    def _from_name(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value


class TextConfig(Section):
    """What reads the captions: a pretrained text encoder, frozen, or a small transformer trained with the U-Net."""

    encoder: str | None = Field(
        None, description="a folder or Hub name of a transformers text encoder; None: a new one, trained with the U-Net"
    )
    dropout: float = Field(0.1, ge=0, le=1, description="share of samples whose caption is replaced by the empty one")
    max_length: int | None = Field(
        None, gt=2, le=512, description="tokens of a caption; None: the encoder's own number, 32 for a new one"
    )
    folder: str | None = Field(
        None, description="where a pretrained encoder's output is stored; None: captions/ in the run's folder"
    )
    vocabulary: int = Field(4096, gt=300, description="of a new encoder: tokens of the byte-pair encoding, at most")
    width: int = Field(256, gt=0, description="of a new encoder: channels")
    layers: int = Field(4, gt=0, description="of a new encoder: layers")
    heads: int = Field(4, gt=0, description="of a new encoder: heads of attention")


class ImageConfig(Section):
    """A second image that the U-Net is given: made from the training image, or paired with it.

    The autoencoder encodes it, and its latent lies beside x_t as further channels (as in SR3, arXiv 2104.07636, and
    InstructPix2Pix, arXiv 2211.09800).
    """

    kind: Literal["low_resolution", "mask", "grey", "pair"] = Field(
        "low_resolution",
        description="the image made small; the image with a part hidden, and which part that is; the image without colour; "
        "or the picture that data.pair_column names",
    )
    factor: int = Field(4, ge=2, le=64, description="low_resolution: how many times shorter its sides are")
    masks: Literal["mixed", "side", "rectangles", "frame"] = Field(
        "mixed",
        description="mask: what is hidden. side: a share of the image at one side; rectangles: one to three; frame: all but "
        "one rectangle; mixed: each of the three equally often",
    )
    draws: int = Field(4, ge=1, le=64, description="mask: different masks of each image, all encoded before training")
    dropout: float = Field(0.1, ge=0, le=1, description="share of samples that are not given the image: zeros in its place")
    folder: str | None = Field(None, description="where the encoded images are; None: condition/ in the run's folder")


class ConditionConfig(Section):
    """What the U-Net is conditioned on, and how often training leaves it out (classifier-free guidance, arXiv 2207.12598).

    The shares are probabilities of a sample. Conditions are dropped independently of each other; a further share,
    joint_dropout, loses all of them together. With class, text and image, one more share of that size loses class and text
    and keeps the image.
    """

    type: Literal["class", "text", "class+text", "image", "class+image", "text+image", "class+text+image", "none"] = Field(
        "class", description="the class, the caption, an image, several of them, or none"
    )
    dropout: float = Field(0.1, ge=0, le=1, description="share of samples whose class is replaced by the null class")
    joint_dropout: float | None = Field(
        None,
        ge=0,
        le=1,
        description="of several conditions: share of samples that lose all of them, besides. None: 0.1 where each is dropped "
        "on its own, else 0",
    )
    text: TextConfig = TextConfig()
    image: ImageConfig = ImageConfig()

    def includes(self, kind: str) -> bool:
        """Whether "class", "text" or "image" is among what the model is conditioned on."""
        return kind in self.type.split("+")

    @property
    def shares(self) -> dict[str, float]:
        """The share of samples, 0 to 1, that lose a condition alone, by its name: "class", "text" or "image"."""
        shares = {"class": self.dropout, "text": self.text.dropout, "image": self.image.dropout}
        return {kind: share for kind, share in shares.items() if self.includes(kind)}

    @property
    def effective_joint_dropout(self) -> float:
        """Share of samples, 0 to 1, that lose all conditions together; 0 unless there are several.

        Guidance compares the conditional prediction with the one without any condition. Dropped independently, at 0.1
        each, both are missing from one sample in a hundred, which is too few to learn that prediction from.
        """
        if len(self.shares) < 2:
            return 0.0
        if self.joint_dropout is None:
            return JOINT_DROPOUT if all(share > 0 for share in self.shares.values()) else 0.0
        return self.joint_dropout


class DrawConfig(Section):
    """What both kinds of stage 2 say of drawing pictures: while training, and by default from the published pipeline."""

    steps: int = Field(20, gt=0, description="steps of sampling")
    guidance: float | None = Field(
        None, ge=0, description="guidance scale; None: 1.5 where training drops class or text, else 1, which is off"
    )
    guidance_interval: tuple[float, float] | None = Field(
        None, description="guide only at these times [low, high]; 0 is data and 1 is noise. None: at all"
    )
    per_class: int = Field(4, gt=0, description="pictures of each class or prompt")
    prompts: list[str] = Field([], description="prompts drawn while training on text; empty: captions of the data")

    @field_validator("guidance_interval")
    @classmethod
    def _ordered(cls, value: tuple[float, float] | None) -> tuple[float, float] | None:
        if value is not None and not 0 <= value[0] <= value[1] <= 1:
            raise ValueError("must be [low, high] with 0 <= low <= high <= 1")
        return value


class SampleConfig(DrawConfig):
    """How pictures are drawn while training, and the defaults of the published pipeline."""

    scheduler: str | None = Field(
        "auto", description="a class of diffusers; auto: the schedule's first choice; null: none, a sampler of latentdiff"
    )
    scheduler_config: dict[str, Any] = Field({}, description="arguments of the scheduler")
    sampler: str | None = Field(None, description="latentdiff's, where there is no scheduler; None: dpmpp_2m")


class EvaluateConfig(Section):
    """The Frechet distance, measured while training, of pictures that the averaged weights draw as `sample` says."""

    every: int | None = Field(None, gt=0, description="steps between measurements; None: never")
    images: int = Field(500, ge=2, description="pictures drawn: as many of each class, or of held-out captions")
    reference: int = Field(10_000, ge=2, description="training images that they are compared with")
    features: str | None = Field(None, description="folder of the feature network")


class BridgeConfig(Section):
    """Train a bridge: from the latents of another data set, in the place of noise, to those of `data` (flow matching).

    It needs schedule flow and prediction flow. The other data set has the size, channels and framing of `data`.
    """

    source: str = Field(description="the data set to start from, named as data.source")
    cache: str | None = Field(None, description="where its latent cache is; None: beside that of data, with -source at its end")


class DiffusionConfig(Section):
    """Stage 2: train a denoiser on the latents of a frozen autoencoder."""

    stage: Literal["diffusion"]
    output: str = Field(description="folder of the run")
    seed: int = Field(0, description="of weights, order of the data, noise and dropout")
    autoencoder: str = Field(description="output of stage 1, or any diffusers autoencoder: a folder or a Hub name")
    normaliser: Literal["stored", "measured"] = Field(
        "stored", description="measured: on this data, for an autoencoder trained elsewhere"
    )
    data: DataConfig
    cache: CacheConfig = CacheConfig()
    model: DiffusionModelConfig
    schedule: NamedConfig = Field(NamedConfig(name="ddpm-linear"), description="the noise schedule")
    prediction: Literal["epsilon", "sample", "v_prediction", "score", "flow", "edm"] = Field(
        "epsilon", description="what the network predicts"
    )
    noise_levels: NamedConfig = Field(NamedConfig(name="uniform"), description="distribution of the training times")
    weighting: Literal["none", "min_snr", "edm", "likelihood", "uncertainty"] = Field(
        "none", description="weight of the loss at each time"
    )
    min_snr_gamma: float = Field(5.0, gt=0, description="largest signal-to-noise ratio that counts (min_snr)")
    condition: ConditionConfig = ConditionConfig()
    bridge: BridgeConfig | None = Field(None, description="start from another data set instead of noise; None: from noise")
    optimizer: OptimizerConfig = OptimizerConfig()
    ema: EmaConfig = EmaConfig()
    train: LoopConfig
    validation_images: int = Field(512, gt=0, description="held-out images of the validation loss")
    sample: SampleConfig = SampleConfig()
    evaluate: EvaluateConfig = EvaluateConfig()


class DiscreteModelConfig(Section):
    """The U-Net of discrete diffusion. It is given the codes as channels of zeros and ones, and gives a logit of each code."""

    type: str | None = Field(None, description="UNet2DModel, the default, or UNet2DConditionModel for a model that reads text")
    config: dict[str, Any] = Field({}, description="arguments of the class")
    pretrained: str | None = Field(
        None,
        description="a pipeline's folder, or a U-Net's, to start from: a model over the latents that the codes stand for. Its "
        "first and last layer are made anew, of its own and the codebook",
    )
    # What only the U-Net of stage diffusion can do
    match_classes: ClassVar[bool] = False
    lora: ClassVar[None] = None


class DiscreteSampleConfig(DrawConfig):
    """How pictures are drawn while training, and the defaults of the published pipeline."""

    order: Literal["random", "confidence"] = Field(
        "random",
        description="which positions become codes at a step: random ones, as the process has it, or those that the network is "
        "surest of (MaskGIT, arXiv 2202.04200; process absorbing alone)",
    )


class DiscreteConfig(Section):
    """Stage 2 over codes: train a network to restore the codes of a frozen autoencoder that has a codebook.

    The process masks codes (absorbing) or replaces them by random ones (uniform); 0 is data, and at time 1 nothing is left.
    """

    stage: Literal["discrete"]
    output: str = Field(description="folder of the run")
    seed: int = Field(0, description="of weights, order of the data, corruption and dropout")
    autoencoder: str = Field(description="output of stage 1, or a diffusers VQModel: a folder or a Hub name")
    data: DataConfig
    cache: CacheConfig = CacheConfig()
    model: DiscreteModelConfig
    process: Literal["absorbing", "uniform"] = Field(
        "absorbing", description="absorbing: codes are masked (MDLM, arXiv 2406.07524); uniform: replaced by random ones (D3PM)"
    )
    schedule: str = Field("linear", description="how many codes are left at time t; a name of `latentdiff.discrete.SCHEDULES`")
    levels: Literal["together", "coarse_first"] = Field(
        "together",
        description="of a residual quantiser's codes. coarse_first: the first level is drawn before the second, and so on",
    )
    weighting: Literal["none", "bound"] = Field(
        "none",
        description="weight of the loss at each time. none: the mean cross-entropy; bound: the likelihood's",
    )
    condition: ConditionConfig = ConditionConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    ema: EmaConfig = EmaConfig()
    train: LoopConfig
    validation_images: int = Field(512, gt=0, description="held-out images of the validation loss")
    sample: DiscreteSampleConfig = DiscreteSampleConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    # What only stage diffusion can do
    bridge: ClassVar[None] = None


Stage2Config = DiffusionConfig | DiscreteConfig


class FeaturesConfig(Section):
    """A small classifier whose features serve perceptual losses and offline evaluation."""

    stage: Literal["features"]
    output: str = Field(description="folder of the network")
    name: str = Field(description="the network's name; it stands in every number that is measured with it")
    seed: int = Field(0, description="of weights and order of the data")
    data: DataConfig
    model: dict[str, Any] = Field({}, description="arguments of the network, such as widths")
    lr: float = Field(2e-3, gt=0, allow_inf_nan=False, description="learning rate")
    train: TrainConfig


class ClassifierConfig(Section):
    """A small classifier of noised latents, for classifier guidance.

    autoencoder, normaliser, data, cache and schedule are as in the config of the model that it guides.
    """

    stage: Literal["classifier"]
    output: str = Field(description="folder of the run")
    seed: int = Field(0, description="of weights, order of the data, and noise")
    autoencoder: str = Field(description="the autoencoder of the model that is guided")
    normaliser: Literal["stored", "measured"] = Field("stored", description="as in that model's config")
    data: DataConfig
    cache: CacheConfig = CacheConfig()
    model: dict[str, Any] = Field({}, description="arguments of the classifier: widths, two numbers")
    schedule: NamedConfig = Field(NamedConfig(name="ddpm-linear"), description="the noise schedule")
    noise_levels: NamedConfig = Field(NamedConfig(name="uniform"), description="distribution of the training times")
    optimizer: OptimizerConfig = OptimizerConfig()
    train: TrainConfig
    validation_images: int = Field(2048, gt=0, description="held-out images of its accuracy")


class PairsConfig(Section):
    """Pictures of the same things in several styles."""

    source: str = Field(
        description="a folder whose pictures have a style and an identity, as `latentdiff prepare emoji` makes it"
    )


class JudgeConfig(Section):
    """A small network that finds the nearest real pictures, to judge text-to-image models by retrieval."""

    stage: Literal["judge"]
    output: str = Field(description="folder of the network")
    seed: int = Field(0, description="of weights, order of the data and augmentation")
    data: PairsConfig
    model: dict[str, Any] = Field({}, description="arguments of the network, such as widths")
    lr: float = Field(4e-3, gt=0, allow_inf_nan=False, description="learning rate")
    strength: float = Field(1.0, gt=0, le=1, description="strength of the augmentation")
    train: TrainConfig


Config = AutoencoderConfig | DiffusionConfig | DiscreteConfig | FeaturesConfig | ClassifierConfig | JudgeConfig
AnyConfig = Annotated[Config, Field(discriminator="stage")]
STAGES: dict[str, type[Section]] = {
    "autoencoder": AutoencoderConfig,
    "diffusion": DiffusionConfig,
    "discrete": DiscreteConfig,
    "features": FeaturesConfig,
    "classifier": ClassifierConfig,
    "judge": JudgeConfig,
}


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a config.

    Args:
        path: a YAML file.
        overrides: `section.key=value`; the values are YAML.

    Raises:
        UserError: in one line, for a missing file, bad YAML, an unknown key (with the nearest valid one), or a value that
            is not valid.
    """
    path = Path(path)
    if not path.is_file():
        near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.yaml")], n=1)
        raise UserError(f"{path}: no such config file" + (f"; did you mean {path.parent / near[0]}?" if near else ""))
    try:
        tree = read_yaml(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not valid YAML: {' '.join(str(error).split())[:300]}") from None
    if not isinstance(tree, dict):
        raise UserError(f"{path}: expected a mapping with a 'stage' key, one of {', '.join(STAGES)}")
    for item in overrides:
        override(tree, item)
    config = parse_config(tree, str(path))
    if "fit" in (tree.get("data") or {}) and processes.rank() == 0:
        print(f"warning: {path}: data.fit has a new name, data.framing; the old one still works", file=sys.stderr)
    return config


def parse_config(tree: dict[str, Any], where: str = "config") -> Config:
    """A config from nested dicts. UserError for a mistake; its message begins with `where`."""
    if not isinstance(tree.get("stage"), str) or tree["stage"] not in STAGES:
        raise UserError(f"{where}: stage: {tree.get('stage')!r} is not one of {', '.join(STAGES)}")
    if isinstance(tree.get("data"), dict) and {"fit", "framing"} <= set(tree["data"]):
        raise UserError(f"{where}: {BOTH_NAMES}")
    try:
        return TypeAdapter(AnyConfig).validate_python(tree)
    except ValidationError as error:
        raise UserError(f"{where}: {explain(error, STAGES[tree['stage']])}") from None


def parse_data(tree: dict[str, Any], overrides: Sequence[str]) -> DataConfig:
    """A data section from a dict, with overrides `data.key=value`. UserError in one line for a mistake."""
    whole = {"data": dict(tree)}
    for item in overrides:
        override(whole, item)
    if {"fit", "framing"} <= set(whole["data"]):
        raise UserError(BOTH_NAMES)
    try:
        return DataConfig.model_validate(whole["data"])
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        raise UserError(f"data.{key}: {reason(first)}") from None


def keep_split(config: Config, record: dict[str, Any]) -> None:
    """Let a resumed run keep the held-out images it began with: `config` is changed in place.

    record: the content of the run's run.json. One without data.held_out_rule is of a version whose only rule was "random".
    """
    data = record.get("data")
    if isinstance(config.data, DataConfig) and isinstance(data, dict) and "held_out_rule" not in data:
        config.data.held_out_rule = "random"


def override(tree: dict[str, Any], item: str) -> None:
    """Set `section.key=value` in nested dicts, in place; the value is YAML. UserError where it is not of that form."""
    key, eq, value = item.partition("=")
    if not eq or not key:
        raise UserError(f"override {item!r}: write it as key=value, for example train.steps=100")
    *parents, last = key.split(".")
    node = tree
    for name in parents:
        if node.get(name) is None:
            node[name] = {}
        node = node[name]
        if not isinstance(node, dict):
            raise UserError(f"override {item!r}: {name} is a value, not a section")
    try:
        node[last] = read_yaml(value)
    except yaml.YAMLError:
        raise UserError(f"override {item[:200]!r}: the value is not valid YAML") from None


def explain(error: ValidationError, root: type[BaseModel]) -> str:
    """The first mistake that pydantic found, in one line; for an unknown key with the nearest valid one.

    root: the class of the config's stage.
    """
    first = error.errors()[0]
    path = [str(part) for part in first["loc"][1:]]  # the first part is the stage
    dotted = ".".join(path)
    if first["type"] == "extra_forbidden":
        valid = _keys_at(root, path[:-1])
        near = difflib.get_close_matches(path[-1], valid, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}?" if near else f"valid keys: {', '.join(valid)}"
        return f"{dotted}: unknown key; {hint}"
    if first["type"] == "missing" and path[-1].isdecimal():  # an entry of a list
        return f"{'.'.join(path[:-1])}: must have more values (got {reprlib.repr(first['input'])})"
    if first["type"] == "missing":
        return f"{dotted}: this key is required"
    return f"{dotted}: {reason(first)} (got {reprlib.repr(first['input'])})"


def reason(mistake: Any) -> str:
    """What would be valid, in words, for one of pydantic's mistakes (an entry of `ValidationError.errors()`)."""
    kind, message = mistake["type"], mistake["msg"]
    if kind == "too_long":
        return f"must be a list of {mistake['ctx']['max_length']} values"
    return IN_WORDS.get(kind) or f"{message[0].lower()}{message[1:]}"


def _keys_at(root: type[BaseModel], path: list[str]) -> list[str]:
    """The valid keys of the section at a path."""
    section: Any = root
    for name in path:
        field = section.model_fields.get(name)
        kinds = [] if field is None else [field.annotation, *get_args(field.annotation)]
        section = next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)), None)
        if section is None:
            return []
    return list(section.model_fields)
