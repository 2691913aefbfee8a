"""The U-Net over codes of stage "discrete": a new one, or one over latents whose first and last layer are made anew."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from latentdiff.config import DiscreteConfig
from latentdiff.errors import UserError
from latentdiff.models.loading import load_part
from latentdiff.models.unet import build_unet, check_sides, find_pretrained, recorded_process, sample_size

OF_NOISE = ("epsilon", "v_prediction", "flow", "score")  # predictions that x0 enters with a negative sign


def make_code_unet(
    config: DiscreteConfig,
    code_shape: tuple[int, int, int],
    num_codes: int,
    num_class_embeds: int | None,
    text_width: int | None = None,
    vectors: Tensor | None = None,
    counts: Tensor | None = None,
) -> nn.Module:
    """The U-Net that training starts from: with L (K + 1) channels in, for each level its codes and the mask, and L K out.

    Args:
        code_shape: (L, h, w) of the codes.
        num_codes: K.
        num_class_embeds, text_width: as of `make_unet`.
        vectors: the codebooks in normalised latents, [L, K, d], and
        counts: how often each code occurs, [L, K], that the two layers start from; None leaves them random.

    Raises:
        UserError: the config, the codes and the U-Net contradict each other.
    """
    levels, height, width = code_shape
    taken, given = levels * (num_codes + 1), levels * num_codes
    latent_shape = given, height, width
    if config.model.pretrained is None:
        unet = build_unet(config, latent_shape, num_class_embeds, text_width, taken)
        if vectors is not None and counts is not None:
            start_from_codebook(unet, vectors, counts)
        return unet
    start = find_pretrained(config)
    check_sides(latent_shape, len(start.config["block_out_channels"]), "model.pretrained")
    rows = start.config.get("num_class_embeds")
    if rows != num_class_embeds:
        raise UserError(
            f"model.pretrained {start.name}: its num_class_embeds is {rows}, and data.source {config.data.source} with "
            f"condition.dropout {config.condition.dropout:g} needs {num_class_embeds} (one a class, and the null class)"
        )
    unet: Any = load_part(start.folder, start.kind)
    first, last = unet.conv_in, unet.conv_out
    if vectors is not None and (first.in_channels, last.out_channels) != (vectors.shape[2],) * 2:
        raise UserError(
            f"autoencoder {config.autoencoder}: its codes stand for vectors of {vectors.shape[2]} channels, and the U-Net of "
            f"model.pretrained {start.name} has in_channels {first.in_channels} and out_channels {last.out_channels}"
        )
    unet.conv_in = nn.Conv2d(taken, first.out_channels, first.kernel_size, padding=first.padding)
    unet.conv_out = nn.Conv2d(last.in_channels, given, last.kernel_size, padding=last.padding)
    with torch.no_grad():
        unet.conv_in.bias.copy_(first.bias)
    if vectors is not None and counts is not None:
        recorded = recorded_process(start)
        sign = 1.0 if recorded is not None and recorded[1] not in OF_NOISE else -1.0
        continue_from_latents(unet, first, last, vectors, counts, sign)
    unet.register_to_config(in_channels=taken, out_channels=given, sample_size=sample_size(latent_shape))
    return unet


@torch.no_grad()
def start_from_codebook(unet: nn.Module, vectors: Tensor, counts: Tensor) -> None:
    """Give a new U-Net over codes a first and a last layer in which codes of near vectors are alike.

    The layers see a code as an index (one channel each), so they would have to learn each code by itself. Here the weights of
    a code start as one random linear function of its vector, for all codes of a level. All of them are trained as usual. The
    bias of the last layer starts at the codes' frequencies. Random numbers are torch's default, as in a new network.

    Args:
        unet: new, of diffusers, with L (K + 1) channels in and L K out; the last of a level's K + 1 is the mask.
        vectors: the codebooks, [L, K, d].
        counts: how often each code occurs in the data, [L, K].
    """
    first: Any = unet.conv_in
    last: Any = unet.conv_out
    levels, codes, dim = vectors.shape
    centred = _centred(vectors)
    centred = centred / centred.std(dim=(1, 2), keepdim=True).clamp_min(1e-12)
    # What the first layer is given of a channel: the code's vector, that it is a code, or that it is the mask
    features = torch.zeros(levels, codes + 1, dim + 2).to(first.weight)
    features[:, :codes, :dim] = centred.to(features)
    features[:, :codes, dim] = 1
    features[:, codes, dim + 1] = 1
    # Each level has one channel that is not 0: either d + 1 numbers of unit size, or one
    bound = math.sqrt(2 / (levels * (dim + 2) * math.prod(first.kernel_size)))
    mixing = _uniform(bound, (levels, first.out_channels, dim + 2, *first.kernel_size)).to(features)
    first.weight.copy_(torch.einsum("lofxy,lkf->olkxy", mixing, features).flatten(1, 2))
    bound = 1 / math.sqrt(last.in_channels * math.prod(last.kernel_size))
    mixing = _uniform(bound, (levels, dim, last.in_channels, *last.kernel_size)).to(features)
    last.weight.copy_(torch.einsum("ldixy,lkd->lkixy", mixing, features[:, :codes, :dim]).flatten(0, 1))
    last.bias.copy_(_log_frequencies(counts))


@torch.no_grad()
def continue_from_latents(
    unet: nn.Module, first: nn.Module, last: nn.Module, vectors: Tensor, counts: Tensor, sign: float
) -> None:
    """Make the first and the last layer of a U-Net over codes of those of a U-Net over latents.

    The first layer then gives for codes what it gave for the latent that they stand for, the sum of their vectors; a mask adds
    nothing to it but a small random part. In the last layer the logit of a code is the product of its vector with what the
    former layer gave, which holds an estimate of x0.

    Args:
        unet: with new layers, of L (K + 1) channels in and L K out.
        first, last: the layers of the U-Net over latents, of d channels.
        vectors: the codebooks in normalised latents, [L, K, d].
        counts: how often each code occurs in the data, [L, K].
        sign: 1 where that U-Net predicted x0, -1 where x0 is subtracted in what it predicted.
    """
    new_first: Any = unet.conv_in
    new_last: Any = unet.conv_out
    of_first: Any = first.weight
    of_last: Any = last.weight
    levels, codes, _ = vectors.shape
    rows = torch.einsum("ocxy,lkc->olkxy", of_first, vectors.to(of_first))
    mask = _uniform(float(of_first.std()), (of_first.shape[0], levels, 1, *of_first.shape[2:])).to(rows)
    new_first.weight.copy_(torch.cat([rows, mask], dim=2).flatten(1, 2))
    centred = _centred(vectors).to(of_last)
    spread = centred.square().sum(2).mean(1)  # [L]
    rows = torch.einsum("lkd,dixy->lkixy", centred * (2 * sign / spread.clamp_min(0.05))[:, None, None], of_last)
    new_last.weight.copy_(rows.flatten(0, 1))
    new_last.bias.copy_(_log_frequencies(counts))


def _centred(vectors: Tensor) -> Tensor:
    return vectors - vectors.mean(1, keepdim=True)


def _log_frequencies(counts: Tensor) -> Tensor:
    """The logarithm of each code's share in its level over 1 / K, with one more of each code: [L K]."""
    more = counts + 1.0
    return (more / more.mean(1, keepdim=True)).log().flatten()


def _uniform(bound: float, shape: tuple[int, ...]) -> Tensor:
    return (2 * torch.rand(shape) - 1) * bound
