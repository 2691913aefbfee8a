"""Training runs small enough for a test: stripes as image files, and configs of both stages that take a second."""

from pathlib import Path
from typing import Any

import yaml
from PIL import Image
from stripes import CLASSES, stripe_pixels

from latentdiff.config import parse_config

SIZE = 16
SMALL_VQ: dict[str, Any] = {  # changes of an autoencoder's config: a VQModel of six codes
    "model__type": "VQModel",
    "model__config": {
        "block_out_channels": [8, 8],
        "layers_per_block": 1,
        "latent_channels": 2,
        "num_vq_embeddings": 6,
        "norm_num_groups": 4,
        "mid_block_add_attention": False,
    },
}


def write_stripes(root: Path, count: int = 48, size: int = SIZE, seed: int = 0) -> Path:
    """`count` grey PNGs of size x size in three class sub-folders."""
    pixels, labels = stripe_pixels(count, seed, size)
    for k, (image, label) in enumerate(zip(pixels, labels.tolist(), strict=True)):
        folder = root / CLASSES[label]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image[..., 0]).save(folder / f"{k:03d}.png")
    return root


def autoencoder_tree(data: Path, output: Path, **changes: Any) -> dict[str, Any]:
    """A stage-1 config: grey 16x16 images to latents 2x8x8. changes: dotted keys, written with __ for the dots."""
    tree: dict[str, Any] = {
        "stage": "autoencoder",
        "output": str(output),
        "data": {"source": str(data), "size": [SIZE, SIZE], "channels": 1, "held_out": 0.25},
        "model": {
            "type": "AutoencoderKL",
            "config": {
                "block_out_channels": [8, 8],
                "layers_per_block": 1,
                "latent_channels": 2,
                "norm_num_groups": 4,
                "mid_block_add_attention": False,
            },
        },
        "loss": {"l1": 1.0, "l2": 1.0, "kl": 1e-5},
        "optimizer": {"lr": 5e-3},
        "ema": {"decay": 0.9},
        "train": {"steps": 6, "batch_size": 8, "precision": "float32", "threads": 1, "log_every": 1, "picture_every": 1000},
    }
    return change(tree, changes)


def diffusion_tree(data: Path, output: Path, autoencoder: Path, **changes: Any) -> dict[str, Any]:
    """A stage-2 config on the latents of `autoencoder`, its cache inside output."""
    tree: dict[str, Any] = {
        "stage": "diffusion",
        "output": str(output),
        "autoencoder": str(autoencoder),
        "data": {"source": str(data), "size": [SIZE, SIZE], "channels": 1, "held_out": 0.25},
        "model": {
            "type": "UNet2DModel",
            "config": {
                "block_out_channels": [8, 16],
                "layers_per_block": 1,
                "norm_num_groups": 4,
                "add_attention": False,
                "down_block_types": ["DownBlock2D", "DownBlock2D"],
                "up_block_types": ["UpBlock2D", "UpBlock2D"],
            },
        },
        "optimizer": {"lr": 5e-3},
        "ema": {"decay": 0.9},
        "train": {"steps": 6, "batch_size": 8, "precision": "float32", "threads": 1, "log_every": 1, "picture_every": 1000},
        "sample": {"steps": 2, "per_class": 1},
    }
    return change(tree, changes)


def discrete_tree(data: Path, output: Path, autoencoder: Path, **changes: Any) -> dict[str, Any]:
    """A stage-2 config on the codes of `autoencoder`, a VQModel."""
    return diffusion_tree(data, output, autoencoder, **{"stage": "discrete", "optimizer__lr": 1e-2, **changes})


def change(tree: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    for key, value in changes.items():
        *parents, last = key.split("__")
        node = tree
        for name in parents:
            node = node.setdefault(name, {})
        node[last] = value
    return tree


def autoencoder_config(data: Path, output: Path, **changes: Any):
    return parse_config(autoencoder_tree(data, output, **changes))


def diffusion_config(data: Path, output: Path, autoencoder: Path, **changes: Any):
    return parse_config(diffusion_tree(data, output, autoencoder, **changes))


def discrete_config(data: Path, output: Path, autoencoder: Path, **changes: Any):
    return parse_config(discrete_tree(data, output, autoencoder, **changes))


def write_yaml(path: Path, tree: dict[str, Any]) -> Path:
    path.write_text(yaml.safe_dump(tree))
    return path


def tree(folder: Path) -> dict[Path, bytes]:
    """Every file under a folder with its bytes."""
    return {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
