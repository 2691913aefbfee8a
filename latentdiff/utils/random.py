"""Randomness as an argument: per-sample generators, and seeds that are derived from what they stand for."""

import hashlib
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

Generators = torch.Generator | Sequence[torch.Generator] | None


def randn(
    shape: Sequence[int],
    generator: Generators = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Standard normal noise of the given shape [B, ...].

    Args:
        shape: the first axis is the batch.
        generator: None (torch's default), one for the whole batch, or a list of B, one per sample. With a list, sample i is the
            same at any batch size and at any place in the batch.
        device: of the result; by default the generator's. Noise is drawn on the generator's device and moved, so that a CPU
            generator gives the same noise everywhere.
        dtype: of the result. Noise is drawn in float32 and cast, unless this is float64.

    Raises:
        ValueError: the number of generators is not B.
    """
    return _draw(torch.randn, shape, generator, device, dtype)


def rand(
    shape: Sequence[int],
    generator: Generators = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Uniform numbers in [0, 1) of the given shape [B, ...]. Arguments and errors as in `randn`."""
    return _draw(torch.rand, shape, generator, device, dtype)


def randn_like(x: Tensor, generator: Generators = None) -> Tensor:
    """Standard normal noise with the shape, device and dtype of x [B, ...]. generator, and errors: as in `randn`."""
    return randn(x.shape, generator, x.device, x.dtype)


def derive_seed(*parts: int | str) -> int:
    """A seed in [0, 2**63) for `torch.Generator.manual_seed`, a fixed function of its parts.

    parts: integers and strings that say what the seed is for; 1 and "1" differ. The result is the same on every machine and in
    every process.
    """
    text = "\x1f".join(f"{type(part).__name__}:{part}" for part in parts)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def generators(seed: int, indices: Iterable[int], device: torch.device | str = "cpu") -> list[torch.Generator]:
    """One generator per index, each seeded by (seed, index) alone, so that image i is the same in any batch.

    seed: any integer. indices: of the samples. device: where they draw.
    """
    return [torch.Generator(device).manual_seed(derive_seed(seed, int(index))) for index in indices]


def _draw(draw, shape, generator, device, dtype) -> Tensor:
    work = torch.float64 if dtype == torch.float64 else torch.float32
    if generator is None:
        return draw(tuple(shape), device=device, dtype=work).to(dtype)
    if isinstance(generator, torch.Generator):
        noise = draw(tuple(shape), generator=generator, device=generator.device, dtype=work)
        return noise.to(device=device or generator.device, dtype=dtype)
    if len(generator) != shape[0]:
        raise ValueError(f"{len(generator)} generators for a batch of shape {list(shape)}: one per sample is needed")
    if not generator:
        return torch.empty(tuple(shape), device=device, dtype=dtype)
    rows = [draw(tuple(shape[1:]), generator=g, device=g.device, dtype=work) for g in generator]
    if len({row.device for row in rows}) > 1:
        rows = [row.to(device or row.device) for row in rows]
    return torch.stack(rows).to(
        device=device or rows[0].device, dtype=dtype
    )  # [B, ...]; moved at once, as many copies are slow
