"""Codebooks of a VQModel and its kin: codes and rows, use of the codes, replacement of unused ones, running means.

A quantising autoencoder has L levels of K codes each (L = 1 but for residual VQ). `quantize.embedding.weight` holds their rows,
one level after the other: [L K, d]. A latent is quantised to the sum of one row of each level.

One batch says little of which codes are used: with more codes than latent positions in the batch, most look unused. So codes
are counted over many batches.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

EMBEDDING = "quantize.embedding.weight"  # its name among an autoencoder's weights


class CodeUsage:
    """Counts how often each of K codes was chosen since the last reset. Counts of batches and processes can be added.

    codes: K. levels: L, each with codes of its own. `counts` is [K] for one level, else [L, K].
    """

    def __init__(self, codes: int, levels: int = 1) -> None:
        self.counts = torch.zeros(codes if levels == 1 else (levels, codes), dtype=torch.int64)

    @classmethod
    def of(cls, counts: Tensor) -> CodeUsage:
        """The usage of codes that were counted elsewhere; counts: int64 [K]."""
        usage = cls(len(counts))
        usage.counts += counts
        return usage

    def update(self, indices: Tensor) -> None:
        """Count codes, each from 0 to K - 1: of any shape, or with several levels [..., L]. ValueError for a larger one."""
        counts = self._by_level()
        for own, chosen in zip(counts, indices.detach().cpu().reshape(-1, len(counts)).unbind(1), strict=True):
            found = torch.bincount(chosen, minlength=len(own))
            if len(found) != len(own):
                raise ValueError(f"code index {int(chosen.max())} in a codebook of {len(own)}")
            own += found

    def merge(self, other: CodeUsage) -> None:
        """Add the counts of another CodeUsage of the same codebook. (For several processes, sum `counts` over them.)"""
        self.counts += other.counts

    def reset(self) -> None:
        """Set all counts to 0."""
        self.counts.zero_()

    def usage(self) -> float:
        """Share of codes that were chosen at least once, 0 to 1; of all levels together."""
        return float((self.counts > 0).double().mean())

    def dead(self) -> Tensor:
        """Indices of the codes that were never chosen, int64, one dimension; with levels, code k of level l is l K + k."""
        return (self.counts.flatten() == 0).nonzero().flatten()

    def perplexity(self) -> float:
        """exp(entropy) of the code frequencies: K where all are chosen equally often, 1 for one code, 0 without counts.

        With several levels it is of the mean entropy of a level.
        """
        counts = self._by_level().double()
        if int(counts.sum()) == 0:
            return 0.0
        p = counts / counts.sum(1, keepdim=True)  # [L, K]
        return float(torch.exp(-torch.special.xlogy(p, p).sum(1).mean()))

    def levels(self) -> list[CodeUsage]:
        """The usage of each level alone, coarsest first."""
        return [CodeUsage.of(counts) for counts in self._by_level()]

    def _by_level(self) -> Tensor:
        return self.counts.view(-1, self.counts.shape[-1])  # [L, K], the same memory


def codebooks(vae: nn.Module) -> Tensor | None:
    """The codebook of each level of a quantising autoencoder, [L, K, d], the same memory; None where it has no codebook."""
    quantize: Any = getattr(vae, "quantize", None)
    if quantize is None:
        return None
    weight: Tensor = quantize.embedding.weight
    return weight.view(-1, quantize.n_e, weight.shape[1])


def is_trained(vae: nn.Module) -> bool:
    """Whether an autoencoder has a codebook that training changes; that of an FSQModel is a fixed grid."""
    quantize = getattr(vae, "quantize", None)
    return quantize is not None and not getattr(quantize, "fixed", False)


@torch.no_grad()
def code_indices(vq_model: nn.Module, latents: Tensor) -> Tensor:
    """The index of the code at each position, int64 [B, h, w]. latents: VQModel.encode(x).latents, [B, d, h, w].

    For a model of one level; `codes_of` is for all.
    """
    return codes_of(vq_model, latents)[:, 0]


@torch.no_grad()
def codes_of(vae: nn.Module, latents: Tensor) -> Tensor:
    """The codes of each level, int64 [B, L, h, w]. latents: what `encode` gives, before quantisation, [B, d, h, w]."""
    quantize: Any = vae.quantize
    indices: Tensor = quantize(latents)[2][2]
    return indices.view(latents.shape[0], *latents.shape[2:], -1).movedim(-1, 1).contiguous()


def quantised(vae: nn.Module, codes: Tensor) -> Tensor:
    """The quantised latents of codes: the sum over the levels of the codebooks' rows, [B, d, h, w].

    codes: int64 [B, L, h, w], each from 0 to K - 1.
    """
    books = codebooks(vae)
    assert books is not None
    rows = torch.stack([book[codes[:, level]] for level, book in enumerate(books)])  # [L, B, h, w, d]
    return rows.sum(0).movedim(-1, 1).contiguous()


def _as_vectors(latents: Tensor) -> Tensor:
    return latents.movedim(1, -1).flatten(0, -2)  # [B*h*w, d]


def revive_dead_codes(
    vq_model: nn.Module, counts: Tensor, encoder_outputs: Tensor, generator: torch.Generator | None = None
) -> int:
    """Replace codes with a count of 0 by random encoder outputs, in place; returns how many were replaced. See `revive`."""
    return len(revive(vq_model, counts, encoder_outputs, generator))


@torch.no_grad()
def revive(vae: nn.Module, counts: Tensor, encoder_outputs: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Replace codes with a count of 0 by random encoder outputs, in place; returns the rows of the codebook that are new.

    Of a level after the first, by what the levels before it leave over. Vectors are drawn without replacement, as of two equal
    codes one would stay unused. So at most N * h * w codes of a level are replaced. With all counts 0, it initialises the
    codebook from data. Several processes must call it with the same arguments and the same state of the generator.

    Args:
        vae: the VQModel, or a ResidualVQModel.
        counts: [K], or [L, K] with several levels; over many batches, and summed over processes.
        encoder_outputs: [N, d, h, w], of recent images.
        generator: on the CPU.

    Raises:
        ValueError: the shapes do not fit the codebook [K, d].
    """
    books = codebooks(vae)
    assert books is not None
    levels, codes, channels = books.shape
    if counts.numel() != levels * codes or counts.shape[-1] != codes or encoder_outputs.shape[1] != channels:
        raise ValueError(
            f"codebook {tuple(books.shape[levels == 1 :])} does not go with counts {tuple(counts.shape)} "
            f"and encoder outputs {tuple(encoder_outputs.shape)}"
        )
    rest = _as_vectors(encoder_outputs).to(books)
    rows = []
    for level, (book, count) in enumerate(zip(books, counts.view(levels, codes), strict=True)):
        dead = (count == 0).nonzero().flatten()
        drawn = torch.randperm(len(rest), generator=generator)[: len(dead)]
        dead = dead[: len(drawn)].to(book.device)
        book[dead] = rest[drawn.to(rest.device)]
        rows.append(level * codes + dead)
        if level + 1 < levels:
            rest = rest - book[torch.cdist(rest, book).argmin(1)]
    return torch.cat(rows)


class CodebookEma:
    """Codebooks that follow the latents which chose each code, instead of a gradient (VQ-VAE, arXiv 1711.00937, appendix A.1).

    N <- g N + (1 - g) n and m <- g m + (1 - g) (sum of the n latents), for each code; its row is m / N. So that no row is
    divided by 0, the counts are smoothed (Laplace): N becomes (N + eps) / (sum N + K eps) * sum N.

    Args:
        vae: a VQModel or ResidualVQModel, on its device. Its rows are where the means start.
        decay: g.
        eps: of the smoothing.
    """

    def __init__(self, vae: nn.Module, decay: float, eps: float = 1e-5):
        self.decay, self.eps = decay, eps
        books = codebooks(vae)
        assert books is not None
        self.counts = torch.ones_like(books[..., 0])  # N, [L, K]
        self.sums = books.detach().clone()  # m, [L, K, d]

    @torch.no_grad()
    def update(self, vae: nn.Module, latents: Tensor, codes: Tensor, total: Any = lambda x: x) -> None:
        """Take in the latents of a batch, and change the codebooks in place.

        Args:
            vae: whose codebooks these are; still with the rows that the codes were chosen from.
            latents: [B, d, h, w], before quantisation.
            codes: of these, [B*h*w, L], or [B*h*w] for one level.
            total: sums a tensor over the processes, each of which has a part of the batch.
        """
        books = codebooks(vae)
        assert books is not None
        new = torch.zeros(*self.counts.shape, 1 + books.shape[2]).to(books)  # [L, K, 1 + d]: n and the sum of its latents
        for own, vectors, chosen in zip(
            new, _left_over(books, latents, codes), codes.view(-1, len(books)).unbind(1), strict=True
        ):
            own.index_add_(0, chosen, torch.cat([torch.ones_like(vectors[:, :1]), vectors], 1))
        new = total(new)
        self.counts.lerp_(new[..., 0], 1 - self.decay)
        self.sums.lerp_(new[..., 1:], 1 - self.decay)
        all_counts = self.counts.sum(1, keepdim=True)
        smoothed = (self.counts + self.eps) / (all_counts + self.counts.shape[1] * self.eps) * all_counts
        books.copy_(self.sums / smoothed[..., None])

    @torch.no_grad()
    def restart(self, vae: nn.Module, rows: Tensor) -> None:
        """Begin anew for rows [n] of the codebook [L K, d] that were replaced: with a count of 1, at their new values."""
        books = codebooks(vae)
        assert books is not None
        self.counts.view(-1)[rows] = 1.0
        self.sums.view(-1, books.shape[2])[rows] = books.reshape(-1, books.shape[2])[rows]

    def state(self) -> dict[str, Tensor]:
        """What a training state keeps of it, in the same memory."""
        return {"mean_counts": self.counts, "mean_sums": self.sums}

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Continue from what `state` gave. KeyError where it is missing."""
        for name, own in self.state().items():
            own.copy_(tensors[name])


def _left_over(books: Tensor, latents: Tensor, codes: Tensor) -> Iterator[Tensor]:
    """What each level has to quantise, [B*h*w, d]: the latents less the rows that the levels before it chose."""
    rest = _as_vectors(latents).to(books)
    for book, chosen in zip(books, codes.view(-1, len(books)).unbind(1), strict=True):
        yield rest
        rest = rest - book[chosen]
