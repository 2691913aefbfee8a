"""Sharded training, torch's FSDP2: each process holds its rows of every weight, gradient, average and optimizer moment.

A split tensor is a DTensor, a whole one a plain tensor; what takes either leaves the plain one as it is, so that trainers
and states need not ask which they have.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from latentdiff.errors import UserError

# Variables by which accelerate's launcher asks for what would split the weights in another way, and their flags
OTHERS = {
    "ACCELERATE_USE_DEEPSPEED": "--use_deepspeed",
    "ACCELERATE_USE_MEGATRON_LM": "--use_megatron_lm",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "--use_parallelism_config",
}
# Flags beside --use_fsdp that would change what runs, and are not carried out
UNTAKEN = {
    "FSDP_OFFLOAD_PARAMS": ("--fsdp_offload_params", "leave it out"),
    "FSDP_ACTIVATION_CHECKPOINTING": ("--fsdp_activation_checkpointing", "set train.gradient_checkpointing=true instead"),
}


def asked() -> bool:
    """Whether `accelerate launch --use_fsdp` started this process. Accelerate itself (1.15) passes over that without a GPU."""
    return _is_set("ACCELERATE_USE_FSDP")


def sharded(accelerator: Any) -> bool:
    """Whether a run shards its network: where that is asked for and there is a group of processes, on GPUs or CPUs."""
    return asked() and accelerator.distributed_type.value != "NO"


def check_launch(shards: bool) -> None:
    """UserError for a launch that splits weights in a way that is not supported. shards: whether this run can shard at all.

    It looks at the launcher's variables, so that it can come ahead of accelerate, which imports what they name.
    """
    for variable, flag in OTHERS.items():
        if _is_set(variable):
            raise UserError(
                f"accelerate launch: {flag} is not supported; launch with --multi_gpu, or, where one device is too small for "
                "the U-Net, with --use_fsdp --fsdp_version 2"
            )
    if not asked():
        return
    if not shards:
        raise UserError("accelerate launch: --use_fsdp shards nothing but the training of stage 2; launch with --multi_gpu")
    version = os.environ.get("FSDP_VERSION", "1")
    if version != "2":
        raise UserError(f"accelerate launch: FSDP version {version} is not supported; add --fsdp_version 2")
    for variable, (flag, instead) in UNTAKEN.items():
        if _is_set(variable):
            raise UserError(f"accelerate launch: {flag} is not supported; {instead}")
    # By it some versions of transformers load a text encoder on the first process alone, for accelerate to share out
    os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"


def _is_set(variable: str) -> bool:
    return os.environ.get(variable, "false").lower() == "true"


class Cast(nn.Module):
    """A network under accelerate's autocast, as accelerate's prepare has it.

    Casts are not cached: the cache would keep on every device the whole weights that sharding lets go of after use.
    """

    def __init__(self, module: nn.Module, accelerator: Any):
        super().__init__()
        self.module, self.accelerator = module, accelerator

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        from accelerate.utils import AutocastKwargs

        with self.accelerator.autocast(AutocastKwargs(cache_enabled=False)):
            return self.module(*args, **kwargs)


def shard(network: nn.Module, accelerator: Any) -> Cast:
    """Split a network's parameters over the processes, in place and onto their devices; returns it under autocast.

    Blocks are gathered one at a time on the way through, and let go of again unless --fsdp_reshard_after_forward is false.
    An optimizer has to be made afterwards. Gradients come out as means over the processes, as DDP's do.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
    reshard = os.environ.get("FSDP_RESHARD_AFTER_FORWARD", "true").lower() == "true"
    for block in _blocks(network):
        fully_shard(block, mesh=mesh, reshard_after_forward=reshard)
    fully_shard(network, mesh=mesh, reshard_after_forward=reshard)
    return Cast(network, accelerator)


def _blocks(network: nn.Module) -> Iterator[nn.Module]:
    """The parts of a diffusers U-Net that are gathered by themselves, and a text encoder's layers where it has one beside."""
    unet = getattr(network, "unet", network)
    middle = [unet.mid_block] if unet.mid_block is not None else []
    yield from [*unet.down_blocks, *middle, *unet.up_blocks]
    if (encoder := getattr(network, "text_encoder", None)) is not None:
        for module in encoder.modules():
            if isinstance(module, nn.ModuleList):
                yield from module


def replicate(module: nn.Module, accelerator: Any) -> nn.Module:
    """A module that every process holds whole, its gradients averaged: DDP, which accelerate would not give beside FSDP."""
    return nn.parallel.DistributedDataParallel(module.to(accelerator.device))


def is_split(tensor: Tensor) -> bool:
    return hasattr(tensor, "full_tensor")  # a DTensor, told apart without importing it


def whole(tensor: Tensor) -> Tensor:
    """A tensor gathered from all processes, which all have to call this."""
    return tensor.full_tensor() if is_split(tensor) else tensor  # type: ignore[operator]


def local(tensor: Tensor) -> Tensor:
    """This process's rows of a tensor, in the same memory."""
    return tensor.to_local() if is_split(tensor) else tensor  # type: ignore[operator]


def split(tensor: Tensor, like: Tensor) -> Tensor:
    """A whole tensor, alike on every process, split as `like` is; where that is whole, the tensor itself."""
    if not is_split(like):
        return tensor
    from torch.distributed.tensor import DTensor

    mesh = like.device_mesh  # type: ignore[attr-defined]
    rows, rank = tensor.chunk(mesh.size()), mesh.get_local_rank()
    mine = rows[rank] if rank < len(rows) else tensor[:0]
    mine = mine.to(local(like).device, copy=True)
    placements = like.placements  # type: ignore[attr-defined]
    return DTensor.from_local(mine, mesh, placements, run_check=False, shape=like.shape, stride=like.stride())


def gathered(tensors: Mapping[str, Mapping[str, Tensor]], keep: bool) -> dict[str, dict[str, Tensor]]:
    """Groups of tensors, each whole, the split ones on the CPU. Every process calls it, and gets them where `keep`.

    One at a time: no device holds more than one of them besides its own rows.
    """
    found: dict[str, dict[str, Tensor]] = {}
    for name, group in tensors.items():
        found[name] = {}
        for key, tensor in group.items():
            one = whole(tensor)
            if keep:
                found[name][key] = one.cpu() if is_split(tensor) else one
    return found


@torch.no_grad()
def fill(module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Put a network's weights, split or whole, into a whole copy of it, one at a time. Every process calls it."""
    targets = module.state_dict()
    for key, tensor in tensors.items():
        targets[key].copy_(whole(tensor))
