"""Use of a VQModel's codebook: counts of each code over an epoch, and replacement of codes that were not used.

One batch says little: with more codes than latent positions in the batch, most codes look unused. So codes are counted over
a whole epoch.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class CodeUsage:
    """Counts how often each of K codes was chosen since the last reset. Counts of batches and processes can be added."""

    def __init__(self, codes: int) -> None:
        self.counts = torch.zeros(codes, dtype=torch.int64)  # [K]

    def update(self, indices: Tensor) -> None:
        """Count code indices of any shape, each from 0 to K - 1. ValueError for a larger one."""
        chosen = indices.detach().flatten().cpu()
        counts = torch.bincount(chosen, minlength=len(self.counts))
        if len(counts) != len(self.counts):
            raise ValueError(f"code index {int(chosen.max())} in a codebook of {len(self.counts)}")
        self.counts += counts

    def merge(self, other: CodeUsage) -> None:
        """Add the counts of another CodeUsage of the same codebook. (For several processes, sum `counts` over them.)"""
        self.counts += other.counts

    def reset(self) -> None:
        """Set all counts to 0."""
        self.counts.zero_()

    def usage(self) -> float:
        """Share of codes that were chosen at least once, 0 to 1."""
        return float((self.counts > 0).double().mean())

    def dead(self) -> Tensor:
        """Indices of the codes that were never chosen, int64, one dimension."""
        return (self.counts == 0).nonzero().flatten()

    def perplexity(self) -> float:
        """exp(entropy) of the code frequencies: K where all are chosen equally often, 1 for one code, 0 without counts."""
        total = int(self.counts.sum())
        if total == 0:
            return 0.0
        p = self.counts.double() / total  # [K]
        return float(torch.exp(-torch.special.xlogy(p, p).sum()))


@torch.no_grad()
def code_indices(vq_model: nn.Module, latents: Tensor) -> Tensor:
    """The index of the code at each position, int64 [B, h, w]. latents: VQModel.encode(x).latents, [B, d, h, w]."""
    quantize: Any = vq_model.quantize
    indices: Tensor = quantize(latents)[2][2]
    return indices.view(latents.shape[0], *latents.shape[2:])


def codebooks(vae: nn.Module) -> Tensor | None:
    """The codebook of each level of a quantising autoencoder, [L, K, d]; None where it has no codebook."""
    quantize: Any = getattr(vae, "quantize", None)
    return None if quantize is None else quantize.embedding.weight[None]


@torch.no_grad()
def code_levels(vae: nn.Module, latents: Tensor) -> Tensor:
    """The codes of each level, int64 [B, L, h, w]. latents: what the encoder gives, before quantisation, [B, d, h, w]."""
    return code_indices(vae, latents)[:, None]


def quantised(vae: nn.Module, codes: Tensor) -> Tensor:
    """The quantised latents of codes: the sum over the levels of the codebooks' rows, [B, d, h, w].

    codes: int64 [B, L, h, w], each from 0 to K - 1.
    """
    books = codebooks(vae)
    assert books is not None
    rows = torch.stack([book[codes[:, level]] for level, book in enumerate(books)])  # [L, B, h, w, d]
    return rows.sum(0).movedim(-1, 1).contiguous()


@torch.no_grad()
def revive_dead_codes(
    vq_model: nn.Module, counts: Tensor, encoder_outputs: Tensor, generator: torch.Generator | None = None
) -> int:
    """Replace codes with a count of 0 by random encoder outputs, in place; returns how many were replaced.

    Vectors are drawn without replacement, as of two equal codes one would stay unused. So at most N * h * w codes are
    replaced. With all counts 0, it initialises the codebook from data. Several processes must call it with the same
    arguments and the same state of the generator.

    Args:
        vq_model: the VQModel.
        counts: [K], over an epoch and summed over processes.
        encoder_outputs: [N, d, h, w], of recent images.
        generator: on the CPU.

    Raises:
        ValueError: the shapes do not fit the codebook [K, d].
    """
    quantize: Any = vq_model.quantize
    codebook: Tensor = quantize.embedding.weight  # [K, d]
    if counts.shape != codebook.shape[:1] or encoder_outputs.shape[1] != codebook.shape[1]:
        raise ValueError(
            f"codebook {tuple(codebook.shape)} does not go with counts {tuple(counts.shape)} "
            f"and encoder outputs {tuple(encoder_outputs.shape)}"
        )
    vectors = encoder_outputs.movedim(1, -1).flatten(0, -2)  # [N*h*w, d]
    dead = (counts == 0).nonzero().flatten()
    drawn = torch.randperm(len(vectors), generator=generator)[: len(dead)]
    dead = dead[: len(drawn)].to(codebook.device)
    codebook[dead] = vectors[drawn.to(vectors.device)].to(codebook)
    return len(drawn)
