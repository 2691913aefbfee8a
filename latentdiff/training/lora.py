"""LoRA (arXiv:2106.09685): low-rank changes of a pretrained U-Net are trained, averaged and saved, and nothing else.

A run's states hold the LoRA's weights alone, and refer to the U-Net below (the base) by a checksum of its files.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Collection
from typing import Any

import torch
from safetensors.torch import save
from torch import nn

from latentdiff.config import DiffusionConfig, LoraConfig
from latentdiff.errors import UserError
from latentdiff.models.loading import quiet, weight_files
from latentdiff.models.unet import find_pretrained
from latentdiff.training import distributed
from latentdiff.utils.hashes import sha256_of
from latentdiff.utils.random import derive_seed

FILE = "pytorch_lora_weights.safetensors"  # the name that diffusers looks for
ADAPTER = "default"  # PEFT's name of the one LoRA of a U-Net
PREFIX = "unet."  # before the names in the file: diffusers keeps LoRAs of several networks in one
KINDS = (nn.Linear, nn.Conv2d)  # layers that can be changed


def check(config: DiffusionConfig) -> None:
    """UserError, before anything is encoded, for a LoRA that cannot be trained. Nothing is checked without model.lora."""
    lora = config.model.lora
    if lora is None:
        return
    if config.model.pretrained is None:
        raise UserError("model.lora: changes a trained U-Net; name it by model.pretrained, or leave model.lora out")
    start = find_pretrained(config)
    if start.kind.__name__ != "UNet2DConditionModel":
        raise UserError(
            f"model.lora: the U-Net of model.pretrained {start.name} is a {start.kind.__name__}, and diffusers loads LoRAs "
            "into a UNet2DConditionModel alone; leave model.lora out to train all its weights"
        )
    if config.condition.includes("text") and config.condition.text.encoder is None:
        raise UserError(
            "condition.text.encoder: a LoRA holds no text encoder, so name the one that the U-Net of model.pretrained "
            f"{start.name} was trained with"
        )
    if config.model.match_classes:
        raise UserError("model.match_classes: a LoRA holds no class embedding; leave it out, or leave model.lora out")
    if distributed.fsdp_requested():
        raise UserError("model.lora: is not sharded by accelerate launch --use_fsdp; launch with --multi_gpu")
    try:
        import peft  # noqa: F401
    except ImportError:
        raise UserError("model.lora: needs PEFT; install it by pip install 'latentdiff[lora]'") from None
    with quiet(), torch.device("meta"):
        check_targets(start.kind.from_config(start.config), lora.targets)  # type: ignore[attr-defined]


def check_targets(unet: nn.Module, targets: list[str]) -> None:
    """UserError unless each target is the end of the name of some layer, and of none that cannot be changed."""
    for target in targets:
        layers = {name: m for name, m in unet.named_modules() if name == target or name.endswith(f".{target}")}
        wrong = [f"{name} is a {type(module).__name__}" for name, module in layers.items() if not isinstance(module, KINDS)]
        if wrong or not layers:
            ends = sorted({".".join(name.split(".")[-2:]) for name, m in unet.named_modules() if isinstance(m, KINDS)})
            shown = ", ".join(end.split(".")[-1] if not end[-1].isdecimal() else end for end in ends[:40])
            problem = wrong[0] if wrong else "is the end of no layer's name"
            raise UserError(f"model.lora.targets: {target}: {problem}; valid are ends of Linear and Conv2d layers: {shown}")


def add_lora(unet: Any, lora: LoraConfig, seed: int) -> set[str]:
    """Freeze a U-Net and put a new LoRA into it, in place; returns the names of the weights that are trained.

    seed: of the run; the first weights A follow from it. B is 0, so that the network computes what it did.
    """
    import peft

    unet.requires_grad_(False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(seed, "lora"))
        alpha: Any = lora.scale * lora.rank  # PEFT's annotation says int, and it divides any number by the rank
        unet.add_adapter(peft.LoraConfig(r=lora.rank, lora_alpha=alpha, target_modules=list(lora.targets)), ADAPTER)
    return {name for name, parameter in unet.named_parameters() if parameter.requires_grad}


@torch.no_grad()
def share_base(copied: nn.Module, module: nn.Module, trained: Collection[str]) -> None:
    """Let a copy of a module use the module's own memory for every weight but the trained ones."""
    own = module.state_dict()
    for name, tensor in [*copied.named_parameters(), *copied.named_buffers()]:
        if name in own and name not in trained:
            tensor.data = own[name]


def base_fingerprint(config: DiffusionConfig) -> str:
    """Hex sha256 over config.json and the weights of the U-Net of model.pretrained."""
    folder = find_pretrained(config).folder
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    for file in weight_files(folder)[1]:
        digest.update(bytes.fromhex(sha256_of(file)))
    return digest.hexdigest()


def lora_file(unet: nn.Module) -> bytes:
    """The LoRA in a U-Net as the safetensors file that diffusers' `load_lora_weights` reads, in float32.

    The factor alpha / rank is multiplied into B, as programs that know no alpha take it for 1.
    """
    from peft.tuners.lora import LoraLayer

    tensors: dict[str, Any] = {}
    for name, layer in unet.named_modules():
        if isinstance(layer, LoraLayer):
            tensors[f"{PREFIX}{name}.lora_A.weight"] = layer.lora_A[ADAPTER].weight
            tensors[f"{PREFIX}{name}.lora_B.weight"] = layer.lora_B[ADAPTER].weight * layer.scaling[ADAPTER]
    return save({key: value.detach().float().cpu().contiguous() for key, value in tensors.items()}, {"format": "pt"})


def merged(unet: Any) -> Any:
    """A copy of a U-Net with its LoRA added to the weights: an ordinary U-Net that computes the same."""
    whole = copy.deepcopy(unet)
    whole.fuse_lora()
    whole.unload_lora()
    return whole
