"""A base in Stable Diffusion's layout whose autoencoder fits three captioned pictures, and a config of a LoRA on it."""

from pathlib import Path
from typing import Any

from PIL import Image
from stripes import stripe_pixels
from tiny_runs import change, diffusion_tree
from tiny_stable import change_json, write_stable

from latentdiff.config import parse_config
from latentdiff.models.autoencoder import load_autoencoder
from latentdiff.models.codec import LatentCodec
from latentdiff.training.images import Images

CAPTIONS = ("horizontal stripes", "vertical stripes", "diagonal stripes")


def write_sidecars(root: Path, count: int = 3, captions: bool = True) -> Path:
    """`count` colour PNGs of 16x16, each with its caption in a text file beside it."""
    root.mkdir(parents=True)
    for k, pixels in enumerate(stripe_pixels(count, 0, 16)[0]):
        Image.fromarray(pixels[..., 0]).convert("RGB").save(root / f"{k}.png")
        if captions:
            (root / f"{k}.txt").write_text(CAPTIONS[k % len(CAPTIONS)])
    return root


def write_base(folder: Path, data: Path, **changes: Any) -> Path:
    """Such a folder; its scaling_factor is right for `data`, as SD's 0.18215 is for photographs. changes: of its parts."""
    write_stable(folder, **changes)
    config = parse_config(diffusion_tree(data, folder, folder, data__channels=3))
    images = Images(config.data, 2).train
    mean, std = LatentCodec(load_autoencoder(str(folder))).moments(images.batch(range(len(images)))[0])
    scale = float((mean.square() + std.square()).mean().rsqrt())
    change_json(folder / "vae" / "config.json", scaling_factor=scale)
    return folder


def lora_tree(data: Path, base: Path, output: Path, **changes: Any) -> dict[str, Any]:
    """A stage-2 config of 4 steps that trains a LoRA of rank 4 on `base`, at a rate at which pictures change."""
    tree = diffusion_tree(data, output, base, data__channels=3, train__steps=4, train__batch_size=4, optimizer__lr=0.05)
    tree["model"] = {"pretrained": str(base), "lora": {"rank": 4}}
    tree["schedule"] = "ddpm-scaled-linear"
    tree["condition"] = {"type": "text", "text": {"encoder": str(base)}}
    return change(tree, changes)
