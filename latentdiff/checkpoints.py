"""Publish and load a checkpoint: a diffusers folder that plain diffusers opens, with latentdiff.json beside it.

Layout: model_index.json, pipeline.py, unet/, vae/, [scheduler/], latentdiff.json (how it was made) and README.md (the
model card). Weights are safetensors; nothing is ever unpickled. Training state (optimizers and so on) lives elsewhere.
"""

import copy
import json
import os
import platform
import tempfile
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open

from latentdiff.errors import UserError

if TYPE_CHECKING:
    from latentdiff.pipelines.latent_diffusion import LatentDiffusionPipeline

META = "latentdiff.json"
INDEX = "model_index.json"
WEIGHTS = "diffusion_pytorch_model.safetensors"
FORMAT = 1


def publish(
    folder: str | Path,
    unet: torch.nn.Module,
    vae: torch.nn.Module,
    scheduler: Any,
    meta: Mapping[str, Any],
    class_names: Sequence[str] | None = None,
    null_class: int | None = None,
    image_size: tuple[int, int] | None = None,
    prediction: str | None = None,
    schedule: Mapping[str, Any] | None = None,
    default_guidance_scale: float = 1.0,
    default_guidance_interval: tuple[float, float] | None = None,
    default_num_inference_steps: int = 20,
    default_sampler: str | None = None,
    dtype: torch.dtype = torch.float16,
    card: str | None = None,
    files: Mapping[str, bytes | Path] | None = None,
) -> Path:
    """Write a checkpoint whole or not at all, replacing one that is there.

    Args:
        folder: where; everything in it belongs to the checkpoint and is replaced.
        unet, vae: diffusers models; copied, never changed. `unet` holds the weights to ship (usually the EMA).
        scheduler: a diffusers scheduler, or None with `default_sampler`, a latentdiff sampler, in its place.
        meta: JSON values for latentdiff.json: config, data fingerprint, steps, EMA, latent statistics, metrics ...
        class_names, null_class, image_size, prediction, schedule, default_guidance_scale, default_guidance_interval,
            default_num_inference_steps, default_sampler: kept in model_index.json; see `LatentDiffusionPipeline`.
        dtype: of the weights on disk.
        card: text of README.md; None writes a short one.
        files: more files by name (bytes, or a path to copy): pictures for the card.

    Returns:
        The folder.

    Raises:
        UserError: a weight does not fit `dtype`, or classes, null class, guidance and U-Net contradict each other, or
            nothing says how to sample.
    """
    from latentdiff.pipelines.latent_diffusion import LatentDiffusionPipeline

    folder = Path(folder)
    _check_sampling(scheduler, default_sampler, prediction, schedule)
    _check_classes(unet, class_names, null_class, default_guidance_scale, default_guidance_interval)
    record = {
        "format": FORMAT,
        **meta,
        "class_names": list(class_names) if class_names is not None else None,
        "null_class": null_class,
        "image_size": list(image_size) if image_size is not None else None,
        "weights_dtype": str(dtype).removeprefix("torch."),
        "versions": library_versions(),
    }
    text = json.dumps(record, indent=2, ensure_ascii=False, allow_nan=False) + "\n"  # fails before anything is written
    pipeline = LatentDiffusionPipeline(
        unet=in_dtype(unet, dtype, "unet"),
        vae=in_dtype(vae, dtype, "vae"),
        scheduler=scheduler,
        class_names=list(class_names) if class_names is not None else None,
        null_class=null_class,
        image_size=image_size,
        prediction=prediction,
        schedule=dict(schedule) if schedule is not None else None,
        default_guidance_scale=default_guidance_scale,
        default_guidance_interval=default_guidance_interval,
        default_num_inference_steps=default_num_inference_steps,
        default_sampler=default_sampler,
    )
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as temporary:
        new = Path(temporary) / "new"
        pipeline.save_pretrained(new)
        (new / META).write_text(text, encoding="utf-8")
        (new / "README.md").write_text(card if card is not None else short_card(record), encoding="utf-8")
        for name, content in (files or {}).items():
            (new / name).write_bytes(content if isinstance(content, bytes) else Path(content).read_bytes())
        replace_folder(new, folder, Path(temporary) / "old")
    return folder


def _check_classes(
    unet: Any, class_names: Sequence[str] | None, null_class: int | None, scale: float, interval: Sequence[float] | None
) -> None:
    """UserError where the classes, the null class, the default guidance and the U-Net contradict each other."""
    from latentdiff.guidance import check_interval

    check_interval(interval, "default_guidance_interval")
    if scale != 1.0 and null_class is None:
        raise UserError(f"default_guidance_scale {scale}: without a null class it can only be 1")
    rows, needed = unet.config.get("num_class_embeds") or 0, len(class_names or ()) + (null_class is not None)
    if class_names and (rows != needed or null_class not in (None, len(class_names))):
        raise UserError(
            f"{len(class_names)} class_names and null_class {null_class} for a U-Net with num_class_embeds {rows}: "
            f"the null class comes after the last class, and num_class_embeds must be {needed}"
        )


def _check_sampling(scheduler: Any, sampler: str | None, prediction: str | None, schedule: Any) -> None:
    """UserError unless there is a scheduler, or all that one of latentdiff's samplers needs in its place."""
    from latentdiff import samplers

    if (scheduler is None) == (sampler is None):
        raise UserError("default_sampler: runs where scheduler is None, so a checkpoint has one of the two")
    if sampler is not None and sampler not in samplers.names():
        raise UserError(f"default_sampler: {sampler!r} is unknown; valid: {', '.join(samplers.names())}")
    if sampler is not None and not (schedule and prediction):
        raise UserError("schedule and prediction: both are needed where scheduler is None, as nothing else states them")


def replace_folder(new: Path, folder: Path, aside: Path) -> None:
    """Rename `new` to `folder`, an existing one going to `aside`; if that fails the old one is back in its place."""
    new.chmod(0o755)
    if folder.exists():
        os.rename(folder, aside)
    try:
        os.rename(new, folder)
    except OSError:
        if aside.exists():
            os.rename(aside, folder)
        raise


def in_dtype(model: torch.nn.Module, dtype: torch.dtype, name: str) -> torch.nn.Module:
    """A copy of a model on the CPU in `dtype`, without gradients; refuses weights that are not finite in it."""
    result = torch.nn.Module.to(copy.deepcopy(model), device="cpu", dtype=dtype)  # not ModelMixin.to: it warns of this
    for key, value in result.state_dict().items():
        if value.is_floating_point() and not bool(value.isfinite().all()):
            raise UserError(f"{name}: {key} is not finite in {dtype}: it diverged, or needs float32 or bfloat16")
    return result.eval()


def library_versions() -> dict[str, str]:
    """Versions of Python and of the libraries that made a checkpoint."""
    versions = {"python": platform.python_version()}
    for name in ("latentdiff", "torch", "diffusers", "transformers", "accelerate", "safetensors"):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return versions


def short_card(record: Mapping[str, Any]) -> str:
    """A model card for a checkpoint that nobody has described yet."""
    names = record["class_names"]
    classes = f"classes {', '.join(names)}" if names else "unconditional"
    return (
        "# A latent diffusion model\n\n"
        f"Trained with latentdiff ({classes}). How it was made is in `{META}`.\n\n"
        "```python\nfrom diffusers import DiffusionPipeline\n"
        'pipe = DiffusionPipeline.from_pretrained("this/folder", trust_remote_code=True)\n```\n'
    )


def load(folder: str | Path, dtype: torch.dtype = torch.float32) -> "LatentDiffusionPipeline":
    """The pipeline of a checkpoint, on the CPU, in evaluation mode.

    Runs the installed pipeline, never the pipeline.py of the folder.

    Raises:
        UserError: the folder or one of its files is missing, truncated, corrupt, or not of this kind.
    """
    from diffusers.utils import logging

    from latentdiff.pipelines.latent_diffusion import LatentDiffusionPipeline

    folder = Path(folder)
    weights = check(folder)
    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()  # three small files need no bar on stderr
    try:
        pipeline = LatentDiffusionPipeline.from_pretrained(str(folder), dtype=dtype, local_files_only=True)
    except (OSError, ValueError, RuntimeError, KeyError, TypeError) as error:
        raise UserError(f"{folder}: cannot be loaded: {str(error).strip().splitlines()[0]}") from error
    finally:
        if bars:
            logging.enable_progress_bar()
    for name, keys in weights.items():
        # diffusers would leave a missing weight at its random initialisation and only log it.
        missing = sorted(getattr(pipeline, name).state_dict().keys() - keys)
        if missing:
            raise UserError(f"{folder / name / WEIGHTS}: {len(missing)} weights missing, the first is {missing[0]}")
    return pipeline


def check(folder: Path) -> dict[str, set[str]]:
    """Look at every file of a checkpoint without loading it; the names of the weights of each model.

    Raises:
        UserError: naming the file at fault.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; a checkpoint is a folder with {INDEX}")
    index = read_json(folder / INDEX)
    name = index.get("_class_name")
    if name not in ("LatentDiffusionPipeline", ["pipeline", "LatentDiffusionPipeline"]):
        raise UserError(f"{folder / INDEX}: _class_name is {name}; expected LatentDiffusionPipeline")
    if index.get("scheduler") != [None, None]:
        read_json(folder / "scheduler" / "scheduler_config.json")
    weights = {}
    for part in ("unet", "vae"):
        read_json(folder / part / "config.json")
        weights[part] = weight_names(folder / part / WEIGHTS)
    return weights


def weight_names(file: Path) -> set[str]:
    """The names of the tensors in a safetensors file; reads only its header, which also gives its right length."""
    if not file.is_file():
        raise UserError(f"{file}: missing; the checkpoint is incomplete")
    try:
        with safe_open(file, framework="pt") as tensors:
            return set(tensors.keys())
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file}: truncated or not a safetensors file ({error}); copy or publish it again") from error


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object from a file; UserError where it is missing or is not one."""
    if not file.is_file():
        raise UserError(f"{file}: missing; the checkpoint is incomplete")
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{file}: not valid JSON ({error})") from error
    if not isinstance(content, dict):
        raise UserError(f"{file}: must hold a JSON object, not a {type(content).__name__}")
    return content


def read_meta(folder: str | Path) -> dict[str, Any]:
    """What latentdiff.json says of a checkpoint; UserError where folder or file is missing or not JSON."""
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; a checkpoint is a folder with {META}")
    return read_json(folder / META)


def shipped_folder(kind: str) -> Path | None:
    """The folder of data ("weights", "configs") that ships with latentdiff.

    It lies inside the package in a wheel, and beside it in an editable install or a clone. None: not shipped.
    """
    package = Path(__file__).parent
    for parent in (package, package.parent):
        if (parent / kind).is_dir() and (parent is package or (parent / "pyproject.toml").is_file()):
            return parent / kind
    return None


def resolve_model(name: str | Path, kind: str = "model", holds: str = INDEX) -> Path:
    """The folder of a checkpoint: a path that exists, else weights that ship, as "weights/NAME" or "NAME".

    kind: what an error calls it.  holds: the file by which such a folder is known.

    Raises:
        UserError: there is neither; names the weights that ship.
    """
    path = Path(name)
    if path.exists():
        return path
    shipped = shipped_folder("weights")
    models = sorted(p.parent.name for p in shipped.glob(f"*/{holds}")) if shipped else []
    wanted = path.parts[1:] if path.parts[:1] == ("weights",) else path.parts
    if shipped and len(wanted) == 1 and wanted[0] and (shipped / wanted[0]).is_dir():  # a checkpoint or a feature network
        return shipped / wanted[0]
    choice = f"or one that ships: {', '.join(f'weights/{m}' for m in models)}" if models else f"with {holds}"
    raise UserError(f"{kind} {str(name)!r}: no such folder; give the path of one {choice}")


def resolve_config(name: str | Path) -> Path:
    """The path of a training config: the file itself, else one that ships, as "configs/SET/NAME.yaml"."""
    path = Path(name)
    shipped = shipped_folder("configs")
    if not path.exists() and shipped and path.parts[:1] == ("configs",):
        inside = shipped.joinpath(*path.parts[1:])
        return inside if inside.is_file() else path
    return path
