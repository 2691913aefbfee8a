"""A folder in Stable Diffusion's layout with random weights, made by diffusers alone, and its weights as one original file."""

import json
import re
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel

from latentdiff.models.text_encoder import train_tokenizer

BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
WEIGHTS = "diffusion_pytorch_model.safetensors"
LENGTH, WIDTH = 8, 8  # tokens of a prompt, their states' width
EXTRAS = {
    "safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"],
    "feature_extractor": ["transformers", "CLIPFeatureExtractor"],
    "requires_safety_checker": True,
}


def stable_parts(seed: int = 0) -> dict[str, Any]:
    """Components of a small StableDiffusionPipeline: images 3x16x16, latents 4x8x8, two U-Net levels."""
    words = ["horizontal vertical diagonal blank stripes", "a picture of"]
    tokenizer = train_tokenizer(words, 320, LENGTH)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        unet = UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(8, 16),
            layers_per_block=1,
            cross_attention_dim=WIDTH,
            attention_head_dim=2,
            norm_num_groups=4,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        )
        vae = AutoencoderKL(
            block_out_channels=(8, 16),
            latent_channels=4,
            down_block_types=("DownEncoderBlock2D",) * 2,
            sample_size=16,
            up_block_types=("UpDecoderBlock2D",) * 2,
            norm_num_groups=4,
        )
        sizes = dict(hidden_size=WIDTH, intermediate_size=16, num_attention_heads=2, num_hidden_layers=1)
        ends = dict(bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id)
        config = CLIPTextConfig(**sizes, **ends, vocab_size=len(tokenizer), max_position_embeddings=LENGTH)
        encoder = CLIPTextModel(config)
        with torch.no_grad():  # wide enough apart that prompts make a difference
            encoder.get_input_embeddings().weight.normal_()
    scheduler = DDIMScheduler(**BETAS, clip_sample=False, set_alpha_to_one=False, steps_offset=1)
    return {"unet": unet, "vae": vae, "text_encoder": encoder, "tokenizer": tokenizer, "scheduler": scheduler}


def write_stable(folder: Path, saving: dict[str, Any] | None = None, **changes: Any) -> Path:
    """Such a folder, with the entries that published ones have besides. saving: keywords of save_pretrained."""
    extra = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    StableDiffusionPipeline(**{**stable_parts(), **changes}, **extra).save_pretrained(folder, **(saving or {}))
    change_json(folder / "model_index.json", **EXTRAS)
    return folder


def open_stock(folder: Path) -> StableDiffusionPipeline:
    """The folder in unmodified diffusers, in float32 and without its bar."""
    parts = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    pipe = StableDiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float32, **parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def change_json(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def write_original(folder: Path, file: Path, averaged: bool = False) -> Path:
    """The weights of such a folder as CompVis' code names them, in one file: the inverse of diffusers' converter.

    averaged: with another U-Net besides, as model_ema., 2 above the first.
    """
    unet, vae = (load_file(folder / part / WEIGHTS) for part in ("unet", "vae"))
    text = load_file(folder / "text_encoder" / "model.safetensors")
    layers = json.loads((folder / "unet" / "config.json").read_text())["layers_per_block"]
    levels = len(json.loads((folder / "vae" / "config.json").read_text())["block_out_channels"])
    state: dict[str, Tensor] = {"alphas_cumprod": torch.linspace(1, 0, 1000)}
    for name, value in unet.items():
        original = original_unet_name(name, layers, {n.split(".attentions.")[0] for n in unet if ".attentions." in n})
        state[f"model.diffusion_model.{original}"] = value
        if averaged:
            state["model_ema.diffusion_model" + original.replace(".", "")] = value + 2
    for name, value in vae.items():
        original = original_vae_name(name, levels)
        linear = "attn_1" in original and value.ndim == 2  # a 1x1 convolution there
        state[f"first_stage_model.{original}"] = value[:, :, None, None] if linear else value
    for name, value in text.items():
        state[f"cond_stage_model.transformer.text_model.{name.removeprefix('text_model.')}"] = value
    state["cond_stage_model.transformer.text_model.embeddings.position_ids"] = torch.arange(LENGTH)[None]
    save_file({key: value.contiguous() for key, value in state.items()}, file)
    return file


def original_unet_name(name: str, layers: int, attending: set[str]) -> str:
    """attending: the blocks with attention, such as up_blocks.1."""
    fixed = {
        "time_embedding.linear_1": "time_embed.0",
        "time_embedding.linear_2": "time_embed.2",
        "conv_in": "input_blocks.0.0",
        "conv_norm_out": "out.0",
        "conv_out": "out.2",
    }
    part, _, ending = name.rpartition(".")
    if part in fixed:
        return f"{fixed[part]}.{ending}"
    for ours, theirs in (
        ("norm1", "in_layers.0"),
        ("conv1", "in_layers.2"),
        ("norm2", "out_layers.0"),
        ("conv2", "out_layers.3"),
        ("time_emb_proj", "emb_layers.1"),
        ("conv_shortcut", "skip_connection"),
    ):
        if ".resnets." in name:
            name = name.replace(f".{ours}.", f".{theirs}.")
    if found := re.match(r"mid_block\.(resnets|attentions)\.(\d)\.", name):
        place = 1 if found[1] == "attentions" else 2 * int(found[2])
        return f"middle_block.{place}." + name[found.end() :]
    found = re.match(r"(down|up)_blocks\.(\d)\.(resnets|attentions|downsamplers|upsamplers)\.(\d)\.", name)
    assert found, name
    block, layer, rest = int(found[2]), int(found[4]), name[found.end() :]
    if found[3] == "downsamplers":
        return f"input_blocks.{(block + 1) * (layers + 1)}.0.op." + rest.removeprefix("conv.")
    if found[3] == "upsamplers":
        last = block * (layers + 1) + layers
        return f"output_blocks.{last}.{2 if f'up_blocks.{block}' in attending else 1}." + rest
    first = "input_blocks" if found[1] == "down" else "output_blocks"
    return f"{first}.{block * (layers + 1) + layer + (found[1] == 'down')}.{int(found[3] == 'attentions')}." + rest


def original_vae_name(name: str, levels: int) -> str:
    for ours, theirs in (
        (r"conv_norm_out\.", "norm_out."),
        (r"conv_shortcut\.", "nin_shortcut."),
        (r"mid_block\.attentions\.0\.", "mid.attn_1."),
        (r"down_blocks\.(\d)\.resnets\.", r"down.\1.block."),
        (r"down_blocks\.(\d)\.downsamplers\.0\.", r"down.\1.downsample."),
        (r"group_norm\.", "norm."),
        (r"to_out\.0\.", "proj_out."),
        (r"to_([qkv])\.", r"\1."),
    ):
        name = re.sub(ours, theirs, name)
    name = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", name)
    place = {"resnets": "block.", "upsamplers": "upsample."}
    return re.sub(
        r"up_blocks\.(\d)\.(resnets\.|upsamplers\.0\.)",
        lambda m: f"up.{levels - 1 - int(m[1])}.{place[m[2].split('.')[0]]}",
        name,
    )
