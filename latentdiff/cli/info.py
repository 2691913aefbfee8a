"""`latentdiff info`: what a folder, a config or a data set is."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from latentdiff.errors import UserError

DEFAULTS = ("default_num_inference_steps", "default_guidance_scale", "default_guidance_interval")
RULE_DEFAULTS = ("default_guidance_rule", "default_guidance_rescale", "default_guidance_options")  # shown where they are set


def info(what: str | Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Describe a checkpoint, an autoencoder, a feature network, a latent cache, a run, a config or a data set.

    For a config it also says what its run will cost.

    Args:
        what: a folder, a YAML file, or the name of a data set.
        overrides: values as key=value: of a config, as training takes them; of a data set those of its section data, such as
            data.size=[64,64] or data.text_column=caption.

    Returns:
        Facts that can be written as JSON.

    Raises:
        UserError: there is no such thing, it is damaged, or it takes no overrides.
    """
    path = Path(what)
    if path.suffix in (".yaml", ".yml"):
        return _config_info(path, list(overrides))
    if overrides and not all(item.startswith("data.") for item in overrides):
        raise UserError(f"unrecognized arguments: {' '.join(overrides)}; key=value overrides a CONFIG, a .yaml file")
    facts = _folder_info(str(what), path, overrides)
    if overrides and "data" not in facts:
        raise UserError(f"unrecognized arguments: {' '.join(overrides)}; data.key=value is for a CONFIG or a data set")
    return facts


def _folder_info(what: str, path: Path, overrides: Sequence[str]) -> dict[str, Any]:
    """Facts about anything but a config, by the files that are in the folder."""
    from latentdiff.checkpoints import INDEX, resolve_model
    from latentdiff.data.sources import is_data_name
    from latentdiff.data.summary import summarize_data
    from latentdiff.data.tensor_shards import shard_path

    if not path.is_dir() and is_data_name(what):
        return summarize_data(what, overrides)
    folder = path if path.is_dir() else resolve_model(what, "info")
    if (folder / INDEX).is_file():
        return _checkpoint_info(folder)
    if shard_path(folder, 0).is_file():
        return _cache_info(folder)
    if (folder / "model.safetensors").is_file():
        from latentdiff.models.feature_net import load_features

        net = load_features(folder)
        return {"features": what, "name": net.name, "dimensions": net.dim, "parameters": _parameters(net), **net.info}
    if (folder / "run.json").is_file() and any((folder / name).is_dir() for name in ("state", "snapshots")):
        return _run_info(folder)
    if any((folder / part / "config.json").is_file() for part in ("", "autoencoder", "vae")):
        return _autoencoder_info(what)
    return summarize_data(what, overrides)


def _config_info(path: Path, overrides: list[str]) -> dict[str, Any]:
    """What a run of the config would cost, with the config itself."""
    from latentdiff.checkpoints import resolve_config
    from latentdiff.config import load_config
    from latentdiff.training.estimate import plan

    file = resolve_config(path)
    config = load_config(file, overrides)
    return {"file": str(path), "stage": config.stage, **plan(config, file), "config": config.model_dump(mode="json")}


def _run_info(folder: Path) -> dict[str, Any]:
    """A training run: its stage, what it has published, and the steps that can be published."""
    from latentdiff.training.publish import publishable
    from latentdiff.training.state import best_step
    from latentdiff.utils.json_files import read_json

    published = [name for name in ("autoencoder", "model") if (folder / name).is_dir()]
    facts = {
        "run": str(folder),
        "stage": read_json(folder / "run.json").get("stage"),
        "published": published,
        "steps": list(publishable(folder)),
        "best": best_step(folder),
        "publish": f"latentdiff publish {folder} --step N",
    }
    return facts | (_autoencoder_info(str(folder)) if "autoencoder" in published else {})


def _autoencoder_info(what: str) -> dict[str, Any]:
    from latentdiff.models.autoencoder import load_autoencoder
    from latentdiff.models.codec import LatentCodec

    codec = LatentCodec(load_autoencoder(what))
    return {
        "autoencoder": what,
        "class": type(codec.vae).__name__,
        "parameters": _parameters(codec.vae),
        "image_channels": codec.image_channels,
        "latent_channels": codec.latent_channels,
        "factor": codec.factor,
    }


def _cache_info(folder: Path) -> dict[str, Any]:
    from latentdiff.data.latent_cache import open_cache
    from latentdiff.data.summary import class_counts

    cache = open_cache(folder)
    if cache.holds_codes:
        return {
            "codes": str(folder),
            "images": len(cache),
            "shape": list(cache.latent_shape),
            "mirrored": cache.has_flips,
            "classes": class_counts(cache.class_names, cache.labels),
            "made_of": cache.manifest["identity"],
        }
    latents = cache.statistics()
    return {
        "latents": str(folder),
        "images": len(cache),
        "shape": list(cache.latent_shape),
        "mirrored": cache.has_flips,
        "classes": class_counts(cache.class_names, cache.labels),
        "mean": latents.mean.tolist(),
        "std": latents.std.tolist(),
        "posterior_share": latents.posterior_share.tolist(),
        "made_of": cache.manifest["identity"],
    }


def _checkpoint_info(folder: Path) -> dict[str, Any]:
    from latentdiff.checkpoints import META, is_over_codes, load, read_meta
    from latentdiff.evaluation.records import default_sampler

    pipeline = load(folder)
    meta = read_meta(folder) if (folder / META).is_file() else {}
    if is_over_codes(pipeline.config):
        process = {"codes": pipeline.num_codes, "process": dict(pipeline.config.process), "codebook": meta.get("codes")}
    else:
        process = {
            "prediction": pipeline.config.prediction or pipeline.scheduler.config.get("prediction_type"),
            "schedule": pipeline.config.schedule,
            "latents": meta.get("latents"),
        }
    networks = {name: getattr(pipeline, name) for name in ("unet", "vae", "text_encoder")}
    return {
        "model": str(folder),
        "made_by": _made_by(meta),
        "parameters": {name: _parameters(network) for name, network in networks.items() if network is not None},
        "bytes_on_disk": sum(p.stat().st_size for p in folder.rglob("*") if p.is_file()),
        "image_size": pipeline.config.image_size,
        "latent_shape": list(pipeline.code_shape if is_over_codes(pipeline.config) else pipeline.latent_shape),
        "text": _text_info(pipeline),
        "classes": pipeline.class_names,
        "null_class": pipeline.config.null_class,
        **({"image_condition": dict(given)} if (given := getattr(pipeline.config, "image_condition", None)) else {}),
        **process,
        "scheduler": default_sampler(pipeline),
        **({"bridge": meta["bridge"]} if "bridge" in meta else {}),
        **({"weak": _weak_info(folder, meta)} if (folder / "weak").is_dir() else {}),
        "steps_trained": meta.get("steps"),
        "defaults": {key: pipeline.config[key] for key in DEFAULTS}
        | {key: value for key in RULE_DEFAULTS if (value := pipeline.config.get(key)) is not None},
    }


def _weak_info(folder: Path, meta: dict[str, Any]) -> dict[str, Any]:
    """The weaker U-Net for autoguidance: its size, and the steps it was trained for; None where nothing says."""
    size = sum(p.stat().st_size for p in (folder / "weak").glob("*.safetensors"))
    return {"bytes": size, "steps_trained": (meta.get("weak") or {}).get("steps")}


def _made_by(meta: dict[str, Any]) -> str:
    """The program and its version; for an imported checkpoint also the file. meta: what latentdiff.json holds, or {}."""
    if not meta:
        return "unknown: the folder has no latentdiff.json"
    versions, imported = (value if isinstance(value := meta.get(key), dict) else {} for key in ("versions", "imported"))
    name = f"latentdiff {versions.get('latentdiff', '')}".strip()
    return f"{name}, imported from {imported['file']}" if "file" in imported else name


def _text_info(pipeline: Any) -> dict[str, Any] | None:
    encoder = pipeline.text_encoder
    if encoder is None:
        return None
    width = encoder.config.hidden_size
    return {"encoder": type(encoder).__name__, "tokens": pipeline.tokenizer.model_max_length, "width": width}


def _parameters(network: Any) -> int:
    return sum(parameter.numel() for parameter in network.parameters())
