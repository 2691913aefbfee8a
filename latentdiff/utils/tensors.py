"""Shapes: how times meet a batch. The only place where t is widened."""

import torch
from torch import Tensor


def widen(t: float | Tensor, x: Tensor) -> Tensor:
    """Per-sample numbers, shaped to multiply x sample by sample, in the dtype and on the device of x.

    The result is [1, 1, ...] or [B, 1, ...] with x.ndim axes, so that no other axis of size B can be taken for the batch.

    t: a float, a 0-d tensor, or [B]. x: [B, ...]. ValueError, naming both shapes, for anything else.
    """
    # A Python number would become float32, and lose half its digits before it meets a float64 x
    t = (t if isinstance(t, Tensor) else torch.tensor(t, dtype=torch.float64)).to(device=x.device, dtype=x.dtype)
    if t.ndim == 0:
        return t.reshape((1,) * x.ndim)
    if x.ndim == 0 or t.ndim != 1 or t.shape[0] != x.shape[0]:
        raise ValueError(_mismatch(t, x))
    return t.reshape(-1, *(1,) * (x.ndim - 1))  # [B, 1, ...]


def per_sample(t: float | Tensor, x: Tensor) -> Tensor:
    """t as a float64 tensor [B] on the device of x [B, ...]. Takes and refuses what `widen` does."""
    t = torch.as_tensor(t, dtype=torch.float64).to(x.device)
    if t.ndim == 0:
        return t.expand(x.shape[0])
    if t.ndim != 1 or t.shape[0] != x.shape[0]:
        raise ValueError(_mismatch(t, x))
    return t


def flat_mean(x: Tensor) -> Tensor:
    """Mean over all axes but the batch: [B, ...] -> [B]."""
    return x.reshape(x.shape[0], -1).mean(dim=1)


def flat_std(x: Tensor) -> Tensor:
    """Population standard deviation over all axes but the batch: [B, ...] -> [B]."""
    return x.reshape(x.shape[0], -1).std(dim=1, correction=0)


def _mismatch(t: Tensor, x: Tensor) -> str:
    return f"t of shape {list(t.shape)} does not give one number per sample of x of shape {list(x.shape)}"
