"""Builds, loads and freezes autoencoders of diffusers, and stores the latent normaliser in them."""

from __future__ import annotations

import contextlib
import difflib
import inspect
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from latentdiff.errors import UserError
from latentdiff.models.loading import OWN_CLASSES, OWN_MODULE, load_part, part_class, quiet
from latentdiff.utils import atomic
from latentdiff.utils.json_files import read_json
from latentdiff.utils.shipped import shipped_weights

TRAINABLE = ("AutoencoderKL", "VQModel", *OWN_CLASSES)  # by stage 1
LOADABLE = ("AutoencoderKL", "VQModel", "AutoencoderTiny", "AutoencoderDC", *OWN_CLASSES)
SIZES = (  # arguments that AutoencoderKL and VQModel share, and that set the shapes of their weights
    "down_block_types",
    "up_block_types",
    "block_out_channels",
    "layers_per_block",
    "act_fn",
    "latent_channels",
    "norm_num_groups",
    "mid_block_add_attention",
)


def diffusers_class(name: str, allowed: tuple[str, ...], where: str) -> type:
    """The class called `name`, of diffusers or latentdiff. UserError, naming the key `where`, if it is not an allowed name."""
    if name not in allowed:
        raise UserError(f"{where}: {name!r} is not one of {', '.join(allowed)}")
    if name in OWN_CLASSES:
        return part_class([OWN_MODULE, name], where)
    import diffusers

    return getattr(diffusers, name)


def checked_arguments(cls: type, config: dict[str, Any], where: str) -> dict[str, Any]:
    """`config`, if every key is a constructor argument of `cls`. UserError, with the nearest valid key, otherwise."""
    valid = [name for name in inspect.signature(cls).parameters if name != "self"]
    for key in config:
        if key not in valid:
            near = difflib.get_close_matches(key, valid, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]!r}?" if near else f"valid keys: {', '.join(valid)}"
            raise UserError(f"{where}.{key}: unknown argument of {cls.__name__}; {hint}")
    return config


def build_autoencoder(type_name: str, config: dict[str, Any], channels: int, initial_logvar: float | None) -> nn.Module:
    """A new AutoencoderKL, VQModel, ResidualVQModel or FSQModel.

    Args:
        type_name: one of TRAINABLE.
        config: its constructor arguments; the block types follow from block_out_channels unless they are given.
        channels: image channels.
        initial_logvar: the log-variance of an AutoencoderKL's posterior at the start; None: as diffusers initialises it.
            A small one keeps posterior noise from hiding the image early in training. The KL term raises it later, in
            channels that carry no information.

    Raises:
        UserError: the class refuses its arguments, or an AutoencoderKL has no quant convolutions.
    """
    cls = diffusers_class(type_name, TRAINABLE, "model.type")
    arguments = {"in_channels": channels, "out_channels": channels, **checked_arguments(cls, config, "model.config")}
    blocks = arguments.get("block_out_channels")
    if blocks is not None:
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


@torch.no_grad()
def with_codes(kl: nn.Module, type_name: str, config: dict[str, Any]) -> nn.Module:
    """A new VQModel, ResidualVQModel or FSQModel with the encoder and decoder of a trained AutoencoderKL; the codebook is new.

    Its latents before quantisation are the means of the posterior; an FSQModel bounds them, so there they are squashed.

    Args:
        kl: the AutoencoderKL; it is not changed.
        type_name: one of TRAINABLE but AutoencoderKL.
        config: constructor arguments of the new one; SIZES are those of `kl` unless they are given.

    Raises:
        UserError: the class refuses its arguments, or the weights have other shapes than those of `kl`.
    """
    sizes = {key: kl.config[key] for key in SIZES}
    vae = build_autoencoder(type_name, {**sizes, **config}, kl.config.in_channels, None)
    c, old = kl.config.latent_channels, kl.state_dict()

    # An AutoencoderKL's quant_conv mixes the 2 c channels of means and log-variances. Merged into the convolution before it,
    # and without its half of the log-variances, it gives means alone. What is left of quant_conv then does nothing
    one = torch.eye(c)[:, :, None, None]
    weight, bias = old["encoder.conv_out.weight"], old["encoder.conv_out.bias"]
    means, moved = torch.eye(2 * c)[:c], torch.zeros(c)  # without a quant_conv
    if kl.quant_conv is not None:
        means, moved = old["quant_conv.weight"][:c, :, 0, 0], old["quant_conv.bias"][:c]
    new = {key: value for key, value in old.items() if key.startswith(("encoder.", "decoder.", "post_quant_conv."))}
    new["encoder.conv_out.weight"] = torch.einsum("oi,ichw->ochw", means, weight)
    new["encoder.conv_out.bias"] = means @ bias + moved
    new |= {"quant_conv.weight": one, "quant_conv.bias": torch.zeros(c)}
    if kl.post_quant_conv is None:
        new |= {"post_quant_conv.weight": one, "post_quant_conv.bias": torch.zeros(c)}

    books = {key: value for key, value in vae.state_dict().items() if key.startswith("quantize.")}
    if vae.config.vq_embed_dim not in (None, c):
        key = "fsq_levels" if type_name == "FSQModel" else "vq_embed_dim"
        raise UserError(f"model.config.{key}: has {vae.config.vq_embed_dim} channels; model.pretrained has {c}, so must it")
    shapes = {key: list(value.shape) for key, value in new.items()}
    for key, value in vae.state_dict().items():
        if key not in books and shapes.pop(key, None) != list(value.shape):
            there = list(new[key].shape) if key in new else "missing"
            raise UserError(
                f"model.config: {key} has the shape {list(value.shape)}, and in model.pretrained it is {there}; leave out "
                f"{', '.join(SIZES)}, they are those of model.pretrained"
            )
    if shapes:
        raise UserError(
            f"model.config: there is no {next(iter(shapes))}, which model.pretrained has; leave out {', '.join(SIZES)}"
        )
    vae.load_state_dict({**new, **books})
    return vae


def load_autoencoder(where: str, verify: bool = True) -> nn.Module:
    """A pretrained diffusers autoencoder on the CPU, frozen: in eval mode and without gradients.

    Args:
        where: the folder of a diffusers autoencoder or of a stage-1 run (its autoencoder/), a pipeline's folder (its vae/),
            a Hub name, or weights/NAME of those that come with latentdiff.
        verify: check a folder's weights against the hashes beside them.

    Raises:
        UserError: there is no autoencoder, its weights cannot be read, or they do not match their hashes.
    """
    found, folder = autoencoder_folder(where), Path(where)
    if found is not None:
        name = read_json(found / "config.json").get("_class_name", "")
        kind = diffusers_class(name, LOADABLE, f"{found / 'config.json'}: _class_name")
        return freeze(load_part(found, kind, verify=verify))
    if folder.exists() or where.count("/") != 1 or where.startswith((".", "/", "weights/")):
        raise UserError(
            f"{where}: no autoencoder there; expected a folder with config.json (or autoencoder/ or vae/), or a Hub name"
        )
    for subfolder in ("", "vae"):  # an autoencoder's repository, or a pipeline's
        with contextlib.suppress(OSError):
            return _from_hub(where, subfolder)
    raise UserError(f"{where}: neither a folder nor a diffusers autoencoder on the Hub that can be reached")


def autoencoder_folder(where: str) -> Path | None:
    """The folder of the weights that `where` names: its autoencoder/ or vae/, or itself; None where there is no such folder.

    "weights/NAME" is also found from other folders and in an installed package, where it comes with latentdiff.
    """
    # A process may have been killed between the two renames that publish a folder
    atomic.put_back(Path(where))
    atomic.put_back(Path(where) / "autoencoder")
    path = Path(where)
    if not path.exists() and path.parts[:1] == ("weights",):
        path = shipped_weights(path) or path
    candidates = (path / "autoencoder", path / "vae", path)
    return next((folder for folder in candidates if (folder / "config.json").is_file()), None)


def _from_hub(where: str, subfolder: str) -> nn.Module:
    import diffusers

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # diffusers names an argument that huggingface_hub no longer takes
        config = diffusers.AutoencoderKL.load_config(where, subfolder=subfolder)
    cls: Any = diffusers_class(config.get("_class_name", "AutoencoderKL"), LOADABLE, where)
    with quiet():
        vae, info = cls.from_pretrained(
            where, subfolder=subfolder, use_safetensors=True, low_cpu_mem_usage=False, output_loading_info=True
        )
    if info["missing_keys"]:  # diffusers leaves them at random initial values and only logs it
        missing = sorted(info["missing_keys"])
        raise UserError(f"{where}: cannot read the weights: {len(missing)} are missing, the first is {missing[0]}")
    return freeze(vae)


def freeze(vae: nn.Module) -> nn.Module:
    """The autoencoder itself, in eval mode, without gradients."""
    return vae.eval().requires_grad_(False)


@torch.no_grad()
def fold_normaliser(vae: nn.Module, mean: Tensor, std: Tensor) -> None:
    """Change an AutoencoderKL in place so that its latents have mean 0 and standard deviation 1 in each channel.

    The affine map is merged into the 1x1 convolutions around the latent: mean' = (mean - m) / s and
    logvar' = logvar - 2 log s after the encoder, z = s z' + m before the decoder. Reconstructions stay the same, and
    pipelines that know only scaling_factor work with scaling_factor 1.

    mean, std: [c], of posterior samples over the training set.
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
    """Store measured statistics [c] of latents in the autoencoder, in place.

    By `fold_normaliser` for an AutoencoderKL with quant convolutions, by `set_normaliser` for others.
    """
    foldable = getattr(vae, "quant_conv", None) is not None and getattr(vae, "post_quant_conv", None) is not None
    if foldable and hasattr(vae.config, "latents_mean"):
        fold_normaliser(vae, mean, std)
    else:
        set_normaliser(vae, mean, std)


def set_normaliser(vae: nn.Module, mean: Tensor, std: Tensor) -> None:
    """Put measured statistics [c] of raw latents into the autoencoder's config; no weight is changed.

    Per channel (latents_mean, latents_std) for AutoencoderKL and those with a codebook. Other classes know only one
    scaling_factor; it is 1 / sqrt(mean over channels of E[z^2]), so that the latents have second moment 1 overall. A
    VQModel's statistics cannot be folded into its convolutions: with channels scaled differently, another code would be the
    nearest.
    """
    if hasattr(vae.config, "latents_mean") or hasattr(vae, "quantize"):
        vae.register_to_config(scaling_factor=1.0, latents_mean=mean.tolist(), latents_std=std.tolist())
    else:
        vae.register_to_config(scaling_factor=float((mean.square() + std.square()).mean().rsqrt()))
