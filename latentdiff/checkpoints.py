"""Save and load a checkpoint: a diffusers folder that plain diffusers opens, with latentdiff.json beside it.

Layout: model_index.json, pipeline.py, unet/, vae/, [scheduler/], [text_encoder/, tokenizer/], latentdiff.json (how it was
made) and README.md (the model card). Weights are safetensors files; nothing is ever unpickled. Training state (optimizers
and so on) is kept elsewhere.
"""

import copy
import hashlib
import json
import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file

from latentdiff.errors import UserError
from latentdiff.models.loading import (
    REFUSALS,
    TEXT_WEIGHTS,
    WEIGHTS,
    is_of_diffusers,
    load_part,
    part_class,
    quiet,
    weight_files,
)
from latentdiff.utils import atomic, collection, limits
from latentdiff.utils.hashes import sha256_of, write_hashes
from latentdiff.utils.json_files import read_json
from latentdiff.utils.shipped import INDEX, META, resolve_config, resolve_model  # noqa: F401  the last two are imported from here

if TYPE_CHECKING:
    from latentdiff.pipelines.latent_diffusion import LatentDiffusionPipeline

NETWORKS = ("unet", "vae", "text_encoder")
WEAK = "weak"
WEAK_LIKE = ("in_channels", "out_channels", "num_class_embeds", "cross_attention_dim")  # of a weaker U-Net
FORMAT = 1
VERY_LONG = int(1e30)  # transformers' length of a tokenizer that has none of its own
STABLE_DIFFUSION = "StableDiffusionPipeline"
# Values of _class_name in model_index.json that can be loaded
OVER_CODES = ("DiscreteDiffusionPipeline", ["pipeline", "DiscreteDiffusionPipeline"])
KINDS = ("LatentDiffusionPipeline", ["pipeline", "LatentDiffusionPipeline"], STABLE_DIFFUSION, *OVER_CODES)


def save(
    folder: str | Path,
    unet: torch.nn.Module,
    vae: torch.nn.Module,
    scheduler: Any,
    meta: Mapping[str, Any],
    class_names: Sequence[str] | None = None,
    null_class: int | None = None,
    text_encoder: torch.nn.Module | None = None,
    tokenizer: Any = None,
    null_prompt: str | None = None,
    dtype: torch.dtype = torch.float16,
    card: str | None = None,
    files: Mapping[str, bytes | Path] | None = None,
    weak: torch.nn.Module | None = None,
    **index: Any,
) -> Path:
    """Write a checkpoint, whole or not at all, and return its folder. A checkpoint that is there already is replaced.

    Args:
        folder: where to write; everything in it is replaced.
        unet, vae: diffusers models; they are copied, never changed. `unet` holds the weights to publish (usually the EMA).
        scheduler: a diffusers scheduler; or None, together with `default_sampler`, a sampler of latentdiff.
        meta: JSON values for latentdiff.json: config, data fingerprint, steps, EMA, latent statistics, metrics ...
        class_names: names of the classes, in the order of the U-Net's class embedding; None without classes.
        null_class: the row of the class embedding that stands for no class; None where the model was trained without one.
        text_encoder, tokenizer: of transformers, for a U-Net that attends to text; copied like the others.
        null_prompt: the prompt that stands for no text; None where the model was trained without one.
        dtype: of the weights on disk.
        card: text of README.md; None writes a short one.
        files: more files by name (bytes, or a path to copy), such as pictures of the card.
        weak: a weaker U-Net for autoguidance, which is written to the folder weak.
        index: more arguments of `LatentDiffusionPipeline` for model_index.json: image_size, prediction, schedule,
            default_guidance_scale, default_guidance_interval, default_num_inference_steps, default_sampler,
            default_guidance_rule, default_guidance_rescale, default_guidance_options, image_condition. With `process` among
            them the checkpoint is a `DiscreteDiffusionPipeline`.

    Raises:
        UserError: a weight is not finite in `dtype`; classes, null class, guidance and U-Net contradict each other; or
            nothing says how to sample.
    """
    folder = Path(folder)
    if not is_over_codes(index):
        _check_sampling(scheduler, index.get("default_sampler"), index.get("prediction"), index.get("schedule"))
    if (text_encoder is None) != (tokenizer is None):
        raise UserError("text_encoder and tokenizer: a checkpoint has both or neither")
    image_dropped = bool((index.get("image_condition") or {}).get("dropped"))
    _check_classes(unet, class_names, null_class, index, text_encoder is not None and null_prompt is not None or image_dropped)
    names, size = list(class_names) if class_names is not None else None, index.get("image_size")
    record = {
        "format": FORMAT,
        **meta,
        "class_names": names,
        "null_class": null_class,
        "null_prompt": null_prompt,
        "image_size": list(size) if size is not None else None,
        "weights_dtype": str(dtype).removeprefix("torch."),
        "versions": library_versions(),
    }
    # Before anything is written, as it fails for values that JSON cannot hold
    text = json.dumps(record, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    pipeline = pipeline_class(index)(
        *_with_sizes(in_dtype(unet, dtype, "unet"), in_dtype(vae, dtype, "vae")),
        scheduler=scheduler,
        class_names=names,
        text_encoder=None if text_encoder is None else in_dtype(text_encoder, dtype, "text_encoder"),
        tokenizer=tokenizer,
        null_class=null_class,
        null_prompt=null_prompt,
        **index,
    )
    with atomic.new_folder(folder) as new:
        with quiet():
            pipeline.save_pretrained(new)
        if type(text_encoder).__name__ == "CLIPTextModel":
            prefix_names(new / "text_encoder" / TEXT_WEIGHTS, "text_model.")
            write_hashes(new / "text_encoder")
        _save_vocabulary(tokenizer, new / "tokenizer")
        if weak is not None:
            in_dtype(weak, dtype, WEAK).save_pretrained(new / WEAK)
            write_hashes(new / WEAK)
        for part in new.glob("*/config.json"):
            part.write_text(json.dumps(_portable(read_json(part)), indent=2) + "\n")
        (new / META).write_text(text, encoding="utf-8")
        (new / "README.md").write_text(short_card(pipeline) if card is None else card, encoding="utf-8")
        for name, content in (files or {}).items():
            (new / name).write_bytes(content if isinstance(content, bytes) else Path(content).read_bytes())
        write_hashes(new)
    return folder


def is_over_codes(index: Mapping[str, Any]) -> bool:
    """Whether a pipeline is a `DiscreteDiffusionPipeline`, given its config or its arguments: those have a process."""
    return index.get("process") is not None


def pipeline_class(index: Mapping[str, Any]) -> type:
    """The class of a pipeline with these arguments, or with this config."""
    if is_over_codes(index):
        from latentdiff.pipelines.discrete_diffusion import DiscreteDiffusionPipeline

        return DiscreteDiffusionPipeline
    from latentdiff.pipelines.latent_diffusion import LatentDiffusionPipeline

    return LatentDiffusionPipeline


def _check_sampling(scheduler: Any, sampler: str | None, prediction: str | None, schedule: Any) -> None:
    """UserError unless there is a scheduler, or else a sampler of latentdiff with the schedule and prediction it needs."""
    from latentdiff import samplers

    if (scheduler is None) == (sampler is None):
        raise UserError("default_sampler: runs where scheduler is None, so a checkpoint has one of the two")
    if sampler is not None and sampler not in samplers.names():
        raise UserError(f"default_sampler: {sampler!r} is unknown; valid: {', '.join(samplers.names())}")
    if sampler is not None and not (schedule and prediction):
        raise UserError("schedule and prediction: both are needed where scheduler is None, as nothing else states them")


def _check_classes(
    unet: Any, class_names: Sequence[str] | None, null_class: int | None, index: Mapping[str, Any], dropped: bool
) -> None:
    """UserError where classes, null class, default guidance and U-Net contradict each other.

    dropped: whether the model was trained without text, or without its second image, on some samples.
    """
    from latentdiff.guidance import check_interval
    from latentdiff.guidance.rules import check_default_call

    check_default_call(index, INDEX)
    scale = index.get("default_guidance_scale", 1.0)
    check_interval(index.get("default_guidance_interval"), "default_guidance_interval")
    if scale != 1.0 and null_class is None and not dropped:
        raise UserError(f"default_guidance_scale {scale}: without a null class or a null prompt it can only be 1")
    rows, needed = unet.config.get("num_class_embeds") or 0, len(class_names or ()) + (null_class is not None)
    if class_names and (rows != needed or null_class not in (None, len(class_names))):
        raise UserError(
            f"{len(class_names)} class_names and null_class {null_class} for a U-Net with num_class_embeds {rows}: "
            f"the null class comes after the last class, and num_class_embeds must be {needed}"
        )


def in_dtype(model: torch.nn.Module, dtype: torch.dtype, name: str) -> torch.nn.Module:
    """A copy of a model on the CPU in `dtype`, in eval mode. UserError, naming it `name`, for weights not finite in `dtype`."""
    # Not ModelMixin.to, which warns of float16 on a CPU
    result = torch.nn.Module.to(copy.deepcopy(model), device="cpu", dtype=dtype)
    for key, value in result.state_dict().items():
        if value.is_floating_point() and not bool(value.isfinite().all()):
            raise UserError(f"{name}: {key} is not finite in {dtype}: it diverged, or needs float32 or bfloat16")
    return result.eval()


def _with_sizes(unet: torch.nn.Module, vae: torch.nn.Module) -> tuple[torch.nn.Module, torch.nn.Module]:
    """The U-Net and the autoencoder, with sample_size in their configs changed in place to what stock pipelines expect.

    Image-to-image, inpainting and others compare the U-Net's sample_size with a number, so a square one becomes a number.
    Tiled decoding splits images above the autoencoder's sample_size, so it is at least the size of the model's images.
    """
    size, side = unet.config.get("sample_size"), vae.config.get("sample_size")
    if isinstance(size, (list, tuple)) and size[0] == size[1]:
        unet.register_to_config(sample_size=size[0])
    blocks = vae.config.get("block_out_channels")
    if size is not None and isinstance(side, int) and blocks:
        largest = max(size) if isinstance(size, (list, tuple)) else size
        vae.register_to_config(sample_size=max(side, largest * 2 ** (len(blocks) - 1)))
    return unet, vae


def prefix_names(file: Path, prefix: str) -> None:
    """Rename the weights in a safetensors file so that each name begins with `prefix`.

    transformers from 5.6 on writes a CLIPTextModel without "text_model." and reads both. Older versions and other programs
    know only the names with it, and would leave every weight at its random initial value.
    """
    weights = load_file(file)
    save_file({prefix + name.removeprefix(prefix): value for name, value in weights.items()}, file, {"format": "pt"})


def _save_vocabulary(tokenizer: Any, folder: Path) -> None:
    """Write vocab.json with merges.txt, or vocab.txt, beside tokenizer.json.

    transformers before version 5 reads these files, and version 5 does not write them.
    """
    fast = getattr(tokenizer, "backend_tokenizer", None)
    if fast is not None and type(fast.model).__name__ in ("BPE", "WordPiece"):
        fast.model.save(str(folder))


def _portable(config: Mapping[str, Any]) -> dict[str, Any]:
    """A part's config without the path it was loaded from, and with dtype float32.

    transformers from version 5 on loads a part in the dtype of its config; diffusers loads its parts in float32 unless it is
    told otherwise. So the text encoder's config says float32, whatever the weights are stored in: loading converts them.
    """
    portable = {key: value for key, value in config.items() if key not in ("_name_or_path", "torch_dtype")}
    if "dtype" in config or "torch_dtype" in config:
        portable["dtype"] = "float32"
    return dict(sorted(portable.items()))


def library_versions() -> dict[str, str]:
    """Versions of Python and of the libraries that a checkpoint depends on, by name, as they are installed here."""
    versions = {"python": platform.python_version()}
    for name in ("latentdiff", "torch", "diffusers", "transformers", "accelerate", "safetensors"):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return versions


def short_card(pipeline: "LatentDiffusionPipeline") -> str:
    """The Markdown text of a default model card: what the model is conditioned on, and how to open it."""
    conditions, arguments = [], []
    if pipeline.text_encoder is not None:
        conditions.append("text")
        arguments.append('"what to draw"')
    if pipeline.num_classes:
        names = pipeline.class_names
        conditions.append(f"classes {', '.join(names)}" if names else f"{pipeline.num_classes} classes")
        arguments.append(f"class_labels=[{json.dumps(names[0], ensure_ascii=False) if names else 0}]")
    condition = f"conditioned on {' and '.join(conditions)}" if conditions else "unconditional"
    if pipeline.config.get("bridge") is not None:
        condition += ". It is a bridge: it starts from images of another data set in the place of noise"
        arguments.append("latents=latentdiff.translation.encode_images(pipe, images)")
    kind = "discrete diffusion" if is_over_codes(pipeline.config) else "latent diffusion"
    return (
        f"# A {kind} model\n\n"
        f"Trained with latentdiff, {condition}. How it was made is in `{META}`.\n\n"
        "```python\nfrom diffusers import DiffusionPipeline\n\n"
        'pipe = DiffusionPipeline.from_pretrained("this/folder", trust_remote_code=True)\n'
        f"image = pipe({', '.join(arguments)}).images[0]\n```\n"
    )


@collection.paused()
def load(folder: str | Path, dtype: torch.dtype = torch.float32, verify: bool = True) -> "LatentDiffusionPipeline":
    """The pipeline of a checkpoint, or of a folder in Stable Diffusion's layout, on the CPU, in eval mode.

    The installed pipeline is used, never the pipeline.py of the folder. Weights may be of a variant (fp16), or in shards.

    Args:
        folder: of the checkpoint.
        dtype: that the weights are loaded in.
        verify: check weight files against the hashes beside them; about two seconds a gigabyte on a slow core.

    Raises:
        UserError: the folder or one of its files is missing, truncated, damaged, pickled, or of another kind.
    """
    folder = Path(folder)
    models = {name: load_part(folder / name, kind, dtype, verify) for name, kind in check(folder).items()}
    try:
        with quiet():
            pipeline = pipeline_class(read_json(folder / INDEX)).from_pretrained(
                str(folder), torch_dtype=dtype, local_files_only=True, trust_remote_code=False, **models
            )
    except REFUSALS as error:
        raise UserError(f"{folder}: cannot be loaded: {' '.join(str(error).split())[:300]}") from error
    if read_json(folder / INDEX)["_class_name"] == STABLE_DIFFUSION:
        as_stable_diffusion(pipeline.scheduler)
    if pipeline.tokenizer is not None:
        _check_prompts(pipeline, folder / "tokenizer" / "tokenizer_config.json")
    return pipeline


def load_weak(folder: str | Path, pipeline: "LatentDiffusionPipeline", verify: bool = True) -> torch.nn.Module:
    """The weaker U-Net of a checkpoint, for autoguidance: the pipeline's `weak_unet`, in eval mode, on its device.

    It lies in the folder `weak`, with the files of a folder `unet`: a copy of that of an earlier or a smaller checkpoint.

    Args:
        folder: of the checkpoint.
        pipeline: the loaded checkpoint.
        verify: as in `load`.

    Raises:
        UserError: there is none, or it is for other latents or conditions than the checkpoint's own U-Net.
    """
    path = Path(folder) / WEAK
    if not path.is_dir():
        raise UserError(
            f"--weak: {folder} has no weaker U-Net; copy the folder unet of an earlier checkpoint to {path}, or publish the "
            "run again with --weak-step"
        )
    weak = load_part(path, type(pipeline.unet), pipeline.unet.dtype, verify)
    for key in WEAK_LIKE:
        value, expected = weak.config.get(key), pipeline.unet.config.get(key)
        if value != expected:
            raise UserError(f"{path}: its {key} is {value}, and that of the model {expected}; they must be equal")
    return weak.to(pipeline.device)


def refuse_bridge(pipeline: Any, model: str) -> None:
    """UserError for a bridge, where noise is needed to start from. model: its name, for the message."""
    if (start := pipeline.config.get("bridge")) is not None:
        raise UserError(f"{model}: is a bridge, which starts from images of {start} and not from noise")


def as_stable_diffusion(scheduler: Any) -> None:
    """Correct a scheduler's config, in place, as Stable Diffusion's own pipeline does: old folders have other values."""
    for key, value in {"steps_offset": 1, "clip_sample": False}.items():
        if key in scheduler.config:
            scheduler.register_to_config(**{key: value})


def _check_prompts(pipeline: Any, file: Path) -> None:
    """UserError where the tokenizer's length is too short for its special tokens, or too long for the encoder. file: of it."""
    longest = getattr(pipeline.text_encoder.config, "max_position_embeddings", None)
    most = min(longest, limits.MAX_TOKENS) if isinstance(longest, int) else limits.MAX_TOKENS
    least = pipeline.tokenizer.num_special_tokens_to_add() + 1
    length = pipeline.tokenizer.model_max_length
    if not isinstance(length, int) or not least <= length <= most:
        shown = "not stated" if length == VERY_LONG else str(length)[:40]
        raise UserError(f"{file}: model_max_length is {shown}; it must be a whole number from {least} to {most}")


@collection.paused()
def check(folder: Path) -> dict[str, type]:
    """Check every file of a checkpoint without loading weights; returns the class of each of its models by folder name.

    Other parts (safety_checker, feature_extractor, image_encoder) are not used, and so not checked.

    Raises:
        UserError: a file is missing, truncated, pickled, or holds something a pipeline cannot work with; it is named.
    """
    from latentdiff.guidance.rules import check_default_call

    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; a checkpoint is a folder with {INDEX}")
    if not (folder / INDEX).is_file() and (folder / "run.json").is_file():
        raise UserError(f"{folder}: is the output folder of a training run, not a checkpoint; {_in_run(folder)}")
    index = read_json(folder / INDEX)
    name = index.get("_class_name")
    if name not in KINDS:
        raise UserError(f"{folder / INDEX}: _class_name is {name}; expected LatentDiffusionPipeline or {STABLE_DIFFUSION}")
    if (name in OVER_CODES) != is_over_codes(index):
        raise UserError(f"{folder / INDEX}: process is {str(index.get('process'))[:60]}, which {name} does not go with")
    parts = ["unet", "vae", "scheduler", "text_encoder", "tokenizer"]
    if name != STABLE_DIFFUSION:  # which needs all of them
        parts = parts[:2] + [part for part in parts[2:] if index.get(part, [None, None]) != [None, None]]
    limits.check_index(folder / INDEX, index)
    check_default_call(index, str(folder / INDEX))
    classes = {part: part_class(index.get(part), f"{folder / INDEX}: {part}") for part in parts}
    if classes.pop("scheduler", None):
        file = folder / "scheduler" / "scheduler_config.json"
        limits.whole(file, "num_train_timesteps", read_json(file).get("num_train_timesteps", 1000), 1, limits.MAX_TIMESTEPS)
    if classes.pop("tokenizer", None) and not (folder / "tokenizer").is_dir():
        raise UserError(f"{folder / 'tokenizer'}: missing; the checkpoint is incomplete")
    for part, kind in classes.items():
        config = read_json(folder / part / "config.json")
        if part == "unet":
            limits.check_latent_size(folder / part / "config.json", config)
        weight_files(folder / part, WEIGHTS if is_of_diffusers(kind) else TEXT_WEIGHTS)
    return classes


def _in_run(folder: Path) -> str:
    """Advice for somebody who gave a training run's output folder in place of its checkpoint."""
    if (folder / "model" / INDEX).is_file():
        return f"did you mean {folder / 'model'}?"
    if (folder / "state").is_dir() or (folder / "snapshots").is_dir():
        return f"make one of its newest state by `latentdiff publish {folder}`"
    return "it has not published one yet"


def read_meta(folder: str | Path) -> dict[str, Any]:
    """The content of a checkpoint's latentdiff.json. UserError where folder or file is missing, or it is not a JSON object."""
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; a checkpoint is a folder with {META}")
    return read_json(folder / META)


def weights_of(folder: Path) -> dict[str, str | None]:
    """{"weights": "EMA, decay …" where latentdiff.json says so, else None; "weights_sha256": of all its weight files}.

    The hash covers the path, length and content of each network's safetensors files.
    """
    average = read_meta(folder).get("ema") if (folder / META).is_file() else None
    digest = hashlib.sha256()
    for path in sorted(path for part in NETWORKS for path in (folder / part).glob("*.safetensors")):
        digest.update(f"{path.relative_to(folder).as_posix()} {path.stat().st_size}\n".encode())
        digest.update(bytes.fromhex(sha256_of(path)))
    weights = f"EMA, decay {average.get('decay')}" if isinstance(average, dict) else None
    return {"weights": weights, "weights_sha256": digest.hexdigest()}
