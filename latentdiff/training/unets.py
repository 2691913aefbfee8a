"""The U-Net of stage 2: a fresh one as the config describes it, or a trained one to go on from, held against the config."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from latentdiff import prediction as predictions
from latentdiff.config import DiffusionConfig
from latentdiff.errors import UserError
from latentdiff.guidance import check_same_path
from latentdiff.models.autoencoder import checked_arguments, diffusers_class
from latentdiff.models.codec import LatentCodec
from latentdiff.models.loading import load_part, part_class, quiet, read_json, weight_files
from latentdiff.models.text_encoder import states_width
from latentdiff.schedules import NoiseSchedule, make_schedule
from latentdiff.training import conditioning
from latentdiff.training.images import Images
from latentdiff.training.latents import latent_shape

UNETS = ("UNet2DModel", "UNet2DConditionModel")
# Of the U-Net: never typed twice
DERIVED = ("in_channels", "out_channels", "sample_size", "num_class_embeds")
BETAS = {"linear": "ddpm-linear", "scaled_linear": "ddpm-scaled-linear", "squaredcos_cap_v2": "ddpm-cosine"}


def check_unet(config: DiffusionConfig) -> None:
    """UserError, before anything is encoded, for a U-Net that cannot be made or does not fit the rest of the config."""
    if config.model.pretrained is None:
        _unet_arguments(config)
        return
    start = find_start(config)
    _check_conditions(config, start)
    _check_process(config, start)
    found = _autoencoder_config(config.autoencoder)
    if found is not None:  # else it is looked at once it is loaded
        _check_channels(config, start, int(found.get("vq_embed_dim") or found.get("latent_channels", 4)))
    weight_files(start.folder)


def check_latents(config: DiffusionConfig, codec: LatentCodec, images: Images) -> None:
    """UserError, before anything is encoded, where the U-Net's levels do not divide the latents that there will be."""
    start = None if config.model.pretrained is None else find_start(config)
    widths = config.model.config.get("block_out_channels", (0,) * 4) if start is None else start.config["block_out_channels"]
    key = "model.config.block_out_channels" if start is None else "model.pretrained"
    _check_sides(latent_shape(codec, images), len(widths), key, codec.factor)


def make_unet(
    config: DiffusionConfig, latent_shape: tuple[int, int, int], num_class_embeds: int | None, text_width: int | None = None
) -> nn.Module:
    """The U-Net that training begins with, over latents [c, h, w]: fresh, or from model.pretrained."""
    if config.model.pretrained is None:
        return build_unet(config, latent_shape, num_class_embeds, text_width)
    start = find_start(config)
    _check_channels(config, start, latent_shape[0])
    rows = start.config.get("num_class_embeds")
    if rows != num_class_embeds:
        raise UserError(
            f"model.pretrained {start.where}: its num_class_embeds is {rows}, and data.source {config.data.source} with "
            f"condition.dropout {config.condition.dropout:g} needs {num_class_embeds} (one a class, and the null class)"
        )
    _check_sides(latent_shape, len(start.config["block_out_channels"]), "model.pretrained")
    unet = load_part(start.folder, start.kind)
    unet.register_to_config(sample_size=sample_size(latent_shape))  # convolutions take any; the pipeline draws this one
    return unet


def _unet_arguments(config: DiffusionConfig) -> tuple[type, dict[str, Any]]:
    """The U-Net's class and its arguments as the config gives them, checked."""
    cls = diffusers_class(config.model.type or "", UNETS, "model.type")
    text = conditioning.takes(config.condition, "text")
    for key in (*DERIVED, *(["cross_attention_dim"] if text else [])):
        if key in config.model.config:
            raise UserError(f"model.config.{key}: leave it out, it follows from the autoencoder and the data")
    arguments = dict(checked_arguments(cls, config.model.config, "model.config"))
    if text and cls.__name__ != "UNet2DConditionModel":
        raise UserError(f"model.type: {cls.__name__} cannot attend to text; set model.type=UNet2DConditionModel")
    if cls.__name__ == "UNet2DConditionModel" and not text:  # classes come in with the time embedding
        arguments.setdefault("mid_block_type", "UNetMidBlock2D")
        blocks = [*arguments.get("down_block_types", ["CrossAttn"]), arguments["mid_block_type"] or ""]
        blocks += arguments.get("up_block_types", ["CrossAttn"])
        if any("CrossAttn" in block for block in blocks):
            raise UserError("model.config: there is no text to cross-attend to; use DownBlock2D or AttnDownBlock2D")
    return cls, arguments


def build_unet(
    config: DiffusionConfig, latent_shape: tuple[int, int, int], num_class_embeds: int | None, text_width: int | None = None
) -> nn.Module:
    """A fresh diffusers U-Net over latents [B, c, h, w]; channels, size and classes come from the data, never the config."""
    cls, arguments = _unet_arguments(config)
    c, size = latent_shape[0], sample_size(latent_shape)
    _check_sides(latent_shape, len(arguments.get("block_out_channels", (0,) * 4)), "model.config.block_out_channels")
    arguments |= {"in_channels": c, "out_channels": c, "sample_size": size, "num_class_embeds": num_class_embeds}
    if text_width is not None:
        arguments["cross_attention_dim"] = text_width
    try:
        return cls(**{key: tuple(v) if isinstance(v, list) else v for key, v in arguments.items()})
    except (ValueError, TypeError, AssertionError) as error:
        raise UserError(f"model.config: {cls.__name__} refuses it: {' '.join(str(error).split())}") from None


def sample_size(latent_shape: tuple[int, int, int]) -> int | list[int]:
    """A U-Net's sample_size for latents [c, h, w]: a number where h = w, as stock pipelines expect one, else [h, w]."""
    _, h, w = latent_shape
    return h if h == w else [h, w]


def _check_sides(latent_shape: tuple[int, int, int], levels: int, key: str, factor: int | None = None) -> None:
    """factor: image sides over latent sides, where it is known, for advice in numbers."""
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


@dataclass(frozen=True)
class Start:
    """A trained U-Net on disk. where: as the config names it.  pipeline: the folder it is a part of, if it is one's."""

    where: str
    folder: Path
    kind: type
    config: dict[str, Any]
    pipeline: Path | None


def find_start(config: DiffusionConfig) -> Start:
    """What model.pretrained names: a pipeline's folder (its unet/), or a U-Net's. UserError where it is neither."""
    where = str(config.model.pretrained)
    if config.model.type is not None or config.model.config:
        raise UserError(f"model.type and model.config: leave them out, model.pretrained {where} says what the U-Net is")
    root = Path(where)
    folder = root / "unet" if (root / "unet" / "config.json").is_file() else root
    if not (folder / "config.json").is_file():
        raise UserError(f"model.pretrained {where}: no U-Net there; give a pipeline's folder (with unet/) or a U-Net's")
    found = read_json(folder / "config.json")
    kind = diffusers_class(str(found.get("_class_name")), UNETS, f"model.pretrained: {folder / 'config.json'}: _class_name")
    for key, known in (("class_embed_type", (None,)), ("addition_embed_type", (None, "text"))):
        if found.get(key) not in known:
            raise UserError(f"model.pretrained {where}: its {key} is {found[key]}, which training here cannot tell it")
    pipeline = folder.parent if folder.name == "unet" and (folder.parent / "model_index.json").is_file() else None
    return Start(where, folder, kind, found, pipeline)


def _check_conditions(config: DiffusionConfig, start: Start) -> None:
    """UserError where the U-Net takes other conditions than the config gives, or states of another width."""
    kind, text = config.condition.type, config.condition.text
    blocks = [*start.config.get("down_block_types", ()), *start.config.get("up_block_types", ())]
    blocks.append(start.config.get("mid_block_type") or "")
    attends, classes = any("CrossAttn" in block for block in blocks), start.config.get("num_class_embeds") is not None
    for name, has in (("text", attends), ("class", classes)):
        if has != conditioning.takes(config.condition, name):
            takes = "is told" if has else "cannot be told"
            raise UserError(f"condition.type: {kind}, but the U-Net of model.pretrained {start.where} {takes} {name}")
    if not attends:
        return
    width = text.width if text.encoder is None else states_width(text.encoder)
    theirs = start.config.get("cross_attention_dim", 1280)
    if any(dim != width for dim in (theirs if isinstance(theirs, list) else [theirs])):
        key = "condition.text.width" if text.encoder is None else f"condition.text.encoder {text.encoder}"
        raise UserError(
            f"{key}: gives states of width {width}, but the U-Net of model.pretrained {start.where} has "
            f"cross_attention_dim {theirs}"
        )


def _check_channels(config: DiffusionConfig, start: Start, channels: int) -> None:
    for key in ("in_channels", "out_channels"):
        if start.config.get(key) != channels:
            raise UserError(
                f"autoencoder {config.autoencoder}: gives latents of {channels} channels, but the U-Net of "
                f"model.pretrained {start.where} has {key} {start.config.get(key)}"
            )


def _check_process(config: DiffusionConfig, start: Start) -> None:
    """UserError where the folder says the U-Net was trained on other noise, or to predict something else."""
    schedule = make_schedule(config.schedule.name, **config.schedule.params)
    stated = _stated_process(start)
    if stated is None:
        return
    theirs, prediction, name = stated
    if prediction != config.prediction:
        raise UserError(
            f"prediction: {config.prediction}, but the U-Net of model.pretrained {start.where} predicts {prediction}"
        )
    try:
        check_same_path(schedule, theirs, "")
        same = schedule.num_steps == theirs.num_steps
    except UserError:
        same = False
    if not same:
        ours = _called(config.schedule.name, config.schedule.params)
        raise UserError(f"schedule: {ours}, but the U-Net of model.pretrained {start.where} was trained on {name}")


def _stated_process(start: Start) -> tuple[NoiseSchedule, str, str] | None:
    """The schedule, prediction and the schedule's name that the U-Net's pipeline states; None for a U-Net alone."""
    if start.pipeline is None:
        return None
    index = read_json(start.pipeline / "model_index.json")
    if index.get("schedule") and index.get("prediction"):
        named = dict(index["schedule"])
        return make_schedule(**named), index["prediction"], _called(named.pop("name"), named)
    kind: Any = part_class(index.get("scheduler"), f"{start.pipeline / 'model_index.json'}: scheduler")
    read_json(start.pipeline / "scheduler" / "scheduler_config.json")
    with quiet():
        scheduler = kind.from_pretrained(str(start.pipeline / "scheduler"))
    return NoiseSchedule.from_scheduler(scheduler), predictions.from_scheduler(scheduler), _scheduler_name(scheduler)


def _scheduler_name(scheduler: Any) -> str:
    """A diffusers scheduler's noise as a config would name it."""
    given = scheduler.config
    if given.get("trained_betas") or given.get("beta_schedule") not in BETAS:
        return type(scheduler).__name__ + (" with its own trained_betas" if given.get("trained_betas") else "")
    name = BETAS[given["beta_schedule"]]
    used = {} if name == "ddpm-cosine" else {"beta_start": given["beta_start"], "beta_end": given["beta_end"]}
    used |= {"num_steps": given["num_train_timesteps"]} if given["num_train_timesteps"] != 1000 else {}
    return _called(name, used | ({"zero_terminal_snr": True} if given.get("rescale_betas_zero_snr") else {}))


def _called(name: str, params: dict[str, Any]) -> str:
    return f"{name} ({', '.join(f'{key} {value:g}' for key, value in params.items())})" if params else name


def _autoencoder_config(where: str) -> dict[str, Any] | None:
    """The config.json of an autoencoder that is a folder, as `load_autoencoder` finds it."""
    places = (Path(where) / part / "config.json" for part in ("autoencoder", "vae", ""))
    return next((read_json(place) for place in places if place.is_file()), None)
