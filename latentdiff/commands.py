"""The Python functions behind `latentdiff encode`, `reconstruct` and `likelihood`; others have their own module."""

from __future__ import annotations

import json
import math
import struct
import sys
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, Any
from zipfile import BadZipFile

import numpy as np
import torch

from latentdiff import signals
from latentdiff.errors import UserError, printable

if TYPE_CHECKING:
    from latentdiff.data.images import Columns
    from latentdiff.data.preprocess import Preprocess
    from latentdiff.evaluation.features import FeatureSpace

# What numpy and zipfile raise on damaged archives; RuntimeError stands for encrypted ones and unknown methods
UNPACKING_ERRORS = (OSError, ValueError, KeyError, EOFError, BadZipFile, RuntimeError, SyntaxError, TypeError, OverflowError,
                    MemoryError, struct.error, zlib.error)  # fmt: skip
DEFAULT_FEATURES = "weights/fashion-mnist-features"


def encode(config_path: str | Path, overrides: list[str] | None = None, progress: bool = True, part: str | None = None) -> Path:
    """Build the latent cache of a diffusion config, or finish one that was interrupted; returns its folder.

    part: "K/N", K from 1 to N, builds every N-th shard alone; the job that finds none missing finishes the cache.
    A signal ends it after a shard; the same call goes on. UserError where another job encodes there, or this part of it.
    """
    from latentdiff.checkpoints import resolve_config
    from latentdiff.config import DiffusionConfig, load_config
    from latentdiff.training import notices, run
    from latentdiff.training.latents import cache_folder, cache_size, encode_part, open_inputs, prepare_latents, progress_bar
    from latentdiff.training.unets import check_latents, check_unet

    config = load_config(resolve_config(config_path), overrides)
    if not isinstance(config, DiffusionConfig):
        raise UserError(f"{config_path}: stage is {config.stage}; encode takes a config whose stage is diffusion")
    job = None if part is None else _part(part)
    check_unet(config)
    accelerator = run.start_accelerator(config.train)
    opened = open_inputs(config, accelerator.device)
    check_latents(config, *opened)  # latents that the U-Net cannot take are not worth the time
    lines = [*notices.warned(notices.first_stage_warnings(config.autoencoder)), cache_size(config, *opened)]
    # A frozen encoder is never cast, whatever training's precision
    announce = run.announcement(accelerator, config.train, "float32", "encode", lines)
    if job is not None:
        with signals.watched(signals.again), progress_bar("encoding", progress, announce) as report:
            missing = encode_part(config, job[0] - 1, job[1], opened, report)
        done = f"{missing} shards of other parts are missing" if missing else "the cache is finished"
        print(f"part {part}: {done}", file=sys.stderr)
        return cache_folder(config)
    shown = progress and accelerator.is_main_process
    with signals.watched(signals.again), progress_bar("encoding", shown, announce) as report:
        latents = prepare_latents(config, accelerator, report, opened)
    latents.images.say()
    return cache_folder(config)


def _part(text: str) -> tuple[int, int]:
    """(K, N) of "K/N"."""
    number, slash, count = text.partition("/")
    if not (slash and number.isdecimal() and count.isdecimal() and 1 <= int(number) <= int(count)):
        raise UserError(f"--part {text}: write it as K/N with K from 1 to N, such as 1/4")
    return int(number), int(count)


def reconstruct(
    model: str | Path, images: list[str | Path], out: str | Path = "reconstructions.png", own_size: bool = False
) -> dict[str, Any]:
    """Images beside what the model's first stage makes of them, as a PNG; returns PSNR (dB) and SSIM per image.

    Images are read and brought to the model's size as in its training (`prepared` says what that did to each); where
    training took images of one size alone, others are cropped to it. own_size: at the file's own size instead, cropped at
    the bottom and right to what the autoencoder's factor divides; also where nothing says how the model was trained.
    model: a checkpoint, a run of stage 1 or an autoencoder's folder.
    UserError for an image that cannot be read, naming it.
    """
    from latentdiff.autoencoders.build import load_autoencoder
    from latentdiff.autoencoders.codec import LatentCodec
    from latentdiff.autoencoders.report import psnr, ssim
    from latentdiff.checkpoints import resolve_model
    from latentdiff.data.preprocess import to_uint8
    from latentdiff.pictures import save_png, tile
    from latentdiff.writing import check_out

    path = check_out(out, len(images))
    if path.suffix != ".png":
        raise UserError(f"--out {out}: must end in .png")
    folder = resolve_model(model)
    codec = LatentCodec(load_autoencoder(str(folder)))
    data = None if own_size else _data_of(folder)
    rule = None if data is None else _preprocess(data, codec)
    rows, scores = [], []
    for name in images:
        x, content, prepared = _prepare_image(Path(name), rule, codec)  # x: [1, C, H, W]
        y = codec.reconstruct(x).clamp(-1, 1)
        top, left, height, width = content
        x, y = (image[..., top : top + height, left : left + width] for image in (x, y))
        rows.append(np.concatenate([to_uint8(x)[0], to_uint8(y)[0]], axis=1))
        score = ssim(y, x)[0].item() if min(height, width) >= 11 else None
        scores.append({"image": str(name), "prepared": prepared, "psnr_db": psnr(y, x)[0].item(), "ssim": score})
    save_png(tile([[row] for row in rows], scale=1), path)
    return {"out": str(path), "images": scores}


def _prepare_image(
    file: Path, rule: Preprocess | None, codec: Any
) -> tuple[torch.Tensor, tuple[int, int, int, int], dict[str, Any]]:
    """(float32 [1, C, H, W] in [-1, 1], (top, left, height, width) of the content, what was done) of one image file."""
    from dataclasses import replace

    from latentdiff.data.files import DECODING_ERRORS, WHITE, decode, reason_of
    from latentdiff.data.framing import framing_facts
    from latentdiff.data.images import ImageSource
    from latentdiff.data.preprocess import SCALED, Preprocess, to_uint8

    try:
        array = decode(file, codec.image_channels, rule.background if rule else WHITE)
    except DECODING_ERRORS as error:
        raise UserError(f"{file}: cannot be read as an image ({reason_of(file, error)})") from None
    facts: dict[str, Any] = {"file_size": list(array.shape[:2])}
    if rule is None or rule.size is None:
        height, width = (side // codec.factor * codec.factor for side in array.shape[:2])
        if min(height, width) == 0:
            raise UserError(f"{file}: smaller than {codec.factor}x{codec.factor}, the least this autoencoder takes")
        array = array[:height, :width]
        rule, done = Preprocess((height, width), codec.image_channels), {"size": [height, width], "framing": "own size"}
    else:
        size = rule.content[2:]
        scaling = rule if rule.framing in SCALED else Preprocess(size, codec.image_channels, "crop")
        if array.shape[:2] == size:
            done = {"size": list(size), "framing": rule.framing}
        else:
            image = ImageSource(str(file), codec.image_channels, [], None, None, np.array([array.shape[:2]]))
            done = framing_facts(image, scaling)
        if rule.framing not in SCALED:
            array = to_uint8(scaling(array)[None])[0]
        rule = replace(rule, channels=codec.image_channels)
    return rule(array)[None], rule.content, facts | done


def _data_of(folder: Path) -> dict[str, Any] | None:
    """The data section that a model was trained with: of a checkpoint, of a run, or of the run that an autoencoder lies in."""
    from latentdiff.checkpoints import META, read_meta
    from latentdiff.folders import read_json

    if (folder / META).is_file():
        config = read_meta(folder).get("config")
    else:
        records = [folder / "run.json", *([folder.parent / "run.json"] if folder.name == "autoencoder" else [])]
        config = next((read_json(record) for record in records if record.is_file()), None)
    data = config.get("data") if isinstance(config, dict) else None
    return data if isinstance(data, dict) and "size" in data else None


def likelihood(
    model: str | Path,
    data: str,
    num_images: int = 200,
    probes: int = 1,
    seed: int = 0,
    rtol: float = 1e-2,
    split: str = "test",
    unconditional: bool = False,
    batch_size: int = 50,
) -> dict[str, Any]:
    """A bound on the bits per dimension of a data set's pixels, through both stages: total, terms, errors, protocol.

    The terms, and what in them is exact: `latentdiff.evaluation.bits`. Images are held against the model under their own
    class, or under the null class if unconditional; of a model that reads text, under the empty prompt. split: test (or
    what training held out), or train.
    rtol: of the probability-flow ODE, relative and absolute.
    """
    from tqdm import tqdm

    from latentdiff.autoencoders.codec import LatentCodec
    from latentdiff.checkpoints import load, resolve_model
    from latentdiff.denoiser import Denoiser
    from latentdiff.evaluation.bits import pixel_bits
    from latentdiff.evaluation.report import reference_sets
    from latentdiff.guidance import ClassifierFree

    if split not in ("test", "train"):
        raise UserError(f"--split {split}: valid are test and train")
    if not 0 < rtol < math.inf or min(num_images, probes, batch_size) < 1:
        raise UserError("likelihood: --rtol must be finite and above 0, --num-images, --probes and --batch-size at least 1")
    pipeline = load(resolve_model(model))
    codec = LatentCodec(pipeline.vae)
    train, test = reference_sets(data, *data_rule(resolve_model(model), codec))
    images = test if split == "test" else train
    conditional = pipeline.num_classes > 0 and not unconditional
    if conditional:
        check_classes(pipeline, images, data, "; with --unconditional classes are not looked at")
    null = pipeline.config.null_class
    if unconditional and pipeline.num_classes > 0 and null is None:
        raise UserError("--unconditional: this model was trained without class dropout and has no null class")
    check_likelihood(pipeline, str(model))
    denoiser = Denoiser.from_pipeline(pipeline)

    def denoiser_for(labels: torch.Tensor | None, count: int) -> Any:
        rows = labels.tolist() if conditional and labels is not None else [null] * count
        return ClassifierFree(denoiser, pipeline.conditioning([None] * count, rows), {}, 1.0)

    with tqdm(total=num_images, unit="image", desc="likelihood", delay=0.5) as bar:
        report = pixel_bits(
            codec, denoiser_for, train, images, num_images, probes, seed, rtol, batch_size=batch_size, progress=bar.update
        )
    stated = {"model": str(model), "split": split, "density": "log p(x | class)" if conditional else "log p(x)"}
    return {**report, "protocol": {**stated, **report["protocol"]}}


def check_likelihood(pipeline: Any, model: str) -> None:
    """UserError for a model that has no likelihood of images without prompts."""
    if pipeline.text_encoder is not None and pipeline.config.null_prompt is None:
        raise UserError(f"{model}: was trained without text dropout, so it has no likelihood without prompts")


def open_features(what: str | Path) -> FeatureSpace:
    """The feature space that --features names: by path, one that ships, or a vision encoder's Hub name; see `spaces`."""
    from latentdiff.checkpoints import resolve_model
    from latentdiff.evaluation.spaces import HUB_NAME, open_space

    on_hub = not Path(what).exists() and HUB_NAME.fullmatch(str(what)) and Path(what).parts[0] != "weights"
    return open_space(what if on_hub else resolve_model(what, "--features", "model.safetensors"))


def check_classes(pipeline: Any, images: Any, data: str, advice: str = "") -> None:
    """UserError where a data set's classes are not those of a model that has some, or its images have no labels."""
    theirs, names, count = list(images.class_names), pipeline.class_names, pipeline.num_classes
    if count and (images.labels is None or len(theirs) != count or (names and names != theirs)):
        said = ", ".join(theirs) if images.labels is not None else images.source.unlabelled or "its images have none"
        raise UserError(f"--data {data}: its classes ({said}) are not the model's ({', '.join(names) or count}){advice}")


def data_rule(folder: Path, codec: Any) -> tuple[Preprocess, float, Columns, bool, str, float]:
    """How a checkpoint's images were read, from its latentdiff.json: the arguments of `reference_sets` after the data.

    They are preprocessing, held-out share, columns, streaming, held-out rule and the share of unreadable images allowed.
    """
    from latentdiff.checkpoints import META, read_meta
    from latentdiff.data.images import Columns

    meta = read_meta(folder) if (folder / META).is_file() else {}
    if "config" not in meta:
        raise UserError(f"{folder}: was not trained here, so nothing says how images are prepared for it")
    data = meta["config"]["data"]
    columns = (data.get(f"{name}_column") for name in ("image", "label", "text"))
    split = data.get("held_out_rule", "random")  # the only one that earlier versions had
    allowed = data.get("max_bad_share", 0.01)
    return _preprocess(data, codec), data["held_out"], Columns(*columns), data.get("streaming", False), split, allowed


def _preprocess(data: dict[str, Any], codec: Any) -> Preprocess:
    """The preprocessing of a recorded data section, not resolved."""
    from latentdiff.data.files import WHITE
    from latentdiff.data.preprocess import Preprocess

    size = data["size"] and tuple(data["size"])
    framing = data["framing"] if "framing" in data else data["fit"]  # its name in earlier versions
    background = tuple(data.get("background", WHITE))
    return Preprocess(size, data["channels"], framing, math.lcm(codec.factor, data["multiple_of"]), background=background)


def trained_on_means(folder: Path) -> bool:
    """Whether a checkpoint's denoiser was trained on posterior means instead of draws (cache.use_mean)."""
    from latentdiff.checkpoints import META, read_meta

    meta = read_meta(folder) if (folder / META).is_file() else {}
    return bool(meta.get("config", {}).get("cache", {}).get("use_mean", False))


def stated(pipeline, model: str, seed: int = 0, batch_size: int = 128, **call) -> dict[str, Any]:
    """The protocol line of generated samples, the checkpoint's defaults filled in."""
    from latentdiff.samplers import default_steps

    config, sampler = pipeline.config, call.get("sampler")
    steps, guidance, interval = (call.get(key) for key in ("num_inference_steps", "guidance_scale", "guidance_interval"))
    if steps is None:
        own = sampler in (None, config.default_sampler)
        steps = config.default_num_inference_steps if own else default_steps(sampler, config.default_num_inference_steps)
    return {
        "model": model,
        "sampler": sampler or default_sampler(pipeline),
        "steps": steps,
        "guidance": guidance if guidance is not None else config.default_guidance_scale,
        "guidance_interval": interval if interval is not None else config.default_guidance_interval,
        "seed": seed,
    }


def default_sampler(pipeline) -> str:
    """What samples where a call names nothing: the diffusers scheduler's class, or a sampler of latentdiff."""
    return pipeline.config.default_sampler if pipeline.scheduler is None else type(pipeline.scheduler).__name__


def read_npz(path: str | Path | None) -> tuple[np.ndarray, np.ndarray | None]:
    """(arr_0 uint8 [N, H, W, C], arr_1 int64 [N] or None) of an npz file; UserError naming what is wrong with it."""
    try:
        with np.load(str(path), allow_pickle=False) as file:
            images, labels = file["arr_0"], file["arr_1"] if "arr_1" in file else None
    except FileNotFoundError:
        raise UserError(f"--samples {path}: no such file") from None
    except UNPACKING_ERRORS as error:
        raise UserError(f"--samples {path}: not an npz with arr_0 ({' '.join(str(error).split())})") from None
    if images.dtype != np.uint8 or images.ndim != 4:
        raise UserError(f"--samples {path}: arr_0 must be uint8 [N, H, W, C], it is {images.dtype} {list(images.shape)}")
    return images, None if labels is None or (labels < 0).all() else labels


def dump(value: dict[str, Any]) -> str:
    """Results as JSON for stdout; of names, control characters are escaped, also those that JSON may leave as they are."""
    return printable(json.dumps(value, indent=2, ensure_ascii=False, default=str), keep="\n")
