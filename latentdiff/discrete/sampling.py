"""Sampling of codes, step by step from t = 1 to t = 0."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from latentdiff.discrete.common import Predict, check_codes, draw, predict_logits, require_probs
from latentdiff.discrete.processes import Absorbing, Process, level_times
from latentdiff.errors import UserError
from latentdiff.samplers import Callback
from latentdiff.samplers.common import apply_callback
from latentdiff.utils.random import Generators, rand
from latentdiff.utils.tensors import per_sample

ORDERS = ("random", "confidence")


@torch.no_grad()
def sample(
    predict: Predict,
    shape: Sequence[int],
    process: Process,
    steps: int = 50,
    generator: Generators = None,
    guidance: Callable[[Predict], Predict] | None = None,
    order: str = "random",
    known: Tensor | None = None,
    callback: Callback | None = None,
    device: torch.device | str | None = None,
    temperature: float = 1.0,
    confidence_noise: float = 4.5,
    **conditioning: Any,
) -> Tensor:
    """Draw codes: int64 of the given shape [B, ...], on `device`.

    A step draws all positions by themselves, given the codes of the step before. So few steps leave out dependencies between
    positions that are drawn in the same step; as the steps grow the error goes to 0, if the network is exact.

    Args:
        predict: predict(codes, t, **conditioning) -> logits; see `latentdiff.discrete`.
        shape: of the codes, with the batch.
        process: the process that the network was trained for.
        steps: how many, each of the same length in t. A step is one evaluation of the network.
        generator: one, or a list of B; sample i is then the same at any batch size. None for torch's default.
        guidance: a function predict -> predict, such as `ClassifierFree`.
        order: "random" draws the process backwards in time, by `Process.step`. "confidence" is for `Absorbing`, as in MaskGIT
            (arXiv 2202.04200, section 3.2, and its code): each step draws all masked positions, and masks those again of which
            the network is least sure, as many as the schedule has masked at the next time; at least one fewer than before,
            and one at least until the last step. Few steps then give better images, but not draws of the model's distribution.
            Levels in turn have each an order of their own.
        known: codes that are given, int64 of the given shape, with -1 where they are to be drawn. They are clean at every t.
            Under `Absorbing`, in random order, many steps then draw from p(free | known). Under `Uniform` the network cannot
            know that they are clean, and weighs them as if they were corrupted as at t: the draws lie between p(free | known)
            and p(free), nearer to the first.
        callback: callback(step, t, codes, x0), called after each step: t is the time at which the network was evaluated, codes
            [B, ...] the new state, with masks, and x0 [B, ...] the codes that the network thinks most probable. It may return
            codes to continue from.
        device: of the codes; by default that of known, or of the generator.
        temperature: above 0; divides the logits. 1 samples the model, below 1 is more typical and less varied.
        confidence_noise: of order="confidence": the scale of the Gumbel noise on the confidences (log-probabilities), which
            falls with the time of the schedule. 0 takes the surest positions, which makes images alike. 4.5 is MaskGIT's.
        conditioning: keyword arguments of predict.

    Raises:
        UserError: an option out of range, or logits or known codes of another shape.
        NotFiniteError: logits that are not finite.
    """
    _check(process, steps, order, temperature, confidence_noise)
    shape = tuple(shape)
    if known is not None:
        check_codes(known, process.num_codes, "known", least=-1)
        if known.shape != shape:
            raise UserError(f"known: shape {list(known.shape)} is not that of the samples, {list(shape)}")
        known = known.to(device or known.device)
    device = known.device if known is not None else device or _device(generator)
    predict = guidance(predict) if guidance is not None else predict
    codes = process.prior_sample(shape, generator, device)
    codes = codes if known is None else torch.where(known >= 0, known, codes)
    free = _count_masks(process, codes)  # [B, G]
    times = [1 - i / steps for i in range(steps)] + [0.0]
    for i, (t, s) in enumerate(zip(times[:-1], times[1:], strict=True)):
        logits = predict_logits(predict, codes, per_sample(t, codes), process.num_codes, conditioning)
        probs = require_probs((logits / temperature).softmax(-1))  # [B, ..., K]
        x0 = probs.argmax(-1)
        if process.mask is not None:
            x0 = torch.where(codes.eq(process.mask), x0, codes)
        if order == "confidence":
            left, noise = _masks_left(process, codes, free, s), confidence_noise * _schedule_times(s, free)
            codes = _surest(codes, probs, left, noise, generator)
        else:
            codes = process.step(codes, probs, t, s, generator)
        codes = codes if known is None else torch.where(known >= 0, known, codes)
        codes = apply_callback(callback, i, t, codes, x0)
    return codes


def _count_masks(process: Process, codes: Tensor) -> Tensor:
    """How many positions are masked, [B, G]: in each of the levels where they come in turn, else in all together (G = 1)."""
    return codes.eq(process.num_codes).reshape(len(codes), codes.shape[1] if process.in_turn else 1, -1).sum(2)


def _schedule_times(s: float, free: Tensor) -> Tensor:
    """The time of the schedule at s for each group of positions, [G]. free: [B, G]."""
    return level_times(torch.full((1,), s, dtype=torch.float64, device=free.device), free.shape[1])[0]


def _masks_left(process: Process, codes: Tensor, free: Tensor, s: float) -> Tensor:
    """How many positions stay masked at s, [B, G]. codes: before the step. free: [B, G], those masked at t = 1."""
    times, masked = _schedule_times(s, free), _count_masks(process, codes)
    left = torch.floor(free.double() * (1 - process.schedule.alpha(times)) + 1e-9)  # 1e-9: of rounding
    left = left.minimum((masked - 1).double()).clamp_min(1).long()
    return torch.where(times == 1, masked, torch.where(times == 0, 0, left))


def _surest(codes: Tensor, probs: Tensor, left: Tensor, noise: Tensor, generator: Generators) -> Tensor:
    """codes [B, ...] with all masks drawn from probs [B, ..., K], and of each group the least sure ones masked again.

    left: how many, [B, G]. noise: the scale of the Gumbel noise on their confidences, [G].
    """
    drawn = draw(probs, generator)
    mask = probs.shape[-1]  # the code of a mask
    groups = len(codes), left.shape[1], -1
    is_masked = codes.eq(mask).reshape(groups)
    confidence = probs.gather(-1, drawn[..., None])[..., 0].double().log().reshape(groups)
    if bool((noise > 0).any()):
        chance = rand(codes.shape, generator, codes.device, torch.float64).reshape(groups)
        confidence = confidence - noise[:, None] * torch.log(-torch.log(chance))  # Gumbel noise
    confidence = torch.where(is_masked, confidence, torch.inf)
    rank = confidence.argsort(dim=2, stable=True).argsort(dim=2)  # 0: the least sure
    again = (is_masked & (rank < left[..., None])).reshape(codes.shape)
    return torch.where(again, mask, torch.where(is_masked.reshape(codes.shape), drawn, codes))


def _device(generator: Generators) -> torch.device:
    """The generators' device, else torch's default."""
    first = generator if isinstance(generator, torch.Generator) else next(iter(generator or ()), None)
    return first.device if first is not None else torch.get_default_device()


def _check(process: Process, steps: int, order: str, temperature: float, confidence_noise: float) -> None:
    """UserError for an option of `sample` that is out of range."""
    if steps < 1:
        raise UserError(f"steps: must be at least 1, not {steps}")
    if order not in ORDERS:
        raise UserError(f"order: {order!r} is unknown; valid: {', '.join(ORDERS)}")
    if order == "confidence" and not isinstance(process, Absorbing):
        raise UserError('order: "confidence" needs a process with masks; valid for this one: "random"')
    if not temperature > 0:
        raise UserError(f"temperature: must be above 0, not {temperature}")
    if not confidence_noise >= 0:
        raise UserError(f"confidence_noise: must be at least 0, not {confidence_noise}")
