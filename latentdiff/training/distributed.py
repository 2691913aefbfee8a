"""Sharded training by torch's FSDP2: each process holds its rows of every weight, gradient, average and optimizer moment.

A sharded tensor is a DTensor. The functions here take plain tensors too and leave them as they are, so that trainers and
training states need not know which they have.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from latentdiff.errors import UserError

# Environment variables by which accelerate's launcher asks for other ways to split the weights, and its flags for them
OTHERS = {
    "ACCELERATE_USE_DEEPSPEED": "--use_deepspeed",
    "ACCELERATE_USE_MEGATRON_LM": "--use_megatron_lm",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "--use_parallelism_config",
}
# Flags beside --use_fsdp that are not supported, and what to do instead
UNSUPPORTED = {
    "FSDP_OFFLOAD_PARAMS": ("--fsdp_offload_params", "leave it out"),
    "FSDP_ACTIVATION_CHECKPOINTING": ("--fsdp_activation_checkpointing", "set train.gradient_checkpointing=true instead"),
}


def fsdp_requested() -> bool:
    """Whether `accelerate launch --use_fsdp` started this process. Accelerate 1.15 itself ignores the flag without a GPU."""
    return _is_set("ACCELERATE_USE_FSDP")


def sharded(accelerator: Any) -> bool:
    """Whether a run shards its network: the launcher asks for it, and there are several processes, on GPUs or CPUs."""
    return fsdp_requested() and accelerator.distributed_type.value != "NO"


def check_launch(shards: bool) -> None:
    """UserError where the launcher asks for a way to split weights that is not supported.

    It reads the launcher's environment variables, and so can run before accelerate imports what they name.
    shards: whether this run can shard its network at all.
    """
    for variable, flag in OTHERS.items():
        if _is_set(variable):
            raise UserError(
                f"accelerate launch: {flag} is not supported; launch with --multi_gpu, or, where one device is too small for "
                "the U-Net, with --use_fsdp --fsdp_version 2"
            )
    if not fsdp_requested():
        return
    if not shards:
        raise UserError("accelerate launch: --use_fsdp shards nothing but the training of stage 2; launch with --multi_gpu")
    version = os.environ.get("FSDP_VERSION", "1")
    if version != "2":
        raise UserError(f"accelerate launch: FSDP version {version} is not supported; add --fsdp_version 2")
    for variable, (flag, instead) in UNSUPPORTED.items():
        if _is_set(variable):
            raise UserError(f"accelerate launch: {flag} is not supported; {instead}")
    # With it some versions of transformers would load a text encoder on the first process alone, for accelerate to send
    os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"


def _is_set(variable: str) -> bool:
    return os.environ.get(variable, "false").lower() == "true"


class Cast(nn.Module):
    """A network under accelerate's autocast, as `Accelerator.prepare` would return it.

    Casts are not cached: the cache would keep whole weights on every device, which sharding frees after use.
    """

    def __init__(self, module: nn.Module, accelerator: Any):
        super().__init__()
        self.module, self.accelerator = module, accelerator

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        from accelerate.utils import AutocastKwargs

        with self.accelerator.autocast(AutocastKwargs(cache_enabled=False)):
            return self.module(*args, **kwargs)


def shard(network: nn.Module, accelerator: Any) -> Cast:
    """Shard a network's parameters over the processes, in place and on their devices; returns it under autocast.

    In a forward pass the blocks are gathered one at a time, and freed again unless --fsdp_reshard_after_forward is false.
    Gradients are means over the processes, as with DDP. Make the optimizer afterwards: it has to hold the shards.
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
    """The modules that are gathered one by one: the blocks of a diffusers U-Net, and the layers of its text encoder."""
    unet = getattr(network, "unet", network)
    middle = [unet.mid_block] if unet.mid_block is not None else []
    yield from [*unet.down_blocks, *middle, *unet.up_blocks]
    if (encoder := getattr(network, "text_encoder", None)) is not None:
        for module in encoder.modules():
            if isinstance(module, nn.ModuleList):
                yield from module


def replicate(module: nn.Module, accelerator: Any) -> nn.Module:
    """A module that every process holds whole, with averaged gradients (DDP). Accelerate has no DDP beside FSDP."""
    return nn.parallel.DistributedDataParallel(module.to(accelerator.device))


def is_split(tensor: Tensor) -> bool:
    """Whether a tensor is sharded."""
    return hasattr(tensor, "full_tensor")  # only a DTensor has it; to import that class takes time


def whole(tensor: Tensor) -> Tensor:
    """The whole of a tensor, gathered from all processes. Every process calls it."""
    return tensor.full_tensor() if is_split(tensor) else tensor  # type: ignore[operator]


def local(tensor: Tensor) -> Tensor:
    """This process's rows of a tensor. They share its memory."""
    return tensor.to_local() if is_split(tensor) else tensor  # type: ignore[operator]


def split(tensor: Tensor, like: Tensor) -> Tensor:
    """A whole tensor, equal on every process, sharded as `like` is. Where `like` is not sharded, the tensor itself."""
    if not is_split(like):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    # The copy lets go of the whole tensor, of which the rows are a part
    mesh, placements = like.device_mesh, like.placements  # type: ignore[attr-defined]
    return distribute_tensor(tensor, mesh, placements, src_data_rank=None).clone()


def gathered(tensors: Mapping[str, Mapping[str, Tensor]], keep: bool) -> dict[str, dict[str, Tensor]]:
    """Groups of tensors, {name: {key: tensor}}, with every tensor whole; those that were sharded lie on the CPU.

    Every process calls it; those with keep=False get empty groups. Tensors are gathered one at a time, so no device holds
    more than one whole tensor besides its own rows.
    """
    gathered_groups: dict[str, dict[str, Tensor]] = {name: {} for name in tensors}
    for name, group in tensors.items():
        for key, tensor in group.items():
            whole_tensor = whole(tensor)
            if keep:
                gathered_groups[name][key] = whole_tensor.cpu() if is_split(tensor) else whole_tensor
    return gathered_groups


@torch.no_grad()
def fill(module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Copy a network's weights, sharded or whole, into `module`, a whole copy of the network. Every process calls it."""
    targets = module.state_dict()
    for key, tensor in tensors.items():
        targets[key].copy_(whole(tensor))
