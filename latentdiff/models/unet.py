"""The U-Net of stage 2: a new one built from the config, or a trained one to continue from, checked against the config."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from latentdiff import prediction as predictions
from latentdiff.config import DiffusionConfig, DiscreteConfig
from latentdiff.errors import UserError
from latentdiff.guidance import check_same_path
from latentdiff.models.autoencoder import checked_arguments, diffusers_class
from latentdiff.models.image_condition import extra_channels, image_condition
from latentdiff.models.loading import load_part, part_class, quiet, weight_files
from latentdiff.models.text_encoder import states_width
from latentdiff.schedules import NoiseSchedule, make_schedule
from latentdiff.utils.json_files import read_json
from latentdiff.utils.shipped import shipped_weights

UNETS = ("UNet2DModel", "UNet2DConditionModel")
# Constructor arguments that follow from the autoencoder and the data, so that a config must not set them
DERIVED = ("in_channels", "out_channels", "sample_size", "num_class_embeds")
DEFAULT_LEVELS = 4  # of diffusers' U-Nets, where block_out_channels is not set
# Beta schedules: the name in diffusers, and in latentdiff
BETAS = {"linear": "ddpm-linear", "scaled_linear": "ddpm-scaled-linear", "squaredcos_cap_v2": "ddpm-cosine"}


@dataclass(frozen=True)
class PretrainedUNet:
    """A trained U-Net on disk, not loaded yet.

    Attributes:
        name: model.pretrained, as the config writes it.
        folder: where its config.json and weights are.
        kind: its diffusers class.
        config: the content of its config.json.
        pipeline: the folder of the pipeline that it is a part of; None for a U-Net alone.
    """

    name: str
    folder: Path
    kind: type
    config: dict[str, Any]
    pipeline: Path | None


def check_unet(config: DiffusionConfig | DiscreteConfig) -> None:
    """UserError, before anything is encoded, for a U-Net that cannot be built or does not fit the rest of the config."""
    if config.model.pretrained is None:
        if config.model.match_classes:
            raise UserError("model.match_classes: has no effect without model.pretrained; leave it out")
        _unet_arguments(config)
        return
    start = find_pretrained(config)
    _check_conditions(config, start)
    if isinstance(config, DiscreteConfig):  # its first and last layer are made anew, and its noise is another
        weight_files(start.folder)
        return
    if config.model.match_classes:
        _recorded_classes(start)
    _check_process(config, start)
    # Where the autoencoder is no folder, its channels are checked once it is loaded
    autoencoder = Path(config.autoencoder)
    places = (autoencoder / part / "config.json" for part in ("autoencoder", "vae", ""))
    file = next((place for place in places if place.is_file()), None)
    if file is not None:
        found = read_json(file)
        _check_channels(config, start, int(found.get("vq_embed_dim") or found.get("latent_channels", 4)))
    weight_files(start.folder)


def check_unet_size(config: DiffusionConfig | DiscreteConfig, latent_shape: tuple[int, int, int], factor: int) -> None:
    """UserError, before anything is encoded, where the U-Net's levels do not divide the latents.

    latent_shape: (c, h, w). factor: image side / latent side, for advice in pixels.
    """
    if config.model.pretrained is None:
        key, levels = "model.config.block_out_channels", config.model.config.get("block_out_channels", (0,) * DEFAULT_LEVELS)
    else:
        key, levels = "model.pretrained", find_pretrained(config).config["block_out_channels"]
    check_sides(latent_shape, len(levels), key, factor)


def make_unet(
    config: DiffusionConfig,
    latent_shape: tuple[int, int, int],
    num_class_embeds: int | None,
    text_width: int | None = None,
    class_names: Sequence[str] = (),
) -> nn.Module:
    """The U-Net that training starts from: a new one, or the one of model.pretrained.

    Args:
        latent_shape: (c, h, w) of the latents.
        num_class_embeds: rows of the class embedding, the null class included; None without classes.
        text_width: width of the text encoder's states; None without text.
        class_names: of the data, for model.match_classes.

    Raises:
        UserError: the config, the latents and the U-Net contradict each other.
    """
    if config.model.pretrained is None:
        return build_unet(config, latent_shape, num_class_embeds, text_width)
    start = find_pretrained(config)
    _check_channels(config, start, latent_shape[0])
    rows = start.config.get("num_class_embeds")
    if rows != num_class_embeds and not config.model.match_classes:
        raise UserError(
            f"model.pretrained {start.name}: its num_class_embeds is {rows}, and data.source {config.data.source} with "
            f"condition.dropout {config.condition.dropout:g} needs {num_class_embeds} (one a class, and the null class)"
        )
    check_sides(latent_shape, len(start.config["block_out_channels"]), "model.pretrained")
    unet = load_part(start.folder, start.kind)
    _widen(unet, latent_shape[0] + extra_channels(config.condition, latent_shape[0]))
    if config.model.match_classes and num_class_embeds is not None:
        _match_classes(unet, start, class_names, num_class_embeds)
    # Its convolutions take any size. The pipeline draws images of the size that is written here
    unet.register_to_config(sample_size=sample_size(latent_shape))
    return unet


def build_unet(
    config: DiffusionConfig | DiscreteConfig,
    latent_shape: tuple[int, int, int],
    num_class_embeds: int | None,
    text_width: int | None = None,
    in_channels: int | None = None,
) -> nn.Module:
    """A new diffusers U-Net over latents [B, c, h, w]. Other arguments and errors as in `make_unet`.

    in_channels: of its input; None: those of the latents, and of a second image.
    """
    cls, arguments = _unet_arguments(config)
    levels = len(arguments.get("block_out_channels", (0,) * DEFAULT_LEVELS))
    check_sides(latent_shape, levels, "model.config.block_out_channels")
    channels = latent_shape[0]
    if in_channels is None:
        in_channels = channels + extra_channels(config.condition, channels)
    arguments |= {"in_channels": in_channels, "out_channels": channels}
    arguments |= {"sample_size": sample_size(latent_shape), "num_class_embeds": num_class_embeds}
    if text_width is not None:
        arguments["cross_attention_dim"] = text_width
    try:
        return cls(**{key: tuple(v) if isinstance(v, list) else v for key, v in arguments.items()})
    except (ValueError, TypeError, AssertionError) as error:
        raise UserError(f"model.config: {cls.__name__} refuses it: {' '.join(str(error).split())}") from None


def sample_size(latent_shape: tuple[int, int, int]) -> int | list[int]:
    """A U-Net's sample_size for latents (c, h, w): a number where h = w, which stock pipelines expect, else [h, w]."""
    _, h, w = latent_shape
    return h if h == w else [h, w]


def find_pretrained(config: DiffusionConfig | DiscreteConfig) -> PretrainedUNet:
    """The U-Net that model.pretrained names: a pipeline's folder (its unet/), or a U-Net's own folder.

    Raises:
        UserError: there is no U-Net, or it takes inputs that training here does not give it.
    """
    name = str(config.model.pretrained)
    if config.model.type is not None or config.model.config:
        raise UserError(f"model.type and model.config: leave them out, model.pretrained {name} says what the U-Net is")
    root = Path(name)
    if not root.exists() and root.parts[:1] == ("weights",):
        root = shipped_weights(root) or root
    folder = root / "unet" if (root / "unet" / "config.json").is_file() else root
    file = folder / "config.json"
    if not file.is_file():
        raise UserError(f"model.pretrained {name}: no U-Net there; give a pipeline's folder (with unet/) or a U-Net's")
    found = read_json(file)
    kind = diffusers_class(str(found.get("_class_name")), UNETS, f"model.pretrained: {file}: _class_name")
    for key, supported in (("class_embed_type", (None,)), ("addition_embed_type", (None, "text"))):
        if found.get(key) not in supported:
            raise UserError(f"model.pretrained {name}: its {key} is {found[key]}, which training here does not support")
    pipeline = folder.parent if folder.name == "unet" and (folder.parent / "model_index.json").is_file() else None
    return PretrainedUNet(name, folder, kind, found, pipeline)


def _unet_arguments(config: DiffusionConfig | DiscreteConfig) -> tuple[type, dict[str, Any]]:
    """The class of a new U-Net and its constructor arguments from the config, checked."""
    usual = UNETS[0] if isinstance(config, DiscreteConfig) else ""
    cls = diffusers_class(config.model.type or usual, UNETS, "model.type")
    text = config.condition.includes("text")
    for key in (*DERIVED, *(["cross_attention_dim"] if text else [])):
        if key in config.model.config:
            raise UserError(f"model.config.{key}: leave it out, it follows from the autoencoder and the data")
    arguments = dict(checked_arguments(cls, config.model.config, "model.config"))
    if text and cls.__name__ != "UNet2DConditionModel":
        raise UserError(f"model.type: {cls.__name__} cannot attend to text; set model.type=UNet2DConditionModel")
    if cls.__name__ == "UNet2DConditionModel" and not text:  # classes are added to the time embedding
        arguments.setdefault("mid_block_type", "UNetMidBlock2D")
        blocks = [*arguments.get("down_block_types", ["CrossAttn"]), arguments["mid_block_type"] or ""]
        blocks += arguments.get("up_block_types", ["CrossAttn"])
        if any("CrossAttn" in block for block in blocks):
            raise UserError("model.config: there is no text to cross-attend to; use DownBlock2D or AttnDownBlock2D")
    return cls, arguments


def check_sides(latent_shape: tuple[int, int, int], levels: int, key: str, factor: int | None = None) -> None:
    """UserError unless h and w of (c, h, w) can be halved between all levels. factor: image side / latent side, if known."""
    _, h, w = latent_shape
    divisor = 2 ** (levels - 1)
    if h % divisor == 0 and w % divisor == 0:
        return
    advice = "use fewer levels, or another data.size"
    if factor is not None:
        least = factor * divisor
        sides = [-(-side // divisor) * least for side in (h, w)]
        advice = (
            f"use fewer levels, or set data.size={sides} with data.framing=crop, letterbox or resize, or, for images of one "
            f"size, data.multiple_of={least} with data.framing=pad; latents made before are of another size: name another "
            "cache.folder"
        )
    raise UserError(f"{key}: {levels} levels need latents divisible by {divisor}, they are {h}x{w}; {advice}")


def _check_conditions(config: DiffusionConfig | DiscreteConfig, start: PretrainedUNet) -> None:
    """UserError where the U-Net takes other conditions than the config gives, or text states of another width."""
    blocks = [*start.config.get("down_block_types", ()), *start.config.get("up_block_types", ())]
    blocks.append(start.config.get("mid_block_type") or "")
    takes_text = any("CrossAttn" in block for block in blocks)
    takes_class = start.config.get("num_class_embeds") is not None
    for kind, takes in (("text", takes_text), ("class", takes_class)):
        if takes != config.condition.includes(kind):
            does = "takes" if takes else "does not take"
            raise UserError(
                f"condition.type: {config.condition.type}, but the U-Net of model.pretrained {start.name} {does} {kind}"
            )
    _check_image(config, start)
    if not takes_text:
        return
    text = config.condition.text
    width = text.width if text.encoder is None else states_width(text.encoder)
    expected = start.config.get("cross_attention_dim", 1280)
    if any(dim != width for dim in (expected if isinstance(expected, list) else [expected])):
        key = "condition.text.width" if text.encoder is None else f"condition.text.encoder {text.encoder}"
        raise UserError(
            f"{key}: gives states of width {width}, but the U-Net of model.pretrained {start.name} has "
            f"cross_attention_dim {expected}"
        )


def _check_image(config: DiffusionConfig | DiscreteConfig, start: PretrainedUNet) -> None:
    """UserError where the U-Net's pipeline records another second image than the config, or a LoRA would have to learn one."""
    condition = image_condition(config.condition)
    index = {} if start.pipeline is None else read_json(start.pipeline / "model_index.json")
    recorded = index.get("image_condition")
    if isinstance(recorded, dict):
        expected = (None, None) if condition is None else (condition.kind, condition.factor)
        if (recorded.get("kind"), recorded.get("factor")) != expected:
            raise UserError(
                f"condition.image: the U-Net of model.pretrained {start.name} is given an image of kind "
                f"{recorded.get('kind')}, factor {recorded.get('factor')}; set condition.type and condition.image so"
            )
    elif condition is not None and config.model.lora is not None:
        raise UserError(
            f"model.lora: the U-Net of model.pretrained {start.name} is given no second image, and low-rank changes add no "
            "input channels for one; leave model.lora out"
        )


def _recorded_classes(start: PretrainedUNet) -> tuple[list[str], int | None]:
    """(class names in the order of their rows, the null class's row or None) of the pipeline that a U-Net is a part of."""
    index = {} if start.pipeline is None else read_json(start.pipeline / "model_index.json")
    names = index.get("class_names") or {}
    if start.config.get("num_class_embeds") is None or not isinstance(names, dict) or not names:
        raise UserError(f"model.match_classes: model.pretrained {start.name} names no classes; leave it out")
    return [str(names[key]) for key in sorted(names, key=int)], index.get("null_class")


@torch.no_grad()
def _match_classes(unet: Any, start: PretrainedUNet, class_names: Sequence[str], rows: int) -> None:
    """Give a U-Net a class embedding of `rows` rows for other classes, in place.

    A class that the U-Net knows by its name keeps its row, and so does the null class, which comes last. New classes, and a
    new null class, start from the old null class, or where there is none from the mean of all rows.

    class_names: of the data; the classes beyond them are new.
    """
    known, null = _recorded_classes(start)
    old = unet.class_embedding.weight
    fresh = old.mean(0) if null is None else old[null]
    new = torch.nn.Embedding(rows, old.shape[1])
    new.weight.copy_(fresh.expand_as(new.weight))
    for row, name in enumerate(class_names):
        if name in known:
            new.weight[row] = old[known.index(name)]
    unet.class_embedding = new
    unet.register_to_config(num_class_embeds=rows)


def _check_channels(config: DiffusionConfig, start: PretrainedUNet, channels: int) -> None:
    # A U-Net without a second image can be given one: its new input channels begin with weights of zero
    extra = extra_channels(config.condition, channels)
    taken = {"in_channels": {channels, channels + extra}, "out_channels": {channels}}
    for key in taken:
        if start.config.get(key) not in taken[key]:
            raise UserError(
                f"autoencoder {config.autoencoder}: gives latents of {channels} channels, but the U-Net of "
                f"model.pretrained {start.name} has {key} {start.config.get(key)}"
            )


@torch.no_grad()
def _widen(unet: Any, channels: int) -> None:
    """Give a U-Net more input channels, in place, after those that it has. Their weights are 0: it computes the same."""
    old = unet.conv_in
    if old.in_channels == channels:
        return
    new = torch.nn.Conv2d(channels, old.out_channels, old.kernel_size, padding=old.padding)
    new.weight.zero_()
    new.weight[:, : old.in_channels] = old.weight
    new.bias.copy_(old.bias)
    unet.conv_in = new
    unet.register_to_config(in_channels=channels)


def _check_process(config: DiffusionConfig, start: PretrainedUNet) -> None:
    """UserError where the U-Net's pipeline says that it was trained on other noise, or to predict something else."""
    schedule = make_schedule(config.schedule.name, **config.schedule.params)
    recorded = recorded_process(start)
    if recorded is None:
        return
    other, prediction, name = recorded
    if prediction != config.prediction:
        raise UserError(
            f"prediction: {config.prediction}, but the U-Net of model.pretrained {start.name} predicts {prediction}"
        )
    if not _same_noise(schedule, other):
        current = _with_parameters(config.schedule.name, config.schedule.params)
        raise UserError(f"schedule: {current}, but the U-Net of model.pretrained {start.name} was trained on {name}")


def _same_noise(schedule: NoiseSchedule, other: NoiseSchedule) -> bool:
    """Whether two schedules have the same noise at the same timestep."""
    try:
        check_same_path(schedule, other, "")
        return schedule.num_steps == other.num_steps
    except UserError:
        return False


def recorded_process(start: PretrainedUNet) -> tuple[NoiseSchedule, str, str] | None:
    """(schedule, prediction, the schedule's name) that the U-Net's pipeline records; None for a U-Net alone."""
    if start.pipeline is None:
        return None
    index = read_json(start.pipeline / "model_index.json")
    if index.get("schedule") and index.get("prediction"):
        parameters = dict(index["schedule"])
        schedule = make_schedule(**parameters)
        return schedule, index["prediction"], _with_parameters(parameters.pop("name"), parameters)
    scheduler = _scheduler(start.pipeline)
    return NoiseSchedule.from_scheduler(scheduler), predictions.from_scheduler(scheduler), _scheduler_name(scheduler)


def recorded_noise(pipeline: Path) -> tuple[str, dict[str, Any], str]:
    """(name of the noise schedule, its parameters, the prediction) of a pipeline's folder, as a config writes them.

    Raises:
        UserError: no schedule of a config is that of the pipeline's scheduler.
    """
    index = read_json(pipeline / "model_index.json")
    if index.get("schedule") and index.get("prediction"):
        parameters = dict(index["schedule"])
        return str(parameters.pop("name")), parameters, str(index["prediction"])
    scheduler = _scheduler(pipeline)
    named = _named(scheduler)
    if named is None or not _same_noise(make_schedule(named[0], **named[1]), NoiseSchedule.from_scheduler(scheduler)):
        raise UserError(
            f"{pipeline / 'scheduler'}: {_scheduler_name(scheduler)} has noise that no schedule of a config gives; valid are "
            f"the beta_schedules {', '.join(BETAS)}, flow matching and EDM's"
        )
    return *named, predictions.from_scheduler(scheduler)


def _scheduler(pipeline: Path) -> Any:
    """The diffusers scheduler in a pipeline's folder."""
    kind: Any = part_class(
        read_json(pipeline / "model_index.json").get("scheduler"), f"{pipeline / 'model_index.json'}: scheduler"
    )
    read_json(pipeline / "scheduler" / "scheduler_config.json")
    with quiet():
        return kind.from_pretrained(str(pipeline / "scheduler"))


def _named(scheduler: Any) -> tuple[str, dict[str, Any]] | None:
    """(name, parameters) of the noise of a diffusers scheduler in a config; None where no name gives it."""
    options = scheduler.config
    if "sigma_data" in options:
        return "edm", {"sigma_min": options["sigma_min"], "sigma_max": options["sigma_max"]}
    if options.get("use_flow_sigmas") or ("beta_start" not in options and "shift" in options):
        return "flow", {}
    if options.get("trained_betas") or options.get("beta_schedule") not in BETAS:
        return None
    name, parameters = BETAS[options["beta_schedule"]], {}
    if name != "ddpm-cosine":
        parameters = {"beta_start": options["beta_start"], "beta_end": options["beta_end"]}
    if options["num_train_timesteps"] != 1000:
        parameters["num_steps"] = options["num_train_timesteps"]
    if options.get("rescale_betas_zero_snr"):
        parameters["zero_terminal_snr"] = True
    return name, parameters


def _scheduler_name(scheduler: Any) -> str:
    """The noise of a diffusers scheduler, named as a config would name it."""
    named = _named(scheduler)
    if named is not None and named[0] in BETAS.values():
        return _with_parameters(*named)
    return type(scheduler).__name__ + (" with its own trained_betas" if scheduler.config.get("trained_betas") else "")


def _with_parameters(name: str, parameters: dict[str, Any]) -> str:
    return f"{name} ({', '.join(f'{key} {value:g}' for key, value in parameters.items())})" if parameters else name
