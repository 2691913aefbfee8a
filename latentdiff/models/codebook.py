"""Codebook health of a VQModel: which codes are used over an epoch, and new life for those that are not.

A batch says little about a codebook: with more codes than latent positions in a batch, most look unused. Counts are
therefore kept over an epoch and judged at its end.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class CodeUsage:
    """How often each of K codes was chosen since the last reset; exact, and additive over batches and processes."""

    def __init__(self, codes: int) -> None:
        self.counts = torch.zeros(codes, dtype=torch.int64)  # [K]

    def update(self, indices: Tensor) -> None:
        """Count code indices of any shape, each in 0..K-1."""
        chosen = indices.detach().flatten().cpu()
        counts = torch.bincount(chosen, minlength=len(self.counts))
        if len(counts) != len(self.counts):
            raise ValueError(f"code index {int(chosen.max())} in a codebook of {len(self.counts)}")
        self.counts += counts

    def merge(self, other: CodeUsage) -> None:
        """Add another count of the same codebook. (Across processes: sum `counts` over them.)"""
        self.counts += other.counts

    def reset(self) -> None:
        self.counts.zero_()

    def usage(self) -> float:
        """Share of the codes chosen at least once, 0 to 1."""
        return float((self.counts > 0).double().mean())

    def dead(self) -> Tensor:
        """Indices of the codes never chosen, int64 [number of them]."""
        return (self.counts == 0).nonzero().flatten()

    def perplexity(self) -> float:
        """exp(entropy) of the code frequencies: K when all are chosen alike, 1 for one code, 0 before any update."""
        total = int(self.counts.sum())
        if total == 0:
            return 0.0
        p = self.counts.double() / total  # [K]
        return float(torch.exp(-torch.special.xlogy(p, p).sum()))


@torch.no_grad()
def code_indices(vq_model: nn.Module, latents: Tensor) -> Tensor:
    """The code chosen at each position: encoder outputs [B, d, h, w] (VQModel.encode(x).latents) -> int64 [B, h, w]."""
    quantize: Any = vq_model.quantize
    indices: Tensor = quantize(latents)[2][2]
    return indices.view(latents.shape[0], *latents.shape[2:])


@torch.no_grad()
def revive_dead_codes(
    vq_model: nn.Module, counts: Tensor, encoder_outputs: Tensor, generator: torch.Generator | None = None
) -> int:
    """Replace codes with a count of 0 by randomly drawn encoder outputs; returns how many were replaced.

    counts: [K], over an epoch and summed over processes. encoder_outputs: [N, d, h, w], of recent images. Vectors are
    drawn without replacement, because of two equal codes one would stay dead: at most N·h·w codes are revived. With
    counts of zero throughout it serves to start the codebook on the data. Several processes must call it with the
    same counts, outputs and generator state. generator: on the CPU.
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
