"""Converts a single .safetensors file of the original Stable Diffusion code to a checkpoint, by diffusers' converter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from latentdiff.errors import UserError

# Where each part's weights begin, and those of the averaged U-Net
PREFIXES = {"unet": "model.diffusion_model.", "vae": "first_stage_model.", "text_encoder": "cond_stage_model."}
AVERAGED = "model_ema."
DTYPES = {"F16": "float16", "BF16": "bfloat16"}  # others are kept in float32
# Defaults of StableDiffusionPipeline
GUIDANCE, STEPS = 7.5, 50


def import_checkpoint(file: str | Path, config: str | Path, out: str | Path) -> Path:
    """Convert a single .safetensors file in the original layout to a checkpoint.

    The weights keep the file's precision. Where the file holds averaged weights of the U-Net (model_ema.), they are used.

    Args:
        file: a .safetensors file of the original latent diffusion or Stable Diffusion code.
        config: a folder in Stable Diffusion's layout, or a Hub name. Its config files describe the networks, and its
            scheduler and tokenizer are taken; its weights are not read.
        out: a folder that does not exist yet.

    Returns:
        The checkpoint's folder, `out`.

    Raises:
        UserError: the file is missing, pickled, truncated, in another layout or of another config; or `out` exists.
    """
    import torch
    from safetensors import safe_open

    from latentdiff.checkpoints import save

    file, out = Path(file), Path(out)
    names = _check_file(file)
    if not str(config):
        raise UserError("--config '': give a folder in Stable Diffusion's layout, or a Hub name")
    if out.exists():
        raise UserError(f"--out {out}: is there already; name a new folder")
    _check_config(str(config))
    averaged = sum(name.startswith(AVERAGED) for name in names) > 100  # as the converter counts
    pipeline = _convert(file, str(config), averaged)
    with safe_open(file, framework="pt") as tensors:
        kind = tensors.get_slice(next(name for name in names if name.startswith(PREFIXES["unet"]))).get_dtype()
    return save(
        out,
        unet=pipeline.unet,
        vae=pipeline.vae,
        scheduler=pipeline.scheduler,
        text_encoder=pipeline.text_encoder,
        tokenizer=pipeline.tokenizer,
        null_prompt="",
        dtype=getattr(torch, DTYPES.get(kind, "float32")),
        default_guidance_scale=GUIDANCE,
        default_num_inference_steps=STEPS,
        meta={"imported": {"file": file.name, "config": str(config), "averaged": averaged}},
    )


def _check_file(file: Path) -> list[str]:
    """The names of the file's weights, sorted."""
    from latentdiff.models.loading import PICKLES, weight_names

    if file.suffix in PICKLES:
        raise UserError(f"{file}: is pickled, which can run code when it is read; find or make a .safetensors of it")
    if not file.is_file():
        raise UserError(f"{file}: no such file; give a single .safetensors file")
    names = sorted(weight_names(file))
    for part, prefix in PREFIXES.items():
        if not any(name.startswith(prefix) for name in names):
            raise UserError(f"{file}: has no {part} ({prefix}...), so it is not in the original Stable Diffusion layout")
    return names


def _check_config(config: str) -> None:
    from latentdiff.checkpoints import INDEX, STABLE_DIFFUSION
    from latentdiff.models.loading import part_class, refuse_code
    from latentdiff.utils.json_files import read_json

    folder = Path(config)
    if not folder.exists() and config.count("/") == 1 and not config.startswith((".", "/")):
        return  # a Hub name
    if not (folder / INDEX).is_file():
        raise UserError(f"--config {config}: no {INDEX} there; give a folder in Stable Diffusion's layout, or a Hub name")
    name = read_json(folder / INDEX).get("_class_name")
    if name != STABLE_DIFFUSION:
        raise UserError(f"--config {config}: its _class_name is {name}; expected {STABLE_DIFFUSION}")
    for part in (*PREFIXES, "scheduler", "tokenizer"):
        part_class(read_json(folder / INDEX).get(part), f"{folder / INDEX}: {part}")
        if part in PREFIXES:
            refuse_code(read_json(folder / part / "config.json"), folder / part / "config.json")


def _convert(file: Path, config: str, averaged: bool) -> Any:
    import torch
    from diffusers import StableDiffusionPipeline
    from diffusers.loaders.single_file_utils import SingleFileComponentError

    from latentdiff.models.loading import quiet

    expected = (SingleFileComponentError, OSError, ValueError, RuntimeError, KeyError, TypeError, AttributeError, IndexError)
    try:
        with quiet():
            pipeline = StableDiffusionPipeline.from_single_file(
                str(file),
                config=config,
                local_files_only=Path(config).exists(),
                safety_checker=None,
                feature_extractor=None,
                torch_dtype=torch.float32,
                extract_ema=averaged,
            )
    except expected as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{file}: does not fit the config of {config}: {reason}") from error
    for part in PREFIXES:
        absent = sorted(name for name, value in getattr(pipeline, part).state_dict().items() if value.is_meta)
        if absent:  # left without a value, which diffusers does not say
            raise UserError(
                f"{file}: does not fit the config of {config}: {len(absent)} weights of the {part} missing, the first is "
                f"{absent[0]}"
            )
    return pipeline
