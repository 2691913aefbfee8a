"""What a folder, a config or a data set is: the facts behind `latentdiff info`."""

from __future__ import annotations

import hashlib
import statistics
from collections import Counter
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from latentdiff.config import DataConfig
from latentdiff.data.image_source import EncodedImages, ImageSource, in_threads
from latentdiff.errors import UserError, printable
from latentdiff.models.loading import read_json

DEFAULTS = ("default_num_inference_steps", "default_guidance_scale", "default_guidance_interval")
FEW = 5  # of many that are listed
FOLDER_SIZE = (64, 64)  # of the images in configs/folder
MANY_PIXELS = 10**9  # beyond which a report does not decode every image


def info(what: str, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Describe a checkpoint, an autoencoder, a feature network, a latent cache, a run, a config or a data set.

    Of a config it also says what its run will cost.

    Args:
        what: a folder, a YAML file, or the name of a data set.
        overrides: values as key=value: of a config, as training takes them; of a data set those of its section data, such as
            data.size=[64,64] or data.text_column=caption.

    Returns:
        The facts, of which every value can be written as JSON.

    Raises:
        UserError: there is no such thing, or it is damaged.
    """
    path = Path(what)
    if path.suffix in (".yaml", ".yml"):
        return _config_info(path, list(overrides))
    if overrides and not all(item.startswith("data.") for item in overrides):
        raise UserError(f"unrecognized arguments: {' '.join(overrides)}; key=value overrides a CONFIG, a .yaml file")
    facts = _folder_info(what, path, overrides)
    if overrides and "data" not in facts:
        raise UserError(f"unrecognized arguments: {' '.join(overrides)}; data.key=value is for a CONFIG or a data set")
    return facts


def _folder_info(what: str, path: Path, overrides: Sequence[str]) -> dict[str, Any]:
    """Facts about anything but a config."""
    from latentdiff.checkpoints import INDEX, resolve_model
    from latentdiff.data.sources import is_data_name
    from latentdiff.data.tensor_shards import shard_path

    if not path.is_dir() and is_data_name(what):
        return _data_info(what, overrides)
    folder = path if path.is_dir() else resolve_model(what)
    if (folder / INDEX).is_file():
        return _model_info(folder)
    if shard_path(folder, 0).is_file():
        return _cache_info(folder)
    if (folder / "model.safetensors").is_file():
        from latentdiff.models.feature_net import load_features

        net = load_features(folder)
        size = sum(p.numel() for p in net.parameters())
        return {"features": what, "name": net.name, "dimensions": net.dim, "parameters": size, **net.info}
    if (folder / "run.json").is_file() and any((folder / name).is_dir() for name in ("state", "snapshots")):
        return _run_info(folder)
    if any((folder / part / "config.json").is_file() for part in ("", "autoencoder", "vae")):
        return _autoencoder_info(what)
    return _data_info(what, overrides)


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

    stage = read_json(folder / "run.json").get("stage")
    published = [name for name in ("autoencoder", "model") if (folder / name).is_dir()]
    facts = {"run": str(folder), "stage": stage, "published": published, "steps": list(publishable(folder))}
    facts |= {"best": best_step(folder), "publish": f"latentdiff publish {folder} --step N"}
    return facts | (_autoencoder_info(str(folder)) if "autoencoder" in published else {})


def _autoencoder_info(what: str) -> dict[str, Any]:
    from latentdiff.models.autoencoder import load_autoencoder
    from latentdiff.models.codec import LatentCodec

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
    from latentdiff.data.latent_cache import open_cache

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


def _data_info(what: str, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """What a data set holds and what became of each of its files; read as a config with these overrides reads it.

    Framing is shown for data.size and data.framing, by default those of configs/folder: cropped to 64x64.
    """
    from latentdiff.config import parse_data
    from latentdiff.data.sources import kind_of, open_source, splits
    from latentdiff.training.images import columns_of

    data = parse_data({"source": what}, overrides)
    channels = data.channels if "channels" in data.model_fields_set else None  # else as the images have them
    sources = {
        split: open_source(what, split, channels, 0.999, columns_of(data), data.streaming, data.background)
        for split in splits(what, data.streaming)
    }
    compared, pictures = _pictures(sources)  # reads the images, and so finds more that cannot be read
    facts: dict[str, Any] = {"data": what}
    for split, source in sources.items():
        sizes, times = np.unique(source.sizes, axis=0, return_counts=True)
        most = np.argsort(-times, kind="stable")[:FEW]
        counts = [] if source.labels is None else torch.bincount(source.labels, minlength=len(source.class_names)).tolist()
        repeated = [names for places in pictures.values() if len(names := places.get(split, [])) > 1]
        facts[split] = {
            "images": len(source),
            "channels": source.channels,
            "smallest": sizes.min(0).tolist(),
            "largest": sizes.max(0).tolist(),
            "sizes": len(sizes),
            "most_common_sizes": [{"size": sizes[k].tolist(), "images": int(times[k])} for k in most],
            "classes": dict(zip(source.class_names, counts, strict=True)) if counts else {},
            "captions": None if source.captions is None else _caption_facts(source.captions),
            "unreadable": {printable(file): reason for file, reason in source.bad.items()},
            "files": source.report.with_unreadable(source.bad).as_json(),
            "duplicates": _repeated_facts(repeated, sum(len(names) - 1 for names in repeated), compared),
        }
        if source.unlabelled:
            facts[split]["no_classes"] = source.unlabelled
        if data.size is not None or kind_of(what) != "fashion-mnist":
            facts[split]["framing"] = _framing(source, data)
    if len(sources) > 1:
        both = [places for places in pictures.values() if len(places) > 1]
        facts["in_both_splits"] = _repeated_facts(both, len(both), compared)
    return facts


def _framing(source: ImageSource, data: DataConfig) -> dict[str, Any]:
    """What data.framing does to the images; with the message of a framing that does not take them."""
    from latentdiff.data.framing import framing_facts, framing_lines
    from latentdiff.data.transforms import Preprocess

    framing = "crop" if data.size is None and data.framing == "exact" else data.framing
    try:
        rule = Preprocess(data.size or FOLDER_SIZE, None, framing, data.multiple_of, background=data.background)
        facts = framing_facts(source, rule.for_source(source))
    except UserError as error:
        return {"size": list(data.size or FOLDER_SIZE), "framing": framing, "refused": str(error)}
    return facts | {"in_words": framing_lines(facts)}


def _repeated_facts(groups: list[Any], images: int, compared: str) -> dict[str, Any]:
    """images: how many are more than needed.  The first few groups, and of each the first few names."""

    def few(group: Any) -> Any:
        return {split: names[:FEW] for split, names in group.items()} if isinstance(group, dict) else group[:FEW]

    return {"images": images, "groups": len(groups), "first": [few(group) for group in groups[:FEW]], "compared": compared}


def _caption_facts(captions: list[tuple[str, ...]]) -> dict[str, Any]:
    """Of all captions; tokens as a text encoder of one's own counts them with the config's default length and vocabulary."""
    from latentdiff.data.captions import own_token_facts

    texts = [text for several in captions for text in several if text]
    words = [len(text.split()) for text in texts]
    lengths = {"min": min(words), "median": statistics.median(words), "max": max(words)}
    facts = {"captions": len(texts), "distinct": len(set(texts)), "words": lengths}
    return facts | {"tokens": own_token_facts(texts)}


def _pictures(sources: dict[str, ImageSource]) -> tuple[str, dict[bytes, dict[str, list[str]]]]:
    """What was compared, and {hash of the pixels as they are read: {split: names of the images that have them}}.

    Where there are too many pixels to decode them all, only those of files that are alike in length and in both ends
    are; a picture that was encoded twice then goes unseen.
    """
    suspects: dict[str, Sequence[int]] = {split: range(len(source)) for split, source in sources.items()}
    compared = "pixels"
    encoded = {split: source for split, source in sources.items() if isinstance(source, EncodedImages)}
    if encoded and sum(int(source.sizes.prod(1).sum()) for source in encoded.values()) > MANY_PIXELS:
        compared = "files"
        ends = {split: source.ends() for split, source in encoded.items()}
        times = Counter(end for several in ends.values() for end in several)
        suspects = {split: [i for i, end in enumerate(several) if times[end] > 1] for split, several in ends.items()}
    pictures: dict[bytes, dict[str, list[str]]] = {}
    for split, source in sources.items():
        digests = in_threads(partial(_pixel_hash, source), suspects[split])
        names = getattr(source, "files", None)
        for i, digest in zip(suspects[split], digests, strict=True):
            if digest is not None:
                pictures.setdefault(digest, {}).setdefault(split, []).append(printable(names[i]) if names else str(i))
    return compared, pictures


def _pixel_hash(source: ImageSource, i: int) -> bytes | None:
    """None for an image that cannot be read; the source notes which."""
    try:
        pixels = source.read(i)
    except Exception:  # damaged files make decoders raise almost anything, and a report is not the place to fail
        return None
    return hashlib.blake2b(str(pixels.shape).encode() + pixels.tobytes(), digest_size=16).digest()


def _model_info(folder: Path) -> dict[str, Any]:
    from latentdiff.checkpoints import META, load, read_meta
    from latentdiff.evaluation.records import default_sampler

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
    versions, imported = (meta.get(key) if isinstance(meta.get(key), dict) else {} for key in ("versions", "imported"))
    name = f"latentdiff {versions.get('latentdiff', '')}".strip()
    return f"{name}, imported from {imported['file']}" if "file" in imported else name


def _text_info(pipeline: Any) -> dict[str, Any] | None:
    if pipeline.text_encoder is None:
        return None
    encoder = pipeline.text_encoder
    length = pipeline.tokenizer.model_max_length
    return {"encoder": type(encoder).__name__, "tokens": length, "width": encoder.config.hidden_size}
