"""Typed training configs: one YAML file per run, `key=value` overrides, and an error that names the nearest valid key."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from PIL import ImageColor
from pydantic import BaseModel, ConfigDict, Field, PositiveInt, TypeAdapter, ValidationError, field_validator, model_validator

from latentdiff.errors import UserError
from latentdiff.utils import processes
from latentdiff.utils.config_errors import explain, override, similar_config
from latentdiff.utils.safe_yaml import read_yaml

Share = Annotated[float, Field(ge=0, lt=1)]
BOTH_NAMES = "data.fit is the old name of data.framing, and both are given; leave data.fit out"
Level = Annotated[int, Field(ge=0, le=255)]  # of red, green or blue


class Section(BaseModel):
    """A part of a config; a key it does not know is an error."""

    model_config = ConfigDict(extra="forbid")


class DataConfig(Section):
    """Which images, and how they become the tensor the autoencoder sees."""

    source: str  # a folder, fashion-mnist, a table (parquet files, a folder of `datasets`, a Hub name) or WebDataset shards
    streaming: bool = False  # read a table's parquet files where they lie, a row group at a time
    image_column: str | None = None  # of tables, shards and metadata.jsonl/.csv; None: the usual names
    label_column: str | None = None
    text_column: str | None = None
    size: tuple[PositiveInt, PositiveInt] | None = None  # (H, W) of the content; None: the images' own size
    channels: Literal[1, 3] = 3
    framing: Literal["exact", "resize", "crop", "pad", "letterbox"] = "exact"  # how images come to one shape; was named fit
    background: tuple[Level, Level, Level] = (255, 255, 255)  # under transparency and around a letterbox: a name or [r, g, b]
    multiple_of: int = Field(1, gt=0)  # sides are padded or checked to a multiple of this and of the autoencoder's factor
    held_out: float = Field(0.05, gt=0, lt=1)  # share kept from training where the source has no test split
    held_out_rule: Literal["per_class", "random"] = "per_class"  # per_class never takes a class's only image
    max_bad_share: float = Field(0.01, ge=0, lt=1)  # of images that may be unreadable, one at least; 0: none
    flips: bool = False  # mirror images left-right at random
    workers: int = Field(0, ge=0)

    @model_validator(mode="before")
    @classmethod
    def _old_name(cls, value: Any) -> Any:
        if isinstance(value, dict) and "fit" in value and "framing" not in value:
            value = {("framing" if key == "fit" else key): each for key, each in value.items()}
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
    """A diffusers class and its constructor arguments, or where a trained one is, from which training goes on."""

    type: str | None = None
    config: dict[str, Any] = {}
    pretrained: str | None = None  # stage 1: a folder or Hub name; stage 2: a pipeline's folder (its unet/), or a U-Net's


class OptimizerConfig(Section):
    """AdamW. The learning rate is absolute: it is never scaled by batch size or number of processes."""

    lr: float = Field(1e-4, gt=0, allow_inf_nan=False)
    betas: tuple[Share, Share] = (0.9, 0.999)
    weight_decay: float = Field(0.0, ge=0)
    eps: float = Field(1e-8, gt=0, allow_inf_nan=False)
    warmup_steps: int = Field(0, ge=0)
    # After the warm-up, down to final_share * lr. wsd: constant, then linear over the last decay_share of the steps
    # (2405.18392), so that a run whose length is raised before its decay is the longer run from the start
    schedule: Literal["constant", "cosine", "linear", "wsd"] = "constant"
    decay_share: float = Field(0.2, gt=0, le=1)
    final_share: float = Field(0.0, ge=0, le=1)
    clip: float | None = Field(1.0, gt=0)  # largest gradient norm


class EmaConfig(Section):
    """Average of the weights: decay_k = min(decay, 1 - (1 + k)^-power) at step k, so that short runs are not all start."""

    decay: float = Field(0.999, ge=0, lt=1)
    power: float = Field(0.75, gt=0)


class TrainConfig(Section):
    steps: int = Field(gt=0)
    batch_size: int = Field(64, gt=0)  # global: over all processes together
    precision: Literal["auto", "float32", "bfloat16"] = "auto"  # auto: the faster one, measured as the run starts, and kept
    threads: int | None = Field(None, gt=0)  # CPU threads per process; None: torch's choice
    log_every: int = Field(20, gt=0)
    picture_every: int = Field(500, gt=0)
    save_minutes: float = Field(5.0, gt=0)
    keep: int = Field(2, gt=0)  # training states kept
    trackers: list[str] = ["tensorboard"]  # accelerate's trackers that are given scalars and pictures


class LoopConfig(TrainConfig):
    """What the trainers of the two stages have besides. None of it changes what a healthy run computes."""

    # float16: for GPUs without bfloat16. The loss is scaled, so that small gradients do not vanish
    precision: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    # Samples a process takes through the network at once. None: its whole share; auto: the most that fit in memory
    micro_batch: PositiveInt | Literal["auto"] | None = None
    gradient_checkpointing: bool = False  # compute activations again in the backward pass: less memory, more time
    compile: bool = False  # torch.compile of the network alone, held against eager before it is used
    bad_steps: int = Field(10, ge=0)  # in a row, skipped for a loss or gradient that is not finite, before on_bad
    on_bad: Literal["stop", "rollback"] = "stop"  # rollback: to the last state, at half the learning rate
    # Stage 2: keep the state where it is lowest
    best: Literal["validation/loss_ema", "validation/loss_raw", "evaluation/frechet"] | None = None
    snapshot_every: int | None = Field(None, gt=0)  # steps; averaged weights kept for good, for `latentdiff publish`
    timeout_minutes: float = Field(30.0, gt=0)  # how long a process waits for the others before it gives up


class Stage1Loss(Section):
    """Weights of the terms of stage 1; a term with weight 0 is neither computed nor logged."""

    l1: float = Field(1.0, ge=0)
    l2: float = Field(1.0, ge=0)
    perceptual: float = Field(0.0, ge=0)
    perceptual_network: str | None = None  # folder of a feature network, or lpips
    kl: float = Field(1e-6, ge=0)  # per image, summed over the latent, relative to a mean over pixels
    commitment: float = Field(1.0, ge=0)
    adversarial: float = Field(0.0, ge=0)
    adversarial_start: int = Field(0, ge=0)  # first step with the adversarial term
    adaptive: bool = True  # scale the adversarial term to the reconstruction's gradient at the last layer
    discriminator_channels: int = Field(32, gt=0)
    discriminator_layers: int = Field(2, gt=0)
    discriminator_lr: float = Field(2e-4, gt=0)


class AutoencoderConfig(Section):
    """Stage 1: train an autoencoder for reconstruction."""

    stage: Literal["autoencoder"]
    output: str
    seed: int = 0
    data: DataConfig
    model: ModelConfig
    initial_logvar: float | None = -5.0  # AutoencoderKL: where the posterior's log-variance starts
    # Train the decoder of model.pretrained alone: its latents stay as they are, and so do caches and U-Nets made of them
    freeze_encoder: bool = False
    revive_dead_codes: bool = True  # VQModel: after each epoch
    loss: Stage1Loss = Stage1Loss()
    optimizer: OptimizerConfig = OptimizerConfig()
    ema: EmaConfig = EmaConfig()
    train: LoopConfig


class CacheConfig(Section):
    folder: str | None = None  # None: latents/ beside the autoencoder's folder
    batch_size: int = Field(256, gt=0)
    shard_size: int = Field(4096, gt=0)  # images a file; of a cache that is not finished yet
    # full: a run reads the whole cache once before it starts, and holds it against its hashes; size: lengths alone
    check: Literal["full", "size"] = "full"
    use_mean: bool = False  # train on posterior means instead of a fresh draw each epoch


class NamedConfig(Section):
    """A name and its parameters, looked up where it is used; the name alone may be written as a string."""

    name: str
    params: dict[str, Any] = {}

    @model_validator(mode="before")
    @classmethod
    def _from_name(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value


class TextConfig(Section):
    """What reads the captions: a pretrained encoder, frozen, or a small transformer trained together with the U-Net."""

    encoder: str | None = None  # a folder or Hub name of a transformers text encoder; None: one of our own
    dropout: float = Field(0.1, ge=0, le=1)  # share of samples whose caption is replaced by the empty one
    max_length: int | None = Field(None, gt=2, le=512)  # tokens of a prompt; None: the encoder's own, 32 for ours
    folder: str | None = None  # of the cached states of a pretrained encoder; None: captions/ in the output folder
    vocabulary: int = Field(4096, gt=300)  # of our own: most tokens of the byte-pair encoding learnt on the captions
    width: int = Field(256, gt=0)
    layers: int = Field(4, gt=0)
    heads: int = Field(4, gt=0)


JOINT_DROPOUT = 0.1  # of class+text where the config sets none: as much as of each on its own


class ConditionConfig(Section):
    """What the U-Net is told of an image. With class+text each is dropped on its own, and both at once besides."""

    type: Literal["class", "text", "class+text", "none"] = "class"
    dropout: float = Field(0.1, ge=0, le=1)  # share of samples whose class is replaced by the null class
    # class+text: share of samples that lose both, which guidance needs. None: 0.1 where each is dropped on its own, else 0
    joint_dropout: float | None = Field(None, ge=0, le=1)
    text: TextConfig = TextConfig()

    def includes(self, kind: str) -> bool:
        """Whether "class" or "text" is among what the model is conditioned on."""
        return kind in self.type.split("+")

    @property
    def effective_joint_dropout(self) -> float:
        """Share of samples, 0 to 1, that lose class and text together; 0 unless the model is conditioned on both.

        Guidance compares the conditional prediction with the one without any condition. Dropped independently, at 0.1
        each, both are missing from one sample in a hundred, which is too few to learn that prediction from.
        """
        if self.type != "class+text":
            return 0.0
        if self.joint_dropout is None:
            return JOINT_DROPOUT if self.dropout > 0 and self.text.dropout > 0 else 0.0
        return self.joint_dropout


class SampleConfig(Section):
    """How pictures are made while training, and the published pipeline's defaults."""

    # A diffusers class; auto: the schedule's first choice; null: none, for schedules that diffusers has no equal of
    scheduler: str | None = "auto"
    scheduler_config: dict[str, Any] = {}
    sampler: str | None = None  # of latentdiff, where there is no scheduler; null: dpmpp_2m
    steps: int = Field(20, gt=0)
    guidance: float | None = Field(None, ge=0)  # None: 1.5 where training drops the condition, else 1, which is off
    guidance_interval: tuple[float, float] | None = None  # in t, 0 is data and 1 noise: guided only there
    per_class: int = Field(4, gt=0)  # pictures of each class or prompt
    prompts: list[str] = []  # drawn while training on text; none: some of the data's own captions

    @field_validator("guidance_interval")
    @classmethod
    def _ordered(cls, value: tuple[float, float] | None) -> tuple[float, float] | None:
        if value is not None and not 0 <= value[0] <= value[1] <= 1:
            raise ValueError("must be [low, high] with 0 <= low <= high <= 1")
        return value


class EvaluateConfig(Section):
    """A distance measured while training, of images that the averaged weights make as `sample` says."""

    every: int | None = Field(None, gt=0)  # steps; null: never
    images: int = Field(500, ge=2)  # class-balanced, or of held-out captions
    reference: int = Field(10_000, ge=2)  # training images they are held against
    features: str | None = None  # a feature network's folder


class DiffusionConfig(Section):
    """Stage 2: train a denoiser on the latents of a frozen autoencoder."""

    stage: Literal["diffusion"]
    output: str
    seed: int = 0
    autoencoder: str  # stage 1's output, or any diffusers autoencoder: a folder or a Hub name
    normaliser: Literal["stored", "measured"] = "stored"  # measured: on this data, for a first stage trained elsewhere
    data: DataConfig
    cache: CacheConfig = CacheConfig()
    model: ModelConfig
    schedule: NamedConfig = NamedConfig(name="ddpm-linear")
    prediction: Literal["epsilon", "sample", "v_prediction", "score", "flow", "edm"] = "epsilon"
    noise_levels: NamedConfig = NamedConfig(name="uniform")
    weighting: Literal["none", "min_snr", "edm", "likelihood", "uncertainty"] = "none"
    min_snr_gamma: float = Field(5.0, gt=0)
    condition: ConditionConfig = ConditionConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    ema: EmaConfig = EmaConfig()
    train: LoopConfig
    validation_images: int = Field(512, gt=0)
    sample: SampleConfig = SampleConfig()
    evaluate: EvaluateConfig = EvaluateConfig()


class FeaturesConfig(Section):
    """A small classifier whose features serve perceptual losses and offline evaluation."""

    stage: Literal["features"]
    output: str
    name: str
    seed: int = 0
    data: DataConfig
    model: dict[str, Any] = {}
    lr: float = Field(2e-3, gt=0, allow_inf_nan=False)
    train: TrainConfig


class ClassifierConfig(Section):
    """A small classifier of noised latents, for classifier guidance."""

    stage: Literal["classifier"]
    output: str
    seed: int = 0
    autoencoder: str  # this, normaliser, data, cache and schedule: as in the config of the model to be guided
    normaliser: Literal["stored", "measured"] = "stored"
    data: DataConfig
    cache: CacheConfig = CacheConfig()
    model: dict[str, Any] = {}
    schedule: NamedConfig = NamedConfig(name="ddpm-linear")
    noise_levels: NamedConfig = NamedConfig(name="uniform")
    optimizer: OptimizerConfig = OptimizerConfig()
    train: TrainConfig
    validation_images: int = Field(2048, gt=0)


class PairsConfig(Section):
    source: str  # a folder whose pictures have a style and an identity, such as `latentdiff prepare emoji` makes


class JudgeConfig(Section):
    """A small network that finds the nearest real pictures, to judge text-to-image models by retrieval."""

    stage: Literal["judge"]
    output: str
    seed: int = 0
    data: PairsConfig
    model: dict[str, Any] = {}
    lr: float = Field(4e-3, gt=0, allow_inf_nan=False)
    strength: float = Field(1.0, gt=0, le=1)  # of the augmentation
    train: TrainConfig


Config = AutoencoderConfig | DiffusionConfig | FeaturesConfig | ClassifierConfig | JudgeConfig
AnyConfig = Annotated[Config, Field(discriminator="stage")]
STAGES: dict[str, type[Section]] = {
    "autoencoder": AutoencoderConfig,
    "diffusion": DiffusionConfig,
    "features": FeaturesConfig,
    "classifier": ClassifierConfig,
    "judge": JudgeConfig,
}


def load_config(path: str | Path, overrides: list[str] | None = None) -> Config:
    """Read a YAML config and apply `section.key=value` overrides (values are YAML).

    Raises UserError, in one line, for a missing file, bad YAML, an unknown key (with the nearest valid one) or a
    value of the wrong type.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such config file{similar_config(path)}")
    try:
        tree = read_yaml(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not valid YAML: {' '.join(str(error).split())[:300]}") from None
    if not isinstance(tree, dict):
        raise UserError(f"{path}: expected a mapping with a 'stage' key, one of {', '.join(STAGES)}")
    for item in overrides or []:
        override(tree, item)
    config = parse_config(tree, str(path))
    if "fit" in (tree.get("data") or {}) and processes.rank() == 0:
        print(f"warning: {path}: data.fit has a new name, data.framing; the old one still works", file=sys.stderr)
    return config


def parse_data(tree: dict[str, Any], overrides: Sequence[str]) -> DataConfig:
    """A data section given as a dict, with overrides `data.key=value`. UserError in one line for a mistake."""
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
        raise UserError(f"data.{key}: {first['msg'][0].lower()}{first['msg'][1:]}") from None


def keep_split(config: Config, record: dict[str, Any]) -> None:
    """Let a run that goes on keep the held-out images that it began with, where its record is older than data.held_out_rule."""
    data = record.get("data")
    if isinstance(config.data, DataConfig) and isinstance(data, dict) and "held_out_rule" not in data:
        config.data.held_out_rule = "random"


def parse_config(tree: dict[str, Any], where: str = "config") -> Config:
    """Validate a config given as a dict; `where` begins the error message."""
    if not isinstance(tree.get("stage"), str) or tree["stage"] not in STAGES:
        raise UserError(f"{where}: stage: {tree.get('stage')!r} is not one of {', '.join(STAGES)}")
    if isinstance(tree.get("data"), dict) and {"fit", "framing"} <= set(tree["data"]):
        raise UserError(f"{where}: {BOTH_NAMES}")
    try:
        return TypeAdapter(AnyConfig).validate_python(tree)
    except ValidationError as error:
        raise UserError(f"{where}: {explain(error, STAGES[tree['stage']])}") from None
