"""What a folder, a config or a data set is: the facts behind `latentdiff info`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

DEFAULTS = ("default_num_inference_steps", "default_guidance_scale", "default_guidance_interval")


def info(what: str) -> dict[str, Any]:
    """Facts about a checkpoint's folder, an autoencoder's, a feature network's, a latent cache, a config or a data set."""
    path = Path(what)
    if path.suffix in (".yaml", ".yml"):
        from latentdiff.checkpoints import resolve_config
        from latentdiff.config import load_config

        return {"config": str(path), **load_config(resolve_config(path)).model_dump(mode="json")}
    from latentdiff.checkpoints import INDEX, resolve_model
    from latentdiff.data.shards import shard_path

    if what == "fashion-mnist":
        return _data_info(what)
    folder = path if path.is_dir() else resolve_model(what)
    if (folder / INDEX).is_file():
        return _model_info(folder)
    if shard_path(folder, 0).is_file():
        return _cache_info(folder)
    if (folder / "model.safetensors").is_file():
        from latentdiff.evaluation.features import load_features

        net = load_features(folder)
        size = sum(p.numel() for p in net.parameters())
        return {"features": what, "name": net.name, "dimensions": net.dim, "parameters": size, **net.info}
    if any((folder / part / "config.json").is_file() for part in ("", "autoencoder", "vae")):
        return _autoencoder_info(what)
    return _data_info(what)


def _autoencoder_info(what: str) -> dict[str, Any]:
    from latentdiff.autoencoders.build import load_autoencoder
    from latentdiff.autoencoders.codec import LatentCodec

    codec = LatentCodec(load_autoencoder(what))
    return {
        "autoencoder": what,
        "class": type(codec.vae).__name__,
        "parameters": sum(p.numel() for p in codec.vae.parameters()),
        "image_channels": codec.image_channels,
        "latent_channels": codec.latent_channels,
        "factor": codec.factor,
    }


def _cache_info(folder: Path) -> dict[str, Any]:
    from latentdiff.data.cache import open_cache

    cache = open_cache(folder)
    found = cache.statistics()
    counts = [] if cache.labels is None else torch.bincount(cache.labels, minlength=len(cache.class_names)).tolist()
    return {
        "latents": str(folder),
        "images": len(cache),
        "shape": list(cache.latent_shape),
        "mirrored": cache.has_flips,
        "classes": dict(zip(cache.class_names, counts, strict=True)) if counts else {},
        "mean": found.mean.tolist(),
        "std": found.std.tolist(),
        "posterior_share": found.posterior_share.tolist(),
        "made_of": cache.manifest["identity"],
    }


def _data_info(what: str) -> dict[str, Any]:
    from latentdiff.data.sources import open_source, splits

    facts: dict[str, Any] = {"data": what}
    for split in splits(what):
        source = open_source(what, split, max_bad_share=0.999)
        sizes = np.unique(source.sizes, axis=0)
        counts = [] if source.labels is None else torch.bincount(source.labels, minlength=len(source.class_names)).tolist()
        facts[split] = {
            "images": len(source),
            "channels": source.channels,
            "smallest": sizes.min(0).tolist(),
            "largest": sizes.max(0).tolist(),
            "classes": dict(zip(source.class_names, counts, strict=True)) if counts else {},
            "captions": source.captions is not None,
            "unreadable": source.bad,
        }
    return facts


def _model_info(folder: Path) -> dict[str, Any]:
    from latentdiff.checkpoints import META, load, read_meta
    from latentdiff.commands import default_sampler

    pipeline = load(folder)
    meta = read_meta(folder) if (folder / META).is_file() else {}
    models = {name: getattr(pipeline, name) for name in ("unet", "vae", "text_encoder")}
    sizes = {name: sum(p.numel() for p in model.parameters()) for name, model in models.items() if model is not None}
    return {
        "model": str(folder),
        "made_by": _made_by(meta),
        "parameters": sizes,
        "bytes_on_disk": sum(p.stat().st_size for p in folder.rglob("*") if p.is_file()),
        "image_size": pipeline.config.image_size,
        "latent_shape": list(pipeline.latent_shape),
        "text": _text_info(pipeline),
        "classes": pipeline.class_names,
        "null_class": pipeline.config.null_class,
        "prediction": pipeline.config.prediction or pipeline.scheduler.config.get("prediction_type"),
        "schedule": pipeline.config.schedule,
        "scheduler": default_sampler(pipeline),
        "steps_trained": meta.get("steps"),
        "latents": meta.get("latents"),
        "defaults": {k: pipeline.config[k] for k in DEFAULTS},
    }


def _made_by(meta: dict[str, Any]) -> str:
    if not meta:
        return "unknown: the folder has no latentdiff.json"
    name = f"latentdiff {meta.get('versions', {}).get('latentdiff', '')}".strip()
    return f"{name}, imported from {meta['imported']['file']}" if "imported" in meta else name


def _text_info(pipeline: Any) -> dict[str, Any] | None:
    if pipeline.text_encoder is None:
        return None
    encoder = pipeline.text_encoder
    length = pipeline.tokenizer.model_max_length
    return {"encoder": type(encoder).__name__, "tokens": length, "width": encoder.config.hidden_size}
