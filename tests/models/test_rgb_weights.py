"""The autoencoder and the feature network for colour pictures that ship: whole, good enough, and with their sources named."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image, ImageDraw
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from latentdiff.errors import UserError
from latentdiff.evaluation.image_quality import psnr
from latentdiff.models.autoencoder import load_autoencoder
from latentdiff.models.codec import LatentCodec
from latentdiff.models.feature_net import load_features
from latentdiff.utils.hashes import check_hashes

ROOT = Path(__file__).parents[2]
RGB, FEATURES = ROOT / "weights" / "autoencoder-rgb", ROOT / "weights" / "rgb-features"
WEIGHTS = "diffusion_pytorch_model.safetensors"
LEAST_DB = {"shapes": 27.8, "emoji": 30.6, "clouds": 31.3, "checks": 20.3}  # about half a dB less than it has
FREE = {"CC0-1.0", "public domain", "MIT", "Apache-2.0", "BSD-3-Clause", "CC BY 2.0", "CC BY 3.0", "CC BY 4.0"}


def tensor(pictures: list[Image.Image]) -> torch.Tensor:
    """float32 [B, 3, 64, 64] in [-1, 1]."""
    return torch.from_numpy(np.stack([np.asarray(p) for p in pictures])).permute(0, 3, 1, 2) / 127.5 - 1


def shapes() -> torch.Tensor:
    pictures = []
    for k, color in enumerate(("crimson", "gold", "seagreen", "navy")):
        large = Image.new("RGB", (256, 256), "white")
        pen = ImageDraw.Draw(large)
        pen.ellipse((30 + 10 * k, 40, 200, 210), fill=color, outline="black", width=12)
        pen.polygon([(120, 60), (230, 220), (60, 180)], fill=("orange", "skyblue", "violet", "white")[k])
        pictures.append(large.resize((64, 64), Image.Resampling.LANCZOS))
    return tensor(pictures)


def emoji() -> torch.Tensor:
    """Drawn emoji and writing: pieces of the picture of the model that ships."""
    grid = Image.open(ROOT / "weights" / "emoji" / "grid.png").convert("RGB")
    return tensor([grid.crop((x, grid.height - 200, x + 128, grid.height - 72)).resize((64, 64)) for x in (300, 500, 700)])


def clouds() -> torch.Tensor:
    """Smooth colour noise, as in the sky of a photograph."""
    noise = torch.randn((4, 3, 9, 9), generator=torch.Generator().manual_seed(0))
    return F.interpolate(noise, size=64, mode="bicubic", align_corners=True).mul(0.4).clamp(-1, 1)


def checks() -> torch.Tensor:
    """Edges of every place within a block of 8x8 pixels."""
    rows, columns = torch.meshgrid(torch.arange(64), torch.arange(64), indexing="ij")
    boards = torch.stack([((rows // side + columns // side) % 2).float() for side in (7, 11, 13)])
    low, high = torch.tensor([-0.6, 0.1, 0.4]), torch.tensor([0.7, 0.5, -0.3])
    return low[:, None, None] + boards[:, None] * (high - low)[:, None, None]


PICTURES = {"shapes": shapes, "emoji": emoji, "clouds": clouds, "checks": checks}


@pytest.fixture(scope="module")
def codec() -> LatentCodec:
    return LatentCodec(load_autoencoder("weights/autoencoder-rgb"))


@pytest.mark.parametrize("kind", PICTURES)
def test_it_reconstructs(codec, kind):
    x = PICTURES[kind]()
    decibels = psnr(codec.reconstruct(x).clamp(-1, 1), x)
    assert decibels.mean() >= LEAST_DB[kind]


def test_its_latents_are_what_a_denoiser_expects(codec):
    assert (codec.factor, codec.latent_channels, codec.image_channels) == (8, 24, 3)
    z = torch.cat([codec.latents(draw(), torch.Generator().manual_seed(0)) for draw in PICTURES.values()])
    assert 0.5 < z.square().mean() < 2
    assert z.abs().max() < 12


def test_stock_diffusers_reconstructs_the_same(codec):
    stock = AutoencoderKL.from_pretrained(RGB, torch_dtype=torch.float32)
    with torch.inference_mode():
        x = shapes()
        torch.testing.assert_close(stock.decode(stock.encode(x).latent_dist.mode()).sample, codec.reconstruct(x))
    assert stock.config.scaling_factor == 1
    assert set(stock.config.latents_mean) == {0.0}
    assert set(stock.config.latents_std) == {1.0}


def test_the_files_are_small_whole_and_of_16_bits(tmp_path):
    assert sum(file.stat().st_size for file in RGB.iterdir()) <= 12 << 20
    check_hashes([RGB / WEIGHTS, FEATURES / "model.safetensors"])
    weights = load_file(RGB / WEIGHTS)
    assert {weight.dtype for weight in weights.values()} == {torch.float16}
    shutil.copytree(RGB, tmp_path / "copy")
    name = "decoder.conv_out.weight"
    save_file({**weights, name: weights[name] * 1.01}, tmp_path / "copy" / WEIGHTS)
    with pytest.raises(UserError, match="damaged"):
        load_autoencoder(str(tmp_path / "copy"))


def test_the_feature_network_takes_colour_and_tells_pictures_apart():
    net = load_features(FEATURES)
    assert (net.name, net.channels) == ("rgb-features", 3)
    kinds = [draw() for draw in PICTURES.values()]
    with torch.inference_mode():
        features = F.normalize(torch.cat([net.features(x) for x in kinds]), dim=1)
    owner = torch.repeat_interleave(torch.arange(len(kinds)), torch.tensor([len(x) for x in kinds]))
    nearest = (features @ features.T).fill_diagonal_(-1).argmax(1)
    assert (owner[nearest] == owner).float().mean() >= 0.9


def test_the_card_names_every_source_and_its_licence():
    sources = json.loads((RGB / "sources.json").read_text())
    card = (RGB / "README.md").read_text()
    for source in sources:
        assert set(source["licences"]) <= FREE, source
        row = f"| `{source['package']}` | {source['from']} | {source['pictures_of']} | "
        assert f"{row}{', '.join(source['licences'])} | {source['pictures']:,} |\n" in card
    assert sum(source["pictures"] for source in sources) > 10_000
    assert {"scikit-learn", "openclipart-png", "emoji-datasource-google"} <= {source["package"] for source in sources}
    held_out = {"emoji-datasource-twitter", "arcade", "scikit-image", "@tabler/preview"}
    assert not held_out & {source["package"] for source in sources}
    assert all(f"`{name}`" in card for name in held_out)
    assert "(../autoencoder-rgb/README.md" in (FEATURES / "README.md").read_text()
