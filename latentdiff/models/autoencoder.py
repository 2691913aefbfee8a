"""Build, load and freeze first stages: diffusers autoencoders by name, and the latent normaliser folded into a KL one."""

from __future__ import annotations

import contextlib
import difflib
import inspect
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from latentdiff.errors import UserError
from latentdiff.models.loading import load_part, quiet, read_json
from latentdiff.utils import atomic

TRAINABLE = ("AutoencoderKL", "VQModel")
LOADABLE = ("AutoencoderKL", "VQModel", "AutoencoderTiny", "AutoencoderDC")


def diffusers_class(name: str, allowed: tuple[str, ...], where: str) -> type:
    """The diffusers class called `name`; UserError naming `where` and the allowed names otherwise."""
    if name not in allowed:
        raise UserError(f"{where}: {name!r} is not one of {', '.join(allowed)}")
    import diffusers

    return getattr(diffusers, name)


def checked_arguments(cls: type, config: dict[str, Any], where: str) -> dict[str, Any]:
    """`config` if every key is a constructor argument of `cls`; UserError naming the nearest valid key otherwise."""
    valid = [name for name in inspect.signature(cls).parameters if name != "self"]
    for key in config:
        if key not in valid:
            near = difflib.get_close_matches(key, valid, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]!r}?" if near else f"valid keys: {', '.join(valid)}"
            raise UserError(f"{where}.{key}: unknown argument of {cls.__name__}; {hint}")
    return config


def build_autoencoder(type_name: str, config: dict[str, Any], channels: int, initial_logvar: float | None) -> nn.Module:
    """A fresh AutoencoderKL or VQModel with `channels` image channels.

    initial_logvar: for AutoencoderKL, the posterior's log-variance at the start. Starting small keeps early
    reconstruction from drowning in posterior noise; the KL term raises it where a channel carries nothing.
    """
    cls = diffusers_class(type_name, TRAINABLE, "model.type")
    arguments = {"in_channels": channels, "out_channels": channels, **checked_arguments(cls, config, "model.config")}
    blocks = arguments.get("block_out_channels")
    if blocks is not None:  # the block types follow from the channels unless they are given
        arguments.setdefault("down_block_types", ["DownEncoderBlock2D"] * len(blocks))
        arguments.setdefault("up_block_types", ["UpDecoderBlock2D"] * len(blocks))
    try:
        vae = cls(**{key: tuple(v) if isinstance(v, list) else v for key, v in arguments.items()})
    except (ValueError, TypeError, AssertionError, ZeroDivisionError) as error:
        raise UserError(f"model.config: {cls.__name__} refuses it: {' '.join(str(error).split())}") from None
    if type_name == "AutoencoderKL" and (vae.quant_conv is None or vae.post_quant_conv is None):
        raise UserError("model.config: use_quant_conv and use_post_quant_conv must be true, the normaliser is folded into them")
    if type_name == "AutoencoderKL" and initial_logvar is not None:
        with torch.no_grad():
            vae.quant_conv.weight[vae.config.latent_channels :] = 0.0
            vae.quant_conv.bias[vae.config.latent_channels :] = initial_logvar
    return vae


def load_autoencoder(where: str, verify: bool = True) -> nn.Module:
    """A pretrained first stage, frozen: a diffusers autoencoder's folder, a pipeline's folder (its vae/), or a Hub name.

    verify: hold a folder's weights against the hashes beside them. Raises UserError naming the path when there is none, or
    when its weights cannot be read.
    """
    found, folder = autoencoder_folder(where), Path(where)
    if found is not None:
        return _load_folder(found, verify)
    if folder.exists() or where.count("/") != 1 or where.startswith((".", "/")):
        raise UserError(
            f"{where}: no autoencoder there; expected a folder with config.json (or autoencoder/ or vae/), or a Hub name"
        )
    for subfolder in ("", "vae"):  # an autoencoder's repository, or a pipeline's
        with contextlib.suppress(OSError):
            return _from_hub(where, subfolder)
    raise UserError(f"{where}: neither a folder nor a diffusers autoencoder on the Hub that can be reached")


def autoencoder_folder(where: str) -> Path | None:
    """The folder of the weights that `where` names: itself, or its autoencoder/ or vae/; None where it is no such folder."""
    candidates = (Path(where) / "autoencoder", Path(where) / "vae", Path(where))
    for published in (candidates[2], candidates[0]):
        atomic.put_back(published)  # a process may have been killed between the two renames that publish a folder
    return next((folder for folder in candidates if (folder / "config.json").is_file()), None)


def _load_folder(folder: Path, verify: bool) -> nn.Module:
    name = read_json(folder / "config.json").get("_class_name", "")
    kind = diffusers_class(name, LOADABLE, f"{folder / 'config.json'}: _class_name")
    return freeze(load_part(folder, kind, verify=verify))


def _from_hub(where: str, subfolder: str) -> nn.Module:
    import diffusers

    config = diffusers.AutoencoderKL.load_config(where, subfolder=subfolder)
    cls: Any = diffusers_class(config.get("_class_name", "AutoencoderKL"), LOADABLE, where)
    with quiet():
        vae, info = cls.from_pretrained(
            where, subfolder=subfolder, use_safetensors=True, low_cpu_mem_usage=False, output_loading_info=True
        )
    if info["missing_keys"]:  # diffusers would leave them at their random initialisation and only log it
        missing = sorted(info["missing_keys"])
        raise UserError(f"{where}: cannot read the weights: {len(missing)} are missing, the first is {missing[0]}")
    return freeze(vae)


def freeze(vae: nn.Module) -> nn.Module:
    return vae.eval().requires_grad_(False)


@torch.no_grad()
def fold_normaliser(vae: nn.Module, mean: Tensor, std: Tensor) -> None:
    """Make an AutoencoderKL's latents come out with zero mean and unit standard deviation per channel, in place.

    mean, std: [c], of posterior samples over the training set. The affine goes into the 1x1 convolutions around the
    latent: mean' = (mean - m) / s, logvar' = logvar - 2 log s, and z = s z' + m before the decoder. Reconstructions
    stay the same, and a stock pipeline that knows scaling_factor alone is right with scaling_factor 1.
    """
    c = vae.config.latent_channels
    m, s = mean.to(vae.quant_conv.weight), std.to(vae.quant_conv.weight)
    vae.quant_conv.weight[:c] /= s[:, None, None, None]
    vae.quant_conv.bias[:c] = (vae.quant_conv.bias[:c] - m) / s
    vae.quant_conv.bias[c:] -= 2 * s.log()
    weight = vae.post_quant_conv.weight  # [c, c, 1, 1]
    vae.post_quant_conv.bias += weight[:, :, 0, 0] @ m
    weight *= s[None, :, None, None]
    vae.register_to_config(scaling_factor=1.0, shift_factor=0.0, latents_mean=[0.0] * c, latents_std=[1.0] * c)


def store_normaliser(vae: nn.Module, mean: Tensor, std: Tensor) -> None:
    """Write the measured latent statistics into the autoencoder's own config.

    An AutoencoderKL with quant convolutions has them folded in (see fold_normaliser), others see set_normaliser.
    """
    foldable = getattr(vae, "quant_conv", None) is not None and getattr(vae, "post_quant_conv", None) is not None
    if foldable and hasattr(vae.config, "latents_mean"):
        fold_normaliser(vae, mean, std)
    else:
        set_normaliser(vae, mean, std)


def set_normaliser(vae: nn.Module, mean: Tensor, std: Tensor) -> None:
    """Put measured statistics [c] of raw latents into the config, leaving every weight as it is.

    Per channel for AutoencoderKL and VQModel; else by the one scaling_factor the class knows,
    1 / sqrt(mean over channels of E[z^2]), which gives the latents unit second moment overall.  VQModel's own config has no
    latents_mean and latents_std, but keeps them, and no stock pipeline diffuses its latents in our layout.  They cannot be
    folded into its convolutions, as AutoencoderKL's are: in a space stretched by channel another code is the nearest.
    """
    if hasattr(vae.config, "latents_mean") or type(vae).__name__ == "VQModel":
        vae.register_to_config(scaling_factor=1.0, latents_mean=mean.tolist(), latents_std=std.tolist())
    else:
        vae.register_to_config(scaling_factor=float((mean.square() + std.square()).mean().rsqrt()))
